SUMMARY = "What all nodes of an AosEdge Unit have in common"
DESCRIPTION = "aos.target and its slice, directories, kernel settings, environment and version of the image."

require aos-files.inc

AOSCORE_PARTS = "base"

CONFFILES:${PN} = "${sysconfdir}/default/aoscore.env"
