"""Store the state of a method and of an optimizer in plain files: tensors in safetensors, everything else in JSON."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from perpetune.documents import Optimizer, check_document
from perpetune.errors import StateError
from perpetune.files import to_json
from perpetune.heads.base import Head
from perpetune.methods.base import Method
from perpetune.models.backbone import Backbone
from perpetune.pets.base import PET
from perpetune.plain import Malformed, parse_json
from perpetune.protection.protection import Protection
from perpetune.store import RESTING, rest_file

EXTRA = "extra.json"
FILES = ("pet.safetensors", "head.safetensors", "method.safetensors")
MEMORY = "protect.safetensors"  # the tensors of protection, if the recipe has it
SUMS = "statistics.safetensors"  # the sums over examples that some heads keep
EARLIER = "earlier.safetensors"  # tensors of earlier tasks that are not trained any more, if the method has such
CURE = "delete the folder `resume` of the state, and the task begins again"
FIXED = (MEMORY, SUMS, EARLIER)  # an optimizer's step does not change these files


def tensors(method: Method) -> dict[str, dict[str, Tensor]]:
    """All tensors of a method, by file and by name, without the frozen backbone and without sets at rest."""
    memory = _owned(method, Protection)
    pets = _owned(method, PET)
    frozen = _owned(method, Backbone) - pets
    heads = _owned(method, Head)
    sums = {id(t) for m in method.modules() if isinstance(m, Head) for t in m.additive()}
    earlier = {id(t) for t in method.earlier()}
    further = [name for name, owned in ((MEMORY, memory), (SUMS, sums), (EARLIER, earlier)) if owned]
    by_file: dict[str, dict[str, Tensor]] = {name: {} for name in (*FILES, *further)}
    for name, tensor in _persistent(method).items():
        if id(tensor) in frozen:
            continue
        owners = ((earlier, EARLIER), (pets, FILES[0]), (sums, SUMS), (heads, FILES[1]), (memory, MEMORY))
        file = next((file for owner, file in owners if id(tensor) in owner), FILES[2])
        by_file[file][name] = tensor
    return by_file


def snapshot(method: Method, *, memory: bool = True, without: Collection[str] = ()) -> dict[str, bytes]:
    """The files that `restore` reads. Without `memory`, those that an optimizer's step cannot change are left out.

    Args:
        without: names of sets at rest that are left out too, because somebody has them already.
    """
    # Before any tensor is read: a method may wait here for what it needs of its last step, and add it to its tensors
    extra = {name: module.get_extra_state() for name, module in _with_extra(method, memory).items()}
    files = {file: _saved(group) for file, group in tensors(method).items() if memory or file not in FIXED}
    resting = method.resting() if memory else {}
    files |= {rest_file(name): _saved(of.tensors()) for name, of in resting.items() if name not in without}
    files[EXTRA] = to_json(extra, lines=1)  # it has an entry for each earlier task
    return files


def _saved(group: Mapping[str, Tensor]) -> bytes:
    return save({name: t.detach().cpu().contiguous() for name, t in group.items()})


@torch.no_grad()
def restore(method: Method, files: Mapping[str, bytes], where: str, *, memory: bool = True) -> None:
    """Restore a method from a snapshot. The method must be of the same recipe, and `memory` must be as in `snapshot`.

    Parameters stay the same objects if their shape allows it, so an optimizer that has them can continue.

    Raises:
        StateError: tensors are missing, unexpected, or have another shape or type; the message names them. Then the
            method is unchanged, except that it may have more room for classes.
    """
    extra = _json(files, EXTRA, where)
    modules = _with_extra(method, memory)
    try:
        renamed = method.from_earlier(extra)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise _foreign(method, "", where, error) from None
    _same_names(modules, extra, f"{where}/{EXTRA}", "entries")
    for name, module in modules.items():
        if module.get_extra_state() != extra[name]:
            try:
                module.set_extra_state(extra[name])
            except (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError) as error:
                raise _foreign(module, name, where, error) from None
            except (TypeError, ValueError) as error:
                raise _foreign(module, name, where, error) from None
    read = functools.cache(lambda file: read_tensors(files, file, where))
    shapes = {name: tuple(t.shape) for name, t in read(FILES[0]).items()}
    for prefix, pet in ((f"{name}.", m) for name, m in method.named_modules() if isinstance(m, PET)):
        pet.make_room({name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)})
    pairs, groups = [], tensors(method)
    spoiled: list[str] = []
    if memory:
        groups |= _at_rest(method, files, read, groups, where)
    if memory and SUMS in groups and SUMS not in files:  # an old state, in which the sums have no separate file
        groups[FILES[1]] |= groups.pop(SUMS)
    for file, group in groups.items():
        if not memory and file in FIXED:
            continue
        stored = {_today(name, renamed): tensor for name, tensor in read(file).items()}
        _same_names(group, stored, f"{where}/{file}", "tensors")
        for name, tensor in group.items():
            value = stored[name]
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise StateError(
                    f"{where}/{file}: {name} is {value.dtype} {tuple(value.shape)}, but in the recipe's model it is "
                    f"{tensor.dtype} {tuple(tensor.shape)}: the state and its recipe do not belong together"
                )
            pairs.append((tensor, value))
            if value.is_floating_point() and not _finite(value):
                spoiled.append(f"{where}/{file}: {name}")
    if spoiled:
        more = f" and {len(spoiled) - 1} more" if len(spoiled) > 1 else ""
        raise StateError(f"{spoiled[0]}{more} holds values that are not finite: the model would answer nothing of use")
    for tensor, value in pairs:
        tensor.copy_(value)
    method.restored()


def _at_rest(
    method: Method,
    files: Collection[str],
    read: Callable[[str], Mapping[str, Tensor]],
    groups: Mapping[str, Mapping[str, Tensor]],
    where: str,
) -> dict[str, dict[str, Tensor]]:
    """The tensors of sets at rest, by the file that has them; in an old state all stand with those of earlier tasks."""
    sets, there = method.resting(), {found[1] for name in files if (found := RESTING.fullmatch(name))}
    old = EARLIER in files and not there
    if not old:
        _same_names(sets, dict.fromkeys(there), where, "sets at rest")
    made: dict[str, dict[str, Tensor]] = {EARLIER: dict(groups.get(EARLIER, {}))} if old and sets else {}
    for name, of in sets.items():
        file = EARLIER if old else rest_file(name)
        shapes = {key: tuple(t.shape) for key, t in read(file).items()} if not old else {}
        for path, pet in of.pets.items() if shapes else ():
            start = f"{path}."
            pet.make_room({key.removeprefix(start): shape for key, shape in shapes.items() if key.startswith(start)})
        made.setdefault(file, {}).update(of.tensors())
    return made


def _finite(values: Tensor) -> bool:
    """Whether all values are finite. A finite sum proves it, in a third of the time; large values may have another."""
    return bool(values.sum().isfinite()) or bool(torch.isfinite(values).all())


def _today(name: str, renamed: Mapping[str, str]) -> str:
    """The name of a tensor, if names that begin in one way begin in another today."""
    old = next((old for old in renamed if name.startswith(old)), "")
    return renamed.get(old, "") + name.removeprefix(old)


def _foreign(module: nn.Module, name: str, where: str, error: Exception) -> StateError:
    what = " ".join(repr(error).split())[:200]
    return StateError(f"{where}/{EXTRA}: the entry {name!r} is not what a {type(module).__name__} stores: {what}")


def snapshot_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """The optimizer's state, for `restore_optimizer`."""
    state = optimizer.state_dict()
    stored: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                stored[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                plain.setdefault(str(index), {})[name] = value
    return {
        "optimizer.safetensors": save(stored),
        "optimizer.json": to_json({"groups": state["param_groups"], "plain": plain}),
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, files: Mapping[str, bytes], where: str) -> None:
    """Restore an optimizer from the files of `snapshot_optimizer`."""
    settings = check_document(Optimizer, _json(files, "optimizer.json", where), f"{where}/optimizer.json", CURE)
    state: dict[int, dict[str, Any]] = {int(i): dict(entries) for i, entries in settings["plain"].items()}
    for key, value in read_tensors(files, "optimizer.safetensors", where).items():
        index, dot, name = key.partition(".")
        if not (index.isdecimal() and len(index) < 10 and dot and name):
            raise StateError(f"{where}/optimizer.safetensors: {key!r} names no tensor of an optimizer: {CURE}")
        state.setdefault(int(index), {})[name] = value
    try:
        groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in settings["groups"]]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        what = " ".join(str(error).split())
        raise StateError(f"{where}: the optimizer's state does not fit the recipe: {what}") from None


