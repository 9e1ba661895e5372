"""Every method on a backbone with taps: it keeps its contract, and its head is as wide as what is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import chiefly
from torch import Tensor

from perpetune import check
from perpetune.check import Checker, check_method, tiny_stream
from perpetune.heads.base import Head
from perpetune.learning import learn_protected
from perpetune.models.backbone import Backbone
from perpetune.models.classifier import Classifier
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime

TAPS = 2
WIDTH = TAPS * 2 * 32  # class token and mean of patches behind each of two blocks of width 32

METHODS: list[tuple[str, tuple[str, ...]]] = [
    ("finetune", ()),
    ("finetune", ("head=ridge", "protect=true")),
    ("frozen", ("head=ridge", "pet=none")),
    ("first_session", ("head=ridge",)),
    ("first_session", ("head=ridge", "concat=true")),
    ("safe", ("head=ridge",)),
    ("treelora", ("head=ncm",)),
    ("joint", ("head=ridge",)),
]
every_method = pytest.mark.parametrize(
    ("method", "changes"), METHODS, ids=lambda v: v if isinstance(v, str) else "+".join(v)
)


@pytest.fixture(autouse=True)
def tapped(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = check.tiny_backbone

    def made() -> Backbone:
        return plain().tap(TAPS)

    monkeypatch.setattr("perpetune.check.pictures.tiny_backbone", made)


@pytest.mark.parametrize(("method", "changes"), chiefly(METHODS, [METHODS[4], METHODS[6]]))
def test_every_method_keeps_the_contract(method: str, changes: tuple[str, ...]) -> None:
    faults = [f"{o.rule}: {o.fault}" for o in check_method(method, changes) if o.fault is not None]
    assert faults == []


@every_method
def test_heads_are_as_wide_as_what_is_read(method: str, changes: tuple[str, ...]) -> None:
    options: dict[str, Any] = {"name": method}
    content: dict[str, Any] = {"pet": {"name": "lora", "rank": 2}, "train": {"epochs": 1, "batch_size": 8}}
    for change in changes:
        key, _, value = change.partition("=")
        (content if key in ("head", "pet", "protect") else options)[key] = value if value != "true" else True
    checker = Checker(make_recipe({**content, "method": options}))
    made = checker.make()
    for task in tiny_stream(Runtime()) if not made.needs_earlier_data else ():
        learn_protected(made, task)
    twice = 2 if "concat=true" in changes else 1
    widths = {m.dim for m in made.modules() if isinstance(m, Head)}
    assert twice * WIDTH in widths
    assert widths <= {WIDTH, twice * WIDTH, WIDTH // TAPS}, "probes read the last block alone"
    assert (WIDTH // TAPS in widths) == any(hasattr(m, "probe") for m in made.modules() if isinstance(m, Head))
    assert isinstance(made.model, Classifier)
    found = made.features(torch.stack(check.Pictures("ab", 2, seed=3).pixels))
    assert found.shape[1] in (twice * WIDTH, 2 * WIDTH)


def test_tuning_moves_what_is_read_behind_every_block() -> None:
    checker = Checker(make_recipe({"method": "finetune", "pet": {"name": "lora", "rank": 2}, "train": {"epochs": 2}}))
    method = checker.make()
    pixels = torch.stack(check.Pictures("ab", 2, seed=3).pixels)

    def blocks() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return method.features(pixels).chunk(TAPS, 1)

    before = blocks()
    learn_protected(method, tiny_stream(Runtime())[0])
    for one, other in zip(before, blocks(), strict=True):
        assert not torch.equal(one, other)
