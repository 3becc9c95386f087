"""Embedding data sets on Ray: what is read, what is written, and that nothing is lost or done twice, whatever dies."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from conftest import LAST_RESORT, ROOT, load
from tools import pages

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_gcs_server_request_timeout_seconds", str(LAST_RESORT))  # Ray reads it while importing
ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

import decoding  # noqa: E402
import embed_costs  # noqa: E402
import embed_dataset  # noqa: E402
import embed_output  # noqa: E402
import embed_sources  # noqa: E402
import embed_stages  # noqa: E402
import fsspec  # noqa: E402
import psutil  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

PICTURES = ROOT / "examples" / "pictures"
ENTRIES = json.loads((PICTURES / "examples.json").read_text("utf-8"))
NODE = {"num_cpus": 2, "object_store_memory": 100_000_000, "include_dashboard": False}
IDS = pa.schema([("id", pa.string())])
SCRIPT = ROOT / "examples" / "embed_dataset.py"


def rows(count: int) -> list[dict]:
    entries = [ENTRIES[index % len(ENTRIES)] for index in range(count)]
    return [
        {"key": f"k{index}", "image": (PICTURES / entry["file"]).read_bytes(), "text": f"{entry['name']['ja']} {index}"}
        for index, entry in enumerate(entries)
    ]


def write_parquet(path: Path, entries: list[dict], row_group: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(entries), path, row_group_size=row_group)
    return path


def write_tar(path: Path, entries: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for entry in entries:
            for ending, data in (("png", entry["image"]), ("txt", entry["text"])):
                data = data.encode() if isinstance(data, str) else data
                if data is not None:
                    member = tarfile.TarInfo(f"{entry['key']}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, __import__("io").BytesIO(data))
    return path


def write_folder(path: Path, entries: list[dict]) -> Path:
    for entry in entries:
        place = path / "deep" / entry["key"]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.with_suffix(".png").write_bytes(entry["image"])
        place.with_suffix(".txt").write_text(entry["text"], "utf-8")
    return path


@pytest.fixture(autouse=True)
def threads():
    """`decode` and `Embed` set them for their process, here that of the tests."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def arguments(trained, tmp_path):
    def make(data: Path | str, **changes) -> list[str]:
        given = {
            "model": trained,
            "data": data,
            "output": tmp_path / "out",
            "batch_size": 4,
            "shard_rows": 10,
        } | changes
        command = []
        for name, value in given.items():
            values = [] if value is True else value if isinstance(value, list) else [value]
            command += [f"--{name.replace('_', '-')}", *map(str, values)]
        return command

    return make


@pytest.fixture
def options(arguments, trained):
    """As `run` completes them, without Ray."""

    def make(data: Path | str, **changes):
        found = embed_dataset.parse(arguments(data, **changes))
        found.where, found.gpus_per_model, found.dtype = {"subfolder": ""}, 0, "bfloat16"
        found.needs_queries = "caption" in found.embed or ("image" in found.embed and "InternVL-G" in found.mode)
        return found

    return make


def read_all(given) -> list[embed_sources.Row]:
    listing = embed_sources.list_input(given)
    given.kind = listing.source
    if listing.files is not None:
        place = Path(given.output.removeprefix("file://"))
        place.mkdir(exist_ok=True)
        pq.write_table(listing.files, place / "files.parquet", row_group_size=given.shard_rows)
    shards = listing.shards.to_pylist()
    return [embed_sources.fetch(row, given) for shard in shards for row in embed_sources.read_shard(shard, given)]


def without_ray(given) -> pa.Table:
    """What the same batches become in this process."""
    listing = embed_sources.list_input(given)
    given.kind, actor = listing.source, embed_stages.Embed(given)
    batches = [actor(batch) for shard in listing.shards.to_pylist() for batch in embed_stages.decode(shard, given)]
    return pa.concat_tables([pa.ipc.open_stream(each["table"]).read_all() for each in batches if each["table"]])


def written(folder: Path) -> pa.Table:
    paths = sorted((folder / "embeddings").glob("part-*.parquet"))
    return pa.concat_tables(
        [pq.read_table(path) for path in paths], promote_options="default"
    ).replace_schema_metadata()


def errors_in(folder: Path) -> dict[str, str]:
    paths = sorted((folder / "errors").glob("part-*.parquet"))
    return {row["id"]: row["reason"] for path in paths for row in pq.read_table(path).to_pylist()}


# --------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("shard_rows", [1, 6, 7, 10, 40])
def test_shards_of_parquet_have_every_row_once_in_its_place(options, tmp_path, shard_rows):
    entries = rows(25)
    write_parquet(tmp_path / "data" / "a.parquet", entries[:23])
    write_parquet(tmp_path / "data" / "b" / "c.parquet", entries[23:], row_group=100)
    given = options(tmp_path / "data", embed=["image", "text"], shard_rows=shard_rows, id_column="key")
    found = read_all(given)
    assert [row.id for row in found] == [entry["key"] for entry in entries]
    assert [(row.image, row.text) for row in found] == [(entry["image"], entry["text"]) for entry in entries]
    given.id_column = ""
    assert [row.id for row in read_all(given)][21:] == [
        "a.parquet:21",
        "a.parquet:22",
        "b/c.parquet:0",
        "b/c.parquet:1",
    ]
    assert all(
        shard["stop"] - shard["start"] <= shard_rows for shard in embed_sources.list_input(given).shards.to_pylist()
    )


