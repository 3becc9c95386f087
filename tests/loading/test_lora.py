"""The original's LoRA checkpoints load with merged adapters: `use_backbone_lora`, `use_qllama_lora`, PEFT's names."""

import json
import shutil
import sys

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig

from conftest import IS_V5, load, make_repository, repo_class, run_python

VISION = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
QLLAMA = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
RANKS = {"use_backbone_lora": 4, "use_qllama_lora": 3}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def adapted(tower, rank, targets):
    """A tower wrapped by PEFT as in the original, with adapters that are not 0."""
    options = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05, "target_modules": targets}
    wrapped = get_peft_model(tower, LoraConfig(**options, init_lora_weights=False))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


def inputs_of(model):
    size, vocabulary = model.config.image_size, model.config.qllama_config.vocab_size
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pixels = torch.randn(2, 3, size, size)
        ids = torch.randint(3, vocabulary, (2, 6))
    ids[:, -1] = 2
    return pixels, ids


def outputs_of(model):
    """The outputs of both towers, from every public call."""
    pixels, ids = inputs_of(model)
    with torch.inference_mode():
        embeds = [model.embed_image(pixels, mode) for mode in ("InternVL-C", "InternVL-G")]
        return [*embeds, model.embed_text(ids), model.match(pixels, ids)]


def save(folder, state, **fields):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def fine_tuned(folder):
    """A repository with a checkpoint wrapped by PEFT, and the outputs after PEFT's own merging."""
    make_repository(folder, flat=True)
    model = load(folder, dtype=torch.float32).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.vision_model = adapted(model.vision_model, 4, VISION)
        model.qllama = adapted(model.qllama, 3, QLLAMA)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    save(folder, state, **RANKS)
    model.vision_model, model.qllama = model.vision_model.merge_and_unload(), model.qllama.merge_and_unload()
    return state, outputs_of(model)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "repository"
    return folder, *fine_tuned(folder)


def assert_outputs(model, expected):
    for actual, wanted in zip(outputs_of(model.eval()), expected, strict=True):
        torch.testing.assert_close(actual, wanted, **TOLERANCE)


def test_it_loads_merged(checkpoint):
    folder, state, expected = checkpoint
    assert any("base_model.model" in name for name in state) and any(".base_layer." in name for name in state)
    model = load(folder, dtype=torch.float32)
    assert_outputs(model, expected)
    assert model.config.use_backbone_lora == model.config.use_qllama_lora == 0
    assert not any("lora" in name or "base_" in name for name in model.state_dict())
    assert model.name_or_path == str(folder)
    assert (
        model.generation_config.max_new_tokens
        == json.loads((folder / "generation_config.json").read_text())["max_new_tokens"]
    )


def test_the_adapters_matter(checkpoint, tmp_path):
    folder, state, expected = checkpoint
    make_repository(tmp_path / "plain", flat=True)
    plain = outputs_of(load(tmp_path / "plain", dtype=torch.float32).eval())
    for before, after in zip(plain, expected, strict=True):
        assert (before - after).abs().max() > 1e-2


def test_names_of_older_peft_versions(checkpoint, tmp_path):
    """Adapted layers keep their names, without `base_layer`."""
    _, state, expected = checkpoint
    make_repository(tmp_path / "old", flat=True)
    save(tmp_path / "old", {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}, **RANKS)
    assert_outputs(load(tmp_path / "old", dtype=torch.float32), expected)


