"""Parts loaded from the joint model's checkpoint read only their own tensors and give the joint model's values."""

import shutil

import pytest
import torch
import transformers.modeling_utils
from transformers import AutoModelForTextEncoding

from conftest import IDS, INDEX, PIXELS, ROOT, load, repo_class, run_python

TEXT = "modeling_internvl.InternVLTextModelWithProjection"
VISION = "modeling_internvl.InternVLVisionModelWithProjection"
TOWER = "modeling_intern_vit.InternVisionModel"
PARTS = [TEXT, VISION, TOWER]


@pytest.fixture(scope="module")
def joint(flat):
    return load(flat, dtype=torch.bfloat16)


def load_part(reference, folder, **options):
    return repo_class(reference).from_pretrained(folder, dtype=torch.bfloat16, **options)


def values(part) -> dict[str, torch.Tensor]:
    """All outputs of a part, by the names of the joint model."""
    found = {}
    with torch.inference_mode():
        if hasattr(part, "text_projection"):
            found |= {
                "encode_text": part.encode_text(IDS),
                "embed_text": part.embed_text(IDS, IDS > 0),
                "get_text_features": part.get_text_features(IDS),
            }
        if hasattr(part, "clip_projector"):
            found |= {"encode_image": part.encode_image(PIXELS), "embed_image": part.embed_image(PIXELS, "InternVL-C")}
        tower = getattr(part, "vision_model", None if found else part)
        if tower is not None:
            found["vision tower"] = tower(PIXELS).last_hidden_state
    return found


@pytest.mark.parametrize("reference", PARTS)
def test_parts_equal_the_joint_model_bit_for_bit(flat, joint, reference):
    part, whole = load_part(reference, flat), values(joint)
    found = values(part)
    assert found and all(torch.equal(tensor, whole[name]) for name, tensor in found.items())


def test_forward_of_the_text_model(flat, joint):
    model = load_part(TEXT, flat)
    for mask in (None, IDS > 0, torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])):
        with torch.inference_mode():
            output = model(IDS, mask)
            states = joint.get_text_features(IDS, mask)
        real = IDS > 0 if mask is None else mask > 0
        assert torch.equal(output.text_embeds, joint.encode_text(IDS, mask))
        assert torch.equal(output.last_hidden_state[real], states[real])
        assert all(
            torch.equal(*pair) for pair in zip(model(IDS, mask, return_dict=False), output.to_tuple(), strict=True)
        )
    with pytest.raises(ValueError, match="row without a single real token"):
        model(IDS * 0)


def test_forward_of_the_vision_model(flat, joint):
    model = load_part(VISION, flat)
    with torch.inference_mode():
        output, tower = model(PIXELS, output_hidden_states=True), joint.vision_model(PIXELS, output_hidden_states=True)
    assert torch.equal(output.image_embeds, joint.encode_image(PIXELS, "InternVL-C"))
    assert torch.equal(output.last_hidden_state, tower.last_hidden_state)
    assert all(torch.equal(*pair) for pair in zip(output.hidden_states, tower.hidden_states, strict=True))
    assert model(PIXELS).hidden_states is None and len(model(PIXELS, return_dict=False)) == 2


@pytest.mark.parametrize("call", ["encode_image", "embed_image"])
def test_the_vision_model_has_no_queries(flat, call):
    with pytest.raises(ValueError, match="InternVL-G.* needs the queries"):
        getattr(load_part(VISION, flat), call)(PIXELS, "InternVL-G")


# ---------------------------------------------------------------------------------------------- their tensors


class Recorder:
    """Replaces `safe_open` and records the tensors whose values are read."""

    def __init__(self, monkeypatch):
        self.read, recorder, original = set(), self, transformers.modeling_utils.safe_open

        class Recorded:
            def __init__(self, *args, **kwargs):
                self.file = original(*args, **kwargs)

            def __enter__(self):
                self.file.__enter__()
                return self

            def __exit__(self, *error):
                return self.file.__exit__(*error)

            def __getattr__(self, name):
                return getattr(self.file, name)

            def get_tensor(self, name):
                recorder.read.add(name)
                return self.file.get_tensor(name)

            def get_slice(self, name):
                return Slice(name, self.file.get_slice(name))

        class Slice:
            def __init__(self, name, found):
                self.name, self.found = name, found

            def __getitem__(self, index):
                recorder.read.add(self.name)
                return self.found[index]

            def __getattr__(self, name):
                return getattr(self.found, name)

        monkeypatch.setattr(transformers.modeling_utils, "safe_open", Recorded)


def own_names(part, reference) -> set[str]:
    prefix = "vision_model." if reference == TOWER else ""
    return {prefix + name for name in part.state_dict()}


@pytest.mark.parametrize("reference", [*PARTS, "contrastive_only"])
def test_only_own_tensors_are_read(flat, joint, reference, monkeypatch):
    recorder = Recorder(monkeypatch)
    if reference == "contrastive_only":
        part = load(flat, dtype=torch.bfloat16, contrastive_only=True)
    else:
        part = load_part(reference, flat)
    assert recorder.read == own_names(part, reference)
    assert recorder.read < set(joint.state_dict())


def parameters_in_billions(model_class, config) -> float:
    with torch.device("meta"):
        return round(sum(parameter.numel() for parameter in model_class(config).parameters()) / 1e9, 2)


