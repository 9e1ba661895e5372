"""What pools of pets cost, and what the choice of a member is worth on the packaged digits.

    OMP_NUM_THREADS=1 python benchmarks/pools.py choose
    OMP_NUM_THREADS=1 python benchmarks/pools.py answer
    OMP_NUM_THREADS=1 python benchmarks/pools.py step --after 0 3
    OMP_NUM_THREADS=1 python benchmarks/pools.py queries
    OMP_NUM_THREADS=1 python benchmarks/pools.py digits

`choose`: how long a selector takes to choose for a batch, by the number of members that it knows, and which share this
is of a forward pass of the same batch through a ViT-B/16 with random weights. `alone` is the same choice by scores of
each query by itself. Members and queries are simulated: `clustered` ones have a common direction and variances that
fall as those of real features do, and each query lies around its member; `even` ones have nothing of this.

`answer`: a pass with pets chosen for each example, against a pass for each set (the grouped loop) and against a pass
with one set for all; the packaged model, random pictures, no gradients.

`step`: the training time of `pool` with a selector that learns from statistics, against that of `finetune`, on pictures
without random changes. `beyond_queries` leaves out the pass that computes the queries of a task. `--after 3` reads the
queries after three of the six blocks; 0 is the whole net.

`queries`: the share of test pictures whose task is found, by selector and by the block that the query is read after.

`digits`: five tasks of two digits; final accuracy by head, classes that may answer, and selector. `frozen` is the bare
net with ridge regression. One training for each head and seed serves all selectors: what they learn does not change the
members.

Times are CPU times, medians over rounds, the calls in turns in one process. Prints JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perpetune import registry
from perpetune.build import build_data, build_method, build_runtime, load_backbone
from perpetune.evaluate import evaluate
from perpetune.learning import learn_protected
from perpetune.methods.base import Method
from perpetune.methods.pool import Pool
from perpetune.numerics import ranking
from perpetune.pets import Choice, inject, using
from perpetune.recipe import Recipe, make_recipe
from perpetune.seeding import generator, own_global_state
from perpetune.selectors import Chosen, Selection, Selector
from perpetune.selectors.keys import Keys
from perpetune.tasks import Task

KINDS: dict[str, dict[str, Any]] = {
    "keys": {"top": 5},
    "weights": {},
    "centres": {},
    "means": {},
    "gaussian": {},
    "classifier": {},
}
LIMIT = 0.02  # of a forward pass, at a thousand members
MIXED = {(64, 16): 1.10, (8, 8): 1.15}  # at most so many passes with one set, by batch and members
STEP = 1.10  # of the training time of finetune
DIGITS: dict[str, Any] = {
    "backbone": "perpetune:micro",
    "pet": {"name": "prefix", "length": 5, "blocks": [3, 4, 5]},
    "train": {"epochs": 5, "batch_size": 32, "lr": 1.0e-2, "head_lr": 1.0e-2, "schedule": "cosine"},
    "data": "digits",
    "stream": {"classes_per_task": 2, "class_order": "sorted", "train_per_class": 100, "test_per_class": 30},
    "run": {"device": "cpu", "threads": 1},
}
COMPARED: dict[str, dict[str, Any]] = {
    "keys, start mean": {"name": "keys", "start": "mean"},
    "keys, drawn": {"name": "keys"},
    "5 centres": {"name": "centres"},
    "class means": {"name": "means"},
    "gaussian": {"name": "gaussian"},
    "classifier": {"name": "classifier"},
    "random": {"name": "random"},
    "last": {"name": "last"},
}
HEADS: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear"},
    "drawn": {"name": "drawn"},
    "drawn, full": {"name": "drawn", "covariance": "full"},
    "ridge": {"name": "ridge"},
}
TRUE = "true task"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    choose = verbs.add_parser("choose", help="the time of a choice by the number of members")
    choose.add_argument("--members", type=int, nargs="+", default=[1, 10, 100, 1000, 10000])
    choose.add_argument("--selectors", nargs="+", default=list(KINDS), choices=list(KINDS))
    choose.add_argument("--batch", type=int, default=8)
    choose.add_argument("--width", type=int, default=768)
    choose.add_argument("--features", default="clustered", choices=["clustered", "even"])
    choose.add_argument("--rounds", type=int, default=5)
    choose.set_defaults(verb=choosing)
    answer = verbs.add_parser("answer", help="a batch whose examples have different members")
    answer.add_argument("--pets", nargs="+", default=["lora", "prefix", "adapter"])
    answer.add_argument("--batches", type=int, nargs="+", default=[8, 64])
    answer.add_argument("--members", type=int, nargs="+", default=[8, 16])
    answer.add_argument("--rounds", type=int, default=7)
    answer.set_defaults(verb=answering)
    step = verbs.add_parser("step", help="the training time of a pool")
    step.add_argument("--selectors", nargs="+", default=["gaussian"])
    step.add_argument("--after", type=int, nargs="+", default=[0])
    step.add_argument("--pet", help="another pet than the prefix in the last three blocks, with its defaults")
    step.add_argument("--tasks", type=int, default=1)
    step.add_argument("--rounds", type=int, default=5)
    step.set_defaults(verb=stepping)
    queries = verbs.add_parser("queries", help="how often the task is found, by the block of the query")
    queries.add_argument("--selectors", nargs="+", default=["gaussian", "classifier", "means", "centres"])
    queries.add_argument("--after", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    queries.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    queries.set_defaults(verb=querying)
    digits = verbs.add_parser("digits", help="accuracy by head, classes that may answer, and selector")
    digits.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    digits.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    digits.add_argument("--selectors", nargs="+", default=list(COMPARED), choices=list(COMPARED))
    digits.set_defaults(verb=comparing)
    given = vars(parser.parse_args())
    torch.set_num_threads(1)
    print(json.dumps(given.pop("verb")(**given), indent=1))


def choosing(
    members: list[int],
    selectors: list[str],
    batch: int,
    width: int,
    rounds: int,
    features: str = "clustered",
    forward: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Milliseconds of a choice for `batch` queries, by selector and number of members, and their share of `forward`.

    Args:
        forward: one pass of the batch through a net; None is a ViT-B/16.
    """
    forward = forward or vit_b(batch)
    results = []
    for name in selectors:
        calls: dict[str, Callable[[], Any]] = {"forward": forward}
        for count in members:
            values, queries = simulated(count, width, features)
            turns = itertools.cycle(queries.split(batch))
            selector = filled(name, values)
            calls[str(count)] = functools.partial(_choose, selector, turns)
            if name != "weights" and count * (5 if name == "centres" else 1) >= ranking.MANY:
                calls[f"{count} alone"] = functools.partial(_choose_alone, selector, turns)
        took = timed(calls, rounds)
        shares = {m: round(ms / took["forward"], 5) for m, ms in took.items() if m != "forward"}
        within = {} if "1000" not in shares else {"within": shares["1000"] < LIMIT}
        results.append({"selector": name, "ms": {k: round(v, 3) for k, v in took.items()}, "share": shares, **within})
    return {"batch": batch, "width": width, "features": features, "limit": LIMIT, "results": results}


