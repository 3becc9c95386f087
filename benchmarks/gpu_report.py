"""Writes the pages of benchmarks/gpu.py, for its `--report`: GPU.md with its chart, the card's line, and a table."""

import importlib.util
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import this_machine
from benchmarks.gpu_machine import COSINE, PEAK
from benchmarks.measuring import ROOT, meets
from tools import pages

MEASURED, SIMULATED, ON_CPU = "gpu.json", "gpu_simulated.json", "gpu_on_cpu.json"
PAGE, CHART = "GPU.md", "gpu.png"
LINE, TABLE = "gpu-line", "gpu"
COMMAND = "`python -m benchmarks.gpu`"
RATE, TIMES = "a second", "time / products"
STEPS_OF_ROWS = ("images", "float8", "texts", "captions")
OURS = ("eager", "eager, one CUDA graph", "compile_layers", "compile_layers, one CUDA graph")
FLOAT8 = ("float8", "float8, compile_layers")
GREEDY = ("greedy", "greedy, static cache", "greedy, compiled")
LIGHT = ("greedy, compiled, float8", "greedy, compiled, int8 weights")
BEAMS = ("5 beams",)
Results = dict[str, Any]
Measure = Callable[[Results], float | None]

# --------------------------------------------------------------------------------------------------------- reading


def rows_of(results: Results, step: str) -> list[dict[str, Any]]:
    """The rows of a step that were measured."""
    return [row for row in results["steps"].get(step, {}).get("rows", ()) if RATE in row]


def best(
    results: Results, step: str, work: str, ways: Iterable[str] = OURS, batch: int | None = None, key: str = RATE
) -> dict[str, Any] | None:
    """The row with the most of `key`, or the least time: of one batch size, or of all."""
    found = [
        row
        for row in rows_of(results, step)
        if row["work"] == work and row["way"] in ways and batch in (None, row["batch"]) and key in row
    ]
    return (min if key == TIMES else max)(found, key=lambda row: row[key], default=None)


def fastest(step: str, work: str, ways: Iterable[str] = OURS, batch: int | None = None, key: str = RATE) -> Measure:
    """A function of the results that gives the `key` of the row that `best` finds."""
    return lambda results: (best(results, step, work, ways, batch, key) or {}).get(key)


def ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def at(results: Results, *path: str) -> Any:
    """The result at a path of the steps, or None."""
    found: Any = results["steps"]
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def reasons(found: Any, key: str, where: str = "") -> Iterator[tuple[str, str]]:
    """Every reason under `key` ("failed" or "skipped") in the results, after its place."""
    if isinstance(found, list) and all(isinstance(each, dict) for each in found):
        places = [[str(each[name]) for name in ("work", "mode", "batch", "way") if name in each] for each in found]
        found = {f"{number}. {' '.join(place)}": each for number, (place, each) in enumerate(zip(places, found), 1)}
    if not isinstance(found, dict):
        return
    if isinstance(found.get(key), str):
        yield where, found[key]
        return
    for name, value in found.items():
        yield from reasons(value, key, f"{where}, {name}" if where else name)


def failures(found: Any) -> Iterator[str]:
    return (reason for _, reason in reasons(found, "failed"))


# ----------------------------------------------------------------------------------------------------------- goals


@dataclass
class Goal:
    """Attributes:
    bound: such as ">= 205"; empty for a figure without a goal.
    step: the step that measures it.
    why: where the bound comes from.
    """

    work: str
    bound: str
    step: str
    measured: Measure
    why: str = ""

    def verdict(self, results: Results) -> str:
        """ "met", "missed", "failed", "not measured", or nothing where there is no goal."""
        found = self.measured(results)
        if found is None:
            return "failed" if any(failures(results["steps"].get(self.step))) else "not measured"
        return "" if not self.bound else "met" if meets(found, self.bound) else "missed"

    def cells(self, results: Results) -> list[str]:
        verdict = self.verdict(results)
        shown = f"**{verdict}**" if verdict in ("missed", "failed") else verdict
        return [self.work, self.bound, number(self.measured(results)), shown, self.why]


