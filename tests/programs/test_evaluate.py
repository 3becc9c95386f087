"""benchmarks/evaluate.py: figures against hand-made ones, sources against each other, the cache against loss."""

import io
import json
import shutil
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor

from benchmarks import evaluate
from benchmarks import evaluation_data as data
from benchmarks import evaluation_metrics as metrics
from conftest import ROOT, TOLERANCE, load

NAMES = ("fox", "lion", "panda", "pizza", "rocket", "sushi")
CAPTIONS = {name: [f"a photo of a {name}", f"{name} on white"] for name in NAMES}
TEMPLATES = ("{c}", "a photo of a {c}")
HAS = {name: find_spec(name) is not None for name in ("datasets", "webdataset", "pycocoevalcap")}
needs_datasets = pytest.mark.skipif(not HAS["datasets"], reason="datasets is not installed")
needs_scorers = pytest.mark.skipif(not HAS["pycocoevalcap"], reason="pycocoevalcap is not installed")


# ------------------------------------------------------------------------------------------------------- figures


def by_hand(scores: torch.Tensor, right: list[set[int]], count: int) -> float:
    """The share of rows with a right column among the `count` best, by Python's stable sort."""
    hits = []
    for row, wanted in zip(scores.tolist(), right):
        order = sorted(range(len(row)), key=lambda column: -row[column])
        hits.append(bool(wanted & set(order[:count])))
    return sum(hits) / len(hits)


def test_recall_of_a_matrix_made_by_hand():
    # Rows are texts, columns images; texts 0 and 1 are of image 0, 2 of image 1, 3 of image 2.
    texts = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.1], [0.1, 0.4, 0.5], [0.0, 0.2, 0.8]])
    found = metrics.retrieval(torch.eye(3), texts, [0, 0, 1, 2], counts=(1, 2, 3, 4))
    assert found["image_retrieval_recall@1"] == 2 / 4  # texts 0 and 3
    assert found["image_retrieval_recall@2"] == 1.0
    assert found["text_retrieval_recall@1"] == 1.0  # image 1: text 2 with 0.4
    texts[2, 1] = 0.25  # now text 1 is nearer to image 1 than its own
    assert metrics.retrieval(torch.eye(3), texts, [0, 0, 1, 2])["text_retrieval_recall@1"] == 2 / 3
    assert found["image_retrieval_recall@3"] == 1.0 and found["image_retrieval_recall@4"] is None
    assert found["text_retrieval_recall@4"] == 1.0


def test_an_image_is_found_by_any_of_its_texts_and_each_text_counts():
    texts = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.1, 0.2]])  # text 0 is nearer to the wrong image
    found = metrics.retrieval(torch.eye(2), texts, [0, 0, 1], counts=(1,))
    assert found == {"image_retrieval_recall@1": 2 / 3, "text_retrieval_recall@1": 0.5}


@pytest.mark.parametrize("digits", [1, 6])  # with one digit, many candidates tie
def test_figures_are_those_of_a_loop(digits, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 7)
    generator = torch.Generator().manual_seed(digits)
    images = torch.eye(24)
    texts = torch.rand(60, 24, generator=generator).mul(10**digits).round().div(10**digits)
    owners = [*range(24), *torch.randint(24, (36,), generator=generator).tolist()]
    found = metrics.retrieval(images, texts, owners)
    of_picture = [{text for text, owner in enumerate(owners) if owner == picture} for picture in range(24)]
    for count in (1, 5, 10):
        assert found[f"image_retrieval_recall@{count}"] == by_hand(texts, [{owner} for owner in owners], count)
        assert found[f"text_retrieval_recall@{count}"] == by_hand(texts.T, of_picture, count)
    labels = torch.randint(24, (60,), generator=generator).tolist()
    found = metrics.classification(texts, images, labels)
    assert found["acc1"] == by_hand(texts, [{label} for label in labels], 1)
    assert found["acc5"] == by_hand(texts, [{label} for label in labels], 5)


def test_a_model_that_gives_one_embedding_gets_what_guessing_gets():
    same = F.normalize(torch.ones(20, 8), dim=-1)
    found = metrics.retrieval(same, same, list(range(20)))
    assert [found[f"{name}_retrieval_recall@10"] for name in ("image", "text")] == [0.5, 0.5]
    assert metrics.classification(same, same, list(range(20)))["acc5"] == 0.25


