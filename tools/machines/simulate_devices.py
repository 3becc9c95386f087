"""Place the model on machines that you do not have, run every public method there, and print the plans.

Run by whoever plans for such GPUs; what_fits.py, benchmarks/ and tests import it.

    python -m tools.machines.simulate_devices                              # every setup of docs/machines.md
    python -m tools.machines.simulate_devices 2x16 24+8+8:sequential 10    # other cards, in GB; one alone offloads
    python -m tools.machines.simulate_devices --config tiny 0.004+0.004

Weights and activations are torch's fake tensors: they have a shape, a dtype and a device such as `cuda:3`, and no
memory, so this needs neither a GPU nor 28 GB. The plan is transformers' own (`device_map="auto"`), the hooks are
accelerate's own, and an operation on two devices raises the error that it would raise on real ones. Memory is the bytes
of all living fake storages, per device. The CUDA context (some 0.5 GB per card), workspaces of kernels and
fragmentation are not counted. Attention and norms are counted as small operations, which need more than fused kernels.
"""

import argparse
import logging
import os
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import dispatch_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModel

from tools import ROOT, pages, step

GB = 10**9
HOST_MEMORY = 64 * GB
SETUPS = ("2x24", "4x12", "8x8", "24+8+8:sequential", "24", "16", "12", "8")
TOWERS = {"vision tower": "vision_model.encoder.layers", "language tower": "qllama.model.layers"}

