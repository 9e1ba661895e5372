"""Another package adds a backbone with two towers, and a head that asks one of them, without touching the core."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import picture_folder, recipe, split_folder
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, ViTConfig, ViTModel

from perpetune import Backbone, Head, Learner
from perpetune.data.pictures.view import PictureView
from perpetune.errors import UsageError
from perpetune.heads import Borrowed
from perpetune.pets import parameters

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


class Twins(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.eye = ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8), add_pooling_layer=False)
        self.ear = LlamaModel(LlamaConfig(**SIZES, vocab_size=words))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.eye(pixel_values=pixels).last_hidden_state[:, 0]


def load_twins(rest: str, *, words: int = 128) -> Backbone:
    """`twins:NAME`: a vision transformer and a language model beside each other."""
    return Backbone(Twins(words), spec=f"twins:{rest}", dim=16, preprocess=PictureView(16))


class Named(Head):
    """A class's score is how near a picture is to its name, as the text tower reads that."""

    @classmethod
    def of(cls, backbone: Any, **options: Any) -> Head:
        head: Any = cls(backbone.dim, **options)
        head.tower = Borrowed(backbone.net.ear)
        return head

    def forward(self, features: Tensor) -> Tensor:
        ids = torch.tensor([list(name.encode()) for name in self.classes], device=features.device)
        return features @ self.tower(input_ids=ids).last_hidden_state[:, -1].T

    def resize(self, rows: int, generator: torch.Generator) -> None: ...


def test_a_run_with_pets_in_both_towers_learns_and_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "site" / "twins-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: twins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[perpetune.backbones]\ntwins = {__name__}:load_twins\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    names = ["cat", "elk", "fox", "owl"]
    pet = {"name": "lora", "at": ["text.q", "picture.q", "picture.v"], "rank": 2}
    pictures, head = split_folder(tmp_path / "pictures", names, 8, 4), f"{__name__}:Named"
    plan = recipe(tmp_path, pictures, pet=pet, head=head, protect=True) | {"backbone": "twins:tiny"}
    plan["train"] = {"epochs": 8, "batch_size": 8, "lr": 0.02}
    learner: Any = Learner(plan, tmp_path / "state")
    begun = [p.clone() for p in parameters(learner.method.model, "default")]
    results = learner.run()
    assert results["cells"][0][0]["correct"] >= 7  # of 8
    assert {site["site"].split(".")[3] for site in results["protection"][-1]["sites"]} == {"eye", "ear"}
    after, made = list(parameters(learner.method.model, "default")), learner.method.model.head
    assert len(after) == 12  # a down and an up at each of three roles in two blocks
    assert all(not torch.equal(a, b) for a, b in zip(begun, after, strict=True))
    assert (list(made.parameters()), copy.deepcopy(made).tower) == ([], made.tower)
    asked = sorted(picture_folder(tmp_path / "new", names, 1, first=50).rglob("*.png"))
    assert Learner.load(tmp_path / "state").predict(asked) == learner.predict(asked)
    for option, role, said in (
        ("wrods", "q", "closest: words, tokens, taps"),
        ("words", "sound.q", "no tower 'sound'"),
    ):
        with pytest.raises(UsageError, match=said):
            Learner(plan | {"backbone": {"name": "twins:tiny", option: 256}, "pet": {**pet, "at": role}})
