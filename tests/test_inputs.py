"""What a model reads: named tensors by example, and bare tensors of images where people have no more."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from perpetune.check import SIZE, Checker, Pictures, tiny_stream
from perpetune.errors import UsageError
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime
from perpetune.tasks import Batch, Examples, Inputs, part, stack

IDS = torch.arange(12).view(3, 4)


def texts() -> Inputs:
    return Inputs(ids=IDS, mask=IDS > 0, labels=None, said=2)


def test_tensors_that_are_none_are_not_there() -> None:
    inputs = texts()
    assert list(inputs.tensors) == ["ids", "mask"]
    assert len(inputs) == 3
    assert "ids" in inputs
    assert "labels" not in inputs
    assert inputs.labels is None
    assert inputs.options is None
    with pytest.raises(UsageError, match="the model needs the input pixels, but the batch has only ids, mask"):
        _ = inputs.pixels


def test_rows_and_each_go_over_every_tensor() -> None:
    inputs = Inputs(ids=IDS, heat=IDS.float(), said=2).rows([2, 0])
    assert inputs.ids.tolist() == IDS[[2, 0]].tolist()
    assert inputs["heat"].tolist() == IDS[[2, 0]].tolist()
    assert inputs.said == 2
    assert inputs.each(lambda tensor: tensor + 1)["heat"].tolist() == (IDS[[2, 0]] + 1).tolist()


def test_a_loader_process_may_send_them() -> None:
    again: Inputs = pickle.loads(pickle.dumps(texts()))  # as torch's queues do
    assert torch.equal(again.ids, IDS)
    assert again.said == 2


def test_a_bare_tensor_is_taken_for_images() -> None:
    pixels = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)
    batch = Batch(pixels, torch.zeros(2))  # type: ignore[arg-type]
    assert batch.inputs.pixels is pixels
    assert batch.mask is None
    assert Inputs.of(batch.inputs) is batch.inputs


@pytest.mark.parametrize(
    "method", [{"name": "finetune"}, {"name": "safe"}, {"name": "olora"}, {"name": "treelora", "answer": "routed"}]
)
def test_methods_answer_to_a_bare_tensor_of_images(method: dict[str, Any]) -> None:
    train = {"epochs": 1, "batch_size": 8, "lr": 0.01}
    head = "ridge" if method["name"] == "safe" else "linear"
    checker = Checker(make_recipe({"method": method, "pet": "lora", "head": head, "train": train}))
    learned = checker.learned(tiny_stream(Runtime(), (("a", "b"), ("c", "d"))))
    pixels = torch.stack(Pictures("abcd", 2, seed=9).pixels)
    with torch.no_grad():
        assert torch.equal(learned.predict(pixels), learned.predict(Inputs(pixels=pixels)))  # type: ignore[arg-type]
        assert torch.equal(learned.features(pixels), learned.features(Inputs(pixels=pixels)))  # type: ignore[arg-type]


class Plain(Examples):
    """As little as examples have to say."""

    targets = (0, 1, 1)

    def __len__(self) -> int:
        return 3

    def load(self, index: int, seed: int | None) -> torch.Tensor:
        return torch.full((3, 2, 2), index, dtype=torch.uint8)


def test_examples_have_defaults() -> None:
    plain = Plain()
    assert (plain.deterministic, plain.weights, plain.lengths) == (False, None, None)
    assert plain.questions() is plain
    assert plain.weight([0, 2]) == 2.0
    with pytest.raises(UsageError, match="not texts"):
        plain.text(0)
    items = [(plain.load(i, None), plain.targets[i], i) for i in range(3)]
    assert torch.equal(plain.collate(items).inputs.pixels, stack(items).inputs.pixels)


def test_picked_examples_have_those_of_their_sets() -> None:
    whole = Plain()
    whole.weights, whole.lengths, whole.deterministic = [1, 2, 4], [10, 20, 30], True
    some = part(whole, [2, 0])
    assert (some.weights, some.lengths, some.deterministic) == ([4, 1], [30, 10], True)
    assert some.weight([0, 1]) == 5.0
    assert part(Plain(), [2, 0]).weights is None
