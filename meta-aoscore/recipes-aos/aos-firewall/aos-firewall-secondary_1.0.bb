SUMMARY = "Firewall of a Secondary Node"
DESCRIPTION = "Base rules for instances, and who may reach the servers of a Secondary Node, before and after provisioning."

require recipes-aos/aos-target/aos-files.inc

AOSCORE_NODE_KIND = "secondary"
AOSCORE_PARTS = "firewall"

RDEPENDS:${PN} = "nftables"
RCONFLICTS:${PN} = "aos-firewall-main"
