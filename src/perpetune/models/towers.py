"""The transformers in a net, and which of its submodules has which role, by the table in `families.py`.

A net may hold several transformers. Each is a `Tower`, named by what it reads. A role such as `q` belongs to the tower
that answers; `text.q` and `picture.q` also name the tower.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from torch import nn

from perpetune.errors import UsageError
from perpetune.models.families import FAMILIES, MODULE_ROLES, NORM_ROLES, OPERATIONS, OTHER_ROLES, Family, Reads, Where
from perpetune.pets.base import Place, Slot, submodule, walk


@dataclass(frozen=True)
class Tower:
    """One transformer in a net.

    Attributes:
        name: what it reads, `picture` or `text`.
        path: its path in the net; `""` if it is the net itself.
        net: the transformer, never the slot around it.
        family: the row of the table that fits.
        root: the whole net.
    """

    name: Reads
    path: str
    net: nn.Module
    family: Family
    root: nn.Module

    @property
    def sequence(self) -> str:
        """The path of its transformer blocks in the whole net."""
        return self.at(self.family.blocks)

    @property
    def blocks(self) -> list[nn.Module]:
        """Its transformer blocks, without the slots around them."""
        return _blocks(self.net, self.family)

    @property
    def norm(self) -> str | None:
        """The path, in the whole net, of the norm after the last block; None if there is none."""
        norm = _find(self.net, self.family.once, "norm")
        return None if norm is None else self.at(norm[0])

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths in the whole net of everything that belongs to it: its own, and those of its parts beside it."""
        parts = [found[0] for role in self.family.beside if (found := self.part(role)) is not None]
        start = f"{self.path}." if self.path else ""
        return self.path, *(path for path in parts if not path.startswith(start))

    def at(self, path: str) -> str:
        """Turn a path in the tower into a path in the whole net."""
        return f"{self.path}.{path}" if self.path and path else self.path or path

    def roles(self) -> tuple[str, ...]:
        """The roles that any of its blocks has, then those of the parts that it has once."""
        return (*_has(self.blocks, self.family.roles), *self.single())

    def single(self) -> tuple[str, ...]:
        """The roles of the parts that it has once, in it or beside it."""
        return tuple(role for role in self.family.single if self.part(role) is not None)

    def part(self, role: str) -> tuple[str, int | None, nn.Module] | None:
        """A part that it has once: the path in the whole net, the index in a fused layer, and the submodule; or
        None."""
        found = _find(self.net, self.family.once, role)
        if found is not None:
            return self.at(found[0]), *found[1:]
        parts = self.path.split(".") if self.path else []
        for depth in range(len(parts) - 1, -1, -1):
            around = ".".join(parts[:depth])
            holder = submodule(self.root, around)
            found = None if holder is None else _find(holder, self.family.beside, role)
            if found is not None:
                return f"{around}.{found[0]}" if around else found[0], *found[1:]
        return None


@runtime_checkable
class LinearLike(Protocol):
    """A module that counts as a linear layer: torch's, a 4-bit one, or one of another library."""

    in_features: int
    out_features: int


@runtime_checkable
class NormLike(Protocol):
    """A module that counts as a norm over the width of the tokens: torch's, timm's and others.

    `_norm_width` also recognises norms without this attribute.
    """

    normalized_shape: Sequence[int]


def widths(module: nn.Module) -> tuple[int, int] | None:
    """Widths of input and output of a linear layer, including GPT-2's `Conv1D`; None for other modules."""
    if isinstance(module, LinearLike):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and isinstance(weight := getattr(module, "weight", None), nn.Parameter):
        return weight.shape[0], weight.shape[1]
    return None


