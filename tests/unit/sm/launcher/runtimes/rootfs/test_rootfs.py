"""The rootfs runtime against a plain model of the initramfs: updates, failures, SM and node dying at every step."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from aoscore.common.errors import ChecksumError, FailedError, InvalidArgumentError, WrongStateError
from aoscore.sm.launcher.runtimes.rootfs.state import MAX_REBOOTS
from tests.support.components import (
    TO_REBOOT,
    FakeSystem,
    image,
    life,
    told,
)
from tests.support.rootfs import INCREMENTAL, Node
from tests.support.running import running, until


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


async def test_update_is_tried_confirmed_applied(node: Node) -> None:
    info, payload = node.update()
    lives = await node.go_through(info, payload)
    assert lives == [
        [("1.0.0", "active", ""), ("2.0.0", "activating", "")],
        [("1.0.0", "active", "")],
        [("1.0.0", "inactive", ""), ("2.0.0", "active", "")],
    ]
    assert (node.root, node.installed(), node.boots) == ("2.0.0", "2.0.0", 3)
    assert node.files() == {"installed_instance.json"}
    assert node.system.asked == 1
    # The next version of the same item.
    lives = await node.go_through(*node.update("3.0.0"))
    assert (node.root, node.installed()) == ("3.0.0", "3.0.0")


async def test_records_are_those_of_aoscore_9_1(node: Node) -> None:
    async with running(runtime := node.runtime()):
        await runtime.adopt([])
        assert json.loads((node.updates / "installed_instance.json").read_text()) == {
            "itemId": "rootfs",
            "subjectId": "main",
            "instance": 0,
            "manifestDigest": "",
            "type": "component",
            "version": "1.0.0",
            "preinstalled": True,
        }
        info, payload = node.update()
        await runtime.start_instance(info, payload)
        assert json.loads((node.updates / "pending_instance.json").read_text())["version"] == "2.0.0"
        assert (node.updates / "do_update").read_text() == "full"
        digest = payload.payloads[0].digest.removeprefix("sha256:")
        assert (node.updates / "image.sha256").read_text() == f"{digest}  image.squashfs\n"


async def test_incremental_image(node: Node) -> None:
    info, _ = node.update()
    payload = image(node.directory / "blob", info, b"hsqs2.0.0", INCREMENTAL)
    async with running(runtime := node.runtime()):
        await runtime.adopt([])
        await runtime.start_instance(info, payload)
    assert (node.updates / "do_update").read_text() == "incremental"


@pytest.mark.parametrize(("state", "text"), [("failed", "has failed"), ("activating", "is activating and not active")])
async def test_sick_system_is_reverted_and_not_tried_again(node: Node, state: str, text: str) -> None:
    node.system.units = {"a.service": state}
    info, payload = node.update()
    lives = await node.go_through(info, payload)
    reason = f"unit a.service {text}"
    assert ("2.0.0", "failed", reason) in lives[1]
    assert lives[2] == [("2.0.0", "failed", reason), ("1.0.0", "active", "")]
    assert (node.root, node.installed()) == ("1.0.0", "1.0.0")
    assert node.files() == {"installed_instance.json", "rejected_instance.json"}
    # As long as CM wants the same the answer is the same; after something else it is tried again.
    async with running(runtime := node.runtime()):
        await runtime.adopt([info])
        with pytest.raises(FailedError, match=reason):
            await runtime.start_instance(info, payload)
        await runtime.stop_instance(info.ident)
        await runtime.start_instance(info, payload)
        assert runtime.reboot_due.is_set()


async def test_image_of_another_version_is_never_installed(node: Node) -> None:
    lives = await node.go_through(*node.update(holds="1.9.9"))
    assert lives[-1][0] == ("2.0.0", "failed", "the image of version 2.0.0 holds 1.9.9")
    assert (node.root, node.installed()) == ("1.0.0", "1.0.0")


async def test_sm_that_starts_again_before_the_reboot_asks_again(node: Node) -> None:
    info, payload = node.update()
    assert await life(node.runtime(), info, payload) == TO_REBOOT
    for _ in range(2 * MAX_REBOOTS):
        runtime = node.runtime()
        async with running(runtime):
            [one] = await runtime.adopt([info])
            assert one.status.state == "activating"
            assert runtime.reboot_due.is_set()
    assert node.installed() == "1.0.0"


async def test_reboots_without_effect_are_limited(node: Node) -> None:
    node.ignores_updates = True
    lives = await node.go_through(*node.update())
    assert len(lives) == MAX_REBOOTS + 1
    assert lives[-1][0] == ("2.0.0", "failed", "not tried by the initramfs in 3 boots")
    assert node.files() == {"installed_instance.json", "rejected_instance.json"}


async def test_text_of_the_initramfs_is_reported(node: Node) -> None:
    info, payload = node.update()
    assert await life(node.runtime(), info, payload) == TO_REBOOT
    # It could not mount the image, and left do_update.
    (node.updates / "failed").write_text("can't mount the image image.squashfs")
    lives = await node.go_through(info, payload)
    assert lives[0][0] == ("2.0.0", "failed", "can't mount the image image.squashfs")
    assert node.installed() == "1.0.0"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda blob: blob.write_bytes(b"no image"), InvalidArgumentError),
        (lambda blob: blob.write_bytes(b"hsqs other"), ChecksumError),
        (lambda blob: blob.unlink(), FileNotFoundError),
    ],
)
async def test_bad_payload_leaves_nothing(node: Node, change: Callable[[Path], object], error: type[Exception]) -> None:
    info, payload = node.update()
    change(payload.payloads[0].path)
    runtime = node.runtime()
    async with running(runtime):
        await runtime.adopt([])
        with pytest.raises(error):
            await runtime.start_instance(info, payload)
        assert not runtime.reboot_due.is_set()
    assert node.files() == {"installed_instance.json"}


async def test_media_type_of_something_else_is_refused(node: Node) -> None:
    info, _ = node.update()
    payload = image(node.directory / "blob", info, b"hsqs", "application/vnd.oci.image.layer.v1.tar")
    async with running(runtime := node.runtime()):
        await runtime.adopt([])
        with pytest.raises(InvalidArgumentError, match="no full or incremental"):
            await runtime.start_instance(info, payload)


async def test_update_that_is_not_wanted_any_more(node: Node) -> None:
    info, payload = node.update()
    runtime = node.runtime()
    async with running(runtime):
        await runtime.adopt([])
        await runtime.start_instance(info, payload)
        await runtime.stop_instance(info.ident)
        assert not runtime.reboot_due.is_set()
        assert node.files() == {"installed_instance.json"}
        # Another one takes the place of one that is only prepared.
        await runtime.start_instance(info, payload)
        await runtime.start_instance(*node.update("3.0.0"))
    node.boot()
    # One that is on trial is reverted, without a report.
    sick = FakeSystem({"a.service": "activating"})
    gate = asyncio.Event()
    node.system = sick
    runtime = node.runtime()
    runtime._sleep = lambda seconds: gate.wait()
    other, _ = node.update("3.0.0")
    async with running(runtime):
        await runtime.adopt([other])
        await until(lambda: sick.asked == 1)
        with pytest.raises(WrongStateError, match="on trial"):
            await runtime.start_instance(info, payload)
        await runtime.stop_instance(other.ident)
        assert runtime.reboot_due.is_set()
        # The next one waits for the boot that ends the trial: that is no failure.
        with runtime.changed.subscribe() as statuses:
            await runtime.start_instance(info, payload)
            await runtime.start_instance(info, payload)
            assert told(statuses) == [("2.0.0", "activating", "")] * 2
        assert runtime.reboot_due.is_set() and "failed" in node.files()
    node.boot()
    runtime = node.runtime()
    with runtime.changed.subscribe() as statuses:
        async with running(runtime):
            await runtime.adopt([])
            assert told(statuses) == [("1.0.0", "active", "")]
    assert node.files() == {"installed_instance.json"}


async def test_trial_that_nobody_knows_of_is_refused(node: Node) -> None:
    node.updates.mkdir()
    (node.updates / "updated").write_text("1")
    (node.updates / "do_update").write_text("full")
    runtime = node.runtime()
    async with running(runtime):
        await runtime.adopt([])
        assert runtime.reboot_due.is_set()
    assert (node.updates / "failed").read_text() == "there is no record of this update"


@pytest.mark.parametrize("name", ["installed_instance.json", "pending_instance.json", "progress.json"])
async def test_damaged_record_does_not_keep_sm_from_starting(node: Node, name: str) -> None:
    info, payload = node.update()
    assert await life(node.runtime(), info, payload) == TO_REBOOT
    (node.updates / name).write_text("{")
    await node.go_through(info, payload)
    assert (node.root, node.installed()) == ("2.0.0", "2.0.0")


async def test_node_without_version_file_says_so_when_asked(node: Node) -> None:
    node.version_file.unlink()
    runtime = node.runtime()
    async with running(runtime):
        assert await runtime.adopt([]) == []
        assert runtime.running() == []
        with pytest.raises(FailedError, match=r"version file .*version does not exist"):
            await runtime.start_instance(*node.update())


async def test_node_that_was_flashed_again_tells_the_new_version(node: Node) -> None:
    async with running(runtime := node.runtime()):
        await runtime.adopt([])
    node.root = "1.1.0"
    node.boot()
    async with running(runtime := node.runtime()):
        await runtime.adopt([])
        assert runtime.running()[0].status.version == "1.1.0"
