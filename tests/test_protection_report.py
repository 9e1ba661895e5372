"""What protection kept, as results, pages, tables and the live view say it; what a setting changes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_report import WEIGHT, Page, briefs, fake_results, rendered, told_of
from tiny import recipe, split_folder, vit_folder

from perpetune import Learner
from perpetune.cli import live
from perpetune.cli.run import DEMO
from perpetune.errors import StateError
from perpetune.recipe import load_recipe
from perpetune.report import checked, compare, comparison, svg, terminal, write_comparison, write_report
from perpetune.report.compare import _flat
from perpetune.report.document import choices
from perpetune.report.effects import apart, differing, effects
from perpetune.report.sections import collect, protection
from perpetune.report.sections.headroom import role_of

SITES = ("net.blocks.0.q/default/down", "net.blocks.0.q/default/up", "net.blocks.1.q/default/down")


def entry(
    task: int, worst: float, *, of: str = "task", full: int = 0, consolidated: int | None = None
) -> dict[str, Any]:
    """A certificate in which the sites have moved by `worst`, half and a quarter of it."""
    before = task if consolidated is None else consolidated
    moved = [worst, worst / 2, worst / 4] if before else [None] * 3
    ranks = [8 if i < full else 2 for i in range(3)]
    sites = [
        {"site": s, "change": m or 0.0, "relative": m, "directions": 8, "room": 1 - r / 8, "rank": r}
        for s, m, r in zip(SITES, moved, ranks, strict=True)
    ]
    return {
        "task": task, "of": of, "examples": 20, "rows": 100, "energy": 0.99, "consolidated": before, "sites": sites,
        "worst": moved[0], "median": moved[1], "room": sum(s["room"] for s in sites) / 3,
        "full": [s["site"] for s in sites if s["rank"] == 8],
    }  # fmt: skip


def protect(results: dict[str, Any], **config: Any) -> dict[str, Any]:
    """`results`, learned under protection: 3.1 % more moved with every task, the first site full from the third."""
    results["recipe"]["protect"] = {
        "energy": 0.99, "strength": "hard", "sites": None, "directions": "features", "reference": None, **config,
    }  # fmt: skip
    learned = len(results["cells"])
    results["protection"] = [entry(t, 0.031 * t, full=int(t >= 2)) for t in range(learned)]
    return results


def shown(results: dict[str, Any], folder: Path) -> str:
    return Page(write_report(results, folder)[0].read_text(encoding="utf-8")).shown


def test_a_run_says_how_far_old_outputs_moved(tmp_path: Path) -> None:
    vit_folder(tmp_path / "model")
    split_folder(tmp_path / "images", ("cat", "dog", "fox", "owl"), 6, 3)
    console = Console(record=True, width=80, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    with live.Progress(console=console, disable=True) as bars:
        view = live.Live(console, bars)
        content = recipe(tmp_path / "model", tmp_path / "images", protect={"energy": 0.9})
        results = Learner(content, tmp_path / "state", progress=view).run()
    text = console.export_text()
    found = checked(results)["protection"]
    assert [(e["task"], e["of"], e["worst"] is None) for e in found] == [(0, "task", True), (1, "task", False)]
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("protect: ")]
    assert lines == [f"protect: {protection.told(e, results)}" for e in found]
    assert lines[0].startswith("protect: room ")
    assert re.match(r"protect: old outputs moved [\d.<]+ % \(worst site [\d.<]+ %\), room \d+ %", lines[1])
    page = shown(results, tmp_path / "page")
    assert "What protection kept" in page
    assert protection.told(found[1], results) in page
    assert "energy 0.9" in page


def test_documents_without_protection_are_as_before(tmp_path: Path) -> None:
    results = fake_results(3)
    assert "protection" not in checked(results)
    assert "What protection kept" not in shown(results, tmp_path)
    assert "What protection kept" not in (tmp_path / "report.md").read_text()
    assert not [line for line in briefs(results) if line.startswith("protect")]
    assert protection.newly_full(results) is None
    assert choices(results["recipe"]).keys() == {"backbone", "method", "pet", "head"}
    assert "moved" not in rendered(comparison.compare_table(compare([results]), 120), 120)
    assert "moved" not in Page(write_comparison([("a", results)], tmp_path)[0].read_text()).shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(task=9), "an entry of protection names no task"),
        (lambda e: e.update(of="guess"), r"protection.1.of: Input should be 'task' or 'reference'"),
        (lambda e: e["sites"][0].pop("room"), r"protection.1.sites.0.room: Field required"),
        (lambda e: e.update(worst="much"), r"protection.1.worst: Input should be a valid number"),
    ],
)
def test_a_wrong_certificate_is_refused_in_one_line(change: Any, message: str) -> None:
    results = protect(fake_results(3))
    change(results["protection"][1])
    with pytest.raises(StateError, match=message):
        checked(results)


def test_the_figures_of_a_run() -> None:
    results = protect(fake_results(4, rows=3))
    results["protection"].insert(0, entry(0, 0, of="reference", consolidated=0))
    run = checked(results)
    curves = protection.curves(run)
    assert curves.worst == [None, 0.031, 0.062]
    assert curves.median == [None, 0.0155, 0.031]
    assert curves.room == [0.75, 0.75, 0.5]
    rows = protection.site_rows(run)
    assert [row.name for row in rows] == ["0.q/default/down", "0.q/default/up", "1.q/default/down"]
    assert (rows[0].moved, rows[0].farthest, rows[0].room, rows[0].rank) == (0.062, 0.062, 0.0, 8)
    assert protection.moved(run) == 0.062
    assert protection.short(["alone.site"]) == ["site"]
    assert protection.short([]) == []


def test_reference_data_are_what_the_first_task_is_measured_against() -> None:
    results = fake_results(1)
    results["protection"] = [entry(0, 0, of="reference"), entry(0, 0.02, consolidated=1)]
    assert briefs(results) == ["protect: old outputs moved 1 % (worst site 2 %), room 75 %"]


def test_full_sites_are_told_of_when_they_become_more() -> None:
    told = []
    for rows in range(1, 6):
        results = protect(fake_results(5, rows=rows))
        results["protection"][4:] = [entry(4, 0.1, full=2)][: max(0, rows - 4)]
        told.append(protection.newly_full(results))
    assert [text is not None for text in told] == [False, False, True, False, True]
    assert told[2] == (
        "1 of 3 sites no longer learn, because they have no room left (0.q/default/down): "
        "a larger pet or a lower protect.energy leaves some room"
    )
    assert str(told[4]).startswith("2 of 3 sites ")
    assert protection.told(results["protection"][-1], results).endswith(", 2 of 3 full")
    for config in ({"directions": "none"}, {"strength": "soft"}, {"sites": ["down"]}):  # then full sites may learn
        assert protection.newly_full(protect(fake_results(3), **config)) is None


def test_outputs_that_were_zero_move_from_nothing(tmp_path: Path) -> None:
    """After reference data LoRA's B, which was zero, has no outputs that its change could be a share of."""
    results = protect(fake_results(1))
    certificate = entry(0, 0.0, consolidated=1)
    certificate["sites"][1].update(relative=None, change=0.3)
    results["protection"] = [entry(0, 0, of="reference"), certificate]
    assert protection.told(certificate, results) == "1 site moved from nothing, room 75 %"
    assert terminal.short_line(collect(results)).plain.endswith("  1 site moved from nothing, room 75 %")
    assert protection.moved(results) is None
    assert protection.curves(checked(results)).worst == [None]
    assert [row.from_nothing for row in protection.site_rows(checked(results))] == [False, True, False]
    page = shown(results, tmp_path)
    assert "from nothing" in page
    assert protection.NOTHING in page
    assert "| 1 task-1 | 0 % | 0 %, 1 from nothing | 75 % | 0 of 3 |" in (tmp_path / "report.md").read_text("utf-8")
    certificate["worst"], certificate["median"] = 0.02, 0.01
    told = "old outputs moved 1 % (worst site 2 %), 1 site moved from nothing, room 75 %"
    assert protection.told(certificate, results) == told


