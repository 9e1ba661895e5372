"""A digest of all that decides what a pet computes."""

from __future__ import annotations

import dataclasses
import hashlib
import types
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.pets.base import Place

BARE = frozenset(vars(nn.Module()))
SILENT = frozenset({"anew", "watch"})  # attributes of a pet that do not change what it computes


class _Opaque(Exception):
    """A value of which nobody can say whether it is the same."""


def digest_of(pet: nn.Module) -> str | None:
    """A digest of all that decides what a pet computes: its class, its tensors, and its other attributes.

    None where nobody can say it: in training mode, where dropout acts, or if an attribute is no plain value.
    """
    digest = hashlib.sha256()
    try:
        for name, module in pet.named_modules():
            if module.training:
                return None
            digest.update(f"{name} {type(module).__module__}.{type(module).__qualname__}\n".encode())
            for key, value in sorted(vars(module).items()):
                if key not in BARE and key not in SILENT:
                    digest.update(f"{key} ".encode())
                    _add(digest, value)
            own = [*module._parameters.items(), *module._buffers.items()]
            for key, tensor in sorted(own):
                digest.update(f"{key} ".encode())
                _add(digest, tensor)
    except _Opaque:
        return None
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Add a value to a digest.

    Raises:
        _Opaque: it is of a kind that is not known.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device | type):
        digest.update(f"{value!r};".encode())
    elif isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}:".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Place):  # the module and the words in it belong to the frozen net
        plain = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        _add(digest, {k: v for k, v in plain.items() if k not in ("module", "before", "words")})
    elif isinstance(value, list | tuple | set | frozenset):
        some = list(value) if isinstance(value, list | tuple) else sorted(value, key=repr)
        digest.update(f"{type(value).__name__}{len(some)}(".encode())
        for one in some:
            _add(digest, one)
    elif isinstance(value, dict):
        _add(digest, sorted(value.items(), key=lambda item: repr(item[0])))
    elif isinstance(value, partial):
        _add(digest, [value.func, value.args, value.keywords])
    elif _is_named(value):
        digest.update(f"{value.__module__}.{value.__qualname__};".encode())
    else:
        raise _Opaque


def _is_named(value: Any) -> bool:
    """Whether a function is the same wherever its name is: it holds no values of its own."""
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None and "<lambda>" not in value.__qualname__
    return isinstance(value, types.BuiltinFunctionType)
