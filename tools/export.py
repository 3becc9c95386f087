"""Export both sides of the model by `torch.export` and to ONNX, for programs without transformers and this code.

Run by whoever deploys the model outside Python, and with `--report` by whoever changes the export.

    python -m tools.export --out DIR --int8 --check                   # tiny/
    python -m tools.export --out DIR --model PATH_OR_ID               # another checkpoint, at its root
    python -m tools.export --out DIR --mode InternVL-G --what vision

DIR must be new or empty; it gets

* vision.pt2, vision.onnx: `pixel_values` float32 [B, 3, H, W] -> `image_embeds` float32 [B, width]. H and W are
  multiples of the patch size, at least two patches; they may differ.
* text.pt2, text.onnx: `input_ids`, `attention_mask` int64 [T, L], padded on either side -> `text_embeds` [T, width].
* *.onnx.data: the weights of each .onnx. A protobuf holds at most 2 GB, and each side of the 14B has more than 20.
* vision.int8.onnx, text.int8.onnx with `--int8`: the weights of the layers in 8 bits, activations quantised at run
  time.
* the processor, which makes the inputs, with its code: `AutoProcessor.from_pretrained(DIR, trust_remote_code=True)`.
* export.json: settings, `logit_scale`, sizes, and with `--check` the differences between the files and the model.

A .pt2 takes its inputs by position: `torch.export.load(file).module()(pixel_values)`. Weights are exported in float32,
one side after the other, in about twice their memory; `--check` and `--int8` take four times. Besides torch and
transformers this needs `pip install onnx onnxscript onnxruntime`; the exported files need only torch (.pt2) or
onnxruntime (.onnx).
"""

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import AutoModel, AutoModelForTextEncoding, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging as transformers_logging

from tools import ROOT, pages, step

PICTURES = ROOT / "examples" / "pictures"
REPORT = ROOT / "benchmarks" / "export.json"
VISION_CLASS = "modeling_internvl.InternVLVisionModelWithProjection"
MODES = ("InternVL-C", "InternVL-G")
SIDES = ("vision", "text")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 23  # the first with RMSNormalization and Attention, which halve the number of nodes
RTOL, ATOL = 1e-4, 2e-5  # as in the tests against the original's tensors
ROUNDS = 5
Runner = Callable[..., torch.Tensor]

# ------------------------------------------------------------------------------------------------------------- sides


class VisionSide(nn.Module):
    """Pixels to embeddings, as `embed_image`. Positions are always interpolated, without a branch for the table's own
    grid, where bicubic interpolation changes nothing. A reshape cuts the patches: it fails, also in ONNX, if a side is
    not a multiple of the patch size, where a convolution would ignore the remaining pixels.
    """

    inputs, output = ("pixel_values",), "image_embeds"

    def __init__(self, model: nn.Module, mode: str, normalize: bool):
        super().__init__()
        self.model, self.mode, self.normalize = model, mode, normalize
        self.seen_class = sys.modules[type(model).__module__].InternVLSeen

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        states = self.model.vision_model(pixel_embeds=self.embedded(pixel_values)).last_hidden_state
        return self.model.embed_image(self.seen_class(states), self.mode, self.normalize)

    def embedded(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> embedded tokens [B, 1 + N, C]"""
        embeddings = self.model.vision_model.embeddings
        embeddings.check_pixels(pixel_values)
        side, projection = embeddings.patch_size, embeddings.patch_embedding
        patches = pixel_values.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, 3, h, side, w, side]
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, h, w, 3 * side * side]
        tokens = F.linear(patches, projection.weight.flatten(1), projection.bias)  # [B, h, w, C]
        table = embeddings.position_embedding
        tokens = (tokens + grid_of_positions(table, *tokens.shape[1:3])).flatten(1, 2)
        first = (embeddings.class_embedding + table[:, :1]).expand(tokens.shape[0], -1, -1)
        return torch.cat([first, tokens], dim=1)


def grid_of_positions(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The positions [1, height, width, C] of patches, from a square table [1, 1 + G * G, C]."""
    side = round((table.shape[1] - 1) ** 0.5)
    grid = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, C, G, G]
    grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1)


