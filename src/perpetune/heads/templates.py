"""Sentences that a class's name is put into, so that a text tower reads it as it has read captions."""

from __future__ import annotations

from collections.abc import Sequence

from perpetune.errors import UsageError, closest

_CIFAR = (
    "a photo of {} {{}}.",
    "a blurry photo of {} {{}}.",
    "a black and white photo of {} {{}}.",
    "a low contrast photo of {} {{}}.",
    "a high contrast photo of {} {{}}.",
    "a bad photo of {} {{}}.",
    "a good photo of {} {{}}.",
    "a photo of {} small {{}}.",
    "a photo of {} big {{}}.",
)
SETS: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of a {}.",),
    "context": ("[context] {}.",),
    "cifar": tuple(template.format(article) for article in ("a", "the") for template in _CIFAR),
    "seven": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}
"""Sets of templates by name. `context` is for the pet of that name. `cifar` and `seven` are those that OpenAI published
for CLIP on CIFAR and ImageNet."""


def templates_of(given: str | Sequence[str], where: str = "head: text") -> tuple[str, ...]:
    """The templates of a set, of one sentence with `{}`, or of several.

    Args:
        given: the name of a set, a sentence, or sentences.
        where: what they are given to, for messages.

    Raises:
        UsageError: there is no such set, or a sentence does not have `{}` once.
    """
    if isinstance(given, str) and "{}" not in given:
        if given not in SETS:
            raise UsageError(f"{where}: there are no templates {given!r}; {closest(given, SETS)}")
        return SETS[given]
    found = (given,) if isinstance(given, str) else tuple(given)
    wrong = next((template for template in found if template.count("{}") != 1), None)
    if wrong is not None or not found:
        raise UsageError(f"{where}: template {wrong!r} does not have {{}} once, where the name goes")
    return found


def spoken(name: str) -> str:
    """A class's name as a sentence has it: with spaces for `_`, else as the user wrote it."""
    return name.replace("_", " ")
