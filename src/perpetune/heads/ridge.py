"""The head `ridge`: ridge regression of classes on features, computed from sums over examples."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.errors import PerpetuneError, UsageError
from perpetune.heads.base import FiniteFeatures, Folded, Head, alone, carry_facts
from perpetune.heads.cosine import Cosine
from perpetune.numerics import carry as carrying
from perpetune.numerics import ridge
from perpetune.numerics.exact import exactly
from perpetune.numerics.lowrank import moved_exactly
from perpetune.seeding import generator

BUFFER = 512  # examples that are added to the sums together; the large matrix is read and written once for them
SAMPLE = 256  # most examples of a task that are kept to correct the penalty's error and to calibrate the scale
ENOUGH = 64  # a task with at least as many examples may change the penalty freely
FAR = 4  # with at least as many examples per column the penalty's error needs no correction
SCALES = tuple(10 ** (i / 20) for i in range(61))  # 1 to 1000
SUMS = ("packed", "cross", "counts", "mass")
SOLVED = ("weight", "centre", "offset", "scale")


class Ridge(Head):
    """Linear regression of one-hot classes on features, with an L2 penalty, computed from sums over examples.

    The head stores the matrices `G = Σ h hᵀ (M, M)` and `Q = Σ h yᵀ (M, C)` in float64. After every task it solves
    `(G + λI) W = Q` for the weights. As long as the features do not change, the result is that of one regression on all
    data, for any order of tasks and batches: RanPAC, McDonnell et al. 2023, arXiv:2307.02251. After each task `λ` is
    chosen for all data so far: the one with the smallest estimated error on left-out examples, from the sums and a
    sample of the task (`numerics.ridge.Fit`). While features are trained, a cosine probe gives the logits; it is not
    used at prediction.

    Args:
        projection: `M`, the number of columns into which the features are turned; 0 uses the features themselves. The
            head draws the projection matrix from a seed and stores only the seed. `G` takes `4 M²` bytes on disk.
        kind: `relu` computes random features `relu(f P)` with normal `P`, as RanPAC does. `orthogonal` computes `f P`
            with orthonormal columns, fewer than the features have; its only purpose is to save space.
        standardise: centre each column and divide it by its standard deviation over all examples so far, computed
            exactly from the sums, and add an intercept. None means yes, unless there are `relu` features.
        sums: the type of `G`. `float32` takes half the space, `2 M²` bytes, and rounds the sums once for every 512
            examples.
        penalty: `λ` as a share of `tr G / M`, so that the scale of the features does not matter; `chosen` finds it by
            the error on left-out examples.
        balance: weight each example by the inverse of the number of examples of its class in its task, so that
            frequent classes get no advantage.
        carry: after training, move the sums of old examples as the new task's features have moved (`numerics.carry`).
            The head tests the map on classes that were left out of it, and moves the sums only if that gives a smaller
            error than to leave them.
        scale: the factor on the scores: the inverse temperature of the probabilities that users see and of mixtures.
            `calibrated` fits it to the exact leave-one-out scores of up to 256 training examples of the last task. The
            class with the highest score does not depend on it.
        probe_scale: σ of the probe.
        learn_scale: train σ too.

    Raises:
        PerpetuneError: features are not finite. No example of their batch is added to the sums, but earlier batches of
            the same task may have been added.
    """

    statistics: ClassVar[bool] = True
    projected: Tensor
    packed: Tensor
    cross: Tensor
    counts: Tensor
    mass: Tensor
    chosen: Tensor
    weight: Tensor
    centre: Tensor
    offset: Tensor
    scale: Tensor

    def __init__(
        self,
        dim: int,
        *,
        projection: Annotated[int, Field(ge=0)] = 0,
        kind: Literal["relu", "orthogonal"] = "relu",
        standardise: bool | None = None,
        sums: Literal["float64", "float32"] = "float64",
        penalty: Annotated[float, Field(gt=0)] | Literal["chosen"] = "chosen",
        balance: bool = False,
        carry: bool = False,
        scale: Annotated[float, Field(gt=0)] | Literal["calibrated"] = "calibrated",
        probe_scale: Annotated[float, Field(gt=0)] = 16.0,
        learn_scale: bool = False,
    ):
        super().__init__(dim)
        self.projection, self.kind, self.penalty, self.balance = projection, kind, penalty, balance
        self.standardise = standardise if standardise is not None else not (projection and kind == "relu")
        self.given_scale, self.carry, self._type = scale, carry, getattr(torch, sums)
        self.probe = Cosine(dim, scale=probe_scale, learn_scale=learn_scale)
        self.seed: int | None = None
        for name in (*SUMS, "chosen", *SOLVED):
            self.register_buffer(name, torch.empty(0), persistent=self.standardise or name not in ("centre", "offset"))
        self.register_buffer("projected", torch.empty(0), persistent=False)
        self._forget()

    @property
    def width(self) -> int:
        """`M`, the width of the rows of the regression without the constant 1 of an intercept."""
        return self.projection or self.dim

    @property
    def rank(self) -> int:
        """The number of rows of `G`: `M`, and 1 more with an intercept."""
        return self.width + self.standardise

    # -- scores ---------------------------------------------------------------------------------------

    def forward(self, features: Tensor) -> Tensor:
        if not self.classes:  # the projection is drawn with the first of them
            return torch.empty(len(features), 0, device=features.device)
        with exactly(features.device):
            rows = self.expand(features.float())
            # The centre may be large against the differences from it. Inside the offset it would cost digits.
            scores = (rows - self.centre) @ self.weight + self.offset if self.standardise else rows @ self.weight
            scores = self.scale * scores
        return scores.masked_fill((self.counts == 0).to(scores.device), -torch.inf)

    def expand(self, features: Tensor) -> Tensor:
        """Rows `(B, M)` of features `(B, D)`, in the type of the features: float64 for sums, float32 for scores."""
        if not self.projection:
            return features
        rows = features @ moved_exactly(self.projected, features)
        return F.relu(rows) if self.kind == "relu" else rows

    def logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self.probe(features)
        return logits

    # -- growing --------------------------------------------------------------------------------------

    def per_class(self) -> list[nn.Parameter]:
        return self.probe.per_class()

    def train_on(self, columns: slice) -> None:
        self.probe = self.probe.narrowed(columns)

    def widen(self, dim: int) -> None:
        super().widen(dim)
        self._forget()

    def ready(self) -> None:
        if self.kind == "orthogonal" and self.projection >= self.dim:
            raise UsageError(
                f"head: ridge: an orthogonal projection to {self.projection} columns saves nothing, because the "
                f"features have {self.dim}: set projection to 0, or below {self.dim}"
            )

    def reset(self) -> None:
        super().reset()
        self.probe.reset()
        self._forget()

    def resize(self, rows: int, generator: torch.Generator) -> None:
        if self.seed is None and rows:
            self._draw(generator.initial_seed())
        more = rows - len(self.counts)
        self.cross = F.pad(self.cross, (0, more))
        self.counts = F.pad(self.counts, (0, more))
        self.weight = F.pad(self.weight, (0, more))
        self.offset = F.pad(self.offset, (0, more))
        self.probe.resize(rows, generator)

    def _forget(self) -> None:
        device = self.probe.weight.device
        self.seed = None
        self.packed = torch.zeros(0, dtype=self._type, device=device)  # gets its size with the first sums
        self.cross = torch.zeros(self.rank, 0, dtype=torch.float64, device=device)
        self.counts = torch.zeros(0, dtype=torch.int64, device=device)
        self.mass = torch.zeros((), dtype=torch.float64, device=device)
        self.weight = torch.zeros(self.width, 0, device=device)
        self.centre = torch.zeros(self.width if self.standardise else 0, device=device)
        self.offset = torch.zeros(0, device=device)
        self.chosen = torch.zeros((), dtype=torch.float64, device=device)
        self.scale = torch.tensor(1.0 if isinstance(self.given_scale, str) else self.given_scale, device=device)
        self.projected = torch.empty(0, device=device)
        self._clear()
        self._facts: dict[str, Any] = {}
        self._carried: dict[str, Any] = {}

    def _draw(self, seed: int) -> None:
        self.seed = seed
        if not self.projection:
            return
        drawn = torch.randn(self.dim, self.width, generator=generator("ridge", seed)) / math.sqrt(self.dim)
        self.ready()
        if self.kind == "orthogonal":
            q, r = torch.linalg.qr(drawn.double())
            drawn = (q * r.diagonal().sign()).float()  # without this the library would choose the signs
        self.projected = drawn.to(self.probe.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Ridge:
        # These buffers keep their types and move with the rest. Sums stay on the CPU if the device is an Apple GPU,
        # which has no float64.
        kept = {name: self._buffers.pop(name) for name in (*SUMS, "chosen", *SOLVED, "projected")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.probe.weight.device
        for name, tensor in kept.items():
            assert tensor is not None
            stays = device.type == "mps" and name in (*SUMS, "chosen")
            self._buffers[name] = tensor if stays else tensor.to(device)
        return self

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "seed": self.seed, "summed": bool(len(self.packed))}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state["seed"] != self.seed:
            self._forget()
        if state["seed"] is not None and self.seed is None:
            self._draw(int(state["seed"]))
        if bool(state["summed"]) != bool(len(self.packed)):
            self.packed = self.packed.new_zeros(ridge.packed_size(self.rank) if state["summed"] else 0)
        super().set_extra_state(state)

    # -- statistics -----------------------------------------------------------------------------------

    @torch.no_grad()
    def follow(self, before: Tensor, after: Tensor, targets: Tensor) -> None:
        if not int(self.counts.sum()):
            return
        first, then = (self._rows(moved_exactly(features, self.cross)) for features in (before, after))
        standard = ridge.Standard.of(self.packed, self.cross) if self.standardise else None
        if standard is None:
            square = ridge.diagonal(self.packed, self.rank) / self.mass
            scale, centre = torch.where(square > 0, square.rsqrt(), 0.0), None
        else:
            scale, centre = F.pad(standard.inverse, (0, 1), value=1.0), standard.mean
        carry = carrying.follow(first, then, targets.to(first.device), scale, centre)
        self._carried = carry_facts(carry)
        if carry:
            gram = carry.of_gram(ridge.dense(self.packed, self.rank))
            ridge.pack(gram, self.packed)
            self.cross = carry.of_rows(self.cross.mT).mT.contiguous()

    def _rows(self, features: Tensor) -> Tensor:
        """Rows `h (B, rank)` for the sums, in the type of the features."""
        rows = self.expand(features)
        return F.pad(rows, (0, 1), value=1.0) if self.standardise else rows

    def additive(self) -> list[Tensor]:
        return [self.packed, self.cross, self.counts, self.mass]

    def folded(self) -> Folded:
        weight, bias = self.weight.double(), self.weight.new_zeros(len(self.counts), dtype=torch.float64)
        if self.standardise:
            bias = self.offset.double() - self.centre.double() @ weight
        if self.projection and self.kind == "orthogonal":
            weight = self.projected.double() @ weight
        scale, unseen = self.scale.double(), (self.counts == 0).to(bias.device)
        return Folded(
            scale * weight.mT,
            (scale * bias).masked_fill(unseen, -torch.inf),
            projected=self.projected if self.projection and self.kind == "relu" else None,
        )

    def _clear(self) -> None:
        """Drop the examples of a task and what depends on them. The head keeps only sums."""
        self._features: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._sample: list[tuple[Tensor, Tensor]] = []
        self._row_weights = torch.empty(0, dtype=torch.float64)
        self._finite = FiniteFeatures("ridge")
        self._waiting, self._seen, self._expected = 0, 0, 0
        self._every, self._smoothing, self._whole = 1, 0.5, False

    @torch.no_grad()
    def expect(self, counts: Tensor) -> None:
        self._clear()
        total, present = int(counts.sum()), int((counts > 0).sum())
        self._expected = total
        if not len(self.packed):
            self.packed = self.packed.new_zeros(ridge.packed_size(self.rank))
        # If there are no earlier sums and few rows, the rows themselves are solved: the decomposition of their kernel
        # costs less than a factorisation of G.
        self._whole = int(self.counts.sum()) == 0 and 0 < total <= self.width // 3
        self._every = max(1, math.ceil(total / SAMPLE))
        self._smoothing = 1 / (math.ceil(total / self._every) + 2)
        ideal = total / max(present, 1)
        weights = ideal / counts.clamp(min=1).double() if self.balance else torch.ones(len(counts)).double()
        self._row_weights = weights.to(self.packed.device)

    @torch.no_grad()
    def observe(self, features: Tensor, rows: Tensor) -> None:
        targets = rows.to(self.packed.device)
        try:
            self._finite.add(self.classes, features, rows)
        except PerpetuneError:
            self._clear()
            raise
        self._features.append(features.to(self.packed.device))
        self._targets.append(targets)
        self._waiting += len(features)
        if self._waiting >= BUFFER:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        if not self._waiting:
            return
        features, targets = torch.cat(self._features), torch.cat(self._targets)
        new, of = self._finite.without_bad(features[-self._waiting :]), targets[-self._waiting :]
        rows, weights = self._rows(new.to(self.cross)), self._row_weights[of]
        # The features were looked at; to look at the rows too would be a wait for the device.
        ridge.add_gram(self.packed, rows, weights if self.balance else None, checked=rows.device.type != "cpu")
        self.cross.index_add_(1, of, (rows * weights[:, None]).mT)
        self.counts.index_add_(0, of, torch.ones_like(of))
        self.mass += weights.sum()
        picked = slice(-self._seen % self._every, None, self._every)  # each example whose number is a multiple
        self._sample.append((new[picked].clone(), of[picked].clone()))
        self._seen, self._waiting = self._seen + len(new), 0
        self._features, self._targets = ([features], [targets]) if self._whole else ([], [])

    @torch.no_grad()
    def settle(self, total: Callable[[Tensor], Tensor] = alone) -> None:
        try:
            self._finite.read(self.classes, all=True)
        except PerpetuneError:
            self._clear()
            raise
        count = int(self.counts.sum())
        if count == 0:
            self._clear()
            return
        standard = ridge.Standard.of(self.packed, self.cross) if self.standardise else None
        unit = ridge.trace(self.packed, self.width) / self.width if standard is None else standard.unit
        if unit == 0:
            self._cannot_tell(count, standard)
            return
        dual = None
        features, of = self._sampled()
        device = self.probe.weight.device
        sample = ridge.Sample(
            self.expand(features.to(self.cross)),
            of,
            self._row_weights[of],
            lambda sums: moved_exactly(total(sums.float().to(device)), sums),  # every device has float32
        )
        # With many rows of equal weight each is a small part of the sums, and the error needs no correction by a
        # sample.
        few = self.balance or count < FAR * self.width
        solve: Callable[[float], ridge.Fit] = functools.partial(
            ridge.primal,
            self.packed,
            self.cross,
            count,
            float(self.mass),
            sample=sample if few else None,
            standard=standard,
        )
        held = sum(map(len, self._features)) == count
        # All processes have to take the same branch. The sum is (number of processes, number that hold all examples).
        processes, holding = total(torch.tensor([1.0, float(held)], device=device)).tolist()
        if processes == holding:
            targets = torch.cat(self._targets)
            weights = self._row_weights[targets] if self.balance else None
            rows = self.expand(torch.cat(self._features).to(self.cross))
            dual = ridge.Dual(rows, targets, len(self.counts), weights, standard)
            solve = dual.fit
        if self.penalty == "chosen":
            start = float(self.chosen)
            fit, tries = ridge.choose(solve, unit, start if start > 0 else None)
            trust = min(1.0, self._expected / ENOUGH) if few and dual is None and start > 0 else 1.0
            damped = start ** (1 - trust) * fit.penalty**trust
            if abs(math.log(damped / fit.penalty)) > ridge.CLOSE:
                del fit  # frees its factor before the next one is computed
                fit, tries = solve(damped), tries + 1
        else:
            fit, tries = solve(self.penalty * unit), 1
        self._solved(fit.weights, standard)
        self.chosen.fill_(fit.penalty)
        if self.given_scale == "calibrated":
            self._calibrate(fit, dual, sample, total, standard)
        self._facts = {
            "kind": "ridge",
            "rows": count,
            "dim": self.width,
            "penalty": fit.penalty,
            "share": fit.penalty / unit,
            "error": fit.error if math.isfinite(fit.error) else None,
            "freedom": fit.freedom,
            "scale": float(self.scale),
            "solver": "primal" if dual is None else "dual",
            "factorisations": tries,
            "bytes": sum(t.numel() * t.element_size() for t in self.additive()),
            "warning": self._warning(count),
            **self._carried,
        }
        self._clear()

    def _solved(self, weights: Tensor, standard: ridge.Standard | None) -> None:
        """Set the classifier to `weights (M, C)`. They act on standardised rows or, without `standard`, on the rows."""
        if standard is None:
            self.weight = weights.to(self.weight)
            return
        self.weight = (standard.inverse[:, None] * weights).to(self.weight)
        self.centre, self.offset = standard.mean.to(self.centre), standard.target.to(self.offset)

    def _cannot_tell(self, count: int, standard: ridge.Standard | None) -> None:
        """Settle when the features of all examples so far are the same.

        Raises:
            PerpetuneError: they are zero, or there is more than one example.
        """
        self._clear()
        zero = standard is None or not bool(standard.mean.any())
        if zero or count > 1:
            raise PerpetuneError(
                f"head: ridge: the features of all {count} examples so far are {'zero' if zero else 'the same'}, so "
                "the "
                "head cannot distinguish classes: check the backbone and its inputs"
            )
        self._solved(self.cross.new_zeros(self.width, len(self.counts)), standard)

    @torch.no_grad()
    def take_out(self, part: Callable[[], tuple[Head | None, Head]], gone: Sequence[str], whole: bool) -> None:
        before, after = part()
        assert isinstance(after, Ridge)
        assert before is None or isinstance(before, Ridge)
        packed, cross, counts, mass = (
            after.packed.double(),
            after.cross.clone(),
            after.counts.clone(),
            after.mass.clone(),
        )
        if before is not None and len(before.packed):
            packed -= before.packed.double()
            cross[:, : before.cross.shape[1]] -= before.cross
            counts[: len(before.counts)] -= before.counts
            mass -= before.mass
        self.packed = (self.packed.double() - packed).to(self._type)
        self.cross[:, : cross.shape[1]] -= cross
        self.counts[: len(counts)] -= counts
        self.mass -= mass
        stay = self.leave_out(gone)
        self.cross, self.weight = self.cross[:, stay], self.weight[:, stay]
        self.counts, self.offset = self.counts[stay], self.offset[stay]
        self.probe.keep_rows(stay)
        self._clear()
        self._solve_again()

    def _solve_again(self) -> None:
        """Solve for the weights from the sums alone, and choose the penalty by them. The scale stays."""
        count = int(self.counts.sum())
        standard = ridge.Standard.of(self.packed, self.cross) if self.standardise else None
        unit = ridge.trace(self.packed, self.width) / self.width if standard is None else standard.unit
        if unit == 0:
            self._cannot_tell(count, standard)
            return
        solve: Callable[[float], ridge.Fit] = functools.partial(
            ridge.primal, self.packed, self.cross, count, float(self.mass), standard=standard
        )
        fit = ridge.choose(solve, unit, None)[0] if self.penalty == "chosen" else solve(self.penalty * unit)
        self._solved(fit.weights, standard)
        self.chosen.fill_(fit.penalty)

    def facts(self) -> dict[str, Any]:
        return self._facts

    def _warning(self, count: int) -> str | None:
        """A warning if there are about as many rows as columns: then the weights interpolate the examples, and with a
        small penalty the error is largest."""
        if not 0.8 <= count / self.width <= 1.25:
            return None
        cure = "the chosen penalty reduces this" if self.penalty == "chosen" else "set penalty: chosen"
        return (
            f"head ridge has seen {count} examples with {self.width} features: a regression overfits most if both "
            f"numbers are about the same; {cure}, or choose a projection well below or above"
        )

    def _sampled(self) -> tuple[Tensor, Tensor]:
        """Features `(m, D)` of a sample of the task's examples, and their rows of the head `(m,)`."""
        if not self._sample:
            return self.cross.new_empty(0, self.dim), self.counts.new_empty(0)
        return torch.cat([f for f, _ in self._sample]), torch.cat([t for _, t in self._sample])

    def _calibrate(
        self,
        fit: ridge.Fit,
        dual: ridge.Dual | None,
        sample: ridge.Sample,
        total: Callable[[Tensor], Tensor],
        standard: ridge.Standard | None,
    ) -> None:
        """Set the scale with the highest likelihood of the leave-one-out scores: the scores that each example would get
        if it alone had not been learned.

        Targets are smoothed by `1 / (n + 2)` (Platt 1999). Without that the best scale would be infinite if all
        examples are classified correctly.
        """
        if dual is not None:
            held_out = dual.leave_one_out(fit.penalty)[:: self._every]
        elif fit.factor is not None and len(sample.rows):
            weights = sample.weights if self.balance else None
            held_out = ridge.leave_one_out(fit.factor, fit.weights, sample.rows, sample.targets, weights, standard)
        else:
            held_out = fit.weights.new_empty(0, len(self.counts))
        known = self.counts > 0
        held_out, targets = held_out[:, known], (known.cumsum(0) - 1)[sample.targets]
        smoothed = functools.partial(F.cross_entropy, reduction="sum", label_smoothing=self._smoothing)
        losses = torch.stack([smoothed(held_out * s, targets) for s in SCALES])
        losses = total(losses.float().to(self.probe.weight.device))
        self.scale.fill_(SCALES[int(losses.argmin())])
