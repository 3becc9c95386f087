"""InternVL-14B: InternViT-6B reads images, QLLaMA reads and writes text, CLIP-style heads compare both.

Paper: InternVL (arXiv:2312.14238). The numbers are those of the published checkpoint (docs/model.md, "Features and
logits"); parameter names are its format.

Two ways to embed an image:
* InternVL-C pools the vision tower's tokens;
* InternVL-G also runs the 96 queries through QLLaMA with the image, and adds both embeddings.

Where this file differs from the original implementation, and why:
* No dense attention mask is built here: masks are for padding, in matching and in prompts (see modeling_qllama.py).
* `embed_image`, `match`, `look_at` and `caption` are new, and so are the methods of texts_internvl.py whose names begin
  with `embed`; the original methods keep their values and types, but `generate` leaves out the leading `<s>`.

texts_internvl.py embeds texts, captions_internvl.py writes captions, and training_internvl.py has the losses.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import create_repo, upload_folder
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.utils import ModelOutput

from .attention_internvl import RegistryAttention
from .captions_internvl import CaptionSide, InternVLSeen
from .compat_internvl import ignore_in_checkpoint, with_accelerate_hook
from .configuration_intern_vit import InternVisionConfig  # noqa: F401 - some loaders copy direct imports only
from .configuration_internvl import InternVLConfig, QLlamaConfig
from .loading_internvl import InternPreTrainedModel
from .modeling_intern_vit import InternVisionModel
from .modeling_qllama import QLlamaForCausalLM, QLlamaTextEncoder
from .texts_internvl import TextSide, check_texts, restore_positions, without_padding

MODES = ("InternVL-C", "InternVL-G")
# Patterns of the tensors of the joint checkpoint that a part of the model does not use.
NOT_FOR_CONTRAST = [r"^query_tokens$", r"^clip_projector2\.", r"^itm_head\.", r"^qllama\.(lm_head|.*\.cross_attn)\."]
NOT_FOR_TEXT = [*NOT_FOR_CONTRAST, r"^vision_model\.", r"^clip_projector\.", r"^logit_scale$"]
NOT_FOR_IMAGES = [*NOT_FOR_CONTRAST, r"^qllama\.", r"^text_projection$", r"^logit_scale$"]


@dataclass
class InternVLOutput(ModelOutput):
    """What [`InternVLModel`] returns; a field whose input was not given is None. Embeddings have unit length."""

    logits_per_image: torch.Tensor | None = None  # [images, texts], cosine similarities times `exp(logit_scale)`
    logits_per_text: torch.Tensor | None = None  # [texts, images], its transpose
    last_hidden_state: torch.Tensor | None = None  # [images, 1 + N, vision width], only without texts
    image_embeds: torch.Tensor | None = None  # [images, clip_embed_dim]
    text_embeds: torch.Tensor | None = None  # [texts, clip_embed_dim]
    pooler_output: torch.Tensor | None = None  # `image_embeds` for pipelines, only without texts


@dataclass
class InternVLImageOutput(ModelOutput):
    """What [`InternVLVisionModelWithProjection`] returns."""

    image_embeds: torch.Tensor | None = None  # [B, clip_embed_dim] in mode InternVL-C, not normalised
    last_hidden_state: torch.Tensor | None = None  # [B, 1 + N, C], the vision tokens, class token first
    hidden_states: tuple[torch.Tensor, ...] | None = None  # layers + 1 times [B, 1 + N, C], on request


@dataclass
class InternVLTextOutput(ModelOutput):
    """What [`InternVLTextModelWithProjection`] returns."""

    text_embeds: torch.Tensor | None = None  # [B, clip_embed_dim], not normalised
    last_hidden_state: torch.Tensor | None = None  # [B, L, C], all tokens; values at padding are arbitrary


# -------------------------------------------------------------------------------------------------------- heads


class PoolingAttention(RegistryAttention):
    """Attention of a single query, the mean of the tokens, to these tokens."""

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
    """Pool tokens into one embedding: their mean attends to them (docs/model.md, "Features and logits").

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
    _skip_keys_device_placement = QLlamaConfig.keys_to_ignore_at_inference
    # Every embedding, match and caption passes through one of these. In 8 bits they cause a quarter of the error of
    # tiny/'s image embeddings (1 - cosine), and would save 2 % of the bytes at 14B (tools/machines/quantised_sizes.py).
    _keep_unquantized = ("clip_projector", "clip_projector2", "itm_head", "qllama.lm_head")

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As in transformers; `AutoModel` then loads the model's class, or the first of its bases in this module."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        loaded_as = next(each.__name__ for each in type(self).__mro__ if each.__module__ == __name__)
        auto_map = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = auto_map | {"AutoModel": f"modeling_internvl.{loaded_as}"}
        self.config.save_pretrained(save_directory)
        if push_to_hub:  # not by the call above, which uploads before the config is right
            token, name = kwargs.get("token"), kwargs.get("repo_id", Path(save_directory).name)
            repo_id = create_repo(name, token=token, private=kwargs.get("private"), exist_ok=True).repo_id
            names = ("token", "commit_message", "commit_description", "create_pr", "revision")
            options = {name: kwargs[name] for name in names if name in kwargs}
            upload_folder(repo_id=repo_id, folder_path=save_directory, **options)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("query_tokens", "q_bias", "k_bias", "v_bias"):
                nn.init.zeros_(parameter)
            elif name == "text_projection":
                nn.init.normal_(parameter, std=self.config.initializer_range)
            elif name == "logit_scale":
                nn.init.constant_(parameter, math.log(1 / 0.07))

    def get_input_embeddings(self) -> nn.Module:
        return self.qllama.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.qllama.set_input_embeddings(value)


