"""Configuration files of the daemons by node kind and components (yocto.md §5, iam.md §2, mp.md §4). Pure."""

import json
from collections.abc import Iterator
from typing import Any

from aoscore.ctl.target.entry import Entry
from aoscore.ctl.target.node import Node

HSM_LIBRARY = {"softhsm": "/usr/lib/softhsm/libsofthsm2.so", "optee": "/usr/lib/libckteec.so.0"}
# Ports of MP's local servers on a Secondary Node (mp.md §2).
_MP_IAM_PUBLIC = 8190
_MP_IAM_PROTECTED = 8189


def entries(node: Node) -> Iterator[Entry]:
    """Configuration files of the selected components."""
    for name, build in (("iam", iam), ("cm", cm), ("sm", sm), ("mp", mp)):
        if node.has(name):
            yield _json(node, f"{name}.cfg", build(node), name)
    if node.has("sm"):
        yield _json(node, "resources.cfg", [], "sm")
    if node.has("iam"):
        if node.is_main:
            yield Entry(f"{node.etc}/unit_model", f"{node.unit_model};{node.unit_version}\n", "iam")
            yield Entry(f"{node.etc}/subjects", "", "iam")
        for name in ("system_id", "node_id"):
            if text := getattr(node, name):
                yield Entry(f"{node.etc}/{name}", f"{text}\n", "iam")


def through_mp(node: Node) -> bool:
    """Whether this node reaches the Main Node by its own MP (mp.md §2)."""
    return not node.is_main and node.has("mp")


def _mp_images(node: Node) -> str:
    """Where MP keeps what it fetches for SM, which takes it from there (mp.md §7)."""
    return f"{node.var}/workdirs/mp/images"


def health_services(node: Node) -> list[str]:
    """Units that must be active for an update of the node to count as good (yocto.md §5)."""
    return [f"aos-{name}.service" for name in ("cm", "iam", "sm") if node.has(name)]


def iam(node: Node) -> dict[str, Any]:
    """iam.cfg."""
    config: dict[str, Any] = {
        "caCert": node.ca_file,
        "certStorage": "iam",
        "iamPublicServerUrl": ":8090",
        "iamProtectedServerUrl": ":8089",
        "workingDir": f"{node.var}/iam",
        "runtimeDir": f"{node.run}/iam",
        "enablePermissionsHandler": True,
    }
    if through_mp(node):
        config["mainIamPublicServerUrl"] = f"localhost:{_MP_IAM_PUBLIC}"
        config["mainIamProtectedServerUrl"] = f"localhost:{_MP_IAM_PROTECTED}"
    elif not node.is_main:
        config["mainIamPublicServerUrl"] = f"{node.main_host}:8090"
        config["mainIamProtectedServerUrl"] = f"{node.main_host}:8089"
    if node.hooks:
        if node.keys == "softhsm":
            # A token whose owner is known to nobody, after a provisioning that was broken off, can't be taken over.
            config["startProvisioningCmdArgs"] = [f"{node.opt}/clearhsm.sh"]
        config["finishProvisioningCmdArgs"] = [f"{node.opt}/provfinish.sh"]
        config["deprovisionCmdArgs"] = [f"{node.opt}/deprovision.sh", "async"]
        if node.data_disk:
            config["diskEncryptionCmdArgs"] = [f"{node.opt}/setupdisk.sh", "create"]
    config["nodeInfo"] = _node_info(node)
    if node.is_main:
        config["identifier"] = {
            "plugin": "fileidentifier",
            "params": {
                "systemIdPath": _id_path(node, "system_id"),
                "unitModelPath": f"{node.etc}/unit_model",
                "subjectsPath": f"{node.etc}/subjects",
            },
        }
    config["certModules"] = list(_cert_modules(node))
    return config


def cm(node: Node) -> dict[str, Any]:
    """cm.cfg."""
    work = f"{node.var}/workdirs/cm"
    return {
        **_iam_urls(node),
        "workingDir": work,
        "certStorage": "cm",
        "cmServerUrl": ":8093",
        "fileServerUrl": f"{node.main_host}:8094",
        # Its own name is a loopback address on the Main Node itself.
        "fileServerAddresses": list(dict.fromkeys(filter(None, (node.main_ip, node.dns_ip)))),
        "serviceDiscoveryUrl": node.discovery_url,
        "storageDir": f"{node.var}/storages",
        "stateDir": f"{node.var}/states",
        "unitConfigFile": f"{work}/aos_unit.cfg",
        "unitStatusSendTimeout": node.status_period,
        "dnsIp": node.dns_ip,
        **_dns(node),
        "monitoring": {"sendPeriod": node.monitoring_period},
        "imageManager": {
            "installPath": f"{work}/imagemanager/install",
            "downloadPath": f"{work}/imagemanager/downloads",
        },
        "migration": {"mergedMigrationPath": f"{work}/migration"},
    }


