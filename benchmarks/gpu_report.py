"""Write what benchmarks/gpu.py measured: GPU.md with its chart, and the README's lines."""

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_machine import COSINE, PEAK
from tools import pages

ROOT = Path(__file__).resolve().parents[1]


MEASURED, SIMULATED, ON_CPU = "gpu.json", "gpu_simulated.json", "gpu_on_cpu.json"
PAGE, CHART = "GPU.md", "gpu.png"
LINE, TABLE = "gpu-line", "gpu"
OURS = ("eager", "eager, one CUDA graph", "compile_layers", "compile_layers, one CUDA graph")
COMMAND = "`python -m benchmarks.gpu`"

# --------------------------------------------------------------------------------------------------------- reading


def rows_of(results: dict[str, Any], step: str) -> list[dict[str, Any]]:
    """The figures of a step that were measured."""
    return [row for row in results["steps"].get(step, {}).get("rows", ()) if "a second" in row]


def best(
    results: dict[str, Any],
    step: str,
    work: str,
    ways: Iterable[str] = OURS,
    batch: int | None = None,
    key: str = "a second",
) -> dict[str, Any] | None:
    """The row with the most of `key`, of all batches or one; of `time / products` that with the least."""
    found = [
        row
        for row in rows_of(results, step)
        if row["work"] == work and row["way"] in ways and (batch is None or row["batch"] == batch) and key in row
    ]
    return (min if key == "time / products" else max)(found, key=lambda row: row[key], default=None)


def largest_batch(results: dict[str, Any], step: str, work: str) -> int | None:
    return max((row["batch"] for row in rows_of(results, step) if row["work"] == work), default=None)


def value(row: dict[str, Any] | None, key: str = "a second") -> float | None:
    return None if row is None else row[key]


def ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def at(results: dict[str, Any], *path: str) -> Any:
    """What stands at a path of the steps, or None."""
    found: Any = results["steps"]
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return found


# ----------------------------------------------------------------------------------------------------------- goals


@dataclass
class Goal:
    """
    Attributes:
        bound: such as ">= 205"; empty for what is only reported.
        why: where the bound comes from.
        step: that measures it.
    """

    work: str
    bound: str
    why: str
    step: str
    measured: Callable[[dict[str, Any]], float | None]

    def verdict(self, results: dict[str, Any]) -> str:
        """ "met", "missed", "failed", "not measured", or nothing where there is no goal."""
        found = self.measured(results)
        if found is None:
            return "failed" if any(failures(results["steps"].get(self.step))) else "not measured"
        if not self.bound:
            return ""
        sign, bound = self.bound.split()
        return "met" if (found <= float(bound) if sign == "<=" else found >= float(bound)) else "missed"

    def cells(self, results: dict[str, Any]) -> list[str]:
        verdict = self.verdict(results)
        return [
            self.work,
            self.bound,
            number(self.measured(results)),
            f"**{verdict}**" if verdict in BAD else verdict,
            self.why,
        ]


BAD = ("missed", "failed")


def reasons(found: Any, key: str, where: str = "") -> Iterator[tuple[str, str]]:
    """Every place in the results that has a reason under `key`, "failed" or "skipped", and the reason."""
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


def share_of_products(results: dict[str, Any], work: str) -> float | None:
    """How much of the speed of its products the fastest way of `work` reaches."""
    row = best(results, "images", work)
    return None if row is None else 1 / row["time / products"]


def one_to_many(results: dict[str, Any]) -> float | None:
    way, many = ("greedy, compiled",), largest_batch(results, "captions", "captions")
    if many == 1:
        return None
    one, all_of_them = (value(best(results, "captions", "captions", way, batch)) for batch in (1, many))
    return ratio(all_of_them, one)


def peak_to_simulated(results: dict[str, Any], card: str) -> float | None:
    return ratio(at(results, "placed", card, PEAK), at(results, "placed", card, "simulated peak GB"))


