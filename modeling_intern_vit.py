"""
InternViT-6B, the vision tower of InternVL-14B (InternVL paper, arXiv:2312.14238, section 3.2; SPEC, "Vision tower").

A plain pre-norm vision transformer with three particulars: RMSNorm instead of LayerNorm, an RMSNorm over *all* channels
of the queries and keys before they are split into heads, and LayerScale on both branches. It has no final norm.

Where this file differs from the original implementation, and why:
* Attention goes through transformers' registry (`attn_implementation="eager" | "sdpa" | "flash_attention_2" | ...`)
  instead of a vendored FlashAttention, so that it runs on every device.
* Norms are torch's `rms_norm`, apex's when it is installed, or, in float32 on the CPU, two passes of our own.
* Scaling a branch and adding it is one operation.

The base classes at the top serve all three modeling files.
"""

import os
import re
from collections.abc import Callable, Iterable
from copy import copy, deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import logging

from .compat_internvl import (
    CAN_OFFLOAD_A_STATE,
    DEFAULT_DTYPE,
    GATHERED,
    LOADING_PROBLEMS,
    VISION_MLP,
    attention_function,
    attention_name,
    collect_tp_plan,
    ignore_in_checkpoint,
    recompute_by_default,
    recomputed,
    refuse_known_bad,
    root_parameters_in_tensor_parallel,
    save_quantized_root_parameters,
)
from .configuration_intern_vit import InternVisionConfig

logger = logging.get_logger(__name__)

# The config's names for the ranks of the original's LoRA adapters, and what these are multiplied with: alpha / r.
LORA_RANKS = ("use_backbone_lora", "use_qllama_lora")
LORA_SCALING = 2.0

# What a checkpoint of the joint model has beside the vision tower, as patterns of names.
NOT_INTERN_VIT = [r"^qllama\.", r"^clip_projector2?\.", r"^itm_head\.", r"^(query_tokens|text_projection|logit_scale)$"]


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm; faster in float32 on the CPU, where torch has no fused kernel."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        plain = states.device.type == "cpu" and states.dtype == self.weight.dtype == torch.float32
        if not plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(states)
        # In place, which gradients would forbid, because fresh memory costs more than the arithmetic.
        scale = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        scale.square_().div_(states.shape[-1]).add_(self.eps).rsqrt_()
        return (states * scale).mul_(self.weight)


def rms_norm_class() -> type[nn.Module]:
    """The RMSNorm to build with: apex's fused one when apex is importable, torch's otherwise (SPEC: float32 inside)."""
    try:
        from apex.normalization import FusedRMSNorm
    except ImportError:
        return RMSNorm
    return FusedRMSNorm


def repeat_key_value(states: torch.Tensor, groups: int) -> torch.Tensor:
    """Repeat every key/value head `groups` times, for grouped queries."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention spelt out, with the registry's signature: [B, heads, N, head_dim] in, [B, N, heads, head_dim] out."""
    key = repeat_key_value(key, module.num_key_value_groups)
    value = repeat_key_value(value, module.num_key_value_groups)
    scores = query @ key.transpose(-1, -2) * scaling  # [B, heads, N, S]
    if attention_mask is not None:
        scores = scores + attention_mask
    # Softmax in float32: bfloat16 has too few digits to sum hundreds of weights.
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class RegistryAttention(nn.Module):
    """
    Base of every attention here: holds what the functions of transformers' attention registry look for on a module.

    Args:
        config: a config whose `attn_implementation` names the attention function.
        num_heads (`int`), head_dim (`int`): shape of the queries.
        num_key_value_groups (`int`): query heads per key/value head.
        dropout (`float`): of the attention weights, in training.
    """

    is_causal = False

    def __init__(self, config: Any, num_heads: int, head_dim: int, num_key_value_groups: int = 1, dropout: float = 0.0):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_key_value_groups = num_key_value_groups
        self.scaling = head_dim**-0.5
        self.dropout = dropout

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """[B, N, heads * head_dim] -> [B, heads, N, head_dim]"""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attention_function(self, dtype: torch.dtype, has_mask: bool) -> Callable:
        """Look the configured function up in the registry."""
        name = attention_name(self.config)
        if name is not None and name.startswith("flash") and dtype == torch.float32:
            # FlashAttention has no float32 kernels, and SDPA does not take its masks.
            if has_mask:
                raise ValueError(f"`attn_implementation={name!r}` needs a model in float16 or bfloat16, got float32.")
            name = "sdpa"
        return attention_function(name, eager_attention_forward)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """
        Args:
            query (`torch.Tensor`): [B, heads, N, head_dim]; key and value [B, key/value heads, S, head_dim].
            attention_mask (*optional*): in whatever form the configured implementation wants it.
            is_causal (`bool`): whether position i of the last N of the S keys sees nothing after itself.

        Returns:
            `torch.Tensor`: [B, N, heads * head_dim]
        """
        # A dense mask already says what is causal, and a single query sees everything before it;
        # FlashAttention's masks are the 2-D padding and leave causality to the flag.
        padding_only = attention_mask is None or getattr(attention_mask, "ndim", 4) == 2
        attention = self.attention_function(value.dtype, attention_mask is not None)
        states, _ = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=query.shape[2] > 1 and is_causal and padding_only,
        )
        return states.flatten(2)


