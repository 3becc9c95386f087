"""`caption` goes from images to texts; of several candidates it returns the nearest to the image."""

import pytest
import torch
from PIL import Image

from conftest import IMAGES, ROOT, golden_config, load, repo_class

PICTURES = sorted(map(str, (ROOT / "examples" / "pictures").glob("*.png")))
LENGTH = {"max_new_tokens": 12}
PROMPTS = ["English caption:", "中文描述:", "a", "English caption: a picture of"]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request, trained):
    return load(trained, dtype=getattr(torch, request.param)).eval()


@torch.no_grad()
def written(model, processor, pixels, **options):
    """The candidates of each image, by a plain call of `generate`."""
    texts = processor.batch_decode(model.generate(pixels, **options), skip_special_tokens=True)
    count = options["num_return_sequences"]
    return [[text.strip() for text in texts[start : start + count]] for start in range(0, len(texts), count)]


@torch.no_grad()
def cosines_with(model, processor, image, texts):
    """Cosines of one image with its candidates, one embedding at a time."""
    embed = model.embed_image(processor(images=image).pixel_values, mode="InternVL-G")[0].double()
    return torch.stack([model.embed_text(**processor(text=text))[0].double() @ embed for text in texts])


def replace_candidates(monkeypatch, model, processor, texts):
    """Let `generate` return these texts."""
    ids = processor.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").input_ids
    monkeypatch.setattr(model, "generate", lambda *arguments, **options: ids.long())


# -------------------------------------------------------------------------------------------------- several candidates


def test_the_nearest_of_the_beams_is_returned(model, processor):
    pixels = processor(images=PICTURES).pixel_values
    groups = written(model, processor, pixels, num_beams=5, num_return_sequences=5, **LENGTH)
    found = model.caption(processor, PICTURES, candidates=5, **LENGTH)
    assert len(found) == len(PICTURES)
    others = 0
    for path, caption, group in zip(PICTURES, found, groups, strict=True):
        assert caption in group and caption
        cosines = cosines_with(model, processor, path, group)
        # A batch rounds otherwise than a single text: in bfloat16 nearly equal candidates may change places.
        margin = 1e-5 if model.dtype == torch.float32 else 2e-2
        assert cosines[group.index(caption)] >= cosines.max() - margin
        others += caption != group[0]
    assert others, "the first beam always won, so nothing was chosen"


def test_the_nearest_of_samples_is_returned(tiny, processor):
    options = {"do_sample": True, "temperature": 2.0, "min_new_tokens": 3, **LENGTH}
    torch.manual_seed(0)
    found = tiny.caption(processor, IMAGES, candidates=4, **options)
    torch.manual_seed(0)
    with torch.no_grad():
        seen = tiny.look_at(processor(images=IMAGES).pixel_values)
    groups = written(tiny, processor, seen, num_return_sequences=4, **options)
    assert any(len(set(group)) == 4 for group in groups)
    for path, caption, group in zip(IMAGES, found, groups, strict=True):
        assert caption == group[cosines_with(tiny, processor, path, group).argmax()]


def test_more_beams_than_candidates(tiny, processor):
    """The candidates are the best results of the wider search."""
    pixels = processor(images=IMAGES).pixel_values
    groups = written(tiny, processor, pixels, num_beams=6, num_return_sequences=2, **LENGTH)
    found = tiny.caption(processor, IMAGES, candidates=2, num_beams=6, **LENGTH)
    for path, caption, group in zip(IMAGES, found, groups, strict=True):
        assert caption == group[cosines_with(tiny, processor, path, group).argmax()]


def test_an_image_is_captioned_as_alone(tiny, processor):
    together = tiny.caption(processor, IMAGES, PROMPTS, candidates=3, **LENGTH)
    alone = [tiny.caption(processor, path, prompt, candidates=3, **LENGTH)[0] for path, prompt in zip(IMAGES, PROMPTS)]
    assert together == alone


def test_towers_run_once(tiny, processor):
    """For the candidates and for the image's embedding."""
    runs = []
    towers = {"vision": tiny.vision_model, "queries": tiny.qllama.model.layers[0].cross_attn}
    hooks = [part.register_forward_hook(lambda *_, name=name: runs.append(name)) for name, part in towers.items()]
    try:
        tiny.caption(processor, IMAGES, candidates=3, **LENGTH)
    finally:
        [hook.remove() for hook in hooks]
    assert runs == ["vision", "queries"]


