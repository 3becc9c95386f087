"""InternVLTokenizer equals SentencePiece itself, however it is loaded."""

import copy
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import sentencepiece

from conftest import ROOT, STUB_CONFIG, repo_class, run_python

InternVLTokenizer = repo_class("tokenization_internvl.InternVLTokenizer")
TINY_MODEL = ROOT / "tiny" / "tokenizer.model"
REAL_MODEL = Path(os.environ.get("INTERNVL_TOKENIZER", ROOT.parent / "shared" / "reference" / "tokenizer.model"))
needs_real = pytest.mark.skipif(
    not REAL_MODEL.is_file(), reason=f"the checkpoint's tokenizer.model is not at {REAL_MODEL} (INTERNVL_TOKENIZER)"
)

NAMES = {
    "en": ["goldfish", "tabby cat", "jack-o'-lantern", "CD player", "T-shirt", "Windsor tie", "great white shark"],
    "de": ["Rotkehlchen", "Fußgängerüberweg", "Käsemesser", "Straßenbahn"],
    "it": ["pesce rosso", "macchina per il caffè", "città", "perché"],
    "zh": ["金鱼", "大白鲨", "浓缩咖啡机", "鹉和儡", "中国人民的朋友"],
    "ja": ["金魚", "ホオジロザメ", "横断歩道", "かぼちゃ"],
    "ar": ["سمكة ذهبية", "آلة صنع القهوة", "قطة"],
    "ko": ["한국어 고양이", "금붕어"],
}
TEMPLATES = ["summarize:a photo of a {}.", "summarize: {}", "summarize:  a   {}  "]
TEMPLATES += ["{}", " {}", "  {}!", "1234567 {} 90"]
ODD = ["summarize: A  double  space", " ", "   ", "a", "▁", "▁ a ▁", "😀", "🐱‍👓 x", "tab\tline\nend"]
ODD += ["\u00a0x", "é", "(<a>)", "[PAD]", "\x00"]
PROMPTS = [t.format(n) for names in NAMES.values() for n in names for t in TEMPLATES] + ODD


@pytest.fixture(params=["tiny", pytest.param("real", marks=needs_real)])
def model_file(request):
    return TINY_MODEL if request.param == "tiny" else REAL_MODEL


@pytest.fixture
def tokenizer(model_file):
    return InternVLTokenizer(model_file)


