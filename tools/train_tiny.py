"""Train the tiny checkpoint in `tiny/` from scratch, on rendered emoji named in English, Chinese and Japanese.

    python tools/emoji_data.py        # once: the pictures
    python tools/train_tiny.py        # resumes if it was interrupted; --fresh starts over

It writes the weights and `training.json`, which says how they came about.

The model is the repository's own, with the sizes of `tiny/config.json`. A step takes one picture of each of `--batch`
concepts, by a random one of the six training artists, and its name in a random language, and adds up

* the contrast of both image embeddings (InternVL-C and the queries' part of InternVL-G) with the text embedding,
* matching against the most similar wrong name of the batch, and captioning, on `--joint` of the pictures,
* for training only, the contrast of each embedding with one learnable anchor per concept: with it every step compares
  against all concepts, not only against the batch.

The first `--steps` learn under augmentation that grows. `--refine` more, begun at half the rate, see pictures nearer to
what they look like, names more often bare, and half of the names in English, whose words have the most pieces.

Twemoji, the seventh artist, is never shown. Matrices are trained with Muon, everything else with AdamW.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from emoji_data import DEFAULT_CACHE, LANGUAGES, load

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / ".cache" / "train_tiny.pt"
PHRASES = {
    "en": ("{}", "{}", "a photo of {}", "a picture of {}", "a drawing of a {}", "this is {}"),
    "zh": ("{}", "{}", "一张{}的照片", "{}的图片", "这是{}"),
    "ja": ("{}", "{}", "{}の写真", "{}の絵", "これは{}です"),
}
CAPTION_PROMPTS = {"en": "English caption:", "zh": "中文描述:", "ja": "日本語の説明:"}


class Augmentation:
    """
    Random affine maps, colours and backgrounds; no flips, since a left arrow is not a right arrow.

    `strength`, from 0 to 1, scales all of it: at full strength from the start nothing is learnt for hundreds of steps.
    """

    def __init__(self, size: int, mean: list[float], std: list[float], generator: torch.Generator):
        self.size = size
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
        self.generator = generator

    def uniform(self, count: int, low: float, high: float) -> torch.Tensor:
        return torch.rand(count, generator=self.generator) * (high - low) + low

    def affine(self, count: int, strength: float) -> torch.Tensor:
        """Inverse maps [count, 2, 3]: rotation, scale, aspect, shear and shift."""
        angle, shear, aspect, x, y = (
            self.uniform(count, -limit, limit) * strength for limit in (0.3, 0.15, 0.15, 0.15, 0.15)
        )
        scale, aspect = 1 + self.uniform(count, -0.15, 0.3) * strength, aspect.exp()
        cosine, sine = angle.cos() * scale, angle.sin() * scale
        rows = [torch.stack([cosine * aspect, -sine + shear, x], dim=1), torch.stack([sine, cosine / aspect, y], dim=1)]
        return torch.stack(rows, dim=1)

    def colours(self, rgb: torch.Tensor, strength: float) -> torch.Tensor:
        """Mix channels a little, change contrast and brightness, and take all colour from a few."""
        count = len(rgb)
        mix = torch.eye(3) + 0.12 * strength * torch.randn(count, 3, 3, generator=self.generator)
        grey = (self.uniform(count, 0, 1) < 0.06 * strength).view(-1, 1, 1)
        mix = torch.where(grey, torch.full((3, 3), 1 / 3), mix)
        rgb = torch.einsum("bij,bjhw->bihw", mix, rgb)
        contrast = 1 + self.uniform(count, -0.3, 0.3) * strength
        brightness = self.uniform(count, -0.15, 0.15) * strength
        return ((rgb - 0.5) * contrast.view(-1, 1, 1, 1) + 0.5 + brightness.view(-1, 1, 1, 1)).clamp(0, 1)

    def background(self, count: int, strength: float) -> torch.Tensor:
        """White, one colour, or a soft blur of colours."""
        kind = self.uniform(count, 0, 1).view(-1, 1, 1, 1)
        colour = torch.rand(count, 3, 1, 1, generator=self.generator)
        blur = F.interpolate(torch.rand(count, 3, 3, 3, generator=self.generator), self.size, mode="bilinear")
        coloured = torch.where(kind < 0.2 * strength, blur, colour)
        return torch.where(kind < 0.45 * strength, coloured, torch.ones(()))

    def __call__(self, rgba: torch.Tensor, strength: float) -> torch.Tensor:
        """uint8 [B, H, W, 4] -> normalised float [B, 3, size, size]"""
        pictures = rgba.permute(0, 3, 1, 2).float() / 255
        alpha = pictures[:, 3:]
        premultiplied = torch.cat([self.colours(pictures[:, :3], strength) * alpha, alpha], dim=1)
        shape = [len(rgba), 4, self.size, self.size]
        grid = F.affine_grid(self.affine(len(rgba), strength), shape, align_corners=False)
        moved = F.grid_sample(premultiplied, grid, align_corners=False)
        rgb = moved[:, :3] + self.background(len(rgba), strength) * (1 - moved[:, 3:])
        return (rgb - self.mean) / self.std


class Texts:
    """The token batches of a step."""

    def __init__(self, tokenizer, concepts: list[dict], generator: torch.Generator):
        self.tokenizer = tokenizer
        self.concepts = concepts
        self.generator = generator

    def choose(self, options: list | tuple):
        return options[int(torch.randint(len(options), (1,), generator=self.generator))]

    def phrase(self, concept: dict, language: str, bare: float) -> str:
        """The name, bare (so often at least) or in a phrase; one time in ten two keywords in its place."""
        if bare and float(torch.rand(1, generator=self.generator)) < bare:
            return concept["name"][language]
        keywords = concept["keywords"][language]
        if len(keywords) > 1 and float(torch.rand(1, generator=self.generator)) < 0.1:
            return " ".join(self.choose(keywords) for _ in range(2))
        return self.choose(PHRASES[language]).format(concept["name"][language])

    def ids(self, text: str) -> list[int]:
        return [1, *self.tokenizer.encode(text, add_special_tokens=False), 2]

    @staticmethod
    def batch(rows: list[list[int]], padding: int = 0) -> torch.Tensor:
        length = max(map(len, rows))
        return torch.tensor([row + [padding] * (length - len(row)) for row in rows])

    def captions(self, indices: list[int], languages: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt and name, and labels for the name alone."""
        rows, labels = [], []
        for index, language in zip(indices, languages, strict=True):
            prompt = [1, *self.tokenizer.encode(CAPTION_PROMPTS[language], add_special_tokens=False)]
            name = self.tokenizer.encode(self.concepts[index]["name"][language], add_special_tokens=False)
            rows.append([*prompt, *name, 2])
            labels.append([-100] * len(prompt) + [*name, 2])
        return self.batch(rows), self.batch(labels, -100)


