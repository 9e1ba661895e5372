"""What each family of transformers calls its parts: the only place that knows.

A row names where each role is found: most relative to a block, some relative to the net. Where a family has
variants (fused or separate qkv, plain or gated MLP) a role lists its alternatives, and the first that is there counts.
Vision transformers and the two towers of dual encoders are known by their class. Language models are known by what is
where, for most new ones name their parts as one of a few old ones.

A net may hold several transformers. Each is a `Tower`, named by what it reads. A role such as `q` is one of the tower
that answers; `text.q` and `picture.q` name the tower too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

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
    "Tower",
    "call_linears",
    "places",
    "roles",
    "towers",
    "widths",
]

Reads = Literal["picture", "text"]

# `qkv` is there only where the rows of q, k and v are mixed in one layer, so that none of them can be had alone.
LINEAR_ROLES = ("q", "k", "v", "qkv", "proj", "fc1", "gate", "fc2")
# Roles that stand for a whole submodule whose input and output are tokens.
MODULE_ROLES = ("attn", "mlp", "block")
NORM_ROLES = ("norm1", "norm2", "norm")
OPERATIONS = "operations"
"""Stands for all roles of a net that are one operation each: its linear layers, norms and the patch embedding."""

# A path in the block, and where one linear does the work of several, which of them: of q, k, v or of gate and up.
Where = tuple[str, int | None]


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: as users know it.
        classes: names of the net's class, one of which it or a base class of it has; none where `known_by` decides.
        blocks: path of the sequence of transformer blocks; a net without blocks there is not of the family.
        roles: for each role, where it is found in a block; the first alternative that is there counts.
        once: as `roles`, for what the net has once, relative to it: the convolution that embeds patches, and the
            norm behind the last block.
        known_by: roles that one of the blocks has to have for the net to be of the family.
        reads: what goes into the net; None where its embedding says it: a convolution of patches, or a table of tokens.
    """

    name: str
    classes: tuple[str, ...]
    blocks: str
    roles: Mapping[str, tuple[Where, ...]]
    once: Mapping[str, tuple[Where, ...]]
    known_by: tuple[str, ...] = ()
    reads: Reads | None = None


@dataclass(frozen=True)
class Tower:
    """One transformer in a net.

    Attributes:
        name: what it reads, `picture` or `text`.
        path: where it is in the net; `""` where it is the net itself.
        net: the transformer, never the slot around it.
        family: the row of the table that fits.
    """

    name: Reads
    path: str
    net: nn.Module
    family: Family

    @property
    def sequence(self) -> str:
        """The path of its transformer blocks in the whole net."""
        return self.at(self.family.blocks)

    @property
    def blocks(self) -> list[nn.Module]:
        """Its transformer blocks, without slots around them."""
        return _blocks(self.net, self.family)

    @property
    def norm(self) -> str | None:
        """The path, in the whole net, of the norm behind the last block; None where it has none."""
        found = _find(self.net, self.family.once, "norm")
        return None if found is None else self.at(found[0])

    def at(self, path: str) -> str:
        """A path in the tower as one in the whole net."""
        return f"{self.path}.{path}" if self.path and path else self.path or path

    def roles(self) -> tuple[str, ...]:
        """The roles that any of its blocks has, then those that it has once."""
        return (*_has(self.blocks, self.family.roles), *_has([self.net], self.family.once))


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