# -------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Setup:
    """A machine: the bytes of its cards, and the strategy that spreads the model over them."""

    name: str
    cards: tuple[int, ...]
    strategy: str = "auto"

    @classmethod
    def parse(cls, name: str) -> "Setup":
        """From "2x24", "24+8+8" or "24+8+8:sequential"; sizes are in GB."""
        sizes, _, strategy = name.partition(":")
        number, times, size = sizes.partition("x")
        cards = [float(size)] * int(number) if times else [float(size) for size in sizes.split("+")]
        return cls(name, tuple(int(card * GB) for card in cards), strategy or "auto")

    @property
    def call(self) -> str:
        """The arguments that a user types for it."""
        given = [f"{card}: {size / GB:g}e9" for card, size in self.max_memory.items() if isinstance(card, int)]
        return f'device_map="{self.strategy}", max_memory={{{", ".join(given)}, "cpu": {HOST_MEMORY / GB:g}e9}}'

    @property
    def max_memory(self) -> dict[int | str, int]:
        """Bytes that the planner may fill with weights. Balanced plans leave room by themselves. transformers takes
        nine tenths of a single card; sequential plans fill each card before the next one, so they must leave more.
        """
        percent = 80 if self.strategy == "sequential" else 90 if len(self.cards) == 1 else 100
        return {**{i: card * percent // 100 for i, card in enumerate(self.cards)}, "cpu": HOST_MEMORY}


def empty_model(folder: Path) -> torch.nn.Module:
    """The model of `folder`'s config in bfloat16, without memory; the code is always the root's."""
    subfolder = "" if folder.samefile(ROOT) else os.path.relpath(folder, ROOT)
    config = AutoConfig.from_pretrained(ROOT, subfolder=subfolder, trust_remote_code=True)
    with torch.device("meta"):
        return AutoModel.from_config(config, trust_remote_code=True, dtype=torch.bfloat16).eval()


def plan(model: torch.nn.Module, setup: Setup) -> dict[str, int | str]:
    """The device of every module, from the function that `from_pretrained(device_map="auto")` calls."""
    if hasattr(model, "_get_no_split_modules"):  # transformers 4.57
        from transformers.modeling_utils import _get_device_map

        return _get_device_map(model, setup.strategy, setup.max_memory, None, torch.bfloat16, None)
    from transformers.integrations.accelerate import _get_device_map

    return _get_device_map(model, setup.strategy, setup.max_memory, None)


def in_order(model: torch.nn.Module, device_map: dict[str, int | str]) -> dict[str, int | str]:
    """The entries of a plan in the model's own order."""
    names = [name for name, _ in model.named_parameters()]
    return dict(sorted(device_map.items(), key=lambda entry: min(map(names.index, parameters_of(model, entry[0])))))


def parameters_of(model: torch.nn.Module, part: str) -> list[str]:
    return [name for name, _ in model.named_parameters() if f"{name}.".startswith(f"{part}.")]


def device_of(device_map: dict[str, int | str], name: str) -> int | str:
    """The device of a module or tensor in a plan: that of its longest prefix."""
    while name not in device_map:
        name = name.rpartition(".")[0]
    return device_map[name]


def blocks_of(model: torch.nn.Module) -> list[str]:
    """The modules that must stay on one device."""
    return [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]


def split_blocks(model: torch.nn.Module, device_map: dict[str, int | str]) -> list[str]:
    """The blocks that a plan wrongly spreads over devices."""
    return [
        block
        for block in blocks_of(model)
        if len({device_of(device_map, name) for name in parameters_of(model, block)}) > 1
    ]


def scattered_towers(model: torch.nn.Module, device_map: dict[str, int | str]) -> list[str]:
    """The towers whose data would return to a device that they had left."""
    rank = {"cpu": sys.maxsize - 1, "disk": sys.maxsize}
    scattered = []
    for tower, prefix in TOWERS.items():
        layers = range(len(model.get_submodule(prefix)))
        places = [device_of(device_map, f"{prefix}.{index}") for index in layers]
        if places != sorted(places, key=lambda place: rank.get(place, place)):
            scattered.append(tower)
    return scattered


# ----------------------------------------------------------------------------------------- the simulated machine


def fake_getitem(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """`tensor[index]` by operations that fake tensors support: the indices that the model and `generate` use."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(part is Ellipsis for part in parts):
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        taken = sum(part is not None for part in parts) - 1
        parts = (*parts[:place], *[slice(None)] * (tensor.ndim - taken), *parts[place + 1 :])
    dim, tensors = 0, {}
    for part in parts:
        if part is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(part, slice):
            # Beam search cuts its sequences at the longest one, a value; here all have the maximum length.
            stop = None if isinstance(part.stop, torch.Tensor) else part.stop
            if (part.start, stop, part.step) != (None, None, None):
                tensor = torch.ops.aten.slice.Tensor(tensor, dim, part.start, stop, part.step or 1)
            dim += 1
        elif isinstance(part, int):
            tensor = tensor.select(dim, part)
        else:
            tensors[dim], dim = torch.as_tensor(part), dim + 1
    if not tensors:
        return tensor.view_as(tensor) if parts else tensor
    return torch.ops.aten.index.Tensor(tensor, [tensors.get(dim) for dim in range(max(tensors) + 1)])


def fake_setitem(tensor: torch.Tensor, index: Any, value: Any) -> None:
    if isinstance(index, torch.Tensor):
        torch.ops.aten.index_put_(tensor, [index], torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device))
    elif isinstance(value, torch.Tensor):
        torch.ops.aten.copy_.default(fake_getitem(tensor, index), value)
    else:
        fake_getitem(tensor, index).fill_(value)


def fake_contiguous(tensor: torch.Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    return tensor if tensor.is_contiguous(memory_format=memory_format) else tensor.clone(memory_format=memory_format)


def fake_full(size: Any, fill_value: Any, **options: Any) -> torch.Tensor:
    """Beam search fills its sequences with a token id from a tensor; fake tensors have no values."""
    return torch.full(size, 0 if isinstance(fill_value, torch.Tensor) else fill_value, **options)


class CudaInPython(TorchFunctionMode):
    """Replaces the few calls that need the CUDA driver before they reach torch's dispatcher and the fake tensors."""

    REPLACED = {
        # The binding of indexing switches to the tensor's card before it slices.
        torch.Tensor.__getitem__: fake_getitem,
        torch.Tensor.__setitem__: fake_setitem,
        # So do the bindings of these three.
        torch.Tensor.contiguous: fake_contiguous,
        torch.Tensor.__invert__: torch.bitwise_not,
        torch.Tensor.copy_: torch.ops.aten.copy_.default,
        # Fake tensors have no values. `generate` asks whether special tokens collide or are negative (they do not),
        # and whether all sequences are finished (see `counted_steps`).
        torch.Tensor.__bool__: lambda tensor: False,
        torch.full: fake_full,
        # accelerate finds tied weights by it; there are none here.
        torch.Tensor.data_ptr: lambda tensor: id(tensor.untyped_storage()),
    }

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.REPLACED.get(func, func)(*args, **(kwargs or {}))


class DeviceMeter(TorchDispatchMode):
    """Counts the bytes of living storages and their peak, per device; raises the errors that fake tensors miss."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls
            return args[0].fake_device
        self._check_devices(func, args)
        result = func(*args, **(kwargs or {}))
        if getattr(func, "is_view", False):
            return result
        for tensor in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result

    @staticmethod
    def _check_devices(func: Callable, args: tuple) -> None:
        """Fake tensors copy meta tensors, and do not compare the devices of an index or a convolution."""
        inputs = [leaf for part in args for leaf in (part if isinstance(part, (list, tuple)) else (part,))]
        devices = [tensor.fake_device for tensor in inputs if isinstance(tensor, FakeTensor)]
        if any(device.type == "meta" for device in devices) and not getattr(func, "is_view", False):
            raise NotImplementedError(f"Cannot copy out of meta tensor; no data! ({func})")
        packet = getattr(func, "overloadpacket", None)
        if packet is torch.ops.aten.index:
            devices = [device for device in devices if device.type != "cpu" or device == devices[0]]
        elif packet is not torch.ops.aten.convolution:
            return
        if len(set(devices)) > 1:
            raise RuntimeError(f"{func} got tensors on different devices, {', '.join(sorted(map(str, set(devices))))}")

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        device, size = str(tensor.device), storage.nbytes() if tensor.device.type != "meta" else 0
        self._known[storage] = size
        self.alive[device] += size
        self.peak[device] = max(self.peak[device], self.alive[device])
        weakref.finalize(storage, self.alive.subtract, {device: size})

    def restart(self) -> None:
        self.peak = Counter(self.alive)


def set_fake_parameter(
    module: torch.nn.Module, name: str, device: str, value: torch.Tensor | None = None, **unused: Any
) -> None:
    """accelerate's own function calls the class of a parameter, which fake tensors do not allow."""
    path, _, name = name.rpartition(".")
    owner = module.get_submodule(path)
    moved = (getattr(owner, name) if value is None else value).to(device)
    setattr(owner, name, torch.nn.Parameter(moved, requires_grad=False))


@contextmanager
def simulated_machine() -> Iterator[DeviceMeter]:
    """Inside, tensors can be on any card, although there is none."""
    fake, meter = FakeTensorMode(allow_non_fake_inputs=False), DeviceMeter()
    setter = patch("accelerate.hooks.set_module_tensor_to_device", set_fake_parameter)
    with fake, meter, CudaInPython(), torch.no_grad(), setter:
        yield meter


def place(model: torch.nn.Module, device_map: dict[str, int | str]) -> None:
    """Give a model on the meta device fake weights, and accelerate's hooks as `from_pretrained` attaches them."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, torch.nn.Parameter(fake, requires_grad=False))
    # torch takes integers only where there are cards. The main device gets the model's own tensors; accelerate would
    # take the first of a set, which has no order.
    devices = {name: f"cuda:{card}" if isinstance(card, int) else card for name, card in device_map.items()}
    first = min(card for card in device_map.values() if isinstance(card, int))
    dispatch_model(model, devices, main_device=f"cuda:{first}", skip_keys=model._skip_keys_device_placement)


@contextmanager
def counted_steps(model: torch.nn.Module, steps: int) -> Iterator[None]:
    """Let `generate` end after `steps` tokens: whether all sequences are finished depends on values."""
    left = iter(range(steps))
    model._has_unfinished_sequences = lambda *unused, **also_unused: next(left, None) is not None
    yield
    del model._has_unfinished_sequences


# ------------------------------------------------------------------------------------------- every public method


@dataclass(frozen=True)
class Batch:
    """Sizes of the inputs. Only the last steps of a caption run, after a prompt that fills the cache."""

    images: int = 1
    texts: int = 8
    length: int = 80
    beams: int = 5
    caption: int = 37
    steps: int = 2

    def __str__(self) -> str:
        return (
            f"{self.images} image(s), {self.texts} texts of {self.length} tokens, captions of {self.caption} tokens"
            f" (prompt and text) with {self.beams} beams"
        )


BATCH = Batch()


@dataclass
class Call:
    name: str
    run: Callable[[], Any]
    shapes: list[tuple[int, ...]]


def public_calls(model: torch.nn.Module, batch: Batch, device: str) -> list[Call]:
    """Every public method with inputs on `device`, and the shapes that it must return."""
    config, images, texts = model.config, batch.images, batch.texts
    vision, width, dim = config.vision_config, config.qllama_config.hidden_size, config.clip_embed_dim
    # Valid values, because benchmarks/gpu.py runs these calls on a real device.
    pixels = torch.zeros(images, 3, vision.image_size, vision.image_size, device=device)
    ids = torch.ones(texts, batch.length, dtype=torch.long, device=device)
    mask = torch.ones_like(ids)
    pairs, pair_mask = ids.narrow(0, 0, images), mask.narrow(0, 0, images)
    start = batch.caption - batch.steps
    prompt = {"input_ids": pairs.narrow(1, 0, start), "attention_mask": pair_mask.narrow(1, 0, start)}
    written = [(images, batch.steps)]
    tokens = 1 + (vision.image_size // vision.patch_size) ** 2
    logits, embeds = [(images, texts), (texts, images)], [(images, dim), (texts, dim)]
    features = [(images, tokens, vision.hidden_size), (images, config.num_query_token, width)]

    def generate(seen: Any = pixels, **options: Any) -> torch.Tensor:
        with counted_steps(model.qllama, batch.steps):
            return model.generate(seen, max_new_tokens=batch.steps, **options)

    calls = []
    for mode in ("InternVL-C", "InternVL-G"):
        calls += [
            Call(f"forward, {mode}", partial(model, ids, pixels, mask, mode=mode), logits + embeds),
            Call(f"encode_image, {mode}", partial(model.encode_image, pixels, mode), embeds[:1]),
        ]
    return [
        *calls,
        Call("forward(image, text)", lambda: model(image=pixels, text=ids), logits),
        Call("embed_image", lambda: model.embed_image(pixels, "InternVL-G"), embeds[:1]),
        Call("encode_text", lambda: model.encode_text(ids), embeds[1:]),
        Call("embed_text", lambda: model.embed_text(ids, mask), embeds[1:]),
        # Lists carry no device: their embeddings are on the main one.
        Call("embed_texts", lambda: model.embed_texts([[1] * batch.length] * texts).to(device), embeds[1:]),
        Call("embed_image, seen", lambda: model.embed_image(model.look_at(pixels), "InternVL-G"), embeds[:1]),
        Call("match", lambda: model.match(pixels, pairs, pair_mask), [(images, 2)]),
        Call("match, all pairs", lambda: model.match(pixels, ids, mask, all_pairs=True), [(images, texts, 2)]),
        Call("get_image_features", lambda: model.get_image_features(pixels), features),
        Call("get_text_features", lambda: model.get_text_features(ids, mask), [(texts, batch.length, width)]),
        Call("generate, greedy", generate, written),
        Call("generate, greedy, prompt", lambda: generate(**prompt), written),
        Call("generate, beams", lambda: generate(num_beams=batch.beams, **prompt), written),
        Call("generate, seen", lambda: generate(model.look_at(pixels), num_beams=batch.beams, **prompt), written),
    ]


def complaint(result: Any, shapes: list[tuple[int, ...]], device: str) -> str | None:
    """The wrong shapes or devices of a result, or None."""
    found = list(result.values()) if isinstance(result, dict) else tree_leaves(result)
    if [tuple(tensor.shape) for tensor in found] != shapes:
        return f"shapes {[tuple(tensor.shape) for tensor in found]}, expected {shapes}"
    places = {str(tensor.device) for tensor in found}
    return None if places == {device} else f"result on {sorted(places)}, inputs on {device}"


# ------------------------------------------------------------------------------------------------------- a report


@dataclass
class Report:
    """The result of one setup."""

    setup: Setup
    device_map: dict[str, int | str]
    weights: Counter[int | str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)
    peak_call: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def update(self, call: str, peak: Counter[str]) -> None:
        for device, size in peak.items():
            if size > self.peak[device]:
                self.peak[device], self.peak_call[device] = size, call

    def check_budgets(self) -> None:
        for index, card in enumerate(self.setup.cards):
            needed = self.peak[f"cuda:{index}"]
            if needed > card:
                self.failures.append(f"cuda:{index} needs {needed / GB:.2f} GB of {card / GB:g} in {self.peak_call}")

    def table(self) -> str:
        """Markdown; weights on no card are in the memory of the host and are fetched block by block."""
        rows = []
        for place in (*range(len(self.setup.cards)), *(place for place in ("cpu", "disk") if self.weights[place])):
            device = f"cuda:{place}" if isinstance(place, int) else "cpu"
            budget = f" of {self.setup.cards[place] / GB:g}" if isinstance(place, int) else ""
            parts = abbreviated([name for name, where in self.device_map.items() if where == place])
            peak = f"{self.peak[device] / GB:.2f}{budget}"
            call = self.peak_call.get(device, "")
            rows.append((place, ", ".join(parts), f"{self.weights[place] / GB:.2f}", peak, call))
        title = f"**{self.setup.name}** (GB), `{self.setup.call}`\n"
        found = pages.table(["device", "parts", "weights, GB", "peak, GB", "in"], rows)
        return "\n".join([title, found, *(f"\nFAILED: {failure}" for failure in self.failures)])


def abbreviated(names: list[str]) -> list[str]:
    """Names of modules as code; consecutive numbers become a range."""
    runs: list[list[str]] = []
    for name in names:
        prefix, _, number = name.rpartition(".")
        if number.isdigit() and runs and runs[-1][0] == prefix and int(runs[-1][-1]) + 1 == int(number):
            runs[-1].append(number)
        else:
            runs.append([prefix, number])
    spans = [(prefix, first if not rest else f"{first}-{rest[-1]}") for prefix, first, *rest in runs]
    return [f"`{prefix}.{span}`" if prefix else f"`{span}`" for prefix, span in spans]


def simulate(
    folder: Path,
    setup: Setup,
    batch: Batch = BATCH,
    inputs: str = "cuda:0",
    device_map: dict[str, int | str] | None = None,
) -> Report:
    """Plan a setup, or take the given plan; run every public method and check everything."""
    model = empty_model(folder)
    report = Report(setup, in_order(model, plan(model, setup) if device_map is None else device_map))
    for name, parameter in model.named_parameters():
        report.weights[device_of(report.device_map, name)] += parameter.nbytes
    report.failures += [f"block {block} is split" for block in split_blocks(model, report.device_map)]
    report.failures += [f"the {tower} is scattered" for tower in scattered_towers(model, report.device_map)]
    with simulated_machine() as meter:
        place(model, report.device_map)
        for call in public_calls(model, batch, inputs):
            meter.restart()
            wrong = failure(call, inputs)
            report.failures += [f"{call.name}: {wrong}"] if wrong else []
            report.update(call.name, meter.peak)
    report.check_budgets()
    return report


def failure(call: Call, inputs: str) -> str | None:
    """Run a method; returns its error or wrong result, or None. Mixed devices raise several types of errors."""
    try:
        return complaint(call.run(), call.shapes, inputs)
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]


def quieten() -> None:
    """Silence accelerate's warnings about missing cards."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("setups", nargs="*", default=SETUPS, help="cards in GB: 2x24, 24+8+8, 24+8+8:sequential, 12")
    parser.add_argument("--config", type=Path, default=ROOT, help="folder of the config.json")
    parser.add_argument("--inputs", default="cuda:0", help="device of pixels and ids, and so of the results")
    arguments = parser.parse_args()
    quieten()
    failed = False
    for name in arguments.setups:
        with step(f"simulating {name}"):
            report = simulate(arguments.config, Setup.parse(name), inputs=arguments.inputs)
        print(report.table(), end="\n\n", flush=True)
        failed = failed or bool(report.failures)
    packages = pages.versions("torch", "transformers", "accelerate")
    print(f"By `python -m tools.machines.simulate_devices`: bfloat16, {BATCH}; {packages}.")
    sys.exit(failed)


if __name__ == "__main__":
    main()
