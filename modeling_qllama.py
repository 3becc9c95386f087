"""QLLaMA, the language tower of InternVL-14B (InternVL paper, arXiv:2312.14238, section 3.2; docs/model.md, "QLLaMA").

A LLaMA decoder with cross-attention in its even layers: a sequence may start with learnable queries, and only those
queries cross-attend to the vision tower's tokens. The three ways to run it need no special attention mask:

* image:          the queries alone, which attend bidirectionally;
* text:           plain causal attention;
* image + prompt: the queries attend only to each other; the prompt follows, and attends to all queries and causally to
                  itself. The queries can be run into a cache first; tokens decoded from it never enter the
                  cross-attention.

Where this file differs from the original implementation, and why:
* Rotary angles are computed when needed: no buffer that could be lost on the meta device, no table lookup.
* Keys and values are kept in transformers' `Cache` objects: dynamic, static or quantised, as `generate` creates them.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention_internvl import RegistryAttention, RMSNorm, run_layers
from .compat_internvl import (
    CACHE_NAME,
    PASSED_BY_GENERATE,
    attention_name,
    causal_mask,
    is_loaded,
    resolve_cache,
    set_checkpoint_function,
    update_cache,
)
from .configuration_intern_vit import InternVisionConfig  # noqa: F401 - some loaders copy direct imports only
from .configuration_internvl import QLlamaConfig
from .loading_internvl import InternPreTrainedModel


def attention_mask_for(
    config: QLlamaConfig,
    hidden_states: torch.Tensor,
    padding_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    bidirectional: bool,
) -> Any:
    """Build the mask that the configured attention function expects, or None if it needs none.

    Args:
        hidden_states (`torch.Tensor`): [B, L, C], the input of the first layer.
        padding_mask (`torch.Tensor`, *optional*): [B, past + L], 1 for real tokens.
        bidirectional (`bool`): every position attends to every real token, not only to those before it.
    """
    if bidirectional and padding_mask is None:
        return None
    implementation = attention_name(config)
    if bidirectional and padding_mask is not None and implementation in ("eager", "sdpa"):
        visible = padding_mask[:, None, None].bool()  # [B, 1, 1, L]; transformers would allocate [B, 1, L, L]
        if implementation == "sdpa":
            return visible
        lowest = torch.finfo(hidden_states.dtype).min
        return torch.zeros_like(visible, dtype=hidden_states.dtype).masked_fill(visible.logical_not(), lowest)
    return causal_mask(config, hidden_states, padding_mask, past_key_values, bidirectional)


def rotary_angles(config: QLlamaConfig, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Cosines and sines of the rotary positions (RoFormer, arXiv:2104.09864).

    Args:
        position_ids (`torch.Tensor`): [1 or B, L]

    Returns:
        Two tensors [1 or B, L, 1, head_dim] in `dtype`, computed in float32. The first half of the sines is negative.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    channels = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (channels / head_dim)  # [head_dim / 2]
    angles = (position_ids.unsqueeze(-1).float() * frequencies).unsqueeze(2)  # [1 or B, L, 1, head_dim / 2]
    cosines, sines = angles.cos(), angles.sin()
    return torch.cat([cosines, cosines], dim=-1).to(dtype), torch.cat([-sines, sines], dim=-1).to(dtype)


def rotate(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (i, i + head_dim / 2) of [B, L, heads, head_dim] by its position's angle."""
    # Rolling by half swaps the two channels of a pair; the sines carry the sign.
    return torch.addcmul(states * cosines, states.roll(states.shape[-1] // 2, -1), sines)


class QLlamaMLP(nn.Module):
    def __init__(self, config: QLlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class QLlamaAttention(RegistryAttention):
    """Self-attention with rotary positions: bidirectional for the first positions, causal for the rest."""

    def __init__(self, config: QLlamaConfig, layer_idx: int):
        heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
        head_dim = config.hidden_size // heads
        super().__init__(config, heads, head_dim, groups, config.attention_dropout)
        self.layer_idx = layer_idx
        self.q_proj = nn.Linear(config.hidden_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, ...],
        attention_mask: Any,
        past_key_values: Cache | None,
        num_bidirectional: int,
    ) -> torch.Tensor:
        projections = (self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states))
        query, key, value = (states.unflatten(-1, (-1, self.head_dim)) for states in projections)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # [B, heads, L, head_dim]
        if past_key_values is not None:
            key, value = update_cache(past_key_values, self.layer_idx, key, value)
        first, length = num_bidirectional, hidden_states.shape[1]
        if first == length:
            return self.o_proj(self.attend(query, key, value, attention_mask))
        states = self.attend(query, key, value, attention_mask, is_causal=True)
        if first:
            # Causal attention is wrong for these positions. Computing them again avoids a dense mask.
            states_first = self.attend(query[:, :, :first], key[:, :, :first], value[:, :, :first])
            states = torch.cat([states_first, states[:, first:]], dim=1)
        return self.o_proj(states)


class QLlamaCrossAttention(RegistryAttention):
    """Attention of the queries to the vision tokens, without a mask and without rotary positions."""

    def __init__(self, config: QLlamaConfig):
        width, encoder_width = config.hidden_size, config.encoder_hidden_size
        super().__init__(config, config.num_attention_heads, width // config.num_attention_heads)
        norm = partial(RMSNorm, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.norm1 = norm(width)
        self.k_proj = nn.Linear(encoder_width, width, bias=False)
        self.v_proj = nn.Linear(encoder_width, width, bias=False)
        self.norm2 = norm(encoder_width)

    def forward(self, queries: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        query = self.split_heads(self.q_proj(self.norm1(queries)))
        context = self.norm2(encoder_hidden_states)
        key, value = self.split_heads(self.k_proj(context)), self.split_heads(self.v_proj(context))
        if len(key) == 1:  # one image for many texts: compute its keys and values once
            key, value = (states.expand(len(query), -1, -1, -1) for states in (key, value))
        return self.o_proj(self.attend(query, key, value))


class QLlamaDecoderLayer(nn.Module):
    def __init__(self, config: QLlamaConfig, layer_idx: int, with_cross_attention: bool = True):
        super().__init__()
        norm = partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps)
        self.num_query_token = config.num_query_token
        self.self_attn = QLlamaAttention(config, layer_idx)
        has_cross_attention = with_cross_attention and layer_idx % config.cross_attention_frequency == 0
        self.cross_attn = QLlamaCrossAttention(config) if has_cross_attention else None
        self.mlp = QLlamaMLP(config)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, ...],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        num_bidirectional: int = 0,
    ) -> torch.Tensor:
        states = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(
            states, rotary, attention_mask, past_key_values, num_bidirectional
        )
        if self.cross_attn is not None and encoder_hidden_states is not None:
            sizes = [self.num_query_token, hidden_states.shape[1] - self.num_query_token]
            queries, text = hidden_states.split(sizes, dim=1)
            queries = queries + self.cross_attn(queries, encoder_hidden_states)
            hidden_states = torch.cat([queries, text], dim=1)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class QLlamaPreTrainedModel(InternPreTrainedModel):
    config_class = QLlamaConfig
    main_input_name = "input_ids"
    base_model_prefix = "model"
    _no_split_modules = ["QLlamaDecoderLayer"]
    _skip_keys_device_placement = QLlamaConfig.keys_to_ignore_at_inference
    _keep_unquantized = ("lm_head",)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and not is_loaded(module.weight):
            nn.init.zeros_(module.weight[module.padding_idx])


class QLlamaModel(QLlamaPreTrainedModel):
    """QLLaMA without its language head.

    Args:
        config ([`QLlamaConfig`]): sizes and options.
        with_cross_attention (`bool`): `False` leaves out the cross-attentions, which text alone does not need.
    """

    # Split by heads and by MLP channels. `embed_tokens` and `lm_head` are not split: 49,954 is not divisible by 4.
    _tp_plan = {
        **{f"layers.*.{part}.{name}_proj": "colwise" for part in ("self_attn", "cross_attn") for name in "qkv"},
        **{f"layers.*.{part}.o_proj": "rowwise" for part in ("self_attn", "cross_attn")},
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    def __init__(self, config: QLlamaConfig, with_cross_attention: bool = True):
        super().__init__(config)
        layers = [QLlamaDecoderLayer(config, i, with_cross_attention) for i in range(config.num_hidden_layers)]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        set_checkpoint_function(self)
        self.post_init()

    def position_ids_for(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.Tensor:
        """Positions [1 or B, L] of new states [B, L, C]: real tokens are counted from 0."""
        length = hidden_states.shape[1]
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        return (torch.arange(length, device=hidden_states.device) + past).unsqueeze(0)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        num_bidirectional: int = 0,
        cache: Cache | None = None,
    ) -> tuple[Any, ...] | BaseModelOutputWithPast:
        """Run queries, text or both through all layers.

        Args:
            input_ids (`torch.Tensor`): [B, L] token ids, or `inputs_embeds` [B, L, C] instead.
            attention_mask (`torch.Tensor`, *optional*): [B, past + L], 1 for real tokens, 0 for padding. Not needed
                for right-padded text: real tokens never attend to the padding after them.
            position_ids (`torch.Tensor`, *optional*): [1 or B, L]; by default they count the real tokens from 0.
            past_key_values, cache (`Cache`, *optional*): keys and values of earlier positions, under either of its two
                names; extended in place.
            use_cache (`bool`, *optional*): return a cache; defaults to the config's value, and to `False` in training.
            output_hidden_states (`bool`, *optional*): also return the embeddings and the output of every layer.
            return_dict (`bool`, *optional*): `False` for a plain tuple.
            encoder_hidden_states (`torch.Tensor`, *optional*): [1 or B, tokens, vision width], the vision tokens. The
                first `config.num_query_token` positions are queries and cross-attend to them.
            num_bidirectional (`int`): number of leading positions that attend bidirectionally, and only to each other;
                L makes the whole sequence bidirectional.

        Returns:
            `BaseModelOutputWithPast`: `last_hidden_state` [B, L, C] after the final norm.

        Raises:
            `ValueError`: neither or both of `input_ids` and `inputs_embeds` were given, both names of the cache were
                given, there are fewer positions than queries, or `num_bidirectional` is too large or follows a cache.
        """
        cache = resolve_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [B, L, C]
        length = hidden_states.shape[1]
        if encoder_hidden_states is not None and length < self.config.num_query_token:
            queries = self.config.num_query_token
            raise ValueError(f"With an image the sequence must start with {queries} queries, got {length} positions.")
        if num_bidirectional and (
            not 0 < num_bidirectional <= length or (cache is not None and cache.get_seq_length())
        ):
            raise ValueError(f"`num_bidirectional` must be at most {length}, and 0 with a filled cache.")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if position_ids is None:
            position_ids = self.position_ids_for(hidden_states, attention_mask, cache)
        bidirectional = num_bidirectional == length
        mask = attention_mask_for(self.config, hidden_states, attention_mask, cache, bidirectional)
        hidden_states, all_states = run_layers(
            self,
            hidden_states,
            output_hidden_states,
            rotary_angles(self.config, position_ids, hidden_states.dtype),
            mask,
            cache,
            encoder_hidden_states,
            num_bidirectional,
        )
        output = BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), hidden_states=all_states, **{CACHE_NAME: cache}
        )
        return output.to_tuple() if return_dict is False else output


