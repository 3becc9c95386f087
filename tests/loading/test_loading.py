"""Loading and saving as users do: Auto classes, local folders, old configs, damaged files, minimal environments."""

import ast
import copy
import inspect
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.utils import is_accelerate_available

from conftest import (
    CODE,
    GOLDEN,
    IDS,
    INDEX,
    IS_V5,
    PIXELS,
    ROOT,
    TOLERANCE,
    assert_same_tensors,
    golden,
    golden_config,
    load,
    make_repository,
    repo_class,
    run_interpreter,
    run_python,
)

# The model itself, without the two files that import their hosts.
HOSTS = ("handler.py", "sentence_transformers_internvl.py")
MODULES = {name: ast.parse((ROOT / name).read_text()) for name in CODE if name not in HOSTS}
CULPRIT = "itm_head.bias"


WEIGHTS = ["random", "trained"]


@pytest.fixture(scope="session", params=WEIGHTS)
def weights(request):
    if request.param == "trained" and not (ROOT / "tiny" / INDEX).is_file():
        pytest.skip("tiny/ holds no trained weights")
    return request.param


@pytest.fixture(scope="session")
def repository(tmp_path_factory, weights):
    """Code and the 14B config at the root, the tiny checkpoint in `tiny/`."""
    return make_repository(tmp_path_factory.mktemp("loading") / "repository", weights=weights)


@pytest.fixture
def own_flat(flat, tmp_path):
    """A copy of `flat` that a test may damage."""
    return shutil.copytree(flat, tmp_path / "own")


# ------------------------------------------------------------------------------------------------- Auto classes


@pytest.mark.parametrize("place", ["flat", "subfolder"])
def test_auto_classes(place, flat, repository):
    path, where = (flat, {}) if place == "flat" else (repository, {"subfolder": "tiny"})
    config = load(path, AutoConfig, **where)
    assert (type(config).__name__, config.model_type, config.clip_embed_dim) == ("InternVLConfig", "internvl_14b", 128)
    model = load(path, **where)
    assert type(model).__name__ == "InternVLModel" and not model.training
    tokenizer = load(path, AutoTokenizer, add_eos_token=True, **where)
    assert type(tokenizer).__name__ == "InternVLTokenizer" and tokenizer("a")["input_ids"][-1] == 2
    assert load(path, AutoImageProcessor, **where).crop_size["height"] == 48
    processor = load(path, AutoProcessor, **where)
    assert type(processor).__name__ == "InternVLProcessor"
    batch = processor([PIXELS[0].abs().clamp(max=1)], "a cat")
    assert model.embed_image(batch["pixel_values"]).shape == (1, 128)
    assert model.embed_text(batch["input_ids"], batch["attention_mask"]).shape == (1, 128)


@pytest.mark.parametrize("auto_class", [AutoModelForZeroShotImageClassification, AutoModelForImageTextToText])
def test_task_classes_give_the_same_model(flat, auto_class):
    plain, special = load(flat), load(flat, auto_class)
    assert type(special).__name__ == type(plain).__name__ == "InternVLModel"
    assert_same_tensors(plain.state_dict(), special.state_dict())


