"""Attention uses transformers' registry, in the form that FlashAttention needs: the only masks are for padding."""

import logging
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conftest import TOLERANCE, golden, golden_config, golden_model, repo_class, training_batch

# ---------------------------------------------------------------------------------------------------- the recorder


@dataclass
class Call:
    """The arguments of one call of the registry's function."""

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    dropout: float
    scaling: float
    is_causal: bool
    others: dict


CALLS = []


def record(module, query, key, value, attention_mask, *, dropout, scaling, is_causal, **others):
    CALLS.append(Call(module, query, key, value, attention_mask, dropout, scaling, is_causal, others))
    return flash_attention(query, key, value, attention_mask, scaling, is_causal), None


def flash_attention(query, key, value, padding, scaling, is_causal):
    """The result of FlashAttention: [B, heads, N, D] queries and S keys -> [B, N, heads, D]. Causality is aligned at
    the bottom right; padding is 2-D [B, S], is masked and gives 0.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    length, total = query.shape[2], key.shape[2]
    real = torch.ones(len(query), total, dtype=torch.bool) if padding is None else padding.bool()
    visible = real[:, None, None, :].expand(-1, -1, length, -1)
    if is_causal:
        visible = visible & torch.ones(length, total, dtype=torch.bool).tril(total - length)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, -torch.inf)
    states = torch.softmax(scores, dim=-1).nan_to_num() @ value  # NaN: a row at padding attends to nothing
    if length <= total:
        states = states * real[:, None, total - length :, None]
    return states.transpose(1, 2)


AttentionInterface.register("recorder", record)
AttentionMaskInterface.register("recorder", flash_attention_mask)


@pytest.fixture(autouse=True)
def no_calls_yet():
    CALLS.clear()


@pytest.fixture
def only_the_registry(monkeypatch):
    """Forbid torch's fused attention and any softmax of the model's own."""

    def forbidden(*_args, **_kwargs):
        raise AssertionError("attention was computed outside the registry")

    monkeypatch.setattr(F, "scaled_dot_product_attention", forbidden)
    monkeypatch.setattr(F, "softmax", forbidden)


KINDS = {
    r"vision_model\.encoder\.layers\.\d+\.attn": "vision",
    r"qllama\.model\.layers\.\d+\.self_attn": "self",
    r"qllama\.model\.layers\.\d+\.cross_attn": "cross",
    r"clip_projector\.cross_attn": "pool",
    r"clip_projector2\.cross_attn": "pool2",
}


def kind_of(name):
    return next((kind for pattern, kind in KINDS.items() if re.fullmatch(pattern, name)), None)


def summary(model):
    """How often each kind of attention was called, by (kind, is_causal, whether there was padding)."""
    names = {module: name for name, module in model.named_modules()}
    return Counter((kind_of(names[c.module]), c.is_causal, c.mask is not None) for c in CALLS)


# ---------------------------------------------------------------------------------------------------------- calls

CAPTION = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
INPUTS = golden("tiny/inputs")
PIXELS, IDS, PROMPTS = INPUTS["pixel_values"], INPUTS["input_ids"], INPUTS["prompt_ids"]
LEFT = torch.stack([row.roll(int((row == 0).sum())) for row in IDS])
PADDED_PROMPTS = torch.cat([PROMPTS, torch.zeros_like(PROMPTS[:, :2])], dim=1)
PADDED_PROMPTS[1, 5:] = 77
assert (LEFT[:, -1] == 2).all()

# Attention modules of golden/tiny: 3 in the vision tower, 4 self- and 2 cross-attentions in QLLaMA, 2 pools.
# Each entry: the call, and how often it calls attention, by (kind, is_causal, with padding).
VISION = {("vision", False, False): 3}
QUERIES = {("self", False, False): 4, ("cross", False, False): 2}
BIDIRECTIONAL = {("self", False, True): 4, ("cross", False, False): 2}  # [queries ; text] in matching
TEXT = {("self", True, False): 4}
RUNS = {
    "encode_image_c": (lambda m: m.encode_image(PIXELS, "InternVL-C"), VISION | {("pool", False, False): 1}),
    "encode_image_g": (
        lambda m: m.encode_image(PIXELS, "InternVL-G"),
        VISION | QUERIES | {("pool", False, False): 1, ("pool2", False, False): 1},
    ),
    "encode_text": (lambda m: m.encode_text(IDS), TEXT),
    "encode_text, left-padded": (lambda m: m.encode_text(LEFT), TEXT),
    "match": (lambda m: m.match(PIXELS, IDS), VISION | BIDIRECTIONAL),
    "match, left-padded": (lambda m: m.match(PIXELS, LEFT), VISION | BIDIRECTIONAL),
    "match, without padding": (lambda m: m.match(PIXELS, PROMPTS), VISION | QUERIES),
    "match, all pairs": (
        lambda m: m.match(PIXELS, IDS, all_pairs=True),
        VISION | {call: 4 * times for call, times in BIDIRECTIONAL.items()},
    ),
    # The queries with the prompt except its last token, then one pass for each new token.
    "generate": (
        lambda m: m.generate(PIXELS, PROMPTS, **CAPTION),
        VISION | {("cross", False, False): 2, ("self", True, False): 4, ("self", False, False): 4 + 5 * 4},
    ),
    "generate, padded": (
        lambda m: m.generate(PIXELS, PADDED_PROMPTS, **CAPTION),
        VISION | QUERIES | {("self", True, True): 4, ("self", False, True): 5 * 4},
    ),
    "generate, beams": (
        lambda m: m.generate(PIXELS, PROMPTS, num_beams=3, **CAPTION),
        VISION | {("cross", False, False): 2, ("self", True, False): 4, ("self", False, False): 4 + 5 * 4},
    ),
}


TRAINING = {
    "stage2": (
        "InternVLForPreTraining",
        # Matching; contrast and captioning in one pass over [queries ; caption], which repeats the queries; summaries.
        VISION
        | {("self", False, True): 4, ("self", True, False): 4 + 4, ("self", False, False): 4}
        | {("cross", False, False): 4, ("pool2", False, False): 1},
    ),
    "retrieval": (
        "InternVLForRetrieval",
        VISION
        | {("self", False, True): 4, ("self", True, False): 4, ("self", False, False): 4}
        | {("cross", False, False): 4, ("pool", False, False): 1, ("pool2", False, False): 1},
    ),
}


def check_calls(model, dtype):
    """Check what FlashAttention requires of every call, and the checkpoint's scaling."""
    assert CALLS
    for call in CALLS:
        batch, heads, length, head_dim = call.query.shape
        assert call.query.dtype == call.key.dtype == call.value.dtype == dtype
        assert call.key.shape == call.value.shape
        assert call.key.shape[0] == batch and call.key.shape[3] == head_dim and heads % call.key.shape[1] == 0
        assert heads == call.module.num_heads and head_dim == call.module.head_dim
        assert call.scaling == head_dim**-0.5
        assert call.dropout == 0.0
        assert type(call.is_causal) is bool
        if call.is_causal:
            assert length > 1
        assert not call.others.get("output_attentions"), "FlashAttention has no weights to return"
        if call.mask is not None:
            assert call.mask.shape == (batch, call.key.shape[2]) and call.mask.dtype == torch.bool
            assert call.mask.any(dim=1).all() and not call.mask.all()


