"""What each family of vision transformers calls its parts: the only place that knows.

A row names, relative to a block, where each role is found. Where a family has variants (fused or
separate qkv, plain or gated MLP) a role lists its alternatives, and the first that is there counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from perpetune.errors import UsageError
from perpetune.pets.base import Place, Slot, submodule, walk

__all__ = ["FAMILIES", "MODULE_ROLES", "Family", "Place", "call_linears", "family_of", "places", "roles"]

# Roles that stand for a whole submodule whose input and output are tokens; all others are linear layers.
MODULE_ROLES = ("attn", "mlp", "block")

# A path in the block, and which third of its output rows when the linear is a fused qkv.
Where = tuple[str, int | None]


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: as users know it.
        classes: names of the net's class, one of which it or a base class of it has.
        blocks: path of the sequence of transformer blocks.
        roles: for each role, where it is found in a block; the first alternative that is there counts.
    """

    name: str
    classes: tuple[str, ...]
    blocks: str
    roles: Mapping[str, tuple[Where, ...]]


_TIMM: dict[str, tuple[Where, ...]] = {
    "q": (("attn.q_proj", None), ("attn.qkv", 0)),
    "k": (("attn.k_proj", None), ("attn.qkv", 1)),
    "v": (("attn.v_proj", None), ("attn.qkv", 2)),
    "proj": (("attn.proj", None),),
    "fc1": (("mlp.fc1", None), ("mlp.fc1_x", None)),
    "gate": (("mlp.fc1_g", None),),
    "fc2": (("mlp.fc2", None),),
    "attn": (("attn", None),),
    "mlp": (("mlp", None),),
    "block": (("", None),),
}

_TRANSFORMERS: dict[str, tuple[Where, ...]] = {
    "q": (("attention.q_proj", None),),
    "k": (("attention.k_proj", None),),
    "v": (("attention.v_proj", None),),
    "proj": (("attention.o_proj", None),),
    "fc1": (("mlp.fc1", None), ("mlp.up_proj", None)),
    "gate": (("mlp.gate_proj", None),),
    "fc2": (("mlp.fc2", None), ("mlp.down_proj", None)),
    "attn": (("attention", None),),
    "mlp": (("mlp", None),),
    "block": (("", None),),
}

FAMILIES = (
    Family("timm VisionTransformer", ("VisionTransformer", "VisionTransformerRelPos"), "blocks", _TIMM),
    Family("timm Eva", ("Eva",), "blocks", _TIMM),
    Family("timm Beit", ("Beit",), "blocks", _TIMM),
    Family("transformers ViT", ("ViTModel", "ViTMSNModel"), "layers", _TRANSFORMERS),
    Family("transformers DeiT", ("DeiTModel",), "layers", _TRANSFORMERS),
    Family("transformers DINOv2", ("Dinov2Model", "Dinov2WithRegistersModel"), "encoder.layer", _TRANSFORMERS),
    Family("transformers DINOv3", ("DINOv3ViTModel",), "model.layer", _TRANSFORMERS),
)


@runtime_checkable
class LinearLike(Protocol):
    """What counts as a linear layer: torch's, a 4-bit one, anybody's."""

    in_features: int
    out_features: int


def family_of(net: nn.Module) -> tuple[str, Family]:
    """The family of `net`, and the path of the transformer in it: `""` unless it is a wrapper around one.

    Raises:
        UsageError: no row fits; names the class and the families there are.
    """
    for path, module in _bare_modules(net):
        bases = {base.__name__ for base in type(module).__mro__}
        for family in FAMILIES:
            if bases.intersection(family.classes):
                return path, family
    known = ", ".join(family.name for family in FAMILIES)
    raise UsageError(f"{type(net).__name__} is of no family whose parts are known by role: {known}")


def roles(net: nn.Module) -> tuple[str, ...]:
    """The roles that the blocks of `net` have; UsageError for an unknown family."""
    _, blocks, family = _blocks(net)
    return tuple(role for role in family.roles if _find(blocks[0], family, role) is not None)


