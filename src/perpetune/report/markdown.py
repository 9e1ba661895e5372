"""The reports as Markdown: the same tables as the pages, for a pull request or a lab book."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from perpetune.report import answers, drift, form, protected, solved, tables, tree, view
from perpetune.report.compare import Comparison
from perpetune.report.headroom import Headroom
from perpetune.report.matrix import matrix_table
from perpetune.report.results_schema import Results


def report(results: Results, found: Sequence[Headroom] = ()) -> str:
    """`report.md` of one run; the headroom is of runs that lie beside it."""
    chosen, measure = tables.choices(results["recipe"]), tables.measure(results).capitalize()
    parts = [
        f"# {plain(results['name'])}",
        _intro(results, chosen),
        _figures(results),
        f"## {measure} matrix",
        f"{measure} in % on each task's test data (columns) after each task was learned (rows).",
        *([plain(scored)] if (scored := view.measured(results)) else []),
        _matrix(results),
        *_answers(results),
        *_headroom(found),
        *_heads(results),
        *_tree(results),
        *_protection(results),
        *_drift(results),
        "## Tasks",
        _tasks(results),
        *(["## Classes", _classes(results)] if tables.classed(results) else []),
        "## Storage",
        _storage(results),
        "## Time and memory",
        _timings(results),
        *_problems(results),
        "## How to reproduce",
        _fenced(tables.recipe_yaml(results["recipe"]), "yaml"),
        "Save the recipe above as `recipe.yaml`, then:",
        _fenced(f"pip install {view.requirements(results['versions'])}\nperpetune run recipe.yaml", "sh"),
        table(["package", "version"], ([plain(p), plain(v)] for p, v in results["versions"].items())),
    ]
    return "\n\n".join(parts) + "\n"


def comparison(compared: Comparison) -> str:
    """`compare.md` of several runs."""
    figures = [(key, label) for key, label, _, _ in view.figures(compared["measure"])]
    beside = view.beside_figures(compared["rows"])
    heads = [
        "run",
        "n",
        *(f"{label}, {view.unit(key)}" for key, label in figures),
        *(heading.capitalize() for _, heading, _ in beside),
        "trained parameters",
        "stored",
        "learning time",
    ]
    rows = []
    for i, row in enumerate(compared["rows"]):
        texts = view.comparison_cells(row)
        marked = [f"**{texts[key]}**" if i in compared["best"][key] else texts[key] for key, _ in figures]
        marked += [texts[key] for key, _, _ in beside]
        cost = [form.count(row["trainable_parameters"]["mean"]), form.size(row["stored_bytes"]["mean"])]
        rows.append(
            [plain(row["label"]), len(row["runs"]), *marked, *cost, form.duration(row["learn_seconds"]["mean"])]
        )
    parts = [
        "# Comparison",
        "Mean ± sample standard deviation over n runs that differ only in the seed."
        + (f" {plain(ways)}" if (ways := view.ways_told(compared["rows"])) else ""),
        table(heads, rows),
        *_headroom(compared["headroom"]),
    ]
    if compared["effects"]:
        parts += [
            "## What each setting changes",
            bullets(view.effect_lines(compared["effects"], compared["measure"])),
            _effects(compared),
        ]
    if compared["notes"]:
        parts += ["## Read with care", bullets(compared["notes"])]
    parts += ["## Runs", table(["row", "runs", "seeds", *map(plain, compared["settings"])], _members(compared))]
    return "\n\n".join(parts) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A pipe table; cells that come from users have been through `plain`."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {plain(item)}" for item in items)


def plain(text: object) -> str:
    """`text` so that Markdown and the HTML in it show it as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", " ".join(str(text).split()))


def _fenced(text: str, language: str) -> str:
    ticks = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, ticks + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _intro(results: Results, chosen: dict[str, str]) -> str:
    setting = view.setting(results)
    learned = form.plural(len(results["cells"]), "task")
    progress = learned if results["complete"] else f"**not complete: {learned} learned so far**"
    what = " × ".join(plain(name) for name in chosen.values())
    return f"{setting}, {progress}, seed {results['seed']}, on {plain(results['device'])}. {what}".strip()


def _figures(results: Results) -> str:
    rows: list[list[str]] = []
    for key, label, note, signed in view.figures(tables.measure(results)):
        value = results["metrics"][key]  # type: ignore[literal-required]
        rows.append([label, f"{view.figure(value, signed)} {view.unit(key)}", note])
        if value is None:
            rows[-1][1] = form.ABSENT
    rows += [[plain(text) for text in fact] for fact in view.facts(results)]
    return table(["figure", "value", ""], rows)


