"""docs/troubleshooting.md quotes messages as they are: each is provoked here, or said to need another machine."""

import re
import runpy
import shutil
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForImageClassification, AutoTokenizer
from transformers.dynamic_module_utils import check_imports

from conftest import IMAGES, ROOT, load, repo_class

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
QUOTED = [" ".join(text.split()) for text in re.findall(r"^```text\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)]
TRUST = {"trust_remote_code": True}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 5000000\n"
# Quoted from the linked reports: they need a GPU, a Mac, Windows, a server, much memory, or other code or packages.
REPORTED = (
    "not found in your environment: flash_attn",
    "'all_tied_weights_keys'",
    "'get_max_length'",
    "torchvision::nms",
    "at least two devices, cuda:0 and cuda:1",
    "CUDA out of memory",
    "Unknown task image-to-text",  # not in every release
    "Model architectures",
    "protobuf size of 2GB",
    "the 2GiB limit",
    "MPS device",
    "WinError 1314",
)


def pointers(trained, folder, *names):
    """The trained checkpoint, in which these files are pointers of Git LFS."""
    shutil.copytree(trained, folder)
    for name in names:
        (folder / name).write_text(POINTER)
    return folder


def clone(folder):
    """A clone without the 14B's weights and tokenizer."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.json")):
        shutil.copy(path, folder)
    return folder


def without_sentencepiece(patch):
    class Finder:
        @staticmethod
        def find_spec(name, *others):
            if name == "sentencepiece":
                raise ModuleNotFoundError(f"No module named {name!r}")

    patch.delitem(sys.modules, "sentencepiece", raising=False)
    patch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    check_imports(ROOT / "tokenization_internvl.py")


def without_pillow(patch):
    patch.setitem(sys.modules, "PIL", None)
    runpy.run_path(str(ROOT / "images_internvl.py"))


def compat():
    package = repo_class("modeling_internvl.InternVLModel").__module__.rpartition(".")[0]
    return sys.modules[f"{package}.compat_internvl"]


# A part of a quoted message -> a call that raises, warns or logs it. t: the model, p: its processor, path: its folder.
PROVOKED = {
    "does not start with": lambda t, p, **_: t.embed_text(**p(text="panda", task="match")),
    "does not end with": lambda t, p, **_: t.embed_text(p(text="panda").input_ids[:, :-1]),
    "more than 80 ids": lambda p, **_: p(text=["a word " * 80, "panda"]),
    "another checkpoint": lambda t, p, patch, **_: (
        patch.setattr(t.config.vision_config, "image_size", 7),
        t.check_processor(p),
    ),
    "already normalised": lambda p, **_: p(images=p(images=IMAGES[0]).pixel_values),
    "must be a floating-point tensor": lambda t, **_: t.embed_image(IMAGES[0]),
    "single real token": lambda t, **_: t.embed_text(torch.zeros(1, 4, dtype=torch.long)),
    "contains custom code": lambda path, **_: AutoModel.from_pretrained(path, trust_remote_code=False),
    "FlashAttention2 has been": lambda path, **_: load(path, attn_implementation="flash_attention_2"),
    "needs transformers 4.57": lambda **_: compat().check_release("4.37.2"),
    "model-00001-of-00006": lambda folder, **_: load(clone(folder)),
    "there is no tokenizer.model": lambda folder, **_: load(clone(folder), AutoTokenizer),
    "configuration_internvl.py": lambda **_: AutoModel.from_pretrained("./tiny", **TRUST),
    "header too large": lambda path, folder, **_: load(
        pointers(path, folder / "lfs", *(each.name for each in path.glob("*.safetensors")))
    ),
    "non-SPM vocab file": lambda path, folder, **_: load(
        pointers(path, folder / "lfs", "tokenizer.model"), AutoTokenizer
    ),
    "We couldn't connect": lambda **_: AutoModel.from_pretrained("ORG/InternVL-14B", **TRUST),
    "environment: sentencepiece": lambda patch, **_: without_sentencepiece(patch),
    "needs Pillow": lambda patch, **_: without_pillow(patch),
    "bias type (c10::BFloat16)": lambda p, half, **_: half.vision_model.embeddings.patch_embedding(
        p(images=IMAGES[0]).pixel_values
    ),
    "ScalarType BFloat16": lambda half, p, **_: half.embed_image(p(images=IMAGES[0]).pixel_values).detach().numpy(),
    "Can't call numpy()": lambda t, p, **_: t.embed_image(p(images=IMAGES[0]).pixel_values).numpy(),
    "can't move a model": lambda path, folder, **_: load(path, device_map={"": "disk"}, offload_folder=str(folder)).to(
        "cpu"
    ),
    "gives no device to": lambda path, **_: load(path, device_map={"qllama": "cpu"}),
    "A prompt ends with": lambda t, p, **_: t.generate(
        p(images=IMAGES[0]).pixel_values, p(text="panda").input_ids, max_new_tokens=1
    ),
    "unexpected keyword argument": lambda t, p, **_: t.generate(p(images=IMAGES[0]).pixel_values, max_new_token=8),
    "captions need an image": lambda t, **_: t.generate(),
    "Unrecognized configuration class": lambda path, **_: load(path, AutoModelForImageClassification),
    "'query_key_value'": lambda path, **_: get_peft_model(load(path), LoraConfig(target_modules=["query_key_value"])),
}


@pytest.fixture(scope="module")
def half(trained):
    return load(trained, dtype=torch.bfloat16)


def caught(call) -> str:
    """What a call raises, warns or logs once."""
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for name, module in list(sys.modules.items()):
            if name.startswith("transformers_modules") and hasattr(module, "logger"):
                patch.setattr(module.logger, "warning_once", found.append)
        patch.chdir(ROOT)
        try:
            call(patch)
        except Exception as error:
            found.append(str(error))
    return " ".join(" ".join([*found, *(str(each.message) for each in warned)]).split())


@pytest.mark.parametrize("part", PROVOKED)
def test_the_message_is_what_the_page_quotes(part, tiny, processor, half, trained, tmp_path):
    (quoted,) = [message for message in QUOTED if part in message]
    pattern = ".*".join(map(re.escape, quoted.split("...")))
    message = caught(
        lambda patch: PROVOKED[part](t=tiny, p=processor, half=half, path=trained, folder=tmp_path, patch=patch)
    )
    assert re.search(pattern, message), message


def test_every_quoted_message_is_provoked_or_reported():
    for message in QUOTED:
        assert [part for part in (*PROVOKED, *REPORTED) if part in message], message
    for part in REPORTED:
        assert len([message for message in QUOTED if part in message]) == 1, part


def test_the_page_has_twenty_sections_and_lists_them_first():
    body = re.sub(r"^```.*?^```", "", PAGE, flags=re.DOTALL | re.MULTILINE)
    sections = re.findall(r"^### (.+)$", body, re.MULTILINE)
    listed = re.findall(r"\| \[([^]]+)\]\(#([\w-]+)\) \|$", body, re.MULTILINE)
    assert listed == [(name, re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-")) for name in sections]
    assert len(sections) == 20


def test_every_report_has_its_link():
    named = set(re.findall(r"\[([\w.-]+/[\w.-]+#\d+)\](?!:)", PAGE))
    links = dict(re.findall(r"^\[(.+#\d+)\]: (\S+)$", PAGE, re.MULTILINE))
    assert named and named == set(links)
    for name, link in links.items():
        repository, number = name.split("#")
        assert re.fullmatch(rf"https://github\.com/{repository}/(issues|pull)/{number}", link)
