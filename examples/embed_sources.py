"""Reads the input of embed_dataset.py: folders, Parquet files and WebDataset tars, in shards of bounded size.

A shard is a range of rows of a Parquet file, or a whole tar. A folder is listed in a Parquet file of paths, written
once, so that a resumed run reads the same rows. All paths are fsspec URLs, also on the local disk: `file:///...`.
"""

import json
import re
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import decoding
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
ENDINGS = {"parquet": (".parquet", ".pq"), "webdataset": (".tar", ".tar.gz", ".tgz")}
DAMAGED = (*decoding.DAMAGED, tarfile.TarError)
ATTEMPTS, CONNECTIONS = 3, 16
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError)  # trying again does not help
SHARDS = pa.schema([("shard", pa.int64()), ("path", pa.string()), ("name", pa.string()), ("start", pa.int64()),
                    ("stop", pa.int64()), ("bytes", pa.int64())])  # fmt: skip
FILES = pa.schema([("id", pa.string()), ("image", pa.string()), ("text", pa.string())])


class Row(NamedTuple):
    """An input row. `image` is encoded, or a URL; `error` says what went wrong; `end` is the byte after it in a tar."""

    id: str
    image: Any = None
    text: Any = None
    error: str = ""
    end: int = 0


class Listing(NamedTuple):
    """The input: its kind, its shards, the files of a folder, and how many other files there are by their ending."""

    source: str
    shards: pa.Table
    files: pa.Table | None
    left_out: dict[str, int]


# --------------------------------------------------------------------------------------------------------- listing


def list_input(options: Any) -> Listing:
    """List what the input holds.

    Args:
        options: of embed_dataset.py.

    Raises:
        ValueError: there is no input, several kinds of files, or a column is missing or of the wrong type.
    """
    system, root = fsspec.core.url_to_fs(options.data, **options.storage_options)
    infos = system.glob(root, detail=True) if "*" in root else system.find(root, detail=True)
    # fsspec describes a single file on the web by an empty dict.
    sizes = {path: info.get("size") or 0 for path, info in sorted(infos.items()) if info.get("type") != "directory"}
    if not sizes:
        raise ValueError(f"`--data` must be a file, a folder or a pattern with `*`, got nothing in {options.data!r}.")
    source = options.source if options.source != "auto" else guess_source(list(sizes), options.data)
    if source != "folder":
        endings = ENDINGS[source]
    else:
        endings = tuple(f".{each}" for each in IMAGES) if options.needs_images else (".txt",)
    chosen = [path for path in sizes if path.lower().endswith(endings)]
    if not chosen:
        raise ValueError(f"`--data` must hold {' or '.join(endings)} files, got none in {options.data!r}.")
    base = root if system.isdir(root) else root.rpartition("/")[0]
    base = base.partition("*")[0].rpartition("/")[0] if "*" in base else base
    names = {path: path.removeprefix(base).lstrip("/") for path in chosen}
    used, files = set(chosen), None
    if source == "folder":
        texts = {path for path in sizes if path.endswith(".txt")} if options.needs_texts else set()
        used |= texts
        files = list_files(system, names, texts, options)
        place = {"path": f"{options.output.rstrip('/')}/files.parquet", "name": options.data}
        inputs = [(place, len(files), sum(sizes[path] for path in chosen))]
    else:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            count = (lambda path: count_rows(system, path, options)) if source == "parquet" else (lambda path: None)
            counts = list(pool.map(count, chosen))
        places = [{"path": system.unstrip_protocol(path), "name": names[path]} for path in chosen]
        inputs = zip(places, counts, [sizes[path] for path in chosen])
    ranges = [place | each for place, rows, size in inputs for each in split(rows, options.shard_rows, size)]
    if not ranges:
        raise ValueError("`--data` must hold rows, got files with none.")
    shards = pa.Table.from_pylist([{"shard": number, **each} for number, each in enumerate(ranges)], SHARDS)
    left_out = Counter(PurePosixPath(path).suffix.lower() for path in sizes if path not in used)
    return Listing(source, shards, files, dict(left_out))


