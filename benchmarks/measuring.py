"""What benchmarks/speed.py measures with: models at the 14B's widths, their peers, clocks and counters."""

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
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
)

from tools.machines import simulate_devices

ROOT = Path(__file__).resolve().parents[1]


WIDTH, VISION_WIDTH, VOCABULARY = 4096, 3200, 49_954
QUERIES, PROMPT, BEAMS, LAYERS = 96, 5, 5, 2
CARD = "cuda:0"
# What transformers calls a cache.
CACHE_NAME = {"cache", "past_key_values"}.intersection(
    inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
).pop()

# ------------------------------------------------------------------------------------------------------- comparing


@dataclass
class Row:
    """
    One figure.

    Attributes:
        work: what was done.
        figure: what `value` is, such as "ours / products".
        spread: the least and the largest ratio of runs next to each other, for a ratio of times.
        target: what `value` should be, such as "<= 1.03".
        headline: what the README says of it, with the value for {}; nothing if empty.
    """

    work: str
    figure: str
    value: float
    spread: tuple[float, float] | None = None
    target: str = ""
    headline: str = ""

    @property
    def met(self) -> bool | None:
        if not self.target:
            return None
        sign, bound = self.target.split()
        return self.value <= float(bound) if sign == "<=" else self.value >= float(bound)

    def cells(self) -> tuple[str, ...]:
        spread = "" if self.spread is None else f"{self.spread[0]:.2f} to {self.spread[1]:.2f}"
        digits = 5 if "cosine" in self.figure else 0 if self.value >= 100 or self.value == int(self.value) else 2
        if self.spread is not None and self.target:  # a target of 1.03 is not seen to be met in two digits
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
    """Seconds that each way took, run in turn, after one run of each that does not count."""
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
    """
    Inside, notes the matrix products that run: each Linear and Conv2d with its weights and the shape of its input, and
    the two of every attention. `run` then does them and nothing else, all or those of one step of `generate`.

    Args:
        model: the layers that are watched.
        share_inputs (`bool`): one input for all layers that take its shape, where inputs for each would not fit.
        attention (`bool`): `False` leaves attention out, which a fused kernel does faster than two products.
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
        self.handles = [layer.register_forward_hook(self._note) for layer in layers]
        return super().__enter__()

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        for handle in self.handles:
            handle.remove()

    def _input(self, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        if not self.share_inputs:
            return torch.randn(shape, dtype=like.dtype, device=like.device)
        kind = (shape, like.dtype, like.device)
        if kind not in self.inputs:
            self.inputs[kind] = torch.randn(shape, dtype=like.dtype, device=like.device)
        return self.inputs[kind]

    def _note(self, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
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
    """The joint model at the published widths, on the meta device, as all models here until they are `filled`."""
    with torch.device("meta"):
        return AutoModel.from_config(joint_config(layers), trust_remote_code=True).eval()


def vision_peer(config: Any) -> Any:
    """transformers' own InternVL vision tower in the shape of our config."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    options = {"norm_type": "rms_norm", "use_qk_norm": True, "use_mean_pooling": False, "attn_implementation": "sdpa"}
    with torch.device("meta"):
        return InternVLVisionModel(
            InternVLVisionConfig(**{name: getattr(config, name) for name in same}, **options)
        ).eval()


def text_peer(config: Any) -> Any:
    """transformers' own LLaMA in the shape of our config."""
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    options = {"pad_token_id": 0, "attn_implementation": "sdpa"}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in same}, **options)).eval()


def filled(model: Any) -> Any:
    """Give a model memory and seeded random weights; norms and scales are 1."""
    model = model.float().to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.uniform_(parameter, -0.03, 0.03, generator=generator)
        else:
            nn.init.constant_(parameter, float(name.endswith("weight") or ".ls" in name))
    return model


# Our names for those of the vision peer, which has queries, keys and values apart.
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
    """Give a peer our weights, the same memory: where weights lie makes a difference of some percent."""
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
            if "inv_freq" in name:  # rotary frequencies, which the constructor computed on the meta device
                size = 2 * len(buffer)
                setattr(module, name, 10_000 ** -(torch.arange(0, size, 2, device=device).float() / size))
            elif buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device=device))
    return peer


