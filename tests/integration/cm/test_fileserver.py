"""The file server on a Main Node whose own name leads to a loopback address, as its /etc/hosts says."""

import subprocess
from pathlib import Path

import pytest

from aoscore.cm.fileserver import BlobServer
from aoscore.common.errors import AosError
from aoscore.common.http import request
from tests.support.running import running, until

ADDRESS = "10.0.0.100"


async def status(host: str) -> int:
    """What a client at this machine gets for a blob that there is not; 0: there is no server."""
    try:
        return (await request("GET", f"http://{host}:8094/blobs/sha256/{'0' * 64}")).status
    except AosError:
        return 0


@pytest.mark.net
async def test_it_listens_at_the_address_of_the_node_as_soon_as_that_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 main\n")
    subprocess.run(["mount", "--bind", tmp_path / "hosts", "/etc/hosts"], check=True)
    subprocess.run(["ip", "link", "add", "node0", "type", "bridge"], check=True)
    server = BlobServer("main:8094", Path, is_node="127.0.0.1".__eq__, listen_at=[ADDRESS]).server
    async with running(server):
        await until(lambda: f"Waiting for the address of the file server: address={ADDRESS}" in caplog.text)
        assert await status("main") == 404
        for command in (f"address add {ADDRESS}/24 dev node0", "address add 10.0.1.1/24 dev node0"):
            subprocess.run(["ip", *command.split()], check=True)
        subprocess.run(["ip", "link", "set", "node0", "up"], check=True)
        await until(lambda: ADDRESS in server._servers)
        assert [await status(host) for host in ("main", ADDRESS, "10.0.1.1", "127.0.0.1")] == [404, 404, 0, 0]
