"""What examples/embed_dataset.py reads: folders, Parquet files and WebDataset tars, in shards of bounded size.

A shard is a range of rows of a Parquet file, or a whole tar. A folder becomes a Parquet file too, of paths, which is
written once: whoever resumes reads the same rows. All paths are URLs of fsspec, on the disk too: `file:///...`.
"""

import io
import json
import re
import struct
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
ENDINGS = {"parquet": (".parquet", ".pq"), "webdataset": (".tar", ".tar.gz", ".tgz")}
# What the readers of pictures, tars and pages raise for damaged ones.
DAMAGED = (
    OSError, ValueError, ArithmeticError, EOFError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError,
    struct.error, zlib.error, tarfile.TarError, Image.DecompressionBombError,
)  # fmt: skip
MAX_PIXELS, MAX_ASPECT = 178_000_000, 50  # a narrow picture grows without bound when its shorter side is resized
ATTEMPTS, CONNECTIONS = 3, 16
GONE = (FileNotFoundError, PermissionError, IsADirectoryError)  # trying again does not help
SHARDS = pa.schema([("shard", pa.int64()), ("path", pa.string()), ("name", pa.string()), ("start", pa.int64()),
                    ("stop", pa.int64()), ("bytes", pa.int64())])  # fmt: skip
FILES = pa.schema([("id", pa.string()), ("image", pa.string()), ("text", pa.string())])


class Row(NamedTuple):
    """
    What was read of a row. `image` is encoded, or the place where it is; `error` says why there is nothing; `end` is
    the byte of the tar behind it.
    """

    id: str
    image: Any = None
    text: Any = None
    error: str = ""
    end: int = 0


class Listing(NamedTuple):
    """The input: its kind, its shards, for a folder its files, and which files are no input, by their ending."""

    source: str
    shards: pa.Table
    files: pa.Table | None
    left_out: dict[str, int]


# --------------------------------------------------------------------------------------------------------- listing


def list_input(options: Any) -> Listing:
    """
    Args:
        options: of examples/embed_dataset.py.

    Raises:
        ValueError: nothing there, several kinds of files, or a column that is missing or of a wrong type.
    """
    system, root = fsspec.core.url_to_fs(options.data, **options.storage_options)
    found = {path: info["size"] or 0 for path, info in sorted(find(system, root).items())}
    if not found:
        raise ValueError(f"`--data` must be a file, a folder or a pattern with `*`, got nothing in {options.data!r}.")
    source = options.source if options.source != "auto" else guess(list(found), options.data)
    base = root if system.isdir(root) else root.rpartition("/")[0]
    base = base.partition("*")[0].rpartition("/")[0] if "*" in base else base

    def name(path: str) -> str:
        return path.removeprefix(base).lstrip("/")

    if source == "folder":
        return list_folder(system, found, name, options)
    chosen = [path for path in found if path.lower().endswith(ENDINGS[source])]
    if not chosen:
        raise ValueError(f"`--data` must hold {' or '.join(ENDINGS[source])} files, got none in {options.data!r}.")
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        count = (lambda path: count_rows(system, path, options)) if source == "parquet" else (lambda path: None)
        counts = list(pool.map(count, chosen))
    ranges = [
        {"path": system.unstrip_protocol(path), "name": name(path), "start": start, "stop": stop, "bytes": size}
        for path, rows in zip(chosen, counts)
        for start, stop, size in split(rows, options.shard_rows, found[path])
    ]
    left_out = Counter(ending(path) for path in found if path not in set(chosen))
    return Listing(source, numbered(ranges), None, dict(left_out))


def find(system: Any, root: str) -> dict[str, dict]:
    if "*" in root:
        return {path: info for path, info in system.glob(root, detail=True).items() if info["type"] == "file"}
    return system.find(root, detail=True)


