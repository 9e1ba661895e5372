"""Several runs beside each other: those that differ only in the seed are one row, mean and spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from perpetune.errors import UsageError
from perpetune.report import form, tables
from perpetune.report.results_schema import Results, checked

# Settings that name a run or say where it happens; they change no figure that is compared here.
# `run.precision` is not among them: it changes what is learned.
NEUTRAL = {
    "name",
    "description",
    "seed",
    "stream.seed",
    "evaluate",
    "run.device",
    "run.workers",
    "run.threads",
    "run.checkpoint_every",
}
LOWER_IS_BETTER = {"forgetting"}


class Spread(TypedDict):
    """`n` runs have the figure: their mean, their sample standard deviation (None for one run), all values."""

    mean: float | None
    std: float | None
    n: int
    values: list[float | None]


class ComparisonRow(TypedDict):
    """Runs of one recipe. Curves hold one spread for each task learned."""

    label: str
    runs: list[str]
    seeds: list[int]
    setting: str
    tasks: int
    classes: int
    differs: dict[str, Any]
    metrics: dict[str, Spread]
    trainable_parameters: Spread
    stored_bytes: Spread
    learn_seconds: Spread
    average_accuracy_curve: list[Spread]
    forgetting_curve: list[Spread]


class Comparison(TypedDict):
    """What `compare` returns.

    Attributes:
        rows: one for each recipe, in the order given.
        settings: dotted keys of the settings in which the recipes differ.
        best: for each figure the numbers of the best rows; empty where rows cannot be ranked.
        notes: reasons why rows should not be read against each other as they stand.
    """

    format: int
    rows: list[ComparisonRow]
    settings: list[str]
    best: dict[str, list[int]]
    notes: list[str]


def compare(runs: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> Comparison:
    """The figures of several runs, grouped by recipe.

    Args:
        runs: results documents.
        names: what the user calls each run; the runs' own names when None.

    Raises:
        StateError: one of them is not a results document.
        UsageError: there is no run.
    """
    if not runs:
        raise UsageError("compare: name one run or more")
    called = list(names) if names is not None else [str(run.get("name")) for run in runs]
    results = [checked(run, where) for run, where in zip(runs, called, strict=True)]
    groups: dict[str, list[int]] = {}
    for i, run in enumerate(results):
        groups.setdefault(_identity(run), []).append(i)
    members = [[results[i] for i in group] for group in groups.values()]
    settings = _differing([_flat(group[0]["recipe"]) for group in members])
    labels = _labels(members, settings)
    rows = [
        _row(label, [called[i] for i in group], runs_of_row, settings)
        for label, group, runs_of_row in zip(labels, groups.values(), members, strict=True)
    ]
    notes, rankable = _notes(results, called)
    best = {key: _best(rows, key) if rankable and len(rows) > 1 else [] for key in rows[0]["metrics"]}
    return {"format": 1, "rows": rows, "settings": settings, "best": best, "notes": notes}


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and sample standard deviation (n - 1) of the values that are there."""
    there = [v for v in values if v is not None]
    mean = statistics.fmean(there) if there else None
    return {
        "mean": mean,
        "std": statistics.stdev(there) if len(there) > 1 else None,
        "n": len(there),
        "values": list(values),
    }


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's settings by dotted key, without the neutral ones."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        name = prefix + key
        if name in NEUTRAL:
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, name + ".")
        else:
            flat[name] = value
    return flat


def _identity(run: Results) -> str:
    return json.dumps([run["setting"], _flat(run["recipe"])], sort_keys=True)


