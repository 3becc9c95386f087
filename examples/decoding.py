"""Decodes image files that may be damaged or malicious, for search.py and embed_dataset.py; others may import it."""

import io
import struct
import zlib

from PIL import Image, UnidentifiedImageError

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
MAX_ASPECT = 50  # the processor resizes the shorter side, so a very narrow image would grow without bound
# What Pillow raises for damaged files: nearly always the first two, and whatever else a format provokes.
DAMAGED = (
    OSError, ValueError, ArithmeticError, EOFError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def decode(data: bytes, formats: tuple[str, ...] | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image with all its pixels; of an animation the first frame.

    Args:
        data: an encoded image.
        formats: Pillow's names of the formats to accept; None for all.
        max_pixels: the largest width x height to decode, at most twice `MAX_PIXELS`.

    Raises:
        ValueError: why the image cannot be decoded, in words for the owner of the file.
    """
    if not data:
        raise ValueError("an empty file")
    too_large = f"has more than {max_pixels:,} pixels, the limit for safety"
    try:
        image = Image.open(io.BytesIO(data), formats=formats)  # reads the header, no pixels yet
        short, long = sorted(image.size)
        problem = too_large if short * long > max_pixels else ""
        if long > MAX_ASPECT * short:
            problem = f"has {image.width} x {image.height} pixels; one side may be at most {MAX_ASPECT} times the other"
        if not problem:
            image.load()
    except UnidentifiedImageError:  # its message holds an address in memory, which differs each time
        problem = "not an image in a known format"
    except Image.DecompressionBombError:  # Pillow's own limit is twice `MAX_PIXELS`
        problem = too_large
    except DAMAGED as error:
        problem = f"damaged: {str(error) or type(error).__name__}"
    if problem:
        raise ValueError(problem)
    return image
