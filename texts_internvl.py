"""
Text side of the model: check and batch token ids, run them through QLLaMA, embed them.

Padding may be on either side. Real tokens are moved to the left before QLLaMA runs, so causal attention needs no mask,
and columns that are padding in all rows are not computed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from .compat_internvl import with_accelerate_hook

logger = logging.get_logger(__name__)

MAX_PADDING = 0.1  # share of padding relative to the real tokens of a batch in `batches_of_similar_length`
MAX_SPARE_IDS = 64  # embedding rows without a token, which some checkpoints add to round up the table


# ------------------------------------------------------------------------------------------------------- token ids


def has_values(tensor: torch.Tensor) -> bool:
    """Whether values can be read: not on the meta device, not of fake tensors, not while compiling."""
    return type(tensor) is torch.Tensor and tensor.device.type != "meta" and not torch.compiler.is_compiling()


def check_token_ids(name: str, input_ids: Any, attention_mask: Any, vocab_size: int) -> torch.Tensor:
    """
    Check that `input_ids` is a batch of token ids, and return its padding mask.

    Returns:
        `torch.Tensor`: bool [B, L]; without `attention_mask`, every id but 0 (docs/model.md, "Texts").
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
    """The order [B, L] that moves each row's real tokens to the left; needs no device synchronisation."""
    return torch.argsort(mask.logical_not().byte(), dim=1, stable=True)


def real_tokens_last(mask: torch.Tensor) -> torch.Tensor:
    """The order [B, L] that moves each row's real tokens to the right."""
    return torch.argsort(mask.byte(), dim=1, stable=True)


def without_padding(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Ids and mask [B, L'] with the real tokens first in every row. Columns that are padding in all rows are removed if
    values can be read.
    """
    order = real_tokens_first(mask)
    longest = int(mask.sum(dim=1).max()) if has_values(mask) else mask.shape[1]
    order = order[:, :longest]
    return input_ids.gather(1, order), mask.gather(1, order)


def restore_positions(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Move states [B, L', C] of real tokens to their positions in the mask [B, L]; values at padding are arbitrary."""
    back = (mask.long().cumsum(dim=1) - 1).clamp(min=0).unsqueeze(-1).to(states.device)
    return states.gather(1, back.expand(-1, -1, states.shape[-1]))


def batches_of_similar_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """
    Yield batches of text indices, longest text first. A batch has at most `max_tokens` tokens including padding, unless
    it is a single text, and at most `MAX_PADDING` times as much padding as real tokens.
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


def concatenate_padded(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Concatenate batches of different lengths, padded with 0 on the right."""
    length = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, length - part.shape[1])) for part in parts])


# --------------------------------------------------------------------------------------------------- embeddings