def towers(net: nn.Module, answers: str | None = None) -> dict[str, Tower]:
    """The transformers in `net` that belong to a family, by what they read. The one that answers comes first.

    If two of them read the same, the outer one counts, or the first one. In a language model that also takes pictures
    the text tower answers; in a dual encoder the picture tower answers.

    Args:
        answers: the name of the tower that answers, if there is a tower with that name.

    Raises:
        UsageError: no row of the table fits any module of `net`; the message names the class and the known families.
    """
    by_name: dict[str, Tower] = {}
    for path, module in _text_first(net):
        if any(path.startswith(f"{tower.sequence}.") for tower in by_name.values()):
            continue  # inside a block
        family = next((family for family in FAMILIES if _is_of(module, family)), None)
        if family is not None:
            name = family.reads or _embedded(net, path)
            by_name.setdefault(name, Tower(name, path, module, family, net))
    if not by_name:
        known = ", ".join(family.name for family in FAMILIES)
        raise UsageError(
            f"{type(net).__name__} is of no family whose parts are known (`pet: none` uses the frozen features of any "
            f"net for pictures); the known families are {known}"
        )
    output_layer = getattr(net, "get_output_embeddings", None)
    first = answers or ("text" if callable(output_layer) and output_layer() is not None else "picture")
    return dict(sorted(by_name.items(), key=lambda entry: entry[0] != first))


def roles(net: nn.Module, answers: str | None = None) -> tuple[str, ...]:
    """The roles of the tower that answers. With several towers also the roles of each with its name, such as `text.q`.

    Raises:
        UsageError: the net belongs to no known family.
    """
    by_name = towers(net, answers)
    named = [f"{name}.{role}" for name, tower in by_name.items() for role in tower.roles()] if len(by_name) > 1 else []
    return (*next(iter(by_name.values())).roles(), *named)


def places(
    net: nn.Module, roles: Sequence[str], blocks: Sequence[int] | None = None, answers: str | None = None
) -> list[Place]:
    """The submodules of `net` that have `roles` in `blocks` (None: all), tower by tower, block by block.

    Roles that share one linear layer share one place with several parts. Negative block numbers count from the end.
    Parts that a tower has once come last, whatever `blocks` says; their block is -1. The role `operations` stands for
    every linear layer, norm and patch embedding of a tower. If a net has several kinds of blocks (with and without
    attention, with and without experts), the blocks without a role are skipped.

    Args:
        roles: `q` for the tower that answers, or with the name of a tower: `text.q`, `picture.q`.
        blocks: numbers of the blocks, the same in each named tower.
        answers: the name of the tower that answers; see `towers`.

    Raises:
        UsageError: the net belongs to no known family, there is no such tower or block, or no block has the role.
    """
    by_name = towers(net, answers)
    roles_of: dict[str, list[str]] = {name: [] for name in by_name}
    for full in roles:
        name, dot, role = full.rpartition(".")
        if dot and name not in by_name:
            raise UsageError(
                f"role {full!r}: {type(net).__name__} has no tower {name!r}; its towers are {', '.join(by_name)}"
            )
        roles_of[name if dot else next(iter(by_name))].append(role)
    beside = f"; its towers are {', '.join(by_name)}" if len(by_name) > 1 else ""
    return [
        place
        for name, tower_roles in roles_of.items()
        if tower_roles
        for place in _places(by_name[name], tower_roles, blocks, beside)
    ]


def _places(tower: Tower, roles: Sequence[str], blocks: Sequence[int] | None, beside: str) -> list[Place]:
    """The places of `roles` in one tower.

    Args:
        beside: the end of an error message, which names the towers if there are several.
    """
    family, modules = tower.family, tower.blocks
    whole = f"the tower {tower.name}" if beside else "the net"
    numbers = list(range(len(modules))) if blocks is None else _checked(blocks, len(modules), whole)
    known = (*_has([modules[block] for block in numbers], family.roles), *tower.single())
    if OPERATIONS in roles:
        skip = (*MODULE_ROLES, *OTHER_ROLES)
        roles = [*(r for r in roles if r != OPERATIONS), *(r for r in known if r not in skip)]
    once = [r for r in family.single if r in roles]
    roles = [r for r in roles if r not in once]
    for role in roles:
        if numbers and role not in known:
            raise UsageError(
                f"{family.name}: block {numbers[0]} has no role {role!r}; it has {', '.join(known)}{beside}"
            )
    places: list[Place] = []
    for block in numbers:
        at: dict[str, list[tuple[str, int | None, nn.Module]]] = {}
        for role in [r for r in family.roles if r in roles]:
            if (where := _find(modules[block], family.roles, role)) is not None:
                at.setdefault(where[0], []).append((role, *where[1:]))
        for inner, played in at.items():
            full = f"{tower.sequence}.{block}.{inner}" if inner else f"{tower.sequence}.{block}"
            place = _place(full, played, block, modules, family)
            norm = tower.part("norm_pre") if place.roles == ("block",) and block == 0 else None
            places.append(place if norm is None else replace(place, before=norm[2]))
    for role in once:
        where = tower.part(role)
        if where is None:
            raise UsageError(
                f"{family.name}: {type(tower.net).__name__} has no role {role!r} that a pet can go to{beside}"
            )
        places.append(_place(where[0], [(role, *where[1:])], -1, modules, family))
    return places


