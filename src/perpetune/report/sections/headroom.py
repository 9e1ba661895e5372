"""The section about headroom: how much there is to win over not training, and how much of it each run wins.

The control does not train: it puts head `ridge` on the frozen model's own feature. Joint trains on all data at once.
The difference between them is the headroom. A method that recovers none of it brings nothing.
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypedDict

from perpetune.report import form
from perpetune.report.blocks import Block, Cell, Code, Column, Heading, Only, Panel, Rows, Table, Text
from perpetune.report.document import classed, measure
from perpetune.report.results_schema import Results
from perpetune.report.sections import answers
from perpetune.report.spread import Spread, spread

Part = Literal["control", "frozen taps", "joint"]
PARTS: tuple[Part, ...] = ("control", "frozen taps", "joint")
Role = Literal["control", "frozen taps", "method", "joint", "diagnosis"]
Key = tuple[int, str]  # a run's seed, and what its tasks are

LEAST = 0.01  # of accuracy: a share of a headroom below one point would be noise
TAPS = "auto"  # the blocks to read, if no run says how many
LOOSE = ("augment", "check", "overlap", "max_bad")  # settings of a stream that do not change its tasks
NAMES = {"control": "control", "frozen taps": "taps", "joint": "joint"}  # the ending of a new run's name
WHAT = {
    "control": "control (method frozen, head ridge, no taps)",
    "frozen taps": "frozen taps (method frozen, head ridge, backbone.taps)",
    "joint": "joint run (method joint)",
}
HEADINGS = ("part", "run", "head", "n", "final accuracy, %", "recovered, %", "of what frozen taps leave, %")
MEANING = (
    "The control does not train the model: it is ridge regression on the frozen model’s own feature (the last class "
    "token of a picture, the mean over the tokens of a text). Joint trains on all data at once; if there are several "
    "joint runs, the best one counts, with any head. Headroom is the final accuracy of joint minus that of the "
    "control. A run recovers the share (run − control) / (joint − control) of it. Frozen taps do not train the model "
    "either, but their head reads several blocks. The last column is the share that a run recovers of the rest, "
    "(run − taps) / (joint − taps). Each figure is computed for each seed: mean ± sample standard deviation over the "
    "seeds that have all parts."
)


class HeadroomRow(TypedDict):
    """One row of a comparison as a part of the headroom.

    Attributes:
        role: the part; `diagnosis` is an oracle head, which is not a result.
        label: the row's name.
        details: its head and its taps.
        counts: whether the others are measured by this row, as the control, the frozen taps or the joint run.
        seeds: the seeds with all parts.
        final: the final accuracy at these seeds; at all seeds if the control or joint is missing.
        recovered: the share of the headroom that the row recovers.
        left: the share that it recovers of the rest that the frozen taps leave.
    """

    role: Role
    label: str
    details: str
    counts: bool
    seeds: list[int]
    final: Spread
    recovered: Spread
    left: Spread


class Missing(TypedDict):
    """A part that is missing at some seeds, and the command that makes it; the command is empty if there is none."""

    part: Part
    seeds: list[int]
    command: str


class Headroom(TypedDict):
    """The headroom of one stream with one backbone.

    Attributes:
        of: the stream and the backbone, in words.
        runs: the user's names for the runs.
        rows: the rows.
        headroom: joint minus control; without values if one of them is missing.
        seeds: the seeds of its values.
        missing: the parts that are missing.
        told: the headroom in a sentence.
    """

    of: str
    runs: list[str]
    rows: list[HeadroomRow]
    headroom: Spread
    seeds: list[int]
    missing: list[Missing]
    told: str


def section(results: Results) -> list[Block] | None:
    """The headroom of this run and other runs, if the document has it (`report.write_report`)."""
    streams: Sequence[Any] = results.get("headroom", [])
    return blocks(streams) if streams else None


def blocks(found: Sequence[Headroom]) -> list[Block]:
    """The headroom of each stream, for a report or a comparison."""
    about = "the runs that count as control, frozen taps and joint are bold; a diagnosis is not a result"
    parts: list[Block] = [Heading("Headroom"), Text(MEANING)]
    for one in found:
        inner: list[Block] = [_table(one)]
        for text, command in missing_lines(one):
            inner.append(Text(f"{text}; this command makes it:" if command else text))
            inner += [Code(command, "sh")] if command else []
        parts.append(Panel(inner, one["told"], f"{one['of']}; {about}"))
    return [*parts, Only("terminal", in_terminal(found))]


def in_terminal(found: Sequence[Headroom]) -> list[Block]:
    """For the terminal: the parts of each headroom, the missing parts, and in the last lines how much each run won."""
    headings = ("headroom", "run", "head", "n", "final", "recovered", "of what taps leave")
    parts: list[Block] = [_table(one, headings) for one in found if one["headroom"]["n"]]
    for one in found:
        for text, command in missing_lines(one):
            parts += [Text(f"{text}:", warning=True), Code(command, "sh")] if command else [Text(text, warning=True)]
    return [*parts, *(Text(one["told"]) for one in found)]


def _table(one: Headroom, headings: Sequence[str] = HEADINGS) -> Table:
    rows: Rows = [
        [
            Cell(row["role"], style="best" if row["counts"] else ""),
            Cell(row["label"], style="best" if row["counts"] else ""),
            row["details"],
            len(row["seeds"]),
            *texts(row),
        ]
        for row in one["rows"]
    ]
    return Table([Column(heading, left=i < 3) for i, heading in enumerate(headings)], rows)


def headrooms(
    rows: Sequence[Sequence[Results]],
    labels: Sequence[str],
    called: Sequence[Sequence[str]],
    sources: Sequence[str] | None = None,
) -> list[Headroom]:
    """The headroom of each stream and backbone with a control or a joint run.

    Args:
        rows: the runs of each row of a comparison, each seed once.
        labels: the name of each row.
        called: the user's name for each run of each row.
        sources: for each row the recipe that `perpetune run` takes to run it again; None takes the recipe's name.
    """
    groups: dict[str, list[int]] = {}
    for i, runs in enumerate(rows):
        if classed(runs[0]) and measure(runs[0]) == "accuracy" and _name(runs[0], "head") != "lm":
            groups.setdefault(_place(runs[0]), []).append(i)
    streams = []
    for group in groups.values():
        roles = [role_of(rows[i][0]["recipe"]) for i in group]
        if not {"control", "joint"} & set(roles):
            continue
        again = [sources[i] if sources is not None else str(rows[i][0]["recipe"].get("name", "")) for i in group]
        members = [_Row(role, rows[i], labels[i], source) for i, role, source in zip(group, roles, again, strict=True)]
        streams.append(_headroom(members, [name for i in group for name in called[i]]))
    if len(streams) > 1:  # each sentence names its stream
        streams = [{**one, "told": f"{one['of']}: {one['told']}"} for one in streams]
    return streams


def role_of(recipe: Mapping[str, Any]) -> Literal["control", "frozen taps", "method", "joint"]:
    """The role of a run for the headroom."""
    method, head = _choice(recipe, "method").get("name"), _choice(recipe, "head").get("name")
    if method == "joint":
        return "joint"
    if method == "frozen" and head == "ridge":
        return "frozen taps" if _taps(recipe) else "control"
    return "method"


def changes(part: Part, recipe: Mapping[str, Any], taps: int | str | None) -> list[str]:
    """The `--set` changes that turn a recipe into its control, frozen taps or joint run.

    For joint, `taps` may be None, which keeps the recipe's head.
    """
    backbone, head = _choice(recipe, "backbone"), _choice(recipe, "head")
    wanted = {"control": "frozen", "frozen taps": "frozen", "joint": "joint"}[part]
    settings = [f"method={wanted}"] if _choice(recipe, "method").get("name") != wanted else []
    if part != "joint":
        settings += ["pet=none"] if recipe.get("pet") is not None else []
    elif recipe.get("pet") is None:
        settings += ["pet=lora"]
    settings += ["protect=null"] if recipe.get("protect") is not None else []
    settings += ["evaluate.oracle=false"] if (recipe.get("evaluate") or {}).get("oracle") else []
    if part == "control":
        settings += [f"backbone.{key}=null" for key in ("tokens", "taps") if backbone.get(key) is not None]
    elif taps is not None and backbone.get("taps") != taps:
        settings += [f"backbone.taps={taps}"]
    if (part != "joint" or taps is not None) and head.get("name") != "ridge":
        settings += ["head=ridge"]
    if part == "frozen taps" or (part == "joint" and taps is not None):
        settings += ["head.projection=0"] if head.get("projection") != 0 or head.get("name") != "ridge" else []
    return settings


class _Row:
    """A row of the comparison, with the final accuracies of its complete runs."""

    def __init__(self, role: Role, runs: Sequence[Results], label: str, source: str):
        self.role, self.runs, self.label, self.source = role, runs, label, source
        self.recipe = runs[0]["recipe"]
        self.finals = _finals(runs)
        oracle = [answers.answered(run, answers.ORACLE) for run in runs if answers.ORACLE in answers.names(run)]
        self.oracles = _finals(oracle)
        self.oracle_head = f"head {answers.oracle_head(runs[0])}"

    @property
    def details(self) -> str:
        """`head ridge, taps 7`."""
        taps = _taps(self.recipe)
        head = f"head {_choice(self.recipe, 'head').get('name')}"
        return f"{head}, taps {form.setting(taps)}" if taps else head


def _finals(runs: Sequence[Results]) -> dict[Key, float]:
    whole = [run for run in runs if run["complete"] and len(run["cells"]) == len(run["tasks"])]
    return {_key(run): value for run in whole if (value := run["metrics"]["final_accuracy"]) is not None}


def _headroom(rows: Sequence[_Row], names: list[str]) -> Headroom:
    control = _best([row for row in rows if row.role == "control"], None)
    joint = _best([row for row in rows if row.role == "joint"], control)
    taps = _best([row for row in rows if row.role == "frozen taps"], control)
    scale = _Scale(*({} if row is None else row.finals for row in (control, taps, joint)))
    both = list(scale.gaps)
    parts: list[HeadroomRow] = []
    for role in ("control", "frozen taps", "method", "joint"):
        for row in (row for row in rows if row.role == role):
            measured = scale.measure(row.finals)
            counts = any(row is one for one in (control, taps, joint))
            about = {"details": row.details, "counts": counts}
            parts.append({"role": row.role, "label": row.label, **about, **measured})  # type: ignore[typeddict-item]
            if row.oracles:
                measured, label = scale.measure(row.oracles), f"{row.label}: {answers.ORACLE}"
                about = {"details": row.oracle_head, "counts": False}
                parts.append({"role": "diagnosis", "label": label, **about, **measured})  # type: ignore[typeddict-item]
    one: Headroom = {
        "of": _told_place(rows[0].runs[0]),
        "runs": names,
        "rows": parts,
        "headroom": spread(list(scale.gaps.values())),
        "seeds": [seed for seed, _ in both],
        "missing": _missing(rows, control, taps, joint),
        "told": "",
    }
    return {**one, "told": _told(one, control, joint, both)}


class _Scale:
    """The scale from the control to joint, for each seed. A missing part has no values."""

    def __init__(self, control: Mapping[Key, float], taps: Mapping[Key, float], joint: Mapping[Key, float]):
        self.control, self.taps, self.joint = control, taps, joint
        self.gaps = {key: joint[key] - low for key, low in control.items() if key in joint}
        self.some = bool(self.gaps) and statistics.fmean(self.gaps.values()) > 0

    def measure(self, finals: Mapping[Key, float]) -> dict[str, Any]:
        """The positions of final accuracies on the scale."""
        keys = [key for key in finals if key in self.gaps] if self.gaps else list(finals)
        placed = keys if self.some else []
        return {
            "seeds": [seed for seed, _ in keys],
            "final": spread([finals[key] for key in keys]),
            "recovered": spread([_share(finals[key], self.control[key], self.joint[key]) for key in placed]),
            "left": spread([_share(finals[key], self.taps.get(key), self.joint[key]) for key in placed]),
        }


def _share(value: float, low: float | None, high: float) -> float | None:
    """The position of `value` between `low` and `high`; None without `low`, or if `high` is less than a point above."""
    return None if low is None or high - low < LEAST else (value - low) / (high - low)


def _best(rows: Sequence[_Row], beside: _Row | None) -> _Row | None:
    """The row with the best mean over the seeds that all rows (and `beside`) share, as far as there are such seeds."""
    rows = [row for row in rows if row.finals]
    if not rows:
        return None
    shared = set(rows[0].finals).intersection(*(row.finals for row in rows[1:]))

    def mean(row: _Row) -> float:
        own = row.finals.keys()
        keys = next(k for k in (shared & own & (beside.finals.keys() if beside else own), shared & own, own) if k)
        return statistics.fmean(row.finals[key] for key in keys)

    return max(rows, key=mean)


# -- what is missing ---------------------------------------------------------------------------------------


def _missing(rows: Sequence[_Row], control: _Row | None, taps: _Row | None, joint: _Row | None) -> list[Missing]:
    wanted = sorted({run["seed"] for row in rows for run in row.runs})
    chosen: dict[Part, _Row | None] = {"control": control, "frozen taps": taps, "joint": joint}
    count = next((n for row in (taps, joint, *rows) if row and (n := _taps(row.recipe))), None)
    parts: list[Missing] = []
    for part, row in chosen.items():
        begun = row or next((r for r in rows if r.role == part), None)  # not complete: the same command goes on
        seeds = [seed for seed in wanted if seed not in ({s for s, _ in begun.finals} if begun else ())]
        if not seeds:
            continue
        made: list[str] = []
        base = begun
        if base is None:
            base = _base(part, rows)
            made = changes(part, base.recipe, (count or TAPS) if part == "frozen taps" else count)
            made += [f"name={base.recipe.get('name', 'run')}-{NAMES[part]}"]
        command = _command(base.source, made, seeds) if base.recipe.get("data") is not None else ""
        parts.append({"part": part, "seeds": seeds, "command": command})
    return parts


def _base(part: Part, rows: Sequence[_Row]) -> _Row:
    """The row whose recipe is the base of a missing part: for joint a row that trains a pet, else a frozen row."""
    frozen = [row for row in rows if row.role in ("control", "frozen taps")]
    if part == "joint":
        trained = [row for row in rows if row.recipe.get("pet") is not None]
        return next((row for row in trained if row.role == "method"), (trained or rows)[0])
    return frozen[0] if frozen else rows[0]


def _command(source: str, made: Collection[str], seeds: Sequence[int]) -> str:
    named = ",".join(map(str, seeds)) if len(seeds) > 1 else f"{seeds[0]},"
    if list(seeds) == list(range(len(seeds))):
        named = str(len(seeds))
    return shlex.join(
        ["perpetune", "run", source, *(w for change in made for w in ("--set", change)), "--seeds", named]
    )


# -- in words ----------------------------------------------------------------------------------------------


def missing_lines(one: Headroom) -> list[tuple[str, str]]:
    """For each missing part a text that names it, and the command that makes it."""
    return [
        (f"no {WHAT[missing['part']]} at {_seeds(missing['seeds'])}", missing["command"]) for missing in one["missing"]
    ]


def texts(row: HeadroomRow) -> tuple[str, str, str]:
    """The texts of the final accuracy, of the recovered share and of the share of the rest."""
    return (_mean_std(row["final"], 1), _mean_std(row["recovered"], 0), _mean_std(row["left"], 0))


def _told(one: Headroom, control: _Row | None, joint: _Row | None, both: Sequence[Key]) -> str:
    gap = one["headroom"]["mean"]
    if gap is None or control is None or joint is None:
        absent = [WHAT[part] for part, row in (("control", control), ("joint", joint)) if row is None]
        why = f"there is no {' and no '.join(absent)}" if absent else "control and joint have no seed in common"
        return f"headroom is not known: {why}"
    means = [statistics.fmean(row.finals[key] for key in both) for row in (joint, control)]
    between = f"(joint, {joint.details}: {form.percent(means[0])}; control {form.percent(means[1])})"
    if gap <= 0:
        return f"no headroom {between}"
    none = [
        seed for key, seed in zip(both, one["seeds"], strict=True) if joint.finals[key] - control.finals[key] < LEAST
    ]
    text = f"headroom {_mean_std(one['headroom'], 1)} points {between}"
    taps = [("frozen taps", row) for row in one["rows"] if row["role"] == "frozen taps" and row["counts"]]
    other = [(row["label"], row) for row in one["rows"] if row["role"] == "method"]
    shares = [(name, row) for name, row in [*taps, *other] if row["recovered"]["mean"] is not None]
    if shares:
        verb = "recover" if shares[0][0] == "frozen taps" else "recovers"
        parts = [f"{name} {_with_seeds(row, both)}" for name, row in shares]
        parts[0] = f"{shares[0][0]} {verb} {_with_seeds(shares[0][1], both)}"
        text += f": {', '.join(parts)}"
    oracles = [row for row in one["rows"] if row["role"] == "diagnosis" and row["recovered"]["mean"] is not None]
    if oracles:
        parts = [f"{row['label'].removesuffix(': ' + answers.ORACLE)} {_with_seeds(row, both)}" for row in oracles]
        text += f"; with an oracle head (diagnosis) {', '.join(parts)}"
    if none:
        text += f"; no share is defined at {_seeds(none)}, where joint is less than a point above the control"
    return text


def _with_seeds(row: HeadroomRow, both: Sequence[Key]) -> str:
    share = f"{_mean_std(row['recovered'], 0)} %"
    return share if len(row["seeds"]) == len(both) else f"{share} ({len(row['seeds'])} of {len(both)} seeds)"


def _mean_std(value: Spread, digits: int) -> str:
    mean, std = value["mean"], value["std"]
    return form.mean_std(form.percent(mean, digits), None if std is None else form.percent(std, digits))


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


# -- which runs belong together ----------------------------------------------------------------------------


def _place(run: Results) -> str:
    """A key that is equal for runs that can be compared: the setting, the data, the stream and the backbone."""
    recipe = run["recipe"]
    stream = {key: value for key, value in (recipe.get("stream") or {}).items() if key not in LOOSE}
    backbone = _choice(recipe, "backbone")
    net = [backbone.get("name"), backbone.get("image_size"), backbone.get("pretrained", True)]
    net += [backbone.get("architecture")]
    given = [] if recipe.get("data") is not None else _tasks(run)  # a recipe does not have the tasks of an update
    return json.dumps([run["setting"], recipe.get("data"), stream, net, len(run["tasks"]), given], sort_keys=True)


def _key(run: Results) -> Key:
    return run["seed"], json.dumps(_tasks(run))


def _tasks(run: Results) -> list[Any]:
    return [[sorted(t["classes"]), t["train"], t["test"], t.get("fingerprint")] for t in run["tasks"]]


def _told_place(run: Results) -> str:
    recipe = run["recipe"]
    data, backbone = _choice(recipe, "data"), _choice(recipe, "backbone")
    name = str(data.get("path") or data.get("name") or "given tasks")
    size = f" at {backbone['image_size']} px" if backbone.get("image_size") else ""
    return (
        f"{name}, {form.plural(len(run['tasks']), 'task')}, {run['setting']}-incremental, {backbone.get('name')}{size}"
    )


def _name(run: Results, section: str) -> str:
    return str(_choice(run["recipe"], section).get("name"))


def _choice(recipe: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    """A section of a recipe that names something, in its long form."""
    value = recipe.get(section)
    return value if isinstance(value, Mapping) else {"name": value}


def _taps(recipe: Mapping[str, Any]) -> int | str | None:
    taps = _choice(recipe, "backbone").get("taps")
    return taps if taps == "auto" or (isinstance(taps, int) and not isinstance(taps, bool)) else None
