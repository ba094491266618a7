SUMMARY = "Provisioning hooks of a node"
DESCRIPTION = "What IAM runs when the provisioning state of the node changes, and OpenSSL's way to keys in tokens."

require recipes-aos/aos-target/aos-files.inc

AOSCORE_PARTS = "provisioning"
# They are IAM's, and the same wherever it runs.
AOS_COMPONENTS = "iam"

RDEPENDS:${PN} = "aoscore-ctl"
