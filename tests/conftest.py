"""What several test files need. Classes come as a user's `from_pretrained` gets them: by transformers' loader."""

import json
import os
import tempfile
from functools import cache
from pathlib import Path

# Nothing here may touch the network, and no two runs may share the folder that the loader copies code into.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "HF_MODULES_CACHE" not in os.environ:  # a process that a test starts inherits it
    _modules_cache = tempfile.TemporaryDirectory(prefix="internvl-tests-")
    os.environ["HF_MODULES_CACHE"] = _modules_cache.name

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


def training_batch(objective: str = "stage2", rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    """The training inputs of golden/tiny, under the names of the models' forward."""
    inputs = golden("tiny/inputs")
    batch = {"pixel_values": inputs["pixel_values"], "labels": inputs["train.labels"]}
    for name in ("positive", "negative", "summarize", "caption"):
        prefix, ids = "" if name == "caption" else f"{name}_", inputs[f"train.{name}_input_ids"]
        batch |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": (ids > 0).long()}
    if objective == "retrieval":
        batch["image_ids"] = inputs["train.image_ids"]
    return {name: tensor[rows] for name, tensor in batch.items()}


@pytest.fixture
def model():
    return golden_model()


@pytest.fixture
def expected() -> dict[str, torch.Tensor]:
    return golden("tiny/expected")
