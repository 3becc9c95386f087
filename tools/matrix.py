"""Run the contract (tests/contract) on every supported version of transformers; write the table of docs/versions.md.

Run by whoever adds a version of transformers (`make matrix`); CI runs it on the oldest and the newest.

    python -m tools.matrix                                     # all versions; writes the table
    python -m tools.matrix --only 4.57.6 newest                # some of them; writes nothing
    python -m tools.matrix --python .venv/bin/python           # an existing interpreter; writes nothing

Each version gets an environment under .cache/matrix (1.4 GB, one to three minutes to make), which later runs reuse. It
pins only torch and transformers. "newest" pins only torch and is upgraded before every run, so it is what `pip install`
gives a user today. A skipped check is a failure, unless KNOWN_BAD in compat_internvl.py refuses its feature. The exit
status is 1 if anything failed.
"""

import argparse
import ast
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

from tools import ROOT, pages

PAGE = ROOT / "docs" / "versions.md"
ENVIRONMENTS = ROOT / ".cache" / "matrix"
NEWEST = "newest"
# A version with two numbers stands for its newest patch. The table has one row for each.
VERSIONS = ("4.57.6", "5.1.0", "5.8", "5.15", "5.23", NEWEST)
TORCH = "torch==2.13.0"
LIBRARIES = ("transformers", "huggingface_hub", "sentence-transformers", "accelerate", "peft")
OTHERS = ("sentencepiece", "protobuf", "pillow", "pytest")
SUBJECTS = {
    "goldens": "goldens",
    "loading": "loading",
    "generate": "captions",
    "pipelines": "pipelines",
    "sentence_transformers": "embedder, cross encoder",
    "training": "training",
    "device_maps": "device maps",
    "publishing": "publishing",
    "endpoint": "endpoint",
    "model_card": "original card",
    "warnings": "no deprecations",
}
INSTALLED = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
print(json.dumps({name: installed(name) for name in sys.argv[1:]}))
"""


@dataclass
class Result:
    """One run of the contract.

    Attributes:
        counts: of "passed", "failed", "skipped" and "refused" checks, by subject.
        refusal: why nothing was run, if KNOWN_BAD refuses to load the model.
    """

    versions: dict[str, str]
    refusal: str = ""
    counts: dict[str, Counter] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0
    cpu_seconds: float = 0


def known_bad() -> list[tuple[str, str, str, str]]:
    """KNOWN_BAD of compat_internvl.py, (package, version, feature, reason), read without importing the model."""
    tree = ast.parse((ROOT / "compat_internvl.py").read_text("utf-8"))
    assigned = (node for node in tree.body if isinstance(node, ast.AnnAssign))
    return list(ast.literal_eval(next(node.value for node in assigned if ast.unparse(node.target) == "KNOWN_BAD")))


# ---------------------------------------------------------------------------------------------------- environments


def requirements(name: str) -> list[str]:
    pin = "" if name == NEWEST else f"=={name}" if name.count(".") > 1 else f"=={name}.*"
    return [TORCH, f"transformers{pin}", *LIBRARIES[1:], *OTHERS]


def environment(name: str) -> Path:
    """The interpreter of a version's environment, which is created or upgraded if necessary."""
    folder = ENVIRONMENTS / name
    python, ready, wanted = folder / "bin" / "python", folder / "ready", shlex.join(requirements(name))
    if name != NEWEST and ready.is_file() and ready.read_text() == wanted:
        return python
    upgrade = ["--upgrade", "--upgrade-strategy", "eager"] if name == NEWEST else []
    print(f"{name}: installing {wanted} into {folder}; this takes minutes ...", flush=True)
    started = time.perf_counter()
    if not python.is_file():
        run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, TORCH])
    run([*pip, *upgrade, *requirements(name)])
    ready.write_text(wanted)
    print(f"{name}: installed in {time.perf_counter() - started:.0f} s", flush=True)
    return python


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")


def installed(python: Path, *names: str) -> dict[str, str]:
    return json.loads(subprocess.run([python, "-c", INSTALLED, *names], check=True, capture_output=True).stdout)


# ------------------------------------------------------------------------------------------------------- the runs


