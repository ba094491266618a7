from types import SimpleNamespace

import pytest

from aoscore.common.errors import NotFoundError
from aoscore.common.types import NodeInfo, SystemInfo
from aoscore.iam.iamserver.nodes import LocalNode, NodeRouter


class Certs:
    async def create_key(self, cert_type: str, subject: str) -> str:
        return f"{cert_type} of {subject}"


class Identifier:
    async def system_info(self) -> SystemInfo:
        return SystemInfo("unit")


def local(identifier: Identifier | None) -> LocalNode:
    return LocalNode(None, Certs(), identifier)  # type: ignore[arg-type]


def test_empty_id_and_own_id_are_this_node() -> None:
    node = local(None)
    router = NodeRouter(SimpleNamespace(info=NodeInfo("n1")), node)  # type: ignore[arg-type]
    assert router.of("") is node and router.of("n1") is node
    for other in ("n2", "N1", "n1 "):
        with pytest.raises(NotFoundError, match=f"node '{other}' is not connected"):
            router.of(other)


async def test_empty_subject_is_the_system_id() -> None:
    assert await local(Identifier()).create_key("cm", "") == "cm of unit"
    assert await local(Identifier()).create_key("cm", "other") == "cm of other"
    assert await local(None).create_key("cm", "other") == "cm of other"
    with pytest.raises(NotFoundError, match="no identifier"):
        await local(None).create_key("cm", "")