class TextSide(nn.Module):
    """Ids to embeddings, as `embed_text`, without sorting, because the ONNX exporter has no stable sort."""

    inputs, output = ("input_ids", "attention_mask"), "text_embeds"

    def __init__(self, model: nn.Module, normalize: bool):
        super().__init__()
        self.model, self.normalize = model, normalize

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask > 0
        ids = input_ids.scatter(1, places_real_first(mask), input_ids)
        states = self.model.qllama.model(input_ids=ids, use_cache=False).last_hidden_state  # [T, L, C]
        last = (mask.sum(dim=1) - 1)[:, None, None].expand(-1, -1, states.shape[-1])
        embeds = states.gather(1, last).squeeze(1) @ self.model.text_projection
        return F.normalize(embeds, dim=-1) if self.normalize else embeds


def places_real_first(mask: torch.Tensor) -> torch.Tensor:
    """The new position of each token [T, L] that puts the real ones first, in their order."""
    padding = mask.logical_not()
    behind = mask.sum(dim=1, keepdim=True) + padding.long().cumsum(dim=1)
    return torch.where(mask, mask.long().cumsum(dim=1), behind) - 1


# ----------------------------------------------------------------------------------------------------------- loading


@dataclass
class Checkpoint:
    """The model to export, and the kind of embeddings."""

    path: str
    subfolder: str
    mode: str
    normalize: bool

    @property
    def options(self) -> dict[str, Any]:
        return {"subfolder": self.subfolder, "trust_remote_code": True}

    def processor(self) -> Any:
        try:
            return AutoProcessor.from_pretrained(self.path, **self.options)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--model must be a checkpoint: {error}") from None

    def load(self, what: str) -> nn.Module:
        """The side in float32, with only the weights that it needs."""
        options = self.options | {"dtype": torch.float32, "attn_implementation": "sdpa"}
        if what == "text":
            return TextSide(AutoModelForTextEncoding.from_pretrained(self.path, **options), self.normalize).eval()
        if self.mode == "InternVL-G":
            model = without_words(AutoModel.from_pretrained(self.path, **options))
        else:
            del options["trust_remote_code"]  # only Auto classes know it
            model = get_class_from_dynamic_module(VISION_CLASS, self.path).from_pretrained(self.path, **options)
        return VisionSide(model, self.mode, self.normalize).eval()

    def logit_scale(self) -> float:
        """The factor of cosines before a softmax, which neither side contains. The stored dtype maps weights unread."""
        model = AutoModel.from_pretrained(self.path, **self.options, dtype="auto", contrastive_only=True)
        return float(model.logit_scale.detach().float().exp())


def without_words(model: nn.Module) -> nn.Module:
    """Delete what images do not pass through from the joint model: a program exports all weights of its module."""
    del model.itm_head, model.text_projection, model.logit_scale
    del model.qllama.lm_head, model.qllama.model.embed_tokens
    return model


# --------------------------------------------------------------------------------------------------------- exporting


def example_and_shapes(side: nn.Module) -> tuple[tuple[torch.Tensor, ...], dict[str, dict[int, Any]]]:
    """Inputs to trace a side with, and their dynamic dimensions."""
    if isinstance(side, TextSide):
        shape = {0: Dim("texts"), 1: Dim("length")}
        # Two tensors: the same one twice would be traced as one input.
        example = tuple(torch.ones(3, 7, dtype=torch.long) for _ in side.inputs)
        return example, {name: shape for name in side.inputs}
    patch = side.model.config.vision_config.patch_size
    shape = {0: Dim("images"), 2: patch * Dim("rows", min=2), 3: patch * Dim("columns", min=2)}
    return (torch.zeros(2, 3, 5 * patch, 7 * patch),), {"pixel_values": shape}


def traced(side: nn.Module) -> ExportedProgram:
    example, shapes = example_and_shapes(side)
    # Only strict mode keeps `len(tensor)`, which the model calls, dynamic.
    program = torch.export.export(side, example, dynamic_shapes=shapes, strict=True)
    for node in program.graph.nodes:
        if node.target == torch.ops.aten.scaled_dot_product_attention.default:
            # transformers 4.57 sets `enable_gqa` even if each query head has its own key; the ONNX exporter refuses it.
            query, key = (argument.meta["val"] for argument in node.args[:2])
            if query.shape[1] == key.shape[1]:
                node.kwargs = {name: value for name, value in node.kwargs.items() if name != "enable_gqa"}
    program.graph_module.recompile()
    return program


