"""Bad input: every one is an error that names the argument, what came and what was expected.

Each check is tested with every bad input through one call; the other calls show with two of these that they reach it.
"""

import copy
import json

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from conftest import GOLDEN, IMAGES, golden, golden_config, golden_model, repo_class

VOCABULARY = 320  # of golden/tiny, as are the sizes below
PIXELS = golden("tiny/inputs")["pixel_values"]  # [4, 3, 56, 56], patches of 14
IDS = golden("tiny/inputs")["input_ids"]  # [4, 20]
PROMPTS = golden("tiny/inputs")["prompt_ids"]  # [4, 5]


@pytest.fixture(scope="module")
def model():
    return golden_model()


# ------------------------------------------------------------------------------------------------------------ pixels

IMAGE_CALLS = {
    "embed_image": lambda model, pixels: model.embed_image(pixels, "InternVL-G"),
    "encode_image": lambda model, pixels: model.encode_image(pixels, "InternVL-C"),
    "get_image_features": lambda model, pixels: model.get_image_features(pixels),
    "match": lambda model, pixels: model.match(pixels, IDS),
    "generate": lambda model, pixels: model.generate(pixels, PROMPTS, max_new_tokens=1),
    "forward": lambda model, pixels: model(IDS, pixels),
    "original": lambda model, pixels: model(image=pixels, text=IDS, mode="InternVL-C"),
    "vision_model": lambda model, pixels: model.vision_model(pixels),
}
BAD_PIXELS = {
    "rank 3": (PIXELS[0], ValueError, r"\[batch, 3, height, width\], got \[3, 56, 56\]"),
    "rank 5": (PIXELS[None], ValueError, r"\[batch, 3, height, width\], got \[1, 4, 3, 56, 56\]"),
    "channels": (PIXELS[:, :2], ValueError, r"\[batch, 3, height, width\], got \[4, 2, 56, 56\]"),
    "channels last": (PIXELS.permute(0, 2, 3, 1), ValueError, r"height, width\], got \[4, 56, 56, 3\]"),
    "uint8": (PIXELS.byte(), TypeError, "floating-point tensor.*got torch.uint8"),
    "int64": (PIXELS.long(), TypeError, "floating-point tensor.*got torch.int64"),
    "bool": (PIXELS > 0, TypeError, "floating-point tensor.*got torch.bool"),
    "list": ([PIXELS[0]], TypeError, "floating-point tensor.*got list"),
    "array": (PIXELS.numpy(), TypeError, "floating-point tensor.*got float32"),
    "width": (PIXELS[..., :-1], ValueError, "multiples of 14, got 56 x 55"),
    "height": (PIXELS[:, :, 1:], ValueError, "multiples of 14, got 55 x 56"),
    "nothing wide": (PIXELS[..., :0], ValueError, "got 56 x 0"),
    "no picture": (PIXELS[:0], ValueError, r"got \[0, 3, 56, 56\]"),
}


@pytest.mark.parametrize("call", IMAGE_CALLS)
def test_pixels(model, call):
    for case, (pixels, error, message) in BAD_PIXELS.items():
        with pytest.raises(error, match=f"`pixel_values` .*{message}"):
            IMAGE_CALLS[call](model, pixels)
            pytest.fail(f"{call} takes {case}")


@pytest.mark.parametrize("call", ["embed_image", "encode_image", "generate", "match"])
def test_no_pixels(model, call):
    with pytest.raises((TypeError, ValueError), match="`pixel_values`"):
        IMAGE_CALLS[call](model, None)


