"""Configuration of InternVL-14B and of QLLaMA, its language tower (InternVL paper, arXiv:2312.14238, section 3.2)."""

import copy
from typing import Annotated, Any

from transformers import PretrainedConfig

from .compat_internvl import set_attention_name
from .configuration_intern_vit import (
    Activation,
    CheckedConfig,
    Flag,
    Fraction,
    InternVisionConfig,
    PositiveInteger,
    PositiveNumber,
    Rule,
    StandardDeviation,
    is_integer,
    require,
)

LoraRank = Annotated[int, Rule("a LoRA rank, 0 for none", lambda value: is_integer(value) and value >= 0)]


def is_token_id(value: Any, vocab_size: int) -> bool:
    return is_integer(value) and 0 <= value < vocab_size


def pop_unsupported(name: str, kwargs: dict[str, Any], expected: str) -> None:
    """Remove an option of LLaMA that this model lacks; raise a `ValueError` if it is set."""
    value = kwargs.pop(name, None)
    require(name, value, not value, expected)


class QLlamaConfig(CheckedConfig):
    """Sizes of QLLaMA: LLaMA's fields and those of its cross-attention to the image."""

    model_type = "qllama"
    base_config_key = "qllama_config"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: PositiveInteger = 49954
    hidden_size: PositiveInteger = 4096
    intermediate_size: PositiveInteger = 11008
    num_hidden_layers: PositiveInteger = 32
    num_attention_heads: PositiveInteger = 32
    num_key_value_heads: PositiveInteger = 32  # `num_attention_heads` if not given
    hidden_act: Activation = "silu"
    max_position_embeddings: PositiveInteger = 2048  # the context that the checkpoint was trained for
    initializer_range: StandardDeviation = 0.02
    rms_norm_eps: PositiveNumber = 1e-6  # of every RMSNorm, including those of the cross-attention
    use_cache: Flag = True
    rope_theta: PositiveNumber = 10000.0  # base of the rotary positions
    attention_dropout: Fraction = 0.0
    pad_token_id: int = 0  # shared with `<unk>`
    bos_token_id: int = 1
    eos_token_id: int = 2
    num_query_token: PositiveInteger = 96  # learnable queries before the text; `InternVLConfig` sets it
    cross_attention_frequency: PositiveInteger = 2  # every such layer, from the first, has a cross-attention
    encoder_hidden_size: PositiveInteger = 3200  # width of the vision tokens; `InternVLConfig` sets it

    def __init__(self, **kwargs: Any):
        pop_unsupported("rope_scaling", kwargs, "None: the checkpoint has plain rotary positions")
        pop_unsupported("attention_bias", kwargs, "False: the checkpoint's attention has no bias")
        pop_unsupported("tie_word_embeddings", kwargs, "False: `lm_head` is its own matrix")
        if kwargs.get("num_key_value_heads") is None:
            kwargs["num_key_value_heads"] = kwargs.get("num_attention_heads", self.num_attention_heads)
        super().__init__(tie_word_embeddings=False, **kwargs)
        self.check()

    def check(self) -> None:
        super().check()
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        even = self.hidden_size % (2 * heads) == 0
        require("num_attention_heads", heads, even, f"such that {self.hidden_size=} gives even heads")
        require("num_key_value_heads", groups, heads % groups == 0, f"a divisor of {self.num_attention_heads=}")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            token = getattr(self, name)
            require(name, token, is_token_id(token, self.vocab_size), f"below {self.vocab_size=}")


