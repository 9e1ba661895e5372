"""Pictures and texts in one space: the features of both, as a method answers with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from perpetune.errors import UsageError
from perpetune.methods.base import Method
from perpetune.models.classifier import feature_table
from perpetune.numerics.retrieval import recall
from perpetune.pets import using
from perpetune.runtime import Runtime
from perpetune.tasks import Examples

MARGIN = 1e-6  # float32 features of one picture differ by as much from batch to batch: nearer scores are a tie


class Gallery:
    """Pictures and the different captions that they have, with the features of both.

    Attributes:
        texts: the captions; one that several pictures have stands here once.
        own: bool `(N, M)`, whether picture n has text m.
        pictures, words: features `(N, D)` and `(M, D)` of length 1, float32.
    """

    def __init__(self, method: Method, captions: Sequence[Sequence[str]], examples: Examples, size: int, run: Runtime):
        place = {text: number for number, text in enumerate(dict.fromkeys(t for said in captions for t in said))}
        self.texts = list(place)
        self.own = torch.zeros(len(captions), len(place), dtype=torch.bool)
        for number, said in enumerate(captions):
            self.own[number, [place[text] for text in said]] = True
        self.own = self.own.to(run.device)
        self.pictures = picture_features(method, examples, size, run)
        self.words = text_features(method, self.texts, size, run)

    @property
    def scores(self) -> Tensor:
        """Cosines `(N, M)`."""
        return self.pictures @ self.words.T

    def recalls(self, ks: Sequence[int]) -> tuple[list[float], list[float]]:
        """Recall at each of `ks`, from pictures to texts and from texts to pictures, over the whole gallery."""
        scores = self.scores
        return tuple(  # type: ignore[return-value]
            [recall(some, own, k, MARGIN) for k in ks] for some, own in ((scores, self.own), (scores.T, self.own.T))
        )


def picture_features(method: Method, examples: Examples, batch_size: int, run: Runtime) -> Tensor:
    """Features `(N, D)` of all examples as at prediction, of length 1, float32, on every process."""
    table = feature_table(examples.questions(), batch_size, run, method.features)
    return F.normalize(method.model.backbone.compared(table), dim=-1)


@torch.no_grad()
def text_features(method: Method, texts: Sequence[str], batch_size: int, run: Runtime, *, bare: bool = False) -> Tensor:
    """Features `(M, D)` of texts as at prediction, of length 1, float32.

    Args:
        bare: those of the frozen net instead.

    Raises:
        UsageError: the backbone reads no texts beside its pictures.
    """
    side = method.model.backbone.texts
    if side is None:
        raise UsageError(
            f"{method.model.backbone.spec} has no text tower, so pictures cannot be compared with captions: use a "
            "backbone of pictures and texts, such as CLIP"
        )
    with using(method.model, None if bare else method.answering), run.autocast():
        return F.normalize(side.of(texts, batch=batch_size).float().to(run.device), dim=-1)
