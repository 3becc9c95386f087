"""benchmarks/gpu.py without a GPU: its steps run small on a CPU, wrong numbers fail, and pages say what was found."""

import json
import shutil

import pytest
import torch
from torch import nn

from conftest import ROOT, run_fork, succeeded

pytest.importorskip("accelerate")

import gpu
import gpu_machine
import gpu_numbers
import gpu_report
import gpu_speed

GPU = ROOT / "benchmarks" / "gpu.py"
ON_CPU = ["--device", "cpu", "--tiny"]
# What a CPU has not; everything else has to run there.
MISSING_ON_A_CPU = ("CUDA graph", "flash_attention_2", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "from the host")


def run_without_compiling(folder, *options):
    """The command in a fresh process, in which whatever is compiled runs as it is: compiling takes a minute."""
    code = f"""
import sys
sys.path.insert(0, {str(GPU.parent)!r})
import gpu, torch
torch.compiler.set_stance("force_eager")
sys.argv = ["gpu.py", *{[*ON_CPU, *map(str, options)]!r}, "--out", "gpu.json"]
gpu.main()
"""
    done = run_fork(["-c", code], folder)
    return done, json.loads((folder / "gpu.json").read_text())["steps"]


def assert_complete(steps):
    """Nothing failed, and nothing was skipped but what a CPU has not."""
    assert not list(gpu.problems(steps, "failed"))
    skipped = list(gpu.problems(steps, "skipped"))
    allowed = (*MISSING_ON_A_CPU, "torchvision is not installed here", "No module named 'diffusers'")
    assert [each for each in skipped if not any(name in each for name in allowed)] == []


# ----------------------------------------------------------------------------------------------------------- steps


def test_right_numbers(tmp_path):
    names = ["goldens", "kernels", "gradients", "processor", "float16"]
    done, steps = run_without_compiling(tmp_path, "--only", *names)
    succeeded(done)
    assert list(steps) == names
    assert_complete(steps)
    for attention in ("eager", "sdpa", "flex_attention"):
        exact = steps["goldens"][f"golden/tiny, {attention}, float32"]
        assert 0 < max(exact["largest difference"].values()) < 1e-3
        assert exact["tokens equal, dynamic cache"] == ["generate_greedy", "generate_beam5"]
        assert ("tokens equal, static cache" in exact) == (attention != "flex_attention")
        for dtype in ("bfloat16", "float16"):
            assert 0.98 < min(steps["goldens"][f"golden/tiny, {attention}, {dtype}"].values()) < 1
    assert steps["goldens"]["golden/tiny, flash_attention_2, float16"]["skipped"]
    assert steps["kernels"]["golden/tiny, FLASH_ATTENTION, bfloat16"]["encode_image_g"] > 0.98
    assert len(steps["gradients"]) == 5 and len(steps["gradients"]["stage2, sdpa"]) == 13
    found = steps["float16"]["tiny/, float16"]
    assert found["largest"]["vision_model: InternVisionEncoderLayer"] < found["largest representable"] == 65504
    assert not any(found["outputs that are not finite"].values())


def test_speed(tmp_path):
    names = ["ceilings", "images", "captions", "float8", "texts", "placed", "load"]
    done, steps = run_without_compiling(tmp_path, "--only", *names)
    succeeded(done)
    assert_complete(steps)
    for name, ways in (("images", ("eager", "compile_layers", "transformers")), ("texts", ("eager", "transformers"))):
        rows = [row for row in steps[name]["rows"] if row["way"] in ways]
        assert {row["way"] for row in rows} == set(ways) and {row["batch"] for row in rows} == {1, 2}
        assert all(row["a second"] > 0 and row["TFLOP/s"] > 0 and row["time / products"] > 0 for row in rows)
    captions = [row for row in steps["captions"]["rows"] if row["way"] != "transformers, compiled"]
    assert len(captions) == 6 and all(row["a second"] > 0 and row["GB of weights a token"] > 0 for row in captions)
    whole, less = captions[0]["GB of weights a token"], captions[3]["GB of weights a token"]
    assert captions[3]["way"] == "greedy, compiled, float8" and less < 0.8 * whole
    assert all(row["least cosine to bfloat16"] > 0.98 for row in steps["float8"]["rows"])
    assert steps["float8"]["tiny/"]["images"] == 36 and steps["float8"]["tiny/"]["least cosine to bfloat16"] > 0.99
    assert steps["placed"]["a card of 8 GB"]["equal to the model on one device"][-1] == "caption"
    assert all(row["seconds"] > 0 for row in steps["placed"]["a card of 12 GB"]["images"])
    assert steps["load"]["whole model"]["GB/s"] > 0 and steps["ceilings"]["products, qkv, float8"]["TFLOP/s"] > 0


