"""The steps of embed_dataset.py for each row: `decode` runs in Ray's tasks, `Embed` in its actors."""

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import Any

import decoding
import embed_sources
import pyarrow as pa
import safetensors.torch
import torch
import torch.nn.functional as F
from filelock import FileLock
from transformers import AutoModel, AutoModelForTextEncoding, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging as transformers_logging

MODES = {"image_c": "InternVL-C", "image_g": "InternVL-G"}
FLOATS = {"float16": torch.float16, "float32": torch.float32}


# -------------------------------------------------------------------------------------------- reading and decoding


def load_processor(options: argparse.Namespace) -> Any:
    """Of the processes of a machine, one at a time: the first copies the model's code into the cache."""
    with FileLock(Path(tempfile.gettempdir()) / f"embed-dataset-{os.getuid()}.lock"):
        return AutoProcessor.from_pretrained(options.model, trust_remote_code=True, **options.where)


def decode(shard: dict, options: argparse.Namespace) -> Iterator[dict]:
    """A shard -> batches as Ray's rows: ids, the model's inputs, and errors. The last batch is empty."""
    torch.set_num_threads(1)
    processor = load_processor(options)
    rows = islice(embed_sources.read_shard(shard, options), shard.get("limit"))
    with ThreadPoolExecutor(embed_sources.CONNECTIONS) as pool:
        for chunk in count():
            start = time.perf_counter()
            batch = list(pool.map(lambda row: embed_sources.fetch(row, options), islice(rows, options.batch_size)))
            yield {
                "shard": shard["shard"],
                "source": shard["name"],
                "chunk": chunk,
                "rows": len(batch),
                "end": batch[-1].end if batch else 0,
                **inputs_of(batch, processor, options),
                "decoded": time.perf_counter() - start,
            }
            if not batch:
                return


def inputs_of(batch: list[embed_sources.Row], processor: Any, options: argparse.Namespace) -> dict:
    """`ids` and `inputs` of the rows that can be embedded, `errors` of the others."""
    ids, errors, pixels, texts = [], [], [], []
    for row in batch:
        try:
            if row.error:
                raise ValueError(row.error)
            row_pixels = pixels_of(row.image, processor, options) if options.needs_images else None
            text = checked_text(row.text, processor, options) if options.needs_texts else None
        except ValueError as error:
            errors.append({"id": row.id, "reason": str(error)[:500]})
            continue
        ids.append(row.id)
        pixels.append(row_pixels)
        texts.append(text)
    inputs = {}
    if ids and options.needs_images:
        inputs["pixel_values"] = torch.cat(pixels)
    if ids and options.needs_texts:
        inputs |= tokenize(processor, texts)
    return {"ids": ids, "errors": json.dumps(errors), "inputs": safetensors.torch.save(inputs) if ids else b""}


def pixels_of(data: Any, processor: Any, options: argparse.Namespace) -> torch.Tensor:
    """[1, 3, S, S] in the type of the weights, to send no more bytes than the model needs."""
    if data is None:
        raise ValueError("no image")
    try:
        image = decoding.decode(data, max_pixels=2 * decoding.MAX_PIXELS)
        return processor(images=image, crop=options.crop).pixel_values.to(getattr(torch, options.dtype))
    except ValueError as error:
        raise ValueError(f"image: {error}") from None
    except decoding.DAMAGED as error:  # Pillow decoded it, but it cannot be converted
        raise ValueError(f"image: {type(error).__name__}: {error}") from None


def checked_text(text: Any, processor: Any, options: argparse.Namespace) -> str:
    if text is None:
        raise ValueError("no text")
    if not isinstance(text, str):
        raise ValueError(f"text: must be a str, got {type(text).__name__}")
    try:
        tokenize(processor, text, truncation=options.truncate)
    except ValueError as error:
        raise ValueError(f"text: {error}") from None
    return text


def tokenize(processor: Any, text: str | list[str], **how: Any) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():  # the user requested truncation, which the processor warns about
        warnings.simplefilter("ignore")
        return dict(processor(text=text, **how))


# ------------------------------------------------------------------------------------------------------- embedding