def _matrix(results: Results) -> str:
    matrix = matrix_table(results)
    rows = [
        [f"{row.number} {plain(row.name)}", row.mean, *(cell.text if cell else "" for cell in row.cells)]
        for row in matrix.rows
    ]
    return table(["after", "mean", *map(plain, matrix.names)], rows)


def _protection(results: Results) -> list[str]:
    entries = protected.after_tasks(results)
    if not entries:
        return []
    held = protected.held(entries[-1], results)
    heads = ["after", "moved, median site", "moved, worst site", *(["room", "sites without room"] if held else [])]
    rows = []
    for entry in entries:
        new = len(protected.from_nothing(entry))
        moved = [
            form.relative(entry["median"], 1),
            form.relative(entry["worst"], 1) + f", {new} from nothing" * (new > 0),
        ]
        left = [form.relative(entry["room"], 1), f"{len(set(entry['full']) & set(held))} of {len(held)}"]
        name = f"{entry['task'] + 1} {plain(results['tasks'][entry['task']]['name'])}"
        rows.append([name, *moved, *(left if held else [])])
    return ["## What protection kept", plain(protected.meaning(results)), table(heads, rows)]


def _answers(results: Results) -> list[str]:
    ways, gauges, parts = answers.ways(results), answers.gauge_rows(results), []
    if ways:
        what = tables.measure(results)
        heads = ["way", f"final {what}, %", f"average {what}, %", "forgetting, points"]
        parts += [
            plain(answers.meaning(results)),
            table(heads, ([plain(name), *texts] for name, *texts in view.way_texts(ways))),
        ]
    if gauges:
        names = [plain(name) for name in answers.gauge_names(results)]
        heads = ["after", *(f"{name}, {of}" for name in names for of in ("new task", "earlier tasks"))]
        rows = (
            [f"{row.number} {plain(row.task)}", *(form.thousandths(mean) for pair in row.means for mean in pair)]
            for row in gauges
        )
        parts += [plain(answers.GAUGES), table(heads, rows)]
    return ["## Ways to answer", *parts] if parts else []


def _headroom(found: Sequence[Headroom]) -> list[str]:
    section = view.headroom_section(found)
    if section is None:
        return []
    parts = ["## Headroom", plain(section["meaning"])]
    heads = ["part", "run", "head", "n", "final accuracy, %", "recovered, %", "of what frozen taps leave, %"]
    for stream in section["streams"]:
        rows = (
            [f"**{role}**" if counts else role, plain(label), plain(details), *texts]
            for role, counts, label, details, *texts in stream["rows"]
        )
        parts += [plain(stream["told"]), table(heads, rows)]
        for text, command in stream["missing"]:
            parts += [plain(text) + (":" if command else "")] + ([_fenced(command, "sh")] if command else [])
    return parts


def _heads(results: Results) -> list[str]:
    found = solved.rows(results)
    if not found:
        return []
    more = any(row.more for row in found)
    rows = (
        [
            f"{row.number} {plain(row.task)}",
            plain(row.head),
            *map(plain, row.texts),
            *([plain(row.more)] if more else []),
        ]
        for row in found
    )
    heads = ["after", "head", *solved.headings(results), *(["more"] if more else [])]
    return ["## Heads solved from statistics", plain(solved.MEANING), table(heads, rows)]


def _tree(results: Results) -> list[str]:
    found = tree.grown(results)
    if not found:
        return []
    nodes = [
        "  " * level + "- " + plain(": ".join(filter(None, (node.name, tree.described(node)))))
        for level, node in tree.walk(found[-1].root)
    ]
    grown = ([f"{entry.number} {plain(entry.task)}", plain(tree.outline(entry.root))] for entry in found)
    parts = ["## Similar tasks", plain(tree.MEANING), "\n".join(nodes), table(["after", "tree"], grown)]
    helped, similar = tree.helped_table(results), tree.similarity_table(results)
    if helped is not None:
        rows = (
            [f"{number} {plain(task)}", plain(row.group), row.steps, *(cell.text if cell else "" for cell in row.cells)]
            for number, task, groups in helped.tasks
            for row in groups
        )
        heads = ["task", "modules", "steps", *map(plain, helped.names)]
        parts += ["### Who helped whom", plain(tree.HELPED), table(heads, rows)]
    if similar is not None:
        rows = ([plain(name), *(cell.text if cell else "" for cell in cells)] for _, name, cells in similar.rows)
        about = plain(tree.SIMILAR.partition(" Colours")[0])
        parts += ["### Similarity", about, table(["", *map(plain, similar.names)], rows)]
    heads = ["after", "started from", "adapters", "bytes", "merged", "a task's signature", "all"]
    kept = (
        [
            f"{row.number} {plain(row.task)}",
            plain(row.start),
            row.adapters,
            row.size,
            plain(row.merged),
            row.signature,
            row.total,
        ]
        for row in tree.storage_rows(results)
    )
    return [part for part in [*parts, "### Adapters kept", plain(tree.STORED), table(heads, kept)] if part]


