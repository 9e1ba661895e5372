"""Pictures are read as a person sees them; what cannot be read is named."""

from __future__ import annotations

import io
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from perpetune.data.names import RESERVED, label_of, natural, printable, safe_name, several, task_names
from perpetune.data.pictures.read import list_folder, picture_files, read_header, read_picture, walk
from perpetune.data.pictures.view import PictureView
from perpetune.errors import DataError, UsageError
from perpetune.state import START


def encoded(image: Image.Image, fmt: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def pixel(data: bytes, at=(0, 0)):
    image = read_picture(data, "x")
    assert image.mode == "RGB"
    return image.getpixel(at)


def corner(size=(8, 6)) -> Image.Image:
    """White with a red corner at the top left."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle((0, 0, 1, 1), fill=(255, 0, 0))
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = corner() if undo is None else corner().transpose(undo)
    for fmt in ("PNG", "TIFF"):
        seen = read_picture(encoded(stored, fmt, exif=exif), "x")
        assert seen.size == (8, 6)
        assert np.array_equal(np.asarray(seen), np.asarray(corner()))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_hide_a_good_picture():
    data = encoded(corner(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff junk", quality=95)
    assert read_picture(data, "x").size == (8, 6)


def test_transparency_is_white():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert pixel(encoded(clear)) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 255)))) == (255, 0, 0)
    assert pixel(encoded(Image.new("LA", (2, 2), (0, 0)))) == (255, 255, 255)
    half = pixel(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128))))
    assert half == (127, 127, 127)
    palette = corner().convert("P")
    assert pixel(encoded(palette)) == (255, 0, 0)
    red = palette.getpixel((0, 0))
    assert pixel(encoded(palette, transparency=red)) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGB", (2, 2), (9, 8, 7)), transparency=(9, 8, 7))) == (255, 255, 255)


def test_gray_bilevel_cmyk_and_animation():
    assert pixel(encoded(Image.new("L", (2, 2), 77))) == (77, 77, 77)
    assert pixel(encoded(Image.new("1", (2, 2), 1))) == (255, 255, 255)
    assert pixel(encoded(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF")) == (255, 0, 0)
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    assert pixel(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)


def test_more_than_eight_bits_are_scaled():
    deep = np.array([[0, 32896, 65535]], dtype=np.uint16)
    for fmt in ("PNG", "TIFF"):
        image = read_picture(encoded(Image.fromarray(deep), fmt), "x")
        assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]

    def gray(values, kind):
        image = read_picture(encoded(Image.fromarray(np.array([values], dtype=kind)), "TIFF"), "x")
        return [image.getpixel((x, 0))[0] for x in range(len(values))]

    assert gray([0.0, 0.5, 1.0], np.float32) == [0, 128, 255]
    assert gray([0.0, 100.0, 255.0], np.float32) == [0, 100, 255]
    assert gray([-1.0, 0.0, 1.0], np.float32) == [0, 128, 255]
    assert gray([0, 65535], np.int32) == [0, 255]
    assert gray([0, 1 << 20], np.int32) == [0, 255]
    assert gray([np.nan, 1.0], np.float32) == [0, 255]


def test_one_pixel_and_extreme_shapes_reach_the_model(tmp_path):
    for size in ((1, 1), (1, 3000), (3000, 1)):
        Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "x.png")
        for crop in (None, 0.875):
            pixels = PictureView(16, crop=crop).load(tmp_path / "x.png")
            assert pixels.shape == (3, 16, 16)
            assert pixels.dtype == torch.uint8
            assert pixels[:, 3, 5].tolist() == [10, 20, 30]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    good = encoded(Image.effect_noise((64, 64), 50))
    with pytest.raises(DataError, match=r"^x: .*truncated"):
        read_picture(good[: len(good) // 2], "x")
    with pytest.raises(DataError, match="x: not a picture"):
        read_picture(b"hello", "x")
    with pytest.raises(DataError, match="x: the picture is empty"):
        read_picture(b"", "x")
    with pytest.raises(DataError, match="x: no such file"):
        read_picture(str(tmp_path / "none.png"), "x")
    with pytest.raises(DataError, match="x: is a directory"):
        read_picture(str(tmp_path), "x")
    with pytest.raises(DataError, match="x: embedded null"):
        read_picture("a\0.png", "x")
    read_header(good[: len(good) // 2], "x")
    with pytest.raises(DataError, match="x: not a picture"):
        read_header(b"hello", "x")
    for limit in (1000, 3000):  # Pillow raises at twice its limit and warns above it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=f"x: larger than Pillow's limit of {limit} pixels"):
            read_header(good, "x")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM"]), st.data())
def test_torn_bytes_never_crash(fmt, data):
    content = bytearray(encoded(corner(), fmt))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        told = read_picture(bytes(content), "x").mode
    except DataError as error:
        told = str(error)
    assert told == "RGB" or (told.startswith("x: ") and "\n" not in told)


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path, "PNG")
    return path


def test_picture_files_expands_folders(tmp_path):
    for name in ("img10.PNG", "img2.png", "deep/er/a.png", ".hidden.png", ".git/b.png"):
        touch(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    found = [p.relative_to(tmp_path).as_posix() for p in picture_files([tmp_path])]
    assert found == ["img2.png", "img10.PNG", "deep/er/a.png"]
    assert picture_files([tmp_path / "notes.txt", tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"]
    with pytest.raises(UsageError, match=r"nowhere: no such file or folder"):
        picture_files([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no picture found: .*empty"):
        picture_files([tmp_path / "empty"])


def test_link_loops_and_odd_entries(tmp_path):
    touch(tmp_path / "a" / "x.png")
    touch(tmp_path / "b" / "y.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "self").symlink_to(tmp_path / "b" / "self")
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "b" / "folder.png").mkdir()
    os.mkfifo(tmp_path / "b" / "pipe.png")
    pictures, others = walk(str(tmp_path))
    assert sorted(pictures) == ["a/x.png", "b/gone.png", "b/y.png"]  # neither ends nor comes twice
    assert sorted(others) == ["pipe.png", "self"]
    with pytest.raises(DataError, match="no such file"):
        list_folder(str(tmp_path / "none"))


def test_names():
    assert natural(["b10", "a", "B2", "b2", "A"]) == ["A", "a", "B2", "b2", "b10"]
    assert printable("a\nb") == "a\\nb"
    assert printable("猫\u3000犬") == "猫\u3000犬"
    assert printable(os.fsdecode(b"caf\xe9")) == "caf\\udce9"
    assert label_of("cafe\u0301 ") == "café"
    assert several(list("abcdefg")) == "a, b, c, d, e and 2 more"
    assert safe_name("u\u0308ber cat/dog") == "über_cat_dog"
    assert safe_name("..") == safe_name("_ ?") == ""
    assert (safe_name("十月"), safe_name(".हिन्दी"), safe_name("2026-10")) == ("十月", "हिन्दी", "2026-10")
    assert safe_name("月" * 99) == "月" * 33
    assert task_names(["Cat", "cat", "?", "a b", "a_b"]) == ["Cat", "cat-2", "task-3", "a_b", "a_b-2"]
    assert task_names(["start", "?", "a"], first=7, taken=["A", "task-8"]) == ["start-1", "task-8-2", "a-2"]
    assert START == RESERVED


@given(st.lists(st.text(), max_size=8))
def test_task_names_are_safe_and_unique(names):
    made = task_names(names)
    assert len({m.casefold() for m in made}) == len(names)
    for name in made:
        assert all(c.isalnum() or c in "._-" or unicodedata.category(c).startswith("M") for c in name)
        assert name[0].isalnum()
        assert len(name.encode()) <= 100
        assert name != "start"
        assert safe_name(name) == name  # a task that is gone on with keeps its name
