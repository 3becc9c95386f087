"""Build the demonstration data: emoji artwork, named in English, Chinese and Japanese.

Run by whoever retrains tiny/, as the first step of `make tiny`.

    python -m tools.tiny.emoji_data                                     # build the dataset in .cache/emoji
    python -m tools.tiny.emoji_data --examples examples/pictures --count 36   # also write some held-out pictures

A *concept* is one emoji: a name and keywords in three languages (Unicode CLDR), and its picture in up to eleven sets of
artwork. Ten of them are for training. The other, Twemoji, is held out, so a model can be asked about things it knows,
drawn by a hand it has never seen.

    set                 artist      licence            set            artist      licence
    noto                Google      Apache-2.0         fxemoji        Mozilla     Apache-2.0
    noto-v1             Google      Apache-2.0         emojione       EmojiOne    CC-BY-4.0
    fluent-emoji-flat   Microsoft   MIT                emojione-v1    EmojiOne    CC-BY-SA-4.0
    fluent-emoji        Microsoft   MIT                openmoji       OpenMoji    CC-BY-SA-4.0
    fluent-emoji-3d     Microsoft   MIT                streamline     Streamline  CC-BY-4.0
                                                       twemoji        Twitter     CC-BY-4.0

Everything comes from npm packages with a pinned version and a checked SHA-512. They are downloaded with `npm pack`,
which runs no code of theirs. Needed besides npm: numpy, Pillow, resvg_py and tqdm.
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

DEFAULT_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "emoji"
LANGUAGES = ("en", "zh", "ja")
SIZE = 64

# ---------------------------------------------------------------------------------------------------------------------
# Packages
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """An npm package at one version: its `integrity` as the registry states it, and patterns of the files wanted."""

    name: str
    version: str
    integrity: str
    files: tuple[str, ...]

    @property
    def folder(self) -> str:
        return f"{self.name.split('/')[-1]}-{self.version}"


def _artwork(name: str, version: str, integrity: str) -> Package:
    return Package(f"@iconify-json/{name}", version, integrity, ("icons.json", "chars.json"))


HELD_OUT = "twemoji"
PICTURES = ("fluent-emoji-3d",)  # sets that come drawn

ARTWORK = {
    "noto": _artwork(
        "noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "noto-v1": _artwork(
        "noto-v1",
        "1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    ),
    "fluent-emoji-flat": _artwork(
        "fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "fluent-emoji": _artwork(
        "fluent-emoji",
        "1.2.7",
        "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
    ),
    "fxemoji": _artwork(
        "fxemoji",
        "1.2.2",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
    ),
    "emojione": _artwork(
        "emojione",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    ),
    "fluent-emoji-3d": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        ("assets/*.webp",),
    ),
    "streamline": _artwork(
        "streamline-emojis",
        "1.2.4",
        "sha512-iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
    ),
    "openmoji": _artwork(
        "openmoji",
        "1.2.29",
        "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
    ),
    "emojione-v1": _artwork(
        "emojione-v1",
        "1.2.3",
        "sha512-UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==",
    ),
    HELD_OUT: _artwork(
        "twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
}

SHORTCODES = ("cldr", "emojibase", "github", "joypixels", "iamcal", "emojibase-legacy")

CLDR = Package(
    "cldr-annotations-full",
    "48.2.0",
    "sha512-DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/QJdEc66iHmx3+zLWVIMCFLm0lW7PUQ==",
    tuple(f"annotations/{language}/annotations.json" for language in LANGUAGES),
)

EMOJIBASE = Package(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    ("en/data.json", "en/messages.json", *(f"en/shortcodes/{name}.json" for name in SHORTCODES)),
)


def check_integrity(data: bytes, integrity: str) -> None:
    """Raise ValueError unless `data` has the hash that `integrity`, such as 'sha512-<base64>', asks for."""
    algorithm, _, wanted = integrity.partition("-")
    found = base64.b64encode(hashlib.new(algorithm, data).digest()).decode()
    if found != wanted:
        raise ValueError(f"the {algorithm} of the download is {found}, not {wanted}")


def fetch(package: Package, cache: Path) -> Path:
    """Return the folder that holds `package.files`, downloading the package first if it is not there yet."""
    folder = cache / "packages" / package.folder
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = ["npm", "pack", f"{package.name}@{package.version}", "--silent", "--pack-destination", scratch]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except FileNotFoundError:
            raise SystemExit("npm, which downloads the emoji artwork, is not installed") from None
        (tarball,) = Path(scratch).glob("*.tgz")
        data = tarball.read_bytes()
        try:
            check_integrity(data, package.integrity)
        except ValueError as error:
            raise SystemExit(f"{package.name}@{package.version}: {error}") from None
        unpacked = Path(scratch) / "unpacked"
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            names = [name.removeprefix("package/") for name in archive.getnames()]
            for pattern in package.files:
                wanted = fnmatch.filter(names, pattern)
                if not wanted:
                    raise SystemExit(f"{package.name}@{package.version} has no {pattern}")
                for name in wanted:
                    target = unpacked / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.extractfile(f"package/{name}").read())
        unpacked.rename(folder)  # only now does the package look fetched
    return folder


def _read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# Concepts: which emoji, and what they are called
# ---------------------------------------------------------------------------------------------------------------------


def hexcode_of(emoji: str) -> str:
    """Return the code points of `emoji` as in '2764-200D-1F525', leaving out variation selectors."""
    return "-".join(f"{ord(character):04X}" for character in emoji if character != "\ufe0f")


def plain_hexcode(hexcode: str) -> str:
    """Return `hexcode` in the same form as `hexcode_of` does: upper case and without variation selectors."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def is_gendered_variant(hexcode: str, known: Iterable[str]) -> bool:
    """Tell whether this is a man's or a woman's version of an emoji in `known` that leaves the gender open."""
    neutral = re.sub("-200D-264[02]", "", hexcode)
    neutral = re.sub("^1F46[89]-200D", "1F9D1-200D", neutral)
    return neutral != hexcode and neutral in known


