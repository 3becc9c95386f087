"""Helpers of the scripts in this folder. torch is imported late, so that it hides no missing import of the code."""

import hashlib
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORK, TRAINED = map(Path, sys.argv[1:3])
PICTURES = Path(__file__).resolve().parents[3] / "examples" / "pictures"
NAMES = ["panda", "lion", "pizza", "rocket"]
TEXTS = ["a photo of a panda", "狮子", "a  pizza with two spaces", "ロケット"]
FOUND: dict[str, dict[str, Any]] = {}


def part(function: Callable[[], Any]) -> Callable[[], Any]:
    """Run a part of a script and record its value or its error, so that one failure does not hide the other parts."""
    try:
        FOUND[function.__name__] = {"value": function()}
    except Exception:
        FOUND[function.__name__] = {"error": traceback.format_exc()[-4000:]}
    return function


def finish() -> None:
    print(f"\n{json.dumps(FOUND)}")


def image_paths() -> list[str]:
    return [str(PICTURES / f"{name}.png") for name in NAMES]


def digests(tensors: dict[str, Any]) -> dict[str, str]:
    """dtype, shape and hash of each tensor: equal if and only if all bits are equal."""
    import torch

    found = {}
    for name, tensor in tensors.items():
        bits = tensor.detach().contiguous().view(-1).view(dtype=torch.uint8).numpy().tobytes()
        found[name] = f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(bits).hexdigest()}"
    return found


def embeds_of(model: Any, processor: Any) -> dict[str, str]:
    """Digests of all outputs except captions."""
    import torch

    inputs = processor(images=image_paths(), text=TEXTS)
    pixels, pairs = inputs["pixel_values"], processor(text=TEXTS, task="match")
    with torch.inference_mode():
        found = {mode: model.encode_image(pixels, mode) for mode in ("InternVL-C", "InternVL-G")}
        found["text"] = model.encode_text(inputs["input_ids"])
        found["logits"] = model(**inputs, mode="InternVL-G").logits_per_image
        return digests(found | {"match": model.match(pixels, **pairs)})


def captions_of(model: Any, processor: Any) -> list[list[int]]:
    inputs = processor(images=image_paths(), text="English caption:", task="caption")
    return model.generate(**inputs, num_beams=3, min_new_tokens=3, max_new_tokens=6).tolist()
