"""
What differs between the supported releases of transformers, and every undocumented name of a library.

No other module at the root names a version, or a name that a library does not document; those that transformers looks
up on a class stay on the class (`_tp_plan`, `_no_split_modules`, ...), those of sentence-transformers in its module.
Each entry says when it can go. tests/test_compat.py has a test for each; docs/versions.md has the tested releases.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

OLDEST = (4, 57)
# Releases that break a feature: (package, version, feature, reason). That feature alone is refused there. Features are
# "loading", "device maps", "captions", "training" and "sentence-transformers".
KNOWN_BAD: tuple[tuple[str, str, str, str], ...] = (
    ("transformers", "5.0.0", "device maps", "methods other than `forward` cannot find the weights"),
)


def release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def check_release(installed: str) -> None:
    """Say which transformers is needed, where an import would fail later with the name of a module."""
    if release(installed) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        problem = f"InternVL-14B needs transformers {wanted} or newer, and {installed} is installed"
        raise ImportError(f"{problem}: pip install --upgrade transformers")


def refuse_known_bad(feature: str) -> None:
    """Raise `RuntimeError` where an installed release is listed with this feature in `KNOWN_BAD`."""
    for package, bad, broken, reason in KNOWN_BAD:
        try:
            listed = broken == feature and version(package) == bad
        except PackageNotFoundError:
            continue
        if listed:
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
    from transformers import CLIPImageProcessorPil
except ImportError:  # in 5.1 the plain name is the PIL one; goes when 5.8 is the oldest
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil  # noqa: F401

# The dtype of a model that is loaded without one: since 5.0 the config's. Goes with 4.57.
DEFAULT_DTYPE = "auto" if VERSION >= (5, 0) else torch.float32
# The kinds in `output_loading_info`. Goes when transformers documents them.
LOADING_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")
# Whether tensors that were handed over, not read from files, can be offloaded to the disk. Goes with 4.57.
CAN_OFFLOAD_A_STATE = VERSION >= (5, 0)

# Read once, as layers ask for them at every step.
MASK_ARGUMENTS = set(inspect.signature(create_causal_mask).parameters)
CACHE_TAKES_POSITION = "cache_kwargs" in inspect.signature(Cache.update).parameters
# 5.24 calls `past_key_values` `cache`; goes when 5.24 is the oldest.
CACHE_NAME = "cache" if "cache" in MASK_ARGUMENTS else "past_key_values"

# ---------------------------------------------------------------------------------------------------------- attention


def attention_name(config: Any) -> str | None:
    """The `attn_implementation` of a config. Goes when configs document a public name."""
    return config._attn_implementation


def set_attention_name(config: Any, name: str) -> None:
    """Goes with `attention_name`."""
    config._attn_implementation = name


def attention_function(name: str | None, eager: Callable) -> Callable:
    """A function of transformers' registry. `get_interface` is new in 5.0; goes with 4.57."""
    if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]


def causal_mask(config: Any, states: torch.Tensor, padding: torch.Tensor | None, cache: Any, see_all: bool) -> Any:
    """`create_causal_mask`, whose arguments differ between 5.1, 5.8, 5.15 and 5.24; goes when 5.24 is the oldest."""
    arguments: dict[str, Any] = {"config": config, "attention_mask": padding, CACHE_NAME: cache}
    arguments["inputs_embeds" if "inputs_embeds" in MASK_ARGUMENTS else "input_embeds"] = states  # [B, L, C]
    if "cache_position" in MASK_ARGUMENTS:
        past = 0 if cache is None else cache.get_seq_length()
        arguments["cache_position"] = torch.arange(states.shape[1], device=states.device) + past
    if see_all:
        arguments["or_mask_function"] = lambda batch, head, query, key: query >= 0
    return create_causal_mask(**arguments)


# ----------------------------------------------------------------------------------------------------- caches, generate

