"""Embed any number of images and texts on Ray Data: folders, Parquet files or WebDataset tars in, Parquet files out.

    pip install -r examples/embed-requirements.txt
    python examples/embed_dataset.py --model . --subfolder tiny --data examples/pictures --output out
    python examples/embed_dataset.py --data s3://bucket/tars --output s3://bucket/out --embed image text --dry-run
    python examples/embed_dataset.py --data s3://bucket/tars --output s3://bucket/out --address auto    # a cluster

`--data` and `--output` are paths or fsspec URLs (s3:// needs `pip install s3fs`, http:// aiohttp, ...). Every machine
of a cluster must see them, and `--model` if it is a folder.

* Ray tasks read and decode, a pool of actors with a model each embeds, and the driver writes. Decoded batches wait in
  Ray's object store; when it is full, Ray stops the readers.
* The input is cut into shards: `--shard-rows` rows of a Parquet file or of a folder's list of files, or a whole tar.
  Each becomes one `embeddings/part-N.parquet`, which is there whole or not at all. After any failure the same command
  embeds the missing shards. It refuses other settings.
* A row that cannot be embedded goes to `errors/part-N.parquet`, with the reason. Every run ends by checking that input
  rows = output rows + errors. To try errors again, delete their `embeddings/part-N.parquet` and repeat the command.
* `manifest.json` records the model, the settings, the input, the number of rows and how long the models waited;
  `shards.parquet` lists the shards, and `files.parquet` the files of a folder when the run began.
* Columns: `id` (the path below the folder, `--id-column` or FILE:ROW of a Parquet file, the key of a tar), `source`,
  `image_c` and `image_g` (embeddings of length 1 in the two modes), `text`, `caption` and `caption_text` (the caption
  that the model wrote).
"""

import argparse
import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # by default Ray sends usage statistics
# Ray's C++ part reports harmless things as errors: that metrics have no agent, since there is no dashboard, and how Ray
# Data starts its own actors (github.com/ray-project/ray/issues/57733). Failures reach Python as exceptions.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import decoding
import embed_costs
import embed_output
import embed_sources
import embed_stages
import ray
import torch
from embed_output import Output
from embed_stages import FLOATS, MODES
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.data._internal.execution.execution_callback import ExecutionCallback
from tqdm import tqdm
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

MAX_TASKS = 10_000  # with more shards a task reads several
MAX_CALLS = 1000  # of a worker process
SAMPLED_SHARDS = 4
SECONDS_BETWEEN_LINES = 30  # in a log file; a terminal has a bar


# --------------------------------------------------------------------------------------------------------- options


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="a folder, a file or a pattern with `*`; a path or a URL of fsspec")
    add("--output", required=True, help="a folder; a path or a URL of fsspec")
    add("--source", default="auto", choices=("auto", "folder", "parquet", "webdataset"), help="kind of input")
    add("--storage-options", type=json_object, default={}, help="JSON for fsspec to read `--data`; not recorded")
    add("--output-options", type=json_object, default={}, help="the same for `--output`")
    add("--model", default=".", help="a folder or an id on the Hub")
    add("--subfolder", default="", help="of the model")
    add("--revision", help="of an id on the Hub; the manifest records its commit")
    add("--embed", nargs="+", default=["image"], choices=("image", "text", "caption"), help="what to embed of a row")
    add("--mode", nargs="+", default=["InternVL-C"], choices=tuple(MODES.values()), help="of the images")
    add("--crop", default="center", choices=("center", "squash"), help="how images become square")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="of the weights")
    add("--embeddings", default="float16", choices=tuple(FLOATS), help="type of the embeddings written")
    add("--image-column", default="image", help="of Parquet: bytes, bytes with a path, or paths or URLs")
    add("--text-column", default="text", help="of Parquet, or in the json of a tar without txt")
    add("--id-column", default="", help="of Parquet; FILE:ROW by default")
    add("--truncate", action="store_true", help="truncate texts that are too long; by default they are errors")
    add("--prompt", default="English caption:", help="for captions")
    add("--max-new-tokens", type=int, default=30, help="of a caption")
    add("--num-beams", type=int, default=1, help="of a caption")
    add("--batch-size", type=int, default=64, help="rows per call of the model")
    add("--shard-rows", type=int, default=10_000, help="rows per part of the output; a tar is always one part")
    add("--gpus-per-model", type=int, help="1, or 0 if the machine has none; more spread a model by `device_map`")
    add("--cpus-per-model", type=int, default=1, help="threads of a model without a GPU")
    add("--models", type=int, help="size of the actor pool; by default as many as the GPUs can hold, or 1")
    add("--decoders", type=int, help="most tasks that read and decode at once; by default one per free CPU")
    add("--address", help="of a Ray cluster, such as `auto`; by default Ray starts on this machine")
    add("--object-store-gb", type=float, help="of this machine's Ray; by default 30 %% of its memory")
    about = "start again after this time without a batch; must be longer than a model takes to load"
    add("--stall-minutes", type=float, default=20, help=about)
    add("--dry-run", action="store_true", help="embed a sample, write nothing, print rows, time and cost")
    add("--sample-rows", type=int, default=512, help="of a dry run")
    add("--price-per-hour", type=float, help="of all machines of this run, for a dry run")
    add("--h100", action="store_true", help="in a dry run: compute the time for a billion images on H100s")
    add("--mfu", type=float, help="the share of an H100's peak that you expect to reach, such as 0.4")
    add("--measured", type=Path, help="with --h100: a result file of benchmarks/gpu.py, instead of --mfu")
    add("--price-per-gpu-hour", type=float, help="of such a card")
    return complete(parser.parse_args(arguments))