def test_other_precisions_are_no_error(model):
    wanted = model.embed_image(PIXELS)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)):
        found = model.embed_image(PIXELS.to(dtype))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ValueError, "Exactly one of `pixel_values` and `pixel_embeds`"),
        ({"pixel_values": PIXELS, "pixel_embeds": torch.zeros(1, 17, 100)}, ValueError, "Exactly one"),
        ({"pixel_embeds": torch.zeros(17, 100)}, ValueError, r"`pixel_embeds` .*tokens, 100\], got \[17, 100\]"),
        ({"pixel_embeds": torch.zeros(1, 17, 99)}, ValueError, r"`pixel_embeds` .*tokens, 100\], got \[1, 17, 99\]"),
        ({"pixel_embeds": torch.zeros(1, 17, 100).long()}, TypeError, "`pixel_embeds` .*got torch.int64"),
        ({"pixel_embeds": [[0.0] * 100]}, TypeError, "`pixel_embeds` .*got list"),
    ],
)
def test_vision_inputs(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model.vision_model(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((42, 98, 14), "`old_size` .*42.*17 positions"),
        ((57, 98, 14), "`old_size` .*57"),
        ((-56, 98, 14), "`old_size` .*-56"),
        ((56, 97, 14), "`new_size` .*multiple of 14, got 97"),
        ((56, 0, 14), "`new_size` .*multiple of 14, got 0"),
        ((56, -14, 14), "`new_size` .*multiple of 14, got -14"),
        ((56, 98.0, 14), "`new_size` .*got 98.0"),
        ((56, 98, 7), "`patch_size` .*14, got 7"),
    ],
)
def test_resizing_positions(arguments, message):
    vision = golden_model().vision_model
    before = vision.embeddings.position_embedding.detach().clone()
    with pytest.raises((TypeError, ValueError), match=message):
        vision.resize_pos_embeddings(*arguments)
    assert torch.equal(vision.embeddings.position_embedding, before) and vision.config.force_image_size is None


# ------------------------------------------------------------------------------------------------------------- texts

TEXT_CALLS = {
    "embed_text": lambda model, ids, mask: model.embed_text(ids, mask),
    "encode_text": lambda model, ids, mask: model.encode_text(ids, mask),
    "get_text_features": lambda model, ids, mask: model.get_text_features(ids, mask),
    "match": lambda model, ids, mask: model.match(PIXELS, ids, mask),
    "generate": lambda model, ids, mask: model.generate(PIXELS, ids, mask, max_new_tokens=1),
    "forward": lambda model, ids, mask: model(ids, PIXELS, mask),
    "original": lambda model, ids, mask: model(image=PIXELS, text=ids, attention_mask=mask),
}
ONE_EMPTY_ROW = torch.cat([IDS[:3], torch.zeros_like(IDS[:1])])
BAD_TEXTS = {
    "float": (IDS.float(), None, TypeError, "integer token ids, got torch.float32"),
    "bool": (IDS > 0, None, TypeError, "integer token ids, got torch.bool"),
    "list": (IDS.tolist(), None, TypeError, "integer token ids, got list"),
    "empty list": ([], None, TypeError, "integer token ids, got list"),
    "string": ("a cat", None, TypeError, "integer token ids, got str"),
    "rank 1": (IDS[0], None, ValueError, r"non-empty \[batch, length\], got \[20\]"),
    "rank 3": (IDS[None], None, ValueError, r"non-empty \[batch, length\], got \[1, 4, 20\]"),
    "no text": (IDS[:0], None, ValueError, r"non-empty \[batch, length\], got \[0, 20\]"),
    "no token": (IDS[:, :0], None, ValueError, r"non-empty \[batch, length\], got \[4, 0\]"),
    "negative": (IDS.clone().index_fill_(1, torch.tensor([3]), -5), None, ValueError, r"\[0, 320\), got -5"),
    "too large": (IDS.clone().index_fill_(1, torch.tensor([3]), 320), None, ValueError, r"\[0, 320\), got 320"),
    "padding": (torch.zeros(4, 6, dtype=torch.long), None, ValueError, "row without a single real token"),
    "a row of padding": (ONE_EMPTY_ROW, None, ValueError, "row without a single real token"),
    "a row masked out": (IDS, (ONE_EMPTY_ROW > 0).long(), ValueError, "row without a single real token"),
    "mask of other length": (IDS, torch.ones(4, 19), ValueError, r"mask .*\[4, 20\].*got \[4, 19\]"),
    "mask of other batch": (IDS, torch.ones(1, 20), ValueError, r"mask .*\[4, 20\].*got \[1, 20\]"),
    "mask of rank 4": (IDS, torch.ones(4, 1, 20, 20), ValueError, r"mask .*\[4, 20\].*got \[4, 1, 20, 20\]"),
    "mask as list": (IDS, [[1] * 20] * 4, ValueError, r"mask .*\[4, 20\].*got list"),
    "mask as string": (IDS, "causal", ValueError, r"mask .*\[4, 20\].*got str"),
    "additive mask": (IDS, torch.where(IDS > 0, 0.0, -1e9), ValueError, "row without a single real token"),
}


