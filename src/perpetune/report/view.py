"""What the page templates show, as plain values and finished drawings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perpetune.numerics.metrics import accuracies
from perpetune.report import answers, drift, form, headroom, protected, solved, svg, tables, tree
from perpetune.report.compare import Comparison, ComparisonRow
from perpetune.report.effects import Effect
from perpetune.report.matrix import READABLE, matrix_table
from perpetune.report.palette import AGES, LIGHT_LINES
from perpetune.report.results_schema import Results

SETTINGS = {"class": "class-incremental", "domain": "domain-incremental", "task": "task-incremental"}

FIGURES = (  # key, label, what it says, whether its sign is always shown
    ("final_accuracy", "Final accuracy", "mean over tasks, after the last one: overall performance, OP", False),
    ("average_accuracy", "Average accuracy", "on the tasks seen, mean over the run", False),
    ("forgetting", "Forgetting", "lost per task since it was best", False),
    ("backward_transfer", "Backward transfer", "change since learned, mean over all tasks but the last: BWT", True),
    ("forward_transfer", "Forward transfer", "above chance before a task is learned", True),
    ("pooled_accuracy", "Pooled accuracy", "over all test examples, after the last task", False),
)

ABSENT = {  # why a figure may be missing
    "forgetting": "needs two tasks or more",
    "backward_transfer": "needs two tasks or more",
    "forward_transfer": "needs tasks that are tried before they are learned",
}


def figures(measure: str) -> list[tuple[str, str, str, bool]]:
    """`FIGURES` with labels of what is measured, `accuracy` or `score`."""
    return [(key, label.replace("accuracy", measure), note, signed) for key, label, note, signed in FIGURES]


def setting(results: Results) -> str:
    """What is known when; a language model is told no task, and its answers are no classes."""
    if tables.examples(results) == "images":
        return SETTINGS.get(results["setting"], results["setting"])
    return "task after task"


def report(results: Results, found: Sequence[headroom.Headroom] = ()) -> dict[str, Any]:
    """Values for `report.html`; the headroom is of runs that lie beside this one."""
    measure = tables.measure(results)
    return {
        "run": results,
        "setting": setting(results),
        "choices": tables.choices(results["recipe"]),
        "figures": [
            (
                label,
                figure(value, signed),
                unit(key),
                ABSENT.get(key, "no task is measured yet") if value is None else note,
                value is None,
            )
            for key, label, note, signed in figures(measure)
            for value in (results["metrics"][key],)  # type: ignore[literal-required]
        ],
        "measure": measure,
        "measured": measured(results),
        "examples": tables.examples(results),
        "tokens": any("tokens" in timing for timing in results["timings"]),
        "facts": facts(results),
        "matrix": matrix_table(results),
        "overview": _overview(results),
        "charts": _charts(results),
        "legend": _legend(results),
        "answers": _answers(results),
        "headroom": headroom_section(found),
        "heads": _heads(results),
        "tree": _tree(results),
        "protection": _protection(results),
        "drift": _drift(results),
        "tasks": tables.task_rows(results),
        "classes": tables.class_rows(results),
        "classed": tables.classed(results),
        "scored": measure == "score",
        "storage": tables.storage_rows(results),
        "stored": tables.stored_bytes(results),
        "backbone": tables.backbone_bytes(results),
        "slowest": max((t["learn_s"] for t in results["timings"]), default=0.0),
        "recipe": tables.recipe_yaml(results["recipe"]),
        "requirements": requirements(results["versions"]),
    }


def figure(value: float | None, signed: bool) -> str:
    return form.points(value) if signed else form.percent(value)


def measured(results: Results) -> str:
    """What the figures of tasks are where answers are not right or wrong: `The score is rouge_l for a, b; …`."""
    by_score: dict[str, list[str]] = {}
    for task, score in zip(results["tasks"], tables.scores(results), strict=True):
        by_score.setdefault(score, []).append(task["name"])
    if list(by_score) in ([], [""]):
        return ""
    if len(by_score) == 1:
        return f"The score is {next(iter(by_score))}, from 0 to 100, mean over the examples."
    other = by_score.pop("", [])
    parts = [f"{score} for {form.several(names, 6)}" for score, names in by_score.items()]
    parts += [f"the share of right answers for {form.several(other, 6)}"] if other else []
    return f"The score is {'; '.join(parts)}; from 0 to 100, mean over the examples."


def unit(key: str) -> str:
    """Accuracies are in per cent, their differences in percentage points."""
    return "%" if key.endswith("accuracy") else "points"


def facts(results: Results) -> list[tuple[str, str, str]]:
    """The small figures below the headline: label, value, what it is relative to."""
    trained, backbone = results["trainable_parameters"], results["backbone_parameters"]
    stored, units = tables.stored_bytes(results), (tables.examples(results), "tokens")
    speeds = [tables.per_second(results, "images_per_s"), tables.per_second(results, "tokens_per_s")]
    speed = ", ".join(f"{value:,.0f} {what}/s" for what, value in zip(units, speeds, strict=True) if value)
    share = (
        f"{form.relative(trained, backbone)} of the backbone’s {form.count(backbone)}" if trained is not None else ""
    )
    return [
        ("Trained parameters", form.count(trained), share),
        ("Stored", form.size(stored), f"backbone as float32: {form.size(tables.backbone_bytes(results))}"),
        ("Learning time", form.duration(tables.learn_seconds(results)), speed),
        ("Peak memory", form.size(tables.peak_memory(results)), f"on {results['device']}"),
    ]


def requirements(versions: dict[str, str]) -> str:
    """pip requirements of the versions that ran; `python` and local suffixes such as `+cpu` are not pip's."""
    return " ".join(f"{name}=={v.partition('+')[0]}" for name, v in versions.items() if name != "python")