def ending(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def guess(paths: list[str], data: str) -> str:
    kinds = [kind for kind, endings in ENDINGS.items() if any(path.lower().endswith(endings) for path in paths)]
    if len(kinds) > 1:
        raise ValueError(f"`--source` must say which files are meant: {data!r} has both, {' and '.join(kinds)}.")
    return kinds[0] if kinds else "folder"


def split(rows: int | None, size: int, nbytes: int) -> Iterator[tuple[int, int | None, int]]:
    """Ranges of at most `size` rows with their share of the bytes; a tar, whose rows are not known, is one."""
    if rows is None:
        yield 0, None, nbytes
        return
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        yield start, stop, nbytes * (stop - start) // rows


def numbered(ranges: list[dict]) -> pa.Table:
    if not ranges:
        raise ValueError("`--data` must hold rows, got files with none.")
    return pa.Table.from_pylist([{"shard": shard, **each} for shard, each in enumerate(ranges)], SHARDS)


def list_folder(system: Any, found: dict[str, int], name: Callable[[str], str], options: Any) -> Listing:
    """Pictures, and the texts beside them: `a/b.png` and `a/b.txt`. For texts alone, those."""
    endings = {"." + each for each in PICTURES} if options.needs_pictures else {".txt"}
    texts = {path.removesuffix(".txt") for path in found if path.endswith(".txt")} if options.needs_texts else set()
    chosen = [path for path in found if ending(path) in endings]
    if not chosen:
        raise ValueError(f"`--data` must hold {', '.join(sorted(endings))} files, got none in {options.data!r}.")
    rows = []
    for path in chosen:
        stem = path.removesuffix(PurePosixPath(path).suffix)
        text = system.unstrip_protocol(stem + ".txt") if stem in texts else None
        image = system.unstrip_protocol(path) if options.needs_pictures else None
        rows.append({"id": name(path), "image": image, "text": text})
    used = set(chosen) | {path for path in found if path.endswith(".txt") and options.needs_texts}
    place = {"path": f"{options.output.rstrip('/')}/files.parquet", "name": options.data}
    size = sum(found[path] for path in chosen)
    ranges = [
        {"start": start, "stop": stop, "bytes": share, **place}
        for start, stop, share in split(len(rows), options.shard_rows, size)
    ]
    left_out = Counter(ending(path) for path in found if path not in used)
    return Listing("folder", numbered(ranges), pa.Table.from_pylist(rows, FILES), dict(left_out))


def count_rows(system: Any, path: str, options: Any) -> int:
    """From the footer, which also tells whether the columns are there."""
    try:
        with system.open(path, "rb") as file:
            footer = pq.ParquetFile(file)
            schema, rows = footer.schema_arrow, footer.metadata.num_rows
    except pa.ArrowInvalid as error:
        raise ValueError(f"`--data` must hold Parquet files that can be read, got {path}: {error}") from None
    is_string = (pa.types.is_string, pa.types.is_large_string)
    is_bytes = (pa.types.is_binary, pa.types.is_large_binary)
    for option, column, fitting in (
        ("image", options.image_column if options.needs_pictures else "", (*is_bytes, *is_string, pa.types.is_struct)),
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
    """All rows of a shard, in an order that is always the same; what cannot be read comes as a row with an error."""
    if "files" in shard:  # of a dry run, which writes no list
        yield from (Row(**file) for file in json.loads(shard["files"]))
        return
    if shard["stop"] is None:
        yield from persistently(lambda: read_tar(shard, options), lambda row: shard["name"], None)
        return
    length = shard["stop"] - shard["start"]

    def name(row: int) -> str:
        return f"{shard['name']}:{shard['start'] + row}"

    yield from persistently(lambda: read_rows(shard, options), name, length)


def persistently(read: Callable[[], Iterator[Row]], name: Callable[[int], str], length: int | None) -> Iterator[Row]:
    """
    Rows of `read`, which is begun again where it broke off. If it does not get further, the rows that are missing have
    errors; of a tar nobody knows how many those are, and it gets one.
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
            failures = ATTEMPTS if isinstance(error, GONE) else failures + 1
            time.sleep(failures % ATTEMPTS)
    else:
        length = seen + 1 if length is None else length
    for row in range(seen, length or seen):
        yield Row(name(row), error=reason)


def read_rows(shard: dict, options: Any) -> Iterator[Row]:
    """Rows `start` to `stop` of a Parquet file, of which no more than some pages are in memory."""
    is_listing = options.kind == "folder"
    names = ("id", "image", "text") if is_listing else (options.id_column, options.image_column, options.text_column)
    wanted = (bool(names[0]), options.needs_pictures, options.needs_texts)
    columns = [column if needed else "" for column, needed in zip(names, wanted)]
    system, path = fsspec.core.url_to_fs(
        shard["path"], **(options.output_options if is_listing else options.storage_options)
    )
    first = 0
    with system.open(path, "rb") as file:
        parquet = pq.ParquetFile(file, buffer_size=1 << 20)
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if first < shard["stop"] and first + rows > shard["start"]:
                batches = parquet.iter_batches(64, row_groups=[group], columns=[each for each in columns if each])
                for batch in batches:
                    low, high = max(shard["start"] - first, 0), min(shard["stop"] - first, batch.num_rows)
                    if low < high:
                        for index, cells in enumerate(batch.slice(low, high - low).to_pylist(), first + low):
                            yield row_of([cells.get(column) for column in columns], index, shard, columns)
                    first += batch.num_rows
                    if first >= shard["stop"]:
                        return
            else:
                first += rows


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
    """Members that follow each other and share their name up to the first dot are one row."""
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
    image = next((members[each] for each in PICTURES if each in members), None)
    text = members.get("txt")
    try:
        if text is None and "json" in members and options.needs_texts:
            text = json.loads(members["json"]).get(options.text_column)
        return Row(key, image, text.decode() if isinstance(text, bytes) else text)
    except (ValueError, AttributeError) as error:
        return Row(key, error=f"text: {type(error).__name__}: {error}")


def fetch(row: Row, options: Any) -> Row:
    """The row with the bytes that its places stand for."""
    try:
        image = read_file(row.image, options) if isinstance(row.image, str) and options.needs_pictures else row.image
        text = row.text
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
            if attempt == ATTEMPTS or isinstance(error, GONE):
                raise
            time.sleep(attempt)
    raise AssertionError


def decoded(data: Any) -> Image.Image:
    """
    Raises:
        ValueError: what cannot be decoded.
    """
    if data is None:
        raise ValueError("no picture")
    try:
        picture = Image.open(io.BytesIO(data))
        short, long = sorted(picture.size)
        if short == 0 or long > MAX_ASPECT * short or short * long > MAX_PIXELS:
            raise ValueError(f"{picture.size} pixels; at most {MAX_PIXELS}, {MAX_ASPECT} times as long as wide")
        picture.load()
    except UnidentifiedImageError:  # its message has an address, and no two would be alike
        raise ValueError("picture: of no format that Pillow knows, or damaged" if data else "picture: empty") from None
    except DAMAGED as error:
        raise ValueError(f"picture: {type(error).__name__}: {str(error)[:200]}") from None
    return picture
