"""Pictures and captions as an exam: is the right caption found for a picture, and the right picture for a caption?"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from perpetune.errors import UsageError
from perpetune.exams.base import Exam, Opener, Suite, Values
from perpetune.heads.templates import spoken, templates_of
from perpetune.methods.base import Method
from perpetune.methods.parts.pairs import MARGIN, Gallery, text_features
from perpetune.numerics.recognition import modality_gap
from perpetune.seeding import generator
from perpetune.tasks import captioned

KS = (1, 5, 10)
TEMPLATE = "a photo of a {}."


class Retrieval(Suite):
    """One exam on pictures with captions, both ways over the whole gallery; ties count against the model.

    Recall at 1, 5 and 10 in both directions; `foils`, how often a caption scores higher than the same caption with one
    noun exchanged; `gap`, how far pictures and texts are apart; and `pair_cosine`, the mean cosine of a picture and its
    own caption.

    Args:
        source: a `data:` section, or a path; its test data are asked, or all its data where it has no test data.
        template: makes a caption of a class, if the data have classes and no captions; several sentences, or the name
            of a packaged set as in head `text`, make as many captions.
        nouns: the words that are exchanged for each other in foils; for data with classes these are the classes.
    """

    def __init__(
        self, *, source: str | dict[str, Any], template: str | list[str] = TEMPLATE, nouns: Sequence[str] = ()
    ):
        self.source, self.nouns = source, tuple(nouns)
        self.templates = templates_of(template, "exams: retrieval")
        if len(self.nouns) == 1:
            raise UsageError(
                "exams: retrieval: nouns names one word, and foils exchange it for another: name two or more"
            )

    def exams(self, name: str, opened: Opener) -> Sequence[Exam]:
        task = dataclasses.replace(opened(self.source), name=name)
        return [Exam(name, task, "own", partial(_judge, self.templates, self.nouns))]


def checked_template(template: str) -> str:
    """`template`, if it has one place for a name."""
    if template.count("{}") != 1:
        raise UsageError(f"exams: the template {template!r} needs one {{}}, in whose place the name of a class is put")
    return template


def filled(template: str, name: str) -> str:
    """A caption with the name of a class, as people write it."""
    return template.replace("{}", spoken(name))


def _judge(templates: Sequence[str], nouns: Sequence[str], method: Method, exam: Exam, batch_size: int) -> Values:
    task, run = exam.task, exam.task.runtime
    assert task.test is not None
    names = nouns
    if captioned(task.test):
        captions = [task.test.captions(i) for i in range(len(task.test))]
    else:
        said = [[filled(template, name) for template in templates] for name in task.classes]
        captions = [said[target] for target in task.test.targets]
        names = nouns or [spoken(name) for name in task.classes]
    gallery = Gallery(method, captions, task.test, batch_size, run)
    there, back = gallery.recalls(KS)
    values = {f"image_to_text_r{k}": share for k, share in zip(KS, there, strict=True)}
    values |= {f"text_to_image_r{k}": share for k, share in zip(KS, back, strict=True)}
    if len(names) > 1 and (share := _against_foils(gallery, names, method, exam, batch_size)) is not None:
        values["foils"] = share
    values["gap"] = modality_gap(gallery.pictures, gallery.words)
    values["pair_cosine"] = float(gallery.scores[gallery.own].double().mean())
    return {name: round(value, 6) for name, value in values.items()}


def _against_foils(gallery: Gallery, nouns: Sequence[str], method: Method, exam: Exam, batch_size: int) -> float | None:
    """How often a picture's caption scores higher than its foil; None if no caption has one of the nouns."""
    rng, word = generator("foils", exam.name), _any_of(nouns)
    drawn: dict[str, str] = {}
    for text in gallery.texts:
        if found := word.search(text):
            others = [noun for noun in nouns if noun.lower() != found[0].lower()]
            other = others[int(torch.randint(len(others), (), generator=rng))]
            drawn[text] = text[: found.start()] + other + text[found.end() :]
    if not drawn:
        return None
    false = text_features(method, list(drawn.values()), batch_size, exam.task.runtime)
    columns = torch.tensor([text in drawn for text in gallery.texts], device=false.device)
    better = gallery.scores[:, columns] > gallery.pictures @ false.T + MARGIN
    return float(better[gallery.own[:, columns]].double().mean())


def _any_of(nouns: Sequence[str]) -> re.Pattern[str]:
    """Any of the nouns as a whole word; of two at one place the longer one."""
    longest = sorted(nouns, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!\w)", re.IGNORECASE)
