"""Optimisations change no result: images are encoded once, padding is skipped, prompts run once per image."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import TOLERANCE, golden, golden_config, golden_model, repo_class

MODES = ("InternVL-C", "InternVL-G")


class Calls:
    """Counts how often modules ran, and on inputs of which shape."""

    def __init__(self, *modules: nn.Module):
        self.sizes: list[tuple[int, ...]] = []
        for module in modules:
            module.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        given = [*args, *kwargs.values()]
        self.sizes.append(tuple(next(value for value in given if isinstance(value, torch.Tensor)).shape))


@pytest.fixture
def inputs():
    return golden("tiny/inputs")


def texts(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids of these lengths that end in `</s>`, padded on the right, and their mask."""
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(3, 90, (length,), generator=generator) for length in lengths]
    for row in rows:
        row[0], row[-1] = 1, 2
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, ids > 0


# ----------------------------------------------------------------------------------------------- images encoded once


@torch.no_grad()
def test_look_at_gives_every_call_the_same_results(model, inputs):
    pixels, (ids, mask) = inputs["pixel_values"], texts(4, 7)

    def every_call(images):
        return [
            *(model.embed_image(images, mode) for mode in MODES),
            model.encode_image(images, "InternVL-G"),
            model(input_ids=ids, pixel_values=images, mode="InternVL-G").logits_per_image,
            model.match(images, ids, mask, all_pairs=True),
            model.generate(images, max_new_tokens=6, min_new_tokens=4),
            model.generate(images, ids[:1, :3], max_new_tokens=6, min_new_tokens=4, num_beams=3),
        ]

    wanted = every_call(pixels)
    towers, queries = Calls(model.vision_model), Calls(model.qllama.model.layers[0].cross_attn)

    seen = model.look_at(pixels)
    assert len(towers.sizes) == len(queries.sizes) == 1
    keys = [layer.keys.clone() for layer in seen.query_cache.layers]
    found = every_call(seen)

    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, rtol=0, atol=0)
    assert len(towers.sizes) == 1 and len(queries.sizes) == 1 + len(pixels)  # matching runs the queries with every text
    assert all(map(torch.equal, keys, (layer.keys for layer in seen.query_cache.layers)))


@torch.no_grad()
def test_queries_run_when_they_are_needed_after_look_at(model, inputs):
    pixels = inputs["pixel_values"]
    seen = model.look_at(pixels, queries=False)
    assert seen.query_states is None and seen.query_cache is None
    assert_close(seen.image_states, golden("tiny/expected")["image_features.backbone"], **TOLERANCE)
    for mode in MODES:
        assert_close(model.embed_image(seen, mode), model.embed_image(pixels, mode), rtol=0, atol=0)
    assert torch.equal(model.generate(seen, max_new_tokens=5), model.generate(pixels, max_new_tokens=5))


def test_look_at_takes_only_images(model, inputs):
    for what in (None, "a.png", model.look_at(inputs["pixel_values"], queries=False)):
        with pytest.raises(TypeError, match=f"`pixel_values` must be a tensor.*{type(what).__name__}"):
            model.look_at(what)


def test_a_model_without_queries_refuses_them():
    config = golden_config()
    config.contrastive_only = True
    model = repo_class("modeling_internvl.InternVLModel")(config).eval()
    pixels = golden("tiny/inputs")["pixel_values"]
    with pytest.raises(ValueError, match="`look_at` with `queries=True`.*without them"):
        model.look_at(pixels)
    with torch.no_grad():
        seen = model.look_at(pixels, queries=False)
        assert_close(model.embed_image(seen), model.embed_image(pixels), rtol=0, atol=0)


@torch.no_grad()
def test_look_at_gives_the_original_features(model, inputs):
    seen, expected = model.look_at(inputs["pixel_values"]), golden("tiny/expected")
    assert_close(seen.image_states, expected["image_features.backbone"], **TOLERANCE)
    assert_close(seen.query_states, expected["image_features.query"], **TOLERANCE)


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_several_prompts_for_one_image(model, inputs, beams):
    image, (ids, mask) = inputs["pixel_values"][:1], texts(3, 6, 4)
    ids = ids.masked_fill(ids == 2, 5)  # a prompt does not end in </s>
    options = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6}
    alone = [model.generate(image, row[None, :length], **options) for row, length in zip(ids, (3, 6, 4), strict=True)]
    towers, queries = Calls(model.vision_model), Calls(model.qllama.model.layers[0].cross_attn)
    together = model.generate(image, ids, mask, **options)
    assert_close(together, torch.cat(alone), rtol=0, atol=0)
    assert len(towers.sizes) == len(queries.sizes) == 1
    assert_close(model.generate(model.look_at(image), ids, mask, **options), together, rtol=0, atol=0)


