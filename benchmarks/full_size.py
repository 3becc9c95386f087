"""Synthesise a checkpoint of full size, load it in several ways, use it, and report what that took.

Run by whoever changes how checkpoints are loaded. Linux only.

    python -m benchmarks.full_size                # the 14B: 29 GB of disk while it runs; writes full_size.md
    python -m benchmarks.full_size --keep DIR     # keeps the checkpoint in DIR, or uses the one in it
    python -m benchmarks.full_size --config tiny --plans mapped disk --out /tmp/report.md    # seconds

Each plan runs in a process of its own (one_plan.py), one after the other, and starts with none of the shards in the
page cache. The same run measures two bounds:

* reading: all shards from beginning to end in large pieces, which gives the disk's rate;
* arithmetic: the same stages with the same weights cut to a few layers, which stay in RAM; the cost of one more layer
  of each tower is multiplied by the number of layers.

With root and cgroups, a plan gets no more memory than `LIMITS`, page cache included: the kernel kills it if that is not
enough. The run removes whatever it wrote, also when it fails or is interrupted.
"""

import argparse
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import torch
from safetensors.torch import load_file

from benchmarks import this_machine
from benchmarks.one_plan import NEW_TOKENS, PLANS, ROOT, STAGES, undisturbed
from tools import step
from tools.machines.synthesise_checkpoint import INDEX, synthesise
from tools.pages import table

PIECE = 16 << 20  # bytes of one read
GIB = 1 << 30
LIMITS = {"disk": 16 * GIB, "ram+disk": 16 * GIB, "int8": 18 * GIB}  # "mapped" may use all of the RAM
# The files of a memory cgroup, version 1 and 2: its root, its limit, and its peak.
CGROUPS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
)
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "torchao")
BF16_PLANS = ("mapped", "disk", "ram+disk")  # these must agree to the last bit
# The first pattern found in a tensor's name gives its part of the model.
PARTS = {
    "vision_model.": "vision",
    "clip_projector2.": "query head",
    "clip_projector.": "vision head",
    ".cross_attn.": "cross",
    "qllama.model.layers.": "language",
    ".embed_tokens.": "embeddings",
    ".lm_head.": "language head",
}
# How often a stage uses each part. A caption's tokens are written one after the other.
PASSES = {
    "image C": {"vision": 1, "vision head": 1},
    "image G": {"vision": 1, "vision head": 1, "language": 1, "cross": 1, "query head": 1},
    "texts": {"embeddings": 1, "language": 1},
    "match": {"vision": 1, "embeddings": 1, "language": 1, "cross": 1},
    "caption": {
        "vision": 1,
        "cross": 1,
        "embeddings": NEW_TOKENS,
        "language": 1 + NEW_TOKENS,
        "language head": NEW_TOKENS,
    },
}


# ------------------------------------------------------------------------------------------------------ the disk


def shards_of(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]


def bytes_of_parts(folder: Path) -> Counter:
    """Bytes of each part of the model, from the shards' headers."""
    sizes: Counter = Counter()
    for path in shards_of(folder):
        with open(path, "rb") as file:
            fields = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, field in fields.items():
            if name != "__metadata__":
                start, end = field["data_offsets"]
                sizes[next((part for pattern, part in PARTS.items() if pattern in name), "rest")] += end - start
    return sizes


def forget(folder: Path) -> None:
    """Have the kernel drop the shards from the page cache; this needs no rights and affects no other files."""
    os.sync()
    for path in shards_of(folder):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(folder: Path, flags: int = 0) -> float | None:
    """Seconds to read all shards from the disk; None if the file system does not support a flag."""
    forget(folder)
    start = perf_counter()
    with mmap.mmap(-1, PIECE) as buffer:  # aligned to pages, as O_DIRECT requires
        for path in shards_of(folder):
            try:
                file = os.open(path, os.O_RDONLY | flags)
            except OSError:
                return None
            while os.readv(file, [buffer]):
                pass
            os.close(file)
    return perf_counter() - start


