"""Gradients of the loss with respect to a LoRA's `B` on a basis that no task changes. Signatures are made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.numerics.exact import exactly
from perpetune.numerics.handover import sent
from perpetune.numerics.signature import Sketch
from perpetune.pets import LoRA, slots
from perpetune.seeding import generator, seed_of


class GradientSketch:
    """Gradients with respect to the `B` of an imagined LoRA with a fixed `A₀`, beside the trained one.

    With the imagined LoRA a linear layer with output `y` and input `x` would give `y + s B A₀ x`. So the gradient is
    `s Σ_tokens (∂ℓ/∂y)(A₀ x)ᵀ`, a random projection of the gradient of the layer's whole weight. It does not depend on
    the `A` of the trained LoRA, which every task changes; so gradients of different tasks can be compared. Hooks
    collect it in the backward pass, and nothing else changes. The sketch has a row for each part of each LoRA of the
    set, in the order of their places.

    Args:
        root: the net with the set `name` of LoRAs.
        name: the name of the set.
        size: the length to which a row is sketched.
        seed: the seed of `A₀` and of the signs of the sketch.

    Raises:
        UsageError: a pet of the set is not a LoRA.
    """

    def __init__(self, root: nn.Module, name: str, *, size: int = 256, seed: int = 0):
        carriers = [(path, slot) for path, slot in slots(root) if name in slot.pets]
        self.slots = [slot for _, slot in carriers]
        self.rows: list[range] = []
        self.parts: list[Sequence[tuple[int, int]]] = []
        self.names: list[str] = []
        self._bases: list[Tensor] = []
        self._shapes: list[tuple[int, int]] = []
        for path, slot in carriers:
            pet = slot.pet(name)
            if not isinstance(pet, LoRA):
                raise UsageError(
                    f"signatures of tasks are made of LoRA's gradients, but {path} has {type(pet).__name__}"
                )
            d_in, rank = pet.down.shape[1], pet.rank
            basis = torch.randn(rank, d_in, generator=generator(seed, "signature", path)) * (pet.scale / d_in**0.5)
            self.rows.append(range(len(self._shapes), len(self._shapes) + len(pet.parts)))
            self.parts.append(pet.parts)
            self._bases.append(basis)
            for start, stop in pet.parts:
                self._shapes.append((stop - start, rank))
                self.names.append(path)
        self.shape = (len(self._shapes), size)
        sizes = {rows * rank for rows, rank in self._shapes}
        self._sketches = {n: Sketch(n, size, seed_of(seed, "signature", n) % 2**31) for n in sorted(sizes)}
        self._sums: list[Tensor | None] = [None] * len(self._shapes)
        self._read: tuple[Tensor, int, Tensor] | None = None  # the last input, its version, and its exact copy
        self.listening = True
        """Whether backward passes add to the collected gradients."""

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Inside this context every backward pass adds to the gradients that `take` returns."""
        hooks = [slot.register_forward_hook(partial(self._forward, i)) for i, slot in enumerate(self.slots)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._sums, self._read = [None] * len(self._shapes), None

    def gradients(self) -> list[Tensor | None]:
        """The gradients collected so far, `(rows, rank)` float32 for each part; None for a part without a gradient."""
        return list(self._sums)

    def take(self) -> Tensor:
        """The sketch `(L, size)`, float32, of the sum of all gradients since the last call; rows without a gradient are
        zero."""
        device = next((s.device for s in self._sums if s is not None), torch.device("cpu"))
        result = torch.zeros(self.shape, device=device)
        for numbers, sketch in self._sketches.items():
            rows = [i for i, s in enumerate(self._sums) if s is not None and s.numel() == numbers]
            if rows:
                result.index_copy_(0, sent(rows, device), sketch(torch.stack([self._flat(i) for i in rows])))
        self._sums, self._read = [None] * len(self._shapes), None
        return result

    def _flat(self, row: int) -> Tensor:
        value = self._sums[row]
        assert value is not None
        return value.flatten()

    def _forward(self, index: int, slot: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        if not (self.listening and torch.is_grad_enabled() and isinstance(y, Tensor) and y.requires_grad):
            return
        x = self._exact(args[0])
        if self._bases[index].device != x.device:
            self._bases[index] = self._bases[index].to(x.device)
        with exactly(x.device):
            seen = x @ self._bases[index].to(x.dtype).T  # (tokens, rank)
        y.register_hook(partial(self._backward, index, seen))

    def _exact(self, x: Tensor) -> Tensor:
        """Inputs `(tokens, d_in)` in float32 or better, because gradients cancel over tokens and rounding errors do
        not.

        q, k and v read the same tensor, and it is converted only once.
        """
        if self._read is None or self._read[0] is not x or self._read[1] != x._version:
            flat = x.detach().flatten(0, -2)
            self._read = x, x._version, flat.to(torch.promote_types(x.dtype, torch.float32))
        return self._read[2]

    def _backward(self, index: int, seen: Tensor, grad: Tensor) -> None:
        flat = grad.detach().flatten(0, -2)
        for row, (start, stop) in zip(self.rows[index], self.parts[index], strict=True):
            with exactly(flat.device):
                # This order reads the wide matrix in its memory order; on a CPU it is twice as fast as the other.
                value = (seen.mT @ flat[:, start:stop].to(seen.dtype)).mT.float().contiguous()
            held = self._sums[row]
            self._sums[row] = value if held is None else held + value


def in_groups(names: Sequence[str], blocks: Sequence[int], count: int) -> tuple[list[list[int]], list[str]]:
    """Divide modules into at most `count` groups with about equally many blocks, shallow ones first.

    Args:
        names: paths of the modules.
        blocks: the block of each module; -1 for a module in no block, which goes into the last group.
        count: the wanted number of groups.

    Returns:
        The indices of the modules in each group, and the names of the groups.
    """
    known = sorted({b for b in blocks if b >= 0})
    count = max(1, min(count, len(known)))
    bounds = [known[i * len(known) // count] for i in range(count)] if known else [0]
    groups: list[list[int]] = [[] for _ in bounds]
    for module, block in enumerate(blocks):
        place = sum(block >= bound for bound in bounds) - 1 if block >= 0 else len(bounds) - 1
        groups[place].append(module)
    ends = [*(known[known.index(bound) - 1] for bound in bounds[1:]), known[-1]] if known else [0]
    called = [f"block {a}" if a == b else f"blocks {a}-{b}" for a, b in zip(bounds, ends, strict=True)]
    return groups, called if known else ["all"]
