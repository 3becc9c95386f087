"""Estimates what a run of embed_dataset.py takes: from a sample on these machines, and by arithmetic on H100s.

Other programs may import it; benchmarks/embed_dataset.py does.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

ROOT = Path(__file__).resolve().parents[1]
BILLION = 1_000_000_000
# NVIDIA's data sheet of the H100 SXM: 1,979 TFLOPS of bfloat16 "with sparsity", half of that without.
# https://resources.nvidia.com/en-us-gpu-resources/h100-datasheet-24306
H100_FLOPS = 989e12


def estimate(shards: list[dict], batches: list[dict], options: argparse.Namespace) -> dict[str, Any]:
    """Estimate the cost of a whole run from a sample.

    Args:
        shards: of the whole input.
        batches: the results of the sample.

    Raises:
        ValueError: the sample has no rows, or only errors.
    """
    rows = sum(batch["rows"] for batch in batches)
    if not rows:
        raise ValueError("`--data` must hold rows, got none in the sample.")
    errors = [error["reason"] for batch in batches for error in json.loads(batch["errors"])]
    reasons = [f"{number} times: {reason[:120]}" for reason, number in Counter(errors).most_common(5)]
    if len(errors) == rows:
        raise ValueError(f"Nothing in the sample of {rows} rows can be embedded: {'; '.join(reasons)}.")
    # The first batch of an actor includes its warm-up; a small sample may have no other.
    filled = [batch for batch in batches if batch["rows"]]
    warm = [batch for batch in filled if batch["waited"] is not None]
    model_rate = sum(batch["rows"] for batch in warm or filled) / sum(batch["worked"] for batch in warm or filled)
    decode_rate = rows / sum(batch["decoded"] for batch in batches)
    total, is_counted = total_rows(shards, batches)
    rate = min(model_rate * options.pool, decode_rate * options.tasks)
    sizes = {"rows": total, "output_bytes": total * sum(len(batch["table"]) for batch in batches) / rows}
    rates = {"model_rate": model_rate, "decode_rate": decode_rate, "rate": rate, "hours": total / rate / 3600}
    flags = {"is_counted": is_counted, "is_warm": bool(warm)}
    counts = {"sample": rows, "errors": len(errors), "models": options.pool, "decoders": options.tasks}
    return {"reasons": reasons, **sizes, **rates, **flags, **counts}


def total_rows(shards: list[dict], batches: list[dict]) -> tuple[int, bool]:
    """The number of rows, and whether it is exact; for tars it follows from their bytes and the sample's rows."""
    if all(shard["stop"] is not None for shard in shards):
        return sum(shard["stop"] - shard["start"] for shard in shards), True
    read: dict[int, int] = {}  # bytes of each tar
    for batch in batches:
        read[batch["shard"]] = max(read.get(batch["shard"], 0), batch["end"])
    rows = sum(batch["rows"] for batch in batches)
    return round(sum(shard["bytes"] for shard in shards) * rows / max(sum(read.values()), 1)), False


def lines(found: dict[str, Any], options: argparse.Namespace) -> list[str]:
    how = "counted" if found["is_counted"] else "estimated from the bytes of the sample; compressed tars have more"
    warm = "" if found["is_warm"] else ", including warm-up"
    if warm and found["sample"] < found["rows"]:
        warm += ": use a larger `--sample-rows`"
    limit = "models" if found["rate"] == found["model_rate"] * found["models"] else "decoders"
    text = [
        f"sample: {found['sample']} rows, {found['errors']} of them errors",
        *(f"  {reason}" for reason in found["reasons"]),
        f"rows: {found['rows']:,} ({how})",
        f"model: {found['model_rate']:.1f} rows/s each, {found['models']} of them{warm}",
        f"reading and decoding: {found['decode_rate']:.1f} rows/s per CPU, {found['decoders']} CPUs",
        f"time: {found['hours']:.2f} hours at {found['rate']:.1f} rows/s, which the {limit} allow",
        f"output: {found['output_bytes'] / 1e9:.3f} GB before compression",
    ]
    if options.price_per_hour:
        price = options.price_per_hour
        text.append(f"cost: {found['hours']:.2f} hours x {price:g} an hour = {found['hours'] * price:.2f}")
    return text + (h100_lines(found["decode_rate"], options) if options.h100 else [])