def test_one_tower_alone_and_pickled_shards(checkpoint, tmp_path):
    """Only the vision tower was tuned, and the checkpoint has the older format, in two files."""
    _, state, expected = checkpoint
    folder = make_repository(tmp_path / "one", flat=True)
    plain = load(folder, dtype=torch.float32).state_dict()
    mixed = {name: tensor for name, tensor in state.items() if not name.startswith("qllama.")}
    mixed |= {name: tensor for name, tensor in plain.items() if name.startswith("qllama.")}
    save(folder, {}, use_backbone_lora=4)
    (folder / "model.safetensors").unlink()
    names = sorted(mixed)
    for number, half in enumerate((names[::2], names[1::2]), 1):
        torch.save({name: mixed[name] for name in half}, folder / f"pytorch_model-0000{number}-of-00002.bin")
    weight_map = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    torch.save(
        {"clip_projector.cross_attn.q_bias": torch.ones(1)}, folder / "pytorch_model-00003-of-00003.bin"
    )  # stale
    model = load(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(outputs_of(model)[0], expected[0], **TOLERANCE)  # InternVL-C, the vision tower alone
    assert torch.equal(model.qllama.state_dict()["lm_head.weight"], plain["qllama.lm_head.weight"])


def test_parts_load_merged(checkpoint):
    folder, _, expected = checkpoint
    pixels, ids = inputs_of(load(folder))
    with torch.inference_mode():
        images = repo_class("modeling_internvl.InternVLVisionModelWithProjection").from_pretrained(
            folder, dtype=torch.float32
        )
        texts = repo_class("modeling_internvl.InternVLTextModelWithProjection").from_pretrained(
            folder, dtype=torch.float32
        )
        tower = repo_class("modeling_intern_vit.InternVisionModel").from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(images.eval().embed_image(pixels), expected[0], **TOLERANCE)
        torch.testing.assert_close(texts.eval().embed_text(ids), expected[2], **TOLERANCE)
        whole = load(folder, dtype=torch.float32).eval().vision_model(pixels).last_hidden_state
        torch.testing.assert_close(tower.eval()(pixels).last_hidden_state, whole, **TOLERANCE)


def test_config_fields_as_arguments(checkpoint):
    folder, _, expected = checkpoint
    model_class = repo_class("modeling_internvl.InternVLModel")
    model = model_class.from_pretrained(folder, dtype=torch.float32, contrastive_only=True).eval()
    pixels, ids = inputs_of(model)
    assert model.config.contrastive_only and not hasattr(model, "itm_head")
    with torch.inference_mode():
        torch.testing.assert_close(model.embed_image(pixels), expected[0], **TOLERANCE)
        torch.testing.assert_close(model.embed_text(ids), expected[2], **TOLERANCE)


def test_with_a_device_map_and_in_bfloat16(checkpoint):
    folder, _, expected = checkpoint
    assert_outputs(load(folder, dtype=torch.float32, device_map="auto"), expected)
    half = load(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    similar = torch.nn.functional.cosine_similarity(outputs_of(half.eval().float())[0], expected[0])
    assert similar.min() > 0.999


def test_on_the_disk(checkpoint, tmp_path):
    folder, _, expected = checkpoint
    options = {"dtype": torch.float32, "device_map": {"": "disk"}, "offload_folder": tmp_path}
    if IS_V5:
        assert_outputs(load(folder, **options), expected)
    else:
        with pytest.raises(ValueError, match="without adapters"):
            load(folder, **options)


def test_the_saved_checkpoint_is_plain(checkpoint, tmp_path):
    folder, _, expected = checkpoint
    load(folder, dtype=torch.float32).save_pretrained(tmp_path / "merged")
    code = """
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
assert model.config.use_backbone_lora == 0, model.config
torch.save(model.state_dict()["vision_model.encoder.layers.0.attn.qkv.weight"], sys.argv[2])
"""
    run_python(code, tmp_path, tmp_path / "merged", tmp_path / "weight.pt")
    weight = load(folder, dtype=torch.float32).vision_model.encoder.layers[0].attn.qkv.weight
    assert torch.equal(torch.load(tmp_path / "weight.pt"), weight)


def test_ranks_without_adapters_change_nothing(tmp_path):
    folder = make_repository(tmp_path / "plain", flat=True)
    before = load(folder).state_dict()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | RANKS))
    after = load(folder).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_half_an_adapter_is_refused(checkpoint, tmp_path):
    _, state, _ = checkpoint
    folder = make_repository(tmp_path / "half", flat=True)
    lost = next(name for name in state if name.endswith("mlp.fc1.lora_B.default.weight"))
    save(folder, {name: tensor for name, tensor in state.items() if name != lost}, **RANKS)
    with pytest.raises(ValueError, match=r"vision_model.encoder.layers.0.mlp.fc1 is incomplete: it has \['A'\]"):
        load(folder)


