"""The section about protection: a run's certificates as curves, tables and sentences."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perpetune.report import form
from perpetune.report.blocks import (
    Block,
    Brief,
    Cell,
    Chart,
    Column,
    Fold,
    Heading,
    Legend,
    Only,
    Pair,
    Panel,
    Rows,
    Table,
    Text,
    keyed,
)
from perpetune.report.results_schema import Consolidation, Results, SiteMoved
from perpetune.report.svg import Line

MEANING = (
    "A site is a place where features meet trained parameters. After each task the figure says how far each site’s "
    "outputs for the data of earlier tasks have moved: the root mean square of the change, relative to the outputs "
    "when these tasks were learned. It needs no old data, only second moments of the features. It is exact if the "
    "inputs of the site have not changed; changes below the site come in addition."
)
ROOM = "Room is the share of directions that later tasks can still use, after the directions of a task were closed."
NOTHING = (
    "A site whose outputs were all zero before (LoRA’s B over reference data) moves from nothing: it has no relative "
    "figure."
)
MERGED = "After each task the method merges in a copy that was free to move (method.merge), which moves old outputs."
RENEWED = (
    "Here a site is a whole LoRA with its kept updates of earlier tasks (protect.renew): its outputs are all that it "
    "adds to its layer, and its room is that of its inputs."
)
DIRECTIONS = {
    "none": "Protection held nothing here (directions: none): the figures measure what learning does by itself.",
    "random": "Protection closed as many directions as the features need, but drawn at random (directions: random); "
    "this is a control.",
}


@dataclass(frozen=True)
class ProtectionCurves:
    """Shares after each learned task: how far old outputs have moved, and the room left. None means not known.

    The worst is not known if a site moved from nothing.
    """

    worst: list[float | None]
    median: list[float | None]
    room: list[float | None]


@dataclass(frozen=True)
class SiteRow:
    """One site at the end of the run.

    Attributes:
        name: the site's name, shortened.
        moved: how far its old outputs have moved, relative to the outputs.
        farthest: the largest such figure after any task.
        room: the share of directions that are free.
        rank: the number of closed directions.
        directions: the number of all directions.
        from_nothing: whether it moved although its old outputs were zero; then `moved` is None.
        held: whether its directions are closed. If not, it moves freely, and room and rank say what would be closed.
    """

    name: str
    moved: float | None
    farthest: float | None
    room: float
    rank: int
    directions: int
    from_nothing: bool
    held: bool


def section(results: Results) -> list[Block] | None:
    entry, full = last(results), newly_full(results)
    briefs: list[Block] = [Brief("protect", full, when="live", warning=True)] if full else []
    if entry is None:
        return briefs or None
    shown, text = curves(results), told(entry, results)
    moved_lines = [Line("worst site", shown.worst, "l1"), Line("median site", shown.median, "strong")]
    moved_chart = Chart(moved_lines, "How far old outputs have moved, after each task", top=0.05)
    about = "old outputs at the sites, after each task, relative to what they were, in %"
    legend = Legend([("l1", "worst site"), ("strong", "median site")])
    panels = [Panel([moved_chart, legend], "Moved", about)]
    if held(entry, results):
        room_chart = Chart([Line("room", shown.room, "strong")], "Share of directions still free, after each task")
        panels.append(Panel([room_chart], "Room", "share of directions still free, mean over the sites, in %"))
    sites = _sites(results)
    return [
        Heading("What protection kept", "Protection"),
        Text(f"After the last task: {text}."),
        Pair(panels),
        Text(meaning(results)),
        Only("page", [Fold(form.plural(len(sites.rows), "site"), [sites])]),
        Only("markdown", [_certificates(results)]),
        Brief("protect", text, short=told_shortly(entry, results)),
        *briefs,
    ]


def _sites(results: Results) -> Table:
    """The table of sites at the end of the run."""
    rows: Rows = [
        [
            row.name,
            keyed("from nothing" if row.from_nothing else form.percent(row.moved, 2), row.moved),
            keyed(form.percent(row.farthest, 2), row.farthest),
            keyed(form.count(row.rank), row.rank),
            keyed(form.count(row.directions), row.directions),
            keyed(form.percent(row.room), row.room, bar=row.room) if row.held else Cell("not held", 1),
        ]
        for row in site_rows(results)
    ]
    headings = ["moved now, %", "moved at most, %", "directions taken", "of", "room, %"]
    return Table([Column("site", left=True), *headings], rows, sortable=True)


def _certificates(results: Results) -> Table:
    """The certificate after each task."""
    entries = after_tasks(results)
    closed = held(entries[-1], results)
    rows: Rows = []
    for entry in entries:
        new = len(from_nothing(entry))
        worst = form.relative(entry["worst"], 1) + f", {new} from nothing" * (new > 0)
        left = [form.relative(entry["room"], 1), f"{len(set(entry['full']) & set(closed))} of {len(closed)}"]
        name = f"{entry['task'] + 1} {results['tasks'][entry['task']]['name']}"
        rows.append([name, form.relative(entry["median"], 1), worst, *(left if closed else [])])
    headings = ["after", "moved, median site", "moved, worst site"]
    return Table([*headings, *(["room", "sites without room"] if closed else [])], rows)


def after_tasks(results: Mapping[str, Any]) -> list[Consolidation]:
    """The certificates after tasks, in order, without those of reference data."""
    return [entry for entry in results.get("protection", []) if entry["of"] == "task"]


def last(results: Mapping[str, Any]) -> Consolidation | None:
    """The certificate of the last task learned."""
    entries = after_tasks(results)
    return entries[-1] if entries else None


def moved(results: Mapping[str, Any]) -> float | None:
    """How far the worst site had moved at the end; None if unknown or if a site moved from nothing."""
    entry = last(results)
    return _worst(entry) if entry else None


def room(results: Mapping[str, Any]) -> float | None:
    """The share of directions that was free at the end; None if no direction is closed (`protect.directions: none`)."""
    entry = last(results)
    return entry["room"] if entry and held(entry, results) else None


def held(entry: Consolidation, results: Mapping[str, Any]) -> list[str]:
    """The names of the sites with closed directions: all sites, or those whose last word is in `protect.sites`."""
    config = _config(results)
    kinds, names = config.get("sites"), [site["site"] for site in entry["sites"]]
    if config.get("directions") == "none":  # measures, but closes nothing
        return []
    return [name for name in names if kinds is None or name.rpartition("/")[2].partition(".")[0] in kinds]


def from_nothing(entry: Consolidation) -> list[str]:
    """Sites whose outputs on old data were zero before and are not zero now, such as LoRA's B over reference data."""
    return [site["site"] for site in entry["sites"] if _moved_from_nothing(site)]


