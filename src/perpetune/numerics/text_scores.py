"""Scores of generated text: how good one answer is, from 0 to 1. A task's score is the mean over its test examples.

A score is a function `(prediction, reference, prompt)`: what the model wrote, the right answer (or several right
answers), and the text it was asked with, which only `sari` reads. They hold for any strings:

* Space at both ends does not count. Equal texts score 1. An empty prediction of an answer that is not empty scores 0,
  and so does anything else where the answer is empty.
* With several right answers the best of the scores counts, as in SQuAD; `sari` compares with all of them at once.
* Words are what stands between spaces. Chinese and Japanese are written without spaces, so each Han character and each
  kana is a word of its own in `f1`, `rouge_l` and `sari`. (Thai, Lao, Khmer and Burmese are not cut into words.)
* Where a score leaves punctuation out and a text has nothing else, the punctuation itself is compared.

Which benchmark uses which: the O-LoRA benchmark `exact_match`; TRACE `accuracy` (C-STANCE, FOMC, NumGLUE),
`first_character` (ScienceQA), `rouge_l` (MeetingBank), `code_similarity` (Py150) and `sari` (20Minuten). The last two
are percentages there, shares here.

`rouge_l` and `code_similarity` need rapidfuzz, which the extra `lm` brings (MIT, no dependencies). The packages made
for ROUGE are no alternative: `rouge-score` had its last release in 2022, needs nltk and deletes every letter but a–z;
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
_TOKEN = re.compile(r"\d+(?:[.,]\d+)+|\w+(?:['’-]\w+)*|[^\w\s]")
_BARE_LITERAL = re.compile("<(NUM|STR|CHAR)_LIT>")
_LITERAL = re.compile("<(?:NUM|STR|CHAR)_LIT:([^>]*)>")


def exact_match(prediction: str, reference: Reference, prompt: str = "") -> float:
    """1 where both are equal once case, punctuation and the amount of white space are left out, else 0.

    O-LoRA's rule, which is SQuAD's without the removal of articles: lower case, punctuation deleted (so `Sci/Tech` is
    `scitech`), runs of white space made one space. Punctuation is ASCII's there; here Unicode's counts too.
    """
    return _best(prediction, reference, lambda said, right: float(_normalised(said) == _normalised(right)))


def accuracy(prediction: str, reference: Reference, prompt: str = "") -> float:
    """1 where both are equal but for space at the ends, else 0 (TRACE: C-STANCE, FOMC, NumGLUE)."""
    return _best(prediction, reference, lambda said, right: 0.0)


def first_character(prediction: str, reference: Reference, prompt: str = "") -> float:
    """1 where both begin with the same character, else 0: `B` and `B\\nBecause …` (TRACE: ScienceQA)."""
    return _best(prediction, reference, lambda said, right: float(said[0] == right[0]))


def prefix(prediction: str, reference: Reference, prompt: str = "") -> float:
    """1 where the prediction begins with the reference, else 0.

    TreeLoRA's released code scores so where TRACE asks for `accuracy`. It is more lenient: an answer that goes on
    after the right word is right, and of the options `1` and `10` the second counts as the first.
    """
    return _best(prediction, reference, lambda said, right: float(said.startswith(right)))


def f1(prediction: str, reference: Reference, prompt: str = "") -> float:
    """The F1 of the words that both have in common, each as often as in both (SQuAD, Rajpurkar et al. 2016).

    The words of `exact_match` without English articles; a text of articles alone keeps them.
    """

    def of(said: str, right: str) -> float:
        ours, theirs = _squad_words(said), _squad_words(right)
        common = (Counter(ours) & Counter(theirs)).total()
        return 2 * common / (len(ours) + len(theirs))

    return _best(prediction, reference, of)


def rouge_l(prediction: str, reference: Reference, prompt: str = "") -> float:
    """ROUGE-L as F1: `2 LCS / (m + n)`, with the longest common subsequence of the words of both (Lin 2004).

    The text counts as one sentence; words are lower-cased, not stemmed, and cut at whatever is no letter, digit or
    accent, as in Google's `rouge-score` (for English alone). TRACE's figures are from the package `rouge`: case counts
    there, and sentences are matched one by one.

    Raises:
        MissingExtra: rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import LCSseq
    except ImportError:
        raise MissingExtra("score: rouge_l", "lm") from None

    def of(said: str, right: str) -> float:
        numbers: dict[str, int] = {}  # small numbers for words: no two of them can share a hash
        ours, theirs = ([numbers.setdefault(w, len(numbers)) for w in _words(text)] for text in (said, right))
        return 2 * LCSseq.similarity(ours, theirs) / (len(ours) + len(theirs))

    return _best(prediction, reference, of)


