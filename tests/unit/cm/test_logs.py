"""Log requests and answers."""

from datetime import UTC, datetime

from aoscore.cm.communication.messages import Identity, LogFilter, LogType, PushLog, RequestLog
from aoscore.cm.logs import LogForwarder
from aoscore.cm.logupload import LogUploads
from aoscore.common.errors import NotFoundError
from aoscore.common.types import InstanceFilter, LogData, LogKind, LogRequest, LogStatus
from tests.unit.cm.fakes import FakeLink

NOW = datetime(2026, 3, 1, tzinfo=UTC)


class FakeSource:
    def __init__(self) -> None:
        self.requests: list[tuple[str, LogRequest]] = []

    async def request_log(self, node_id: str, request: LogRequest) -> None:
        if node_id == "gone":
            raise NotFoundError("node gone is not connected")
        self.requests.append((node_id, request))


def request(*node_ids: str, **members: object) -> RequestLog:
    nodes = tuple(Identity(codename=node_id) for node_id in node_ids)
    return RequestLog(
        correlation_id="c",
        log_type=LogType.INSTANCE,
        filter=LogFilter(node_ids=nodes, from_=NOW, **members),  # type: ignore[arg-type]
    )


async def test_named_nodes_and_an_answer_for_the_missing_one() -> None:
    link, source = FakeLink(), FakeSource()
    forwarder = LogForwarder(link, source, LogUploads(link), node_ids=lambda: ["a", "b"])
    await forwarder.on_request(request("gone", "b", item=Identity(id="i"), instance=0))
    wanted = LogRequest(LogKind.INSTANCE, "c", InstanceFilter("i", None, 0), NOW, None)
    assert source.requests == [("b", wanted)]
    (answer,) = link.sent
    assert isinstance(answer, PushLog)
    assert (answer.correlation_id, answer.node.codename, answer.status) == ("c", "gone", LogStatus.ABSENT)
    assert (answer.part, answer.parts_count) == (0, 0)
    assert answer.error_info is not None
    assert answer.error_info.aos_code == 5


async def test_defect_10_no_names_mean_all_nodes() -> None:
    """AosCore 9.1 acknowledges the request and forgets it (observed.md, defect 10)."""
    source = FakeSource()
    await LogForwarder(FakeLink(), source, LogUploads(FakeLink()), node_ids=lambda: ["a", "b"]).on_request(request())
    assert [node_id for node_id, _ in source.requests] == ["a", "b"]


async def test_parts_are_pushed() -> None:
    link = FakeLink()
    forwarder = LogForwarder(link, FakeSource(), LogUploads(link), node_ids=list)
    await forwarder.on_log("a", LogData("c", LogStatus.OK, part_count=2, part=1, data=b"gz"))
    assert link.sent == [
        PushLog(
            correlation_id="c",
            node=Identity(codename="a"),
            part=1,
            parts_count=2,
            content=b"gz",
            status=LogStatus.OK,
        )
    ]
