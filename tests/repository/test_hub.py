"""What the Hub gets: the published folders, the cards' metadata, and loading by id from the Hub's cache, offline."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from transformers import AutoProcessor
from transformers.pipelines import SUPPORTED_TASKS

from conftest import INDEX, ROOT, load, run_fork, run_interpreter
from tools.hub import model_index, offline_load, publish

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git says what belongs to the repository")
CARDS = {"main": ROOT / "README.md", "tiny": ROOT / "tiny" / "README.md"}
MAIN, SECOND = "a" * 40, "b" * 40  # commits of the imitated Hub


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The 14B's repository as it is uploaded. Not to be changed."""
    folder = tmp_path_factory.mktemp("hub") / "full"
    publish.assemble(folder)
    return folder


@pytest.fixture(scope="module")
def flat_tiny(tmp_path_factory):
    """The tiny checkpoint's own repository. Not to be changed."""
    folder = tmp_path_factory.mktemp("hub") / "flat"
    publish.assemble(folder, "tiny")
    return folder


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A small git repository in the place of this one, with files that may come here later."""
    files = {
        "README.md": "![x](examples/a.png) [y](tools/z.py#part) [far](https://example.org/no.py)",
        "config.json": "{}",
        INDEX: "{}",
        "modules.json": "[]",
        "sentence_transformers_x.py": "",
        "LICENSE": "MIT",
        ".gitignore": "*.safetensors\n/tokenizer.model\nsecret.py\n",
        ".ci/run": "",
        "examples/a.png": "\0",
        "tools/z.py": "",
        "tools/hub/gitattributes": "*.model filter=lfs diff=lfs merge=lfs -text\n",
        "tests/test_x.py": "",
        "docs/page.md": "",
        "CONTRIBUTING.md": "",
        "CHANGELOG.md": "",
        "CITATION.cff": "",
        "tiny/config.json": '{"a": 1}',
        "tiny/README.md": 'The code lies one folder up:\n\n    f(REPO, subfolder="tiny", trust_remote_code=True)\n',
        "tiny/notes.txt": "of the checkpoint",
    }
    root = tmp_path / "clone"
    for name, content in (files | {"secret.py": "key", "untracked.json": "{}"}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", *files], cwd=root, check=True)
    (root / "model-00001-of-00001.safetensors").write_bytes(b"x" * 1000)
    (root / "tokenizer.model").write_bytes(b"y" * 10)
    monkeypatch.setattr(publish, "ROOT", root)
    monkeypatch.setattr(publish, "LINK_FROM", 1000)
    return root


def contents(folder: Path) -> set[str]:
    return set(publish.files_in(folder)) - {publish.MARK}


# ----------------------------------------------------------------------------------------------------- assembling


def test_full_repository_is_what_git_tracks_and_the_weights(clone, tmp_path):
    names = publish.assemble(tmp_path / "to")
    tracked = {"README.md", "config.json", INDEX, "modules.json", "sentence_transformers_x.py", "LICENSE"}
    tracked |= {"examples/a.png", "tools/z.py", "tools/hub/gitattributes", "tests/test_x.py"}
    tracked |= {"tiny/config.json", "tiny/README.md", "tiny/notes.txt"}
    tracked |= {"docs/page.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"}
    weights = {"model-00001-of-00001.safetensors", "tokenizer.model"}
    assert contents(tmp_path / "to") == set(names) == tracked | weights | {".gitattributes"}
    assert (tmp_path / "to" / ".gitattributes").read_text() == (clone / "tools" / "hub" / "gitattributes").read_text()


def test_flat_repository_has_the_checkpoint_at_its_root(clone, tmp_path):
    names = publish.assemble(tmp_path / "to", "tiny")
    code = {"sentence_transformers_x.py", "modules.json", "LICENSE", "examples/a.png", "tools/z.py"}
    own = {"config.json", "README.md", "notes.txt", ".gitattributes", "tools/hub/gitattributes"}
    assert contents(tmp_path / "to") == set(names) == code | own  # nothing of the 14B, no pages about the clone
    assert (tmp_path / "to" / "config.json").read_text() == '{"a": 1}'
    card = (tmp_path / "to" / "README.md").read_text()
    assert "subfolder" not in card and "folder up" not in card and "f(REPO, trust_remote_code=True)" in card


def test_a_card_that_would_not_be_true_is_refused(clone, tmp_path):
    (clone / "tiny" / "README.md").write_text("Another text.")
    with pytest.raises(ValueError, match="one folder up"):
        publish.assemble(tmp_path / "to", "tiny")
    (clone / "README.md").write_text("![x](examples/gone.png)")
    with pytest.raises(ValueError, match="examples/gone.png"):
        publish.assemble(tmp_path / "other")
    (clone / "README.md").write_text("---\nwidget:\n- src: examples/none.png\n---\n")
    with pytest.raises(ValueError, match="examples/none.png"):
        publish.assemble(tmp_path / "other")


def test_links_of_every_page_are_checked(clone, tmp_path):
    (clone / "docs" / "page.md").write_text("[card](../README.md#x) [image](../examples/a.png) [part](#part)")
    publish.assemble(tmp_path / "to")
    (clone / "docs" / "page.md").write_text("[gone](gone.md#part)")
    with pytest.raises(ValueError, match="docs/page.md: gone.md"):
        publish.assemble(tmp_path / "to")
    # tiny/ is published alone too: what is one folder up is then outside.
    tiny = clone / "tiny" / "README.md"
    tiny.write_text(f"{tiny.read_text()} [page](../docs/page.md)")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("of another project")
    with pytest.raises(ValueError, match="README.md: ../docs/page.md"):
        publish.assemble(tmp_path / "to", "tiny")


def test_large_files_are_linked_and_small_ones_copied(clone, tmp_path, monkeypatch):
    publish.assemble(tmp_path / "to")
    shard = "model-00001-of-00001.safetensors"
    assert os.path.samefile(tmp_path / "to" / shard, clone / shard)
    assert not os.path.samefile(tmp_path / "to" / "tokenizer.model", clone / "tokenizer.model")
    # A shard that is a link into the Hub's cache is followed.
    (clone / shard).rename(tmp_path / "blob")
    (clone / shard).symlink_to(tmp_path / "blob")
    publish.assemble(tmp_path / "to")
    assert os.path.samefile(tmp_path / "to" / shard, tmp_path / "blob") and not (tmp_path / "to" / shard).is_symlink()

    def no_links(*arguments):
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", no_links)
    publish.assemble(tmp_path / "to")
    assert not os.path.samefile(tmp_path / "to" / shard, tmp_path / "blob")
    assert (tmp_path / "to" / shard).read_bytes() == b"x" * 1000


def test_only_own_folders_are_made_anew(clone, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.txt"):
        publish.assemble(mine)
    with pytest.raises(ValueError, match="must be empty"):
        publish.assemble(clone)
    assert (mine / "thesis.txt").read_text() == "years of work" and (clone / "README.md").exists()

    folder = tmp_path / "to"
    publish.assemble(folder, "tiny")
    publish.assemble(folder)  # of the flat repository nothing is left
    assert "notes.txt" not in contents(folder)
    (folder / "later.txt").write_text("put there by somebody")
    with pytest.raises(ValueError, match="later.txt"):
        publish.assemble(folder)
    assert (folder / "later.txt").exists() and (folder / "README.md").exists()


def test_a_checkpoint_from_elsewhere_gets_code_and_a_card(clone, tmp_path):
    mine = tmp_path / "mine"
    (mine / "checkpoint-3").mkdir(parents=True)
    names = ("config.json", "model.safetensors", "tokenizer.model", "trainer_state.json", "training_args.bin", "old.py")
    for name in (*names, "checkpoint-3/optimizer.pt"):
        (mine / name).write_text(f"my {name}")
    folder = tmp_path / "to"
    names = publish.assemble(folder, str(mine))
    own = {"config.json", "model.safetensors", "tokenizer.model"}
    shared = {"sentence_transformers_x.py", "modules.json", "LICENSE", "README.md", ".gitattributes"}
    assert contents(folder) == set(names) == own | shared
    assert (folder / "config.json").read_text() == "my config.json"
    assert "# mine" in (folder / "README.md").read_text() and metadata_load(folder / "README.md")["library_name"]
    (mine / "README.md").write_text("my card")
    publish.assemble(folder, str(mine))
    assert (folder / "README.md").read_text() == "my card"
    (mine / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge them first"):
        publish.assemble(folder, str(mine))


def test_what_was_saved_can_be_published(trained, tmp_path):
    saved = tmp_path / "saved"
    load(trained).save_pretrained(saved)
    load(trained, AutoProcessor).save_pretrained(saved)
    publish.assemble(tmp_path / "to", str(saved))
    assert publish.check(tmp_path / "to", str(saved)) == []
    assert (tmp_path / "to" / "handler.py").is_file() and (tmp_path / "to" / "modules.json").is_file()


def test_wrong_checkpoints_and_clones(clone, tmp_path):
    for checkpoint in ("absent", "tools", "tin"):
        with pytest.raises(ValueError, match="`checkpoint`"):
            publish.assemble(tmp_path / "to", checkpoint)
    shutil.rmtree(clone / ".git" / "objects")
    with pytest.raises(ValueError, match="git must list the files"):
        publish.assemble(tmp_path / "to")


RUBBISH = (".venv/lib/x.py", "env/pyvenv.cfg", "env/lib/x.py", ".cache/huggingface/download/config.json.metadata")
RUBBISH += (".env", "tools/.env", "tools/__pycache__/z.pyc", "docs/.ipynb_checkpoints/page.md", "out/config.json")
RUBBISH += ("demo.png", "notes.txt", "mine/holiday.jpg", "optimizer.pt")


def test_a_download_without_git_gives_the_same(clone, tmp_path, capsys):
    (clone / "secret.py").unlink()
    (clone / "untracked.json").unlink()
    wanted = {checkpoint: publish.assemble(tmp_path / "to", checkpoint) for checkpoint in (None, "tiny")}
    assert capsys.readouterr().err.count("git clone") == 0
    (clone / ".git").rename(tmp_path / "git")
    for name in RUBBISH:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("{}")
    for checkpoint, names in wanted.items():
        assert publish.assemble(tmp_path / "to", checkpoint) == names
        assert "is no git clone, so this takes *.py, *.json" in capsys.readouterr().err
    own = publish.assemble(tmp_path / "to", str(clone / "out"))
    assert "config.json" in own and "notes.txt" not in own, "a checkpoint that was trained there is found as elsewhere"


def test_a_download_of_this_repository_is_known_without_git(full, tmp_path, monkeypatch):
    """So that a new folder or kind of files is not forgotten in PARTS and KINDS."""
    shutil.copytree(full, tmp_path / "download")
    (tmp_path / "download" / "my notes.txt").write_text("private")
    monkeypatch.setattr(publish, "ROOT", tmp_path / "download")
    (tmp_path / "download" / ".cache").mkdir()
    assert set(publish.full_files()) == contents(full) - {".gitattributes"}


def test_every_binary_file_goes_to_large_file_storage(full):
    """The Hub refuses a push that has binary files elsewhere. What is read as text stays in git."""
    subprocess.run(["git", "init", "-q"], cwd=full, check=True)
    try:
        names = sorted(contents(full))
        names = [name for name in names if not name.startswith(".git/")]
        command = ["git", "check-attr", "--stdin", "filter"]
        found = subprocess.run(command, cwd=full, input="\n".join(names), capture_output=True, text=True, check=True)
    finally:
        shutil.rmtree(full / ".git")
    stored = {line.split(": ")[0] for line in found.stdout.splitlines() if line.endswith(": lfs")}
    binary = {name for name in names if b"\0" in (full / name).read_bytes()}
    assert stored == binary and "tiny/model-00001-of-00002.safetensors" in stored and "examples/demo.png" in stored


def test_no_filter_stands_in_this_repository():
    attributes = ROOT / ".gitattributes"
    assert not attributes.exists() or "filter=lfs" not in attributes.read_text()


# -------------------------------------------------------------------------------------------------------- checking


@pytest.fixture(scope="module", autouse=True)
def forked_tools():
    """The script that loads a place runs in a fork; the snippet of docs/serving.md starts it as users do."""
    run = subprocess.run

    def forked(command, env=None, cwd=None, **options):
        if command[0] != sys.executable:
            return run(command, env=env, cwd=cwd, **options)
        return run_fork(command[1:], cwd, **env)

    publish.subprocess = SimpleNamespace(run=forked)
    yield
    publish.subprocess = subprocess


@pytest.fixture(scope="module")
def load_once():
    """`publish.load_offline` that starts one process for each place."""
    known: dict[tuple, dict] = {}
    real = publish.load_offline

    def load(place, *options):
        key = (str(place), *options)
        if key not in known:
            known[key] = real(place, *options)
        return known[key]

    return load


def test_what_was_assembled_gives_what_the_clone_gives(full, flat_tiny, load_once, monkeypatch):
    monkeypatch.setattr(publish, "load_offline", load_once)
    assert publish.check(flat_tiny, "tiny") == []
    missing = publish.check(full)
    shards = set(json.loads((ROOT / INDEX).read_text())["weight_map"].values())
    assert set(missing) == {name for name in shards | {"tokenizer.model"} if not (ROOT / name).exists()}
    found = load_once(flat_tiny.resolve())
    assert found["model"] == "InternVLModel" and found["model_type"] == "internvl_14b"
    # "a  double  space" in SentencePiece's own ids: transformers' tokenizer of 5.x would join the spaces otherwise.
    assert len(found["image_embeds"]) == 2 and len(found["text_embeds"]) == 4
    assert torch.tensor(found["text_embeds"]).norm(dim=-1).allclose(torch.ones(4))


def test_another_value_or_name_is_noticed(full, flat_tiny, load_once, monkeypatch):
    found = load_once(flat_tiny.resolve())

    def other(place, *options):
        if "--empty" in options:
            return {"tensors": 1, "missing": [], "complaints": ["x.safetensors: itm_head.bias"]}
        is_clone = str(place) == str(publish.ROOT)
        return found | ({} if is_clone else changed)

    monkeypatch.setattr(publish, "load_offline", other)
    changed: dict = {"code": ["elsewhere"]}  # as it must be
    assert publish.check(flat_tiny, "tiny") == []
    with pytest.raises(RuntimeError, match="itm_head.bias"):
        publish.check(full)
    for name, value in (("text_embeds", [[0.0]]), ("ids", []), ("captions", ["x"]), ("model", "Other")):
        changed = {name: value}
        with pytest.raises(RuntimeError, match=name):
            publish.check(flat_tiny, "tiny")


@pytest.mark.slow
def test_a_folder_that_lacks_a_module_does_not_pass(flat_tiny, tmp_path):
    shutil.copytree(flat_tiny, tmp_path / "broken")
    (tmp_path / "broken" / "modeling_qllama.py").unlink()
    with pytest.raises(RuntimeError, match="modeling_qllama"):
        publish.load_offline(tmp_path / "broken")


def test_shards_are_compared_by_their_headers(tmp_path):
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(save_bytes({"a": torch.zeros(2, 3), "b": torch.zeros(4)}))
    assert offline_load.shard_complaints(path, {"a", "b"}, state) == []
    assert offline_load.shard_complaints(path, {"a"}, state) == ["x.safetensors: b"]
    assert offline_load.shard_complaints(path, {"a", "b", "c"}, state) == ["x.safetensors: c"]
    path.write_bytes(save_bytes({"a": torch.zeros(3, 2), "b": torch.zeros(4)}))
    assert offline_load.shard_complaints(path, {"a", "b"}, state) == ["x.safetensors: a"]


def test_the_network_is_off_while_checking(monkeypatch):
    for place, name in ((socket.socket, "connect"), (socket.socket, "connect_ex")):
        monkeypatch.setattr(place, name, getattr(place, name))  # so that they come back after the test
    monkeypatch.setattr(socket, "create_connection", socket.create_connection)
    monkeypatch.setattr(socket, "getaddrinfo", socket.getaddrinfo)
    with socket.create_server(("127.0.0.1", 0)) as server:  # it would answer
        host, port = server.getsockname()
        attempts = (
            lambda: socket.create_connection((host, port)),
            lambda: socket.socket().connect((host, port)),
            lambda: urllib.request.urlopen(f"http://{host}:{port}", timeout=1),
        )
        socket.create_connection((host, port)).close()
        offline_load.refuse_network()
        for attempt in attempts:
            with pytest.raises(OSError, match="nothing here may use the network"):
                attempt()


# -------------------------------------------------------------------------------------------------------- uploading


class Hub:
    """Takes the place of HfApi and notes what it is asked for."""

    def __init__(self):
        self.calls = []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options.pop("repo_id"), options))
        return "done"


def test_upload_sends_the_folder_and_not_the_mark(clone, tmp_path):
    folder, hub = tmp_path / "to", Hub()
    publish.assemble(folder)
    assert publish.upload(folder, "org/name", hub) == "done"
    (made, repo, how), (uploaded, target, what) = hub.calls
    assert (made, repo, how) == ("create_repo", "org/name", {"private": True, "exist_ok": True})
    assert (uploaded, target, what["folder_path"]) == ("upload_folder", "org/name", str(folder))
    sent = set(filter_repo_objects(publish.files_in(folder), ignore_patterns=what["ignore_patterns"]))
    assert sent == contents(folder) and "model-00001-of-00001.safetensors" in sent


def test_upload_refuses_what_is_not_as_it_was_made(clone, tmp_path):
    hub, folder = Hub(), tmp_path / "to"
    with pytest.raises(ValueError, match="assemble"):
        publish.upload(clone, "org/name", hub)
    publish.assemble(folder)
    (folder / "secret.py").write_text("key")
    with pytest.raises(ValueError, match="secret.py"):
        publish.upload(folder, "org/name", hub)
    (folder / "secret.py").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json"):
        publish.upload(folder, "org/name", hub)
    assert hub.calls == []


def run_main(monkeypatch, missing: list[str], *arguments) -> Hub:
    hub = Hub()
    monkeypatch.setattr(publish, "HfApi", lambda: hub)
    monkeypatch.setattr(publish, "check", lambda folder, checkpoint: missing)
    monkeypatch.setattr(sys, "argv", ["publish.py", *map(str, arguments)])
    publish.main()
    return hub


def test_nothing_is_uploaded_unless_asked_for(clone, tmp_path, monkeypatch, capsys):
    to = ["--to", tmp_path / "to"]
    assert run_main(monkeypatch, [], *to).calls == []
    assert "Nothing was uploaded" in capsys.readouterr().out
    assert len(run_main(monkeypatch, [], *to, "--upload", "org/name").calls) == 2
    with pytest.raises(SystemExit, match="Not uploaded"):
        run_main(monkeypatch, ["model-00001-of-00006.safetensors"], *to, "--upload", "org/name")
    hub = run_main(monkeypatch, ["tokenizer.model"], *to, "--upload", "org/name", "--without-weights")
    assert len(hub.calls) == 2


def test_a_failed_check_stops_the_upload(clone, tmp_path, monkeypatch):
    def fails(folder, checkpoint):
        raise RuntimeError("other values")

    hub = Hub()
    monkeypatch.setattr(publish, "HfApi", lambda: hub)
    monkeypatch.setattr(publish, "check", fails)
    monkeypatch.setattr(sys, "argv", ["publish.py", "--to", str(tmp_path / "to"), "--upload", "org/name"])
    with pytest.raises(RuntimeError, match="other values"):
        publish.main()
    assert hub.calls == []


# ------------------------------------------------------------------------------------------------------------ cards


@pytest.mark.parametrize("card", CARDS)
def test_metadata_is_complete_and_survives_the_librarys_own_classes(card):
    written = metadata_load(CARDS[card])
    data = ModelCard.load(CARDS[card]).data
    assert data.to_dict() == written
    assert data.license == {"main": "mit", "tiny": "cc-by-sa-4.0"}[card]
    assert data.library_name == "transformers" and "custom_code" in data.tags
    assert data.pipeline_tag in SUPPORTED_TASKS
    assert all(len(code) == 2 or code == "multilingual" for code in data.language)
    assert set(data.metrics or []) <= {"recall", "accuracy", "exact_match"}
    for example in data.widget:
        assert (ROOT / example["src"]).is_file() and "," in example["candidate_labels"] and example["example_title"]
    assert data.datasets is None, "a dataset of the Hub that the Hub could link would belong here; emoji are none"
    assert data.base_model == {"main": "OpenGVLab/InternVL-14B-224px", "tiny": None}[card]


def test_figures_of_the_tiny_checkpoint_stand_in_its_own_card_alone():
    assert "model-index" not in metadata_load(CARDS["main"])
    data = ModelCard.load(CARDS["tiny"]).data
    assert "tiny" in data.model_name and "14B" not in data.model_name


def test_model_index_is_what_was_measured():
    results = json.loads((ROOT / "tiny" / "results.json").read_text())
    found = {}
    for each in ModelCard.load(CARDS["tiny"]).data.eval_results:
        key = (each.dataset_config, each.task_type, each.metric_type, each.metric_name)
        assert key not in found and "1400" in each.dataset_name and each.dataset_split == "test"
        found[key] = each.metric_value
    expected = {}
    for language in ("en", "zh", "ja"):
        part = results[language]
        for mode in ("InternVL-C", "InternVL-G"):
            retrieval, one = (language, "zero-shot-retrieval"), part[mode]
            expected |= {
                (*retrieval, "recall_at_1", f"image-to-text R@1, {mode}"): one["image_to_text_r1"],
                (*retrieval, "recall_at_5", f"image-to-text R@5, {mode}"): one["image_to_text_r5"],
                (*retrieval, "recall_at_1", f"text-to-image R@1, {mode}"): one["text_to_image_r1"],
                (language, "zero-shot-image-classification", "accuracy", f"accuracy, {mode}"): one["zero_shot_20"],
            }
        reranked = "image-to-text R@1, the ten best of InternVL-G re-ranked"
        expected[(language, "zero-shot-retrieval", "recall_at_1", reranked)] = part["reranked_r1"]
        expected[(language, "image-to-text", "exact_match", "caption is the exact name")] = part["caption_exact"]
    assert found == {key: round(value, 4) for key, value in expected.items()}


def test_writing_the_model_index_changes_only_it(tmp_path):
    results = json.loads((ROOT / "tiny" / "results.json").read_text())
    card = tmp_path / "README.md"
    shutil.copy(CARDS["tiny"], card)
    model_index.write_model_index(card, results)
    assert card.read_bytes() == CARDS["tiny"].read_bytes()  # what the command writes is what is committed
    results["en"]["caption_exact"] = 0.123456
    model_index.write_model_index(card, results)
    before, after = CARDS["tiny"].read_text().splitlines(), card.read_text().splitlines()
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert [line.strip() for line in changed] == ["value: 0.1235"]


def test_the_evaluation_writes_the_card(tmp_path, monkeypatch):
    """`tools/tiny/evaluate_tiny.py --tables` is the command that puts figures into the metadata."""
    pytest.importorskip("resvg_py")
    pytest.importorskip("tqdm")
    from tools.tiny import evaluate_tiny

    card = tmp_path / "README.md"
    shutil.copy(CARDS["tiny"], card)
    results = json.loads((ROOT / "tiny" / "results.json").read_text())
    results["ja"]["InternVL-C"]["zero_shot_20"] = 0.25
    monkeypatch.setattr(evaluate_tiny, "CARD", card)
    evaluate_tiny.write_tables(results)
    values = [each.metric_value for each in ModelCard.load(card).data.eval_results]
    assert values.count(0.25) == 1


# ----------------------------------------------------------------------------------------------------- loading by id


def commit(cache: Path, repo_id: str, source: Path, sha: str, ref: str, change=lambda name, content: content) -> None:
    """Put a folder into a cache as the Hub's client does: blobs named by their content, links to them, and a ref."""
    home = cache / f"models--{repo_id.replace('/', '--')}"
    for name in sorted(name for name in contents(source) if not name.startswith("tests/")):
        content = change(name, (source / name).read_bytes())
        blob = home / "blobs" / hashlib.sha256(content).hexdigest()
        link = home / "snapshots" / sha / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / ref).write_text(sha)


