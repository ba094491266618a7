"""Where a container's output goes: journald where there is one, else size-limited files.

journald: standard output and error *are* journal streams, so that journald sees the container's own processes as the
senders and stores their control group as trusted field (sm-runtime.md §2.10). The streams carry the instance id as
identifier, so entries are found without trusted fields too.

Files: conmon writes ``<dir>/<instanceID>/output.log`` with a time stamp per line. When it has grown to half the limit
it is renamed to ``output.log.1`` and conmon told to go on in a new one. A service that floods its log is told of: what
is lost then is not what nobody wanted any more.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from aoscore.sm.launcher.runtimes.container.config import OutputKind

LOG_NAME = "output.log"
OLD_LOG_NAME = "output.log.1"
_JOURNAL_STREAM = Path("/run/systemd/journal/stdout")
_PRIORITY_INFO = 6
# conmon's control pipe: "2 0 0" asks it to open its log file anew.
_REOPEN_LOG = b"2 0 0\n"
_FLOOD_S = 60.0
"""Whoever fills half of the limit faster than that floods its log."""


class ConmonOutput(msgspec.Struct, frozen=True):
    """How to start one conmon: its log arguments and, with "passthrough", what the container inherits."""

    arguments: tuple[str, ...]
    stdout: int | None = None
    stderr: int | None = None


class ContainerOutput(Protocol):
    """One kind of output."""

    def prepare(self, instance_id: str) -> contextlib.AbstractContextManager[ConmonOutput]:
        """What conmon is started with; descriptors are closed on our side when the block ends."""
        ...

    def tend(self, instance_id: str, bundle: Path) -> bool:
        """Called now and then for each running instance: keep its files within their limit.

        Returns whether it writes so much that what was said a minute ago is lost.
        """
        ...


class JournalOutput:
    """Standard streams that are connected to journald."""

    @contextlib.contextmanager
    def prepare(self, instance_id: str) -> Iterator[ConmonOutput]:
        """Two streams with the instance id as identifier. Raises OSError when journald is gone."""
        with _journal_stream(instance_id) as stdout, _journal_stream(instance_id) as stderr:
            yield ConmonOutput(("--log-path", "passthrough"), stdout.fileno(), stderr.fileno())

    def tend(self, instance_id: str, bundle: Path) -> bool:
        """journald has limits of its own."""
        return False


class FileOutput:
    """Files below one directory."""

    def __init__(self, root: Path, max_size_bytes: int) -> None:
        self._root = root
        self._max_size_bytes = max_size_bytes
        self._seen: dict[str, tuple[int, int]] = {}
        """Number and size of each file when it was looked at last."""

    @contextlib.contextmanager
    def prepare(self, instance_id: str) -> Iterator[ConmonOutput]:
        """The file driver; conmon itself starts over in place should nobody rename the file in time."""
        folder = self._root / instance_id
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        arguments = ("--log-path", f"k8s-file:{folder / LOG_NAME}", "--log-size-max", str(self._max_size_bytes))
        yield ConmonOutput((*arguments, "--no-sync-log"))

    def tend(self, instance_id: str, bundle: Path) -> bool:
        """Rename a file that has reached half the limit."""
        log = self._root / instance_id / LOG_NAME
        old = log.with_name(OLD_LOG_NAME)
        seen = self._seen.pop(instance_id, None)
        try:
            now = log.stat()
        except FileNotFoundError:
            return False
        # Not by us: conmon had to start over since the last look.
        floods = seen is not None and (now.st_ino != seen[0] or now.st_size < seen[1])
        if now.st_size < self._max_size_bytes // 2:
            self._seen[instance_id] = now.st_ino, now.st_size
            return floods
        with contextlib.suppress(FileNotFoundError):
            # Without a reader on the pipe there is no conmon, hence nobody who would go on in a new file.
            control = os.open(bundle / "ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                with contextlib.suppress(FileNotFoundError):
                    floods = floods or time.time() - old.stat().st_mtime < _FLOOD_S
                log.rename(old)
                os.write(control, _REOPEN_LOG)
            finally:
                os.close(control)
        return floods


def choose_output(kind: OutputKind, root: Path, max_size_bytes: int) -> ContainerOutput:
    """The configured output; "auto" takes the journal where journald listens."""
    if kind is OutputKind.JOURNAL or (kind is OutputKind.AUTO and _JOURNAL_STREAM.is_socket()):
        return JournalOutput()
    return FileOutput(root, max_size_bytes)


@contextlib.contextmanager
def _journal_stream(identifier: str) -> Iterator[socket.socket]:
    # The header of systemd's stream protocol: identifier, unit (unused), default priority, and four flags of which
    # the first lets lines carry a "<N>" priority prefix (as sd_journal_stream_fd(3) does).
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as stream:
        stream.connect(str(_JOURNAL_STREAM))
        stream.shutdown(socket.SHUT_RD)
        stream.sendall(f"{identifier}\n\n{_PRIORITY_INFO}\n1\n0\n0\n0\n".encode())
        yield stream
