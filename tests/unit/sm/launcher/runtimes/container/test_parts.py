"""Restart pauses, exit texts, histories, configuration, root file system: the parts without processes."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from aoscore.common.errors import ConfigError, InvalidArgumentError
from aoscore.common.oci import RunParameters
from aoscore.common.types import Duration, InstanceFilter, InstanceIdent, InstanceInfo
from aoscore.sm.launcher.runtimes.base import instance_id, runtime_id
from aoscore.sm.launcher.runtimes.container.bundle import (
    Bundle,
    BundleRecord,
    Overlay,
    prepare_state,
    prepare_storage,
)
from aoscore.sm.launcher.runtimes.container.config import OutputKind, load_container_config
from aoscore.sm.launcher.runtimes.container.crun import describe_exit
from aoscore.sm.launcher.runtimes.container.history import Run, RunHistory
from aoscore.sm.launcher.runtimes.container.restarts import RestartPolicy

IDENT = InstanceIdent("item", "subject", 0)
INFO = InstanceInfo(IDENT, "1.0.0", "sha256:00", "owner", "runtime")


def test_ids_are_those_of_aoscore_9_1() -> None:
    ident = InstanceIdent("11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222", 0)
    assert instance_id(ident) == "b2f1ae96-7078-327f-96c5-f93a950662af"
    assert runtime_id("crun", "node-main-0001") == "61c5ddb1-6ae5-3fb3-953e-b2abba49ace9"


def test_restart_pauses_grow_after_the_burst_up_to_the_limit() -> None:
    policy = RestartPolicy(RunParameters(start_burst=2, restart_interval=Duration(1)), limit_s=10)
    pauses_s = [policy.ended(0.1) for _ in range(8)]
    assert pauses_s[:2] == [1, 1]
    assert pauses_s[2] == pytest.approx(2, rel=0.11) and pauses_s[3] == pytest.approx(4, rel=0.11)
    assert all(pause_s <= 11 for pause_s in pauses_s) and pauses_s[-1] >= 9


@pytest.mark.parametrize("restarts", [0, 1, 2, 3, 4, 10, 100_000])
def test_policy_goes_on_where_another_process_has_been(restarts: int) -> None:
    parameters = RunParameters(start_burst=2, restart_interval=Duration(1))
    one = RestartPolicy(parameters, limit_s=10)
    for _ in range(min(restarts, 1000)):
        one.ended(0.1)
    other = RestartPolicy(parameters, limit_s=10, restarts=restarts)
    # Pauses are spread by a tenth.
    assert other.ended(0.1) == pytest.approx(one.ended(0.1), rel=0.25)
    assert other.restarts == restarts + 1


def test_stable_run_makes_up_for_earlier_ends() -> None:
    policy = RestartPolicy(RunParameters(start_interval=Duration(5)), limit_s=60)
    for _ in range(10):
        policy.ended(1)
    assert policy.ended(5.1) == 1
    assert policy.restarts == 1


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "exited with 0"),
        (7, "exited with 7"),
        (137, "killed by SIGKILL (137)"),
        (143, "killed by SIGTERM (143)"),
        (255, "exited with 255"),
    ],
)
def test_exit_in_words(code: int, text: str) -> None:
    assert describe_exit(code, out_of_memory=False) == text


def test_exit_for_want_of_memory_and_unknown() -> None:
    assert describe_exit(137, out_of_memory=True) == "killed by SIGKILL (137), out of memory"
    assert "not known" in describe_exit(None, out_of_memory=False)


def test_history_finds_stopped_instances_and_keeps_the_last_runs(tmp_path: Path) -> None:
    history = RunHistory(tmp_path)
    for number in range(2):
        history.note_start(f"id{number}", InstanceIdent("item", "subject", number), "1.0.0")
    when = datetime(2026, 1, 1, tzinfo=UTC)
    for code in range(30):
        history.note_end("id1", Run(when, when, code, f"exited with {code}", crashed=True))
    assert list(history.find(InstanceFilter(item_id="item", instance=1))) == ["id1"]
    assert sorted(history.find(InstanceFilter())) == ["id0", "id1"]
    known = history.get("id1")
    assert known is not None and [run.exit_code for run in known.runs] == list(range(10, 30))


def test_history_is_written_only_when_something_is_new(tmp_path: Path) -> None:
    history = RunHistory(tmp_path)
    history.note_start("id", IDENT, "1.0.0")
    inode = (tmp_path / "id" / "history.json").stat().st_ino
    history.note_start("id", IDENT, "1.0.0")
    assert (tmp_path / "id" / "history.json").stat().st_ino == inode
    history.note_start("id", IDENT, "2.0.0")
    known = history.get("id")
    assert known is not None and known.version == "2.0.0"


def test_damaged_history_counts_as_unknown(tmp_path: Path) -> None:
    (tmp_path / "id").mkdir()
    (tmp_path / "id" / "history.json").write_text("{")
    assert RunHistory(tmp_path).get("id") is None
    assert RunHistory(tmp_path).find(InstanceFilter()) == {}


def test_configuration_of_aoscore_9_1_is_accepted(tmp_path: Path) -> None:
    raw = {
        "RuntimeDir": "/run/x",
        "hostBinds": ["usr"],
        "hostWhiteoutsDir": "/var/w",
        "storageDir": "/var/aos/storages",
    }
    config = load_container_config(raw, path=Path("sm.cfg"), where="runtimes[0].config", working_dir=tmp_path)
    assert (config.runtime_dir, config.host_binds) == (Path("/run/x"), ("usr",))
    assert (config.storage_dir, config.state_dir) == (Path("/var/aos/storages"), tmp_path / "states")
    assert config.output is OutputKind.AUTO and config.stop_timeout_s == 10


def test_unknown_key_names_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sm.cfg: unknown key 'runtimes\[0\].config.hostBind'"):
        load_container_config({"hostBind": []}, path=Path("sm.cfg"), where="runtimes[0].config", working_dir=tmp_path)


def test_record_survives_a_round_trip(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path / "id")
    bundle.create()
    assert bundle.read_record() is None
    record = BundleRecord(
        INFO,
        started=1.5,
        registered=True,
        overlays=(Overlay("", (Path("/a"), Path("/b"))),),
        run_parameters=RunParameters(start_burst=7, restart_interval=Duration(2.5)),
    )
    bundle.write_record(record)
    assert bundle.read_record() == record


def test_named_host_directories_lie_under_the_image(tmp_path: Path) -> None:
    host, layer = tmp_path / "host", tmp_path / "layer"
    for folder in (host / "usr", host / "home", layer / "usr", layer / "app"):
        folder.mkdir(parents=True)
    (host / "bin").symlink_to("usr/bin")
    bundle = Bundle(tmp_path / "bundle")
    bundle.create()
    overlays = bundle.plan_overlays([layer], ["bin", "usr", "absent"], host_root=host)
    assert overlays == (
        Overlay("", (bundle.mounts, layer)),
        Overlay("usr", (bundle.mounts / "usr", layer / "usr", host / "usr")),
    )
    assert (bundle.mounts / "bin").readlink() == Path("usr/bin")


def test_mount_points_do_not_hide_what_is_below(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    (layer / "opt").mkdir(parents=True)
    source = tmp_path / "file"
    source.touch()
    bundle = Bundle(tmp_path / "bundle")
    bundle.create()
    bundle.make_mount_points(
        [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/opt", "type": "bind", "source": str(tmp_path)},
            {"destination": "/etc/thing", "type": "bind", "source": str(source)},
        ],
        [layer],
        [],
    )
    assert (bundle.mounts / "proc").is_dir() and (bundle.mounts / "etc/thing").is_file()
    assert not (bundle.mounts / "opt").exists()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        bundle.make_mount_points([{"destination": "/x", "type": "bind", "source": "/nowhere"}], [layer], [])


def test_state_and_storage_are_made_once_and_stay_inside(tmp_path: Path) -> None:
    state = prepare_state(tmp_path, "1/state", 0, 0)
    assert state is not None and state.read_bytes() == b"" and state.stat().st_mode & 0o777 == 0o600
    state.write_text("kept")
    assert prepare_state(tmp_path, "1/state", 0, 0) == state and state.read_text() == "kept"
    storage = prepare_storage(tmp_path, "2", 0, 0)
    assert storage is not None and storage.is_dir()
    assert prepare_state(tmp_path, "", 0, 0) is None and prepare_storage(tmp_path, "", 0, 0) is None
    for outside in ("../x", "/etc/passwd"):
        with pytest.raises(InvalidArgumentError, match="not inside"):
            prepare_state(tmp_path, outside, 0, 0)
