"""Write the README's table of published accuracy: the 14B beside other models, with the source of every figure.

Run by whoever changes published.json. It measures nothing: a figure that nobody could read in a source is not there.

    python -m benchmarks.published             # writes the table
    python -m benchmarks.published --check     # exits with 1 if README.md has another table
"""

import argparse
import json
import sys

from tools import ROOT
from tools.pages import put, table, taken

README = ROOT / "README.md"
PUBLISHED = ROOT / "benchmarks" / "published.json"
# The images' sides in pixels are those of the checkpoints that the sources name.
MODELS = {
    "InternVL-C": "InternVL-C, 224 px (another file)",
    "InternVL-G": "InternVL-G, 224 px",
    "CLIP ViT-L/14-336": "CLIP ViT-L/14, 336 px",
    "EVA-CLIP-18B": "EVA-CLIP-18B, 224 px",
    "SigLIP 2 so400m/14": "SigLIP 2 so400m/14, 384 px",
}
TO_IMAGE, TO_TEXT = "image_retrieval_recall@1", "text_retrieval_recall@1"
ROWS = {
    "ImageNet-1K": ("imagenet1k", "acc1"),
    "ImageNet-V2": ("imagenetv2", "acc1"),
    "ImageNet-A": ("imagenet-a", "acc1"),
    "ImageNet-R": ("imagenet-r", "acc1"),
    "ImageNet-Sketch": ("imagenet_sketch", "acc1"),
    "ObjectNet": ("objectnet", "acc1"),
    "Flickr30K, text to image, R@1": ("flickr30k", TO_IMAGE),
    "Flickr30K, image to text, R@1": ("flickr30k", TO_TEXT),
    "COCO, text to image, R@1": ("mscoco_captions", TO_IMAGE),
    "COCO, image to text, R@1": ("mscoco_captions", TO_TEXT),
    "Flickr30K and COCO, mean of R@1, R@5 and R@10": ("flickr30k and mscoco_captions", "mean_recall"),
}
NOTE = (
    "Zero-shot, English, in per cent; – means that we found no source. We measured none of these figures.\n\n"
    "**The column InternVL-C is not about this checkpoint**: the authors measured it with their file"
    " `internvl_c_13b_224px.pth`."
)


def figures(known: dict) -> dict[tuple[str, str, str], tuple[float, str]]:
    """(data set, metric, model) -> (figure, name of its source), English only."""
    entries = [(entry.get("model") or entry["mode"], entry) for entry in known["results"] + known["comparison"]]
    return {
        (entry["dataset"], metric, model): (figure, entry["source"])
        for model, entry in entries
        if entry["language"] == "en"
        for metric, figure in entry["metrics"].items()
    }


def published_table() -> str:
    """The table with its sources."""
    known = json.loads(PUBLISHED.read_text("utf-8"))
    found, numbers = figures(known), {}
    rows = []
    for title, test in ROWS.items():
        cells = []
        for model in MODELS:
            figure, source = found.get((*test, model), (None, None))
            if figure is not None:
                number = numbers.setdefault(source, len(numbers) + 1)
                cells.append(f"{100 * figure:.1f}<sup>{number}</sup>")
            else:
                cells.append("–")
        rows.append((title, *cells))
    sources = "\n".join(f"{number}. {known['sources'][name]['link']}" for name, number in numbers.items())
    return f"{table(('', *MODELS.values()), rows)}\n\n{NOTE}\n\nSources:\n\n{sources}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if README.md has another table")
    if not parser.parse_args().check:
        put(README, "published", published_table())
    elif taken(README, "published") != published_table():
        sys.exit("README.md has another table: run `python -m benchmarks.published`.")


if __name__ == "__main__":
    main()
