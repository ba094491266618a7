import asyncio
from pathlib import Path
from typing import Any

import pytest

from aoscore.common.errors import FailedError, NotFoundError, WrongStateError
from aoscore.common.types import CertInfo, NodeInfo, NodeState
from aoscore.iam.config import Config, NodeInfoConfig
from aoscore.iam.provisioning import Provisioning


class Node:
    """Stands for the current Node."""

    def __init__(self, calls: list[str], state: NodeState) -> None:
        self._calls = calls
        self.info = NodeInfo("n", state=state)

    async def set_state(self, state: NodeState) -> None:
        self._calls.append(f"state {state}")
        self.info = NodeInfo("n", state=state)


class Certs:
    """Stands for the certificate handler; `fail` names the call that does."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls
        self.fail = ""
        self.has_certificate = True

    async def _do(self, name: str) -> None:
        self._calls.append(name)
        await asyncio.sleep(0)
        if self.fail == name:
            self.fail = ""
            raise FailedError(f"{name} failed")

    async def clear(self) -> None:
        await self._do("clear")

    async def set_owner(self, password: str) -> None:
        await self._do(f"owner {password}")

    def get_cert(self, cert_type: str) -> CertInfo:
        if not self.has_certificate:
            raise NotFoundError(f"no {cert_type}")
        return CertInfo(cert_type, "", "")


class Bench:
    def __init__(self, state: NodeState, tmp_path: Path, **hooks: tuple[str, ...]) -> None:
        self.calls: list[str] = []
        self.node = Node(self.calls, state)
        self.certs = Certs(self.calls)
        config = Config(
            node_info=NodeInfoConfig(),
            working_dir=tmp_path,
            iam_public_server_url=":1",
            iam_protected_server_url=":2",
            cert_storage="iam",
            **hooks,  # type: ignore[arg-type]
        )
        self.provisioning = Provisioning(config, self.node, self.certs)  # type: ignore[arg-type]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(NodeState.UNPROVISIONED, tmp_path)


async def test_order_of_steps(bench: Bench) -> None:
    await bench.provisioning.start("pw")
    await bench.provisioning.finish()
    await bench.provisioning.pause()
    await bench.provisioning.resume()
    await bench.provisioning.deprovision()
    assert bench.calls == [
        "clear",
        "owner pw",
        "state provisioned",
        "state paused",
        "state provisioned",
        "state unprovisioned",
    ]


@pytest.mark.parametrize(
    ("fail", "calls"), [("clear", ["clear", "clear"]), ("owner pw", ["clear", "owner pw", "clear"])]
)
async def test_failed_start_leaves_empty_storages(bench: Bench, fail: str, calls: list[str]) -> None:
    bench.certs.fail = fail
    with pytest.raises(FailedError, match=fail):
        await bench.provisioning.start("pw")
    assert bench.calls == calls


ALL = set(NodeState)
ALLOWED = {
    "start": {NodeState.UNPROVISIONED},
    "finish": {NodeState.UNPROVISIONED, NodeState.PROVISIONED},
    "deprovision": {NodeState.PROVISIONED, NodeState.PAUSED, NodeState.ERROR},
    "pause": {NodeState.PROVISIONED, NodeState.PAUSED},
    "resume": {NodeState.PROVISIONED, NodeState.PAUSED},
}


@pytest.mark.parametrize("state", list(NodeState))
@pytest.mark.parametrize("operation", list(ALLOWED))
async def test_states_in_which_an_operation_is_allowed(operation: str, state: NodeState, tmp_path: Path) -> None:
    bench = Bench(state, tmp_path)
    arguments = ["pw"] if operation == "start" else []
    call: Any = getattr(bench.provisioning, operation)
    if state in ALLOWED[operation]:
        await call(*arguments)
    else:
        with pytest.raises(WrongStateError, match=f"node is {state}"):
            await call(*arguments)
        assert bench.calls == []


async def test_finish_without_own_certificate_is_refused(bench: Bench) -> None:
    bench.certs.has_certificate = False
    with pytest.raises(WrongStateError, match="no iam"):
        await bench.provisioning.finish()
    assert bench.calls == []


async def test_repeated_finish_runs_no_hook(tmp_path: Path) -> None:
    bench = Bench(NodeState.PROVISIONED, tmp_path, finish_provisioning_cmd_args=("false",))
    await bench.provisioning.finish()
    assert bench.calls == []


@pytest.mark.parametrize("operation", ["finish", "deprovision"])
async def test_failing_hook_keeps_the_state(operation: str, tmp_path: Path) -> None:
    state = NodeState.UNPROVISIONED if operation == "finish" else NodeState.PROVISIONED
    hook = ("sh", "-c", "echo why; exit 7")
    bench = Bench(state, tmp_path, finish_provisioning_cmd_args=hook, deprovision_cmd_args=hook)
    with pytest.raises(FailedError, match="sh failed with code 7: why"):
        await getattr(bench.provisioning, operation)()
    assert bench.node.info.state is state


async def test_hook_sees_neither_password_nor_notify_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.setenv("CKTEEC_LOGIN_TYPE", "user")
    bench = Bench(NodeState.UNPROVISIONED, tmp_path, disk_encryption_cmd_args=("sh", "-c", "env; echo $*"))
    await bench.provisioning.start("Secret123")
    output = [record.message for record in caplog.records if record.message.startswith("diskEncryption: ")]
    assert "diskEncryption: CKTEEC_LOGIN_TYPE=user" in output
    assert not any("NOTIFY_SOCKET" in line or "Secret123" in line for line in output)
    assert "Secret123" not in caplog.text


async def test_one_operation_at_a_time(bench: Bench) -> None:
    await asyncio.gather(bench.provisioning.start("a"), bench.provisioning.start("b"))
    assert bench.calls == ["clear", "owner a", "clear", "owner b"]
