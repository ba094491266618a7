SUMMARY = "Configuration of a Main Node"
DESCRIPTION = "Configuration files and units of the selected components of a Main Node, its network and its name server."

require recipes-aos/aos-target/aos-files.inc

AOSCORE_NODE_KIND = "main"
AOSCORE_PARTS = "iam cm sm mp network"

RDEPENDS:${PN} = "aos-target"
RCONFLICTS:${PN} = "aos-config-secondary"