def test_a_row_group_larger_than_what_is_read_at_once(options, tmp_path):
    """pyarrow gives batches of 64 rows; shards begin and end within them."""
    table = pa.table({"text": [f"text {index}" for index in range(300)]})
    pq.write_table(table, tmp_path / "texts.parquet")
    found = read_all(options(tmp_path / "texts.parquet", embed=["text"], shard_rows=70))
    assert [row.text for row in found] == table["text"].to_pylist()
    assert [row.id for row in found] == [f"texts.parquet:{index}" for index in range(300)]


@pytest.mark.parametrize("write", [write_tar, write_folder])
def test_tars_and_folders_give_the_same_rows(options, tmp_path, write):
    entries = rows(5)
    ending = ".tar" if write is write_tar else ""
    write(tmp_path / "data" / f"shard{ending}", entries)
    found = read_all(options(tmp_path / "data", embed=["image", "text"], shard_rows=2))
    ids = [entry["key"] if write is write_tar else f"shard/deep/{entry['key']}.png" for entry in entries]
    assert [(row.id, row.image, row.text) for row in found] == [
        (key, entry["image"], entry["text"]) for key, entry in zip(ids, entries)
    ]


def test_a_parquet_of_paths_and_one_of_datasets(options, tmp_path):
    (tmp_path / "near.png").write_bytes((PICTURES / "fox.png").read_bytes())
    panda = str(PICTURES / "panda.png")
    write_parquet(tmp_path / "paths.parquet", [{"image": each} for each in ("near.png", panda, "file://" + panda)])
    found = read_all(options(tmp_path / "paths.parquet"))
    assert [row.image for row in found] == [Path(each).read_bytes() for each in (tmp_path / "near.png", panda, panda)]
    image = {"bytes": Path(panda).read_bytes(), "path": None}
    write_parquet(tmp_path / "datasets.parquet", [{"image": image}, {"image": {"bytes": None, "path": panda}}])
    found = read_all(options(tmp_path / "datasets.parquet"))
    assert [row.image for row in found] == [Path(panda).read_bytes()] * 2