def write_onnx(program: ExportedProgram, side: nn.Module, file: Path) -> list[str]:
    """Write a program as ONNX with its weights in a second file; returns the names of the layers' MatMul nodes."""
    names = {0: "images", 2: "height", 3: "width"} if isinstance(side, VisionSide) else {0: "texts", 1: "length"}
    options = {"dynamo": True, "verbose": False, "opset_version": OPSET, "output_names": [side.output]}
    shapes = {name: names if name == side.inputs[0] else {} for name in side.inputs}
    exported = torch.onnx.export(program, (), dynamic_shapes=shapes, **options)
    in_layers = []
    for node in exported.model.graph:
        if node.op_type == "MatMul" and ".layers." in node.metadata_props.get("pkg.torch.onnx.name_scopes", ""):
            in_layers.append(node.name)
        node.metadata_props.clear()  # otherwise half of the file, with paths of this machine
    exported.save(file, external_data=True)
    return in_layers


def write_int8(source: Path, file: Path, nodes: list[str]) -> None:
    """Quantise MatMul nodes of an ONNX file: weights per channel now, activations at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        file,
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=nodes,
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )
    data = file.with_name(f"{file.name}.data")
    if data.exists():
        data.chmod(file.stat().st_mode)  # onnxruntime makes it readable for its owner alone


def export_side(side: nn.Module, what: str, out: Path, int8: bool) -> dict[str, float]:
    """Write all files of a side; returns their sizes in MB, with the weights beside them."""
    with step(f"{what}: tracing it with torch.export"):
        program = traced(side)
    with step(f"{what}: writing {what}.pt2"):
        torch.export.save(program, out / f"{what}.pt2")
    with step(f"{what}: writing {what}.onnx"):
        nodes = write_onnx(program, side, out / f"{what}.onnx")
    names = [f"{what}.pt2", f"{what}.onnx"]
    if int8:
        names.append(f"{what}.int8.onnx")
        with step(f"{what}: quantising it to {names[2]}"):
            write_int8(out / names[1], out / names[2], nodes)
    return {name: sum(path.stat().st_size for path in out.glob(f"{name}*")) / 1e6 for name in names}


# ---------------------------------------------------------------------------------------------------------- checking


def runner_of(file: Path, inputs: Iterable[str]) -> Runner:
    """Run an exported file on the inputs of its side."""
    if file.suffix == ".pt2":
        return torch.no_grad()(torch.export.load(file).module())
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # for comparable times
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, dict(zip(inputs, (tensor.numpy() for tensor in tensors))))[0])

    return run


def model_of(side: nn.Module) -> Runner:
    """The reference: the model's own call."""
    if isinstance(side, VisionSide):
        return torch.no_grad()(partial(side.model.embed_image, mode=side.mode, normalize=side.normalize))
    return torch.no_grad()(partial(side.model.embed_text, normalize=side.normalize))


def made_up_inputs(side: nn.Module) -> list[tuple[torch.Tensor, ...]]:
    """Inputs of many shapes, all different from the traced one."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(side, VisionSide):
        config = side.model.config.vision_config
        patch, grid = config.patch_size, config.position_grid
        shapes = [(1, grid, grid), (3, grid, grid), (2, grid + 2, grid - 1), (4, 2, grid), (1, 2 * grid, grid)]
        return [
            (torch.randn(rows, 3, height * patch, width * patch, generator=generator),)
            for rows, height, width in shapes
        ]
    vocabulary = side.model.config.qllama_config.vocab_size
    shapes = [(1, 5, "right"), (4, 9, "left"), (8, 16, "right"), (8, 16, "left"), (6, 24, "both"), (2, 80, "right")]
    return [made_up_texts(*shape, vocabulary, generator) for shape in shapes]


def made_up_texts(
    rows: int, length: int, side: str, vocabulary: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [rows, length] of texts of different lengths, padded on either side or on both."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    for row in range(rows):
        padding = row * (length - 3) // rows
        start = {"right": 0, "left": padding, "both": padding // 2}[side]
        real = ids[row, start : start + length - padding]
        real.copy_(torch.randint(3, vocabulary, real.shape, generator=generator))
        real[0], real[-1] = 1, 2  # <s> and </s>
    return ids, (ids > 0).long()


def real_inputs(what: str, processor: Any) -> list[tuple[torch.Tensor, ...]]:
    """The example images one by one, or their names in each language."""
    examples = json.loads((PICTURES / "examples.json").read_text("utf-8"))
    if what == "vision":
        return [(processor(images=[PICTURES / example["file"]]).pixel_values,) for example in examples]
    languages = sorted(examples[0]["name"])
    batches = [processor(text=[example["name"][language] for example in examples]) for language in languages]
    return [(batch.input_ids, batch.attention_mask) for batch in batches]


@dataclass
class Comparison:
    """Embeddings of any number of calls beside those of the model, [rows, width] each."""

    pairs: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def report(self) -> dict[str, float]:
        found, wanted = (torch.cat(each) for each in zip(*self.pairs))
        cosines = F.cosine_similarity(found.double(), wanted.double(), dim=-1)
        return {
            "largest_difference": float((found - wanted).abs().max()),
            "least_cosine": float(cosines.min()),
            "mean_cosine": float(cosines.mean()),
        }

    @property
    def is_close(self) -> bool:
        return all(torch.allclose(found, wanted, RTOL, ATOL) for found, wanted in self.pairs)


def seconds_in_turn(runners: dict[str, Runner], tensors: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """The fastest of some runs of each, run in turn after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(1 + ROUNDS):
        for name, run in runners.items():
            start = time.perf_counter()
            run(*tensors)
            times[name].append(time.perf_counter() - start)
    return {name: min(each[1:]) for name, each in times.items()}


