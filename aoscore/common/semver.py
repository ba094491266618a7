"""Semantic versions (semver.org 2.0.0), as unit and node configurations and items carry them."""

import functools
import re

from aoscore.common.errors import InvalidArgumentError

_VERSION = re.compile(
    r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(?:-([0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*))?(?:\+[0-9A-Za-z.-]+)?",
    re.ASCII,
)


@functools.total_ordering
class SemVer:
    """A version; compares by precedence, so build metadata does not count."""

    def __init__(self, text: str) -> None:
        """Raises InvalidArgumentError when text is no semantic version."""
        match = _VERSION.fullmatch(text)
        if match is None:
            raise InvalidArgumentError(f"{text!r} is no semantic version, write for example 1.2.3")
        self.text = text
        self._release = tuple(int(part) for part in match.group(1, 2, 3))
        # A number is lower than a word, a version with pre-release part lower than the same without.
        self._pre = tuple(
            (0, int(part), "") if part.isdigit() else (1, 0, part) for part in (match[4] or "").split(".") if part
        )

    @property
    def is_prerelease(self) -> bool:
        """Whether it comes before its release, like 1.0.0-rc.1."""
        return bool(self._pre)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SemVer) and (self._release, self._pre) == (other._release, other._pre)

    def __lt__(self, other: "SemVer") -> bool:
        if self._release != other._release:
            return self._release < other._release
        if bool(self._pre) != bool(other._pre):
            return bool(self._pre)
        return self._pre < other._pre

    def __hash__(self) -> int:
        return hash((self._release, self._pre))

    def __str__(self) -> str:
        return self.text
