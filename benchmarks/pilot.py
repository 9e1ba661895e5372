"""Whole runs of classifiers from statistics beside the way in which PILOT does the same work, in one process, in turns.

    OMP_NUM_THREADS=1 python benchmarks/pilot.py --turns 3
    OMP_NUM_THREADS=1 python benchmarks/pilot.py --only ranpac-5000 --tasks 10

PILOT (github.com/sun-hailong/LAMDA-PILOT) is the toolbox in which SimpleCIL, APER and RanPAC are compared most often.
Its way is re-made here as bare torch loops, without its code: each task's training pictures pass the net once for the
statistics; after each task all test pictures so far are read and pass the net again; RanPAC sums in 32 bits and tries
17 penalties by a solve of M x M each; APER trains an adapter in the first task, asks all test pictures after each epoch
of it, and then reads pictures by two nets. perpetune's side is `Learner(recipe).run()`, with checks, evaluation,
drift and the commit of each task. Both read the same files, at one size, in this process, with the same net, epochs
and batch size. Prints JSON: `cpu_ratio` is PILOT's seconds of CPU over perpetune's, the median over the turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from perpetune.build import load_backbone
from perpetune.learner import Learner

BACKBONE = "perpetune:micro"
BATCH, EPOCHS, LR, WIDTH = 64, 5, 1.0e-2, 16
ADAPTER = {"name": "adapter", "at": ["mlp"], "width": WIDTH, "scale": 0.1}
PENALTIES = tuple(10.0**power for power in range(-8, 9))


class Pictures(Dataset[tuple[Tensor, int]]):
    """The files of some classes, decoded and resized each time they are asked for."""

    def __init__(self, folder: Path, part: str, classes: Sequence[str], size: int):
        from torchvision import transforms

        self.files = [
            (file, int(name[1:])) for name in classes for file in sorted((folder / part / name).iterdir())
        ]  # fmt: skip
        mean = [0.5] * 3
        steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize(mean, mean)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        file, label = self.files[index]
        with Image.open(file) as picture:
            return self.transform(picture.convert("RGB")), label


class Adapted(nn.Module):
    """A block's feed-forward part with an adapter beside it."""

    def __init__(self, inner: nn.Module, dim: int):
        super().__init__()
        self.inner, self.down, self.up = inner, nn.Linear(dim, WIDTH), nn.Linear(WIDTH, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) + 0.1 * self.up(F.relu(self.down(x)))
        return out


