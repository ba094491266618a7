"""Frames against the byte vectors of the wire contract (mp-wire §3)."""

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from aoscore._pb.iamanager.v6 import iamanager_pb2 as iam
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as sm
from aoscore.mp.communication.frames import FrameDecoder, MessageDecoder, encode_frame, encode_message

CLOCK = sm.ClockSync(current_time=Timestamp(seconds=1700000000))

VECTORS = [
    (
        3,
        bytes.fromhex("5a00"),  # clock_sync_request of servicemanager.v4
        "03000000 06000000 8bf02e954b03815c71a23e6c54327fde82548150522839ae927af47e0542df12 02000000 5a00",
    ),
    (
        3,
        sm.ProxyOutgoingMessages(clock_sync_request=sm.ClockSyncRequest()).SerializeToString(),
        "03000000 06000000 109b594c87e88571c00082718f97116a028dacc96406deaaa20842c94cada891 02000000 2200",
    ),
    (
        3,
        bytes.fromhex("72080a060880e2cfaa06"),  # clock_sync of servicemanager.v4
        "03000000 0e000000 495951b15cafc45798eeaf129f01133bf0125fb90d85056ca99d5d6f0bf3cf31 "
        "0a000000 72080a060880e2cfaa06",
    ),
    (
        3,
        sm.ProxyIncomingMessages(clock_sync=CLOCK).SerializeToString(),
        "03000000 0e000000 8b4105ec9a88c9cded30fa69be56cf9ee9080c1e2ad88656a237f24718424864 "
        "0a000000 12080a060880e2cfaa06",
    ),
    (
        1,
        iam.IAMOutgoingMessages(start_provisioning_response=iam.StartProvisioningResponse()).SerializeToString(),
        "01000000 06000000 ced0d739ca76bd2ca4dedf43ae23a8ed9aa14bc41fc25723f6cca64ffe13457c 02000000 1200",
    ),
]
EMPTY = bytes.fromhex("07000000 00000000 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")


@pytest.mark.parametrize(("port", "message", "wire"), VECTORS)
def test_vector_in_both_directions(port: int, message: bytes, wire: str) -> None:
    expected = bytes.fromhex(wire)
    assert encode_frame(port, encode_message(message)) == expected
    ((found, (payload,)),) = FrameDecoder().feed(expected)
    assert found == port
    assert list(MessageDecoder(1024).feed(payload)) == [message]


def test_empty_payload() -> None:
    assert encode_frame(7, b"") == EMPTY
    assert list(FrameDecoder().feed(EMPTY)) == [(7, [b""])]
