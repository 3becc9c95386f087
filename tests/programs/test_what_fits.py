"""The tables of what the 14B takes are what the tools say."""

import json
import subprocess
import sys

import pytest

from conftest import IS_V5, ROOT

pytest.importorskip("accelerate")

from benchmarks import full_size
from tools.machines import what_fits
from tools.pages import table, taken

PAGE = (ROOT / "docs" / "machines.md").read_text("utf-8").splitlines()
CARD = taken(ROOT / "README.md", "hardware").splitlines()
ROWS = {
    "parts": what_fits.rows_of_parts,
    "processes": what_fits.rows_of_processes,
    "formats": what_fits.rows_of_formats,
    "processors": lambda: what_fits.rows_of_cpus(json.loads(what_fits.MEASURED.read_text())),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_the_page(kind):
    rows = ROWS[kind]()
    lines = table(["what you have", "what to type", "what it takes"], rows).splitlines()
    assert len(rows) >= 2 and [line for line in lines if line not in PAGE] == []


def test_the_card_has_the_common_rows_of_the_page():
    assert [line.split(" | ")[0].removeprefix("| ") for line in CARD[2:]] == list(what_fits.COMMON)
    assert [line for line in CARD if line not in PAGE] == []


def test_the_report_is_that_of_the_measurements():
    results = json.loads(what_fits.MEASURED.read_text())
    assert full_size.report(results) == (ROOT / "benchmarks" / "full_size.md").read_text()
    assert full_size.failures(results) == []


def test_what_was_measured_keeps_its_promises():
    plans = json.loads(what_fits.MEASURED.read_text())["plans"]
    for name in ("disk", "ram+disk"):
        assert plans[name]["peak_rss"] < 16 * what_fits.GIB
    assert plans["int8"]["memory"]["limit"] == 18 * what_fits.GIB
    assert sum(stage["bytes_read"] for stage in plans["int8"]["stages"].values()) < 0.1 * what_fits.GB


@pytest.mark.slow
@pytest.mark.skipif(not IS_V5, reason="the page names the versions of `make test`")
def test_all_tables():
    """Minutes: every setup is simulated again."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.machines.what_fits", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
