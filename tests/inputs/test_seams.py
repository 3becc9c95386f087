"""Built-in checks: missing packages, another checkpoint's tokenizer, another image size, another recipe."""

import json
import sys

import pytest
import torch
from transformers import BertTokenizer, CLIPImageProcessor

from conftest import ROOT, repo_class, run_interpreter

IMAGE = ROOT / "examples" / "pictures" / "panda.png"


@pytest.fixture
def warnings_of(tiny, monkeypatch):
    """The model's warnings, also repeated ones."""
    messages = []
    rooms = {cls.__module__ for part in (tiny, tiny.vision_model) for cls in type(part).__mro__}
    for room in (sys.modules[name] for name in rooms if name.startswith("transformers_modules")):
        if hasattr(room, "logger"):
            monkeypatch.setattr(room.logger, "warning_once", messages.append)
    return messages


# --------------------------------------------------------------------------------------- processor and checkpoint


def test_the_checkpoints_own_processor_is_accepted(tiny, processor):
    tiny.check_processor(processor)


@pytest.mark.parametrize(
    "field, value, complaint",
    [
        ("qllama_config.vocab_size", 32000, r"4,096 tokens, but the model has 32,000 ids"),
        ("qllama_config.eos_token_id", 3, r"`eos_token_id` is 2, the model's is 3"),
        ("embed_prefix_ids", [1, 19138, 675, 29901], r"`summarize:` are \[480, 2325\], not \[19138, 675, 29901\]"),
        ("vision_config.image_size", 96, r"48 x 48 pixels, but the model expects 96 x 96"),
    ],
)
def test_the_processor_of_another_checkpoint_is_refused(tiny, processor, monkeypatch, field, value, complaint):
    *path, name = field.split(".")
    part = tiny.config
    for step in path:
        part = getattr(part, step)
    monkeypatch.setattr(part, name, value)
    for call in (lambda: tiny.check_processor(processor), lambda: tiny.embed_classes(processor, ["panda"])):
        with pytest.raises(ValueError, match=f"belongs to another checkpoint: .*{complaint}"):
            call()


def test_wrong_types_of_processors_are_refused(tiny, processor):
    for wrong in (processor.tokenizer, processor.image_processor, None):
        with pytest.raises(TypeError, match="`processor` must be an InternVLProcessor"):
            tiny.check_processor(wrong)


def test_a_tokenizer_of_another_kind_is_refused_by_the_processor(trained, tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\npanda\n")
    foreign = BertTokenizer(str(tmp_path / "vocab.txt"))
    processor_class = repo_class("processing_internvl.InternVLProcessor")
    with pytest.raises(
        ValueError, match="`tokenizer` must be the checkpoint's.*BertTokenizer.* without `bos_token_id`"
    ):
        processor_class(CLIPImageProcessor.from_pretrained(trained), foreign)


def test_published_config_knows_its_prefix():
    """The ids of `<s>` and of `summarize:` in the published tokenizer."""
    assert json.loads((ROOT / "config.json").read_text())["embed_prefix_ids"] == [1, 19138, 675, 29901]


# ------------------------------------------------------------------------------------------------ recipe and size


@torch.inference_mode()
def test_another_recipe_causes_a_warning(tiny, processor, warnings_of):
    for arguments, expected in (
        ({"text": ["panda", "狐狸"]}, []),
        ({"text": ["panda", "a very long text about nothing at all"]}, []),
        ({"text": ["panda", "狐狸"], "task": "match"}, ["`summarize:`"]),
        ({"text": ["summarize:panda"], "task": "caption"}, ["`</s>`"]),
        ({"text": ["panda"], "task": "caption"}, ["`</s>`", "`summarize:`"]),
    ):
        warnings_of.clear()
        tiny.embed_text(**processor(**arguments))
        assert len(warnings_of) == len(expected), (arguments, warnings_of)
        assert all(wanted in message for message, wanted in zip(warnings_of, expected))


@torch.inference_mode()
def test_the_prefix_is_found_after_left_padding(tiny, processor, warnings_of):
    ids = processor(text=["panda", "a very long text about nothing at all"])
    order = torch.argsort(ids.attention_mask, dim=1, stable=True)
    tiny.embed_text(ids.input_ids.gather(1, order), ids.attention_mask.gather(1, order))
    tiny.embed_text(ids.input_ids[:, :2], ids.attention_mask[:, :2])  # shorter than the prefix: no `</s>`, no error
    assert [message for message in warnings_of if "summarize" in message] == []


@torch.inference_mode()
def test_another_size_causes_a_warning(tiny, processor, warnings_of):
    pixels = processor(images=IMAGE).pixel_values
    tiny.embed_image(pixels)
    assert warnings_of == []
    tiny.embed_image(torch.nn.functional.interpolate(pixels, 64))
    assert len(warnings_of) == 1 and "64 x 64 pixels, but the checkpoint's positions are for 48 x 48" in warnings_of[0]


# ----------------------------------------------------------------------------------------------- missing packages

HIDE = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *others):
        return None if name.split(".")[0] == sys.argv[2] else super().find_spec(name, *others)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def message_without(package, trained, folder, code):
    """The error message of a new interpreter without a package."""
    guarded = "\n".join("    " + line for line in code.strip().splitlines())
    script = f"{HIDE}\ntry:\n{guarded}\nexcept Exception as error:\n    print('SAID', type(error).__name__, error)\n"
    return run_interpreter(script, folder, trained, package).stdout


def test_pillow_is_named_as_pip_knows_it(trained, tmp_path):
    code = """
from transformers.dynamic_module_utils import get_class_from_dynamic_module
get_class_from_dynamic_module("processing_internvl.InternVLProcessor", sys.argv[1])
"""
    assert "pip install pillow" in message_without("PIL", trained, tmp_path, code)


def test_sentencepiece_is_named(trained, tmp_path):
    code = """
from transformers.dynamic_module_utils import get_class_from_dynamic_module
get_class_from_dynamic_module("tokenization_internvl.InternVLTokenizer", sys.argv[1])
"""
    assert "pip install sentencepiece" in message_without("sentencepiece", trained, tmp_path, code)


def test_accelerate_is_named(trained, tmp_path):
    code = """
from transformers import AutoModel
for options in ({"device_map": "auto"}, {"device_map": "auto", "max_memory": {"cpu": "1GB"}}):
    try:
        AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, **options)
    except Exception as error:
        print("SAID", str(error).replace("\\n", " "))
"""
    said = [line for line in message_without("accelerate", trained, tmp_path, code).splitlines() if "SAID" in line]
    assert len(said) == 2 and all("pip install" in line and "accelerate" in line for line in said)