def test_weights_are_those_of_the_files(repository):
    files = sorted((repository / "tiny").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    model = load(repository, subfolder="tiny", dtype=torch.bfloat16)
    state = model.state_dict()
    assert_same_tensors({name: stored[name] for name in state}, state)
    assert len(stored) == len(state) and not list(model.buffers())
    assert model.generation_config.max_new_tokens == 32


def test_root_config_is_the_published_one(repository):
    config = load(repository, AutoConfig)
    default = repo_class("configuration_internvl.InternVLConfig")()
    for name in ("vision_config", "qllama_config"):
        ours, wanted = (getattr(each, name).to_dict() for each in (config, default))
        assert {key: ours[key] for key in wanted if not key.startswith("_")} == {
            key: wanted[key] for key in wanted if not key.startswith("_")
        }
    for name in (
        "clip_embed_dim",
        "attn_pool_num_heads",
        "num_query_token",
        "cross_attention_frequency",
        "hidden_size",
    ):
        assert getattr(config, name) == getattr(default, name)


# ------------------------------------------------------------------------------------------- saving, fresh process


def outputs(model, pixels, ids):
    """The outputs of each kind of call."""
    with torch.no_grad():
        image, text = model(image=pixels.to(model.dtype), text=ids, mode="InternVL-G")
        captions = model.generate(pixels, ids[:, :4], num_beams=2, min_new_tokens=3, max_new_tokens=5)
        found = {"image": image, "text": text, "captions": captions, "match": model.match(pixels, ids)}
    return {name: tensor.contiguous() for name, tensor in found.items()}


# The same function, for a fresh process.
OUTPUTS = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer
""" + inspect.getsource(outputs)


@pytest.fixture(scope="session")
def saved(repository, tmp_path_factory):
    """Model and processor as `save_pretrained` writes them, and the model that was saved."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    model = load(repository, subfolder="tiny", dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="12MB")
    load(repository, AutoProcessor, subfolder="tiny").save_pretrained(folder)
    return folder, model


def test_saved_folder_holds_the_code(saved):
    folder, _ = saved
    for name in MODULES:
        assert (folder / name).read_text() == (ROOT / name).read_text(), name
    assert len(list(folder.glob("model-*-of-*.safetensors"))) >= 2 and (folder / INDEX).is_file()
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "internvl_14b"
    assert config["auto_map"]["AutoModel"].endswith("modeling_internvl.InternVLModel")


def test_saved_model_loads_in_a_fresh_process(saved, tmp_path):
    folder, model = saved
    save_file({"pixels": PIXELS, "ids": IDS}, tmp_path / "inputs.safetensors")
    code = (
        OUTPUTS
        + """
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
inputs = load_file("inputs.safetensors")
save_file(outputs(model, inputs["pixels"], inputs["ids"]), "outputs.safetensors")
state = model.state_dict() | {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
save_file(state, "state.safetensors")
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, type(processor).__name__, type(processor.tokenizer).__name__, sep="\\n")
"""
    )
    done = run_python(code, tmp_path, folder)
    assert done.stdout.split() == ["InternVLModel", "InternVLProcessor", "InternVLTokenizer"]
    state = model.state_dict() | {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    assert_same_tensors(dict(sorted(state.items())), dict(sorted(load_file(tmp_path / "state.safetensors").items())))
    here, there = outputs(model, PIXELS, IDS), load_file(tmp_path / "outputs.safetensors")
    assert len(here) == 4 and here["captions"].shape[1] >= 3
    for name, tensor in here.items():
        torch.testing.assert_close(tensor, there[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("force_image_size", [None, 72])
def test_resized_positions_are_saved_and_loaded(flat, tmp_path, force_image_size):
    """The image size is set in the config, then changed by resizing: the saved table decides."""
    config = load(flat, AutoConfig)
    fields = config.to_dict() | {"force_image_size": force_image_size}
    model_class = repo_class("modeling_internvl.InternVLModel")
    model = model_class(repo_class("configuration_internvl.InternVLConfig").from_dict(fields)).eval()
    size = force_image_size or 48
    assert model.vision_model.embeddings.position_embedding.shape[1] == 1 + (size // 8) ** 2
    model.vision_model.resize_pos_embeddings(size, 96, 8)
    model.save_pretrained(tmp_path / "saved")
    again = model_class.from_pretrained(tmp_path / "saved")
    assert again.vision_model.embeddings.position_embedding.shape[1] == 1 + 12**2
    pixels = torch.ones(1, 3, 96, 96)
    torch.testing.assert_close(again.float().encode_image(pixels), model.encode_image(pixels))


# Packages that nobody must have to install; `google` is protobuf.
OPTIONAL = (
    "accelerate peft timm einops torchvision torchaudio flash_attn apex kernels scipy sklearn pandas cv2 xformers"
)
OPTIONAL += " bitsandbytes deepspeed matplotlib google datasets"


@pytest.mark.parametrize("class_name", ["InternVLForPreTraining", "InternVLForRetrieval"])
def test_fine_tuned_model_is_saved_with_its_code(flat, tmp_path, class_name):
    """Trained and saved in one script, used by another through `AutoModel`."""
    code = f"""
import sys, torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module
model_class = get_class_from_dynamic_module("modeling_internvl.{class_name}", sys.argv[1])
model_class.from_pretrained(sys.argv[1], dtype=torch.float32).save_pretrained("saved")
"""
    run_python(code, tmp_path, flat)
    for name in CODE:
        if name.startswith(("configuration_", "modeling_")):
            assert (tmp_path / "saved" / name).is_file(), name
    again, plain = load(tmp_path / "saved", dtype=torch.float32), load(flat, dtype=torch.float32)
    assert_same_tensors(plain.state_dict(), again.state_dict())
    for one, other in zip(outputs(again, PIXELS, IDS).values(), outputs(plain, PIXELS, IDS).values()):
        assert torch.equal(one, other)


def test_nothing_optional_is_needed(flat, tmp_path):
    code = (
        f"import sys\nfor name in {OPTIONAL!r}.split(): sys.modules[name] = None\n"
        + OUTPUTS
        + """
from PIL import Image
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
batch = processor([Image.new("RGB", (60, 80), "red")], ["a cat", "a dog"])
found = model.embed_image(batch["pixel_values"]) @ model.embed_text(batch["input_ids"], batch["attention_mask"]).T
caption = model.generate(**processor([Image.new("RGB", (60, 80), "red")], task="caption"), max_new_tokens=3)
imported = [name for name in sys.argv[2].split() if sys.modules.get(name) is not None]
finite = bool(found.isfinite().all())
print(tokenizer("a")["input_ids"][0], list(found.shape), finite, caption.shape[0], imported, sep="|")
"""
    )
    done = run_interpreter(code, tmp_path, flat, OPTIONAL)
    assert done.stdout.splitlines()[-1] == "1|[1, 2]|True|1|[]"


# ---------------------------------------------------------------------------------------------- original checkpoint

OLD_FIELDS = {
    "_name_or_path": "./work_dirs/internvl",
    "transformers_version": "4.37.2",
    "torch_dtype": "bfloat16",
    "use_bfloat16": False,
    "add_cross_attention": False,
    "architectures": None,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "repetition_penalty": 1.0,
    "return_dict": True,
    "sep_token_id": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torchscript": False,
    "typical_p": 1.0,
}


@pytest.fixture
def original(tmp_path):
    """The goldens' checkpoint and our code in one folder, with a config.json as the original code wrote it."""
    folder = tmp_path / "original"
    folder.mkdir()
    for name in CODE:
        shutil.copy(ROOT / name, folder / name)
    config = json.loads((GOLDEN / "tiny" / "config.json").read_text())
    assert "model_type" not in config and "tie_word_embeddings" not in config
    config["vision_config"] |= OLD_FIELDS | {"model_type": "intern_vit_6b"}
    config["qllama_config"] |= OLD_FIELDS | {"model_type": "llama", "rope_scaling": None, "pretraining_tp": 1}
    config |= OLD_FIELDS | {
        "model_type": "internvl",
        "architectures": ["InternVLModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl.InternVLConfig",
            "AutoModel": "modeling_internvl.InternVLModel",
        },
        "hidden_size": config["qllama_config"]["hidden_size"],
        "initializer_range": 0.02,
        "use_backbone_lora": 0,
        "use_qllama_lora": 0,
        "force_image_size": None,
        "_commit_hash": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "tiny" / "model.safetensors", folder)
    return folder


def assert_is_golden(model) -> None:
    assert type(model).__name__ == "InternVLModel" and type(model.config).__name__ == "InternVLConfig"
    inputs, expected = golden("tiny/inputs"), golden("tiny/expected")
    assert_same_tensors(
        dict(sorted(load_file(GOLDEN / "tiny/model.safetensors").items())), dict(sorted(model.state_dict().items()))
    )
    lm_head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert lm_head.data_ptr() != embedding.data_ptr() and not torch.equal(lm_head, embedding)
    for config in (model.config, model.config.qllama_config):
        assert config.tie_word_embeddings is False
    with torch.no_grad():
        for mode in "CG":
            embeds = model.encode_image(inputs["pixel_values"], f"InternVL-{mode}")
            torch.testing.assert_close(embeds, expected[f"encode_image_{mode.lower()}"], **TOLERANCE)


def test_original_config_loads_our_classes(original, tmp_path):
    model = load(original, dtype=torch.float32)
    assert_is_golden(model)
    assert model.config.model_type == "internvl_14b" and model.config.hidden_size == 64
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["model_type"] == "internvl_14b" and saved["tie_word_embeddings"] is False
    assert "hidden_size" not in saved  # the language tower's value is the only source
    assert_is_golden(load(tmp_path / "saved", dtype=torch.float32))


def test_original_config_in_a_fresh_process(original, tmp_path):
    code = """
import sys
from transformers import AutoConfig, AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, torch_dtype="auto")
print(type(model).__module__.split(".")[0], type(model).__name__, model.dtype, model.config.qllama_config.rope_theta)
"""
    done = run_python(code, tmp_path, original)
    assert done.stdout.split() == ["transformers_modules", "InternVLModel", "torch.bfloat16", "10000.0"]


# ----------------------------------------------------------------------------------------------------------- configs


def test_parts_are_read_from_a_composite_file(flat, original, tmp_path):
    vision_class = repo_class("configuration_intern_vit.InternVisionConfig")
    for folder, width, heads in ((flat, 128, 4), (original, 100, 25)):
        vision = vision_class.from_pretrained(folder)
        assert (vision.model_type, vision.hidden_size, vision.num_attention_heads) == ("intern_vit_6b", width, heads)
    # Old files often do not name the type of their parts, or call the language tower a "llama".
    (tmp_path / "bare").mkdir()
    shutil.copy(GOLDEN / "tiny" / "config.json", tmp_path / "bare")
    assert vision_class.from_pretrained(tmp_path / "bare").hidden_size == 100
    qllama_class = repo_class("configuration_internvl.QLlamaConfig")
    assert qllama_class.from_pretrained(original).vocab_size == 320
    qllama = qllama_class.from_pretrained(flat)
    assert (qllama.model_type, qllama.vocab_size, qllama.hidden_size) == ("qllama", 4096, 128)


def test_vision_model_loads_from_its_own_folder(flat, tmp_path):
    model = load(flat, dtype=torch.float32).vision_model
    model.save_pretrained(tmp_path / "vision")
    again = repo_class("modeling_intern_vit.InternVisionModel").from_pretrained(
        tmp_path / "vision", dtype=torch.float32
    )
    assert_same_tensors(model.state_dict(), again.state_dict())


def unusual_config():
    """A config in which as many fields as possible differ from their defaults."""
    return repo_class("configuration_internvl.InternVLConfig")(
        vision_config={
            "num_channels": 4, "patch_size": 7, "image_size": 28, "qkv_bias": True, "hidden_size": 48,
            "num_attention_heads": 3, "intermediate_size": 40, "qk_normalization": False, "num_hidden_layers": 2,
            "use_flash_attn": False, "hidden_act": "silu", "layer_norm_eps": 1e-5, "dropout": 0.1,
            "drop_path_rate": 0.2, "attention_dropout": 0.3, "initializer_range": 0.03, "initializer_factor": 0.4,
        },
        qllama_config={
            "vocab_size": 70, "hidden_size": 24, "intermediate_size": 50, "num_hidden_layers": 3,
            "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_act": "gelu", "max_position_embeddings": 99,
            "initializer_range": 0.05, "rms_norm_eps": 1e-5, "use_cache": False, "rope_theta": 500.0,
            "attention_dropout": 0.25, "pad_token_id": 3, "bos_token_id": 4, "eos_token_id": 5,
        },
        clip_embed_dim=12, attn_pool_num_heads=3, num_query_token=5, label_smoothing=0.1, cross_attention_frequency=3,
        use_backbone_lora=2, use_qllama_lora=4, force_image_size=56, caption_prompt_ids=[4, 9], initializer_range=0.04,
        embed_prefix_ids=[4, 8], contrastive_only=True,
    )  # fmt: skip


def fields(config) -> dict:
    """`to_dict` without what transformers records about the process: its version, and the path of the config."""
    skipped = ("transformers_version", "_name_or_path", "_commit_hash", "auto_map", "_attn_implementation_autoset")
    return {name: fields_of_dict(value, skipped) for name, value in config.to_dict().items() if name not in skipped}


def fields_of_dict(value, skipped):
    if not isinstance(value, dict):
        return value
    return {name: fields_of_dict(item, skipped) for name, item in value.items() if name not in skipped}


@pytest.mark.parametrize("make", [unusual_config, golden_config], ids=["unusual", "golden"])
def test_config_round_trips(make, tmp_path):
    config = make()
    before = fields(config)
    config_class = type(config)
    config.save_pretrained(tmp_path)
    for again in (
        config_class.from_dict(config.to_dict()),
        config_class.from_pretrained(tmp_path),
        config_class(**json.loads(config.to_json_string(use_diff=False))),
        copy.deepcopy(config),
    ):
        assert fields(again) == before
        assert type(again.vision_config).__name__ == "InternVisionConfig"
        assert type(again.qllama_config).__name__ == "QLlamaConfig"
    assert fields(config) == before


PARTS = {"vision_config", "qllama_config"}


def test_round_trip_keeps_every_unusual_field(tmp_path):
    config = unusual_config()
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    default = type(config)()
    for part in ("vision_config", "qllama_config", None):
        one, other, plain = ((getattr(each, part) if part else each) for each in (again, config, default))
        names = ast_fields(type(one).__name__) - PARTS
        assert len(names) > 9
        for name in names:
            assert getattr(one, name) == getattr(other, name), name
            assert getattr(other, name) != getattr(plain, name), f"{name} of the test config is the default"


def ast_fields(class_name: str) -> set[str]:
    """The fields that a config class declares."""
    for tree in MODULES.values():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                return {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}
    raise AssertionError(class_name)


def test_configs_of_other_sizes_are_not_equal():
    vision_class = repo_class("configuration_intern_vit.InternVisionConfig")
    assert vision_class() == vision_class() != vision_class(hidden_size=25)


def test_copies_share_nothing():
    config = unusual_config()
    other = copy.deepcopy(config)
    other.vision_config.hidden_size = other.qllama_config.vocab_size = 1
    assert config.vision_config.hidden_size == 48 and config.qllama_config.vocab_size == 70


def test_config_given_as_objects_equals_one_given_as_dicts():
    config = unusual_config()
    top = {name: getattr(config, name) for name in ast_fields("InternVLConfig")}
    vision, qllama = copy.deepcopy(config.vision_config), copy.deepcopy(config.qllama_config)
    again = type(config)(**(top | {"vision_config": vision, "qllama_config": qllama}))
    assert fields(again) == fields(config)


@pytest.mark.parametrize("class_name", ["InternVLModel", "InternVLForPreTraining", "InternVLForRetrieval"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_constructors_are_silent_and_change_no_config(class_name, device, capfd):
    model_class = repo_class(f"modeling_internvl.{class_name}")
    config = golden_config("tiny")
    before = copy.deepcopy(config.to_dict())
    with torch.device(device):
        model = model_class(config)
    after = config.to_dict()
    assert {name: after[name] for name in before} == before
    # transformers itself adds only the names of the dtype and of the attention function.
    assert set(after) - set(before) <= {"dtype", "torch_dtype", "_attn_implementation_autoset", "architectures"}
    assert capfd.readouterr() == ("", "")
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    names = set(load_file(GOLDEN / "tiny" / "model.safetensors"))
    assert set(model.state_dict()) == names


def test_published_sizes_on_the_meta_device():
    with torch.device("meta"):
        model = repo_class("modeling_internvl.InternVLModel")(repo_class("configuration_internvl.InternVLConfig")())
    shapes = json.loads((GOLDEN / "internvl_14b_parameters.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == shapes


# ------------------------------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"dtype": torch.float32}, torch.float32),
        ({"dtype": torch.float16}, torch.float16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({"torch_dtype": torch.float32}, torch.float32),
        ({"torch_dtype": torch.bfloat16, "low_cpu_mem_usage": True}, torch.bfloat16),
        ({"torch_dtype": "auto", "low_cpu_mem_usage": True}, torch.bfloat16),
        ({"low_cpu_mem_usage": True, "dtype": torch.float32}, torch.float32),
        ({}, torch.bfloat16 if IS_V5 else torch.float32),
    ],
)
def test_dtype_options(flat, options, expected):
    model = load(flat, **options)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {expected} and model.dtype == expected
    image, text = model(image=PIXELS, text=IDS, mode="InternVL-G")
    assert image.dtype == expected and image.isfinite().all() and text.shape == (2, 2)
    stored = load_file(flat / "model-00002-of-00002.safetensors")[CULPRIT]
    assert torch.equal(model.itm_head.bias.detach(), stored.to(expected))


@pytest.mark.skipif(not is_accelerate_available(), reason="device_map needs accelerate")
@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", "auto"])
def test_device_map(flat, device_map):
    plain = load(flat, dtype=torch.float32)
    mapped = load(flat, dtype=torch.float32, device_map=device_map)
    assert_same_tensors(plain.state_dict(), mapped.state_dict())
    for name, tensor in outputs(mapped, PIXELS, IDS).items():
        assert torch.equal(tensor, outputs(plain, PIXELS, IDS)[name]), name


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_attention_implementation_reaches_every_part(flat, attn_implementation):
    model = load(flat, attn_implementation=attn_implementation)
    attentions = [module for module in model.modules() if hasattr(module, "attention_function")]
    assert len(attentions) == 5 + 4 + 2 + 2  # vision, self, cross, pools
    assert {module.config._attn_implementation for module in attentions} == {attn_implementation}


# ------------------------------------------------------------------------------------------------------ damaged files


def change_shard(folder: Path, change) -> None:
    """Rewrite the second shard after `change(tensors)`, and the index to match."""
    file = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: where for name, where in index["weight_map"].items() if where != file.name}
    index["weight_map"] |= dict.fromkeys(tensors, file.name)
    (folder / INDEX).write_text(json.dumps(index))


def drop(tensors):
    del tensors[CULPRIT]


def add(tensors):
    tensors["itm_head.scale"] = torch.ones(2)


def reshape(tensors):
    tensors[CULPRIT] = torch.ones(3, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "change, message",
    [
        (drop, "missing_keys: itm_head.bias"),
        (add, "unexpected_keys: itm_head.scale"),
        (reshape, r"itm_head\.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_an_error(own_flat, change, message):
    change_shard(own_flat, change)
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){message}"):
        load(own_flat)


@pytest.mark.parametrize("change", [drop, add])
def test_not_strict_loads_tensors_that_do_not_fit(own_flat, change):
    change_shard(own_flat, change)
    model, info = load(own_flat, strict=False, output_loading_info=True)
    culprits = {name for kind in ("missing_keys", "unexpected_keys") for name in info[kind]}
    assert culprits == {CULPRIT if change is drop else "itm_head.scale"}
    assert model.itm_head.bias.isfinite().all()
    assert type(load(own_flat, strict=False)).__name__ == "InternVLModel"


def test_not_strict_and_ignoring_sizes_loads_another_shape(own_flat):
    change_shard(own_flat, reshape)
    model = load(own_flat, strict=False, ignore_mismatched_sizes=True)
    assert model.itm_head.bias.shape == (2,) and model.itm_head.bias.isfinite().all()


def test_strict_refuses_another_shape_even_when_sizes_are_ignored(own_flat):
    change_shard(own_flat, reshape)
    with pytest.raises(ValueError, match=r"itm_head\.bias"):
        load(own_flat, ignore_mismatched_sizes=True)


def test_many_missing_tensors_are_summarised(own_flat):
    change_shard(
        own_flat, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("clip_proj")]
    )
    with pytest.raises(ValueError, match=r"clip_projector2?\.\S+, .* and \d+ more") as error:
        load(own_flat)
    assert len(str(error.value)) < 700 and "strict=False" in str(error.value)


def test_truncated_shard_is_named(own_flat):
    file = own_flat / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(Exception, match="model-00002-of-00002.safetensors"):
        load(own_flat)


def test_missing_shard_is_named(own_flat):
    (own_flat / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(OSError, match="model-00002-of-00002.safetensors"):
        load(own_flat)


def test_misspelt_options_are_refused(flat):
    with pytest.raises(TypeError, match="stric_t"):
        load(flat, stric_t=False)


# ------------------------------------------------------------------------------------------------------------ imports

# All imports of the root modules from outside the standard library, also those inside functions.
ALLOWED_TOP = {
    "huggingface_hub": {"create_repo", "snapshot_download", "upload_folder"},
    "PIL": {"Image", "ImageCms", "ImageOps"},
    "numpy": {None},
    "safetensors": {"SafetensorError", "safe_open"},
    "safetensors.torch": {"load_file"},
    "torch": {None, "nn"},
    "torch.distributed": {None},
    "torch.nn.functional": {None},
    "torch.nn.utils.rnn": {"pad_sequence"},
    "torch.utils.checkpoint": {"checkpoint"},
    "transformers": {
        None, "BatchFeature", "Cache", "CLIPImageProcessor", "CLIPImageProcessorPil", "DynamicCache",
        "GenerationConfig", "GenerationMixin", "PretrainedConfig", "PreTrainedModel", "PreTrainedTokenizer",
        "ProcessorMixin", "QuantizedCache", "StaticCache",
    },
    "transformers.activations": {"ACT2FN"},
    "transformers.masking_utils": {"create_causal_mask"},
    "transformers.modeling_outputs": {
        "BaseModelOutputWithPast", "BaseModelOutputWithPooling", "CausalLMOutputWithPast",
    },
    "transformers.modeling_utils": {"ALL_ATTENTION_FUNCTIONS"},
    "transformers.quantizers": {"AutoQuantizationConfig"},
    "transformers.utils": {"ModelOutput", "is_flash_attn_2_available", "logging"},
}  # fmt: skip
ALLOWED_INSIDE = {
    "accelerate.utils": {"convert_file_size_to_int"},
    "sentencepiece": {None},
    "transformers": {"modeling_utils"},
}


def imports_of(tree: ast.Module) -> list[tuple[str, str | None, bool]]:
    """(module, name, whether it is inside a function) of every import outside the standard library; "." is the repo."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, None, id(node) in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [(module, alias.name, id(node) in inside) for alias in node.names]
    return [each for each in found if each[0].split(".")[0] not in sys.stdlib_module_names]


@pytest.mark.parametrize("name", MODULES)
def test_only_allowed_imports(name):
    for module, imported, is_inside in imports_of(MODULES[name]):
        if module.startswith("."):
            # The loader misses `from . import x`, and it fetches a relative import even inside a function.
            is_lazy = (name, module) == ("modeling_internvl.py", ".training_internvl")
            assert f"{module[1:]}.py" in MODULES and is_inside == is_lazy, f"{module} in {name}"
            continue
        allowed = ALLOWED_INSIDE if is_inside else ALLOWED_TOP
        assert imported in allowed.get(module, ()), f"{name} imports {imported or ''} from {module}"


def test_allow_list_names_nothing_unused():
    used = {(module, imported) for tree in MODULES.values() for module, imported, _ in imports_of(tree)}
    for module, names in [*ALLOWED_TOP.items(), *ALLOWED_INSIDE.items()]:
        for imported in names:
            assert (module, imported) in used, f"{imported} of {module}"


def test_no_optional_package_at_the_top_level():
    top = {
        module.split(".")[0] for tree in MODULES.values() for module, _, is_inside in imports_of(tree) if not is_inside
    }
    required = {"PIL", "huggingface_hub", "numpy", "safetensors", "torch", "transformers"}
    assert top - {""} == required


# ------------------------------------------------------------------------------------------------------ saving, config


@pytest.mark.parametrize("class_name", ["InternVLModel", "InternVLForRetrieval", "InternVL_G"])
def test_what_is_uploaded_has_the_class_that_loads(flat, tmp_path, monkeypatch, class_name):
    """transformers' own `push_to_hub=True` would upload before the config names that class."""
    model = repo_class(f"modeling_internvl.{class_name}").from_pretrained(flat)
    module, uploaded = sys.modules[repo_class("modeling_internvl.InternVLModel").__module__], []

    def upload_folder(folder_path, **options):
        config = json.loads((Path(folder_path) / "config.json").read_text())
        uploaded.append((options, config["auto_map"]["AutoModel"].rpartition(".")[2]))

    monkeypatch.setattr(module, "upload_folder", upload_folder)
    monkeypatch.setattr(module, "create_repo", lambda name, **options: SimpleNamespace(repo_id=f"org/{name}"))
    options = {"push_to_hub": True, "token": "secret", "commit_message": "Trained"}
    model.save_pretrained(tmp_path / "saved", max_shard_size="1MB", **options)
    model.save_pretrained(tmp_path / "saved", is_main_process=False, **options)
    loads = "InternVLModel" if class_name == "InternVLForRetrieval" else class_name
    assert uploaded == [({"repo_id": "org/saved", "token": "secret", "commit_message": "Trained"}, loads)]
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1


def test_only_the_main_process_writes_the_config(flat, tmp_path):
    load(flat).save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "config.json").exists()


def test_a_users_own_subclass_is_saved_as_the_class_that_it_extends(flat, tmp_path):
    model_class = type("Mine", (repo_class("modeling_internvl.InternVL_G"),), {"__module__": "__main__"})
    loaded = model_class.from_pretrained(flat)
    fresh = model_class(
        repo_class("configuration_internvl.InternVLConfig")(**loaded.config.to_dict() | {"auto_map": None})
    )
    for model, name in ((loaded, "loaded"), (fresh, "fresh")):
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["auto_map"]["AutoModel"].endswith("modeling_internvl.InternVL_G")


OVERRIDES = [{"label_smoothing": 2.0}, {"contrastive_only": "no"}, {"num_query_token": 0}, {"vision_config": None}]


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_override_of_a_field_is_checked(flat, override):
    with pytest.raises(ValueError, match=f"`{next(iter(override))}` must be"):
        load(flat, AutoConfig, **override)


def test_overrides_reach_both_towers(flat):
    config = load(flat, AutoConfig, cross_attention_frequency=4, force_image_size=64, vision_config={"dropout": 0.25})
    assert config.qllama_config.cross_attention_frequency == 4
    assert (config.image_size, config.vision_config.force_image_size) == (64, 64)
    assert config.vision_config.dropout == 0.25
    assert config.vision_config.hidden_size == load(flat, AutoConfig).vision_config.hidden_size
    fields = {"vision_config": config.vision_config, "qllama_config": config.qllama_config.to_dict()}
    changed = type(config).from_dict(fields, vision_config={"num_hidden_layers": 2}).vision_config
    assert (changed.num_hidden_layers, changed.hidden_size) == (2, config.vision_config.hidden_size)
    config, unused = load(flat, AutoConfig, label_smoothing=0.25, other=1, return_unused_kwargs=True)
    assert config.label_smoothing == 0.25 and unused == {"other": 1}


def test_training_names_are_found_in_the_joint_models_module():
    for name in ("InternVLForPreTraining", "InternVLForRetrieval", "InternVLTrainingOutput"):
        found = repo_class(f"modeling_internvl.{name}")
        assert found.__name__ == name and found.__module__.endswith(".training_internvl")
