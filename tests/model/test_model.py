"""Properties of the joint model: batches, padding, modes, gradients, resolutions, generation, precision."""

import inspect
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from transformers import AutoConfig
from transformers.generation.streamers import BaseStreamer

from conftest import (
    GOLDEN,
    OBJECTIVES,
    ROOT,
    TOLERANCE,
    first_end,
    golden,
    golden_config,
    golden_model,
    repo_class,
    switch_checkpointing,
    training_batch,
)

INPUTS = golden("tiny/inputs")
PIXELS, IDS, PROMPTS = INPUTS["pixel_values"], INPUTS["input_ids"], INPUTS["prompt_ids"]
MASK = (IDS > 0).long()
MODES = ("InternVL-C", "InternVL-G")
EXACT = {"rtol": 0, "atol": 0}
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    """Shared by tests that do not change it."""
    return golden_model()


@pytest.fixture
def own_model():
    return golden_model()


def changed_config(vision=None, qllama=None, **fields):
    config = golden_config().to_dict() | fields
    config["vision_config"] |= vision or {}
    config["qllama_config"] |= qllama or {}
    return repo_class("configuration_internvl.InternVLConfig")(**config)


def left_padded(ids, mask, extra=0):
    """The same texts with more padding, all on the left, and their mask."""
    length = ids.shape[1] + extra
    moved = torch.zeros(len(ids), length, dtype=ids.dtype)
    moved_mask = torch.zeros(len(ids), length, dtype=mask.dtype)
    for row, count in enumerate(mask.sum(1).tolist()):
        moved[row, length - count :] = ids[row][mask[row] > 0]
        moved_mask[row, length - count :] = 1
    return moved, moved_mask


# ------------------------------------------------------------------------------------------------ batches and padding

TEXT_CALLS = {
    "embed_text": lambda m, ids, mask: m.embed_text(ids, mask),
    "encode_text": lambda m, ids, mask: m.encode_text(ids, mask),
    "match": lambda m, ids, mask: m.match(PIXELS[: len(ids)], ids, mask),
    "forward": lambda m, ids, mask: m(ids, PIXELS, mask).logits_per_text,
    "generate": lambda m, ids, mask: m.generate(PIXELS[: len(ids)], ids, mask, **GREEDY),
}


@pytest.mark.parametrize("call", TEXT_CALLS)
@torch.no_grad()
def test_padding_side_and_length_do_not_matter(model, call):
    run = TEXT_CALLS[call]
    expected = run(model, IDS, MASK)
    assert_close(run(model, IDS, None), expected, **EXACT)  # without a mask, every id but 0 is real
    for extra in (0, 5):
        for ids, mask in (left_padded(IDS, MASK, extra), (F.pad(IDS, (0, extra)), F.pad(MASK, (0, extra)))):
            assert_close(run(model, ids, mask), expected, **TOLERANCE)
            assert_close(run(model, ids, None), expected, **TOLERANCE)
            assert_close(run(model, ids.where(mask > 0, 17), mask.bool()), expected, **TOLERANCE)


@pytest.mark.parametrize("call", TEXT_CALLS)
@torch.no_grad()
def test_padding_in_the_middle_is_skipped(model, call):
    ids, mask = torch.full((4, 24), 99), torch.zeros(4, 24, dtype=torch.long)
    scattered = sorted(set(range(24)) - {0, 7, 8, 15})
    ids[:, scattered], mask[:, scattered] = IDS, MASK
    assert_close(TEXT_CALLS[call](model, ids, mask), TEXT_CALLS[call](model, IDS, MASK), **TOLERANCE)


@torch.no_grad()
def test_text_features_keep_the_positions_of_their_tokens(model):
    expected = model.get_text_features(IDS, MASK)
    ids, mask = left_padded(IDS, MASK, 3)
    actual = model.get_text_features(ids, mask)
    assert actual.shape == (4, 23, 64)
    assert_close(actual[mask > 0], expected[MASK > 0], **TOLERANCE)
    for row in range(4):
        real = MASK[row].sum()
        alone = model.get_text_features(IDS[row : row + 1, :real])
        assert_close(alone[0], expected[row, :real], **TOLERANCE)


@pytest.mark.parametrize("call", ["embed_text", "match", "generate"])
@torch.no_grad()
def test_id_zero_inside_a_text(model, call):
    """0 is also `<unk>`: with a mask it is an ordinary token at any position."""
    ids = IDS[:, :10].clone()
    ids[:, -1] = 2
    ids[:, 4] = 0
    mask = torch.ones_like(ids)
    run = TEXT_CALLS[call]
    actual = run(model, ids, mask)
    for row in range(4):
        one = slice(row, row + 1)
        pixels = PIXELS[one]
        alone = {
            "embed_text": lambda i=ids[one], m=mask[one]: model.embed_text(i, m),
            "match": lambda p=pixels, i=ids[one], m=mask[one]: model.match(p, i, m),
            "generate": lambda p=pixels, i=ids[one], m=mask[one]: model.generate(p, i, m, **GREEDY),
        }[call]()
        assert_close(alone, actual[one], **TOLERANCE)
    if call == "embed_text":  # by definition the state at the last position
        states = model.qllama.model(input_ids=ids, use_cache=False).last_hidden_state
        assert_close(actual, F.normalize(states[:, -1] @ model.text_projection, dim=-1), **TOLERANCE)
        assert (actual - run(model, ids, None)).abs().max() > 0.01, "without a mask, 0 is padding"


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_batch_of_one_equals_its_row(model, mode):
    embeds, matches = model.embed_image(PIXELS, mode), model.match(PIXELS, IDS)
    for row in range(4):
        one = slice(row, row + 1)
        assert_close(model.embed_image(PIXELS[one], mode), embeds[one], **TOLERANCE)
        assert_close(model.embed_text(IDS[one]), model.embed_text(IDS)[one], **TOLERANCE)
        assert_close(model.match(PIXELS[one], IDS[one]), matches[one], **TOLERANCE)


