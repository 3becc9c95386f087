"""How fast is this machine? The steps of benchmarks/gpu.py that take times, each beside what the machine could do."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from torch import nn
from transformers import AutoModel, StaticCache

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
LEAST_COSINE = 0.99  # of what is compiled or replayed to what is not, in bfloat16
PEAK_TOKENS = 8  # of captions whose memory is compared with the simulated card's


def batches(machine: Machine, *sizes: int) -> tuple[int, ...]:
    return (1, 2) if machine.tiny else sizes


def row(
    machine: Machine, work: str, batch: int, way: str, measure: Callable[..., dict[str, Any]], *arguments: Any
) -> dict[str, Any]:
    """One figure, by what was done, how many at once and how."""
    return {"work": work, "batch": batch, "way": way, **machine.attempt(measure, *arguments)}


def as_graph(machine: Machine, call: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """A call as one CUDA graph: its replay, without Python, and its result."""
    if not machine.is_cuda:
        raise Missing("CUDA graphs need CUDA")
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
    """
    What the model gives as it is, and how long the matrix products of that take alone: attention left out, and on CUDA
    as one graph, so that no launch is waited for.
    """

    def __init__(self, machine: Machine, model: nn.Module, call: Callable[[], torch.Tensor]):
        self.seconds, self.operations, self.output = 0.0, 0, None
        if machine.simulated:
            return
        with measuring.Products(model, share_inputs=True, attention=False) as products:
            self.output = call()
        run = as_graph(machine, products.run)[0] if machine.is_cuda else products.run
        self.operations, self.seconds = products.operations, machine.seconds(run)


def rate(
    machine: Machine, call: Callable[[], Any], count: int, reference: Reference, graph: bool = False
) -> dict[str, Any]:
    """
    `count` things a call: things a second, the time as a multiple of the products', and memory. A tensor is compared
    with the reference's.
    """
    if machine.simulated:
        if graph:
            raise Missing("a simulated card has no CUDA graphs")
        return {PEAK: machine.peak(call)}
    found: list[Any] = []
    if graph:
        if not machine.is_cuda:
            raise Missing("CUDA graphs need CUDA")
        call()  # what compiles, compiles before it is recorded
        peak = machine.peak(lambda: found.extend(as_graph(machine, call)))
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
    """Raises `AssertionError` where the result is another one."""
    cosine = figures.get(COSINE, 1.0)
    assert cosine >= LEAST_COSINE, f"cosine {cosine} to the model as it is"
    return figures


def least_cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.cosine_similarity(one.float(), other.float(), dim=-1).min().item()


def compiled(machine: Machine, model: Any) -> Any:
    """Its layers compiled in place, once for all batches but that of one."""
    if machine.simulated:
        raise Missing("a simulated card compiles nothing")
    torch.compiler.reset()
    model.compile_layers(dynamic=True)
    return model


class Lazy:
    """What is made when it is first needed; a failure is raised anew at each use."""

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


def peer_of(machine: Machine, make: Callable[[], Any]) -> Any:
    if machine.simulated:
        raise Missing("peers are not simulated")
    return make()


# -------------------------------------------------------------------------------------------------------- ceilings


def ceilings(machine: Machine) -> dict[str, Any]:
    """What the machine reaches: matrix products by shape and precision, and bytes a second."""
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


def image_reference(machine: Machine, mode: str, batch: int) -> tuple[torch.Tensor, Reference]:
    model, pixels = machine.model(), machine.pixels(batch)
    return pixels, Reference(machine, model, partial(model.embed_image, pixels, mode=mode))


def images(machine: Machine) -> dict[str, Any]:
    """Images a second in both modes, batch by batch: as it is, compiled, as a CUDA graph; transformers' tower."""
    sizes = batches(machine, 1, 4, 16, 64, 128, 256)
    works = {(mode, batch): Lazy(image_reference, machine, mode, batch) for mode in MODES for batch in sizes}
    ways = {
        "eager": Lazy(machine.model),
        "compile_layers": Lazy(lambda: compiled(machine, machine.twin())),
        "transformers": Lazy(peer_of, machine, machine.vision_peer),
    }

    def figures(way: str, mode: str, batch: int, graph: bool) -> dict[str, Any]:
        pixels, reference = works[mode, batch]()
        model = ways[way]()
        # transformers' tower has no head: that makes its work a little less.
        call = partial(model, pixels) if way == "transformers" else partial(model.embed_image, pixels, mode=mode)
        return checked(rate(machine, call, batch, reference, graph))

    rows = []
    for way in ways:
        for mode in MODES[:1] if way == "transformers" else MODES:
            for batch in sizes:
                rows.append(row(machine, mode, batch, way, figures, way, mode, batch, False))
            if way != "transformers":
                rows.append(row(machine, mode, 1, f"{way}, one CUDA graph", figures, way, mode, 1, True))
    return {"rows": rows}


