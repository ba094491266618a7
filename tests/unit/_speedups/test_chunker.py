"""The chunker, native and plain, against hashlib and the file system."""

import errno
import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoscore._speedups import _chunker, chunker
from aoscore._speedups._plain import chunker as plain_chunker

IMPLEMENTATIONS = {"native": _chunker, "plain": plain_chunker}
ALGORITHMS = {
    "sha256": "sha256",
    "sha384": "sha384",
    "sha512": "sha512",
    "sha3-256": "sha3_256",
    "sha3-384": "sha3_384",
    "sha3-512": "sha3_512",
}


@pytest.fixture(params=IMPLEMENTATIONS)
def module(request: pytest.FixtureRequest) -> ModuleType:
    return IMPLEMENTATIONS[request.param]


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    path.write_bytes(os.urandom(1_000_003))
    return path


@pytest.fixture
def big_fd(big: Path) -> Iterator[int]:
    fd = os.open(big, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("size", [0, 1, (1 << 18) - 1, 1 << 18, (1 << 18) + 1])
def test_whole_file(module: ModuleType, tmp_path: Path, algorithm: str, size: int) -> None:
    data = os.urandom(size)
    path = tmp_path / "file"
    path.write_bytes(data)
    expected = f"{algorithm}:{hashlib.new(ALGORITHMS[algorithm], data).hexdigest()}"

    assert module.hash_file(path, algorithm) == expected
    assert module.hash_file(str(path), algorithm) == expected
    with path.open("rb") as file:
        file.seek(size // 2)
        assert module.hash_file(file.fileno(), algorithm) == expected
        assert file.tell() == size // 2
    assert chunker.DIGEST_DIGITS[algorithm] == len(expected.partition(":")[2])


def test_several_digests_in_one_pass(module: ModuleType, big: Path) -> None:
    assert module.hash_file_all(big, ("sha256", "sha3-256")) == (
        module.hash_file(big, "sha256"),
        module.hash_file(big, "sha3-256"),
    )
    assert module.hash_file_all(big, ()) == ()


def test_unknown_algorithm_is_named(module: ModuleType, big: Path) -> None:
    with pytest.raises(chunker.UnknownDigestError, match="md5"):
        module.Digest("md5")
    with pytest.raises(chunker.UnknownDigestError, match="md5"):
        module.hash_file(big, "md5")


def test_missing_file_and_directory(module: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        module.hash_file(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError):
        module.hash_file(tmp_path)


@given(pieces=st.lists(st.binary(max_size=300), max_size=20), algorithm=st.sampled_from(list(ALGORITHMS)))
def test_running_digests_agree(pieces: list[bytes], algorithm: str) -> None:
    native, plain = _chunker.Digest(algorithm), plain_chunker.Digest(algorithm)
    for piece in pieces:
        native.update(piece)
        plain.update(bytearray(piece))
        assert (native.size_bytes, native.text()) == (plain.size_bytes, plain.text())
    expected = hashlib.new(ALGORITHMS[algorithm], b"".join(pieces)).hexdigest()
    assert native.hexdigest() == plain.hexdigest() == expected


def test_copy_of_a_digest_is_independent(module: ModuleType) -> None:
    first = module.Digest()
    first.update(b"one")
    second = first.copy()
    second.update(b"two")
    assert first.hexdigest() == hashlib.sha256(b"one").hexdigest()
    assert second.hexdigest() == hashlib.sha256(b"onetwo").hexdigest()
    assert (first.size_bytes, second.size_bytes, second.algorithm) == (3, 6, "sha256")


def test_a_download_goes_on_after_a_restart(module: ModuleType, tmp_path: Path) -> None:
    data = os.urandom(700_000)
    path = tmp_path / "part"
    path.write_bytes(data[:300_000])
    digest = module.Digest()
    with path.open("r+b") as file:
        assert digest.update_from_file(file.fileno()) == 300_000
        file.seek(0, os.SEEK_END)
        assert digest.write(file.fileno(), memoryview(data)[300_000:]) == 400_000
    assert digest.size_bytes == len(data)
    assert digest.hexdigest() == hashlib.sha256(data).hexdigest()
    assert path.read_bytes() == data


def test_ranges_of_a_file(module: ModuleType, big: Path, big_fd: int) -> None:
    data = big.read_bytes()
    digest = module.Digest()
    assert digest.update_from_file(big_fd, 10, 600_000) == 600_000
    assert digest.hexdigest() == hashlib.sha256(data[10:600_010]).hexdigest()
    assert digest.update_from_file(big_fd, 900_000, 600_000) == 100_003
    assert digest.update_from_file(big_fd, 2_000_000) == 0
    with pytest.raises(ValueError, match="-1"):
        digest.update_from_file(big_fd, -1)
    with pytest.raises(ValueError, match="-5"):
        digest.update_from_file(big_fd, 0, -5)


def test_full_disk(module: ModuleType) -> None:
    digest = module.Digest()
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="space") as caught:
            digest.write(fd, b"x" * 100)
        assert caught.value.errno == errno.ENOSPC
        assert digest.size_bytes == 0
    finally:
        os.close(fd)


def test_digest_holds_what_was_written_before_the_failure(module: ModuleType) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    digest = module.Digest()
    data = os.urandom(1 << 20)
    try:
        with pytest.raises(BlockingIOError):
            digest.write(writer, data)
        written = digest.size_bytes
        assert 0 < written < len(data)
        received = b""
        while len(received) < written:
            received += os.read(reader, written - len(received))
        assert received == data[:written]
        assert digest.hexdigest() == hashlib.sha256(data[:written]).hexdigest()
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("chunk_bytes", [1024, 999_999, 1_000_003, 1_000_004, 1 << 22])
def test_chunks(module: ModuleType, big: Path, big_fd: int, chunk_bytes: int) -> None:
    data = big.read_bytes()
    digest = module.Digest("sha3-256")
    chunks = list(module.read_chunks(big_fd, chunk_bytes, digest, 3))
    assert b"".join(chunks) == data[3:]
    assert {len(chunk) for chunk in chunks[:-1]} <= {chunk_bytes}
    assert 0 < len(chunks[-1]) <= chunk_bytes
    assert digest.hexdigest() == hashlib.sha3_256(data[3:]).hexdigest()
    assert os.lseek(big_fd, 0, os.SEEK_CUR) == 0


def test_no_chunk_of_nothing(module: ModuleType, big_fd: int) -> None:
    assert list(module.read_chunks(big_fd, 10, offset_bytes=1_000_003)) == []
    with pytest.raises(ValueError, match="chunk size 0"):
        module.read_chunks(big_fd, 0)


def test_copy_with_digest(module: ModuleType, big: Path, big_fd: int, tmp_path: Path) -> None:
    data = big.read_bytes()
    digest = module.Digest()
    with (tmp_path / "copy").open("wb") as target:
        target.write(b"head")
        target.flush()
        assert module.copy_file(big_fd, target.fileno(), digest, 5, 400_000) == 400_000
        assert module.copy_file(big_fd, target.fileno(), None, 999_999) == 4
    assert (tmp_path / "copy").read_bytes() == b"head" + data[5:400_005] + data[999_999:]
    assert digest.hexdigest() == hashlib.sha256(data[5:400_005]).hexdigest()


def test_send_whole_file(module: ModuleType, big: Path, big_fd: int) -> None:
    ours, theirs = socket.socketpair()
    received = bytearray()

    def receive() -> None:
        while part := theirs.recv(65536):
            received.extend(part)

    with ours, theirs:
        reader = threading.Thread(target=receive)
        reader.start()
        assert module.send_file(ours.fileno(), big_fd, 100, 5_000_000) == 1_000_003 - 100
        ours.shutdown(socket.SHUT_WR)
        reader.join()
    assert received == big.read_bytes()[100:]


def test_send_to_a_slow_reader(module: ModuleType, big: Path, big_fd: int) -> None:
    data = big.read_bytes()
    received = bytearray()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        offset = blocked = 0
        while offset < len(data):
            try:
                sent = module.send_file(ours.fileno(), big_fd, offset, len(data) - offset)
                assert sent > 0
                offset += sent
            except BlockingIOError:
                blocked += 1
                received += theirs.recv(1 << 20)
        ours.close()
        while part := theirs.recv(1 << 20):
            received += part
    assert blocked > 0
    assert received == data


def test_send_to_a_closed_socket(module: ModuleType, big_fd: int) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        with pytest.raises(BrokenPipeError):
            module.send_file(ours.fileno(), big_fd, 0, 100)
    with pytest.raises(ValueError, match="-1"):
        module.send_file(0, big_fd, -1, 100)
