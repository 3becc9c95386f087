"""Write the tables of machines that run the 14B (what you have, what to type, what it takes) and of its plans.

All rows and the plans are in docs/machines.md, the commonest rows also in README.md.

Run by whoever changes sizes, plans or memory of the model, or renews benchmarks/full_size.json. `make test-slow` runs
`--check`.

    python -m tools.machines.what_fits             # computes all rows, in some minutes; writes the tables
    python -m tools.machines.what_fits --check     # exits with 1 if the pages have other tables

Sizes come from the model on the meta device, cards and their peaks from simulate_devices.py, ranks from
tensor_parallel_plan.py, formats from quantised_sizes.py, and CPUs from benchmarks/full_size.json.
"""

import argparse
import json
import sys

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tools import ROOT
from tools.hub.write_index import empty_model
from tools.machines import quantised_sizes, tensor_parallel_plan
from tools.machines import simulate_devices as sim
from tools.pages import put, table, taken, versions

CARD, PAGE = ROOT / "README.md", ROOT / "docs" / "machines.md"
MEASURED = ROOT / "benchmarks" / "full_size.json"
GB, GIB = 10**9, 1 << 30
SEVERAL_CARDS = {"2x24": "two GPUs of 24 GB", "4x12": "four of 12 GB", "8x8": "eight of 8 GB"}
UNEVEN = "24+8+8:sequential"
SINGLE_CARDS = ("24", "16", "12", "8")
VISION = "modeling_internvl.InternVLVisionModelWithProjection"
PLAN_TITLES = {**SEVERAL_CARDS, UNEVEN: "GPUs of 24, 8 and 8 GB"}
HEAD = ("what you have", "what to type", "what it takes")
# The rows of README.md.
COMMON = (
    "one large GPU",
    "two GPUs of 24 GB",
    "one GPU of 24 GB, and RAM",
    "one GPU, bitsandbytes 8-bit",
    "one GPU, bitsandbytes 4-bit, double quantisation",
    "16 GiB of RAM, no GPU",
)
Row = tuple[str, str, str]


def gigabytes(size: float) -> str:
    return f"{size / GB:.1f} GB"


