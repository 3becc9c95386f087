"""How fast is this machine? The steps of benchmarks/gpu.py that take times, each beside what the machine could do."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import simulate_devices  # of tools/, where `measuring` looks too
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from gpu_machine import PEAK, Float8Linear, Machine, Missing, check_float8, float8_product, in_float8, to_float8
from torch import nn
from transformers import AutoModel

GIB = 1 << 30
MODES = ("InternVL-C", "InternVL-G")
TEXT_LENGTH = 12
# Both lengths of a caption need a static cache of the same size, which is a multiple of 64 positions.
SHORT, LONG = 6, 30


def batches(machine: Machine, *sizes: int) -> tuple[int, ...]:
    return (1, 2) if machine.tiny else sizes


def row(machine: Machine, work: str, batch: int, way: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """One figure, by what was done, how many at once and how."""
    return {"work": work, "batch": batch, "way": way, **machine.attempt(measure)}


def rate(
    machine: Machine, call: Callable[[], Any], count: int, products: "Ceiling", warm: int = 2
) -> dict[str, float | None]:
    """`count` things a call: things a second, the share of what their products alone reach, and memory."""
    if machine.simulated:
        return {PEAK: machine.peak(call)}
    seconds = machine.seconds(call, warm)
    return {
        "a second": count / seconds,
        "time / products": seconds / products.seconds,
        "TFLOP/s": products.operations / seconds / 1e12,
        PEAK: machine.peak(call),
    }


class Ceiling:
    """How long the matrix products of a call take alone, attention left out, and how many operations they are."""

    def __init__(self, machine: Machine, model: nn.Module, call: Callable[[], Any]):
        self.seconds, self.operations = 0.0, 0
        if machine.simulated:
            return
        with measuring.Products(model, share_inputs=True, attention=False) as products:
            call()
        self.operations, self.seconds = products.operations, machine.seconds(products.run)


def as_graph(machine: Machine, call: Callable[[], Any]) -> Callable[[], Any]:
    """A call as one CUDA graph, replayed without Python."""
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
        call()
    return graph.replay


def compiled(machine: Machine, prepare: Callable[[Any], Any] = lambda twin: twin) -> Any:
    """A twin whose layers are compiled, once for all batches but that of one."""
    if machine.simulated:
        raise Missing("a simulated card compiles nothing")
    torch.compiler.reset()
    twin = prepare(machine.twin())
    twin.compile_layers(dynamic=True)
    return twin


class Lazy:
    """A model that is made when it is first needed; a failure is raised anew at each use."""

    def __init__(self, make: Callable[[], Any]):
        self.make = make
        self.made: Any = None
        self.error: Exception | None = None

    def __call__(self) -> Any:
        if self.error is not None:
            raise self.error
        if self.made is None:
            try:
                self.made = self.make()
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
    model = machine.model().vision_model
    tokens = model.embeddings.position_embedding.shape[1] * (1 if machine.tiny else 64)
    layer = model.encoder.layers[0]
    weights = {"qkv": layer.attn.qkv, "proj": layer.attn.proj, "fc1": layer.mlp.fc1, "fc2": layer.mlp.fc2}
    shapes = {"square": (size, size, size)}
    shapes |= {name: (tokens, *reversed(linear.weight.shape)) for name, linear in weights.items()}

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

    found = {
        f"products, {name}, {'float8' if is_float8 else 'bfloat16'}": machine.attempt(products, *shape, is_float8)
        for name, shape in shapes.items()
        for is_float8 in (False, True)
    }
    found["memory of the device, a copy"] = machine.attempt(copies, None)
    found["from the host, pinned"] = machine.attempt(copies, True)
    found["from the host, pageable"] = machine.attempt(copies, False)
    return found


# ---------------------------------------------------------------------------------------------------------- images


def images(machine: Machine) -> dict[str, Any]:
    """Images a second in both modes, batch by batch: as it is, compiled, as a CUDA graph; transformers' tower."""
    ways = {
        "eager": Lazy(machine.model),
        "compile_layers": Lazy(lambda: compiled(machine)),
        "transformers": Lazy(lambda: peer_of(machine, machine.vision_peer)),
    }
    ceilings: dict[tuple[str, int], Ceiling] = {}
    rows = []

    def measure(way: str, mode: str, batch: int, graph: bool = False) -> None:
        def figures() -> dict[str, Any]:
            pixels, model = machine.pixels(batch), ways[way]()
            # transformers' tower has no head: that makes its work a little less.
            call = partial(model, pixels) if way == "transformers" else partial(model.embed_image, pixels, mode=mode)
            if (mode, batch) not in ceilings:
                ceilings[mode, batch] = Ceiling(machine, model, call)  # `eager` comes first
            if graph:
                call()
            return rate(machine, as_graph(machine, call) if graph else call, batch, ceilings[mode, batch])

        rows.append(row(machine, mode, batch, f"{way}, one CUDA graph" if graph else way, figures))

    sizes = batches(machine, 1, 4, 16, 64, 128, 256)
    for way in ways:
        for mode in MODES[:1] if way == "transformers" else MODES:
            for batch in sizes:
                measure(way, mode, batch)
            if way != "transformers":
                measure(way, mode, 1, graph=True)
    return {"rows": rows}


