"""Reads the data of benchmarks/evaluate.py: images with classes or captions, from folders, `datasets` or WebDatasets.

Every reader returns `Images`. Images are decoded when they are needed, so only names, labels and captions are in
memory. A source that is incomplete or unreadable is an error that names the place.
"""

import csv
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

SHIPPED = Path(__file__).resolve().parent / "templates"
SHARD_IMAGES = ("png", "jpg", "jpeg", "webp")
LISTINGS = ("captions.json", "captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")


@dataclass
class Images:
    """The images of one source, with their labels or captions.

    Attributes:
        names: the names of the N images in error messages.
        source: maps an index to what `PIL.Image.open` takes: a path or a file of bytes.
        fingerprint: changes with the images and their order.
        labels: the class index of each image, for classification.
        classnames: by language, the names of the classes in the order of their indices.
        captions: by language, a list of texts for each image, for retrieval and captioning.
        templates: by language, the templates that came with the data.
    """

    names: list[str]
    source: Callable[[int], Any]
    fingerprint: str
    labels: list[int] | None = None
    classnames: dict[str, list[str]] = field(default_factory=dict)
    captions: dict[str, list[list[str]]] = field(default_factory=dict)
    templates: dict[str, list[str]] = field(default_factory=dict)

    def open(self, index: int) -> Image.Image:
        """The decoded image."""
        image = Image.open(self.source(index))
        image.load()
        return image


def digest(value: Any) -> str:
    """A short hash of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def stamp(path: Path) -> list:
    """Path, size and time of a file, which change when it is written again."""
    return [str(path), path.stat().st_size, path.stat().st_mtime_ns]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file. A blank line is refused: to skip it would shift the names of the following classes."""
    lines = [line.strip() for line in path.read_text("utf-8-sig").rstrip().splitlines()]
    if not all(lines) or not lines:
        raise ValueError(f"{path} must have one text in each line, got a blank line or none.")
    return lines


def by_language(value: Any, languages: list[str], where: str) -> dict[str, list[str]]:
    """A text, a list of texts, or either for each language -> {language: texts}, for the languages asked for."""
    if not isinstance(value, dict):
        if len(languages) != 1:
            raise ValueError(f"`--language` must be one where texts are not given by language, got {languages}.")
        value = {languages[0]: value}
    missing = [language for language in languages if language not in value]
    if missing:
        raise ValueError(f"{where} has no text in {missing}, only in {list(value)}.")
    found = {language: value[language] for language in languages}
    found = {language: [texts] if isinstance(texts, str) else texts for language, texts in found.items()}
    for texts in found.values():
        is_list = isinstance(texts, list) and texts
        if not is_list or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{where} must have a text or a list of texts, none of them empty, got {texts!r}.")
    return found


# ------------------------------------------------------------------------------------------------------- folders


