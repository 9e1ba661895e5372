"""Scores of generated text: how good one answer is, from 0 to 1. A task's score is the mean over its test examples.

A score is a function `(prediction, reference, prompt)`. `prediction` is the text that the model wrote, `reference` is
the right answer (or several right answers), and `prompt` is the question, which only `sari` reads. These rules hold for
all strings:

* Space at both ends does not count. Equal texts score 1. If only one of prediction and right answer is empty, the score
  is 0.
* With several right answers the best of the scores counts, as in SQuAD; `sari` compares with all of them at once.
* Words are separated by spaces. Chinese and Japanese are written without spaces, so each Han character and each kana
  counts as a word in `f1`, `rouge_l` and `sari`. (Thai, Lao, Khmer and Burmese are not divided into words.)
* If a score ignores punctuation and a text has nothing else, the punctuation itself is compared.

Benchmarks and their scores: the O-LoRA benchmark uses `exact_match`. TRACE uses `accuracy` (C-STANCE, FOMC, NumGLUE),
`first_character` (ScienceQA), `rouge_l` (MeetingBank), `code_similarity` (Py150) and `sari` (20Minuten). TRACE gives
the last two as percentages; here they are shares. CoIN uses `first_character`, `vqa`, `contains`, `box` and
`exact_match`; in these new ones an empty answer is never right, whatever the right one is.

`rouge_l` and `code_similarity` need rapidfuzz, which the extra `lm` installs (MIT, no dependencies). The packages made
for ROUGE are not used: `rouge-score` had its last release in 2022, needs nltk and deletes every letter except a–z;
`rouge`, which TRACE uses, is older and fails on texts without words.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from perpetune.errors import MissingExtra, UsageError, closest

Reference = str | Sequence[str]  # the right answer, or several
Score = Callable[[str, Reference, str], float]

ARTICLES = frozenset({"a", "an", "the"})
LONGEST = 4  # words in the longest n-grams of SARI
_UNSPACED = re.compile("([\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")
NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_BOX = re.compile(r"\s*,\s*".join([r"(-?\d+(?:\.\d+)?|-?\.\d+)"] * 4))
_TOKEN = re.compile(r"\d+(?:[.,]\d+)+|\w+(?:['’-]\w+)*|[^\w\s]")
_BARE_LITERAL = re.compile("<(NUM|STR|CHAR)_LIT>")
_LITERAL = re.compile("<(?:NUM|STR|CHAR)_LIT:([^>]*)>")


def exact_match(prediction: str, reference: Reference, prompt: str = "") -> float:
    """1 if both texts are equal without case, punctuation and extra white space, else 0.

    This is O-LoRA's rule, and SQuAD's without the removal of articles: lower case, punctuation deleted (so `Sci/Tech`
    becomes `scitech`), several spaces become one. There only ASCII punctuation is deleted, here also Unicode's.
    """
    return _best(prediction, reference, lambda predicted, right: float(_normalised(predicted) == _normalised(right)))


def accuracy(prediction: str, reference: Reference, prompt: str = "") -> float:
    """1 if both texts are equal except for space at the ends, else 0 (TRACE: C-STANCE, FOMC, NumGLUE)."""
    return _best(prediction, reference, lambda predicted, right: 0.0)


def first_character(prediction: str, reference: Reference, prompt: str = "") -> float:
    """1 if both texts begin with the same character, else 0: `B` and `B\\nBecause …` (TRACE: ScienceQA)."""
    return _best(prediction, reference, lambda predicted, right: float(predicted[0] == right[0]))


def prefix(prediction: str, reference: Reference, prompt: str = "") -> float:
    """1 if the prediction begins with the reference, else 0.

    TreeLoRA's released code uses this score for the tasks for which TRACE uses `accuracy`. It is less strict: an answer
    with more text after the right word counts as right, and the option `10` counts as the option `1`.
    """
    return _best(prediction, reference, lambda predicted, right: float(predicted.startswith(right)))


def f1(prediction: str, reference: Reference, prompt: str = "") -> float:
    """The F1 of the words that both texts share, with repetitions (SQuAD, Rajpurkar et al. 2016).

    Words are those of `exact_match` without English articles; a text that has only articles keeps them.
    """

    def of(predicted: str, right: str) -> float:
        ours, theirs = _squad_words(predicted), _squad_words(right)
        common = (Counter(ours) & Counter(theirs)).total()
        return 2 * common / (len(ours) + len(theirs))

    return _best(prediction, reference, of)


def rouge_l(prediction: str, reference: Reference, prompt: str = "") -> float:
    """ROUGE-L as F1: `2 LCS / (m + n)`, with the longest common subsequence of the words of both texts (Lin 2004).

    The text counts as one sentence. Words are in lower case, not stemmed, and end at every character that is not a
    letter, digit or accent, as in Google's `rouge-score` (which does this for English alone). TRACE's figures are from
    the package `rouge`, in which case counts and sentences are matched one by one.

    Raises:
        MissingExtra: rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import LCSseq
    except ImportError:
        raise MissingExtra("score: rouge_l", "lm") from None

    def of(predicted: str, right: str) -> float:
        numbers: dict[str, int] = {}  # words become small numbers, so that no two of them have the same hash
        ours, theirs = ([numbers.setdefault(w, len(numbers)) for w in _words(text)] for text in (predicted, right))
        return 2 * LCSseq.similarity(ours, theirs) / (len(ours) + len(theirs))

    return _best(prediction, reference, of)


