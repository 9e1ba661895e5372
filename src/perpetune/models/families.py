"""The table of families: the names that each family of transformers gives to its parts. No other module knows them.

A row of the table gives the path of each role, for most roles relative to a block, for some relative to the net. If a
family has variants (fused or separate qkv, plain or gated MLP), a role lists several paths, and the first that exists
counts. Vision transformers and the two towers of dual encoders are recognised by their class. Language models are
recognised by the paths of their parts, because most new ones use the names of a few old ones. `towers.py` reads the
table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

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
