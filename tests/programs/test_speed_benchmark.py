"""What benchmarks/speed.py compares is what it says, and what it counts without a clock stays where it should be."""

import json
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from conftest import ROOT, TOLERANCE, golden, golden_model
from tools import pages

pytest.importorskip("torchao")

from benchmarks import measuring as m
from benchmarks import speed


@torch.inference_mode()
def test_the_original_way_writes_the_same():
    model, prompt = golden_model(), golden("tiny/inputs")["prompt_ids"][:1]
    seen = model.look_at(golden("tiny/inputs")["pixel_values"][:1], queries=False)
    options = m.written(8, beams=3)
    expected = model.generate(seen, prompt, **options)
    rows: list[int] = []
    model.qllama.lm_head.register_forward_pre_hook(lambda head, inputs: rows.append(inputs[0].shape[:2].numel()))
    found = m.original_caption(model, seen, prompt, **options)
    assert torch.equal(found, expected)
    assert rows == [3 * (model.config.num_query_token + prompt.shape[1]), *[3] * 7]


@torch.inference_mode()
def test_peers_do_the_same_work():
    models = m.small_models(3)
    assert all(parameter.device.type == "cpu" for model in models.values() for parameter in model.parameters())
    images, tokens = m.pixels(2, 28), m.ids(2, 9) % 100 + 3
    ours, peer = models["vision"](images).last_hidden_state, models["vision, transformers"](images).last_hidden_state
    assert_close(nn.functional.layer_norm(ours, ours.shape[-1:], eps=1e-6), peer, rtol=1e-3, atol=1e-4)
    ours, peer = (models[name](input_ids=tokens).last_hidden_state for name in ("text", "text, transformers"))
    assert_close(ours, peer, **TOLERANCE)
    shared = models["text"].layers[0].mlp.up_proj.weight.data_ptr()
    assert shared == models["text, transformers"].layers[0].mlp.up_proj.weight.data_ptr()


def test_products_are_those_of_the_work():
    model = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.Flatten(2), nn.Linear(16, 5), nn.GELU(), nn.Linear(5, 7))
    with torch.no_grad(), m.Products(model) as products:
        model(torch.randn(2, 3, 8, 8))
        nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 2, 4, 8))
    with torch.no_grad():
        shapes = [tuple(product().shape) for product in products.steps[0]]
    assert shapes == [(2, 8, 4, 4), (2, 8, 5), (2, 8, 7), (1, 2, 4, 4), (1, 2, 4, 8)]
    products.run()


def test_a_ratio_is_that_of_the_fastest_runs():
    row = m.ratio("work", {"one": [2.0, 3.0], "other": [4.0, 1.0]}, "one", "other", "<= 1.9")
    assert (row.value, row.spread, row.met) == (2.0, (0.5, 3.0), False)
    assert m.Row("", "", 3.0, target=">= 2.5").met and m.Row("", "", 3.0).met is None
    assert m.Row("work", "figure", 0.1234, (1, 2), "<= 1").cells()[2:] == ("0.123", "1.00 to 2.00", "<= 1", "yes")
    calls = []
    times = m.in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert "".join(calls) == "ababab" and [len(each) for each in times.values()] == [2, 2]


def test_operators_per_layer():
    bench = speed.Bench(rounds=1)
    speed.operators(bench)
    found = {row.work: row for row in bench.rows if row.figure == "ours"}
    assert [row.met for row in found.values()] == [True] * 3
    assert all(row.value > 8 for row in found.values())  # it did count


def test_memory_grows_with_tokens_not_with_their_square():
    bench = speed.Bench(rounds=1)
    speed.memory(bench)
    assert all(row.value > 1 for row in bench.rows)
    missed = [row for row in bench.rows if row.met is False]
    assert not missed


def test_curves_show_their_rows(tmp_path, monkeypatch):
    rows = [
        m.Row(panel.subject, f"seconds, {panel.counted}: {size}", 0.5 * size**0.5)
        for panel in speed.PANELS
        for size in (1, 4, 16)
    ]
    assert {panel.takeaway(points) for panel, points in speed.drawn(rows)} == {
        f"16 x the {panel.counted} take 4.0 x the time" for panel in speed.PANELS
    }
    monkeypatch.setattr(speed, "CURVES", tmp_path / "curves.png")
    speed.draw(rows)
    with Image.open(speed.CURVES) as drawn:
        assert json.loads(drawn.info["Description"]) == json.loads(json.dumps([asdict(row) for row in rows]))


def test_results_are_those_that_were_measured():
    measured = json.loads(speed.MEASURED.read_text())
    assert list(measured) == list(speed.SECTIONS)
    assert speed.RESULTS.read_text() == speed.report(measured)
    assert all(found["seconds"] > 0 and found["rows"] + found["notes"] for found in measured.values())
    with Image.open(speed.CURVES) as drawn:
        assert drawn.width > 1000 and json.loads(drawn.info.get("Description", "[]")) == measured["curves"]["rows"]


def test_what_the_page_says_is_what_was_measured():
    assert pages.taken(ROOT / "docs" / "speed.md", "speed") == speed.summary(json.loads(speed.MEASURED.read_text()))
