"""Settings of a Node as words: from a command line, a JSON file or the variables of a build. Pure."""

import types
import typing

from aoscore.ctl.target.node import Node

_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def node_from(settings: dict[str, typing.Any]) -> Node:
    """A Node from settings as a JSON file or words on a command line have them.

    Words of a list are separated by blanks; hosts are written IP=NAME[=NAME...], variables NAME=VALUE. Raises
    ValueError naming the setting.
    """
    kinds = typing.get_type_hints(Node)
    read = {}
    for name, value in settings.items():
        if name not in kinds:
            raise ValueError(f"setting {name!r} is unknown; known: {', '.join(sorted(kinds))}")
        try:
            read[name] = _read(name, kinds[name], value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"setting {name}: {error}") from None
    return Node(**read)


def _read(name: str, kind: typing.Any, value: typing.Any) -> typing.Any:
    if kind == int | str:
        return int(value) if str(value).isdecimal() else str(value)
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is typing.Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"{value!r} is not one of {', '.join(typing.get_args(kind))}")
        return value
    if kind is bool:
        word = str(value).lower()
        if word not in _WORDS:
            raise ValueError(f"{value!r} is neither true nor false")
        return _WORDS[word]
    if kind is int:
        return int(value)
    if kind is str:
        return str(value)
    words = value.split() if isinstance(value, str) else value
    if name == "hosts":
        return tuple((address, tuple(names)) for address, *names in map(_parts, words))
    if name == "environment":
        return tuple(tuple(word.split("=", 1)) if isinstance(word, str) else tuple(word) for word in words)
    if typing.get_args(kind)[0] is int:
        return tuple(int(word) for word in words)
    return tuple(str(word) for word in words)


def _parts(word: str | list[str]) -> list[str]:
    parts = word.split("=") if isinstance(word, str) else word
    if len(parts) < 2:
        raise ValueError(f"{word!r} is not IP=NAME")
    return parts