# ---------------------------------------------------------------------------------------------------- calls and modes


@torch.no_grad()
def test_match_pairs_are_the_diagonal_of_all_pairs(model):
    pairs = model.match(PIXELS[:3], IDS[:3])
    assert pairs.shape == (3, 2)
    every = model.match(PIXELS[:3], IDS, all_pairs=True)
    assert every.shape == (3, 4, 2)
    assert_close(every[range(3), range(3)], pairs, **TOLERANCE)
    for image in range(3):
        same = PIXELS[image].expand(4, -1, -1, -1)
        assert_close(every[image], model.match(same, IDS), **TOLERANCE)
    ids, mask = left_padded(IDS, MASK, 2)
    assert_close(model.match(PIXELS[:3], ids, mask, all_pairs=True), every, **TOLERANCE)


@torch.no_grad()
def test_embeddings_have_unit_length(model):
    for mode in MODES:
        raw = model.encode_image(PIXELS, mode)
        assert (raw.norm(dim=-1) - 1).abs().min() > 1e-3
        assert_close(model.embed_image(PIXELS, mode), raw / raw.norm(dim=-1, keepdim=True), **TOLERANCE)
        assert_close(model.embed_image(PIXELS, mode, normalize=False), raw, **EXACT)
    assert_close(model.embed_image(PIXELS), model.embed_image(PIXELS, "InternVL-C"), **EXACT)
    raw = model.encode_text(IDS)
    assert (raw.norm(dim=-1) - 1).abs().min() > 1e-3
    assert_close(model.embed_text(IDS), raw / raw.norm(dim=-1, keepdim=True), **TOLERANCE)
    assert_close(model.embed_text(IDS, normalize=False), raw, **EXACT)


@torch.no_grad()
def test_default_modes_of_the_classes(expected):
    for name, letter in (("InternVLModel", "c"), ("InternVL_C", "c"), ("InternVL_G", "g")):
        model = golden_model(name)
        assert_close(model.encode_image(PIXELS), expected[f"encode_image_{letter}"], **TOLERANCE)
        for other in "cg":
            mode = f"InternVL-{other.upper()}"
            assert_close(model.encode_image(PIXELS, mode), expected[f"encode_image_{other}"], **TOLERANCE)
            logits = model(image=PIXELS, text=IDS, mode=mode)[0]
            assert_close(logits, expected[f"logits_per_image_{other}"], **TOLERANCE)


@torch.no_grad()
def test_every_call_of_internvl_g_has_its_own_default(expected):
    model = golden_model("InternVL_G")
    assert_close(model(IDS, PIXELS).logits_per_image, expected["logits_per_image_g"], **TOLERANCE)
    assert_close(model(image=PIXELS, text=IDS)[0], expected["logits_per_image_g"], **TOLERANCE)
    assert_close(model.embed_image(PIXELS), F.normalize(expected["encode_image_g"], dim=-1), **TOLERANCE)
    assert_close(model.encode_image(PIXELS), expected["encode_image_g"], **TOLERANCE)
    assert_close(model.encode_image(PIXELS, "InternVL-C"), expected["encode_image_c"], **TOLERANCE)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_forward(model, expected, mode):
    letter = mode[-1].lower()
    output = model(IDS, PIXELS[:3], MASK, mode)
    assert list(output) == ["logits_per_image", "logits_per_text", "image_embeds", "text_embeds"]
    assert_close(output.logits_per_image, expected[f"logits_per_image_{letter}"][:3], **TOLERANCE)
    assert_close(output.logits_per_text, output.logits_per_image.T, **EXACT)
    assert_close(output.image_embeds, model.embed_image(PIXELS[:3], mode), **TOLERANCE)
    assert_close(output.text_embeds, model.embed_text(IDS), **TOLERANCE)


@torch.no_grad()
def test_forward_with_one_input(model):
    image = model(pixel_values=PIXELS)
    assert list(image) == ["last_hidden_state", "image_embeds", "pooler_output"]
    assert_close(image.image_embeds, model.embed_image(PIXELS), **EXACT)
    assert_close(image.pooler_output, image.image_embeds, **EXACT)
    assert_close(image.last_hidden_state, model.vision_model(PIXELS).last_hidden_state, **EXACT)
    text = model(input_ids=IDS, attention_mask=MASK)
    assert list(text) == ["text_embeds"]
    assert_close(text.text_embeds, model.embed_text(IDS), **EXACT)


@torch.no_grad()
def test_tuples(model):
    output = model(IDS, PIXELS)
    fields = (output.logits_per_image, output.logits_per_text, output.image_embeds, output.text_embeds)
    for actual, expected in (
        (model(IDS, PIXELS, return_dict=False), fields),
        (model(pixel_values=PIXELS, return_dict=False), model(pixel_values=PIXELS).to_tuple()),
        (model(input_ids=IDS, return_dict=False), (output.text_embeds,)),
        (model(image=PIXELS, text=IDS, mode="InternVL-C"), (output.logits_per_image, output.logits_per_text)),
        (model.vision_model(PIXELS, return_dict=False), model.vision_model(PIXELS).to_tuple()),
        (model.qllama(IDS, use_cache=False, return_dict=False), (model.qllama(IDS).logits,)),
        (model.qllama.model(IDS, use_cache=False, return_dict=False), (model.qllama.model(IDS).last_hidden_state,)),
    ):
        assert type(actual) is tuple and len(actual) == len(expected)
        for tensor, wanted in zip(actual, expected, strict=True):
            assert_close(tensor, wanted, **EXACT)