# In Gemma the norm before the MLP is not the one that the others have under its old name.
_LLAMA: dict[str, tuple[Where, ...]] = {
    "q": (("self_attn.q_proj", None), ("self_attn.qkv_proj", 0)),
    "k": (("self_attn.k_proj", None), ("self_attn.qkv_proj", 1)),
    "v": (("self_attn.v_proj", None), ("self_attn.qkv_proj", 2)),
    "proj": (("self_attn.o_proj", None), ("self_attn.dense", None), ("self_attn.out_proj", None)),
    "fc1": (
        ("mlp.up_proj", None),
        ("mlp.gate_up_proj", 1),
        ("mlp.fc1", None),
        ("mlp.c_fc", None),
        ("feed_forward.w3", None),
    ),
    "gate": (("mlp.gate_proj", None), ("mlp.gate_up_proj", 0), ("feed_forward.w1", None)),
    "fc2": (("mlp.down_proj", None), ("mlp.fc2", None), ("mlp.c_proj", None), ("feed_forward.w2", None)),
    "attn": (("self_attn", None),),
    "mlp": (("mlp", None), ("feed_forward", None)),
    "block": (("", None),),
    "norm1": (("input_layernorm", None), ("operator_norm", None)),
    "norm2": (("pre_feedforward_layernorm", None), ("post_attention_layernorm", None), ("ffn_norm", None)),
}

_LLAMA_ONCE: dict[str, tuple[Where, ...]] = {
    "norm": (("norm", None), ("final_layernorm", None), ("embedding_norm", None)),
}

_OPT: dict[str, tuple[Where, ...]] = {
    "q": (("self_attn.q_proj", None),),
    "k": (("self_attn.k_proj", None),),
    "v": (("self_attn.v_proj", None),),
    "proj": (("self_attn.out_proj", None),),
    "fc1": (("fc1", None),),
    "fc2": (("fc2", None),),
    "attn": (("self_attn", None),),
    "block": (("", None),),
    "norm1": (("self_attn_layer_norm", None),),
    "norm2": (("final_layer_norm", None),),
}

_GPT: dict[str, tuple[Where, ...]] = {
    "q": (("attn.c_attn", 0), ("attn.q_proj", None), ("attn.attention.q_proj", None)),
    "k": (("attn.c_attn", 1), ("attn.k_proj", None), ("attn.attention.k_proj", None)),
    "v": (("attn.c_attn", 2), ("attn.v_proj", None), ("attn.attention.v_proj", None)),
    "proj": (("attn.c_proj", None), ("attn.out_proj", None), ("attn.attention.out_proj", None)),
    "fc1": (("mlp.c_fc", None), ("mlp.fc_in", None)),
    "fc2": (("mlp.c_proj", None), ("mlp.fc_out", None)),
    "attn": (("attn", None),),
    "mlp": (("mlp", None),),
    "block": (("", None),),
    "norm1": (("ln_1", None),),
    "norm2": (("ln_2", None),),
}

# One layer gives q, k and v of the first head, then those of the second, and so on.
_BY_HEAD: dict[str, tuple[Where, ...]] = {
    "qkv": tuple(
        (path, None)
        for path in ("attention.query_key_value", "self_attention.query_key_value", "self_attn.query_key_value")
    ),
    "proj": (("attention.dense", None), ("self_attention.dense", None), ("self_attn.dense", None)),
    "fc1": (("mlp.dense_h_to_4h", None),),
    "fc2": (("mlp.dense_4h_to_h", None),),
    "attn": (("attention", None), ("self_attention", None), ("self_attn", None)),
    "mlp": (("mlp", None),),
    "block": (("", None),),
    "norm1": (("input_layernorm", None), ("ln_attn", None)),
    "norm2": (("post_attention_layernorm", None), ("ln_mlp", None)),
}

_GPT_ONCE: dict[str, tuple[Where, ...]] = {
    "norm": (("ln_f", None), ("final_layer_norm", None), ("final_layernorm", None)),
}

_CLIP: dict[str, tuple[Where, ...]] = {
    "q": (("self_attn.q_proj", None),),
    "k": (("self_attn.k_proj", None),),
    "v": (("self_attn.v_proj", None),),
    "proj": (("self_attn.out_proj", None),),
    "fc1": (("mlp.fc1", None),),
    "fc2": (("mlp.fc2", None),),
    "attn": (("self_attn", None),),
    "mlp": (("mlp", None),),
    "block": (("", None),),
    "norm1": (("layer_norm1", None),),
    "norm2": (("layer_norm2", None),),
}

