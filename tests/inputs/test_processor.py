"""InternVLProcessor: images of every kind, the text recipe of each task, misuse, saving."""

import json
import shutil
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from conftest import ROOT, STUB_CONFIG, repo_class, run_python

InternVLTokenizer = repo_class("tokenization_internvl.InternVLTokenizer")
InternVLProcessor = repo_class("processing_internvl.InternVLProcessor")
CLIPImageProcessorPil = sys.modules[InternVLProcessor.__module__].CLIPImageProcessorPil
TINY = ROOT / "tiny"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
MODES = "1 L P RGB RGBA CMYK YCbCr HSV I F LA PA RGBX RGBa La I;16 I;16L I;16B I;16N".split()


@pytest.fixture(scope="module")
def processor():
    return InternVLProcessor(CLIPImageProcessorPil.from_pretrained(TINY), InternVLTokenizer(TINY / "tokenizer.model"))


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).integers(0, 256, (70, 101, 3), dtype=np.uint8)  # [H, W, C]


def ids_of(processor, text, eos=True):
    return [1, *processor.tokenizer.sp_model.encode(text)] + [2] * eos


def normalised(grey):
    return (torch.tensor([grey] * 3) / 255 - MEAN) / STD


def grey_image(mode):
    """A 50 x 60 image of `mode`, all grey 128; white for the mode without grey."""
    grey = Image.new("L", (50, 60), 128)
    if mode.startswith("I;16"):
        values = np.full(3000, 128 * 257, ">u2" if mode.endswith("B") else "<u2")
        return Image.frombytes(mode, grey.size, values.tobytes())
    if mode == "1":
        return Image.new("1", grey.size, 1)
    if mode in ("P", "PA"):
        image = Image.new("P", grey.size, 0)
        image.putpalette([128, 128, 128, 0, 0, 0])
        return image.convert(mode)
    by_way_of = {"La": "LA", "RGBa": "RGBA"}.get(mode, "L" if mode in ("L", "LA", "I", "F") else "RGB")
    return grey.convert(by_way_of).convert(mode)


def assert_grey(pixel_values, grey, within=0.0):
    """Check that every pixel is `grey` out of 255, up to `within` grey levels."""
    levels = (pixel_values[0].permute(1, 2, 0) * STD + MEAN) * 255
    assert (levels - grey).abs().max() <= within + 1e-3


# Images


def test_shape_type_and_values(processor):
    pixel_values = processor(Image.new("RGB", (60, 90), (10, 10, 10)))["pixel_values"]
    assert pixel_values.shape == (1, 3, 48, 48) and pixel_values.dtype == torch.float32
    torch.testing.assert_close(pixel_values[0, :, 5, 7], normalised(10), rtol=0, atol=1e-5)


def test_equals_pil_bicubic_and_centre_crop(processor, noise):
    resized = Image.fromarray(noise).resize((int(48 * 101 / 70), 48), Image.Resampling.BICUBIC)
    left = (resized.width - 48) // 2
    expected = torch.tensor(np.array(resized)[:, left : left + 48]).float() / 255
    pixels = processor(noise)["pixel_values"][0].permute(1, 2, 0)
    torch.testing.assert_close(pixels, (expected - MEAN) / STD, rtol=0, atol=1e-5)


def test_squash_keeps_the_edges_that_centre_cropping_drops(processor):
    image = Image.new("RGB", (300, 60), "black")
    ImageDraw.Draw(image).rectangle((0, 0, 60, 60), fill="white")
    assert_grey(processor(image)["pixel_values"], 0)
    squashed = processor(image, crop="squash")["pixel_values"]
    assert squashed.shape == (1, 3, 48, 48)
    expected = np.array(image.resize((48, 48), Image.Resampling.BICUBIC))
    levels = (squashed[0].permute(1, 2, 0) * STD + MEAN) * 255
    assert np.abs(levels.numpy() - expected).max() < 1e-2 and expected.max() == 255


@pytest.mark.parametrize("mode", MODES)
def test_every_pil_mode_keeps_mid_grey(processor, mode):
    image = grey_image(mode)
    assert image.mode == mode
    assert_grey(processor(image)["pixel_values"], 255 if mode == "1" else 128, within=1)


def test_lab_is_converted(processor):
    pytest.importorskip("PIL.ImageCms")
    white = Image.frombytes("LAB", (50, 60), bytes((255, 0, 0)) * 3000)
    assert_grey(processor(white)["pixel_values"], 255, within=3)


