"""Searching one's own images: what is indexed and what is listed with a reason, what a second run does, what is left
after `kill -9`, and whether the right image is found. The page is in test_search_page.py.
"""

import dataclasses
import importlib.util
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import LAST_RESORT, ROOT, run_fork
from tools import pages

pytest.importorskip("lancedb")

import search
import search_index
from search_index import COLUMNS, MATCH_WEIGHT, Embedder, Index, Searcher, SearchError

PICTURES = ROOT / "examples" / "pictures"
NAMES = {entry["file"]: entry["name"] for entry in json.loads((PICTURES / "examples.json").read_text("utf-8"))}
SOME = ("panda.png", "lion.png", "pizza.png", "rocket.png", "sunflower.png", "octopus.png")


@pytest.fixture(scope="module")
def embedder(trained):
    return Embedder(str(trained))


@pytest.fixture(scope="module")
def indexed(embedder, tmp_path_factory):
    """An index of the example images, with captions. Not to be changed."""
    index = Index(tmp_path_factory.mktemp("indexed") / "index")
    report = index.update(PICTURES, embedder, quiet=True)
    assert (report.embedded, report.problems, report.others) == (len(NAMES), 0, {".json": 1})
    return index


@pytest.fixture
def folder(tmp_path):
    """A folder with some images in it, which a test may change."""
    target = tmp_path / "my pictures"
    (target / "deeper" / "still").mkdir(parents=True)
    for number, name in enumerate(SOME):
        shutil.copy(PICTURES / name, target / ("deeper/still" if number % 2 else "") / name)
    return target


def update(index, folder, embedder, **options):
    return index.update(folder, embedder, captions=False, quiet=True, **options)


def rows(index) -> dict[str, dict]:
    """The rows by their paths, none of which may be there twice."""
    found = index.open().search().limit(None).to_list()
    by_path = {search_index.path_of(row["uri"]): row for row in found}
    assert len(by_path) == len(found)
    return by_path


def names(results) -> list[str]:
    return [os.path.basename(result.path) for result in results]


def run(*arguments, capsys) -> str:
    """What a command prints; a wrong argument ends in a message."""
    search.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize("mode", COLUMNS)
def test_words_in_three_languages_find_their_image(indexed, embedder, mode):
    searcher = Searcher(indexed, embedder)
    right = [
        names(searcher.search(words=text, k=1, mode=mode)) == [file]
        for file, texts in NAMES.items()
        for text in texts.values()
    ]
    assert sum(right) / len(right) > 0.6  # the tiny checkpoint is small; by chance it would be 0.03
    for text in NAMES["panda.png"].values():
        assert names(searcher.search(words=text, k=1, mode=mode)) == ["panda.png"]


@pytest.mark.parametrize("mode", COLUMNS)
def test_an_image_finds_itself_first(indexed, embedder, mode):
    for file in SOME:
        best = Searcher(indexed, embedder).search(picture=str(PICTURES / file), k=3, mode=mode)
        assert names(best)[0] == file and best[0].cosine == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("mode", COLUMNS)
def test_more_like_an_indexed_image_needs_no_model_and_leaves_it_out(indexed, embedder, mode, monkeypatch):
    path = str(PICTURES / "lion.png")
    searcher = Searcher(indexed, embedder)
    wanted = searcher.search(picture=path, k=6, mode=mode)
    monkeypatch.setattr(embedder, "see", None)
    found = searcher.search(like=path, k=5, mode=mode)
    assert names(found) == names(wanted)[1:] and "lion.png" not in names(found)
    assert [result.cosine for result in found] == pytest.approx([r.cosine for r in wanted[1:]], abs=0.01)


@pytest.mark.parametrize("k", [1, 7, 100])
def test_a_sample_has_each_image_once(indexed, embedder, k):
    found = [search_index.path_of(row["uri"]) for row in Searcher(indexed, embedder).sample(k)]
    assert len(set(found)) == len(found) == min(k, len(NAMES)) and set(found) <= rows(indexed).keys()


def test_scores_are_the_cosines_of_the_model(indexed, embedder, trained):
    """Computed here by the model's public calls, not by the example's."""
    model, processor = embedder.model, embedder.processor
    order = sorted(NAMES)
    with torch.inference_mode():
        pixels = processor(images=[str(PICTURES / name) for name in order], crop="squash").pixel_values
        text = model.embed_text(**processor(text="熊猫")).float()
        for mode in COLUMNS:
            wanted = (model.embed_image(pixels.to(model.dtype), mode=mode).float() @ text.T)[:, 0].tolist()
            found = Searcher(indexed, embedder).search(words="熊猫", k=len(order), mode=mode)
            assert len(found) == len(order)
            assert [result.cosine for result in found] == sorted((r.cosine for r in found), reverse=True)
            for result in found:
                assert result.cosine == pytest.approx(wanted[order.index(os.path.basename(result.path))], abs=0.01)


