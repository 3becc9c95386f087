"""Every page is true: its Python runs from top to bottom, and the files, links and targets that it names exist."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

from conftest import FRESH, INDEX, ROOT, run_fork, succeeded
from fresh import Server

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.DOTALL | re.MULTILINE)
# A path consists of plain characters and has a slash, or an ending that this repository uses.
ENDINGS = "py|json|md|model|safetensors|png|txt|ini|toml|yml|yaml"
PLANS = re.compile("<!-- results:plans -->.*?<!-- /results:plans -->", re.DOTALL)
PATH = re.compile(rf"(?<![\w/.:@-])((?:[\w-]+/)+[\w.-]*[\w/]|[\w-][\w.-]*\.(?:{ENDINGS}))(?![\w/])")
LINK = re.compile(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)")
NOT_HERE = {
    "demo.png",  # written by `make demo`, ignored by git
    # Files of the user's data, for benchmarks.evaluate.
    *("captions.json", "classnames.txt", "zeroshot_classification_templates.txt", "names-zh.txt", "templates-zh.txt"),
    # In docs/model.md: a module, and a name in tests/golden without its ending.
    *("qllama.model", "tiny/expected_world2"),
}
NO_NETWORK = """
import socket

def refused(*arguments, **options):
    raise OSError("the examples of a page must not need the network")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refused
"""


def markdown_files() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(name for name in listed.stdout.splitlines() if (ROOT / name).is_file())


PAGES = markdown_files()
CURRENT = [page for page in PAGES if page != "CHANGELOG.md"]  # which names files of the past


def read(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(text) if name == language]


def make_targets(makefile: str) -> set[str]:
    """The targets that a Makefile has rules for."""
    rules = re.findall(r"^([\w. -]+?)\s*:(?!=)", makefile, re.MULTILINE)
    return {target for rule in rules for target in rule.split() if not target.startswith(".")}


def named_make_targets(text: str) -> set[str]:
    """Targets of every `make X` in code, inline or fenced, but not in prose."""
    code = [*re.findall(r"`([^`\n]+)`", FENCE.sub("", text)), *(block for _, block in FENCE.findall(text))]
    lines = [line.strip() for each in code for line in each.splitlines()]
    calls = [re.match(r"(?:\$ )?(?:\w+=\S+ )*make((?: [\w-]+(?![\w=-]))+)", line) for line in lines]
    return {target for call in calls if call for target in call[1].split()}


def named_paths(text: str) -> set[str]:
    """Paths of this repository in inline code, bash and Python blocks; tables of plans name modules, not files."""
    prose = PLANS.sub("", FENCE.sub("", text))
    code = [*re.findall(r"`([^`\n]+)`", prose), *blocks(text, "bash"), *blocks(text, "python")]
    found = set()
    for snippet in code:
        found |= {path for path in PATH.findall(re.sub(r"\w+://\S+", "", snippet)) if is_local(path)}
    return found


def links(text: str) -> set[str]:
    """Links and images within this repository, outside code."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    return {link for link in LINK.findall(prose) if "://" not in link}


def anchors(text: str) -> set[str]:
    """What a link can name after `#`: the headings, as GitHub and the Hub write them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


def is_local(path: str) -> bool:
    """Whether a path begins with a name of this repository; "OpenGVLab/InternVL-14B-224px" does not."""
    first = path.split("/")[0]
    return "/" not in path or (ROOT / first).exists() or first in {"tools", "tests", "tiny", "examples"}


# ---------------------------------------------------------------------------------------------------------- Python

# Packages of the tests' environment that the readers' environment (`make venv`) lacks. They are hidden.
HIDDEN = "torchao bitsandbytes ray gradio mteb selenium matplotlib webdataset pycocoevalcap resvg_py pytest"
READERS = Server(hidden=HIDDEN)
RUNNER = """
import json, sys, traceback

page, blocks = json.load(open(sys.argv[1]))
namespace = {"__name__": "__main__"}
for number, (line, code) in enumerate(blocks, 1):
    try:
        # Blank lines in front make the traceback count the page's lines.
        exec(compile("\\n" * line + code, page, "exec"), namespace)
    except Exception:
        traceback.print_exc()
        sys.exit(f"block {number}, {page} line {line + 1}")
