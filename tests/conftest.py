"""Fixtures and helpers of several test files. Classes come from transformers' loader, as in `from_pretrained`."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# One thread per process. The matrices are small, and OpenMP's threads wait for each other by spinning, which takes
# longer than the work on a busy machine. Processes that a test starts inherit these variables.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# No test may use the network, and no two runs may share the folder that the loader copies code into. A worker of
# pytest-xdist inherits the folder of the process that started it, and needs its own.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "HF_MODULES_CACHE" not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:
    _modules_cache = tempfile.TemporaryDirectory(prefix="internvl-tests-")
    os.environ["HF_MODULES_CACHE"] = _modules_cache.name

import pytest
import torch
import transformers
from huggingface_hub import save_torch_state_dict
from PIL import Image
from transformers import AutoModel, AutoProcessor

from fresh import Server

ROOT = Path(__file__).resolve().parents[1]
# The same paths as for `python -m tools.matrix` at the root, and for `python examples/search.py`.
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

# The test files import all of these from here.
from benchmarks.goldens import GOLDEN, TOLERANCE, golden, golden_config, golden_model, repo_class, training_batch  # noqa: E402, F401

IS_V5 = int(transformers.__version__.split(".")[0]) >= 5
INDEX = "model.safetensors.index.json"
CODE = sorted(path.name for path in ROOT.glob("*.py"))
LAST_RESORT = 1200  # seconds: waits end with an event or a dead process; this only stops a run that hangs
FRESH = Server()
# A config class that imports nothing, for tests of the tokenizer and the processor alone.
STUB_CONFIG = """
from transformers import PretrainedConfig


class InternVLConfig(PretrainedConfig):
    model_type = "internvl_14b"
"""
# Two images, and two texts with padding, for the tiny checkpoint.
PIXELS = torch.linspace(-2, 2, 2 * 3 * 48 * 48).sin().view(2, 3, 48, 48)
IDS = torch.tensor([[1, 405, 353, 2326, 2, 0], [1, 405, 353, 77, 900, 2]])
# Some of the example images.
NAMES = ["panda", "lion", "pizza", "rocket"]
IMAGES = [str(ROOT / "examples" / "pictures" / f"{name}.png") for name in NAMES]
OBJECTIVES = {"stage2": "InternVLForPreTraining", "retrieval": "InternVLForRetrieval"}
LOSSES = {"stage2": ("loss", "loss_itm", "loss_itc", "loss_itg"), "retrieval": ("loss", "loss_itm", "loss_itc")}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long or much memory; run with `-m slow`")
    heavy = "Ray, Chromium, kill -9, two-process training, simulated 14B plans; run by `make test-heavy`"
    config.addinivalue_line("markers", f"heavy: {heavy}")


def pytest_collection_modifyitems(config, items):
    """Skip slow tests unless they were selected by `-m` or by name."""
    asked = config.option.markexpr or config.option.keyword or any("::" in argument for argument in config.args)
    if asked:
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture
def model():
    return golden_model()


@pytest.fixture
def expected() -> dict[str, torch.Tensor]:
    return golden("tiny/expected")


def make_repository(folder: Path, flat: bool = False, weights: str = "random") -> Path:
    """A copy of the repository's code and configs with a tiny checkpoint in two shards.

    Args:
        flat: put the tiny checkpoint at the root, like a published checkpoint; otherwise into `tiny/`.
        weights: "random" for seeded weights, "trained" for the weights of `tiny/`.
    """
    tiny = folder if flat else folder / "tiny"
    tiny.mkdir(parents=True)
    for name in CODE:
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "requirements.txt", folder)
    for path in ROOT.glob("*.json"):  # a checkpoint's own files replace the root's
        if path.name != INDEX:
            shutil.copy(path, folder / path.name)
    wanted = [path for path in (ROOT / "tiny").iterdir() if weights == "trained" or "safetensors" not in path.name]
    for path in wanted:
        shutil.copy(path, tiny / path.name)
    if weights == "random":
        state = random_state(tiny)
        size = sum(tensor.nbytes for tensor in state.values())
        save_torch_state_dict(state, tiny, max_shard_size=int(0.6 * size))
    return folder


def random_state(folder: Path) -> dict[str, torch.Tensor]:
    """Seeded bfloat16 weights for the config in `folder`; no parameter keeps the value 0 or 1."""
    config = repo_class("configuration_internvl.InternVLConfig").from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = repo_class("modeling_internvl.InternVLModel")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02)
    return {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}


def run_python(code: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Run `code` in a fresh process (see fresh.py): no terminal, no network, an empty cache of remote code."""
    return succeeded(run_fork(["-c", code, *arguments], folder, HF_MODULES_CACHE=str(folder / "modules")))


def run_interpreter(code: str, folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """The same in a new interpreter, seconds slower: for tests that hide a package or check what was imported."""
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, "-c", code, *map(str, arguments)]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": LAST_RESORT, "cwd": folder}
    return succeeded(subprocess.run(command, env=environment, **options))


def run_fork(command: list, folder: Path | str, *, server=FRESH, **environment: str) -> subprocess.CompletedProcess:
    """Do what `python COMMAND` does, in a fork of a preloaded interpreter."""
    command = [*map(str, command)]
    with tempfile.TemporaryDirectory() as streams:
        request = {
            "command": command,
            "folder": str(folder),
            "stdout": f"{streams}/stdout",
            "stderr": f"{streams}/stderr",
            "environment": os.environ | environment,
        }
        code = server.run(request, LAST_RESORT)
        texts = [Path(request[name]).read_text("utf-8") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(command, code, *texts)


def run_module(folder: Path | str, name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Do what `python -m NAME ARGUMENTS` does in `folder`, for a module of tools/ or benchmarks/."""
    return run_fork(["-m", name, *arguments], folder, PYTHONPATH=str(ROOT))


def succeeded(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def load(path, auto_class=AutoModel, **options):
    return auto_class.from_pretrained(path, trust_remote_code=True, **options)


def opaque_images() -> list[Image.Image]:
    """`IMAGES` on white: pipelines use PIL's own conversion, which makes transparent pixels black."""
    clear = [Image.open(path).convert("RGBA") for path in IMAGES]
    return [Image.alpha_composite(Image.new("RGBA", each.size, "white"), each).convert("RGB") for each in clear]


def switch_checkpointing(model, on, *arguments) -> None:
    """Switch gradient checkpointing by the method name that the installed version does not deprecate."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_{'enable' if on else 'disable'}")(*arguments)


def first_end(model) -> tuple[int, int]:
    """A token that greedy decoding generates for the goldens' first image, not among the first two; and its index."""
    inputs, options = golden("tiny/inputs"), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 319}
    tokens = model.generate(inputs["pixel_values"][:1], inputs["prompt_ids"][:1], **options)[0].tolist()
    index = next(index for index, token in enumerate(tokens) if index >= 2 and token not in tokens[:index])
    return tokens[index], index


def assert_same_tensors(one: dict, other: dict) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.fixture(scope="session")
def flat(tmp_path_factory):
    """Code and a tiny checkpoint with random weights side by side. Not to be changed."""
    return make_repository(tmp_path_factory.mktemp("loading") / "flat", flat=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Code and the trained tiny checkpoint side by side, like a published repository. Not to be changed."""
    return make_repository(tmp_path_factory.mktemp("trained") / "repository", flat=True, weights="trained")


@pytest.fixture(scope="session")
def tiny(trained):
    """The trained tiny checkpoint, float32. Not to be changed."""
    return load(trained, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def processor(trained):
    """The processor of the tiny checkpoint. Not to be changed."""
    return load(trained, AutoProcessor)
