"""Anything at all on a gateway's link: it goes on or ends with an error of ours, soon, and holds little meanwhile.

Fixed numbers, so that a failure can be made again: the seed is in the name of the test.
"""

import asyncio
import random
import struct
from collections.abc import Callable

import pytest

from aoscore._pb.servicemanager.v4 import servicemanager_pb2 as v4
from aoscore._pb.transport.v1 import transport_pb2 as transport
from aoscore._speedups import _frames
from aoscore._speedups._plain import frames as plain_frames
from aoscore.common.errors import AosError
from aoscore.mp.communication.connection import Connection, LinkSettings
from aoscore.mp.communication.frames import FrameDecoder, encode_frame, encode_message
from aoscore.mp.legacy import LegacyGateway
from tests.support.links import PORTS, Contexts, contexts, stream_pair
from tests.support.pki import TestCa

HELLO = transport.Control(hello=transport.Hello(protocol=1, role="node", max_frame=65536, ports=[16, 3, 1, 2, 4]))
CLOCK = v4.SMOutgoingMessages(clock_sync_request=v4.ClockSyncRequest()).SerializeToString()
CLIENT_HELLO = bytes.fromhex("16 0301 0200 01 0001fc 0303") + bytes(64)
STREAMS = 40
SMALL_FRAMES = 1_000_000


def frame(rng: random.Random) -> bytes:
    """One frame, or what is left of one."""
    port = rng.choice([1, 2, 3, 4, 16, 17, 18, rng.randrange(2**32)])
    message = rng.choice(
        [
            CLOCK,
            HELLO.SerializeToString(),
            transport.Control(ping=transport.Ping(seq=rng.randrange(2**64))).SerializeToString(),
            transport.Control(reset=transport.Reset(port=port, reason="fuzz")).SerializeToString(),
            rng.randbytes(rng.randrange(200)),
        ]
    )
    payload = rng.choice([encode_message(message), message, CLIENT_HELLO, b"", rng.randbytes(rng.randrange(3000))])
    wire = bytearray(encode_frame(port, payload))
    match rng.randrange(12):
        case 0:
            wire[rng.randrange(len(wire))] ^= 1 << rng.randrange(8)
        case 1:
            struct.pack_into("<I", wire, 4, rng.choice([65_537, 2**32 - 1, rng.randrange(2**32)]))
        case 2:
            del wire[rng.randrange(len(wire)) :]
    return bytes(wire)


def stream(seed: int) -> tuple[bytes, list[int]]:
    """What a stranger sends, and where it is cut into pieces."""
    rng = random.Random(seed)
    begin = rng.choice([b"", encode_frame(16, encode_message(HELLO.SerializeToString())), encode_frame(3, b"")])
    wire = begin + b"".join(frame(rng) for _ in range(rng.randrange(1, 60)))
    return wire, sorted(rng.randrange(len(wire) + 1) for _ in range(rng.randrange(20)))


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Contexts:
    return contexts("gateway", TestCa().identity(tmp_path_factory.mktemp("pki"), "main"))


async def survive(tls: Contexts, seed: int) -> BaseException | None:
    """What the gateway ended the link with; the stranger goes at the end in any case."""
    reader, writer, peer_reader, peer = await stream_pair()
    connection = Connection(reader, writer, LinkSettings(role="gateway", ports=PORTS), tls, peer="stranger")

    async def serve(one: Connection) -> None:
        async with asyncio.TaskGroup() as tasks:
            for service in LegacyGateway(PORTS.cm_open, []).services(one) if one.is_legacy else []:
                tasks.create_task(service)
            await asyncio.get_running_loop().create_future()

    running = asyncio.create_task(connection.run(serve))
    listening = asyncio.create_task(peer_reader.read(-1))
    wire, cuts = stream(seed)
    for begin, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        peer.write(wire[begin:end])
        await asyncio.sleep(0)
    peer.close()
    async with asyncio.timeout(30):
        (ended,) = await asyncio.gather(running, return_exceptions=True)
        await asyncio.gather(listening, return_exceptions=True)
    return ended


