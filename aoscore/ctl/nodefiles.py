"""Configuration files of a Main Node with file keys: for the demo, test guests and a hand install.

Everything lies below three directories: configuration, persistent data, and what lives until the next boot. On a
device these are /etc/aos, /var/aos and /run/aos.
"""

import json
import stat
from pathlib import Path
from typing import Any

import msgspec

from aoscore.common.files import write_atomic

CERT_TYPES_MAIN = ("online", "offline", "iam", "sm", "cm")
_SERVER_TYPES = {"iam", "sm", "cm"}


class MainNode(msgspec.Struct, frozen=True, kw_only=True):
    """What distinguishes one Main Node from another.

    `names`: DNS names of the node in certificates and URLs, the first is used in URLs. `dns_ip`: address on which
    instances find the Unit's names, "" for none. `program` gives the command of a daemon by its process name.
    """

    etc: Path
    var: Path
    run: Path
    system_id: str
    discovery_url: str
    finish_provisioning: tuple[str, ...]
    deprovision: tuple[str, ...]
    names: tuple[str, ...] = ("localhost",)
    unit_model: str = "aos-core;1.0.0"
    max_dmips: int = 10_000
    dns_ip: str = ""
    status_period: str = "10s"
    monitoring_period: str = "35s"
    cgroup_parent: str | None = None
    runtime_type: str = "crun"
    output: str = "auto"

    @property
    def ca_file(self) -> Path:
        """Root CA of the cloud, part of the image."""
        return self.etc / "AosRootCA.crt"

    @property
    def state_file(self) -> Path:
        """There once the node is provisioned; the units' conditions look at it (iam.md §1.2)."""
        return self.var / ".provisionstate"

    def write(self, root_ca: bytes, into: Path = Path("/")) -> None:
        """Write all files and make the directories, below the root file system `into`."""
        etc, var = (into / path.relative_to("/") for path in (self.etc, self.var))
        for path in (etc, var):
            path.mkdir(parents=True, exist_ok=True)
        for name in ("storages", "states", "workdirs"):
            (var / name).mkdir(exist_ok=True)
            # Instances reach their own directory below, nobody can list the others.
            (var / name).chmod(stat.S_IRWXU | stat.S_IXGRP | stat.S_IXOTH)
        for name, text in (
            ("system_id", self.system_id),
            ("node_id", "main"),
            ("unit_model", self.unit_model),
            ("subjects", ""),
            ("resources.cfg", "[]"),
            *((f"{name}.cfg", json.dumps(build(self), indent=4)) for name, build in _CONFIGS.items()),
        ):
            write_atomic(etc / name, text.encode(), mode=0o644)
        write_atomic(etc / self.ca_file.name, root_ca, mode=0o644)


def _iam(node: MainNode) -> dict[str, Any]:
    return {
        "caCert": str(node.ca_file),
        "certStorage": "iam",
        "iamPublicServerUrl": ":8090",
        "iamProtectedServerUrl": ":8089",
        "workingDir": str(node.var / "iam"),
        "runtimeDir": str(node.run / "iam"),
        "enablePermissionsHandler": True,
        "finishProvisioningCmdArgs": list(node.finish_provisioning),
        "deprovisionCmdArgs": list(node.deprovision),
        "nodeInfo": {
            "nodeIdPath": str(node.etc / "node_id"),
            "nodeName": "main",
            "nodeType": "main",
            "maxDmips": node.max_dmips,
            "os": "linux",
            "provisioningStatePath": str(node.state_file),
            "attrs": {"MainNode": "", "AosComponents": "iam,cm,sm"},
            "partitions": [
                {
                    "name": "aos",
                    "path": str(node.var),
                    "types": ["storages", "states", "services", "layers", "downloads"],
                }
            ],
        },
        "identifier": {
            "plugin": "fileidentifier",
            "params": {
                "systemIdPath": str(node.etc / "system_id"),
                "unitModelPath": str(node.etc / "unit_model"),
                "subjectsPath": str(node.etc / "subjects"),
            },
        },
        "certModules": [_cert_module(node, cert_type) for cert_type in CERT_TYPES_MAIN],
    }


def _cert_module(node: MainNode, cert_type: str) -> dict[str, Any]:
    module: dict[str, Any] = {
        "id": cert_type,
        "plugin": "swmodule",
        "algorithm": "rsa" if cert_type == "offline" else "ecc",
        "maxItems": 5 if cert_type == "offline" else 2,
        "params": {"storagePath": str(node.var / "iam" / "keys")},
    }
    if cert_type in _SERVER_TYPES:
        module["extendedKeyUsage"] = ["serverAuth", "clientAuth"]
        module["alternativeNames"] = list(node.names)
    return module


def _urls(node: MainNode) -> dict[str, str]:
    host = node.names[0]
    return {"iamPublicServerUrl": f"{host}:8090", "iamProtectedServerUrl": f"{host}:8089", "caCert": str(node.ca_file)}


def _cm(node: MainNode) -> dict[str, Any]:
    work = node.var / "workdirs" / "cm"
    return {
        **_urls(node),
        "workingDir": str(work),
        "certStorage": "cm",
        "cmServerUrl": ":8093",
        "fileServerUrl": f"{node.names[0]}:8094",
        "serviceDiscoveryUrl": node.discovery_url,
        "storageDir": str(node.var / "storages"),
        "stateDir": str(node.var / "states"),
        "unitConfigFile": str(node.var / "aos_unit.cfg"),
        "unitStatusSendTimeout": node.status_period,
        "dnsIp": node.dns_ip,
        # dnsmasq reads it without privileges: not below `var`, which may be in a closed home directory. And `run`/dns
        # belongs to SM, which deletes there what it does not know.
        "dnsStoragePath": str(node.run / "names"),
        "dnsPidFile": str(node.run / "dns.pid"),
        "dnsProgram": "/usr/sbin/dnsmasq" if node.dns_ip else "",
        "monitoring": {"sendPeriod": node.monitoring_period},
        "imageManager": {
            "installPath": str(work / "imagemanager" / "install"),
            "downloadPath": str(work / "imagemanager" / "downloads"),
        },
    }


def _sm(node: MainNode) -> dict[str, Any]:
    work = node.var / "workdirs" / "sm"
    container: dict[str, Any] = {
        "runtimeDir": str(node.run / "runtime"),
        "storageDir": str(node.var / "storages"),
        "stateDir": str(node.var / "states"),
        "crunStateRoot": str(node.run / "crun"),
        "output": node.output,
    }
    if node.cgroup_parent is not None:
        container["cgroupParent"] = node.cgroup_parent
    return {
        **_urls(node),
        "workingDir": str(work),
        "certStorage": "sm",
        "cmServerUrl": f"{node.names[0]}:8093",
        "cmReconnectTimeout": "1s",
        "nodeConfigFile": str(work / "aos_node.cfg"),
        "resourcesConfigFile": str(node.etc / "resources.cfg"),
        "monitoring": {"pollPeriod": node.monitoring_period, "averageWindow": node.monitoring_period},
        "imageManager": {"imagePath": str(work / "images")},
        "runtimes": [{"plugin": "container", "type": node.runtime_type, "config": container}],
    }


_CONFIGS = {"iam": _iam, "cm": _cm, "sm": _sm}