def share_of_products(results: Results, work: str) -> float | None:
    """The speed of the fastest way of `work`, as a share of the speed of its products."""
    row = best(results, "images", work)
    return None if row is None else 1 / row[TIMES]


def one_to_many(results: Results) -> float | None:
    """Captions a second of the largest batch, as a multiple of those of one image."""
    many = max((row["batch"] for row in rows_of(results, "captions")), default=1)
    one, all_of_them = (fastest("captions", "captions", GREEDY[-1:], batch)(results) for batch in (1, many))
    return None if many == 1 else ratio(all_of_them, one)


def least_cosine(results: Results) -> float | None:
    return min((row[COSINE] for row in rows_of(results, "float8") if COSINE in row), default=None)


def to_simulated(size: int) -> Measure:
    """The peak on a card of that many GB, as a multiple of the simulated peak."""
    place = ("placed", f"a card of {size} GB")
    return lambda results: ratio(at(results, *place, PEAK), at(results, *place, "simulated peak GB"))


PROMISED = "the table in docs/machines.md promises it"
# fmt: off
GOALS = (
    Goal("InternVL-C, images/s, best batch", ">= 205", "images", fastest("images", "InternVL-C"),
         "65 % of the peak of 989 TFLOP/s at 3.08 TFLOP an image"),
    Goal("InternVL-C, share of its products' speed", ">= 0.8", "images", lambda r: share_of_products(r, "InternVL-C"),
         "everything but the products should cost a fifth at most"),
    Goal("InternVL-C, one image, time / products", "<= 1.15", "images",
         fastest("images", "InternVL-C", batch=1, key=TIMES), "launches dominate at batch 1; a CUDA graph has none"),
    Goal("InternVL-G, share of its products' speed / that of InternVL-C", ">= 0.95", "images",
         lambda r: ratio(share_of_products(r, "InternVL-G"), share_of_products(r, "InternVL-C")),
         "the queries' part should not be less efficient"),
    Goal("InternVL-G, images/s, best batch", "", "images", fastest("images", "InternVL-G")),
    Goal("InternVL-C in float8, images/s, best batch", ">= 290", "float8", fastest("float8", "InternVL-C", FLOAT8),
         "float8 makes Llama-3.1-8B 1.46 x as fast"),
    Goal("InternVL-C in float8, least cosine, random weights", ">= 0.99", "float8", least_cosine),
    Goal("InternVL-C in float8, least cosine, `tiny/`", ">= 0.99", "float8",
         lambda r: at(r, "float8", "tiny/", COSINE)),
    Goal("texts of 12 tokens, share of their products' speed", ">= 0.6", "texts",
         lambda r: ratio(1, fastest("texts", "texts", key=TIMES)(r)),
         "the products are small, so everything else costs a larger share"),
    Goal("texts/s, best batch", "", "texts", fastest("texts", "texts")),
    Goal("a caption, tokens/s", ">= 240", "captions", fastest("captions", "captions", GREEDY, 1),
         "13.4 GB of weights a token at 70 % of 4.8 TB/s is 251"),
    Goal("a caption, float8 or int8 weights, tokens/s", ">= 380", "captions",
         fastest("captions", "captions", LIGHT, 1), "half of the bytes"),
    Goal("captions, tokens/s of 32 images / of one", ">= 20", "captions", one_to_many,
         "the same weights serve all rows"),
    Goal("5 beams, one image, tokens/s", "", "captions", fastest("captions", "captions", BEAMS, 1)),
    Goal("loading, GB/s / pinned copies'", ">= 0.6", "load",
         lambda r: ratio(at(r, "load", "whole model", "GB/s"), at(r, "ceilings", "from the host, pinned", "GB/s")),
         "the page cache holds the file, so the bus is the limit"),
    Goal("a card of 12 GB, peak / simulated", "<= 1", "placed", to_simulated(12), PROMISED),
    Goal("a card of 8 GB, peak / simulated", "<= 1", "placed", to_simulated(8), PROMISED),
)
# fmt: on