# Its norms stand behind attention and MLP. It has no module for the MLP as a whole.
_BERT: dict[str, tuple[Where, ...]] = {
    "q": (("attention.self.query", None),),
    "k": (("attention.self.key", None),),
    "v": (("attention.self.value", None),),
    "proj": (("attention.output.dense", None),),
    "fc1": (("intermediate.dense", None),),
    "fc2": (("output.dense", None),),
    "attn": (("attention.self", None),),
    "block": (("", None),),
    "norm1": (("attention.output.LayerNorm", None),),
    "norm2": (("output.LayerNorm", None),),
}

# Its attention is torch's own, which reads the weights of its layers past whatever stands around them.
_OPEN_CLIP: dict[str, tuple[Where, ...]] = {
    "fc1": (("mlp.c_fc", None),),
    "fc2": (("mlp.c_proj", None),),
    "attn": (("attn", None),),
    "mlp": (("mlp", None),),
    "block": (("", None),),
    "norm1": (("ln_1", None),),
    "norm2": (("ln_2", None),),
}

FAMILIES = (
    *(
        Family(name, classes, blocks, _TIMM, _TIMM_ONCE, reads="picture")
        for name, classes, blocks in (
            ("timm VisionTransformer", ("VisionTransformer", "VisionTransformerRelPos"), "blocks"),
            ("timm Eva", ("Eva",), "blocks"),
            ("timm Beit", ("Beit",), "blocks"),
        )
    ),
    *(
        Family(name, classes, blocks, _TRANSFORMERS, _TRANSFORMERS_ONCE, reads="picture")
        for name, classes, blocks in (
            ("transformers ViT", ("ViTModel", "ViTMSNModel"), "layers"),
            ("transformers DeiT", ("DeiTModel",), "layers"),
            ("transformers DINOv2", ("Dinov2Model", "Dinov2WithRegistersModel"), "encoder.layer"),
            ("transformers DINOv3", ("DINOv3ViTModel",), "model.layer"),
        )
    ),
    Family(
        "transformers CLIP and SigLIP, pictures",
        ("CLIPVisionModel", "SiglipVisionModel", "Siglip2VisionModel"),
        "encoder.layers",
        _CLIP,
        {"patch": (("embeddings.patch_embedding", None),), "norm": (("post_layernorm", None),)},
        reads="picture",
    ),
    Family(
        "transformers CLIP and SigLIP, texts",
        ("CLIPTextModel", "SiglipTextModel", "Siglip2TextModel"),
        "encoder.layers",
        _CLIP,
        {"norm": (("final_layer_norm", None),)},
        reads="text",
    ),
    Family("transformers BERT", ("BertModel", "RobertaModel"), "encoder.layer", _BERT, {}, reads="text"),
    Family(
        "open_clip, pictures",
        ("VisionTransformer",),
        "transformer.resblocks",
        _OPEN_CLIP,
        {"patch": (("conv1", None),), "norm": (("ln_post", None),)},
        reads="picture",
    ),
    Family(
        "open_clip, texts",
        ("TextTransformer", "CLIP"),
        "transformer.resblocks",
        _OPEN_CLIP,
        {"norm": (("ln_final", None),)},
        reads="text",
    ),
    # Its fused layer is a linear one that looks like GPT-2's and may be mixed by head.
    Family(
        "GPT-BigCode",
        ("GPTBigCodeModel",),
        "h",
        {"qkv": (("attn.c_attn", None),), **{r: at for r, at in _GPT.items() if r not in ("q", "k", "v")}},
        _GPT_ONCE,
    ),
    Family("GPT-NeoX", (), "layers", _BY_HEAD, _GPT_ONCE, ("qkv", "proj")),
    Family("Bloom and Falcon", (), "h", _BY_HEAD, _GPT_ONCE, ("qkv", "proj")),
    Family("OPT", (), "layers", _OPT, _GPT_ONCE, ("q", "proj", "fc1", "fc2")),
    Family("Llama and its kin", (), "layers", _LLAMA, _LLAMA_ONCE, ("q", "proj")),
    Family("GPT-2 and its kin", (), "h", _GPT, _GPT_ONCE, ("q", "proj")),
)


