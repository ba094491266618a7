"""What distinguishes one Node from another. Pure."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal

COMPONENTS = ("cm", "sm", "iam", "mp")
DEFAULT_COMPONENTS = {"main": ("cm", "sm", "iam"), "secondary": ("sm", "iam", "mp")}
RUNTIMES = ("container", "rootfs", "boot")

_VERSION = re.compile(r"\d+\.\d+\.\d+([-+][0-9A-Za-z.+-]+)?")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_DOMAIN = re.compile(r"\d+|(name|key):.+")
# Goes into files line by line: no value may end its line.
_LINE = re.compile(r"[^\r\n\0]*")


def check_components(kind: str, components: tuple[str, ...]) -> None:
    """Raises ValueError naming the wrong value and the valid ones (yocto.md §3)."""
    valid = [name for name in COMPONENTS if kind == "main" or name != "cm"]
    for name in components:
        if name not in COMPONENTS:
            raise ValueError(f"component {name!r} is unknown; valid on a {kind} node: {' '.join(valid)}")
        if name not in valid:
            raise ValueError(
                f"component {name!r} runs on the main node only; valid on a {kind} node: {' '.join(valid)}"
            )
    if len(set(components)) != len(components):
        raise ValueError(f"components {' '.join(components)}: one is named twice")
    if not components:
        raise ValueError(f"no components; choose of: {' '.join(valid)}")


def check_version(version: str) -> None:
    """Raises ValueError for what is no version of an image."""
    if not _VERSION.fullmatch(version):
        raise ValueError(f"image_version {version!r} is not X.Y.Z")


@dataclass(frozen=True, kw_only=True)
class Node:
    """One Node. What is left empty follows from the rest; a wrong value raises ValueError that names it.

    Defaults are those of the existing VM product (yocto.md §2), so that a product configuration carries over.
    """

    kind: Literal["main", "secondary"] = "main"
    components: tuple[str, ...] = ()
    """Selected components; empty: all that the kind usually has."""

    hostname: str = ""
    """Empty: the kind. Name of the node in URLs, certificates and as title."""
    extra_names: tuple[str, ...] = ()
    """More names and addresses under which this node's servers may be called."""
    main_host: str = "main"
    """Where Secondary Nodes find IAM, CM and the network file system."""

    unit_model: str = "aos-unit"
    unit_version: str = "1.0"
    node_type: str = ""
    """Free text that unit configurations refer to; empty: MODEL-VERSION-KIND."""
    runtime_prefix: str = ""
    """Put before the types of component runtimes (yocto.md §1)."""
    image_version: str = "1.0.0"
    """Version of the root file system, X.Y.Z."""
    max_dmips: int = 10_000
    architecture: str = ""
    architecture_variant: str = ""
    os: str = ""
    os_version: str = ""
    """The four of them override what IAM finds out."""
    system_id: str = ""
    node_id: str = ""
    """Identities that are known beforehand, for guests and the demo; empty: the machine id."""

    interface: str = "en* eth* host0"
    """Names of the interface to the Unit's network, as systemd.network matches them."""
    ip: str = "10.0.0.100/24"
    """Address with prefix length; Secondary Nodes usually have none of their own and use DHCP."""
    gateway: str = "10.0.0.1"
    dhcp: bool | None = None
    """None: Secondary Nodes only. On a Main Node the static address stays beside the leased one."""
    dns_ip: str = "10.0.0.100"
    """Where nodes and instances ask for names; "" for no name server."""
    main_ip: str = ""
    """Address of the Main Node, for Secondary Nodes; empty: that of the name server."""
    hosts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """More (address, names) that the Unit's name server knows."""
    dns_by_cm: bool = False
    """CM runs dnsmasq itself, in place of a unit."""

    trusted_peers: tuple[str, ...] = ()
    """Addresses and networks of the Unit's other nodes; empty: the network of `ip`. Gateways are not among them."""
    provisioning_peers: tuple[str, ...] = ()
    """From where an unprovisioned node may be provisioned; empty: the gateway."""
    admin_ports: tuple[int, ...] = (22,)
    """What provisioning peers may still reach once the node is provisioned."""

    keys: Literal["softhsm", "optee", "file"] = "softhsm"
    data_disk: bool = True
    """Whether data lies on an encrypted disk of its own, made at provisioning (yocto.md §6)."""
    nfs: bool = True
    """Whether storages and states of Secondary Nodes are the Main Node's, by NFS."""
    runtimes: tuple[str, ...] = RUNTIMES
    boot_partitions: tuple[str, ...] = ("1", "2")
    container_type: str = "crun"

    discovery_url: str = "https://aoscloud.io:9000/sd/v7/"
    transport: Literal["auto", "socket", "vchan"] = "auto"
    """How MP reaches the other node."""
    vchan_domain: int | str = 0
    """The other node's number, `name:GUEST` where MP can look up all guests (Dom0), or `key:PATH` of xenstore."""
    vchan_path: str = "data/vchan/aos"
    """Place of the link in xenstore, in the gateway's home. The Zephyr application looks at tmp/vchan/aos; guests of
    the usual toolstack may write below data/ only."""
    xen: bool = False
    """Runs in a guest of Xen: reboots by way of the control domain."""

    log_level: str = "info"
    environment: tuple[tuple[str, str], ...] = ()
    """More variables for the daemons, as (name, value)."""

    etc: str = "/etc/aos"
    var: str = "/var/aos"
    run: str = "/run/aos"
    opt: str = "/opt/aos"
    bin: str = "/usr/bin"
    ca_file: str = "/usr/share/ca-certificates/aos/AosRootCA.crt"

    root_ca: str = ""
    """PEM of the cloud's root; empty: it is in the image already."""

    status_period: str = "10s"
    monitoring_period: str = "35s"
    cgroup_parent: str = ""
    crun_state_root: str = "/run/crun"
    output: str = "auto"
    """Where the output of containers goes: the journal, files, or auto."""
    hooks: bool = True
    """Whether IAM runs programs at provisioning; the demo has nothing for them to do."""

    def __post_init__(self) -> None:
        def fill(name: str, value: object) -> None:
            if getattr(self, name) in ("", (), None):
                object.__setattr__(self, name, value)

        if self.kind not in DEFAULT_COMPONENTS:
            raise ValueError(f"node kind {self.kind!r} is unknown; valid: {' '.join(DEFAULT_COMPONENTS)}")
        fill("components", DEFAULT_COMPONENTS[self.kind])
        check_components(self.kind, self.components)
        fill("hostname", self.kind)
        fill("node_type", f"{self.unit_model}-{self.unit_version}-{self.kind}")
        fill("dhcp", self.kind == "secondary")
        if self.kind == "main":
            object.__setattr__(self, "main_host", self.hostname)
        fill("main_ip", self.ip.partition("/")[0] if self.kind == "main" else self.dns_ip)
        if self.ip and not (self.kind == "secondary" and self.dhcp):
            fill("trusted_peers", (str(ipaddress.ip_interface(self.ip).network),))
        elif self.main_ip:
            fill("trusted_peers", (self.main_ip,))
        if self.gateway:
            fill("provisioning_peers", (self.gateway,))
        self._check()

    def _check(self) -> None:
        for name in ("hostname", "main_host"):
            if not _NAME.fullmatch(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)!r} is no host name")
        check_version(self.image_version)
        for name in ("unit_model", "unit_version"):
            value = getattr(self, name)
            if not value or ";" in value:
                raise ValueError(f"{name} {value!r} must not be empty or contain a semicolon")
        for name, value in self.__dict__.items():
            if name != "root_ca" and isinstance(value, str) and not _LINE.fullmatch(value):
                raise ValueError(f"{name} {value!r} has more than one line")
        for address in (*self.trusted_peers, *self.provisioning_peers):
            ipaddress.ip_network(address, strict=False)
        for name in ("gateway", "dns_ip", "main_ip"):
            if value := getattr(self, name):
                ipaddress.ip_address(value)
        for address, names in self.hosts:
            ipaddress.ip_address(address)
            for host in names:
                if not _NAME.fullmatch(host):
                    raise ValueError(f"hosts: {host!r} is no host name")
        if not _DOMAIN.fullmatch(str(self.vchan_domain)):
            raise ValueError(f"vchan_domain {self.vchan_domain!r} is neither a number nor name:GUEST nor key:PATH")
        for runtime in self.runtimes:
            if runtime not in RUNTIMES:
                raise ValueError(f"runtime {runtime!r} is unknown; valid: {' '.join(RUNTIMES)}")
        if self.data_disk and self.keys == "file":
            raise ValueError("the key of an encrypted data disk is in a token: keys in files go without such a disk")

    @property
    def is_main(self) -> bool:
        """Whether this is the Unit's Main Node."""
        return self.kind == "main"

    def has(self, component: str) -> bool:
        """Whether a component is selected."""
        return component in self.components

    @property
    def state_file(self) -> str:
        """There once the node is provisioned; the units' conditions look at it (iam.md §1.2)."""
        return f"{self.var}/.provisionstate"

    @property
    def shared_from_main(self) -> bool:
        """Whether storages and states come from the Main Node."""
        return self.nfs and not self.is_main

    def component_type(self, runtime: str) -> str:
        """Type of a component runtime: the prefix is not put twice."""
        return runtime if runtime.startswith(self.runtime_prefix) else f"{self.runtime_prefix}{runtime}"