@pytest.mark.parametrize("part", range(4))
async def test_any_stream_is_survived(tls: Contexts, part: int) -> None:
    outcomes = set()
    for seed in range(part * STREAMS, (part + 1) * STREAMS):
        ended = await survive(tls, seed)
        assert isinstance(ended, AosError | OSError), (seed, ended)
        outcomes.add(type(ended))
    assert len(outcomes) > 1, "all ended in the same way: the streams try too little"


@pytest.mark.parametrize("part", range(4))
def test_native_module_and_its_twin_take_any_stream_alike(part: int) -> None:
    """Frames of any split; what is in them as records, as pieces of downloads, and those damaged in every way."""
    for seed in range(part * 100, (part + 1) * 100):
        rng = random.Random(seed)
        wire, cuts = stream(seed)
        cutters = _frames.FrameCutter(), plain_frames.FrameCutter()
        payloads = []
        for begin, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
            runs, expected = (cutter.feed(wire[begin:end]) for cutter in cutters)
            assert runs == expected, seed
            payloads += [bytes(payload) for _, found in runs for payload in found]
        assert (cutters[0].refused, cutters[0].begun_bytes) == (cutters[1].refused, cutters[1].begun_bytes), seed
        messages = [damaged(rng, piece(rng)) for _ in range(50)] + payloads
        for most_bytes in (0, 1000, 2**63):
            joined = [module.join_pieces(messages, most_bytes) for module in (_frames, plain_frames)]
            assert joined[0] == joined[1], seed
        for payload in payloads:
            assert outcome(_frames.encode_records, payload) == outcome(plain_frames.encode_records, payload), seed


def piece(rng: random.Random) -> bytes:
    """A message with a piece of a download; some follow one another."""
    offset = rng.choice([0, 100, 2**32 - 50, 2**63, 2**64 - 101]) + rng.choice([0, 0, 50])
    return plain_frames.encode_pieces(rng.choice([0, 1, 2**64 - 1]), offset, rng.randbytes(50), 50)[4:]


def damaged(rng: random.Random, message: bytes) -> bytes:
    """Half of them as they are."""
    changed = bytearray(message)
    match rng.randrange(6):
        case 0:
            changed[rng.randrange(len(changed))] = rng.choice([0, 0x7F, 0x80, 0xFF])
        case 1:
            del changed[rng.randrange(len(changed)) :]
        case 2:
            place = rng.randrange(len(changed))
            changed[place:place] = rng.choice([b"\xff" * 9, b"\xff" * 9 + b"\x01", b"\x80" * 12, b"\x00"])
    return bytes(changed)


def outcome(encode: Callable[[int, bytes, int], object], payload: bytes) -> object:
    """What comes of a payload that is taken for TLS records."""
    try:
        return encode(17, payload, 1000)
    except ValueError as error:
        return str(error)


def test_streams_can_be_made_again() -> None:
    assert stream(3) == stream(3) != stream(4)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("size", [0, 5])
def test_a_million_small_frames(size: int) -> None:
    """However they are cut; what waits never grows beyond a frame."""
    rng = random.Random(size)
    block = b"".join(encode_frame(number % 7, number.to_bytes(8, "big")[-size:] * (size > 0)) for number in range(1000))
    decoder = FrameDecoder()
    found = 0
    for _ in range(SMALL_FRAMES // 1000):
        cut = rng.randrange(len(block))
        for piece in (block[:cut], block[cut:]):
            for port, payloads in decoder.feed(piece):
                assert [*map(len, payloads)] == [size] and port == found % 1000 % 7
                found += 1
            assert decoder.begun_bytes < 48
    assert found == SMALL_FRAMES and not decoder.begun_bytes