def test_a_tar_that_breaks_off_gives_what_is_there_and_one_error(options, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    whole = write_tar(tmp_path / "whole.tar", rows(6)).read_bytes()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cut.tar").write_bytes(whole[: len(whole) // 2])
    found = read_all(options(tmp_path / "data", embed=["image", "text"]))
    assert [row.id for row in found[:-1]] == [entry["key"] for entry in rows(6)][: len(found) - 1]
    assert 2 < len(found) < 6 and found[-1].id == "cut.tar" and "ReadError" in found[-1].error
    assert not any(row.error for row in found[:-1])


def test_damaged_pages_of_parquet_are_an_error_for_each_row(options, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    path = write_parquet(tmp_path / "damaged.parquet", rows(21))
    group = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    data[start : start + group.total_compressed_size] = b"\xff" * group.total_compressed_size
    path.write_bytes(data)
    found = read_all(options(path, shard_rows=100))
    assert len(found) == 21 and [bool(row.error) for row in found] == [False] * 7 + [True] * 14
    assert found[7].id == "damaged.parquet:7"


def test_reading_goes_on_where_it_broke_off(monkeypatch):
    """A connection that breaks after every third row: all rows once, in order."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    broken = []

    def read():
        for index in range(10):
            if index in (3, 6, 9) and index not in broken:
                broken.append(index)
                raise ConnectionResetError("gone")
            yield embed_sources.Row(str(index))

    found = list(embed_sources.persistently(read, str, 10))
    assert [row.id for row in found] == list(map(str, range(10))) and broken == [3, 6, 9]
    assert not any(row.error for row in found)


def test_a_file_that_lost_rows_has_errors_for_them():
    found = list(embed_sources.persistently(lambda: iter([embed_sources.Row("0")]), "file:{}".format, 3))
    assert [(row.id, bool(row.error)) for row in found] == [("0", False), ("file:1", True), ("file:2", True)]


def test_other_files_are_counted_and_kinds_are_not_mixed(options, tmp_path):
    write_folder(tmp_path / "data", rows(2))
    (tmp_path / "data" / "notes.md").write_text("")
    assert embed_sources.list_input(options(tmp_path / "data")).left_out == {".txt": 2, ".md": 1}
    assert embed_sources.list_input(options(tmp_path / "data", embed=["image", "text"])).left_out == {".md": 1}
    write_tar(tmp_path / "data" / "a.tar", rows(1))
    write_parquet(tmp_path / "data" / "a.parquet", rows(1))
    with pytest.raises(ValueError, match="`--source`.*parquet and webdataset"):
        embed_sources.list_input(options(tmp_path / "data"))


# ------------------------------------------------------------------------------------------------------ the errors


def test_errors_of_rows_say_what_is_wrong_and_leave_the_others_alone(options, tmp_path, trained):
    from transformers import AutoProcessor

    png = (PICTURES / "panda.png").read_bytes()
    cases = {
        "good": (png, "a panda"),
        "no image": (None, "x"),
        "cut": (png[:300], "x"),
        "no text": (png, None),
        "text": (png, " "),
        "ids": (png, "panda " * 100),
        "not an image in a known format": (b"GIF", "x"),
        "empty": (b"", "x"),
        "also good": (png, "熊猫"),
    }
    given = options("data", embed=["image", "text"])
    batch = [embed_sources.Row(key, *values) for key, values in cases.items()]
    processor = load(trained, AutoProcessor)
    found = embed_stages.inputs_of(batch, processor, given)
    assert found["ids"] == ["good", "also good"]
    reasons = {error["id"]: error["reason"] for error in json.loads(found["errors"])}
    assert set(reasons) == set(cases) - {"good", "also good"}
    assert all(key in reason for key, reason in reasons.items() if key != "cut") and "image" in reasons["cut"]
    given.truncate = True
    assert embed_stages.inputs_of(batch, processor, given)["ids"] == ["good", "ids", "also good"]


def test_narrow_and_huge_images_are_refused_before_they_are_decoded():
    import io

    from PIL import Image

    data = io.BytesIO()
    Image.new("L", (1, 51)).save(data, "PNG")
    with pytest.raises(ValueError, match="50 times"):
        decoding.decode(data.getvalue())


def test_values_that_are_not_finite_are_errors():
    values = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [70_000.0, 0.0]])
    columns = {"id": ["a", "b", "c"], "source": ["s"] * 3, "image_c": values, "caption_text": ["one", "two", ""]}
    table, bad = embed_stages.table_of(columns, torch.float16)
    assert table["id"].to_pylist() == ["a"] and {error["id"] for error in bad} == {"b", "c"}
    assert table.schema.field("image_c").type == pa.list_(pa.float16(), 2)
    table, bad = embed_stages.table_of(columns | {"image_c": values[:, 1:]}, torch.float32)
    assert [error["reason"] for error in bad] == ["caption: the model wrote nothing"] and len(table) == 2


# ------------------------------------------------------------------------------------------------------- embedding


@pytest.mark.parametrize("embed", [["image"], ["text"], ["image", "text", "caption"]], ids=" ".join)
@pytest.mark.parametrize("mode", [["InternVL-C"], ["InternVL-C", "InternVL-G"]], ids=" ".join)
def test_embeddings_are_those_of_the_model(options, tmp_path, trained, embed, mode):
    from transformers import AutoProcessor

    entries = rows(4)
    path = write_parquet(tmp_path / "a.parquet", entries)
    found = without_ray(options(path, embed=embed, mode=mode, embeddings="float32", max_new_tokens=8))
    model, processor = load(trained, dtype="auto").eval(), load(trained, AutoProcessor)
    pictures = [PICTURES / ENTRIES[index]["file"] for index in range(4)]
    pixels = processor(images=pictures).pixel_values
    expected = {}
    with torch.inference_mode():
        if "image" in embed:
            expected |= {f"image_{name[-1].lower()}": model.embed_image(pixels, name, normalize=False) for name in mode}
        if "text" in embed:
            expected["text"] = model.embed_text(**processor(text=[entry["text"] for entry in entries]), normalize=False)
        if "caption" in embed:
            ids = model.generate(pixels, **processor(text="English caption:", task="caption"), max_new_tokens=8)
            texts = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
            assert found["caption_text"].to_pylist() == texts and all(texts)
            expected["caption"] = model.embed_text(**processor(text=texts), normalize=False)
    assert set(found.column_names) == {"id", "source", *expected, *(["caption_text"] if "caption" in embed else [])}
    for name, values in expected.items():
        normalised = torch.tensor(found[name].to_pylist())
        torch.testing.assert_close(normalised, torch.nn.functional.normalize(values.float(), dim=-1))
        torch.testing.assert_close(normalised.norm(dim=-1), torch.ones(4))  # whatever the type of the weights


def test_the_waiting_is_measured(options, tmp_path, monkeypatch):
    """By a clock that only this test moves: 0.3 seconds without a batch, and 0.2 with each."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    path = write_parquet(tmp_path / "a.parquet", rows(8))
    given = options(path)
    given.kind, actor, tally = "parquet", embed_stages.Embed(given), embed_dataset.Tally()
    columns = actor.columns

    def working(inputs):
        now[0] += 0.2
        return columns(inputs)

    monkeypatch.setattr(actor, "columns", working)
    shard = embed_sources.list_input(given).shards.to_pylist()[0]
    for index, batch in enumerate(embed_stages.decode(shard, given)):
        now[0] += 0.3 * (index == 1)
        tally.add(actor(batch))
    assert (tally.waited, tally.worked, tally.rows) == (pytest.approx(0.3), pytest.approx(0.2), 8)
    assert tally.model_waits == tally.waited / (tally.waited + tally.worked)


# --------------------------------------------------------------------------------------------------------- writing


def batch(shard: int, chunk: int, count: int, errors: int = 0) -> dict:
    table = pa.table({"id": [f"{shard}.{chunk}.{index}" for index in range(count - errors)]})
    bad = [{"id": f"bad {shard}.{chunk}.{index}", "source": "s", "reason": "r"} for index in range(errors)]
    return {
        "shard": shard, "chunk": chunk, "rows": count, "errors": json.dumps(bad),
        "table": embed_stages.as_bytes(table) if count else b"",
    }  # fmt: skip


def test_batches_in_any_order_become_parts_in_order(tmp_path):
    output = embed_output.Output(f"file://{tmp_path}", {})
    writer = embed_output.Writer(output, IDS)
    order = [(1, 2, 0), (0, 1, 4), (1, 0, 4), (0, 0, 4), (1, 1, 3), (2, 0, 0), (0, 2, 0)]
    for index, (shard, chunk, count) in enumerate(order):
        writer.add(batch(shard, chunk, count, errors=1 if count == 3 else 0))
        assert len(writer.open) == [1, 2, 2, 2, 1, 1, 0][index]
    writer.finish()
    assert writer.written == 3 and output.parts("embeddings") == {0, 1, 2} and output.parts("errors") == {1}
    assert written(tmp_path)["id"].to_pylist() == [
        *(f"0.{chunk}.{row}" for chunk in (0, 1) for row in range(4)),
        *(f"1.0.{row}" for row in range(4)),
        "1.1.0",
        "1.1.1",
    ]
    shards = [{"shard": shard, "start": 0, "stop": stop} for shard, stop in ((0, 8), (1, 7), (2, None))]
    assert embed_output.check_counts(shards, output) == {"rows": 15, "embedded": 14, "errors": 1}
    with pytest.raises(RuntimeError, match="shard 1 of 9 rows"):
        embed_output.check_counts([shards[0], shards[1] | {"stop": 9}, shards[2]], output)
    (tmp_path / "errors" / "part-00000001.parquet").unlink()
    with pytest.raises(RuntimeError, match="shard 1"):
        embed_output.check_counts(shards, output)
    with pytest.raises(RuntimeError, match="4 parts"):
        embed_output.check_counts([*shards, {"shard": 3, "start": 0, "stop": 1}], output)


def test_a_part_that_could_not_be_written_is_not_there(tmp_path, monkeypatch):
    output = embed_output.Output(f"file://{tmp_path}", {})
    embed_output.write_part(output, IDS, 0, [batch(0, 0, 3, errors=1)])
    assert output.parts("errors") == {0}
    embed_output.write_part(output, IDS, 0, [batch(0, 0, 3)])  # the same shard again, now without errors
    assert output.parts("errors") == set()

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        embed_output.write_part(output, IDS, 1, [batch(1, 0, 3)])
    assert output.parts("embeddings") == {0}
    assert len(pq.read_table(tmp_path / "embeddings")) == 3  # what is half written is left out by readers
    assert len(list((tmp_path / "embeddings").iterdir())) == 2
    output.remove_leftovers()
    assert len(list((tmp_path / "embeddings").iterdir())) == 1


def test_a_part_of_errors_alone_has_the_columns_of_the_others(options, tmp_path):
    given = options("data", embed=["image", "text", "caption"], mode=["InternVL-C", "InternVL-G"])
    given.width = 3
    output, schema = embed_output.Output(f"file://{tmp_path}", {}), embed_stages.schema_of(given)
    embed_output.write_part(output, schema, 0, [batch(0, 0, 2, errors=2) | {"table": b""}])
    found = pq.read_table(tmp_path / "embeddings")
    assert found.column_names == ["id", "source", "image_c", "image_g", "caption", "caption_text", "text"]
    assert len(found) == 0 and found.schema.field("image_g").type == pa.list_(pa.float16(), 3)


def test_a_part_goes_to_an_object_store_in_one_piece():
    fsspec.filesystem("memory").store.clear()
    output = embed_output.Output("memory://bucket/out", {})
    embed_output.write_part(output, IDS, 5, [batch(5, 0, 3, errors=1)])
    assert output.parts("embeddings") == output.parts("errors") == {5}
    assert output.footer("embeddings/part-00000005.parquet") == (2, {"rows": 3, "errors": 1})
    output.remove_leftovers()


# ---------------------------------------------------------------------------------------------------- the arguments


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 0}, "`--batch-size` must be at least 1, got 0"),
        ({"gpus_per_model": -1}, "`--gpus-per-model` must be at least 0"),
        ({"stall_minutes": "nan"}, "`--stall-minutes` must be a positive number"),
        ({"price_per_hour": 3}, "`--price-per-hour` needs `--dry-run`"),
        ({"dry_run": True, "h100": True}, "`--h100` needs an assumption"),
        ({"dry_run": True, "h100": True, "mfu": 40}, "`--mfu` of at most 1, got 40"),
        ({"dry_run": True, "h100": True, "mfu": 0.4, "measured": "x"}, "give one of them"),
        ({"dry_run": True, "measured": "x"}, "`--measured` needs `--h100`"),
        ({"data": "nowhere"}, "`--data` must be a file, a folder or a pattern"),
        ({"model": ROOT, "revision": "main"}, "`--revision` is for an id"),
        ({"source": "webdataset"}, "`--data` must hold .tar"),
        ({"output": PICTURES / "out"}, "`--output` must lie outside of `--data`"),
        ({"object_store_gb": 1, "address": "auto"}, "`--object-store-gb` is for this machine's"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named_and_no_traceback_is_shown(arguments, changes, message):
    with pytest.raises(SystemExit) as stop:
        embed_dataset.main(arguments(changes.pop("data", PICTURES), **changes))
    assert message in str(stop.value)


@pytest.mark.parametrize(
    "option, column", [("image", "picture"), ("image", "number"), ("text", "image"), ("id", "image")]
)
def test_columns_that_do_not_fit_are_refused(options, tmp_path, option, column):
    path = write_parquet(tmp_path / "a.parquet", [entry | {"number": 3} for entry in rows(1)])
    with pytest.raises(ValueError, match=f"`--{option}-column`.*'{column}'"):
        embed_sources.list_input(options(path, embed=["image", "text"], **{f"{option}_column": column}))


@pytest.mark.slow
def test_code_reaches_machines_that_do_not_have_it(tmp_path):
    """Unpickled in a process that cannot import this folder."""
    for module in (decoding, embed_sources, embed_stages, embed_dataset):
        ray.cloudpickle.register_pickle_by_value(module)
    code = [embed_stages.decode, embed_stages.Embed, embed_dataset.Watch]
    (tmp_path / "code").write_bytes(ray.cloudpickle.dumps(code))
    code = "import pickle, sys; print([each.__name__ for each in pickle.load(open(sys.argv[1], 'rb'))])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "code"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "['decode', 'Embed', 'Watch']", done.stderr[-2000:]


# ------------------------------------------------------------------------------------------------ places for models


def machines(monkeypatch, *there: tuple[int, int]) -> None:
    """A cluster of machines with so many GPUs and CPUs, and one that is gone."""
    nodes = [{"Alive": True, "Resources": {"GPU": float(gpus), "CPU": float(cpus)}} for gpus, cpus in there]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"GPU": 8.0, "CPU": 64.0}}])


