"""Text side of the model: check and batch token ids, run them through QLLaMA, embed them.

Padding may be on either side. Real tokens are moved to the left before QLLaMA runs, so causal attention needs no mask,
and columns that are padding in all rows are not computed.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from .compat_internvl import with_accelerate_hook

logger = logging.get_logger(__name__)

MAX_PADDING = 0.1  # share of padding relative to the real tokens of a batch in `batches_of_similar_length`
MAX_SPARE_IDS = 64  # embedding rows without a token, which some checkpoints add to round up the table


def has_values(tensor: torch.Tensor) -> bool:
    """Whether values can be read: not on the meta device, not of fake tensors, not while compiling."""
    return type(tensor) is torch.Tensor and tensor.device.type != "meta" and not torch.compiler.is_compiling()


class TextFacts(NamedTuple):
    """Facts about a batch of texts, from one read of the device; the defaults if values cannot be read."""

    lowest_id: int = 0
    highest_id: int = 0
    shortest: int = 1  # real tokens of the shortest row
    longest: int | None = None
    all_end_with_eos: int = 1
    any_ends_with_eos: int = 0
    all_start_with_prefix: int = 1


def read_text_facts(input_ids: torch.Tensor, mask: torch.Tensor, config: Any) -> TextFacts:
    """Facts about token ids and their mask [B, L]. The prefix is the config's `embed_prefix_ids`, if it has any."""
    lengths = mask.sum(dim=1)  # [B]
    last = mask.long().cumsum(1).argmax(1, keepdim=True)  # [B, 1]
    ends = input_ids.gather(1, last) == config.qllama_config.eos_token_id
    # Without its last id, which the tokenizer may merge with the text.
    prefix = torch.tensor((config.embed_prefix_ids or [])[:-1], device=input_ids.device)  # [P]
    places = mask.long().argmax(1, keepdim=True) + torch.arange(len(prefix), device=input_ids.device)  # [B, P]
    starts = input_ids.gather(1, places.clamp(max=input_ids.shape[1] - 1)) == prefix
    bounds = (*input_ids.aminmax(), *lengths.aminmax())
    facts = torch.stack([fact.long() for fact in (*bounds, ends.all(), ends.any(), starts.all())])
    return TextFacts(*facts.tolist())


def check_texts(name: str, input_ids: Any, attention_mask: Any, config: Any) -> tuple[torch.Tensor, TextFacts]:
    """Check that `input_ids` is a batch of token ids. Messages call it `name`.

    Returns:
        The padding mask, bool [B, L], and the facts. Without `attention_mask`, every id but 0 is real (docs/model.md,
        "Texts").
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
    facts = read_text_facts(input_ids, mask, config) if has_values(input_ids) else TextFacts()
    vocab_size = config.qllama_config.vocab_size
    if facts.lowest_id < 0 or facts.highest_id >= vocab_size:
        wrong = facts.lowest_id if facts.lowest_id < 0 else facts.highest_id
        raise ValueError(f"`{name}` must hold ids in [0, {vocab_size}), got {wrong}.")
    if facts.shortest == 0:
        raise ValueError(f"`{name}` has a row without a single real token.")
    return mask, facts


def padding_order(mask: torch.Tensor, side: str) -> torch.Tensor:
    """The order [B, L] that moves each row's padding to the "left" or "right"; needs no device synchronisation."""
    return torch.argsort(mask.byte(), dim=1, stable=True, descending=side == "right")


def without_padding(
    input_ids: torch.Tensor, mask: torch.Tensor, longest: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, longest], or [B, L] if that is None, with the real tokens first in every row."""
    order = padding_order(mask, "right")[:, :longest]
    return input_ids.gather(1, order), mask.gather(1, order)


def restore_positions(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Move states [B, L', C] of real tokens to their positions in the mask [B, L]; values at padding are arbitrary."""
    back = (mask.long().cumsum(dim=1) - 1).clamp(min=0).unsqueeze(-1).to(states.device)
    return states.gather(1, back.expand(-1, -1, states.shape[-1]))


def batches_of_similar_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield batches of text indices, longest text first. A batch has at most `max_tokens` tokens including padding,
    unless it is a single text, and at most `MAX_PADDING` times as much padding as real tokens.
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


