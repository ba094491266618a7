SUMMARY = "Root file system of a Secondary Node"

AOSCORE_NODE_KIND = "secondary"
require aos-image.inc
