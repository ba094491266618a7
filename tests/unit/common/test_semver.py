"""Order of semantic versions."""

import itertools

import pytest

from aoscore.common.errors import InvalidArgumentError
from aoscore.common.semver import SemVer

# The example of semver.org, extended.
RISING = (
    *("0.9.9", "1.0.0-2", "1.0.0-11", "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta"),
    *("1.0.0-beta.2", "1.0.0-beta.11", "1.0.0-rc.1", "1.0.0", "1.0.1", "1.2.0", "1.10.0", "2.0.0"),
)


def test_order() -> None:
    for low, high in itertools.combinations(RISING, 2):
        assert SemVer(low) < SemVer(high)
        assert SemVer(high) >= SemVer(low)


def test_build_metadata_does_not_count() -> None:
    assert SemVer("1.0.0+a") == SemVer("1.0.0+b")
    assert hash(SemVer("1.0.0+a")) == hash(SemVer("1.0.0"))


def test_prereleases() -> None:
    assert SemVer("1.0.0-rc.1+build").is_prerelease
    assert not SemVer("1.0.0+build-1").is_prerelease


@pytest.mark.parametrize("text", ["", "1", "1.0", "1.0.0.0", "v1.0.0", "01.0.0", "1.0.0-", "1.0.0 ", "a.b.c", "1١.0.0"])
def test_what_is_no_version(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="semantic version"):
        SemVer(text)
