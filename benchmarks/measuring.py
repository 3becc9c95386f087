"""What speed.py and gpu.py measure with: models at the 14B's widths, transformers' own models, clocks and counters."""

import inspect
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModel,
    DynamicCache,
    GenerationMixin,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
)

from tools.machines import simulate_devices
from tools.machines.synthesise_checkpoint import mean_and_deviation

ROOT = Path(__file__).resolve().parents[1]

WIDTH, VISION_WIDTH, VOCABULARY = 4096, 3200, 49_954
QUERIES, PROMPT, BEAMS, LAYERS = 96, 5, 5, 2
CARD = "cuda:0"
# The argument for the cache, whose name depends on the version of transformers.
CACHE_NAME = {"cache", "past_key_values"}.intersection(
    inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
).pop()

# ------------------------------------------------------------------------------------------------------- comparing


def meets(value: float, target: str) -> bool:
    """Whether a value meets a target such as "<= 1.03" or ">= 2"."""
    sign, bound = target.split()
    return value <= float(bound) if sign == "<=" else value >= float(bound)


@dataclass
class Row:
    """One figure.

    Attributes:
        work: what was done.
        figure: what `value` is, such as "ours / products".
        spread: for a ratio of times, the smallest and the largest ratio of neighbouring runs.
        target: what `value` should be, such as "<= 1.03".
        headline: the line of docs/speed.md, with {} for the value; empty for none.
    """

    work: str
    figure: str
    value: float
    spread: tuple[float, float] | None = None
    target: str = ""
    headline: str = ""

    @property
    def met(self) -> bool | None:
        return meets(self.value, self.target) if self.target else None

    def cells(self) -> tuple[str, ...]:
        spread = "" if self.spread is None else f"{self.spread[0]:.2f} to {self.spread[1]:.2f}"
        digits = 5 if "cosine" in self.figure else 0 if self.value >= 100 or self.value == int(self.value) else 2
        if self.spread is not None and self.target:  # two digits cannot show whether a target of 1.03 is met
            digits = 3
        return (
            self.work,
            self.figure,
            f"{self.value:,.{digits}f}",
            spread,
            self.target,
            {True: "yes", False: "**no**", None: ""}[self.met],
        )


def in_turn(ways: dict[str, Callable[[], Any]], rounds: int, warm: bool = True) -> dict[str, list[float]]:
    """Seconds of each way; the ways run alternately, after one run of each that does not count."""
    for way in ways.values() if warm else ():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(work: str, times: dict[str, list[float]], one: str, other: str, target: str = "", headline: str = "") -> Row:
    """The fastest run of `one` as a multiple of the fastest of `other`."""
    pairs = sorted(a / b for a, b in zip(times[one], times[other], strict=True))
    return Row(work, f"{one} / {other}", min(times[one]) / min(times[other]), (pairs[0], pairs[-1]), target, headline)


