"""Draw what examples/demo.py found as a strip of panels; tools/tiny/tiny_figure.py imports `Sheet`."""

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

INK, GREY, GREEN, RED = "#1b1b1b", "#6e6e6e", "#1a7f37", "#b42318"
# In pixels. A phone shows the strip at a third of its size, so its main words are large.
WIDTH, HEIGHT, MARGIN, GAP = 1200, 500, 24, 30
HEADING, WORDS, SMALL = 33, 30, 23
TOP, ROW, ROWS = 80, 124, 3


@dataclass
class Result:
    """What the model answered to one image or query.

    `answers` are texts, or the images that a query found. `right` says of each whether it is right, or None where the
    right one is unknown. `hit` counts the result as a whole.
    """

    image: Image.Image
    name: str
    query: str
    answers: Sequence[str] | Sequence[Image.Image]
    right: Sequence[bool | None]
    hit: bool


def load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font with Chinese and Japanese glyphs if its package is installed, otherwise Pillow's own."""
    package = importlib.util.find_spec("cvttf_NotoSansCJK_Regular")
    if package is None or package.origin is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(Path(package.origin).with_name("NotoSansCJKtc-Regular.otf"), size)


class Sheet:
    """A white image for texts and thumbnails, which are placed by their upper left corners."""

    def __init__(self, width: int, height: int):
        self.canvas = Image.new("RGB", (width, height), "white")
        self.draw = ImageDraw.Draw(self.canvas)
        self.fonts: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}

    def text(self, x: float, y: float, text: str, size: int, colour: str, width: float) -> None:
        """Write one line; a text wider than `width` is made smaller, down to 60 %, and then cut."""
        for fitting in range(size, size * 6 // 10 - 1, -1):
            font = self.fonts.setdefault(fitting, load_font(fitting))
            if font.getlength(text) <= width:
                break
        while font.getlength(text) > width:
            text = text.rstrip("…")[:-1] + "…"
        self.draw.text((x, y + size), text, colour, font=font, anchor="ls")

    def thumbnail(self, x: float, y: float, image: Image.Image, size: int, frame: str = "") -> None:
        """Paste the image into the middle of a square, with a frame in this colour."""
        small = image.convert("RGBA")
        small.thumbnail((size, size), Image.Resampling.LANCZOS)
        self.canvas.paste(small, (round(x + (size - small.width) / 2), round(y + (size - small.height) / 2)), small)
        if frame:
            self.draw.rectangle((x - 5, y - 5, x + size + 4, y + size + 4), outline=frame, width=4)


def hits_first(results: Iterable[Result]) -> list[Result]:
    return sorted(results, key=lambda result: not result.hit)


class Poster:
    """Panels side by side, each with a heading and three rows; the rows are hits where there are enough of them."""

    def __init__(self, panels: int):
        self.sheet = Sheet(WIDTH, HEIGHT)
        self.width = (WIDTH - 2 * MARGIN - (panels - 1) * GAP) / panels
        self.x = MARGIN - self.width - GAP

    def panel(self, heading: str) -> None:
        """Begin the next panel."""
        self.x += self.width + GAP
        self.sheet.text(self.x, 10, heading, HEADING, INK, self.width)
        self.sheet.draw.line((self.x, TOP - 20, self.x + self.width, TOP - 20), GREY)

    def beside(self, row: int, image: Image.Image, lines: Iterable[tuple[str, str, int]]) -> None:
        """Draw an image and, on its right, lines of text with a colour and a size each."""
        y, size = TOP + row * ROW, ROW - 18
        self.sheet.thumbnail(self.x, y, image, size)
        for text, colour, height in lines:
            self.sheet.text(self.x + size + 16, y - 8, text, height, colour, self.width - size - 16)
            y += round(1.25 * height)

    def classified(self, results: list[Result]) -> None:
        for row, result in enumerate(hits_first(results)[:ROWS]):
            colours = (GREEN if right else GREY for right in result.right)
            self.beside(row, result.image, zip(result.answers, colours, (WORDS, SMALL, SMALL)))

    def retrieved(self, results: list[Result]) -> None:
        """Queries take three languages in turn, so each row has its own."""
        size, step = ROW - WORDS - 27, ROW - WORDS - 5
        for row in range(min(ROWS, len(results))):
            result, y = hits_first(results[row::ROWS])[0], TOP + row * ROW
            self.sheet.text(self.x, y - 14, result.query, WORDS, INK, self.width)
            for place in range(min(len(result.answers), int(self.width // step))):
                frame = GREEN if result.right[place] else ""
                self.sheet.thumbnail(self.x + 5 + place * step, y + WORDS + 1, result.answers[place], size, frame)

    def captioned(self, results: list[Result]) -> None:
        """The last row is the first image with a wrong caption."""
        rows = hits_first(results)[:ROWS]
        misses = [result for result in results if not result.hit]
        if misses and all(result.hit for result in rows):
            rows[-1] = misses[0]
        for row, result in enumerate(rows):
            size = WORDS - 2 if result.hit else SMALL
            lines = [
                (text, INK if right is None else GREEN if right else RED, size)
                for text, right in zip(result.answers, result.right)
            ]
            miss = [] if result.hit else [(f"Miss. Right name: {result.name}", INK, SMALL)]
            self.beside(row, result.image, miss + lines)

    def footer(self, text: str) -> None:
        self.sheet.text(MARGIN, HEIGHT - 46, text, SMALL, GREY, WIDTH - 2 * MARGIN)


def drawn(title: str, named: list[Result], found: list[Result], captions: list[Result]) -> Image.Image:
    """The strip, and below it how many of all answers are right, since it shows hits first."""
    poster = Poster(panels=3)
    poster.panel("Zero-shot classification")
    poster.classified(named)
    poster.panel("Retrieval by words")
    poster.retrieved(found)
    poster.panel("Captions")
    poster.captioned(captions)
    known = [right for result in captions for right in result.right if right is not None]
    shares = (
        f"{sum(result.hit for result in named)} of {len(named)} names",
        f"{sum(result.hit for result in found)} of {len(found)} searches",
        f"{sum(known)} of {len(known)} captions",
    )
    miss = "" if all(known) else ", then a wrong caption"
    poster.footer(f"{title}: right answers first{miss}. Right in all: {', '.join(shares)}.")
    return poster.sheet.canvas