def second_revision(name: str, content: bytes) -> bytes:
    """Another config, another processor, other weights and other code."""
    if name == "tiny/config.json":
        return content.replace(b'"label_smoothing": 0.05', b'"label_smoothing": 0.25')
    if name == "tiny/processor_config.json":
        return content.replace(b"80", b"40")
    if name == "modeling_internvl.py":
        return content + b"\nIS_SECOND = True\n"
    if name.startswith("tiny/") and name.endswith(".safetensors"):
        state = load_bytes(content)
        if "text_projection" in state:
            state["text_projection"] = -state["text_projection"]
        return save_bytes(state)
    return content


BY_ID = """
import json, sys
import torch
from tools.hub.offline_load import images, refuse_network, results
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

refuse_network()
found = {}
for name, where in json.loads(sys.argv[1]).items():
    found[name] = results("org/full", subfolder="tiny", **where)
    known = {"subfolder": "tiny", "trust_remote_code": True, **where}
    found[name]["max_length"] = AutoProcessor.from_pretrained("org/full", **known).max_length
    found[name]["label_smoothing"] = AutoConfig.from_pretrained("org/full", **known).label_smoothing
    module = sys.modules[found[name]["code"][1]]
    found[name]["second"] = hasattr(module, "IS_SECOND")
found["root"] = AutoConfig.from_pretrained("org/full", trust_remote_code=True).qllama_config.hidden_size
found["flat"] = results("org/flat")

classify = pipeline(
    "zero-shot-image-classification", model="org/flat", trust_remote_code=True, dtype=torch.float32
)
found["labels"] = classify(sys.argv[2], candidate_labels=["panda", "lion", "rocket"], hypothesis_template="a {}")
describe = pipeline("image-text-to-text", model="org/flat", trust_remote_code=True, dtype=torch.float32)
found["caption"] = describe(images=sys.argv[2], text="English caption:", max_new_tokens=5)
embed = pipeline("image-feature-extraction", model="org/flat", trust_remote_code=True, dtype=torch.float32)
found["features"] = embed(images()[0], pool=True)

# A checkpoint that was loaded by id and saved needs the Hub no more.
model = AutoModel.from_pretrained("org/flat", trust_remote_code=True)
model.save_pretrained("saved")
AutoProcessor.from_pretrained("org/flat", trust_remote_code=True).save_pretrained("saved")
import os
from pathlib import Path
os.rename(os.environ["HF_HUB_CACHE"], os.environ["HF_HUB_CACHE"] + "-gone")
found["saved"] = results("saved")
json.dump(found, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def by_id(full, flat_tiny, tmp_path_factory):
    """What one fresh process gets by id from a cache that lies as the Hub's client leaves it."""
    folder = tmp_path_factory.mktemp("by-id")
    cache = folder / "cache"
    commit(cache, "org/full", full, MAIN, "main")
    commit(cache, "org/full", full, SECOND, "v2", second_revision)
    commit(cache, "org/flat", flat_tiny, MAIN, "main")
    asked = {
        "main": {},
        "v2": {"revision": "v2"},
        "commit": {"revision": SECOND},
        "old code": {"revision": "v2", "code_revision": "main"},
    }
    code = f"import os\nos.environ['HF_HUB_CACHE'] = {str(cache)!r}\n" + BY_ID
    picture = ROOT / "examples" / "pictures" / "panda.png"
    run_interpreter(code, folder, json.dumps(asked), picture, PYTHONPATH=str(ROOT))
    return json.loads((folder / "found.json").read_text())


