"""Differences between the supported releases of transformers, and all undocumented names of libraries.

No other module at the root contains a version or an undocumented name. Exceptions: attributes that transformers reads
from a class (`_tp_plan`, `_no_split_modules`, ...), and the names that sentence-transformers needs in its module. Four
workarounds for "some releases" stand where they act: unused imports of configurations (they go with 4.57), the mask of
static caches in prompts, completed device maps, and classes registered by name (they go when no release needs them).
Each workaround says when it can go. tests/model/test_compat.py tests each; docs/versions.md lists the releases.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

OLDEST = (4, 57)
# Releases that break a feature: (package, version, feature, reason). Only this feature is refused. The features are
# "loading", "device maps", "captions", "training" and "sentence-transformers".
KNOWN_BAD: tuple[tuple[str, str, str, str], ...] = (
    ("transformers", "5.0.0", "device maps", "methods other than `forward` cannot find the weights"),
)


def release(text: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def check_release(installed: str) -> None:
    """Raise an `ImportError` that names the oldest supported release; later imports would fail less clearly."""
    if release(installed) < OLDEST:
        problem = f"InternVL-14B needs transformers {OLDEST[0]}.{OLDEST[1]} or newer, but {installed} is installed"
        raise ImportError(f"{problem}: pip install --upgrade transformers")


def refuse_known_bad(feature: str) -> None:
    """Raise a `RuntimeError` if `KNOWN_BAD` lists an installed release with this feature."""
    for package, bad, broken, reason in KNOWN_BAD:
        with suppress(PackageNotFoundError):
            if broken == feature and version(package) == bad:
                advice = f"Install another release: pip install --upgrade {package}"
                raise RuntimeError(f"{package} {bad} breaks {feature}: {reason}. {advice}")


check_release(transformers.__version__)
VERSION = release(transformers.__version__)

from transformers import (  # noqa: E402
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    QuantizedCache,
    StaticCache,
)
from transformers.masking_utils import create_causal_mask  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

try:
    from transformers import CLIPImageProcessorPil as CLIPImageProcessorPil
except ImportError:  # up to 5.1 the plain name is the PIL class; goes when 5.8 is the oldest
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil  # noqa: F401

# 4.57 cannot offload a `state_dict` argument to the disk, and loads a model without `dtype` in float32, not in the
# config's. Both names go with 4.57.
CAN_OFFLOAD_A_STATE = VERSION >= (5, 0)
DEFAULT_DTYPE = "auto" if VERSION >= (5, 0) else torch.float32
# The kinds in `output_loading_info`. Goes when transformers documents them.
LOADING_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def arguments_of(function: Callable[..., Any]) -> set[str]:
    """Names of a function's arguments. They are read once, because layers need them at every step."""
    return set(inspect.signature(function).parameters)


MASK_ARGUMENTS = arguments_of(create_causal_mask)
CACHE_TAKES_POSITION = "cache_kwargs" in arguments_of(Cache.update)
# 5.24 calls `past_key_values` `cache`; goes when 5.24 is the oldest, with the older name in QLlamaConfig's
# `keys_to_ignore_at_inference` and in QLlamaModel's `forward`.
CACHE_NAME = "cache" if "cache" in MASK_ARGUMENTS else "past_key_values"

# ---------------------------------------------------------------------------------------------------------- attention


def attention_name(config: Any) -> str | None:
    """The `attn_implementation` of a config. Goes when configs document a public attribute."""
    return config._attn_implementation


def set_attention_name(config: Any, name: str) -> None:
    """Set the `attn_implementation` of a config. Goes with `attention_name`."""
    config._attn_implementation = name


def attention_function(name: str | None, eager: Callable[..., Any]) -> Callable[..., Any]:
    """Look up the attention function. Goes when 5.1, the first release with `get_interface`, is the oldest."""
    return eager if name in (None, "eager") else ALL_ATTENTION_FUNCTIONS[name]


def causal_mask(config: Any, states: torch.Tensor, padding: Any, cache: Any, bidirectional: bool) -> Any:
    """`create_causal_mask`, whose arguments differ between 5.1, 5.8, 5.15 and 5.24; goes when 5.24 is the oldest."""
    arguments: dict[str, Any] = {"config": config, "attention_mask": padding, CACHE_NAME: cache}
    arguments["inputs_embeds" if "inputs_embeds" in MASK_ARGUMENTS else "input_embeds"] = states  # [B, L, C]
    if "cache_position" in MASK_ARGUMENTS:
        past = 0 if cache is None else cache.get_seq_length()
        arguments["cache_position"] = torch.arange(states.shape[1], device=states.device) + past
    if bidirectional:
        arguments["or_mask_function"] = lambda batch, head, query, key: query >= 0
    return create_causal_mask(**arguments)


