"""What the loop over tasks does with a checkpoint whose recipe has changed since."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from perpetune.errors import Interrupted
from perpetune.learner import Learner
from perpetune.runtime import Silent

RECIPE = {
    "backbone": "perpetune:micro",
    "pet": {"name": "lora", "rank": 2, "blocks": [-1]},
    "train": {"epochs": 2, "batch_size": 4, "lr": 0.01},
    "data": "digits",
    "stream": {"classes_per_task": 2, "class_order": ["0", "1"], "train_per_class": 8, "test_per_class": 2},
    "run": {"device": "cpu", "checkpoint_every": 1},
}


class StopsAt(Silent):
    """A watcher that asks for a stop, as a scheduler does."""

    def __init__(self, step: int):
        self.at = step

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        if done == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def learned(folder: Path) -> bytes:
    return (folder / "tasks" / "0000-0-1" / "pet.safetensors").read_bytes()


def test_a_checkpoint_made_with_another_learning_rate_is_not_gone_on_with(tmp_path: Path) -> None:
    """The way out of a loss that is not finite is a lower `train.lr` in recipe.yaml, so the new one has to count."""
    with pytest.raises(Interrupted):
        Learner(RECIPE, tmp_path / "half", progress=StopsAt(3)).run()
    recipe = tmp_path / "half" / "recipe.yaml"
    text = recipe.read_text()
    assert "lr: 0.01" in text
    recipe.write_text(text.replace("lr: 0.01", "lr: 0.001"))
    Learner.load(tmp_path / "half").resume()
    Learner({**RECIPE, "train": {**RECIPE["train"], "lr": 0.001}}, tmp_path / "whole").run()
    assert learned(tmp_path / "half") == learned(tmp_path / "whole")