@pytest.mark.parametrize(
    "there, changes, placed",
    [
        ([(0, 2)], {}, (0, 1, 1)),
        ([(8, 64), (8, 64)], {}, (1, 16, 112)),
        ([(8, 64), (8, 64)], {"gpus_per_model": 3}, (3, 4, 124)),  # no model lies on two machines
        ([(8, 64)], {"gpus_per_model": 2, "models": 3, "decoders": 10}, (2, 3, 10)),
        ([(0, 16)], {"cpus_per_model": 4, "models": 3}, (0, 3, 4)),
    ],
)
def test_models_have_their_places(options, monkeypatch, there, changes, placed):
    given = options("data", **changes)
    given.gpus_per_model = changes.get("gpus_per_model")
    machines(monkeypatch, *there)
    embed_dataset.place_models(given)
    assert (given.gpus_per_model, given.pool, given.tasks) == placed


def test_models_without_a_place_are_refused_and_later_as_many_as_are_left(options, monkeypatch):
    given = options("data", models=2)
    machines(monkeypatch, (0, 2))
    with pytest.raises(ValueError, match="`--models` must fit into the cluster of 1 machines with 0 GPUs and 2 CPUs"):
        embed_dataset.place_models(given)
    machines(monkeypatch, (0, 2), (0, 2))
    embed_dataset.place_models(given)
    assert given.pool == 2
    machines(monkeypatch, (0, 2))
    embed_dataset.place_models(given, is_first=False)
    assert given.pool == 1


