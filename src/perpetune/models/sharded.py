"""`run.shard: fsdp`: each process holds a part of the frozen model, by torch's FSDP2 (`fully_shard`).

Every transformer block is one unit, and so is every big layer outside of the blocks: a table of tokens, an output
layer. A unit is whole while it computes, forward and backward, and each process holds its share of it otherwise. All
else is whole in each process: pets, heads, what protection keeps, and the small tensors outside of the blocks.

No unit contains another one, and the net itself is none. So a unit may be called from anywhere, however the net is
entered. Pets in a block do not belong to its unit. `perpetune.meeting` lets processes differ in what they call.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from perpetune.errors import UsageError
from perpetune.meeting import gathered, meeting
from perpetune.models.backbone import Backbone
from perpetune.models.towers import towers
from perpetune.pets.base import frozen, slots, submodule, walk

LEAST = 0.01  # share of the frozen parameters from which a layer outside of the blocks is a unit
MUCH = 0.1  # share of the frozen parameters from which the user is told what is not cut
LAYERS = (nn.Linear, nn.Embedding, nn.Conv2d)
ALONE = (
    "run.shard: fsdp needs several processes, and this is the only one: start it with `accelerate launch` or "
    "`torchrun`, or leave run.shard out"
)


class Unit:
    """A module whose parameters are shared out; a part of the `meeting`.

    Attributes:
        module: what torch made of the module.
        number: its number in the meeting.
        shares: what this process holds of each parameter.
        places: where each of its tensors is, by the name that it has in `pets.base.frozen`.
    """

    number: int

    def __init__(self, module: nn.Module, kept: Collection[nn.Parameter], mesh: Any, names: Mapping[int, list[str]]):
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        owned = [(m, key, p) for m in module.modules() for key, p in m.named_parameters(recurse=False) if p not in kept]
        self.places = {name: (m, key) for m, key, p in owned for name in names[p.data_ptr()]}
        # Its first call makes a module the root of its tree, and torch would leave a root whole after its forward pass
        cut: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=set(kept))
        cut.set_custom_all_gather(self)
        self.module = cut
        self.group = mesh.get_group()
        self.shares = [p for p in self.module.parameters() if isinstance(p, DTensor)]

    # What FSDP2 asks to gather: `torch.distributed.fsdp.AllGather`

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a whole unit."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        """Gather the unit from all processes."""
        return meeting.gather(self.number, output_tensor, input_tensor, group, async_op)

    # What the meeting asks

    @torch.no_grad()
    def send(self) -> None:
        mine = torch.cat([_padded(share).view(torch.uint8) for share in self.shares])
        gathered(mine.new_empty(self.group.size() * mine.numel()), mine, group=self.group)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside this context the module has its parameters."""
        self.module.unshard()
        try:
            yield
        finally:
            self.module.reshard()

    @property
    def bytes(self) -> int:
        """How many bytes of it this process holds."""
        return sum(share.to_local().nbytes for share in self.shares)

    @property
    def whole_bytes(self) -> int:
        """How many bytes it has in all processes together."""
        return sum(share.numel() * share.element_size() for share in self.shares)