def code_similarity(prediction: str, reference: Reference, prompt: str = "") -> float:
    """The share of characters that need no insertion or deletion to change one text into the other (TRACE: Py150).

    It is `1 - distance / (m + n)`, or `fuzzywuzzy.ratio` / 100 without its rounding to whole per cents. First the
    placeholders for literals in CodeXGLUE's Py150 are replaced, as TRACE does: `<NUM_LIT>` by 0, `<STR_LIT>` and
    `<CHAR_LIT>` by nothing, and those with a value, such as `<STR_LIT:utf-8>`, by that value.

    Raises:
        MissingExtra: rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import Indel
    except ImportError:
        raise MissingExtra("score: code_similarity", "lm") from None
    return _best(
        prediction,
        reference,
        lambda predicted, right: Indel.normalized_similarity(_filled_in(predicted), _filled_in(right)),
    )


def sari(prediction: str, reference: Reference, prompt: str, *, undefined: float = 1.0) -> float:
    """SARI (Xu et al. 2016, TACL 4): how well a simplified text keeps, adds and deletes words of the original text.

    For n = 1 … 4 the n-grams of prediction `O`, references `R` and source `I` give an F1 of keeping, an F1 of adding
    and a precision of deleting; SARI is the mean of these twelve. As in the authors' code, all distinct n-grams have
    the same weight, and the F1 is computed for each n. An n-gram counts as deleted if I has it more often than O. The
    deletion is right as far as R has it less often than I: `min(I - O, I - R) / (I - O)`, the paper's equation. (The
    authors' code takes `I - O - R`, so a perfect answer gets less than 1 if the source repeats one of its words.)

    TRACE's figures are from Hugging Face's `sari`. It splits words by other rules, weights the recall of keeping by
    counts, and computes deletion as the authors' code.

    Args:
        prompt: the text to be simplified; TRACE takes the whole prompt with its instruction.
        undefined: the value of 0 / 0, if there is nothing to keep, add or delete. In the authors' code it is 0, and
            then even the right answer scores less than 1; Hugging Face's version has corrected this.
    """
    references = _several(reference)
    if not prediction.strip() or not any(right.strip() for right in references):
        return _best(prediction, references, lambda predicted, right: 0.0)
    source, predicted = _tokens(prompt), _tokens(prediction)
    rights = [_tokens(right) for right in references]
    total = 0.0
    for n in range(1, LONGEST + 1):
        total += _sari_of(_grams([source], n), _grams([predicted], n), _grams(rights, n), len(rights), undefined)
    return total / (3 * LONGEST)


def contains(prediction: str, reference: Reference, prompt: str = "") -> float:
    """1 if the words of the right answer stand together in the prediction, else 0; an empty answer is never right.

    Words are those of `exact_match`. (CoIN's released score for ImageNet also takes an answer that is a part of the
    right one, so the empty answer is right there.)
    """

    def of(predicted: str, right: str) -> float:
        ours, theirs = (_normalised(text).split() for text in (predicted, right))
        return float(any(ours[i : i + len(theirs)] == theirs for i in range(len(ours) - len(theirs) + 1)))

    return _best(prediction, reference, of) if prediction.strip() else 0.0


def vqa(prediction: str, reference: Reference, prompt: str = "") -> float:
    """The share of agreement with what several people answered (VQA, Antol et al. 2015): `min(n / 3, 1)`, where `n` of
    them gave the predicted answer. With fewer than three answers, all of them have to agree.

    Case, punctuation, articles and words for numbers up to ten do not count. An empty answer is never right. (The
    authors' code takes the mean over all choices of nine of the ten people, which differs where two or three agree.)
    """
    ours = _vqa_answer(prediction)
    rights = [_vqa_answer(right) for right in _several(reference)]
    return min(rights.count(ours) / min(3, len(rights)), 1.0) if ours and rights else 0.0


def box(prediction: str, reference: Reference, prompt: str = "") -> float:
    """1 if the box `[x1, y1, x2, y2]` in the prediction overlaps the right one by more than half of their union, else
    0. The first four numbers with commas between them count. A box that cannot be read, or has no area, is wrong."""
    ours = _box_in(prediction)
    return max((float(_overlap(ours, _box_in(right)) > 0.5) for right in _several(reference)), default=0.0)


def yes_no(prediction: str, reference: Reference, prompt: str = "") -> float:
    """1 if both texts say yes or both say no, else 0; see `said`. What says neither is wrong."""
    ours = said(prediction)
    return max((float(ours is not None and ours == said(right)) for right in _several(reference)), default=0.0)


def said(text: str) -> bool | None:
    """Whether a text says yes: the first of the words yes, no and not decides; None if it has none of them."""
    found = next((word for word in _words(text) if word in ("yes", "no", "not")), None)
    return None if found is None else found == "yes"


def yes_no_figures(answers: Sequence[bool | None], rights: Sequence[bool]) -> dict[str, float]:
    """The figures of yes-or-no questions, as for hallucination (POPE, Li et al. 2023): each from 0 to 1.

    `accuracy`, `precision`, `recall` and `f1` of yes, and `yes`, the share of questions that are answered with yes. A
    share of nothing is 0.

    Args:
        answers: for each question whether the answer was yes; None for neither, which is wrong.
        rights: the right answers.
    """
    pairs = list(zip(answers, rights, strict=True))
    found = sum(answer is True and right for answer, right in pairs)
    yes, there = sum(answer is True for answer, _ in pairs), sum(rights)
    precision, recall = _share(found, yes), _share(found, there)
    return {
        "accuracy": _share(sum(answer is not None and answer == right for answer, right in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _harmonic(precision, recall),
        "yes": _share(yes, len(pairs)),
    }


SCORES: dict[str, Score] = {
    "exact_match": exact_match,
    "accuracy": accuracy,
    "first_character": first_character,
    "prefix": prefix,
    "f1": f1,
    "rouge_l": rouge_l,
    "sari": sari,
    "code_similarity": code_similarity,
    "contains": contains,
    "vqa": vqa,
    "box": box,
    "yes_no": yes_no,
}


def score_of(name: str) -> Score:
    """The score with that name, ready for use.

    Raises:
        UsageError: there is no such score.
        MissingExtra: the score needs a package that is not installed.
    """
    if name not in SCORES:
        raise UsageError(f"there is no score {name!r}; {closest(name, SCORES)}")
    score = SCORES[name]
    score("", "", "")  # a missing package raises its error here and not after a task was learned
    return score


def _best(prediction: str, reference: Reference, of: Callable[[str, str], float]) -> float:
    """The best score over the references. `of` is called with two texts without space at the ends, which are neither
    empty nor equal."""
    predicted = prediction.strip()
    rights = (right.strip() for right in _several(reference))
    scores = (1.0 if predicted == right else of(predicted, right) if predicted and right else 0.0 for right in rights)
    return max(scores, default=0.0)


def _several(reference: Reference) -> Sequence[str]:
    return [reference] if isinstance(reference, str) else reference


def _normalised(text: str) -> str:
    """The text in lower case, without punctuation, with one space between words. A text of punctuation alone keeps
    it."""
    text = " ".join(text.lower().split())
    return " ".join("".join(c for c in text if not _is_punctuation(c)).split()) or text


def _is_punctuation(c: str) -> bool:
    return c in string.punctuation or unicodedata.category(c)[0] == "P"


def _vqa_answer(text: str) -> tuple[str, ...]:
    return tuple(NUMBERS.get(word, word) for word in _squad_words(text))


def _box_in(text: str) -> tuple[float, ...] | None:
    """The box in a text; None if there is none, or it has no area."""
    found = _BOX.search(text)
    if found is None:
        return None
    left, top, right, bottom = map(float, found.groups())
    return (left, top, right, bottom) if left < right and top < bottom else None


def _overlap(one: tuple[float, ...] | None, other: tuple[float, ...] | None) -> float:
    """The share of two boxes' union that is in both; 0 if one of them is not known."""
    if one is None or other is None:
        return 0.0
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)


