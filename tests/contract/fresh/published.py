"""Use the repository that tools/hub/publish.py made, by its path alone, as a Hub id would be used."""

import torch
from report import WORK, captions_of, embeds_of, finish, image_paths, part
from transformers import AutoModel, AutoProcessor, pipeline

FOLDER = str(WORK / "published_repository")
TRUST = {"trust_remote_code": True}


@part
def classified():
    classify = pipeline("zero-shot-image-classification", model=FOLDER, **TRUST)
    found = classify(image_paths(), candidate_labels=["rocket", "panda", "lion", "pizza"])
    return [entries[0]["label"] for entries in found]


@part
def embeds():
    model = AutoModel.from_pretrained(FOLDER, dtype=torch.float32, **TRUST)
    return embeds_of(model, AutoProcessor.from_pretrained(FOLDER, **TRUST))


@part
def captions():
    model = AutoModel.from_pretrained(FOLDER, dtype=torch.float32, **TRUST)
    return captions_of(model, AutoProcessor.from_pretrained(FOLDER, **TRUST))


finish()
