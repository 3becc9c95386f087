"""What examples/search.py finds pictures with: a folder's pictures in a LanceDB table, and the model that reads them.

    index = Index(".cache/search")
    embedder = Embedder(".", "tiny")
    index.update(Path("examples/pictures"), embedder)
    Searcher(index, embedder).search(words="熊猫", k=5)

* One row per path, with either both vectors or the reason why there are none: each write is one merge by path and one
  commit of LanceDB, which is there or is not. So a run that is killed leaves whole rows, none twice, and the next run
  makes those that are missing.
* One process writes at a time: it holds a lock, which the system drops when the process dies. Any number may search
  meanwhile, and see what is committed.
* A file is read again when its size or one of its times changed, and embedded again only when its bytes did: a picture
  that was moved or touched takes over the row of its old bytes.
* The table's schema says which model made it and how. Vectors of another one are in another space, so it is refused.
* The search compares with every vector. That is exact, and milliseconds for 10,000 pictures (benchmarks/search.json).
"""

import hashlib
import io
import json
import os
import stat
import struct
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

os.environ.setdefault("LANCEDB_LOG", "error")  # its warnings tell of what is meant, such as a table that is made

import lancedb
import pyarrow as pa
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

COLUMNS = {"InternVL-C": "vector_c", "InternVL-G": "vector_g"}  # of the modes
TABLE, FORMAT = "pictures", 1
BATCH = 32  # pictures that the model sees at once
ROWS, SECONDS = 256, 10  # a commit is made after so many rows or so much time: what a kill may lose
DECODERS = 2  # threads
NAMED = 500  # paths in one filter
MATCH_WEIGHT = 0.3  # what tools/tiny/evaluate_tiny.py re-ranks with
SHORTLIST = 24  # pictures that are re-ranked, if no more are asked for
NEW_TOKENS = 16  # of a caption
THUMBNAIL = 320  # pixels of its longer side
MAX_BYTES = 500_000_000
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
MAX_ASPECT = 50  # the shorter side is resized to the model's, and a very narrow picture would grow without bound
# Pillow only recognises these, or hands them to another program.
NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
# Formats that begin with a mark of their own: what is one of them is a picture, whatever its name ends with.
MARKED = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PSD", "TIFF", "WEBP")
# What Pillow's readers raise for damaged files: nearly always the first two, and whatever a format provokes.
DAMAGED = (
    OSError, ValueError, ArithmeticError, EOFError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

Image.init()
DECODED = tuple(name for name in Image.OPEN if name not in NOT_DECODED)
ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in DECODED}
# Sizes are checked here, and oddities that do not hinder reading are nobody's concern.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class SearchError(ValueError):
    """What is wrong with a folder, an index, a model or a query, in words for whoever gave it."""


# --------------------------------------------------------------------------------------------------------- files


def uri_of(path: str | Path) -> str:
    """A path as ASCII, whatever bytes its name has, and without quotes: it stands in filters."""
    return Path(os.path.abspath(path)).as_uri()


def path_of(uri: str) -> str:
    return os.fsdecode(unquote_to_bytes(uri.removeprefix("file://")))