def _share(count: int, of: int) -> float:
    return count / of if of else 0.0


def _squad_words(text: str) -> list[str]:
    words = _UNSPACED.sub(r" \1 ", _normalised(text)).split()
    return [word for word in words if word not in ARTICLES] or words


def _words(text: str) -> list[str]:
    """Runs of letters, marks and digits in lower case; if there are none, the single characters."""
    text = text.lower()
    apart = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in _UNSPACED.sub(r" \1 ", text))
    return apart.split() or list("".join(text.split()))


def _tokens(text: str) -> list[str]:
    """Words in lower case, numbers (`1,000.5`), and each punctuation mark."""
    return _TOKEN.findall(_UNSPACED.sub(r" \1 ", text.lower()))


def _filled_in(code: str) -> str:
    bare = _BARE_LITERAL.sub(lambda match: "0" if match[1] == "NUM" else "", code)
    return _LITERAL.sub(r"\1", bare)


def _grams(texts: Sequence[Sequence[str]], n: int) -> Counter[tuple[str, ...]]:
    """The number of times that each sequence of n words occurs, over all texts."""
    return Counter(gram for words in texts for gram in zip(*(words[i:] for i in range(n)), strict=False))


def _sari_of(
    source: Counter[tuple[str, ...]],
    predicted: Counter[tuple[str, ...]],
    right: Counter[tuple[str, ...]],
    references: int,
    undefined: float,
) -> float:
    """The sum of the three parts of SARI for n-grams of one length; `right` counts those of all references together."""
    # The counts of source and prediction are multiplied by the number of references, which avoids fractions.
    source, predicted = (Counter({gram: k * references for gram, k in grams.items()}) for grams in (source, predicted))
    kept, to_keep = source & predicted, source & right
    rightly = kept & right
    keep = _harmonic(
        _mean((rightly[gram] / kept[gram] for gram in kept), undefined),
        _mean((rightly[gram] / to_keep[gram] for gram in to_keep), undefined),
    )
    deleted, to_delete = source - predicted, source - right
    delete = _mean((min(deleted[gram], to_delete[gram]) / deleted[gram] for gram in deleted), undefined)
    added, to_add = predicted.keys() - source.keys(), right.keys() - source.keys()
    add = _harmonic(
        _mean((float(gram in to_add) for gram in added), undefined),
        _mean((float(gram in added) for gram in to_add), undefined),
    )
    return keep + delete + add


def _mean(shares: Iterable[float], undefined: float) -> float:
    values = list(shares)
    return sum(values) / len(values) if values else undefined


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
