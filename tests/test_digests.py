"""Small recipes over all methods, pets and heads give the values of before: a change of structure moves no bit.

`digests.json` holds, for each recipe, a hash of all tensors of the last task's folder, whatever their names, and one of
every task's counts. Bits depend on the processor and on torch's version, so elsewhere the norms of the tensors are
compared instead. To record anew after a wanted change of values: `python tests/test_digests.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load, load_file, save_file
from test_language_run import MAKERS, write
from tiny import picture, recipe, split_folder, tiny_language_model, vit_folder

from perpetune.drifting import SAMPLE
from perpetune.errors import Interrupted
from perpetune.learner import Learner
from perpetune.runtime import Silent
from perpetune.state import State

RECORDED = Path(__file__).with_name("digests.json")
STATES = Path(__file__).with_name("states")
STORED = (
    *("finetune-lora-ridge-protected", "finetune-lora-renewed", "safe-lora-ridge", "olora", "treelora-routed"),
    "pool-means",
)
"""Recipes whose states were kept, as commit da0fa94 wrote them, and eeadf62 the pool; they are not recorded anew."""
NEAR = 0.02  # how far a norm may be from the recorded one on another processor, as a share

RIDGE = {"name": "ridge", "projection": 40}
PICTURES: dict[str, dict[str, Any]] = {
    "finetune-lora-linear": {},
    "finetune-lora-ridge-protected": {"head": RIDGE, "protect": {"energy": 0.9}},
    "finetune-adapter-ncm-protected": {"pet": "adapter", "head": "ncm", "protect": True},
    "finetune-prefix-cosine-protected": {"pet": "prefix", "head": "cosine", "protect": True},
    "finetune-prompt-protected": {"pet": "prompt", "protect": True},
    "finetune-shallow-prompt": {"pet": {"name": "prompt", "at": "block", "deep": False}, "head": "ncm"},
    "finetune-ssf": {"pet": "ssf"},
    "finetune-lora-renewed": {"protect": {"renew": True, "start": "leading"}, "head": "ncm"},
    "finetune-lora-merged": {
        "method": {"name": "finetune", "merge": "falling", "head_first": 0.5},
        "protect": {"energy": 0.9},
    },
    "finetune-taps-carried": {"backbone.taps": 2, "head": {"name": "ridge", "carry": True}},
    "frozen-taps-ridge": {"method": "frozen", "pet": "none", "backbone.taps": 2, "head": "ridge"},
    "first-session-concat-ncm": {"method": {"name": "first_session", "concat": True}, "head": "ncm"},
    "safe-lora-ridge": {"method": "safe", "head": RIDGE},
    "safe-adapter-protected": {"method": "safe", "pet": "adapter", "head": "ncm", "protect": True},
    "olora": {"method": "olora"},
    "treelora-routed": {"method": "treelora"},
    "treelora-merged-budget": {
        "method": {"name": "treelora", "answer": "merged", "budget": 2, "start": "fresh"},
        "head": "ncm",
    },
    "pool-means": {"method": {"name": "pool", "select": "means"}, "head": RIDGE},
    "joint": {"method": "joint"},
}
TEXTS: dict[str, dict[str, Any]] = {
    "lm-finetune-protected": {"protect": {"energy": 0.9}},
    "lm-finetune-adapter": {"pet": {"name": "adapter", "width": 4}},
    "lm-olora": {"method": "olora"},
    "lm-treelora-routed": {"method": "treelora"},
    "lm-renewed": {"protect": {"renew": True}},
}
STOPPED = {"finetune-lora-ridge-protected", "safe-lora-ridge", "treelora-routed", "finetune-lora-renewed", "lm-olora"}
"""Recipes that are stopped in the second task and resumed."""


class StopsOnce(Silent):
    """Asks for a stop after a step in the middle of the second task, once."""

    index, asked = 0, False

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        self.index = index

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        if self.index == 1 and done == 2 and not self.asked:
            self.asked = True
            os.kill(os.getpid(), signal.SIGTERM)


class Workshop:
    """The small models and data that all recipes share."""

    def __init__(self, root: Path):
        self.root = root
        self.vit = vit_folder(root / "vit", blocks=2)
        self.llama = tiny_language_model(root / "llama", "llama")
        self.pictures = split_folder(root / "pictures", "abcdef", 8, 4)
        for name, make in MAKERS.items():
            write(root / "texts" / name / "train.jsonl", make(range(11)))
            write(root / "texts" / name / "test.jsonl", make(range(100, 105)))

    def recipe(self, name: str) -> dict[str, Any]:
        if name in PICTURES:
            changes = dict(PICTURES[name])
            taps = changes.pop("backbone.taps", None)
            content = recipe(self.vit, self.pictures, **changes)
            if taps is not None:
                content["backbone"] = {"name": content["backbone"], "taps": taps}
            return content
        content = {
            "name": "tiny",
            "setting": "task",
            "backbone": f"hf:{self.llama}",
            "pet": {"name": "lora", "at": ["q", "v"], "rank": 2},
            "head": "lm",
            "train": {"epochs": 2, "batch_size": 4, "lr": 0.01, "head_lr": 0.01},
            "data": {"name": "text", "path": str(self.root / "texts")},
            "run": {"device": "cpu"},
        }
        return {**content, **TEXTS[name]}

    def digest(self, name: str) -> dict[str, Any]:
        """Run the recipe, and say what came out."""
        with tempfile.TemporaryDirectory() as folder:
            path, content = Path(folder) / "state", self.recipe(name)
            content["run"] = {**content["run"], "checkpoint_every": 1}
            if name in STOPPED:
                with pytest.raises(Interrupted):
                    Learner(content, path, progress=StopsOnce()).run()
                Learner.load(path).resume()
            else:
                Learner(content, path).run()
            state = State(path)
            last = state.committed[-1].read()
            last.pop(SAMPLE)  # it follows from features, which are among the others
            tensors = [t for n in sorted(last) if n.endswith(".safetensors") for t in load(last[n]).values()]
            counts = json.dumps([task.json("metrics.json")["cells"] for task in state.committed], sort_keys=True)
            hashes = sorted(hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for t in tensors)
            return {
                "weights": hashlib.sha256("".join(hashes).encode()).hexdigest()[:16],
                "counts": hashlib.sha256(counts.encode()).hexdigest()[:16],
                "numbers": sum(t.numel() for t in tensors),
                "norm": float(sum(t.double().square().sum() for t in tensors).sqrt()),  # type: ignore[union-attr]
            }


def old_state(name: str, root: Path, vit: Path) -> tuple[Path, torch.Tensor]:
    """A state that an earlier version wrote, unpacked, on the backbone at `vit`; what it predicted then."""
    with zipfile.ZipFile(STATES / f"{name}.zip") as packed:
        packed.extractall(root)
    recipe_file = root / "recipe.yaml"
    recipe_file.write_text(recipe_file.read_text().replace("VIT", str(vit)))
    backbone = root / "backbone.json"
    backbone.write_text(backbone.read_text().replace("VIT", str(vit)))
    return root, load_file(root / "scores.safetensors")["scores"]


def asked() -> torch.Tensor:
    """Pictures that old states were asked, uint8 `(12, 3, H, W)`."""
    found = [numpy.asarray(picture(label, 2000 + n)) for label in "abcdef" for n in range(2)]
    return torch.from_numpy(numpy.stack(found)).permute(0, 3, 1, 2)


@torch.no_grad()
def scores(state: Path) -> torch.Tensor:
    return Learner.load(state).method.predict(asked()).contiguous()


def machine() -> str:
    """What bits depend on: the processor and torch."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("digests"))