def test_recall_per_class_counts_classes_that_have_images():
    scores = torch.eye(4)[[0, 0, 0, 1, 1, 2]]  # predictions 0 0 0 1 1 2
    found = metrics.classification(scores, torch.eye(4), [0, 0, 0, 0, 1, 1])
    assert found["acc1"] == 4 / 6
    assert found["mean_per_class_recall"] == (3 / 4 + 1 / 2) / 2  # classes 2 and 3 have no image
    assert found["acc5"] is None  # of four classes


@needs_scorers
def test_scores_of_captions():
    right = [["a red fox runs home", "an animal"], ["the old lion sleeps there", "a cat"], ["one two three four five"]]
    perfect = metrics.captioning([group[0] for group in right[:2]] + ["One, two three four FIVE!"], right, "words")
    assert list(perfect) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    for name, value in perfect.items():
        assert_close(value, perfect[name] if name == "CIDEr" else 1.0, rtol=1e-6, atol=1e-6)
    # A caption that is one of R references, and shares no word with the others, has CIDEr 10 / R.
    assert_close(perfect["CIDEr"], (5 + 5 + 10) / 3, rtol=0.05, atol=0)
    wrong = metrics.captioning(["x y z", "", "one two"], right, "words")
    # Two of five words of the candidates are right; they are as many as three times less than the references.
    assert 0 < wrong["Bleu_1"] < 2 / 5 and wrong["CIDEr"] < 2


def test_tokens_of_captions():
    texts = [["A dog's  ball,\nred-ish!"], ["一只狗。跑了"]]
    assert metrics.tokenized(texts, "words") == {0: ["a dog s ball red ish"], 1: ["一只狗 跑了"]}
    assert metrics.tokenized([["一只狗。 A1"]], "characters") == {0: ["一 只 狗 a 1"]}


@needs_scorers
@pytest.mark.skipif(shutil.which("java") is None, reason="the PTB tokenizer needs Java")
def test_tokens_of_the_coco_server():
    assert metrics.tokenized([["A dog's  ball,\nred!"], ["Two.", "It isn't"]], "ptb") == {
        0: ["a dog 's ball red"],
        1: ["two", "it is n't"],
    }


def test_the_coco_tokenizer_is_refused_without_java(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs Java.*--tokenizer words"):
        metrics.captioning(["a"], [["a"]], "ptb") if HAS["pycocoevalcap"] else metrics.check_tokenizer("ptb")


def test_captions_are_refused_without_their_scorers(monkeypatch):
    """Before any data is read or caption written."""
    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name == "pycocoevalcap" else find_spec(name))
    monkeypatch.setattr(evaluate, "read_images", None)
    with pytest.raises(ValueError, match="pip install pycocoevalcap"):
        evaluate.main(["--task", "captioning", "--data", "x", "--tokenizer", "words"])


# ------------------------------------------------------------------------------------------------------- sources


def wide(name: str, mirrored: bool) -> Image.Image:
    """An image of the examples at one end of a wide one, so that cutting and squeezing differ."""
    picture = Image.open(ROOT / "examples" / "pictures" / f"{name}.png").convert("RGBA").resize((90, 90))
    canvas = Image.new("RGB", (150, 90), "white")
    canvas.paste(picture, (40 if mirrored else 10, 0), picture)
    return canvas


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same twelve images four times: class folders, a listing, a dataset, shards."""
    root = tmp_path_factory.mktemp("data")
    rows = []
    for label, name in enumerate(NAMES):
        for mirrored in (False, True):
            path = root / "things" / name / f"{mirrored:d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            wide(name, mirrored).save(path)
            rows.append((path, label, CAPTIONS[name] if mirrored else CAPTIONS[name][:1]))
    listing = [{"image": f"{path.parent.name}/{path.name}", "caption": texts} for path, _, texts in rows]
    (root / "things" / "captions.json").write_text(json.dumps(listing))
    write_shards(root / "wds_things", rows)
    if HAS["datasets"]:
        write_dataset(root / "saved", rows)
    return root


def write_dataset(folder: Path, rows: list) -> None:
    import datasets

    columns = {"image": [str(path) for path, _, _ in rows], "label": [label for _, label, _ in rows]}
    columns["caption"] = [texts for _, _, texts in rows]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))}
    features["caption"] = datasets.Sequence(datasets.Value("string"))
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    datasets.DatasetDict({"test": made}).save_to_disk(str(folder))


def write_shards(folder: Path, rows: list, size: int = 5) -> None:
    """As CLIP_benchmark's converter does, with the library that it uses where that is installed."""
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    for number, start in enumerate(range(0, len(rows), size)):
        shard = folder / "test" / f"{number}.tar"
        samples = [
            {"__key__": f"s{start + row:07d}", "png": path.read_bytes(), "cls": str(label), "txt": "\n".join(texts)}
            for row, (path, label, texts) in enumerate(rows[start : start + size])
        ]
        write_shard(shard, samples)
    (folder / "test" / "nshards.txt").write_text(f"{number + 1}\n")


