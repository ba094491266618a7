"""The node-facing half of CM put together, with stand-ins for IAM, images and cloud. Also a program, to be killed.

As a program: `python -m tests.support.nodehalf DIRECTORY PORT`. It runs `DIRECTORY/requests.json` if that is there and
writes one JSON line per published list of instance statuses.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec

from aoscore.cm import database
from aoscore.cm.alerts import Alerts, AlertStore
from aoscore.cm.iamclient.subjects import UnitSubjects
from aoscore.cm.launcher.launcher import Launcher, LauncherSettings
from aoscore.cm.launcher.model import RunRequest, UnitInstanceStatus
from aoscore.cm.launcher.nodedriver import DriverSettings
from aoscore.cm.launcher.store import LauncherStore
from aoscore.cm.monitoring import Monitoring, MonitoringStore
from aoscore.cm.networkmanager.dns import DnsServer, DnsSettings
from aoscore.cm.networkmanager.manager import NetworkManager
from aoscore.cm.networkmanager.store import NetworkStore
from aoscore.cm.nodeinfo import NodeInfoProvider
from aoscore.cm.smcontroller.controller import Receivers, SmController
from aoscore.cm.storagestate.manager import StorageState
from aoscore.cm.storagestate.store import StateStore
from aoscore.cm.unitconfig.manager import UnitConfigManager
from aoscore.common import oci
from aoscore.common.aio import Service
from aoscore.common.db import Database, Schema
from aoscore.common.errors import NotFoundError
from aoscore.common.types import (
    InstanceIdent,
    InstanceStatus,
    LogData,
    NodeAlert,
    NodeInfo,
    NodeState,
    SMInfo,
)
from tests.support.running import running
from tests.unit.cm.fakes import FakeLink

FAST = LauncherSettings(
    nodes_connection_timeout_s=5,
    place_first_s=0.2,
    place_limit_s=1,
    check_env_vars_period_s=0.1,
    driver=DriverSettings(reply_timeout_s=2, retry_first_s=0.2, retry_limit_s=1),
)


class FakeIam:
    """Knows nodes and subjects; tells changes."""

    def __init__(self, node_ids: Sequence[str]) -> None:
        self.nodes = {node_id: self._node(node_id) for node_id in node_ids}
        self.subjects: tuple[str, ...] = ()
        self._node_changes: asyncio.Queue[NodeInfo] = asyncio.Queue()
        self._subject_changes: asyncio.Queue[tuple[str, ...]] = asyncio.Queue()

    @staticmethod
    def _node(node_id: str) -> NodeInfo:
        return NodeInfo(
            node_id,
            "main",
            max_dmips=1000,
            total_ram=1024,
            attrs={"AosComponents": "sm,iam"},
            state=NodeState.PROVISIONED,
        )

    def set_node(self, node_id: str, **changes: object) -> None:
        node = msgspec.structs.replace(self.nodes.get(node_id) or self._node(node_id), **changes)
        self.nodes[node_id] = node
        self._node_changes.put_nowait(node)

    def set_subjects(self, *subjects: str) -> None:
        self.subjects = subjects
        self._subject_changes.put_nowait(subjects)

    async def get_node_ids(self) -> tuple[str, ...]:
        return tuple(self.nodes)

    async def get_node(self, node_id: str) -> NodeInfo:
        return self.nodes[node_id]

    async def watch_nodes(self) -> AsyncIterator[NodeInfo]:
        while True:
            yield await self._node_changes.get()

    async def get_subjects(self) -> tuple[str, ...]:
        return self.subjects

    async def watch_subjects(self) -> AsyncIterator[tuple[str, ...]]:
        while True:
            yield await self._subject_changes.get()


class FakeImages:
    """Every item has one manifest; its digest names item and version. `configs` by item id."""

    def __init__(self) -> None:
        self.configs: dict[str, oci.ItemConfig] = {}
        self.missing: set[str] = set()

    def load_index(self, item_id: str, version: str) -> oci.ImageIndex:
        if item_id in self.missing:
            raise NotFoundError(f"item {item_id} not found")
        return oci.ImageIndex((oci.Descriptor(digest=f"sha256:{item_id}-{version}"),))

    def load_manifest(self, digest: str) -> oci.ImageManifest:
        return oci.ImageManifest(oci.Descriptor(digest=digest), aos_item_config=oci.Descriptor(digest=digest))

    def load_image_config(self, digest: str) -> oci.ImageConfig:
        return oci.ImageConfig()

    def load_item_config(self, digest: str) -> oci.ItemConfig:
        item_id = digest.removeprefix("sha256:").rpartition("-")[0]
        return self.configs.get(item_id, oci.ItemConfig())


class NodeHalf:
    """All services of the half, over one database in a directory."""

    def __init__(
        self,
        directory: Path,
        db: Database,
        *,
        node_ids: Sequence[str] = ("n1",),
        port: int = 0,
        settings: LauncherSettings = FAST,
        sm_timeout_s: float = 1.0,
        hold: bool = False,
        configs: dict[str, oci.ItemConfig] | None = None,
        missing: Sequence[str] = (),
    ) -> None:
        self.db = db
        self.cloud = FakeLink()
        self.iam = FakeIam(node_ids)
        self.images = FakeImages()
        self.images.configs.update(configs or {})
        self.images.missing.update(missing)
        self.nodes = NodeInfoProvider(self.iam, sm_timeout_s=sm_timeout_s)
        self.alerts = Alerts(self.cloud, AlertStore(db), send_period_s=0.1, main_node_id=self.nodes.main_node_id)
        self.subjects = UnitSubjects(self.iam)
        self.dns = DnsServer(DnsSettings())
        self.networks = NetworkManager(NetworkStore(db), self.dns, routes=list)
        self.storage = StorageState(
            StateStore(db),
            self.cloud,
            storage_dir=directory / "storages",
            state_dir=directory / "states",
            set_quota=lambda *_: None,
        )
        self.controller = SmController(
            f"127.0.0.1:{port}",
            None,
            cloud=self.cloud,
            networks=self.networks,
            blob_url=lambda digest: f"http://main/{digest}",
            receivers=Receivers(
                sm_info=self._sm_info,
                sm_lost=self._sm_lost,
                node_statuses=self._node_statuses,
                statuses=self._statuses,
                monitoring=lambda node_id, sample: self.monitoring.on_sample(node_id, sample),
                alert=self._alert,
                log=self._log,
            ),
            admit=None,
        )
        self.unit_config = UnitConfigManager(directory / "unit.cfg", self.nodes, self.controller)
        self.launcher = Launcher(
            LauncherStore(db),
            self.nodes,
            self.controller,
            self.images,
            self.storage,
            self.unit_config,
            self.subjects,
            self.cloud,
            settings=settings,
            alert=self.alerts.add_core_alert,
            hold=hold,
        )
        self.monitoring = Monitoring(
            self.cloud,
            MonitoringStore(db),
            nodes=self.nodes.changed,
            instances=self.launcher.changed,
            send_period_s=0.1,
            alert=self.alerts.add_core_alert,
        )

    def services(self) -> list[Service]:
        return [
            self.storage,
            self.alerts,
            self.dns,
            self.nodes,
            self.subjects,
            self.unit_config,
            self.launcher,
            self.monitoring,
            self.controller,
        ]

    def _sm_info(self, info: SMInfo) -> None:
        self.nodes.on_sm_info(info)

    def _sm_lost(self, node_id: str) -> None:
        self.nodes.on_sm_lost(node_id)
        self.launcher.on_sm_lost(node_id)

    def _node_statuses(self, node_id: str, statuses: Sequence[InstanceStatus]) -> None:
        self.launcher.on_node_statuses(node_id, statuses)

    def _statuses(self, node_id: str, statuses: Sequence[InstanceStatus]) -> None:
        self.launcher.on_statuses(node_id, statuses)

    def _alert(self, node_id: str, alert: NodeAlert) -> None:
        self.alerts.on_node_alert(node_id, alert)
        self.launcher.on_node_alert(node_id, alert)

    async def _log(self, node_id: str, log: LogData) -> None:
        raise NotImplementedError

    def status(self, item_id: str, instance: int = 0) -> UnitInstanceStatus:
        """Status of one instance."""
        return next(
            one
            for one in self.launcher.statuses()
            if (one.status.ident.item_id, one.status.ident.instance) == (item_id, instance)
        )

    async def settled(self, timeout_s: float = 10) -> dict[str, str]:
        """Wait until nothing is activating; "item#index" -> "state@node"."""
        async with asyncio.timeout(timeout_s):
            while any(one.status.state == "activating" for one in self.launcher.statuses()):
                await asyncio.sleep(0.02)
        return self.overview()

    def overview(self) -> dict[str, str]:
        return {name(one.status.ident): f"{one.status.state}@{one.node_id}" for one in self.launcher.statuses()}

    async def until(self, expected: dict[str, str], timeout_s: float = 10) -> None:
        """Wait until the overview is as expected."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.overview() != expected:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{self.overview()} is not {expected}") from None


