"""Measure the model on a GPU in one command: correctness first, then speed beside what the machine could reach.

    python -m benchmarks.gpu                             # every step, on the GPU
    python -m benchmarks.gpu --resume                    # the steps that the last run failed or had no time for
    python -m benchmarks.gpu --only goldens images       # some steps
    python -m benchmarks.gpu --device cpu --tiny         # the same steps, small, on a CPU: minutes
    python -m benchmarks.gpu --simulate                  # shapes and memory at full size, on a simulated card
    python -m benchmarks.gpu --report out/gpu-cuda.json  # writes GPU.md, its chart, a line and a table; needs no GPU

Run by whoever has a GPU at hand. It downloads nothing: weights of full size are random and made on the card, which
needs 30 GB (`goldens`, `kernels`, `gradients`, `compiled`, `processor` and `ceilings` run on any card); `placed`,
`streamed` and `load` also need 30 GB of RAM, and `load` 33 GB of disk in TMPDIR. No measurement begins after
`--minutes`, nine by default. Each step adds its result to the JSON file as it ends. The file lists what the machine
lacks as skipped, with the reason. The exit status is 1 if something failed.

    pip install torch transformers accelerate sentencepiece protobuf pillow    # and, used if present,
    pip install torchao torchvision flash-attn diffusers matplotlib
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before importing transformers, which downloads kernels that it misses

import torch

from benchmarks import gpu_numbers, gpu_report, gpu_speed, measuring, this_machine
from benchmarks.gpu_machine import OUT_OF_TIME, Machine
from benchmarks.measuring import ROOT

# The most important steps come first, since a run may end early.
FIRST = ("goldens", "kernels", "gradients", "ceilings", "images", "captions", "compiled", "float8", "texts")
ALL_STEPS = {**gpu_numbers.STEPS, **gpu_speed.STEPS}
STEPS = {name: ALL_STEPS[name] for name in (*FIRST, *(name for name in ALL_STEPS if name not in FIRST))}
SIMULATED_STEPS = ("images", "float8", "texts", "captions")


def problems(found: Any, key: str) -> Iterator[str]:
    """Every reason under `key` ("failed" or "skipped"), with its place in the results."""
    return (f"{where}: {reason}" for where, reason in gpu_report.reasons(found, key))


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


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda")
    add("--tiny", action="store_true", help="small sizes, to check that every step runs")
    add("--simulate", action="store_true", help="shapes and memory at full size, on a simulated card")
    add("--only", nargs="+", choices=STEPS, metavar="STEP", help=f"some of {', '.join(STEPS)}")
    add("--minutes", type=float, default=9, help="begin no measurement after this time")
    add("--out", type=Path, help="JSON file of the results; default: one for each kind of run, in out/")
    add("--resume", action="store_true", help="continue that file: run what is missing or failed")
    add("--report", type=Path, metavar="FILE", help="write the pages from this file and measure nothing")
    add("--to", type=Path, default=ROOT, help="with --report: the clone whose pages are written")
    arguments = parser.parse_args()
    if arguments.report is not None:
        return parser, arguments
    if not arguments.simulate and arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; try --device cpu --tiny, or --simulate")
    if ":" in arguments.device:
        parser.error("--device takes no number; CUDA_VISIBLE_DEVICES chooses a card")
    arguments.only = arguments.only or (SIMULATED_STEPS if arguments.simulate else tuple(STEPS))
    if arguments.simulate and (wrong := set(arguments.only) - set(SIMULATED_STEPS)):
        parser.error(f"--simulate has the steps {', '.join(SIMULATED_STEPS)}, not {', '.join(sorted(wrong))}")
    # A file for each kind of run: tiny and simulated runs are no measurements of a card.
    kind = ("simulated" if arguments.simulate else arguments.device) + ("-tiny" if arguments.tiny else "")
    arguments.out = arguments.out or ROOT / "out" / f"gpu-{kind}.json"
    if arguments.out.is_file() and not arguments.resume:
        parser.error(f"{arguments.out} is there already: --resume goes on with it, --out names another file")
    return parser, arguments


def main() -> None:
    parser, arguments = parse()
    if arguments.report is not None:
        try:
            gpu_report.write(arguments.report, arguments.to)
        except gpu_report.Refused as problem:
            parser.error(str(problem))
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = measuring.CARD if arguments.simulate else arguments.device
    machine = Machine(device, arguments.tiny, arguments.simulate, arguments.minutes)
    results: dict[str, Any] = {"machine": machine.describe(), "steps": {}}
    if arguments.out.is_file():
        earlier = json.loads(arguments.out.read_text("utf-8"))
        if differences := differing(earlier["machine"], results["machine"]):
            parser.error(f"{arguments.out} was measured elsewhere, {differences}: --out names another file")
        results["steps"] = earlier["steps"]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        add_step(machine, name, results["steps"])
        this_machine.write_json(arguments.out, results)
    print(gpu_report.summary(results))
    if any(problems(results["steps"], "failed")):
        raise SystemExit(1)


def add_step(machine: Machine, name: str, steps: dict[str, Any]) -> None:
    """Run a step that is missing, failed or had no time, and print its result."""
    earlier = steps.get(name)
    if earlier is not None and is_whole(earlier):
        print(f"{name}: kept", flush=True)
        return
    print(f"{name}: measuring ...", flush=True)
    found = run_step(machine, name)
    if earlier is None or found.get("skipped") != OUT_OF_TIME:  # a part of the figures is better than none
        steps[name] = found
    print(f"{name}: {found['seconds']} s", flush=True)
    for key in ("failed", "skipped"):
        for problem in problems({name: found}, key):
            print(f"  {key}: {problem[:300]}", flush=True)


def differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The differences between two machines, ignoring the date."""
    names = [name for name in {**one, **other} if name != "date" and one.get(name) != other.get(name)]
    return ", ".join(f"{name} {one.get(name)} and not {other.get(name)}" for name in names)


def is_whole(step: dict[str, Any]) -> bool:
    """Whether nothing in a step failed or was skipped for lack of time."""
    return not any(problems(step, "failed")) and not any(OUT_OF_TIME in each for each in problems(step, "skipped"))


if __name__ == "__main__":
    main()
