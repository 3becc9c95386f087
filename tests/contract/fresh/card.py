"""The snippet of the published model card; only the path, `.cuda()` and the image files differ."""

from report import PICTURES, TRAINED, finish, part

PATH = str(TRAINED)
IMAGES = [str(PICTURES / f"{name}.png") for name in ("panda", "fox", "bicycle")]
kept = {}

# ruff: noqa: E402, I001
import torch
from PIL import Image
from transformers import AutoModel, CLIPImageProcessor
from transformers import AutoTokenizer

model = AutoModel.from_pretrained(
    PATH,
    torch_dtype=torch.bfloat16,
    low_cpu_mem_usage=True,
    trust_remote_code=True).eval()  # fmt: skip

image_processor = CLIPImageProcessor.from_pretrained(PATH)

tokenizer = AutoTokenizer.from_pretrained(
    PATH, use_fast=False, add_eos_token=True)  # fmt: skip
tokenizer.pad_token_id = 0  # set pad_token_id to 0

images = [
    Image.open(IMAGES[0]).convert("RGB"),
    Image.open(IMAGES[1]).convert("RGB"),
    Image.open(IMAGES[2]).convert("RGB"),
]
prefix = "summarize:"
texts = [
    prefix + "a photo of a red panda",  # English
    prefix + "一张熊猫的照片",  # Chinese
    prefix + "二匹の猫の写真",  # Japanese
]

pixel_values = image_processor(images=images, return_tensors="pt").pixel_values
pixel_values = pixel_values.to(torch.bfloat16)
input_ids = tokenizer(texts, return_tensors="pt", max_length=80,
                      truncation=True, padding="max_length").input_ids  # fmt: skip
kept["pixel_values"], kept["input_ids"] = pixel_values, input_ids

# InternVL-C
logits_per_image, logits_per_text = model(
    image=pixel_values, text=input_ids, mode="InternVL-C")  # fmt: skip
probs = logits_per_image.softmax(dim=-1)
kept["InternVL-C"] = logits_per_image, logits_per_text, probs

# InternVL-G
logits_per_image, logits_per_text = model(
    image=pixel_values, text=input_ids, mode="InternVL-G")  # fmt: skip
probs = logits_per_image.softmax(dim=-1)
kept["InternVL-G"] = logits_per_image, logits_per_text, probs


@part
def comparison():
    """Ids, pixels, and the logits in both modes."""
    rows = {mode: [tensor.float().tolist() for tensor in kept[mode]] for mode in ("InternVL-C", "InternVL-G")}
    return rows | {"input_ids": input_ids.tolist(), "pixel_values": pixel_values.float().tolist()}


@part
def caption():
    """Ids of the prompt and of the caption, and its text."""
    # please set add_eos_token to False for generation
    tokenizer.add_eos_token = False
    image = Image.open(IMAGES[0]).convert("RGB")
    pixel_values = image_processor(images=image, return_tensors="pt").pixel_values
    pixel_values = pixel_values.to(torch.bfloat16)

    tokenized = tokenizer("English caption:", return_tensors="pt")
    pred = model.generate(
        pixel_values=pixel_values,
        input_ids=tokenized.input_ids,
        attention_mask=tokenized.attention_mask,
        num_beams=5,
        min_new_tokens=8,
    )
    caption = tokenizer.decode(pred[0].cpu(), skip_special_tokens=True).strip()
    return [tokenized.input_ids.tolist(), pred.tolist(), caption]


finish()