def float8(machine: Machine) -> dict[str, Any]:
    """InternVL-C with the layers' products in float8 by rows, and the cosine to bfloat16 on drawn weights and tiny/."""
    sizes = batches(machine, 16, 64, 128)
    works = {batch: Lazy(image_reference, machine, MODES[0], batch) for batch in sizes}
    rows: list[dict[str, Any]] = []

    def reference(batch: int) -> dict[str, Any]:
        works[batch]()
        return {}

    for batch in sizes:  # before the weights change
        machine.attempt(reference, batch)
    model = machine.take_model()
    quantised = Lazy(to_float8, model, ("vision_model.encoder.layers.",))
    ways = {"float8": quantised, "float8, compile_layers": Lazy(lambda: compiled(machine, quantised()))}

    def figures(way: str, batch: int) -> dict[str, Any]:
        pixels, wanted = works[batch]()
        return rate(machine, partial(ways[way]().embed_image, pixels), batch, wanted)

    for way in ways:
        rows += [row(machine, MODES[0], batch, way, figures, way, batch) for batch in sizes]
    return {"rows": rows, "tiny/": machine.attempt(float8_of_tiny, machine)}


def float8_of_tiny(machine: Machine) -> dict[str, Any]:
    """On the trained tiny/ and the example images."""
    if machine.simulated:
        raise Missing("a simulated card has no values")
    from transformers import AutoProcessor

    part = {"subfolder": "tiny", "trust_remote_code": True}
    model = AutoModel.from_pretrained(measuring.ROOT, dtype=torch.bfloat16, **part).to(machine.device).eval()
    processor = AutoProcessor.from_pretrained(measuring.ROOT, **part)
    pictures = sorted((measuring.ROOT / "examples" / "pictures").glob("*.png"))
    pixels = processor(images=pictures).pixel_values.to(machine.device)
    expected = model.embed_image(pixels)
    found = to_float8(model).embed_image(pixels)
    return {"images": len(pictures), COSINE: least_cosine(found, expected)}


# ----------------------------------------------------------------------------------------------------------- texts


def texts(machine: Machine) -> dict[str, Any]:
    """Texts of 12 tokens a second, batch by batch, beside transformers' LlamaModel with the same weights."""
    ways = {
        "eager": Lazy(machine.model),
        "compile_layers": Lazy(lambda: compiled(machine, machine.twin())),
        "transformers": Lazy(lambda: peer_of(machine, machine.text_peer).model),
    }

    def text_reference(batch: int) -> tuple[torch.Tensor, Reference]:
        model, ids = machine.model(), machine.ids(batch, TEXT_LENGTH)
        return ids, Reference(machine, model, partial(model.embed_text, ids, torch.ones_like(ids)))

    sizes = batches(machine, 1, 64, 512)
    works = {batch: Lazy(text_reference, batch) for batch in sizes}

    def figures(way: str, batch: int) -> dict[str, Any]:
        ids, reference = works[batch]()
        model = ways[way]()
        if way == "transformers":
            return rate(machine, partial(model, input_ids=ids, use_cache=False), batch, reference)
        return checked(rate(machine, partial(model.embed_text, ids, torch.ones_like(ids)), batch, reference))

    return {"rows": [row(machine, "texts", batch, way, figures, way, batch) for way in ways for batch in sizes]}


