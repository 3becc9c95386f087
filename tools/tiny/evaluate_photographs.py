"""Measure the tiny checkpoint on photographs, which it has never seen the like of, and write what was measured.

Run by hand by whoever retrained tiny/: it downloads 160 MB, so `make tiny` leaves it out.

    python -m tools.tiny.evaluate_photographs   # prints a table; writes it to tiny/README.md, and tiny/photographs.json

The photographs are the stamps of Tux Paint: things cut out of photographs, each with a caption in many languages. They
come from Debian's package `tuxpaint-stamps-default`, which `apt-get download` fetches into `.cache/` (160 MB; on Debian
or Ubuntu, after `apt-get update`). None of it is in this repository. Drawings ("cartoon"), symbols and flags are left
out, and so is what lacks a caption in English, Chinese or Japanese.

* caption R@1, R@10: the photograph's own caption is the nearest, or among the ten nearest, of the captions of all;
* name R@1, R@10: for the photographs whose English caption is an emoji's name, give or take an article: that name among
  the names of all emoji. In Chinese and Japanese it is the emoji's name in that language, whatever the caption says.
"""

import argparse
import json
import platform
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import transformers
from PIL import Image
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

from tools.pages import put, table
from tools.tiny.emoji_data import DEFAULT_CACHE, LANGUAGES, load

ROOT = Path(__file__).resolve().parents[2]


RESULTS = ROOT / "tiny" / "photographs.json"
CARD = ROOT / "tiny" / "README.md"
PACKAGE = "tuxpaint-stamps-default"
STAMPS = ROOT / ".cache" / PACKAGE
LOCALES = {"zh": "zh_CN.utf8=", "ja": "ja.utf8="}
NO_PHOTOGRAPHS = ("cartoon", "symbols", "flags", "roadsigns")
FIGURES = (
    ("caption", "photographs", "{photographs} photographs, own caption among as many"),
    ("name", "names", "{named} photographs of what an emoji shows, own name among {names:,}"),
)
MODES = ("InternVL-C", "InternVL-G")


def fetch(folder: Path) -> Path:
    """Return the folder of the unpacked package, which is downloaded first if it is not there yet."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            try:
                subprocess.run(["apt-get", "download", PACKAGE], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
                (package,) = Path(scratch).glob("*.deb")
                subprocess.run(["dpkg-deb", "--extract", package, Path(scratch) / "unpacked"], check=True)
            except (FileNotFoundError, subprocess.CalledProcessError) as error:
                raise SystemExit(f"{PACKAGE} could not be fetched by apt-get and dpkg-deb: {error}") from None
            (Path(scratch) / "unpacked").rename(folder)  # only now does the package look fetched
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
    """The whole picture on white, as an emoji has it: the processor would cut off what is not in the middle."""
    picture = Image.open(path).convert("RGBA")
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas.convert("RGB")


def recall(similarity: torch.Tensor, own: torch.Tensor, shortlist: int) -> float:
    nearest = similarity.topk(shortlist, dim=1).indices
    return float((nearest == own[:, None]).any(1).float().mean())


@torch.inference_mode()
def evaluate(model, processor, photographs: list[tuple[Path, dict[str, str]]], concepts: list[dict]) -> dict:
    number_of = {concept["name"]["en"].lower(): number for number, concept in enumerate(concepts)}
    named = [number_of.get(plain(captions["en"]), -1) for _, captions in photographs]
    known = torch.tensor([place for place, number in enumerate(named) if number >= 0])
    names = torch.tensor([number for number in named if number >= 0])
    pictures = [squared(path) for path, _ in tqdm(photographs, "photographs")]
    batches = [processor(images=pictures[at : at + 50]).pixel_values for at in range(0, len(pictures), 50)]
    images = {mode: torch.cat([model.embed_image(pixels, mode) for pixels in batches]) for mode in MODES}

    def embed(texts: list[str]) -> torch.Tensor:
        return model.embed_texts(processor(text=texts, padding=False, return_tensors=None).input_ids)

    results: dict = {"photographs": len(photographs), "named": len(known), "names": len(concepts)}
    for language in LANGUAGES:
        captions = embed([captions[language] for _, captions in photographs])
        all_names = embed([concept["name"][language] for concept in concepts])
        results[language] = {}
        for mode in MODES:
            own = torch.arange(len(photographs))
            results[language][mode] = {
                "caption_r1": recall(images[mode] @ captions.T, own, 1),
                "caption_r10": recall(images[mode] @ captions.T, own, 10),
                "name_r1": recall(images[mode][known] @ all_names.T, names, 1),
                "name_r10": recall(images[mode][known] @ all_names.T, names, 10),
            }
    return results


def figures_table(results: dict) -> str:
    rows = []
    for mode in MODES:
        for key, among, title in FIGURES:
            for shortlist in (1, 10):
                values = [results[language][mode][f"{key}_r{shortlist}"] for language in LANGUAGES]
                chance = shortlist / results[among]
                cells = [f"{value:.3f}" for value in [*values, chance]]
                rows.append([f"{title.format(**results)}, R@{shortlist}, {mode}", *cells])
    how = results["measured_with"]
    versions = f"torch {how['torch']}, transformers {how['transformers']}"
    measured = f"Measured by `{how['command']}` on {how['machine']}, {versions}, float32 from bfloat16 weights."
    return f"{table(['photographs (Tux Paint)', *LANGUAGES, 'by chance'], rows)}\n\n{measured}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT))
    parser.add_argument("--subfolder", default="tiny")
    parser.add_argument("--data", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--stamps", type=Path, default=STAMPS, help="where the photographs are, or go to")
    arguments = parser.parse_args()
    where = {"subfolder": arguments.subfolder, "trust_remote_code": True}
    model = AutoModel.from_pretrained(arguments.model, dtype=torch.float32, **where).eval()
    processor = AutoProcessor.from_pretrained(arguments.model, **where)
    photographs = find_photographs(fetch(arguments.stamps))
    results = evaluate(model, processor, photographs, load(arguments.data).concepts)
    results["measured_with"] = {
        "command": "python -m tools.tiny.evaluate_photographs",
        "machine": f"a CPU ({platform.machine()})",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    put(CARD, "photographs", figures_table(results))
    print(figures_table(results))


if __name__ == "__main__":
    main()
