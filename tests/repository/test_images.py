"""Every image of a page has an alternative text, and the drawing of the architecture has the sizes of the config."""

import json
import re
import subprocess
from xml.etree import ElementTree

import pytest

from conftest import ROOT
from tools import architecture_svg

FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
ALT = re.compile(r"""\balt=(["'])(.*?)\1""")


def images(page: str) -> list[tuple[str, str]]:
    """Alternative text and address of each image of a Markdown page, outside its code."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page))
    tags = re.findall(r"<img\b[^>]*>", prose)
    found = [
        (alt[2] if (alt := ALT.search(tag)) else "", re.search(r"""\bsrc=["']?([^"'\s>]+)""", tag)[1]) for tag in tags
    ]
    return re.findall(r"!\[([^\]]*)\]\(([^)\s]+)", prose) + found


def test_every_image_has_an_alternative_text_and_a_file():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    pages = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    found = {(page, *image) for page in pages for image in images((ROOT / page).read_text("utf-8"))}
    assert {page for page, _, _ in found} >= {"README.md", "tiny/README.md", "benchmarks/RESULTS.md"}
    assert not [image for image in found if len(image[1].split()) < 3]
    assert not [
        (page, file)
        for page, _, file in found
        if "://" not in file and not (ROOT / page).parent.joinpath(file).is_file()
    ]


def test_the_parser_of_images():
    page = '![a\nb](x.png "title") `![](y.png)` ![](z.svg)\n<img src="v.png" alt="c d"> <img src=w.png>\n'
    page += "```\n![](u.png)\n```\n"
    assert images(page) == [("a\nb", "x.png"), ("", "z.svg"), ("c d", "v.png"), ("", "w.png")]


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((ROOT / "config.json").read_text("utf-8"))


def test_the_drawing_of_the_architecture_has_the_sizes_of_the_config(config):
    assert architecture_svg.DRAWING.read_text("utf-8") == architecture_svg.drawing(config)
    config["vision_config"] |= {"image_size": 42, "num_hidden_layers": 7}
    config["qllama_config"] |= {"hidden_size": 123}
    texts = " ".join(ElementTree.fromstring(architecture_svg.drawing(config)).itertext())
    assert all(words in texts for words in ("42 x 42 pixels", "9 patches", "7 layers", "32 layers, width 123"))


def test_the_drawing_needs_nothing_else_and_is_read_aloud():
    tree = ElementTree.parse(architecture_svg.DRAWING).getroot()
    assert [len(tree.findtext(f"{{http://www.w3.org/2000/svg}}{name}").split()) > 3 for name in ("title", "desc")] == [
        True
    ] * 2
    assert not re.search(r"href|@import|url\((?!#)", architecture_svg.DRAWING.read_text("utf-8"))
