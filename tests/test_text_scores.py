"""Scores of generated text: what each counts as right, the papers' own figures, and that no text breaks one."""

from __future__ import annotations

import builtins
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_report import fake_results, rendered

from perpetune.cli import use
from perpetune.errors import MissingExtra, StateError, UsageError
from perpetune.numerics import text_scores
from perpetune.numerics.metrics import summarise
from perpetune.numerics.text_scores import (
    SCORES,
    accuracy,
    code_similarity,
    exact_match,
    f1,
    first_character,
    prefix,
    rouge_l,
    sari,
    score_of,
)
from perpetune.report import checked, terminal, write_report
from perpetune.report.sections import matrix

WORDS = ("contains", "vqa", "box", "yes_no")
"""Scores by which a text need not be right because it is the right answer: it may be empty, or say nothing."""
NAMES = [name for name in SCORES if name not in WORDS]
# Text that scores cut differently, among any other: repeated words, articles, marks, literals, scripts without spaces.
PIECES = ["the", "a", "The cat", "cat", " ", "\n", ".", "!?", "«", "3.5", "don't", "<STR_LIT:x>", "<NUM_LIT>",
          "<STR_LIT:", "我们", "支持", "カナ", "é", "e\u0301", "ﬁ", "İ", "हिन्दी", "ไทย", "\x00", "\u200b", "_",
          "🙂"]  # fmt: skip
texts = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join),
    st.text(max_size=40),
    st.text(st.characters(codec=None), max_size=20),  # lone surrogates too
)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("Sports", "sports", 1),
        ("  very   negative.\n", "Very negative", 1),
        ("Sci/Tech", "scitech", 1),  # punctuation is deleted, not made a space
        ("sci tech", "sci/tech", 0),
        ("“yes”…", "yes", 1),  # not ASCII's punctuation alone
        ("the world", "world", 0),  # articles stay
        ("World news", "World", 0),
        ("!", "?", 0),
        (" ! ", "!", 1),
        ("支持。", "支持", 1),
    ],
)
def test_exact_match(prediction: str, reference: str, score: float) -> None:
    assert exact_match(prediction, reference) == score


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        # exact_match, accuracy, first_character, prefix
        ("A", "A", (1, 1, 1, 1)),
        ("A\n", " A", (1, 1, 1, 1)),
        ("a", "A", (1, 0, 0, 0)),
        ("A.", "A", (1, 0, 1, 1)),
        ("A\nBecause it is warm", "A\nBecause it rains", (0, 0, 1, 0)),
        ("A because it is warm", "A", (0, 0, 1, 1)),
        ("10", "1", (0, 0, 1, 1)),  # why `prefix` is more lenient than `accuracy`
        ("1", "10", (0, 0, 1, 0)),
        ("B", "A", (0, 0, 0, 0)),
    ],
)
def test_what_counts_as_the_same_answer(prediction: str, reference: str, right: tuple[int, ...]) -> None:
    assert tuple(score(prediction, reference) for score in (exact_match, accuracy, first_character, prefix)) == right


def test_f1_counts_common_words_as_often_as_in_both() -> None:
    assert f1("The cat sat", "a cat sat down") == pytest.approx(2 * 2 / (2 + 3))  # articles are left out
    assert f1("cat cat cat", "cat") == pytest.approx(2 * 1 / (3 + 1))
    assert f1("Dog!", "dog") == 1
    assert f1("dog", "cat") == 0
    assert f1("a", "the") == 0  # of articles alone they are kept: option A is not `the`
    assert f1("A.", "a") == 1


def test_rouge_l_is_by_the_longest_common_subsequence() -> None:
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(3 / 4)  # Lin 2004, 3.1
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(2 / 4)
    assert rouge_l("Größe ändern", "größe") == pytest.approx(2 / 3)  # letters beyond a–z are letters
    assert rouge_l("one two", "three") == 0
    assert rouge_l("!!!", "!?") == pytest.approx(2 * 1 / (3 + 2))  # no word: characters


