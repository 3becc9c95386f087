"""model.safetensors.index.json and tools/hub/write_index.py, which writes it."""

import json
import math
import shutil
import sys

import pytest
import torch
from transformers import AutoModel

from conftest import GOLDEN, IS_V5, ROOT, make_repository
from tools.hub import write_index

PUBLISHED_BYTES = 2 * 13_834_975_747
SHAPES = json.loads((GOLDEN / "internvl_14b_parameters.json").read_text())


def bytes_of(names):
    return sum(2 * math.prod(SHAPES[name]) for name in names)


@pytest.fixture(scope="module")
def index():
    return json.loads((ROOT / write_index.INDEX).read_text())


@pytest.fixture(scope="module")
def tiny_repository(tmp_path_factory):
    return make_repository(tmp_path_factory.mktemp("index") / "repository", flat=True)


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["write_index.py", *map(str, arguments)])
    write_index.main()


def test_index_covers_the_published_tensors(index):
    assert set(index["weight_map"]) == set(SHAPES) and len(index["weight_map"]) == 1048
    assert index["metadata"] == {"total_size": PUBLISHED_BYTES} and bytes_of(SHAPES) == PUBLISHED_BYTES


def test_shards_are_numbered_contiguous_and_at_most_5_gb(index):
    files = list(dict.fromkeys(index["weight_map"].values()))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    runs = [
        file
        for file, after in zip(index["weight_map"].values(), [*index["weight_map"].values()][1:], strict=False)
        if file != after
    ]
    assert runs == files[:-1]  # each file is one run of neighbours
    sizes = [bytes_of(name for name, file in index["weight_map"].items() if file == wanted) for wanted in files]
    largest = bytes_of(["qllama.lm_head.weight"])
    assert max(sizes) <= 5e9 and min(sizes[:-1]) > 5e9 - largest and sum(sizes) == PUBLISHED_BYTES


def test_tensors_are_in_the_order_of_the_published_checkpoint(index):
    """Another order moves tensors across the shards' boundaries, and the published shards would not fit the index."""
    assert list(index["weight_map"]) == list(SHAPES)


def test_index_is_the_one_the_tool_writes(monkeypatch):
    run_tool(monkeypatch, "--check")


def test_it_splits_as_save_pretrained_does(tiny_repository, monkeypatch, tmp_path):
    model = AutoModel.from_pretrained(tiny_repository, trust_remote_code=True, dtype=torch.bfloat16)
    # 5.x sorts the tensors before it splits them, unless told to leave the checkpoint's format alone.
    options = {"save_original_format": False} if IS_V5 else {}
    model.save_pretrained(tmp_path, max_shard_size="1MB", **options)
    saved = json.loads((tmp_path / write_index.INDEX).read_text())
    index = write_index.make_index(tiny_repository, "1MB")
    assert len(set(index["weight_map"].values())) > 3
    assert index["weight_map"] == saved["weight_map"]
    assert index["metadata"]["total_size"] == saved["metadata"]["total_size"]
    assert list(index["weight_map"]) == list(model.state_dict())


def tamper_size(index):
    index["metadata"]["total_size"] += 1


def tamper_missing(index):
    del index["weight_map"]["logit_scale"]


def tamper_extra(index):
    index["weight_map"]["qllama.model.extra"] = "model-00001-of-00002.safetensors"


def tamper_file(index):
    index["weight_map"]["itm_head.bias"] = "model-00001-of-00002.safetensors"


def tamper_order(index):
    index["weight_map"] = dict(sorted(index["weight_map"].items()))


def tamper_field(index):
    index["note"] = "by hand"


@pytest.mark.parametrize(
    "tamper, complaint",
    [
        (tamper_size, "metadata is .*total_size"),
        (tamper_missing, "lacks 1 tensors, among them logit_scale"),
        (tamper_extra, "superfluous 1 tensors, among them qllama.model.extra"),
        (
            tamper_file,
            "itm_head.bias is in model-00001-of-00002.safetensors, expected model-00002-of-00002",
        ),
        (tamper_order, "order"),
        (tamper_field, "other fields"),
    ],
)
def test_check_names_what_differs(tiny_repository, monkeypatch, tmp_path, tamper, complaint):
    shutil.copytree(tiny_repository, tmp_path / "copy")
    options = ["--folder", tmp_path / "copy", "--max-shard-size", "5MB"]
    run_tool(monkeypatch, *options)
    run_tool(monkeypatch, *options, "--check")
    path = tmp_path / "copy" / write_index.INDEX
    index = json.loads(path.read_text())
    tamper(index)
    path.write_text(json.dumps(index))
    with pytest.raises(SystemExit, match=complaint) as stopped:
        run_tool(monkeypatch, *options, "--check")
    assert str(path) in str(stopped.value.code)
    assert json.loads(path.read_text()) == index  # checking writes nothing


@pytest.mark.parametrize(
    "content, complaint", [(None, "does not exist"), ("{", "not JSON"), ("[]", "not a JSON object")]
)
def test_check_needs_a_readable_file(tmp_path, content, complaint):
    path = tmp_path / write_index.INDEX
    if content is not None:
        path.write_text(content)
    assert complaint in write_index.check(path, {"metadata": {}, "weight_map": {}})
