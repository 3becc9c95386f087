"""What happens to rows in examples/embed_dataset.py: `decode` in Ray's tasks, `Embed` in its actors."""

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
    """One process of a machine copies the model's code to its place, the others find it."""
    with FileLock(Path(tempfile.gettempdir()) / f"embed-dataset-{os.getuid()}.lock"):
        return AutoProcessor.from_pretrained(options.model, trust_remote_code=True, **options.where)


def decode(shard: dict, options: argparse.Namespace) -> Iterator[dict]:
    """A shard -> batches, as Ray's rows: what the model takes, ids, and what went wrong. An empty batch is the last."""
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
    ids, errors, pictures, texts = [], [], [], []
    for row in batch:
        try:
            if row.error:
                raise ValueError(row.error)
            picture = pixels_of(row.image, processor, options) if options.needs_pictures else None
            text = checked_text(row.text, processor, options) if options.needs_texts else None
        except ValueError as error:
            errors.append({"id": row.id, "reason": str(error)[:500]})
            continue
        ids.append(row.id)
        pictures.append(picture)
        texts.append(text)
    inputs = {}
    if ids and options.needs_pictures:
        inputs["pixel_values"] = torch.cat(pictures)
    if ids and options.needs_texts:
        inputs |= quietly(processor, text=texts)
    return {"ids": ids, "errors": json.dumps(errors), "inputs": safetensors.torch.save(inputs) if ids else b""}


def pixels_of(image: Any, processor: Any, options: argparse.Namespace) -> torch.Tensor:
    """[1, 3, S, S] in the type of the weights, which the model would bring it to, and half as large to send."""
    picture = embed_sources.decoded(image)
    try:
        return processor(images=picture, crop=options.crop).pixel_values.to(getattr(torch, options.dtype))
    except (*embed_sources.DAMAGED, ArithmeticError) as error:
        raise ValueError(f"picture: {type(error).__name__}: {error}") from None


def checked_text(text: Any, processor: Any, options: argparse.Namespace) -> str:
    if text is None:
        raise ValueError("no text")
    try:
        quietly(processor, text=text, truncation=options.truncate)
    except (TypeError, ValueError) as error:
        raise ValueError(f"text: {error}") from None
    if not isinstance(text, str):
        raise ValueError(f"text: must be a str, got {type(text).__name__}")
    return text


def quietly(processor: Any, **arguments: Any) -> dict:
    with warnings.catch_warnings():  # that texts are cut was asked for
        warnings.simplefilter("ignore")
        return dict(processor(**arguments))


# ------------------------------------------------------------------------------------------------------- embedding


class Embed:
    """An actor with a model: batches -> tables, and the seconds that it waited for a batch and worked on it."""

    def __init__(self, options: argparse.Namespace):
        torch.set_num_threads(options.cpus_per_model)
        transformers_logging.disable_progress_bar()
        self.options, self.processor, self.ended = options, load_processor(options), None
        self.model = load_model(options)
        self.model.check_processor(self.processor) if hasattr(self.model, "check_processor") else None

    def __call__(self, batch: dict) -> dict:
        start = time.perf_counter()
        errors = [error | {"source": batch["source"]} for error in json.loads(batch["errors"])]
        table, embedded = b"", 0
        if batch["inputs"]:
            columns = self.columns(safetensors.torch.load(batch["inputs"]))
            columns = {"id": list(batch["ids"]), "source": [batch["source"]] * len(batch["ids"]), **columns}
            table, bad = table_of(columns, FLOATS[self.options.embeddings])
            errors, embedded, table = errors + bad, len(table), as_bytes(table)
        end = time.perf_counter()
        waited, self.ended = None if self.ended is None else start - self.ended, end
        found = {name: batch[name] for name in ("shard", "chunk", "rows", "end", "decoded")}
        found |= {"embedded": embedded, "table": table, "errors": json.dumps(errors)}
        return found | {"waited": waited, "worked": end - start}

    @torch.inference_mode()
    def columns(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        options, model = self.options, self.model
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        found: dict[str, Any] = {}
        if "pixel_values" in inputs:
            seen = inputs.pop("pixel_values")
            if hasattr(model, "look_at"):  # the modes and the caption share it
                seen = model.look_at(seen, queries=options.needs_queries)
            if "image" in options.embed:
                modes = {name: mode for name, mode in MODES.items() if mode in options.mode}
                found |= {name: model.embed_image(seen, mode, normalize=False) for name, mode in modes.items()}
            if "caption" in options.embed:
                found |= self.captions(seen)
        if inputs:
            found["text"] = model.embed_text(**inputs, normalize=False)
        # In bfloat16 the length of what is divided by its length is off by up to half a percent.
        tensors = {name: F.normalize(each.float(), dim=-1) for name, each in found.items() if torch.is_tensor(each)}
        return found | tensors

    def captions(self, seen: Any) -> dict[str, Any]:
        options = self.options
        prompt = self.processor(text=options.prompt, task="caption").to(self.model.device)
        ids = self.model.generate(
            seen, **prompt, max_new_tokens=options.max_new_tokens, num_beams=options.num_beams, do_sample=False
        )
        written = [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]
        # A picture that nothing was written of is an error in the end.
        texts = quietly(self.processor, text=[text or "nothing" for text in written])
        texts = {name: tensor.to(self.model.device) for name, tensor in texts.items()}
        return {"caption": self.model.embed_text(**texts, normalize=False), "caption_text": written}


def load_model(options: argparse.Namespace) -> Any:
    """No more of the model than what was asked for needs."""
    where = {"dtype": options.dtype, "trust_remote_code": True, **options.where}
    if options.gpus_per_model:
        where["device_map"] = "auto" if options.gpus_per_model > 1 else {"": 0}
    if options.embed == ["text"]:
        return AutoModelForTextEncoding.from_pretrained(options.model, **where).eval()
    if options.embed == ["image"] and options.mode == ["InternVL-C"]:
        reference = "modeling_internvl.InternVLVisionModelWithProjection"
        code = {"revision": options.where["revision"]} if "revision" in options.where else {}
        vision_class = get_class_from_dynamic_module(reference, options.model, **code)
        where.pop("trust_remote_code")
        return vision_class.from_pretrained(options.model, **where).eval()
    return AutoModel.from_pretrained(options.model, **where, contrastive_only=not options.needs_queries).eval()


def table_of(columns: dict[str, Any], dtype: torch.dtype) -> tuple[pa.Table, list[dict]]:
    """The rows whose values are all good, and the errors of the others."""
    kept, reasons = [], [""] * len(columns["id"])
    arrays: dict[str, pa.Array] = {}
    for name, values in columns.items():
        if isinstance(values, torch.Tensor):
            values = values.to("cpu", dtype)
            for row in (~values.isfinite().all(dim=1)).nonzero().flatten().tolist():
                reasons[row] = f"{name}: the model gave a value that is not finite"
            arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.numpy().ravel()), values.shape[1])
        else:
            arrays[name] = pa.array(values, pa.string())
    for row, text in enumerate(columns.get("caption_text", ())):
        reasons[row] = reasons[row] or ("" if text else "caption: the model wrote nothing")
    kept = [row for row, reason in enumerate(reasons) if not reason]
    bad = [
        {"id": columns["id"][row], "source": columns["source"][row], "reason": reason}
        for row, reason in enumerate(reasons)
        if reason
    ]
    return pa.table(arrays).take(pa.array(kept, pa.int64())), bad


def schema_of(options: argparse.Namespace) -> pa.Schema:
    """Of `embeddings/`, in the order of `Embed.columns`."""
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
