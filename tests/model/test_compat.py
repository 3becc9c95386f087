"""compat_internvl.py: each of its functions, and that no other module at the root does its work."""

import copy
import importlib.metadata
import importlib.util
import inspect
import json
import re
import shutil
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    ProcessorMixin,
    StaticCache,
)

from conftest import CODE, IS_V5, ROOT, golden_config, golden_model, load, repo_class, run_python

COMPAT = "compat_internvl.py"
# Versions of libraries, and names that they do not document.
VERSIONS = re.compile(r"\b(?:transformers|torch|torchao|accelerate|peft)\W{1,4}v?\d|(?<![\d.])(?:4\.57|5\.\d+\.\d+)\b")
UNDOCUMENTED = re.compile(
    r"__version__|_hf_hook|get_state_dict_and_metadata|\._tp_size\b|_gradient_checkpointing_func"
    r"|_keys_to_ignore_on_load|shard_and_distribute|\._attn_implementation|_is_hf_initialized|_from_pipeline"
    r"|is_compileable|or_mask_function|create_causal_mask|ALL_ATTENTION_FUNCTIONS|\.layers\[\w+\]\.keys|hf_quantizer"
    r"|inspect\.signature"
)


@pytest.fixture(scope="module")
def compat():
    """The module, as the loader imports it."""
    model = repo_class("modeling_internvl.InternVLModel")
    return inspect.getmodule(inspect.unwrap(sys.modules[model.__module__].with_accelerate_hook))


@pytest.fixture(scope="module")
def config():
    return golden_config().qllama_config


@pytest.mark.parametrize("name", sorted(set(CODE) - {COMPAT}))
def test_no_other_module_names_a_version_or_an_undocumented_name(name):
    lines = (ROOT / name).read_text().splitlines()
    found = [line for line in lines if VERSIONS.search(line) or UNDOCUMENTED.search(line)]
    assert found == []


def test_the_patterns_find_what_they_are_for():
    text = (ROOT / COMPAT).read_text()
    assert (
        VERSIONS.search("needs transformers 4.57") and VERSIONS.search("# torch 2.13 has") and VERSIONS.search("5.24.0")
    )
    assert not VERSIONS.search("6.7 of 13.8 billion") and not VERSIONS.search("a transformers release")
    assert len(set(UNDOCUMENTED.findall(text))) >= 12


# ------------------------------------------------------------------------------------------------------------- releases


@pytest.mark.parametrize("installed", ["4.56.2", "4.37.0", "3.5.1", "4.48.0.dev0"])
def test_an_old_transformers_is_refused_in_one_sentence(compat, installed):
    with pytest.raises(ImportError, match=rf"needs transformers 4\.57 or newer, but {installed} is .*pip install"):
        compat.check_release(installed)


@pytest.mark.parametrize("installed", ["4.57.0", "4.57.6", "5.1.0", "5.24.0", "5.25.0.dev0", "6.0.0rc1", "10.2"])
def test_newer_releases_are_not(compat, installed):
    compat.check_release(installed)


ENTRY_POINTS = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor")


def test_every_auto_class_says_so_before_anything_is_missing(flat, tmp_path):
    """With an old release's number: the check comes before whatever such a release lacks."""
    code = f"""
import sys, transformers
classes = [getattr(transformers, name) for name in {ENTRY_POINTS}]
sys.modules["transformers"].__version__ = "4.51.3"
for auto_class in classes:
    try:
        auto_class.from_pretrained(sys.argv[1], trust_remote_code=True)
    except ImportError as error:
        print(error)
"""
    done = run_python(code, tmp_path, flat)
    sentence = (
        "InternVL-14B needs transformers 4.57 or newer, but 4.51.3 is installed: pip install --upgrade transformers"
    )
    assert done.stdout.splitlines() == [sentence] * len(ENTRY_POINTS)


