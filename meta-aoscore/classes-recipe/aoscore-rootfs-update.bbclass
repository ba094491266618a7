# Updates of a node as the SM's runtimes take them: the root file system whole or as a difference, the boot partition.
#
# In an image:
#     AOS_UPDATE = "full"                 or "incremental", against the kept tree of AOS_ROOTFS_REF_VERSION
# Results in DEPLOY_DIR_IMAGE: PN-VERSION.full.squashfs, PN-VERSION.inc.squashfs, of media types
# application/vnd.aos.image.component.full.v1+squashfs and ...inc.v1+squashfs; `aosctl bundle` packs them.

AOS_UPDATE ?= "full"
AOS_TREES ?= "${DEPLOY_DIR}/aos-trees"
# The tree is kept by version: later updates refer to it.
AOS_TREE_NAME = "${PN}-${AOS_ROOTFS_IMAGE_VERSION}"
inherit aoscore-tree

DEPENDS += "squashfs-tools-native"

fakeroot python do_aos_update() {
    import os
    import shutil
    import subprocess
    import sys

    sys.path.append(os.path.join(d.getVar("AOSCORE_TREE"), "meta-aoscore", "lib"))
    from aoscore_build import trees

    kind, version = d.getVar("AOS_UPDATE"), d.getVar("AOS_ROOTFS_IMAGE_VERSION")
    source, short = d.getVar("IMAGE_ROOTFS"), {"full": "full", "incremental": "inc"}
    if kind not in short:
        bb.fatal("AOS_UPDATE = '%s' is not valid; valid: %s" % (kind, " ".join(short)))
    if kind == "incremental":
        reference = d.getVar("AOS_ROOTFS_REF_VERSION")
        old = os.path.join(d.getVar("AOS_TREES"), "%s-%s" % (d.getVar("PN"), reference))
        if not reference or not os.path.isdir(old):
            bb.fatal("AOS_ROOTFS_REF_VERSION = '%s': there is no tree %s of an earlier build" % (reference, old))
        source = os.path.join(d.getVar("WORKDIR"), "aos-update")
        shutil.rmtree(source, ignore_errors=True)
        try:
            trees.incremental_tree(old, d.getVar("IMAGE_ROOTFS"), source)
        except ValueError as error:
            bb.fatal("%s: %s" % (d.getVar("PN"), error))
    target = os.path.join(d.getVar("DEPLOY_DIR_IMAGE"), "%s-%s.%s.squashfs" % (d.getVar("PN"), version, short[kind]))
    bb.utils.mkdirhier(os.path.dirname(target))
    # What is on partitions of their own is no part of an update.
    command = ["mksquashfs", source, target, "-noappend", "-all-root", "-no-progress", "-wildcards", "-e", "home/*", "var/*"]
    subprocess.run(command, check=True)
}
do_aos_update[depends] += "squashfs-tools-native:do_populate_sysroot virtual/fakeroot-native:do_populate_sysroot"
do_aos_update[vardeps] += "AOS_UPDATE AOS_ROOTFS_IMAGE_VERSION AOS_ROOTFS_REF_VERSION"
addtask aos_update after do_aos_tree before do_build
