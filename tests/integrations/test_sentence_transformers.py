"""sentence_transformers_internvl.py and the JSON files beside it: the repository in sentence-transformers and mteb."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from conftest import ROOT, load, run_interpreter, run_python

sentence_transformers = pytest.importorskip("sentence_transformers")

from sentence_transformers import CrossEncoder, SentenceTransformer  # noqa: E402

CODE_FILE = "sentence_transformers_internvl.py"
NAMES = ["panda", "lion", "pizza", "rocket"]
PICTURES = [str(ROOT / "examples" / "pictures" / f"{name}.png") for name in NAMES]
TEXTS = ["a photo of a panda", "狮子", "a  pizza with two spaces", "ロケット"]
MODES = ["InternVL-C", "InternVL-G"]
FLOAT32 = {"dtype": torch.float32}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def model(trained):
    """The repository's own model, float32."""
    return load(trained, dtype=torch.float32).eval()


def new_embedder(folder, **options):
    options = {"model_kwargs": FLOAT32, "device": "cpu", "trust_remote_code": True} | options
    return SentenceTransformer(str(folder), **options)


def new_cross_encoder(folder, **options):
    options = {"model_kwargs": FLOAT32, "device": "cpu", "trust_remote_code": True} | options
    return get_class_from_dynamic_module("sentence_transformers_internvl.InternVLCrossEncoder", str(folder))(
        str(folder), **options
    )


@pytest.fixture(scope="module")
def shared_embedder(trained):
    return new_embedder(trained)


@pytest.fixture
def embedder(shared_embedder):
    """With its defaults, whatever a test sets."""
    yield shared_embedder
    shared_embedder.max_seq_length = 80
    shared_embedder[0].mode = "InternVL-C"
    shared_embedder.zero_grad()
    shared_embedder.eval()


@pytest.fixture(scope="module")
def cross_encoder(trained):
    return new_cross_encoder(trained)


def ids_of(processor, text):
    """`<s> summarize:TEXT </s>`, put together without the processor."""
    tokenizer = processor.tokenizer
    pieces = tokenizer.sp_model.encode("summarize:" + text)
    return torch.tensor([[1, *pieces, 2]])


def text_embeds(model, processor, texts):
    """One text at a time, by the original call."""
    with torch.no_grad():
        return F.normalize(torch.cat([model.encode_text(ids_of(processor, text)) for text in texts]), dim=-1).numpy()


def image_embeds(model, processor, pictures, mode="InternVL-C"):
    """One image at a time, by the original call."""
    pixels = [processor.image_processor(Image.open(path).convert("RGB"), return_tensors="pt") for path in pictures]
    with torch.no_grad():
        return F.normalize(torch.cat([model.encode_image(each["pixel_values"], mode) for each in pixels]), dim=-1)


def opaque(folder):
    """The example images without transparency, so that `convert("RGB")` of the expectation has nothing to decide."""
    paths = []
    for path in PICTURES:
        white = Image.new("RGBA", Image.open(path).size, "white")
        paths.append(str(folder / Path(path).name))
        Image.alpha_composite(white, Image.open(path).convert("RGBA")).convert("RGB").save(paths[-1])
    return paths


def test_a_checkpoint_in_a_subfolder(model, processor):
    """As in a clone: modules and code at the root, config, weights and tokenizer below."""
    clone = new_embedder(ROOT, model_kwargs=FLOAT32 | {"subfolder": "tiny"})
    np.testing.assert_allclose(clone.encode(TEXTS), text_embeds(model, processor, TEXTS), **CLOSE)
    pairs = [(PICTURES[0], "panda")]
    reranker = new_cross_encoder(ROOT, model_kwargs=FLOAT32 | {"subfolder": "tiny"})
    assert reranker.predict(pairs).shape == (1,)


# Embeddings


