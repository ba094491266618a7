"""What a Node needs around the daemons: directories, kernel settings, versions, environment, OpenSSL, hooks. Pure."""

from collections.abc import Iterator

from aoscore.ctl.target.configs import HSM_LIBRARY
from aoscore.ctl.target.entry import Entry
from aoscore.ctl.target.node import Node
from aoscore.ctl.target.units import ENVIRONMENT_FILE

_TMPFILES_DIR = "/usr/lib/tmpfiles.d"


# Directories and who needs them. Instances reach their own directories below, nobody can list the others.
_DIRECTORIES = (
    ("", "base", 0o755),
    ("workdirs", "base", 0o711),
    ("storages", "base", 0o711),
    ("states", "base", 0o711),
    ("iam", "iam", 0o700),
    ("downloads", "cm", 0o700),
    ("dns", "cm", 0o755),
)


def entries(node: Node) -> Iterator[Entry]:
    """Part base, which is the same on all nodes of a product, and the shares of single components."""
    yield Entry(
        ENVIRONMENT_FILE,
        f"# Log level of the AosCore daemons: debug, info, warn or error.\nAOS_LOG_LEVEL={node.log_level}\n",
        "base",
    )
    yield Entry(f"{node.etc}/version", f'VERSION="{node.image_version}"\n', "base")
    if node.root_ca:
        yield Entry(node.ca_file, node.root_ca, "base")
    yield Entry(
        "/usr/lib/sysctl.d/60-aoscore.conf",
        # SM leaves it to the image (sm-runtime.md §6.4); the firewall drops what no instance asked for.
        "net.ipv4.ip_forward=1\n"
        # An instance must not get at another's traffic by forged addresses.
        "net.ipv4.conf.all.rp_filter=1\nnet.ipv4.conf.default.rp_filter=1\n",
        "base",
    )
    for part in ("base", "iam", "cm"):
        if part == "base" or node.has(part):
            yield from _directories(node, part)
    if node.has("iam"):
        yield from _provisioning(node)


def _directories(node: Node, part: str) -> Iterator[Entry]:
    """Lines of tmpfiles.d(5) for one part, and the same directories for where no systemd-tmpfiles runs."""
    paths = [(f"{node.var}/{name}".rstrip("/"), mode) for name, owner, mode in _DIRECTORIES if owner == part]
    if part == "base":
        paths.append((node.run, 0o755))
    if part == "iam" and node.keys == "softhsm":
        paths += [("/var/lib/softhsm", 0o700), ("/var/lib/softhsm/tokens", 0o700)]
    lines = [f"d {path} {mode:04o} root root -" for path, mode in paths]
    if part == "cm" and node.dns_ip and not node.dns_by_cm:
        # Where the name server finds the system's servers; without the directory it does not start.
        lines.append("d /run/systemd/resolve 0755 - - -")
        lines.append(f"f {node.var}/dns/addnhosts 0644 root root -")
        lines.append(f"L {node.var}/dns/dnsmasq.conf - - - - {node.etc}/dnsmasq.conf")
    name = "aoscore" if part == "base" else f"aoscore-{part}"
    yield Entry(f"{_TMPFILES_DIR}/{name}.conf", "".join(f"{line}\n" for line in lines), part)
    for path, mode in paths:
        yield Entry(path, "", "data", mode, kind="directory")


def _provisioning(node: Node) -> Iterator[Entry]:
    if node.keys != "file":
        yield Entry("/etc/ssl/openssl-aos.cnf", _openssl(node), "provisioning")
    if not node.hooks:
        return
    # The names are those of AosCore 9.1; what they do is in `aosctl node` and `aosctl disk`. Work that goes on after
    # IAM has answered is a unit of its own: its end and its words are in the journal.
    for name, lines in (
        ("provfinish", [_detached(node, "finish")]),
        (
            "deprovision",
            [
                f'if [ "$1" = async ]; then\n    : > {node.var}/.deprovision\n    {_detached(node, "deprovision")}\nfi',
                f"exec {node.bin}/aosctl node wipe",
            ],
        ),
        ("clearhsm", [f"exec {node.bin}/aosctl node clear-keys"]),
    ):
        yield Entry(f"{node.opt}/{name}.sh", _script(lines), "provisioning", 0o755)


def _detached(node: Node, action: str) -> str:
    return f"exec systemd-run --quiet --collect --no-block --unit=aos-node-{action} {node.bin}/aosctl node {action}"


def _script(lines: list[str]) -> str:
    return "#!/bin/sh\nset -e\n" + "".join(f"{line}\n" for line in lines)


def _openssl(node: Node) -> str:
    """Makes keys in tokens usable for TLS (iam.md §1.5). OpenSSL finds the provider's module in its own directory."""
    lines = [
        "# For the AosCore daemons only: their units name this file in OPENSSL_CONF.",
        "openssl_conf = openssl_init",
        "",
        "[openssl_init]",
        "providers = provider_sect",
        "",
        "[provider_sect]",
        "default = default_sect",
        "base = base_sect",
        "pkcs11 = pkcs11_sect",
        "",
        "[default_sect]",
        "activate = 1",
        "",
        "[base_sect]",
        "activate = 1",
        "",
        "[pkcs11_sect]",
        f"pkcs11-module-path = {HSM_LIBRARY[node.keys]}",
        # A token is initialized anew at provisioning: what was remembered of it would be wrong.
        "pkcs11-module-cache-keys = false",
    ]
    if node.keys == "softhsm":
        lines.append(f"pkcs11-module-token-pin = file:{node.var}/iam/.usrpin")
    return "".join(f"{line}\n" for line in [*lines, "activate = 1"])