@pytest.mark.parametrize("call", TEXT_CALLS)
def test_texts(model, call):
    for case, (ids, mask, error, message) in BAD_TEXTS.items():
        with pytest.raises(error, match=f"(?=.*`input_ids`).*{message}"):
            TEXT_CALLS[call](model, ids, mask)
            pytest.fail(f"{call} takes {case}")


def test_boundary_ids_are_no_error(model):
    ids = torch.tensor([[1, VOCABULARY - 1, 2, 0]])
    for dtype in (torch.int32, torch.int64):
        assert model.embed_text(ids.to(dtype)).isfinite().all()
    for mask in (ids > 0, (ids > 0).float(), (ids > 0).to(torch.int32)):
        assert torch.equal(model.embed_text(ids, mask), model.embed_text(ids))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "Exactly one of `input_ids` and `inputs_embeds`"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(4, 20, 64)}, "Exactly one of `input_ids` and `inputs_embeds`"),
        ({"input_ids": IDS[:, :7], "encoder_hidden_states": torch.zeros(4, 17, 100)}, "8 queries.*got 7 positions"),
    ],
)
def test_language_tower_inputs(model, arguments, message):
    for tower in (model.qllama, model.qllama.model):
        with pytest.raises(ValueError, match=message):
            tower(**arguments)


# --------------------------------------------------------------------------------------------- modes, combinations


@pytest.mark.parametrize("mode", ["InternVL-c", "C", "", "internvl-g", 1, ["InternVL-C"]])
def test_modes(model, mode):
    calls = (
        lambda: model.encode_image(PIXELS, mode),
        lambda: model.encode_image(image=PIXELS, mode=mode),
        lambda: model.embed_image(PIXELS, mode),
        lambda: model(input_ids=IDS, mode=mode),
        lambda: model(pixel_values=PIXELS, mode=mode),
        lambda: model(image=PIXELS, text=IDS, mode=mode),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"`mode` must be one of .*InternVL-C.*InternVL-G.*got ") as error:
            call()
        assert str(error.value).endswith(f"got {mode!r}.")


def test_nothing_to_compare(model):
    for arguments in ({}, {"attention_mask": torch.ones(4, 20)}, {"mode": "InternVL-G"}):
        with pytest.raises(ValueError, match="`input_ids` and `pixel_values` must be given"):
            model(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"image": PIXELS},
        {"text": IDS},
        {"image": PIXELS, "input_ids": IDS},
        {"text": IDS, "pixel_values": PIXELS},
        {"image": PIXELS, "text": IDS, "pixel_values": PIXELS},
        {"image": PIXELS, "text": IDS, "input_ids": IDS},
    ],
)
def test_original_names_go_together(model, arguments):
    with pytest.raises(ValueError, match="`image` and `text` go together.*`pixel_values`.*`input_ids`"):
        model(**arguments)


def test_pairs_to_match(model):
    with pytest.raises(ValueError, match="`pixel_values` and `input_ids`.*4 images and 3 texts.*all_pairs=True"):
        model.match(PIXELS, IDS[:3])
    with pytest.raises(ValueError, match="1 images and 4 texts"):
        model.match(PIXELS[:1], IDS)
    assert model.match(PIXELS[:1], IDS, all_pairs=True).shape == (1, 4, 2)


def test_misspelt_options(model):
    calls = {
        "pixel_value": lambda: model(pixel_value=PIXELS),
        "mask": lambda: model.embed_text(IDS, mask=IDS > 0),
        "normalise": lambda: model.embed_text(IDS, normalise=False),
        "normalized": lambda: model.embed_image(PIXELS, normalized=False),
        "Mode": lambda: model.encode_image(PIXELS, Mode="InternVL-C"),
        "attention_masks": lambda: model.encode_text(IDS, attention_masks=IDS),
        "all_pair": lambda: model.match(PIXELS, IDS, all_pair=True),
        "output_hidden_state": lambda: model.vision_model(PIXELS, output_hidden_state=True),
        "past_key_value": lambda: model.qllama(input_ids=IDS, past_key_value=None),
        "head_mask": lambda: model.qllama.model(input_ids=IDS, head_mask=None),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"'{name}'"):
            call()


