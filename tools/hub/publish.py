"""Assemble a repository for the Hugging Face Hub in a folder, check that it loads from there, and upload it on request.

Run by whoever maintains a repository on the Hub, after a change that users should get.

    python -m tools.hub.publish --to FOLDER                      # the 14B's repository, with tiny/ as a subfolder
    python -m tools.hub.publish --to FOLDER --checkpoint tiny    # a repository of the tiny checkpoint, at its root
    python -m tools.hub.publish --to FOLDER --checkpoint out     # of what finetune.py or save_pretrained wrote
    python -m tools.hub.publish --to FOLDER ... --upload ORG/NAME

Nothing leaves this machine without `--upload`. The folder gets:

* for the 14B: all that git tracks, because the pages link most of it and their commands run there, and the published
  weights (`*.safetensors`, `tokenizer.model`) if the clone has them. `.ci` and `.gitignore` are left out: the Hub would
  follow the latter and leave the weights out of the upload.
* for a flat repository (pipelines and sentence-transformers know a path or an id but no subfolder): the checkpoint's
  files at the root, the root's code, and those JSON files of the root that do not describe the 14B. tiny/ comes with
  the examples and tools that its card names; another checkpoint without a card gets one to fill in. Pages about this
  clone (CONTRIBUTING.md, CHANGELOG.md, CITATION.cff, docs/) are left out.
* `.gitattributes` in both, from tools/hub/gitattributes. At the root of this repository its filters would stop `git
  add` where git-lfs is not installed, and elsewhere store pointers instead of tiny/'s weights.

In a downloaded repository (`hf download --local-dir`) no git says what belongs to it. There the files of KINDS at the
root and all in the folders of PARTS do, except hidden files and `__pycache__`. Files that you added there are published
too, and the output says so.

Large files are hard links where the disk allows it. The folder must be new, empty or made by this script; then it is
emptied first. The check runs in separate processes, without network and with an empty cache of code.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE as INDEX
from huggingface_hub.repocard import metadata_load
from tqdm import tqdm

from tools import ROOT, step

MARK = ".published.json"  # lists the files of the folder; it is not uploaded
LEFT_OUT = (".ci/", ".gitignore")
# What belongs to the repository where no git says so; environments and what was trained there do not.
PARTS = ("benchmarks", "docs", "examples", "tests", "tiny", "tools")
KINDS = ("*.py", "*.json", "*.md", "*.cff", "LICENSE", "Makefile", "requirements.txt")
WEIGHTS = ("*.safetensors", "tokenizer.model")
FLAT_FOLDERS = ("examples/", "tools/")
FLAT_FILES = ("LICENSE", "requirements.txt")
OWN_FILES = ("*.json", "*.safetensors", "*.model", "README.md")  # of a checkpoint from elsewhere
NOT_OWN = ("trainer_state.json", "*_results.json")  # of the training, with paths of the machine it ran on
CARD = """---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags:
- custom_code
---

# {name}

A checkpoint for the code of InternVL-14B, which is part of this repository. Write here what it was trained on and how
well it does.

    AutoModel.from_pretrained(REPOSITORY, trust_remote_code=True)
