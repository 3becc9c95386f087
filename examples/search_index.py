"""Keeps the searchable index of search.py; other programs may import it.

    index = Index(".cache/search")
    embedder = Embedder(".", "tiny")
    index.update(Path("examples/pictures"), embedder)
    Searcher(index, embedder).search(words="熊猫", k=5)

* The index is a LanceDB table with one row per path: the embeddings of both modes, or the reason why there are none.
  Every write is one merge by path and one atomic commit, so a killed run leaves whole rows and no duplicates.
* One process writes at a time: it holds a lock, which the system releases when the process dies. Others may search.
* A file is read again if its size or one of its times changed, and embedded again only if its bytes changed.
* The table's schema records the model and its settings, because embeddings of two models cannot be compared.
"""

import hashlib
import io
import json
import os
import stat
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

os.environ.setdefault("LANCEDB_LOG", "error")  # it warns about normal events, such as creating a table

import decoding
import lancedb
import pyarrow as pa
import torch
import torch.nn.functional as F
from decoding import DAMAGED
from filelock import FileLock, Timeout
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

COLUMNS = {"InternVL-C": "vector_c", "InternVL-G": "vector_g"}  # one for each mode
TABLE, FORMAT = "pictures", 1
BATCH = 32  # images per call of the model
ROWS, SECONDS = 256, 10  # commit after this many rows or seconds, whichever comes first
DECODERS = 2  # threads
PATHS_PER_FILTER = 500
MATCH_WEIGHT = 0.3  # as in tools/tiny/evaluate_tiny.py
SHORTLIST = 24  # images to re-rank, unless more are requested
NEW_TOKENS = 16  # per caption
THUMBNAIL = 320  # pixels of the longer side
TINY = 100_000_000  # a model with fewer parameters is tiny/, which has a few million; the published one has 14 billion
EMOJI = Path(__file__).resolve().parent / "pictures"  # the images that tiny/ is shown on
NOTE = (
    "For photographs, index again with the 14B (28 GB): `--model ORG/InternVL-14B --index NEW_FOLDER`. ORG is where "
    "this repository is published. The tiny model, now in use, only knows emoji."
)
MAX_BYTES = 500_000_000
# Pillow only recognises these, or hands them to another program.
NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
# Formats that are recognised by the first bytes, under any file name.
SIGNED = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PSD", "TIFF", "WEBP")

Image.init()
FORMATS = tuple(name for name in Image.OPEN if name not in NOT_DECODED)
ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
# Pillow warns about large images, which `decode` refuses, and about oddities that do not prevent reading.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class SearchError(ValueError):
    """What is wrong with a folder, an index, a model or a query, in the user's words."""


# --------------------------------------------------------------------------------------------------------- files


def uri_of(path: str | Path) -> str:
    """A path of any bytes as ASCII without quotes, so that it can stand in a filter."""
    return Path(os.path.abspath(path)).as_uri()


def path_of(uri: str) -> str:
    return os.fsdecode(unquote_to_bytes(uri.removeprefix("file://")))


