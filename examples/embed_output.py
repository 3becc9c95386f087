"""Writes the output of embed_dataset.py: parts that are there whole or not at all, and the manifest of all runs."""

import argparse
import hashlib
import json
import os
import platform
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import embed_sources
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from transformers import AutoConfig

SETTINGS = (
    "model", "subfolder", "model_version", "dtype", "embed", "mode", "crop", "embeddings", "truncate", "batch_size",
    "prompt", "max_new_tokens", "num_beams", "data", "source", "shard_rows", "image_column", "text_column", "id_column",
)  # fmt: skip
MODULES = ("*_internvl.py", "*_intern_vit.py", "*_qllama.py")
PACKAGES = ("torch", "transformers", "ray", "pyarrow", "pillow", "safetensors")
ERRORS = pa.schema([("id", pa.string()), ("source", pa.string()), ("reason", pa.string())])
WRITERS = 8


class Output:
    """The output folder. A file is there whole or not at all."""

    def __init__(self, url: str, storage_options: dict):
        self.url = url.rstrip("/")
        self.system, self.root = fsspec.core.url_to_fs(self.url, **storage_options)
        self.is_local = isinstance(self.system, LocalFileSystem)

    def write(self, name: str, data: bytes) -> None:
        path = f"{self.root}/{name}"
        if not self.is_local:
            self.system.pipe_file(path, data)  # an object store shows an object when it is complete
            return
        folder, _, base = path.rpartition("/")
        os.makedirs(folder, exist_ok=True)
        hidden = f"{folder}/.{base}.{uuid.uuid4().hex}.tmp"  # readers of folders of Parquet files skip hidden files
        with open(hidden, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)

    def write_json(self, name: str, content: dict) -> None:
        self.write(name, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())

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
        """The number of rows of a part, and the counts that were written with it."""
        with self.system.open(f"{self.root}/{name}", "rb") as file:
            metadata = pq.ParquetFile(file).metadata
        counts = (metadata.metadata or {}).get(b"counts", b"{}")
        return metadata.num_rows, json.loads(counts)

    def remove_leftovers(self) -> None:
        """Remove the hidden files of runs that were killed while writing."""
        for kind in ("", "embeddings", "errors") if self.is_local else ():
            for path in Path(self.root, kind).glob(".*.tmp"):
                path.unlink()


# ----------------------------------------------------------------------------------------------------------- parts


def part(kind: str, shard: int) -> str:
    return f"{kind}/part-{shard:08}.parquet"


class Writer:
    """Collects the batches of each shard, which arrive in any order, and writes the shard when it is complete."""

    def __init__(self, output: Output, schema: pa.Schema):
        self.output, self.schema, self.open, self.pool = output, schema, {}, ThreadPoolExecutor(WRITERS)
        self.pending: list[Future] = []
        self.written = 0

    def add(self, batch: dict) -> None:
        batches = self.open.setdefault(batch["shard"], {})
        batches[batch["chunk"]] = batch
        last = max(batches)
        if batches[last]["rows"] or len(batches) <= last:  # the last one is empty
            return
        del self.open[batch["shard"]]
        in_order = [batches[chunk] for chunk in range(last)]
        self.pending.append(self.pool.submit(write_part, self.output, self.schema, batch["shard"], in_order))
        while len(self.pending) > 2 * WRITERS or (self.pending and self.pending[0].done()):
            self.finish_first()

    def finish_first(self) -> None:
        self.pending.pop(0).result()
        self.written += 1

    def finish(self) -> None:
        self.pool.shutdown()
        while self.pending:
            self.finish_first()


def write_part(output: Output, schema: pa.Schema, shard: int, batches: list[dict]) -> None:
    """Write the errors first, because the embeddings mark the shard as done."""
    tables = [pa.ipc.open_stream(batch["table"]).read_all() for batch in batches if batch["table"]]
    errors = [error for batch in batches for error in json.loads(batch["errors"])]
    table = pa.concat_tables([schema.empty_table(), *tables])  # has its columns even if all rows are errors
    counts = {"rows": sum(batch["rows"] for batch in batches), "errors": len(errors)}
    if len(table) + len(errors) != counts["rows"]:
        raise RuntimeError(f"Shard {shard}: {len(table)} rows and {len(errors)} errors of {counts['rows']} rows.")
    if errors:
        output.write_table(part("errors", shard), pa.Table.from_pylist(errors, ERRORS))
    else:
        output.remove(part("errors", shard))  # of an earlier attempt
    output.write_table(part("embeddings", shard), table.replace_schema_metadata({"counts": json.dumps(counts)}))


