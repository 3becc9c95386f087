"""Build the demonstration data: emoji artwork, named in English, Chinese and Japanese.

Run by whoever retrains tiny/, as the first step of `make tiny`.

    python -m tools.tiny.emoji_data                                           # build the dataset in .cache/emoji
    python -m tools.tiny.emoji_data --examples examples/pictures --count 36   # also write some held-out images

A *concept* is one emoji: a name and keywords in three languages (Unicode CLDR), and its images in up to eleven sets of
artwork. Ten of them are for training. Twemoji is held out, to ask a model about things it knows, drawn by an artist it
has never seen.

    set                 artist      licence            set            artist      licence
    noto                Google      Apache-2.0         fxemoji        Mozilla     Apache-2.0
    noto-v1             Google      Apache-2.0         emojione       EmojiOne    CC-BY-4.0
    fluent-emoji-flat   Microsoft   MIT                emojione-v1    EmojiOne    CC-BY-SA-4.0
    fluent-emoji        Microsoft   MIT                openmoji       OpenMoji    CC-BY-SA-4.0
    fluent-emoji-3d     Microsoft   MIT                streamline     Streamline  CC-BY-4.0
                                                       twemoji        Twitter     CC-BY-4.0

Everything comes from npm packages with a pinned version and a checked SHA-512. `npm pack` downloads them
without running their code. Besides npm this needs numpy, Pillow, resvg_py and tqdm.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

DEFAULT_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "emoji"
LANGUAGES = ("en", "zh", "ja")
SIZE = 64

# ------------------------------------------------------------------------------------------------------------ packages


@dataclass(frozen=True)
class Package:
    """An npm package at one version: its `integrity` as the registry states it, and patterns of the files wanted."""

    name: str
    version: str
    integrity: str
    files: tuple[str, ...] = ("icons.json", "chars.json")


HELD_OUT = "twemoji"
RASTER = "fluent-emoji-3d"  # the set that comes as image files; the others are SVG

# Package (of @iconify-json where no scope is given), version and SHA-512. Their order numbers the sets in the dataset.
ARTWORK_PACKAGES = """
noto 1.2.9 DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==
noto-v1 1.2.5 /DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==
fluent-emoji-flat 1.2.6 RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==
fluent-emoji 1.2.7 D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==
fxemoji 1.2.2 UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==
emojione 1.2.3 T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==
@lobehub/fluent-emoji-3d 1.1.0 Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==
streamline-emojis 1.2.4 iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==
openmoji 1.2.29 vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==
emojione-v1 1.2.3 UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==
twemoji 1.2.5 uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==
"""


def _artwork() -> Iterator[tuple[str, Package]]:
    for line in ARTWORK_PACKAGES.strip().splitlines():
        name, version, sha512 = line.split()
        if name.startswith("@"):
            package = Package(name, version, f"sha512-{sha512}", ("assets/*.webp",))
        else:
            package = Package(f"@iconify-json/{name}", version, f"sha512-{sha512}")
        yield name.rpartition("/")[2].removesuffix("-emojis"), package


ARTWORK = dict(_artwork())  # by the name of the set
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
    """Return the folder that holds `package.files`, downloading the package if it is not there yet."""
    folder = cache / "packages" / f"{package.name.rpartition('/')[2]}-{package.version}"
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
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            patterns = [f"package/{pattern}" for pattern in package.files]
            wanted = [member for member in archive if any(fnmatch(member.name, pattern) for pattern in patterns)]
            archive.extractall(scratch, wanted, filter="data")
        (Path(scratch) / "package").rename(folder)  # the folder appears only once it is complete
    return folder


def _read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


# --------------------------------------------------------------------- concepts: which emoji, and what they are called


def hexcode_of(emoji: str) -> str:
    """Return the code points of `emoji` as in '2764-200D-1F525', leaving out variation selectors."""
    return "-".join(f"{ord(character):04X}" for character in emoji if character != "\ufe0f")


def plain_hexcode(hexcode: str) -> str:
    """Return `hexcode` in the same form as `hexcode_of` does: upper case and without variation selectors."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def is_gendered_variant(hexcode: str, known: Iterable[str]) -> bool:
    """Whether this is a man's or a woman's version of an emoji in `known` that leaves the gender open."""
    neutral = re.sub("-200D-264[02]", "", hexcode)
    neutral = re.sub("^1F46[89]-200D", "1F9D1-200D", neutral)
    return neutral != hexcode and neutral in known


