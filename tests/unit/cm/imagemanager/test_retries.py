"""When and from where a blob is tried again; time is a number."""

import random

import pytest

from aoscore.cm.imagemanager.retries import BlobRetries, Next
from aoscore.common.aio import Backoff
from aoscore.common.errors import ChecksumError, FailedError, SignatureError

ERROR = FailedError("no")


def retries(give_up_s: float = 3600) -> BlobRetries:
    return BlobRetries(give_up_s=give_up_s, now=0, backoff=Backoff(2, 300, jitter=0, rng=random.Random(1)))


def test_urls_in_turn_then_pauses_then_fresh_urls() -> None:
    case = retries()
    case.take(["a", "b"])
    used, steps = [], []
    for now in range(6):
        used.append(case.url)
        steps.append(case.download_failed(ERROR, now, url_is_dead=False))
    assert used == ["a", "b"] * 3
    assert steps == [Next(0, False), Next(2, False), Next(0, False), Next(4, False), Next(0, False), Next(8, True)]


def test_a_dead_url_is_not_tried_again_and_when_all_are_dead_fresh_ones_are_asked_for() -> None:
    case = retries()
    case.take(["a", "b"])
    assert case.download_failed(ERROR, 0, url_is_dead=True) == Next(0, False)
    assert case.url == "b"
    assert case.download_failed(ERROR, 0, url_is_dead=False) == Next(2, False)
    assert case.url == "b"
    assert case.download_failed(ERROR, 0, url_is_dead=True) == Next(4, True)


def test_the_pause_grows_to_five_minutes() -> None:
    case = retries(10**9)
    pauses = [case.asking_failed(ERROR, now).pause_s for now in range(10)]
    assert pauses == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


def test_given_up_after_an_age_without_progress() -> None:
    case = retries(give_up_s=100)
    case.take(["a"])
    case.download_failed(ERROR, 99, url_is_dead=False)
    case.progressed(99)
    case.download_failed(ERROR, 198, url_is_dead=False)
    with pytest.raises(FailedError):
        case.download_failed(ERROR, 199, url_is_dead=False)
    with pytest.raises(FailedError):
        case.asking_failed(ERROR, 199)


def test_defect_6_wrong_content_three_times_and_never_a_wrong_signature() -> None:
    """AosCore 9.1 repeats it 60 times a second, for ever (observed.md, defect 6)."""
    case = retries()
    wrong = ChecksumError("wrong")
    assert case.content_failed(wrong) == Next(2, True)
    assert case.content_failed(wrong) == Next(4, True)
    with pytest.raises(ChecksumError):
        case.content_failed(wrong)
    with pytest.raises(SignatureError):
        retries().content_failed(SignatureError("unsigned"))
    with pytest.raises(FailedError):
        retries().content_failed(FailedError("other"))
