"""Pipelines that are loaded by the repository's name alone give the results of the model and the processor."""

import shutil

import pytest
import torch
import transformers
from transformers import AutoTokenizer, pipeline

from conftest import NAMES, opaque_images, run_python

LABELS = ["rocket", "panda", "lion", "pizza"]
TEMPLATES = ["This is a photo of {}.", "{}的图片", "{}の写真", "summarize:a photo of {}"]


@pytest.fixture(scope="module")
def make(trained):
    def make_pipeline(task, **options):
        return pipeline(task, model=str(trained), trust_remote_code=True, **{"dtype": torch.float32} | options)

    return make_pipeline


@pytest.fixture(scope="module")
def classify(make):
    return make("zero-shot-image-classification")


def expected_scores(model, processor, template, mode=None):
    """[images, labels]"""
    inputs = processor(images=opaque_images(), text=[template.format(label) for label in LABELS])
    with torch.inference_mode():
        return model(**inputs, mode=mode).logits_per_image.softmax(-1)


def scores_of(found):
    by_label = [{entry["label"]: entry["score"] for entry in entries} for entries in found]
    return torch.tensor([[scores[label] for label in LABELS] for scores in by_label])


# ------------------------------------------------------------------------------- zero-shot-image-classification


@pytest.mark.parametrize("template", TEMPLATES)
def test_zero_shot_applies_the_recipe_with_any_template(classify, tiny, processor, template, caplog):
    found = classify(opaque_images(), candidate_labels=LABELS, hypothesis_template=template)
    torch.testing.assert_close(scores_of(found), expected_scores(tiny, processor, template), rtol=1e-4, atol=1e-5)
    assert "summarize" not in caplog.text and "</s>" not in caplog.text


def test_zero_shot_finds_the_right_labels_by_default(classify):
    found = classify(opaque_images(), candidate_labels=LABELS)
    assert [entries[0]["label"] for entries in found] == NAMES


def test_zero_shot_in_batches_and_from_a_generator(classify, tiny, processor):
    expected = expected_scores(tiny, processor, "a {}")
    options = {"candidate_labels": LABELS, "hypothesis_template": "a {}"}
    for found in (
        classify(opaque_images(), batch_size=3, **options),
        list(classify((each for each in opaque_images()), **options)),
    ):
        torch.testing.assert_close(scores_of(found), expected, rtol=1e-4, atol=1e-5)


def test_zero_shot_uses_the_default_mode_of_the_model(make, tiny, processor):
    classify = make("zero-shot-image-classification")
    classify.model.default_mode = "InternVL-G"
    found = scores_of(classify(opaque_images(), candidate_labels=LABELS, hypothesis_template="a {}"))
    expected = [expected_scores(tiny, processor, "a {}", mode) for mode in ("InternVL-G", "InternVL-C")]
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1], rtol=1e-3)


def test_zero_shot_with_a_device_map(make, classify):
    spread = make("zero-shot-image-classification", device_map="auto")
    options = {"candidate_labels": LABELS}
    torch.testing.assert_close(
        scores_of(spread(opaque_images(), **options)), scores_of(classify(opaque_images(), **options))
    )


def test_zero_shot_with_parts_that_are_already_loaded(trained, tiny, processor, classify):
    tokenizer = AutoTokenizer.from_pretrained(trained, trust_remote_code=True, default_task="embed")
    parts = {"model": tiny, "tokenizer": tokenizer, "image_processor": processor.image_processor}
    found = pipeline("zero-shot-image-classification", **parts)(opaque_images(), candidate_labels=LABELS)
    torch.testing.assert_close(scores_of(found), scores_of(classify(opaque_images(), candidate_labels=LABELS)))


# --------------------------------------------------------------------------------------------- features


def test_image_features_are_the_tokens_and_with_pool_the_embeddings(make, tiny, processor):
    extract = make("image-feature-extraction")
    pixels = processor(images=opaque_images()).pixel_values
    with torch.inference_mode():
        tokens, embeds = tiny.vision_model(pixels).last_hidden_state, tiny.embed_image(pixels)
    for options in ({}, {"batch_size": 3}):
        found = torch.tensor(extract(opaque_images(), **options)).squeeze(1)  # [4, 1 + N, C]
        torch.testing.assert_close(found, tokens, rtol=1e-4, atol=1e-4)
        pooled = torch.tensor(extract(opaque_images(), pool=True, **options)).reshape(4, -1)
        torch.testing.assert_close(pooled, embeds, rtol=1e-4, atol=1e-5)
    one = extract(opaque_images()[0], pool=True, return_tensors=True)
    torch.testing.assert_close(one, embeds[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}])