class Feature(nn.Identity):
    """The place of a tower's result in a dual encoder, `(B, width)`: behind the projection, before it is normalised."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width


def with_features(net: nn.Module, width: int) -> None:
    """Give a dual encoder the places of the role `feature`. Whoever computes its features calls them."""
    net.picture_feature, net.text_feature = Feature(width), Feature(width)


def call_linears(net: nn.Module) -> None:
    """Make timm's EVA and BEiT call their fused qkv, as every other net does.

    By default they read `qkv.weight` directly, so a slot around the layer would have no effect. Their own switch
    `qkv_bias_separate` makes them call the layer; otherwise it changes only the last bits of the output. SigLIP2 calls
    its linear patch embedding, but first asks it for its type.
    """
    for _, module in _bare_modules(net):
        if type(module).__name__ == "Siglip2VisionEmbeddings" and isinstance(module.patch_embedding, nn.Linear):
            module.patch_embedding.asked_for_type = True  # type: ignore[assignment]
        if vars(module).get("qkv_bias_separate") is False:
            module.qkv_bias_separate = True  # type: ignore[assignment]


def _is_of(module: nn.Module, family: Family) -> bool:
    """Whether `module` has the family's class, or for a family without classes the roles of `known_by`."""
    bases = {base.__name__ for base in type(module).__mro__}
    if not (bases.intersection(family.classes) if family.classes else family.known_by):
        return False
    blocks = _blocks(module, family)
    if family.known_by and not isinstance(submodule(module, family.blocks), nn.ModuleList):
        return False
    return any(all(_find(block, family.roles, role) for role in family.known_by) for block in blocks)


def _blocks(module: nn.Module, family: Family) -> list[nn.Module]:
    """The blocks of `module` at the family's path, without the slots around them; empty if there are none."""
    sequence = submodule(module, family.blocks)
    count = 0 if sequence is None else len(list(sequence.children()))
    blocks = [submodule(module, f"{family.blocks}.{number}") for number in range(count)]
    return [block for block in blocks if block is not None]


def _embedded(net: nn.Module, path: str) -> Reads:
    """What the transformer at `path` reads, decided by the embedding in it or in a module that holds it.

    A tower for pictures may have a table of positions as well, so a convolution decides before a table does.
    """
    parts = path.split(".") if path else []
    for depth in range(len(parts), -1, -1):
        inside = [module for _, module in walk(submodule(net, ".".join(parts[:depth])) or net)]
        if any(isinstance(module, nn.Conv2d | nn.Conv3d) for module in inside):
            return "picture"
        if any(isinstance(module, nn.Embedding) for module in inside):
            return "text"
    return "text"


def _find(
    module: nn.Module, table: Mapping[str, tuple[Where, ...]], role: str
) -> tuple[str, int | None, nn.Module] | None:
    """The path of `role` in `module`, the index of its part in a fused layer, and the submodule there; or None."""
    for path, nth in table.get(role, ()):
        part = submodule(module, path)
        if part is not None and _fits(part, role):
            return path, nth, part
    return None


def _has(modules: Iterable[nn.Module], table: Mapping[str, tuple[Where, ...]]) -> tuple[str, ...]:
    """The roles that any of `modules` has."""
    return tuple(role for role in table if any(_find(module, table, role) is not None for module in modules))


def _fits(module: nn.Module, role: str) -> bool:
    """Whether the module can have the role. At the path of a norm, for example, a net may have an `Identity`."""
    if role in NORM_ROLES:
        return _norm_width(module) is not None
    if role == "patch":
        return isinstance(module, nn.Conv2d | nn.Linear)
    if role == "embed":
        return isinstance(module, nn.Embedding)
    if role == "feature":
        return isinstance(module, Feature)
    return role in MODULE_ROLES or widths(module) is not None