# ---------------------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "`pixel_values` must be given"),
        ({"input_ids": PROMPTS}, "`pixel_values` must be given"),
        ({"pixel_values": PIXELS, "input_ids": PROMPTS[:3]}, r"`input_ids` .*one per image \(4\), got 3"),
        ({"pixel_values": PIXELS, "assistant_model": object()}, "`generate` does not support `assistant_model`"),
        ({"pixel_values": PIXELS, "guidance_scale": 1.5}, "`generate` does not support `guidance_scale`"),
        ({"pixel_values": PIXELS, "assistant_early_exit": 1}, "`generate` does not support `assistant_early_exit`"),
        (
            {"pixel_values": PIXELS, "generation_config": GenerationConfig(guidance_scale=1.5)},
            "`generate` does not support `guidance_scale`",
        ),
        ({"pixel_values": PIXELS[:2], "input_ids": PROMPTS}, r"`input_ids` .*one per image \(2\), got 4"),
        ({"pixel_values": PIXELS, "attention_mask": torch.ones(4, 5)}, "`attention_mask` needs the `input_ids`"),
        ({"pixel_values": PIXELS, "max_new_token": 3}, "max_new_token"),
        ({"pixel_values": PIXELS, "num_beam": 3}, "num_beam"),
        ({"pixel_values": PIXELS, "mode": "InternVL-G"}, "mode"),
        ({"pixel_values": PIXELS, "position_ids": torch.arange(5)}, "unexpected keyword argument 'position_ids'"),
        ({"pixel_values": PIXELS, "num_bidirectional": 3}, "unexpected keyword argument 'num_bidirectional'"),
        ({"pixel_values": PIXELS, "return_dict": True}, "unexpected keyword argument 'return_dict'"),
        ({"pixel_values": PIXELS, "past_key_values": DynamicCache()}, "argument 'past_key_values'"),
        ({"pixel_values": PIXELS, "cache": DynamicCache()}, "argument 'cache'"),
        ({"pixel_values": PIXELS, "prompt_lookup_num_tokens": 2}, "does not support `prompt_lookup_num_tokens`"),
        ({"pixel_values": PIXELS, "custom_generate": print}, "does not support `custom_generate`"),
        ({"pixel_values": PIXELS, "output_attentions": True}, "does not support `output_attentions`"),
        ({"pixel_values": PIXELS, "max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_generate(model, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        model.generate(**arguments)


def test_generate_cannot_lose_the_image_without_a_cache(model):
    """`generate` keeps its cache whatever it is told; the tower alone writes the same text with and without one."""
    wanted = model.generate(PIXELS, PROMPTS, max_new_tokens=4, min_new_tokens=4)
    options = {"max_new_tokens": 4, "min_new_tokens": 4}
    assert torch.equal(model.generate(PIXELS, PROMPTS, use_cache=False, **options), wanted)
    config = GenerationConfig(use_cache=False, **options)
    assert torch.equal(model.generate(PIXELS, PROMPTS, generation_config=config), wanted)
    text = model.qllama.generate(PROMPTS, do_sample=False, **options)
    assert torch.equal(model.qllama.generate(PROMPTS, do_sample=False, use_cache=False, **options), text)


# ----------------------------------------------------------------------------------------------------------- caption

IMAGE = {"images": IMAGES[0]}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "Exactly one of `images` and `pixel_values`"),
        (IMAGE | {"pixel_values": PIXELS}, ValueError, "Exactly one of `images` and `pixel_values`"),
        (IMAGE | {"candidates": 0}, ValueError, "`candidates` must be a positive integer, got 0"),
        (IMAGE | {"candidates": -1}, ValueError, "`candidates` .*got -1"),
        (IMAGE | {"candidates": 2.0}, ValueError, "`candidates` .*got 2.0"),
        (IMAGE | {"candidates": True}, ValueError, "`candidates` .*got True"),
        (IMAGE | {"candidates": "5"}, ValueError, "`candidates` .*got '5'"),
        (IMAGE | {"candidates": 5, "num_beams": 3}, ValueError, "`num_beams` .*`candidates`, 5, got 3"),
        (IMAGE | {"candidates": 5, "num_beams": 1}, ValueError, "`num_beams` .*`candidates`, 5, got 1"),
        (IMAGE | {"candidates": 5, "num_beams": 3, "do_sample": True}, ValueError, "`num_beams` .*got 3"),
        (IMAGE | {"candidates": 5, "num_return_sequences": 5}, TypeError, "sets `num_return_sequences` itself"),
        (IMAGE | {"num_return_sequences": 2}, TypeError, "sets `num_return_sequences` itself.*`candidates`"),
        (IMAGE | {"return_dict_in_generate": True}, TypeError, "sets `return_dict_in_generate` itself"),
        (IMAGE | {"input_ids": PROMPTS}, TypeError, "sets `input_ids` itself.*`prompt`"),
        (IMAGE | {"prompt": ["a", "b"]}, ValueError, r"`prompt` must be one text, or one per image \(1\), got 2"),
        (IMAGE | {"prompt": []}, ValueError, r"`prompt` .*per image \(1\), got 0"),
        (IMAGE | {"prompt": ""}, TypeError, "`prompt` must be a text .*got ''"),
        (IMAGE | {"prompt": [" "]}, TypeError, "`prompt` .*none of them empty"),
        (IMAGE | {"prompt": 3}, TypeError, "`prompt` .*got 3"),
        (IMAGE | {"prompt": PROMPTS}, TypeError, "`prompt` must be a text"),
        (IMAGE | {"max_new_token": 3}, TypeError, "max_new_token"),
        ({"images": []}, ValueError, "`images` must hold at least one image"),
        ({"images": PIXELS}, ValueError, "already normalised"),
        ({"pixel_values": IMAGES[0]}, TypeError, "`pixel_values` .*got str"),
        ({"pixel_values": IMAGES[0], "candidates": 2}, TypeError, "`pixel_values` .*got str"),
    ],
)
def test_caption(tiny, processor, arguments, error, words):
    with pytest.raises(error, match=words):
        tiny.caption(processor, **arguments)


