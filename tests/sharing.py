"""What `test_sharded.py` runs in each of several processes: `sharing.py PART FOLDER`, by FOLDER/recipes.json.

Each process writes what it saw to FOLDER/PART-RANK.json. No process imports what the others do not need.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import warnings
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import perpetune
from perpetune.errors import PerpetuneError, UsageError
from perpetune.learner import Learner
from perpetune.meeting import Meeting, meeting
from perpetune.protection.dropin import DropIn
from perpetune.runtime import Runtime, Silent
from perpetune.seeding import generator, own_global_state
from perpetune.snapshot import snapshot

Seen = dict[str, Any]


class KilledAt(Silent):
    """Kills this process at a step of the second task."""

    index = -1

    def __init__(self, step: int):
        self.at = step

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        self.index = index

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        if self.index == 1 and done == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def learned(learner: Learner) -> Seen:
    """What a learner knows, and how much of its frozen model lies here."""
    found: Seen = {
        "tensors": {file: sha256(content).hexdigest() for file, content in snapshot(learner.method).items()},
        "evaluated": learner.evaluate(),
        "fingerprint": learner.backbone.fingerprint() == learner.state.backbone["fingerprint"],
    }
    if (sharded := learner.backbone.sharded) is not None:
        found |= {"here": sharded.here, "all": sharded.all, "units": len(sharded.units)}
        local = [p.to_local() if hasattr(p, "to_local") else p for p in learner.backbone.net.parameters()]
        pets = {p for name, p in learner.backbone.net.named_parameters() if ".pets." in name}
        own = [q for p, q in zip(learner.backbone.net.parameters(), local, strict=True) if p not in pets]
        found["counted"] = sum(p.numel() * p.element_size() for p in own)
    return found


def counts() -> tuple[int, int, int]:
    """How many words this process has said, parts it has sent, and how many of these it did not need."""
    return meeting.words, meeting.sent, meeting.helped


def learns(folder: Path, recipes: dict[str, Any], rank: int) -> Seen:
    """Each recipe with the model cut, and the first also with a whole model in each process."""
    seen: Seen = {}
    for name, content in recipes.items():
        for how in ("fsdp", "none") if name == "pictures" else ("fsdp",):
            begun = counts()
            run = {**content["run"], "shard": how}
            learner = Learner({**content, "run": run}, folder / f"{name}-{how}")
            learner.run()
            spent = [now - then for now, then in zip(counts(), begun, strict=True)]
            seen[f"{name}-{how}"] = {**learned(learner), "counts": spent}
    return seen


def killed(folder: Path, recipes: dict[str, Any], rank: int) -> Seen:
    """The second process dies inside the second task, and the first one ends in an error."""
    learner = Learner(recipes["stopped"], folder / "killed")
    if rank == 1:
        learner.runtime.progress = KilledAt(3)
    try:
        learner.run()
    except PerpetuneError as error:
        return {"error": str(error)}
    return {}


def resumed(folder: Path, recipes: dict[str, Any], rank: int) -> Seen:
    """Goes on after `killed`, opens what three processes learned, and ends while the other process still predicts."""
    whole = Learner(recipes["stopped"], folder / "whole")
    whole.run()
    again = Learner.load(folder / "killed")
    again.resume()
    of_three = Learner.load(folder / "pictures-fsdp")
    seen: Seen = {"whole": learned(whole), "resumed": learned(again), "evaluated": of_three.evaluate()}
    if rank == 0:
        pictures = sorted((folder / "data" / "test").rglob("*.png"))
        seen["predicted"] = [p.classes for p in of_three.predict(pictures)]
        try:
            of_three.runtime.wait()
        except PerpetuneError as error:
            seen["error"] = str(error)
    else:
        atexit._run_exitfuncs()  # as an interpreter does that ends; a fork of `warm` leaves it out
    return seen


def adapted() -> nn.Module:
    """Two frozen layers with LoRA by PEFT."""
    from peft import LoraConfig, get_peft_model

    with own_global_state("sharing"):
        net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5))
        model: nn.Module = get_peft_model(net, LoraConfig(r=3, target_modules=["0", "2"]))
    return model


def rows(task: int) -> Tensor:
    """Seven rows of a task."""
    return torch.randn(7, 6, generator=generator("rows", task)) * torch.linspace(2, 0.1, 6).roll(3 * task)


def drop_in(how: str, rank: int, world: int) -> tuple[list[nn.Parameter], DropIn, nn.Module]:
    """Two tasks in a loop of one's own, with renewed pairs; the gradients of all processes are summed.

    Args:
        how: `fsdp` cuts what is frozen, `zero` the optimizer, `both` does both.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    protection = perpetune.protect(model, energy=0.8, renew=True)
    if how in ("fsdp", "both"):
        fully_shard(model, ignored_params=set(trained))
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    optimizer = (
        ZeroRedundancyOptimizer(trained, torch.optim.AdamW, **settings)
        if how in ("zero", "both")
        else torch.optim.AdamW(trained, **settings)
    )
    protection.guard(optimizer)
    for task in range(2):
        protection.renew()
        mine = rows(task)[rank::world]
        for _ in range(3):
            optimizer.zero_grad()
            loss: Tensor = (model(mine) - 1).square().sum() / 35
            loss.backward()
            for p in trained if world > 1 else ():
                assert p.grad is not None
                torch.distributed.all_reduce(p.grad)
            optimizer.step()
        # Four batches in the first process and three in the second
        protection.consolidate(mine.split(1))
    return trained, protection, model