def read_tensors(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Tensor]:
    """The tensors of one safetensors file."""
    try:
        return load(files[name])
    except KeyError:
        raise StateError(f"{where}: {name} is missing") from None
    except SafetensorError as error:
        raise StateError(f"{where}/{name} is not a whole safetensors file: {error}") from None


def _json(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    try:
        content = parse_json(files[name])
    except KeyError:
        raise StateError(f"{where}: {name} is missing") from None
    except Malformed as error:
        raise StateError(f"{where}/{name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise StateError(f"{where}/{name}: a JSON object is expected, got {type(content).__name__}")
    return content


def _persistent(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers, each once however many modules share it.

    torch's `state_dict` would also make the extra state of every module, which may be long.
    """
    lost = {f"{path}.{n}" if path else n for path, m in module.named_modules() for n in m._non_persistent_buffers_set}
    buffers = {name: buffer for name, buffer in module.named_buffers() if name not in lost}
    return {**dict(module.named_parameters()), **buffers}


def _owned(method: Method, kind: type[nn.Module]) -> set[int]:
    """The `id` of every tensor in modules of class `kind`."""
    modules = [m for m in method.modules() if isinstance(m, kind)]
    return {id(t) for m in modules for t in [*m.parameters(), *m.buffers()]}


def _with_extra(method: Method, memory: bool) -> dict[str, nn.Module]:
    """Modules with extra state, by name.

    Without `memory`, modules of protection and modules with tensors of earlier tasks are left out, because setting
    their extra state would empty their tensors. A module whose tensors are not buffers says so with `keeps_earlier`.
    """
    left_out: set[nn.Module] = set()
    if not memory:
        left_out = {m for p in method.modules() if isinstance(p, Protection) for m in p.modules()}
        resting = {id(t) for t in method.earlier()}
        left_out |= {
            m
            for m in method.modules()
            if getattr(m, "keeps_earlier", False)
            or any(id(t) in resting for t in [*m.parameters(recurse=False), *m.buffers(recurse=False)])
        }
    modules = {n: m for n, m in method.named_modules() if m not in left_out}
    return {n: m for n, m in modules.items() if type(m).get_extra_state is not nn.Module.get_extra_state}


def _same_names(expected: Mapping[str, Any], stored: Mapping[str, Any], where: str, what: str) -> None:
    missing, unexpected = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing or unexpected:
        raise StateError(
            f"{where}: {what} do not fit the recipe: missing {_few(missing)}; unexpected {_few(unexpected)}"
        )


def _few(names: list[str], n: int = 3) -> str:
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(names[:n]) + more if names else "none"