def small_models(layers: int) -> dict[str, Any]:
    """Models and peers of many layers in which arithmetic is next to nothing, filled."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": layers}
    vision, text = {"image_size": 28}, {"num_key_value_heads": 2, "vocab_size": 128}
    joint = joint_model(1)
    models = {
        "vision": (joint.vision_model, vision),
        "text": (joint.qllama.model, text),
        "vision, transformers": (vision_peer(joint.config.vision_config), vision),
        "text, transformers": (text_peer(joint.config.qllama_config).model, text | {"head_dim": 16}),
    }
    with torch.device("meta"):
        made = {
            name: type(model)(type(model.config)(**model.config.to_dict() | small | others)).eval()
            for name, (model, others) in models.items()
        }
    for part in ("vision", "text"):
        made[part] = filled(made[part])
        made[f"{part}, transformers"] = sharing_weights(made[f"{part}, transformers"], made[part].state_dict())
    return made


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
    """Options of `generate` for exactly so many tokens."""
    exactly = {"max_new_tokens": count, "min_new_tokens": count, "eos_token_id": 2, "pad_token_id": 0}
    return {"num_beams": beams, **exactly, **others}


class Clock(LogitsProcessor):
    """Notes when each step of `generate` has its logits."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def step_times(write: Callable[..., Any], count: int = 10, **options: Any) -> list[float]:
    """Seconds of each step but the first, with all that `generate` does from one forward pass to the next."""
    clock = Clock()
    write(logits_processor=[clock], **written(count, **options))
    return [after - before for before, after in itertools.pairwise(clock.times)]


def original_caption(model: Any, seen: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    """Caption as the original did: queries and prompt once per beam, logits at each of their positions."""
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
        picture = {"encoder_hidden_states": encoder_hidden_states, "num_bidirectional": queries}
        return inputs | picture | {"inputs_embeds": inputs_embeds, "logits_to_keep": 0}

    prefix = torch.cat([model.query_tokens, decoder.model.embed_tokens(prompt)], dim=1)
    mask = torch.ones(prefix.shape[:2], dtype=torch.long)
    inputs = {"inputs_embeds": prefix, "attention_mask": mask, "encoder_hidden_states": seen.image_states}
    with patch.object(decoder, "prepare_inputs_for_generation", all_at_once):
        return decoder.generate(**inputs, **options)


# ------------------------------------------------------------------------------------------------- a simulated card


class AsOnCuda(TorchFunctionMode):
    """
    Gives a simulated card the two kernels that CUDA has and that torch spells out for tensors without data: the norm,
    and attention that never holds all its weights. Counts them, and the copies of inputs that the norm needs in a row.
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
    """Counts what a card is asked to compute; views and empty memory cost it nothing."""

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
    """Inside, tensors can lie on a card that is not there, and those that do are counted."""
    # Tensors of inference mode lose their fake device on the way.
    with torch.inference_mode(False), simulate_devices.simulated_machine() as meter, AsOnCuda() as kernels:
        yield meter, kernels


@contextmanager
def on_a_card(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[simulate_devices.DeviceMeter, AsOnCuda]]:
    """Inside, a model on the meta device is on a simulated card."""
    with simulated_card() as found:
        put_on_a_card(model, dtype)
        yield found


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
    """What two more layers (of QLLaMA: one with cross-attention, one without) add to a pass, for one; and copies."""
    counts, copies = [], []
    for layers in (2, 4):
        model = make(layers)
        with on_a_card(model, dtype) as (_, kernels):
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
    """The most memory that a call needs beyond the weights, in bfloat16, of the joint model."""
    model = joint_model()
    with on_a_card(model, torch.bfloat16) as (meter, _):
        before = meter.alive[CARD]
        meter.restart()
        work(model)
        return (meter.peak[CARD] - before) / 1e6
