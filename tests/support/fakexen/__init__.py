"""The real libxenvchan without Xen: stand-ins for the libraries below it, found before those (vchan.md §4)."""

import atexit
import contextlib
import functools
import os
import shutil
import socket
import struct
import subprocess
import tempfile
from pathlib import Path

from aoscore.mp.communication.vchans import is_built

SOURCES = Path(__file__).parent
_LIBRARIES = {
    "gnttab.c": ("libxengnttab.so.1", "VERS_1.0"),
    "evtchn.c": ("libxenevtchn.so.1", "VERS_1.0"),
    "xenstore.c": ("libxenstore.so.4", "VERS_4.0"),
}


def missing() -> str:
    """Why there is no vchan to be had here, empty when there is."""
    return "" if is_built() else "libxenvchan (libxen-dev) was not there when aoscore was built"


@functools.cache
def _libraries() -> Path:
    """Built once per process of tests."""
    folder = Path(tempfile.mkdtemp(prefix="fakexen-"))
    atexit.register(shutil.rmtree, folder)
    for source, (name, version) in _LIBRARIES.items():
        versions = folder / f"{version}.map"
        versions.write_text(f"{version} {{ global: *; }};\n")
        command = ["cc", "-O2", "-Wall", "-Wno-unused-parameter", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
        command += [f"-Wl,--version-script={versions}", "-o", str(folder / name), str(SOURCES / source)]
        subprocess.run(command, check=True)
    return folder


class FakeXen:
    """Devices and xenstore of one machine."""

    def __init__(self) -> None:
        # Not in the test's own folder: sockets are in it, whose paths must be short.
        self._root = Path(tempfile.mkdtemp(prefix="xen-"))

    def remove(self) -> None:
        """All of it."""
        shutil.rmtree(self._root)

    def environment(self, domain: int) -> dict[str, str]:
        """What a process in that domain is started with."""
        return {
            **os.environ,
            "LD_LIBRARY_PATH": str(_libraries()),
            "FAKEXEN_DIR": str(self._root),
            "FAKEXEN_DOMAIN": str(domain),
        }

    def lend(self) -> Path:
        """The folder with all of it, libraries included: for machines that see it under another name."""
        shutil.copytree(_libraries(), self._root / "lib", dirs_exist_ok=True)
        return self._root

    def write(self, path: str, value: str) -> None:
        """Write an absolute key of xenstore, as the toolstack does."""
        place = self._root / "store" / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(value)

    def keys(self, path: str) -> list[str]:
        """Names below a key."""
        place = self._root / "store" / path.lstrip("/")
        return sorted(one.name for one in place.iterdir()) if place.is_dir() else []

    def bury(self, domain: int, pid: int) -> None:
        """Do for a process that was killed what the kernel does: clear its signs of life, tell the other ends."""
        for note in self._root.glob(f"notify-{domain}-{pid}-*"):
            ref, offset, port = map(int, note.read_text().split())
            with (self._root / f"page-{ref}").open("r+b") as page:
                page.seek(offset)
                page.write(b"\0")
            note.unlink()
            self._signal(port)

    def _signal(self, port: int) -> None:
        peer = (self._root / f"port-{port}").read_text().split()[1]
        if peer == "0":
            return
        owner = (self._root / f"port-{peer}").read_text().split()[0]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
            sender.setblocking(False)
            sender.sendto(struct.pack("<I", int(peer)), str(self._root / Path(owner).name))
