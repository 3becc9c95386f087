"""Does examples/embed_dataset.py need more memory for more input, and how long does the model wait for pictures?

    python benchmarks/embed_dataset.py                      # 2,000 and 20,000 pictures; writes embed_dataset.json
    python benchmarks/embed_dataset.py --rows 200 400 --out /tmp/report.json

Runs the program on synthetic pictures with the tiny checkpoint, one size after the other, on Ray of this machine with
two CPUs: one for the model, one to read and decode. The object store is smaller than what all pictures are decoded, so
that it has to hold the readers back. Captions by beam search make the tiny model slower than decoding, which the 14B is
by itself. Twice a second the memory of all processes of the run is added up: what each has for itself, and what the
object store has in memory.

Linux only, where a process's shared memory is known.
"""

import argparse
import io
import json
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

ROOT = Path(__file__).resolve().parents[1]
STORE_GB = 0.1
DIFFERENT = 500
EMBED = ["--embed", "image", "caption", "--num-beams", "3", "--max-new-tokens", "8", "--dtype", "float32"]
GROUP = 500  # rows of a row group, and of a shard


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[2_000, 20_000])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
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
        "command": "python benchmarks/embed_dataset.py",
        "arguments": EMBED,
        "object_store_mb": STORE_GB * 1000,
        "machine": f"{platform.machine()}, {psutil.cpu_count()} CPUs",
        "versions": {name: version(name) for name in ("ray", "torch", "transformers", "pyarrow", "pillow")},
        "results": results,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
