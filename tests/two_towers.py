"""A tiny backbone with a tower for pictures and one for texts, as another package brings it, and a head that reads
names; for tests of what compares pictures with texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plugin_towers import Twins
from tiny import picture, recipe
from torch import Tensor
from torch.nn import functional as F

from perpetune import Backbone, Head
from perpetune.data.pictures.view import PictureView
from perpetune.tasks import Inputs


class Side:
    """Texts as bytes, padded on the right; the last byte's state is the feature."""

    bias = None

    def __init__(self, net: Twins) -> None:
        self.net, self.scale, self.encoded = net, torch.tensor(7.0), 0

    def fingerprint(self) -> str:
        return "bytes"

    def state(self) -> tuple[Any, ...]:
        return ()

    def inputs(self, strings: Sequence[str], device: Any = None) -> Inputs:
        rows = [[byte % 128 for byte in text.encode()] for text in strings]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return Inputs(ids=ids, mask=torch.tensor([[i < len(row) for i in range(width)] for row in rows]))

    def encode(self, inputs: Inputs) -> Tensor:
        self.encoded += len(inputs)
        states = self.net.ear(input_ids=inputs.ids, attention_mask=inputs.mask.long()).last_hidden_state
        return states[torch.arange(len(states)), inputs.mask.sum(1) - 1]

    def of(self, strings: Sequence[str], batch: int = 64) -> Tensor:
        parts = [strings[start : start + batch] for start in range(0, len(strings), batch)]
        return torch.cat([self.encode(self.inputs(part)) for part in parts])


def load_pair(rest: str) -> Backbone:
    """`duo:NAME`: a vision transformer and a language model, with features in one space."""
    net = Twins(128)
    backbone = Backbone(net, spec=f"duo:{rest}", dim=16, preprocess=PictureView(16))
    backbone.texts = Side(net)  # type: ignore[assignment]
    return backbone


class Names(Head):
    """A class's score is the scaled cosine of a picture and `a photo of a NAME.`; it trains nothing of its own."""

    any_class = True

    @classmethod
    def of(cls, backbone: Any, **options: Any) -> Head:
        head: Any = cls(backbone.dim, **options)
        head.side = [backbone.texts]
        return head

    def forward(self, features: Tensor) -> Tensor:
        return self.among(features, self.classes)

    def among(self, features: Tensor, classes: Sequence[str]) -> Tensor:
        side = self.side[0]
        words = F.normalize(side.of([f"a photo of a {name}." for name in classes]), dim=-1)
        return side.scale * F.normalize(features, dim=-1) @ words.T

    def resize(self, rows: int, generator: torch.Generator) -> None: ...


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `duo:` a prefix of backbones until the test ends."""
    info = folder / "site" / "duo-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: duo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[perpetune.backbones]\nduo = {__name__}:load_pair\n")
    monkeypatch.syspath_prepend(str(folder / "site"))


def plan(folder: Path, data: Path | dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    """A recipe on `duo:` with LoRA in both towers."""
    pet = {"name": "lora", "at": ["picture.v", "picture.fc1", "text.v", "text.fc1"], "rank": 4}
    given = recipe(folder, data if isinstance(data, Path) else None, pet=pet, head=f"{__name__}:Names", **changes)
    if isinstance(data, dict):
        given["data"] = data
    return given | {"backbone": "duo:tiny"}


def caption_file(folder: Path, names: Sequence[str], each: int, tests: int = 2, name: str = "captions.jsonl") -> Path:
    """Pictures of patterns, each with the captions `a photo of a NAME.` and `one NAME, number N`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for label in names:
        for number in range(each + tests):
            place = f"{label}-{number}.png"
            picture(label, number).save(folder / place)
            captions = [f"a photo of a {label}.", f"one {label}, number {number}"]
            split = "train" if number < each else "test"
            lines.append({"image": place, "captions": captions, "split": split})
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name
