"""Tensor parallelism: the modules that `_tp_plan` splits; two processes (gloo, CPU) give the results of one."""

import os
import socket
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close
from transformers import AutoModel

from conftest import IS_V5, ROOT, TOLERANCE, golden_model, repo_class
from tools.machines import tensor_parallel_plan

WORLD = 2
TINY = {"subfolder": "tiny", "trust_remote_code": True, "dtype": torch.float32}
STATIC = {"cache_implementation": "static"} | ({"prefill_chunk_size": 4} if IS_V5 else {})
MODELS = ("golden", "tiny")  # 25 vision heads, loaded by its class; 4 heads, loaded by AutoModel from a subfolder


def load(name, folder, **parallel):
    if name == "tiny":
        return AutoModel.from_pretrained(ROOT, **TINY, **parallel)
    return repo_class("modeling_internvl.InternVLModel").from_pretrained(folder, dtype=torch.float32, **parallel)


def inputs_for(model):
    """Three images; texts that end with `</s>`, padded on the right; prompts without it, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, *2 * [model.config.vision_config.image_size], generator=generator)
    ids = torch.randint(3, model.config.qllama_config.vocab_size, (3, 7), generator=generator)
    ids[:, 0] = 1
    texts = torch.cat([ids, torch.full((3, 1), 2)], dim=1)
    texts[1, 4:] = torch.tensor([2, 0, 0, 0])
    prompts = ids.clone()
    prompts[2, :3] = torch.tensor([0, 0, 1])
    return images, texts, prompts


CALLS = {
    "forward-C": lambda m, pixels, texts, _: m(texts, pixels, mode="InternVL-C").to_tuple(),
    "forward-G": lambda m, pixels, texts, _: m(texts, pixels, mode="InternVL-G").to_tuple(),
    "forward-original": lambda m, pixels, texts, _: m(image=pixels, text=texts, mode="InternVL-G"),
    "encode_image-C": lambda m, pixels, *_: m.encode_image(pixels, "InternVL-C"),
    "encode_image-G": lambda m, pixels, *_: m.encode_image(pixels, "InternVL-G"),
    "encode_text": lambda m, _, texts, __: m.encode_text(texts),
    "embed_image-C": lambda m, pixels, *_: m.embed_image(pixels, "InternVL-C"),
    "embed_image-G": lambda m, pixels, *_: m.embed_image(pixels, "InternVL-G"),
    "embed_text": lambda m, _, texts, __: m.embed_text(texts, texts > 0),
    "match": lambda m, pixels, texts, _: m.match(pixels, texts),
    "match-all_pairs": lambda m, pixels, texts, _: m.match(pixels, texts[:2], all_pairs=True),
    "get_image_features": lambda m, pixels, *_: m.get_image_features(pixels),
    "get_text_features": lambda m, _, texts, __: m.get_text_features(texts),
    "hidden_states": lambda m, pixels, *_: m.vision_model(pixels, output_hidden_states=True).hidden_states,
    "generate-greedy": lambda m, pixels, _, prompts: m.generate(pixels, prompts, max_new_tokens=4),
    "generate-beams": lambda m, pixels, _, prompts: m.generate(pixels, prompts, num_beams=2, max_new_tokens=4),
    # With any options the cache holds only the heads of the rank.
    "generate-static": lambda m, pixels, _, prompts: m.generate(pixels, prompts[:1], max_new_tokens=4, **STATIC),
}


# By model: the second only has to show that it loads too.
COMPARED = {"golden": [*CALLS], "tiny": ["forward-G", "generate-greedy"]}


def results_of(name, model):
    inputs = inputs_for(model)
    with torch.inference_mode():
        results = {call: CALLS[call](model, *inputs) for call in COMPARED[name]}
    # transformers 5 runs its split layers differently when gradients are recorded.
    results["with-gradients"] = CALLS["forward-G"](model, *inputs)[0].detach()
    return results


def bytes_in_memory(model):
    """The memory that the parameters really use: a shard that is a view would keep the whole tensor."""
    tensors = {name: getattr(p, "_local_tensor", p) for name, p in model.named_parameters()}
    return {name: tensor.untyped_storage().nbytes() for name, tensor in tensors.items()}


# --------------------------------------------------------------------------------------------------- jobs of a rank


def work(rank, port, folder):
    torch.set_num_threads(1)
    # What torchrun sets; transformers itself starts the process group.
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        for name in MODELS:
            parallel = {"tp_plan": "auto"}
            if IS_V5 and name == "golden":  # the same under its new name; the old one warns
                parallel = {"distributed_config": {"tp_size": WORLD}}
            model = load(name, folder, **parallel).eval()
            held = bytes_in_memory(model)  # first: transformers 4.57 moves biases when it runs
            torch.save((held, results_of(name, model)), os.path.join(folder, f"{name}-rank{rank}.pt"))
        dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """By model, the bytes and results of each rank. The processes start once, because starting takes long."""
    folder = tmp_path_factory.mktemp("ranks")
    golden_model().save_pretrained(folder)
    load("tiny", None)  # the loader copies the code here, so that both ranks find it
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=WORLD)
    return {name: [torch.load(folder / f"{name}-rank{rank}.pt") for rank in range(WORLD)] for name in MODELS}


@pytest.fixture(scope="module")
def alone():
    """By model, the model and its results in one process."""
    models = {"golden": golden_model(), "tiny": load("tiny", None).eval()}
    return {name: (model, results_of(name, model)) for name, model in models.items()}


# ------------------------------------------------------------------------------------------------------ the tests


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "call"), [(name, call) for name in MODELS for call in [*COMPARED[name], "with-gradients"]]
)
def test_two_ranks_give_the_results_of_one(ranks, alone, name, call):
    _, expected = alone[name]
    for _, results in ranks[name]:
        assert_close(results[call], expected[call], **TOLERANCE)


@pytest.mark.heavy
def test_a_rank_holds_the_shards_of_the_plan(ranks, alone):
    # Only the tiny checkpoint: it is converted, while parts of the other one stay mapped from its file.
    model, _ = alone["tiny"]
    expected = tensor_parallel_plan.bytes_held(model, WORLD)
    for held, _ in ranks["tiny"]:
        assert held == expected
    assert sum(expected.values()) < 0.75 * sum(p.nbytes for p in model.parameters())


@pytest.fixture(scope="module")
def published():
    """The 14B model on the meta device."""
    return tensor_parallel_plan.empty_model(ROOT)


def test_every_rule_of_the_plan_matches_layers_and_no_two_overlap(published):
    layers = [name for name, _ in published.named_modules()]
    found = [tensor_parallel_plan.rules_for(published._tp_plan, layer) for layer in layers]
    assert {rule for rules in found for rule in rules} == set(published._tp_plan)
    assert max(map(len, found)) == 1


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_published_sizes_are_divisible(published, ranks):
    split = tensor_parallel_plan.split_dimensions(published)
    sizes = {name: published.get_parameter(name).shape[dimension] for name, dimension in split.items()}
    assert len(split) == 48 * (6 if IS_V5 else 7) + 32 * 7 + 16 * 4  # 4.57 also splits the bias of `fc2`
    assert [name for name, size in sizes.items() if size % ranks] == []
    heads = published.config.qllama_config.num_key_value_heads
    assert heads % ranks == 0 and published.config.qllama_config.num_attention_heads % heads == 0


def test_the_table_of_bytes_is_right(published, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tensor_parallel_plan.py"])
    tensor_parallel_plan.main()
    _, _, *lines = capsys.readouterr().out.splitlines()
    rows = [[float(cell) for cell in line.strip("|").split("|")] for line in lines]
    assert [ranks for ranks, _, _ in rows] == [1, 2, 4, 8]
    total, whole = rows[0][1:]
    assert total == pytest.approx(2 * 13_834_975_747 / 1e9, abs=0.01)
    for ranks, held, unsplit in rows:
        assert unsplit == whole and held == pytest.approx(whole + (total - whole) / ranks, abs=0.01)


@pytest.mark.parametrize("by", ["WORLD_SIZE", "tp_size", "distributed_config"])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_that_cannot_share_the_heads_are_refused_at_once(tmp_path, monkeypatch, name, by):
    monkeypatch.setenv("WORLD_SIZE", "3" if by == "WORLD_SIZE" else "1")
    parallel = {"WORLD_SIZE": {"tp_plan": "auto"}, "tp_size": {"tp_plan": "auto", "tp_size": 3}}
    if name == "golden":
        golden_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="over 3 ranks .* hidden_size=1(00|28) of intern_vit_6b is not divisible by 3"):
        load(name, tmp_path, **parallel.get(by, {"distributed_config": {"tp_size": 3}}))
    assert not dist.is_initialized()


def test_ranks_that_cannot_share_the_language_tower_are_refused():
    module = sys.modules[repo_class("loading_internvl.InternPreTrainedModel").__module__]
    config = load("tiny", None).config.qllama_config
    module.check_ranks(config, 4)
    with pytest.raises(ValueError, match="over 8 ranks .* num_key_value_heads=4 of qllama is not divisible by 8"):
        module.check_ranks(config, 8)


def test_one_rank_is_accepted(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    module = sys.modules[repo_class("loading_internvl.InternPreTrainedModel").__module__]
    assert module.tensor_parallel_ranks() == module.tensor_parallel_ranks(tp_plan="auto") == 1
    assert module.tensor_parallel_ranks(distributed_config={"fsdp_size": 2}) == 1
    assert load("tiny", None)._tp_size is None
