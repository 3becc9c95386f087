"""docs/model.md has the headings that comments cite, and a table of the published checkpoint's parameters."""

import json
import re
import subprocess
from itertools import product
from math import prod

import pytest

from conftest import GOLDEN, ROOT

PAGE = "docs/model.md"
# One heading or several: `docs/model.md, "Sizes" and "Texts"`. Line breaks and comment signs may stand between words.
CITATION = re.compile(r'docs/model\.md,((?: and)? "[^"]+")+')


def text_files() -> dict[str, str]:
    """Every Python and Markdown file but this one, by path, each on one line."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = set(listed.stdout.splitlines()) - {"tests/repository/test_model_page.py"}
    return {name: re.sub(r"\s*\n\s*(?:#\s*)?", " ", (ROOT / name).read_text("utf-8")) for name in sorted(names)}


def cited_headings(text: str) -> set[str]:
    return {heading for match in CITATION.finditer(text) for heading in re.findall(r'"([^"]+)"', match[0])}


def expanded(name: str) -> list[str]:
    """Expand braces in a name as bash does; they are not nested."""
    parts = re.split(r"\{([^{}]*)\}", name)  # odd indices are inside braces
    return ["".join(each) for each in product(*(choices(part) if i % 2 else [part] for i, part in enumerate(parts)))]


def choices(braces: str) -> list[str]:
    steps = re.fullmatch(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?", braces)
    if not steps:
        return braces.split(",")
    return [str(number) for number in range(int(steps[1]), int(steps[2]) + 1, int(steps[3] or 1))]


def parameters_in_table(page: str) -> list[tuple[str, list[int]]]:
    rows = re.findall(r"^\| `([^`]+)`[^|]*\| ([\dx ]+|scalar) \|$", page.split("\n## Parameters\n")[1], re.MULTILINE)
    shapes = [[] if shape == "scalar" else [int(size) for size in shape.split(" x ")] for _, shape in rows]
    return [(each, shape) for (name, _), shape in zip(rows, shapes) for each in expanded(name)]


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / PAGE).read_text("utf-8")


def test_cited_headings_exist(page):
    headings = set(re.findall(r"^#+ (.+)$", page, re.MULTILINE))
    cited = {(name, heading) for name, text in text_files().items() for heading in cited_headings(text)}
    assert {name for name, _ in cited} > {"modeling_intern_vit.py", "modeling_qllama.py", "modeling_internvl.py"}
    assert not {(name, heading) for name, heading in cited if heading not in headings}


def test_a_citation_names_a_heading():
    """`docs/model.md` alone is a link; a comma after it begins a list of headings."""
    for name, text in text_files().items():
        assert len(re.findall(r"docs/model\.md,", text)) == len(CITATION.findall(text)), name


def test_nothing_cites_a_file_outside_the_repository():
    old = re.compile(r"\bSP" + r"EC\b")
    assert not [name for name, text in text_files().items() if old.search(text)]


@pytest.fixture(scope="module")
def published() -> dict[str, list[int]]:
    """The shapes of the published checkpoint's parameters by name."""
    return json.loads((GOLDEN / "internvl_14b_parameters.json").read_text("utf-8"))


def test_the_counts(page, published):
    total = sum(prod(shape) for shape in published.values())
    assert f"{total:,} parameters in {len(published):,} tensors; {2 * total / 1e9:.2f} GB in bfloat16" in page


def test_the_table_of_parameters(page, published):
    table = parameters_in_table(page)
    assert len(table) == len(dict(table)), "a name is in two rows"
    assert dict(table) == published


def test_the_parsers_of_the_page():
    assert cited_headings('see docs/model.md, "A b" and "C", "D"; docs/model.md') == {"A b", "C"}
    assert expanded("a.{0..4..2}.{b,c}") == ["a.0.b", "a.0.c", "a.2.b", "a.2.c", "a.4.b", "a.4.c"]
    rows = "## Parameters\n\n| name | shape |\n|---|---|\n| `a{1,2}` (both) | 3 x 4 |\n| `b` | scalar |\n"
    assert parameters_in_table(f"# Page\n\n{rows}") == [("a1", [3, 4]), ("a2", [3, 4]), ("b", [])]
