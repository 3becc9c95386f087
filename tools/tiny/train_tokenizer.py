"""Train the tiny checkpoint's tokenizer on the names of the emoji dataset and on the keywords that are not held out.

Run by whoever retrains tiny/, as the second step of `make tiny`.

    python -m tools.tiny.emoji_data         # first, for its concepts.json
    python -m tools.tiny.train_tokenizer    # writes tiny/tokenizer.model

It is like LLaMA's, but smaller: a SentencePiece BPE model with byte fallback, identity normalisation, a dummy prefix,
single digits, `<unk>`, `<s>` and `</s>` as the pieces 0, 1 and 2, and no padding piece. Training is deterministic: one
thread, and sentences in a fixed order.
"""

from __future__ import annotations

import argparse
import io
import json
import string
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from tools import ROOT
from tools.tiny.emoji_data import DEFAULT_CACHE, LANGUAGES
from tools.tiny.tiny_texts import Texts

VOCABULARY = 4096

# Phrases around the names in prompts and captions; `{}` is the place of a name.
PROMPTS = (
    "summarize:", "summarize:{}", "a photo of {}", "a photo of a {}.", "a picture of the {}", "an emoji of {}",
    "English caption:", "English caption: {}", "Describe the picture.", "Describe the picture in English.",
    "Describe the image briefly.", "What is in this picture?", "What is shown in the image?", "This is {}.",
    "Chinese caption:", "Japanese caption:", "中文描述:", "中文描述:{}", "中文描述：{}", "一张{}的照片",
    "一张{}的图片", "{}的图片", "描述这张图片。", "请描述图片。", "这是什么？", "这是{}。",
    "日本語の説明:", "日本語の説明:{}", "日本語の説明：{}", "{}の写真", "{}の絵", "{}の画像",
    "この画像を説明してください。", "これは何ですか？", "これは{}です。",
)  # fmt: skip
PROMPT_WEIGHT = 200  # how often each of them occurs
NAME_WEIGHT = 20  # how often each name occurs; keywords occur once


def sentences(concepts: list[dict]) -> Iterator[str]:
    """Yield the training text, always in the same order."""
    for prompt in PROMPTS:
        for number in range(PROMPT_WEIGHT):
            language = LANGUAGES[number % len(LANGUAGES)] if prompt.isascii() else "ja" if _has_kana(prompt) else "zh"
            yield prompt.format(concepts[number * len(concepts) // PROMPT_WEIGHT]["name"][language])
    texts = {language: Texts(concepts, language) for language in LANGUAGES}
    for number, concept in enumerate(concepts):
        for language in LANGUAGES:
            yield from [concept["name"][language]] * NAME_WEIGHT
            yield from texts[language].keywords[number]


def _has_kana(text: str) -> bool:
    return any("\u3040" <= character <= "\u30ff" for character in text)


def train(concepts: list[dict]) -> bytes:
    """Return the tokenizer as the bytes of a SentencePiece model file."""
    # Every character of a name or a prompt, and all of printable ASCII, becomes a piece of its own.
    names = [name for concept in concepts for name in concept["name"].values()]
    required = {*string.ascii_letters, *string.digits, *string.punctuation, *"".join(names), *"".join(PROMPTS)} - {" "}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(concepts),
        model_writer=model,
        model_type="bpe",  # as the published tokenizer: LlamaTokenizer of transformers reads nothing else
        vocab_size=VOCABULARY,
        required_chars="".join(sorted(required)),
        character_coverage=0.98,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        treat_whitespace_as_suffix=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        unk_piece="<unk>",
        bos_piece="<s>",
        eos_piece="</s>",
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="the dataset of emoji_data.py")
    parser.add_argument("--out", type=Path, default=ROOT / "tiny" / "tokenizer.model", help="the model file to write")
    args = parser.parse_args()

    concepts = json.loads((args.cache / "concepts.json").read_text(encoding="utf-8"))
    model = train(concepts)
    args.out.write_bytes(model)
    print(f"{args.out}: {len(model)} bytes")


if __name__ == "__main__":
    main()
