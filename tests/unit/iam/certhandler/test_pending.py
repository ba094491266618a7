from pathlib import Path

import pytest

from aoscore.iam.certhandler.pending import FILE_NAME, PendingKeys


def test_order_survives_a_restart(tmp_path: Path) -> None:
    pending = PendingKeys(tmp_path)
    pending.load()
    for key_id in ("c", "a", "b"):
        pending.add("iam", key_id)
    pending.add("sm", "x")
    pending.remove("iam", "a", "unknown")
    again = PendingKeys(tmp_path)
    again.load()
    assert again.of("iam") == ["c", "b"] and again.of("sm") == ["x"] and again.of("cm") == []
    again.clear("iam")
    assert again.of("iam") == [] and again.of("sm") == ["x"]


def test_file_that_is_broken_counts_as_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE_NAME).write_text('{"iam": "x"')
    pending = PendingKeys(tmp_path)
    pending.load()
    assert pending.of("iam") == [] and FILE_NAME in caplog.text
    pending.add("iam", "a")
    again = PendingKeys(tmp_path)
    again.load()
    assert again.of("iam") == ["a"]


def test_nothing_is_written_when_nothing_changes(tmp_path: Path) -> None:
    pending = PendingKeys(tmp_path)
    pending.remove("iam", "a")
    pending.clear("iam")
    assert not (tmp_path / FILE_NAME).exists()
    pending.add("iam", "a")
    pending.remove("iam", "a")
    assert not list(tmp_path.iterdir()), "nothing is left when nobody waits"
