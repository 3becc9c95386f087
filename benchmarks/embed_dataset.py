"""Does examples/embed_dataset.py need more memory for more input, and how long does the model wait for pictures?

Run by whoever changes the stages of examples/embed_dataset.py.

    python -m benchmarks.embed_dataset      # 2,000 and 20,000 pictures; writes embed_dataset.json, and into README.md
    python -m benchmarks.embed_dataset --rows 500 2000 --out /tmp/report.json

Runs the program on synthetic pictures with the tiny checkpoint, one size after the other, on Ray of this machine with
two CPUs: one for the model, one to read and decode. The object store is smaller than what 20,000 pictures are decoded,
so that the readers have to be held back. Captions by beam search make the tiny model slower than decoding, which the
14B is by itself. Twice a second the memory of all processes of the run is added up: what each has for itself, and what
the object store has in memory.

Beside it stands the arithmetic of `--dry-run --h100`: a billion pictures with the published 14B on H100s.

Linux only, where a process's shared memory is known.
"""

import argparse
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from examples import embed_costs
from tools.pages import put, table

ROOT = Path(__file__).resolve().parents[1]


README = ROOT / "README.md"
MEASURED = Path(__file__).with_suffix(".json")
STORE_GB = 0.1
DIFFERENT = 500
EMBED = ["--embed", "image", "caption", "--num-beams", "3", "--max-new-tokens", "8", "--dtype", "float32"]
GROUP = 500  # rows of a row group, and of a shard
PACKAGES = ("ray", "torch", "transformers", "pyarrow", "pillow")
MFU = 0.4  # of an H100; an assumption, nobody measured it with this model


def write_pictures(path: Path, rows: int) -> None:
    """JPEGs of 256 x 256 smooth random pixels, each of `DIFFERENT` as often as it takes."""
    generator = np.random.default_rng(0)
    pictures = []
    for _ in range(DIFFERENT):
        data = io.BytesIO()
        small = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        small.resize((256, 256), Image.Resampling.BICUBIC).save(data, "JPEG")
        pictures.append(data.getvalue())
    schema = pa.schema([("image", pa.binary())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, GROUP):
            images = [pictures[row % DIFFERENT] for row in range(start, min(start + GROUP, rows))]
            writer.write_table(pa.table({"image": images}, schema), row_group_size=GROUP)


def memory_of(process: psutil.Process) -> tuple[int, int, int]:
    """Bytes: of this process, of all processes that it started, and of the object store."""
    own, others, store = 0, 0, 0
    for each in [process, *process.children(recursive=True)]:
        try:
            memory = each.memory_info()
            if each == process:
                own = memory.rss - memory.shared
            else:
                others += memory.rss - memory.shared
            if each.name() == "raylet":
                store = memory.shared
        except psutil.NoSuchProcess:
            continue
    return own, others, store


def measure(data: Path, output: Path) -> dict:
    command = [sys.executable, ROOT / "examples" / "embed_dataset.py", "--model", ROOT, "--subfolder", "tiny"]
    command += ["--data", data, "--output", output, "--shard-rows", str(GROUP), "--object-store-gb", str(STORE_GB)]
    with (output.parent / "log").open("w") as log:
        process = subprocess.Popen([*command, *EMBED], stdout=log, stderr=subprocess.STDOUT)
        samples = []
        while process.poll() is None:
            samples.append(memory_of(psutil.Process(process.pid)))
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit((output.parent / "log").read_text()[-3000:])
    manifest = json.loads((output / "manifest.json").read_text("utf-8"))
    run, (own, others, store) = manifest["runs"][0], zip(*samples)
    return {
        **manifest["result"],
        "seconds": run["seconds"],
        "model_waits": run["model_waits"],
        "input_mb": round(data.stat().st_size / 1e6, 1),
        "peak_driver_mb": round(max(own) / 1e6, 1),
        "peak_others_mb": round(max(others) / 1e6, 1),
        "peak_store_mb": round(max(store) / 1e6, 1),
        "peak_together_mb": round(max(map(sum, samples)) / 1e6, 1),
    }


def machine() -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return f"{cpu}, {os.cpu_count()} cores, no GPU used"


def on_h100s() -> list[dict]:
    both = ["InternVL-C", "InternVL-G"]
    return [{"modes": modes, **embed_costs.on_h100s(modes, MFU, "float16")} for modes in (both[:1], both[1:], both)]


def summary(report: dict) -> str:
    """What the README says, as Markdown."""
    runs = [
        [
            f"{run['rows']:,}", f"{run['input_mb']:,.0f} MB", f"{run['seconds']:,.0f} s",
            *(f"{run[f'peak_{part}_mb']:,.0f} MB" for part in ("together", "driver", "others", "store")),
            f"{run['model_waits']:.1%}",
        ]
        for run in report["results"]
    ]  # fmt: skip
    costs = [
        [
            " and ".join(each["modes"]), f"{each['flops'] / 1e12:.2f}", f"{each['rate']:.0f}", f"{each['hours']:,.0f}",
            f"{each['hours'] / 24 / 64:.1f}", f"{each['bytes'] / 1e12:.1f} TB",
        ]
        for each in report["h100s"]
    ]  # fmt: skip
    packages = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    header = ["pictures", "input", "time", "most memory", "of it driver", "workers", "object store", "the model waits"]
    return "\n\n".join(
        [
            table(header, runs),
            f"Written by `{report['command']}`, with an object store of {report['object_store_mb']:.0f} MB, on "
            f"{report['machine']}; {packages}.",
            table(
                ["a billion pictures", "TFLOP each", "pictures/s on a GPU", "GPU-hours", "days on 64", "output"], costs
            ),
            f"{embed_costs.H100_FLOPS / 1e12:.0f} TFLOPS of an H100 (data sheet of the SXM, bfloat16, dense), of which "
            f"{report['mfu']:.0%} are reached, an assumption; float16.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[2_000, 20_000])
    parser.add_argument("--out", type=Path, default=MEASURED)
    options = parser.parse_args()
    if min(options.rows) < 1:
        parser.error(f"--rows must be at least 1, got {options.rows}")
    results = []
    for rows in options.rows:
        folder = Path(tempfile.mkdtemp(prefix="embed-dataset-"))
        try:
            write_pictures(folder / "pictures.parquet", rows)
            results.append(measure(folder / "pictures.parquet", folder / "out"))
        finally:
            shutil.rmtree(folder)
        print(json.dumps(results[-1]), flush=True)
    report = {
        "command": " ".join(["python -m benchmarks.embed_dataset", *sys.argv[1:]]),
        "arguments": EMBED,
        "object_store_mb": STORE_GB * 1000,
        "machine": machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "results": results,
        "mfu": MFU,
        "h100s": on_h100s(),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    if options.out == MEASURED:
        put(README, "embed", summary(report))


if __name__ == "__main__":
    main()
