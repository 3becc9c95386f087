"""Building blocks of both towers and of the heads: RMSNorm, attention, and the loop over layers.

Attention functions come from transformers' registry (`attn_implementation="eager" | "sdpa" | "flash_attention_2"`, and
others), so the model runs on every device.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .compat_internvl import attention_function, attention_name, recomputed


class RMSNorm(nn.RMSNorm):
    """RMSNorm; faster in float32 on the CPU, where torch has no fused kernel."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        is_float32_on_cpu = states.device.type == "cpu" and states.dtype == self.weight.dtype == torch.float32
        if not is_float32_on_cpu or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(states)
        # In place, which autograd would forbid: allocating memory takes longer than the arithmetic.
        scale = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        scale.square_().div_(states.shape[-1]).add_(self.eps).rsqrt_()
        return (states * scale).mul_(self.weight)


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
    """Eager attention with the registry's signature: [B, heads, N, head_dim] in, [B, N, heads, head_dim] out."""
    if module.num_key_value_groups > 1:
        key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling  # [B, heads, N, S]
    if attention_mask is not None:
        scores = scores + attention_mask
    # Softmax in float32: bfloat16 has too few digits to sum hundreds of weights.
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class RegistryAttention(nn.Module):
    """Base class of all attention modules, with the attributes that transformers' attention functions read.

    Args:
        config: a config whose `attn_implementation` names the attention function.
        num_heads (`int`), head_dim (`int`): shape of the queries.
        num_key_value_groups (`int`): query heads per key/value head.
        dropout (`float`): dropout rate of the attention weights in training.
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

    def attention_function(self, dtype: torch.dtype, has_mask: bool) -> Callable[..., Any]:
        """Look up the configured function in the registry."""
        name = attention_name(self.config)
        if name is not None and name.startswith("flash") and dtype == torch.float32:
            # FlashAttention has no float32 kernels. SDPA replaces it, but cannot read its masks.
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
        """Attend with the configured function.

        Args:
            query (`torch.Tensor`): [B, heads, N, head_dim]; key and value [B, key/value heads, S, head_dim].
            attention_mask (*optional*): in the form that the configured implementation expects.
            is_causal (`bool`): whether attention is causal; the queries are the last N of the S positions.

        Returns:
            `torch.Tensor`: [B, N, heads * head_dim]
        """
        # A dense mask includes causality, and a single query attends to everything before it. FlashAttention's 2-D mask
        # holds only the padding, so it needs the flag.
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


def run_layers(
    stack: Any, hidden_states: torch.Tensor, output_hidden_states: bool, *arguments: Any
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """Run `stack.layers` in order. If `stack.gradient_checkpointing` is set (by `gradient_checkpointing_enable`, or by
    default in the vision tower), training recomputes their activations in the backward pass.

    Returns:
        The last output and, if requested, the input of every layer followed by the last output.
    """
    recompute = stack.gradient_checkpointing and stack.training and torch.is_grad_enabled()
    all_states = [hidden_states]
    for layer in stack.layers:
        call = recomputed(stack, layer) if recompute else layer
        hidden_states = call(hidden_states, *arguments)
        if output_hidden_states:
            all_states.append(hidden_states)
    return hidden_states, tuple(all_states) if output_hidden_states else None
