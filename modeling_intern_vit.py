"""InternViT-6B, the vision tower of InternVL-14B (InternVL paper, arXiv:2312.14238, section 3.2; docs/model.md, "Vision
tower").

A plain pre-norm vision transformer with three particulars: RMSNorm instead of LayerNorm, an RMSNorm over *all* channels
of the queries and keys before they are split into heads, and LayerScale on both branches. It has no final norm.

Where this file differs from the original implementation, and why:
* Attention comes from transformers' registry instead of a vendored FlashAttention, so it runs on every device.
* Scaling a branch and adding it is one operation.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from .attention_internvl import RegistryAttention, RMSNorm, run_layers
from .compat_internvl import GATHERED, VISION_MLP, ignore_in_checkpoint, set_checkpoint_function
from .configuration_intern_vit import InternVisionConfig
from .loading_internvl import InternPreTrainedModel

logger = logging.get_logger(__name__)

# Patterns of the tensors that a checkpoint of the joint model has besides the vision tower.
NOT_INTERN_VIT = [r"^qllama\.", r"^clip_projector2?\.", r"^itm_head\.", r"^(query_tokens|text_projection|logit_scale)$"]


def interpolate_positions(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Fit a square position table to another grid (docs/model.md, "Position interpolation").

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
    """Cut an image into patches, embed them, prepend the class token and add positions."""

    def __init__(self, config: InternVisionConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        width, num_positions = config.hidden_size, 1 + config.position_grid**2
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(1, num_positions, width))

    def check_pixels(self, pixel_values: Any) -> None:
        """Require a batch of images whose sides are multiples of the patch size."""
        if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
            kind = getattr(pixel_values, "dtype", type(pixel_values).__name__)
            raise TypeError(f"`pixel_values` must be a floating-point tensor, normalised by the processor, got {kind}.")
        shape, patch = tuple(pixel_values.shape), self.patch_size
        if len(shape) != 4 or shape[1] != self.num_channels or shape[0] == 0:
            raise ValueError(f"`pixel_values` must be [batch, {self.num_channels}, height, width], got {list(shape)}.")
        if shape[2] % patch or shape[3] % patch or 0 in shape:
            raise ValueError(f"The sides of `pixel_values` must be multiples of {patch}, got {shape[2]} x {shape[3]}.")

    def warn_about_interpolation(self, pixel_values: torch.Tensor) -> None:
        """Warn once per size: it may be intended, or the processor may belong to another checkpoint."""
        side = round((self.position_embedding.shape[1] - 1) ** 0.5) * self.patch_size
        height, width = pixel_values.shape[-2:]
        if (height, width) != (side, side) and not torch.compiler.is_compiling():
            logger.warning_once(
                f"The images have {height} x {width} pixels, but the checkpoint's positions are for {side} x {side}:"
                " they are interpolated. If this is not intended, load the processor of this checkpoint."
            )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.check_pixels(pixel_values)
        self.warn_about_interpolation(pixel_values)
        patches = self.patch_embedding(pixel_values.to(self.class_embedding.dtype))  # [B, C, H, W]
        height, width = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2)  # [B, H * W, C]
        tokens = torch.cat([self.class_embedding.expand(len(tokens), -1, -1), tokens], dim=1)  # [B, 1 + H * W, C]
        return tokens + interpolate_positions(self.position_embedding, height, width)


class InternAttention(RegistryAttention):
    """Full self-attention over the tokens of an image, with normalised queries and keys."""

    def __init__(self, config: InternVisionConfig):
        width = config.hidden_size
        heads = config.num_attention_heads
        super().__init__(config, heads, width // heads, dropout=config.attention_dropout)
        norm = partial(RMSNorm, width, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        # Over all channels at once, not per head, so a tensor-parallel rank needs the channels of all ranks.
        self.q_norm = norm() if config.qk_normalization else nn.Identity()
        self.k_norm = norm() if config.qk_normalization else nn.Identity()
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)  # each [B, N, C]
        query, key, value = map(self.split_heads, (self.q_norm(query), self.k_norm(key), value))
        return self.proj_drop(self.proj(self.attend(query, key, value)))


class InternMLP(nn.Module):
    def __init__(self, config: InternVisionConfig):
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): drop a residual branch for whole samples, scaling up the others."""

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
        width = config.hidden_size
        self.attn = InternAttention(config)
        self.mlp = InternMLP(config)
        self.norm1 = RMSNorm(width, eps=config.layer_norm_eps)
        self.norm2 = RMSNorm(width, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(torch.full((width,), config.initializer_factor))
        self.ls2 = nn.Parameter(torch.full((width,), config.initializer_factor))
        self.drop_path = DropPath(drop_path_rate)

    def add_branch(self, hidden_states: torch.Tensor, scale: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """Add a residual branch with its LayerScale."""
        return torch.addcmul(hidden_states, scale, self.drop_path(branch))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.add_branch(hidden_states, self.ls1, self.attn(self.norm1(hidden_states)))
        return self.add_branch(hidden_states, self.ls2, self.mlp(self.norm2(hidden_states)))


class InternVisionEncoder(nn.Module):
    """The stack of layers. Gradient checkpointing is on by default in training (docs/model.md, "Vision tower")."""

    def __init__(self, config: InternVisionConfig):
        super().__init__()
        depth = config.num_hidden_layers
        rates = [config.drop_path_rate * index / max(depth - 1, 1) for index in range(depth)]
        self.layers = nn.ModuleList([InternVisionEncoderLayer(config, rate) for rate in rates])
        self.gradient_checkpointing = True
        set_checkpoint_function(self)

    def forward(
        self, hidden_states: torch.Tensor, output_hidden_states: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        return run_layers(self, hidden_states, output_hidden_states)


class InternVisionModel(InternPreTrainedModel):
    """InternViT without a head (docs/model.md, "Vision tower").

    Args:
        config ([`InternVisionConfig`]): sizes and options.
    """

    config_class = InternVisionConfig
    base_model_prefix = "vision_model"
    # Weights are split, heads are not: 25 is divisible by neither 2 nor 4, and `q_norm` and `k_norm` span all heads. So
    # every rank gathers all channels and computes all heads, which costs little compared to the projections.
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
        """Interpolate the position table to another image size and keep it (docs/model.md, "Position interpolation").

        Args:
            old_size (`int`): image side in pixels that the table is made for.
            new_size (`int`): image side in pixels to fit it to.
            patch_size (`int`): side of a patch in pixels.

        Raises:
            `ValueError`: if the table is not made for `old_size`, or a size is not a multiple of `patch_size`.
        """
        table = self.embeddings.position_embedding
        if patch_size != self.config.patch_size:
            raise ValueError(f"`patch_size` must be the model's own, {self.config.patch_size}, got {patch_size}.")
        if not isinstance(new_size, int) or new_size <= 0 or new_size % patch_size:
            raise ValueError(f"`new_size` must be a positive multiple of {patch_size}, got {new_size}.")
        if old_size < 0 or old_size % patch_size or table.shape[1] != 1 + (old_size // patch_size) ** 2:
            raise ValueError(f"`old_size` {old_size} does not fit the table, which has {table.shape[1]} positions.")
        grid = new_size // patch_size
        resized = interpolate_positions(table.detach(), grid, grid)
        self.embeddings.position_embedding = nn.Parameter(resized.clone(), requires_grad=table.requires_grad)
        # A saved model must be rebuilt with a table of this size.
        self.config.force_image_size = new_size

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pixel_embeds: torch.Tensor | None = None,
    ) -> tuple[Any, ...] | BaseModelOutputWithPooling:
        """Turn images into vision tokens.

        Args:
            pixel_values (`torch.Tensor`): [B, 3, H, W], normalised by the processor; H and W are multiples of the
                patch size, square or not. Floats of another precision are cast to the model's dtype.
            output_hidden_states (`bool`, *optional*): also return the embeddings and the output of every layer.
            return_dict (`bool`, *optional*): `False` for a plain tuple.
            pixel_embeds (`torch.Tensor`): [B, 1 + N, C], embedded tokens to use instead of `pixel_values`.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` [B, 1 + N, C], class token first; `pooler_output` [B, C],
            the unchanged class token; `hidden_states`, layers + 1 times [B, 1 + N, C].

        Raises:
            `ValueError`, `TypeError`: neither or both inputs were given, or one has a wrong shape or dtype.
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


__all__ = ["InternVisionModel"]
