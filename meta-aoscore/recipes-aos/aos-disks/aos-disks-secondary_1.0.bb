SUMMARY = "Disks of a Secondary Node"
DESCRIPTION = "Volumes of the encrypted data disk of a Secondary Node."

require recipes-aos/aos-target/aos-files.inc

AOSCORE_NODE_KIND = "secondary"
AOSCORE_PARTS = "disks"

# Without an encrypted disk there may be nothing to say.
ALLOW_EMPTY:${PN} = "1"
RDEPENDS:${PN} = "quota ${@'aoscore-ctl cryptsetup lvm2 e2fsprogs-mke2fs e2fsprogs-tune2fs opensc' if bb.utils.to_boolean(d.getVar('AOS_DATA_DISK')) else ''}"
RCONFLICTS:${PN} = "aos-disks-main"
RDEPENDS:${PN} += "${@'nfs-utils-mount' if bb.utils.to_boolean(d.getVar('AOS_NFS')) else ''}"
