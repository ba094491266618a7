"""EFI variables: bytes as the UEFI specification has them, and any other bytes."""

import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoscore.common.errors import InvalidArgumentError, NotFoundError
from aoscore.sm.launcher.runtimes.boot.efi import (
    EfiVariables,
    LoadOption,
    Partition,
    build_load_option,
    build_numbers,
    parse_load_option,
    parse_numbers,
)

GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
PARTITION = Partition(uuid.UUID("01020304-0506-0708-090a-0b0c0d0e0f10"), 1, 0x800, 0x10000)
# Put together by hand from UEFI 2.10, §3.1.3 and §10.3.5.1: a HD() node, a file path node, the end.
OPTION = bytes.fromhex(
    "01000000"  # active
    "5e00"  # bytes of the device path
    "42006f006f00740030003000300034000000"  # Boot0004
    "04012a00"  # hard drive, 42 bytes
    "01000000 0008000000000000 0000010000000000"  # partition 1, start, size
    "04030201 0605 0807 090a0b0c0d0e0f10 0202"  # GUID, GPT, GUID signature
    "04043000"  # file path, 48 bytes
    "5c004500460049005c0042004f004f0054005c0062006f006f0074007800360034002e006500660069000000"
    "7fff0400"
)


def test_load_option_byte_for_byte() -> None:
    made = build_load_option("Boot0004", PARTITION, "/EFI/BOOT/bootx64.efi")
    assert made == OPTION
    assert parse_load_option(made) == LoadOption("Boot0004", PARTITION.uuid, "\\EFI\\BOOT\\bootx64.efi")


def test_other_kinds_of_load_options() -> None:
    mbr = bytearray(build_load_option("disk", PARTITION, "/x"))
    at = mbr.index(bytes.fromhex("0202"))
    mbr[at : at + 2] = bytes.fromhex("0101")
    # AosCore 9.1 loops for ever on it (sm-runtime.md §4.2).
    assert parse_load_option(bytes(mbr)).partition is None
    network = b"\1\0\0\0\4\0N\0\0\0\x7f\xff\4\0more data"
    assert parse_load_option(network) == LoadOption("N", None)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        OPTION[:5],
        OPTION[:20],
        OPTION[:-60],
        b"\1\0\0\0\4\0N\0\0\0\4\1\0\0",
        b"\1\0\0\0\4\0N\0\0\0\4\1\5\0",
        b"\1\0\0\0\3\0N\0\0\0\4\1\4",
    ],
)
def test_malformed_load_option_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_load_option(data)


@given(st.binary(max_size=300), st.integers(0, 110), st.integers(0, 255))
def test_any_bytes_end_in_a_load_option_or_an_error(data: bytes, at: int, value: int) -> None:
    damaged = bytearray(OPTION)
    damaged[at % len(OPTION)] = value
    for candidate in (data, bytes(damaged), OPTION[:at] + data):
        try:
            parse_load_option(candidate)
        except InvalidArgumentError:
            pass
        parse_numbers(candidate)


@given(st.uuids(), st.integers(1, 128), st.integers(0, 2**63), st.text(st.characters(codec="ascii", categories=["L"])))
def test_what_is_made_is_read_again(identity: uuid.UUID, number: int, start: int, name: str) -> None:
    made = build_load_option(name, Partition(identity, number, start, 1), f"/EFI/{name}")
    assert parse_load_option(made) == LoadOption(name, identity, f"\\EFI\\{name}")


@given(st.lists(st.integers(0, 0xFFFF), max_size=20))
def test_numbers(numbers: list[int]) -> None:
    assert parse_numbers(build_numbers(numbers)) == numbers
    assert parse_numbers(build_numbers(numbers) + b"\1") == numbers


def test_variables(tmp_path: Path) -> None:
    efi = EfiVariables(tmp_path)
    assert (efi.current, efi.next, efi.order, efi.entries()) == (None, None, [], {})
    assert efi.add(PARTITION, "/a") == 0
    (tmp_path / f"Boot000A-{GLOBAL}").write_bytes(b"\7\0\0\0broken")
    (tmp_path / "Boot0020-00000000-0000-0000-0000-000000000000").write_bytes(b"\7\0\0\0")
    assert efi.add(PARTITION, "/b") == 11
    assert efi.entries() == {
        0: LoadOption("Boot0000", PARTITION.uuid, "\\a"),
        11: LoadOption("Boot000b", PARTITION.uuid, "\\b"),
    }
    assert (tmp_path / f"BootOrder-{GLOBAL}").read_bytes() == bytes.fromhex("07000000 0000 0b00")
    efi.put_first(11)
    assert efi.order == [11, 0]
    efi.next = 11
    assert (tmp_path / f"BootNext-{GLOBAL}").read_bytes() == bytes.fromhex("07000000 0b00")
    efi.next = None
    efi.next = None
    assert efi.next is None
    (tmp_path / f"BootCurrent-{GLOBAL}").write_bytes(b"\6\0\0\0\x0b\0")
    assert efi.current == 11


def test_nothing_is_written_that_is_so_already(tmp_path: Path) -> None:
    efi = EfiVariables(tmp_path)
    efi.add(PARTITION, "/a")
    efi.next = 0
    for path in tmp_path.iterdir():
        path.chmod(0o444)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    efi.put_first(0)
    efi.next = 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_machine_without_efi(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="did not boot by EFI"):
        EfiVariables(tmp_path / "efivars")