FLOAT8 = ("float8", "float8, compile_layers")
GREEDY = ("greedy", "greedy, static cache", "greedy, compiled")
LIGHT = ("greedy, compiled, float8", "greedy, compiled, int8 weights")
GOALS = (
    Goal(
        "InternVL-C, images/s, best batch",
        ">= 205",
        "65 % of the peak of 989 TFLOP/s at 3.08 TFLOP an image",
        "images",
        lambda r: value(best(r, "images", "InternVL-C")),
    ),
    Goal(
        "InternVL-C, share of its products' speed",
        ">= 0.8",
        "what is no product should cost a fifth at most",
        "images",
        lambda r: share_of_products(r, "InternVL-C"),
    ),
    Goal(
        "InternVL-C, one image, time / products",
        "<= 1.15",
        "launches dominate at batch 1; a CUDA graph has none",
        "images",
        lambda r: value(best(r, "images", "InternVL-C", batch=1, key="time / products"), "time / products"),
    ),
    Goal(
        "InternVL-G, share of its products' speed / that of InternVL-C",
        ">= 0.95",
        "the queries' part should not be less efficient",
        "images",
        lambda r: ratio(share_of_products(r, "InternVL-G"), share_of_products(r, "InternVL-C")),
    ),
    Goal("InternVL-G, images/s, best batch", "", "", "images", lambda r: value(best(r, "images", "InternVL-G"))),
    Goal(
        "InternVL-C in float8, images/s, best batch",
        ">= 290",
        "1.46 x is what Llama-3.1-8B gains by float8",
        "float8",
        lambda r: value(best(r, "float8", "InternVL-C", FLOAT8)),
    ),
    Goal(
        "InternVL-C in float8, least cosine, drawn weights",
        ">= 0.99",
        "",
        "float8",
        lambda r: min((row[COSINE] for row in rows_of(r, "float8") if COSINE in row), default=None),
    ),
    Goal(
        "InternVL-C in float8, least cosine, `tiny/`",
        ">= 0.99",
        "",
        "float8",
        lambda r: at(r, "float8", "tiny/", COSINE),
    ),
    Goal(
        "texts of 12 tokens, share of their products' speed",
        ">= 0.6",
        "small products: what is around them weighs more",
        "texts",
        lambda r: ratio(1, value(best(r, "texts", "texts", key="time / products"), "time / products")),
    ),
    Goal("texts/s, best batch", "", "", "texts", lambda r: value(best(r, "texts", "texts"))),
    Goal(
        "a caption, tokens/s",
        ">= 240",
        "13.4 GB of weights a token at 70 % of 4.8 TB/s is 251",
        "captions",
        lambda r: value(best(r, "captions", "captions", GREEDY, 1)),
    ),
    Goal(
        "a caption, float8 or int8 weights, tokens/s",
        ">= 380",
        "half of the bytes",
        "captions",
        lambda r: value(best(r, "captions", "captions", LIGHT, 1)),
    ),
    Goal(
        "captions, tokens/s of 32 images / of one", ">= 20", "the same weights serve all rows", "captions", one_to_many
    ),
    Goal(
        "5 beams, one image, tokens/s",
        "",
        "",
        "captions",
        lambda r: value(best(r, "captions", "captions", ("5 beams",), 1)),
    ),
    Goal(
        "loading, GB/s / pinned copies'",
        ">= 0.6",
        "the page cache holds the file; the bus is the limit",
        "load",
        lambda r: ratio(at(r, "load", "whole model", "GB/s"), at(r, "ceilings", "from the host, pinned", "GB/s")),
    ),
    Goal(
        "a card of 12 GB, peak / simulated",
        "<= 1",
        "the README's table promises it",
        "placed",
        lambda r: peak_to_simulated(r, "a card of 12 GB"),
    ),
    Goal(
        "a card of 8 GB, peak / simulated",
        "<= 1",
        "the README's table promises it",
        "placed",
        lambda r: peak_to_simulated(r, "a card of 8 GB"),
    ),
)


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


