# A container layer: the root file system of an image with more packages, minus that of its parent.
#
# In a recipe that is an image:
#     AOS_PARENT_LAYER = "aos-image-main"      image it lies on; empty for a first layer
#     AOS_LAYER_VERSION = "1.0.0"
# Result: DEPLOY_DIR_IMAGE/OS-ARCH-VERSION.tar.gz, of media type application/vnd.oci.image.layer.v1.tar+gzip.

AOS_PARENT_LAYER ?= ""
AOS_LAYER_VERSION ?= "${PV}"
AOS_LAYER_OS ?= "linux"
AOS_LAYER_ARCH ?= "${TARGET_ARCH}"
AOS_LAYER_FILE ?= "${AOS_LAYER_OS}-${AOS_LAYER_ARCH}-${AOS_LAYER_VERSION}.tar.gz"
# Where an image leaves its tree for the layers on it.
AOS_TREES = "${DEPLOY_DIR}/aos-trees"

fakeroot python do_aos_layer() {
    import os
    import sys

    sys.path.append(os.path.join(d.getVar("AOSCORE_TREE"), "meta-aoscore", "lib"))
    from aoscore_build import trees

    parent = d.getVar("AOS_PARENT_LAYER")
    tree = os.path.join(d.getVar("AOS_TREES"), parent) if parent else None
    if tree and not os.path.isdir(tree):
        bb.fatal("AOS_PARENT_LAYER = '%s': there is no tree %s; does that image inherit aoscore-tree?" % (parent, tree))
    bb.utils.mkdirhier(d.getVar("DEPLOY_DIR_IMAGE"))
    target = os.path.join(d.getVar("DEPLOY_DIR_IMAGE"), d.getVar("AOS_LAYER_FILE"))
    try:
        trees.layer_archive(tree, d.getVar("IMAGE_ROOTFS"), target, int(d.getVar("SOURCE_DATE_EPOCH") or 0))
    except ValueError as error:
        bb.fatal("%s: %s" % (d.getVar("PN"), error))
}
do_aos_layer[depends] += "${@'%s:do_aos_tree' % d.getVar('AOS_PARENT_LAYER') if d.getVar('AOS_PARENT_LAYER') else ''}"
do_aos_layer[nostamp] = "1"
addtask aos_layer after do_rootfs before do_build

inherit aoscore-tree
