"""The rooms of the root: their sizes, and which may import which (see CONTRIBUTING.md)."""

import ast
import re

import pytest

from conftest import CODE, ROOT

# In order: a room imports only rooms above it. With each the most lines that it may have; whoever raises one says why
# in the commit.
ROOMS = {
    "compat_internvl.py": 310,  # 160 when 4.57 and 5.1 are gone
    "configuration_intern_vit.py": 150,
    "configuration_internvl.py": 240,
    "attention_internvl.py": 200,
    "loading_internvl.py": 370,
    "modeling_intern_vit.py": 350,
    "modeling_qllama.py": 450,
    "texts_internvl.py": 310,
    "captions_internvl.py": 290,
    "modeling_internvl.py": 650,
    "training_internvl.py": 260,
    "images_internvl.py": 200,
    "tokenization_internvl.py": 210,
    "processing_internvl.py": 380,
    "sentence_transformers_internvl.py": 450,
    "handler.py": 400,
}
# modeling_internvl hands out the training classes under its own name, when they are asked for.
LAZY = {("modeling_internvl.py", "training_internvl.py")}


def imported_rooms(name: str) -> set[str]:
    nodes = ast.walk(ast.parse((ROOT / name).read_text("utf-8")))
    return {f"{node.module}.py" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1}


def test_every_file_is_a_room():
    assert sorted(ROOMS) == CODE


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_is_no_larger_than_it_may_be(name):
    assert len((ROOT / name).read_text("utf-8").splitlines()) <= ROOMS[name]


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_rooms_above_it(name):
    above = list(ROOMS)[: list(ROOMS).index(name)]
    wrong = {(name, other) for other in imported_rooms(name) if other not in above}
    assert wrong <= LAZY


def test_the_handler_imports_no_room():
    """A container of Inference Endpoints imports it by its path, without the repository on sys.path."""
    imports = re.findall(r"^\s*(?:from|import)\s+\.?(\w+)", (ROOT / "handler.py").read_text("utf-8"), re.MULTILINE)
    assert "transformers" in imports and not {f"{name}.py" for name in imports} & set(ROOMS)


def test_entry_modules_import_every_room_they_need():
    """transformers 4.57 copies the direct imports of a module in a local folder, and no others."""
    entries = set(re.findall(r'"(\w+)\.\w+"', (ROOT / "config.json").read_text("utf-8")))
    for entry in (f"{name}.py" for name in entries):
        needed, seen = imported_rooms(entry), set()
        while needed - seen:
            room = (needed - seen).pop()
            seen.add(room)
            needed |= {other for other in imported_rooms(room) if (room, other) not in LAZY}
        assert needed - {entry} <= imported_rooms(entry), entry


def test_the_page_for_contributors_names_the_rooms_in_this_order():
    named = re.findall(r"`(\w+\.py)`", (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("| room |")[2])
    order = [name for name in named if name in ROOMS]
    assert list(dict.fromkeys(order)) == list(ROOMS)


def test_the_first_sentence_of_a_room_says_one_thing():
    for name in ROOMS:
        text = ast.get_docstring(ast.parse((ROOT / name).read_text("utf-8")))
        assert text and text.split("\n\n")[0].rstrip().endswith("."), name


def test_scripts_are_imported_by_their_full_names():
    """So no script edits `sys.path`, and none needs the tests."""
    for path in (path for folder in ("benchmarks", "examples", "tools") for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text("utf-8")
        assert not re.search(r"sys\.path\b|^(?:from|import) (?:tests|conftest)\b", text, re.MULTILINE), path
