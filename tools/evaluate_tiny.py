"""Measure the tiny checkpoint on Twemoji, the artist it was never shown, and write what was measured.

    python tools/evaluate_tiny.py              # prints the table; writes tiny/results.json, the tables of both READMEs
                                               # and the model-index of tiny/README.md
    python tools/evaluate_tiny.py --int8       # prints the table of the model in int8 (torchao); writes nothing
    python tools/evaluate_tiny.py --tables     # writes only tables and model-index, from tiny/results.json
    python tools/evaluate_tiny.py --weights    # what MATCH_WEIGHT was chosen by: training pictures, augmented

Every figure is over all concepts of the dataset, one held-out picture each:

* image-to-text R@1: the picture's own name is the nearest of all names of that language; text-to-image R@1 likewise;
* 20-way: the own name is the nearest of it and 19 others, drawn at random with a fixed seed;
* re-ranked: the ten nearest names of mode InternVL-G, put into a new order by the logit of the cosine plus
  MATCH_WEIGHT times the log-probability of image-text matching;
* caption exact: the caption is the name; caption R@1: the caption's own text embedding is nearest to the name;
* pixel neighbour: the concept of the nearest training picture at 16 x 16 pixels on white, as a baseline.
"""

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torchao.quantization import Int8DynamicActivationInt8WeightConfig
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, TorchAoConfig

from emoji_data import DEFAULT_CACHE, LANGUAGES, EmojiData, load
from model_index import write_model_index

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tiny" / "results.json"
CARDS = (ROOT / "README.md", ROOT / "tiny" / "README.md")
MODES = ("InternVL-C", "InternVL-G")
FIGURES = {
    "image_to_text_r1": "image-to-text R@1",
    "image_to_text_r5": "image-to-text R@5",
    "text_to_image_r1": "text-to-image R@1",
    "zero_shot_20": "20-way zero-shot",
}
MATCH_WEIGHT = 0.2
START, END = "<!-- results:tiny -->", "<!-- /results:tiny -->"
PROMPTS = {"en": "English caption:", "zh": "中文描述:", "ja": "日本語の説明:"}


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
        self.pictures = [on_white(data.rgba[index]) for index in held_out]
        self.names = {lang: [data.concepts[data.concept[i]]["name"][lang] for i in held_out] for lang in LANGUAGES}
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
        prompt = self.processor(text=PROMPTS[language], task="caption")
        texts = []
        for pixels in tqdm(self.pixels.split(self.batch), desc=f"captions {language}", leave=False):
            ids = self.model.generate(pixels, **prompt, num_beams=3, max_new_tokens=16)
            texts += self.processor.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def caption_figures(self, language: str, captions: list[str]) -> dict[str, float]:
        pairs = zip(captions, self.names[language], strict=True)
        similarity = self.embed_texts([caption or "-" for caption in captions]) @ self.texts[language].T
        exact = sum(caption == name for caption, name in pairs) / len(captions)
        return {"caption_exact": exact, "caption_r1": accuracy(similarity.argmax(1), torch.arange(len(captions)))}


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
    return results, all_captions


def try_weights(evaluation: Evaluation, data: EmojiData, count: int = 700, seed: int = 0) -> None:
    """Print R@1 of re-ranking for several weights, on training pictures in unfamiliar guise."""
    from train_tiny import Augmentation

    generator = torch.Generator().manual_seed(seed)
    train = torch.from_numpy(np.flatnonzero(data.train_mask))
    chosen = train[torch.randperm(len(train), generator=generator)[:count]].numpy()
    image_processor = evaluation.processor.image_processor
    size = image_processor.crop_size["height"]
    augment = Augmentation(size, image_processor.image_mean, image_processor.image_std, generator)
    pixels = augment(torch.from_numpy(data.rgba[chosen]), 1.0)
    own = torch.from_numpy(data.concept[chosen]).long()
    images = evaluation.model.embed_image(pixels, "InternVL-G")
    weights = [0.0, 0.1, 0.2, 0.3, 0.5, 1.0]
    for language in LANGUAGES:
        best = evaluation.reranked(language, images, pixels, weights)
        print(language, {weight: round(accuracy(row, own), 3) for weight, row in zip(weights, best)})


def table(results: dict) -> str:
    """The figures as Markdown, and how they were measured."""
    rows = [f"| {results['pictures']} held-out pictures (Twemoji) | en | zh | ja |", "|---|---|---|---|"]

    def row(title: str, values: list[float]) -> None:
        rows.append(f"| {title} | " + " | ".join(f"{value:.3f}" for value in values) + " |")

    parts = [results[language] for language in LANGUAGES]
    for mode in MODES:
        for key, title in FIGURES.items():
            row(f"{title}, {mode}", [part[mode][key] for part in parts])
    row(
        "image-to-text R@1, the ten best of InternVL-G re-ranked with matching", [part["reranked_r1"] for part in parts]
    )
    row("caption is the exact name", [part["caption_exact"] for part in parts])
    row("the caption, embedded as a text, is nearest to the right name", [part["caption_r1"] for part in parts])
    row("baseline: nearest training picture at 16 x 16 pixels, R@1", [results["pixel_neighbour_r1"]] * len(parts))
    how = results["measured_with"]
    versions = f"torch {how['torch']}, transformers {how['transformers']}"
    return "\n".join([*rows, "", f"Measured by `{how['command']}` on {how['machine']}, {versions}, {how['dtype']}."])


def write_tables(results: dict) -> None:
    """Put the table between the marks of both model cards, and the figures into the metadata of the tiny one."""
    for path in CARDS:
        before, _, rest = path.read_text("utf-8").partition(START)
        _, _, after = rest.partition(END)
        path.write_text(f"{before}{START}\n{table(results)}\n{END}{after}", "utf-8")
    write_model_index(CARDS[1], results)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT))
    parser.add_argument("--subfolder", default="tiny")
    parser.add_argument("--data", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the tables again")
    parser.add_argument("--int8", action="store_true", help="measure the model with int8 weights and activations")
    parser.add_argument("--weights", action="store_true", help="try weights of matching on training pictures")
    arguments = parser.parse_args()
    if arguments.tables:
        return write_tables(json.loads(RESULTS.read_text("utf-8")))
    where = {"subfolder": arguments.subfolder, "trust_remote_code": True}
    int8 = {"quantization_config": TorchAoConfig(Int8DynamicActivationInt8WeightConfig())} if arguments.int8 else {}
    model = AutoModel.from_pretrained(arguments.model, dtype=torch.float32, **where, **int8).eval()
    processor = AutoProcessor.from_pretrained(arguments.model, **where)
    data = load(arguments.data)
    if arguments.weights:
        return try_weights(Evaluation(model, processor, data, arguments.batch), data)
    results, captions = evaluate(model, processor, data, arguments.batch)
    results["measured_with"] = {
        "command": "python tools/evaluate_tiny.py" + " --int8" * arguments.int8,
        "machine": f"a CPU ({platform.machine()}, {torch.get_num_threads()} threads)",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": "int8 weights and activations" if arguments.int8 else "float32 from bfloat16 weights",
    }
    if arguments.int8:
        return print(table(results))
    RESULTS.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8")
    write_tables(results)
    print(table(results))
    print("\nSome captions, and the names:")
    for index in range(0, len(captions["en"]), max(1, len(captions["en"]) // 12)):
        name = data.concepts[index]["name"]
        print("  " + "; ".join(f"{captions[language][index]!r} for {name[language]!r}" for language in LANGUAGES))


if __name__ == "__main__":
    main()