# ---------------------------------------------------------------------------------------------------------- writing


def number(found: Any) -> str:
    if not isinstance(found, (int, float)):
        return "" if found is None else str(found)
    if isinstance(found, int) and found < 1e6:
        return f"{found:,}"
    if found and (abs(found) < 1e-3 or abs(found) >= 1e6):
        return f"{found:.1e}"
    return f"{found:,.0f}" if abs(found) >= 100 else f"{found:.2f}" if abs(found) >= 10 else f"{found:.4g}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [pages.table(head, rows), ""]


def machine(results: Results) -> str:
    found = results["machine"]
    cuda = f", CUDA {found['cuda']}" if "cuda" in found else ""
    packages = this_machine.listed(found, ("torch", "transformers", "accelerate", "torchao", "flash_attn"))
    return f"{found['device']}{cuda}; {packages}; {found['date']}"


def in_a_cell(found: Any) -> str:
    """A small result in one cell of a table; of many numbers the smallest and the largest."""
    if isinstance(found, dict):
        numbers = {name: each for name, each in found.items() if isinstance(each, float)}
        if len(numbers) == len(found) > 7:
            least, most = (bound(numbers, key=lambda name: numbers[name]) for bound in (min, max))
            return f"{number(numbers[least])} ({least}) to {number(numbers[most])} ({most})"
        return "; ".join(f"{name}: {in_a_cell(each)}" for name, each in found.items())
    if isinstance(found, list):
        return ", ".join(map(in_a_cell, found))
    text = number(found)
    return " ".join(text.split())[:200].replace("|", "/")


def speed_tables(results: Results, simulated: Results | None) -> list[str]:
    keys = (RATE, TIMES, "TFLOP/s", PEAK)
    lines = []
    for step in STEPS_OF_ROWS:
        peaks = {(row["work"], row["batch"], row["way"]): row[PEAK] for row in rows_with_peak(simulated, step)}
        cells = []
        for row in results["steps"].get(step, {}).get("rows", []):
            place = (row["work"], row["batch"], row["way"])
            notes = in_a_cell({name: row[name] for name in row if name not in ("work", "batch", "way", *keys)})
            cells.append([*map(str, place), *(number(row.get(key)) for key in keys), number(peaks.get(place)), notes])
        if cells:
            head = ["work", "batch", "way", *keys, "simulated", "notes"]
            lines += [f"### {step}", "", *table(head, cells)]
    return lines


def rows_with_peak(simulated: Results | None, step: str) -> list[dict[str, Any]]:
    return [] if simulated is None else [row for row in simulated["steps"].get(step, {}).get("rows", ()) if PEAK in row]


def other_tables(results: Results) -> list[str]:
    """Results that are not rows of speed: a line for each comparison."""
    lines = []
    for step, found in results["steps"].items():
        plain = {name: each for name, each in found.items() if name not in ("rows", "seconds")}
        if plain:
            cells = [[name, in_a_cell(without_rows(each))] for name, each in plain.items()]
            lines += [f"### {step}", "", *table(["what", "found"], cells)]
        for name, each in plain.items():
            rows = each.get("images") if isinstance(each, dict) else None
            if isinstance(rows, list):
                head = list(dict.fromkeys(key for row in rows for key in row))
                cells = [[in_a_cell(row.get(key)) for key in head] for row in rows]
                lines += [f"{name}:", "", *table(head, cells)]
    return lines


def without_rows(found: Any) -> Any:
    if not isinstance(found, dict):
        return found
    return {name: each for name, each in found.items() if not (isinstance(each, list) and isinstance(each[0], dict))}