def machine(results: dict[str, Any]) -> str:
    found = results["machine"]
    cuda = f", CUDA {found['cuda']}" if "cuda" in found else ""
    names = ("torch", "transformers", "accelerate", "torchao", "flash_attn")
    packages = ", ".join(f"{name} {found[name]}" for name in names if name in found)
    return f"{found['device']}{cuda}; {packages}; {found['date']}"


def in_a_cell(found: Any) -> str:
    """A small result in one cell of a table; of many numbers the greatest and the least."""
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


def speed_tables(results: dict[str, Any], simulated: dict[str, Any] | None) -> list[str]:
    lines = []
    for step in ("images", "float8", "texts", "captions"):
        rows = results["steps"].get(step, {}).get("rows", [])
        if not rows:
            continue
        peaks = {(row["work"], row["batch"], row["way"]): row.get(PEAK) for row in rows_with_peak(simulated, step)}
        head = ["work", "batch", "way", "a second", "time / products", "TFLOP/s", PEAK, "simulated", "notes"]
        keys = ("a second", "time / products", "TFLOP/s", PEAK)
        cells = []
        for row in rows:
            known = {"work", "batch", "way", *keys}
            notes = in_a_cell({name: each for name, each in row.items() if name not in known})
            figures = [number(row.get(key)) for key in keys]
            expected = number(peaks.get((row["work"], row["batch"], row["way"])))
            cells.append([row["work"], str(row["batch"]), row["way"], *figures, expected, notes])
        lines += [f"### {step}", "", *table(head, cells)]
    return lines


def rows_with_peak(simulated: dict[str, Any] | None, step: str) -> list[dict[str, Any]]:
    return [] if simulated is None else [row for row in simulated["steps"].get(step, {}).get("rows", ()) if PEAK in row]


def other_tables(results: dict[str, Any]) -> list[str]:
    """Steps whose results are not rows: one line for each thing that was compared."""
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
    measured: dict[str, Any] | None,
    simulated: dict[str, Any] | None,
    on_cpu: dict[str, Any] | None = None,
    has_chart: bool = True,
) -> str:
    lines = [
        "# On a GPU",
        "",
        f"Written by {COMMAND} and its `--report`. Weights have the published sizes and are drawn at random, so",
        "nothing here is about the quality of the 14B. `products` are the matrix products of the same work alone,",
        "attention left out, in bfloat16, measured beside it; `simulated` is the peak of the same call on a simulated",
        "card (`--simulate`).",
        "",
    ]
    if measured is None:
        lines += ["**Not measured yet: no GPU was at hand.** The goals stand here, and what a simulated card says.", ""]
        lines += ["## Goals, for one H200", "", *goals_table({"steps": {}})]
    else:
        lines += [f"Measured on {machine(measured)}.", ""]
        if not is_of_a_card(measured):
            lines += ["**A small run, or one without a card: it says that the command works, and nothing else.**", ""]
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


def goals_table(results: dict[str, Any]) -> list[str]:
    return table(["work", "goal", "measured", "met", "why this much"], [goal.cells(results) for goal in GOALS])


def simulated_table(simulated: dict[str, Any]) -> list[str]:
    rows = [
        [row["work"], str(row["batch"]), row["way"], number(row[PEAK])]
        for step in ("images", "float8", "texts", "captions")
        for row in rows_with_peak(simulated, step)
    ]
    return table(["work", "batch", "way", PEAK], rows)


def is_of_a_card(results: dict[str, Any]) -> bool:
    found = results["machine"]
    return found["kind"] == "cuda" and not found["tiny"] and not found["simulated"]


