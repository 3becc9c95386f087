"""See InternVL at work: zero-shot classification, retrieval in three languages and captions, on real pictures.

    python examples/demo.py                               # the tiny checkpoint of this repository
    python examples/demo.py --model PATH_OR_ID            # another one, such as the published 14B
    python examples/demo.py --pictures FOLDER             # your own pictures; their file names are the labels

Prints tables, and writes them with the images to demo.png. tools/tiny/tiny_figure.py imports what draws them.
"""

import argparse
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModel, AutoProcessor

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("en", "zh", "ja")
PHRASES = {"en": "a photo of {}", "zh": "一张{}的照片", "ja": "{}の写真"}
PROMPTS = {"en": "English caption:", "zh": "中文描述:", "ja": "日本語の説明:"}
INK, GREY, GREEN, RED = "#1b1b1b", "#777777", "#1a7f37", "#c4432b"
THUMBNAIL, MARGIN, LINE = 96, 20, 24


@dataclass
class Example:
    """A picture and what it shows in each language that has a name for it."""

    picture: Image.Image
    names: dict[str, str]


def read_examples(folder: Path) -> list[Example]:
    """Pictures with `examples.json` beside them, or any pictures, named by their files."""
    listing = folder / "examples.json"
    if listing.exists():
        entries = [(folder / entry["file"], entry["name"]) for entry in json.loads(listing.read_text("utf-8"))]
    else:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in Image.registered_extensions())
        entries = [(path, {"en": path.stem.replace("-", " ").replace("_", " ")}) for path in files]
    if not entries:
        raise SystemExit(f"No pictures in {folder}.")
    return [Example(Image.open(path), names) for path, names in entries]


class Demo:
    """Runs the model over the examples; every method returns plain rows to print and to draw."""

    def __init__(self, model, processor, examples: list[Example], mode: str):
        model.check_processor(processor)
        self.model, self.processor, self.examples, self.mode = model, processor, examples, mode
        pictures = [example.picture for example in examples]
        self.pixels = processor(images=pictures).pixel_values.to(model.device, model.dtype)
        self.images = model.embed_image(self.pixels, mode)

    def embed(self, texts: list[str]) -> torch.Tensor:
        return self.model.embed_text(**self.processor(text=texts).to(self.model.device))

    def classify(self, chosen: list[int], language: str = "en") -> list[tuple[int, list[tuple[str, float]]]]:
        """For each chosen picture the three likeliest of all names."""
        labels = [example.names[language] for example in self.examples]
        texts = self.embed([PHRASES[language].format(label) for label in labels])
        logits = self.model.logit_scale.exp() * self.images[chosen] @ texts.T
        top = logits.float().softmax(-1).topk(min(3, len(labels)))
        rows = zip(chosen, top.indices.tolist(), top.values.tolist(), strict=True)
        return [(row, [(labels[i], p) for i, p in zip(best, values, strict=True)]) for row, best, values in rows]

    def search(self, targets: list[int]) -> list[tuple[str, int, list[int]]]:
        """Ask for each target by its name, in the next language each time: query, target and the five best pictures."""
        rows = []
        for number, target in enumerate(targets):
            names = self.examples[target].names
            language = [code for code in LANGUAGES if code in names][number % len(names)]
            query = PHRASES[language].format(names[language])
            ranking = (self.images @ self.embed([query])[0]).topk(min(5, len(self.examples))).indices.tolist()
            rows.append((query, target, ranking))
        return rows

    def caption(self, chosen: list[int]) -> list[tuple[int, dict[str, str]]]:
        """Captions of the chosen pictures in each language."""
        captions: dict[int, dict[str, str]] = {row: {} for row in chosen}
        for language, prompt in PROMPTS.items():
            inputs = self.processor(text=prompt, task="caption").to(self.model.device)
            ids = self.model.generate(self.pixels[chosen], **inputs, num_beams=3, max_new_tokens=24)
            for row, text in zip(chosen, self.processor.batch_decode(ids, skip_special_tokens=True), strict=True):
                captions[row][language] = text.strip()
        return list(captions.items())


def load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font with Chinese and Japanese glyphs if its package is installed, Pillow's own otherwise."""
    package = importlib.util.find_spec("cvttf_NotoSansCJK_Regular")
    if package is None or package.origin is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(Path(package.origin).with_name("NotoSansCJKtc-Regular.otf"), size)


