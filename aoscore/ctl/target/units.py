"""systemd units: the daemons, their target and slice (yocto.md §4). Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from aoscore.ctl.target.entry import Entry
from aoscore.ctl.target.node import Node

UNIT_DIR = "/usr/lib/systemd/system"
ENVIRONMENT_FILE = "/etc/default/aoscore.env"

# IAM, CM and MP serve peers, write their own directories, and start nothing that outlives them.
_HARDENING = (
    ("NoNewPrivileges", "yes"),
    ("ProtectSystem", "strict"),
    ("ProtectHome", "yes"),
    ("PrivateTmp", "yes"),
    ("ProtectHostname", "yes"),
    ("ProtectKernelLogs", "yes"),
    ("ProtectKernelModules", "yes"),
    ("ProtectKernelTunables", "yes"),
    ("ProtectControlGroups", "yes"),
    ("LockPersonality", "yes"),
    ("RestrictNamespaces", "yes"),
    ("RestrictRealtime", "yes"),
    ("RestrictSUIDSGID", "yes"),
    ("RestrictAddressFamilies", "AF_UNIX AF_INET AF_INET6 AF_NETLINK"),
    ("SystemCallArchitectures", "native"),
)

_SHARED = ("storages", "states")
_COMPONENT_OF = {
    "aos-iam.service": "iam",
    "aos-iam-prov.service": "iam",
    "aos-cm.service": "cm",
    "aos-mp.service": "mp",
    "aos-sm.service": "sm",
}


@dataclass(frozen=True)
class _Daemon:
    """What distinguishes the unit of one daemon from the others."""

    unit: str
    component: str
    program: str
    title: str
    provisioning: bool = False
    """Runs on a node that is not provisioned yet, in place of its twin."""
    after: tuple[str, ...] = ()
    always_after: tuple[str, ...] = ()
    service: tuple[tuple[str, str], ...] = ()
    before_start: str = ""
    harden: bool = True
    mounts: bool = False


def entries(node: Node) -> Iterator[Entry]:
    """Units of the selected components, and what all of them share."""
    yield _unit(
        "aos.target",
        "base",
        [("Unit", [("Description", "AosCore")]), ("Install", [("WantedBy", "multi-user.target")])],
    )
    yield _unit("aos.slice", "base", [("Unit", [("Description", "AosCore daemons")])])
    yield _unit(
        "aos-reboot.service",
        "base",
        [
            ("Unit", [("Description", "Reboot after an update"), ("DefaultDependencies", "no")]),
            ("Service", [("Type", "oneshot"), *_reboot(node)]),
        ],
    )
    # Where presets are not applied, as in a root file system made on another machine, the links say the same.
    yield _link(f"{UNIT_DIR}/multi-user.target.wants/aos.target", "../aos.target", "base")
    for component in ("iam", "cm", "sm", "mp"):
        if not node.has(component):
            continue
        daemons = [daemon for daemon in _daemons(node) if daemon.component == component]
        for daemon in daemons:
            yield _unit(f"{daemon.unit}.service", component, _service(node, daemon))
        names = " ".join(f"{daemon.unit}.service" for daemon in daemons)
        yield Entry(
            f"{UNIT_DIR}/aos.target.d/aoscore-{component}.conf",
            _text([("Unit", [("Wants", names), ("After", names)])]),
            component,
        )


def unit_names(node: Node) -> list[str]:
    """Units of the daemons, in start order."""
    return [f"{daemon.unit}.service" for daemon in _daemons(node) if node.has(daemon.component)]


def data_mounts(node: Node) -> list[str]:
    """Names of the mount units of this node without which CM and SM must not start."""
    names = (["workdirs", *(_SHARED if node.is_main else ())]) if node.data_disk else []
    return [mount_unit(f"{node.var}/{name}") for name in names]


def shared_mounts(node: Node) -> list[str]:
    """The same, of what comes from the Main Node: places."""
    return [f"{node.var}/{name}" for name in _SHARED] if node.shared_from_main else []


def mount_unit(path: str) -> str:
    """Name of the mount unit of a path, systemd.unit(5); dashes in it are escaped."""
    return path.strip("/").replace("-", "\\x2d").replace("/", "-") + ".mount"


def _reboot(node: Node) -> list[tuple[str, str]]:
    if not node.xen:
        return [("ExecStart", "/bin/systemctl reboot")]
    # The control domain watches this key and restarts the whole board.
    return [("ExecStart", "/bin/sync"), ("ExecStart", "/usr/bin/xenstore-write data/user-reboot 2")]


def _daemons(node: Node) -> list[_Daemon]:
    iam_after = ("aos-iam.service",)
    prov_after = ("aos-iam-prov.service",)
    # Restarting IAM must not end the programs it ran for a hook (iam.md §6.2).
    iam_kill = (("KillMode", "process"),)
    return [
        _Daemon(
            "aos-iam-prov",
            "iam",
            "aos_iamanager",
            "identity and access manager, provisioning",
            provisioning=True,
            before_start=f"{node.opt}/deprovision.sh" if node.hooks else "",
            service=iam_kill,
        ),
        _Daemon("aos-iam", "iam", "aos_iamanager", "identity and access manager", service=iam_kill),
        _Daemon(
            "aos-cm", "cm", "aos_communicationmanager", "communication manager", always_after=iam_after, mounts=True
        ),
        _Daemon(
            "aos-mp-provisioning",
            "mp",
            "aos_messageproxy",
            "message proxy, provisioning",
            provisioning=True,
            always_after=prov_after,
        ),
        _Daemon("aos-mp", "mp", "aos_messageproxy", "message proxy", always_after=iam_after, after=("aos-cm.service",)),
        _Daemon(
            "aos-sm",
            "sm",
            "aos_servicemanager",
            "service manager",
            always_after=("dbus.service", "aos-nftables.service", *iam_after),
            after=("aos-cm.service",) if node.is_main else ("aos-mp.service",),
            mounts=True,
            # It makes namespaces, mounts, links and control groups, and what it starts must not inherit bans.
            harden=False,
            service=(
                # The containers' monitors live in SM's control group and outlive it.
                ("KillMode", "process"),
                ("Delegate", "yes"),
                # Stopping is orderly: every instance gets its time to end.
                ("TimeoutStopSec", "120"),
            ),
        ),
    ]


def _service(node: Node, daemon: _Daemon) -> list[tuple[str, list[tuple[str, str]]]]:
    after = [name for name in daemon.after if _exists(node, name)]
    order = ["network-online.target", *(name for name in daemon.always_after if _exists(node, name)), *after]
    wants = [name for name in order if name != "dbus.service"]
    unit = [
        ("Description", f"AosCore {daemon.title}"),
        ("Wants", " ".join(wants)),
        ("After", " ".join(order)),
        ("PartOf", "aos.target"),
        ("ConditionPathExists", f"{'!' if daemon.provisioning else ''}{node.state_file}"),
        # A daemon that keeps failing is started again for ever; systemd counts (NRestarts) and the journal tells.
        ("StartLimitIntervalSec", "0"),
    ]
    if daemon.mounts and (mounts := data_mounts(node)):
        unit += [("Requires", " ".join(mounts)), ("After", " ".join(mounts))]
        if node.is_main and node.data_disk:
            downloads = mount_unit(f"{node.var}/downloads")
            unit += [("Wants", downloads), ("After", downloads)]
    shared = shared_mounts(node) if daemon.mounts else []
    if shared:
        # Not required: the Main Node may come up later. What lacks a requirement is given up, what fails is repeated.
        units = " ".join(mount_unit(place) for place in shared)
        unit += [("Wants", units), ("After", units)]
    command = f"{node.bin}/{daemon.program} -c {node.etc}/{daemon.component}.cfg"
    if daemon.provisioning:
        command += " --provisioning"
    service = [
        ("Type", "notify"),
        ("Environment", "AOS_LOG_LEVEL=info"),
        ("EnvironmentFile", f"-{ENVIRONMENT_FILE}"),
        *(("Environment", f'"{name}={value}"') for name, value in _environment(node)),
    ]
    if daemon.before_start:
        # Privileged: it reaches disks and mounts that the daemon does not see. A failure is in the journal.
        service.append(("ExecStartPre", f"-+{daemon.before_start}"))
    service += [("ExecStartPre", f'/bin/grep -q " {place} " /proc/self/mounts') for place in shared]
    service += [
        ("ExecStart", f"{command} -v ${{AOS_LOG_LEVEL}} -j"),
        ("Restart", "always"),
        ("RestartSec", "10"),
        ("WatchdogSec", "30"),
        ("Slice", "aos.slice"),
    ]
    # SM's children would inherit it.
    if daemon.harden:
        service.append(("OOMScoreAdjust", "-500"))
    service += daemon.service
    if daemon.harden:
        service += _HARDENING
        service.append(("ReadWritePaths", " ".join(_writable(node))))
    return [("Unit", unit), ("Service", service), ("Install", [("WantedBy", "multi-user.target")])]


def _exists(node: Node, unit: str) -> bool:
    """Whether a unit is on this node; those that are not of a component are taken for granted."""
    return node.has(_COMPONENT_OF[unit]) if unit in _COMPONENT_OF else True


def _environment(node: Node) -> list[tuple[str, str]]:
    # Names of the Unit's nodes are in /etc/hosts: found there without asking a server, which is late or not there at a
    # cold boot. gRPC's own resolver asks one all the same.
    variables = [("GRPC_DNS_RESOLVER", "native")]
    if node.keys != "file":
        variables.append(("OPENSSL_CONF", "/etc/ssl/openssl-aos.cnf"))
    if node.keys == "optee":
        variables.append(("CKTEEC_LOGIN_TYPE", "user"))
    return [*variables, *node.environment]


def _writable(node: Node) -> list[str]:
    paths = [node.var, f"-{node.run}"]
    if node.keys == "softhsm":
        paths.append("-/var/lib/softhsm")
    return paths


def _unit(name: str, part: str, sections: list[tuple[str, list[tuple[str, str]]]]) -> Entry:
    return Entry(f"{UNIT_DIR}/{name}", _text(sections), part)


def _text(sections: list[tuple[str, list[tuple[str, str]]]]) -> str:
    return "\n".join(
        f"[{title}]\n" + "".join(f"{key}={value}\n" for key, value in settings) for title, settings in sections
    )


def _link(path: str, target: str, part: str) -> Entry:
    return Entry(path, target, part, kind="link")