def test_texts_have_the_models_embeddings(embedder, model, processor):
    found = embedder.encode(TEXTS)
    assert found.dtype == np.float32 and found.shape == (4, model.config.clip_embed_dim)
    np.testing.assert_allclose(found, text_embeds(model, processor, TEXTS), **CLOSE)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_images_have_the_models_embeddings(embedder, model, processor, mode, tmp_path):
    paths = opaque(tmp_path)
    expected = image_embeds(model, processor, paths, mode).numpy()
    arrays = [np.asarray(Image.open(path)) for path in paths]
    forms = [
        paths,
        [Path(path) for path in paths],
        [Image.open(path) for path in paths],
        arrays,
        [torch.tensor(array).permute(2, 0, 1) for array in arrays],
        [{"image": path} for path in paths],
    ]
    for form in forms:
        np.testing.assert_allclose(embedder.encode(form, mode=mode), expected, **CLOSE)


def test_published_images_are_laid_on_white(embedder, tmp_path):
    """A path must take the processor's way, not the loader of sentence-transformers, which gives black."""
    np.testing.assert_allclose(embedder.encode(PICTURES), embedder.encode(opaque(tmp_path)), **CLOSE)


def test_images_and_their_names_are_neighbours(embedder):
    names, pictures = embedder.encode_query(NAMES), embedder.encode_document(PICTURES)
    assert embedder.similarity(names, pictures).argmax(1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_one_batch_may_mix_texts_and_images(embedder, batch_size):
    texts, pictures = embedder.encode(TEXTS), embedder.encode(PICTURES)
    mixed = [PICTURES[0], TEXTS[2], {"text": TEXTS[0]}, Image.open(PICTURES[3]), TEXTS[1], PICTURES[1]]
    expected = np.stack([pictures[0], texts[2], texts[0], pictures[3], texts[1], pictures[1]])
    np.testing.assert_allclose(embedder.encode(mixed, batch_size=batch_size), expected, **CLOSE)


def test_chat_messages_with_one_part(embedder):
    messages = [
        [{"role": "user", "content": TEXTS[0]}],
        [{"role": "user", "content": [{"type": "text", "text": TEXTS[1]}]}],
        [{"role": "user", "content": [{"type": "image", "image": PICTURES[2]}]}],
    ]
    np.testing.assert_allclose(embedder.encode(messages), embedder.encode([TEXTS[0], TEXTS[1], PICTURES[2]]), **CLOSE)


def test_mode_is_chosen_at_loading_or_for_a_call(trained, embedder, model, processor, tmp_path):
    paths = opaque(tmp_path)
    one, other = (image_embeds(model, processor, paths, mode).numpy() for mode in MODES)
    assert np.abs(one - other).max() > 1e-2
    loaded = new_embedder(trained, model_kwargs=FLOAT32 | {"mode": "InternVL-G"})
    np.testing.assert_allclose(loaded.encode(paths), other, **CLOSE)
    np.testing.assert_allclose(loaded.encode_document(paths, mode="InternVL-C"), one, **CLOSE)
    np.testing.assert_allclose(embedder.encode_query(paths, mode="InternVL-G"), other, **CLOSE)
    np.testing.assert_allclose(embedder.encode(paths), one, **CLOSE)
    with pytest.raises(ValueError, match="`mode` must be one of .*'InternVL-X'"):
        new_embedder(trained, model_kwargs={"mode": "InternVL-X"})
    with pytest.raises(ValueError, match="`mode` must be one of .*'InternVL-X'"):
        embedder.encode(paths, mode="InternVL-X")
    with pytest.raises(ValueError, match="mdoe"):
        embedder.encode(paths, mdoe="InternVL-G")


def test_long_texts_are_cut_with_a_warning(embedder, trained, model, processor):
    text = "very " * 100 + "long"
    ids = ids_of(processor, text)
    assert ids.shape[1] > 80
    for limit in (80, 20):
        embedder.max_seq_length = limit
        cut = torch.cat([ids[:, : limit - 1], ids[:, -1:]], dim=1)
        with pytest.warns(UserWarning, match=f"cut to {limit}"):
            found = embedder.encode(text)
        with torch.no_grad():
            np.testing.assert_allclose(found, model.embed_text(cut)[0].numpy(), **CLOSE)
    for name in ("max_length", "model_max_length"):
        assert new_embedder(trained, processor_kwargs={name: 20}).max_seq_length == 20


def test_prompts_stand_before_texts_only(trained, embedder):
    expected = embedder.encode(["find: " + text for text in TEXTS])
    np.testing.assert_allclose(embedder.encode(TEXTS, prompt="find: "), expected, **CLOSE)
    prompted = new_embedder(trained, prompts={"query": "find: "})
    np.testing.assert_allclose(prompted.encode_query(TEXTS), expected, **CLOSE)
    np.testing.assert_allclose(prompted.encode_document(TEXTS), embedder.encode(TEXTS), **CLOSE)
    np.testing.assert_allclose(prompted.encode_query(PICTURES), embedder.encode(PICTURES), **CLOSE)


def test_crop_is_an_option_of_the_processor(embedder, processor, model, tmp_path):
    Image.open(PICTURES[0]).convert("RGB").resize((120, 60)).save(tmp_path / "wide.png")
    squashed = processor(images=tmp_path / "wide.png", crop="squash").pixel_values
    found = embedder.encode(tmp_path / "wide.png", processing_kwargs={"image": {"crop": "squash"}})
    with torch.no_grad():
        np.testing.assert_allclose(found, model.embed_image(squashed)[0].numpy(), **CLOSE)
    assert np.abs(found - embedder.encode(tmp_path / "wide.png")).max() > 1e-2


def test_the_usual_options(embedder, trained):
    texts, pictures = embedder.encode(TEXTS), embedder.encode(PICTURES)
    tensors = embedder.encode(TEXTS, convert_to_tensor=True)
    assert torch.equal(tensors, torch.from_numpy(texts))
    assert embedder.encode(TEXTS[0]).shape == (128,) and embedder.encode(Image.open(PICTURES[0])).shape == (128,)
    np.testing.assert_allclose(embedder.similarity(texts, pictures), texts @ pictures.T, **CLOSE)
    np.testing.assert_allclose(embedder.similarity_pairwise(texts, pictures), (texts * pictures).sum(1), **CLOSE)
    np.testing.assert_allclose(embedder.encode(TEXTS, truncate_dim=16), texts[:, :16], **CLOSE)
    np.testing.assert_allclose(new_embedder(trained, truncate_dim=16).encode(PICTURES), pictures[:, :16], **CLOSE)
    if hasattr(embedder, "get_embedding_dimension"):
        assert embedder.get_embedding_dimension() == 128
    assert embedder.similarity_fn_name == "cosine" and embedder.max_seq_length == 80
    assert embedder.tokenizer is embedder[0].processor.tokenizer


def test_a_type_and_only_the_needed_parts(trained, embedder):
    half = new_embedder(trained, model_kwargs={"dtype": torch.bfloat16}, config_kwargs={"contrastive_only": True})
    assert half.dtype == torch.bfloat16 and not hasattr(half[0].model, "query_tokens")
    for inputs in (TEXTS, PICTURES):
        found, expected = half.encode(inputs), embedder.encode(inputs)
        assert found.dtype == np.float32 and not np.array_equal(found, expected)
        assert (found * expected).sum(1).min() > 0.99
    with pytest.raises(ValueError, match="needs the queries"):
        half.encode(PICTURES, mode="InternVL-G")


FRESH = """
import sys, numpy, torch
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("saved", trust_remote_code=True, device="cpu", model_kwargs={"dtype": torch.float32})
model.save_pretrained("again")
numpy.savez("embeds.npz", found=model.encode(sys.argv[1:]), modes=numpy.array([model[0].mode]))
"""


def test_saved_model_comes_back_in_a_fresh_process(trained, embedder, tmp_path):
    loaded = new_embedder(trained, model_kwargs=FLOAT32 | {"mode": "InternVL-G"}, prompts={"query": "find: "})
    loaded.max_seq_length = 40
    loaded.save_pretrained(str(tmp_path / "saved"))
    inputs = [*TEXTS, *PICTURES]
    run_python(FRESH, tmp_path, *inputs)
    back = np.load(tmp_path / "embeds.npz")
    assert back["modes"][0] == "InternVL-G"
    np.testing.assert_allclose(back["found"], embedder.encode(inputs, mode="InternVL-G"), **CLOSE)
    again = new_embedder(tmp_path / "again")
    assert again.max_seq_length == 40 and again.prompts["query"] == "find: " and again[0].mode == "InternVL-G"
    assert (tmp_path / "again" / CODE_FILE).read_text() == (ROOT / CODE_FILE).read_text()


POOL = """
import sys, numpy, torch
from sentence_transformers import SentenceTransformer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
if __name__ == "__main__":
    repository, picture, *texts = sys.argv[1:]
    reranker = get_class_from_dynamic_module("sentence_transformers_internvl.InternVLCrossEncoder", repository)
    options = {"trust_remote_code": True, "device": "cpu", "model_kwargs": {"dtype": torch.float32}}
    model = SentenceTransformer(repository, **options)
    pool = model.start_multi_process_pool(["cpu"])
    embeds = model.encode([*texts, picture], pool=pool, chunk_size=3, mode="InternVL-G")
    model.stop_multi_process_pool(pool)
    scores = reranker(repository, **options).predict([(picture, text) for text in texts], device=["cpu"])
    numpy.savez("found.npz", embeds=embeds, scores=scores)
"""


@pytest.mark.slow
def test_processes_of_a_pool_compute_the_same(trained, embedder, cross_encoder, tmp_path):
    run_interpreter(POOL, tmp_path, trained, PICTURES[0], *TEXTS)
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_allclose(found["embeds"], embedder.encode([*TEXTS, PICTURES[0]], mode="InternVL-G"), **CLOSE)
    np.testing.assert_allclose(found["scores"], cross_encoder.predict([(PICTURES[0], text) for text in TEXTS]), **CLOSE)


# Training


def losses_module():
    from sentence_transformers.sentence_transformer import losses

    return losses


def contrastive_loss(embedder, loss):
    features = [embedder.preprocess(inputs) for inputs in (TEXTS, PICTURES)]
    embedder.zero_grad()
    value = loss(features, labels=None)
    value.backward()
    return value


def test_ranking_loss_reaches_every_parameter_of_its_path(embedder, model, processor, tmp_path):
    value = contrastive_loss(embedder, losses_module().MultipleNegativesRankingLoss(embedder, scale=20.0))
    texts = torch.from_numpy(text_embeds(model, processor, TEXTS))
    logits = 20.0 * texts @ image_embeds(model, processor, opaque(tmp_path)).T
    expected = F.cross_entropy(logits, torch.arange(4))
    torch.testing.assert_close(value.detach(), expected, rtol=1e-4, atol=1e-5)
    for name, parameter in embedder[0].model.named_parameters():
        sees_an_image = name.startswith("qllama.") and ".cross_attn" in name
        if (
            name.startswith(("vision_model.", "clip_projector.", "text_projection", "qllama.model."))
            and not sees_an_image
        ):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_cached_ranking_loss_has_the_same_gradients(embedder):
    losses = losses_module()
    plain = contrastive_loss(embedder, losses.MultipleNegativesRankingLoss(embedder)).detach()
    expected = embedder[0].model.text_projection.grad.clone()
    cached = contrastive_loss(embedder, losses.CachedMultipleNegativesRankingLoss(embedder, mini_batch_size=2))
    torch.testing.assert_close(cached.detach(), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedder[0].model.text_projection.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_trainer_learns_and_its_checkpoint_comes_back(trained, tmp_path):
    from datasets import Dataset
    from datasets import Image as ImageFeature

    own = new_embedder(trained)
    data = Dataset.from_dict({"anchor": TEXTS, "positive": PICTURES}).cast_column("positive", ImageFeature())
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        save_steps=3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
    )
    trainer = sentence_transformers.SentenceTransformerTrainer(
        own, arguments, data, loss=losses_module().MultipleNegativesRankingLoss(own)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < 0.8 * float(losses[0])
    again = new_embedder(tmp_path / "out" / "checkpoint-3")
    for inputs in (TEXTS, PICTURES):
        np.testing.assert_allclose(again.encode(inputs), own.encode(inputs), **CLOSE)


def test_a_part_of_a_mixed_batch_is_refused(embedder):
    features = embedder.preprocess([TEXTS[0], PICTURES[0], TEXTS[1], PICTURES[1]])
    part = {name: tensor[:2] for name, tensor in features.items()}
    with pytest.raises(ValueError, match="whole mixed batch, got 4 of 2 rows"):
        embedder(part)


# Errors


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (["panda", "  "], ValueError, "must hold some text"),
        ([{"image": "absent.png"}], FileNotFoundError, "absent.png"),
        ([{"text": "panda", "image": PICTURES[0]}], ValueError, "one text or one image, got .*image.*text"),
        (["https://example.org/panda.png"], ValueError, "nothing is fetched: 'https://example.org/panda.png'"),
        ([7], ValueError, "Unsupported input type: int"),
        ([("panda", "lion")], TypeError, "must be a str, got tuple"),
        ([np.zeros(8, dtype=np.float32)], ValueError, "audio"),
        ([np.full((8, 8, 3), 7.0)], ValueError, r"must be in \[0, 1\]"),
    ],
)
def test_what_is_neither_text_nor_image_is_named(embedder, inputs, error, message):
    with pytest.raises(error, match=message):
        embedder.encode(inputs)