VALUES = ("model", "model_type", "ids", "image_embeds", "text_embeds", "captions")


def test_by_id_gives_what_the_clone_gives(by_id, load_once):
    wanted = load_once(ROOT, "--subfolder", "tiny")
    for name in ("main", "flat", "saved"):
        assert {key: by_id[name][key] for key in VALUES} == {key: wanted[key] for key in VALUES}, name
    assert by_id["root"] == 4096


def test_code_comes_from_the_commit(by_id):
    for name, sha in (("main", MAIN), ("v2", SECOND), ("commit", SECOND), ("old code", MAIN)):
        assert all(f".org.full.{sha}." in module for module in by_id[name]["code"]), name
        assert by_id[name]["second"] == (sha == SECOND), name
    assert not any("org.flat" in module for module in by_id["saved"]["code"])


def test_revision_chooses_config_processor_and_weights(by_id):
    for name, is_second in (("main", False), ("v2", True), ("commit", True), ("old code", True)):
        found = by_id[name]
        assert found["max_length"] == (40 if is_second else 80), name
        assert found["label_smoothing"] == (0.25 if is_second else 0.05), name
        sign = -1 if is_second else 1
        assert found["text_embeds"] == [[sign * value for value in row] for row in by_id["main"]["text_embeds"]], name


def test_pipelines_take_an_id(by_id):
    assert [entry["label"] for entry in by_id["labels"]][0] == "panda" and by_id["labels"][0]["score"] > 0.9
    assert by_id["caption"][0]["generated_text"].startswith("English caption:")
    features = torch.tensor(by_id["features"]).flatten()
    wanted = torch.tensor(by_id["main"]["image_embeds"][0])
    assert features.shape == wanted.shape and features.isfinite().all()


def test_a_place_is_loaded_with_an_empty_cache_of_code(monkeypatch):
    seen = {}

    def run(command, env, cwd, **options):
        seen.update(env, cwd=cwd, files=os.listdir(env["HF_MODULES_CACHE"]))
        return SimpleNamespace(returncode=0, stdout="{}", stderr="")

    monkeypatch.setattr(publish.subprocess, "run", run)
    assert publish.load_offline("here") == {}
    assert seen["HF_MODULES_CACHE"] == seen["cwd"] != os.environ["HF_MODULES_CACHE"] and seen["files"] == []
    assert seen["HF_HUB_OFFLINE"] == "1" and not os.path.exists(seen["cwd"])
