SUMMARY = "Initramfs of an AosEdge node"
DESCRIPTION = "Opens the data disk, applies or tries a root file system update, then hands over to the real root."
HOMEPAGE = "https://github.com/aosedge"
LICENSE = "Apache-2.0"

inherit core-image

PACKAGE_INSTALL = "\
    base-passwd \
    initramfs-framework-base \
    initramfs-module-rootfs \
    initramfs-module-udev \
    udev \
    ${AOS_INITRAMFS_SCRIPTS} \
    ${VIRTUAL-RUNTIME_base-utils} \
    ${ROOTFS_BOOTSTRAP_INSTALL} \
"

# Nothing of the real root: no login, no languages, no debug tools.
IMAGE_FEATURES = ""
IMAGE_LINGUAS = ""
IMAGE_NAME_SUFFIX = ""
NO_RECOMMENDATIONS = "1"

IMAGE_FSTYPES = "${INITRAMFS_FSTYPES}"
IMAGE_ROOTFS_SIZE = "8192"
IMAGE_ROOTFS_EXTRA_SPACE = "0"
# An initramfs in an initramfs, or its own kernel, makes no sense.
PACKAGE_EXCLUDE = "kernel-image-*"
INITRAMFS_IMAGE = ""
