"""Tolerant reader of JSON documents that the cloud sends (cloud-protocol §4.1).

Member names match in any case, null counts as absent, unknown members are ignored, scalars are coerced, times need no
offset. A list element that cannot be read is left out and reported as a problem, so that one bad entry does not void
the message; so is a member that its Struct lists in `may_be_unreadable`. Anything else that cannot be read raises.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

import msgspec
from msgspec import inspect as ms

from aoscore.common.config import parse_duration
from aoscore.common.errors import InvalidArgumentError

S = TypeVar("S", bound=msgspec.Struct)

_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:[.,](\d+))?\s*(?:([Zz])|([+-])(\d\d):?(\d\d))?", re.ASCII
)


class Problem(NamedTuple):
    """Something that was left out: `path` such as `items[3].version`, and why."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


def parse_time(text: str) -> datetime:
    """Reads an ISO 8601 time; an offset is honoured, none means UTC, digits beyond microseconds are cut (§4.3)."""
    match = _TIME.match(text)
    if match is None:
        raise InvalidArgumentError(f"not a time: {text[:40]!r}")
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    micro = int((match[7] or "0")[:6].ljust(6, "0"))
    zone: timezone = UTC
    if match[9]:
        zone = timezone((1 if match[9] == "+" else -1) * timedelta(hours=int(match[10]), minutes=int(match[11])))
    try:
        return datetime(year, month, day, hour, minute, second, micro, tzinfo=zone).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidArgumentError(f"not a time: {text[:40]!r} ({error})") from error


def parse_base64(text: str) -> bytes:
    """Reads standard base64, with or without line breaks (§4.5)."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidArgumentError(f"not base64: {error}") from error


def read(struct: type[S], document: object, path: str = "") -> tuple[S, list[Problem]]:
    """Builds a Struct from a decoded JSON document.

    Args:
        struct: the Struct to build; its field names on the wire are matched in any case.
        document: what a JSON decoder returned.
        path: prefix of the paths in messages, for a document that is part of a larger one.

    Returns:
        The Struct, and what had to be left out.

    Raises:
        InvalidArgumentError: a needed member is missing or cannot be read; the message names it.
    """
    problems: list[Problem] = []
    return cast("S", _Reader(problems).struct(_info(struct), document, path)), problems


@lru_cache(maxsize=256)
def _info(struct: type[msgspec.Struct]) -> ms.StructType:
    return cast("ms.StructType", ms.type_info(struct))


def _shown(value: object) -> str:
    """A short form of a value for an error; texts are not shown, they may be secrets."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return "a text"
    return "an object" if isinstance(value, dict) else "an array"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class _Reader:
    """One pass over a document; collects what it leaves out."""

    def __init__(self, problems: list[Problem]) -> None:
        self._problems = problems

    def struct(self, info: ms.StructType, value: object, path: str) -> object:
        if not isinstance(value, dict):
            raise InvalidArgumentError(f"{path or 'document'}: object expected, got {_shown(value)}")
        folded = {str(name).lower(): member for name, member in value.items() if member is not None}
        # A member in the exact case wins over one that differs by case only.
        exact = {str(name): member for name, member in value.items() if member is not None}
        arguments: dict[str, Any] = {}
        for field in info.fields:
            member = exact.get(field.encode_name, folded.get(field.encode_name.lower()))
            where = _join(path, field.encode_name)
            if member is None:
                if field.required:
                    raise InvalidArgumentError(f"{where}: missing")
                continue
            try:
                arguments[field.name] = self.value(field.type, member, where)
            except InvalidArgumentError as error:
                if field.name not in getattr(info.cls, "may_be_unreadable", ()):
                    raise
                self._leave_out(error)
        try:
            return info.cls(**arguments)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{path or 'document'}: {error}") from error

    def value(self, info: ms.Type, value: object, path: str) -> object:
        if isinstance(info, ms.StructType):
            return self.struct(info, value, path)
        if isinstance(info, ms.VarTupleType | ms.ListType):
            return self._list(info, value, path)
        if isinstance(info, ms.DictType):
            return self._dict(info, value, path)
        if isinstance(info, ms.UnionType):
            return self._union(info, value, path)
        reader = _SCALARS.get(type(info))
        if reader is None:
            raise TypeError(f"{path}: no reader for {info}")
        try:
            return reader(info, value)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{path}: {error}") from error

    def _list(self, info: ms.VarTupleType | ms.ListType, value: object, path: str) -> object:
        if isinstance(value, dict):
            value = [value]  # one object where a list is expected (D6)
        if not isinstance(value, list):
            raise InvalidArgumentError(f"{path}: array expected, got {_shown(value)}")
        result = []
        for index, element in enumerate(value):
            try:
                result.append(self.value(info.item_type, element, f"{path}[{index}]"))
            except InvalidArgumentError as error:
                self._leave_out(error)
        return tuple(result) if isinstance(info, ms.VarTupleType) else result

    def _leave_out(self, error: InvalidArgumentError) -> None:
        where, _, text = str(error).partition(": ")
        self._problems.append(Problem(where, text))

    def _dict(self, info: ms.DictType, value: object, path: str) -> object:
        if not isinstance(value, dict):
            raise InvalidArgumentError(f"{path}: object expected, got {_shown(value)}")
        return {
            str(name): self.value(info.value_type, member, f"{path}.{name}")
            for name, member in value.items()
            if member is not None
        }

    def _union(self, info: ms.UnionType, value: object, path: str) -> object:
        choices = [choice for choice in info.types if not isinstance(choice, ms.NoneType)]
        if len(choices) == 1:
            try:
                return self.value(choices[0], value, path)
            except InvalidArgumentError as error:
                # An optional word that we do not know is taken as absent (§4.1, exception for identities).
                if not isinstance(choices[0], ms.EnumType):
                    raise
                self._leave_out(error)
                return None
        structs = [choice for choice in choices if isinstance(choice, ms.StructType)]
        if not isinstance(value, dict) or not structs:
            raise InvalidArgumentError(f"{path}: object expected, got {_shown(value)}")
        tag = {str(name).lower(): member for name, member in value.items()}.get(str(structs[0].tag_field).lower())
        for choice in structs:
            if choice.tag == tag:
                return self.struct(choice, value, path)
        raise InvalidArgumentError(f"{path}: unknown {structs[0].tag_field}")


