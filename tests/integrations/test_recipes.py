"""The model as a component: text encoder of a diffusion model, vision tower of LLaVA, video by its frames."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForTextEncoding

from conftest import ROOT, load

IMAGES = [ROOT / "examples" / "pictures" / f"{name}.png" for name in ("panda", "pizza", "lion")]


@pytest.fixture(scope="module")
def pixels(processor):
    return processor(images=IMAGES).pixel_values


# ------------------------------------------------------------------------------------------ LLaVA's vision tower


@torch.inference_mode()
def test_tower_with_images_first_and_without_a_name(tiny, pixels):
    vision, queries = tiny(pixels, output_hidden_states=True)
    layers, tokens = (
        tiny.config.vision_config.num_hidden_layers,
        (tiny.config.image_size // tiny.config.patch_size) ** 2,
    )
    assert len(vision.hidden_states) == layers + 1
    assert vision.hidden_states[-2].shape == (3, 1 + tokens, tiny.config.vision_config.hidden_size)
    assert queries.shape == (3, tiny.config.num_query_token, tiny.config.hidden_size)
    expected = tiny.vision_model(pixels, output_hidden_states=True)
    for one, other in zip(vision.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(vision.hidden_states[-1], vision.last_hidden_state)
    assert torch.equal(queries, tiny.get_image_features(pixels)[1])


@torch.inference_mode()
def test_tower_by_name_is_the_same(tiny, pixels):
    vision, queries = tiny(pixel_values=pixels, output_hidden_states=True)
    expected_vision, expected_queries = tiny(pixels, output_hidden_states=True)
    assert torch.equal(vision.last_hidden_state, expected_vision.last_hidden_state)
    assert torch.equal(queries, expected_queries)


def test_tower_is_for_images_alone(tiny, pixels, processor):
    texts = processor(text=["a", "b", "c"])
    for arguments in ({"input_ids": texts.input_ids}, {"pixel_values": pixels, **texts}, {}, {"image": pixels}):
        with pytest.raises(ValueError, match="`output_hidden_states` is for images alone"):
            tiny(**arguments, output_hidden_states=True)


def test_tower_without_queries_is_refused(trained, pixels):
    small = load(trained, dtype=torch.float32, contrastive_only=True)
    with pytest.raises(ValueError, match="`output_hidden_states` needs the queries"):
        small(pixels, output_hidden_states=True)


def test_sizes_are_in_the_config_as_in_a_vision_tower(tiny):
    config = tiny.config
    assert (config.image_size, config.patch_size) == (config.vision_config.image_size, config.vision_config.patch_size)
    assert config.hidden_size == config.qllama_config.hidden_size


# ------------------------------------------------------------------------------------ text encoder for diffusion


@torch.inference_mode()
def test_text_encoder_states_do_not_depend_on_padding(trained, tiny, processor):
    encoder = AutoModelForTextEncoding.from_pretrained(trained, trust_remote_code=True, dtype=torch.float32).eval()
    prompts = ["a red panda", "一只在雪地里的非常可爱的小熊猫", "ロケット"]
    inputs = processor(text=prompts, padding="max_length", max_length=40)
    output = encoder(**inputs)
    assert output.last_hidden_state.shape == (3, 40, tiny.config.hidden_size)
    for row, prompt in enumerate(prompts):
        alone = processor(text=[prompt])
        length = alone.input_ids.shape[1]
        expected = tiny.get_text_features(**alone)[0]
        torch.testing.assert_close(output.last_hidden_state[row, :length], expected, rtol=1e-4, atol=1e-4)
    assert inputs.attention_mask.sum(dim=1).tolist() == [len(processor(text=[p]).input_ids[0]) for p in prompts]


# --------------------------------------------------------------------------------------------------------- video


@torch.inference_mode()
def test_video_is_the_mean_of_its_frames_before_normalising(tiny, processor, pixels):
    """Frames of different lengths have different weights: the result is not the mean of unit vectors."""
    frames = tiny.embed_image(pixels, mode="InternVL-G", normalize=False)
    clip = F.normalize(frames.mean(dim=0), dim=-1)
    expected = F.normalize(sum(tiny.encode_image(each[None], "InternVL-G")[0] for each in pixels) / len(pixels), dim=-1)
    torch.testing.assert_close(clip, expected, rtol=1e-4, atol=1e-5)
    other = F.normalize(F.normalize(frames, dim=-1).mean(dim=0), dim=-1)
    assert not torch.allclose(clip, other, atol=1e-4)
