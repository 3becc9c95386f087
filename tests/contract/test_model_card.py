"""The snippet of the published model card, in a fresh interpreter, gives the outputs of the new calls."""

import pytest
import torch

pytestmark = pytest.mark.fresh("card")
COMPLAINTS = ("Traceback", "not initialized", "not used when", "MISSING", "UNEXPECTED", "does not end with `</s>`")


@pytest.mark.parametrize("mode", ["InternVL-C", "InternVL-G"])
@torch.no_grad()
def test_logits(fresh, half, mode):
    found = fresh["comparison"]
    image, text, probs = (torch.tensor(rows) for rows in found[mode])
    ids, pixels = torch.tensor(found["input_ids"]), torch.tensor(found["pixel_values"]).bfloat16()
    wanted = half(ids, pixels, mode=mode).logits_per_image
    assert torch.equal(image, wanted.float()) and torch.equal(text, image.T)
    assert torch.equal(probs, wanted.softmax(-1).float())
    assert ids.shape == (3, 80) and set(ids[:, 0].tolist()) == {1} and all(2 in row for row in ids.tolist())


@pytest.mark.feature("captions")
def test_caption(fresh, half, processor):
    prompt, found, caption = fresh["caption"]
    pixels = torch.tensor(fresh["comparison"]["pixel_values"])[:1].bfloat16()
    wanted = half.generate(pixels, torch.tensor(prompt), num_beams=5, min_new_tokens=8)
    assert wanted.tolist() == found and len(found[0]) >= 8 and 2 not in prompt[0]
    assert processor.decode(found[0], skip_special_tokens=True).strip() == caption


def test_no_loading_warning(fresh):
    fresh["comparison"]
    assert not [sign for sign in COMPLAINTS if sign in fresh.stderr], fresh.stderr
