"""Train the tiny checkpoint in `tiny/` from scratch, on rendered emoji named in English, Chinese and Japanese.

Run by whoever retrains tiny/ (`make tiny`): hours on a CPU.

    python -m tools.tiny.emoji_data        # once: the images
    python -m tools.tiny.train_tiny        # resumes if it was interrupted; --fresh starts over

It writes the weights and `training.json`, which records how they were trained.

The model is the repository's own, with the sizes of `tiny/config.json`. A step takes one image of each of `--batch`
concepts, by a random training artist, and adds up these losses:

* contrast of both image embeddings (InternVL-C and the queries' part of InternVL-G) with the names of `--named` of the
  concepts, in a random language;
* matching and captioning on `--joint` of them; the wrong name of matching is drawn, a near one more often;
* for training only, contrast of each embedding with one learnable anchor per concept. So every step compares against
  all concepts, not only against the batch. Names are also drawn to their anchors. Keywords and pairs of them learn by
  anchors alone: their target is all the concepts that they fit. tiny_texts.py says which texts are held out.

Then, for `--finish` steps, the vision tower is frozen and QLLaMA alone learns, from three times as many texts a step:
images learn to see names as they see the anchors.

Augmentation grows over the first third and decreases at the end; more and more names come without a phrase. The
held-out artist, Twemoji, is never shown. Muon trains the matrices, AdamW everything else, in bfloat16 autocast.
"""

import argparse
import json
import math
import shutil
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tools import ROOT
from tools.tiny.emoji_data import DEFAULT_CACHE, LANGUAGES, load
from tools.tiny.tiny_texts import CAPTION_PROMPTS, JOINTS, TEMPLATES, Texts, phrases

CHECKPOINT = ROOT / ".cache" / "train_tiny.pt"
RECIPE = ("steps", "finish", "batch", "named", "asked", "joint", "seed", "rate")  # the options that change the weights


