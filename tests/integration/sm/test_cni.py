"""Instances connected by the plugins of Debian's package: who reaches whom, speed limits, faults, kill -9."""

import asyncio
import os
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from aoscore.common.config import to_json
from aoscore.common.errors import AosError
from aoscore.sm.networkmanager.cni import DEFAULT, STATE_DIR, CniSettings
from aoscore.sm.networkmanager.model import NetworkConfig, netns_path
from tests.support.networks import FakeCm, ident, manager, name
from tests.support.traffic import SINK, SOURCE, answering, inside, link_names, measured, serving

pytestmark = [
    pytest.mark.net,
    pytest.mark.skipif(
        not Path("/usr/lib/cni/bandwidth").exists(), reason="containernetworking-plugins is not installed"
    ),
]

SETTINGS = CniSettings()
# A plugin that kills whoever calls it, once: the file says so.
KILLER = f"""#!{sys.executable}
import json, os, pathlib, signal, sys
asked = json.load(sys.stdin)
if os.environ["CNI_COMMAND"] == "ADD":
    once = pathlib.Path(asked["once"])
    if once.exists():
        once.unlink()
        os.kill(os.getppid(), signal.SIGKILL)
    print(json.dumps(asked["prevResult"]))
"""


def firewall_rules() -> list[str]:
    """What the firewall plugin has added for instances."""
    done = subprocess.run(["iptables", "-S", "CNI-FORWARD"], capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if "172.31." in line]


def leftovers() -> list[str]:
    """Notes that are still there."""
    notes = [path for path in STATE_DIR.rglob("*") if path.is_file()] if STATE_DIR.exists() else []
    return [path.name for path in notes if path.name not in ("lock", "last_reserved_ip.0")]


async def test_life_of_an_instance(tmp_path: Path) -> None:
    cm = FakeCm()
    config = NetworkConfig(ident(0), exposed_ports=("9000",), download_speed_kbit=4000, upload_speed_kbit=8000)
    async with manager(tmp_path, cm, SETTINGS) as networks:
        await networks.attach(name(0), "owner", config)
        await networks.attach(name(1), "owner", NetworkConfig(ident(1)))
        await networks.attach(name(2), "other", NetworkConfig(ident(2)))
        assert "172.31.1.2/24" in inside(0, "ip", "-4", "addr", "show", "eth0").stdout
        assert len(firewall_rules()) == 6
        with serving(0, 9000, 9001), serving(1, 9000):
            asked = ("tcp:172.31.1.2:9000", "udp:172.31.1.2:9001", "tcp:172.31.1.3:9000")
            assert answering(1, *asked) == set(asked), "instances of one owner talk freely"
            assert answering(2, *asked) == {"tcp:172.31.1.2:9000"}, "others only where something is exposed"
            assert answering(0, "tcp:172.31.1.2:9000"), "also itself: hairpin"
        for source, sink, kbit in ((1, 0, 4000), (0, 1, 8000)):
            total, duration_s = measured(sink, SINK, source, SOURCE, "1000000")
            rate = (total - 4 * 12800) * 8 / 1000 / duration_s
            print(f"{rate:.0f} of {kbit} kbit/s, {total} bytes in {duration_s:.2f} s")
            assert kbit / 4 < rate < kbit * 1.05
        # Without limits now, in the same namespace.
        namespace = netns_path(name(0)).stat().st_ino
        await networks.attach(name(0), "owner", NetworkConfig(ident(0)))
        assert netns_path(name(0)).stat().st_ino == namespace
        assert not any(link.startswith("bwp") for link in link_names())
        for number in (0, 1, 2):
            await networks.detach(name(number))
        assert (link_names(), firewall_rules(), leftovers()) == (set(), [], [])


