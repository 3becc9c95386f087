"""Write a checkpoint of seeded random weights that loads like a published one, of any size, in constant memory.

Run by benchmarks/full_size.py, and by whoever tests loading without the published weights.

    python -m tools.machines.synthesise_checkpoint --folder DIR                 # the 14B: 27.7 GB
    python -m tools.machines.synthesise_checkpoint --folder DIR --config tiny   # of another config

Code and configs are copied beside the shards, so that AutoModel and AutoProcessor load the folder. The 14B's
tokenizer.model is not in this repository; tiny/'s replaces it, and its ids are within the 14B's vocabulary.

The values are normal, drawn in pieces of `CHUNK` values from numpy's SFC64 generator, seeded with the seed, the CRC-32
of the tensor's name and the number of the piece. So the order of tensors, the size of shards and the number of threads
change no value; another version of numpy might. Each piece is written as soon as it is drawn: memory holds one piece
per thread.
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
from tqdm import tqdm

from tools import ROOT
from tools.hub.write_index import INDEX, empty_model, index_of

CHUNK = 1 << 19  # values; small enough for a core's cache
LARGEST_SHARD = 5 * 10**9  # bytes
ROOM_TO_LEAVE = 1 << 30  # bytes of the disk
TOKENIZER = "tokenizer.model"
SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def copy_repository(config: Path, folder: Path) -> None:
    """Copy code, configs and a tokenizer: all of a checkpoint's folder but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in ROOT.glob("*.json") if path.name != INDEX]  # not the reports in tiny/
    tokenizer = config / TOKENIZER
    # Checkpoints have no settings of sentence-transformers; the root has them.
    configs = [config / name if (config / name).is_file() else ROOT / name for name in names]
    files = [*ROOT.glob("*.py"), *configs]
    for path in (*files, tokenizer if tokenizer.is_file() else ROOT / "tiny" / TOKENIZER):
        shutil.copy(path, folder / path.name)


def mean_and_deviation(name: str, shape: torch.Size) -> tuple[float, float]:
    """Scales at which every layer matters and 80 layers stay finite in bfloat16: those of the goldens at full width
    (docs/model.md, "Regenerated weights"), except LayerScale: 48 layers with 0.5 would drown the image. The first
    matching rule counts.
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
    fallback = (0.0, shape[1:].numel() ** -0.5)  # 1 / sqrt(fan in), also for convolutions
    return next(((mean, deviation) for fits, mean, deviation in rules if fits), fallback)


def chunk_of(name: str, tensor: torch.Tensor, number: int, seed: int) -> memoryview:
    """The bytes of piece `number` of a tensor with this name, shape and dtype."""
    length = min(CHUNK, tensor.numel() - number * CHUNK)
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode()), number]))
    mean, deviation = mean_and_deviation(name, tensor.shape)
    values = torch.from_numpy(generator.standard_normal(length, dtype=np.float32))
    return memoryview(values.mul_(deviation).add_(mean).to(tensor.dtype).view(torch.uint8).numpy())


def header_of(tensors: dict[str, torch.Tensor]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file of these tensors, and the offset of each tensor in the file."""
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
    """Write a safetensors file of random values."""
    header, offsets = header_of(tensors)
    with open(path, "wb") as file:
        file.write(header)
        file.flush()

        def write_chunk(name: str, number: int) -> None:
            tensor = tensors[name]
            place = offsets[name] + number * CHUNK * tensor.itemsize
            data = chunk_of(name, tensor, number, seed)
            while data:  # pwrite may write only a part
                written = os.pwrite(file.fileno(), data, place)
                data, place = data[written:], place + written

        pieces = [(name, n) for name, tensor in tensors.items() for n in range(math.ceil(tensor.numel() / CHUNK))]
        list(pool.map(write_chunk, *zip(*pieces)))
        os.fsync(file.fileno())


def check_room(folder: Path, needed: int) -> None:
    """Stop before anything is written if the checkpoint does not fit on the disk."""
    free = shutil.disk_usage(folder).free
    if free < needed + ROOM_TO_LEAVE:
        wanted = f"{needed / 1e9:.1f} GB for the weights and {ROOM_TO_LEAVE / 1e9:.1f} GB to spare"
        sys.exit(f"Not enough room: {folder} has {free / 1e9:.1f} GB free; needed are {wanted}.")


def index_in(folder: Path) -> dict | None:
    """The index of the synthetic checkpoint in `folder`, if there is one; exit if it is another checkpoint."""
    path = folder / INDEX
    index = json.loads(path.read_text()) if path.is_file() else None
    if index is not None and "seed" not in index["metadata"]:
        sys.exit(f"{folder} holds a checkpoint that this tool did not write.")
    return index


def synthesise(
    folder: Path, config: Path = ROOT, seed: int = 0, max_shard_size: str | None = None, threads: int = 2
) -> int:
    """Write a checkpoint of random weights.

    Args:
        folder: target, created if missing.
        config: folder of the config.json.
        max_shard_size: as in `save_pretrained`; by default 5 GB and at most half of all bytes: transformers 4.57 cannot
            leave a single file entirely on disk.

    Returns:
        Bytes of all written tensors: 0 if the folder has exactly these shards already.
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
    with (
        ThreadPoolExecutor(threads, initializer=one_thread_each) as pool,
        tqdm(total=index["metadata"]["total_size"], desc="weights", unit="B", unit_scale=True) as bar,
    ):
        for file, tensors in shards.items():
            write_shard(folder / file, tensors, seed, pool)
            bar.update(sum(tensor.nbytes for tensor in tensors.values()))
    # The index comes last: it says that the shards are complete.
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return index["metadata"]["total_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to write the checkpoint")
    parser.add_argument("--config", type=Path, default=ROOT, help="folder of the config.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-size", help="such as 1GB")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    start = perf_counter()
    size = synthesise(**vars(arguments))
    print(f"{size / 1e9:.2f} GB written in {perf_counter() - start:.1f} s: {arguments.folder}")


if __name__ == "__main__":
    main()
