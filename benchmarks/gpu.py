"""Prove the model on a GPU in one command: right numbers first, then speed beside what the machine could do.

    python benchmarks/gpu.py                          # every step, on the GPU; at most 9 minutes on an H200
    python benchmarks/gpu.py --only goldens images    # some of them
    python benchmarks/gpu.py --device cpu --tiny      # the same steps, small, on a CPU: minutes
    python benchmarks/gpu.py --simulate               # shapes and memory at full size, on a card that is not there
    python benchmarks/gpu.py --report out/gpu.json    # writes GPU.md, its chart and the README's table; needs no GPU

Nothing is downloaded: full-size weights are drawn on the card. Each step adds its result to the JSON file as it ends,
so an interrupted run loses one step; with `--resume` the next run keeps the steps that are there. What a machine lacks
is named in the file as skipped, with the reason. The exit status is 1 if a step failed.

Needs torch, transformers, accelerate, sentencepiece, Pillow; torchao, flash-attn, torchvision and diffusers are
used if present.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gpu_numbers
import gpu_report
import gpu_speed
import measuring
import torch
from gpu_machine import OUT_OF_TIME, Machine
from measuring import ROOT

# What matters most comes first, since a run may be short of time.
FIRST = ("goldens", "kernels", "ceilings", "images", "captions", "float8", "texts")
ALL_STEPS = {**gpu_numbers.STEPS, **gpu_speed.STEPS}
STEPS = {name: ALL_STEPS[name] for name in (*FIRST, *(name for name in ALL_STEPS if name not in FIRST))}
SIMULATED_STEPS = ("images", "float8", "texts", "captions")


def problems(found: Any, key: str, where: str = "") -> Iterator[str]:
    """Every reason under `key`, "failed" or "skipped", with its place in the results."""
    if isinstance(found, list) and all(isinstance(each, dict) for each in found):
        found = {" ".join(str(each.get(name)) for name in ("work", "batch", "way")): each for each in found}
    if not isinstance(found, dict):
        return
    if isinstance(found.get(key), str):
        yield f"{where}: {found[key]}"
        return
    for name, value in found.items():
        yield from problems(value, key, f"{where}, {name}" if where else name)


def run_step(machine: Machine, name: str) -> dict[str, Any]:
    started = time.monotonic()

    def step() -> dict[str, Any]:
        with ExitStack() as stack:
            if machine.simulated:
                machine.start_over()
                machine.meter, _ = stack.enter_context(measuring.simulated_card())
            else:
                stack.enter_context(torch.inference_mode())
            return STEPS[name](machine)

    return machine.attempt(step) | {"seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that every step runs")
    parser.add_argument("--simulate", action="store_true", help="shapes and memory at full size, without a card")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help=f"some of {', '.join(STEPS)}")
    parser.add_argument("--minutes", type=float, default=9, help="begin no measurement after this time")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu.json", help="JSON file of the results")
    parser.add_argument("--resume", action="store_true", help="keep the steps that are in the file already")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write the pages from such a file, and measure nothing"
    )
    parser.add_argument("--to", type=Path, default=ROOT, help="of --report: the clone whose pages are written")
    arguments = parser.parse_args()
    if arguments.report is not None:
        gpu_report.write(arguments.report, arguments.to)
        return
    if not arguments.simulate and arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; try --device cpu --tiny, or --simulate")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = measuring.CARD if arguments.simulate else arguments.device
    machine = Machine(device, arguments.tiny, arguments.simulate, arguments.minutes)
    results: dict[str, Any] = {"machine": machine.describe(), "steps": {}}
    if arguments.resume and arguments.out.is_file():
        results["steps"] = json.loads(arguments.out.read_text("utf-8"))["steps"]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or (SIMULATED_STEPS if arguments.simulate else STEPS):
        if name in results["steps"] and not any(
            OUT_OF_TIME in each for each in problems(results["steps"][name], "skipped")
        ):
            continue
        found = results["steps"][name] = run_step(machine, name)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        print(f"{name}: {found['seconds']} s", flush=True)
        for key in ("failed", "skipped"):
            for problem in problems({name: found}, key):
                print(f"  {key}: {problem[:300]}", flush=True)
    print(gpu_report.summary(results))
    if any(problems(results["steps"], "failed")):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
