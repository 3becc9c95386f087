"""Write tables of figures into pages: Markdown, between marks. Scripts of tools/ and benchmarks/ import this module.

The marks of a table are `<!-- results:NAME -->` and `<!-- /results:NAME -->`. Scripts write the text between them;
never edit it by hand.
"""

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table, without a final line break."""
    head = [*head]
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


def versions(*packages: str) -> str:
    """The installed versions, as in "torch 2.13.0, transformers 5.24.0"."""
    return ", ".join(f"{name} {version(name)}" for name in packages)


def marks(name: str) -> tuple[str, str]:
    return f"<!-- results:{name} -->", f"<!-- /results:{name} -->"


def parts(page: str, name: str) -> tuple[str, str, str]:
    """The text before a table's first mark, between its marks, and after the second."""
    start, end = marks(name)
    before, opened, rest = page.partition(start)
    between, closed, after = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"The page has no place for the table {name!r}: {start} and {end} are not both there.")
    return before, between, after


def taken(path: Path, name: str) -> str:
    """The text between the marks of a page."""
    return parts(path.read_text("utf-8"), name)[1].strip("\n")


def replaced(page: str, name: str, text: str) -> str:
    """The page with this text between its marks."""
    start, end = marks(name)
    before, _, after = parts(page, name)
    return f"{before}{start}\n{text}\n{end}{after}"


def put(path: Path, name: str, text: str) -> None:
    """Write the text between the marks of a page."""
    path.write_text(replaced(path.read_text("utf-8"), name, text), "utf-8")
