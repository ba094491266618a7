"""dnsmasq for the instances of one owner: names of the instances here, everything else from CM's servers.

It lives on when SM ends and is adopted by the next SM through its pid file; while SM runs, it is started again when
it ends (sm-runtime.md §6.6 and §7, D37).
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from aoscore.common.aio import Backoff, Worker, log_and_continue
from aoscore.common.errors import AosError
from aoscore.common.files import remove_tree, write_atomic
from aoscore.common.log import kv
from aoscore.common.process import start_program
from aoscore.sm.networkmanager.model import Network
from aoscore.sm.processes import ProcessWatch, is_alive, terminate

_log = logging.getLogger(__name__)

DNS_DIR = Path("/run/aos/dns")
_STOP_TIMEOUT_S = 3.0
_HOST_RESOLV_CONF = Path("/etc/resolv.conf")


class Records(msgspec.Struct, frozen=True):
    """What one instance brings: its address, its names, the servers CM gave it."""

    ip: str
    names: tuple[str, ...]
    dns_servers: tuple[str, ...]
    ipv6: str = ""


def hosts_text(network_id: str, records: Mapping[str, Records]) -> str:
    """dnsmasq's hosts file: every name also with the network's id behind it. Pure."""
    lines = []
    for instance_id, record in sorted(records.items()):
        names = [variant for name in record.names for variant in (name, f"{name}.{network_id}")]
        for address in filter(None, (record.ip, record.ipv6)):
            lines.append("\t".join([address, *dict.fromkeys(names)]) + f" # {instance_id}\n")
    return "".join(lines)


def servers_text(records: Iterable[Records], host_resolv_conf: str) -> str:
    """dnsmasq's servers file: CM's servers, or those of the host when CM gave none. Pure."""
    servers = [server for record in records for server in record.dns_servers]
    if not servers:
        lines = [line.split() for line in host_resolv_conf.splitlines()]
        servers = [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"]
    return "".join(f"server={server}\n" for server in dict.fromkeys(servers))


class DnsServer:
    """dnsmasq of one network: `update` while it serves, `stop` for good."""

    def __init__(self, network: Network, worker: Worker, tasks: asyncio.TaskGroup, *, root: Path = DNS_DIR) -> None:
        self._network = network
        self._worker = worker
        self._tasks = tasks
        self._folder = root / network.network_id
        self._pid_file = self._folder / "pid"
        self._supervision: asyncio.Task[None] | None = None

    async def update(self, records: Mapping[str, Records]) -> None:
        """Write its files; start it, or have it read them again."""
        changed = await self._worker.run(self._write, dict(records))
        if self._supervision is None:
            self._supervision = self._tasks.create_task(self._supervise(), name=f"dns {self._network.network_id}")
        if changed and (pid := self._running_pid()) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGHUP)

    async def stop(self) -> None:
        """End it and delete its files."""
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.wait({self._supervision})
        await stop_leftover(self._folder)

    async def _supervise(self) -> None:
        backoff = Backoff(1.0, 60.0)
        while True:
            with log_and_continue(_log, f"Can't run dnsmasq for network {self._network.network_id}"):
                pid, child = self._running_pid(), None
                if pid is None:
                    child = await self._start()
                    pid = child.pid
                with ProcessWatch(pid) as process:
                    if not await process.ended(10.0):
                        backoff.reset()
                        await process.ended()
                if child is not None:
                    child.poll()
                _log.warning(kv("dnsmasq ended, starting it again", network=self._network.network_id))
            await asyncio.sleep(backoff.next())

    async def _start(self) -> "subprocess.Popen[bytes]":
        program = shutil.which("dnsmasq") or "/usr/sbin/dnsmasq"
        return await start_program(
            [
                *(program, "--keep-in-foreground", "--no-hosts", "--no-resolv", "--conf-file=/dev/null"),
                *("--bind-interfaces", "--except-interface=lo", f"--interface={self._network.bridge}"),
                *(f"--listen-address={self._network.ip}", f"--pid-file={self._pid_file}"),
                *(f"--addn-hosts={self._folder / 'hosts'}", f"--servers-file={self._folder / 'servers'}"),
            ]
        )

    def _running_pid(self) -> int | None:
        return running_pid(self._pid_file)

    def _write(self, records: dict[str, Records]) -> bool:
        """Whether a file is different now. dnsmasq reads them without privileges."""
        self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        host = _HOST_RESOLV_CONF.read_text() if _HOST_RESOLV_CONF.exists() else ""
        contents = {
            "hosts": hosts_text(self._network.network_id, records),
            "servers": servers_text(records.values(), host),
        }
        changed = False
        for name, content in contents.items():
            path = self._folder / name
            if not path.exists() or path.read_text() != content:
                write_atomic(path, content.encode(), mode=0o644)
                changed = True
        return changed


def running_pid(pid_file: Path) -> int | None:
    """Pid of the dnsmasq that wrote the file; None when it has ended, also if another process has its number."""
    try:
        pid = int(pid_file.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if f"--pid-file={pid_file}".encode() in command.split(b"\0") and is_alive(pid) else None


async def stop_leftover(folder: Path) -> None:
    """End the dnsmasq of a folder, if any, and delete the folder."""
    pid = running_pid(folder / "pid")
    if pid is not None:
        await terminate(pid, _STOP_TIMEOUT_S)
    remove_tree(folder)


async def stop_unknown(known: Iterable[str], *, root: Path = DNS_DIR) -> None:
    """End what serves networks that are gone."""
    for folder in root.iterdir() if root.is_dir() else ():
        if folder.name not in known:
            try:
                await stop_leftover(folder)
            except (AosError, OSError) as error:
                _log.warning(kv("Can't remove leftovers of dnsmasq", folder=folder, error=error))
