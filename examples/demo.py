"""See InternVL at work: zero-shot classification, retrieval and captions in three languages, on real images.

    python examples/demo.py                               # the tiny checkpoint of this repository
    python examples/demo.py --model PATH_OR_ID            # another one, such as the published 14B
    python examples/demo.py --pictures FOLDER             # your own images; their file names are the labels

Prints the results, and draws them with the images into demo.png. tools/tiny/tiny_figure.py imports the drawing part.
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
INK, GREY, GREEN = "#1b1b1b", "#777777", "#1a7f37"
THUMBNAIL, MARGIN, LINE = 96, 20, 24


@dataclass
class Example:
    """An image and its name in each language."""

    image: Image.Image
    names: dict[str, str]


def read_examples(folder: Path) -> list[Example]:
    """The images that `examples.json` in the folder lists, or else all of them, named by their files."""
    listing = folder / "examples.json"
    if listing.exists():
        entries = [(folder / entry["file"], entry["name"]) for entry in json.loads(listing.read_text("utf-8"))]
    else:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in Image.registered_extensions())
        entries = [(path, {"en": path.stem.replace("-", " ").replace("_", " ")}) for path in files]
    if not entries:
        raise SystemExit(f"No images in {folder}.")
    return [Example(Image.open(path), names) for path, names in entries]


def load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font with Chinese and Japanese glyphs if its package is installed, otherwise Pillow's own."""
    package = importlib.util.find_spec("cvttf_NotoSansCJK_Regular")
    if package is None or package.origin is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(Path(package.origin).with_name("NotoSansCJKtc-Regular.otf"), size)


class Poster:
    """One tall image, filled from the top."""

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
        image = self.examples[example].image.convert("RGBA")
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        self.canvas.paste(image, (x, self.y), image)

    def lines(self, x: int, lines: list[tuple[str, str]]) -> None:
        for number, (text, colour) in enumerate(lines):
            self.draw.text((x, self.y + 6 + number * LINE), text, colour, font=self.fonts[17])

    def grid(self, cells: list[tuple[int, list[tuple[str, str]]]], columns: int) -> None:
        """Draw examples with lines of text, each with its colour, on their right."""
        width = (self.canvas.width - 2 * MARGIN) // columns
        for start in range(0, len(cells), columns):
            for column, (example, lines) in enumerate(cells[start : start + columns]):
                x = MARGIN + column * width
                self.thumbnail(example, x)
                self.lines(x + THUMBNAIL + 12, lines)
            self.y += THUMBNAIL + 16

    def ranking(self, query: str, target: int, found: list[int]) -> None:
        """Draw a query and the examples found; the target has a frame."""
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


class Demo:
    """Runs the model on the examples, prints the results and draws them on a poster."""

    def __init__(self, model, processor, examples: list[Example], mode: str):
        model.check_processor(processor)
        self.model, self.processor, self.examples, self.mode = model, processor, examples, mode
        self.poster = Poster(examples)
        self.pixels = processor(images=[example.image for example in examples]).pixel_values
        self.pixels = self.pixels.to(model.device, model.dtype)  # [images, 3, S, S]
        self.images = model.embed_image(self.pixels, mode)  # [images, width]

    def embed(self, texts: list[str]) -> torch.Tensor:
        return self.model.embed_text(**self.processor(text=texts).to(self.model.device))

    def heading(self, text: str, more: str = "") -> None:
        print(f"\n{text}{more}")
        self.poster.heading(text)

    def show(self, cells: list[tuple[int, list[tuple[str, str]]]]) -> None:
        for row, lines in cells:
            print(f"  {self.examples[row].names['en']:24} -> " + "; ".join(text for text, _ in lines))
        self.poster.grid(cells, columns=3)

    def classify(self, chosen: list[int]) -> None:
        """Show the three most likely of all names for each chosen image."""
        labels = [example.names["en"] for example in self.examples]
        self.heading(f"Zero-shot classification among {len(labels)} names", f" ({self.mode})")
        texts = self.embed([PHRASES["en"].format(label) for label in labels])
        logits = self.model.logit_scale.exp() * self.images[chosen] @ texts.T  # [chosen, labels]
        top = logits.float().softmax(-1).topk(min(3, len(labels)))
        cells = []
        for row, indices, shares in zip(chosen, top.indices.tolist(), top.values.tolist()):
            colours = [GREEN if labels[index] == labels[row] else GREY for index in indices]
            texts = [f"{labels[index]} {share:.0%}" for index, share in zip(indices, shares)]
            cells.append((row, list(zip(texts, colours))))
        self.show(cells)

    def search(self, targets: list[int]) -> None:
        """Query each target by its name, in the next language each time, and show the five best images."""
        self.heading("Retrieval: the best five images for a query", " (* marks the target)")
        for number, target in enumerate(targets):
            names = self.examples[target].names
            language = [code for code in LANGUAGES if code in names][number % len(names)]
            query = PHRASES[language].format(names[language])
            found = (self.images @ self.embed([query])[0]).topk(min(5, len(self.examples))).indices.tolist()
            print(f"  {query}  ->  " + ", ".join(self.examples[i].names["en"] + "*" * (i == target) for i in found))
            self.poster.ranking(query, target, found)

    def caption(self, chosen: list[int]) -> None:
        """Show a caption of each chosen image in each language."""
        self.heading("Captions")
        cells = [(row, []) for row in chosen]
        for language, prompt in PROMPTS.items():
            inputs = self.processor(text=prompt, task="caption").to(self.model.device)
            ids = self.model.generate(self.pixels[chosen], **inputs, num_beams=3, max_new_tokens=24)
            for (row, lines), text in zip(cells, self.processor.batch_decode(ids, skip_special_tokens=True)):
                is_name = text.strip() == self.examples[row].names.get(language)
                lines.append((text.strip(), GREEN if is_name else INK))
        self.show(cells)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id; by default this repository's tiny checkpoint")
    parser.add_argument("--mode", default="InternVL-G", choices=("InternVL-C", "InternVL-G"))
    parser.add_argument("--pictures", type=Path, default=ROOT / "examples" / "pictures", help="folder of images")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the image to write")
    arguments = parser.parse_args()

    where = {"trust_remote_code": True, "subfolder": "" if arguments.model else "tiny"}
    path = arguments.model or str(ROOT)
    model = AutoModel.from_pretrained(path, dtype="auto", **where).eval()
    if not arguments.model:
        model.float()  # the tiny weights are small, and float32 is faster on most CPUs
    demo = Demo(model, AutoProcessor.from_pretrained(path, **where), read_examples(arguments.pictures), arguments.mode)
    some = list(range(min(12, len(demo.examples))))
    demo.classify(some)
    demo.search(some[:9])
    demo.caption(some)
    demo.poster.save(arguments.out)
    print(f"\nThe same with the images: {arguments.out.resolve()}")


if __name__ == "__main__":
    main()