@contextmanager
def checkpoint(keep: Path | None, config: Path, scratch: Path):
    """The folder of a full-size checkpoint, and what writing it took; removed at the end unless `keep` names it."""
    with tempfile.TemporaryDirectory(prefix="internvl-full-size-", dir=scratch) as temporary:
        folder, start = keep or Path(temporary), perf_counter()
        written = synthesise(folder, config, threads=os.cpu_count() or 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        yield folder, {"seconds": perf_counter() - start, "peak_rss": peak} if written else None


# ------------------------------------------------------------------------------------------------------ the plans


def join_cgroup(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


@contextmanager
def limited_memory(limit: int | None) -> Iterator[tuple[Callable[[], None] | None, dict]]:
    """A cgroup with a memory limit in bytes. Yields the function with which a new process joins it, or None without a
    limit or without the rights for one, and a dictionary that holds the limit and, in the end, the peak.
    """
    found: dict = {"limit": None}
    for root, maximum, used in CGROUPS if limit else ():
        group = root / f"internvl-{os.getpid()}"
        try:
            group.mkdir()
            (group / maximum).write_text(str(limit))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        found["limit"] = limit
        try:
            yield partial(join_cgroup, group), found
        finally:
            found["most_used"] = int((group / used).read_text())
            group.rmdir()
        return
    yield None, found


def run_plan(plan: str, folder: Path, out: Path, *options: object) -> dict:
    """The measurements of one_plan.py in a process of its own, or the error that ended it."""
    command = [sys.executable, "-m", "benchmarks.one_plan", "--plan", plan, "--folder", folder.resolve()]
    command += ["--out", out.resolve(), *options]
    environment = os.environ | {"HF_MODULES_CACHE": str(out.resolve().parent / "modules"), "HF_HUB_OFFLINE": "1"}
    errors = out.with_suffix(".log")
    with open(errors, "w") as log, limited_memory(None if options else LIMITS.get(plan)) as (join, memory):
        done = subprocess.run([*map(str, command)], env=environment, stderr=log, cwd=ROOT, preexec_fn=join)
    if done.returncode < 0:
        return {"error": f"killed by signal {-done.returncode}", "memory": memory}
    if done.returncode:
        lines = errors.read_text().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1], "memory": memory}
    return json.loads(out.with_suffix(".json").read_text()) | {"memory": memory}


def arithmetic(folder: Path, scratch: Path) -> dict[str, float]:
    """Seconds of each stage with all weights in RAM, extrapolated from models with one and two units of each tower."""
    config = json.loads((folder / "config.json").read_text())
    units = (
        config["vision_config"]["num_hidden_layers"],
        config["qllama_config"]["num_hidden_layers"] // config["cross_attention_frequency"],
    )
    found = run_plan("mapped", folder, scratch / "arithmetic", "--cut")
    if "error" in found:
        raise RuntimeError(f"the cut models did not run: {found['error']}")
    seconds = [{name: undisturbed(cost) for name, cost in cut["stages"].items()} for cut in found["cuts"]]
    base, *deeper = seconds
    slopes = [{name: max(more[name] - base[name], 0.0) for name in base} for more in deeper]
    return {name: base[name] + sum((count - 1) * slope[name] for count, slope in zip(units, slopes)) for name in base}


def differences(outputs: dict, reference: dict) -> dict[str, dict]:
    """The differences of each stage's tensors from the reference's."""
    found = {}
    for name, wanted in reference.items():
        given, wanted = outputs[name].double(), wanted.double()
        found[name] = {
            "equal": torch.equal(given, wanted),
            "largest_difference": (given - wanted).abs().max().item(),
            "cosine": torch.cosine_similarity(given, wanted, dim=-1).min().item(),
        }
    return found


def benchmark(folder: Path, plans: list[str], scratch: Path) -> dict:
    """All measurements of a checkpoint."""
    size = sum(path.stat().st_size for path in shards_of(folder))
    results: dict = {"bytes": size, "parts": dict(bytes_of_parts(folder)), "plans": {}, "agreement": {}}
    with step(f"reading {gigabytes(size)} GB twice, to measure the disk"):
        results["reading"] = {"buffered": seconds_to_read(folder), "direct": seconds_to_read(folder, os.O_DIRECT)}
    outputs = {}
    for plan in plans:
        forget(folder)
        with step(f"{plan}: loading the model and using it"):
            results["plans"][plan] = found = run_plan(plan, folder, scratch / plan)
        if "error" not in found:
            outputs[plan] = load_file(scratch / f"{plan}.safetensors")
            found["finite"] = all(bool(tensor.isfinite().all()) for tensor in outputs[plan].values())
        print(f"{plan}: {found.get('error', 'done')}", flush=True)
    reference = next(iter(outputs), None)
    for plan in outputs:
        if plan != reference:
            results["agreement"][plan] = {"with": reference, "stages": differences(outputs[plan], outputs[reference])}
    if reference:
        results["text_cosines"] = cosines(outputs[reference]["texts"])
    with step("running cut models, to extrapolate the arithmetic"):
        results["arithmetic"] = arithmetic(folder, scratch)
    return results


