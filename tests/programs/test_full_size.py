"""The full-size run and the checkpoint it synthesises, at the size of tiny/."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from conftest import ROOT, run_module
from tools.hub.write_index import INDEX
from tools.machines import synthesise_checkpoint

TINY = ROOT / "tiny"


def tensors_of(folder):
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    synthesise_checkpoint.synthesise(folder, TINY, max_shard_size="1MB", threads=2)
    return folder


def test_values_depend_on_seed_and_name_alone(synthetic, tmp_path):
    state = tensors_of(synthetic)
    assert len(list(synthetic.glob("*.safetensors"))) > 3
    synthesise_checkpoint.synthesise(tmp_path / "whole", TINY, max_shard_size="5GB", threads=1)
    synthesise_checkpoint.synthesise(tmp_path / "seeded", TINY, seed=1)
    whole, seeded = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "seeded")
    assert state.keys() == whole.keys() and all(torch.equal(state[name], whole[name]) for name in state)
    assert not torch.equal(state["itm_head.weight"], seeded["itm_head.weight"])
    assert not torch.equal(state["clip_projector.norm1_q.bias"], state["clip_projector.norm1_k.bias"])


def test_a_tensor_of_several_pieces_has_no_seams(monkeypatch):
    monkeypatch.setattr(synthesise_checkpoint, "CHUNK", 1000)
    tensor = torch.empty(50, 70, dtype=torch.bfloat16, device="meta")
    pieces = [synthesise_checkpoint.chunk_of("x", tensor, number, seed=0) for number in range(4)]
    assert [len(piece) for piece in pieces] == [2000, 2000, 2000, 1000] and len(set(map(bytes, pieces))) == 4
    values = torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.bfloat16).float() * 70**0.5
    assert values.mean().abs() < 0.1 and abs(values.std() - 1) < 0.1


def test_what_is_complete_is_not_written_again(synthetic):
    times = {path: path.stat().st_mtime_ns for path in synthetic.glob("*.safetensors")}
    assert synthesise_checkpoint.synthesise(synthetic, TINY, max_shard_size="1MB") == 0
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_a_checkpoint_of_others_is_left_alone(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {}}))
    with pytest.raises(SystemExit, match="holds a checkpoint that this tool did not write"):
        synthesise_checkpoint.synthesise(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == [INDEX]


def test_checkpoint_tells_images_and_texts_apart(synthetic):
    model = AutoModel.from_pretrained(synthetic, trust_remote_code=True, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(synthetic, trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    inputs = processor(
        images=[ROOT / "examples" / "pictures" / f"{name}.png" for name in ("panda", "rocket")],
        text=["a photo of a panda", "ロケットの写真"],
    )
    with torch.inference_mode():
        output = model(**inputs, mode="InternVL-G")
    for embeds in (output.image_embeds.float(), output.text_embeds.float()):
        assert embeds.isfinite().all() and embeds[0] @ embeds[1] < 0.95


def test_full_disk_is_a_clear_error_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 0, 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        SystemExit, match=r"Not enough room: .* has 1\.0 GB free; needed are 0\.0 GB .* 1\.1 GB to spare"
    ):
        synthesise_checkpoint.synthesise(tmp_path, TINY)
    assert not list(tmp_path.glob("*.safetensors")) and not (tmp_path / INDEX).exists()


def test_command_reports_agreeing_plans_and_cleans_up(tmp_path):
    scratch, report, numbers = tmp_path / "scratch", tmp_path / "report.md", tmp_path / "report.json"
    scratch.mkdir()
    options = ["--config", TINY, "--plans", "mapped", "disk", "--scratch", scratch, "--out", report]
    done = run_module(tmp_path, "benchmarks.full_size", *options)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not list(scratch.iterdir())
    results = json.loads(numbers.read_text())
    assert results["synthesis"]["peak_rss"] > 0 and results["reading"]["buffered"] > 0
    for plan in ("mapped", "disk"):
        found = results["plans"][plan]
        assert found["finite"] and found["peak_rss"] > 0 and found["load"]["seconds"] > 0
        assert (
            list(found["stages"]) == list(results["arithmetic"]) == ["image C", "image G", "texts", "match", "caption"]
        )
        for cost in found["stages"].values():
            assert cost["seconds"] > 0 and cost["bytes_read"] >= 0 and cost["peak"]["anonymous"] > 0
    assert results["agreement"]["disk"]["with"] == "mapped"
    assert all(stage["equal"] for stage in results["agreement"]["disk"]["stages"].values())
    text = report.read_text()
    for title in ("# A full-size run", "## Plans", "### mapped", "### disk", "### Do the plans agree?"):
        assert f"\n{title}\n" in f"\n{text}"