def test_a_broken_image_is_named(embedder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match="broken.png"):
        embedder.encode([str(tmp_path / "broken.png")])


def test_an_absent_image_is_read_as_a_text_with_a_warning(embedder):
    with pytest.warns(UserWarning, match="no image 'pictures/absent.png'"):
        embedder.encode("pictures/absent.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedder.encode(["a picture of absent.png", {"text": "absent.png"}])


def test_other_backends_are_refused(trained):
    with pytest.raises(ValueError, match='`backend` must be "torch"'):
        new_embedder(trained, backend="onnx")


def test_code_is_not_run_without_trust(trained):
    with pytest.raises(ValueError, match="trust_remote_code"):
        new_embedder(trained, trust_remote_code=False)


MISSING = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sentence_transformers":
            raise ImportError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from transformers import AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
try:
    get_class_from_dynamic_module("sentence_transformers_internvl.InternVLCrossEncoder", sys.argv[1])
except ImportError as error:
    print(error)
"""


def test_a_missing_package_is_named_and_the_model_needs_none(trained, tmp_path):
    assert "pip install sentence_transformers" in run_interpreter(MISSING, tmp_path, trained).stdout


# Re-ranking


@pytest.fixture(scope="module")
def match(model, processor):
    """The probability of every image with every text [4, 4], one pair at a time, by the model's own call."""
    pixels = [processor(images=picture).pixel_values for picture in PICTURES]
    ids = [processor(text=text, task="match") for text in TEXTS]
    with torch.no_grad():
        logits = [model.match(picture, **text)[0] for picture in pixels for text in ids]
    return torch.stack(logits).softmax(-1)[:, 1].view(4, 4).numpy()


def test_scores_are_the_probabilities_of_a_match(cross_encoder, match):
    assert match.std() > 0.05
    expected = match.ravel()
    pairs = [(picture, text) for picture in PICTURES for text in TEXTS]
    swapped = [[{"text": text}, Image.open(picture)] for picture, text in pairs]
    for batch_size in (1, 3, 32):
        np.testing.assert_allclose(cross_encoder.predict(pairs, batch_size=batch_size), expected, **CLOSE)
    np.testing.assert_allclose(cross_encoder.predict(swapped), expected, **CLOSE)
    one = cross_encoder.predict(pairs[5], convert_to_tensor=True)
    assert one.shape == () and abs(float(one) - match[1, 1]) < 1e-5
    odds = cross_encoder.predict(pairs, activation_fn=torch.nn.Identity(), convert_to_numpy=False)
    assert isinstance(odds, list)
    np.testing.assert_allclose(torch.stack(odds).sigmoid(), expected, **CLOSE)
    assert len(cross_encoder.predict([])) == 0


def test_rank_orders_texts_for_an_image_and_images_for_a_text(cross_encoder, match):
    texts = cross_encoder.rank(Image.open(PICTURES[1]), TEXTS)
    assert [hit["corpus_id"] for hit in texts] == np.argsort(-match[1]).tolist()
    np.testing.assert_allclose([hit["score"] for hit in texts], np.sort(match[1])[::-1], **CLOSE)
    pictures = cross_encoder.rank(TEXTS[2], PICTURES, top_k=2, return_documents=True)
    best = np.argsort(-match[:, 2])[:2]
    assert [hit["text"] for hit in pictures] == [PICTURES[index] for index in best]


def count_images(model, call):
    """How many images the vision tower saw in `call()`, and what it returned."""
    counts = []
    handle = model.vision_model.register_forward_pre_hook(lambda module, inputs: counts.append(len(inputs[0])))
    try:
        return call(), sum(counts)
    finally:
        handle.remove()


@pytest.mark.parametrize("batch_size", [2, 32])
def test_an_image_is_seen_once(cross_encoder, match, batch_size):
    opened = [Image.open(picture) for picture in PICTURES[:3]]
    pairs = [(picture, text) for text in TEXTS for picture in opened]
    found, seen = count_images(cross_encoder[0].model, lambda: cross_encoder.predict(pairs, batch_size=batch_size))
    assert seen == 3
    np.testing.assert_allclose(found, match[:3].T.ravel(), **CLOSE)


def test_saved_cross_encoder_is_loaded_by_the_plain_class(cross_encoder, match, tmp_path):
    cross_encoder.save_pretrained(str(tmp_path / "saved"))
    plain = CrossEncoder(str(tmp_path / "saved"), trust_remote_code=True, device="cpu", model_kwargs=FLOAT32)
    assert type(plain) is CrossEncoder
    pairs = [(picture, text) for picture in PICTURES[:2] for text in TEXTS]
    found, seen = count_images(plain[0].model, lambda: plain.predict(pairs))
    np.testing.assert_allclose(found, match[:2].ravel(), **CLOSE)
    assert seen == 2
    ours = new_cross_encoder(tmp_path / "saved", max_length=20)
    assert ours.max_seq_length == 20
    np.testing.assert_allclose(ours.predict(pairs), found, **CLOSE)


def test_cross_encoder_trains(cross_encoder, match):
    pairs = [(PICTURES[0], TEXTS[0]), (PICTURES[0], TEXTS[2]), (PICTURES[1], TEXTS[1])]
    labels = torch.tensor([1.0, 0.0, 1.0])
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    value = BinaryCrossEntropyLoss(cross_encoder)([[p for p, _ in pairs], [t for _, t in pairs]], labels)
    value.backward()
    probabilities = torch.from_numpy(match[[0, 0, 1], [0, 2, 1]])
    torch.testing.assert_close(value.detach(), F.binary_cross_entropy(probabilities, labels), rtol=1e-4, atol=1e-5)
    assert cross_encoder[0].model.itm_head.weight.grad.abs().sum() > 0
    assert all(each.grad is not None for each in cross_encoder[0].model.vision_model.parameters())
    cross_encoder.zero_grad()


@pytest.mark.parametrize(
    ("pair", "error", "message"),
    [
        (("panda", "lion"), ValueError, "must be an image and a text, got two texts"),
        ((PICTURES[0], PICTURES[1]), ValueError, "must be an image and a text, got two images"),
        ((PICTURES[0], " "), ValueError, "must hold some text"),
        (("panda", "lion", PICTURES[0]), TypeError, "must be a pair"),
        (({"image": "absent.png"}, "panda"), FileNotFoundError, "absent.png"),
    ],
)
def test_what_is_no_pair_is_named(cross_encoder, pair, error, message):
    with pytest.raises(error, match=message):
        cross_encoder.predict([(PICTURES[0], "panda"), pair])


# mteb


@pytest.fixture(scope="module")
def mteb():
    return pytest.importorskip("mteb")


META = {"name": "OpenGVLab/InternVL-14B-224px", "revision": "main", "modalities": ["image", "text"]}


def retrieval_task(mteb, direction, top_ranked=None, right=range(4)):
    """Four names and their images, as an in-memory task of mteb; `right` says which answers which."""
    from datasets import Dataset
    from mteb.mocks.mock_tasks.retrieval import MockAny2AnyRetrievalI2TTask, MockAny2AnyRetrievalT2ITask

    text, image = {"text": NAMES}, {"image": [Image.open(path) for path in PICTURES]}
    queries, corpus = (text, image) if direction == "t2i" else (image, text)

    class Emoji(MockAny2AnyRetrievalT2ITask if direction == "t2i" else MockAny2AnyRetrievalI2TTask):
        def load_data(self, **kwargs):
            super().load_data()
            data = self.dataset["default"]["test"]
            data["queries"] = Dataset.from_dict({"id": [f"q{i}" for i in range(4)]} | queries)
            data["corpus"] = Dataset.from_dict({"id": [f"d{i}" for i in range(4)]} | corpus)
            data["relevant_docs"] = {f"q{i}": {f"d{j}": 1} for i, j in enumerate(right)}
            data["top_ranked"] = top_ranked

    return Emoji()


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_mteb_evaluates_retrieval(mteb, embedder, direction, tmp_path):
    from mteb.models import SentenceTransformerEncoderWrapper

    encoder = SentenceTransformerEncoderWrapper(embedder)
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update=META)
    assert encoder.mteb_model_meta.embed_dim == 128 and encoder.mteb_model_meta.max_tokens == 80
    result = mteb.evaluate(encoder, retrieval_task(mteb, direction), cache=None, show_progress_bar=False)
    assert result.task_results[0].get_score() == 1.0