def is_dropped(hexcode: str, group: str, label: str, known: Iterable[str]) -> bool:
    """Tell whether an emoji is left out of the dataset.

    Flags are another task. Hair and skin-tone components show no thing of their own. Keycaps and the twenty-four clock
    faces are near copies of each other, and so are the man's and the woman's version of a person's emoji, and the
    families that list their members: some sets draw them alike.
    """
    return (
        group in ("flags", "component")
        or hexcode.endswith("20E3")
        or label == "keycap: 10"
        or label.endswith(("o’clock", "o'clock", "-thirty"))
        or label.startswith("family: ")
        or is_gendered_variant(hexcode, known)
    )


def read_concepts(cldr: Path, emojibase: Path) -> list[dict]:
    """Return the emoji that have a name in every language, in Unicode's order."""
    annotations = {
        language: _read_json(cldr / f"annotations/{language}/annotations.json")["annotations"]["annotations"]
        for language in LANGUAGES
    }
    messages = _read_json(emojibase / "en/messages.json")
    groups = {group["order"]: group["key"] for group in messages["groups"]}
    subgroups = {subgroup["order"]: subgroup["key"] for subgroup in messages["subgroups"]}
    listed = [entry for entry in _read_json(emojibase / "en/data.json") if "group" in entry]
    known = {plain_hexcode(entry["hexcode"]) for entry in listed}

    concepts = []
    for entry in sorted(listed, key=lambda entry: entry["order"]):
        hexcode, group = plain_hexcode(entry["hexcode"]), groups[entry["group"]]
        if is_dropped(hexcode, group, entry["label"], known):
            continue
        bare = entry["emoji"].replace("\ufe0f", "")
        found = {language: annotations[language].get(bare, {}) for language in LANGUAGES}
        if not all("tts" in annotation for annotation in found.values()):
            continue
        names = {language: annotation["tts"][0] for language, annotation in found.items()}
        concepts.append(
            {
                "emoji": entry["emoji"],
                "hexcode": hexcode,
                "group": group,
                "subgroup": subgroups[entry["subgroup"]],
                "name": names,
                "keywords": {
                    language: [word for word in annotation.get("default", []) if word != names[language]]
                    for language, annotation in found.items()
                },
            }
        )
    return concepts


# ---------------------------------------------------------------------------------------------------------------------
# Artwork: which icon shows which emoji
# ---------------------------------------------------------------------------------------------------------------------

