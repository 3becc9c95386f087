"""Our code uses nothing that the libraries have deprecated."""

import pytest

# Part of a warning's text -> why our code does not cause it.
LIBRARIES_OWN: dict[str, str] = {}
PARTS = ["calls", "training", "saving", "pipelines", "sentences", "offloading"]
CAPTIONS = ["captions", "caption_pipeline"]


@pytest.mark.fresh("noticed")
@pytest.mark.parametrize(
    "part", [*PARTS, *(pytest.param(each, marks=pytest.mark.feature("generate")) for each in CAPTIONS)]
)
def test_every_call_was_made(fresh, part):
    if fresh[part] is False:
        pytest.skip(f"the package for {part!r} is missing")


@pytest.mark.fresh("noticed")
def test_nothing_deprecated_is_used(fresh):
    found = [line for line in fresh["everything"] if not any(text in line[1] for text in LIBRARIES_OWN)]
    assert not found, "\n".join(" | ".join(line) for line in found)
