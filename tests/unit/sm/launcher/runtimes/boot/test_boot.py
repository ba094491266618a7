"""The boot runtime on firmware and partitions in files: updates, failures, what is found at a start."""

import asyncio
import itertools
import json
from pathlib import Path

import pytest

from aoscore.common.errors import ChecksumError, FailedError, InvalidArgumentError, NoSpaceError, NotFoundError
from aoscore.sm.launcher.runtimes.boot import partitions
from aoscore.sm.launcher.runtimes.boot.config import BootConfig, partition_devices
from aoscore.sm.launcher.runtimes.boot.efi import Partition
from aoscore.sm.launcher.runtimes.boot.partitions import copy_partition, identify
from aoscore.sm.launcher.runtimes.boot.runtime import BootRuntime
from aoscore.sm.launcher.runtimes.boot.state import MAX_REBOOTS, Action, Phase, decide
from tests.support.boot import BootNode, content
from tests.support.components import NODE, SETTLED, TO_REBOOT, FakeSystem, image, life, told
from tests.support.running import running, until


@pytest.fixture
def node(tmp_path: Path) -> BootNode:
    return BootNode(tmp_path)


async def test_update_is_tried_then_confirmed(node: BootNode) -> None:
    lives = await node.go_through(*node.update())
    assert lives == [
        [("1.0.0", "active", ""), ("2.0.0", "activating", "")],
        [("1.0.0", "active", ""), ("1.0.0", "inactive", ""), ("2.0.0", "active", "")],
    ]
    assert (node.running, node.installed(), node.boots) == ("2.0.0", "2.0.0", 2)
    assert node.read("BootOrder")[0] == node.read("BootCurrent")[0] == node.entries[1]
    assert node.are_equal()
    assert node.files() == {"installed.json"}
    # The next one goes to the other partition.
    await node.go_through(*node.update("3.0.0"))
    assert (node.running, node.installed()) == ("3.0.0", "3.0.0")
    assert node.read("BootOrder")[0] == node.entries[0]


async def test_records_are_those_of_aoscore_9_1(node: BootNode) -> None:
    runtime = node.runtime()
    async with running(runtime):
        await runtime.adopt([])
        await runtime.start_instance(*node.update())
    installed = json.loads((node.work / "installed.json").read_text())
    pending = json.loads((node.work / "pending.json").read_text())
    wanted = {"itemId", "subjectId", "instance", "manifestDigest", "type", "version", "preinstalled"}
    assert wanted | {"state", "partitionIndex"} <= installed.keys()
    assert (installed["preinstalled"], installed["version"], installed["partitionIndex"]) == (True, "1.0.0", 0)
    assert (pending["state"], pending["version"], pending["partitionIndex"]) == ("activating", "2.0.0", 1)


async def test_nothing_is_confirmed_before_the_health_check(node: BootNode) -> None:
    info, payload = node.update()
    assert await life(node.runtime(), info, payload) == TO_REBOOT
    order = node.read("BootOrder")
    assert order[0] == node.entries[0]
    node.boot()
    assert node.running == "2.0.0"
    node.system.units = {"a.service": "failed"}
    assert await life(node.runtime(), info, payload) == TO_REBOOT
    assert node.read("BootOrder") == order
    node.boot()
    lives = await node.go_through(info, payload)
    assert lives == [[("2.0.0", "failed", "unit a.service has failed"), ("1.0.0", "active", "")]]
    assert (node.running, node.installed(), node.are_equal()) == ("1.0.0", "1.0.0", True)
    assert node.files() == {"installed.json", "rejected_instance.json"}


async def test_system_that_does_not_start_is_tried_once(node: BootNode) -> None:
    node.broken.add("2.0.0")
    lives = await node.go_through(*node.update())
    assert lives[-1] == [
        ("2.0.0", "failed", "the node came up from the old boot partition"),
        ("1.0.0", "active", ""),
    ]
    assert (node.boots, node.installed(), node.are_equal()) == (2, "1.0.0", True)


async def test_sm_that_starts_again_before_the_reboot_asks_again(node: BootNode) -> None:
    info, payload = node.update()
    assert await life(node.runtime(), info, payload) == TO_REBOOT
    for _ in range(5):
        runtime = node.runtime()
        async with running(runtime):
            [one] = await runtime.adopt([info])
            assert one.status.state == "activating" and runtime.reboot_due.is_set()
    node.boot()
    assert node.running == "2.0.0"