def test_caption_takes_the_processor_of_the_checkpoint(tiny, model, processor):
    with pytest.raises(TypeError, match="`processor`.*InternVLTokenizer"):
        tiny.caption(processor.tokenizer, IMAGES[0])
    with pytest.raises(ValueError, match="The processor belongs to another checkpoint"):
        model.caption(processor, IMAGES[0])


# ---------------------------------------------------------------------------------------------------------- training

TRAIN = {name.removeprefix("train."): tensor for name, tensor in golden("tiny/inputs").items() if "train." in name}
TOKEN_BATCHES = ("positive_input_ids", "negative_input_ids", "summarize_input_ids", "input_ids")


def training_batch(**changes):
    batch = {f"{name}_input_ids": TRAIN[f"{name}_input_ids"] for name in ("positive", "negative", "summarize")}
    batch |= {f"{name}_attention_mask": None for name in ("positive", "negative", "summarize")}
    batch |= {"pixel_values": PIXELS, "input_ids": TRAIN["caption_input_ids"], "attention_mask": None}
    return batch | {"labels": TRAIN["labels"]} | changes


@pytest.fixture(scope="module")
def pretraining():
    return golden_model("InternVLForPreTraining").train()


@pytest.fixture(scope="module")
def retrieval():
    return golden_model("InternVLForRetrieval").train()


@pytest.mark.parametrize(
    "labels, error, got",
    [
        (TRAIN["labels"][:, 1:], ValueError, r"\[4, 16\].*got \[4, 15\]"),
        (TRAIN["labels"][:3], ValueError, r"\[4, 16\].*got \[3, 16\]"),
        (TRAIN["labels"].flatten(), ValueError, r"\[4, 16\].*got \[64\]"),
        (None, ValueError, r"\[4, 16\].*got NoneType"),
        (TRAIN["labels"].tolist(), ValueError, r"\[4, 16\].*got list"),
        (TRAIN["labels"].float(), TypeError, "integer.*float32"),
        (TRAIN["labels"].clamp(min=VOCABULARY), ValueError, f"{VOCABULARY}"),
    ],
)
def test_labels(pretraining, labels, error, got):
    with pytest.raises(error, match=f"`labels` .*{got}"):
        pretraining(**training_batch(labels=labels))


@pytest.mark.parametrize(
    "image_ids, error, got",
    [
        (TRAIN["image_ids"][:3], ValueError, r"\[4\].*got \[3\]"),
        (TRAIN["image_ids"][:, None], ValueError, r"\[4\].*got \[4, 1\]"),
        (TRAIN["image_ids"].tolist(), (TypeError, ValueError), "got list"),
    ],
)
def test_image_ids(retrieval, image_ids, error, got):
    with pytest.raises(error, match=f"`image_ids` .*{got}"):
        retrieval(**training_batch(image_ids=image_ids))


