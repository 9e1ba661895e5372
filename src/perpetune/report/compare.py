"""Compare several runs. Runs that differ only in the seed are one row, with mean and standard deviation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from perpetune.errors import UsageError
from perpetune.report import form
from perpetune.report.document import learn_seconds, left_out, measure, sampled
from perpetune.report.effects import Effect, answer_effect, effects
from perpetune.report.results_schema import Results, TaskInfo, checked
from perpetune.report.sections import answers, drift, protection
from perpetune.report.sections.curves import curves as curves_of
from perpetune.report.sections.headroom import Headroom, headrooms
from perpetune.report.sections.storage import stored_bytes
from perpetune.report.spread import Spread, spread

# Settings that name a run or its place. They do not change any compared figure.
# `run.precision` is not one of them, because it changes what is learned.
NEUTRAL = {
    "name",
    "description",
    "seed",
    "stream.seed",
    "evaluate",
    "run.device",
    "run.workers",
    "run.compile",
    "run.threads",
    "run.keep",
    "run.track",
    "run.checkpoint_every",
}
LOWER_IS_BETTER = {"forgetting"}


class ComparisonRow(TypedDict):
    """Runs of one recipe on the same data, each seed once. Curves have one spread for each learned task.

    `moved` says how far the worst site's outputs on earlier data had moved at the end, `room` is the share of
    directions that was still free; only runs with `protect:` have them. `drift` says how far the features of earlier
    tasks' test images had moved at the end. `way` names another way in which the method of the row before could have
    answered, and the row has the figures of that way; None means the method's answer itself. Facts about the runs that
    do not depend on the way are only in the row of the answer.
    """

    label: str
    way: str | None
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
    moved: Spread
    room: Spread
    drift: Spread
    average_accuracy_curve: list[Spread]
    forgetting_curve: list[Spread]


class Comparison(TypedDict):
    """The result of `compare`.

    Attributes:
        rows: a row for each recipe and its data, in the given order; after it a row for each other way in which its
            method could have answered.
        settings: the dotted keys of the settings in which the recipes differ.
        best: for each figure the numbers of the best rows; empty if the rows cannot be ranked.
        effects: the effect of each setting, from rows that differ in this setting only.
        headroom: for each stream and backbone with a control or a joint run, how much there is to win and who wins it.
        notes: reasons why the rows cannot be compared directly.
        measure: `score` if the answers of any run have a score, else `accuracy`.
    """

    format: int
    measure: str
    rows: list[ComparisonRow]
    settings: list[str]
    best: dict[str, list[int]]
    effects: list[Effect]
    headroom: list[Headroom]
    notes: list[str]


def compare(runs: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> Comparison:
    """The figures of several runs, grouped by recipe and data.

    Args:
        runs: results documents.
        names: the user's name for each run; None takes the names in the documents.

    Raises:
        StateError: a document is not a results document.
        UsageError: there are no runs.
    """
    if not runs:
        raise UsageError("compare: name one run or more")
    called = list(names) if names is not None else [str(run.get("name")) for run in runs]
    results = [checked(run, where) for run, where in zip(runs, called, strict=True)]
    groups, repeats = _grouped(results)
    members = [[results[i] for i in group] for group in groups]
    flats = [_flat(group[0]["recipe"]) for group in members]
    settings = _differing(flats)
    labels = _labels(members, [called[group[0]] for group in groups], settings)
    rows: list[ComparisonRow] = []
    places: list[int] = []  # the row of each group
    gains: list[Effect] = []
    for label, group, runs_of_row in zip(labels, groups, members, strict=True):
        place, named = len(rows), [called[i] for i in group]
        places.append(place)
        rows.append(_row(label, named, runs_of_row, settings))
        for way in dict.fromkeys(name for run in runs_of_row for name in answers.names(run)):
            other = [answers.answered(run, way) for run in runs_of_row]
            rows.append(_way_row(_row(f"{label}: {way}", named, other, settings), way))
            if way == answers.ORACLE:  # not a way in which the method could have answered
                continue
            ways, numbers = (way, answers.own_name(runs_of_row[0])), (len(rows) - 1, place)
            gain = answer_effect(ways, numbers, label if len(groups) > 1 else "", (other, runs_of_row))
            gains += [gain] if gain else []
    changes: list[Effect] = [
        {**effect, "rows": (places[effect["rows"][0]], places[effect["rows"][1]])} for effect in effects(members, flats)
    ]
    sources = [_source(called[group[0]], results[group[0]]) for group in groups]
    counted = [i for i in range(len(results)) if i not in repeats]
    notes, rankable = _notes([results[i] for i in counted], [called[i] for i in counted])
    notes += [
        f"{called[i]} repeats {called[first]} (same recipe, data and seed) and is not counted"
        + ("" if results[i]["cells"] == results[first]["cells"] else ", though its figures differ")
        for i, first in repeats.items()
    ]
    best = {key: _best(rows, key) if rankable and len(rows) > 1 else [] for key in rows[0]["metrics"]}
    return {
        "format": 1,
        "measure": "score" if any(measure(run) == "score" for run in results) else "accuracy",
        "rows": rows,
        "settings": settings,
        "best": best,
        "effects": [*changes, *gains],
        "headroom": headrooms(members, labels, [[called[i] for i in group] for group in groups], sources),
        "notes": notes,
    }


def _source(called: str, run: Results) -> str:
    """The argument with which `perpetune run` runs it again: the recipe in its state folder, or the recipe's name."""
    places = (Path(called) / "recipe.yaml", Path(called).parent / "recipe.yaml")
    return next((str(place) for place in places if place.is_file()), str(run["recipe"].get("name", run["name"])))


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's settings by dotted key, without those that change no figure."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        name = prefix + key
        if name in NEUTRAL:
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, name + ".")
        else:
            flat[name] = value
    if not prefix and (earlier := (recipe.get("evaluate") or {}).get("earlier", "all")) != "all":
        flat["evaluate.earlier"] = earlier  # its figures are of samples
    return flat