def guards(folder: Path, recipes: dict[str, Any], rank: int) -> Seen:
    """The drop-in with optimizers and models that are cut; what was learned is written by the first process."""
    from torch.distributed.fsdp import fully_shard

    Runtime().wait()
    seen: Seen = {}
    for how in ("fsdp", "zero", "both"):
        trained, protection, model = drop_in(how, rank, 2)
        with torch.no_grad():
            before = model(rows(0))
            protection.merge_rest()
            seen[how] = float((model(rows(0)) - before).abs().max())
        found = {f"trained.{i}": p.detach().contiguous() for i, p in enumerate(trained)}
        found |= {k: t.contiguous() for k, t in protection.state_dict().items() if isinstance(t, Tensor)}
        save_file(found, folder / f"guards-{how}-{rank}.safetensors")
    late, early = adapted(), adapted()
    protection = perpetune.protect(late)
    for model in (late, early):
        fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in late.parameters() if p.requires_grad])
    for name, guarded in {"guard": True, "protect": False}.items():
        try:
            protection.guard(optimizer) if guarded else perpetune.protect(early)
        except UsageError as error:
            seen[name] = str(error)
    few = adapted()
    protection = perpetune.protect(few)
    fully_shard(few, ignored_params={p for p in few.parameters() if p.requires_grad})
    try:
        protection.consolidate([rows(0)] if rank == 0 else [])
    except UsageError as error:
        seen["few"] = str(error)
    return seen


def unsaid(folder: Path, recipes: dict[str, Any], rank: int) -> Seen:
    """A control: no process says what it needs, and the first asks the model once more than the second."""
    learner = Learner.load(folder / "pictures-fsdp")
    Meeting._next = lambda self, word: word if word >= 0 else None  # type: ignore[method-assign]
    inputs = learner.backbone.empty()
    assert inputs is not None
    try:
        for _ in range(2 - rank):
            learner.backbone.features(inputs)
        learner.runtime.sum(torch.ones(1))
    except RuntimeError as error:
        os.write(2, str(error).encode())
        return {"error": "no answer"}
    return {}


PARTS = {part.__name__: part for part in (learns, killed, resumed, guards, unsaid)}


def main(part: str, folder: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if part == "unsaid":
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=3))
    rank = Runtime().rank
    recipes = json.loads((folder / "recipes.json").read_text())
    seen = PARTS[part](folder, recipes, rank)
    (folder / f"{part}-{rank}.json").write_text(json.dumps(seen))
    if part == "unsaid":
        os._exit(0)  # there is nobody left to say goodbye to


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
