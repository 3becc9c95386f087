"""Load everything, make every call once, and report each deprecation warning and each logged deprecation."""

import logging
import re
import traceback
import warnings

lines: list[list[str]] = []  # origin, text, end of the stack


def keep(origin, text):
    stack = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_stack()[:-2]]
    ours = [line for line in stack if "transformers_modules" in line]
    lines.append([origin, str(text), " <- ".join(reversed(ours[-3:] or stack[-6:]))])


class Keeper(logging.Handler):
    def emit(self, record):
        text = record.getMessage()
        if re.search("deprecat|will be removed|FutureWarning|no longer (be )?supported|removed in v", text, re.I):
            keep(f"log of {record.name}", text)


def keep_warning(message, category, *rest, **options):
    if issubclass(category, (FutureWarning, DeprecationWarning, PendingDeprecationWarning)):
        keep(category.__name__, message)


import torch  # noqa: E402
import transformers  # noqa: E402
from report import TRAINED, WORK, finish, image_paths, part  # noqa: E402
from transformers import AutoModel, AutoProcessor, AutoTokenizer, GenerationConfig, pipeline  # noqa: E402
from transformers.dynamic_module_utils import get_class_from_dynamic_module  # noqa: E402

# Recording begins here: warnings while the libraries import each other are not ours.
warnings.showwarning = keep_warning
warnings.simplefilter("always")
transformers.logging.set_verbosity_warning()
for name in ("transformers", "huggingface_hub", "accelerate", "sentence_transformers", "peft", ""):
    logging.getLogger(name).addHandler(Keeper())
TRUST = {"trust_remote_code": True}
model = AutoModel.from_pretrained(TRAINED, dtype=torch.float32, **TRUST)
processor = AutoProcessor.from_pretrained(TRAINED, **TRUST)
AutoTokenizer.from_pretrained(TRAINED, **TRUST)
inputs = processor(images=image_paths(), text=["panda", "lion", "pizza", "rocket"])
pairs = processor(text=["panda", "lion", "pizza", "rocket"], task="match")
prompts = processor(text=["English caption:", "a", "中文描述:", "English caption:"], task="caption")


@part
def calls():
    with torch.inference_mode():
        for mode in ("InternVL-C", "InternVL-G"):
            model(**inputs, mode=mode)
            model(image=inputs.pixel_values, text=inputs.input_ids, mode=mode)
        model.embed_text(inputs.input_ids, inputs.attention_mask)
        model.embed_classes(processor, ["panda", "lion"])
        model.match(inputs.pixel_values, **pairs, all_pairs=True)
        model.look_at(inputs.pixel_values)
        model.get_image_features(inputs.pixel_values)
        model.get_text_features(inputs.input_ids)
        model.vision_model(inputs.pixel_values, output_hidden_states=True)
        model.qllama(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        model(pixel_values=inputs.pixel_values, output_hidden_states=True)
    model.set_attn_implementation("eager")
    model.set_attn_implementation("sdpa")


@part
def captions():
    pixels, short = inputs.pixel_values, {"max_new_tokens": 4}
    model.generate(pixels, **prompts, **short)
    model.generate(pixels, num_beams=3, min_new_tokens=2, **short)
    model.generate(pixels, do_sample=True, num_return_sequences=2, top_k=5, **short)
    model.generate(pixels, cache_implementation="static", **short)
    model.generate(model.look_at(pixels), use_cache=False, max_length=5, min_length=2)
    model.caption(processor, image_paths(), ["English caption:"] * 4, candidates=2, **short)
    model.generate(
        pixels, generation_config=GenerationConfig(**short), return_dict_in_generate=True, output_scores=True
    )


@part
def training():
    trainee = get_class_from_dynamic_module("modeling_internvl.InternVLForPreTraining", TRAINED).from_pretrained(
        TRAINED
    )
    texts = {"positive_": pairs, "negative_": pairs, "summarize_": inputs, "": pairs}
    batch = {f"{prefix}{key}": each[key] for prefix, each in texts.items() for key in ("input_ids", "attention_mask")}
    batch["labels"] = pairs.input_ids.masked_fill(pairs.attention_mask == 0, -100)
    trainee.train()(pixel_values=inputs.pixel_values.to(trainee.dtype), **batch).loss.backward()


@part
def lora():
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return False
    base = AutoModel.from_pretrained(TRAINED, dtype=torch.float32, **TRUST)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["attn.qkv", "self_attn.q_proj"]))
    adapted(**inputs).logits_per_image.sum().backward()
    adapted.merge_and_unload()
    return True


@part
def saving():
    model.save_pretrained(WORK / "deprecations_model")
    processor.save_pretrained(WORK / "deprecations_model")
    AutoModel.from_pretrained(WORK / "deprecations_model", dtype="auto", **TRUST)


@part
def pipelines():
    options = {"model": str(TRAINED), **TRUST}
    pipeline("zero-shot-image-classification", **options)(image_paths()[0], candidate_labels=["panda", "lion"])
    pipeline("image-feature-extraction", **options)(image_paths()[0], pool=True)
    pipeline("feature-extraction", **options)("panda")


@part
def caption_pipeline():
    write = pipeline("image-text-to-text", model=str(TRAINED), **TRUST)
    write(images=image_paths()[0], text="English caption:", generate_kwargs={"max_new_tokens": 3})


@part
def sentences():
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return False
    options = {"trust_remote_code": True, "device": "cpu"}
    SentenceTransformer(str(TRAINED), **options).encode(["panda", image_paths()[0]])
    name = "sentence_transformers_internvl.InternVLCrossEncoder"
    get_class_from_dynamic_module(name, str(TRAINED))(str(TRAINED), **options).predict([(image_paths()[0], "panda")])
    return True


@part
def offloading():
    try:
        import accelerate  # noqa: F401
    except ImportError:
        return False
    offloaded = AutoModel.from_pretrained(TRAINED, dtype="auto", device_map={"": "disk"}, **TRUST)
    offloaded.embed_image(inputs.pixel_values, "InternVL-G")
    return True


@part
def everything():
    return lines


finish()
