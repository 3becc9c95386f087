"""
Texts: batches of token ids are checked, ordered and cut, read by QLLaMA and embedded.

Padding may stand on either side: real tokens are brought together before a text is read, so that causal attention needs
no mask, and what is padding in all texts of a batch is not computed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from .compat_internvl import under_hook

logger = logging.get_logger(__name__)

MAX_PADDING = 0.1  # of the real tokens of a batch that is made here
MAX_SPARE_IDS = 64  # rows of the embedding table without a piece, which some add for even shapes


# ------------------------------------------------------------------------------------------------------- token ids


def has_values(tensor: torch.Tensor) -> bool:
    """Whether values may be looked at: not on the meta device, not for fake tensors, not while compiling."""
    return type(tensor) is torch.Tensor and tensor.device.type != "meta" and not torch.compiler.is_compiling()


def check_token_ids(name: str, input_ids: Any, attention_mask: Any, vocab_size: int) -> torch.Tensor:
    """
    Refuse what is not a batch of token ids, and return its padding mask.

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


def pad_together(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Put batches of different length one under the other, padded with 0 on the right."""
    length = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, length - part.shape[1])) for part in parts])


# --------------------------------------------------------------------------------------------------- embeddings


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
