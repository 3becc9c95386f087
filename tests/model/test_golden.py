"""The model reproduces every tensor of the original implementation in golden/ (docs/model.md, "Goldens")."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from benchmarks.golden_wide import regenerated, regenerated_pixels
from conftest import (
    GOLDEN,
    LOSSES,
    OBJECTIVES,
    TOLERANCE,
    golden,
    golden_config,
    golden_model,
    repo_class,
    training_batch,
)

IMPLEMENTATIONS = ("eager", "sdpa")
GENERATE = {"max_new_tokens": 12, "min_new_tokens": 8, "do_sample": False}
GRADIENTS = (
    "clip_projector2.cross_attn.q.weight",
    "itm_head.weight",
    "logit_scale",
    "qllama.model.embed_tokens.weight",
    "qllama.model.layers.0.cross_attn.k_proj.weight",
    "query_tokens",
    "text_projection",
    "vision_model.embeddings.position_embedding",
    "vision_model.encoder.layers.0.attn.qkv.weight",
)


def joint_prefix_logits(model, inputs):
    """Logits of [queries ; prompt], in one pass."""
    image_states = model.vision_model(inputs["pixel_values"]).last_hidden_state
    return model.qllama(
        inputs_embeds=with_queries(model, inputs["prompt_ids"]),
        encoder_hidden_states=image_states,
        num_bidirectional=model.config.num_query_token,
        use_cache=False,
    ).logits


def with_queries(model, input_ids):
    queries = model.query_tokens.expand(len(input_ids), -1, -1)
    return torch.cat([queries, model.get_input_embeddings()(input_ids)], dim=1)


# The call that computes each forward tensor of golden/tiny/expected.
FORWARD = {
    "vision.last_hidden_state": lambda m, i: m.vision_model(i["pixel_values"]).last_hidden_state,
    "vision.pooler_output": lambda m, i: m.vision_model(i["pixel_values"]).pooler_output,
    "vision.hidden_states": lambda m, i: torch.stack(
        m.vision_model(i["pixel_values"], output_hidden_states=True).hidden_states
    ),
    "vision_large.last_hidden_state": lambda m, i: m.vision_model(i["pixel_values_large"]).last_hidden_state,
    "vision_rect.last_hidden_state": lambda m, i: m.vision_model(i["pixel_values_rect"]).last_hidden_state,
    "vision_embeds.last_hidden_state": lambda m, i: m.vision_model(pixel_embeds=i["pixel_embeds"]).last_hidden_state,
    "encode_image_c": lambda m, i: m.encode_image(i["pixel_values"], "InternVL-C"),
    "encode_image_g": lambda m, i: m.encode_image(i["pixel_values"], "InternVL-G"),
    "encode_text": lambda m, i: m.encode_text(i["input_ids"]),
    "logits_per_image_c": lambda m, i: m(image=i["pixel_values"], text=i["input_ids"], mode="InternVL-C")[0],
    "logits_per_text_c": lambda m, i: m(image=i["pixel_values"], text=i["input_ids"], mode="InternVL-C")[1],
    "logits_per_image_g": lambda m, i: m(image=i["pixel_values"], text=i["input_ids"], mode="InternVL-G")[0],
    "logits_per_text_g": lambda m, i: m(image=i["pixel_values"], text=i["input_ids"], mode="InternVL-G")[1],
    "image_features.backbone": lambda m, i: m.get_image_features(i["pixel_values"])[0],
    "image_features.query": lambda m, i: m.get_image_features(i["pixel_values"])[1],
    "text_features": lambda m, i: without_padding(m.get_text_features(i["input_ids"]), i),
    "prefix_logits": joint_prefix_logits,
}
GENERATED = {"generate_greedy": 1, "generate_beam5": 5}  # name: beams
RESIZED = "resized_position_embedding"


def without_padding(states, inputs):
    """Set the values at padding, which are arbitrary, to 0."""
    return states * (inputs["input_ids"] > 0).unsqueeze(-1)


def expected_forward(name):
    tensor = golden("tiny/expected")[name]
    return without_padding(tensor, golden("tiny/inputs")) if name == "text_features" else tensor


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def both_models(request):
    model = golden_model(attn_implementation=request.param)
    assert model.vision_model.encoder.layers[0].attn.config._attn_implementation == request.param
    assert model.qllama.model.layers[0].self_attn.config._attn_implementation == request.param
    assert model.clip_projector.cross_attn.config._attn_implementation == request.param
    return model


def test_every_expected_tensor_has_a_test():
    covered = set(FORWARD) | set(GENERATED) | {RESIZED}
    for objective, losses in LOSSES.items():
        covered |= {f"{objective}.{name}" for name in losses} | {f"{objective}.grad.{name}" for name in GRADIENTS}
    assert covered == set(golden("tiny/expected"))


@pytest.mark.parametrize("name", FORWARD)
@torch.no_grad()
def test_forward(both_models, name):
    assert_close(FORWARD[name](both_models, golden("tiny/inputs")), expected_forward(name), **TOLERANCE)


@pytest.mark.parametrize("name", FORWARD)
@torch.no_grad()
def test_forward_of_one_row(both_models, name):
    expected = expected_forward(name)
    dimensions = {"vision.hidden_states": (1,)}.get(name, (0, 1) if name.startswith("logits_per") else (0,))
    for row in range(expected.shape[dimensions[0]]):
        part = expected
        for dimension in dimensions:
            part = part.narrow(dimension, row, 1)
        alone = {key: tensor[row : row + 1] for key, tensor in golden("tiny/inputs").items()}
        assert_close(FORWARD[name](both_models, alone), part, **TOLERANCE)


@torch.no_grad()
def test_prefix_logits_with_a_cache(both_models):
    """The queries fill a cache first; the prompt follows, without the image."""
    inputs = golden("tiny/inputs")
    image_states = both_models.vision_model(inputs["pixel_values"]).last_hidden_state
    queries = both_models.query_tokens.expand(len(image_states), -1, -1)
    cache = DynamicCache(config=both_models.config.qllama_config)
    first = both_models.qllama(
        inputs_embeds=queries,
        encoder_hidden_states=image_states,
        num_bidirectional=queries.shape[1],
        past_key_values=cache,
        use_cache=True,
    ).logits
    assert cache.get_seq_length() == queries.shape[1]
    rest = both_models.qllama(input_ids=inputs["prompt_ids"], past_key_values=cache, use_cache=True).logits
    assert_close(torch.cat([first, rest], dim=1), golden("tiny/expected")["prefix_logits"], **TOLERANCE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATED)
def test_generate(both_models, name, cache):
    inputs, expected = golden("tiny/inputs"), golden("tiny/expected")[name][:, 1:]  # the original puts <s> first
    kind = {"cache_implementation": "static"} if cache == "static" else {}
    arguments = GENERATE | kind | {"num_beams": GENERATED[name]}
    everything = {"pixel_values": inputs["pixel_values"], "input_ids": inputs["prompt_ids"]}
    everything["attention_mask"] = torch.ones_like(inputs["prompt_ids"])
    # Also three images: with four, the first of five beams gets its own image even if the beam layout is wrong.
    for rows in (slice(0, 4), slice(0, 3), *(slice(row, row + 1) for row in range(4))):
        tokens = both_models.generate(**{key: tensor[rows] for key, tensor in everything.items()}, **arguments)
        assert_close(tokens, expected[rows], rtol=0, atol=0)


@torch.no_grad()
def test_greedy_tokens_without_a_cache(both_models):
    """A loop that runs everything again for each token gives the golden's tokens."""
    inputs = golden("tiny/inputs")
    image_states = both_models.vision_model(inputs["pixel_values"]).last_hidden_state
    ids, length = inputs["prompt_ids"], inputs["prompt_ids"].shape[1]
    for step in range(GENERATE["max_new_tokens"]):
        logits = both_models.qllama(
            inputs_embeds=with_queries(both_models, ids),
            encoder_hidden_states=image_states,
            num_bidirectional=both_models.config.num_query_token,
            use_cache=False,
        ).logits[:, -1]
        if step < GENERATE["min_new_tokens"]:
            logits[:, both_models.config.qllama_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert_close(ids[:, length:], golden("tiny/expected")["generate_greedy"][:, 1:], rtol=0, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "stored"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_gradients(objective, checkpointing, implementation):
    model = golden_model(OBJECTIVES[objective], implementation).train()
    assert model.vision_model.encoder.gradient_checkpointing, "on by default, as in the original"
    model.vision_model.encoder.gradient_checkpointing = checkpointing
    runs = []
    model.vision_model.encoder.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))

    output = model(**training_batch(objective))
    output.loss.backward()

    assert len(runs) == (2 if checkpointing else 1), "a checkpointed layer runs again in the backward pass"
    expected = golden("tiny/expected")
    for name in LOSSES[objective]:
        assert_close(output[name], expected[f"{objective}.{name}"], **TOLERANCE)
    for name in GRADIENTS:
        gradient = model.get_parameter(name).grad
        assert_close(gradient, expected[f"{objective}.grad.{name}"], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_resized_position_embedding(model, expected):
    model.vision_model.resize_pos_embeddings(56, 98, 14)
    assert_close(model.vision_model.embeddings.position_embedding.detach(), expected[RESIZED], **TOLERANCE)


# ---------------------------------------------------------------------------------- golden/wide: published widths


@pytest.mark.slow
@torch.no_grad()
def test_published_widths():
    """One layer of each tower at the widths of the published checkpoint; needs 2.5 GB of memory."""
    fields = json.loads((GOLDEN / "wide" / "config.json").read_text())
    assert fields["vision_config"]["hidden_size"] == 3200 and fields["qllama_config"]["hidden_size"] == 4096
    with torch.device("meta"):  # built on the meta device, then assigned the tensors
        model = repo_class("modeling_internvl.InternVLModel")(golden_config("wide"))
    parameters = {name: regenerated(name, parameter.shape) for name, parameter in model.named_parameters()}
    model.load_state_dict(parameters, strict=True, assign=True)
    model.eval()
    del parameters
    pixels = regenerated_pixels()
    ids = golden("wide/inputs")["input_ids"]
    actual = {
        "vision.pooler_output": model.vision_model(pixels).pooler_output,
        "encode_image_c": model.encode_image(pixels, "InternVL-C"),
        "encode_image_g": model.encode_image(pixels, "InternVL-G"),
        "encode_text": model.encode_text(ids),
        "logits_per_image_g": model(image=pixels, text=ids, mode="InternVL-G")[0],
    }
    expected = golden("wide/expected")
    assert set(actual) == set(expected)
    for name, tensor in actual.items():
        assert_close(tensor, expected[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
