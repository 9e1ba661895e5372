"""The report of TreeLoRA's tree of similar tasks, and of runs that learn texts."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import Page, briefs, fake_results, told_of
from tiny import every

from perpetune.numerics.metrics import summarise
from perpetune.report import checked, compare, comparison, palette, svg, terminal, write_comparison, write_report
from perpetune.report.blocks import Figures
from perpetune.report.sections import collect, figures, tree

GROUPS = ["blocks 0-5", "blocks 6-11"]
NAMES = ["dbpedia", "amazon", "yelp", "agnews", "yahoo", "mnli", "qqp", "rte", "sst-2", "wic", "cb", "copa", "boolq",
         "multirc", "imdb"]  # fmt: skip


def nodes(ids: list[int], depth: int = 0) -> dict[str, Any]:
    """A tree as the library describes one: halves, split by groups as deep as there are any."""
    middle = (len(ids) + 1) // 2
    children = [nodes(half, depth + 1) for half in (ids[:middle], ids[middle:])] if len(ids) > 1 else []
    group = depth if children and depth < len(GROUPS) else None
    size = round(0.35 / (depth + 1), 4) if children else 0.0
    return {"tasks": ids, "depth": depth, "group": group, "radius": size, "spread": 1.5 * size, "children": children}


def tree_facts(names: list[str], merged: list[list[str]] | None = None) -> dict[str, Any]:
    """What TreeLoRA tells after it has learned the last of `names`; `merged` are tasks of one adapter."""
    rng, count, merges = np.random.default_rng(len(names)), len(names), merged or []
    points = rng.normal(size=(count, 3)) / 8
    distances = np.linalg.norm(points[:, None] - points, axis=-1).clip(0, 1).round(4)
    earlier = names[:-1]
    alone = [[name] for name in names if not any(name in tasks for tasks in merges)]
    return {
        "kind": "similarity tree",
        "names": {str(i): name for i, name in enumerate(names)},
        "nodes": nodes(list(range(count))) if names else None,
        "groups": GROUPS,
        "distances": distances.tolist(),
        "start": earlier[-1] if earlier else None,
        "asked": "nearest",
        "helped": [
            {"group": g, "steps": {name: int(rng.integers(0, 200)) for name in earlier}} for g in GROUPS if earlier
        ],
        "adapters": [{"tasks": tasks, "bytes": 73728} for tasks in [*alone, *merges]],
        "merged": merges,
        "signature_bytes": 4096,
    }


def with_tree(results: dict[str, Any], merges: dict[int, list[list[str]]] | None = None) -> dict[str, Any]:
    """`results` of a run of TreeLoRA. `merges` says from which task on, by its index, which tasks have one adapter."""
    names, found = [task["name"] for task in results["tasks"]], merges or {}
    results["facts"] = []
    for t in range(len(results["cells"])):
        so_far = [tasks for at, pairs in found.items() if at <= t for tasks in pairs]
        facts = tree_facts(names[: t + 1], so_far)
        facts["merged"] = found.get(t, [])
        results["facts"].append({"task": t, "of": {"tree": facts}})
    return results


def named(results: dict[str, Any], names: list[str]) -> dict[str, Any]:
    for task, name in zip(results["tasks"], names, strict=True):
        task["name"] = name
    return results


def of_texts(n_tasks: int = 6, scored: tuple[int, ...] = (1, 3), **changes: Any) -> dict[str, Any]:
    """A run of a language model: the `scored` tasks are answered with free text, by ROUGE-L, the others by options."""
    results = named(fake_results(n_tasks, 2, **changes), NAMES[:n_tasks])
    results["recipe"]["head"] = {"name": "lm"}
    results["recipe"]["method"] = {"name": "treelora"}
    for j in scored:
        results["tasks"][j]["classes"] = []
        for row in results["cells"]:
            if row[j]:
                cell = {"correct": row[j]["correct"] - 0.375, "total": 90, "per_class": {}, "score": "rouge_l"}
                row[j] = {**cell, "others": {"merged": row[j]["correct"] / 3}}
    results["metrics"] = dict(summarise(results["cells"], results["tasks"]))
    for timing in results["timings"]:
        timing |= {"tokens": 1_234_567, "tokens_per_s": 9876.5}
    return results


def shown(results: dict[str, Any], folder: Path) -> tuple[str, Page, str]:
    """The page as text and as it reads, and the Markdown."""
    html, _, md = write_report(results, folder)
    text = html.read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert page.handlers == []
    assert page.tags.count("script") == 1
    assert len(set(page.ids)) == len(page.ids)
    assert not re.search(r"https?:|@import|url\(", text)
    assert "None" not in page.shown
    return text, page, md.read_text("utf-8")


def shown_section(results: Any, name: str) -> Any:
    """The blocks of one section."""
    return next(section.blocks for section in collect(results) if section.name == name)


def section(text: str) -> str:
    return text[text.index('<section id="tree"') : text.index('<section id="tasks"')]


SIZES: dict[str, Callable[[], dict[str, Any]]] = {
    "none learned": lambda: with_tree(fake_results(5, 2, rows=0)),
    "one": lambda: with_tree(fake_results(1, 2)),
    "two": lambda: with_tree(fake_results(2, 2)),
    "fifteen": lambda: with_tree(named(fake_results(15, 2), NAMES)),
    "forty": lambda: with_tree(fake_results(40, 1)),
    "merged": lambda: with_tree(
        named(fake_results(6, 2), NAMES[:6]), {3: [["amazon", "yelp"]], 5: [["yahoo", "mnli"]]}
    ),
    "texts": lambda: with_tree(of_texts()),
    "all free": lambda: with_tree(of_texts(3, (0, 1, 2))),
}


@pytest.mark.parametrize("size", SIZES)
def test_a_tree_of_any_size_is_drawn(size: str, tmp_path: Path) -> None:
    results = SIZES[size]()
    text, page, markdown = shown(results, tmp_path)
    learned = len(results["cells"])
    if not learned:
        assert "tree" not in page.ids
        assert "Similar tasks" not in markdown
        return
    drawn = section(text)
    assert "#tree" in page.links
    assert drawn.count('<svg class="chart tree"') == 1
    assert drawn.count('<svg class="chart tree small"') == learned - 1
    assert ("Who helped whom" in drawn) == ("### Who helped whom" in markdown) == (learned > 1)
    assert "### Similarity" in markdown
    assert markdown.index("## Similar tasks") < markdown.index("## Tasks")
    assert page.shown.count("started from") >= 1
    assert briefs(results)[-1].startswith(f"tree: {learned} task")


def test_the_tree_says_its_names_splits_and_radii(tmp_path: Path) -> None:
    text, _, markdown = shown(with_tree(named(fake_results(3, 2), NAMES[:3])), tmp_path)
    large = re.search(r'<svg class="chart tree".*?</svg>', text, re.S)
    assert large is not None
    assert 'aria-label="The tree after task 3 yelp: ((dbpedia, amazon), yelp)"' in large[0]
    leaves = re.findall(r'class="leaf ([^"]*)"><title>([^<]*)</title><circle [^>]*/><text [^>]*>([^<]*)<', large[0])
    assert leaves == [("", "dbpedia", "dbpedia"), ("", "amazon", "amazon"), ("newest", "yelp", "yelp")]
    assert "<title>dbpedia, amazon, yelp: split by blocks 0-5, radius 0.350, spread 0.525</title>" in large[0]
    assert ">blocks 0-5</text>" in large[0]
    assert ">radius 0.175</text>" in large[0]
    assert (
        "- dbpedia, amazon, yelp: split by blocks 0-5, radius 0.350, spread 0.525\n  - dbpedia, amazon: split by bl"
        in (markdown)
    )
    assert "| 2 amazon | (dbpedia, amazon) |" in markdown


def test_a_tree_that_is_too_large_is_counted(tmp_path: Path) -> None:
    results = with_tree(of_texts())
    facts = results["facts"][-1]["of"]["tree"]
    for key in ("names", "nodes", "distances", "adapters"):
        del facts[key]
    facts |= {"tasks": 65, "kept": {"adapters": 64, "bytes": 64_000}}
    text, _, markdown = shown(results, tmp_path)
    for written in (text, markdown):
        assert "The tree has 65 tasks, too many to show." in written
    assert "64 adapters of 64" in text


def test_merged_adapters_are_one(tmp_path: Path) -> None:
    results = SIZES["merged"]()
    grown = tree.grown(checked(results))
    assert tree.outline(grown[2].root) == "((dbpedia, amazon), yelp)"
    # of the pair amazon and yelp one is on each side; the pair yahoo and mnli is a node of its own
    assert tree.outline(grown[5].root) == (
        "(((dbpedia, amazon · shares with yelp), yelp · shares with amazon), ((agnews, yahoo · shares with mnli), "
        "mnli · shares with yahoo))"
    )
    together = {"tasks": [1, 2], "depth": 1, "group": None, "radius": 0.1, "spread": 0.2, "children": [
        {"tasks": [1], "children": []}, {"tasks": [2], "children": []}]}  # fmt: skip
    facts = tree_facts(NAMES[:3], [["amazon", "yelp"]])
    facts["nodes"] = {"tasks": [0, 1, 2], "group": 0, "children": [{"tasks": [0], "children": []}, together]}
    results = with_tree(named(fake_results(3, 2), NAMES[:3]))
    results["facts"][2]["of"]["tree"] = facts
    text, page, markdown = shown(results, tmp_path)
    assert "(dbpedia, amazon + yelp)" in page.shown
    large = re.search(r'<svg class="chart tree".*?</svg>', text, re.S)
    assert large is not None
    assert re.search(r"amazon \+ yelp: one adapter</title><rect ", large[0])
    assert "- amazon + yelp: one adapter" in markdown
    assert '<td>2</td><td>147 kB</td><td class="text">amazon + yelp</td><td>4.1 kB</td><td>160 kB<' in section(text)
    assert "| 3 yelp | amazon (nearest) | 2 | 147 kB | amazon + yelp | 4.1 kB | 160 kB |" in markdown
    # the tree may know a merged adapter by one of its tasks alone
    facts["names"], facts["nodes"] = {"0": "dbpedia", "1": "amazon"}, nodes([0, 1])
    assert tree.outline(tree.grown(results)[-1].root) == "(dbpedia, amazon + yelp)"


def test_who_helped_whom_is_a_share_of_steps() -> None:
    results = with_tree(named(fake_results(3, 2), NAMES[:3]))
    results["facts"][1]["of"]["tree"]["helped"] = [{"group": "g", "steps": {"dbpedia": 0}}]
    results["facts"][2]["of"]["tree"]["helped"] = [{"group": "g", "steps": {"amazon": 3, "dbpedia": 9}},
                                                   {"group": "h", "steps": {"amazon": 4}}]  # fmt: skip
    table = tree.helped_table(results)
    assert table is not None
    assert table.names == ["dbpedia", "amazon"], "in the order of the stream"
    assert [(row.number, row.name, row.part) for row in table.rows] == [
        ("2", "amazon", "g"), ("3", "yelp", "g"), ("3", "yelp", "h"),
    ]  # fmt: skip
    texts = [[(c.text, c.level) if c else None for c in row.cells] for row in table.rows]
    assert texts == [[None, None], [("75", 15), ("25", 5)], [None, ("100", 20)]]
    first = table.rows[1].cells[0]
    assert first is not None
    assert first.title == "yelp, g: dbpedia in 9 of 12 steps"
    assert tree.told(results) == (
        "3 tasks, yelp started from amazon (nearest), helped most by dbpedia (56 % of steps), 3 adapters of 221 kB"
    )


def test_similarity_is_one_minus_distance() -> None:
    results = with_tree(named(fake_results(3, 2), NAMES[:3]))
    results["facts"][2]["of"]["tree"]["distances"] = [[0, 0.25, 0.5], [0.25, 0, 0.75], [0.5, 0.75, 0]]
    table = tree.similarity_table(results)
    assert table is not None
    texts = [[cell and cell.text for cell in cells] for cells in (row.cells for row in table.rows)]
    assert texts == [["1.00", "0.75", "0.50"], ["0.75", "1.00", "0.25"], ["0.50", "0.25", "1.00"]]
    assert [cell and cell.level for cell in table.rows[0].cells][1:] == [20, 10]
    assert (table.scale, table.names) == (("0.25, least alike", "0.75, most alike"), NAMES[:3])
    assert table.rows[0].cells[1].title == "dbpedia and amazon: 0.750"  # type: ignore[union-attr]


def test_facts_of_heads_stay_with_the_heads(tmp_path: Path) -> None:
    results = told_of(fake_results(2, 2))
    before = shown_section(results, "heads")
    for entry in results["facts"]:
        entry["of"]["tree"] = tree_facts(["task-1", "task-2"][: entry["task"] + 1])
    assert shown_section(results, "heads") == before
    assert not any("tree" in line for line in briefs(results) if line.startswith("head"))
    _, page, _ = shown(results, tmp_path)
    assert {"heads", "tree"} <= set(page.ids)
    assert "similarity tree" not in page.shown


def test_hostile_and_long_names_stay_text(tmp_path: Path) -> None:
    hostile = ["<script>alert(1)</script>", "a\"b'c & <b>", "猫" * 60, "x" * 400, "`tick*_ | pipe"]
    results = with_tree(named(fake_results(5, 2), hostile), {4: [[hostile[0], hostile[1]]]})
    for entry in results["facts"]:
        facts = entry["of"]["tree"]
        facts["groups"] = ["<img src=x>", "blocks </svg><script>1</script> " * 9]
        facts["asked"] = "<i>"
        for told, group in zip(facts["helped"], facts["groups"], strict=False):
            told["group"] = group
    text, page, markdown = shown(results, tmp_path)
    assert not {"img", "i "} & set(page.tags)
    assert "猫" in page.shown
    assert not re.search(
        r"(?<!\\)<(script|img|b|i)\b", markdown.partition("## Similar tasks")[2].partition("## Tas")[0]
    )
    drawing = re.search(r'<svg class="chart tree" viewBox="0 0 (\d+)', text)
    assert drawing is not None
    assert int(drawing[1]) <= 1104, "long names are cut"
    assert "x" * 60 + "…" not in text
    assert "…</text>" in text


@pytest.mark.parametrize("missing", sorted({*tree_facts(["a"]), "all"} - {"kind"}))
@pytest.mark.parametrize(
    "wrong", every([None, [7], "absent", {"x": 1}, 7, [[]], "text", -1, [], True, {}, [None], 10**400], 2)
)
def test_what_is_missing_or_wrong_does_not_break_the_page(missing: str, wrong: Any, tmp_path: Path) -> None:
    results = with_tree(fake_results(2, 2))
    for entry in results["facts"]:
        facts = entry["of"]["tree"]
        for key in facts if missing == "all" else [missing]:
            facts[key] = facts[key] if key == "kind" else wrong
        if wrong == "absent":
            entry["of"]["tree"] = {k: v for k, v in facts.items() if v != "absent"}
    run = checked(results)
    for entry in tree.grown(run):
        assert entry.levels >= 0
        assert tree.outline(entry.root)
    tree.helped_table(run), tree.similarity_table(run), tree.storage_rows(run), briefs(run)
    if wrong in (None, [], "absent", 7):  # rendering each would take longer than it tells
        shown(results, tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NODES = st.recursive(
    st.fixed_dictionaries({"tasks": st.lists(st.integers(0, 4), max_size=3)}) | JSON,
    lambda inner: st.fixed_dictionaries(
        {"children": st.lists(inner, max_size=3)},
        optional={"tasks": st.lists(st.integers(-1, 5), max_size=4), "group": JSON, "radius": JSON, "spread": JSON},
    ),
    max_leaves=12,
)


@settings(max_examples=30, deadline=None)
@given(root=NODES, adapters=st.lists(st.lists(st.sampled_from("abcd"), max_size=3), max_size=3))
def test_any_nested_tree_is_drawn(root: Any, adapters: list[list[str]]) -> None:
    facts = {"kind": tree.KIND, "names": {str(i): name for i, name in enumerate("abcd")}, "nodes": root,
             "groups": GROUPS, "adapters": [{"tasks": tasks, "bytes": 10} for tasks in adapters]}  # fmt: skip
    results = {"tasks": [{"name": "a"}], "facts": [{"task": 0, "of": {"tree": facts}}]}
    (grown,) = tree.grown(json.loads(json.dumps(results)))
    assert isinstance(tree.outline(grown.root), str)
    for level, node in tree.walk(grown.root):
        assert node.tasks
        assert level <= tree.DEEPEST
        assert not (node.merged and node.children)
    if grown.root is not None:
        branch = as_branch(grown.root)
        for drawing in (svg.tree(branch, "l"), svg.small_tree(branch, "l")):
            assert drawing.count("<g") == drawing.count("</g>") == len(list(tree.walk(grown.root)))


def as_branch(node: tree.Node) -> svg.Branch:
    return svg.Branch(node.name, node.name, (node.split, "r"), children=[as_branch(child) for child in node.children])


def test_leaves_do_not_lie_on_each_other() -> None:
    for count in (1, 2, 7, 15, 31):
        drawing = svg.tree(as_branch(tree.grown(with_tree(fake_results(count, 1)))[-1].root or tree.Node([])), "l")
        height = int(re.search(r'viewBox="0 0 \d+ (\d+)"', drawing)[1])  # type: ignore[index]
        ys = sorted(
            float(y)
            for y in re.findall(r'class="leaf [^>]*><title>[^<]*</title><circle cx="[^"]*" cy="([^"]*)"', drawing)
        )
        assert len(ys) == count
        assert all(b - a >= 20 for a, b in itertools.pairwise(ys))
        assert all(10 < y < height - 10 for y in ys)


def test_a_long_name_is_cut_where_there_is_no_room() -> None:
    assert svg._cut("blocks 0-5", 10) == "blocks 0-5"
    assert svg._cut("blocks 0-11", 8) == "blocks …"
    assert svg._cut("猫猫猫", 4) == "猫…"


# -- texts ---------------------------------------------------------------------------------------------


def test_texts_are_examples_with_scores_and_tokens(tmp_path: Path) -> None:
    results = of_texts()
    text, page, markdown = shown(results, tmp_path)
    for said in (page.shown, text.partition("<body>")[2], markdown):
        assert not re.search("image|picture", said)
        assert "examples/s" in said
        assert "tokens/s" in said
        assert "9,876" in said
        assert "rouge_l for amazon, agnews" in said.replace("\\_", "_")
    assert "Score matrix" in page.shown
    assert "## Score matrix" in markdown
    assert "Final score" in page.shown
    assert "ccuracy" not in page.shown.partition("How to reproduce")[0]
    assert "ccuracy" not in markdown.partition("How to reproduce")[0]
    assert re.search(r'title="amazon after yelp: \d+\.\d\d of 90 rouge_l, ', text)
    assert '<td class="text">rouge_l</td>' in text
    assert "| 2 amazon | rouge\\_l |  | 270 |" in markdown
    line = terminal.figures_line(Figures(figures.large(results))).plain
    assert line.startswith("final score ")
    assert "accuracy" not in line
    table = write_report(results, tmp_path)[1]
    assert json.loads(table.read_bytes())["timings"][0]["tokens"] == 1_234_567


def test_a_run_of_free_texts_has_no_classes(tmp_path: Path) -> None:
    results = of_texts(3, (0, 1, 2))
    text, page, markdown = shown(results, tmp_path)
    assert "classes" not in page.ids
    assert "#classes" not in page.links
    assert "## Classes" not in markdown
    assert "classes" not in text.partition('<section id="tasks"')[2].partition('<section id="storage"')[0]
    assert "The score is rouge_l, from 0 to 100, mean over the examples." in page.shown
    assert results["metrics"]["forward_transfer"] is None


def test_a_run_of_images_reads_as_before(tmp_path: Path) -> None:
    _, page, markdown = shown(fake_results(3, 2), tmp_path)
    assert "Accuracy matrix" in page.shown
    assert "images/s" in page.shown
    assert "score" not in page.shown.lower()
    assert not re.search("tokens|score", markdown.lower())
    assert "over all tasks but the last" in page.shown


def test_texts_of_other_tasks_are_not_one_row_of_a_comparison(tmp_path: Path) -> None:
    one, other, mixed = of_texts(3, (0, 1, 2)), of_texts(3, (0, 1, 2), seed=1), of_texts(3, (0,), seed=2)
    assert [row["seeds"] for row in compare([one, other])["rows"] if row["way"] is None] == [[0, 1]]
    turned = named(copy.deepcopy(other), ["yelp", "dbpedia", "amazon"])
    found = compare([one, turned], ["a", "b"])
    assert found["notes"] == ["b has the tasks of a in another order"]
    apart = compare([one, named(copy.deepcopy(other), ["x", "y", "z"])], ["a", "b"])
    assert apart["notes"] == ["b has other tasks than a: 3 tasks against 3 tasks"]
    assert sum(row["way"] is None for row in apart["rows"]) == 2
    assert (
        "b has other classes than a: 4 classes in 3 tasks against 3 tasks" in compare([one, mixed], ["a", "b"])["notes"]
    )
    ways = [row for row in found["rows"] if row["way"] == "merged"]
    assert ways
    assert found["measure"] == "score"
    html, _, md = write_comparison([("a", one), ("b", turned)], tmp_path)
    page = Page(html.read_text("utf-8"))
    assert "final score, %" in page.shown
    assert "ccuracy" not in page.shown
    assert "Final score" in md.read_text("utf-8")
    assert all(
        line.startswith("answer") and "final score" in line
        for line in comparison.effects_text(found).plain.splitlines()
    )


# -- colours -------------------------------------------------------------------------------------------


def oklab(colour: str) -> np.ndarray:
    """Björn Ottosson's colour space, in which equal distances look about equal."""
    channels = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    cones = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                      [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
    axes = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                     [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip
    return np.asarray(axes @ np.cbrt(cones @ linear))


@pytest.mark.parametrize(("lines", "card"), [(palette.LIGHT_LINES, "#ffffff"), (palette.DARK_LINES, "#151a22")])
def test_lines_can_be_told_apart(lines: tuple[str, ...], card: str) -> None:
    for one, other in itertools.combinations(lines, 2):
        assert np.linalg.norm(oklab(one) - oklab(other)) >= 0.19, (one, other)
    assert min(palette.contrast(colour, card) for colour in lines) >= 3
