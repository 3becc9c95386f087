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

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its makers unless told

import embed_costs
import embed_output
import embed_sources
import embed_stages
import ray
import torch
from embed_output import Output
from embed_stages import FLOATS, MODES
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

MAX_TASKS = 10_000  # beyond that many shards a task reads several
MAX_CALLS = 1000
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
    add("--model", default=".", help="a folder or an id on the Hub")
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
    add("--stall-minutes", type=float, default=20, help="without a batch, after which all is started anew; longer than "
        "a model takes to load")  # fmt: skip
    add("--dry-run", action="store_true", help="embed a sample, write nothing, say rows, time and cost")
    add("--sample-rows", type=int, default=512, help="of a dry run")
    add("--price-per-hour", type=float, help="of all machines of this run, for a dry run")
    add("--h100", action="store_true", help="in a dry run: what a billion pictures take on H100s, by arithmetic")
    add("--mfu", type=float, help="the share of an H100's peak that you expect to reach, such as 0.4")
    add("--measured", type=Path, help="with --h100: what benchmarks/gpu.py measured on a card, instead of --mfu")
    add("--price-per-gpu-hour", type=float, help="of such a card")
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
    check_each(options)
    if options.measured and options.mfu:
        raise ValueError("`--mfu` is an assumption and `--measured` a measurement: give one of them.")
    if options.h100 and not options.measured and (options.mfu is None or options.mfu > 1):
        raise ValueError(
            f"`--h100` needs an assumption, `--mfu` of at most 1, got {options.mfu}; or `--measured FILE`."
        )
    options.card = embed_costs.measured_card(options.measured, set(options.mode)) if options.measured else None
    if options.address and options.object_store_gb:
        raise ValueError("`--object-store-gb` is for this machine's Ray; a cluster's is set when it is started.")
    options.embed, options.mode = sorted(set(options.embed)), sorted(set(options.mode))
    options.needs_pictures, options.needs_texts = set(options.embed) != {"text"}, "text" in options.embed
    options.data, options.output = absolute(options.data), absolute(options.output)
    if (options.output + "/").startswith(options.data.rstrip("/") + "/"):
        raise ValueError(f"`--output` must lie outside of `--data`, got {options.output!r} in {options.data!r}.")
    options.kind, options.model_version, options.files, options.pool = options.source, "", None, 0
    return options


def check_each(options: argparse.Namespace) -> None:
    """Check the range of each number, and that each option has the one that it needs."""
    for name in ("batch_size", "shard_rows", "cpus_per_model", "models", "decoders", "max_new_tokens", "num_beams",
                 "sample_rows", "gpus_per_model"):  # fmt: skip
        value, least = getattr(options, name), 0 if name == "gpus_per_model" else 1
        if value is not None and value < least:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least {least}, got {value}.")
    for name in ("object_store_gb", "stall_minutes", "price_per_hour", "mfu", "price_per_gpu_hour"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"`--{name.replace('_', '-')}` must be a positive number, got {value}.")
    for name, other in (("price_per_hour", "dry_run"), ("h100", "dry_run"), ("mfu", "h100"), ("measured", "h100"),
                        ("price_per_gpu_hour", "h100")):  # fmt: skip
        if getattr(options, name) and not getattr(options, other):
            raise ValueError(f"`--{name.replace('_', '-')}` needs `--{other.replace('_', '-')}`.")


def absolute(path: str) -> str:
    """A local path as every process of this machine finds it."""
    return path if "://" in path or "::" in path else "file://" + os.path.abspath(os.path.expanduser(path))


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


class Stalled(Exception):
    """Nothing has come for `--stall-minutes`."""


