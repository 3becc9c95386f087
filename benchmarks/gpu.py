"""Measure the model on a GPU: the goldens' numbers first, then images, texts and captions a second beside the products.

    python benchmarks/gpu.py                          # every step, on the GPU; at most 9 minutes
    python benchmarks/gpu.py --only goldens images    # some of them
    python benchmarks/gpu.py --device cpu --tiny      # the same steps, small, on a CPU

Nothing is downloaded: full-size weights are drawn on the card. Each step adds its result to the JSON file as it ends,
so an interrupted run loses one step. A step that lacks something is named in the file as skipped, with the reason.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "tiny"
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2")
LOW_PRECISION = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SPREAD = 0.02  # standard deviation of drawn weights
PEAK = "peak memory in GB"


class Machine:
    """
    The device, the size of what is measured, and how to time on it.

    Args:
        device (`str`): "cuda", "cpu", ...
        tiny (`bool`): the configuration of `tiny/` and few repetitions, to see that every step runs.
    """

    def __init__(self, device: str, tiny: bool):
        self.device, self.tiny = torch.device(device), tiny
        self.kind = getattr(torch, self.device.type, None) if self.device.type != "cpu" else None
        self.repeats = 2 if tiny else 10
        self._model: Any = None

    def describe(self) -> dict[str, Any]:
        name = platform.processor() or platform.machine()
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"device": name, "tiny": self.tiny, "date": str(date.today()), **versions}

    def seconds(self, call: Callable[[], Any], repeats: int = 0) -> float:
        """The median time of a call, the device having finished, after one that warms it up."""
        times = []
        for _ in range(1 + (repeats or self.repeats)):
            self.wait()
            started = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    def wait(self) -> None:
        if self.kind is not None:
            self.kind.synchronize()

    def peak(self, call: Callable[[], Any]) -> float | None:
        """The most memory in GB that a call needs with the weights; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        return torch.cuda.max_memory_allocated(self.device) / 1e9

    def model(self) -> Any:
        """The joint model in bfloat16 with drawn weights, made once."""
        if self._model is None:
            config = repository_class("configuration_internvl.InternVLConfig").from_pretrained(
                ROOT / "tiny" if self.tiny else ROOT
            )
            with torch.device("meta"):
                model = repository_class("modeling_internvl.InternVLModel")(config).to(torch.bfloat16)
            model = model.to_empty(device=self.device).eval()
            generator = torch.Generator(self.device).manual_seed(0)
            for name, parameter in model.named_parameters():
                if "norm" in name and name.endswith("weight"):
                    parameter.data.fill_(1)
                else:
                    parameter.data.normal_(0, SPREAD, generator=generator)
            self._model = model
        return self._model

    def pixels(self, batch: int) -> torch.Tensor:
        size = self.model().config.image_size
        return torch.randn(batch, 3, size, size, device=self.device, dtype=torch.bfloat16)  # [B, 3, H, W]

    def ids(self, batch: int, length: int) -> torch.Tensor:
        """Ids [B, L] of texts that begin and end as they must."""
        config = self.model().config
        ids = torch.randint(3, config.qllama_config.vocab_size, (batch, length), device=self.device)
        prefix = (config.embed_prefix_ids or [config.qllama_config.bos_token_id])[: length - 1]
        ids[:, : len(prefix)] = torch.tensor(prefix, device=self.device)
        ids[:, -1] = config.qllama_config.eos_token_id
        return ids


def repository_class(reference: str) -> Any:
    return get_class_from_dynamic_module(reference, str(ROOT))


# ------------------------------------------------------------------------------------------------------ right numbers


def golden_model(machine: Machine, attention: str, dtype: torch.dtype) -> Any:
    fields = json.loads((GOLDEN / "config.json").read_text("utf-8"))
    config = repository_class("configuration_internvl.InternVLConfig")(**fields, attn_implementation=attention)
    model = repository_class("modeling_internvl.InternVLModel")(config)
    model.load_state_dict(load_file(GOLDEN / "model.safetensors"))
    return model.to(machine.device, dtype).eval()


