"""Fine-tuning: what finetune.py makes of data, what it trains, and that the number of processes does not matter."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from conftest import LAST_RESORT, ROOT, TOLERANCE, load, repo_class, run_python

_cache = tempfile.TemporaryDirectory(prefix="internvl-datasets-")
os.environ["HF_DATASETS_CACHE"] = _cache.name  # read when `datasets` is imported
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

import finetune  # noqa: E402
import finetune_data  # noqa: E402

PICTURES = ROOT / "examples" / "pictures"
NAMES = [(entry["file"], entry["name"]) for entry in json.loads((PICTURES / "examples.json").read_text("utf-8"))]
LANGUAGES = {"en": "English caption:", "zh": "中文描述:", "ja": "日本語の説明:"}
LOSSES = ("loss", "loss_itm", "loss_itc", "loss_itg")


def rows(count: int = 12, shift: int = 0) -> list[dict]:
    """Two English captions, a Chinese one in a list, a Japanese one; `shift` gives images the names of others."""
    found = []
    for index in range(count):
        name = NAMES[(index + shift) % count][1]
        english = [name["en"], f"a photo of {name['en']}"]
        found.append({"file": NAMES[index][0], "en": english, "zh": [name["zh"]], "ja": name["ja"]})
    return found


def table(entries: list[dict]) -> "datasets.Dataset":
    paths = [str(PICTURES / entry["file"]) for entry in entries]
    columns = {name: [entry[name] for entry in entries] for name in LANGUAGES}
    return datasets.Dataset.from_dict({"image": paths, **columns}).cast_column("image", datasets.Image())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """A dataset of 12 rows as `save_to_disk` writes it."""
    folder = tmp_path_factory.mktemp("data") / "saved"
    table(rows()).save_to_disk(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """transformers 4.57 leaves `bf16` of one run in the environment of the next."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture
def arguments(saved, trained, tmp_path):
    def make(**changes):
        options = {
            "model": str(trained),
            "data": saved,
            "output_dir": str(tmp_path / "out"),
            "text_columns": list(LANGUAGES),
            "prompts": list(LANGUAGES.values()),
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "max_steps": 1,
        }
        return finetune.Arguments(**options | changes)

    return make


@pytest.fixture(scope="module")
def processor(trained):
    from transformers import AutoProcessor

    return load(trained, AutoProcessor)


def of_rank(rank: int, world: int, objective: str = "pretraining") -> SimpleNamespace:
    return SimpleNamespace(process_index=rank, world_size=world, seed=3, crop="center", objective=objective)


def logs(trainer, key: str = "loss_itm") -> list[dict]:
    return [entry for entry in trainer.state.log_history if key in entry]


# ------------------------------------------------------------------------------------------------------------ data


def image_folder(folder):
    for entry in rows():
        shutil.copy(PICTURES / entry["file"], folder)
    lines = [json.dumps({"file_name": entry.pop("file"), **entry}, ensure_ascii=False) for entry in rows()]
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


def parquet(folder):
    table(rows()).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def with_splits(folder):
    datasets.DatasetDict({"train": table(rows()), "test": table(rows(3))}).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("write", [image_folder, parquet, with_splits])
def test_every_kind_of_dataset_gives_the_same_captions(arguments, tmp_path, write):
    folder = tmp_path / "rows"
    folder.mkdir()
    given = arguments(data=str(write(folder)))
    captions = finetune_data.Captions(finetune_data.load_rows(given)[0], given)
    found = {tuple(map(tuple, captions.of_row(index))): captions.image(index).size for index in range(len(captions))}
    expected = {(tuple(entry["en"]), tuple(entry["zh"]), (entry["ja"],)) for entry in rows()}
    assert set(found) == expected and set(found.values()) == {(256, 256)}


def test_held_out_rows_are_not_trained(arguments, tmp_path):
    folder = with_splits(tmp_path / "rows")
    train, held_out = finetune_data.load_rows(arguments(data=str(folder), held_out="test"))
    assert (len(train), len(held_out)) == (12, 3)
    train, held_out = finetune_data.load_rows(arguments(data=str(folder), held_out="5"))
    assert (len(train), len(held_out)) == (7, 5)
    assert set(train["ja"]).isdisjoint(held_out["ja"])


