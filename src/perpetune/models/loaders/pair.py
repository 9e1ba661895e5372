"""The loader of pairs: a backbone of pictures and a language model, with a projector between them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.data.pictured.marks import MARK, Mark
from perpetune.data.pictured.view import PicturedView
from perpetune.data.pictures.view import PictureView
from perpetune.data.texts.view import TextView
from perpetune.errors import PerpetuneError, UsageError, closest
from perpetune.models.backbone import Backbone
from perpetune.models.loaders.causal_lm import Dtype, Length, hidden_states
from perpetune.models.loaders.folder import load_folder
from perpetune.models.loaders.hf import load_hf
from perpetune.models.loaders.openclip import load_openclip
from perpetune.models.loaders.options import Side
from perpetune.models.loaders.packaged import load_packaged
from perpetune.models.loaders.timm import load_timm
from perpetune.models.loaders.vision_language import count_of
from perpetune.models.picture_side import PictureSide
from perpetune.models.towers import towers
from perpetune.plain import Malformed, parse_yaml

LOADERS: dict[str, Callable[..., Backbone]] = {
    "hf": load_hf,
    "folder": load_folder,
    "timm": load_timm,
    "openclip": load_openclip,
    "perpetune": load_packaged,
}
TOWER, PROJECTOR = "picture_tower", "picture_projector"
"""The names of the parts that the language model gets."""


class Projector(nn.Module):
    """Turns states of pictures into embeddings of tokens: a norm, and two linear layers with a GELU between them.

    Args:
        d_in: width of the states.
        d_out: width of the embeddings.
    """

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.norm = nn.LayerNorm(d_in)
        self.linear_1 = nn.Linear(d_in, d_out)
        self.linear_2 = nn.Linear(d_out, d_out)

    def forward(self, states: Tensor) -> Tensor:
        hidden = F.gelu(self.linear_1(self.norm(states.to(self.norm.weight.dtype))))
        embeddings: Tensor = self.linear_2(hidden)
        return embeddings


def load_pair(
    rest: str,
    *,
    pretrained: bool = True,
    image_size: Side | None = None,
    architecture: str | None = None,
    pool: Annotated[int, Field(ge=1)] | None = None,
    dtype: Dtype | None = None,
    max_length: Length | None = None,
    chat: bool | None = None,
    gradient_checkpointing: bool | None = None,
) -> Backbone:
    """`pair:{picture: SPEC, text: SPEC, projector: FILE}`: a backbone of pictures and a language model, GGUF too.

    Args:
        image_size: of the backbone of pictures.
        architecture: timm's name of that backbone, for a folder of weights without a `config.json`.
        pool: the side of the grid to which the states of patches are averaged, so that a picture has `pool · pool`
            tokens; None keeps all.

    The other options are those of the language model. Without `projector`, a safetensors file, it is drawn at random.

    Raises:
        UsageError: a part is missing, or is of the wrong kind.
        PerpetuneError: the tensors in the file are not those of a projector between these two.
    """
    spec = f"pair:{rest}"
    parts = parts_of(rest)
    shape = {"image_size": image_size, "architecture": architecture, "pretrained": pretrained}
    vision = _part(spec, parts["picture"], "pictures", shape)
    given = {"dtype": dtype, "max_length": max_length, "chat": chat, "gradient_checkpointing": gradient_checkpointing}
    language = _part(spec, parts["text"], "texts", {**given, "pretrained": pretrained})
    view, picture, net = language.preprocess, vision.preprocess, language.net
    assert isinstance(view, TextView) and isinstance(picture, PictureView)
    states = _States(vision, pool)
    net.add_module(TOWER, vision.net)
    width = language.dim
    with torch.no_grad():
        seen = states(net, torch.zeros(1, 3, picture.size, picture.size)).shape[2]
    projector = Projector(seen, width)
    file = parts.get("projector")
    if file is None:
        _draw(projector, net)
        warnings.warn(f"{spec}: no projector is given: it is drawn at random, and has to be trained", stacklevel=2)
    else:
        _fill(spec, projector, file)
    net.add_module(PROJECTOR, projector)
    count = count_of(spec, net, states, PROJECTOR, picture)
    token = _placeholder(view.tokenizer)
    backbone = Backbone(
        net,
        spec=spec,
        dim=width,
        preprocess=PicturedView(
            view.tokenizer,
            picture=picture,
            mark=Mark(token, count, MARK, MARK),
            max_length=view.max_length,
            chat=view.chat,
            rows=view.rows,
        ),
        forward=hidden_states,
        pictures=PictureSide(
            token=token, count=count, tower=states, path=TOWER, projector=PROJECTOR, drawn=file is None
        ),
    )
    backbone.opens = language.opens
    return backbone


def parts_of(rest: str) -> dict[str, str]:
    """The parts of a pair by name: `picture`, `text` and possibly `projector`.

    Raises:
        UsageError: it is not of that form.
    """
    form = "pair:{picture: SPEC, text: SPEC, projector: FILE} is expected; projector may be left out"
    try:
        found = parse_yaml(rest)
    except Malformed as error:
        raise UsageError(f"backbone pair:{rest}: {error}; {form}") from error
    names = {"picture", "text", "projector"}
    if not isinstance(found, Mapping) or not all(isinstance(value, str) for value in found.values()):
        raise UsageError(f"backbone pair:{rest}: {form}")
    if unknown := sorted(set(map(str, found)) - names):
        raise UsageError(f"backbone pair:{rest}: there is no part {unknown[0]!r}; {closest(unknown[0], names)}")
    if lacking := sorted({"picture", "text"} - set(found)):
        raise UsageError(f"backbone pair:{rest}: the part {lacking[0]} is missing; {form}")
    return {str(name): str(value) for name, value in found.items()}


def _part(spec: str, name: str, takes: str, given: Mapping[str, Any]) -> Backbone:
    prefix, _, rest = name.partition(":")
    if prefix not in LOADERS or not rest:
        raise UsageError(f"{spec}: {name!r} is no model: PREFIX:NAME is expected; prefixes: {', '.join(LOADERS)}")
    options = {option: value for option, value in given.items() if value is not None}
    if "architecture" in options and prefix != "folder":
        raise UsageError(f"{spec}: architecture names what lies in a folder: leave it out, or use folder: for pictures")
    found = LOADERS[prefix](rest, **options)
    if found.takes != takes:
        raise UsageError(f"{spec}: {name} takes {found.takes}, and its place in a pair is for {takes}")
    return found


class _States:
    """Computes the states of the patches behind the last norm, or behind the last block where that norm reads no patch.

    Args:
        vision: the backbone of pictures. Its net is a part of the net that is called later.
        pool: the side of the grid of states; None keeps all.

    Raises:
        UsageError: its blocks are not known, or its patches form no square.
    """

    def __init__(self, vision: Backbone, pool: int | None):
        tower = towers(vision.net, "picture")["picture"]
        self._block, self._norm = f"{tower.sequence}.{len(tower.blocks) - 1}", tower.norm
        self._forward, self._prefix, self._pool, self._spec = vision._features, vision.prefix, pool, vision.spec

    def __call__(self, net: Any, pixels: Tensor) -> Tensor:
        tower: nn.Module = net.get_submodule(TOWER)
        caught: list[Tensor] = []

        def catch(_module: nn.Module, _arguments: Any, output: Any) -> None:
            tokens = output[0] if isinstance(output, tuple | list) else output
            if tokens.dim() == 3 and (not caught or tokens.shape == caught[-1].shape):
                caught.append(tokens)

        hooks = [tower.get_submodule(path).register_forward_hook(catch) for path in (self._block, self._norm) if path]
        try:
            self._forward(tower, pixels)
        finally:
            for hook in hooks:
                hook.remove()
        return self._pooled(caught[-1][:, self._prefix :])

    def _pooled(self, states: Tensor) -> Tensor:
        if self._pool is None:
            return states
        side = math.isqrt(states.shape[1])
        if side * side != states.shape[1] or self._pool > side:
            raise UsageError(
                f"{self._spec}: its {states.shape[1]} patches cannot be averaged to {self._pool} · {self._pool}: a "
                "square of patches, and a smaller one of tokens, is needed"
            )
        grid = states.transpose(1, 2).unflatten(2, (side, side))
        return F.adaptive_avg_pool2d(grid, self._pool).flatten(2).transpose(1, 2)


@torch.no_grad()
def _draw(projector: Projector, net: Any) -> None:
    """Scale the random weights, so that embeddings of pictures are as large as those of tokens."""
    wanted = net.get_input_embeddings().weight.float().std()
    found = projector(torch.randn(64, projector.linear_1.in_features)).std()
    projector.linear_2.weight.mul_(wanted / found)
    projector.linear_2.bias.mul_(wanted / found)


def _fill(spec: str, projector: Projector, file: str) -> None:
    """Give the projector the weights in a safetensors file.

    Raises:
        UsageError: there is no such file.
        PerpetuneError: it cannot be read, or its tensors are not those of this projector.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(file).expanduser()
    if not path.is_file():
        raise UsageError(f"{spec}: there is no projector {file}; leave it out, and it is drawn at random")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise PerpetuneError(f"{spec}: {file} is no whole safetensors file: {error}") from error
    own = projector.state_dict()
    if set(tensors) != set(own):
        raise PerpetuneError(
            f"{spec}: {file} holds {', '.join(sorted(tensors)[:8]) or 'nothing'}; {', '.join(own)} are expected"
        )
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            raise PerpetuneError(
                f"{spec}: {file}: {name} is {tuple(tensors[name].shape)}, and between these two models "
                f"{tuple(tensor.shape)} is needed: it belongs to another pair, or to another pool"
            )
    projector.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})


def _placeholder(tokenizer: Any) -> int:
    """The token of the mark of a picture; the tokenizer gets it if it has none. The model needs no row for it."""
    from tokenizers import AddedToken

    if MARK not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(MARK, special=True, normalized=False)], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(MARK))