class ImageSide:
    """Methods that read and embed images, for models with `vision_model` and `clip_projector`."""

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
            raise ValueError(f"{what} needs the queries, but this {type(self).__name__} was loaded without them.")

    def _as_seen(self, pixel_values: torch.Tensor | InternVLSeen) -> InternVLSeen:
        if isinstance(pixel_values, InternVLSeen):
            return pixel_values
        return InternVLSeen(self.vision_model(pixel_values).last_hidden_state)

    def _image_states(self, pixel_values: torch.Tensor | InternVLSeen) -> torch.Tensor:
        """[B, 3, H, W] -> the vision tower's tokens [B, 1 + N, vision width]"""
        return self._as_seen(pixel_values).image_states

    def _image_embeds(self, pixel_values: torch.Tensor | InternVLSeen, mode: str | None) -> torch.Tensor:
        """[B, 3, H, W] -> [B, clip_embed_dim], not normalised."""
        self._checked_mode(mode)
        return self.clip_projector(self._image_states(pixel_values))

    @with_accelerate_hook
    def embed_image(
        self, pixel_values: torch.Tensor | InternVLSeen, mode: str | None = None, normalize: bool = True
    ) -> torch.Tensor:
        """Embed images.

        Args:
            pixel_values (`torch.Tensor` or [`InternVLSeen`]): [B, 3, H, W], normalised by the processor.
            mode (`str`, *optional*): "InternVL-C" or "InternVL-G"; defaults to the class's `default_mode`.
            normalize (`bool`): scale the embeddings to unit length; `False` gives the values of `encode_image`.

        Returns:
            `torch.Tensor`: [B, clip_embed_dim]

        Raises:
            `ValueError`, `TypeError`: unknown mode, or pixels of a wrong shape or dtype.
        """
        embeds = self._image_embeds(pixel_values, mode)
        return F.normalize(embeds, dim=-1) if normalize else embeds

    @with_accelerate_hook
    def encode_image(self, image: torch.Tensor, mode: str | None = None) -> torch.Tensor:
        """The original call: [B, 3, H, W] -> [B, clip_embed_dim], not normalised. In mode InternVL-G it is the sum of
        two embeddings of unit length (docs/model.md, "Features and logits").
        """
        return self._image_embeds(image, mode)


class InternVLTextModelWithProjection(InternVLPreTrainedModel, TextSide):
    """The text encoder of the joint model, loaded from its checkpoint: QLLaMA without cross-attentions and language
    head, and `text_projection`. It has 6.7 of the 13.8 billion parameters and gives the joint model's values.
    """

    main_input_name = "input_ids"

    def __init__(self, config: InternVLConfig):
        super().__init__(config)
        self.qllama = QLlamaTextEncoder(config.qllama_config)
        self.text_projection = nn.Parameter(torch.zeros(config.qllama_config.hidden_size, config.clip_embed_dim))
        self.post_init()
        ignore_in_checkpoint(self, NOT_FOR_TEXT)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, return_dict: bool | None = None
    ) -> tuple[Any, ...] | InternVLTextOutput:
        """Embed texts.

        Args:
            input_ids (`torch.Tensor`): [B, L] ids of `<s> summarize:TEXT </s>`, padded on either side.
            attention_mask (`torch.Tensor`, *optional*): [B, L]; without it every id but 0 is real.
            return_dict (`bool`, *optional*): `False` for a plain tuple.

        Returns:
            [`InternVLTextOutput`]

        Raises:
            `ValueError`, `TypeError`: wrong shape, dtype or range of ids, another shape of the mask, or an empty row.
        """
        mask, longest = self._checked_text_to_embed(input_ids, attention_mask)
        states = self._text_states(input_ids, mask, longest)
        output = InternVLTextOutput(self._pool_states(states, mask), restore_positions(states, mask))
        return output.to_tuple() if return_dict is False else output


