"""Serves the model on Hugging Face Inference Endpoints: JSON in, JSON out.

The endpoint's container imports this file, makes one `EndpointHandler` of the repository's folder and calls it with the
body of every request: {"inputs": ..., "parameters": {"task": ..., ...}}. `inputs` is a picture, a list of pictures, or
{"images": ..., "texts": ...}, of either one or a list. A picture is a base64 string, a data URL
("data:image/png;base64,..."), bytes or a PIL image, as the container makes of a body that is a picture itself.
Nothing is fetched and no file is read: a URL or a path is no picture. Of an animation the first frame is seen.

One example for each task; P stands for a picture:

* "zero-shot", the task if none is named: which label is it? As the Hub's clients ask, best first, per picture.
  `templates` (texts with `{}`; `hypothesis_template` for one), `mode` and `top_k` are optional; labels may also be
  one text, "panda, lion".
  {"inputs": P, "parameters": {"candidate_labels": ["panda", "lion"], "templates": ["a photo of a {}"], "top_k": 1}}
  -> [{"label": "panda", "score": 0.99}]; for a list of pictures a list of such lists
* "embed": embeddings of length 1, one for each picture and each text; `mode` is optional.
  {"inputs": {"images": [P], "texts": ["panda", "熊猫"]}, "parameters": {"task": "embed", "mode": "InternVL-G"}}
  -> {"image_embeds": [[...]], "text_embeds": [[...], [...]]}, what was not given is null
* "caption": `prompt`, `max_new_tokens` and `num_beams` are optional.
  {"inputs": [P], "parameters": {"task": "caption", "prompt": "English caption:", "max_new_tokens": 16}}
  -> [{"generated_text": "panda"}], one for each picture
* "match": how probable it is that the text fits the picture, all with all.
  {"inputs": {"images": P, "texts": ["panda", "lion"]}, "parameters": {"task": "match"}}
  -> {"scores": [[0.98, 0.01]]}, a row for each picture
* "rerank": orders the few best results of a search, texts for one picture or pictures for one text, by the logit of
  the cosine plus `match_weight` times the log-probability of a match. `mode`, `match_weight` and `top_k` are optional.
  {"inputs": {"images": P, "texts": ["lion", "panda"]}, "parameters": {"task": "rerank", "top_k": 1}}
  -> [{"index": 1, "score": 21.5, "cosine": 0.31, "match": 0.98}], best first; `index` counts what was given

A bad request raises `RequestError`, whose text names the argument and says what was expected. The container answers any
exception with status 400 and {"error": text}; a returned error would go out as a success. Servers that can do better
find the fitting status in `RequestError.status`: 400 for what cannot be read, 413 for too much, 422 for a wrong value.
"""

import base64
import binascii
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, AutoProcessor

MAX_IMAGES = 32
MAX_IMAGE_BYTES = 20_000_000
MAX_REQUEST_BYTES = 80_000_000  # of all pictures of a request, encoded as PNG, JPEG, ...
MAX_PIXELS = 50_000_000
MAX_ASPECT = 50  # the shorter side is resized to the model's, and a very narrow picture would grow without bound
MAX_TEXTS = 1024  # in zero-shot: labels times templates
MAX_TEXT_CHARACTERS = 2000
MAX_PAIRS = 256
MAX_NEW_TOKENS = 80
MAX_BEAMS = 8
MAX_PROMPT_TOKENS = 80
# Formats with many readers and no interpreter behind them; PIL would hand EPS to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# What their readers raise for damaged files: nearly always the first two, and whatever a format provokes.
DAMAGED = (
    OSError, ValueError, ArithmeticError, EOFError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError,
    struct.error, zlib.error,
)  # fmt: skip
MODES = ("InternVL-C", "InternVL-G")
MATCH_WEIGHT = 0.3  # what tools/evaluate_tiny.py re-ranks with
PARAMETERS = {
    "zero-shot": {"candidate_labels", "templates", "hypothesis_template", "mode", "top_k"},
    "embed": {"mode"},
    "caption": {"prompt", "max_new_tokens", "num_beams"},
    "match": set(),
    "rerank": {"mode", "match_weight", "top_k"},
}