def test_captions_are_all_taken_in_time_and_follow_from_the_epoch(arguments, saved):
    captions = finetune_data.Captions(datasets.load_from_disk(saved), arguments())
    taken = [captions[epoch, 5] for epoch in range(60)]
    entry = rows()[5]
    expected = {(LANGUAGES[name], text) for name in ("en", "zh") for text in entry[name]}
    expected.add((LANGUAGES["ja"], entry["ja"]))
    assert {(example.prompt, example.text) for example in taken} == expected
    assert taken == [captions[epoch, 5] for epoch in range(60)]


def test_batches_use_each_row_once_an_epoch_and_change_with_it():
    batches = finetune_data.GlobalBatches(11, 4, seed=0)
    epochs = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        keys = [key for batch in batches for key in batch]
        assert len(batches) == 2 and {number for number, _ in keys} == {epoch}
        assert len({row for _, row in keys}) == 8
        epochs.append([row for _, row in keys])
    assert epochs[0] != epochs[1]


@pytest.fixture
def captions(arguments, saved):
    return finetune_data.Captions(datasets.load_from_disk(saved), arguments())


def test_a_caption_is_its_prompt_and_the_text_and_only_the_text_is_learnt(captions, processor):
    examples = [captions[0, row] for row in range(4)]
    batch = finetune_data.Collator(captions, processor, of_rank(0, 1))(examples)
    tokens = processor.tokenizer
    for row, example in enumerate(examples):
        prompt, text = (tokens.convert_tokens_to_ids(tokens.tokenize(part)) for part in (example.prompt, example.text))
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == [1, *prompt, *text, 2]
        assert batch["labels"][row][real].tolist() == [-100] * (1 + len(prompt)) + [*text, 2]
        assert set(batch["labels"][row][~real].tolist()) <= {-100}


def unpadded(ids: torch.Tensor) -> list[list[int]]:
    return [[number for number in row if number not in (0, -100)] for row in ids.tolist()]


