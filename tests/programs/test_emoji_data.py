"""The pure parts of tools/tiny/emoji_data.py: no network and no built dataset needed."""

import base64
import hashlib
import importlib
import io
from pathlib import Path

import pytest

np = pytest.importorskip("numpy", reason="numpy is not installed")
pytest.importorskip("PIL", reason="Pillow is not installed")
pytest.importorskip("tqdm", reason="tqdm is not installed")

emoji_data = importlib.import_module("tools.tiny.emoji_data")
NameIndex = emoji_data.NameIndex
hexcode_of = emoji_data.hexcode_of
is_dropped = emoji_data.is_dropped
normalise = emoji_data.normalise
plain_hexcode = emoji_data.plain_hexcode


def concept(emoji, en="", zh="", ja=""):
    return {"emoji": emoji, "hexcode": hexcode_of(emoji), "name": {"en": en, "zh": zh, "ja": ja}}


@pytest.fixture
def icons():
    """Four square icons and a wide one, with a plain, a mirroring and a misleading alias."""
    square = '<rect width="4" height="8" fill="#f00"/>'
    return emoji_data.IconSet(
        "test",
        {
            "width": 8,
            "height": 8,
            "icons": {
                "panda-face": {"body": square},
                "cricket-game": {"body": square},
                "pointing-left": {"body": square},
                "nonsense": {"body": square},
                "wide": {"body": '<rect width="16" height="8" fill="#f00"/>', "width": 16},
            },
            "aliases": {
                "panda": {"parent": "panda-face"},
                "cricket": {"parent": "cricket-game"},
                "pointing-right": {"parent": "pointing-left", "hFlip": True},
            },
        },
        chars={},
    )


# Names


@pytest.mark.parametrize("name", ["Piñata", "piñata", ":pinata:", "PIN-ATA", "pi_nata"])
def test_spellings_of_a_name_become_one(name):
    assert normalise(name) == "pinata"


def test_normalise_keeps_what_tells_names_apart():
    assert normalise("woman’s hat") == "womanshat"
    assert normalise("fork & knife") == normalise("fork-and-knife")
    assert normalise("1st place medal") != normalise("2nd place medal")
    assert normalise("熊猫") == ""


def test_hexcodes_leave_out_variation_selectors():
    assert hexcode_of("❤️‍🔥") == plain_hexcode("2764-fe0f-200d-1f525") == "2764-200D-1F525"


def test_the_most_trusted_name_decides():
    index = NameIndex([("1F404", "cow")], [("1F42E", "cow"), ("1F42E", "cow face")])
    assert index.find("Cow") == (0, "1F404")
    assert index.find("cow-face") == (1, "1F42E")
    assert index.find("sow") is None


def test_an_ambiguous_name_finds_nothing():
    index = NameIndex([("1F404", "cow"), ("1F42E", "cow")], [("1F404", "cow")])
    assert index.find("cow") is None


def test_names_without_ascii_are_not_all_the_same_name():
    assert NameIndex([("1F43C", "熊猫")]).find("狐狸") is None


# Which emoji are left out


@pytest.mark.parametrize(
    ("emoji", "group", "label"),
    [
        ("🇯🇵", "flags", "flag: Japan"),
        ("🦰", "component", "red hair"),
        ("3️⃣", "symbols", "keycap: 3"),
        ("🔟", "symbols", "keycap: 10"),
        ("🕒", "travel-places", "three o’clock"),
        ("🕞", "travel-places", "three-thirty"),
        ("🧑‍🧒", "people-body", "family: adult, child"),
        ("🏄‍♀️", "people-body", "woman surfing"),
        ("👩‍🍳", "people-body", "woman cook"),
    ],
)
def test_dropped(emoji, group, label):
    assert is_dropped(hexcode_of(emoji), group, label, known={hexcode_of("🏄"), hexcode_of("🧑‍🍳")})


@pytest.mark.parametrize(
    ("emoji", "group", "label"),
    [
        ("🐼", "animals-nature", "panda"),
        ("⏰", "travel-places", "alarm clock"),
        ("🏄", "people-body", "person surfing"),
        ("🧑‍🍳", "people-body", "cook"),
        ("👩", "people-body", "woman"),
        ("❤️‍🔥", "smileys-emotion", "heart on fire"),
    ],
)
def test_kept(emoji, group, label):
    assert not is_dropped(hexcode_of(emoji), group, label, known={hexcode_of("🏄"), hexcode_of("🧑‍🍳")})


# Which icon shows which emoji

INDEX = NameIndex([("1F43C", "panda"), ("1F43C", "panda face"), ("1F3CF", "cricket game"), ("1F997", "cricket")])