@runtime_checkable
class LinearLike(Protocol):
    """What counts as a linear layer: torch's, a 4-bit one, anybody's."""

    in_features: int
    out_features: int


@runtime_checkable
class NormLike(Protocol):
    """What counts as a norm over the width of the tokens: torch's, timm's, anybody's; `_norm_width` knows others."""

    normalized_shape: Sequence[int]


def widths(module: nn.Module) -> tuple[int, int] | None:
    """Widths of input and output of a linear layer, GPT-2's `Conv1D` among them; None for what is none."""
    if isinstance(module, LinearLike):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and isinstance(weight := getattr(module, "weight", None), nn.Parameter):
        return weight.shape[0], weight.shape[1]
    return None


def towers(net: nn.Module, answers: str | None = None) -> dict[str, Tower]:
    """The transformers in `net` whose parts are known by role, by what they read; the one that answers comes first.

    Of two that read the same the outer one counts, or that before the other. In a language model that takes pictures
    too, the text tower answers; in a dual encoder the picture tower does.

    Args:
        answers: the name of the tower that answers, where there is one of that name.

    Raises:
        UsageError: no row of the table fits anything in `net`; names the class and the families there are.
    """
    found: dict[str, Tower] = {}
    for path, module in _text_first(net):
        if any(path.startswith(f"{tower.sequence}.") for tower in found.values()):
            continue  # inside a block
        family = next((family for family in FAMILIES if _is_of(module, family)), None)
        if family is not None:
            name = family.reads or _embedded(net, path)
            found.setdefault(name, Tower(name, path, module, family))
    if not found:
        known = ", ".join(family.name for family in FAMILIES)
        raise UsageError(f"{type(net).__name__} is of no family whose parts are known by role: {known}")
    speaks = getattr(net, "get_output_embeddings", None)
    first = answers or ("text" if callable(speaks) and speaks() is not None else "picture")
    return dict(sorted(found.items(), key=lambda entry: entry[0] != first))


def roles(net: nn.Module, answers: str | None = None) -> tuple[str, ...]:
    """The roles of the tower that answers; where there are several, those of each with its name, as `text.q`, too.

    Raises:
        UsageError: a net of unknown family.
    """
    found = towers(net, answers)
    named = [f"{name}.{role}" for name, tower in found.items() for role in tower.roles()] if len(found) > 1 else []
    return (*next(iter(found.values())).roles(), *named)


def places(
    net: nn.Module, roles: Sequence[str], blocks: Sequence[int] | None = None, answers: str | None = None
) -> list[Place]:
    """The submodules of `net` that play `roles` in `blocks` (None: all), block by block, tower by tower.

    Roles that share one linear layer share one place with several parts. Negative block numbers
    count from the end. What a tower has once comes last, whatever `blocks` are asked for; its block is -1.
    The role `operations` stands for every linear layer, norm and patch embedding of a tower. Where blocks are
    of several kinds (with and without attention, with and without experts) those that lack a role are passed over.

    Args:
        roles: `q` of the tower that answers, or with the name of a tower: `text.q`, `picture.q`.
        blocks: numbers of the blocks, the same in each tower that is asked for.
        answers: the name of the tower that answers; see `towers`.

    Raises:
        UsageError: a net of unknown family, a tower that is not there, a role that none of its blocks has, or a block
            that is not there.
    """
    there = towers(net, answers)
    asked: dict[str, list[str]] = {name: [] for name in there}
    for full in roles:
        name, dot, role = full.rpartition(".")
        if dot and name not in there:
            raise UsageError(
                f"role {full!r}: {type(net).__name__} has no tower {name!r}; its towers are {', '.join(there)}"
            )
        asked[name if dot else next(iter(there))].append(role)
    beside = f"; its towers are {', '.join(there)}" if len(there) > 1 else ""
    return [place for name, some in asked.items() if some for place in _places(there[name], some, blocks, beside)]


