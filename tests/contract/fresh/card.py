"""The snippet of the published model card; only the path, `.cuda()` and the image files differ."""

import runpy
import shutil
from pathlib import Path
from typing import Any

from report import PICTURES, TRAINED, finish, part

CARD = runpy.run_path(str(Path(__file__).resolve().parents[2] / "published_card.py"))["MODEL_CARD"]
# It ends with a caption, which is a separate part, because a release may break only captions.
COMPARISON, CAPTION = CARD.split("# please set add_eos_token", 1)
for number, name in enumerate(("panda", "fox", "bicycle"), 1):
    shutil.copy(PICTURES / f"{name}.png", f"image{number}.png")
kept: dict[str, Any] = {}
names: dict[str, Any] = {
    "PATH": str(TRAINED),
    "keep": lambda mode, *tensors: kept.update({f"InternVL-{mode.upper()}": tensors}),
}
exec(compile(COMPARISON, "model card", "exec"), names)


@part
def comparison():
    """Ids, pixels, and the logits in both modes."""
    rows = {mode: [tensor.float().tolist() for tensor in tensors] for mode, tensors in kept.items()}
    pixels, ids = names["pixel_values"], names["input_ids"]
    return rows | {"input_ids": ids.tolist(), "pixel_values": pixels.float().tolist()}


@part
def caption():
    """Ids of the prompt and of the caption, and its text."""
    exec(compile(f"#{CAPTION}", "model card", "exec"), names)
    return [names["tokenized"].input_ids.tolist(), names["pred"].tolist(), names["caption"]]


finish()
