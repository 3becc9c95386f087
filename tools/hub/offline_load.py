"""Load a repository without network, and print its results as JSON.

Run by publish.py in a process of its own, and by whoever checks that a folder or a cached repository is complete.

    python -m tools.hub.offline_load FOLDER_OR_ID [--subfolder tiny]
    python -m tools.hub.offline_load FOLDER --empty

FOLDER_OR_ID is a folder, or an id in the Hub's cache (HF_HUB_CACHE). Every Auto class of transformers that users call
is called, on images and texts that are made here, so that two places can be compared. `--empty` is for weights that are
too large or not here: the model is built without memory and compared with the index, and with the headers of the shards
that are here.
"""

import argparse
import json
import os
import socket
from pathlib import Path
from typing import Any, NoReturn

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it when it is imported

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

from tools.hub.write_index import INDEX, empty_model

TEXTS = ["panda", "a  double  space", "熊猫", "パンダの顔"]


def refuse_network() -> None:
    """From now on, any use of the network raises an error, so that no library falls back to its cache unnoticed."""

    def refused(*arguments: Any, **options: Any) -> NoReturn:
        raise OSError("nothing here may use the network")

    for name in ("connect", "connect_ex"):
        setattr(socket.socket, name, refused)
    socket.create_connection = socket.getaddrinfo = refused


def images() -> list[Image.Image]:
    """Two different images, neither of them square."""
    waves = np.sin(np.arange(60 * 80 * 3).reshape(60, 80, 3) / 50)
    return [Image.fromarray(np.uint8(127 * (1 + sign * waves))) for sign in (1, -1)]


@torch.inference_mode()
def results(place: str, **where: Any) -> dict[str, Any]:
    """The results of config, model, processor and tokenizer, in float32."""
    config = AutoConfig.from_pretrained(place, trust_remote_code=True, **where)
    model = AutoModel.from_pretrained(place, dtype=torch.float32, trust_remote_code=True, **where).eval()
    processor = AutoProcessor.from_pretrained(place, trust_remote_code=True, **where)
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=True, **where)
    pixels = processor(images=images()).pixel_values
    ids = model.generate(pixels, **processor(text="English caption:", task="caption"), max_new_tokens=5)
    return {
        "model_type": config.model_type,
        "model": type(model).__name__,
        "code": [type(each).__module__ for each in (config, model, processor, tokenizer)],
        "ids": tokenizer(TEXTS)["input_ids"],
        "image_embeds": model.embed_image(pixels, mode="InternVL-G").tolist(),
        "text_embeds": model.embed_text(**processor(text=TEXTS)).tolist(),
        "captions": processor.batch_decode(ids, skip_special_tokens=True),
    }


def empty_results(folder: Path) -> dict[str, Any]:
    """Compare the model without its weights with index and shards; name the shards that are not here."""
    state = empty_model(folder).state_dict()
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    shards = sorted(set(index.values()))
    complaints = [f"{INDEX}: {name}" for name in sorted(set(index) ^ set(state))]
    for shard in shards:
        if (folder / shard).is_file():
            complaints += shard_complaints(folder / shard, {name for name in index if index[name] == shard}, state)
    if (folder / "tokenizer.model").is_file():
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        processor(images=images(), text=TEXTS)
    missing = [name for name in [*shards, "tokenizer.model"] if not (folder / name).is_file()]
    return {"tensors": len(state), "missing": missing, "complaints": complaints}


def shard_complaints(path: Path, wanted: set[str], state: dict[str, torch.Tensor]) -> list[str]:
    """Where a shard's header differs from the index and the model. Its data are not read."""
    with safe_open(path, "pt") as shard:
        shapes = {name: shard.get_slice(name).get_shape() for name in shard.keys()}
    wrong = sorted(set(shapes) ^ wanted)
    wrong += [name for name in sorted(set(shapes) & set(state)) if shapes[name] != list(state[name].shape)]
    return [f"{path.name}: {name}" for name in wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("place", help="a folder, or an id in the Hub's cache")
    parser.add_argument("--subfolder", help="of the checkpoint in it")
    parser.add_argument("--empty", action="store_true", help="build the model without weights, and check the index")
    arguments = parser.parse_args()
    refuse_network()
    if arguments.empty:
        return print(json.dumps(empty_results(Path(arguments.place))))
    where = {"subfolder": arguments.subfolder} if arguments.subfolder else {}
    print(json.dumps(results(arguments.place, **where)))


if __name__ == "__main__":
    main()
