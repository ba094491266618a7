"""The sampler, native and plain, against psutil, a real cgroup where one may be made, and made-up trees."""

import os
import shutil
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aoscore._speedups import _sampler
from aoscore._speedups._plain import sampler as plain_sampler
from aoscore._speedups.sampler_types import MAX_INSTANCES, Filesystem, InstanceSample, SampleError

IMPLEMENTATIONS: dict[str, Any] = {"native": _sampler.Sampler, "plain": plain_sampler.Sampler}
UNIFIED = [Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")]

STAT = "cpu  100 20 30 400 50 6 7 8 9 10\ncpu0 100 20 30 400 50 6 7 8 9 10\nintr 5\n"
MEMINFO = "MemTotal: 1000 kB\nMemFree:   200 kB\nBuffers: 30 kB\nCached: 40 kB\nSwapCached: 5 kB\nSReclaimable: 50 kB\n"
NET_DEV = "Inter-|   Receive\n face |bytes\n    lo:  5 1 0 0 0 0 0 0   7 1 0 0\n eth0:1:11 1 0 0 0 0 0 0 13 1 0 0\n"


@pytest.fixture(params=IMPLEMENTATIONS)
def sampler_class(request: pytest.FixtureRequest) -> Any:
    return IMPLEMENTATIONS[request.param]


def make_proc(root: Path, stat: str = STAT, meminfo: str = MEMINFO, net_dev: str = NET_DEV) -> str:
    (root / "net").mkdir(parents=True, exist_ok=True)
    (root / "stat").write_text(stat)
    (root / "meminfo").write_text(meminfo)
    (root / "net" / "dev").write_text(net_dev)
    return str(root)


def make_v2(root: Path, name: str, cpu_us: int = 5, extra: str = "") -> Path:
    root.mkdir(exist_ok=True)
    (root / "cgroup.controllers").write_text("cpu memory pids io\n")
    group = root / name
    group.mkdir(parents=True)
    (group / "cpu.stat").write_text(f"usage_usec {cpu_us}\nuser_usec 1\n")
    (group / "memory.current").write_text("4096\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 77\n")
    (group / "pids.current").write_text("3\n")
    (group / "io.stat").write_text("8:0 rbytes=10 wbytes=20 rios=1\n8:16 rbytes=1 wbytes=2 rios=3\n" + extra)
    return group


def make_v1(root: Path, name: str) -> None:
    for controller in ("cpuacct", "memory", "pids", "blkio"):
        (root / controller / name).mkdir(parents=True)
    (root / "cpuacct" / name / "cpuacct.usage").write_text("123456789\n")
    (root / "memory" / name / "memory.usage_in_bytes").write_text("8192\n")
    (root / "memory" / name / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 99\n")
    (root / "pids" / name / "pids.current").write_text("4\n")
    (root / "blkio" / name / "blkio.throttle.io_service_bytes").write_text(
        "8:0 Read 100\n8:0 Write 200\n8:0 Total 300\n8:16 Read 1\n8:16 Write 2\nTotal 303\n"
    )


def test_real_node_against_psutil(sampler_class: Any) -> None:
    before = psutil.net_io_counters(pernic=True)
    with sampler_class(filesystems={"root": "/", "none": "/nowhere"}) as sampler:
        first, second = sampler.sample(), sampler.sample()
    after = psutil.net_io_counters(pernic=True)
    assert first.time_ns < second.time_ns
    assert first.node.memory_total_bytes == psutil.virtual_memory().total
    assert 0 < first.node.memory_used_bytes < first.node.memory_total_bytes
    ticks = os.sysconf("SC_CLK_TCK")
    times = psutil.cpu_times()
    assert first.node.cpu_idle_ticks == pytest.approx(times.idle * ticks, abs=5 * ticks)
    assert first.node.cpu_total_ticks <= second.node.cpu_total_ticks
    assert set(first.node.network) == set(before)
    for name, (received, sent) in first.node.network.items():
        assert before[name].bytes_recv <= received <= after[name].bytes_recv
        assert before[name].bytes_sent <= sent <= after[name].bytes_sent
    usage = psutil.disk_usage("/")
    space = first.node.filesystems["root"]
    assert space.total_bytes == usage.total
    assert space.used_bytes == pytest.approx(usage.used, rel=0.05)
    assert first.node.filesystems["none"] is None


@pytest.fixture
def real_cgroup() -> Iterator[tuple[str, str]]:
    root = next((one for one in UNIFIED if (one / "cgroup.controllers").exists()), None)
    name = f"aoscore-test-{uuid.uuid4().hex}"
    if root is None:
        pytest.skip("no cgroup v2 here")
    try:
        (root / name).mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup may be made here: {error}")
    yield str(root), name
    if (root / name).exists():
        (root / name).rmdir()


@pytest.mark.parametrize("kept", [0, 1, 768])
def test_real_cgroup_that_goes_and_comes(sampler_class: Any, real_cgroup: tuple[str, str], kept: int) -> None:
    root, name = real_cgroup
    with sampler_class(cgroup_root=root, max_kept_files=kept) as sampler:
        sampler.add("one", name)
        there = sampler.sample().instances["one"]
        assert (there.gone, there.generation) == (False, 1)
        assert there.cpu_usage_ns is not None
        Path(root, name).rmdir()
        gone = sampler.sample().instances["one"]
        assert gone == InstanceSample(True, 1, None, None, None, None, None, None)
        Path(root, name).mkdir()
        assert sampler.sample().instances["one"].generation == 2
        # Replaced between two samples: the kept files belong to the old one.
        Path(root, name).rmdir()
        Path(root, name).mkdir()
        again = sampler.sample().instances["one"]
        assert (again.gone, again.generation) == (False, 3)
        assert sampler.sample().instances["one"].generation == 3


def test_formulas_of_the_node(sampler_class: Any, tmp_path: Path) -> None:
    with sampler_class(proc_root=make_proc(tmp_path)) as sampler:
        node = sampler.sample().node
    assert (node.cpu_total_ticks, node.cpu_idle_ticks) == (640, 400)
    assert (node.memory_total_bytes, node.memory_used_bytes) == (1000 << 10, (1000 - 200 - 30 - 40 - 50) << 10)
    assert node.network == {"lo": (5, 7), "eth0:1": (11, 13)}
    assert node.filesystems == {}


def test_cgroup_v2_and_v1(sampler_class: Any, tmp_path: Path) -> None:
    make_v2(tmp_path / "v2", "a.slice/x")
    make_v1(tmp_path / "v1", "a.slice/x")
    expected = {
        "v2": InstanceSample(False, 1, 5000, 4096, 77, 3, 11, 22),
        "v1": InstanceSample(False, 1, 123456789, 8192, 99, 4, 101, 202),
    }
    for kind, values in expected.items():
        with sampler_class(cgroup_root=str(tmp_path / kind), memory_details=True) as sampler:
            sampler.add("x", "a.slice/x")
            assert sampler.sample().instances == {"x": values}
        with sampler_class(cgroup_root=str(tmp_path / kind)) as sampler:
            sampler.add("x", "a.slice/x")
            assert sampler.sample().instances == {"x": values._replace(inactive_file_bytes=None)}


def test_missing_controllers(sampler_class: Any, tmp_path: Path) -> None:
    group = make_v2(tmp_path / "v2", "x")
    for name in ("memory.current", "io.stat"):
        (group / name).unlink()
    (group / "pids.current").write_text("max\n")
    with sampler_class(cgroup_root=str(tmp_path / "v2")) as sampler:
        sampler.add("x", "x")
        assert sampler.sample().instances["x"] == InstanceSample(False, 1, 5000, None, None, None, None, None)
        (group / "memory.current").write_text("5\n")
        assert sampler.sample().instances["x"].memory_bytes == 5


def test_counters_follow_the_kept_files(sampler_class: Any, tmp_path: Path) -> None:
    group = make_v2(tmp_path / "v2", "x")
    with sampler_class(cgroup_root=str(tmp_path / "v2")) as sampler:
        sampler.add("x", "x")
        for value in (1, 22, 3):
            (group / "memory.current").write_text(f"{value}\n")
            assert sampler.sample().instances["x"].memory_bytes == value
        group.rename(tmp_path / "v2" / "y")
        sampler.close()  # the kept files are no real cgroup's: they would not say that it is gone
        assert sampler.sample().instances["x"].gone
        make_v2(tmp_path / "v2", "x", cpu_us=1)
        assert sampler.sample().instances["x"][:3] == (False, 2, 1000)
        sampler.close()
        assert sampler.sample().instances["x"][:3] == (False, 2, 1000)


def open_files() -> int:
    return sum(1 for _entry in Path("/proc/self/fd").iterdir())


def test_many_instances_within_the_limit_of_files(sampler_class: Any, tmp_path: Path) -> None:
    for index in range(MAX_INSTANCES):
        make_v2(tmp_path / "v2", f"i{index}", cpu_us=index, extra=f"8:32 rbytes={index} wbytes=0\n" * 2000)
    before = open_files()
    with sampler_class(cgroup_root=str(tmp_path / "v2"), max_kept_files=100) as sampler:
        for index in range(MAX_INSTANCES):
            sampler.add(f"i{index}", f"i{index}")
        for _round in range(2):
            found = sampler.sample().instances
            assert [one.cpu_usage_ns for one in found.values()] == [1000 * index for index in range(MAX_INSTANCES)]
            assert [one.io_read_bytes for one in found.values()] == [11 + 2000 * i for i in range(MAX_INSTANCES)]
            assert open_files() == before + 103
        with pytest.raises(ValueError, match="256 instances"):
            sampler.add("one more", "x")
        for index in range(MAX_INSTANCES):
            sampler.remove(f"i{index}")
        assert sampler.sample().instances == {}
        assert open_files() == before + 3
        sampler.add("new", "i7")
        assert sampler.sample().instances["new"].cpu_usage_ns == 7000
    assert open_files() == before


@pytest.mark.parametrize("cgroup", ["", "/x", "a/../b", "a//b", "./a", "a/", "a\0b"])
def test_paths_that_leave_the_root(sampler_class: Any, cgroup: str) -> None:
    with pytest.raises(ValueError, match="plain path"):
        sampler_class().add("x", cgroup)


def test_names_are_unique(sampler_class: Any) -> None:
    sampler = sampler_class()
    sampler.add("x", "a")
    with pytest.raises(ValueError, match="'x' is watched already"):
        sampler.add("x", "b")
    with pytest.raises(KeyError):
        sampler.remove("y")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("stat", ""),
        ("stat", "cpu  1 2 3\n"),
        ("stat", "cpu0 1 2 3 4\n"),
        ("stat", "cpu  1 2 x 4\n"),
        ("stat", "cpu  1 2 3x 4 5\n"),
        ("meminfo", "MemFree: 1 kB\n"),
        ("meminfo", "MemTotal: kB\n"),
        ("net/dev", "a\nb\n eth0: 1 2 3\n"),
    ],
)
def test_odd_node_files_are_named(sampler_class: Any, tmp_path: Path, name: str, content: str) -> None:
    make_proc(tmp_path)
    (tmp_path / name).write_text(content)
    with sampler_class(proc_root=str(tmp_path)) as sampler:
        with pytest.raises(SampleError) as caught:
            sampler.sample()
    assert caught.value.filename == str(tmp_path / name)


