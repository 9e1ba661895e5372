"""The effect of one setting: compare rows of a comparison that differ in this setting only, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from perpetune.report import form
from perpetune.report.results_schema import Results
from perpetune.report.spread import Spread, spread

Flat = Mapping[str, Any]  # a recipe's settings by dotted key
NAMED = ("backbone", "method", "pet", "head", "data")  # sections that choose something by name


class Effect(TypedDict):
    """Two rows of a comparison that differ in one setting.

    Attributes:
        setting: a section of the recipe (`head`) in which the rows make different choices, or one key (`train.lr`).
            `answer` compares the runs of one recipe with the same runs if their method had answered in another way.
        before, after: the setting's value in the first and in the second of `rows`.
        beside: the values, equal in both rows, of the other settings that differ somewhere in the comparison.
        rows: the numbers of the two rows.
        seeds: the seeds that both rows have, on the same tasks.
        metrics: for each figure the second row minus the first, seed by seed.
    """

    setting: str
    before: str
    after: str
    beside: dict[str, str]
    rows: tuple[int, int]
    seeds: list[int]
    metrics: dict[str, Spread]


def answer_effect(
    ways: tuple[str, str], numbers: tuple[int, int], row: str, runs: tuple[Sequence[Results], Sequence[Results]]
) -> Effect | None:
    """The gain of a method's answer over another way to answer; None if there is no common seed.

    Args:
        ways: the names of the other way and of the answer.
        numbers: the numbers of their rows in the comparison.
        row: the name of the answer's row, if there are other rows.
        runs: the runs of both rows, seed by seed.
    """
    pairs = _paired(*runs)
    if not pairs:
        return None
    beside = {"run": row} if row else {}
    return _measured("answer", ways, beside, numbers, pairs)


def effects(rows: Sequence[Sequence[Results]], flats: Sequence[Flat]) -> list[Effect]:
    """The effects of each setting. Among rows that differ in one setting only, one is the base of the others: the row
    without it (no `protect:`, no pet) if there is one, else the first.

    Args:
        rows: the runs of each row, each seed once.
        flats: the settings of each row.
    """
    settings = differing(flats)
    measured_effects = []
    for setting in settings:
        measured: set[int] = set()
        for i in sorted(range(len(rows)), key=lambda i: _word(flats[i], setting) not in ("none", "off")):
            if i in measured:
                continue
            for j in range(len(rows)):
                if j == i or j in measured or apart(flats[i], flats[j]) != setting:
                    continue
                pairs = _paired(rows[i], rows[j])
                if pairs:
                    measured.add(j)
                    measured_effects.append(_effect(setting, (i, j), flats, pairs, settings))
    return measured_effects


def differing(flats: Sequence[Flat]) -> list[str]:
    """The settings in which rows differ: sections with different choices, and single keys that differ between rows with
    the same choice."""
    settings: dict[str, None] = {}
    for key in dict.fromkeys(key for flat in flats for key in flat):
        section, values = _section(key), {form.setting(flat.get(key)) for flat in flats}
        if len(values) == 1:
            continue
        alike: dict[str, set[str]] = {}  # the values of this key among the rows of each choice
        for flat in flats:
            alike.setdefault(_word(flat, section), set()).add(form.setting(flat.get(key)))
        if len(alike) > 1:
            settings[section] = None
        if any(len(found) > 1 for found in alike.values()):
            settings[key] = None
    return list(settings)


def apart(a: Flat, b: Flat) -> str | None:
    """The only setting in which two recipes differ; None if they differ in no setting or in several."""
    keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
    sections = {_section(key) for key in keys}
    if len(sections) != 1:
        return None
    (section,) = sections
    if _word(a, section) != _word(b, section):
        return section
    return keys[0] if len(keys) == 1 else None


def _section(key: str) -> str:
    return key.partition(".")[0]


def _word(flat: Flat, setting: str) -> str:
    """A row's value of a setting, in a word: a choice's name, `on` or `off` for an optional section, or a value."""
    if flat.get(f"{setting}.name") is not None:
        return str(flat[f"{setting}.name"])
    if any(key.startswith(f"{setting}.") for key in flat):
        return "on"
    value = flat.get(setting)
    return form.setting(value) if value is not None or "." in setting else "none" if setting in NAMED else "off"


def _paired(first: Sequence[Results], second: Sequence[Results]) -> list[tuple[Results, Results]]:
    """Pairs of runs from both rows with the same seed and the same test data."""
    by_seed = {run["seed"]: run for run in second}
    pairs = [(run, by_seed[run["seed"]]) for run in first if run["seed"] in by_seed]
    return [(a, b) for a, b in pairs if _tested(a) == _tested(b)]


def _tested(run: Results) -> list[Any]:
    return [len(run["cells"]), *([sorted(task["classes"]), task["test"]] for task in run["tasks"])]


def _effect(
    setting: str,
    rows: tuple[int, int],
    flats: Sequence[Flat],
    pairs: Sequence[tuple[Results, Results]],
    settings: Sequence[str],
) -> Effect:
    first, second = (flats[i] for i in rows)
    # Leave out the keys of the setting itself, and the keys of choices that the rows have not made.
    beside = [s for s in settings if s not in (setting, _section(setting)) and _section(s) != setting]
    beside = [s for s in beside if "." not in s or s in first]
    words = (_word(first, setting), _word(second, setting))
    return _measured(setting, words, {s: _word(first, s) for s in beside}, rows, pairs)


def _measured(
    setting: str,
    words: tuple[str, str],
    beside: dict[str, str],
    rows: tuple[int, int],
    pairs: Sequence[tuple[Results, Results]],
) -> Effect:
    return {
        "setting": setting,
        "before": words[0],
        "after": words[1],
        "beside": beside,
        "rows": rows,
        "seeds": [a["seed"] for a, _ in pairs],
        "metrics": {
            key: spread([_less(b["metrics"][key], a["metrics"][key]) for a, b in pairs])  # type: ignore[literal-required]
            for key in pairs[0][0]["metrics"]
        },
    }


def _less(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before