def readme_line(measured: dict[str, Any] | None) -> str:
    """For the README's first screen: whether the numbers are right comes first, goals that are not met are counted."""
    if measured is None:
        return f"**No GPU figures yet:** nothing here was run on a GPU; {COMMAND} measures one."
    page = "([all figures](benchmarks/GPU.md))"
    start, wrong = f"**On one {measured['machine']['device']}:**", list(failures(measured["steps"]))
    if "goldens" not in measured["steps"] or any(failures(measured["steps"]["goldens"])):
        return f"{start} the original's numbers were not reached, or not compared {page}."
    images = value(best(measured, "images", "InternVL-C"))
    tokens = value(best(measured, "captions", "captions", GREEDY, 1))
    said = ["the original's numbers"]
    said += [f"{number(images)} images/s (InternVL-C)"] if images else []
    said += [f"{number(tokens)} tokens/s of a caption"] if tokens else []
    verdicts = [goal.verdict(measured) for goal in GOALS if goal.bound]
    counted = ", ".join(f"{verdicts.count(each)} {each}" for each in ("met", "missed", "not measured", "failed"))
    failed = f"; {len(wrong)} measurements failed" if wrong else ""
    return f"{start} {', '.join(said)}; goals: {counted}{failed} {page}."


def readme_table(measured: dict[str, Any] | None, simulated: dict[str, Any] | None) -> str:
    """For the README's section on machines."""
    head = ["on one large card", "a second", "batch", "way", PEAK]
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
        best(measured, "captions", "captions", ("5 beams",)),
    ]
    rows = [
        [row["work"], number(row["a second"]), str(row["batch"]), row["way"], number(row.get(PEAK))]
        for row in found
        if row is not None
    ]
    return "\n".join([*table(head, rows), f"Measured by {COMMAND} on {machine(measured)}; drawn weights."])


def draw(results: dict[str, Any], path: Path) -> bool:
    """Images a second and tokens a second against the batch, with the ceilings; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    series: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for row in (*rows_of(results, "images"), *rows_of(results, "float8")):
        series.setdefault((0, f"{row['work']}, {row['way']}"), []).append((row["batch"], row["a second"]))
        if row["way"] == "eager":
            ceiling = row["a second"] * row["time / products"]
            series.setdefault((0, f"{row['work']}, its products"), []).append((row["batch"], ceiling))
    bandwidth = at(results, "ceilings", "memory of the device, a sum", "GB/s")
    for row in rows_of(results, "captions"):
        series.setdefault((1, row["way"]), []).append((row["batch"], row["a second"]))
        if row["way"] == "greedy" and bandwidth and "GB of weights a token" in row:
            ceiling = row["batch"] * bandwidth / row["GB of weights a token"]
            series.setdefault((1, "reading the weights"), []).append((row["batch"], ceiling))
    for (side, name), points in series.items():
        is_ceiling = name.endswith(("products", "weights")) and "int8" not in name
        axes[side].plot(*zip(*sorted(points)), "--" if is_ceiling else "o-", label=name, linewidth=1, markersize=3)
    for side, title in enumerate(("images a second", "tokens a second, captions")):
        axes[side].set(title=title, xlabel="batch", xscale="log", yscale="log")
        axes[side].legend(fontsize=6)
    figure.suptitle(machine(results), fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True


class Refused(Exception):
    """A file that is not to be reported."""


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def write(file: Path, to: Path) -> None:
    """
    Take a file of results over into a clone, and write its pages anew. The README says only what a card measured.

    Raises:
        `Refused`: no such file; results of `--tiny` for this clone itself; fewer steps than those that are there.
    """
    try:
        results = json.loads(file.read_text("utf-8"))
        described, steps = results["machine"], results["steps"]
        is_simulated, is_tiny, is_of_cpu = described["simulated"], described["tiny"], described["kind"] == "cpu"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{file} is no file of {COMMAND}: {type(error).__name__} {error}") from error
    is_home = to.resolve() == ROOT
    if is_tiny and is_home:
        raise Refused(f"{file} was measured with --tiny, which says nothing about the 14B; --to writes it elsewhere")
    folder, readme = to / "benchmarks", to / "README.md"
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
    line, figures = readme_line(card), readme_table(card, simulated)
    (folder / name).write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    (folder / PAGE).write_text(text, "utf-8")
    pages.put(readme, LINE, line)
    pages.put(readme, TABLE, figures)


def summary(results: dict[str, Any]) -> str:
    """For the end of a run on a card: the goals, one a line."""
    if not is_of_a_card(results):
        return ""
    return "\n".join(" | ".join(cells[:4]) for cells in (goal.cells(results) for goal in GOALS))
