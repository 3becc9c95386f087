"""Training objectives of InternVL-14B: stage 2 (matching, contrast and captions) and retrieval fine-tuning
(InternVL paper, arXiv:2312.14238, section 3.3; docs/model.md, "Training objectives").
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers.utils import ModelOutput

from .compat_internvl import refuse_known_bad
from .modeling_internvl import InternVLModel
from .texts_internvl import check_texts, concatenate_padded, has_values, padding_order

PREFIX_IDS = 4  # `<s>` and `summarize:` in the published checkpoint, for configs without `embed_prefix_ids`


@dataclass
class InternVLTrainingOutput(ModelOutput):
    """Losses of a training step, scalars; `loss` is their sum."""

    loss: torch.Tensor | None = None
    loss_itm: torch.Tensor | None = None  # image-text matching
    loss_itc: torch.Tensor | None = None  # image-text contrast
    loss_itg: torch.Tensor | None = None  # image-grounded text generation; None for retrieval


class GatherWithGradient(torch.autograd.Function):
    """Concatenate the ranks' tensors; backward sums the ranks' gradients for each slice (docs/model.md, "Gather")."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        ctx.size = len(local)
        return gather(local)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # the caller's must not change
        dist.all_reduce(gradient)
        return gradient.narrow(0, ctx.size * dist.get_rank(), ctx.size)


def gather(local: torch.Tensor) -> torch.Tensor:
    """Concatenate the tensors of all ranks along the first dimension, without gradients."""
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def own_rows(batch: int, device: torch.device) -> torch.Tensor:
    """The places [B] of this rank's rows among the rows of all ranks."""
    return torch.arange(batch, device=device) + (dist.get_rank() * batch if is_distributed() else 0)


