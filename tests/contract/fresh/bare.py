"""Use the model with only its requirements importable, as after the card's install command."""

import sys

OPTIONAL = (
    "accelerate peft timm einops torchvision torchaudio flash_attn apex kernels scipy sklearn pandas cv2 xformers"
)
OPTIONAL += " bitsandbytes deepspeed matplotlib datasets sentence_transformers torchao"
for name in OPTIONAL.split():
    sys.modules[name] = None  # type: ignore[assignment]

from report import TRAINED, captions_of, embeds_of, finish, part  # noqa: E402
from transformers import AutoModel, AutoProcessor  # noqa: E402

model = AutoModel.from_pretrained(TRAINED, trust_remote_code=True, dtype="auto")
processor = AutoProcessor.from_pretrained(TRAINED, trust_remote_code=True)


@part
def embeds():
    return sorted(embeds_of(model.float(), processor))


@part
def captions():
    return len(captions_of(model, processor))


@part
def imported():
    return [name for name in OPTIONAL.split() if sys.modules.get(name) is not None]


finish()
