"""Measure the tiny checkpoint on Twemoji, the artist that it was never shown, and write the results.

Run by whoever retrained tiny/ (`make tiny`), or changed its tables (`--tables`). The other two evaluations import it.

    python -m tools.tiny.evaluate_tiny              # prints the table; writes tiny/results.json, the table and the
                                                    # model-index of tiny/README.md
    python -m tools.tiny.evaluate_tiny --int8       # prints the table of the model in int8 (torchao); writes nothing
    python -m tools.tiny.evaluate_tiny --tables     # writes only tables and model-index, from tiny/results.json
    python -m tools.tiny.evaluate_tiny --weights    # tries values of MATCH_WEIGHT on augmented training images

Every figure is over all concepts of the dataset, one held-out image each:

* image-to-text R@1: the image's own name is the nearest of all names of that language; text-to-image R@1 likewise;
* 20-way: the own name is the nearest of it and 19 others, drawn at random with a fixed seed;
* re-ranked: the ten nearest names of mode InternVL-G, sorted by the logit of the cosine plus MATCH_WEIGHT times the
  log-probability of image-text matching;
* caption exact: the caption is the name; caption R@1: the caption's own text embedding is nearest to the name. Other
  captions are names of an emoji of the same Unicode subgroup (another bird), of the same group, of any other, or none;
* held-out keywords, pairs and phrases (tiny_texts.py): how often one of the ten nearest images is right, and how often
  one of ten random images would be;
* pixel neighbour: the concept of the nearest training image at 16 x 16 pixels on white, as a baseline.
"""

import argparse
import json
import math
import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, TorchAoConfig

from tools import ROOT
from tools.hub.model_index import PER_MODE, write_model_index
from tools.pages import put, table
from tools.tiny.emoji_data import DEFAULT_CACHE, LANGUAGES, EmojiData, load
from tools.tiny.tiny_texts import CAPTION_PROMPTS, Texts, phrases

RESULTS = ROOT / "tiny" / "results.json"
CARD = ROOT / "tiny" / "README.md"
MODES = ("InternVL-C", "InternVL-G")
FIGURES = {key: name for key, (_, _, name) in PER_MODE.items()} | {"zero_shot_20": "20-way zero-shot"}
MATCH_WEIGHT = 0.3
BATCH = 100
FLOAT32 = "float32 from bfloat16 weights"
CAPTIONS = {
    "exact": "caption is the exact name",
    "same subgroup": "caption is a name of the same subgroup, such as another bird",
    "same group": "caption is a name of the same group, such as another animal or plant",
    "another name": "caption is a name of another group",
    "no name": "caption is no name at all",
}
QUERIES = {
    "keywords": "keywords that were held out",
    "pairs": "pairs of keywords that were held out",
    "phrases": "phrases written by hand",
}