def read_class_folders(folder: Path, languages: list[str]) -> Images:
    """Images in one sub-folder for each class, named after the class."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise ValueError(
            f"`--data` must have a sub-folder for each class, got {folder} without any; or give `--listing`."
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, each in enumerate(classes):
        found = sorted(path for path in each.rglob("*") if path.is_file() and not path.name.startswith("."))
        strange = [path for path in found if path.suffix.lower() not in Image.registered_extensions()]
        if strange or not found:
            raise ValueError(f"{each} must hold images and nothing else, got {strange[0] if strange else 'nothing'}.")
        paths += found
        labels += [label] * len(found)
    names = [path.name.replace("_", " ") for path in classes]
    return _files(paths, labels=labels, classnames={languages[0]: names})


def _files(paths: list[Path], **known: Any) -> Images:
    return Images([str(path) for path in paths], paths.__getitem__, digest([stamp(path) for path in paths]), **known)


def read_listing(folder: Path, listing: str | None, columns: "Columns", task: str, languages: list[str]) -> Images:
    """Images of a folder, by a JSON, JSONL or CSV file of their classes or captions; an image may have several rows."""
    path = Path(listing) if listing else next((folder / name for name in LISTINGS if (folder / name).exists()), None)
    if path is None or not path.is_file():
        raise ValueError(f"{folder} must have one of {LISTINGS}, or `--listing` must name a file, got {listing!r}.")
    column = columns.label if task == "classification" else columns.caption
    texts: dict[Path, dict[str, list[str]]] = {}
    for number, row in enumerate(_rows(path), 1):
        where = f"{path}, entry {number}"
        image = columns.image if columns.image in row else "file_name"  # the name that `datasets` gives it
        if image not in row or column not in row:
            raise ValueError(f"{where} must have {columns.image!r} and {column!r}, got {list(row)}; see `--*-column`.")
        if not isinstance(row[image], str):
            raise ValueError(f"{where} must name an image, got {row[image]!r}.")
        file = folder / row[image]
        if not file.is_file():
            raise ValueError(f"{where} names the image {file}, which does not exist.")
        known = texts.setdefault(file, {language: [] for language in languages})
        for language, more in by_language(row[column], languages, where).items():
            known[language] += more
    if not texts:
        raise ValueError(f"{path} lists no image.")
    together = {language: [each[language] for each in texts.values()] for language in languages}
    if task == "classification":
        return _files(list(texts), **_classes(together, languages, path))
    return _files(list(texts), captions=together)


def _rows(path: Path) -> list[dict]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    text = path.read_text("utf-8")
    is_lines = path.suffix == ".jsonl"
    rows = [json.loads(line) for line in text.splitlines() if line.strip()] if is_lines else json.loads(text)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a list of objects, one for each image.")
    return rows


def _classes(texts: dict[str, list[list[str]]], languages: list[str], path: Path) -> dict:
    """Labels and class names from the class name of each image: classes are numbered as they first appear."""
    if any(len(names) != 1 for names in texts[languages[0]]):
        raise ValueError(f"{path} must give one class for each image in a classification.")
    first = [names[0] for names in texts[languages[0]]]
    order = list(dict.fromkeys(first))
    examples = [first.index(name) for name in order]
    classnames = {language: [texts[language][row][0] for row in examples] for language in languages}
    return {"labels": [order.index(name) for name in first], "classnames": classnames}


# ------------------------------------------------------------------------------------------------------ datasets


@dataclass
class Columns:
    """Names of the columns of a dataset or a listing."""

    image: str
    label: str
    caption: str


def read_dataset(
    name: str, config: str | None, split: str, columns: Columns, task: str, languages: list[str]
) -> Images:
    """A dataset of the library `datasets`: a folder of `save_to_disk`, or any name that `load_dataset` takes."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("`--source datasets` needs `pip install datasets`.") from error
    saved = any((Path(name) / file).exists() for file in ("dataset_info.json", "dataset_dict.json"))
    try:
        data = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config)
    except OSError as error:  # the name does not exist, or there is no network
        raise ValueError(f"`--data` must be a folder or a data set of the Hub, got {name!r}: {error}") from error
    if isinstance(data, dict):
        if split not in data:
            raise ValueError(f"`--split` must be one of {list(data)} for {name}, got {split!r}.")
        data = data[split]
    column = columns.label if task == "classification" else columns.caption
    for each in (columns.image, column):
        if each not in data.column_names:
            raise ValueError(f"{name} must have the column {each!r}, got {data.column_names}; see `--*-column`.")
    encoded = data.select_columns([columns.image]).cast_column(columns.image, datasets.Image(decode=False))

    def source(index: int) -> Any:
        stored = encoded[index][columns.image]
        return stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])

    names = [f"{index} of {name}" for index in range(len(data))]
    values = list(data[column])
    if task == "classification":
        known = _labels(values, getattr(data.features[column], "names", None), languages)
    else:
        rows = [by_language(value, languages, f"Row {index} of {name}") for index, value in enumerate(values)]
        known = {"captions": {language: [row[language] for row in rows] for language in languages}}
    return Images(names, source, digest([data._fingerprint, len(data)]), **known)


def _labels(values: list, names: list[str] | None, languages: list[str]) -> dict:
    if values and isinstance(values[0], str):
        names = sorted(set(values))
        values = [names.index(value) for value in values]
    classnames = {} if names is None else {languages[0]: [name.replace("_", " ") for name in names]}
    return {"labels": values, "classnames": classnames}


# ---------------------------------------------------------------------------------------------------- WebDataset


def find_shards(folder: Path, split: str) -> list[Path]:
    """The shards of a split in the order of their numbers; they may be in a sub-folder with the split's name."""
    inside = folder / split if (folder / split).is_dir() else folder
    shards = sorted(inside.glob("*.tar"), key=lambda path: [int(part) for part in re.findall(r"\d+", path.stem)])
    listed = inside / "nshards.txt"
    count = int(listed.read_text()) if listed.exists() else len(shards)
    if shards and count != len(shards):
        raise ValueError(f"{inside} must have {count} shards, as nshards.txt says, got {len(shards)}.")
    return shards


def read_webdataset(folder: Path, split: str, task: str, languages: list[str]) -> Images:
    """Shards in CLIP_benchmark's layout: KEY.jpg (or png, webp) beside KEY.cls or KEY.txt, and lists of names."""
    kind = folder / "dataset_type.txt"
    if kind.exists() and kind.read_text().strip() == "multilabel":
        raise ValueError(f"{folder} has several labels for one image, which is not supported.")
    wanted = "cls" if task == "classification" else "txt"
    shards = find_shards(folder, split)
    names, places, texts = [], [], []  # of each image: its name, its shard, offset and size, its text
    for shard in shards:
        for key, place, text in _samples(shard, wanted):
            names.append(f"{key} of {shard}")
            places.append((shard, *place))
            texts.append(text)

    def source(index: int) -> io.BytesIO:
        shard, offset, size = places[index]
        with shard.open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    images = Images(names, source, digest([stamp(shard) for shard in shards]))
    if task == "classification":
        images.labels = [int(text) for text in texts]
        files = {"classnames": images.classnames, "zeroshot_classification_templates": images.templates}
        for name, known in files.items():
            if (folder / f"{name}.txt").exists():
                known["en"] = read_lines(folder / f"{name}.txt")
    else:
        rows = [[line for line in text.splitlines() if line.strip()] for text in texts]
        found = [by_language(row, languages, name) for row, name in zip(rows, names)]
        images.captions = {language: [row[language] for row in found] for language in languages}
    return images


