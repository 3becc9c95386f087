"""The steps of benchmarks/gpu.py that measure speed and memory, each beside what the machine could reach."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from torch import nn
from transformers import AutoModel, AutoProcessor, StaticCache

from benchmarks import measuring
from benchmarks.gpu_machine import (
    COSINE,
    PEAK,
    Float8Linear,
    Machine,
    Missing,
    check_float8,
    float8_product,
    in_float8,
    require,
    to_float8,
)
from tools.machines import simulate_devices

GIB = 1 << 30
MODES = ("InternVL-C", "InternVL-G")
TEXT_LENGTH = 12
LEAST_COSINE = 0.99  # of compiled or replayed results to plain ones, in bfloat16
PEAK_TOKENS = 8  # length of the captions whose memory is compared with the simulated card's


def batches(machine: Machine, *sizes: int) -> tuple[int, ...]:
    return (1, 2) if machine.tiny else sizes


def row(
    machine: Machine, work: str, batch: int, way: str, measure: Callable[..., dict[str, Any]], *arguments: Any
) -> dict[str, Any]:
    """One row of results: the work, the batch size, the way, and its figures."""
    return {"work": work, "batch": batch, "way": way, **machine.attempt(measure, *arguments)}


def as_graph(call: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """Record a call as one CUDA graph. Returns its replay, which runs no Python, and its output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph.replay, output


class Reference:
    """The output of the plain model, and the time of its matrix products alone: without attention, and on CUDA as one
    graph, so that launches cost nothing.
    """

    def __init__(self, machine: Machine, model: nn.Module, call: Callable[[], torch.Tensor]):
        self.seconds, self.operations, self.output = 0.0, 0, None
        if machine.simulated:
            return
        with measuring.Products(model, share_inputs=True, attention=False) as products:
            self.output = call()
        run = as_graph(products.run)[0] if machine.is_cuda else products.run
        self.operations, self.seconds = products.operations, machine.seconds(run)


def rate(
    machine: Machine, call: Callable[[], Any], count: int, reference: Reference, graph: bool = False
) -> dict[str, Any]:
    """Figures of a call that processes `count` items: items a second, the time as a multiple of the products', memory,
    and for a tensor the cosine to the reference.
    """
    if machine.simulated:
        if graph:
            raise Missing("a simulated card has no CUDA graphs")
        return {PEAK: machine.peak(call)}
    if graph:
        if not machine.is_cuda:
            raise Missing("CUDA graphs need CUDA")
        call()  # compile before recording
        found: list[Any] = []
        peak = machine.peak(lambda: found.extend(as_graph(call)))
        replay, output = found
        seconds = machine.seconds(replay)
    else:
        seconds, peak = machine.seconds(call), machine.peak(call)
        output = call()
    figures = {
        "a second": count / seconds,
        "time / products": seconds / reference.seconds,
        "TFLOP/s": reference.operations / seconds / 1e12,
        PEAK: peak,
    }
    if isinstance(output, torch.Tensor) and reference.output is not None:
        figures[COSINE] = least_cosine(output, reference.output)
    return figures


def checked(figures: dict[str, Any]) -> dict[str, Any]:
    """Raises `AssertionError` if the output differs from that of the plain model."""
    cosine = figures.get(COSINE, 1.0)
    assert cosine >= LEAST_COSINE, f"cosine {cosine} to the plain model"
    return figures


def least_cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.cosine_similarity(one.float(), other.float(), dim=-1).min().item()


def compiled(machine: Machine, model: Any) -> Any:
    """Compile the model's layers in place, once for all batch sizes but 1."""
    if machine.simulated:
        raise Missing("a simulated card compiles nothing")
    torch.compiler.reset()
    model.compile_layers(dynamic=True)
    return model


class Lazy:
    """Makes something at its first use; if that fails, every use raises the same error."""

    def __init__(self, make: Callable[..., Any], *arguments: Any):
        self.make, self.arguments = make, arguments
        self.made: Any = None
        self.error: Exception | None = None

    def __call__(self) -> Any:
        if self.error is not None:
            raise self.error
        if self.made is None:
            try:
                self.made = self.make(*self.arguments)
            except Exception as error:
                self.error = error
                raise
        return self.made