class Trainer:
    """The model, its anchors, both optimisers, and what a step does."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        torch.manual_seed(arguments.seed)
        self.data = load(arguments.data)
        self.rgba = torch.from_numpy(self.data.rgba)
        self.pictures_of = [[] for _ in self.data.concepts]
        for picture in self.data.train_mask.nonzero()[0]:
            self.pictures_of[self.data.concept[picture]].append(int(picture))
        config = AutoConfig.from_pretrained(ROOT, subfolder="tiny", trust_remote_code=True)
        config.label_smoothing = 0.05
        model_class = get_class_from_dynamic_module("modeling_internvl.InternVLForPreTraining", str(ROOT))
        self.model = model_class(config).train()
        self.model.vision_model.gradient_checkpointing_disable()  # five layers of width 128: nothing to save
        # The zeros that training at scale starts from would leave all queries alike for long.
        nn.init.normal_(self.model.query_tokens, std=0.02)
        self.anchors = nn.Parameter(torch.randn(len(self.data.concepts), config.clip_embed_dim))
        self.tokenizer = AutoTokenizer.from_pretrained(ROOT, subfolder="tiny", trust_remote_code=True)
        processor = AutoImageProcessor.from_pretrained(ROOT, subfolder="tiny")
        self.generator = torch.Generator().manual_seed(arguments.seed)
        self.augment = Augmentation(
            config.vision_config.image_size, processor.image_mean, processor.image_std, self.generator
        )
        self.texts = Texts(self.tokenizer, self.data.concepts, self.generator)
        self.optimizers = self.make_optimizers()
        self.schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate) for optimizer in self.optimizers]
        self.step, self.seconds = 0, 0.0
        self.order: list[int] = []

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices inside the towers; AdamW for embeddings, heads, norms and anchors."""
        matrices, others = [], [self.anchors]
        for name, parameter in self.model.named_parameters():
            inside = parameter.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
            (matrices if inside else others).append(parameter)
        decayed = [parameter for parameter in others if parameter.ndim > 1]
        rest = [parameter for parameter in others if parameter.ndim <= 1]
        rate = self.arguments.rate
        muon = torch.optim.Muon(matrices, lr=3 * rate, weight_decay=0.03, adjust_lr_fn="match_rms_adamw")
        groups = [{"params": decayed, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}]
        return [muon, torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))]

    def rate(self, step: int) -> float:
        """Warm up, then fall to zero along a cosine; and once more from half the height."""
        begin, length, peak = 0, self.arguments.steps, 1.0
        if step >= length:
            begin, length, peak = length, self.arguments.refine, 0.5
        warmup = min(1.0, (step - begin + 1) / 50)
        return peak * warmup * 0.5 * (1 + math.cos(math.pi * min((step - begin) / length, 1.0)))

    @property
    def refining(self) -> bool:
        return self.step >= self.arguments.steps

    def strength(self) -> float:
        """Of the augmentation: it grows over the first half of the training, and is less in the refinement."""
        return 0.5 if self.refining else min(1.0, 0.1 + 1.8 * self.step / self.arguments.steps)

    def sample(self) -> tuple[list[int], torch.Tensor, list[str]]:
        """A batch of different concepts, one augmented picture of each, and a language for each."""
        if len(self.order) < self.arguments.batch:
            self.order = torch.randperm(len(self.data.concepts), generator=self.generator).tolist()
        indices, self.order = self.order[: self.arguments.batch], self.order[self.arguments.batch :]
        pictures = [self.texts.choose(self.pictures_of[index]) for index in indices]
        return (
            indices,
            self.augment(self.rgba[pictures], self.strength()),
            [self.texts.choose(LANGUAGES) for _ in indices],
        )

    def embed(self, rows: list[list[int]], parts: int = 4) -> torch.Tensor:
        """Text embeddings, computed with texts of like length together, so that little is padded."""
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        size = math.ceil(len(rows) / parts)
        batches = [self.texts.batch([rows[row] for row in order[at : at + size]]) for at in range(0, len(rows), size)]
        embeds = torch.cat([self.model._pool_text(batch, batch > 0) for batch in batches])
        return embeds[torch.tensor(order).argsort()]

    def anchor_loss(self, embeds: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
        anchors = F.normalize(self.anchors, dim=-1)
        logits = self.model.logit_scale.exp() * F.normalize(embeds, dim=-1) @ anchors.T
        return F.cross_entropy(logits, concepts, label_smoothing=0.05)

    def hard_names(self, images: torch.Tensor, texts: torch.Tensor) -> list[int]:
        """For each picture another row of the batch, drawn by how similar its text is."""
        with torch.no_grad():
            similarity = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T * 15
            similarity.fill_diagonal_(-math.inf)
            return torch.multinomial(similarity.softmax(-1), 1, generator=self.generator).flatten().tolist()

    def losses(self) -> dict[str, torch.Tensor]:
        model, joint = self.model, self.arguments.joint
        indices, pixels, languages = self.sample()
        concepts = [self.data.concepts[index] for index in indices]
        bare = 0.5 if self.refining else 0.0
        pairs = zip(concepts, languages, strict=True)
        phrases = [self.texts.phrase(concept, language, bare) for concept, language in pairs]
        targets = torch.tensor(indices)
        valid = torch.ones(len(indices), dtype=torch.bool)

        image_states = model._image_states(pixels)
        images = model.clip_projector(image_states)
        texts = self.embed([self.texts.ids("summarize:" + phrase) for phrase in phrases])
        losses = {
            "itc_c": model._contrastive_loss(images, texts, valid),
            "anchor": self.anchor_loss(images, targets) + self.anchor_loss(texts, targets),
        }

        captions, labels = self.texts.captions(indices[:joint], languages[:joint])
        states = model._joint_states(image_states[:joint], captions, None, see_all=False)
        queries, text = states.split([model.config.num_query_token, captions.shape[1]], dim=1)
        queried = model.clip_projector2(queries)
        losses["itc_g"] = model._contrastive_loss(queried, texts[:joint], valid[:joint])
        losses["anchor_g"] = self.anchor_loss(queried, targets[:joint])
        learnt = labels[:, 1:] != -100
        logits = model.qllama.lm_head(text[:, :-1][learnt])
        losses["itg"] = F.cross_entropy(logits, labels[:, 1:][learnt], label_smoothing=0.05)

        wrong = self.hard_names(images[:joint], texts[:joint])
        rows = [row if row % 2 else wrong[row] for row in range(joint)]
        pairs = self.texts.batch([self.texts.ids(phrases[row]) for row in rows])
        matches = torch.arange(joint) % 2
        losses["itm"] = model._matching_loss(image_states[:joint], pairs, pairs > 0, matches)
        return losses

    def train_step(self) -> dict[str, float]:
        started = time.monotonic()
        losses = self.losses()
        sum(losses.values()).backward()
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(50))
        self.step += 1
        self.seconds += time.monotonic() - started
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def state(self) -> dict:
        names = ("steps", "refine", "batch", "joint", "seed", "rate")
        return {
            "step": self.step,
            "seconds": self.seconds,
            "order": self.order,
            "arguments": {name: getattr(self.arguments, name) for name in names},
            "model": self.model.state_dict(),
            "anchors": self.anchors.data,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "generator": self.generator.get_state(),
        }

    def resume(self, state: dict) -> None:
        mine = self.state()["arguments"]
        if state["arguments"] != mine:
            raise SystemExit(
                f"{CHECKPOINT} was begun with {state['arguments']}, not {mine}: use --fresh to start over."
            )
        self.model.load_state_dict(state["model"])
        self.anchors.data.copy_(state["anchors"])
        for part, saved in zip(
            self.optimizers + self.schedulers, state["optimizers"] + state["schedulers"], strict=True
        ):
            part.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.step, self.seconds, self.order = state["step"], state["seconds"], state["order"]

    def save(self) -> None:
        """Write the resumable state so that a crash at any moment leaves the old or the new one."""
        CHECKPOINT.parent.mkdir(exist_ok=True)
        torch.save(self.state(), CHECKPOINT.with_suffix(".tmp"))
        CHECKPOINT.with_suffix(".tmp").replace(CHECKPOINT)

    @torch.no_grad()
    def measure(self, batches: int = 20) -> dict[str, float]:
        """The losses of the training data as it is augmented, averaged over some batches."""
        rows = [self.losses() for _ in range(batches)]
        return {name: round(float(sum(row[name] for row in rows)) / batches, 3) for name in rows[0]}

    def report(self, folder: Path) -> None:
        report = {
            "command": "python tools/train_tiny.py",
            "arguments": self.state()["arguments"],
            "steps_done": self.step,
            "hours": round(self.seconds / 3600, 2),
            "threads": self.arguments.threads,
            "torch": torch.__version__,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "concepts": len(self.data.concepts),
            "training_pictures": int(self.data.train_mask.sum()),
            "losses": self.measure(),
        }
        (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n")

    def export(self, folder: Path) -> None:
        """Save the model in bfloat16, in two shards; configs and tokenizer of the folder stay as they are."""
        state = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in self.model.state_dict().items()}
        save_two_shards(state, folder)