def test_reranking_adds_what_matching_says(indexed, embedder):
    model, processor = embedder.model, embedder.processor
    found = Searcher(indexed, embedder).search(words="panda", k=30, rerank=True)
    assert len(found) == 30
    for result in found[:5]:
        with torch.inference_mode():
            pixels = processor(images=result.path, crop="squash").pixel_values.to(model.dtype)
            logits = model.match(pixels, **processor(text="panda", task="match")).float()
        assert result.match == pytest.approx(float(logits.softmax(-1)[0, 1]), abs=0.02)
        total = embedder.scale * result.cosine + MATCH_WEIGHT * float(torch.tensor(result.match).log())
        assert result.score == pytest.approx(total, abs=1e-3)
    assert [result.score for result in found] == sorted((result.score for result in found), reverse=True)
    assert names(found)[0] == "panda.png"


def test_labels_classify_what_is_found(indexed, embedder):
    searcher, model = Searcher(indexed, embedder), embedder.model
    labels = ["狐狸", "panda", "すし"]
    found = searcher.search(words="panda", k=len(NAMES), labels=labels)
    classes = model.embed_classes(embedder.processor, labels).float()
    with torch.inference_mode():
        pixels = embedder.processor(images=[result.path for result in found], crop="squash").pixel_values
        wanted = (embedder.scale * model.embed_image(pixels.to(model.dtype)).float() @ classes.T).softmax(-1)
    for result, shares in zip(found, wanted.tolist(), strict=True):
        assert result.share == pytest.approx(max(shares), abs=0.05)
        assert shares[labels.index(result.label)] == pytest.approx(max(shares), abs=0.05)
    assert found[0].label == "panda"
    shares = searcher.classify(str(PICTURES / "panda.png"), labels)
    assert shares[0][0] == "panda" and sum(share for _, share in shares) == pytest.approx(1, abs=1e-5)


def test_captions_are_those_of_the_model(indexed, embedder):
    prompt = embedder.processor(text="English caption:", task="caption")
    for path in (str(PICTURES / name) for name in SOME):
        pixels = embedder.pixels(Image.open(path))[None].to(embedder.model.dtype)
        ids = embedder.model.generate(pixels, **prompt, max_new_tokens=16)
        text = embedder.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
        assert rows(indexed)[path]["caption"] == text


def test_wrong_queries_are_refused_by_name(indexed, embedder, tmp_path):
    searcher = Searcher(indexed, embedder)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for options, said in (
        ({}, "words or with an image"),
        ({"words": " "}, "words or with an image"),
        ({"words": "a", "picture": str(PICTURES / "fox.png")}, "one of them"),
        ({"picture": str(PICTURES / "fox.png"), "rerank": True}, "Re-ranking compares images with words"),
        ({"picture": str(broken)}, "broken.png: not an image in a known format"),
        ({"like": str(PICTURES / "fox.png"), "rerank": True}, "Re-ranking compares images with words"),
        ({"like": str(broken)}, "broken.png is not in the index any more"),
        ({"picture": str(tmp_path / "nowhere.png")}, "nowhere.png: cannot be read: No such file"),
        ({"words": "panda", "k": 0}, "The number of results must be an integer of at least 1, got 0"),
        ({"words": "panda", "mode": "G"}, "`mode` must be one of InternVL-C, InternVL-G, got 'G'"),
        ({"words": "panda", "labels": ["fox"]}, "Give two labels or more, none of them empty; got: fox"),
        (
            {"words": "panda", "labels": ["fox", "lion " * 200]},
            r"“lion lion .*…” is too long for the model \(1,000 char",
        ),
        ({"words": "panda " * 200}, r"“panda panda .*…” is too long for the model \(1,199 characters\). Shorten it"),
        ({"words": os.fsdecode(b"caf\xe9")}, "has characters that cannot be read"),
    ):
        with pytest.raises(SearchError, match=said):
            searcher.search(**options)


# ------------------------------------------------------------------------------------------------- bringing up to date


def test_a_second_run_reads_only_what_changed(folder, embedder, tmp_path, monkeypatch):
    index = Index(tmp_path / "index")
    assert update(index, folder, embedder).embedded == len(SOME)
    before = rows(index)

    seen = []
    see = embedder.see
    monkeypatch.setattr(embedder, "see", lambda pixels, captions: (seen.append(len(pixels)), see(pixels, captions))[1])
    report = update(index, folder, embedder)
    assert (report.embedded, report.unchanged, report.dropped, seen) == (0, len(SOME), 0, [])

    shutil.copy(PICTURES / "fox.png", folder / "new.png")
    shutil.copy(PICTURES / "owl.png", folder / "pizza.png")  # another image under an old name
    (folder / "panda.png").rename(folder / "deeper" / "moved.png")
    os.utime(folder / "sunflower.png", (1, 1))
    (folder / "deeper/still/lion.png").unlink()
    report = update(index, folder, embedder)
    assert (report.embedded, report.taken_over, report.dropped, sum(seen)) == (2, 2, 2, 2)
    after = rows(index)
    assert {os.path.relpath(path, folder) for path in after} == {
        "new.png", "pizza.png", "deeper/moved.png", "sunflower.png", "deeper/still/rocket.png",
        "deeper/still/octopus.png",
    }  # fmt: skip
    assert after[str(folder / "deeper/moved.png")]["vector_g"] == before[str(folder / "panda.png")]["vector_g"]
    assert after[str(folder / "pizza.png")]["vector_c"] != before[str(folder / "pizza.png")]["vector_c"]
    searcher = Searcher(index, embedder)
    assert names(searcher.search(picture=str(PICTURES / "owl.png"), k=1)) == ["pizza.png"]
    assert names(searcher.search(words="panda", k=1)) == ["moved.png"]
    assert update(index, folder, embedder).unchanged == 6