@dataclass
class Work:
    """One kind of call: `call(model, inputs)` on the inputs of each batch size, beside the plain model."""

    machine: Machine
    name: str
    inputs: Callable[[int], torch.Tensor]
    call: Callable[[Any, torch.Tensor], Any]
    references: dict[int, Lazy] = field(default_factory=dict)

    def reference(self, batch: int) -> tuple[torch.Tensor, Reference]:
        """The inputs of a batch size and their reference, made once."""

        def make() -> tuple[torch.Tensor, Reference]:
            model, inputs = self.machine.model(), self.inputs(batch)
            return inputs, Reference(self.machine, model, partial(self.call, model, inputs))

        return self.references.setdefault(batch, Lazy(make))()

    def row(
        self, way: str, model: Callable[[], Any], batch: int, graph: bool = False, check: bool = True, call: Any = None
    ) -> dict[str, Any]:
        """The row of a way to do it: another model, another `call`, or one CUDA graph."""

        def figures() -> dict[str, Any]:
            inputs, reference = self.reference(batch)
            found = rate(self.machine, partial(call or self.call, model(), inputs), batch, reference, graph)
            return checked(found) if check else found

        return row(self.machine, self.name, batch, way, figures)


# -------------------------------------------------------------------------------------------------------- ceilings


