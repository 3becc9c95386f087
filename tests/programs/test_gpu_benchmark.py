"""benchmarks/gpu.py without a GPU: its steps run small on a CPU, wrong numbers fail, and pages say what was found."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import ROOT, run_fork, run_module, succeeded

pytest.importorskip("accelerate")

from benchmarks import gpu, gpu_machine, gpu_numbers, gpu_report, gpu_speed
from tools import pages

ON_CPU = ["--device", "cpu", "--tiny"]
# What a CPU has not; everything else has to run there.
MISSING_ON_A_CPU = ("CUDA graph", "flash_attention_2", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "from the host")

PAGES = ("README.md", "docs/machines.md")  # the report has a line in the first, and a table in the second


def copy_pages(clone):
    for page in PAGES:
        (clone / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, clone / page)
    (clone / "benchmarks").mkdir()


def run_without_compiling(folder, *options):
    """The command in a fresh process, in which whatever is compiled runs as it is: compiling takes a minute."""
    code = f"""
import sys, torch
from benchmarks import gpu
torch.compiler.set_stance("force_eager")
sys.argv = ["gpu.py", *{[*ON_CPU, *map(str, options)]!r}, "--out", "gpu.json"]
gpu.main()
"""
    done = run_fork(["-c", code], folder, PYTHONPATH=str(ROOT))
    return done, json.loads((folder / "gpu.json").read_text())["steps"]


def assert_complete(steps):
    """Nothing failed, and nothing was skipped but what a CPU has not."""
    assert not list(gpu.problems(steps, "failed"))
    skipped = list(gpu.problems(steps, "skipped"))
    absent = ("torchvision is not installed here", "diffusers is not installed here")
    allowed = (*MISSING_ON_A_CPU, *absent, "the machine is too busy for a rate")
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
        ours = [row for row in rows if row["way"] != "transformers"]
        assert all(row[gpu_machine.COSINE] > 0.99 for row in ours)
    captions = {row["way"]: row for row in steps["captions"]["rows"]}
    assert len(captions) == 7 and all(row["a second"] > 0 for row in captions.values())
    read = {way: row.get("GB of weights a token") for way, row in captions.items()}
    assert read["greedy"] == read["5 beams"] > 0
    assert max(read["greedy, compiled, float8"], read["greedy, compiled, int8 weights"]) < 0.8 * read["greedy"]
    assert all(0.98 < row[gpu_machine.COSINE] < 1 for row in steps["float8"]["rows"])
    assert steps["float8"]["tiny/"]["images"] == 36 and steps["float8"]["tiny/"]["least cosine to bfloat16"] > 0.99
    placed = steps["placed"]["a card of 8 GB"]
    assert placed["equal to the model on one device"][-1] == "caption" and len(placed["images"]) == 4
    assert placed["public calls that ran"] == 18 and "public calls that did not" not in placed
    assert all(row["seconds"] > 0 for row in placed["images"])
    assert steps["load"]["whole model"]["GB/s"] > 0 and steps["ceilings"]["products, qkv, float8"]["TFLOP/s"] > 0


@pytest.mark.heavy
def test_every_step_with_its_compiler_and_the_report(tmp_path):
    out, clone = tmp_path / "gpu.json", tmp_path / "clone"
    succeeded(run_module(tmp_path, "benchmarks.gpu", *ON_CPU, "--out", out))
    steps = json.loads(out.read_text())["steps"]
    assert list(steps) == list(gpu.STEPS)
    assert_complete(steps)
    assert len(steps["compiled"]) == 6  # and the seconds
    for found in (found for name, found in steps["compiled"].items() if name != "seconds"):
        assert max(found["largest difference"].values()) < 1e-3 and len(found["tokens equal"]) == 2
    shares = steps["profile"]["InternVL-C, batch 2, eager"]["shares"]
    assert shares["products"] > 0.1 and sum(shares.values()) == pytest.approx(1)
    copy_pages(clone)
    succeeded(run_module(tmp_path, "benchmarks.gpu", "--report", out, "--to", clone))
    page = (clone / "benchmarks" / "GPU.md").read_text()
    assert all(f"\n### {name}\n" in page for name in steps)
    assert (clone / "benchmarks" / "gpu.png").stat().st_size > 5000


@pytest.mark.heavy
def test_full_size_on_a_simulated_card(tmp_path):
    """Shapes of every call at full size; and the memory is what the shipped page says."""
    out = tmp_path / "gpu.json"
    succeeded(run_module(tmp_path, "benchmarks.gpu", "--simulate", "--out", out))
    steps, shipped = (
        json.loads(out.read_text())["steps"],
        gpu_report.read(ROOT / "benchmarks" / gpu_report.SIMULATED)["steps"],
    )
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
            found["generate_beam5"] = found["generate_beam5"].clone()  # other tests have the same tensor
            found["generate_beam5"][0, 3] += 1
        return found

    monkeypatch.setattr(gpu_numbers, "golden_tensors", changed)
    monkeypatch.setattr(gpu_numbers, "ATTENTIONS", ("eager",))
    failed = list(gpu.problems(gpu.run_step(machine, "gradients"), "failed"))
    assert len(failed) == 2 and "stage2.grad.query_tokens" in failed[0]
    failed = list(gpu.problems(gpu.run_step(machine, "goldens"), "failed"))
    assert len(failed) == 1 and "generate_beam5" in failed[0]


def test_a_failure_is_written_with_its_place_and_ends_the_command_with_an_error(tmp_path):
    code = """