def write_shard(path: Path, samples: list[dict]) -> None:
    if HAS["webdataset"]:
        import webdataset

        with webdataset.TarWriter(str(path), encoder=False) as writer:
            for sample in samples:
                writer.write(
                    {
                        key: value.encode() if isinstance(value, str) and key[0] != "_" else value
                        for key, value in sample.items()
                    }
                )
        return
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            for ending in ("png", "cls", "txt"):
                value = sample[ending]
                content = value.encode() if isinstance(value, str) else value
                member = tarfile.TarInfo(f"{sample['__key__']}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def templates_file(folder: Path) -> Path:
    path = folder / "plain.txt"
    path.write_text("\n".join(TEMPLATES) + "\n")
    return path


@pytest.fixture
def run(trained, tmp_path):
    """Evaluate the trained tiny checkpoint with some options, in a cache of this test's own."""

    def call(task: str, folder: Path, *more: object) -> list[dict]:
        options = ["--task", task, "--data", folder, "--model", trained, "--dtype", "float32", "--device", "cpu"]
        options += ["--cache", tmp_path / "cache", "--batch-size", 5, *more]
        return evaluate.main([str(option) for option in options])

    return call


@pytest.fixture(scope="module")
def loaded(trained):
    return load(trained, AutoModel, dtype=torch.float32).eval(), load(trained, AutoProcessor)


@torch.inference_mode()
def embed(loaded, folders, mode: str, crop: str) -> torch.Tensor:
    model, processor = loaded
    paths = [str(folders / "things" / name / f"{mirrored}.png") for name in NAMES for mirrored in (0, 1)]
    return torch.cat([model.embed_image(processor(images=path, crop=crop).pixel_values, mode) for path in paths])


@torch.inference_mode()
@pytest.mark.parametrize("mode, crop", [("InternVL-C", "center"), ("InternVL-G", "squash")])
def test_classification_is_what_the_calls_of_the_readme_give(run, loaded, folders, tmp_path, mode, crop):
    model, processor = loaded
    images = embed(loaded, folders, mode, crop)
    logits = images @ model.embed_classes(processor, list(NAMES), list(TEMPLATES)).T
    truth = [label for label in range(len(NAMES)) for _ in (0, 1)]
    found = run(
        "classification", folders / "things", "--mode", mode, "--crop", crop, "--templates", templates_file(tmp_path)
    )
    right = (logits.argmax(1) == torch.tensor(truth)).double()
    expected = {"acc1": right.mean().item(), "acc5": by_hand(logits, [{label} for label in truth], 5)}
    assert found[0]["metrics"] == expected | {"mean_per_class_recall": right.view(-1, 2).mean(1).mean().item()}
    assert found[0]["metrics"]["acc1"] > 0.5  # the checkpoint does know these


@torch.inference_mode()
def test_retrieval_is_what_the_calls_of_the_readme_give(run, loaded, folders):
    model, processor = loaded
    found = run("retrieval", folders / "things", "--mode", "InternVL-C", "InternVL-G")
    texts = [text for name in NAMES for text in CAPTIONS[name][:1] + CAPTIONS[name]]
    owners = [2 * row + picture for row in range(len(NAMES)) for picture in (0, 1, 1)]
    embeds = torch.cat([model.embed_text(**processor(text=[text])) for text in texts])
    assert [each["model"] for each in found] == ["InternVL-C", "InternVL-G"]
    for each in found:
        assert (each["crop"], each["pictures"], each["texts"]) == ("squash", 12, 18)
        scores = embeds @ embed(loaded, folders, each["model"], "squash").T
        own = [{text for text, owner in enumerate(owners) if owner == picture} for picture in range(12)]
        for count in (1, 5, 10):
            expected = by_hand(scores, [{owner} for owner in owners], count), by_hand(scores.T, own, count)
            names = (f"{kind}_retrieval_recall@{count}" for kind in ("image", "text"))
            assert tuple(each["metrics"][name] for name in names) == expected
    assert found[0]["metrics"] != found[1]["metrics"]


@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_all_sources_give_the_same(run, folders, tmp_path, task, monkeypatch):
    more = ["--templates", templates_file(tmp_path)] if task == "classification" else []
    embeddings = []
    original = evaluate.Evaluation.images
    monkeypatch.setattr(evaluate.Evaluation, "images", lambda self: embeddings.append(original(self)) or embeddings[-1])
    names = ["things", "wds_things"] + ["saved"] * HAS["datasets"]
    found = [run(task, folders / name, *more)[0] for name in names]
    for each, rows in zip(found[1:], embeddings[1:]):
        assert each["metrics"] == found[0]["metrics"] and each["pictures"] == 12
        assert torch.equal(rows["InternVL-C"], embeddings[0]["InternVL-C"])


def test_shards_bring_their_names_and_templates(run, folders, loaded):
    found = run("classification", folders / "wds_things")[0]
    assert (found["templates"], found["classes"]) == ("dataset", len(NAMES))
    assert (
        found["metrics"]
        == run(
            "classification",
            folders / "things",
            "--templates",
            folders / "wds_things" / "zeroshot_classification_templates.txt",
        )[0]["metrics"]
    )


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_listings_may_be_lines_or_a_table_with_a_row_for_each_text(folders, tmp_path, ending):
    entries = [("fox/0.png", "a fox"), ("lion/0.png", "a lion, asleep"), ("fox/0.png", "ein Fuchs")]
    shutil.copytree(folders / "things", tmp_path / "x")
    (tmp_path / "x" / "captions.json").unlink()
    if ending == "csv":
        text = "file,text\n" + "".join(f'{picture},"{words}"\n' for picture, words in entries)
    else:
        text = "".join(json.dumps({"file": picture, "text": words}) + "\n" for picture, words in entries)
    (tmp_path / "x" / f"captions.{ending}").write_text(text, "utf-8")
    found = data.read_images(str(tmp_path / "x"), "auto", "retrieval", ["en"], data.Columns("file", "label", "text"))
    assert [Path(name).parent.name for name in found.names] == ["fox", "lion"]
    assert found.captions == {"en": [["a fox", "ein Fuchs"], ["a lion, asleep"]]}


def test_a_folder_that_datasets_reads_is_read(folders, tmp_path):
    shutil.copytree(folders / "things", tmp_path / "x")
    (tmp_path / "x" / "captions.json").unlink()
    (tmp_path / "x" / "metadata.jsonl").write_text('{"file_name": "fox/0.png", "text": "a fox"}\n')
    found = data.read_images(str(tmp_path / "x"), "auto", "retrieval", ["en"], data.Columns("image", "label", "text"))
    assert found.names == [str(tmp_path / "x" / "fox" / "0.png")] and found.captions == {"en": [["a fox"]]}


def test_a_name_that_is_nowhere_is_named(run):
    with pytest.raises(ValueError, match="`--data` must be a folder or a data set of the Hub, got 'no/such'"):
        run("retrieval", "no/such")


def test_examples_of_the_repository_in_three_languages(run):
    pictures = ROOT / "examples" / "pictures"
    columns = ["--listing", pictures / "examples.json", "--image-column", "file", "--language", "en", "zh", "ja"]
    found = run("retrieval", pictures, *columns, "--caption-column", "name")
    assert [each["language"] for each in found] == ["en", "zh", "ja"]
    assert all(each["metrics"]["text_retrieval_recall@1"] > 0.6 for each in found)
    found = run("classification", pictures, *columns, "--label-column", "name")
    assert [(each["language"], each["classes"]) for each in found] == [("en", 36), ("zh", 36), ("ja", 36)]
    assert all(each["metrics"]["acc1"] > 0.6 and each["templates"] == "shipped" for each in found)


def test_several_sets_of_templates_and_languages(run, folders, tmp_path, monkeypatch):
    chinese = ["狐狸", "狮子", "熊猫", "披萨", "火箭", "寿司"]
    (tmp_path / "zh-names.txt").write_text("\n".join(chinese), "utf-8")
    used, classes = [], evaluate.Evaluation.classes
    monkeypatch.setattr(
        evaluate.Evaluation,
        "classes",
        lambda self, names, templates: used.append((names, templates)) or classes(self, names, templates),
    )
    (tmp_path / "bare.txt").write_text("{}\n")
    sets = [f"en={templates_file(tmp_path)}", f"en={tmp_path / 'bare.txt'}"]
    options = ["--language", "en", "zh", "--classnames", f"zh={tmp_path / 'zh-names.txt'}", "--templates", *sets]
    output = tmp_path / "out" / "{dataset}_{model}_{language}_{templates}.json"
    found = run("classification", folders / "things", *options, "--output", output)
    expected = ["things_InternVL-C_en_bare", "things_InternVL-C_en_plain", "things_InternVL-C_zh_shipped"]
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == expected
    assert [(each["language"], each["templates"]) for each in found] == [
        ("en", "plain"),
        ("en", "bare"),
        ("zh", "shipped"),
    ]
    shipped = (ROOT / "benchmarks" / "templates" / "zh.txt").read_text("utf-8").splitlines()
    assert used == [(list(NAMES), list(TEMPLATES)), (list(NAMES), ["{}"]), (chinese, shipped)]


# --------------------------------------------------------------------------------------------------------- cache


class Opened:
    """Counts the images that are opened, and is interrupted at one of them."""

    def __init__(self, monkeypatch, stop: int | None = None):
        self.rows: list[int] = []
        original = data.Images.open

        def counted(pictures, index):
            if index == stop:
                raise KeyboardInterrupt
            self.rows.append(index)
            return original(pictures, index)

        monkeypatch.setattr(data.Images, "open", counted)


def no_model(self):
    raise AssertionError("the model was loaded")


def test_an_interrupted_run_goes_on(run, folders, tmp_path, monkeypatch):
    whole = run("retrieval", folders / "things", "--cache", tmp_path / "other", "--batch-size", 12)
    with monkeypatch.context() as patch:
        Opened(patch, stop=7)
        with pytest.raises(KeyboardInterrupt):
            run("retrieval", folders / "things")
    with monkeypatch.context() as patch:
        opened = Opened(patch)
        assert run("retrieval", folders / "things", "--batch-size", 4) == whole
        assert sorted(opened.rows) == list(range(5, 12))  # the first batch of five was kept
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Evaluation, "model", property(no_model))
        assert run("retrieval", folders / "things", "--batch-size", 3) == whole


