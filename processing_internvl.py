"""Turns pictures and texts into the inputs InternVL-14B was trained on.

Reference: docs/model.md, "Texts" (the ids of each kind of text), and the CLIPImageProcessor settings of the published
checkpoint (resize the shortest edge, centre crop, ImageNet mean and standard deviation).

Where this file differs from the usual CLIP processor, and why:

* The wrong prefix, side or ending of a text changes an embedding without any error, so the caller names the task and
  the recipe follows from it. The ids are assembled here; the tokenizer's own settings are neither used nor changed.
* Pictures are always resized by PIL: the checkpoint's numbers were measured with it, and torchvision's bicubic differs.
* Nothing is guessed or cut in silence: what cannot be a picture or a text is an error, and a cut text is a warning.
"""

import os
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch

try:
    from PIL import Image, ImageCms, ImageOps
except ImportError as error:  # the loader's own message would name a package "PIL", which is not on PyPI
    raise ImportError("InternVL's processor needs Pillow: pip install pillow") from error
from transformers import BatchFeature, ProcessorMixin

from .compat_internvl import CLIPImageProcessorPil, name_image_processor, pipeline_task


class TextRecipe(NamedTuple):
    """How the texts of one task become ids."""

    prefix: str
    ends_in_eos: bool
    padding_side: str
    is_limited: bool  # whether the processor's `max_length` applies when the caller gives none


RECIPES = {
    # The feature is read at </s>, and only texts that start with "summarize:" were trained to put it there.
    "embed": TextRecipe("summarize:", ends_in_eos=True, padding_side="right", is_limited=True),
    "match": TextRecipe("", ends_in_eos=True, padding_side="right", is_limited=True),
    # Generation goes on after the last position, so no </s> and no padding may stand there.
    "caption": TextRecipe("", ends_in_eos=False, padding_side="left", is_limited=False),
}
CROPS = ("center", "squash")
PADDINGS = (True, False, "longest", "max_length")
DEFAULT_PROMPT = "English caption:"