def printable(path: str | Path) -> str:
    """A path without characters that are not UTF-8 or move a cursor, for a terminal or a page."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(path))


@dataclass
class Found:
    """The content of a folder."""

    files: dict[str, os.stat_result] = field(default_factory=dict)  # possible images
    problems: dict[str, str] = field(default_factory=dict)  # paths that cannot be read or are skipped, and why
    unseen: list[str] = field(default_factory=list)  # folders that cannot be read, so that their rows must stay
    others: Counter[str] = field(default_factory=Counter)  # number of other files by the endings of their names


def find_files(folder: Path, excluded: Path) -> Found:
    """All files in and under `folder`. Follows links to files, but not to folders: those may form a cycle."""
    found = Found()

    def note(error: OSError) -> None:
        found.problems[str(error.filename)] = f"a folder that cannot be read: {error.strerror}"
        found.unseen.append(str(error.filename))

    for parent, folders, names in os.walk(folder, onerror=note):
        for path in (os.path.join(parent, name) for name in folders):
            if os.path.islink(path):
                found.problems[path] = "a link to a folder, which is not followed: index the folder itself"
        folders[:] = sorted(name for name in folders if Path(parent, name) != excluded)
        for path in (os.path.join(parent, name) for name in sorted(names)):
            try:
                status = os.stat(path)
            except OSError as error:
                found.problems[path] = f"cannot be read: {error.strerror}"
                continue
            ending = os.path.splitext(path)[1].lower()
            if stat.S_ISREG(status.st_mode) and (ending in ENDINGS or is_image(path)):
                found.files[path] = status
            else:
                found.others[ending or "without ending"] += 1
    return found


def is_image(path: str) -> bool:
    """Whether the first bytes are those of an image."""
    try:
        with Image.open(path, formats=SIGNED):
            return True
    except UnidentifiedImageError:
        return False
    except DAMAGED:  # a damaged header, or an unreadable file: the update will list the reason
        return True


def read_bytes(path: str) -> bytes:
    """The content of a file. Raises `SearchError` if it is too large or cannot be read."""
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise SearchError(f"has {os.path.getsize(path):,} bytes; the limit is {MAX_BYTES:,}")
        return Path(path).read_bytes()
    except OSError as error:
        raise SearchError(f"cannot be read: {error.strerror}") from error


def make_thumbnail(image: Image.Image, side: int = THUMBNAIL) -> bytes:
    """A copy of an RGB image with at most `side` x `side` pixels, as WebP."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(file, "WEBP", quality=80)
    return file.getvalue()


# --------------------------------------------------------------------------------------------------------- model


def placement(device: str) -> dict[str, Any]:
    """Options of `from_pretrained`: with accelerate, what does not fit on the GPU stays in RAM."""
    return {"device_map": "auto"} if device == "cuda" and find_spec("accelerate") else {}