@pytest.mark.parametrize("name", TOKEN_BATCHES)
@pytest.mark.parametrize("rows", [1, 3])
def test_batches_of_other_size(pretraining, name, rows):
    changes = {name: training_batch()[name][:rows]}
    if name == "input_ids":
        changes["labels"] = TRAIN["labels"][:rows]
    with pytest.raises(ValueError, match=f"`{name}` .*4.*got .*{rows}"):
        pretraining(**training_batch(**changes))


@pytest.mark.parametrize("name", TOKEN_BATCHES[:3])
@pytest.mark.parametrize("rows", [1, 3])
def test_batches_of_other_size_in_retrieval(retrieval, name, rows):
    with pytest.raises(ValueError, match=f"`{name}` .*4.*got .*{rows}"):
        retrieval(**training_batch(**{name: training_batch()[name][:rows]}))


@pytest.mark.parametrize("name", TOKEN_BATCHES)
def test_training_ids_and_masks(pretraining, name):
    ids = training_batch()[name]
    mask_name = name.replace("input_ids", "attention_mask")
    cases = (
        ({name: ids.float()}, TypeError, f"`{name}` .*float32"),
        ({name: ids + VOCABULARY}, ValueError, rf"`{name}` .*\[0, {VOCABULARY}\)"),
        ({name: torch.zeros_like(ids)}, ValueError, f"`{name}` .*real token"),
        ({mask_name: torch.ones(2, 2)}, ValueError, rf"mask of `{name}` .*\[4, 16\].*got \[2, 2\]"),
    )
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            pretraining(**training_batch(**changes))


def test_misspelt_training_arguments(pretraining, retrieval):
    with pytest.raises(TypeError, match="'image_ids'"):
        pretraining(**training_batch(image_ids=TRAIN["image_ids"]))
    with pytest.raises(TypeError, match="'imageids'"):
        retrieval(**training_batch(imageids=TRAIN["image_ids"]))
    assert pretraining(**training_batch()).loss.isfinite() and retrieval(**training_batch()).loss.isfinite()


# ----------------------------------------------------------------------------------------------------------- configs

POSITIVE_INTEGERS = (0, -1, 2.5, "8", None, True)
FRACTIONS = (-0.1, 1, 1.5, "0.1", None, float("nan"))
ABOVE_ZERO = (0, -1e-6, "1e-6", None, float("nan"))
NOT_NEGATIVE = (-0.02, "0.02", None, float("nan"))
TOKENS = (-1, VOCABULARY, 1.0, "0", None)
BAD_FIELDS = {
    "InternVisionConfig": {
        **dict.fromkeys(("num_channels", "patch_size", "hidden_size", "intermediate_size"), POSITIVE_INTEGERS),
        "num_hidden_layers": POSITIVE_INTEGERS,
        "num_attention_heads": (*POSITIVE_INTEGERS, 24),
        "image_size": (*POSITIVE_INTEGERS, 57),
        "force_image_size": (0, -14, 57, 56.0, "56"),
        **dict.fromkeys(("dropout", "attention_dropout", "drop_path_rate"), FRACTIONS),
        "layer_norm_eps": ABOVE_ZERO,
        "initializer_range": NOT_NEGATIVE,
        "initializer_factor": ("0.1", None),
        "hidden_act": ("gleu", None, 3),
    },
    "QLlamaConfig": {
        **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), POSITIVE_INTEGERS),
        **dict.fromkeys(("max_position_embeddings", "num_query_token"), POSITIVE_INTEGERS),
        **dict.fromkeys(("cross_attention_frequency", "encoder_hidden_size"), POSITIVE_INTEGERS),
        "num_attention_heads": (*POSITIVE_INTEGERS, 3, 64),
        "num_key_value_heads": (0, -1, 2.5, "4", 3),
        "attention_dropout": FRACTIONS,
        "rms_norm_eps": ABOVE_ZERO,
        "rope_theta": ABOVE_ZERO,
        "initializer_range": NOT_NEGATIVE,
        "hidden_act": ("sulu", None),
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), TOKENS),
        "rope_scaling": ({"type": "linear", "factor": 2.0}, "linear"),
        "attention_bias": (True,),
        "tie_word_embeddings": (True,),
    },
    "InternVLConfig": {
        "clip_embed_dim": POSITIVE_INTEGERS,
        "attn_pool_num_heads": (*POSITIVE_INTEGERS, 3, 8),
        **dict.fromkeys(("num_query_token", "cross_attention_frequency"), POSITIVE_INTEGERS),
        "label_smoothing": FRACTIONS,
        **dict.fromkeys(("use_backbone_lora", "use_qllama_lora"), (-1, 1.5, "8", None)),
        "force_image_size": (0, -14, 57, "56"),
        "caption_prompt_ids": ([], [-1], [VOCABULARY], ["a"], 5, "abc", [1.5]),
        "embed_prefix_ids": ([], [-1], [VOCABULARY], ["a"], 5, "abc", [1.5]),
        "initializer_range": NOT_NEGATIVE,
        "tie_word_embeddings": (True,),
    },
}
FIELDS = [(kind, name) for kind, names in BAD_FIELDS.items() for name in names]
FILES = {
    "InternVisionConfig": "configuration_intern_vit",
    "QLlamaConfig": "configuration_internvl",
    "InternVLConfig": "configuration_internvl",
}


