"""Which control groups a mount table means, and how crun is then started."""

from pathlib import Path

import pytest

from aoscore.common.errors import FailedError, NotSupportedError
from aoscore.sm.cgroups import CgroupLayout, parse_layout

V2 = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,nodev,noexec,relatime 0 0\n"
V1 = """tmpfs /sys/fs/cgroup tmpfs rw,relatime,mode=755 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0
cgroup /sys/fs/cgroup/pids cgroup rw,relatime,pids 0 0
cgroup /sys/fs/cgroup/systemd cgroup rw,relatime,name=systemd 0 0
"""
HYBRID = V1 + "cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n"


def test_v2_machine() -> None:
    layout = parse_layout(V2)
    assert (layout.version, layout.unified, layout.runtime_prefix()) == (2, Path("/sys/fs/cgroup"), ())


def test_v1_machine() -> None:
    layout = parse_layout(V1)
    assert (layout.version, layout.runtime_prefix()) == (1, ())
    assert layout.controllers["cpuacct"] == Path("/sys/fs/cgroup/cpu,cpuacct")
    assert "systemd" not in layout.controllers and "name=systemd" not in layout.controllers


def test_hybrid_machine_hides_the_v2_tree_from_crun() -> None:
    layout = parse_layout(HYBRID)
    assert layout.version == 1
    prefix = layout.runtime_prefix()
    assert prefix[0].startswith("/") and prefix[-1] == "/sys/fs/cgroup/unified"


def test_machine_without_control_groups() -> None:
    with pytest.raises(NotSupportedError, match="no control groups"):
        parse_layout("proc /proc proc rw 0 0\n")


def test_which_limits_there_can_be(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu memory\n")
    unified = CgroupLayout(tmp_path, {})
    assert [unified.has(name) for name in ("memory", "pids")] == [True, False]
    older = CgroupLayout(tmp_path, {"pids": tmp_path})
    assert [older.has(name) for name in ("memory", "pids")] == [False, True]


def test_group_is_removed_with_all_below_it(tmp_path: Path) -> None:
    (tmp_path / "parent/id/inner").mkdir(parents=True)
    layout = CgroupLayout(tmp_path, {})
    for _ in range(2):
        layout.remove("/parent/id")
        assert [path.name for path in tmp_path.rglob("*")] == ["parent"]
    # crun and the kernel tidy up the older trees.
    CgroupLayout(tmp_path, {"pids": tmp_path}).remove("/parent")
    assert (tmp_path / "parent").exists()


def test_group_that_can_not_be_removed_is_named(tmp_path: Path) -> None:
    (tmp_path / "id").mkdir()
    (tmp_path / "id/file").touch()
    with pytest.raises(FailedError, match="control group /id can't be removed: Directory not empty"):
        CgroupLayout(tmp_path, {}).remove("/id")


def test_processes_of_a_group(tmp_path: Path) -> None:
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    (group / "cgroup.procs").write_text("12\n345\n")
    layout = parse_layout(f"cgroup2 {tmp_path} cgroup2 rw 0 0\n")
    assert layout.processes("/a/b") == [12, 345]
    assert layout.processes("/a/c") == []


@pytest.mark.parametrize(("version", "name"), [(2, "memory.events"), (1, "memory.oom_control")])
def test_out_of_memory_is_known_from_the_group(tmp_path: Path, version: int, name: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_text("oom 5\noom_kill 3\noom_kill_disable 0\n")
    layout = CgroupLayout(tmp_path if version == 2 else None, {} if version == 2 else {"memory": tmp_path})
    assert layout.oom_kills("/a") == 3
    assert layout.oom_kills("/b") == 0