"""
needs_weights = pytest.mark.skipif(not (ROOT / "tiny" / INDEX).is_file(), reason="tiny/ holds no weights")


def python_blocks(page: str, need: str = "") -> list[tuple[int, str]]:
    """Line and code of the blocks that need this, such as a package; by default, of the blocks that name no need."""
    text = read(page)
    found = [match for match in FENCE.finditer(text) if match[1] == "python"]
    needs = [match[0].splitlines()[0].removeprefix("```python").strip() for match in found]
    return [(text[: match.start(2)].count("\n"), match[2]) for match, each in zip(found, needs) if each == need]


def run_blocks(page: str, numbered: list[tuple[int, str]], folder: Path, server: Server, at: Path = ROOT) -> str:
    """Run them in one namespace and without network; return what they print. A failure names the block and its line."""
    (folder / "blocks.json").write_text(json.dumps([page, numbered]))
    (folder / "runner.py").write_text(NO_NETWORK + RUNNER)
    # The path is like the current folder of a reader's interpreter.
    environment = {"HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": str(ROOT)}
    before = repository_files()
    done = succeeded(run_fork([folder / "runner.py", folder / "blocks.json"], at, server=server, **environment))
    assert repository_files() <= before, "an example left files behind"
    return done.stdout


@needs_weights
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_blocks_run_in_order(page, tmp_path):
    printed = run_blocks(page, python_blocks(page), tmp_path, READERS)
    if page == "README.md":
        assert "['a photo of a panda', '狐狸的图片', '自転車の写真']" in printed


@needs_weights
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page, "torchao")])
def test_blocks_that_need_torchao(page, tmp_path):
    """They run after the first block, which loads the model and defines its path."""
    run_blocks(page, [python_blocks(page)[0], *python_blocks(page, "torchao")], tmp_path, FRESH)


@needs_weights
def test_the_lines_for_a_gpu(trained, tmp_path):
    """With another id and another device; `photo.jpg` is the reader's own."""
    ((line, code),) = python_blocks("README.md", "gpu")
    assert len([each for each in code.splitlines() if each]) == 8  # the formatter wants a blank one after the imports
    changes = {'"ORG/InternVL-14B"': repr(str(trained)), 'device_map="auto"': 'device_map="cpu"', '"cuda"': '"cpu"'}
    for old, new in changes.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    Image.open(ROOT / "examples" / "pictures" / "fox.png").convert("RGB").save(tmp_path / "photo.jpg")
    assert re.match(r"tensor\(\[\[.*\]\]", run_blocks("README.md", [(line, code)], tmp_path, READERS, tmp_path))


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_is_run(page):
    run = [block for need in ("", "torchao", "gpu") for block in python_blocks(page, need)]
    assert len(blocks(read(page), "python")) == len(run)
    assert not python_blocks(page, "gpu") or page == "README.md"


def test_readers_install_the_tested_versions():
    wanted = (ROOT / "examples" / "requirements.txt").read_text("utf-8").splitlines()
    tested = (ROOT / "tests" / "requirements.txt").read_text("utf-8").splitlines()
    assert not [line for line in wanted if not line.startswith("#") and line not in tested]
    assert not set(HIDDEN.split()) & {line.split("==")[0] for line in wanted}


def repository_files() -> set[str]:
    listed = subprocess.run(["git", "status", "--porcelain", "-uall"], cwd=ROOT, capture_output=True, text=True)
    return {line for line in listed.stdout.splitlines() if line.startswith("??") and "__pycache__" not in line}


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_closed(page):
    assert len(re.findall("^```", read(page), re.MULTILINE)) == 2 * len(FENCE.findall(read(page)))


# ----------------------------------------------------------------------------------------- names, links and sizes


@pytest.mark.parametrize("page", CURRENT)
def test_make_targets_exist(page):
    assert named_make_targets(read(page)) <= make_targets((ROOT / "Makefile").read_text())


def test_make_help_lists_every_command():
    makefile = (ROOT / "Makefile").read_text()
    commands = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = dict(re.findall(r"^make ([\w-]+) +(\S.*)$", done.stdout, re.MULTILINE))
    assert list(listed) == commands and len(done.stdout.splitlines()) == len(commands)


@pytest.mark.parametrize("page", CURRENT)
def test_named_files_exist(page):
    named = named_paths(read(page)) - NOT_HERE
    assert not [path for path in sorted(named) if not (ROOT / path).exists() and not list(ROOT.glob(f"*/{path}"))]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_names_are_found(page):
    assert named_make_targets(read(page)) and named_paths(read(page)) and links(read(page))


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_exist(page):
    for link in sorted(links(read(page))):
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path if path else ROOT / page).resolve()
        assert target.is_relative_to(ROOT) and target.exists(), link
        assert not anchor or anchor in anchors(target.read_text("utf-8")), link


def test_the_card_is_short_and_links_every_page():
    card = read("README.md")
    assert len(card.splitlines()) <= 300
    assert {page for page in PAGES if page.startswith("docs/")} <= {link.partition("#")[0] for link in links(card)}


def test_the_citation_is_that_of_the_card():
    cited = yaml.safe_load(read("CITATION.cff"))["preferred-citation"]
    names = [each.get("name") or f"{each['family-names']}, {each['given-names']}" for each in cited["authors"]]
    found = {name: str(cited[name]) for name in ("title", "journal", "year")} | {"author": " and ".join(names)}
    assert found == dict(re.findall(r"(\w+) += \{(.*)\}", blocks(read("README.md"), "bibtex")[0]))


def test_the_parsers_of_pages():
    text = (
        "See `tools/absent.py`, [here](docs/gone.md#part), `make absent` and https://x.org/tools/no.py.\n"
        "To make sense of `repo/model` read `modeling_x.py`; `OpenGVLab/InternVL` is elsewhere.\n"
        "```bash\nmake test lint\nX=1 make matrix PATH_TO=x\npython tests/some.py --x tiny/y.json\n```\n"
        "```python\nx = 1\n```\n```python\ny = x\n```\n"
    )
    assert blocks(text, "python") == ["x = 1\n", "y = x\n"]
    assert named_make_targets(text) == {"absent", "test", "lint", "matrix"}
    assert named_paths(text) == {"tools/absent.py", "modeling_x.py", "tests/some.py", "tiny/y.json"}
    assert links(text) == {"docs/gone.md#part"}
    assert links("`[x](y)` ![`code`](a.png) [b](https://x.org) [c](#d)\n```\n[e](f)\n```\n") == {"a.png", "#d"}
    headings = "# The 14B, on a `tiny/` GPU\n## 狐狸_a\n### [One](x.md)\n### One\n```bash\n# no heading\n```\n"
    assert anchors(headings) == {"the-14b-on-a-tiny-gpu", "狐狸_a", "one", "one-1"}
    assert make_targets("A = 1\nB := 2\n.PHONY: a b\ntest lint: x\n\tcmd: y\nall:\n") == {"test", "lint", "all"}
