"""In a fresh interpreter handler.py gives the answers of the model for every task."""

import pytest
import torch

from conftest import IMAGES, NAMES

pytestmark = pytest.mark.fresh("endpoint")
CLOSE = {"rtol": 2e-2, "atol": 2e-2}  # bfloat16, in batches of another size


@pytest.fixture(scope="module")
def pixels(processor):
    return processor(images=IMAGES).pixel_values.bfloat16()


@torch.inference_mode()
def test_zero_shot(fresh, half, processor, pixels):
    texts = processor(text=[f"a photo of a {name}" for name in NAMES])
    wanted = half(**texts, pixel_values=pixels).logits_per_image.float().softmax(-1)
    for name, row, probabilities in zip(NAMES, fresh["zero_shot"], wanted, strict=True):
        by_label = {entry["label"]: entry["score"] for entry in row}
        assert row[0]["label"] == name
        torch.testing.assert_close(torch.tensor([by_label[label] for label in NAMES]), probabilities, **CLOSE)


@torch.inference_mode()
def test_embed(fresh, half, processor, pixels):
    found = fresh["embed"]
    wanted = {
        "image_embeds": half.embed_image(pixels, "InternVL-G"),
        "text_embeds": half.embed_text(**processor(text=NAMES)),
    }
    for name, embeds in wanted.items():
        torch.testing.assert_close(torch.tensor(found[name]), embeds.float(), **CLOSE)


@torch.inference_mode()
def test_match(fresh, half, processor, pixels):
    logits = half.match(pixels, **processor(text=NAMES, task="match"), all_pairs=True)
    torch.testing.assert_close(torch.tensor(fresh["match"]), logits.float().softmax(-1)[..., 1], **CLOSE)


@pytest.mark.feature("captions")
def test_caption(fresh, half, processor, pixels):
    prompt = processor(text="中文描述:", task="caption")
    ids = half.generate(pixels, **prompt, num_beams=3, max_new_tokens=6)
    captions = [caption.strip() for caption in processor.batch_decode(ids, skip_special_tokens=True)]
    assert fresh["caption"] == [{"generated_text": caption} for caption in captions]


def test_refusal(fresh):
    status, message = fresh["refusal"]
    assert status == 422 and "captoin" in message
