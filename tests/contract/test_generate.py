"""Every way to write captions gives the tokens of the goldens, or of an equivalent way."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from conftest import IMAGES, first_end, golden

pytestmark = pytest.mark.feature("captions")
INPUTS, EXPECTED = golden("tiny/inputs"), golden("tiny/expected")
PIXELS, PROMPTS = INPUTS["pixel_values"], INPUTS["prompt_ids"]
LENGTHS = {"max_new_tokens": 12, "min_new_tokens": 8}
GREEDY = LENGTHS | {"do_sample": False}
BEAMS = GREEDY | {"num_beams": 5}
GREEDY_TOKENS = EXPECTED["generate_greedy"][:, 1:].tolist()  # the original put <s> first
BEAM_TOKENS = EXPECTED["generate_beam5"][:, 1:].tolist()
WAYS = {"greedy": (GREEDY, GREEDY_TOKENS), "beams": (BEAMS, BEAM_TOKENS)}
UNEQUAL = torch.tensor([
    [0, 0, 0, 0, 1, 46, 22], [0, 0, 1, 46, 22, 269, 311], [1, 180, 33, 7, 5, 91, 12], [0, 0, 0, 0, 0, 0, 1],
])  # fmt: skip


@pytest.fixture
def model(golden_joint):
    return golden_joint


@pytest.mark.parametrize("way", WAYS)
def test_static_cache(model, way):
    options, tokens = WAYS[way]
    assert model.generate(PIXELS, PROMPTS, cache_implementation="static", **options).tolist() == tokens


@pytest.mark.parametrize("way", WAYS)
def test_without_a_cache(model, way):
    options, tokens = WAYS[way]
    assert model.generate(PIXELS, PROMPTS, use_cache=False, **options).tolist() == tokens


@pytest.mark.parametrize("options", [GREEDY, BEAMS, GREEDY | {"cache_implementation": "static"}])
def test_prompts_of_unequal_length(model, options):
    together = model.generate(PIXELS, UNEQUAL, (UNEQUAL > 0).long(), **options).tolist()
    for row, prompt in enumerate(UNEQUAL):
        alone = model.generate(PIXELS[row : row + 1], prompt[prompt > 0].unsqueeze(0), **options)[0].tolist()
        assert together[row][: len(alone)] == alone and not any(together[row][len(alone) :])
    assert len({tuple(row) for row in together}) > 1


@pytest.mark.parametrize("options", [GREEDY, BEAMS])
def test_a_static_cache_counts_padding_whose_embedding_is_zero(model, options):
    """As in a trained checkpoint."""
    padding = model.get_input_embeddings().weight[0]
    before = padding.detach().clone()
    try:
        padding.data.zero_()
        found = model.generate(PIXELS, UNEQUAL, (UNEQUAL > 0).long(), cache_implementation="static", **options)
        assert found.tolist() == model.generate(PIXELS, UNEQUAL, (UNEQUAL > 0).long(), **options).tolist()
    finally:
        padding.data.copy_(before)


@pytest.mark.parametrize("way", WAYS)
def test_one_image_with_many_prompts(model, way):
    options, _ = WAYS[way]
    many = model.generate(PIXELS[:1], UNEQUAL, (UNEQUAL > 0).long(), **options)
    repeated = model.generate(PIXELS[:1].expand(4, -1, -1, -1), UNEQUAL, (UNEQUAL > 0).long(), **options)
    assert many.tolist() == repeated.tolist()
    assert len({tuple(row) for row in many.tolist()}) > 1


def test_one_prompt_for_many_images(model):
    assert len({tuple(row) for row in PROMPTS.tolist()}) == 1
    assert model.generate(PIXELS, PROMPTS[:1], **GREEDY).tolist() == GREEDY_TOKENS


@torch.no_grad()
def test_look_at_is_reused_and_not_changed(model):
    seen = model.look_at(PIXELS)
    for _ in range(2):
        assert model.generate(seen, PROMPTS, **GREEDY).tolist() == GREEDY_TOKENS
        assert model.generate(seen, PROMPTS, **BEAMS).tolist() == BEAM_TOKENS
        assert model.generate(seen, PROMPTS, cache_implementation="static", **GREEDY).tolist() == GREEDY_TOKENS
    assert torch.equal(model.embed_image(seen, "InternVL-G"), model.embed_image(PIXELS, "InternVL-G"))


def sample(model, seed, **options):
    torch.manual_seed(seed)
    options = {"do_sample": True, "temperature": 2.0, "top_k": 50} | LENGTHS | options
    return model.generate(PIXELS, PROMPTS, **options).tolist()


def test_sampling_is_reproducible_by_its_seed(model):
    assert sample(model, 0) == sample(model, 0) != sample(model, 1)


def test_samples_belong_to_their_images(model):
    """At a very low temperature every sample is the greedy caption of its own image."""
    found = sample(model, 0, temperature=1e-4, num_return_sequences=2)
    assert found == [row for row in GREEDY_TOKENS for _ in range(2)]
    several = sample(model, 0, num_return_sequences=3)
    assert len(several) == 12 and len({tuple(row) for row in several}) > 4


def test_several_beams_are_returned(model):
    found = model.generate(PIXELS, PROMPTS, num_return_sequences=5, **BEAMS).tolist()
    assert found[::5] == BEAM_TOKENS and len({tuple(row) for row in found}) == 20


def test_dict_of_outputs(model):
    output = model.generate(PIXELS, PROMPTS, return_dict_in_generate=True, output_scores=True, **GREEDY)
    assert output.sequences.tolist() == GREEDY_TOKENS
    chosen = torch.stack(output.scores, dim=1).argmax(-1).tolist()
    assert len(output.scores) == len(GREEDY_TOKENS[0]) and output.scores[0].shape == (4, 320)
    assert [row[:8] for row in chosen] == [row[:8] for row in GREEDY_TOKENS]
    beams = model.generate(PIXELS, PROMPTS, return_dict_in_generate=True, output_scores=True, **BEAMS)
    assert beams.sequences.tolist() == BEAM_TOKENS and beams.sequences_scores.shape == (4,)


def test_streamer(model):
    class Collector(BaseStreamer):
        tokens: list[int] = []
        ended = False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    collector = Collector()
    model.generate(PIXELS[:1], PROMPTS[:1], streamer=collector, **GREEDY)
    assert collector.ended and collector.tokens == GREEDY_TOKENS[0]


def test_it_stops_at_eos_but_not_before_the_minimum_length(model):
    end, place = first_end(model)
    options = {"do_sample": False, "eos_token_id": end}
    ended = model.generate(PIXELS[:1], PROMPTS[:1], max_new_tokens=8, **options)
    assert ended.shape == (1, place + 1) and ended[0, -1] == end
    longer = model.generate(PIXELS[:1], PROMPTS[:1], max_new_tokens=8, min_new_tokens=place + 2, **options)
    assert longer.shape[1] >= place + 2 and end not in longer[0, : place + 2].tolist()
    assert model.generate(PIXELS[:1], PROMPTS[:1], max_new_tokens=2, **options).shape == (1, 2)
    rows = model.generate(PIXELS, PROMPTS, max_new_tokens=12, **options).tolist()
    alone = [
        model.generate(PIXELS[[row]], PROMPTS[[row]], max_new_tokens=12, **options)[0].tolist() for row in range(4)
    ]
    assert rows == [row + [0] * (len(rows[0]) - len(row)) for row in alone] and len({len(row) for row in alone}) > 1


def test_lengths_count_as_in_the_original(model):
    """`max_length` and `min_length` count the new tokens and one `<s>`, not the prompt and the queries."""
    end, place = first_end(model)
    options = {"do_sample": False, "eos_token_id": end}
    for prompt in (PROMPTS[:1], torch.tensor([[1]])):
        assert model.generate(PIXELS[:1], prompt, max_length=3, do_sample=False, eos_token_id=319).shape == (1, 2)
    for length in (19, 20, 21):  # 20 is the default of some releases
        assert model.generate(PIXELS[:1], PROMPTS[:1], max_length=length, eos_token_id=None).shape == (1, length - 1)
    by_length = model.generate(PIXELS[:1], PROMPTS[:1], max_length=9, min_length=place + 3, **options)
    by_new = model.generate(PIXELS[:1], PROMPTS[:1], max_new_tokens=8, min_new_tokens=place + 2, **options)
    assert by_length.tolist() == by_new.tolist() and by_length.shape[1] >= place + 2


def test_generation_config(model):
    before = model.generation_config.to_dict()
    config = GenerationConfig(num_beams=5, **LENGTHS)
    assert model.generate(PIXELS, PROMPTS, generation_config=config).tolist() == BEAM_TOKENS
    assert model.generate(PIXELS, PROMPTS, generation_config=config, num_beams=1).tolist() == GREEDY_TOKENS
    assert (config.num_beams, config.eos_token_id) == (5, None) and model.generation_config.to_dict() == before


def test_repetition_penalty_counts_new_tokens(model):
    """As in the original, only new tokens count as repetitions, not the prompt and the queries."""
    penalty, options = 5.0, {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 319}
    output = model.generate(
        PIXELS, PROMPTS, repetition_penalty=penalty, return_dict_in_generate=True, output_logits=True, **options
    )
    for row, tokens in enumerate(output.sequences.tolist()):
        for step, token in enumerate(tokens):
            scores = output.logits[step][row].clone()
            written = list(set(tokens[:step]))
            old = scores[written]
            scores[written] = torch.where(old < 0, old * penalty, old / penalty)
            assert int(scores.argmax()) == token
    assert output.sequences.tolist() != model.generate(PIXELS, PROMPTS, **options).tolist()


def test_a_logits_processor_of_the_user(model):
    class Without(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, torch.tensor([GREEDY_TOKENS[0][0]]), -torch.inf)

    found = model.generate(PIXELS[:1], PROMPTS[:1], logits_processor=LogitsProcessorList([Without()]), **GREEDY)
    assert GREEDY_TOKENS[0][0] not in found[0].tolist()


def test_call_of_the_original_card(model):
    mask = torch.ones_like(PROMPTS)
    found = model.generate(pixel_values=PIXELS, input_ids=PROMPTS, attention_mask=mask, num_beams=5, min_new_tokens=8)
    assert found.tolist() == model.generate(PIXELS, PROMPTS, num_beams=5, min_new_tokens=8, max_new_tokens=32).tolist()
    named = {"pixel_values": PIXELS, "input_ids": PROMPTS, "attention_mask": mask}
    assert model.generate(**named, num_beams=5, min_new_tokens=8, max_new_tokens=12).tolist() == BEAM_TOKENS


def test_without_a_prompt_and_in_training(model):
    start = model.generate(PIXELS, **GREEDY).tolist()
    assert start == model.generate(PIXELS, torch.tensor([[1]]), **GREEDY).tolist() != GREEDY_TOKENS
    try:
        found = model.train().generate(PIXELS, PROMPTS, **GREEDY)
    finally:
        model.eval()
    assert found.tolist() == GREEDY_TOKENS and not found.requires_grad


def test_it_stops_at_a_string(tiny, processor):
    inputs = processor(images=[torch.linspace(0, 1, 3 * 48 * 48).view(3, 48, 48)], task="caption")
    exactly = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    whole = processor.tokenizer.decode(tiny.generate(**inputs, **exactly)[0])
    (ids,) = tiny.generate(**inputs, stop_strings=[whole[2:4]], tokenizer=processor.tokenizer, **exactly)
    assert len(ids) < 8 and whole[2:4] in processor.tokenizer.decode(ids)


ARGUMENTS = ["max_new_token", "num_beam", "guidance_scale", "prompt_lookup_num_tokens", "position_ids"]


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_unsupported_arguments_are_refused(model, argument):
    with pytest.raises((ValueError, TypeError), match=argument):
        model.generate(PIXELS, PROMPTS, **{argument: 3})


@torch.no_grad()
def test_the_nearest_of_several_candidates(tiny, processor):
    """Beams and samples of every release choose among the texts that `generate` gives there."""
    pixels = processor(images=IMAGES).pixel_values
    seen = tiny.look_at(pixels)
    for ways in ({"num_beams": 4}, {"do_sample": True, "temperature": 2.0}):
        options = ways | {"max_new_tokens": 8, "min_new_tokens": 3}
        torch.manual_seed(0)
        texts = processor.batch_decode(tiny.generate(seen, num_return_sequences=4, **options), skip_special_tokens=True)
        embeds = tiny.embed_text(**processor(text=texts)).unflatten(0, (4, 4))
        best = (embeds @ tiny.embed_image(pixels, "InternVL-G").unsqueeze(-1)).squeeze(-1).argmax(1)
        torch.manual_seed(0)
        found = tiny.caption(processor, IMAGES, candidates=4, **options)
        assert found == [texts[4 * image + index].strip() for image, index in enumerate(best)]
