"""IAM with a vehicle information service: identity from there, permissions for there."""

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from tests.support.iam import Iam
from tests.support.pki import TestCa
from tests.support.vis import SUBJECTS, VIN, TestVis

pytestmark = pytest.mark.timeout(120)

DOOR = "Attribute.Car.Door"


class RunningVis:
    """The service in a thread of its own, for tests that block."""

    def __init__(self, vis: TestVis) -> None:
        self.vis = vis
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    @contextlib.contextmanager
    def running(self) -> Iterator["RunningVis"]:
        self._thread.start()
        stack = contextlib.AsyncExitStack()
        try:
            self.call(stack.enter_async_context(self.vis.running()))
            yield self
        finally:
            self.call(stack.aclose())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


@pytest.fixture
def service_tls(authority: TestCa, tmp_path: Path) -> ssl.SSLContext:
    authority.issue("vis").write(tmp_path, "vis")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "vis.pem", tmp_path / "vis.key")
    return context


def with_vis(make_iam: Callable[..., Iam], vis: TestVis, root: Path) -> Iam:
    params = {"visServer": vis.url, "caCertFile": str(root), "webSocketTimeout": "2s"}
    return make_iam(identifier={"plugin": "visidentifier", "params": params})


def test_identity_comes_from_the_service_and_is_kept(
    make_iam: Callable[..., Iam], service_tls: ssl.SSLContext, authority: TestCa, tmp_path: Path
) -> None:
    root = authority.write_root(tmp_path)
    vis = TestVis(service_tls)
    vis.values[VIN] = "unit-1"
    with RunningVis(vis).running() as service:
        iam = with_vis(make_iam, vis, root)
        iam.provision()
        iam.start()
        with iam.open() as client:
            assert client.identity.GetSystemInfo(Empty()).unit_model == "model"
            changes = client.identity.SubscribeSubjectsChanged(Empty())
            service.call(vis.set(SUBJECTS, ["s2"]))
            while list(next(changes).subjects) != ["s2"]:
                pass
    iam.kill()
    iam.start()
    with iam.open() as client:
        assert client.identity.GetSystemInfo(Empty()).system_id == "unit-1"
        assert client.identity.GetSubjects(Empty()).subjects == ["s2"]


def test_service_that_was_never_there_does_not_stop_iam(make_iam: Callable[..., Iam], tmp_path: Path) -> None:
    vis = TestVis()
    vis.port = 1
    iam = with_vis(make_iam, vis, tmp_path / "ca")
    iam.start(provisioning=True)
    with iam.plain() as client:
        assert client.node.GetCurrentNodeInfo(Empty()).node_id == "node-1"
        with pytest.raises(grpc.RpcError, match="has not told the identity of the Unit yet") as caught:
            client.identity.GetSystemInfo(Empty())
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        client.start_provisioning()
        answer = client.issue.CreateKey(pb.CreateKeyRequest(type="iam"))
        assert answer.error.aos_code == 7 and "has not told" in answer.error.message


def test_instance_may_do_at_the_service_what_it_was_registered_for(
    unit: Iam, service_tls: ssl.SSLContext, authority: TestCa
) -> None:
    """The whole way of a permission: SM registers, the instance shows its secret, aos-vis asks IAM by v5."""
    ident = common.InstanceIdent(item_id="item", subject_id="subject")
    rights = {"vis": pb.Permissions(permissions={DOOR: "r"})}
    with unit.secure("sm") as client:
        secret = client.instances.RegisterInstance(
            pb.RegisterInstanceRequest(instance=ident, permissions=rights)
        ).secret
    vis = TestVis(service_tls, (unit.public, authority.root_pem))
    vis.values[DOOR] = "closed"
    trusted = ssl.create_default_context(cadata=authority.root_pem.decode())

    async def talk() -> list[dict[str, Any]]:
        answers = []
        async with aiohttp.ClientSession() as session, session.ws_connect(vis.url, ssl=trusted) as socket:
            for request in (
                {"action": "get", "path": DOOR},
                {"action": "authorize", "tokens": {"authorization": "wrong"}},
                {"action": "authorize", "tokens": {"authorization": secret}},
                {"action": "get", "path": DOOR},
                {"action": "set", "path": DOOR, "value": "open"},
            ):
                await socket.send_json({**request, "requestId": str(len(answers))})
                answers.append(await socket.receive_json(timeout=15))
        return answers

    with RunningVis(vis).running() as service:
        before, wrong, right, read, written = service.call(talk())
    assert before["error"]["number"] == 403
    assert wrong["error"]["number"] == 401
    assert right["ttl"] == 10000
    assert read["value"] == "closed"
    assert written["error"]["number"] == 403