def ceilings(machine: Machine) -> dict[str, Any]:
    """What the machine can reach: matrix products by shape and precision, and bytes a second."""
    device, size = machine.device, 256 if machine.tiny else 8192
    config = machine.config().vision_config
    width, inner = config.hidden_size, config.intermediate_size
    tokens = (1 + config.position_grid**2) * (1 if machine.tiny else 64)
    shapes = {"square": (size, size, size), "qkv": (tokens, width, 3 * width), "proj": (tokens, width, width)}
    shapes |= {"fc1": (tokens, width, inner), "fc2": (tokens, inner, width)}

    def products(rows: int, inner: int, columns: int, is_float8: bool) -> dict[str, Any]:
        states = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
        matrix = torch.randn(columns, inner, device=device, dtype=torch.bfloat16)
        call = partial(F.linear, states, matrix)
        if is_float8:
            check_float8(device)
            call = partial(float8_product, in_float8(states), in_float8(matrix), None)
        return {"TFLOP/s": 2 * rows * inner * columns / machine.seconds(call) / 1e12}

    count = 1 << 20 if machine.tiny else 4 * GIB

    def copies(pinned: bool | None) -> dict[str, Any]:
        target = torch.empty(count, dtype=torch.uint8, device=device)
        if pinned is None:
            source, moved = torch.ones_like(target), 2 * count  # read and written
        elif not machine.is_cuda:
            raise Missing("only a card has memory of its own")
        else:
            source, moved = torch.ones(count, dtype=torch.uint8, pin_memory=pinned), count
        return {"GB/s": moved / machine.seconds(lambda: target.copy_(source)) / 1e9}

    def reading() -> dict[str, Any]:
        source = torch.ones(count // 4, device=device)
        return {"GB/s": source.nbytes / machine.seconds(source.sum) / 1e9}

    found = {
        f"products, {name}, {'float8' if is_float8 else 'bfloat16'}": machine.attempt(products, *shape, is_float8)
        for name, shape in shapes.items()
        for is_float8 in (False, True)
    }
    found["memory of the device, a copy"] = machine.attempt(copies, None)
    found["memory of the device, a sum"] = machine.attempt(reading)
    found["from the host, pinned"] = machine.attempt(copies, True)
    found["from the host, pageable"] = machine.attempt(copies, False)
    return found


# ---------------------------------------------------------------------------------------------------------- images


def image_work(machine: Machine, mode: str) -> Work:
    return Work(machine, mode, machine.pixels, lambda model, pixels: model.embed_image(pixels, mode=mode))


def compiled_twin(machine: Machine) -> Any:
    return compiled(machine, machine.twin())


def images(machine: Machine) -> dict[str, Any]:
    """Images a second in both modes, batch by batch: plain, compiled, as a CUDA graph; transformers' own tower."""
    sizes = batches(machine, 1, 4, 16, 64, 128, 256)
    works = [image_work(machine, mode) for mode in MODES]
    rows = []
    for way, model in {"eager": Lazy(machine.model), "compile_layers": Lazy(compiled_twin, machine)}.items():
        for work in works:
            rows += [work.row(way, model, batch) for batch in sizes]
            rows.append(work.row(f"{way}, one CUDA graph", model, 1, graph=True))
    # transformers' tower has no head, so it does slightly less work.
    peer = Lazy(machine.peer, measuring.vision_peer_of)
    rows += [works[0].row("transformers", peer, batch, call=lambda tower, pixels: tower(pixels)) for batch in sizes]
    return {"rows": rows}


def float8(machine: Machine) -> dict[str, Any]:
    """InternVL-C with layers in float8, one scale per row; cosines to bfloat16 with random weights and of tiny/."""
    sizes, work = batches(machine, 16, 64, 128), image_work(machine, MODES[0])
    for batch in sizes:  # before the weights change; the rows repeat an error
        machine.attempt(lambda batch=batch: {"made": work.reference(batch)})
    quantised = Lazy(to_float8, machine.take_model(), ("vision_model.encoder.layers.",))
    ways = {"float8": quantised, "float8, compile_layers": Lazy(lambda: compiled(machine, quantised()))}
    rows = [work.row(way, model, batch, check=False) for way, model in ways.items() for batch in sizes]
    return {"rows": rows, "tiny/": machine.attempt(float8_of_tiny, machine)}


def float8_of_tiny(machine: Machine) -> dict[str, Any]:
    """Cosine to bfloat16 of the trained tiny/ on the example images."""
    if machine.simulated:
        raise Missing("a simulated card has no values")
    part = {"subfolder": "tiny", "trust_remote_code": True}
    model = AutoModel.from_pretrained(measuring.ROOT, dtype=torch.bfloat16, **part).to(machine.device).eval()
    processor = AutoProcessor.from_pretrained(measuring.ROOT, **part)
    files = sorted((measuring.ROOT / "examples" / "pictures").glob("*.png"))
    pixels = processor(images=files).pixel_values.to(machine.device)
    expected = model.embed_image(pixels)
    found = to_float8(model).embed_image(pixels)
    return {"images": len(files), COSINE: least_cosine(found, expected)}


# ----------------------------------------------------------------------------------------------------------- texts


def texts(machine: Machine) -> dict[str, Any]:
    """Texts of 12 tokens a second, batch by batch, beside transformers' LlamaModel with the same weights."""
    work = Work(
        machine,
        "texts",
        lambda batch: machine.ids(batch, TEXT_LENGTH),
        lambda model, ids: model.embed_text(ids, torch.ones_like(ids)),
    )
    ways: dict[str, tuple[Callable[[], Any], Any]] = {
        "eager": (Lazy(machine.model), None),
        "compile_layers": (Lazy(compiled_twin, machine), None),
        "transformers": (
            Lazy(machine.peer, lambda model: measuring.text_peer_of(model).model),
            lambda peer, ids: peer(input_ids=ids, use_cache=False),
        ),
    }
    sizes = batches(machine, 1, 64, 512)
    return {"rows": [work.row(way, model, batch, call=call) for way, (model, call) in ways.items() for batch in sizes]}


# -------------------------------------------------------------------------------------------------------- captions


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes that a tensor stores; `nbytes` of a quantised one is the size before quantisation."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(bytes_of(getattr(tensor, name)) for name in names)


def bytes_a_token(model: Any) -> int:
    """Bytes of the weights that each caption step reads: no cross-attention, no embedding table."""
    kept = [
        tensor
        for name, tensor in (*model.qllama.model.named_parameters(), *model.qllama.model.named_buffers())
        if "cross_attn" not in name and "embed_tokens" not in name
    ]
    for module in model.qllama.model.modules():
        if isinstance(module, Float8Linear):
            kept += [module.weight, module.scales]
    return sum(bytes_of(tensor) for tensor in (*kept, model.qllama.lm_head.weight))


def caption_lengths(machine: Machine) -> tuple[int, int, int]:
    """Two caption lengths, and the size of the static cache that serves both: sizes are multiples of 64, and both
    captions must run the same compiled steps.
    """
    config = machine.config()
    prefix = config.num_query_token + len(config.caption_prompt_ids or [0])
    positions = prefix + 28 + -(prefix + 28) % 64
    long = positions - prefix
    return long - long // 2, long, positions


def captions(machine: Machine) -> dict[str, Any]:
    """Tokens a second, from the difference between two lengths, which excludes the work before the first token."""
    static = {"cache_implementation": "static"}
    ways: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
        "greedy": ({}, (1, 32)),
        "greedy, static cache": (static | {"disable_compile": True}, (1, 32)),
        "greedy, compiled": (static, (1, 32)),
        "5 beams": ({"num_beams": 5}, (1, 32)),
    }

    def figures(model: Any, options: dict[str, Any], batch: int) -> dict[str, Any]:
        if machine.simulated and options.get("cache_implementation"):
            raise Missing("a static cache counts its positions in a tensor, and a simulated card has no values")
        torch.compiler.reset()
        pixels = machine.pixels(batch)
        found = tokens_a_second(machine, lambda count: machine.write(model(), pixels, count, **options), batch)
        if "cache_implementation" not in options:
            found[PEAK] = machine.peak(lambda: machine.write(model(), pixels, PEAK_TOKENS, **options))
        return found | {"GB of weights a token": bytes_a_token(model()) / 1e9}

    rows = [
        row(machine, "captions", batch, way, figures, machine.model, options, batch)
        for way, (options, sizes) in ways.items()
        for batch in (sizes[:1] if machine.tiny else sizes)
    ]
    rows.append(row(machine, "captions", 1, "transformers, compiled", captions_of_peer, machine))
    changes = {"float8": partial(to_float8, prefixes=("qllama.model.layers.",)), "int8 weights": int8_weights}
    for name, change in changes.items():
        model = Lazy(lambda change=change: change(machine.take_model()))  # one of them at a time
        rows.append(row(machine, "captions", 1, f"greedy, compiled, {name}", figures, model, static, 1))
    return {"rows": rows}


