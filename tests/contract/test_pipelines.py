"""Pipelines loaded by the path of the repository give the outputs of the model and the processor."""

import pytest
import torch
from transformers import pipeline

from conftest import NAMES, opaque_images

LABELS = ["rocket", "panda", "lion", "pizza"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def images():
    return opaque_images()


@pytest.fixture(scope="module")
def make(trained):
    return lambda task: pipeline(task, model=str(trained), trust_remote_code=True, dtype=torch.float32)


@torch.inference_mode()
def test_zero_shot_image_classification(make, tiny, processor, images):
    classify = make("zero-shot-image-classification")
    for template in ("This is a photo of {}.", "{}的图片"):
        inputs = processor(images=images, text=[template.format(label) for label in LABELS])
        wanted = tiny(**inputs).logits_per_image.softmax(-1)
        for options in ({}, {"batch_size": 3}):
            found = classify(images, candidate_labels=LABELS, hypothesis_template=template, **options)
            scores = [{entry["label"]: entry["score"] for entry in entries} for entries in found]
            rows = torch.tensor([[row[label] for label in LABELS] for row in scores])
            torch.testing.assert_close(rows, wanted, **CLOSE)
            assert [entries[0]["label"] for entries in found] == NAMES


@torch.inference_mode()
def test_image_feature_extraction(make, tiny, processor, images):
    extract = make("image-feature-extraction")
    pixels = processor(images=images).pixel_values
    tokens, embeds = tiny.vision_model(pixels).last_hidden_state, tiny.embed_image(pixels)
    torch.testing.assert_close(torch.tensor(extract(images)).squeeze(1), tokens, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(extract(images, pool=True)).reshape(4, -1), embeds, **CLOSE)


@torch.inference_mode()
def test_feature_extraction(make, tiny, processor):
    texts = ["panda", "a very old steam locomotive", "狐狸的图片"]
    wanted = tiny.embed_text(**processor(text=texts))
    for options in ({}, {"batch_size": 2}):
        found = make("feature-extraction")(texts, **options)
        torch.testing.assert_close(torch.tensor(found).reshape(3, -1), wanted, **CLOSE)


@pytest.mark.feature("captions")
def test_image_text_to_text(make, tiny, processor, images):
    write = make("image-text-to-text")
    prompts = ["English caption:", "中文描述:", "English caption:", "English caption:"]
    options = {"max_new_tokens": 8, "num_beams": 2}
    found = write(images=images, text=prompts, generate_kwargs=options)
    wanted = tiny.generate(**processor(images=images, text=prompts, task="caption"), **options)
    captions = processor.batch_decode(wanted, skip_special_tokens=True)
    assert [entry["generated_text"].removeprefix(prompt) for entry, prompt in zip(found, prompts)] == captions
    assert len(set(captions)) > 1
    alone = write(images=images[0], text=prompts[0], generate_kwargs=options, return_full_text=False)
    assert alone[0]["generated_text"] == captions[0]
