"""Connections of clients by TCP, plain or with TLS, wherever the key of TLS is."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

from aoscore.common.errors import DeadlineError, FailedError, UnreachableError
from aoscore.common.tls import TokenContext

# What is read of a socket at a time, so that reading need not pause after each time.
_LIMIT_BYTES = 256 * 1024


@contextlib.asynccontextmanager
async def open_connection(
    host: str, port: int, context: ssl.SSLContext | None, *, timeout_s: float
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Both directions of a connection to host and port; leaving the block drops it.

    Without `context` it is plain. Raises DeadlineError and FailedError naming the address.
    """
    where = f"{host}:{port}"
    async with contextlib.AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(timeout_s):
                if isinstance(context, TokenContext):
                    # Import on use: a Unit whose keys are files never needs it.
                    from aoscore.common.relay import tls_pipe

                    near = await stack.enter_async_context(tls_pipe(host, port, context))
                    reader, writer = await asyncio.open_connection(sock=near, limit=_LIMIT_BYTES)
                else:
                    name = host if context is not None else None
                    reader, writer = await asyncio.open_connection(
                        host, port, ssl=context, server_hostname=name, limit=_LIMIT_BYTES
                    )
        except TimeoutError:
            raise DeadlineError(f"can't connect to {where} within {timeout_s:g} s") from None
        except ssl.SSLError as error:
            raise FailedError(f"TLS with {where} failed: {error.reason or error}") from error
        except OSError as error:
            raise UnreachableError(f"can't connect to {where}: {error.strerror or error}") from error
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