class Pilot:
    """What is common to the three methods."""

    def __init__(self, folder: Path, tasks: Sequence[Sequence[str]]):
        self.folder, self.tasks = folder, tasks
        self.backbone = load_backbone(BACKBONE)
        self.size = self.backbone.preprocess.size  # type: ignore[attr-defined]
        self.classes = sum(map(len, tasks))
        self.read: Callable[[Tensor], Tensor] = self.features_of(self.backbone.net)

    def features_of(self, net: nn.Module) -> Callable[[Tensor], Tensor]:
        forward = self.backbone._features
        return lambda pixels: forward(net, pixels)

    def loader(self, part: str, classes: Sequence[str], shuffle: bool) -> DataLoader[tuple[Tensor, int]]:
        return DataLoader(Pictures(self.folder, part, classes, self.size), batch_size=BATCH, shuffle=shuffle)

    @torch.no_grad()
    def gathered(self, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
        found = [(self.read(x), y) for x, y in self.loader("train", classes, True)]
        return torch.cat([f for f, _ in found]), torch.cat([y for _, y in found])

    @torch.no_grad()
    def accuracy(self, seen: Sequence[str], scores: Callable[[Tensor], Tensor]) -> float:
        right = total = 0
        for x, y in self.loader("test", seen, False):
            answers = scores(self.read(x)).topk(min(5, len(seen)), dim=1).indices[:, 0]
            right, total = right + int((answers == y).sum()), total + len(y)
        return right / total

    def run(self) -> list[float]:
        accuracies: list[float] = []
        for number, classes in enumerate(self.tasks):
            seen = [name for task in self.tasks[: number + 1] for name in task]
            if number == 0:
                self.first(classes)
            accuracies.append(self.accuracy(seen, self.learned(classes, len(seen))))
        return accuracies

    def first(self, classes: Sequence[str]) -> None:
        """What happens in the first task alone."""

    def learned(self, classes: Sequence[str], seen: int) -> Callable[[Tensor], Tensor]:
        raise NotImplementedError


class SimpleCIL(Pilot):
    weight: Tensor | None = None

    def learned(self, classes: Sequence[str], seen: int) -> Callable[[Tensor], Tensor]:
        features, labels = self.gathered(classes)
        if self.weight is None:
            self.weight = torch.zeros(self.classes, features.shape[1])
        for label in labels.unique().tolist():
            self.weight[label] = features[labels == label].mean(0)
        weight = F.normalize(self.weight[:seen])
        return lambda f: F.normalize(f) @ weight.T


class Aper(SimpleCIL):
    def first(self, classes: Sequence[str]) -> None:
        plain, net = self.read, copy.deepcopy(self.backbone.net)
        for block in net.layers:  # type: ignore[union-attr]
            block.mlp = Adapted(block.mlp, self.backbone.dim)
        trained = [p for module in net.modules() if isinstance(module, Adapted) for p in (
            *module.down.parameters(), *module.up.parameters())]  # fmt: skip
        head = nn.Linear(self.backbone.dim, len(classes))
        self.read = self.features_of(net)
        for p in trained:
            p.requires_grad_(True)
        optimizer = torch.optim.SGD([*trained, *head.parameters()], LR, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        for _ in range(EPOCHS):
            for x, y in self.loader("train", classes, True):
                loss = F.cross_entropy(head(self.read(x)), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss.item()
            schedule.step()
            self.accuracy(classes, head)
        tuned = self.read
        self.read = lambda pixels: torch.cat([plain(pixels), tuned(pixels)], 1)


class RanPAC(Pilot):
    def __init__(self, folder: Path, tasks: Sequence[Sequence[str]], m: int):
        super().__init__(folder, tasks)
        self.drawn = torch.randn(self.backbone.dim, m)
        self.gram, self.cross = torch.zeros(m, m), torch.zeros(m, self.classes)

    def learned(self, classes: Sequence[str], seen: int) -> Callable[[Tensor], Tensor]:
        features, labels = self.gathered(classes)
        rows, wanted = F.relu(features @ self.drawn), F.one_hot(labels, self.classes).float()
        self.cross += rows.T @ wanted
        self.gram += rows.T @ rows
        cut, eye = int(len(rows) * 0.8), torch.eye(len(self.gram))
        gram, cross = rows[:cut].T @ rows[:cut], rows[:cut].T @ wanted[:cut]
        losses = [
            float(F.mse_loss(rows[cut:] @ torch.linalg.solve(gram + penalty * eye, cross), wanted[cut:]))
            for penalty in PENALTIES
        ]
        penalty = PENALTIES[losses.index(min(losses))]
        weight = torch.linalg.solve(self.gram + penalty * eye, self.cross)
        return lambda f: (F.relu(f @ self.drawn) @ weight)[:, :seen]


WAYS: dict[str, tuple[Callable[[Path, Sequence[Sequence[str]]], Pilot], dict[str, Any]]] = {
    "simplecil": (SimpleCIL, {"pet": "none", "method": "frozen", "head": "ncm"}),
    "ranpac-1000": (
        lambda folder, tasks: RanPAC(folder, tasks, 1000),
        {"pet": "none", "method": "frozen", "head": {"name": "ridge", "projection": 1000}},
    ),
    "ranpac-5000": (
        lambda folder, tasks: RanPAC(folder, tasks, 5000),
        {"pet": "none", "method": "frozen", "head": {"name": "ridge", "projection": 5000}},
    ),
    "aper": (
        Aper,
        {
            "pet": ADAPTER,
            "method": {"name": "first_session", "concat": True},
            "head": "ncm",
            "train": {"epochs": EPOCHS, "batch_size": BATCH, "lr": LR, "optimizer": "sgd", "momentum": 0.9},
        },
    ),
}


def files(folder: Path, classes: int, train: int, test: int, side: int) -> Path:
    """Made-up JPEG files of `classes` classes, c000, c001, ..."""
    from PIL import Image

    rng = random.Random(0)
    for part, count in (("train", train), ("test", test)):
        for c in range(classes):
            place = folder / part / f"c{c:03d}"
            place.mkdir(parents=True)
            tint = [rng.randrange(200) for _ in range(3)]
            for i in range(count):
                small = bytes(min(255, tint[j % 3] + rng.randrange(56)) for j in range(8 * 8 * 3))
                picture = Image.frombytes("RGB", (8, 8), small).resize((side, side), Image.Resampling.BICUBIC)
                picture.save(place / f"{i:03d}.jpg", quality=90)
    return folder


def ours(way: dict[str, Any], folder: Path, per_task: int) -> list[float]:
    content = {
        "name": "beside-pilot",
        "backbone": BACKBONE,
        "data": {"name": "folder", "path": str(folder)},
        "stream": {"classes_per_task": per_task, "class_order": "sorted"},
        "evaluate": {"batch_size": BATCH},
        "run": {"device": "cpu", "threads": 1},
        **way,
    }
    with tempfile.TemporaryDirectory() as place:
        results = Learner(content, Path(place) / "state").run()
    rows: list[float] = []
    for row in results["cells"]:
        cells = [cell for cell in row if cell]
        rows.append(sum(c["correct"] for c in cells) / sum(c["total"] for c in cells))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*WAYS, []], help="all by default")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--per-task", type=int, default=5, help="classes of a task")
    parser.add_argument("--train", type=int, default=20, help="pictures of a class")
    parser.add_argument("--test", type=int, default=10, help="pictures of a class")
    parser.add_argument("--side", type=int, default=96, help="of the files, in pixels")
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    names = [f"c{c:03d}" for c in range(given.tasks * given.per_task)]
    tasks = [names[s : s + given.per_task] for s in range(0, len(names), given.per_task)]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = files(Path(place) / "pictures", len(names), given.train, given.test, given.side)
        for name in given.only or WAYS:
            make, way = WAYS[name]
            spent: dict[str, list[float]] = {"pilot": [], "perpetune": []}
            accuracy: dict[str, float] = {}
            for _ in range(given.turns):
                for which, call in (
                    ("pilot", lambda make=make: make(folder, tasks).run()),
                    ("perpetune", lambda way=way: ours(way, folder, given.per_task)),
                ):
                    began = time.process_time()
                    accuracy[which] = call()[-1]
                    spent[which].append(time.process_time() - began)
            ratios = [a / b for a, b in zip(spent["pilot"], spent["perpetune"], strict=True)]
            found[name] = {
                "cpu_ratio": round(statistics.median(ratios), 2),
                "ratios": [round(ratio, 2) for ratio in ratios],
                "cpu_s": {which: round(statistics.median(values), 2) for which, values in spent.items()},
                "accuracy": {which: round(value, 3) for which, value in accuracy.items()},
            }
            print(json.dumps({name: found[name]}), flush=True)
    print(json.dumps({**vars(given), "torch": torch.__version__, "found": found}))


if __name__ == "__main__":
    main()