def float8(machine: Machine) -> dict[str, Any]:
    """InternVL-C with the layers' products in float8 by rows, and the cosine to bfloat16 on drawn weights and tiny/."""
    prepare = partial(to_float8, prefixes=("vision_model.encoder.layers.",))
    ways = {
        "float8": Lazy(lambda: prepare(machine.twin())),
        "float8, compile_layers": Lazy(lambda: compiled(machine, prepare)),
    }
    model, rows = machine.model(), []
    for way, make in ways.items():
        for batch in batches(machine, 16, 64, 128):

            def figures(make: Lazy = make, batch: int = batch) -> dict[str, Any]:
                pixels, twin = machine.pixels(batch), make()
                ceiling = Ceiling(machine, model, partial(model.embed_image, pixels))
                found: dict[str, Any] = rate(machine, partial(twin.embed_image, pixels), batch, ceiling)
                if not machine.simulated:
                    cosine = least_cosine(twin.embed_image(pixels), model.embed_image(pixels))
                    found["least cosine to bfloat16"] = cosine
                return found

            rows.append(row(machine, MODES[0], batch, way, figures))
    return {"rows": rows, "tiny/": machine.attempt(float8_of_tiny, machine)}


def least_cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.cosine_similarity(one.float(), other.float(), dim=-1).min().item()


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
    return {"images": len(pictures), "least cosine to bfloat16": least_cosine(found, expected)}


# ----------------------------------------------------------------------------------------------------------- texts


def texts(machine: Machine) -> dict[str, Any]:
    """Texts of 12 tokens a second, batch by batch, beside transformers' LlamaModel with the same weights."""
    ways = {
        "eager": Lazy(machine.model),
        "compile_layers": Lazy(lambda: compiled(machine)),
        "transformers": Lazy(lambda: peer_of(machine, machine.text_peer).model),
    }
    ceilings: dict[int, Ceiling] = {}
    rows = []
    for way, make in ways.items():
        for batch in batches(machine, 1, 64, 512):

            def figures(way: str = way, make: Lazy = make, batch: int = batch) -> dict[str, Any]:
                ids, model = machine.ids(batch, TEXT_LENGTH), make()
                if way == "transformers":
                    call = partial(model, input_ids=ids, use_cache=False)
                else:
                    call = partial(model.embed_text, ids, torch.ones_like(ids))
                if batch not in ceilings:
                    ceilings[batch] = Ceiling(machine, model, call)  # `eager` comes first
                return rate(machine, call, batch, ceilings[batch])

            rows.append(row(machine, "texts", batch, way, figures))
    return {"rows": rows}


# -------------------------------------------------------------------------------------------------------- captions


def bytes_a_token(model: Any) -> int:
    """Of the weights that a step of a caption reads in any precision: no cross-attention, one row of the table."""
    layers = [
        tensor
        for name, tensor in (*model.qllama.model.named_parameters(), *model.qllama.model.named_buffers())
        if "cross_attn" not in name and "embed_tokens" not in name
    ]
    quantised = [
        tensor
        for module in model.qllama.model.modules()
        if isinstance(module, Float8Linear)
        for tensor in (module.weight, module.scales)
    ]
    return sum(tensor.nbytes for tensor in (*layers, *quantised, model.qllama.lm_head.weight))