def _grouped(results: Sequence[Results]) -> tuple[list[list[int]], dict[int, int]]:
    """The numbers of the runs in each row; and for each run that repeats another run of its row, that run's number."""
    groups: dict[str, list[dict[int, int]]] = {}  # identity: for each row the first run of each seed
    rows: list[dict[int, int]] = []
    repeats = {}
    for i, run in enumerate(results):
        alike = groups.setdefault(_identity(run), [])
        # The data at a recipe's path may change. Then the same seed draws other examples, which makes another row.
        row = next((r for r in alike if (k := r.get(run["seed"])) is None or _data(results[k]) == _data(run)), None)
        if row is None:
            row = {}
            alike.append(row)
            rows.append(row)
        first = row.setdefault(run["seed"], i)
        if first != i:
            repeats[i] = first
    return [list(row.values()) for row in rows], repeats


def _identity(run: Results) -> str:
    """A key that the runs of one row share: the recipe, the number of learned tasks, and the data without the seed's
    draws."""
    tasks = run["tasks"]
    data: list[Any]
    if _given(run):
        data = _data(run)
    else:  # the seed orders the classes and draws the examples
        data = [sorted(_content(run)), len(tasks), sum(task["train"] for task in tasks), _examples(run)]
    return json.dumps([run["setting"], _flat(run["recipe"]), len(run["cells"]), data], sort_keys=True)


def _given(run: Results) -> bool:
    """Whether the user gave the tasks one by one, and the recipe names no stream."""
    return run["recipe"].get("data") is None


def _fingerprints(run: Results) -> list[str | None]:
    return [task.get("fingerprint") for task in run["tasks"]]


def _data(run: Results) -> list[Any]:
    keys = ("name", "classes", "train", "test", "fingerprint")
    return [[task.get(key) for key in keys] for task in run["tasks"]]