def _overview(results: Results) -> str:
    label = f"{tables.measure(results).capitalize()} matrix: a row after each task, a column per task"
    return svg.heat_overview(accuracies(results["cells"]), len(results["tasks"]), label)


def _charts(results: Results) -> dict[str, str]:
    shown, names = tables.curves(results), [task["name"] for task in results["tasks"]]
    weight = "thin" if len(names) <= READABLE else "many"
    lines = [svg.Line(names[j], v, f"{_line_style(j, len(names))} {weight}") for j, v in enumerate(shown.tasks)]
    mean = svg.Line("mean over tasks seen", shown.accuracy, "strong")
    lost = svg.Line("forgetting", shown.forgetting, "strong")
    half, full, what = {"width": 540, "height": 300}, {"width": 1104, "height": 380}, tables.measure(results)
    return {
        "accuracy": svg.line_chart([mean], f"Mean {what} on the tasks seen, after each task", floor=0, top=1, **half),
        "forgetting": svg.line_chart([lost], "Mean forgetting after each task", floor=0, top=0.1, **half),
        "tasks": svg.line_chart(lines, f"{what.capitalize()} of each task over the run", floor=0, top=1, **full),
    }


def _protection(results: Results) -> dict[str, Any] | None:
    """What the section on protection shows; None without protection."""
    entry = protected.last(results)
    if entry is None:
        return None
    found, half = protected.curves(results), {"width": 540, "height": 300}
    moved = [svg.Line("worst site", found.worst, "l1"), svg.Line("median site", found.median, "strong")]
    room = [svg.Line("room", found.room, "strong")]
    return {
        "told": protected.told(entry, results),
        "meaning": protected.meaning(results),
        "sites": protected.site_rows(results),
        "moved": svg.line_chart(moved, "How far old outputs have moved, after each task", floor=0, top=0.05, **half),
        "room": svg.line_chart(room, "Share of directions still free, after each task", floor=0, top=1, **half)
        if protected.held(entry, results)
        else None,
    }


def _answers(results: Results) -> dict[str, Any] | None:
    """What the section on ways to answer shows; None where the method has one way and tells nothing of it."""
    ways, gauges = answers.ways(results), answers.gauge_rows(results)
    if not ways and not gauges:
        return None
    styles = ["strong", *(f"l{i % len(LIGHT_LINES)}" for i in range(1, len(ways)))]
    lines = [svg.Line(way.name, way.curve, style) for way, style in zip(ways, styles, strict=False)]
    label = f"Mean {tables.measure(results)} on the tasks seen, by each way to answer"
    return {
        "meaning": answers.meaning(results),
        "ways": [(style, *texts) for style, texts in zip(styles, way_texts(ways), strict=False)],
        # The answer comes last, and so on top.
        "chart": svg.line_chart(lines[::-1], label, width=540, height=300, floor=0, top=1) if ways else None,
        "gauge_meaning": answers.GAUGES,
        "gauges_told": "; ".join(answers.gauges_told(results)),
        "gauges": gauges,
        "gauge_names": answers.gauge_names(results),
    }


