"""The published model card's snippet, unchanged, and the other calls found in public code (see USES)."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer

from conftest import INDEX, ROOT, load, make_repository, repo_class, run_python
from published_card import MODEL_CARD

BEFORE = """
import sys
PATH = sys.argv[1]
kept = {}

def keep(mode, *tensors):
    kept.update(zip((f'{mode}_image', f'{mode}_text', f'{mode}_probs'), tensors))
"""
AFTER = """
import json
from safetensors.torch import save_file
kept |= {'input_ids': input_ids, 'prompt': tokenized.input_ids, 'pred': pred}
save_file({name: tensor.detach().contiguous() for name, tensor in kept.items()}, 'kept.safetensors')
print()  # ends the line of a question that nobody answered
print(json.dumps([caption, str(model.dtype), type(model).__name__, type(tokenizer).__name__]))
"""
TEXTS = ["a photo of a red panda", "一张熊猫的照片", "二匹の猫の写真"]


def random_image(number: int, size=(48, 48)) -> Image.Image:
    image = Image.new("RGB", size, [(250, 240, 230), (30, 60, 90), (200, 30, 30)][number])
    ImageDraw.Draw(image).ellipse(
        (8, 10 + 4 * number, 40, 44), fill=[(220, 90, 20), (250, 250, 40), (20, 20, 20)][number]
    )
    return image


@pytest.fixture(scope="module", params=["random", "trained"])
def checkpoint(request, tmp_path_factory) -> Path:
    """A folder like the published one, with code, tokenizer and weights side by side."""
    if request.param == "trained" and not (ROOT / "tiny" / INDEX).is_file():
        pytest.skip("tiny/ holds no trained weights")
    return make_repository(tmp_path_factory.mktemp("card") / "checkpoint", flat=True, weights=request.param)


def run_card(checkpoint: Path, folder: Path, snippet: str = MODEL_CARD):
    """Run the snippet as a script in `folder`; return the tensors that it kept, its last output line and its stderr."""
    for number in range(3):
        random_image(number).save(folder / f"image{number + 1}.png")
    done = run_python(BEFORE + snippet + AFTER, folder, checkpoint)
    return load_file(folder / "kept.safetensors"), json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def card(checkpoint, tmp_path_factory):
    return run_card(checkpoint, tmp_path_factory.mktemp("run"))


def test_card_shapes_and_probabilities(card):
    kept, (caption, dtype, name, _), _ = card
    assert (dtype, name) == ("torch.bfloat16", "InternVLModel") and isinstance(caption, str)
    for mode in "cg":
        image, text, probs = (kept[f"{mode}_{kind}"] for kind in ("image", "text", "probs"))
        assert image.shape == text.shape == (3, 3) and torch.equal(image, text.T)
        torch.testing.assert_close(probs.float().sum(dim=-1), torch.ones(3), rtol=0, atol=1e-2)
        torch.testing.assert_close(probs, image.softmax(-1))
    assert not torch.equal(kept["c_image"], kept["g_image"])
    assert kept["input_ids"].shape == (3, 80) and set(kept["input_ids"][:, 0].tolist()) == {1}
    for row in kept["input_ids"].tolist():
        assert row.count(2) == 1 and not any(row[row.index(2) + 1 :])  # ends in </s>, then padding with 0
    assert 2 not in kept["prompt"]
    assert kept["pred"].shape[0] == 1 and kept["pred"].shape[1] >= 8


def test_card_prints_no_important_warning(card):
    _, _, stderr = card
    for sign in (
        "Traceback",
        "Error",
        "not initialized",
        "not used when",
        "newly initialized",
        "MISSING",
        "UNEXPECTED",
    ):
        assert sign not in stderr, stderr
    assert "does not end with `</s>`" not in stderr, stderr


def new_logits(checkpoint: Path, dtype: torch.dtype, input_ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The logits of the snippet's images and texts by the new calls."""
    model = load(checkpoint, dtype=dtype)
    processor = load(checkpoint, AutoProcessor)
    batch = processor([random_image(number) for number in range(3)], TEXTS, padding="max_length")
    ids, mask = (batch["input_ids"], batch["attention_mask"]) if input_ids is None else (input_ids, None)
    with torch.no_grad():
        texts = model.embed_text(ids, mask)
        images = {mode: model.embed_image(batch["pixel_values"].to(dtype), f"InternVL-{mode}") for mode in "CG"}
        return {mode.lower(): model.logit_scale.exp() * embeds @ texts.T for mode, embeds in images.items()}