def test_a_stall_begins_with_the_first_batch_or_a_lost_place(options, monkeypatch):
    given, now = options("data", models=2, stall_minutes=1), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    machines(monkeypatch, (0, 2), (0, 2))
    embed_dataset.place_models(given)

    def step(watch, seconds):
        now[0] += seconds
        watch.on_execution_step(None)

    watch = embed_dataset.Watch(given)
    step(watch, 10_000)  # a model that takes long to load
    watch.batch()
    step(watch, 59)
    watch.batch()
    step(watch, 59)
    with pytest.raises(embed_dataset.Stalled, match="--stall-minutes"):
        step(watch, 2)
    watch = embed_dataset.Watch(given)
    machines(monkeypatch, (0, 2))
    step(watch, 10)
    step(watch, 59)
    with pytest.raises(embed_dataset.Stalled):
        step(watch, 2)


def batch_of(rows: int, errors: int = 0) -> dict:
    return {"rows": rows, "errors": json.dumps([{}] * errors), "waited": None}


@pytest.mark.parametrize(("total", "known"), [(200, "0% {}/200"), (None, "{} rows")], ids=["known", "unknown"])
def test_progress_is_lines_in_a_log_file(monkeypatch, capsys, total, known):
    """Of a resumed run, in which 100 rows were done before."""
    monkeypatch.setattr(embed_dataset, "SECONDS_BETWEEN_LINES", 0)
    tally, batches = embed_dataset.Tally(), [batch_of(40), batch_of(40, errors=3), batch_of(20)]
    assert list(embed_dataset.with_progress(iter(batches), tally, 100, total)) == batches
    found = capsys.readouterr()
    lines = found.out.splitlines()
    for line, rows in zip((lines[0], lines[1], lines[-1]), (140, 180, 200), strict=True):
        assert known.format(rows) in line and "\r" not in line
    assert "errors 0" in lines[0] and "errors 3" in lines[1] and "rows/s" in lines[1] and not found.err
    assert (tally.rows, tally.errors) == (100, 3)


def test_lines_of_progress_keep_their_distance(capsys):
    list(embed_dataset.with_progress(iter([batch_of(1)] * 1000), embed_dataset.Tally(), 0, 1000))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "1/1000" in lines[0] and "100% 1000/1000" in lines[1]