class Embed:
    """An actor with a model: batches -> tables, and how long it waited for a batch and worked on it."""

    def __init__(self, options: argparse.Namespace):
        torch.set_num_threads(options.cpus_per_model)
        transformers_logging.disable_progress_bar()
        self.options, self.processor, self.ended = options, load_processor(options), None
        self.model = load_model(options)
        if hasattr(self.model, "check_processor"):
            self.model.check_processor(self.processor)

    def __call__(self, batch: dict) -> dict:
        start = time.perf_counter()
        errors = [error | {"source": batch["source"]} for error in json.loads(batch["errors"])]
        encoded = b""
        if batch["inputs"]:
            columns = {"id": list(batch["ids"]), "source": [batch["source"]] * len(batch["ids"])}
            columns |= self.columns(safetensors.torch.load(batch["inputs"]))
            table, bad = table_of(columns, FLOATS[self.options.embeddings])
            errors, encoded = errors + bad, as_bytes(table)
        end = time.perf_counter()
        waited, self.ended = None if self.ended is None else start - self.ended, end
        found = {name: batch[name] for name in ("shard", "chunk", "rows", "end", "decoded")}
        return found | {"table": encoded, "errors": json.dumps(errors), "waited": waited, "worked": end - start}

    @torch.inference_mode()
    def columns(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        options, model = self.options, self.model
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        found: dict[str, Any] = {}
        if "pixel_values" in inputs:
            seen = inputs.pop("pixel_values")
            if hasattr(model, "look_at"):  # the modes and the caption share its result
                seen = model.look_at(seen, queries=options.needs_queries)
            if "image" in options.embed:
                modes = {name: mode for name, mode in MODES.items() if mode in options.mode}
                found |= {name: model.embed_image(seen, mode, normalize=False) for name, mode in modes.items()}
            if "caption" in options.embed:
                found |= self.captions(seen)
        if inputs:
            found["text"] = model.embed_text(**inputs, normalize=False)
        # Normalise in float32: in bfloat16 the length would be off by up to half a percent.
        tensors = {name: F.normalize(each.float(), dim=-1) for name, each in found.items() if torch.is_tensor(each)}
        return found | tensors

    def captions(self, seen: Any) -> dict[str, Any]:
        options, device = self.options, self.model.device
        prompt = self.processor(text=options.prompt, task="caption").to(device)
        how = {"max_new_tokens": options.max_new_tokens, "num_beams": options.num_beams, "do_sample": False}
        ids = self.model.generate(seen, **prompt, **how)
        written = [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]
        # An empty caption becomes an error in `table_of`; until then it needs some text.
        texts = tokenize(self.processor, [text or "nothing" for text in written])
        embeds = self.model.embed_text(**{name: each.to(device) for name, each in texts.items()}, normalize=False)
        return {"caption": embeds, "caption_text": written}


def load_model(options: argparse.Namespace) -> Any:
    """Only the parts of the model that `--embed` and `--mode` need."""
    where = {"dtype": options.dtype, **options.where}
    if options.gpus_per_model:
        where["device_map"] = "auto" if options.gpus_per_model > 1 else {"": 0}
    if options.embed == ["image"] and options.mode == ["InternVL-C"]:
        reference = "modeling_internvl.InternVLVisionModelWithProjection"
        vision_class = get_class_from_dynamic_module(reference, options.model, revision=options.where.get("revision"))
        return vision_class.from_pretrained(options.model, **where).eval()
    where["trust_remote_code"] = True
    if options.embed == ["text"]:
        return AutoModelForTextEncoding.from_pretrained(options.model, **where).eval()
    return AutoModel.from_pretrained(options.model, **where, contrastive_only=not options.needs_queries).eval()


def table_of(columns: dict[str, Any], dtype: torch.dtype) -> tuple[pa.Table, list[dict]]:
    """The rows whose values are all good, and the errors of the others."""
    captions = columns.get("caption_text") or ["no caption wanted"] * len(columns["id"])
    reasons = ["" if caption else "caption: the model wrote nothing" for caption in captions]
    arrays: dict[str, pa.Array] = {}
    for name, values in columns.items():
        if isinstance(values, torch.Tensor):
            values = values.to("cpu", dtype)  # [rows, width]
            for row in (~values.isfinite().all(dim=1)).nonzero().flatten().tolist():
                reasons[row] = f"{name}: the model returned values that are not finite"
            arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.numpy().ravel()), values.shape[1])
        else:
            arrays[name] = pa.array(values, pa.string())
    rows = zip(columns["id"], columns["source"], reasons)
    bad = [{"id": key, "source": source, "reason": reason} for key, source, reason in rows if reason]
    return pa.table(arrays).filter(pa.array([not reason for reason in reasons])), bad


def schema_of(options: argparse.Namespace) -> pa.Schema:
    """The columns of `embeddings/`, in the order of `Embed.columns`."""
    vectors = pa.list_(pa.from_numpy_dtype(options.embeddings), options.width)
    fields = {"id": pa.string(), "source": pa.string()}
    if "image" in options.embed:
        fields |= {name: vectors for name, mode in MODES.items() if mode in options.mode}
    if "caption" in options.embed:
        fields |= {"caption": vectors, "caption_text": pa.string()}
    if "text" in options.embed:
        fields["text"] = vectors
    return pa.schema(list(fields.items()))


def as_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()