def cosines(embeds: torch.Tensor) -> list[float]:
    """Cosines of each row and the next one."""
    return [torch.cosine_similarity(one, other, dim=0).item() for one, other in pairwise(embeds.double())]


# ------------------------------------------------------------------------------------------------------ the report


def machine() -> str:
    packages = this_machine.listed(this_machine.versions(*PACKAGES))
    return f"{this_machine.processor()}, {this_machine.memory() / GIB:.1f} GiB of RAM, no GPU used; {packages}"


def needed(results: dict, stage: str, once: bool) -> int:
    """Bytes of a stage's weights, counted once, or as often as the stage uses them."""
    return sum(results["parts"].get(part, 0) * (1 if once else times) for part, times in PASSES[stage].items())


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}"


def gibibytes(count: float) -> str:
    return f"{count / GIB:.2f}"


def disk_section(results: dict) -> list[str]:
    written, reading, size = results["synthesis"], results["reading"], results["bytes"]
    seconds = {"writing it, seeded": written["seconds"]} if written else {}
    seconds |= {f"reading it, {kind}": took for kind, took in reading.items()}
    rows = [
        [what, f"{took:.1f}", gigabytes(size / took)] if took else [what, "-", "-"] for what, took in seconds.items()
    ]
    lines = [f"The checkpoint: {gigabytes(size)} GB.", "", table(["", "seconds", "GB/s"], rows), ""]
    return lines + ([f"Peak RSS while writing: {gibibytes(written['peak_rss'])} GiB.", ""] if written else [])


def plan_section(results: dict) -> list[str]:
    head = ["plan", "load s", "RSS after load", "peak RSS", "anonymous", "file-backed", "limit", "all stages s"]
    head, rows = [*head, "GB read", "load average"], []
    for plan, found in results["plans"].items():
        if "error" in found:
            rows.append([plan, f"did not run: {found['error']}", *["-"] * (len(head) - 2)])
            continue
        costs = [found["load"], *found["stages"].values()]
        peaks = [max(cost["peak"][kind] for cost in costs) for kind in ("anonymous", "file_backed")]
        memory = [found["load"]["after"]["rss"], found["peak_rss"], *peaks]
        seconds = sum(cost["seconds"] for cost in costs[1:])
        read = sum(cost["bytes_read"] for cost in costs)
        limit = found["memory"]["limit"]
        row = [plan, f"{found['load']['seconds']:.1f}", *map(gibibytes, memory), gibibytes(limit) if limit else "none"]
        rows.append([*row, f"{seconds:.1f}", gigabytes(read), f"{found['load_average']:.1f}"])
    explanation = (
        "Memory in GiB. File-backed pages are the mapped shards: the kernel takes them back when RAM is short. A limit"
        " holds for all memory of the plan's process, including the page cache that it fills. The load average is that"
        " of the machine before the plan, from other processes."
    )
    lines = [table(head, rows), "", explanation, ""]
    mapped = results["plans"].get("mapped", {"error": ""})
    if "error" not in mapped:
        growth = mapped["load"]["after"]["rss"] - mapped["before"]["rss"]
        loading = f"{mapped['load']['seconds']:.1f} s and {growth / 1e6:.0f} MB of new RSS"
        reading = f"reading the files takes {results['reading']['buffered']:.1f} s"
        lines += [f"A plain load maps the shards: {loading}; {reading}.", ""]
    return lines