def calls_by_feature(flat):
    """What each feature of `KNOWN_BAD` stops."""
    model, training = golden_model(), golden_model("InternVLForRetrieval")
    pixels = torch.zeros(1, 3, 56, 56)
    found = {
        "loading": lambda: load(flat),
        "device maps": lambda: load(flat, device_map={"": "cpu"}),
        "captions": lambda: model.generate(pixels, max_new_tokens=1),
        "training": lambda: training(pixels, *[torch.ones(1, 3, dtype=torch.long)] * 6),
    }
    if importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        found["sentence-transformers"] = lambda: SentenceTransformer(str(flat), trust_remote_code=True)
    return found


def test_a_known_bad_release_refuses_its_feature_and_no_more(compat, flat, monkeypatch):
    calls = calls_by_feature(flat)
    for call in calls.values():  # the loader holds a copy of the module for each file that it was asked for
        call()
    modules = [module for name, module in sys.modules.items() if name.endswith("compat_internvl")]
    installed = transformers.__version__
    for feature in calls:
        for module in modules:
            entries = (
                ("transformers", installed, feature, "no reason"),
                ("nothing", "1.0", "loading", "not installed"),
            )
            monkeypatch.setattr(module, "KNOWN_BAD", entries)
        for name, call in calls.items():
            if name == feature or (feature == "loading" and name in ("device maps", "sentence-transformers")):
                with pytest.raises(RuntimeError, match=f"transformers {installed} breaks {feature}: no reason"):
                    call()
            else:
                call()


def test_the_list_of_known_bad_releases_is_well_formed(compat, flat):
    for package, release, feature, reason in compat.KNOWN_BAD:
        assert importlib.metadata.version(package) and compat.release(release) and reason
        assert feature in ("loading", "device maps", "captions", "training", "sentence-transformers")


def test_what_depends_on_the_release(compat):
    assert (compat.DEFAULT_DTYPE == "auto") == compat.CAN_OFFLOAD_A_STATE == IS_V5
    assert compat.VERSION == tuple(map(int, transformers.__version__.split(".")[:2]))
    _, info = load(ROOT, subfolder="tiny", output_loading_info=True)
    assert set(compat.LOADING_PROBLEMS) <= set(info)


# ------------------------------------------------------------------------------------------------------------ attention


def test_the_name_of_the_attention(compat):
    config = golden_config("tiny", "eager")
    for part in (config, config.vision_config, config.qllama_config):
        assert compat.attention_name(part) == "eager"
    compat.set_attention_name(config, "sdpa")
    assert {compat.attention_name(part) for part in (config, config.qllama_config)} == {"sdpa"}


def test_the_attention_function(compat):
    def eager():
        return None

    assert compat.attention_function("eager", eager) is eager
    assert compat.attention_function("sdpa", eager) is transformers.AttentionInterface()["sdpa"]


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_mask_says_who_sees_whom(compat, past, bidirectional):
    config = golden_config("tiny", "eager").qllama_config
    cache = DynamicCache(config=config)
    for index in range(config.num_hidden_layers if past else 0):
        compat.update_cache(cache, index, torch.zeros(2, 4, past, 16), torch.zeros(2, 4, past, 16))
    padding = torch.ones(2, past + 4, dtype=torch.long)
    padding[1, 0] = 0
    mask = compat.causal_mask(config, torch.zeros(2, 4, config.hidden_size), padding, cache, bidirectional)
    visible = torch.ones(4, past + 4).tril(past).bool() | bidirectional
    expected = visible[None, None] & padding[:, None, None].bool()
    assert ((mask == 0) == expected).all()


# --------------------------------------------------------------------------------------------------------------- caches


