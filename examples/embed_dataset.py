"""Embed any number of pictures and texts on Ray Data: folders, Parquet files or WebDataset tars in, Parquet files out.

    pip install -r examples/embed-requirements.txt
    python examples/embed_dataset.py --model . --subfolder tiny --data examples/pictures --output out
    python examples/embed_dataset.py --data s3://bucket/tars --output s3://bucket/out --embed image text --dry-run
    python examples/embed_dataset.py --data s3://bucket/tars --output s3://bucket/out --address auto    # a cluster

`--data` and `--output` are paths or URLs of fsspec (s3:// needs `pip install s3fs`, http:// aiohttp, ...), which every
machine of a cluster must see, and so must `--model` if it is a folder.

* Ray tasks read and decode; a pool of actors, each with a model, embeds; the driver writes. What is decoded and not yet
  embedded waits in Ray's object store, and Ray stops the readers when that is full.
* The input is cut into shards: `--shard-rows` rows of a Parquet file or of a folder's listing, or a whole tar. Each
  becomes one `embeddings/part-N.parquet`, which is there whole or not at all. Running the same command again, after
  whatever happened, does the shards that are not there. With other settings it is refused.
* A row that cannot be embedded goes to `errors/part-N.parquet`, with the reason; rows in must be rows out and errors in
  the end. To try those rows again, delete their `embeddings/part-N.parquet` and run the command again.
* `manifest.json` says which model, settings and input this is, and at the end how many rows and how long the models
  waited; `shards.parquet` what each shard is, and `files.parquet` which files a folder had when the run began.
* Columns: `id` (a path below the folder, `--id-column` or FILE:ROW of a Parquet file, the key of a tar), `source`,
  `image_c` and `image_g` (embeddings of length 1 in the modes), `text`, `caption` and `caption_text` (what the model
  wrote of the picture).
"""

import argparse
import hashlib
import json
import logging
import math
import os
import platform
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its makers unless told

import embed_costs
import embed_sources
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import safetensors.torch
import torch
from filelock import FileLock
from ray.data import ActorPoolStrategy, DataContext
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging as transformers_logging

MODES = {"image_c": "InternVL-C", "image_g": "InternVL-G"}
FLOATS = {"float16": torch.float16, "float32": torch.float32}
SETTINGS = (
    "model", "subfolder", "model_version", "dtype", "embed", "mode", "crop", "embeddings", "truncate", "batch_size",
    "prompt", "max_new_tokens", "num_beams", "data", "source", "shard_rows", "image_column", "text_column", "id_column",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "ray", "pyarrow", "pillow", "safetensors")
ERRORS = pa.schema([("id", pa.string()), ("source", pa.string()), ("reason", pa.string())])
MAX_TASKS = 10_000  # beyond that many shards a task reads several
DECODE_RETRIES = 5  # a picture that kills its process is not tried forever
WRITERS = 8
SAMPLED_SHARDS = 4