# ----------------------------------------------------------------------------------------------------- caches, generate

# Arguments that `generate` passes to every forward: always `tokenizer`; up to 5.1 also `cache_position`.
PASSED_BY_GENERATE = {"tokenizer"} | ({"cache_position"} & arguments_of(GenerationMixin.prepare_inputs_for_generation))
# What `generate` takes besides the fields of a generation config; `tokenizer` is missing from its signature.
ARGUMENTS_OF_GENERATE = {"tokenizer"} | arguments_of(GenerationMixin.generate) - {"self", "inputs", "kwargs"}


def resolve_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache, given under either of its two names."""
    if past_key_values is not None and cache is not None:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: pass only one of them.")
    return cache if past_key_values is None else past_key_values


def update_cache(cache: Cache, layer_idx: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Append keys and values [B, heads, L, head_dim]; return all of the layer's. Goes when 5.8 is the oldest."""
    if not CACHE_TAKES_POSITION:
        return cache.update(key, value, layer_idx)
    # The layer's own length: earlier layers are already updated.
    position = torch.arange(key.shape[2], device=key.device) + cache.get_seq_length(layer_idx)
    return cache.update(key, value, layer_idx, {"cache_position": position})


def copy_cache(source: Cache, target: Cache) -> Cache:
    """Append the contents of a dynamic cache to another cache. Goes when caches have a documented copy."""
    for index, layer in enumerate(source.layers):
        update_cache(target, index, layer.keys, layer.values)
    return target


CACHE_KINDS = ("dynamic", "dynamic_full", "offloaded", "quantized", "static", "offloaded_static")


def convert_cache(requested: GenerationConfig, prefix: Cache, config: Any, length: int) -> Cache:
    """Convert a filled dynamic cache to the kind that a generation config requests, which `generate` ignores if it is
    given a cache. Goes when `generate` can fill its own cache from another one.

    Args:
        requested (`GenerationConfig`): its fields about caches and chunked prefill are applied, then reset.
        length (`int`): positions that a static cache has to hold.

    Raises:
        `ValueError`: a `cache_implementation` that is not in `CACHE_KINDS`, or a static one with flex_attention.
    """
    kind, options, longest = (
        getattr(requested, name, None) for name in ("cache_implementation", "cache_config", "max_cache_len")
    )
    requested.cache_implementation = requested.cache_config = requested.prefill_chunk_size = None
    if kind in (None, "dynamic", "dynamic_full"):
        return prefix
    if kind not in CACHE_KINDS:
        raise ValueError(f"`cache_implementation` must be one of {', '.join(CACHE_KINDS)}, got {kind!r}.")
    if "static" in kind and attention_name(config) == "flex_attention" and VERSION >= (5, 0):
        # The mask of 5.x reads its offset from the cache, which has grown by the time the mask is used. transformers'
        # own models also write wrong tokens (5.15, 5.24) or fail (5.23). Goes when tests/model/test_compat.py says so.
        problem = "this transformers writes wrong tokens with a static cache and flex_attention"
        raise ValueError(f"`cache_implementation={kind!r}`: {problem}. Use another cache or `attn_implementation`.")
    if kind == "offloaded":
        return copy_cache(prefix, DynamicCache(config=config, offloading=True))
    if kind == "quantized":
        try:
            cache = QuantizedCache(**{"backend": "quanto", "config": config, **(options or {})})
        except ModuleNotFoundError as error:  # up to 4.57 "No module named 'optimum'"; goes with it
            advice = "pip install optimum-quanto"
            raise ImportError(f"`cache_implementation='quantized'` needs optimum-quanto: {advice}") from error
        return copy_cache(prefix, cache)
    length = max(length, longest or 0)
    length += -length % 64  # caches of equal size share compiled steps
    return copy_cache(prefix, StaticCache(config=config, max_cache_len=length, offloading="offloaded" in kind))


# -------------------------------------------------------------------------------------------- processors, pipelines


def name_image_processor(processor_class: type) -> type:
    """Decorate a processor: 4.57 needs the name of its image processor's class, 5.x warns about it. Goes with 4.57."""
    if VERSION < (5, 0):
        processor_class.image_processor_class = "CLIPImageProcessor"  # type: ignore[attr-defined]
    return processor_class