def test_ranks_share_one_batch_so_that_the_halves_stay_halves(captions, processor):
    """Rank r's i-th row is row r + i W of the batch of one process, which gives the first half a wrong text."""
    examples = [captions[1, row] for row in range(8)]
    whole = finetune_data.Collator(captions, processor, of_rank(0, 1))(examples)
    ranks = [finetune_data.Collator(captions, processor, of_rank(rank, 2))(examples) for rank in range(2)]
    for name in ("positive_input_ids", "summarize_input_ids", "input_ids", "labels"):
        assert unpadded(whole[name]) == [unpadded(ranks[row % 2][name])[row // 2] for row in range(8)], name
    for name in ("pixel_values", "scores"):
        assert_close(whole[name], torch.stack([ranks[row % 2][name][row // 2] for row in range(8)]), rtol=0, atol=0)
    for name in ("all_input_ids", "all_attention_mask"):
        assert torch.equal(whole[name], ranks[0][name]) and torch.equal(whole[name], ranks[1][name])
    tokens = [(rank["labels"] != -100).sum() for rank in ranks]
    assert tokens[0] != tokens[1], "the test needs ranks with unequally many tokens"
    for rank, count in zip(ranks, tokens):
        assert_close(rank["caption_share"], 2 * count / sum(tokens))


def test_rows_with_the_same_text_are_no_negatives_of_each_other(captions, processor):
    texts = ["fox", "panda", "fox", "key"]
    examples = [finetune_data.Example(0, row, LANGUAGES["en"], text) for row, text in enumerate(texts)]
    batch = finetune_data.Collator(captions, processor, of_rank(1, 2, "retrieval"))(examples)
    assert batch["scores"].isneginf().tolist() == [[False, True, False, False], [False, False, False, True]]
    batch = finetune_data.Collator(captions, processor, of_rank(0, 2, "retrieval"))(examples)
    assert batch["scores"].isneginf().tolist() == [[True, False, True, False]] * 2
    assert batch["image_ids"].tolist() == [0, 0]


def test_noise_draws_from_the_softmax(captions, processor):
    examples = [finetune_data.Example(epoch, 7, "", "") for epoch in range(6000)]
    noise = finetune_data.Collator(captions, processor, of_rank(0, 1)).noise(examples, 3)
    logits = torch.tensor([0.0, 1.0, 2.0])
    shares = (logits + noise).argmax(dim=1).bincount() / len(examples)
    assert_close(shares, logits.softmax(0), rtol=0, atol=0.025)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": ""}, "`data` and `output_dir` must be given"),
        ({"per_device_train_batch_size": 3}, "must be even: half match, half do not; got 3"),
        ({"train": "lora"}, r"go together, got \(0, 0\)"),
        ({"lora_vision": 4}, r"go together, got \(4, 0\)"),
        ({"train": "lora", "lora_vision": 4, "lora_qllama": -1}, "go together"),
        ({"merge": True}, "`merge` needs `train='lora'`, got 'full'"),
        ({"prompts": ["a:", "b:"]}, "3 columns and 2 prompts"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(**changes)


def test_retrieval_takes_odd_batches(arguments):
    assert arguments(objective="retrieval", per_device_train_batch_size=3).per_device_train_batch_size == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"split": "validation"}, r"has the splits \['train', 'test'\], and no 'validation'"),
        ({"held_out": "dev"}, "and no 'dev'"),
        ({"held_out": "12"}, "must leave some of 12 rows, got 12"),
        ({"image_column": "picture"}, "and no 'picture'"),
        ({"text_columns": ["fr"], "prompts": ["Légende:"]}, "and no 'fr'"),
        ({"per_device_train_batch_size": 14}, "14 rows, got 12"),
    ],
)
def test_data_that_is_not_there_is_named(arguments, tmp_path, changes, message):
    given = arguments(data=str(with_splits(tmp_path / "rows")), **changes)
    with pytest.raises(ValueError, match=message):
        found = finetune_data.Captions(finetune_data.load_rows(given)[0], given)
        finetune_data.GlobalBatches(len(found), given.per_device_train_batch_size, 0)


def test_a_row_without_caption_is_named(arguments):
    empty = {"file": "fox.png", "en": [" "], "zh": [], "ja": None}
    with pytest.raises(ValueError, match="no caption in row 2"):
        finetune_data.Captions(table([*rows(2), empty]), arguments())


def test_a_batch_of_one_text_is_refused(captions, processor):
    examples = [finetune_data.Example(0, row, "a:", "fox") for row in range(2)]
    with pytest.raises(ValueError, match="two different texts, got 2 times 'fox'"):
        finetune_data.Collator(captions, processor, of_rank(0, 1))(examples)


def test_an_output_folder_with_checkpoints_is_not_overwritten(arguments, tmp_path):
    for step in (3, 12):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
    assert finetune.checkpoint_to_resume(arguments()) is None  # Trainer writes trainer_state.json last
    (tmp_path / "out" / "checkpoint-3" / "trainer_state.json").touch()
    with pytest.raises(ValueError, match="checkpoint-3: add `--resume True`"):
        finetune.checkpoint_to_resume(arguments())
    assert finetune.checkpoint_to_resume(arguments(resume=True)).endswith("checkpoint-3")
    with pytest.raises(ValueError, match="`resume` needs a checkpoint"):
        finetune.checkpoint_to_resume(arguments(resume=True, output_dir=str(tmp_path / "new")))


# ------------------------------------------------------------------------------------------------ what is trained


def trained_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_adapters_go_where_the_original_put_them(arguments):
    given = arguments(train="lora", lora_vision=4, lora_qllama=2)
    model = finetune.load_processor_and_model(given)[1]
    ranks = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"], layer.lora_dropout)
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
    config = model.config
    vision = [f"vision_model.encoder.layers.{i}." for i in range(config.vision_config.num_hidden_layers)]
    qllama = [f"qllama.model.layers.{i}." for i in range(config.qllama_config.num_hidden_layers)]
    of_vision = {layer + name for layer in vision for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    of_qllama = {layer + name for layer in qllama for name in attention + mlp}
    assert set(ranks) == of_vision | of_qllama
    for name, (rank, scaling, dropout) in ranks.items():
        assert rank == (4 if name in of_vision else 2), name
        assert scaling == 2 and dropout["default"].p == 0.05, name
    assert all(".lora_" in name for name in trained_names(model))


def test_adapters_of_one_tower_leave_the_other_alone(arguments):
    model = finetune.load_processor_and_model(arguments(train="lora", lora_qllama=2))[1]
    assert all("qllama.model.layers" in name for name in trained_names(model))


def test_heads_are_all_that_is_not_a_tower(arguments):
    model = finetune.load_processor_and_model(arguments(train="heads", objective="retrieval"))[1]
    others = {name for name, _ in model.named_parameters() if not name.startswith(("vision_model.", "qllama."))}
    assert trained_names(model) == others
    assert {"query_tokens", "text_projection", "logit_scale"} < others


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"train": "heads"}, {"train": "lora", "lora_vision": 2, "lora_qllama": 2}], ids=str
)
@pytest.mark.parametrize("objective", finetune.CLASSES)
def test_all_that_is_trained_gets_a_gradient(arguments, objective, changes, checkpointing):
    """A parameter without one would stop DistributedDataParallel, which is told that there is none."""
    given = arguments(objective=objective, gradient_checkpointing=checkpointing, **changes)
    trainer = finetune.make_trainer(given)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model.train(), batch).backward()
    without = {name for name, parameter in trainer.model.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in trainer.model.named_parameters()} - trained_names(trainer.model)


