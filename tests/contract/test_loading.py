"""Loading and saving, mostly in fresh interpreters."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers.utils import is_torchvision_available

from conftest import GOLDEN, INDEX, TOLERANCE, golden, load

CLASSES = ["InternVLConfig", "InternVLModel", "InternVLProcessor", "InternVLTokenizer", "internvl_14b"]
CULPRIT = "itm_head.bias"


@pytest.mark.fresh("load")
@pytest.mark.parametrize("place", ["folder", "subfolder"])
def test_auto_classes(fresh, place):
    assert fresh[f"{place}_classes"] == CLASSES


@pytest.mark.fresh("load")
@pytest.mark.parametrize("place", ["folder", "subfolder"])
def test_auto_image_processor(fresh, place):
    """AutoProcessor needs no torchvision; in transformers 5.4 to 5.17 AutoImageProcessor itself requires it."""
    found = fresh[f"{place}_image_processor"]
    minor = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if (5, 4) <= minor <= (5, 17) and not is_torchvision_available():
        assert "torchvision" in found
    else:
        assert found == ["CLIPImageProcessor", 48, 48]


@pytest.mark.fresh("load")
def test_tokens_are_those_of_sentencepiece(fresh):
    by_tokenizer, by_processor = fresh["subfolder_tokens"]
    assert by_tokenizer == by_processor and {ids[0] for ids in by_tokenizer} == {1}
    assert {ids[-1] for ids in by_tokenizer} == {2} and len(by_tokenizer[0]) > 5


@pytest.fixture
def saved(interpreters):
    """The output of save.py, which ran before load.py."""
    return interpreters.found("save")


@pytest.mark.fresh("load")
def test_saved_weights_are_the_same_bits(fresh, saved):
    assert len(saved["saved"]) > 100 and fresh["saved"] == saved["saved"]


@pytest.mark.fresh("load")
def test_saved_model_embeds_and_matches_to_the_same_bits(fresh, saved):
    assert len(saved["embeds"]) == 5 and fresh["embeds"] == saved["embeds"]


@pytest.mark.feature("captions")
@pytest.mark.fresh("load")
def test_saved_model_generates_the_same_captions(fresh, saved):
    assert len(saved["captions"]) == 4 and fresh["captions"] == saved["captions"]


@pytest.mark.fresh("load")
def test_saved_parts_load_by_automodel(fresh, saved):
    wanted = {
        "text_part": "InternVLTextModelWithProjection",
        "vision_part": "InternVLVisionModelWithProjection",
        "contrastive_part": "InternVLModel",
    }
    assert {name: kind for name, (kind, _) in fresh["parts"].items()} == wanted
    assert {name: state for name, (_, state) in fresh["parts"].items()} == saved["parts"]
    sizes = {name: len(state) for name, state in saved["parts"].items()}
    assert sizes["contrastive_part"] == sizes["text_part"] + sizes["vision_part"] + 1  # logit_scale


@pytest.mark.fresh("load")
def test_auto_dtype_is_the_checkpoints(fresh):
    assert fresh["auto_dtype"] == ["torch.bfloat16"]


@pytest.mark.fresh("load")
def test_original_checkpoint_loads_our_classes(fresh):
    """Its config has `model_type: "internvl"`, the name of an unrelated model of transformers."""
    kind, model_type, state, embeds = fresh["original"]
    assert (kind, model_type) == ("InternVLModel", "internvl_14b")
    assert set(state) == set(load_file(GOLDEN / "tiny" / "model.safetensors"))
    for mode, values in embeds.items():
        wanted = golden("tiny/expected")[f"encode_image_{mode[-1].lower()}"]
        assert_close(torch.tensor(values), wanted, **TOLERANCE)
    assert fresh["original_auto_dtype"] == "torch.bfloat16"


@pytest.mark.fresh("load")
def test_adapters_are_merged_at_loading(fresh, saved):
    assert saved["lora"] > 0, "the checkpoint holds more tensors than the model"
    difference, change = fresh["lora"]
    assert difference < 1e-5 < 1e-2 < change


@pytest.mark.fresh("bare")
def test_nothing_optional_is_needed(fresh):
    assert len(fresh["embeds"]) == 5 and fresh["imported"] == []


@pytest.mark.feature("captions")
@pytest.mark.fresh("bare")
def test_nothing_optional_is_needed_for_captions(fresh):
    assert fresh["captions"] == 4


# ----------------------------------------------------------------------------------------------------- strictness


@pytest.fixture
def broken(trained, tmp_path):
    """A function that copies the checkpoint and applies `change(tensors)` to the shard of the culprit."""

    def make(change):
        folder = shutil.copytree(trained, tmp_path / "broken")
        index = json.loads((folder / INDEX).read_text())
        file = folder / index["weight_map"][CULPRIT]
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        index["weight_map"] = {name: where for name, where in index["weight_map"].items() if where != file.name}
        index["weight_map"] |= dict.fromkeys(tensors, file.name)
        (folder / INDEX).write_text(json.dumps(index))
        return folder

    return make


CHANGES = {
    "missing": (lambda tensors: tensors.pop(CULPRIT), r"missing_keys: itm_head\.bias"),
    "unexpected": (lambda tensors: tensors.update(another=torch.ones(2)), "unexpected_keys: another"),
    "of another shape": (lambda tensors: tensors.update({CULPRIT: torch.ones(3)}), r"itm_head\.bias"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_tensor_that_does_not_fit_is_an_error(broken, case):
    change, message = CHANGES[case]
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){message}"):
        load(broken(change))


def test_not_strict_reports_what_is_missing(broken):
    model, info = load(broken(CHANGES["missing"][0]), strict=False, output_loading_info=True)
    assert set(info["missing_keys"]) == {CULPRIT} and model.itm_head.bias.isfinite().all()


def test_a_misspelt_option_is_refused(trained):
    with pytest.raises(TypeError, match="stric_t"):
        load(trained, stric_t=False)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_attention_is_chosen_at_loading(trained, attn_implementation):
    model = load(trained, attn_implementation=attn_implementation)
    for part in (model.vision_model.encoder.layers[0].attn, model.qllama.model.layers[0].self_attn):
        assert part.config._attn_implementation == attn_implementation
