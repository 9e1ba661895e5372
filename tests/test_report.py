"""Reports and comparisons: what they say, that they are safe, and that a browser shows them without a complaint."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import chiefly

from perpetune import Learner
from perpetune.cli import live
from perpetune.errors import StateError, UsageError
from perpetune.numerics.metrics import Cell, summarise
from perpetune.report import (
    checked,
    compare,
    comparison,
    form,
    html,
    palette,
    svg,
    terminal,
    write_comparison,
    write_report,
)
from perpetune.report.blocks import Brief, Figures
from perpetune.report.document import choices
from perpetune.report.sections import answers, classes, collect, drift, figures, heads, matrix, members, storage, tasks
from perpetune.report.spread import spread

CHROMIUM = Path("/usr/bin/chromium")


def fake_results(
    n_tasks: int = 5,
    classes_per_task: int = 2,
    *,
    seed: int = 0,
    method: str = "finetune",
    keep: float = 0.55,
    rows: int | None = None,
    ahead: bool = False,
    names: list[str] | None = None,
) -> dict[str, Any]:
    """A results document as a real run would leave it: learned well, forgotten by `1 - keep` with each task."""
    rng = np.random.default_rng([seed, n_tasks, classes_per_task])
    labels = names or [f"class-{k:03d}" for k in range(n_tasks * classes_per_task)]
    tasks = [
        {
            "index": t,
            "name": f"task-{t + 1}",
            "classes": labels[t * classes_per_task : (t + 1) * classes_per_task],
            "train": 135 * classes_per_task,
            "test": 45 * classes_per_task,
        }
        for t in range(n_tasks)
    ]

    def measure(i: int, j: int) -> Cell | None:
        if j > i and not ahead:
            return None
        level = 0.5 if j > i else 0.97 * (0.25 + 0.75 * keep ** ((i - j) * 3 / n_tasks))
        level = float(np.clip(level + rng.normal(0, 0.03), 0, 1))
        per_class = {name: [int(rng.binomial(45, level)), 45] for name in tasks[j]["classes"]}  # type: ignore[attr-defined]
        correct, total = (sum(counts[k] for counts in per_class.values()) for k in (0, 1))
        return {"correct": correct, "total": total, "per_class": per_class}

    learned = n_tasks if rows is None else rows
    cells = [[measure(i, j) for j in range(n_tasks)] for i in range(learned)]
    recipe = {
        "name": "demo",
        "seed": seed,
        "setting": "class",
        "backbone": {"name": "perpetune:micro", "pretrained": True},
        "pet": {"name": "lora", "rank": 8, "alpha": 16.0, "at": ["q", "v"]},
        "method": {"name": method, "mask": "task"},
        "head": {"name": "linear"},
        "train": {"epochs": 4, "batch_size": 32, "optimizer": "adamw", "lr": 0.003},
        "data": {"name": "digits"},
        "stream": {"classes_per_task": classes_per_task},
        "run": {"device": "auto", "precision": "no", "workers": 0},
    }
    return {
        "format": 1,
        "name": f"demo-{method}",
        "setting": "class",
        "seed": seed,
        "tasks": tasks,
        "cells": cells,
        "metrics": dict(summarise(cells, tasks)),
        "timings": [
            {
                "task": t,
                "learn_s": float(rng.uniform(9, 14)),
                "evaluate_s": 0.3 + 0.1 * t,
                "images": 540 * classes_per_task,
                "images_per_s": 90.0 if t else None,
                "peak_memory_bytes": 512_000_000 + 1_000_000 * t,
            }
            for t in range(learned)
        ],
        "storage": [
            {
                "task": t,
                "pet.safetensors": 148_000,
                "head.safetensors": 1_600 * (t + 1),
                "method.safetensors": 800,
                "metrics.json": 2_400,
            }
            for t in range(learned)
        ],
        "trainable_parameters": 36_864,
        "backbone_parameters": 2_700_000,
        "bad_files": [],
        "warnings": [],
        "recipe": recipe,
        "versions": {"perpetune": "0.1.0", "python": "3.11.9", "torch": "2.15.0+cpu", "transformers": "5.23.0"},
        "device": "cpu",
        "complete": learned == n_tasks,
        "extra": {},
    }


WEIGHT = "weight of the fast learner"


def told_of(results: dict[str, Any], *, still: bool = False) -> dict[str, Any]:
    """`results` of a method that could have answered in two other ways, has two heads of statistics, and drifts.

    The slow way has two answers less right in each cell, the fast one a third of them; a task's features move by a
    hundredth with every later task.
    """
    names = [task["name"] for task in results["tasks"]]
    learned = range(len(results["cells"]))
    for i, row in enumerate(results["cells"]):
        for j, cell in enumerate(row):
            if cell:
                cell["others"] = {"slow": max(0, cell["correct"] - 2), "fast": cell["correct"] // 3 * 2}
                cell["gauges"] = {WEIGHT: 0.6 if i == j else 0.3 + 0.1 * (j == 0)}

    def facts(task: int, penalty: float) -> dict[str, Any]:
        return {
            "kind": "ridge", "rows": 1000 * (task + 1), "dim": 1000, "penalty": penalty, "share": 1e-3, "error": 0.071,
            "freedom": 312.5, "scale": 14.1, "solver": "primal", "factorisations": 2, "bytes": 4012345, "warning": None,
        }  # fmt: skip

    results["facts"] = [{"task": t, "of": {"fast": facts(t, 12.34), "slow": facts(t, 1e-5)}} for t in learned]
    results["drift"] = [
        {"task": t, "of": {names[j]: 0.0 if still else round(0.01 * (t - j), 6) for j in range(t)}} for t in learned
    ]
    for entry in results["storage"]:
        entry["statistics.safetensors"] = 8_000_000
    return results


def troubled() -> dict[str, Any]:
    """Names and messages that a page must not take for markup, in a run with problems."""
    names = ["<script>alert(1)</script>", 'a "quoted" & <b>bold</b>', "猫 | pipe", "back`tick*_", *"cdefgh"]
    results = fake_results(5, 2, names=names, rows=3)
    results["name"] = "<img src=x onerror=alert(2)>"
    results["warnings"] = [
        "class </style><script>alert(3)</script> has no test image",
        "2 duplicates between train and test",
    ]
    results["bad_files"] = [
        {"task": 0, "file": "photos/<b>.png", "reason": "truncated"},
        {"task": None, "file": "photos/\udcff.jpg", "reason": "not an image"},
    ]
    results["recipe"]["description"] = "</code></pre><script>alert(4)</script> ``` {{ 7 * 7 }}"
    results["device"] = "<i>cpu</i>"
    results["versions"]["</dd>"] = "<u>1</u>"
    results["storage"][0]["<s>.bin"] = 10
    return results


SIZES: dict[str, Callable[[], dict[str, Any]]] = {
    "one": lambda: fake_results(1, 2),
    "two": lambda: fake_results(2, 5),
    "five": lambda: fake_results(5, 2, ahead=True),
    "twenty": lambda: fake_results(20, 5, keep=0.8),
    "hundred": lambda: fake_results(100, 10, keep=0.6),
    "begun": lambda: fake_results(5, 2, rows=0),
    "troubled": troubled,
    "told": lambda: told_of(fake_results(5, 2)),
    "told of troubles": lambda: told_of(troubled()),
    "told of many": lambda: told_of(fake_results(40, 2)),
    "told of one": lambda: told_of(fake_results(1, 2)),
    "told of none": lambda: told_of(fake_results(5, 2, rows=0)),
}


def fake_runs() -> list[tuple[str, dict[str, Any]]]:
    runs = []
    for method, keep in (("finetune", 0.4), ("joint", 1.0), ("frozen", 0.85)):
        for seed in range(3 if method != "frozen" else 1):
            runs.append((f"runs/{method}-{seed}", fake_results(8, 4, seed=seed, method=method, keep=keep)))
    return runs


class Page(HTMLParser):
    """What a browser would load, run and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.open: list[str] = []
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link"):
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("src", "href", "srcset", "data", "action"):
                self.links.append(value or "")
            if key.startswith("on"):
                self.handlers.append(key)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.shown += data