def _norm_width(module: nn.Module) -> int | None:
    """Width of the tokens that a norm takes; None if the module is not a norm.

    There is no common class of RMSNorm: each model has its own, and its width is known only from its weight.
    """
    if isinstance(module, NormLike):
        return module.normalized_shape[-1]
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("Norm") and not list(module.children())
    return len(weight) if named and isinstance(weight, nn.Parameter) and weight.dim() == 1 else None


def _place(
    path: str, played: list[tuple[str, int | None, nn.Module]], block: int, modules: list[nn.Module], family: Family
) -> Place:
    """The place at `path` for one module.

    Args:
        played: each role of the module, the index of its part in a fused layer, and the module.
    """
    module, names = played[0][2], tuple(role for role, _, _ in played)
    if names[0] in MODULE_ROLES:
        width = _width(modules[block], family)
        return Place(path, module, names, (), block, width, width, _heads(modules[block], family), len(modules))
    if isinstance(module, nn.Conv2d):
        return Place(path, module, names, (), block, module.in_channels, module.out_channels)
    if isinstance(module, nn.Embedding | Feature):
        width = module.embedding_dim if isinstance(module, nn.Embedding) else module.width
        return Place(path, module, names, (), block, width, width)
    if (linear := widths(module)) is None:
        width = _norm_width(module) or 0
        return Place(path, module, names, (), block, width, width)
    parts = {role: _rows(role, nth, linear[1], modules[block], family) for role, nth, _ in played}
    names = tuple(sorted(names, key=lambda role: parts[role]))
    return Place(path, module, names, tuple(parts[role] for role in names), block, *linear)


def _rows(role: str, nth: int | None, rows: int, block: nn.Module, family: Family) -> tuple[int, int]:
    """The first row, and the row after the last, that the role has in a linear layer's output of `rows` rows.

    Args:
        nth: the index of the role's part in a fused layer; None if the role has the whole layer.
    """
    if nth is None:
        return 0, rows
    sizes = _qkv(rows, block, family) if role in ("q", "k", "v") else (rows // 2, rows // 2)
    return sum(sizes[:nth]), sum(sizes[: nth + 1])


def _qkv(rows: int, block: nn.Module, family: Family) -> tuple[int, int, int]:
    """The numbers of rows of q, k and v in one fused layer. k and v have fewer rows if they have fewer heads than q."""
    attention = _find(block, family.roles, "attn")
    config = getattr(attention[2], "config", None) if attention is not None else None
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return rows // 3, rows // 3, rows // 3
    pairs = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    if (heads + 2 * pairs) * width != rows:
        raise UsageError(
            f"{family.name}: a fused qkv has {rows} rows, but {heads} + 2 * {pairs} heads of width {width} need "
            f"{(heads + 2 * pairs) * width}; use roles such as proj, fc1, fc2"
        )
    return heads * width, pairs * width, pairs * width


def _width(block: nn.Module, family: Family) -> int:
    """Width of the tokens that go into and come out of the block, its attention and its MLP."""
    for role in ("q", "qkv", "fc1"):
        if (layer := _find(block, family.roles, role)) is not None and (linear := widths(layer[2])) is not None:
            return linear[0]
    raise UsageError(f"{family.name}: the block has neither a q nor an fc1 that is a linear layer")


def _heads(block: nn.Module, family: Family) -> int:
    """The number of heads of the block's attention; 0 if neither it nor its config gives the number."""
    attention = _find(block, family.roles, "attn")
    for source in (attention[2], getattr(attention[2], "config", None)) if attention is not None else ():
        for name in ("num_heads", "num_attention_heads"):
            if isinstance(heads := getattr(source, name, None), int):
                return heads
    return 0


def _checked(blocks: Sequence[int], count: int, whole: str) -> list[int]:
    for block in blocks:
        if not -count <= block < count:
            raise UsageError(f"block {block} is out of range: {whole} has {count} blocks, 0 to {count - 1}")
    return sorted({block % count for block in blocks})


def _text_first(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module with its path. The modules of the part that reads texts come first.

    In a model that also takes pictures, the blocks of the picture tower can have the names of a language model's.
    """
    modules, get_decoder = list(_bare_modules(net)), getattr(net, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else net
    start = next((path for path, module in modules if module is decoder), "")
    return sorted(modules, key=lambda entry: not entry[0].startswith(start))  # `sorted` keeps the order otherwise


def _bare_modules(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, module) for path, module in walk(net) if not isinstance(module, Slot))
