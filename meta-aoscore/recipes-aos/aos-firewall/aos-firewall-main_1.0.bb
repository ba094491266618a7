SUMMARY = "Firewall of a Main Node"
DESCRIPTION = "Base rules for instances, and who may reach the servers of a Main Node, before and after provisioning."

require recipes-aos/aos-target/aos-files.inc

AOSCORE_NODE_KIND = "main"
AOSCORE_PARTS = "firewall"

RDEPENDS:${PN} = "nftables"
RCONFLICTS:${PN} = "aos-firewall-secondary"
