"""Measure how fast the model is, at the 14B's widths with two layers a tower, and write benchmarks/RESULTS.md.

Run by whoever changes what the model computes or how (`make bench`).

    python -m benchmarks.speed               # everything, in less than 15 minutes on 2 quiet cores
    python -m benchmarks.speed vision match  # some sections; the last results of the others are kept
    python -m benchmarks.speed --redraw      # measures nothing: writes pages and curves.png from speed.json

Needs tests/requirements.txt.
"""

import argparse
import copy
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import AutoModel, AutoProcessor, DynamicCache, TorchAoConfig
from transformers.utils import logging

from benchmarks import measuring as m
from benchmarks import quantised_accuracy as accuracy
from benchmarks import this_machine
from benchmarks.measuring import BEAMS, PROMPT, QUERIES, ROOT, WIDTH, Row, in_turn, pixels, prompts, written
from tools.pages import put, table

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
MEASURED = ROOT / "benchmarks" / "speed.json"
CURVES = ROOT / "benchmarks" / "curves.png"
PAGE = ROOT / "docs" / "speed.md"
HEAD = ("work", "figure", "value", "spread", "target", "met")
INTRODUCTION = """\
# How fast

Written by `python -m benchmarks.speed` (`make bench`). `A / B` is a ratio of times within one run. The two run
alternately, A B A B ..., and the fastest run of A is divided by the fastest of B, since other processes only add time.
The spread is that of neighbouring runs; on a shared machine, smaller differences between two runs of this command, a
few percent, mean nothing. Unless stated otherwise, models have the published widths, two layers a tower and random
weights in float32.

* `products`: the matrix products of the same work alone: every Linear and convolution that ran, with its weights and
  the shape of its input, and the two products of every attention.
* `original`: the work as the published implementation does it, with this model: texts padded to 80, beams made before
  the queries run, logits at every position. Its layers are this model's, which are faster than the original's.
* `transformers`: its own `InternVLVisionModel` (with qk-norm) and `LlamaForCausalLM`, of the same sizes and with the
  same weights in the same memory, with SDPA.
* The project set the targets before it measured. A ratio of 1.00 to 1.03 that misses its target is within the spread.
* The 14B has 48 and 32 layers instead of two. There the vision tower is a larger part of captions and zero-shot calls,
  and the language head, here a third of a decoding step, takes next to no time.
"""


@dataclass
class Bench:
    """The rows and notes of a section, and the models, built at their first use."""

    rounds: int
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def model(self) -> Any:
        return m.with_random_weights(m.joint_model().float())

    @cached_property
    def vision_peer(self) -> Any:
        return m.vision_peer_of(self.model)

    @cached_property
    def text_peer(self) -> Any:
        return m.text_peer_of(self.model)

    def add(self, row: Row) -> None:
        print("   ", " | ".join(row.cells()), flush=True)
        self.rows.append(row)

    def ratios(self, work: str, times: dict[str, list[float]], *pairs: tuple[str, ...]) -> None:
        """Add a row for each pair of ways, which may have a target and a headline: see `measuring.ratio`."""
        for pair in pairs:
            self.add(m.ratio(work, times, *pair))


# ---------------------------------------------------------------------------------------------------------- towers


