"""Load the checkpoints of save.py, a subfolder, and a checkpoint of the original code with every Auto class."""

import torch
from report import TRAINED, WORK, captions_of, digests, embeds_of, finish, part
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

TRUST = {"trust_remote_code": True}
CLASSES = [AutoConfig, AutoModel, AutoProcessor, AutoTokenizer]


@part
def saved():
    return digests(AutoModel.from_pretrained(WORK / "saved", dtype=torch.float32, **TRUST).state_dict())


def saved_model_and_processor():
    folder = WORK / "saved"
    return AutoModel.from_pretrained(folder, **TRUST, dtype="auto"), AutoProcessor.from_pretrained(folder, **TRUST)


@part
def embeds():
    return embeds_of(*saved_model_and_processor())


@part
def captions():
    return captions_of(*saved_model_and_processor())


@part
def parts():
    found = {}
    for name in ("text_part", "vision_part", "contrastive_part"):
        model = AutoModel.from_pretrained(WORK / name, dtype="auto", **TRUST)
        found[name] = [type(model).__name__, digests(model.state_dict())]
    return found


@part
def auto_dtype():
    return [str(AutoModel.from_pretrained(TRAINED, dtype="auto", **TRUST).dtype)]


def names(folder, **where):
    loaded = [each.from_pretrained(folder, **TRUST, **where) for each in CLASSES]
    return [*(type(each).__name__ for each in loaded), loaded[0].model_type]


def image_processor(folder, **where):
    """Its class and crop size, or the packages that transformers requires for AutoImageProcessor itself."""
    if missing := getattr(AutoImageProcessor, "_backends", None):  # a placeholder class
        return list(missing)
    loaded = AutoImageProcessor.from_pretrained(folder, **TRUST, **where)
    return [type(loaded).__name__.removesuffix("Pil"), loaded.crop_size["height"], loaded.crop_size["width"]]


@part
def folder_classes():
    return names(TRAINED)


@part
def subfolder_classes():
    return names(WORK / "clone", subfolder="tiny")


@part
def folder_image_processor():
    return image_processor(TRAINED)


@part
def subfolder_image_processor():
    return image_processor(WORK / "clone", subfolder="tiny")


@part
def subfolder_tokens():
    """By the tokenizer alone and by the processor."""
    texts = ["a  double  space", "summarize:panda", "狐狸的图片"]
    tokenizer = AutoTokenizer.from_pretrained(WORK / "clone", subfolder="tiny", add_eos_token=True, **TRUST)
    processor = AutoProcessor.from_pretrained(TRAINED, **TRUST)
    one = processor(text=texts, task="match", padding=False, return_tensors=None).input_ids
    return [tokenizer(texts).input_ids, one]


@part
def original():
    model = AutoModel.from_pretrained(WORK / "original", dtype=torch.float32, **TRUST)
    pixels = load_file(WORK / "inputs.safetensors")["pixel_values"]
    with torch.inference_mode():
        embeds = {mode: model.encode_image(pixels, mode).tolist() for mode in ("InternVL-C", "InternVL-G")}
    return [type(model).__name__, model.config.model_type, digests(model.state_dict()), embeds]


@part
def original_auto_dtype():
    return str(AutoModel.from_pretrained(WORK / "original", torch_dtype="auto", **TRUST).dtype)


@part
def lora():
    """Largest difference from the weights merged by hand, and from the weights without adapters."""
    wanted = torch.load(WORK / "merged.pt")
    plain = AutoModel.from_pretrained(TRAINED, dtype=torch.float32, **TRUST).state_dict()
    state = AutoModel.from_pretrained(WORK / "lora", dtype=torch.float32, **TRUST).state_dict()
    assert set(state) == set(wanted)
    apart = [
        max(float((other[name] - tensor).abs().max()) for name, tensor in state.items()) for other in (wanted, plain)
    ]
    return apart


finish()