def is_dropped(hexcode: str, group: str, label: str, known: Iterable[str]) -> bool:
    """Whether an emoji is left out of the dataset.

    Flags are another task. Hair and skin-tone components show nothing by themselves. Keycaps, the 24 clock faces, the
    man's and the woman's version of a person's emoji and families that list their members are near copies of each
    other: some sets draw them alike.
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


# ------------------------------------------------------------------------------- artwork: which icon shows which emoji

# Icons of fxemoji whose name matches no emoji or the wrong one, with the emoji that they show.
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


# For each set, the icons that are matched by hand; None: the icon shows none of the dataset's emoji.
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
    """Finds emoji by their names, the most trusted kind of name first.

    Each of `tiers` lists (hexcode, name) pairs. The first tier that knows a name decides: if two emoji share the name
    there, it is ambiguous and finds nothing.
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
    """One set of SVG icons as Iconify packs them."""

    name: str
    collection: dict
    chars: dict[str, str]

    @classmethod
    def read(cls, name: str, folder: Path) -> IconSet:
        return cls(name, _read_json(folder / "icons.json"), _read_json(folder / "chars.json"))

    @property
    def aliases(self) -> dict[str, dict]:
        return self.collection.get("aliases", {})

    def resolve(self, name: str) -> tuple[str, bool]:
        """Follow aliases from `name`: return their icon, and whether they mirror it."""
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
        """Return the icon of each of `hexcodes` that has one.

        Matches by hand come first, then the set's own character map, then the icon's name, then aliases. No icon is
        used twice: an alias of "cricket-game" does not show the insect "cricket".
        """
        by_hand = BY_HAND.get(self.name, {})
        candidates = [(hexcode, name) for name, hexcode in by_hand.items()]
        candidates += [(plain_hexcode(hexcode), name) for hexcode, name in self.chars.items()]
        # One artist draws some emoji several times and numbers them: take the first.
        plain = {name: re.sub("-[1-9]$", "", name) for name in (*self.collection["icons"], *self.aliases)}
        found = [(*tier_and_hexcode, name) for name in plain if (tier_and_hexcode := index.find(plain[name]))]
        found.sort(key=lambda match: (match[2] in self.aliases, match[0]))
        candidates += [(hexcode, name) for _, hexcode, name in found if name not in by_hand]

        wanted, used, matches = set(hexcodes), set(), {}
        for hexcode, name in candidates:
            if hexcode in wanted and hexcode not in matches and self.resolve(name) not in used:
                matches[hexcode] = name
                used.add(self.resolve(name))
        return matches


