"""Save a sentence-transformers model and a cross encoder, for sentences.py to load."""

import torch
from report import TRAINED, WORK, finish, image_paths, part
from sentence_transformers import SentenceTransformer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

OPTIONS = {"trust_remote_code": True, "device": "cpu", "model_kwargs": {"dtype": torch.float32}}


@part
def embedder():
    model = SentenceTransformer(str(TRAINED), **OPTIONS)
    model.save_pretrained(str(WORK / "embedder"))
    return model.encode(["panda", "狮子", *image_paths()]).tolist()


@part
def cross_encoder():
    model_class = get_class_from_dynamic_module("sentence_transformers_internvl.InternVLCrossEncoder", str(TRAINED))
    model = model_class(str(TRAINED), **OPTIONS)
    model.save_pretrained(str(WORK / "cross_encoder"))
    return model.predict([(path, "panda") for path in image_paths()]).tolist()


finish()