@torch.no_grad()
def test_language_tower_outputs(model):
    output = model.qllama(IDS, output_hidden_states=True)
    assert len(output.hidden_states) == 1 + 4
    assert_close(output.hidden_states[0], model.get_input_embeddings()(IDS), **EXACT)
    assert_close(model.qllama.lm_head(model.qllama.model.norm(output.hidden_states[-1])), output.logits, **TOLERANCE)
    assert output.past_key_values.get_seq_length() == IDS.shape[1]
    assert model.qllama(IDS, use_cache=False).past_key_values is None
    assert_close(model.qllama(IDS, logits_to_keep=2).logits, output.logits[:, -2:], **TOLERANCE)
    assert model.qllama(IDS).hidden_states is None


@pytest.fixture
def warnings_logged():
    """The warnings of the modeling code; `warning_once` is reset for each test."""
    from transformers.utils import logging as transformers_logging

    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: found.append(entry.getMessage())
    logging.getLogger().addHandler(handler)
    logging.getLogger("transformers").addHandler(handler)
    transformers_logging.warning_once.cache_clear()
    yield found
    logging.getLogger().removeHandler(handler)
    logging.getLogger("transformers").removeHandler(handler)


@torch.no_grad()
def test_a_text_without_eos_causes_one_warning(model, warnings_logged):
    ids, mask = left_padded(IDS, MASK)
    for _ in range(2):
        model.embed_text(IDS)
        model.embed_text(ids, mask)
        model(IDS, PIXELS)
    assert warnings_logged == []
    without_end = IDS.clone()
    without_end[1][without_end[1] == 2] = 55  # one row is enough
    for _ in range(2):
        model.embed_text(without_end)
        model.encode_text(IDS[:, :-1], MASK[:, :-1])
        model(without_end, PIXELS)
    assert len(warnings_logged) == 1
    assert "does not end with `</s>`" in warnings_logged[0] and "add_eos_token" in warnings_logged[0]


# ---------------------------------------------------------------------------------------------------------- gradients


def without_gradient(model):
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_parameter_that_an_objective_uses_gets_a_gradient(objective):
    model = golden_model(OBJECTIVES[objective]).train()
    model(**training_batch(objective)).loss.backward()
    unused = {
        # The contrast of stage 2 uses only the queries.
        "stage2": {name for name, _ in model.named_parameters() if name.startswith("clip_projector.")},
        # Retrieval generates nothing.
        "retrieval": {"qllama.lm_head.weight"},
    }[objective]
    assert len(unused) == {"stage2": 14, "retrieval": 1}[objective]
    assert without_gradient(model) == unused
    flat = {n for n, p in model.named_parameters() if n not in unused and not p.grad.abs().max() > 0}
    # A key's bias adds a constant to all scores of a query, which softmax ignores. Rounding may leave a trace.
    assert {name for name in flat if not name.endswith("cross_attn.k_bias")} == set()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def count_layer_runs(model):
    runs = {"vision": 0, "qllama": 0}

    def count(kind):
        runs[kind] += 1

    for kind, layers in (("vision", model.vision_model.encoder.layers), ("qllama", model.qllama.model.layers)):
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_, k=kind: count(k))
    return runs


