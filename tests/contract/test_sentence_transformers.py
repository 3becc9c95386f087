"""sentence-transformers gives the embeddings and match scores of the model; saved models load again."""

import numpy as np
import pytest
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from conftest import IMAGES, NAMES

sentence_transformers = pytest.importorskip("sentence_transformers")
pytestmark = pytest.mark.feature("sentence-transformers")
TEXTS = ["a photo of a panda", "狮子", "a  pizza with two spaces", "ロケット"]
OPTIONS = {"trust_remote_code": True, "device": "cpu", "model_kwargs": {"dtype": torch.float32}}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def embedder(trained):
    return sentence_transformers.SentenceTransformer(str(trained), **OPTIONS)


@pytest.fixture(scope="module")
def cross_encoder(trained):
    reference = "sentence_transformers_internvl.InternVLCrossEncoder"
    return get_class_from_dynamic_module(reference, str(trained))(str(trained), **OPTIONS)


@torch.inference_mode()
def test_texts(embedder, tiny, processor):
    wanted = torch.cat([tiny.embed_text(**processor(text=[text])) for text in TEXTS])
    np.testing.assert_allclose(embedder.encode(TEXTS), wanted.numpy(), **CLOSE)


@pytest.mark.parametrize("mode", ["InternVL-C", "InternVL-G"])
@torch.inference_mode()
def test_images(embedder, tiny, processor, mode):
    wanted = tiny.embed_image(processor(images=IMAGES).pixel_values, mode)
    np.testing.assert_allclose(embedder.encode(IMAGES, mode=mode), wanted.numpy(), **CLOSE)


def test_similarity(embedder):
    names, images = embedder.encode_query(NAMES), embedder.encode_document(IMAGES)
    assert embedder.similarity(names, images).argmax(1).tolist() == [0, 1, 2, 3]


@torch.inference_mode()
def test_cross_encoder(cross_encoder, tiny, processor):
    pixels = processor(images=IMAGES).pixel_values
    logits = tiny.match(pixels, **processor(text=TEXTS, task="match"), all_pairs=True)
    wanted = logits.softmax(-1)[..., 1].numpy()
    pairs = [(image, text) for image in IMAGES for text in TEXTS]
    found = cross_encoder.predict(pairs)
    np.testing.assert_allclose(found.reshape(4, 4), wanted, rtol=1e-4, atol=1e-5)
    ranked = cross_encoder.rank(IMAGES[1], TEXTS)
    assert [hit["corpus_id"] for hit in ranked] == np.argsort(-wanted[1]).tolist()


@pytest.mark.fresh("sentences")
@pytest.mark.parametrize("kind", ["embedder", "cross_encoder"])
def test_saved_models_load_in_a_fresh_process(fresh, interpreters, kind):
    before = interpreters.found("sentences_save")[kind]
    np.testing.assert_allclose(fresh[kind], before, rtol=0, atol=0)
    assert np.std(before) > 0