@pytest.mark.heavy
def test_every_step_with_its_compiler_and_the_report(tmp_path):
    out, clone = tmp_path / "gpu.json", tmp_path / "clone"
    succeeded(run_fork([GPU, *ON_CPU, "--out", out], tmp_path))
    steps = json.loads(out.read_text())["steps"]
    assert list(steps) == list(gpu.STEPS)
    assert_complete(steps)
    assert len(steps["compiled"]) == 6  # and the seconds
    for found in (found for name, found in steps["compiled"].items() if name != "seconds"):
        assert max(found["largest difference"].values()) < 1e-3 and len(found["tokens equal"]) == 2
    shares = steps["profile"]["InternVL-C, batch 2, eager"]["shares"]
    assert shares["products"] > 0.1 and sum(shares.values()) == pytest.approx(1)
    (clone / "benchmarks").mkdir(parents=True)
    shutil.copy(ROOT / "README.md", clone)
    succeeded(run_fork([GPU, "--report", out, "--to", clone], tmp_path))
    page = (clone / "benchmarks" / "GPU.md").read_text()
    assert all(f"\n### {name}\n" in page for name in steps)
    assert (clone / "benchmarks" / "gpu.png").stat().st_size > 5000


@pytest.mark.heavy
def test_full_size_on_a_simulated_card(tmp_path):
    """Shapes of every call at full size; and the memory is what the shipped page says."""
    out = tmp_path / "gpu.json"
    succeeded(run_fork([GPU, "--simulate", "--out", out], tmp_path))
    steps, shipped = json.loads(out.read_text())["steps"], gpu_report.read(GPU.parent / gpu_report.SIMULATED)["steps"]
    for name in gpu.SIMULATED_STEPS:
        peaks, expected = ([row.get(gpu_machine.PEAK, 0) for row in found[name]["rows"]] for found in (steps, shipped))
        assert peaks == pytest.approx(expected, rel=0.01) and any(peaks)


def test_memory_on_a_simulated_card_grows_with_the_batch():
    machine = gpu.Machine(gpu.measuring.CARD, tiny=True, simulated=True)
    for name in gpu.SIMULATED_STEPS:
        found = gpu.run_step(machine, name)
        assert not list(gpu.problems(found, "failed"))
        rows = [row for row in found["rows"] if gpu_machine.PEAK in row]
        of_one = [row for row in rows if (row["work"], row["way"]) == (rows[0]["work"], rows[0]["way"])]
        assert all("a second" not in row for row in rows)
        assert len(of_one) < 2 or of_one[0][gpu_machine.PEAK] < of_one[1][gpu_machine.PEAK]


# --------------------------------------------------------------------------------------------- what must be noticed


def test_wrong_numbers_fail(monkeypatch):
    right = {"a": torch.tensor([[1.0, 2.0]])}
    assert gpu_numbers.check_tensors(right, right) == {"a": 0} and gpu_numbers.check_cosines(right, right)["a"] > 0.999
    with pytest.raises(AssertionError, match="^a: "):
        gpu_numbers.check_tensors({"a": right["a"] + 1e-3}, right)
    for wrong in (torch.tensor([[2.0, -1.0]]), torch.full((1, 2), torch.nan)):
        with pytest.raises(AssertionError, match="^a: cosine"):
            gpu_numbers.check_cosines({"a": wrong}, right)
    machine = gpu.Machine("cpu", tiny=True)
    tensors = gpu_numbers.golden_tensors

    def changed(machine, name, *others):
        found = tensors(machine, name, *others)
        if name == "expected":
            found["stage2.grad.query_tokens"] = found["stage2.grad.query_tokens"] + 1
            found["generate_beam5"][0, 3] += 1
        return found

    monkeypatch.setattr(gpu_numbers, "golden_tensors", changed)
    monkeypatch.setattr(gpu_numbers, "ATTENTIONS", ("eager",))
    failed = list(gpu.problems(gpu.run_step(machine, "gradients"), "failed"))
    assert len(failed) == 2 and "stage2.grad.query_tokens" in failed[0]
    failed = list(gpu.problems(gpu.run_step(machine, "goldens"), "failed"))
    assert len(failed) == 1 and "generate_beam5" in failed[0]