@dataclass
class Sharded:
    """What is shared out of a backbone, and how much of it lies here.

    Attributes:
        units: in the order of their paths in the net.
        here: the bytes of frozen parameters that this process holds.
        all: the bytes of all frozen parameters.
        uncut: the bytes of those that are whole in each process.
    """

    units: list[Unit]
    here: int
    all: int
    uncut: int

    @property
    def note(self) -> str:
        """A line about a model of which much is not cut; else empty."""
        if self.uncut <= MUCH * self.all:
            return ""
        return (
            f"run.shard: {self.uncut / self.all:.0%} of the frozen model stays whole in each process, because it is in "
            "no block and in no layer that can be cut"
        )

    def tensors(self, net: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The frozen tensors of the net, whole, with their names in `pets.base.frozen` and in that order."""
        here = frozen(net)
        units = {name: unit for unit in self.units for name in unit.places}
        for unit, names in itertools.groupby(sorted(here), units.get):
            if unit is None:
                yield from ((name, here[name]) for name in names)
                continue
            with unit.whole():
                for name in names:
                    module, key = unit.places[name]
                    # A copy, because numpy may hold what it is given, and then torch cannot free the unit
                    yield name, module.get_parameter(key).detach().clone()

    @contextlib.contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Inside this context the parameters of a module are whole, for code that reads them instead of calling it."""
        with contextlib.ExitStack() as stack:
            for unit in self.units:
                if any(part is module for part in unit.module.modules()):
                    stack.enter_context(unit.whole())
            yield


def shard(backbone: Backbone, device: torch.device, world: int) -> Sharded:
    """Share the frozen parameters of a backbone out among all processes. Every process calls it alike.

    Args:
        device: where the shares lie.
        world: the number of processes.

    Raises:
        UsageError: the blocks of the net are not known, or the net is in 4 bits.
    """
    from torch.distributed.device_mesh import init_device_mesh

    blocks = _blocks(backbone)
    _check_torch()
    pets = {p for _, slot in slots(backbone.net) for p in slot.pets.parameters()}
    total = sum(p.nbytes for p in set(backbone.net.parameters()) - pets)
    layers, tied = _layers(backbone, blocks, LEAST * total)
    paths = {id(module): path for path, module in walk(backbone.net)}
    modules = sorted([*blocks, *layers], key=lambda module: paths[id(module)])
    owners = Counter(p for module in modules for p in set(module.parameters()))
    # Two units must not own one tensor, and a tensor without an axis cannot be cut
    kept = pets | {p for p, count in owners.items() if count > 1 or p.dim() == 0}
    names: dict[int, list[str]] = {}
    for name, tensor in frozen(backbone.net).items():
        names.setdefault(tensor.data_ptr(), []).append(name)
    mesh = init_device_mesh(device.type, (world,))
    units = []
    for module in modules:
        with _holding(module, tied.get(module)):
            units.append(Unit(module, kept, mesh, names))
        if module in tied:
            _called_through(module, tied[module])
    for unit, number in zip(units, meeting.join(units), strict=True):
        unit.number = number
    uncut = total - sum(unit.whole_bytes for unit in units)
    return Sharded(units, uncut + sum(unit.bytes for unit in units), total, uncut)


def _check_torch() -> None:
    from torch.distributed import fsdp

    if not hasattr(getattr(fsdp, "FSDPModule", None), "set_custom_all_gather"):
        raise UsageError(f"run.shard: fsdp needs torch 2.9 or later, and this is {torch.__version__}")


def _blocks(backbone: Backbone) -> list[nn.Module]:
    if backbone.quantised_from is not None:
        raise UsageError(
            f"run.shard: {backbone.spec} is in 4 bits, and such a net is not shared out: leave run.shard out, or load "
            "it without quantise"
        )
    try:
        found = towers(backbone.net)
    except UsageError as error:
        raise UsageError(
            f"run.shard: the blocks of {backbone.spec} are not known, so it cannot be shared out: leave run.shard out"
        ) from error
    return list({id(block): block for tower in found.values() for block in tower.blocks}.values())


def _layers(
    backbone: Backbone, blocks: Sequence[nn.Module], least: float
) -> tuple[list[nn.Module], dict[nn.Module, nn.Module]]:
    """The layers outside of the blocks that are units, of at least so many bytes, and for a table of tokens the output
    layer that has the same weight.

    Only layers that are called count: torch's own attention reads the weights of its layers, and a projector of a
    vision-language model is copied.
    """
    apart = [*blocks, *(m for m in backbone.net.modules() if isinstance(m, nn.MultiheadAttention))]
    path = None if backbone.pictures is None else backbone.pictures.projector
    if path is not None and (projector := submodule(backbone.net, path)) is not None:
        apart.append(projector)
    inside = {module for part in apart for module in part.modules()}
    found = [m for _, m in walk(backbone.net) if isinstance(m, LAYERS) and m not in inside]
    found = [m for m in dict.fromkeys(found) if all(p.is_floating_point() for p in m.parameters())]
    found = [m for m in found if sum(p.nbytes for p in m.parameters()) >= least]
    tied: dict[nn.Module, nn.Module] = {}
    for table in [m for m in found if isinstance(m, nn.Embedding)]:
        same = [m for m in found if m is not table and m.weight is table.weight]
        if len(same) == 1 and isinstance(same[0], nn.Linear):
            tied[table] = same[0]
    return [m for m in found if m not in tied.values()], tied


@contextlib.contextmanager
def _holding(module: nn.Module, other: nn.Module | None) -> Iterator[None]:
    """Inside this context the other module belongs to the first, so that torch cuts what both have."""
    if other is not None:
        module.add_module("tied", other)
    try:
        yield
    finally:
        if other is not None:
            del module.tied


def _called_through(table: Any, output: nn.Module) -> None:
    """Let a call of the output layer be a call of the unit of the table of tokens, whose weight it has."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    def answered(_table: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(output).forward(output, *args, **kwargs)

    table.answered = MethodType(answered, table)
    register_fsdp_forward_method(table, "answered")
    output.forward = table.answered


def _padded(share: Any) -> Tensor:
    """The share of this process as it is sent: `(n,)`, as many numbers in all processes; zeros fill a short one."""
    local = share.to_local().reshape(-1)
    parts = share.device_mesh.size()
    rows = -(-share.shape[0] // parts)
    return functional.pad(local, (0, rows * (share.numel() // max(1, share.shape[0])) - local.numel()))