class TextSide:
    """Methods that read and embed texts, for models with `qllama` and `text_projection`."""

    config: Any
    qllama: Any
    text_projection: nn.Parameter

    def check_processor(self, processor: Any) -> None:
        """Check that a processor belongs to this checkpoint. Otherwise its inputs would be accepted, and the embeddings
        would be wrong.

        Raises:
            `TypeError`: `processor` is not an InternVLProcessor.
            `ValueError`: the vocabulary, special ids, prefix or image size differ from the checkpoint's.
        """
        if not hasattr(processor, "image_processor") or not hasattr(processor, "default_task"):
            # A tokenizer would silently omit the prefix and `</s>`.
            raise TypeError(f"`processor` must be an InternVLProcessor, got {type(processor).__name__}.")
        problems, tokenizer, config = [], processor.tokenizer, self.config.qllama_config
        if not 0 <= config.vocab_size - len(tokenizer) <= MAX_SPARE_IDS:
            problems.append(f"it has {len(tokenizer):,} tokens, but the model has {config.vocab_size:,} ids")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(tokenizer, name) != getattr(config, name):
                problems.append(f"its `{name}` is {getattr(tokenizer, name)}, the model's is {getattr(config, name)}")
        prefix = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("summarize:"))
        expected = self.config.embed_prefix_ids
        if expected is not None and [config.bos_token_id, *prefix] != list(expected):
            problems.append(f"its ids of `summarize:` are {prefix}, not {expected[1:]}")
        size, crop = self.config.image_size, processor.image_processor.crop_size
        if hasattr(self, "vision_model") and (crop["height"], crop["width"]) != (size, size):
            cropped = f"{crop['height']} x {crop['width']}"
            problems.append(f"its images have {cropped} pixels, but the model expects {size} x {size}")
        if problems:
            raise ValueError(f"The processor belongs to another checkpoint: {'; '.join(problems)}.")

    def _text_states(self, input_ids: torch.Tensor, mask: torch.Tensor, longest: int | None) -> torch.Tensor:
        """Ids [B, L] -> QLLaMA's states [B, longest or L, C], the real tokens first in every row."""
        # With the real tokens first, causal attention needs no padding mask.
        ids, _ = without_padding(input_ids, mask, longest)
        return self.qllama.model(input_ids=ids, use_cache=False).last_hidden_state

    def _pool_text(self, input_ids: torch.Tensor, mask: torch.Tensor, longest: int | None = None) -> torch.Tensor:
        """[B, L] ids -> the projected state of each row's last real token [B, clip_embed_dim]"""
        return self._pool_states(self._text_states(input_ids, mask, longest), mask)

    def _pool_states(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """States [B, L', C] with the real tokens first -> the last real one, projected [B, clip_embed_dim]"""
        last = mask.sum(dim=1) - 1  # [B]
        pooled = states[torch.arange(states.shape[0], device=states.device), last.to(states.device)]  # [B, C]
        return pooled @ self.text_projection.to(pooled.device)

    def _checked_text_to_embed(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, int | None]:
        """The mask and the longest row of checked ids [B, L]; warns about ids without `</s>` or without the prefix."""
        mask, facts = check_texts("input_ids", input_ids, attention_mask, self.config)
        if not facts.all_end_with_eos:
            logger.warning_once(
                "A text does not end with `</s>`, so its embedding is read at a token that the checkpoint was not"
                " trained for. Set `tokenizer.add_eos_token = True`, or use the processor."
            )
        if not facts.all_start_with_prefix:
            logger.warning_once(
                "A text does not start with `summarize:`: the checkpoint was trained to embed texts with this prefix"
                " only. Add it, or use the processor."
            )
        return mask, facts.longest

    def _text_embeds(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Checked ids [B, L] -> [B, clip_embed_dim], not normalised."""
        mask, longest = self._checked_text_to_embed(input_ids, attention_mask)
        return self._pool_text(input_ids, mask, longest)

    @with_accelerate_hook
    def embed_text(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, normalize: bool = True
    ) -> torch.Tensor:
        """Embed texts.

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
        """Class embeddings for zero-shot classification, computed once for any number of images: the cosines are
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
        """As [`embed_text`], for any number of texts of any length. Texts are read in batches of similar length, so
        there is little padding, and memory holds one batch.

        Args:
            input_ids (sequence of sequences of `int`): the ids of each text, `<s> summarize:TEXT </s>`, without
                padding, as `processor(text=..., padding=False, return_tensors=None).input_ids`.
            max_tokens (`int`): maximum tokens of a batch, including padding. A longer text is a batch of its own.
            normalize (`bool`): scale the embeddings to unit length.

        Returns:
            `torch.Tensor`: [T, clip_embed_dim], in the order of the texts, without gradients.

        Raises:
            `ValueError`, `TypeError`: no text, an empty one, an id that is no integer or too large, `max_tokens` < 1.
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
            padded = pad_sequence([torch.tensor(input_ids[index]) for index in batch], batch_first=True)
            mask = pad_sequence([torch.ones(len(input_ids[index])) for index in batch], batch_first=True)
            mask, longest = self._checked_text_to_embed(padded, mask)  # on the host, where reading is free
            embeds.append(self._pool_text(padded.to(device), mask.to(device), longest).to(device))
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
        mask, facts = check_texts("input_ids", input_ids, attention_mask, self.config)
        return restore_positions(self._text_states(input_ids, mask, facts.longest), mask)