def test_chinese_is_compared_by_characters() -> None:
    assert f1("我们支持它", "我们反对它") == rouge_l("我们支持它", "我们反对它") == pytest.approx(3 / 5)
    assert f1("支持,反对", "反对。支持") == 1
    assert rouge_l("支持 Peking", "支持peking") == 1
    assert 0 < sari("我们支持", "我们支持它", "我们都支持它") < 1


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            rows[i + 1][j + 1] = rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
    return rows[-1][-1]


few = st.lists(st.sampled_from("abcd"), min_size=1, max_size=9)


@given(few, few)
def test_rouge_l_and_code_similarity_against_brute_force(a: list[str], b: list[str]) -> None:
    share = 2 * longest_common(a, b) / (len(a) + len(b))
    assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(share)
    assert code_similarity("".join(a), "".join(b)) == pytest.approx(share)


def test_rouge_l_and_f1_against_torchmetrics() -> None:
    text = pytest.importorskip("torchmetrics.functional.text", reason="torchmetrics comes with lightning")
    words = "The cat sat on a mat. And then, it's gone! U.S. 3.5 in-door the a".split()
    draw = random.Random(0)
    for _ in range(50):
        a, b = (" ".join(draw.choices(words, k=draw.randint(3, 9))) for _ in range(2))
        assert rouge_l(a, b) == pytest.approx(float(text.rouge_score(a, b, rouge_keys="rougeL")["rougeL_fmeasure"]))
        squad = text.squad(
            [{"prediction_text": a, "id": "0"}], [{"answers": {"answer_start": [0], "text": [b]}, "id": "0"}]
        )
        assert f1(a, b) == pytest.approx(float(squad["f1"]) / 100)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("x = <NUM_LIT>", "x = 0", 1),
        ("open(<STR_LIT:a.txt>, <STR_LIT>)", "open(a.txt, )", 1),
        ("<CHAR_LIT><NUM_LIT:12>", "12", 1),
        ("<STR_LIT:two\nlines>", "two\nlines", 1),
        ("<STR_LIT:<NUM_LIT>>", "0", 1),  # inner ones first, as TRACE
        ("<STR_LIT>", "<CHAR_LIT>", 1),  # both are nothing
        ("<STR_LIT>", "", 0),
        ("this is a test", "this is a test!", 0.9655171966552734),  # rapidfuzz's documentation
        ("return a", "import b", pytest.approx(2 * 3 / 16)),  # "rt "
        ("<BOOL_LIT>", "<BOOL_LIT>", 1),
    ],
)
def test_code_similarity(prediction: str, reference: str, score: float) -> None:
    assert code_similarity(prediction, reference) == pytest.approx(score, abs=1e-6)


SOURCE = "About 95 species are currently accepted ."
REFERENCES = [
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
]


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("About 95 you now get in .", 0.2682782411698074),
        ("About 95 species are now agreed .", 0.5889995423074248),
        ("About 95 species are currently agreed .", 0.5071608864657479),
    ],
)
def test_sari_of_the_authors_example(prediction: str, score: float) -> None:
    """The figures of github.com/cocoxu/simplification."""
    assert sari(prediction, REFERENCES, SOURCE, undefined=0.0) == pytest.approx(score, abs=1e-12)


def test_sari_by_hand() -> None:
    # One word each, so n = 2, 3, 4 have nothing to keep, add or delete: each is 3 × `undefined`.
    assert sari("b", "b", "a") == 1
    assert sari("b", "b", "a", undefined=0.0) == pytest.approx((0 + 1 + 1) / 12)  # nothing to keep
    assert sari("c", "b", "a") == pytest.approx((1 + 1 + 0 + 9) / 12)  # rightly deleted, wrongly added
    assert sari("a", "b", "a") == pytest.approx((0 + 1 + 0 + 9) / 12)  # wrongly kept, nothing deleted or added
    # `x` stands three times in the source, once in prediction and reference: deleting two is right.
    assert sari("x", "x", "x x x") == 1
    # Three `x` deleted where the reference deletes two, and `z` as it does; its bigrams `x x` and `x z` are gone too.
    kept = (0, 1, 1, 1)
    deleted = ((2 / 3 + 1) / 2, 1, 1, 1)
    added = (0, 1, 1, 1)  # `y` was not asked for
    assert sari("y", "x", "x x x z") == pytest.approx((sum(kept) + sum(deleted) + sum(added)) / 12)


