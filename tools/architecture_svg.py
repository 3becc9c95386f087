"""Draw the architecture with the sizes of config.json: docs/architecture.svg.

Run by whoever changes these sizes or the drawing; a test compares the file with the code.

    python -m tools.architecture_svg
"""

import json
from html import escape

from tools import ROOT

DRAWING = ROOT / "docs" / "architecture.svg"
COLUMN, GAP, MARGIN, WIDTH, HEIGHT = 180, 20, 20, 1020, 720
# An image inside a page knows nothing of the page's dark mode, so the drawing has a light ground of its own.
STYLE = """\
text { font-family: system-ui, -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: #1b1b1b; }
.title { font-size: 21px; font-weight: 600; } .detail { font-size: 18px; }
.box { stroke: #57606a; stroke-width: 1.5; } .input { fill: #f1f3f5; } .vision { fill: #ffe8cc; }
.language { fill: #d3e8ff; } .part { fill: #ebf4ff; } .head { fill: #ffffff; } .output { fill: #d3f2dc; }
.arrow { stroke: #57606a; stroke-width: 2; fill: none; marker-end: url(#tip); }"""
COSINE = "Zero-shot classification and retrieval: cosine of the text embedding with InternVL-C or InternVL-G"
DESCRIPTION = (
    "InternViT encodes the patches of an image. An attention pool over its tokens gives the embedding InternVL-C. "
    "In QLLaMA, learnable queries cross-attend to these tokens. A second attention pool, over the queries, plus the "
    "first one gives the embedding InternVL-G. itm_head reads the queries and says whether image and text match. "
    "QLLaMA also reads text: its last token gives the text embedding, and lm_head writes captions token by token."
)


def left(column: float) -> float:
    return MARGIN + column * (COLUMN + GAP)


def middle(column: float) -> float:
    return left(column) + COLUMN / 2


def text(kind: str, x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def box(kind: str, column: float, columns: float, y: int, height: int, words: str) -> str:
    """A box over some columns; the first line of its words is its title."""
    x, width = left(column), columns * (COLUMN + GAP) - GAP
    title, *details = words.split("\n")
    first = y + height / 2 - 12 * len(details) + 7
    lines = [text("detail", x + width / 2, first + 24 * (1 + row), line) for row, line in enumerate(details)]
    shape = f'<rect class="box {kind}" x="{x:g}" y="{y}" width="{width:g}" height="{height}" rx="8"/>'
    return "\n".join((shape, text("title", x + width / 2, first, title), *lines))


def arrow(*points: tuple[float, float]) -> str:
    return f'<path class="arrow" d="M {" L ".join(f"{x:g} {y:g}" for x, y in points)}"/>'


def drawing(config: dict) -> str:
    vision, language = config["vision_config"], config["qllama_config"]
    side, patch, every = vision["image_size"], vision["patch_size"], config["cross_attention_frequency"]
    tower = f"{vision['num_hidden_layers']} layers\nwidth {vision['hidden_size']}"
    patches = f"{(side // patch) ** 2} patches\nof {patch} x {patch}\n+ class token"
    width = f"{config['clip_embed_dim']} numbers"
    attention = "attend to earlier tokens;\nfor captions also to the queries;\n"
    parts = [
        box("input", 0, 1, 20, 84, f"Image\n{side} x {side} pixels"),
        box("input", 1, 2, 20, 84, f"{config['num_query_token']} learnable queries"),
        box("input", 3, 2, 20, 84, "Text"),
        box("vision", 0, 1, 150, 250, f"InternViT-6B\n{tower}\n\n{patches}"),
        box("language", 1, 4, 150, 250, ""),
        text(
            "title",
            middle(2.5),
            184,
            f"QLLaMA: {language['num_hidden_layers']} layers, width {language['hidden_size']}",
        ),
        box(
            "part", 1.08, 1.88, 204, 176, f"Queries\ncross-attend to the image\nin layers 0, {every}, {2 * every}, ..."
        ),
        box(
            "part",
            3.04,
            1.88,
            204,
            176,
            f"Text tokens\n{attention}for matching, queries and text\nall attend to each other",
        ),
        box("head", 0, 1, 448, 64, "Attention pool\nclip_projector"),
        box("head", 1, 1, 448, 64, "Attention pool\nclip_projector2"),
        box("head", 2, 1, 448, 64, "Match logits\nitm_head"),
        box("head", 3, 1, 448, 64, "Last token\ntext_projection"),
        box("head", 4, 1, 448, 64, "Next token\nlm_head"),
        box("output", 0, 1, 580, 90, f"InternVL-C\nimage embedding\n{width}"),
        box("output", 1, 1, 580, 90, f"InternVL-G\nimage embedding\n{width}"),
        box("output", 2, 1, 580, 90, "Match\ndoes the text\nfit the image?"),
        box("output", 3, 1, 580, 90, f"Text\ntext embedding\n{width}"),
        box("output", 4, 1, 580, 90, "Caption\ntoken by token"),
        arrow((middle(0), 104), (middle(0), 148)),
        arrow((middle(1.5), 104), (middle(1.5), 202)),
        arrow((middle(3.5), 104), (middle(3.5), 202)),
        arrow((left(1) - GAP, 292), (left(1.08), 292)),
        *(arrow((middle(column), 400), (middle(column), 446)) for column in range(5)),
        *(arrow((middle(column), 512), (middle(column), 578)) for column in range(5)),
        arrow((middle(0), 546), (middle(1) - 14, 546)),
        f'<circle class="box head" cx="{middle(1):g}" cy="546" r="13"/>',
        text("title", middle(1), 553, "+"),
        text("detail", middle(1) + 22, 552, "unit vectors", anchor="start"),
        text("detail", WIDTH / 2, 702, COSINE),
    ]
    return "\n".join((
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="title description">',
        '<title id="title">The architecture of InternVL-14B</title>',
        f'<desc id="description">{escape(DESCRIPTION)}</desc>',
        f"<style>\n{STYLE}\n</style>",
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M 0 0 L 8 4 L 0 8 z" fill="#57606a"/></marker>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="#ffffff"/>',
        *parts,
        "</svg>\n",
    ))  # fmt: skip


def main() -> None:
    DRAWING.write_text(drawing(json.loads((ROOT / "config.json").read_text("utf-8"))), "utf-8")
    print(DRAWING)


if __name__ == "__main__":
    main()
