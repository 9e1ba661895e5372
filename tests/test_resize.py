"""`exact` pixels that numba's machine code makes are Pillow's to the bit; if they were not, Pillow would resize."""

from __future__ import annotations

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from perpetune.data.pictures import memory, passes, resize
from perpetune.data.pictures.view import PictureView

FILTERS = ("bilinear", "bicubic")


def _noise(width: int, height: int, seed: int = 0, hard: bool = False) -> Image.Image:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2, (height, width, 3)) * 255 if hard else rng.integers(0, 256, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8))


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> resize._Process:
    """A process that has resized enough pictures to take the passes."""
    made = resize._Process()
    monkeypatch.setattr(resize, "PATIENCE", 0)
    monkeypatch.setattr(resize, "_process", made)
    assert made.has_passes()
    return made


@st.composite
def _cases(draw: st.DrawFn) -> tuple[int, int, int, resize.Box | None]:
    width, height, size = draw(st.integers(1, 120)), draw(st.integers(1, 120)), draw(st.integers(1, 60))
    if draw(st.booleans()):
        return width, height, size, None
    place = st.floats(0, 1, width=32)
    x, y = (sorted((draw(place) * side, draw(place) * side)) for side in (width, height))
    return width, height, size, (x[0], y[0], x[1], y[1])


@given(_cases(), st.sampled_from(FILTERS), st.integers(0, 99), st.booleans(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_all_bits_are_those_of_pillow(case: Any, name: Any, seed: int, hard: bool, flip: bool) -> None:
    width, height, size, box = case
    if box is not None and not (np.float32(box[0]) < np.float32(box[2]) and np.float32(box[1]) < np.float32(box[3])):
        return
    image = _noise(width, height, seed, hard)
    wanted = resize.by_pillow(image, size, name, box)
    wanted = wanted.flip(2) if flip else wanted
    assert torch.equal(resize.by_passes(image, size, name == "bicubic", box, flip), wanted)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (400, 600), (300, 900), (1024, 768), (224, 224)])
def test_photos_have_pillows_bits(name: Any, width: int, height: int) -> None:
    image = _noise(width, height)
    for box in (None, (0.07 * width, 0.1 * height, 0.9 * width, 0.77 * height)):
        wanted = resize.by_pillow(image, 224, name, box)
        assert torch.equal(resize.by_passes(image, 224, name == "bicubic", box), wanted)
    other = resize.by_passes(image, 224, name != "bicubic", box)
    assert not torch.equal(other, wanted)  # the control: another filter is seen


def test_the_order_of_the_passes_shows() -> None:
    """The control of `rows_first`: the other order gives other bits, and each side of the bound is Pillow's."""
    for height in (60, 61):
        image, size = _noise(38, height), 16
        pixels, _ = memory.pixels_of(image)
        columns_first = torch.from_numpy(
            passes.resized(pixels, 0.0, 0.0, 38.0, float(height), size, True, False, False)
        )
        same = torch.equal(columns_first, resize.by_pillow(image, size, "bicubic", None))
        assert same != resize.rows_first(38, height, size)


@pytest.mark.parametrize(
    ("version", "width", "height", "first"),
    [
        ("13.0.0", 38, 60, False),
        ("13.0.0", 38, 61, True),
        ("13.1.0.dev0", 12, 17, True),  # the width grows
        ("13.0.0", 12, 16, False),  # the height stays
        ("12.9.0", 38, 61, False),
        ("10.3.0", 3, 900, False),
    ],
)
def test_which_pass_is_first(
    version: str, width: int, height: int, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PIL, "__version__", version)
    assert resize.rows_first(width, height, 16) is first


@pytest.mark.parametrize("hidden", [False, True])
def test_pixels_are_read_where_they_lie_or_copied(hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    image = _noise(31, 17)
    if hidden:
        monkeypatch.setattr(memory, "_shown", lambda image: None)
    elif not hasattr(image, "__arrow_c_array__"):
        pytest.skip("this Pillow does not show its memory")
    pixels, owner = memory.pixels_of(image)
    assert isinstance(owner, bytearray) == hidden
    channels = np.stack([pixels >> shift & 255 for shift in (0, 8, 16)], -1)
    assert np.array_equal(channels, np.asarray(image))
    image = image.transpose(Image.Transpose.ROTATE_90)
    assert not np.array_equal(pixels, memory.pixels_of(image)[0].reshape(17, 31))  # the control
    assert np.array_equal(np.stack([pixels >> shift & 255 for shift in (0, 8, 16)], -1), channels)  # held by its owner


def test_a_picture_in_several_blocks_is_copied() -> None:
    image = _noise(2100, 2100)  # more than 16 MB
    pixels, owner = memory.pixels_of(image)
    assert isinstance(owner, bytearray)
    assert np.array_equal(pixels & 255, np.asarray(image)[..., 0])
    wanted = resize.by_pillow(image, 16, "bicubic", None)
    assert torch.equal(resize.by_passes(image, 16, True, None), wanted)


def test_a_view_gives_the_same_before_and_after(ready: resize._Process, monkeypatch: pytest.MonkeyPatch) -> None:
    image, calls = _noise(90, 70), []
    monkeypatch.setattr(resize, "by_passes", _counted(resize.by_passes, calls))
    views = [PictureView(16, interpolation=name, crop=crop) for name in FILTERS for crop in (None, 0.9)]
    after = [view(image, "crop_flip", seed) for view in views for seed in range(6)]
    assert len(calls) == len(after)
    monkeypatch.setattr(ready, "_agreed", False)
    before = [view(image, "crop_flip", seed) for view in views for seed in range(6)]
    assert len(calls) == len(after)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(after, before, strict=True))


