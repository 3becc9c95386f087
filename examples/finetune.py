"""Fine-tune InternVL on images with captions, with transformers' Trainer.

    python examples/finetune.py --model . --subfolder tiny --data FOLDER --output_dir out --bf16 --train heads
    accelerate launch examples/finetune.py ...                                      # several GPUs (DDP)
    accelerate launch --config_file examples/fsdp2.yaml examples/finetune.py ...    # sharded weights (FSDP2)

All options of transformers' `TrainingArguments` work too; `--help` lists them after our own. Each step prints its loss
and the parts; `--logging_steps 50` prints every 50 steps. From Python use `make_trainer(arguments)`.

* A step compares the images of one micro-batch of all processes: `per_device_train_batch_size` times their number. Its
  rows, their captions and the noise that selects wrong texts follow from `--seed`, the epoch and the row alone. So any
  number of processes gives the same losses if the product is the same.
* Process r takes rows r, r + W, ... of the batch. Matching gives the first half of each process a wrong text; together
  these are the first half of the whole batch. Rows that fill no batch are left out of an epoch, others in every epoch.
* Gradient accumulation averages the losses of several micro-batches. Negatives come from one micro-batch only: a
  contrast among 8 x 32 images is easier than one among 256.
* Weights that the objective does not use stay frozen: stage 2 has no loss on `clip_projector`, retrieval none on
  `lm_head`.
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch
from finetune_data import Captions, Collator, EpochLoader, GlobalBatches, load_rows
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoProcessor,
    HfArgumentParser,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.hf_argparser import HfArg

CLASSES = {"pretraining": "InternVLForPreTraining", "retrieval": "InternVLForRetrieval"}
HEADS = ("clip_projector.", "clip_projector2.", "itm_head.", "text_projection", "logit_scale", "query_tokens")
UNUSED = {"pretraining": ("clip_projector.",), "retrieval": ("qllama.lm_head.",)}
# The targets of the original's LoRA.
VISION_TARGETS = r"vision_model\.encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
QLLAMA_TARGETS = r"qllama\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
# Files of a repository that `save_pretrained` does not write.
COMPANIONS = (
    "handler.py", "requirements.txt", "sentence_transformers_internvl.py", "modules.json",
    "config_sentence_transformers.json", "sentence_bert_config.json",
)  # fmt: skip
LOSSES = {"loss_itm": "matching", "loss_itc": "contrast", "loss_itg": "captions"}


@dataclass
class Options:
    """The model, the data and what to train."""

    _argument_group_name = "options of this script"

    model: str = HfArg(default=".", help="Folder or Hub id of the model.")
    subfolder: str = HfArg(default="", help="Of the model; `tiny` for the tiny checkpoint of a clone.")
    dtype: str = HfArg(default="float32", help="Of the weights in memory. For mixed precision use --bf16.")
    objective: Literal["pretraining", "retrieval"] = HfArg(
        default="pretraining", help="Matching, contrast and captions; or matching and contrast."
    )
    train: Literal["full", "heads", "lora"] = HfArg(default="full", help="Which weights to train.")
    lora_vision: int = HfArg(default=0, help="Rank of the adapters of the vision tower; 0 for none.")
    lora_qllama: int = HfArg(default=0, help="Rank of the adapters of QLLaMA; 0 for none.")
    merge: bool = HfArg(default=False, help="Also write the model with its adapters to out/merged.")
    data: str = HfArg(default="", help="A folder, a parquet file, a saved dataset, or a Hub id.")
    split: str = HfArg(default="train", help="The split to train on.")
    held_out: str = HfArg(default="", help="For evaluation: a split, or a number of rows not to train on.")
    image_column: str = HfArg(default="image", help="Images, or paths of images.")
    text_columns: list[str] = HfArg(
        default_factory=lambda: ["text"],
        help="Captions, a column for each language. A row has a text, a list of texts, or none.",
    )
    prompts: list[str] = HfArg(
        default_factory=lambda: ["English caption:"], help="For captions: one prompt, or one for each text column."
    )
    crop: Literal["center", "squash"] = HfArg(default="center", help="How images become square.")
    negatives: Literal["similar", "random"] = HfArg(
        default="similar", help="Wrong texts for matching: by their logits (one more pass of both towers), or any."
    )
    resume: bool = HfArg(default=False, help="Continue from the last checkpoint in the output folder.")


@dataclass
class TrainerOptions(TrainingArguments):
    """The options of transformers, with other defaults."""

    _argument_group_name = "options of transformers' Trainer (TrainingArguments)"

    report_to: list[str] = HfArg(default_factory=lambda: ["none"], help="As in TrainingArguments.")
    logging_steps: float = HfArg(default=1, help="Print the losses every so many steps.")
    eval_steps: float = HfArg(default=500, help="With `--eval_strategy steps`: evaluate every so many steps.")
    eval_on_start: bool = HfArg(default=True, help="With --held_out: also evaluate before training.")


@dataclass
class Arguments(TrainerOptions, Options):
    """Everything that a training needs."""

    def __post_init__(self) -> None:
        if self.disable_tqdm is None and not sys.stderr.isatty():
            self.disable_tqdm = True  # no bar in a log file
        super().__post_init__()
        self.eval_on_start = self.eval_on_start and bool(self.held_out)
        self.ddp_find_unused_parameters = bool(self.ddp_find_unused_parameters)  # None would search in every step
        if self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        size, ranks = self.per_device_train_batch_size, (self.lora_vision, self.lora_qllama)
        if not self.data or not self.output_dir:
            raise ValueError("`data` and `output_dir` must be given.")
        if self.objective == "pretraining" and size % 2:
            raise ValueError(f"`per_device_train_batch_size` must be even: half match, half do not; got {size}.")
        if self.n_gpu > 1:
            raise ValueError(f"One process per GPU: start with `accelerate launch`, got {self.n_gpu} GPUs in one.")
        if (self.train == "lora") != any(ranks) or min(ranks) < 0:
            raise ValueError(f"`train='lora'` and a positive `lora_vision` or `lora_qllama` go together, got {ranks}.")
        if self.merge and self.train != "lora":
            raise ValueError(f"`merge` needs `train='lora'`, got {self.train!r}.")
        if len(self.prompts) not in (1, len(self.text_columns)):
            got = f"{len(self.text_columns)} columns and {len(self.prompts)} prompts"
            raise ValueError(f"`prompts` must be one, or one for each of `text_columns`, got {got}.")


# ----------------------------------------------------------------------------------------------------------- model


def load_processor_and_model(arguments: Arguments) -> tuple[Any, Any]:
    """The processor, and the model of the objective; weights that are not trained are frozen."""
    where = {"subfolder": arguments.subfolder}
    with arguments.main_process_first(desc="code of the model"):  # one process copies it to the cache
        processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True, **where)
        name = f"modeling_internvl.{CLASSES[arguments.objective]}"
        model_class = get_class_from_dynamic_module(name, arguments.model)
    model = model_class.from_pretrained(arguments.model, dtype=arguments.dtype, **where)
    model.check_processor(processor)
    if not arguments.gradient_checkpointing:
        model.vision_model.encoder.gradient_checkpointing = False  # on by default, as in the original
    for name, parameter in model.named_parameters():
        is_chosen = arguments.train == "full" or (arguments.train == "heads" and name.startswith(HEADS))
        parameter.requires_grad_(is_chosen and not name.startswith(UNUSED[arguments.objective]))
    return processor, get_peft_model(model, lora_config(arguments)) if arguments.train == "lora" else model


def lora_config(arguments: Arguments) -> LoraConfig:
    """Adapters as in the original: alpha is twice the rank, dropout 0.05."""
    wanted = {VISION_TARGETS: arguments.lora_vision, QLLAMA_TARGETS: arguments.lora_qllama}
    ranks = {targets: rank for targets, rank in wanted.items() if rank}
    alphas = {targets: 2 * rank for targets, rank in ranks.items()}
    how = {"target_modules": "|".join(ranks), "rank_pattern": ranks, "alpha_pattern": alphas, "lora_dropout": 0.05}
    return LoraConfig(r=max(ranks.values()), lora_alpha=max(alphas.values()), **how)


def copy_companions(arguments: Arguments, folder: str) -> None:
    """Copy the files that sentence-transformers and Inference Endpoints need to a checkpoint."""
    source = Path(arguments.model)
    if not source.is_dir():
        source = Path(snapshot_download(arguments.model, allow_patterns=COMPANIONS))
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copy(source / name, folder)


def merge(arguments: Arguments, folder: str) -> None:
    """Add the adapters in the output folder to the model's weights, and save the model."""
    where = {"subfolder": arguments.subfolder, "trust_remote_code": True}
    base = AutoModel.from_pretrained(arguments.model, dtype=arguments.dtype, **where)
    PeftModel.from_pretrained(base, arguments.output_dir).merge_and_unload().save_pretrained(folder)
    AutoProcessor.from_pretrained(arguments.model, **where).save_pretrained(folder)
    copy_companions(arguments, folder)