def test_sizes_of_the_parts_at_14_billion(config_14b):
    sizes = {reference: parameters_in_billions(repo_class(reference), config_14b) for reference in (TEXT, VISION)}
    sizes[TOWER] = parameters_in_billions(repo_class(TOWER), config_14b.vision_config)
    joint = repo_class("modeling_internvl.InternVLModel")
    sizes["joint"] = parameters_in_billions(joint, config_14b)
    config_14b.contrastive_only = True
    sizes["contrastive_only"] = parameters_in_billions(joint, config_14b)
    assert sizes == {TEXT: 6.68, VISION: 5.94, TOWER: 5.9, "joint": 13.83, "contrastive_only": 12.62}


@pytest.fixture
def config_14b():
    return repo_class("configuration_internvl.InternVLConfig").from_pretrained(ROOT)


@pytest.mark.parametrize("reference", PARTS)
def test_parts_are_strict_about_their_own_tensors(flat, tmp_path, reference):
    from safetensors.torch import load_file, save_file

    own = shutil.copytree(flat, tmp_path / "own")
    culprit = {TEXT: "text_projection", VISION: "clip_projector.norm1_q.bias"}.get(
        reference, "vision_model.encoder.layers.1.ls1"
    )
    for shard in own.glob("*.safetensors"):
        tensors = load_file(shard)
        if culprit in tensors:
            del tensors[culprit]
            tensors["superfluous"] = torch.zeros(2)
            save_file(tensors, shard, metadata={"format": "pt"})
            index = own / INDEX
            index.write_text(index.read_text().replace(f'"{culprit}"', '"superfluous"'))
    with pytest.raises(ValueError, match=f"missing_keys: {culprit.removeprefix('vision_model.')}.*superfluous"):
        load_part(reference, own)


# -------------------------------------------------------------------------------------------------- contrastive_only


@pytest.fixture(scope="module")
def contrastive(flat):
    return load(flat, dtype=torch.bfloat16, contrastive_only=True)


def test_contrastive_only_equals_the_joint_model(contrastive, joint):
    whole = values(joint)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in values(contrastive).items())
    with torch.inference_mode():
        mine, all_of_it = (model(IDS, PIXELS).logits_per_image for model in (contrastive, joint))
        assert torch.equal(mine, all_of_it)
        pair = contrastive(image=PIXELS, text=IDS, mode="InternVL-C")
        assert torch.equal(pair[0], joint(image=PIXELS, text=IDS, mode="InternVL-C")[0])


NEED_QUERIES = {
    "embed_image": lambda model: model.embed_image(PIXELS, mode="InternVL-G"),
    "encode_image": lambda model: model.encode_image(PIXELS, "InternVL-G"),
    "forward": lambda model: model(IDS, PIXELS, mode="InternVL-G"),
    "match": lambda model: model.match(PIXELS, IDS),
    "generate": lambda model: model.generate(PIXELS),
    "get_image_features": lambda model: model.get_image_features(PIXELS),
}


@pytest.mark.parametrize("call", NEED_QUERIES)
def test_contrastive_only_refuses_other_calls_at_once(contrastive, call, monkeypatch):
    monkeypatch.setattr(contrastive.vision_model, "forward", None)
    with pytest.raises(ValueError, match="needs the queries"):
        NEED_QUERIES[call](contrastive)


def test_contrastive_only_is_kept_when_saved(contrastive, tmp_path):
    contrastive.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.bfloat16)
    assert again.config.contrastive_only and list(again.state_dict()) == list(contrastive.state_dict())
    assert torch.equal(again.encode_text(IDS), contrastive.encode_text(IDS))


# ------------------------------------------------------------------------------------------------ auto class, saving


def test_the_text_model_has_an_auto_class(flat, joint):
    model = load(flat, AutoModelForTextEncoding, dtype=torch.bfloat16)
    assert type(model).__name__ == "InternVLTextModelWithProjection"
    assert torch.equal(model.encode_text(IDS), joint.encode_text(IDS))


@pytest.mark.parametrize("reference", [TEXT, VISION])
def test_a_saved_part_loads_by_auto_model_in_a_fresh_process(flat, tmp_path, reference):
    part = load_part(reference, flat)
    part.save_pretrained(tmp_path / "saved")
    torch.save(values(part), tmp_path / "expected.pt")
    code = """
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="auto")
print(type(model).__name__, sum(p.numel() for p in model.parameters()))
torch.save(model.state_dict(), sys.argv[2])
"""
    done = run_python(code, tmp_path, tmp_path / "saved", tmp_path / "state.pt")
    size = sum(parameter.numel() for parameter in part.parameters())
    assert done.stdout.split() == [reference.split(".")[1], str(size)]
    state = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(state[name], tensor) for name, tensor in part.state_dict().items())


@pytest.mark.parametrize("reference", [TEXT, VISION])
def test_parts_get_finite_fresh_weights_and_gradients(flat, reference):
    config = repo_class("configuration_internvl.InternVLConfig").from_pretrained(flat)
    model = repo_class(reference)(config).train()
    for tensor in values(model).values():
        assert tensor.isfinite().all()
    given = {"input_ids": IDS} if reference == TEXT else {"pixel_values": PIXELS}
    model(**given)[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
