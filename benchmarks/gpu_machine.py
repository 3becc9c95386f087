"""The machine that benchmarks/gpu.py measures: its device, models of full size, a clock and a memory meter."""

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import measuring, this_machine
from benchmarks.goldens import repo_class
from benchmarks.measuring import ROOT
from tools.machines import simulate_devices

PEAK = "peak GB"
COSINE = "least cosine to bfloat16"
OUT_OF_TIME = "the time was used up"
LARGEST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max
LAYERS = ("vision_model.encoder.layers.", "qllama.model.layers.")
MODEL_GB = 30  # the weights in bfloat16, and room to run them
PACKAGES = ("torch", "transformers", "accelerate", "torchao", "flash_attn", "diffusers", "torchvision")


class Missing(Exception):
    """This machine lacks something that a measurement needs."""


def require(package: str) -> None:
    """Raise `Missing` if an optional package is not installed. One that is installed and cannot be imported fails."""
    if importlib.util.find_spec(package) is None:
        raise Missing(f"{package} is not installed here")


class Machine:
    """The machine to measure, real or simulated.

    Args:
        device (`str`): "cuda", "cpu", ...
        tiny (`bool`): the sizes of `tiny/` and few repetitions, to check that every step runs.
        simulated (`bool`): simulate the card: tensors have shapes and no values, nothing takes time, and memory is
            counted. Everything must run inside `measuring.simulated_card`.
        minutes (`float`): no measurement begins later than this.
    """

    def __init__(self, device: str, tiny: bool = False, simulated: bool = False, minutes: float = 9):
        self.device, self.tiny, self.simulated = torch.device(device), tiny, simulated
        self.is_cuda = self.device.type == "cuda" and not simulated
        self.deadline = time.monotonic() + 60 * minutes
        self.budget = 0.0 if tiny else 1.0  # seconds for the repetitions of one timing
        self.meter: Any = None  # the memory meter of a simulated card
        self.dead = ""  # why the device accepts no more calls
        self._model: Any = None
        self._spare: list[Any] = []

    def start_over(self) -> None:
        """Prepare models for a step on a simulated card, which can neither build them nor reuse those of another."""
        self._model = None
        self._spare = [self.empty_model(), self.empty_model()]

    def describe(self) -> dict[str, Any]:
        name = this_machine.processor_name()
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
        return found | this_machine.versions(*PACKAGES)

    # ------------------------------------------------------------------------------------------- clock and memory

    def wait(self) -> None:
        if self.device.type != "cpu" and not self.simulated:
            torch.accelerator.synchronize(self.device)

    def seconds(self, call: Callable[[], Any], warm: int = 2) -> float:
        """The median time of a call until the device has finished it, after `warm` calls that do not count."""
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
        """Peak memory in GB during a call, weights included; None on a CPU."""
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
        """Release the memory that the last measurement left behind."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def attempt(self, measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """The result of a measurement, or the reason why there is none: an error does not end the run."""
        if self.dead:
            return {"failed": f"not run: {self.dead}"}
        if time.monotonic() > self.deadline:
            return {"skipped": OUT_OF_TIME}
        try:
            found = measure(*arguments)
        except Missing as missing:
            found = {"skipped": str(missing)}
        except Exception as error:  # from any library: a borrowed machine allows no second run
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
        """The joint model in bfloat16 with random weights, built once."""
        if self._model is None:
            self.check_room(0.1 if self.tiny else MODEL_GB)
            with torch.inference_mode(False):  # weights of inference mode could not be shared between models
                self._model = self.with_random_weights(self.empty_model())
        return self._model

    def drop_model(self) -> None:
        self._model = None
        self.forget()

    def take_model(self) -> Any:
        """Hand over the joint model to be changed or dropped: the next one is built anew."""
        model, self._model = self.model(), None
        return model

    def check_room(self, gigabytes: float) -> None:
        """Raises `Missing` if the device has less memory than this in total."""
        if self.simulated:
            return
        total = this_machine.memory()
        if self.is_cuda:
            total = torch.cuda.get_device_properties(self.device).total_memory
        if total < gigabytes * 1e9:
            raise Missing(f"{self.device.type} has {total / 1e9:.0f} GB of memory, and this takes {gigabytes:g}")

    def with_random_weights(self, model: Any) -> Any:
        if self.simulated:
            measuring.put_on_a_card(model, torch.bfloat16)
            return model
        return measuring.with_random_weights(model, self.device)

    def twin(self) -> Any:
        """A second model with the same weights in the same memory, to be compiled or quantised."""
        model, twin = self.model(), self.empty_model()
        with torch.inference_mode(False):
            twin.load_state_dict(model.state_dict(), assign=True)
        return twin

    def peer(self, make: Callable[[Any], Any]) -> Any:
        """transformers' own model with our weights: `measuring.vision_peer_of` or `text_peer_of`."""
        if self.simulated:
            raise Missing("peers are not simulated")
        return make(self.model())

    def pixels(self, batch: int) -> torch.Tensor:
        size = self.config().image_size
        return torch.randn(batch, 3, size, size, device=self.device, dtype=torch.bfloat16)  # [B, 3, H, W]

    def ids(self, batch: int, length: int) -> torch.Tensor:
        """Random ids [B, L] with the prefix and the end of a text to embed."""
        config = self.config()
        prefix = (config.embed_prefix_ids or [config.qllama_config.bos_token_id])[: length - 1]
        ids = torch.randint(3, config.qllama_config.vocab_size, (batch, length))
        ids[:, : len(prefix)] = torch.tensor(prefix)
        ids[:, -1] = config.qllama_config.eos_token_id
        return ids.to(self.device)

    def write(self, model: Any, pixels: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
        """Captions of exactly `count` tokens."""
        if not self.simulated:
            lengths = {"max_new_tokens": count, "min_new_tokens": count}
            return model.generate(pixels, do_sample=False, **lengths, **options)
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
    """[M, C] x [N, C] -> [M, N] in bfloat16; both with one scale per row."""
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(
        states[0], weights[0].t(), states[1], by_row, weights[1].t(), by_row, bias=bias, use_fast_accum=True
    )


class Float8Linear(nn.Module):
    """A Linear in float8 with one scale per row: weights are converted once, inputs at each call."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.bias = layer.bias
        self.weight, self.scales = in_float8(layer.weight.detach())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        flat = states.reshape(-1, states.shape[-1])
        return float8_product(in_float8(flat), (self.weight, self.scales), self.bias).view(*states.shape[:-1], -1)


def check_float8(device: torch.device) -> None:
    """Raises `Missing` if torch has no float8 product for the device."""
    if not hasattr(F, "scaled_mm"):
        raise Missing(f"torch {torch.__version__} has no scaled_mm, which came with 2.10")
    ones = in_float8(torch.ones(16, 16, dtype=torch.bfloat16, device=device))
    try:
        float8_product(ones, ones, None)
    except NotImplementedError:
        raise Missing(f"torch {torch.__version__} has no scaled_mm for {device.type}") from None


def to_float8(model: nn.Module, prefixes: tuple[str, ...] = LAYERS) -> nn.Module:
    """Replace the Linear layers inside the towers' layers, in place; heads and embeddings stay."""
    check_float8(next(model.parameters()).device)
    for name, module in list(model.named_modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and f"{name}.{child}".startswith(prefixes):
                setattr(module, child, Float8Linear(layer))
    return model