def golden_outputs(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    found = {f"encode_image_{mode.lower()}": model.encode_image(pixels, f"InternVL-{mode}") for mode in "CG"}
    logits = {f"logits_per_image_{mode.lower()}": model(ids, pixels, mode=f"InternVL-{mode}") for mode in "CG"}
    found |= {name: output.logits_per_image for name, output in logits.items()}
    return found | {"encode_text": model.encode_text(ids)}


def golden_tokens(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    arguments = {"max_new_tokens": 12, "min_new_tokens": 8, "do_sample": False, **options}
    prompt = inputs["pixel_values"], inputs["prompt_ids"]
    return {
        "generate_greedy": model.generate(*prompt, **arguments),
        "generate_beam5": model.generate(*prompt, num_beams=5, **arguments),
    }


def goldens(machine: Machine) -> dict[str, Any]:
    """The original implementation's tensors and tokens, by attention; float32 within the goldens' tolerance."""
    inputs = {name: each.to(machine.device) for name, each in load_file(GOLDEN / "inputs.safetensors").items()}
    expected = {name: each.to(machine.device) for name, each in load_file(GOLDEN / "expected.safetensors").items()}
    result: dict[str, Any] = {}
    for attention in ATTENTIONS:
        result[attention] = found = {}
        try:
            if not attention.startswith("flash"):  # FlashAttention has no float32
                found["float32"] = float32_goldens(
                    golden_model(machine, attention, torch.float32), attention, inputs, expected
                )
            for name, dtype in LOW_PRECISION.items():
                outputs = golden_outputs(golden_model(machine, attention, dtype), inputs)
                found[name] = {
                    key: torch.cosine_similarity(value.float(), expected[key], dim=-1).min().item()
                    for key, value in outputs.items()
                }
        except (ImportError, NotImplementedError) as error:
            found["skipped"] = str(error).splitlines()[0]
    return result


def float32_goldens(model: Any, attention: str, inputs: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Raises `AssertionError` where a tensor or a token is not the original's."""
    outputs = golden_outputs(model, inputs)
    for name, value in outputs.items():
        torch.testing.assert_close(value, expected[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
    kinds = (None,) if attention == "flex_attention" else (None, "static")  # the model refuses that pair
    for kind in kinds:
        for name, tokens in golden_tokens(model, inputs, cache_implementation=kind).items():
            wanted = expected[name][:, 1:]  # the original puts <s> in front
            assert tokens.tolist() == wanted.tolist(), f"{name} with cache {kind}"
    differences = {name: (value - expected[name]).abs().max().item() for name, value in outputs.items()}
    return {"largest difference": differences, "tokens equal: greedy, 5 beams": [kind or "dynamic" for kind in kinds]}


# -------------------------------------------------------------------------------------------------------------- speed


class Products:
    """The matrix products of the Linear layers that ran inside, with inputs of the same shapes, and nothing else."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.calls: list[tuple[nn.Linear, torch.Size]] = []

    def __enter__(self) -> "Products":
        layers = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        note = lambda layer, inputs, output: self.calls.append((layer, inputs[0].shape))  # noqa: E731
        self.handles = [layer.register_forward_hook(note) for layer in layers]
        return self

    def __exit__(self, *reason: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def run(self) -> None:
        states: dict[torch.Size, torch.Tensor] = {}
        for layer, shape in self.calls:
            if shape not in states:
                states[shape] = torch.randn(shape, dtype=layer.weight.dtype, device=layer.weight.device)
            nn.functional.linear(states[shape], layer.weight, layer.bias)

    @property
    def operations(self) -> float:
        return sum(2 * math.prod(shape) * layer.out_features for layer, shape in self.calls)


def rate(machine: Machine, model: nn.Module, call: Callable[[], Any], count: int) -> dict[str, Any]:
    """`count` things a call: things a second, those of the Linear layers' products alone, and the share of it."""
    with Products(model) as products:
        call()
    seconds, least = machine.seconds(call), machine.seconds(products.run)
    return {
        "a second": count / seconds,
        "products alone, a second": count / least,
        "share of the products": least / seconds,
        "TFLOP/s": products.operations / seconds / 1e12,
        PEAK: machine.peak(call),
    }


def images(machine: Machine) -> dict[str, Any]:
    """Embeddings of images in bfloat16, batch by batch, in both modes."""
    model, result = machine.model(), {}
    for mode in ("InternVL-C", "InternVL-G"):
        for batch in (1, 2) if machine.tiny else (1, 4, 16, 64, 128, 256):
            pixels = machine.pixels(batch)
            found = rate(machine, model, lambda p=pixels, m=mode: model.embed_image(p, mode=m), batch)
            result[f"{mode}, batch {batch}"] = found
    return result


def texts(machine: Machine) -> dict[str, Any]:
    """Embeddings of texts of 12 tokens in bfloat16."""
    model, result = machine.model(), {}
    for batch in (1, 2) if machine.tiny else (1, 64, 512):
        ids = machine.ids(batch, 12)
        result[f"batch {batch}"] = rate(machine, model, lambda ids=ids: model.embed_text(ids, ids > 0), batch)
    return result


def captions(machine: Machine) -> dict[str, Any]:
    """Tokens a second of captions; from the difference of two lengths, so that what comes before the first is out."""
    model, result = machine.model(), {}
    short, long = (2, 4) if machine.tiny else (16, 48)
    ways = {"greedy": {}, "greedy, static cache": {"cache_implementation": "static"}, "5 beams": {"num_beams": 5}}
    for name, options in ways.items():
        for batch in (1, 2) if machine.tiny else (1, 32):
            pixels = machine.pixels(batch)

            def write(count: int, pixels: torch.Tensor = pixels, options: dict[str, Any] = options) -> None:
                lengths = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
                model.generate(pixels, **lengths, **options)

            first, second = (machine.seconds(lambda n=count, w=write: w(n), repeats=3) for count in (short, long))
            result[f"{name}, {batch} images"] = {
                "tokens a second": batch * (long - short) / max(second - first, 1e-9),
                f"seconds for {long} tokens": second,
                PEAK: machine.peak(lambda w=write: w(short)),
            }
    return result


STEPS: dict[str, Callable[[Machine], dict[str, Any]]] = {
    "goldens": goldens,
    "images": images,
    "texts": texts,
    "captions": captions,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that every step runs")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help=f"some of {', '.join(STEPS)}")
    parser.add_argument("--minutes", type=float, default=9, help="begin no step after this time")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu.json", help="JSON file of the results")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --device cpu --tiny runs the steps small")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    machine, started = Machine(arguments.device, arguments.tiny), time.monotonic()
    results: dict[str, Any] = {"machine": machine.describe(), "steps": {}}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or STEPS:
        results["steps"][name] = run_step(machine, name, arguments.minutes - (time.monotonic() - started) / 60)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        print(f"{name}: {json.dumps(results['steps'][name], indent=1)}", flush=True)
    if any("failed" in step for step in results["steps"].values()):
        raise SystemExit(1)


@torch.inference_mode()
def run_step(machine: Machine, name: str, minutes_left: float) -> dict[str, Any]:
    if minutes_left <= 0:
        return {"skipped": "the time was used up"}
    started = time.monotonic()
    try:
        result = STEPS[name](machine)
    except (AssertionError, RuntimeError) as error:  # the steps after it can still run
        return {"failed": f"{type(error).__name__}: {error}"[:2000]}
    return result | {"seconds": time.monotonic() - started}


if __name__ == "__main__":
    main()