def pipeline_task(arguments: dict[str, Any]) -> str | None:
    """The task of the pipeline that calls `from_pretrained`, if any. Goes when pipelines document how to tell."""
    return arguments.get("_from_pipeline")


# ----------------------------------------------------------------------------------------------------- models, training


def with_accelerate_hook(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a public method under the hook that accelerate puts on `forward` only: it loads the model's own (root)
    parameters if they are offloaded, and returns results on the device of the inputs. Decorated methods must not call
    each other. Goes when accelerate can hook other methods.
    """

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "_hf_hook"):
            return method(self, *args, **kwargs)
        args, kwargs = self._hf_hook.pre_forward(self, *args, **kwargs)
        return self._hf_hook.post_forward(self, method(self, *args, **kwargs))

    return call


def is_loaded(parameter: torch.Tensor) -> bool:
    """Whether a parameter was loaded. Goes when transformers protects loaded slices as it protects whole parameters."""
    return getattr(parameter, "_is_hf_initialized", False)


def set_checkpoint_function(stack: Any) -> None:
    """Set what `gradient_checkpointing_enable` sets. Goes, with `recomputed`, when transformers has a public name."""
    stack._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def recomputed(stack: Any, layer: nn.Module) -> Callable[..., Any]:
    """A layer's call with gradient checkpointing, using the options of `gradient_checkpointing_enable`."""
    return partial(stack._gradient_checkpointing_func, layer.__call__)


# -------------------------------------------------------------------------------------------------------------- loading


def ignore_in_checkpoint(model: Any, patterns: list[str]) -> None:
    """Set the names (regular expressions) that a checkpoint may have in addition to those of `model`. Call it after
    `post_init`, which up to 5.8 keeps a list and later collects the submodules' patterns in a set. Goes when
    transformers documents a way.
    """
    is_set = isinstance(model._keys_to_ignore_on_load_unexpected, set)
    model._keys_to_ignore_on_load_unexpected = set(patterns) if is_set else list(patterns)


# Styles in `_tp_plan`. Up to 5.0, "colwise_rep" means a split layer whose output is gathered. 4.57 reads each digit of
# a name as "*", so `fc1` and `fc2` must share one style there. Goes when 5.1 is the oldest.
GATHERED = "colwise_rep" if VERSION < (5, 1) else "colwise_gather_output"
VISION_MLP = {"fc*": GATHERED} if VERSION < (5, 0) else {"fc1": "colwise", "fc2": "rowwise"}


def collect_tp_plan(model: Any) -> None:
    """Set the plan to the entries of the classes: 4.57 drops those of the model's own class, 5.23 adds the embeddings.
    Goes when `post_init` does not change a class's plan.
    """
    plan = dict(type(model)._tp_plan)
    for name, part in model.named_children():
        plan |= {f"{name}.{layer}": style for layer, style in getattr(part, "_tp_plan", {}).items()}
    model._tp_plan = plan


@contextmanager
def root_parameters_in_tensor_parallel() -> Iterator[None]:
    """Let 4.57 load parameters of the model itself, such as `logit_scale`, under tensor parallelism: it splits every
    name into module and parameter, and fails on names without a dot. Goes with 4.57.
    """
    if VERSION >= (5, 0):
        yield
        return
    from transformers import modeling_utils

    shard = modeling_utils.shard_and_distribute_module

    def load(model: Any, slices: Any, empty: Any, name: str, dtype: torch.dtype, *others: Any) -> None:
        if "." in name:
            shard(model, slices, empty, name, dtype, *others)
        else:
            setattr(model, name, nn.Parameter(slices[...].to(dtype)))

    modeling_utils.shard_and_distribute_module = load
    try:
        yield
    finally:
        modeling_utils.shard_and_distribute_module = shard


def save_quantized_root_parameters(model: Any) -> None:
    """Let torchao read what it saved: it splits every listed name at a dot, which names of root parameters lack. Goes
    when a later release than 0.18 does not fail on them.
    """
    if not hasattr(model, "hf_quantizer"):
        return
    flatten = model.hf_quantizer.get_state_dict_and_metadata

    def flattened(*args: Any, **kwargs: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
        state, metadata = flatten(*args, **kwargs)
        if "tensor_names" in metadata:
            names = [name for name in json.loads(metadata["tensor_names"]) if "." in name]
            metadata = metadata | {"tensor_names": json.dumps(names)}
        return state, metadata

    model.hf_quantizer.get_state_dict_and_metadata = flattened
