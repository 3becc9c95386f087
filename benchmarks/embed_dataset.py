"""Measure whether the memory of examples/embed_dataset.py grows with its input, and how long its model waits.

Run by whoever changes the stages of examples/embed_dataset.py. Linux only, where a process's shared memory is known.

    python -m benchmarks.embed_dataset      # 2,000 and 20,000 images; writes embed_dataset.json and the page
    python -m benchmarks.embed_dataset --rows 500 2000 --out /tmp/report.json

Runs the program on synthetic images with the tiny checkpoint, one size after the other, on Ray on this machine with two
CPUs: one for the model, one to read and decode. The object store is smaller than 20,000 decoded images, so Ray has to
slow the readers down. Captions by beam search make the tiny model slower than decoding, as the 14B always is. Twice a
second the memory of all processes of the run is added up: the private memory of each, and the object store.

The report also has the arithmetic of `--dry-run --h100`: a billion images with the published 14B on H100s.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks import this_machine
from examples import embed_costs
from tools import step
from tools.pages import put, table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "embedding.md"
MEASURED = Path(__file__).with_suffix(".json")
STORE_GB = 0.1
DIFFERENT = 500
EMBED = ["--embed", "image", "caption", "--num-beams", "3", "--max-new-tokens", "8", "--dtype", "float32"]
GROUP = 500  # rows of a row group, and of a shard
PACKAGES = ("ray", "torch", "transformers", "pyarrow", "pillow")
MFU = 0.4  # of an H100; assumed, not measured with this model


def write_images(path: Path, rows: int) -> None:
    """`rows` JPEGs of 256 x 256 smooth random pixels, `DIFFERENT` of which are unique."""
    generator = np.random.default_rng(0)
    jpegs = []
    for _ in range(DIFFERENT):
        data = io.BytesIO()
        small = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        small.resize((256, 256), Image.Resampling.BICUBIC).save(data, "JPEG")
        jpegs.append(data.getvalue())
    schema = pa.schema([("image", pa.binary())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, GROUP):
            images = [jpegs[row % DIFFERENT] for row in range(start, min(start + GROUP, rows))]
            writer.write_table(pa.table({"image": images}, schema), row_group_size=GROUP)


def memory_of(process: psutil.Process) -> tuple[int, int, int]:
    """Bytes of a process, of all processes that it started, and of the object store."""
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


def on_h100s() -> list[dict]:
    both = ["InternVL-C", "InternVL-G"]
    return [{"modes": modes, **embed_costs.on_h100s(modes, MFU, "float16")} for modes in (both[:1], both[1:], both)]


def summary(report: dict) -> str:
    """The page's tables, as Markdown."""
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
    header = ["images", "input", "time", "peak memory", "driver", "workers", "object store", "the model waits"]
    return "\n\n".join(
        [
            table(header, runs),
            f"Written by `{report['command']}`, with an object store of {report['object_store_mb']:.0f} MB, on "
            f"{report['machine']}; {this_machine.listed(report['versions'])}.",
            table(["a billion images", "TFLOP each", "images/s on a GPU", "GPU-hours", "days on 64", "output"], costs),
            f"An H100 has {embed_costs.H100_FLOPS / 1e12:.0f} TFLOPS (data sheet of the SXM, bfloat16, dense); the "
            f"table assumes that the model reaches {report['mfu']:.0%} of them. Output in float16.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[2_000, 20_000], help="numbers of images")
    parser.add_argument("--out", type=Path, default=MEASURED, help="report; the page changes only by the default")
    options = parser.parse_args()
    if min(options.rows) < 1:
        parser.error(f"--rows must be at least 1, got {options.rows}")
    results = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory(prefix="embed-dataset-") as folder:
            data = Path(folder, "images.parquet")
            with step(f"writing {rows:,} images"):
                write_images(data, rows)
            with step(f"embedding {rows:,} images"):
                results.append(measure(data, Path(folder, "out")))
        print(json.dumps(results[-1]), flush=True)
    report = {
        "command": " ".join(["python -m benchmarks.embed_dataset", *sys.argv[1:]]),
        "arguments": EMBED,
        "object_store_mb": STORE_GB * 1000,
        "machine": f"{this_machine.processor()}, no GPU used",
        "versions": this_machine.versions(*PACKAGES),
        "results": results,
        "mfu": MFU,
        "h100s": on_h100s(),
    }
    this_machine.write_json(options.out, report)
    if options.out == MEASURED:
        put(PAGE, "embed", summary(report))


if __name__ == "__main__":
    main()
