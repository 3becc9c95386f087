"""Write a checkpoint of seeded random weights that loads like a published one, of any size, in constant memory.

Run by benchmarks/full_size.py, and by whoever tests loading without the published weights.

    python -m tools.machines.synthesise_checkpoint --folder DIR                 # the 14B: 27.7 GB
    python -m tools.machines.synthesise_checkpoint --folder DIR --config tiny   # of another config

What it is for: loading, offloading and quantising at full size can be measured without the published weights. Code and
configs are copied beside the shards, so that AutoModel and AutoProcessor load the folder. The 14B's tokenizer.model is
not in this repository; the one of tiny/ takes its place, and its ids lie within the 14B's vocabulary.

The values are normal. They are drawn in pieces of `CHUNK` values, each from a SFC64 generator of numpy that is seeded
with the seed, the CRC-32 of the tensor's name and the piece's number. So neither the order of the tensors, nor the size
of the shards, nor the number of threads changes a value; a later numpy might, its normals are no part of its promises.
A piece goes to its place in its shard as soon as it is drawn: memory holds one piece per thread.
"""

import argparse
import json
import math
import os
import shutil
import sys
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from tools.hub.write_index import INDEX, empty_model, index_of

ROOT = Path(__file__).resolve().parents[2]


CHUNK = 1 << 19  # values; small enough for a core's cache
LARGEST_SHARD = 5 * 10**9  # bytes
ROOM_TO_LEAVE = 1 << 30  # bytes of the disk, for others
TOKENIZER = "tokenizer.model"
SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def copy_repository(config: Path, folder: Path) -> None:
    """Code, configs and a tokenizer: all that a checkpoint's folder holds but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in ROOT.glob("*.json") if path.name != INDEX]  # not what tiny/ says about its training
    tokenizer = config / TOKENIZER
    # What no checkpoint has of its own, the root has for all: the settings of sentence-transformers.
    configs = [config / name if (config / name).is_file() else ROOT / name for name in names]
    files = [*ROOT.glob("*.py"), *configs]
    for path in (*files, tokenizer if tokenizer.is_file() else ROOT / "tiny" / TOKENIZER):
        shutil.copy(path, folder / path.name)


def mean_and_deviation(name: str, shape: torch.Size) -> tuple[float, float]:
    """
    Scales with which every layer has a say and 80 layers stay finite in bfloat16: those of the goldens at full width
    (docs/model.md, "Regenerated weights") but for LayerScale, as 48 layers with 0.5 would drown the image that they
    started from. The first rule that fits, in this order.
    """
    rules = (
        (name == "logit_scale", 2.0, 0.0),
        (name.endswith((".ls1", ".ls2")), 0.1, 0.01),
        ("norm" in name and name.endswith("weight"), 1.0, 0.1),
        (name.endswith("bias"), 0.0, 0.1),
        ("embed_tokens" in name, 0.0, 1.0),
        (any(part in name for part in ("query_tokens", "position_embedding", "class_embedding")), 0.0, 0.5),
        (name.endswith("text_projection"), 0.0, shape[:1].numel() ** -0.5),
        (name.endswith("lm_head.weight"), 0.0, 3 * shape[1:].numel() ** -0.5),
    )
    fallback = (0.0, shape[1:].numel() ** -0.5)  # 1 / sqrt of what an output is a sum of, also for convolutions
    return next(((mean, deviation) for fits, mean, deviation in rules if fits), fallback)


def chunk_of(name: str, tensor: torch.Tensor, number: int, seed: int) -> memoryview:
    """The bytes of piece `number` of a tensor; of the tensor itself, shape and dtype are looked at alone."""
    length = min(CHUNK, tensor.numel() - number * CHUNK)
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode()), number]))
    mean, deviation = mean_and_deviation(name, tensor.shape)
    values = torch.from_numpy(generator.standard_normal(length, dtype=np.float32))
    return memoryview(values.mul_(deviation).add_(mean).to(tensor.dtype).view(torch.uint8).numpy())


def header_of(tensors: dict[str, torch.Tensor]) -> tuple[bytes, dict[str, int]]:
    """What a safetensors file of these tensors begins with, and where in the file each tensor's bytes go."""
    fields, offsets, end = {"__metadata__": {"format": "pt"}}, {}, 0
    for name, tensor in tensors.items():
        offsets[name], end = end, end + tensor.nbytes
        dtype = SAFETENSORS_DTYPES[tensor.dtype]
        fields[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}