class Augmentation:
    """Random affine maps, colours, light, outlines, blur, hidden parts and backgrounds; no flips, since a left arrow is
    not a right arrow. In some images another artist's drawing replaces a part, so that no part depends on the artist.

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

    def colours(self, drawn: torch.Tensor, strength: float) -> torch.Tensor:
        """Mix channels, change contrast, brightness and light, make a few grey: in and out [B, 4, H, W]"""
        count, rgb, alpha = len(drawn), drawn[:, :3], drawn[:, 3:]
        mix = torch.eye(3) + 0.12 * strength * torch.randn(count, 3, 3, generator=self.generator)
        grey = self.sometimes(count, 0.06 * strength).view(-1, 1, 1)
        mix = torch.where(grey, torch.full((3, 3), 1 / 3), mix)
        contrast = 1 + self.uniform(count, -0.3, 0.3) * strength
        brightness = self.uniform(count, -0.15, 0.15) * strength + 0.5 * (1 - contrast)
        mixed = (mix * contrast.view(-1, 1, 1) @ rgb.flatten(2)).view_as(rgb) + brightness.view(-1, 1, 1, 1) * alpha
        lit = mixed * self.light(count, drawn.shape[-1], strength)
        return torch.cat([torch.minimum(lit.clamp_(min=0), alpha), alpha], dim=1)

    def background(self, count: int, strength: float) -> torch.Tensor:
        """White, one colour, or a soft blur of colours."""
        kind = self.uniform(count, 0, 1).view(-1, 1, 1, 1)
        colour = torch.rand(count, 3, 1, 1, generator=self.generator)
        blur = F.interpolate(torch.rand(count, 3, 3, 3, generator=self.generator), self.size, mode="bilinear")
        coloured = torch.where(kind < 0.2 * strength, blur, colour)
        return torch.where(kind < 0.45 * strength, coloured, torch.ones(()))

    def sometimes(self, count: int, share: float) -> torch.Tensor:
        """Choose some of the images: booleans [count, 1, 1, 1]"""
        return (self.uniform(count, 0, 1) < share).view(-1, 1, 1, 1)

    def light(self, count: int, size: int, strength: float) -> torch.Tensor:
        """Factors [count, 1, size, size] of light from one side."""
        slope = 0.18 * strength * torch.randn(2, count, 1, 1, generator=self.generator)
        place = torch.linspace(-1, 1, size)
        return (1 + slope[0] * place + slope[1] * place[:, None])[:, None]

    def outline(self, drawn: torch.Tensor) -> torch.Tensor:
        """Outline the drawings in black or another colour: in and out premultiplied [B, 4, H, W]"""
        alpha = drawn[:, 3:]
        ring = (F.max_pool2d(alpha, 5, 1, 2) - alpha).clamp(min=0)
        colour = torch.rand(len(drawn), 3, 1, 1, generator=self.generator) * self.sometimes(len(drawn), 0.5)
        return torch.cat([drawn[:, :3] + colour * ring, alpha + ring], dim=1)

    def rectangles(self, count: int, low: float, high: float, share: float) -> torch.Tensor:
        """A rectangle with sides between `low` and `high`, on a share of the images: [count, 1, size, size]"""
        place = (torch.arange(self.size) + 0.5) / self.size
        sides = []
        for _ in range(2):
            length = self.uniform(count, low, high)
            begin = self.uniform(count, 0, 1) * (1 - length)
            sides.append((place >= begin[:, None]) & (place < (begin + length)[:, None]))
        return (sides[0][:, :, None] & sides[1][:, None, :])[:, None] & self.sometimes(count, share)

    def draw(self, rgba: torch.Tensor, strength: float) -> torch.Tensor:
        """uint8 [B, H, W, 4] -> premultiplied float [B, 4, size, size]"""
        drawn = rgba.permute(0, 3, 1, 2).float() / 255
        drawn[:, :3] *= drawn[:, 3:]
        lined = self.sometimes(len(rgba), 0.2 * strength).flatten()
        drawn[lined] = self.outline(drawn[lined])
        shape = [len(rgba), 4, self.size, self.size]
        grid = F.affine_grid(self.affine(len(rgba), strength), shape, align_corners=False)
        return self.colours(F.grid_sample(drawn, grid, align_corners=False), strength)

    def __call__(self, rgba: torch.Tensor, others: torch.Tensor, strength: float) -> torch.Tensor:
        """uint8 [B, H, W, 4], twice -> normalised float [B, 3, size, size]"""
        count = len(rgba)
        drawn = self.draw(rgba, strength)
        parts = self.rectangles(count, 0.3, 0.8, 0.3 * strength)
        mixed = parts.flatten(1).any(1)
        if mixed.any():
            drawn[mixed] = torch.where(parts[mixed], self.draw(others[mixed], strength), drawn[mixed])
        rgb = drawn[:, :3] + self.background(count, strength) * (1 - drawn[:, 3:])
        blurred = self.sometimes(count, 0.2 * strength).flatten()
        rgb[blurred] = F.avg_pool2d(F.pad(rgb[blurred], (1, 1, 1, 1), mode="replicate"), 3, 1)
        colour = torch.rand(count, 3, 1, 1, generator=self.generator)
        rgb = torch.where(self.rectangles(count, 0.15, 0.4, 0.2 * strength), colour, rgb)
        return (rgb - self.mean) / self.std


class Sampler:
    """Chooses the texts of a step and makes token batches of them."""

    def __init__(self, tokenizer, concepts: list[dict], generator: torch.Generator):
        self.encode = cache(partial(tokenizer.encode, add_special_tokens=False))
        self.texts = {language: Texts(concepts, language) for language in LANGUAGES}
        self.held_out = {phrase for language in LANGUAGES for phrase in phrases(language)}
        self.generator = generator

    def chance(self) -> float:
        return float(torch.rand(1, generator=self.generator))

    def choose(self, options: list | tuple):
        return options[int(torch.randint(len(options), (1,), generator=self.generator))]

    def name(self, number: int, language: str, bare: float) -> str:
        """The name of a concept, alone (at least with probability `bare`) or in a phrase."""
        name = self.texts[language].name(number)
        return name if self.chance() < bare else self.choose(TEMPLATES[language]).format(name)

    def keywords(self, number: int, language: str) -> tuple[str, set[int]]:
        """One or two keywords of a concept (its name if it has none), and all the concepts that they fit."""
        texts = self.texts[language]
        if pairs := self.chance() < 0.6 and texts.pairs(number, held_out=False):
            pair = self.choose(pairs)
            first, second = pair if self.chance() < 0.5 else pair[::-1]
            text, fits = self.choose(JOINTS[language]).format(first, second), texts.concepts_with(pair)
        elif texts.keywords[number]:
            text = self.choose(texts.keywords[number])
            fits = texts.bearers[text]
            text = text if self.chance() < 0.5 else self.choose(TEMPLATES[language]).format(text)
        else:
            text, fits = texts.name(number), {number}
        return (texts.name(number), {number}) if text in self.held_out else (text, fits)

    def ids(self, text: str) -> list[int]:
        return [1, *self.encode(text), 2]

    @staticmethod
    def batch(rows: list[list[int]], padding: int = 0) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)

    def captions(self, numbers: list[int], languages: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of prompt and name, and labels for the name alone."""
        rows, labels = [], []
        for number, language in zip(numbers, languages, strict=True):
            prompt = [1, *self.encode(CAPTION_PROMPTS[language])]
            name = self.encode(self.texts[language].name(number))
            rows.append([*prompt, *name, 2])
            labels.append([-100] * len(prompt) + [*name, 2])
        return self.batch(rows), self.batch(labels, -100)