def captions(machine: Machine) -> dict[str, Any]:
    """Tokens a second, from the difference of two lengths, so that what comes before the first token is left out."""
    static = {"cache_implementation": "static"}
    # How a model is prepared, the options of `generate`, and how many images at once.
    ways: dict[str, tuple[Callable[[Any], Any] | None, dict[str, Any], tuple[int, ...]]] = {
        "greedy": (None, {}, (1, 32)),
        "greedy, static cache": (None, static | {"disable_compile": True}, (1, 32)),
        "greedy, compiled": (None, static, (1, 32)),
        "greedy, compiled, float8": (partial(to_float8, prefixes=("qllama.model.layers.",)), static, (1,)),
        "greedy, compiled, int8 weights": (int8_weights, static, (1,)),
        "5 beams": (None, {"num_beams": 5}, (1, 32)),
    }
    rows = []
    for way, (prepare, options, sizes) in ways.items():
        for batch in sizes[:1] if machine.tiny else sizes:

            def figures(
                prepare: Any = prepare, options: dict[str, Any] = options, batch: int = batch
            ) -> dict[str, Any]:
                if machine.simulated and options.get("cache_implementation"):
                    raise Missing("a static cache counts its positions by values, which a simulated card has not")
                torch.compiler.reset()
                pixels = machine.pixels(batch)
                model = machine.model() if prepare is None else prepare(machine.twin())
                found = tokens_a_second(machine, lambda count: machine.write(model, pixels, count, **options), batch)
                return found | {"GB of weights a token": bytes_a_token(model) / 1e9}

            rows.append(row(machine, "captions", batch, way, figures))

    def theirs() -> dict[str, Any]:
        torch.compiler.reset()
        peer = peer_of(machine, machine.text_peer)
        prompt = machine.ids(1, measuring.QUERIES + measuring.PROMPT)

        def write(count: int) -> Any:
            lengths = {"max_new_tokens": count, "min_new_tokens": count, "eos_token_id": 2, "pad_token_id": 0}
            mask = torch.ones_like(prompt)
            return peer.generate(prompt, attention_mask=mask, do_sample=False, **lengths, **static)

        return tokens_a_second(machine, write, 1)

    rows.append(row(machine, "captions", 1, "transformers, compiled", theirs))
    return {"rows": rows}


def tokens_a_second(machine: Machine, write: Callable[[int], Any], batch: int) -> dict[str, Any]:
    short, long = (2, 4) if machine.tiny else (SHORT, LONG)
    peak = machine.peak(lambda: write(short))
    if machine.simulated:
        return {PEAK: peak}
    first, second = (machine.seconds(partial(write, count), warm=3) for count in (short, long))
    return {
        "a second": batch * (long - short) / max(second - first, 1e-9),
        f"seconds, {long} tokens": second,
        PEAK: peak,
    }


