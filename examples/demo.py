"""See InternVL at work: zero-shot classification, retrieval and captions in three languages, on real images.

    python examples/demo.py                               # the tiny checkpoint of this repository
    python examples/demo.py --model PATH_OR_ID            # another one, such as the published 14B
    python examples/demo.py --pictures FOLDER             # your own images; their file names are the labels

Prints the results, and draws some of them with the images into demo.png (demo_poster.py).
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_poster import Result, drawn
from PIL import Image
from transformers import AutoModel, AutoProcessor

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("en", "zh", "ja")
PHRASES = {"en": "a photo of {}", "zh": "一张{}的照片", "ja": "{}の写真"}
PROMPTS = {"en": "English caption:", "zh": "中文描述:", "ja": "日本語の説明:"}


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


class Demo:
    """Runs the model on the examples and prints what it answers; the results are for the poster."""

    def __init__(self, model, processor, examples: list[Example], mode: str):
        model.check_processor(processor)
        self.model, self.processor, self.examples, self.mode = model, processor, examples, mode
        self.pixels = processor(images=[example.image for example in examples]).pixel_values
        self.pixels = self.pixels.to(model.device, model.dtype)  # [images, 3, S, S]
        self.images = model.embed_image(self.pixels, mode)  # [images, width]

    def embed(self, texts: list[str]) -> torch.Tensor:
        return self.model.embed_text(**self.processor(text=texts).to(self.model.device))

    def result(self, row: int, answers: list, right: list[bool | None], hit: bool, query: str = "") -> Result:
        return Result(self.examples[row].image, self.examples[row].names["en"], query, answers, right, hit)

    def show(self, results: list[Result]) -> list[Result]:
        for result in results:
            print(f"  {result.name:24} -> " + "; ".join(result.answers))
        return results

    def classify(self, chosen: list[int]) -> list[Result]:
        """Show the three most likely of all names for each chosen image."""
        labels = [example.names["en"] for example in self.examples]
        print(f"\nZero-shot classification: each image, and the likeliest of {len(labels)} names ({self.mode})")
        texts = self.embed([PHRASES["en"].format(label) for label in labels])
        logits = self.model.logit_scale.exp() * self.images[chosen] @ texts.T  # [chosen, labels]
        top = logits.float().softmax(-1).topk(min(3, len(labels)))
        results = []
        for row, indices, shares in zip(chosen, top.indices.tolist(), top.values.tolist()):
            texts = [f"{labels[index]} {share:.0%}" for index, share in zip(indices, shares)]
            right = [labels[index] == labels[row] for index in indices]
            results.append(self.result(row, texts, right, right[0]))
        return self.show(results)

    def search(self, targets: list[int]) -> list[Result]:
        """Query each target by its name, in the next language each time, and show the five best images."""
        print("\nRetrieval: each query, and the five images that fit it best (* marks the one it was written for)")
        results = []
        for number, target in enumerate(targets):
            names = self.examples[target].names
            language = [code for code in LANGUAGES if code in names][number % len(names)]
            query = PHRASES[language].format(names[language])
            found = (self.images @ self.embed([query])[0]).topk(min(5, len(self.examples))).indices.tolist()
            print(f"  {query}  ->  " + ", ".join(self.examples[i].names["en"] + "*" * (i == target) for i in found))
            images = [self.examples[i].image for i in found]
            results.append(self.result(target, images, [i == target for i in found], found[0] == target, query))
        return results

    def caption(self, chosen: list[int]) -> list[Result]:
        """Show a caption of each chosen image in each language; one that contains the image's name is right."""
        print("\nCaptions that the model writes in English, Chinese and Japanese")
        results = [self.result(row, [], [], True) for row in chosen]
        for language, prompt in PROMPTS.items():
            inputs = self.processor(text=prompt, task="caption").to(self.model.device)
            ids = self.model.generate(self.pixels[chosen], **inputs, num_beams=3, max_new_tokens=24)
            for row, result, text in zip(chosen, results, self.processor.batch_decode(ids, skip_special_tokens=True)):
                name = self.examples[row].names.get(language)
                right = name.casefold() in text.casefold() if name else None
                result.answers.append(text.strip())
                result.right.append(right)
                result.hit &= right is not False
        return self.show(results)


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
    what = arguments.model or "tiny/, a small InternVL that was trained on emoji and knows nothing else"
    print(f"Loading {what} ...", flush=True)
    model = AutoModel.from_pretrained(path, dtype="auto", **where).eval()
    if not arguments.model:
        model.float()  # the tiny weights are small, and float32 is faster on most CPUs
    demo = Demo(model, AutoProcessor.from_pretrained(path, **where), read_examples(arguments.pictures), arguments.mode)
    some = list(range(min(12, len(demo.examples))))
    named, found, captions = demo.classify(some), demo.search(some[:9]), demo.caption(some)
    drawn(Path(arguments.model or "tiny").name, named, found, captions).save(arguments.out)
    print(f"\nThe same with the images: {arguments.out.resolve()}\n\n{what_next()}")


def what_next() -> str:
    """Commands to try next, for the interpreter and the folder of this run."""
    python, here = os.path.relpath(sys.executable), os.path.relpath(ROOT / "examples")
    python = sys.executable if python.startswith("..") else python
    commands = {
        "make app": "search these images in a browser; PICTURES=FOLDER make app for others",
        f"{python} {here}/finetune.py --help": "train on your own images and captions",
        f"{python} {here}/demo.py --model PATH_OR_ID": "this again with another checkpoint, such as the 14B",
    }
    width = max(map(len, commands))
    return "\n".join(["Next:", *(f"  {command:{width}}  {what}" for command, what in commands.items())])


if __name__ == "__main__":
    main()
