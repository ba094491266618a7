"""Who may call a service of the protected port."""

from typing import Any

import grpc
import pytest

from aoscore.common.certs import issuer_der, serial_hex
from aoscore.common.services import Servicer
from aoscore.iam.iamserver.access import AccessList
from tests.support.pki import Issued, TestCa, pem


class Refused(Exception):
    pass


class Context:
    def __init__(self, certificate: Issued | None) -> None:
        self._certificate = certificate

    def peer(self) -> str:
        return "ipv4:1.2.3.4:5"

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [pem(self._certificate.cert).encode()]} if self._certificate else {}

    async def abort(self, code: grpc.StatusCode, text: str) -> None:
        raise Refused(code, text)


class States(Servicer):
    async def PauseNode(self, request: str, context: Any) -> str:
        return f"paused {request}"


async def test_only_the_named_types_get_in(authority: TestCa) -> None:
    known = {name: authority.issue("unit") for name in ("cm", "sm")}
    types = {(issuer_der(one.cert), serial_hex(one.cert)): name for name, one in known.items()}
    access = AccessList({"S": ("cm",)}, lambda issuer, serial: types.get((issuer, serial)))
    guarded: Any = access.guard("S", States())
    assert await guarded.PauseNode("n1", Context(known["cm"])) == "paused n1"
    for caller, name in ((known["sm"], "sm"), (authority.issue("unit"), "unknown"), (None, "unknown")):
        with pytest.raises(Refused) as caught:
            await guarded.PauseNode("n1", Context(caller))
        assert caught.value.args == (grpc.StatusCode.PERMISSION_DENIED, f"S is not for certificates of type {name}")


def test_methods_that_are_not_there_stay_so() -> None:
    guarded = AccessList({"S": ("cm",)}, lambda issuer, serial: None).guard("S", States())
    assert hasattr(guarded, "PauseNode") and not hasattr(guarded, "ResumeNode")


def test_a_service_without_a_list_is_as_it_was() -> None:
    states = States()
    assert AccessList({"S": ("cm",)}, lambda issuer, serial: None).guard("T", states) is states