class QLlamaTextEncoder(QLlamaPreTrainedModel):
    """QLLaMA for reading texts: without cross-attentions and language head, with the checkpoint's names."""

    def __init__(self, config: QLlamaConfig):
        super().__init__(config)
        self.model = QLlamaModel(config, with_cross_attention=False)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...] | BaseModelOutputWithPast:
        """As [`QLlamaModel.forward`]."""
        return self.model(*args, **kwargs)


class QLlamaForCausalLM(QLlamaPreTrainedModel, GenerationMixin):
    """QLLaMA with its language head, which writes captions."""

    def __init__(self, config: QLlamaConfig):
        super().__init__(config)
        self.model = QLlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | CausalLMOutputWithPast:
        """Run [`QLlamaModel`] and the language head.

        Args:
            logits_to_keep (`int`): number of last positions to compute logits for; 0 for all.
            others: see [`QLlamaModel.forward`]. `generate` looks in this signature for those that are named here.

        Returns:
            `CausalLMOutputWithPast`: `logits` [B, kept, vocabulary].
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in PASSED_BY_GENERATE}
        output = self.model(input_ids, attention_mask, position_ids, **kwargs)
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        output = CausalLMOutputWithPast(
            logits=logits, hidden_states=output.hidden_states, **{CACHE_NAME: getattr(output, CACHE_NAME)}
        )
        return output.to_tuple() if return_dict is False else output


__all__ = ["QLlamaForCausalLM", "QLlamaModel", "QLlamaTextEncoder"]