def on_h100s(modes: list[str], mfu: float, embeddings: str) -> dict[str, float]:
    """The arithmetic for a billion images with the published model; `mfu` is an assumption."""
    flops = image_flops(modes)
    rate = H100_FLOPS * mfu / flops
    hours = BILLION / rate / 3600
    return {"flops": flops, "rate": rate, "hours": hours, "bytes": embedding_bytes(modes, embeddings) * BILLION}


def measured_card(file: Path, modes: set[str]) -> tuple[str, float]:
    """The name of the card that benchmarks/gpu.py measured, and the most images a second that it embedded. Of two modes
    InternVL-G counts: it also runs the vision tower, and the head that InternVL-C adds is less than 1 % of the work.

    Raises:
        ValueError: a file of another kind, of a small or simulated run, or without such images.
    """
    mode = max(modes)
    try:
        results = json.loads(file.read_text("utf-8"))
        machine, rows = results["machine"], results["steps"]["images"]["rows"]
        rows = [row for row in rows if row["work"] == mode and "transformers" not in row["way"]]
        rates = [row["a second"] for row in rows if "a second" in row]
        if machine["tiny"] or machine["simulated"] or not rates:
            raise ValueError(f"it has no images of {mode} at full size")
        return machine["device"], max(rates)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"must be a file of `python -m benchmarks.gpu`, got {str(file)!r}: {error}"
        raise ValueError(f"`--measured` {problem}.") from error


def h100_lines(decode_rate: float, options: argparse.Namespace) -> list[str]:
    """A billion images: as measured on a card, or by arithmetic with all its assumptions."""
    modes = " and ".join(options.mode)
    if options.card:
        name, rate = options.card
        text = [
            f"a billion images with the published 14B on {name}s, modes {modes}, as measured on one:",
            f"  {rate:.0f} images/s on a GPU ({options.measured}; the best batch of {max(options.mode)})",
        ]
    else:
        found = on_h100s(options.mode, options.mfu, options.embeddings)
        tera, rate = found["flops"] / 1e12, found["rate"]
        text = [
            f"a billion images with the published 14B on H100s, modes {modes}, by arithmetic:",
            f"  {tera:.2f} TFLOP per image of 224 x 224, counted in one pass with the published config",
            f"  {H100_FLOPS / 1e12:.0f} TFLOPS (data sheet, bfloat16, dense) x {options.mfu:g} (`--mfu`, your "
            f"assumption) / {tera:.2f} TFLOP = {rate:.0f} images/s on a GPU",
        ]
    hours = BILLION / rate / 3600
    text += [
        f"  1e9 / {rate:.0f} images/s = {hours:,.0f} GPU-hours: {hours / 8 / 24:.1f} days on 8, "
        f"{hours / 64 / 24:.1f} on 64",
        f"  one GPU needs {rate / decode_rate:.1f} CPUs like these to decode",
        f"  output: {embedding_bytes(options.mode, options.embeddings) * BILLION / 1e12:.2f} TB of embeddings",
    ]
    if options.price_per_gpu_hour:
        cost = f"{hours:,.0f} GPU-hours x {options.price_per_gpu_hour:g} = {hours * options.price_per_gpu_hour:,.0f}"
        text.append(f"  cost: {cost}, without CPUs, storage and transfer")
    return text


def embedding_bytes(modes: list[str], embeddings: str) -> int:
    width = AutoConfig.from_pretrained(ROOT, trust_remote_code=True).clip_embed_dim
    return width * len(modes) * (2 if embeddings == "float16" else 4)


def image_flops(modes: list[str]) -> int:
    """FLOPs of the matrix products and convolutions for an image, counted without weights; modes share a tower."""
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    config.vision_config.use_flash_attn = False
    size = config.vision_config.image_size
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True, attn_implementation="eager")
        model.eval().requires_grad_(False)
        pixels = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        seen = model.look_at(pixels, queries="InternVL-G" in modes)
        for mode in modes:
            model.embed_image(seen, mode)
    return counter.get_total_flops()
