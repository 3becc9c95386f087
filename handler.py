"""Serves the model on Hugging Face Inference Endpoints: JSON in, JSON out.

The endpoint's container imports this file, makes one `EndpointHandler` of the repository's folder and calls it with the
body of every request: {"inputs": ..., "parameters": {"task": ..., ...}}. `inputs` is an image, a list of images, or
{"images": ..., "texts": ...}, each one or a list. An image is a base64 string, a data URL
("data:image/png;base64,..."), bytes or a PIL image, which the container makes of a body that is itself an image.
Nothing is fetched and no file is read: a URL or a path is not an image. Of an animation, the first frame is used.

One example for each task; P stands for an image:

* "zero-shot", the default task: which label fits? Answers as the Hub's clients expect, best first, for each image.
  `templates` (texts with `{}`; `hypothesis_template` for one), `mode` and `top_k` are optional; labels may also be
  one text, "panda, lion".
  {"inputs": P, "parameters": {"candidate_labels": ["panda", "lion"], "templates": ["a photo of a {}"], "top_k": 1}}
  -> [{"label": "panda", "score": 0.99}]; for a list of images, a list of such lists
* "embed": embeddings of length 1, one for each image and each text; `mode` is optional.
  {"inputs": {"images": [P], "texts": ["panda", "熊猫"]}, "parameters": {"task": "embed", "mode": "InternVL-G"}}
  -> {"image_embeds": [[...]], "text_embeds": [[...], [...]]}; null for what was not given
* "caption": `prompt`, `max_new_tokens` and `num_beams` are optional.
  {"inputs": [P], "parameters": {"task": "caption", "prompt": "English caption:", "max_new_tokens": 16}}
  -> [{"generated_text": "panda"}], one for each image
* "match": the probability that the text fits the image, for all pairs.
  {"inputs": {"images": P, "texts": ["panda", "lion"]}, "parameters": {"task": "match"}}
  -> {"scores": [[0.98, 0.01]]}, a row for each image
* "rerank": orders the few best results of a search, texts for one image or images for one text, by the logit of the
  cosine plus `match_weight` times the log-probability of a match. `mode`, `match_weight` and `top_k` are optional.
  {"inputs": {"images": P, "texts": ["lion", "panda"]}, "parameters": {"task": "rerank", "top_k": 1}}
  -> [{"index": 1, "score": 21.5, "cosine": 0.31, "match": 0.98}], best first; `index` counts the inputs from 0

A bad request raises `RequestError`, whose text names the argument and what was expected. The container answers any
exception with status 400 and {"error": text}; it would send a returned error as a success. Servers that choose their
own status find it in `RequestError.status`: 400 for what cannot be read, 413 for too much, 422 for a wrong value.

This file imports no other file of the repository: the newer container (hf-serve) imports it without its folder on
sys.path. So it decodes images itself.
"""