def test_card_equals_the_new_calls(checkpoint, card):
    kept, (*_, tokenizer_name), _ = card
    ours = load(checkpoint, AutoProcessor)(text=TEXTS, padding="max_length")["input_ids"]
    # Without trust_remote_code 5.x uses the library's own tokenizer, which may split some texts differently.
    if tokenizer_name == "InternVLTokenizer":
        assert torch.equal(kept["input_ids"], ours)
    for mode, logits in new_logits(checkpoint, torch.bfloat16, kept["input_ids"]).items():
        torch.testing.assert_close(kept[f"{mode}_image"], logits, rtol=0, atol=0)
        torch.testing.assert_close(kept[f"{mode}_probs"], logits.softmax(-1), rtol=0, atol=0)


def test_card_caption_equals_the_new_calls(checkpoint, card):
    kept, (caption, *_), _ = card
    model, processor = load(checkpoint, dtype=torch.bfloat16), load(checkpoint, AutoProcessor)
    batch = processor([random_image(0)], task="caption")
    pred = model.generate(batch["pixel_values"].bfloat16(), kept["prompt"], num_beams=5, min_new_tokens=8)
    assert torch.equal(pred, kept["pred"])
    if torch.equal(kept["prompt"], batch["input_ids"]):
        assert processor.decode(pred[0], skip_special_tokens=True).strip() == caption


def test_card_with_remote_tokenizer_and_float16(checkpoint, tmp_path):
    """As in MMVP's script and most others: half precision, and `trust_remote_code` for the tokenizer too."""
    snippet = MODEL_CARD.replace("bfloat16", "float16").replace(
        "add_eos_token=True)", "add_eos_token=True, trust_remote_code=True)"
    )
    assert snippet.count("float16") == 3 and snippet.count("trust_remote_code") == 2
    kept, (caption, dtype, _, tokenizer_name), _ = run_card(checkpoint, tmp_path, snippet)
    assert (dtype, tokenizer_name) == ("torch.float16", "InternVLTokenizer") and isinstance(caption, str)
    processor = load(checkpoint, AutoProcessor)
    assert torch.equal(kept["input_ids"], processor(text=TEXTS, padding="max_length")["input_ids"])
    assert torch.equal(kept["prompt"], processor(text="English caption:", task="caption")["input_ids"])
    for mode, logits in new_logits(checkpoint, torch.float16).items():
        assert kept[f"{mode}_image"].isfinite().all()
        torch.testing.assert_close(kept[f"{mode}_image"], logits, rtol=0, atol=0)
    for mode, logits in new_logits(checkpoint, torch.float32).items():
        torch.testing.assert_close(kept[f"{mode}_probs"].float(), logits.softmax(-1), rtol=0, atol=2e-2)


# ------------------------------------------------------------------------------------------------------- other users


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def batch(checkpoint):
    return load(checkpoint, AutoProcessor)([random_image(number) for number in range(3)], TEXTS, padding="max_length")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mmvp_two_images_one_text(checkpoint, batch, model, dtype):
    half = load(checkpoint, torch_dtype=dtype)
    pixels, ids = batch["pixel_values"][:2], batch["input_ids"][:1]
    for mode in ("InternVL-C", "InternVL-G"):
        logits_per_image, logits_per_text = half(image=pixels.to(dtype), text=ids, mode=mode)
        assert logits_per_image.shape == (2, 1) and logits_per_text.shape == (1, 2) and logits_per_image.dtype == dtype
        exact = model(pixel_values=pixels, input_ids=ids, mode=mode).logits_per_image
        torch.testing.assert_close(logits_per_image.float(), exact, rtol=0.05, atol=0.5)


def test_video_retrieval_averages_frames_before_normalising(model, batch):
    for mode in ("InternVL-C", "InternVL-G"):
        frames = model.encode_image(batch["pixel_values"], mode=mode)
        assert frames.shape == (3, 128) and not torch.allclose(frames.norm(dim=-1), torch.ones(3), atol=1e-3)
        torch.testing.assert_close(F.normalize(frames, dim=-1), model.embed_image(batch["pixel_values"], mode))
        text = F.normalize(model.encode_text(batch["input_ids"]), dim=-1)
        scores = model.logit_scale.exp() * text @ F.normalize(frames.mean(dim=0, keepdim=True), dim=-1).T
        assert scores.shape == (3, 1) and scores.isfinite().all()
        longer = F.pad(batch["input_ids"], (0, 3))
        torch.testing.assert_close(model.encode_text(longer), model.encode_text(batch["input_ids"]))