# -------------------------------------------------------------------------------------------------------- captions


def bytes_of(tensor: torch.Tensor) -> int:
    """Of what a tensor keeps: a quantised one says the size of what it stands for."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(bytes_of(getattr(tensor, name)) for name in names)


def bytes_a_token(model: Any) -> int:
    """Of the weights that a step of a caption reads in any precision: no cross-attention, one row of the table."""
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
    """
    Two numbers of tokens, and the positions that a static cache has for either: its size is a multiple of 64, and both
    have to be written with the same compiled steps.
    """
    config = machine.config()
    prefix = config.num_query_token + len(config.caption_prompt_ids or [0])
    positions = prefix + 28 + -(prefix + 28) % 64
    long = positions - prefix
    return long - long // 2, long, positions


def captions(machine: Machine) -> dict[str, Any]:
    """Tokens a second, from the difference of two lengths, so that what comes before the first token is left out."""
    static = {"cache_implementation": "static"}
    ways: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
        "greedy": ({}, (1, 32)),
        "greedy, static cache": (static | {"disable_compile": True}, (1, 32)),
        "greedy, compiled": (static, (1, 32)),
        "5 beams": ({"num_beams": 5}, (1, 32)),
    }

    def figures(model: Any, options: dict[str, Any], batch: int) -> dict[str, Any]:
        if machine.simulated and options.get("cache_implementation"):
            raise Missing("a static cache counts its positions by values, which a simulated card has not")
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
    """transformers' LLaMA after a prompt of as many tokens as ours has queries and prompt."""
    peer = peer_of(machine, machine.text_peer)
    torch.compiler.reset()
    short, long, positions = caption_lengths(machine)
    prompt = machine.ids(1, positions - long)
    cache = StaticCache(config=peer.config, max_cache_len=positions)

    def write(count: int) -> None:
        cache.reset()
        lengths = {"max_new_tokens": count, "min_new_tokens": count, "eos_token_id": 2, "pad_token_id": 0}
        named = {measuring.CACHE_NAME: cache, "attention_mask": torch.ones_like(prompt)}
        peer.generate(prompt, do_sample=False, **lengths, **named)

    return tokens_a_second(machine, write, 1)


def tokens_a_second(machine: Machine, write: Callable[[int], Any], batch: int) -> dict[str, Any]:
    if machine.simulated:
        return {}
    short, long, _ = caption_lengths(machine)
    first, second = (machine.seconds(partial(write, count)) for count in (short, long))
    return {
        "a second": batch * (long - short) / max(second - first, 1e-9),
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

# The first pattern in a kernel's name says what kind it is; the CPU's operators are there for the tests.
KINDS = {
    "attention": ("flash", "fmha", "attention", "flex"),
    "compiled": ("triton",),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "gemv", "cublas", "addmm", "aten::mm", "aten::bmm", "conv"),
    "norms": ("norm", "rms"),
    "copies": ("copy", "memcpy", "cat", "memset"),
    "activations": ("gelu", "silu", "softmax"),
}


