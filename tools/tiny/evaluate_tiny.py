"""Measure the tiny checkpoint on Twemoji, the artist it was never shown, and write what was measured.

Run by whoever retrained tiny/ (`make tiny`), or changed what its tables show (`--tables`).

    python -m tools.tiny.evaluate_tiny              # prints the table; writes tiny/results.json, the tables of both
                                                    # READMEs and the model-index of tiny/README.md
    python -m tools.tiny.evaluate_tiny --int8       # prints the table of the model in int8 (torchao); writes nothing
    python -m tools.tiny.evaluate_tiny --tables     # writes only tables and model-index, from tiny/results.json
    python -m tools.tiny.evaluate_tiny --weights    # what MATCH_WEIGHT was chosen by: training pictures, augmented

How much a training owes to chance (with seeds 1, 2, ...; nothing of `tiny/` but seeds.json and its table is touched):

    python -m tools.tiny.train_tiny --seed 1 --out .cache/seed1 --checkpoint .cache/seed1.pt
    python -m tools.tiny.evaluate_tiny --subfolder .cache/seed1     # writes .cache/seed1/results.json
    python -m tools.tiny.evaluate_tiny --spread .cache/seed1 .cache/seed2

Every figure is over all concepts of the dataset, one held-out picture each:

* image-to-text R@1: the picture's own name is the nearest of all names of that language; text-to-image R@1 likewise;
* 20-way: the own name is the nearest of it and 19 others, drawn at random with a fixed seed;
* re-ranked: the ten nearest names of mode InternVL-G, put into a new order by the logit of the cosine plus
  MATCH_WEIGHT times the log-probability of image-text matching;
* caption exact: the caption is the name; caption R@1: the caption's own text embedding is nearest to the name; the
  other captions are counted by what they are: the name of an emoji of the same subgroup of Unicode's (another bird), of
  the same group, of any other, or no name at all;
* held-out keywords, pairs and phrases (tiny_texts.py): how often one of the ten nearest pictures is a right one, and
  how often ten pictures drawn at random would have one;
* pixel neighbour: the concept of the nearest training picture at 16 x 16 pixels on white, as a baseline.
"""

import argparse
import json
import math
import platform
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torchao.quantization import Int8DynamicActivationInt8WeightConfig
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, TorchAoConfig

from tools.hub.model_index import write_model_index
from tools.pages import put, table
from tools.tiny.emoji_data import DEFAULT_CACHE, LANGUAGES, EmojiData, load
from tools.tiny.tiny_texts import CAPTION_PROMPTS, Texts, phrases

ROOT = Path(__file__).resolve().parents[2]


RESULTS = ROOT / "tiny" / "results.json"
SEEDS = ROOT / "tiny" / "seeds.json"
CARDS = (ROOT / "README.md", ROOT / "tiny" / "README.md")
MODES = ("InternVL-C", "InternVL-G")
FIGURES = {
    "image_to_text_r1": "image-to-text R@1",
    "image_to_text_r5": "image-to-text R@5",
    "text_to_image_r1": "text-to-image R@1",
    "zero_shot_20": "20-way zero-shot",
}
MATCH_WEIGHT = 0.3
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


def on_white(rgba: np.ndarray) -> Image.Image:
    picture = Image.fromarray(rgba, "RGBA") if isinstance(rgba, np.ndarray) else rgba
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