def write_shard(path: Path, tensors: dict[str, torch.Tensor], seed: int, pool: ThreadPoolExecutor) -> None:
    """Write a safetensors file of freshly drawn values."""
    header, offsets = header_of(tensors)
    with open(path, "wb") as file:
        file.write(header)
        file.flush()

        def write_chunk(name: str, number: int) -> None:
            tensor = tensors[name]
            place = offsets[name] + number * CHUNK * tensor.itemsize
            data = chunk_of(name, tensor, number, seed)
            while data:  # a call may write less than it was given
                written = os.pwrite(file.fileno(), data, place)
                data, place = data[written:], place + written

        pieces = [(name, n) for name, tensor in tensors.items() for n in range(math.ceil(tensor.numel() / CHUNK))]
        list(pool.map(write_chunk, *zip(*pieces)))
        os.fsync(file.fileno())


def check_room(folder: Path, needed: int) -> None:
    """Stop while nothing is written yet, if the checkpoint would not fit."""
    free = shutil.disk_usage(folder).free
    if free < needed + ROOM_TO_LEAVE:
        wanted = f"{needed / 1e9:.1f} GB for the weights and {ROOM_TO_LEAVE / 1e9:.1f} GB to spare"
        sys.exit(f"Not enough room: {folder} has {free / 1e9:.1f} GB free; needed are {wanted}.")


def index_in(folder: Path) -> dict | None:
    """The index of the synthetic checkpoint in `folder`, if there is one; any other checkpoint is left alone."""
    path = folder / INDEX
    index = json.loads(path.read_text()) if path.is_file() else None
    if index is not None and "seed" not in index["metadata"]:
        sys.exit(f"{folder} holds a checkpoint that this tool did not write.")
    return index


def synthesise(
    folder: Path, config: Path = ROOT, seed: int = 0, max_shard_size: str | None = None, threads: int = 2
) -> int:
    """
    Args:
        folder: where to write; made if it is not there.
        config: with the config.json to follow.
        max_shard_size: as in `save_pretrained`; by default 5 GB, but never all in one file: transformers 4.57 cannot
            load a single file with all of it left on disk.

    Returns:
        Bytes of all tensors that were written: 0 if the folder has just these shards already.
    """
    found = index_in(folder)
    copy_repository(config, folder)
    state = empty_model(folder).state_dict()
    half = sum(tensor.nbytes for tensor in state.values()) // 2
    index = index_of(state, max_shard_size or f"{min(LARGEST_SHARD, half) // 1000}KB")
    index["metadata"]["seed"] = seed
    if found == index:
        return 0
    (folder / INDEX).unlink(missing_ok=True)
    check_room(folder, index["metadata"]["total_size"])
    shards: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, file in index["weight_map"].items():
        shards[file][name] = state[name]
    one_thread_each = partial(torch.set_num_threads, 1)
    with ThreadPoolExecutor(threads, initializer=one_thread_each) as pool:
        for file, tensors in shards.items():
            write_shard(folder / file, tensors, seed, pool)
    # Last: an index says that the shards are complete.
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return index["metadata"]["total_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to write the checkpoint")
    parser.add_argument("--config", type=Path, default=ROOT, help="folder with the config.json to follow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-size", help="such as 1GB")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    start = perf_counter()
    size = synthesise(**vars(arguments))
    print(f"{size / 1e9:.2f} GB written in {perf_counter() - start:.1f} s: {arguments.folder}")


if __name__ == "__main__":
    main()