def test_an_icon_is_used_once(icons):
    assert icons.match(["1F43C", "1F3CF", "1F997"], INDEX) == {"1F43C": "panda-face", "1F3CF": "cricket-game"}


def test_only_wanted_emoji_are_matched(icons):
    assert icons.match(["1F3CF"], INDEX) == {"1F3CF": "cricket-game"}


def test_a_character_map_is_believed_before_names(icons):
    icons.chars = {"1f43c": "wide"}
    assert icons.match(["1F43C"], INDEX) == {"1F43C": "wide"}


def test_a_match_by_hand_is_believed_before_everything(icons, monkeypatch):
    monkeypatch.setitem(emoji_data.BY_HAND, "test", {"nonsense": "1F43C", "cricket-game": None})
    icons.chars = {"1f43c": "wide"}
    assert icons.match(["1F43C", "1F3CF"], INDEX) == {"1F43C": "nonsense"}


def test_hand_written_matches_name_each_icon_and_emoji_once():
    words = emoji_data.FXEMOJI_BY_EYE.split()
    assert len(set(words)) == len(words)


# Downloads


def test_integrity():
    digest = base64.b64encode(hashlib.sha512(b"artwork").digest()).decode()
    emoji_data.check_integrity(b"artwork", f"sha512-{digest}")
    with pytest.raises(ValueError, match="sha512"):
        emoji_data.check_integrity(b"another artwork", f"sha512-{digest}")


def test_a_bad_download_leaves_nothing_behind(tmp_path, monkeypatch):
    def npm_pack(command, **_):
        Path(command[-1], "noto.tgz").write_bytes(b"not what was published")

    monkeypatch.setattr(emoji_data.subprocess, "run", npm_pack)
    with pytest.raises(SystemExit, match="noto@"):
        emoji_data.fetch(emoji_data.ARTWORK["noto"], tmp_path)
    assert list((tmp_path / "packages").iterdir()) == []


def test_an_interrupted_write_leaves_no_file(tmp_path):
    def interrupted(file: io.BufferedWriter):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        emoji_data._write(tmp_path / "pictures.npz", interrupted)
    assert not (tmp_path / "pictures.npz").exists()


def test_loading_what_is_not_built_says_how_to_build_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tools\.tiny\.emoji_data"):
        emoji_data.load(tmp_path)


# Images


def test_render_centres_and_keeps_the_aspect_ratio(icons):
    pytest.importorskip("resvg_py", reason="resvg_py is not installed")
    picture = emoji_data.render(icons.drawing("wide"), 64)
    assert (picture.mode, picture.size) == ("RGBA", (64, 64))
    alpha = np.asarray(picture)[..., 3]
    assert (alpha[20:44] == 255).all()
    assert (alpha[:12] == 0).all()
    assert (alpha[-12:] == 0).all()


def test_render_keeps_colours_at_soft_edges():
    pytest.importorskip("resvg_py", reason="resvg_py is not installed")
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8" width="8" height="8">'
        '<circle cx="4" cy="4" r="3" fill="#f00"/></svg>'
    )
    pixels = np.asarray(emoji_data.render(svg, 64))
    edge = pixels[(pixels[..., 3] > 60) & (pixels[..., 3] < 250)]
    assert len(edge) > 20
    assert edge[:, 0].min() > 245


def test_an_alias_can_mirror_its_icon(icons):
    pytest.importorskip("resvg_py", reason="resvg_py is not installed")
    left, right = (np.asarray(emoji_data.render(icons.drawing(f"pointing-{side}"), 32)) for side in ("left", "right"))
    assert left[16, 4, 3] == 255
    assert left[16, 28, 3] == 0
    assert (right == left[:, ::-1]).all()


# Splits and examples


def test_masks_split_the_images():
    data = emoji_data.EmojiData(
        concepts=[concept("🐼")],
        rgba=np.zeros((3, 64, 64, 4), np.uint8),
        concept=np.zeros(3, np.int32),
        source=np.array([0, 1, 0], np.int8),
        sources=["noto", "twemoji"],
    )
    assert data.heldout_mask.tolist() == [False, True, False]
    assert data.train_mask.tolist() == [True, False, True]


def test_examples_start_with_the_favourites():
    concepts = [concept(chr(0x1F400 + number)) for number in range(0x60)]
    for count in (0, 1, 10, 40, len(concepts), 1000):
        chosen = emoji_data.choose_examples(concepts, count)
        assert len({example["hexcode"] for example in chosen}) == len(chosen) == min(count, len(concepts))
        assert not chosen or chosen[0]["emoji"] == "🐼"
