"""Small things that tests are made of: a transformer in a folder, pictures in folders, a recipe over both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perpetune.seeding import numpy_generator, own_global_state

SIZE = 16


def vit_folder(path: Path, seed: int = 0) -> Path:
    """A transformer of one block and width 16 in transformers' layout, its weights drawn by `seed`."""
    from transformers import ViTConfig, ViTModel
    from transformers.utils import logging

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=SIZE, patch_size=8
    )
    logging.disable_progress_bar()
    with own_global_state("tiny", seed):
        ViTModel(config, add_pooling_layer=False).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": SIZE, "width": SIZE}}))
    return path


def picture(label: str, number: int, domain: str = "") -> Image.Image:
    """A noisy picture whose pattern its label decides, and whose brightness its domain."""
    pattern = numpy_generator("pattern", label).integers(0, 200, (4, 4, 3)).repeat(4, 0).repeat(4, 1)
    shift = numpy_generator("domain", domain).integers(0, 40) if domain else 0
    noise = numpy_generator("noise", label, domain, number).integers(-15, 16, pattern.shape)
    return Image.fromarray((pattern + shift + noise).clip(0, 255).astype(np.uint8))


def picture_folder(
    path: Path, classes: Sequence[str], each: int | Sequence[int], domain: str = "", first: int = 0
) -> Path:
    """`path/CLASS/N.png`, `each` (of each class, if it is a list) pictures numbered from `first`."""
    counts = [each] * len(classes) if isinstance(each, int) else each
    for label, count in zip(classes, counts, strict=True):
        (path / label).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            picture(label, number, domain).save(path / label / f"{number}.png")
    return path


def split_folder(path: Path, classes: Sequence[str], train: int | Sequence[int], test: int) -> Path:
    """`path/train/CLASS/N.png` and `path/test/CLASS/N.png`."""
    picture_folder(path / "train", classes, train)
    picture_folder(path / "test", classes, test, first=1000)
    return path


def recipe(vit: Path, data: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Two classes a task in the order of their names, two epochs; `changes` replace whole sections."""
    content: dict[str, Any] = {
        "name": "tiny",
        "backbone": f"folder:{vit}",
        "pet": {"name": "lora", "rank": 2},
        "train": {"epochs": 2, "batch_size": 8, "lr": 0.01},
        "stream": {"classes_per_task": 2, "class_order": "sorted"},
        "run": {"device": "cpu"},
    }
    if data is not None:
        content["data"] = {"name": "folder", "path": str(data)}
    return {**content, **changes}