def test_transparent_pixels_become_white(processor, tmp_path):
    assert_grey(processor(Image.new("RGBA", (50, 60), (0, 0, 0, 0)))["pixel_values"], 255)
    assert_grey(processor(Image.new("LA", (50, 60), (0, 0)))["pixel_values"], 255)
    assert_grey(processor(Image.new("RGBA", (50, 60), (0, 0, 0, 128)))["pixel_values"], 127, within=1)
    palette = Image.new("P", (50, 60), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "p.png", transparency=0)
    assert_grey(processor(tmp_path / "p.png")["pixel_values"], 255)
    keyed = Image.new("RGB", (50, 60), "black")
    keyed.info["transparency"] = (0, 0, 0)
    assert_grey(processor(keyed)["pixel_values"], 255)


def test_exif_orientation_is_applied(processor, tmp_path):
    image = Image.new("RGB", (60, 60), "black")
    ImageDraw.Draw(image).rectangle((0, 0, 60, 29), fill="white")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    upright = processor(image.rotate(180))["pixel_values"]
    for turned in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert torch.equal(processor(turned)["pixel_values"], upright)
    assert not torch.equal(processor(image)["pixel_values"], upright)


def test_arrays_tensors_and_paths_give_the_same_pixels(processor, noise, tmp_path):
    Image.fromarray(noise).save(tmp_path / "noise.png")
    expected = processor(Image.fromarray(noise))["pixel_values"]
    chw = noise.transpose(2, 0, 1)
    same = [noise, chw, noise / 255, noise.astype(np.int64), torch.tensor(chw) / 255, torch.tensor(noise)]
    same += [torch.tensor(chw, dtype=torch.float64) / 255, tmp_path / "noise.png", str(tmp_path / "noise.png")]
    for image in same:
        assert torch.equal(processor(image)["pixel_values"], expected)
    batch = processor(np.stack([noise, noise]))["pixel_values"]
    assert torch.equal(batch, expected.repeat(2, 1, 1, 1))
    assert torch.equal(processor([[Image.fromarray(noise)], [noise]])["pixel_values"], batch)


def test_grey_and_alpha_arrays(processor):
    assert_grey(processor(np.full((50, 60), 200, np.uint8))["pixel_values"], 200)
    assert_grey(processor(np.full((1, 50, 60), 200, np.uint8))["pixel_values"], 200)
    assert_grey(processor(np.zeros((50, 60, 4), np.uint8))["pixel_values"], 255)
    assert_grey(processor(torch.full((3, 50, 60), 0.5, dtype=torch.bfloat16))["pixel_values"], 128)


def test_ambiguous_layout_follows_the_library_of_the_image(processor):
    values = np.zeros((3, 50, 3), np.uint8)
    values[0] = 255  # CHW: the red plane; HWC: the top row
    assert processor(torch.tensor(values))["pixel_values"][0, 0].min() > 2
    assert processor(values)["pixel_values"][0, 0].min() < 0
    assert torch.equal(processor(Image.fromarray(values))["pixel_values"], processor(values)["pixel_values"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.5])
def test_bad_float_pixels_are_refused(processor, value):
    image = np.zeros((50, 60, 3), np.float32)
    image[3, 4, 1] = value
    for bad in (image, torch.tensor(image)):
        with pytest.raises(ValueError, match=r"images\[1\]"):
            processor([Image.new("RGB", (5, 5)), bad])


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (0, 5)),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((5, 5, 2), np.uint8),
        np.zeros(5, np.uint8),
        np.full((5, 5, 3), 300),
        Image.new("I", (5, 5), 40000),
        Image.new("F", (5, 5), float("nan")),
        [],
    ],
)
def test_impossible_images_are_refused(processor, image):
    with pytest.raises(ValueError, match="images"):
        processor(image)


def test_wrong_image_types_are_refused(processor, tmp_path):
    for image in (3, None, {"image": 1}, np.zeros((5, 5, 3), bool)):
        with pytest.raises(TypeError, match=r"images\[0\]"):
            processor([image])
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        processor(tmp_path / "nowhere.png")


# Texts


def test_embed_adds_the_prefix_once_and_pads_on_the_right(processor):
    batch = processor(text=["a cat", "summarize:a  dog on a sofa", " summarize: x"])
    expected = [ids_of(processor, t) for t in ("summarize:a cat", "summarize:a  dog on a sofa", " summarize: x")]
    for row, mask, ids in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), expected):
        assert row == ids + [0] * (len(row) - len(ids))
        assert mask == [1] * len(ids) + [0] * (len(row) - len(ids))
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["input_ids"].shape[1] == max(map(len, expected))