@name_image_processor
class InternVLProcessor(ProcessorMixin):
    """An image processor and a tokenizer that know the recipes of InternVL-14B.

    Args:
        image_processor (`CLIPImageProcessor`): its `size`, `crop_size`, `image_mean` and `image_std` are used. One with
            another backend than PIL is replaced by the PIL one with the same settings.
        tokenizer (`InternVLTokenizer`): the tokenizer of the checkpoint.
        max_length (`int`, *optional*, defaults to 80): longest text in ids, ``<s>`` and ``</s>`` included, for "embed"
            and "match".
        chat_template (`str`, *optional*): not used; the model has no chat format.

    Attributes:
        default_task (`str`): the task of calls that name none: "embed", or "caption" in a processor that an
            ``image-text-to-text`` pipeline loaded for itself. A pipeline that is handed a processor object needs
            ``processor.default_task = "caption"`` first. It is not saved.
    """

    attributes = ["image_processor", "tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor, tokenizer, max_length=80, chat_template=None):
        _check_tokenizer(tokenizer)
        super().__init__(_with_pil_backend(image_processor), tokenizer, chat_template=chat_template)
        self.max_length = _checked_length(max_length)
        self.default_task = "embed"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads the processor; keywords as in `ProcessorMixin.from_pretrained`.

        The pipeline calls a processor with pictures and texts and nothing that says what they are for, exactly as a
        caller who wants embeddings does. Loading is the only moment at which the two can be told apart.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if pipeline_task(kwargs) == "image-text-to-text":
            processor.default_task = "caption"
        return processor

    def __call__(
        self,
        images=None,
        text=None,
        task=None,
        *,
        crop="center",
        padding=True,
        max_length=None,
        truncation=True,
        return_tensors="pt",
    ) -> BatchFeature:
        """Prepares pictures, texts or both.

        Args:
            images: one picture or a list of B. A picture is a PIL image of any mode, a path, or an array or tensor:
                [H, W], [H, W, C] or [C, H, W] with C in 1, 3, 4, as uint8 or as float in [0, 1] (a 4-D one is a batch).
                EXIF orientation is applied, transparent pixels are laid on white, 16-bit grey is reduced to 8 bits, and
                float pictures are rounded to 8 bits, because PIL resizes nothing else.
            text (`str` or `list[str]`): one text or a list of T.
            task (`str`, *optional*): defaults to `default_task`.

                - "embed": for `encode_text` and retrieval. ``<s> summarize:TEXT </s>``, the prefix added unless there.
                - "match": for image-text matching. ``<s> TEXT </s>``.
                - "caption": for `generate`. ``<s> TEXT``, padded on the left. One text serves every picture; with no
                  text the prompt is "English caption:".
            crop (`str`): "center" cuts the middle square (classification), "squash" resizes the whole picture to a
                square (the retrieval benchmarks). Either way no padding is added.
            padding (`bool` or `str`): True or "longest", "max_length", or False (then tensors need equal lengths).
            max_length (`int`, *optional*): longest text in ids; the processor's own for "embed" and "match", and none
                for "caption".
            truncation (`bool`): True cuts longer texts, keeps their ``</s>`` and warns; False makes them an error.
            return_tensors (`str` or None): "pt", "np", or None for lists.

        Returns:
            `BatchFeature` with `pixel_values`, float32 [B, 3, H, W], normalised, for pictures; and `input_ids` and
            `attention_mask`, int64 [T, L], for texts. The mask is 1 at the text's own ids and 0 at padding.

        Raises:
            TypeError: an argument of the wrong type, or one this call does not have.
            ValueError: nothing given, an empty list, text or picture, NaN or infinity, pixel values out of range, or an
                option outside its choices.
        """
        task = _checked_choice("task", self.default_task if task is None else task, tuple(RECIPES))
        _checked_choice("crop", crop, CROPS)
        _checked_choice("padding", padding, PADDINGS)
        if images is None and text is None:
            raise ValueError("Nothing to process: give `images`, `text` or both.")

        pictures = None if images is None else _load_pictures(images)
        if task == "caption":
            text = _prompts(text, pictures)
        data: dict[str, Any] = {}
        if text is not None:
            texts = _checked_texts(text)
            data |= self._encode_texts(texts, RECIPES[task], padding, max_length, truncation, return_tensors)
        if pictures is not None:
            data["pixel_values"] = self._encode_pictures(pictures, crop, return_tensors)
        return BatchFeature(data)

    def _encode_pictures(self, pictures, crop, return_tensors):
        # The layout is named: where it is inferred, an image of height 1 or 3 is taken for channels first.
        options: dict[str, Any] = {"input_data_format": "channels_last"}
        if crop == "squash":
            target = self.image_processor.crop_size
            options |= {"size": {"height": target["height"], "width": target["width"]}, "do_center_crop": False}
        return self.image_processor(pictures, return_tensors=return_tensors, **options)["pixel_values"]

    def _encode_texts(self, texts, recipe, padding, max_length, truncation, return_tensors):
        limit = self.max_length if max_length is None and recipe.is_limited else max_length
        sequences = [self._ids(_with_prefix(text, recipe.prefix), recipe.ends_in_eos) for text in texts]
        if limit is not None:
            sequences = _shortened(sequences, texts, _checked_length(limit), recipe.ends_in_eos, truncation)
        batch = self._padded(sequences, recipe.padding_side, padding, limit)
        if return_tensors is not None and len({len(ids) for ids in batch["input_ids"]}) > 1:
            raise ValueError("`padding=False` needs texts of equal length in ids, or `return_tensors=None`.")
        return BatchFeature(batch, tensor_type=return_tensors)

    def _ids(self, text, ends_in_eos):
        # Assembled from `tokenize`, not from a call: a call would need `add_eos_token` set on the shared tokenizer.
        ids = self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize(text))
        return [self.tokenizer.bos_token_id, *ids] + [self.tokenizer.eos_token_id] * ends_in_eos

    def _padded(self, sequences, side, padding, limit):
        if padding == "max_length" and limit is None:
            raise ValueError('`padding="max_length"` needs `max_length` here: prompts for generation have no limit.')
        longest = limit if padding == "max_length" else max(map(len, sequences))
        input_ids, attention_mask = [], []
        for ids in sequences:
            missing = longest - len(ids) if padding else 0
            pad, hole, mask = [self.tokenizer.pad_token_id] * missing, [0] * missing, [1] * len(ids)
            input_ids.append(ids + pad if side == "right" else pad + ids)
            attention_mask.append(mask + hole if side == "right" else hole + mask)
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def _check_tokenizer(tokenizer):
    """Refuse what has not the ends and the padding of a text; whether it is the checkpoint's is the model's to say."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if not isinstance(getattr(tokenizer, name, None), int):
            found = f"{type(tokenizer).__name__} without `{name}`"
            raise ValueError(f"`tokenizer` must be the checkpoint's, with <s>, </s> and padding, got a {found}.")


def _with_pil_backend(image_processor):
    if isinstance(image_processor, CLIPImageProcessorPil) or not hasattr(image_processor, "crop_size"):
        return image_processor
    return CLIPImageProcessorPil.from_dict(image_processor.to_dict())


# Arguments


def _checked_choice(name, value, choices):
    # `is` beside `==`: 1 == True, and a list has no hash to look up.
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return value


def _checked_length(value):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`max_length` must be an int, got {type(value).__name__}.")
    if value < 3:
        raise ValueError(f"`max_length` must leave room for <s>, one id and </s>, so at least 3, got {value}.")
    return value


# Texts


def _checked_texts(text):
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)):
        raise TypeError(f"`text` must be a str or a list of str, got {type(text).__name__}.")
    if not texts:
        raise ValueError("`text` must hold at least one text, got an empty list.")
    for index, item in enumerate(texts):
        if not isinstance(item, str):
            raise TypeError(f"`text[{index}]` must be a str, got {type(item).__name__}.")
        if not item.strip().removeprefix(RECIPES["embed"].prefix).strip():
            raise ValueError(f"`text[{index}]` must hold some text, got {item!r}.")
    return list(texts)


def _prompts(text, pictures):
    if pictures is None:
        return text
    prompt = DEFAULT_PROMPT if text is None else text
    prompts = [prompt] * len(pictures) if isinstance(prompt, str) else _checked_texts(prompt)
    if len(prompts) != len(pictures):
        raise ValueError(f"`text` must be one prompt or one for each of {len(pictures)} pictures, got {len(prompts)}.")
    return prompts


def _with_prefix(text, prefix):
    return text if text.lstrip().startswith(prefix) else prefix + text


def _shortened(sequences, texts, limit, ends_in_eos, truncation):
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
    warnings.warn(f"{message} They are cut to {limit}, and what was cut is not seen by the model.", stacklevel=4)
    kept = limit - ends_in_eos
    return [ids if len(ids) <= limit else ids[:kept] + ids[-1:] * ends_in_eos for ids in sequences]


# Pictures


def _load_pictures(images):
    pictures = [_load_picture(item, f"images[{index}]") for index, item in enumerate(_listed(images))]
    if not pictures:
        raise ValueError("`images` must hold at least one picture, got an empty list.")
    return pictures


def _listed(images):
    if isinstance(images, (list, tuple)):
        # The pipelines hand over one list per conversation.
        return [picture for item in images for picture in _listed(item)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def _load_picture(item, name):
    if isinstance(item, (str, os.PathLike)):
        if not os.path.exists(item):
            path = os.fspath(item)
            raise FileNotFoundError(
                f"`{name}` must be a picture or its path, and there is no {path!r}. A text is `text`."
            )
        with Image.open(item) as picture:
            return _to_rgb(picture, name)
    if isinstance(item, torch.Tensor):
        values = item.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # numpy has no bfloat16
        return _to_rgb(_from_array(values.numpy(), "CHW", name), name)
    if isinstance(item, np.ndarray):
        return _to_rgb(_from_array(item, "HWC", name), name)
    if isinstance(item, Image.Image):
        return _to_rgb(item, name)
    raise TypeError(f"`{name}` must be a PIL image, a path, an array or a tensor, got {type(item).__name__}.")


def _from_array(values, layout, name):
    """Makes an L, RGB or RGBA image of [H, W], [H, W, C] or [C, H, W]; `layout` decides where both readings fit."""
    if values.ndim not in (2, 3) or values.size == 0:
        raise ValueError(f"`{name}` must be [H, W], [H, W, C] or [C, H, W] and not empty, got shape {values.shape}.")
    values = _to_uint8(values, name)
    if values.ndim == 3:
        channels = (1, 3, 4)
        last, first = values.shape[-1] in channels, values.shape[0] in channels
        if not (last or first):
            raise ValueError(f"`{name}` must have 1, 3 or 4 channels, first or last, got shape {values.shape}.")
        if not last or (first and layout == "CHW"):
            values = values.transpose(1, 2, 0)  # [H, W, C]
        values = values[..., 0] if values.shape[-1] == 1 else values
    return Image.fromarray(np.ascontiguousarray(values))


def _to_uint8(values, name):
    if np.issubdtype(values.dtype, np.floating):
        _check_range(values, 0, 1, name, "float pictures")
        return np.rint(values * 255).astype(np.uint8)
    if np.issubdtype(values.dtype, np.integer):
        _check_range(values, 0, 255, name, "integer pictures")
        return values.astype(np.uint8)
    raise TypeError(f"`{name}` must be of an integer or floating type, got {values.dtype}.")


def _check_range(values, low, high, name, kind):
    if not np.isfinite(values).all():
        raise ValueError(f"`{name}` holds NaN or infinity.")
    if values.min() < low or values.max() > high:
        raise ValueError(
            f"`{name}` must lie in [{low}, {high}] ({kind}), got [{values.min()}, {values.max()}]. "
            "Pixel values that are already normalised go to the model directly."
        )


def _to_rgb(picture, name):
    """An RGB copy as a viewer would show it: upright, opaque on white, 8 bits."""
    if 0 in picture.size:
        raise ValueError(f"`{name}` is empty: {picture.width} x {picture.height} pixels.")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        # PIL's own conversion clips at 255 and leaves a white picture.
        return Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        # 32 bits, which PIL itself fills with 0..255 when it converts to these modes.
        values = np.asarray(picture)
        _check_range(values, 0, 255, name, f'mode "{picture.mode}"')
        return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
    if picture.mode == "LAB":
        return _lab_to_rgb(picture)
    if picture.has_transparency_data:
        # "La" reaches RGBA by way of LA only.
        picture = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _lab_to_rgb(picture):
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(picture, *profiles, outputMode="RGB")


__all__ = ["InternVLProcessor"]
