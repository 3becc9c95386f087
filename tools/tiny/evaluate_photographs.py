"""Measure the tiny checkpoint on photographs, although it was trained on none, and write the results.

Run by hand by whoever retrained tiny/: it downloads 160 MB, so `make tiny` leaves it out.

    python -m tools.tiny.evaluate_photographs   # prints a table; writes it to tiny/README.md, and tiny/photographs.json

The photographs are the stamps of Tux Paint: things cut out of photographs, each with a caption in many languages. They
come from Debian's package `tuxpaint-stamps-default`, which `apt-get download` fetches into `.cache/` (on Debian or
Ubuntu, after `apt-get update`). This repository contains none of them. Drawings ("cartoon"), symbols, flags and
whatever lacks a caption in English, Chinese or Japanese are skipped.

* caption R@1, R@10: the photograph's own caption is the nearest, or among the ten nearest, of the captions of all;
* name R@1, R@10: for the photographs whose English caption is an emoji's name, give or take an article: that name among
  the names of all emoji. In Chinese and Japanese it is the emoji's name in that language, whatever the caption says.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from tools import ROOT
from tools.pages import put, table
from tools.tiny import evaluate_tiny as tiny
from tools.tiny.emoji_data import LANGUAGES, load

CARD = ROOT / "tiny" / "README.md"
PACKAGE = "tuxpaint-stamps-default"
STAMPS = ROOT / ".cache" / PACKAGE
LOCALES = {"zh": "zh_CN.utf8=", "ja": "ja.utf8="}
NO_PHOTOGRAPHS = ("cartoon", "symbols", "flags", "roadsigns")
FIGURES = (
    ("caption", "photographs", "{photographs} photographs, own caption among as many"),
    ("name", "names", "{named} photographs of what an emoji shows, own name among {names:,}"),
)


def fetch(folder: Path) -> Path:
    """Return the folder of the unpacked package; download it if it is not there yet."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            try:
                subprocess.run(["apt-get", "download", PACKAGE], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
                (package,) = Path(scratch).glob("*.deb")
                subprocess.run(["dpkg-deb", "--extract", package, Path(scratch) / "unpacked"], check=True)
            except (FileNotFoundError, subprocess.CalledProcessError) as error:
                raise SystemExit(f"{PACKAGE} could not be fetched by apt-get and dpkg-deb: {error}") from None
            (Path(scratch) / "unpacked").rename(folder)  # the folder appears only once it is complete
    return folder


def read_captions(path: Path) -> dict[str, str]:
    """Return the captions of a stamp: the first line is English, the others begin with their locale."""
    lines = path.read_text("utf-8").splitlines()
    captions = {"en": lines[0].strip()} if lines and lines[0].strip() else {}
    for language, start in LOCALES.items():
        captions[language] = next((line[len(start) :].strip() for line in lines if line.startswith(start)), "")
    return {language: caption for language, caption in captions.items() if caption}


def find_photographs(folder: Path) -> list[tuple[Path, dict[str, str]]]:
    """Return the photographs that have a caption in every language, one for each English caption, in a fixed order."""
    found = {}
    for path in sorted(folder.rglob("*.png")):
        text = path.with_suffix(".txt")
        if text.is_file() and not any(word in str(path.relative_to(folder)) for word in NO_PHOTOGRAPHS):
            captions = read_captions(text)
            if set(captions) == set(LANGUAGES):
                found.setdefault(captions["en"], (path, captions))
    return list(found.values())


def plain(caption: str) -> str:
    """'A red apple.' -> 'red apple'"""
    return re.sub("^(an?|the) ", "", caption.lower().strip(" .!"))


def squared(path: Path) -> Image.Image:
    """The whole image on a white square, as emoji have it: the processor would crop it to the middle."""
    image = Image.open(path).convert("RGBA")
    side, white = max(image.size), Image.new("RGBA", image.size, "white")
    return ImageOps.pad(Image.alpha_composite(white, image), (side, side), color="white").convert("RGB")


@torch.inference_mode()
def evaluate(model: Any, processor: Any, photographs: list[tuple[Path, dict[str, str]]], concepts: list[dict]) -> dict:
    number_of = {concept["name"]["en"].lower(): number for number, concept in enumerate(concepts)}
    numbers = torch.tensor([number_of.get(plain(captions["en"]), -1) for _, captions in photographs])
    known = torch.nonzero(numbers >= 0).flatten()
    names = numbers[known]
    pixels = processor(images=[squared(path) for path, _ in tqdm(photographs, "photographs")]).pixel_values
    images = tiny.embed_images(model, pixels)
    results: dict = {"photographs": len(photographs), "named": len(known), "names": len(concepts)}
    for language in LANGUAGES:
        captions = tiny.embed_texts(model, processor, [captions[language] for _, captions in photographs])
        all_names = tiny.embed_texts(model, processor, [concept["name"][language] for concept in concepts])
        results[language] = {}
        for mode, embeds in images.items():
            own, named = (embeds @ captions.T, torch.arange(len(photographs))), (embeds[known] @ all_names.T, names)
            results[language][mode] = {
                "caption_r1": tiny.recall(*own, 1),
                "caption_r10": tiny.recall(*own, 10),
                "name_r1": tiny.recall(*named, 1),
                "name_r10": tiny.recall(*named, 10),
            }
    return results


def figures_table(results: dict) -> str:
    rows = []
    for mode in tiny.MODES:
        for key, among, title in FIGURES:
            for shortlist in (1, 10):
                values = [results[language][mode][f"{key}_r{shortlist}"] for language in LANGUAGES]
                chance = shortlist / results[among]
                cells = [f"{value:.3f}" for value in [*values, chance]]
                rows.append([f"{title.format(**results)}, R@{shortlist}, {mode}", *cells])
    found = table(["photographs (Tux Paint)", *LANGUAGES, "by chance"], rows)
    return f"{found}\n\n{tiny.measured_by(results['measured_with'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[tiny.checkpoint_options()])
    parser.add_argument("--stamps", type=Path, default=STAMPS, help="folder of the photographs; downloaded if missing")
    options = parser.parse_args()
    photographs = find_photographs(fetch(options.stamps))
    results = evaluate(*tiny.load_checkpoint(options), photographs, load(options.data).concepts)
    results["measured_with"] = tiny.measured_with("evaluate_photographs")
    (ROOT / options.subfolder / "photographs.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    if options.subfolder == "tiny":
        put(CARD, "photographs", figures_table(results))
    print(figures_table(results))


if __name__ == "__main__":
    main()