# --------------------------------------------------------------------------------------------------------- options


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="a folder, a file or a pattern with `*`; a path or a URL of fsspec")
    add("--output", required=True, help="a folder; a path or a URL of fsspec")
    add("--source", default="auto", choices=("auto", "folder", "parquet", "webdataset"), help="what the files are")
    add("--storage-options", type=json_object, default={}, help="JSON for fsspec, to read `--data`; not kept")
    add("--output-options", type=json_object, default={}, help="the same for `--output`")
    add("--model", default="OpenGVLab/InternVL-14B-224px", help="a folder or an id on the Hub")
    add("--subfolder", default="", help="of the model")
    add("--revision", help="of an id on the Hub; it is written down as a commit")
    add("--embed", nargs="+", default=["image"], choices=("image", "text", "caption"), help="what a row gives")
    add("--mode", nargs="+", default=["InternVL-C"], choices=tuple(MODES.values()), help="of the pictures")
    add("--crop", default="center", choices=("center", "squash"), help="how pictures become square")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="of the weights")
    add("--embeddings", default="float16", choices=tuple(FLOATS), help="type of what is written")
    add("--image-column", default="image", help="of Parquet: bytes, bytes with a path, or paths or URLs")
    add("--text-column", default="text", help="of Parquet, or of the json of a tar without txt")
    add("--id-column", default="", help="of Parquet; FILE:ROW if not given")
    add("--truncate", action="store_true", help="cut texts that are too long; otherwise they are errors")
    add("--prompt", default="English caption:", help="for captions")
    add("--max-new-tokens", type=int, default=30, help="of a caption")
    add("--num-beams", type=int, default=1, help="of a caption")
    add("--batch-size", type=int, default=64, help="rows that the model takes at once")
    add("--shard-rows", type=int, default=10_000, help="rows of a part of the output; a tar is always one part")
    add("--gpus-per-model", type=int, help="1, or 0 if the machine has none; more spread a model by `device_map`")
    add("--cpus-per-model", type=int, default=1, help="threads of a model that has no GPU")
    add("--models", type=int, help="size of the actor pool; as many as there are GPUs for, or 1")
    add("--decoders", type=int, help="most tasks that read and decode at once; as many as there are CPUs for")
    add("--address", help="of a Ray cluster, such as `auto`; without it Ray starts on this machine")
    add("--object-store-gb", type=float, help="of this machine's Ray; by default 30 %% of its memory")
    add("--stall-minutes", type=float, default=20, help="without any progress, after which the actors are made anew")
    add("--dry-run", action="store_true", help="embed a sample, write nothing, say rows, time and cost")
    add("--sample-rows", type=int, default=512, help="of a dry run")
    add("--price-per-hour", type=float, help="of all machines of this run, for a dry run")
    add("--h100", action="store_true", help="in a dry run: what a billion pictures take on H100s, by arithmetic")
    add("--mfu", type=float, help="the share of an H100's peak that you expect to reach, such as 0.4")
    add("--price-per-gpu-hour", type=float, help="of an H100")
    return complete(parser.parse_args(arguments))


def json_object(text: str) -> dict:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(text)
    return found


def complete(options: argparse.Namespace) -> argparse.Namespace:
    """
    Fill in what depends on other options.

    Raises:
        ValueError: options out of range, or that contradict each other.
    """
    for name in ("batch_size", "shard_rows", "cpus_per_model", "models", "decoders", "max_new_tokens", "num_beams",
                 "sample_rows", "gpus_per_model"):  # fmt: skip
        value, least = getattr(options, name), 0 if name == "gpus_per_model" else 1
        if value is not None and value < least:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least {least}, got {value}.")
    for name in ("object_store_gb", "stall_minutes", "price_per_hour", "mfu", "price_per_gpu_hour"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"`--{name.replace('_', '-')}` must be a positive number, got {value}.")
    for name, other in (("price_per_hour", "dry_run"), ("h100", "dry_run"), ("mfu", "h100"),
                        ("price_per_gpu_hour", "h100")):  # fmt: skip
        if getattr(options, name) and not getattr(options, other):
            raise ValueError(f"`--{name.replace('_', '-')}` needs `--{other.replace('_', '-')}`.")
    if options.h100 and (options.mfu is None or options.mfu > 1):
        raise ValueError(f"`--h100` needs an assumption, `--mfu` of at most 1, got {options.mfu}.")
    if options.address and options.object_store_gb:
        raise ValueError("`--object-store-gb` is for this machine's Ray; a cluster's is set when it is started.")
    options.embed, options.mode = sorted(set(options.embed)), sorted(set(options.mode))
    options.needs_pictures, options.needs_texts = set(options.embed) != {"text"}, "text" in options.embed
    options.data, options.output = absolute(options.data), absolute(options.output)
    if (options.output + "/").startswith(options.data.rstrip("/") + "/"):
        raise ValueError(f"`--output` must lie outside of `--data`, got {options.output!r} in {options.data!r}.")
    options.kind, options.model_version = options.source, ""
    return options


def absolute(path: str) -> str:
    """A local path as every process of this machine finds it."""
    return path if "://" in path or "::" in path else "file://" + os.path.abspath(os.path.expanduser(path))


# ---------------------------------------------------------------------------------------------------------- output