def code_similarity(prediction: str, reference: Reference, prompt: str = "") -> float:
    """The share of characters that need no insertion or deletion to make one text the other (TRACE: Py150).

    `1 - distance / (m + n)`, which is `fuzzywuzzy.ratio` / 100 before that rounds to whole per cents. First the
    placeholders of CodeXGLUE's Py150 for literals are filled in, as TRACE does: `<NUM_LIT>` is 0, `<STR_LIT>` and
    `<CHAR_LIT>` are empty, and those that carry a value, such as `<STR_LIT:utf-8>`, are that value.

    Raises:
        MissingExtra: rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import Indel
    except ImportError:
        raise MissingExtra("score: code_similarity", "lm") from None
    return _best(
        prediction, reference, lambda said, right: Indel.normalized_similarity(_filled_in(said), _filled_in(right))
    )


def sari(prediction: str, reference: Reference, prompt: str, *, undefined: float = 1.0) -> float:
    """SARI (Xu et al. 2016, TACL 4): what was rightly kept, added and deleted of the text to be simplified.

    For n = 1 … 4 the n-grams of prediction `O`, references `R` and source `I` give an F1 of keeping, an F1 of adding
    and a precision of deleting; SARI is the mean of these twelve. As in the authors' code, each distinct n-gram weighs
    alike, and the F1 is taken for each n. An n-gram that I has more often than O was deleted, rightly so as far as R
    has it less often than I: `min(I - O, I - R) / (I - O)`, the paper's equation. (The code takes `I - O - R`, so that
    a perfect answer loses where a word of it is repeated in the source.)

    TRACE's figures are from Hugging Face's `sari`. It splits words by other rules, weighs the recall of keeping by
    counts, and deletes as the code.

    Args:
        prompt: the text to be simplified; TRACE takes the whole prompt, instruction included.
        undefined: what 0 / 0 is, where there is nothing to keep, add or delete. The authors' code has 0; then even the
            right answer scores less than 1, which Hugging Face's mended.
    """
    references = _several(reference)
    if not prediction.strip() or not any(right.strip() for right in references):
        return _best(prediction, references, lambda said, right: 0.0)
    source, said = _tokens(prompt), _tokens(prediction)
    rights = [_tokens(right) for right in references]
    total = 0.0
    for n in range(1, LONGEST + 1):
        total += _sari_of(_grams([source], n), _grams([said], n), _grams(rights, n), len(rights), undefined)
    return total / (3 * LONGEST)


SCORES: dict[str, Score] = {
    "exact_match": exact_match,
    "accuracy": accuracy,
    "first_character": first_character,
    "prefix": prefix,
    "f1": f1,
    "rouge_l": rouge_l,
    "sari": sari,
    "code_similarity": code_similarity,
}


def score_of(name: str) -> Score:
    """The score of that name, ready for use.

    Raises:
        UsageError: there is none.
        MissingExtra: it needs a package that is not installed.
    """
    if name not in SCORES:
        raise UsageError(f"there is no score {name!r}; {closest(name, SCORES)}")
    score = SCORES[name]
    score("", "", "")  # what is not installed is said now, not after a task was learned
    return score


def _best(prediction: str, reference: Reference, of: Callable[[str, str], float]) -> float:
    """The best over the references of `of`, which sees two texts without space at the ends: not empty, not equal."""
    said = prediction.strip()
    rights = (right.strip() for right in _several(reference))
    scores = (1.0 if said == right else of(said, right) if said and right else 0.0 for right in rights)
    return max(scores, default=0.0)


def _several(reference: Reference) -> Sequence[str]:
    return [reference] if isinstance(reference, str) else reference


def _normalised(text: str) -> str:
    """Lower case, without punctuation, words one space apart; with it where there is nothing else."""
    text = " ".join(text.lower().split())
    return " ".join("".join(c for c in text if not _is_punctuation(c)).split()) or text


def _is_punctuation(c: str) -> bool:
    return c in string.punctuation or unicodedata.category(c)[0] == "P"


def _squad_words(text: str) -> list[str]:
    words = _UNSPACED.sub(r" \1 ", _normalised(text)).split()
    return [word for word in words if word not in ARTICLES] or words


def _words(text: str) -> list[str]:
    """Lower-cased runs of letters, marks and digits; the characters where there is none."""
    text = text.lower()
    apart = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in _UNSPACED.sub(r" \1 ", text))
    return apart.split() or list("".join(text.split()))


def _tokens(text: str) -> list[str]:
    """Lower-cased words, numbers (`1,000.5`), and each mark of punctuation by itself."""
    return _TOKEN.findall(_UNSPACED.sub(r" \1 ", text.lower()))


def _filled_in(code: str) -> str:
    bare = _BARE_LITERAL.sub(lambda found: "0" if found[1] == "NUM" else "", code)
    return _LITERAL.sub(r"\1", bare)


def _grams(texts: Sequence[Sequence[str]], n: int) -> Counter[tuple[str, ...]]:
    """How often each n words stand in a row, over all texts."""
    return Counter(gram for words in texts for gram in zip(*(words[i:] for i in range(n)), strict=False))


def _sari_of(
    source: Counter[tuple[str, ...]],
    said: Counter[tuple[str, ...]],
    right: Counter[tuple[str, ...]],
    references: int,
    undefined: float,
) -> float:
    """The sum of the three parts of SARI for n-grams of one length; `right` counts those of all references."""
    # Counts of source and prediction times the number of references: no fractions where references differ.
    source, said = (Counter({gram: k * references for gram, k in grams.items()}) for grams in (source, said))
    kept, to_keep = source & said, source & right
    rightly = kept & right
    keep = _harmonic(
        _mean((rightly[gram] / kept[gram] for gram in kept), undefined),
        _mean((rightly[gram] / to_keep[gram] for gram in to_keep), undefined),
    )
    deleted, to_delete = source - said, source - right
    delete = _mean((min(deleted[gram], to_delete[gram]) / deleted[gram] for gram in deleted), undefined)
    added, to_add = said.keys() - source.keys(), right.keys() - source.keys()
    add = _harmonic(
        _mean((float(gram in to_add) for gram in added), undefined),
        _mean((float(gram in added) for gram in to_add), undefined),
    )
    return keep + delete + add


def _mean(shares: Iterable[float], undefined: float) -> float:
    found = list(shares)
    return sum(found) / len(found) if found else undefined


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