class Trainer:
    """The model, its anchors, both optimisers and the training step."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        torch.manual_seed(arguments.seed)
        self.data = load(arguments.data)
        self.rgba = torch.from_numpy(self.data.rgba)
        concepts_of_images = np.where(self.data.train_mask, self.data.concept, -1)
        self.images_of = [np.flatnonzero(concepts_of_images == n).tolist() for n in range(len(self.data.concepts))]
        config = AutoConfig.from_pretrained(ROOT, subfolder="tiny", trust_remote_code=True)
        # Label smoothing would keep names at a distance from their anchors, where images find other names.
        config.label_smoothing = 0.0
        model_class = get_class_from_dynamic_module("modeling_internvl.InternVLForPreTraining", str(ROOT))
        self.model = model_class(config).train()
        self.model.vision_model.encoder.gradient_checkpointing = False  # width 128 needs little memory
        # On the CPU the backward pass of SDPA in bfloat16 takes longer than all the rest of a step.
        self.model.set_attn_implementation("eager")
        if arguments.compile:
            # Images have one shape, texts many lengths.
            for name in ("_image_states", "_pool_text", "_joint_states", "_match"):
                setattr(self.model, name, torch.compile(getattr(self.model, name), dynamic=name != "_image_states"))
        # Training at scale starts from zeros; here the queries would stay alike for long.
        nn.init.normal_(self.model.query_tokens, std=0.02)
        # Short anchors turn fast, because AdamW's steps are equally long for all.
        self.anchors = nn.Parameter(0.3 * torch.randn(len(self.data.concepts), config.clip_embed_dim))
        tokenizer = AutoTokenizer.from_pretrained(ROOT, subfolder="tiny", trust_remote_code=True)
        processor = AutoImageProcessor.from_pretrained(ROOT, subfolder="tiny")
        self.generator = torch.Generator().manual_seed(arguments.seed)
        self.augment = Augmentation(
            config.vision_config.image_size, processor.image_mean, processor.image_std, self.generator
        )
        self.sampler = Sampler(tokenizer, self.data.concepts, self.generator)
        self.optimizers = self.make_optimizers()
        self.step, self.seconds = 0, 0.0
        self.order: list[int] = []

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices inside the towers; AdamW for embeddings, heads, norms and anchors."""
        matrices, others = [], [self.anchors]
        for name, parameter in self.model.named_parameters():
            inside = parameter.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
            (matrices if inside else others).append(parameter)
        rate = self.arguments.rate
        muon = [{"params": matrices, "peak": 3 * rate, "weight_decay": 0.03}]
        adamw = [
            {"params": [each for each in others if each.ndim > 1], "peak": rate, "weight_decay": 0.02},
            {"params": [each for each in others if each.ndim <= 1], "peak": rate, "weight_decay": 0.0},
        ]
        return [torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(adamw, betas=(0.9, 0.98))]

    def set_rates(self) -> None:
        """Warm up, then fall to zero along a cosine; while finishing, once more from half the height."""
        recipe = self.arguments
        begin, length, peak = (recipe.steps, recipe.finish, 0.5) if self.finishing else (0, recipe.steps, 1.0)
        done = self.step - begin
        share = peak * min(1.0, (done + 1) / 50) * 0.5 * (1 + math.cos(math.pi * done / length))
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * share

    @property
    def progress(self) -> float:
        return min(1.0, self.step / self.arguments.steps)

    @property
    def finishing(self) -> bool:
        """Whether the vision tower is frozen and QLLaMA alone learns."""
        return self.step >= self.arguments.steps

    @property
    def bare(self) -> float:
        """Probability that a name comes without a phrase; it grows to 0.8."""
        return 0.3 + 0.5 * self.progress

    def strength(self) -> float:
        """Strength of the augmentation: it grows over the first third and decreases over the last."""
        return min(1.0, 0.1 + 2.7 * self.progress, 1.0 - 1.5 * (self.progress - 0.6))

    def draw_concepts(self, count: int) -> list[int]:
        """Draw different concepts, all equally often."""
        if len(self.order) < count:
            self.order = torch.randperm(len(self.data.concepts), generator=self.generator).tolist()
        drawn, self.order = self.order[:count], self.order[count:]
        return drawn

    def images(self, numbers: list[int]) -> torch.Tensor:
        """An augmented image of each concept, by a random artist: [len(numbers), 3, H, W]"""
        images, others = ([self.sampler.choose(self.images_of[number]) for number in numbers] for _ in range(2))
        return self.augment(self.rgba[images], self.rgba[others], self.strength())

    def embed(self, rows: list[list[int]], parts: int = 3) -> torch.Tensor:
        """Text embeddings, computed in batches of similar length, so that there is little padding."""
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        size = math.ceil(len(rows) / parts)
        batches = [self.sampler.batch([rows[row] for row in order[at : at + size]]) for at in range(0, len(rows), size)]
        embeds = torch.cat([self.model._pool_text(batch, batch > 0) for batch in batches])
        return embeds[torch.tensor(order).argsort()]

    def directions(self) -> torch.Tensor:
        """The anchors at length 1 [concepts, D]; while finishing they do not learn."""
        return F.normalize(self.anchors.detach() if self.finishing else self.anchors, dim=-1)

    def anchor_loss(self, embeds: torch.Tensor, concepts: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        """`concepts` are numbers [B] or probabilities [B, concepts]."""
        logits = self.model.logit_scale.exp() * F.normalize(embeds.float(), dim=-1) @ self.directions().T
        return F.cross_entropy(logits.float(), concepts, label_smoothing=smoothing)

    def apart(self, texts: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
        """Names minus their anchors, both at length 1: [B, D]. Anchors do not learn from it."""
        return F.normalize(texts.float(), dim=-1) - self.directions().detach()[concepts]

    def distance(self, texts: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
        """The cosine distance of names from their anchors. The right anchor must not only be the nearest: images, which
        are less sure of their anchors, are compared with the names in the end.
        """
        return self.apart(texts, concepts).square().sum(-1).mean() / 2  # of unit vectors: 1 - cosine

    def difference(self, seen: torch.Tensor, texts: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
        """How differently images see names and their anchors: the squared difference of the logits. Small differences
        of cosines decide which anchor an image finds, so it matters in which directions images differ; `distance`
        weighs all directions equally.
        """
        logits = self.model.logit_scale.exp() * F.normalize(seen.float(), dim=-1) @ self.apart(texts, concepts).T
        return logits.square().mean()

    def wrong_concepts(self, images: torch.Tensor, numbers: torch.Tensor) -> list[int]:
        """Draw another concept for each image, near anchors more often as training goes on."""
        with torch.no_grad():
            similarity = F.normalize(images, dim=-1) @ self.directions().T
            similarity[torch.arange(len(numbers)), numbers] = -math.inf
            weights = ((1 + 20 * self.progress) * similarity).softmax(-1)
            return torch.multinomial(weights, 1, generator=self.generator)[:, 0].tolist()

    def losses(self) -> dict[str, torch.Tensor]:
        model, sampler, recipe, finishing = self.model, self.sampler, self.arguments, self.finishing
        # Without the backward pass of the vision tower there is time for more texts.
        more = 3 if finishing else 1
        named, asked, joint = (more * rows for rows in (recipe.named, recipe.asked, recipe.joint))
        numbers = self.draw_concepts(named if finishing else recipe.batch)
        languages = [sampler.choose(LANGUAGES) for _ in numbers]
        pixels = self.images(numbers[:joint] if finishing else numbers)
        names = [sampler.name(*row, bare=self.bare) for row in zip(numbers[:named], languages, strict=False)]
        keywords = [sampler.keywords(*row) for row in zip(numbers[:asked], languages, strict=False)]
        targets = torch.tensor(numbers)
        losses = {}

        with torch.set_grad_enabled(not finishing):
            image_states = model._image_states(pixels)
            images = model.clip_projector(image_states)
        texts = self.embed([sampler.ids("summarize:" + text) for text in [*names, *(text for text, _ in keywords)]])
        texts, embedded_keywords = texts.split([named, asked])
        losses["anchor_names"] = self.anchor_loss(texts, targets[:named])
        losses["near"] = 5 * self.distance(texts, targets[:named])
        losses["keywords"] = self.anchor_loss(embedded_keywords, self.shares([fits for _, fits in keywords]))
        if not finishing:
            valid = torch.ones(named, dtype=torch.bool)
            losses["itc_c"] = model._contrastive_loss(images[:named], texts, valid)
            losses["anchor"] = self.anchor_loss(images, targets, smoothing=0.05)

        captions, labels = sampler.captions(numbers[:joint], languages[:joint])
        states = model._joint_states(image_states[:joint], captions, None, bidirectional=False)
        queries, text = states.split([model.config.num_query_token, captions.shape[1]], dim=1)
        queried = model.clip_projector2(queries)
        if finishing:
            seen = torch.cat([images, queried.detach().float()])
            losses["alike"] = 2 * self.difference(seen, texts, targets[:named])
        losses["itc_g"] = model._contrastive_loss(queried, texts[:joint], torch.ones(joint, dtype=torch.bool))
        losses["anchor_g"] = self.anchor_loss(queried, targets[:joint], smoothing=0.05)
        learnt = labels[:, 1:] != -100
        logits = model.qllama.lm_head(text[:, :-1][learnt])
        losses["itg"] = F.cross_entropy(logits.float(), labels[:, 1:][learnt], label_smoothing=0.05)

        wrong = self.wrong_concepts(images[:joint], targets[:joint])
        rows = [*zip(numbers[:joint], languages[:joint]), *zip(wrong, languages[:joint])]
        pairs = sampler.batch([sampler.ids(sampler.name(*row, bare=self.bare)) for row in rows])
        matches = torch.arange(2 * joint) < joint
        twice = image_states[:joint].repeat(2, 1, 1)
        losses["itm"] = 2 * model._matching_losses(twice, pairs, pairs > 0, matches.long()).mean()
        return losses

    def shares(self, fits: list[set[int]]) -> torch.Tensor:
        """Uniform probabilities over each row's concepts: [rows, concepts]"""
        shares = torch.zeros(len(fits), len(self.anchors))
        for row, concepts in enumerate(fits):
            shares[row, list(concepts)] = 1 / len(concepts)
        return shares

    def train_step(self) -> dict[str, float]:
        started = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16):
            losses = self.losses()
        sum(losses.values()).backward()
        self.set_rates()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(50))
        self.step += 1
        self.seconds += time.monotonic() - started
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def state(self) -> dict:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "order": self.order,
            "arguments": {name: getattr(self.arguments, name) for name in RECIPE},
            "model": self.model.state_dict(),
            "anchors": self.anchors.data,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "dropout": torch.get_rng_state(),
        }

    def resume(self, state: dict) -> None:
        mine = self.state()["arguments"]
        if state["arguments"] != mine:
            raise SystemExit(f"{self.arguments.checkpoint} is of {state['arguments']}, not of {mine}: use --fresh.")
        self.model.load_state_dict(state["model"])
        self.anchors.data.copy_(state["anchors"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["dropout"])
        self.step, self.seconds, self.order = state["step"], state["seconds"], state["order"]

    def save(self) -> None:
        """Write what `resume` reads. A crash at any moment leaves the old or the new state."""
        path = self.arguments.checkpoint
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.state(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def export(self, folder: Path) -> None:
        """Save the model in bfloat16, in two shards, and a report; a new folder gets configs and tokenizer of tiny/."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in (*(ROOT / "tiny").glob("*config.json"), ROOT / "tiny" / "tokenizer.model"):
            if not (folder / path.name).exists():
                shutil.copy(path, folder)
        state = {name: tensor.to(torch.bfloat16) for name, tensor in self.model.state_dict().items()}
        sizes = [tensor.nbytes for tensor in state.values()]
        save_torch_state_dict(state, folder, max_shard_size=sum(sizes) // 2 + max(sizes))
        report = {
            "command": "python -m tools.tiny.train_tiny" + " --compile" * self.arguments.compile,
            "arguments": self.state()["arguments"],
            "steps_done": self.step,
            "hours": round(self.seconds / 3600, 2),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "concepts": len(self.data.concepts),
            "training_pictures": int(self.data.train_mask.sum()),
        }
        (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DEFAULT_CACHE, help="the dataset of emoji_data.py")
    parser.add_argument("--out", type=Path, default=ROOT / "tiny", help="where the checkpoint goes")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--finish", type=int, default=2500, help="steps after those, for the texts alone")
    parser.add_argument("--batch", type=int, default=256, help="images per step, each of another concept")
    parser.add_argument("--named", type=int, default=96, help="how many of these learn from names")
    parser.add_argument("--asked", type=int, default=32, help="how many of these learn from keywords")
    parser.add_argument("--joint", type=int, default=32, help="how many of these learn from matching and captions")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the model: faster, needs a C++ compiler")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="what to resume from")
    parser.add_argument("--fresh", action="store_true", help="do not resume")
    arguments = parser.parse_args()
    trainer = Trainer(arguments)
    if arguments.checkpoint.exists() and not arguments.fresh:
        trainer.resume(torch.load(arguments.checkpoint, weights_only=True))
    total, saved = arguments.steps + arguments.finish, time.monotonic()
    with tqdm(total=total, initial=trainer.step, mininterval=5) as bar:
        while trainer.step < total:
            losses = trainer.train_step()
            bar.update()
            if trainer.step % 20 == 0:
                bar.set_postfix({name: f"{value:.2f}" for name, value in losses.items()})
            if time.monotonic() - saved > 60:
                trainer.save()
                saved = time.monotonic()
    trainer.save()
    trainer.export(arguments.out)


if __name__ == "__main__":
    main()