def test_niah_keywords(model, batch):
    image = model.encode_image(image=batch["pixel_values"], mode="InternVL-G")
    text = model.encode_text(text=batch["input_ids"])
    assert torch.equal(image, model.embed_image(batch["pixel_values"], "InternVL-G", normalize=False))
    assert torch.equal(text, model.embed_text(batch["input_ids"], normalize=False))
    similarity = F.normalize(text, dim=-1) @ F.normalize(text, dim=-1).T
    torch.testing.assert_close(similarity.diagonal(), torch.ones(3))


def test_retrieval_wrappers_positional(model, batch):
    pixels, ids = batch["pixel_values"], batch["input_ids"]
    images, texts = model.encode_image(pixels, "InternVL-G"), model.encode_text(ids)
    by_hand = model.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    torch.testing.assert_close(by_hand, model(image=pixels, text=ids, mode="InternVL-G")[0])
    assert model.logit_scale.exp().shape == () and model.logit_scale.exp() > 0


@pytest.mark.parametrize("letter", ["C", "G"])
def test_clip_benchmark_classes(checkpoint, model, batch, letter):
    """It never passes a mode: `encode_image(image)` and `forward(image=, text=)` use the default of the class."""
    benchmark_class = repo_class(f"modeling_internvl.InternVL_{letter}")
    config = repo_class("configuration_internvl.InternVLConfig").from_pretrained(checkpoint)
    assert (config.force_image_size, config.use_backbone_lora, config.use_qllama_lora) == (None, 0, 0)
    ours = benchmark_class.from_pretrained(checkpoint, config=config, torch_dtype=torch.float32).eval()
    pixels, ids, mode = batch["pixel_values"], batch["input_ids"], f"InternVL-{letter}"
    assert torch.equal(ours.encode_image(pixels), model.encode_image(pixels, mode))
    assert torch.equal(ours.encode_image(pixels, "InternVL-C"), model.encode_image(pixels, "InternVL-C"))
    assert torch.equal(ours.embed_image(pixels), model.embed_image(pixels, mode))
    for mine, wanted in zip(ours(image=pixels, text=ids), model(image=pixels, text=ids, mode=mode)):
        assert torch.equal(mine, wanted)
    assert torch.equal(ours(ids, pixels).logits_per_image, model(ids, pixels, mode=mode).logits_per_image)
    tokenizer = load(checkpoint, AutoTokenizer, use_fast=False, add_eos_token=True, pad_token=" ")
    assert tokenizer.pad_token_id == 0
    options = {"return_tensors": "pt", "max_length": 80, "truncation": True, "padding": "max_length"}
    assert torch.equal(tokenizer([f"summarize:{text}" for text in TEXTS], **options).input_ids, ids)


def test_towers_of_other_projects(model, batch):
    pixels = batch["pixel_values"]
    # RADIO
    assert model.vision_model.embeddings.patch_size == model.config.vision_config.patch_size == 8
    teacher = model.vision_model(pixels)
    assert teacher.last_hidden_state.shape == (3, 1 + (48 // 8) ** 2, 128)
    # RAG indexes
    index = model.vision_model(pixel_values=pixels).last_hidden_state[:, 0]
    assert torch.equal(index, teacher.pooler_output) and index.shape == (3, 128)
    # LLaVA
    states = model.vision_model(pixels, output_hidden_states=True).hidden_states
    assert len(states) == 6 and torch.equal(states[-1], teacher.last_hidden_state)
    vision, queries = model.get_image_features(pixels)
    assert torch.equal(vision, teacher.last_hidden_state) and queries.shape == (3, 8, 128)
    assert model.config.hidden_size == 128 and model.config.vision_config.image_size == 48


def test_text_encoder_of_diffusion_models(model, batch):
    """MuLan, SD.Next: token states of the language tower, padding masked."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    states = model.get_text_features(ids, mask)
    assert states.shape == (3, 80, 128)
    tower = model.qllama.model(input_ids=ids, attention_mask=mask).last_hidden_state
    real = mask.bool()
    torch.testing.assert_close(states[real], tower[real], rtol=1e-4, atol=2e-5)
    last = states[torch.arange(3), mask.sum(dim=1) - 1]
    torch.testing.assert_close(last @ model.text_projection, model.encode_text(ids))


def test_rerankers(model, batch):
    pixels, ids = batch["pixel_values"], batch["input_ids"]
    scores = model.match(pixels, ids, all_pairs=True)
    assert scores.shape == (3, 3, 2)
    torch.testing.assert_close(scores[range(3), range(3)], model.match(pixels, ids), rtol=1e-4, atol=2e-5)


def test_calls_cause_no_warning(model, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(image=batch["pixel_values"], text=batch["input_ids"], mode="InternVL-G")
        model.generate(pixel_values=batch["pixel_values"], num_beams=2, max_new_tokens=2)
