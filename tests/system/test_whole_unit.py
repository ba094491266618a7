"""A Unit of two nodes with all private keys in tokens, through its life (bed C)."""

from collections.abc import Iterator
from typing import Any

import pytest

from qemu.images import DOMAIN
from tests.support.bundles import make_item
from tests.support.nspawn import THIRD, NspawnUnit
from tests.support.wholeunit import (
    SERVICES,
    containers,
    instances,
    label_nodes,
    node_ids,
    node_status,
    places,
    provision_both,
    upload_service,
    wait_active,
)
from tests.system.conftest import running_pair

pytestmark = [pytest.mark.nspawn, pytest.mark.timeout(600)]

CERTIFICATE_TYPES = {"main": {"online", "offline", "iam", "sm", "cm"}, "secondary": {"iam", "sm"}}


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NspawnUnit]:
    with running_pair(tmp_path_factory.mktemp("unit"), later=(THIRD,)) as unit:
        yield unit


def issued(unit: NspawnUnit) -> list[tuple[str, str]]:
    """Node name and type of every certificate of the Unit that the cloud knows."""
    names = {identifier: name for name, identifier in node_ids(unit).items()}
    return [(names[one["node_id"]], one["type"]) for one in unit.ask("certificates")]


def test_private_keys_are_in_tokens_only(unit: NspawnUnit) -> None:
    wanted = {(node, kind) for node, kinds in CERTIFICATE_TYPES.items() for kind in kinds}
    assert set(issued(unit)) == wanted
    for name, node in unit.nodes.items():
        assert node.run("sh", "-c", "grep -rl 'PRIVATE KEY' /var/aos /etc/aos || true") == ""
        objects = ""
        for label in ("aoscloud", "aoscore") if name == "main" else ("aoscore",):
            tool = f"pkcs11-tool --module /usr/lib/softhsm/libsofthsm2.so --token-label {label}"
            objects += node.run("sh", "-c", f"{tool} --login --pin $(cat /var/aos/iam/.usrpin) --list-objects")
        assert objects.count("Private Key Object") == len(CERTIFICATE_TYPES[name]), objects
        assert "never extractable" in objects, objects


def test_logs_crash_logs_alerts_and_monitoring_of_both_nodes(unit: NspawnUnit) -> None:
    ids = node_ids(unit)

    def is_seen(operation: str, node: str) -> bool:
        return any(ids[node] in str(one) for one in unit.ask(operation))

    def log(log_type: str, node: str, **what: Any) -> str:
        answer = unit.ask("logs", log_type=log_type, nodes=[ids[node]], **what)[ids[node]]
        assert answer["status"] == "ok", answer
        return str(answer["text"])

    for name, node in unit.nodes.items():
        unit.wait(lambda name=name: is_seen("monitoring", name), 60, f"monitoring of {name}")
        assert f"{SERVICES[name]} 1.0.0 starts" in log("instanceLog", name, item=SERVICES[name])
        assert "Reached target aos.target" in log("systemLog", name)
        node.run("systemd-cat", "-p", "err", "-t", "aos-test", "echo", f"{name} is on fire")
        unit.wait(lambda name=name: f"{name} is on fire" in str(unit.ask("alerts")), 60, f"the alert of {name}")

        [pid] = unit.container_pids(name).values()
        node.run("kill", "-9", str(pid))
        unit.wait(lambda name=name, pid=pid: pid not in unit.container_pids(name).values(), 60, "the service to end")
        unit.wait(lambda name=name: len(unit.container_pids(name)) == 1, 60, "the service to be started again")
        assert f"{SERVICES[name]} 1.0.0 starts" in log("crashLog", name, item=SERVICES[name])
    wait_active(unit)
    assert unit.ask("violations") == []