class Products(TorchFunctionMode):
    """Records the matrix products that run inside it: each Linear and Conv2d with its weights and the shape of its
    input, and the two of every attention. `run` then repeats them alone, either all or those of one step of `generate`.

    Args:
        model: the model whose layers are recorded.
        share_inputs (`bool`): one input for all layers that take its shape, to save memory.
        attention (`bool`): `False` leaves attention out, which a fused kernel computes faster than two products.
    """

    def __init__(self, model: nn.Module, share_inputs: bool = False, attention: bool = True):
        super().__init__()
        self.model, self.share_inputs, self.attention = model, share_inputs, attention
        self.steps: list[list[Callable[[], Any]]] = [[]]
        self.operations = 0
        self.handles: list[Any] = []
        self.inputs: dict[Any, torch.Tensor] = {}

    def __enter__(self) -> "Products":
        layers = [module for module in self.model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        self.handles = [layer.register_forward_hook(self._record) for layer in layers]
        return super().__enter__()

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        for handle in self.handles:
            handle.remove()

    def _input(self, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        kind = (shape, like.dtype, like.device)
        if not self.share_inputs or kind not in self.inputs:
            self.inputs[kind] = torch.randn(shape, dtype=like.dtype, device=like.device)
        return self.inputs[kind]

    def _record(self, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        states = self._input(inputs[0].shape, layer.weight)
        self.operations += 2 * output.numel() * layer.weight[0].numel()
        if isinstance(layer, nn.Conv2d):
            self.steps[-1].append(lambda: F.conv2d(states, layer.weight, layer.bias, layer.stride))
            return
        self.steps[-1].append(lambda: F.linear(states, layer.weight, layer.bias))
        if layer.out_features == VOCABULARY:  # the language head ends a step
            self.steps.append([])

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention and self.attention:
            query, key = (self._input(states.shape, states) for states in args[:2])
            weights = self._input(torch.Size((*query.shape[:3], key.shape[2])), query)
            self.steps[-1] += [lambda: query @ key.transpose(-1, -2), lambda: weights @ key]
            self.operations += 4 * weights.numel() * query.shape[-1]
        return func(*args, **(kwargs or {}))

    def run(self, step: int | None = None) -> None:
        for product in itertools.chain(*self.steps) if step is None else self.steps[step]:
            product()


def products_of(model: nn.Module, work: Callable[[], Any]) -> Callable[[], None]:
    with Products(model) as products:
        work()
    return products.run


# ---------------------------------------------------------------------------------------------------------- models


def joint_config(layers: int) -> Any:
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True, attn_implementation="sdpa")
    config.vision_config.num_hidden_layers = config.qllama_config.num_hidden_layers = layers
    return config


def joint_model(layers: int = LAYERS) -> Any:
    """The joint model at the published widths. Like all models here it is on the meta device until it gets weights."""
    with torch.device("meta"):
        return AutoModel.from_config(joint_config(layers), trust_remote_code=True).eval()


SHARED_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def peer(model_class: Any, config_class: Any, config: Any, *fields: str, **options: Any) -> Any:
    same = {name: getattr(config, name) for name in (*SHARED_FIELDS, *fields)}
    with torch.device("meta"):
        return model_class(config_class(**same, **options, attn_implementation="sdpa")).eval()


def vision_peer(config: Any) -> Any:
    """transformers' own InternVL vision tower in the shape of our config."""
    options = {"norm_type": "rms_norm", "use_qk_norm": True, "use_mean_pooling": False}
    return peer(InternVLVisionModel, InternVLVisionConfig, config, "image_size", "patch_size", **options)


def text_peer(config: Any) -> Any:
    """transformers' own LLaMA in the shape of our config."""
    return peer(LlamaForCausalLM, LlamaConfig, config, "vocab_size", pad_token_id=0)


def vision_peer_of(model: Any) -> Any:
    """transformers' own vision tower with the weights of a joint model."""
    return sharing_weights(vision_peer(model.config.vision_config), model.vision_model.state_dict())


def text_peer_of(model: Any) -> Any:
    """transformers' own LLaMA with the weights of a joint model."""
    return sharing_weights(text_peer(model.config.qllama_config), model.qllama.state_dict())


@torch.no_grad()
def with_random_weights(model: Any, device: torch.device | str = "cpu") -> Any:
    """Give a model memory and seeded random weights, at the scales of the synthetic checkpoint."""
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.normal_(*mean_and_deviation(name, parameter.shape), generator=generator)
    return model


# Our names and those of the vision peer, whose queries, keys and values have separate weights.
VISION_NAMES = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("embeddings.patch_embedding", "embeddings.patch_embeddings.projection"),
    ("encoder.layers.", "encoder.layer."),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.", ".attention."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
)


def sharing_weights(peer: Any, state: dict[str, torch.Tensor]) -> Any:
    """Give a peer our weights in the same memory: their place in memory changes times by a few percent."""
    if "embeddings.class_embedding" in state:
        renamed = {}
        for name, tensor in state.items():
            for ours, theirs in VISION_NAMES:
                name = name.replace(ours, theirs)
            parts = zip("qkv", tensor.chunk(3), strict=True) if ".qkv." in name else ()
            renamed |= {name.replace("qkv", f"{part}_proj"): weight for part, weight in parts} or {name: tensor}
        bias = renamed["embeddings.patch_embeddings.projection.bias"]
        state = renamed | {"layernorm.weight": torch.ones_like(bias), "layernorm.bias": torch.zeros_like(bias)}
    wanted = dict(peer.named_parameters())
    peer.load_state_dict({name: state[name] for name in wanted}, assign=True)
    device = next(peer.parameters()).device
    for module in peer.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if "inv_freq" in name:  # rotary frequencies: the constructor computed them on the meta device
                size = 2 * len(buffer)
                setattr(module, name, 10_000 ** -(torch.arange(0, size, 2, device=device).float() / size))
            elif buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device=device))
    return peer