ALIKE = {  # what another recipe here has as well, beside something else
    "finetune-lora-linear",
    "finetune-prompt-protected",
    "frozen-taps-ridge",
    "safe-adapter-protected",
    "treelora-routed",
    "lm-finetune-adapter",
    "lm-renewed",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in [*PICTURES, *TEXTS]]
)
def test_no_bit_has_moved_since_it_was_recorded(name: str, workshop: Workshop) -> None:
    recorded = json.loads(RECORDED.read_text())
    then, now = recorded["recipes"][name], workshop.digest(name)
    assert now["numbers"] == then["numbers"]
    assert now["norm"] == pytest.approx(then["norm"], rel=NEAR)
    if machine() == recorded["machine"]:
        assert (now["weights"], now["counts"]) == (then["weights"], then["counts"])


@pytest.mark.parametrize("name", STORED)
def test_a_state_of_an_earlier_version_loads_and_answers_as_then(name: str, workshop: Workshop, tmp_path: Path) -> None:
    folder, then = old_state(name, tmp_path, workshop.vit)
    torch.testing.assert_close(scores(folder), then, rtol=1e-3, atol=1e-3)


def test_a_pool_of_an_earlier_version_goes_on(workshop: Workshop, tmp_path: Path) -> None:
    """Its members stay where they are, and the state can be pruned to the new task. Each index listed all members then,
    with no hash, and each member had a piece for each tensor."""
    folder, _ = old_state("pool-means", tmp_path / "state", workshop.vit)
    learner = Learner.load(folder)
    before = scores(folder)
    learner.learn(split_folder(tmp_path / "more", "gh", 8, 4), name="g-h")
    now = State(folder).committed[-1]
    held = {name: (rest.task, bool(rest.sha256)) for name, rest in now.rest().items()}
    assert held == {"task-0": (0, False), "task-1": (1, False), "task-2": (2, False), "task-3": (3, True)}
    after = scores(folder)
    learner.prune(1)
    assert torch.equal(scores(folder), after)
    assert State(folder).committed[-1].rest() == now.rest()
    shutil.rmtree(folder)
    goes_on_and_back("pool-means", workshop, tmp_path, after, before)


