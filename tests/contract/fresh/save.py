"""Write the checkpoints that load.py reads in another interpreter: whole, in parts, and with LoRA adapters."""

import json
import shutil

import torch
from report import TRAINED, WORK, captions_of, digests, embeds_of, finish, part
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

CLONE = {"pretrained_model_name_or_path": WORK / "clone", "subfolder": "tiny", "trust_remote_code": True}
model = AutoModel.from_pretrained(**CLONE, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(**CLONE)
PARTS = {
    "text_part": "InternVLTextModelWithProjection",
    "vision_part": "InternVLVisionModelWithProjection",
}
RANK = 2


@part
def embeds():
    return embeds_of(model, processor)


@part
def captions():
    return captions_of(model, processor)


@part
def saved():
    model.save_pretrained(WORK / "saved", max_shard_size="6MB")
    processor.save_pretrained(WORK / "saved")
    return digests(model.state_dict())


@part
def parts():
    found = {}
    for name, class_name in PARTS.items():
        model_class = get_class_from_dynamic_module(f"modeling_internvl.{class_name}", TRAINED)
        one = model_class.from_pretrained(TRAINED, dtype="auto")
        one.save_pretrained(WORK / name)
        found[name] = digests(one.state_dict())
    one = AutoModel.from_pretrained(**CLONE, dtype="auto", contrastive_only=True)
    one.save_pretrained(WORK / "contrastive_part")
    return found | {"contrastive_part": digests(one.state_dict())}


def adapted(name, tower, targets, state, merged):
    """Put a tower into `state` as PEFT names it, and W + alpha / rank * B A into `merged`; alpha is twice the rank."""
    for key, tensor in tower.state_dict().items():
        module, _, kind = key.rpartition(".")
        new = f"{name}.base_model.model.{module}"
        if kind != "weight" or not module.endswith(targets):
            state[f"{new}.base_layer.{kind}" if module.endswith(targets) else f"{new}.{kind}".replace("..", ".")] = (
                tensor
            )
            continue
        a, b = torch.randn(RANK, tensor.shape[1]) * 0.1, torch.randn(tensor.shape[0], RANK) * 0.1
        state |= {
            f"{new}.base_layer.weight": tensor,
            f"{new}.lora_A.default.weight": a,
            f"{new}.lora_B.default.weight": b,
        }
        merged[f"{name}.{key}"] = tensor + 2 * b @ a


@part
def lora():
    torch.manual_seed(0)
    state = {key: each for key, each in model.state_dict().items() if not key.startswith(("vision_model.", "qllama."))}
    merged = model.state_dict()
    adapted("vision_model", model.vision_model, ("attn.qkv", "mlp.fc2"), state, merged)
    adapted("qllama", model.qllama, ("self_attn.q_proj", "mlp.down_proj"), state, merged)
    folder = shutil.copytree(TRAINED, WORK / "lora", ignore=shutil.ignore_patterns("*.safetensors*", "__pycache__"))
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_backbone_lora": RANK, "use_qllama_lora": RANK}))
    torch.save(merged, WORK / "merged.pt")
    return len(state) - len(merged)


finish()