def way_texts(ways: Sequence[answers.Way]) -> list[tuple[str, str, str, str]]:
    """Name, final accuracy, average accuracy and forgetting of each way to answer."""
    return [
        (
            way.name,
            form.percent(way.metrics["final_accuracy"]),
            form.percent(way.metrics["average_accuracy"]),
            form.percent(way.metrics["forgetting"]),
        )
        for way in ways
    ]


def _heads(results: Results) -> dict[str, Any] | None:
    """What the section on heads of statistics shows; None without any."""
    rows = solved.rows(results)
    if not rows:
        return None
    headings = solved.headings(results)
    return {"meaning": solved.MEANING, "headings": headings, "rows": rows, "more": any(row.more for row in rows)}


def _tree(results: Results) -> dict[str, Any] | None:
    """What the section on the tree of similar tasks shows; None without one."""
    found = tree.grown(results)
    if not found:
        return None
    last, label = found[-1], "The tree after task {} {}: {}"
    top = _branch(last.root, last.task)
    text = label.format(last.number, last.task, tree.outline(last.root))
    small = []
    for entry in found[:-1]:
        branch = _branch(entry.root, entry.task)
        if branch is not None:
            told = label.format(entry.number, entry.task, form.plural(len(entry.names), "task"))
            small.append((entry.number, entry.task, svg.small_tree(branch, told)))
    return {
        "told": tree.told(results),
        "meaning": tree.MEANING,
        "helped_meaning": tree.HELPED,
        "similar_meaning": tree.SIMILAR,
        "stored_meaning": tree.STORED,
        "last": last,
        "large": svg.tree(top, text) if top else None,
        "small": small,
        "nodes": [(level, node.name, node.split, node.radius, node.spread) for level, node in tree.walk(last.root)],
        "outlines": [(e.number, e.task, tree.outline(e.root)) for e in found],
        "helped": tree.helped_table(results),
        "similar": tree.similarity_table(results),
        "storage": tree.storage_rows(results),
    }


def _branch(node: tree.Node | None, newest: str) -> svg.Branch | None:
    """A node as it is drawn; the leaf of the newest task stands out."""
    if node is None:
        return None
    about = tree.described(node)
    title = f"{node.name}: {about}" if about else node.name
    radius = f"radius {form.thousandths(node.radius)}" if node.radius is not None else ""
    below = [branch for child in node.children if (branch := _branch(child, newest))]
    style = "newest" if newest in node.tasks and not below else ""
    return svg.Branch(node.name, title, (node.split, radius), style, node.merged, below)


def _drift(results: Results) -> dict[str, Any] | None:
    """What the section on the drift of features shows; None where none was measured."""
    if not drift.moved(results):
        return None
    shown = None if drift.still(results) else drift.table(results)
    return {"meaning": drift.meaning(results), "told": drift.told(results), "table": shown}


def _line_style(j: int, n: int) -> str:
    """Few lines are told apart by hue; many are coloured by age."""
    return f"l{j}" if n <= len(LIGHT_LINES) else f"a{round(j * (AGES - 1) / (n - 1))}"


def _legend(results: Results) -> list[tuple[str, str]]:
    """(style, name) of each line; for many lines the ages' colours without names."""
    names = [task["name"] for task in results["tasks"]]
    if len(names) <= len(LIGHT_LINES):
        return [(_line_style(j, len(names)), name) for j, name in enumerate(names[: len(results["cells"])])]
    return [(f"a{i}", "") for i in range(AGES)]


def comparison(compared: Comparison) -> dict[str, Any]:
    """Values for `compare.html`."""
    rows, what = compared["rows"], compared["measure"]
    return {
        "rows": rows,
        "recipes": sum(row["way"] is None for row in rows),
        "runs": sum(len(row["runs"]) for row in rows if row["way"] is None),
        "notes": compared["notes"],
        "effects": compared["effects"],
        "measure": what,
        "told": effect_lines(compared["effects"], what),
        "changes": [effect_cells(effect) for effect in compared["effects"]],
        "beside": beside_figures(rows),
        "ways": ways_told(rows),
        "headroom": headroom_section(compared["headroom"]),
        "settings": compared["settings"],
        "figures": [
            (key, label, note) for key, label, note, _ in figures(what) if any(row["metrics"][key]["n"] for row in rows)
        ],
        "units": {key: unit(key) for key, _, _, _ in FIGURES},
        "cells": [comparison_cells(row) for row in rows],
        "best": compared["best"],
        "charts": {
            "accuracy": _overlay(rows, "average_accuracy_curve", f"Mean {what} on the tasks seen", 1.0),
            "forgetting": _overlay(rows, "forgetting_curve", "Mean forgetting", 0.1),
        },
        "legend": [(_line_style(i, max(len(rows), 2)), row["label"]) for i, row in enumerate(rows)],
    }


