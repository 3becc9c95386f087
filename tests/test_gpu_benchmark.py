"""benchmarks/gpu.py on a CPU: its steps run small, and each result is there as it ends."""

import json

import pytest

from conftest import ROOT, run_fork, succeeded

GPU = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All steps but the goldens."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [GPU, "--device", "cpu", "--tiny", "--only", "images", "texts", "captions", "--out", folder / "gpu.json"]
    succeeded(run_fork(command, folder))
    return json.loads((folder / "gpu.json").read_text())


def test_every_step_has_rates_beside_its_products(results):
    assert results["machine"]["tiny"] and list(results["steps"]) == ["images", "texts", "captions"]
    for name in ("images", "texts"):
        rows = [row for row in results["steps"][name].values() if isinstance(row, dict)]
        assert len(rows) == (4 if name == "images" else 2)
        for row in rows:
            assert row["a second"] > 0 and row["TFLOP/s"] > 0 and row["products alone, a second"] > 0
    captions = [row for row in results["steps"]["captions"].values() if isinstance(row, dict)]
    assert len(captions) == 6 and all(row["tokens a second"] > 0 for row in captions)


def test_the_goldens_hold_and_what_is_missing_is_named(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(GPU.parent)!r})
import gpu, torch
torch.compiler.set_stance("force_eager")  # compiling flex_attention takes most of a minute
sys.argv = ["gpu.py", "--device", "cpu", "--tiny", "--only", "goldens", "--out", "gpu.json"]
gpu.main()
"""
    succeeded(run_fork(["-c", code], tmp_path))
    found = json.loads((tmp_path / "gpu.json").read_text())["steps"]["goldens"]
    for attention in ("eager", "sdpa", "flex_attention"):
        assert max(found[attention]["float32"]["largest difference"].values()) < 1e-3
        assert min(found[attention]["bfloat16"].values()) > 0.98 < min(found[attention]["float16"].values())
    assert found["flash_attention_2"]["skipped"]


def test_a_step_that_fails_is_written_and_ends_the_command_with_an_error(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(GPU.parent)!r})
import gpu
def broken(machine):
    raise AssertionError("not the original's")
gpu.STEPS = {{"broken": broken, "late": broken}}
sys.argv = ["gpu.py", "--device", "cpu", "--tiny", "--minutes", "0.0001", "--out", "gpu.json"]
try:
    gpu.main()
except SystemExit as end:
    print(end.code)
"""
    done = succeeded(run_fork(["-c", code], tmp_path))
    steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert done.stdout.splitlines()[-1] == "1" and steps["broken"] == {"failed": "AssertionError: not the original's"}
    assert "failed" in steps["late"] or steps["late"] == {"skipped": "the time was used up"}
