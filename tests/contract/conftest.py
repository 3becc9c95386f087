"""Fixtures of the contract: checkpoints loaded once, scripts run in fresh interpreters, refused features."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from conftest import CODE, GOLDEN, LAST_RESORT, ROOT, golden_model, load
from tools.matrix import known_bad

FRESH = Path(__file__).resolve().parent / "fresh"
# Scripts that read the output of another one.
AFTER = {"load": "save", "published": "publish", "sentences": "sentences_save"}
# Fields that the original code wrote into each config, in addition to those of golden/tiny/config.json.
ORIGINAL_FIELDS = {"torch_dtype": "bfloat16", "transformers_version": "4.32.0", "return_dict": True, "max_length": 20}
torch.set_num_threads(1)  # a second process runs in parallel with the tests


def pytest_configure(config):
    config.addinivalue_line("markers", "fresh(name): checks the output of fresh/NAME.py, run in its own interpreter")
    config.addinivalue_line("markers", "feature(name): a feature that KNOWN_BAD in compat_internvl.py may refuse")


# ------------------------------------------------------------------------------------------------ refused features


def refused(item) -> str | None:
    """The reason for which KNOWN_BAD refuses the feature of a test with the installed packages, or None."""
    features = [mark.args[0] for mark in item.iter_markers("feature")]
    for package, bad, feature, reason in known_bad():
        if feature in features and installed(package) == bad:
            return reason
    return None


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test of a refused feature must fail with the reason of the refusal; it then counts as skipped."""
    report = yield
    reason = refused(item)
    if reason is None or report.skipped:
        return report
    path, line, _ = item.location
    if call.excinfo is not None and reason in str(call.excinfo.value):
        report.outcome, report.longrepr = "skipped", (path, line, f"Skipped: refused: {reason}")
    elif call.when == "call" and report.passed:
        report.outcome, report.longrepr = "failed", f"KNOWN_BAD refuses this, but it works: {reason}"
    return report


# ---------------------------------------------------------------------------------------------- fresh interpreters


class Found:
    """The output of a script: one value or one error per part."""

    def __init__(self, done: subprocess.CompletedProcess):
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        self.stdout, self.stderr = done.stdout, done.stderr

    def __getitem__(self, part: str):
        found = json.loads(self.stdout.splitlines()[-1])[part]
        assert "error" not in found, found["error"]
        return found["value"]


class Interpreters:
    """Run the scripts of fresh/ with the interpreter that runs the tests: each once, one at a time, in parallel with
    the tests. Every script gets two folders: a shared work folder, and the code with the trained tiny checkpoint.
    """

    def __init__(self, work: Path, trained: Path):
        self.work, self.trained = work, trained
        self.pool = ThreadPoolExecutor(1)
        self.started: dict[str, Future] = {}

    def start(self, name: str) -> Future:
        if name in AFTER:
            self.start(AFTER[name])
        if name not in self.started:
            self.started[name] = self.pool.submit(self._run, name)
        return self.started[name]

    def found(self, name: str) -> Found:
        return Found(self.start(name).result())

    def _run(self, name: str) -> subprocess.CompletedProcess:
        folder = self.work / name
        folder.mkdir()
        command = [sys.executable, FRESH / f"{name}.py", self.work, self.trained]
        environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
        if name == "publish":
            to = self.work / "published_repository"
            command = [sys.executable, "-m", "tools.hub.publish", "--checkpoint", "tiny", "--to", to]
            environment["PYTHONPATH"] = str(ROOT)
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "cwd": folder}
        options["timeout"] = LAST_RESORT
        return subprocess.run(list(map(str, command)), env=environment, **options)


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """The scripts' work folder, with two repositories: a clone, and a checkpoint as the original code saved it."""
    work = tmp_path_factory.mktemp("contract")
    clone, original = work / "clone", work / "original"
    clone.mkdir(), original.mkdir()
    for path in (*(ROOT / name for name in CODE), *ROOT.glob("*.json")):
        shutil.copy(path, clone)
    shutil.copytree(ROOT / "tiny", clone / "tiny")
    for name in CODE:
        shutil.copy(ROOT / name, original)
    shutil.copy(GOLDEN / "tiny" / "model.safetensors", original)
    shutil.copy(GOLDEN / "tiny" / "inputs.safetensors", work)
    config = json.loads((GOLDEN / "tiny" / "config.json").read_text()) | ORIGINAL_FIELDS
    config["vision_config"] |= ORIGINAL_FIELDS | {"model_type": "intern_vit_6b"}
    config["qllama_config"] |= ORIGINAL_FIELDS | {"model_type": "llama", "rope_scaling": None}
    auto_map = {"AutoConfig": "configuration_internvl.InternVLConfig", "AutoModel": "modeling_internvl.InternVLModel"}
    config |= {"model_type": "internvl", "architectures": ["InternVLModel"], "auto_map": auto_map}
    (original / "config.json").write_text(json.dumps(config))
    return work


@pytest.fixture(scope="session", autouse=True)
def interpreters(request, work, trained):
    """Start the scripts that the selected tests need."""
    interpreters = Interpreters(work, trained)
    for item in request.session.items:
        for mark in item.iter_markers("fresh"):
            interpreters.start(mark.args[0])
    yield interpreters
    interpreters.pool.shutdown(wait=True, cancel_futures=True)


@pytest.fixture
def fresh(request, interpreters):
    """The output of the script named by the test's `fresh` mark."""
    return interpreters.found(request.node.get_closest_marker("fresh").args[0])


# ------------------------------------------------------------------------------------------- models, not to be changed


@pytest.fixture(scope="session")
def golden_joint():
    """The joint model with the goldens' weights, float32."""
    return golden_model()


@pytest.fixture(scope="session")
def half(trained):
    """The trained tiny checkpoint, bfloat16."""
    return load(trained, dtype=torch.bfloat16).eval()