async def test_adoption_and_faults(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A new SM has the plugins check what it finds; what they find fault with is made again around the namespace."""
    async with manager(tmp_path, FakeCm(), SETTINGS) as networks:
        for number in (0, 1, 2):
            await networks.attach(name(number), "owner", NetworkConfig(ident(number), upload_speed_kbit=8000))
    before, namespace = link_names(), netns_path(name(1)).stat().st_ino
    subprocess.run(["ip", "-n", name(1), "addr", "flush", "dev", "eth0"], check=True)
    subprocess.run(["iptables", "-F", "CNI-FORWARD"], check=True)
    (STATE_DIR / "results" / f"{name(2)}.json").write_text("damaged")
    caplog.set_level("INFO")
    async with manager(tmp_path, FakeCm(), SETTINGS) as networks:
        faults = [record.message for record in caplog.records if "find fault" in record.message]
        assert len(faults) == 2 and "CNI plugin bridge failed in CHECK" in "".join(faults), faults
        assert "CNI plugin firewall failed in CHECK" in "".join(faults), faults
        assert netns_path(name(1)).stat().st_ino == namespace
        assert not netns_path(name(2)).exists(), "nobody knows how to undo it: only the namespace is left, and goes"
        with serving(0, 9000):
            assert answering(1, "tcp:172.31.1.2:9000")
        await networks.attach(name(2), "owner", NetworkConfig(ident(2), upload_speed_kbit=8000))
        assert len(link_names()) == len(before)
    caplog.clear()
    async with manager(tmp_path, FakeCm(), SETTINGS) as networks:
        assert not [record for record in caplog.records if "find fault" in record.message]
        for number in (0, 1, 2):
            await networks.detach(name(number))
        assert (link_names(), firewall_rules(), leftovers()) == (set(), [], [])


@pytest.mark.parametrize("position", [1, 2, 3])
async def test_killed_between_plugins(tmp_path: Path, position: int) -> None:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "killer").write_text(KILLER)
    (plugins / "killer").chmod(0o755)
    (tmp_path / "once").touch()
    chain = list(DEFAULT.plugins)
    chain.insert(position, {"type": "killer", "once": str(tmp_path / "once")})
    settings = CniSettings(msgspec.structs.replace(DEFAULT, plugins=tuple(chain)), (plugins, *SETTINGS.bin_dirs))
    killed = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.networks", tmp_path, "0"),
        env=os.environ | {"AOSCORE_TEST_CNI": to_json(settings).decode()},
    )
    assert await killed.wait() == -9
    assert link_names() and leftovers()
    cm = FakeCm()
    cm.networks["owner"], cm.allocated = 1, {ident(0): "172.31.1.2"}
    async with manager(tmp_path, cm, settings) as networks:
        assert (link_names(), firewall_rules(), leftovers()) == (set(), [], [])
        await networks.attach(name(0), "owner", NetworkConfig(ident(0), hostname="svc"))
        assert inside(0, "ping", "-c1", "-W5", "172.31.1.1").returncode == 0
        await networks.release_instance(ident(0))
        assert (link_names(), firewall_rules(), leftovers()) == (set(), [], [])


async def test_failures_are_named_and_undone(tmp_path: Path) -> None:
    missing = msgspec.structs.replace(DEFAULT, plugins=(*DEFAULT.plugins, {"type": "nowhere"}))
    async with manager(tmp_path, FakeCm(), CniSettings(missing)) as networks:
        with pytest.raises(AosError, match="CNI plugin nowhere is in none of /opt/cni/bin, "):
            await networks.attach(name(0), "owner", NetworkConfig(ident(0)))
        assert (link_names() - {"br-f5674cd4"}, firewall_rules()) == (set(), [])
    (tmp_path / "b").mkdir()
    ranges = {"type": "host-local", "ranges": [[{"subnet": "10.9.0.0/24"}]]}
    other = msgspec.structs.replace(DEFAULT, plugins=({"type": "bridge", "ipam": ranges},))
    async with manager(tmp_path / "b", FakeCm(), CniSettings(other, state_dir=tmp_path / "b" / "cni")) as networks:
        with pytest.raises(AosError, match=r"gave instance .* \['10.9.0.2'\], CM allocated 172.31.1.2"):
            await networks.attach(name(0), "owner", NetworkConfig(ident(0)))
    with_reason = msgspec.structs.replace(DEFAULT, plugins=({"type": "bridge", "ipam": {"type": "static"}},))
    async with manager(
        tmp_path / "b", FakeCm(), CniSettings(with_reason, state_dir=tmp_path / "b" / "cni")
    ) as networks:
        with pytest.raises(AosError, match="CNI plugin bridge failed in ADD: IPAM plugin returned missing IP config"):
            await networks.attach(name(0), "owner", NetworkConfig(ident(0)))
    assert stat.S_IMODE((STATE_DIR / "results").stat().st_mode) == 0o700
