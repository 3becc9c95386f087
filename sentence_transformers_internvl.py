"""InternVL-14B in sentence-transformers: embeddings of texts and images, and re-ranking of pairs.

`SentenceTransformer(repo, trust_remote_code=True)` finds [`InternVLEmbedder`] through modules.json. Re-ranking needs a
class of its own, because one repository has one modules.json:

    cross_encoder = get_class_from_dynamic_module("sentence_transformers_internvl.InternVLCrossEncoder", repo)
    model = cross_encoder(repo, trust_remote_code=True)

docs/versions.md lists the releases it is tested with. The model itself neither needs nor imports this file.

Where this file differs from sentence-transformers' own `Transformer` module, and why:

* The repository's processor makes the ids; the tokenizer alone leaves out `summarize:` and `</s>`.
* A batch may mix texts and images.
* The vision tower sees an image of many pairs once, however many texts it is compared with.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modality import infer_modality  # undocumented
from sentence_transformers.base.modules import InputModule  # undocumented
from transformers import AutoConfig, AutoModel, AutoProcessor

from .compat_internvl import refuse_known_bad

MODES = ("InternVL-C", "InternVL-G")
ADDRESSES = ("http://", "https://", "data:")
HUB_OPTIONS = ("token", "revision", "local_files_only", "trust_remote_code")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tiff", ".webp")


def _kind_and_value(item: Any, name: str) -> tuple[str, Any]:
    """The kind of an input, "text" or "image", and the text or image itself."""
    value = _unwrapped(item)
    if isinstance(value, dict) and len(value) == 1:
        kind, value = next(iter(value.items()))
    else:
        kind = "image" if isinstance(value, os.PathLike) else infer_modality(value)
    if kind not in ("text", "image"):
        raise ValueError(f"`{name}` must be one text or one image, got {kind} in a {type(item).__name__}.")
    if kind == "image" and isinstance(value, str) and value.startswith(ADDRESSES):
        raise ValueError(f"`{name}` must be an image or its path; nothing is fetched: {value[:60]!r}.")
    # A `str` without spaces, not a dict that names its kind.
    if isinstance(item, str) and kind == "text" and item.lower().endswith(IMAGE_ENDINGS) and len(item.split()) == 1:
        warnings.warn(f"`{name}` is read as a text: there is no image {item!r}.", stacklevel=2)
    return kind, value


def _unwrapped(item: Any) -> Any:
    """The only part of a chat message, as {"text": ...} or {"image": ...}; anything else as it is."""
    if isinstance(item, list) and len(item) == 1:
        item = item[0]
    if not isinstance(item, dict) or "content" not in item:
        return item
    parts = item["content"]
    if isinstance(parts, (list, tuple)) and len(parts) == 1 and isinstance(parts[0], dict):
        return {key: value for key, value in parts[0].items() if key != "type"}
    return {"text": parts} if isinstance(parts, str) else item


def _image_and_text(pair: Any, name: str) -> tuple[Any, Any]:
    """The image and the text of a pair, which may be in any order."""
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise TypeError(f"`{name}` must be a pair of an image and a text, got {type(pair).__name__}.")
    if _is_seen(pair[0]):
        return pair[0], pair[1]
    first, second = (_kind_and_value(item, f"{name}[{index}]") for index, item in enumerate(pair))
    if first[0] == second[0]:
        raise ValueError(f"`{name}` must be an image and a text, got two {first[0]}s.")
    return (first[1], second[1]) if first[0] == "image" else (second[1], first[1])


def _is_seen(item: Any) -> bool:
    """Whether an item is what the model's `look_at` returned for an image."""
    return hasattr(item, "image_states")


