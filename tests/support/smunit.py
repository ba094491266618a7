"""The whole SM as a process: real containers and networks, CM and IAM played by the test over mutual TLS."""

import contextlib
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aoscore.common.types import InstanceInfo
from aoscore.sm.launcher.runtimes.base import runtime_id
from tests.support import bed as namespaces
from tests.support.items import tar
from tests.support.smbed import NODE, Child, SmBed, child

PROGRAM = ("-c", "from aoscore.sm.app import main; main()")
RUNTIME_ID = runtime_id("crun", NODE.node_id)


class SmUnit:
    """An SM's surroundings, with services that are one busybox."""

    def __init__(self, bed: SmBed) -> None:
        self.bed = bed
        self.cm = bed.cm

    def service(self, item: str, version: str = "1.0.0", **changes: Any) -> InstanceInfo:
        """A service whose process can be found by item and version."""
        digest = self.bed.blobs.item(
            [tar({"bin/busybox": Path("/bin/busybox").read_bytes()}, mode=0o755)],
            process={
                "entrypoint": ["/bin/busybox", "sh", "-c"],
                "cmd": [f": {item}-{version}-marker; trap 'exit 0' TERM; /bin/busybox sleep 1000000 & wait"],
            },
            item_config={"hostname": item, "baseLayerIsNodeRootfs": False, "quotas": {"pidsLimit": 20}},
        )
        return self.bed.instance(
            item, version, manifest_digest=digest, runtime_id=RUNTIME_ID, uid=5000, gid=5000, **changes
        )

    @contextlib.asynccontextmanager
    async def sm(
        self,
        program: Sequence[str] = PROGRAM,
        verbosity: str = "debug",
        *,
        container: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> AsyncIterator[Child]:
        """The process; each has a log of its own.

        `program`: Python's arguments; `container`: more keys of that runtime; `config`: more keys.
        """
        runtime = {
            "runtimeDir": "/run/aos/runtime",
            "storageDir": str(self.bed.root / "storages"),
            "stateDir": str(self.bed.root / "states"),
            "crunStateRoot": "/run/crun",
            "cgroupParent": namespaces.cgroup_parent(),
            "output": "files",
            **(container or {}),
        }
        path = self.bed.write_config(
            **{
                "runtimes": [{"plugin": "container", "type": "crun", "config": runtime}],
                "monitoring": {"pollPeriod": "1s"},
                **config,
            }
        )
        log = self.bed.root / f"sm-{len(list(self.bed.root.glob('sm-*.log')))}.log"
        async with child(sys.executable, *program, "-c", str(path), "-v", verbosity, log=log) as one:
            try:
                yield one
            except BaseException:
                print(one.text()[-10000:])
                raise
