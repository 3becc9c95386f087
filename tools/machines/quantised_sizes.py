"""Print the bytes of the weights, as they are and quantised, as a Markdown table.

Run by whoever asks which format fits a machine; what_fits.py imports it.

    python -m tools.machines.quantised_sizes                     # the published 14B, from config.json
    python -m tools.machines.quantised_sizes --subfolder tiny    # the checkpoint in tiny/

The model is built on the meta device. Linear layers count as quantised, except the modules that loading keeps. The
formulas below are each format's bytes per weight; tests/loading/test_quantization.py compares the sums with loaded
models.
"""

import argparse
import math
from collections.abc import Callable

from torch import nn

from tools import ROOT, pages
from tools.hub.write_index import empty_model

BNB_BLOCK = 64  # weights per scale in the 4-bit formats of bitsandbytes
NESTED_BLOCK = 256  # such scales per scale of their own
QUANT_MAP = 16 * 4  # the 16 values of 4 bits, in float32
NESTED_QUANT_MAP = 256 * 4  # the 256 values of a scale of 8 bits, in float32
OFFSET = 4  # the mean of the scales, subtracted before they are quantised


def torchao_int8(rows: int, columns: int) -> int:
    """A byte per weight; per row a float32 scale and a zero point of one byte. Dynamic activations add nothing."""
    return rows * columns + rows * (4 + 1)


def bnb_8bit(rows: int, columns: int) -> int:
    """A byte per weight; per row its largest magnitude in float32."""
    return rows * columns + rows * 4


def bnb_4bit(rows: int, columns: int) -> int:
    """Two weights per byte; per block of weights, which may span rows, a scale in float32."""
    weights = rows * columns
    return math.ceil(weights / 2) + math.ceil(weights / BNB_BLOCK) * 4 + QUANT_MAP


def bnb_4bit_double(rows: int, columns: int) -> int:
    """As `bnb_4bit`, but with scales of one byte, and a float32 per block of scales."""
    weights = rows * columns
    scales = math.ceil(weights / BNB_BLOCK)
    nested = math.ceil(scales / NESTED_BLOCK) * 4
    return math.ceil(weights / 2) + scales + nested + QUANT_MAP + NESTED_QUANT_MAP + OFFSET


# Bytes of a weight [rows, columns] in each format.
FORMATS: dict[str, Callable[[int, int], int]] = {
    "torchao int8 (weight-only or dynamic)": torchao_int8,
    "bitsandbytes 8-bit": bnb_8bit,
    "bitsandbytes 4-bit (nf4 or fp4)": bnb_4bit,
    "bitsandbytes 4-bit, double quantisation": bnb_4bit_double,
}


def is_quantised(model: nn.Module, name: str) -> bool:
    """Whether loading quantises the module of that name by default."""
    kept = any(name == skipped or name.startswith(f"{skipped}.") for skipped in model._keep_unquantized)
    return isinstance(model.get_submodule(name), nn.Linear) and not kept


def quantised_bytes(model: nn.Module, weight_bytes: Callable[[int, int], int]) -> int:
    """Bytes of all parameters when the weights of quantised linear layers take `weight_bytes`."""
    return sum(
        weight_bytes(*parameter.shape)
        if name.endswith(".weight") and is_quantised(model, name.removesuffix(".weight"))
        else parameter.nbytes
        for name, parameter in model.named_parameters()
    )


def sizes(model: nn.Module) -> dict[str, int]:
    """Bytes of the model's parameters, first as they are, then in each format."""
    plain = sum(parameter.nbytes for parameter in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {dtype: plain} | {name: quantised_bytes(model, weight_bytes) for name, weight_bytes in FORMATS.items()}


def table(model: nn.Module) -> str:
    """The sizes, as Markdown."""
    by_format = sizes(model)
    plain = next(iter(by_format.values()))
    rows = [(name, f"{size:,}", f"{size / 2**30:.2f}", f"{size / plain:.0%}") for name, size in by_format.items()]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    quantised = sum(is_quantised(model, name) for name in linears)
    kept = ", ".join(f"`{name}`" for name in model._keep_unquantized)
    found = pages.table(["weights as", "bytes", "GiB", "of the plain ones"], rows)
    return f"{found}\n\n{quantised} of {len(linears)} linear layers are quantised; kept: {kept}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subfolder", default="", help="folder of config.json")
    print(table(empty_model(ROOT, parser.parse_args().subfolder)))


if __name__ == "__main__":
    main()