def _moved_from_nothing(site: SiteMoved) -> bool:
    return site["change"] > 0 and site["relative"] is None


def _worst(entry: Consolidation) -> float | None:
    return None if from_nothing(entry) else entry["worst"]


def _config(results: Mapping[str, Any]) -> Mapping[str, Any]:
    config: Mapping[str, Any] = results["recipe"].get("protect") or {}
    return config


def curves(results: Results) -> ProtectionCurves:
    by_task = {entry["task"]: entry for entry in after_tasks(results)}
    entries = [by_task.get(i) for i in range(len(results["cells"]))]
    return ProtectionCurves(
        [_worst(entry) if entry else None for entry in entries],
        [entry["median"] if entry else None for entry in entries],
        [entry["room"] if entry and held(entry, results) else None for entry in entries],
    )


def site_rows(results: Results) -> list[SiteRow]:
    """The sites at the end of the run, in the model's order."""
    entries = after_tasks(results)
    if not entries:
        return []
    seen: dict[str, list[float]] = {}
    for entry in entries:
        for site in entry["sites"]:
            seen.setdefault(site["site"], []).extend([site["relative"]] if site["relative"] is not None else [])
    sites, closed = entries[-1]["sites"], held(entries[-1], results)
    return [
        SiteRow(
            name,
            site["relative"],
            max(seen[site["site"]], default=None),
            site["room"],
            site["rank"],
            site["directions"],
            _moved_from_nothing(site),
            site["site"] in closed,
        )
        for name, site in zip(short([s["site"] for s in sites]), sites, strict=True)
    ]