def check_side(side: nn.Module, what: str, files: list[Path], processor: Any) -> tuple[dict, dict, list[str]]:
    """Compare every file with the model: a row of figures for each, the embeddings of the examples by runner, and the
    names of files that are not close.
    """
    runners = {"torch": model_of(side)} | {file.name: runner_of(file, side.inputs) for file in files}
    made_up, real = made_up_inputs(side), real_inputs(what, processor)
    timed = real[0] if what == "text" else (torch.cat([tensors[0] for tensors in real[:4]]),)
    seconds = seconds_in_turn(runners, tuple(tensor[:8] for tensor in timed))
    rows, embeds, failed, wanted = {}, {}, [], []
    for name, run in runners.items():
        found = [[run(*tensors) for tensors in inputs] for inputs in (made_up, real)]
        embeds[name] = torch.cat(found[1])
        wanted = wanted or found  # the model's own come first
        if name == "torch":
            continue
        compared = [Comparison(list(zip(*pair))) for pair in zip(found, wanted)]
        of_shapes, of_examples = (comparison.report for comparison in compared)
        ratio = seconds[name] / seconds["torch"]
        rows[name] = {"shapes": of_shapes, "examples": of_examples, "time_to_torch": ratio}
        if "int8" not in name and not all(comparison.is_close for comparison in compared):
            failed.append(name)
    return rows, embeds, failed


def zero_shot(images: torch.Tensor, texts: torch.Tensor) -> float:
    """The share of images [N] whose own name is the nearest of all N, averaged over languages [languages * N]."""
    nearest = F.normalize(texts, dim=-1).unflatten(0, (-1, len(images))) @ images.T  # [languages, names, images]
    return float((nearest.argmax(dim=1) == torch.arange(len(images))).float().mean())


# --------------------------------------------------------------------------------------------------------- reporting


def table(report: dict[str, Any]) -> str:
    """The files of a report and the results of their check, as Markdown."""
    noise = ["noise: largest difference", "noise: least cosine"]
    head = ["file", "MB", *noise, "examples: least, mean cosine", "time / torch's"]
    rows = []
    for name, size in report["megabytes"].items():
        row = report["checks"][name]
        shapes, examples = row["shapes"], row["examples"]
        difference, cosine = f"{shapes['largest_difference']:.1e}", f"{shapes['least_cosine']:.5f}"
        cosines = f"{examples['least_cosine']:.5f}, {examples['mean_cosine']:.5f}"
        rows.append([f"`{name}`", f"{size:.1f}", difference, cosine, cosines, f"{row['time_to_torch']:.2f}"])
    lines = [
        pages.table(head, rows),
        "",
        "Compared with the model: noise and random ids in many shapes, and the example images and their names. The",
        "last column is the time for a few examples, divided by that of the model in torch: below 1 is faster.",
    ]
    if found := [f"{name} {share:.3f}" for name, share in report["zero_shot"].items()]:
        lines += ["", f"Share of example images whose own name is the nearest: {', '.join(found)}."]
    kind = "of length 1" if report["normalized"] else "not normalised"
    packages = ", ".join(f"{name} {number}" for name, number in report["packages"].items())
    lines += ["", f"{report['mode']}, embeddings {kind}; on a CPU, {report['threads']} thread(s); {packages}."]
    return "\n".join(lines)


