"""A Unit of two nodes as it is used in the field: one service tied to each node, and questions about both nodes."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qemu.bed import Bed, BedNode
from qemu.images import DOMAIN
from tests.support.bundles import make_component, make_item

# The service that runs on each node, by the node's label in the unit config.
SERVICES = {"main": "front", "secondary": "back", "third": "side"}
_SPEAKS = "echo {codename} {version} starts; exec httpd -f -p 8080 -h /www"
# What tells a database of SQLite whose file is whole, asked with nothing but Python's own library.
_CHECK_DATABASES = """
import sqlite3, sys
for path in sys.argv[1:]:
    with sqlite3.connect(path) as database:
        [(answer,)] = database.execute("PRAGMA integrity_check")
        print(path, answer)
"""
# Every blob of CM and SM has the name of its SHA-256. SM's of a layer that is unpacked only names that (its store.py).
# What is below `downloads` is work in progress.
_CHECK_BLOBS = """
import hashlib, pathlib, re, sys
for top in sys.argv[1:]:
    for path in pathlib.Path(top).rglob("blobs/sha256/*"):
        if path.is_file() and "downloads" not in path.parts and re.fullmatch("[0-9a-f]{64}", path.name):
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            layer = re.fullmatch(b"sha256:([0-9a-f]{64})", data)
            if layer and (path.parents[2] / "layers/sha256" / layer[1].decode()).is_dir():
                digest = path.name
            print(path, "ok" if digest == path.name else "is " + digest)