import base64
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
MAX_REQUEST_BYTES = 80_000_000  # all images of a request, encoded as PNG, JPEG, ...
MAX_PIXELS = 50_000_000
MAX_ASPECT = 50  # the processor resizes the shorter side: a very narrow image would grow without bound
MAX_TEXTS = 1024  # in zero-shot: labels times templates
MAX_TEXT_CHARACTERS = 2000
MAX_PAIRS = 256
MAX_NEW_TOKENS = 80
MAX_BEAMS = 8
MAX_PROMPT_TOKENS = 80
# Formats with many readers and no interpreter behind them; PIL would hand EPS to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# What PIL raises for damaged files: nearly always the first two, and whatever a format's reader provokes.
DAMAGED = (
    OSError, ValueError, ArithmeticError, EOFError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
MODES = ("InternVL-C", "InternVL-G")
MATCH_WEIGHT = 0.3  # what tools/tiny/evaluate_tiny.py re-ranks with
PARAMETERS = {
    "zero-shot": {"candidate_labels", "templates", "hypothesis_template", "mode", "top_k"},
    "embed": {"mode"},
    "caption": {"prompt", "max_new_tokens", "num_beams"},
    "match": set(),
    "rerank": {"mode", "match_weight", "top_k"},
}


class RequestError(ValueError):
    """A request that cannot be answered; the message says why.

    Attributes:
        status (`int`): the HTTP status to answer with: 400, 413 or 422.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------------------------------------------- the request


def read_request(data: Any) -> tuple[str, list[Image.Image], list[str], dict[str, Any], bool]:
    """The task, images, texts and parameters of a request, and whether its images were not in a list."""
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
        raise RequestError(422, "`inputs` may hold only `images` and `texts`.")
    images, texts = inputs.get("images"), inputs.get("texts")
    return task, read_images(images), read_texts("texts", texts), parameters, not isinstance(images, (list, tuple))


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
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
    """A text or a list of texts as a list; None becomes an empty list."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise RequestError(422, f"`{name}` must be a text or a list of texts.")
    if len(texts) > MAX_TEXTS:
        raise RequestError(413, f"`{name}` may hold at most {MAX_TEXTS} texts, got {len(texts)}.")
    for index, text in enumerate(texts):
        if not text.strip():
            raise RequestError(422, f"`{name}[{index}]` must hold some text.")
        if len(text) > MAX_TEXT_CHARACTERS:
            limit = f"at most {MAX_TEXT_CHARACTERS} characters"
            raise RequestError(413, f"`{name}[{index}]` may have {limit}, got {len(text)}.")
    return list(texts)


def read_labels(parameters: dict[str, Any]) -> list[str]:
    """A list of labels, or one text with commas between them, which the Hub's widget sends."""
    given = parameters.get("candidate_labels")
    if isinstance(given, str):
        given = [label.strip() for label in given.split(",")]
    labels = read_texts("candidate_labels", given)
    if not labels:
        raise RequestError(422, '`candidate_labels` must be given for task "zero-shot", such as ["panda", "lion"].')
    return labels


def read_templates(parameters: dict[str, Any]) -> list[str]:
    if "templates" in parameters and "hypothesis_template" in parameters:
        raise RequestError(422, "`templates` and `hypothesis_template` are the same: give only one.")
    given = parameters.get("templates", parameters.get("hypothesis_template"))
    templates = ["{}"] if given is None else read_texts("templates", given)
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise RequestError(422, "`templates` must be one or more texts, each with {} once, where the label goes.")
    return templates


# ------------------------------------------------------------------------------------------------------- images


def read_images(value: Any) -> list[Image.Image]:
    """An image or a list of images as a list, decoded; None becomes an empty list."""
    items = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    if len(items) > MAX_IMAGES:
        raise RequestError(413, f"`images` may hold at most {MAX_IMAGES} images, got {len(items)}.")
    items = [encoded_image(item, f"images[{index}]") for index, item in enumerate(items)]
    total = sum(len(item) for item in items if isinstance(item, bytes))
    if total > MAX_REQUEST_BYTES:
        raise RequestError(413, f"`images` may have at most {MAX_REQUEST_BYTES} bytes together, got {total}.")
    return [decoded_image(item, f"images[{index}]") for index, item in enumerate(items)]


def encoded_image(item: Any, name: str) -> bytes | Image.Image:
    """The bytes of an image file; a PIL image stays one."""
    if isinstance(item, Image.Image):
        return item
    if not isinstance(item, (str, bytes)):
        raise RequestError(422, f"`{name}` must be a base64 string, a data URL, bytes or a PIL image.")
    # Four characters of base64 are three bytes; a data URL has some more in front.
    if len(item) > (MAX_IMAGE_BYTES if isinstance(item, bytes) else MAX_IMAGE_BYTES * 4 // 3 + 100):
        raise RequestError(413, f"`{name}` may have at most {MAX_IMAGE_BYTES} bytes.")
    return item if isinstance(item, bytes) else from_base64(item, name)


def from_base64(text: str, name: str) -> bytes:
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
            raise RequestError(400, f"`{name}` must start with data:image/TYPE;base64, to be a data URL.")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        hint = 'URLs are not fetched, files are not read, and texts go into {"inputs": {"texts": ...}}.'
        raise RequestError(400, f"`{name}` is not base64 of an image. {hint}") from None


def decoded_image(item: bytes | Image.Image, name: str) -> Image.Image:
    if isinstance(item, Image.Image):
        check_size(item, name)
        return item
    try:
        image = Image.open(io.BytesIO(item), formats=FORMATS)  # reads the header, no pixels yet
    except Image.DecompressionBombError:
        raise RequestError(413, f"`{name}` may have at most {MAX_PIXELS} pixels.") from None
    except DAMAGED:
        raise RequestError(422, f"`{name}` is none of {', '.join(FORMATS)}.") from None
    check_size(image, name)
    try:
        image.load()
    except DAMAGED as error:
        raise RequestError(422, f"`{name}` cannot be decoded: {type(error).__name__}.") from None
    return image


def check_size(image: Image.Image, name: str) -> None:
    short, long = sorted(image.size)
    if short == 0 or long > MAX_ASPECT * short:
        size = f"{image.width} x {image.height}"
        raise RequestError(422, f"`{name}` may be at most {MAX_ASPECT} times as long as wide, got {size}.")
    if short * long > MAX_PIXELS:
        raise RequestError(413, f"`{name}` may have at most {MAX_PIXELS} pixels, got {short * long}.")


# ------------------------------------------------------------------------------------------------------ answers


def plain(tensor: torch.Tensor) -> list[Any]:
    """Lists of finite floats: JSON has no NaN and no infinity."""
    if not bool(tensor.isfinite().all()):
        raise RuntimeError("The model returned a value that is not finite.")
    return tensor.float().tolist()


def require(images: list[Image.Image], texts: list[str], task: str, image: bool, text: bool) -> None:
    """Refuse a request without the inputs that its task reads, or with others."""
    for name, given, wanted in (("images", images, image), ("texts", texts, text)):
        if bool(given) != wanted:
            raise RequestError(422, f"`{name}` must be {'given' if wanted else 'left out'} for task {task!r}.")


class EndpointHandler:
    """Answers requests; the module's docstring lists them. It keeps nothing between requests: threads may share it.

    Args:
        path (`str`): folder of the repository, with weights at its root; defaults to this file's own. The model is
            placed on a GPU if there is one, and on several if one is too small.
    """

    def __init__(self, path: str = ""):
        folder = path or str(Path(__file__).resolve().parent)
        # Whoever runs this file trusts the repository, and the model's code is beside it.
        options: dict[str, Any] = {"trust_remote_code": True}
        placed = {"device_map": "auto"} if torch.cuda.is_available() else {}
        self.model = AutoModel.from_pretrained(folder, dtype="auto", **options, **placed).eval()
        self.processor = AutoProcessor.from_pretrained(folder, **options)
        self.model.check_processor(self.processor)
        self.tasks: dict[str, Callable[..., Any]] = {
            "zero-shot": self.zero_shot,
            "embed": self.embed,
            "caption": self.caption,
            "match": self.match,
            "rerank": self.rerank,
        }

    def __call__(self, data: dict[str, Any]) -> Any:
        """Answer one request.

        Args:
            data (`dict`): a request; it is not changed.

        Returns:
            lists, dicts, strings and finite floats, as the module's docstring shows for each task.

        Raises:
            RequestError: the request is wrong; `status` says how.
        """
        task, images, texts, parameters, is_one = read_request(data)
        with torch.inference_mode():
            answer: Any = self.tasks[task](images, texts, parameters)
        return answer[0] if task == "zero-shot" and is_one else answer

    def zero_shot(
        self, images: list[Image.Image], texts: list[str], parameters: dict[str, Any]
    ) -> list[list[dict[str, Any]]]:
        require(images, texts, "zero-shot", image=True, text=False)
        labels = read_labels(parameters)
        templates = read_templates(parameters)
        count = len(labels) * len(templates)
        if count > MAX_TEXTS:
            raise RequestError(413, f"`candidate_labels` times `templates` may be at most {MAX_TEXTS}, got {count}.")
        top_k = integer(parameters, "top_k", None, MAX_TEXTS)
        mode = one_of("mode", parameters.get("mode", MODES[0]), MODES)
        embeds = self.text_embeds([template.replace("{}", label) for label in labels for template in templates])
        classes = F.normalize(embeds.unflatten(0, (len(labels), len(templates))).mean(dim=1), dim=-1)
        cosines = self.image_embeds(self.pixels(images), mode) @ classes.T  # [I, labels]
        rows = plain((self.model.logit_scale.float().exp() * cosines).softmax(-1))
        answers = [[{"label": label, "score": score} for label, score in zip(labels, row)] for row in rows]
        return [sorted(answer, key=lambda entry: -entry["score"])[:top_k] for answer in answers]

    def embed(self, images: list[Image.Image], texts: list[str], parameters: dict[str, Any]) -> dict[str, Any]:
        if not images and not texts:
            raise RequestError(422, "`inputs` must hold `images`, `texts` or both for task 'embed'.")
        mode = one_of("mode", parameters.get("mode", MODES[0]), MODES)
        seen = plain(self.image_embeds(self.pixels(images), mode)) if images else None
        return {"image_embeds": seen, "text_embeds": plain(self.text_embeds(texts)) if texts else None}

    def caption(self, images: list[Image.Image], texts: list[str], parameters: dict[str, Any]) -> list[dict[str, Any]]:
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

    def rerank(self, images: list[Image.Image], texts: list[str], parameters: dict[str, Any]) -> list[dict[str, Any]]:
        self.check_pairs(images, texts, "rerank")
        if min(len(images), len(texts)) != 1:
            counts = f"{len(images)} images and {len(texts)} texts"
            raise RequestError(422, f"`inputs` must be one image with texts or one text with images, got {counts}.")
        mode = one_of("mode", parameters.get("mode", MODES[1]), MODES)
        weight = number(parameters, "match_weight", MATCH_WEIGHT, 100)
        top_k = integer(parameters, "top_k", None, MAX_PAIRS)
        seen = self.model.look_at(self.pixels(images))
        cosines = (self.image_embeds(seen, mode) @ self.text_embeds(texts).T).flatten()  # [I * T], one of them 1
        matches = self.model.match(seen, **self.tokens(texts, task="match"), all_pairs=True)
        matches = matches.float().log_softmax(-1)[..., 1].flatten()
        scores = self.model.logit_scale.float().exp() * cosines + weight * matches
        columns = zip(plain(scores), plain(cosines), plain(matches.exp()))
        names = ("index", "score", "cosine", "match")
        entries = [dict(zip(names, (index, *values))) for index, values in enumerate(columns)]
        return sorted(entries, key=lambda entry: -entry["score"])[:top_k]

    def check_pairs(self, images: list[Image.Image], texts: list[str], task: str) -> None:
        require(images, texts, task, image=True, text=True)
        count = len(images) * len(texts)
        if count > MAX_PAIRS:
            raise RequestError(413, f"`images` times `texts` may be at most {MAX_PAIRS}, got {count}.")

    def pixels(self, images: list[Image.Image]) -> torch.Tensor:
        """The processor's pixels [I, 3, H, W], on the model's device."""
        try:
            return self.processor(images=images).pixel_values.to(self.model.device)
        except (TypeError, ValueError) as error:
            raise RequestError(422, str(error)) from error

    def tokens(self, texts: list[str], **options: Any) -> Any:
        """The processor's ids and mask, on the model's device. A text that is too long is refused, not cut."""
        try:
            return self.processor(text=texts, truncation=False, **options).to(self.model.device)
        except (TypeError, ValueError) as error:
            raise RequestError(422, str(error)) from error

    def image_embeds(self, pixels: Any, mode: str) -> torch.Tensor:
        """[I, clip_embed_dim], normalised in float32: in the model's half precision, lengths are only nearly 1."""
        return F.normalize(self.model.embed_image(pixels, mode=mode, normalize=False).float(), dim=-1)

    def text_embeds(self, texts: list[str]) -> torch.Tensor:
        """[T, clip_embed_dim], normalised in float32."""
        ids = self.tokens(texts, task="embed", padding=False, return_tensors=None).input_ids
        return F.normalize(self.model.embed_texts(ids, normalize=False).float(), dim=-1)