def places(net: nn.Module, roles: Sequence[str], blocks: Sequence[int] | None = None) -> list[Place]:
    """The submodules of `net` that play `roles` in `blocks` (None: all), block by block.

    Roles that share one linear layer share one place with several parts. Negative block numbers
    count from the end.

    Raises:
        UsageError: a net of unknown family, a role it lacks, or a block it does not have.
    """
    start, modules, family = _blocks(net)
    found: list[Place] = []
    for block in range(len(modules)) if blocks is None else _checked(blocks, len(modules)):
        at: dict[str, list[tuple[str, int | None, nn.Module]]] = {}
        for role in [r for r in family.roles if r in roles] + [r for r in roles if r not in family.roles]:
            where = _find(modules[block], family, role)
            if where is None:
                has = [r for r in family.roles if _find(modules[block], family, r) is not None]
                raise UsageError(f"{family.name}: block {block} has no role {role!r}; it has {', '.join(has)}")
            at.setdefault(where[0], []).append((role, *where[1:]))
        for path, played in at.items():
            full = f"{start}.{block}.{path}" if path else f"{start}.{block}"
            found.append(_place(full, played, block, modules, family))
    return found


def call_linears(net: nn.Module) -> None:
    """Have timm's EVA and BEiT call their fused qkv, as every other net does.

    By default they read `qkv.weight` past whatever stands around the layer; their own switch
    `qkv_bias_separate` changes that and nothing but the last bits of the output.
    """
    for _, module in _bare_modules(net):
        if vars(module).get("qkv_bias_separate") is False:
            module.qkv_bias_separate = True  # type: ignore[assignment]


def _blocks(net: nn.Module) -> tuple[str, list[nn.Module], Family]:
    """Path of the sequence of blocks, the blocks without slots around them, and the family."""
    path, family = family_of(net)
    start = f"{path}.{family.blocks}" if path else family.blocks
    sequence = submodule(net, start)
    count = len(list(sequence.children())) if sequence is not None else 0
    modules = [submodule(net, f"{start}.{i}") for i in range(count)]
    if not modules or None in modules:
        raise UsageError(f"{type(net).__name__} has no transformer blocks at {start!r}, where {family.name} has them")
    return start, [m for m in modules if m is not None], family


def _find(block: nn.Module, family: Family, role: str) -> tuple[str, int | None, nn.Module] | None:
    for path, third in family.roles.get(role, ()):
        module = submodule(block, path)
        if module is not None and (role in MODULE_ROLES or isinstance(module, LinearLike)):
            return path, third, module
    return None


def _place(
    path: str, played: list[tuple[str, int | None, nn.Module]], block: int, modules: list[nn.Module], family: Family
) -> Place:
    """The place at `path` of one module and the roles it plays, each with the third it has."""
    names, module = tuple(role for role, _, _ in played), played[0][2]
    if names[0] in MODULE_ROLES:
        width = _width(modules[block], family)
        return Place(path, module, names, (), block, width, width, _heads(modules[block], family), len(modules))
    assert isinstance(module, LinearLike)
    rows, third = module.out_features, module.out_features // 3
    parts = sorted((0, rows) if nth is None else (nth * third, (nth + 1) * third) for _, nth, _ in played)
    return Place(path, module, names, tuple(parts), block, module.in_features, rows)


def _width(block: nn.Module, family: Family) -> int:
    """Width of the tokens that the block, its attention and its MLP take in and give out."""
    for role in ("q", "fc1"):
        if (found := _find(block, family, role)) is not None and isinstance(found[2], LinearLike):
            return found[2].in_features
    raise UsageError(f"{family.name}: the block has neither a q nor an fc1 that is a linear layer")


def _heads(block: nn.Module, family: Family) -> int:
    """Heads of the block's attention; 0 where it does not say."""
    found = _find(block, family, "attn")
    for source in (found[2], getattr(found[2], "config", None)) if found is not None else ():
        for name in ("num_heads", "num_attention_heads"):
            if isinstance(heads := getattr(source, name, None), int):
                return heads
    return 0


def _checked(blocks: Sequence[int], count: int) -> list[int]:
    for block in blocks:
        if not -count <= block < count:
            raise UsageError(f"block {block} is out of range: the net has {count} blocks, 0 to {count - 1}")
    return sorted({block % count for block in blocks})


def _bare_modules(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, module) for path, module in walk(net) if not isinstance(module, Slot))