def small_models(layers: int) -> dict[str, Any]:
    """Models and peers with many layers that compute next to nothing, with weights."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": layers}
    vision, text = small | {"image_size": 28}, small | {"num_key_value_heads": 2, "vocab_size": 128}
    joint = joint_model(1)

    def like(model: Any, fields: dict[str, int]) -> Any:
        with torch.device("meta"):
            return type(model)(type(model.config)(**model.config.to_dict() | fields)).float().eval()

    models = {"vision": like(joint.vision_model, vision), "text": like(joint.qllama.model, text)}
    peers = {
        "vision": like(vision_peer(joint.config.vision_config), vision),
        "text": like(text_peer(joint.config.qllama_config).model, text | {"head_dim": 16}),
    }
    for part, model in list(models.items()):
        models[part] = with_random_weights(model)
        models[f"{part}, transformers"] = sharing_weights(peers[part], model.state_dict())
    return models


# ---------------------------------------------------------------------------------------------------------- inputs


def pixels(batch: int, side: int = 224) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def ids(batch: int, length: int, padded_to: int = 0) -> torch.Tensor:
    """[B, L] ids that begin with `<s>` and end in `</s>`, and padding."""
    tokens = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))
    tokens[:, 0], tokens[:, -1] = 1, 2
    return F.pad(tokens, (0, max(padded_to - length, 0)))


def prompts(count: int) -> torch.Tensor:
    return ids(count, PROMPT + 1)[:, :PROMPT]


# -------------------------------------------------------------------------------------------------------- captions


def written(count: int, beams: int = BEAMS, **others: Any) -> dict[str, Any]:
    """Options of `generate` for exactly `count` tokens."""
    exactly = {"max_new_tokens": count, "min_new_tokens": count, "eos_token_id": 2, "pad_token_id": 0}
    return {"num_beams": beams, **exactly, **others}


class Clock(LogitsProcessor):
    """Records the time at which each step of `generate` has its logits."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def step_times(write: Callable[..., Any], count: int = 10, **options: Any) -> list[float]:
    """Seconds of each step but the first, including everything that `generate` does between two forward passes."""
    clock = Clock()
    write(logits_processor=[clock], **written(count, **options))
    return [after - before for before, after in itertools.pairwise(clock.times)]


