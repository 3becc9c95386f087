"""Which texts the tiny checkpoint learns, that what is kept back is kept back, and the figures made of them."""

import importlib

import pytest

pytest.importorskip("tqdm", reason="tqdm is not installed")
pytest.importorskip("numpy", reason="numpy is not installed")
tiny_texts = importlib.import_module("tools.tiny.tiny_texts")
LANGUAGES = tiny_texts.LANGUAGES

KEYWORDS = ["red", "fruit", "round", "sweet", "tree", "juice", "green", "healthy", "diet", "snack", "crisp", "cider"]
# With so many words some are held out and some are not, in any hash.
CONCEPTS = [
    {"hexcode": "1F34E", "name": dict.fromkeys(LANGUAGES, "apple"), "keywords": dict.fromkeys(LANGUAGES, KEYWORDS)},
    {"hexcode": "1F352", "name": dict.fromkeys(LANGUAGES, "cherry"), "keywords": dict.fromkeys(LANGUAGES, ["red"])},
    {"hexcode": "1F333", "name": dict.fromkeys(LANGUAGES, "tree"), "keywords": dict.fromkeys(LANGUAGES, ["green"])},
]


@pytest.fixture(params=LANGUAGES)
def texts(request):
    return tiny_texts.Texts(CONCEPTS, request.param)


def test_a_keyword_is_either_learnt_or_held_out(texts):
    learnt = {keyword for keywords in texts.keywords for keyword in keywords}
    assert learnt == texts.bearers.keys()
    assert learnt.isdisjoint(texts.held_out)
    assert learnt | texts.held_out.keys() == set(KEYWORDS)
    assert learnt and texts.held_out


def test_a_keyword_that_is_a_name_is_never_held_out(monkeypatch):
    monkeypatch.setattr(tiny_texts, "is_fifth", lambda text: True)
    texts = tiny_texts.Texts(CONCEPTS, "en")
    assert texts.bearers == {"tree": {0}}
    assert texts.held_out["red"] == {0, 1}


def test_case_does_not_bring_a_held_out_word_back():
    words = [f"Word{number}" for number in range(50)]
    assert [tiny_texts.is_fifth(word) for word in words] == [tiny_texts.is_fifth(word.upper()) for word in words]
    assert any(map(tiny_texts.is_fifth, words))
    assert not all(map(tiny_texts.is_fifth, words))


def test_pairs_are_either_learnt_or_held_out(texts):
    learnt, held_out = texts.pairs(0, held_out=False), texts.pairs(0, held_out=True)
    count = len(texts.keywords[0])
    assert len(set(learnt) | set(held_out)) == len(learnt) + len(held_out) == count * (count - 1) // 2
    assert learnt and held_out
    for pair, concepts in texts.held_out_pairs().items():
        assert tuple(pair.split(" ")) in held_out
        assert concepts == {0}


def test_phrases_have_answers_and_are_in_their_language():
    for language in LANGUAGES:
        found = tiny_texts.phrases(language)
        assert len(found) == len(tiny_texts.PHRASES)
        assert all(found.values())
        assert all(phrase.isascii() == (language == "en") for phrase in found)


def test_the_sampler_gives_nothing_that_is_kept_back(monkeypatch):
    torch = pytest.importorskip("torch")
    train_tiny = importlib.import_module("tools.tiny.train_tiny")
    generator = torch.Generator().manual_seed(0)

    class Tokenizer:
        def encode(self, text, add_special_tokens):
            return [ord(letter) for letter in text]

    held_out = {"sweet", "snack", "fruit|juice", "green|red"}
    monkeypatch.setattr(tiny_texts, "is_fifth", lambda text: text in held_out)
    kept_back = "red fruit"
    assert kept_back in tiny_texts.phrases("en")
    sampler = train_tiny.Sampler(Tokenizer(), CONCEPTS, generator)
    texts = sampler.texts["en"]
    seen = {}
    for _ in range(3000):
        text, fits = sampler.keywords(0, "en")
        seen[text] = fits
    assert kept_back not in seen
    assert texts.held_out.keys() == {"sweet", "snack"}
    assert {"fruit juice", "juice fruit", "green red", "red green"}.isdisjoint(seen)
    for word in texts.held_out:
        assert not any(word in text.split() for text in seen)
    assert seen["red"] == {0, 1}
    learnt = {" ".join(pair) for pair in texts.pairs(0, held_out=False)} - {kept_back, "fruit red"}
    assert learnt <= seen.keys() | {" ".join(text.split()[::-1]) for text in seen}


def test_kinds_of_captions_and_queries(monkeypatch):
    torch = pytest.importorskip("torch")
    evaluate_tiny = importlib.import_module("tools.tiny.evaluate_tiny")
    groups = [("food", "fruit"), ("food", "fruit"), ("food", "drink"), ("animals", "bird")]
    names = ["apple", "cherry", "tea", "owl"]
    evaluation = object.__new__(evaluate_tiny.Evaluation)
    evaluation.concepts = [
        {"name": {"en": name}, "group": group, "subgroup": subgroup}
        for name, (group, subgroup) in zip(names, groups, strict=True)
    ]
    evaluation.names = {"en": names}
    kinds = [evaluation.kind_of_caption("en", 0, caption) for caption in [*names, "appel"]]
    assert kinds == ["exact", "same subgroup", "same group", "another name", "no name"]

    evaluation.images = dict.fromkeys(evaluate_tiny.MODES, torch.eye(4))
    monkeypatch.setattr(evaluation, "embed_texts", lambda texts: torch.eye(4)[: len(texts)])
    figures = evaluation.found({"a": {0}, "b": {2, 3}}, shortlist=1)
    assert figures["queries"] == 2
    assert figures["InternVL-C"] == figures["InternVL-G"] == 0.5
    assert figures["chance"] == pytest.approx((1 / 4 + 2 / 4) / 2)


def test_photographs_are_those_with_captions_in_every_language(tmp_path):
    pytest.importorskip("torch")
    evaluate_photographs = importlib.import_module("tools.tiny.evaluate_photographs")
    image = pytest.importorskip("PIL.Image")

    def stamp(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        image.new("RGBA", (4, 2), (255, 0, 0, 255)).save(path)
        path.with_suffix(".txt").write_text(text, "utf-8")

    stamp("food/apple.png", "A red apple.\nja.utf8=あかいりんご\nzh_CN.utf8=红苹果\nzh_TW.utf8=紅蘋果")
    stamp("food/again.png", "Another apple.\nja.utf8=りんご\nzh_CN.utf8=苹果")
    stamp("food/half.png", "A half.\nja.utf8=はんぶん")
    stamp("cartoon/drawn.png", "A drawing.\nja.utf8=え\nzh_CN.utf8=画")
    found = evaluate_photographs.find_photographs(tmp_path)
    assert [captions["en"] for _, captions in found] == ["Another apple.", "A red apple."]
    assert found[1][1] == {"en": "A red apple.", "zh": "红苹果", "ja": "あかいりんご"}
    assert evaluate_photographs.plain("A red apple.") == "red apple"
    assert evaluate_photographs.plain("Theatre!") == "theatre"
    squared = evaluate_photographs.squared(found[0][0])
    assert squared.size == (4, 4)
    assert squared.getpixel((0, 0)) == (255, 255, 255)
    assert squared.getpixel((0, 1)) == (255, 0, 0)