class Output:
    """The folder that is written. A file is there whole or not at all."""

    def __init__(self, url: str, storage_options: dict):
        self.url = url.rstrip("/")
        self.system, self.root = fsspec.core.url_to_fs(self.url, **storage_options)
        self.is_local = "file" in (self.system.protocol if isinstance(self.system.protocol, tuple) else ())

    def write(self, name: str, data: bytes) -> None:
        path = f"{self.root}/{name}"
        if not self.is_local:
            self.system.pipe_file(path, data)  # an object store shows an object when all of it has come
            return
        folder, _, base = path.rpartition("/")
        os.makedirs(folder, exist_ok=True)
        hidden = f"{folder}/.{base}.{uuid.uuid4().hex}.tmp"  # what readers of folders of Parquet files leave out
        with open(hidden, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)

    def write_table(self, name: str, table: pa.Table, **how: Any) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", **how)
        self.write(name, sink.getvalue().to_pybytes())

    def read(self, name: str) -> bytes | None:
        path = f"{self.root}/{name}"
        return self.system.cat_file(path) if self.system.exists(path) else None

    def read_table(self, name: str) -> pa.Table:
        data = self.read(name)
        if data is None:
            raise ValueError(f"`--output` has a manifest and no {name}; it is damaged: {self.url!r}.")
        return pq.read_table(pa.BufferReader(data))

    def parts(self, kind: str) -> set[int]:
        folder = f"{self.root}/{kind}"
        self.system.invalidate_cache()
        if not self.system.exists(folder):
            return set()
        names = [path.rpartition("/")[2] for path in self.system.ls(folder, detail=False)]
        return {int(name[5:-8]) for name in names if name.startswith("part-") and name.endswith(".parquet")}

    def remove(self, name: str) -> None:
        if self.system.exists(f"{self.root}/{name}"):
            self.system.rm_file(f"{self.root}/{name}")

    def footer(self, name: str) -> tuple[int, dict[str, int]]:
        """How many rows a part has, and the counts that were written with it."""
        with self.system.open(f"{self.root}/{name}", "rb") as file:
            metadata = pq.ParquetFile(file).metadata
        counts = (metadata.metadata or {}).get(b"counts", b"{}")
        return metadata.num_rows, json.loads(counts)

    def remove_leftovers(self) -> None:
        """Hidden files of runs that were killed while they wrote."""
        for kind in ("", "embeddings", "errors") if self.is_local else ():
            for path in Path(self.root, kind).glob(".*.tmp"):
                path.unlink()


def part(kind: str, shard: int) -> str:
    return f"{kind}/part-{shard:08}.parquet"


# -------------------------------------------------------------------------------------------------------- manifest


