"""RegisterSM and RegisterNode for the local SM and IAM, as CM and main IAM serve them. Node."""

import logging
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from typing import Any

from aoscore.common.errors import AosError
from aoscore.common.log import kv
from aoscore.mp.communication.connection import Stream
from aoscore.mp.communication.relay import relay_to_client, unavailable

_log = logging.getLogger(__name__)


class StreamProxy:
    """One method that is a channel.

    `connect` opens the channel; `through` gives what to send in place of a message of the local client. The newest call
    counts: an older one is of a process that has restarted.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Awaitable[Stream]],
        through: Callable[[bytes], Sequence[bytes]] = lambda message: (message,),
    ) -> None:
        self._name = name
        self._connect = connect
        self._through = through
        self._stream: Stream | None = None

    async def serve(self, requests: AsyncIterable[bytes], context: Any) -> None:
        _log.debug(kv("Local client calls", call=self._name))
        if self._stream is not None:
            self._stream.abort(f"{self._name} is called anew")
        try:
            async with await self._connect() as stream:
                self._stream = stream
                _log.info(kv("Registered at the Main Node", call=self._name))
                try:
                    await relay_to_client(stream, requests, context, through=self._through)
                finally:
                    if self._stream is stream:
                        self._stream = None
        except AosError as error:
            _log.warning(kv("Not registered at the Main Node", call=self._name, reason=error))
            await unavailable(context, error)