CHECKPOINTING = {
    "default": (),
    "on": (True,),  # reentrant on 4.57, not on 5.23
    "on, reentrant": (True, {"use_reentrant": True}),
    "on, not reentrant": (True, {"use_reentrant": False}),
    "off": (False,),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_checkpointing_changes_no_gradient(objective):
    gradients, runs = {}, {}
    for setting, arguments in CHECKPOINTING.items():
        model = golden_model(OBJECTIVES[objective]).train()
        if arguments:
            switch_checkpointing(model, *arguments)
        runs[setting] = count_layer_runs(model)
        model(**training_batch(objective)).loss.backward()
        gradients[setting] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    passes = 3 * 4  # matching, contrast and captioning or queries, summaries
    assert runs["default"] == {"vision": 2 * 3, "qllama": passes}, (
        "it is on only in the vision tower, as in the original"
    )
    for setting in ("on", "on, reentrant", "on, not reentrant"):
        assert runs[setting] == {"vision": 2 * 3, "qllama": 2 * passes}
    assert runs["off"] == {"vision": 3, "qllama": passes}
    for name, gradient in gradients["off"].items():
        for setting in CHECKPOINTING:
            assert_close(gradients[setting][name], gradient, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    assert all(set(found) == set(gradients["off"]) for found in gradients.values())


def test_checkpointing_recomputes_only_in_training(own_model):
    runs = count_layer_runs(own_model)
    own_model.encode_image(PIXELS).sum().backward()
    assert runs["vision"] == 3, "eval mode recomputes nothing"
    with torch.no_grad():
        own_model.train().encode_image(PIXELS)
    assert runs["vision"] == 6


def test_no_cache_in_training(own_model):
    assert own_model.train().qllama(IDS).past_key_values is None
    assert own_model.eval().qllama(IDS).past_key_values is not None


# -------------------------------------------------------------------------------------------------- stochastic depth


def vision_with_drop_path(rate, layers=5):
    config = golden_config().vision_config.to_dict() | {"drop_path_rate": rate, "num_hidden_layers": layers}
    config.pop("model_type")
    torch.manual_seed(0)
    model = repo_class("modeling_intern_vit.InternVisionModel")(
        repo_class("configuration_intern_vit.InternVisionConfig")(**config)
    )
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.ls1.fill_(1.0)
            layer.ls2.fill_(1.0)
    return model


def test_drop_path_rates_rise_linearly():
    assert [layer.drop_path.rate for layer in vision_with_drop_path(0.4).encoder.layers] == pytest.approx(
        [0.0, 0.1, 0.2, 0.3, 0.4]
    )
    assert [layer.drop_path.rate for layer in vision_with_drop_path(0.4, 1).encoder.layers] == [0.0]
    assert {layer.drop_path.rate for layer in vision_with_drop_path(0.0).encoder.layers} == {0.0}


@torch.no_grad()
def test_drop_path_is_off_in_eval():
    model, plain = vision_with_drop_path(0.9).eval(), vision_with_drop_path(0.0).eval()
    assert_close(model(PIXELS).last_hidden_state, plain(PIXELS).last_hidden_state, **EXACT)
    difference = model.train()(PIXELS).last_hidden_state - plain(PIXELS).last_hidden_state
    assert difference.abs().max() > 0.01


@torch.no_grad()
def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    layer = vision_with_drop_path(0.4).encoder.layers[-1].train()
    torch.manual_seed(0)
    branch = torch.rand(4000, 3, 5) + 0.5
    dropped = layer.drop_path(branch)
    kept = (dropped != 0).flatten(1).float().mean(dim=1)
    assert set(kept.tolist()) == {0.0, 1.0}, "a sample is dropped whole or not at all"
    assert_close(dropped[kept == 1], branch[kept == 1] / 0.6, **TOLERANCE)
    assert kept.mean().item() == pytest.approx(0.6, abs=0.04)  # five standard deviations
    assert dropped.mean().item() == pytest.approx(branch.mean().item(), rel=0.07)


@torch.no_grad()
def test_a_layer_whose_branches_are_dropped_is_the_identity():
    """Stochastic depth drops the two residual branches independently."""
    layer = vision_with_drop_path(0.5).encoder.layers[-1].train()
    states = torch.randn(1, 4, 100).expand(64, -1, -1)
    torch.manual_seed(0)
    outcomes = layer(states).flatten(1)
    distinct = torch.unique(torch.round(outcomes, decimals=3), dim=0)
    assert len(distinct) == 4, "neither, the first, the second, both"
    assert (outcomes == states.flatten(1)).all(dim=1).any()


# -------------------------------------------------------------------------------------------------------- resolutions


@pytest.mark.parametrize("size", [(14, 14), (14, 70), (70, 28), (56, 56), (42, 56), (98, 98), (28, 112)], ids=str)
@torch.no_grad()
def test_any_multiple_of_the_patch_size(model, size):
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    tokens = 1 + (size[0] // 14) * (size[1] // 14)
    states = model.vision_model(pixels).last_hidden_state
    assert states.shape == (2, tokens, 100) and states.isfinite().all()
    for mode in MODES:
        assert model.embed_image(pixels, mode).shape == (2, 32)
    assert model.match(pixels, IDS[:2]).shape == (2, 2)
    assert model.generate(pixels, PROMPTS[:2], **GREEDY).shape == (2, 8)


@pytest.mark.parametrize("size", [(42, 70), (28, 112)], ids=str)
@torch.no_grad()
def test_positions_follow_height_and_width(model, size):
    """The table is interpolated as a grid, rows first; the class position does not change."""
    embeddings = model.vision_model.embeddings
    height, width = size[0] // 14, size[1] // 14
    pixels = torch.zeros(1, 3, *size)
    tokens = embeddings(pixels)[:, 1:] - embeddings.patch_embedding.bias
    grid = embeddings.position_embedding[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
    assert_close(tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2), expected, **TOLERANCE)
    assert_close(
        embeddings(pixels)[:, 0], embeddings.class_embedding[:, 0] + embeddings.position_embedding[:, 0], **TOLERANCE
    )


@torch.no_grad()
def test_resized_positions_are_used_saved_and_loaded(own_model, tmp_path):
    large = INPUTS["pixel_values_large"]  # 84 x 84
    unresized = own_model.vision_model(large).last_hidden_state
    own_model.vision_model.resize_pos_embeddings(56, 98, 14)
    table = own_model.vision_model.embeddings.position_embedding
    assert table.shape == (1, 1 + 7 * 7, 100) and table.requires_grad

    # The new table's own size, and sizes that are interpolated from it.
    pixels = torch.randn(2, 3, 98, 98, generator=torch.Generator().manual_seed(0))
    patches = own_model.vision_model.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    assert_close(own_model.vision_model.embeddings(pixels)[:, 1:], patches + table[:, 1:], **TOLERANCE)
    resized = own_model.vision_model(large).last_hidden_state
    assert resized.shape == unresized.shape and 1e-4 < (resized - unresized).abs().max() < 1
    rect = own_model.vision_model(INPUTS["pixel_values_rect"]).last_hidden_state
    assert rect.shape == (2, 16, 100)

    own_model.save_pretrained(tmp_path)
    again = repo_class("modeling_internvl.InternVLModel").from_pretrained(tmp_path).eval()
    assert again.config.vision_config.image_size == 56 and again.config.vision_config.position_grid == 7
    assert_close(again.vision_model(large).last_hidden_state, resized, **EXACT)
    assert_close(again.vision_model(INPUTS["pixel_values_rect"]).last_hidden_state, rect, **EXACT)
    again.vision_model.resize_pos_embeddings(98, 56, 14)
    assert again.vision_model.embeddings.position_embedding.shape == (1, 17, 100)


@torch.no_grad()
def test_force_image_size_builds_the_larger_table():
    config = changed_config(force_image_size=84)
    model = repo_class("modeling_internvl.InternVLModel")(config).eval()
    assert model.vision_model.embeddings.position_embedding.shape == (1, 1 + 6 * 6, 100)
    assert config.vision_config.image_size == 56
    assert model.embed_image(INPUTS["pixel_values_large"]).shape == (2, 32)


# --------------------------------------------------------------------------------------------------------- generation

UNEQUAL = [[1, 46, 22], [1, 46, 22, 269, 311], [1, 180, 33, 7, 5, 91, 12], [1]]
DECODING = {
    "greedy": GREEDY,
    "beams": GREEDY | {"num_beams": 3},
    "static cache": GREEDY | {"cache_implementation": "static"},
}


def batch_of(prompts, side):
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(p)) + p if side == "left" else p + [0] * (longest - len(p)) for p in prompts]
    return torch.tensor(rows)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("decoding", DECODING)
def test_prompts_of_unequal_length(model, decoding, side):
    arguments = DECODING[decoding]
    ids = batch_of(UNEQUAL, side)
    together = model.generate(PIXELS, ids, (ids > 0).long(), **arguments)
    assert together.shape == (4, 8)
    for row, prompt in enumerate(UNEQUAL):
        alone = model.generate(PIXELS[row : row + 1], torch.tensor([prompt]), **arguments)
        assert together[row].tolist() == alone[0].tolist()


@pytest.mark.parametrize("decoding", DECODING)
def test_padding_may_have_an_embedding_of_zeros(own_model, decoding):
    """As in a trained checkpoint. The first prompt is short: some static caches count their filled positions."""
    with torch.no_grad():
        own_model.get_input_embeddings().weight[0] = 0
    prompts = sorted(UNEQUAL, key=len)
    ids, arguments = batch_of(prompts, "left"), DECODING[decoding]
    together = own_model.generate(PIXELS, ids, (ids > 0).long(), **arguments)
    for row, prompt in enumerate(prompts):
        alone = own_model.generate(PIXELS[row : row + 1], torch.tensor([prompt]), **arguments)
        assert together[row].tolist() == alone[0].tolist()


def test_a_static_cache_has_room_for_the_prompt_too(model):
    """The queries and 54 tokens fill one step of 64 positions; the prompt needs the next."""
    options = {"max_new_tokens": 54, "min_new_tokens": 54}
    wanted = model.generate(PIXELS[:1], PROMPTS[:1], **options)
    assert torch.equal(model.generate(PIXELS[:1], PROMPTS[:1], cache_implementation="static", **options), wanted)


def test_a_prompt_with_eos_causes_one_warning(model, warnings_logged):
    for _ in range(2):
        model.generate(PIXELS[:1], IDS[:1], max_new_tokens=1)
    assert [message.split(":")[0] for message in warnings_logged] == ["A prompt ends with `</s>`"]


def test_generation_stops_at_a_string(tiny, processor):
    """`stop_strings` needs the tokenizer, which transformers also passes to the model."""
    inputs = processor(images=[Image.new("RGB", (48, 48), "orange")], task="caption")
    options = {"max_new_tokens": 8, "min_new_tokens": 8}
    whole = processor.tokenizer.decode(tiny.generate(**inputs, **options)[0])
    stop = whole.strip()[2:5]
    ids = tiny.generate(**inputs, stop_strings=[stop], tokenizer=processor.tokenizer, max_new_tokens=8)
    assert processor.tokenizer.decode(ids[0]).rstrip().endswith(stop) or len(ids[0]) < 8


def test_a_prompt_changes_the_caption(model):
    texts = {tuple(model.generate(PIXELS[:1], torch.tensor([prompt]), **GREEDY)[0].tolist()) for prompt in UNEQUAL}
    assert len(texts) > 1


def test_one_prompt_for_all_images(model, expected):
    tokens = model.generate(PIXELS, PROMPTS[:1], **GREEDY)
    assert tokens.tolist() == expected["generate_greedy"][:, 1:9].tolist()


def test_without_a_prompt(own_model):
    """The config's prompt is used, or `<s>` alone."""
    start = own_model.generate(PIXELS, **GREEDY)
    assert start.tolist() == own_model.generate(PIXELS, torch.tensor([[1]]), **GREEDY).tolist()
    own_model.config.caption_prompt_ids = PROMPTS[0].tolist()
    prompted = own_model.generate(PIXELS, **GREEDY)
    assert prompted.tolist() == own_model.generate(PIXELS, PROMPTS, **GREEDY).tolist()
    assert prompted.tolist() != start.tolist()


def test_numbers_of_new_tokens(model):
    end, place = first_end(model)
    common = {"do_sample": False, "eos_token_id": end}
    ended = model.generate(PIXELS[:1], PROMPTS[:1], max_new_tokens=8, **common)
    assert ended.shape == (1, place + 1) and ended[0, -1] == end
    longer = model.generate(PIXELS[:1], PROMPTS[:1], max_new_tokens=8, min_new_tokens=place + 2, **common)
    assert longer.shape[1] >= place + 2 and end not in longer[0, : place + 2].tolist()
    assert model.generate(PIXELS[:1], PROMPTS[:1], max_new_tokens=2, **common).shape == (1, 2)
    default = model.generate(PIXELS[:1], PROMPTS[:1], do_sample=False, min_new_tokens=32)
    assert default.shape == (1, 32)


def test_lengths_count_as_in_the_original(model):
    """`max_length` and `min_length` count the new tokens and one `<s>`, but not the prompt and the queries."""
    end, place = first_end(model)
    common = {"do_sample": False, "eos_token_id": end}
    for prompt in (PROMPTS[:1], torch.tensor([[1]])):
        assert model.generate(PIXELS[:1], prompt, max_length=3, do_sample=False, eos_token_id=319).shape == (1, 2)
    by_length = model.generate(PIXELS[:1], PROMPTS[:1], max_length=9, min_length=place + 3, **common)
    by_new = model.generate(PIXELS[:1], PROMPTS[:1], max_new_tokens=8, min_new_tokens=place + 2, **common)
    assert by_length.tolist() == by_new.tolist()
    assert place + 2 <= by_length.shape[1] <= 8
    both = model.generate(PIXELS[:1], PROMPTS[:1], max_length=9, max_new_tokens=3, do_sample=False, eos_token_id=319)
    assert both.shape == (1, 3), "`max_new_tokens` takes precedence"


def test_rows_end_independently(model):
    """A row gets the same tokens as alone, followed by padding ids."""
    end, place = first_end(model)
    tokens = model.generate(PIXELS, PROMPTS, max_new_tokens=12, do_sample=False, eos_token_id=end)
    lengths = set()
    for row in range(4):
        one = slice(row, row + 1)
        alone = model.generate(PIXELS[one], PROMPTS[one], max_new_tokens=12, do_sample=False, eos_token_id=end)[0]
        lengths.add(len(alone))
        assert tokens[row].tolist() == alone.tolist() + [0] * (tokens.shape[1] - len(alone))
    assert len(lengths) > 1


def test_sampling_with_a_seed(model):
    def sample(seed):
        torch.manual_seed(seed)
        arguments = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 8, "min_new_tokens": 8}
        return model.generate(PIXELS, PROMPTS, **arguments).tolist()

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_several_sequences_per_image(model, expected):
    tokens = model.generate(PIXELS[:2], PROMPTS[:2], num_beams=5, num_return_sequences=5, **GREEDY)
    assert tokens.shape == (10, 8)
    best = model.generate(PIXELS[:2], PROMPTS[:2], num_beams=5, **GREEDY)
    assert tokens[::5].tolist() == best.tolist()
    assert len({tuple(row) for row in tokens.tolist()}) == 10
    torch.manual_seed(0)
    sampled = model.generate(
        PIXELS[:2], PROMPTS[:2], do_sample=True, temperature=2.0, num_return_sequences=3, max_new_tokens=6
    )
    assert len(sampled) == 6 and len({tuple(row) for row in sampled.tolist()}) > 2