def test_match_has_no_prefix(processor):
    assert processor(text="a cat", task="match")["input_ids"].tolist() == [ids_of(processor, "a cat")]


def test_caption_has_no_eos_and_pads_on_the_left(processor):
    batch = processor(text=["a", "a longer prompt:"], task="caption")
    short, long = ids_of(processor, "a", eos=False), ids_of(processor, "a longer prompt:", eos=False)
    assert batch["input_ids"].tolist() == [[0] * (len(long) - len(short)) + short, long]
    assert batch["attention_mask"].tolist()[0] == [0] * (len(long) - len(short)) + [1] * len(short)


def test_caption_prompts_follow_the_images(processor):
    images = [Image.new("RGB", (50, 50))] * 2
    for text, prompt in ((None, "English caption:"), ("Hi", "Hi")):
        batch = processor(images, text, task="caption")
        assert batch["input_ids"].tolist() == [ids_of(processor, prompt, eos=False)] * 2
    with pytest.raises(ValueError, match="2 images, got 3"):
        processor(images, ["a", "b", "c"], task="caption")


def test_images_alone_give_no_text(processor):
    assert set(processor(Image.new("RGB", (5, 5)))) == {"pixel_values"}
    assert set(processor(Image.new("RGB", (5, 5)), "a")) == {"pixel_values", "input_ids", "attention_mask"}


def test_long_texts_keep_eos_and_are_reported(processor):
    with pytest.warns(UserWarning, match=r"1 of 2 texts have more than 80 ids; the first is `text\[1\]`"):
        batch = processor(text=["a", "word " * 200])
    whole = ids_of(processor, "summarize:" + "word " * 200)
    assert batch["input_ids"][1].tolist() == whole[:79] + [2]
    with pytest.raises(ValueError, match="more than 80"):
        processor(text="word " * 200, truncation=False)
    with pytest.warns(UserWarning):
        assert processor(text="a cat on a mat", max_length=6)["input_ids"].shape == (1, 6)