class InternVLConfig(CheckedConfig):
    """Configuration of [`InternVLModel`]: both towers and the heads. The defaults are the published checkpoint's.

    Raises:
        `ValueError`: a field is out of range; the message names it.
        `TypeError`: a sub-config is neither a dict nor a config.
    """

    # Not "internvl": that name belongs to an unrelated model of transformers.
    model_type = "internvl_14b"
    sub_configs = {"vision_config": InternVisionConfig, "qllama_config": QLlamaConfig}

    vision_config: InternVisionConfig
    qllama_config: QLlamaConfig
    clip_embed_dim: PositiveInteger = 768  # width of the shared embedding space
    attn_pool_num_heads: PositiveInteger = 16  # of `clip_projector` and `clip_projector2`
    num_query_token: PositiveInteger = 96  # learnable queries; also set on `qllama_config`
    label_smoothing: Fraction = 0.0  # of the contrastive loss of stage 2; it has no effect on retrieval
    cross_attention_frequency: PositiveInteger = 2  # also set on `qllama_config`
    # Ranks of the LoRA adapters of a checkpoint that the original code fine-tuned; 0 is none. `from_pretrained` merges
    # the adapters and sets both fields to 0.
    use_backbone_lora: LoraRank = 0
    use_qllama_lora: LoraRank = 0
    force_image_size: int | None = None  # side that the position table was resized to; also set on `vision_config`
    # Default prompt of `generate`, `<s>` alone if not given. It is here because ids depend on the tokenizer.
    caption_prompt_ids: list[int] | None = None
    # Ids of `<s>` and of `summarize:`, the prefix of texts to embed: to detect a text without the prefix, a text that
    # is empty, and the tokenizer of another checkpoint.
    embed_prefix_ids: list[int] | None = None
    # Leave out the tensors that only InternVL-G, matching and captions need. `from_pretrained` takes it too, to load
    # part of a whole checkpoint.
    contrastive_only: Flag = False
    initializer_range: StandardDeviation = 0.02  # of the heads

    def __init__(self, vision_config: Any = None, qllama_config: Any = None, **kwargs: Any):
        kwargs |= {"vision_config": vision_config, "qllama_config": qllama_config}
        pop_unsupported("tie_word_embeddings", kwargs, "False: `lm_head` is its own matrix")
        # The original configs store these two; here they come from the class and the language tower.
        kwargs.pop("model_type", None)
        kwargs.pop("hidden_size", None)
        # transformers has an unrelated `InternVLModel`. Its pipelines would fall back to it, with random weights, if
        # this one does not load or lacks the task. `auto_map` names the class to load.
        if kwargs.get("architectures") == ["InternVLModel"]:
            kwargs["architectures"] = None
        attn_implementation = kwargs.pop("attn_implementation", None)
        for name, config_class in self.sub_configs.items():
            kwargs[name] = _sub_config(name, kwargs[name], config_class)
        super().__init__(tie_word_embeddings=False, **kwargs)
        self._share_with_sub_configs()
        self.check()
        if attn_implementation is not None:
            set_attention_name(self, attn_implementation)

    def _share_with_sub_configs(self) -> None:
        self.qllama_config.num_query_token = self.num_query_token
        self.qllama_config.cross_attention_frequency = self.cross_attention_frequency
        self.qllama_config.encoder_hidden_size = self.vision_config.hidden_size
        # A table resized after loading is recorded in the vision config only, which takes precedence.
        if self.force_image_size is not None and self.vision_config.force_image_size is None:
            self.vision_config.force_image_size = self.force_image_size

    def check(self) -> None:
        super().check()
        for config in (self.vision_config, self.qllama_config):
            config.check()
            fits = config.hidden_size % self.attn_pool_num_heads == 0
            require("attn_pool_num_heads", self.attn_pool_num_heads, fits, f"a divisor of the {config.hidden_size=}")
        vocab_size = self.qllama_config.vocab_size
        for name in ("caption_prompt_ids", "embed_prefix_ids"):
            ids = getattr(self, name)
            listed = isinstance(ids, (list, tuple)) and len(ids) > 0
            known = ids is None or (listed and all(is_token_id(number, vocab_size) for number in ids))
            require(name, ids, known, f"a list of ids below {vocab_size=}")

    @property
    def hidden_size(self) -> int:
        """Width of the language tower, under the name that generic tools expect."""
        return self.qllama_config.hidden_size

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the vision tower's position table is for."""
        return self.vision_config.position_grid * self.vision_config.patch_size

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.vision_config.patch_size

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """The config that transformers' generation and caches read: QLLaMA's."""
        # transformers may call this before the sub-configs are set.
        return getattr(self, "qllama_config", self)


def _sub_config(name: str, value: Any, config_class: type[PretrainedConfig]) -> Any:
    if value is None:
        return config_class()
    if isinstance(value, dict):
        return config_class(**{key: item for key, item in value.items() if key != "model_type"})
    # Not isinstance(value, config_class): the loader may have imported two copies of this file.
    if isinstance(value, PretrainedConfig) and value.model_type == config_class.model_type:
        return copy.deepcopy(value)
    raise TypeError(f"`{name}` must be a dict or a {config_class.__name__}, got {type(value).__name__}.")


__all__ = ["InternVLConfig", "QLlamaConfig"]
