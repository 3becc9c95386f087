"""The steps of benchmarks/gpu.py that compare numbers with those of the original or of the CPU; a difference fails."""

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import AutoModel, CompileConfig
from transformers.utils import is_torchvision_available

from benchmarks.goldens import (
    TOLERANCE,
    golden,
    golden_config,
    golden_inputs,
    golden_weights,
    repo_class,
    training_batch,
)
from benchmarks.gpu_machine import Machine, Missing, require
from benchmarks.measuring import ROOT

ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2")
LOW_PRECISION = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = {"float32": torch.float32, **LOW_PRECISION}
LEAST_COSINE = 0.98  # of low precision; 0.998 to 1 on a CPU
OBJECTIVES = {"stage2": "InternVLForPreTraining", "retrieval": "InternVLForRetrieval"}
weights = cache(golden_weights)

# --------------------------------------------------------------------------------------------------------- goldens


def folders(machine: Machine) -> tuple[str, ...]:
    """The goldens of a run: a small model, and one layer of each tower at the published widths."""
    return ("tiny",) if machine.tiny else ("tiny", "wide")


def golden_model(
    machine: Machine, attention: str, dtype: torch.dtype, name: str = "InternVLModel", folder: str = "tiny"
) -> Any:
    with torch.device("meta"):
        model = repo_class(f"modeling_internvl.{name}")(golden_config(folder, attention))
    with torch.inference_mode(False):  # the weights are kept, and `gradients` needs them too
        model.load_state_dict(weights(folder), assign=True)
    return deepcopy(model).to(machine.device, dtype).eval()


def golden_tensors(machine: Machine, name: str, folder: str = "tiny") -> dict[str, torch.Tensor]:
    with torch.inference_mode(False):  # the tensors are kept, and `gradients` needs them too
        found = golden_inputs(folder) if name == "inputs" else golden(f"{folder}/{name}")
        return {key: each.to(machine.device) for key, each in found.items()}


def golden_outputs(model: Any, inputs: dict[str, torch.Tensor], texts: bool = True) -> dict[str, torch.Tensor]:
    """Outputs under the names of the goldens; without `texts`, those of images alone."""
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    found = {f"encode_image_{mode.lower()}": model.encode_image(pixels, f"InternVL-{mode}") for mode in "CG"}
    if not texts:
        return found
    logits = {f"logits_per_image_{mode.lower()}": model(ids, pixels, mode=f"InternVL-{mode}") for mode in "CG"}
    found |= {name: output.logits_per_image for name, output in logits.items()}
    return found | {"encode_text": model.encode_text(ids)}


def check_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest difference of each. Raises `AssertionError` if one exceeds the goldens' tolerance."""
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
    return {name: (value - expected[name]).abs().max().item() for name, value in found.items()}


