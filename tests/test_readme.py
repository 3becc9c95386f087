"""README.md is true: its Python runs from top to bottom, and what its text names is there."""

import json
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT

README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.DOTALL | re.MULTILINE)
# A path is something with a slash or an ending that this repository uses, of plain characters.
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
    """Targets of every `make X` in code, inline or fenced; prose about making something is none."""
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
    """Whether a path starts at something of this repository; "OpenGVLab/InternVL-14B-224px" does not."""
    first = path.split("/")[0]
    return "/" not in path or (ROOT / first).exists() or first in {"tools", "tests", "tiny", "examples"}


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text()


@pytest.mark.skipif(not (ROOT / "tiny" / "model.safetensors.index.json").is_file(), reason="tiny/ holds no weights")
def test_python_blocks_run_in_order(readme, tmp_path):
    """In one namespace, from the repository's root, without network; a failure names the block and its line."""
    codes = blocks(readme, "python")
    assert len(codes) > 1
    runner = (
        NO_NETWORK
        + """
import json, sys, traceback
namespace = {"__name__": "__main__"}
for number, (line, code) in enumerate(json.load(open(sys.argv[1])), 1):
    try:
        # Blank lines in front make the traceback count the README's lines.
        exec(compile("\\n" * line + code, "README.md", "exec"), namespace)
    except Exception:
        traceback.print_exc()
        sys.exit(f"block {number}, README.md line {line + 1}")
"""
    )
    starts = [readme[: match.start(2)].count("\n") for match in FENCE.finditer(readme) if match[1] == "python"]
    (tmp_path / "blocks.json").write_text(json.dumps(list(zip(starts, codes))))
    (tmp_path / "runner.py").write_text(runner)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    before = repository_files()
    command = [sys.executable, str(tmp_path / "runner.py"), str(tmp_path / "blocks.json")]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 580, "cwd": ROOT}
    done = subprocess.run(command, env=environment, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    assert repository_files() <= before, "an example left files behind"


def repository_files() -> set[str]:
    listed = subprocess.run(["git", "status", "--porcelain", "-uall"], cwd=ROOT, capture_output=True, text=True)
    return {line for line in listed.stdout.splitlines() if line.startswith("??") and "__pycache__" not in line}


def test_python_blocks_compile_and_are_closed(readme):
    assert readme.count("```") % 2 == 0
    for number, code in enumerate(blocks(readme, "python"), 1):
        compile(code, f"README.md block {number}", "exec")


def test_make_targets_exist(readme):
    named = named_make_targets(readme)
    assert named, "the README names no make target"
    assert named <= make_targets((ROOT / "Makefile").read_text())


def test_named_files_exist(readme):
    named = named_paths(readme) - MADE_BY_COMMANDS
    assert named, "the README names no file"
    assert not [path for path in sorted(named) if not (ROOT / path).exists() and not list(ROOT.glob(f"*/{path}"))]


def test_the_readers_of_the_readme_see_what_they_should():
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
