"""What the documents say about the tests is true."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_NAMED = re.compile(r"`((?:cm|sm|iam|mp|system)/test_\w+\.py)(?:::(test_\w+))?`")


def named_tests() -> list[tuple[str, str]]:
    return _NAMED.findall((ROOT / "docs" / "failure-cases.md").read_text())


@pytest.mark.parametrize(("path", "name"), named_tests())
def test_tests_of_failure_cases_are_there(path: str, name: str) -> None:
    file = ROOT / "tests" / (path if path.startswith("system/") else f"integration/{path}")
    assert not name or re.search(rf"^(async )?def {name}\(", file.read_text(), re.MULTILINE)
    assert file.exists()


def test_every_row_names_a_test() -> None:
    rows = [line for line in (ROOT / "docs" / "failure-cases.md").read_text().splitlines() if line.startswith("| ")]
    cases = [row for row in rows if not row.startswith(("| what happens", "| ---"))]
    assert cases and all(_NAMED.search(row) for row in cases)
