"""A constant that is repeated in several files, because some are imported alone, has the same value in all."""

import ast
import json
from pathlib import Path

import pytest
from transformers import AutoProcessor

from conftest import ROOT

# Files that are not imported together: a host loads only `handler.py` or `sentence_transformers_internvl.py`.
COPIES = {
    "MATCH_WEIGHT": ("handler.py", "examples/search_index.py", "tools/tiny/evaluate_tiny.py"),
    "MODES": ("handler.py", "modeling_internvl.py", "sentence_transformers_internvl.py"),
}
# Files that contain the default prompt of captions as text.
PROMPTS = (
    "handler.py",
    "examples/embed_dataset.py",
    "examples/finetune.py",
    "examples/search_index.py",
    "benchmarks/evaluate.py",
)


def constants(path: Path) -> dict[str, object]:
    """The literals that are assigned to names at the top level of a module."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_equal(name):
    values = {path: constants(ROOT / path)[name] for path in COPIES[name]}
    assert len(set(values.values())) == 1, values


def test_a_copy_that_differs_is_found(tmp_path):
    (tmp_path / "x.py").write_text("A = 0.2\nB = (1, 'a')\nC = len(B)\n")
    assert constants(tmp_path / "x.py") == {"A": 0.2, "B": (1, "a")}


def test_the_default_prompt_is_the_same_in_words_and_in_ids():
    """The processor's text, the config's ids, and the copies in programs."""
    prompt = constants(ROOT / "processing_internvl.py")["DEFAULT_PROMPT"]
    processor = AutoProcessor.from_pretrained(ROOT, subfolder="tiny", trust_remote_code=True)
    config = json.loads((ROOT / "tiny" / "config.json").read_text())
    assert processor(text=prompt, task="caption").input_ids.tolist() == [config["caption_prompt_ids"]]
    for name in PROMPTS:
        assert f'"{prompt}"' in (ROOT / name).read_text(), name