# -------------------------------------------------------------------------------------------------------- training


class Printer(TrainerCallback):
    """Prints each log as a line of text instead of a dictionary."""

    def on_log(self, args: Arguments, state: TrainerState, control: Any, logs: dict | None = None, **more: Any) -> None:
        if logs and state.is_world_process_zero:
            with tqdm.external_write_mode():
                print(line_of(logs, state.global_step, state.max_steps), flush=True)


class PrinterWithBar(Printer, ProgressCallback):
    """The same above a progress bar."""


def line_of(logs: dict[str, float], step: int, steps: int) -> str:
    """A log of the Trainer as a line: of a step, of an evaluation or of the whole training."""
    if "loss" not in logs:
        when = f"after step {step}" if step else "before training"
        values = {name.removeprefix("eval_"): value for name, value in logs.items() if name != "epoch"}
        return f"{when}: {', '.join(f'{name} {value:.4g}' for name, value in values.items())}"
    parts = " + ".join(f"{word} {logs[name]:.4f}" for name, word in LOSSES.items() if name in logs)
    also = {"learning rate": "learning_rate", "gradient norm": "grad_norm", "epoch": "epoch"}
    rest = ", ".join(f"{word} {logs[name]:.3g}" for word, name in also.items() if name in logs)
    return f"step {step}/{steps}: loss {logs['loss']:.4f} = {parts}; {rest}"