def _drift(results: Results) -> list[str]:
    if not drift.moved(results):
        return []
    parts = ["## Drift of old features", plain(drift.meaning(results))]
    if drift.still(results):
        return parts
    found = drift.table(results)
    beside = ["outputs, median site", "outputs, worst site"] if found.certified else []
    rows = (
        [
            f"{row.number} {plain(row.name)}",
            row.mean,
            *([row.median, row.worst] if found.certified else []),
            *(cell.text if cell else "" for cell in row.cells),
        ]
        for row in found.rows
    )
    return [*parts, table(["after", "mean", *beside, *map(plain, found.names)], rows)]


def _tasks(results: Results) -> str:
    rows, scored, classed = tables.task_rows(results), any(tables.scores(results)), tables.classed(results)
    beside = [*(["score"] if scored else []), *(["classes"] if classed else [])]
    heads = ["task", *beside, "train", "test", "when learned, %", "now, %", "forgotten, points"]
    return table(
        heads,
        (
            [
                f"{row.number} {plain(row.name)}",
                *([plain(row.score)] if scored else []),
                *([", ".join(map(plain, row.classes))] if classed else []),
                form.count(row.train),
                form.count(row.test),
                form.percent(row.learned),
                form.percent(row.now),
                form.percent(row.forgotten),
            ]
            for row in rows
        ),
    )


def _classes(results: Results) -> str:
    heads = ["class", "task", "right", "of", "when learned, %", "now, %", "change, points"]
    return table(
        heads,
        (
            [
                plain(row.name),
                ", ".join(map(str, row.tasks)),
                form.right(row.correct),
                form.count(row.total),
                form.percent(row.learned),
                form.percent(row.now),
                form.points(row.change),
            ]
            for row in tables.class_rows(results)
        ),
    )


def _storage(results: Results) -> str:
    rows = [[plain(r.kind), form.size(r.last), form.size(r.total)] for r in tables.storage_rows(results)]
    rows.append(["**all**", "", f"**{form.size(tables.stored_bytes(results))}**"])
    rows.append(["backbone, as float32", "", form.size(tables.backbone_bytes(results))])
    return table(["kind", "last task", "all tasks"], rows)


def _timings(results: Results) -> str:
    what, tokens = tables.examples(results), any("tokens" in t for t in results["timings"])
    speeds = [what, f"{what}/s", *(["tokens", "tokens/s"] if tokens else [])]
    return table(
        ["task", "learning", "evaluation", *speeds, "peak memory"],
        (
            [
                plain(results["tasks"][t["task"]]["name"]),
                form.duration(t["learn_s"]),
                form.duration(t["evaluate_s"]),
                form.count(t["images"]),
                form.count(t["images_per_s"]),
                *([form.count(t.get("tokens")), form.count(t.get("tokens_per_s"))] if tokens else []),
                form.size(t["peak_memory_bytes"]),
            ]
            for t in results["timings"]
        ),
    )


def _problems(results: Results) -> list[str]:
    parts = []
    if results["warnings"]:
        parts += ["## Warnings", bullets(results["warnings"])]
    if results["bad_files"]:
        rows = (
            [_task_name(results, bad["task"]), plain(bad["file"]), plain(bad["reason"])] for bad in results["bad_files"]
        )
        parts += ["## Files that could not be read", table(["task", "file", "reason"], rows)]
    return parts


def _task_name(results: Results, index: int | None) -> str:
    known = index is not None and 0 <= index < len(results["tasks"])
    return plain(results["tasks"][index]["name"]) if known and index is not None else ""


def _effects(compared: Comparison) -> str:
    figures = [(key, label) for key, label, _, _ in view.figures(compared["measure"])]
    rows = []
    for effect in compared["effects"]:
        texts = view.effect_cells(effect)
        beside = ", ".join(f"{plain(key)} {plain(value)}" for key, value in effect["beside"].items())
        change = f"{plain(effect['before'])} → {plain(effect['after'])}"
        rows.append(
            [plain(effect["setting"]), change, beside, len(effect["seeds"]), *(texts[key] for key, _ in figures)]
        )
    return table(["setting", "change", "with", "seeds", *(f"{label}, points" for _, label in figures)], rows)


def _members(compared: Comparison) -> Iterable[list[object]]:
    for row in (row for row in compared["rows"] if row["way"] is None):
        seeds = ", ".join(map(str, row["seeds"]))
        settings = [plain(form.setting(row["differs"][key])) for key in compared["settings"]]
        yield [plain(row["label"]), ", ".join(map(plain, row["runs"])), seeds, *settings]