def test_what_depends_on_something_else_is_computed_anew(run, folders, tmp_path, monkeypatch):
    shutil.copytree(folders / "things", tmp_path / "x")
    first = run("retrieval", tmp_path / "x")
    for change in (["--crop", "center"], ["--mode", "InternVL-G"], ["--dtype", "bfloat16"]):
        opened = Opened(monkeypatch)
        run("retrieval", tmp_path / "x", *change)
        assert len(opened.rows) == 12, change
    Image.new("RGB", (50, 50), "green").save(tmp_path / "x" / "panda" / "0.png")
    opened = Opened(monkeypatch)
    assert run("retrieval", tmp_path / "x")[0]["metrics"] != first[0]["metrics"]
    assert len(opened.rows) == 12


@torch.inference_mode()
def test_texts_of_another_run_are_not_taken(loaded, folders, trained, tmp_path):
    model, processor = loaded
    options = ["--task", "retrieval", "--data", folders / "things", "--model", trained, "--dtype", "float32"]
    parsed = evaluate.parse([str(option) for option in [*options, "--cache", tmp_path / "cache", "--device", "cpu"]])
    evaluation = evaluate.Evaluation(parsed, data.Images([], lambda index: None, "none"))
    for names, templates in [(["fox", "lion"], ["{}"]), (["lion", "fox"], ["{}"]), (["lion", "fox"], ["a {}"])]:
        expected = model.embed_classes(processor, names, templates)
        assert_close(evaluation.classes(names, templates), expected, **TOLERANCE)
        ids = processor(text=names, padding=False, return_tensors=None).input_ids
        assert_close(evaluation.texts(names), model.embed_texts(ids), **TOLERANCE)