"""


def node_ids(unit: Bed) -> dict[str, str]:
    """Node id by name of the node."""
    return {name: node.run("cat", "/etc/machine-id").strip() for name, node in unit.nodes.items()}


def provision_both(unit: Bed) -> None:
    """Provision both nodes with the real aos-prov."""
    secondary = unit.nodes["secondary"]
    secondary.run("systemctl", "unmask", "aos-iam-prov")
    secondary.run("systemctl", "start", "--no-block", "aos-iam-prov")
    unit.provision(nodes=2)


def label_nodes(unit: Bed, version: str = "1.0.0", *, ram_percent: float = 0) -> None:
    """Give each node a label with its name; of what a service may have, this share of its RAM is kept for it."""
    unit.label_nodes(tuple(SERVICES), version, ram_percent=ram_percent)


def upload_service(unit: Bed, node: str, version: str = "1.0.0", start: str = _SPEAKS, configuration: str = "") -> str:
    """Give the cloud a version of the service of a node; its code name."""
    codename = SERVICES[node]
    unit.upload(
        make_item(
            unit.directory / "items" / f"{codename}-{version}",
            user=unit.cloud.user("sp"),
            domain=DOMAIN,
            codename=codename,
            version=version,
            start=start.format(codename=codename, version=version),
            configuration=configuration,
            labels=(node,),
        )
    )
    return codename


def run_services(unit: Bed) -> None:
    """Deploy the service of each node; returns when all are active."""
    for node in unit.nodes:
        unit.call("assign", item=upload_service(unit, node), target=unit.system_id)
    wait_active(unit)


def wait_active(unit: Bed, version: str = "", timeout_s: float = 120) -> None:
    """Until the cloud sees an active instance on each node, of one version if given."""

    def done() -> bool:
        found = instances(unit)
        return set(found) == set(unit.nodes) and all(
            one["state"] == "active" and version in ("", one["version"]) for one in found.values()
        )

    try:
        unit.wait(done, timeout_s, f"services {version} on all nodes to be active")
    except Exception as error:
        error.add_note(json.dumps(unit.ask("unit")["status"], indent=1))
        raise


def instances(unit: Bed) -> dict[str, dict[str, Any]]:
    """The instance on each node, by name of the node, as the cloud knows it: state and version."""
    names = {identifier: name for name, identifier in node_ids(unit).items()}
    return {
        names[one["node"]["codename"]]: {**one, "version": group["version"]}
        for group in unit.ask("unit")["status"].get("instances", [])
        for one in group["instances"]
        if one.get("node", {}).get("codename") and group["item"].get("type") == "service"
    }


def upload_component(unit: Bed, runtime: str, version: str, media_type: str, payload: Path) -> None:
    """Give the cloud a version of the component that a runtime of this type takes; `payload` is moved."""
    folder = unit.directory / "items" / f"{runtime}-{version}"
    user = unit.cloud.user("sp")
    item = {"runtime": runtime, "version": version, "media_type": media_type}
    unit.upload(make_component(folder, user=user, domain=DOMAIN, payload=payload, **item))


def components(unit: Bed) -> dict[str, str]:
    """States of the components that the cloud knows to be on the Unit, by version."""
    return {
        group["version"]: one["state"]
        for group in unit.ask("unit")["status"].get("instances", [])
        for one in group["instances"]
        if group["item"].get("type") == "component" and one["state"] != "inactive"
    }


def wait_installed(unit: Bed, version: str, timeout_s: float) -> None:
    """Until the cloud knows that this version of the only component is installed, and of no other."""
    try:
        unit.wait(lambda: components(unit) == {version: "active"}, timeout_s, f"component {version} to be installed")
    except Exception as error:
        error.add_note(json.dumps(unit.ask("unit")["status"], indent=1))
        raise


def places(unit: Bed, item: str) -> list[str]:
    """Names of the nodes on which an item is active, one for each instance."""
    names = {identifier: name for name, identifier in node_ids(unit).items()}
    [item_id] = {one["id"] for one in unit.call("items") if one["codename"] == item}
    return sorted(
        names[one["node"]["codename"]]
        for group in unit.ask("unit")["status"].get("instances", [])
        for one in group["instances"]
        if group["item"].get("id") == item_id and one["state"] == "active"
    )


def node_status(unit: Bed, name: str) -> dict[str, Any]:
    """What the cloud knows about a node; empty when it knows nothing."""
    found = [one for one in unit.ask("unit")["status"].get("nodes", []) if node_ids(unit)[name] in str(one)]
    return found[0] if found else {}


def check_whole(unit: Bed) -> None:
    """No broken database and no half blob on any node."""
    for name, node in unit.nodes.items():
        databases = node.run("find", "/var/aos", "-name", "*.db").split()
        found = node.run("python3", "-c", _CHECK_DATABASES, *databases).splitlines()
        assert found and all(line.endswith(" ok") for line in found), f"databases of {name}: {found}"
        blobs = node.run("python3", "-c", _CHECK_BLOBS, "/var/aos/workdirs").splitlines()
        assert all(line.endswith(" ok") for line in blobs), f"blobs of {name}: {blobs}"


def containers(unit: Bed) -> dict[str, dict[str, int]]:
    """Running containers with the process ids of their first processes, by name of the node."""
    return {name: unit.container_pids(name) for name in unit.nodes}


def main_pid(node: BedNode, unit_name: str) -> str:
    """Process id of a systemd unit's main process."""
    return node.run("systemctl", "show", "--value", "--property=MainPID", unit_name).strip()


def is_back(node: BedNode, unit_name: str, before: str) -> bool:
    """Whether a unit whose first process was `before` is ready again with another one.

    For a moment after that one has died systemd shows no process, and the unit as active all the same.
    """
    if main_pid(node, unit_name) in ("0", before):
        return False
    return node.run("systemctl", "show", "--value", "--property=ActiveState", unit_name).strip() == "active"


@contextlib.contextmanager
def silence(node: BedNode, address: str) -> Iterator[None]:
    """For the block, nothing goes between a node and an address; nobody is told, as when a cable is pulled."""
    rules = f"""\
table inet silence {{
    chain out {{ type filter hook output priority -300; policy accept; ip daddr {address} counter drop; }}
    chain in {{ type filter hook input priority -300; policy accept; ip saddr {address} counter drop; }}
    chain on {{ type filter hook forward priority -300; policy accept;
                ip daddr {address} counter drop; ip saddr {address} counter drop; }}
}}
"""
    node.run("sh", "-c", f"echo '{rules}' | nft -f -")
    try:
        yield
    finally:
        node.run("nft", "delete", "table", "inet", "silence")