def fields_of(kind: str) -> dict:
    """Valid arguments for a config class: those of golden/tiny."""
    top = json.loads((GOLDEN / "tiny" / "config.json").read_text())
    return {"InternVisionConfig": top["vision_config"], "QLlamaConfig": top["qllama_config"]}.get(kind, top)


def config_class(kind: str):
    return repo_class(f"{FILES[kind]}.{kind}")


@pytest.mark.parametrize("kind, name", FIELDS)
def test_fields_out_of_range(kind, name):
    fields = fields_of(kind)
    config_class(kind)(**fields)  # they are valid as they are
    for value in BAD_FIELDS[kind][name]:
        with pytest.raises((ValueError, TypeError), match=f"`{name}` must be ") as error:
            config_class(kind)(**(fields | {name: value}))
        assert repr(value) in str(error.value)


@pytest.mark.parametrize("kind, name", [("vision_config", "patch_size"), ("qllama_config", "vocab_size")])
def test_fields_of_sub_configs_are_checked(kind, name):
    fields = fields_of("InternVLConfig")
    with pytest.raises(ValueError, match=f"`{name}` must be a positive integer, got 0"):
        config_class("InternVLConfig")(**(fields | {kind: fields[kind] | {name: 0}}))
    config = golden_config()
    setattr(getattr(config, kind), name, 0)  # spoilt after it was built
    with pytest.raises(ValueError, match=f"`{name}` must be a positive integer, got 0"):
        config_class("InternVLConfig")(**(fields | {kind: getattr(config, kind)}))


@pytest.mark.parametrize("name", ["vision_config", "qllama_config"])
@pytest.mark.parametrize("value", [3, "x", [], True, ("a", 1)])
def test_sub_configs_of_wrong_type(name, value):
    with pytest.raises(TypeError, match=f"`{name}` must be a dict or .*Config, got {type(value).__name__}"):
        config_class("InternVLConfig")(**(fields_of("InternVLConfig") | {name: value}))


@pytest.mark.parametrize(
    "name, kind",
    [("vision_config", "QLlamaConfig"), ("vision_config", "InternVLConfig"), ("qllama_config", "InternVisionConfig")],
)
def test_sub_configs_of_the_wrong_tower(name, kind):
    value = config_class(kind)(**copy.deepcopy(fields_of(kind)))
    with pytest.raises(TypeError, match=f"`{name}` must be .*got {kind}"):
        config_class("InternVLConfig")(**(fields_of("InternVLConfig") | {name: value}))


def test_configs_given_as_objects_are_left_alone():
    """What the composite config sets on its parts must not reach the caller's own objects."""
    vision = config_class("InternVisionConfig")(**fields_of("InternVisionConfig"))
    qllama = config_class("QLlamaConfig")(**fields_of("QLlamaConfig"))
    before = copy.deepcopy((vision.to_dict(), qllama.to_dict()))
    top = fields_of("InternVLConfig") | {"vision_config": vision, "qllama_config": qllama, "force_image_size": 98}
    assert config_class("InternVLConfig")(**top).vision_config.force_image_size == 98
    assert (vision.to_dict(), qllama.to_dict()) == before


@pytest.mark.parametrize("count, cached", [(21, False), (4, True)])
def test_bidirectional_positions_are_the_first_of_the_sequence(model, count, cached):
    cache = model.qllama.model(IDS, use_cache=True)[1] if cached else None
    with pytest.raises(ValueError, match="`num_bidirectional` must be at most 20, and 0 with a filled cache"):
        model.qllama.model(IDS, past_key_values=cache, num_bidirectional=count)
