"""What each family of vision transformers calls its parts: the only place that knows.

A row names where each role is found: most relative to a block, some relative to the net. Where a family has
variants (fused or separate qkv, plain or gated MLP) a role lists its alternatives, and the first that is there counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from perpetune.errors import UsageError
from perpetune.pets.base import Place, Slot, submodule, walk

__all__ = [
    "FAMILIES",
    "LINEAR_ROLES",
    "MODULE_ROLES",
    "OPERATIONS",
    "Family",
    "Place",
    "call_linears",
    "family_of",
    "places",
    "roles",
]

LINEAR_ROLES = ("q", "k", "v", "proj", "fc1", "gate", "fc2")
# Roles that stand for a whole submodule whose input and output are tokens.
MODULE_ROLES = ("attn", "mlp", "block")
NORM_ROLES = ("norm1", "norm2", "norm")
OPERATIONS = "operations"
"""Stands for all roles of a net that are one operation each: its linear layers, norms and the patch embedding."""

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
        once: as `roles`, for what the net has once, relative to it: the convolution that embeds patches, and the
            norm behind the last block.
    """

    name: str
    classes: tuple[str, ...]
    blocks: str
    roles: Mapping[str, tuple[Where, ...]]
    once: Mapping[str, tuple[Where, ...]]


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
    "norm1": (("norm1", None),),
    "norm2": (("norm2", None),),
}

# Where features are means of patches, `norm` does nothing and the norm is that of the mean.
_TIMM_ONCE: dict[str, tuple[Where, ...]] = {
    "patch": (("patch_embed.proj", None),),
    "norm": (("norm", None), ("fc_norm", None)),
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
    "norm1": (("norm1", None), ("layernorm_before", None)),
    "norm2": (("norm2", None), ("layernorm_after", None)),
}

_TRANSFORMERS_ONCE: dict[str, tuple[Where, ...]] = {
    "patch": (("embeddings.patch_embeddings.projection", None), ("embeddings.patch_embeddings", None)),
    "norm": (("layernorm", None), ("norm", None)),
}

FAMILIES = (
    Family("timm VisionTransformer", ("VisionTransformer", "VisionTransformerRelPos"), "blocks", _TIMM, _TIMM_ONCE),
    Family("timm Eva", ("Eva",), "blocks", _TIMM, _TIMM_ONCE),
    Family("timm Beit", ("Beit",), "blocks", _TIMM, _TIMM_ONCE),
    Family("transformers ViT", ("ViTModel", "ViTMSNModel"), "layers", _TRANSFORMERS, _TRANSFORMERS_ONCE),
    Family("transformers DeiT", ("DeiTModel",), "layers", _TRANSFORMERS, _TRANSFORMERS_ONCE),
    Family(
        "transformers DINOv2",
        ("Dinov2Model", "Dinov2WithRegistersModel"),
        "encoder.layer",
        _TRANSFORMERS,
        _TRANSFORMERS_ONCE,
    ),
    Family("transformers DINOv3", ("DINOv3ViTModel",), "model.layer", _TRANSFORMERS, _TRANSFORMERS_ONCE),
)


@runtime_checkable
class LinearLike(Protocol):
    """What counts as a linear layer: torch's, a 4-bit one, anybody's."""

    in_features: int
    out_features: int


@runtime_checkable
class NormLike(Protocol):
    """What counts as a norm over the width of the tokens: torch's, timm's, anybody's."""

    normalized_shape: Sequence[int]


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
    """The roles that the blocks of `net` have, then those of the net itself; UsageError for an unknown family."""
    _, blocks, family = _blocks(net)
    return (*_has(blocks[0], family.roles), *_has(_transformer(net)[1], family.once))