def check_all_tokens_are_attended(model):
    """Check that the vision tower, the cross-attentions and the pools attend to all tokens of the image."""
    tokens = 1 + model.config.vision_config.position_grid**2
    names = {module: name for name, module in model.named_modules()}
    for call in CALLS:
        kind = kind_of(names[call.module])
        if kind in ("vision", "cross", "pool"):
            assert call.key.shape[2] == tokens
        if kind == "cross":
            assert call.query.shape[2] == model.config.num_query_token
        if kind in ("pool", "pool2"):
            assert call.query.shape[2] == 1


def test_every_attention_module_is_known():
    model = golden_model(attn_implementation="recorder")
    base = repo_class("attention_internvl.RegistryAttention")
    found = Counter(kind_of(name) for name, module in model.named_modules() if hasattr(module, "attend"))
    assert found == {"vision": 3, "self": 4, "cross": 2, "pool": 1, "pool2": 1}
    assert all(
        any(ancestor.__name__ == base.__name__ for ancestor in type(module).__mro__)
        for name, module in model.named_modules()
        if kind_of(name)
    )


@pytest.mark.parametrize("run", RUNS)
@torch.no_grad()
def test_inference_goes_through_the_registry(run, only_the_registry):
    model = golden_model(attn_implementation="recorder")
    call, expected_calls = RUNS[run]
    call(model)
    check_calls(model, torch.float32)
    check_all_tokens_are_attended(model)
    assert summary(model) == expected_calls
    called = {call.module for call in CALLS}
    kinds = {kind for kind, _, _ in expected_calls}
    assert called == {module for name, module in model.named_modules() if kind_of(name) in kinds}


