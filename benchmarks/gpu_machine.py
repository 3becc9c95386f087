"""The machine that benchmarks/gpu.py measures: its device, its models at full size, its clock and its memory."""

import gc
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import measuring
from benchmarks.goldens import repo_class
from benchmarks.measuring import ROOT
from tools.machines import simulate_devices
from tools.machines.synthesise_checkpoint import mean_and_deviation

PEAK = "peak GB"
COSINE = "least cosine to bfloat16"
OUT_OF_TIME = "the time was used up"
LARGEST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max
LAYERS = ("vision_model.encoder.layers.", "qllama.model.layers.")
MODEL_GB = 30  # the weights in bfloat16, and room to run them
PACKAGES = ("torch", "transformers", "accelerate", "torchao", "flash_attn", "diffusers", "torchvision")


class Missing(Exception):
    """What a measurement needs and this machine lacks."""


def require(package: str) -> None:
    """Raise `Missing` without an optional package; that one which is there fails to import is a failure."""
    if importlib.util.find_spec(package) is None:
        raise Missing(f"{package} is not installed here")


def installed() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Machine:
    """
    Args:
        device (`str`): "cuda", "cpu", ...
        tiny (`bool`): the sizes of `tiny/` and few repetitions, to see that every step runs.
        simulated (`bool`): a card that is not there: tensors have shapes and no values, nothing takes time, and memory
            is counted. Everything is to run inside `measuring.simulated_card`.
        minutes (`float`): no measurement begins later than this.
    """

    def __init__(self, device: str, tiny: bool = False, simulated: bool = False, minutes: float = 9):
        self.device, self.tiny, self.simulated = torch.device(device), tiny, simulated
        self.is_cuda = self.device.type == "cuda" and not simulated
        self.deadline = time.monotonic() + 60 * minutes
        self.budget = 0.0 if tiny else 1.0  # seconds for the repetitions of one timing
        self.meter: Any = None  # of a simulated card
        self.dead = ""  # why the device takes no more calls
        self._model: Any = None
        self._spare: list[Any] = []

    def start_over(self) -> None:
        """Before a step on a simulated card: it cannot make models, and has no use for those of another simulation."""
        self._model = None
        self._spare = [self.empty_model(), self.empty_model()]

    def describe(self) -> dict[str, Any]:
        name = platform.processor() or platform.machine()
        if self.simulated:
            name = "a simulated card: shapes and memory, no times"
        elif self.is_cuda:
            name = torch.cuda.get_device_name(self.device)
        found = {
            "device": name,
            "kind": self.device.type,
            "tiny": self.tiny,
            "simulated": self.simulated,
            "date": str(date.today()),
        }
        if self.is_cuda:
            properties = torch.cuda.get_device_properties(self.device)
            found["memory in GB"] = properties.total_memory / 1e9
            found["capability"] = f"{properties.major}.{properties.minor}"
            found["cuda"] = torch.version.cuda
        return found | installed()

    # ------------------------------------------------------------------------------------------- clock and memory

    def wait(self) -> None:
        if self.device.type != "cpu" and not self.simulated:
            torch.accelerator.synchronize(self.device)

    def seconds(self, call: Callable[[], Any], warm: int = 2) -> float:
        """The median time of a call, the device having finished, after `warm` calls that do not count."""
        for _ in range(1 if self.tiny else warm):
            call()
        times: list[float] = []
        while len(times) < 2 or (sum(times) < self.budget and len(times) < 50):
            self.wait()
            started = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def peak(self, call: Callable[[], Any]) -> float | None:
        """The most memory in GB during a call, the weights included; None on a CPU."""
        if self.simulated:
            self.meter.restart()
            call()
            return self.meter.peak[measuring.CARD] / 1e9
        if not self.is_cuda:
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        return torch.cuda.max_memory_allocated(self.device) / 1e9

    def forget(self) -> None:
        """Give back the memory that the last measurement left."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def attempt(self, measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """What was measured, or why it was not: what comes after it can still run."""
        if self.dead:
            return {"failed": f"not run: {self.dead}"}
        if time.monotonic() > self.deadline:
            return {"skipped": OUT_OF_TIME}
        try:
            found = measure(*arguments)
        except Missing as missing:
            found = {"skipped": str(missing)}
        except Exception as error:  # of whatever library: on a lent machine there is no second try
            found = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        try:
            self.forget()
        except RuntimeError as error:  # after some errors of CUDA nothing works in this process
            self.dead = f"the device takes no more calls, {str(error).splitlines()[0]}"
        return found

    # ------------------------------------------------------------------------------------------- models and inputs

    def config(self) -> Any:
        folder = ROOT / "tiny" if self.tiny else ROOT
        return repo_class("configuration_internvl.InternVLConfig").from_pretrained(folder)

    def empty_model(self) -> Any:
        if self._spare:
            return self._spare.pop()
        with torch.device("meta"):
            return repo_class("modeling_internvl.InternVLModel")(self.config()).to(torch.bfloat16).eval()

    def model(self) -> Any:
        """The joint model in bfloat16, made once, with drawn weights at the scales of the synthetic checkpoint."""
        if self._model is None:
            self.check_room(0.1 if self.tiny else MODEL_GB)
            with torch.inference_mode(False), torch.no_grad():  # weights of inference mode could not change hands
                self._model = self.drawn(self.empty_model())
        return self._model

    def drop_model(self) -> None:
        self._model = None
        self.forget()

    def take_model(self) -> Any:
        """The joint model to be changed, or to be dropped: the next one is drawn anew."""
        model, self._model = self.model(), None
        return model

    def check_room(self, gigabytes: float) -> None:
        """Raises `Missing` where the device has less memory than something takes."""
        if self.simulated:
            return
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        if self.is_cuda:
            total = torch.cuda.get_device_properties(self.device).total_memory / 1e9
        if total < gigabytes:
            raise Missing(f"{self.device.type} has {total:.0f} GB of memory, and this takes {gigabytes:g}")

    def drawn(self, model: Any) -> Any:
        if self.simulated:
            measuring.put_on_a_card(model, torch.bfloat16)
            return model
        model.to_empty(device=self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        for name, parameter in model.named_parameters():
            mean, deviation = mean_and_deviation(name, parameter.shape)
            parameter.normal_(mean, deviation, generator=generator)
        return model

    def twin(self) -> Any:
        """Another model with the same weights in the same memory, to be compiled or quantised."""
        model, twin = self.model(), self.empty_model()
        with torch.inference_mode(False):
            twin.load_state_dict(model.state_dict(), assign=True)
        return twin

    def vision_peer(self) -> Any:
        """transformers' own vision tower with our weights."""
        model = self.model().vision_model
        peer = measuring.vision_peer(model.config).to(torch.bfloat16)
        return measuring.sharing_weights(peer, model.state_dict())

    def text_peer(self) -> Any:
        """transformers' own LLaMA with our weights."""
        model = self.model().qllama
        return measuring.sharing_weights(measuring.text_peer(model.config).to(torch.bfloat16), model.state_dict())

    def pixels(self, batch: int) -> torch.Tensor:
        size = self.config().image_size
        return torch.randn(batch, 3, size, size, device=self.device, dtype=torch.bfloat16)  # [B, 3, H, W]

    def ids(self, batch: int, length: int) -> torch.Tensor:
        """Ids [B, L] of texts that begin and end as they must."""
        config = self.config()
        prefix = (config.embed_prefix_ids or [config.qllama_config.bos_token_id])[: length - 1]
        ids = torch.randint(3, config.qllama_config.vocab_size, (batch, length))
        ids[:, : len(prefix)] = torch.tensor(prefix)
        ids[:, -1] = config.qllama_config.eos_token_id
        return ids.to(self.device)

    def write(self, model: Any, pixels: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
        """Captions of exactly `count` tokens."""
        lengths = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        if not self.simulated:
            return model.generate(pixels, **lengths, **options)
        with simulate_devices.counted_steps(model.qllama, count):
            return model.generate(pixels, max_new_tokens=count, **options)


# ---------------------------------------------------------------------------------------------------------- float8


def in_float8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [N, C] in float8_e4m3fn and the scales [N, 1] of its rows."""
    scales = matrix.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / LARGEST_FLOAT8
    return (matrix / scales).clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn), scales


def float8_product(
    states: tuple[torch.Tensor, torch.Tensor], weights: tuple[torch.Tensor, torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    """[M, C] x [N, C] -> [M, N] in bfloat16; both scaled by rows."""
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(
        states[0], weights[0].t(), states[1], by_row, weights[1].t(), by_row, bias=bias, use_fast_accum=True
    )


class Float8Linear(nn.Module):
    """A Linear whose weights are float8 by rows, as its inputs become at each call; products are torch's own."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.bias = layer.bias
        self.weight, self.scales = in_float8(layer.weight.detach())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        flat = states.reshape(-1, states.shape[-1])
        return float8_product(in_float8(flat), (self.weight, self.scales), self.bias).view(*states.shape[:-1], -1)


def check_float8(device: torch.device) -> None:
    """Raises `Missing` where torch has no such products."""
    if not hasattr(F, "scaled_mm"):
        raise Missing(f"torch {torch.__version__} has no scaled_mm, which came with 2.10")
    ones = in_float8(torch.ones(16, 16, dtype=torch.bfloat16, device=device))
    try:
        float8_product(ones, ones, None)
    except NotImplementedError:
        raise Missing(f"torch {torch.__version__} has no scaled_mm for {device.type}") from None


def to_float8(model: nn.Module, prefixes: tuple[str, ...] = LAYERS) -> nn.Module:
    """Replace the Linear layers of the towers' layers, in place; heads and embeddings stay."""
    check_float8(next(model.parameters()).device)
    for name, module in list(model.named_modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and f"{name}.{child}".startswith(prefixes):
                setattr(module, child, Float8Linear(layer))
    return model