def test_text_features_are_the_embeddings(make, tiny, processor, options):
    texts = ["panda", "a very old steam locomotive", "狐狸的图片"]
    with torch.inference_mode():
        expected = tiny.embed_text(**processor(text=texts))
    found = make("feature-extraction")(texts, **options)
    torch.testing.assert_close(torch.tensor(found).reshape(3, -1), expected, rtol=1e-4, atol=1e-5)


def test_a_generator_of_texts(make):
    extract = make("feature-extraction", device_map="auto")
    texts = ["panda", "lion"]
    assert list(extract(text for text in texts)) == extract(texts)


# --------------------------------------------------------------------------------------------- captions


def test_captions_by_image_text_to_text(make, tiny, processor):
    write = make("image-text-to-text")
    prompts = ["English caption:", "中文描述:", "English caption:", "English caption:"]
    options = {"max_new_tokens": 8, "num_beams": 2}
    found = write(images=opaque_images(), text=prompts, generate_kwargs=options)
    inputs = processor(images=opaque_images(), text=prompts, task="caption")
    with torch.inference_mode():
        expected = processor.batch_decode(tiny.generate(**inputs, **options), skip_special_tokens=True)
    assert [entry["generated_text"].removeprefix(prompt) for entry, prompt in zip(found, prompts)] == expected
    assert len(set(expected)) > 1


# ------------------------------------------------------------------------------------------- the tokenizer itself


def test_tokenizer_for_embeddings_gives_the_processors_ids(trained, processor):
    tokenizer = AutoTokenizer.from_pretrained(trained, trust_remote_code=True, default_task="embed")
    texts = ["panda", "summarize:panda", " summarize: panda", "a  double  space", "狐狸"]
    found, expected = tokenizer(texts, padding=True, return_tensors="pt"), processor(text=texts)
    assert torch.equal(found.input_ids, expected.input_ids) and torch.equal(
        found.attention_mask, expected.attention_mask
    )
    assert tokenizer("panda").input_ids == found.input_ids[0][found.attention_mask[0] > 0].tolist()
    assert processor.tokenizer.default_task is None and not processor.tokenizer.add_eos_token


def test_tokenizer_refuses_another_task_and_wrong_types(trained):
    with pytest.raises(ValueError, match="default_task.*'caption'"):
        AutoTokenizer.from_pretrained(trained, trust_remote_code=True, default_task="caption")
    tokenizer = AutoTokenizer.from_pretrained(trained, trust_remote_code=True, default_task="embed")
    with pytest.raises(TypeError, match="`text` must be"):
        tokenizer([["a", "b"]])


def test_settings_of_a_pipeline_are_not_saved(make, tmp_path):
    extract = make("feature-extraction")
    extract.save_pretrained(tmp_path)
    assert extract.tokenizer.default_task == "embed"
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.default_task is None and not again.add_eos_token
    loaded = pipeline("feature-extraction", model=str(tmp_path), trust_remote_code=True, dtype=torch.float32)
    torch.testing.assert_close(torch.tensor(loaded("panda")), torch.tensor(extract("panda")))


# --------------------------------------------------------------------------------------- unsupported pipelines


@pytest.mark.parametrize("task, missing", [("image-classification", None), ("image-feature-extraction", "weights")])
def test_transformers_own_model_of_this_name_is_never_used(trained, tmp_path, task, missing):
    """Its class would ignore our config and be built with 7 billion random weights."""
    folder = shutil.copytree(trained, tmp_path / "repository")
    if missing:
        next(iter(folder.glob("*.safetensors"))).unlink()
    assert "InternVLModel" in (folder / "config.json").read_text() and hasattr(transformers, "InternVLModel")
    code = """
import sys
import torch
from transformers import pipeline
torch.set_default_device("meta")  # so that a failure of this test does not fill the memory
pipeline(sys.argv[1], model=sys.argv[2], trust_remote_code=True)
"""
    with pytest.raises(AssertionError, match="Could not load model"):
        run_python(code, tmp_path, task, folder)