@torch.no_grad()
def test_beams_share_the_prompt(model, inputs):
    pixels, (ids, mask) = inputs["pixel_values"][:1], texts(5)
    layers, head = Calls(model.qllama.model.layers[0]), Calls(model.qllama.lm_head)
    model.generate(pixels, ids.masked_fill(ids == 2, 5), mask, num_beams=5, max_new_tokens=3, min_new_tokens=3)
    queries = model.config.num_query_token
    assert [size[:2] for size in layers.sizes] == [(1, queries + 4), (5, 1), (5, 1), (5, 1)]
    assert [size[:2] for size in head.sizes] == [(5, 1), (5, 1), (5, 1)]


# ------------------------------------------------------------------------------------------------ padding is skipped


@torch.no_grad()
def test_columns_of_padding_are_not_computed(model):
    ids, mask = texts(4, 7)
    padded = nn.functional.pad(ids, (0, 80 - 7))
    wanted, states = model.embed_text(ids, mask), model.get_text_features(ids, mask)
    pixels, layers = golden("tiny/inputs")["pixel_values"], Calls(model.qllama.model.layers[0])
    assert_close(model.embed_text(padded), wanted, rtol=0, atol=0)
    assert_close(model.encode_text(padded.flip(1), padded.flip(1) > 0).shape, wanted.shape)
    found = model.get_text_features(padded)
    assert found.shape[:2] == padded.shape
    assert_close(found[:, :7][mask], states[mask], rtol=0, atol=0)
    assert {size[1] for size in layers.sizes} == {7}
    layers.sizes.clear()
    assert_close(model.match(pixels[:2], padded), model.match(pixels[:2], ids, mask), rtol=0, atol=0)
    assert {size[1] for size in layers.sizes} == {7 + model.config.num_query_token}


@torch.no_grad()
def test_states_return_to_the_positions_of_their_tokens(model):
    ids, mask = texts(4, 7, 2)
    wanted = model.get_text_features(ids, mask)
    holes = torch.zeros(3, 12, dtype=torch.long)
    places = torch.tensor([0, 2, 3, 5, 6, 8, 11])
    holes[:, places] = ids
    found = model.get_text_features(holes, holes > 0)[:, places]
    assert_close(found[mask], wanted[mask], rtol=0, atol=0)
    left = torch.stack([row.roll(int(7 - length)) for row, length in zip(ids, mask.sum(1), strict=True)])
    found = model.get_text_features(left)
    assert_close(found[left > 0], wanted[mask], rtol=0, atol=0)


# --------------------------------------------------------------------------------------------- texts of similar length


@torch.no_grad()
def test_any_number_of_texts(model):
    lengths = [5, 9, 3, 40, 12, 5, 5, 6, 39, 3, 20, 21, 22, 4] * 3
    ids, mask = texts(*lengths)
    rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    wanted = model.embed_text(ids, mask)
    layers = Calls(model.qllama.model.layers[0])
    found = model.embed_texts(rows, max_tokens=60)
    assert_close(found, wanted, **TOLERANCE)
    processed = [batch * length for batch, length, _ in layers.sizes]
    assert max(processed) <= 60 and sum(processed) <= 1.1 * sum(lengths)
    assert_close(model.embed_texts(rows, normalize=False), model.embed_text(ids, mask, normalize=False), **TOLERANCE)
    assert not torch.is_grad_enabled() and len(model.embed_texts(rows[:1], max_tokens=1)) == 1


class Reads(TorchFunctionMode):
    """Records the calls that copy a value from the device to the host."""

    CALLS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero")

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.CALLS:
            self.calls.append(function.__name__)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_text_batch_is_read_from_the_device_once(model):
    """Each read waits until the device has done all the work before it."""
    ids, mask = texts(5, 9, 3)
    calls = (
        lambda: model.embed_text(ids, mask),
        lambda: model.encode_text(ids, mask),
        lambda: model.get_text_features(ids, mask),
        lambda: model.match(torch.zeros(3, 3, 56, 56), ids, mask),
    )
    for call in calls:
        with Reads() as reads, Operators() as operators:
            call()
        assert reads.calls == ["tolist"]
        assert not operators.names & {"_local_scalar_dense", "nonzero", "masked_select", "equal"}