def test_sampled_sequences_belong_to_their_images(model):
    """At a very low temperature every sample is the greedy caption of its own image."""
    tokens = model.generate(
        PIXELS, PROMPTS, do_sample=True, temperature=1e-4, num_return_sequences=2, max_new_tokens=8, min_new_tokens=8
    )
    greedy = model.generate(PIXELS, PROMPTS, **GREEDY)
    assert tokens.tolist() == greedy.repeat_interleave(2, dim=0).tolist()


def test_dict_of_outputs(model):
    plain = model.generate(PIXELS, PROMPTS, **GREEDY)
    output = model.generate(PIXELS, PROMPTS, return_dict_in_generate=True, output_scores=True, **GREEDY)
    assert output.sequences.tolist() == plain.tolist()
    assert len(output.scores) == 8 and output.scores[0].shape == (4, 320)
    assert torch.stack(output.scores, dim=1).argmax(-1).tolist() == plain.tolist()


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streamer(model):
    streamer = Collector()
    tokens = model.generate(PIXELS[:1], PROMPTS[:1], streamer=streamer, **GREEDY)
    assert streamer.ended
    assert [token for piece in streamer.tokens for token in piece] == tokens[0].tolist()


def test_images_are_encoded_once(own_model):
    runs = count_layer_runs(own_model)
    own_model.generate(PIXELS, PROMPTS, num_beams=4, num_return_sequences=2, **GREEDY)
    assert runs["vision"] == 3
    assert runs["qllama"] == 4 * (1 + 8)  # queries and prompts except the last token, then a step for each new token


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_a_prompt_is_never_prefilled_in_chunks(model, cache):
    plain = model.generate(PIXELS, PROMPTS, **GREEDY)
    assert torch.equal(model.generate(PIXELS, PROMPTS, prefill_chunk_size=2, **cache, **GREEDY), plain)


