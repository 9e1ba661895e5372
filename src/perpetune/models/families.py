"""The table of families: the names that each family of transformers gives to its parts. No other module knows them.

A row of the table gives the path of each role, for most roles relative to a block, for some relative to the net. If a
family has variants (fused or separate qkv, plain or gated MLP), a role lists several paths, and the first that exists
counts. Vision transformers and the two towers of dual encoders are recognised by their class. Language models are
recognised by the paths of their parts, because most new ones use the names of a few old ones.

A net may hold several transformers. Each is a `Tower`, named by what it reads. A role such as `q` belongs to the tower
that answers; `text.q` and `picture.q` also name the tower.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

# A layer has the role `qkv` only if the rows of q, k and v are mixed in it, so that none can be selected alone.
LINEAR_ROLES = ("q", "k", "v", "qkv", "proj", "fc1", "gate", "fc2")
# Roles of whole submodules whose input and output are tokens.
MODULE_ROLES = ("attn", "mlp", "block")
NORM_ROLES = ("norm1", "norm2", "norm_pre", "norm")
# Roles that are no single operation on tokens of a tower: the table of tokens, what follows the tower, and its result.
OTHER_ROLES = ("embed", "out", "feature")
OPERATIONS = "operations"
"""The role that stands for all roles of single operations: linear layers, norms and the patch embedding."""

# A path in the block, and for a fused layer the index of the part: among q, k, v, or among gate and up.
Where = tuple[str, int | None]


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: the name that users see.
        classes: names of classes. A net of the family has one of them as its class or as a base class. Empty if
            `known_by` decides.
        blocks: path of the sequence of transformer blocks; a net without blocks there does not belong to the family.
        roles: the possible paths of each role in a block; the first that exists counts.
        once: as `roles`, for the parts that the net has once, with paths relative to the net: the convolution that
            embeds patches, and the norm after the last block.
        beside: as `once`, for parts that belong to the tower and are outside of it, in a module that holds it: the
            projection of a dual encoder, and the place behind it. The nearest such module counts.
        known_by: roles that one of the blocks needs to have, or the net does not belong to the family.
        reads: what goes into the net; None if its embedding decides: a convolution of patches, or a table of tokens.
    """

    name: str
    classes: tuple[str, ...]
    blocks: str
    roles: Mapping[str, tuple[Where, ...]]
    once: Mapping[str, tuple[Where, ...]]
    beside: Mapping[str, tuple[Where, ...]] = field(default_factory=dict)
    known_by: tuple[str, ...] = ()
    reads: Reads | None = None

    @property
    def single(self) -> tuple[str, ...]:
        """The roles of parts that a net has once. `out` can be inside of a tower or beside it."""
        return tuple(dict.fromkeys((*self.once, *self.beside)))


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

# If the features are means of patches, timm's `norm` is an identity, and `fc_norm` acts on the mean.
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

# In Gemma the norm before the MLP is `pre_feedforward_layernorm`; in the others it is `post_attention_layernorm`.
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

# One layer computes q, k and v of the first head, then those of the second head, and so on.
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

# Its norms come after attention and MLP. It has no module for the whole MLP.
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

# Its attention is torch's own. It reads the weights of its layers directly, so a slot around them would have no effect.
# `loaders.openclip` replaces it by a `SplitAttention`, which has layers.
_OPEN_CLIP: dict[str, tuple[Where, ...]] = {
    "q": (("attn.qkv", 0),),
    "k": (("attn.qkv", 1),),
    "v": (("attn.qkv", 2),),
    "proj": (("attn.proj", None),),
    "fc1": (("mlp.c_fc", None),),
    "fc2": (("mlp.c_proj", None),),
    "attn": (("attn", None),),
    "mlp": (("mlp", None),),
    "block": (("", None),),
    "norm1": (("ln_1", None),),
    "norm2": (("ln_2", None),),
}

# Its tokens have no axis of pictures, so no role of a whole submodule is in the table.
_QWEN_PICTURES: dict[str, tuple[Where, ...]] = {
    "q": (("attn.qkv", 0),),
    "k": (("attn.qkv", 1),),
    "v": (("attn.qkv", 2),),
    "proj": (("attn.proj", None),),
    "fc1": (("mlp.up_proj", None),),
    "gate": (("mlp.gate_proj", None),),
    "fc2": (("mlp.down_proj", None),),
    "norm1": (("norm1", None),),
    "norm2": (("norm2", None),),
}