def _choose(selector: Selector, turns: Iterator[Tensor]) -> Chosen:
    return selector.choose(next(turns))


def _choose_alone(selector: Selector, turns: Iterator[Tensor]) -> Chosen:
    many, ranking.MANY = ranking.MANY, sys.maxsize
    try:
        return selector.choose(next(turns))
    finally:
        ranking.MANY = many


def simulated(members: int, width: int, features: str) -> tuple[Tensor, Tensor]:
    """A value for each member `(M, D)`, and 512 queries `(512, D)`.

    The variances fall with the power −1.2, the squared length of the common direction is twice their sum, and a sixth
    of the variance lies between members: about what a DINOv2-S has on CIFAR-100's classes.
    """
    source = generator("simulated")
    if features == "even":
        return torch.randn(members, width, generator=source), torch.randn(512, width, generator=source)
    deviation = torch.arange(1, width + 1) ** -0.6
    deviation = deviation / deviation.norm()
    common = 2**0.5 * torch.nn.functional.normalize(torch.randn(width, generator=source), dim=0)
    values = common + (1 / 6) ** 0.5 * deviation * torch.randn(members, width, generator=source)
    own = torch.randint(members, (512,), generator=source)
    return values, values[own] + (5 / 6) ** 0.5 * deviation * torch.randn(512, width, generator=source)