@pytest.mark.parametrize(
    ("config", "told", "closed"),
    [
        ({}, "room 50 %, 1 of 3 full", [True, True, True]),
        ({"sites": ["down"]}, "room 50 %, 1 of 2 full", [True, False, True]),
        ({"sites": ["up"]}, "room 50 %", [False, True, False]),
        ({"directions": "random"}, "room 50 %, 1 of 3 full", [True, True, True]),
        ({"directions": "none"}, "nothing held", [False, False, False]),
        ({"sites": []}, "nothing held", [False, False, False]),  # states made before that was refused
    ],
)
def test_room_is_of_the_sites_that_are_held(config: Any, told: str, closed: list[bool], tmp_path: Path) -> None:
    results = protect(fake_results(3), **config)
    head = "old outputs moved 3.1 % (worst site 6.2 %), "
    assert protection.told(results["protection"][-1], results) == head + told
    assert terminal.short_line(collect(results)).plain.endswith(
        "  moved 3.1 % (worst 6.2 %), " + told.partition(",")[0]
    )
    assert protection.room(results) == (0.5 if any(closed) else None)
    assert [row.held for row in protection.site_rows(checked(results))] == closed
    page = shown(results, tmp_path)
    assert page.count("not held") == closed.count(False)
    markdown = (tmp_path / "report.md").read_text("utf-8")
    if not any(closed):
        assert "share of directions still free" not in page
        assert "| 3 task-3 | 3.1 % | 6.2 % |\n" in markdown
    else:
        full = 1 if closed[0] else 0
        assert f"| 3 task-3 | 3.1 % | 6.2 % | 50 % | {full} of {sum(closed)} |" in markdown


