"""The texts of the tiny checkpoint: which ones it learns, and which are held out for its evaluation.

Imported by the scripts beside it; it is no command.

All names are learnt. Of the keywords that Unicode gives each emoji in three languages a fifth is *held out*: neither
the model nor its tokenizer is ever trained on one, whatever the emoji. So is a fifth of the pairs of other keywords of
one emoji, such as "evil smile", and all of `PHRASES`, which were written by hand. A hash of the text decides what is
held out, not chance and not the order of anything.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations

from tools.tiny.emoji_data import LANGUAGES, hexcode_of

# Phrases around a name or keywords. "{}" alone is repeated to be drawn more often.
TEMPLATES = {
    "en": (
        "{}", "{}", "a photo of {}", "a photo of a {}.", "This is a photo of {}.", "a picture of the {}",
        "a drawing of a {}", "this is {}",
    ),
    "zh": ("{}", "{}", "一张{}的照片", "这是一张{}的照片。", "{}的图片", "这是{}"),
    "ja": ("{}", "{}", "{}の写真", "これは{}の写真です。", "{}の絵", "これは{}です"),
}  # fmt: skip
CAPTION_PROMPTS = {"en": "English caption:", "zh": "中文描述:", "ja": "日本語の説明:"}
JOINTS = {"en": ("{} {}",), "zh": ("{} {}", "{}的{}"), "ja": ("{} {}", "{}の{}")}

# What a person might ask for, in three languages, and the emoji that are right answers.
PHRASES = (
    ("red fruit", "红色的水果", "赤い果物", "🍎🍓🍒🍅"),
    ("yellow fruit", "黄色的水果", "黄色い果物", "🍌🍋🍍🥭🍐"),
    ("green vegetable", "绿色的蔬菜", "緑の野菜", "🥦🥬🥒🫛🫑"),
    ("sea animal", "海里的动物", "海の動物", "🐳🐋🐬🐟🐠🐡🦈🐙🪸🪼🦀🦞🦐🦑🦭🐚"),
    ("big cat", "大型猫科动物", "大きな猫", "🦁🐯🐅🐆"),
    ("flying insect", "会飞的昆虫", "飛ぶ昆虫", "🐝🦋🪰🦟🐞🪲"),
    ("farm animal", "农场里的动物", "農場の動物", "🐄🐮🐖🐷🐑🐏🐔🐓🐐🐴🐎🐂🐃🦃🦆🐣🐤🐥🐇🐰"),
    ("bird that swims", "会游泳的鸟", "泳ぐ鳥", "🐧🦆🦢🪿"),
    ("sweet dessert", "甜点心", "甘いデザート", "🍰🎂🧁🥧🍫🍬🍭🍮🍩🍪🍨🍧🍦"),
    ("hot drink", "热的饮料", "あつい飲み物", "☕🍵🫖🧉"),
    ("alcoholic drink", "含酒精的饮料", "アルコール飲料", "🍺🍻🍷🍸🍹🥂🥃🍶🍾"),
    ("string instrument", "有弦的乐器", "弦のある楽器", "🎸🎻🪕"),
    ("winter sport", "冬季运动", "冬のスポーツ", "⛷🏂⛸🛷🏒🥌🎿"),
    ("ball game", "球类运动", "ボールを使うスポーツ", "⚽⚾🏀🏐🏈🏉🎾🎳🏏🏑🏓🥎🎱🥍🏸🏌⛹"),
    ("public transport", "公共交通工具", "公共交通機関", "🚌🚍🚎🚇🚊🚉🚆🚈🚋🚃🚝🚞"),
    ("boat on water", "水上的船", "水に浮かぶ船", "⛵🚤🛥🚢⛴🛶"),
    ("bad weather", "坏天气", "悪い天気", "🌧⛈🌩🌨🌪🌀☔🌦🌥"),
    ("night sky", "夜晚的天空", "夜の空", "🌙🌃🌌🌠⭐🌟🌛🌜🌕🌑🌒🌓🌔🌖🌗🌘🌝🌚🎑🌉"),
    ("writing tool", "书写工具", "筆記用具", "✏🖊🖋🖍🖌✒✍"),
    ("knife for cooking", "厨房用的刀", "台所の包丁", "🔪🍴🍽🗡"),
    ("face with tears running", "哭的脸", "泣いている顔", "😢😭😿😂🤣🥲🥹😥"),
    ("angry person", "生气的人", "怒った人", "😠😡😤👿🤬🙎💢"),
    ("thing to wear on the head", "戴在头上的东西", "頭にかぶるもの", "🎩👒🧢🎓⛑🪖👑👳"),
    ("shoes for running", "跑步穿的鞋", "走るための靴", "👟👞🥾👠👡👢🥿"),
)


def is_fifth(text: str) -> bool:
    return zlib.crc32(text.casefold().encode("utf-8")) % 5 == 0


def phrases(language: str) -> dict[str, set[str]]:
    """Return each phrase of `language` with the hexcodes of the emoji that answer it."""
    column = LANGUAGES.index(language)
    return {row[column]: {hexcode_of(emoji) for emoji in row[3].replace("\ufe0f", "")} for row in PHRASES}


@dataclass
class Texts:
    """What is learnt of `concepts` in one language, and what is held out."""

    concepts: list[dict]
    language: str
    keywords: list[list[str]] = field(init=False)  # for each concept, those to learn
    bearers: dict[str, set[int]] = field(init=False)  # for each keyword to learn, the concepts that have it
    held_out: dict[str, set[int]] = field(init=False)  # for each held-out keyword likewise

    def __post_init__(self) -> None:
        # Every name is learnt, so no keyword that is a name can be held out.
        names = {name.casefold() for concept in self.concepts for name in concept["name"].values()}
        self.keywords, self.bearers, self.held_out = [], {}, {}
        for number, concept in enumerate(self.concepts):
            learnt = []
            for keyword in concept["keywords"][self.language]:
                held_out = is_fifth(keyword) and keyword.casefold() not in names
                (self.held_out if held_out else self.bearers).setdefault(keyword, set()).add(number)
                if not held_out:
                    learnt.append(keyword)
            self.keywords.append(learnt)

    def name(self, number: int) -> str:
        return self.concepts[number]["name"][self.language]

    def pairs(self, number: int, held_out: bool) -> list[tuple[str, str]]:
        """The pairs of keywords of one concept that are held out, or those that are learnt."""
        pairs = combinations(sorted(self.keywords[number]), 2)
        return [pair for pair in pairs if is_fifth("|".join(pair)) == held_out]

    def concepts_with(self, pair: Iterable[str]) -> set[int]:
        """The concepts that have all of these keywords."""
        return set.intersection(*(self.bearers[keyword] for keyword in pair))

    def held_out_pairs(self) -> dict[str, set[int]]:
        """One held-out pair for each concept that has any, as a text, with the concepts that it fits."""
        found = {}
        for number in range(len(self.concepts)):
            if pairs := self.pairs(number, held_out=True):
                pair = min(pairs, key=lambda pair: (len(self.concepts_with(pair)), pair))
                found[JOINTS[self.language][0].format(*pair)] = self.concepts_with(pair)
        return found
