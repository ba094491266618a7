"""Fuzz target for the layer unpacker: archives out of a seed, each given to the native module and its plain twin.

``python -m tests.fuzz.unpack [--seed N] [--inputs N] [--first N]`` runs until an input makes them differ, makes one of
them write outside of its directory, or ends the process; the input is left as a file. The same seed and number always
make the same input, so `--first` repeats one.

An archive begins as a row of well-formed members of all kinds whose names lie about where they lead, and then suffers:
flipped bits, blocks that are cut out, swapped and repeated, with and without right checksums; most are packed too.
"""

import argparse
import gzip
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zstandard

from aoscore._speedups.unpack import Compression, Owners, Whiteouts
from tests.support.layers import both
from tests.support.tar import (
    BLOCK,
    END,
    base256,
    directory,
    gnu_long,
    gnu_sparse,
    hard_link,
    member,
    pax,
    record,
    symlink,
    with_checksum,
)

PARTS = (b"a", b"b", b"c", b"up", b"..", b".", b"", b".wh.a", b".wh..wh..opq", b".wh.", b"x" * 255, b"x" * 256)
ODD_PARTS = (b"\xff\xfe", b"line\nbreak", b"tab\t", b"\x01\x7f", b"\xc3\xa9", b"-rf", b"$(x)", b"caf\xe9", b" ", b"\\")
KEYS = (b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime", b"comment", b"SCHILY.xattr.user.x")
ODD_KEYS = (
    *(b"SCHILY.xattr.trusted.overlay.opaque", b"SCHILY.xattr.security.capability", b"SCHILY.xattr.user.overlay.opaque"),
    *(b"GNU.sparse." + one for one in b"major minor size realsize name offset numbytes map".split()),
)
NUMBERS = (0, 1, 511, 512, 513, 1 << 20, 1 << 32, 1 << 40, (1 << 63) - 1)


class Maker:
    """Makes the archive of one number."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed} {number}")

    def one_of(self, values: Sequence[Any]) -> Any:
        return values[self.random.randrange(len(values))]

    def chance(self, percent: int) -> bool:
        return self.random.randrange(100) < percent

    def name(self) -> bytes:
        """Most names are harmless and meet again; some lead away."""
        if self.chance(85):
            return b"/".join(self.one_of(PARTS[:4]) for _ in range(self.random.randrange(1, 4)))
        pool = (*PARTS, *ODD_PARTS)
        name = b"/".join(self.one_of(pool) for _ in range(self.random.randrange(1, 5)))
        return self.one_of((name, b"/" + name, b"../" + name, b"./" + name, name + b"/"))

    def data(self) -> bytes:
        return self.random.randbytes(self.one_of((0, 1, 10, 511, 512, 513, 3000)))

    def number(self, width: int) -> int | bytes:
        """As octal digits, as the binary form of GNU, or as nonsense."""
        value = self.one_of(NUMBERS)
        if self.chance(70) and value < 8 ** (width - 1):
            return int(value)
        limit = 1 << (8 * width - 2)
        return self.one_of((base256(min(value, limit - 1), width), base256(-1, width), b"9x", b" ", b"\xff" * width))

    def fields(self) -> dict[str, Any]:
        """Some fields with other than usual values."""
        choices: dict[str, Callable[[], Any]] = {
            "mode": lambda: self.one_of((0, 0o4755, 0o7777, b"8")),
            "uid": lambda: self.number(8),
            "gid": lambda: self.number(8),
            "size": lambda: self.number(12),
            "mtime": lambda: self.number(12),
            "magic": lambda: self.one_of((b"ustar\x0000", b"ustar  \0", b"", b"nonsense")),
            "prefix": lambda: self.one_of((b"a", b"/", b"..", b"up/up")),
            "device": lambda: self.one_of(((0, 0), (1, 3), (8, 0), (1 << 12, 1))),
        }
        return {name: make() for name, make in choices.items() if self.chance(4)}

    def pax(self) -> bytes:
        keys = (*KEYS, *(ODD_KEYS if self.chance(30) else ()))
        values = (self.name(), b"", b"0", b"12", b"-1.5", b"1,2,3", b"9" * 25, self.random.randbytes(5))
        pairs = [(self.one_of(keys), self.one_of(values)) for _ in range(self.random.randrange(1, 4))]
        if self.chance(10):
            body = bytearray(b"".join(record(key, value) for key, value in pairs))
            body[self.random.randrange(len(body))] = self.random.randrange(256)
            return member(b"x", bytes(body), b"x")
        return pax(pairs, self.one_of((b"x", b"x", b"x", b"g")))

    def sparse(self) -> bytes:
        offset, extents = 0, []
        for _ in range(self.random.randrange(30)):
            offset += self.random.randrange(2000) - (100 if self.chance(2) else 0)
            extents.append((max(0, offset), self.random.randbytes(self.random.randrange(100))))
            offset += len(extents[-1][1])
        return gnu_sparse(self.one_of(PARTS[:3]), extents, self.one_of((offset, offset, offset + 1000, 0, 1 << 32)))

    def part(self) -> bytes:
        """One member, or a header that speaks about the next."""
        makers: tuple[tuple[int, Callable[[], bytes]], ...] = (
            (30, lambda: member(self.name(), self.data(), **self.fields())),
            (15, lambda: directory(self.name(), **self.fields())),
            (15, lambda: symlink(self.name(), self.name(), **self.fields())),
            (12, lambda: hard_link(self.name(), self.name(), **self.fields())),
            (10, lambda: self.pax()),
            (5, lambda: gnu_long(self.one_of((b"L", b"K")), self.name() * self.one_of((1, 1, 40)))),
            (5, lambda: self.sparse()),
            (4, lambda: member(self.name(), kind=self.one_of((b"3", b"4", b"6")), **self.fields())),
            (2, lambda: member(self.name(), self.data(), kind=self.one_of((b"7", b"D", b"V", b"M", b"\0")))),
            (2, lambda: self.random.randbytes(BLOCK)),
        )
        return self.random.choices([make for _, make in makers], [weight for weight, _ in makers])[0]()

    def spoilt(self, data: bytes) -> bytes:
        """The archive after a fault or two."""
        blocks = [bytearray(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]
        for _ in range(self.random.randrange(1, 4)):
            at = self.random.randrange(len(blocks))
            match self.random.randrange(5):
                case 0:
                    del blocks[at:]
                    blocks = blocks or [bytearray(BLOCK)]
                case 1:
                    blocks.insert(at, blocks[self.random.randrange(len(blocks))][:])
                case 2:
                    other = self.random.randrange(len(blocks))
                    blocks[at], blocks[other] = blocks[other], blocks[at]
                case _:
                    blocks[at][self.random.randrange(len(blocks[at]))] ^= 1 << self.random.randrange(8)
                    if self.chance(70) and len(blocks[at]) == BLOCK:
                        blocks[at] = bytearray(with_checksum(bytes(blocks[at])))
        return b"".join(map(bytes, blocks))

    def make(self) -> tuple[bytes, dict[str, Any]]:
        """The blob and how it is to be unpacked."""
        data = b"".join(self.part() for _ in range(self.random.randrange(1, 12))) + (b"" if self.chance(5) else END)
        if self.chance(40):
            data = self.spoilt(data)
        compression = self.one_of(list(Compression))
        blob = {
            Compression.NONE: lambda: data,
            Compression.GZIP: lambda: gzip.compress(data, 1, mtime=0),
            Compression.ZSTD: lambda: zstandard.compress(data, 1),
        }[compression]()
        options: dict[str, Any] = {"compression": compression, "max_unpacked_bytes": 1 << 20, "max_members": 100}
        if self.chance(30):
            options |= {
                "max_unpacked_bytes": self.one_of((600, 2000, 1 << 20)),
                "max_members": self.one_of((1, 3, 100)),
                "owners": self.one_of(list(Owners)),
                "whiteouts": self.one_of(list(Whiteouts)),
                "xattrs": self.chance(50),
                "allow_devices": self.chance(20),
            }
        return blob, options


class Difference(AssertionError):
    """An input that the two treat differently, or that got out."""


def run(seed: int, first: int, inputs: int, folder: Path) -> Counter[int | None]:
    """Try that many inputs; how often each reason to refuse one (Code or errno) was met, None for unpacked ones.

    Raises Difference naming the file with the input.
    """
    outcomes: Counter[int | None] = Counter()
    inside, outside = folder / "inside", folder / "up"
    inside.mkdir(exist_ok=True)
    outside.write_text("untouched")
    for number in range(first, first + inputs):
        blob, options = Maker(seed, number).make()
        # Before: the process may not live to tell.
        (folder / "input").write_bytes(blob)
        native, plain = both(inside, blob, **options)
        what = f"input {number} of seed {seed} ({folder / 'input'}, {options})"
        if native != plain:
            raise Difference(f"{what}: native {native[0]}, plain {plain[0]}; trees equal: {native[1] == plain[1]}")
        if sorted(path.name for path in folder.iterdir()) != ["input", "inside", "up"]:
            raise Difference(f"{what}: something was made outside")
        if sorted(path.name for path in inside.iterdir()) != ["native", "plain"] or outside.read_text() != "untouched":
            raise Difference(f"{what}: something was made or changed outside")
        outcomes[native[0][1] if isinstance(native[0], tuple) else None] += 1
    return outcomes


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Fuzz the layer unpacker")
    parser.add_argument("--seed", type=int, default=1, help="which inputs")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--inputs", type=int, default=100_000, help="how many")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="aoscore-fuzz-"))
    outcomes = run(options.seed, options.first, options.inputs, folder)
    for outcome, count in outcomes.most_common():
        print(f"{count:8} {'unpacked' if outcome is None else getattr(outcome, 'name', outcome)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