def test_mteb_evaluates_re_ranking(mteb, cross_encoder, model, processor):
    """The score is that of the model's own probabilities; the image marked right is not the one of the name."""
    from mteb.models import CrossEncoderWrapper

    encoder = CrossEncoderWrapper(cross_encoder)
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update=META)
    right = [1, 2, 3, 0]
    task = retrieval_task(mteb, "t2i", {f"q{i}": [f"d{j}" for j in range(4)] for i in range(4)}, right)
    result = mteb.evaluate(encoder, task, cache=None, show_progress_bar=False)
    with torch.no_grad():
        pixels, names = processor(images=PICTURES).pixel_values, processor(text=NAMES, task="match")
        odds = model.match(pixels, **names, all_pairs=True).diff(dim=-1)[..., 0].T  # [names, images]
    ranks = (odds >= odds[torch.arange(4), right][:, None]).sum(1)
    assert 1 < ranks.max()
    expected = (1 / torch.log2(ranks + 1.0)).mean()
    assert abs(result.task_results[0].get_score() - float(expected)) < 1e-4


def test_mteb_reads_the_kinds_of_inputs_from_the_settings(mteb):
    """For a model of the Hub, mteb takes them from this file; without it, mteb would refuse tasks with images."""
    from mteb.models import ModelMeta

    settings = json.loads((ROOT / "sentence_bert_config.json").read_text())
    assert ModelMeta._detect_modalities_from_sbert_config(settings) == ["image", "text"]


def test_the_embedder_checks_its_mode(embedder):
    module = embedder[0]
    with pytest.raises(ValueError, match="`mode` must be one of"):
        type(module)(module.model, module.processor, mode="InternVL-X")