def _places(tower: Tower, roles: Sequence[str], blocks: Sequence[int] | None, beside: str) -> list[Place]:
    """The places of `roles` in one tower; `beside` is the end of an error's message."""
    family, modules = tower.family, tower.blocks
    whole = f"the tower {tower.name}" if beside else "the net"
    asked = list(range(len(modules))) if blocks is None else _checked(blocks, len(modules), whole)
    there = (*_has([modules[block] for block in asked], family.roles), *_has([tower.net], family.once))
    if OPERATIONS in roles:
        roles = [*(r for r in roles if r != OPERATIONS), *(r for r in there if r not in MODULE_ROLES)]
    once = [r for r in family.once if r in roles]
    roles = [r for r in roles if r not in once]
    for role in roles:
        if asked and role not in there:
            raise UsageError(f"{family.name}: block {asked[0]} has no role {role!r}; it has {', '.join(there)}{beside}")
    found: list[Place] = []
    for block in asked:
        at: dict[str, list[tuple[str, int | None, nn.Module]]] = {}
        for role in [r for r in family.roles if r in roles]:
            if (where := _find(modules[block], family.roles, role)) is not None:
                at.setdefault(where[0], []).append((role, *where[1:]))
        for inner, played in at.items():
            full = f"{tower.sequence}.{block}.{inner}" if inner else f"{tower.sequence}.{block}"
            found.append(_place(full, played, block, modules, family))
    for role in once:
        where = _find(tower.net, family.once, role)
        if where is None:
            raise UsageError(
                f"{family.name}: {type(tower.net).__name__} has no role {role!r} that a pet can go to{beside}"
            )
        found.append(_place(tower.at(where[0]), [(role, *where[1:])], -1, modules, family))
    return found


def call_linears(net: nn.Module) -> None:
    """Have timm's EVA and BEiT call their fused qkv, as every other net does.

    By default they read `qkv.weight` past whatever stands around the layer; their own switch
    `qkv_bias_separate` changes that and nothing but the last bits of the output.
    """
    for _, module in _bare_modules(net):
        if vars(module).get("qkv_bias_separate") is False:
            module.qkv_bias_separate = True  # type: ignore[assignment]


def _is_of(module: nn.Module, family: Family) -> bool:
    """Whether `module` has the family's class, or looks like one of the family where classes say nothing."""
    bases = {base.__name__ for base in type(module).__mro__}
    if not (bases.intersection(family.classes) if family.classes else family.known_by):
        return False
    blocks = _blocks(module, family)
    if family.known_by and not isinstance(submodule(module, family.blocks), nn.ModuleList):
        return False
    return any(all(_find(block, family.roles, role) for role in family.known_by) for block in blocks)


def _blocks(module: nn.Module, family: Family) -> list[nn.Module]:
    """The blocks of `module` where the family has them, without slots around them; none where there are none."""
    sequence = submodule(module, family.blocks)
    count = 0 if sequence is None else len(list(sequence.children()))
    found = [submodule(module, f"{family.blocks}.{number}") for number in range(count)]
    return [block for block in found if block is not None]


