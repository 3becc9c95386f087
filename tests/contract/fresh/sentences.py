"""Load the models of sentences_save.py with the plain classes of sentence-transformers."""

import torch
from report import WORK, finish, image_paths, part
from sentence_transformers import CrossEncoder, SentenceTransformer

OPTIONS = {"trust_remote_code": True, "device": "cpu", "model_kwargs": {"dtype": torch.float32}}


@part
def embedder():
    return SentenceTransformer(str(WORK / "embedder"), **OPTIONS).encode(["panda", "狮子", *image_paths()]).tolist()


@part
def cross_encoder():
    model = CrossEncoder(str(WORK / "cross_encoder"), **OPTIONS)
    return model.predict([(path, "panda") for path in image_paths()]).tolist()


finish()