def filled(compat, config, rows=2, length=3):
    generator = torch.Generator().manual_seed(0)
    cache = DynamicCache(config=config)
    shape = (rows, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
    for index in range(config.num_hidden_layers):
        compat.update_cache(cache, index, *(torch.randn(shape, generator=generator) for _ in "kv"))
    return cache


def test_a_cache_has_the_name_that_generate_gives_it(compat):
    named = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    assert compat.CACHE_NAME in named
    assert compat.PASSED_BY_GENERATE - {"tokenizer"} <= set(named)
    assert {"streamer", "logits_processor", "tokenizer"} <= compat.ARGUMENTS_OF_GENERATE


def test_either_name_of_a_cache(compat):
    assert compat.resolve_cache(None, None) is None
    assert compat.resolve_cache("a", None) == compat.resolve_cache(None, "a") == "a"
    with pytest.raises(ValueError, match="`cache` and `past_key_values`"):
        compat.resolve_cache("a", "b")


@torch.no_grad()
def test_the_tower_takes_and_returns_a_cache_under_either_name(compat):
    qllama, ids = golden_model().qllama, torch.tensor([[1, 5, 6, 7]])
    expected = qllama(ids).logits[:, -1]
    for tower in (qllama, qllama.model):
        for name in ("cache", "past_key_values"):
            cache = getattr(tower(ids[:, :3], use_cache=True), compat.CACHE_NAME)
            output = tower(ids[:, 3:], **{name: cache})
            assert getattr(output, compat.CACHE_NAME) is cache and cache.get_seq_length() == 4
    torch.testing.assert_close(qllama(ids[:, 3:], cache=cache_of(qllama, ids[:, :3], compat)).logits[:, -1], expected)


def cache_of(qllama, ids, compat):
    return getattr(qllama(ids, use_cache=True), compat.CACHE_NAME)


@torch.no_grad()
def test_an_unknown_argument_is_refused(compat):
    qllama, ids = golden_model().qllama, torch.tensor([[1, 5, 6, 7]])
    qllama(ids, **dict.fromkeys(compat.PASSED_BY_GENERATE))
    with pytest.raises(TypeError, match="unexpected keyword argument 'past'"):
        qllama(ids, past=1)


def test_an_update_returns_all_that_a_layer_holds(compat, config):
    cache = filled(compat, config)
    more = torch.ones(2, config.num_key_value_heads, 1, config.hidden_size // config.num_attention_heads)
    for index in range(config.num_hidden_layers):
        key, value = compat.update_cache(cache, index, more, 2 * more)
        assert key.shape[2] == value.shape[2] == 4 and (key[:, :, 3] == 1).all() and (value[:, :, 3] == 2).all()


def test_a_copy_leaves_the_source_alone(compat, config):
    source = filled(compat, config)
    before = copy.deepcopy(source)
    target = compat.copy_cache(source, DynamicCache(config=config))
    target.batch_repeat_interleave(3)
    assert source.get_seq_length() == target.get_seq_length() == 3
    for one, other, copied in zip(source.layers, before.layers, target.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
        assert torch.equal(copied.keys, one.keys.repeat_interleave(3, dim=0))


@pytest.mark.parametrize("kind", [None, "dynamic", "static"])
def test_caches_of_other_kinds_hold_the_same(compat, config, kind):
    prefix = filled(compat, config)
    expected = [(layer.keys, layer.values) for layer in prefix.layers]
    asked = GenerationConfig(cache_implementation=kind, prefill_chunk_size=2)
    cache = compat.convert_cache(asked, prefix, config, length=20)
    assert asked.cache_implementation is None and asked.prefill_chunk_size is None
    assert int(cache.get_seq_length()) == 3
    for layer, (keys, values) in zip(cache.layers, expected, strict=True):
        assert torch.equal(layer.keys[:, :, :3], keys) and torch.equal(layer.values[:, :, :3], values)
    if kind == "static":
        assert isinstance(cache, StaticCache) and cache.layers[0].keys.shape[2] == 64
        asked = SimpleNamespace(cache_implementation="static", max_cache_len=100)
        assert compat.convert_cache(asked, prefix, config, length=20).layers[0].keys.shape[2] == 128
    else:
        assert cache is prefix


def test_a_quantised_cache_takes_its_options(compat, config, monkeypatch):
    made = {}

    class Quantised(DynamicCache):
        def __init__(self, backend, config, **options):
            super().__init__(config=config)
            made.update(options, backend=backend)

    monkeypatch.setattr(compat, "QuantizedCache", Quantised)
    options = {"nbits": 2, "backend": "hqq"}
    asked = SimpleNamespace(cache_implementation="quantized", cache_config=options)
    cache = compat.convert_cache(asked, filled(compat, config), config, 20)
    assert made == options and cache.get_seq_length() == 3 and asked.cache_config is None
    compat.convert_cache(SimpleNamespace(cache_implementation="quantized"), filled(compat, config), config, 20)
    assert made["backend"] == "quanto"

    def missing(**options):
        raise ModuleNotFoundError("No module named 'optimum'")

    monkeypatch.setattr(compat, "QuantizedCache", missing)
    with pytest.raises(ImportError, match="'quantized'` needs optimum-quanto: pip install optimum-quanto"):
        compat.convert_cache(SimpleNamespace(cache_implementation="quantized"), filled(compat, config), config, 20)


def test_an_unknown_kind_of_cache_is_refused(compat, config):
    with pytest.raises(ValueError, match="`cache_implementation` must be one of dynamic, .*, got 'paged'"):
        compat.convert_cache(SimpleNamespace(cache_implementation="paged"), filled(compat, config), config, 20)


def test_an_offloaded_cache_is_one(compat, config, monkeypatch):
    """Named, not made: without an accelerator transformers cannot."""
    prefix = filled(compat, config)
    for kind in ("DynamicCache", "StaticCache"):
        monkeypatch.setattr(compat, kind, lambda config, offloading, **_: made.append(offloading) or DynamicCache())
    made = []
    for name in ("offloaded", "offloaded_static", "static"):
        asked = SimpleNamespace(cache_implementation=name)
        assert compat.convert_cache(asked, prefix, config, 20).get_seq_length() == 3
    assert made == [True, True, False]


@pytest.mark.skipif(not IS_V5, reason="4.57 writes the right tokens")
@pytest.mark.parametrize("kind", ["static", "offloaded_static"])
def test_a_static_cache_with_flex_attention_is_refused(compat, kind):
    config = golden_config("tiny", "flex_attention").qllama_config
    with pytest.raises(ValueError, match=f"{kind}.*wrong tokens with a static cache and flex_attention"):
        compat.convert_cache(SimpleNamespace(cache_implementation=kind), filled(compat, config), config, 20)


@pytest.mark.slow
@pytest.mark.skipif(not IS_V5, reason="4.57 writes the right tokens")
@torch.no_grad()
def test_transformers_own_llama_is_wrong_with_them_too():
    """Where this fails, the refusal can go."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    peer = LlamaForCausalLM(LlamaConfig(vocab_size=300, pad_token_id=0, attn_implementation="flex_attention", **sizes))
    generator = torch.Generator().manual_seed(0)
    for parameter in peer.eval().parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.1, generator=generator)
    ids = torch.randint(3, 300, (3, 6), generator=generator)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "disable_compile": True}
    with torch.compiler.set_stance("force_eager"):  # compiling takes most of a minute
        wanted, static = peer.generate(ids, **options), None
        with suppress(AttributeError):  # 5.23 fails instead
            static = peer.generate(ids, cache_implementation="static", **options)
    assert static is None or not torch.equal(static, wanted)


# ------------------------------------------------------------------------------------------------ processors, pipelines


def test_pipelines_name_their_task(compat, monkeypatch, flat):
    seen = []
    processor_class = repo_class("processing_internvl.InternVLProcessor")
    monkeypatch.setattr(
        sys.modules[processor_class.__module__],
        "pipeline_task",
        lambda arguments: seen.append(compat.pipeline_task(arguments)) or seen[-1],
    )
    processor_class.from_pretrained(flat)
    assert processor_class.from_pretrained(flat, _from_pipeline="image-text-to-text").default_task == "caption"
    assert seen == [None, "image-text-to-text"]


def test_only_an_old_processor_names_its_image_processor(compat):
    named = compat.name_image_processor(type("Processor", (ProcessorMixin,), {}))
    assert ("image_processor_class" in vars(named)) == (not IS_V5)
    name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    assert compat.CLIPImageProcessorPil.__name__ == name


# ----------------------------------------------------------------------------------------------------- models, training


def test_a_method_runs_as_the_hook_runs_forward(compat):
    class Model:
        @compat.with_accelerate_hook
        def double(self, number, plus=0):
            """Twice."""
            return 2 * number + plus

    model = Model()
    assert model.double(3) == 6 and Model.double.__doc__ == "Twice."
    model._hf_hook = SimpleNamespace(
        pre_forward=lambda _, number, **options: ((number + 1,), options), post_forward=lambda _, output: -output
    )
    assert model.double(3, plus=1) == -9


def test_loaded_parameters_are_known(compat):
    parameter = nn.Parameter(torch.zeros(1))
    assert not compat.is_loaded(parameter)
    parameter._is_hf_initialized = True  # as transformers' loader marks it
    assert compat.is_loaded(parameter)


def test_layers_are_recomputed_as_gradient_checkpointing_was_enabled(compat):
    stack, layer, calls = nn.Module(), nn.Linear(2, 2), []
    compat.set_checkpoint_function(stack)
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    compat.recomputed(stack, layer)(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert len(calls) == 2 and layer.weight.grad is not None
    model = golden_model().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert model.vision_model.encoder._gradient_checkpointing_func.keywords == {"use_reentrant": True}


# -------------------------------------------------------------------------------------------------------------- loading


def test_names_that_a_part_ignores(compat):
    model = golden_model()
    kind = type(model.vision_model._keys_to_ignore_on_load_unexpected)
    compat.ignore_in_checkpoint(model.vision_model, ["^a$"])
    assert model.vision_model._keys_to_ignore_on_load_unexpected == kind(["^a$"])
    assert not any("^a$" in (part._keys_to_ignore_on_load_unexpected or ()) for part in (model, model.qllama))


def test_the_plan_of_tensor_parallelism_is_that_of_the_classes(compat):
    model = golden_model()
    model._tp_plan = {"embed_tokens": "colwise"}
    compat.collect_tp_plan(model)
    parts = {"vision_model": model.vision_model, "qllama": model.qllama}
    assert model._tp_plan == {
        f"{name}.{key}": value for name, part in parts.items() for key, value in part._tp_plan.items()
    }
    assert set(compat.VISION_MLP.values()) <= {"colwise", "rowwise", compat.GATHERED}


def test_root_parameters_load_in_tensor_parallel(compat):
    from transformers import modeling_utils

    before = getattr(modeling_utils, "shard_and_distribute_module", None)
    with compat.root_parameters_in_tensor_parallel():
        if not IS_V5:
            model = nn.Module()
            modeling_utils.shard_and_distribute_module(model, torch.ones(2), None, "scale", torch.bfloat16)
            assert model.scale.tolist() == [1, 1] and model.scale.dtype == torch.bfloat16
    assert getattr(modeling_utils, "shard_and_distribute_module", None) is before


def test_quantised_root_parameters_are_not_listed(compat):
    names = json.dumps(["a.weight", "logit_scale"])
    model = SimpleNamespace()
    compat.save_quantized_root_parameters(model)
    assert vars(model) == {}
    for metadata, expected in (({"tensor_names": names}, {"tensor_names": '["a.weight"]'}), ({"x": "y"}, {"x": "y"})):
        model.hf_quantizer = SimpleNamespace(get_state_dict_and_metadata=lambda model, m=metadata: ({"a": 1}, m))
        compat.save_quantized_root_parameters(model)
        assert model.hf_quantizer.get_state_dict_and_metadata(model) == ({"a": 1}, expected)


def test_a_folder_without_the_module_does_not_load(flat, tmp_path):
    """It is copied with the others by the loader of every release: nothing works without it."""
    folder = shutil.copytree(flat, tmp_path / "repository")
    (folder / COMPAT).unlink()
    with pytest.raises(Exception, match="compat_internvl"):
        load(folder)
