"""Fast pixels: what they may change and what they may not; exact pixels are Pillow's to the bit, as ever."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from perpetune.build import _fast, load_backbone
from perpetune.data.pictures.read import read_picture
from perpetune.data.pictures.view import PictureView, centre_box, random_box
from perpetune.errors import DataError, UsageError
from perpetune.recipe import BackboneSection, make_recipe
from perpetune.tasks import Batch, stack


def _smooth(width: int, height: int) -> Image.Image:
    """A picture of large shapes, whose edges are not sharp, as in photos."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def _jpeg(image: Image.Image, **how: Any) -> bytes:
    file = BytesIO()
    image.save(file, "JPEG", quality=95, **how)
    return file.getvalue()


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("crop", [None, 0.875])
def test_exact_pixels_are_those_of_pillow(interpolation: Any, crop: float | None) -> None:
    image = _smooth(50, 37)
    box = None if crop is None else centre_box(50, 37, crop)
    wanted = image.resize((16, 16), Image.Resampling[interpolation.upper()], box=box)
    found = PictureView(16, interpolation=interpolation, crop=crop)(image)
    assert found.is_contiguous()
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(wanted))
    assert not np.array_equal(found.flip(2).permute(1, 2, 0).numpy(), np.asarray(wanted))  # the control


def test_exact_pixels_of_a_random_crop_are_those_of_pillow() -> None:
    image, flipped = _smooth(50, 37), set()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        wanted = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC, box=random_box(50, 37, rng)))
        flip = rng.random() < 0.5
        found = PictureView(16)(image, "crop_flip", seed).permute(1, 2, 0).numpy()
        assert np.array_equal(found, wanted[:, ::-1] if flip else wanted)
        flipped.add(flip)
    assert flipped == {True, False}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("width", "height"), [(50, 37), (16, 16), (9, 5), (3, 200)])
def test_fast_pixels_of_a_whole_picture_differ_by_two_at_most(interpolation: Any, width: int, height: int) -> None:
    image = _smooth(width, height)
    exact, fast = (PictureView(16, interpolation=interpolation, fast=f)(image).int() for f in (False, True))
    assert (exact - fast).abs().max() <= 2
    other = PictureView(16, interpolation="nearest")(image).int()
    assert (width, height) == (16, 16) or (exact - other).abs().max() > 2  # the control: another filter is seen


def test_a_fast_flip_is_the_mirror_image() -> None:
    image, view, seen = _smooth(50, 37), PictureView(16, fast=True), set()
    plain = view(image)
    for seed in range(8):
        flips = bool(np.random.default_rng(seed).random() < 0.5)
        assert torch.equal(view(image, "flip", seed), plain.flip(2) if flips else plain)
        seen.add(flips)
    assert seen == {True, False}
    assert not torch.equal(plain, plain.flip(2))  # the control


def test_fast_crops_show_the_same_part() -> None:
    image = _smooth(500, 375)
    for crop, squeeze in ((0.875, False), (0.9, True), (0.001, False)):
        exact, fast = (PictureView(16, crop=crop, squeeze=squeeze, fast=f)(image).int() for f in (False, True))
        assert (exact - fast).abs().max() <= 8
    for seed in range(20):
        exact, fast = (PictureView(16, fast=f)(image, "crop_flip", seed).int() for f in (False, True))
        assert (exact - fast).abs().max() <= 8
    elsewhere = PictureView(16, fast=True)(image, "crop_flip", 100).int()
    assert (exact - elsewhere).abs().max() > 8  # the control


@pytest.mark.parametrize("interpolation", ["nearest", "lanczos"])
def test_filters_that_torch_lacks_stay_exact(interpolation: Any) -> None:
    image = _smooth(50, 37)
    exact, fast = (PictureView(16, interpolation=interpolation, crop=0.9, fast=f)(image) for f in (False, True))
    assert torch.equal(exact, fast)


# -- JPEG files that are read smaller ----------------------------------------------------------------