WAYS = "A row such as “safe: slow” is what the row before it would be if its method had answered in that other way."


def ways_told(rows: Sequence[ComparisonRow]) -> str:
    """What the rows of other ways to answer, and of oracle heads, are; empty where there is none."""
    ways = {row["way"] for row in rows}
    parts = [WAYS] if ways - {None, answers.ORACLE} else []
    return " ".join([*parts, *([answers.ORACLE_MEANING] if answers.ORACLE in ways else [])])


def headroom_section(found: Sequence[headroom.Headroom]) -> dict[str, Any] | None:
    """What the section on headroom shows; None without any."""
    if not found:
        return None
    return {
        "meaning": headroom.MEANING,
        "streams": [
            {
                "of": one["of"],
                "told": one["told"],
                "rows": [
                    (row["role"], row["counts"], row["label"], row["details"], len(row["seeds"]), *headroom.texts(row))
                    for row in one["rows"]
                ],
                "missing": headroom.missing_lines(one),
            }
            for one in found
        ],
    }


BESIDE = (  # columns of a comparison that only some runs have: key, heading in pages, note
    ("moved", "moved, worst site, %", "how far old outputs had moved at the end, at the worst site"),
    ("room", "room, %", "share of directions still free at the end"),
    ("drift", "drift, 0 to 2", "how far the features of earlier tasks’ test data had moved at the end"),
)


def beside_figures(rows: Sequence[ComparisonRow]) -> list[tuple[str, str, str]]:
    """Of `BESIDE` those that any row has."""
    return [column for column in BESIDE if any(row[column[0]]["n"] for row in rows)]  # type: ignore[literal-required]


def comparison_cells(row: ComparisonRow) -> dict[str, str]:
    """The text of each figure of a row of the comparison, `mean ± std`."""
    texts = {}
    for key, _, _, signed in FIGURES:
        mean, std = row["metrics"][key]["mean"], row["metrics"][key]["std"]
        texts[key] = form.mean_std(figure(mean, signed), None if std is None else form.percent(std))
    for key, _, _ in BESIDE:
        write = form.thousandths if key == "drift" else form.percent
        mean, std = row[key]["mean"], row[key]["std"]  # type: ignore[literal-required]
        texts[key] = form.mean_std(write(mean), None if std is None else write(std))
    return texts


def effect_cells(effect: Effect) -> dict[str, str]:
    """The text of what a setting changes in each figure, in points."""
    return {
        key: form.mean_std(form.points(found["mean"]), None if found["std"] is None else form.percent(found["std"]))
        for key, found in effect["metrics"].items()
    }


def effect_lines(effects: Sequence[Effect], measure: str = "accuracy") -> list[str]:
    """A sentence for each change of a setting: `head ncm instead of linear: final accuracy +4.1 ± 0.9 points`."""
    changes: dict[tuple[str, str, str], list[Effect]] = {}
    for effect in effects:
        changes.setdefault((effect["setting"], effect["before"], effect["after"]), []).append(effect)
    lines = []
    for (setting, before, after), found in changes.items():
        parts: list[str] = []
        for effect in found:
            beside = " and ".join(f"{key} {value}" for key, value in effect["beside"].items())
            unit = " points" if not parts else ""
            parts.append(effect_cells(effect)["final_accuracy"] + unit + (f" with {beside}" if beside else ""))
        lines.append(f"{setting} {after} instead of {before}: final {measure} {', '.join(parts)}")
    return lines


def _overlay(rows: list[ComparisonRow], curve: str, label: str, top: float) -> str:
    lines = [
        svg.Line(
            row["label"],
            [point["mean"] for point in row[curve]],  # type: ignore[literal-required]
            _line_style(i, max(len(rows), 2)),
            [point["std"] for point in row[curve]],  # type: ignore[literal-required]
        )
        for i, row in enumerate(rows)
    ]
    return svg.line_chart(lines, label, width=540, height=320, floor=0, top=top)
