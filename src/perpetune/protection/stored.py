"""The file of a protection of any model, and whether what it holds fits."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from perpetune.errors import PerpetuneError, StateError
from perpetune.files import write_file
from perpetune.plain import parse_json
from perpetune.protection.memory import SiteMemory

METADATA = "perpetune.protection"  # the key in the file for everything that is not a tensor
DIGEST = "perpetune.sha256"  # the key in the file for the digest of that and of the tensors


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state dictionary of tensors and values of JSON into one safetensors file.

    Raises:
        PerpetuneError: the file cannot be written; no partial file is left.
    """
    tensors = {name: value.cpu().contiguous() for name, value in state.items() if isinstance(value, Tensor)}
    rest = json.dumps({name: value for name, value in state.items() if name not in tensors})
    try:
        write_file(path, save(tensors, {METADATA: rest, DIGEST: digest(rest, tensors)}))
    except OSError as error:
        raise PerpetuneError(
            f"{path} cannot be written ({error.strerror}): name a file in a folder that exists"
        ) from None


def read(path: str | Path) -> dict[str, Any]:
    """The state dictionary that `write` wrote.

    Raises:
        StateError: there is no such file, or it is damaged or of another kind.
    """
    reason = "it is damaged, was changed, or was not written by a protection"
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        rest = parse_json(metadata[METADATA])
        sound = metadata[DIGEST] == digest(metadata[METADATA], tensors) and isinstance(rest, dict)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        sound, reason = False, (error.strerror if isinstance(error, OSError) else None) or reason
    if not sound:
        raise StateError(f"{path} cannot be read as a protection ({reason})")
    return {**tensors, **rest}


def digest(rest: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over `rest` and the names, dtypes, shapes and bytes of the tensors."""
    sha = hashlib.sha256(rest.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def fault(memory: SiteMemory, state: Mapping[str, Any]) -> str | None:
    """The reason why the stored state of a site does not fit; None if it fits."""
    heads, out, dim = memory.shape
    about = state["_extra_state"]
    try:
        stored, forms, figures = tuple(about["shape"]), about["forms"], about["figures"]
        counts = [int(count) for count, _ in forms]
        finite = all(math.isfinite(figures[name]) for name in ("change", "output", "count"))
    except (KeyError, TypeError, ValueError):
        return "it lacks its shape, forms or figures"
    if stored != memory.shape:
        return f"the state has shape {stored}, the model {memory.shape}"
    if len(counts) != heads or not all(0 <= count <= dim for count in counts):
        return f"{len(counts)} subspaces of {counts} directions"
    shapes = {
        "vectors": (dim, sum(counts)),
        "importance": (sum(counts) if memory.alpha is not None else 0,),
        "total": (heads, dim * (dim + 1) // 2),
        "last": (heads, out, dim),
        "cross": (heads, out, dim),
    }
    if memory.rows is None and "terms" in about:
        return "it was made with renew"
    if memory.rows is not None:
        try:
            last, cross = (int(count) for count in about["terms"])
        except (KeyError, TypeError, ValueError):
            return "it was made without renew"
        shapes |= {"last": (last, memory.rows + dim), "cross": (cross, memory.rows + dim)}
    for name, shape in shapes.items():
        tensor = state[name]
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            actual = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            return f"{name} is {actual}, {shape} is expected (one strength is hard and the other soft?)"
        finite = finite and bool(torch.isfinite(tensor).all())
    return None if finite else "it has values that are not finite"
