require aoscore.inc

# For development: built in place from a working tree, which externalsrc watches.
PV = "0.1.0+git"
DEFAULT_PREFERENCE = "-1"

inherit externalsrc
EXTERNALSRC = "${AOSCORE_TREE}"
EXTERNALSRC_BUILD = "${WORKDIR}/build"
