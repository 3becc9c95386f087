"""Compare quantised models with the same weights in float32, and print how much their embeddings differ.

Run by whoever changes which layers are quantised. speed.py and the tests import it.

    python -m benchmarks.quantised_accuracy           # tiny/, on examples/pictures and their names in three languages
    python -m benchmarks.quantised_accuracy --wide    # also golden/wide: one layer of each tower at the 14B's widths

Prints the lowest and the mean cosine of embeddings to those of the float32 model, and the largest difference of a
probability of image-text matching. Needs tests/requirements.txt; `--wide` also 6 GB of memory and 2 GB of disk.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig, TorchAoConfig

from benchmarks import this_machine
from benchmarks.goldens import ROOT, golden_config, golden_inputs, golden_weights, repo_class
from tools import pages

TINY = {"subfolder": "tiny", "trust_remote_code": True}
PICTURES = ROOT / "examples" / "pictures"
PHRASES = {"en": "a photo of {}", "zh": "一张{}的照片", "ja": "{}の写真"}
EMBEDDINGS = ("image, InternVL-C", "image, InternVL-G", "text")
MATCH = "match"
METHODS: dict[str, Callable[[], Any]] = {
    "none, bfloat16": lambda: None,
    "torchao int8 weight-only": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao int8 dynamic": lambda: TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
    "bitsandbytes 8-bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes fp4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes nf4, double": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
}


@torch.inference_mode()
def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Embeddings [N, width] in both modes and of texts, and probabilities of a match [M], all in float32."""
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    count = min(len(pixels), len(inputs["match_ids"]))
    found = {
        EMBEDDINGS[0]: model.embed_image(pixels, mode="InternVL-C"),
        EMBEDDINGS[1]: model.embed_image(pixels, mode="InternVL-G"),
        EMBEDDINGS[2]: model.embed_text(ids),
        MATCH: model.match(pixels[:count], inputs["match_ids"][:count]).float().softmax(-1)[:, 1],
    }
    return {name: tensor.float() for name, tensor in found.items()}


def compare(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The lowest and the mean cosine of each kind of embedding; of matching, the largest difference."""
    cosines = {name: torch.cosine_similarity(found[name], wanted[name], dim=-1) for name in EMBEDDINGS}
    result: dict[str, Any] = {name: (float(each.min()), float(each.mean())) for name, each in cosines.items()}
    return result | {MATCH: float((found[MATCH] - wanted[MATCH]).abs().max())}


def tiny_inputs() -> dict[str, torch.Tensor]:
    """The example images, their names in three languages to embed, and texts to match, every other wrong."""
    processor = AutoProcessor.from_pretrained(ROOT, **TINY)
    examples = json.loads((PICTURES / "examples.json").read_text("utf-8"))
    names = [example["name"] for example in examples]
    texts = [phrase.format(name[language]) for language, phrase in PHRASES.items() for name in names]
    pairs = [names[index if index % 2 else index - 2]["en"] for index in range(len(names))]
    return {
        "pixel_values": processor(images=[PICTURES / example["file"] for example in examples]).pixel_values,
        "input_ids": processor(text=texts).input_ids,
        "match_ids": processor(text=pairs, task="match").input_ids,
    }


def load_tiny(**options: Any) -> nn.Module:
    return with_plain_kernels(AutoModel.from_pretrained(ROOT, **TINY, **options).eval())


def with_plain_kernels(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes 0.50 from its fast 4-bit kernel for CPUs where that fails at the first call: it repacks weights
    by 32 rows and whole blocks of a row, which do not divide those of tiny/. Its plain path takes every shape. All
    layers of the 14B fit.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            fits = module.in_features % module.weight.blocksize == 0 and module.out_features % 32 == 0
            module.support_avx512bf16_for_cpu = fits
    return model


def wide_inputs() -> dict[str, torch.Tensor]:
    """The inputs of golden/wide."""
    inputs = golden_inputs("wide")
    return inputs | {"match_ids": inputs["input_ids"]}


def write_wide(folder: Path) -> None:
    """Write golden/wide's weights, in bfloat16 like the published ones, so that loading can quantise them."""
    tensors = {name: tensor.bfloat16() for name, tensor in golden_weights("wide").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")


def load_wide(folder: Path, **options: Any) -> nn.Module:
    model_class = repo_class("modeling_internvl.InternVLModel")
    return model_class.from_pretrained(folder, config=golden_config("wide"), **options).eval()


def rows(load: Callable[..., nn.Module], inputs: dict[str, torch.Tensor]) -> list[list[str]]:
    """A row of the table for each method; one model is in memory at a time, beside the float32 outputs."""
    wanted = outputs(load(dtype=torch.float32), inputs)
    lines = []
    for name, config in tqdm(METHODS.items(), "methods"):
        options = {} if config() is None else {"quantization_config": config()}
        found = compare(outputs(load(dtype=torch.bfloat16, **options), inputs), wanted)
        cosines = ["{:.5f}, {:.5f}".format(*found[kind]) for kind in EMBEDDINGS]
        lines.append([name, *cosines, f"{found[MATCH]:.4f}"])
    return lines


def print_table(title: str, lines: list[list[str]]) -> None:
    head = [title, *(f"{name}: lowest, mean cosine" for name in EMBEDDINGS), "match: largest difference"]
    print(pages.table(head, lines), end="\n\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wide", action="store_true", help="also golden/wide")
    arguments = parser.parse_args()
    print_table("`tiny/`", rows(load_tiny, tiny_inputs()))
    if arguments.wide:
        with tempfile.TemporaryDirectory() as folder:
            write_wide(Path(folder))
            print_table("`golden/wide`", rows(lambda **options: load_wide(Path(folder), **options), wide_inputs()))
    packages = this_machine.listed(this_machine.versions("torch", "transformers", "torchao", "bitsandbytes"))
    machine = f"{this_machine.processor_name()}, {torch.get_num_threads()} threads"
    print(f"Compared with float32, from bfloat16 weights and in bfloat16, on {machine}; {packages}.")


if __name__ == "__main__":
    main()
