"""The LoRAs of earlier tasks, one behind the other in tensors that grow: none is trained any more, and all act."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perpetune.methods.base import Resting
from perpetune.methods.parts.bank import set_name
from perpetune.numerics.exact import exactly
from perpetune.numerics.lowrank import Factors
from perpetune.pets import LoRA


class Stack(nn.Module):
    """The pairs `B A` of earlier tasks, for each module of a set of LoRAs. A part of a fused layer counts as a module.

    The `A` of all modules of one shape stand in one tensor, task after task, and so do the `B`. A new task is written
    behind the others, and room is made for many at once. So neither a new task nor a product with all `A` copies them.

    A state stores the pairs of each task once (`resting`); the tensors here are not in `state_dict`.

    Args:
        name: the name under which the method has the stack.
        loras: the LoRAs by their paths, each with the rank of one task.
    """

    def __init__(self, name: str, loras: Mapping[str, LoRA]):
        super().__init__()
        self.name, self.count = name, 0
        pairs = [(pet.rank, pair) for pet in loras.values() for pair in pet.factors()]
        self._ranks = [rank for rank, _ in pairs]
        self._paths = [(path, part) for path, pet in loras.items() for part in range(len(pet.parts))]
        # For each of B and A the modules of one shape, whose values stand in one tensor
        self._groups = {
            "up": alike((rank, b.shape[0]) for rank, (b, _) in pairs),
            "down": alike((rank, a.shape[1]) for rank, (_, a) in pairs),
        }
        for kind, axis in (("up", 0), ("down", 1)):
            for group, modules in enumerate(self._groups[kind]):
                matrix = pairs[modules[0]][1][axis].detach()
                empty = matrix.new_zeros(len(modules), 0, matrix.shape[axis])
                self.register_buffer(f"{kind}-{group}", empty, persistent=False)
        self._resting: dict[str, Resting] = {}

    def append(self, pairs: Sequence[Factors]) -> None:
        """Write the pairs of a task, `B (o, r)` and `A (r, d)` of each module, behind the others."""
        self._make_room(self.count + 1)
        self.count += 1
        for (up, down), (b, a) in zip(self.pairs(self.count - 1), pairs, strict=True):
            up.copy_(b.detach())
            down.copy_(a.detach())
        self._resting[set_name(self.count - 1)] = _OfTask({}, {}, self, self.count - 1)

    def resize(self, count: int) -> None:
        """Have this many tasks, whose values are loaded next. Nothing is kept of those that were there."""
        self.count = 0
        self._make_room(count)
        self.count = count
        self._resting = {set_name(number): _OfTask({}, {}, self, number) for number in range(count)}

    def _make_room(self, count: int) -> None:
        """How much room there is follows from the number of tasks alone. So a run that goes on from a state has tensors
        that lie as those of a run that was not stopped, and products with them have the same bits."""
        for kind, groups in self._groups.items():
            for group, modules in enumerate(groups):
                old, rank = self.get_buffer(f"{kind}-{group}"), self._ranks[modules[0]]
                if old.shape[1] != (rows := rank * roomy(count)):
                    new = old.new_zeros(len(modules), rows, old.shape[2])
                    new[:, : self.count * rank] = old[:, : self.count * rank]
                    setattr(self, f"{kind}-{group}", new)

    # -- reading --------------------------------------------------------------------------------------

    def downs(self) -> list[tuple[list[int], Tensor]]:
        """All `A`, `(modules, tasks r, d)` for each shape, with the numbers of their modules; none without tasks."""
        if not self.count:
            return []
        groups = enumerate(self._groups["down"])
        return [(of, self.get_buffer(f"down-{g}")[:, : self.count * self._ranks[of[0]]]) for g, of in groups]

    def pairs(self, first: int = 0, last: int | None = None) -> list[Factors]:
        """`B` and `A` of each module: of one task, or `[B_first B_…]` and `[A_first; A_…]` of those before `last`."""
        stop = first + 1 if last is None else last
        found: dict[str, dict[int, Tensor]] = {"up": {}, "down": {}}
        for kind, groups in self._groups.items():
            for group, modules in enumerate(groups):
                rank = self._ranks[modules[0]]
                rows = self.get_buffer(f"{kind}-{group}")[:, first * rank : stop * rank]
                found[kind] |= zip(modules, rows.unbind(), strict=True)
        return [(found["up"][m].mT, found["down"][m]) for m in range(len(self._ranks))]

    def bytes(self) -> int:
        """The bytes of all pairs."""
        return sum(matrix.nbytes for pair in self.pairs(0, self.count) for matrix in pair)

    # -- acting ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, loras: Sequence[LoRA], *, added: bool = False) -> None:
        """Let the pairs of all tasks act in these LoRAs, beside their trained pairs.

        A block of tasks is as many as cost no more than one matrix of the layer's size. A full block is added to such a
        matrix, and the tasks behind it act as joined pairs; so what acts does not grow with the tasks. It follows from
        the pairs alone, whether they came one by one or all at once: the same blocks are added in the same order.

        Args:
            added: whether all but the last task act already.
        """
        first = 0
        for lora in loras:
            modules = range(first, first + len(lora.parts))
            first = modules.stop
            block = block_of(lora, self._ranks[modules.start])
            full, behind = divmod(self.count, block)
            done, dense = (full - (behind == 0), lora.rest_dense) if added else (0, None)
            for number in range(done, full):
                up, down = self._joined(lora, modules, number * block, (number + 1) * block)
                with exactly(down.device):
                    dense = up @ down if dense is None else dense.add_(up @ down)
            lora.lean_on(self._joined(lora, modules, full * block, self.count) if behind else None, dense)

    def _joined(self, lora: LoRA, modules: Iterable[int], first: int, last: int) -> Factors:
        """The pairs of some tasks as one `B (d_out, k)` and `A (k, d_in)`, in tensors of their own."""
        pairs = self.pairs(first, last)
        ups, downs = zip(*(pairs[m] for m in modules), strict=True)
        up, down = torch.block_diag(*ups), torch.cat(downs)
        rows = torch.cat([torch.arange(start, stop) for start, stop in lora.parts]).to(up.device)
        return up.new_zeros(lora.d_out, len(down)).index_copy_(0, rows, up), down

    # -- storing --------------------------------------------------------------------------------------

    def resting(self) -> Mapping[str, Resting]:
        """The pairs of each task, by the name of its set."""
        return self._resting

    def tensors(self, number: int) -> dict[str, Tensor]:
        """The pairs of a task, by their paths in the method."""
        found: dict[str, Tensor] = {}
        for (path, part), (up, down) in zip(self._paths, self.pairs(number), strict=True):
            start = f"{self.name}.{set_name(number)}.{path}"
            found |= {f"{start}.up.{part}": up, f"{start}.down.{part}": down}
        return found


@dataclass(frozen=True, eq=False)
class _OfTask(Resting):
    """One task of a stack. Its tensors are looked up each time, because they lie elsewhere when the stack has grown."""

    stack: Stack
    number: int

    def tensors(self) -> dict[str, Tensor]:
        return self.stack.tensors(self.number)


def block_of(lora: LoRA, rank: int) -> int:
    """How many tasks of that rank have a joined `B A` that costs no more than a matrix of the layer's size; or 1."""
    d_out, d_in = lora.d_out, lora.down.shape[1]
    return max(1, d_out * d_in // ((d_out + d_in) * len(lora.parts) * rank))


def roomy(count: int) -> int:
    """For how many tasks there is room if there are `count`: up to a quarter more, so that room is made seldom."""
    step = 1 << max(2, count.bit_length() - 3)
    return -(-count // step) * step


def alike(forms: Iterable[Hashable]) -> list[list[int]]:
    """The positions of equal forms, in one list for each."""
    found: dict[Hashable, list[int]] = {}
    for position, form in enumerate(forms):
        found.setdefault(form, []).append(position)
    return list(found.values())