def test_only_two_batches_are_in_memory(folders, trained, monkeypatch):
    options = ["--task", "retrieval", "--data", str(folders / "things"), "--model", str(trained), "--device", "cpu"]
    parsed = evaluate.parse([*options, "--batch-size", "2"])
    columns = data.Columns("image", "label", "caption")
    pictures = data.read_images(parsed.data, "folder", "retrieval", ["en"], columns)
    opened = Opened(monkeypatch)
    batches = evaluate.Evaluation(parsed, pictures).pixels(0)
    for taken in range(1, 4):
        next(batches)
        assert len(opened.rows) <= 2 * (taken + 1)
    batches.close()


def test_a_missing_shard_is_noticed(run, folders, tmp_path):
    run("retrieval", folders / "things", "--batch-size", 4)
    next((tmp_path / "cache").glob("pictures-*/000000004.pt")).unlink()
    with pytest.raises(ValueError, match="lacks the shard 000000004.pt"):
        run("retrieval", folders / "things")


def test_embeddings_that_are_not_finite_are_refused_and_not_kept(run, folders, tmp_path, monkeypatch):
    original = evaluate.Evaluation._collect
    monkeypatch.setattr(evaluate.Evaluation, "_collect", lambda self, batch: original(self, batch) * float("nan"))
    with pytest.raises(ValueError, match=r"embedding of .*fox.0\.png is not finite"):
        run("retrieval", folders / "things")
    assert not list((tmp_path / "cache").rglob("*.pt"))