def page(
    measured: Results | None, simulated: Results | None, on_cpu: Results | None = None, has_chart: bool = True
) -> str:
    lines = [
        "# On a GPU",
        "",
        f"Written by {COMMAND} and its `--report`. Weights have the published sizes and random values, so nothing here",
        "is about the quality of the 14B. `products` are the matrix products of the same work alone, in bfloat16 and",
        "without attention, measured beside it; `simulated` is the peak of the same call on a simulated card",
        "(`--simulate`).",
        "",
    ]
    if measured is None:
        lines += ["**Not measured yet: no GPU was available.** Below are the goals, and peaks on a simulated card.", ""]
        lines += ["## Goals, for one H200", "", *goals_table({"steps": {}})]
    else:
        lines += [f"Measured on {machine(measured)}.", ""]
        if not is_of_a_card(measured):
            lines += ["**A small run, or one without a card: it shows only that the command works.**", ""]
        lines += [f"![Images and tokens a second]({CHART})", ""] if has_chart else []
        lines += ["## Goals, for one H200", "", *goals_table(measured)] if is_of_a_card(measured) else []
        lines += ["## Speed and memory", ""]
        lines += [*speed_tables(measured, simulated), "## Everything else", "", *other_tables(measured)]
    if simulated is not None:
        lines += ["## Peak memory on a simulated card", "", *simulated_table(simulated)]
        lines += [f"On {machine(simulated)}.", ""]
    if on_cpu is not None:
        lines += ["## At full size on a CPU", "", *other_tables(on_cpu), f"On {machine(on_cpu)}.", ""]
    return "\n".join(lines)


def goals_table(results: Results) -> list[str]:
    return table(["work", "goal", "measured", "met", "reason"], [goal.cells(results) for goal in GOALS])


def simulated_table(simulated: Results) -> list[str]:
    rows = [
        [row["work"], str(row["batch"]), row["way"], number(row[PEAK])]
        for step in STEPS_OF_ROWS
        for row in rows_with_peak(simulated, step)
    ]
    return table(["work", "batch", "way", PEAK], rows)


def is_of_a_card(results: Results) -> bool:
    found = results["machine"]
    return found["kind"] == "cuda" and not found["tiny"] and not found["simulated"]


def readme_line(measured: Results | None) -> str:
    """The README's line: it begins with whether the numbers are right, and counts the goals that were missed."""
    if measured is None:
        return f"**No GPU figures yet:** nothing here was run on a GPU. {COMMAND} measures yours."
    page = "([all figures](benchmarks/GPU.md))"
    start, wrong = f"**On one {measured['machine']['device']}:**", list(failures(measured["steps"]))
    if "goldens" not in measured["steps"] or any(failures(measured["steps"]["goldens"])):
        return f"{start} the original's numbers were not reached, or not compared {page}."
    images = fastest("images", "InternVL-C")(measured)
    tokens = fastest("captions", "captions", GREEDY, 1)(measured)
    said = ["the original's numbers"]
    said += [f"{number(images)} images/s (InternVL-C)"] if images else []
    said += [f"{number(tokens)} tokens/s of a caption"] if tokens else []
    verdicts = [goal.verdict(measured) for goal in GOALS if goal.bound]
    counted = ", ".join(f"{verdicts.count(each)} {each}" for each in ("met", "missed", "not measured", "failed"))
    failed = f"; {len(wrong)} measurements failed" if wrong else ""
    return f"{start} {', '.join(said)}; goals: {counted}{failed} {page}."


def machines_table(measured: Results | None, simulated: Results | None) -> str:
    """The table of docs/machines.md."""
    head = ["on one large GPU", RATE, "batch", "way", PEAK]
    if measured is None:
        rows = [
            [row["work"], "not measured", str(row["batch"]), row["way"], f"{number(row[PEAK])} (simulated)"]
            for step in ("images", "texts", "captions")
            for row in rows_with_peak(simulated, step)
            if (row["batch"], row["way"]) in ((64, "eager"), (32, "greedy"), (32, "5 beams"))
        ]
        return "\n".join(table(head, rows)).rstrip()
    found = [
        best(measured, "images", "InternVL-C"),
        best(measured, "float8", "InternVL-C", FLOAT8),
        best(measured, "images", "InternVL-G"),
        best(measured, "texts", "texts"),
        best(measured, "captions", "captions", GREEDY, 1),
        best(measured, "captions", "captions", GREEDY),
        best(measured, "captions", "captions", BEAMS),
    ]
    rows = [
        [row["work"], number(row[RATE]), str(row["batch"]), row["way"], number(row.get(PEAK))]
        for row in found
        if row is not None
    ]
    return "\n".join([*table(head, rows), f"Measured by {COMMAND} on {machine(measured)}; random weights."])


