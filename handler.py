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
# Common raster formats only: PIL would pass EPS to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# What PIL raises for damaged files: nearly always the first two, and whatever else a format's reader provokes.
DAMAGED = (
    OSError, ValueError, ArithmeticError, EOFError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
MODES = ("InternVL-C", "InternVL-G")
DEFAULT_PROMPT = "English caption:"
MATCH_WEIGHT = 0.3  # as in tools/tiny/evaluate_tiny.py
PARAMETERS = {
    "zero-shot": {"candidate_labels", "templates", "hypothesis_template", "mode", "top_k"},
    "embed": {"mode"},
    "caption": {"prompt", "max_new_tokens", "num_beams"},
    "match": set(),
    "rerank": {"mode", "match_weight", "top_k"},
}


class RequestError(ValueError):
    """A request that cannot be answered. The message says why; `status` is the HTTP status: 400, 413 or 422."""

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
    if unknown := sorted(set(map(str, parameters)) - PARAMETERS[task] - {"task"}):
        known = ", ".join(sorted(PARAMETERS[task])) or "none"
        raise RequestError(422, f"`parameters` of task {task!r} may be {known}, got {unknown[0][:40]!r}.")
    inputs = data["inputs"] if isinstance(data["inputs"], dict) else {"images": data["inputs"]}
    if set(inputs) - {"images", "texts"}:
        raise RequestError(422, "`inputs` may hold only `images` and `texts`.")
    images, texts = read_images(inputs.get("images")), read_texts("texts", inputs.get("texts"))
    check_inputs(task, images, texts)
    return task, images, texts, parameters, not isinstance(inputs.get("images"), (list, tuple))


def check_inputs(task: str, images: list[Image.Image], texts: list[str]) -> None:
    """Require the inputs that a task reads, no others, and not too many pairs."""
    if task == "embed":
        if not images and not texts:
            raise RequestError(422, "`inputs` must hold `images`, `texts` or both for task 'embed'.")
        return
    reads_pairs = task in ("match", "rerank")
    for name, given, wanted in (("images", images, True), ("texts", texts, reads_pairs)):
        if bool(given) != wanted:
            raise RequestError(422, f"`{name}` must be {'given' if wanted else 'left out'} for task {task!r}.")
    if (count := len(images) * len(texts)) > MAX_PAIRS:
        raise RequestError(413, f"`images` times `texts` may be at most {MAX_PAIRS}, got {count}.")


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """The value, if it is one of the choices."""
    if value not in choices:
        raise RequestError(422, f"`{name}` must be one of {', '.join(choices)}, got {str(value)[:40]!r}.")
    return value


def number(parameters: dict[str, Any], name: str, default: Any, least: int, most: int, whole: bool = True) -> Any:
    """A parameter from `least` to `most`, an integer if `whole`; the default if it is null or missing."""
    value = parameters.get(name)
    if value is None:
        return default
    # `type`, because a bool is an instance of int. NaN is in no range.
    if type(value) not in ((int,) if whole else (int, float)) or not least <= value <= most:
        kind = "an integer" if whole else "a number"
        raise RequestError(422, f"`{name}` must be {kind} from {least} to {most}, got {str(value)[:40]!r}.")
    return value


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
    """The templates under either of their two names."""
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
    if (total := sum(len(item) for item in items if isinstance(item, bytes))) > MAX_REQUEST_BYTES:
        raise RequestError(413, f"`images` may have at most {MAX_REQUEST_BYTES} bytes together, got {total}.")
    return [decoded_image(item, f"images[{index}]") for index, item in enumerate(items)]


def encoded_image(item: Any, name: str) -> bytes | Image.Image:
    """The bytes of an image file, from base64 or a data URL if need be; a PIL image stays one."""
    if not isinstance(item, (str, bytes, Image.Image)):
        raise RequestError(422, f"`{name}` must be a base64 string, a data URL, bytes or a PIL image.")
    # Four characters of base64 are three bytes; a data URL has some more in front.
    limit = MAX_IMAGE_BYTES * 4 // 3 + 100 if isinstance(item, str) else MAX_IMAGE_BYTES
    if not isinstance(item, Image.Image) and len(item) > limit:
        raise RequestError(413, f"`{name}` may have at most {MAX_IMAGE_BYTES} bytes.")
    if not isinstance(item, str):
        return item
    head, comma, text = item.partition(",") if item.startswith("data:") else ("", "", item)
    if head and not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise RequestError(400, f"`{name}` must start with data:image/TYPE;base64, to be a data URL.")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        hint = 'URLs are not fetched, files are not read, and texts go into {"inputs": {"texts": ...}}.'
        raise RequestError(400, f"`{name}` is not base64 of an image. {hint}") from None


def decoded_image(item: bytes | Image.Image, name: str) -> Image.Image:
    """Decode an image whose header gives a valid size."""
    try:  # reads the header, no pixels yet
        image = item if isinstance(item, Image.Image) else Image.open(io.BytesIO(item), formats=FORMATS)
    except Image.DecompressionBombError:
        raise RequestError(413, f"`{name}` may have at most {MAX_PIXELS} pixels.") from None
    except DAMAGED:
        raise RequestError(422, f"`{name}` is none of {', '.join(FORMATS)}.") from None
    short, long = sorted(image.size)
    if short == 0 or long > MAX_ASPECT * short:
        size = f"{image.width} x {image.height}"
        raise RequestError(422, f"`{name}` may be at most {MAX_ASPECT} times as long as wide, got {size}.")
    if short * long > MAX_PIXELS:
        raise RequestError(413, f"`{name}` may have at most {MAX_PIXELS} pixels, got {short * long}.")
    try:
        image.load()
    except DAMAGED as error:
        raise RequestError(422, f"`{name}` cannot be decoded: {type(error).__name__}.") from None
    return image


# ------------------------------------------------------------------------------------------------------ answers


def plain(tensor: torch.Tensor) -> list[Any]:
    """Lists of finite floats: JSON has no NaN and no infinity."""
    if not bool(tensor.isfinite().all()):
        raise RuntimeError("The model returned a value that is not finite.")
    return tensor.float().tolist()


class EndpointHandler:
    """Answers requests; the module's docstring lists them. It keeps nothing between requests: threads may share it.

    Args:
        path (`str`): folder of the repository, with weights at its root; defaults to this file's own. The model is
            placed on a GPU if there is one, and on several if one is too small.
    """

    def __init__(self, path: str = ""):
        folder = path or str(Path(__file__).resolve().parent)
        placed = {"device_map": "auto"} if torch.cuda.is_available() else {}
        # Whoever runs this file trusts the repository, and the model's code is beside it.
        self.model = AutoModel.from_pretrained(folder, dtype="auto", trust_remote_code=True, **placed)
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        self.model.check_processor(self.processor)

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
            answer = getattr(self, task.replace("-", "_"))(images, texts, parameters)
        return answer[0] if task == "zero-shot" and is_one else answer

    def zero_shot(self, images: list[Image.Image], texts: list[str], parameters: dict[str, Any]) -> list[Any]:
        labels, templates = read_labels(parameters), read_templates(parameters)
        if (count := len(labels) * len(templates)) > MAX_TEXTS:
            raise RequestError(413, f"`candidate_labels` times `templates` may be at most {MAX_TEXTS}, got {count}.")
        top_k = number(parameters, "top_k", None, 1, MAX_TEXTS)
        mode = one_of("mode", parameters.get("mode", MODES[0]), MODES)
        embeds = self.text_embeds([template.replace("{}", label) for label in labels for template in templates])
        classes = F.normalize(embeds.unflatten(0, (len(labels), len(templates))).mean(dim=1), dim=-1)
        cosines = self.image_embeds(self.inputs(images=images).pixel_values, mode) @ classes.T  # [I, labels]
        rows = plain((self.model.logit_scale.float().exp() * cosines).softmax(-1))
        answers = [[{"label": label, "score": score} for label, score in zip(labels, row)] for row in rows]
        return [sorted(answer, key=lambda entry: -entry["score"])[:top_k] for answer in answers]

    def embed(self, images: list[Image.Image], texts: list[str], parameters: dict[str, Any]) -> dict[str, Any]:
        mode = one_of("mode", parameters.get("mode", MODES[0]), MODES)
        seen = plain(self.image_embeds(self.inputs(images=images).pixel_values, mode)) if images else None
        return {"image_embeds": seen, "text_embeds": plain(self.text_embeds(texts)) if texts else None}

    def caption(self, images: list[Image.Image], texts: list[str], parameters: dict[str, Any]) -> list[dict[str, Any]]:
        prompts = read_texts("prompt", parameters.get("prompt")) or [DEFAULT_PROMPT]
        if len(prompts) != 1:
            raise RequestError(422, f"`prompt` must be one text, got {len(prompts)}.")
        options = {
            "max_new_tokens": number(parameters, "max_new_tokens", 32, 1, MAX_NEW_TOKENS),
            "num_beams": number(parameters, "num_beams", 1, 1, MAX_BEAMS),
        }
        inputs = self.inputs(images=images, text=prompts[0], task="caption", max_length=MAX_PROMPT_TOKENS)
        texts = self.processor.batch_decode(self.model.generate(**inputs, **options), skip_special_tokens=True)
        return [{"generated_text": text.strip()} for text in texts]

    def match(self, images: list[Image.Image], texts: list[str], parameters: dict[str, Any]) -> dict[str, Any]:
        logits = self.model.match(**self.inputs(images=images, text=texts, task="match"), all_pairs=True)
        return {"scores": plain(logits.float().softmax(-1)[..., 1])}

    def rerank(self, images: list[Image.Image], texts: list[str], parameters: dict[str, Any]) -> list[dict[str, Any]]:
        if min(len(images), len(texts)) != 1:
            counts = f"{len(images)} images and {len(texts)} texts"
            raise RequestError(422, f"`inputs` must be one image with texts or one text with images, got {counts}.")
        mode = one_of("mode", parameters.get("mode", MODES[1]), MODES)
        weight = number(parameters, "match_weight", MATCH_WEIGHT, 0, 100, whole=False)
        top_k = number(parameters, "top_k", None, 1, MAX_PAIRS)
        inputs = self.inputs(images=images, text=texts, task="match")
        seen = self.model.look_at(inputs.pop("pixel_values"))
        cosines = (self.image_embeds(seen, mode) @ self.text_embeds(texts).T).flatten()  # [I * T], one of them 1
        matches = self.model.match(seen, **inputs, all_pairs=True).float().log_softmax(-1)[..., 1].flatten()
        scores = self.model.logit_scale.float().exp() * cosines + weight * matches
        rows = enumerate(plain(torch.stack([scores, cosines, matches.exp()], dim=1)))
        entries = [{"index": index, "score": row[0], "cosine": row[1], "match": row[2]} for index, row in rows]
        return sorted(entries, key=lambda entry: -entry["score"])[:top_k]

    def inputs(self, **options: Any) -> Any:
        """The processor's output, on the model's device. A text that is too long is refused, not cut."""
        try:
            return self.processor(truncation=False, **options).to(self.model.device)
        except (TypeError, ValueError) as error:
            raise RequestError(422, str(error)) from error

    def image_embeds(self, pixels: Any, mode: str) -> torch.Tensor:
        """[I, clip_embed_dim], normalised in float32: in the model's half precision, lengths are only nearly 1."""
        return F.normalize(self.model.embed_image(pixels, mode=mode, normalize=False).float(), dim=-1)

    def text_embeds(self, texts: list[str]) -> torch.Tensor:
        """[T, clip_embed_dim], normalised in float32."""
        ids = self.inputs(text=texts, task="embed", padding=False, return_tensors=None).input_ids
        return F.normalize(self.model.embed_texts(ids, normalize=False).float(), dim=-1)