def test_generate_does_not_change_the_configs(own_model):
    before = own_model.generation_config.to_dict()
    generation_config = type(own_model.generation_config)(max_new_tokens=3, min_new_tokens=3)
    tokens = own_model.generate(PIXELS, PROMPTS, generation_config=generation_config, do_sample=False)
    assert tokens.shape == (4, 3)
    overruled = own_model.generate(
        PIXELS, PROMPTS, generation_config=generation_config, max_new_tokens=4, min_new_tokens=4
    )
    assert overruled.shape == (4, 4)
    assert generation_config.max_new_tokens == 3 and generation_config.eos_token_id is None
    assert own_model.generation_config.to_dict() == before


def test_generate_in_training_mode(own_model):
    """`generate` in a training loop: no gradient, the same tokens, and the cache is used."""
    plain = own_model.generate(PIXELS, PROMPTS, **GREEDY)
    switch_checkpointing(own_model, True)
    tokens = own_model.train().generate(PIXELS, PROMPTS, **GREEDY)
    assert tokens.tolist() == plain.tolist() and not tokens.requires_grad


# ---------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_close(model, own_model, dtype):
    half = own_model.to(dtype)
    for mode in MODES:
        embeds = half.embed_image(PIXELS, mode)  # float32 pixels are cast to the model's dtype
        assert embeds.dtype == dtype and embeds.isfinite().all()
        assert F.cosine_similarity(embeds.float(), model.embed_image(PIXELS, mode)).min() > 0.995
    embeds = half.embed_text(IDS)
    assert embeds.dtype == dtype
    assert F.cosine_similarity(embeds.float(), model.embed_text(IDS)).min() > 0.995
    match = half.match(PIXELS, IDS).float()
    assert_close(match, model.match(PIXELS, IDS), rtol=0.05, atol=0.05)
    assert half.generate(PIXELS, PROMPTS, num_beams=2, **GREEDY).shape == (4, 8)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@torch.no_grad()
