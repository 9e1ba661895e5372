"""Pillow's JPEG decoder gets memory that its library writes fast, and gives the same pixels and the same errors."""

from __future__ import annotations

import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from perpetune.data.pictures import jpeg
from perpetune.data.pictures.read import read_picture
from perpetune.errors import DataError

needed = pytest.mark.skipif(not jpeg._NEEDED, reason="only Linux on x86-64 needs it")


def _file(width: int = 60, height: int = 40, mode: str = "RGB", seed: int = 0, **how: Any) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    image.save(content := io.BytesIO(), "JPEG", **how)
    return content.getvalue()


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that each decoder has asked for."""
    asked: list[int] = []
    assert jpeg._agrees()
    real = jpeg._taken

    def taken(size: int) -> Any:
        asked.append(size)
        return real(size)

    monkeypatch.setattr(jpeg, "_taken", taken)
    return asked


@needed
@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 2, "quality": 30}),
        ("RGB", {"progressive": True}),
        ("L", {}),
        ("CMYK", {}),
    ],
)
@pytest.mark.parametrize("width", [1, 7, 64, 257, 500])
def test_pixels_are_pillows(width: int, mode: str, how: Any, prepared: list[int]) -> None:
    content = _file(width, 33, mode, **how)
    with Image.open(io.BytesIO(content)) as image:
        wanted = np.asarray(image.convert("RGB"))
    assert not prepared  # Pillow's own reading is not changed
    assert np.array_equal(np.asarray(read_picture(content, "photo")), wanted)
    assert prepared == ([4 * width] if mode == "RGB" else [])


@needed
def test_a_smaller_reading_asks_for_shorter_lines(prepared: list[int]) -> None:
    content = _file(800, 640)
    with Image.open(io.BytesIO(content)) as image:
        image.draft(None, (200, 160))
        wanted = np.asarray(image)
    assert np.array_equal(np.asarray(read_picture(content, "photo", least=160)), wanted)
    assert prepared == [4 * 200]


@needed
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_other_files_are_left_alone(kind: str, prepared: list[int]) -> None:
    Image.new("RGB", (30, 20), "red").save(content := io.BytesIO(), kind)
    read_picture(content.getvalue(), "photo")
    assert not prepared


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_errors_are_pillows(share: float) -> None:
    content = _file(300, 200)
    content = content[: int(share * len(content))]
    with pytest.raises(OSError, match="truncated") as wanted, Image.open(io.BytesIO(content)) as image:
        image.load()
    with pytest.raises(DataError) as found:
        read_picture(content, "photo")
    assert str(found.value) == f"photo: {wanted.value}"


def test_a_torn_picture_is_read_where_the_user_lets_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    content = _file(300, 200)[:9000]
    with Image.open(io.BytesIO(content)) as image:
        wanted = np.asarray(image)
    assert np.array_equal(np.asarray(read_picture(content, "photo")), wanted)


@needed
def test_the_next_memory_is_not_aligned() -> None:
    """With the control: before, the same memory is aligned."""

    def aligned(size: int) -> bool:
        place = jpeg._malloc(size)
        jpeg._free(place)
        return bool(place % jpeg.ALIGNED == 0)

    before, after = [], []
    for size in range(400, 12_000, 64):
        held: list[int | None] = []
        while len(held) < 2 * jpeg.TRIES and not aligned(size):
            held += [jpeg._malloc(size), jpeg._malloc(size + jpeg.ALIGNED // 2)]
        before.append(aligned(size))
        held += jpeg._taken(size)
        after.append(aligned(size))
        for place in held:
            jpeg._free(place)
    assert np.mean(before) > 0.9
    assert np.mean(after) < 0.1  # not 0, for others ask for memory too


@needed
def test_all_that_is_taken_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    places = iter(range(64, 10**6, 64))  # an allocator that aligns all memory
    out: set[int] = set()

    def malloc(size: int) -> int:
        out.add(place := next(places))
        return place

    monkeypatch.setattr(jpeg, "_malloc", malloc)
    monkeypatch.setattr(jpeg, "_free", out.remove)
    assert np.asarray(read_picture(_file(), "photo")).shape == (40, 60, 3)
    assert next(places) == 64 * (2 * jpeg.TRIES + 1)
    assert not out
    with pytest.raises(DataError, match="photo: "):
        read_picture(_file()[:900], "photo")
    assert not out


@needed
@pytest.mark.parametrize("bytes_left", [0, 1])
def test_without_memory_to_spare_pillow_is_asked(bytes_left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [64] * bytes_left
    freed: list[Any] = []
    monkeypatch.setattr(jpeg, "_malloc", lambda size: given.pop() if given else None)
    monkeypatch.setattr(jpeg, "_free", freed.append)
    assert np.asarray(read_picture(_file(), "photo")).shape == (40, 60, 3)
    assert [place for place in freed if place] == [64] * bytes_left


@needed
@pytest.mark.parametrize(("what", "why"), [("decoder", "setimage takes three"), ("pixels", "it has other pixels")])
def test_another_pillow_reads_alone(what: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = _file()
    wanted = np.asarray(read_picture(content, "photo"))

    def broken(decoder: Any, *asked: Any) -> None:
        raise TypeError("setimage takes three arguments")

    jpeg._agrees.cache_clear()
    if what == "decoder":
        monkeypatch.setattr(jpeg._Decoder, "setimage", broken)
    else:
        monkeypatch.setattr(jpeg, "_change", lambda image: image.draft("L", image.size))
    try:
        with pytest.warns(
            UserWarning, match=f"perpetune cannot give faster memory to the JPEG decoder of Pillow .*{why}.* as it is"
        ):
            assert np.array_equal(np.asarray(read_picture(content, "photo")), wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            assert np.array_equal(np.asarray(read_picture(content, "photo")), wanted)
    finally:
        jpeg._agrees.cache_clear()


def test_threads_read_side_by_side() -> None:
    contents = [_file(50 + i, 40, seed=i) for i in range(24)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda content: np.asarray(read_picture(content, "photo")), contents))
    for content, pixels in zip(contents, found, strict=True):
        with Image.open(io.BytesIO(content)) as image:
            assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_reads(tmp_path: Any) -> None:
    content = _file()
    wanted = np.asarray(read_picture(content, "photo"))
    if (child := os.fork()) == 0:
        os._exit(not np.array_equal(np.asarray(read_picture(content, "photo")), wanted))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("needed", [True, False])
def test_where_it_is_not_needed_pillow_reads(needed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if needed and not jpeg._NEEDED:
        pytest.skip("only Linux on x86-64 needs it")
    monkeypatch.setattr(jpeg, "_NEEDED", needed)
    with Image.open(io.BytesIO(_file())) as image:
        jpeg.prepare(image)
        assert image.tile[0][0] == (jpeg.NAME if needed else "jpeg")
        image.load()