def captions_of_peer(machine: Machine) -> dict[str, Any]:
    """transformers' LLaMA after a prompt as long as our queries and prompt."""
    peer = machine.peer(measuring.text_peer_of)
    torch.compiler.reset()
    short, long, positions = caption_lengths(machine)
    prompt = machine.ids(1, positions - long)
    cache = StaticCache(config=peer.config, max_cache_len=positions)

    def write(count: int) -> None:
        cache.reset()
        named = {measuring.CACHE_NAME: cache, "attention_mask": torch.ones_like(prompt)}
        peer.generate(prompt, do_sample=False, **measuring.written(count, beams=1), **named)

    return tokens_a_second(machine, write, 1)


def tokens_a_second(machine: Machine, write: Callable[[int], Any], batch: int) -> dict[str, Any]:
    if machine.simulated:
        return {}
    short, long, _ = caption_lengths(machine)
    first, second = (machine.seconds(partial(write, count)) for count in (short, long))
    if second <= first:
        raise Missing(f"{long} tokens took no longer than {short}: the machine is too busy for a rate")
    return {
        "a second": batch * (long - short) / (second - first),
        f"seconds, {long} tokens": second,
        PEAK: machine.peak(partial(write, long)),
    }


def int8_weights(model: Any) -> Any:
    require("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def is_of_a_step(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name.startswith("qllama.model.layers.") and "cross_attn" not in name

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_of_a_step)
    return model


# --------------------------------------------------------------------------------------------------------- profile

# The first pattern found in a kernel's name gives its kind; the tests need the CPU's operators.
KINDS = {
    "attention": ("flash", "fmha", "attention", "flex"),
    "compiled": ("triton",),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "gemv", "cublas", "addmm", "aten::mm", "aten::bmm", "conv"),
    "norms": ("norm", "rms"),
    "copies": ("copy", "memcpy", "cat", "memset"),
    "activations": ("gelu", "silu", "softmax"),
}


def profile(machine: Machine) -> dict[str, Any]:
    """Time by kind of kernel, for a batch of images and for a caption."""
    batch = 2 if machine.tiny else 64
    pixels, one = machine.pixels(batch), machine.pixels(1)
    static = {"cache_implementation": "static", "disable_compile": True}

    def of_images(make: Callable[[], Any]) -> dict[str, Any]:
        return times_by_kind(machine, partial(make().embed_image, pixels))

    def of_caption() -> dict[str, Any]:
        return times_by_kind(machine, partial(machine.write, machine.model(), one, 4, **static))

    return {
        f"InternVL-C, batch {batch}, eager": machine.attempt(of_images, machine.model),
        f"InternVL-C, batch {batch}, compile_layers": machine.attempt(of_images, partial(compiled_twin, machine)),
        "a caption of 4 tokens, static cache": machine.attempt(of_caption),
    }


def times_by_kind(machine: Machine, call: Callable[[], Any], most: int = 12) -> dict[str, Any]:
    seconds = machine.seconds(call)
    activity = torch.profiler.ProfilerActivity.CUDA if machine.is_cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as found:
        call()
        machine.wait()
    times: Counter[str] = Counter()
    for event in found.key_averages():
        times[event.key] += event.self_device_time_total if machine.is_cuda else event.self_cpu_time_total
    kinds: Counter[str] = Counter()
    for name, time in times.items():
        kinds[kind_of(name)] += time
    total = sum(times.values()) or 1
    return {
        "ms": seconds * 1e3,
        "ms in kernels": total / 1e3,
        "shares": {kind: time / total for kind, time in kinds.most_common()},
        "largest": {name[:120]: time / total for name, time in times.most_common(most)},
    }