def test_no_nan_next_to_padding(implementation, dtype):
    """A row that is mostly padding causes no overflow and no division by zero."""
    model = golden_model(attn_implementation=implementation).to(dtype)
    ids, mask = torch.zeros(4, 60, dtype=torch.long), torch.zeros(4, 60, dtype=torch.long)
    ids[:, :20], mask[:, :20] = IDS, MASK
    for texts, masks in ((ids, mask), left_padded(IDS, MASK, 40)):
        assert model.encode_text(texts, masks).isfinite().all()
        assert model.get_text_features(texts, masks)[masks > 0].isfinite().all()
        assert model.match(PIXELS, texts, masks).isfinite().all()
        assert model.qllama(texts, attention_mask=masks).logits[masks > 0].isfinite().all()
        output = model.generate(
            PIXELS, texts, masks, max_new_tokens=3, return_dict_in_generate=True, output_logits=True, do_sample=False
        )
        assert torch.stack(output.logits).isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_in_bfloat16(objective):
    reference = golden_model(OBJECTIVES[objective]).train()(**training_batch(objective))
    model = golden_model(OBJECTIVES[objective]).bfloat16().train()
    output = model(**training_batch(objective))
    output.loss.backward()
    assert output.loss.dtype == torch.float32, "losses are computed in float32"
    for name, loss in output.items():
        assert_close(loss.detach(), reference[name].detach(), rtol=0.05, atol=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# -------------------------------------------------------------------------------------------------------------- losses


def test_label_smoothing(expected):
    smoothing = 0.3
    for objective, class_name in OBJECTIVES.items():
        model = golden_model(class_name).train()
        model.config.label_smoothing = smoothing
        output = model(**training_batch(objective))
        images, texts = query_embeds(model), summary_embeds(model)
        if objective == "stage2":
            valid = INPUTS["train.summarize_input_ids"].gt(0).sum(dim=1) != 5
            assert valid.tolist() == [True, True, True, False]
            wanted = smoothed_contrast(model, images, texts, torch.eye(4), smoothing)[valid].mean()
        else:
            same = (INPUTS["train.image_ids"][:, None] == INPUTS["train.image_ids"]).float()
            targets = same / same.sum(dim=1, keepdim=True)
            pooled = model.clip_projector(model.vision_model(PIXELS).last_hidden_state)
            wanted = sum(smoothed_contrast(model, e, texts, targets).mean() for e in (images, pooled))
        assert_close(output.loss_itc, wanted, **TOLERANCE)
        is_smoothed = bool(abs(output.loss_itc - expected[f"{objective}.loss_itc"]) > 1e-3)
        assert is_smoothed == (objective == "stage2"), "the original has no label smoothing in retrieval"
        assert_close(output.loss_itm, expected[f"{objective}.loss_itm"], **TOLERANCE)


def query_embeds(model):
    return model.clip_projector2(model.get_image_features(PIXELS)[1])


def summary_embeds(model, ids=INPUTS["train.summarize_input_ids"]):
    return model.encode_text(ids)


def smoothed_contrast(model, images, texts, targets, smoothing=0.0):
    """Each row's cross-entropy with label smoothing, averaged over both directions."""
    logits = model.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    targets = (1 - smoothing) * targets + smoothing / len(images)
    return -(targets * (logits.log_softmax(dim=1) + logits.T.log_softmax(dim=1))).sum(dim=1) / 2


def with_short_texts(batch, name, rows, length):
    """The texts, those of some rows shortened to `length` tokens."""
    ids, mask = batch[f"{name}_input_ids"].clone(), batch[f"{name}_attention_mask"].clone()
    ids[rows, length - 1], ids[rows, length:], mask[rows, length:] = 2, 0, 0
    mask[rows, :length] = 1
    return batch | {f"{name}_input_ids": ids, f"{name}_attention_mask": mask}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_empty_texts_leave_finite_losses(objective):
    batch = training_batch(objective)
    every = slice(None)
    batch = with_short_texts(with_short_texts(batch, "positive", every, 2), "negative", every, 2)
    batch = with_short_texts(batch, "summarize", every, 5)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    model = golden_model(OBJECTIVES[objective]).train()
    output = model(**batch)
    output.loss.backward()
    if objective == "stage2":
        assert output.loss_itm == 0 and output.loss_itc == 0 and output.loss_itg == 0 and output.loss == 0
        assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    else:
        assert output.loss_itm > 0 and output.loss_itc > 0, "retrieval leaves no row out"
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_empty_texts_have_no_loss():
    model = golden_model("InternVLForPreTraining").train()
    plain = model(**training_batch())
    logits = model.match(
        PIXELS, torch.cat([training_batch()["negative_input_ids"][:2], INPUTS["train.positive_input_ids"][2:]])
    )
    losses = F.cross_entropy(logits, torch.tensor([0, 0, 1, 1]), reduction="none")
    assert_close(plain.loss_itm, losses.mean(), **TOLERANCE)
    one_less = model(**with_short_texts(training_batch(), "negative", [1], 2))
    assert_close(one_less.loss_itm, losses[[0, 2, 3]].mean(), **TOLERANCE)

    three = model(**with_short_texts(training_batch(), "positive", [3], 3))
    longer = model(**with_short_texts(training_batch(), "positive", [3], 2))
    assert_close(longer.loss_itm, losses[:3].mean(), **TOLERANCE)
    assert abs(three.loss_itm - longer.loss_itm) > 1e-4, "a text of three tokens counts"

    # The golden's last summary has five tokens, so it is left out already.
    five = with_short_texts(training_batch(), "summarize", [1], 5)
    texts = summary_embeds(model, five["summarize_input_ids"])
    losses = smoothed_contrast(model, query_embeds(model), texts, torch.eye(4))
    assert_close(model(**five).loss_itc, losses[[0, 2]].mean(), **TOLERANCE)


def test_a_shorter_prefix_makes_shorter_empty_summaries():
    """`summarize:` has three ids in the published checkpoint, and two in tiny/."""
    model = golden_model("InternVLForPreTraining").train()
    model.config.embed_prefix_ids = [1, 17, 18]
    batch = with_short_texts(with_short_texts(training_batch(), "summarize", [1], 4), "summarize", [3], 5)
    texts = summary_embeds(model, batch["summarize_input_ids"])
    losses = smoothed_contrast(model, query_embeds(model), texts, torch.eye(4))
    assert_close(model(**batch).loss_itc, losses[[0, 2, 3]].mean(), **TOLERANCE)


def test_captioning_loss_is_shifted_by_one():
    model = golden_model("InternVLForPreTraining").train()
    batch = training_batch()
    output = model(**batch)
    image_states = model.vision_model(PIXELS).last_hidden_state
    embeds = torch.cat([model.query_tokens.expand(4, -1, -1), model.get_input_embeddings()(batch["input_ids"])], dim=1)
    logits = model.qllama(inputs_embeds=embeds, encoder_hidden_states=image_states, num_bidirectional=8).logits[:, 8:]
    picked = [
        -logits[row, place - 1].log_softmax(-1)[label]
        for row in range(4)
        for place, label in enumerate(batch["labels"][row].tolist())
        if label != -100
    ]
    assert_close(output.loss_itg, torch.stack(picked).mean(), **TOLERANCE)
    assert_close(output.loss, output.loss_itm + output.loss_itc + output.loss_itg, **TOLERANCE)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_do_not_depend_on_the_padding(objective):
    batch = training_batch(objective)
    model = golden_model(OBJECTIVES[objective]).train()
    expected = model(**batch)
    moved = dict(batch)
    for name in ("positive", "negative", "summarize"):
        ids, mask = left_padded(
            batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"], {"positive": 3}.get(name, 0)
        )
        moved |= {f"{name}_input_ids": ids, f"{name}_attention_mask": mask}
    ids, mask = left_padded(batch["input_ids"], batch["attention_mask"])
    labels = torch.full_like(batch["labels"], -100)
    labels[mask > 0] = batch["labels"][batch["attention_mask"] > 0]
    moved |= {"input_ids": ids, "attention_mask": mask, "labels": labels}
    unmasked = {name: None if name.endswith("attention_mask") else value for name, value in batch.items()}
    for other in (moved, unmasked):
        output = model(**other)
        for name, loss in expected.items():
            assert_close(output[name], loss, **TOLERANCE)


def test_without_image_ids_each_row_is_its_own_class(own_model):
    model = golden_model("InternVLForRetrieval").train()
    batch = training_batch()
    own = model(**batch)
    assert_close(model(**batch, image_ids=torch.tensor([5, 3, 8, 1])).loss, own.loss, **EXACT)
    assert abs(model(**batch, image_ids=INPUTS["train.image_ids"]).loss_itc - own.loss_itc) > 1e-3
    needed = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask", "labels")}
    assert_close(model(**needed).loss, own.loss, **EXACT)


# ------------------------------------------------------------------------------------------------------------- building


def test_the_model_has_no_buffers(model):
    """No buffers: loading starts on the meta device, where buffers that are not saved become garbage."""
    assert list(model.buffers()) == []
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("class_name", ["InternVLModel", "InternVL_C", "InternVL_G", *OBJECTIVES.values()])
def test_builds_on_the_meta_device(class_name):
    with torch.device("meta"):
        model = repo_class(f"modeling_internvl.{class_name}")(golden_config())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == {name: list(tensor.shape) for name, tensor in golden("tiny/model").items()}


def test_forward_on_the_meta_device():
    """Shapes can be computed without weights; no code depends on values."""
    model = golden_model().to("meta")
    output = model(IDS.to("meta"), PIXELS.to("meta"), mode="InternVL-G")
    assert output.logits_per_image.shape == (4, 4) and output.logits_per_image.device.type == "meta"


def test_names_and_shapes_of_the_published_checkpoint():
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    with torch.device("meta"):
        model = repo_class("modeling_internvl.InternVLModel")(config)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    published = json.loads((GOLDEN / "internvl_14b_parameters.json").read_text())
    assert shapes == published
    assert len(shapes) == 1048
    assert sum(parameter.numel() for parameter in model.parameters()) == 13_834_975_747


@torch.no_grad()
def test_fresh_weights(expected):
    torch.manual_seed(0)
    model = repo_class("modeling_internvl.InternVLModel")(changed_config(vision={"initializer_factor": 0.1}))
    spread = {"weight": 0.02, "text_projection": 0.02, "class_embedding": 0.02, "position_embedding": 0.02}
    fixed = {"ls1": 0.1, "ls2": 0.1, "query_tokens": 0.0, "logit_scale": 2.6592600369327779}
    for name, parameter in model.named_parameters():
        last = name.split(".")[-1]
        if last in fixed:
            assert (parameter == fixed[last]).all() or last == "logit_scale", name
        elif "norm" in name:
            assert (parameter == (1.0 if last == "weight" else 0.0)).all(), name
        elif last.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert abs(parameter.mean()) < 0.01 and parameter.std().item() == pytest.approx(spread[last], rel=0.35), (
                name
            )
    assert model.logit_scale.item() == pytest.approx(fixed["logit_scale"])
    assert (model.qllama.model.embed_tokens.weight[0] == 0).all(), "padding_idx"
    assert model.qllama.model.embed_tokens.padding_idx == 0


def test_original_signatures():
    """CLIP_benchmark and the original README call these by position or by these names."""
    cls = repo_class("modeling_internvl.InternVLModel")
    assert list(inspect.signature(cls.encode_image).parameters)[1:] == ["image", "mode"]
    assert list(inspect.signature(cls.encode_text).parameters)[1] == "text"
    assert {"image", "text", "mode"} <= set(inspect.signature(cls.forward).parameters)
    assert list(inspect.signature(cls.generate).parameters)[1:5] == [
        "pixel_values",
        "input_ids",
        "attention_mask",
        "generation_config",
    ]


def test_a_finished_rank_continues_with_the_others(own_model, monkeypatch):
    """With `synced_gpus` its cache grows and its ids do not; its steps must run, and their results are ignored."""
    expected = own_model.generate(PIXELS, PROMPTS, max_new_tokens=3, do_sample=False)
    left = iter([1.0] * 7)  # another rank has four more tokens to generate

    def other_ranks(flag, *arguments, **options):
        flag.fill_(next(left, 0.0))

    monkeypatch.setattr(torch.distributed, "all_reduce", other_ranks)
    runs = count_layer_runs(own_model)
    tokens = own_model.generate(PIXELS, PROMPTS, max_new_tokens=3, do_sample=False, synced_gpus=True)
    assert tokens.tolist() == expected.tolist()
    assert runs["qllama"] == 4 * (1 + 7)
