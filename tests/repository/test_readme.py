"""README.md is true: its Python runs from top to bottom, and all files and targets that it names exist."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import LAST_RESORT, ROOT

README = ROOT / "README.md"
PAGES = ("README.md", "CONTRIBUTING.md")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.DOTALL | re.MULTILINE)
# A path consists of plain characters and has a slash, or an ending that this repository uses.
ENDINGS = "py|json|md|model|safetensors|png|txt|ini|toml|yml|yaml"
PLANS = re.compile("<!-- results:plans -->.*?<!-- /results:plans -->", re.DOTALL)
PATH = re.compile(rf"(?<![\w/.:@-])((?:[\w-]+/)+[\w.-]*[\w/]|[\w-][\w.-]*\.(?:{ENDINGS}))(?![\w/])")
MADE_BY_COMMANDS = {"demo.png"}  # written by `make demo`, ignored by git
NO_NETWORK = """
import socket

def refused(*arguments, **options):
    raise OSError("the README's examples must not need the network")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refused
"""


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
    calls = [re.match(r"(?:\$ )?make((?: [\w-]+)+)", line) for line in lines]
    return {target for call in calls if call for target in call[1].split()}


def named_paths(text: str) -> set[str]:
    """Paths of this repository in inline code, links and bash blocks; tables of plans name modules, not files."""
    prose = PLANS.sub("", FENCE.sub("", text))
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link and not link.startswith("#")]
    code = [*re.findall(r"`([^`\n]+)`", prose), *blocks(text, "bash"), *blocks(text, "python")]
    found = {link.split("#")[0] for link in links}
    for snippet in code:
        found |= {path for path in PATH.findall(re.sub(r"\w+://\S+", "", snippet)) if is_local(path)}
    return found


def is_local(path: str) -> bool:
    """Whether a path begins with a name of this repository; "OpenGVLab/InternVL-14B-224px" does not."""
    first = path.split("/")[0]
    return "/" not in path or (ROOT / first).exists() or first in {"tools", "tests", "tiny", "examples"}


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text()


# Packages of the tests' environment that the readers' environment (`make venv`) lacks. They are hidden.
HIDDEN = "torchao bitsandbytes ray gradio mteb selenium matplotlib webdataset pycocoevalcap resvg_py pytest"
RUNNER = """
import json, sys, traceback
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *others):
        return None if name.split(".")[0] in sys.argv[2].split() else super().find_spec(name, *others)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
namespace = {"__name__": "__main__"}
for number, (line, code) in enumerate(json.load(open(sys.argv[1])), 1):
    try:
        # Blank lines in front make the traceback count the README's lines.
        exec(compile("\\n" * line + code, "README.md", "exec"), namespace)
    except Exception:
        traceback.print_exc()
        sys.exit(f"block {number}, README.md line {line + 1}")