class Evaluation:
    """Embeds the held-out pictures and all names once, and derives every figure from that."""

    def __init__(self, model, processor, data: EmojiData, batch: int):
        self.model, self.processor, self.batch = model, processor, batch
        held_out = np.flatnonzero(data.heldout_mask)
        held_out = held_out[np.argsort(data.concept[held_out])]
        self.concepts = [data.concepts[data.concept[index]] for index in held_out]
        self.pictures = [on_white(data.rgba[index]) for index in held_out]
        self.names = {language: [concept["name"][language] for concept in self.concepts] for language in LANGUAGES}
        self.pixels = processor(images=self.pictures).pixel_values
        self.images = {mode: self.embed_images(mode) for mode in MODES}
        self.texts = {language: self.embed_texts(self.names[language]) for language in LANGUAGES}

    def embed_images(self, mode: str) -> torch.Tensor:
        return torch.cat([self.model.embed_image(pixels, mode) for pixels in self.pixels.split(self.batch)])

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        parts = [texts[start : start + self.batch] for start in range(0, len(texts), self.batch)]
        return torch.cat([self.model.embed_text(**self.processor(text=part)) for part in parts])

    def retrieval(self, language: str, mode: str) -> dict[str, float]:
        similarity = self.images[mode] @ self.texts[language].T  # [pictures, names]
        own = torch.arange(len(similarity))
        top5 = similarity.topk(5, dim=1).indices
        return {
            "image_to_text_r1": accuracy(similarity.argmax(1), own),
            "image_to_text_r5": float((top5 == own[:, None]).any(1).float().mean()),
            "text_to_image_r1": accuracy(similarity.argmax(0), own),
            "zero_shot_20": twenty_way(similarity),
        }

    def queries(self, language: str) -> dict[str, dict[str, set[int]]]:
        """Texts that were never trained on, and the pictures that are right answers."""
        texts = Texts(self.concepts, language)
        number_of = {concept["hexcode"]: number for number, concept in enumerate(self.concepts)}
        asked = {
            phrase: {number_of[hexcode] for hexcode in hexcodes if hexcode in number_of}
            for phrase, hexcodes in phrases(language).items()
        }
        return {"keywords": texts.held_out, "pairs": texts.held_out_pairs(), "phrases": asked}

    def found(self, queries: dict[str, set[int]], shortlist: int = 10) -> dict[str, float]:
        """How many there are, how often one of the nearest pictures is right, and how often by chance."""
        texts = self.embed_texts(list(queries))
        count = len(self.pictures)
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
        """The name each picture gets when matching re-orders the shortlist, for every weight: [weights, pictures]"""
        scores, candidates = (images @ self.texts[language].T).topk(shortlist, dim=1)
        matches = []
        for row, picture in enumerate(tqdm(pixels, desc=f"re-ranking {language}", leave=False)):
            texts = [self.names[language][name] for name in candidates[row]]
            logits = self.model.match(picture[None], **self.processor(text=texts, task="match"), all_pairs=True)[0]
            matches.append(logits.float().log_softmax(-1)[:, 1])
        totals = self.model.logit_scale.exp() * scores + torch.tensor(weights)[:, None, None] * torch.stack(matches)
        return candidates.expand(len(weights), -1, -1).gather(2, totals.argmax(2, keepdim=True)).squeeze(2)

    def captions(self, language: str) -> list[str]:
        prompt = self.processor(text=CAPTION_PROMPTS[language], task="caption")
        texts = []
        for pixels in tqdm(self.pixels.split(self.batch), desc=f"captions {language}", leave=False):
            ids = self.model.generate(pixels, **prompt, num_beams=3, max_new_tokens=16)
            texts += self.processor.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def caption_figures(self, language: str, captions: list[str]) -> dict[str, float]:
        pairs = zip(captions, self.names[language], strict=True)
        similarity = self.embed_texts([caption or "-" for caption in captions]) @ self.texts[language].T
        exact = sum(caption == name for caption, name in pairs) / len(captions)
        kinds = Counter(self.kind_of_caption(language, *pair) for pair in enumerate(captions))
        return {
            "caption_exact": exact,
            "caption_r1": accuracy(similarity.argmax(1), torch.arange(len(captions))),
            "captions": {kind: kinds[kind] / len(captions) for kind in CAPTIONS},
        }

    def kind_of_caption(self, language: str, number: int, caption: str) -> str:
        """What the caption of a picture is, as one of `CAPTIONS`."""
        if caption not in self.names[language]:
            return "no name"
        named, shown = self.concepts[self.names[language].index(caption)], self.concepts[number]
        if named is shown:
            return "exact"
        same = [level for level in ("subgroup", "group") if named[level] == shown[level]]
        return f"same {same[0]}" if same else "another name"


def accuracy(predictions: torch.Tensor, targets: torch.Tensor) -> float:
    return float((predictions == targets).float().mean())