def test_sari_of_an_empty_answer_is_no_deletion() -> None:
    assert sari("", "simple", "a hard sentence") == sari(" ", ["simple"], "a hard sentence") == 0
    assert sari("simple", "", "a hard sentence") == 0
    assert sari(" ", "", "a hard sentence") == 1


@pytest.mark.parametrize("name", NAMES)
def test_empty_texts_and_several_references(name: str) -> None:
    score = SCORES[name]
    assert score("", "right", "?") == score(" \n", "right", "?") == 0
    assert score("left", "", "?") == score("left", [], "?") == 0
    assert score("", "", "?") == score(" ", "\n", "?") == 1
    if name != "sari":
        assert score("yes", ["no", "yes"], "?") == score("yes", ["yes"], "?") == 1
        assert score("yes", ["no", "so"], "?") == max(score("yes", "no", "?"), score("yes", "so", "?"))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@example(prediction="\x1f", reference="\u0301", prompt="")
@given(prediction=texts, reference=texts, prompt=texts)
def test_every_score_is_a_share_for_any_text(name: str, prediction: str, reference: str, prompt: str) -> None:
    score = SCORES[name]
    assert 0 <= score(prediction, reference, prompt) <= 1
    assert 0 <= score(prediction, [reference, prompt], prediction) <= 1
    assert score(prediction, prediction, prompt) == pytest.approx(1, abs=1e-12)
    assert score(f" {prediction}\n", reference, prompt) == score(prediction, reference, prompt)
    assert isinstance(score(prediction, reference, prompt), float)


@given(texts, texts)
def test_lenient_scores_are_never_below_strict_ones(prediction: str, reference: str) -> None:
    strict = accuracy(prediction, reference)
    for name in NAMES:
        assert SCORES[name](prediction, reference, "?") >= strict - 1e-12
    assert f1(prediction, reference) >= exact_match(prediction, reference)


@pytest.mark.parametrize("name", NAMES)
def test_a_long_text_is_scored_too(name: str) -> None:
    """Long enough that a table of all pairs of words or characters would take gigabytes."""
    draw = random.Random(1)
    a, b = (" ".join(draw.choices(["ab", "cd", "ef", "g."], k=30_000)) for _ in range(2))
    assert 0 <= SCORES[name](a, b, a) <= 1


def test_a_score_by_name() -> None:
    assert score_of("rouge_l") is rouge_l
    with pytest.raises(UsageError, match=r"there is no score 'rougeL'; closest: rouge_l, "):
        score_of("rougeL")


@pytest.mark.parametrize("name", ["rouge_l", "code_similarity"])
def test_a_missing_package_is_said_before_anything_is_scored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(module: str, *args: Any) -> Any:
        if module.startswith("rapidfuzz"):
            raise ModuleNotFoundError(module)
        return real(module, *args)

    for module in [m for m in sys.modules if m.startswith("rapidfuzz")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=rf"score: {name} .*pip install 'perpetune\[lm\]'"):
        score_of(name)
    assert score_of("sari")("a", "a", "b") == 1  # the others need nothing


def scored(results: dict[str, Any], score: str = "rouge_l") -> dict[str, Any]:
    """`results` of tasks whose answers are not right or wrong: sums of scores, written as floats add up."""
    for row in results["cells"]:
        for cell in row:
            if cell:
                cell["score"], cell["others"] = score, {"slow": cell["correct"] + 0.1 + 0.2}
                cell["correct"] += 0.1 + 0.2
                cell["per_class"] = {name: [right + 0.1 + 0.2, n] for name, (right, n) in cell["per_class"].items()}
    results["metrics"] = dict(summarise(results["cells"], results["tasks"]))
    return results