def stage_section(results: dict, plan: str) -> list[str]:
    """The time of a plan's stages, by cause."""
    rate = results["bytes"] / results["reading"]["buffered"]
    rows = []
    for stage, cost in results["plans"][plan]["stages"].items():
        read, sums = cost["bytes_read"], results["arithmetic"][stage]
        needs = [gigabytes(needed(results, stage, once)) for once in (True, False)]
        rest = undisturbed(cost) - read / rate - sums
        times = [f"{seconds:.1f}" for seconds in (cost["seconds"], cost["queued_seconds"], read / rate, sums, rest)]
        once = f"{needed(results, stage, True) / rate:.1f}"
        rows.append([STAGES[stage], *needs, gigabytes(read), once, *times, f"{cost['system_seconds']:.1f}"])
    head = ["stage", "weights GB", "passes GB", "read GB", "weights once s", "took s", "queued s"]
    return [f"### {plan}", "", table([*head, "reading s", "arithmetic s", "rest s", "kernel s"], rows), ""]


def agreement_section(results: dict) -> list[str]:
    rows = [
        [plan, found["with"], STAGES[stage], "yes" if one["equal"] else "no", f"{one['largest_difference']:.3g}",
         "-" if stage == "caption" else f"{one['cosine']:.5f}"]
        for plan, found in results["agreement"].items()
        for stage, one in found["stages"].items()
    ]  # fmt: skip
    lines = ["### Do the plans agree?", ""]
    lines += [table(["plan", "compared with", "stage", "same bits", "largest difference", "smallest cosine"], rows), ""]
    finite = all(found.get("finite", False) for found in results["plans"].values() if "error" not in found)
    listed = ", ".join(f"{cosine:.2f}" for cosine in results.get("text_cosines", []))
    return [*lines, f"All outputs are {'' if finite else 'NOT '}finite; cosines of neighbouring texts: {listed}.", ""]


def report(results: dict) -> str:
    explanation = (
        "`weights GB`: the stage's weights, each tensor once; `passes GB`: each tensor as often as the stage uses it;"
        " `read GB`: bytes read from the disk (the page cache may hold the rest). `weights once s` and `reading s` are"
        " those bytes at the rate of a buffered sequential read; `queued s` is the time that the main thread waited for"
        " a core; `arithmetic s` is the stage in bfloat16 with all weights in RAM, extrapolated; `rest s` is the time"
        " that these do not explain, negative where they overlap; `kernel s` is the time of all threads in the kernel,"
        " such as page faults and copies."
    )
    lines = ["# A full-size run", "", f"Measured by `python -m benchmarks.full_size` on {results['machine']}.", ""]
    lines += [*disk_section(results), "## Plans", "", *plan_section(results)]
    lines += ["## Where the time goes", "", explanation, ""]
    for plan, found in results["plans"].items():
        if "error" not in found:
            lines += stage_section(results, plan)
    return "\n".join([*lines, *agreement_section(results)])


def failures(results: dict) -> list[str]:
    """Errors: plans that did not run, values that are not finite, bfloat16 plans that differ."""
    found = [f"{plan}: {one['error']}" for plan, one in results["plans"].items() if "error" in one]
    found += [f"{plan}: not finite" for plan, one in results["plans"].items() if not one.get("finite", True)]
    for plan, one in results["agreement"].items():
        if plan in BF16_PLANS and one["with"] in BF16_PLANS:
            found += [f"{plan}: {stage} differs" for stage, values in one["stages"].items() if not values["equal"]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT, help="folder with the config.json to follow")
    parser.add_argument("--keep", type=Path, help="folder of a checkpoint to use, or to write and keep")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="folder for temporary files")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS), help="ways to load; default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="report; .json beside it")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # raises, so that the folders are removed
    with (
        checkpoint(arguments.keep, arguments.config, arguments.scratch) as (folder, synthesis),
        tempfile.TemporaryDirectory(prefix="internvl-full-size-results-", dir=arguments.scratch) as results_folder,
    ):
        results = benchmark(folder, arguments.plans, Path(results_folder))
    results |= {"synthesis": synthesis, "machine": machine()}
    arguments.out.write_text(report(results))
    this_machine.write_json(arguments.out.with_suffix(".json"), results)
    if complaints := failures(results):
        sys.exit("; ".join(complaints))


if __name__ == "__main__":
    main()