@pytest.mark.parametrize("run", RUNS)
@torch.no_grad()
def test_flash_attention_gives_the_results_of_sdpa(run):
    call, _ = RUNS[run]
    expected = call(golden_model(attn_implementation="sdpa"))
    assert not CALLS
    assert_close(call(golden_model(attn_implementation="recorder")), expected, **TOLERANCE)
    if run.split(",")[0] in golden("tiny/expected"):
        assert_close(expected, golden("tiny/expected")[run.split(",")[0]], **TOLERANCE)


@pytest.mark.parametrize("run", RUNS)
@torch.no_grad()
def test_half_precision_reaches_the_registry(run):
    model = golden_model(attn_implementation="recorder").bfloat16()
    RUNS[run][0](model)
    check_calls(model, torch.bfloat16)


@pytest.mark.parametrize("objective", TRAINING)
def test_training_goes_through_the_registry(objective, only_the_registry):
    class_name, expected_calls = TRAINING[objective]
    model = golden_model(class_name, "recorder").train()
    extra = {"image_ids": INPUTS["train.image_ids"]} if objective == "retrieval" else {}
    output = model(**training_batch(), **extra)
    check_calls(model, torch.float32)
    check_all_tokens_are_attended(model)
    assert summary(model) == expected_calls

    output.loss.backward()  # runs the checkpointed vision tower again
    assert summary(model) == expected_calls | {("vision", False, False): 6}
    for name, value in golden("tiny/expected").items():
        if name.startswith(f"{objective}.grad."):
            gradient = model.get_parameter(name.removeprefix(f"{objective}.grad.")).grad
            assert_close(gradient, value, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
        elif name.startswith(f"{objective}."):
            assert_close(output[name.removeprefix(f"{objective}.")], value, **TOLERANCE)


def test_dropout_only_in_training():
    config = golden_config(attn_implementation="recorder")
    config.vision_config.attention_dropout, config.qllama_config.attention_dropout = 0.25, 0.125
    model = repo_class("modeling_internvl.InternVLForPreTraining")(config)
    names = {module: name for name, module in model.named_modules()}
    rates = {"vision": 0.25, "self": 0.125}
    for mode in (True, False):
        CALLS.clear()
        model.train(mode)(**training_batch())
        assert {kind_of(names[call.module]) for call in CALLS} == {"vision", "self", "cross", "pool2"}
        for call in CALLS:
            assert call.dropout == (rates.get(kind_of(names[call.module]), 0.0) if mode else 0.0)


def test_grouped_heads_are_passed_to_the_attention_function():
    """FlashAttention accepts fewer key/value heads: repeating them would waste memory."""
    fields = golden_config().to_dict()
    fields["qllama_config"]["num_key_value_heads"] = 2
    config = repo_class("configuration_internvl.InternVLConfig")(**fields, attn_implementation="recorder")
    model = repo_class("modeling_internvl.InternVLModel")(config).eval()
    with torch.no_grad():
        actual = model.encode_text(IDS)
        assert {(call.query.shape[1], call.key.shape[1]) for call in CALLS} == {(4, 2)}
        for implementation in ("sdpa", "eager"):
            model.qllama.config._attn_implementation = implementation
            assert_close(model.encode_text(IDS), actual, **TOLERANCE)
    assert len(CALLS) == 4, "sdpa and eager did not go to the recorder"


# --------------------------------------------------------------------------------------------- which function is used


@pytest.fixture
def flash_recorder(monkeypatch):
    """A model that uses the recorder under a name that begins with "flash"."""
    AttentionInterface.register("flash_recorder", record)
    AttentionMaskInterface.register("flash_recorder", flash_attention_mask)
    model = golden_model()
    for config in (model.config, model.vision_model.config, model.qllama.config):
        config._attn_implementation = "flash_recorder"
    yield model
    del AttentionInterface._global_mapping["flash_recorder"]
    del AttentionMaskInterface._global_mapping["flash_recorder"]


@torch.no_grad()
def test_flash_attention_gets_no_float32(flash_recorder):
    """FlashAttention has no float32 kernels; sdpa computes the same."""
    features = {"encode_image_g": lambda m: m.encode_image(PIXELS, "InternVL-G"), "encode_text": RUNS["encode_text"][0]}
    for name, call in features.items():
        assert_close(call(flash_recorder), golden("tiny/expected")[name], **TOLERANCE)
    assert not CALLS
    for call in features.values():
        call(flash_recorder.bfloat16())
    check_calls(flash_recorder, torch.bfloat16)
    assert len(CALLS) == 11 + 4


@pytest.fixture
def messages():
    """All log messages and warnings."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda entry: found.append(entry.getMessage())
    loggers = [logging.getLogger(), logging.getLogger("transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: found.append(str(message))
        yield found
    for logger in loggers:
        logger.removeHandler(handler)


def implementations(model):
    return {module.config._attn_implementation for name, module in model.named_modules() if kind_of(name)}


@pytest.mark.parametrize("start, then", [("sdpa", "eager"), ("eager", "sdpa")])
@torch.no_grad()
def test_set_attn_implementation_after_loading(tmp_path, monkeypatch, messages, start, then):
    golden_model().save_pretrained(tmp_path)
    model = repo_class("modeling_internvl.InternVLModel").from_pretrained(tmp_path, attn_implementation=start).eval()
    assert implementations(model) == {start}
    messages.clear()

    model.set_attn_implementation(then)

    assert messages == []
    assert implementations(model) == {then}
    counts = count_attention(monkeypatch)
    for name in ("encode_image_g", "encode_text"):
        assert_close(RUNS[name][0](model), golden("tiny/expected")[name], **TOLERANCE)
    assert counts == {then: 15}
    RUNS["match"][0](model)
    assert counts == {then: 15 + 9}


def count_attention(monkeypatch):
    """Count the calls of sdpa, which is in the registry, and of eager, which is in the repository."""
    counts = Counter()
    # The towers and the joint model may each have their own copy of that module.
    users = ("modeling_intern_vit.InternAttention", "modeling_internvl.PoolingAttention")
    bases = [each for name in users for each in repo_class(name).__mro__ if each.__name__ == "RegistryAttention"]
    for place in {sys.modules[base.__module__] for base in bases}:
        eager = place.eager_attention_forward
        monkeypatch.setattr(place, "eager_attention_forward", counting("eager", eager, counts))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", counting("sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"], counts))
    return counts


def counting(name, function, counts):
    def counted(*args, **kwargs):
        counts[name] += 1
        return function(*args, **kwargs)

    return counted


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention():
    """Slow: torch compiles it again for every shape."""
    states = torch.ones(1, 1, 4, 4)
    try:
        torch.compile(flex_attention)(states, states, states)
    except Exception as error:  # for anything that the compiler misses
        pytest.skip(f"flex_attention does not run here: {error!r:.200}")
    model = golden_model(attn_implementation="flex_attention")
    expected = golden("tiny/expected")
    assert_close(model.encode_image(PIXELS, "InternVL-G"), expected["encode_image_g"], **TOLERANCE)
    assert_close(model.encode_text(IDS), expected["encode_text"], **TOLERANCE)
    assert_close(model.match(PIXELS, IDS), golden_model().match(PIXELS, IDS), **TOLERANCE)
    tokens = model.generate(PIXELS, PROMPTS, max_new_tokens=3, do_sample=False)
    assert tokens.tolist() == expected["generate_greedy"][:, 1:4].tolist()


# ------------------------------------------------------------------------------------------------- use_flash_attn


def vision_config_module():
    """The module whose `is_flash_attn_2_available` the vision config of the joint config calls."""
    base = type(golden_config().vision_config)
    return sys.modules[base.__module__]


@torch.no_grad()
def test_without_flash_attn_sdpa_is_used_silently(monkeypatch, messages, capfd):
    monkeypatch.setattr(vision_config_module(), "is_flash_attn_2_available", lambda: False)
    fields = golden_config().to_dict()
    fields["vision_config"]["use_flash_attn"] = True
    model = repo_class("modeling_internvl.InternVLModel")(repo_class("configuration_internvl.InternVLConfig")(**fields))
    model.load_state_dict(golden("tiny/model"))
    assert model.config.vision_config.use_flash_attn
    assert implementations(model) == {"sdpa"}
    actual = model.eval().encode_image(PIXELS, "InternVL-G")
    assert_close(actual, golden("tiny/expected")["encode_image_g"], **TOLERANCE)
    assert messages == []
    assert capfd.readouterr() == ("", "")


def test_with_flash_attn_the_vision_tower_uses_it(monkeypatch):
    module = vision_config_module()
    monkeypatch.setattr(module, "is_flash_attn_2_available", lambda: True)
    make = module.InternVisionConfig
    assert make()._attn_implementation == "flash_attention_2", "use_flash_attn is on by default"
    assert make(use_flash_attn=False)._attn_implementation is None
    assert make(attn_implementation="eager")._attn_implementation == "eager"
    composite = repo_class("configuration_internvl.InternVLConfig")
    assert composite()._attn_implementation is None
    assert composite().vision_config._attn_implementation == "flash_attention_2"
    assert composite().qllama_config._attn_implementation is None
    assert composite(attn_implementation="eager").vision_config._attn_implementation == "eager"


# -------------------------------------------------------------------------------------------------------- the norms


NORMS = 3 * 4 + 4 * 2 + 2 * 2 + 1  # vision; QLLaMA's layers, cross-attentions and final norm


def test_every_norm_has_the_epsilon_of_the_config():
    norms = [module for module in golden_model().modules() if type(module).__name__ == "RMSNorm"]
    assert len(norms) == NORMS and all(norm.eps == 1e-6 for norm in norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_fast_norm_gives_the_same(dtype):
    norm = repo_class("attention_internvl.RMSNorm")(48, eps=1e-3).to(dtype)
    torch.nn.init.normal_(norm.weight)
    contiguous = torch.randn(2, 5, 3 * 48, dtype=dtype)
    for states in (contiguous.chunk(3, dim=-1)[1], torch.zeros(1, 1, 48, dtype=dtype), torch.randn(48, dtype=dtype)):
        before = states.clone()
        expected = nn.functional.rms_norm(states, (48,), norm.weight, 1e-3)
        with torch.no_grad():
            found = norm(states)
        assert found.dtype == dtype and torch.equal(states, before)
        assert_close(found, expected)
        assert_close(norm(states), expected, rtol=0, atol=0)


def test_gradients_pass_through_the_norm_and_the_scaled_branches():
    config = golden_config(attn_implementation="eager").vision_config
    layer = repo_class("modeling_intern_vit.InternVisionEncoderLayer")(config, 0.0).double()
    states = torch.randn(1, 3, config.hidden_size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (states,), fast_mode=True)
    layer(states).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