def mean_of_valid(losses: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The mean over the valid rows; 0 with zero gradients if no row is valid."""
    valid = valid.to(losses.device)
    return (losses * valid).sum() / valid.sum().clamp(min=1)


class InternVLTrainingModel(InternVLModel):
    """Losses and input checks that both training objectives share."""

    def _matching_losses(
        self, image_states: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """ITM: the cross-entropy of match and no match, per row."""
        logits = self._match(image_states, input_ids, mask).float()
        return F.cross_entropy(logits, labels.to(logits.device), reduction="none")

    def _contrastive_losses(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0
    ) -> torch.Tensor:
        """ITC: the cross-entropies [B] of local images with all ranks' texts, and of local texts with all images."""
        images, texts = F.normalize(image_embeds, dim=-1), F.normalize(text_embeds, dim=-1)
        all_images, all_texts = images, texts
        if is_distributed():
            all_images, all_texts = GatherWithGradient.apply(images), GatherWithGradient.apply(texts)
        scale = self.logit_scale.exp()
        losses = [
            F.cross_entropy(logits, targets.to(logits.device), reduction="none", label_smoothing=smoothing)
            for logits in ((scale * images @ all_texts.T).float(), (scale * texts @ all_images.T).float())  # [B, W * B]
        ]
        return torch.stack(losses).mean(dim=0)

    def _checked_texts(
        self, name: str, input_ids: torch.Tensor, mask: torch.Tensor | None, batch: int, *others: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Check a token batch; return it, its mask and `others` of its shape with the real tokens on the left."""
        mask, facts = check_texts(name, input_ids, mask, self.config)
        if len(input_ids) != batch:
            raise ValueError(f"`{name}` must have one row per image ({batch}), got {len(input_ids)}.")
        # Labels may count at padding, so texts with labels keep all columns.
        order = padding_order(mask, "right")[:, : None if others else facts.longest]
        return tuple(tensor.gather(1, order) for tensor in (input_ids, mask, *others))


class InternVLForPreTraining(InternVLTrainingModel):
    """Stage 2 of the original's training: matching, contrast and captions (paper, section 3.3; docs/model.md, "Stage
    2"). The contrast takes its queries from the captioning pass, where they attend only to themselves and the image.
    Only the matching pass needs a mask.
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
        """Compute the losses of one batch.

        Args:
            pixel_values (`torch.Tensor`): [B, 3, H, W]; every rank has the same B.
            positive_input_ids, negative_input_ids (`torch.Tensor`): [B, L] ids of texts `<s> TEXT </s>` that match and
                do not match the image. The first B - B // 2 rows use the negative, the others the positive text.
            summarize_input_ids (`torch.Tensor`): [B, L] ids of `<s> summarize:TEXT </s>`. Rows without a TEXT are
                left out of the contrast.
            input_ids, labels (`torch.Tensor`): [B, L] ids of the prompt and caption, and the same ids with -100 at
                positions without a loss. The model shifts them by one.
            ..._attention_mask (`torch.Tensor` or None): like the ids; None means "every id but 0".

        Returns:
            [`InternVLTrainingOutput`]: `loss` = `loss_itm` + `loss_itc` + `loss_itg`.
        """
        refuse_known_bad("training")
        batch, checked = len(pixel_values), self._checked_texts
        positive_ids, positive_mask = checked("positive_input_ids", positive_input_ids, positive_attention_mask, batch)
        negative_ids, negative_mask = checked("negative_input_ids", negative_input_ids, negative_attention_mask, batch)
        summary_ids, summary_mask = checked("summarize_input_ids", summarize_input_ids, summarize_attention_mask, batch)
        self._check_labels(input_ids, labels)
        caption_ids, _, labels = checked("input_ids", input_ids, attention_mask, batch, labels)
        image_states = self._image_states(pixel_values)

        num_negative = batch - batch // 2
        mask = concatenate_padded((negative_mask[:num_negative], positive_mask[num_negative:]))
        losses = self._matching_losses(
            image_states,
            concatenate_padded((negative_ids[:num_negative], positive_ids[num_negative:])),
            mask,
            torch.arange(batch, device=image_states.device).ge(num_negative).long(),
        )
        loss_itm = mean_of_valid(losses, mask.sum(dim=1) != 2)  # texts of two tokens, `<s> </s>`, are empty
        states = self._joint_states(image_states, caption_ids, None, bidirectional=False)
        queries, text = states.split([self.config.num_query_token, caption_ids.shape[1]], dim=1)
        summaries = self._pool_text(summary_ids, summary_mask)
        empty = 1 + (
            PREFIX_IDS if self.config.embed_prefix_ids is None else len(self.config.embed_prefix_ids)
        )  # `</s>`
        has_text = summary_mask.sum(dim=1) != empty
        loss_itc = self._contrastive_loss(self.clip_projector2(queries), summaries, has_text)
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
        """ITC: an image and a text of all ranks are a pair if they are in the same row."""
        targets = own_rows(len(valid), valid.device)
        losses = self._contrastive_losses(image_embeds, text_embeds, targets, self.config.label_smoothing)
        return mean_of_valid(losses, valid)


class InternVLForRetrieval(InternVLTrainingModel):
    """Matching and contrast with soft targets (docs/model.md, "Retrieval fine-tuning")."""

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
        """Compute the losses of one batch.

        Args:
            image_ids (`torch.Tensor`, *optional*): [B]; all pairs of rows with the same number, on any rank, are
                positives. By default every row has a number of its own.
            input_ids, attention_mask, labels: not used; they allow both objectives to take the same batches.
            others: see [`InternVLForPreTraining.forward`].

        Returns:
            [`InternVLTrainingOutput`]: `loss` = `loss_itm` + `loss_itc`.
        """
        refuse_known_bad("training")
        batch, checked = len(pixel_values), self._checked_texts
        positive_ids, positive_mask = checked("positive_input_ids", positive_input_ids, positive_attention_mask, batch)
        negative_ids, negative_mask = checked("negative_input_ids", negative_input_ids, negative_attention_mask, batch)
        summary_ids, summary_mask = checked("summarize_input_ids", summarize_input_ids, summarize_attention_mask, batch)
        image_states = self._image_states(pixel_values)
        loss_itm = self._matching_losses(
            torch.cat([image_states, image_states]),
            concatenate_padded((negative_ids, positive_ids)),
            concatenate_padded((negative_mask, positive_mask)),
            torch.arange(2 * batch, device=image_states.device).ge(batch).long(),
        ).mean()
        text_embeds = self._pool_text(summary_ids, summary_mask)
        targets = self._soft_targets(image_ids, batch, image_states.device)
        queried, pooled = self.clip_projector2(self._query_states(image_states)), self.clip_projector(image_states)
        loss_itc = self._contrastive_loss(queried, text_embeds, targets)
        loss_itc = loss_itc + self._contrastive_loss(pooled, text_embeds, targets)
        return InternVLTrainingOutput(loss=loss_itm + loss_itc, loss_itm=loss_itm, loss_itc=loss_itc)

    def _soft_targets(self, image_ids: torch.Tensor | None, batch: int, device: torch.device) -> torch.Tensor:
        """Target probabilities [B, W * B] of each local row: uniform over all ranks' rows with its `image_ids`."""
        if image_ids is None:
            image_ids = own_rows(batch, device)
        elif not isinstance(image_ids, torch.Tensor) or image_ids.shape != (batch,):
            shape = list(getattr(image_ids, "shape", [])) or type(image_ids).__name__
            raise ValueError(f"`image_ids` must be [{batch}], one per image, got {shape}.")
        image_ids = image_ids.to(device)
        all_ids = gather(image_ids) if is_distributed() else image_ids
        same = (image_ids[:, None] == all_ids[None, :]).float()
        return same / same.sum(dim=1, keepdim=True)

    def _contrastive_loss(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        # Without `label_smoothing`, which belongs to stage 2 (docs/model.md, "Retrieval fine-tuning").
        return self._contrastive_losses(image_embeds, text_embeds, targets).mean()


__all__ = ["InternVLForPreTraining", "InternVLForRetrieval"]