def _differing(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    return [key for key in keys if len({json.dumps(r.get(key), sort_keys=True) for r in recipes}) > 1]


def _labels(groups: Sequence[Sequence[Results]], settings: Sequence[str]) -> list[str]:
    """A name for each row: the runs' own where it tells rows apart, else with the settings that do."""
    labels = [" / ".join(dict.fromkeys(run["name"] for run in group)) for group in groups]
    if len(set(labels)) < len(labels):
        for i, group in enumerate(groups):
            flat = _flat(group[0]["recipe"])
            labels[i] += "".join(f" · {_short(key)} {form.setting(flat.get(key))}" for key in settings[:3])
    repeated = {label for label in labels if labels.count(label) > 1}
    return [f"{label} #{i + 1}" if label in repeated else label for i, label in enumerate(labels)]


def _short(key: str) -> str:
    """`method` for `method.name`, else the last word of the key."""
    *parents, last = key.split(".")
    return parents[-1] if parents and last == "name" else last


def _row(label: str, names: list[str], runs: Sequence[Results], settings: Sequence[str]) -> ComparisonRow:
    flat, curves = _flat(runs[0]["recipe"]), [tables.curves(run) for run in runs]
    return {
        "label": label,
        "runs": names,
        "seeds": [run["seed"] for run in runs],
        "setting": runs[0]["setting"],
        "tasks": len(runs[0]["tasks"]),
        "classes": len(_classes(runs[0])),
        "differs": {key: flat.get(key) for key in settings},
        "metrics": {
            key: spread([run["metrics"][key] for run in runs])  # type: ignore[literal-required]
            for key in runs[0]["metrics"]
        },
        "trainable_parameters": spread([run["trainable_parameters"] for run in runs]),
        "stored_bytes": spread([tables.stored_bytes(run) for run in runs]),
        "learn_seconds": spread([tables.learn_seconds(run) for run in runs]),
        "average_accuracy_curve": _pointwise([c.accuracy for c in curves]),
        "forgetting_curve": _pointwise([c.forgetting for c in curves]),
    }


def _pointwise(series: Sequence[Sequence[float | None]]) -> list[Spread]:
    """Spread at each step over the runs that came as far."""
    return [spread([s[i] for s in series if i < len(s)]) for i in range(max(map(len, series)))]


def _best(rows: Sequence[ComparisonRow], key: str) -> list[int]:
    sign = -1 if key in LOWER_IS_BETTER else 1
    means = [(sign * mean, i) for i, row in enumerate(rows) if (mean := row["metrics"][key]["mean"]) is not None]
    if len(means) < 2:
        return []
    top = max(means)[0]
    return [i for mean, i in means if mean == top]


def _classes(run: Results) -> set[str]:
    return {name for task in run["tasks"] for name in task["classes"]}


def _notes(results: Sequence[Results], names: Sequence[str]) -> tuple[list[str], bool]:
    """What to know before reading rows against each other, and whether ranking them makes sense."""
    apart = [
        f"{name} is not complete: {form.plural(len(run['cells']), 'task')} learned so far"
        for run, name in zip(results, names, strict=True)
        if not run["complete"]
    ]
    reordered = []
    first, reference = results[0], names[0]
    for run, name in zip(results[1:], names[1:], strict=True):
        if run["setting"] != first["setting"]:
            apart.append(f"{name} is {run['setting']}-incremental, {reference} is {first['setting']}-incremental")
        if _classes(run) != _classes(first):
            apart.append(f"{name} has other classes than {reference}: {_sizes(run)} against {_sizes(first)}")
        elif len(run["tasks"]) != len(first["tasks"]):
            apart.append(
                f"{name} cuts the classes into {len(run['tasks'])} tasks, {reference} into {len(first['tasks'])}"
            )
        elif _examples(run) != _examples(first):
            apart.append(f"{name} is tested on {_examples(run)} examples, {reference} on {_examples(first)}")
        elif [set(t["classes"]) for t in run["tasks"]] != [set(t["classes"]) for t in first["tasks"]]:
            reordered.append(f"{name} has the classes of {reference} in another order")
    return apart + reordered, not apart


def _examples(run: Results) -> int:
    return sum(task["test"] for task in run["tasks"])


def _sizes(run: Results) -> str:
    return f"{len(_classes(run))} classes in {len(run['tasks'])} tasks"