def int8_weights(model: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def is_of_a_step(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name.startswith("qllama.model.layers.") and "cross_attn" not in name

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_of_a_step)
    return model


# --------------------------------------------------------------------------------------------------------- profile

# The first pattern in a kernel's name says what kind it is; the CPU's operators are there for the tests.
KINDS = {
    "attention": ("flash", "fmha", "attention", "flex"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "gemv", "cublas", "addmm", "aten::mm", "aten::bmm", "conv"),
    "norms": ("norm", "rms"),
    "copies": ("copy", "memcpy", "cat", "memset"),
    "compiled": ("triton",),
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
        f"InternVL-C, batch {batch}, eager": machine.attempt(lambda: of_images(machine.model)),
        f"InternVL-C, batch {batch}, compile_layers": machine.attempt(lambda: of_images(lambda: compiled(machine))),
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
    return {f"a card of {size} GB": machine.attempt(on_a_small_card, machine, size) for size in (12, 8)}


def on_a_small_card(machine: Machine, size: int) -> dict[str, Any]:
    """On a CPU the plan's card is the CPU, and its RAM the disk."""
    folder = measuring.ROOT / "tiny" if machine.tiny else measuring.ROOT
    setup = simulate_devices.Setup.parse(f"{size * (3e-4 if machine.tiny else 1)}")
    report = simulate_devices.simulate(folder, setup)
    torch.compiler.reset()  # what CUDA graphs hold would count against the budget
    with torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        expected, whole = dict(outputs_of(machine, machine.model())), image_seconds(machine, machine.model())
        # The weights in RAM alone: what the card kept would count against its budget.
        state = {name: each.cpu() for name, each in machine.model().state_dict().items()}
        machine._model = None
        machine.forget()
        model = machine.empty_model()
        model.load_state_dict(state, assign=True)
        waiting = [name for name in state if simulate_devices.device_of(report.device_map, name) != 0]
        copying = {mode: copy_seconds(machine, [state[name] for name in waiting if name.startswith(parts)])
                   for mode, parts in PARTS.items()}  # fmt: skip
        with small_card(machine, setup.cards[0]) as places:
            devices = {name: places[0] if where == 0 else places[1] for name, where in report.device_map.items()}
            keys = model._skip_keys_device_placement
            dispatch_model(model, devices, main_device=places[0], offload_dir=scratch, skip_keys=keys)
            found = dict(outputs_of(machine, model))
            different = [name for name, value in found.items() if not torch.equal(value, expected[name])]
            assert not different, f"placed and whole differ in {', '.join(different)}"
            peaks = {
                call.name: machine.peak(call.run)
                for call in simulate_devices.public_calls(model, simulate_devices.BATCH, places[0])
                if machine.is_cuda
            }
            rows = [
                {
                    "mode": mode,
                    "batch": batch,
                    **machine.attempt(beside_copying, machine, model, mode, batch, alone, copying),
                }
                for (mode, batch), alone in whole.items()
            ]
    worst = max(peaks, key=lambda name: peaks[name] or 0, default=None)
    return {
        "equal to the model on one device": list(found),
        "GB that wait in RAM": report.weights["cpu"] / 1e9,
        "simulated peak GB": report.peak["cuda:0"] / 1e9,
        **({PEAK: peaks[worst], "peak in": worst} if worst else {}),
        "images": rows,
    }


def beside_copying(
    machine: Machine, model: Any, mode: str, batch: int, alone: float, copying: dict[str, float]
) -> dict[str, float]:
    """How long images take, as a multiple of what takes longer: copying the weights in RAM, or computing."""
    seconds = machine.seconds(partial(model.embed_image, machine.pixels(batch), mode=mode), warm=1)
    return {
        "seconds": seconds,
        "seconds on one device": alone,
        "seconds to copy": copying[mode],
        "seconds / the longer": seconds / max(alone, copying[mode]),
    }


def streamed(machine: Machine) -> dict[str, Any]:
    """All weights in RAM, brought by diffusers' group offloading: the next layer travels while one computes."""
    return {"diffusers, leaf_level": machine.attempt(by_group_offloading, machine)}


def by_group_offloading(machine: Machine) -> dict[str, Any]:
    from diffusers.hooks import apply_group_offloading

    with torch.inference_mode(False), torch.no_grad():
        expected, whole = dict(outputs_of(machine, machine.model())), image_seconds(machine, machine.model())
        state = {name: each.cpu() for name, each in machine.model().state_dict().items()}
        machine._model = None
        machine.forget()
        model = machine.empty_model()
        model.load_state_dict(state, assign=True)
        copying = {
            mode: copy_seconds(machine, [tensor for name, tensor in state.items() if name.startswith(parts)])
            for mode, parts in PARTS.items()
        }
        for name, parameter in model.named_parameters(recurse=False):
            setattr(model, name, nn.Parameter(parameter.to(machine.device), requires_grad=False))
        for _, part in model.named_children():
            apply_group_offloading(
                part, onload_device=machine.device, offload_type="leaf_level", use_stream=machine.is_cuda
            )
        found = dict(outputs_of(machine, model))
        different = [name for name, value in found.items() if not torch.equal(value, expected[name])]
        assert not different, f"streamed and whole differ in {', '.join(different)}"
        pixels = machine.pixels(1)
        return {
            "equal to the model on one device": list(found),
            PEAK: machine.peak(lambda: model.embed_image(pixels, mode=MODES[1])),
            "images": [
                {"mode": mode, "batch": batch, **beside_copying(machine, model, mode, batch, alone, copying)}
                for (mode, batch), alone in whole.items()
            ],
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
    model = machine.model()
    size = sum(parameter.nbytes for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < 1.2 * size:
            raise Missing(f"the disk has no room for {size / 1e9:.1f} GB")
        model.save_pretrained(folder)
        machine._model = model = None
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