class Poster:
    """One tall picture, filled from the top."""

    def __init__(self, examples: list[Example], width: int = 1000, height: int = 4000):
        self.examples = examples
        self.canvas = Image.new("RGB", (width, height), "white")
        self.draw = ImageDraw.Draw(self.canvas)
        self.fonts = {size: load_font(size) for size in (17, 24)}
        self.y = MARGIN

    def heading(self, text: str) -> None:
        self.y += 12
        self.draw.text((MARGIN, self.y), text, INK, font=self.fonts[24])
        self.y += 44

    def thumbnail(self, example: int, x: int) -> None:
        picture = self.examples[example].picture.convert("RGBA").copy()
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        self.canvas.paste(picture, (x, self.y), picture)

    def lines(self, x: int, lines: list[tuple[str, str]]) -> None:
        for number, (text, colour) in enumerate(lines):
            self.draw.text((x, self.y + 6 + number * LINE), text, colour, font=self.fonts[17])

    def grid(self, cells: list[tuple[int, list[tuple[str, str]]]], columns: int) -> None:
        """Pictures with lines of text on their right."""
        width = (self.canvas.width - 2 * MARGIN) // columns
        for start in range(0, len(cells), columns):
            for column, (example, lines) in enumerate(cells[start : start + columns]):
                x = MARGIN + column * width
                self.thumbnail(example, x)
                self.lines(x + THUMBNAIL + 12, lines)
            self.y += THUMBNAIL + 16

    def ranking(self, query: str, target: int, found: list[int]) -> None:
        """A query, and the pictures found; the one asked for is framed."""
        self.lines(MARGIN, [(query, INK)])
        for place, example in enumerate(found):
            x = 380 + place * (THUMBNAIL + 20)
            self.thumbnail(example, x)
            if example == target:
                box = (x - 4, self.y - 4, x + THUMBNAIL + 4, self.y + THUMBNAIL + 4)
                self.draw.rectangle(box, outline=GREEN, width=3)
        self.y += THUMBNAIL + 16

    def save(self, path: Path) -> None:
        self.canvas.crop((0, 0, self.canvas.width, self.y + MARGIN)).save(path)


def show_classes(demo: Demo, poster: Poster, chosen: list[int]) -> None:
    print(f"\nZero-shot classification among {len(demo.examples)} names ({demo.mode})")
    poster.heading(f"Zero-shot classification among {len(demo.examples)} names")
    cells = []
    for row, best in demo.classify(chosen):
        truth = demo.examples[row].names["en"]
        print(f"  {truth:24} -> " + ", ".join(f"{label} {value:.0%}" for label, value in best))
        lines = [(f"{label}  {value:.0%}", GREEN if label == truth else GREY) for label, value in best]
        cells.append((row, lines))
    poster.grid(cells, columns=3)


def show_search(demo: Demo, poster: Poster, targets: list[int]) -> None:
    print("\nRetrieval: the best five pictures for a query (the one asked for is marked *)")
    poster.heading("Retrieval: the best five pictures for a query")
    for query, target, found in demo.search(targets):
        names = [demo.examples[row].names["en"] + ("*" if row == target else "") for row in found]
        print(f"  {query}  ->  " + ", ".join(names))
        poster.ranking(query, target, found)


def show_captions(demo: Demo, poster: Poster, chosen: list[int]) -> None:
    print("\nCaptions")
    poster.heading("Captions")
    cells = []
    for row, captions in demo.caption(chosen):
        names = demo.examples[row].names
        print(f"  {names['en']:24} -> " + "; ".join(captions.values()))
        lines = [(text, GREEN if text == names.get(language) else INK) for language, text in captions.items()]
        cells.append((row, lines))
    poster.grid(cells, columns=3)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id; this repository's tiny checkpoint if not given")
    parser.add_argument("--mode", default="InternVL-G", choices=("InternVL-C", "InternVL-G"))
    parser.add_argument("--pictures", type=Path, default=ROOT / "examples" / "pictures")
    parser.add_argument("--out", type=Path, default=Path("demo.png"))
    arguments = parser.parse_args()

    where = {"trust_remote_code": True, "subfolder": "" if arguments.model else "tiny"}
    path = arguments.model or str(ROOT)
    model = AutoModel.from_pretrained(path, dtype="auto", **where).eval()
    if not arguments.model:
        model.float()  # the tiny weights are small, and float32 is faster on most CPUs
    demo = Demo(model, AutoProcessor.from_pretrained(path, **where), read_examples(arguments.pictures), arguments.mode)

    poster = Poster(demo.examples)
    some = list(range(min(12, len(demo.examples))))
    show_classes(demo, poster, some)
    show_search(demo, poster, some[:9])
    show_captions(demo, poster, some)
    poster.save(arguments.out)
    print(f"\nThe same with the pictures: {arguments.out.resolve()}")


if __name__ == "__main__":
    main()