class InternPreTrainedModel(PreTrainedModel):
    """What the towers and the joint model share: fresh weights, strict loading, supported attention functions."""

    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _tp_plan: dict[str, str] = {}
    _keep_unquantized: tuple[str, ...] = ()  # full names of modules, where the user names none

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # torch.nn.init functions only: transformers guards those against overwriting what was loaded.
        is_norm = type(module).__name__ in ("RMSNorm", "FusedRMSNorm", "LayerNorm")
        if not is_norm and not isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            return
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(parameter)
            elif is_norm:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range)

    def post_init(self) -> None:
        """As in transformers; the plan for tensor parallelism is what the classes say and nothing else."""
        super().post_init()
        collect_tp_plan(self)

    def compile_layers(self, **options: Any) -> None:
        """
        Compile what repeats, in place, where `model.compile()` would compile all layers as one: the same code serves
        every layer, so that it takes seconds however deep the model is. Quantised models on the CPU need it.

        Args:
            options: of `torch.compile`, such as `mode`.
        """
        for module in self.modules():
            kind = type(module).__name__
            if kind in ("InternVisionEncoderLayer", "QLlamaMLP"):
                module.compile(**options)
            elif kind in ("QLlamaAttention", "QLlamaCrossAttention"):
                # Not as a whole: a layer's own place in the cache would make each of them a case of its own.
                for part in module.children():
                    part.compile(**options)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would guess from the source text of each module

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        strict: bool = True,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        As in transformers, but strict: tensors that the checkpoint lacks, has in another shape or has too many are an
        error, where transformers would only log them and go on with random weights.

        Args:
            strict (`bool`): pass `False` to accept such a checkpoint, as when new heads are added for fine-tuning.

        Raises:
            `ValueError`: names the tensors that are missing, superfluous or of another shape. Before anything is read:
                what is wrong with `device_map` or `max_memory`, or the size that so many processes cannot share.

        A checkpoint with adapters of the original's fine-tuning (`use_backbone_lora`, `use_qllama_lora`) is read into
        RAM whole, and its adapters are added to its weights.
        """
        checkpoint = pretrained_model_name_or_path
        refuse_known_bad("loading")
        if kwargs.get("device_map") is not None:
            refuse_known_bad("device maps")
        if strict:
            kwargs["ignore_mismatched_sizes"] = True  # transformers' own error names no tensor; ours below does
        ranks = tensor_parallel_ranks(**kwargs)
        cls._check_plan(checkpoint, kwargs, ranks)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = with_skip_list(kwargs["quantization_config"], cls._keep_unquantized)
        try:
            source, plain_kwargs = cls._without_adapters(checkpoint, kwargs)
            with root_parameters_in_tensor_parallel():
                model, info = super().from_pretrained(source, *model_args, output_loading_info=True, **plain_kwargs)
        except SafetensorError as error:
            raise OSError(f"{_damaged_files(checkpoint, kwargs.get('subfolder', ''))}: {error}") from error
        if source is not checkpoint:  # transformers was not told where all this comes from
            model.name_or_path = model.config.name_or_path = str(checkpoint)
            if model.can_generate():
                model.generation_config = _generation_config(checkpoint, kwargs) or model.generation_config
        problems = {kind: info[kind] for kind in LOADING_PROBLEMS if info.get(kind)}
        if strict and problems:
            listed = "; ".join(f"{kind}: {_abbreviate(names)}" for kind, names in problems.items())
            raise ValueError(f"The checkpoint does not fit {cls.__name__} ({listed}). `strict=False` loads it anyhow.")
        save_quantized_root_parameters(model)
        return (model, info) if output_loading_info else model

    @classmethod
    def _check_plan(cls, checkpoint: Any, kwargs: dict[str, Any], ranks: int) -> None:
        """Refuse a plan that cannot work; write out what a `device_map` says of "all the rest"."""
        device_map, max_memory = kwargs.get("device_map"), kwargs.get("max_memory")
        quantised_by = getattr(kwargs.get("quantization_config"), "quant_method", None)
        if quantised_by == "torchao" and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("`device_map` offloads to the disk, which a model that torchao quantises cannot do.")
        if ranks > 1:
            check_ranks(cls._config_for(checkpoint, kwargs), ranks)
        # Not every release reads a checkpoint of a single file for {"": "disk"}; written out they do.
        if isinstance(device_map, dict) and (set(device_map) != {""} or device_map[""] == "disk"):
            kwargs["device_map"] = complete_device_map(cls._empty_model(checkpoint, kwargs), device_map)
        elif isinstance(device_map, str) and max_memory and kwargs.get("quantization_config") is None:
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype", DEFAULT_DTYPE))
            if isinstance(dtype, str):
                dtype = cls._config_for(checkpoint, kwargs).dtype if dtype == "auto" else getattr(torch, dtype)
            check_budgets(cls._empty_model(checkpoint, kwargs), max_memory, dtype or torch.float32)

    @classmethod
    def _without_adapters(cls, checkpoint: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A source and arguments that load the same: if the checkpoint has adapters, its weights with them added."""
        if checkpoint is None or kwargs.get("state_dict") is not None:
            return checkpoint, kwargs
        config = cls._config_for(checkpoint, kwargs)
        fields = vars(config)
        if not set(LORA_RANKS) & set(fields):  # the vision tower's own config, made from that of the joint model
            fields, _ = PretrainedConfig.get_config_dict(checkpoint, **_hub_arguments(kwargs))
        if not any(fields.get(name) for name in LORA_RANKS):
            return checkpoint, kwargs
        device_map = kwargs.get("device_map")
        if not CAN_OFFLOAD_A_STATE and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "`device_map` offloads to the disk, which needs a checkpoint without adapters: save it first."
            )
        state = read_checkpoint(checkpoint, **_hub_arguments(kwargs))
        if not any(".lora_" in name for name in state):
            return checkpoint, kwargs  # adapters that were never trained change nothing
        config = deepcopy(config)
        for name in set(LORA_RANKS) & set(vars(config)):
            setattr(config, name, 0)
        return None, kwargs | {"config": config, "state_dict": merge_adapters(state)}

    @classmethod
    def _config_for(cls, checkpoint: Any, kwargs: dict[str, Any]) -> Any:
        """The config that `from_pretrained` will use."""
        config = kwargs.get("config")
        if isinstance(config, PretrainedConfig):
            return config
        others = {name: value for name, value in kwargs.items() if name not in ("config", "device_map", "max_memory")}
        return cls.config_class.from_pretrained(checkpoint, return_unused_kwargs=True, **others)[0]

    @classmethod
    def _empty_model(cls, checkpoint: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
        """The model that `from_pretrained` will fill, without memory for its weights."""
        with torch.device("meta"):
            return cls(cls._config_for(checkpoint, kwargs))


def run_layers(
    stack: Any, hidden_states: torch.Tensor, output_hidden_states: bool, *arguments: Any
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """
    Run `stack.layers` one after the other, recomputing activations in the backward pass if the stack's
    `gradient_checkpointing` flag (set by `gradient_checkpointing_enable`) says so.

    Returns:
        The last output, and the input of every layer followed by the last output if asked for.
    """
    recompute = stack.gradient_checkpointing and stack.training and torch.is_grad_enabled()
    all_states = [hidden_states]
    for layer in stack.layers:
        call = recomputed(stack, layer) if recompute else layer
        hidden_states = call(hidden_states, *arguments)
        if output_hidden_states:
            all_states.append(hidden_states)
    return hidden_states, tuple(all_states) if output_hidden_states else None


def interpolate_positions(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """
    Fit a square position table to another grid (SPEC, "Vision tower": float32, bicubic, `align_corners=False`).

    Args:
        table (`torch.Tensor`): [1, 1 + G * G, C], the class position first.
        height, width (`int`): patches of the grid wanted.

    Returns:
        `torch.Tensor`: [1, 1 + height * width, C] in the table's dtype; the table itself if it fits.
    """
    side = round((table.shape[1] - 1) ** 0.5)
    if (height, width) == (side, side):
        return table
    grid = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, C, G, G]
    grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


class InternVisionEmbeddings(nn.Module):
    """Cut a picture into patches, embed them, put the class token in front and add positions."""

    def __init__(self, config: InternVisionConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        self.image_size = config.image_size
        width, num_positions = config.hidden_size, 1 + config.position_grid**2
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(1, num_positions, width))

    def check_pixels(self, pixel_values: Any) -> None:
        """Refuse what is not a batch of pictures in whole patches."""
        if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
            kind = getattr(pixel_values, "dtype", type(pixel_values).__name__)
            raise TypeError(f"`pixel_values` must be a floating-point tensor, normalised by the processor, got {kind}.")
        shape, patch = tuple(pixel_values.shape), self.patch_size
        if len(shape) != 4 or shape[1] != self.num_channels or shape[0] == 0:
            raise ValueError(f"`pixel_values` must be [batch, {self.num_channels}, height, width], got {list(shape)}.")
        if shape[2] % patch or shape[3] % patch or 0 in shape:
            raise ValueError(f"The sides of `pixel_values` must be multiples of {patch}, got {shape[2]} x {shape[3]}.")

    def warn_of_another_size(self, pixel_values: torch.Tensor) -> None:
        """Once for each size: another one may be meant, or the processor may be another checkpoint's."""
        side = round((self.position_embedding.shape[1] - 1) ** 0.5) * self.patch_size
        height, width = pixel_values.shape[-2:]
        if (height, width) != (side, side) and not torch.compiler.is_compiling():
            logger.warning_once(
                f"The pictures have {height} x {width} pixels and the checkpoint's positions are for {side} x {side}:"
                " they are interpolated. If that is not meant, the processor is another checkpoint's."
            )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.check_pixels(pixel_values)
        self.warn_of_another_size(pixel_values)
        patches = self.patch_embedding(pixel_values.to(self.class_embedding.dtype))  # [B, C, H, W]
        height, width = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2)  # [B, H * W, C]
        tokens = torch.cat([self.class_embedding.expand(len(tokens), -1, -1), tokens], dim=1)  # [B, 1 + H * W, C]
        return tokens + interpolate_positions(self.position_embedding, height, width)


class InternAttention(RegistryAttention):
    """Full self-attention over the tokens of a picture, with normalised queries and keys."""

    def __init__(self, config: InternVisionConfig):
        width = config.hidden_size
        heads = config.num_attention_heads
        super().__init__(config, heads, width // heads, dropout=config.attention_dropout)
        norm = partial(rms_norm_class(), width, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        # Over all channels at once, not per head: a rank of a tensor-parallel group cannot compute it alone.
        self.q_norm = norm() if config.qk_normalization else nn.Identity()
        self.k_norm = norm() if config.qk_normalization else nn.Identity()
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)  # each [B, N, C]
        query, key, value = map(self.split_heads, (self.q_norm(query), self.k_norm(key), value))
        states = self.proj(self.attend(query, key, value))
        return self.proj_drop(states) if self.training else states


class InternMLP(nn.Module):
    def __init__(self, config: InternVisionConfig):
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): drop a residual branch for whole samples, scaling up those that remain."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return branch
        keep = torch.full((len(branch), 1, 1), 1 - self.rate, dtype=branch.dtype, device=branch.device)
        return branch * keep.bernoulli() / (1 - self.rate)


class InternVisionEncoderLayer(nn.Module):
    def __init__(self, config: InternVisionConfig, drop_path_rate: float):
        super().__init__()
        width, norm = config.hidden_size, rms_norm_class()
        self.attn = InternAttention(config)
        self.mlp = InternMLP(config)
        self.norm1 = norm(width, eps=config.layer_norm_eps)
        self.norm2 = norm(width, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(torch.full((width,), config.initializer_factor))
        self.ls2 = nn.Parameter(torch.full((width,), config.initializer_factor))
        self.drop_path = DropPath(drop_path_rate)

    def add(self, hidden_states: torch.Tensor, scale: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """Add a branch with its LayerScale."""
        return torch.addcmul(hidden_states, scale, self.drop_path(branch) if self.training else branch)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.add(hidden_states, self.ls1, self.attn(self.norm1(hidden_states)))
        return self.add(hidden_states, self.ls2, self.mlp(self.norm2(hidden_states)))


class InternVisionEncoder(nn.Module):
    """The stack of layers. Gradient checkpointing is on by default in training, as in the original (SPEC)."""

    def __init__(self, config: InternVisionConfig):
        super().__init__()
        depth = config.num_hidden_layers
        rates = [config.drop_path_rate * index / max(depth - 1, 1) for index in range(depth)]
        self.layers = nn.ModuleList([InternVisionEncoderLayer(config, rate) for rate in rates])
        self.gradient_checkpointing = True
        recompute_by_default(self)

    def forward(
        self, hidden_states: torch.Tensor, output_hidden_states: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        return run_layers(self, hidden_states, output_hidden_states)


class InternVisionModel(InternPreTrainedModel):
    """
    InternViT without a head (SPEC, "Vision tower").

    Args:
        config ([`InternVisionConfig`]): sizes and options.
    """

    config_class = InternVisionConfig
    base_model_prefix = "vision_model"
    # Weights are split, heads are not: 25 divide by neither 2 nor 4, and `q_norm` and `k_norm` span them all. So every
    # rank gathers all channels and attends with all heads, which is little work beside the projections.
    _tp_plan = {
        "encoder.layers.*.attn.qkv": GATHERED,
        "encoder.layers.*.attn.proj": GATHERED,
        **{f"encoder.layers.*.mlp.{layer}": style for layer, style in VISION_MLP.items()},
    }
    _no_split_modules = ["InternVisionEmbeddings", "InternVisionEncoderLayer"]

    def __init__(self, config: InternVisionConfig):
        super().__init__(config)
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)
        self.post_init()
        ignore_in_checkpoint(self, NOT_INTERN_VIT)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, InternVisionEmbeddings):
            nn.init.trunc_normal_(module.class_embedding, std=self.config.initializer_range)
            nn.init.trunc_normal_(module.position_embedding, std=self.config.initializer_range)
        elif isinstance(module, InternVisionEncoderLayer):
            nn.init.constant_(module.ls1, self.config.initializer_factor)
            nn.init.constant_(module.ls2, self.config.initializer_factor)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    def resize_pos_embeddings(self, old_size: int, new_size: int, patch_size: int) -> None:
        """
        Interpolate the position table to another picture size and keep it (SPEC, "Vision tower").

        Args:
            old_size (`int`): side in pixels that the table stands for now.
            new_size (`int`): side in pixels to fit it to.
            patch_size (`int`): side of a patch in pixels.

        Raises:
            `ValueError`: if the table is not that of `old_size`, or a size is not a multiple of the patch.
        """
        table = self.embeddings.position_embedding
        if patch_size != self.config.patch_size:
            raise ValueError(f"`patch_size` must be the model's own, {self.config.patch_size}, got {patch_size}.")
        if not isinstance(new_size, int) or new_size <= 0 or new_size % patch_size:
            raise ValueError(f"`new_size` must be a positive multiple of {patch_size}, got {new_size}.")
        if old_size < 0 or old_size % patch_size or table.shape[1] != 1 + (old_size // patch_size) ** 2:
            raise ValueError(f"`old_size` {old_size} does not belong to a table of {table.shape[1]} positions.")
        grid = new_size // patch_size
        resized = interpolate_positions(table.detach(), grid, grid)
        self.embeddings.position_embedding = nn.Parameter(resized.clone(), requires_grad=table.requires_grad)
        # A saved model must be built with the table it has.
        self.config.force_image_size = new_size

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pixel_embeds: torch.Tensor | None = None,
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.Tensor`): [B, 3, H, W], normalised by the processor; H and W are multiples of the
                patch, square or not. Floats of another precision are brought to the model's.
            output_hidden_states (`bool`, *optional*): also return the embeddings and the output of every layer.
            return_dict (`bool`, *optional*): `False` for a plain tuple.
            pixel_embeds (`torch.Tensor`): [B, 1 + N, C], embedded tokens to use instead of `pixel_values`.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` [B, 1 + N, C], class token first; `pooler_output` [B, C],
            the class token as it is; `hidden_states`, layers + 1 times [B, 1 + N, C].

        Raises:
            `ValueError`, `TypeError`: neither or both inputs, or one of a wrong shape or dtype.
        """
        if (pixel_values is None) == (pixel_embeds is None):
            raise ValueError("Exactly one of `pixel_values` and `pixel_embeds` must be given.")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if pixel_embeds is None:
            pixel_embeds = self.embeddings(pixel_values)
        elif not isinstance(pixel_embeds, torch.Tensor) or not pixel_embeds.is_floating_point():
            kind = getattr(pixel_embeds, "dtype", type(pixel_embeds).__name__)
            raise TypeError(f"`pixel_embeds` must be a floating-point tensor, got {kind}.")
        elif pixel_embeds.ndim != 3 or pixel_embeds.shape[-1] != self.config.hidden_size:
            expected = f"[batch, tokens, {self.config.hidden_size}]"
            raise ValueError(f"`pixel_embeds` must be {expected}, got {list(pixel_embeds.shape)}.")
        last_hidden_state, hidden_states = self.encoder(pixel_embeds, output_hidden_states)
        output = BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state, pooler_output=last_hidden_state[:, 0], hidden_states=hidden_states
        )
        return output.to_tuple() if return_dict is False else output


# ------------------------------------------------------------------------------------------------------------- loading


def blocks_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that must stay on one device, by name."""
    return {name: module for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules}


def complete_device_map(model: PreTrainedModel, device_map: dict[str, Any]) -> dict[str, Any]:
    """
    Write out what the key "" of a map, "all the rest", stands for, which accelerate cannot mix with other keys. What
    sits on the model itself stays in memory if it is to go to the disk: accelerate offloads modules only.

    Raises:
        `ValueError`: a key that is no part of the model, a part without a device, or a block on several devices.
    """
    devices = devices_by_map(model, device_map)
    completed = {key: device for key, device in device_map.items() if key}
    for name, _ in model.named_parameters(recurse=False):
        completed[name] = "cpu" if devices[name] == "disk" else devices[name]
    for name, device in devices.items():
        if not any(is_part(name, key) for key in completed):
            # The largest part around this parameter that no other key speaks of.
            steps = name.split(".")
            parts = [".".join(steps[: depth + 1]) for depth in range(len(steps))]
            completed[next(part for part in parts if not any(is_part(key, part) for key in completed))] = device
    return completed


def is_part(name: str, whole: str) -> bool:
    """Whether a module or parameter is another one, or in it; everything is in the model, whose name is ""."""
    return whole in ("", name) or name.startswith(f"{whole}.")


def devices_by_map(model: PreTrainedModel, device_map: dict[str, Any]) -> dict[str, Any]:
    """The device of every parameter, by name; it raises what [`complete_device_map`] lists."""
    known = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    if unknown := sorted(set(device_map) - set(known)):
        raise ValueError(f"`device_map` names what {type(model).__name__} does not have: {_abbreviate(unknown)}.")
    keys = {name: [key for key in device_map if is_part(name, key)] for name, _ in model.named_parameters()}
    if missing := [name for name, found in keys.items() if not found]:
        raise ValueError(f'`device_map` gives no device, nor one for "" (all the rest), to {_abbreviate(missing)}.')
    devices = {name: device_map[max(found, key=len)] for name, found in keys.items()}
    for block in blocks_of(model):
        places = {str(device) for name, device in devices.items() if is_part(name, block)}
        if len(places) > 1:
            raise ValueError(f"`device_map` splits {block}, which must stay whole, over {', '.join(sorted(places))}.")
    return devices


def check_budgets(model: PreTrainedModel, max_memory: dict[Any, Any], dtype: torch.dtype) -> None:
    """
    Raises:
        `ValueError`: the budget of an accelerator is not 0, which leaves it out, and too small for the largest block.
    """
    try:
        from accelerate.utils import convert_file_size_to_int
    except ImportError as error:
        raise ImportError("`device_map` needs accelerate: pip install accelerate") from error

    sizes = {name: sum(tensor.numel() for tensor in block.parameters()) for name, block in blocks_of(model).items()}
    largest = max(sizes, key=lambda name: sizes[name])
    needed = sizes[largest] * dtype.itemsize
    for device, budget in max_memory.items():
        given = convert_file_size_to_int(budget) if isinstance(budget, str) else budget
        if device not in ("cpu", "disk") and 0 < given < needed:
            raise ValueError(
                f"`max_memory` gives {int(given):,} bytes to device {device}, and the largest block, {largest}, needs"
                f" {needed:,} in {dtype}. Give it more, or 0 to leave it out."
            )


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained` that say where a checkpoint lies."""
    names = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def _generation_config(checkpoint: Any, kwargs: dict[str, Any]) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(checkpoint, **_hub_arguments(kwargs))
    except OSError:  # the checkpoint has none
        return None


def read_checkpoint(checkpoint: Any, subfolder: str = "", **hub_arguments: Any) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in a folder or on the Hub, by name."""
    if not os.path.isdir(checkpoint):
        patterns = ["*model*.safetensors", "*pytorch_model*.bin"]
        checkpoint = snapshot_download(checkpoint, allow_patterns=patterns, **hub_arguments)
    folder = Path(checkpoint, subfolder)
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise OSError(f"{folder} holds no weights, neither model*.safetensors nor pytorch_model*.bin.")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        pickled = file.suffix == ".bin"
        state |= torch.load(file, map_location="cpu", weights_only=True, mmap=True) if pickled else load_file(file)
    return state


def merge_adapters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The plain weights of a checkpoint of the original's fine-tuning with LoRA (arXiv:2106.09685), which had PEFT wrap a
    tower: W + 2 B A, alpha being 2 r, and names without what PEFT adds; newer PEFT calls what it adapts `base_layer`.

    Raises:
        `ValueError`: half an adapter, or one without the weights that it adapts.
    """
    plain: dict[str, torch.Tensor] = {}
    adapters: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        name = re.sub(r"(^|\.)base_model\.model\.", r"\1", name)
        half = re.fullmatch(r"(.+)\.lora_([AB])\.default\.weight", name)
        if half:
            adapters.setdefault(half[1], {})[half[2]] = tensor
        else:
            plain[name.replace(".base_layer.", ".")] = tensor
    for module, halves in adapters.items():
        weight = plain.get(f"{module}.weight")
        if weight is None or set(halves) != {"A", "B"}:
            raise ValueError(f"The checkpoint's adapter of {module} is not whole: it has {sorted(halves)}.")
        change = halves["B"].float() @ halves["A"].float()
        plain[f"{module}.weight"] = torch.add(weight.float(), change, alpha=LORA_SCALING).to(weight.dtype)
    return plain


def with_skip_list(quantization_config: Any, modules: Iterable[str]) -> Any:
    """
    A copy of a quantisation config that leaves `modules` as they are; the config itself if it has a list of its own.

    Args:
        quantization_config: of transformers, or the dict of one.
        modules (iterable of `str`): full names of modules.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(dict(quantization_config))
    for name in ("modules_to_not_convert", "llm_int8_skip_modules"):
        if modules and getattr(quantization_config, name, ()) is None:
            quantization_config = copy(quantization_config)
            setattr(quantization_config, name, list(modules))
    return quantization_config


def tensor_parallel_ranks(
    tp_plan: Any = None, tp_size: int | None = None, distributed_config: Any = None, **others: Any
) -> int:
    """Among how many processes these arguments of `from_pretrained` split each layer; 1 for no tensor parallelism."""
    asked = distributed_config if isinstance(distributed_config, dict) else getattr(distributed_config, "__dict__", {})
    tp_plan, tp_size = asked.get("tp_plan", tp_plan), asked.get("tp_size", tp_size)
    return tp_size or (1 if tp_plan is None else int(os.environ.get("WORLD_SIZE", 1)))


def check_ranks(config: Any, ranks: int) -> None:
    """Refuse a number of processes that cannot share the split layers (`_tp_plan`) evenly, before anything is read."""
    for part in [getattr(config, name) for name in config.sub_configs] or [config]:
        for name in ("num_key_value_heads", "hidden_size", "intermediate_size"):
            size = getattr(part, name, 0)
            if size % ranks:
                problem = f"{name}={size} of {part.model_type} does not divide by {ranks}"
                raise ValueError(f"{ranks} processes cannot share the model by tensor parallelism: {problem}.")


def _damaged_files(checkpoint: Any, subfolder: str) -> str:
    """The safetensors files of a local checkpoint that cannot be read, or the checkpoint's name."""
    damaged = []
    for file in sorted(Path(checkpoint, subfolder).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError:
            damaged.append(str(file))
    return ", ".join(damaged) or str(checkpoint)


def _abbreviate(names: Any, most: int = 5) -> str:
    names = sorted(str(name) for name in names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


__all__ = ["InternVisionModel"]
