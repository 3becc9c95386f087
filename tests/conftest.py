"""What several test files need. Classes come as a user's `from_pretrained` gets them: by transformers' loader."""

import json
import os
from functools import cache
from pathlib import Path

# Nothing here may touch the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # SPEC, "Reading the goldens"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long or much memory; run with `-m slow`")


def pytest_collection_modifyitems(config, items):
    """Leave slow tests out unless they were asked for, by `-m` or by name."""
    asked = config.option.markexpr or config.option.keyword or any("::" in argument for argument in config.args)
    if asked:
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


def repo_class(reference: str):
    """A class of the repository, such as "modeling_internvl.InternVLModel"."""
    return get_class_from_dynamic_module(reference, str(ROOT))


def golden_config(folder: str = "tiny", attn_implementation: str | None = None):
    """The config of the goldens, in the original's form: no model_type, no tie_word_embeddings."""
    fields = json.loads((GOLDEN / folder / "config.json").read_text())
    return repo_class("configuration_internvl.InternVLConfig")(**fields, attn_implementation=attn_implementation)


def golden_model(class_name: str = "InternVLModel", attn_implementation: str | None = None):
    """The model of golden/tiny, float32, in eval mode."""
    model = repo_class(f"modeling_internvl.{class_name}")(golden_config("tiny", attn_implementation))
    model.load_state_dict(load_file(GOLDEN / "tiny" / "model.safetensors"), strict=True)
    return model.eval()


@cache
def golden(name: str) -> dict[str, torch.Tensor]:
    """Tensors of the original implementation, such as golden("tiny/expected")."""
    return load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="session")
def tiny_dir() -> Path:
    """The folder of the trained tiny checkpoint; load it with `from_pretrained(ROOT, subfolder="tiny")`."""
    return ROOT / "tiny"


@pytest.fixture
def model():
    return golden_model()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return golden("tiny/inputs")


@pytest.fixture
def expected() -> dict[str, torch.Tensor]:
    return golden("tiny/expected")
