require aoscore.inc

# The sources are the tree that this layer is a part of: one revision of both.
FILESEXTRAPATHS:prepend := "${AOSCORE_TREE}:"
SRC_URI = "\
    file://LICENSE \
    file://MANIFEST.in \
    file://README.md \
    file://aoscore \
    file://proto \
    file://pyproject.toml \
    file://setup.py \
"
S = "${UNPACKDIR}"