def _samples(shard: Path, wanted: str) -> list[tuple[str, tuple[int, int], str]]:
    """The key, the place of the image (offset, size) and the wanted text of every sample; reads no image."""
    samples: dict[str, dict] = {}
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            folder, _, file = member.name.rpartition("/")
            key, _, ending = file.partition(".")
            sample = samples.setdefault(f"{folder}/{key}".lstrip("/"), {}) if member.isfile() else {}
            if ending.lower() in SHARD_IMAGES:
                sample["image"] = (member.offset_data, member.size)
            elif ending == wanted:
                sample["text"] = tar.extractfile(member).read().decode()  # type: ignore[union-attr]
    for key, sample in samples.items():
        if set(sample) != {"image", "text"}:
            kinds = ", ".join(SHARD_IMAGES)
            raise ValueError(f"{key} of {shard} must have an image ({kinds}) and .{wanted}, got {list(sample)}.")
    return [(key, sample["image"], sample["text"]) for key, sample in samples.items()]


# ------------------------------------------------------------------------------------------------------- choices


def read_images(
    data: str,
    source: str,
    task: str,
    languages: list[str],
    columns: Columns,
    split: str = "test",
    config: str | None = None,
    listing: str | None = None,
) -> Images:
    """Read a data set of images with classes or captions.

    Args:
        data: a folder, or a name that `datasets.load_dataset` takes.
        source: "folder", "datasets", "webdataset", or "auto" to tell them apart.
        task: "classification", "retrieval" or "captioning".
        languages: the languages of class names and captions.

    Raises:
        ValueError: no data, or something is missing, empty or ambiguous; the message names it and its place.
    """
    folder = Path(data)
    source = _kind(folder, split) if source == "auto" else source
    if source == "datasets":
        images = read_dataset(data, config, split, columns, task, languages)
    elif source == "webdataset":
        images = read_webdataset(folder, split, task, languages)
    elif task == "classification" and listing is None:
        images = read_class_folders(folder, languages)
    else:
        images = read_listing(folder, listing, columns, task, languages)
    if not images.names:
        raise ValueError(f"`--data` must hold images, got none in {data}.")
    return images


def _kind(folder: Path, split: str) -> str:
    if not folder.is_dir() or any((folder / file).exists() for file in ("dataset_info.json", "dataset_dict.json")):
        return "datasets"
    return "webdataset" if find_shards(folder, split) else "folder"


def named_files(items: list[str], languages: list[str]) -> list[tuple[str, Path]]:
    """`LANGUAGE=FILE`, or `FILE` for the first language -> (language, file)."""
    found: list[tuple[str, Path]] = []
    for item in items:
        language, separator, path = item.partition("=")
        language, path = (language, path) if separator else (languages[0], item)
        if not Path(path).is_file() or language not in languages:
            raise ValueError(f"{item!r} must be FILE or LANGUAGE=FILE, with a file that exists and one of {languages}.")
        found.append((language, Path(path)))
    return found


def choose_classnames(images: Images, language: str, given: list[tuple[str, Path]]) -> list[str]:
    """The class names in a language: those of `--classnames`, or those of the data."""
    files = [path for known, path in given if known == language]
    if len(files) > 1:
        raise ValueError(f"`--classnames` must give one file for {language!r}, got {[str(path) for path in files]}.")
    names = read_lines(files[0]) if files else images.classnames.get(language)
    if names is None:
        raise ValueError(f"`--classnames` must give names in {language!r}: the data has {list(images.classnames)}.")
    for known in images.classnames.values():
        if len(known) != len(names):
            counts = f"{len(known)} names in {language!r}, as the data, got {len(names)}"
            raise ValueError(f"`--classnames` must have {counts}.")
    low, high = min(images.labels or [0]), max(images.labels or [0])
    if low < 0 or high >= len(names):
        covered = f"{len(names)} class names in {language!r}"
        raise ValueError(f"The labels reach from {low} to {high}, which {covered} do not cover.")
    return names


def choose_templates(images: Images, language: str, given: list[tuple[str, Path]]) -> dict[str, list[str]]:
    """Sets of templates for a language: those of `--templates`, or the one of the data, or the one shipped here."""
    files = [path for known, path in given if known == language]
    sets = {path.stem: read_lines(path) for path in files}
    if len(sets) < len(files):
        raise ValueError(f"`--templates` must be files of different names, got {[str(path) for path in files]}.")
    if not files and language in images.templates:
        sets = {"dataset": images.templates[language]}
    elif not files and (SHIPPED / f"{language}.txt").exists():
        sets = {"shipped": read_lines(SHIPPED / f"{language}.txt")}
    for template in (text for texts in sets.values() for text in texts):
        if template.replace("{c}", "{}").count("{}") != 1:
            raise ValueError(f"A template must have one place for the name, {{c}} or {{}}, got {template!r}.")
    if sets:
        return sets
    raise ValueError(f"`--templates` must give a file for {language!r}; {SHIPPED} has none.")