def test_certificates_of_both_nodes_are_renewed(unit: NspawnUnit) -> None:
    before, serials = issued(unit), {one["serial"] for one in unit.ask("certificates")}
    unit.ask("renew")
    unit.wait(
        lambda: not serials & {one["serial"] for one in unit.ask("certificates")},
        120,
        "the cloud to have seen the new certificates of both nodes",
    )
    assert sorted(issued(unit)) == sorted(before)
    # The token has room for two of each, and the old ones are gone from it when they are not needed any more.
    unit.ask("disconnect")
    for node in unit.nodes.values():
        node.run("systemctl", "restart", "aos.target")
    unit.wait(unit.is_online, 90, "the Unit to be online with its new certificate")
    wait_active(unit)
    assert unit.ask("violations") == []


def test_node_is_paused_and_resumed(unit: NspawnUnit) -> None:
    node = node_ids(unit)["secondary"]

    def state() -> Any:
        return node_status(unit, "secondary")["state"]

    unit.ask("node_state", node=node, state="paused")
    unit.wait(lambda: state() == "paused", 60, "the node to be paused")
    unit.wait(lambda: unit.container_pids("secondary") == {}, 60, "its service to be stopped")
    assert len(unit.container_pids("main")) == 1
    unit.ask("node_state", node=node, state="provisioned")
    unit.wait(lambda: state() == "provisioned", 60, "the node to be resumed")
    wait_active(unit)


def test_deprovisioned_and_provisioned_again(unit: NspawnUnit) -> None:
    is_bare = "test ! -e /var/aos/.provisionstate && systemctl is-active aos-iam-prov || true"
    for name, node in reversed(unit.nodes.items()):
        unit.ask("deprovision", node=node_ids(unit)[name])
        unit.wait(lambda node=node: node.run("sh", "-c", is_bare) == "active\n", 120, f"{name} to start as a new node")
        assert node.run("sh", "-c", "ls /var/lib/softhsm/tokens; find /var/aos -name .usrpin") == ""
    unit.call("forget_unit", unit=unit.system_id)
    provision_both(unit)
    label_nodes(unit)
    for name in unit.nodes:
        unit.call("assign", item=SERVICES[name], target=unit.system_id)
    wait_active(unit)
    assert set(instances(unit)) == set(unit.nodes)


def test_third_node_joins_later(unit: NspawnUnit) -> None:
    """The cloud provisions it; it gets what its label and its resources are for, and the others do not notice."""
    before = containers(unit)
    third = unit.add_node(THIRD)
    seat = '[{"name": "seat", "sharedCount": 1, "hosts": [{"ip": "10.9.9.9", "hostName": "seat"}]}]'
    third.run("sh", "-c", f"echo '{seat}' > /etc/aos/resources.cfg")
    # Wanted before there is a node that can have it.
    folder = unit.directory / "items" / "seated"
    wish = "resources:\n  - name: seat\n"
    unit.upload(make_item(folder, user=unit.cloud.user("sp"), domain=DOMAIN, codename="seated", configuration=wish))
    unit.call("assign", item="seated", target=unit.system_id)
    unit.wait(lambda: "no nodes with service resources" in str(unit.ask("unit")["status"]), 60, "the cloud to know why")

    third.run("systemctl", "unmask", "aos-iam-prov")
    third.run("systemctl", "start", "--no-block", "aos-iam-prov")
    unit.wait(lambda: node_status(unit, THIRD).get("state") == "unprovisioned", 60, "the cloud to hear of the node")
    unit.ask("start_provisioning", node=node_ids(unit)[THIRD], password="of its disk")
    unit.wait(lambda: node_status(unit, THIRD).get("state") == "provisioned", 120, "the node to be provisioned")
    label_nodes(unit, "1.1.0")
    unit.call("assign", item=upload_service(unit, THIRD), target=unit.system_id)
    for item in ("seated", SERVICES[THIRD]):
        unit.wait(lambda item=item: places(unit, item) == [THIRD], 120, f"{item} to be active on the new node")
    assert {name: containers(unit)[name] for name in before} == before
    assert unit.ask("violations") == []
