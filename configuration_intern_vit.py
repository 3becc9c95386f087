"""Configuration of InternViT-6B, the vision tower of InternVL-14B (InternVL paper, arXiv:2312.14238, section 3.2)."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import is_flash_attn_2_available


def require(name: str, value: Any, condition: bool, expected: str) -> None:
    """Raise a `ValueError` that names the field, its value and what was expected, unless `condition` holds."""
    if not condition:
        raise ValueError(f"`{name}` must be {expected}, got {value!r}.")


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, float) or is_integer(value)


@dataclass(frozen=True)
class Rule:
    """What the value of a declared field must be, and the function that tests a value."""

    expected: str
    holds: Callable[[Any], bool]


PositiveInteger = Annotated[int, Rule("a positive integer", lambda value: is_integer(value) and value > 0)]
PositiveNumber = Annotated[float, Rule("above 0", lambda value: is_number(value) and value > 0)]
Fraction = Annotated[float, Rule("a number in [0, 1)", lambda value: is_number(value) and 0 <= value < 1)]
StandardDeviation = Annotated[float, Rule("a number of at least 0", lambda value: is_number(value) and value >= 0)]
Number = Annotated[float, Rule("a number", is_number)]
Flag = Annotated[bool, Rule("True or False", lambda value: isinstance(value, bool))]
Activation = Annotated[
    str, Rule("a name in transformers' ACT2FN", lambda value: isinstance(value, str) and value in ACT2FN)
]


class CheckedConfig(PretrainedConfig):
    """A config with declared fields. A field is a class attribute with its type and default; `Annotated` types have a
    [`Rule`]. Subclasses call `check` at the end of `__init__`: a value that breaks a rule is a `ValueError`.
    """

    def __init__(self, **kwargs: Any):
        # A field without a class default must be in `kwargs`: the subclass adds it.
        values = {name: kwargs.pop(name, getattr(type(self), name, None)) for name in self.declared_fields()}
        super().__init__(**kwargs)
        for name, value in values.items():
            setattr(self, name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but overrides of fields are checked and reach the sub-configs."""
        fields = {}
        for name in set(cls.declared_fields()) & set(kwargs):
            old, new = config_dict.get(name), kwargs.pop(name)
            old = old.to_dict() if isinstance(old, PretrainedConfig) else old
            require(name, new, new is not None or name not in cls.sub_configs, "a config or a dict")
            fields[name] = old | new if isinstance(old, dict) and isinstance(new, dict) else new
        return super().from_dict(config_dict | fields, **kwargs)

    @classmethod
    def declared_fields(cls) -> dict[str, Any]:
        """Names and types of the fields that this class and its bases declare."""
        bases = [base for base in reversed(cls.__mro__) if issubclass(base, CheckedConfig)]
        return {name: kind for base in bases for name, kind in inspect.get_annotations(base).items()}

    def check(self) -> None:
        """Raise a `ValueError` for a field that breaks its rule. Subclasses add the relations between fields."""
        for name, kind in self.declared_fields().items():
            for rule in getattr(kind, "__metadata__", ()):
                value = getattr(self, name)
                require(name, value, rule.holds(value), rule.expected)


class InternVisionConfig(CheckedConfig):
    """Sizes and options of [`InternVisionModel`]. The defaults are those of the published checkpoint
    (docs/model.md, "Sizes").
    """

    model_type = "intern_vit_6b"
    base_config_key = "vision_config"

    num_channels: PositiveInteger = 3
    patch_size: PositiveInteger = 14  # side of a square patch in pixels
    # Side in pixels of the square image that the position table was made for; a multiple of `patch_size`. Images of
    # other sizes work too: positions are interpolated.
    image_size: PositiveInteger = 224
    qkv_bias: Flag = False
    hidden_size: PositiveInteger = 3200
    num_attention_heads: PositiveInteger = 25
    intermediate_size: PositiveInteger = 12800
    qk_normalization: Flag = True  # RMSNorm over all channels of the queries and of the keys
    num_hidden_layers: PositiveInteger = 48
    use_flash_attn: Flag = True  # prefer FlashAttention-2 if flash-attn and a GPU are here; `attn_implementation` wins
    hidden_act: Activation = "gelu"
    layer_norm_eps: PositiveNumber = 1e-6  # of every RMSNorm
    dropout: Fraction = 0.0
    drop_path_rate: Fraction = 0.0  # stochastic depth of the last layer; it rises linearly from 0
    attention_dropout: Fraction = 0.0
    initializer_range: StandardDeviation = 0.02
    initializer_factor: Number = 0.1  # initial value of the LayerScale parameters `ls1` and `ls2`
    force_image_size: int | None = None  # side that the position table of this checkpoint was resized to, if any

    def __init__(self, **kwargs: Any):
        if kwargs.get("use_flash_attn", self.use_flash_attn) and is_flash_attn_2_available():
            kwargs.setdefault("attn_implementation", "flash_attention_2")
        super().__init__(**kwargs)
        self.check()

    def check(self) -> None:
        super().check()
        heads_fit = self.hidden_size % self.num_attention_heads == 0
        require("num_attention_heads", self.num_attention_heads, heads_fit, f"a divisor of {self.hidden_size=}")
        for name in ("image_size", "force_image_size"):
            size = getattr(self, name)
            fits = size is None or (is_integer(size) and size > 0 and size % self.patch_size == 0)
            require(name, size, fits, f"a positive multiple of {self.patch_size=}")

    @property
    def position_grid(self) -> int:
        """Patches per side of the position table."""
        return (self.force_image_size or self.image_size) // self.patch_size


__all__ = ["InternVisionConfig"]