def draw(results: Results, path: Path) -> bool:
    """Images and tokens a second by batch size, with their ceilings. Returns False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    lines: dict[tuple[int, str, str], list[tuple[int, float]]] = defaultdict(list)  # by axis, style and name
    for row in (*rows_of(results, "images"), *rows_of(results, "float8")):
        lines[0, "o-", f"{row['work']}, {row['way']}"].append((row["batch"], row[RATE]))
        if row["way"] == "eager":
            lines[0, "--", f"{row['work']}, its products"].append((row["batch"], row[RATE] * row[TIMES]))
    bandwidth = at(results, "ceilings", "memory of the device, a sum", "GB/s")
    for row in rows_of(results, "captions"):
        lines[1, "o-", row["way"]].append((row["batch"], row[RATE]))
        if row["way"] == "greedy" and bandwidth and "GB of weights a token" in row:
            ceiling = row["batch"] * bandwidth / row["GB of weights a token"]
            lines[1, "--", "reading the weights"].append((row["batch"], ceiling))
    for (side, style, name), points in lines.items():
        axes[side].plot(*zip(*sorted(points)), style, label=name, linewidth=1, markersize=3)
    for side, title in enumerate(("images a second", "tokens a second, captions")):
        axes[side].set(title=title, xlabel="batch", xscale="log", yscale="log")
        axes[side].legend(fontsize=6)
    figure.suptitle(machine(results), fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True


class Refused(Exception):
    """A file that cannot be reported."""


def read(path: Path) -> Results | None:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def write(file: Path, to: Path) -> None:
    """Copy a file of results into a clone and write its pages. Only results of a GPU reach the line and the table.

    Raises:
        `Refused`: no such file; results of `--tiny` for this clone; fewer steps than the results that the clone has.
    """
    try:
        results = json.loads(file.read_text("utf-8"))
        described, steps = results["machine"], results["steps"]
        is_simulated, is_tiny, is_of_cpu = described["simulated"], described["tiny"], described["kind"] == "cpu"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{file} is no file of {COMMAND}: {type(error).__name__} {error}") from error
    if is_tiny and to.resolve() == ROOT:
        raise Refused(f"{file} was measured with --tiny, which says nothing about the 14B; --to writes it elsewhere")
    folder = to / "benchmarks"
    name = SIMULATED if is_simulated else ON_CPU if is_of_cpu and not is_tiny else MEASURED
    there = {each: read(folder / each) for each in (MEASURED, SIMULATED, ON_CPU)}
    if missing := set((there[name] or {"steps": {}})["steps"]) - set(steps):
        raise Refused(
            f"{file} lacks {', '.join(sorted(missing))}, which {folder / name} has: --resume measures the rest"
        )
    there[name] = results
    measured, simulated, on_cpu = there.values()
    has_chart = measured is not None and draw(measured, folder / CHART)
    text = page(measured, simulated, on_cpu, has_chart)
    card = measured if measured is not None and is_of_a_card(measured) else None
    line, figures = readme_line(card), machines_table(card, simulated)
    this_machine.write_json(folder / name, results)
    (folder / PAGE).write_text(text, "utf-8")
    pages.put(to / "README.md", LINE, line)
    pages.put(to / "docs" / "machines.md", TABLE, figures)


def summary(results: Results) -> str:
    """The goals, one a line, for the end of a run on a card."""
    if not is_of_a_card(results):
        return ""
    return "\n".join(" | ".join(cells[:4]) for cells in (goal.cells(results) for goal in GOALS))