def test_progress_ends_its_line_before_an_error_is_reported(monkeypatch, capsys):
    def breaks():
        yield batch_of(3)
        raise embed_dataset.Stalled("no batch")

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with pytest.raises(embed_dataset.Stalled):
        list(embed_dataset.with_progress(breaks(), embed_dataset.Tally(), 0, 10))
    shown = capsys.readouterr().err
    assert "3/10" in shown and "\r" in shown and shown.endswith("\n")


# -------------------------------------------------------------------------------------------------------- the costs


def test_flops_are_those_that_the_shapes_say():
    """Twice the weights times the tokens, and the two products of attention; heads are less than 1 %."""
    layers, width, inner, tokens = 48, 3200, 12_800, 257
    expected = layers * (2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width)
    assert embed_costs.image_flops(["InternVL-C"]) == pytest.approx(expected, rel=0.01)
    width, inner, queries = 4096, 11_008, 96
    more = 32 * (2 * queries * (4 * width**2 + 3 * width * inner) + 4 * queries**2 * width)
    with_queries = embed_costs.image_flops(["InternVL-C", "InternVL-G"])
    assert expected + more < with_queries < 1.3 * (expected + more)  # and cross-attention to the image


def test_the_estimate_is_the_slower_of_models_and_decoders(options):
    given = options("data", dry_run=True, price_per_hour=2, h100=True, mfu=0.5, price_per_gpu_hour=3)
    given.tasks = 6
    given.pool = 2
    shards = [{"start": 0, "stop": 36_000, "bytes": 1}, {"start": 0, "stop": 36_000, "bytes": 1}]
    one = {"shard": 0, "rows": 10, "embedded": 9, "decoded": 0.5, "worked": 1.0, "table": b"x" * 50, "end": 0}
    one["errors"] = json.dumps([{"id": "a", "reason": "no text"}])
    batches = [one | {"waited": None, "worked": 100.0}, one | {"waited": 0.1}, one | {"waited": 0.1}]
    found = embed_costs.estimate(shards, batches, given)
    assert (found["model_rate"], found["decode_rate"], found["decoders"], found["errors"]) == (10, 20, 6, 3)
    assert (found["rate"], found["rows"], found["hours"], found["output_bytes"]) == (20, 72_000, 1, 360_000)
    text = "\n".join(embed_costs.lines(found, given))
    assert "3 times: no text" in text and "larger" not in text
    assert "1.00 hours x 2 an hour = 2.00" in text and "which the models allow" in text
    rate = 989e12 * 0.5 / embed_costs.image_flops(["InternVL-C"])
    assert f"= {rate:.0f} images/s on a GPU" in text and f"{1e9 / rate / 3600:,.0f} GPU-hours" in text
    given.tasks = 1
    slower = embed_costs.estimate(shards, [each | {"decoded": 1.0} for each in batches], given)
    assert slower["rate"] == 10 and "decoders allow" in "\n".join(embed_costs.lines(slower, given))


def gpu_results(**machine):
    rows = [
        {"work": "InternVL-C", "batch": 1, "way": "eager", "a second": 50.0},
        {"work": "InternVL-C", "batch": 64, "way": "compile_layers", "a second": 200.0},
        {"work": "InternVL-C", "batch": 64, "way": "transformers", "a second": 900.0},
        {"work": "InternVL-C", "batch": 256, "way": "eager", "failed": "OutOfMemoryError"},
        {"work": "InternVL-G", "batch": 64, "way": "eager", "a second": 100.0},
    ]
    described = {"device": "NVIDIA H200", "tiny": False, "simulated": False, **machine}
    return {"machine": described, "steps": {"images": {"rows": rows}}}


def test_measured_images_take_the_place_of_the_assumption(options, tmp_path):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(gpu_results()))
    dry = {"dry_run": True, "h100": True, "measured": file}
    text = "\n".join(embed_costs.h100_lines(10, options("data", **dry, price_per_gpu_hour=3)))
    assert "on NVIDIA H200s" in text and "  200 images/s on a GPU" in text and "data sheet" not in text
    assert f"{1e9 / 200 / 3600:,.0f} GPU-hours" in text and "20.0 CPUs like these" in text and "cost: 1,389" in text
    both = embed_costs.h100_lines(10, options("data", **dry, mode=["InternVL-C", "InternVL-G"]))
    assert "  100 images/s on a GPU" in both[1]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        ("[]", "must be a file of `python -m benchmarks.gpu`"),
        (json.dumps(gpu_results(tiny=True)), "no images of InternVL-C at full size"),
        (json.dumps(gpu_results(simulated=True)), "no images of InternVL-C at full size"),
    ],
)
def test_measured_takes_only_what_was_measured(options, tmp_path, content, problem):
    file = tmp_path / "gpu.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=problem):
        options("data", dry_run=True, h100=True, measured=file)


def test_of_errors_alone_nothing_is_estimated(options):
    given = options("data", dry_run=True)
    shards = [{"start": 0, "stop": 2, "bytes": 1}]
    errors = json.dumps([{"id": "a", "reason": "no text"}, {"id": "b", "reason": "no text"}])
    batch = {"shard": 0, "rows": 2, "embedded": 0, "errors": errors}
    with pytest.raises(ValueError, match="Nothing in the sample of 2 rows can be embedded: 2 times: no text"):
        embed_costs.estimate(shards, [batch], given)


