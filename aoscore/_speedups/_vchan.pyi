"""Xen vchan by libxenvchan (vchan.md §1). Absent where that library was not there at build time."""

MAX_PATH_BYTES: int
"""The library builds key names in buffers of 64 bytes."""
MAX_RING_BYTES: int

class Vchan:
    """One vchan, never blocking. Not for two threads at a time."""

    @staticmethod
    def serve(domain: int, path: str, *, read_bytes: int, write_bytes: int) -> Vchan:
        """Offer a vchan to one domain under `path`, relative to our own home in xenstore.

        Rings are at least as large as asked for; 0 means those inside the first page (1 KiB to read, 2 KiB to write).
        Blocks for round trips to xenstore. Raises OSError, ValueError for a path or a size out of bounds.
        """
    @staticmethod
    def connect(domain: int, path: str) -> Vchan:
        """Attach to the vchan that a domain offers under an absolute path. Raises OSError while there is none."""
    def fileno(self) -> int:
        """Readable on an event: then call `wait`."""
    def wait(self) -> None:
        """Take one event."""
    @property
    def has_peer(self) -> bool:
        """Both ends are there."""
    @property
    def is_over(self) -> bool:
        """The other end was there and has gone; what it wrote before can still be read."""
    def read(self, size: int) -> bytes | None:
        """At most `size` bytes of what is there, empty for nothing now, None for nothing ever again."""
    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write as much as there is room for; how much. When 0, an event tells of room. Raises BrokenPipeError."""
    def close(self) -> None:
        """Let go of it; the other end sees it. Safe to call twice."""

def xenstore_read(path: str) -> str | None:
    """Value of a key, None when there is none. Blocks. Raises OSError."""

def xenstore_list(path: str) -> list[str]:
    """Names below a key. Blocks. Raises OSError."""