def test_missing_node_file_is_named(sampler_class: Any, tmp_path: Path) -> None:
    make_proc(tmp_path)
    (tmp_path / "meminfo").unlink()
    with sampler_class(proc_root=str(tmp_path)) as sampler:
        with pytest.raises(SampleError) as caught:
            sampler.sample()
    assert caught.value.filename == str(tmp_path / "meminfo")


def test_file_system_space(sampler_class: Any, tmp_path: Path) -> None:
    with sampler_class(filesystems={"here": str(tmp_path)}) as sampler:
        space = sampler.sample().node.filesystems["here"]
    found = os.statvfs(tmp_path)
    assert isinstance(space, Filesystem)
    assert space.total_bytes == found.f_blocks * found.f_frsize


number = st.one_of(st.integers(0, 10**18).map(str), st.just(str(2**63)), st.text("0123456789 x-", max_size=25))
line = st.one_of(
    st.builds("{} {}".format, st.sampled_from(["usage_usec", "inactive_file", "usage", ""]), number),
    st.builds("8:0 rbytes={} wbytes={}".format, number, number),
    st.text("ab 19=:\t", max_size=20),
)
text = st.lists(line, max_size=5).map("\n".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(cpu=text, memory=text, single=st.one_of(number, text), io=text)
def test_instances_agree_on_any_content(tmp_path: Path, cpu: str, memory: str, single: str, io: str) -> None:
    root = tmp_path / "v2"
    shutil.rmtree(root, ignore_errors=True)
    group = make_v2(root, "x")
    for name, content in {"cpu.stat": cpu, "memory.stat": memory, "memory.current": single, "io.stat": io}.items():
        (group / name).write_text(content)
    results = []
    for sampler_class in IMPLEMENTATIONS.values():
        with sampler_class(cgroup_root=str(root), memory_details=True) as sampler:
            sampler.add("x", "x")
            results.append(sampler.sample().instances)
    assert results[0] == results[1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(
    cpu=st.lists(st.one_of(number, st.just("cpu")), max_size=8).map(" ".join),
    memory=st.lists(
        st.builds("{}: {} kB".format, st.sampled_from(["MemTotal", "MemFree", "Cached", "Buffers"]), number), max_size=5
    ).map("\n".join),
    net=st.lists(st.builds("{}: {} 0 0 0 0 0 0 0 {} 0".format, st.text("aeth:0 ", max_size=6), number, number)).map(
        "\n".join
    ),
)
def test_nodes_agree_on_any_content(tmp_path: Path, cpu: str, memory: str, net: str) -> None:
    root = make_proc(tmp_path, stat="cpu  " + cpu + "\n", meminfo=memory, net_dev="a\nb\n" + net)
    results: list[Any] = []
    for sampler_class in IMPLEMENTATIONS.values():
        with sampler_class(proc_root=root) as sampler:
            try:
                results.append(sampler.sample().node)
            except SampleError as error:
                results.append((error.errno, error.filename))
    assert results[0] == results[1]


# Counters of traffic: the kernel's messages, put together by hand. That real ones are understood is shown by
# tests/integration/sm/test_networks.py.

TAKE_COUNTERS: dict[str, Any] = {"native": _sampler.take_counters, "plain": plain_sampler.take_counters}


def attribute(kind: int, content: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(content), kind) + content + bytes(-len(content) % 4)


def message(kind: int, content: bytes, flags: int = 2) -> bytes:
    return struct.pack("=IHHII", 16 + len(content), kind, flags, 0, 0) + content + bytes(-len(content) % 4)


def counter(name: str, size: int) -> bytes:
    numbers = attribute(1, size.to_bytes(8, "big")) + attribute(2, bytes(8))
    parts = (attribute(1, b"table\0"), attribute(2, f"{name}\0".encode()), attribute(3, bytes(4)))
    return message(10 << 8 | 18, bytes(4) + b"".join(parts) + attribute(4 | 0x8000, numbers))


DONE = message(3, bytes(4))


@pytest.fixture(params=TAKE_COUNTERS)
def take_counters(request: pytest.FixtureRequest) -> Any:
    return TAKE_COUNTERS[request.param]


def test_counters_are_taken_part_by_part(take_counters: Any) -> None:
    found: dict[str, int] = {}
    assert not take_counters(counter("in_a", 0) + counter("out_a", 2**64 - 1), found)
    assert take_counters(counter("in_long_name", 7) + message(99, b"else") + DONE + b"not looked at", found)
    assert found == {"in_a": 0, "out_a": 2**64 - 1, "in_long_name": 7}


def test_what_the_kernel_refuses_is_its_error(take_counters: Any) -> None:
    with pytest.raises(PermissionError):
        take_counters(message(2, struct.pack("=i", -1)), {})


def test_a_list_that_changed_while_it_was_made_is_of_no_use(take_counters: Any) -> None:
    with pytest.raises(InterruptedError):
        take_counters(message(3, bytes(4), flags=2 | 0x10), {})


@pytest.mark.parametrize(
    "damaged",
    [
        struct.pack("=IHHII", 15, 3, 2, 0, 0),
        struct.pack("=IHHII", 17, 3, 2, 0, 0),
        struct.pack("=IHHII", 2**32 - 1, 3, 2, 0, 0),
        message(2, b"")[:16],
        message(10 << 8 | 18, bytes(4) + struct.pack("=HH", 3, 2)),
        message(10 << 8 | 18, bytes(4) + struct.pack("=HH", 9, 2) + bytes(4)),
        message(10 << 8 | 18, bytes(4) + attribute(4, struct.pack("=HH", 0, 1))),
    ],
)
def test_damaged_messages_are_refused(take_counters: Any, damaged: bytes) -> None:
    with pytest.raises(ValueError, match="list of counters"):
        take_counters(damaged, {})


@given(data=st.data(), parts=st.lists(st.sampled_from((counter("in_a", 5), counter("b", 2**40), DONE)), max_size=4))
def test_whatever_comes_both_make_the_same_of_it(data: st.DataObject, parts: list[bytes]) -> None:
    answer = bytearray(b"".join(parts))
    for place in data.draw(st.lists(st.integers(0, max(0, len(answer) - 1)), max_size=4)) if answer else ():
        answer[place] = data.draw(st.integers(0, 255))
    del answer[data.draw(st.integers(0, len(answer))) :]
    results = []
    for take in TAKE_COUNTERS.values():
        found: dict[str, int] = {}
        try:
            ended: Any = take(bytes(answer), found)
        except (OSError, ValueError) as error:
            ended = type(error), str(error)
        results.append((ended, found))
    assert results[0] == results[1]