class RequestError(ValueError):
    """What is wrong with a request.

    Attributes:
        status (`int`): the HTTP status that fits: 400, 413 or 422.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------------------------------------------- the request


def read_request(data: Any) -> tuple[str, list[Image.Image], list[str], dict[str, Any], bool]:
    """Task, pictures, texts and parameters of a request, and whether its pictures came as one, not as a list."""
    if not isinstance(data, dict) or "inputs" not in data:
        raise RequestError(400, 'A request must be an object with "inputs", and "parameters" if there are any.')
    parameters = {} if data.get("parameters") is None else data["parameters"]
    if not isinstance(parameters, dict):
        raise RequestError(400, f"`parameters` must be an object, got {type(parameters).__name__}.")
    task = one_of("task", parameters.get("task", "zero-shot"), tuple(PARAMETERS))
    unknown = sorted(set(map(str, parameters)) - PARAMETERS[task] - {"task"})
    if unknown:
        known = ", ".join(sorted(PARAMETERS[task])) or "none"
        raise RequestError(422, f"`parameters` of task {task!r} may be {known}, got {unknown[0][:40]!r}.")
    inputs = data["inputs"] if isinstance(data["inputs"], dict) else {"images": data["inputs"]}
    if set(inputs) - {"images", "texts"}:
        raise RequestError(422, "`inputs` may hold `images` and `texts`, and nothing else.")
    images, texts = inputs.get("images"), inputs.get("texts")
    return task, read_images(images), read_texts("texts", texts), parameters, not isinstance(images, (list, tuple))


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise RequestError(422, f"`{name}` must be one of {', '.join(choices)}, got {str(value)[:40]!r}.")
    return value


def integer(parameters: dict[str, Any], name: str, default: int | None, most: int) -> int | None:
    value = parameters.get(name, default)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
        raise RequestError(422, f"`{name}` must be an integer from 1 to {most}, got {str(value)[:40]!r}.")
    return value


def number(parameters: dict[str, Any], name: str, default: float, most: float) -> float:
    value = parameters.get(name, default)
    # NaN fails the comparison too.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise RequestError(422, f"`{name}` must be a number from 0 to {most}, got {str(value)[:40]!r}.")
    return float(value)


def read_texts(name: str, value: Any) -> list[str]:
    """A text or a list of texts; none is an empty list."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise RequestError(422, f"`{name}` must be a text or a list of texts.")
    if len(texts) > MAX_TEXTS:
        raise RequestError(413, f"`{name}` may hold {MAX_TEXTS} texts, got {len(texts)}.")
    for index, text in enumerate(texts):
        if not text.strip():
            raise RequestError(422, f"`{name}[{index}]` must hold some text.")
        if len(text) > MAX_TEXT_CHARACTERS:
            raise RequestError(413, f"`{name}[{index}]` may have {MAX_TEXT_CHARACTERS} characters, got {len(text)}.")
    return list(texts)


def read_labels(parameters: dict[str, Any]) -> list[str]:
    """A list of labels, or one text with commas between them, as the Hub's widget sends them."""
    given = parameters.get("candidate_labels")
    if isinstance(given, str):
        given = [label.strip() for label in given.split(",")]
    labels = read_texts("candidate_labels", given)
    if not labels:
        raise RequestError(422, '`candidate_labels` must be given for task "zero-shot", such as ["panda", "lion"].')
    return labels


def read_templates(parameters: dict[str, Any]) -> list[str]:
    if "templates" in parameters and "hypothesis_template" in parameters:
        raise RequestError(422, "`templates` and `hypothesis_template` are the same: give one of them.")
    given = parameters.get("templates", parameters.get("hypothesis_template"))
    templates = ["{}"] if given is None else read_texts("templates", given)
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise RequestError(422, "`templates` must be texts with one place for the label, {}, and at least one text.")
    return templates


# ----------------------------------------------------------------------------------------------------- pictures


def read_images(value: Any) -> list[Image.Image]:
    """A picture or a list of pictures, decoded; none is an empty list."""
    items = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    if len(items) > MAX_IMAGES:
        raise RequestError(413, f"`images` may hold {MAX_IMAGES} pictures, got {len(items)}.")
    items = [encoded_picture(item, f"images[{index}]") for index, item in enumerate(items)]
    total = sum(len(item) for item in items if isinstance(item, bytes))
    if total > MAX_REQUEST_BYTES:
        raise RequestError(413, f"`images` may have {MAX_REQUEST_BYTES} bytes together, got {total}.")
    return [decoded_picture(item, f"images[{index}]") for index, item in enumerate(items)]


