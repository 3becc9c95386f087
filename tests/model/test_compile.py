"""torch.compile makes one graph of each part, once for all batches, lengths and decoding steps."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from conftest import TOLERANCE, golden, golden_model

INPUTS = golden("tiny/inputs")
PIXELS, PROMPTS = INPUTS["pixel_values"], INPUTS["prompt_ids"]
ATTENTIONS = ["eager", "sdpa"]
# The compiled calls and their inputs.
PARTS = {
    "vision_model": (lambda model, pixels: model.vision_model(pixels).last_hidden_state, "pixels"),
    "embed_image": (lambda model, pixels: model.embed_image(pixels, mode="InternVL-G"), "pixels"),
    "embed_text": (lambda model, ids: model.embed_text(ids), "ids"),
}
SHAPES = [(2, 7), (3, 9), (5, 12), (4, 20)]  # batch, and length of texts
DECODING = {"greedy": (1, {"num_beams": 1}), "beams": (3, {"num_beams": 5})}  # batch, and arguments


@pytest.fixture
def graphs():
    """A backend that counts its graphs and runs them unchanged."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


def make_batch(kind: str, rows: int, length: int) -> torch.Tensor:
    """Images or texts, with dynamic sizes marked. In torch a batch of one has its own graph."""
    generator = torch.Generator().manual_seed(rows)
    if kind == "pixels":
        batch, varying = torch.randn(rows, 3, 56, 56, generator=generator), {0}
    else:
        batch, varying = torch.randint(3, 320, (rows, length), generator=generator), {0, 1}
        batch[:, -1] = 2  # </s>
    torch._dynamo.mark_dynamic(batch, sorted(varying - {0} if rows == 1 else varying))
    return batch


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_all_batches_share_one_graph(graphs, part, attention):
    call, kind = PARTS[part]
    model = golden_model(attn_implementation=attention)
    compiled = torch.compile(call, fullgraph=True, backend=graphs)
    for rows, length in SHAPES:
        batch = make_batch(kind, rows, length)
        assert_close(compiled(model, batch), call(model, batch), **TOLERANCE)
        assert graphs.frame_count == 1
    batch = make_batch(kind, 1, 5)
    assert_close(compiled(model, batch), call(model, batch), **TOLERANCE)
    assert graphs.frame_count == 2


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("decoding", DECODING)
def test_all_decoding_steps_share_one_graph(graphs, decoding, attention):
    model, (rows, arguments) = golden_model(attn_implementation=attention), DECODING[decoding]
    arguments = {"max_new_tokens": 12, "min_new_tokens": 12, **arguments}
    prompts = PROMPTS[:rows].clone()
    prompts[0, 3:] = 0  # padded, so that rows have their own masks and positions
    expected = model.generate(PIXELS[:rows], prompts, **arguments)
    model.qllama.compile(fullgraph=True, backend=graphs)
    for _ in range(2):
        tokens = model.generate(PIXELS[:rows], prompts, cache_implementation="static", **arguments)
        assert tokens.tolist() == expected.tolist()
        assert graphs.frame_count == 2  # the first step gets the prompt's last embedding, all others get an id
    shorter = arguments | {"max_new_tokens": 7, "min_new_tokens": 7}
    model.generate(PIXELS[:rows], prompts, cache_implementation="static", **shorter)
    assert graphs.frame_count == 2


@torch.no_grad()
def test_layers_are_compiled_once_for_all(graphs):
    model = golden_model()
    calls = {
        "image": lambda: model.embed_image(PIXELS, mode="InternVL-G"),
        "text": lambda: model.embed_text(make_batch("ids", 2, 7)),
        "caption": lambda: model.generate(PIXELS[:2], PROMPTS[:2], max_new_tokens=5, min_new_tokens=5),
    }
    expected = {name: call() for name, call in calls.items()}
    depth = len(model.vision_model.encoder.layers), len(model.qllama.model.layers)
    model.compile_layers(backend=graphs)
    assert_close(
        model.vision_model(PIXELS).last_hidden_state, golden("tiny/expected")["vision.last_hidden_state"], **TOLERANCE
    )
    assert depth == (3, 4) and graphs.frame_count == 1
    for name, call in calls.items():
        assert_close(call(), expected[name], **TOLERANCE)
    count = graphs.frame_count
    for call in calls.values():
        call()
    assert graphs.frame_count == count