def test_other_filters_and_very_large_pictures_are_pillows(
    ready: resize._Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(resize, "by_passes", _counted(resize.by_passes, calls))
    monkeypatch.setattr(resize, "MOST", 30 * 20)
    for name in ("nearest", "lanczos"):
        resize.exact(_noise(30, 20), 8, name, None)  # type: ignore[arg-type]
    resize.exact(_noise(31, 20), 8, "bicubic", None)
    assert not calls
    resize.exact(_noise(30, 20), 8, "bicubic", None)  # the control
    assert len(calls) == 1


def test_pillow_resizes_until_numba_is_worth_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "PATIENCE", 3)
    monkeypatch.setattr(resize, "_process", resize._Process())
    calls: list[Any] = []
    monkeypatch.setattr(resize, "by_passes", _counted(resize.by_passes, calls))
    image, found = _noise(30, 20), []
    for _ in range(6):
        found.append(resize.exact(image, 8, "bicubic", None))
    assert len([call for call in calls if call[0] is image]) == 3
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("way", [resize.exact, resize.fast])
def test_pillow_keeps_memory_once_there_are_many(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept_after(pictures: int, before: int = 0) -> int:
        Image.core.set_blocks_max(before)
        monkeypatch.setattr(resize, "_process", resize._Process())
        for _ in range(pictures):
            way(_noise(30, 20), 8, "bicubic", None)
        return int(Image.core.get_blocks_max())

    monkeypatch.setattr(resize, "PATIENCE", 3)
    monkeypatch.delenv("PILLOW_BLOCKS_MAX", raising=False)
    asked = Image.core.get_blocks_max()
    try:
        assert (kept_after(3), kept_after(4)) == (0, resize.BLOCKS)
        assert kept_after(4, before=7) == 7  # somebody has said it
        monkeypatch.setenv("PILLOW_BLOCKS_MAX", "0")
        assert kept_after(4) == 0
    finally:
        Image.core.set_blocks_max(asked)


def test_without_numba_pillow_resizes_and_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "PATIENCE", 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not resize._Process().has_passes()


def test_other_bits_are_found_and_pillow_resizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "PATIENCE", 0)
    real = resize.rows_first
    monkeypatch.setattr(resize, "rows_first", lambda *sizes: not real(*sizes))  # as if Pillow had taken another order
    made = resize._Process()
    with pytest.warns(UserWarning, match=r"numba is not used: it does not resize to the bits of Pillow \d.*"):
        assert not made.has_passes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not made.has_passes()  # said once


def test_an_error_of_numba_is_said_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("no code for this processor")

    monkeypatch.setattr(resize, "PATIENCE", 0)
    monkeypatch.setattr(passes, "resized", broken)
    with pytest.warns(UserWarning, match="numba is not used: no code for this processor. Pillow resizes instead"):
        assert not resize._Process().has_passes()


def test_without_machine_code_pillow_resizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "PATIENCE", 0)
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    with pytest.warns(UserWarning, match="numba is not used: NUMBA_DISABLE_JIT is set. Pillow resizes instead"):
        assert not resize._Process().has_passes()


def test_machine_code_needs_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])

    def plus_one(x: int) -> int:
        return x + 1

    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(plus_one, cache=True)  # the control
    assert passes._compiled(plus_one)(2) == 3


def test_threads_resize_side_by_side(ready: resize._Process) -> None:
    images = [_noise(80 + i, 60, i) for i in range(24)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda image: resize.exact(image, 16, "bicubic", None), images))
    assert all(torch.equal(f, resize.by_pillow(i, 16, "bicubic", None)) for f, i in zip(found, images, strict=True))


def test_few_pictures_do_not_load_numba() -> None:
    code = (
        "import sys\nfrom PIL import Image\nfrom perpetune.data.pictures.view import PictureView\n"
        "view = PictureView(16)\nfor _ in range(9): view(Image.new('RGB', (30, 20)))\n"
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _counted(function: Any, calls: list[Any]) -> Any:
    def counted(*given: Any) -> Any:
        calls.append(given)
        return function(*given)

    return counted
