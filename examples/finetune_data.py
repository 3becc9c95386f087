"""Reads the data of finetune.py: the rows of a dataset, the batches of all processes, and each process's tensors.

`Captions(rows, arguments)` reads a `datasets.Dataset`, `GlobalBatches` selects the rows of each batch, and
`Collator(captions, processor, arguments)` makes tensors; `arguments` are finetune.py's `Arguments`.
"""

import random
from collections.abc import Iterator
from itertools import islice
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader


def load_rows(arguments: Any) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and those held out for evaluation, if any."""
    path = Path(arguments.data)
    if any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        splits = load_from_disk(arguments.data)
    elif path.is_file():
        splits = load_dataset(path.suffix.removeprefix("."), data_files=arguments.data)
    else:
        splits = load_dataset(arguments.data)
    splits = splits if isinstance(splits, DatasetDict) else DatasetDict({arguments.split: splits})
    number = int(arguments.held_out) if arguments.held_out.isdigit() else 0
    wanted = [arguments.split] if number or not arguments.held_out else [arguments.split, arguments.held_out]
    for name in wanted:
        if name not in splits:
            raise ValueError(f"`data` has the splits {list(splits)}, and no {name!r}.")
    rows = splits[arguments.split]
    if not number:
        return rows, splits.get(arguments.held_out)
    if number >= len(rows):
        raise ValueError(f"`held_out` must leave some of {len(rows)} rows, got {number}.")
    parts = rows.train_test_split(number, seed=arguments.seed)
    return parts["train"], parts["test"]


class Example(NamedTuple):
    """A row with the caption that an epoch takes."""

    epoch: int
    index: int
    prompt: str
    text: str


class Captions(torch.utils.data.Dataset):
    """Images and their captions. Items, by (epoch, row), do not load the image."""

    def __init__(self, rows: Dataset, arguments: Any):
        for column in (arguments.image_column, *arguments.text_columns):
            if column not in rows.column_names:
                raise ValueError(f"`data` has the columns {rows.column_names}, and no {column!r}.")
        self.images = rows.select_columns([arguments.image_column])
        self.texts = rows.select_columns(arguments.text_columns)
        self.columns, self.image_column, self.seed = arguments.text_columns, arguments.image_column, arguments.seed
        self.prompts = arguments.prompts * (len(self.columns) if len(arguments.prompts) == 1 else 1)
        for index in range(len(self)):
            if not any(self.of_row(index)):
                raise ValueError(f"`data` has no caption in row {index}: {self.texts[index]!r}.")

    def __len__(self) -> int:
        return len(self.texts)

    def of_row(self, index: int) -> list[list[str]]:
        """The captions of a row, a list for each text column."""
        row = self.texts[index]
        cells = [row[column] or [] for column in self.columns]
        return [[text for text in ([cell] if isinstance(cell, str) else cell) if text.strip()] for cell in cells]

    def image(self, index: int) -> Any:
        return self.images[index][self.image_column]

    def __getitem__(self, key: tuple[int, int]) -> Example:
        """One of the row's languages, and one of its captions in it."""
        epoch, index = key
        choice = random.Random(f"caption {self.seed} {epoch} {index}")
        prompt, texts = choice.choice([pair for pair in zip(self.prompts, self.of_row(index)) if pair[1]])
        return Example(epoch, index, prompt, choice.choice(texts))


class GlobalBatches:
    """Batches of (epoch, row) of all processes together, in an order that follows from the seed and the epoch."""

    def __init__(self, rows: int, size: int, seed: int):
        if rows < size:
            raise ValueError(f"`data` must fill a batch of all processes, {size} rows, got {rows}.")
        self.rows, self.size, self.seed, self.epoch = rows, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows // self.size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = list(range(self.rows))
        random.Random(f"order {self.seed} {self.epoch}").shuffle(order)
        keys = iter([(self.epoch, index) for index in order])
        return (list(islice(keys, self.size)) for _ in range(len(self)))


class EpochLoader(DataLoader):
    """Passes the epoch, which transformers sets, on to its batches."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class Collator:
    """Makes one process's batch from the examples of all processes: its own images and texts, and all texts to draw
    wrong ones from. Rows with the same text are never each other's wrong text.
    """

    def __init__(self, captions: Captions, processor: Any, arguments: Any):
        self.captions, self.processor, self.arguments = captions, processor, arguments
        self.own = slice(arguments.process_index, None, arguments.world_size)

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        own, first = examples[self.own], {}
        groups = torch.tensor([first.setdefault(example.text, row) for row, example in enumerate(examples)])
        if len(first) == 1:
            raise ValueError(f"A batch must hold two different texts, got {len(examples)} times {own[0].text!r}.")
        texts = self.processor(text=[example.text for example in examples], task="match")
        summaries = self.processor(text=[example.text for example in own], task="embed")
        images = [self.captions.image(example.index) for example in own]
        lengths = texts.attention_mask.sum(dim=1) - 1  # of the text and </s>, which a caption must predict
        batch = {
            "pixel_values": self.processor(images=images, crop=self.arguments.crop).pixel_values,
            "positive_input_ids": texts.input_ids[self.own],
            "positive_attention_mask": texts.attention_mask[self.own],
            "summarize_input_ids": summaries.input_ids,
            "summarize_attention_mask": summaries.attention_mask,
            "all_input_ids": texts.input_ids,
            "all_attention_mask": texts.attention_mask,
            "scores": self.noise(own, len(examples)).masked_fill(groups[self.own, None] == groups, -torch.inf),
            "caption_share": lengths[self.own].sum() / lengths.sum() * self.arguments.world_size,
            **self.caption_tokens(own, batch_ids=texts.input_ids[self.own], lengths=lengths[self.own]),
        }
        return batch | ({"image_ids": groups[self.own]} if self.arguments.objective == "retrieval" else {})

    def caption_tokens(self, own: list[Example], batch_ids: torch.Tensor, lengths: torch.Tensor) -> dict:
        """`<s> PROMPT TEXT </s>`, with labels for the text and `</s>`."""
        prompts = [example.prompt for example in own]
        prompts = self.processor(text=prompts, task="caption", padding=False, return_tensors=None).input_ids
        ids, labels = [], []
        for prompt, row, length in zip(prompts, batch_ids, lengths.tolist()):
            text = row[1 : 1 + length]  # without <s>
            ids.append(torch.cat([torch.tensor(prompt), text]))
            labels.append(torch.cat([torch.full((len(prompt),), -100), text]))
        masks = [torch.ones_like(row) for row in ids]
        padded = {"input_ids": (ids, 0), "attention_mask": (masks, 0), "labels": (labels, -100)}
        return {name: pad_sequence(rows, True, value) for name, (rows, value) in padded.items()}

    def noise(self, own: list[Example], count: int) -> torch.Tensor:
        """Gumbel noise [B, count]: the argmax of logits plus this noise is a sample from their softmax."""
        rows = []
        for example in own:
            draw = random.Random(f"noise {self.arguments.seed} {example.epoch} {example.index}")
            rows.append([-log(-log(draw.uniform(1e-9, 1 - 1e-9))) for _ in range(count)])
        return torch.tensor(rows)