class Watch:
    """
    Ray calls this at every step of its scheduling, also while nothing comes. The time that counts begins with the first
    batch: until then processes start and models load, which takes longer the busier a machine is. It begins at once if
    the models have lost their place.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.came: float | None = None
        self.looked = self.said = time.monotonic()

    def batch(self) -> None:
        self.came = time.monotonic()

    def on_execution_step(self, executor: Any) -> None:
        now = time.monotonic()
        if now - self.looked < 1:
            return
        self.looked = now
        if self.came is None and room_for_models(self.options) < self.options.pool:
            self.came = now
        if self.came is None and now - self.said > 60:
            self.said = now
            say("nothing yet: models load, or others use the cluster")
        if self.came is not None and now - self.came > self.options.stall_minutes * 60:
            raise Stalled(f"no batch for {self.options.stall_minutes:g} minutes (`--stall-minutes`)")

    def before_execution_starts(self, executor: Any) -> None: ...

    def after_execution_succeeds(self, executor: Any) -> None: ...

    def after_execution_fails(self, executor: Any, error: Exception) -> None: ...


def start_ray(options: argparse.Namespace) -> None:
    """Join the cluster, or start Ray here with a CPU for every model and at least one to decode."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # That there are no progress bars, and that this Ray takes nothing without a token, is as it should be.
    for name in ("ray.data._internal.progress", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet = {"include_dashboard": False, "logging_level": logging.WARNING} if not options.address else {}
    if options.address:
        ray.init(address=options.address, logging_level=logging.WARNING)
    else:
        needed = (options.models or 1) * options.cpus_per_model + 1
        store = int(options.object_store_gb * 1e9) if options.object_store_gb else None
        ray.init("local", num_cpus=max(needed, os.cpu_count() or 1), object_store_memory=store, **quiet)


def resources() -> list[tuple[int, int]]:
    """GPUs and CPUs of each machine that is there, free or not."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(int(there.get("GPU", 0)), int(there.get("CPU", 0))) for there in alive]


def room_for_models(options: argparse.Namespace) -> int:
    """How many models have a place, each on one machine, with a CPU left somewhere to decode."""
    each, threads, machines = options.gpus_per_model, options.cpus_per_model, resources()
    places = sum(min(cpus // threads, gpus // each if each else cpus) for gpus, cpus in machines)
    return min(places, (sum(cpus for _, cpus in machines) - 1) // threads)


def place_models(options: argparse.Namespace, is_first: bool = True) -> None:
    """
    How many GPUs a model gets, and how many models there are; after the first time as many as there still is room for.

    Raises:
        ValueError: the cluster has too little.
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
    # A reader that waits for room keeps its CPU, so a model that is to be made anew must not need it.
    free = cpus - options.pool * options.cpus_per_model
    options.tasks = min(options.decoders or free, free)


def batches_of(shards: list[dict], options: argparse.Namespace) -> Iterator[dict]:
    """What `Embed` makes of all shards, in any order."""
    context, watch = DataContext.get_current(), Watch(options)
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # it counts the time that processes need to start
    context.custom_execution_callback_classes = [lambda: watch]  # a copy goes to all workers, where nothing calls it
    context.target_max_block_size = options.batch_bytes  # a batch is a block: the first goes out before the second
    dataset = ray.data.from_items(shards, override_num_blocks=min(len(shards), MAX_TASKS))
    # Ray joins steps that ask for the same, and then the actors would decode. `max_calls` keeps them apart, and makes
    # processes anew whose libraries may have leaked memory.
    dataset = dataset.flat_map(
        embed_stages.decode,
        fn_kwargs={"options": options},
        compute=TaskPoolStrategy(size=options.tasks),
        num_cpus=1,
        max_calls=MAX_CALLS,
    )
    dataset = dataset.map(
        embed_stages.Embed,
        fn_constructor_args=(options,),
        compute=ActorPoolStrategy(size=options.pool),
        num_cpus=options.cpus_per_model,
        num_gpus=options.gpus_per_model,
    )
    for batch in dataset.iter_rows():
        watch.batch()
        yield batch


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
        writer, shown = embed_output.Writer(output, embed_stages.schema_of(options)), time.perf_counter()
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
        except (ray.exceptions.RayError, Stalled) as error:
            writer.finish()
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            left = [shard["name"] for shard in missing if shard["shard"] not in output.parts("embeddings")]
            # With fewer machines than before it may go better.
            if len(left) == len(missing) and room_for_models(options) >= options.pool:
                raise SystemExit(f"{reason}\nNo progress with {len(left)} shards, such as {left[:3]}.") from None
            say(f"{reason}\nGoing on with what is left of the cluster.")
        finally:
            writer.finish()


def say(text: str) -> None:
    print(text, flush=True)


# ------------------------------------------------------------------------------------------------------ the result


def run(options: argparse.Namespace) -> dict:
    """Embed what there is to embed. Returns the manifest."""
    transformers_logging.disable_progress_bar()
    options.model = os.path.abspath(options.model) if os.path.isdir(options.model) else options.model
    options.model_version = embed_output.model_version(options)
    revision = {} if os.path.isdir(options.model) else {"revision": options.model_version}
    options.where = {"subfolder": options.subfolder, **revision}
    options.needs_queries = "caption" in options.embed or (
        "image" in options.embed and MODES["image_g"] in options.mode
    )
    processor = embed_stages.load_processor(options)
    config = AutoConfig.from_pretrained(options.model, trust_remote_code=True, **options.where)
    stored = str(config.dtype or "float32").removeprefix("torch.")
    options.dtype = stored if options.dtype == "auto" else options.dtype
    size = processor.image_processor.crop_size["height"]
    pixels = 3 * size * size * getattr(torch, options.dtype).itemsize if options.needs_pictures else 0
    options.batch_bytes, options.width = max(options.batch_size * pixels, 1), config.clip_embed_dim
    output = Output(options.output, options.output_options)
    manifest, shards = embed_output.begin(options, output)
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
    manifest["runs"].append(
        {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "versions": embed_output.versions()}
    )
    if len({json.dumps(each["versions"], sort_keys=True) for each in manifest["runs"]}) > 1:
        say("Other versions of packages than in an earlier run on this folder; manifest.json lists them.")
    embed_output.write_manifest(output, manifest)
    if already:
        say(f"Going on: {already} of {len(shards)} shards are there. What the input is was read when this was begun.")
    embed_all(shards, options, output, tally)
    counts = embed_output.check_counts(shards, output)
    output.remove_leftovers()
    seconds = time.perf_counter() - tally.start
    manifest["runs"][-1] |= {
        "rows": tally.rows, "seconds": round(seconds, 1), "models": options.pool,
        "model_waits": round(tally.model_waits, 4),
    }  # fmt: skip
    manifest["result"] = counts
    embed_output.write_manifest(output, manifest)
    say(f"{counts['rows']} rows = {counts['embedded']} embedded + {counts['errors']} errors")
    if counts["errors"]:
        say("\n".join(embed_output.reasons(output)))
    if tally.rows:
        say(f"{tally.rows} rows in {seconds:.0f} s")
    counted = tally.waited + tally.worked
    if counted > 1:  # of a few rows all are in the first batch, and a share of nothing says nothing
        say(f"the models waited {tally.model_waits:.1%} of the {counted:.1f} s after their first batch")
    return manifest


def dry_run(shards: list[dict], options: argparse.Namespace) -> dict:
    """Embed rows of some shards from all over the input, and write nothing."""
    chosen = shards[:: max(len(shards) // SAMPLED_SHARDS, 1)][:SAMPLED_SHARDS]
    limit = math.ceil(options.sample_rows / len(chosen))
    files, options.files = options.files, None
    if files is not None:
        chosen = [shard | {"files": json.dumps(files.slice(shard["start"], limit).to_pylist())} for shard in chosen]
    place_models(options)
    batches = list(batches_of([shard | {"limit": limit} for shard in chosen], options))
    found = embed_costs.estimate(shards, batches, options)
    for line in embed_costs.lines(found, options):
        say(line)
    return found


def main(arguments: list[str] | None = None) -> dict:
    for module in (embed_sources, embed_stages, sys.modules[__name__]):  # which the other machines do not have
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