def _read_str(_info: ms.Type, value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    raise InvalidArgumentError(f"text expected, got {_shown(value)}")


def _read_int(_info: ms.Type, value: object) -> int:
    try:
        if isinstance(value, bool | int):
            return int(value)
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, str):
            return int(value)
    except ValueError:
        pass
    raise InvalidArgumentError(f"whole number expected, got {_shown(value)}")


def _read_float(_info: ms.Type, value: object) -> float:
    try:
        if isinstance(value, int | float | str):
            return float(value)
    except ValueError:
        pass
    raise InvalidArgumentError(f"number expected, got {_shown(value)}")


def _read_bool(_info: ms.Type, value: object) -> bool:
    word = value.lower() if isinstance(value, str) else value
    if word in (True, "true", "1"):
        return True
    if word in (False, "false", "0"):
        return False
    raise InvalidArgumentError(f"true or false expected, got {_shown(value)}")


def _read_enum(info: ms.Type, value: object) -> Enum:
    enum = cast("ms.EnumType", info).cls
    try:
        return enum(value)
    except ValueError:
        raise InvalidArgumentError(
            f"unknown word {value[:32]!r}" if isinstance(value, str) else f"word expected, got {_shown(value)}"
        ) from None


def _read_time(_info: ms.Type, value: object) -> datetime:
    if not isinstance(value, str):
        raise InvalidArgumentError(f"time expected, got {_shown(value)}")
    return parse_time(value)


def _read_bytes(_info: ms.Type, value: object) -> bytes:
    if not isinstance(value, str):
        raise InvalidArgumentError(f"base64 text expected, got {_shown(value)}")
    return parse_base64(value)


def _read_custom(info: ms.Type, value: object) -> object:
    """The only custom type on the wire is Duration: a number of seconds, ISO 8601, or a text such as `1m30s`."""
    cls = cast("ms.CustomType", info).cls
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InvalidArgumentError(f"duration expected, got {_shown(value)}")
    try:
        return cls(parse_duration(value) if isinstance(value, str) else float(value))
    except ValueError as error:
        raise InvalidArgumentError(f"duration expected: {error}") from error


_SCALARS: dict[type[ms.Type], Callable[[ms.Type, object], object]] = {
    ms.StrType: _read_str,
    ms.IntType: _read_int,
    ms.FloatType: _read_float,
    ms.BoolType: _read_bool,
    ms.EnumType: _read_enum,
    ms.DateTimeType: _read_time,
    ms.BytesType: _read_bytes,
    ms.CustomType: _read_custom,
}