def check_cosines(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """The lowest cosine of each. Raises `AssertionError` if one is below `LEAST_COSINE`."""
    cosines = {
        name: torch.cosine_similarity(value.float(), expected[name].float(), dim=-1).min().item()
        for name, value in found.items()
    }
    for name, cosine in cosines.items():
        assert cosine >= LEAST_COSINE, f"{name}: cosine {cosine}"  # false for NaN too
    return cosines


def check_tokens(model: Any, inputs: dict[str, Any], expected: dict[str, Any], **options: Any) -> list[str]:
    """Greedy and beam search. Raises `AssertionError` if a token is not the original's."""
    ways = {"generate_greedy": 1, "generate_beam5": 5}
    for name, beams in ways.items():
        lengths = {"max_new_tokens": 12, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
        tokens = model.generate(inputs["pixel_values"], inputs["prompt_ids"], **lengths, **options)
        wanted = expected[name][:, 1:]  # the original puts <s> in front
        assert tokens.tolist() == wanted.tolist(), f"{name} with {options}"
    return list(ways)


def goldens(machine: Machine) -> dict[str, Any]:
    """The original's tensors and tokens by each attention: float32 within the tolerance, lower precisions by cosine."""
    result: dict[str, Any] = {}
    for folder in folders(machine):
        for attention in ATTENTIONS:
            for name, dtype in DTYPES.items():
                if dtype == torch.float32 and attention.startswith("flash"):
                    continue  # FlashAttention has no float32
                found = machine.attempt(one_golden, machine, folder, attention, dtype)
                result[f"golden/{folder}, {attention}, {name}"] = found
    return result


def one_golden(machine: Machine, folder: str, attention: str, dtype: torch.dtype) -> dict[str, Any]:
    if attention.startswith("flash"):
        require("flash_attn")
    if machine.is_cuda and (attention, folder) == ("flex_attention", "tiny"):
        raise Missing("flex_attention's kernels need heads of at least 16 channels; these have 4")
    inputs, expected = (golden_tensors(machine, name, folder) for name in ("inputs", "expected"))
    model = golden_model(machine, attention, dtype, folder=folder)
    outputs = {name: each for name, each in golden_outputs(model, inputs).items() if name in expected}
    if dtype != torch.float32:
        return check_cosines(outputs, expected)
    found: dict[str, Any] = {"largest difference": check_tensors(outputs, expected)}
    if "generate_greedy" in expected:
        # The model refuses static caches with flex_attention.
        for kind in (None,) if attention == "flex_attention" else (None, "static"):
            # Compiling is the step `compiled`.
            tokens = check_tokens(model, inputs, expected, cache_implementation=kind, disable_compile=True)
            found[f"tokens equal, {kind or 'dynamic'} cache"] = tokens
    return found


def kernels(machine: Machine) -> dict[str, Any]:
    """The image goldens by each kernel of torch's SDPA; on a card they need heads as wide as the published ones."""
    folder = folders(machine)[-1]
    inputs, expected = (golden_tensors(machine, name, folder) for name in ("inputs", "expected"))

    def compare(backend: SDPBackend, dtype: torch.dtype) -> dict[str, Any]:
        model = golden_model(machine, "sdpa", dtype, folder=folder)
        try:
            with sdpa_kernel(backend):
                found = golden_outputs(model, inputs, texts=False)
        except RuntimeError as error:
            if "No available kernel" in str(error) or "No viable backend" in str(error):
                raise Missing(f"torch has no {backend.name} for {dtype} on {machine.device.type}") from None
            raise
        return (check_tensors if dtype == torch.float32 else check_cosines)(found, expected)

    backends = ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
    return {
        f"golden/{folder}, {name}, {dtype_name}": machine.attempt(compare, getattr(SDPBackend, name), dtype)
        for name in backends
        for dtype_name, dtype in DTYPES.items()
    }


def compiled(machine: Machine) -> dict[str, Any]:
    """The goldens in float32 by each way to compile; on a card `reduce-overhead` makes CUDA graphs."""
    inputs, expected = golden_tensors(machine, "inputs"), golden_tensors(machine, "expected")

    def compare(prepare: Callable[[Any], Any], **options: Any) -> dict[str, Any]:
        torch.compiler.reset()
        model = golden_model(machine, "sdpa", torch.float32)
        prepare(model)
        for _ in range(2):  # the first calls record a CUDA graph, later ones replay it
            differences = check_tensors(golden_outputs(model, inputs), expected)
            tokens = check_tokens(model, inputs, expected, **options)
        return {"largest difference": differences, "tokens equal": tokens}

    def whole(model: Any, **options: Any) -> None:
        model.vision_model.compile(fullgraph=True, **options)
        model.qllama.compile(fullgraph=True, dynamic=False, **options)

    graphs = {"mode": "reduce-overhead"}
    static = {"cache_implementation": "static"}
    by_generate = CompileConfig(fullgraph=True, **graphs)
    by_generate._compile_all_devices = True  # otherwise `generate` compiles on a GPU alone
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "compile_layers": lambda: compare(lambda model: model.compile_layers()),
        "compile_layers, reduce-overhead": lambda: compare(lambda model: model.compile_layers(**graphs)),
        "towers as a whole": lambda: compare(whole, disable_compile=True, **static),
        "towers as a whole, reduce-overhead": lambda: compare(
            lambda model: whole(model, **graphs), disable_compile=True, **static
        ),
        "static cache, compiled by generate": lambda: compare(lambda model: None, compile_config=by_generate, **static),
    }
    return {name: machine.attempt(way) for name, way in ways.items()}


def gradients(machine: Machine) -> dict[str, Any]:
    """Losses and gradients of both training objectives, float32, by eager attention and SDPA."""
    inputs, expected = golden_tensors(machine, "inputs"), golden_tensors(machine, "expected")

    def compare(objective: str, attention: str) -> dict[str, Any]:
        with torch.inference_mode(False), torch.enable_grad():
            model = golden_model(machine, attention, torch.float32, OBJECTIVES[objective]).train()
            batch = training_batch(objective, inputs={name: each.clone() for name, each in inputs.items()})
            output = model(**batch)
            output.loss.backward()
        prefix = f"{objective}.grad."
        found = {f"{objective}.{name}": value.detach() for name, value in output.items()}
        for name in (key.removeprefix(prefix) for key in expected if key.startswith(prefix)):
            found[prefix + name] = model.get_parameter(name).grad
        return check_tensors(found, expected)

    return {
        f"{objective}, {attention}": machine.attempt(compare, objective, attention)
        for objective in OBJECTIVES
        for attention in ("eager", "sdpa")
    }


# ------------------------------------------------------------------------------------------------------- processor

# Runs in a new interpreter, so that torchvision can be hidden before transformers looks for it.
PROCESS = """
import importlib.metadata, importlib.util, sys, torch
if sys.argv[3] == "hidden":
    find, tell = importlib.util.find_spec, importlib.metadata.version
    def find_spec(name, package=None):
        return None if name.split(".")[0] == "torchvision" else find(name, package)
    def version(name):
        if name == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return tell(name)
    importlib.util.find_spec, importlib.metadata.version, sys.modules["torchvision"] = find_spec, version, None
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available
assert is_torchvision_available() == (sys.argv[3] == "there"), "torchvision"
processor = AutoProcessor.from_pretrained(sys.argv[1], subfolder="tiny", trust_remote_code=True)
images = sorted(__import__("pathlib").Path(sys.argv[1], "examples", "pictures").glob("*.png"))
inputs = processor(images=images, text=["a photo of a panda", "狐狸的图片", "自転車"])
torch.save(dict(inputs), sys.argv[2])
"""


def processor(machine: Machine) -> dict[str, Any]:
    """Pixels and ids must be the same to the bit with torchvision installed and hidden."""

    def inputs(torchvision: str, folder: Path) -> dict[str, torch.Tensor]:
        out = folder / f"{torchvision}.pt"
        command = [sys.executable, "-c", PROCESS, str(ROOT), str(out), torchvision]
        done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"with torchvision {torchvision}: {done.stderr[-1000:]}")
        return torch.load(out)

    if not is_torchvision_available():
        raise Missing("torchvision is not installed here")
    with TemporaryDirectory() as folder:
        one, other = inputs("there", Path(folder)), inputs("hidden", Path(folder))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    return {"with and without torchvision": {"equal": {name: list(tensor.shape) for name, tensor in one.items()}}}