def filled(name: str, values: Tensor) -> Selector:
    """A selector with a member for each of `values (M, D)`, each with one class; they are set, not learned."""
    members, width = values.shape
    selector = Selection.model_validate({"name": name, **KINDS[name]}).make(width)
    selector.grow(members, generator("grow"))
    if isinstance(selector, Keys):
        selector.fresh.data = values.clone()
    if selector.learned:
        return selector
    selector.set_extra_state(
        {**selector.get_extra_state(), "rows": [[m, "c"] for m in range(members)], "centres": 5 * members}
    )
    source = generator("values")
    if name == "centres":
        around = values.repeat_interleave(5, 0)
        around = around + 0.3 * values.std(0) * torch.randn(around.shape, generator=source)
        selector.centres = torch.nn.functional.normalize(around, dim=-1)
        selector.of = torch.arange(members).repeat_interleave(5)
    elif name == "means":
        selector.means.grow([str(m) for m in range(members)], source)
        selector.means.means, selector.means.counts = values, torch.ones(members, dtype=torch.int64)
    elif name == "gaussian":
        selector.centre = values.mean(0)
        selector.weight = values - selector.centre
        selector.offset = -selector.weight.square().sum(1) / 2
    elif name == "classifier":
        selector.head.grow([str(m) for m in range(members)], source)
        selector.head.centre = values.mean(0)
        selector.head.weight = (values - selector.head.centre).mT.contiguous()
        selector.head.counts = torch.ones(members, dtype=torch.int64)
    return selector


def vit_b(batch: int) -> Callable[[], Any]:
    """A forward pass of `batch` pictures through a ViT-B/16."""
    from transformers import ViTConfig, ViTModel

    with own_global_state("pools"):
        net = ViTModel(ViTConfig(), add_pooling_layer=False).eval()
    pixels = torch.randn(batch, 3, 224, 224, generator=generator("pixels"))
    return lambda: net(pixels)


def answering(pets: Sequence[str], batches: Sequence[int], members: Sequence[int], rounds: int) -> dict[str, Any]:
    """Milliseconds of a batch with one set, with members mixed, and grouped, by pet, batch size and distinct members.

    A number of members larger than the batch is left out.
    """
    results = []
    for pet in pets:
        backbone = load_backbone("perpetune:micro")
        kind = registry.find("pets", pet)
        names = [f"m{i}" for i in range(max(members))]
        for name in names:
            make = functools.partial(_made, kind, generator("pools", name))
            inject(backbone.net, backbone.pet_places(kind.default_at, None), make, name)
        size = backbone.preprocess.size
        for batch, count in ((b, m) for b in batches for m in members if m <= b):
            pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator("pixels"))
            index = torch.arange(batch) % count
            choice = Choice(tuple(names[:count]), index[:, None])
            parts = [(name, pixels[index == m]) for m, name in enumerate(names[:count])]

            def passes(each: Sequence[tuple[Any, Tensor]], backbone: Any = backbone) -> None:
                for active, rows in each:
                    with using(backbone.net, active):
                        backbone.features(rows)

            each = {"one": [("m0", pixels)], "mixed": [(choice, pixels)], "grouped": parts}
            took = timed({name: functools.partial(passes, rows) for name, rows in each.items()}, rounds)
            ratios = {f"{name}/one": round(took[name] / took["one"], 3) for name in ("mixed", "grouped")}
            bar = MIXED.get((batch, count))
            within = {} if bar is None else {"limit": bar, "within": ratios["mixed/one"] <= bar}
            ms = {name: round(value, 1) for name, value in took.items()}
            results.append({"pet": pet, "batch": batch, "members": count, "ms": ms, **ratios, **within})
    return {"results": results}


def _made(kind: Any, rng: torch.Generator, place: Any) -> Any:
    return kind(place, rng)


