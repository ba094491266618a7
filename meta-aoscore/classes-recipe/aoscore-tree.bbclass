# Keeps the root file system of an image as a tree, for what is computed from it.

AOS_TREES ?= "${DEPLOY_DIR}/aos-trees"
AOS_TREE_NAME ?= "${PN}"

fakeroot do_aos_tree() {
    rm -rf ${AOS_TREES}/${AOS_TREE_NAME}
    install -d ${AOS_TREES}
    cp -a ${IMAGE_ROOTFS} ${AOS_TREES}/${AOS_TREE_NAME}
}
addtask aos_tree after do_rootfs
