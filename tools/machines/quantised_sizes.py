"""Print how many bytes the weights take, as they are and quantised, as a markdown table.

Run by whoever asks which format fits a machine; what_fits.py imports it.

    python -m tools.machines.quantised_sizes                     # the published 14B, from config.json
    python -m tools.machines.quantised_sizes --subfolder tiny    # the checkpoint in tiny/

The model is built on the meta device; a linear layer is counted as quantised unless it is in the list of modules that
loading leaves alone. What a library adds to each quantised weight is stated below;
tests/loading/test_quantization.py compares the sums with loaded models.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from torch import nn

from tools import pages
from tools.hub.write_index import empty_model

ROOT = Path(__file__).resolve().parents[2]


BNB_BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit formats
NESTED_BLOCK = 256  # scales of those that share a scale of their own
QUANT_MAP = 16 * 4  # the 16 values that 4 bits stand for, in float32
NESTED_QUANT_MAP = 256 * 4  # the 256 values that a scale of 8 bits stands for
OFFSET = 4  # the mean of the scales, taken off before they are quantised


def torchao_int8(rows: int, columns: int) -> int:
    """A byte per weight; per row a float32 scale and a zero point of a byte. Dynamic activations store nothing more."""
    return rows * columns + rows * (4 + 1)


def bnb_8bit(rows: int, columns: int) -> int:
    """A byte per weight; per row its largest magnitude in float32."""
    return rows * columns + rows * 4


def bnb_4bit(rows: int, columns: int) -> int:
    """Two weights a byte; per block of weights, which may go over the end of a row, its scale in float32."""
    weights = rows * columns
    return math.ceil(weights / 2) + math.ceil(weights / BNB_BLOCK) * 4 + QUANT_MAP


def bnb_4bit_double(rows: int, columns: int) -> int:
    """As `bnb_4bit`, but a scale is a byte, and per block of scales there is a float32."""
    weights = rows * columns
    scales = math.ceil(weights / BNB_BLOCK)
    nested = math.ceil(scales / NESTED_BLOCK) * 4
    return math.ceil(weights / 2) + scales + nested + QUANT_MAP + NESTED_QUANT_MAP + OFFSET


# What each format takes for a weight [rows, columns].
FORMATS: dict[str, Callable[[int, int], int]] = {
    "torchao int8 (weight-only or dynamic)": torchao_int8,
    "bitsandbytes 8-bit": bnb_8bit,
    "bitsandbytes 4-bit (nf4 or fp4)": bnb_4bit,
    "bitsandbytes 4-bit, double quantisation": bnb_4bit_double,
}


def is_quantised(model: nn.Module, name: str) -> bool:
    """Whether loading quantises the module of that name, if nobody says otherwise."""
    kept = any(name == skipped or name.startswith(f"{skipped}.") for skipped in model._keep_unquantized)
    return isinstance(model.get_submodule(name), nn.Linear) and not kept


def quantised_bytes(model: nn.Module, weight_bytes: Callable[[int, int], int]) -> int:
    """Bytes of all parameters when the weights of quantised linear layers take `weight_bytes`."""
    total = 0
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and is_quantised(model, module):
            total += weight_bytes(*parameter.shape)
        else:
            total += parameter.nbytes
    return total


def sizes(model: nn.Module) -> dict[str, int]:
    """Bytes of the model's parameters in each format, the first as they are."""
    plain = sum(parameter.nbytes for parameter in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {dtype: plain} | {name: quantised_bytes(model, weight_bytes) for name, weight_bytes in FORMATS.items()}


def table(model: nn.Module) -> str:
    """The sizes, as markdown."""
    found = sizes(model)
    plain = next(iter(found.values()))
    rows = [(name, f"{size:,}", f"{size / 2**30:.2f}", f"{size / plain:.0%}") for name, size in found.items()]
    lines = [pages.table(["weights as", "bytes", "GiB", "of the plain ones"], rows)]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    quantised = sum(is_quantised(model, name) for name in linears)
    kept = ", ".join(f"`{name}`" for name in model._keep_unquantized)
    return "\n".join([*lines, "", f"{quantised} of {len(linears)} linear layers are quantised; kept: {kept}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subfolder", default="", help="where config.json is")
    print(table(empty_model(ROOT, parser.parse_args().subfolder)))


if __name__ == "__main__":
    main()
