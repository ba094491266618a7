"""Pages of figures of which each part is written by a measurement of its own."""

from collections.abc import Iterable
from pathlib import Path


def goal_rows(figures: Iterable[tuple[str, str, str]]) -> str:
    """Rows of a table: what, goal, figure."""
    return "\n".join(f"| {title} | {goal} | {value} |" for title, goal, value in figures)


def put_section(page: Path, name: str, title: str, text: str) -> None:
    """Replace what is between the marks of a section; a new one comes to the end of the page, below a title."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    old = page.read_text()
    if begin not in old:
        old = f"{old.rstrip()}\n\n## {title}\n\n{begin}\n{end}\n"
    before, _, rest = old.partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")
