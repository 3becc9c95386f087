"""Configuration of InternViT-6B, the vision tower of InternVL-14B (InternVL paper, arXiv:2312.14238, section 3.2)."""

from typing import Any

from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import is_flash_attn_2_available


def require(name: str, value: Any, condition: bool, expected: str) -> None:
    """Raise a `ValueError` that names the field, its value and what was expected, unless `condition` holds."""
    if not condition:
        raise ValueError(f"`{name}` must be {expected}, got {value!r}.")


def require_positive_integers(**fields: Any) -> None:
    """Check that every field is an int above zero."""
    for name, value in fields.items():
        is_int = isinstance(value, int) and not isinstance(value, bool)
        require(name, value, is_int and value > 0, "a positive integer")


def require_fractions(**fields: Any) -> None:
    """Check that every field is a number in [0, 1)."""
    for name, value in fields.items():
        require(name, value, isinstance(value, (int, float)) and 0 <= value < 1, "a number in [0, 1)")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def require_positive_numbers(**fields: Any) -> None:
    """Check that every field is a number above zero."""
    for name, value in fields.items():
        require(name, value, is_number(value) and value > 0, "above 0")


def require_standard_deviation(value: Any) -> None:
    """Check that `initializer_range` can be a standard deviation."""
    require("initializer_range", value, is_number(value) and value >= 0, "a number of at least 0")


def require_activation(value: Any) -> None:
    """Check that transformers knows `hidden_act`."""
    require("hidden_act", value, isinstance(value, str) and value in ACT2FN, "a name in transformers' ACT2FN")


class InternVisionConfig(PretrainedConfig):
    """
    Sizes and options of [`InternVisionModel`]. The defaults are those of the published checkpoint
    (docs/model.md, "Sizes").

    Args:
        num_channels (`int`): channels of the image.
        patch_size (`int`): side of a square patch in pixels.
        image_size (`int`): side in pixels of the square image that the position table was made for; a multiple of
            `patch_size`. Images of other sizes work too: positions are interpolated.
        force_image_size (`int`, *optional*): image side that the position table of *this* checkpoint was resized to,
            if that is not `image_size`.
        qkv_bias (`bool`): whether the query/key/value projection has a bias.
        hidden_size, num_attention_heads, intermediate_size, num_hidden_layers (`int`): widths and depth.
        qk_normalization (`bool`): RMSNorm over all channels of the queries and of the keys.
        use_flash_attn (`bool`): prefer FlashAttention-2. It has no effect without flash-attn or a GPU, or if
            `attn_implementation` is given.
        hidden_act (`str`): activation of the MLP.
        layer_norm_eps (`float`): epsilon of every RMSNorm of the tower.
        dropout, attention_dropout (`float`): rates in [0, 1).
        drop_path_rate (`float`): stochastic depth of the last layer, in [0, 1); it rises linearly from 0.
        initializer_range (`float`): standard deviation of freshly initialised weights.
        initializer_factor (`float`): initial value of the LayerScale parameters `ls1` and `ls2`.

    Raises:
        `ValueError`: if a field is out of range; the message names it.
    """

    model_type = "intern_vit_6b"
    base_config_key = "vision_config"

    def __init__(
        self,
        num_channels: int = 3,
        patch_size: int = 14,
        image_size: int = 224,
        qkv_bias: bool = False,
        hidden_size: int = 3200,
        num_attention_heads: int = 25,
        intermediate_size: int = 12800,
        qk_normalization: bool = True,
        num_hidden_layers: int = 48,
        use_flash_attn: bool = True,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        initializer_factor: float = 0.1,
        force_image_size: int | None = None,
        **kwargs: Any,
    ):
        if use_flash_attn and is_flash_attn_2_available():
            kwargs.setdefault("attn_implementation", "flash_attention_2")
        super().__init__(**kwargs)
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.image_size = image_size
        self.qkv_bias = qkv_bias
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.qk_normalization = qk_normalization
        self.num_hidden_layers = num_hidden_layers
        self.use_flash_attn = use_flash_attn
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.dropout = dropout
        self.drop_path_rate = drop_path_rate
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor
        self.force_image_size = force_image_size
        self._check_fields()

    def _check_fields(self) -> None:
        require_positive_integers(
            num_channels=self.num_channels,
            patch_size=self.patch_size,
            image_size=self.image_size,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
        )
        require_fractions(
            dropout=self.dropout, drop_path_rate=self.drop_path_rate, attention_dropout=self.attention_dropout
        )
        heads_fit = self.hidden_size % self.num_attention_heads == 0
        require("num_attention_heads", self.num_attention_heads, heads_fit, f"a divisor of {self.hidden_size=}")
        for name in ("image_size", "force_image_size"):
            size = getattr(self, name)
            whole = size is None or (isinstance(size, int) and size > 0 and size % self.patch_size == 0)
            require(name, size, whole, f"a positive multiple of {self.patch_size=}")
        require_positive_numbers(layer_norm_eps=self.layer_norm_eps)
        require_standard_deviation(self.initializer_range)
        require("initializer_factor", self.initializer_factor, is_number(self.initializer_factor), "a number")
        require_activation(self.hidden_act)

    @property
    def position_grid(self) -> int:
        """Patches per side of the position table."""
        return (self.force_image_size or self.image_size) // self.patch_size


__all__ = ["InternVisionConfig"]