def kind_of(name: str) -> str:
    name = name.lower()
    return next((kind for kind, patterns in KINDS.items() if any(each in name for each in patterns)), "others")


# ---------------------------------------------------------------------------------------------- placed and loaded

# The weights that each mode uses.
PARTS = {
    "InternVL-C": ("vision_model.", "clip_projector."),
    "InternVL-G": ("vision_model.", "clip_projector.", "clip_projector2.", "query_tokens", "qllama.model.layers."),
}


def placed(machine: Machine) -> dict[str, Any]:
    """Cards of 12 and 8 GB with the rest in RAM: results equal to those of one card, peaks, and time beside copying."""
    sizes = (8,) if machine.tiny else (12, 8)
    return {f"a card of {size} GB": machine.attempt(on_a_small_card, machine, size) for size in sizes}


class InRam:
    """A model whose weights stay in RAM until the device needs them, and the outputs that it must reproduce."""

    def __init__(self, machine: Machine):
        self.machine, self.model = machine, machine.model()
        self.expected = dict(outputs_of(machine, self.model))
        self.alone = {(mode, batch): self.seconds(mode, batch) for mode in MODES for batch in batches(machine, 1, 16)}
        self.state = {name: each.cpu() for name, each in machine.take_model().state_dict().items()}
        self.model = machine.empty_model()
        machine.forget()
        self.model.load_state_dict(self.state, assign=True)

    def seconds(self, mode: str, batch: int) -> float:
        call = partial(self.model.embed_image, self.machine.pixels(batch), mode=mode)
        return self.machine.seconds(call, warm=1)

    def copying(self, names: Iterable[str]) -> dict[str, float]:
        """Seconds to copy those of the named weights that each mode uses."""
        used = {mode: [self.state[name] for name in names if name.startswith(parts)] for mode, parts in PARTS.items()}
        return {mode: copy_seconds(self.machine, tensors) for mode, tensors in used.items()}

    def check(self) -> list[str]:
        """Raises `AssertionError` if an output differs in any bit from that of the model on one device."""
        found = dict(outputs_of(self.machine, self.model))
        different = [name for name, value in found.items() if not torch.equal(value, self.expected[name])]
        assert not different, f"{', '.join(different)} differ from the model on one device"
        return list(found)

    def images(self, copying: dict[str, float]) -> list[dict[str, Any]]:
        """Times of images, and their ratio to the longer one of copying the weights and computing."""

        def times(mode: str, batch: int) -> dict[str, float]:
            seconds, alone, copied = self.seconds(mode, batch), self.alone[mode, batch], copying[mode]
            found = {"seconds": seconds, "seconds on one device": alone, "seconds to copy": copied}
            return found | {"seconds / the longer": seconds / max(alone, copied)}

        attempt = self.machine.attempt
        return [{"mode": mode, "batch": batch, **attempt(times, mode, batch)} for mode, batch in self.alone]


def on_a_small_card(machine: Machine, size: int) -> dict[str, Any]:
    """One plan. Without a GPU the CPU stands for the card, and the disk for RAM."""
    folder = measuring.ROOT / "tiny" if machine.tiny else measuring.ROOT
    setup = simulate_devices.Setup.parse(f"{size * (3e-4 if machine.tiny else 1)}")
    report = simulate_devices.simulate(folder, setup)
    torch.compiler.reset()  # memory of CUDA graphs would count against the budget
    with torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        placed = InRam(machine)
        waiting = [name for name in placed.state if simulate_devices.device_of(report.device_map, name) != 0]
        copying = placed.copying(waiting)
        with small_card(machine, setup.cards[0]) as places:
            devices = {name: places[0] if where == 0 else places[1] for name, where in report.device_map.items()}
            keys = placed.model._skip_keys_device_placement
            dispatch_model(placed.model, devices, main_device=places[0], offload_dir=scratch, skip_keys=keys)
            equal = placed.check()
            calls = simulate_devices.public_calls(placed.model, simulate_devices.BATCH, places[0])
            peaks = {call.name: machine.attempt(peak_of, machine, call) for call in calls}
            rows = placed.images(copying)
    failed = {name: found for name, found in peaks.items() if PEAK not in found}
    worst = max(peaks.keys() - failed, key=lambda name: peaks[name][PEAK] or 0)
    return {
        "equal to the model on one device": equal,
        "GB that wait in RAM": report.weights["cpu"] / 1e9,
        "simulated peak GB": report.peak["cuda:0"] / 1e9,
        **({PEAK: peaks[worst][PEAK], "peak in": worst} if machine.is_cuda else {}),
        "public calls that ran": len(peaks) - len(failed),
        **({"public calls that did not": failed} if failed else {}),
        "images": rows,
    }