def model_version(options: argparse.Namespace) -> str:
    """The commit of an id on the Hub; of a folder a hash of its weights, settings and code."""
    folder = Path(options.model)
    if not folder.is_dir():
        where = {"revision": options.revision, "subfolder": options.subfolder, "trust_remote_code": True}
        return AutoConfig.from_pretrained(options.model, **where)._commit_hash
    if options.revision:
        raise ValueError(f"`--revision` is for an id on the Hub, got it with the folder {options.model!r}.")
    whole = hashlib.sha256()
    files = [
        path for path in (folder / options.subfolder).iterdir() if path.suffix in (".safetensors", ".json", ".model")
    ]
    for path in sorted([*files, *folder.glob("*.py")]):
        with path.open("rb") as file:
            whole.update(f"{path.relative_to(folder)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def hash_of(*tables: pa.Table | None) -> str:
    whole = hashlib.sha256()
    for row in (row for table in tables if table is not None for row in table.to_pylist()):
        whole.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return whole.hexdigest()


def begin(options: argparse.Namespace, output: Output) -> tuple[dict, list[dict]]:
    """The manifest and all shards: those of the run that was begun in this folder, or of a new one."""
    settings = {name: getattr(options, name) for name in SETTINGS}
    written = output.read("manifest.json")
    if written is None:
        listing = embed_sources.list_input(options)
        manifest = {
            "settings": settings | {"source": listing.source},
            "input": {
                "shards": len(listing.shards),
                "rows": known_rows(listing.shards.to_pylist()),
                "left_out": listing.left_out,
                "sha256": hash_of(listing.shards, listing.files),
            },
            "runs": [],
        }
        shards = listing.shards.to_pylist()
        if not options.dry_run:
            if output.parts("embeddings"):
                raise ValueError(f"`--output` must be empty or a run's, got parts without a manifest: {output.url!r}.")
            if listing.files is not None:
                output.write_table("files.parquet", listing.files, row_group_size=options.shard_rows)
            output.write_table("shards.parquet", listing.shards)
            write_manifest(output, manifest)
        elif listing.files is not None:
            with tempfile.NamedTemporaryFile(suffix=".parquet", delete=False) as file:
                pq.write_table(listing.files, file)
            shards = [shard | {"path": absolute(file.name)} for shard in shards]
    else:
        manifest = json.loads(written)
        settings["source"] = manifest["settings"]["source"] if options.source == "auto" else options.source
        check_same(manifest["settings"], settings, output)
        shards = output.read_table("shards.parquet")
        files = output.read_table("files.parquet") if settings["source"] == "folder" else None
        if hash_of(shards, files) != manifest["input"]["sha256"]:
            raise ValueError(f"`--output` has a listing that is not its manifest's: {output.url!r}.")
        shards = shards.to_pylist()
    options.kind = manifest["settings"]["source"]
    return manifest, shards


def check_same(before: dict, now: dict, output: Output) -> None:
    different = [name for name in SETTINGS if before[name] != now[name]]
    if different:
        changes = "; ".join(f"{name}: {before[name]!r}, now {now[name]!r}" for name in different)
        raise ValueError(f"`--output` was begun with other settings, go on with the same or take another: {changes}.")


def write_manifest(output: Output, manifest: dict) -> None:
    output.write("manifest.json", (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())


def known_rows(shards: list[dict]) -> int | None:
    """How many rows there are; nobody knows of tars."""
    return None if any(shard["stop"] is None for shard in shards) else sum(s["stop"] - s["start"] for s in shards)


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
                found |= {name: model.embed_image(seen, mode) for name, mode in MODES.items() if mode in options.mode}
            if "caption" in options.embed:
                found |= self.captions(seen)
        if inputs:
            found["text"] = model.embed_text(**inputs)
        return found

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
        return {"caption": self.model.embed_text(**texts), "caption_text": written}


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


def as_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


# --------------------------------------------------------------------------------------------------------- running


@dataclass
class Tally:
    """What the batches of this run took."""

    rows: int = 0
    waited: float = 0.0
    worked: float = 0.0
    decoded: float = 0.0
    steady: list[tuple[int, float]] = field(default_factory=list)  # rows and seconds of batches after an actor's first
    start: float = field(default_factory=time.perf_counter)

    def add(self, batch: dict) -> None:
        self.rows += batch["rows"]
        self.decoded += batch["decoded"]
        if batch["waited"] is not None:
            self.waited += batch["waited"]
            self.worked += batch["worked"]

    @property
    def model_waits(self) -> float:
        """The share of an actor's time between its first batch and its last in which it had none."""
        return self.waited / (self.waited + self.worked) if self.worked else 0.0

    @property
    def rate(self) -> float:
        return self.rows / (time.perf_counter() - self.start)


def start_ray(options: argparse.Namespace) -> None:
    """Join the cluster, or start Ray here with a CPU for every model and at least one to decode."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    quiet = {"include_dashboard": False, "logging_level": logging.WARNING} if not options.address else {}
    if options.address:
        ray.init(address=options.address, logging_level=logging.WARNING)
    else:
        needed = (options.models or 1) * options.cpus_per_model + 1
        store = int(options.object_store_gb * 1e9) if options.object_store_gb else None
        ray.init("local", num_cpus=max(needed, os.cpu_count() or 1), object_store_memory=store, **quiet)


def place_models(options: argparse.Namespace, is_first: bool = True) -> None:
    """
    How many GPUs a model gets, and how many models there are; after the first time as many as there still is room for.

    Raises:
        ValueError: the cluster has too little.
    """
    there = ray.cluster_resources()
    gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 0))
    if options.gpus_per_model is None:
        options.gpus_per_model = min(gpus, 1)
    each = options.gpus_per_model
    room = min((cpus - 1) // options.cpus_per_model, gpus // each if each else cpus)
    options.pool = options.models or (gpus // each if each else 1)
    if not is_first:
        options.pool = min(options.pool, room)
    if not 1 <= options.pool <= room:
        wanted = f"{options.pool or 1} with {each} GPUs and {options.cpus_per_model} CPUs each, and a CPU to decode"
        raise ValueError(f"`--models` must fit into the cluster of {gpus} GPUs and {cpus} CPUs, got {wanted}.")


def batches_of(shards: list[dict], options: argparse.Namespace) -> Iterator[dict]:
    """What `Embed` makes of all shards, in any order."""
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = options.stall_minutes * 60
    context.target_max_block_size = options.batch_bytes  # a batch is a block: the first goes out before the second
    dataset = ray.data.from_items(shards, override_num_blocks=min(len(shards), MAX_TASKS))
    # Without arguments that only a function knows, Ray would join the steps, and the actors would decode.
    dataset = dataset.flat_map(
        decode,
        fn_kwargs={"options": options},
        num_cpus=1,
        concurrency=options.decoders,
        ray_remote_args_fn=lambda: {"max_retries": DECODE_RETRIES},
    )
    dataset = dataset.map(
        Embed,
        fn_constructor_args=(options,),
        compute=ActorPoolStrategy(size=options.pool),
        num_cpus=options.cpus_per_model,
        num_gpus=options.gpus_per_model,
    )
    return dataset.iter_rows()


class Writer:
    """Collects the batches of each shard, which come in any order, and writes it when all are there."""

    def __init__(self, output: Output):
        self.output, self.open, self.pool = output, {}, ThreadPoolExecutor(WRITERS)
        self.pending: list[Future] = []
        self.written = 0

    def add(self, batch: dict) -> None:
        batches = self.open.setdefault(batch["shard"], {})
        batches[batch["chunk"]] = batch
        last = max(batches)
        if batches[last]["rows"] or len(batches) <= last:  # the last one is empty
            return
        del self.open[batch["shard"]]
        self.pending.append(
            self.pool.submit(write_part, self.output, batch["shard"], [batches[i] for i in range(last)])
        )
        while len(self.pending) > 2 * WRITERS or (self.pending and self.pending[0].done()):
            self.pending.pop(0).result()
            self.written += 1

    def finish(self) -> None:
        self.pool.shutdown()
        for future in self.pending:
            future.result()
            self.written += 1
        self.pending = []


def write_part(output: Output, shard: int, batches: list[dict]) -> None:
    """Errors first: with the embeddings the shard is done."""
    tables = [pa.ipc.open_stream(batch["table"]).read_all() for batch in batches if batch["table"]]
    errors = [error for batch in batches for error in json.loads(batch["errors"])]
    table = pa.concat_tables(tables) if tables else pa.table({"id": pa.array([], pa.string())})
    counts = {"rows": sum(batch["rows"] for batch in batches), "errors": len(errors)}
    if len(table) + len(errors) != counts["rows"]:
        raise RuntimeError(f"Shard {shard}: {len(table)} rows and {len(errors)} errors of {counts['rows']} rows.")
    if errors:
        output.write_table(part("errors", shard), pa.Table.from_pylist(errors, ERRORS))
    else:
        output.remove(part("errors", shard))  # of an attempt that had some
    output.write_table(part("embeddings", shard), table.replace_schema_metadata({"counts": json.dumps(counts)}))


def embed_all(shards: list[dict], options: argparse.Namespace, output: Output, tally: Tally) -> None:
    """
    Embed what is not there yet. Ray replaces workers that die and does their work again; where it cannot, as when a
    machine is gone for good and with it the place of an actor, everything is placed anew on what is left.
    """
    for attempt in count():
        done = output.parts("embeddings")
        missing = [shard for shard in shards if shard["shard"] not in done]
        if not missing:
            return
        place_models(options, is_first=attempt == 0)
        writer, shown = Writer(output), time.perf_counter()
        try:
            for batch in batches_of(missing, options):
                tally.add(batch)
                writer.add(batch)
                if time.perf_counter() - shown > 30:
                    shown = time.perf_counter()
                    say(f"{len(done) + writer.written} of {len(shards)} shards, {tally.rate:.1f} rows/s, "
                        f"the models wait {tally.model_waits:.1%} of the time")  # fmt: skip
        except ray.exceptions.RayTaskError:
            raise
        except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
            writer.finish()
            if output.parts("embeddings") <= done:
                raise
            say(f"{type(error).__name__}: {str(error)[:300]}\nGoing on with what is left of the cluster.")
        finally:
            writer.finish()


def say(text: str) -> None:
    print(text, flush=True)


# ------------------------------------------------------------------------------------------------------ the result


def check_counts(shards: list[dict], output: Output) -> dict:
    """
    Read the footers of all parts.

    Raises:
        RuntimeError: a part is missing or one too many, or rows in are not rows out and errors.
    """
    wanted, parts, errors = {s["shard"]: s for s in shards}, output.parts("embeddings"), output.parts("errors")
    if parts != set(wanted) or not errors <= parts:
        raise RuntimeError(
            f"{output.url} must have {len(wanted)} parts, got others: {sorted(parts ^ set(wanted))[:5]}."
        )

    def of_part(shard: int) -> tuple[int, int, int]:
        out, counts = output.footer(part("embeddings", shard))
        bad = output.footer(part("errors", shard))[0] if shard in errors else 0
        rows = known_rows([wanted[shard]])
        rows = counts["rows"] if rows is None else rows
        if not rows == counts["rows"] == out + bad or bad != counts["errors"]:
            raise RuntimeError(f"{output.url}: shard {shard} of {rows} rows has {out} rows and {bad} errors.")
        return rows, out, bad

    with ThreadPoolExecutor(WRITERS) as pool:
        totals = [sum(column) for column in zip(*pool.map(of_part, wanted))]
    return dict(zip(("rows", "embedded", "errors"), totals))


def reasons(output: Output, most: int = 5) -> Iterable[str]:
    for shard in sorted(output.parts("errors"))[:1]:
        for row in output.read_table(part("errors", shard)).slice(0, most).to_pylist():
            yield f"  {row['id']}: {row['reason'][:120]}"


def run(options: argparse.Namespace) -> dict:
    """Embed what there is to embed. Returns the manifest."""
    transformers_logging.disable_progress_bar()
    options.model = os.path.abspath(options.model) if os.path.isdir(options.model) else options.model
    options.model_version = model_version(options)
    revision = {} if os.path.isdir(options.model) else {"revision": options.model_version}
    options.where = {"subfolder": options.subfolder, **revision}
    options.needs_queries = "caption" in options.embed or (
        "image" in options.embed and MODES["image_g"] in options.mode
    )
    processor = load_processor(options)
    config = AutoConfig.from_pretrained(options.model, trust_remote_code=True, **options.where)
    stored = str(config.dtype or "float32").removeprefix("torch.")
    options.dtype = stored if options.dtype == "auto" else options.dtype
    size = processor.image_processor.crop_size["height"]
    pixels = 3 * size * size * getattr(torch, options.dtype).itemsize if options.needs_pictures else 0
    options.batch_bytes = max(options.batch_size * pixels, 1)
    output = Output(options.output, options.output_options)
    manifest, shards = begin(options, output)
    say(f"{len(shards)} shards of {options.kind}, {manifest['input']['rows'] or 'an unknown number of'} rows; "
        f"not read: {manifest['input']['left_out'] or 'nothing'}")  # fmt: skip
    try:
        start_ray(options)
        if options.dry_run:
            return dry_run(shards, options)
        return embed_and_account(manifest, shards, options, output)
    finally:
        ray.shutdown()


def embed_and_account(manifest: dict, shards: list[dict], options: argparse.Namespace, output: Output) -> dict:
    already, tally = len(output.parts("embeddings")), Tally()
    manifest["runs"].append({"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "versions": versions()})
    if len({json.dumps(each["versions"], sort_keys=True) for each in manifest["runs"]}) > 1:
        say("Other versions of packages than in an earlier run on this folder; manifest.json lists them.")
    write_manifest(output, manifest)
    if already:
        say(f"Going on: {already} of {len(shards)} shards are there.")
    embed_all(shards, options, output, tally)
    counts = check_counts(shards, output)
    output.remove_leftovers()
    seconds = time.perf_counter() - tally.start
    manifest["runs"][-1] |= {
        "rows": tally.rows, "seconds": round(seconds, 1), "models": options.pool,
        "model_waits": round(tally.model_waits, 4),
    }  # fmt: skip
    manifest["result"] = counts
    write_manifest(output, manifest)
    say(f"{counts['rows']} rows = {counts['embedded']} embedded + {counts['errors']} errors")
    if counts["errors"]:
        say("\n".join(reasons(output)))
    if tally.rows:
        say(f"{tally.rows} rows in {seconds:.0f} s; the models waited {tally.model_waits:.1%} of the time")
    return manifest


def dry_run(shards: list[dict], options: argparse.Namespace) -> dict:
    """Embed rows of some shards from all over the input, and write nothing."""
    step = max(len(shards) // SAMPLED_SHARDS, 1)
    chosen = shards[::step][:SAMPLED_SHARDS]
    limit = math.ceil(options.sample_rows / len(chosen))
    place_models(options)
    batches = list(batches_of([shard | {"limit": limit} for shard in chosen], options))
    found = embed_costs.estimate(shards, batches, options, int(ray.cluster_resources()["CPU"]))
    for line in embed_costs.lines(found, options):
        say(line)
    return found


def main(arguments: list[str] | None = None) -> dict:
    for module in (embed_sources, embed_costs, sys.modules[__name__]):  # which the other machines do not have
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        return run(parse(arguments))
    except KeyboardInterrupt:
        say("Interrupted. The same command goes on from what is written.")
        raise SystemExit(130) from None
    except (ValueError, TypeError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
