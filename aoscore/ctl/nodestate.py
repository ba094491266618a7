"""`aosctl node`: what follows when a node's provisioning state changes (yocto.md §6, iam.md §6).

IAM's hooks start these as transient units, so that they outlive IAM and their ends are in the journal.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aoscore.common.errors import ConfigError, DeadlineError, NotFoundError
from aoscore.ctl.run import Run, run_program

# IAM changes the state right after its hook (iam.md §6.2).
STATE_TIMEOUT_S = 60.0
# Then the answer has to get out before IAM is stopped.
ANSWER_PAUSE_S = 1.0
_POLL_S = 0.1
# Where the tokens of a PKCS#11 library are, by its file name.
_TOKENS = {"libsofthsm2.so": Path("/var/lib/softhsm/tokens"), "libckteec.so.0": Path("/var/lib/tee")}
_OPTEE = _TOKENS["libckteec.so.0"]


@dataclass(frozen=True)
class Place:
    """Where this node keeps what belongs to its provisioning, from IAM's configuration file."""

    state_file: Path
    iam_dir: Path
    key_dirs: tuple[Path, ...]
    encrypted_disk: bool
    is_main: bool = False

    @property
    def marker(self) -> Path:
        """There from the order to deprovision until all is wiped, over power cuts too."""
        return self.state_file.with_name(".deprovision")


def read_place(config_file: Path) -> Place:
    """Raises NotFoundError or ConfigError naming the file."""
    try:
        config: dict[str, Any] = {key.lower(): value for key, value in json.loads(config_file.read_bytes()).items()}
        info = {key.lower(): value for key, value in config["nodeinfo"].items()}
        dirs = []
        for params in (module["params"] for module in config.get("certmodules", [])):
            if "storagePath" in params:
                dirs.append(Path(params["storagePath"]))
            elif (library := Path(params.get("library", "")).name) in _TOKENS:
                dirs.append(_TOKENS[library])
        return Place(
            state_file=Path(info.get("provisioningstatepath", "/var/aos/.provisionstate")),
            iam_dir=Path(config["workingdir"]),
            key_dirs=tuple(dict.fromkeys(dirs)),
            encrypted_disk=bool(config.get("diskencryptioncmdargs")),
            is_main="MainNode" in info.get("attrs", {}),
        )
    except FileNotFoundError:
        raise NotFoundError(f"configuration file {config_file} does not exist") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{config_file}: {error}") from error


def finish(place: Place, run: Run = run_program) -> None:
    """Provisioning is finished: give the node over to its daemons once the state says so."""
    _wait(place.state_file.exists, f"state file {place.state_file}")
    time.sleep(ANSWER_PAUSE_S)
    place.marker.unlink(missing_ok=True)
    run(["sync"])
    if place.is_main:
        # They look at their file systems when they start, and those have just been made; only where they run.
        for unit in ("nfs-server.service", "rpc-rquotad.service"):
            if run(["systemctl", "list-units", "--no-legend", "--state=active", unit]).strip():
                run(["systemctl", "restart", unit])
    run(["systemctl", "restart", "aos.target"])


def deprovision(place: Place, run: Run = run_program) -> None:
    """Deprovisioning was ordered: stop the daemons, wipe, and start as a new node. Can be repeated at any point.

    Raises DeadlineError when IAM keeps the node's state; nothing is wiped then, not later either.
    """
    try:
        _wait(lambda: not place.state_file.exists(), f"end of state file {place.state_file}")
    except DeadlineError:
        place.marker.unlink(missing_ok=True)
        raise
    place.marker.touch()
    time.sleep(ANSWER_PAUSE_S)
    # The target's own stop does not wait for its units: IAM would be started again before it has ended.
    units = run(["systemctl", "show", "--property=ConsistsOf", "--value", "aos.target"]).decode().split()
    run(["systemctl", "stop", "aos.target", *sorted(units)])
    wipe(place, run)
    # OP-TEE's supplicant remembers what it had open.
    run(["systemctl", "reboot"] if _OPTEE in place.key_dirs else ["systemctl", "start", "aos.target"])


def wipe(place: Place, run: Run = run_program) -> None:
    """Remove keys, certificates and data disk of a node that was ordered to be deprovisioned; else do nothing.

    A state file that is lost is no order: IAM restores it (iam.md §16).
    """
    if place.state_file.exists() or not place.marker.exists():
        return
    if place.encrypted_disk:
        run(["/opt/aos/setupdisk.sh", "delete"])
    clear_keys(place)
    _empty(place.iam_dir)
    run(["sync"])
    place.marker.unlink()


def clear_keys(place: Place) -> None:
    """Empty the directories of tokens and keys."""
    for directory in place.key_dirs:
        _empty(directory)


def _empty(directory: Path) -> None:
    if not directory.is_dir():
        return
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _wait(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + STATE_TIMEOUT_S
    while not done():
        if time.monotonic() > deadline:
            raise DeadlineError(f"waited {STATE_TIMEOUT_S:g} s for {what}")
        time.sleep(_POLL_S)
