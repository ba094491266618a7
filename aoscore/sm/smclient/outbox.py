"""What waits to be sent to CM. Pure: the client takes the next value out and says when it was written.

CM may be away for long, so every kind has its limit and its own way of staying useful (sm.md §12, D1):

* statuses: the last one per instance; all are dropped for a complete list, which also begins every connection;
* alerts: a ring, whose losses are counted and reported as an alert;
* monitoring samples: only the newest few;
* logs: the sender waits; a reply that a broken connection cut is sent again from its first part;
* answers to CM's questions: only on the connection that asked.
"""

from collections import deque
from datetime import UTC, datetime

from aoscore.common.errors import FailedError, to_error_info
from aoscore.common.types import (
    CoreAlert,
    InstanceIdent,
    InstanceStatus,
    LogData,
    LogStatus,
    NodeAlert,
    NodeConfigStatus,
    NodeMonitoring,
)
from aoscore.sm.launcher.model import NodeStatuses
from aoscore.sm.smclient.messages import Answer, AverageMonitoring, Outgoing, StatusChanges, Value

ALERTS = 512
SAMPLES = 8
LOG_BYTES = 4 * 1024 * 1024
"""Log data that may wait, and as much again that is kept to be sent anew."""


class Outbox:
    """See the module text."""

    def __init__(self) -> None:
        self._answers: deque[Answer] = deque()
        self._complete: NodeStatuses | None = None
        self._statuses: dict[InstanceIdent, InstanceStatus] = {}
        self._alerts: deque[NodeAlert] = deque()
        self._lost_alerts = 0
        self._loss_report: tuple[CoreAlert, int] | None = None
        self._samples: deque[NodeMonitoring] = deque(maxlen=SAMPLES)
        self._logs: deque[LogData] = deque()
        self._log_bytes = 0
        # Written parts of the reply that is being sent; None once there were too many to keep.
        self._written: list[LogData] | None = []
        self._unkept = ""
        self._given_up: str | None = None

    @property
    def has_room_for_logs(self) -> bool:
        """Whether the sender of logs may go on."""
        return self._log_bytes < LOG_BYTES

    def put(self, value: Value | Answer) -> None:
        """Add a value; may drop older ones of its kind."""
        match value:
            case NodeStatuses():
                self._complete = value
                self._statuses.clear()
            case InstanceStatus():
                # Moved to the end: the order of the last changes is kept.
                self._statuses.pop(value.ident, None)
                self._statuses[value.ident] = value
            case NodeMonitoring():
                self._samples.append(value)
            case LogData():
                if value.correlation_id != self._given_up:
                    self._logs.append(value)
                    self._log_bytes += len(value.data)
            case NodeConfigStatus() | AverageMonitoring():
                self._answers.append(value)
            case _:
                if len(self._alerts) == ALERTS:
                    self._alerts.popleft()
                    self._lost_alerts += 1
                self._alerts.append(value)

    def connected(self, statuses: NodeStatuses) -> None:
        """A new connection: it begins with the complete list, and a cut log reply begins anew."""
        self._answers.clear()
        self.put(statuses)
        if self._written is None:
            self._replace_reply()
        else:
            self._logs.extendleft(reversed(self._written))
            self._log_bytes += sum(len(part.data) for part in self._written)
        self._written = []

    def next(self) -> Outgoing | None:
        """The value to write now; it stays until `written`. None when nothing waits."""
        if self._complete is not None:
            return self._complete
        if self._answers:
            return self._answers[0]
        if self._statuses:
            return StatusChanges(tuple(self._statuses.values()))
        if self._lost_alerts:
            report = CoreAlert(datetime.now(UTC), "SM", f"{self._lost_alerts} alerts were lost while CM was away")
            self._loss_report = report, self._lost_alerts
            return report
        if self._alerts:
            return self._alerts[0]
        if self._samples:
            return self._samples[0]
        return self._logs[0] if self._logs else None

    def written(self, value: Outgoing) -> None:
        """The value that `next` gave is on the wire."""
        if value is self._complete:
            self._complete = None
        elif self._answers and value is self._answers[0]:
            self._answers.popleft()
        elif isinstance(value, StatusChanges):
            for status in value.statuses:
                # A newer status of the instance may have come while this one was written.
                if self._statuses.get(status.ident) is status:
                    del self._statuses[status.ident]
        elif self._alerts and value is self._alerts[0]:
            self._alerts.popleft()
        elif self._loss_report and value is self._loss_report[0]:
            self._lost_alerts -= self._loss_report[1]
            self._loss_report = None
        elif self._samples and value is self._samples[0]:
            self._samples.popleft()
        elif self._logs and value is self._logs[0]:
            self._log_written(self._logs.popleft())

    def _log_written(self, part: LogData) -> None:
        self._log_bytes -= len(part.data)
        if part.part >= part.part_count:
            self._written = []
            return
        if self._written is not None:
            self._written.append(part)
            if sum(len(one.data) for one in self._written) > LOG_BYTES:
                self._written = None
                self._unkept = part.correlation_id

    def _replace_reply(self) -> None:
        """The cut reply cannot be sent again: end it with an error, without the parts that still wait."""
        self._given_up = self._unkept
        self._logs = deque(part for part in self._logs if part.correlation_id != self._given_up)
        self._log_bytes = sum(len(part.data) for part in self._logs)
        error = to_error_info(FailedError("the connection to CM broke while the log was sent, ask again"))
        self._logs.appendleft(LogData(self._unkept, LogStatus.ERROR, error=error))