def json_object(text: str) -> dict:
    return dict(json.loads(text))


def complete(options: argparse.Namespace) -> argparse.Namespace:
    """Set what follows from the options.

    Raises:
        ValueError: options that are out of range or contradict each other.
    """
    check_numbers(options)
    if options.measured and options.mfu:
        raise ValueError("`--mfu` is an assumption and `--measured` a measurement: give one of them.")
    if options.h100 and not options.measured and not 0 < (options.mfu or 0) <= 1:
        raise ValueError(f"`--h100` needs an assumption, `--mfu` of at most 1, got {options.mfu}; or `--measured`.")
    options.card = embed_costs.measured_card(options.measured, set(options.mode)) if options.measured else None
    if options.address and options.object_store_gb:
        raise ValueError("`--object-store-gb` is for this machine's Ray; set a cluster's when you start it.")
    options.embed, options.mode = sorted(set(options.embed)), sorted(set(options.mode))
    options.needs_images, options.needs_texts = set(options.embed) != {"text"}, "text" in options.embed
    options.data, options.output = absolute(options.data), absolute(options.output)
    if (options.output + "/").startswith(options.data.rstrip("/") + "/"):
        raise ValueError(f"`--output` must lie outside of `--data`, got {options.output!r} in {options.data!r}.")
    options.kind, options.model_version, options.files, options.pool = options.source, "", None, 0
    return options


def check_numbers(options: argparse.Namespace) -> None:
    """Check the range of each number, and that each option comes with the one that it needs."""

    def option(name: str) -> str:
        return f"`--{name.replace('_', '-')}`"

    for name, value in vars(options).items():
        least = 0 if name == "gpus_per_model" else 1
        if type(value) is int and value < least:  # not a bool
            raise ValueError(f"{option(name)} must be at least {least}, got {value}.")
        if isinstance(value, float) and not 0 < value < math.inf:
            raise ValueError(f"{option(name)} must be a positive number, got {value}.")
    for name, other in (("price_per_hour", "dry_run"), ("h100", "dry_run"), ("mfu", "h100"), ("measured", "h100"),
                        ("price_per_gpu_hour", "h100")):  # fmt: skip
        if getattr(options, name) and not getattr(options, other):
            raise ValueError(f"{option(name)} needs {option(other)}.")


def absolute(path: str) -> str:
    """A URL that means the same in every process of this machine."""
    return path if "://" in path or "::" in path else "file://" + os.path.abspath(os.path.expanduser(path))


# --------------------------------------------------------------------------------------------------------- running


