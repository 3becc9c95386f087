"""Measure how long examples/search.py takes to index and search 10,000 images, and its memory and disk.

Run by whoever changes examples/search_index.py.

    python -m benchmarks.search                          # writes search.json and the table of docs/search.md
    python -m benchmarks.search --pictures 500 --out /tmp/report.json          # leaves both alone

The images are those of examples/pictures, rotated, resized and on coloured backgrounds, no two alike: PNG, JPEG and
WebP files of 260 to 400 pixels. Each step is a process of its own, as a user runs it, with the tiny checkpoint, which
takes a small share of the time; the 14B would take nearly all of it. The report also says how many of the first ten
results have the right original, for searches by an image and by its English name.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from benchmarks import this_machine
from tools import pages, step

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "search.md"
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
    """Write `count` images, whose file names begin with that of their original."""
    originals = [(path.stem, Image.open(path).convert("RGBA")) for path in sorted(SOURCES.glob("*.png"))]
    for number in range(count):
        name, original = originals[number % len(originals)]
        chance = random.Random(number)
        background = tuple(chance.randrange(150, 256) for _ in range(3))
        rotated = original.rotate(chance.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=(255, 255, 255, 0))
        canvas = Image.new("RGBA", (chance.randrange(260, 400), chance.randrange(260, 400)), background)
        canvas.paste(rotated, ((canvas.width - 256) // 2, (canvas.height - 256) // 2), rotated)
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
    """Searches by names in three languages, and by images."""
    listing = json.loads((SOURCES / "examples.json").read_text("utf-8"))
    names = [text for entry in listing for text in entry["name"].values()]
    shown = random.Random(0).sample(sorted(str(path) for path in folder.rglob("*.*") if path.is_file()), QUERIES)
    return [{"words": text, "k": 10} for text in names] + [{"picture": path, "k": 10} for path in shown]


def right(query: dict, found: list[str]) -> float | None:
    """The share of the first ten results with the right original; None for names in other languages."""
    listing = json.loads((SOURCES / "examples.json").read_text("utf-8"))
    of_name = {entry["name"]["en"]: Path(entry["file"]).stem for entry in listing}
    wanted = Path(query["picture"]).name.split(".")[0] if "picture" in query else of_name.get(query["words"])
    return None if wanted is None else statistics.mean(name.split(".")[0] == wanted for name in found)


def measure(folder: Path, count: int) -> dict:
    images, index = folder / "images", folder / "index"
    images.mkdir()
    with step(f"drawing {count:,} images"):
        draw(images, count)
    script = [sys.executable, ROOT / "examples" / "search.py"]
    run = [*script, "index", images, "--index", index, "--no-captions"]
    with step("the first run of the index"):
        first, said = timed(run)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with step("a run without changes"):
        again, _ = timed(run)
    changed = sorted(images.rglob("*.png"))[: count // 100]
    for path in changed:
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    with step(f"a run with {len(changed)} changed images"):
        after, _ = timed(run)
    one, _ = timed([*script, "query", "panda", "--index", index])
    asked = queries(images)
    with step(f"{len(asked)} searches"):
        _, printed = timed([sys.executable, "-c", SEARCH, index], input=json.dumps(asked), cwd=ROOT / "examples")
    rows, memory = json.loads(printed)
    seconds = [each for each, _ in rows[5:]]  # the first ones warm up
    shares = [(right(query, names), "words" in query) for query, (_, names) in zip(asked, rows, strict=True)]
    return {
        "pictures": count,
        "pictures_mb": size(images),
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
    """The page's table, as Markdown."""
    found = report["result"]
    rows = [
        ("first run", f"{found['first_run_s']} s, {found['first_run_pictures_per_s']} images a second"),
        ("its peak memory", f"{found['first_run_peak_mb']} MB"),
        ("second run, nothing changed", f"{found['second_run_nothing_changed_s']} s"),
        ("run after 1 % of the files changed", f"{found['run_after_one_percent_changed_s']} s"),
        ("index on disk", f"{found['index_mb']} MB, for {found['pictures_mb']} MB of images"),
        ("a search by words or an image", f"median {found['query_median_ms']} ms, 95 % {found['query_p95_ms']} ms"),
        ("`query` from the command line, with loading", f"{found['one_query_with_loading_s']} s"),
        ("peak memory while searching", f"{found['searching_peak_mb']} MB"),
        ("right originals in the first ten, by an image", f"{found['same_original_among_ten_by_picture']:.0%}"),
        ("right originals in the first ten, by the English name", f"{found['same_original_among_ten_by_words']:.0%}"),
    ]
    figures = pages.table([f"{found['pictures']:,} images", ""], rows)
    packages = this_machine.listed(report["versions"])
    return f"{figures}\n\nMeasured by `{report['command']}` on {report['machine']}; {packages}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=10_000, help="number of images")
    parser.add_argument("--out", type=Path, default=OUT, help="report; the page changes only by the default")
    options = parser.parse_args()
    if options.pictures < QUERIES:
        parser.error(f"--pictures must be at least {QUERIES}, got {options.pictures}")
    with tempfile.TemporaryDirectory(prefix="search-") as folder:
        result = measure(Path(folder), options.pictures)
    report = {
        "command": "python -m benchmarks.search",
        "machine": this_machine.processor(),
        "versions": this_machine.versions("lancedb", "torch", "transformers", "pillow"),
        "result": result,
    }
    this_machine.write_json(options.out, report)
    if options.out == OUT:
        pages.put(PAGE, "search", table(report))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