"""
LINK_FROM = 10_000_000  # bytes: a link to a small file would let an edit there change the original
LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")


# ------------------------------------------------------------------------------------------------------------ files


def is_clone() -> bool:
    return (ROOT / ".git").exists()  # a file in a worktree of git


def tracked() -> list[str]:
    """Paths that git tracks: committed or added files, and no others of the clone. Without git, those of PARTS."""
    if not is_clone():
        paths = [path for kind in KINDS for path in ROOT.glob(kind)]
        paths += [path for part in PARTS for path in (ROOT / part).rglob("*")]
        names = sorted(path.relative_to(ROOT).as_posix() for path in paths if path.is_file())
        return [name for name in names if not re.search(r"(^|/)(\.|__pycache__/)", name)]
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0 or not done.stdout:
        reason = done.stderr.strip() or "it tracks none"
        raise ValueError(f"git must list the files of {ROOT}, and does not: {reason}")
    return [name for name in done.stdout.split("\0") if name]


def full_files() -> dict[str, Path]:
    """Path in the repository -> file, for the 14B."""
    names = [name for name in tracked() if not name.startswith(LEFT_OUT)]
    names += [path.name for pattern in WEIGHTS for path in sorted(ROOT.glob(pattern))]
    return {name: ROOT / name for name in names}


def flat_files(checkpoint: str) -> dict[str, Path]:
    """Path in the repository -> file, for a checkpoint at its root."""
    prefix = tracked_folder(checkpoint)
    if prefix:
        own = {name.removeprefix(f"{prefix}/"): ROOT / name for name in tracked() if name.startswith(f"{prefix}/")}
    else:
        own = {path.name: path for pattern in OWN_FILES for path in sorted(Path(checkpoint).glob(pattern))}
        own = {name: path for name, path in own.items() if not any(map(Path(name).match, NOT_OWN))}
    if "adapter_config.json" in own:
        raise ValueError(f"`checkpoint` must be a whole model, got adapters in {checkpoint!r}: merge them first.")
    if "config.json" not in own:
        raise ValueError(f"`checkpoint` must be a folder with a config.json, got {checkpoint!r}.")
    shared = {name: ROOT / name for name in tracked() if belongs_to_flat(name, with_examples=bool(prefix))}
    return shared | own


def tracked_folder(checkpoint: str) -> str | None:
    """The path in this repository of a folder that git tracks; None for any other."""
    folder = (ROOT / checkpoint).resolve()
    if not folder.is_relative_to(ROOT.resolve()):
        return None
    path = folder.relative_to(ROOT.resolve()).as_posix()
    return path if any(name.startswith(f"{path}/") for name in tracked()) else None


def belongs_to_flat(name: str, with_examples: bool) -> bool:
    if "/" in name:
        return with_examples and name.startswith(FLAT_FOLDERS)
    # The checkpoint replaces the configs of the root by its own; it may have no index to replace the root's.
    return name in FLAT_FILES or name.endswith(".py") or (name.endswith(".json") and name != INDEX)


def flat_card(text: str) -> str:
    """The checkpoint's card, with the sentence about its code changed to a flat repository."""
    for old, new in (("The code lies one folder up:", "The code lies beside it:"), (', subfolder="tiny"', "")):
        if text.count(old) != 1:
            raise ValueError(f"tiny/README.md must hold {old!r} once: it is not true of a flat repository.")
        text = text.replace(old, new)
    return text


# ------------------------------------------------------------------------------------------------------ assembling


def assemble(folder: str | Path, checkpoint: str | None = None) -> list[str]:
    """Put a repository together.

    Args:
        folder (`str` or `Path`): the target; new, empty, or made by an earlier call.
        checkpoint (`str`, *optional*): folder of the weights for a flat repository: "tiny", or one that
            `save_pretrained` wrote; by default the 14B's repository is made.

    Returns:
        `list[str]`: its paths, sorted.

    Raises:
        `ValueError`: the folder holds other files, the checkpoint is not one or has only adapters, git does not list
            the clone's files, or a page shows or links a missing file.
    """
    folder = Path(folder)
    if not is_clone():
        print(
            f"{ROOT} is no git clone, so this takes {', '.join(KINDS)} of its root and the folders {', '.join(PARTS)}, "
            "without hidden files. Files that you added there are included.",
            file=sys.stderr,
        )
    files = full_files() if checkpoint is None else flat_files(checkpoint)
    make_room(folder)
    written = sorted({*files, "README.md", ".gitattributes"})
    (folder / MARK).write_text(json.dumps(written, indent=1))  # first, so that an interrupted call can be repeated
    sizes = {name: source.stat().st_size for name, source in files.items()}
    with tqdm(total=sum(sizes.values()), desc=f"{len(files)} files", unit="B", unit_scale=True, mininterval=1) as bar:
        for name, source in files.items():
            place(source, folder / name)
            bar.update(sizes[name])
    place(ROOT / "tools" / "hub" / "gitattributes", folder / ".gitattributes")
    card = folder / "README.md"
    if "README.md" not in files:
        card.write_text(CARD.format(name=Path(str(checkpoint)).resolve().name), "utf-8")
    elif checkpoint is not None and tracked_folder(checkpoint):
        card.write_text(flat_card(card.read_text("utf-8")), "utf-8")
    absent = [f"{page}: {link}" for page in written if page.endswith(".md") for link in missing_links(folder, page)]
    if absent:
        raise ValueError(f"Pages show or link missing files: {', '.join(absent)}.")
    return written


def make_room(folder: Path) -> None:
    """Make the folder, or remove the files of an earlier call."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / MARK
    ours = {MARK, *json.loads(mark.read_text())} if mark.is_file() else set()
    foreign = next((path for path in files_in(folder) if path not in ours), None)
    if foreign is not None:
        raise ValueError(f"{folder} must be empty or made by this script, and holds {foreign}.")
    for path in sorted(folder.iterdir()):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def files_in(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix()


def place(source: Path, target: Path) -> None:
    """Link a large file, copy a small one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_size >= LINK_FROM:
        try:
            return os.link(source.resolve(), target)  # resolved: the Hub's cache holds links to its files
        except OSError:
            pass  # another disk, or one that has no links
    shutil.copy(source, target)