def printable(path: str) -> str:
    """A path for a terminal or a page, which bytes that are no UTF-8 or move a cursor must not reach."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in path)


@dataclass
class Found:
    """
    What lies in a folder.

    Attributes:
        files: path and status of what may be a picture.
        problems: paths and why they cannot be looked into.
        unseen: folders of which nothing is known now.
        others: how many files are no pictures, by the endings of their names.
    """

    files: dict[str, os.stat_result] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def find_files(folder: Path, leave_out: Path) -> Found:
    """All files in and under `folder`. Links to files are followed; links to folders, which may go in circles, not."""
    found = Found()

    def note(error: OSError) -> None:
        found.problems[str(error.filename)] = f"a folder that cannot be read: {error.strerror}"
        found.unseen.append(str(error.filename))

    for parent, folders, names in os.walk(folder, onerror=note):
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                reason = "a link to a folder, which is not followed: index the folder itself"
                found.problems[os.path.join(parent, name)] = reason
        folders[:] = sorted(name for name in folders if Path(parent, name) != leave_out)
        for name in sorted(names):
            path = os.path.join(parent, name)
            try:
                status = os.stat(path)
            except OSError as error:
                found.problems[path] = f"cannot be read: {error.strerror}"
                continue
            if stat.S_ISREG(status.st_mode) and may_be_picture(path):
                found.files[path] = status
            else:
                found.others[os.path.splitext(name)[1].lower() or "without ending"] += 1
    return found


def may_be_picture(path: str) -> bool:
    """By its name, or by its first bytes."""
    if os.path.splitext(path)[1].lower() in ENDINGS:
        return True
    try:
        with Image.open(path, formats=MARKED):
            return True
    except UnidentifiedImageError:
        return False
    except DAMAGED:  # in the header of a picture, or it cannot be read at all: the reason will be listed
        return True


def read_bytes(path: str) -> bytes:
    """
    Raises:
        `SearchError`: why not.
    """
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise SearchError(f"has {os.path.getsize(path):,} bytes, and {MAX_BYTES:,} are read")
        data = Path(path).read_bytes()
    except OSError as error:
        raise SearchError(f"cannot be read: {error.strerror}") from error
    return data


def decode(data: bytes) -> Image.Image:
    """
    The picture, or the first one of an animation, with all its pixels.

    Raises:
        `SearchError`: why not.
    """
    if not data:
        raise SearchError("an empty file")
    try:
        picture = Image.open(io.BytesIO(data), formats=DECODED)  # reads the header, no pixels yet
        short, long = sorted(picture.size)
        if short * long > MAX_PIXELS:
            raise Image.DecompressionBombError
        if long > MAX_ASPECT * short:
            raise SearchError(f"has {picture.width} x {picture.height} pixels, and may be {MAX_ASPECT} times as long")
        picture.load()
    except SearchError:
        raise
    except Image.DecompressionBombError:  # Pillow's own is for twice as many
        raise SearchError(f"has more pixels than the {MAX_PIXELS:,} that Pillow takes for safe") from None
    except UnidentifiedImageError:
        raise SearchError("no picture of a format that Pillow reads") from None
    except DAMAGED as error:
        raise SearchError(f"damaged: {type(error).__name__}: {error}") from error
    return picture


def thumbnail(picture: Image.Image) -> bytes:
    """A small copy as a viewer would show it, as WebP."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # Pillow's own conversion clips at 255 and leaves a white picture
        picture = picture.point(lambda value: value / 256).convert("L")
    picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80)
    return file.getvalue()


# --------------------------------------------------------------------------------------------------------- model