def _differing(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    return [key for key in keys if len({json.dumps(r.get(key), sort_keys=True) for r in recipes}) > 1]


def _labels(groups: Sequence[Sequence[Results]], called: Sequence[str], settings: Sequence[str]) -> list[str]:
    """A name for each row: the name of its runs. If several rows have this name, with the settings that differ; if none
    differs, with the user's name for the first run."""
    labels = [" / ".join(dict.fromkeys(run["name"] for run in group)) for group in groups]
    alike: dict[str, list[int]] = {}  # rows with the same name get the settings that differ among them
    for i, label in enumerate(labels):
        alike.setdefault(label, []).append(i)
    for rows in alike.values():
        recipes = [_flat(groups[i][0]["recipe"]) for i in rows]
        keys = [key for key in _differing(recipes) if key in settings][:3]
        for i, flat in zip(rows, recipes, strict=True):
            labels[i] += "".join(f" · {_short(key)} {form.setting(flat.get(key))}" for key in keys)
    repeated = {label for label in labels if labels.count(label) > 1}
    labels = [f"{label} · {name}" if label in repeated else label for label, name in zip(labels, called, strict=True)]
    return [f"{label} #{i + 1}" if labels.count(label) > 1 else label for i, label in enumerate(labels)]


def _short(key: str) -> str:
    """`method` for `method.name`, else the last word of the key."""
    *parents, last = key.split(".")
    return parents[-1] if parents and last == "name" else last


def _row(label: str, names: list[str], runs: Sequence[Results], settings: Sequence[str]) -> ComparisonRow:
    flat, curves = _flat(runs[0]["recipe"]), [curves_of(run) for run in runs]
    return {
        "label": label,
        "way": None,
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
        "stored_bytes": spread([stored_bytes(run) for run in runs]),
        "learn_seconds": spread([learn_seconds(run) for run in runs]),
        "moved": spread([protection.moved(run) for run in runs]),
        "room": spread([protection.room(run) for run in runs]),
        "drift": spread([drift.final(run) for run in runs]),
        "average_accuracy_curve": _pointwise([c.accuracy for c in curves]),
        "forgetting_curve": _pointwise([c.forgetting for c in curves]),
    }


def _way_row(row: ComparisonRow, way: str) -> ComparisonRow:
    """The row of another way to answer, without the facts that do not depend on the way."""
    none = spread([None] * len(row["runs"]))
    once = ("trainable_parameters", "stored_bytes", "learn_seconds", "moved", "room", "drift")
    costs: Any = dict.fromkeys(once, none)
    return {**row, **costs, "way": way}


def _pointwise(series: Sequence[Sequence[float | None]]) -> list[Spread]:
    return [spread(values) for values in zip(*series, strict=True)]


def _best(rows: Sequence[ComparisonRow], key: str) -> list[int]:
    sign = -1 if key in LOWER_IS_BETTER else 1
    results = [(i, row["metrics"][key]["mean"]) for i, row in enumerate(rows) if row["way"] != answers.ORACLE]
    means = [(sign * mean, i) for i, mean in results if mean is not None]
    if len(means) < 2:
        return []
    top = max(means)[0]
    return [i for mean, i in means if mean == top]


def _classes(run: Results) -> set[str]:
    return {name for task in run["tasks"] for name in task["classes"]}


def _parts(task: TaskInfo) -> set[str]:
    """The content of a task: its classes, or its name if its answers are free text."""
    return set(task["classes"]) or {task["name"]}


def _content(run: Results) -> set[str]:
    return {part for task in run["tasks"] for part in _parts(task)}


def _notes(results: Sequence[Results], names: Sequence[str]) -> tuple[list[str], bool]:
    """Notes for the reader who compares the rows, and whether the rows can be ranked."""
    apart = [
        f"{name} is not complete: {form.plural(len(run['cells']), 'task')} learned so far"
        for run, name in zip(results, names, strict=True)
        if not run["complete"]
    ]
    apart += [
        f"{name} is measured on a part of earlier tasks' test data (evaluate.earlier)"
        for run, name in zip(results, names, strict=True)
        if sampled(run)
    ]
    apart += [
        f"{name} has no figures after some tasks, because earlier ones were not asked then (evaluate.earlier)"
        for run, name in zip(results, names, strict=True)
        if left_out(run)
    ]
    reordered = []
    first, reference = results[0], names[0]
    for run, name in zip(results[1:], names[1:], strict=True):
        if run["setting"] != first["setting"]:
            apart.append(f"{name} is {run['setting']}-incremental, {reference} is {first['setting']}-incremental")
        what = "classes" if _classes(run) or _classes(first) else "tasks"
        if _content(run) != _content(first):
            apart.append(f"{name} has other {what} than {reference}: {_sizes(run)} against {_sizes(first)}")
        elif len(run["tasks"]) != len(first["tasks"]):
            apart.append(
                f"{name} cuts the classes into {len(run['tasks'])} tasks, {reference} into {len(first['tasks'])}"
            )
        elif _examples(run) != _examples(first):
            apart.append(f"{name} is tested on {_examples(run)} examples, {reference} on {_examples(first)}")
        elif _given(run) and _given(first) and _fingerprints(run) != _fingerprints(first):
            apart.append(f"{name} learned other data than {reference}")
        elif list(map(_parts, run["tasks"])) != list(map(_parts, first["tasks"])):
            reordered.append(name)
    if reordered:
        verb, what = "has" if len(reordered) == 1 else "have", "classes" if _classes(first) else "tasks"
        another = f"{form.several(reordered, 3)} {verb} the {what} of {reference} in another order"
        return [*apart, another], not apart
    return apart, not apart


def _examples(run: Results) -> int:
    return sum(task["test"] for task in run["tasks"])


def _sizes(run: Results) -> str:
    tasks = form.plural(len(run["tasks"]), "task")
    return f"{len(_classes(run))} classes in {tasks}" if _classes(run) else tasks