class TextSide:
    """Methods that read and embed texts, for models with `qllama` and `text_projection`."""

    config: Any
    qllama: Any
    text_projection: nn.Parameter

    def check_processor(self, processor: Any) -> None:
        """
        Check that a processor belongs to this checkpoint. Otherwise its inputs would be accepted, and the embeddings
        would be wrong.

        Raises:
            `TypeError`: `processor` is not an InternVLProcessor.
            `ValueError`: the vocabulary, special ids, prefix or image size differ from the checkpoint's.
        """
        if not hasattr(processor, "image_processor") or not hasattr(processor, "default_task"):
            # A tokenizer would silently omit the prefix and `</s>`.
            raise TypeError(f"`processor` must be an InternVLProcessor, got {type(processor).__name__}.")
        tokenizer, config = processor.tokenizer, self.config.qllama_config
        if not 0 <= config.vocab_size - len(tokenizer) <= MAX_SPARE_IDS:
            sizes = f"{len(tokenizer):,} tokens, but the model has {config.vocab_size:,} ids"
            raise ValueError(f"The tokenizer belongs to another checkpoint: it has {sizes}.")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(tokenizer, name) != getattr(config, name):
                ids = f"{getattr(tokenizer, name)}, the model's is {getattr(config, name)}"
                raise ValueError(f"The tokenizer belongs to another checkpoint: its `{name}` is {ids}.")
        prefix = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("summarize:"))
        expected = self.config.embed_prefix_ids
        if expected is not None and [config.bos_token_id, *prefix] != list(expected):
            problem = f"its ids of `summarize:` are {prefix}, not {expected[1:]}"
            raise ValueError(f"The tokenizer belongs to another checkpoint: {problem}.")
        size, cropped = self.config.image_size, processor.image_processor.crop_size
        if hasattr(self, "vision_model") and (cropped["height"], cropped["width"]) != (size, size):
            sizes = f"{cropped['height']} x {cropped['width']} pixels, but the model expects {size} x {size}"
            raise ValueError(f"The processor belongs to another checkpoint: its images have {sizes}.")

    def _checked_text(self, input_ids: Any, attention_mask: Any) -> torch.Tensor:
        return check_token_ids("input_ids", input_ids, attention_mask, self.config.qllama_config.vocab_size)

    def _text_states(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Ids [B, L] -> QLLaMA's states [B, L', C], the real tokens first in every row."""
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

    def _ends_with_eos(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Whether each row [B] has `</s>` as its last real token."""
        last = mask.long().cumsum(1).argmax(1, keepdim=True)
        return input_ids.gather(1, last).flatten() == self.config.qllama_config.eos_token_id

    def _starts_with_prefix(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Whether each row [B] starts with `embed_prefix_ids`; true if the config has none."""
        # Without its last id, which the tokenizer may merge with the text.
        prefix = torch.tensor((self.config.embed_prefix_ids or [])[:-1], device=input_ids.device, dtype=input_ids.dtype)
        first = mask.long().argmax(1, keepdim=True)  # [B, 1]
        places = first + torch.arange(len(prefix), device=input_ids.device)
        return (input_ids.gather(1, places.clamp(max=input_ids.shape[1] - 1)) == prefix).all(dim=1)

    def _warn_about_text_format(self, input_ids: torch.Tensor, mask: torch.Tensor) -> None:
        if not has_values(input_ids):
            return
        if not bool(self._ends_with_eos(input_ids, mask).all()):
            logger.warning_once(
                "A text does not end with `</s>`, so its embedding is read at a token that the checkpoint was not"
                " trained for. Set `tokenizer.add_eos_token = True`, or use the processor."
            )
        if not bool(self._starts_with_prefix(input_ids, mask).all()):
            logger.warning_once(
                "A text does not start with `summarize:`: the checkpoint was trained to embed texts with this prefix"
                " only. Add it, or use the processor."
            )

    def _text_embeds(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Checked ids [B, L] -> [B, clip_embed_dim], not normalised."""
        mask = self._checked_text(input_ids, attention_mask)
        self._warn_about_text_format(input_ids, mask)
        return self._pool_text(input_ids, mask)

    @with_accelerate_hook
    def embed_text(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, normalize: bool = True
    ) -> torch.Tensor:
        """
        Args:
            input_ids (`torch.Tensor`): [B, L] ids of `<s> summarize:TEXT </s>`, padded on either side.
            attention_mask (`torch.Tensor`, *optional*): [B, L]; without it every id but 0 is real.
            normalize (`bool`): scale the embeddings to unit length; `False` gives the values of `encode_text`.

        Returns:
            `torch.Tensor`: [B, clip_embed_dim]

        Raises:
            `ValueError`, `TypeError`: wrong shape, dtype or range of ids, another shape of the mask, or an empty row.
        """
        embeds = self._text_embeds(input_ids, attention_mask)
        return F.normalize(embeds, dim=-1) if normalize else embeds

    def embed_classes(
        self, processor: Any, names: Sequence[str], templates: Sequence[str] = ("{}",), max_tokens: int = 4096
    ) -> torch.Tensor:
        """
        Class embeddings for zero-shot classification, computed once for any number of images: the cosines are
        `image_embeds @ classes.T`.

        Args:
            processor ([`InternVLProcessor`]): the processor of the checkpoint.
            names (sequence of `str`): names of the C classes.
            templates (sequence of `str`): texts with one placeholder for the name, `{}` or `{c}`, in any language. A
                class embedding is the mean over all templates.
            max_tokens (`int`): see [`embed_texts`].

        Returns:
            `torch.Tensor`: [C, clip_embed_dim], of unit length, without gradients.

        Raises:
            `ValueError`, `TypeError`: no name, no template, a template without exactly one placeholder, or a processor
                of another checkpoint.
        """
        self.check_processor(processor)
        for what, texts in (("names", names), ("templates", templates)):
            if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
                raise TypeError(f"`{what}` must be a list of texts, at least one, got {texts!r}.")
        for template in templates:
            if template.replace("{c}", "{}").count("{}") != 1:
                raise ValueError(f"`templates` must have one placeholder, {{}} or {{c}}, got {template!r}.")
        texts = [template.replace("{c}", "{}").replace("{}", name) for name in names for template in templates]
        # The task is explicit: the processor of an image-text-to-text pipeline has another default.
        ids = processor(text=texts, task="embed", padding=False, return_tensors=None).input_ids
        embeds = self.embed_texts(ids, max_tokens).unflatten(0, (len(names), len(templates)))
        return F.normalize(embeds.mean(dim=1), dim=-1)

    @torch.no_grad()
    @with_accelerate_hook
    def embed_texts(
        self, input_ids: Sequence[Sequence[int]], max_tokens: int = 4096, normalize: bool = True
    ) -> torch.Tensor:
        """
        As [`embed_text`], for any number of texts of any length. Texts are read in batches of similar length, so there
        is little padding, and memory holds one batch.

        Args:
            input_ids (sequence of sequences of `int`): the ids of each text, `<s> summarize:TEXT </s>`, without
                padding, as `processor(text=..., padding=False, return_tensors=None).input_ids`.
            max_tokens (`int`): maximum tokens of a batch, including padding. A longer text is a batch of its own.
            normalize (`bool`): scale the embeddings to unit length.

        Returns:
            `torch.Tensor`: [T, clip_embed_dim], in the order of the texts, without gradients.

        Raises:
            `ValueError`, `TypeError`: no text, an empty text, an id that is not an integer, or `max_tokens` below 1.
        """
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise ValueError(f"`max_tokens` must be a positive integer, got {max_tokens!r}.")
        if not isinstance(input_ids, (list, tuple)) or not input_ids:
            kind = "an empty list" if isinstance(input_ids, (list, tuple)) else type(input_ids).__name__
            raise TypeError(f"`input_ids` must be a list of lists of ids, one per text, got {kind}.")
        for ids in input_ids:
            if not isinstance(ids, (list, tuple)) or not ids or not all(isinstance(number, int) for number in ids):
                raise ValueError(f"`input_ids` must hold lists of integers, none of them empty, got {ids!r}.")
        embeds: list[torch.Tensor] = []
        order: list[int] = []
        device = self.text_projection.device  # lists carry no device
        for batch in batches_of_similar_length([len(ids) for ids in input_ids], max_tokens):
            rows = [torch.tensor(input_ids[index]) for index in batch]
            padded = [pad_sequence(each, batch_first=True) for each in (rows, [torch.ones_like(row) for row in rows])]
            embeds.append(self._text_embeds(*(each.to(device) for each in padded)).to(device))
            order += batch
        together = torch.cat(embeds)[torch.tensor(order).argsort()]
        return F.normalize(together, dim=-1) if normalize else together

    @with_accelerate_hook
    def encode_text(self, text: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The original call: ids [B, L] of `<s> summarize:TEXT </s>` -> [B, clip_embed_dim], not normalised."""
        return self._text_embeds(text, attention_mask)

    @with_accelerate_hook
    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The original call: the states of all tokens [B, L, C]; values at padding are arbitrary."""
        mask = self._checked_text(input_ids, attention_mask)
        return restore_positions(self._text_states(input_ids, mask), mask)
