"""Write `model.safetensors.index.json`, which names the shard of every tensor of the published checkpoint.

Run by whoever changes the names, sizes or order of the model's tensors; `make lint` runs `--check`.

    python -m tools.hub.write_index            # writes the file beside config.json
    python -m tools.hub.write_index --check    # exits with 1 if the file is not what would be written

The repository has no 14B weights, so the model is built on the meta device and split as `save_pretrained` splits it:
tensors in the model's own order, in the dtype of config.json, in shards of 5 GB.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE as INDEX
from transformers import AutoConfig, AutoModel

from tools import ROOT


def empty_model(folder: Path, subfolder: str = "") -> torch.nn.Module:
    """The model of the config in a folder (or its subfolder), without memory for its weights."""
    config = AutoConfig.from_pretrained(folder, subfolder=subfolder, trust_remote_code=True)
    with torch.device("meta"):
        return AutoModel.from_config(config, trust_remote_code=True)  # in the dtype that the config names


def index_of(state: dict[str, torch.Tensor], max_shard_size: str) -> dict:
    """The index of a checkpoint of these tensors: its size in bytes, and the shard of every tensor."""
    split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    weight_map = {name: split.tensor_to_filename[name] for name in state}
    return {"metadata": {"total_size": split.metadata["total_size"]}, "weight_map": weight_map}


def make_index(folder: Path, max_shard_size: str) -> dict:
    """The index of a checkpoint for `folder`'s config."""
    return index_of(empty_model(folder).state_dict(), max_shard_size)


def first_difference(found: dict, wanted: dict) -> str | None:
    """The first problem of an index, in words; None if there is none."""
    if found.get("metadata") != wanted["metadata"]:
        return f"metadata is {found.get('metadata')}, expected {wanted['metadata']}"
    names, wanted_names = list(found.get("weight_map", {})), list(wanted["weight_map"])
    for kind, some in (("lacks", set(wanted_names) - set(names)), ("has superfluous", set(names) - set(wanted_names))):
        if some:
            return f"weight_map {kind} {len(some)} tensors, among them {min(some)}"
    if names != wanted_names:
        return "weight_map is not in the model's order"
    for name, file in wanted["weight_map"].items():
        if found["weight_map"][name] != file:
            return f"{name} is in {found['weight_map'][name]}, expected {file}"
    return None if found == wanted else f"there are other fields than {', '.join(wanted)}"


def check(path: Path, wanted: dict) -> str | None:
    """The problem of the file at `path`, or None."""
    if not path.is_file():
        return f"{path} does not exist"
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        return f"{path} is not JSON: {error}"
    if not isinstance(found, dict):
        return f"{path} is not a JSON object"
    difference = first_difference(found, wanted)
    return difference and f"{path}: {difference}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT, help="folder of config.json and the code")
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    path, index = arguments.folder / INDEX, make_index(arguments.folder, arguments.max_shard_size)
    if not arguments.check:
        path.write_text(json.dumps(index, indent=2) + "\n")
    elif complaint := check(path, index):
        sys.exit(f"{complaint}. Run `python -m tools.hub.write_index` to write it anew.")


if __name__ == "__main__":
    main()