"""
needs_weights = pytest.mark.skipif(
    not (ROOT / "tiny" / "model.safetensors.index.json").is_file(), reason="tiny/ holds no weights"
)


def python_blocks(text: str, package: str = "") -> list[tuple[int, str]]:
    """Line and code of the blocks that need this package; by default, of the blocks that name none."""
    found = [match for match in FENCE.finditer(text) if match[1] == "python"]
    needs = [match[0].splitlines()[0].removeprefix("```python").strip() for match in found]
    return [(text[: match.start(2)].count("\n"), match[2]) for match, need in zip(found, needs) if need == package]


def run_blocks(numbered: list[tuple[int, str]], folder: Path, hidden: str) -> None:
    """Run them in one namespace, at the repository's root, without network; a failure names the block and its line."""
    (folder / "blocks.json").write_text(json.dumps(numbered))
    (folder / "runner.py").write_text(NO_NETWORK + RUNNER)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    environment["PYTHONPATH"] = str(ROOT)  # like the current folder of a reader's interpreter
    before = repository_files()
    command = [sys.executable, str(folder / "runner.py"), str(folder / "blocks.json"), hidden]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": LAST_RESORT, "cwd": ROOT}
    done = subprocess.run(command, env=environment, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    assert repository_files() <= before, "an example left files behind"


@needs_weights
def test_python_blocks_run_in_order(readme, tmp_path):
    numbered = python_blocks(readme)
    assert len(numbered) > 1
    run_blocks(numbered, tmp_path, HIDDEN)


@needs_weights
def test_the_block_that_needs_torchao(readme, tmp_path):
    """It runs after the first block, which loads the model and defines its path."""
    (block,) = python_blocks(readme, "torchao")
    run_blocks([python_blocks(readme)[0], block], tmp_path, "")


def test_every_python_block_is_run(readme):
    assert len(blocks(readme, "python")) == len(python_blocks(readme)) + len(python_blocks(readme, "torchao"))


def test_readers_install_the_tested_versions():
    wanted = (ROOT / "examples" / "requirements.txt").read_text("utf-8").splitlines()
    tested = (ROOT / "tests" / "requirements.txt").read_text("utf-8").splitlines()
    assert not [line for line in wanted if not line.startswith("#") and line not in tested]
    assert not set(HIDDEN.split()) & {line.split("==")[0] for line in wanted}


def repository_files() -> set[str]:
    listed = subprocess.run(["git", "status", "--porcelain", "-uall"], cwd=ROOT, capture_output=True, text=True)
    return {line for line in listed.stdout.splitlines() if line.startswith("??") and "__pycache__" not in line}


def test_python_blocks_compile_and_are_closed(readme):
    assert readme.count("```") % 2 == 0
    for number, code in enumerate(blocks(readme, "python"), 1):
        compile(code, f"README.md block {number}", "exec")


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    named = named_make_targets((ROOT / page).read_text("utf-8"))
    assert named, "the page names no make target"
    assert named <= make_targets((ROOT / "Makefile").read_text())


def test_make_help_lists_every_command():
    makefile = (ROOT / "Makefile").read_text()
    commands = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = dict(re.findall(r"^make ([\w-]+) +(\S.*)$", done.stdout, re.MULTILINE))
    assert list(listed) == commands and len(done.stdout.splitlines()) == len(commands)


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    named = named_paths((ROOT / page).read_text("utf-8")) - MADE_BY_COMMANDS
    assert named, "the page names no file"
    assert not [path for path in sorted(named) if not (ROOT / path).exists() and not list(ROOT.glob(f"*/{path}"))]


def test_the_citation_is_that_of_the_readme(readme):
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["preferred-citation"]
    names = [each.get("name") or f"{each['family-names']}, {each['given-names']}" for each in cited["authors"]]
    found = {name: str(cited[name]) for name in ("title", "journal", "year")} | {"author": " and ".join(names)}
    assert found == dict(re.findall(r"(\w+) += \{(.*)\}", blocks(readme, "bibtex")[0]))


def test_the_parsers_of_the_readme():
    text = (
        "See `tools/absent.py`, [here](docs/gone.md#part), `make absent` and https://x.org/tools/no.py.\n"
        "To make sense of `repo/model` read `modeling_x.py`; `OpenGVLab/InternVL` is elsewhere.\n"
        "```bash\nmake test lint\npython tests/some.py --x tiny/y.json\n```\n"
        "```python\nx = 1\n```\n```python\ny = x\n```\n"
    )
    assert blocks(text, "python") == ["x = 1\n", "y = x\n"]
    assert named_make_targets(text) == {"absent", "test", "lint"}
    assert named_paths(text) == {"tools/absent.py", "docs/gone.md", "modeling_x.py", "tests/some.py", "tiny/y.json"}
    assert make_targets("A = 1\nB := 2\n.PHONY: a b\ntest lint: x\n\tcmd: y\nall:\n") == {"test", "lint", "all"}