def test_prompts_are_not_truncated_by_default(processor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = processor(text="word " * 200, task="caption")["input_ids"]
    assert ids.tolist() == [ids_of(processor, "word " * 200, eos=False)]
    with pytest.warns(UserWarning):
        cut = processor(text="word " * 200, task="caption", max_length=10)["input_ids"]
    assert cut.tolist() == [ids.tolist()[0][:10]]


def test_padding_choices(processor):
    assert processor(text="a", padding="max_length")["input_ids"].shape == (1, 80)
    assert processor(text="a", padding="max_length", max_length=20)["attention_mask"].shape == (1, 20)
    ragged = processor(text=["a", "a longer text"], padding=False, return_tensors=None)["input_ids"]
    assert ragged == [ids_of(processor, "summarize:a"), ids_of(processor, "summarize:a longer text")]
    for kind in ("pt", "np"):
        with pytest.raises(ValueError, match="texts of equal length in ids, or `return_tensors=None`"):
            processor(text=["a", "a longer text"], padding=False, return_tensors=kind)
    with pytest.raises(ValueError, match="max_length"):
        processor(text="a", task="caption", padding="max_length")
    assert isinstance(processor(np.zeros((9, 9), np.uint8), "a", return_tensors="np")["pixel_values"], np.ndarray)


def test_tokenizer_settings_neither_matter_nor_change(processor):
    tokenizer = InternVLTokenizer(TINY / "tokenizer.model", add_eos_token=True, padding_side="left")
    other = InternVLProcessor(processor.image_processor, tokenizer)
    assert other(text=["a", "b c"])["input_ids"].tolist() == processor(text=["a", "b c"])["input_ids"].tolist()
    other(text="a", task="caption")
    assert tokenizer.add_eos_token is True and tokenizer.padding_side == "left"


def test_threads_with_different_tasks_do_not_disturb_each_other(processor):
    wrong = []

    def work(task, eos):
        for _ in range(200):
            if (processor(text="a cat", task=task)["input_ids"][0, -1].item() == 2) is not eos:
                wrong.append(task)

    threads = [threading.Thread(target=work, args=args) for args in (("embed", True), ("caption", False)) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("text", ["", "  ", "summarize:", [], ["a", ""]])
def test_empty_texts_are_refused(processor, text):
    with pytest.raises(ValueError, match="text"):
        processor(text=text)


@pytest.mark.parametrize("text", [3, b"a", ["a", None], [["a"]], {"a": 1}])
def test_wrong_text_types_are_refused(processor, text):
    with pytest.raises(TypeError, match="text"):
        processor(text=text)


@pytest.mark.parametrize(
    "options, error",
    [
        ({}, ValueError),
        ({"text": "a", "task": "embedding"}, ValueError),
        ({"text": "a", "crop": "centre"}, ValueError),
        ({"text": "a", "padding": "longer"}, ValueError),
        ({"text": "a", "max_length": 2}, ValueError),
        ({"text": "a", "max_length": "80"}, TypeError),
        ({"text": "a", "max_lenght": 80}, TypeError),
        ({"text": "a", "add_special_tokens": False}, TypeError),
    ],
)
def test_wrong_options_are_refused(processor, options, error):
    with pytest.raises(error):
        processor(**options)


# Loading, saving, pipelines


def test_names_and_decoding(processor):
    assert processor.model_input_names == ["pixel_values", "input_ids", "attention_mask"]
    ids = processor(text="a  cat", task="match")["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a  cat"]
    assert processor.decode(ids[0], skip_special_tokens=True) == "a  cat"


def test_other_backends_are_replaced_by_pil(processor):
    class TensorBackend:  # in place of torchvision's, which the test environments do not have
        crop_size = {"height": 48, "width": 48}

        def to_dict(self):
            return processor.image_processor.to_dict()

    replaced = InternVLProcessor(TensorBackend(), processor.tokenizer).image_processor
    assert isinstance(replaced, CLIPImageProcessorPil)
    assert list(replaced.image_mean) == [0.485, 0.456, 0.406] and replaced.crop_size["height"] == 48


def test_default_task_decides_for_calls_that_name_none(processor):
    captioner = InternVLProcessor(processor.image_processor, processor.tokenizer)
    captioner.default_task = "caption"
    assert captioner(text="a")["input_ids"].tolist() == [ids_of(processor, "a", eos=False)]


def test_fresh_process_loads_saves_and_serves_pipelines(processor, tmp_path):
    repository = tmp_path / "repository"
    (repository / "tiny").mkdir(parents=True)
    code_files = [f"{name}_internvl.py" for name in ("compat", "images", "tokenization", "processing")]
    configs = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
    for name in (*code_files, *configs, *(f"tiny/{name}" for name in configs)):
        shutil.copy(ROOT / name, repository / name)
    config = {"model_type": "internvl_14b", "auto_map": {"AutoConfig": "configuration_internvl.InternVLConfig"}}
    (repository / "configuration_internvl.py").write_text(STUB_CONFIG)
    for folder in (repository, repository / "tiny"):
        (folder / "config.json").write_text(json.dumps(config))
        shutil.copy(TINY / "tokenizer.model", folder / "tokenizer.model")
    code = f"""
import json
from PIL import Image
from transformers import AutoProcessor
root, saved = {str(repository)!r}, {str(tmp_path / "saved")!r}
rows = []
AutoProcessor.from_pretrained(root, subfolder="tiny", trust_remote_code=True).save_pretrained(saved)
for path, options in ((root, {{}}), (root, {{"subfolder": "tiny"}}), (saved, {{}})):
    p = AutoProcessor.from_pretrained(path, trust_remote_code=True, **options)
    batch = p(Image.new("RGB", (60, 80)), "a  cat")
    rows.append([type(p.tokenizer).__name__, list(batch["pixel_values"].shape), batch["input_ids"].tolist()[0]])
p = AutoProcessor.from_pretrained(root, trust_remote_code=True, _from_pipeline="image-text-to-text")
rows.append(p(text="a  cat")["input_ids"].tolist()[0])
print(json.dumps(rows))
"""
    *rows, prompt = json.loads(run_python(code, tmp_path).stdout.splitlines()[-1])
    ids = ids_of(processor, "summarize:a  cat")
    shapes = ([1, 3, 224, 224], [1, 3, 48, 48], [1, 3, 48, 48])
    assert rows == [["InternVLTokenizer", shape, ids] for shape in shapes]
    assert prompt == ids_of(processor, "a  cat", eos=False)


@pytest.mark.parametrize("value, error", [(2, ValueError), ("80", TypeError), (None, TypeError), (True, TypeError)])
def test_the_processors_own_limit_is_checked(processor, value, error):
    with pytest.raises(error, match="`max_length`"):
        type(processor)(processor.image_processor, processor.tokenizer, max_length=value)