def peak_of(machine: Machine, call: simulate_devices.Call) -> dict[str, Any]:
    device = "cuda:0" if machine.is_cuda else machine.device.type
    assert (problem := simulate_devices.complaint(call.run(), call.shapes, device)) is None, problem
    return {PEAK: machine.peak(call.run)}


def streamed(machine: Machine) -> dict[str, Any]:
    """All weights in RAM, with diffusers' group offloading: the next layer is copied while one computes."""
    require("diffusers")
    from diffusers.hooks import apply_group_offloading

    with torch.inference_mode(False), torch.no_grad():
        waiting = InRam(machine)
        model, copying = waiting.model, waiting.copying(waiting.state)
        for name, parameter in model.named_parameters(recurse=False):
            setattr(model, name, nn.Parameter(parameter.to(machine.device), requires_grad=False))
        options = {"onload_device": machine.device, "offload_type": "leaf_level", "use_stream": machine.is_cuda}
        for _, part in model.named_children():
            apply_group_offloading(part, **options)
        pixels = machine.pixels(1)
        found = {
            "equal to the model on one device": waiting.check(),
            PEAK: machine.peak(lambda: model.embed_image(pixels, mode=MODES[1])),
            "images": waiting.images(copying),
        }
    return {"diffusers, leaf_level": found}


@contextmanager
def small_card(machine: Machine, budget: int) -> Iterator[tuple[str, str]]:
    """The devices of a plan for its GPU and its RAM. A real GPU raises `OutOfMemoryError` beyond the budget."""
    if not machine.is_cuda:
        yield "cpu", "disk"
        return
    total = torch.cuda.get_device_properties(machine.device).total_memory
    torch.cuda.set_per_process_memory_fraction(budget / total)
    try:
        yield "cuda:0", "cpu"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def copy_seconds(machine: Machine, tensors: list[torch.Tensor]) -> float:
    """Seconds to copy weights from RAM to the device, one after the other into the same memory."""
    if not tensors:
        return 0.0
    target = torch.empty(max(tensor.nbytes for tensor in tensors), dtype=torch.uint8, device=machine.device)

    def copy() -> None:
        for tensor in tensors:
            target[: tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))

    return machine.seconds(copy, warm=1)


def outputs_of(machine: Machine, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator(machine.device).manual_seed(1)
    size = machine.config().image_size
    pixels = torch.randn(1, 3, size, size, device=machine.device, dtype=torch.bfloat16, generator=generator)
    ids = torch.tensor([[1, 10, 20, 30, 2]], device=machine.device)
    for mode in MODES:
        yield mode, model.embed_image(pixels, mode=mode)
    yield "text", model.embed_text(ids, ids > 0)
    yield "match", model.match(pixels, ids, ids > 0)
    yield "caption", model.generate(pixels, max_new_tokens=4, min_new_tokens=4, do_sample=False)


def load(machine: Machine) -> dict[str, Any]:
    """Seconds to load safetensors files, which the page cache holds, onto the device."""
    model = machine.take_model()
    size = sum(parameter.nbytes for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < 1.2 * size:
            raise Missing(f"the disk has no room for {size / 1e9:.1f} GB")
        model.save_pretrained(folder)
        del model
        machine.forget()
        kept, local = [], {"trust_remote_code": True, "local_files_only": True}

        def once() -> None:
            kept.clear()
            kept.append(AutoModel.from_pretrained(folder, dtype="auto", device_map=str(machine.device), **local))
            for parameter in kept[0].parameters():  # on a CPU, mapped weights are read at their first use
                parameter.sum()

        seconds = machine.seconds(once, warm=1)
        files = len(list(Path(folder).glob("*.safetensors")))
    found = {"GB": size / 1e9, "files": files, "seconds": seconds, "GB/s": size / seconds / 1e9}
    return {"whole model": found}


STEPS = {step.__name__: step for step in (ceilings, images, captions, float8, texts, profile, placed, streamed, load)}
