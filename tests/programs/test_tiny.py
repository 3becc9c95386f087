"""The trained tiny checkpoint: its size, what its cards say of it, and that it means something on held-out images."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor

from conftest import ROOT, run_module
from tools import pages

TINY = ROOT / "tiny"
EXAMPLES = json.loads((ROOT / "examples" / "pictures" / "examples.json").read_text("utf-8"))
PHRASES = {"en": "a photo of {}", "zh": "一张{}的照片", "ja": "{}の写真"}


@pytest.fixture(scope="module")
def tiny():
    """Model and processor as a user loads them."""
    where = {"subfolder": "tiny", "trust_remote_code": True}
    model = AutoModel.from_pretrained(ROOT, dtype=torch.float32, **where).eval()
    return model, AutoProcessor.from_pretrained(ROOT, **where)


@pytest.fixture(scope="module")
def pixels(tiny):
    return tiny[1](images=[ROOT / "examples" / "pictures" / example["file"] for example in EXAMPLES]).pixel_values


@torch.inference_mode()
def ranks_of_own_name(tiny, pixels, mode: str, language: str) -> torch.Tensor:
    """For every example image, how many of the other names are nearer than its own."""
    model, processor = tiny
    names = [PHRASES[language].format(example["name"][language]) for example in EXAMPLES]
    similarity = model.embed_image(pixels, mode) @ model.embed_text(**processor(text=names)).T
    return (similarity > similarity.diag()[:, None]).sum(1)


def test_size_is_within_the_limits(tiny):
    model, _ = tiny
    assert sum(parameter.numel() for parameter in model.parameters()) <= 4_000_000
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 10_000_000


def test_weights_are_two_bfloat16_shards():
    index = json.loads((TINY / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) == 2
    for file in files:
        with safe_open(TINY / file, "pt") as shard:
            assert {index["weight_map"][name] for name in shard.keys()} == {file}
            assert {shard.get_slice(name).get_dtype() for name in shard.keys()} == {"BF16"}


@pytest.mark.parametrize("language", ["en", "zh", "ja"])
@pytest.mark.parametrize("mode", ["InternVL-C", "InternVL-G"])
def test_names_held_out_images(tiny, pixels, mode, language):
    ranks = ranks_of_own_name(tiny, pixels, mode, language)
    assert (ranks == 0).float().mean() >= 0.8  # chance is 1 / 36


@torch.inference_mode()
def test_matching_prefers_the_right_name(tiny, pixels):
    model, processor = tiny
    names = [example["name"]["en"] for example in EXAMPLES]
    right = model.match(pixels, **processor(text=names, task="match")).softmax(-1)[:, 1]
    wrong = model.match(pixels, **processor(text=names[1:] + names[:1], task="match")).softmax(-1)[:, 1]
    assert (right > wrong).float().mean() >= 0.8


@torch.inference_mode()
def test_captions_are_names_in_the_language_asked_for(tiny, pixels):
    model, processor = tiny
    prompts = {"en": "English caption:", "zh": "中文描述:", "ja": "日本語の説明:"}
    for language, prompt in prompts.items():
        ids = model.generate(pixels, **processor(text=prompt, task="caption"), num_beams=3, max_new_tokens=16)
        captions = processor.batch_decode(ids, skip_special_tokens=True)
        latin = sum(caption.isascii() for caption in captions) / len(captions)
        assert latin >= 0.9 if language == "en" else latin <= 0.1
        named = sum(caption.strip() == example["name"][language] for caption, example in zip(captions, EXAMPLES))
        assert named >= 5, captions  # a name among 1,400 is not hit by chance


def test_the_card_shows_what_was_measured():
    pytest.importorskip("resvg_py")
    pytest.importorskip("tqdm")
    from tools.tiny import evaluate_tiny

    results = json.loads((TINY / "results.json").read_text("utf-8"))
    assert pages.taken(TINY / "README.md", "tiny") == evaluate_tiny.figures_table(results)


@pytest.mark.heavy
def test_training_runs_and_goes_on_where_it_stopped(tmp_path):
    """Both phases, on noise that is named."""
    pytest.importorskip("tqdm")
    from tools.tiny.emoji_data import ARTWORK, LANGUAGES

    words = ["red", "fruit", "round", "sweet", "tree"]
    concepts = [
        {"name": dict.fromkeys(LANGUAGES, f"thing {number}"), "keywords": dict.fromkeys(LANGUAGES, words[number % 5 :])}
        for number in range(24)
    ]
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    concept, source = (part.flatten() for part in np.indices((len(concepts), len(ARTWORK))))
    rgba = np.random.default_rng(0).integers(0, 256, (len(concept), 64, 64, 4), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", rgba=rgba, concept=concept, source=source, sources=list(ARTWORK))
    options = ["--data", tmp_path, "--out", tmp_path / "out", "--checkpoint", tmp_path / "state.pt"]
    options += ["--steps", 2, "--finish", 1, "--batch", 24, "--named", 8, "--asked", 4, "--joint", 4]
    for _ in range(2):  # the second run has nothing left to do
        done = run_module(tmp_path, "tools.tiny.train_tiny", *options)
        assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    assert (report["steps_done"], report["concepts"]) == (3, 24)
    assert {path.name for path in TINY.glob("*config.json")} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