class Embedder:
    """
    A checkpoint, and how it reads pictures.

    Args:
        model: folder or Hub id.
        subfolder: of the checkpoint; "tiny" for the tiny one of a clone.
        crop: "squash" shows the model the whole of a picture, as in the retrieval benchmarks, "center" its middle.
    """

    def __init__(self, model: str, subfolder: str = "", crop: str = "squash"):
        where = {"subfolder": subfolder, "trust_remote_code": True}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.model = AutoModel.from_pretrained(model, dtype="auto", **where).eval().to(device)
            self.processor = AutoProcessor.from_pretrained(model, **where)
        except (OSError, ValueError) as error:
            raise SearchError(f"`--model {model} --subfolder {subfolder}` cannot be loaded: {error}") from error
        self.model.check_processor(self.processor)
        self.scale = float(self.model.logit_scale.detach().float().exp())
        self.width = int(self.model.config.clip_embed_dim)
        self.about = {"model": model, "subfolder": subfolder, "crop": crop, "fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """Of the sizes, the preparation of pictures, and the first numbers of every tensor; not of where they lie."""
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
        parts = (self.model.config.vision_config, self.model.config.qllama_config)
        recipe = self.processor.image_processor
        about = [[getattr(part, name, None) for name in sizes] for part in parts]
        about += [list(recipe.image_mean), list(recipe.image_std), int(recipe.resample), dict(recipe.crop_size)]
        digest = hashlib.sha256(json.dumps(about).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.flatten()[:64].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """[3, H, W]"""
        return self.processor(images=picture, crop=self.about["crop"]).pixel_values[0]

    @torch.inference_mode()
    def see(self, pixels: torch.Tensor, captions: bool) -> tuple[dict[str, torch.Tensor], list[str | None]]:
        """Pictures [B, 3, H, W] -> the unit vectors of each mode [B, width], and the captions, from one look."""
        seen = self.model.look_at(pixels.to(self.model.device, self.model.dtype))
        vectors = {mode: self._unit(self.model.embed_image(seen, mode=mode, normalize=False)) for mode in COLUMNS}
        if not captions:
            return vectors, [None] * len(pixels)
        prompt = self.processor(text="English caption:", task="caption").to(self.model.device)
        ids = self.model.generate(seen, **prompt, max_new_tokens=NEW_TOKENS)
        return vectors, [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

    @torch.inference_mode()
    def read(self, words: str) -> torch.Tensor:
        """[width], of length 1"""
        tokens = self.processor(text=words, truncation=False).to(self.model.device)
        return self._unit(self.model.embed_text(**tokens, normalize=False))[0]

    @torch.inference_mode()
    def match(self, pixels: torch.Tensor, words: str) -> torch.Tensor:
        """The log-probabilities [B] that pictures [B, 3, H, W] fit the words."""
        tokens = self.processor(text=[words] * len(pixels), task="match", truncation=False).to(self.model.device)
        logits = self.model.match(pixels.to(self.model.device, self.model.dtype), **tokens)  # [B, 2]
        return logits.float().log_softmax(-1)[:, 1].cpu()

    def classes(self, labels: list[str]) -> torch.Tensor:
        """[labels, width], of length 1"""
        return self._unit(self.model.embed_classes(self.processor, labels))

    def _unit(self, embeds: torch.Tensor) -> torch.Tensor:
        """In float32: half precision is of length 1 only nearly."""
        return F.normalize(embeds.float(), dim=-1).cpu()


# --------------------------------------------------------------------------------------------------------- index


@dataclass
class Report:
    """
    What a run did.

    Attributes:
        embedded, taken_over, unchanged, dropped, problems: numbers of files.
        others: how many files are no pictures, by the endings of their names.
    """

    embedded: int = 0
    taken_over: int = 0
    unchanged: int = 0
    dropped: int = 0
    problems: int = 0
    others: Counter[str] = field(default_factory=Counter)


class Index:
    """
    The table of pictures on disk.

    Args:
        folder: where it lies; made by the first `update`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(os.path.abspath(folder))

    # ------------------------------------------------------------------------------------------------- reading

    def open(self) -> Any:
        """
        The table, as it is at each moment.

        Raises:
            `SearchError`: nothing was indexed here yet.
        """
        table = self._open()
        if table is None:
            raise SearchError(f"There is no index in {self.folder}: make one with `index FOLDER`, or name it: --index.")
        return table

    def _open(self) -> Any:
        # A run that was killed while it made the table leaves a folder without a version in it.
        if not any((self.folder / f"{TABLE}.lance" / "_versions").glob("*.manifest")):
            return None
        return lancedb.connect(self.folder, read_consistency_interval=timedelta(0)).open_table(TABLE)

    def made_by(self) -> dict:
        """The `about` of the embedder whose vectors these are."""
        return json.loads(self.open().schema.metadata[b"made_by"])

    def check(self, embedder: Embedder) -> None:
        """
        Raises:
            `SearchError`: the vectors are another model's, or of pictures that were cut in another way.
        """
        made_by, given = self.made_by(), {**embedder.about, "format": FORMAT}
        if all(made_by.get(name) == given[name] for name in ("fingerprint", "crop", "format")):
            return
        first, second = (
            f"{about['model']}, subfolder {about['subfolder'] or 'none'}, crop {about['crop']}, "
            f"weights {about['fingerprint'][:8]}"
            for about in (made_by, given)
        )
        raise SearchError(
            f"The index in {self.folder} was made by another model, whose vectors say nothing to this one.\n"
            f"  made by: {first}\n  this is: {second}\n"
            "Give that model (--model, --subfolder, --crop), or another --index, or make the index anew: "
            "`index --rebuild FOLDER`."
        )

    def problems(self) -> list[tuple[str, str]]:
        """Paths that are not indexed, and why."""
        rows = self.open().search().where("problem != ''").select(["uri", "problem"]).limit(None).to_list()
        return sorted((path_of(row["uri"]), row["problem"]) for row in rows)

    def count(self) -> int:
        """Of the pictures that a search can find."""
        return self.open().count_rows("problem = ''")

    # ------------------------------------------------------------------------------------------------- writing

    def update(
        self,
        folder: Path,
        embedder: Embedder,
        captions: bool = True,
        rebuild: bool = False,
        allow_empty: bool = False,
        quiet: bool = False,
    ) -> Report:
        """
        Bring the index up to date with what lies in and under a folder; other folders' pictures stay.

        Args:
            captions: also write a caption for every picture.
            rebuild: throw the index away first.
            allow_empty: drop all of the folder's pictures if it has none any more.
            quiet: show no progress.

        Raises:
            `SearchError`: no such folder, an index of another model, a second process that writes, an empty folder.
        """
        if not folder.is_dir():
            raise SearchError(f"{printable(str(folder))} is no folder. Nothing was changed.")
        folder = folder.resolve()  # one name for each file, however the folder was called
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
                pa.field("hash", pa.string()),  # empty: the bytes could not be read, which every run tries again
                pa.field("problem", pa.string()),  # empty: there is none
                pa.field("caption", pa.string()),  # null: none was written yet
                pa.field("thumbnail", pa.binary()),
                *(pa.field(name, vector) for name in COLUMNS.values()),
            ],
            metadata={"made_by": json.dumps({**embedder.about, "format": FORMAT})},
        )
        return lancedb.connect(self.folder).create_table(TABLE, schema=schema, mode="overwrite")