def test_adapters_that_the_config_does_not_mention_are_refused(checkpoint, tmp_path):
    _, state, _ = checkpoint
    folder = make_repository(tmp_path / "silent", flat=True)
    save(folder, state)
    with pytest.raises(ValueError, match="does not fit"):
        load(folder)


def test_merging_by_hand():
    """W + 2 B A on the golden model's names, without PEFT."""
    merge = repo_class("loading_internvl.merge_adapters")
    weight, a, b = torch.eye(3), torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    module = "qllama.base_model.model.model.layers.0.self_attn.q_proj"
    state = {f"{module}.base_layer.weight": weight, "logit_scale": torch.ones(())}
    state |= {f"{module}.lora_A.default.weight": a, f"{module}.lora_B.default.weight": b}
    merged = merge(state)
    assert set(merged) == {"qllama.model.layers.0.self_attn.q_proj.weight", "logit_scale"}
    expected = torch.tensor([[3.0, 4.0, 6.0], [0.0, 1.0, 0.0], [-2.0, -4.0, -5.0]])
    assert torch.equal(merged["qllama.model.layers.0.self_attn.q_proj.weight"], expected)


def test_it_loads_by_id(checkpoint, tmp_path):
    """From a cache with the layout of the Hub's client, without network."""
    folder, _, expected = checkpoint
    commit = "a" * 40
    cached = tmp_path / "models--org--tuned"
    shutil.copytree(folder, cached / "snapshots" / commit, ignore=shutil.ignore_patterns("__pycache__"))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    model = load("org/tuned", dtype=torch.float32, cache_dir=tmp_path)
    assert_outputs(model, expected)
    assert model.name_or_path == "org/tuned"


def test_a_sharded_checkpoint_on_the_hub(checkpoint, tmp_path, monkeypatch):
    """Only what matches the patterns is downloaded, the index included."""
    _, state, _ = checkpoint
    (tmp_path / "hub" / "tiny").mkdir(parents=True)
    save_torch_state_dict(state, tmp_path / "hub" / "tiny", max_shard_size=sum(t.nbytes for t in state.values()) // 2)
    assert len(list((tmp_path / "hub").rglob("*.safetensors"))) > 1
    loading = sys.modules[repo_class("loading_internvl.InternPreTrainedModel").__module__]

    def snapshot_download(name, allow_patterns):
        files = [str(path.relative_to(tmp_path / "hub")) for path in (tmp_path / "hub").rglob("*.*")]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "hub" / name, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr(loading, "snapshot_download", snapshot_download)
    assert loading.read_checkpoint("org/tuned", subfolder="tiny").keys() == state.keys()


def test_a_variant(checkpoint, tmp_path):
    _, state, expected = checkpoint
    make_repository(tmp_path / "variant", flat=True)
    save(tmp_path / "variant", state, **RANKS)
    (tmp_path / "variant" / "model.safetensors").rename(tmp_path / "variant" / "model.fp16.safetensors")
    model = load(tmp_path / "variant", dtype=torch.float32, variant="fp16")
    assert_outputs(model, expected)
    assert "variant" not in model.generation_config.to_dict()
    with pytest.raises(OSError, match="holds no weights"):
        load(tmp_path / "variant")


def test_a_field_beside_a_config_is_refused(checkpoint):
    folder, _, _ = checkpoint
    with pytest.raises(TypeError, match="label_smoothing"):
        load(folder, config=load(folder, AutoConfig), label_smoothing=0.1)
