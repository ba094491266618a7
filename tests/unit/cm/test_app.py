"""CM as it is installed on a device: no more than its own extra, and a lean start; parts of its composition root."""

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from aoscore.cm.app import DownloadTls
from aoscore.cm.config import ImageManagerConfig
from aoscore.common.aio import Worker
from aoscore.common.download import Downloader
from aoscore.common.errors import FailedError
from aoscore.common.tls import TlsIdentity
from aoscore.common.types import CertInfo
from tests.support.pki import TestCa

# Modules of other components, of tests and of the local cloud: not there where only the extra `cm` is installed.
NOT_INSTALLED = (
    "psutil pyroute2 pyudev zstandard dbus_fast aiohttp jsonschema jwt yaml pytest hypothesis Cython grpc_tools"
)

PROGRAM = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_INSTALLED.split()!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed with the extra cm")

sys.meta_path.insert(0, Refuse())
import aoscore.cm.app
foreign = [name for name in sys.modules if name.split(".")[:2] in [["aoscore", part] for part in
           ("sm", "iam", "mp", "devcloud", "ctl")]]
assert not foreign, foreign
print("ok")
"""


def test_the_program_needs_no_more_than_its_own_extra() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


class FakeIam:
    """Gives out certificates, and counts."""

    def __init__(self, identity: TlsIdentity) -> None:
        self.identity = identity
        self.asked: list[str] = []

    async def get_cert(self, cert_type: str) -> CertInfo:
        self.asked.append(cert_type)
        return CertInfo(cert_type, self.identity.cert_url, self.identity.key_url)


@pytest.mark.parametrize("cert_type", ["online", ""])
async def test_download_servers_see_our_certificate_where_configured(tmp_path: Path, cert_type: str) -> None:
    ca = TestCa()
    peers: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        subject = writer.get_extra_info("peercert")["subject"]
        peers.append(dict(part for parts in subject for part in parts)["commonName"])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nblob")
        writer.close()

    context = ca.identity(tmp_path, "server").ssl_server_context()
    server = await asyncio.start_server(answer, "localhost", 0, ssl=context)
    iam = FakeIam(ca.identity(tmp_path, "unit-1"))
    settings = ImageManagerConfig(download_ca_cert=ca.write_root(tmp_path), download_cert_storage=cert_type)
    async with server, Worker("test") as worker:
        tls = DownloadTls(settings, iam, worker)  # type: ignore[arg-type]
        url = f"https://localhost:{server.sockets[0].getsockname()[1]}/x"
        downloader = Downloader(worker, tls=tls.context, attempts=1)
        with contextlib.nullcontext() if cert_type else pytest.raises(FailedError):
            await downloader.download(url, tmp_path / "x", size=4)
    assert (peers, iam.asked) == ((["unit-1"], ["online"]) if cert_type else ([], []))
