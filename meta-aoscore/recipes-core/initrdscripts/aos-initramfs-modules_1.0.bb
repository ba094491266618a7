SUMMARY = "Initramfs modules of an AosEdge node"
DESCRIPTION = "For the initramfs framework of openembedded-core: kernel log, /run and /var handed over, the encrypted data \
disk opened with the node's token, root file system updates with trial and revert, the machine id."
HOMEPAGE = "https://github.com/aosedge"
LICENSE = "Apache-2.0"
LIC_FILES_CHKSUM = "file://${COMMON_LICENSE_DIR}/Apache-2.0;md5=89aea4e17d99a7cacdbeed46a0096b10"

inherit allarch

INHIBIT_DEFAULT_DEPS = "1"

SRC_URI = "\
    file://aosroot \
    file://aosupdate \
    file://kmsglog \
    file://machineid \
    file://opendisk \
    file://rundir \
    file://vardir \
"
S = "${UNPACKDIR}"

# NUMBER-NAME: the framework runs them in this order. Its own are udev 01, rootfs 90 and finish 99.
AOS_MODULES = "00-kmsglog 00-rundir 02-vardir 05-opendisk 80-aosroot 95-aosupdate 96-machineid"

do_configure[noexec] = "1"
do_compile[noexec] = "1"

do_install() {
    install -d ${D}/init.d
    for module in ${AOS_MODULES}; do
        install -m 0755 ${UNPACKDIR}/${module#*-} ${D}/init.d/$module
    done
}

PACKAGES = "\
    initramfs-module-aos-aosupdate \
    initramfs-module-aos-kmsglog \
    initramfs-module-aos-machineid \
    initramfs-module-aos-opendisk \
    initramfs-module-aos-rundir \
    initramfs-module-aos-vardir \
"

SUMMARY:initramfs-module-aos-kmsglog = "Messages of the initramfs in the kernel log"
FILES:initramfs-module-aos-kmsglog = "/init.d/00-kmsglog"
RDEPENDS:initramfs-module-aos-kmsglog = "initramfs-framework-base"

SUMMARY:initramfs-module-aos-rundir = "/run handed over to the booted system"
FILES:initramfs-module-aos-rundir = "/init.d/00-rundir"
RDEPENDS:initramfs-module-aos-rundir = "initramfs-framework-base"

SUMMARY:initramfs-module-aos-vardir = "/var mounted early"
FILES:initramfs-module-aos-vardir = "/init.d/02-vardir"
RDEPENDS:initramfs-module-aos-vardir = "initramfs-module-aos-kmsglog initramfs-module-udev"

SUMMARY:initramfs-module-aos-opendisk = "Encrypted data disk opened with the node's token"
FILES:initramfs-module-aos-opendisk = "/init.d/05-opendisk"
RDEPENDS:initramfs-module-aos-opendisk = "\
    cryptsetup \
    initramfs-module-aos-kmsglog \
    initramfs-module-udev \
    lvm2 \
    opensc \
    ${@bb.utils.contains('AOS_KEYS', 'optee', '', 'softhsm', d)} \
"

SUMMARY:initramfs-module-aos-aosupdate = "Root file system updates"
FILES:initramfs-module-aos-aosupdate = "/init.d/80-aosroot /init.d/95-aosupdate"
RDEPENDS:initramfs-module-aos-aosupdate = "\
    initramfs-module-aos-kmsglog \
    initramfs-module-aos-vardir \
    initramfs-module-rootfs \
    rsync \
"

SUMMARY:initramfs-module-aos-machineid = "Machine id of a read-only root"
FILES:initramfs-module-aos-machineid = "/init.d/96-machineid"
RDEPENDS:initramfs-module-aos-machineid = "initramfs-module-aos-vardir"
