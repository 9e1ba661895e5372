"""The results document: all figures of one run, as plain data. `report.json` begins with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from typing_extensions import NotRequired, TypedDict  # pydantic reads no other TypedDict before Python 3.12

from perpetune.errors import StateError
from perpetune.numerics.metrics import Cell, Metrics
from perpetune.numerics.transfer import ZeroShot

FORMAT = 1


class TaskInfo(TypedDict):
    """One task. `train` and `test` are numbers of examples, `fingerprint` is that of its data. If `classes` is empty,
    its answers are free text."""

    index: int
    name: str
    classes: list[str]
    train: int
    test: int
    fingerprint: NotRequired[str]


class OracleCell(TypedDict):
    """The right answers of the oracle head, a diagnosis: it was solved on all data so far. `head` is its kind."""

    correct: float
    head: str


class AnsweredCell(Cell):
    """Counts on one task, as `Cell`.

    Attributes:
        others: for each other way to answer its right answers (or sum of scores), by name.
        gauges: means of numbers that show how the method came to its answer, by name.
        oracle: the oracle head, with `evaluate.oracle`. It has seen all old data, so it is no way of the method.
        gates: yes or no about how the method came to its answers, by name: how often yes, and how often the answer is
            right then.
        goes_to: with `evaluate.future`, how many examples are answered with a class of each task, by its name.
        members: for each member of a pool how often it was chosen, by name.
        told: right answers of a method that knows the task, with `evaluate.told`: a bound, no way of the method.
    """

    others: NotRequired[dict[str, float]]
    gauges: NotRequired[dict[str, float]]
    oracle: NotRequired[OracleCell]
    gates: NotRequired[dict[str, list[int]]]
    goes_to: NotRequired[dict[str, int]]
    members: NotRequired[dict[str, int]]
    told: NotRequired[float]


class Unlearned(TypedDict):
    """The counts on tasks that are not learned yet, by name, before the first task (`task` is None) or after a task."""

    task: int | None
    of: dict[str, AnsweredCell | None]


class Facts(TypedDict):
    """The result of a method's `facts()` after one task, by name, such as each head's solution or the tree of tasks.

    `kind`, if there is one, says which section of the report reads a fact (`report.sections.reads`)."""

    task: int
    of: dict[str, dict[str, Any]]


class Moved(TypedDict):
    """How far the features of earlier tasks had moved after one task, by the earlier task's name.

    The figure is the mean distance between old and new features, normalised to length 1, of a few test examples. 0
    means that they have not moved; the largest value is 2.
    """

    task: int
    of: dict[str, float]


class Exams(TypedDict):
    """The numbers of the exams before the first task (`task` is None) or after a task, by exam and by name."""

    task: int | None
    of: dict[str, dict[str, float]]


class NotAsked(TypedDict):
    """The earlier tasks that were not asked after one task, by name, because `evaluate.earlier` says so."""

    task: int
    of: list[str]


class InTurn(TypedDict):
    """How many earlier tasks were not asked after one task, because others were asked longer ago."""

    task: int
    count: int


class Timing(TypedDict):
    """Time and memory of one task, in seconds and bytes.

    Attributes:
        prepare_s: finding the data and checking the examples.
        learn_s: learning; a part of it are `statistics_s` (passes for a head's sums) and `protect_s`.
        evaluate_s: all that was measured; parts of it are `new_s` (the new task's test data), `earlier_s` (those of
            other tasks), `drift_s`, `exams_s` and `oracle_s` (solving the oracle head).
        commit_s, report_s: storing the task, and the report after it. Documents of a task that was learned by an
            earlier version lack most of these.
        images, tokens: examples that were trained on (all epochs), and their tokens if they are texts.
    """

    task: int
    prepare_s: NotRequired[float]
    statistics_s: NotRequired[float]
    new_s: NotRequired[float]
    earlier_s: NotRequired[float]
    drift_s: NotRequired[float]
    exams_s: NotRequired[float]
    commit_s: NotRequired[float]
    report_s: NotRequired[float]
    learn_s: float
    protect_s: NotRequired[float]
    evaluate_s: float
    oracle_s: NotRequired[float]
    images: int
    images_per_s: float | None
    tokens: NotRequired[int]
    tokens_per_s: NotRequired[float]
    peak_memory_bytes: int | None


class BadFile(TypedDict):
    """A file of the user that could not be read. `task` is the index of its task, None if not known."""

    task: int | None
    file: str
    reason: str


class SiteMoved(TypedDict):
    """One place where features meet trained parameters.

    `change` is the root mean square of the change of its outputs on all earlier data. `relative` is the same divided by
    the root mean square of the outputs (None if nothing was protected before, or the outputs are zero). `room` is the
    share of its `directions` that is still free after the entry's own data were added; `rank` of them are taken.
    """

    site: str
    change: float
    relative: float | None
    directions: int
    room: float
    rank: int


class Consolidation(TypedDict):
    """The certificate, made each time data are protected: how far old outputs had moved, and the room that is left.

    Attributes:
        task: the index of the task.
        of: the data that were added: those of the `task` itself, or the recipe's `reference`.
        examples, rows: the numbers of these examples and of rows; a row is one vector at a site, such as one token's.
        texts: the number of texts that were read beside them, if any.
        energy: the share of the features' energy that was protected.
        consolidated: how often data had been added before.
        worst, median: of `relative` over the sites; None if nothing was protected before.
        room: the mean room over the sites that are held (`protect.sites`).
        full: the names of held sites without room.
    """

    task: int
    of: Literal["task", "reference"]
    examples: int
    texts: NotRequired[int]
    rows: int
    energy: float
    consolidated: int
    sites: list[SiteMoved]
    worst: float | None
    median: float | None
    room: float
    full: list[str]


class Results(TypedDict):
    """One run.

    Attributes:
        cells: a row for each task learned so far, a column for each task; None is not measured.
        storage: for each task `{"task": index, file kind: bytes, …}`, as if it stored all that it needs.
        disk: for each task `{"task": index, "bytes": bytes}`, what is in its own folder of the tensors in `storage`;
            tasks share what is the same. Older documents do not have it.
        facts, drift: one entry after each task; an entry may be empty. Older documents do not have them.
        exams: in the order in which they were taken; absent if the recipe has none.
        not_asked: the tasks that were not asked after others; absent if all were.
        in_turn: after which tasks some of the earlier ones had to wait for their turn; absent if none had to.
        forgot: of each entry that is no task, but forgot something: `task`, its number, and the names of the `tasks`
            and `classes`; absent if nothing was forgotten.
        gates: what the gate said of each task that had one (`perpetune.gate.judge`), with `task`; absent if none had.
        unlearned, zero_shot: with `evaluate.future`: the tasks that were asked before they were learned, first of all
            before the first task; and the figures of it.
        protection: the certificates in order; empty without `protect:`. Older documents do not have them.
        recipe: the resolved recipe, with every default written out.
        examples: the word for the backbone's examples, in the plural; older documents do not have it, or have None.
        trainable_parameters, backbone_parameters: None if no model has been built yet.
        complete: whether all tasks of the stream were learned; if not, `tasks` may have the learned tasks only.
        extra: any other data of a caller; reports do not show it.
        headroom: the headroom of the run's stream, with other runs (`report.sections.headroom.Headroom`).
    """

    format: int
    name: str
    setting: str
    seed: int
    tasks: list[TaskInfo]
    cells: list[list[AnsweredCell | None]]
    metrics: Metrics
    timings: list[Timing]
    storage: list[dict[str, int]]
    disk: NotRequired[list[dict[str, int]]]
    protection: NotRequired[list[Consolidation]]
    facts: NotRequired[list[Facts]]
    drift: NotRequired[list[Moved]]
    exams: NotRequired[list[Exams]]
    not_asked: NotRequired[list[NotAsked]]
    in_turn: NotRequired[list[InTurn]]
    gates: NotRequired[list[dict[str, Any]]]
    forgot: NotRequired[list[dict[str, Any]]]
    unlearned: NotRequired[list[Unlearned]]
    zero_shot: NotRequired[ZeroShot]
    examples: NotRequired[str | None]
    trainable_parameters: int | None
    backbone_parameters: int | None
    bad_files: list[BadFile]
    warnings: list[str]
    recipe: dict[str, Any]
    versions: dict[str, str]
    device: str
    complete: bool
    extra: NotRequired[dict[str, Any]]
    headroom: NotRequired[list[Any]]


def checked(document: Mapping[str, Any], where: str = "results") -> Results:
    """Check the shape of `document`, and return it as plain JSON data.

    Raises:
        StateError: it is not a results document, or this version does not know its format.
    """
    from pydantic import TypeAdapter, ValidationError

    found = document.get("format")
    if found != FORMAT:
        raise StateError(f"{where}: results of format {found!r}; this perpetune reads format {FORMAT}")
    plain = json.loads(json.dumps(document, allow_nan=False))
    try:
        TypeAdapter(Results).validate_python(plain, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise StateError(f"{where}: not a results document: {place}: {first['msg']}") from error
    results = cast(Results, plain)
    _check_sizes(results, where)
    return results


def _check_cell(cell: AnsweredCell, where: str) -> None:
    if any(len(counts) != 2 for counts in cell["per_class"].values()):
        raise StateError(f"{where}.per_class must hold [correct, total] for each class")
    if "score" in cell:
        return
    right = {"correct": cell["correct"], **{f"others.{name}": n for name, n in cell.get("others", {}).items()}}
    right |= {"oracle": cell["oracle"]["correct"]} if "oracle" in cell else {}
    right |= {f"per_class.{name}": counts[0] for name, counts in cell["per_class"].items()}
    for name, n in right.items():
        if not float(n).is_integer():
            raise StateError(f"{where}.{name}: {n} right answers are no integer, and no score is named")


def _check_sizes(results: Results, where: str) -> None:
    columns = len(results["tasks"])
    if len(results["cells"]) > columns:
        raise StateError(f"{where}: {len(results['cells'])} rows of cells for {columns} tasks")
    for i, row in enumerate(results["cells"]):
        if len(row) > columns:
            raise StateError(f"{where}: cells.{i} has {len(row)} columns for {columns} tasks")
        for j, cell in enumerate(row):
            if cell:
                _check_cell(cell, f"{where}: cells.{i}.{j}")
    indices = [task["index"] for task in results["tasks"]]
    if indices != list(range(columns)):
        raise StateError(f"{where}: tasks must be numbered 0 to {columns - 1} in order, not {indices}")
    named: dict[str, Sequence[Mapping[str, Any]]] = {
        "timings": results["timings"],
        "storage": results["storage"],
        "disk": results.get("disk", []),
        "protection": results.get("protection", []),
        "facts": results.get("facts", []),
        "drift": results.get("drift", []),
        "not_asked": results.get("not_asked", []),
        "in_turn": results.get("in_turn", []),
    }
    for key, entries in named.items():
        for entry in entries:
            if not 0 <= entry.get("task", -1) < columns:
                raise StateError(f"{where}: an entry of {key} names no task: {entry}")
    rounds: dict[str, Sequence[Mapping[str, Any]]] = {
        "exams": results.get("exams", []),
        "unlearned": results.get("unlearned", []),
    }
    for key, entries in rounds.items():
        for entry in entries:
            if entry["task"] is not None and not 0 <= entry["task"] < columns:
                raise StateError(f"{where}: an entry of {key} names no task: {entry}")
    for i, asked in enumerate(results.get("unlearned", [])):
        for name, cell in asked["of"].items():
            if cell:
                _check_cell(cell, f"{where}: unlearned.{i}.{name}")
    names = {task["name"] for task in results["tasks"]}
    for moved in results.get("drift", []):
        if unknown := sorted(moved["of"].keys() - names):
            raise StateError(f"{where}: an entry of drift names no task: {unknown[0]}")


# Facts may come from any version or package. A value that is missing or has another type counts as absent.


def facts_of(results: Mapping[str, Any], kind: str | None = None) -> list[tuple[int, str, dict[str, Any]]]:
    """(index of the task, name, facts) for all facts, or for those of one kind, in the order of the tasks."""
    listed = sorted(results.get("facts", []), key=lambda entry: entry["task"])
    entries = [(entry["task"], name, as_mapping(facts)) for entry in listed for name, facts in entry["of"].items()]
    return [one for one in entries if kind is None or one[2].get("kind") == kind]


def as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def as_mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_texts(value: object) -> list[str]:
    return [str(entry) for entry in as_list(value)]


def as_text(value: object) -> str:
    return value if isinstance(value, str) else ""


def as_number(value: object) -> float | None:
    """`value` if it is a finite number that reports can show, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -1e15 < value < 1e15 else None


def as_count(value: object) -> int | None:
    """`value` if it is a whole number of at least 0, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**18 else None
