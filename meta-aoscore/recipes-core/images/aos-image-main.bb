SUMMARY = "Root file system of a Main Node"

AOSCORE_NODE_KIND = "main"
require aos-image.inc