class FineTuner(Trainer):
    """A Trainer with hard negatives from all processes, separate losses in the log, and retrieval as evaluation."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        for theirs, ours in ((ProgressCallback, PrinterWithBar), (PrinterCallback, Printer)):
            if self.pop_callback(theirs):
                self.add_callback(ours)
        self.model_accepts_loss_kwargs = False  # the losses are means, so accumulation must divide them
        self.parts: list[torch.Tensor] = []  # the losses of the micro-batches since the last log
        if self.is_fsdp_enabled:  # FSDP2 cannot shard a scalar; `_save` undoes this
            inner = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            scale = inner.logit_scale
            inner.logit_scale = torch.nn.Parameter(scale.detach().reshape(1), requires_grad=scale.requires_grad)

    def get_train_dataloader(self) -> DataLoader:
        """A loader that accelerate does not prepare, because that would distribute the rows differently."""
        size = self.args.per_device_train_batch_size * self.args.world_size
        return EpochLoader(
            self.train_dataset,
            batch_sampler=GlobalBatches(len(self.train_dataset), size, self.args.seed),
            collate_fn=Collator(self.train_dataset, self.processing_class, self.args),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    @property
    def bare_model(self) -> Any:
        """The model for calls other than `forward`, which only read weights."""
        model = self.accelerator.unwrap_model(self.model)
        for name in ("embed_image", "embed_text", "generate"):
            if isinstance(model, FSDPModule) and name not in vars(model):
                register_fsdp_forward_method(model, name)
        return model

    def in_order(self, local: torch.Tensor) -> torch.Tensor:
        """Gather: rows r, r + W, ... of every process r -> all rows in order."""
        return self.accelerator.gather(local).unflatten(0, (self.args.world_size, -1)).transpose(0, 1).flatten(0, 1)

    # ------------------------------------------------------------------------------------------------- a step

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        batch = dict(inputs)
        share, scores = batch.pop("caption_share"), batch.pop("scores")
        if self.args.negatives == "similar":
            scores = scores + self.similarities(batch)
        wrong = scores.argmax(dim=1)
        for name in ("input_ids", "attention_mask"):
            batch[f"negative_{name}"] = batch.pop(f"all_{name}")[wrong]
        output = model(**batch)
        losses = [output.loss_itm, output.loss_itc]
        if output.loss_itg is not None:
            # A plain mean over processes would give tokens more weight in processes that have fewer of them.
            losses.append(output.loss_itg * share)
        self.parts.append(torch.stack(losses).detach())
        return (sum(losses), output) if return_outputs else sum(losses)

    @torch.no_grad()
    def similarities(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits [B, W * B] of this process's images and all texts, without dropout."""
        model = self.bare_model.eval()
        with self.accelerator.autocast():
            images = model.embed_image(batch["pixel_values"])
            texts = model.embed_text(batch["summarize_input_ids"], batch["summarize_attention_mask"])
        scale = model.logit_scale.detach()
        scale = scale.full_tensor() if isinstance(scale, DTensor) else scale
        model.train()
        return scale.exp() * images.float() @ self.in_order(texts.float()).T

    def log(self, logs: dict[str, float], *arguments: Any) -> None:
        """Add the mean of each loss since the last log, over all processes."""
        if self.parts and "loss" in logs:
            means = self.accelerator.reduce(torch.stack(self.parts).mean(dim=0), "mean").tolist()
            logs |= dict(zip(LOSSES, means))
            self.parts = []
        super().log(logs, *arguments)

    # ------------------------------------------------------------------------------------------- the evaluation

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Captions | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Recall among the held-out images and their distinct texts, in mode InternVL-G, and exact captions."""
        captions = eval_dataset or self.eval_dataset
        self.bare_model.eval()
        with self.accelerator.autocast():
            found = self.recall(captions)
            if self.args.objective == "pretraining":
                found["caption_exact"] = self.exact_captions(captions)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def own_batches(self, count: int) -> list[list[int]]:
        """Batches of this process's rows. Under FSDP all processes must call the model equally often, so all get the
        same number of rows: the last ones may be `count` or more, for rows that start again from 0.
        """
        total = ceil(count / self.args.world_size) * self.args.world_size
        own = range(self.args.process_index, total, self.args.world_size)
        size = self.args.per_device_eval_batch_size
        return [list(own[start : start + size]) for start in range(0, len(own), size)]

    def embed(self, count: int, call: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
        """The embeddings [count, width] that `call` returns for lists of rows."""
        batches = [call([row % count for row in rows]).float() for rows in self.own_batches(count)]
        return self.in_order(torch.cat(batches))[:count]

    def pixels(self, captions: Captions, rows: list[int]) -> torch.Tensor:
        images = [captions.image(row) for row in rows]
        return self.processing_class(images=images, crop=self.args.crop).pixel_values.to(self.args.device)

    def recall(self, captions: Captions) -> dict[str, float]:
        """The share of images, and of texts, with a correct one among the first 1, 5 and 10."""
        of_row = [{text for texts in captions.of_row(row) for text in texts} for row in range(len(captions))]
        texts = sorted(set().union(*of_row))
        right = torch.tensor([[text in own for text in texts] for own in of_row])  # [images, texts]
        model, processor, device = self.bare_model, self.processing_class, self.args.device
        images = self.embed(len(of_row), lambda rows: model.embed_image(self.pixels(captions, rows), mode="InternVL-G"))
        wanted = self.embed(
            len(texts),
            lambda rows: model.embed_text(**processor(text=[texts[row] for row in rows], task="embed").to(device)),
        )
        logits = (images @ wanted.T).cpu()
        directions = {"image_to_text": (logits, right), "text_to_image": (logits.T, right.T)}
        return {f"{name}_r{k}": hits(*pair, k) for name, pair in directions.items() for k in (1, 5, 10)}

    def exact_captions(self, captions: Captions) -> float:
        """The share of captions, one per image and language, that are one of the correct texts."""
        counts = torch.zeros(2, device=self.args.device)
        for rows in self.own_batches(len(captions)):
            pixels = self.pixels(captions, [row % len(captions) for row in rows])
            for column, prompt in enumerate(captions.prompts):
                written = self.write(pixels, prompt)
                for row, text in zip(rows, written):
                    known = captions.of_row(row)[column] if row < len(captions) else []
                    counts += torch.tensor([text.strip() in known, bool(known)], device=counts.device)
        right, count = self.accelerator.reduce(counts).tolist()
        return right / count

    def write(self, pixels: torch.Tensor, prompt: str) -> list[str]:
        """Greedy captions."""
        end = self.processing_class.tokenizer.eos_token_id
        # Under FSDP no process may stop early, because the others need its weights: use an end that never occurs.
        options = {"eos_token_id": len(self.processing_class.tokenizer)} if self.is_fsdp_enabled else {}
        tokens = self.processing_class(text=prompt, task="caption").to(pixels.device)
        rows = self.bare_model.generate(pixels, **tokens, num_beams=1, do_sample=False, **options).tolist()
        rows = [row[: row.index(end)] if end in row else row for row in rows]
        return self.processing_class.batch_decode(rows, skip_special_tokens=True)

    # ---------------------------------------------------------------------------------------------------- saving

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is not None and "logit_scale" in state_dict:
            state_dict["logit_scale"] = state_dict["logit_scale"].reshape(())
        super()._save(output_dir, state_dict)
        if self.args.train != "lora":  # adapters are not a model
            copy_companions(self.args, output_dir or self.args.output_dir)


def hits(logits: torch.Tensor, right: torch.Tensor, k: int) -> float:
    """The share of rows with a correct column among their k largest logits; both [rows, columns]."""
    best = logits.topk(min(k, logits.shape[1])).indices
    return right.gather(1, best).any(dim=1).float().mean().item()


def make_trainer(arguments: Arguments) -> FineTuner:
    """Load the data, the processor and the model; `make_trainer(arguments).train()` fine-tunes."""
    with arguments.main_process_first(desc="the data"):
        rows, held_out = load_rows(arguments)
    processor, model = load_processor_and_model(arguments)
    train, held_out = (None if part is None else Captions(part, arguments) for part in (rows, held_out))
    return FineTuner(
        model=model, args=arguments, train_dataset=train, eval_dataset=held_out, processing_class=processor
    )


def last_checkpoint(folder: str) -> str | None:
    """The last checkpoint that was written to its end; an interrupt may leave part of one."""
    whole = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]  # the file written last
    return str(max(whole, key=lambda path: int(path.name.partition("-")[2]))) if whole else None


def checkpoint_to_resume(arguments: Arguments) -> str | None:
    """The last checkpoint of the output folder; `resume` requires one, and otherwise there must be none."""
    folder = arguments.output_dir
    last = last_checkpoint(folder)
    if last and not arguments.resume:
        raise ValueError(f"`output_dir` holds {last}: add `--resume True` to go on, or name another folder.")
    if arguments.resume and not last:
        raise ValueError(f"`resume` needs a checkpoint-N in `output_dir`, and {folder} has none.")
    return last


def run(trainer: FineTuner, checkpoint: str | None) -> None:
    """Train, save and evaluate."""
    arguments, held_out = trainer.args, len(trainer.eval_dataset or ())
    trained, total = (trainer.get_num_trainable_parameters(), sum(p.numel() for p in trainer.model.parameters()))
    say(arguments, f"{len(trainer.train_dataset)} images to train on, {held_out} held out; "
        f"{trained:,} of {total:,} weights are trained.")  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    if checkpoint and checkpoint.endswith(f"-{trainer.state.global_step}"):
        say(arguments, f"{checkpoint} is the end of --num_train_epochs or --max_steps: nothing was trained.")
    trainer.save_model()
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.save_state()
    if arguments.merge and arguments.should_save:
        merge(arguments, str(Path(arguments.output_dir) / "merged"))
    say(arguments, how_to_load(arguments))


def say(arguments: Arguments, text: str) -> None:
    if arguments.should_log:
        print(text, flush=True)


def how_to_load(arguments: Arguments) -> str:
    """Lines of Python that load what was saved."""

    def load(folder: str, **where: Any) -> str:
        options = "".join(f", {name}={value!r}" for name, value in where.items() if value)
        return f"AutoModel.from_pretrained({folder!r}{options}, trust_remote_code=True)"

    folder, imports = arguments.output_dir, "from transformers import AutoModel"
    if arguments.train != "lora":
        return f"Saved to {folder}; load it with\n    {imports}\n    model = {load(folder)}"
    base = load(arguments.model, subfolder=arguments.subfolder)
    lines = [f"Saved to {folder}; load the adapters with", "from peft import PeftModel", imports]
    lines.append(f"model = PeftModel.from_pretrained({base}, {folder!r})")
    if arguments.merge:
        lines[0] = lines[0].replace("the adapters", "the adapters (or the merged model, the last line)")
        lines.append(f"model = {load(str(Path(folder) / 'merged'))}")
    return "\n    ".join(lines)


def interrupted(arguments: Arguments) -> str:
    """What to tell after Ctrl-C."""
    if last := last_checkpoint(arguments.output_dir):
        return f"Interrupted. {last} is saved: the same command with `--resume True` continues from it."
    return (
        "Interrupted before the first checkpoint: nothing is saved. Checkpoints come every `--save_steps` "
        f"({arguments.save_steps:g}) steps; then `--resume True` continues from the last one."
    )


def parse(arguments: list[str] | None = None) -> Arguments:
    usage = "python examples/finetune.py --data FOLDER --output_dir FOLDER [options]"
    parser = HfArgumentParser((Options, TrainerOptions), usage=usage, description=__doc__.splitlines()[0])
    return Arguments(**vars(parser.parse_args(arguments)))


def main(arguments: Arguments) -> None:
    checkpoint = checkpoint_to_resume(arguments)
    run(make_trainer(arguments), checkpoint)


if __name__ == "__main__":
    try:
        given = parse()
        checkpoint = checkpoint_to_resume(given)
        trainer = make_trainer(given)
    except (ValueError, OSError) as error:  # in the arguments, the data or the model, where a traceback does not help
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted before the training began.")
    try:
        run(trainer, checkpoint)
    except KeyboardInterrupt:
        say(given, interrupted(given))
        sys.exit(130)
