"""The README's table of published accuracy is that of benchmarks/published.json, and every figure has a source."""

import json
import re

import pytest

from benchmarks.published import MODELS, PUBLISHED, README, ROWS, figures, published_table
from tools.pages import taken

KNOWN = json.loads(PUBLISHED.read_text("utf-8"))
TABLE = published_table()


def test_the_table_in_the_readme():
    assert taken(README, "published") == TABLE


def test_every_figure_of_the_comparison_is_in_the_table():
    """A misspelt data set, metric or model would leave a cell empty."""
    shown = {(*test, model) for test in ROWS.values() for model in MODELS}
    found = {key for key in figures({**KNOWN, "results": []})}
    assert found and found <= shown
    assert all(figures(KNOWN).get((*test, model)) for test in ROWS.values() for model in ("InternVL-C", "InternVL-G"))
    rows = [line for line in TABLE.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(ROWS) and TABLE.count("<sup>") == len(shown & set(figures(KNOWN)))


def test_every_figure_has_a_source():
    for entry in KNOWN["results"] + KNOWN["comparison"]:
        assert all(figure is None or 0 < figure < 10 for figure in entry["metrics"].values())
        source = KNOWN["sources"][entry["source"]]
        assert source["where"].startswith("https://") and re.fullmatch(r"\[[^]]+\]\(https://[^)]+\)", source["link"])
    links = re.findall(r"(\d+)\. \[", TABLE.rpartition("Sources:")[2])
    assert set(links) == set(re.findall(r"<sup>(\d+)</sup>", TABLE))


@pytest.mark.parametrize("mode", ["InternVL-C", "InternVL-G"])
def test_the_mean_recall_is_the_mean_of_twelve(mode):
    """So the published mean and the published recalls are one measurement."""
    recalls = [
        figures(KNOWN)[name, f"{kind}_retrieval_recall@{k}", mode][0]
        for name in ("flickr30k", "mscoco_captions")
        for kind in ("image", "text")
        for k in (1, 5, 10)
    ]
    mean, _ = figures(KNOWN)["flickr30k and mscoco_captions", "mean_recall", mode]
    assert round(sum(recalls) / 12, 3) == mean


def test_cells_of_the_table():
    """As the sources print them: OpenCLIP's 0.7656, SigLIP 2's 84.1, InternVL's 0.585806."""
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in TABLE.splitlines()}
    imagenet = [cell.split("<")[0] for cell in cells["ImageNet-1K"]]
    assert imagenet == ["83.2", "82.9", "76.6", "83.8", "84.1"]
    assert [cell.split("<")[0].strip(" |") for cell in cells["COCO, text to image, R@1"]] == [
        "54.1", "58.6", "37.1", "–", "55.8",
    ]  # fmt: skip