def gibibytes(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def rows_of_parts() -> list[Row]:
    """What can be loaded of the checkpoint, in bfloat16."""
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    contrastive = AutoConfig.from_pretrained(ROOT, trust_remote_code=True, contrastive_only=True)
    with torch.device("meta"):
        models = [
            AutoModel.from_config(config, trust_remote_code=True),
            AutoModel.from_config(contrastive, trust_remote_code=True),
            AutoModelForTextEncoding.from_config(config, trust_remote_code=True),
            get_class_from_dynamic_module(VISION, str(ROOT))(config),
        ]
    joint, *parts = (gigabytes(2 * sum(p.numel() for p in model.parameters())) for model in models)
    text = "`AutoModelForTextEncoding.from_pretrained(repo, ...)`"
    vision = f'`get_class_from_dynamic_module("{VISION}", repo).from_pretrained(repo, ...)`'
    return [
        ("one large GPU", '`device_map="cuda"`', f"{joint} of weights"),
        ("no need of InternVL-G, matching, captions", "`contrastive_only=True`", parts[0]),
        ("texts only", text, parts[1]),
        ("images only, in mode InternVL-C", vision, parts[2]),
    ]


def rows_of_cards(reports: dict[str, sim.Report]) -> list[Row]:
    rows = [(words, '`device_map="auto"`', peaks(reports[name])) for name, words in SEVERAL_CARDS.items()]
    rows.append((PLAN_TITLES[UNEVEN], f"`{reports[UNEVEN].setup.call}`", peaks(reports[UNEVEN])))
    for name in SINGLE_CARDS:
        takes = f"{peaks(reports[name])}; {gigabytes(reports[name].weights['cpu'])} of weights wait in RAM"
        rows.append((f"one GPU of {name} GB, and RAM", '`device_map="auto"`', takes))
    return rows


def peaks(report: sim.Report) -> str:
    found = [f"{report.peak[f'cuda:{card}'] / GB:.1f}" for card in range(len(report.setup.cards))]
    return f"at most {', '.join(found)} GB"


def rows_of_processes() -> list[Row]:
    model, rows = empty_model(ROOT), []
    for ranks in (2, 4, 8):
        held = gigabytes(sum(tensor_parallel_plan.bytes_held(model, ranks).values()))
        size = f'`distributed_config={{"tp_size": {ranks}}}` (before transformers 5.13 `tp_plan="auto"`)'
        call = f"{size} under `torchrun --nproc-per-node {ranks}`"
        rows.append((f"{ranks} GPUs, tensor parallelism", call, f"{held} of weights each"))
    return rows


def rows_of_formats() -> list[Row]:
    calls = {
        "bitsandbytes 8-bit": "BitsAndBytesConfig(load_in_8bit=True)",
        "bitsandbytes 4-bit, double quantisation": (
            'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'
        ),
    }
    sizes = quantised_sizes.sizes(empty_model(ROOT))
    return [
        (f"one GPU, {name}", f"`quantization_config={call}`", f"{gigabytes(sizes[name])} of weights")
        for name, call in calls.items()
    ]


def rows_of_cpus(results: dict) -> list[Row]:
    calls = {
        "mapped": ("RAM of any size, no GPU", '`dtype="auto"`'),
        "disk": ("16 GiB of RAM, no GPU", '`device_map={"": "disk"}`'),
        "ram+disk": ("16 GiB of RAM, 8 of them for weights, no GPU", '`device_map="auto", max_memory={"cpu": "8GiB"}`'),
        "int8": (
            "18 GiB of RAM, no GPU, and no reading from the disk once it is loaded",
            "`quantization_config=TorchAoConfig(Int8WeightOnlyConfig())`",
        ),
    }
    return [(*calls[plan], cost(results["plans"][plan])) for plan in calls]


def cost(plan: dict) -> str:
    stages = {name: round(stage["seconds"]) for name, stage in plan["stages"].items()}
    seconds = f"an image {stages['image C']} s (C), {stages['image G']} s (G), 3 texts {stages['texts']} s"
    resident = max(cost["peak"]["anonymous"] for cost in [plan["load"], *plan["stages"].values()])
    limit = plan["memory"]["limit"]
    limited = f"measured with RAM limited to {gibibytes(limit)} including the disk cache" if limit else ""
    held = limited or "the disk cache fills the rest of the RAM"
    return f"uses {gibibytes(resident)}; {held}; loads in {round(plan['load']['seconds'])} s; {seconds}"


def all_rows(reports: dict[str, sim.Report], results: dict) -> list[Row]:
    return [*rows_of_cards(reports), *rows_of_parts(), *rows_of_processes(), *rows_of_formats(), *rows_of_cpus(results)]


def common_table(rows: list[Row]) -> str:
    found = {row[0]: row for row in rows}
    return table(HEAD, [found[name] for name in COMMON])


def machines_table(rows: list[Row], results: dict) -> str:
    packages = versions("torch", "transformers", "accelerate")
    source = (
        f"Written by `python -m tools.machines.what_fits`. GPUs are simulated: bfloat16, {sim.BATCH}; {packages}.\n\n"
        "The rows without a GPU were measured on a synthetic checkpoint by `python -m benchmarks.full_size` on"
        f" {results['machine']}."
    )
    return f"{table(HEAD, rows)}\n\n{source}"


def plans_table(reports: dict[str, sim.Report]) -> str:
    rows = []
    for name, title in PLAN_TITLES.items():
        report = reports[name]
        for card in range(len(report.setup.cards)):
            parts = sim.abbreviated([part for part, where in report.device_map.items() if where == card])
            sizes = (report.weights[card], report.peak[f"cuda:{card}"])
            rows.append(("" if card else title, card, ", ".join(parts), *map(gigabytes, sizes)))
    return table(["GPUs", "device", "parts", "weights", "peak"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    sim.quieten()
    setups = tqdm((*PLAN_TITLES, *SINGLE_CARDS), "simulated machines")
    reports = {name: sim.simulate(ROOT, sim.Setup.parse(name)) for name in setups}
    if failures := [f"{name}: {failure}" for name, report in reports.items() for failure in report.failures]:
        sys.exit("\n".join(failures))
    results = json.loads(MEASURED.read_text())
    rows = all_rows(reports, results)
    tables = [
        (CARD, "hardware", common_table(rows)),
        (PAGE, "machines", machines_table(rows, results)),
        (PAGE, "plans", plans_table(reports)),
    ]
    for page, name, text in tables:
        if not arguments.check:
            put(page, name, text)
        elif taken(page, name) != text:
            sys.exit(f"{page} has another table {name!r}. Run `python -m tools.machines.what_fits` to write it again.")


if __name__ == "__main__":
    main()
