"""A Secondary Node that reaches the Main Node through one TCP port and nothing else, or through vchan alone (bed C)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu.bed import MAIN_IP
from qemu.images import DOMAIN
from tests.support.bundles import make_item
from tests.support.fakexen import FakeXen
from tests.support.nspawn import DOMAINS, NspawnNode, NspawnUnit
from tests.system.conftest import running

pytestmark = [pytest.mark.nspawn, pytest.mark.timeout(600)]

# A table of the test's own, before those of aoscore: of the Unit's network only the link of MP is left. With vchan that
# is none of it, and the port is nobody's.
_ONLY_THE_LINK = f"""\
table inet only_the_link {{
    chain out {{
        type filter hook output priority -300; policy accept;
        oifname "host0" ip daddr {MAIN_IP} tcp dport 30001 accept
        oifname "host0" counter drop
    }}
    chain in {{
        type filter hook input priority -300; policy accept;
        iifname "host0" ip saddr {MAIN_IP} tcp sport 30001 accept
        iifname "host0" counter drop
    }}
    chain through {{
        type filter hook forward priority -300; policy accept;
        iifname "host0" counter drop
        oifname "host0" counter drop
    }}
}}
"""


_SEAT = '[{"name": "seat", "sharedCount": 1, "hosts": [{"ip": "10.9.9.9", "hostName": "seat"}]}]'


@pytest.fixture(params=["tcp", "vchan"])
def xen(request: pytest.FixtureRequest) -> Iterator[FakeXen | None]:
    """The played Xen, where the link is vchan."""
    if request.param == "tcp":
        yield None
        return
    machine = FakeXen()
    yield machine
    machine.remove()


@pytest.fixture
def unit(tmp_path: Path, xen: FakeXen | None) -> Iterator[NspawnUnit]:
    with running(NspawnUnit(tmp_path, ("main", "secondary"), with_mp=True, xen=xen)) as unit:
        yield unit


def isolate(node: NspawnNode) -> None:
    """Leave a node nothing of its network but the port of the link."""
    node.run("sh", "-c", f"echo '{_ONLY_THE_LINK}' | nft -f -")
    assert "100% packet loss" in node.run("sh", "-c", f"ping -c 1 -W 1 {MAIN_IP} || true")


def node_ids(unit: NspawnUnit) -> dict[str, str]:
    """Node id by name of the node."""
    return {name: node.run("cat", "/etc/machine-id").strip() for name, node in unit.nodes.items()}


def test_provisioned_deployed_and_watched_through_the_link(unit: NspawnUnit, xen: FakeXen | None) -> None:
    secondary = unit.nodes["secondary"]
    isolate(secondary)
    for node in unit.nodes.values():
        node.run("sh", "-c", f"echo '{_SEAT}' > /etc/aos/resources.cfg")
    secondary.run("systemctl", "unmask", "aos-iam-prov")
    secondary.run("systemctl", "start", "--no-block", "aos-iam-prov")
    unit.provision(nodes=2)
    ids = node_ids(unit)
    issued = {(one["node_id"], one["type"]) for one in unit.ask("certificates")}
    assert {(ids["secondary"], "iam"), (ids["secondary"], "sm"), (ids["main"], "sm")} <= issued

    # One item, an instance on each node: what it asks for each node has once.
    project = make_item(
        unit.directory / "item",
        user=unit.cloud.user("sp"),
        domain=DOMAIN,
        start="echo web service starts; exec httpd -f -p 8080 -h /www",
        configuration="resources:\n  - name: seat\n",
    )
    unit.upload(project)
    unit.call("assign", item="web", target=unit.system_id, instances=2)
    unit.wait(lambda: unit.instance_states() == ["active"] * 2, 120, "both instances to be active")
    for name in unit.nodes:
        assert len(unit.container_pids(name)) == 1, name

    # What the cloud sees of the Secondary Node.
    def is_seen(operation: str) -> bool:
        return any(ids["secondary"] in str(one) for one in unit.ask(operation))

    unit.wait(lambda: is_seen("monitoring"), 60, "monitoring of the Secondary Node")
    answers = unit.ask("logs", log_type="instanceLog", item="web")
    texts = [answer["text"] for answer in answers.values()]
    assert len(texts) == 2 and all("web service starts" in text for text in texts), answers
    secondary.run("systemd-cat", "-p", "err", "-t", "aos-test", "echo", "something is broken here")
    secondary.run("systemctl", "kill", "--signal=KILL", "aos-iam")
    unit.wait(lambda: is_seen("alerts"), 60, "an alert of the Secondary Node")
    assert unit.ask("violations") == []

    ports = secondary.run("ss", "-Htn", "dst", f"{MAIN_IP}:30001").strip()
    assert bool(ports) == (xen is None), "the link is not the one that was wanted"

    # Either MP is killed; what runs goes on, and both nodes are seen again.
    containers = {name: unit.container_pids(name) for name in unit.nodes}

    def links() -> int:
        return secondary.run("journalctl", "-u", "aos-mp", "-o", "cat").count(
            "Registered at the Main Node: call=RegisterSM"
        )

    for name, node in unit.nodes.items():
        before = links()
        pid = int(node.run("systemctl", "show", "-P", "MainPID", "aos-mp"))
        node.run("systemctl", "kill", "--signal=KILL", "aos-mp")
        if xen is not None:
            xen.bury(DOMAINS[name], pid)
        unit.wait(lambda before=before: links() > before, 120, "SM of the Secondary Node to be registered again")
    unit.wait(lambda: unit.instance_states() == ["active"] * 2, 120, "both instances to be seen active again")
    assert {name: unit.container_pids(name) for name in unit.nodes} == containers