@dataclass
class Tally:
    """Rows, errors and seconds of the batches of this run."""

    rows: int = 0
    errors: int = 0
    waited: float = 0.0
    worked: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    def add(self, batch: dict) -> None:
        self.rows += batch["rows"]
        self.errors += len(json.loads(batch["errors"]))
        if batch["waited"] is not None:  # not the first batch of an actor
            self.waited += batch["waited"]
            self.worked += batch["worked"]

    @property
    def model_waits(self) -> float:
        """The share of the time between an actor's first batch and its last in which it waited for one."""
        return self.waited / (self.waited + self.worked) if self.worked else 0.0


class Stalled(Exception):
    """No batch came for `--stall-minutes`."""


class Watch(ExecutionCallback):
    """Detects a stall. Ray calls it at every step of its scheduling, also while no batch comes. The time starts with
    the first batch, because starting processes and loading models takes longer on a busy machine; it starts at once if
    the cluster no longer has room for the models.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.came: float | None = None
        self.began = self.looked = self.said = time.monotonic()

    def batch(self) -> None:
        self.came = time.monotonic()

    def on_execution_step(self, executor: Any) -> None:
        now = time.monotonic()
        if now - self.looked < 1:
            return
        self.looked = now
        if self.came is None and room_for_models(self.options) < self.options.pool:
            self.came = now
        if self.came is None and now - self.said > SECONDS_BETWEEN_LINES:
            self.said = now
            say(f"No rows after {now - self.began:.0f} s: models are still loading, or others use the cluster.")
        if self.came is not None and now - self.came > self.options.stall_minutes * 60:
            raise Stalled(f"no batch for {self.options.stall_minutes:g} minutes (`--stall-minutes`)")


def start_ray(options: argparse.Namespace) -> None:
    """Join the cluster, or start Ray here with CPUs for the models and at least one to decode."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # These warn that there are no progress bars, and that Ray accepts connections without a token; both are intended.
    for name in ("ray.data._internal.progress", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Without the lines of workers: errors of rows are in the output, and other errors come as exceptions.
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False}
    if options.address:
        say(f"Joining the Ray cluster at {options.address!r} ...")
        ray.init(address=options.address, **quiet)
        return
    say("Starting Ray on this machine ...")
    cpus = max((options.models or 1) * options.cpus_per_model + 1, os.cpu_count() or 1)
    store = int(options.object_store_gb * 1e9) if options.object_store_gb else None
    ray.init("local", num_cpus=cpus, object_store_memory=store, include_dashboard=False, **quiet)


