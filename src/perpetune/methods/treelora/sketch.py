"""True loss gradients of LoRA's `B` in a basis that no task changes: what signatures of tasks are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.numerics.signature import Sketch
from perpetune.pets import LoRA, slots
from perpetune.seeding import generator, seed_of


class GradientSketch:
    """Gradients with respect to the `B` of a LoRA on a fixed `A₀`, beside the one that is trained.

    A linear layer with output `y` and input `x` would read `y + s B A₀ x` with it, so its gradient is
    `s Σ_tokens (∂ℓ/∂y)(A₀ x)ᵀ`: a random projection of the whole matrix's gradient, whatever the trained LoRA has made
    of its own `A` (treelora.md §5.2). It is collected on the way back and changes nothing. A row for each part of
    each LoRA of the set, in the order of their places.

    Args:
        root: the net with the set `name` of LoRAs.
        name: of the set.
        size: numbers that a row is sketched to.
        seed: of `A₀` and of the signs.

    Raises:
        UsageError: a pet of the set is no LoRA.
    """

    def __init__(self, root: nn.Module, name: str, *, size: int = 256, seed: int = 0):
        found = [(path, slot) for path, slot in slots(root) if name in slot.pets]
        self.slots = [slot for _, slot in found]
        self.rows: list[range] = []
        self.parts: list[Sequence[tuple[int, int]]] = []
        self.names: list[str] = []
        self._bases: list[Tensor] = []
        self._shapes: list[tuple[int, int]] = []
        for path, slot in found:
            pet = slot.pet(name)
            if not isinstance(pet, LoRA):
                raise UsageError(
                    f"signatures of tasks are made of LoRA's gradients, and {path} has {type(pet).__name__}"
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
        self._read: tuple[Tensor, int, Tensor] | None = None  # the last input, its version, and it made exact
        self.listening = True
        """Whether passes add to what is collected."""

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Inside, every backward pass adds to what `take` gives."""
        hooks = [slot.register_forward_hook(partial(self._forward, i)) for i, slot in enumerate(self.slots)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._sums, self._read = [None] * len(self._shapes), None

    def gradients(self) -> list[Tensor | None]:
        """What was collected so far, `(rows, rank)` float32 for each part; None where nothing came back."""
        return list(self._sums)

    def take(self) -> Tensor:
        """The sketch `(L, size)`, float32, of the sum of all gradients since the last call; zeros where there were
        none."""
        device = next((s.device for s in self._sums if s is not None), torch.device("cpu"))
        found = torch.zeros(self.shape, device=device)
        for numbers, sketch in self._sketches.items():
            rows = [i for i, s in enumerate(self._sums) if s is not None and s.numel() == numbers]
            if rows:
                found[rows] = sketch(torch.stack([self._flat(i) for i in rows]))
        self._sums, self._read = [None] * len(self._shapes), None
        return found

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
        with torch.autocast(x.device.type, enabled=False):
            seen = x @ self._bases[index].to(x.dtype).T  # (tokens, rank)
        y.register_hook(partial(self._backward, index, seen))

    def _exact(self, x: Tensor) -> Tensor:
        """Inputs `(tokens, d_in)` in float32 or better: gradients cancel over tokens, and rounding does not.

        q, k and v read the same tensor, which is converted once.
        """
        if self._read is None or self._read[0] is not x or self._read[1] != x._version:
            flat = x.detach().flatten(0, -2)
            self._read = x, x._version, flat.to(torch.promote_types(x.dtype, torch.float32))
        return self._read[2]

    def _backward(self, index: int, seen: Tensor, grad: Tensor) -> None:
        flat = grad.detach().flatten(0, -2)
        for row, (start, stop) in zip(self.rows[index], self.parts[index], strict=True):
            # In this order the wide matrix is read as it lies: twice as fast as the other on a CPU.
            value = (seen.mT @ flat[:, start:stop].to(seen.dtype)).mT.float().contiguous()
            held = self._sums[row]
            self._sums[row] = value if held is None else held + value


def in_groups(names: Sequence[str], blocks: Sequence[int], count: int) -> tuple[list[list[int]], list[str]]:
    """Modules in at most `count` groups of about as many blocks each, shallow ones first, and what each is called.

    Args:
        names: paths of the modules.
        blocks: the block each is in; -1 where there is none: those count as the last.
        count: groups wanted.
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
