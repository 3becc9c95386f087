"""Both towers equal independent implementations: transformers' own InternVL vision tower and LLaMA."""

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

from conftest import TOLERANCE, repo_class

VISION_SIZES = {
    "hidden_size": 96,
    "num_attention_heads": 6,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "image_size": 56,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,  # the peer's qk-norm always uses 1e-6
}
TEXT_SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "vocab_size": 160,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION_NAMES = {  # ours: the peer's
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding.": "embeddings.patch_embeddings.projection.",
    "encoder.layers.": "encoder.layer.",
    ".attn.proj.": ".attention.projection_layer.",
    ".attn.": ".attention.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".ls1": ".lambda_1",
    ".ls2": ".lambda_2",
}


@torch.no_grad()
def randomised(model):
    """Set every parameter, including norms and scales, to random values, so that each one affects the result."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1
        std = parameter[0].numel() ** -0.5 if is_matrix and "embed" not in name else 0.5
        parameter.normal_(0.0 if is_matrix or name.endswith("bias") else 1.0, std, generator=generator)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------- vision


def vision_pair(qk_norm=True, bias=False):
    config = repo_class("configuration_intern_vit.InternVisionConfig")(
        **VISION_SIZES, qk_normalization=qk_norm, qkv_bias=bias, use_flash_attn=False
    )
    ours = randomised(repo_class("modeling_intern_vit.InternVisionModel")(config))
    peer = InternVLVisionModel(
        InternVLVisionConfig(
            **VISION_SIZES,
            use_qk_norm=qk_norm,
            attention_bias=bias,
            norm_type="rms_norm",
            use_absolute_position_embeddings=True,
            use_mean_pooling=True,  # that is, no norm after the last layer
            use_mask_token=False,
        )
    )
    peer.load_state_dict(peers_vision_weights(ours.state_dict()), strict=True)
    return ours, peer.eval()


def peers_vision_weights(weights):
    renamed = {}
    for name, tensor in weights.items():
        for old, new in VISION_NAMES.items():
            name = name.replace(old, new)
        if ".qkv." in name:
            renamed |= {name.replace("qkv", f"{part}_proj"): t for part, t in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            renamed[name] = tensor
    return renamed


def first_tensor(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("size", [(56, 56), (84, 84), (42, 42), (42, 70), (28, 112)], ids=str)
@pytest.mark.parametrize("qk_norm, bias", [(True, False), (False, True)], ids=["qk-norm", "bias"])
@torch.no_grad()
def test_vision_tower(qk_norm, bias, size):
    ours, peer = vision_pair(qk_norm, bias)
    pixels = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    if size == (28, 112):
        # As many patches as in the table, in another shape: the peer interpolates here too.
        assert (size[0] // 14) * (size[1] // 14) == (56 // 14) ** 2
    peer_states = []  # with hooks, because on 4.57 the peer refuses `output_hidden_states`
    for module in (peer.embeddings, *peer.encoder.layer):
        module.register_forward_hook(lambda _module, _inputs, output: peer_states.append(first_tensor(output)))
    expected = peer(pixels).last_hidden_state
    actual = ours(pixels, output_hidden_states=True)
    assert_close(actual.last_hidden_state, expected, **TOLERANCE)
    assert_close(actual.pooler_output, expected[:, 0], **TOLERANCE)
    assert len(actual.hidden_states) == VISION_SIZES["num_hidden_layers"] + 1
    for our_state, peer_state in zip(actual.hidden_states, peer_states, strict=True):
        assert_close(our_state, peer_state, **TOLERANCE)


def test_vision_gradients():
    ours, peer = vision_pair()
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    for model in (ours, peer):
        model.train()(pixels).last_hidden_state.square().mean().backward()
    expected = {name: parameter.grad for name, parameter in peer.named_parameters()}
    actual = peers_vision_weights({name: parameter.grad for name, parameter in ours.named_parameters()})
    assert set(actual) == set(expected)
    for name, gradient in actual.items():
        assert_close(gradient, expected[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------------------------------ text


@pytest.fixture(scope="module", params=[4, 2], ids=["all-heads", "grouped-heads"])
def text_pair(request):
    sizes = TEXT_SIZES | {"num_key_value_heads": request.param}
    config = repo_class("configuration_internvl.QLlamaConfig")(**sizes, num_query_token=8, cross_attention_frequency=2)
    ours = randomised(repo_class("modeling_qllama.QLlamaForCausalLM")(config))
    peer = LlamaForCausalLM(LlamaConfig(**sizes, rope_theta=10000.0, tie_word_embeddings=False))
    weights = {name: tensor for name, tensor in ours.state_dict().items() if ".cross_attn." not in name}
    peer.load_state_dict(weights, strict=True)
    return ours, peer.eval()


def token_ids(rows, length):
    return torch.randint(3, TEXT_SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(2))


def padded(side):
    """Texts of 11, 7 and 1 tokens, and their mask."""
    ids, mask = token_ids(3, 11), torch.ones(3, 11, dtype=torch.long)
    for row, length in enumerate((11, 7, 1)):
        padding = slice(length, None) if side == "right" else slice(0, 11 - length)
        ids[row, padding] = mask[row, padding] = 0
    return ids, mask


@torch.no_grad()
def test_causal_text(text_pair):
    ours, peer = text_pair
    ids = token_ids(3, 100)
    actual, expected = ours(ids, output_hidden_states=True), peer(ids, output_hidden_states=True)
    assert_close(actual.logits, expected.logits, **TOLERANCE)
    for index in range(TEXT_SIZES["num_hidden_layers"]):  # the peer applies the final norm to its last entry
        assert_close(actual.hidden_states[index], expected.hidden_states[index], **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_text(text_pair, side):
    ours, peer = text_pair
    ids, mask = padded(side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = peer(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(ours(ids, attention_mask=mask).logits[mask > 0], expected[mask > 0], **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_cached_text_in_chunks(text_pair, side):
    """Padding and a cache, several tokens per call."""
    ours, peer = text_pair
    ids, mask = padded(side)
    expected = peer(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    cache, pieces = None, []
    for start, stop in ((0, 4), (4, 5), (5, 11)):
        output = ours(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert cache.get_seq_length() == 11
    assert_close(torch.cat(pieces, dim=1)[mask > 0], expected[mask > 0], **TOLERANCE)


@torch.no_grad()
def test_greedy_decoding(text_pair):
    """Decoding step by step with a cache equals the peer's `generate`."""
    ours, peer = text_pair
    ids, mask = padded("left")
    arguments = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    expected = peer.generate(ids, attention_mask=mask, pad_token_id=0, eos_token_id=None, **arguments)

    output = ours(ids, attention_mask=mask, use_cache=True)
    tokens = []
    for _ in range(16):
        tokens.append(output.logits[:, -1:].argmax(-1))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = ours(tokens[-1], attention_mask=mask, past_key_values=output.past_key_values, use_cache=True)
    assert torch.cat(tokens, dim=1).tolist() == expected[:, ids.shape[1] :].tolist()
    assert len({tuple(row) for row in torch.cat(tokens, dim=1).tolist()}) == 3, "the three texts continue differently"


def test_text_gradients(text_pair):
    ours, peer = text_pair
    ids = token_ids(2, 12)
    for model in (ours, peer):
        model.zero_grad()
        model(ids).logits.logsumexp(-1).mean().backward()
    own = dict(ours.named_parameters())
    for name, parameter in peer.named_parameters():
        assert_close(own.pop(name).grad, parameter.grad, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    assert own and all(".cross_attn." in name and parameter.grad is None for name, parameter in own.items())
