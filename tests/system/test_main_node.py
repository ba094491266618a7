"""A one-node Unit as it is flashed: systemd units, journald, reboot (bed C)."""

from pathlib import Path

import pytest

from tests.support.bundles import make_item
from tests.system.conftest import DNS_IP, DOMAIN, GUEST_IP, ROOT, SYSTEM_ID, Bed, run, wait

pytestmark = [pytest.mark.nspawn, pytest.mark.timeout(600)]


def provision(bed: Bed) -> None:
    """With the real aos-prov, as a user does."""
    tools = ROOT / ".venv-tools" / "bin"
    package = Path(run([tools / "python", "-c", "import aos_prov; print(aos_prov.__path__[0])"]).strip())
    root = Path(bed.devcloud("ca", "--domain", DOMAIN).strip().splitlines()[-1])
    trusted = bed.directory / "aos_prov"
    # aos-prov trusts only the root certificate in its own package: it gets a copy of itself with ours.
    run(["cp", "-r", package, trusted])
    (trusted / "files" / "1rootCA.crt").write_bytes(root.read_bytes())
    args = ["provision", "-u", f"{GUEST_IP}:8089", "--nodes", "1", "-w", "30", "--skip-check-version"]
    command = f"import sys; sys.path.insert(0, {str(bed.directory)!r}); from aos_prov.main import main; main()"
    user = bed.cloud / "users" / "oem.p12"
    bed.inside(tools / "python", "-c", command, *args, "-p", user, timeout_s=180)
    wait(lambda: bool(bed.call("unit", unit=SYSTEM_ID)["online"]), 90, "the Unit is online")


def page(bed: Bed) -> str:
    """What the service answers, asked from the node by the service's name."""
    answer = bed.node("busybox", "nslookup", "web", DNS_IP)
    addresses = [line.split()[-1] for line in answer.splitlines() if line.startswith("Address")]
    address = next(found for found in addresses if not found.startswith(DNS_IP))
    return bed.node("busybox", "wget", "-q", "-O", "-", f"http://{address}:8080/")


def test_provision_deploy_adopt_reboot(bed: Bed) -> None:
    provision(bed)
    user = bed.cloud / "users" / "sp.p12"
    item = make_item(bed.directory / "item", user=user, domain=DOMAIN)
    bed.devcloud("upload", str(item), "--user", str(user))
    bed.call("assign", item="web", target=SYSTEM_ID)
    wait(lambda: bed.instance_states() == ["active"], 90, "the service is active")
    wait(lambda: page(bed) == "hello from the service\n", 20, "the service answers")

    # The journal has the service's output, and the cloud can get it.
    answers = bed.call("logs", unit=SYSTEM_ID, log_type="instanceLog", item="web")
    assert any("web service starts" in answer["text"] for answer in answers.values()), answers
    wait(lambda: bool(bed.call("monitoring", unit=SYSTEM_ID, limit=1)), 30, "a monitoring sample has come")
    assert bed.call("violations", unit=SYSTEM_ID) == []

    # Daemons that die come back by their units, and adopt what runs.
    containers = bed.container_pids()
    assert len(containers) == 1
    for unit in ("aos-sm", "aos-cm", "aos-iam"):
        before = bed.node("systemctl", "show", "-P", "MainPID", unit).strip()
        bed.node("systemctl", "kill", "--signal=KILL", unit)
        wait(
            lambda unit=unit, before=before: (
                bed.node("systemctl", "is-active", unit).strip() == "active"  # type: ignore[misc]
                and bed.node("systemctl", "show", "-P", "MainPID", unit).strip() != before
            ),
            60,
            f"{unit} is back",
        )
    wait(lambda: bool(bed.call("unit", unit=SYSTEM_ID)["online"]), 60, "the Unit is online again")
    assert bed.container_pids() == containers, "running services are adopted, not restarted"

    # After a reboot the service runs again.
    begun = ("awk", "{print $22}", "/proc/1/stat")
    boot = bed.node(*begun)
    bed.node("systemctl", "reboot", "--no-block")
    wait(lambda: bed.node(*begun) != boot, 60, "another systemd runs in the node")
    bed.wait_booted()
    wait(lambda: len(bed.container_pids()) == 1, 60, "the service has been started again")
    wait(lambda: page(bed) == "hello from the service\n", 30, "the service answers again")
    wait(lambda: bool(bed.call("unit", unit=SYSTEM_ID)["online"]), 60, "the Unit is online after the reboot")
    wait(lambda: bed.instance_states() == ["active"], 30, "the cloud knows that the service runs")
    assert bed.call("violations", unit=SYSTEM_ID) == []
