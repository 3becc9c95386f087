"""The tokenizer of InternVL-14B: SentencePiece's own ids on every transformers release.

Reference: the checkpoint's ``tokenizer.model`` as the original's slow ``LlamaTokenizer`` read it
(docs/model.md, "Sizes" and "Texts").

Where this file differs from transformers' ``LlamaTokenizer``, and why:

* SentencePiece itself splits the text. Newer releases rebuild ``LlamaTokenizer`` on the `tokenizers` library, which
  ranks merges by vocabulary id where SentencePiece ranks them by score, so "A  double  space" and much Chinese text
  get other ids. The base class, `PreTrainedTokenizer`, has the same name and hooks in every supported release.
"""

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from .compat_internvl import pipeline_task

# The embedding is read at </s>, which the checkpoint was trained for only with texts that start with this.
PREFIX = "summarize:"
# These pipelines call a tokenizer to embed texts, and add neither the prefix nor </s>.
EMBEDDING_PIPELINES = ("zero-shot-image-classification", "feature-extraction")
Ids = list[int]


class InternVLTokenizer(PreTrainedTokenizer):
    """SentencePiece tokenizer: ``<s>`` first, ``</s>`` last on request, padded on the right with id 0.

    Special tokens spelt out in a text ("</s>") become their ids, and the text on either side of one is encoded as a
    text of its own, as in the original. `decode` is SentencePiece's, but keeps special tokens.

    Args:
        vocab_file (`str`): path of a SentencePiece model. It is the only file the constructor reads.
        unk_token, bos_token, eos_token (`str`): ids 0, 1 and 2 of the published model.
        pad_token (`str`, *optional*): defaults to `unk_token`, id 0, the id the model was trained with. A token the
            vocabulary lacks (CLIP_benchmark's ``' '``) also becomes `unk_token`: transformers would add it behind the
            last row of the embedding table, and it would split every text that contains it.
        add_bos_token (`bool`, *optional*): whether sequences start with ``<s>``; default True.
        add_eos_token (`bool`, *optional*): whether sequences end with ``</s>``; default False. Text features are read
            at ``</s>``, so embeddings need True and prompts for generation False. Both may be assigned at any time.
        added_ends (`dict[str, bool]`, *optional*): both settings as `save_pretrained` stores them; not for callers.
        default_task (`str`, *optional*): "embed" makes every call return what embeddings need: ``summarize:`` before
            the text unless it is there, and ``</s>`` after it. Pipelines that embed texts load their tokenizer with it;
            a pipeline that is given a tokenizer needs one that was loaded with it.

    Raises:
        ValueError: `vocab_file` is None (the folder has no ``tokenizer.model``), or `default_task` is something else.
        FileNotFoundError: `vocab_file` does not exist.
        RuntimeError: `vocab_file` is not a SentencePiece model.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "right"

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None,
        unk_token: str = "<unk>",
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        pad_token: str | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        added_ends: dict[str, bool] | None = None,
        default_task: str | None = None,
        **kwargs: Any,
    ):
        if default_task not in (None, "embed"):
            raise ValueError(f'`default_task` must be None or "embed", got {default_task!r}.')
        self.default_task = default_task
        if vocab_file is None:
            advice = 'Download it, or name the folder that has it (`subfolder="tiny"` in a clone).'
            raise ValueError(f"`vocab_file` must be given, got None: there is no tokenizer.model. {advice}")
        self.vocab_file = str(vocab_file)
        import sentencepiece  # the model loads without it

        self.sp_model = sentencepiece.SentencePieceProcessor()
        self.sp_model.LoadFromSerializedProto(Path(vocab_file).read_bytes())

        saved = {"bos": True, "eos": False} | (added_ends or {})
        self.add_bos_token = saved["bos"] if add_bos_token is None else add_bos_token
        self.add_eos_token = saved["eos"] if add_eos_token is None else add_eos_token

        added = {str(token) for token in kwargs.get("added_tokens_decoder", {}).values()}
        known_pad = pad_token is not None and (self._is_piece(str(pad_token)) or str(pad_token) in added)
        super().__init__(
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token if known_pad else unk_token,
            added_ends=self.added_ends,
            **kwargs,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "InternVLTokenizer":
        """Load as transformers does; in a pipeline that embeds texts, `default_task` becomes "embed"."""
        tokenizer = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if pipeline_task(kwargs) in EMBEDDING_PIPELINES:
            tokenizer.default_task = "embed"
        return tokenizer

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Encode as transformers does, after adding to each text what `default_task` needs."""
        if self.default_task == "embed":
            text = _with_prefixes(text)
        return super().__call__(text, *args, **kwargs)

    @property
    def added_ends(self) -> dict[str, bool]:
        """`add_bos_token` and `add_eos_token` under a name that `save_pretrained` keeps.

        Newer releases drop both flags from ``tokenizer_config.json``. A tokenizer saved with ``add_eos_token=True``
        would come back without ``</s>``, and its embeddings would be wrong without an error.
        """
        return {"bos": bool(self.add_bos_token), "eos": bool(self.add_eos_token)}

    @property
    def vocab_size(self) -> int:
        """Number of SentencePiece pieces (49,954 for the published model, ``[PAD]`` included)."""
        return self.sp_model.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """Every piece and added token with its id."""
        pieces = self.sp_model.id_to_piece(list(range(self.vocab_size)))
        return {piece: index for index, piece in enumerate(pieces)} | self.added_tokens_encoder

    def _is_piece(self, token: str) -> bool:
        return self.sp_model.id_to_piece(self.sp_model.piece_to_id(token)) == token

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp_model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces into a text. Special tokens stay as they are: SentencePiece would print ``<unk>`` as " ⁇ "."""
        special = set(self.all_special_tokens)
        texts: list[str] = []
        run: list[str] = []
        for token in tokens:
            if token in special:
                texts += [self.sp_model.decode(run), token]
                run = []
            else:
                run.append(token)
        return "".join(texts) + self.sp_model.decode(run)

    @property
    def _ends_in_eos(self) -> bool:
        return bool(self.add_eos_token) or self.default_task == "embed"

    def build_inputs_with_special_tokens(self, token_ids_0: Ids, token_ids_1: Ids | None = None) -> Ids:
        """Put ``<s>`` before and ``</s>`` after each sequence, where the settings say so."""
        start = [self.bos_token_id] if self.add_bos_token else []
        end = [self.eos_token_id] if self._ends_in_eos else []
        first = start + list(token_ids_0) + end
        return first if token_ids_1 is None else first + start + list(token_ids_1) + end

    def get_special_tokens_mask(
        self, token_ids_0: Ids, token_ids_1: Ids | None = None, already_has_special_tokens: bool = False
    ) -> Ids:
        """1 where `build_inputs_with_special_tokens` puts ``<s>`` or ``</s>``, 0 elsewhere."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        start, end = [1] * bool(self.add_bos_token), [1] * self._ends_in_eos
        first = start + [0] * len(token_ids_0) + end
        return first if token_ids_1 is None else first + start + [0] * len(token_ids_1) + end

    def create_token_type_ids_from_sequences(self, token_ids_0: Ids, token_ids_1: Ids | None = None) -> Ids:
        """0 for the first sequence, 1 for the second, special tokens included. The model does not use them."""
        first = [0] * len(self.build_inputs_with_special_tokens(token_ids_0))
        return first if token_ids_1 is None else first + [1] * len(self.build_inputs_with_special_tokens(token_ids_1))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the SentencePiece model to `save_directory` and return its path in a tuple."""
        name = self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        target.write_bytes(self.sp_model.serialized_model_proto())  # the bytes of the file that it was read from
        return (str(target),)


def with_prefix(text: str) -> str:
    """Put `PREFIX` before a text that does not start with it."""
    return text if text.lstrip().startswith(PREFIX) else PREFIX + text


def _with_prefixes(text: Any) -> str | list[str]:
    if isinstance(text, str):
        return with_prefix(text)
    if isinstance(text, (list, tuple)) and all(isinstance(item, str) for item in text):
        return [with_prefix(item) for item in text]
    raise TypeError(f'`text` must be a str or a list of str with `default_task="embed"`, got {type(text).__name__}.')


__all__ = ["InternVLTokenizer"]