def profile(machine: Machine) -> dict[str, Any]:
    """Where the time goes: kernels by kind, of a batch of images and of a step of captions."""
    batch = 2 if machine.tiny else 64
    pixels, one = machine.pixels(batch), machine.pixels(1)
    static = {"cache_implementation": "static", "disable_compile": True}

    def of_images(make: Callable[[], Any]) -> dict[str, Any]:
        model = make()
        return times_by_kind(machine, lambda: model.embed_image(pixels))

    return {
        f"InternVL-C, batch {batch}, eager": machine.attempt(of_images, machine.model),
        f"InternVL-C, batch {batch}, compile_layers": machine.attempt(
            lambda: of_images(lambda: compiled(machine, machine.twin()))
        ),
        "a caption of 4 tokens, static cache": machine.attempt(
            lambda: times_by_kind(machine, lambda: machine.write(machine.model(), one, 4, **static))
        ),
    }


def times_by_kind(machine: Machine, call: Callable[[], Any], most: int = 12) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    for _ in range(2):
        call()
    activities = [ProfilerActivity.CUDA] if machine.is_cuda else [ProfilerActivity.CPU]
    seconds = machine.seconds(call)
    with profiled(activities=activities) as found:
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

# What a mode computes with.
PARTS = {
    "InternVL-C": ("vision_model.", "clip_projector."),
    "InternVL-G": ("vision_model.", "clip_projector.", "clip_projector2.", "query_tokens", "qllama.model.layers."),
}


def placed(machine: Machine) -> dict[str, Any]:
    """Cards of 12 and 8 GB, the rest in RAM: results equal to those of one card; peaks, and time beside copying."""
    sizes = (8,) if machine.tiny else (12, 8)
    return {f"a card of {size} GB": machine.attempt(on_a_small_card, machine, size) for size in sizes}


class InRam:
    """A model whose weights are in RAM, to be brought to the device as they are needed, and what it has to equal."""

    def __init__(self, machine: Machine):
        self.expected = dict(outputs_of(machine, machine.model()))
        self.seconds = image_seconds(machine, machine.model())
        self.state = {name: each.cpu() for name, each in machine.take_model().state_dict().items()}
        machine.forget()
        self.model = machine.empty_model()
        self.model.load_state_dict(self.state, assign=True)

    def copying(self, machine: Machine, names: Iterable[str]) -> dict[str, float]:
        """Seconds to copy those of the weights that each mode computes with."""
        used = {mode: [self.state[name] for name in names if name.startswith(parts)] for mode, parts in PARTS.items()}
        return {mode: copy_seconds(machine, tensors) for mode, tensors in used.items()}

    def check(self, machine: Machine) -> list[str]:
        """Raises `AssertionError` where a result is not to the bit that of the model on one device."""
        found = dict(outputs_of(machine, self.model))
        different = [name for name, value in found.items() if not torch.equal(value, self.expected[name])]
        assert not different, f"{', '.join(different)} differ from the model on one device"
        return list(found)

    def images(self, machine: Machine, copying: dict[str, float]) -> list[dict[str, Any]]:
        return [
            {
                "mode": mode,
                "batch": batch,
                **machine.attempt(beside_copying, machine, self.model, mode, batch, alone, copying[mode]),
            }
            for (mode, batch), alone in self.seconds.items()
        ]


def on_a_small_card(machine: Machine, size: int) -> dict[str, Any]:
    """On a CPU the plan's card is the CPU, and its RAM the disk."""
    folder = measuring.ROOT / "tiny" if machine.tiny else measuring.ROOT
    setup = simulate_devices.Setup.parse(f"{size * (3e-4 if machine.tiny else 1)}")
    report = simulate_devices.simulate(folder, setup)
    torch.compiler.reset()  # what CUDA graphs hold would count against the budget
    with torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        placed = InRam(machine)
        waiting = [name for name in placed.state if simulate_devices.device_of(report.device_map, name) != 0]
        copying = placed.copying(machine, waiting)
        with small_card(machine, setup.cards[0]) as places:
            devices = {name: places[0] if where == 0 else places[1] for name, where in report.device_map.items()}
            keys = placed.model._skip_keys_device_placement
            dispatch_model(placed.model, devices, main_device=places[0], offload_dir=scratch, skip_keys=keys)
            equal = placed.check(machine)
            calls = simulate_devices.public_calls(placed.model, simulate_devices.BATCH, places[0])
            peaks = {call.name: machine.attempt(peak_of, machine, call) for call in calls}
            rows = placed.images(machine, copying)
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


