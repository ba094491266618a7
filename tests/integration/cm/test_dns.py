"""The name server with a real dnsmasq, in namespaces of its own."""

import asyncio
import os
import shutil
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from aoscore.cm.networkmanager.dns import DnsServer, DnsSettings, dnsmasq_arguments
from aoscore.common.aio import Backoff
from tests.support.running import running

ADDRESS = "10.0.0.100"
RUN = Path("/run")
"""dnsmasq gives up root and must still reach its files, which it could not in a directory of the test framework."""
A, AAAA = 1, 28
DNSMASQ = shutil.which("dnsmasq") or ""

needs_dnsmasq = pytest.mark.skipif(not DNSMASQ, reason="dnsmasq is not installed")


@pytest.fixture
def address() -> None:
    """The address of the server, on a link of this test's network."""
    for command in ("link add aosdns0 type bridge", f"addr add {ADDRESS}/24 dev aosdns0", "link set aosdns0 up"):
        subprocess.run(["ip", *command.split()], check=True)


async def ask(name: str, kind: int) -> bytes | None:
    """The server's answer about the records of a kind (RFC 1035 §3.2.2) of a name; None when it is away."""
    question = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    query = struct.pack(">HHHHHH", 1, 0x0100, 1, 0, 0, 0) + question + b"\0" + struct.pack(">HH", kind, 1)
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setblocking(False)
        client.connect((ADDRESS, 53))
        try:
            async with asyncio.timeout(0.5):
                await loop.sock_sendall(client, query)
                return await loop.sock_recv(client, 512)
        except (TimeoutError, ConnectionError):
            return None


async def resolve(name: str) -> list[str]:
    """Ask the server for the addresses of a name; none when it knows none or is away."""
    answer = await ask(name, A)
    if answer is None:
        return []
    count = struct.unpack(">H", answer[6:8])[0]
    return [socket.inet_ntoa(answer[len(answer) - 16 * n - 4 :][:4]) for n in range(count)]


async def resolves_to(name: str, *addresses: str) -> None:
    async with asyncio.timeout(10):
        while set(await resolve(name)) != set(addresses):
            await asyncio.sleep(0.05)


def settings(program: str) -> DnsSettings:
    return DnsSettings(ip=ADDRESS, storage_path=RUN / "dns", pid_file=RUN / "dnsmasq" / "pid", program=program)


@pytest.mark.net
@needs_dnsmasq
@pytest.mark.usefixtures("address")
async def test_own_dnsmasq_follows_the_names_and_is_kept_running() -> None:
    server = DnsServer(settings(DNSMASQ), retry=lambda: Backoff(0.1, 0.2))
    async with running(server):
        server.write("172.17.0.3\tweb\t0.subject.item\n172.17.0.4\tweb\n")
        await resolves_to("web", "172.17.0.3", "172.17.0.4")
        await resolves_to("0.subject.item", "172.17.0.3")
        server.write("172.17.0.9\tother\n")
        await resolves_to("other", "172.17.0.9")
        await resolves_to("web")
        pid = int((RUN / "dnsmasq" / "pid").read_text())
        os.kill(pid, 9)
        async with asyncio.timeout(10):
            while not (text := _read(RUN / "dnsmasq" / "pid")) or int(text) == pid:
                await asyncio.sleep(0.05)
        await resolves_to("other", "172.17.0.9")
        pid = int(_read(RUN / "dnsmasq" / "pid"))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.net
@needs_dnsmasq
@pytest.mark.usefixtures("address")
async def test_no_address_of_another_kind_is_an_answer_also_when_there_is_no_other_server() -> None:
    """A refusal makes some resolvers give up the name."""
    subprocess.run(["mount", "--bind", "/dev/null", "/etc/resolv.conf"], check=True)
    server = DnsServer(settings(DNSMASQ), retry=lambda: Backoff(0.1, 0.2))
    async with running(server):
        server.write("172.17.0.3\tweb\n")
        await resolves_to("web", "172.17.0.3")
        answer = await ask("web", AAAA)
        assert answer is not None
        code, answers = answer[3] & 0xF, struct.unpack(">H", answer[6:8])[0]
        assert (code, answers) == (0, 0)


@pytest.mark.net
@needs_dnsmasq
@pytest.mark.usefixtures("address")
async def test_foreign_dnsmasq_is_told_as_soon_as_it_is_there() -> None:
    server = DnsServer(settings(""), retry=lambda: Backoff(0.1, 0.2))
    async with running(server):
        server.write("172.17.0.3\tweb\n")
        await asyncio.sleep(0.3)
        (RUN / "dnsmasq").mkdir()
        process = await asyncio.create_subprocess_exec(*dnsmasq_arguments(settings(DNSMASQ)))
        try:
            await resolves_to("web", "172.17.0.3")
            server.write("172.17.0.4\tweb\n")
            await resolves_to("web", "172.17.0.4")
        finally:
            process.kill()
            await process.wait()
        server.write("172.17.0.5\tweb\n")
        await asyncio.sleep(0.3)
        assert (RUN / "dns" / "addnhosts").read_text() == "172.17.0.5\tweb\n"


@pytest.mark.net
@needs_dnsmasq
@pytest.mark.usefixtures("address")
async def test_dnsmasq_left_by_a_killed_cm_is_replaced() -> None:
    (RUN / "dns").mkdir()
    (RUN / "dns" / "addnhosts").write_text("172.17.0.1\told\n")
    (RUN / "dnsmasq").mkdir()
    left = await asyncio.create_subprocess_exec(*dnsmasq_arguments(settings(DNSMASQ)))
    await resolves_to("old", "172.17.0.1")
    async with running(DnsServer(settings(DNSMASQ), retry=lambda: Backoff(0.1, 0.2))) as _:
        assert await asyncio.wait_for(left.wait(), 10) == 0
        await resolves_to("old", "172.17.0.1")


async def test_without_address_there_is_no_server(tmp_path: Path) -> None:
    server = DnsServer(DnsSettings(storage_path=tmp_path / "dns"))
    async with running(server):
        assert server.servers == ()
        server.write("1.2.3.4\tx\n")
        assert not (tmp_path / "dns").exists()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