def missing_links(folder: Path, page: str) -> list[str]:
    """Files that a page links or shows, or that the card's metadata show as examples, and that the folder lacks."""
    links = LINK.findall((folder / page).read_text("utf-8"))
    if page == "README.md":
        metadata: dict[str, Any] = metadata_load(folder / page) or {}
        links += [example["src"] for example in metadata.get("widget", [])]
    targets = {link: ((folder / page).parent / link).resolve() for link in links if "://" not in link}
    root = folder.resolve()
    return sorted(link for link, to in targets.items() if not (to.is_relative_to(root) and to.exists()))


# --------------------------------------------------------------------------------------------------------- checking


def load_offline(place: str | Path, *options: str) -> dict[str, Any]:
    """The results of tools/hub/offline_load.py for a place, from a new process with an empty cache of code."""
    with tempfile.TemporaryDirectory() as modules:
        settings = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules, "PYTHONDONTWRITEBYTECODE": "1"}
        settings["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
        command = [sys.executable, "-m", "tools.hub.offline_load", str(place), *options]
        with step(f"Loading {place} without network{' and without weights' if '--empty' in options else ''}"):
            done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=modules)
    if done.returncode != 0:
        raise RuntimeError(f"{place} does not load without network:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def check(folder: str | Path, checkpoint: str | None = None) -> list[str]:
    """Load an assembled repository without network, and compare it with the clone.

    Args:
        folder (`str` or `Path`): made by [`assemble`].
        checkpoint (`str`, *optional*): as there.

    Returns:
        `list[str]`: files that index and tokenizer need and that are missing: the 14B's weights, if the clone has none.

    Raises:
        `RuntimeError`: something does not load, gives other values than the clone, or the index has other tensors.
    """
    folder = Path(folder).resolve()
    if checkpoint is None:
        found, wanted = (load_offline(place, "--subfolder", "tiny") for place in (folder, ROOT))
    elif path := tracked_folder(checkpoint):
        found, wanted = load_offline(folder), load_offline(ROOT, "--subfolder", path)
    else:
        found, wanted = load_offline(folder), load_offline(Path(checkpoint).resolve())
    for name in found:
        if name != "code" and found[name] != wanted[name]:
            raise RuntimeError(f"{folder} gives `{name}` = {found[name]}, its source gives {wanted[name]}.")
    if checkpoint is not None:
        return []
    empty = load_offline(folder, "--empty")
    if complaints := empty["complaints"]:
        raise RuntimeError(f"{len(complaints)} tensors are not as the model has them: {complaints[:5]}.")
    return empty["missing"]


# -------------------------------------------------------------------------------------------------------- uploading


def upload(folder: str | Path, repo_id: str, api: Any = None) -> Any:
    """Upload an assembled repository. After an interruption, call it again to send the rest.

    Args:
        folder (`str` or `Path`): made by [`assemble`].
        repo_id (`str`): "ORG/NAME"; created as a private repository if there is none.
        api (`HfApi`, *optional*): client of the Hub.

    Returns:
        the result of `HfApi.upload_folder`.

    Raises:
        `ValueError`: the folder was not made by [`assemble`], or was changed since.
    """
    folder = Path(folder)
    mark = folder / MARK
    made = set(json.loads(mark.read_text())) if mark.is_file() else set()
    differing = sorted(made ^ (set(files_in(folder)) - {MARK}))
    if not made or differing:
        raise ValueError(f"{folder} must be as `assemble` made it, and differs in {differing[:3]}.")
    api = HfApi() if api is None else api
    api.create_repo(repo_id, private=True, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id, folder_path=str(folder), ignore_patterns=[MARK], commit_message="Upload model and code"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, help="folder of the assembled repository")
    parser.add_argument("--checkpoint", help="make a flat repository of this folder's checkpoint")
    parser.add_argument("--upload", metavar="REPO_ID", help="upload it; without this option nothing leaves the machine")
    parser.add_argument("--without-weights", action="store_true", help="upload although weights are missing")
    arguments = parser.parse_args()
    try:
        names = assemble(arguments.to, arguments.checkpoint)
    except ValueError as error:
        sys.exit(str(error))
    size = sum((arguments.to / name).stat().st_size for name in names)
    print(f"{arguments.to}: {len(names)} files, {size / 1e6:.1f} MB")
    missing = check(arguments.to, arguments.checkpoint)
    print(f"It loads without network and gives the values of {arguments.checkpoint or 'this clone'}.")
    if missing:
        print(f"Missing: {', '.join(missing)}. Without them the repository's root does not load.")
    if arguments.upload is None:
        return print("Nothing was uploaded: use --upload ORG/NAME.")
    if missing and not arguments.without_weights:
        sys.exit("Not uploaded. If the repository on the Hub has the weights already, use --without-weights.")
    print(f"Uploading to {arguments.upload}; if it breaks off, the same command sends the rest.", flush=True)
    print(upload(arguments.to, arguments.upload))


if __name__ == "__main__":
    main()
