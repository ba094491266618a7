"""What HTTP handlers share: the peer's certificate, and faults on requests."""

import asyncio

from aiohttp import web
from cryptography import x509

from aoscore.devcloud.faults import Faults


def peer_certificate(request: web.Request) -> x509.Certificate | None:
    """The client certificate of a TLS connection, already checked against the root; None without one."""
    ssl_object = request.transport.get_extra_info("ssl_object") if request.transport else None
    der = ssl_object.getpeercert(binary_form=True) if ssl_object else None
    return x509.load_der_x509_certificate(der) if der else None


def abort(request: web.Request) -> None:
    """Cut the TCP connection without a closing word."""
    if request.transport is not None:
        request.transport.abort()


async def apply_request_faults(
    faults: Faults, request: web.Request, place: str, unit: str = "*", digest: str = "*"
) -> web.Response | None:
    """Commit the faults of one request: waits, cuts, or gives the wrong answer to send instead."""
    if fault := faults.take("delay", on=place, unit=unit, digest=digest):
        await asyncio.sleep(fault.seconds)
    if faults.take("drop_connection", on=place, unit=unit, digest=digest):
        abort(request)
        raise asyncio.CancelledError
    if fault := faults.take("http_status", on=place, unit=unit, digest=digest):
        return web.Response(status=fault.status, text="fault injected")
    return None
