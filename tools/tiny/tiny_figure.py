"""Draw what the tiny checkpoint says about held-out images, right and wrong: tiny/examples.png, for its card.

Run by whoever retrained tiny/, as the last step of `make tiny`.

    python -m tools.tiny.tiny_figure

The images are drawn at random from all 1,400 of Twemoji, with a fixed seed. Each shows its five nearest names in one
language, with their probabilities among all names, and below them the captions in three languages; green is right.
Chinese and Japanese letters need `pip install cvttf-notosanscjk-regular`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from examples.demo import GREEN, GREY, INK, LINE, MARGIN, THUMBNAIL, Example, Poster
from tools import ROOT
from tools.tiny.emoji_data import LANGUAGES, load
from tools.tiny.evaluate_tiny import captions_of, checkpoint_options, embed_texts, load_checkpoint

COUNT, COLUMNS, SEED = 24, 3, 0


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[checkpoint_options()])
    parser.add_argument("--out", type=Path, default=ROOT / "tiny" / "examples.png", help="the file to write")
    options = parser.parse_args()
    model, processor = load_checkpoint(options)
    data = load(options.data)
    held_out = torch.from_numpy(np.flatnonzero(data.heldout_mask))
    generator = torch.Generator().manual_seed(SEED)
    chosen = held_out[torch.randperm(len(held_out), generator=generator)[:COUNT]].tolist()

    names_of = [data.concepts[data.concept[row]]["name"] for row in chosen]
    examples = [Example(Image.fromarray(data.rgba[row]), names) for row, names in zip(chosen, names_of)]
    pixels = processor(images=[example.image for example in examples]).pixel_values
    images = model.embed_image(pixels, "InternVL-G")
    nearest: dict[str, list[list[tuple[str, float]]]] = {}
    for language in LANGUAGES:
        names = [concept["name"][language] for concept in data.concepts]
        best = (model.logit_scale.exp() * images @ embed_texts(model, processor, names).T).softmax(-1).topk(5)
        nearest[language] = [
            [(names[name], value) for name, value in zip(*row)]
            for row in zip(best.indices.tolist(), best.values.tolist())
        ]
    captions = {language: captions_of(model, processor, pixels, language) for language in LANGUAGES}

    poster = Poster(examples, width=1200, height=6000)
    width = (poster.canvas.width - 2 * MARGIN) // COLUMNS
    for start in range(0, len(examples), COLUMNS):
        for column, number in enumerate(range(start, min(start + COLUMNS, len(examples)))):
            names, language = examples[number].names, LANGUAGES[number % len(LANGUAGES)]
            lines = [
                (f"{name[:28]}  {value:.0%}", GREEN if name == names[language] else GREY)
                for name, value in nearest[language][number]
            ]
            lines += [
                (f"“{captions[code][number][:28]}”", GREEN if captions[code][number] == names[code] else INK)
                for code in LANGUAGES
            ]
            poster.thumbnail(number, MARGIN + column * width)
            poster.lines(MARGIN + column * width + THUMBNAIL + 12, lines)
        poster.y += 8 * LINE + 24
    poster.save(options.out)
    Image.open(options.out).quantize(64, dither=Image.Dither.NONE).save(options.out, optimize=True)
    print(options.out)


if __name__ == "__main__":
    main()