def test_an_index_from_scratch_is_the_same(folder, embedder, tmp_path):
    first, second = Index(tmp_path / "first"), Index(tmp_path / "second")
    (folder / "lion.png").write_bytes(b"")
    update(first, folder, embedder)
    (folder / "lion.png").unlink()
    shutil.copy(PICTURES / "fox.png", folder)
    update(first, folder, embedder)
    update(second, folder, embedder)
    one, other = rows(first), rows(second)
    assert one.keys() == other.keys()
    for path in one:
        for column in COLUMNS.values():
            assert np.dot(one[path].pop(column), other[path].pop(column)) == pytest.approx(1, abs=1e-3)
        assert one[path] == other[path]


def test_folders_share_an_index(folder, embedder, tmp_path):
    """Also where one name begins with the other: nothing of the second is dropped with the first."""
    index, other = Index(tmp_path / "index"), folder.with_name(folder.name + " 2")
    other.mkdir()
    shutil.copy(PICTURES / "fox.png", other)
    update(index, folder, embedder)
    update(index, other, embedder)
    report = update(index, folder, embedder)
    assert report.dropped == 0 and index.count() == len(SOME) + 1


def test_captions_are_added_to_an_index_without(folder, embedder, tmp_path):
    index = Index(tmp_path / "index")
    update(index, folder, embedder)
    assert {row["caption"] for row in rows(index).values()} == {None}
    report = index.update(folder, embedder, quiet=True)
    assert report.embedded == len(SOME) and None not in {row["caption"] for row in rows(index).values()}
    assert index.update(folder, embedder, quiet=True).unchanged == len(SOME)


def test_a_folder_that_lost_all_its_images_loses_no_rows(folder, embedder, tmp_path):
    """A drive that is not mounted is an empty folder."""
    index = Index(tmp_path / "index")
    update(index, folder, embedder)
    shutil.rmtree(folder)
    with pytest.raises(SearchError, match="is no folder. Nothing was changed"):
        update(index, folder, embedder)
    folder.mkdir()
    with pytest.raises(SearchError, match="Is a drive missing"):
        update(index, folder, embedder)
    assert index.count() == len(SOME)
    assert Searcher(index, embedder).search(words="panda", k=1)[0].gone
    assert update(index, folder, embedder, allow_empty=True).dropped == len(SOME)
    assert index.count() == 0


def test_files_that_are_gone_come_last_when_reranked(folder, embedder, tmp_path):
    index = Index(tmp_path / "index")
    update(index, folder, embedder)
    (folder / "panda.png").unlink()
    found = Searcher(index, embedder).search(words="panda", rerank=True)
    assert names(found)[-1] == "panda.png" and found[-1].gone and found[-1].match is None
    assert all(result.match is not None for result in found[:-1])


# ------------------------------------------------------------------------------------------------------ odd files