def _embedded(net: nn.Module, path: str) -> Reads:
    """What the transformer at `path` reads, by what is embedded in it, or beside it in what holds it.

    A tower for pictures may have a table of positions, so a convolution says more than a table does.
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
    for path, nth in table.get(role, ()):
        found = submodule(module, path)
        if found is not None and _fits(found, role):
            return path, nth, found
    return None


def _has(modules: Iterable[nn.Module], table: Mapping[str, tuple[Where, ...]]) -> tuple[str, ...]:
    """The roles that any of `modules` has."""
    return tuple(role for role in table if any(_find(module, table, role) is not None for module in modules))


def _fits(module: nn.Module, role: str) -> bool:
    """Whether it is of the kind that plays the role: a family may have `Identity` where another has a norm."""
    if role in NORM_ROLES:
        return _norm_width(module) is not None
    if role == "patch":
        return isinstance(module, nn.Conv2d)
    return role in MODULE_ROLES or widths(module) is not None


def _norm_width(module: nn.Module) -> int | None:
    """Width of the tokens that a norm takes, None for what is none.

    RMSNorm has no one class: each model brings its own, which says its width by its weight alone.
    """
    if isinstance(module, NormLike):
        return module.normalized_shape[-1]
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("Norm") and not list(module.children())
    return len(weight) if named and isinstance(weight, nn.Parameter) and weight.dim() == 1 else None


def _place(
    path: str, played: list[tuple[str, int | None, nn.Module]], block: int, modules: list[nn.Module], family: Family
) -> Place:
    """The place at `path` of one module and the roles it plays, each with which part of it it has."""
    module, names = played[0][2], tuple(role for role, _, _ in played)
    if names[0] in MODULE_ROLES:
        width = _width(modules[block], family)
        return Place(path, module, names, (), block, width, width, _heads(modules[block], family), len(modules))
    if isinstance(module, nn.Conv2d):
        return Place(path, module, names, (), block, module.in_channels, module.out_channels)
    if (linear := widths(module)) is None:
        width = _norm_width(module) or 0
        return Place(path, module, names, (), block, width, width)
    parts = {role: _rows(role, nth, linear[1], modules[block], family) for role, nth, _ in played}
    names = tuple(sorted(names, key=lambda role: parts[role]))
    return Place(path, module, names, tuple(parts[role] for role in names), block, *linear)


def _rows(role: str, nth: int | None, rows: int, block: nn.Module, family: Family) -> tuple[int, int]:
    """From which to which row of a linear layer's output the role goes, where it is the `nth` in it."""
    if nth is None:
        return 0, rows
    sizes = _qkv(rows, block, family) if role in ("q", "k", "v") else (rows // 2, rows // 2)
    return sum(sizes[:nth]), sum(sizes[: nth + 1])


def _qkv(rows: int, block: nn.Module, family: Family) -> tuple[int, int, int]:
    """Rows of q, k and v in one layer: k and v have fewer where they have fewer heads than q."""
    found = _find(block, family.roles, "attn")
    config = getattr(found[2], "config", None) if found is not None else None
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return rows // 3, rows // 3, rows // 3
    pairs = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    if (heads + 2 * pairs) * width != rows:
        raise UsageError(
            f"{family.name}: a fused qkv has {rows} rows, and {heads} + 2 * {pairs} heads of width {width} are "
            f"{(heads + 2 * pairs) * width}; use roles such as proj, fc1, fc2"
        )
    return heads * width, pairs * width, pairs * width


def _width(block: nn.Module, family: Family) -> int:
    """Width of the tokens that the block, its attention and its MLP take in and give out."""
    for role in ("q", "qkv", "fc1"):
        if (found := _find(block, family.roles, role)) is not None and (linear := widths(found[2])) is not None:
            return linear[0]
    raise UsageError(f"{family.name}: the block has neither a q nor an fc1 that is a linear layer")


def _heads(block: nn.Module, family: Family) -> int:
    """Heads of the block's attention; 0 where it does not say."""
    found = _find(block, family.roles, "attn")
    for source in (found[2], getattr(found[2], "config", None)) if found is not None else ():
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
    """Every module with its path; those of the part that reads texts first.

    A model that takes pictures too has a tower for them whose blocks are named like those of a language model.
    """
    found, asked = list(_bare_modules(net)), getattr(net, "get_decoder", None)
    decoder = asked() if callable(asked) else net
    start = next((path for path, module in found if module is decoder), "")
    return sorted(found, key=lambda entry: not entry[0].startswith(start))  # in their order otherwise


def _bare_modules(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, module) for path, module in walk(net) if not isinstance(module, Slot))