@pytest.mark.parametrize("lengths", [[1], [80] * 5, list(range(1, 81)), [3] * 100 + [80], [80, 1, 80, 1]])
def test_batches_of_similar_length(lengths):
    batches = repo_class("texts_internvl.batches_of_similar_length")
    for most in (1, 64, 100, 4096):
        found = list(batches(lengths, most))
        assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
        sizes = [len(batch) * max(lengths[index] for index in batch) for batch in found]
        assert all(size <= most or len(batch) == 1 for size, batch in zip(sizes, found, strict=True))
        assert sum(sizes) <= 1.1 * sum(lengths)
    assert len(list(batches([7] * 64, 64 * 7))) == 1


@pytest.mark.parametrize(
    ("ids", "options", "error", "words"),
    [
        ([], {}, TypeError, "input_ids.*an empty list"),
        (None, {}, TypeError, "input_ids.*NoneType"),
        ([1, 5, 2], {}, ValueError, "input_ids.*got 1"),
        (torch.ones(2, 3, dtype=torch.long), {}, TypeError, "input_ids.*Tensor"),
        ("a panda", {}, TypeError, "input_ids.*str"),
        ([[1, 2], []], {}, ValueError, r"input_ids.*\[\]"),
        ([[1, 2], ["a"]], {}, ValueError, r"input_ids.*\['a'\]"),
        ([[1, 2], "a"], {}, ValueError, "input_ids.*'a'"),
        ([[1, 2], [1.5]], {}, ValueError, r"input_ids.*\[1.5\]"),
        ([[1, 2], [1, 100_000]], {}, ValueError, "100000"),
        ([[1, 2]], {"max_tokens": 0}, ValueError, "max_tokens.*0"),
    ],
)
def test_texts_that_cannot_be_embedded(model, ids, options, error, words):
    with pytest.raises(error, match=words):
        model.embed_texts(ids, **options)


def test_embed_classes_ignores_the_default_task(tiny, processor):
    expected = tiny.embed_classes(processor, ["panda"])
    processor.default_task = "caption"
    try:
        assert_close(tiny.embed_classes(processor, ["panda"]), expected, rtol=0, atol=0)
    finally:
        processor.default_task = "embed"
    with pytest.raises(TypeError, match="`processor`.*InternVLTokenizer"):
        tiny.embed_classes(processor.tokenizer, ["panda"])


def test_classes_are_the_means_of_their_texts(tiny, processor):
    names, templates = ["panda", "狐狸", "a slice of pizza"], ["{}", "a photo of a {}", "{c}的图片"]
    classes = tiny.embed_classes(processor, names, templates, max_tokens=40)
    assert not classes.requires_grad
    for name, embedding in zip(names, classes, strict=True):
        alone = tiny.embed_text(**processor(text=[name, f"a photo of a {name}", f"{name}的图片"])).mean(0)
        assert_close(embedding, nn.functional.normalize(alone, dim=-1), **TOLERANCE)
    assert_close(tiny.embed_classes(processor, names), tiny.embed_text(**processor(text=names)), **TOLERANCE)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((["panda"], ["a photo of"]), ValueError, "templates.*'a photo of'"),
        ((["panda"], ["{} and {}"]), ValueError, "templates.*'{} and {}'"),
        ((["panda"], ["a {name}"]), ValueError, "templates.*'a {name}'"),
        (([None], ["{}"]), TypeError, "names.*None"),
        ((["panda"], []), TypeError, "templates"),
        (([], ["{}"]), TypeError, "names"),
        (("panda", ["{}"]), TypeError, "names.*'panda'"),
        ((["panda"], "{}"), TypeError, "templates.*'{}'"),
    ],
)
def test_classes_that_cannot_be_embedded(tiny, processor, arguments, error, words):
    with pytest.raises(error, match=words):
        tiny.embed_classes(processor, *arguments)


# ---------------------------------------------------------------------------------------------------------- memory


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class Masks(TorchDispatchMode):
    """Records 4-D tensors whose last two sizes are in `sizes`, as those of a square mask."""

    def __init__(self, sizes):
        super().__init__()
        self.found, self.sizes = [], sizes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim == 4 and tuple(result.shape[-2:]) in self.sizes:
            self.found.append((str(function), tuple(result.shape)))
        return result


@torch.no_grad()
def test_matching_texts_of_several_lengths_allocates_no_square_mask(inputs):
    model = golden_model(attn_implementation="sdpa")
    ids, mask = texts(4, 7)
    length = model.config.num_query_token + 7
    with Masks({(length, length)}) as masks:
        model.match(inputs["pixel_values"][:2], ids, mask)
    assert not masks.found