def stepping(
    selectors: Sequence[str],
    tasks: int,
    rounds: int,
    after: Sequence[int] = (0,),
    pet: str | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """Seconds in which `pool` and `finetune` learn the first tasks of the digits, and their ratios.

    Every round trains new methods from the start, in turns. The queries of the tasks are timed in the same rounds.
    """
    sections |= {"pet": pet} if pet else {}
    pools = {f"{name}, after {block}" if block else name: (name, block) for name in selectors for block in after}
    recipes = {"finetune": digits_recipe(method="finetune", **sections)} | {
        called: digits_recipe(method={"name": "pool", "select": name, "query": {"after": block or None}}, **sections)
        for called, (name, block) in pools.items()
    }
    took: dict[str, list[float]] = {name: [] for name in recipes}
    took |= {f"queries of {name}": [] for name in pools}
    for number in range(rounds + 1):
        for name, recipe in recipes.items():
            method, stream = begun(recipe)
            spent = {name: sum(seconds(functools.partial(learn_protected, method, task)) for task in stream[:tasks])}
            if isinstance(method, Pool):
                table = functools.partial(method.queries.table, batch_size=recipe.train.batch_size)
                spent[f"queries of {name}"] = sum(seconds(functools.partial(table, task)) for task in stream[:tasks])
            for called, value in spent.items() if number else ():
                took[called].append(value)
    results = []
    for name in pools:
        queries = took[f"queries of {name}"]
        whole = [a / b for a, b in zip(took[name], took["finetune"], strict=True)]
        beyond = [(a - q) / b for a, q, b in zip(took[name], queries, took["finetune"], strict=True)]
        ratio, most = round(statistics.median(beyond), 3), round(statistics.median(whole), 3)
        results.append(
            {"selector": name, "ratio": most, "beyond_queries": ratio, "limit": STEP, "within": most <= STEP}
        )
    return {"seconds": {name: round(statistics.median(t), 3) for name, t in took.items()}, "results": results}


def querying(selectors: Sequence[str], after: Sequence[int], seeds: Sequence[int], **sections: Any) -> dict[str, Any]:
    """The share of the digits' test pictures whose task is found, in %, by selector and block; the mean of the seeds.

    Nothing is trained: queries are of the bare net.
    """
    found: dict[str, dict[str, list[float]]] = {name: {str(block): [] for block in after} for name in selectors}
    for seed, block in itertools.product(seeds, after):
        recipe = digits_recipe(method={"name": "pool", "query": {"after": block or None}}, seed=seed, **sections)
        method, stream = begun(recipe)
        assert isinstance(method, Pool)
        made = {name: Selection.model_validate({"name": name}).make(method.selector.dim) for name in selectors}
        for member, task in enumerate(stream):
            queries, targets = method.queries.table(task, 32), torch.tensor(task.train.targets)
            for selector in made.values():
                selector.grow(member + 1, generator("grow"))
                selector.learn(member, queries, targets, task.classes, generator("learn"))
        tests = [method.queries.table(dataclasses.replace(task, train=task.test), 32) for task in stream]
        owners = torch.cat([torch.full((len(each),), member) for member, each in enumerate(tests)])
        for name, selector in made.items():
            right = selector.choose(torch.cat(tests)).index[:, 0] == owners
            found[name][str(block)].append(100 * float(right.double().mean()))
    return {name: {b: round(statistics.mean(each), 1) for b, each in blocks.items()} for name, blocks in found.items()}


def seconds(call: Callable[[], Any]) -> float:
    """The CPU time of a call."""
    began = time.process_time()
    call()
    return time.process_time() - began


def digits_recipe(**sections: Any) -> Recipe:
    """The protocol of the digits with some sections replaced."""
    return make_recipe({**DIGITS, **sections})


def begun(recipe: Recipe) -> tuple[Method, list[Task]]:
    """The method of a recipe before its first task, and its tasks."""
    runtime = build_runtime(recipe)
    backbone = load_backbone(recipe.backbone.name)
    data = build_data(recipe, backbone.preprocess).tasks
    tasks = [Task(d.index, d.name, d.classes, d.train, test=d.test, runtime=runtime) for d in data]
    return build_method(recipe, backbone).to(runtime.device), tasks


class Beside(Selector):
    """Several selectors over the members of one pool, to compare their choices; `asked` is the one that chooses.

    Each learns and is trained as if it were alone: it draws from a generator of its own, and no loss of one reaches a
    parameter of another.
    """

    learned = True
    statistics = True

    def __init__(self, dim: int, selections: dict[str, dict[str, Any]]):
        super().__init__(dim)
        made = {name: Selection.model_validate(given).make(dim) for name, given in selections.items()}
        self.names, self.each = list(made), nn.ModuleList(made.values())
        self.asked = self.names[0]
        self.needs_start = any(one.needs_start for one in made.values())
        for one in made.values():
            one.private = True

    def _all(self) -> list[Selector]:
        return [one for one in self.each if isinstance(one, Selector)]

    def grow(self, members: int, generator: torch.Generator, queries: Tensor | None = None) -> None:
        super().grow(members, generator, queries)
        for one in self._all():
            one.grow(members, _same(generator), queries)

    def rest(self, members: int) -> None:
        for one in self._all():
            one.rest(members)

    def trained(self) -> list[nn.Parameter]:
        return [p for one in self._all() for p in one.trained()]

    def loss(self, queries: Tensor, chosen: Chosen) -> Tensor | None:
        losses = [loss for one in self._all() if (loss := one.loss(queries, chosen)) is not None]
        return torch.stack(losses).sum() if losses else None

    def learn(
        self, member: int, queries: Tensor, targets: Tensor, classes: Sequence[str], generator: torch.Generator
    ) -> None:
        for one in self._all():
            if one.statistics:
                one.learn(member, queries, targets, classes, _same(generator))

    def choose(self, queries: Tensor) -> Chosen:
        return self._all()[self.names.index(self.asked)].choose(queries)


def _same(rng: torch.Generator) -> torch.Generator:
    """A generator that draws what `rng` draws next."""
    new = torch.Generator()
    new.set_state(rng.get_state())
    return new


def comparing(seeds: Sequence[int], heads: Sequence[str], selectors: Sequence[str], **sections: Any) -> dict[str, Any]:
    """Final accuracy in per cent over all classes, by head, classes that may answer, and selector."""
    cells: dict[str, list[float]] = {}
    right: dict[str, list[float]] = {}
    for seed in seeds:
        frozen, tasks = learned(digits_recipe(seed=seed, method="frozen", head="ridge", **{**sections, "pet": None}))
        cells.setdefault("frozen", []).append(accuracy(frozen, tasks)["answer"])
        for head in heads:
            recipe = digits_recipe(seed=seed, method="pool", head=HEADS[head], **sections)
            method, tasks = learned(recipe, {name: COMPARED[name] for name in selectors})
            assert isinstance(method, Pool)
            assert isinstance(method.selector, Beside)
            for answer in ("own", "all"):
                method.answer = "own" if answer == "own" else "all"
                for number, name in enumerate(selectors):
                    method.selector.asked = name
                    found = accuracy(method, tasks, told=not number)
                    cells.setdefault(f"{head}, {answer}, {name}", []).append(found["answer"])
                    if not number:
                        cells.setdefault(f"{head}, {answer}, {TRUE}", []).append(found["told"])
                    if answer == "own" and head == heads[0]:
                        right.setdefault(name, []).append(found["member"])
            sys.stderr.write(f"seed {seed}, head {head}: done\n")
    means = {name: round(statistics.mean(values), 1) for name, values in cells.items()}
    return {
        "accuracy": means,
        "by_seed": {name: [round(v, 1) for v in values] for name, values in cells.items()},
        "right_member": {name: round(statistics.mean(values), 1) for name, values in right.items()},
        "accepted": accepted(means),
    }


def learned(recipe: Recipe, selections: dict[str, dict[str, Any]] | None = None) -> tuple[Method, list[Task]]:
    """The method of a recipe after all its tasks; a pool with the selectors of `selections` side by side."""
    method, tasks = begun(recipe)
    if selections is not None:
        assert isinstance(method, Pool)
        method.selector = Beside(method.model.backbone.width, selections)
    for task in tasks:
        learn_protected(method, task)
    return method, tasks


def accuracy(method: Method, tasks: Sequence[Task], told: bool = False) -> dict[str, float]:
    """Per cent of all test examples: right answers, answers that a method told the task gets right, right members."""
    cells = [cell for task in tasks if (cell := evaluate(method, task, among="seen", batch_size=64, told=told))]
    total = sum(cell["total"] for cell in cells)
    member = sum(cell.get("members", {}).get(task.name, 0) for cell, task in zip(cells, tasks, strict=True))
    sums = {"answer": sum(c["correct"] for c in cells), "told": sum(c.get("told", 0) for c in cells), "member": member}
    return {name: 100 * value / total for name, value in sums.items()}


def accepted(found: dict[str, float]) -> dict[str, bool]:
    """Whether the figures are what `prompt-pools.md` §10.4 expects; those that were not measured are left out."""
    wanted: dict[str, tuple[float, float]] = {
        "ridge, all, gaussian": (95.5, 100),
        "ridge, own, gaussian": (95.5, 100),
        "ridge, own, keys, start mean": (46, 54),
        "ridge, own, 5 centres": (67, 75),
        "ridge, own, random": (16, 22),
        f"ridge, own, {TRUE}": (98, 100),
    }
    met = {name: low <= found[name] <= high for name, (low, high) in wanted.items() if name in found}
    for name in (n for n in found if n.startswith("ridge, all") and n.replace("ridge", "linear") in found):
        met[f"{name}, above linear"] = found[name] - found[name.replace("ridge", "linear")] >= 45
    return met


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU time of each call in milliseconds, the calls in turns."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for number in range(rounds + 1):
            for name, call in calls.items():
                began = time.process_time()
                call()
                if number:
                    took[name].append(1000 * (time.process_time() - began))
    return {name: statistics.median(times) for name, times in took.items()}


if __name__ == "__main__":
    main()