@pytest.mark.parametrize("wanted", [False, True])
def test_gradient_checkpointing_is_what_was_asked_for(arguments, wanted):
    trainer = finetune.make_trainer(arguments(gradient_checkpointing=wanted))
    trainer.train()  # which is what turns it on
    model = trainer.model
    assert model.vision_model.encoder.gradient_checkpointing is wanted
    assert model.qllama.model.gradient_checkpointing is wanted


# ---------------------------------------------------------------------------------------------------------- a step


def test_negatives_are_drawn_by_the_models_own_logits(arguments, trained):
    trainer = finetune.make_trainer(arguments())
    batch = next(iter(trainer.get_train_dataloader()))
    model = load(trained, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(batch["summarize_input_ids"], batch["pixel_values"], batch["summarize_attention_mask"])
    assert_close(trainer.similarities(batch), expected.logits_per_image, **TOLERANCE)
    assert trainer.model.training
    seen = {}
    trainer.model.register_forward_pre_hook(lambda module, _, given: seen.update(given), with_kwargs=True)
    trainer.compute_loss(trainer.model, batch)
    wrong = (expected.logits_per_image + batch["scores"]).argmax(dim=1)
    assert torch.equal(seen["negative_input_ids"], batch["all_input_ids"][wrong])
    own = [row for row in range(4) if torch.equal(seen["negative_input_ids"][row], seen["positive_input_ids"][row])]
    assert not own


def test_random_negatives_need_no_other_pass(arguments, monkeypatch):
    trainer = finetune.make_trainer(arguments(negatives="random"))
    monkeypatch.setattr(trainer, "similarities", lambda batch: pytest.fail("a pass for nothing"))
    assert trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).isfinite()


def test_losses_are_logged_apart_and_are_the_models(arguments, trained):
    trainer = finetune.make_trainer(arguments())
    batch = next(iter(trainer.get_train_dataloader()))
    scores = batch["scores"] + trainer.similarities(batch)
    wrong = scores.argmax(dim=1)
    given = {name: value for name, value in batch.items() if not name.startswith(("all_", "scores", "caption_share"))}
    given |= {f"negative_{name}": batch[f"all_{name}"][wrong] for name in ("input_ids", "attention_mask")}
    model_class = repo_class("modeling_internvl.InternVLForPreTraining")
    expected = model_class.from_pretrained(trained, dtype=torch.float32).train()(**given)
    trainer.train()
    logged = logs(trainer)[0]
    for name in LOSSES:
        assert_close(logged[name], expected[name].item(), rtol=1e-4, atol=1e-4)