async def test_firmware_that_does_not_go_back_is_not_asked_for_ever(node: BootNode) -> None:
    info, payload = node.update()
    assert await life(node.runtime(), info, payload) == TO_REBOOT
    node.boot()
    node.system.units = {"a.service": "failed"}
    asked = 0
    while await life(node.runtime(), info, payload) == TO_REBOOT:
        asked += 1
        # It ignores BootNext, and takes the new one.
        node.boots += 1
        assert asked < 10
    assert asked == MAX_REBOOTS
    assert node.installed() == "1.0.0"


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (content("1.9.0"), InvalidArgumentError, "the image of version 2.0.0 holds 1.9.0"),
        (content("2.0.0") + b"more", NoSpaceError, "is larger than partition"),
        (b"", InvalidArgumentError, "holds 1.0.0"),
    ],
)
async def test_wrong_image_is_refused_before_the_reboot(
    node: BootNode, data: bytes, error: type[Exception], text: str
) -> None:
    runtime = node.runtime()
    with runtime.changed.subscribe() as statuses:
        async with running(runtime):
            await runtime.adopt([])
            with pytest.raises(error, match=text):
                await runtime.start_instance(*node.update(data=data))
            assert told(statuses)[-1][:2] == ("2.0.0", "failed")
            assert not runtime.reboot_due.is_set()
    assert (node.are_equal(), node.read("BootNext")) == (True, [])
    assert node.files() == {"installed.json"}


