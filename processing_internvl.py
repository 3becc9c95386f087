"""Turns images and texts into the inputs InternVL-14B was trained on.

Reference: docs/model.md, "Texts" (the ids of each kind of text), and the CLIPImageProcessor settings of the published
checkpoint (resize the shortest edge, centre crop, ImageNet mean and standard deviation).

Where this file differs from the usual CLIP processor, and why:

* The caller names the task, and the recipe of the text follows from it: a wrong prefix, side or ending changes an
  embedding without any error. The ids are assembled here; the tokenizer's own settings are neither used nor changed.
* PIL resizes every image: the checkpoint's numbers were measured with it, and torchvision's bicubic differs.
* Nothing is guessed or cut silently: an input that is neither image nor text is an error, and cutting a text warns.
"""

import warnings
from typing import Any, NamedTuple

from transformers import BatchFeature, ProcessorMixin

from .compat_internvl import CLIPImageProcessorPil, name_image_processor, pipeline_task
from .images_internvl import load_images
from .tokenization_internvl import PREFIX, Ids, with_prefix


class TextRecipe(NamedTuple):
    """How the texts of one task become ids."""

    has_prefix: bool
    ends_in_eos: bool
    padding_side: str
    is_limited: bool  # whether the processor's `max_length` applies when the caller gives none


RECIPES = {
    "embed": TextRecipe(has_prefix=True, ends_in_eos=True, padding_side="right", is_limited=True),
    "match": TextRecipe(has_prefix=False, ends_in_eos=True, padding_side="right", is_limited=True),
    # Generation continues after the last position, so neither </s> nor padding may be there.
    "caption": TextRecipe(has_prefix=False, ends_in_eos=False, padding_side="left", is_limited=False),
}
CROPS = ("center", "squash")
PADDINGS = (True, False, "longest", "max_length")
DEFAULT_PROMPT = "English caption:"