# What `generate` passes to every forward, whether it takes it or not: the positions up to 5.1, the tokenizer always.
PASSED_BY_GENERATE = {"tokenizer"} | (
    {"cache_position"} & set(inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters)
)
# What `generate` takes beside the fields of a generation config: `tokenizer` is read, and not in its signature.
ARGUMENTS_OF_GENERATE = {"tokenizer", *inspect.signature(GenerationMixin.generate).parameters} - {
    "self",
    "inputs",
    "kwargs",
}


def either_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache, under whichever of its two names it was given."""
    if past_key_values is not None and cache is not None:
        raise ValueError("`cache` and `past_key_values` are one argument under two names, got both.")
    return cache if past_key_values is None else past_key_values


def check_unexpected(arguments: dict[str, Any]) -> None:
    """Refuse what is no argument of a forward, but for `PASSED_BY_GENERATE`."""
    for name in arguments:
        if name not in PASSED_BY_GENERATE:
            raise TypeError(f"forward() got an unexpected keyword argument '{name}'")


def update_cache(
    cache: Cache, layer_idx: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append keys and values [B, heads, L, head_dim] to a layer; return all of it. Goes when 5.8 is the oldest."""
    if not CACHE_TAKES_POSITION:
        return cache.update(key, value, layer_idx)
    # Each layer has its own length here: the layers before this one are already ahead.
    position = torch.arange(key.shape[2], device=key.device) + cache.get_seq_length(layer_idx)
    return cache.update(key, value, layer_idx, {"cache_position": position})


def copy_cache(source: Cache, target: Cache) -> Cache:
    """Append all that a dynamic cache holds to another cache. Goes when caches have a documented copy."""
    for index, layer in enumerate(source.layers):
        update_cache(target, index, layer.keys, layer.values)
    return target


CACHE_KINDS = ("dynamic", "dynamic_full", "offloaded", "quantized", "static", "offloaded_static")


def cache_of_kind(asked: GenerationConfig, prefix: Cache, config: Any, length: int) -> Cache:
    """
    A filled dynamic cache as the kind that a generation config asks for, which `generate` does not make where it is
    given a cache. Goes when it can fill a cache of its own from another one.

    Args:
        asked (`GenerationConfig`): what it says of caches and of reading a prompt in parts is done, and taken out.
        length (`int`): positions that a static cache has to hold.

    Raises:
        `ValueError`: a `cache_implementation` that is none of `CACHE_KINDS`, or a static one with flex_attention.
    """
    kind, options, longest = (
        getattr(asked, name, None) for name in ("cache_implementation", "cache_config", "max_cache_len")
    )
    asked.cache_implementation = asked.cache_config = asked.prefill_chunk_size = None
    if kind is None or kind in ("dynamic", "dynamic_full"):
        return prefix
    if kind not in CACHE_KINDS:
        raise ValueError(f"`cache_implementation` must be one of {', '.join(CACHE_KINDS)}, got {kind!r}.")
    if "static" in kind and attention_name(config) == "flex_attention" and VERSION >= (5, 0):
        # The mask of 5.x reads its offset from the cache, which has moved on when the mask is used: transformers' own
        # models write other tokens too (5.15, 5.24) or fail (5.23). Goes when tests/test_compat.py says so.
        problem = "this transformers writes wrong tokens with a static cache and flex_attention"
        raise ValueError(f"`cache_implementation={kind!r}`: {problem}. Use another cache or `attn_implementation`.")
    if kind == "offloaded":
        return copy_cache(prefix, DynamicCache(config=config, offloading=True))
    if kind == "quantized":
        options = {"backend": "quanto", "config": config, **(options or {})}
        try:
            cache = QuantizedCache(**options)
        except ModuleNotFoundError as error:  # older releases let it through as it is
            package = {"quanto": "optimum-quanto"}.get(options["backend"].lower(), options["backend"].lower())
            raise ImportError(f"`cache_implementation='quantized'` needs {package}: pip install {package}") from error
        return copy_cache(prefix, cache)
    length = max(length, longest or 0)
    length += -length % 64  # compiled steps serve every cache of one size
    return copy_cache(prefix, StaticCache(config=config, max_cache_len=length, offloading="offloaded" in kind))