# --------------------------------------------------------------------------------------------------------- float16

# The classes that get random weights: on a CPU one tower after the other, since both need more than 24 GB.
WHOLE = ("InternVLModel",)
TOWERS = ("InternVLVisionModelWithProjection", "InternVLTextModelWithProjection")


def float16(machine: Machine) -> dict[str, Any]:
    """Largest activations and outputs that are not finite, in float16 and bfloat16: `tiny/`, and random weights."""
    result = {}
    for name, dtype in LOW_PRECISION.items():
        result[f"tiny/, {name}"] = machine.attempt(values_of_tiny, machine, dtype)
        for part in () if machine.tiny else WHOLE if machine.is_cuda else TOWERS:
            result[f"drawn, full size, {part}, {name}"] = machine.attempt(values_at_full_size, machine, part, dtype)
    return result


def values_of_tiny(machine: Machine, dtype: torch.dtype) -> dict[str, Any]:
    model = AutoModel.from_pretrained(ROOT, subfolder="tiny", trust_remote_code=True, dtype=dtype)
    return largest_values(machine, model.to(machine.device).eval(), dtype)


def values_at_full_size(machine: Machine, part: str, dtype: torch.dtype) -> dict[str, Any]:
    machine.drop_model()  # a card of 40 GB has room for one of them
    machine.check_room(30 if part in WHOLE else 15)
    with torch.inference_mode(False), torch.device("meta"):
        model = repo_class(f"modeling_internvl.{part}")(machine.config()).to(dtype).eval()
    with torch.inference_mode(False), torch.no_grad():
        return largest_values(machine, machine.with_random_weights(model), dtype)


class Scores(TorchFunctionMode):
    """Records the largest attention score inside it, which the kernels do not return."""

    largest = 0.0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = (states.float() for states in args[:2])
            scores = query @ key.transpose(-1, -2) * ((kwargs or {}).get("scale") or query.shape[-1] ** -0.5)
            self.largest = max(self.largest, scores.abs().max().item())
        return func(*args, **(kwargs or {}))


def largest_values(machine: Machine, model: Any, dtype: torch.dtype) -> dict[str, Any]:
    """For each kind of module the largest absolute input or output; and how many outputs are not finite."""
    largest: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=machine.device))

    def record(kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for states in (*inputs, output):
                if isinstance(states, torch.Tensor) and states.is_floating_point():
                    largest[kind] = torch.maximum(largest[kind], states.abs().max().float())

        return hook

    config = model.config
    pixels = torch.randn(2, 3, config.image_size, config.image_size, device=machine.device, dtype=dtype)  # [B, 3, H, W]
    prefix = config.embed_prefix_ids or [config.qllama_config.bos_token_id]
    end = config.qllama_config.eos_token_id
    ids = torch.tensor([[*prefix, *words, end] for words in ([10, 20, 30], [40, 50, 60])], device=machine.device)
    outputs = {}
    with ExitStack() as stack:
        scores = stack.enter_context(Scores())
        for name, module in model.named_modules():
            if "." in name:
                kind = f"{name.partition('.')[0]}: {type(module).__name__}"
                stack.callback(module.register_forward_hook(record(kind)).remove)
        if hasattr(model, "vision_model"):
            outputs["image, InternVL-C"] = model.embed_image(pixels, mode="InternVL-C")
        if hasattr(model, "text_projection"):
            outputs["text"] = model.embed_text(ids, ids > 0)
        if hasattr(model, "query_tokens"):
            outputs["image, InternVL-G"] = model.embed_image(pixels, mode="InternVL-G")
            outputs["match"] = model.match(pixels, ids, ids > 0)
    return {
        "outputs that are not finite": {name: int((~each.isfinite()).sum()) for name, each in outputs.items()},
        "largest representable": torch.finfo(dtype).max,
        "largest score of an attention": scores.largest,
        "largest": {kind: value.item() for kind, value in sorted(largest.items())},
    }


STEPS = {step.__name__: step for step in (goldens, kernels, compiled, gradients, processor, float16)}