def check_counts(shards: list[dict], output: Output) -> dict[str, int]:
    """Count the rows in the footers of all parts.

    Raises:
        RuntimeError: parts are missing or too many, or input rows differ from output rows + errors.
    """
    wanted, parts, errors = {s["shard"]: s for s in shards}, output.parts("embeddings"), output.parts("errors")
    if parts != set(wanted) or not errors <= parts:
        raise RuntimeError(
            f"{output.url} must have {len(wanted)} parts, got others: {sorted(parts ^ set(wanted))[:5]}."
        )

    def count(shard: int) -> tuple[int, int, int]:
        out, counts = output.footer(part("embeddings", shard))
        bad = output.footer(part("errors", shard))[0] if shard in errors else 0
        rows = known_rows([wanted[shard]])
        rows = counts["rows"] if rows is None else rows
        if not rows == counts["rows"] == out + bad or bad != counts["errors"]:
            raise RuntimeError(f"{output.url}: shard {shard} of {rows} rows has {out} rows and {bad} errors.")
        return rows, out, bad

    with ThreadPoolExecutor(WRITERS) as pool:
        totals = [sum(column) for column in zip(*pool.map(count, wanted))]
    return dict(zip(("rows", "embedded", "errors"), totals))


def first_errors(output: Output, most: int = 5) -> Iterator[str]:
    for shard in sorted(output.parts("errors"))[:1]:
        for row in output.read_table(part("errors", shard)).slice(0, most).to_pylist():
            yield f"  {row['id']}: {row['reason'][:120]}"


# -------------------------------------------------------------------------------------------------------- manifest


def model_version(options: argparse.Namespace) -> str:
    """The commit of a Hub id; for a folder a hash of its weights, settings and modules."""
    folder = Path(options.model)
    if not folder.is_dir():
        where = {"revision": options.revision, "subfolder": options.subfolder, "trust_remote_code": True}
        commit = AutoConfig.from_pretrained(options.model, **where)._commit_hash
        if not commit:
            raise ValueError(f"`--model` must be a folder or an id on the Hub with a commit, got {options.model!r}.")
        return commit
    if options.revision:
        raise ValueError(f"`--revision` is for an id on the Hub, got it with the folder {options.model!r}.")
    whole = hashlib.sha256()
    kinds = (".safetensors", ".json", ".model")
    files = [path for path in (folder / options.subfolder).iterdir() if path.suffix in kinds]
    # A clone may also hold the user's own scripts, which are not the model's.
    modules = [path for pattern in MODULES for path in folder.glob(pattern)]
    for path in sorted([*files, *modules]):
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
    """The manifest and all shards: of the earlier run in this folder, or of a new one."""
    settings = {name: getattr(options, name) for name in SETTINGS}
    written = output.read("manifest.json")
    if written is not None:
        manifest = json.loads(written)
        options.kind = manifest["settings"]["source"]
        settings["source"] = options.kind if options.source == "auto" else options.source
        check_same(manifest["settings"], settings)
        names = ("shards.parquet", "files.parquet") if options.kind == "folder" else ("shards.parquet",)
        tables = [output.read_table(name) for name in names]
        if hash_of(*tables) != manifest["input"]["sha256"]:
            raise ValueError(f"`--output` has a listing that does not belong to its manifest: {output.url!r}.")
        return manifest, tables[0].to_pylist()
    listing = embed_sources.list_input(options)
    options.kind, shards = listing.source, listing.shards.to_pylist()
    about = {"shards": len(shards), "rows": known_rows(shards), "left_out": listing.left_out}
    about["sha256"] = hash_of(listing.shards, listing.files)
    manifest = {"settings": settings | {"source": listing.source}, "input": about, "runs": []}
    if options.dry_run:
        options.files = listing.files
        return manifest, shards
    if output.parts("embeddings"):
        raise ValueError(f"`--output` must be empty or a run's, got parts without a manifest: {output.url!r}.")
    if listing.files is not None:
        output.write_table("files.parquet", listing.files, row_group_size=options.shard_rows)
    output.write_table("shards.parquet", listing.shards)
    output.write_json("manifest.json", manifest)
    return manifest, shards


def check_same(before: dict, now: dict) -> None:
    same = [name for name in SETTINGS if name != "model"]  # a model may move: its version counts
    different = [name for name in same if before[name] != now[name]]
    if different:
        changes = "; ".join(f"{name}: {before[name]!r}, now {now[name]!r}" for name in different)
        raise ValueError(f"`--output` was begun with other settings; use the same, or another folder: {changes}.")


def known_rows(shards: list[dict]) -> int | None:
    """The number of rows; None with tars, where it is unknown."""
    return None if any(shard["stop"] is None for shard in shards) else sum(s["stop"] - s["start"] for s in shards)