@pytest.mark.parametrize(("least", "size"), [(None, (401, 300)), (301, (401, 300)), (150, (201, 150)), (37, (51, 38))])
def test_a_large_jpeg_file_is_read_smaller(least: int | None, size: tuple[int, int]) -> None:
    assert read_picture(_jpeg(_smooth(401, 300)), "x", least).size == size


def test_other_formats_are_read_as_they_are() -> None:
    file = BytesIO()
    _smooth(401, 300).save(file, "PNG")
    assert read_picture(file.getvalue(), "x", 10).size == (401, 300)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_smaller_one_shows_the_same_upright(mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    content = _jpeg(_smooth(640, 480).convert(mode), exif=exif)
    whole, small = (read_picture(content, "x", least) for least in (None, 100))
    assert (whole.size, small.size, small.mode) == ((480, 640), (120, 160), "RGB")
    shown = [np.asarray(image.resize((24, 32), Image.Resampling.BOX)).astype(int) for image in (whole, small)]
    assert abs(shown[0] - shown[1]).max() <= 6
    assert abs(shown[0] - shown[1][::-1]).max() > 6  # the control


def test_a_torn_file_is_named_when_it_is_read_smaller() -> None:
    content = _jpeg(_smooth(640, 480))
    with pytest.raises(DataError, match=r"photo: .*truncated"):
        read_picture(content[: len(content) // 2], "photo", 100)
    assert read_picture(content, "photo", 100).size == (160, 120)  # the control


def test_a_view_reads_small_only_when_it_is_fast(tmp_path: Path) -> None:
    file = tmp_path / "x.jpg"
    file.write_bytes(_jpeg(_smooth(640, 480)))
    assert (PictureView(16).least, PictureView(16, fast=True).least) == (None, 48)
    exact, fast = (PictureView(16, fast=f).load(file).int() for f in (False, True))
    assert 0 < (exact - fast).abs().max() <= 6


# -- the option --------------------------------------------------------------------------------------


def test_backbone_pixels_reach_the_view() -> None:
    assert load_backbone("perpetune:micro").preprocess.fast is False  # type: ignore[attr-defined]
    assert load_backbone("perpetune:micro", pixels="fast").preprocess.fast is True  # type: ignore[attr-defined]


def test_a_recipe_without_the_option_is_written_as_before() -> None:
    written = make_recipe({"name": "x"}).model_dump(mode="json")["backbone"]
    assert "pixels" not in written
    fast = make_recipe({"name": "x", "backbone": {"name": "perpetune:micro", "pixels": "fast"}})
    assert fast.model_dump(mode="json")["backbone"]["pixels"] == "fast"
    assert BackboneSection.model_validate(written).pixels == "exact"


def test_a_model_of_texts_has_no_pixels() -> None:
    class Texts:
        takes = "texts"

    with pytest.raises(UsageError, match="own:x: pixels says how pictures are resized, and the model reads texts"):
        _fast("own:x", Texts())  # type: ignore[arg-type]
    assert _fast("own:x", PictureView(8)) == PictureView(8, fast=True)  # the control


# -- on the device -----------------------------------------------------------------------------------


def test_normalising_leaves_the_callers_pixels_alone() -> None:
    backbone = load_backbone("perpetune:micro")
    given = torch.rand(2, 3, 32, 32) * 255
    before = given.clone()
    assert torch.equal(backbone.normalised(given), (given / 255 - backbone.mean) / backbone.std)
    assert torch.equal(given, before)
    whole = given.to(torch.uint8)
    assert torch.equal(backbone.normalised(whole), (whole.float() / 255 - backbone.mean) / backbone.std)


def test_a_batch_is_a_copy() -> None:
    images = [torch.full((3, 2, 2), i, dtype=torch.uint8) for i in range(3)]
    batch: Batch = stack([(image, i, i) for i, image in enumerate(images)])
    images[0].fill_(9)
    assert batch.inputs.pixels[:, 0, 0, 0].tolist() == [0, 1, 2]
