"""Pictures become what the model's own processor makes of them: rescaling, normalisation and geometry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import vit_folder
from torch import Tensor

from perpetune.build import load_backbone
from perpetune.errors import UsageError
from perpetune.models.backbone import Backbone

BASE: dict[str, Any] = {
    "size": {"height": 16, "width": 16},
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4],
}


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A smooth picture, so that two good ways to resize it agree."""
    x, y = np.meshgrid(np.linspace(0, 255, 96), np.linspace(0, 255, 48))
    Image.fromarray(np.stack([x, y, (x + y) / 2], -1).astype(np.uint8)).save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


def loaded(tmp_path: Path, **given: Any) -> Backbone:
    folder = vit_folder(tmp_path / "m")
    (folder / "preprocessor_config.json").write_text(json.dumps({**BASE, **given}))
    return load_backbone(f"folder:{folder}")


def seen(backbone: Backbone, picture: Path) -> Tensor:
    """What the net is given of a picture."""
    pixels = backbone.preprocess.load(picture)  # type: ignore[attr-defined]
    return ((pixels[None] / 255 - backbone.mean) / backbone.std)[0]


def processed(given: dict[str, Any], picture: Path) -> Tensor:
    """What transformers' own processor of the model makes of it."""
    from transformers import ViTImageProcessor

    class Own(ViTImageProcessor):  # type: ignore[misc]
        """With a centre crop, as in the processors of DeiT and DINOv2."""

    processor = Own(**{**BASE, "resample": 2, **given})
    return torch.as_tensor(processor(Image.open(picture), return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"do_rescale": True, "rescale_factor": 1 / 255},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"rescale_factor": 1.0},
        {"rescale_factor": 0.5, "do_normalize": False},
        {"do_normalize": False},
    ],
)
def test_values_are_those_of_the_models_own_processor(given: dict[str, Any], tmp_path: Path, wide: Path) -> None:
    pytest.importorskip("torchvision")
    own, theirs = seen(loaded(tmp_path, **given), wide), processed(given, wide)
    scale = float(theirs.abs().max())
    torch.testing.assert_close(own / scale, theirs / scale, atol=0.02, rtol=0)


def test_the_usual_factor_changes_no_bit(tmp_path: Path, wide: Path) -> None:
    plain, said = loaded(tmp_path / "a"), loaded(tmp_path / "b", do_rescale=True, rescale_factor=0.00392156862745098)
    assert plain.preprocess == said.preprocess


@pytest.mark.parametrize("factor", [0, -1, "x", None, True, [1]])
def test_a_factor_that_is_none(factor: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rescale_factor"):
        loaded(tmp_path, rescale_factor=factor)


def test_a_std_of_zero(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="numbers above 0 are needed"):
        loaded(tmp_path, image_std=[0.2, 0.0, 0.4])


def expected(picture: Path, resized: tuple[int, int], size: int = 16) -> Tensor:
    """Resized, then the centre cut out, then normalised: step by step, as a processor does it."""
    image = Image.open(picture).resize(resized, Image.Resampling.BILINEAR)
    left, top = (resized[0] - size) / 2, (resized[1] - size) / 2
    cut = np.asarray(image.crop((int(left), int(top), int(left) + size, int(top) + size)), dtype=np.float32) / 255
    mean, std = np.array(BASE["image_mean"]), np.array(BASE["image_std"])
    return torch.from_numpy(((cut - mean) / std).astype(np.float32)).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("given", "resized"),
    [
        ({"size": {"shortest_edge": 24}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}}, (48, 24)),
        ({"size": {"height": 24, "width": 24}, "do_center_crop": True, "crop_size": 16}, (24, 24)),
        ({"size": {"height": 16, "width": 16}, "do_center_crop": True, "crop_size": 16}, (16, 16)),
        ({"size": {"height": 16, "width": 16}}, (16, 16)),
    ],
)
def test_geometry_is_the_models_own(
    given: dict[str, Any], resized: tuple[int, int], tmp_path: Path, wide: Path
) -> None:
    torch.testing.assert_close(seen(loaded(tmp_path, **given), wide), expected(wide, resized), atol=0.12, rtol=0)


def test_a_model_that_resizes_nothing_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="says do_resize: false"):
        loaded(tmp_path, do_resize=False)


@pytest.mark.parametrize(("mode", "share"), [("squash", 1.0), ("squash", 0.5), ("center", 0.5), ("border", 1.0)])
def test_geometry_of_timm(mode: str, share: float, tmp_path: Path, wide: Path) -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_vit", num_classes=3, img_size=32)
    own = {"crop_mode": mode, "crop_pct": share, "mean": BASE["image_mean"], "std": BASE["image_std"]}
    own |= {"input_size": (3, 32, 32), "interpolation": "bilinear"}
    timm.models.save_for_hf(net, str(tmp_path / "t"), model_config={"pretrained_cfg": own}, safe_serialization=True)
    file = tmp_path / "t" / "config.json"
    config = json.loads(file.read_text())
    config["pretrained_cfg"] = {**config.get("pretrained_cfg", {}), **own}
    config["model_args"] = {"img_size": 32}
    file.write_text(json.dumps(config))
    if mode == "border":
        with pytest.warns(UserWarning, match="timm pads its pictures"):
            load_backbone(f"folder:{tmp_path / 't'}")
        return
    side = int(32 / share)
    resized = (side, side) if mode == "squash" else (2 * side, side)
    found = seen(load_backbone(f"folder:{tmp_path / 't'}"), wide)
    torch.testing.assert_close(found, expected(wide, resized, 32), atol=0.12, rtol=0)
