"""Configuration files and other JSON documents: read into Structs, every key checked.

Keys are compared without case as AosCore 9.1 does (iam.md §2.1, sm.md §1.4), but an unknown key is an error: a typing
mistake in a device configuration must not be a silent default.
"""

import logging
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from aoscore.common.errors import ConfigError, InvalidArgumentError, NotFoundError
from aoscore.common.types import Duration as Duration

_log = logging.getLogger(__name__)

T = TypeVar("T")

# What decoding a broken document may raise: texts that are no UTF-8 and nesting without end have errors of their own.
JSON_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_UNITS_S = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86400.0,
    "w": 604800.0,
    "y": 31556925.97474,
}
_SIMPLE = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h|d|w|y)")
_ISO = re.compile(
    r"P(?:(?P<y>\d+(?:\.\d+)?)Y)?(?:(?P<months>\d+(?:\.\d+)?)M)?(?:(?P<w>\d+(?:\.\d+)?)W)?(?:(?P<d>\d+(?:\.\d+)?)D)?"
    r"(?:T(?:(?P<h>\d+(?:\.\d+)?)H)?(?:(?P<m>\d+(?:\.\d+)?)M)?(?:(?P<s>\d+(?:\.\d+)?)S)?)?"
)


def parse_duration(text: str | float) -> float:
    """Seconds of a duration in any of the accepted forms.

    Raises InvalidArgumentError for anything else, the empty text included.
    """
    if not isinstance(text, str):
        if text < 0:
            raise InvalidArgumentError(f"duration {text} is negative")
        return float(text)
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if (match := _ISO.fullmatch(text)) and len(text) > 1 and not text.endswith("T"):
        parts = {unit: float(value) for unit, value in match.groupdict().items() if value}
        months = parts.pop("months", 0.0)
        return months * _UNITS_S["y"] / 12 + sum(value * _UNITS_S[unit] for unit, value in parts.items())
    if text and _SIMPLE.sub("", text) == "":
        return sum(float(value) * _UNITS_S[unit] for value, unit in _SIMPLE.findall(text))
    raise InvalidArgumentError(f"{text!r} is no duration, write for example 10s, 1m30s, PT90S or 30d")


def format_iso_duration(seconds: float) -> str:
    """ISO 8601 text of a duration, e.g. 90.5 -> "PT1M30.5S"."""
    minutes, rest_s = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    days, hours = divmod(hours, 24)
    time = "".join(f"{value}{unit}" for value, unit in ((hours, "H"), (minutes, "M")) if value)
    if rest_s or not (days or time):
        time += f"{rest_s:.9f}".rstrip("0").rstrip(".") + "S"
    return "P" + (f"{days}D" if days else "") + (f"T{time}" if time else "")


def decode_hook(kind: type, value: Any) -> Any:
    """Own types inside Structs."""
    if kind is Duration:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError(f"expected a duration, got {type(value).__name__}")
        try:
            return Duration(parse_duration(value))
        except InvalidArgumentError as error:
            raise ValueError(str(error)) from None
    if kind is Path:
        if not isinstance(value, str):
            raise ValueError(f"expected a path, got {type(value).__name__}")
        return Path(value)
    raise NotImplementedError(f"no reader for {kind}")


def encode_hook(value: Any) -> Any:
    """The reverse of decode_hook."""
    if isinstance(value, Duration):
        return format_iso_duration(value)
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"no writer for {type(value)}")


def from_json(data: bytes | str, kind: type[T], *, what: str) -> T:
    """Decode a JSON document; raises InvalidArgumentError naming the document and the member that is wrong."""
    try:
        return msgspec.json.decode(data, type=kind, dec_hook=decode_hook)
    except JSON_ERRORS as error:
        raise InvalidArgumentError(f"{what}: {error}") from error


def from_json_caseless(data: bytes | str, kind: type[T], *, what: str) -> T:
    """Like from_json for documents from outside that AosCore 9.1 reads without case: unknown members are ignored."""
    try:
        raw = msgspec.json.decode(data)
        fitted = _fit(raw, inspect.type_info(kind), "", None, what)
        return msgspec.convert(fitted, kind, strict=False, dec_hook=decode_hook)
    except JSON_ERRORS as error:
        raise InvalidArgumentError(f"{what}: {error}") from error


def to_json(value: Any) -> bytes:
    """Encode a document."""
    return msgspec.json.encode(value, enc_hook=encode_hook)


def load_config(path: Path, kind: type[T], *, ignored: frozenset[str] = frozenset()) -> T:
    """Read a configuration file into the Struct `kind`.

    `ignored` are key paths in lower case ("statedir", "runtimes.old") that files of AosCore 9.1 still carry; they are
    accepted with a warning. Raises NotFoundError without the file and ConfigError, naming file and key path, for
    broken JSON, an unknown key, a missing one or a wrong type.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"configuration file {path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"can't read configuration file {path}: {error.strerror}") from error
    try:
        raw = msgspec.json.decode(data)
    except JSON_ERRORS as error:
        raise ConfigError(f"{path}: {error}") from error
    return load_section(raw, kind, path=path, ignored=ignored)


def load_section(raw: Any, kind: type[T], *, path: Path, where: str = "", ignored: frozenset[str] = frozenset()) -> T:
    """Read a part of a configuration whose kind another key decides, such as the parameters of a plug-in.

    `raw` is the decoded JSON, `where` its key path in the file `path`. Errors are those of load_config.
    """
    try:
        fitted = _fit(raw, inspect.type_info(kind), where, ignored, path)
        return msgspec.convert(fitted, kind, strict=False, dec_hook=decode_hook)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {f'{where}: ' if where else ''}{error}") from error


def _fit(raw: Any, kind: inspect.Type, where: str, ignored: frozenset[str] | None, path: Path | str) -> Any:
    """Give keys the spelling of the Struct and drop nulls.

    Unknown keys are refused unless they are in `ignored`; with `ignored` None all unknown keys are dropped.
    """
    match kind:
        case inspect.StructType() if isinstance(raw, dict):
            fields = {field.encode_name.lower(): field for field in kind.fields}
            result: dict[str, Any] = {}
            for key, value in raw.items():
                here = f"{where}.{key}" if where else key
                field = fields.get(key.lower())
                if field is None:
                    if ignored is None:
                        continue
                    if here.lower() in ignored:
                        _log.warning("Configuration key has no effect: file=%s, key=%s", path, here)
                        continue
                    known = ", ".join(sorted(field.encode_name for field in kind.fields))
                    raise ConfigError(f"{path}: unknown key {here!r}; known here: {known}")
                if field.encode_name in result:
                    raise ConfigError(f"{path}: key {here!r} is there twice")
                if value is not None:
                    result[field.encode_name] = _fit(value, field.type, here, ignored, path)
            return result
        case inspect.UnionType():
            inner = [option for option in kind.types if not isinstance(option, inspect.NoneType)]
            return _fit(raw, inner[0], where, ignored, path) if len(inner) == 1 else raw
        case inspect.ListType() | inspect.SetType() | inspect.FrozenSetType() | inspect.VarTupleType() if isinstance(
            raw, list
        ):
            return [_fit(value, kind.item_type, f"{where}[{index}]", ignored, path) for index, value in enumerate(raw)]
        case inspect.DictType() if isinstance(raw, dict):
            return {key: _fit(value, kind.value_type, f"{where}.{key}", ignored, path) for key, value in raw.items()}
        case _:
            return raw
