"""Every number equals the original implementation's: towers, embeddings, logits, captions, losses, gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from conftest import LOSSES, OBJECTIVES, TOLERANCE, golden, golden_model, training_batch

INPUTS, EXPECTED = golden("tiny/inputs"), golden("tiny/expected")
PIXELS, IDS, PROMPTS = INPUTS["pixel_values"], INPUTS["input_ids"], INPUTS["prompt_ids"]
FORWARD = {
    "vision.last_hidden_state": lambda model: model.vision_model(PIXELS).last_hidden_state,
    "vision.pooler_output": lambda model: model.vision_model(PIXELS).pooler_output,
    "vision.hidden_states": lambda model: torch.stack(
        model.vision_model(PIXELS, output_hidden_states=True).hidden_states
    ),
    "vision_rect.last_hidden_state": lambda model: model.vision_model(INPUTS["pixel_values_rect"]).last_hidden_state,
    "encode_image_c": lambda model: model.encode_image(PIXELS, "InternVL-C"),
    "encode_image_g": lambda model: model.encode_image(PIXELS, "InternVL-G"),
    "encode_text": lambda model: model.encode_text(IDS),
    "logits_per_image_c": lambda model: model(IDS, PIXELS, mode="InternVL-C").logits_per_image,
    "logits_per_text_c": lambda model: model(image=PIXELS, text=IDS, mode="InternVL-C")[1],
    "logits_per_image_g": lambda model: model(IDS, PIXELS, mode="InternVL-G").logits_per_image,
    "logits_per_text_g": lambda model: model(image=PIXELS, text=IDS, mode="InternVL-G")[1],
    "image_features.query": lambda model: model.get_image_features(PIXELS)[1],
}


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request):
    return golden_model(attn_implementation=request.param)


@pytest.mark.parametrize("name", FORWARD)
@torch.no_grad()
def test_forward(model, name):
    assert_close(FORWARD[name](model), EXPECTED[name], **TOLERANCE)


@torch.no_grad()
def test_states_of_the_language_tower(model):
    real = IDS > 0  # states at padding are arbitrary
    assert_close(model.get_text_features(IDS)[real], EXPECTED["text_features"][real], **TOLERANCE)


@torch.no_grad()
def test_match(model):
    """The goldens hold no logits of `match`, but they hold the loss computed from them."""
    batch = training_batch("retrieval")
    ids, mask = (torch.cat([F.pad(batch[f"{kind}_{name}"], (0, 40))[:, :40] for kind in ("negative", "positive")])
                 for name in ("input_ids", "attention_mask"))  # fmt: skip
    logits = model.match(torch.cat([batch["pixel_values"]] * 2), ids, mask)
    targets = torch.arange(len(ids)).ge(len(ids) // 2).long()
    valid = mask.sum(1) != 2  # `<s> </s>` is an empty text
    assert_close(F.cross_entropy(logits[valid], targets[valid]), EXPECTED["retrieval.loss_itm"], **TOLERANCE)
    every = model.match(batch["pixel_values"], ids, mask, all_pairs=True)
    rows = torch.arange(len(ids))
    assert_close(every[rows % len(every), rows], logits, **TOLERANCE)


@pytest.mark.feature("captions")
@pytest.mark.parametrize("name, beams", [("generate_greedy", 1), ("generate_beam5", 5)])
def test_captions(model, name, beams):
    wanted = EXPECTED[name][:, 1:].tolist()  # the original put <s> first
    options = {"max_new_tokens": 12, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
    # Also three images: with four, the first of five beams gets its own image even if the beam layout is wrong.
    for rows in (slice(0, 4), slice(0, 3), slice(2, 3)):
        assert model.generate(PIXELS[rows], PROMPTS[rows], **options).tolist() == wanted[rows]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_gradients(objective):
    trainee = golden_model(OBJECTIVES[objective]).train()
    output = trainee(**training_batch(objective))
    output.loss.backward()
    for name in LOSSES[objective]:
        assert_close(output[name], EXPECTED[f"{objective}.{name}"], **TOLERANCE)
    start = f"{objective}.grad."
    names = [name.removeprefix(start) for name in EXPECTED if name.startswith(start)]
    assert len(names) == 9
    for name in names:
        gradient = trainee.get_parameter(name).grad
        assert_close(gradient, EXPECTED[start + name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