def short(names: Sequence[str]) -> list[str]:
    """The names of sites without their common beginning."""
    parts = [name.split(".") for name in names]
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    shared = min(sum(1 for _ in alike), min(map(len, parts), default=1) - 1)
    return [".".join(part[shared:]) for part in parts]


def told(entry: Consolidation, results: Mapping[str, Any]) -> str:
    """A certificate in a sentence: `old outputs moved 0.8 % (worst site 3.1 %), room 62 %, 2 of 24 full`."""
    parts, new = [], from_nothing(entry)
    if entry["worst"] is not None and (entry["worst"] or not new):
        middle, worst = form.relative(entry["median"], 1), form.relative(entry["worst"], 1)
        parts.append(f"old outputs moved {middle} (worst site {worst})")
    if new:
        parts.append(f"{form.plural(len(new), 'site')} moved from nothing")
    return ", ".join([*parts, *_left(entry, results)])


def told_shortly(entry: Consolidation, results: Mapping[str, Any]) -> str:
    """A certificate in a few words, for a line with more facts: `moved 0.8 % (worst 3.1 %), room 62 %`."""
    parts, new = [], from_nothing(entry)
    if new:
        parts.append(f"{form.plural(len(new), 'site')} moved from nothing")
    elif entry["worst"] is not None:
        parts.append(f"moved {form.relative(entry['median'], 1)} (worst {form.relative(entry['worst'], 1)})")
    return ", ".join([*parts, *_left(entry, results)[:1]])


def _left(entry: Consolidation, results: Mapping[str, Any]) -> list[str]:
    """The room that is left, and the number of sites without room."""
    closed = held(entry, results)
    if not closed:
        return ["nothing held"]
    full = len(set(entry["full"]) & set(closed))
    return [f"room {form.relative(entry['room'], 1)}", *([f"{full} of {len(closed)} full"] if full else [])]


def newly_full(results: Mapping[str, Any]) -> str | None:
    """A warning with advice, if more sites than after any earlier task have no room left; else None."""
    entries, config = results.get("protection", []), _config(results)
    final = config.get("strength", "hard") == "hard" and config.get("sites") is None and not control(results)
    if not entries or not final:
        return None
    full, before = entries[-1]["full"], [len(entry["full"]) for entry in entries[:-1]]
    if len(full) <= max(before, default=0):
        return None
    sites = [site["site"] for site in entries[-1]["sites"]]
    named = [name for name, site in zip(short(sites), sites, strict=True) if site in full]
    cure = "" if config.get("renew") else "a larger pet or "
    return (
        f"{len(full)} of {form.plural(len(sites), 'site')} no longer learn, because they have no room left "
        f"({form.several(named, 3)}): {cure}a lower protect.energy leaves some room"
    )


def control(results: Mapping[str, Any]) -> str:
    """A sentence about a control (`protect.directions`); empty if the run protected features."""
    return DIRECTIONS.get(_config(results).get("directions", ""), "")


def meaning(results: Results) -> str:
    """An explanation of the figures for this run."""
    merged = MERGED if results["recipe"].get("method", {}).get("merge") else ""
    entries = after_tasks(results)
    nothing = NOTHING if any(map(from_nothing, entries)) else ""
    room = ROOM if any(held(entry, results) for entry in entries) else ""
    renewed = RENEWED if _config(results).get("renew") else ""
    return " ".join(text for text in (control(results), MEANING, renewed, nothing, merged, room) if text)