def goes_on_and_back(name: str, workshop: Workshop, tmp_path: Path, after: torch.Tensor, before: torch.Tensor) -> None:
    """The old state learns the fourth task in one go and answers as `after`; rolled back it answers as `before`."""
    again, _ = old_state(name, tmp_path / "state", workshop.vit)
    Learner.load(again).learn(tmp_path / "more", name="g-h")
    assert torch.equal(scores(again), after)
    with State(again).writing():
        State(again).rollback("e-f")
    assert torch.equal(scores(again), before)


def test_a_changed_value_is_noticed(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = workshop.recipe("finetune-lora-linear")
    changed["train"] = {**changed["train"], "lr": 0.0101}
    monkeypatch.setattr(workshop, "recipe", lambda name: changed)
    then = json.loads(RECORDED.read_text())["recipes"]["finetune-lora-linear"]
    assert workshop.digest("finetune-lora-linear")["weights"] != then["weights"]


def test_treelora_of_an_earlier_version_goes_on(workshop: Workshop, tmp_path: Path) -> None:
    """Adapters, signatures and distances lay in one file then, and the tree in the extra state. Each is stored with its
    task from the next one on, and the state can be pruned to that."""
    folder, _ = old_state("treelora-routed", tmp_path / "state", workshop.vit)
    learner, before = Learner.load(folder), scores(folder)
    learner.learn(split_folder(tmp_path / "more", "gh", 8, 4), name="g-h")
    after = scores(folder)
    assert torch.equal(after, learner.method.predict(asked()))
    with State(folder).writing():
        State(folder).prune(1)
    assert torch.equal(scores(folder), after)
    files = State(folder).committed[-1].read()
    for task in range(4):
        assert f"similar.{task}-signature" in load(files[f"rest-task-{task}.safetensors"])
    shutil.rmtree(folder)
    goes_on_and_back("treelora-routed", workshop, tmp_path, after, before)


def keep_state(shop: Workshop, name: str) -> None:
    """Write a state that a later version will have to load; only for a version whose states were never kept."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        Learner(shop.recipe(name), path).run()
        save_file({"scores": scores(path)}, path / "scores.safetensors")
        STATES.mkdir(exist_ok=True)
        with zipfile.ZipFile(STATES / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as packed:
            for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("report.")):
                content = file.read_bytes()
                if file.name == "recipe.yaml":
                    content = content.replace(str(shop.vit).encode(), b"VIT")
                if file.name == "backbone.json":  # the rest of it stands in the folders of tasks too, as it is
                    about = json.loads(content)
                    content = json.dumps({**about, "spec": about["spec"].replace(str(shop.vit), "VIT")}).encode()
                packed.writestr(str(file.relative_to(path)), content)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        shop = Workshop(Path(root))
        found = {name: shop.digest(name) for name in [*PICTURES, *TEXTS]}
        for missing in [name for name in STORED if not (STATES / f"{name}.zip").exists()]:
            keep_state(shop, missing)
    RECORDED.write_text(json.dumps({"machine": machine(), "recipes": found}, indent=1) + "\n")
    sys.stdout.write(f"recorded {len(found)} recipes on {machine()}\n")