async def test_wrong_payload_is_refused(node: BootNode, monkeypatch: pytest.MonkeyPatch) -> None:
    info, payload = node.update()
    blob = payload.payloads[0].path
    packed = blob.read_bytes()
    runtime = node.runtime()
    async with running(runtime):
        await runtime.adopt([])
        for damaged, text in ((b"PK" + packed, "no gzip"), (packed[:-1], "damaged in the store")):
            blob.write_bytes(damaged)
            with pytest.raises((InvalidArgumentError, ChecksumError), match=text):
                await runtime.start_instance(info, payload)
        cut = image(blob, info, packed[: len(packed) // 2], payload.payloads[0].media_type)
        with pytest.raises(InvalidArgumentError, match="can't be unpacked"):
            await runtime.start_instance(info, cut)
        other = image(blob, info, packed, "application/vnd.aos.image.component.inc.v1+squashfs")
        with pytest.raises(InvalidArgumentError, match="no full component image"):
            await runtime.start_instance(info, other)
        # A partition that does not keep what is written.
        good = image(blob, info, packed, payload.payloads[0].media_type)
        monkeypatch.setattr(partitions, "_write_all", lambda fd, data, at: None)
        with pytest.raises(ChecksumError, match="does not hold what was written"):
            await runtime.start_instance(info, good)
        monkeypatch.undo()
        await runtime.start_instance(info, good)


async def test_update_that_is_not_wanted_any_more(node: BootNode) -> None:
    info, payload = node.update()
    runtime = node.runtime()
    async with running(runtime):
        await runtime.adopt([])
        await runtime.start_instance(info, payload)
        await runtime.stop_instance(info.ident)
        assert not runtime.reboot_due.is_set()
    assert (node.are_equal(), node.read("BootNext"), node.files()) == (True, [], {"installed.json"})
    assert await life(node.runtime(), info, payload) == TO_REBOOT
    node.boot()
    runtime = node.runtime()
    node.system.units = {"a.service": "activating"}
    gate = asyncio.Event()
    runtime._sleep = lambda seconds: gate.wait()
    async with running(runtime):
        await runtime.adopt([info])
        await until(lambda: node.system.asked)
        await runtime.stop_instance(info.ident)
        assert runtime.reboot_due.is_set()
        # The next one waits for the boot that ends the trial: that is no failure.
        with runtime.changed.subscribe() as statuses:
            await runtime.start_instance(*node.update("3.0.0"))
            assert told(statuses) == [("3.0.0", "activating", "")]
        assert runtime.reboot_due.is_set()
    node.boot()
    runtime = node.runtime()
    with runtime.changed.subscribe() as statuses:
        async with running(runtime):
            await runtime.adopt([])
            assert told(statuses) == [("1.0.0", "active", "")]
    assert (node.running, node.are_equal(), node.files()) == ("1.0.0", True, {"installed.json"})


async def test_record_that_aoscore_9_1_left(node: BootNode) -> None:
    info, payload = node.update()
    assert await life(node.runtime(), info, payload) == TO_REBOOT
    record = json.loads((node.work / "pending.json").read_text())
    for own in ("phase", "bootId", "reboots", "error"):
        del record[own]
    (node.work / "pending.json").write_text(json.dumps(record))
    node.boot()
    assert await life(node.runtime(), info, payload) == SETTLED
    assert (node.installed(), node.running) == ("2.0.0", "2.0.0")


async def test_missing_load_options_are_made(node: BootNode) -> None:
    for number in node.entries:
        (node.efivars / f"Boot{number:04X}-8be4df61-93ca-11d2-aa0d-00e098032b8c").unlink()
    runtime = node.runtime()
    async with running(runtime):
        await runtime.adopt([])
        assert runtime.running()[0].status.version == "1.0.0"
    known = {option.partition for option in node.variables().entries().values()}
    assert {node.identify(device).uuid for device in node.partitions} <= known


async def test_node_without_partitions_or_efi_says_so_when_asked(node: BootNode, tmp_path: Path) -> None:
    config = BootConfig(working_dir=tmp_path / "w")
    runtime = BootRuntime(config, "boot", NODE, FakeSystem())
    async with running(runtime):
        assert await runtime.adopt([]) == []
        with pytest.raises(FailedError, match="'partitions' of the boot runtime names no partitions"):
            await runtime.start_instance(*node.update())


def test_devices_are_detected_beside_the_root(tmp_path: Path) -> None:
    config = BootConfig(detect_mode="auto", partitions=("1", "2"))
    assert partition_devices(config, "quiet root=/dev/vda3 rw") == (Path("/dev/vda1"), Path("/dev/vda2"))
    assert partition_devices(config, "root=/dev/nvme0n1p3") == (Path("/dev/nvme0n1p1"), Path("/dev/nvme0n1p2"))
    (tmp_path / "by-partuuid").mkdir()
    (tmp_path / "by-partuuid/x").symlink_to("/dev/sda12")
    assert partition_devices(config, "root=PARTUUID=x", tmp_path) == (Path("/dev/sda1"), Path("/dev/sda2"))
    plain = BootConfig(partitions=("/dev/a", "/dev/b"))
    assert partition_devices(plain, "") == (Path("/dev/a"), Path("/dev/b"))
    for line in ("quiet", "notroot=/dev/vda1", "root=/dev/ram", "root=LABEL=none"):
        with pytest.raises(InvalidArgumentError, match=r"can't be detected"):
            partition_devices(config, line, tmp_path)


def test_partition_is_identified_by_udev_and_sysfs(tmp_path: Path) -> None:
    device = tmp_path / "sda2"
    device.touch()
    disks, blocks = tmp_path / "disks", tmp_path / "block"
    (disks / "by-partuuid").mkdir(parents=True)
    (blocks / "sda/queue").mkdir(parents=True)
    (blocks / "sda/sda2").mkdir()
    (blocks / "sda2").symlink_to("sda/sda2")
    (blocks / "sda/queue/logical_block_size").write_text("4096\n")
    for name, value in {"partition": 2, "start": 4096, "size": 8192}.items():
        (blocks / "sda/sda2" / name).write_text(f"{value}\n")
    with pytest.raises(NotFoundError, match="no partition UUID"):
        identify(device, disks, blocks)
    link = disks / "by-partuuid/01020304-0506-0708-090a-0b0c0d0e0f10"
    link.symlink_to(device)
    found = identify(device, disks, blocks)
    assert found == Partition(found.uuid, 2, 512, 1024) and str(found.uuid) == link.name
    link.rename(disks / "by-partuuid/1234abcd-02")
    with pytest.raises(NotFoundError, match="no GPT"):
        identify(device, disks, blocks)


def test_copy_writes_only_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(content("1.0.0"))
    target.write_bytes(content("1.0.0")[:-1] + b"?")
    written: list[int] = []
    write = partitions._write_all
    monkeypatch.setattr(partitions, "_write_all", lambda fd, data, at: (written.append(at), write(fd, data, at)))
    copy_partition(source, target)
    assert (written, target.read_bytes()) == ([2 * 1024 * 1024], content("1.0.0"))


def test_rules_of_the_table() -> None:
    for phase, runs_new, is_installed, same_boot, reboots in itertools.product(
        Phase, (False, True), (False, True), (False, True), (0, MAX_REBOOTS - 1, MAX_REBOOTS, 50)
    ):
        action = decide(
            phase, runs_new=runs_new, is_installed=is_installed, same_boot=same_boot, reboots=reboots, error="why"
        ).action
        if action is Action.FINISH:
            assert phase is Phase.CONFIRMED and (runs_new or is_installed)
        if action is Action.CHECK:
            assert runs_new and phase in (Phase.WRITTEN, Phase.TRIAL)
        if action in (Action.DROP, Action.FAILED):
            # The good one is copied over the other: never over the one that runs.
            assert not runs_new
        if reboots >= MAX_REBOOTS and action in (Action.BACK, Action.SWITCH):
            assert phase is Phase.WRITING
        if phase is Phase.FAILED:
            assert action is not Action.CHECK