@pytest.mark.parametrize("device_map", ["auto", '{"": "disk"}'])
def test_placed_by_a_device_map_it_gives_the_same(run, folders, trained, tmp_path, device_map):
    options = ["--task", "retrieval", "--data", folders / "things", "--model", trained, "--dtype", "float32"]
    options += ["--cache", tmp_path / "other", "--mode", *evaluate.MODES, "--device-map", device_map]
    placed = evaluate.main([str(option) for option in options])
    here = run("retrieval", folders / "things", "--mode", *evaluate.MODES)
    assert [each["metrics"] for each in placed] == [each["metrics"] for each in here]
    assert placed[0]["device"] == ("auto" if device_map == "auto" else {"": "disk"})


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("source", ["things", "wds_things", pytest.param("saved", marks=needs_datasets)])
def test_an_image_that_cannot_be_read_is_named(run, folders, tmp_path, source):
    broken = tmp_path / "x"
    shutil.copytree(folders / "things", broken)
    path = broken / "lion" / "1.png"
    path.write_bytes(path.read_bytes()[:400])
    rows = [
        (broken / name / f"{mirrored}.png", label, ["a"]) for label, name in enumerate(NAMES) for mirrored in (0, 1)
    ]
    if source == "wds_things":
        broken, named = tmp_path / "shards", "s0000003 of .*0.tar"
        write_shards(broken, rows)
    elif source == "saved":
        broken, named = tmp_path / "dataset", "3 of .*dataset"
        write_dataset(broken, rows)
    else:
        named = r"lion.1\.png"
    with pytest.raises(ValueError, match=f"The image .*{named} cannot be read"):
        run("classification", broken)


