"""
The base class of all models here: fresh weights, and strict loading in four steps, plan, read, merge, verify.

Plans are `device_map`, `max_memory`, quantisation and tensor parallelism; what cannot work is refused before anything
is read. Merging adds the LoRA adapters of checkpoints that the original's code fine-tuned.
"""

import os
import re
from collections.abc import Iterable
from copy import copy, deepcopy
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

# The config's names for the ranks of the original's LoRA adapters, and what these are multiplied with: alpha / r.
LORA_RANKS = ("use_backbone_lora", "use_qllama_lora")
LORA_SCALING = 2.0


class InternPreTrainedModel(PreTrainedModel):
    """What the towers and the joint model share: fresh weights, strict loading, supported attention functions."""

    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _tp_plan: dict[str, str] = {}
    _keep_unquantized: tuple[str, ...] = ()  # full names of modules, where the user names none

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # torch.nn.init functions only: transformers guards those against overwriting what was loaded.
        is_norm = type(module).__name__ in ("RMSNorm", "LayerNorm")
        if not is_norm and not isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            return
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(parameter)
            elif is_norm:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range)

    def post_init(self) -> None:
        """As in transformers; the plan for tensor parallelism is what the classes say and nothing else."""
        super().post_init()
        collect_tp_plan(self)

    def compile_layers(self, **options: Any) -> None:
        """
        Compile what repeats, in place, where `model.compile()` would compile all layers as one: the same code serves
        every layer, so that it takes seconds however deep the model is. Quantised models on the CPU need it.

        Args:
            options: of `torch.compile`, such as `mode`.
        """
        for module in self.modules():
            kind = type(module).__name__
            if kind in ("InternVisionEncoderLayer", "QLlamaMLP"):
                module.compile(**options)
            elif kind in ("QLlamaAttention", "QLlamaCrossAttention"):
                # Not as a whole: a layer's own place in the cache would make each of them a case of its own.
                for part in module.children():
                    part.compile(**options)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would guess from the source text of each module

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        strict: bool = True,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        As in transformers, but strict: tensors that the checkpoint lacks, has in another shape or has too many are an
        error, where transformers would only log them and go on with random weights.

        Args:
            strict (`bool`): pass `False` to accept such a checkpoint, as when new heads are added for fine-tuning.

        Raises:
            `ValueError`: names the tensors that are missing, superfluous or of another shape. Before anything is read:
                what is wrong with `device_map` or `max_memory`, or the size that so many processes cannot share.

        A checkpoint with adapters of the original's fine-tuning (`use_backbone_lora`, `use_qllama_lora`) is read into
        RAM whole, and its adapters are added to its weights.
        """
        checkpoint = pretrained_model_name_or_path
        refuse_known_bad("loading")
        if kwargs.get("device_map") is not None:
            refuse_known_bad("device maps")
        if strict:
            kwargs["ignore_mismatched_sizes"] = True  # transformers' own error names no tensor; ours below does
        ranks = tensor_parallel_ranks(**kwargs)
        cls._check_plan(checkpoint, kwargs, ranks)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = with_skip_list(kwargs["quantization_config"], cls._keep_unquantized)
        try:
            source, plain_kwargs = cls._without_adapters(checkpoint, kwargs)
            with root_parameters_in_tensor_parallel():
                model, info = super().from_pretrained(source, *model_args, output_loading_info=True, **plain_kwargs)
        except SafetensorError as error:
            raise OSError(f"{_damaged_files(checkpoint, kwargs.get('subfolder', ''))}: {error}") from error
        if source is not checkpoint:  # transformers was not told where all this comes from
            model.name_or_path = model.config.name_or_path = str(checkpoint)
            if model.can_generate():
                model.generation_config = _generation_config(checkpoint, kwargs) or model.generation_config
        problems = {kind: info[kind] for kind in LOADING_PROBLEMS if info.get(kind)}
        if strict and problems:
            listed = "; ".join(f"{kind}: {_abbreviate(names)}" for kind, names in problems.items())
            raise ValueError(f"The checkpoint does not fit {cls.__name__} ({listed}). `strict=False` loads it anyhow.")
        save_quantized_root_parameters(model)
        return (model, info) if output_loading_info else model

    @classmethod
    def _check_plan(cls, checkpoint: Any, kwargs: dict[str, Any], ranks: int) -> None:
        """Refuse a plan that cannot work; write out what a `device_map` says of "all the rest"."""
        device_map, max_memory = kwargs.get("device_map"), kwargs.get("max_memory")
        quantised_by = getattr(kwargs.get("quantization_config"), "quant_method", None)
        if quantised_by == "torchao" and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("`device_map` offloads to the disk, which a model that torchao quantises cannot do.")
        if ranks > 1:
            check_ranks(cls._config_for(checkpoint, kwargs), ranks)
        # Not every release reads a checkpoint of a single file for {"": "disk"}; written out they do.
        if isinstance(device_map, dict) and (set(device_map) != {""} or device_map[""] == "disk"):
            kwargs["device_map"] = complete_device_map(cls._empty_model(checkpoint, kwargs), device_map)
        elif isinstance(device_map, str) and max_memory and kwargs.get("quantization_config") is None:
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype", DEFAULT_DTYPE))
            if isinstance(dtype, str):
                dtype = cls._config_for(checkpoint, kwargs).dtype if dtype == "auto" else getattr(torch, dtype)
            check_budgets(cls._empty_model(checkpoint, kwargs), max_memory, dtype or torch.float32)

    @classmethod
    def _without_adapters(cls, checkpoint: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A source and arguments that load the same: if the checkpoint has adapters, its weights with them added."""
        if checkpoint is None or kwargs.get("state_dict") is not None:
            return checkpoint, kwargs
        config = cls._config_for(checkpoint, kwargs)
        fields = vars(config)
        if not set(LORA_RANKS) & set(fields):  # the vision tower's own config, made from that of the joint model
            fields, _ = PretrainedConfig.get_config_dict(checkpoint, **_hub_arguments(kwargs))
        if not any(fields.get(name) for name in LORA_RANKS):
            return checkpoint, kwargs
        device_map = kwargs.get("device_map")
        if not CAN_OFFLOAD_A_STATE and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "`device_map` offloads to the disk, which needs a checkpoint without adapters: save it first."
            )
        state = read_checkpoint(checkpoint, **_hub_arguments(kwargs))
        if not any(".lora_" in name for name in state):
            return checkpoint, kwargs  # adapters that were never trained change nothing
        config = deepcopy(config)
        for name in set(LORA_RANKS) & set(vars(config)):
            setattr(config, name, 0)
        return None, kwargs | {"config": config, "state_dict": merge_adapters(state)}

    @classmethod
    def _config_for(cls, checkpoint: Any, kwargs: dict[str, Any]) -> Any:
        """The config that `from_pretrained` will use."""
        config = kwargs.get("config")
        if isinstance(config, PretrainedConfig):
            return config
        others = {name: value for name, value in kwargs.items() if name not in ("config", "device_map", "max_memory")}
        return cls.config_class.from_pretrained(checkpoint, return_unused_kwargs=True, **others)[0]

    @classmethod
    def _empty_model(cls, checkpoint: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
        """The model that `from_pretrained` will fill, without memory for its weights."""
        with torch.device("meta"):
            return cls(cls._config_for(checkpoint, kwargs))


def blocks_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that must stay on one device, by name."""
    return {name: module for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules}


def complete_device_map(model: PreTrainedModel, device_map: dict[str, Any]) -> dict[str, Any]:
    """
    Write out what the key "" of a map, "all the rest", stands for, which accelerate cannot mix with other keys. What
    sits on the model itself stays in memory if it is to go to the disk: accelerate offloads modules only.

    Raises:
        `ValueError`: a key that is no part of the model, a part without a device, or a block on several devices.
    """
    devices = devices_by_map(model, device_map)
    completed = {key: device for key, device in device_map.items() if key}
    for name, _ in model.named_parameters(recurse=False):
        completed[name] = "cpu" if devices[name] == "disk" else devices[name]
    for name, device in devices.items():
        if not any(is_part(name, key) for key in completed):
            # The largest part around this parameter that no other key speaks of.
            steps = name.split(".")
            parts = [".".join(steps[: depth + 1]) for depth in range(len(steps))]
            completed[next(part for part in parts if not any(is_part(key, part) for key in completed))] = device
    return completed


def is_part(name: str, whole: str) -> bool:
    """Whether a module or parameter is another one, or in it; everything is in the model, whose name is ""."""
    return whole in ("", name) or name.startswith(f"{whole}.")


def devices_by_map(model: PreTrainedModel, device_map: dict[str, Any]) -> dict[str, Any]:
    """The device of every parameter, by name; it raises what [`complete_device_map`] lists."""
    known = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    if unknown := sorted(set(device_map) - set(known)):
        raise ValueError(f"`device_map` names what {type(model).__name__} does not have: {_abbreviate(unknown)}.")
    keys = {name: [key for key in device_map if is_part(name, key)] for name, _ in model.named_parameters()}
    if missing := [name for name, found in keys.items() if not found]:
        raise ValueError(f'`device_map` gives no device, nor one for "" (all the rest), to {_abbreviate(missing)}.')
    devices = {name: device_map[max(found, key=len)] for name, found in keys.items()}
    for block in blocks_of(model):
        places = {str(device) for name, device in devices.items() if is_part(name, block)}
        if len(places) > 1:
            raise ValueError(f"`device_map` splits {block}, which must stay whole, over {', '.join(sorted(places))}.")
    return devices


def check_budgets(model: PreTrainedModel, max_memory: dict[Any, Any], dtype: torch.dtype) -> None:
    """
    Raises:
        `ValueError`: the budget of an accelerator is not 0, which leaves it out, and too small for the largest block.
    """
    try:
        from accelerate.utils import convert_file_size_to_int
    except ImportError as error:
        raise ImportError("`device_map` needs accelerate: pip install accelerate") from error

    sizes = {name: sum(tensor.numel() for tensor in block.parameters()) for name, block in blocks_of(model).items()}
    largest = max(sizes, key=lambda name: sizes[name])
    needed = sizes[largest] * dtype.itemsize
    for device, budget in max_memory.items():
        given = convert_file_size_to_int(budget) if isinstance(budget, str) else budget
        if device not in ("cpu", "disk") and 0 < given < needed:
            raise ValueError(
                f"`max_memory` gives {int(given):,} bytes to device {device}, and the largest block, {largest}, needs"
                f" {needed:,} in {dtype}. Give it more, or 0 to leave it out."
            )


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained` that say where a checkpoint lies."""
    names = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def _generation_config(checkpoint: Any, kwargs: dict[str, Any]) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(checkpoint, **_hub_arguments(kwargs))
    except OSError:  # the checkpoint has none
        return None


def read_checkpoint(checkpoint: Any, subfolder: str = "", **hub_arguments: Any) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in a folder or on the Hub, by name."""
    if not os.path.isdir(checkpoint):
        patterns = ["*model*.safetensors", "*pytorch_model*.bin"]
        checkpoint = snapshot_download(checkpoint, allow_patterns=patterns, **hub_arguments)
    folder = Path(checkpoint, subfolder)
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise OSError(f"{folder} holds no weights, neither model*.safetensors nor pytorch_model*.bin.")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        pickled = file.suffix == ".bin"
        state |= torch.load(file, map_location="cpu", weights_only=True, mmap=True) if pickled else load_file(file)
    return state


def merge_adapters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The plain weights of a checkpoint of the original's fine-tuning with LoRA (arXiv:2106.09685), which had PEFT wrap a
    tower: W + 2 B A, alpha being 2 r, and names without what PEFT adds; newer PEFT calls what it adapts `base_layer`.

    Raises:
        `ValueError`: half an adapter, or one without the weights that it adapts.
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
            raise ValueError(f"The checkpoint's adapter of {module} is not whole: it has {sorted(halves)}.")
        change = halves["B"].float() @ halves["A"].float()
        plain[f"{module}.weight"] = torch.add(weight.float(), change, alpha=LORA_SCALING).to(weight.dtype)
    return plain


def with_skip_list(quantization_config: Any, modules: Iterable[str]) -> Any:
    """
    A copy of a quantisation config that leaves `modules` as they are; the config itself if it has a list of its own.

    Args:
        quantization_config: of transformers, or the dict of one.
        modules (iterable of `str`): full names of modules.
    """
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
    """Among how many processes these arguments of `from_pretrained` split each layer; 1 for no tensor parallelism."""
    asked = distributed_config if isinstance(distributed_config, dict) else getattr(distributed_config, "__dict__", {})
    tp_plan, tp_size = asked.get("tp_plan", tp_plan), asked.get("tp_size", tp_size)
    return tp_size or (1 if tp_plan is None else int(os.environ.get("WORLD_SIZE", 1)))


def check_ranks(config: Any, ranks: int) -> None:
    """Refuse a number of processes that cannot share the split layers (`_tp_plan`) evenly, before anything is read."""
    for part in [getattr(config, name) for name in config.sub_configs] or [config]:
        for name in ("num_key_value_heads", "hidden_size", "intermediate_size"):
            size = getattr(part, name, 0)
            if size % ranks:
                problem = f"{name}={size} of {part.model_type} does not divide by {ranks}"
                raise ValueError(f"{ranks} processes cannot share the model by tensor parallelism: {problem}.")


def _damaged_files(checkpoint: Any, subfolder: str) -> str:
    """The safetensors files of a local checkpoint that cannot be read, or the checkpoint's name."""
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