def test_the_version_of_a_folder_is_that_of_the_models_own_files(options, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "model")
    given = options("data")
    given.model, given.subfolder, given.revision = str(folder), "", None
    before = embed_output.model_version(given)
    (folder / "my_script.py").write_text("1")
    assert embed_output.model_version(given) == before
    for name in ("modeling_internvl.py", "images_internvl.py", "modeling_qllama.py", "configuration_intern_vit.py"):
        (folder / name).write_text("1")
        assert embed_output.model_version(given) != before
        before = embed_output.model_version(given)


def test_rows_of_tars_are_estimated_from_how_far_was_read(options, tmp_path):
    path = write_tar(tmp_path / "a.tar", rows(20) * 3)
    given = options(path)
    shards = embed_sources.list_input(given).shards.to_pylist()
    given.kind = "webdataset"
    batches = list(embed_stages.decode(shards[0] | {"limit": 20}, given))
    assert embed_costs.total_rows(shards, batches) == (pytest.approx(60, abs=3), False)


def test_what_the_page_says_is_what_was_measured():
    benchmark = importlib.import_module("benchmarks.embed_dataset")
    report = json.loads(benchmark.MEASURED.read_text("utf-8"))
    assert pages.taken(ROOT / "docs" / "embedding.md", "embed") == benchmark.summary(report)
    assert report["h100s"] == benchmark.on_h100s()
    few, *_, many = report["results"]
    assert few["errors"] == many["errors"] == 0 and many["rows"] == 10 * few["rows"]
    assert many["peak_together_mb"] < 1.2 * few["peak_together_mb"]
    assert all(run["model_waits"] < 0.1 for run in report["results"])


# ------------------------------------------------------------------------------------------------------------- Ray


class PatientCluster(Cluster):
    """Gives a node on a busy machine more than 30 seconds to start."""

    def _wait_for_node(self, node, timeout: float = LAST_RESORT) -> None:
        super()._wait_for_node(node, timeout)


@pytest.fixture(scope="module")
def cluster():
    found = PatientCluster(initialize_head=True, head_node_args=NODE)
    yield found.address
    found.shutdown()


def start(command: list[str], log: Path) -> subprocess.Popen:
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, SCRIPT, *command], stdout=file, stderr=file, cwd=log.parent)


def wait_for_parts(folder: Path, count: int, process: subprocess.Popen) -> int:
    """Until there are some, and never until all: the process must be at work."""
    end = time.monotonic() + LAST_RESORT
    while time.monotonic() < end and process.poll() is None:
        found = len(list((folder / "embeddings").glob("part-*"))) if (folder / "embeddings").exists() else 0
        if found >= count:
            return found
        time.sleep(0.01)
    raise AssertionError(f"ended with {process.poll()} before {count} parts were there")


@pytest.mark.heavy
@pytest.mark.parametrize("is_joined", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["cluster", "alone"])
def test_a_killed_driver_goes_on_without_gaps_or_duplicates(arguments, options, cluster, tmp_path, is_joined, capsys):
    """Of tars with some bad rows, which are accounted for."""
    entries = rows(240)
    entries[3]["image"] = entries[3]["image"][:500]
    entries[7]["text"] = None
    entries[239]["text"] = "long " * 100
    for start_row in range(0, 240, 10):
        write_tar(tmp_path / "data" / f"{start_row:03}.tar", entries[start_row : start_row + 10])
    given = {"embed": ["image", "text", "caption"], "mode": ["InternVL-C", "InternVL-G"], "max_new_tokens": 8}
    where = {"address": cluster} if is_joined else {"object_store_gb": 0.1}
    process = start(arguments(tmp_path / "data", **given, **where), tmp_path / "log")
    wait_for_parts(tmp_path / "out", 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {each: each.stat().st_mtime_ns for each in (tmp_path / "out" / "embeddings").glob("part-*")}
    assert 3 <= len(before) < 24
    log = (tmp_path / "log").read_text()
    assert log.index("listing of the input") < log.index("Starting 1 actor on the CPU") < log.index("rows/s")
    assert "\r" not in log and "MapWorker" not in log  # Ray warns of its own actors

    manifest = embed_dataset.main(arguments(tmp_path / "data", address=cluster, **given))
    assert manifest["result"] == {"rows": 240, "embedded": 237, "errors": 3}
    assert manifest["runs"][1]["rows"] == 240 - 10 * len(before) and 0 < manifest["runs"][1]["model_waits"] < 1
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert "240 rows = 237 embedded + 3 errors" in capsys.readouterr().out
    assert {each: each.stat().st_mtime_ns for each in before} == before
    reasons = errors_in(tmp_path / "out")
    assert set(reasons) == {"k3", "k7", "k239"} and reasons["k7"] == "no text"
    table = written(tmp_path / "out")
    assert table["id"].to_pylist() == [entry["key"] for entry in entries if entry["key"] not in reasons]
    assert table.equals(without_ray(options(tmp_path / "data", **given)))
    assert not list((tmp_path / "out").rglob(".*.tmp"))

    again = embed_dataset.main(arguments(tmp_path / "data", address=cluster, **given))
    assert again["result"] == manifest["result"] and again["runs"][2]["rows"] == 0
    with pytest.raises(SystemExit, match="other settings.*batch_size: 4, now 8; prompt: 'English caption:', now 'x'"):
        other = {"batch_size": 8, "prompt": "x"}
        embed_dataset.main(arguments(tmp_path / "data", address=cluster, **given | other))


@pytest.mark.slow
def test_the_command_of_the_page(tmp_path):
    """The first one, but for the place of the output."""
    page = (ROOT / "docs" / "embedding.md").read_text("utf-8")
    line = next(line for line in page.splitlines() if line.startswith("python examples/embed_dataset.py"))
    command = line.replace("--output out", f"--output {tmp_path}").split()
    assert str(tmp_path) in command
    subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True, timeout=LAST_RESORT)
    assert len(pq.read_table(tmp_path / "embeddings")) == len(ENTRIES)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["MapWorker(Map(Embed)", "FlatMap(decode)"])
