"""How exact products are: a model computes in the precision of the run, and sums, penalties and projections do not."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from test_waits import made
from torch.utils._python_dispatch import TorchDispatchMode

from perpetune.build import build_runtime
from perpetune.check import waits as seen
from perpetune.check.waits import DEVICE, on_stand
from perpetune.errors import UsageError
from perpetune.learning import learn_protected
from perpetune.methods.base import Method
from perpetune.numerics.exact import exactly, shortened
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime
from perpetune.tasks import Task

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot", "convolution", "addr"}
PASS = ("models/", "pets/", "heads/linear", "heads/cosine", "fit.py", "methods/parts/probe")
"""Where products of a model and its backward pass stand. Anything else has to be exact."""


class Products(TorchDispatchMode):
    """Notes the type, the switch of TF32 and the place of each product."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, torch.dtype, bool]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::").rstrip("_")
        if name in PRODUCTS:
            switches = torch.backends.cudnn if name == "convolution" else torch.backends.cuda.matmul
            self.found.add((seen._where().split(":")[0], args[0].dtype, switches.allow_tf32))
        return func(*args, **(kwargs or {}))


def products(method: Method, tasks: list[Task], **runtime: Any) -> set[tuple[str, torch.dtype, bool]]:
    for task in tasks:
        vars(task.runtime).update(runtime)
        with Products() as noted:
            learn_protected(method, task, batch_size=4)
    return noted.found


METHODS: dict[str, dict[str, Any]] = {
    "ridge": {"head": {"name": "ridge", "projection": 64}, "protect": {"energy": 0.9}, "method": "first_session"},
    "treelora": {"method": "treelora"},
    "olora": {"method": {"name": "olora", "orthogonality": 0.5}},
    "safe": {"method": "safe", "head": "ridge"},
}


@pytest.mark.parametrize("name", ["olora", *(pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n != "olora")])
def test_tf32_is_for_passes_alone(name: str) -> None:
    method, tasks = made("pictures", METHODS[name])
    with seen.Waits():
        on_stand(method)
        found = products(method, tasks, device=DEVICE, precision="tf32")
    short = {place for place, dtype, tf32 in found if tf32 and dtype != torch.float64}
    assert short, "control: the model itself computes in TF32"
    assert [place for place in short if not place.startswith(PASS)] == []
    assert any(not place.startswith(PASS) for place, _, _ in found), "control: there are products elsewhere"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32, "torch's own choice is back"


def test_bf16_is_for_passes_alone() -> None:
    changes = {**METHODS["ridge"], "method": {"name": "finetune"}, "protect": {"energy": 0.9}}
    method, tasks = made("pictures", changes)
    found = products(method, tasks[:1], precision="bf16")
    coarse = {place for place, dtype, _ in found if dtype == torch.bfloat16}
    assert any(place.startswith("pets/") for place in coarse), "control: the model computes in 16 bits"
    assert [place for place in coarse if not place.startswith(PASS)] == []
    sums = {dtype for place, dtype, _ in found if place == "numerics/ridge.py" or place == "numerics/moments.py"}
    assert sums == {torch.float64}


def test_steps_are_projected_exactly_whatever_the_user_has_set() -> None:
    method, tasks = made("pictures", {"protect": {"energy": 0.9}})
    with seen.Waits(), shortened(True):
        on_stand(method)
        found = products(method, [tasks[0], tasks[0]], device=DEVICE)
    guard = {short for place, _, short in found if place == "numerics/projection.py"}
    assert guard == {False}
    passes = {short for place, _, short in found if place.startswith(PASS)}
    assert passes == {False}, "precision `no` is float32 in passes too"


def test_the_switch_goes_back_after_an_error() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with contextlib.suppress(ValueError), shortened(True), exactly(DEVICE):
        assert not torch.backends.cuda.matmul.allow_tf32
        raise ValueError
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_only_a_gpu_has_tf32(tmp_path: Path) -> None:
    recipe = make_recipe({"name": "t", "data": None, "run": {"device": "cpu", "precision": "tf32"}})
    with pytest.raises(UsageError, match="only NVIDIA GPUs have it"):
        build_runtime(recipe)
    with Runtime(precision="tf32").autocast():
        assert not torch.backends.cuda.matmul.allow_tf32