def saved(picture: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def lion() -> Image.Image:
    return Image.open(PICTURES / "lion.png").convert("RGBA")


def on_white() -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", lion().size, "white"), lion()).convert("RGB")


def turned() -> bytes:
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees
    return saved(on_white().rotate(90, expand=True), "JPEG", exif=exif, quality=95)


def sixteen_bits() -> bytes:
    values = np.asarray(on_white().convert("L")).astype(np.uint16) * 257
    return saved(Image.fromarray(values), "PNG")


def palette() -> bytes:
    return saved(on_white().quantize(64), "GIF", save_all=True, append_images=[Image.new("P", on_white().size)] * 2)


# Files that show the lion, and what their vectors are compared with.
READ = {
    "upright.jpg": (turned, on_white),
    "cmyk.jpg": (lambda: saved(on_white().convert("CMYK"), "JPEG", quality=95), on_white),
    "cmyk.tif": (lambda: saved(on_white().convert("CMYK"), "TIFF"), on_white),
    "sixteen.png": (sixteen_bits, lambda: on_white().convert("L")),
    "animated.gif": (palette, on_white),
    "animated.webp": (
        lambda: saved(on_white(), "WEBP", save_all=True, append_images=[Image.new("RGB", lion().size)], lossless=True),
        on_white,
    ),
    "transparent.png": (lambda: saved(lion(), "PNG"), on_white),
    "misnamed.jpg": (lambda: saved(lion(), "PNG"), on_white),
    "misnamed.txt": (lambda: saved(on_white(), "WEBP", lossless=True), on_white),
    "without-ending": (lambda: saved(on_white(), "BMP"), on_white),
    "bits.tiff": (lambda: saved(on_white().convert("1"), "TIFF"), lambda: on_white().convert("1")),
    "CAPITALS.PNG": (lambda: saved(on_white(), "PNG"), on_white),
    "wide.png": (lambda: saved(on_white().resize((900, 30)), "PNG"), lambda: on_white().resize((900, 30))),
    "icon.ico": (lambda: saved(on_white(), "ICO", sizes=[(64, 64)]), on_white),
    "plain.ppm": (lambda: saved(on_white(), "PPM"), on_white),
    "j2k.jp2": (lambda: saved(on_white(), "JPEG2000"), on_white),
    "targa.tga": (lambda: saved(on_white(), "TGA"), on_white),
}


def big_header() -> bytes:
    """A PNG that says it has 20,000 x 20,000 pixels, and holds none."""
    data = bytearray(saved(Image.new("L", (1, 1)), "PNG"))
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def broken_png() -> bytes:
    data = bytearray(saved(lion(), "PNG"))
    data[len(data) // 2 :] = b"\0" * (len(data) - len(data) // 2)
    return bytes(data)


# Files that cannot be indexed, and the reason that is listed.
REFUSED = {
    "zero.png": (lambda: b"", "an empty file"),
    "cut.jpg": (lambda: saved(on_white(), "JPEG")[:-400], "damaged: image file is truncated"),
    "cut.png": (lambda: saved(lion(), "PNG")[:60], "damaged: "),
    "broken.png": (broken_png, "damaged: "),
    "text.png": (lambda: b"This is a text.\n" * 99, "not an image in a known format"),
    "bomb.png": (big_header, "has more than 89,478,485 pixels, the limit for safety"),
    "95-million.gif": (lambda: saved(Image.new("1", (9800, 9800)), "GIF"), "has more than 89,478,485 pixels"),
    "needle.png": (
        lambda: saved(Image.new("L", (1, 4000)), "PNG"),
        "1 x 4000 pixels; one side may be at most 50",
    ),
    "hdr.tiff": (lambda: saved(Image.fromarray(np.full((9, 9), 7e4, np.float32)), "TIFF"), "must be in [0, 255]"),
    "header.webp": (lambda: b"RIFF\x24\x00\x00\x00WEBPVP8 ", "damaged: "),
}


@pytest.fixture(scope="module")
def odd(embedder, tmp_path_factory):
    """An index of all of them at once, so that none of them spoils another."""
    folder = tmp_path_factory.mktemp("odd") / "pictures"
    folder.mkdir()
    for name, (content, _) in {**READ, **REFUSED}.items():
        (folder / name).write_bytes(content())
    (folder / "notes.txt").write_text("no picture")
    os.mkfifo(folder / "pipe.png")  # reading it would wait for ever
    index = Index(folder.parent / "index")
    report = update(index, folder, embedder)
    assert (report.embedded, report.problems) == (len(READ), len(REFUSED))
    assert report.others == {".txt": 1, ".png": 1}
    return folder, index


@pytest.mark.parametrize("name", READ)
def test_odd_images_are_indexed_right(odd, embedder, name):
    folder, index = odd
    row = rows(index)[str(folder / name)]
    assert row["problem"] == ""
    with torch.inference_mode():
        pixels = embedder.processor(images=READ[name][1](), crop="squash").pixel_values.to(embedder.model.dtype)
        for mode, column in COLUMNS.items():
            wanted = embedder.model.embed_image(pixels, mode=mode).float()[0]
            # Other cosines, such as that of the image upside down, are below 0.9; lossy formats change it a little.
            assert float(wanted @ torch.tensor(row[column])) > 0.97, name
    small = Image.open(io.BytesIO(row["thumbnail"]))
    reference = np.asarray(READ[name][1]().convert("RGB").resize(small.size), dtype=float)
    assert np.abs(np.asarray(small.convert("RGB"), dtype=float) - reference).mean() < 12


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_indexed_is_listed_with_the_reason(odd, name):
    folder, index = odd
    assert REFUSED[name][1] in dict(index.problems())[str(folder / name)]
    row = rows(index)[str(folder / name)]
    assert row["vector_c"] is None and row["vector_g"] is None


def test_problems_are_never_found(odd, embedder):
    folder, index = odd
    found = Searcher(index, embedder).search(words="lion", k=100)
    assert sorted(names(found)) == sorted(READ)


def test_problems_are_tried_again_when_the_file_changes(folder, embedder, tmp_path):
    index = Index(tmp_path / "index")
    good = (folder / "panda.png").read_bytes()
    (folder / "panda.png").write_bytes(good[:100])
    assert update(index, folder, embedder).problems == 1
    assert update(index, folder, embedder).unchanged == len(SOME)
    (folder / "panda.png").write_bytes(good)
    report = update(index, folder, embedder)
    assert (report.embedded, report.problems, index.problems()) == (1, 0, [])
    (folder / "panda.png").write_bytes(b"")
    assert update(index, folder, embedder).problems == 1
    assert "panda.png" not in names(Searcher(index, embedder).search(words="panda"))


def test_values_that_are_not_finite_are_a_problem(folder, embedder, tmp_path, monkeypatch):
    see = embedder.see

    def overflowing(pixels, captions):
        vectors, texts = see(pixels, captions)
        with torch.inference_mode():
            vectors["InternVL-G"][1] = float("nan")
        return vectors, texts

    monkeypatch.setattr(embedder, "see", overflowing)
    index = Index(tmp_path / "index")
    assert update(index, folder, embedder).problems == 1
    assert index.count() == len(SOME) - 1 and "not finite" in index.problems()[0][1]


def test_names_of_any_bytes(folder, embedder, tmp_path, capsys):
    index = Index(tmp_path / "index")
    odd_names = [b"\xff\xfe.png", "熊猫.png".encode(), b"a'b\"c;--%_.png", b"line\nbreak.png", b"<img src=x>.png"]
    for name in odd_names:
        shutil.copy(PICTURES / "fox.png", os.path.join(os.fsencode(folder), name))
    (folder / "\x1b[31m.png").write_bytes(b"")
    report = update(index, folder, embedder)
    assert report.embedded == len(SOME) + len(odd_names)
    found = Searcher(index, embedder).search(picture=str(PICTURES / "fox.png"), k=len(odd_names))
    assert {os.fsencode(os.path.basename(result.path)) for result in found} == set(odd_names)
    assert not any(result.gone for result in found)
    assert update(index, folder, embedder).unchanged == len(SOME) + len(odd_names) + 1
    printed = run("problems", "--index", index.folder, capsys=capsys)
    assert "\\x1b[31m.png: an empty file\n" in printed and "\x1b" not in printed
    for name in odd_names:
        os.unlink(os.path.join(os.fsencode(folder), name))
    assert update(index, folder, embedder).dropped == len(odd_names)


def test_links(folder, embedder, tmp_path):
    index = Index(tmp_path / "index")
    (folder / "round").symlink_to(folder)
    (folder / "deeper" / "up").symlink_to("..")
    (folder / "link.png").symlink_to(PICTURES / "fox.png")
    (folder / "nowhere.png").symlink_to("gone.png")
    report = update(index, folder, embedder)
    assert (report.embedded, report.problems) == (len(SOME) + 1, 3)
    reasons = {os.path.relpath(path, folder): reason for path, reason in index.problems()}
    assert "link to a folder" in reasons["round"] and "link to a folder" in reasons["deeper/up"]
    assert "No such file" in reasons["nowhere.png"]
    (folder.parent / "other name").symlink_to(folder)
    assert update(index, folder.parent / "other name", embedder).unchanged == len(SOME) + 1


def test_the_index_may_lie_in_the_folder(folder, embedder):
    index = Index(folder / "index")
    for _ in range(2):
        report = update(index, folder, embedder)
        assert not report.others and report.problems == 0


def test_folders_that_cannot_be_read_keep_their_rows(embedder):
    """With the rights of another user, where the tests are root's."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        folder, index = Path(name) / "pictures", Index(Path(name) / "index")
        (folder / "closed").mkdir(parents=True)
        shutil.copy(PICTURES / "fox.png", folder)
        shutil.copy(PICTURES / "owl.png", folder / "closed")
        shutil.copy(PICTURES / "key.png", folder / "secret.png")
        update(index, folder, embedder)
        for path in (folder / "closed", folder / "secret.png"):
            os.utime(path)
            path.chmod(0)
        with another_user():
            found = search_index.find_files(folder, index.folder)
            problem = search_index.Update(index.open(), embedder, False, True).read_row(str(folder / "secret.png"))
        assert found.unseen == [str(folder / "closed")] and "Permission denied" in found.problems[found.unseen[0]]
        assert problem["problem"] == "cannot be read: Permission denied" and problem["hash"] == ""
        find_files = search_index.find_files
        try:
            search_index.find_files = lambda *_: found
            report = update(index, folder, embedder)
        finally:
            search_index.find_files = find_files
        assert report.dropped == 0 and str(folder / "closed" / "owl.png") in rows(index)
        (folder / "closed").chmod(0o755)
        report = update(index, folder, embedder)
        assert (report.dropped, report.problems) == (1, 0)  # the folder's own row


class another_user:
    """Inside, this process has nobody's rights if it had all."""

    def __enter__(self):
        self.user = os.geteuid()
        if self.user == 0:
            os.seteuid(65534)

    def __exit__(self, *_):
        os.seteuid(self.user)


# --------------------------------------------------------------------------------------------- models and writers


def test_an_index_of_another_model_is_refused(folder, embedder, trained, tmp_path):
    index = Index(tmp_path / "index")
    update(index, folder, embedder)
    other = Embedder(str(trained))
    with torch.no_grad():
        other.model.qllama.model.layers[-1].mlp.down_proj.weight[0, 3] += 0.5
    other.about["fingerprint"] = other.fingerprint()
    cropped = Embedder(str(trained), crop="center")
    for stranger in (other, cropped):
        for act in (lambda: Searcher(index, stranger), lambda: update(index, folder, stranger)):  # noqa: B023
            with pytest.raises(SearchError, match="made by another model(.|\n)*index --rebuild FOLDER"):
                act()
    assert index.count() == len(SOME)
    assert update(index, folder, cropped, rebuild=True).embedded == len(SOME)
    Searcher(index, cropped)
    with pytest.raises(SearchError, match="made by another model"):
        Searcher(index, embedder)


def test_the_same_model_elsewhere_is_the_same(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    copy = Embedder(str(tmp_path / "copy"))
    assert copy.about["fingerprint"] == Embedder(str(trained)).about["fingerprint"]


def test_a_model_larger_than_the_gpu_is_the_same(trained, embedder, monkeypatch):
    """Its weights wait elsewhere until they are needed: here on the disk."""
    pytest.importorskip("accelerate")
    monkeypatch.setattr(search_index, "placement", lambda device: {"device_map": {"": "disk", "vision_model": "cpu"}})
    split = Embedder(str(trained))
    assert next(split.model.qllama.parameters()).is_meta
    assert (split.about, split.scale) == (embedder.about, embedder.scale)
    pixels = torch.stack([embedder.pixels(Image.open(PICTURES / name)) for name in SOME])
    (found, captions), (wanted, known) = (each.see(pixels, captions=True) for each in (split, embedder))
    assert captions == known and all(torch.allclose(found[mode], wanted[mode], atol=1e-3) for mode in COLUMNS)
    assert torch.allclose(split.read("panda"), embedder.read("panda"), atol=1e-3)
    assert torch.allclose(split.match(pixels, "panda"), embedder.match(pixels, "panda"), atol=1e-2)
    assert torch.allclose(split.classes(["panda", "fox"]), embedder.classes(["panda", "fox"]), atol=1e-3)


@pytest.mark.parametrize("gpu, accelerate, wanted", [(1, 1, {"device_map": "auto"}), (1, 0, {}), (0, 1, {})])
def test_a_gpu_takes_what_fits(monkeypatch, gpu, accelerate, wanted):
    class Stop(Exception):
        pass

    def stopped(model, **options):
        assert {name: options[name] for name in options if name == "device_map"} == wanted
        raise Stop

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
    monkeypatch.setattr(search_index, "find_spec", lambda name: accelerate or None)
    monkeypatch.setattr(search_index.AutoModel, "from_pretrained", stopped)
    with pytest.raises(Stop):
        Embedder("any")


def test_one_process_writes_at_a_time(folder, embedder, tmp_path):
    index = Index(tmp_path / "index")
    update(index, folder, embedder)
    with search_index.FileLock(index.folder / "lock"), pytest.raises(SearchError, match="Another process is writing"):
        update(index, folder, embedder)
    update(index, folder, embedder)


def test_reranking_looks_at_a_shortlist_however_few_are_asked_for(indexed, embedder, monkeypatch):
    seen = []

    def match(pixels, words):  # the last of the list is the best by far
        seen.append(len(pixels))
        return -1e6 * torch.arange(len(pixels)).float().flip(0)

    monkeypatch.setattr(embedder, "match", match)
    searcher = Searcher(indexed, embedder)
    (best,) = searcher.search(words="panda", k=1, rerank=True)
    assert seen == [search_index.SHORTLIST]
    assert best.path == searcher.search(words="panda", k=search_index.SHORTLIST)[-1].path


def test_searching_while_a_run_goes_on(folder, embedder, tmp_path, monkeypatch):
    """Every search sees whole rows, and more and more of them."""
    for number in range(40):
        shutil.copy(PICTURES / "fox.png", folder / f"{number}.png")
    index = Index(tmp_path / "index")
    update(index, PICTURES, embedder)  # an index to open
    monkeypatch.setattr(search_index, "BATCH", 4)
    monkeypatch.setattr(search_index, "ROWS", 4)
    searcher, counts, searched = Searcher(index, embedder), [], threading.Event()
    commit = search_index.Update.commit

    def seen_commit(run):
        """The writer goes on when the next search is done, however busy the machine is."""
        commit(run)
        searched.clear()
        assert searched.wait(LAST_RESORT)

    monkeypatch.setattr(search_index.Update, "commit", seen_commit)
    writer = threading.Thread(target=update, args=(index, folder, embedder))
    writer.start()
    try:
        while writer.is_alive():
            assert names(searcher.search(words="熊猫", k=1)) == ["panda.png"]
            counts.append(len(searcher.search(words="fox", k=1000)))
            searched.set()
    finally:  # a search that failed must not leave the writer waiting
        monkeypatch.setattr(search_index.Update, "commit", commit)
        searched.set()
        writer.join()
    assert counts == sorted(counts) and len(set(counts)) > 3
    assert len(searcher.search(words="fox", k=1000)) == len(NAMES) + len(SOME) + 40


def test_an_interrupted_run_keeps_what_was_done(folder, embedder, tmp_path, monkeypatch):
    index = Index(tmp_path / "index")
    monkeypatch.setattr(search_index, "BATCH", 2)
    see, calls = embedder.see, []

    def interrupted(pixels, captions):
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return see(pixels, captions)

    monkeypatch.setattr(embedder, "see", interrupted)
    with pytest.raises(KeyboardInterrupt):
        update(index, folder, embedder)
    assert index.count() == 4
    report = update(index, folder, embedder)
    assert (report.unchanged, report.embedded) == (4, len(SOME) - 4)


# --------------------------------------------------------------------------------------------------------- kill -9

# Runs an update of many small commits and dies by SIGKILL in the midst of call `number` of `name`, after `delay`.
KILLED = """
import os, signal, sys, threading, time
import search_index
from pathlib import Path
name, number, delay = sys.argv[4], int(sys.argv[5]), float(sys.argv[6])
search_index.BATCH = search_index.ROWS = 4
owner = search_index.Index if name == "_made" else search_index.Update
method, calls = getattr(owner, name), []

def dying(*arguments, **options):
    calls.append(name)
    if len(calls) == number:
        def kill():
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=kill).start()
        result = method(*arguments, **options)
        time.sleep(1200)  # dies in here if it has not yet
    return method(*arguments, **options)

setattr(owner, name, dying)
embedder = search_index.Embedder(sys.argv[1])
search_index.Index(sys.argv[2]).update(Path(sys.argv[3]), embedder, captions=False, quiet=True)
"""


def many(folder: Path, count: int) -> Path:
    """A folder of `count` different images, and two problems."""
    folder.mkdir(parents=True)
    files = sorted(NAMES)
    for number in range(count):
        picture = Image.open(PICTURES / files[number % len(files)]).convert("RGBA").rotate(7 * (number // len(files)))
        picture.save(folder / f"{number:03}.png")
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no picture")
    return folder


def killed(trained, index, folder, name, number, delay) -> None:
    arguments = (trained, index.folder, folder, name, number, delay)
    done = run_fork(["-c", KILLED, *arguments], ROOT, PYTHONPATH=str(ROOT / "examples"))
    assert done.returncode == -9, (done.returncode, done.stderr[-2000:])


def same_rows(one: dict[str, dict], other: dict[str, dict]) -> None:
    """The rows of some paths are those of the same paths elsewhere; a vector nearly, as others were in its batch."""
    for path, row in one.items():
        for name, value in row.items():
            if name in COLUMNS.values() and value is not None:
                assert np.dot(value, other[path][name]) > 0.999
            else:
                assert value == other[path][name], (path, name)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name, number, delay",
    [("_made", 1, 0.0), ("commit", 2, 0.004), ("commit", 6, 0.012), ("drop", 1, 0.0)],
)
def test_killed_at_a_point(trained, embedder, tmp_path, name, number, delay):
    folder, index, whole = many(tmp_path / "pictures", 30), Index(tmp_path / "index"), Index(tmp_path / "whole")
    if name == "drop":
        shutil.copytree(folder, tmp_path / "elsewhere")
        update(index, folder, embedder)
        for file in list(folder.glob("00*.png")):
            file.rename(folder / f"moved-{file.name}")
    update(whole, folder, embedder)
    killed(trained, index, folder, name, number, delay)
    if index._open() is not None:
        left = rows(index)
        same_rows({path: row for path, row in left.items() if os.path.exists(path)}, rows(whole))
        assert len(left) >= {"_made": 0, "commit": 4 * (number - 1), "drop": 32}[name]
        if left:
            Searcher(index, embedder).search(words="panda", k=5)
    update(index, folder, embedder)
    assert rows(index).keys() == rows(whole).keys()
    same_rows(rows(index), rows(whole))


@pytest.mark.slow
def test_killed_at_random_moments(trained, embedder, tmp_path):
    """Again and again into one index, until a run comes through."""
    folder, index, whole = many(tmp_path / "pictures", 200), Index(tmp_path / "index"), Index(tmp_path / "whole")
    update(whole, folder, embedder)
    expected, chance, counts = rows(whole), random.Random(0), []
    for _ in range(20):
        name = chance.choice(["commit", "commit", "commit", "_made"])
        killed(trained, index, folder, name, chance.randint(1, 3) if name == "commit" else 1, chance.uniform(0, 0.03))
        found = rows(index) if index._open() is not None else {}
        same_rows(found, expected)
        counts.append(len(found))
    assert counts == sorted(counts) and counts[-1] > counts[0]
    update(index, folder, embedder)
    assert rows(index).keys() == expected.keys()
    same_rows(rows(index), expected)


# ----------------------------------------------------------------------------------------------------- command line


def test_the_commands(folder, trained, tmp_path, capsys):
    where = ["--index", tmp_path / "index"]
    model = ["--model", trained]
    (folder / "zero.png").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    printed = run("index", folder, *where, *model, "--no-captions", capsys=capsys)
    assert "6 embedded, 0 moved or touched, 0 unchanged, 0 dropped, 1 with problems" in printed
    assert "no images: 1 .txt" in printed
    assert run("problems", *where, capsys=capsys) == f"{folder / 'zero.png'}: an empty file\n"
    found = json.loads(run("query", "熊猫", *where, *model, "-k", 2, "--json", capsys=capsys))
    assert [os.path.basename(row["path"]) for row in found] == ["panda.png", found[1]["path"].split("/")[-1]]
    wanted = {each.name for each in dataclasses.fields(search_index.Result)} - {"thumbnail"}
    assert set(found[0]) == wanted
    options = ["--rerank", "--mode", "InternVL-G", "--labels", "rocket", "panda"]
    lines = run("query", "パンダの顔", *where, *model, *options, capsys=capsys).splitlines()
    assert len(lines) == 6 and "panda.png" in lines[0] and " match " in lines[0] and " panda " in lines[0]
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True) and all(" cosine " in line for line in lines)
    lines = run("query", "--picture", PICTURES / "pizza.png", *where, *model, "-k", 1, capsys=capsys).splitlines()
    assert len(lines) == 1 and lines[0].startswith("1.000") and "pizza.png" in lines[0]


def test_tiny_says_that_it_knows_no_photographs(folder, trained, tmp_path, capsys):
    """It stands for every image but the repository's own, and captions must be asked for there."""
    model = ["--model", str(trained)]
    for place, number, options, captions in (
        (folder, 1, [], False),
        (folder, 2, ["--captions"], True),
        (PICTURES, 3, [], True),
        (PICTURES, 4, ["--no-captions"], False),
    ):
        where = ["--index", str(tmp_path / str(number))]
        search.main(["index", str(place), *where, *model, *options])
        said = capsys.readouterr()
        search.main(["query", "panda", *where, *model, "-k", "1", "--json"])
        found = capsys.readouterr()
        assert bool(json.loads(found.out)[0]["caption"]) is captions, "JSON alone on stdout"
        for text in (said.err, found.err):
            assert (search_index.NOTE in text) is (place is folder)
        assert ("PICTURES=FOLDER MODEL=ORG/InternVL-14B make app" in said.err) is (place is folder)
        assert ("It writes no captions here; `--captions` changes that." in said.err) is (number == 1)


def test_only_the_default_model_is_tiny():
    def chosen(*options: str) -> tuple[str, str]:
        found = search.parsed(["query", "panda", *options])
        return found.model, found.subfolder

    assert chosen() == (str(ROOT), "tiny")
    assert chosen("--model", str(ROOT)) == (str(ROOT), ""), "a clone's root is the 14B, however its path is written"
    assert chosen("--model", "a", "--subfolder", "b") == ("a", "b")


def test_a_model_has_its_own_index_in_make_app():
    def commands(*options: str) -> list[str]:
        make = ["make", "-n", "app", "-o", ".venv-app/ready", "PICTURES=my images", *options]
        done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
        return [line.partition("search.py ")[2] for line in done.stdout.splitlines() if "search.py " in line]

    assert commands() == ['index  "my images"', "page "]
    where = '--model "/my models/ORG/Name" --index ".cache/search--my models-ORG-Name"'
    assert commands("MODEL=/my models/ORG/Name") == [f'index {where} "my images"', f"page {where}"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["query", "panda", "--index", "{tmp}/none"], "There is no index in"),
        (["problems", "--index", "{tmp}/none"], "There is no index in"),
        (["page", "--index", "{tmp}/none"], "There is no index in"),
        (["index", "{tmp}/nowhere"], "there is none of this name: .*nowhere"),
        (["index", "{tmp}", "--index", "{tmp}/i", "--model", "{tmp}"], "--model .* cannot be loaded"),
        (["query", "--index", "{indexed}", "--model", "{trained}"], "Ask with words or with an image"),
        (
            ["query", "--picture", "a.png", "--rerank", "--index", "{indexed}", "--model", "{tmp}"],
            "Re-ranking compares",
        ),
        (
            ["query", "a", "-k", "0", "--index", "{indexed}", "--model", "{trained}"],
            "number of results must be .* at least 1",
        ),
    ],
)
def test_wrong_arguments_end_in_a_message(arguments, said, tmp_path, indexed, trained):
    places = {"tmp": tmp_path, "indexed": indexed.folder, "trained": trained}
    with pytest.raises(SystemExit, match=said):
        search.main([argument.format(**places) for argument in arguments])


def test_an_interrupt_says_that_nothing_is_lost(monkeypatch, folder, trained, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Index, "update", interrupted)
    with pytest.raises(SystemExit, match="the same command goes on"):
        search.main(["index", str(folder), "--index", str(tmp_path / "index"), "--model", str(trained)])


# ------------------------------------------------------------------------------------------------- what is measured


@pytest.fixture(scope="module")
def benchmark():
    return importlib.import_module("benchmarks.search")


def test_the_page_has_the_table_that_was_measured(benchmark):
    measured = json.loads(benchmark.OUT.read_text("utf-8")) if benchmark.OUT.exists() else None
    assert pages.taken(ROOT / "docs" / "search.md", "search") == (benchmark.table(measured) if measured else "")


@pytest.mark.slow
def test_the_benchmark(benchmark, tmp_path):
    command = [sys.executable, "-m", "benchmarks.search", "--pictures", "100", "--out", tmp_path / "report.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["result"]["said"].startswith("100 embedded, 0 moved")
    assert "| 100 images |  |" in benchmark.table(report)


def test_what_the_page_needs_is_what_is_tested():
    wanted = (ROOT / "examples" / "search-requirements.txt").read_text("utf-8").splitlines()
    tested = (ROOT / "tests" / "requirements.txt").read_text("utf-8").splitlines()
    assert not [line for line in wanted if not line.startswith("#") and line not in tested]
