"""tools/export.py: what it writes gives the model's values, at other sizes than it was traced at, without our code."""

import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoProcessor

from conftest import ROOT, TOLERANCE, load, run_interpreter
from tools import pages

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from tools import export  # noqa: E402

PICTURES = ROOT / "examples" / "pictures"
PATCH = 8
# Images, rows and columns of patches: the table's own grid, larger and smaller ones, tall, wide, the least.
GRIDS = [(1, 4, 4), (3, 4, 4), (2, 6, 5), (2, 3, 9), (1, 2, 2)]
# Rows of ids with padding on the right, the left, both sides and in the middle; as ids, 0 is padding.
TEXTS = [
    [[1, 40, 50, 60, 2, 0, 0], [1, 9, 2, 0, 0, 0, 0], [1, 40, 50, 60, 70, 80, 2]],
    [[0, 0, 1, 40, 50, 60, 2], [0, 0, 0, 0, 1, 9, 2]],
    [[0, 1, 33, 2, 0], [1, 0, 33, 0, 2], [0, 0, 1, 2, 0], [1, 5, 6, 7, 2]],
    [[1]],
]


def exported(folder, repository, **options):
    checkpoint = export.Checkpoint(
        str(repository), "", options.pop("mode", "InternVL-C"), options.pop("normalize", True)
    )
    folder.mkdir()
    export.quieten()
    return export.export(checkpoint, folder, **options)


@pytest.fixture(scope="module", autouse=True)
def loggers_as_they_were():
    """A command may silence the process that it has to itself; here other tests listen for warnings."""
    levels = {logger: logger.level for logger in (logging.getLogger(), logging.getLogger("torch.onnx"))}
    yield
    for logger, level in levels.items():
        logger.setLevel(level)


@pytest.fixture(scope="module")
def both(trained, tmp_path_factory):
    """Both sides of the trained checkpoint in all formats: the folder, and the report of its check."""
    folder = tmp_path_factory.mktemp("export") / "both"
    return folder, exported(folder, trained, int8=True, check=True)


@pytest.fixture(scope="module")
def queries(flat, tmp_path_factory):
    """The vision side with the queries, not normalised, of random weights."""
    folder = tmp_path_factory.mktemp("export") / "queries"
    exported(folder, flat, mode="InternVL-G", normalize=False, what=["vision"])
    return folder


@pytest.fixture(scope="module")
def joint(trained):
    return load(trained, dtype=torch.float32).eval()


def pictures(rows: int, height: int, width: int) -> torch.Tensor:
    shape = (rows, 3, height * PATCH, width * PATCH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(height * width))


def texts(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor(rows)
    return ids.masked_fill(ids == 0, 77), (ids > 0).long()  # what stands at padding must not matter


def run(file, **tensors: torch.Tensor) -> torch.Tensor:
    if file.suffix == ".pt2":
        with torch.no_grad():
            return torch.export.load(file).module()(*tensors.values())
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in tensors.items()})[0])


def test_each_step_is_named_before_it_is_done(monkeypatch, tmp_path, capsys):
    names = {"traced": "vision: tracing", "write_onnx": "vision: writing vision.onnx", "write_int8": "quantising it"}
    for function, words in names.items():

        def check(*_, words=words):
            assert words in capsys.readouterr().err.splitlines()[-1]

        monkeypatch.setattr(export, function, check)
    monkeypatch.setattr(torch.export, "save", lambda *_: None)
    export.export_side(torch.nn.Identity(), "vision", tmp_path, int8=True)
    assert capsys.readouterr().err.endswith(" s\n")


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@torch.no_grad()
def test_images_of_any_number_and_size(both, joint, kind):
    for grid in GRIDS:
        pixels = pictures(*grid)
        assert_close(run(both[0] / f"vision.{kind}", pixel_values=pixels), joint.embed_image(pixels), **TOLERANCE)


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@torch.no_grad()
def test_texts_of_any_number_and_length_with_padding_anywhere(both, joint, kind):
    for rows in TEXTS:
        ids, mask = texts(rows)
        found = run(both[0] / f"text.{kind}", input_ids=ids, attention_mask=mask)
        assert_close(found, joint.embed_text(ids, mask), **TOLERANCE)
        # And each text by itself, without padding.
        alone = [joint.embed_text(torch.tensor([[number for number in row if number]])) for row in rows]
        assert_close(found, torch.cat(alone), **TOLERANCE)


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@torch.no_grad()
def test_queries_and_values_that_are_not_normalised(queries, flat, kind):
    model = load(flat, dtype=torch.float32).eval()
    for grid in GRIDS[1:3]:
        pixels = pictures(*grid)
        wanted = model.encode_image(pixels, "InternVL-G")
        assert (wanted.norm(dim=-1) - 1).abs().min() > 0.01
        assert_close(run(queries / f"vision.{kind}", pixel_values=pixels), wanted, **TOLERANCE)
    assert json.loads((queries / "export.json").read_text())["normalized"] is False


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_a_size_that_is_no_multiple_of_the_patch_is_an_error(both, kind):
    with pytest.raises(Exception, match="size|[Rr]eshape"):
        run(both[0] / f"vision.{kind}", pixel_values=torch.zeros(1, 3, 4 * PATCH + 2, 4 * PATCH))