def test_sums_of_scores_are_shown_with_two_decimals(tmp_path: Path) -> None:
    plain, results = fake_results(3, 2), scored(fake_results(3, 2))
    name, correct = results["tasks"][0]["classes"][0], plain["cells"][0][0]["correct"]
    assert matrix.heat(checked(plain)).rows[0].cells[0].title.endswith(f"{correct} of 90 right")  # type: ignore[union-attr]
    cell = matrix.heat(checked(results)).rows[0].cells[0]
    assert cell is not None
    assert cell.title == f"task-1 after task-1: {correct}.30 of 90 rouge_l"
    right = plain["cells"][-1][0]["per_class"][name][0]
    write_report(results, tmp_path)
    text = {kind: (tmp_path / f"report.{kind}").read_text("utf-8") for kind in ("html", "md", "json")}
    assert f"| {name} | 1 | {right}.30 | 45 |" in text["md"]
    assert f">{right}.30</td>" in text["html"]
    assert json.loads(text["json"])["cells"] == results["cells"]
    for shown in (
        text["md"],
        re.sub(r'data-v="[^"]*"', "", text["html"]),
        rendered(terminal.heat_table(matrix.heat(checked(results))), 100),
    ):
        assert not re.search(r"\d\.\d{6}", shown.partition("How to reproduce")[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correct": 3.5}, r"cells\.0\.0\.correct: 3\.5 right answers are no integer, and no score is named"),
        ({"others": {"slow": 0.5}}, r"cells\.0\.0\.others\.slow: 0\.5 right"),
        ({"per_class": {"x": [0.5, 1]}}, r"cells\.0\.0\.per_class\.x: 0\.5 right"),
        ({"score": 3}, r"cells\.0\.0\.score: Input should be a valid string"),
    ],
)
def test_part_of_a_right_answer_needs_a_score(changes: dict[str, Any], message: str) -> None:
    results = fake_results(2, 2)
    cell = results["cells"][0][0]
    cell.update(changes)
    with pytest.raises(StateError, match=message):
        checked(results)
    cell["score"] = "f1"
    checked(results)


