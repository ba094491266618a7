"""The directory that SM shares with the initramfs (sm-runtime.md §3.1, §3.3). Everything here blocks.

Each change is one rename or removal that is durable before the next, in an order that lets a power cut after any of
them be told from all other cases (see ``state``). What tells the initramfs to act is always written last.
"""

from pathlib import Path

import msgspec

from aoscore.common.errors import InvalidArgumentError
from aoscore.common.files import fsync_dir, write_atomic
from aoscore.sm.imagemanager.model import Payload
from aoscore.sm.launcher.runtimes.component import (
    Component,
    copy_payload,
    load,
    load_or_drop,
    read_version,
    remove_durably,
    remove_partial_files,
    save,
)
from aoscore.sm.launcher.runtimes.rootfs.state import Found

IMAGE = "image.squashfs"
_SQUASHFS_MAGIC = b"hsqs"
_KINDS = {"vnd.aos.image.component.full": "full", "vnd.aos.image.component.inc": "incremental"}


class Progress(msgspec.Struct, frozen=True, rename="camel"):
    """Own file ``progress.json``: what the files of the contract do not say. AosCore 9.1 takes no notice of it."""

    boot_id: str = ""
    """The boot in which a reboot was asked for last."""
    reboots: int = 0
    """Boots since then that changed nothing."""
    confirmed: bool = False


def update_kind(media_type: str) -> str:
    """Content of ``do_update`` for a payload. Raises InvalidArgumentError for one that is no component image."""
    for mark, kind in _KINDS.items():
        if mark in media_type:
            return kind
    raise InvalidArgumentError(f"media type {media_type!r} is no full or incremental component image")


class UpdateFiles:
    """See the module text."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._installed = directory / "installed_instance.json"
        self._pending = directory / "pending_instance.json"
        self._progress = directory / "progress.json"

    # Reading

    def installed(self) -> Component | None:
        """What runs when nothing is under way."""
        return load_or_drop(self._installed, Component)

    def pending(self) -> Component | None:
        """What is being installed."""
        return load_or_drop(self._pending, Component)

    def find(self, pending: Component | None, version_file: Path, boot_id: str) -> Found:
        """The situation, for ``state.decide``."""
        progress = load_or_drop(self._progress, Progress) or Progress()
        failed = self._directory / "failed"
        return Found(
            running=read_version(version_file),
            pending=pending.version if pending else None,
            confirmed=progress.confirmed,
            reboots=progress.reboots + (progress.boot_id != boot_id),
            failed=failed.read_text(errors="replace").strip() if failed.exists() else None,
            **{name: (self._directory / name).exists() for name in ("updated", "do_apply", "do_update")},
        )

    # Writing

    def save_installed(self, component: Component) -> None:
        """Note what runs."""
        save(self._installed, component)

    def prepare(self, component: Component, payload: Payload, boot_id: str) -> None:
        """Lay an update ready for the next boot. Raises InvalidArgumentError, ChecksumError or OSError."""
        kind = update_kind(payload.media_type)
        with payload.path.open("rb") as file:
            if file.read(len(_SQUASHFS_MAGIC)) != _SQUASHFS_MAGIC:
                raise InvalidArgumentError(f"payload {payload.digest} is no squashfs image")
        copy_payload(payload, self._directory / IMAGE)
        # Our initramfs checks it; that of AosCore 9.1 takes no notice.
        line = f"{payload.digest.removeprefix('sha256:')}  {IMAGE}\n"
        write_atomic(self._directory / "image.sha256", line.encode())
        save(self._progress, Progress(boot_id))
        save(self._pending, component)
        self._write("do_update", kind)

    def confirm(self, boot_id: str) -> None:
        """The trial went well: apply at the next boot."""
        save(self._progress, Progress(boot_id, confirmed=True))
        self._write("do_apply", "")

    def refuse(self, boot_id: str, reason: str) -> None:
        """The trial went wrong: revert at the next boot."""
        save(self._progress, Progress(boot_id))
        # Where it stands, the initramfs looks at nothing else.
        self._remove("do_apply")
        self._write("failed", reason)

    def note_reboots(self, found: Found, boot_id: str) -> None:
        """A reboot is asked for again."""
        save(self._progress, Progress(boot_id, found.reboots, found.confirmed))

    def forget_pending(self) -> None:
        """CM does not want to hear of it."""
        remove_durably(self._pending)

    def complete(self) -> Component:
        """The pending version is the installed one; which that is."""
        component = load(self._pending, Component)
        assert component is not None  # noqa: S101 - the table says so
        self._pending.rename(self._installed)
        fsync_dir(self._directory)
        self.clean()
        return component

    def clean(self) -> None:
        """Delete all of an update; repeatable.

        The initramfs must not find half of it, so what makes it act goes first. `failed` goes last: as long as the
        pending record is there, it says what became of it.
        """
        self._remove("do_update", "do_apply", "updated")
        remove_partial_files(self._directory)
        images = self._directory.glob("*.squashfs")
        remove_durably(*images, self._directory / "image.sha256", self._pending, self._progress)
        self._remove("failed")

    def _write(self, name: str, text: str) -> None:
        write_atomic(self._directory / name, text.encode())

    def _remove(self, *names: str) -> None:
        remove_durably(*(self._directory / name for name in names))
