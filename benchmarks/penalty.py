"""The penalty of the head `ridge` where a class has few examples: three ways to choose it, on real features.

    python benchmarks/penalty.py benchmarks/recipes/cifar100-dino56.yaml
    python benchmarks/penalty.py benchmarks/recipes/cifar100-dino56.yaml --set backbone.taps=7 --projections 0

Features of the recipe's training images on its untouched backbone; a third of each class is held out to measure
accuracy, and no test image is read. For each number of classes, of examples a class and of random features: the
accuracy of the penalty that `squared` (generalised cross-validation) chooses, of the one that `ours` chooses (what
left-out examples are missed by at the predictions' best scale, as `heads/ridge.py` does), of the best of a grid, which
looks at the answers and is too high by its luck on them (`best`), and of the penalty that is best on one half of the
held-out images, measured on the other half, both ways (`fair`).
Without a projection rows are standardised, as the head does.
Means over three draws of classes, examples and projection. Prints JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from perpetune.build import build_backbone, build_data
from perpetune.heads.ridge import Ridge
from perpetune.models.classifier import Classifier
from perpetune.numerics import ridge
from perpetune.recipe import load_recipe
from perpetune.runtime import Runtime, pick_device
from perpetune.seeding import generator
from perpetune.tasks import Examples, evaluation_batches

GRID = tuple(10 ** (i / 4) for i in range(-24, 9))
"""Penalties, as shares of `tr G / M`."""


def draw(targets: Tensor, classes: int, each: int | None, seed: int) -> Tensor:
    """Row numbers of `each` examples of `classes` classes, the same classes for the same seed."""
    names = torch.randperm(int(targets.max()) + 1, generator=generator("classes", seed))[:classes].tolist()
    rows = []
    for name in names:
        found = (targets == name).nonzero().flatten()
        rows.append(found[torch.randperm(len(found), generator=generator("examples", seed, name))][:each])
    return torch.cat(rows)


def accuracy(fit: ridge.Fit, rows: Tensor, targets: Tensor, offset: Tensor | float) -> float:
    return 100 * float(((rows @ fit.weights + offset).argmax(1) == targets).double().mean())


def fair(fits: list[ridge.Fit], rows: Tensor, targets: Tensor, offset: Tensor | float, half: Tensor) -> float:
    """Accuracy on each half of the rows of the fit that is best on the other half."""
    found = []
    for chooses in (half, ~half):
        best = max(fits, key=lambda fit: accuracy(fit, rows[chooses], targets[chooses], offset))
        found.append(accuracy(best, rows[~chooses], targets[~chooses], offset))
    return statistics.mean(found)


def squared(dual: ridge.Dual, rows: Tensor, fit: ridge.Fit) -> float:
    """Generalised cross-validation of squared errors."""
    left = dual.targets - rows @ fit.weights
    share = 1 - fit.freedom / len(left)
    return float(left.square().mean()) / share**2 if share > 1e-3 else float("inf")


def case(train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], width: int, seed: int) -> dict[str, float]:
    classes, labels = train[1].unique(return_inverse=True)
    head = Ridge(train[0].shape[1], projection=width)
    head.grow([str(int(c)) for c in classes], generator("head", seed))
    rows, asked = head.expand(train[0].double()), head.expand(held[0].double())
    answers = torch.searchsorted(classes, held[1])
    standard, offset, scale = None, torch.zeros(()), float(rows.square().sum()) / rows.shape[1]
    if head.standardise:
        packed = torch.zeros(ridge.packed_size(head.rank), dtype=torch.float64)
        ones = torch.nn.functional.pad(rows, (0, 1), value=1.0)
        ridge.add_gram(packed, ones, None)
        hot = torch.nn.functional.one_hot(labels, len(classes)).double()
        standard = ridge.Standard.of(packed, ones.mT @ hot)
        asked, offset, scale = standard.rows(asked), standard.target, standard.unit
    dual = ridge.Dual(rows, labels, len(classes), None, standard)
    grid = [dual.fit(scale * share) for share in GRID]
    ours = ridge.choose(dual.fit, scale, None)[0]
    half = torch.arange(len(answers)) % 2 == 0
    known = rows if standard is None else standard.rows(rows)
    plain = min(grid, key=lambda fit: squared(dual, known, fit))
    return {
        "squared": accuracy(plain, asked, answers, offset),
        "ours": accuracy(ours, asked, answers, offset),
        "best": max(accuracy(fit, asked, answers, offset) for fit in grid),
        "fair": fair(grid, asked, answers, offset, half),
        "squared_share": plain.penalty / scale,
        "ours_share": ours.penalty / scale,
    }


def features(parts: Sequence[Examples], model: Classifier, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """`(n, D)` on the CPU, and the targets, counted on from part to part."""
    found, targets, first = [], [], 0
    with torch.inference_mode():
        for part in parts:
            found += [model.features(batch.inputs).cpu() for batch in evaluation_batches(part, 64, runtime)]
            targets.append(torch.tensor(part.targets) + first)
            first += max(part.targets) + 1
    return torch.cat(found), torch.cat(targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--examples", type=int, nargs="+", default=[1, 2, 3, 5, 10, 20])
    parser.add_argument("--projections", type=int, nargs="+", default=[0, 300, 1000, 2000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", dest="changes", action="append", default=[], help="KEY=VALUE of the recipe")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    most = max(given.examples)
    changes = [f"stream.train_per_class={most * 3 // 2}", "stream.validation=0.333", *given.changes]
    recipe = load_recipe(given.recipe, changes)
    backbone, runtime = build_backbone(recipe), Runtime(device=pick_device("auto"))
    model = Classifier(backbone, Ridge(backbone.dim)).to(runtime.device)
    tasks = build_data(recipe, model.view).tasks
    train = features([task.train for task in tasks], model, runtime)
    held = features([task.validation for task in tasks if task.validation is not None], model, runtime)
    found = []
    for classes, each, width in itertools.product(given.classes, given.examples, given.projections):
        runs = []
        for seed in range(given.seeds):
            mine, theirs = draw(train[1], classes, each, seed), draw(held[1], classes, None, seed)
            runs.append(case((train[0][mine], train[1][mine]), (held[0][theirs], held[1][theirs]), width, seed))
        means = {key: round(statistics.mean(run[key] for run in runs), 3) for key in runs[0]}
        found.append({"classes": classes, "examples": each, "projection": width, **means})
    by_examples = [
        {"examples": each}
        | {
            key: round(statistics.mean(case[key] for case in found if case["examples"] == each), 2)
            for key in ("squared", "ours", "best", "fair")
        }
        for each in given.examples
    ]
    result = {"recipe": given.recipe, "held_out": len(held[1]), "cases": found, "by_examples": by_examples}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
