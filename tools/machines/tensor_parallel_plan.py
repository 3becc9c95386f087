"""Print what each process holds of the model when tensor parallelism splits it: a markdown table.

Run by whoever splits the model over processes; what_fits.py imports it.

    python -m tools.machines.tensor_parallel_plan                  # the 14B, for 1, 2, 4 and 8 processes
    python -m tools.machines.tensor_parallel_plan --whole .attn.   # as if layers with this in their name were not split

Nothing is loaded: the sizes are those of the model on the meta device, the splits those of its `_tp_plan`.
"""

import argparse
import re
from pathlib import Path

import torch

from tools import pages
from tools.hub.write_index import empty_model

ROOT = Path(__file__).resolve().parents[2]


# The dimension that a style splits of a weight, and whether it splits the bias.
SPLITS = {
    "colwise": (0, True),
    "colwise_rep": (0, True),
    "colwise_gather_output": (0, True),
    "rowwise": (1, False),
}


def rules_for(plan: dict[str, str], layer: str) -> list[str]:
    """The entries of a plan that speak of a layer; a star stands for a number."""
    return [rule for rule in plan if re.fullmatch(re.escape(rule).replace(r"\*", r"\d+"), layer)]


def split_dimensions(model: torch.nn.Module, whole: str | None = None) -> dict[str, int]:
    """
    Which dimension of which parameter is split.

    Args:
        whole (`str`, *optional*): layers with this in their name count as not split.
    """
    found = {}
    for name, _ in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        for rule in rules_for(model._tp_plan, layer):
            dimension, bias_too = SPLITS[model._tp_plan[rule]]
            if (kind == "weight" or bias_too) and not (whole and whole in name):
                found[name] = dimension
    return found


def bytes_held(model: torch.nn.Module, ranks: int, whole: str | None = None) -> dict[str, int]:
    """How many bytes of every parameter one of `ranks` processes holds."""
    split = split_dimensions(model, whole)
    return {name: p.nbytes // (ranks if name in split else 1) for name, p in model.named_parameters()}


def make_table(model: torch.nn.Module, counts: tuple[int, ...], whole: str | None = None) -> str:
    """The table, a line for each number of processes."""
    split = split_dimensions(model, whole)
    dtype = str(model.dtype).removeprefix("torch.").replace("bfloat16", "bf16")
    rows = []
    for ranks in counts:
        held = bytes_held(model, ranks, whole)
        shared = sum(size for name, size in held.items() if name not in split)
        rows.append((ranks, f"{sum(held.values()) / 1e9:.2f}", f"{shared / 1e9:.2f}"))
    return pages.table(["ranks", f"what each rank holds (GB, {dtype})", "of which not split"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT, help="with config.json and the code")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--whole", metavar="NAME", help="do not split layers with this in their name")
    arguments = parser.parse_args()
    print(make_table(empty_model(arguments.folder), tuple(arguments.ranks), arguments.whole))


if __name__ == "__main__":
    main()