# Icons of fxemoji whose name leads nowhere, or to the wrong emoji, and what they show to the eye.
FXEMOJI_BY_EYE = """
2hearts 💕 americasglobe 🌎 anguish 😧 anticlockwiseupwardsanddownwardsarrows 🔄 aok 👌
arrowrightwardsdownwards ⤵ arrowrightwardsupwards ⤴ asiaaustraliaglobe 🌏 backwithleftwardsarrow 🔙
ballotboxboldcheck ☑ ballottboxwithballott 🗳 banknotedollar 💵 banknoteeuro 💶 banknotepound 💷 banknoteyen 💴
bellcancellation 🔕 blackdownpointingdoublearrow ⏬ blackleftpointingarrow ◀ blackleftpointingdoublearrow ⏪
blackrightpointingarrow ▶ blackrightpointingdoublearrow ⏩ blackskullcrossbones ☠ blackuppointingdoublearrow ⏫
blonde 👱 bolt ⚡ bookmarktab 📑 bow 🎀 bowing 🙇 bride 👰 bunny 🐰 bunny-ears 👯 bunnyside 🐇 cat 🐱 catside 🐈
cellphone 📱 chartdownwardstrend 📉 chartupwardstrend 📈 chartupwardstrendyen 💹 chilipepper 🌶
cjkunifiedideograph-a 🈯 cjkunifiedideograph-b 🈺 cjkunifiedideograph-c 🈲 cjkunifiedideograph-d 🈳
cjkunifiedideograph-e 🈴 cjkunifiedideograph-f 🈵 cjkunifiedideograph-g 🈶 cjkunifiedideograph-h 🈷
cjkunifiedideograph-i 🈚 cjkunifiedideograph-j 🈸 cjkunifiedideograph-k 🈹 clockwisedownupcircledarrows 🔃
clockwiserightwardsleftwardscirclearrows 🔁 clockwiserightwardsleftwardscirclearrowsone 🔂
closedmailboxlowered 📪 closedmailboxraised 📫 confetti 🎊 construct 👷 construction 🏗 constructionsign 🚧
contact 👤 contact2 👥 controlknob 🎛 couple 💑 couplekiss 💏 crying 😢 darksunglasses 🕶 devilhorns 😈
diamondshapewithdotinside 💠 dissapointedrelief 😥 dog 🐶 dogside 🐕 doubleexclaimationmark ‼ down 👇
downpointingsmallredtrisngle 🔽 dragonhead 🐲 dragonside 🐉 eightspokedasterix ✳ endwithleftwardsarrow 🔚
envelopedownarrowabove 📩 europeafricaglobe 🌍 evergreen 🌲 exclaimationquestionmark ⁉ fallingleaf 🍂
fishcakeswirl 🍥 fistedhand 👊 flexbicep 💪 forkknife 🍽 frontfacingchick 🐥 frown 🙍 frownmouth 😦 girlgirl 👭
girlguy 👫 gma 👵 gpa 👴 grineyes 😄 grinsquint 😆 grinsweat 😅 grintears 😂 grinwide 😃 guapimao 👲 guyguy 👬
hampster 🐹 hands 👐 handup 🙋 headmassage 💆 heartarrow 💘 heartgreen 💚 heartpurple 💜 heartyellow 💛
heavyexclaimationmarksymbol ❗ heavylatincross ✝ heavymultiplicationsymbol ✖ heels 👠 high5 🙌
highspeedtrainbulletnose 🚅 index ☝ japaneseangrymask 👺 kissclosedeyes 😚 kisseyes 😙 leaffluttering 🍃 left 👈
leftmagnifyingglass 🔍 leftwritinghand ✍ leopardside 🐆 lockandkey 🔐 loudlycrying 😭 lowerleftpen 🖊
makeupbag 👝 manltepiececlock 🕰 mansshirt 👕 mensrunner 👟 mensshoe 👞 meridianglobe 🌐 monkeyhear 🙉
monkeysee 🙈 monkeyspeak 🙊 mouse 🐭 mouseside 🐁 musicascend 🎵 negativesquaredlatincaptiala 🅰
negativesquaredlatincaptialb 🅱 negativesquaredlatincaptialo 🅾 nogesture 🙅 nooneunder18symbol 🔞
notebookdecorativecover 📔 okgesture 🙆 onarrowleftright 🔛 openmailboxlowered 📭 openmailboxraised 📬 outbox 📤
perservere 😣 phonerightarrowleft 📲 pig 🐷 pigside 🐖 pigsnout 🐽 pinkwallet 👛 potablewatersystem 🚰 pout 🙎
pouting 😡 present 🎁 raisedhandpartfingers 🖖 raisedhandsfingerssplayed 🖐 reminder 🎗 reversehandmiddlefinger 🖕
right 👉 rightmagnifyingglass 🔎 saggitarius ♐ sandals 👡 screamfear 😱 silhouetteohjapan 🗾
sixpointedstarwithdot 🔯 sleuthspy 🕵 smallfrown 🙁 smallsmile 🙂 smileeyes 😊 smiletongue 😋 snowmountains 🏔
softshellfloppy 💾 soonwithrightarrow 🔜 speaker3soundwaves 🔊 speakercancellation 🔇 speakeronesoundwave 🔉
speechbubble 💬 spurtingwhale 🐳 squaredup 🆙 stormcloud 🌩 studiomic 🎙 sunglasses 😎 sunraincloud 🌦 sunrays ☀
sweatsplash 💦 telephonereceiver2 📞 tennisball 🎾 thoughtbaloon 💭 tiger 🐯 tigerside 🐅 tongueoutwink 😜
tongueoutwink2 😝 topwithupwardsarrow 🔝 toykotower 🗼 turban 👳 up 👆 uppointingsmallredtrisngle 🔼
videocasette 📼 waitress 💁 waningbibbousmoon 🌖 wave 🌊 waving 👋 whiteexclaimationmark ❕ winking 😉
wiredkeyboard ⌨ womansshirt 👚
"""