def original_caption(model: Any, seen: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    """Caption as the original did: queries and prompt run once per beam, with logits at each of their positions."""
    decoder = model.qllama

    def all_at_once(
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        inputs = {CACHE_NAME: others[CACHE_NAME], "attention_mask": attention_mask, "use_cache": True}
        if others[CACHE_NAME].get_seq_length():
            return inputs | {"input_ids": input_ids[:, -1:], "logits_to_keep": 1}
        queries = model.config.num_query_token
        image = {"encoder_hidden_states": encoder_hidden_states, "num_bidirectional": queries}
        return inputs | image | {"inputs_embeds": inputs_embeds, "logits_to_keep": 0}

    prefix = torch.cat([model.query_tokens, decoder.model.embed_tokens(prompt)], dim=1)
    mask = torch.ones(prefix.shape[:2], dtype=torch.long)
    inputs = {"inputs_embeds": prefix, "attention_mask": mask, "encoder_hidden_states": seen.image_states}
    with patch.object(decoder, "prepare_inputs_for_generation", all_at_once):
        return decoder.generate(**inputs, **options)


# ------------------------------------------------------------------------------------------------- a simulated card


class AsOnCuda(TorchFunctionMode):
    """Gives a simulated card the two fused kernels of CUDA that torch decomposes for tensors without data: the norm,
    and attention that never holds all its weights. Counts them, and the inputs that the norm copies to be contiguous.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.copies = 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.rms_norm:
            self.kernels["rms_norm"] += 1
            self.copies += not args[0].is_contiguous()
            return args[0].new_empty(args[0].shape)
        if func is F.scaled_dot_product_attention:
            self.kernels["attention"] += 1
            batch, heads, length, dim = args[0].shape
            return args[0].new_empty(batch, length, heads, dim).transpose(1, 2)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Counts the operators that a card would run; views and empty memory cost nothing."""

    FREE = ("_unsafe_view", "new_empty", "empty", "device")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if not getattr(func, "is_view", False) and name not in self.FREE:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def put_on_a_card(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model on the meta device weights on the simulated card, inside `simulated_card`."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=dtype, device=CARD)
            setattr(module, name, nn.Parameter(fake, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=CARD))


@contextmanager
def simulated_card() -> Iterator[tuple[simulate_devices.DeviceMeter, AsOnCuda]]:
    """Inside, tensors can be placed on a card that does not exist, and their bytes are counted."""
    # Tensors of inference mode lose their fake device on the way.
    with torch.inference_mode(False), simulate_devices.simulated_machine() as meter, AsOnCuda() as kernels:
        yield meter, kernels


def run_vision(model: Any, dtype: torch.dtype) -> Callable[[], Any]:
    images = torch.empty(1, 3, 224, 224, dtype=dtype, device=CARD)
    return lambda: model(images)


def run_text(model: Any, dtype: torch.dtype) -> Callable[[], Any]:
    tokens = torch.zeros(1, 12, dtype=torch.long, device=CARD)
    return lambda: model(input_ids=tokens, use_cache=False)


def run_decoding(model: Any, dtype: torch.dtype) -> Callable[[], Any]:
    tokens, cache = torch.zeros(1, 12, dtype=torch.long, device=CARD), DynamicCache(config=model.config)
    named = {CACHE_NAME: cache, "use_cache": True}
    model(input_ids=tokens, **named)
    last = tokens.narrow(1, 0, 1)
    return lambda: model(input_ids=last, **named)


def operators_per_layer(
    make: Callable[[int], Any], run: Callable[..., Any], dtype: torch.dtype
) -> tuple[Counter[str], float]:
    """Operators that one more layer adds to a pass, and the copies among them. It is the mean of two layers: in QLLaMA
    one has cross-attention and one does not.
    """
    counts, copies = [], []
    for layers in (2, 4):
        model = make(layers)
        with simulated_card() as (_, kernels):
            put_on_a_card(model, dtype)
            work = run(model, dtype)
            kernels.kernels.clear()
            kernels.copies = 0
            with Operators() as operators:
                work()
            counts.append(operators.found + kernels.kernels)
            copies.append(kernels.copies)
    each = {name: (counts[1][name] - counts[0][name]) / 2 for name in counts[1]}
    return Counter({name: count for name, count in each.items() if count}), (copies[1] - copies[0]) / 2


def peak_megabytes(work: Callable[[Any], Any]) -> float:
    """Peak memory of a call to the joint model in bfloat16, without the weights."""
    model = joint_model()
    with simulated_card() as (meter, _):
        put_on_a_card(model, torch.bfloat16)
        before = meter.alive[CARD]
        meter.restart()
        work(model)
        return (meter.peak[CARD] - before) / 1e6
