"""Draw what the tiny checkpoint makes of held-out pictures, right and wrong: tiny/examples.png, for its card.

Run by whoever retrained tiny/, as the last step of `make tiny`.

    python -m tools.tiny.tiny_figure

The pictures are drawn at random from all 1,400 of Twemoji's, with a fixed seed and before anything is known of them.
Each shows its five nearest names in one language, with their probabilities among all names, and under them the captions
in three languages; what is right is green. Chinese and Japanese letters need `pip install cvttf-notosanscjk-regular`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from examples.demo import GREEN, GREY, INK, LINE, MARGIN, THUMBNAIL, Example, Poster
from tools.tiny.emoji_data import DEFAULT_CACHE, LANGUAGES, load
from tools.tiny.tiny_texts import CAPTION_PROMPTS

ROOT = Path(__file__).resolve().parents[2]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subfolder", default="tiny")
    parser.add_argument("--data", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "tiny" / "examples.png")
    arguments = parser.parse_args()
    where = {"subfolder": arguments.subfolder, "trust_remote_code": True}
    model = AutoModel.from_pretrained(ROOT, dtype=torch.float32, **where).eval()
    processor = AutoProcessor.from_pretrained(ROOT, **where)
    data = load(arguments.data)
    held_out = torch.from_numpy(np.flatnonzero(data.heldout_mask))
    generator = torch.Generator().manual_seed(arguments.seed)
    chosen = held_out[torch.randperm(len(held_out), generator=generator)[: arguments.count]].tolist()

    names_of = [data.concepts[data.concept[row]]["name"] for row in chosen]
    examples = [Example(Image.fromarray(data.rgba[row]), names) for row, names in zip(chosen, names_of)]
    pixels = processor(images=[example.image for example in examples]).pixel_values
    images = model.embed_image(pixels, "InternVL-G")
    nearest: dict[str, list[list[tuple[str, float]]]] = {}
    captions: dict[str, list[str]] = {}
    for language in LANGUAGES:
        names = [concept["name"][language] for concept in data.concepts]
        texts = model.embed_texts(processor(text=names, padding=False, return_tensors=None).input_ids)
        best = (model.logit_scale.exp() * images @ texts.T).softmax(-1).topk(5)
        nearest[language] = [
            [(names[name], value) for name, value in zip(*row)]
            for row in zip(best.indices.tolist(), best.values.tolist())
        ]
        prompt = processor(text=CAPTION_PROMPTS[language], task="caption")
        ids = model.generate(pixels, **prompt, num_beams=3, max_new_tokens=16)
        captions[language] = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]

    poster = Poster(examples, width=1200, height=6000)
    columns = 3
    width = (poster.canvas.width - 2 * MARGIN) // columns
    for start in range(0, len(examples), columns):
        for column, number in enumerate(range(start, min(start + columns, len(examples)))):
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
    poster.save(arguments.out)
    Image.open(arguments.out).quantize(64, dither=Image.Dither.NONE).save(arguments.out, optimize=True)
    print(arguments.out)


if __name__ == "__main__":
    main()
