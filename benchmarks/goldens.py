"""The goldens: models and tensors of the original implementation. The tests import this module, and benchmarks too."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from benchmarks.golden_wide import regenerated, regenerated_pixels

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # docs/model.md, "Goldens"


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
    model.load_state_dict(golden_weights(), strict=True)
    return model.eval()


def golden_weights(folder: str = "tiny") -> dict[str, torch.Tensor]:
    """The float32 weights of golden/tiny, or those of golden/wide, which are too large to store."""
    if folder == "tiny":
        return load_file(GOLDEN / folder / "model.safetensors")
    with torch.device("meta"):
        model = repo_class("modeling_internvl.InternVLModel")(golden_config(folder))
    return {name: regenerated(name, parameter.shape) for name, parameter in model.named_parameters()}


@cache
def golden(name: str) -> dict[str, torch.Tensor]:
    """Tensors of the original implementation, such as golden("tiny/expected")."""
    return load_file(GOLDEN / f"{name}.safetensors")


def golden_inputs(folder: str = "tiny") -> dict[str, torch.Tensor]:
    """The inputs of the goldens, with the pixels of golden/wide."""
    return ({} if folder == "tiny" else {"pixel_values": regenerated_pixels()}) | golden(f"{folder}/inputs")


def training_batch(
    objective: str = "stage2", rows: slice = slice(None), inputs: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The training inputs of golden/tiny, or those given, under the names of the models' forward."""
    inputs = golden("tiny/inputs") if inputs is None else inputs
    batch = {"pixel_values": inputs["pixel_values"], "labels": inputs["train.labels"]}
    for name in ("positive", "negative", "summarize", "caption"):
        prefix, ids = "" if name == "caption" else f"{name}_", inputs[f"train.{name}_input_ids"]
        batch |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": (ids > 0).long()}
    if objective == "retrieval":
        batch["image_ids"] = inputs["train.image_ids"]
    return {name: tensor[rows] for name, tensor in batch.items()}