def test_the_cosine_decides_wherever_a_candidate_stands(tiny, processor, monkeypatch):
    names = ["rocket", "panda face", "pizza", "lion", "pizza"]
    for path in IMAGES:
        best = names[cosines_with(tiny, processor, path, names).argmax()]
        for shift in range(5):
            texts = names[shift:] + names[:shift]
            replace_candidates(monkeypatch, tiny, processor, texts)
            assert tiny.caption(processor, path, candidates=5) == [best]


def test_equal_candidates_are_one(tiny, processor, monkeypatch):
    replace_candidates(monkeypatch, tiny, processor, ["pizza"] * 3 + ["lion"] * 3)
    assert tiny.caption(processor, IMAGES[:2], candidates=3) == ["pizza", "lion"]


def test_an_empty_candidate_wins_only_among_empty_ones(tiny, processor, monkeypatch):
    """A prefix alone is empty too: it has no text to embed."""
    replace_candidates(monkeypatch, tiny, processor, ["", "summarize:", "pizza", "", "", "summarize:"])
    assert tiny.caption(processor, IMAGES[:2], candidates=3) == ["pizza", ""]
    replace_candidates(monkeypatch, tiny, processor, ["", ""])
    assert tiny.caption(processor, IMAGES[0], candidates=2) == [""]


# ------------------------------------------------------------------------------------------------------- one candidate


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 4}, {"do_sample": True, "temperature": 2.0}, {"repetition_penalty": 1.5}]
)
def test_one_candidate_is_what_generate_writes(model, processor, options):
    options = options | LENGTH
    torch.manual_seed(0)
    found = model.caption(processor, IMAGES, **options)
    torch.manual_seed(0)
    pixels = processor(images=IMAGES).pixel_values
    assert found == [text for (text,) in written(model, processor, pixels, num_return_sequences=1, **options)]


def test_prompts_for_all_images_or_for_each(tiny, processor):
    own = tiny.caption(processor, IMAGES, **LENGTH)
    assert own == tiny.caption(processor, IMAGES, "English caption:", **LENGTH), "the checkpoint's own prompt"
    chinese = tiny.caption(processor, IMAGES, "中文描述:", **LENGTH)
    mixed = tiny.caption(processor, IMAGES, ["中文描述:", "English caption:"] * 2, **LENGTH)
    assert mixed == [chinese[0], own[1], chinese[2], own[3]] and not set(own) & set(chinese)


@pytest.mark.parametrize("candidates", [1, 3])
def test_kinds_of_images(tiny, processor, candidates):
    wanted = tiny.caption(processor, IMAGES, candidates=candidates, **LENGTH)
    pixels = processor(images=IMAGES).pixel_values
    with torch.no_grad():
        given = [pixels, tiny.look_at(pixels), tiny.look_at(pixels, queries=False)]
    for each in given:
        assert tiny.caption(processor, pixel_values=each, candidates=candidates, **LENGTH) == wanted
        assert tiny.caption(processor, None, PROMPTS[:1] * 4, candidates, pixel_values=each, **LENGTH) == wanted
    images = [Image.open(path) for path in IMAGES]
    assert tiny.caption(processor, images, candidates=candidates, **LENGTH) == wanted
    assert tiny.caption(processor, images[0], candidates=candidates, **LENGTH) == wanted[:1]


def test_the_default_task_does_not_matter(tiny, processor):
    wanted = tiny.caption(processor, IMAGES, candidates=3, **LENGTH)
    processor.default_task = "caption"
    try:
        assert tiny.caption(processor, IMAGES, candidates=3, **LENGTH) == wanted
    finally:
        processor.default_task = "embed"


def test_settings_of_a_generation_config(tiny, processor):
    """Its other fields hold; its numbers of sequences and outputs are the method's own."""
    config = type(tiny.generation_config)(max_new_tokens=2, num_return_sequences=2, num_beams=2)
    config.return_dict_in_generate = True
    short = tiny.caption(processor, IMAGES, candidates=3, generation_config=config)
    assert short == tiny.caption(processor, IMAGES, candidates=3, max_new_tokens=2)
    assert len(tiny.caption(processor, IMAGES, generation_config=config)) == 4
    assert config.num_return_sequences == 2


def test_a_model_without_queries_writes_no_captions(processor):
    config = golden_config()
    config.contrastive_only = True
    model = repo_class("modeling_internvl.InternVLModel")(config).eval()
    with pytest.raises(ValueError, match="`caption` needs the queries.*without them"):
        model.caption(processor, IMAGES)
