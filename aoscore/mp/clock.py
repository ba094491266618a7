"""The clock of a node, set by the Main Node's (mp.md §8). Node, but for `main_time`.

Certificates have dates, so secure channels wait for a clock that is right. One that the kernel reports as synchronized,
by NTP for example, is right already and is left alone.
"""

import asyncio
import ctypes
import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

import aoscore
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.common.aio import Backoff
from aoscore.common.errors import AosError
from aoscore.common.log import kv
from aoscore.mp.config import ClockSyncConfig
from aoscore.mp.nodeserver.link import NodeLink

_log = logging.getLogger(__name__)

_TIME_ERROR = 5
"""State of a clock that nothing has synchronized (adjtimex(2))."""
_TIMEX_BYTES = 1024
_REQUEST = pb.ProxyOutgoingMessages(clock_sync_request=pb.ClockSyncRequest()).SerializeToString()
_ANSWER_TIMEOUT_S = 10.0
_BUILT_S = Path(aoscore.__file__).stat().st_mtime


def main_time(built_s: float = _BUILT_S) -> Timestamp:
    """Our time, as a gateway tells it to its nodes; a clock from before `built_s` (Unix time) is told of."""
    now = Timestamp()
    now.GetCurrentTime()
    if now.seconds < built_s:
        _tell_of_old_clock()
    return now


@functools.cache
def _tell_of_old_clock() -> None:
    """Once: nodes ask every minute."""
    _log.error("The clock of the Main Node is older than this software: its nodes set theirs by it")


class ClockRule:
    """What follows from an answer, and when the clock counts as right. Pure; `now_s` are seconds that only grow."""

    def __init__(self, config: ClockSyncConfig) -> None:
        self._config = config
        self._answered_s: float | None = None

    def on_answer(self, main_s: float, ours_s: float, now_s: float, *, is_synchronized: bool) -> float | None:
        """The Main Node says `main_s`, our clock `ours_s` (Unix time): what to set our clock to, or None."""
        self._answered_s = now_s
        if self._config.enabled == "auto" and is_synchronized:
            return None
        return main_s if abs(main_s - ours_s) > self._config.max_time_diff_s else None

    def has_lost_it(self, now_s: float) -> bool:
        """Whether the last answer is too old to trust."""
        return self._answered_s is not None and now_s - self._answered_s > self._config.timeout_s


def kernel_is_synchronized() -> bool:
    """Whether something, such as NTP, keeps the system clock right (adjtimex(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    state: int = libc.adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    return 0 <= state < _TIME_ERROR


def set_clock(unix_s: float) -> None:
    """Set the system clock. Raises OSError without the capability."""
    time.clock_settime(time.CLOCK_REALTIME, unix_s)


class ClockSync:
    """Asks for the time over every link. `link.has_time` is set once the clock is right, and stays so."""

    def __init__(
        self,
        config: ClockSyncConfig,
        link: NodeLink,
        port: int,
        *,
        is_synchronized: Callable[[], bool] = kernel_is_synchronized,
        set_time: Callable[[float], None] = set_clock,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._link = link
        self._port = port
        self._is_synchronized = is_synchronized
        self._set_time = set_time
        self._now = now
        self._rule = ClockRule(config)
        if config.enabled is False or (config.enabled == "auto" and is_synchronized()):
            link.has_time.set()

    async def follow(self) -> None:
        """Ask as long as the link is up, until cancelled."""
        if self._config.enabled is False:
            return
        backoff = Backoff(1.0, 10.0)
        has_warned = False
        while True:
            try:
                await self._ask()
                pause_s = float(self._config.send_period_s)
                backoff.reset()
                has_warned = False
            except (AosError, OSError, TimeoutError) as error:
                pause_s = backoff.next()
                _log.warning(kv("Can't take the time of the Main Node", error=error, next_try_s=round(pause_s, 1)))
                if self._rule.has_lost_it(asyncio.get_running_loop().time()) and not has_warned:
                    has_warned = True
                    _log.error("The clock is no longer compared with the Main Node's")
            await asyncio.sleep(pause_s)

    async def _ask(self) -> None:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S), await self._link.connect(self._port) as stream:
            await stream.send(_REQUEST)
            while True:
                main_s = _time_in(await stream.receive())
                if main_s is not None:
                    break
        loop_s = asyncio.get_running_loop().time()
        ours_s = self._now()
        wanted_s = self._rule.on_answer(main_s, ours_s, loop_s, is_synchronized=self._is_synchronized())
        if wanted_s is not None:
            _log.warning(kv("Clock is set to the Main Node's", difference_s=round(wanted_s - ours_s, 1)))
            self._set_time(wanted_s)
        if not self._link.has_time.is_set():
            _log.info("Clock is right: secure channels may open")
            self._link.has_time.set()


def _time_in(message: bytes) -> float | None:
    """Unix time of a clock_sync, None for any other message."""
    try:
        incoming = pb.ProxyIncomingMessages.FromString(message)
    except DecodeError:
        return None
    if incoming.WhichOneof("ProxyIncomingMessage") != "clock_sync":
        return None
    now = incoming.clock_sync.current_time
    return float(now.seconds) + now.nanos / 1e9
