"""Load a checkpoint in one way, use it, and measure that. Run by full_size.py, once per plan.

    python -m benchmarks.one_plan --plan disk --folder CHECKPOINT --out RESULT

writes the measurements to RESULT.json and the model's outputs to RESULT.safetensors. Linux only: it reads /proc.
"""

import argparse
import json
import os
import resource
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoProcessor

ROOT = Path(__file__).resolve().parents[1]
IMAGE = ROOT / "examples" / "pictures" / "panda.png"
TEXTS = ("a photo of a panda", "一张熊猫的照片", "パンダの写真")
NEW_TOKENS = 4
STAGES = {
    "image C": "an image, InternVL-C",
    "image G": "an image, InternVL-G",
    "texts": f"{len(TEXTS)} texts",
    "match": "match",
    "caption": f"a caption of {NEW_TOKENS} tokens",
}
SAMPLING_SECONDS = 0.02
# Layers of the cut models: of vision, and of QLLaMA with cross-attention. One of each, and one more of either.
CUTS = ((1, 1), (2, 1), (1, 2))
CUT_ROUNDS = 3
MEMORY = {"VmRSS": "rss", "RssAnon": "anonymous", "RssFile": "file_backed"}


def int8_options() -> dict[str, Any]:
    """The weights of linear layers become int8 while they are loaded; the arithmetic stays bfloat16."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "device_map": "cpu"}


PLANS: dict[str, Callable[[], dict[str, Any]]] = {
    "mapped": dict,  # a plain load on a CPU maps the shards, and reads each weight at its first use
    "disk": lambda: {"device_map": {"": "disk"}},
    "ram+disk": lambda: {"device_map": "auto", "max_memory": {"cpu": "8GiB"}},
    "int8": int8_options,
}
RESIDENT_PLANS = ("int8",)  # these do not read the shards again after loading


def memory() -> dict[str, int]:
    """Bytes of this process in RAM: all of them, anonymous memory, and pages of mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[field].split()[0]) * 1024 for field, name in MEMORY.items()}


def bytes_read() -> int:
    """Bytes that this process has read from the disk, including page faults but not hits of the page cache."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def seconds_queued() -> float:
    """How long the main thread has waited for a core that other processes used."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


class Peaks(threading.Thread):
    """Samples the memory of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = memory()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            self.highest = {name: max(value, self.highest[name]) for name, value in memory().items()}
            sleep(SAMPLING_SECONDS)

    def stop(self) -> dict[str, int]:
        self.done.set()
        self.join()
        return self.highest


def measured(action: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """The result of `action`, and what it took."""
    peaks = Peaks()
    peaks.start()
    read, queued, usage = bytes_read(), seconds_queued(), resource.getrusage(resource.RUSAGE_SELF)
    start = perf_counter()
    result = action()
    seconds, after = perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cost = {
        "seconds": seconds,
        "queued_seconds": seconds_queued() - queued,
        "system_seconds": after.ru_stime - usage.ru_stime,
        "bytes_read": bytes_read() - read,
        "peak": peaks.stop(),
        "after": memory(),
    }
    return result, cost


def undisturbed(cost: dict[str, Any]) -> float:
    """Seconds without the wait for cores that other processes used."""
    return cost["seconds"] - cost["queued_seconds"]


def cut_config(folder: Path, vision: int, language: int) -> Any:
    """The checkpoint's config with fewer layers of vision, and of QLLaMA with cross-attention."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.vision_config.num_hidden_layers = vision
    config.qllama_config.num_hidden_layers = language * config.cross_attention_frequency
    return config


def load(folder: Path, plan: str, depths: tuple[int, int] | None) -> torch.nn.Module:
    """The model of a plan, or with `depths` one cut to so few layers that it stays in RAM."""
    options = PLANS[plan]()
    if depths is not None:
        options |= {"config": cut_config(folder, *depths), "strict": False}
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto", **options).eval()
    if plan in RESIDENT_PLANS:
        for parameter in model.parameters():
            if type(parameter) is torch.nn.Parameter:  # not quantised, so still mapped from a shard
                parameter.data = parameter.data.clone()
    return model


def stages_of(model: torch.nn.Module, folder: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """The calls to a model, by the names in `STAGES`."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    pixels = processor(images=[IMAGE]).pixel_values
    texts, pair = processor(text=list(TEXTS)), processor(text=[TEXTS[0]], task="match")
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return {
        "image C": partial(model.embed_image, pixels, mode="InternVL-C"),
        "image G": partial(model.embed_image, pixels, mode="InternVL-G"),
        "texts": partial(model.embed_text, **texts),
        "match": partial(model.match, pixels, **pair),
        "caption": partial(model.generate, pixels, do_sample=False, **lengths),
    }


def run(
    folder: Path, plan: str, depths: tuple[int, int] | None = None, rounds: int = 1
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a plan took, and its outputs. Of several rounds the fastest one of each stage counts."""
    before, others = memory(), os.getloadavg()[0]
    model, loading = measured(partial(load, folder, plan, depths))
    costs, outputs = {}, {}
    with torch.inference_mode():
        for name, stage in stages_of(model, folder).items():
            results = [measured(stage) for _ in range(rounds)]
            outputs[name], costs[name] = min(results, key=lambda result: undisturbed(result[1]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"before": before, "load_average": others, "load": loading, "stages": costs, "peak_rss": peak}, outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", choices=PLANS, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="the checkpoint, with its code")
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without a suffix")
    parser.add_argument("--cut", action="store_true", help="measure models cut to few layers instead, warm")
    arguments = parser.parse_args()
    folder, plan = arguments.folder, arguments.plan
    if arguments.cut:
        report = {"cuts": [run(folder, plan, depths, CUT_ROUNDS)[0] for depths in CUTS]}
    else:
        report, outputs = run(folder, plan)
        save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, f"{arguments.out}.safetensors")
    Path(f"{arguments.out}.json").write_text(json.dumps(report))
    os._exit(0)  # skip the teardown of offloaded weights, which takes seconds


if __name__ == "__main__":
    main()
