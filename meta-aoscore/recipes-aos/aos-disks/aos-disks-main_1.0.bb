SUMMARY = "Disks of a Main Node"
DESCRIPTION = "Volumes of the encrypted data disk of a Main Node, and what it shares with the others."

require recipes-aos/aos-target/aos-files.inc

AOSCORE_NODE_KIND = "main"
AOSCORE_PARTS = "disks"

# Without an encrypted disk there may be nothing to say.
ALLOW_EMPTY:${PN} = "1"
RDEPENDS:${PN} = "quota ${@'aoscore-ctl cryptsetup lvm2 e2fsprogs-mke2fs e2fsprogs-tune2fs opensc' if bb.utils.to_boolean(d.getVar('AOS_DATA_DISK')) else ''}"
RCONFLICTS:${PN} = "aos-disks-secondary"
RDEPENDS:${PN} += "${@'nfs-utils rpcbind' if bb.utils.to_boolean(d.getVar('AOS_NFS')) else ''}"