def _dns(node: Node) -> dict[str, str]:
    if not node.dns_by_cm:
        return {"dnsStoragePath": f"{node.var}/dns", "dnsPidFile": f"{node.var}/dns/pidfile"}
    # dnsmasq reads it without privileges: not below `var`, which may be in a closed home directory. And `run`/dns
    # belongs to SM, which deletes there what it does not know.
    return {
        "dnsStoragePath": f"{node.run}/names",
        "dnsPidFile": f"{node.run}/dns.pid",
        "dnsProgram": "/usr/sbin/dnsmasq" if node.dns_ip else "",
    }


def sm(node: Node) -> dict[str, Any]:
    """sm.cfg."""
    work = f"{node.var}/workdirs/sm"
    return {
        **_iam_urls(node),
        "workingDir": work,
        "certStorage": "sm",
        "cmServerUrl": "localhost:8093" if through_mp(node) else f"{node.main_host}:8093",
        "cmReconnectTimeout": "1s",
        "nodeConfigFile": f"{work}/aos_node.cfg",
        "resourcesConfigFile": f"{node.etc}/resources.cfg",
        "monitoring": {"pollPeriod": node.monitoring_period, "averageWindow": node.monitoring_period},
        "imageManager": {
            "imagePath": f"{work}/images",
            **({"stagingDir": _mp_images(node)} if through_mp(node) else {}),
        },
        "migration": {"mergedMigrationPath": f"{work}/migration"},
        "runtimes": [_runtime(node, name, work) for name in node.runtimes],
    }


def _runtime(node: Node, name: str, work: str) -> dict[str, Any]:
    if name == "container":
        config: dict[str, Any] = {
            "runtimeDir": f"{node.run}/runtime",
            "storageDir": f"{node.var}/storages",
            "stateDir": f"{node.var}/states",
            "crunStateRoot": node.crun_state_root,
            "output": node.output,
        }
        if node.cgroup_parent:
            config["cgroupParent"] = node.cgroup_parent
        return {"plugin": name, "type": node.container_type, "config": config}
    config = {"workingDir": f"{work}/runtimes/{name}", "healthCheckServices": health_services(node)}
    if name == "rootfs":
        config["versionFilePath"] = f"{node.etc}/version"
    else:
        config |= {
            "loader": "/EFI/BOOT/bootx64.efi",
            "versionFile": "aos/version",
            "detectMode": "auto" if all(part.isdigit() for part in node.boot_partitions) else "",
            "partitions": list(node.boot_partitions),
        }
    return {"plugin": name, "type": node.component_type(name), "isComponent": True, "config": config}


def mp(node: Node) -> dict[str, Any]:
    """mp.cfg: role gateway on the Main Node, role node elsewhere (mp.md §2, §4)."""
    work = f"{node.var}/workdirs/mp"
    config: dict[str, Any] = {
        "caCert": node.ca_file,
        "certStorage": "sm",
        "workingDir": work,
        "imageStoreDir": _mp_images(node),
        "role": "gateway" if node.is_main else "node",
        "iamConfig": {
            "iamPublicServerUrl": f"{node.hostname}:8090",
            "iamMainPublicServerUrl": f"{node.main_host}:8090",
            "iamMainProtectedServerUrl": f"{node.main_host}:8089",
            "certStorage": "iam",
            "openPort": 1,
            "securePort": 2,
        },
        "cmConfig": {"cmServerUrl": f"{node.main_host}:8093", "openPort": 3, "securePort": 4},
        "vchan": {
            "domain": node.vchan_domain,
            "xsRxPath": f"{node.vchan_path}/rx",
            "xsTxPath": f"{node.vchan_path}/tx",
            "iamCertStorage": "iam",
            "smCertStorage": "sm",
        },
        "downloader": {"downloadDir": f"{work}/downloads"},
        "transport": {"type": node.transport},
    }
    if node.is_main:
        config["transport"]["listen"] = "0.0.0.0:30001"
    else:
        config["transport"]["connect"] = f"{node.main_host}:30001"
        config["node"] = {
            "cmProxyUrl": "localhost:8093",
            "iamPublicProxyUrl": f"localhost:{_MP_IAM_PUBLIC}",
            "iamProtectedProxyUrl": f"localhost:{_MP_IAM_PROTECTED}",
            "blobServerUrl": "127.0.0.1:8095",
        }
    return config