@dataclass
class RasterSet:
    """Image files, each named by its code points."""

    folder: Path

    def match(self, hexcodes: Iterable[str], index: NameIndex) -> dict[str, str]:
        files = {plain_hexcode(path.stem): path.name for path in self.folder.glob("*.webp")}
        return {hexcode: files[hexcode] for hexcode in hexcodes if hexcode in files}

    def drawing(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


def build_index(concepts: list[dict], emojibase: Path, icon_sets: dict[str, IconSet]) -> NameIndex:
    """Collect the names of emoji: CLDR's, Unicode's, those of icon sets with a character map, shortcodes."""

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
    """What the packages hold: the concepts, and for each set its icons and the icon of each concept."""

    concepts: list[dict]
    sets: dict[str, IconSet | RasterSet]
    matches: dict[str, dict[str, str]]

    @classmethod
    def read(cls, cache: Path) -> Sources:
        """Fetch the packages where needed, and keep the concepts that have a training and a held-out image."""
        packages = [*ARTWORK.values(), CLDR, EMOJIBASE]
        folders = {package: fetch(package, cache) for package in tqdm(packages, "packages", unit="package")}
        icon_sets = {
            name: IconSet.read(name, folders[package])
            for name, package in tqdm(ARTWORK.items(), "icon sets", unit="set")
            if name != RASTER
        }
        sets = icon_sets | {RASTER: RasterSet(folders[ARTWORK[RASTER]] / "assets")}
        # Microsoft's sets use the same icon names, and only the flat one has a character map.
        icon_sets["fluent-emoji"].chars = icon_sets["fluent-emoji-flat"].chars

        concepts = read_concepts(folders[CLDR], folders[EMOJIBASE])
        index = build_index(concepts, folders[EMOJIBASE], icon_sets)
        hexcodes = [concept["hexcode"] for concept in concepts]
        matches = {name: sets[name].match(hexcodes, index) for name in ARTWORK}
        trained = set().union(*(found for name, found in matches.items() if name != HELD_OUT))
        concepts = [concept for concept in concepts if concept["hexcode"] in trained & matches[HELD_OUT].keys()]
        return cls(concepts, sets, matches)

    def drawing(self, source: str, concept: dict) -> str | bytes | None:
        """The SVG document or the bytes of the image file of `concept` in the set `source`, if it has one."""
        name = self.matches[source].get(concept["hexcode"])
        return self.sets[source].drawing(name) if name else None


# ----------------------------------------------------------------------------------------------------------- rendering


def render(drawing: str | bytes, size: int) -> Image.Image:
    """Render an SVG document or an image file as a centred size x size RGBA image with the same aspect ratio."""
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
    # Halving the size smooths thin lines of resvg. Premultiplied ("RGBa"), transparent pixels do not colour the edges.
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
        """True for the images that must never be trained on."""
        return self.source == self.sources.index(HELD_OUT)

    @property
    def train_mask(self) -> np.ndarray:
        return ~self.heldout_mask


def _write(path: Path, write: Callable[[io.BufferedWriter], object]) -> None:
    """Let `write` fill the file at `path`, which appears once it is complete."""
    partial_path = path.with_name(path.name + ".partial")
    with open(partial_path, "wb") as file:
        write(file)
    partial_path.replace(path)


def _write_json(path: Path, value) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    _write(path, lambda file: file.write(text.encode()))


def is_built(cache: Path) -> bool:
    """Whether `cache` holds the dataset of exactly these sets."""
    if not (cache / "concepts.json").is_file() or not (cache / "pictures.npz").is_file():
        return False
    with np.load(cache / "pictures.npz") as arrays:
        return arrays["sources"].tolist() == list(ARTWORK)


def build(sources: Sources, cache: Path, processes: int) -> None:
    """Render all images and write `concepts.json`, then `pictures.npz`."""
    (cache / "pictures.npz").unlink(missing_ok=True)
    drawings = [
        (number, source, drawing)
        for source, name in enumerate(ARTWORK)
        for number, concept in enumerate(sources.concepts)
        if (drawing := sources.drawing(name, concept))
    ]
    with ProcessPoolExecutor(processes) as pool:
        rendered = pool.map(partial(_render_array, size=SIZE), (drawing for _, _, drawing in drawings), chunksize=16)
        rgba = np.stack(list(tqdm(rendered, "images", total=len(drawings), unit="image")))
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
        loaded = {name: arrays[name] for name in ("rgba", "concept", "source")}
        return EmojiData(_read_json(cache / "concepts.json"), **loaded, sources=arrays["sources"].tolist())


# ------------------------------------------------------------------------------------------------------------ examples

# A larger --count adds concepts at even steps from the whole list.
FAVOURITES = """
🐼 🦊 🍣 🚲 🌻 🎸 🦉 🍓 🚀 🐙 🏰 😂 🦋 🍕 ⛵ 🌵 🎈 🐢 🍉 🚂 🌈
🔑 🐧 🥐 🚁 🌲 📷 😴 🐘 🍦 🏠 🌙 ☂️ 🦁 🥕 🤖 🐳 🍄 ⚽ 🎁 🌋
"""


def choose_examples(concepts: list[dict], count: int) -> list[dict]:
    """Pick `count` concepts: the favourites first, then others from the whole list."""
    by_hexcode = {concept["hexcode"]: concept for concept in concepts}
    chosen = {code: by_hexcode[code] for code in map(hexcode_of, FAVOURITES.split()) if code in by_hexcode}
    others = [concept for concept in concepts if concept["hexcode"] not in chosen]
    missing = min(count - len(chosen), len(others))
    if missing > 0:
        chosen.update((other["hexcode"], other) for other in others[:: len(others) // missing][:missing])
    return list(chosen.values())[:count]


def write_examples(sources: Sources, folder: Path, count: int, size: int = 256) -> None:
    """Write held-out images as PNG files on white, and `examples.json` with their names."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for concept in tqdm(choose_examples(sources.concepts, count), "examples", unit="image"):
        image = render(sources.drawing(HELD_OUT, concept), size)
        white = Image.new("RGBA", image.size, "white")
        file = re.sub("[^a-z0-9]+", "-", concept["name"]["en"].lower()).strip("-") + ".png"
        Image.alpha_composite(white, image).convert("RGB").save(folder / file, optimize=True)
        examples.append({"file": file, "emoji": concept["emoji"], "name": concept["name"]})
    _write_json(folder / "examples.json", examples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of the dataset")
    parser.add_argument("--force", action="store_true", help="build the dataset again even if it is there")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="processes that render")
    parser.add_argument("--examples", type=Path, metavar="DIR", help="also write held-out images as PNG files to DIR")
    parser.add_argument("--count", type=int, default=36, help="number of these files")
    args = parser.parse_args()

    wanted = args.force or not is_built(args.cache)
    if wanted or args.examples:
        sources = Sources.read(args.cache)
    if wanted:
        build(sources, args.cache, args.processes)
    data = load(args.cache)
    print(f"{len(data.concepts)} concepts, {len(data.rgba)} images, {data.heldout_mask.sum()} of them held out")
    if args.examples:
        write_examples(sources, args.examples, args.count)


if __name__ == "__main__":
    main()