def described(checkpoint: Checkpoint, side: nn.Module) -> dict[str, Any]:
    """The settings that a program needs to use the files."""
    config = side.model.config
    return {
        "model": checkpoint.path if checkpoint.path != str(ROOT) else ".",
        "subfolder": checkpoint.subfolder,
        "mode": checkpoint.mode,
        "normalized": checkpoint.normalize,
        "width": config.clip_embed_dim,
        "patch_size": config.vision_config.patch_size,
        "image_size": config.image_size,
        "logit_scale": checkpoint.logit_scale(),
        "opset": OPSET,
        "dtype": "float32",
        "packages": {name: version(name) for name in ("torch", "transformers", *PACKAGES)},
        "threads": torch.get_num_threads(),
        "megabytes": {},
        "checks": {},
        "zero_shot": {},
    }


# -------------------------------------------------------------------------------------------------------------- main


def check_packages(names: Iterable[str]) -> None:
    if missing := [name for name in names if find_spec(name) is None]:
        raise SystemExit(f"Exporting needs {', '.join(missing)}: pip install {' '.join(missing)}")


def checked_folder(out: Path) -> Path:
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise SystemExit(f"--out must be a new or an empty folder, got {out}.")
    out.mkdir(parents=True, exist_ok=True)
    return out


def export(
    checkpoint: Checkpoint, out: Path, what: Iterable[str] = SIDES, int8: bool = False, check: bool = False
) -> dict[str, Any]:
    """Write everything into the folder `out`.

    Returns:
        The content of export.json; "failed" names the files that are not close to the model.
    """
    processor = checkpoint.processor()
    processor.save_pretrained(out)
    processor.image_processor.save_pretrained(out)  # a file of its own, which transformers 4.57 needs
    report: dict[str, Any] = {}
    embeds: dict[str, dict[str, torch.Tensor]] = {}
    failed: list[str] = []
    for name in what:
        with step(f"{name}: loading its weights"):
            side = checkpoint.load(name)
        report = report or described(checkpoint, side)
        sizes = export_side(side, name, out, int8)
        report["megabytes"] |= sizes
        if check:
            with step(f"{name}: comparing {', '.join(sizes)} with the model"):
                rows, found, distant = check_side(side, name, [out / file for file in sizes], processor)
            report["checks"] |= rows
            embeds[name] = {runner.removeprefix(f"{name}."): each for runner, each in found.items()}
            failed += distant
    if len(embeds) == len(SIDES):
        report["zero_shot"] = {kind: zero_shot(embeds["vision"][kind], embeds["text"][kind]) for kind in embeds["text"]}
    (out / "export.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return report | {"failed": failed}


def quieten() -> None:
    """Silence the exporters about packages that are not needed and about their own future."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder that is new or empty")
    parser.add_argument("--model", help="path or id of a checkpoint; by default the tiny one of this repository")
    parser.add_argument("--subfolder", help='of the checkpoint; "tiny" without --model, none with it')
    parser.add_argument("--mode", choices=MODES, default=MODES[0])
    parser.add_argument("--what", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--unnormalized", action="store_true", help="do not normalise embeddings, as `encode_image`")
    parser.add_argument("--int8", action="store_true", help="also write ONNX with dynamically quantised layers")
    parser.add_argument("--check", action="store_true", help="compare all files with the model")
    parser.add_argument(
        "--report", type=Path, help="with --check: write export.json here too (ours updates docs/export.md)"
    )
    options = parser.parse_args(arguments)
    if options.report and not options.check:
        parser.error("--report needs --check")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    check_packages(PACKAGES)
    quieten()
    transformers_logging.disable_progress_bar()  # loading is a step, with its seconds
    subfolder = ("" if options.model else "tiny") if options.subfolder is None else options.subfolder
    checkpoint = Checkpoint(options.model or str(ROOT), subfolder, options.mode, not options.unnormalized)
    checkpoint.processor()  # fails before anything is written
    out = checked_folder(options.out)
    report = export(checkpoint, out, options.what, options.int8, options.check)
    print(f"Written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if options.check:
        print(table(report))
        if options.report:
            options.report.write_bytes((out / "export.json").read_bytes())
            if options.report.resolve() == REPORT:
                pages.put(ROOT / "docs" / "export.md", "export", table(report))
    if report["failed"]:
        raise SystemExit(f"Not close to the model (rtol {RTOL}, atol {ATOL}): {', '.join(report['failed'])}")


if __name__ == "__main__":
    main()