def contract(name: str, python: Path) -> Result:
    """Run the contract with an interpreter."""
    result = Result(installed(python, "torch", *LIBRARIES))
    for package, bad, feature, reason in known_bad():
        if feature == "loading" and result.versions.get(package) == bad:
            print(f"{name}: refused by KNOWN_BAD: {reason}", flush=True)
            result.refusal = reason
            return result
    print(f"{name}: running the contract on transformers {result.versions['transformers']} ...", flush=True)
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    report, log = (ENVIRONMENTS / f"{name}.{kind}" for kind in ("xml", "log"))
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "tests/contract"]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    started, cpu = time.perf_counter(), cpu_of_children()
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, errors="replace")
    result.seconds, result.cpu_seconds = time.perf_counter() - started, cpu_of_children() - cpu
    log.write_text(done.stdout + done.stderr, "utf-8")
    if report.is_file():
        read_report(report, result)
    if done.returncode and not result.failures:
        result.failures.append(f"pytest ended with status {done.returncode}")
    total = sum(result.counts.values(), Counter())
    counts = ", ".join(f"{count} {kind}" for kind, count in total.items())
    print(f"{name}: {counts} in {result.seconds:.0f} s, {result.cpu_seconds:.0f} s of CPU time", flush=True)
    if result.failures:
        print(*result.failures, f"Details: {log}", sep="\n  ", flush=True)
    return result


def cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def read_report(path: Path, result: Result) -> None:
    for case in ElementTree.parse(path).iter("testcase"):
        module = case.get("classname") or case.get("name") or ""
        subject = module.rpartition(".")[2].removeprefix("test_")
        kind = outcome(case)
        result.counts.setdefault(subject, Counter())[kind] += 1
        if kind in ("failed", "skipped"):
            problem = next(each for each in case if each.tag in ("failure", "error", "skipped"))
            lines = (problem.get("message") or "").splitlines() or [""]
            result.failures.append(f"{kind}: {subject}: {case.get('name')}: {lines[0][:200]}")


def outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    skipped = case.find("skipped")
    if skipped is None:
        return "passed"
    return "refused" if (skipped.get("message") or "").startswith("refused: ") else "skipped"


# ------------------------------------------------------------------------------------------------------- the table


def table(results: dict[str, Result]) -> str:
    """Markdown: a row for each version that ran, and for each other version in KNOWN_BAD."""
    columns = [*LIBRARIES, *SUBJECTS.values(), "seconds (CPU time)"]
    rows = [[*(each.versions[name] for name in LIBRARIES), *cells(each)] for each in results.values()]
    run_versions = {each.versions["transformers"] for each in results.values()}
    for package, version, feature, reason in known_bad():
        if package == "transformers" and version not in run_versions:
            rows.append([version, f"{feature} are refused: {reason}", *[""] * (len(columns) - 2)])
    torch_version = next(iter(results.values())).versions["torch"]
    cpu = f"a CPU ({platform.machine()}, {os.cpu_count()} cores)"
    machine = f"{cpu}, torch {torch_version}, Python {platform.python_version()}"
    return f"{pages.table(columns, rows)}\n\nChecks passed, by `make matrix` on {machine}, {date.today()}."


def cells(result: Result) -> list[str]:
    if result.refusal:
        return [f"refused: {result.refusal}", *[""] * len(SUBJECTS)]
    found = [cell(result.counts.get(subject, Counter())) for subject in SUBJECTS]
    return [*found, f"{result.seconds:.0f} ({result.cpu_seconds:.0f})"]


def cell(counts: Counter) -> str:
    if not counts:
        return "**not run**"
    parts = [str(counts["passed"])] if counts["passed"] else []
    parts += [f"**{counts[kind]} {kind}**" for kind in ("failed", "skipped") if counts[kind]]
    return ", ".join(parts + ([f"{counts['refused']} refused"] if counts["refused"] else []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="VERSION", help=f"some of {', '.join(VERSIONS)}, or any other")
    parser.add_argument("--python", type=Path, help="use this interpreter instead of making environments")
    arguments = parser.parse_args()
    if arguments.python:
        if arguments.only and len(arguments.only) > 1:
            parser.error("--python is one interpreter, so --only takes one version with it")
        pythons = {(arguments.only or ["given"])[0]: arguments.python.absolute()}
    else:
        # All are made before the first run: a failing install shows early and is not timed.
        pythons = {name: environment(name) for name in arguments.only or VERSIONS}
    results = {name: contract(name, python) for name, python in pythons.items()}
    text = table(results)
    print(f"\n{text}")
    if not (arguments.only or arguments.python):
        pages.put(PAGE, "versions", text)
    sys.exit(any(result.failures for result in results.values()))


if __name__ == "__main__":
    main()
