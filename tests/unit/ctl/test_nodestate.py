"""What follows a change of the provisioning state."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from aoscore.common.errors import ConfigError, DeadlineError, NotFoundError
from aoscore.ctl import nodestate
from aoscore.ctl.target import Node, tree


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nodestate.Place:
    monkeypatch.setattr(nodestate, "ANSWER_PAUSE_S", 0.0)
    monkeypatch.setattr(nodestate, "STATE_TIMEOUT_S", 0.0)
    for name in ("iam/keys", "tokens/one"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "key").write_text("secret")
    return nodestate.Place(tmp_path / ".provisionstate", tmp_path / "iam", (tmp_path / "tokens",), True)


class Runs:
    def __init__(self, active: str = "") -> None:
        self.active = active
        self.commands: list[str] = []

    def __call__(
        self, args: Sequence[str], *, stdin: bytes | None = None, env: Mapping[str, str] | None = None
    ) -> bytes:
        self.commands.append(" ".join(args))
        if args[:2] == ["systemctl", "show"]:
            return b"aos-sm.service aos-iam.service\n"
        return b"active" if args[-1] == self.active else b""


@pytest.mark.parametrize("node", [Node(), Node(kind="secondary", keys="optee"), Node(keys="file", data_disk=False)])
def test_place_comes_from_the_generated_file(node: Node, tmp_path: Path) -> None:
    file = tmp_path / "iam.cfg"
    file.write_text(next(entry.content for entry in tree(node) if entry.path.endswith("/iam.cfg")))
    place = nodestate.read_place(file)
    assert place.state_file == Path("/var/aos/.provisionstate")
    assert place.iam_dir == Path("/var/aos/iam")
    keys = {"softhsm": "/var/lib/softhsm/tokens", "optee": "/var/lib/tee", "file": "/var/aos/iam/keys"}
    assert place.key_dirs == (Path(keys[node.keys]),)
    assert place.encrypted_disk == node.data_disk
    assert place.is_main == node.is_main


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"gone\.cfg"):
        nodestate.read_place(tmp_path / "gone.cfg")
    for text in ("{", "[]", json.dumps({"nodeInfo": {}})):
        (tmp_path / "iam.cfg").write_text(text)
        with pytest.raises(ConfigError, match=r"iam\.cfg"):
            nodestate.read_place(tmp_path / "iam.cfg")


def test_finish_waits_for_the_state(place: nodestate.Place) -> None:
    runs = Runs()
    with pytest.raises(DeadlineError, match="provisionstate"):
        nodestate.finish(place, runs)
    assert runs.commands == []
    place.state_file.touch()
    nodestate.finish(place, runs)
    assert runs.commands == ["sync", "systemctl restart aos.target"]


def test_finish_on_the_main_node_makes_the_shares_known(place: nodestate.Place) -> None:
    place.state_file.touch()
    runs = Runs("nfs-server.service")
    nodestate.finish(dataclasses.replace(place, is_main=True), runs)
    assert "systemctl restart nfs-server.service" in runs.commands
    assert "systemctl restart rpc-rquotad.service" not in runs.commands, "it does not run"
    assert runs.commands[-1] == "systemctl restart aos.target"


def test_deprovision_wipes_and_starts_anew(place: nodestate.Place) -> None:
    runs = Runs()
    place.marker.touch()
    nodestate.deprovision(place, runs)
    assert runs.commands == [
        "systemctl show --property=ConsistsOf --value aos.target",
        # By name: only then their ends are waited for.
        "systemctl stop aos.target aos-iam.service aos-sm.service",
        "/opt/aos/setupdisk.sh delete",
        "sync",
        "systemctl start aos.target",
    ]
    assert list(place.iam_dir.iterdir()) == [] and list(place.key_dirs[0].iterdir()) == []
    assert not place.marker.exists()


def test_deprovision_that_iam_does_not_follow_wipes_nothing(place: nodestate.Place) -> None:
    runs = Runs()
    place.state_file.touch()
    place.marker.touch()
    with pytest.raises(DeadlineError):
        nodestate.deprovision(place, runs)
    assert runs.commands == [] and not place.marker.exists()
    place.state_file.unlink()
    nodestate.wipe(place, runs)
    assert (place.iam_dir / "keys" / "key").exists()


def test_a_lost_state_file_is_no_order_to_wipe(place: nodestate.Place) -> None:
    runs = Runs()
    nodestate.wipe(place, runs)
    assert runs.commands == [] and (place.iam_dir / "keys" / "key").exists()


def test_a_wipe_that_was_broken_off_goes_on(place: nodestate.Place) -> None:
    class Fails(Runs):
        def __call__(self, args: Sequence[str], **_: object) -> bytes:
            raise RuntimeError(args[0])

    place.marker.touch()
    with pytest.raises(RuntimeError):
        nodestate.wipe(place, Fails())
    assert place.marker.exists() and (place.iam_dir / "keys" / "key").exists(), "the disk's key goes after the disk"
    nodestate.wipe(place, Runs())
    assert not place.marker.exists() and not list(place.iam_dir.iterdir())