class Embedder:
    """A checkpoint and its settings for images.

    Args:
        model: folder or Hub id.
        subfolder: of the checkpoint; "tiny" for the tiny one of a clone.
        crop: "squash" shows the model the whole image, as in the retrieval benchmarks; "center" its middle.

    Raises:
        SearchError: the checkpoint cannot be loaded.
    """

    def __init__(self, model: str, subfolder: str = "", crop: str = "squash"):
        where = {"subfolder": subfolder, "trust_remote_code": True}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"  # of the inputs
        placed = placement(self.device)
        try:
            self.model = AutoModel.from_pretrained(model, dtype="auto", **where, **placed).eval()
            self.model = self.model if placed else self.model.to(self.device)
            self.processor = AutoProcessor.from_pretrained(model, **where)
            self.load_images = get_class_from_dynamic_module("images_internvl.load_images", model)
        except (OSError, ValueError) as error:
            raise SearchError(f"`--model {model} --subfolder {subfolder}` cannot be loaded: {error}") from error
        self.model.check_processor(self.processor)
        self.scale = float(self.model.logit_scale.detach().float().exp())
        self.width = int(self.model.config.clip_embed_dim)
        self.is_tiny = self.model.num_parameters() < TINY
        self.about = {"model": model, "subfolder": subfolder, "crop": crop, "fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """A hash of the sizes, the image settings and the first values of every tensor, wherever the files lie."""
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
        parts = (self.model.config.vision_config, self.model.config.qllama_config)
        recipe = self.processor.image_processor
        about = [[getattr(part, name, None) for name in sizes] for part in parts]
        about += [list(recipe.image_mean), list(recipe.image_std), int(recipe.resample), dict(recipe.crop_size)]
        digest = hashlib.sha256(json.dumps(about).encode())
        for name in sorted(self.model.state_dict()):
            tensor = self.weight(name)
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.flatten()[:64].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def weight(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint, also where the model only fetches it for a call."""
        place, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(place)
        if not getattr(module, leaf).is_meta:
            return getattr(module, leaf).detach()
        from accelerate.utils import align_module_device  # it put the tensor elsewhere, so it is installed

        with align_module_device(module, torch.device("cpu")):
            return getattr(module, leaf).detach()

    def decode(self, data: bytes) -> Image.Image:
        """An RGB image, upright and opaque on white. Raises `ValueError` if the data cannot be decoded."""
        return self.load_images(decoding.decode(data, FORMATS))[0]

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """[3, H, W]"""
        return self.processor(images=image, crop=self.about["crop"]).pixel_values[0]

    @torch.inference_mode()
    def see(self, pixels: torch.Tensor, captions: bool) -> tuple[dict[str, torch.Tensor], list[str | None]]:
        """Images [B, 3, H, W] -> embeddings [B, width] of length 1 for each mode, and captions; towers run once."""
        seen = self.model.look_at(pixels.to(self.device, self.model.dtype))
        vectors = {mode: self._unit(self.model.embed_image(seen, mode=mode, normalize=False)) for mode in COLUMNS}
        if not captions:
            return vectors, [None] * len(pixels)
        prompt = self.processor(text="English caption:", task="caption").to(self.device)
        ids = self.model.generate(seen, **prompt, max_new_tokens=NEW_TOKENS)
        return vectors, [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

    def tokens(self, text: str | list[str], task: str) -> Any:
        """The model's inputs for texts. Raises `SearchError` for a text that is too long."""
        try:
            return self.processor(text=text, task=task, truncation=False)
        except (RuntimeError, ValueError) as error:
            longest = text if isinstance(text, str) else max(text, key=len)
            problem = f"is too long for the model ({len(longest):,} characters). Shorten it to a sentence or two."
            if isinstance(error, RuntimeError):  # bytes of another encoding, on a command line
                problem = "has characters that cannot be read."
            raise SearchError(f"“{printable(longest[:40])}…” {problem}") from error

    @torch.inference_mode()
    def read(self, words: str) -> torch.Tensor:
        """[width], of length 1"""
        tokens = self.tokens(words, "embed").to(self.device)
        return self._unit(self.model.embed_text(**tokens, normalize=False))[0]

    @torch.inference_mode()
    def match(self, pixels: torch.Tensor, words: str) -> torch.Tensor:
        """Log-probabilities [B] that the images [B, 3, H, W] match the words."""
        tokens = self.tokens([words] * len(pixels), "match").to(self.device)
        logits = self.model.match(pixels.to(self.device, self.model.dtype), **tokens)  # [B, 2]
        return logits.float().log_softmax(-1)[:, 1].cpu()

    def classes(self, labels: list[str]) -> torch.Tensor:
        """[labels, width], of length 1. Raises `SearchError` for labels that cannot be classes."""
        if len(labels) < 2 or not all(label.strip() for label in labels):
            raise SearchError(f"Give two labels or more, none of them empty; got: {', '.join(labels)}.")
        self.tokens(labels, "embed")  # `embed_classes` would cut a label that is too long
        return self._unit(self.model.embed_classes(self.processor, labels))

    def _unit(self, embeds: torch.Tensor) -> torch.Tensor:
        """Normalise in float32: in half precision the length is only nearly 1."""
        return F.normalize(embeds.float(), dim=-1).cpu()


# --------------------------------------------------------------------------------------------------------- index


@dataclass
class Report:
    """The numbers of files in an update."""

    embedded: int = 0
    taken_over: int = 0  # moved or touched: the index already had the embeddings of the same bytes
    unchanged: int = 0
    dropped: int = 0
    problems: int = 0
    others: Counter[str] = field(default_factory=Counter)  # no images, by the endings of their names


class Index:
    """The table of images in `folder`, which the first `update` creates."""

    def __init__(self, folder: str | Path):
        self.folder = Path(os.path.abspath(folder))

    def open(self) -> Any:
        """The table, which always shows the latest commit. Raises `SearchError` if there is none."""
        table = self._open()
        if table is None:
            raise SearchError(f"There is no index in {self.folder}: make one with `index FOLDER`, or name it: --index.")
        return table

    def _open(self) -> Any:
        # A run that is killed while it creates the table leaves a folder without a version.
        if not any((self.folder / f"{TABLE}.lance" / "_versions").glob("*.manifest")):
            return None
        return lancedb.connect(self.folder, read_consistency_interval=timedelta(0)).open_table(TABLE)

    def check(self, embedder: Embedder) -> None:
        """Raise `SearchError` if the index was made by another model or with another crop."""
        made_by = json.loads(self.open().schema.metadata[b"made_by"])
        given = {**embedder.about, "format": FORMAT}
        if all(made_by.get(name) == given[name] for name in ("fingerprint", "crop", "format")):
            return
        first, second = (
            f"{about['model']}, subfolder {about['subfolder'] or 'none'}, crop {about['crop']}, "
            f"weights {about['fingerprint'][:8]}"
            for about in (made_by, given)
        )
        raise SearchError(
            f"The index in {self.folder} was made by another model, so its embeddings cannot be compared.\n"
            f"  made by: {first}\n  this is: {second}\n"
            "Give that model (--model, --subfolder, --crop), or another --index, or make the index anew: "
            "`index --rebuild FOLDER`."
        )

    def problems(self) -> list[tuple[str, str]]:
        """Paths that are not indexed, and why."""
        rows = self.open().search().where("problem != ''").select(["uri", "problem"]).limit(None).to_list()
        return sorted((path_of(row["uri"]), row["problem"]) for row in rows)

    def count(self) -> int:
        """Number of images that a search can find."""
        return self.open().count_rows("problem = ''")

    def update(
        self,
        folder: Path,
        embedder: Embedder,
        captions: bool = True,
        rebuild: bool = False,
        allow_empty: bool = False,
        quiet: bool = False,
    ) -> Report:
        """Bring the index up to date with a folder and its subfolders; images of other folders stay.

        Args:
            captions: also write a caption for every image.
            rebuild: delete the index first.
            allow_empty: drop all images of the folder if it has none any more.
            quiet: show no progress.

        Raises:
            SearchError: no such folder, an index of another model, a second process that writes, an empty folder.
        """
        if not folder.is_dir():
            raise SearchError(f"{printable(folder)} is no folder. Nothing was changed.")
        folder = folder.resolve()  # one name for each file, even if links lead to the folder
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / "lock", timeout=0):
                table = self._made(embedder, rebuild)
                return Update(table, embedder, captions, quiet).run(folder, self.folder, allow_empty)
        except Timeout:
            raise SearchError(f"Another process is writing to {self.folder}. Let it finish, then run again.") from None

    def _made(self, embedder: Embedder, rebuild: bool) -> Any:
        if self._open() is not None and not rebuild:
            self.check(embedder)
            return self.open()
        vector = pa.list_(pa.float32(), embedder.width)
        schema = pa.schema(
            [
                pa.field("uri", pa.string(), nullable=False),
                pa.field("size", pa.int64()),
                pa.field("mtime", pa.int64()),
                pa.field("ctime", pa.int64()),
                pa.field("hash", pa.string()),  # empty: the file could not be read; every update tries again
                pa.field("problem", pa.string()),  # empty: none
                pa.field("caption", pa.string()),  # null: not written yet
                pa.field("thumbnail", pa.binary()),
                *(pa.field(name, vector) for name in COLUMNS.values()),
            ],
            metadata={"made_by": json.dumps({**embedder.about, "format": FORMAT})},
        )
        return lancedb.connect(self.folder).create_table(TABLE, schema=schema, mode="overwrite")


class Update:
    """One update with one folder, by the process that holds the lock."""

    def __init__(self, table: Any, embedder: Embedder, captions: bool, quiet: bool):
        self.table, self.embedder, self.captions, self.quiet = table, embedder, captions, quiet
        self.report = Report()
        self.waiting: list[dict] = []
        self.committed = time.monotonic()

    def run(self, folder: Path, excluded: Path, allow_empty: bool) -> Report:
        if not self.quiet:
            print(f"Looking for images in {printable(folder)} ...", file=sys.stderr, flush=True)
        found = find_files(folder, excluded)
        if str(folder) in found.problems:
            raise SearchError(f"{printable(folder)}: {found.problems[str(folder)]}. Nothing was changed.")
        under = f"{uri_of(folder).rstrip('/')}/"
        columns = ["uri", "size", "mtime", "ctime", "hash", "problem", "caption"]
        known = {row["uri"]: row for row in self.select(f"starts_with(uri, '{under}')", columns)}
        if known and not found.files and not found.unseen and not allow_empty:
            raise SearchError(
                f"{printable(folder)} has no images any more, and the index has {len(known):,} of them. Is a drive "
                "missing? Nothing was changed. If they are gone for good: `index --allow-empty FOLDER`."
            )
        changed = [path for path, status in found.files.items() if self.is_changed(known.get(uri_of(path)), status)]
        self.report.unchanged = len(found.files) - len(changed)
        self.report.others = found.others
        try:
            self.add_files(changed)
            for path, reason in found.problems.items():
                self.add(self.row(path, None, hash="", problem=printable(reason)))
        finally:
            self.commit()  # also when interrupted
        # Images that were moved have their new rows now.
        present = {uri_of(path) for path in (*found.files, *found.problems)}
        unseen = tuple(f"{uri_of(path)}/" for path in found.unseen)
        self.drop([uri for uri in known if uri not in present and not uri.startswith(unseen)])
        self.report.problems = self.table.count_rows(f"problem != '' AND starts_with(uri, '{under}')")
        # This process alone writes, so files of no version are left from killed runs. A search uses an old version for
        # moments only.
        self.table.optimize(cleanup_older_than=timedelta(minutes=10), delete_unverified=True)
        return self.report

    def select(self, condition: str, columns: list[str]) -> list[dict]:
        return self.table.search().where(condition).select(columns).limit(None).to_list()

    def is_changed(self, row: dict | None, status: os.stat_result) -> bool:
        if row is None or not row["hash"] or self.lacks_caption(row):
            return True
        return (row["size"], row["mtime"], row["ctime"]) != (status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def lacks_caption(self, row: dict) -> bool:
        return self.captions and not row["problem"] and row["caption"] is None

    # ------------------------------------------------------------------------------------------- from files to rows

    def add_files(self, paths: list[str]) -> None:
        chunks = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
        seconds = 0.1 if sys.stderr.isatty() else 30  # between two states of the bar, also in a log file
        with (
            ThreadPoolExecutor(DECODERS) as pool,
            tqdm(total=len(paths), unit=" images", mininterval=seconds, disable=self.quiet or not paths) as bar,
        ):
            for rows in self.read_ahead(pool, chunks):
                self.embed(rows)
                for row in rows:
                    self.add(row)
                bar.update(len(rows))

    def read_ahead(self, pool: ThreadPoolExecutor, chunks: list[list[str]]) -> Iterator[list[dict]]:
        """The rows of each chunk before the model runs; threads decode the next chunk while it does."""
        current = None
        for chunk in [*chunks, []]:
            following = pool.map(self.read_row, chunk)
            if current is not None:
                yield list(current)
            current = following

    def read_row(self, path: str) -> dict:
        """The row of a file, with `pixels` for the model, or with a problem."""
        status, digest = None, ""
        try:
            status = os.stat(path)  # before reading: if the file changes meanwhile, the next update notices
            data = read_bytes(path)
            digest = hashlib.sha256(data).hexdigest()
            image = self.embedder.decode(data)
            row = self.row(path, status, hash=digest, thumbnail=make_thumbnail(image))
            return row | {"pixels": self.embedder.pixels(image)}
        except ValueError as error:
            reason = str(error)
        except DAMAGED as error:  # Pillow decoded it, but it cannot be converted
            reason = f"{type(error).__name__}: {error}"
        return self.row(path, status, hash=digest, problem=printable(reason))

    def embed(self, rows: list[dict]) -> None:
        """Fill in embeddings and captions: those of other rows with the same bytes, or else the model's."""
        decoded = [row for row in rows if "pixels" in row]
        pixels = [row.pop("pixels") for row in decoded]
        old = self.rows_by_hash([row["hash"] for row in decoded])
        fresh = []
        for row, image in zip(decoded, pixels):
            if row["hash"] in old:
                row |= {name: old[row["hash"]][name] for name in ("caption", *COLUMNS.values())}
            else:
                fresh.append((row, image))
        self.report.taken_over += len(decoded) - len(fresh)
        self.report.embedded += len(fresh)
        if not fresh:
            return
        vectors, captions = self.embedder.see(torch.stack([image for _, image in fresh]), self.captions)
        for place, ((row, _), caption) in enumerate(zip(fresh, captions)):
            own = {column: vectors[mode][place] for mode, column in COLUMNS.items()}
            if all(vector.isfinite().all() for vector in own.values()):
                row |= {"caption": caption} | {column: vector.numpy() for column, vector in own.items()}
            else:
                row |= {"problem": "the model returned values that are not finite", "thumbnail": None}

    def rows_by_hash(self, hashes: list[str]) -> dict[str, dict]:
        if not hashes:
            return {}
        condition = f"problem = '' AND hash IN ({', '.join(map(repr, hashes))})"
        rows = self.select(condition, ["hash", "problem", "caption", *COLUMNS.values()])
        return {row["hash"]: row for row in rows if not self.lacks_caption(row)}

    def row(self, path: str, status: os.stat_result | None, **values: Any) -> dict:
        row: dict[str, Any] = dict.fromkeys(self.table.schema.names)
        if status is not None:
            row |= {"size": status.st_size, "mtime": status.st_mtime_ns, "ctime": status.st_ctime_ns}
        return row | {"uri": uri_of(path), "problem": ""} | values

    # ------------------------------------------------------------------------------------------------- commits

    def add(self, row: dict) -> None:
        self.waiting.append(row)
        if len(self.waiting) >= ROWS or time.monotonic() - self.committed > SECONDS:
            self.commit()

    def commit(self) -> None:
        if self.waiting:
            rows = pa.Table.from_pylist(self.waiting, schema=self.table.schema)
            merge = self.table.merge_insert("uri").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(rows, on_bad_vectors="null")  # rows with a problem have no vectors
        self.waiting, self.committed = [], time.monotonic()

    def drop(self, uris: list[str]) -> None:
        for start in range(0, len(uris), PATHS_PER_FILTER):
            self.table.delete(f"uri IN ({', '.join(map(repr, uris[start : start + PATHS_PER_FILTER]))})")
        self.report.dropped = len(uris)


# -------------------------------------------------------------------------------------------------------- search


@dataclass
class Result:
    """An image that was found."""

    path: str
    score: float  # orders the results: the cosine, or with re-ranking its logit + MATCH_WEIGHT * log(match)
    cosine: float  # between the query and the image
    match: float | None  # probability that the words match; None without re-ranking or if the file cannot be read
    caption: str | None  # None if the index has no captions
    label: str | None  # the most likely one
    share: float | None  # its probability
    gone: bool  # whether the file no longer exists
    thumbnail: bytes  # WebP


def check_question(words: str, picture: str, rerank: bool) -> None:
    """Raise `SearchError` for both words and an image, for neither, and for re-ranking without words."""
    if bool(words.strip()) == bool(picture):
        raise SearchError("Ask with words or with an image, one of them.")
    if rerank and picture:
        raise SearchError("Re-ranking compares images with words, so it needs words instead of an image.")


class Searcher:
    """Answers queries, from any number of threads. Raises `SearchError` without an index of the same model."""

    def __init__(self, index: Index, embedder: Embedder):
        index.check(embedder)
        self.index, self.table, self.embedder = index, index.open(), embedder
        others = self.table.count_rows(f"NOT starts_with(uri, '{uri_of(EMOJI)}/')")
        self.note = NOTE if embedder.is_tiny and others else ""

    def row(self, path: str) -> dict | None:
        """The row of an indexed image."""
        rows = self.table.search().where(f"problem = '' AND uri = '{uri_of(path)}'").limit(1).to_list()
        return rows[0] if rows else None

    def sample(self, k: int) -> list[dict]:
        """The paths and thumbnails of `k` images, or of all, in equal steps through the index."""
        count, rows = self.index.count(), self.table.search().where("problem = ''").select(["uri", "thumbnail"])
        k = min(k, count)
        return [row for place in range(k) for row in rows.offset(place * count // k).limit(1).to_list()]

    def search(
        self,
        words: str = "",
        picture: str = "",
        k: int = 12,
        mode: str = "InternVL-C",
        rerank: bool = False,
        labels: list[str] | None = None,
        like: str = "",
    ) -> list[Result]:
        """The images nearest to words or to an image, best first.

        Args:
            words: in any language that the model knows.
            picture: the path of an image.
            k: number of results.
            mode: "InternVL-C" or "InternVL-G".
            rerank: reorder the best images by how well the model says that they match the words.
            labels: at least two, to classify each result.
            like: the path of an indexed image, instead of `picture`; it is no result itself.

        Raises:
            SearchError: both words and an image, or neither; an unreadable image; re-ranking without words.
        """
        words = words.strip()
        check_question(words, picture or like, rerank)
        if mode not in COLUMNS:
            raise SearchError(f"`mode` must be one of {', '.join(COLUMNS)}, got {mode!r}.")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise SearchError(f"The number of results must be an integer of at least 1, got {k!r}.")
        classes = None if labels is None else self.embedder.classes(labels)
        column, known = COLUMNS[mode], self.row(like) if like else None
        if like and known is None:
            raise SearchError(f"{printable(os.path.basename(like))} is not in the index any more.")
        vector = torch.tensor(known[column]) if known else self.vector(words, picture, mode)
        query = self.table.search(vector.numpy(), vector_column_name=column).distance_type("cosine")
        wanted = f"problem = '' AND uri != '{uri_of(like)}'" if like else "problem = ''"
        query = query.where(wanted).select(["uri", "caption", "thumbnail", column, "_distance"])
        results = []
        for row in query.limit(max(k, SHORTLIST) if rerank else k).to_list():
            path, cosine, label, share = path_of(row["uri"]), 1 - row["_distance"], None, None
            if labels:
                share, best = self.shares(torch.tensor(row[column]), classes).max(0)
                label, share = labels[best], float(share)
            gone, thumbnail = not os.path.exists(path), row["thumbnail"]
            results.append(Result(path, cosine, cosine, None, row["caption"], label, share, gone, thumbnail))
        return (self.reranked(results, words) if rerank else results)[:k]

    def vector(self, words: str, picture: str, mode: str) -> torch.Tensor:
        """[width], of length 1"""
        if words:
            return self.embedder.read(words)
        try:
            pixels = self.embedder.pixels(self.embedder.decode(read_bytes(picture)))
        except DAMAGED as error:  # also SearchError
            raise SearchError(f"{printable(os.path.basename(picture))}: {error}") from error
        return self.embedder.see(pixels[None], captions=False)[0][mode][0]

    def classify(self, picture: str, labels: list[str], mode: str = "InternVL-C") -> list[tuple[str, float]]:
        """Labels for the image at a path and their probabilities, the most likely first."""
        shares = self.shares(self.vector("", picture, mode), self.embedder.classes(labels))
        return sorted(zip(labels, shares.tolist()), key=lambda pair: -pair[1])

    def shares(self, vector: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return (self.embedder.scale * classes @ vector).softmax(0)

    def reranked(self, results: list[Result], words: str) -> list[Result]:
        """Results in the order of their scores with matching; those whose files cannot be read come last."""
        pixels = {}
        for place, result in enumerate(results):
            try:
                pixels[place] = self.embedder.pixels(self.embedder.decode(read_bytes(result.path)))
            except DAMAGED:
                result.score = float("-inf")
        if pixels:
            matches = self.embedder.match(torch.stack(list(pixels.values())), words)
            for place, match in zip(pixels, matches):
                results[place].match = float(match.exp())
                results[place].score = self.embedder.scale * results[place].cosine + MATCH_WEIGHT * float(match)
        return sorted(results, key=lambda result: -result.score)