def encoded_picture(item: Any, name: str) -> bytes | Image.Image:
    """The bytes of a picture's file; a PIL image stays one."""
    if isinstance(item, Image.Image):
        return item
    if not isinstance(item, (str, bytes)):
        raise RequestError(422, f"`{name}` must be a base64 string, a data URL, bytes or a PIL image.")
    # Four characters of base64 are three bytes; a data URL has some more in front.
    if len(item) > (MAX_IMAGE_BYTES if isinstance(item, bytes) else MAX_IMAGE_BYTES * 4 // 3 + 100):
        raise RequestError(413, f"`{name}` may have {MAX_IMAGE_BYTES} bytes.")
    return item if isinstance(item, bytes) else from_base64(item, name)


def from_base64(text: str, name: str) -> bytes:
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
            raise RequestError(400, f"`{name}` must start with data:image/...;base64, if it is a data URL.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        hint = 'URLs are not fetched, files are not read, and texts go into {"inputs": {"texts": ...}}.'
        raise RequestError(400, f"`{name}` is no base64 of a picture. {hint}") from None


def decoded_picture(item: bytes | Image.Image, name: str) -> Image.Image:
    if isinstance(item, Image.Image):
        check_size(item, name)
        return item
    try:
        picture = Image.open(io.BytesIO(item), formats=FORMATS)  # reads the header, no pixels yet
    except Image.DecompressionBombError:
        raise RequestError(413, f"`{name}` may have {MAX_PIXELS} pixels.") from None
    except DAMAGED:
        raise RequestError(422, f"`{name}` is none of {', '.join(FORMATS)}.") from None
    check_size(picture, name)
    try:
        picture.load()
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise RequestError(422, f"`{name}` cannot be decoded: {type(error).__name__}.") from None
    return picture


def check_size(picture: Image.Image, name: str) -> None:
    short, long = sorted(picture.size)
    if short == 0 or long > MAX_ASPECT * short:
        raise RequestError(422, f"`{name}` may be {MAX_ASPECT} times as long as wide, got {picture.size}.")
    if short * long > MAX_PIXELS:
        raise RequestError(413, f"`{name}` may have {MAX_PIXELS} pixels, got {short * long}.")


# ------------------------------------------------------------------------------------------------------ answers


def plain(tensor: torch.Tensor) -> list:
    """Lists of floats, which JSON has no NaN or infinity among."""
    if not bool(tensor.isfinite().all()):
        raise RuntimeError("The model gave a value that is not finite.")
    return tensor.float().tolist()


def require(images: list[Image.Image], texts: list[str], task: str, image: bool, text: bool) -> None:
    """Refuse a request that lacks what its task reads, or has what it would leave unread."""
    for name, given, wanted in (("images", images, image), ("texts", texts, text)):
        if bool(given) != wanted:
            raise RequestError(422, f"`{name}` must be {'given' if wanted else 'left out'} for task {task!r}.")


class EndpointHandler:
    """
    Answers requests; the module's docstring says which. Nothing is kept between them, so threads may share it.

    Args:
        path (`str`): folder of the repository, with weights at its root; this file's own if not given. A GPU is used
            if there is one, several if one is too small.
    """

    def __init__(self, path: str = ""):
        folder = path or str(Path(__file__).resolve().parent)
        # Whoever runs this file has trusted the repository, and the model's code lies beside it.
        options: dict[str, Any] = {"trust_remote_code": True}
        placed = {"device_map": "auto"} if torch.cuda.is_available() else {}
        self.model = AutoModel.from_pretrained(folder, dtype="auto", **options, **placed).eval()
        self.processor = AutoProcessor.from_pretrained(folder, **options)
        self.model.check_processor(self.processor)
        self.tasks: dict[str, Callable] = {
            "zero-shot": self.zero_shot,
            "embed": self.embed,
            "caption": self.caption,
            "match": self.match,
            "rerank": self.rerank,
        }

    def __call__(self, data: dict[str, Any]) -> Any:
        """
        Args:
            data (`dict`): a request; it is not changed.

        Returns:
            lists, dicts, strings and finite floats, as the module's docstring shows for each task.

        Raises:
            `RequestError`: something is wrong with the request; `status` says what kind of thing.
        """
        task, images, texts, parameters, is_one = read_request(data)
        with torch.inference_mode():
            answer: Any = self.tasks[task](images, texts, parameters)
        return answer[0] if task == "zero-shot" and is_one else answer

    def zero_shot(self, images: list[Image.Image], texts: list[str], parameters: dict[str, Any]) -> list[list[dict]]:
        require(images, texts, "zero-shot", image=True, text=False)
        labels = read_labels(parameters)
        templates = read_templates(parameters)
        if len(labels) * len(templates) > MAX_TEXTS:
            count = len(labels) * len(templates)
            raise RequestError(413, f"`candidate_labels` times `templates` may be {MAX_TEXTS} texts, got {count}.")
        top_k = integer(parameters, "top_k", None, MAX_TEXTS)
        mode = one_of("mode", parameters.get("mode", MODES[0]), MODES)
        embeds = self.text_embeds([template.replace("{}", label) for label in labels for template in templates])
        classes = F.normalize(embeds.unflatten(0, (len(labels), len(templates))).mean(dim=1), dim=-1)
        cosines = self.image_embeds(self.pixels(images), mode) @ classes.T  # [pictures, labels]
        rows = plain((self.model.logit_scale.float().exp() * cosines).softmax(-1))
        answers = [[{"label": label, "score": score} for label, score in zip(labels, row)] for row in rows]
        return [sorted(answer, key=lambda entry: -entry["score"])[:top_k] for answer in answers]

    def embed(self, images: list[Image.Image], texts: list[str], parameters: dict[str, Any]) -> dict[str, Any]:
        if not images and not texts:
            raise RequestError(422, "`inputs` must hold `images`, `texts` or both for task 'embed'.")
        mode = one_of("mode", parameters.get("mode", MODES[0]), MODES)
        seen = plain(self.image_embeds(self.pixels(images), mode)) if images else None
        return {"image_embeds": seen, "text_embeds": plain(self.text_embeds(texts)) if texts else None}

    def caption(self, images: list[Image.Image], texts: list[str], parameters: dict[str, Any]) -> list[dict]:
        require(images, texts, "caption", image=True, text=False)
        prompts = read_texts("prompt", parameters.get("prompt")) or ["English caption:"]
        if len(prompts) != 1:
            raise RequestError(422, f"`prompt` must be one text, got {len(prompts)}.")
        options = {
            "max_new_tokens": integer(parameters, "max_new_tokens", 32, MAX_NEW_TOKENS),
            "num_beams": integer(parameters, "num_beams", 1, MAX_BEAMS),
        }
        prompt = self.tokens(prompts, task="caption", max_length=MAX_PROMPT_TOKENS)
        ids = self.model.generate(self.pixels(images), **prompt, **options)
        return [{"generated_text": text.strip()} for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

    def match(self, images: list[Image.Image], texts: list[str], parameters: dict[str, Any]) -> dict[str, Any]:
        self.check_pairs(images, texts, "match")
        logits = self.model.match(self.pixels(images), **self.tokens(texts, task="match"), all_pairs=True)
        return {"scores": plain(logits.float().softmax(-1)[..., 1])}

    def rerank(self, images: list[Image.Image], texts: list[str], parameters: dict[str, Any]) -> list[dict]:
        self.check_pairs(images, texts, "rerank")
        if min(len(images), len(texts)) != 1:
            counts = f"{len(images)} pictures and {len(texts)} texts"
            raise RequestError(422, f"`inputs` must be one picture with texts or one text with pictures, got {counts}.")
        mode = one_of("mode", parameters.get("mode", MODES[1]), MODES)
        weight = number(parameters, "match_weight", MATCH_WEIGHT, 100)
        top_k = integer(parameters, "top_k", None, MAX_PAIRS)
        seen = self.model.look_at(self.pixels(images))
        cosines = (self.image_embeds(seen, mode) @ self.text_embeds(texts).T).flatten()  # one side is one
        matches = self.model.match(seen, **self.tokens(texts, task="match"), all_pairs=True)
        matches = matches.float().log_softmax(-1)[..., 1].flatten()
        scores = self.model.logit_scale.float().exp() * cosines + weight * matches
        columns = zip(plain(scores), plain(cosines), plain(matches.exp()))
        names = ("index", "score", "cosine", "match")
        entries = [dict(zip(names, (index, *values))) for index, values in enumerate(columns)]
        return sorted(entries, key=lambda entry: -entry["score"])[:top_k]

    def check_pairs(self, images: list[Image.Image], texts: list[str], task: str) -> None:
        require(images, texts, task, image=True, text=True)
        if len(images) * len(texts) > MAX_PAIRS:
            raise RequestError(413, f"`images` times `texts` may be {MAX_PAIRS}, got {len(images) * len(texts)}.")

    def pixels(self, images: list[Image.Image]) -> torch.Tensor:
        """[pictures, 3, H, W]"""
        try:
            return self.processor(images=images).pixel_values.to(self.model.device)
        except (TypeError, ValueError) as error:
            raise RequestError(422, str(error)) from error

    def tokens(self, texts: list[str], **options: Any) -> Any:
        """The processor's ids and mask. A text that is too long for the model is refused, not cut."""
        try:
            batch = self.processor(text=texts, truncation=False, **options)
        except (TypeError, ValueError) as error:
            raise RequestError(422, str(error)) from error
        return batch if options.get("return_tensors", "pt") is None else batch.to(self.model.device)

    def image_embeds(self, pixels: Any, mode: str) -> torch.Tensor:
        """[pictures, clip_embed_dim], of length 1 in float32: in the model's half precision it would be nearly 1."""
        return F.normalize(self.model.embed_image(pixels, mode=mode, normalize=False).float(), dim=-1)

    def text_embeds(self, texts: list[str]) -> torch.Tensor:
        """[texts, clip_embed_dim], of length 1 in float32"""
        ids = self.tokens(texts, task="embed", padding=False, return_tensors=None).input_ids
        return F.normalize(self.model.embed_texts(ids, normalize=False).float(), dim=-1)
