"""Evaluate a checkpoint as users of CLIP models do: zero-shot classification, retrieval, captions.

Run by whoever asks how good a checkpoint is on their own data, or on a published data set.

    python -m benchmarks.evaluate --task retrieval --data examples/pictures --listing examples/pictures/examples.json \\
        --image-column file --caption-column name --language en zh ja --dtype float32
    python -m benchmarks.evaluate --model . --device-map auto --task classification --data wds_imagenetv2 \\
        --output "{dataset}_{model}_{language}.json"

Without `--model` it evaluates this repository's tiny checkpoint. `--data` is a folder (a sub-folder for each class, or
images with a listing), a data set of the library `datasets`, or WebDataset shards in CLIP_benchmark's layout. Each
combination of mode, language and set of templates gives one JSON object with CLIP_benchmark's keys and metrics in
[0, 1]. For data sets in published.json, the published metrics are printed beside. docs/evaluation.md says more.

Each batch is kept in `--cache`, under a name made of everything that it depends on: an interrupted run continues where
it stopped, and a repeated run reads its results without loading the model.
"""

import argparse
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor

from benchmarks import evaluation_metrics as metrics
from benchmarks.evaluation_data import (
    Columns,
    Images,
    choose_classnames,
    choose_templates,
    digest,
    named_files,
    read_images,
    stamp,
)

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = Path(__file__).with_name("published.json")
MODES = ("InternVL-C", "InternVL-G")
TASKS = {"classification": "zeroshot_classification", "retrieval": "zeroshot_retrieval", "captioning": "captioning"}
# As in the published evaluation.
CROPS = {"classification": "center", "retrieval": "squash", "captioning": "squash"}
PROMPTS = {"en": "English caption:"}
WITHOUT_SPACES = ("zh", "cn", "ja", "jp", "th")
OTHER_NAMES = {"zh": "cn", "ja": "jp"}  # languages in published.json
TEXTS = 512  # texts in a shard of the cache
WEIGHTS = ("*.json", "*.safetensors", "*.model")
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}


# --------------------------------------------------------------------------------------------------------- cache


def cached(folder: Path, about: dict, total: int, produce: Callable[[int], Iterator], unit: str) -> list:
    """The rows that `produce` makes, kept in shards. Shards in the cache are read, and only the rest is made.

    Args:
        folder: the cache; the shards are in a sub-folder named after `about`.
        about: everything that the rows depend on.
        total: the number of rows.
        produce: given the number of cached rows, an iterator over tensors or lists of the following rows.
        unit: what a row is, for the progress bar and the sub-folder.

    Returns:
        The shards, in order.
    """
    folder = folder / f"{unit}s-{digest(about)}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), "utf-8")
    shards = []
    done = 0
    for path in sorted(folder.glob("*.pt")):
        if int(path.stem) != done:
            raise ValueError(f"{folder} lacks the shard {done:09d}.pt. Delete the folder to compute it anew.")
        shards.append(torch.load(path, weights_only=True))
        done += len(shards[-1])
    with tqdm(total=total, initial=done, unit=unit, disable=done == total) as bar:
        for rows in produce(done) if done < total else ():
            _write(rows, folder / f"{done:09d}.pt")
            shards.append(rows)
            done += len(rows)
            bar.update(len(rows))
    return shards


def _write(rows: Any, path: Path) -> None:
    """Write a shard whole or not at all."""
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    torch.save(rows, unfinished)
    unfinished.replace(path)


def weights_stamp(model: str, where: dict) -> Any:
    """A value that changes with the code or the weights of a checkpoint."""
    root = Path(model)
    if not root.is_dir():
        return AutoConfig.from_pretrained(model, **where)._commit_hash
    weights = root / where.get("subfolder", "")
    files = {*root.glob("*.py"), *(path for kind in WEIGHTS for path in weights.glob(kind))}
    return [stamp(path) for path in sorted(files)]


# ----------------------------------------------------------------------------------------------------- embedding


