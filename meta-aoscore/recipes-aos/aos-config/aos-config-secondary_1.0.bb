SUMMARY = "Configuration of a Secondary Node"
DESCRIPTION = "Configuration files and units of the selected components of a Secondary Node, its network and its name server."

require recipes-aos/aos-target/aos-files.inc

AOSCORE_NODE_KIND = "secondary"
AOSCORE_PARTS = "iam cm sm mp network"

RDEPENDS:${PN} = "aos-target"
RCONFLICTS:${PN} = "aos-config-main"