def checkpoint_options() -> argparse.ArgumentParser:
    """A parser for `parents`: which checkpoint is evaluated, and the dataset."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--subfolder", default="tiny", help="folder of the checkpoint, in this repository")
    parser.add_argument("--data", type=Path, default=DEFAULT_CACHE, help="the dataset of emoji_data.py")
    return parser


def load_checkpoint(options: argparse.Namespace, **how: Any) -> tuple[Any, Any]:
    """Model and processor."""
    where = {"subfolder": options.subfolder, "trust_remote_code": True}
    model = AutoModel.from_pretrained(ROOT, dtype=torch.float32, **where, **how).eval()
    return model, AutoProcessor.from_pretrained(ROOT, **where)


def measured_with(command: str, dtype: str = FLOAT32) -> dict[str, str]:
    machine = f"a CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"command": f"python -m tools.tiny.{command}", "machine": machine, **packages, "dtype": dtype}


def measured_by(how: dict[str, str]) -> str:
    packages = f"torch {how['torch']}, transformers {how['transformers']}"
    return f"Measured by `{how['command']}` on {how['machine']}, {packages}, {how.get('dtype', FLOAT32)}."


def embed_images(model: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """By mode: [N, D]"""
    return {mode: torch.cat([model.embed_image(batch, mode) for batch in pixels.split(BATCH)]) for mode in MODES}


def embed_texts(model: Any, processor: Any, texts: list[str]) -> torch.Tensor:
    return model.embed_texts(processor(text=texts, padding=False, return_tensors=None).input_ids)


def captions_of(model: Any, processor: Any, pixels: torch.Tensor, language: str) -> list[str]:
    prompt = processor(text=CAPTION_PROMPTS[language], task="caption")
    texts = []
    for batch in tqdm(pixels.split(BATCH), desc=f"captions {language}", leave=False):
        ids = model.generate(batch, **prompt, num_beams=3, max_new_tokens=16)
        texts += processor.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


def on_white(rgba: np.ndarray) -> Image.Image:
    image = Image.fromarray(rgba, "RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


class Evaluation:
    """Embeds the held-out images and all names once; every figure is computed from these."""

    def __init__(self, model: Any, processor: Any, data: EmojiData):
        self.model, self.processor = model, processor
        held_out = np.flatnonzero(data.heldout_mask)
        held_out = held_out[np.argsort(data.concept[held_out])]
        self.concepts = [data.concepts[data.concept[index]] for index in held_out]
        self.own = torch.arange(len(self.concepts))
        self.names = {language: [concept["name"][language] for concept in self.concepts] for language in LANGUAGES}
        self.pixels = processor(images=[on_white(data.rgba[index]) for index in held_out]).pixel_values
        self.images = embed_images(model, self.pixels)
        self.texts = {language: self.embed_texts(self.names[language]) for language in LANGUAGES}

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        return embed_texts(self.model, self.processor, texts)

    def retrieval(self, language: str, mode: str) -> dict[str, float]:
        similarity = self.images[mode] @ self.texts[language].T  # [images, names]
        return {
            "image_to_text_r1": recall(similarity, self.own, 1),
            "image_to_text_r5": recall(similarity, self.own, 5),
            "text_to_image_r1": recall(similarity.T, self.own, 1),
            "zero_shot_20": twenty_way(similarity),
        }

    def queries(self, language: str) -> dict[str, dict[str, set[int]]]:
        """Texts that were never trained on, and the images that are right answers."""
        texts = Texts(self.concepts, language)
        number_of = {concept["hexcode"]: number for number, concept in enumerate(self.concepts)}
        asked = {
            phrase: {number_of[hexcode] for hexcode in hexcodes if hexcode in number_of}
            for phrase, hexcodes in phrases(language).items()
        }
        return {"keywords": texts.held_out, "pairs": texts.held_out_pairs(), "phrases": asked}

    def found(self, queries: dict[str, set[int]], shortlist: int = 10) -> dict[str, float]:
        """Number of queries, how often one of the nearest images is right, and how often by chance."""
        texts = self.embed_texts(list(queries))
        count = len(self.concepts)
        figures: dict[str, float] = {"queries": len(queries)}
        for mode in MODES:
            nearest = (texts @ self.images[mode].T).topk(shortlist, dim=1).indices.tolist()
            hits = [not right.isdisjoint(row) for right, row in zip(queries.values(), nearest, strict=True)]
            figures[mode] = sum(hits) / len(hits)
        missed = [math.comb(count - len(right), shortlist) / math.comb(count, shortlist) for right in queries.values()]
        figures["chance"] = 1 - sum(missed) / len(missed)
        return figures

    def reranked(
        self, language: str, images: torch.Tensor, pixels: torch.Tensor, weights: list[float], shortlist: int = 10
    ) -> torch.Tensor:
        """The name of each image after matching re-orders the shortlist, for every weight: [weights, images]"""
        scores, candidates = (images @ self.texts[language].T).topk(shortlist, dim=1)
        matches = []
        for row, image in enumerate(tqdm(pixels, desc=f"re-ranking {language}", leave=False)):
            texts = [self.names[language][name] for name in candidates[row]]
            logits = self.model.match(image[None], **self.processor(text=texts, task="match"), all_pairs=True)[0]
            matches.append(logits.float().log_softmax(-1)[:, 1])
        totals = self.model.logit_scale.exp() * scores + torch.tensor(weights)[:, None, None] * torch.stack(matches)
        return candidates.expand(len(weights), -1, -1).gather(2, totals.argmax(2, keepdim=True)).squeeze(2)

    def caption_figures(self, language: str) -> dict[str, Any]:
        captions = captions_of(self.model, self.processor, self.pixels, language)
        similarity = self.embed_texts([caption or "-" for caption in captions]) @ self.texts[language].T
        kinds = Counter(self.kind_of_caption(language, *pair) for pair in enumerate(captions))
        exact = sum(caption == name for caption, name in zip(captions, self.names[language]))
        return {
            "caption_exact": exact / len(captions),
            "caption_r1": recall(similarity, self.own, 1),
            "captions": {kind: kinds[kind] / len(captions) for kind in CAPTIONS},
        }

    def kind_of_caption(self, language: str, number: int, caption: str) -> str:
        """The kind of an image's caption, one of `CAPTIONS`."""
        if caption not in self.names[language]:
            return "no name"
        named, shown = self.concepts[self.names[language].index(caption)], self.concepts[number]
        if named is shown:
            return "exact"
        same = [level for level in ("subgroup", "group") if named[level] == shown[level]]
        return f"same {same[0]}" if same else "another name"


def recall(similarity: torch.Tensor, own: torch.Tensor, shortlist: int) -> float:
    """The share of rows [N, M] whose own column [N] is among the nearest."""
    return float((similarity.topk(shortlist, dim=1).indices == own[:, None]).any(1).float().mean())


def accuracy(predictions: torch.Tensor, targets: torch.Tensor) -> float:
    return float((predictions == targets).float().mean())


