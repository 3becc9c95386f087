"""Draw what the tiny checkpoint says about held-out images, right and wrong: tiny/examples.png, for its card.

Run by whoever retrained tiny/, as the last step of `make tiny`.

    python -m tools.tiny.tiny_figure

The images are drawn at random from all of the held-out artist, with a fixed seed. Each shows its nearest names in the
language of its column, with their probabilities among all names, and captions in three languages.
Chinese and Japanese letters need `pip install cvttf-notosanscjk-regular`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from examples.demo_poster import GREEN, GREY, INK, MARGIN, Sheet
from tools import ROOT
from tools.tiny.emoji_data import LANGUAGES, load
from tools.tiny.evaluate_tiny import captions_of, checkpoint_options, embed_texts, load_checkpoint

COUNT, NEAREST, SEED = 24, 3, 0
COLUMNS = {"en": "English", "zh": "Chinese", "ja": "Japanese"}
# In pixels.
WIDTH, THUMBNAIL, FONT, LINE, TOP = 400, 96, 22, 28, 200


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
    drawn = [Image.fromarray(data.rgba[row]) for row in chosen]
    pixels = processor(images=drawn).pixel_values
    images = model.embed_image(pixels, "InternVL-G")
    nearest: dict[str, list[list[tuple[str, float]]]] = {}
    for language in LANGUAGES:
        names = [concept["name"][language] for concept in data.concepts]
        best = (model.logit_scale.exp() * images @ embed_texts(model, processor, names).T).softmax(-1).topk(NEAREST)
        nearest[language] = [
            [(names[name], value) for name, value in zip(*row)]
            for row in zip(best.indices.tolist(), best.values.tolist())
        ]
    captions = {language: captions_of(model, processor, pixels, language) for language in LANGUAGES}

    height = LINE * (NEAREST + len(LANGUAGES)) + 34
    sheet = Sheet(len(LANGUAGES) * WIDTH + MARGIN, TOP + -(-COUNT // len(LANGUAGES)) * height)
    legend = (
        f"{COUNT} images drawn at random from {len(held_out):,} by an artist whom training never saw. Green: right.",
        f"Percentages: the {NEAREST} nearest of {len(data.concepts):,} names, with their probabilities (InternVL-G).",
        "en, zh, ja: captions in English, Chinese and Japanese.",
    )
    for number, text in enumerate(legend):
        sheet.text(MARGIN, 8 + number * 36, text, FONT + 3, INK, sheet.canvas.width - 2 * MARGIN)
    for number, (image, names) in enumerate(zip(drawn, names_of)):
        row, column = divmod(number, len(LANGUAGES))
        x, y, language = MARGIN + column * WIDTH, TOP + row * height, LANGUAGES[column]
        if row == 0:
            sheet.text(x, y - 60, f"Nearest names in {COLUMNS[language]}", FONT + 3, INK, WIDTH - MARGIN)
            sheet.draw.line((x, y - 18, x + WIDTH - MARGIN, y - 18), GREY)
        sheet.thumbnail(x, y, image, THUMBNAIL)
        lines = [(f"{value:.0%}", name, name == names[language]) for name, value in nearest[language][number]]
        lines += [(code, captions[code][number], captions[code][number] == names[code]) for code in LANGUAGES]
        left, y = x + THUMBNAIL + 14, y - 6
        for place, (label, text, right) in enumerate(lines):
            gap = 8 if place >= NEAREST else 0
            sheet.text(left, y + place * LINE + gap + 3, label, FONT - 4, GREY, 50)
            sheet.text(left + 54, y + place * LINE + gap, text, FONT, GREEN if right else INK, WIDTH - THUMBNAIL - 88)
    sheet.canvas.quantize(64, dither=Image.Dither.NONE).save(options.out, optimize=True)
    print(options.out)


if __name__ == "__main__":
    main()
