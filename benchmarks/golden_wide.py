"""The weights and images of golden/wide, which are too large to store. The tests import this module too."""

import zlib

import numpy as np
import torch


def regenerated(name: str, shape: torch.Size) -> torch.Tensor:
    """A parameter of golden/wide, by the first rule that fits (docs/model.md, "Regenerated weights")."""
    seed = zlib.crc32(f"5:{name}".encode())
    z = torch.from_numpy(np.asarray(np.random.RandomState(seed).standard_normal(tuple(shape)), dtype=np.float32))
    if name == "logit_scale":
        return torch.tensor(2.0)
    if name.endswith((".ls1", ".ls2")):
        return z.mul_(0.1).add_(0.5)
    if "norm" in name and name.endswith("weight"):
        return z.mul_(0.1).add_(1)
    if name.endswith("bias"):
        return z.mul_(0.1)
    if "embed_tokens" in name:
        return z
    if any(part in name for part in ("query_tokens", "position_embedding", "class_embedding")):
        return z.mul_(0.5)
    if name.endswith("text_projection"):
        return z.div_(shape[0] ** 0.5)
    if len(shape) == 4:
        return z.div_(z[0].numel() ** 0.5)
    return z.mul_(3 if name.endswith("lm_head.weight") else 1).div_(shape[1] ** 0.5)


def regenerated_pixels() -> torch.Tensor:
    generator = np.random.RandomState(zlib.crc32(b"5:img224x224"))
    return torch.from_numpy(generator.standard_normal((2, 3, 224, 224)).astype(np.float32))