class Evaluation:
    """Embeds the images and texts of a run, or captions the images.

    Args:
        options: what `parse` returns.
        data: the images to evaluate on.
    """

    def __init__(self, options: argparse.Namespace, data: Images):
        self.options, self.data = options, data
        where = {"subfolder": options.subfolder, "revision": options.revision, "trust_remote_code": True}
        self.where = {name: value for name, value in where.items() if value}
        self.lengths = {name: getattr(options, name) for name in ("num_beams", "min_new_tokens", "max_new_tokens")}
        self.about = {
            "model": weights_stamp(options.model, self.where),
            "dtype": options.dtype,
            "device": options.device_map or options.device,
            "versions": VERSIONS,
        }

    @cached_property
    def model(self) -> Any:
        placed = {"device_map": self.options.device_map} if self.options.device_map else {}
        dtype = "auto" if self.options.dtype == "auto" else getattr(torch, self.options.dtype)
        model = AutoModel.from_pretrained(self.options.model, dtype=dtype, **self.where, **placed).eval()
        model.check_processor(self.processor)
        return model if placed else model.to(self.options.device)

    @cached_property
    def processor(self) -> Any:
        return AutoProcessor.from_pretrained(self.options.model, **self.where)

    def keep(self, unit: str, about: dict, total: int, produce: Callable[[int], Iterator]) -> list:
        return cached(self.options.cache, self.about | about, total, produce, unit)

    def pixels(self, start: int) -> Iterator[torch.Tensor]:
        """Batches [B, 3, H, W] of the images from `start` on; threads prepare the next one meanwhile."""
        size, processor = self.options.batch_size, self.processor  # loaded here, since each thread would load its own
        waiting: deque[list[Future]] = deque()
        with ThreadPoolExecutor(self.options.workers) as pool:
            for begin in range(start, len(self.data.names), size):
                rows = range(begin, min(begin + size, len(self.data.names)))
                waiting.append([pool.submit(self._prepare, processor, row) for row in rows])
                if len(waiting) > 1:
                    yield self._collect(waiting.popleft())
            while waiting:
                yield self._collect(waiting.popleft())

    def _prepare(self, processor: Any, row: int) -> torch.Tensor:
        try:
            return processor(images=self.data.open(row), crop=self.options.crop).pixel_values
        except Exception as error:  # PIL raises OSError, SyntaxError, struct.error and more for damaged files
            raise ValueError(f"The image {self.data.names[row]} cannot be read: {error}") from error

    def _collect(self, batch: list[Future]) -> torch.Tensor:
        pixels = torch.cat([each.result() for each in batch])
        # An offloaded model is on "meta"; the hooks of accelerate move its inputs.
        device = "cpu" if self.model.device.type == "meta" else self.model.device
        return pixels.to(device, self.model.dtype)

    def _finite(self, rows: torch.Tensor, names: list[str]) -> torch.Tensor:
        """Rows of length 1 in float32: 16 bits would give more ties."""
        rows = rows.float().cpu()
        for name, row in zip(names, rows):
            if not row.isfinite().all():
                raise ValueError(f"The embedding of {name} is not finite; try `--dtype bfloat16` or `--dtype float32`.")
        return F.normalize(rows, dim=-1)

    def images(self) -> dict[str, torch.Tensor]:
        """For each mode [N, D], of length 1. The vision tower runs once for both."""
        modes, names = self.options.mode, self.data.names

        def produce(done: int) -> Iterator[torch.Tensor]:
            for pixels in self.pixels(done):
                seen = self.model.look_at(pixels, queries="InternVL-G" in modes)
                rows = [self.model.embed_image(seen, mode, normalize=False) for mode in modes]
                batch = names[done : done + len(pixels)]
                yield torch.stack([self._finite(each, batch) for each in rows], dim=1)  # [B, modes, D]
                done += len(pixels)

        about = {"data": self.data.fingerprint, "crop": self.options.crop, "modes": modes}
        shards = self.keep("picture", about, len(names), produce)  # the name in existing caches
        return dict(zip(modes, torch.cat(shards).unbind(1)))

    def texts(self, texts: list[str]) -> torch.Tensor:
        """[T, D], of length 1"""

        def produce(done: int) -> Iterator[torch.Tensor]:
            for start in range(done, len(texts), TEXTS):
                batch = texts[start : start + TEXTS]
                ids = self.processor(text=batch, task="embed", padding=False, return_tensors=None).input_ids
                yield self._finite(self.model.embed_texts(ids, normalize=False), batch)

        return torch.cat(self.keep("text", {"texts": digest(texts)}, len(texts), produce))

    def classes(self, names: list[str], templates: list[str]) -> torch.Tensor:
        """[C, D], of length 1: one embedding for each class."""
        size = max(1, TEXTS // len(templates))

        def produce(done: int) -> Iterator[torch.Tensor]:
            for start in range(done, len(names), size):
                batch = names[start : start + size]
                yield self._finite(self.model.embed_classes(self.processor, batch, templates), batch)

        about = {"names": digest(names), "templates": digest(templates)}
        return torch.cat(self.keep("name", about, len(names), produce))

    def captions(self, prompt: str) -> list[str]:
        """One caption for each image."""

        def produce(done: int) -> Iterator[list[str]]:
            for pixels in self.pixels(done):
                inputs = self.processor(text=prompt, task="caption").to(pixels.device)
                ids = self.model.generate(pixels, **inputs, **self.lengths, do_sample=False)
                yield [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

        about = {"data": self.data.fingerprint, "crop": self.options.crop, "prompt": prompt, **self.lengths}
        shards = self.keep("caption", about, len(self.data.names), produce)
        return [text for shard in shards for text in shard]


# --------------------------------------------------------------------------------------------------------- tasks


def classify(run: Evaluation, sets: dict[str, dict[str, list[str]]]) -> Iterator[dict]:
    """A result for each language, set of templates and mode."""
    images = run.images()
    for language, templates in sets.items():
        names = choose_classnames(run.data, language, run.options.classnames)
        for name, texts in templates.items():
            classes = run.classes(names, texts)
            for mode, rows in images.items():
                found = metrics.classification(rows, classes, run.data.labels or [])
                yield result(run, mode, language, found, templates=name, classes=len(names))


def retrieve(run: Evaluation) -> Iterator[dict]:
    """A result for each language and mode."""
    images = run.images()
    for language in run.options.language:
        groups = run.data.captions[language]
        owners = [image for image, group in enumerate(groups) for _ in group]
        texts = run.texts([text for group in groups for text in group])
        for mode, rows in images.items():
            yield result(run, mode, language, metrics.retrieval(rows, texts, owners), texts=len(texts))


def caption(run: Evaluation) -> Iterator[dict]:
    """A result for each language."""
    options = run.options
    for language in options.language:
        prompt = options.prompt[language]
        written = run.captions(prompt)
        found = metrics.captioning(written, run.data.captions[language], options.tokenizer)
        pairs = [{"image": name, "caption": text} for name, text in zip(run.data.names, written)]
        how = {"tokenizer": options.tokenizer, "prompt": prompt, **run.lengths, "captions": pairs}
        yield result(run, options.mode[0], language, found, **how)


def result(run: Evaluation, mode: str, language: str, found: dict, **more: Any) -> dict:
    """CLIP_benchmark's keys, then ours."""
    options, task = run.options, TASKS[run.options.task]
    theirs = {"dataset": options.dataset_name, "model": mode, "pretrained": options.model}
    theirs |= {"task": task, "metrics": found, "language": language}
    ours = {"mode": mode, "crop": options.crop, "pictures": len(run.data.names), **more}
    ours |= {"dtype": options.dtype, "device": options.device_map or options.device, "versions": VERSIONS}
    return theirs | ours | {"published": published(options.dataset_name, task, mode, language)}


def published(dataset: str, task: str, mode: str, language: str) -> dict | None:
    """The published metrics of a data set of this name, with source and checkpoint; None if there are none."""
    known = json.loads(PUBLISHED.read_text("utf-8"))
    wanted = re.sub(r"^wds[_/]", "", dataset).replace("/", "-")
    languages = (language, OTHER_NAMES.get(language))
    for each in known["results"]:
        same = each["dataset"].replace("/", "-") == wanted and (each["task"], each["mode"]) == (task, mode)
        if same and each["language"] in languages:
            source = known["sources"][each["source"]]
            return {"metrics": each["metrics"], "where": source["where"], "checkpoint": source["checkpoints"][mode]}
    return None


def show(found: dict) -> None:
    """Print a result in per cent, beside the published one."""
    beside = found["published"]["metrics"] if found["published"] else {}
    title = [found["dataset"], found["task"], found["model"], found["language"], found.get("templates", "")]
    print("\n" + " ".join(filter(None, title)) + f", {found['pictures']} images, crop {found['crop']}")
    for name, value in found["metrics"].items():
        other = beside.get(name)
        line = f"  {name:28}" + ("       -" if value is None else f"{value:8.2%}")
        print(line if other is None or value is None else f"{line}   published {other:7.2%}, {value - other:+.2%}")
    if found["published"]:
        print(f"  published with {found['published']['checkpoint']} ({found['published']['where']})")


# ------------------------------------------------------------------------------------------------------- options


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=TASKS, required=True)
    add("--data", required=True, help="folder, or a name for datasets.load_dataset")
    add("--source", choices=("auto", "folder", "datasets", "webdataset"), default="auto", help="what --data is")
    add("--dataset-name", help="in the result; the last part of --data if not given")
    add("--split", default="test", help="of datasets or shards")
    add("--dataset-config", help="of datasets")
    listing = "file of captions or classes; captions or metadata (.json, .jsonl, .csv) in --data if not given"
    add("--listing", help=listing)
    add("--image-column", default="image", help="of datasets or the listing, where it may also be file_name")
    add("--label-column", default="label", help="a class index or name; in a listing also one for each language")
    add("--caption-column", default="caption", help="a text, a list of texts, or either for each language")
    add("--language", nargs="+", default=["en"], help="languages of class names, templates and captions")
    several = {"nargs": "+", "default": []}
    add("--classnames", **several, help="FILE or LANGUAGE=FILE, one name a line, in the order of the labels")
    add("--templates", **several, help="FILE or LANGUAGE=FILE, one a line with {c}; each file gives a result")
    add("--model", help="folder or Hub id; this repository's tiny checkpoint if not given")
    add("--subfolder", default="", help="of --model")
    add("--revision", help="of --model")
    add("--mode", nargs="+", choices=MODES, help="InternVL-C if not given; captions need InternVL-G")
    add(
        "--crop", choices=("center", "squash"), help="as published if not given: center for classification, else squash"
    )
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    place.add_argument("--device-map", type=device_map, help='"auto", or JSON such as {"": 0, "qllama": 1}')
    add("--batch-size", type=int, default=32, help="images at a time")
    add("--workers", type=int, default=4, help="threads that read images")
    add("--num-beams", type=int, default=5, help="for captions, like the next two")
    add("--min-new-tokens", type=int, default=8)
    add("--max-new-tokens", type=int, default=30)
    add("--prompt", **several, help="LANGUAGE=TEXT for captions; English has a default")
    add("--tokenizer", choices=metrics.TOKENIZERS, default="ptb", help="for the scores of captions")
    add("--cache", type=Path, default=ROOT / ".cache" / "evaluation", help="folder of embeddings and captions")
    add("--output", help='file for each result, such as "{dataset}_{model}_{language}_{task}_{templates}.json"')
    return complete(parser.parse_args(arguments))


def device_map(text: str) -> str | dict:
    return json.loads(text) if text.startswith("{") else text


def complete(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in the options that depend on others.

    Raises:
        ValueError: options that contradict each other.
    """
    if options.model is None:
        options.model, options.subfolder = str(ROOT), "tiny"
    captioning = options.task == "captioning"
    options.mode = options.mode or ["InternVL-G" if captioning else "InternVL-C"]
    if captioning and options.mode != ["InternVL-G"]:
        raise ValueError(f"`--mode` must be InternVL-G for captions, which need the queries, got {options.mode}.")
    for name in ("batch_size", "workers"):
        if getattr(options, name) < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least 1, got {getattr(options, name)}.")
    options.crop = options.crop or CROPS[options.task]
    options.dataset_name = options.dataset_name or Path(options.data).resolve().name
    for name in ("classnames", "templates"):
        setattr(options, name, named_files(getattr(options, name), options.language))
    prompts = dict(item.partition("=")[::2] for item in options.prompt)
    if not set(prompts) <= set(options.language):
        raise ValueError(f"`--prompt` must be LANGUAGE=TEXT with a language of `--language`, got {options.prompt}.")
    options.prompt = PROMPTS | prompts
    if captioning:
        _check_captioning(options)
    return options


def _check_captioning(options: argparse.Namespace) -> None:
    metrics.check_tokenizer(options.tokenizer)
    for language in options.language:
        if language not in options.prompt:
            raise ValueError(f"`--prompt` must give a prompt for {language!r}, such as {language}=TEXT.")
        if language in WITHOUT_SPACES and options.tokenizer != "characters":
            raise ValueError(f"`--tokenizer` must be characters for {language!r}, got {options.tokenizer!r}.")
    metrics.check_scorers()


def output_paths(options: argparse.Namespace, sets: dict[str, dict]) -> dict[tuple, Path]:
    """The file of each result, by mode, language and set of templates; two results in one file are an error."""
    fixed = {"dataset": options.dataset_name, "pretrained": options.model, "task": TASKS[options.task]}
    paths = {}
    for mode in options.mode:
        for language, names in sets.items():
            for name in names or [""]:
                parts = fixed | {"model": mode, "language": language, "templates": name}
                safe = {key: value.strip("/").replace("/", "-") for key, value in parts.items()}
                paths[mode, language, name] = Path(options.output.format(**safe))
    if len(set(paths.values())) < len(paths):
        raise ValueError(
            f"`--output` must differ for the {len(paths)} results of this run: use {{model}} and the like."
        )
    return paths


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> list[dict]:
    """Evaluate, print and write. Returns the results."""
    options = parse(arguments)
    columns = Columns(options.image_column, options.label_column, options.caption_column)
    known = (options.split, options.dataset_config, options.listing)
    data = read_images(options.data, options.source, options.task, options.language, columns, *known)
    sets: dict[str, dict] = {language: {} for language in options.language}
    if options.task == "classification":
        sets = {language: choose_templates(data, language, options.templates) for language in options.language}
        for language in options.language:
            choose_classnames(data, language, options.classnames)  # raise errors before hours of work, not after
    paths = output_paths(options, sets) if options.output else {}
    run = Evaluation(options, data)
    tasks = {"classification": partial(classify, sets=sets), "retrieval": retrieve, "captioning": caption}
    results = []
    for found in tasks[options.task](run):
        show(found)
        results.append(found)
        if paths:
            write(found, paths[found["model"], found["language"], found.get("templates", "")])
    return results


def write(found: dict, path: Path) -> None:
    """Write a result, and its captions to a second file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    captions = found.get("captions")
    if captions:
        text = json.dumps(captions, indent=1, ensure_ascii=False)
        path.with_suffix(".captions.json").write_text(text + "\n", "utf-8")
    figures = {name: value for name, value in found.items() if name != "captions"}
    path.write_text(json.dumps(figures, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # the message names the argument, the file or the model
        sys.exit(f"{type(error).__name__}: {error}")