def _pairs(text: str) -> dict[str, str]:
    words = text.split()
    return {name: hexcode_of(emoji) for name, emoji in zip(words[::2], words[1::2], strict=True)}


# For each set, the icons that are matched by hand; None says that the icon shows no emoji of ours.
BY_HAND: dict[str, dict[str, str | None]] = {
    "noto-v1": _pairs("exclamation-mark ❗ up-exclamation-button 🆙 kiss-woman-man 💏 couple-with-heart-woman-man 💑"),
    "fxemoji": {
        **_pairs(FXEMOJI_BY_EYE),
        "astonished": None,  # a dizzy face
        "kiss": None,  # a second kissing face
        "tramcar": None,  # a black square
        "window": None,  # a window on a computer screen
    },
    "emojione": _pairs(
        "exclamation-mark ❗ up-text-button 🆙 smiling-cat-face-with-heart-eyes 😻 "
        "a-button 🅰 b-button 🅱 ab-button 🆎 o-button 🅾"
    ),
}


def normalise(name: str) -> str:
    """Reduce a name to its ASCII letters and digits, so that 'Piñata', 'piñata' and ':pinata:' are all 'pinata'."""
    name = unicodedata.normalize("NFKD", name.lower().replace("&", "and"))
    return re.sub("[^a-z0-9]", "", name)


class NameIndex:
    """Finds emoji by what they have been called, most trusted kind of name first.

    Each of `tiers` lists (hexcode, name) pairs. A name is looked up tier by tier, and the first tier that knows it
    decides: if two emoji share the name there, the name is ambiguous and finds nothing.
    """

    def __init__(self, *tiers: Iterable[tuple[str, str]]):
        self.tiers: list[dict[str, set[str]]] = []
        for pairs in tiers:
            found: dict[str, set[str]] = {}
            for hexcode, name in pairs:
                if key := normalise(name):
                    found.setdefault(key, set()).add(plain_hexcode(hexcode))
            self.tiers.append(found)

    def find(self, name: str) -> tuple[int, str] | None:
        """Return the tier that knows `name` and the hexcode it gives, or None."""
        key = normalise(name)
        for tier, found in enumerate(self.tiers):
            if key in found:
                return (tier, *found[key]) if len(found[key]) == 1 else None
        return None


