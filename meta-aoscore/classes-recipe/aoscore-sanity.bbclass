# Says at parse time, and in words that help, what a product set wrongly.

def aoscore_target(d):
    """The generator of the target's files, which also knows what is valid."""
    import os
    import sys

    if sys.version_info < (3, 10):
        bb.fatal("meta-aoscore needs Python 3.10 or newer to run BitBake: use the buildtools of the series")
    tree = os.path.realpath(d.getVar("AOSCORE_TREE"))
    if not os.path.isdir(os.path.join(tree, "aoscore", "ctl", "target")):
        bb.fatal("AOSCORE_TREE = '%s' is not the tree of aoscore: it has no aoscore/ctl/target" % tree)
    if tree not in sys.path:
        # Last: nothing in the tree may take the place of a module of BitBake or Python.
        sys.path.append(tree)
    from aoscore.ctl import target

    return target


def aoscore_components(d, kind):
    """The components selected for a kind of node, as a tuple in their usual order."""
    copy = d.createCopy()
    copy.setVar("OVERRIDES", "%s:aos-%s-node" % (d.getVar("OVERRIDES") or "", kind))
    return tuple((copy.getVar("AOS_COMPONENTS") or "").split())


def aoscore_global_kind(d):
    value = d.getVar("AOS_MAIN_NODE") or ""
    if value not in ("0", "1"):
        bb.fatal("AOS_MAIN_NODE = '%s' is not valid; valid: 1 (Main Node), 0 (Secondary Node)" % value)
    return "main" if value == "1" else "secondary"


def aoscore_check(d, kind):
    """Ends parsing for a wrong selection or version; skips a recipe of the kind that the product does not build."""
    from importlib import import_module

    aoscore_target(d)
    node = import_module("aoscore.ctl.target.node")
    selected = aoscore_global_kind(d)
    components = aoscore_components(d, kind)
    try:
        node.check_components(kind, components)
    except ValueError as error:
        message = "AOS_COMPONENTS = '%s': %s" % (" ".join(components), error)
        if kind != selected and set(components) <= set(node.COMPONENTS):
            raise bb.parse.SkipRecipe("%s. Set AOS_COMPONENTS:aos-%s-node to build this kind too" % (message, kind))
        bb.fatal(message)
    version = d.getVar("AOS_ROOTFS_IMAGE_VERSION") or ""
    try:
        node.check_version(version)
    except ValueError as error:
        bb.fatal("AOS_ROOTFS_IMAGE_VERSION = '%s': %s" % (version, error))
    return components
