"""Our code uses no deprecated names of the libraries."""

import pytest

# Part of a warning's text -> why our code does not cause it.
LIBRARIES_OWN = {
    "`is_gradient_checkpointing` is deprecated": "peft asks every model for it",
    "`torch.jit.script_method` is deprecated": "torch calls it when its compiler is first imported",
}
# Part of fresh/deprecations.py -> the feature that it uses.
PARTS = {
    "calls": "loading",
    "saving": "loading",
    "pipelines": "loading",
    "captions": "captions",
    "caption_pipeline": "captions",
    "training": "training",
    "lora": "training",
    "sentences": "sentence-transformers",
    "offloading": "device maps",
}


@pytest.mark.fresh("deprecations")
@pytest.mark.parametrize("part", [pytest.param(part, marks=pytest.mark.feature(PARTS[part])) for part in PARTS])
def test_every_call_was_made(fresh, part):
    if fresh[part] is False:
        pytest.skip(f"the package for {part!r} is missing")


@pytest.mark.fresh("deprecations")
def test_nothing_deprecated_is_used(fresh):
    found = [line for line in fresh["everything"] if not any(text in line[1] for text in LIBRARIES_OWN)]
    assert not found, "\n".join(" | ".join(line) for line in found)
