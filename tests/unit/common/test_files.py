import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aoscore.common.blobstore import BlobStore, check_digest
from aoscore.common.errors import (
    AlreadyExistsError,
    ChecksumError,
    DeadlineError,
    FailedError,
    InvalidArgumentError,
    NotFoundError,
)
from aoscore.common.files import DirectoryLock, remove_tree, remove_unfinished, safe_join, write_atomic
from aoscore.common.process import OUTPUT_LIMIT_BYTES, run_program
from tests.support.items import sha256


def test_write_atomic_replaces_whole_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_atomic(path, b"one")
    write_atomic(path, b"two", mode=0o640)
    assert path.read_bytes() == b"two" and path.stat().st_mode & 0o777 == 0o640
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with pytest.raises(OSError, match="I/O error"):
        write_atomic(path, b"three")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("bad", ["", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "a\0b", "link/x", "link"])
def test_safe_join_refuses_what_leads_out(tmp_path: Path, bad: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(InvalidArgumentError):
        safe_join(root, bad)


def test_safe_join(tmp_path: Path) -> None:
    assert safe_join(tmp_path, "a/b") == tmp_path / "a/b"


def test_one_process_per_directory(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from aoscore.common.files import DirectoryLock\n"
        "try: DirectoryLock(Path(sys.argv[1]))\n"
        "except Exception as error: print(error); sys.exit(3)"
    )

    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=Path.cwd()
        )

    with DirectoryLock(tmp_path):
        result = other()
        assert result.returncode == 3 and str(tmp_path) in result.stdout
        with pytest.raises(AlreadyExistsError):
            DirectoryLock(tmp_path)
    assert other().returncode == 0


def test_remove_tree_of_anything(tmp_path: Path) -> None:
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "l").symlink_to("d")
    for name in ("l", "d", "nothing"):
        remove_tree(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "bad",
    ["", "sha256:", "sha256:../../etc/passwd", "sha256:" + "A" * 64, "md5:" + "0" * 32, "sha256:" + "0" * 64 + "/x"],
)
def test_digests_from_outside_are_checked(bad: str) -> None:
    with pytest.raises(InvalidArgumentError):
        check_digest(bad)


def test_blob_store_takes_only_what_fits_its_digest(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "store")
    temporary = tmp_path / "part"
    temporary.write_bytes(b"content")
    digest = sha256(b"content")
    with pytest.raises(ChecksumError, match="content of blob"):
        store.adopt(temporary, sha256(b"other"))
    assert temporary.exists()
    assert store.adopt(temporary, digest) == store.path(digest)
    assert store.contains(digest) and list(store.digests()) == [digest]
    store.verify(digest)
    assert store.read(digest, 100) == b"content"
    with pytest.raises(InvalidArgumentError, match="larger than 3"):
        store.read(digest, 3)
    assert store.remove(digest) == 7 and store.remove(digest) == 0
    with pytest.raises(NotFoundError):
        store.verify(digest)


def test_damage_of_a_blob_is_found(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    digest = sha256(b"content")
    store.path(digest).write_bytes(b"content")
    store.verify(digest)
    store.path(digest).write_bytes(b"c0ntent")
    os.utime(store.path(digest), ns=(1, 1))
    with pytest.raises(ChecksumError, match="is damaged"):
        store.verify(digest)


async def test_run_program() -> None:
    done = await run_program(["sh", "-c", "cat; echo problem >&2"], timeout_s=10, stdin=b"input")
    assert (done.code, done.stdout, done.stderr) == (0, b"input", b"problem\n")
    with pytest.raises(FailedError, match="sh failed with code 3: last words"):
        await run_program(["sh", "-c", "echo first; echo last words >&2; exit 3"], timeout_s=10)
    assert (await run_program(["sh", "-c", "exit 3"], timeout_s=10, check=False)).code == 3
    with pytest.raises(NotFoundError, match="no-such-program"):
        await run_program(["/usr/bin/no-such-program"], timeout_s=10)


async def test_run_program_kills_the_whole_group_in_time(tmp_path: Path) -> None:
    marker = tmp_path / "alive"
    with pytest.raises(DeadlineError, match=r"sh did not end within 0.3 s"):
        await run_program(["sh", "-c", f"(sleep 1; touch {marker}) & wait"], timeout_s=0.3)
    await run_program(["sleep", "1"], timeout_s=5)
    assert not marker.exists()


async def test_run_program_bounds_output() -> None:
    done = await run_program(["head", "-c", str(3 * OUTPUT_LIMIT_BYTES), "/dev/zero"], timeout_s=20)
    assert len(done.stdout) == OUTPUT_LIMIT_BYTES


def test_deep_tree_is_removed(tmp_path: Path) -> None:
    """Deeper than the recursion limit and longer than PATH_MAX: only relative steps get there."""
    here = os.open(".", os.O_DIRECTORY)
    try:
        top = tmp_path / "deep"
        top.mkdir()
        (top / "file").write_bytes(b"1")
        (top / "link").symlink_to("/")
        os.chdir(top)
        for _ in range(2500):
            Path("d").mkdir()
            os.chdir("d")
        Path("file").write_bytes(b"1")
    finally:
        os.fchdir(here)
        os.close(here)
    remove_tree(top)
    assert not top.exists()


def test_what_an_interrupted_write_left_is_removed(tmp_path: Path) -> None:
    for name in (".a.cfg.x7.tmp", ".b.cfg.x7.tmp", "a.cfg"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path / "a.cfg")
    assert {path.name for path in tmp_path.iterdir()} == {".b.cfg.x7.tmp", "a.cfg"}
    remove_unfinished(tmp_path / "missing" / "a.cfg")


HOLDER = """
import signal, sys, time
from pathlib import Path
from aoscore.common.files import DirectoryLock
with DirectoryLock(Path(sys.argv[1])):
    signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[2] == "deaf" else signal.SIG_DFL)
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["", "deaf"])
def test_a_directory_is_taken_after_its_holder_was_stopped(tmp_path: Path, kind: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), kind], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        if kind:
            with pytest.raises(AlreadyExistsError):
                DirectoryLock.after_stop(tmp_path, 0.3)
            assert process.poll() is None
        else:
            with DirectoryLock.after_stop(tmp_path, 30):
                assert process.wait(10) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    with DirectoryLock.after_stop(tmp_path, 1):
        pass
