"""Print how much of the model each rank holds under tensor parallelism, as a Markdown table.

Run by whoever splits the model over processes; what_fits.py imports it.

    python -m tools.machines.tensor_parallel_plan    # the 14B, for 1, 2, 4 and 8 ranks

Nothing is loaded: the sizes are those of the model on the meta device, the splits those of its `_tp_plan`.
"""

import argparse
import re

import torch

from tools import ROOT, pages
from tools.hub.write_index import empty_model

# Per style: the dimension of the weight that it splits, and whether it splits the bias.
SPLITS = {
    "colwise": (0, True),
    "colwise_rep": (0, True),
    "colwise_gather_output": (0, True),
    "rowwise": (1, False),
}


def rules_for(plan: dict[str, str], layer: str) -> list[str]:
    """The entries of a plan that match a layer; a star stands for a number."""
    return [rule for rule in plan if re.fullmatch(re.escape(rule).replace(r"\*", r"\d+"), layer)]


def split_dimensions(model: torch.nn.Module) -> dict[str, int]:
    """The split dimension of each split parameter."""
    found = {}
    for name, _ in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        for rule in rules_for(model._tp_plan, layer):
            dimension, bias_too = SPLITS[model._tp_plan[rule]]
            if kind == "weight" or bias_too:
                found[name] = dimension
    return found


def bytes_held(model: torch.nn.Module, ranks: int) -> dict[str, int]:
    """Bytes of every parameter that each of `ranks` processes holds."""
    split = split_dimensions(model)
    return {name: p.nbytes // (ranks if name in split else 1) for name, p in model.named_parameters()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of processes")
    options = parser.parse_args()
    model = empty_model(ROOT)
    split, rows = split_dimensions(model), []
    for ranks in options.ranks:
        held = bytes_held(model, ranks)
        shared = sum(size for name, size in held.items() if name not in split)
        rows.append((ranks, f"{sum(held.values()) / 1e9:.2f}", f"{shared / 1e9:.2f}"))
    dtype = str(model.dtype).removeprefix("torch.").replace("bfloat16", "bf16")
    print(pages.table(["ranks", f"what each rank holds (GB, {dtype})", "of which not split"], rows))


if __name__ == "__main__":
    main()