def _node_info(node: Node) -> dict[str, Any]:
    info: dict[str, Any] = {
        "nodeIdPath": _id_path(node, "node_id"),
        "nodeName": node.hostname,
        "nodeType": node.node_type,
        "maxDmips": node.max_dmips,
        "provisioningStatePath": node.state_file,
        "attrs": {
            **({"MainNode": ""} if node.is_main else {}),
            "AosComponents": ",".join(sorted(node.components)),
        },
        "partitions": list(_partitions(node)),
    }
    for key, value in (
        ("architecture", node.architecture),
        ("architectureVariant", node.architecture_variant),
        ("os", node.os),
        ("osVersion", node.os_version),
    ):
        if value:
            info[key] = value
    return info


def _partitions(node: Node) -> Iterator[dict[str, Any]]:
    if not node.data_disk:
        types = ["storages", "states", "services", "layers", "downloads"] if node.is_main else ["services", "layers"]
        yield {"name": "aos", "path": node.var, "types": types}
        return
    if node.is_main:
        yield {"name": "storages", "path": f"{node.var}/storages", "types": ["storages"]}
        yield {"name": "states", "path": f"{node.var}/states", "types": ["states"]}
    yield {"name": "workdirs", "path": f"{node.var}/workdirs", "types": ["services", "layers", "generic"]}
    yield {"name": "var", "path": "/var", "types": ["generic"]}


def _cert_modules(node: Node) -> Iterator[dict[str, Any]]:
    """The sets of iam.md §2.6. The self-signed one is last: its token is initialized once more by the ones before."""
    if node.is_main and node.has("cm"):
        yield _cert_module(node, "online")
        yield _cert_module(node, "offline", algorithm="rsa", items=5)
    yield _cert_module(node, "iam", server=True)
    if node.has("sm") or node.has("mp"):
        yield _cert_module(node, "sm", server=node.is_main, client=True)
    if node.has("cm"):
        yield _cert_module(node, "cm", server=True)
    if node.data_disk:
        yield {**_cert_module(node, "diskencryption", algorithm="rsa", items=1), "selfSigned": True}


def _cert_module(
    node: Node, cert_type: str, *, algorithm: str = "ecc", items: int = 2, server: bool = False, client: bool = False
) -> dict[str, Any]:
    module: dict[str, Any] = {
        "id": cert_type,
        "plugin": "swmodule" if node.keys == "file" else "pkcs11module",
        "algorithm": algorithm,
        "maxItems": items,
        "params": _key_params(node, cert_type),
    }
    if server:
        module["extendedKeyUsage"] = ["serverAuth", "clientAuth"]
        module["alternativeNames"] = list(_server_names(node))
    elif client:
        module["extendedKeyUsage"] = ["clientAuth"]
    return module


def _server_names(node: Node) -> tuple[str, ...]:
    """Every name that peers put into their URLs; localhost is how SM and IAM call MP's servers (mp.md §2)."""
    names = (node.hostname, *node.extra_names, *(("localhost",) if through_mp(node) else ()))
    return tuple(dict.fromkeys(names))


def _key_params(node: Node, cert_type: str) -> dict[str, Any]:
    if node.keys == "file":
        return {"storagePath": f"{node.var}/iam/keys"}
    params: dict[str, Any] = {
        "library": HSM_LIBRARY[node.keys],
        "tokenLabel": "aoscloud" if cert_type in ("online", "offline") else "aoscore",
        "modulePathInUrl": True,
    }
    if node.keys == "softhsm":
        # OP-TEE knows the user by its login type instead (iam.md §5.4).
        params["userPinPath"] = f"{node.var}/iam/.usrpin"
    return params


def _iam_urls(node: Node) -> dict[str, str]:
    return {
        "iamPublicServerUrl": f"{node.hostname}:8090",
        "iamProtectedServerUrl": f"{node.hostname}:8089",
        "caCert": node.ca_file,
    }


def _id_path(node: Node, name: str) -> str:
    return f"{node.etc}/{name}" if getattr(node, name) else "/etc/machine-id"


def _json(node: Node, name: str, value: object, part: str) -> Entry:
    return Entry(f"{node.etc}/{name}", json.dumps(value, indent=4) + "\n", part)