def test_evaluate_prints_what_was_scored(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def cell(correct: float, total: int, **score: str) -> dict[str, Any]:
        return {"correct": correct, "total": total, "per_class": {}, **score}

    def printed(**cells: dict[str, Any] | None) -> list[str]:
        learner = SimpleNamespace(evaluate=lambda data, options: cells)
        monkeypatch.setattr("perpetune.trained.Trained.load", lambda state, device=None, progress=None: learner)
        use.evaluate(Path("state"), data=None, device=None, json=False)
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    rouge, exact = cell(37.41999999, 100, score="rouge_l"), cell(1500, 2000, score="exact_match")
    assert printed(a=rouge, b=exact, c=cell(3, 4), d=None) == [
        "a 0.3742 37.42/100 rouge_l",
        "b 0.7500 1,500/2,000 exact_match",
        "c 0.7500 3/4",
        "d no test data",
        "all 0.7321 1,540.42/2,104",  # of several scores: named by none
    ]
    assert printed(a=exact, b=exact)[-1] == "all 0.7500 3,000/4,000 exact_match"


def test_contains_takes_no_part_of_the_right_answer() -> None:
    """CoIN's released score for ImageNet (E10) says `text in label or label in text`: the empty answer is right."""
    said = ("", " ", "tabby", "a tabby cat.", "Tabby Cat", "the tabby cats", "cat tabby")
    assert [text_scores.contains(text, "tabby cat") for text in said] == [0, 0, 0, 1, 1, 0, 0]
    assert text_scores.contains("", "") == 0


def test_vqa_counts_people() -> None:
    people = ["two"] * 2 + ["a dog"] * 4 + ["cat", "Cat!", "the cat", "none"]
    said = ("2", "dog", "cat", "none", "bird", "", ".")
    assert [text_scores.vqa(text, people) for text in said] == [2 / 3, 1, 1, 1 / 3, 0, 0, 0]
    assert [text_scores.vqa(text, "a cat") for text in ("cat", "dog", "")] == [1, 0, 0]
    assert text_scores.vqa("", [""] * 10) == 0
    assert text_scores.vqa("x", []) == 0


def test_a_box_that_cannot_be_read_is_wrong_and_counted() -> None:
    """The released score for Grounding (E12) leaves such an answer out of the denominator."""
    right = "[0.1, 0.1, 0.5, 0.5]"
    said = (right, "It is at [.1,.1,.5,.48].", "[0.1, 0.1, 0.3, 0.5]", "[0.1, 0.1, 0.31, 0.5]", "", "here", "[1, 2, 3]")
    assert [text_scores.box(text, right) for text in said] == [1, 1, 0, 1, 0, 0, 0]
    assert [text_scores.box(text, text) for text in ("", "here", "[0.5, 0.1, 0.1, 0.5]")] == [0, 0, 0]


def test_yes_and_no_are_words() -> None:
    """POPE's released score (E11) takes all without a word No, not or no for yes: the empty answer, `none`, `nope`."""
    said = ("Yes", "yes, there is", "No.", "There is no cat", "it is not there", "", "none", "nope", "a cat", "I know")
    found = [text_scores.said(text) for text in said]
    assert found == [True, True, False, False, False, None, None, None, None, None]
    assert [text_scores.yes_no(text, "Yes") for text in said] == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert [text_scores.yes_no(text, "no") for text in said] == [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]


def test_figures_of_yes_and_no() -> None:
    """Precision and recall of yes; a share of nothing is 0, where the released code (E11) divides by zero."""
    figures = text_scores.yes_no_figures([True, True, False, None, True], [True, False, False, True, True])
    assert figures == pytest.approx({"accuracy": 0.6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes": 0.6})
    nothing = dict.fromkeys(("accuracy", "precision", "recall", "f1", "yes"), 0.0)
    assert text_scores.yes_no_figures([], []) == nothing
    assert text_scores.yes_no_figures([False], [False]) == {**nothing, "accuracy": 1.0}
    assert text_scores.yes_no_figures([None], [False]) == nothing


@pytest.mark.parametrize("name", WORDS)
@settings(max_examples=60, deadline=None)
@given(prediction=texts, reference=texts)
def test_scores_of_what_is_said_are_shares_for_any_text(name: str, prediction: str, reference: str) -> None:
    score = SCORES[name]
    found = score(prediction, reference, "?")
    assert isinstance(found, float)
    assert 0 <= found <= 1
    assert 0 <= score(prediction, [reference, prediction], "?") <= 1
    assert score(f" {prediction}\n", reference, "?") == found


WITHOUT_CASE = {"exact_match", "f1", "rouge_l", "sari", "contains", "vqa", "box", "yes_no"}


@pytest.mark.parametrize("name", SCORES)
def test_what_every_score_says_of_nothing_of_case_and_of_space(name: str) -> None:
    """V16: nothing is wrong, space at the ends does not count, and case does not where the score says so."""
    score, right = score_of(name), {"box": "[0, 0, 1, 1]", "yes_no": "yes"}.get(name, "tabby cat")
    asked = "Is it a big tabby cat?"
    for references in (right, [right], [right] * 10):
        said = [score(text, references, asked) for text in ("", " \n\t", right, f"  {right}\n", right.upper())]
        assert said[:4] == pytest.approx([0, 0, 1, 1])
        assert (said[4] == pytest.approx(1)) == (name in WITHOUT_CASE)


@pytest.mark.parametrize("name", WORDS)
def test_an_empty_answer_is_never_right(name: str) -> None:
    score = text_scores.score_of(name)
    assert [score(text, right, "") for text in ("", " \n", ".") for right in ("", "yes", "[0, 0, 1, 1]")] == [0.0] * 9