def resources() -> list[tuple[int, int]]:
    """GPUs and CPUs of each machine of the cluster, free or not."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(int(there.get("GPU", 0)), int(there.get("CPU", 0))) for there in alive]


def room_for_models(options: argparse.Namespace) -> int:
    """Number of models that fit, each on one machine, with a CPU left to decode."""
    each, threads, machines = options.gpus_per_model, options.cpus_per_model, resources()
    places = sum(min(cpus // threads, gpus // each if each else cpus) for gpus, cpus in machines)
    return min(places, (sum(cpus for _, cpus in machines) - 1) // threads)


def place_models(options: argparse.Namespace, is_first: bool = True) -> None:
    """Set the number of GPUs per model, of models and of decoding tasks; after the first time use what is left.

    Raises:
        ValueError: the cluster is too small.
    """
    machines = resources()
    gpus, cpus = (sum(column) for column in zip(*machines))
    if options.gpus_per_model is None:
        options.gpus_per_model = min(gpus, 1)
    each, room = options.gpus_per_model, room_for_models(options)
    options.pool = options.models or (sum(there // each for there, _ in machines) if each else 1)
    if not is_first:
        options.pool = min(options.pool, room)
    if not 1 <= options.pool <= room:
        wanted = f"{options.pool or 1} with {each} GPUs and {options.cpus_per_model} CPUs each, and a CPU to decode"
        there = f"{len(machines)} machines with {gpus} GPUs and {cpus} CPUs"
        raise ValueError(f"`--models` must fit into the cluster of {there}, got {wanted}.")
    # A blocked reader keeps its CPU, so a model that restarts must have CPUs of its own.
    free = cpus - options.pool * options.cpus_per_model
    options.tasks = min(options.decoders or free, free)


def batches_of(shards: list[dict], options: argparse.Namespace) -> Iterator[dict]:
    """The results of `Embed` for all shards, in any order."""
    context, watch = DataContext.get_current(), Watch(options)
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # it includes the start of processes
    context.custom_execution_callback_classes = [lambda: watch]  # workers get copies that nothing calls
    context.target_max_block_size = options.batch_bytes  # one batch per block, sent at once
    dataset = ray.data.from_items(shards, override_num_blocks=min(len(shards), MAX_TASKS))
    # Ray fuses steps with the same requirements, and then the actors would decode. `max_calls` prevents that, and
    # restarts processes whose libraries may leak memory.
    tasks = {"compute": TaskPoolStrategy(size=options.tasks), "num_cpus": 1, "max_calls": MAX_CALLS}
    dataset = dataset.flat_map(embed_stages.decode, fn_kwargs={"options": options}, **tasks)
    actors = {"compute": ActorPoolStrategy(size=options.pool)}
    actors |= {"num_cpus": options.cpus_per_model, "num_gpus": options.gpus_per_model}
    dataset = dataset.map(embed_stages.Embed, fn_constructor_args=(options,), **actors)
    for batch in dataset.iter_rows():
        watch.batch()
        yield batch


def embed_all(shards: list[dict], options: argparse.Namespace, output: Output, tally: Tally) -> None:
    """Embed the missing shards. Ray replaces workers that die and repeats their work. If it cannot, for example because
    a machine with an actor is gone for good, start again on what is left of the cluster.
    """
    for attempt in count():
        done = output.parts("embeddings")
        missing = [shard for shard in shards if shard["shard"] not in done]
        if not missing:
            return
        place_models(options, is_first=attempt == 0)
        say_start(options)
        writer, total = embed_output.Writer(output, embed_stages.schema_of(options)), embed_output.known_rows(shards)
        rows_done = 0 if total is None else total - embed_output.known_rows(missing)
        try:
            for batch in with_progress(batches_of(missing, options), tally, rows_done, total):
                writer.add(batch)
        except ray.exceptions.RayTaskError:
            raise
        except (ray.exceptions.RayError, Stalled) as error:
            writer.finish()
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            left = [shard["name"] for shard in missing if shard["shard"] not in output.parts("embeddings")]
            # With fewer machines than before another attempt may succeed.
            if len(left) == len(missing) and room_for_models(options) >= options.pool:
                raise SystemExit(f"{reason}\nNo progress with {len(left)} shards, such as {left[:3]}.") from None
            say(f"{reason}\nStarting again on what is left of the cluster.")
        finally:
            writer.finish()


class Lines(tqdm):
    """A progress bar for log files: lines instead of carriage returns (tqdm lets subclasses replace `display`)."""

    def __init__(self, **options: Any):
        super().__init__(file=io.StringIO(), ncols=0, mininterval=SECONDS_BETWEEN_LINES, miniters=1, **options)

    def display(self, *_: Any, **__: Any) -> None:
        say(str(self))


def with_progress(batches: Iterator[dict], tally: Tally, done: int, total: int | None) -> Iterator[dict]:
    """Count batches, and show rows done and known, the rate, the time left and the errors so far."""
    bar = None
    try:
        for batch in batches:
            tally.add(batch)
            news = f"errors {tally.errors}, models wait {tally.model_waits:.0%}"
            if bar is None:  # no earlier: while models load there is no rate
                kind = tqdm if sys.stderr.isatty() else Lines
                bar = kind(total=total, initial=done + batch["rows"], unit=" rows", postfix=news)
            else:
                bar.set_postfix_str(news, refresh=False)
                bar.update(batch["rows"])
            yield batch
    finally:
        if bar is not None:
            bar.close()


def say_start(options: argparse.Namespace) -> None:
    what = "1 actor" if options.pool == 1 else f"{options.pool} actors"
    where = {0: "the CPU", 1: "a GPU each"}.get(options.gpus_per_model, f"{options.gpus_per_model} GPUs each")
    say(f"Starting {what} on {where} and loading the model; the 14B takes minutes ...")


def say(text: str) -> None:
    print(text, flush=True)


# ------------------------------------------------------------------------------------------------------ the result


def run(options: argparse.Namespace) -> dict:
    """Embed all missing shards and return the manifest; in a dry run return the estimate."""
    transformers_logging.disable_progress_bar()
    is_folder = os.path.isdir(options.model)
    options.model = os.path.abspath(options.model) if is_folder else options.model
    say("Reading the model's files, to record its version ...")
    options.model_version = embed_output.model_version(options)
    options.where = {"subfolder": options.subfolder} | ({} if is_folder else {"revision": options.model_version})
    has_mode_g = "image" in options.embed and MODES["image_g"] in options.mode
    options.needs_queries = "caption" in options.embed or has_mode_g
    processor = embed_stages.load_processor(options)
    config = AutoConfig.from_pretrained(options.model, trust_remote_code=True, **options.where)
    if options.dtype == "auto":
        options.dtype = str(config.dtype or "float32").removeprefix("torch.")
    size = processor.image_processor.crop_size["height"]
    pixels = 3 * size * size * getattr(torch, options.dtype).itemsize if options.needs_images else 0
    options.batch_bytes, options.width = max(options.batch_size * pixels, 1), config.clip_embed_dim
    output = Output(options.output, options.output_options)
    say("Reading the listing of the input ...")
    manifest, shards = embed_output.begin(options, output)
    about = manifest["input"]
    say(f"{len(shards)} shards of {options.kind}, {about['rows'] or 'an unknown number of'} rows; "
        f"left out: {', '.join(f'{n} {kind}' for kind, n in about['left_out'].items()) or 'nothing'}")  # fmt: skip
    try:
        start_ray(options)
        return dry_run(shards, options) if options.dry_run else embed_and_account(manifest, shards, options, output)
    finally:
        ray.shutdown()


def embed_and_account(manifest: dict, shards: list[dict], options: argparse.Namespace, output: Output) -> dict:
    already, tally, versions = len(output.parts("embeddings")), Tally(), embed_output.versions()
    if any(run["versions"] != versions for run in manifest["runs"]):
        say("An earlier run on this folder used other versions of packages; manifest.json lists them.")
    this_run = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "versions": versions}
    manifest["runs"].append(this_run)
    output.write_json("manifest.json", manifest)
    if already:
        say(f"Resuming: {already} of {len(shards)} shards are done. The input is as listed by the first run.")
    embed_all(shards, options, output, tally)
    say("Counting the rows of all parts ...")
    counts = embed_output.check_counts(shards, output)
    output.remove_leftovers()
    seconds = time.perf_counter() - tally.start
    this_run |= {"rows": tally.rows, "seconds": round(seconds, 1), "models": options.pool}
    this_run["model_waits"] = round(tally.model_waits, 4)
    manifest["result"] = counts
    output.write_json("manifest.json", manifest)
    say(f"{counts['rows']} rows = {counts['embedded']} embedded + {counts['errors']} errors")
    if counts["errors"]:
        say("\n".join(embed_output.first_errors(output)))
    if tally.rows:
        say(f"{tally.rows} rows in {seconds:.0f} s")
    counted = tally.waited + tally.worked
    if counted > 1:  # a share of less than a second says nothing
        say(f"the models waited {tally.model_waits:.1%} of the {counted:.1f} s after their first batch")
    return manifest


def dry_run(shards: list[dict], options: argparse.Namespace) -> dict:
    """Embed rows of shards from all over the input, write nothing, and return the estimate."""
    chosen = shards[:: max(len(shards) // SAMPLED_SHARDS, 1)][:SAMPLED_SHARDS]
    limit = math.ceil(options.sample_rows / len(chosen))
    chosen = [shard | {"limit": limit} for shard in chosen]
    files, options.files = options.files, None
    if files is not None:  # the workers have no list of files to read
        chosen = [shard | {"files": json.dumps(files.slice(shard["start"], limit).to_pylist())} for shard in chosen]
    place_models(options)
    say_start(options)
    rows = embed_output.known_rows(shards)
    sample = with_progress(batches_of(chosen, options), Tally(), 0, rows and min(rows, options.sample_rows))
    found = embed_costs.estimate(shards, list(sample), options)
    for line in embed_costs.lines(found, options):
        say(line)
    return found


def main(arguments: list[str] | None = None) -> dict:
    for module in (decoding, embed_sources, embed_stages, sys.modules[__name__]):  # other machines lack these files
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        return run(parse(arguments))
    except KeyboardInterrupt:
        say("Interrupted. The same command goes on from what is written.")
        raise SystemExit(130) from None
    except (ValueError, TypeError, OSError, Stalled) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
