"""With device maps and disk offload every method gives the bits of the plain model."""

import pytest
import torch

from conftest import IDS, IMAGES, PIXELS, load

pytest.importorskip("accelerate")
from accelerate import cpu_offload

PLANS = {
    "in memory": {"": "cpu"},
    "split": {"": "cpu", "qllama": "disk", "query_tokens": "disk", "vision_model.encoder.layers.1": "disk"},
    "all on disk": {"": "disk"},
    "offloaded between calls": None,  # by accelerate's `cpu_offload`, which also takes the model's own parameters
}
CALLS = {
    "InternVL-C": lambda model: model(IDS, PIXELS, mode="InternVL-C").to_tuple(),
    "InternVL-G": lambda model: model(IDS, PIXELS, mode="InternVL-G").to_tuple(),
    "embed_image": lambda model: (model.embed_image(PIXELS, "InternVL-G"),),
    "embed_text": lambda model: (model.embed_text(IDS, IDS > 0),),
    "encode_image": lambda model: (model.encode_image(PIXELS), model.encode_image(PIXELS, "InternVL-G")),
    "encode_text": lambda model: (model.encode_text(IDS),),
    "match": lambda model: (model.match(PIXELS, IDS), model.match(PIXELS, IDS, all_pairs=True)),
    "features": lambda model: (*model.get_image_features(PIXELS), model.get_text_features(IDS)),
}
CAPTIONS = {
    "greedy": {"max_new_tokens": 5},
    "beams": {"max_new_tokens": 5, "num_beams": 3},
    "static": {"max_new_tokens": 5, "cache_implementation": "static"},
}


@pytest.fixture(scope="module")
def plain(trained):
    return load(trained, dtype=torch.bfloat16)


def plans():
    """The plans' names; those with a `device_map` need the feature of that name."""
    maps = pytest.mark.feature("device maps")
    return [pytest.param(name, marks=maps if plan else ()) for name, plan in PLANS.items()]


@pytest.fixture(scope="module", params=plans())
def mapped(request, trained, tmp_path_factory):
    plan, folder = PLANS[request.param], str(tmp_path_factory.mktemp("offload"))
    if plan is None:
        model = cpu_offload(load(trained, dtype=torch.bfloat16), execution_device=torch.device("cpu"))
        assert model.query_tokens.device.type == "meta"
    else:
        model = load(trained, dtype=torch.bfloat16, device_map=plan, offload_folder=folder)
    on_meta = any(parameter.device.type == "meta" for parameter in model.parameters())
    assert on_meta == (request.param != "in memory")
    return model


@pytest.mark.parametrize("call", CALLS)
@torch.inference_mode()
def test_every_method_gives_the_same_bits(mapped, plain, call):
    wanted = CALLS[call](plain)
    for _ in range(2):  # a second call must fetch the weights again
        assert all(torch.equal(*pair) for pair in zip(CALLS[call](mapped), wanted, strict=True))


@pytest.mark.feature("captions")
@pytest.mark.parametrize("way", CAPTIONS)
def test_captions_are_the_same(mapped, plain, way):
    assert mapped.generate(PIXELS, **CAPTIONS[way]).tolist() == plain.generate(PIXELS, **CAPTIONS[way]).tolist()


@pytest.mark.feature("captions")
def test_the_nearest_of_several_captions_is_the_same(mapped, plain, processor):
    """Its steps have hooks of their own: states, candidates and embeddings pass from one to the next."""
    options = {"prompt": ["English caption:", "a", "中文描述:", "a"], "candidates": 3, "max_new_tokens": 5}
    wanted = plain.caption(processor, IMAGES, **options)
    for _ in range(2):
        assert mapped.caption(processor, IMAGES, **options) == wanted