def places(net: nn.Module, roles: Sequence[str], blocks: Sequence[int] | None = None) -> list[Place]:
    """The submodules of `net` that play `roles` in `blocks` (None: all), block by block.

    Roles that share one linear layer share one place with several parts. Negative block numbers
    count from the end. What the net has once comes last, whatever `blocks` are asked for; its block is -1.
    The role `operations` stands for every linear layer, norm and patch embedding that the net has.

    Raises:
        UsageError: a net of unknown family, a role it lacks, or a block it does not have.
    """
    start, modules, family = _blocks(net)
    path, transformer = _transformer(net)
    if OPERATIONS in roles:
        there = (*_has(modules[0], family.roles), *_has(transformer, family.once))
        roles = [*(r for r in roles if r != OPERATIONS), *(r for r in there if r not in MODULE_ROLES)]
    once = [r for r in family.once if r in roles]
    roles = [r for r in roles if r not in once]
    found: list[Place] = []
    for block in range(len(modules)) if blocks is None else _checked(blocks, len(modules)):
        at: dict[str, list[tuple[str, int | None, nn.Module]]] = {}
        for role in [r for r in family.roles if r in roles] + [r for r in roles if r not in family.roles]:
            where = _find(modules[block], family.roles, role)
            if where is None:
                has = (*_has(modules[block], family.roles), *_has(transformer, family.once))
                raise UsageError(f"{family.name}: block {block} has no role {role!r}; it has {', '.join(has)}")
            at.setdefault(where[0], []).append((role, *where[1:]))
        for inner, played in at.items():
            full = f"{start}.{block}.{inner}" if inner else f"{start}.{block}"
            found.append(_place(full, played, block, modules, family))
    for role in once:
        where = _find(transformer, family.once, role)
        if where is None:
            raise UsageError(f"{family.name}: {type(transformer).__name__} has no role {role!r} that a pet can go to")
        found.append(_place(f"{path}.{where[0]}" if path else where[0], [(role, *where[1:])], -1, modules, family))
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


def _transformer(net: nn.Module) -> tuple[str, nn.Module]:
    """The transformer in `net`, and its path."""
    path, _ = family_of(net)
    module = submodule(net, path)
    assert module is not None
    return path, module


def _find(
    module: nn.Module, table: Mapping[str, tuple[Where, ...]], role: str
) -> tuple[str, int | None, nn.Module] | None:
    for path, third in table.get(role, ()):
        found = submodule(module, path)
        if found is not None and _fits(found, role):
            return path, third, found
    return None


def _has(module: nn.Module, table: Mapping[str, tuple[Where, ...]]) -> tuple[str, ...]:
    return tuple(role for role in table if _find(module, table, role) is not None)


def _fits(module: nn.Module, role: str) -> bool:
    """Whether it is of the kind that plays the role: a family may have `Identity` where another has a norm."""
    if role in NORM_ROLES:
        return isinstance(module, NormLike)
    if role == "patch":
        return isinstance(module, nn.Conv2d)
    return role in MODULE_ROLES or isinstance(module, LinearLike)


def _place(
    path: str, played: list[tuple[str, int | None, nn.Module]], block: int, modules: list[nn.Module], family: Family
) -> Place:
    """The place at `path` of one module and the roles it plays, each with the third it has."""
    names, module = tuple(role for role, _, _ in played), played[0][2]
    if names[0] in MODULE_ROLES:
        width = _width(modules[block], family)
        return Place(path, module, names, (), block, width, width, _heads(modules[block], family), len(modules))
    if isinstance(module, nn.Conv2d):
        return Place(path, module, names, (), block, module.in_channels, module.out_channels)
    if isinstance(module, NormLike):
        width = module.normalized_shape[-1]
        return Place(path, module, names, (), block, width, width)
    assert isinstance(module, LinearLike)
    rows, third = module.out_features, module.out_features // 3
    parts = sorted((0, rows) if nth is None else (nth * third, (nth + 1) * third) for _, nth, _ in played)
    return Place(path, module, names, tuple(parts), block, module.in_features, rows)


def _width(block: nn.Module, family: Family) -> int:
    """Width of the tokens that the block, its attention and its MLP take in and give out."""
    for role in ("q", "fc1"):
        if (found := _find(block, family.roles, role)) is not None and isinstance(found[2], LinearLike):
            return found[2].in_features
    raise UsageError(f"{family.name}: the block has neither a q nor an fc1 that is a linear layer")


def _heads(block: nn.Module, family: Family) -> int:
    """Heads of the block's attention; 0 where it does not say."""
    found = _find(block, family.roles, "attn")
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
