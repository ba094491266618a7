from datetime import UTC, datetime, timedelta

import pytest

from aoscore.common.types import CertInfo
from aoscore.iam.certhandler.expiry import ExpiryWatch, stage
from aoscore.iam.certhandler.record import CertRecord, surplus

NOW = datetime(2027, 5, 1, tzinfo=UTC)


def record(serial: str, days: float, cert_type: str = "iam") -> CertRecord:
    return CertRecord(CertInfo(cert_type, "c", "k", serial, b"issuer"), NOW + timedelta(days=days))


@pytest.mark.parametrize(
    ("days", "expected"), [(31, 0), (30, 1), (7.5, 1), (7, 2), (1.5, 2), (1, 3), (0.1, 3), (0, 4), (-5, 4)]
)
def test_stages(days: float, expected: int) -> None:
    assert stage(NOW + timedelta(days=days), NOW) == expected


def test_each_stage_is_told_once() -> None:
    watch = ExpiryWatch()
    told = []
    for day in range(100):
        for _ in range(3):
            told += [(day, text) for text in watch.warnings([record("a1", 60)], NOW + timedelta(days=day))]
    assert [day for day, _ in told] == [30, 53, 59, 60]
    assert all("will expire soon: type=iam, serial=a1, notAfter=2027-06-30" in text for _, text in told[:3])
    assert "has expired" in told[3][1]


def test_what_expired_while_the_unit_was_off_is_told_once() -> None:
    watch = ExpiryWatch()
    assert len(watch.warnings([record("a1", -3), record("b2", 5, "cm"), record("c3", 99, "sm")], NOW)) == 2
    assert watch.warnings([record("a1", -3), record("b2", 5, "cm")], NOW) == []


def test_renewal_begins_anew() -> None:
    watch = ExpiryWatch()
    assert watch.warnings([record("a1", 5)], NOW)
    assert not watch.warnings([record("b2", 90)], NOW)
    assert watch.warnings([record("b2", 90)], NOW + timedelta(days=85))


def test_clock_that_was_never_set_says_nothing() -> None:
    """A Unit without battery wakes up in 1970; when its clock is set, all is told."""
    watch = ExpiryWatch()
    assert watch.warnings([record("a1", 5)], datetime(1970, 1, 1, tzinfo=UTC)) == []
    assert watch.warnings([record("a1", 5)], NOW)
    # Set back by a year and forth again: nothing is told twice.
    assert watch.warnings([record("a1", 5)], NOW - timedelta(days=365)) == []
    assert watch.warnings([record("a1", 5)], NOW) == []


class TestSurplus:
    OLD, MIDDLE, NEW = record("old", 10), record("middle", 20), record("new", 30)

    def test_those_that_end_first_go(self) -> None:
        every = [self.MIDDLE, self.OLD, self.NEW]
        assert surplus(every, 2, added=self.NEW, used=set()) == [self.OLD]
        assert surplus(every, 1, added=None, used=set()) == [self.OLD, self.MIDDLE]
        assert surplus(every, 5, added=None, used=set()) == []

    def test_the_new_one_never_goes(self) -> None:
        assert surplus([self.MIDDLE, self.NEW, self.OLD], 2, added=self.OLD, used=set()) == [self.MIDDLE]

    def test_the_one_that_works_stays_until_the_new_one_does(self) -> None:
        every = [self.OLD, self.MIDDLE, self.NEW]
        assert surplus(every, 2, added=self.NEW, used={"old"}) == [self.MIDDLE]
        assert surplus(every, 2, added=self.NEW, used={"old", "middle"}) == [self.OLD]
        assert surplus(every, 2, added=self.NEW, used={"old", "new"}) == [self.OLD]

    def test_one_more_than_wanted_may_stay(self) -> None:
        both = [self.OLD, self.NEW]
        assert surplus(both, 1, added=self.NEW, used={"old"}) == []
        assert surplus(both, 1, added=self.NEW, used={"old", "new"}) == [self.OLD]
        every = [self.OLD, self.MIDDLE, self.NEW]
        assert surplus(every, 1, added=self.NEW, used={"old"}) == [self.MIDDLE]