@name_image_processor
class InternVLProcessor(ProcessorMixin):
    """Image processor and tokenizer with the recipes of InternVL-14B.

    Args:
        image_processor (`CLIPImageProcessor`): its `size`, `crop_size`, `image_mean` and `image_std` are used. One with
            another backend than PIL is replaced by the PIL one with the same settings.
        tokenizer (`InternVLTokenizer`): the tokenizer of the checkpoint.
        max_length (`int`, *optional*, defaults to 80): longest text in ids, ``<s>`` and ``</s>`` included, for "embed"
            and "match".
        chat_template (`str`, *optional*): `ProcessorMixin`'s; the model has no chat format and does not use it.

    Attributes:
        default_task (`str`): the task of calls that name none: "embed", or "caption" in a processor that an
            ``image-text-to-text`` pipeline loaded for itself. A pipeline that is given a processor object needs
            ``processor.default_task = "caption"`` first. It is not saved.

    Raises:
        ValueError: the tokenizer has no bos, eos or pad id.
    """

    attributes = ["image_processor", "tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor: Any, tokenizer: Any, max_length: int = 80, chat_template: str | None = None):
        _check_tokenizer(tokenizer)
        super().__init__(_with_pil_backend(image_processor), tokenizer, chat_template=chat_template)
        self.max_length = _checked_length(max_length)
        self.default_task = "embed"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "InternVLProcessor":
        """Load as `ProcessorMixin.from_pretrained` does.

        A pipeline calls a processor with images and texts and does not say what for, exactly like a caller who wants
        embeddings. Only loading tells the two apart.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if pipeline_task(kwargs) == "image-text-to-text":
            processor.default_task = "caption"
        return processor

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        task: str | None = None,
        *,
        crop: str = "center",
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = True,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Prepare images, texts or both.

        Args:
            images: one image or a list of B. An image is a PIL image of any mode, a path, or an array or tensor:
                [H, W], [H, W, C] or [C, H, W] with C in 1, 3, 4, as uint8 or as float in [0, 1] (a 4-D one is a batch).
                EXIF orientation is applied, transparent pixels become white, 16-bit grey is reduced to 8 bits, and
                float images are rounded to 8 bits, because PIL resizes nothing else.
            text (`str` or `list[str]`): one text or a list of T.
            task (`str`, *optional*): defaults to `default_task`.

                - "embed": for `encode_text` and retrieval. ``<s> summarize:TEXT </s>``, the prefix added unless there.
                - "match": for image-text matching. ``<s> TEXT </s>``.
                - "caption": for `generate`. ``<s> TEXT``, padded on the left. One text serves every image; with no
                  text the prompt is "English caption:".
            crop (`str`): "center" cuts the middle square (classification), "squash" resizes the whole image to a
                square (the retrieval benchmarks). Either way no padding is added.
            padding (`bool` or `str`): True or "longest", "max_length", or False (then "pt" needs equal lengths).
            max_length (`int`, *optional*): longest text in ids; the processor's own for "embed" and "match", and none
                for "caption".
            truncation (`bool`): True cuts longer texts, keeps their ``</s>`` and warns; False makes them an error.
            return_tensors (`str` or None): "pt", "np", or None for lists.

        Returns:
            `BatchFeature` with `pixel_values`, float32 [B, 3, H, W], normalised, for images; and `input_ids` and
            `attention_mask`, int64 [T, L], for texts. The mask is 1 at the text's own ids and 0 at padding.

        Raises:
            TypeError: an argument of the wrong type, or one this call does not have.
            ValueError: nothing given, an empty list, text or image, NaN or infinity, pixel values out of range, texts
                of different lengths without padding, or an option outside its choices.
            OSError: an image file that is missing or that PIL cannot read.
        """
        task = self.default_task if task is None else task
        _check_choice("task", task, tuple(RECIPES))
        _check_choice("crop", crop, CROPS)
        _check_choice("padding", padding, PADDINGS)
        if images is None and text is None:
            raise ValueError("Nothing to process: give `images`, `text` or both.")

        loaded = None if images is None else load_images(images)
        data: dict[str, Any] = {}
        texts: list[str] | None = None
        if task == "caption" and loaded is not None:
            texts = _prompts(text, len(loaded))
        elif text is not None:
            texts = _checked_texts(text)
        if texts is not None:
            recipe = RECIPES[task]
            limit = self.max_length if max_length is None and recipe.is_limited else max_length
            sequences = [self._ids(text, recipe) for text in texts]
            if limit is not None:
                sequences = _shortened(sequences, texts, _checked_length(limit), recipe.ends_in_eos, truncation)
            data |= self._padded(sequences, recipe.padding_side, padding, limit)
            if return_tensors is not None and len(set(map(len, data["input_ids"]))) > 1:  # numpy would take them
                raise ValueError("`padding=False` needs texts of equal length in ids, or `return_tensors=None`.")
        if loaded is not None:
            data["pixel_values"] = self._encode_images(loaded, crop, return_tensors)
        return BatchFeature(data, tensor_type=return_tensors)

    def _encode_images(self, images: list[Any], crop: str, return_tensors: str | None) -> Any:
        # The layout is named: where it is inferred, an image of height 1 or 3 is taken for channels first.
        options: dict[str, Any] = {"input_data_format": "channels_last"}
        if crop == "squash":
            target = self.image_processor.crop_size
            options |= {"size": {"height": target["height"], "width": target["width"]}, "do_center_crop": False}
        return self.image_processor(images, return_tensors=return_tensors, **options)["pixel_values"]

    def _ids(self, text: str, recipe: TextRecipe) -> Ids:
        # Assembled from `tokenize`, not from a call: a call would need `add_eos_token` set on the shared tokenizer.
        pieces = self.tokenizer.tokenize(with_prefix(text) if recipe.has_prefix else text)
        ids = self.tokenizer.convert_tokens_to_ids(pieces)
        return [self.tokenizer.bos_token_id, *ids] + [self.tokenizer.eos_token_id] * recipe.ends_in_eos

    def _padded(self, sequences: list[Ids], side: str, padding: bool | str, limit: int | None) -> Any:
        if padding == "max_length" and limit is None:
            raise ValueError('`padding="max_length"` needs `max_length` here: prompts for generation have no limit.')
        options = {"padding": padding, "max_length": limit if padding == "max_length" else None, "padding_side": side}
        return self.tokenizer.pad({"input_ids": sequences}, return_attention_mask=True, **options)


def _check_tokenizer(tokenizer: Any) -> None:
    """Require bos, eos and pad ids. Whether they are the checkpoint's, the model checks."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if not isinstance(getattr(tokenizer, name, None), int):
            found = f"{type(tokenizer).__name__} without `{name}`"
            raise ValueError(f"`tokenizer` must be the checkpoint's, with <s>, </s> and padding, got a {found}.")


def _with_pil_backend(image_processor: Any) -> Any:
    if isinstance(image_processor, CLIPImageProcessorPil) or not hasattr(image_processor, "crop_size"):
        return image_processor
    return CLIPImageProcessorPil.from_dict(image_processor.to_dict())


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _checked_texts(text: Any) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)):
        raise TypeError(f"`text` must be a str or a list of str, got {type(text).__name__}.")
    if not texts:
        raise ValueError("`text` must hold at least one text, got an empty list.")
    for index, item in enumerate(texts):
        if not isinstance(item, str):
            raise TypeError(f"`text[{index}]` must be a str, got {type(item).__name__}.")
        if not item.strip().removeprefix(PREFIX).strip():
            raise ValueError(f"`text[{index}]` must hold some text, got {item!r}.")
    return list(texts)


def _prompts(text: Any, count: int) -> list[str]:
    """One prompt for each of `count` images; a `str`, or the default prompt, serves all of them."""
    prompts = _checked_texts(DEFAULT_PROMPT if text is None else text)
    if text is None or isinstance(text, str):
        return prompts * count
    if len(prompts) != count:
        raise ValueError(f"`text` must be one prompt or one for each of {count} images, got {len(prompts)}.")
    return prompts


def _checked_length(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`max_length` must be an int, got {type(value).__name__}.")
    if value < 3:
        raise ValueError(f"`max_length` must leave room for <s>, one id and </s>, so at least 3, got {value}.")
    return value


def _shortened(sequences: list[Ids], texts: list[str], limit: int, ends_in_eos: bool, truncation: bool) -> list[Ids]:
    too_long = [index for index, ids in enumerate(sequences) if len(ids) > limit]
    if not too_long:
        return sequences
    first = too_long[0]
    message = (
        f"{len(too_long)} of {len(texts)} texts have more than {limit} ids; the first is `text[{first}]` with "
        f"{len(sequences[first])}: {texts[first][:40]!r}..."
    )
    if not truncation:
        raise ValueError(f"{message} Allow `truncation` or raise `max_length`.")
    warnings.warn(f"{message} They are cut to {limit}, and the model does not see the rest.", stacklevel=3)
    kept = limit - ends_in_eos
    return [ids if len(ids) <= limit else ids[:kept] + ids[-1:] * ends_in_eos for ids in sequences]


__all__ = ["InternVLProcessor"]