def test_the_page_tells_it_all(tmp_path: Path) -> None:
    results = protect(fake_results(5))
    html = write_report(results, tmp_path)[0].read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert {"protection"} <= set(page.ids)
    assert "#protection" in page.links
    section = html[html.index('<section id="protection"') : html.index('<section id="tasks"')]
    assert section.count("<svg") == 2
    assert "worst site, after task 5: 12.4 %" in section
    assert "<details><summary>3 sites</summary>" in section
    assert "After the last task: old outputs moved 6.2 % (worst site 12 %), room 50 %, 1 of 3 full." in page.shown
    assert "exact if the inputs of the site have not changed" in page.shown
    assert "nan" not in page.shown.lower().split()
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| 5 task-5 | 6.2 % | 12 % | 50 % | 1 of 3 |" in markdown
    assert "| 1 task-1 | – | – | 75 % | 0 of 3 |" in markdown


def test_drift_stands_beside_the_certificate(tmp_path: Path) -> None:
    results = told_of(protect(fake_results(5)))
    html = write_report(results, tmp_path)[0].read_text(encoding="utf-8")
    section = html[html.index('<section id="drift"') : html.index('<section id="tasks"')]
    assert "outputs of the sites, inside the net" in section
    assert '<td>6.2 %</td><td>12 %</td><td class="mean">0.025</td>' in section
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| after | mean | outputs, median site | outputs, worst site | task-1 |" in markdown
    assert "| 5 task-5 | 0.025 | 6.2 % | 12 % | 0.040 |" in markdown
    told = [line.partition(":")[0] for line in briefs(results)]
    assert told == ["answers", WEIGHT, "head fast", "head slow", "protect", "drift"]


@pytest.mark.parametrize(
    ("config", "method", "says"),
    [
        ({"directions": "none"}, {}, "Protection held nothing here"),
        ({"directions": "random"}, {}, "drawn at random"),
        ({}, {"merge": 0.5}, "merges in a copy that was free to move"),
    ],
)
def test_the_page_says_what_the_figures_are_of(config: Any, method: Any, says: str, tmp_path: Path) -> None:
    results = protect(fake_results(3), **config)
    results["recipe"]["method"].update(method)
    assert says in shown(results, tmp_path)
    assert says not in shown(protect(fake_results(3)), tmp_path)


def test_a_site_that_moved_far_still_fits_the_chart() -> None:
    for value in (1.4, 8.0, 56.0, 4000.0):
        chart = svg.line_chart([svg.Line("worst", [None, value], "l1")], "x", width=540, height=300, floor=0, top=0.05)
        assert 2 <= chart.count('class="grid"') <= 7
        assert 0 < float(re.findall(r'cy="([\d.]+)"', chart)[0]) < 300


# -- comparisons --------------------------------------------------------------------------------------------


def study(heads: tuple[str, ...] = ("linear", "ncm"), seeds: int = 3) -> list[tuple[str, dict[str, Any]]]:
    """With and without protection, with each head; protection keeps more, and most with ncm."""
    runs = []
    for held in (True, False):  # the one that is held first: what goes without is still what is measured against
        for head in heads:
            for seed in range(seeds):
                keep = 0.4 + 0.2 * held + 0.3 * (held and head == "ncm")
                run = fake_results(5, 2, seed=seed, keep=keep)
                run["recipe"]["head"] = {"name": head, "metric": "cosine"} if head == "ncm" else {"name": head}
                run["recipe"]["protect"] = None
                run["name"] = f"{'pegp' if held else 'plain'}-{head}"
                runs.append((f"runs/{run['name']}-s{seed}", protect(run) if held else run))
    return runs


def test_what_each_setting_changes() -> None:
    runs = study()
    table = compare([run for _, run in runs], [name for name, _ in runs])
    found = {(e["setting"], *e["beside"].values()): e for e in table["effects"]}
    assert sorted(found) == [("head", "off"), ("head", "on"), ("protect", "linear"), ("protect", "ncm")]
    for (setting, *_), effect in found.items():
        assert (effect["before"], effect["after"]) == {"head": ("linear", "ncm"), "protect": ("off", "on")}[setting]
        assert effect["seeds"] == [0, 1, 2]
    finals = {
        name: [run["metrics"]["final_accuracy"] for path, run in runs if name in path]
        for name in ("plain-ncm", "pegp-ncm")
    }
    difference = found["protect", "ncm"]["metrics"]["final_accuracy"]
    assert difference["values"] == [b - a for a, b in zip(finals["plain-ncm"], finals["pegp-ncm"], strict=True)]
    assert difference["n"] == 3
    lines = comparison.effects_text(table).plain.splitlines()
    number = r"[+−]?\d+\.\d ± \d+\.\d"
    assert re.fullmatch(
        rf"protect on instead of off: final accuracy {number} points with head linear, {number} with head ncm", lines[1]
    )


