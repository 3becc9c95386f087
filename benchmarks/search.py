"""How long examples/search.py takes to index and search 10,000 pictures, with what memory and disk.

Run by whoever changes examples/search_index.py.

    python -m benchmarks.search                          # writes search.json and the README's table
    python -m benchmarks.search --pictures 500 --out /tmp/report.json          # and no table

The pictures are those of examples/pictures, turned, resized and put on coloured grounds, no two alike: PNG, JPEG and
WebP files of 260 to 400 pixels. Every step is a process of its own, as a user runs it, with the tiny checkpoint: its
share of the time is small, and that of the 14B would be nearly all. Whether the right pictures are found is counted
too: those of the same original among the first ten of a picture, and of its English name.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from tools import pages

ROOT = Path(__file__).resolve().parents[1]


README = ROOT / "README.md"
OUT = Path(__file__).with_suffix(".json")
SOURCES = ROOT / "examples" / "pictures"
KINDS = (("png", {}), ("jpg", {"quality": 90}), ("webp", {"quality": 90}))
QUERIES = 100
SEARCH = """
import json, resource, sys, time
from pathlib import Path
from search_index import Embedder, Index, Searcher
searcher = Searcher(Index(sys.argv[1]), Embedder("..", "tiny"))
rows = []
for query in json.loads(sys.stdin.read()):
    begun = time.perf_counter()
    found = searcher.search(**query)
    rows.append([time.perf_counter() - begun, [Path(result.path).name for result in found]])
print(json.dumps([rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def draw(folder: Path, count: int) -> None:
    """`count` files, whose names say what they were made of."""
    originals = [(path.stem, Image.open(path).convert("RGBA")) for path in sorted(SOURCES.glob("*.png"))]
    for number in range(count):
        name, picture = originals[number % len(originals)]
        chance = random.Random(number)
        ground = tuple(chance.randrange(150, 256) for _ in range(3))
        turned = picture.rotate(chance.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=(255, 255, 255, 0))
        canvas = Image.new("RGBA", (chance.randrange(260, 400), chance.randrange(260, 400)), ground)
        canvas.paste(turned, ((canvas.width - 256) // 2, (canvas.height - 256) // 2), turned)
        ending, options = KINDS[number % len(KINDS)]
        place = folder / f"{number // 1000:02}"
        place.mkdir(exist_ok=True)
        canvas.convert("RGB").save(place / f"{name}.{number:05}.{ending}", **options)


def timed(command: list, **options) -> tuple[float, str]:
    begun = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-3000:])
    return round(time.perf_counter() - begun, 2), done.stdout


def size(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 1)


def queries(folder: Path) -> list[dict]:
    """Names in three languages, and pictures."""
    listing = json.loads((SOURCES / "examples.json").read_text("utf-8"))
    names = [text for entry in listing for text in entry["name"].values()]
    shown = random.Random(0).sample(sorted(str(path) for path in folder.rglob("*.*") if path.is_file()), QUERIES)
    return [{"words": text, "k": 10} for text in names] + [{"picture": path, "k": 10} for path in shown]


def right(query: dict, found: list[str]) -> float | None:
    """The share of the first ten that were made of the same original; None for names in other languages."""
    listing = json.loads((SOURCES / "examples.json").read_text("utf-8"))
    of_name = {entry["name"]["en"]: Path(entry["file"]).stem for entry in listing}
    wanted = Path(query["picture"]).name.split(".")[0] if "picture" in query else of_name.get(query["words"])
    return None if wanted is None else statistics.mean(name.split(".")[0] == wanted for name in found)


def measure(folder: Path, count: int) -> dict:
    pictures, index = folder / "pictures", folder / "index"
    pictures.mkdir()
    draw(pictures, count)
    script = [sys.executable, ROOT / "examples" / "search.py"]
    run = [*script, "index", pictures, "--index", index, "--no-captions"]
    first, said = timed(run)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    again, _ = timed(run)
    changed = sorted(pictures.rglob("*.png"))[: count // 100]
    for path in changed:
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    after, _ = timed(run)
    one, _ = timed([*script, "query", "panda", "--index", index])
    asked = queries(pictures)
    _, printed = timed([sys.executable, "-c", SEARCH, index], input=json.dumps(asked), cwd=ROOT / "examples")
    rows, memory = json.loads(printed)
    seconds = [each for each, _ in rows[5:]]  # the first ones warm up
    shares = [(right(query, names), "words" in query) for query, (_, names) in zip(asked, rows, strict=True)]
    return {
        "pictures": count,
        "pictures_mb": size(pictures),
        "index_mb": size(index),
        "said": said.strip().splitlines()[0].split(": ", 1)[1],
        "first_run_s": first,
        "first_run_pictures_per_s": round(count / first, 1),
        "first_run_peak_mb": round(peak / 1e3),
        "second_run_nothing_changed_s": again,
        "run_after_one_percent_changed_s": after,
        "one_query_with_loading_s": one,
        "query_median_ms": round(1000 * statistics.median(seconds), 1),
        "query_p95_ms": round(1000 * statistics.quantiles(seconds, n=20)[-1], 1),
        "searching_peak_mb": round(memory / 1e3),
        "same_original_among_ten_by_words": round(statistics.mean(s for s, w in shares if w and s is not None), 3),
        "same_original_among_ten_by_picture": round(statistics.mean(s for s, w in shares if not w), 3),
    }


def table(report: dict) -> str:
    """What the README says, as Markdown."""
    found, versions = report["result"], report["versions"]
    rows = [
        ("first run", f"{found['first_run_s']} s, {found['first_run_pictures_per_s']} pictures a second"),
        ("its memory, at most", f"{found['first_run_peak_mb']} MB"),
        ("second run, nothing changed", f"{found['second_run_nothing_changed_s']} s"),
        ("run after 1 % of the files changed", f"{found['run_after_one_percent_changed_s']} s"),
        ("index on disk", f"{found['index_mb']} MB, for {found['pictures_mb']} MB of pictures"),
        (
            "a search, by words or by a picture",
            f"median {found['query_median_ms']} ms, 95 % {found['query_p95_ms']} ms",
        ),
        ("`query` from the command line, with loading", f"{found['one_query_with_loading_s']} s"),
        ("memory while searching, at most", f"{found['searching_peak_mb']} MB"),
        ("of ten found by a picture, made of the same original", f"{found['same_original_among_ten_by_picture']:.0%}"),
        ("of ten found by its English name", f"{found['same_original_among_ten_by_words']:.0%}"),
    ]
    figures = pages.table([f"{found['pictures']:,} pictures", ""], rows)
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"{figures}\n\nMeasured by `{report['command']}` on {report['machine']}; {packages}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.pictures < QUERIES:
        parser.error(f"--pictures must be at least {QUERIES}, got {options.pictures}")
    with tempfile.TemporaryDirectory(prefix="search-") as folder:
        result = measure(Path(folder), options.pictures)
    report = {
        "command": "python -m benchmarks.search",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs",
        "versions": {name: version(name) for name in ("lancedb", "torch", "transformers", "pillow")},
        "result": result,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    if options.out == OUT:
        pages.put(README, "search", table(report))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
