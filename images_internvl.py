"""Turns image files, arrays and tensors into RGB images, safely.

Where this file differs from transformers' own image loading, and why:

* A string is a path: nothing is fetched, and nothing is taken for base64.
* An image becomes RGB as a viewer shows it: upright, opaque on white, 8 bits. PIL's plain conversion ignores the
  orientation, shows the hidden colour of transparent pixels, and clips 16-bit grey.
* Pixel values out of range are an error, because they mean that an image is already normalised.

`handler.py` decodes the bytes of a request itself: its host imports it alone.
"""

import os
from typing import Any

import numpy as np
import torch

try:
    from PIL import Image, ImageCms, ImageOps
except ImportError as error:  # the loader's own message would name a package "PIL", which is not on PyPI
    raise ImportError("InternVL's processor needs Pillow: pip install pillow") from error

CHANNELS = (1, 3, 4)


def load_images(images: Any) -> list[Image.Image]:
    """Load one image or a list of images, as RGB.

    Args:
        images: one image or a list of B, possibly nested. An image is a PIL image of any mode, a path, or an array or
            tensor: [H, W], [H, W, C] or [C, H, W] with C in 1, 3, 4, as integers in [0, 255] or floats in [0, 1]. A
            4-D array or tensor is a list of images. Where both layouts fit, a tensor is [C, H, W] and an array
            [H, W, C].

    Returns:
        `list[PIL.Image.Image]`: B images of mode "RGB".

    Raises:
        OSError: a file that is missing or that PIL cannot read.
        TypeError: an item of another type, or an array that is neither integer nor floating-point.
        ValueError: an empty list or image, a wrong shape, NaN, infinity, or a pixel value out of range.
    """
    loaded = [_load_image(item, f"images[{index}]") for index, item in enumerate(_flattened(images))]
    if not loaded:
        raise ValueError("`images` must hold at least one image, got an empty list.")
    return loaded


def _flattened(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)):
        # transformers' pipelines pass one list per conversation.
        return [image for item in images for image in _flattened(item)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def _load_image(item: Any, name: str) -> Image.Image:
    if isinstance(item, (str, os.PathLike)):
        with Image.open(item) as image:
            return _to_rgb(image, name)
    if isinstance(item, torch.Tensor):
        item = item.float() if item.is_floating_point() else item  # numpy has no bfloat16
        item = _from_array(item.numpy(force=True), "CHW", name)
    elif isinstance(item, np.ndarray):
        item = _from_array(item, "HWC", name)
    if isinstance(item, Image.Image):
        return _to_rgb(item, name)
    raise TypeError(f"`{name}` must be a PIL image, a path, an array or a tensor, got {type(item).__name__}.")


def _from_array(values: np.ndarray, layout: str, name: str) -> Image.Image:
    """Make an L, RGB or RGBA image of [H, W], [H, W, C] or [C, H, W]; `layout` decides where both readings fit."""
    last, first = (values.ndim == 3 and values.shape[axis] in CHANNELS for axis in (-1, 0))
    if values.size == 0 or not (values.ndim == 2 or last or first):
        expected = "[H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, and not empty"
        raise ValueError(f"`{name}` must be {expected}, got shape {values.shape}.")
    values = _to_uint8(values, name)
    if first and (layout == "CHW" or not last):
        values = values.transpose(1, 2, 0)  # [H, W, C]
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]  # [H, W]
    return Image.fromarray(np.ascontiguousarray(values))


def _to_uint8(values: np.ndarray, name: str) -> np.ndarray:
    if np.issubdtype(values.dtype, np.floating):
        _check_range(values, 1, name, "float images")
        return np.rint(values * 255).astype(np.uint8)
    if np.issubdtype(values.dtype, np.integer):
        _check_range(values, 255, name, "integer images")
        return values.astype(np.uint8)
    raise TypeError(f"`{name}` must be of an integer or floating type, got {values.dtype}.")


def _check_range(values: np.ndarray, high: int, name: str, kind: str) -> None:
    # NaN fails both comparisons.
    if not (values.min() >= 0 and values.max() <= high):
        raise ValueError(
            f"`{name}` must be in [0, {high}] ({kind}), got [{values.min()}, {values.max()}]. "
            "Pass pixel values that are already normalised to the model, not to the processor."
        )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Copy an image as a viewer shows it: upright, opaque on white, 8 bits."""
    if 0 in image.size:
        raise ValueError(f"`{name}` is empty: {image.width} x {image.height} pixels.")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # PIL's own conversion clips at 255 and returns a white image.
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        # 32 bits, which PIL itself fills with 0..255 when it converts to these modes.
        values = np.asarray(image)
        _check_range(values, 255, name, f'mode "{image.mode}"')
        return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(*profiles, "LAB", "RGB").apply(image)
    if image.has_transparency_data:
        # PIL converts "La" to RGBA only through LA.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
