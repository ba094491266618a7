"""Which link belongs to which node; which addresses a node may ask for."""

import asyncio
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives import serialization

from aoscore.common.errors import InvalidArgumentError
from aoscore.mp.communication.connection import Connection
from aoscore.mp.gateway import NodeIds, OfferedUrls
from tests.support.pki import TestCa


class FakeConnection:
    def __init__(self) -> None:
        self.node_id = ""
        self.node_known = asyncio.Event()
        self.peer = "peer"
        self.shut_for: list[str] = []
        self.certificates: dict[int, bytes] = {}

    def shut(self, reason: str) -> None:
        self.shut_for.append(reason)


def link() -> Any:
    return cast("Connection", FakeConnection())


async def test_first_id_stays() -> None:
    ids, one = NodeIds(), link()
    ids.claim(one, "a")
    ids.claim(one, "a")
    assert (one.node_id, one.node_known.is_set(), one.shut_for) == ("a", True, [])
    with pytest.raises(InvalidArgumentError, match="belongs to node a, not to b"):
        ids.claim(one, "b")
    assert one.shut_for == ["node a says that it is b"]


async def test_newer_link_of_a_node_closes_the_older() -> None:
    ids, older, newer = NodeIds(), link(), link()
    ids.claim(older, "a")
    ids.claim(newer, "a")
    assert older.shut_for and not newer.shut_for
    ids.forget(older)
    newest = link()
    ids.claim(newest, "a")
    assert newer.shut_for


def test_only_what_was_offered() -> None:
    offered = OfferedUrls()
    offered.add(["http://cm/1", "http://cm/2"])
    assert "http://cm/1" in offered
    assert "http://cm/3" not in offered
    offered.add([f"http://cm/x{number}" for number in range(4095)])
    assert "http://cm/1" not in offered and "http://cm/2" in offered


async def test_another_key_does_not_push_a_node_out() -> None:
    ca = TestCa()
    own, foreign = (ca.issue(name) for name in ("own", "foreign"))
    renewed = ca.issue("own again", key=own.key)
    ids, node, stranger, again = NodeIds(), link(), link(), link()
    for one, issued in ((node, own), (stranger, foreign), (again, renewed)):
        one.certificates[4] = issued.cert.public_bytes(serialization.Encoding.DER)
    ids.claim(node, "a")
    with pytest.raises(InvalidArgumentError, match="node a is connected with another key"):
        ids.claim(stranger, "a")
    assert stranger.shut_for and not node.shut_for and not stranger.node_id
    ids.claim(again, "a")
    assert node.shut_for and not again.shut_for
    ids.forget(again)
    newcomer = link()
    newcomer.certificates[4] = stranger.certificates[4]
    ids.claim(newcomer, "a")
    assert newcomer.node_id == "a"
