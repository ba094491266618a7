"""Environment variables that the cloud overrides (cm-orchestration §4.10). Pure."""

from collections.abc import Iterable, Sequence
from datetime import datetime

import msgspec

from aoscore.cm.communication import messages
from aoscore.cm.communication.messages import EnvVarInstanceStatus, EnvVarOverride, instance_members
from aoscore.common.errors import OutOfRangeError, to_error_info
from aoscore.common.types import EnvVar, EnvVarStatus, InstanceFilter, InstanceIdent, InstanceStatus

MAX_NAME, MAX_VALUE, MAX_VARIABLES = 64, 256, 16
"""A C++ SM refuses the whole update when one is exceeded (grpc.md, "Caps of C++ peers")."""


class Override(msgspec.Struct, frozen=True):
    """Variables for all instances that match; `ttl` of a variable is the time when it expires."""

    filter: InstanceFilter
    variables: tuple[messages.EnvVar, ...]

    @classmethod
    def of(cls, override: EnvVarOverride) -> "Override":
        """From the cloud's form."""
        return cls(
            InstanceFilter(
                item_id=override.item.id or None if override.item else None,
                subject_id=override.subject.id or None if override.subject else None,
                instance=override.instance,
            ),
            override.variables,
        )


def without_expired(overrides: Iterable[Override], now: datetime) -> list[Override]:
    """Overrides without variables whose time is over, and without those that have none left."""
    kept = []
    for override in overrides:
        variables = tuple(one for one in override.variables if one.ttl is None or one.ttl >= now)
        if variables:
            kept.append(msgspec.structs.replace(override, variables=variables))
    return kept


def next_expiry(overrides: Iterable[Override]) -> datetime | None:
    """When the next variable expires."""
    return min((one.ttl for override in overrides for one in override.variables if one.ttl), default=None)


def variables_for(ident: InstanceIdent, overrides: Iterable[Override]) -> dict[str, str]:
    """Variables of one instance; of several values of a name the last counts."""
    found: dict[str, str] = {}
    for override in overrides:
        if override.filter.matches(ident):
            found.update((one.name, one.value) for one in override.variables)
    return found


def split_acceptable(variables: dict[str, str]) -> tuple[tuple[EnvVar, ...], tuple[EnvVarStatus, ...]]:
    """Variables to send, and the results of those that no SM would take."""
    accepted: list[EnvVar] = []
    refused: list[EnvVarStatus] = []
    for name, value in variables.items():
        if not name or len(name) > MAX_NAME or len(value) > MAX_VALUE or len(accepted) == MAX_VARIABLES:
            limits = f"{MAX_VARIABLES} variables, names of {MAX_NAME} and values of {MAX_VALUE} characters"
            refused.append(EnvVarStatus(name, to_error_info(OutOfRangeError(f"at most {limits}"))))
        else:
            accepted.append(EnvVar(name, value))
    return tuple(accepted), tuple(refused)


class EnvVarResults:
    """What became of the variables, by instance; tells when the cloud has to hear of it."""

    def __init__(self) -> None:
        self._results: dict[InstanceIdent, tuple[EnvVarStatus, ...]] = {}
        self._refused: dict[InstanceIdent, tuple[EnvVarStatus, ...]] = {}
        self._reported: tuple[EnvVarInstanceStatus, ...] = ()
        self._repeat = False

    def repeat(self, *, at_once: bool) -> None:
        """The cloud has asked anew, so it hears of the same results again: now, or after the next word of a node."""
        if at_once:
            self._reported = ()
        self._repeat = not at_once

    def set_refused(self, ident: InstanceIdent, refused: tuple[EnvVarStatus, ...]) -> None:
        """Variables that were not sent to the instance's node."""
        self._refused[ident] = refused

    def add(self, statuses: Iterable[InstanceStatus]) -> None:
        """Statuses of nodes; they list the variables of an instance."""
        self._results.update((status.ident, status.env_vars) for status in statuses)
        if self._repeat:
            self.repeat(at_once=True)

    def take_report(self, idents: Sequence[InstanceIdent]) -> messages.OverrideEnvVarsStatus | None:
        """The message for the cloud when the results of these instances differ from those reported last."""
        found = tuple(
            EnvVarInstanceStatus(**instance_members(ident), name=one.name, error_info=messages.ErrorInfo.of(one.error))
            for ident in idents
            for one in (*self._results.get(ident, ()), *self._refused.get(ident, ()))
        )
        if found == self._reported:
            return None
        self._reported = found
        return messages.OverrideEnvVarsStatus(statuses=found) if found else None