def test_bad_data_is_refused(run, folders, tmp_path):
    things, shards = tmp_path / "things", tmp_path / "wds_things"
    shutil.copytree(folders / "things", things)
    shutil.copytree(folders / "wds_things", shards)
    (tmp_path / "five.txt").write_text("\n".join(NAMES[:5]))
    (tmp_path / "gap.txt").write_text("fox\n\nlion\npanda\npizza\nrocket\nsushi")
    (tmp_path / "none.txt").write_text("a photo\n")
    for options, message in [
        (["--classnames", tmp_path / "five.txt"], "must have 6 names in 'en', as the data, got 5"),
        (["--classnames", tmp_path / "gap.txt"], "got a blank line"),
        (["--templates", tmp_path / "none.txt"], "one place for the name.*'a photo'"),
        (["--templates", f"zh={tmp_path / 'five.txt'}"], r"one of \['en'\]"),
        (["--templates", tmp_path / "absent.txt"], "absent.txt.*a file that exists"),
        (["--language", "sw"], "`--templates` must give a file for 'sw'"),
        (["--language", "en", "zh"], "`--classnames` must give names in 'zh'"),
        (["--output", tmp_path / "x.json", "--mode", *evaluate.MODES], "`--output` must differ for the 2 results"),
        (["--listing", "absent.json"], "`--listing` must name a file, got 'absent.json'"),
    ]:
        with pytest.raises(ValueError, match=message):
            run("classification", things, *options)
    with pytest.raises(ValueError, match="`--language` must be one where"):
        run("retrieval", things, "--language", "en", "zh")
    (things / "fox" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="must hold images and nothing else, got .*notes.txt"):
        run("classification", things)
    (shards / "test" / "1.tar").unlink()
    with pytest.raises(ValueError, match="must have 3 shards"):
        run("classification", shards)
    (shards / "test" / "nshards.txt").unlink()
    write_shard(shards / "test" / "1.tar", [{"__key__": "only", "png": b"", "cls": "7", "txt": ""}])
    with pytest.raises(ValueError, match="labels reach from 0 to 7"):
        run("classification", shards)
    with pytest.raises(ValueError, match="only of .*1.tar must have a text"):
        run("retrieval", shards)
    (tmp_path / "empty").mkdir()
    for task in ("classification", "retrieval"):
        with pytest.raises(ValueError, match="must have"):
            run(task, tmp_path / "empty")


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"image": "fox/9.png", "caption": "a"}, "entry 1 names the image .*9.png, which does not exist"),
        ({"image": "fox/0.png"}, "entry 1 must have 'image' and 'caption', got"),
        ({"image": "fox/0.png", "caption": []}, "none of them empty, got \\[\\]"),
        ({"image": "fox/0.png", "caption": ["a", " "]}, "none of them empty"),
        ({"image": "fox/0.png", "caption": {"zh": "a"}}, "has no text in \\['en'\\], only in \\['zh'\\]"),
        ({"image": None, "caption": "a"}, "entry 1 must name an image, got None"),
    ],
)
def test_bad_listings_are_refused(run, folders, tmp_path, entry, message):
    (tmp_path / "bad.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=message):
        run("retrieval", folders / "things", "--listing", tmp_path / "bad.json")


@needs_datasets
def test_columns_and_splits_that_a_dataset_lacks_are_named(run, folders):
    with pytest.raises(ValueError, match="must have the column 'text', got \\['image', 'label', 'caption'\\]"):
        run("retrieval", folders / "saved", "--caption-column", "text")
    with pytest.raises(ValueError, match="`--split` must be one of \\['test'\\].*'train'"):
        run("retrieval", folders / "saved", "--split", "train")


# ------------------------------------------------------------------------------------------------------- results


def test_results_have_the_keys_of_clip_benchmark(run, folders, tmp_path, trained, capsys):
    options = [
        "--dataset-name",
        "wds/flickr30k",
        "--output",
        tmp_path / "{dataset}_{model}.json",
        "--mode",
        "InternVL-G",
    ]
    found = run("retrieval", folders / "things", *options)
    text = (tmp_path / "wds-flickr30k_InternVL-G.json").read_text()
    assert json.loads(text) == found[0] and text.count("\n") == 1
    assert list(found[0])[:6] == ["dataset", "model", "pretrained", "task", "metrics", "language"]
    assert (found[0]["pretrained"], found[0]["task"]) == (str(trained), "zeroshot_retrieval")
    assert list(found[0]["metrics"]) == [
        f"{kind}_retrieval_recall@{k}" for k in (1, 5, 10) for kind in ("image", "text")
    ]
    assert found[0]["versions"]["torch"] == torch.__version__ and found[0]["mode"] == "InternVL-G"
    assert found[0]["published"]["metrics"]["image_retrieval_recall@1"] == 0.8498
    measured = found[0]["metrics"]["image_retrieval_recall@1"]
    assert f"published  84.98%, {measured - 0.8498:+.2%}" in capsys.readouterr().out


@needs_scorers
@torch.inference_mode()
def test_captions_are_those_of_generate(run, loaded, folders, tmp_path):
    model, processor = loaded
    lengths = {"num_beams": 2, "min_new_tokens": 1, "max_new_tokens": 6}
    options = [str(part) for name, value in lengths.items() for part in (f"--{name.replace('_', '-')}", value)]
    options += ["--tokenizer", "words", "--output", tmp_path / "{task}.json"]
    found = run("captioning", folders / "things", *options)[0]
    expected = []
    for name in NAMES:
        for mirrored in (0, 1):
            pixels = processor(images=str(folders / "things" / name / f"{mirrored}.png"), crop="squash").pixel_values
            ids = model.generate(pixels, **processor(text="English caption:", task="caption"), **lengths)
            expected.append(processor.batch_decode(ids, skip_special_tokens=True)[0].strip())
    written = json.loads((tmp_path / "captioning.captions.json").read_text("utf-8"))
    assert [each["caption"] for each in written] == expected and written[2]["image"].endswith("lion/0.png")
    references = [texts for name in NAMES for texts in (CAPTIONS[name][:1], CAPTIONS[name])]
    assert found["metrics"] == metrics.captioning(expected, references, "words")
    record = json.loads((tmp_path / "captioning.json").read_text("utf-8"))
    assert record["metrics"] == found["metrics"] and record["tokenizer"] == "words" and "captions" not in record


@pytest.mark.parametrize(
    "options, message",
    [
        (["--mode", "InternVL-C"], "must be InternVL-G for captions"),
        (["--language", "zh"], "must give a prompt for 'zh'"),
        (["--language", "zh", "--prompt", "zh=中文描述:"], "must be characters for 'zh', got 'words'"),
        (["--prompt", "zh=中文描述:"], "with a language of `--language`"),
        (["--batch-size", "0"], "`--batch-size` must be at least 1, got 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.parse(["--task", "captioning", "--data", "x", "--tokenizer", "words", *options])


def test_published_figures_are_those_of_the_tables():
    """The full digits of "Expected results" against the tables in per cent of the same pages."""

    def figures(dataset: str, task: str, mode: str, language: str, *names: str) -> list[float]:
        found = evaluate.published(dataset, task, mode, language)["metrics"]
        return [found[name] * 100 for name in names]

    def same(found: list[float], table: list[float]) -> bool:
        return all(abs(one - other) < 0.0501 for one, other in zip(found, table, strict=True))

    variants = ("imagenet1k", "imagenet-a", "imagenet-r", "imagenetv2", "imagenet_sketch", "objectnet")
    classes = {"InternVL-C": [83.2, 83.8, 95.5, 77.3, 73.9, 80.6], "InternVL-G": [82.9, 82.4, 95.5, 77.1, 73.3, 79.3]}
    for mode, table in classes.items():
        task = "zeroshot_classification"
        assert same([figures(name, task, mode, "en", "acc1")[0] for name in variants], table), mode
    languages = {"zh": 64.5, "jp": 61.5, "ar": 44.9, "it": 65.7}
    for language, value in languages.items():
        assert same(figures("wds_imagenet1k", "zeroshot_classification", "InternVL-C", language, "acc1"), [value])
    recalls = [f"{kind}_retrieval_recall@{k}" for kind in ("text", "image") for k in (1, 5, 10)]
    for (dataset, language, mode), table in {
        ("flickr30k", "en", "InternVL-C"): [94.7, 99.6, 99.9, 81.7, 96.0, 98.2],
        ("mscoco_captions", "en", "InternVL-C"): [70.6, 89.0, 93.5, 54.1, 77.3, 84.6],
        ("flickr30k", "en", "InternVL-G"): [95.7, 99.7, 99.9, 85.0, 97.0, 98.6],
        ("mscoco_captions", "en", "InternVL-G"): [74.9, 91.3, 95.2, 58.6, 81.3, 88.0],
        ("flickr30k", "zh", "InternVL-C"): [90.3, 98.8, 99.7, 75.1, 92.9, 96.4],
        ("mscoco_captions", "zh", "InternVL-C"): [68.8, 92.0, 96.7, 68.9, 91.9, 96.5],
        ("flickr30k", "zh", "InternVL-G"): [92.9, 99.4, 99.8, 77.7, 94.8, 97.3],
        ("mscoco_captions", "zh", "InternVL-G"): [71.4, 93.9, 97.7, 73.8, 94.4, 98.1],
    }.items():
        assert same(figures(dataset, "zeroshot_retrieval", mode, language, *recalls), table), (dataset, language, mode)
    spoken = ("en", "es", "fr", "zh", "it", "ko", "ru", "ja")
    for mode, table in {
        "InternVL-C": [97.3, 95.7, 95.1, 95.6, 96.0, 92.2, 93.3, 95.5],
        "InternVL-G": [98.6, 97.7, 96.5, 96.7, 96.9, 95.1, 94.8, 96.1],
    }.items():
        place = ("multilingual_mscoco_captions", "zeroshot_retrieval", mode)
        assert same([figures(*place, language, "text_retrieval_recall@10")[0] for language in spoken], table)
    for dataset, table in {"coco": [37.1, 128.2], "flickr30k": [27.0, 79.2], "nocaps": [44.3, 113.7]}.items():
        assert same(figures(dataset, "captioning", "InternVL-G", "en", "Bleu_4", "CIDEr"), table)
    assert evaluate.published("mine", "captioning", "InternVL-G", "en") is None


def test_shipped_templates_have_one_place_and_no_doubles():
    files = sorted(data.SHIPPED.glob("*.txt"))
    assert {path.stem for path in files} >= {"en", "zh", "ja"}
    for path in files:
        texts = data.read_lines(path)
        assert len(set(texts)) == len(texts) > 3 and all(text.count("{c}") == 1 for text in texts)
