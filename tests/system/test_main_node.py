"""A one-node Unit as it is flashed: systemd units, journald, reboot (bed C)."""

import pytest

from qemu.images import DOMAIN
from tests.support.bundles import make_item
from tests.support.nspawn import NspawnUnit
from tests.support.wholeunit import is_back, main_pid

pytestmark = [pytest.mark.nspawn, pytest.mark.timeout(600)]


def test_provision_deploy_adopt_reboot(nspawn_unit: NspawnUnit) -> None:
    unit, node = nspawn_unit, nspawn_unit.nodes["main"]
    unit.provision()
    unit.upload(make_item(unit.directory / "item", user=unit.cloud.user("sp"), domain=DOMAIN))
    unit.deploy("web")
    unit.wait(lambda: unit.page("web") == "hello from the service\n", 20, "the service to answer")

    # The journal has the service's output, and the cloud can get it.
    answers = unit.ask("logs", log_type="instanceLog", item="web")
    assert any("web service starts" in answer["text"] for answer in answers.values()), answers
    unit.wait(lambda: unit.ask("monitoring", limit=1), 30, "a monitoring sample")
    assert unit.ask("violations") == []

    # Daemons that die come back by their units, and adopt what runs.
    containers = unit.container_pids()
    assert len(containers) == 1

    for name in ("aos-sm", "aos-cm", "aos-iam"):
        before = main_pid(node, name)
        node.run("systemctl", "kill", "--signal=KILL", name)
        unit.wait(lambda name=name, before=before: is_back(node, name, before), 60, f"{name} to be back")
    unit.wait(unit.is_online, 60, "the Unit to be online again")
    assert unit.container_pids() == containers, "running services are adopted, not restarted"

    # After a reboot the service runs again.
    begun = ("awk", "{print $22}", "/proc/1/stat")
    boot = node.run(*begun)
    node.run("systemctl", "reboot", "--no-block")
    unit.wait(lambda: node.run(*begun) != boot, 60, "another systemd to run in the node")
    node.wait_settled()
    unit.wait(lambda: len(unit.container_pids()) == 1, 60, "the service to be started again")
    unit.wait(lambda: unit.page("web") == "hello from the service\n", 30, "the service to answer again")
    unit.wait(unit.is_online, 60, "the Unit to be online after the reboot")
    unit.wait(unit.all_active, 30, "the cloud to know that the service runs")
    assert unit.ask("violations") == []