@dataclass
class IconSet:
    """The icons of one artist as Iconify packs them."""

    name: str
    collection: dict
    chars: dict[str, str]

    @classmethod
    def read(cls, name: str, folder: Path) -> IconSet:
        return cls(name, _read_json(folder / "icons.json"), _read_json(folder / "chars.json"))

    @property
    def aliases(self) -> dict[str, dict]:
        return self.collection.get("aliases", {})

    @property
    def names(self) -> list[str]:
        return [*self.collection["icons"], *self.aliases]

    def resolve(self, name: str) -> tuple[str, bool]:
        """Follow aliases from `name`: return the icon they lead to, and whether they mirror it."""
        flipped = False
        while alias := self.aliases.get(name):
            name, flipped = alias["parent"], flipped ^ alias.get("hFlip", False)
        return name, flipped

    def drawing(self, name: str) -> str:
        """Return an icon as an SVG document."""
        name, flipped = self.resolve(name)
        icon = self.collection["icons"][name]
        width = icon.get("width", self.collection["width"])
        height = icon.get("height", self.collection["height"])
        body = f'<g transform="translate({width}) scale(-1 1)">{icon["body"]}</g>' if flipped else icon["body"]
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{body}</svg>'
        )

    def match(self, hexcodes: Iterable[str], index: NameIndex) -> dict[str, str]:
        """Return the icon that shows each of `hexcodes`, for those that have one.

        A match by hand is believed first, then the set's own character map, then the icon's name, and an alias last.
        No icon is used twice: "cricket", the insect, is not shown by an alias of "cricket-game".
        """
        by_hand = BY_HAND.get(self.name, {})
        candidates = [(hexcode, name) for name, hexcode in by_hand.items()]
        candidates += [(plain_hexcode(hexcode), name) for hexcode, name in self.chars.items()]
        # One artist draws some emoji several times and numbers them: the first is taken.
        plain = {name: re.sub("-[1-9]$", "", name) for name in self.names}
        found = [(*tier_and_hexcode, name) for name in self.names if (tier_and_hexcode := index.find(plain[name]))]
        found.sort(key=lambda match: (match[2] in self.aliases, match[0]))
        candidates += [(hexcode, name) for _, hexcode, name in found if name not in by_hand]

        wanted, used, matches = set(hexcodes), set(), {}
        for hexcode, name in candidates:
            if hexcode in wanted and hexcode not in matches and self.resolve(name) not in used:
                matches[hexcode] = name
                used.add(self.resolve(name))
        return matches