@pytest.mark.parametrize("size", chiefly(SIZES, set(SIZES) - {"hundred"}))
def test_page_is_self_contained_and_well_formed(size: str, tmp_path: Path) -> None:
    html, data, md = write_report(SIZES[size](), tmp_path / "deep" / "er")
    assert [p.name for p in (html, data, md)] == ["report.html", "report.json", "report.md"]
    assert sorted(p.name for p in html.parent.iterdir()) == sorted(p.name for p in (html, data, md))
    text = html.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []  # every element is closed, in order
    assert all(link.startswith("#") or link == "data:," for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert page.tags.count("script") == 1
    assert page.handlers == []
    assert not re.search(r"https?:|@import|url\(", text)
    assert "nan" not in page.shown.lower().split()
    assert "None" not in page.shown
    json.loads(data.read_text(encoding="utf-8"))


def test_page_shows_the_figures(tmp_path: Path) -> None:
    results = fake_results(5, 2)
    shown = Page(write_report(results, tmp_path)[0].read_text(encoding="utf-8")).shown
    assert form.percent(results["metrics"]["final_accuracy"]) + "%" in shown
    assert form.percent(results["metrics"]["forgetting"]) + "points" in shown
    for text in (
        "Class-incremental",
        "lora",
        "36,864",
        "10.8 MB",
        "batch_size: 32",
        "2.15.0+cpu",
        "task-5",
        "class-009",
    ):
        assert text in shown
    assert "pip install perpetune==0.1.0 torch==2.15.0 transformers==5.23.0\nperpetune run recipe.yaml" in shown
    assert "not complete" not in shown
    assert "Warnings" not in shown
    assert "figures are of the 3 tasks learned so far" in Page(write_report(troubled(), tmp_path)[0].read_text()).shown


def test_names_from_users_stay_text(tmp_path: Path) -> None:
    html, data, md = write_report(troubled(), tmp_path)
    text = html.read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("script") == page.tags.count("style") == 1
    assert not {"img", "u", "s"} & set(page.tags)
    for name in (
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(2)>",
        "猫 | pipe",
        "photos/<b>.png",
        "{{ 7 * 7 }}",
    ):
        assert name in page.shown
    assert json.loads(data.read_bytes())["bad_files"][1]["file"] == "photos/\udcff.jpg"
    markdown = md.read_text(encoding="utf-8")
    recipe = markdown[markdown.index("````yaml") : markdown.rindex("````")]
    assert "alert(4)" in recipe
    assert not re.search(r"(?<!\\)<(script|img|b|i|s)", markdown.replace(recipe, ""))
    widths = [
        len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if "pipe" in line and line[0] == "|"
    ]
    assert set(widths) == {8}  # a pipe in a name opens no column


def test_json_holds_the_document_and_what_follows_from_it(tmp_path: Path) -> None:
    results = fake_results(4, 3)
    document = json.loads(write_report(results, tmp_path)[1].read_text(encoding="utf-8"))
    assert {key: document[key] for key in results} == results
    assert document["curves"]["accuracy"][-1] == results["metrics"]["final_accuracy"]
    assert document["curves"]["forgetting"] == [None, *document["curves"]["forgetting"][1:]]
    assert document["curves"]["tasks"][2][:2] == [None, None]
    assert [row["name"] for row in document["classes"]] == [f"class-{k:03d}" for k in range(12)]
    assert checked(document)  # a report can be read back


def test_a_report_replaces_the_one_before(tmp_path: Path) -> None:
    write_report(fake_results(2), tmp_path)
    before = (tmp_path / "report.html").read_text()
    write_report(fake_results(3), tmp_path)
    assert (tmp_path / "report.html").read_text() != before
    assert len(list(tmp_path.iterdir())) == 3


def test_tables() -> None:
    results = checked(fake_results(3, 2))
    rows = tasks.task_rows(results)
    assert rows[2].forgotten is None
    assert rows[2].learned == rows[2].now
    lost = [row.forgotten for row in rows if row.forgotten is not None]
    assert results["metrics"]["forgetting"] == pytest.approx(sum(lost) / 2)
    first = classes.class_rows(results)[0]
    assert first.tasks == [1]
    assert first.total == 45
    assert first.change == pytest.approx((first.now or 0) - (first.learned or 0))
    stored = {row.kind: row for row in storage.storage_rows(results)}
    assert (stored["head.safetensors"].last, stored["head.safetensors"].total) == (4_800, 9_600)
    assert choices(results["recipe"]) == {
        "backbone": "perpetune:micro", "method": "finetune", "pet": "lora", "head": "linear",
    }  # fmt: skip
    assert choices({"pet": None, "head": "ncm"}) == {"head": "ncm"}


def test_a_class_met_in_several_tasks_is_one_row() -> None:
    document = fake_results(3, 2, names=["cat", "dog"] * 3)
    rows = classes.class_rows(checked(document))
    assert [(row.name, row.tasks, row.total) for row in rows] == [("cat", [1, 2, 3], 135), ("dog", [1, 2, 3], 135)]


def test_many_empty_cells_of_a_matrix_are_one_wide_cell() -> None:
    """A page of 60 tasks has as many columns in each row as before, in far fewer cells."""

    class Rows(HTMLParser):
        def __init__(self, page: str) -> None:
            super().__init__()
            self.widths: list[list[int]] = []
            self.feed(page)

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "tr":
                self.widths.append([])
            elif tag in ("td", "th"):
                self.widths[-1].append(int(dict(attrs).get("colspan") or 1))

    table = matrix.heat(checked(fake_results(60, 1)))
    head, *found, _ = Rows(str(html.blocks([table]))).widths  # the foot ends with the last column that has a figure
    assert {sum(widths) for widths in found} == {len(head)}
    assert max(max(widths) for widths in found) == 59
    assert sum(map(len, found)) < 0.7 * sum(map(sum, found))
    few = Rows(str(html.blocks([matrix.heat(checked(fake_results(8, 1)))]))).widths
    assert {width for widths in few for width in widths} == {1}


def test_members_of_a_pool_are_those_of_all_tasks_but_for_forgotten_ones() -> None:
    """Facts name the members of their task; those of older versions, and of a pool that tasks share, name all."""

    def named(*facts: list[str] | tuple[list[str], int], forgot: tuple[int, str] | None = None) -> list[str]:
        results = fake_results(4, 1)
        told = [{"members": one[0], "count": one[1]} if isinstance(one, tuple) else {"members": one} for one in facts]
        results["facts"] = [{"task": task, "of": {"pool": one}} for task, one in enumerate(told)]
        results |= {"forgot": [{"task": forgot[0], "tasks": [forgot[1]], "classes": []}]} if forgot else {}
        return members._members(checked(results))

    assert named((["a"], 1), (["b"], 2), (["c"], 3)) == ["a", "b", "c"]
    assert named(["a"], ["a", "b"], (["c"], 3)) == ["a", "b", "c"]
    assert named(["a"], ["a", "b"]) == ["a", "b"]
    assert named(["0", "1"], ["0", "1"]) == ["0", "1"]
    assert named((["a"], 1), (["b"], 2), (["b"], 1), forgot=(2, "a")) == ["b"]
    assert named((["a"], 1), (["b"], 2), (["b"], 1), (["a"], 2), forgot=(2, "a")) == ["b", "a"]
    assert named() == []


def test_matrix_marks_tasks_not_yet_learned() -> None:
    table = matrix.heat(checked(fake_results(3, 2, ahead=True)))
    kinds = [[cell.kind if cell else None for cell in row.cells] for row in table.rows]
    assert kinds == [["learned", "ahead", "ahead"], ["kept", "learned", "ahead"], ["kept", "kept", "learned"]]
    assert len((table.foot or ("", []))[1]) == 2
    assert table.style == "large"
    first = table.rows[1].cells[0]
    assert first is not None
    assert "points since task-1" in first.title


def wrong(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    results = fake_results(3, 2)
    change(results)
    return results


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({}, "format None"),
        (wrong(lambda r: r.update(format=2)), "results of format 2; this perpetune reads format 1"),
        (wrong(lambda r: r.pop("tasks")), "tasks: Field required"),
        (
            wrong(lambda r: r["cells"][1][0].update(correct="many")),
            "cells.1.0.correct: Input should be a valid number",
        ),
        (wrong(lambda r: r["cells"].append([None])), "4 rows of cells for 3 tasks"),
        (wrong(lambda r: r["cells"][0].append(None)), "cells.0 has 4 columns for 3 tasks"),
        (wrong(lambda r: r["cells"][0][0]["per_class"].update(x=[1])), "cells.0.0.per_class"),
        (wrong(lambda r: r["tasks"][1].update(index=7)), r"numbered 0 to 2 in order, not \[0, 7, 2\]"),
        (wrong(lambda r: r["storage"][0].update(task=9)), "an entry of storage names no task"),
        (wrong(lambda r: r["timings"][0].update(task=-1)), "an entry of timings names no task"),
        (wrong(lambda r: r.update(drift=[{"task": 9, "of": {}}])), "an entry of drift names no task"),
        (wrong(lambda r: r.update(drift=[{"task": 1, "of": {"x": 0.1}}])), "an entry of drift names no task: x"),
        (wrong(lambda r: r.update(facts=[{"task": 1}])), "facts.0.of: Field required"),
        (wrong(lambda r: r["cells"][0][0].update(others={"slow": 0.5})), "cells.0.0.others.slow: .*integer"),
        (wrong(lambda r: r["cells"][0][0].update(gauges={"w": "much"})), "cells.0.0.gauges.w: .*number"),
    ],
)
def test_a_wrong_document_is_refused_in_one_line(results: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=message) as caught:
        checked(results, "runs/a/report.json")
    assert str(caught.value).startswith("runs/a/report.json: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(StateError):
        write_report(results, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_compare_gathers_seeds_into_one_row() -> None:
    named = fake_runs()
    comparison = compare([run for _, run in named], [name for name, _ in named])
    assert [(row["label"], len(row["runs"])) for row in comparison["rows"]] == [
        ("demo-finetune", 3), ("demo-joint", 3), ("demo-frozen", 1),
    ]  # fmt: skip
    row = comparison["rows"][0]
    finals = [run["metrics"]["final_accuracy"] for _, run in named[:3]]
    assert row["seeds"] == [0, 1, 2]
    assert row["runs"] == ["runs/finetune-0", "runs/finetune-1", "runs/finetune-2"]
    assert row["metrics"]["final_accuracy"]["mean"] == pytest.approx(np.mean(finals))
    assert row["metrics"]["final_accuracy"]["std"] == pytest.approx(np.std(finals, ddof=1))
    assert row["average_accuracy_curve"][-1]["mean"] == pytest.approx(np.mean(finals))
    assert row["average_accuracy_curve"][0]["n"] == 3
    assert comparison["rows"][2]["metrics"]["final_accuracy"]["std"] is None
    assert comparison["settings"] == ["method.name"]
    assert comparison["notes"] == []
    assert comparison["best"]["forgetting"] == comparison["best"]["final_accuracy"] == [1]
    assert comparison["best"]["forward_transfer"] == []


def test_compare_looks_past_where_a_run_happened_but_not_past_precision() -> None:
    base = fake_results(3)
    elsewhere, coarser = copy.deepcopy(base), copy.deepcopy(base)
    elsewhere["recipe"]["run"].update(device="cuda", workers=4)
    elsewhere["recipe"].update(name="other", seed=5, evaluate={"batch_size": 7})
    coarser["recipe"]["run"]["precision"] = "bf16"
    assert len(compare([base, elsewhere])["rows"]) == 1
    rows = compare([base, coarser])["rows"]
    assert [row["label"] for row in rows] == ["demo-finetune · precision no", "demo-finetune · precision bf16"]


def given(data: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A state made by `init` and `update`s: its recipe names no data."""
    results = fake_results(3, seed=seed)
    results["recipe"]["data"] = None
    for task in results["tasks"]:
        task["fingerprint"] = f"{data}-{task['index']}"
    results["tasks"][-1].update(changes)
    return results


@pytest.mark.parametrize(
    "other",
    [given("nov", 1), given("oct", 1, name="b"), given("oct", 1, train=9), given("oct", 1, classes=["x", "y"])],
    ids=["fingerprint", "name", "examples", "classes"],
)
def test_compare_keeps_states_of_other_data_apart(other: dict[str, Any]) -> None:
    rows = compare([given("oct"), other], ["s/oct", "s/nov"])["rows"]
    assert [(row["label"], row["runs"]) for row in rows] == [
        ("demo-finetune · s/oct", ["s/oct"]), ("demo-finetune · s/nov", ["s/nov"]),
    ]  # fmt: skip


def test_compare_gathers_states_of_the_same_data() -> None:
    assert [row["seeds"] for row in compare([given("oct"), given("oct", 1)])["rows"]] == [[0, 1]]
    comparison = compare([given("oct"), given("nov", 1)], ["a", "b"])
    assert comparison["notes"] == ["b learned other data than a"]
    assert comparison["best"]["final_accuracy"] == []


def test_a_states_results_bring_the_fingerprints_of_its_data(tmp_path: Path) -> None:
    learner = Learner({"backbone": "perpetune:micro", "method": "frozen", "pet": "none", "head": "ncm"}, tmp_path / "s")
    for shade in (0, 200):
        folder = tmp_path / f"shade{shade}"
        folder.mkdir()
        for name in "ab":
            (folder / name).mkdir()
            Image.new("RGB", (8 + shade, 8), (shade, 0, 0)).save(folder / name / "1.png")
        results = learner.learn(folder, holdout=0.0)
    prints = [task["fingerprint"] for task in checked(results)["tasks"]]
    assert len(set(prints)) == 2
    assert prints == [committed.json("task.json")["fingerprint"] for committed in learner.state.committed]


def test_compare_lets_the_seed_order_and_draw_a_stream() -> None:
    base, drawn = fake_results(4), fake_results(4, seed=1, names=[f"class-{k:03d}" for k in (7, 6, 5, 4, 3, 2, 1, 0)])
    for run in (base, drawn):
        for task in run["tasks"]:
            task["fingerprint"] = f"{run['seed']}-{task['index']}"
    drawn["tasks"][0]["train"] -= 3
    drawn["tasks"][1]["train"] += 3
    assert [row["seeds"] for row in compare([base, drawn])["rows"]] == [[0, 1]]
    for change in ({"train": 1}, {"test": 1}, {"classes": ["x", "y"]}):
        other = copy.deepcopy(drawn)
        other["tasks"][0].update(change)
        assert len(compare([base, other])["rows"]) == 2
    assert len(compare([base, fake_results(4, rows=2, seed=1)])["rows"]) == 2


def test_compare_counts_a_seed_once() -> None:
    base, other = fake_results(3), fake_results(3, seed=1)
    again, elsewhere = copy.deepcopy(base), copy.deepcopy(base)
    elsewhere["cells"][2][0]["correct"] -= 1
    comparison = compare([base, again, other, elsewhere], ["a", "b", "c", "d"])
    assert [(row["runs"], row["seeds"]) for row in comparison["rows"]] == [(["a", "c"], [0, 1])]
    assert comparison["rows"][0]["metrics"]["final_accuracy"]["n"] == 2
    assert comparison["notes"] == [
        "b repeats a (same recipe, data and seed) and is not counted",
        "d repeats a (same recipe, data and seed) and is not counted, though its figures differ",
    ]
    again["tasks"][0]["fingerprint"] = "changed"  # a folder that was exchanged beneath the recipe's path
    assert [row["runs"] for row in compare([base, again, other], ["a", "b", "c"])["rows"]] == [["a", "c"], ["b"]]


def test_compare_says_what_cannot_be_compared() -> None:
    base = fake_results(4, 2)
    order = [f"class-{k:03d}" for k in (7, 6, 5, 4, 3, 2, 1, 0)]
    shuffled = fake_results(4, 2, seed=1, names=order)
    assert compare([base, shuffled])["notes"] == ["demo-finetune has the classes of demo-finetune in another order"]
    many = [base, *(fake_results(4, 2, seed=s, names=order) for s in range(1, 6))]
    assert compare(many, [f"m/{s}" for s in range(6)])["notes"] == [
        "m/1, m/2, m/3 and 2 more have the classes of m/0 in another order"
    ]
    other_cut = fake_results(2, 4, method="joint")
    comparison = compare([base, other_cut], ["a", "b"])
    assert comparison["notes"] == ["b cuts the classes into 2 tasks, a into 4"]
    assert comparison["best"]["final_accuracy"] == []
    assert (
        "b has other classes than a: 10 classes in 5 tasks against 8 classes in 4 tasks"
        in compare([base, fake_results(5, 2)], ["a", "b"])["notes"]
    )
    assert compare([base, fake_results(4, 2, rows=2)], ["a", "b"])["notes"] == [
        "b is not complete: 2 tasks learned so far"
    ]
    fewer = wrong(lambda r: None)
    fewer["tasks"][0]["test"] = 10
    assert compare([fake_results(3, 2), fewer], ["a", "b"])["notes"] == ["b is tested on 190 examples, a on 270"]
    domain = wrong(lambda r: r.update(setting="domain"))
    assert "b is domain-incremental" in compare([fake_results(3, 2), domain], ["a", "b"])["notes"][0]


def test_compare_refuses_nothing_and_names_a_bad_run() -> None:
    with pytest.raises(UsageError, match="name one run or more"):
        compare([])
    with pytest.raises(StateError, match=r"^runs/bad: "):
        compare([fake_results(2), {}], ["runs/good", "runs/bad"])


def test_spread() -> None:
    assert spread([1.0, None, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "n": 2, "values": [1.0, None, 3.0]}
    assert spread([0.5])["std"] is None
    assert spread([None]) == {"mean": None, "std": None, "n": 0, "values": [None]}


def test_comparison_files(tmp_path: Path) -> None:
    runs = fake_runs()
    runs.append(("runs/<b>&", troubled()))
    html, data, md = write_comparison(runs, tmp_path)
    page = Page(html.read_text(encoding="utf-8"))
    assert page.open == []
    assert page.tags.count("script") == 1
    assert "b" not in page.tags
    assert "4 recipes, 8 runs" in page.shown
    assert "Read with care" in page.shown
    assert re.search(r"\d ± \d", page.shown)
    assert json.loads(data.read_text(encoding="utf-8"))["format"] == 1
    assert "| demo-joint | 3 |" in md.read_text(encoding="utf-8")


def briefs(results: Any, when: str = "end") -> list[str]:
    """What the terminal says in a line each, at the end of a run or after each task."""
    blocks = (block for section in collect(results) for block in section.blocks)
    found = [b for b in blocks if isinstance(b, Brief) and b.when in ("always", when)]
    return [terminal.brief_line(b).plain for b in found]


def rendered(what: object, width: int) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(what)
    return console.export_text()


def test_terminal_matrix_shows_changes() -> None:
    results = checked(fake_results(5, 2))
    text = rendered(terminal.heat_table(matrix.heat(results), 100), 100)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[1].split() == ["after", "mean", *(f"task-{t}" for t in range(1, 6))]
    assert "▼" in text
    assert "1 task-1" in text
    line = terminal.figures_line(Figures(figures.large(results))).plain
    assert line.startswith("final accuracy ")
    assert "forward transfer" not in line
    assert "▼" in terminal.row_line(matrix.heat(results)).plain
    assert terminal.row_line(matrix.heat(results)).plain.startswith("after 5 task-5: mean .")


@pytest.mark.parametrize(("n_tasks", "width"), [(1, 40), (12, 80), (20, 100), (100, 80), (100, 200)])
def test_terminal_matrix_fits(n_tasks: int, width: int) -> None:
    text = rendered(terminal.heat_table(matrix.heat(checked(fake_results(n_tasks, 1))), width), width)
    assert max(map(len, text.splitlines())) <= width
    assert len(text.splitlines()) <= 30
    assert ("…" in text) == (n_tasks > 20 or (n_tasks, width) == (20, 100))
    assert f"{n_tasks} task-{n_tasks}" in text


def test_terminal_before_the_first_task() -> None:
    results = checked(fake_results(3, 2, rows=0))
    assert terminal.row_line(matrix.heat(results)).plain == "no task is learned yet"
    assert terminal.figures_line(Figures(figures.large(results))).plain == ""
    assert "task-3" in rendered(terminal.heat_table(matrix.heat(results), 80), 80)


@pytest.mark.parametrize(
    ("width", "left_out"), [(80, "pooled, stored, backward, learning"), (120, "pooled"), (180, "")]
)
def test_terminal_comparison_fits(width: int, left_out: str) -> None:
    runs = [run for _, run in fake_runs()]
    for run in runs:
        run["name"] = "a fairly long name of the run of " + run["name"]
    text = rendered(comparison.compare_table(compare(runs), width), width)
    lines = [line for line in text.splitlines() if line.strip()]
    assert max(map(len, lines)) <= width
    assert len(lines) <= 2 + 2 * 3 + bool(left_out)  # heading, rule, two lines a row at most
    assert lines[0].split()[:5] == ["run", "n", "final", "average", "forgetting"]
    assert "forward" not in lines[0]  # nothing was measured
    assert (f"too narrow for: {left_out}" in text) if left_out else ("too narrow" not in text)
    assert len(re.findall(r"\d ± \d", text)) >= 2 * 3
    assert "…" not in text
    short = rendered(comparison.compare_table(compare([run for _, run in fake_runs()]), width), width)
    assert re.findall(r"^ (\S+) +\d  ", short, re.MULTILINE) == ["demo-finetune", "demo-joint", "demo-frozen"]


def test_the_terminal_views_take_the_width_there_is(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    live.show_results(fake_results(15, 1))
    assert "▼" in capsys.readouterr().out  # 15 columns with changes need more than the usual 100 characters
    runs = [run for _, run in fake_runs()]
    live.show_comparison(compare([*runs, runs[0]], [*(name for name, _ in fake_runs()), "again"]))
    shown = capsys.readouterr().out
    assert "pooled" in shown
    assert "too narrow" not in shown
    assert "note: again repeats runs/finetune-0" in shown


def test_numbers_as_text() -> None:
    assert [form.percent(x) for x in (None, 0.8734, 1.0, -0.112, -0.0001)] == ["–", "87.3", "100.0", "−11.2", "0.0"]
    assert [form.points(x) for x in (None, 0.015, -0.112, 0.0, -0.0001)] == ["–", "+1.5", "−11.2", "0.0", "0.0"]
    assert [form.size(x) for x in (None, 512, 81_600, 999_600, 10_800_000, 2e15)] == [
        "–", "512 B", "81.6 kB", "1.0 MB", "10.8 MB", "2000.0 TB",
    ]  # fmt: skip
    assert [form.duration(x) for x in (None, 0.44, 59.97, 200, 3725)] == [
        "–", "0.4 s", "1 min 00 s", "3 min 20 s", "1 h 02 min",
    ]  # fmt: skip
    assert [form.relative(*x) for x in ((1e-6, 1), (1, 0), (7.22, 100), (0.0374, 100), (137, 100))] == [
        "< 0.001 %",
        "–",
        "7.2 %",
        "0.037 %",
        "137 %",
    ]
    assert [terminal.share(x) for x in (None, 0.0, 0.874, 0.999, 1.0)] == ["–", ".00", ".87", "1.0", "1.0"]


@pytest.mark.parametrize("ramp", [palette.LIGHT_RAMP, palette.DARK_RAMP])
def test_every_heat_colour_can_be_read(ramp: tuple[str, ...]) -> None:
    for level in range(palette.STEPS):
        colour = palette.mix(ramp, level / (palette.STEPS - 1))
        assert palette.contrast(colour, palette.text_on(colour)) >= 4.5
    lightness = [palette.luminance(palette.mix(ramp, level / 20)) for level in range(21)]
    assert lightness in (sorted(lightness), sorted(lightness, reverse=True))  # more is always lighter, or darker
    assert [palette.heat_level(a) for a in (-0.1, 0, 0.5, 1, 1.2)] == [0, 0, 10, 20, 20]


def test_chart_breaks_at_gaps_and_grows_to_its_values() -> None:
    line = svg.Line("a & b", [0.5, None, 0.6, 0.7, -0.3], "l0", [0.1, None, 0.0, 0.1, 0.1])
    chart = svg.line_chart([line], "label", width=400, height=200, floor=0, top=0.1)
    assert chart.count("<polyline") == 1
    assert chart.count("<circle") == 4
    assert chart.count("<polygon") == 2
    assert "a &amp; b, after task 1: 50.0 %" in chart
    assert "−40" in chart
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', chart)]
    assert all(0 < y < 200 for y in heights)
    assert "<circle" not in svg.line_chart([], "nothing", width=400, height=200, floor=0, top=1)


def browse(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's document after its script ran, and what the browser's console says."""
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    ]  # fmt: skip
    command = [CHROMIUM, *options, "--v=0", f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    shutil.rmtree(profile, ignore_errors=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium")
def test_a_browser_shows_the_pages_without_a_console_message(tmp_path: Path) -> None:
    report = write_report(troubled(), tmp_path)[0]
    # Sort by "now" (the first click is ascending) after the page's own script has set the table up.
    click = "<script>document.querySelectorAll('#classes th')[5].querySelector('button').click()</script>"
    report.write_text(report.read_text(encoding="utf-8").replace("</body>", click + "</body>"), encoding="utf-8")
    document, console = browse(report, tmp_path / "profile")
    assert console == []
    classes = document[document.index('id="classes"') : document.index('id="storage"')]
    now = [float(v) for v in re.findall(r'data-v="([\d.]+)"[^>]*>[\d.]+<span class="bar"', classes)]
    assert len(now) == 6
    assert now == sorted(now)
    assert "aria-sort" in classes
    _, console = browse(write_comparison(fake_runs(), tmp_path)[0], tmp_path / "profile")
    assert console == []
    broken = tmp_path / "broken.html"
    broken.write_text("<script>throw new Error('seen')</script>", encoding="utf-8")
    assert "seen" in "".join(browse(broken, tmp_path / "profile")[1])  # so the silence above means something


# -- ways to answer, heads of statistics, drift --------------------------------------------------------


def test_other_ways_to_answer_are_a_run_of_their_own() -> None:
    results = checked(told_of(fake_results(4, 2, rows=3)))
    assert answers.names(results) == ["slow", "fast"]
    mixed, slow, fast = answers.ways(results)
    assert (mixed.name, mixed.metrics) == ("mixed", results["metrics"])
    row = [cell for cell in results["cells"][-1] if cell]
    by_hand = sum((cell["correct"] - 2) / cell["total"] for cell in row) / 3
    assert slow.metrics["final_accuracy"] == pytest.approx(by_hand)
    assert slow.metrics["average_accuracy"] == pytest.approx(sum(v for v in slow.curve if v is not None) / 3)
    assert fast.curve[-1] == fast.metrics["final_accuracy"]
    del results["cells"][2][0]["others"]["slow"]  # type: ignore[index]
    missing = answers.answered(results, "slow")
    assert missing["cells"][2][0] is None, "what is not known is not measured, rather than wrong"
    assert results["cells"][2][0] is not None


def test_one_other_way_makes_no_mixture() -> None:
    results = fake_results(2)
    results["cells"][0][0]["others"] = {"plain": 3}
    assert answers.own_name(results) == "answer"
    assert [way.name for way in answers.ways(checked(results))] == ["answer", "plain"]


def test_gauges_are_told_of_new_and_old_tasks_apart() -> None:
    results = told_of(fake_results(3, 2))
    rows = answers.gauge_rows(results)
    assert [row.means for row in rows] == [[(0.6, None)], [(0.6, 0.4)], [(0.6, pytest.approx(0.35))]]
    assert answers.gauges_told(results) == [(WEIGHT, "0.600 on the new task, 0.350 on earlier ones")]
    assert answers.gauges_told(told_of(fake_results(1, 2))) == [(WEIGHT, "0.600 on the new task")]


def test_what_heads_tell_may_be_anything() -> None:
    """A head of another package has facts of its own."""
    results = fake_results(2)
    results["facts"] = [
        {"task": 1, "of": {"b": {"kind": "other", "temperature": 0.5, "rows": "many", "tried": [1, 2]}, "empty": {}}},
        {"task": 0, "of": {"a": {"penalty": None, "exact": True}}},
    ]
    rows = heads.rows(checked(results))
    assert heads.headings(results) == ["kind", "examples"]
    assert [(row.number, row.head, row.texts, row.more) for row in rows] == [
        (1, "a", ["–", "–"], "exact true"), (2, "b", ["other", "many"], "temperature 0.5, tried [1, 2]"),
    ]  # fmt: skip
    assert heads.told(results) == [("b", "other, many examples, temperature 0.5, tried [1, 2]")]


def test_drift_is_told_of_the_last_task_and_each_before() -> None:
    results = told_of(fake_results(4, 2))
    table = drift.table(results)
    assert table.names == ["task-1", "task-2", "task-3"]
    assert [[cell and cell.text for cell in row.cells] for row in table.rows] == [
        ["0.010", None, None], ["0.020", "0.010", None], ["0.030", "0.020", "0.010"],
    ]  # fmt: skip
    assert [row.mean for row in table.rows] == ["0.010", "0.015", "0.020"]
    assert table.rows[0].cells[0] is not None
    assert table.rows[0].cells[0].title == "task-1 after task-2: moved 0.010"
    assert drift.final(results) == pytest.approx(0.02)
    assert drift.told(results) == "features of earlier tasks moved 0.020 (farthest task-1, 0.030)"
    results["drift"].pop()
    assert drift.final(results) is None, "of the last task nothing is known"
    assert drift.told(results) == ""


def test_the_page_tells_of_answers_heads_and_drift(tmp_path: Path) -> None:
    html, data, md = write_report(told_of(fake_results(5, 2)), tmp_path)
    text, markdown = html.read_text(encoding="utf-8"), md.read_text(encoding="utf-8")
    page = Page(text)
    assert {"answers", "heads", "drift"} <= set(page.ids)
    assert {"#answers", "#heads", "#drift"} <= set(page.links)
    answers_, heads, drifts = (
        text[text.index(f'<section id="{a}"') : text.index(f'<section id="{b}"')]
        for a, b in (("answers", "heads"), ("heads", "drift"), ("drift", "tasks"))
    )
    results = json.loads(data.read_bytes())
    for way in answers.ways(results):
        final, average, lost = (
            form.percent(way.metrics[k]) for k in ("final_accuracy", "average_accuracy", "forgetting")
        )  # type: ignore[literal-required]
        assert f"{way.name}</th><td>{final}</td><td>{average}</td><td>{lost}</td>" in answers_
        assert f"| {way.name} | {final} | {average} | {lost} |" in markdown
    assert answers_.count("<polyline") == 3
    assert "<td>0.600</td><td>0.325</td>" in answers_
    assert "| 5 task-5 | 0.600 | 0.325 |" in markdown
    assert (
        "<td>12.3</td><td>0.001</td><td>312</td><td>0.071</td><td>14.1</td><td>primal (2)</td><td>4.0 MB</td>" in heads
    )
    assert "| 2 task-2 | slow | ridge | 2,000 | 1,000 | 1.0e-5 | 0.001 | 312 |" in markdown
    assert "features of earlier tasks moved 0.025 (farthest task-1, 0.040)" in drifts
    assert "| 3 task-3 | 0.015 | 0.020 | 0.010 |  |  |" in markdown
    assert "certificate" not in drifts
    assert "statistics.safetensors" in page.shown


def test_features_that_are_still_need_no_table(tmp_path: Path) -> None:
    html, _, md = write_report(told_of(fake_results(5, 2), still=True), tmp_path)
    text = html.read_text(encoding="utf-8")
    assert drift.STILL in text[text.index('<section id="drift"') : text.index('<section id="tasks"')]
    assert "mean drift" not in text
    section = md.read_text("utf-8").partition("## Drift of old features")[2].partition("##")[0]
    assert drift.STILL in section
    assert "|" not in section


def test_a_document_that_has_nothing_of_it_shows_nothing_of_it(tmp_path: Path) -> None:
    for empty in (False, True):
        results = fake_results(3)
        if empty:  # as a run leaves them whose heads and features have nothing to tell
            results["facts"] = results["drift"] = [{"task": t, "of": {}} for t in range(3)]
        html, _, md = write_report(results, tmp_path)
        assert not {"answers", "heads", "drift"} & set(Page(html.read_text()).ids)
        assert not re.search("## (Ways|Heads|Drift)", md.read_text())
        assert briefs(results) == []
        shown = Page(write_comparison([("a", results)], tmp_path)[0].read_text()).shown
        assert "drift" not in shown
        assert "answered in that other way" not in shown


def test_the_terminal_tells_it_in_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    results = told_of(fake_results(5, 2))
    finals = [form.percent(way.metrics["final_accuracy"]) for way in answers.ways(checked(results))]
    told = [
        "answers: mixed {} %, slow {} %, fast {} %".format(*finals),
        f"{WEIGHT}: 0.600 on the new task, 0.325 on earlier ones",
        "head fast: ridge, 5,000 examples, penalty 12.3, 312 degrees of freedom",
        "head slow: ridge, 5,000 examples, penalty 1.0e-5, 312 degrees of freedom",
        "drift: features of earlier tasks moved 0.025 (farthest task-1, 0.040)",
    ]
    assert briefs(results) == told
    assert briefs(results, "live") == [*told[:2], told[-1]]
    live.show_results(results)
    out = " ".join(capsys.readouterr().out.split())
    assert all(line in out for line in told)


def ways_study() -> list[tuple[str, dict[str, Any]]]:
    runs = []
    for method, keep in (("finetune", 0.4), ("safe", 0.8), ("frozen", 0.85)):
        for seed in range(3):
            run = fake_results(5, 2, seed=seed, method=method, keep=keep)
            runs.append((f"runs/{method}-{seed}", told_of(run) if method == "safe" else run))
    return runs


def test_a_comparison_puts_other_ways_beside_the_runs(tmp_path: Path) -> None:
    named = ways_study()
    found = compare([run for _, run in named], [name for name, _ in named])
    rows = found["rows"]
    assert [(row["label"], row["way"]) for row in rows] == [
        ("demo-finetune", None), ("demo-safe", None), ("demo-safe: slow", "slow"), ("demo-safe: fast", "fast"),
        ("demo-frozen", None),
    ]  # fmt: skip
    runs = [run for name, run in named if "safe" in name]
    slow = [answers.answered(checked(run), "slow")["metrics"]["final_accuracy"] for run in runs]
    assert rows[2]["metrics"]["final_accuracy"] == spread(slow)
    assert rows[2]["average_accuracy_curve"][-1] == spread(slow)
    assert [row["stored_bytes"]["n"] for row in rows] == [3, 3, 0, 0, 3], "what runs have once is told once"
    assert [row["drift"]["n"] for row in rows] == [0, 3, 0, 0, 0]
    assert rows[1]["drift"]["mean"] == pytest.approx(0.025)
    html, data, md = write_comparison(named, tmp_path)
    page = Page(html.read_text(encoding="utf-8"))
    assert page.open == []
    assert "3 recipes, 9 runs" in page.shown
    assert "None" not in html.read_text("utf-8")
    assert "demo-safe: slow" in page.shown
    assert "demo-safe: slow" not in page.shown.rpartition("The runs of each row")[2]
    assert "0.025 ± 0.000" in page.shown
    assert "| demo-safe: slow | 3 |" in md.read_text("utf-8")
    assert "Drift, 0 to 2" in md.read_text("utf-8")
    assert json.loads(data.read_bytes())["rows"][3]["way"] == "fast"
    text = rendered(comparison.compare_table(found, 140), 140)
    assert "drift: how far features of earlier tasks moved, 0 to 2" in text
    assert "demo-safe: fast" in text


def test_what_the_answer_gains_is_measured_seed_by_seed() -> None:
    named = ways_study()
    found = compare([run for _, run in named], [name for name, _ in named])
    methods = [effect for effect in found["effects"] if effect["setting"] == "method"]
    assert [(e["before"], e["after"], e["rows"]) for e in methods] == [
        ("finetune", "safe", (0, 1)), ("finetune", "frozen", (0, 4)),
    ]  # fmt: skip
    gains = [effect for effect in found["effects"] if effect["setting"] == "answer"]
    assert [(e["before"], e["after"], e["rows"], e["seeds"]) for e in gains] == [
        ("slow", "mixed", (2, 1), [0, 1, 2]), ("fast", "mixed", (3, 1), [0, 1, 2]),
    ]  # fmt: skip
    for effect in gains:
        first, second = (found["rows"][i]["metrics"]["final_accuracy"]["values"] for i in effect["rows"])
        wanted = [(b or 0) - (a or 0) for a, b in zip(first, second, strict=True)]
        assert effect["metrics"]["final_accuracy"]["values"] == pytest.approx(wanted)
    lines = comparison.effects_text(found).plain.splitlines()
    number = r"\+\d+\.\d ± \d+\.\d"
    assert re.fullmatch(f"answer mixed instead of slow: final accuracy {number} points with run demo-safe", lines[-2])
    alone = compare([run for name, run in named if "safe" in name])
    assert re.fullmatch(
        f"answer mixed instead of slow: final accuracy {number} points",
        comparison.effects_text(alone).plain.splitlines()[0],
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12.34, "12.3"), (0.001, "0.001"), (312.5, "312"), (999.7, "1,000"), (12345.6, "12,346"),
     (1.2e-7, "1.2e-7"), (3.4e9, "3.4e9"), (-12.34, "−12.3"), (0.00012345, "0.000123")],
)  # fmt: skip
def test_any_number_as_text(value: float, text: str) -> None:
    assert form.number(value) == text


def test_what_is_more_than_nothing_is_not_shown_as_nothing() -> None:
    assert [form.thousandths(v) for v in (None, 0.0, 0.0001, 0.0006, 0.62, 2.0)] == [
        "–", "0.000", "< 0.001", "0.001", "0.620", "2.000",
    ]  # fmt: skip
