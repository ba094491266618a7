"""One file, link or directory of a Node, and how it gets below a root directory."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Entry:
    """One entry of a Node's root file system; everything belongs to root.

    `content` is text of a file, or what a link points to; directories have none. Kind "lines" is for files that belong
    to others: its lines are added to what is there. `part` is the share of the Node it belongs to, one of `PARTS`.
    Links have no mode.
    """

    path: str
    content: str
    part: str
    mode: int = 0o644
    kind: Literal["file", "lines", "link", "directory"] = "file"


def write(entries: Iterable[Entry], root: Path) -> list[Path]:
    """Put the entries below `root`; what is there by their names is replaced. Returns the paths, in order.

    Files are not made durable: this is for making images and for installing, not for a running Node's data.
    """
    written = []
    for entry in entries:
        path = root / entry.path.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if entry.kind == "directory":
            path.mkdir(exist_ok=True)
        elif entry.kind == "lines":
            _add_lines(path, entry.content)
        else:
            # Never through a link that is already there.
            path.unlink(missing_ok=True)
            if entry.kind == "link":
                path.symlink_to(entry.content)
            else:
                path.write_text(entry.content)
        if entry.kind != "link":
            path.chmod(entry.mode)
        written.append(path)
    return written


def _add_lines(path: Path, content: str) -> None:
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        text += "\n"
    present = text.splitlines()
    path.write_text(text + "".join(f"{line}\n" for line in content.splitlines() if line not in present))