@dataclass
class PictureSet:
    """Ready-made pictures, each in a file named by its code points."""

    folder: Path

    def match(self, hexcodes: Iterable[str], index: NameIndex) -> dict[str, str]:
        files = {plain_hexcode(path.stem): path.name for path in self.folder.glob("*.webp")}
        return {hexcode: files[hexcode] for hexcode in hexcodes if hexcode in files}

    def drawing(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


def build_index(concepts: list[dict], emojibase: Path, icon_sets: dict[str, IconSet]) -> NameIndex:
    """Collect the names that emoji go by: CLDR's, Unicode's, those of icon sets with a character map, shortcodes."""

    def shortcodes(name: str):
        for hexcode, codes in _read_json(emojibase / f"en/shortcodes/{name}.json").items():
            for code in [codes] if isinstance(codes, str) else codes:
                yield hexcode, code

    labels = [(entry["hexcode"], entry["label"]) for entry in _read_json(emojibase / "en/data.json")]
    single = [concept["hexcode"] for concept in concepts if "-" not in concept["hexcode"]]
    return NameIndex(
        [*((concept["hexcode"], concept["name"]["en"]) for concept in concepts), *labels],
        [(hexcode, unicodedata.name(chr(int(hexcode, 16)), "")) for hexcode in single],
        [pair for icon_set in icon_sets.values() for pair in icon_set.chars.items()],
        *(shortcodes(name) for name in SHORTCODES),
    )


@dataclass
class Sources:
    """What the packages hold: the concepts, and for each set the icons and which of them shows which concept."""

    concepts: list[dict]
    sets: dict[str, IconSet | PictureSet]
    matches: dict[str, dict[str, str]]

    @classmethod
    def read(cls, cache: Path) -> Sources:
        """Fetch the packages where needed, and keep the concepts that have a training and a held-out picture."""
        packages = [*ARTWORK.values(), CLDR, EMOJIBASE]
        folders = {package: fetch(package, cache) for package in tqdm(packages, "packages", unit="package")}
        icon_sets = {
            name: IconSet.read(name, folders[package])
            for name, package in tqdm(ARTWORK.items(), "icon sets", unit="set")
            if name not in PICTURES
        }
        sets = icon_sets | {name: PictureSet(folders[ARTWORK[name]] / "assets") for name in PICTURES}
        # Microsoft's sets name their icons alike, and only the flat one has a character map.
        icon_sets["fluent-emoji"].chars = icon_sets["fluent-emoji-flat"].chars

        concepts = read_concepts(folders[CLDR], folders[EMOJIBASE])
        index = build_index(concepts, folders[EMOJIBASE], icon_sets)
        hexcodes = [concept["hexcode"] for concept in concepts]
        matches = {name: sets[name].match(hexcodes, index) for name in ARTWORK}
        trained = set().union(*(found for name, found in matches.items() if name != HELD_OUT))
        concepts = [concept for concept in concepts if concept["hexcode"] in trained & matches[HELD_OUT].keys()]
        return cls(concepts, sets, matches)

    def drawing(self, source: str, concept: dict) -> str | bytes | None:
        """Return the picture of `concept` in the set `source`, if it has one: an SVG document, or a file's bytes."""
        name = self.matches[source].get(concept["hexcode"])
        return self.sets[source].drawing(name) if name else None


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def render(drawing: str | bytes, size: int) -> Image.Image:
    """Draw an SVG document or a picture file as a size x size RGBA picture, centred and with its aspect ratio kept."""
    if isinstance(drawing, str):
        import resvg_py

        drawing = bytes(
            resvg_py.svg_to_bytes(svg_string=drawing, width=2 * size, height=2 * size, skip_system_fonts=True)
        )
    drawn = Image.open(io.BytesIO(drawing)).convert("RGBA")
    if max(drawn.size) != 2 * size:
        drawn = drawn.convert("RGBa").resize((2 * size, 2 * size), Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (2 * size, 2 * size))
    canvas.paste(drawn, ((canvas.width - drawn.width) // 2, (canvas.height - drawn.height) // 2))
    # Halving the size smooths what thin lines resvg leaves. Premultiplied ("RGBa"), edges take no colour from the void.
    return canvas.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")


def _render_array(drawing: str | bytes, size: int) -> np.ndarray:
    return np.asarray(render(drawing, size))


@dataclass
class EmojiData:
    """The dataset: `rgba[i]` is `concepts[concept[i]]` as drawn by `sources[source[i]]`."""

    concepts: list[dict]
    rgba: np.ndarray  # uint8 [N, 64, 64, 4], straight alpha
    concept: np.ndarray  # int32 [N]
    source: np.ndarray  # int8 [N]
    sources: list[str]

    @property
    def heldout_mask(self) -> np.ndarray:
        """True for the pictures that must never be trained on."""
        return self.source == self.sources.index(HELD_OUT)

    @property
    def train_mask(self) -> np.ndarray:
        return ~self.heldout_mask


def duplicate_names(concepts: list[dict], language: str) -> dict[str, list[str]]:
    """Return each name that several concepts share in `language`, with their emoji."""
    sharing: dict[str, list[str]] = {}
    for concept in concepts:
        sharing.setdefault(concept["name"][language], []).append(concept["emoji"])
    return {name: emoji for name, emoji in sharing.items() if len(emoji) > 1}


def _write(path: Path, write: Callable[[io.BufferedWriter], object]) -> None:
    """Let `write` fill the file at `path`, which appears only once it is complete."""
    partial_path = path.with_name(path.name + ".partial")
    with open(partial_path, "wb") as file:
        write(file)
    partial_path.replace(path)


def _write_json(path: Path, value) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    _write(path, lambda file: file.write(text.encode()))


def is_built(cache: Path) -> bool:
    """Whether `cache` holds the dataset, of these sets and no others."""
    if not (cache / "concepts.json").is_file() or not (cache / "pictures.npz").is_file():
        return False
    with np.load(cache / "pictures.npz") as arrays:
        return arrays["sources"].tolist() == list(ARTWORK)


def build(sources: Sources, cache: Path, processes: int) -> None:
    """Render every picture and write `concepts.json` and, last of all, `pictures.npz`."""
    (cache / "pictures.npz").unlink(missing_ok=True)
    drawings = [
        (number, source, drawing)
        for source, name in enumerate(ARTWORK)
        for number, concept in enumerate(sources.concepts)
        if (drawing := sources.drawing(name, concept))
    ]
    with ProcessPoolExecutor(processes) as pool:
        rendered = pool.map(partial(_render_array, size=SIZE), (drawing for _, _, drawing in drawings), chunksize=16)
        rgba = np.stack(list(tqdm(rendered, "pictures", total=len(drawings), unit="picture")))
    _write_json(cache / "concepts.json", sources.concepts)
    arrays = {
        "rgba": rgba,
        "concept": np.array([number for number, _, _ in drawings], np.int32),
        "source": np.array([source for _, source, _ in drawings], np.int8),
        "sources": np.array(list(ARTWORK)),
    }
    _write(cache / "pictures.npz", lambda file: np.savez_compressed(file, **arrays))


def load(cache: str | Path = DEFAULT_CACHE) -> EmojiData:
    """Load the dataset that `python -m tools.tiny.emoji_data` built in `cache`."""
    cache = Path(cache)
    if not is_built(cache):
        raise FileNotFoundError(f"no dataset of these sets in {cache}: build it with `python -m tools.tiny.emoji_data`")
    with np.load(cache / "pictures.npz") as arrays:
        return EmojiData(
            concepts=_read_json(cache / "concepts.json"),
            rgba=arrays["rgba"],
            concept=arrays["concept"],
            source=arrays["source"],
            sources=arrays["sources"].tolist(),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Examples
# ---------------------------------------------------------------------------------------------------------------------

# Chosen for variety and looks; a larger --count goes on through all the concepts at even steps.
FAVOURITES = """
🐼 🦊 🍣 🚲 🌻 🎸 🦉 🍓 🚀 🐙 🏰 😂 🦋 🍕 ⛵ 🌵 🎈 🐢 🍉 🚂 🌈
🔑 🐧 🥐 🚁 🌲 📷 😴 🐘 🍦 🏠 🌙 ☂️ 🦁 🥕 🤖 🐳 🍄 ⚽ 🎁 🌋
"""


def choose_examples(concepts: list[dict], count: int) -> list[dict]:
    """Pick `count` concepts: the favourites first, then others from all over the list."""
    by_hexcode = {concept["hexcode"]: concept for concept in concepts}
    chosen = {code: by_hexcode[code] for code in map(hexcode_of, FAVOURITES.split()) if code in by_hexcode}
    others = [concept for concept in concepts if concept["hexcode"] not in chosen]
    missing = min(count - len(chosen), len(others))
    if missing > 0:
        chosen.update((other["hexcode"], other) for other in others[:: len(others) // missing][:missing])
    return list(chosen.values())[:count]


def write_examples(sources: Sources, folder: Path, count: int, size: int = 256) -> None:
    """Write held-out pictures as PNG files on white, and `examples.json`, which says what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for concept in tqdm(choose_examples(sources.concepts, count), "examples", unit="picture"):
        picture = render(sources.drawing(HELD_OUT, concept), size)
        white = Image.new("RGBA", picture.size, "white")
        file = re.sub("[^a-z0-9]+", "-", concept["name"]["en"].lower()).strip("-") + ".png"
        Image.alpha_composite(white, picture).convert("RGB").save(folder / file, optimize=True)
        examples.append({"file": file, "emoji": concept["emoji"], "name": concept["name"]})
    _write_json(folder / "examples.json", examples)


def report(data: EmojiData) -> None:
    """Print how much there is of everything, and which names are shared."""
    print(f"{len(data.concepts)} concepts, {len(data.rgba)} pictures")
    for number, name in enumerate(data.sources):
        role = "held out" if name == HELD_OUT else "training"
        print(f"  {name:18} {np.sum(data.source == number):5} pictures, {role}")
    groups = Counter(concept["group"] for concept in data.concepts)
    print("  " + ", ".join(f"{group} {count}" for group, count in groups.items()))
    for language in LANGUAGES:
        print(f"  names that several concepts share, {language}: {duplicate_names(data.concepts, language) or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, help="where the dataset goes (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="build the dataset again even if it is there")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="processes that draw")
    parser.add_argument("--examples", type=Path, metavar="DIR", help="also write held-out pictures as PNG files to DIR")
    parser.add_argument("--count", type=int, default=36, help="how many of them (default: %(default)s)")
    args = parser.parse_args()

    wanted = args.force or not is_built(args.cache)
    if wanted or args.examples:
        sources = Sources.read(args.cache)
    if wanted:
        build(sources, args.cache, args.processes)
    report(load(args.cache))
    if args.examples:
        write_examples(sources, args.examples, args.count)


if __name__ == "__main__":
    main()