def guess_source(paths: list[str], data: str) -> str:
    kinds = [kind for kind, endings in ENDINGS.items() if any(path.lower().endswith(endings) for path in paths)]
    if len(kinds) > 1:
        raise ValueError(f"`--source` must say which files to read: {data!r} has both {' and '.join(kinds)}.")
    return kinds[0] if kinds else "folder"


def split(rows: int | None, size: int, nbytes: int) -> list[dict]:
    """Ranges of at most `size` rows with their share of the bytes; a tar, whose number of rows is unknown, is one."""
    if rows is None:
        return [{"start": 0, "stop": None, "bytes": nbytes}]
    ranges = [(start, min(start + size, rows)) for start in range(0, rows, size)]
    return [{"start": start, "stop": stop, "bytes": nbytes * (stop - start) // rows} for start, stop in ranges]


def list_files(system: Any, names: dict[str, str], texts: set[str], options: Any) -> pa.Table:
    """Images and the texts beside them, such as `a/b.png` and `a/b.txt`; for texts alone only those."""
    rows = []
    for path, name in names.items():
        beside = path.removesuffix(PurePosixPath(path).suffix) + ".txt"
        text = system.unstrip_protocol(beside) if beside in texts else None
        rows.append(
            {"id": name, "image": system.unstrip_protocol(path) if options.needs_images else None, "text": text}
        )
    return pa.Table.from_pylist(rows, FILES)


def count_rows(system: Any, path: str, options: Any) -> int:
    """The number of rows in the footer of a Parquet file, whose columns this checks."""
    try:
        with system.open(path, "rb") as file:
            footer = pq.ParquetFile(file)
            schema, rows = footer.schema_arrow, footer.metadata.num_rows
    except pa.ArrowInvalid as error:
        raise ValueError(f"`--data` must hold Parquet files that can be read, got {path}: {error}") from None
    is_string = (pa.types.is_string, pa.types.is_large_string)
    is_image = (pa.types.is_binary, pa.types.is_large_binary, *is_string, pa.types.is_struct)
    for option, column, fitting in (
        ("image", options.image_column if options.needs_images else "", is_image),
        ("text", options.text_column if options.needs_texts else "", is_string),
        ("id", options.id_column, (*is_string, pa.types.is_integer)),
    ):
        if column and column not in schema.names:
            raise ValueError(f"`--{option}-column` must be one of {schema.names}, those of {path}, got {column!r}.")
        kind = schema.field(column).type if column else None
        if column and not any(fits(kind) for fits in fitting):
            wanted = ", ".join(fits.__name__.removeprefix("is_").replace("_", " ") for fits in fitting)
            raise ValueError(f"`--{option}-column` must hold {wanted}; {column!r} of {path} holds {kind}.")
    return rows


# --------------------------------------------------------------------------------------------------------- reading


def read_shard(shard: dict, options: Any) -> Iterator[Row]:
    """All rows of a shard, always in the same order; a row that cannot be read has an error."""
    if "files" in shard:  # a dry run writes no list of files
        yield from (Row(**file) for file in json.loads(shard["files"]))
    elif shard["stop"] is None:
        yield from persistently(lambda: read_tar(shard, options), lambda row: shard["name"], None)
    else:
        name, start, length = shard["name"], shard["start"], shard["stop"] - shard["start"]
        yield from persistently(lambda: read_rows(shard, options), lambda row: f"{name}:{start + row}", length)


def persistently(read: Callable[[], Iterator[Row]], name: Callable[[int], str], length: int | None) -> Iterator[Row]:
    """The rows of `read`, which is called again when it breaks off. If it makes no progress, the missing rows become
    errors; a tar, whose number of rows is unknown, gets one error.
    """
    seen, failures, reason = 0, 0, "the file has fewer rows than when it was listed"
    while failures < ATTEMPTS:
        try:
            for row in islice(read(), seen, length):
                yield row
                seen, failures = seen + 1, 0
            break
        except DAMAGED as error:
            reason = f"cannot be read from here on: {type(error).__name__}: {error}"
            failures = ATTEMPTS if isinstance(error, PERMANENT) else failures + 1
            time.sleep(failures % ATTEMPTS)
    else:
        length = seen + 1 if length is None else length
    for row in range(seen, length or seen):
        yield Row(name(row), error=reason)


def read_rows(shard: dict, options: Any) -> Iterator[Row]:
    """Rows `start` to `stop` of a Parquet file, with only a few pages in memory."""
    is_listing = options.kind == "folder"
    names = ("id", "image", "text") if is_listing else (options.id_column, options.image_column, options.text_column)
    wanted = (bool(names[0]), options.needs_images, options.needs_texts)
    columns = [column if needed else "" for column, needed in zip(names, wanted)]
    storage_options = options.output_options if is_listing else options.storage_options
    with fsspec.open(shard["path"], "rb", **storage_options) as file:
        parquet, first = pq.ParquetFile(file, buffer_size=1 << 20), 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if first + rows <= shard["start"]:
                first += rows
                continue
            for batch in parquet.iter_batches(64, row_groups=[group], columns=[each for each in columns if each]):
                low, high = max(shard["start"] - first, 0), min(shard["stop"] - first, batch.num_rows)
                if low < high:
                    for index, cells in enumerate(batch.slice(low, high - low).to_pylist(), first + low):
                        yield row_of([cells.get(column) for column in columns], index, shard, columns)
                first += batch.num_rows
                if first >= shard["stop"]:
                    return


def row_of(cells: list, index: int, shard: dict, columns: list[str]) -> Row:
    key, image, text = cells
    place = f"{shard['name']}:{index}"
    if columns[0] and key is None:
        return Row(place, error=f"no id in column {columns[0]!r}")
    if isinstance(image, dict):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(image, str) and "://" not in image and not image.startswith("/"):
        image = shard["path"].rpartition("/")[0] + "/" + image
    return Row(str(key) if columns[0] else place, image, text)


def read_tar(shard: dict, options: Any) -> Iterator[Row]:
    """Consecutive members with the same name up to the first dot are one row."""
    key, members = None, {}
    with (
        fsspec.open(shard["path"], "rb", **options.storage_options) as file,
        tarfile.open(fileobj=file, mode="r|*") as tar,
    ):
        for member in tar:
            if not member.isfile():
                continue
            named = re.fullmatch(r"((?:.*/)?[^/.]+)\.([^/]+)", member.name)
            if not named:
                yield Row(member.name, error="no name and ending: a member must be named KEY.ENDING")
                continue
            if named[1] != key:
                if key is not None:
                    yield row_of_members(key, members, options)._replace(end=member.offset)
                key, members = named[1], {}
            if named[2].lower() in members:
                members["error"] = f"two members {member.name!r}"
            members[named[2].lower()] = tar.extractfile(member).read()
            tar.members = []  # it would keep all of them
        if key is not None:
            yield row_of_members(key, members, options)._replace(end=tar.offset)


def row_of_members(key: str, members: dict[str, Any], options: Any) -> Row:
    if "error" in members:
        return Row(key, error=members["error"])
    image = next((members[each] for each in IMAGES if each in members), None)
    text = members.get("txt")
    try:
        if text is None and "json" in members and options.needs_texts:
            text = json.loads(members["json"]).get(options.text_column)
        return Row(key, image, text.decode() if isinstance(text, bytes) else text)
    except (ValueError, AttributeError) as error:
        return Row(key, error=f"text: {type(error).__name__}: {error}")


def fetch(row: Row, options: Any) -> Row:
    """The row with the content of its URLs."""
    try:
        image, text = row.image, row.text
        if isinstance(image, str) and options.needs_images:
            image = read_file(image, options)
        if options.kind == "folder" and text is not None:
            text = read_file(text, options).decode()
        return row._replace(image=image, text=text)
    except DAMAGED as error:
        return row._replace(error=f"cannot be read: {type(error).__name__}: {error}")


def read_file(url: str, options: Any) -> bytes:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with fsspec.open(url, "rb", **options.storage_options) as file:
                return file.read()
        except OSError as error:
            if attempt == ATTEMPTS or isinstance(error, PERMANENT):
                raise
            time.sleep(attempt)
    raise AssertionError
