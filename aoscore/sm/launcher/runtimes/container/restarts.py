"""When an instance that ended is started again: quickly at first, then ever more slowly, never not at all. Pure."""

from aoscore.common.aio import Backoff
from aoscore.common.oci import RunParameters

START_INTERVAL_S = 5.0
START_BURST = 3
RESTART_INTERVAL_S = 1.0
# More than any limit lets happen.
_MOST_DOUBLINGS = 64


class RestartPolicy:
    """Restart pauses of one instance.

    Within a burst (`start_burst` restarts) the pause is `restart_interval`; after it the pause doubles up to
    `limit_s`. A run longer than `start_interval` makes up for everything before it (sm-runtime.md §7, D28). `restarts`
    goes on from there (D34).
    """

    def __init__(self, parameters: RunParameters, *, limit_s: float, restarts: int = 0) -> None:
        self._stable_s = float(parameters.start_interval) or START_INTERVAL_S
        self._burst = parameters.start_burst or START_BURST
        self._pause_s = float(parameters.restart_interval) or RESTART_INTERVAL_S
        self._backoff = Backoff(2 * self._pause_s, max(limit_s, self._pause_s))
        self.restarts = restarts
        """Restarts since the last stable run."""
        for _ in range(min(restarts - self._burst, _MOST_DOUBLINGS)):
            self._backoff.next()

    def ended(self, ran_s: float) -> float:
        """Note the end of a run that lasted `ran_s`; returns the pause before the next start, seconds."""
        if ran_s > self._stable_s:
            self.restarts = 0
            self._backoff.reset()
        self.restarts += 1
        return self._pause_s if self.restarts <= self._burst else self._backoff.next()