def test_only_runs_with_the_same_seed_and_tests_are_set_against_each_other() -> None:
    runs = [run for _, run in study(("linear",))]
    alone = compare(runs[:2] + runs[5:])  # seeds 0 and 1 against seed 2
    assert alone["effects"] == []
    assert [e["seeds"] for e in compare(runs[:2] + runs[4:])["effects"]] == [[1]]
    (single,) = compare(runs[:2] + runs[4:])["effects"]
    assert single["metrics"]["final_accuracy"]["std"] is None
    runs[3]["tasks"][0]["test"] += 1
    assert [e["seeds"] for e in compare(runs[:3] + runs[3:4])["effects"]] == []


def test_settings_apart() -> None:
    plain = {"head.name": "linear", "head.std": 0.02, "protect": None, "train.lr": 1.0, "online": False, "pet": None}
    held = {k: v for k, v in plain.items() if k != "protect"} | {"protect.energy": 0.9, "protect.alpha": 1}
    means = {k: v for k, v in plain.items() if not k.startswith("head")} | {"head.name": "ncm", "head.metric": "cosine"}
    lora = {k: v for k, v in plain.items() if k != "pet"} | {"pet.name": "lora", "pet.rank": 8}
    assert apart(plain, plain) is None
    assert apart(plain, held) == "protect"
    assert apart(held, {**held, "protect.energy": 0.99}) == "protect.energy"
    assert apart(held, {**held, "protect.energy": 0.99, "protect.alpha": 2}) is None
    assert apart(plain, means) == "head"
    assert apart(plain, lora) == "pet"
    assert apart(plain, {**plain, "train.lr": 2.0}) == "train.lr"
    assert apart(plain, {**plain, "online": True}) == "online"
    assert apart(held, means) is None
    assert differing([plain, held, {**held, "protect.energy": 0.99}]) == ["protect", "protect.energy"]
    assert differing([plain, means]) == ["head"]


def test_several_values_are_measured_against_the_first() -> None:
    rows = []
    for rank in (2, 4, 8):
        run = checked(fake_results(3))
        run["recipe"]["pet"]["rank"] = rank
        rows.append([run])
    found = effects(rows, [_flat(row[0]["recipe"]) for row in rows])
    assert [(e["setting"], e["before"], e["after"], e["rows"]) for e in found] == [
        ("pet.rank", "2", "4", (0, 1)), ("pet.rank", "2", "8", (0, 2)),
    ]  # fmt: skip


def test_the_comparison_shows_protection_and_effects(tmp_path: Path) -> None:
    html, data, md = write_comparison(study(), tmp_path, "comparison")
    assert [p.name for p in (html, data, md)] == ["comparison.html", "comparison.json", "comparison.md"]
    page = Page(html.read_text(encoding="utf-8"))
    assert page.open == []
    assert "What each setting changes" in page.shown
    assert "protect on instead of off: final accuracy" in page.shown
    assert "moved, worst site, %" in page.shown
    assert "12.4 ± 0.0" in page.shown
    table = json.loads(data.read_text())
    assert [row["moved"]["n"] for row in table["rows"]] == [3, 3, 0, 0]
    assert "## What each setting changes" in md.read_text()
    assert "| protect | off → on | head ncm | 3 |" in md.read_text()
    runs = study()
    text = rendered(comparison.compare_table(compare([run for _, run in runs]), 80), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert text.splitlines()[1].split() == ["run", "n", "final", "average", "forgetting", "moved", "room"]
    assert "moved: old outputs at the worst site, %" in text


def test_many_changes_are_left_to_the_page() -> None:
    runs = []
    for rank in range(1, 12):
        run = fake_results(2)
        run["recipe"]["pet"]["rank"] = rank
        runs.append(run)
    lines = comparison.effects_text(compare(runs, [str(i) for i in range(11)])).plain.splitlines()
    assert len(lines) == comparison.SENTENCES + 1
    assert lines[-1].startswith("… and 2 more changes")


def test_the_demo_has_all_that_headroom_is_measured_by() -> None:
    recipes = [load_recipe(name).resolved() for name in DEMO]
    assert [recipe.name for recipe in recipes] == list(DEMO)
    assert len({(repr(r.data), repr(r.stream), r.backbone.name) for r in recipes}) == 1
    roles = [role_of(recipe.model_dump(mode="json")) for recipe in recipes]
    assert roles == ["method", "control", "frozen taps", "method", "joint"]