def test_a_failure_is_written_with_its_place_and_ends_the_command_with_an_error(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(GPU.parent)!r})
import gpu
def broken(machine):
    raise AssertionError("not the original's")
gpu.STEPS.clear()
gpu.STEPS["broken"] = broken
gpu.STEPS["rows"] = lambda machine: {{"rows": [{{"work": "images", "batch": 1, "way": "eager", "failed": "memory"}}]}}
sys.argv = ["gpu.py", "--device", "cpu", "--tiny", "--out", "gpu.json"]
gpu.main()
"""
    done = run_fork(["-c", code], tmp_path)
    assert done.returncode == 1 and "failed: broken: AssertionError: not the original's" in done.stdout
    assert "failed: rows, rows, images 1 eager: memory" in done.stdout
    assert json.loads((tmp_path / "gpu.json").read_text())["steps"]["broken"]["failed"]


def test_a_run_goes_on_with_what_is_missing(tmp_path):
    done, steps = run_without_compiling(tmp_path, "--only", "kernels", "texts", "--minutes", "0")
    succeeded(done)
    assert steps["kernels"] == {"skipped": gpu_machine.OUT_OF_TIME, "seconds": 0.0}
    kept = {"kernels": {"MATH, float32": {"encode_image_c": 0.5}, "seconds": 1.0}}
    (tmp_path / "gpu.json").write_text(json.dumps({"machine": {}, "steps": steps | kept}))
    done, steps = run_without_compiling(tmp_path, "--only", "kernels", "texts", "--resume")
    succeeded(done)
    assert steps["kernels"] == kept["kernels"] and steps["texts"]["rows"][0]["a second"] > 0


def test_without_a_gpu_the_command_says_what_to_type(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run_fork([GPU, "--out", "gpu.json"], tmp_path)
    assert done.returncode == 2 and "--device cpu --tiny" in done.stderr and not (tmp_path / "gpu.json").exists()


# ---------------------------------------------------------------------------------------------------------- float8


def test_float8_layers_are_close_and_the_rest_is_left_alone():
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, dtype=torch.bfloat16)
    states = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        found, expected = gpu_machine.Float8Linear(layer)(states), layer(states)
    assert found.shape == expected.shape and found.dtype == torch.bfloat16
    error = (found - expected).float().norm() / expected.float().norm()
    assert 1e-3 < error < 0.1  # rounded to 3 bits, and not by much more
    machine = gpu.Machine("cpu", tiny=True)
    twin = gpu_machine.to_float8(machine.twin())
    replaced = {name for name, module in twin.named_modules() if isinstance(module, gpu_machine.Float8Linear)}
    assert replaced and all(name.startswith(gpu_machine.LAYERS) for name in replaced)
    assert type(twin.clip_projector.cross_attn.q) is nn.Linear and type(twin.qllama.lm_head) is nn.Linear
    whole = {name for name, module in machine.model().named_modules() if isinstance(module, nn.Linear)}
    assert {name for name in whole if name.startswith(gpu_machine.LAYERS)} == replaced
    shared = machine.model().qllama.lm_head.weight.data_ptr()
    assert twin.qllama.lm_head.weight.data_ptr() == shared


def test_bytes_of_a_token_are_those_of_the_language_tower():
    model = gpu.Machine("cpu", tiny=True).model()
    named = dict(model.qllama.named_parameters())
    wanted = [name for name in named if "cross_attn" not in name and "embed_tokens" not in name]
    assert gpu_speed.bytes_a_token(model) == 2 * sum(named[name].numel() for name in wanted)


# ---------------------------------------------------------------------------------------------------------- report


def measured_results(**changes):
    """As of a card that meets every goal but one."""
    images = [
        {
            "work": work,
            "batch": batch,
            "way": way,
            "a second": rate,
            "time / products": 1.1,
            "TFLOP/s": 600.0,
            "peak GB": 30,
        }
        for work, batch, way, rate in (
            ("InternVL-C", 1, "eager", 60.0),
            ("InternVL-C", 64, "compile_layers", 210.0),
            ("InternVL-C", 64, "transformers", 999.0),
            ("InternVL-G", 64, "eager", 120.0),
        )
    ]
    images.append({"work": "InternVL-C", "batch": 256, "way": "eager", "failed": "OutOfMemoryError: | too\nmuch"})
    captions = [
        {"work": "captions", "batch": batch, "way": "greedy, compiled", "a second": rate, "GB of weights a token": 13.4}
        for batch, rate in ((1, 200.0), (32, 5000.0))
    ]
    steps = {
        "images": {"rows": images},
        "captions": {"rows": captions},
        "ceilings": {"memory of the device, a copy": {"GB/s": 4300.0}, "from the host, pinned": {"GB/s": 50.0}},
        "load": {"whole model": {"GB/s": 35.0}},
    }
    machine = {
        "device": "NVIDIA H200",
        "kind": "cuda",
        "tiny": False,
        "simulated": False,
        "date": "2026-11-26",
        "torch": "2.11.0",
    }
    return {"machine": machine | {"transformers": "5.17.0", "cuda": "13.0"} | changes, "steps": steps}


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "clone"
    (folder / "benchmarks").mkdir(parents=True)
    shutil.copy(ROOT / "README.md", folder)
    return folder


def test_goals_are_judged():
    results = measured_results()
    rows = {cells[0]: cells[1:] for cells in (goal.cells(results) for goal in gpu_report.GOALS)}
    assert rows["InternVL-C, images/s, best batch"] == [">= 205", "210", "yes"]
    assert rows["a caption, tokens/s"] == [">= 240", "200", "**no**"]
    assert rows["captions, tokens/s of all images / of one"][1:] == ["25.00", "yes"]
    assert rows["InternVL-C, one image, time / products"][1:] == ["1.1", "yes"]
    assert rows["loading, GB/s / pinned copies'"][1:] == ["0.7", "yes"]
    assert rows["InternVL-C in float8, images/s, best batch"][1:] == ["not measured", ""]


def test_the_report_of_a_card(clone, tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(measured_results()))
    gpu_report.write(file, clone)
    page, readme = (clone / "benchmarks" / "GPU.md").read_text(), (clone / "README.md").read_text()
    assert "Measured on NVIDIA H200, CUDA 13.0; torch 2.11.0, transformers 5.17.0; 2026-11-26." in page
    assert "failed: OutOfMemoryError: / too much |" in page and "Not measured yet" not in page
    assert "**On one NVIDIA H200:** 210 images/s (InternVL-C), 200 tokens/s of a caption; 1 of 14 goals" in readme
    assert "| InternVL-C | 210 | 64 | compile_layers | 30 |" in readme and "No GPU figures yet" not in readme
    assert (clone / "benchmarks" / "gpu.png").stat().st_size > 5000
    assert json.loads((clone / "benchmarks" / "gpu.json").read_text()) == measured_results()


def test_a_small_run_does_not_reach_the_pages(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(measured_results(tiny=True)))
    before = (ROOT / "README.md").read_text()
    with pytest.raises(SystemExit, match="says nothing about the 14B"):
        gpu_report.write(file, ROOT)
    assert (ROOT / "README.md").read_text() == before


def test_the_shipped_pages_say_what_was_measured():
    folder, readme = ROOT / "benchmarks", (ROOT / "README.md").read_text("utf-8")
    names = (gpu_report.MEASURED, gpu_report.SIMULATED, gpu_report.ON_CPU)
    measured, simulated, on_cpu = (gpu_report.read(folder / name) for name in names)
    assert (folder / gpu_report.PAGE).read_text("utf-8") == gpu_report.page(measured, simulated, on_cpu)
    for name, text in (
        (gpu_report.LINE, gpu_report.readme_line(measured)),
        (gpu_report.TABLE, gpu_report.readme_table(measured, simulated)),
    ):
        start, end = gpu_report.marks(name)
        assert f"{start}\n{text}\n{end}" in readme
    assert simulated["machine"]["simulated"] and not simulated["machine"]["tiny"]
    # In the first screen of the page: before anything is installed.
    assert readme.index(gpu_report.marks(gpu_report.LINE)[0]) < readme.index("pip install")