class InternVLVisionModelWithProjection(InternVLPreTrainedModel, ImageSide):
    """The image encoder of mode InternVL-C, loaded from the joint model's checkpoint: InternViT and `clip_projector`.
    It has 5.9 of the 13.8 billion parameters and gives the joint model's values.
    """

    def __init__(self, config: InternVLConfig):
        super().__init__(config)
        self.vision_model = InternVisionModel(config.vision_config)
        self.clip_projector = AttentionPool(config, config.vision_config.hidden_size)
        self.post_init()
        ignore_in_checkpoint(self, NOT_FOR_IMAGES)

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> tuple[Any, ...] | InternVLImageOutput:
        """Embed images.

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


class InternVLModel(InternVLPreTrainedModel, TextSide, ImageSide, CaptionSide, GenerationMixin):
    """The joint model: embeds images and texts, compares them, matches them and writes captions.

    Args:
        config ([`InternVLConfig`]): sizes and options. With `contrastive_only` the model has only the parts of
            InternVL-C: no `query_tokens`, `clip_projector2` and `itm_head`, no cross-attentions and no `lm_head`.

    Attributes:
        vision_model ([`InternVisionModel`]): InternViT.
        qllama ([`QLlamaForCausalLM`]): QLLaMA; with `contrastive_only` a [`QLlamaTextEncoder`].
        query_tokens (`nn.Parameter`): [1, num_query_token, C], the queries.
        clip_projector, clip_projector2 ([`AttentionPool`]): pools of the vision tokens and of the query outputs.
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
        """Run the queries with vision tokens: [B, 1 + N, vision width] -> [B, num_query_token, C]"""
        queries = self.query_tokens.expand(image_states.shape[0], -1, -1)
        return self.qllama.model(
            inputs_embeds=queries,
            encoder_hidden_states=image_states,
            num_bidirectional=queries.shape[1],
            cache=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _with_queries(self, mask: torch.Tensor) -> torch.Tensor:
        """The mask of texts [B, L] -> the mask of [queries ; text]"""
        return F.pad(mask, (self.config.num_query_token, 0), value=1)

    def _joint_states(
        self,
        image_states: torch.Tensor,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        bidirectional: bool,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Run [queries ; text] with vision tokens: ids [B, L], mask [B, queries + L] -> [B, queries + L, C]"""
        embeds = self._joint_embeds(input_ids)
        return self.qllama.model(
            inputs_embeds=embeds,
            attention_mask=None if mask is None else mask.to(embeds.device),
            encoder_hidden_states=image_states,
            num_bidirectional=embeds.shape[1] if bidirectional else self.config.num_query_token,
            cache=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _joint_embeds(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids [B, L] -> [queries ; text], [B, queries + L, C]"""
        text = self.get_input_embeddings()(input_ids)  # [B, L, C]
        queries = self.query_tokens.expand(len(text), -1, -1).to(text.device)
        return torch.cat([queries, text], dim=1)

    # ------------------------------------------------------------------------------------------------ new calls

    @with_accelerate_hook
    def look_at(self, pixel_values: torch.Tensor, queries: bool = True) -> InternVLSeen:
        """Run images once for several calls, which take the result in place of `pixel_values`.

        Args:
            pixel_values (`torch.Tensor`): [B, 3, H, W], normalised by the processor.
            queries (`bool`): also run the queries, for mode InternVL-G and captions.

        Raises:
            `ValueError`, `TypeError`: pixels of a wrong shape or type, or a model loaded without queries.
        """
        if not isinstance(pixel_values, torch.Tensor):
            raise TypeError(f"`pixel_values` must be a tensor, got {type(pixel_values).__name__}.")
        image_states = self.vision_model(pixel_values).last_hidden_state
        if not queries:
            return InternVLSeen(image_states)
        self._require_queries("`look_at` with `queries=True`")
        cache = DynamicCache(config=self.config.qllama_config)
        return InternVLSeen(image_states, self._query_states(image_states, cache), cache)

    @with_accelerate_hook
    def match(
        self,
        pixel_values: torch.Tensor | InternVLSeen,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        all_pairs: bool = False,
    ) -> torch.Tensor:
        """Does the text match the image? QLLaMA reads both together: more accurate than a cosine, and slower, so meant
        for re-ranking a short list (docs/model.md, "Matching").

        Args:
            pixel_values (`torch.Tensor` or [`InternVLSeen`]): [B, 3, H, W], or [I, 3, H, W] for all pairs.
            input_ids (`torch.Tensor`): [B, L] ids of `<s> TEXT </s>`, or [T, L] for all pairs.
            attention_mask (`torch.Tensor`, *optional*): like `input_ids`; without it every id but 0 is real.
            all_pairs (`bool`): score every image with every text instead of the i-th image with the i-th text.

        Returns:
            `torch.Tensor`: logits [B, 2], or [I, T, 2] for all pairs; index 1 is "match".

        Raises:
            `ValueError`, `TypeError`: different numbers of images and texts without `all_pairs`, or an invalid input.
        """
        self._require_queries("`match`")
        mask, facts = check_texts("input_ids", input_ids, attention_mask, self.config)
        image_states = self._image_states(pixel_values)
        input_ids, mask = without_padding(input_ids, mask, facts.longest)
        if all_pairs:
            return torch.stack([self._match(states, input_ids, mask) for states in image_states.split(1)])
        if len(image_states) != len(input_ids):
            counts = f"{len(image_states)} images and {len(input_ids)} texts"
            raise ValueError(f"`pixel_values` and `input_ids` must be pairs, got {counts}. Or pass `all_pairs=True`.")
        return self._match(image_states, input_ids, mask)

    def _match(self, image_states: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self._joint_states(image_states, input_ids, self._with_queries(mask), bidirectional=True)
        return self.itm_head(states[:, : self.config.num_query_token]).mean(dim=1)  # [B, 2]

    # ------------------------------------------------------------------------------------------ the original calls

    @with_accelerate_hook
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
    ) -> tuple[Any, ...] | InternVLOutput:
        """Compare images and texts, or embed one of them.

        Args:
            input_ids (`torch.Tensor`, *optional*): [T, L] ids of `<s> summarize:TEXT </s>`.
            pixel_values (`torch.Tensor`, *optional*): [I, 3, H, W], normalised by the processor.
            attention_mask (`torch.Tensor`, *optional*): [T, L]; without it every id but 0 is real.
            mode (`str`, *optional*): "InternVL-C" or "InternVL-G"; defaults to the class's `default_mode`.
            return_dict (`bool`, *optional*): `False` for a plain tuple.
            image, text: the original names of `pixel_values` and `input_ids`; with them the call returns a plain tuple
                `(logits_per_image, logits_per_text)`, as the original did.
            output_hidden_states (`bool`, *optional*): serve as the vision tower of another model such as LLaVA: return
                a tuple of the vision tower's `BaseModelOutputWithPooling` with all `hidden_states` and of the query
                outputs [I, num_query_token, C]. Images may then be the first positional argument.

        Returns:
            [`InternVLOutput`]

        Raises:
            `ValueError`, `TypeError`: no input, an unknown mode, or an input of a wrong shape, dtype or range.
        """
        if output_hidden_states:
            if pixel_values is None and isinstance(input_ids, torch.Tensor) and input_ids.is_floating_point():
                input_ids, pixel_values = None, input_ids
            if pixel_values is None or not all(each is None for each in (input_ids, attention_mask, image, text)):
                raise ValueError("`output_hidden_states` is for images alone: pass `pixel_values`, and no text.")
            self._require_queries("`output_hidden_states`")
            vision = self.vision_model(pixel_values, output_hidden_states=True)
            return vision, self._query_states(vision.last_hidden_state)
        if image is None and text is None:
            output = self._compare(input_ids, pixel_values, attention_mask, mode)
            return output.to_tuple() if return_dict is False else output
        if image is None or text is None or input_ids is not None or pixel_values is not None:
            raise ValueError("`image` and `text` go together, without `pixel_values` and `input_ids`.")
        output = self._compare(text, image, attention_mask, mode)
        return output.logits_per_image, output.logits_per_text

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
            seen = self._as_seen(pixel_values)
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
    """[`InternVLModel`] with default mode InternVL-C."""


class InternVL_G(InternVLModel):  # noqa: N801
    """[`InternVLModel`] with default mode InternVL-G."""

    default_mode = "InternVL-G"


# The loader registers a class only if transformers has no config of this name; in some releases it has one.
for model_class in (InternVLModel, InternVLTextModelWithProjection, InternVLVisionModelWithProjection):
    model_class.register_for_auto_class("AutoModel")


def __getattr__(name: str) -> Any:
    """Import the training classes on request: `auto_map` names them as part of this module."""
    if name in ("InternVLForPreTraining", "InternVLForRetrieval", "InternVLTrainingOutput"):
        from .training_internvl import InternVLForRetrieval

        return getattr(sys.modules[InternVLForRetrieval.__module__], name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "InternVLModel",
    "InternVLTextModelWithProjection",
    "InternVLVisionModelWithProjection",
    "InternVL_C",
    "InternVL_G",
]