def test_accumulation_is_the_mean_of_micro_batches(arguments):
    plain = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    trainer = finetune.make_trainer(arguments(gradient_accumulation_steps=3, **plain))
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    losses = []
    for batch in trainer.get_train_dataloader():
        losses.append(trainer.compute_loss(trainer.model, batch))
        losses[-1].backward()
    gradients = {
        name: parameter.grad / 3 for name, parameter in trainer.model.named_parameters() if parameter.grad is not None
    }
    trainer.model.zero_grad()
    trainer.parts = []
    trainer.train()
    assert_close(logs(trainer)[0]["loss"], torch.stack(losses).mean().item(), rtol=1e-4, atol=1e-4)
    after = dict(trainer.model.named_parameters())
    for name, gradient in gradients.items():
        assert_close(
            before[name] - after[name].detach(), gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_mixed_precision_trains_float32_weights(arguments):
    exact = finetune.make_trainer(arguments())
    exact.train()
    trainer = finetune.make_trainer(arguments(bf16=True))
    before = trainer.model.qllama.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer.train()
    after = trainer.model.qllama.model.layers[0].mlp.up_proj.weight
    assert after.dtype == torch.float32 and not torch.equal(before, after)
    got, expected = logs(trainer)[0], logs(exact)[0]
    assert got["loss_itg"] != expected["loss_itg"] and abs(got["loss"] - expected["loss"]) < 0.2


def test_wrong_names_are_learnt(arguments, tmp_path):
    """Every image gets the name of another: at first nothing is found, soon nearly everything."""
    table(rows(shift=1)).save_to_disk(tmp_path / "shifted")
    given = arguments(
        data=str(tmp_path / "shifted"),
        held_out="train",
        max_steps=24,
        per_device_train_batch_size=12,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
    )
    trainer = finetune.make_trainer(given)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_image_to_text_r1"] < 0.2 and before["eval_caption_exact"] < 0.2
    assert after["eval_image_to_text_r1"] > 0.8 and after["eval_text_to_image_r1"] > 0.8
    history = logs(trainer)
    for name in LOSSES:
        first, last = (sum(entry[name] for entry in part) for part in (history[:4], history[-4:]))
        assert last < 0.8 * first, name


# ------------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_counts_what_the_model_finds(arguments, trained, processor):
    trainer = finetune.make_trainer(arguments(held_out="train", per_device_eval_batch_size=5))
    found = trainer.evaluate()
    model = load(trained, dtype=torch.float32).eval()
    entries = rows()
    texts = [text for entry in entries for text in (*entry["en"], *entry["zh"], entry["ja"])]
    pixels = processor(images=[PICTURES / entry["file"] for entry in entries]).pixel_values
    with torch.no_grad():
        logits = model(**processor(text=texts), pixel_values=pixels, mode="InternVL-G").logits_per_image
    for k in (1, 5, 10):
        nearest = [[texts[i] for i in row.topk(k).indices] for row in logits]
        hits = [bool(set(names) & {*entry["en"], *entry["zh"], entry["ja"]}) for names, entry in zip(nearest, entries)]
        assert_close(found[f"eval_image_to_text_r{k}"], sum(hits) / len(hits))
        hits = [column // 4 in logits[:, column].topk(k).indices.tolist() for column in range(len(texts))]
        assert_close(found[f"eval_text_to_image_r{k}"], sum(hits) / len(hits))
    right = 0
    for name, prompt in LANGUAGES.items():
        ids = model.generate(pixels, **processor(text=prompt, task="caption"))
        written = processor.batch_decode(ids, skip_special_tokens=True)
        right += sum(
            text.strip() in ([own] if isinstance(own := entry[name], str) else own)
            for text, entry in zip(written, entries)
        )
    assert 0 < right < 36
    assert_close(found["eval_caption_exact"], right / 36)


def test_a_run_prints_metrics_before_training_each_loss_and_metrics_after_it(arguments, capsys):
    trainer = finetune.make_trainer(arguments(held_out="4", max_steps=2))
    finetune.run(trainer, None)
    lines = capsys.readouterr().out.splitlines()
    starts = [
        "8 images to train on, 4 held out",
        "before training: image_to_text_r1",
        "step 1/2: loss",
        "step 2/2: loss",
    ]
    places = [next(n for n, line in enumerate(lines) if line.startswith(start)) for start in starts]
    assert places == sorted(places) and any(line.startswith("after step 2: image_to_text_r1") for line in lines)
    first = logs(trainer)[0]
    parts = f"matching {first['loss_itm']:.4f} + contrast {first['loss_itc']:.4f} + captions {first['loss_itg']:.4f}"
    assert f"step 1/2: loss {first['loss']:.4f} = {parts}; learning rate" in lines[places[2]]
    assert "{" not in "".join(lines)


def test_without_held_out_rows_nothing_is_evaluated(arguments):
    assert arguments(held_out="4").eval_on_start and not arguments(held_out="4", eval_on_start=False).eval_on_start
    assert not arguments().eval_on_start


def test_help_begins_with_our_own_options(capsys):
    with pytest.raises(SystemExit):
        finetune.parse(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: python examples/finetune.py --data FOLDER --output_dir FOLDER [options]\n")
    ours, theirs = text.split("options of transformers' Trainer")
    assert all(f"--{name} " in ours for name in finetune.Options.__dataclass_fields__)
    assert "--learning_rate " in theirs and "--learning_rate " not in ours


def test_the_command_line_and_python_give_the_same_arguments(arguments, saved, trained, tmp_path):
    command = f"--model {trained} --data {saved} --output_dir {tmp_path / 'out'} --text_columns en zh ja --prompts"
    options = "--per_device_train_batch_size 4 --use_cpu --disable_tqdm True --save_strategy no --max_steps 1"
    given = finetune.parse([*command.split(), *LANGUAGES.values(), *options.split()])
    wanted = arguments(logging_steps=given.logging_steps)
    of_a_moment = {"logging_dir": ""}  # transformers 4.57 puts the time into it
    assert given.to_dict() | of_a_moment == wanted.to_dict() | of_a_moment


def test_hits_are_counted_in_rows():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    right = torch.tensor([[False, True, False], [False, False, True]])
    assert [finetune.hits(logits, right, k) for k in (1, 2, 10)] == [0.5, 1.0, 1.0]


# ---------------------------------------------------------------------------------------- checkpoints, saved models


def test_training_goes_on_where_it_was_stopped_in_a_later_epoch(arguments, tmp_path):
    """Three batches an epoch: step 4 is the first of the second epoch, whose order must not be the first one's."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-3}
    whole = finetune.make_trainer(arguments(**options))
    whole.train()
    shutil.rmtree(tmp_path / "out" / "checkpoint-6", ignore_errors=True)
    given = arguments(resume=True, **options)
    resumed = finetune.make_trainer(given)
    checkpoint = finetune.checkpoint_to_resume(given)
    assert checkpoint.endswith("checkpoint-4")
    resumed.train(resume_from_checkpoint=checkpoint)
    one, other = logs(whole), logs(resumed)
    assert [entry["step"] for entry in other] == [1, 2, 3, 4, 5, 6]
    for step in (4, 5):
        for name in LOSSES:
            assert_close(one[step][name], other[step][name], rtol=1e-4, atol=1e-4)
    assert abs(one[4]["loss"] - one[1]["loss"]) > 0.01  # the second epoch's second batch is another


IN_A_FRESH_PROCESS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModel, AutoProcessor

base, full, adapter, picture, out = sys.argv[1:]
load = lambda path: AutoModel.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(adapter, trust_remote_code=True)
pixels = AutoProcessor.from_pretrained(full, trust_remote_code=True)(images=picture).pixel_values
texts = processor(text=["fox", "すし"])

@torch.no_grad()
def outputs(model):
    logits = model(**texts, pixel_values=pixels, mode="InternVL-G").logits_per_image
    matches = model.match(pixels, **processor(text=["fox"], task="match"))
    return type(model).__name__, logits, matches, model.generate(pixels, max_new_tokens=5)

adapted = PeftModel.from_pretrained(load(base), adapter).get_base_model()
torch.save([outputs(load(base)), outputs(load(full)), outputs(adapted), outputs(load(adapter + "/merged"))], out)
"""


def loaded_as_printed(text: str) -> list:
    """The models that the last lines of a run load."""
    lines = [line.strip() for line in text.partition("Saved to ")[2].splitlines()[1:]]
    found: dict = {}
    models = []
    for line in lines:
        exec(line, found)
        models += [found["model"]] if line.startswith("model = ") else []
    return models


def test_what_is_saved_loads_in_a_fresh_process_and_merging_changes_nothing(arguments, trained, tmp_path, capsys):
    full, adapter = (arguments(output_dir=str(tmp_path / name), learning_rate=1e-3, max_steps=2) for name in "ab")
    adapter.train, adapter.lora_vision, adapter.lora_qllama, adapter.merge = "lora", 2, 3, True
    adapter.learning_rate = 3e-2
    printed = []
    for given in (full, adapter):
        finetune.main(given)
        printed += loaded_as_printed(capsys.readouterr().out)
    assert [type(model).__name__ for model in printed] == ["InternVLModel", "PeftModel", "InternVLModel"]
    picture, out = PICTURES / "fox.png", tmp_path / "out.pt"
    run_python(IN_A_FRESH_PROCESS, tmp_path, trained, tmp_path / "a", tmp_path / "b", picture, out)
    base, tuned, adapted, merged = torch.load(out)
    assert {name for name, *_ in (base, tuned, adapted, merged)} == {"InternVLModel"}
    for other in (tuned, adapted):
        assert (other[1] - base[1]).abs().max() > 0.05, "the training must have changed something"
    for one, other in zip(adapted[1:], merged[1:]):
        assert_close(one, other, **TOLERANCE)
    for folder in (tmp_path / "a", tmp_path / "b" / "merged"):
        for name in finetune.COMPANIONS:
            assert (folder / name).read_bytes() == (trained / name).read_bytes()
    assert not (tmp_path / "b" / "modules.json").exists(), "adapters are no model"
    names = load_file(tmp_path / "a" / "model.safetensors")
    assert names.keys() == load(trained).state_dict().keys() and names["logit_scale"].shape == ()


@pytest.mark.heavy
def test_an_interrupted_run_says_how_to_resume_and_does(saved, trained, tmp_path):
    out = tmp_path / "out"
    command = f"{ROOT / 'examples' / 'finetune.py'} --model {trained} --data {saved} --output_dir {out} --use_cpu"
    command += " --text_columns en --train heads --per_device_train_batch_size 4 --save_steps 2"

    def start(*more: str) -> subprocess.Popen:
        # A shell starts commands in the background with SIGINT ignored, and children inherit that.
        listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with (tmp_path / "log").open("w") as log:
            options = {"stdout": log, "stderr": log, "preexec_fn": listens, "cwd": tmp_path}
            return subprocess.Popen([sys.executable, *command.split(), *more], **options)

    process = start("--max_steps", "100000", "--save_total_limit", "3")
    end = time.monotonic() + LAST_RESORT
    while not finetune.last_checkpoint(str(out)) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=LAST_RESORT) == 130
    log, last = (tmp_path / "log").read_text("utf-8"), finetune.last_checkpoint(str(out))
    assert last is not None and log.splitlines()[-1] == (
        f"Interrupted. {last} is saved: the same command with `--resume True` continues from it."
    )
    assert "Traceback" not in log and "step 1/100000: loss" in log
    step = int(Path(last).name.partition("-")[2])
    process = start("--max_steps", str(step + 1), "--resume", "True")
    assert process.wait(timeout=LAST_RESORT) == 0
    log = (tmp_path / "log").read_text("utf-8")
    assert f"step {step + 1}/{step + 1}: loss" in log and f"step {step}/" not in log and "Saved to" in log


def test_an_interrupt_before_the_first_checkpoint_says_so(arguments):
    text = finetune.interrupted(arguments(save_strategy="steps", save_steps=20))
    assert "nothing is saved" in text and "(20) steps" in text and "--resume True" in text


# -------------------------------------------------------------------------------------------- several processes

RANK = """
import json, sys
import finetune

if sys.argv[2] == "fsdp":
    # accelerate offers FSDP on accelerators only. The rest of its way there works on a CPU too, once it is told.
    import transformers.trainer
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    class Told(Accelerator):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            for state in (AcceleratorState, PartialState):
                state._shared_state["distributed_type"] = DistributedType.FSDP
            AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()

    transformers.trainer.Accelerator = Told

trainers = []
make_trainer = finetune.make_trainer
finetune.make_trainer = lambda arguments: trainers.append(make_trainer(arguments)) or trainers[-1]
finetune.main(finetune.Arguments(**json.loads(sys.argv[1])))
for module in trainers[0].model.modules():
    if hasattr(module, "reshard"):
        module.reshard()  # FSDP2 keeps the top together after an evaluation
sharded = {name for name, p in trainers[0].model.named_parameters() if type(p.data).__name__ == "DTensor"}
everything = {name for name, p in trainers[0].model.named_parameters()}
assert sharded == (everything if sys.argv[2] == "fsdp" else set()), everything - sharded
"""


def fsdp_environment() -> dict[str, str]:
    """What `accelerate launch --config_file examples/fsdp2.yaml` puts into the environment, in full precision."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    command = ["--config_file", str(ROOT / "examples" / "fsdp2.yaml"), "--mixed_precision", "no", "finetune.py"]
    before = dict(os.environ)
    try:
        environment = prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args(command))[0])
    finally:
        os.environ.clear()
        os.environ.update(before)
    return {name: value for name, value in environment.items() if "FSDP" in name or name.startswith("ACCELERATE_")}


def run_two(options: dict, kind: str, folder) -> None:
    script = folder / "rank.py"
    script.write_text(RANK)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "localhost:0", str(script), json.dumps(options), kind]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "examples")} | (fsdp_environment() if kind == "fsdp" else {})
    done = subprocess.run(
        [sys.executable, *launch], env=environment, cwd=folder, capture_output=True, text=True, timeout=LAST_RESORT
    )
    assert done.returncode == 0, done.stderr[-6000:]


FAST = ("pretraining", "ddp")


@pytest.mark.heavy
@pytest.mark.parametrize(
    "objective, kind",
    [
        pytest.param(objective, kind, marks=[] if (objective, kind) == FAST else pytest.mark.slow)
        for objective in finetune.CLASSES
        for kind in ("ddp", "fsdp")
    ],
)
def test_two_processes_are_one(saved, trained, tmp_path, objective, kind):
    """Losses, metrics and weights of two steps, with all weights trained by SGD, so that gradients are what is seen."""
    options = {
        "model": str(trained), "data": saved, "objective": objective, "held_out": "3", "eval_strategy": "steps",
        "text_columns": list(LANGUAGES), "prompts": list(LANGUAGES.values()), "use_cpu": True, "max_steps": 2,
        "logging_steps": 1, "eval_steps": 2, "disable_tqdm": True, "save_strategy": "no", "optim": "sgd",
        "learning_rate": 0.01, "per_device_eval_batch_size": 2,
    }  # fmt: skip
    one = options | {"output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 8}
    two = options | {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 4}
    finetune.main(finetune.Arguments(**one))
    run_two(two, kind, tmp_path)
    single, double = (json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("one", "two"))
    compared = set()
    for expected, got in zip(single["log_history"], double["log_history"], strict=True):
        assert expected.keys() == got.keys()
        for name in expected:
            if name.startswith(("loss", "eval_", "grad_norm")):
                assert_close(got[name], expected[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
                compared.add(name)
    parts = {"loss_itg", "eval_caption_exact"} if objective == "pretraining" else set()
    assert compared > {"loss", "loss_itm", "loss_itc", "grad_norm", "eval_image_to_text_r1"} | parts
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert_close(got[name], tensor, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