def _distinct(images: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """The I different images, and the index of each given one among them. Paths are compared by name, objects by id."""
    keys = [os.fspath(image) if isinstance(image, (str, os.PathLike)) else id(image) for image in images]
    kept = dict(zip(keys, images))
    places = {key: place for place, key in enumerate(kept)}
    return list(kept.values()), [places[key] for key in keys]


def _checked_mode(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {MODES}, got {mode!r}.")
    return mode


class InternVLModule(InputModule):
    """The repository's model and processor as a module: the base of the embedder and the re-ranker.

    Args:
        model (`InternVLModel`): the model.
        processor (`InternVLProcessor`): of the same checkpoint.

    Raises:
        ValueError: the processor belongs to another checkpoint.
    """

    # mteb reads the kinds of inputs of a model on the Hub from `modality_config` in this file.
    config_file_name = "sentence_bert_config.json"
    config_keys = ["modality_config"]
    modality_config = {"text": {"method": "embed_text"}, "image": {"method": "embed_image"}}
    task: str

    def __init__(self, model: Any, processor: Any):
        super().__init__()
        refuse_known_bad("sentence-transformers")
        model.check_processor(processor)
        self.model = model
        self.processor = processor

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        cache_folder: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **kwargs: Any,
    ) -> "InternVLModule":
        """Load model and processor; sentence-transformers calls it.

        Args:
            model_name_or_path (`str`): folder or id of the repository.
            subfolder, cache_folder (`str`): as `subfolder` and `cache_dir` in `from_pretrained`.
            model_kwargs, processor_kwargs, config_kwargs (`dict`, *optional*): for `from_pretrained` of the model
                (`dtype`, `device_map`, ...), the processor (`max_length`) and the config (`contrastive_only`). A
                `subfolder` in `model_kwargs` applies to all three: sentence-transformers has no other place for it.
            backend (`str`): "torch".
            kwargs: `token`, `revision`, `local_files_only` and `trust_remote_code`, as in `from_pretrained`. Others,
                which sentence-transformers passes to other kinds of modules, are not used.

        Raises:
            ValueError: another backend.
        """
        if backend != "torch":
            raise ValueError(f'`backend` must be "torch" for this model, got {backend!r}.')
        model_options = model_kwargs or {}
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        hub |= {"subfolder": model_options.get("subfolder", subfolder), "cache_dir": cache_folder}
        processor_options = hub | (processor_kwargs or {})
        # A CrossEncoder passes its `max_length` under this name.
        max_length = processor_options.pop("model_max_length", None)
        config = AutoConfig.from_pretrained(model_name_or_path, **(hub | (config_kwargs or {})))
        model = AutoModel.from_pretrained(model_name_or_path, config=config, **(hub | model_options))
        module = cls(model, AutoProcessor.from_pretrained(model_name_or_path, **processor_options))
        if max_length is not None:
            module.max_seq_length = max_length
        return module

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write model, processor, code and settings to a folder, as safetensors whatever `safe_serialization` is."""
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)
        self.save_config(output_path)

    @property
    def modalities(self) -> list[str]:
        """What an input may be. A "message" holds one text or one image; a batch of both kinds counts as one."""
        return ["text", "image", "message"]

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer. A call of it returns ids without the recipe."""
        return self.processor.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Longest text in ids, `<s>`, prefix and `</s>` included. Longer texts are cut, with a warning."""
        return self.processor.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.processor.max_length = value

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        processing_kwargs: dict[str, dict[str, Any]] | None = None,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare the T texts and I images of B inputs.

        Args:
            inputs (sequence): for the embedder, texts, PIL images, paths of images, [H, W, C] arrays or tensors, or
                dicts {"text": ...} and {"image": ...}, in any order. For the re-ranker, pairs of such a text and such
                an image, in any order; images are different if they are different objects or paths.
            prompt (`str`, *optional*): put in front of the texts, behind `summarize:`.
            processing_kwargs (`dict`, *optional*): {"text": ..., "image": ...}, options of the processor's calls, such
                as {"image": {"crop": "squash"}}.
            max_length (`int`, *optional*): longest text in ids.
            kwargs: sentence-transformers' own (`task`, `mode`); not used.

        Returns:
            `dict`: `input_ids` and `attention_mask` [T, L]; `pixel_values` [I, 3, H, W], or `seen` if `look_once` has
            replaced the images by what the model saw. In a mixed batch also `order` [B], which sorts the texts followed
            by the images into the order of the inputs; for pairs `image_of_pair` [B], below I.

        Raises:
            TypeError, ValueError: neither a text nor an image, an empty one, or not a pair of both.
            OSError: an image file that is missing or that PIL cannot read.
        """
        texts, images, features = self._split(inputs)
        options: dict[str, dict[str, Any]] = {"text": {}, "image": {}} | (processing_kwargs or {})
        if texts:
            texts = [prompt + text for text in texts] if prompt else texts
            features |= self.processor(text=texts, task=self.task, **({"max_length": max_length} | options["text"]))
        if images and _is_seen(images[0]):
            features["seen"] = images[0]._replace(image_states=torch.cat([seen.image_states for seen in images]))
        elif images:
            features |= self.processor(images=images, task=self.task, **options["image"])
        return features

    def _split(self, inputs: Sequence[Any]) -> tuple[list[Any], list[Any], dict[str, Any]]:
        """Texts, images, and the features that say which input they belong to."""
        raise NotImplementedError


class InternVLEmbedder(InternVLModule):
    """Embeds texts and images into one space.

    Args:
        model, processor: see [`InternVLModule`].
        mode (`str`): the default way to embed images, "InternVL-C" or "InternVL-G". Set it by
            `SentenceTransformer(..., model_kwargs={"mode": ...})`, which is saved with the model, or for one call by
            `encode(..., mode=...)`.
    """

    config_keys = ["mode", "modality_config"]
    forward_kwargs = {"mode"}
    task = "embed"

    def __init__(self, model: Any, processor: Any, mode: str = "InternVL-C"):
        super().__init__(model, processor)
        self.mode = _checked_mode(mode)

    @classmethod
    def load(  # type: ignore[override]
        cls, model_name_or_path: str, *, model_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> "InternVLEmbedder":
        """Load as [`InternVLModule.load`] does; `model_kwargs` may also hold the `mode`.

        Raises:
            ValueError: another backend or mode.
        """
        places = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        config = cls.load_config(model_name_or_path, **{name: kwargs[name] for name in places if name in kwargs})
        model_kwargs = dict(model_kwargs or {})
        mode = _checked_mode(model_kwargs.pop("mode", config.get("mode", MODES[0])))  # before the model is loaded
        module = super().load(model_name_or_path, model_kwargs=model_kwargs, **kwargs)
        module.mode = mode
        return module

    def get_embedding_dimension(self) -> int:
        """Width of the embeddings: 768 for the published checkpoint."""
        return self.model.config.clip_embed_dim

    def _split(self, inputs: Sequence[Any]) -> tuple[list[Any], list[Any], dict[str, Any]]:
        found = [_kind_and_value(item, f"inputs[{index}]") for index, item in enumerate(inputs)]
        texts, images = ([value for kind, value in found if kind == wanted] for wanted in ("text", "image"))
        if not texts or not images:
            return texts, images, {}
        is_image = torch.tensor([kind == "image" for kind, _ in found])  # [B]
        return texts, images, {"order": is_image.byte().argsort(stable=True).argsort()}  # [B]

    def forward(self, features: dict[str, Any], mode: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Add `sentence_embedding` [B, width], of length 1, to the features of `preprocess`.

        Args:
            features (`dict`): as `preprocess` returned them.
            mode (`str`, *optional*): for images; the module's own if not given.
            kwargs: sentence-transformers' own, for other kinds of modules; not used.

        Returns:
            `dict`: `features`, changed in place.

        Raises:
            ValueError: part of a mixed batch. Losses that split batches need texts and images in separate columns.
        """
        parts = []
        if "input_ids" in features:
            parts.append(self.model.embed_text(features["input_ids"], features["attention_mask"]))
        if "pixel_values" in features:
            parts.append(self.model.embed_image(features["pixel_values"], mode=self.mode if mode is None else mode))
        embeddings = torch.cat(parts)
        order = features.get("order")
        if order is not None:
            if len(order) != len(embeddings):
                raise ValueError(f"`features` must be a whole mixed batch, got {len(embeddings)} of {len(order)} rows.")
            embeddings = embeddings[order]
        features["sentence_embedding"] = embeddings
        return features


class InternVLReranker(InternVLModule):
    """Scores how well a text fits an image, by the checkpoint's matching head."""

    task = "match"

    def _split(self, inputs: Sequence[Any]) -> tuple[list[Any], list[Any], dict[str, Any]]:
        pairs = [_image_and_text(pair, f"inputs[{index}]") for index, pair in enumerate(inputs)]
        images, image_of_pair = _distinct([image for image, _ in pairs])
        return [text for _, text in pairs], images, {"image_of_pair": torch.tensor(image_of_pair)}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add `scores` [B, 1], float32, to the features: the log-odds of a match, whose sigmoid is its probability.

        Args:
            features (`dict`): as `preprocess` returned them.
            kwargs: sentence-transformers' own, for other kinds of modules; not used.

        Returns:
            `dict`: `features`, changed in place.
        """
        seen = features.get("seen")
        if seen is None:
            seen = self.model.look_at(features["pixel_values"], queries=False)
        text = features["input_ids"], features["attention_mask"]
        if len(seen.image_states) == 1:
            logits = self.model.match(seen, *text, all_pairs=True)[0]  # [B, 2]
        else:
            states = seen.image_states[features["image_of_pair"]]
            logits = self.model.match(seen._replace(image_states=states), *text)
        features["scores"] = (logits[:, 1:] - logits[:, :1]).float()
        return features

    @torch.inference_mode()
    def look_once(
        self, pairs: Sequence[Any], batch_size: int, device: torch.device
    ) -> Iterator[tuple[list[int], list[Any]]]:
        """Run the vision tower over the different images of pairs, `batch_size` at a time, on `device`.

        Yields:
            `(list[int], list)`: the indices of the pairs of some images, and these pairs with what the model saw in
            place of the image, which `preprocess` takes.
        """
        texts, images, features = self._split(pairs)
        image_of_pair = features["image_of_pair"].tolist()
        for start in range(0, len(images), batch_size):
            pixels = self.processor(images=images[start : start + batch_size], task=self.task).pixel_values
            seen = self.model.look_at(pixels.to(device), queries=False)
            one_each = [seen._replace(image_states=states) for states in seen.image_states.split(1)]
            rows = [row for row, place in enumerate(image_of_pair) if start <= place < start + batch_size]
            yield rows, [(one_each[image_of_pair[row] - start], texts[row]) for row in rows]


class InternVLCrossEncoder(CrossEncoder):
    """A `CrossEncoder` of images and texts, loaded from the repository of the joint model.

    `predict` and `rank` return the probability of a match, or with `activation_fn=torch.nn.Identity()` its log-odds.
    The plain `CrossEncoder(folder, trust_remote_code=True)` also loads what `save_pretrained` writes.
    """

    def _load_default_modules(self, model_name_or_path: str, **kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
        # undocumented: called for a repository that holds no CrossEncoder
        return [InternVLReranker.load(model_name_or_path, **kwargs)], {}

    def predict(
        self,
        inputs: Any,
        *,
        batch_size: int = 32,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        **options: Any,
    ) -> Any:
        """Score pairs as `CrossEncoder.predict` does, but run the vision tower once per image, not once per pair.

        Args:
            inputs: a pair of a text and an image, in any order, or a list of B pairs.
            batch_size (`int`): number of images, and of pairs, that are computed at the same time.
            convert_to_numpy, convert_to_tensor (`bool`): as in `CrossEncoder.predict`.
            options: the other arguments of `CrossEncoder.predict`. With several processes (`pool`, or a list as
                `device`), the vision tower sees an image once per batch.

        Returns:
            One score for a pair; for a list, an array, tensor or list of B scores.

        Raises:
            TypeError, ValueError: not a pair of a text and an image, or an empty one.
            OSError: an image file that is missing or that PIL cannot read.
        """
        is_single = self.is_singular_input(inputs)
        pairs = [inputs] if is_single else list(inputs)
        if options.get("pool") is not None or isinstance(options.get("device"), list) or not pairs:
            outputs = {"convert_to_numpy": convert_to_numpy, "convert_to_tensor": convert_to_tensor}
            return super().predict(inputs, batch_size=batch_size, **outputs, **options)
        if options.get("device") is not None and not hasattr(self[0].model, "hf_device_map"):
            self.to(options["device"])
        self.eval()
        rows, scores = [], []
        for some, seen_pairs in self[0].look_once(pairs, batch_size, self.device):
            rows += some
            scores.append(super().predict(seen_pairs, batch_size=batch_size, convert_to_tensor=True, **options))
        ordered = torch.cat(scores)[torch.tensor(rows).argsort()]
        found = ordered if convert_to_tensor else ordered.cpu().numpy() if convert_to_numpy else list(ordered)
        return found[0] if is_single else found
