"""The demo's poster shows hits first, names its miss, and says how often the model was right."""

import numpy as np
from PIL import Image

from examples.demo_poster import ROW, Result, Sheet, drawn

IMAGE = Image.new("RGB", (30, 20), "blue")


def result(name: str, hit: bool, **fields) -> Result:
    return Result(IMAGE, name, **({"query": name, "answers": [f"{name}?"], "right": [hit], "hit": hit} | fields))


def texts_of(monkeypatch, *parts) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(Sheet, "text", lambda self, x, y, text, *others: texts.append(text))
    drawn("model", *parts)
    return texts


def test_it_shows_hits_first_and_counts_all(monkeypatch):
    named = [result(f"name {number}", number % 2 == 1) for number in range(8)]
    found = [
        result(f"query {number}", number > 2, answers=[IMAGE] * 2, right=[number > 2, False]) for number in range(9)
    ]
    captions = [result(f"caption {number}", number > 1) for number in range(7)]
    texts = texts_of(monkeypatch, named, found, captions)
    assert [text for text in texts if "?" in text] == [
        "name 1?",
        "name 3?",
        "name 5?",
        "caption 2?",
        "caption 3?",
        "caption 0?",
    ]
    assert [text for text in texts if "query" in text] == ["query 3", "query 4", "query 5"]  # the languages take turns
    assert "Miss. Right name: caption 0" in texts
    assert "a wrong caption" in texts[-1] and "4 of 8 names, 6 of 9 searches, 5 of 7 captions" in texts[-1]


def test_a_caption_without_a_known_name_is_neither_right_nor_wrong(monkeypatch):
    caption = result("one", True, answers=["a", "b"], right=[True, None])
    texts = texts_of(monkeypatch, [], [], [caption])
    assert (
        "1 of 1 captions" in texts[-1] and "wrong" not in texts[-1] and not [text for text in texts if "Miss" in text]
    )


def test_all_misses_are_named(monkeypatch):
    texts = texts_of(monkeypatch, [], [], [result(name, False) for name in "abcd"])
    assert [text for text in texts if "Miss" in text] == [f"Miss. Right name: {name}" for name in "abc"]


def test_a_text_stays_within_its_width():
    sheet = Sheet(400, ROW)
    sheet.text(10, 10, "a name that is much longer than its panel is wide", 30, "black", 120)
    columns = np.flatnonzero((np.asarray(sheet.canvas) < 255).any((0, 2)))
    assert 60 < columns.max() <= 130
