SUMMARY = "Boot menu and version of the boot partitions of an AosEdge node"
DESCRIPTION = "grub.cfg with the kernel arguments that the initramfs modules read, and the version that SM's boot runtime reads."
HOMEPAGE = "https://github.com/aosedge"
LICENSE = "Apache-2.0"
LIC_FILES_CHKSUM = "file://${COMMON_LICENSE_DIR}/Apache-2.0;md5=89aea4e17d99a7cacdbeed46a0096b10"

# Names of the machine's kernel image and serial console go into the files.
PACKAGE_ARCH = "${MACHINE_ARCH}"
INHIBIT_DEFAULT_DEPS = "1"
PACKAGES = ""

inherit deploy nopackages

SRC_URI = "file://grub.cfg.in"
S = "${UNPACKDIR}"

# SM's boot runtime takes the disk of the boot partitions from root= (sm-runtime.md §4.1), so it is a device there. The
# others are found by name, whatever the disk is called.
AOS_DISK_PREFIX = "/dev/${AOS_IMAGE_DISK}${@'p' if (d.getVar('AOS_IMAGE_DISK') or '')[-1:].isdigit() else ''}"
AOS_KERNEL_ARGS ?= "\
    root=${AOS_DISK_PREFIX}3 ro rootwait \
    cgroup_no_v1=all systemd.unified_cgroup_hierarchy=1 \
    vardir.disk=PARTLABEL=var \
    opendisk.target=PARTLABEL=aos opendisk.pkcs11=${AOS_KEYS} opendisk.pkcs11.pinfile=/var/aos/iam/.usrpin \
    aosupdate.disk=/dev/aosvg/workdirs aosupdate.path=sm/runtimes/rootfs \
    aosupdate.roots=PARTLABEL=rootfs_a,PARTLABEL=rootfs_b \
"
AOS_CONSOLE ?= "${@(d.getVar('SERIAL_CONSOLES') or '115200;ttyS0').split()[0].partition(';')[2]}"

do_configure[noexec] = "1"

do_compile() {
    sed -e 's|@KERNEL@|${KERNEL_IMAGETYPE}|' \
        -e 's|@ARGUMENTS@|${@" ".join((d.getVar("AOS_KERNEL_ARGS") or "").split())} console=${AOS_CONSOLE}|' \
        ${UNPACKDIR}/grub.cfg.in > ${B}/grub.cfg
    printf 'VERSION="%s"\n' '${AOS_BOOT_IMAGE_VERSION}' > ${B}/version
}

do_install[noexec] = "1"

do_deploy() {
    install -m 0644 ${B}/grub.cfg ${DEPLOYDIR}/aos-grub.cfg
    install -m 0644 ${B}/version ${DEPLOYDIR}/aos-boot-version
}

addtask deploy after do_compile before do_build

python () {
    import re

    version = d.getVar("AOS_BOOT_IMAGE_VERSION") or ""
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        bb.fatal("AOS_BOOT_IMAGE_VERSION is '%s', it must be X.Y.Z: SM compares it with what the cloud wants" % version)
}