import sys
from benchmarks import gpu
def broken(machine):
    raise AssertionError("not the original's")
gpu.STEPS.clear()
gpu.STEPS["broken"] = broken
gpu.STEPS["rows"] = lambda machine: {"rows": [{"work": "images", "batch": 1, "way": "eager", "failed": "memory"}]}
sys.argv = ["gpu.py", "--device", "cpu", "--tiny", "--out", "gpu.json"]
gpu.main()
"""
    done = run_fork(["-c", code], tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 1 and "failed: broken: AssertionError: not the original's" in done.stdout
    assert "failed: rows, rows, 1. images 1 eager: memory" in done.stdout
    assert json.loads((tmp_path / "gpu.json").read_text())["steps"]["broken"]["failed"]


def test_a_run_goes_on_with_what_is_missing_or_failed(tmp_path):
    names = ["--only", "kernels", "gradients", "texts"]
    done, steps = run_without_compiling(tmp_path, *names, "--minutes", "0")
    succeeded(done)
    assert steps["kernels"] == {"skipped": gpu_machine.OUT_OF_TIME, "seconds": 0.0}
    results = json.loads((tmp_path / "gpu.json").read_text())
    kept = {"kernels": {"MATH, float32": {"encode_image_c": 0.5}, "seconds": 1.0}, "load": {"seconds": 2.0}}
    partly = {"texts": {"rows": [{"work": "texts", "a second": 1.0}, {"skipped": gpu_machine.OUT_OF_TIME}]}}
    results["steps"] |= kept | partly | {"gradients": {"stage2, sdpa": {"failed": "memory"}}}
    (tmp_path / "gpu.json").write_text(json.dumps(results))
    done, steps = run_without_compiling(tmp_path, *names, "--resume", "--minutes", "0")
    assert steps["texts"] == partly["texts"]  # no time: what was measured in part stays
    done, steps = run_without_compiling(tmp_path, *names, "--resume")
    succeeded(done)
    assert {name: steps[name] for name in kept} == kept and "kernels: kept" in done.stdout
    assert steps["texts"]["rows"][0]["batch"] == 1 and len(steps["gradients"]["stage2, sdpa"]) == 13


def test_results_are_neither_lost_nor_mixed(tmp_path):
    succeeded(run_module(tmp_path, "benchmarks.gpu", *ON_CPU, "--minutes", "0", "--only", "load", "--out", "gpu.json"))
    before = (tmp_path / "gpu.json").read_text()
    done = run_module(tmp_path, "benchmarks.gpu", *ON_CPU, "--minutes", "0", "--only", "load", "--out", "gpu.json")
    assert done.returncode == 2 and "--resume goes on with it" in done.stderr
    done = run_module(tmp_path, "benchmarks.gpu", "--device", "cpu", "--minutes", "0", "--resume", "--out", "gpu.json")
    assert done.returncode == 2 and "measured elsewhere, tiny True and not False" in done.stderr
    assert (tmp_path / "gpu.json").read_text() == before
    done = run_module(tmp_path, "benchmarks.gpu", "--simulate", "--only", "ceilings", "--out", "other.json")
    assert done.returncode == 2 and "--simulate has the steps images" in done.stderr


def test_only_what_is_named_is_skipped(monkeypatch):
    """An import that fails is a failure, unless the package is one that may be missing."""
    machine = gpu.Machine("cpu", tiny=True)

    def moved(*arguments):
        raise ImportError("cannot import name 'X' from 'transformers'")

    assert machine.attempt(moved)["failed"].startswith("ImportError")
    assert machine.attempt(gpu_machine.require, "a_package_that_is_not_there")["skipped"]
    assert gpu_machine.require("torch") is None


def test_a_device_that_is_gone_ends_no_run(monkeypatch):
    machine = gpu.Machine("cpu", tiny=True)

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(machine, "forget", lost)
    assert machine.attempt(dict, [("a", 1)]) == {"a": 1}
    assert "takes no more calls, CUDA error" in machine.attempt(dict)["failed"]


def test_problems_are_found_in_lists_of_any_kind():
    rows = [{"mode": "InternVL-C", "batch": 1, "failed": "memory"}, {"mode": "InternVL-C", "batch": 1, "seconds": 1.0}]
    assert list(gpu.problems({"placed": {"images": rows}}, "failed")) == ["placed, images, 1. InternVL-C 1: memory"]
    assert list(gpu_report.failures({"placed": {"images": rows}})) == ["memory"]


def test_without_a_gpu_the_command_says_what_to_type(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run_module(tmp_path, "benchmarks.gpu", "--out", "gpu.json")
    assert done.returncode == 2 and "--device cpu --tiny" in done.stderr and not (tmp_path / "gpu.json").exists()


# ------------------------------------------------------------------------------------------- figures from times


@pytest.fixture
def timed(monkeypatch):
    """A machine on which every call takes as many seconds as it returns."""
    machine = gpu.Machine("cpu", tiny=True)
    monkeypatch.setattr(machine, "seconds", lambda call, warm=2: call() or 0.0)
    monkeypatch.setattr(machine, "peak", lambda call: 7.0)
    return machine


def test_a_rate_is_that_of_things_and_of_products(timed):
    reference = gpu_speed.Reference.__new__(gpu_speed.Reference)
    reference.seconds, reference.operations, reference.output = 2.0, 8e12, None
    figures = gpu_speed.rate(timed, lambda: 4.0, 16, reference)
    assert figures == {"a second": 4.0, "time / products": 2.0, "TFLOP/s": 2.0, "peak GB": 7.0}


def test_results_beside_a_rate_are_compared():
    machine = gpu.Machine("cpu", tiny=True)
    model, wanted = nn.Linear(4, 4), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    reference = gpu_speed.Reference(machine, model, lambda: (model(torch.ones(3, 4)), wanted)[1])
    assert reference.operations == 2 * 3 * 4 * 4 and reference.seconds > 0
    assert gpu_speed.checked(gpu_speed.rate(machine, lambda: wanted, 1, reference))["least cosine to bfloat16"] == 1
    with pytest.raises(AssertionError, match="cosine 0"):
        gpu_speed.checked(gpu_speed.rate(machine, lambda: wanted.flip(0), 1, reference))


def test_tokens_are_counted_from_the_difference_of_two_lengths(timed):
    short, long, positions = gpu_speed.caption_lengths(timed)
    # 5 seconds before the first token, and a quarter of one for each.
    assert gpu_speed.tokens_a_second(timed, lambda count: 5 + count / 4, 3)["a second"] == pytest.approx(12)
    with pytest.raises(gpu_machine.Missing, match="took no longer"):
        gpu_speed.tokens_a_second(timed, lambda count: 5, 3)
    for tiny in (True, False):
        short, long, positions = gpu_speed.caption_lengths(gpu.Machine("cpu", tiny=tiny))
        prefix = positions - long
        assert positions % 64 == 0 and 0 < short < long and prefix + short > positions - 64


def test_a_timing_waits_for_the_device(monkeypatch):
    machine, events = gpu.Machine("cpu", tiny=True), []
    monkeypatch.setattr(machine, "wait", lambda: events.append("wait"))
    assert machine.seconds(lambda: events.append("call")) >= 0
    assert events[:1] == ["call"] and events[1:] == ["wait", "call", "wait"] * 2


def test_the_budget_of_a_small_card_is_set_and_taken_back(monkeypatch):
    fractions = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    machine = gpu.Machine("cpu", tiny=True)
    machine.is_cuda = True
    with pytest.raises(ValueError), gpu_speed.small_card(machine, 12):
        assert fractions == [0.12]
        raise ValueError
    assert fractions == [0.12, 1.0]


def test_too_small_a_machine_is_told_so():
    machine = gpu.Machine("cpu")
    with pytest.raises(gpu_machine.Missing, match="takes 100000"):
        machine.check_room(100_000)


# ---------------------------------------------------------------------------------------------------------- float8


def test_float8_scales_are_those_of_rows():
    matrix = torch.tensor([[1e4, -2e4, 3e3], [1e-3, 2e-3, -3e-3]])
    values, scales = gpu_machine.in_float8(matrix)
    assert scales.shape == (2, 1)
    torch.testing.assert_close(values.float() * scales, matrix, rtol=0.07, atol=0)


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
        {"work": work, "batch": batch, "way": way, "a second": rate, "time / products": times, "peak GB": 30}
        for work, batch, way, rate, times in (
            ("InternVL-C", 1, "eager", 60.0, 1.1),
            ("InternVL-C", 64, "compile_layers", 210.0, 1.25),
            ("InternVL-C", 64, "transformers", 999.0, 1.0),
            ("InternVL-G", 64, "eager", 120.0, 2.5),
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
        "goldens": {"golden/tiny, sdpa, float32": {"largest difference": {"encode_text": 1e-6}}},
        "texts": {"rows": [{"work": "texts", "batch": 1, "way": "eager", "failed": "memory"}]},
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
    copy_pages(folder)
    return folder


def test_goals_are_judged():
    results = measured_results()
    rows = {cells[0]: cells[1:4] for cells in (goal.cells(results) for goal in gpu_report.GOALS)}
    assert rows["InternVL-C, images/s, best batch"] == [">= 205", "210", "met"]
    assert rows["InternVL-C, share of its products' speed"][1:] == ["0.8", "met"]
    assert rows["InternVL-G, share of its products' speed / that of InternVL-C"][1:] == ["0.5", "**missed**"]
    assert rows["a caption, tokens/s"] == [">= 240", "200", "**missed**"]
    assert rows["captions, tokens/s of 32 images / of one"][1:] == ["25.00", "met"]
    assert rows["InternVL-C, one image, time / products"][1:] == ["1.1", "met"]
    assert rows["loading, GB/s / pinned copies'"][1:] == ["0.7", "met"]
    assert rows["InternVL-C in float8, images/s, best batch"][1:] == ["", "not measured"]
    assert rows["texts/s, best batch"] == ["", "", "**failed**"]
    one = measured_results()
    one["steps"]["captions"]["rows"].pop()
    assert gpu_report.one_to_many(one) is None


def reported(results, clone):
    file = clone.parent / "run.json"
    file.write_text(json.dumps(results))
    gpu_report.write(file, clone)
    return tuple((clone / page).read_text("utf-8") for page in ("benchmarks/GPU.md", *PAGES))


def test_the_report_of_a_card(clone):
    page, readme, machines = reported(measured_results(), clone)
    assert "Measured on NVIDIA H200, CUDA 13.0; torch 2.11.0, transformers 5.17.0; 2026-11-26." in page
    assert "failed: OutOfMemoryError: / too much |" in page and "Not measured yet" not in page
    assert (
        "**On one NVIDIA H200:** the original's numbers, 210 images/s (InternVL-C), 200 tokens/s of a caption; goals: "
        "5 met, 2 missed, 6 not measured, 1 failed; 2 measurements failed" in readme
    )
    assert "| InternVL-C | 210 | 64 | compile_layers | 30 |" in machines and "No GPU figures yet" not in readme
    assert (clone / "benchmarks" / "gpu.png").stat().st_size > 5000
    assert json.loads((clone / "benchmarks" / "gpu.json").read_text()) == measured_results()


@pytest.mark.parametrize("change", [lambda s: s["goldens"].update(x={"failed": "other"}), lambda s: s.pop("goldens")])
def test_speed_is_not_said_without_right_numbers(clone, change):
    results = measured_results()
    change(results["steps"])
    _, readme, _ = reported(results, clone)
    assert "**On one NVIDIA H200:** the original's numbers were not reached, or not compared" in readme
    assert "210 images/s" not in readme


def test_a_report_without_matplotlib_has_no_chart(clone, monkeypatch):
    find = gpu_report.importlib.util.find_spec
    monkeypatch.setattr(
        gpu_report.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    page, *_ = reported(measured_results(), clone)
    assert "gpu.png" not in page and not (clone / "benchmarks" / "gpu.png").exists()


def test_a_simulated_run_is_no_measurement(clone):
    results = measured_results(simulated=True)
    page, readme, machines = reported(results, clone)
    assert "Not measured yet" in page
    assert "No GPU figures yet" in readme and "| InternVL-C | 210 |" not in machines
    assert [path.name for path in (clone / "benchmarks").glob("*.json")] == ["gpu_simulated.json"]


def test_a_small_run_does_not_reach_the_readme(clone, tmp_path):
    page, readme, machines = reported(measured_results(tiny=True, kind="cpu"), clone)
    assert "A small run, or one without a card" in page
    assert "No GPU figures yet" in readme and "| InternVL-C | 210 |" not in machines
    before = [(ROOT / page).read_text("utf-8") for page in PAGES]
    with pytest.raises(gpu_report.Refused, match="says nothing about the 14B"):
        gpu_report.write(tmp_path / "run.json", ROOT)
    assert [(ROOT / page).read_text("utf-8") for page in PAGES] == before


def test_a_file_that_is_no_run_or_has_less_is_refused(clone, tmp_path):
    reported(measured_results(), clone)
    before = {path: path.read_bytes() for path in (clone / "benchmarks").iterdir()}
    less = measured_results()
    del less["steps"]["load"]
    for content, problem in (("[]", "is no file of"), ("x", "is no file of"), (json.dumps(less), "lacks load, which")):
        (tmp_path / "wrong.json").write_text(content)
        with pytest.raises(gpu_report.Refused, match=problem):
            gpu_report.write(tmp_path / "wrong.json", clone)
    assert before == {path: path.read_bytes() for path in (clone / "benchmarks").iterdir()}
    done = run_module(tmp_path, "benchmarks.gpu", "--report", "absent.json", "--to", clone)
    assert done.returncode == 2 and "absent.json is no file of" in done.stderr


def test_the_shipped_pages_say_what_was_measured():
    folder, readme = ROOT / "benchmarks", (ROOT / "README.md").read_text("utf-8")
    names = (gpu_report.MEASURED, gpu_report.SIMULATED, gpu_report.ON_CPU)
    measured, simulated, on_cpu = (gpu_report.read(folder / name) for name in names)
    assert (folder / gpu_report.PAGE).read_text("utf-8") == gpu_report.page(measured, simulated, on_cpu)
    assert pages.taken(ROOT / "README.md", gpu_report.LINE) == gpu_report.readme_line(measured)
    table = gpu_report.machines_table(measured, simulated)
    assert pages.taken(ROOT / "docs" / "machines.md", gpu_report.TABLE) == table
    assert simulated["machine"]["simulated"] and not simulated["machine"]["tiny"]
    # In the first screen of the page: before anything is installed.
    assert readme.index(pages.marks(gpu_report.LINE)[0]) < readme.index("pip install")