# Of dual encoders: `head.proj` is open_clip's, around a picture tower of timm.
_PICTURE_SIDE: dict[str, tuple[Where, ...]] = {
    "out": (("visual_projection", None), ("head.proj", None)),
    "feature": (("picture_feature", None),),
}
_TEXT_SIDE: dict[str, tuple[Where, ...]] = {
    "out": (("text_projection", None),),
    "feature": (("text_feature", None),),
}

FAMILIES = (
    *(
        Family(name, classes, blocks, _TIMM, _TIMM_ONCE, _PICTURE_SIDE, reads="picture")
        for name, classes, blocks in (
            ("timm VisionTransformer", ("VisionTransformer", "VisionTransformerRelPos", "PlainTimmViT"), "blocks"),
            ("timm Eva", ("Eva",), "blocks"),
            ("timm Beit", ("Beit",), "blocks"),
        )
    ),
    *(
        Family(name, classes, blocks, _TRANSFORMERS, _TRANSFORMERS_ONCE, _PICTURE_SIDE, reads="picture")
        for name, classes, blocks in (
            ("transformers ViT", ("ViTModel", "ViTMSNModel", "PlainViT"), "layers"),
            ("transformers DeiT", ("DeiTModel",), "layers"),
            ("transformers DINOv2", ("Dinov2Model", "Dinov2WithRegistersModel", "PlainDinov2"), "encoder.layer"),
            ("transformers DINOv3", ("DINOv3ViTModel",), "model.layer"),
        )
    ),
    Family(
        "transformers CLIP and SigLIP, pictures",
        ("CLIPVisionModel", "SiglipVisionModel", "Siglip2VisionModel"),
        "encoder.layers",
        _CLIP,
        {
            "patch": (("embeddings.patch_embedding", None),),
            "norm_pre": (("pre_layrnorm", None),),  # so spelt in transformers; CLIP alone has it
            "norm": (("post_layernorm", None),),
        },
        _PICTURE_SIDE,
        reads="picture",
    ),
    Family(
        "Qwen2.5-VL, pictures",
        ("Qwen2_5_VisionTransformerPretrainedModel",),
        "blocks",
        _QWEN_PICTURES,
        {},
        reads="picture",
    ),
    Family(
        "transformers CLIP and SigLIP, texts",
        ("CLIPTextModel", "SiglipTextModel", "Siglip2TextModel"),
        "encoder.layers",
        _CLIP,
        {
            "embed": (("embeddings.token_embedding", None),),
            "norm": (("final_layer_norm", None),),
            "out": (("head", None),),  # SigLIP
        },
        _TEXT_SIDE,
        reads="text",
    ),
    Family(
        "transformers BERT",
        ("BertModel", "RobertaModel"),
        "encoder.layer",
        _BERT,
        {"embed": (("embeddings.word_embeddings", None),)},
        _TEXT_SIDE,
        reads="text",
    ),
    Family(
        "open_clip, pictures",
        ("VisionTransformer",),
        "transformer.resblocks",
        _OPEN_CLIP,
        {"patch": (("conv1", None),), "norm_pre": (("ln_pre", None),), "norm": (("ln_post", None),)},
        _PICTURE_SIDE,
        reads="picture",
    ),
    Family(
        "open_clip, texts",
        ("TextTransformer", "CLIP"),
        "transformer.resblocks",
        _OPEN_CLIP,
        {"embed": (("token_embedding", None),), "norm": (("ln_final", None),)},
        _TEXT_SIDE,
        reads="text",
    ),
    # Its fused layer is a linear layer with GPT-2's name, but its rows may be mixed by head.
    Family(
        "GPT-BigCode",
        ("GPTBigCodeModel",),
        "h",
        {"qkv": (("attn.c_attn", None),), **{r: at for r, at in _GPT.items() if r not in ("q", "k", "v")}},
        _GPT_ONCE,
    ),
    Family("GPT-NeoX", (), "layers", _BY_HEAD, _GPT_ONCE, known_by=("qkv", "proj")),
    Family("Bloom and Falcon", (), "h", _BY_HEAD, _GPT_ONCE, known_by=("qkv", "proj")),
    Family("OPT", (), "layers", _OPT, _GPT_ONCE, known_by=("q", "proj", "fc1", "fc2")),
    Family("Llama and its kin", (), "layers", _LLAMA, _LLAMA_ONCE, known_by=("q", "proj")),
    Family("GPT-2 and its kin", (), "h", _GPT, _GPT_ONCE, known_by=("q", "proj")),
)


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
