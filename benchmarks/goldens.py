"""The goldens: models and tensors of the original implementation. The tests import this module, and benchmarks too."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"


def repo_class(reference: str) -> Any:
    """A class of the repository, such as "modeling_internvl.InternVLModel"."""
    return get_class_from_dynamic_module(reference, str(ROOT))


def golden_config(folder: str = "tiny", attn_implementation: str | None = None) -> Any:
    """The config of the goldens, in the original's form: no model_type, no tie_word_embeddings."""
    fields = json.loads((GOLDEN / folder / "config.json").read_text("utf-8"))
    return repo_class("configuration_internvl.InternVLConfig")(**fields, attn_implementation=attn_implementation)


def golden_model(class_name: str = "InternVLModel", attn_implementation: str | None = None) -> Any:
    """The model of golden/tiny, float32, in eval mode."""
    model = repo_class(f"modeling_internvl.{class_name}")(golden_config("tiny", attn_implementation))
    model.load_state_dict(load_file(GOLDEN / "tiny" / "model.safetensors"), strict=True)
    return model.eval()


@cache
def golden(name: str) -> dict[str, torch.Tensor]:
    """Tensors of the original implementation, such as golden("tiny/expected")."""
    return load_file(GOLDEN / f"{name}.safetensors")
