"""handler.py, as Inference Endpoints calls it: right answers for every task, and a plain refusal of everything else."""

import base64
import copy
import importlib.util
import io
import json
import math
import shutil
import socket
import struct
import threading
import zlib

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoProcessor

from conftest import ROOT, load

PICTURES = ROOT / "examples" / "pictures"
NAMES = ["panda", "lion", "rocket"]
BYTES = {name: (PICTURES / f"{name}.png").read_bytes() for name in NAMES}
CLOSE = {"rtol": 2e-2, "atol": 2e-2}  # bfloat16, in batches of another size


def text(name: str) -> str:
    return base64.b64encode(BYTES[name]).decode()


def encoded(image: Image.Image, kind: str = "PNG", **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def handler(trained):
    """The module, imported from its file as the container does it."""
    spec = importlib.util.spec_from_file_location("handler", trained / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def endpoint(handler, trained):
    return handler.EndpointHandler(str(trained))


@pytest.fixture(scope="module")
def reference(trained):
    """Model and processor as a user loads them, and the pixels of all images."""
    processor = load(trained, AutoProcessor)
    return (
        load(trained, dtype=torch.bfloat16).eval(),
        processor,
        processor(images=[PICTURES / f"{n}.png" for n in NAMES]),
    )


def ask(endpoint, inputs, **parameters):
    """What a client gets: through JSON, which has no NaN."""
    return json.loads(json.dumps(endpoint({"inputs": inputs, "parameters": parameters}), allow_nan=False))


def refused(handler, endpoint, data) -> tuple[int, str]:
    with pytest.raises(handler.RequestError) as caught:
        endpoint(data)
    return caught.value.status, str(caught.value)


# ------------------------------------------------------------------------------------------------------- answers


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["InternVL-C", "InternVL-G"])
def test_zero_shot(endpoint, reference, mode):
    model, processor, pictures = reference
    templates = ["a photo of a {}", "{}的图片"]
    classes = torch.stack([
        F.normalize(model.encode_text(processor(text=[t.replace("{}", name)]).input_ids)[0].float(), dim=0)
        for name in NAMES for t in templates
    ])  # fmt: skip
    classes = F.normalize(classes.view(3, 2, -1).mean(1), dim=-1)
    images = F.normalize(model.encode_image(pictures.pixel_values, mode=mode).float(), dim=-1)
    expected = (model.logit_scale.float().exp() * images @ classes.T).softmax(-1)
    found = ask(endpoint, [text(name) for name in NAMES], candidate_labels=NAMES, templates=templates, mode=mode)
    for name, row, wanted in zip(NAMES, found, expected):
        scores = [entry["score"] for entry in row]
        assert row[0]["label"] == name and scores == sorted(scores, reverse=True)
        by_label = {entry["label"]: entry["score"] for entry in row}
        torch.testing.assert_close(torch.tensor([by_label[label] for label in NAMES]), wanted, **CLOSE)


def test_one_image_is_answered_as_the_clients_of_the_hub_expect(endpoint):
    """InferenceClient.zero_shot_image_classification sends just this, and reads a list of labels and scores."""
    found = ask(endpoint, text("lion"), candidate_labels=NAMES, hypothesis_template="a photo of a {}")
    assert [set(entry) for entry in found] == [{"label", "score"}] * 3 and found[0]["label"] == "lion"
    assert (
        ask(endpoint, text("lion"), candidate_labels=NAMES, hypothesis_template="a photo of a {}", top_k=1) == found[:1]
    )


@torch.inference_mode()
def test_embed(endpoint, reference):
    model, processor, pictures = reference
    texts = ["panda", "狐狸的图片", "a very old steam locomotive"]
    found = ask(endpoint, {"images": [text(n) for n in NAMES], "texts": texts}, task="embed", mode="InternVL-G")
    images, words = torch.tensor(found["image_embeds"]), torch.tensor(found["text_embeds"])
    expected = F.normalize(model.encode_image(pictures.pixel_values, mode="InternVL-G").float(), dim=-1)
    torch.testing.assert_close(images, expected, rtol=0, atol=5e-3)
    alone = [F.normalize(model.encode_text(processor(text=[each]).input_ids).float(), dim=-1) for each in texts]
    torch.testing.assert_close(words, torch.cat(alone), rtol=0, atol=5e-3)
    for each in (images, words):
        torch.testing.assert_close(each.norm(dim=-1), torch.ones(3))  # not nearly 1, as bfloat16 would make it
    only = ask(endpoint, {"texts": "panda"}, task="embed")
    assert only["image_embeds"] is None and len(only["text_embeds"]) == 1
    other = torch.tensor(ask(endpoint, text("panda"), task="embed")["image_embeds"])
    assert not torch.allclose(other, images[:1], atol=1e-2), "the default mode is another"


@torch.inference_mode()
def test_caption(endpoint, reference):
    model, processor, pictures = reference
    prompt = processor(text="中文描述:", task="caption")
    ids = model.generate(pictures.pixel_values, **prompt, num_beams=3, max_new_tokens=6)
    expected = [caption.strip() for caption in processor.batch_decode(ids, skip_special_tokens=True)]
    options = {"prompt": "中文描述:", "num_beams": 3, "max_new_tokens": 6}
    found = ask(endpoint, [text(name) for name in NAMES], task="caption", **options)
    assert found == [{"generated_text": caption} for caption in expected]
    short, whole = (
        [caption["generated_text"] for caption in ask(endpoint, [text(name) for name in NAMES], task="caption", **few)]
        for few in ({"max_new_tokens": 1, "num_beams": 1}, {"num_beams": 1})
    )
    assert all(long.startswith(first) for first, long in zip(short, whole)) and short != whole


@torch.inference_mode()
def test_match(endpoint, reference):
    model, processor, pictures = reference
    expected = model.match(pictures.pixel_values, **processor(text=NAMES[:2], task="match"), all_pairs=True)
    found = ask(endpoint, {"images": [text(name) for name in NAMES], "texts": NAMES[:2]}, task="match")["scores"]
    torch.testing.assert_close(torch.tensor(found), expected.float().softmax(-1)[..., 1], **CLOSE)


@torch.inference_mode()
def test_rerank_texts_and_images(endpoint, reference):
    model, processor, pictures = reference
    images = F.normalize(model.encode_image(pictures.pixel_values, mode="InternVL-G").float(), dim=-1)
    words = F.normalize(model.encode_text(processor(text=NAMES).input_ids).float(), dim=-1)
    matches = model.match(pictures.pixel_values, **processor(text=NAMES, task="match"), all_pairs=True)
    matches = matches.float().log_softmax(-1)[..., 1]
    scores = model.logit_scale.float().exp() * images @ words.T + 3 * matches
    texts = ask(endpoint, {"images": text("lion"), "texts": NAMES}, task="rerank", match_weight=3)
    seen = ask(endpoint, {"images": [text(name) for name in NAMES], "texts": "lion"}, task="rerank", match_weight=3)
    for found, wanted in ((texts, scores[1]), (seen, scores[:, 1])):
        assert [entry["index"] for entry in found] == wanted.argsort(descending=True).tolist()
        torch.testing.assert_close(torch.tensor([e["score"] for e in found]), wanted.sort(descending=True)[0], **CLOSE)
    best = texts[0]
    assert best["index"] == 1
    assert best["cosine"] == pytest.approx(float(images[1] @ words[1]), abs=1e-2)
    assert best["match"] == pytest.approx(float(matches[1, 1].exp()), abs=1e-2)
    assert ask(endpoint, {"images": text("lion"), "texts": NAMES}, task="rerank", match_weight=3, top_k=1) == texts[:1]
    plain = ask(endpoint, {"images": text("lion"), "texts": NAMES}, task="rerank", match_weight=0)
    assert [entry["cosine"] for entry in plain] == sorted((entry["cosine"] for entry in plain), reverse=True)


def test_an_image_may_come_in_four_forms(endpoint):
    forms = [
        text("panda"),
        f"data:image/png;base64,{text('panda')}",
        BYTES["panda"],
        Image.open(PICTURES / "panda.png"),
    ]
    answers = [ask(endpoint, form, task="embed") for form in forms]
    assert all(answer == answers[0] for answer in answers[1:])
    jpeg = encoded(Image.open(PICTURES / "panda.png").convert("RGBA").convert("RGB"), "JPEG")
    assert ask(endpoint, jpeg, task="embed") != answers[0]


def test_without_a_path_the_handler_serves_its_own_folder(handler, endpoint):
    own = handler.EndpointHandler()
    assert ask(own, text("panda"), task="embed") == ask(endpoint, text("panda"), task="embed")


def test_nothing_is_kept_between_requests(endpoint):
    """The same answers whatever came before and whatever runs beside; requests are not changed."""
    both = [text("panda"), text("lion")]
    requests = [
        {"inputs": both, "parameters": {"task": "caption", "num_beams": 3, "prompt": "中文描述:"}},
        {"inputs": both, "parameters": {"task": "caption", "max_new_tokens": 3}},
        {"inputs": both, "parameters": {"candidate_labels": NAMES}},
        {"inputs": {"images": both, "texts": ["panda"]}, "parameters": {"task": "rerank"}},
        {"inputs": {"texts": NAMES}, "parameters": {"task": "embed"}},
    ]
    before = copy.deepcopy(requests)
    expected = [endpoint(request) for request in requests]
    wrong, failed = [], []

    def work(start: int) -> None:
        try:
            for step in range(2 * len(requests)):
                number = (start + step) % len(requests)
                if endpoint(requests[number]) != expected[number]:
                    wrong.append(number)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not failed and requests == before


# ------------------------------------------------------------------------------------------------------ refusals


def png_header(width: int, height: int) -> str:
    """The beginning of a PNG file of that size, which holds hardly any pixels."""
    file = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"\x78\x9c")):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        file += struct.pack(">I", len(content)) + kind + content + checksum
    return base64.b64encode(file).decode()