# -------------------------------------------------------------------------------------------- processors, pipelines


def name_image_processor(processor_class: type) -> type:
    """Decorate a processor: 4.57 wants its image processor's class named, 5.x warns where it is. Goes with 4.57."""
    if VERSION < (5, 0):
        processor_class.image_processor_class = "CLIPImageProcessor"  # type: ignore[attr-defined]
    return processor_class


def pipeline_task(arguments: dict[str, Any]) -> str | None:
    """The task of the pipeline that calls `from_pretrained`, if one does. Goes when pipelines document how to tell."""
    return arguments.get("_from_pipeline")


# ----------------------------------------------------------------------------------------------------- models, training


def under_hook(method: Callable) -> Callable:
    """
    Run a public method as accelerate runs `forward`, the only one that its hooks know: parameters that sit on the model
    itself are there although offloaded, and results come back to the device of the inputs. Not to be nested.
    Goes when accelerate can hook other methods.
    """

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        hook = getattr(self, "_hf_hook", None)
        if hook is None:
            return method(self, *args, **kwargs)
        args, kwargs = hook.pre_forward(self, *args, **kwargs)
        return hook.post_forward(self, method(self, *args, **kwargs))

    return call


def is_loaded(parameter: torch.Tensor) -> bool:
    """
    Whether a checkpoint filled a parameter, where `_init_weights` writes to a slice of it. Goes when transformers
    guards slices as it guards whole parameters.
    """
    return getattr(parameter, "_is_hf_initialized", False)


def recompute_by_default(stack: Any) -> None:
    """
    What `gradient_checkpointing_enable` sets, for a stack that recomputes without having been told to. Goes, with
    `recomputed`, when transformers has a public name for the function.
    """
    stack._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def recomputed(stack: Any, layer: nn.Module) -> Callable:
    """A layer's call, recomputed in the backward pass as `gradient_checkpointing_enable` was told to."""
    return partial(stack._gradient_checkpointing_func, layer.__call__)


# -------------------------------------------------------------------------------------------------------------- loading


def ignore_in_checkpoint(model: Any, patterns: list[str]) -> None:
    """
    Set the names (regular expressions) that a checkpoint of the joint model may have beyond those of `model`. To be
    called after `post_init`, which since 5.0 collects those of the submodules, a list that is not its own. Goes when
    transformers documents a way.
    """
    is_set = isinstance(model._keys_to_ignore_on_load_unexpected, set)
    model._keys_to_ignore_on_load_unexpected = set(patterns) if is_set else list(patterns)


# How `_tp_plan` is spelt. Up to 5.0 a split layer whose output is gathered is called "colwise_rep". 4.57 reads each
# digit of a name as "*", so that `fc1` and `fc2` have to share one style there. Goes when 5.1 is the oldest.
GATHERED = "colwise_rep" if VERSION < (5, 1) else "colwise_gather_output"
VISION_MLP = {"fc*": GATHERED} if VERSION < (5, 0) else {"fc1": "colwise", "fc2": "rowwise"}


def collect_tp_plan(model: Any) -> None:
    """
    Set the plan that the classes name and nothing else: 4.57 drops a class's own, 5.23 adds the embeddings. Goes when
    `post_init` leaves a class's plan as it is.
    """
    plan = dict(type(model)._tp_plan)
    for name, part in model.named_children():
        plan |= {f"{name}.{layer}": style for layer, style in getattr(part, "_tp_plan", {}).items()}
    model._tp_plan = plan


@contextmanager
def root_parameters_in_tensor_parallel() -> Iterator[None]:
    """
    Let 4.57 load parameters that belong to the model itself, such as `logit_scale`, in tensor parallel: it splits every
    name into those of a module and of its parameter, and fails where there is no dot. Goes with 4.57.
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
    """
    torchao's reader splits every name that its writer lists at a dot; those of root parameters have none. Goes when
    torchao reads what it wrote, which 0.18 does not.
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