def vision(bench: Bench) -> None:
    """The vision encoder"""
    model, peer = bench.model.vision_model, bench.vision_peer
    for batch, target in ((4, "<= 1.03"), (1, "")):
        images = pixels(batch)
        ways = {
            "ours": lambda i=images: model(i),
            "products": m.products_of(model, lambda i=images: model(i)),
            "transformers": lambda i=images: peer(i),
        }
        times = in_turn(ways, bench.rounds if batch > 1 else 2 * bench.rounds)
        headline = "the vision encoder on 4 images takes {} x the time of its matrix products alone" if target else ""
        pairs = (("ours", "products", target, headline), ("ours", "transformers", "<= 1"))
        bench.ratios(f"batch {batch}, 224 px", times, *pairs)
        # The products differ in one place: the checkpoint has queries, keys and values in one weight.
        weight, states = model.encoder.layers[0].attn.qkv.weight, torch.randn(batch * 257, m.VISION_WIDTH)
        ways = {
            "in one": partial(F.linear, states, weight),
            "in three": partial(lambda x, parts: [F.linear(x, part) for part in parts], states, weight.chunk(3)),
        }
        bench.ratios(f"batch {batch}, the product of qkv", in_turn(ways, 4 * bench.rounds), ("in one", "in three"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(pixels(4))
    took = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in profile.key_averages()}
    shares = {name: time / sum(took.values()) for name, time in took.items()}
    listed = sorted(((share, name) for name, share in shares.items() if share > 0.001), reverse=True)
    bench.notes.append(f"Profile, batch 4: {', '.join(f'{name} {share:.1%}' for share, name in listed)}.")
    bench.notes.append(
        "The checkpoint has queries, keys and values in one weight. transformers' tower computes three products with a "
        "third of it each, which this machine's MKL does faster by the ratio above."
    )


def text(bench: Bench) -> None:
    """Short texts"""
    model, peer = bench.model, bench.text_peer.model
    short, padded = m.ids(8, 12), m.ids(8, 12, padded_to=80)
    ways = {
        "ours": lambda: model.embed_text(padded),
        "products": m.products_of(model, lambda: model.embed_text(short)),
        "transformers": lambda: peer(input_ids=short, use_cache=False),
    }
    times, work = in_turn(ways, 3 * bench.rounds), "8 texts of 12 tokens, padded to 80 for `ours`"
    bench.ratios(work, times, ("ours", "products", "<= 1.1"), ("ours", "transformers", "<= 1"))
    ways = {
        "ours": ways["ours"],
        "original": lambda: model.qllama.model(input_ids=padded, use_cache=False),
        "transformers, padded": lambda: peer(input_ids=padded, attention_mask=padded > 0, use_cache=False),
    }
    headline = "8 texts of 12 tokens: {} x faster than padded to 80"
    pairs = (("original", "ours", "", headline), ("ours", "transformers, padded", "<= 1"))
    bench.ratios(work, in_turn(ways, 2), *pairs)


def embedding(bench: Bench) -> None:
    """InternVL-G embeddings"""
    model, images = bench.model, pixels(4)

    def embed() -> torch.Tensor:
        return model.embed_image(images, "InternVL-G")

    times = in_turn({"ours": embed, "products": m.products_of(model, embed)}, bench.rounds - 1)
    bench.ratios("batch 4", times, ("ours", "products", "<= 1.05"))


# ------------------------------------------------------------------------------------------------------- zero-shot

ENGLISH = ("{}", "a photo of a {}", "a picture of the {}", "a drawing of one {}")
TEMPLATES = (*ENGLISH, "{}的图片", "一张{}的照片", "{}の写真")
KINDS = ("red", "blue", "green", "old", "young", "small", "large", "flying", "sleeping", "happy", "wooden", "wild")


def class_names(count: int) -> list[str]:
    """Names of one to five words."""
    examples = json.loads((ROOT / "examples" / "pictures" / "examples.json").read_text("utf-8"))
    nouns = [example["name"]["en"] for example in examples]
    with_kind = [f"{kind} {noun}" for kind in KINDS for noun in nouns]
    pairs = [f"{noun} beside a {thing}" for noun in nouns for thing in with_kind]
    return [*nouns, *with_kind, *pairs][:count]


def zero_shot(bench: Bench) -> None:
    """Zero-shot classification"""
    part: dict[str, Any] = {"subfolder": "tiny", "trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(ROOT, **part)
    tiny = AutoModel.from_pretrained(ROOT, dtype=torch.float32, **part).eval()
    names, batches = class_names(1000), []
    texts = [template.format(name) for name in names for template in TEMPLATES]
    lengths = [len(row) for row in processor(text=texts, padding=False, return_tensors=None).input_ids]
    with tiny.qllama.model.embed_tokens.register_forward_hook(lambda *call: batches.append(call[1][0].numel())):
        tiny.embed_classes(processor, names, TEMPLATES)
    work = f"{len(names):,} names x {len(TEMPLATES)} templates, by the tokenizer of tiny/"
    bench.add(Row(work, "processed / real tokens", sum(batches) / sum(lengths), target="<= 1.1"))
    bench.add(Row(work, "tokens of the largest batch, with padding", max(batches), target="<= 4096"))
    bench.add(Row(work, "original: padded to 80 / real tokens", 80 * len(lengths) / sum(lengths)))

    names, model, image = class_names(3), bench.model, pixels(1)
    texts = [template.format(name) for name in names for template in TEMPLATES]
    padded = processor(text=texts, padding="max_length").input_ids

    def text_side() -> torch.Tensor:
        return model.embed_classes(processor, names, TEMPLATES)

    def original() -> torch.Tensor:
        model.qllama.model(input_ids=padded, use_cache=False)
        return model.embed_image(image)

    classes = text_side()
    ways = {
        "first call": lambda: model.embed_image(image) @ text_side().T,
        "further call": lambda: model.embed_image(image) @ classes.T,
        "original, each call": original,
        "text side": text_side,
        "its products": m.products_of(model, text_side),
    }
    work = f"{len(names)} names x {len(TEMPLATES)} templates"
    headline = f"zero-shot with {work}: {{}} x faster from the second image on"
    bench.ratios(
        f"{work}, and one image",
        in_turn(ways, 2),
        ("text side", "its products", "<= 1.1"),
        ("original, each call", "first call"),
        ("original, each call", "further call", "", headline),
    )


# -------------------------------------------------------------------------------------------------------- captions


def caption(bench: Bench) -> None:
    """Captions"""
    model, peer, image, prompt = bench.model, bench.text_peer, pixels(1), prompts(1)
    seen = model.look_at(image, queries=False)
    embeds, mask = torch.randn(1, QUERIES + PROMPT, WIDTH), torch.ones(1, QUERIES + PROMPT, dtype=torch.long)

    def peer_writes(**options: Any) -> Any:
        return peer.generate(inputs_embeds=embeds, attention_mask=mask, **options)

    for count, target in ((1, ">= 3.3"), (10, ">= 1.8")):
        options = written(count)
        ways = {
            "vision tower": lambda: model.vision_model(image),
            "ours": lambda o=options: model.generate(seen, prompt, **o),
            "original": lambda o=options: m.original_caption(model, seen, prompt, **o),
            "transformers": lambda o=options: peer_writes(**o),
        }
        times = in_turn(ways, 2, warm=count == 1)
        for way in ("ours", "original"):
            times[f"{way}, all"] = [sum(both) for both in zip(times[way], times["vision tower"], strict=True)]
        what = "the first token" if count == 1 else f"{count} tokens"
        work = f"{what}, one image, {BEAMS} beams"
        bench.ratios(f"{work}, QLLaMA's part", times, ("original", "ours", target))
        pair = ("original, all", "ours, all", target, f"a caption with {BEAMS} beams, {what}: {{}} x faster")
        bench.ratios(f"{work}, and the vision tower's time", times, pair)
        work = f"{what}, QLLaMA's part; LLaMA with {QUERIES + PROMPT} positions"
        bench.ratios(work, times, ("ours", "transformers", "<= 1"))
        alone = {way: m.products_of(model, ways[way]) for way in ("ours", "original", "vision tower")}
        least = {way: min(took) for way, took in in_turn(alone, 1, warm=False).items()}
        bound = (least["original"] + least["vision tower"]) / (least["ours"] + least["vision tower"])
        share = min(times["vision tower"]) / min(times["ours, all"])
        bench.notes.append(
            f"{what}: the vision tower takes {share:.0%} of our time, and both ways run the same one. By their matrix "
            f"products alone, vision tower included, the ratio is {bound:.2f}; only other work can raise it, and the "
            f"original had more of that than this model's layers, which represent it here."
        )

    with m.Products(model.qllama) as products:
        model.generate(seen, prompt, **written(6))
    times = {"ours": [], "products": [], "transformers": []}
    for turn in range(bench.rounds):
        writers = [("ours", partial(model.generate, seen, prompt)), ("transformers", peer_writes)]
        for name, write in writers[:: 1 if turn % 2 else -1]:
            times[name] += m.step_times(write)
        for _ in range(9):
            start = time.perf_counter()
            products.run(step=-2)  # the last is empty
            times["products"].append(time.perf_counter() - start)
    work = f"each further step, {BEAMS} rows, with all that beam search does"
    bench.ratios(work, times, ("ours", "products", "<= 1.15"), ("ours", "transformers", "<= 1"))


def sharing(bench: Bench) -> None:
    """Images seen once for several calls"""
    model, image, several, options = bench.model, pixels(1), prompts(4), written(4, beams=1)

    def three_calls(seen: Any) -> None:
        model.generate(seen, several[:1], **options)
        model.embed_image(seen, "InternVL-G")
        model.match(seen, m.ids(1, 12))

    ways = {
        "apart": lambda: [model.generate(image, prompt, **options) for prompt in several.split(1)],
        "together": lambda: model.generate(image, several, **options),
    }
    headline = "4 prompts on one image in one call: {} x faster than in four calls"
    bench.ratios("4 prompts on one image, 4 tokens each", in_turn(ways, 2), ("apart", "together", "", headline))
    ways = {"apart": lambda: three_calls(image), "with `look_at`": lambda: three_calls(model.look_at(image))}
    work = "caption of 4 tokens, InternVL-G embedding and match of one image"
    headline = "caption, embedding and match of one image with `look_at`: {} x faster than without"
    bench.ratios(work, in_turn(ways, 2), ("apart", "with `look_at`", "", headline))


def match(bench: Bench) -> None:
    """Matching"""
    model, texts = bench.model, m.ids(64, 12)
    seen = model.look_at(pixels(1), queries=False)
    repeated = type(seen)(seen.image_states.repeat(len(texts), 1, 1))

    ways = {
        "ours": lambda: model.match(seen, texts, all_pairs=True),
        "original": lambda: model.match(repeated, texts),
    }
    work = f"1 image x {len(texts)} texts of 12 tokens"
    bench.ratios(work, in_turn(ways, 1, warm=False), ("original", "ours", ">= 1"))


# ------------------------------------------------------------------------------------------------- a simulated card


def operators(bench: Bench) -> None:
    """Operators launched per layer, on a simulated card"""

    def text_peer(layers: int) -> Any:
        return m.text_peer(m.joint_config(layers).qllama_config).model

    kinds: dict[str, tuple[Any, Any, Any, str]] = {
        "vision": (
            lambda n: m.joint_model(n).vision_model,
            lambda n: m.vision_peer(m.joint_config(n).vision_config),
            m.run_vision,
            "<= 13",
        ),
        "text": (lambda n: m.joint_model(n).qllama.model, text_peer, m.run_text, "<= 24"),
        "decoding": (lambda n: m.joint_model(n).qllama.model, text_peer, m.run_decoding, "<= 26"),
    }
    for name, (ours, peer, run, target) in kinds.items():
        found, copies = m.operators_per_layer(ours, run, torch.bfloat16)
        bench.add(Row(name, "ours", found.total(), target=target, headline=f"operators per layer, {name}: {{}}"))
        for dtype in (torch.float32, torch.bfloat16):
            count = m.operators_per_layer(peer, run, dtype)[0].total()
            bench.add(Row(name, f"transformers, {str(dtype).removeprefix('torch.')}", count))
        listed = ", ".join(f"{count:g} {kind}" for kind, count in sorted(found.items()))
        also = f" CUDA's norm also copies {copies:g} inputs that are not contiguous." if copies else ""
        bench.notes.append(f"{name}: {listed}.{also}")
    bench.notes.append(
        "The counts are of the operators that torch dispatches, without views. `rms_norm` and attention count as one "
        "each, as on CUDA; what these kernels launch inside is not known without a card. Ours are the same in float32."
    )


def memory(bench: Bench) -> None:
    """Peak memory beyond the weights, on a simulated card, bfloat16, in MB"""

    def images(batch: int) -> torch.Tensor:
        return torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16, device=m.CARD)

    def tokens(count: int) -> torch.Tensor:
        return torch.empty(1, count, m.VISION_WIDTH, dtype=torch.bfloat16, device=m.CARD)

    def ids(batch: int, length: int) -> dict[str, torch.Tensor]:
        tokens = torch.zeros(batch, length, dtype=torch.long, device=m.CARD)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def write(model: Any, beams: int) -> None:
        with m.simulate_devices.counted_steps(model.qllama, 9):
            model.generate(images(1), **ids(1, PROMPT), **written(10, beams))

    def match(model: Any, texts: int, length: int) -> torch.Tensor:
        return model.match(images(1), **ids(texts, length), all_pairs=True)

    calls: list[tuple[str, tuple[Any, Any], Callable[[Any, Any], Any]]] = [
        ("vision encoder, batch", (4, 8), lambda model, n: model.vision_model(images(n))),
        ("vision encoder, tokens", (1025, 4097), lambda model, n: model.vision_model(pixel_embeds=tokens(n))),
        ("8 texts, tokens of each", (80, 160), lambda model, n: model.embed_text(**ids(8, n))),
        ("texts of 80 tokens", (8, 16), lambda model, n: model.embed_text(**ids(n, 80))),
        ("match, 1 image x texts of 12", (32, 64), lambda model, n: match(model, n, 12)),
        ("match, 1 image x 8 texts, tokens", (80, 160), lambda model, n: match(model, 8, n)),
        ("InternVL-G, batch", (4, 8), lambda model, n: model.embed_image(images(n), "InternVL-G")),
        ("caption of 10 tokens, beams", (5, 20), write),
    ]
    for name, sizes, call in calls:
        peaks = [m.peak_megabytes(lambda model, n=n, call=call: call(model, n)) for n in sizes]
        for size, peak in zip(sizes, peaks, strict=True):
            bench.add(Row(f"{name}: {size}", "MB", peak))
        if call is write:
            caches = 15 * 2 * m.LAYERS * WIDTH * (QUERIES + PROMPT + 10) * 2 / 1e6  # keys and values, 2 bytes each
            bench.add(Row("caption", "growth with beams / growth of their caches", (peaks[1] - peaks[0]) / caches))
            continue
        factor, growth = round(sizes[1] / sizes[0], 2), round(peaks[1] / peaks[0], 2)
        bench.add(Row(name, f"growth, where the size grows {factor:g} x", growth, target=f"<= {factor:g}"))
    bench.notes.append(
        "Beyond the caches, one layer's cache while it is extended (here one of two layers) and the scores of all "
        "tokens grow with beams."
    )


# -------------------------------------------------------------------------------------------------- int8 and compile


def int8(bench: Bench) -> None:
    """int8 on the CPU: torchao, `Int8DynamicActivationInt8WeightConfig`, with `compile_layers`"""
    model, start = bench.model, time.perf_counter()
    quantised, kept, config = (
        copy.deepcopy(model),
        type(model)._keep_unquantized,
        Int8DynamicActivationInt8WeightConfig(),
    )
    quantize_(quantised, config, lambda module, name: isinstance(module, nn.Linear) and not name.startswith(kept))
    quantised.compile_layers()
    states, cache_of = model.vision_model(pixels(4)).last_hidden_state, {}
    for each in (model, quantised):
        cache_of[each] = DynamicCache(config=model.config.qllama_config)
        model.qllama.model(input_ids=m.ids(BEAMS, 101), cache=cache_of[each], use_cache=True)
    step = m.ids(BEAMS, 2)[:, :1]

    def decode(each: Any) -> torch.Tensor:
        return each.qllama.model(input_ids=step, cache=cache_of[each], use_cache=True)[0]

    calls: dict[str, tuple[str, Callable[[Any], torch.Tensor]]] = {
        "vision encoder, batch 4": (">= 2.5", lambda each: each.vision_model(pixels(4)).last_hidden_state),
        "vision encoder, batch 1": ("", lambda each: each.vision_model(pixels(1)).last_hidden_state),
        "4 texts of 12 tokens": (">= 2.5", lambda each: each.embed_text(m.ids(4, 12))),
        "the queries over 4 images": (">= 2.5", lambda each: each._query_states(states)),
        "decoding, 5 rows": (">= 2", decode),
    }
    for work, (target, call) in calls.items():
        ways = {"int8": lambda c=call: c(quantised), "float32": lambda c=call: c(model)}
        also = " (without the language head)" if work.startswith("decoding") else ""
        headline = f"int8 on a CPU, {work}{also}: {{}} x faster than float32"
        bench.ratios(work, in_turn(ways, bench.rounds - 1), ("float32", "int8", target, headline))
    bench.notes.append(
        f"Quantising, compiling and these runs took {time.perf_counter() - start:.0f} s. `decoding` is the decoder's "
        "layers; the language head stays in float32, and with two layers it would be a third of a step."
    )
    options = {"quantization_config": TorchAoConfig(config)}
    with tempfile.TemporaryDirectory() as folder:
        accuracy.write_wide(Path(folder))
        pairs = [accuracy.load_wide(Path(folder), dtype=torch.float32, **which) for which in ({}, options)]
    wanted, found = (accuracy.outputs(each, accuracy.wide_inputs()) for each in pairs)
    for name, cosines in accuracy.compare(found, wanted).items():
        if isinstance(cosines, tuple):
            work = f"golden/wide, {name}, not compiled"
            bench.add(Row(work, "least cosine to float32", cosines[0], target=">= 0.999"))
    pairs = [accuracy.load_tiny(dtype=torch.float32, **which) for which in ({}, options)]
    for name, each in zip(("float32", "int8"), pairs, strict=True):
        embeds = accuracy.outputs(each, accuracy.tiny_inputs())
        images, texts = embeds["image, InternVL-G"], embeds["text"].unflatten(0, (3, -1))
        nearest = (images @ texts.transpose(1, 2)).argmax(-1)  # [languages, images]
        right = (nearest == torch.arange(len(images))).sum()
        work = f"tiny/, {nearest.numel()} searches for the names of the example images"
        bench.add(Row(work, f"found by {name}", int(right)))
    bench.notes.append("`python -m tools.tiny.evaluate_tiny --int8` measures the whole table of tiny/ with int8.")


def compiled(bench: Bench) -> None:
    """`torch.compile(fullgraph=True)` as a whole"""
    model = bench.model
    vision, decoder = copy.deepcopy(model.vision_model), copy.deepcopy(model.qllama)
    graphs = torch._dynamo.utils.counters["stats"]

    def graphs_of(work: Callable[[], Any]) -> int:
        torch._dynamo.reset()
        graphs.clear()
        work()
        return graphs["unique_graphs"]

    def images_of(batch: int) -> torch.Tensor:
        images = pixels(batch)
        torch._dynamo.mark_dynamic(images, 0)
        return images

    vision.compile(fullgraph=True)
    count = graphs_of(lambda: [vision(images_of(batch)) for batch in (4, 2, 3)])
    bench.add(Row("vision encoder, batches of 4, 2 and 3", "graphs", count, target="<= 1"))
    images = images_of(2)
    times = in_turn({"eager": lambda: model.vision_model(images), "compiled": lambda: vision(images)}, bench.rounds)
    bench.ratios("vision encoder, batch 2", times, ("eager", "compiled"))

    decoder.compile(fullgraph=True, dynamic=False)
    twin = copy.copy(model)
    twin._modules = model._modules | {"qllama": decoder}
    seen, prompt = model.look_at(pixels(1), queries=False), prompts(1)

    def write(each: Any, **options: Any) -> Any:
        return each.generate(seen, prompt, **options)

    static = {"cache_implementation": "static", "disable_compile": True}
    count = graphs_of(lambda: write(twin, **written(10), **static))
    bench.add(Row(f"10 tokens of a caption, {BEAMS} beams, static cache", "graphs", count, target="<= 2"))
    times = {"eager": [], "compiled": []}
    for _ in range(2):
        times["eager"] += m.step_times(lambda **options: write(model, **options))
        times["compiled"] += m.step_times(lambda **options: write(twin, **options), **static)
    bench.ratios("each of its steps; eager with a dynamic cache", times, ("eager", "compiled"))


# ---------------------------------------------------------------------------------------------- Python, and the curves


def overhead(bench: Bench) -> None:
    """Python and dispatch per layer, at batch 1, in models with next to no arithmetic"""
    found = {layers: m.small_models(layers) for layers in (4, 44)}
    tokens, image = m.ids(1, 12) % 100 + 3, pixels(1, 28)
    caches = {model: DynamicCache(config=model.config) for models in found.values() for model in models.values()}
    runs: dict[str, Callable[[Any], Any]] = {
        "vision": lambda model: model(image),
        "text": lambda model: model(input_ids=tokens, use_cache=False),
        "decoding": lambda model: model(input_ids=tokens[:, :1], use_cache=True, **{m.CACHE_NAME: caches[model]}),
    }
    for name, run in runs.items():
        part = "text" if name == "decoding" else name
        models = {"ours": part, "transformers": f"{part}, transformers"}
        ways = {
            f"{who}, {layers}": lambda model=found[layers][which], run=run: run(model)
            for who, which in models.items()
            for layers in found
        }
        times = in_turn(ways, 60)
        each = {who: (min(times[f"{who}, 44"]) - min(times[f"{who}, 4"])) / 40 * 1e6 for who in models}
        for who, microseconds in each.items():
            bench.add(Row(name, f"{who}, microseconds a layer", microseconds))
        bench.add(Row(name, "ours / transformers", each["ours"] / each["transformers"], target="<= 1"))


@dataclass(frozen=True)
class Curve:
    """A panel of curves.png: seconds beside the number of what is counted."""

    subject: str
    counted: str
    axis: str

    def takeaway(self, points: list[tuple[int, float]]) -> str:
        (fewest, least), (most, longest) = points[0], points[-1]
        return f"{most / fewest:.0f} x the {self.counted} take {longest / least:.1f} x the time"


PANELS = (
    Curve("Vision encoder", "images", "images in a batch"),
    Curve("Vision encoder", "patches", "patches of one image (256: 224 x 224 pixels)"),
    Curve("Text embedding", "tokens", "tokens of one text"),
    Curve("Caption of 4 tokens", "beams", "beams for one image"),
    Curve("Captions of 4 tokens", "prompts", "prompts about one image"),
)


def curves(bench: Bench) -> None:
    """How times grow"""
    model = bench.model
    seen = model.look_at(pixels(1), queries=False)
    series: dict[str, tuple[tuple[int, ...], Callable[[int], Any]]] = {
        "images": ((1, 2, 4, 8), lambda n: model.vision_model(pixels(n))),
        "patches": ((256, 1024, 4096), lambda n: model.vision_model(pixels(1, 14 * math.isqrt(n)))),
        "tokens": ((4, 8, 16, 32, 80, 160, 320), lambda n: model.embed_text(m.ids(1, n))),
        "beams": ((1, 2, 5, 10), lambda n: model.generate(seen, prompts(1), **written(4, n))),
        "prompts": ((1, 2, 4, 8), lambda n: model.generate(seen, prompts(n), **written(4, 1))),
    }
    for panel in PANELS:
        sizes, work = series[panel.counted]
        times = in_turn({str(size): partial(work, size) for size in sizes}, 3, warm=False)
        for size in sizes:
            bench.add(Row(panel.subject, f"seconds, {panel.counted}: {size}", min(times[str(size)])))
    takeaways = "; ".join(f"{panel.subject}: {panel.takeaway(points)}" for panel, points in drawn(bench.rows))
    bench.notes.append(f"![Seconds by size. {takeaways}.]({CURVES.name})")


def drawn(rows: list[Row]) -> list[tuple[Curve, list[tuple[int, float]]]]:
    """Each panel with its points, sizes and seconds, from the rows of `curves`."""
    points: dict[str, list[tuple[int, float]]] = {panel.counted: [] for panel in PANELS}
    for row in rows:
        counted, size = row.figure.removeprefix("seconds, ").split(": ")
        points[counted].append((int(size), row.value))
    return [(panel, points[panel.counted]) for panel in PANELS]


def draw(rows: list[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 13, "axes.titlesize": 14})
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    *panels, corner = axes.flat
    for axis, (panel, points) in zip(panels, drawn(rows), strict=True):
        sizes, seconds = zip(*points, strict=True)
        in_proportion = [seconds[0] * size / sizes[0] for size in sizes]
        axis.plot(
            sizes,
            in_proportion,
            "--",
            color="0.5",
            label="if time grew in proportion:\nbelow, more at once costs less each",
        )
        axis.plot(sizes, seconds, "o-", color="tab:blue", linewidth=2, label="measured")
        axis.set(title=f"{panel.subject}:\n{panel.takeaway(points)}", xlabel=panel.axis, ylabel="seconds")
        axis.set(xlim=(0, None), ylim=(0, 1.3 * max(seconds)))
    corner.axis("off")
    corner.legend(*panels[0].get_legend_handles_labels(), loc="center", frameon=False, fontsize=15)
    # A test compares what is drawn with what was measured.
    figure.savefig(CURVES, dpi=80, metadata={"Description": json.dumps([asdict(row) for row in rows])})


ALL = (vision, text, embedding, zero_shot, caption, sharing, match, int8, compiled, operators, memory, overhead, curves)
SECTIONS: dict[str, Callable[[Bench], None]] = {section.__name__: section for section in ALL}


# ---------------------------------------------------------------------------------------------------------- report


def machine() -> str:
    packages = this_machine.listed(this_machine.versions("torch", "transformers", "torchao"))
    return f"{this_machine.processor()}, {torch.get_num_threads()} threads, no GPU used; {packages}"


def report(measured: dict[str, Any]) -> str:
    parts = [INTRODUCTION]
    for name, section in SECTIONS.items():
        if name not in measured:
            continue
        found = measured[name]
        figures = table(HEAD, (Row(**row).cells() for row in found["rows"]))
        notes = "".join(f"* {note}\n" for note in found["notes"])
        parts.append(f"## {section.__doc__}\n\n{figures}\n\n{notes}\nOn {found['machine']}.\n")
    parts.append(f"All sections together took {sum(found['seconds'] for found in measured.values()):.0f} s.\n")
    return "\n".join(parts)


def summary(measured: dict[str, Any]) -> str:
    """The list of docs/speed.md, as Markdown."""
    rows = [Row(**row) for found in measured.values() for row in found["rows"]]
    lines = [f"* {row.headline.format(format(row.value, '.3g'))};" for row in rows if row.headline]
    return "\n".join([*lines[:-1], lines[-1].replace(";", "."), "", f"On {measured['vision']['machine']}."])


def write(measured: dict[str, Any]) -> None:
    this_machine.write_json(MEASURED, measured)
    RESULTS.write_text(report(measured))
    if measured.get("curves", {}).get("rows"):
        draw([Row(**row) for row in measured["curves"]["rows"]])
    if "vision" in measured:
        put(PAGE, "speed", summary(measured))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"some of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--redraw", action="store_true", help="only write the pages and curves.png from speed.json")
    arguments = parser.parse_args()
    if arguments.redraw:
        return write(json.loads(MEASURED.read_text()))
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    bench = Bench(rounds=4)
    measured = json.loads(MEASURED.read_text()) if MEASURED.exists() and arguments.sections else {}
    for name in arguments.sections or SECTIONS:
        print(name, flush=True)
        bench.rows, bench.notes, start = [], [], time.perf_counter()
        with torch.inference_mode():
            SECTIONS[name](bench)
        took = time.perf_counter() - start
        measured[name] = {
            "rows": [asdict(row) for row in bench.rows],
            "notes": bench.notes,
            "machine": machine(),
            "seconds": took,
        }
        print(f"    {took:.0f} s", flush=True)
        measured = {name: measured[name] for name in SECTIONS if name in measured}
        write(measured)


if __name__ == "__main__":
    main()