def twenty_way(similarity: torch.Tensor, seed: int = 0) -> float:
    """The share of rows whose own column beats 19 others."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(similarity.shape, generator=generator).fill_diagonal_(-1)
    others = noise.topk(19, dim=1).indices
    return float((similarity.diag()[:, None] > similarity.gather(1, others)).all(1).float().mean())


def pixel_neighbour(data: EmojiData, side: int = 16) -> float:
    """R@1 of the concept of the nearest training image, by the distance of small images on white."""
    small = np.stack([np.asarray(on_white(rgba).resize((side, side), Image.Resampling.BICUBIC)) for rgba in data.rgba])
    vectors = torch.from_numpy(small).float().flatten(1)
    train, held_out = torch.from_numpy(data.train_mask), torch.from_numpy(data.heldout_mask)
    nearest = torch.cdist(vectors[held_out], vectors[train]).argmin(1)
    concepts = torch.from_numpy(data.concept)
    return accuracy(concepts[train][nearest], concepts[held_out])


def evaluate(model: Any, processor: Any, data: EmojiData) -> dict:
    evaluation = Evaluation(model, processor, data)
    results: dict = {"pictures": len(evaluation.concepts), "pixel_neighbour_r1": pixel_neighbour(data)}
    for language in LANGUAGES:
        results[language] = {mode: evaluation.retrieval(language, mode) for mode in MODES}
        best = evaluation.reranked(language, evaluation.images["InternVL-G"], evaluation.pixels, [MATCH_WEIGHT])
        results[language]["reranked_r1"] = accuracy(best[0], evaluation.own)
        results[language] |= evaluation.caption_figures(language)
        queries = evaluation.queries(language)
        results[language]["queries"] = {kind: evaluation.found(queries[kind]) for kind in QUERIES}
    return results


def try_weights(evaluation: Evaluation, data: EmojiData, count: int = 700, seed: int = 0) -> None:
    """Print R@1 of re-ranking for several weights, on augmented training images."""
    from tools.tiny.train_tiny import Augmentation

    generator = torch.Generator().manual_seed(seed)
    train = torch.from_numpy(np.flatnonzero(data.train_mask))
    chosen = train[torch.randperm(len(train), generator=generator)[:count]].numpy()
    image_processor = evaluation.processor.image_processor
    size = image_processor.crop_size["height"]
    augment = Augmentation(size, image_processor.image_mean, image_processor.image_std, generator)
    rgba = torch.from_numpy(data.rgba[chosen])
    pixels = augment(rgba, rgba, 1.0)
    own = torch.from_numpy(data.concept[chosen]).long()
    images = evaluation.model.embed_image(pixels, "InternVL-G")
    weights = [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5]
    for language in LANGUAGES:
        best = evaluation.reranked(language, images, pixels, weights)
        print(language, {weight: round(accuracy(row, own), 3) for weight, row in zip(weights, best)})


def figures_table(results: dict) -> str:
    """The figures as Markdown, and how they were measured."""
    parts = [results[language] for language in LANGUAGES]
    found = {
        f"{title}, {mode}": [part[mode][key] for part in parts] for mode in MODES for key, title in FIGURES.items()
    }
    reranked = "image-to-text R@1, the ten best of InternVL-G re-ranked with matching"
    found[reranked] = [part["reranked_r1"] for part in parts]
    found |= {title: [part["captions"][kind] for part in parts] for kind, title in CAPTIONS.items()}
    nearest = "the caption, embedded as a text, is nearest to the right name"
    found[nearest] = [part["caption_r1"] for part in parts]
    for kind, title in QUERIES.items():
        queries = [part["queries"][kind] for part in parts]
        counts = " / ".join(f"{each['queries']:,}" for each in queries)
        found |= {f"{title} ({counts}), R@10, {mode}": [each[mode] for each in queries] for mode in MODES}
        found[f"{title}, R@10 by chance"] = [each["chance"] for each in queries]
    baseline = "baseline: nearest training image at 16 x 16 pixels, R@1"
    found[baseline] = [results["pixel_neighbour_r1"]] * len(parts)
    rows = [[title, *(f"{value:.3f}" for value in values)] for title, values in found.items()]
    head = [f"{results['pictures']} held-out images (Twemoji)", *LANGUAGES]
    return f"{table(head, rows)}\n\n{measured_by(results['measured_with'])}"


def write_tables(results: dict) -> None:
    """Put the table and the figures of the metadata into the card of `tiny/`."""
    put(CARD, "tiny", figures_table(results))
    write_model_index(CARD, results)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[checkpoint_options()])
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the tables again")
    parser.add_argument("--int8", action="store_true", help="measure the model with int8 weights and activations")
    parser.add_argument("--weights", action="store_true", help="try weights of matching on training images")
    options = parser.parse_args()
    if options.tables:
        return write_tables(json.loads(RESULTS.read_text("utf-8")))
    if options.int8:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        int8 = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
        results = evaluate(*load_checkpoint(options, quantization_config=int8), load(options.data))
        results["measured_with"] = measured_with("evaluate_tiny --int8", "int8 weights and activations")
        return print(figures_table(results))
    model, processor = load_checkpoint(options)
    data = load(options.data)
    if options.weights:
        return try_weights(Evaluation(model, processor, data), data)
    results = evaluate(model, processor, data) | {"measured_with": measured_with("evaluate_tiny")}
    written = ROOT / options.subfolder / "results.json"
    written.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if written == RESULTS:
        write_tables(results)
    print(figures_table(results))


if __name__ == "__main__":
    main()