@pytest.fixture
def repository(tmp_path):
    """The tokenizer's files as the Hub would serve them, with a config class that imports nothing."""
    for name in (
        "compat_internvl.py",
        "tokenization_internvl.py",
        "tokenizer_config.json",
        "tiny/tokenizer_config.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    config = {"model_type": "internvl_14b", "auto_map": {"AutoConfig": "configuration_internvl.InternVLConfig"}}
    (tmp_path / "configuration_internvl.py").write_text(STUB_CONFIG)
    for folder in (tmp_path, tmp_path / "tiny"):
        (folder / "config.json").write_text(json.dumps(config))
        shutil.copy(TINY_MODEL, folder / "tokenizer.model")
    return tmp_path


def run_fresh(code, folder):
    """Run `code` in a fresh process with an empty module cache; return the JSON that it prints last."""
    return json.loads(run_python(code, folder).stdout.splitlines()[-1])


def test_ids_are_sentencepieces_own(tokenizer, model_file):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    assert len(PROMPTS) > 200
    for prompt in PROMPTS:
        assert tokenizer(prompt)["input_ids"] == [1, *reference.encode(prompt)], prompt


def test_decode_gives_the_text_back(tokenizer):
    for prompt in PROMPTS:
        if "▁" not in prompt:  # SentencePiece writes spaces as ▁, so this one cannot come back
            assert tokenizer.decode(tokenizer(prompt)["input_ids"], skip_special_tokens=True) == prompt


@needs_real
def test_ids_of_the_published_checkpoint():
    tokenizer = InternVLTokenizer(REAL_MODEL, add_eos_token=True)
    expected = [1, 19138, 675, 29901, 319, 29871, 3765, 29871, 2913, 2]
    assert tokenizer("summarize: A  double  space")["input_ids"] == expected
    assert len(tokenizer) == 49954 and tokenizer.convert_tokens_to_ids("[PAD]") == 49953


def test_special_tokens_in_a_text_split_it(tokenizer, model_file):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    expected = [1, *reference.encode("Hello "), 1, *reference.encode("."), 2, 0]
    assert tokenizer("Hello <s>.</s><unk>")["input_ids"] == expected
    assert tokenizer.decode(expected[1:]) == "Hello <s>.</s><unk>"


def test_empty_text_has_only_bos_and_eos(tokenizer):
    assert tokenizer("")["input_ids"] == [1]
    assert tokenizer.decode([]) == ""


def test_eos_as_argument_and_as_attribute(model_file):
    tokenizer = InternVLTokenizer(model_file, add_eos_token=True)
    assert tokenizer("a cat")["input_ids"][-1] == 2
    tokenizer.add_eos_token = False
    assert tokenizer("a cat")["input_ids"][-1] != 2
    tokenizer.add_eos_token = True
    tokenizer.add_bos_token = False
    assert [tokenizer("a cat")["input_ids"][i] for i in (0, -1)] == [tokenizer.encode("a cat")[0], 2]
    assert tokenizer("a cat")["input_ids"][0] != 1


def test_truncation_keeps_bos_and_eos(tokenizer):
    tokenizer.add_eos_token = True
    ids = tokenizer("word " * 200, max_length=80, truncation=True)["input_ids"]
    assert len(ids) == 80 and ids[0] == 1 and ids[-1] == 2


def test_padding_is_zeros_on_the_right(tokenizer):
    batch = tokenizer(["a", "a much longer text"], padding=True, return_tensors="pt")
    length = len(tokenizer("a")["input_ids"])
    assert batch["input_ids"][0, length:].tolist() == [0] * (batch["input_ids"].shape[1] - length) != []
    assert batch["attention_mask"].tolist() == [
        [int(i < length) for i in range(batch["input_ids"].shape[1])],
        [1] * batch["input_ids"].shape[1],
    ]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_pad_token_assignments_of_the_published_scripts(model_file):
    tokenizer = InternVLTokenizer(model_file)
    ids = tokenizer("a b  c")["input_ids"]
    tokenizer.pad_token_id = 0
    assert (tokenizer.pad_token_id, tokenizer.pad_token) == (0, "<unk>")
    tokenizer.pad_token = " "
    assert tokenizer.pad_token_id == 0
    assert tokenizer(["a b  c", "a " * 9], padding=True)["input_ids"][0][: len(ids)] == ids


def test_unknown_pad_token_in_the_constructor_does_not_grow_the_vocabulary(model_file):
    tokenizer = InternVLTokenizer(model_file, pad_token=" ")
    assert tokenizer.pad_token_id == 0 and len(tokenizer) == tokenizer.vocab_size
    assert tokenizer("a b")["input_ids"] == InternVLTokenizer(model_file)("a b")["input_ids"]


def test_added_tokens_survive_saving(tokenizer, tmp_path):
    tokenizer.add_special_tokens({"pad_token": "[MYPAD]"})
    tokenizer.save_pretrained(tmp_path)
    loaded = InternVLTokenizer.from_pretrained(tmp_path)
    assert loaded.pad_token_id == tokenizer.pad_token_id == tokenizer.vocab_size


def test_masks_and_pairs_count_bos_and_eos(tokenizer):
    tokenizer.add_eos_token = True
    assert tokenizer.get_special_tokens_mask([5, 6]) == [1, 0, 0, 1]
    assert tokenizer.get_special_tokens_mask([5], [6]) == [1, 0, 1, 1, 0, 1]
    assert tokenizer.create_token_type_ids_from_sequences([5], [6]) == [0, 0, 0, 1, 1, 1]
    assert tokenizer.num_special_tokens_to_add() == 2


def test_pickle_and_deepcopy(tokenizer):
    tokenizer.add_eos_token = True
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other("  a  b")["input_ids"] == tokenizer("  a  b")["input_ids"]


@pytest.mark.parametrize("eos", [True, False])
def test_saved_tokenizer_keeps_bos_and_eos(tokenizer, tmp_path, eos):
    tokenizer.add_eos_token = eos
    tokenizer.save_pretrained(tmp_path)
    loaded = InternVLTokenizer.from_pretrained(tmp_path)
    assert loaded.add_eos_token is eos and loaded.add_bos_token is True
    assert InternVLTokenizer.from_pretrained(tmp_path, add_eos_token=not eos).add_eos_token is not eos
    assert (tmp_path / "tokenizer.model").read_bytes() == Path(tokenizer.vocab_file).read_bytes()


def test_saving_without_the_original_file(tmp_path):
    source = shutil.copy(TINY_MODEL, tmp_path / "gone.model")
    tokenizer = InternVLTokenizer(source)
    source.unlink()
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = InternVLTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded("a  cat")["input_ids"] == tokenizer("a  cat")["input_ids"]


def test_constructor_is_silent(model_file, capfd):
    InternVLTokenizer(model_file)
    assert capfd.readouterr() == ("", "")


def test_missing_model_file_is_named():
    with pytest.raises(ValueError, match="vocab_file.*tokenizer.model"):
        InternVLTokenizer(None)
    with pytest.raises(FileNotFoundError, match="no/such"):
        InternVLTokenizer("no/such/tokenizer.model")
    with pytest.raises(RuntimeError):
        InternVLTokenizer(__file__)


def test_fresh_process_with_remote_code(repository):
    code = f"""
import json
from transformers import AutoTokenizer
rows = []
for options in ({{}}, {{"subfolder": "tiny"}}):
    t = AutoTokenizer.from_pretrained({str(repository)!r}, trust_remote_code=True, add_eos_token=True, **options)
    rows.append([type(t).__name__, t(" a  cat")["input_ids"], t.padding_side])
t.save_pretrained({str(repository / "saved")!r})
print(json.dumps(rows))
"""
    ids = InternVLTokenizer(TINY_MODEL, add_eos_token=True)(" a  cat")["input_ids"]
    assert run_fresh(code, repository) == [["InternVLTokenizer", ids, "right"]] * 2
    code = f"""
import json
from transformers import AutoTokenizer
t = AutoTokenizer.from_pretrained({str(repository / "saved")!r}, trust_remote_code=True)
print(json.dumps([type(t).__name__, t(" a  cat")["input_ids"]]))
"""
    assert run_fresh(code, repository) == ["InternVLTokenizer", ids]


def test_model_card_call_without_remote_code(repository):
    """The published snippet passes no trust_remote_code: the library's tokenizer must at least have the right shape."""
    code = f"""
import json
from transformers import AutoTokenizer
t = AutoTokenizer.from_pretrained({str(repository)!r}, use_fast=False, add_eos_token=True)
t.pad_token_id = 0
with_eos = t(["a", "a b c d"], max_length=80, truncation=True, padding="max_length", return_tensors="pt")["input_ids"]
t.add_eos_token = False
print()  # ends the line of the question that 5.x asks on standard output
print(json.dumps([type(t).__name__, with_eos.tolist(), t("a")["input_ids"]]))
"""
    name, with_eos, without = run_fresh(code, repository)
    assert name == "LlamaTokenizer"
    assert all(len(row) == 80 and row[0] == 1 and row[-1] == 0 and row.count(2) == 1 for row in with_eos)
    assert without == with_eos[0][: with_eos[0].index(2)]
