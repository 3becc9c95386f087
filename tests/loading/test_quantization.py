"""Quantised models: torchao and bitsandbytes, on the CPU, by way of `from_pretrained`."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModel, TorchAoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from conftest import IS_V5, ROOT

pytest.importorskip("accelerate")
torchao = pytest.importorskip("torchao.quantization")
pytest.importorskip("bitsandbytes")

from benchmarks import quantised_accuracy as accuracy  # noqa: E402
from tools.machines import quantised_sizes as sizes  # noqa: E402

TINY = {"subfolder": "tiny", "trust_remote_code": True}
METHODS = {
    "torchao-weight-only": "torchao int8 weight-only",
    "torchao-dynamic": "torchao int8 dynamic",
    "bnb-8bit": "bitsandbytes 8-bit",
    "bnb-nf4": "bitsandbytes nf4",
    "bnb-nf4-double": "bitsandbytes nf4, double",
}
FORMATS = {
    "torchao-weight-only": "torchao int8 (weight-only or dynamic)",
    "torchao-dynamic": "torchao int8 (weight-only or dynamic)",
    "bnb-8bit": "bitsandbytes 8-bit",
    "bnb-nf4": "bitsandbytes 4-bit (nf4 or fp4)",
    "bnb-nf4-double": "bitsandbytes 4-bit, double quantisation",
}
# The least cosine of any embedding to that of float32 weights.
LEAST_COSINE = {"torchao-weight-only": 0.999, "torchao-dynamic": 0.998, "bnb-8bit": 0.998}
LEAST_COSINE_OF_4_BITS = 0.85


def config_of(method, skip=None):
    config = accuracy.METHODS[METHODS[method]]()
    setattr(config, "modules_to_not_convert" if method.startswith("torchao") else "llm_int8_skip_modules", skip)
    return config


def load(path=ROOT, **options):
    model = AutoModel.from_pretrained(path, **({"dtype": torch.bfloat16} | TINY | options))
    return accuracy.with_plain_kernels(model.eval())


def quantised(method, **options):
    return load(quantization_config=config_of(method), **options)


def is_quantised(module: nn.Module) -> bool:
    weight = module.weight
    return weight.dtype in (torch.int8, torch.uint8) or type(weight).__name__ == "Int8Tensor"


def quantised_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and is_quantised(module)}


def tensor_bytes(weight: torch.Tensor) -> int:
    """What a parameter takes, with all that its library keeps beside it."""
    if hasattr(weight, "tensor_data_names"):  # torchao
        parts = [getattr(weight, name) for name in weight.tensor_data_names + weight.optional_tensor_data_names]
        return sum(part.nbytes for part in parts if part is not None)
    state = getattr(weight, "quant_state", None)
    beside = [] if state is None else [state.absmax, state.code]
    if getattr(state, "nested", False):
        beside += [state.state2.absmax, state.state2.code, state.offset]
    if getattr(weight, "SCB", None) is not None:
        beside.append(weight.SCB)
    return weight.nbytes + sum(tensor.nbytes for tensor in beside)


@pytest.fixture(scope="module")
def inputs():
    return accuracy.tiny_inputs()


@pytest.fixture(scope="module")
def reference(inputs):
    """Model and outputs of the same weights in float32."""
    model = load(dtype=torch.float32)
    return model, accuracy.outputs(model, inputs)


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def model(method):
    return quantised(method)


def test_bytes_are_those_of_the_table(method, model):
    # First of all: bitsandbytes repacks the 4-bit weights of a model that has run on a CPU.
    found = sum(tensor_bytes(parameter) for parameter in model.parameters())
    assert found == sizes.sizes(sizes.empty_model(ROOT, "tiny"))[FORMATS[method]]


def test_all_linear_layers_but_the_heads_are_quantised(model, reference):
    linears = {name for name, module in reference[0].named_modules() if isinstance(module, nn.Linear)}
    heads = {name for name in linears if name.split(".")[0] in ("clip_projector", "clip_projector2", "itm_head")}
    assert quantised_names(model) == linears - heads - {"qllama.lm_head"}
    assert len(heads) == 9


def test_everything_else_keeps_the_models_dtype(model):
    names = quantised_names(model)
    others = {p.dtype for name, p in model.named_parameters() if name.removesuffix(".weight") not in names}
    assert others == {torch.bfloat16} and model.dtype == torch.bfloat16


@torch.inference_mode()
def test_every_call_works_and_is_close_to_float32(method, model, inputs, reference):
    found = accuracy.compare(accuracy.outputs(model, inputs), reference[1])
    for name in accuracy.EMBEDDINGS:
        assert found[name][0] >= LEAST_COSINE.get(method, LEAST_COSINE_OF_4_BITS), f"{name}: {found[name]}"
    pixels, ids = inputs["pixel_values"][:3], inputs["input_ids"][:3]
    assert model.encode_image(pixels, "InternVL-G").isfinite().all() and model.encode_text(ids).isfinite().all()
    logits, _ = model(image=pixels, text=ids, mode="InternVL-G")
    output = model(input_ids=ids, pixel_values=pixels, mode="InternVL-G")
    assert_close(output.logits_per_image, logits)
    assert model.match(pixels, ids).shape == (3, 2)
    assert [len(states) for states in model.get_image_features(pixels)] == [3, 3]
    assert model.get_text_features(ids).isfinite().all()


@pytest.mark.parametrize("beams", [1, 3])
def test_captions(method, model, inputs, reference, beams):
    arguments = {"pixel_values": inputs["pixel_values"][:8], "num_beams": beams, "max_new_tokens": 6}
    expected, found = reference[0].generate(**arguments), model.generate(**arguments)
    if method in LEAST_COSINE:
        length = min(expected.shape[1], found.shape[1])
        same = (expected[:, :length] == found[:, :length]).float().mean()
        assert same >= 0.7
    assert found.shape[0] == 8


def test_float32_activations(method, inputs, reference):
    model = quantised(method, dtype=torch.float32)
    found = accuracy.compare(accuracy.outputs(model, inputs), reference[1])
    assert all(found[name][0] >= LEAST_COSINE.get(method, LEAST_COSINE_OF_4_BITS) for name in accuracy.EMBEDDINGS)


# ------------------------------------------------------------------------------------------------- the skip list


def test_the_users_config_is_left_alone(method):
    config = config_of(method)
    before = copy.deepcopy(config.__dict__)
    model = load(quantization_config=config)
    assert {name: value for name, value in config.__dict__.items() if name != "quant_type"} == {
        name: value for name, value in before.items() if name != "quant_type"
    }
    used = model.config.quantization_config
    skipped = getattr(used, "modules_to_not_convert", None) or used.llm_int8_skip_modules
    assert skipped == list(model._keep_unquantized)


@pytest.mark.parametrize("names", [[], ["vision_model"]], ids=["none", "tower"])
def test_the_users_own_list_is_obeyed(method, names, reference):
    config = config_of(method, names)
    linears = {name for name, module in reference[0].named_modules() if isinstance(module, nn.Linear)}
    wanted = {name for name in linears if not name.startswith(tuple(names))}
    assert quantised_names(load(quantization_config=config)) == wanted


@pytest.mark.skipif(not IS_V5, reason="torchao's embeddings need a list that names the head exactly; 5.x honours it")
def test_embeddings_on_request():
    config = TorchAoConfig(
        torchao.Int8WeightOnlyConfig(),
        include_input_output_embeddings=True,
    )
    model = load(quantization_config=config)
    assert is_quantised(model.qllama.lm_head) and not is_quantised(model.itm_head)


def test_config_as_a_dict(reference):
    model = load(quantization_config={"load_in_8bit": True})
    assert "qllama.lm_head" not in quantised_names(model) and quantised_names(model)


@pytest.mark.parametrize("name", ["modeling_intern_vit.InternVisionModel", "modeling_qllama.QLlamaForCausalLM"])
def test_a_tower_alone(name, tmp_path, reference):
    tower = {"InternVisionModel": reference[0].vision_model, "QLlamaForCausalLM": reference[0].qllama}
    tower[name.split(".")[1]].save_pretrained(tmp_path)
    config = config_of("torchao-weight-only")
    model = get_class_from_dynamic_module(name, str(ROOT)).from_pretrained(tmp_path, quantization_config=config)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert quantised_names(model) == linears - {"lm_head"}


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"": "cpu", "qllama": "disk"}])
def test_torchao_cannot_be_offloaded_to_the_disk(device_map):
    with pytest.raises(ValueError, match="offloads to the disk"):
        load(quantization_config=config_of("torchao-weight-only"), device_map=device_map)


# -------------------------------------------------------------------------------------------------------- saving


@torch.inference_mode()
def test_saved_and_loaded_again(method, tmp_path, inputs):
    if method.startswith("torchao") and not IS_V5:
        pytest.skip("transformers 4.57 writes int8 of torchao with pickle only")
    model = quantised(method)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again, info = AutoModel.from_pretrained(
        tmp_path, trust_remote_code=True, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert quantised_names(again) == quantised_names(model)
    few = {name: tensor[:4] for name, tensor in inputs.items()}
    assert_close(
        accuracy.outputs(accuracy.with_plain_kernels(again.eval()), few), accuracy.outputs(model, few), rtol=0, atol=0
    )


def test_a_quantised_model_is_strict_too(method, tmp_path):
    tiny = load()
    state = {name: tensor for name, tensor in tiny.state_dict().items() if name != "itm_head.bias"}
    tiny.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"itm_head\.bias"):
        AutoModel.from_pretrained(tmp_path, trust_remote_code=True, quantization_config=config_of(method))


# -------------------------------------------------------------------------------------------------- golden/wide


@pytest.mark.slow
def test_published_widths(tmp_path):
    """One layer of each tower at the widths of the published checkpoint; needs 6 GB of memory."""
    accuracy.write_wide(tmp_path)
    inputs = accuracy.wide_inputs()
    expected = accuracy.outputs(accuracy.load_wide(tmp_path, dtype=torch.float32), inputs)
    for method, least in LEAST_COSINE.items():
        model = accuracy.load_wide(tmp_path, dtype=torch.bfloat16, quantization_config=config_of(method))
        found = accuracy.compare(accuracy.outputs(model, inputs), expected)
        assert all(found[name][0] >= least for name in accuracy.EMBEDDINGS), f"{method}: {found}"