def beside_copying(
    machine: Machine, model: Any, mode: str, batch: int, alone: float, copying: float
) -> dict[str, float]:
    """How long images take, as a multiple of what takes longer: copying the weights in RAM, or computing."""
    seconds = machine.seconds(partial(model.embed_image, machine.pixels(batch), mode=mode), warm=1)
    times = {"seconds": seconds, "seconds on one device": alone, "seconds to copy": copying}
    return times | {"seconds / the longer": seconds / max(alone, copying)}


def streamed(machine: Machine) -> dict[str, Any]:
    """All weights in RAM, brought by diffusers' group offloading: the next layer travels while one computes."""
    return {"diffusers, leaf_level": machine.attempt(by_group_offloading, machine)}


def by_group_offloading(machine: Machine) -> dict[str, Any]:
    require("diffusers")
    from diffusers.hooks import apply_group_offloading

    with torch.inference_mode(False), torch.no_grad():
        waiting = InRam(machine)
        model, copying = waiting.model, waiting.copying(machine, waiting.state)
        for name, parameter in model.named_parameters(recurse=False):
            setattr(model, name, nn.Parameter(parameter.to(machine.device), requires_grad=False))
        options = {"onload_device": machine.device, "offload_type": "leaf_level", "use_stream": machine.is_cuda}
        for _, part in model.named_children():
            apply_group_offloading(part, **options)
        pixels = machine.pixels(1)
        return {
            "equal to the model on one device": waiting.check(machine),
            PEAK: machine.peak(lambda: model.embed_image(pixels, mode=MODES[1])),
            "images": waiting.images(machine, copying),
        }


@contextmanager
def small_card(machine: Machine, budget: int) -> Iterator[tuple[str, str]]:
    """Where a plan's card and its RAM are; what a real card gives beyond the budget is an error of memory."""
    if not machine.is_cuda:
        yield "cpu", "disk"
        return
    total = torch.cuda.get_device_properties(machine.device).total_memory
    torch.cuda.set_per_process_memory_fraction(budget / total)
    try:
        yield "cuda:0", "cpu"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def image_seconds(machine: Machine, model: Any) -> dict[tuple[str, int], float]:
    return {
        (mode, batch): machine.seconds(partial(model.embed_image, machine.pixels(batch), mode=mode), warm=1)
        for mode in MODES
        for batch in batches(machine, 1, 16)
    }


def copy_seconds(machine: Machine, tensors: list[torch.Tensor]) -> float:
    """How long weights take from RAM to the card, one after the other and into the same memory."""
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
    """From safetensors on the disk, which the page cache holds, onto the device."""
    return {"whole model": machine.attempt(loading, machine)}


def loading(machine: Machine) -> dict[str, Any]:
    model = machine.take_model()
    size = sum(parameter.nbytes for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < 1.2 * size:
            raise Missing(f"the disk has no room for {size / 1e9:.1f} GB")
        model.save_pretrained(folder)
        del model
        machine.forget()
        kept = []

        def once() -> None:
            kept.clear()
            kept.append(
                AutoModel.from_pretrained(
                    folder, trust_remote_code=True, dtype="auto", device_map=str(machine.device), local_files_only=True
                )
            )
            for parameter in kept[0].parameters():  # on a CPU weights are mapped, and read where they are touched
                parameter.sum()

        seconds = machine.seconds(once, warm=1)
        files = [name for name in Path(folder).glob("*.safetensors")]
        return {"GB": size / 1e9, "files": len(files), "seconds": seconds, "GB/s": size / seconds / 1e9}


STEPS = {step.__name__: step for step in (ceilings, images, captions, float8, texts, profile, placed, streamed, load)}