class Update:
    """One run over one folder, by the process that holds the lock."""

    def __init__(self, table: Any, embedder: Embedder, captions: bool, quiet: bool):
        self.table, self.embedder, self.captions, self.quiet = table, embedder, captions, quiet
        self.report = Report()
        self.waiting: list[dict] = []
        self.committed = time.monotonic()

    def run(self, folder: Path, leave_out: Path, allow_empty: bool) -> Report:
        found = find_files(folder, leave_out)
        if str(folder) in found.problems:
            raise SearchError(f"{printable(str(folder))}: {found.problems[str(folder)]}. Nothing was changed.")
        under = f"{uri_of(folder).rstrip('/')}/"
        known = self.known(under)
        if known and not found.files and not found.unseen and not allow_empty:
            raise SearchError(
                f"{printable(str(folder))} has no pictures any more, and the index {len(known):,} of them. Is a drive "
                "missing? Nothing was changed. If they are gone for good: `index --allow-empty FOLDER`."
            )
        changed = [path for path, status in found.files.items() if self.is_changed(known.get(uri_of(path)), status)]
        self.report.unchanged = len(found.files) - len(changed)
        self.report.others = found.others
        try:
            self.make_rows(changed)
            for path, reason in found.problems.items():
                self.add(self.problem_row(path, None, "", reason))
        finally:
            self.commit()  # also when interrupted
        # What was moved has its new row by now.
        there = {uri_of(path) for path in (*found.files, *found.problems)}
        unseen = tuple(f"{uri_of(path)}/" for path in found.unseen)
        self.drop([uri for uri in known if uri not in there and not uri.startswith(unseen)])
        self.report.problems = self.table.count_rows(f"problem != '' AND starts_with(uri, '{under}')")
        # Nobody else writes, so files that belong to no version are what killed runs left. A search takes an old
        # version for moments only.
        self.table.optimize(cleanup_older_than=timedelta(minutes=10), delete_unverified=True)
        return self.report

    def known(self, under: str) -> dict[str, dict]:
        columns = ["uri", "size", "mtime", "ctime", "hash", "problem", "caption"]
        rows = self.table.search().where(f"starts_with(uri, '{under}')").select(columns).limit(None).to_list()
        return {row["uri"]: row for row in rows}

    def is_changed(self, row: dict | None, status: os.stat_result) -> bool:
        if row is None or not row["hash"] or self.lacks_caption(row):
            return True
        return (row["size"], row["mtime"], row["ctime"]) != (status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def lacks_caption(self, row: dict) -> bool:
        return self.captions and not row["problem"] and row["caption"] is None

    # --------------------------------------------------------------------------------------------- making rows

    def make_rows(self, paths: list[str]) -> None:
        chunks = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
        with (
            ThreadPoolExecutor(DECODERS) as pool,
            tqdm(total=len(paths), unit="picture", disable=self.quiet or not paths) as bar,
        ):
            for chunk in self.read_ahead(pool, chunks):
                for row in self.rows(chunk):
                    self.add(row)
                bar.update(len(chunk))

    def read_ahead(self, pool: ThreadPoolExecutor, chunks: list[list[str]]) -> Iterator[list[dict]]:
        """The rows of each chunk as far as files tell; the next chunk is decoded while the model sees this one."""
        coming = [pool.map(self.read_row, chunk) for chunk in chunks[:1]]
        for after in [*chunks[1:], []]:
            coming.append(pool.map(self.read_row, after))
            yield list(coming.pop(0))

    def read_row(self, path: str) -> dict:
        """The row of a file with `pixels` in it, or with a problem."""
        status, digest = None, ""
        try:
            status = os.stat(path)  # before the file is read: if it changes meanwhile, the next run sees that
            data = read_bytes(path)
            digest = hashlib.sha256(data).hexdigest()
            picture = decode(data)
            row = self.row(path, status, hash=digest, thumbnail=thumbnail(picture))
            return row | {"pixels": self.embedder.pixels(picture)}
        except SearchError as error:
            return self.problem_row(path, status, digest, str(error))
        except DAMAGED as error:  # of what Pillow decoded, but the processor or the thumbnail cannot show
            return self.problem_row(path, status, digest, f"{type(error).__name__}: {error}")

    def rows(self, rows: list[dict]) -> list[dict]:
        """Rows with vectors: those that other rows have for the same bytes, or else what the model sees."""
        old = self.rows_of([row["hash"] for row in rows if "pixels" in row])
        fresh = []
        for row in rows:
            if "pixels" not in row:
                continue
            if row["hash"] in old:
                del row["pixels"]
                row |= {name: old[row["hash"]][name] for name in ("caption", *COLUMNS.values())}
                self.report.taken_over += 1
            else:
                fresh.append(row)
        if fresh:
            vectors, captions = self.embedder.see(torch.stack([row.pop("pixels") for row in fresh]), self.captions)
            for place, (row, caption) in enumerate(zip(fresh, captions)):
                own = {COLUMNS[mode]: vectors[mode][place] for mode in COLUMNS}
                if all(bool(vector.isfinite().all()) for vector in own.values()):
                    row |= {"caption": caption} | {column: vector.numpy() for column, vector in own.items()}
                else:
                    row |= {"problem": "the model gave a value that is not finite", "thumbnail": None}
        self.report.embedded += len(fresh)
        return rows

    def rows_of(self, hashes: list[str]) -> dict[str, dict]:
        if not hashes:
            return {}
        named = ", ".join(f"'{each}'" for each in hashes)
        columns = ["hash", "problem", "caption", *COLUMNS.values()]
        rows = self.table.search().where(f"problem = '' AND hash IN ({named})").select(columns).limit(None).to_list()
        return {row["hash"]: row for row in rows if not self.lacks_caption(row)}

    def row(self, path: str, status: os.stat_result | None, **values: Any) -> dict:
        row: dict[str, Any] = dict.fromkeys(self.table.schema.names)
        if status is not None:
            row |= {"size": status.st_size, "mtime": status.st_mtime_ns, "ctime": status.st_ctime_ns}
        return row | {"uri": uri_of(path), "problem": ""} | values

    def problem_row(self, path: str, status: os.stat_result | None, digest: str, reason: str) -> dict:
        return self.row(path, status, hash=digest, problem=printable(reason))

    # ------------------------------------------------------------------------------------------------- commits

    def add(self, row: dict) -> None:
        self.waiting.append(row)
        if len(self.waiting) >= ROWS or time.monotonic() - self.committed > SECONDS:
            self.commit()

    def commit(self) -> None:
        if self.waiting:
            rows = pa.Table.from_pylist(self.waiting, schema=self.table.schema)
            merge = self.table.merge_insert("uri").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(rows, on_bad_vectors="null")  # rows with a problem have none
        self.waiting, self.committed = [], time.monotonic()

    def drop(self, uris: list[str]) -> None:
        for start in range(0, len(uris), NAMED):
            named = ", ".join(f"'{uri}'" for uri in uris[start : start + NAMED])
            self.table.delete(f"uri IN ({named})")
        self.report.dropped = len(uris)


# -------------------------------------------------------------------------------------------------------- search


@dataclass
class Result:
    """
    A picture that was found.

    Attributes:
        path: of its file.
        score: what the results are ordered by: the cosine, or after re-ranking the logit of the cosine plus
            `MATCH_WEIGHT` times the log-probability of a match.
        cosine: between the query and the picture.
        match: the probability that the words fit the picture; None without re-ranking, or if its file is unreadable.
        caption: what the model wrote about it; None if captions were left out.
        label, share: the likeliest of the labels and its probability; None without labels.
        gone: whether the file is no longer there.
        thumbnail: a small copy, as WebP.
    """

    path: str
    score: float
    cosine: float
    match: float | None
    caption: str | None
    label: str | None
    share: float | None
    gone: bool
    thumbnail: bytes


def check_question(words: str, picture: str, rerank: bool) -> None:
    """
    Raises:
        `SearchError`: words and picture, or neither; re-ranking without words.
    """
    if bool(words.strip()) == bool(picture):
        raise SearchError("Ask with words or with a picture, one of them.")
    if rerank and picture:
        raise SearchError("Re-ranking compares pictures with words, so a picture cannot be asked with.")


class Searcher:
    """
    Answers queries, from any number of threads.

    Raises:
        `SearchError`: no index, or one of another model.
    """

    def __init__(self, index: Index, embedder: Embedder):
        index.check(embedder)
        self.index, self.table, self.embedder = index, index.open(), embedder

    def search(
        self,
        words: str = "",
        picture: str = "",
        k: int = 12,
        mode: str = "InternVL-C",
        rerank: bool = False,
        labels: list[str] | None = None,
    ) -> list[Result]:
        """
        The pictures nearest to words or to a picture, best first.

        Args:
            words: in any language that the model knows.
            picture: the path of one.
            k: how many.
            mode: "InternVL-C" or "InternVL-G".
            rerank: let the model look at the best pictures together with the words, which puts them into a new order.
            labels: what each picture is classified as, at least two.

        Raises:
            `SearchError`: words and picture, or neither; a picture that cannot be read; re-ranking without words.
        """
        words = words.strip()
        check_question(words, picture, rerank)
        if mode not in COLUMNS:
            raise SearchError(f"`mode` must be one of {', '.join(COLUMNS)}, got {mode!r}.")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise SearchError(f"`k` must be a positive integer, got {k!r}.")
        classes = None if labels is None else self.classes(labels)
        vector = self.vector(words, picture, mode)
        column = COLUMNS[mode]
        query = self.table.search(vector.numpy(), vector_column_name=column).distance_type("cosine")
        query = query.where("problem = ''").select(["uri", "caption", "thumbnail", column, "_distance"])
        rows = query.limit(max(k, SHORTLIST) if rerank else k).to_list()
        results = [self.result(row, row[column], labels, classes) for row in rows]
        return (self.reranked(results, words) if rerank else results)[:k]

    def vector(self, words: str, picture: str, mode: str) -> torch.Tensor:
        """[width], of length 1"""
        try:
            if words:
                return self.embedder.read(words)
            pixels = self.embedder.pixels(decode(read_bytes(picture)))
        except DAMAGED as error:  # SearchError too, and what the processor refuses
            about = f"`{words[:40]}`" if words else printable(os.path.basename(picture))
            raise SearchError(f"{about}: {error}") from error
        return self.embedder.see(pixels[None], captions=False)[0][mode][0]

    def classify(self, picture: str, labels: list[str], mode: str = "InternVL-C") -> list[tuple[str, float]]:
        """Labels of a picture, by its path, and their probabilities, the likeliest first."""
        shares = self.shares(self.vector("", picture, mode), self.classes(labels))
        return sorted(zip(labels, shares.tolist()), key=lambda pair: -pair[1])

    def shares(self, vector: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return (self.embedder.scale * classes @ vector).softmax(0)

    def classes(self, labels: list[str]) -> torch.Tensor:
        if len(labels) < 2 or not all(label.strip() for label in labels):
            raise SearchError(f"`labels` must be at least two, none of them empty, got {labels}.")
        try:
            return self.embedder.classes(labels)
        except ValueError as error:  # what the processor refuses
            raise SearchError(f"`labels`: {error}") from error

    def result(self, row: dict, vector: list[float], labels: list[str] | None, classes: torch.Tensor | None) -> Result:
        path, cosine = path_of(row["uri"]), 1 - row["_distance"]
        label, share = None, None
        if labels is not None and classes is not None:
            shares = self.shares(torch.tensor(vector), classes)
            label, share = labels[int(shares.argmax())], float(shares.max())
        gone = not os.path.exists(path)
        return Result(path, cosine, cosine, None, row["caption"], label, share, gone, row["thumbnail"])

    def reranked(self, results: list[Result], words: str) -> list[Result]:
        """By what matching says too; pictures whose files cannot be read now come last."""
        pixels = {}
        for place, result in enumerate(results):
            try:
                pixels[place] = self.embedder.pixels(decode(read_bytes(result.path)))
            except DAMAGED:
                result.score = float("-inf")
        if pixels:
            matches = self.embedder.match(torch.stack(list(pixels.values())), words).tolist()
            for place, match in zip(pixels, matches):
                results[place].match = float(torch.tensor(match).exp())
                results[place].score = self.embedder.scale * results[place].cosine + MATCH_WEIGHT * match
        return sorted(results, key=lambda result: -result.score)