def name(ident: InstanceIdent) -> str:
    return f"{ident.item_id}#{ident.instance}"


def request(item_id: str, count: int = 1, version: str = "1.0.0", **members: object) -> RunRequest:
    """A wish of the cloud."""
    return RunRequest(
        item_id=item_id,
        version=version,
        owner_id="owner",
        subject_id="subject",
        num_instances=count,
        **members,  # type: ignore[arg-type]
    )


@contextlib.asynccontextmanager
async def node_half(directory: Path, **options: object) -> AsyncIterator[NodeHalf]:
    """A running half on the database of the directory."""
    tables = (
        *database.STORAGE_STATE_TABLES,
        *database.NETWORK_MANAGER_TABLES,
        *database.LAUNCHER_TABLES,
        *database.OWN_TABLES,
    )
    async with Database(directory / "cm.db", Schema(create=tables, foreign_keys=True)) as db:
        half = NodeHalf(directory, db, **options)  # type: ignore[arg-type]
        await half.networks.load()
        async with running(*half.services()):
            yield half


async def _main(directory: Path, port: int) -> None:
    configs = {"a": oci.ItemConfig(requested_resources=oci.RequestedResources(cpu=600))}
    async with node_half(directory, port=port, node_ids=("n1", "n2"), configs=configs) as half:
        with half.launcher.changed.subscribe() as changes:
            print("ready", flush=True)
            requests = directory / "requests.json"
            if requests.exists():
                wanted = msgspec.json.decode(requests.read_bytes(), type=list[RunRequest])
                await half.launcher.run_instances(wanted)
                requests.unlink()
            while True:
                print(half.overview(), flush=True)
                await changes.get()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), int(sys.argv[2])))
