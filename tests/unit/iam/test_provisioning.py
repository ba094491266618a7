import asyncio
from pathlib import Path
from typing import Any

import pytest

from aoscore.common.errors import DeadlineError, FailedError, NotFoundError, WrongStateError
from aoscore.common.types import CertInfo, Duration, NodeInfo, NodeState
from aoscore.iam.config import Config, NodeInfoConfig
from aoscore.iam.provisioning import Provisioning
from tests.support.running import until


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


class Unfinished:
    """Stands for the database."""

    def __init__(self) -> None:
        self.operations: set[str] = set()

    async def unfinished(self) -> frozenset[str]:
        return frozenset(self.operations)

    async def begin(self, operation: str) -> None:
        self.operations.add(operation)

    async def end(self, operation: str) -> None:
        self.operations.discard(operation)


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
        self.unfinished = Unfinished()
        self.provisioning = Provisioning(config, self.node, self.certs, self.unfinished)  # type: ignore[arg-type]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(NodeState.UNPROVISIONED, tmp_path)


async def test_order_of_steps(bench: Bench) -> None:
    await bench.provisioning.start("pw")
    await bench.provisioning.finish("pw")
    await bench.provisioning.pause()
    await bench.provisioning.resume()
    await bench.provisioning.deprovision("pw")
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
    assert bench.unfinished.operations == set()


async def test_start_that_is_broken_off_leaves_empty_storages(tmp_path: Path) -> None:
    bench = Bench(NodeState.UNPROVISIONED, tmp_path, disk_encryption_cmd_args=("sleep", "60"))
    starting = asyncio.create_task(bench.provisioning.start("pw"))
    await until(lambda: len(bench.calls) == 2)
    assert bench.provisioning.busy and bench.unfinished.operations
    starting.cancel()
    await asyncio.wait({starting})
    assert starting.cancelled() and bench.calls == ["clear", "owner pw", "clear"]
    assert bench.unfinished.operations == set() and not bench.provisioning.busy


async def test_interrupted_start_is_undone_after_a_restart(bench: Bench) -> None:
    await bench.provisioning.recover()
    assert bench.calls == []
    await bench.unfinished.begin("start provisioning")
    await bench.provisioning.recover()
    assert bench.calls == ["clear"] and bench.unfinished.operations == set()


async def test_what_cannot_be_undone_cannot_be_finished(bench: Bench) -> None:
    await bench.unfinished.begin("start provisioning")
    bench.certs.fail = "clear"
    await bench.provisioning.recover()
    with pytest.raises(WrongStateError, match="start it again"):
        await bench.provisioning.finish("pw")
    await bench.provisioning.start("pw")
    await bench.provisioning.finish("pw")


async def test_interrupted_start_of_a_node_that_is_in_service_is_history(tmp_path: Path) -> None:
    bench = Bench(NodeState.PROVISIONED, tmp_path)
    await bench.unfinished.begin("start provisioning")
    await bench.provisioning.recover()
    assert bench.calls == [] and bench.unfinished.operations == set()


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
    arguments = [] if operation in ("pause", "resume") else ["pw"]
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
        await bench.provisioning.finish("pw")
    assert bench.calls == []


async def test_repeated_finish_runs_no_hook(tmp_path: Path) -> None:
    bench = Bench(NodeState.PROVISIONED, tmp_path, finish_provisioning_cmd_args=("false",))
    await bench.provisioning.finish("pw")
    assert bench.calls == []


@pytest.mark.parametrize("operation", ["finish", "deprovision"])
async def test_failing_hook_keeps_the_state(operation: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = NodeState.UNPROVISIONED if operation == "finish" else NodeState.PROVISIONED
    hook = ("sh", "-c", "echo first; echo why; exit 7")
    bench = Bench(state, tmp_path, finish_provisioning_cmd_args=hook, deprovision_cmd_args=hook)
    caplog.set_level("INFO")
    with pytest.raises(FailedError, match="sh failed with code 7: why"):
        await getattr(bench.provisioning, operation)("pw")
    assert bench.node.info.state is state
    assert ": first" in caplog.text


@pytest.mark.parametrize("operation", ["start", "finish", "deprovision"])
async def test_hanging_hook_is_killed_and_its_last_words_are_told(operation: str, tmp_path: Path) -> None:
    state = NodeState.PROVISIONED if operation == "deprovision" else NodeState.UNPROVISIONED
    hook = ("sh", "-c", "echo working; exec sleep 60")
    args = dict.fromkeys(("start_provisioning", "finish_provisioning", "deprovision"), hook)
    bench = Bench(state, tmp_path, **{f"{name}_cmd_args": value for name, value in args.items()})
    bench.provisioning._hooks._timeout_s = Duration(0.3)
    with pytest.raises(DeadlineError, match=r"sh did not end within 0.3 s and was killed: working"):
        await getattr(bench.provisioning, operation)("pw")
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


async def test_hooks_get_the_password_of_their_call_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    names = ("start_provisioning", "disk_encryption", "finish_provisioning", "deprovision")
    hooks: dict[str, tuple[str, ...]] = {
        f"{name}_cmd_args": ("sh", "-c", f'printf %s "$AOS_PROVISIONING_PASSWORD" > {tmp_path}/{name}')
        for name in names
    }
    bench = Bench(NodeState.UNPROVISIONED, tmp_path, hooks_get_password=True, **hooks)  # type: ignore[arg-type]
    await bench.provisioning.start("first")
    await bench.provisioning.finish("second")
    await bench.provisioning.deprovision("third")
    assert [(tmp_path / name).read_text() for name in names] == ["first", "first", "second", "third"]
    assert not any(word in caplog.text for word in ("first", "second", "third"))


async def test_one_operation_at_a_time(bench: Bench) -> None:
    await asyncio.gather(bench.provisioning.start("a"), bench.provisioning.start("b"))
    assert bench.calls == ["clear", "owner a", "clear", "owner b"]