def save_two_shards(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write safetensors in two files of about the same size, with the index that transformers reads."""
    from safetensors.torch import save_file

    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    half, written, weight_map = sum(sizes.values()) / 2, 0, {}
    for name, size in sizes.items():
        weight_map[name] = f"model-0000{1 if written < half else 2}-of-00002.safetensors"
        written += size
    for file in sorted(set(weight_map.values())):
        shard = {name: tensor for name, tensor in state.items() if weight_map[name] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": written}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--out", type=Path, default=ROOT / "tiny")
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--refine", type=int, default=900, help="steps after those")
    parser.add_argument("--batch", type=int, default=256, help="pictures, each of another concept")
    parser.add_argument("--joint", type=int, default=64, help="of these so many for matching and captions")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fresh", action="store_true", help="do not resume")
    parser.add_argument("--stop-at", type=int, help="stop after this step, to go on later")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    trainer = Trainer(arguments)
    if CHECKPOINT.exists() and not arguments.fresh:
        trainer.resume(torch.load(CHECKPOINT, weights_only=True))
    total = arguments.steps + arguments.refine
    last = min(total, arguments.stop_at or total)
    saved = time.monotonic()
    with tqdm(total=total, initial=trainer.step, mininterval=5) as bar:
        while trainer.step < last:
            losses = trainer.train_step()
            bar.update()
            if trainer.step % 20 == 0:
                bar.set_postfix({name: f"{value:.2f}" for name, value in losses.items()})
            if time.monotonic() - saved > 60:
                trainer.save()
                saved = time.monotonic()
    trainer.save()
    trainer.export(arguments.out)
    trainer.report(arguments.out)


if __name__ == "__main__":
    main()
