"""Class texts, and the expert behind the gate of zero-shot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from perpetune.numerics.fusion import class_texts, fused


def probabilities() -> Tensor:
    images = F.normalize(torch.tensor([[1, 0, 0.1], [0.2, 1, 0], [0, 0.3, 1]], dtype=torch.float64), dim=-1)
    texts = F.normalize(torch.tensor([[1, 0.1, 0], [0.1, 1, 0.2], [0, 0.2, 1]], dtype=torch.float64), dim=-1)
    return (10 * images @ texts.T).softmax(-1)


RIDGE = torch.tensor([[0.7, 0.2], [0.9, 0.3], [0.1, 0.6]], dtype=torch.float64)
LEARNED = torch.tensor([0, 1])


def rail(p: Tensor, h: Tensor, learned: Tensor, share: float) -> Tensor:
    """RAIL's own formula, row by row."""
    rows = []
    for one, expert in zip(p, h, strict=True):
        whole = torch.zeros_like(one)
        whole[learned] = expert
        rows.append((1 - share) * one + share * whole if int(one.argmax()) in learned.tolist() else one)
    return torch.stack(rows)


def test_a_class_text_is_the_mean_of_normalised_texts() -> None:
    texts = torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]], dtype=torch.float64)
    wanted = torch.tensor([[0.4242641, 0.5656854, 0.7071068]], dtype=torch.float64)
    torch.testing.assert_close(class_texts(texts), wanted, rtol=0, atol=1e-7)
    torch.testing.assert_close(class_texts(texts.flip(1)), wanted, rtol=0, atol=1e-7)
    mean_first = F.normalize(texts.mean(1), dim=-1)
    assert float((mean_first - wanted).abs().max()) > 0.1, "the control is another one"


def test_golden_scores() -> None:
    scores = fused(probabilities(), RIDGE, LEARNED, 0.8)
    wanted = torch.tensor([[0.7599413, 0.1600321, 0.0000266], [0.7202150, 0.4397062, 0.0000788]]).double()
    torch.testing.assert_close(scores[:2], wanted, rtol=0, atol=1e-7)
    third = torch.tensor([0.0800116, 0.4810102, 0.9948813], dtype=torch.float64)
    torch.testing.assert_close(scores[2], third, rtol=0, atol=2e-6)
    given_p, given_h = (torch.tensor([row], dtype=torch.float64) for row in ([0.1, 0.3, 0.6], [0.2, 0.9]))
    shut = torch.tensor([[-0.000001, 0.599999, 0.6]], dtype=torch.float64)
    torch.testing.assert_close(fused(given_p, given_h, LEARNED, 0.8), shut, rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 6), st.integers(0, 10**6), st.sampled_from([0.2, 0.8, 0.95]))
def test_over_all_candidates_it_answers_as_rail(known: int, others: int, seed: int, share: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    p = (3 * torch.randn(20, known + others, generator=rng, dtype=torch.float64)).softmax(-1)
    h = torch.randn(20, known, generator=rng, dtype=torch.float64)
    learned = torch.randperm(known + others, generator=rng)[:known]
    scores, theirs = fused(p, h, learned, share), rail(p, h, learned, share)
    assert torch.equal(scores.argmax(1), theirs.argmax(1))
    shut = torch.tensor([int(row.argmax()) not in learned.tolist() for row in p])
    unknown = [i for i in range(known + others) if i not in learned.tolist()]
    assert torch.equal(scores[shut][:, unknown], p[shut][:, unknown]), (
        "scores of others are those of zero-shot, bit by bit"
    )
    among = (1 - share) * p[:, learned] + share * h
    assert torch.equal(scores[:, learned].argmax(1), among.argmax(1)), "among learned classes the expert decides"
    if unknown:
        assert torch.equal(scores[:, unknown].argmax(1), p[:, unknown].argmax(1)), "among others zero-shot does"


def test_masking_the_scores_of_rail_itself_is_something_else() -> None:
    """The control: where the gate is shut RAIL's own scores of learned classes are those of zero-shot."""
    p = torch.tensor([[0.3, 0.1, 0.6]], dtype=torch.float64)
    h = torch.tensor([[0.1, 0.9]], dtype=torch.float64)
    assert int(rail(p, h, LEARNED, 0.8)[:, :2].argmax()) == 0
    assert int(fused(p, h, LEARNED, 0.8)[:, :2].argmax()) == 1


def test_no_share_is_zero_shot_and_no_gate_lets_the_expert_speak() -> None:
    p = probabilities()
    assert torch.equal(fused(p, RIDGE, LEARNED, 0.0), p)
    opened = fused(p, RIDGE, LEARNED, 0.8, gate="none")
    torch.testing.assert_close(opened[2, :2], 0.2 * p[2, :2] + 0.8 * RIDGE[2])
    assert int(fused(p, torch.tensor([[0.0, 9.0]] * 3).double(), LEARNED, 0.8, gate="none")[2].argmax()) == 1


def test_with_every_class_learned_the_gate_is_open() -> None:
    p = probabilities()
    h = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fused(p, h, torch.arange(3), 0.8), 0.2 * p + 0.8 * h)


@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_learned_changes_nothing(rows: int) -> None:
    p = torch.rand(rows, 3)
    assert torch.equal(fused(p, torch.zeros(rows, 0), torch.zeros(0, dtype=torch.int64), 0.8), p)
