"""Base class of all models: weight initialisation, and strict loading in four steps: plan, read, merge, verify.

A plan is made of `device_map`, `max_memory`, quantisation and tensor parallelism; one that cannot work is an error
before any file is read. Merging adds LoRA adapters to the weights of checkpoints that the original code fine-tuned.
"""

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from copy import copy, deepcopy
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

from .compat_internvl import (
    CAN_OFFLOAD_A_STATE,
    DEFAULT_DTYPE,
    LOADING_PROBLEMS,
    collect_tp_plan,
    refuse_known_bad,
    root_parameters_in_tensor_parallel,
    save_quantized_root_parameters,
)

# Config fields with the ranks of the original's LoRA adapters, and the scale of these adapters: alpha / r.
LORA_RANKS = ("use_backbone_lora", "use_qllama_lora")
LORA_SCALING = 2.0


class InternPreTrainedModel(PreTrainedModel):
    """Base class of the towers and the joint model: initialisation, strict loading, supported attention functions."""

    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _tp_plan: dict[str, str] = {}
    _keep_unquantized: tuple[str, ...] = ()  # full module names, used unless the user lists modules

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only torch.nn.init functions: transformers keeps them from overwriting loaded weights.
        if isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if (bias := getattr(module, "bias", None)) is not None:
                nn.init.zeros_(bias)

    def post_init(self) -> None:
        """As in transformers, but the tensor-parallel plan contains exactly what the classes declare in `_tp_plan`."""
        super().post_init()
        collect_tp_plan(self)

    def compile_layers(self, **options: Any) -> None:
        """Compile the repeated blocks in place. All layers share the compiled code, so compilation takes seconds at any
        depth, while `model.compile()` would compile all layers as one graph. Quantised models on the CPU need this.

        Args:
            options: options of `torch.compile`, for example `mode`.
        """
        for module in self.modules():
            kind = type(module).__name__
            if kind in ("InternVisionEncoderLayer", "QLlamaMLP"):
                module.compile(**options)
            elif kind in ("QLlamaAttention", "QLlamaCrossAttention"):
                # Only its parts: the layer's index in the cache would force a recompilation for every layer.
                for part in module.children():
                    part.compile(**options)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would guess from each module's source code

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        strict: bool = True,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, but strict: missing tensors, unexpected tensors and tensors of another shape are an
        error. transformers would log them and continue with random weights.

        Args:
            strict (`bool`): `False` accepts such a checkpoint, for example when fine-tuning adds new heads.

        Raises:
            `ValueError`: the message names the tensors that are missing, unexpected or of another shape. Before any
                file is read: `device_map`, `max_memory` or the number of tensor-parallel ranks cannot work.

        A checkpoint with LoRA adapters of the original code (`use_backbone_lora`, `use_qllama_lora`) is read into RAM
        as a whole, and its adapters are added to its weights.
        """
        checkpoint = pretrained_model_name_or_path
        refuse_known_bad("loading")
        config = cls._planned_config(checkpoint, kwargs)
        options = cls._plan(config, kwargs)
        if strict:
            options["ignore_mismatched_sizes"] = True  # the error of transformers names no tensor; the one below does
        try:
            merged = cls._options_with_merged_weights(checkpoint, config, options)
            # transformers takes either a checkpoint or a state dict.
            source, options = (checkpoint, options) if merged is None else (None, merged)
            with root_parameters_in_tensor_parallel():
                model, info = super().from_pretrained(source, *model_args, output_loading_info=True, **options)
        except SafetensorError as error:
            raise OSError(f"{_damaged_files(checkpoint, kwargs.get('subfolder', ''))}: {error}") from error
        if merged is not None:
            model.name_or_path = model.config.name_or_path = str(checkpoint)
            if model.can_generate():
                with suppress(OSError):  # the checkpoint has no generation config
                    model.generation_config = GenerationConfig.from_pretrained(checkpoint, **_hub_arguments(kwargs))
        problems = {kind: info[kind] for kind in LOADING_PROBLEMS if info.get(kind)}
        if strict and problems:
            listed = "; ".join(f"{kind}: {_abbreviate(names)}" for kind, names in problems.items())
            raise ValueError(f"The checkpoint does not fit {cls.__name__} ({listed}). `strict=False` loads it anyway.")
        save_quantized_root_parameters(model)
        return (model, info) if output_loading_info else model

    @classmethod
    def _planned_config(cls, checkpoint: Any, kwargs: dict[str, Any]) -> Any:
        """The config that transformers will use. Its dtype is that of the checkpoint."""
        config = kwargs.get("config")
        if isinstance(config, PretrainedConfig):
            return config
        others = ("config", "device_map", "max_memory", "dtype", "torch_dtype", "quantization_config")
        options = {name: value for name, value in kwargs.items() if name not in others}
        return cls.config_class.from_pretrained(config or checkpoint, return_unused_kwargs=True, **options)[0]

    @classmethod
    def _plan(cls, config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments for transformers, completed. Raises an error for a plan that cannot work."""
        plan = dict(kwargs)
        device_map: Any = kwargs.get("device_map")
        max_memory: Any = kwargs.get("max_memory")
        if device_map is not None:
            refuse_known_bad("device maps")
        quantization = with_skip_list(kwargs.get("quantization_config"), cls._keep_unquantized)
        if quantization is not None:
            plan["quantization_config"] = quantization
            if quantization.quant_method == "torchao" and uses_disk(device_map):
                raise ValueError("`device_map` offloads to the disk, which a model quantised by torchao cannot.")
        check_ranks(config, tensor_parallel_ranks(**kwargs))
        # Some releases fail on {"": "disk"} with a single-file checkpoint, but accept the completed map.
        is_split = isinstance(device_map, dict) and (set(device_map) != {""} or uses_disk(device_map))
        has_budget = isinstance(device_map, str) and max_memory and quantization is None and find_spec("accelerate")
        if is_split or has_budget:
            with torch.device("meta"):
                model = cls(config)
        if is_split:
            plan["device_map"] = complete_device_map(model, device_map)
        if has_budget:
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype", DEFAULT_DTYPE))
            dtype = getattr(torch, dtype, config.dtype) if isinstance(dtype, str) else dtype  # "auto" is the config's
            dtype = dtype or torch.float32
            if isinstance(dtype, torch.dtype):  # a dict of dtypes is left to transformers
                check_budgets(model, max_memory, dtype)
        return plan

    @classmethod
    def _options_with_merged_weights(
        cls, checkpoint: Any, config: Any, options: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The options that load a checkpoint's merged weights; None if the checkpoint has no adapters."""
        if checkpoint is None or options.get("state_dict") is not None:
            return None
        ranks = vars(config)
        if not set(LORA_RANKS) & set(ranks):  # the vision tower's config, taken from the joint model's
            ranks, _ = PretrainedConfig.get_config_dict(checkpoint, **_hub_arguments(options))
        if not any(ranks.get(name) for name in LORA_RANKS):
            return None
        if not CAN_OFFLOAD_A_STATE and uses_disk(options.get("device_map")):
            advice = "needs a checkpoint without adapters: load this one without `device_map` and save it"
            raise ValueError(f"`device_map` offloads to the disk, which {advice}.")
        state = read_checkpoint(checkpoint, variant=options.get("variant"), **_hub_arguments(options))
        if not any(".lora_" in name for name in state):
            return None  # the config names adapters, but the checkpoint has none
        config = deepcopy(config)
        for name in set(LORA_RANKS) & set(vars(config)):
            setattr(config, name, 0)
        rest = dict(options)
        if not isinstance(options.get("config"), PretrainedConfig):  # the planned config has these fields
            rest = {name: value for name, value in options.items() if name not in config.declared_fields()}
        return rest | {"config": config, "state_dict": merge_adapters(state)}


def uses_disk(device_map: Any) -> bool:
    """Whether a device map places a part on the disk."""
    return isinstance(device_map, dict) and "disk" in device_map.values()


def blocks_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that must stay on one device, by name."""
    return {name: module for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules}


def complete_device_map(model: PreTrainedModel, device_map: dict[str, Any]) -> dict[str, Any]:
    """Replace the key "" of a device map, which means all the rest, by names: accelerate cannot mix it with other keys.
    Parameters of the model itself stay in memory where the map says "disk", because accelerate offloads modules only.
    """
    devices = devices_by_map(model, device_map)
    completed = {key: device for key, device in device_map.items() if key}
    for name, _ in model.named_parameters(recurse=False):
        completed[name] = "cpu" if devices[name] == "disk" else devices[name]
    for name, device in devices.items():
        if not any(is_part(name, key) for key in completed):
            # The largest module around this parameter that contains no other key.
            parts = accumulate(name.split("."), "{}.{}".format)
            completed[next(part for part in parts if not any(is_part(key, part) for key in completed))] = device
    return completed


def is_part(name: str, whole: str) -> bool:
    """Whether the module or parameter `name` is `whole` or inside it; "" is the whole model."""
    return whole in ("", name) or name.startswith(f"{whole}.")


def devices_by_map(model: PreTrainedModel, device_map: dict[str, Any]) -> dict[str, Any]:
    """The device of every parameter, by name. Raises a `ValueError` for a key that names no part of the model, a part
    without a device, or a block that is split over devices.
    """
    known = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    if unknown := sorted(set(device_map) - set(known)):
        raise ValueError(f"`device_map` names parts that {type(model).__name__} does not have: {_abbreviate(unknown)}.")
    keys = {name: [key for key in device_map if is_part(name, key)] for name, _ in model.named_parameters()}
    if missing := [name for name, found in keys.items() if not found]:
        raise ValueError(f'`device_map` gives no device to {_abbreviate(missing)}. "" stands for all the rest.')
    devices = {name: device_map[max(found, key=len)] for name, found in keys.items()}
    for block in blocks_of(model):
        places = {str(device) for name, device in devices.items() if is_part(name, block)}
        if len(places) > 1:
            raise ValueError(f"`device_map` splits {block} over {', '.join(sorted(places))}; it must be on one device.")
    return devices


def check_budgets(model: PreTrainedModel, max_memory: dict[Any, Any], dtype: torch.dtype) -> None:
    """Raise a `ValueError` if an accelerator's budget is too small for the largest block; 0 leaves the device out."""
    from accelerate.utils import convert_file_size_to_int

    sizes = {name: sum(tensor.numel() for tensor in block.parameters()) for name, block in blocks_of(model).items()}
    largest = max(sizes, key=lambda name: sizes[name])
    needed = sizes[largest] * dtype.itemsize
    for device, budget in max_memory.items():
        given = convert_file_size_to_int(budget) if isinstance(budget, str) else budget
        if device not in ("cpu", "disk") and 0 < given < needed:
            raise ValueError(
                f"`max_memory` gives {int(given):,} bytes to device {device}, but the largest block, {largest}, needs"
                f" {needed:,} in {dtype}. Raise the budget, or set it to 0 to leave the device out."
            )


def with_skip_list(quantization_config: Any, modules: Iterable[str]) -> Any:
    """A copy of a quantisation config or its dict that skips `modules`, unless the config has its own list."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(dict(quantization_config))
    for name in ("modules_to_not_convert", "llm_int8_skip_modules"):
        if modules and getattr(quantization_config, name, ()) is None:
            quantization_config = copy(quantization_config)
            setattr(quantization_config, name, list(modules))
    return quantization_config


def tensor_parallel_ranks(
    tp_plan: Any = None, tp_size: int | None = None, distributed_config: Any = None, **others: Any
) -> int:
    """Number of tensor-parallel ranks requested by these arguments of `from_pretrained` (1 = none)."""
    given = distributed_config if isinstance(distributed_config, dict) else getattr(distributed_config, "__dict__", {})
    tp_plan, tp_size = given.get("tp_plan", tp_plan), given.get("tp_size", tp_size)
    return tp_size or (1 if tp_plan is None else int(os.environ.get("WORLD_SIZE", 1)))


def check_ranks(config: Any, ranks: int) -> None:
    """Raise a `ValueError` if the layers of `_tp_plan` cannot be split evenly over `ranks`."""
    for part in [getattr(config, name) for name in config.sub_configs] or [config]:
        for name in ("num_key_value_heads", "hidden_size", "intermediate_size"):
            if (size := getattr(part, name, 0)) % ranks:
                problem = f"{name}={size} of {part.model_type} is not divisible by {ranks}"
                raise ValueError(f"Tensor parallelism over {ranks} ranks is not possible: {problem}.")


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that locate a checkpoint."""
    names = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def read_checkpoint(
    checkpoint: Any, subfolder: str = "", variant: str | None = None, **hub_arguments: Any
) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in a folder or on the Hub, by name."""
    if not os.path.isdir(checkpoint):
        patterns = ["*model*.safetensors", "*model*.bin", "*model*.index*.json"]
        checkpoint = snapshot_download(checkpoint, allow_patterns=patterns, **hub_arguments)
    folder = Path(checkpoint, subfolder)
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(folder, variant):
        pickled = file.suffix == ".bin"
        state |= torch.load(file, map_location="cpu", weights_only=True, mmap=True) if pickled else load_file(file)
    return state


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files of weights that transformers would read: one file or the shards of an index, safetensors first."""
    middle = f".{variant}" if variant else ""
    for name, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        if (file := folder / f"{name}{middle}.{ending}").is_file():
            return [file]
        if (index := folder / f"{name}.{ending}.index{middle}.json").is_file():
            return [folder / file for file in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    raise OSError(f"{folder} holds no weights, neither model*.safetensors nor pytorch_model*.bin.")


def merge_adapters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Merge the LoRA adapters (arXiv:2106.09685) of a checkpoint that the original code fine-tuned with PEFT: each
    weight becomes W + 2 B A, since alpha = 2 r. Names lose the parts that PEFT adds, such as `base_layer` of newer
    releases. Raises a `ValueError` for an adapter without A, B or the weight that it adapts.
    """
    plain: dict[str, torch.Tensor] = {}
    adapters: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        name = re.sub(r"(^|\.)base_model\.model\.", r"\1", name)
        half = re.fullmatch(r"(.+)\.lora_([AB])\.default\.weight", name)
        if half:
            adapters.setdefault(half[1], {})[half[2]] = tensor
        else:
            plain[name.replace(".base_layer.", ".")] = tensor
    for module, halves in adapters.items():
        weight = plain.get(f"{module}.weight")
        if weight is None or set(halves) != {"A", "B"}:
            raise ValueError(f"The checkpoint's adapter of {module} is incomplete: it has {sorted(halves)}.")
        change = halves["B"].float() @ halves["A"].float()
        plain[f"{module}.weight"] = torch.add(weight.float(), change, alpha=LORA_SCALING).to(weight.dtype)
    return plain


def _damaged_files(checkpoint: Any, subfolder: str) -> str:
    """The unreadable safetensors files of a local checkpoint, or the checkpoint's name."""
    damaged = []
    for file in sorted(Path(checkpoint, subfolder).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError:
            damaged.append(str(file))
    return ", ".join(damaged) or str(checkpoint)


def _abbreviate(names: Any, most: int = 5) -> str:
    names = sorted(str(name) for name in names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
