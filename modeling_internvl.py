"""
InternVL-14B: InternViT-6B sees, QLLaMA reads and writes, CLIP-style heads compare.

Paper: InternVL (arXiv:2312.14238). The numbers are those of the published checkpoint (SPEC, "Features and logits",
"Training objectives"); parameter names are its format.

Two ways to embed a picture:
* InternVL-C pools the vision tower's tokens;
* InternVL-G also runs the 96 queries through QLLaMA over the picture, and adds both embeddings.

Where this file differs from the original implementation, and why:
* No attention mask is built but the padding of the matching texts: see modeling_qllama.py.
* Padding may stand on either side: real tokens are brought together before the text is read, and what is padding in
  all texts of a batch is not computed.
* `embed_image`, `embed_text`, `embed_texts`, `match` and `look_at` are new; the original calls beside them keep their
  values and types.
"""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, logging

from .compat_internvl import (
    ARGUMENTS_OF_GENERATE,
    CACHE_NAME,
    cache_of_kind,
    copy_cache,
    ignore_in_checkpoint,
    refuse_known_bad,
    under_hook,
)
from .configuration_intern_vit import InternVisionConfig  # noqa: F401 - some loaders copy direct imports only
from .configuration_internvl import InternVLConfig
from .modeling_intern_vit import InternPreTrainedModel, InternVisionModel, RegistryAttention
from .modeling_qllama import QLlamaForCausalLM, QLlamaTextEncoder

logger = logging.get_logger(__name__)

MODES = ("InternVL-C", "InternVL-G")
# Tensors of the joint checkpoint that its parts have no use for, as patterns of names.
NOT_FOR_CONTRAST = [
    r"^query_tokens$",
    r"^clip_projector2\.",
    r"^itm_head\.",
    r"^qllama\.lm_head\.",
    r"^qllama\..*\.cross_attn\.",
]
NOT_FOR_TEXT = [*NOT_FOR_CONTRAST, r"^vision_model\.", r"^clip_projector\.", r"^logit_scale$"]
NOT_FOR_PICTURES = [*NOT_FOR_CONTRAST, r"^qllama\.", r"^text_projection$", r"^logit_scale$"]
DEFAULT_NEW_TOKENS = 32
MAX_PADDING = 0.1  # of the real tokens of a batch that is made here
MAX_SPARE_IDS = 64  # rows of the embedding table without a piece, which some add for even shapes


@dataclass
class InternVLOutput(ModelOutput):
    """
    What [`InternVLModel`] returns; a field whose input was not given is None.

    Attributes:
        logits_per_image (`torch.Tensor`): [images, texts], cosine similarities times `exp(logit_scale)`.
        logits_per_text (`torch.Tensor`): [texts, images], its transpose.
        last_hidden_state (`torch.Tensor`): [images, 1 + N, vision width], the vision tokens, of pictures alone.
        image_embeds (`torch.Tensor`): [images, clip_embed_dim], of length 1.
        text_embeds (`torch.Tensor`): [texts, clip_embed_dim], of length 1.
        pooler_output (`torch.Tensor`): `image_embeds` of pictures alone, under the name that pipelines look for.
    """

    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None


@dataclass
class InternVLImageOutput(ModelOutput):
    """
    What [`InternVLVisionModelWithProjection`] returns.

    Attributes:
        image_embeds (`torch.Tensor`): [B, clip_embed_dim] in mode InternVL-C, not normalised.
        last_hidden_state (`torch.Tensor`): [B, 1 + N, C], the vision tokens, class token first.
        hidden_states (`tuple(torch.Tensor)`): layers + 1 times [B, 1 + N, C], if asked for.
    """

    image_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class InternVLTextOutput(ModelOutput):
    """
    What [`InternVLTextModelWithProjection`] returns.

    Attributes:
        text_embeds (`torch.Tensor`): [B, clip_embed_dim], not normalised.
        last_hidden_state (`torch.Tensor`): [B, L, C], the states of all tokens; what stands at padding is arbitrary.
    """

    text_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


class InternVLSeen(NamedTuple):
    """
    What the model saw in pictures, computed once by [`InternVLModel.look_at`]. Methods take it in place of
    `pixel_values`, and do not change it.

    Attributes:
        image_states (`torch.Tensor`): [B, 1 + N, vision width], the tokens of the vision tower.
        query_states (`torch.Tensor`): [B, num_query_token, C], the outputs of the queries; None without queries.
        query_cache (`Cache`): keys and values of the queries, for captions; None without queries.
    """

    image_states: torch.Tensor
    query_states: torch.Tensor | None = None
    query_cache: Cache | None = None


@dataclass
class InternVLTrainingOutput(ModelOutput):
    """
    Losses of a training step, scalars; `loss` is their sum.

    Attributes:
        loss_itm (`torch.Tensor`): image-text matching.
        loss_itc (`torch.Tensor`): image-text contrast.
        loss_itg (`torch.Tensor`): image-grounded text generation; None for retrieval.
    """

    loss: torch.Tensor | None = None
    loss_itm: torch.Tensor | None = None
    loss_itc: torch.Tensor | None = None
    loss_itg: torch.Tensor | None = None


# ------------------------------------------------------------------------------------------------------- inputs


def has_values(tensor: torch.Tensor) -> bool:
    """Whether values may be looked at: not on the meta device, not for fake tensors, not while compiling."""
    return type(tensor) is torch.Tensor and tensor.device.type != "meta" and not torch.compiler.is_compiling()


def check_token_ids(name: str, input_ids: Any, attention_mask: Any, vocab_size: int) -> torch.Tensor:
    """
    Refuse what is not a batch of token ids, and return its padding mask.

    Returns:
        `torch.Tensor`: bool [B, L]; without `attention_mask` the recipe of the checkpoint, every id but 0 (SPEC).
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        kind = getattr(input_ids, "dtype", type(input_ids).__name__)
        raise TypeError(f"`{name}` must be a tensor of integer token ids, got {kind}.")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"`{name}` must be a non-empty [batch, length], got {list(input_ids.shape)}.")
    if attention_mask is None:
        mask = input_ids > 0
    elif not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
        shape = list(getattr(attention_mask, "shape", [])) or type(attention_mask).__name__
        raise ValueError(f"The attention mask of `{name}` must be {list(input_ids.shape)} like the ids, got {shape}.")
    else:
        mask = attention_mask.to(input_ids.device) > 0
    if has_values(input_ids):
        _check_token_values(name, input_ids, mask, vocab_size)
    return mask


def _check_token_values(name: str, input_ids: torch.Tensor, mask: torch.Tensor, vocab_size: int) -> None:
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"`{name}` must hold ids in [0, {vocab_size}), got {low if low < 0 else high}.")
    if not bool(mask.any(dim=1).all()):
        raise ValueError(f"`{name}` has a row without a single real token.")


def real_tokens_first(mask: torch.Tensor) -> torch.Tensor:
    """The order [B, L] that brings the real tokens of every row to its left end; it reads no values on the host."""
    return torch.argsort(mask.logical_not().byte(), dim=1, stable=True)


def real_tokens_last(mask: torch.Tensor) -> torch.Tensor:
    """The order [B, L] that brings the real tokens of every row to its right end."""
    return torch.argsort(mask.byte(), dim=1, stable=True)


def without_padding(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Ids and mask [B, L'] with the real tokens first in every row, and without the columns that are padding in all rows,
    as far as values may be looked at.
    """
    order = real_tokens_first(mask)
    longest = int(mask.sum(dim=1).max()) if has_values(mask) else mask.shape[1]
    order = order[:, :longest]
    return input_ids.gather(1, order), mask.gather(1, order)


