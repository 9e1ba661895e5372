"""Recall at k, the loss of captions, and false recognition: golden values and what must hold of any scores."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from perpetune.numerics.recognition import attraction, equal_error_threshold, false_yes, missed_yes, modality_gap
from perpetune.numerics.retrieval import contrastive, recall

S = torch.tensor([[0.9, 0.2, 0.3, 0.9, 0.1], [0.1, 0.4, 0.5, 0.2, 0.6], [0.3, 0.3, 0.2, 0.3, 0.7]], dtype=torch.float64)
OWN = torch.tensor([0, 0, 1, 2, 2]) == torch.arange(3)[:, None]


def test_recall_golden() -> None:  # G5
    assert [recall(S, OWN, k) for k in (1, 2)] == [1 / 3, 1.0]
    assert [recall(S.T, OWN.T, k) for k in (1, 2)] == pytest.approx([0.6, 0.8], abs=1e-15), "the tie counts against"


@pytest.mark.parametrize("seed", range(5))
def test_recall_of_any_scores(seed: int) -> None:  # V17
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(7, 12, generator=g).round(decimals=1)
    own = torch.randint(7, (12,), generator=g) == torch.arange(7)[:, None]
    own[:, :7] |= torch.eye(7, dtype=torch.bool)
    for some, mine in ((scores, own), (scores.T, own.T)):
        found = [recall(some, mine, k) for k in range(1, some.shape[1] + 1)]
        assert found == sorted(found)
        assert found[-1] == 1.0
        rows, columns = torch.randperm(len(some), generator=g), torch.randperm(some.shape[1], generator=g)
        moved = [recall(some[rows][:, columns], mine[rows][:, columns], k) for k in range(1, some.shape[1] + 1)]
        assert moved == found


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_a_collapsed_model_finds_nothing(value: float) -> None:
    scores, own = torch.full((6, 6), value), torch.eye(6, dtype=torch.bool)
    assert [recall(scores, own, k) for k in (1, 5, 6)] == [0.0, 0.0, 1.0]
    noise = scores + 1e-8 * torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert recall(noise, own, 5, margin=1e-6) == 0.0


def logits() -> torch.Tensor:
    f = F.normalize(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], dtype=torch.float64), dim=-1)
    t = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.5], [0.1, 1.0]], dtype=torch.float64), dim=-1)
    return 10 * f @ t.T


def test_contrastive_golden() -> None:  # G6
    y = torch.tensor([0, 0, 1])
    assert float(contrastive(logits(), y[:, None] == y[None])) == pytest.approx(0.5821340, abs=5e-8)
    assert float(contrastive(logits(), torch.eye(3, dtype=torch.bool))) == pytest.approx(0.2008875, abs=5e-8)


def test_contrastive_of_any_scores() -> None:  # V18
    z, numbers = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double(), torch.arange(6)
    diagonal = torch.eye(6, dtype=torch.bool)
    plain = (F.cross_entropy(z, numbers) + F.cross_entropy(z.T, numbers)) / 2
    assert torch.allclose(contrastive(z, diagonal), plain, atol=1e-12)
    matches = diagonal.clone()
    matches[0, 3] = matches[2, 3] = True
    assert torch.allclose(contrastive(z, matches), contrastive(z.T, matches.T), atol=1e-12)
    assert not torch.allclose(contrastive(z, matches), contrastive(z, matches.T), atol=1e-6)


def test_attraction_and_gap_golden() -> None:  # G11
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.4, 0.1, 0.5], [0.1, 0.2, 0.7]], dtype=torch.float64)
    found = attraction(scores, torch.tensor([0, 1, 0, 2]), torch.tensor([2]))
    assert found == pytest.approx((1 / 3, 0.8 / 3), abs=1e-12)
    f, t = (
        torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64),
        torch.tensor([[0.0, 1.0], [-0.6, 0.8]], dtype=torch.float64),
    )
    assert modality_gap(f, t) == pytest.approx(1.2083046, abs=5e-8)
    assert modality_gap(3 * f, t) == pytest.approx(modality_gap(f, t), abs=1e-12)


def test_threshold_golden() -> None:  # G12, V20
    present, absent = (
        torch.tensor([0.5, 0.4, 0.3, 0.2], dtype=torch.float64),
        torch.tensor([0.1, 0.25, 0.15, 0.35], dtype=torch.float64),
    )
    threshold = equal_error_threshold(present, absent)
    assert threshold == pytest.approx(0.275, abs=1e-12)
    assert (false_yes(absent, threshold), missed_yes(present, threshold)) == (0.25, 0.25)
    later, wrong = (
        torch.tensor([0.6, 0.5, 0.3, 0.2], dtype=torch.float64),
        torch.tensor([0.3, 0.45, 0.15, 0.35], dtype=torch.float64),
    )
    assert (false_yes(wrong, threshold), missed_yes(later, threshold)) == (0.75, 0.25)


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_best_of_all(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    present, absent = (torch.randint(9, (n,), generator=g).double() / 10 for n in (13, 29))
    best = equal_error_threshold(present, absent)

    def apart(threshold: float) -> float:
        return abs(missed_yes(present, threshold) - false_yes(absent, threshold))

    assert all(apart(best) <= apart(float(other)) + 1e-12 for other in torch.arange(-1, 11) / 10 + 0.05)