def test_a_killed_worker_is_replaced(arguments, options, tmp_path, victim):
    path = write_parquet(tmp_path / "data.parquet", rows(400))
    given = {"id_column": "key", "embed": ["image", "caption"], "num_beams": 3}
    process = start(arguments(path, object_store_gb=0.1, **given), tmp_path / "log")
    wait_for_parts(tmp_path / "out", 3, process)
    killed = 0
    while not killed:
        for child in psutil.Process(process.pid).children(recursive=True):
            if child.is_running() and victim in " ".join(child.cmdline()):
                child.kill()
                killed += 1
    assert process.wait(timeout=LAST_RESORT) == 0, (tmp_path / "log").read_text()[-3000:]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["result"]["embedded"] == 400
    assert written(tmp_path / "out").equals(without_ray(options(path, **given)))


@pytest.mark.slow
@pytest.mark.parametrize("head_cpus", [3, 2], ids=["room for both models", "room for one model"])
def test_a_lost_node(arguments, options, tmp_path, head_cpus):
    """With two CPUs the place of the second model is gone for good: Ray waits for it, and the run is placed anew."""
    path = write_parquet(tmp_path / "data.parquet", rows(600))
    given = {"id_column": "key", "embed": ["image", "caption"], "num_beams": 3}
    nodes = PatientCluster(initialize_head=True, head_node_args=NODE | {"num_cpus": head_cpus})
    try:
        node = nodes.add_node(num_cpus=2, object_store_memory=100_000_000)
        more = {"models": 2, "address": nodes.address, "stall_minutes": 3}
        process = start(arguments(path, **given, **more), tmp_path / "log")
        wait_for_parts(tmp_path / "out", 10, process)
        nodes.remove_node(node, allow_graceful=False)
        assert process.wait(timeout=LAST_RESORT) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        nodes.shutdown()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["result"]["embedded"] == 600
    assert written(tmp_path / "out").equals(without_ray(options(path, **given)))


@pytest.mark.slow
def test_an_interrupt_ends_cleanly_and_the_run_goes_on(arguments, tmp_path):
    path = write_parquet(tmp_path / "data.parquet", rows(400))
    given = {"embed": ["image", "caption"], "object_store_gb": 0.1}
    process = start(arguments(path, **given), tmp_path / "log")
    wait_for_parts(tmp_path / "out", 3, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=LAST_RESORT) == 130
    log = (tmp_path / "log").read_text()
    assert "Interrupted. The same command goes on" in log and "Traceback" not in log
    process = start(arguments(path, **given), tmp_path / "log")
    assert process.wait(timeout=LAST_RESORT) == 0
    assert Counter(written(tmp_path / "out")["id"].to_pylist()) == Counter(f"data.parquet:{row}" for row in range(400))


@pytest.mark.slow
def test_a_folder_on_a_web_server(arguments, options, cluster, tmp_path):
    pytest.importorskip("aiohttp")
    write_folder(tmp_path / "data", rows(12))
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", tmp_path / "data"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        port = server.stdout.readline().split()[5].decode()
        given = {"embed": ["image", "text"]}
        manifest = embed_dataset.main(arguments(f"http://127.0.0.1:{port}/", address=cluster, **given))
    finally:
        server.kill()
    assert manifest["result"] == {"rows": 12, "embedded": 12, "errors": 0}
    shutil.rmtree(tmp_path / "out" / "errors", ignore_errors=True)
    assert sorted(written(tmp_path / "out")["id"].to_pylist()) == sorted(f"deep/k{row}.png" for row in range(12))


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_parquet, write_folder])
def test_a_dry_run_writes_nothing(arguments, cluster, tmp_path, capsys, write):
    data = write(tmp_path / "data", rows(200))
    more = {"address": cluster, "sample_rows": 40, "price_per_hour": 1.5, "h100": True, "mfu": 0.4}
    source = "parquet" if write is write_parquet else "folder"
    if source == "parquet":
        data = data.rename(tmp_path / "data.parquet")
    found = embed_dataset.main(arguments(data, dry_run=True, source=source, **more))
    assert found["rows"] == 200 and found["sample"] == 40 and found["errors"] == 0 and not (tmp_path / "out").exists()
    text = capsys.readouterr().out
    assert "cost:" in text and "GPU-hours" in text