def put_back(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Bring states [B, L', C] of real tokens to where the mask [B, L] has them; what lands at padding is arbitrary."""
    back = (mask.long().cumsum(dim=1) - 1).clamp(min=0).unsqueeze(-1).to(states.device)
    return states.gather(1, back.expand(-1, -1, states.shape[-1]))


def batches_of_like_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """
    Indices of texts, the longest first, in batches of at most `max_tokens` tokens with padding (one text if it alone is
    longer), of which at most a share of `MAX_PADDING` of the real ones is padding.
    """
    batch: list[int] = []
    real = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        padded = lengths[batch[0]] * (len(batch) + 1) if batch else 0
        if padded > min(max_tokens, (1 + MAX_PADDING) * (real + lengths[index])):
            yield batch
            batch, real = [], 0
        batch.append(index)
        real += lengths[index]
    if batch:
        yield batch


# -------------------------------------------------------------------------------------------------------- heads


class PoolingAttention(RegistryAttention):
    """Attention of one query to the tokens that it is the mean of."""

    def __init__(self, config: InternVLConfig, width: int):
        super().__init__(config, config.attn_pool_num_heads, width // config.attn_pool_num_heads)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.k_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, config.clip_embed_dim)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query = self.split_heads(self.q(query) + self.q_bias)
        key = self.split_heads(self.k(key) + self.k_bias)
        value = self.split_heads(self.v(value) + self.v_bias)
        return self.proj(self.attend(query, key, value))


class AttentionPool(nn.Module):
    """
    Pool tokens into one embedding: their mean attends to them (SPEC, "Features and logits").

    [B, N, width] -> [B, clip_embed_dim]
    """

    def __init__(self, config: InternVLConfig, width: int):
        super().__init__()
        self.norm1_q = nn.LayerNorm(width, eps=1e-5)
        self.norm1_k = nn.LayerNorm(width, eps=1e-5)
        self.norm1_v = nn.LayerNorm(width, eps=1e-5)
        self.cross_attn = PoolingAttention(config, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query = self.norm1_q(tokens.mean(dim=1, keepdim=True))  # [B, 1, width]
        return self.cross_attn(query, self.norm1_k(tokens), self.norm1_v(tokens)).squeeze(1)


# ------------------------------------------------------------------------------------------------------ the model


class InternVLPreTrainedModel(InternPreTrainedModel):
    config_class = InternVLConfig
    base_model_prefix = "internvl"
    _no_split_modules = ["InternVisionEmbeddings", "InternVisionEncoderLayer", "QLlamaDecoderLayer", "AttentionPool"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # Every embedding, match and word passes through one of these. In 8 bits they make a quarter of the error of tiny/'s
    # image embeddings (1 - cosine), and would save 2 % of the bytes at 14B (tools/quantised_sizes.py).
    _keep_unquantized = ("clip_projector", "clip_projector2", "itm_head", "qllama.lm_head")
    saved_as: str | None = None

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As in transformers; `AutoModel` then loads the class named by `saved_as`, or the one that was saved."""
        super().save_pretrained(save_directory, **kwargs)
        self.config.auto_map["AutoModel"] = f"modeling_internvl.{self.saved_as or type(self).__name__}"
        self.config.save_pretrained(save_directory)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PoolingAttention):
            for bias in (module.q_bias, module.k_bias, module.v_bias):
                nn.init.zeros_(bias)
        for name, parameter in module.named_parameters(recurse=False):
            if name == "query_tokens":
                nn.init.zeros_(parameter)
            elif name == "text_projection":
                nn.init.normal_(parameter, std=self.config.initializer_range)
            elif name == "logit_scale":
                nn.init.constant_(parameter, math.log(1 / 0.07))


class TextSide:
    """How texts are read and embedded, for models with `qllama` and `text_projection`."""

    config: Any
    qllama: Any
    text_projection: nn.Parameter

    def check_processor(self, processor: Any) -> None:
        """
        Refuse a processor that does not belong to this checkpoint: its texts and pictures would be taken, and mean
        something else.

        Raises:
            `TypeError`: it is no InternVLProcessor.
            `ValueError`: another vocabulary, other special ids, another prefix, or another picture size.
        """
        if not hasattr(processor, "image_processor") or not hasattr(processor, "default_task"):
            # A tokenizer would leave the recipe out without a word.
            raise TypeError(f"`processor` must be an InternVLProcessor, got {type(processor).__name__}.")
        tokenizer, config = processor.tokenizer, self.config.qllama_config
        if not 0 <= config.vocab_size - len(tokenizer) <= MAX_SPARE_IDS:
            sizes = f"{len(tokenizer):,} pieces, and the model {config.vocab_size:,} ids"
            raise ValueError(f"The tokenizer is another checkpoint's: it has {sizes}.")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(tokenizer, name) != getattr(config, name):
                ids = f"{getattr(tokenizer, name)}, the model's {getattr(config, name)}"
                raise ValueError(f"The tokenizer is another checkpoint's: its `{name}` is {ids}.")
        prefix = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("summarize:"))
        expected = self.config.embed_prefix_ids
        if expected is not None and [config.bos_token_id, *prefix] != list(expected):
            raise ValueError(f"The tokenizer is another checkpoint's: `summarize:` is {prefix}, not {expected[1:]}.")
        size, cropped = self.config.image_size, processor.image_processor.crop_size
        if hasattr(self, "vision_model") and (cropped["height"], cropped["width"]) != (size, size):
            sizes = f"{cropped['height']} x {cropped['width']} pixels, and the model sees {size} x {size}"
            raise ValueError(f"The processor is another checkpoint's: its pictures have {sizes}.")

    def _checked_text(self, input_ids: Any, attention_mask: Any) -> torch.Tensor:
        return check_token_ids("input_ids", input_ids, attention_mask, self.config.qllama_config.vocab_size)

    def _text_states(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Read texts: [B, L] ids -> the states [B, L', C] of the real tokens, first in every row."""
        # With the real tokens first, causal attention needs no padding mask.
        ids, _ = without_padding(input_ids, mask)
        return self.qllama.model(input_ids=ids, use_cache=False).last_hidden_state

    def _pool_text(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, L] ids -> the projected state of each row's last real token [B, clip_embed_dim]"""
        return self._pool_states(self._text_states(input_ids, mask), mask)

    def _pool_states(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """States [B, L', C] with the real tokens first -> the last real one, projected [B, clip_embed_dim]"""
        last = mask.sum(dim=1) - 1  # [B]
        pooled = states[torch.arange(states.shape[0], device=states.device), last.to(states.device)]  # [B, C]
        return pooled @ self.text_projection.to(pooled.device)

    def _ends(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Which rows [B] have `</s>` as their last real token."""
        last = mask.long().cumsum(1).argmax(1, keepdim=True)
        return input_ids.gather(1, last).flatten() == self.config.qllama_config.eos_token_id

    def _begins(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Which rows [B] begin with the prefix; all of them if the config does not say what it is."""
        # Its last id may merge with what follows it.
        prefix = torch.tensor((self.config.embed_prefix_ids or [])[:-1], device=input_ids.device, dtype=input_ids.dtype)
        first = mask.long().argmax(1, keepdim=True)  # [B, 1]
        places = first + torch.arange(len(prefix), device=input_ids.device)
        return (input_ids.gather(1, places.clamp(max=input_ids.shape[1] - 1)) == prefix).all(dim=1)

    def _warn_of_another_recipe(self, input_ids: torch.Tensor, mask: torch.Tensor) -> None:
        if not has_values(input_ids):
            return
        if not bool(self._ends(input_ids, mask).all()):
            logger.warning_once(
                "A text does not end with `</s>`: its embedding is taken where the checkpoint was not trained to put"
                " it. Set `tokenizer.add_eos_token = True`, or use the processor."
            )
        if not bool(self._begins(input_ids, mask).all()):
            logger.warning_once(
                "A text does not begin with `summarize:`: the checkpoint was not trained to embed it. Put it in front,"
                " or use the processor."
            )

    def _text_embeds(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Checked ids [B, L] -> [B, clip_embed_dim], not normalised."""
        mask = self._checked_text(input_ids, attention_mask)
        self._warn_of_another_recipe(input_ids, mask)
        return self._pool_text(input_ids, mask)

    @under_hook
    def embed_text(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, normalize: bool = True
    ) -> torch.Tensor:
        """
        Args:
            input_ids (`torch.Tensor`): [B, L] ids of `<s> summarize:TEXT </s>`, padded on either side.
            attention_mask (`torch.Tensor`, *optional*): [B, L]; without it every id but 0 is real.
            normalize (`bool`): bring the embeddings to length 1; `False` gives the values of `encode_text`.

        Returns:
            `torch.Tensor`: [B, clip_embed_dim]

        Raises:
            `ValueError`, `TypeError`: ids of a wrong shape, dtype or range, a mask of another shape, an empty row.
        """
        embeds = self._text_embeds(input_ids, attention_mask)
        return F.normalize(embeds, dim=-1) if normalize else embeds

    def embed_classes(
        self, processor: Any, names: Sequence[str], templates: Sequence[str] = ("{}",), max_tokens: int = 4096
    ) -> torch.Tensor:
        """
        The text side of zero-shot classification, to be computed once and used for any number of pictures: their
        embeddings `image_embeds @ classes.T` are the cosines.

        Args:
            processor ([`InternVLProcessor`]): of the checkpoint.
            names (sequence of `str`): of the C classes.
            templates (sequence of `str`): texts with a place for the name, `{}` or `{c}`, in any language. The
                embeddings of a name in all of them are averaged.
            max_tokens (`int`): see [`embed_texts`].

        Returns:
            `torch.Tensor`: [C, clip_embed_dim], of length 1, without gradients.

        Raises:
            `ValueError`, `TypeError`: no name, no template, a template without one place for the name, or a processor
                that [`check_processor`] refuses.
        """
        self.check_processor(processor)
        for what, texts in (("names", names), ("templates", templates)):
            if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
                raise TypeError(f"`{what}` must be a list of texts, at least one, got {texts!r}.")
        for template in templates:
            if template.replace("{c}", "{}").count("{}") != 1:
                raise ValueError(f"`templates` must have one place for the name, {{}} or {{c}}, got {template!r}.")
        texts = [template.replace("{c}", "{}").replace("{}", name) for name in names for template in templates]
        # The task is named because the processor's default is another in an image-text-to-text pipeline.
        ids = processor(text=texts, task="embed", padding=False, return_tensors=None).input_ids
        embeds = self.embed_texts(ids, max_tokens).unflatten(0, (len(names), len(templates)))
        return F.normalize(embeds.mean(dim=1), dim=-1)

    @torch.no_grad()
    @under_hook
    def embed_texts(
        self, input_ids: Sequence[Sequence[int]], max_tokens: int = 4096, normalize: bool = True
    ) -> torch.Tensor:
        """
        As [`embed_text`], for any number of texts of any length: they are read in batches of like length, so that
        hardly anything is computed for padding and only one batch is in memory.

        Args:
            input_ids (sequence of sequences of `int`): the ids of each text, `<s> summarize:TEXT </s>`, without
                padding, as `processor(text=..., padding=False, return_tensors=None).input_ids`.
            max_tokens (`int`): of a batch, with padding. A longer text makes a batch alone.
            normalize (`bool`): bring the embeddings to length 1.

        Returns:
            `torch.Tensor`: [T, clip_embed_dim], in the order of the texts, without gradients.

        Raises:
            `ValueError`, `TypeError`: no text, an empty one, what is no id, `max_tokens` less than 1.
        """
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise ValueError(f"`max_tokens` must be a positive integer, got {max_tokens!r}.")
        if not isinstance(input_ids, (list, tuple)) or not input_ids:
            kind = "an empty one" if isinstance(input_ids, (list, tuple)) else type(input_ids).__name__
            raise TypeError(f"`input_ids` must be a list of lists of ids, one for each text, got {kind}.")
        for ids in input_ids:
            if not isinstance(ids, (list, tuple)) or not ids or not all(isinstance(number, int) for number in ids):
                raise ValueError(f"`input_ids` must hold lists of integers, none of them empty, got {ids!r}.")
        embeds: list[torch.Tensor] = []
        order: list[int] = []
        device = self.text_projection.device  # lists have none that the result could come back to
        for batch in batches_of_like_length([len(ids) for ids in input_ids], max_tokens):
            rows = [torch.tensor(input_ids[index]) for index in batch]
            padded = [pad_sequence(each, batch_first=True) for each in (rows, [torch.ones_like(row) for row in rows])]
            embeds.append(self._text_embeds(*(each.to(device) for each in padded)).to(device))
            order += batch
        together = torch.cat(embeds)[torch.tensor(order).argsort()]
        return F.normalize(together, dim=-1) if normalize else together

    @under_hook
    def encode_text(self, text: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The original call: ids [B, L] of `<s> summarize:TEXT </s>` -> [B, clip_embed_dim], not normalised."""
        return self._text_embeds(text, attention_mask)

    @under_hook
    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The original call: the states of all tokens [B, L, C]; what stands at padding is arbitrary."""
        mask = self._checked_text(input_ids, attention_mask)
        return put_back(self._text_states(input_ids, mask), mask)


class ImageSide:
    """How pictures are seen and embedded, for models with `vision_model` and `clip_projector`."""

    config: Any
    vision_model: Any
    clip_projector: Any
    default_mode = "InternVL-C"

    def _checked_mode(self, mode: str | None) -> str:
        mode = self.default_mode if mode is None else mode
        if mode not in MODES:
            raise ValueError(f"`mode` must be one of {MODES}, got {mode!r}.")
        if mode == "InternVL-G":
            self._require_queries("`mode='InternVL-G'`")
        return mode

    def _require_queries(self, what: str) -> None:
        if not hasattr(self, "query_tokens"):
            raise ValueError(f"{what} needs the queries, and this {type(self).__name__} was loaded without them.")

    def _image_states(self, pixel_values: torch.Tensor | InternVLSeen) -> torch.Tensor:
        """[B, 3, H, W] -> the vision tower's tokens [B, 1 + N, vision width]"""
        if isinstance(pixel_values, InternVLSeen):
            return pixel_values.image_states
        return self.vision_model(pixel_values).last_hidden_state

    def _seen(self, pixel_values: torch.Tensor | InternVLSeen) -> InternVLSeen:
        if isinstance(pixel_values, InternVLSeen):
            return pixel_values
        return InternVLSeen(self._image_states(pixel_values))

    def _image_embeds(self, pixel_values: torch.Tensor | InternVLSeen, mode: str | None) -> torch.Tensor:
        """[B, 3, H, W] -> [B, clip_embed_dim], not normalised."""
        self._checked_mode(mode)
        return self.clip_projector(self._image_states(pixel_values))

    @under_hook
    def embed_image(
        self, pixel_values: torch.Tensor | InternVLSeen, mode: str | None = None, normalize: bool = True
    ) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` or [`InternVLSeen`]): [B, 3, H, W], normalised by the processor.
            mode (`str`, *optional*): "InternVL-C", which it is if not given, or "InternVL-G".
            normalize (`bool`): bring the embeddings to length 1; `False` gives the values of `encode_image`.

        Returns:
            `torch.Tensor`: [B, clip_embed_dim]

        Raises:
            `ValueError`, `TypeError`: unknown mode, or pixels of a wrong shape or dtype.
        """
        embeds = self._image_embeds(pixel_values, mode)
        return F.normalize(embeds, dim=-1) if normalize else embeds

    @under_hook
    def encode_image(self, image: torch.Tensor, mode: str | None = None) -> torch.Tensor:
        """
        The original call: [B, 3, H, W] -> [B, clip_embed_dim], not normalised. In mode InternVL-G it is the sum of two
        embeddings of length 1 (SPEC, "Features and logits").
        """
        return self._image_embeds(image, mode)


class InternVLTextModelWithProjection(InternVLPreTrainedModel, TextSide):
    """
    What embeds texts, of the joint model's checkpoint: QLLaMA without cross-attentions and language head, and
    `text_projection`. 6.7 of 13.8 billion parameters; their values are the joint model's.

    Args:
        config ([`InternVLConfig`]): the joint model's.
    """

    main_input_name = "input_ids"

    def __init__(self, config: InternVLConfig):
        super().__init__(config)
        self.qllama = QLlamaTextEncoder(config.qllama_config)
        self.text_projection = nn.Parameter(torch.zeros(config.qllama_config.hidden_size, config.clip_embed_dim))
        self.post_init()
        ignore_in_checkpoint(self, NOT_FOR_TEXT)

    def get_input_embeddings(self) -> nn.Module:
        return self.qllama.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.qllama.set_input_embeddings(value)

    def get_output_embeddings(self) -> None:
        return None

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> tuple | InternVLTextOutput:
        """
        Args:
            input_ids (`torch.Tensor`): [B, L] ids of `<s> summarize:TEXT </s>`, padded on either side.
            attention_mask (`torch.Tensor`, *optional*): [B, L]; without it every id but 0 is real.
            return_dict (`bool`, *optional*): `False` for a plain tuple.

        Returns:
            [`InternVLTextOutput`]

        Raises:
            `ValueError`, `TypeError`: ids of a wrong shape, dtype or range, a mask of another shape, an empty row.
        """
        mask = self._checked_text(input_ids, attention_mask)
        self._warn_of_another_recipe(input_ids, mask)
        states = self._text_states(input_ids, mask)
        output = InternVLTextOutput(self._pool_states(states, mask), put_back(states, mask))
        return output.to_tuple() if return_dict is False else output


class InternVLVisionModelWithProjection(InternVLPreTrainedModel, ImageSide):
    """
    What embeds pictures in mode InternVL-C, of the joint model's checkpoint: InternViT and `clip_projector`. 5.9 of
    13.8 billion parameters; their values are the joint model's.

    Args:
        config ([`InternVLConfig`]): the joint model's.
    """

    def __init__(self, config: InternVLConfig):
        super().__init__(config)
        self.vision_model = InternVisionModel(config.vision_config)
        self.clip_projector = AttentionPool(config, config.vision_config.hidden_size)
        self.post_init()
        ignore_in_checkpoint(self, NOT_FOR_PICTURES)

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> tuple | InternVLImageOutput:
        """
        Args:
            pixel_values (`torch.Tensor`): [B, 3, H, W], normalised by the processor.
            output_hidden_states (`bool`, *optional*): also return the embeddings and the output of every layer.
            return_dict (`bool`, *optional*): `False` for a plain tuple.

        Returns:
            [`InternVLImageOutput`]

        Raises:
            `ValueError`, `TypeError`: pixels of a wrong shape or dtype.
        """
        vision = self.vision_model(pixel_values, output_hidden_states)
        states = vision.last_hidden_state
        output = InternVLImageOutput(self.clip_projector(states), states, vision.hidden_states)
        return output.to_tuple() if return_dict is False else output


class InternVLModel(InternVLPreTrainedModel, TextSide, ImageSide, GenerationMixin):
    """
    The joint model: embeds pictures and texts, compares them, matches them and writes captions.

    Args:
        config ([`InternVLConfig`]): sizes and options. With its `contrastive_only` the model has what InternVL-C needs;
            `query_tokens`, `clip_projector2`, `itm_head` and what QLLaMA needs for pictures and captions are left out.

    Attributes:
        vision_model ([`InternVisionModel`]): InternViT.
        qllama ([`QLlamaForCausalLM`]): QLLaMA.
        query_tokens (`nn.Parameter`): [1, num_query_token, C], the queries.
        clip_projector, clip_projector2 ([`AttentionPool`]): of the vision tokens, and of the query outputs.
        text_projection (`nn.Parameter`): [C, clip_embed_dim]
        logit_scale (`nn.Parameter`): scalar, the logarithm of the inverse temperature.
        itm_head (`nn.Linear`): C -> 2, no match and match.
    """

    def __init__(self, config: InternVLConfig):
        super().__init__(config)
        width = config.qllama_config.hidden_size
        whole = not config.contrastive_only
        self.vision_model = InternVisionModel(config.vision_config)
        self.qllama = (QLlamaForCausalLM if whole else QLlamaTextEncoder)(config.qllama_config)
        if whole:
            self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_token, width))
        self.text_projection = nn.Parameter(torch.zeros(width, config.clip_embed_dim))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.clip_projector = AttentionPool(config, config.vision_config.hidden_size)
        if whole:
            self.clip_projector2 = AttentionPool(config, width)
            self.itm_head = nn.Linear(width, 2)
        self.post_init()
        ignore_in_checkpoint(self, [] if whole else NOT_FOR_CONTRAST)

    def get_input_embeddings(self) -> nn.Module:
        return self.qllama.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.qllama.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.qllama.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.qllama.set_output_embeddings(new_embeddings)

    # ---------------------------------------------------------------------------------------- towers to states

    def _image_embeds(self, pixel_values: torch.Tensor | InternVLSeen, mode: str | None) -> torch.Tensor:
        mode = self._checked_mode(mode)
        image_states = self._image_states(pixel_values)
        pooled = self.clip_projector(image_states)
        if mode == "InternVL-C":
            return pooled
        query_states = pixel_values.query_states if isinstance(pixel_values, InternVLSeen) else None
        queried = self.clip_projector2(self._query_states(image_states) if query_states is None else query_states)
        return F.normalize(pooled, dim=-1) + F.normalize(queried, dim=-1).to(pooled.device)

    def _query_states(self, image_states: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Run the queries over pictures: [B, 1 + N, vision width] -> [B, num_query_token, C]"""
        queries = self.query_tokens.expand(image_states.shape[0], -1, -1)
        return self.qllama.model(
            inputs_embeds=queries,
            encoder_hidden_states=image_states,
            num_bidirectional=queries.shape[1],
            cache=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _with_queries(self, mask: torch.Tensor) -> torch.Tensor:
        """The mask of [queries ; text] for that of texts [B, L]."""
        return F.pad(mask, (self.config.num_query_token, 0), value=1)

    def _joint_states(
        self,
        image_states: torch.Tensor,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        see_all: bool,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Run [queries ; text] over pictures: ids [B, L], mask [B, queries + L] -> [B, queries + L, C]"""
        embeds = self._joint_embeds(input_ids)
        return self.qllama.model(
            inputs_embeds=embeds,
            attention_mask=None if mask is None else mask.to(embeds.device),
            encoder_hidden_states=image_states,
            num_bidirectional=embeds.shape[1] if see_all else self.config.num_query_token,
            cache=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _joint_embeds(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids [B, L] -> [queries ; text], [B, queries + L, C]"""
        text = self.get_input_embeddings()(input_ids)  # [B, L, C]
        queries = self.query_tokens.expand(len(text), -1, -1).to(text.device)
        return torch.cat([queries, text], dim=1)

    # ------------------------------------------------------------------------------------------------ new calls

    @under_hook
    def look_at(self, pixel_values: torch.Tensor, queries: bool = True) -> InternVLSeen:
        """
        Run pictures once, for several calls: what is returned goes where they take `pixel_values`.

        Args:
            pixel_values (`torch.Tensor`): [B, 3, H, W], normalised by the processor.
            queries (`bool`): also run the queries, for mode InternVL-G and captions.

        Raises:
            `ValueError`, `TypeError`: pixels of a wrong shape or type, or queries that were not loaded.
        """
        if not isinstance(pixel_values, torch.Tensor):
            raise TypeError(f"`pixel_values` must be a tensor of pictures, got {type(pixel_values).__name__}.")
        image_states = self._image_states(pixel_values)
        if not queries:
            return InternVLSeen(image_states)
        self._require_queries("`look_at` with `queries=True`")
        cache = DynamicCache(config=self.config.qllama_config)
        return InternVLSeen(image_states, self._query_states(image_states, cache), cache)

    @under_hook
    def match(
        self,
        pixel_values: torch.Tensor | InternVLSeen,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        all_pairs: bool = False,
    ) -> torch.Tensor:
        """
        Does the text match the picture? QLLaMA sees both at once, so this is sharper than a cosine, and dearer: it is
        made to re-rank a short list (SPEC, "ITM").

        Args:
            pixel_values (`torch.Tensor` or [`InternVLSeen`]): [B, 3, H, W], or [I, 3, H, W] for all pairs.
            input_ids (`torch.Tensor`): [B, L] ids of `<s> TEXT </s>`, or [T, L] for all pairs.
            attention_mask (`torch.Tensor`, *optional*): like `input_ids`; without it every id but 0 is real.
            all_pairs (`bool`): score every picture with every text instead of the i-th with the i-th.

        Returns:
            `torch.Tensor`: logits [B, 2], or [I, T, 2] for all pairs; index 1 is "match".

        Raises:
            `ValueError`: pictures and texts differ in number and `all_pairs` is off; or a bad input.
        """
        self._require_queries("`match`")
        mask = self._checked_text(input_ids, attention_mask)
        image_states = self._image_states(pixel_values)
        input_ids, mask = without_padding(input_ids, mask)
        if all_pairs:
            return torch.stack([self._match(states, input_ids, mask) for states in image_states.split(1)])
        if len(image_states) != len(input_ids):
            counts = f"{len(image_states)} pictures and {len(input_ids)} texts"
            raise ValueError(f"`pixel_values` and `input_ids` must be pairs, got {counts}. Or pass `all_pairs=True`.")
        return self._match(image_states, input_ids, mask)

    def _match(self, image_states: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self._joint_states(image_states, input_ids, self._with_queries(mask), see_all=True)
        return self.itm_head(states[:, : self.config.num_query_token]).mean(dim=1)  # [B, 2]

    @torch.no_grad()
    @under_hook
    def generate(
        self,
        pixel_values: torch.Tensor | InternVLSeen | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """
        Write about pictures, by any decoding of transformers that runs one model once for each step. Pictures and
        prompts run once, not per beam.

        Args:
            pixel_values (`torch.Tensor` or [`InternVLSeen`]): [B, 3, H, W], normalised by the processor.
            input_ids (`torch.Tensor`, *optional*): [B, L] ids of the prompts, `<s>` first and no `</s>`, padded on
                either side; one for all pictures, or any number for one picture. By default the config's
                `caption_prompt_ids`.
            attention_mask (`torch.Tensor`, *optional*): like `input_ids`; without it every id but 0 is real.
            generation_config (`GenerationConfig`, *optional*): by default the checkpoint's.
            generate_kwargs: as in `GenerationMixin.generate`: `num_beams`, `do_sample`, `max_new_tokens`, ...
                `max_length` and `min_length` count what the original returned: the new tokens and a `<s>`.
                `prefill_chunk_size` changes nothing: queries and prompt are always read in one pass.

        Returns:
            `torch.Tensor`: [B, new tokens], without the prompt; or transformers' output class if asked for.

        Raises:
            `ValueError`, `TypeError`: no picture, a bad picture, prompt or mask, an unknown argument, an assistant,
                guidance, prompt lookup, a loop of one's own (`custom_generate`) or `output_attentions`.
        """
        refuse_known_bad("captions")
        self._require_queries("`generate`")
        if pixel_values is None:
            raise ValueError("`pixel_values` must be given: there is nothing to write about.")
        arguments = self._decoding_arguments(generation_config, generate_kwargs)
        config = arguments["generation_config"]
        seen = self._seen(pixel_values)
        input_ids, mask = self._prompt(input_ids, attention_mask, len(seen.image_states), seen.image_states.device)
        mask = self._with_queries(mask)
        cache = self._read_prompts(seen, input_ids[:, :-1], mask[:, :-1])
        copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        length = mask.shape[1] + config.max_new_tokens
        cache = cache_of_kind(config, cache, self.config.qllama_config, length)
        # Embeddings and not ids, so that processors of logits, streamers and results see what is written and no prompt.
        return self.qllama.generate(
            input_ids[:, :0],  # nothing is written yet; transformers may put its own on the meta device
            inputs_embeds=self._joint_embeds(input_ids),
            attention_mask=mask,
            **{CACHE_NAME: cache},
            **arguments,
        )

    def _read_prompts(self, seen: InternVLSeen, input_ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache:
        """
        Run the queries and prompts, ids [B, L] with a mask [B, num_query_token + L], into a new cache of B rows: once,
        however many beams there will be. L may be 0.
        """
        batch, length = input_ids.shape
        cache = DynamicCache(config=self.config.qllama_config)
        if length and seen.query_cache is None and len(seen.image_states) == batch:
            self._joint_states(seen.image_states, input_ids, mask, see_all=False, cache=cache)
            return cache
        if seen.query_cache is None:
            self._query_states(seen.image_states, cache)
        else:
            copy_cache(seen.query_cache, cache)
        if len(seen.image_states) != batch:
            cache.batch_repeat_interleave(batch)
        if length:
            self.qllama.model(input_ids=input_ids, attention_mask=mask, cache=cache, use_cache=True)
        return cache

    def _prompt(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, batch: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt of every caption and its mask, both [B, L], padded on the left so that all end together."""
        if input_ids is None:
            if attention_mask is not None:
                raise ValueError("`attention_mask` was given without the `input_ids` that it belongs to.")
            ids = self.config.caption_prompt_ids or [self.config.qllama_config.bos_token_id]
            input_ids = torch.tensor([ids], device=device)
        mask = check_token_ids("input_ids", input_ids, attention_mask, self.config.qllama_config.vocab_size)
        if batch != 1 and len(input_ids) not in (1, batch):
            raise ValueError(f"`input_ids` must have one prompt, or one per picture ({batch}), got {len(input_ids)}.")
        if has_values(input_ids) and bool(self._ends(input_ids, mask).any()):
            logger.warning_once(
                "A prompt ends with `</s>`: nothing sensible follows it. Set `tokenizer.add_eos_token = False`, or call"
                ' the processor with `task="caption"`.'
            )
        # The embedding of padding may be zero, and a static cache of some releases takes zero keys for free places.
        input_ids = input_ids.masked_fill(mask.logical_not(), self.config.qllama_config.bos_token_id)
        order = real_tokens_last(mask)
        place = self.get_input_embeddings()(input_ids[:1, :1]).device  # offloaded weights do not say where they run
        rows = max(batch, len(input_ids))
        input_ids, mask = input_ids.gather(1, order), mask.gather(1, order).long()
        return input_ids.expand(rows, -1).to(place), mask.expand(rows, -1).to(place)

    def _decoding_arguments(
        self, generation_config: GenerationConfig | None, generate_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """
        One config with all that is asked for, and the arguments that are no part of it, such as a streamer. Lengths go
        by new tokens: transformers' `max_length` would count the queries and the prompt too.
        """
        config, plain = deepcopy(generation_config or self.generation_config), GenerationConfig()
        lengths = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))
        for old, new in lengths:
            if generate_kwargs.get(old) is not None:
                setattr(config, new, None)  # what is asked for now comes before the checkpoint's default
        rest = config.update(**generate_kwargs)
        for name in sorted(set(rest) - ARGUMENTS_OF_GENERATE):
            raise TypeError(f"generate() got an unexpected keyword argument '{name}'")
        without_image = {
            "assistant_model": rest.get("assistant_model") is not None,
            "assistant_early_exit": config.assistant_early_exit is not None,
            "custom_generate": rest.get("custom_generate") is not None,
            "guidance_scale": config.guidance_scale not in (None, 1),
            "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
        }
        for name in (name for name, is_asked_for in without_image.items() if is_asked_for):
            raise ValueError(f"`generate` cannot use `{name}`: what it adds would be written without the image.")
        if config.output_attentions:
            raise ValueError("`generate` cannot give `output_attentions`: the model keeps no attention weights.")
        for old, new in lengths:
            length = getattr(config, old)
            if length != getattr(plain, old) and getattr(config, new) is None:
                setattr(config, new, max(length - 1, 0))
            setattr(config, old, getattr(plain, old))
        if config.max_new_tokens is None:
            config.max_new_tokens = DEFAULT_NEW_TOKENS
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(config, name) is None:
                setattr(config, name, getattr(self.config.qllama_config, name))
        return {"generation_config": config, **rest}

    # ------------------------------------------------------------------------------------------ the original calls

    @under_hook
    def get_image_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The original call: the vision tokens [B, 1 + N, vision width] and the query outputs [B, queries, C]."""
        self._require_queries("`get_image_features`")
        image_states = self._image_states(pixel_values)
        return image_states, self._query_states(image_states)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        mode: str | None = None,
        return_dict: bool | None = None,
        image: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> tuple | InternVLOutput:
        """
        Compare pictures and texts, or embed one of them.

        Args:
            input_ids (`torch.Tensor`, *optional*): [T, L] ids of `<s> summarize:TEXT </s>`.
            pixel_values (`torch.Tensor`, *optional*): [I, 3, H, W], normalised by the processor.
            attention_mask (`torch.Tensor`, *optional*): [T, L]; without it every id but 0 is real.
            mode (`str`, *optional*): "InternVL-C", which it is if not given, or "InternVL-G".
            return_dict (`bool`, *optional*): `False` for a plain tuple.
            image, text: the original names of `pixel_values` and `input_ids`; with them a plain tuple
                `(logits_per_image, logits_per_text)` is returned, as the original did.
            output_hidden_states (`bool`, *optional*): see pictures, as the vision tower of another model, LLaVA for
                one: a tuple is returned, the vision tower's `BaseModelOutputWithPooling` with all `hidden_states`, and
                the outputs of the queries, a tensor [I, num_query_token, C]. The pictures may then come first, without
                a name.

        Returns:
            [`InternVLOutput`]

        Raises:
            `ValueError`, `TypeError`: no input, an unknown mode, or an input of a wrong shape, dtype or range.
        """
        if output_hidden_states:
            if pixel_values is None and isinstance(input_ids, torch.Tensor) and input_ids.is_floating_point():
                input_ids, pixel_values = None, input_ids
            if pixel_values is None or not all(each is None for each in (input_ids, attention_mask, image, text)):
                raise ValueError("`output_hidden_states` is for pictures alone: `pixel_values`, and no text.")
            return self._see(pixel_values)
        if image is None and text is None:
            output = self._compare(input_ids, pixel_values, attention_mask, mode)
            return output.to_tuple() if return_dict is False else output
        if image is None or text is None or input_ids is not None or pixel_values is not None:
            raise ValueError("`image` and `text` go together, and without `pixel_values` and `input_ids`.")
        output = self._compare(text, image, attention_mask, mode)
        return output.logits_per_image, output.logits_per_text

    def _see(self, pixel_values: torch.Tensor) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        self._require_queries("`output_hidden_states`")
        vision = self.vision_model(pixel_values, output_hidden_states=True)
        return vision, self._query_states(vision.last_hidden_state)

    def _compare(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        mode: str | None,
    ) -> InternVLOutput:
        mode = self._checked_mode(mode)
        if input_ids is None and pixel_values is None:
            raise ValueError("At least one of `input_ids` and `pixel_values` must be given.")
        image_states = image_embeds = text_embeds = None
        if pixel_values is not None:
            seen = self._seen(pixel_values)
            image_states = seen.image_states
            image_embeds = F.normalize(self._image_embeds(seen, mode), dim=-1)
        if input_ids is not None:
            text_embeds = F.normalize(self._text_embeds(input_ids, attention_mask), dim=-1)
        if text_embeds is None:
            return InternVLOutput(last_hidden_state=image_states, image_embeds=image_embeds, pooler_output=image_embeds)
        if image_embeds is None:
            return InternVLOutput(text_embeds=text_embeds)
        scale = self.logit_scale.exp().to(image_embeds.device)
        logits = scale * image_embeds @ text_embeds.to(image_embeds.device).T
        return InternVLOutput(
            logits_per_image=logits, logits_per_text=logits.T, image_embeds=image_embeds, text_embeds=text_embeds
        )


class InternVL_C(InternVLModel):  # noqa: N801 - the name that CLIP_benchmark imports
    """[`InternVLModel`], in mode InternVL-C if none is given."""


class InternVL_G(InternVLModel):  # noqa: N801
    """[`InternVLModel`], in mode InternVL-G if none is given."""

    default_mode = "InternVL-G"


# --------------------------------------------------------------------------------------------------------- training


class GatherWithGradient(torch.autograd.Function):
    """
    Concatenate the ranks' tensors. Backward sums the ranks' gradients for each slice (SPEC, "Training objectives").
    """

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        ctx.size = len(local)
        return gather(local)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # not the caller's own
        dist.all_reduce(gradient)
        return gradient.narrow(0, ctx.size * dist.get_rank(), ctx.size)


def gather(local: torch.Tensor) -> torch.Tensor:
    """Concatenate a tensor of every rank along its first dimension, without gradients."""
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_of_valid(losses: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The mean over the valid rows; 0, with a gradient of 0, where there is none."""
    valid = valid.to(losses.device)
    return (losses * valid).sum() / valid.sum().clamp(min=1)


class InternVLTrainingModel(InternVLModel):
    """The losses that both training objectives are made of."""

    saved_as = "InternVLModel"

    def _matching_losses(
        self,
        image_states: torch.Tensor,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """ITM: the cross-entropy of match and no match, for each row."""
        logits = self._match(image_states, input_ids, mask).float()
        return F.cross_entropy(logits, labels.to(logits.device), reduction="none")

    def _similarities(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the local pictures to all ranks' texts and of the local texts to all ranks' pictures [B, W * B]."""
        images, texts = F.normalize(image_embeds, dim=-1), F.normalize(text_embeds, dim=-1)
        all_images, all_texts = images, texts
        if is_distributed():
            all_images, all_texts = GatherWithGradient.apply(images), GatherWithGradient.apply(texts)
        scale = self.logit_scale.exp()
        return (scale * images @ all_texts.T).float(), (scale * texts @ all_images.T).float()

    def _checked(
        self, name: str, input_ids: torch.Tensor, mask: torch.Tensor | None, batch: int, *others: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Check a token batch; bring the real tokens of it, its mask and others of its shape to the left."""
        mask = check_token_ids(name, input_ids, mask, self.config.qllama_config.vocab_size)
        if len(input_ids) != batch:
            raise ValueError(f"`{name}` must have one row per picture ({batch}), got {len(input_ids)}.")
        order = real_tokens_first(mask)
        return tuple(tensor.gather(1, order) for tensor in (input_ids, mask, *others))


class InternVLForPreTraining(InternVLTrainingModel):
    """
    Stage 2 of the original's training: matching, contrast and captioning (paper, section 3.3; SPEC, "Training
    objectives"). Two of its three passes need no mask: the queries of the caption's pass are also what the contrast is
    made with, because they see nothing but themselves and the picture.
    """

    def forward(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor,
        positive_input_ids: torch.Tensor,
        positive_attention_mask: torch.Tensor | None,
        negative_input_ids: torch.Tensor,
        negative_attention_mask: torch.Tensor | None,
        summarize_input_ids: torch.Tensor,
        summarize_attention_mask: torch.Tensor | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
    ) -> InternVLTrainingOutput:
        """
        Args:
            pixel_values (`torch.Tensor`): [B, 3, H, W]; every rank has the same B.
            positive_input_ids, negative_input_ids (`torch.Tensor`): [B, L] ids of texts `<s> TEXT </s>` that match the
                picture, and that do not. The first B - B // 2 rows take the negative, the others the positive text.
            summarize_input_ids (`torch.Tensor`): [B, L] ids of `<s> summarize:TEXT </s>`. Rows of five tokens, which
                hold no text, are left out of the contrast.
            input_ids, labels (`torch.Tensor`): [B, L] ids of the caption with its prompt, and the same ids with -100
                where nothing is to be learnt. The shift by one happens here.
            ..._attention_mask (`torch.Tensor` or None): like the ids; None for "every id but 0".

        Returns:
            [`InternVLTrainingOutput`]: `loss` = `loss_itm` + `loss_itc` + `loss_itg`.
        """
        refuse_known_bad("training")
        batch, checked = len(pixel_values), self._checked
        positive_ids, positive_mask = checked("positive_input_ids", positive_input_ids, positive_attention_mask, batch)
        negative_ids, negative_mask = checked("negative_input_ids", negative_input_ids, negative_attention_mask, batch)
        summary_ids, summary_mask = checked("summarize_input_ids", summarize_input_ids, summarize_attention_mask, batch)
        self._check_labels(input_ids, labels)
        caption_ids, _, labels = checked("input_ids", input_ids, attention_mask, batch, labels)
        image_states = self._image_states(pixel_values)

        num_negative = batch - batch // 2
        mask = _pad_together((negative_mask[:num_negative], positive_mask[num_negative:]))
        losses = self._matching_losses(
            image_states,
            _pad_together((negative_ids[:num_negative], positive_ids[num_negative:])),
            mask,
            torch.arange(len(image_states), device=image_states.device).ge(num_negative).long(),
        )
        loss_itm = mean_of_valid(losses, mask.sum(dim=1) != 2)  # texts of two tokens, `<s> </s>`, say nothing
        states = self._joint_states(image_states, caption_ids, None, see_all=False)
        queries, text = states.split([self.config.num_query_token, caption_ids.shape[1]], dim=1)
        loss_itc = self._contrastive_loss(
            self.clip_projector2(queries), self._pool_text(summary_ids, summary_mask), summary_mask.sum(dim=1) != 5
        )
        logits = self.qllama.lm_head(text[:, :-1]).float().flatten(0, 1)  # [B * (L - 1), vocabulary]
        targets = labels[:, 1:].flatten().to(logits.device)
        loss_itg = mean_of_valid(F.cross_entropy(logits, targets, reduction="none"), targets != -100)
        loss = loss_itm + loss_itc + loss_itg
        return InternVLTrainingOutput(loss=loss, loss_itm=loss_itm, loss_itc=loss_itc, loss_itg=loss_itg)

    def _check_labels(self, input_ids: torch.Tensor, labels: torch.Tensor) -> None:
        if not isinstance(labels, torch.Tensor) or labels.shape != input_ids.shape:
            shape = list(getattr(labels, "shape", [])) or type(labels).__name__
            raise ValueError(f"`labels` must be {list(input_ids.shape)} like `input_ids`, got {shape}.")
        if labels.dtype != torch.long:
            raise TypeError(f"`labels` must be integer token ids (torch.int64), got {labels.dtype}.")
        vocab_size = self.config.qllama_config.vocab_size
        if has_values(labels) and int(labels.max()) >= vocab_size:
            raise ValueError(f"`labels` must hold ids below {vocab_size}, or -100, got {int(labels.max())}.")

    def _contrastive_loss(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """ITC: each picture's text is the one of its own row among all ranks' texts, and the other way round."""
        targets = torch.arange(len(valid), device=valid.device)
        if is_distributed():
            targets = targets + dist.get_rank() * len(valid)
        smoothing = self.config.label_smoothing
        losses = [
            F.cross_entropy(logits, targets.to(logits.device), reduction="none", label_smoothing=smoothing)
            for logits in self._similarities(image_embeds, text_embeds)
        ]
        return mean_of_valid(torch.stack(losses).mean(dim=0), valid)


class InternVLForRetrieval(InternVLTrainingModel):
    """Retrieval fine-tuning of the original: matching and contrast with soft targets (SPEC, "Training objectives")."""

    def forward(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor,
        positive_input_ids: torch.Tensor,
        positive_attention_mask: torch.Tensor | None,
        negative_input_ids: torch.Tensor,
        negative_attention_mask: torch.Tensor | None,
        summarize_input_ids: torch.Tensor,
        summarize_attention_mask: torch.Tensor | None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_ids: torch.Tensor | None = None,
    ) -> InternVLTrainingOutput:
        """
        Args:
            image_ids (`torch.Tensor`, *optional*): [B]; rows with the same number, on whatever rank, show the same
                thing, so all their pairs are positives. Every row its own if not given.
            input_ids, attention_mask, labels: taken so that both objectives eat the same batches; not used.
            others: see [`InternVLForPreTraining.forward`].

        Returns:
            [`InternVLTrainingOutput`]: `loss` = `loss_itm` + `loss_itc`.
        """
        refuse_known_bad("training")
        batch, checked = len(pixel_values), self._checked
        positive_ids, positive_mask = checked("positive_input_ids", positive_input_ids, positive_attention_mask, batch)
        negative_ids, negative_mask = checked("negative_input_ids", negative_input_ids, negative_attention_mask, batch)
        summary_ids, summary_mask = checked("summarize_input_ids", summarize_input_ids, summarize_attention_mask, batch)
        image_states = self._image_states(pixel_values)
        loss_itm = self._matching_losses(
            torch.cat([image_states, image_states]),
            _pad_together((negative_ids, positive_ids)),
            _pad_together((negative_mask, positive_mask)),
            torch.arange(2 * batch, device=image_states.device).ge(batch).long(),
        ).mean()
        text_embeds = self._pool_text(summary_ids, summary_mask)
        targets = self._soft_targets(image_ids, batch, image_states.device)
        queried, pooled = self.clip_projector2(self._query_states(image_states)), self.clip_projector(image_states)
        loss_itc = self._contrastive_loss(queried, text_embeds, targets)
        loss_itc = loss_itc + self._contrastive_loss(pooled, text_embeds, targets)
        return InternVLTrainingOutput(loss=loss_itm + loss_itc, loss_itm=loss_itm, loss_itc=loss_itc)

    def _soft_targets(self, image_ids: torch.Tensor | None, batch: int, device: torch.device) -> torch.Tensor:
        """Each local row's share of every row of all ranks [B, W * B], the same for all rows that show its thing."""
        if image_ids is None:
            rank = dist.get_rank() if is_distributed() else 0
            image_ids = torch.arange(batch, device=device) + rank * batch
        elif not isinstance(image_ids, torch.Tensor) or image_ids.shape != (batch,):
            shape = list(getattr(image_ids, "shape", [])) or type(image_ids).__name__
            raise ValueError(f"`image_ids` must be [{batch}], one per picture, got {shape}.")
        all_ids = gather(image_ids) if is_distributed() else image_ids
        same = (image_ids[:, None] == all_ids[None, :]).float()
        return same / same.sum(dim=1, keepdim=True)

    def _contrastive_loss(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        # The targets are soft already: the config's `label_smoothing` belongs to stage 2 (SPEC).
        losses = [
            F.cross_entropy(logits, targets.to(logits.device))
            for logits in self._similarities(image_embeds, text_embeds)
        ]
        return torch.stack(losses).mean()


def _pad_together(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Put batches of different length one under the other, padded with 0 on the right."""
    length = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, length - part.shape[1])) for part in parts])


# The loader does this only if no model of transformers' own has a config of this name; some releases have one.
for model_class in (InternVLModel, InternVLTextModelWithProjection, InternVLVisionModelWithProjection):
    model_class.register_for_auto_class("AutoModel")


__all__ = [
    "InternVLForPreTraining",
    "InternVLForRetrieval",
    "InternVLModel",
    "InternVLTextModelWithProjection",
    "InternVLVisionModelWithProjection",
    "InternVL_C",
    "InternVL_G",
]
