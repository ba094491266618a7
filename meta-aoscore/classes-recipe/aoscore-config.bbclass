# Files of a node from the one generator, aoscore/ctl/target, in a recipe or an image.
#
# A recipe names its share in AOSCORE_PARTS and, where its files differ by node kind, the kind in AOSCORE_NODE_KIND.

inherit aoscore-sanity

AOSCORE_NODE_KIND ??= "${@aoscore_global_kind(d)}"
AOSCORE_PARTS ?= ""

# Only here, not for the whole build: recipes of other layers keep their signatures.
OVERRIDES .= ":aos-${AOSCORE_NODE_KIND}-node"

# Settings of a node and the variables they come from; an empty variable leaves the generator's default.
AOSCORE_SETTINGS = "\
    components=AOS_COMPONENTS \
    hostname=AOS_NODE_HOSTNAME \
    main_host=AOS_MAIN_NODE_HOSTNAME \
    unit_model=AOS_UNIT_MODEL \
    unit_version=AOS_UNIT_VERSION \
    node_type=AOS_NODE_TYPE \
    runtime_prefix=AOS_COMPONENT_RUNTIME_PREFIX \
    image_version=AOS_ROOTFS_IMAGE_VERSION \
    max_dmips=AOS_MAX_DMIPS \
    architecture=AOS_ARCHITECTURE \
    architecture_variant=AOS_ARCHITECTURE_VARIANT \
    os=AOS_OS \
    os_version=AOS_OS_VERSION \
    ip=AOS_NODE_IP \
    gateway=AOS_NODE_GW_IP \
    dhcp=AOS_USE_DHCP \
    dns_ip=AOS_DNS_IP \
    hosts=AOS_HOSTS \
    trusted_peers=AOS_TRUSTED_PEERS \
    provisioning_peers=AOS_PROVISIONING_PEERS \
    admin_ports=AOS_ADMIN_PORTS \
    keys=AOS_KEYS \
    data_disk=AOS_DATA_DISK \
    nfs=AOS_NFS \
    runtimes=AOS_RUNTIMES \
    discovery_url=AOS_SERVICE_DISCOVERY_URL \
    transport=AOS_TRANSPORT \
    vchan_domain=AOS_VCHAN_DOMAIN \
    vchan_path=AOS_VCHAN_PATH \
    log_level=AOS_LOG_LEVEL \
    environment=AOS_ENVIRONMENT \
"

def aoscore_variables(d):
    return [word.partition("=")[2] for word in d.getVar("AOSCORE_SETTINGS").split()]


def aoscore_node(d):
    """The node that the variables describe. Ends parsing, naming the setting, for a wrong value."""
    from pathlib import Path

    target = aoscore_target(d)
    settings = {"kind": d.getVar("AOSCORE_NODE_KIND")}
    for word in d.getVar("AOSCORE_SETTINGS").split():
        name, _, variable = word.partition("=")
        value = (d.getVar(variable) or "").strip()
        if value:
            settings[name] = value
    settings["xen"] = bb.utils.contains("DISTRO_FEATURES", "xen", "1", "0", d)
    if d.getVar("AOS_ROOT_CA_FILE"):
        settings["root_ca"] = Path(d.getVar("AOS_ROOT_CA_FILE")).read_text()
    try:
        return target.node_from(settings)
    except ValueError as error:
        bb.fatal("%s: %s" % (d.getVar("PN"), error))


def aoscore_generator_files(d):
    """The generator itself is an input: file checksums of it."""
    import glob
    import os

    tree = os.path.realpath(d.getVar("AOSCORE_TREE"))
    files = sorted(glob.glob(os.path.join(tree, "aoscore", "ctl", "target", "*.py")))
    if d.getVar("AOS_ROOT_CA_FILE"):
        files.append(d.getVar("AOS_ROOT_CA_FILE"))
    return " ".join("%s:True" % name for name in files)


def aoscore_write(d, parts, root):
    from pathlib import Path

    target = aoscore_target(d)
    target.write(target.tree(aoscore_node(d), tuple(parts.split())), Path(root))


python () {
    aoscore_check(d, d.getVar("AOSCORE_NODE_KIND"))
    aoscore_node(d)
}