def test_a_new_process_needs_neither_transformers_nor_our_code(both, joint, tmp_path):
    code = """
import sys, numpy, onnxruntime, torch
folder, out = sys.argv[1:]
ids = torch.tensor([[1, 40, 50, 2], [1, 9, 2, 0]])
mask = (ids > 0).long()
found = torch.export.load(f"{folder}/text.pt2").module()(ids, mask).detach().numpy()
session = onnxruntime.InferenceSession(f"{folder}/text.onnx")
other = session.run(["text_embeds"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
assert not [name for name in sys.modules if name.split(".")[0] in ("transformers", "transformers_modules")]
numpy.save(out, numpy.stack([found, other]))
"""
    run_interpreter(code, tmp_path, both[0], tmp_path / "found.npy")
    wanted = joint.embed_text(torch.tensor([[1, 40, 50, 2], [1, 9, 2, 0]])).detach()
    for found in np.load(tmp_path / "found.npy"):
        assert_close(torch.from_numpy(found), wanted, **TOLERANCE)


def test_weights_lie_beside_the_graph(both):
    import onnx

    for name in ("vision.onnx", "text.onnx", "vision.int8.onnx", "text.int8.onnx"):
        modes = {(both[0] / each).stat().st_mode for each in (name, f"{name}.data")}
        assert len(modes) == 1, "who may read one of the two files may read the other"
        graph = onnx.load(both[0] / name, load_external_data=False).graph
        outside = [each for each in graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL]
        assert {entry.value for each in outside for entry in each.external_data if entry.key == "location"} == {
            f"{name}.data"
        }
        inside = sum(len(each.raw_data) for each in graph.initializer)
        assert inside < 0.05 * (both[0] / f"{name}.data").stat().st_size


def test_no_path_of_this_machine_is_in_the_graph(both):
    assert str(ROOT).encode() not in (both[0] / "vision.onnx").read_bytes()


def test_int8_is_in_the_layers_and_nowhere_else(both, joint):
    import onnx

    config = joint.config
    # qkv, proj, fc1, fc2; and q, k, v, o, gate, up, down
    wanted = {"vision": 4 * config.vision_config.num_hidden_layers, "text": 7 * config.qllama_config.num_hidden_layers}
    for what, count in wanted.items():
        graph = onnx.load(both[0] / f"{what}.int8.onnx", load_external_data=False).graph
        assert sum(node.op_type == "MatMulInteger" for node in graph.node) == count
        row = both[1]["checks"][f"{what}.int8.onnx"]["examples"]
        assert 0.99 < row["least_cosine"] < 0.99999


def test_the_check_tells_what_is_close_from_what_is_not(both):
    report = both[1]
    assert report["failed"] == []
    assert report == json.loads((both[0] / "export.json").read_text()) | {"failed": []}
    for name in ("vision.pt2", "vision.onnx", "text.pt2", "text.onnx"):
        assert report["checks"][name]["shapes"]["largest_difference"] < 1e-5
        assert report["checks"][name]["examples"]["least_cosine"] > 0.99999
    assert report["zero_shot"]["onnx"] == report["zero_shot"]["torch"] > 0.7
    assert abs(report["zero_shot"]["int8.onnx"] - report["zero_shot"]["torch"]) < 0.06
    assert all(f"`{name}`" in export.table(report) for name in report["megabytes"])
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert export.Comparison([(one, one)]).is_close and not export.Comparison([(one, one), (one, other)]).is_close
    assert export.Comparison([(one, one), (one, other)]).report["least_cosine"] == 0


def test_the_folder_is_enough_for_zero_shot(both, joint):
    folder, _ = both
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    names = ["panda", "lion", "pizza", "rocket"]
    inputs = processor(images=[PICTURES / f"{name}.png" for name in names], text=names)
    images = run(folder / "vision.onnx", pixel_values=inputs.pixel_values)
    found = run(folder / "text.onnx", input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
    logits = json.loads((folder / "export.json").read_text())["logit_scale"] * images @ found.T
    with torch.no_grad():
        assert_close(logits, joint(**inputs).logits_per_image, rtol=1e-4, atol=1e-3)
    assert logits.argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(SystemExit, match="new or an empty folder"):
        export.main(["--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_missing_packages_are_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(SystemExit, match="pip install onnxscript$"):
        export.main(["--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_the_page_has_the_table_that_was_measured():
    measured = json.loads(export.REPORT.read_text("utf-8"))
    assert pages.taken(ROOT / "docs" / "export.md", "export") == export.table(measured)


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [sys.executable, "-m", "tools.export", "--out", tmp_path / "new", "--check"]
    command += ["--report", tmp_path / "report.json"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "`vision.onnx`" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["subfolder"] == "tiny"