def truncated_jpeg() -> str:
    noise = Image.effect_noise((200, 200), 80)
    whole = base64.b64decode(encoded(noise, "JPEG"))
    return base64.b64encode(whole[: len(whole) // 2]).decode()


P = text("panda")
LABELS = {"candidate_labels": NAMES}
BAD_REQUESTS = {
    "no object": ([P], 400, '"inputs"'),
    "no inputs": ({"parameters": LABELS}, 400, '"inputs"'),
    "parameters of a wrong type": ({"inputs": P, "parameters": [1]}, 400, "`parameters`"),
    "parameters of a falsy wrong type": ({"inputs": P, "parameters": 0}, 400, "`parameters`"),
    "unknown task": ({"inputs": P, "parameters": {"task": "segment"}}, 422, "`task`"),
    "task of a wrong type": ({"inputs": P, "parameters": {"task": ["embed"]}}, 422, "`task`"),
    "unknown parameter": ({"inputs": P, "parameters": LABELS | {"topk": 1}}, 422, "'topk'"),
    "parameter of another task": ({"inputs": P, "parameters": LABELS | {"num_beams": 2}}, 422, "'num_beams'"),
    "unknown input": ({"inputs": {"image": P}, "parameters": LABELS}, 422, "`inputs`"),
    "no image": ({"inputs": [], "parameters": LABELS}, 422, "`images`"),
    "null": ({"inputs": None, "parameters": LABELS}, 422, "`images`"),
    "nothing to embed": ({"inputs": {}, "parameters": {"task": "embed"}}, 422, "`inputs`"),
    "texts that would not be read": ({"inputs": {"images": P, "texts": "a"}, "parameters": LABELS}, 422, "`texts`"),
    "nothing to match": ({"inputs": P, "parameters": {"task": "match"}}, 422, "`texts`"),
    "many with many": (
        {"inputs": {"images": [P, P], "texts": ["a", "b"]}, "parameters": {"task": "rerank"}}, 422, "2 images",
    ),
    "no labels": ({"inputs": P}, 422, "`candidate_labels`"),
    "no label between commas": (
        {"inputs": P, "parameters": {"candidate_labels": "panda,,lion"}}, 422, "candidate_labels[1]",
    ),
    "texts as inputs": ({"inputs": ["a panda"], "parameters": {"task": "embed"}}, 400, '{"texts": ...}'),
    "empty labels": ({"inputs": P, "parameters": {"candidate_labels": []}}, 422, "`candidate_labels`"),
    "blank label": ({"inputs": P, "parameters": {"candidate_labels": ["a", " "]}}, 422, "candidate_labels[1]"),
    "labels that are numbers": ({"inputs": P, "parameters": {"candidate_labels": [1, 2]}}, 422, "`candidate_labels`"),
    "no place in a template": ({"inputs": P, "parameters": LABELS | {"templates": ["a"]}}, 422, "`templates`"),
    "two places in a template": ({"inputs": P, "parameters": LABELS | {"templates": ["{} {}"]}}, 422, "`templates`"),
    "no template": ({"inputs": P, "parameters": LABELS | {"templates": []}}, 422, "`templates`"),
    "two kinds of templates": (
        {"inputs": P, "parameters": LABELS | {"templates": "{}", "hypothesis_template": "{}"}}, 422, "the same",
    ),
    "wrong mode": ({"inputs": P, "parameters": LABELS | {"mode": "InternVL-X"}}, 422, "`mode`"),
    "top_k of zero": ({"inputs": P, "parameters": LABELS | {"top_k": 0}}, 422, "`top_k`"),
    "top_k that is true": ({"inputs": P, "parameters": LABELS | {"top_k": True}}, 422, "`top_k`"),
    "too many beams": ({"inputs": P, "parameters": {"task": "caption", "num_beams": 9}}, 422, "`num_beams`"),
    "half a token": ({"inputs": P, "parameters": {"task": "caption", "max_new_tokens": 1.5}}, 422, "`max_new_tokens`"),
    "too many tokens": ({"inputs": P, "parameters": {"task": "caption", "max_new_tokens": 10**6}}, 422, "`max_new"),
    "two prompts": ({"inputs": P, "parameters": {"task": "caption", "prompt": ["a", "b"]}}, 422, "`prompt`"),
    "a weight that is no number": (
        {"inputs": {"images": P, "texts": "a"}, "parameters": {"task": "rerank", "match_weight": math.nan}},
        422,
        "`match_weight`",
    ),
    "10,000 texts": ({"inputs": {"texts": ["a"] * 10_000}, "parameters": {"task": "embed"}}, 413, "10000"),
    "labels times templates": (
        {"inputs": P, "parameters": {"candidate_labels": ["a"] * 1000, "templates": ["{}", "a {}"]}}, 413, "2000",
    ),
    "a text that would be cut": ({"inputs": {"texts": "panda " * 100}, "parameters": {"task": "embed"}}, 422, "80 ids"),
    "a label that would be cut": ({"inputs": P, "parameters": {"candidate_labels": ["panda " * 100]}}, 422, "80 ids"),
    "a long prompt": ({"inputs": P, "parameters": {"task": "caption", "prompt": "a b " * 90}}, 422, "80 ids"),
    "a text without end": ({"inputs": {"texts": "a" * 10**6}, "parameters": {"task": "embed"}}, 413, "texts[0]"),
    "too many images": ({"inputs": [P] * 33, "parameters": LABELS}, 413, "33"),
    "too many pairs": (
        {"inputs": {"images": [P] * 2, "texts": ["a"] * 200}, "parameters": {"task": "match"}}, 413, "400",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests(handler, endpoint, name):
    data, status, phrase = BAD_REQUESTS[name]
    found, message = refused(handler, endpoint, data)
    assert found == status and phrase in message and len(message) < 400, message


BAD_IMAGES = {
    "a number": (7, 422, "must be a base64 string"),
    "a list of lists": ([[P]], 422, "must be a base64 string"),
    "garbage": ("%%%not base64%%%", 400, "not base64"),
    "not ASCII": ("熊猫", 400, "not base64"),
    "empty": ("", 422, "is none of"),
    "base64 of something else": (base64.b64encode(b"hello, world").decode(), 422, "is none of"),
    "a vector drawing": (base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode(), 422, "is none of"),
    "PostScript": (base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode(), 422, "is none of"),
    "a data URL that is not base64": ("data:image/svg+xml,%3Csvg/%3E", 400, "data URL"),
    "a data URL of a text": (f"data:text/plain;base64,{P}", 400, "data URL"),
    "a truncated PNG": (P[:400], 422, "cannot be decoded"),
    "a truncated JPEG": (truncated_jpeg(), 422, "cannot be decoded"),
    "too many pixels": (png_header(8000, 8000), 413, "64000000"),
    "a bomb that PIL knows": (png_header(100_000, 100_000), 413, "pixels"),
    "a line": (encoded(Image.new("RGB", (5000, 1))), 422, "times as long"),
    "a line from the container": (Image.new("RGB", (1, 5000)), 422, "times as long"),
    "a web address": ("http://169.254.169.254/latest/meta-data/", 400, "not fetched"),
    "a file's address": ("file:///etc/passwd", 400, "not read"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(handler, endpoint, monkeypatch, name):
    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("a request must not open a connection"))
    item, status, phrase = BAD_IMAGES[name]
    found, message = refused(handler, endpoint, {"inputs": [P, item], "parameters": LABELS})
    assert found == status and phrase in message and len(message) < 400, message
    assert "images[1]" in message


def test_a_path_that_happens_to_be_base64_is_not_read(handler, endpoint, tmp_path, monkeypatch):
    shutil.copy(PICTURES / "panda.png", tmp_path / "pandapng")
    monkeypatch.chdir(tmp_path)
    assert refused(handler, endpoint, {"inputs": "pandapng", "parameters": LABELS})[0] == 422


def test_large_images_are_refused_before_they_are_decoded(handler, endpoint, monkeypatch):
    size = len(BYTES["panda"])
    monkeypatch.setattr(handler, "MAX_IMAGE_BYTES", size - 100)
    for form in (BYTES["panda"], "A" * (size * 2)):
        status, message = refused(handler, endpoint, {"inputs": form, "parameters": LABELS})
        assert status == 413 and "bytes" in message
    monkeypatch.setattr(handler, "MAX_IMAGE_BYTES", size)
    assert ask(endpoint, [P], **LABELS)[0][0]["label"] == "panda"  # as large as allowed, as base64 too
    monkeypatch.setattr(handler, "MAX_REQUEST_BYTES", 2 * size - 1)
    assert refused(handler, endpoint, {"inputs": [P, P], "parameters": LABELS})[0] == 413


def test_what_is_not_finite_is_no_answer(handler):
    for value in (math.nan, math.inf):
        with pytest.raises(RuntimeError, match="not finite"):
            handler.plain(torch.tensor([[0.0, value]]))


def test_at_its_limits_a_request_is_answered(handler, endpoint, monkeypatch):
    for name, limit in (("MAX_IMAGES", 3), ("MAX_TEXTS", 5), ("MAX_PAIRS", 4)):
        monkeypatch.setattr(handler, name, limit)
    assert len(ask(endpoint, [P] * 3, candidate_labels=["a"] * 5)) == 3
    assert len(ask(endpoint, {"images": [P, P], "texts": ["a", "b"]}, task="match")["scores"]) == 2
    for inputs, parameters in (
        ([P] * 4, {"candidate_labels": ["a"]}),
        (P, {"candidate_labels": ["a"] * 6}),
        ({"texts": ["a"] * 6}, {"task": "embed"}),
        ({"images": P, "texts": ["a"] * 5}, {"task": "rerank"}),
    ):
        assert refused(handler, endpoint, {"inputs": inputs, "parameters": parameters})[0] == 413
    long = Image.new("RGB", (handler.MAX_ASPECT * 10, 10))
    assert ask(endpoint, encoded(long), candidate_labels=["a"]) == [{"label": "a", "score": 1.0}]


def test_examples_of_the_docstring_are_answered(handler, endpoint):
    """Every {"inputs": ...} of the module's docstring is a request that works, with P an image."""
    examples = [line.strip() for line in handler.__doc__.splitlines() if line.strip().startswith('{"inputs": ')]
    assert len(examples) == len(handler.PARAMETERS)
    tasks = set()
    for example in examples:
        request = eval(example, {"P": P})
        tasks.add(request["parameters"].get("task", "zero-shot"))
        json.dumps(endpoint(request), allow_nan=False)
    assert tasks == set(handler.PARAMETERS)
