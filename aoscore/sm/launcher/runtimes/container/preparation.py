"""From an installed image to a bundle that crun can run: the files part of a start (sm-runtime.md §2.3 to §2.6)."""

import platform
import time
from collections.abc import Sequence
from pathlib import Path

from aoscore.common.errors import InvalidArgumentError
from aoscore.common.oci import ItemConfig
from aoscore.common.types import InstanceInfo, NodeInfo
from aoscore.sm.imagemanager.model import InstalledImage
from aoscore.sm.launcher.runtimes.container.bundle import Bundle, BundleRecord, prepare_state, prepare_storage
from aoscore.sm.launcher.runtimes.container.config import ContainerConfig
from aoscore.sm.launcher.runtimes.container.seccomp import default_profile
from aoscore.sm.launcher.runtimes.container.spec import CpuCapacity, SpecInput, build_spec, check_platform
from aoscore.sm.networkmanager.model import netns_path
from aoscore.sm.processes import parse_signal
from aoscore.sm.resourcemanager.disks import disks_of
from aoscore.sm.resourcemanager.quotas import STATES, STORAGES, Claim, DiskQuotas
from aoscore.sm.resourcemanager.resources import Resources


class Preparation:
    """Fills bundles. Blocking; called from worker threads."""

    def __init__(
        self,
        config: ContainerConfig,
        node: NodeInfo,
        resources: Resources,
        disk_quotas: DiskQuotas,
    ) -> None:
        if config.state_dir is None or config.storage_dir is None:
            raise InvalidArgumentError("paths of the container runtime are not filled, load_container_config does it")
        self._config = config
        self._state_dir = config.state_dir
        self._storage_dir = config.storage_dir
        self._cpu = CpuCapacity(sum(cpu.num_cores for cpu in node.cpus) or 1, node.max_dmips)
        self._architectures = {cpu.arch_info.architecture for cpu in node.cpus} - {""}
        self._resources = resources
        self._disk_quotas = disk_quotas

    def partitions(self, info: InstanceInfo) -> tuple[tuple[str, Path], ...]:
        """Name and path of what the instance fills."""
        storages = ((STORAGES, self._storage_dir / info.storage_path),) if info.storage_path else ()
        states = ((STATES, self._state_dir / info.state_path),) if info.state_path else ()
        return (*storages, *states)

    def fill(
        self,
        bundle: Bundle,
        info: InstanceInfo,
        image: InstalledImage,
        secret: str,
        *,
        restarts: int = 0,
    ) -> BundleRecord:
        """Write the spec and make mount points, in place of what the bundle held; the record that it is to get.

        What only its network can tell is not in it yet. Raises AosError or OSError naming the thing.
        """
        bundle.create()
        check_platform(image.image_config, self._architectures)
        item = image.item_config or ItemConfig()
        binds = self._config.host_binds if item.base_layer_is_node_rootfs else ()
        state = prepare_state(self._state_dir, info.state_path, info.uid, info.gid)
        storage = prepare_storage(self._storage_dir, info.storage_path, info.uid, info.gid)
        limits = {STATES: item.quotas.state_limit or 0, STORAGES: item.quotas.storage_limit or 0}
        self._disk_quotas.limit(info.uid, [Claim(name, path, limits[name]) for name, path in self.partitions(info)])
        spec = build_spec(
            SpecInput(
                info=info,
                image=image.image_config,
                item=item,
                rootfs=bundle.rootfs,
                cgroup=f"{self._config.cgroup_parent}/{bundle.path.name}",
                cpu=self._cpu,
                netns=netns_path(bundle.path.name),
                secret=secret,
                resources=self._resources.grant(item.resources),
                host_files=[path for path in self._config.host_files if path.exists()],
                state=state,
                storage=storage,
                seccomp=default_profile(platform.machine()) if self._config.seccomp else None,
                capabilities=self._config.capabilities,
                default_pids_limit=self._config.default_pids_limit,
                disk_speed=self._config.disk_speed,
                user_base=self._config.user_namespace_base,
                disks=self._disks(image.layers, state, storage),
            )
        )
        layers = image.layers[::-1]
        record = BundleRecord(
            info,
            started=time.time(),
            registered=bool(secret),
            permissions=item.permissions if secret else {},
            overlays=bundle.plan_overlays(layers, binds),
            run_parameters=item.run_parameters,
            resources=tuple(resource.name for resource in item.resources),
            stop_signal=parse_signal(image.image_config.config.stop_signal or "SIGTERM"),
            restarts=restarts,
        )
        bundle.write_spec(spec)
        bundle.make_mount_points(spec["mounts"], layers, binds)
        return record

    def _disks(self, layers: Sequence[Path], *writable: Path | None) -> list[tuple[int, int]]:
        return disks_of([*layers, *filter(None, writable)]) if self._config.disk_speed.is_limited else []
