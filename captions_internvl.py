"""Captions: check the arguments of `generate`, read images and prompts once into a cache, and let transformers decode.

[`InternVLSeen`] holds the states of images for several calls. `caption` returns texts, the best of several if asked.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.utils import logging

from .compat_internvl import (
    ARGUMENTS_OF_GENERATE,
    CACHE_NAME,
    convert_cache,
    copy_cache,
    refuse_known_bad,
    with_accelerate_hook,
)
from .texts_internvl import check_texts, padding_order

logger = logging.get_logger(__name__)

DEFAULT_NEW_TOKENS = 32
SET_BY_CAPTION = ("input_ids", "attention_mask", "num_return_sequences", "return_dict_in_generate")


class InternVLSeen(NamedTuple):
    """States of images, computed once by [`InternVLModel.look_at`]. Methods take it in place of `pixel_values`, and do
    not change it. The last two fields are None if the queries were not run.
    """

    image_states: torch.Tensor  # [B, 1 + N, vision width], the vision tokens
    query_states: torch.Tensor | None = None  # [B, num_query_token, C], the outputs of the queries
    query_cache: Cache | None = None  # keys and values of the queries, for captions


class CaptionSide:
    """Methods that write captions, for models with `qllama` and `query_tokens`."""

    config: Any
    device: Any
    generation_config: Any
    qllama: Any
    check_processor: Any
    embed_image: Any
    embed_texts: Any
    get_input_embeddings: Any
    look_at: Any
    _as_seen: Any
    _joint_embeds: Any
    _joint_states: Any
    _query_states: Any
    _require_queries: Any
    _with_queries: Any

    @torch.no_grad()
    @with_accelerate_hook
    def generate(
        self,
        pixel_values: torch.Tensor | InternVLSeen | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Write captions. All of `GenerationMixin.generate`'s options work except assistant models, guidance, prompt
        lookup and custom loops. Images and prompts run once, not once per beam.

        Args:
            pixel_values (`torch.Tensor` or [`InternVLSeen`]): [B, 3, H, W], normalised by the processor.
            input_ids (`torch.Tensor`, *optional*): [B, L] ids of the prompts, `<s>` first and no `</s>`, padded on
                either side; one prompt for all images, or any number for one image. Defaults to the config's
                `caption_prompt_ids`.
            attention_mask (`torch.Tensor`, *optional*): like `input_ids`; without it every id but 0 is real.
            generation_config (`GenerationConfig`, *optional*): defaults to the checkpoint's.
            generate_kwargs: as in `GenerationMixin.generate`: `num_beams`, `do_sample`, `max_new_tokens`, ...
                `max_length` and `min_length` count the tokens that the original returned: the new ones and a `<s>`.
                `prefill_chunk_size` has no effect: queries and prompt are always read in one pass.

        Returns:
            `torch.Tensor`: [B, new tokens], without the prompt; or transformers' output class on request.

        Raises:
            `ValueError`, `TypeError`: no image, an invalid image, prompt or mask, an unknown argument, or one that is
                not supported: assistants, guidance, prompt lookup, `custom_generate`, `output_attentions`.
        """
        refuse_known_bad("captions")
        self._require_queries("`generate`")
        if pixel_values is None:
            raise ValueError("`pixel_values` must be given: captions need an image.")
        arguments = self._decoding_arguments(generation_config, generate_kwargs)
        config = arguments["generation_config"]
        seen = self._as_seen(pixel_values)
        input_ids, mask = self._prompt(input_ids, attention_mask, len(seen.image_states), seen.image_states.device)
        mask = self._with_queries(mask)
        cache = self._read_prompts(seen, input_ids[:, :-1], mask[:, :-1])
        copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        length = mask.shape[1] + config.max_new_tokens
        cache = convert_cache(config, cache, self.config.qllama_config, length)
        # Embeddings instead of ids, so that logits processors, streamers and results contain only the new tokens.
        return self.qllama.generate(
            input_ids[:, :0],  # no token yet; transformers may create its own on the meta device
            inputs_embeds=self._joint_embeds(input_ids),
            attention_mask=mask,
            **{CACHE_NAME: cache},
            **arguments,
        )

    @torch.no_grad()
    def caption(
        self,
        processor: Any,
        images: Any = None,
        prompt: str | Sequence[str] | None = None,
        candidates: int = 1,
        *,
        pixel_values: torch.Tensor | InternVLSeen | None = None,
        **generate_kwargs: Any,
    ) -> list[str]:
        """Write captions as texts. Of several candidates per image, the one whose text embedding is nearest to the
        image's embedding in mode InternVL-G is returned. All images are one batch.

        Args:
            processor ([`InternVLProcessor`]): the processor of the checkpoint.
            images: one image or a list of B, as the processor takes them.
            prompt (`str` or sequence of `str`, *optional*): one prompt for all images, or one per image. Defaults to
                the config's `caption_prompt_ids`.
            candidates (`int`): number of texts to choose from. They are the results of a beam search with as many
                beams, or samples if `do_sample=True`. An empty text is returned only if all are empty.
            pixel_values (`torch.Tensor` or [`InternVLSeen`], *optional*): [B, 3, H, W], normalised by the processor,
                instead of `images`.
            generate_kwargs: as in [`generate`]: `max_new_tokens`, `do_sample`, ... `candidates` takes precedence over
                a `generation_config`'s numbers of beams and sequences.

        Returns:
            `list[str]`: B texts, without the prompt.

        Raises:
            `ValueError`, `TypeError`: no image, a wrong number of prompts, an empty one, `candidates` < 1, fewer beams
                than candidates, an argument of `SET_BY_CAPTION`, a processor of another checkpoint, or an input that
                the processor or [`generate`] refuses.
        """
        self._require_queries("`caption`")
        self.check_processor(processor)
        options = self._candidate_options(candidates, generate_kwargs)
        if (images is None) == (pixel_values is None):
            raise ValueError("Exactly one of `images` and `pixel_values` must be given.")
        if pixel_values is None:
            pixels = processor(images=images, task="embed").pixel_values
            # On "meta" the weights are offloaded, and their hooks move the pixels.
            pixel_values = pixels if self.device.type == "meta" else pixels.to(self.device)
        if candidates > 1 and not isinstance(pixel_values, InternVLSeen):
            pixel_values = self.look_at(pixel_values)
        if prompt is not None:
            batch = len(pixel_values.image_states if isinstance(pixel_values, InternVLSeen) else pixel_values)
            options |= processor(text=_checked_prompts(prompt, batch), task="caption")
        texts = processor.batch_decode(self.generate(pixel_values, **options), skip_special_tokens=True)
        texts = [text.strip() for text in texts]
        if candidates == 1:
            return texts
        return self._nearest(processor, self.embed_image(pixel_values, mode="InternVL-G"), texts)

    def _candidate_options(self, candidates: int, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `generate` for so many candidates per image."""
        if taken := [name for name in SET_BY_CAPTION if name in given]:
            raise TypeError(f"`caption` sets `{taken[0]}` itself: use `prompt` and `candidates`, or call `generate`.")
        if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
            raise ValueError(f"`candidates` must be a positive integer, got {candidates!r}.")
        options = given | {"num_return_sequences": candidates, "return_dict_in_generate": False}
        if candidates == 1:
            return options
        config = given.get("generation_config") or self.generation_config
        is_sampled = given.get("do_sample", config.do_sample)
        beams = options.setdefault("num_beams", 1 if is_sampled else candidates)
        if beams < candidates and not (is_sampled and beams == 1):
            raise ValueError(f"`num_beams` must be at least `candidates`, {candidates}, got {beams}.")
        return options

    def _nearest(self, processor: Any, image_embeds: torch.Tensor, texts: list[str]) -> list[str]:
        """Each image's nearest candidate: embeddings [B, clip_embed_dim], B x candidates texts -> B texts. Of equal
        cosines the first one wins, and an empty text loses.
        """
        real = [*dict.fromkeys(text for text in texts if text.removeprefix("summarize:").strip())]
        rows: list[list[float]] = [[]] * len(image_embeds)
        if real:
            ids = processor(text=real, task="embed", padding=False, return_tensors=None).input_ids
            text_embeds = self.embed_texts(ids).to(image_embeds.device)
            rows = (image_embeds.float() @ text_embeds.float().T).tolist()  # bfloat16 would make many cosines equal
        count = len(texts) // len(rows)
        groups = (texts[start : start + count] for start in range(0, len(texts), count))
        cosines = (dict(zip(real, row)) for row in rows)
        return [max(group, key=lambda text: of.get(text, -2.0)) for group, of in zip(groups, cosines)]

    def _read_prompts(self, seen: InternVLSeen, input_ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache:
        """Run queries and prompts, ids [B, L >= 0] with a mask [B, num_query_token + L], into a new cache of B rows."""
        batch, length = input_ids.shape
        cache = DynamicCache(config=self.config.qllama_config)
        if length and seen.query_cache is None and len(seen.image_states) == batch:
            self._joint_states(seen.image_states, input_ids, mask, bidirectional=False, cache=cache)
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
        """The prompt of every caption and its mask, both [B, L], padded on the left."""
        if input_ids is None:
            if attention_mask is not None:
                raise ValueError("`attention_mask` needs the `input_ids` that it masks, got none.")
            ids = self.config.caption_prompt_ids or [self.config.qllama_config.bos_token_id]
            input_ids = torch.tensor([ids], device=device)
        mask, facts = check_texts("input_ids", input_ids, attention_mask, self.config)
        if batch != 1 and len(input_ids) not in (1, batch):
            raise ValueError(f"`input_ids` must have one prompt, or one per image ({batch}), got {len(input_ids)}.")
        if facts.any_ends_with_eos:
            logger.warning_once(
                "A prompt ends with `</s>`: no meaningful text follows it. Set `tokenizer.add_eos_token = False`, or"
                ' call the processor with `task="caption"`.'
            )
        # The embedding of padding may be zero, and static caches of some releases treat zero keys as empty slots.
        input_ids = input_ids.masked_fill(mask.logical_not(), self.config.qllama_config.bos_token_id)
        order = padding_order(mask, "left")
        # Not the device of a weight: offloaded weights are elsewhere until they run.
        run_device = self.get_input_embeddings()(input_ids[:1, :1]).device
        rows = max(batch, len(input_ids))
        input_ids, mask = input_ids.gather(1, order), mask.gather(1, order).long()
        return input_ids.expand(rows, -1).to(run_device), mask.expand(rows, -1).to(run_device)

    def _decoding_arguments(
        self, generation_config: GenerationConfig | None, generate_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The generation config with all requested options, and the arguments that are not part of it, such as a
        streamer. Lengths become numbers of new tokens: transformers' `max_length` would include the queries and the
        prompt.
        """
        config, plain = deepcopy(generation_config or self.generation_config), GenerationConfig()
        lengths = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))
        for old, new in lengths:
            if generate_kwargs.get(old) is not None:
                setattr(config, new, None)  # the argument takes precedence over the checkpoint's default
        rest = config.update(**generate_kwargs)
        if unknown := sorted(set(rest) - ARGUMENTS_OF_GENERATE):
            raise TypeError(f"generate() got an unexpected keyword argument '{unknown[0]}'")
        scale = None if config.guidance_scale == 1 else config.guidance_scale
        lookup, early_exit = config.prompt_lookup_num_tokens, config.assistant_early_exit
        options = {"guidance_scale": scale, "prompt_lookup_num_tokens": lookup, "assistant_early_exit": early_exit}
        options |= {name: rest.get(name) for name in ("assistant_model", "custom_generate")}
        if unsupported := [name for name, value in options.items() if value is not None]:
            raise ValueError(f"`generate` does not support `{unsupported[0]}`, which would ignore the image.")
        if config.output_attentions:
            raise ValueError("`generate` does not support `output_attentions`: the model keeps no attention weights.")
        for old, new in lengths:
            length = getattr(config, old)
            is_given = generate_kwargs.get(old) is not None or length not in (None, getattr(plain, old))
            if is_given and getattr(config, new) is None:
                setattr(config, new, max(length - 1, 0))
            setattr(config, old, getattr(plain, old))
        if config.max_new_tokens is None:
            config.max_new_tokens = DEFAULT_NEW_TOKENS
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(config, name) is None:
                setattr(config, name, getattr(self.config.qllama_config, name))
        return {"generation_config": config, **rest}


def _checked_prompts(prompt: Any, batch: int) -> list[str]:
    """One prompt, or one for each of `batch` images."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(each, str) and each.strip() for each in prompts):
        raise TypeError(f"`prompt` must be a text or a list of texts, none of them empty, got {prompt!r}.")
    if not isinstance(prompt, str) and len(prompts) != batch:
        raise ValueError(f"`prompt` must be one text, or one per image ({batch}), got {len(prompts)}.")
    return list(prompts)