def twenty_way(similarity: torch.Tensor, seed: int = 0) -> float:
    """How often the own column beats 19 others."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(similarity.shape, generator=generator).fill_diagonal_(-1)
    others = noise.topk(19, dim=1).indices
    return float((similarity.diag()[:, None] > similarity.gather(1, others)).all(1).float().mean())


def pixel_neighbour(data: EmojiData, side: int = 16) -> float:
    """R@1 of the concept of the nearest training picture, by squared differences of small pictures on white."""
    small = np.stack([np.asarray(on_white(rgba).resize((side, side), Image.Resampling.BICUBIC)) for rgba in data.rgba])
    vectors = torch.from_numpy(small).float().flatten(1)
    train, held_out = torch.from_numpy(data.train_mask), torch.from_numpy(data.heldout_mask)
    nearest = torch.cdist(vectors[held_out], vectors[train]).argmin(1)
    concepts = torch.from_numpy(data.concept)
    return accuracy(concepts[train][nearest], concepts[held_out])


def evaluate(model, processor, data: EmojiData, batch: int) -> tuple[dict, dict[str, list[str]]]:
    evaluation = Evaluation(model, processor, data, batch)
    results: dict = {"pictures": len(evaluation.pictures), "pixel_neighbour_r1": pixel_neighbour(data)}
    all_captions = {}
    for language in LANGUAGES:
        captions = all_captions[language] = evaluation.captions(language)
        results[language] = {mode: evaluation.retrieval(language, mode) for mode in MODES}
        best = evaluation.reranked(language, evaluation.images["InternVL-G"], evaluation.pixels, [MATCH_WEIGHT])
        results[language]["reranked_r1"] = accuracy(best[0], torch.arange(len(evaluation.pictures)))
        results[language] |= evaluation.caption_figures(language, captions)
        queries = evaluation.queries(language)
        results[language]["queries"] = {kind: evaluation.found(queries[kind]) for kind in QUERIES}
    return results, all_captions


def try_weights(evaluation: Evaluation, data: EmojiData, count: int = 700, seed: int = 0) -> None:
    """Print R@1 of re-ranking for several weights, on training pictures in unfamiliar guise."""
    from tools.tiny.train_tiny import Augmentation

    generator = torch.Generator().manual_seed(seed)
    train = torch.from_numpy(np.flatnonzero(data.train_mask))
    chosen = train[torch.randperm(len(train), generator=generator)[:count]].numpy()
    image_processor = evaluation.processor.image_processor
    size = image_processor.crop_size["height"]
    augment = Augmentation(size, image_processor.image_mean, image_processor.image_std, generator)
    pictures = torch.from_numpy(data.rgba[chosen])
    pixels = augment(pictures, pictures, 1.0)
    own = torch.from_numpy(data.concept[chosen]).long()
    images = evaluation.model.embed_image(pixels, "InternVL-G")
    weights = [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5]
    for language in LANGUAGES:
        best = evaluation.reranked(language, images, pixels, weights)
        print(language, {weight: round(accuracy(row, own), 3) for weight, row in zip(weights, best)})


def figures_table(results: dict) -> str:
    """The figures as Markdown, and how they were measured."""
    rows = []

    def row(title: str, values: list[float]) -> None:
        rows.append([title, *(f"{value:.3f}" for value in values)])

    parts = [results[language] for language in LANGUAGES]
    for mode in MODES:
        for key, title in FIGURES.items():
            row(f"{title}, {mode}", [part[mode][key] for part in parts])
    row(
        "image-to-text R@1, the ten best of InternVL-G re-ranked with matching", [part["reranked_r1"] for part in parts]
    )
    for kind, title in CAPTIONS.items():
        row(title, [part["captions"][kind] for part in parts])
    row("the caption, embedded as a text, is nearest to the right name", [part["caption_r1"] for part in parts])
    for kind, title in QUERIES.items():
        counts = " / ".join(f"{part['queries'][kind]['queries']:,}" for part in parts)
        for mode in MODES:
            row(f"{title} ({counts}), R@10, {mode}", [part["queries"][kind][mode] for part in parts])
        row(f"{title}, R@10 by chance", [part["queries"][kind]["chance"] for part in parts])
    row("baseline: nearest training picture at 16 x 16 pixels, R@1", [results["pixel_neighbour_r1"]] * len(parts))
    how = results["measured_with"]
    versions = f"torch {how['torch']}, transformers {how['transformers']}"
    found = table([f"{results['pictures']} held-out pictures (Twemoji)", *LANGUAGES], rows)
    return f"{found}\n\nMeasured by `{how['command']}` on {how['machine']}, {versions}, {how['dtype']}."


def spread_of(trainings: list[dict]) -> dict[str, dict[str, list[float]]]:
    """For each figure and language, its values in several trainings."""
    chief: dict[str, Callable[[dict], float]] = {
        f"{FIGURES[key]}, {mode}": lambda part, mode=mode, key=key: part[mode][key]
        for mode in MODES
        for key in ("image_to_text_r1", "text_to_image_r1", "zero_shot_20")
    }
    chief["image-to-text R@1, re-ranked"] = lambda part: part["reranked_r1"]
    chief[CAPTIONS["exact"]] = lambda part: part["caption_exact"]
    for kind, kind_title in QUERIES.items():
        chief[f"{kind_title}, R@10, InternVL-C"] = lambda part, kind=kind: part["queries"][kind]["InternVL-C"]
    return {
        title: {language: [figure(training[language]) for training in trainings] for language in LANGUAGES}
        for title, figure in chief.items()
    }


def spread_table(spread: dict[str, dict[str, list[float]]]) -> str:
    count = len(next(iter(spread.values()))["en"])
    rows = [
        [title, *(f"{min(values[language]):.3f} to {max(values[language]):.3f}" for language in LANGUAGES)]
        for title, values in spread.items()
    ]
    return table([f"least and greatest of {count} trainings, each with another seed", *LANGUAGES], rows)


def write_tables(results: dict) -> None:
    """Put the table between the marks of both model cards, and the figures into the metadata of the tiny one."""
    for path in CARDS:
        put(path, "tiny", figures_table(results))
    write_model_index(CARDS[1], results)


def write_spread(folders: list[str]) -> None:
    """Write how the figures of the checkpoint and of other trainings differ, from what was measured of each."""
    paths = [RESULTS, *(ROOT / folder / "results.json" for folder in folders)]
    spread = spread_of([json.loads(path.read_text("utf-8")) for path in paths])
    SEEDS.write_text(json.dumps(spread, indent=2, ensure_ascii=False) + "\n", "utf-8")
    put(CARDS[1], "seeds", spread_table(spread))
    print(spread_table(spread))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT))
    parser.add_argument("--subfolder", default="tiny")
    parser.add_argument("--data", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the tables again")
    parser.add_argument("--spread", nargs="+", metavar="FOLDER", help="measure nothing, compare with other trainings")
    parser.add_argument("--int8", action="store_true", help="measure the model with int8 weights and activations")
    parser.add_argument("--weights", action="store_true", help="try weights of matching on training pictures")
    arguments = parser.parse_args()
    if arguments.tables:
        return write_tables(json.loads(RESULTS.read_text("utf-8")))
    if arguments.spread:
        return write_spread(arguments.spread)
    where = {"subfolder": arguments.subfolder, "trust_remote_code": True}
    int8 = {"quantization_config": TorchAoConfig(Int8DynamicActivationInt8WeightConfig())} if arguments.int8 else {}
    model = AutoModel.from_pretrained(arguments.model, dtype=torch.float32, **where, **int8).eval()
    processor = AutoProcessor.from_pretrained(arguments.model, **where)
    data = load(arguments.data)
    if arguments.weights:
        return try_weights(Evaluation(model, processor, data, arguments.batch), data)
    results, captions = evaluate(model, processor, data, arguments.batch)
    results["measured_with"] = {
        "command": "python -m tools.tiny.evaluate_tiny" + " --int8" * arguments.int8,
        "machine": f"a CPU ({platform.machine()}, {torch.get_num_threads()} threads)",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": "int8 weights and activations" if arguments.int8 else "float32 from bfloat16 weights",
    }
    if arguments.int8:
        return print(table(results))
    written = ROOT / arguments.subfolder / "results.json"
    written.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if written == RESULTS:
        write_tables(results)
    print(table(results))
    print("\nSome captions, and the names:")
    for index in range(0, len(captions["en"]), max(1, len(captions["en"]) // 12)):
        name = data.concepts[index]["name"]
        print("  " + "; ".join(f"{captions[language][index]!r} for {name[language]!r}" for language in LANGUAGES))


if __name__ == "__main__":
    main()
