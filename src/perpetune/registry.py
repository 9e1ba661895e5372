"""What can be chosen by name, and the options each choice takes.

A choice is a class or function found by a dotted path: those below, and those that installed packages
name under the entry points `perpetune.methods`, `.pets`, `.heads`, `.backbones` and `.data`. Its
keyword-only arguments are its options in a recipe: the constructor is the schema.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from importlib.metadata import entry_points
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from perpetune.errors import UsageError, closest

Kind = Literal["methods", "pets", "heads", "backbones", "data"]

BUILTIN: dict[Kind, dict[str, str]] = {
    "methods": {
        "finetune": "perpetune.methods.finetune:FineTune",
        "frozen": "perpetune.methods.frozen:Frozen",
        "joint": "perpetune.methods.joint:Joint",
    },
    "pets": {"lora": "perpetune.pets.lora:LoRA"},
    "heads": {
        "linear": "perpetune.heads.linear:Linear",
        "cosine": "perpetune.heads.cosine:Cosine",
        "ncm": "perpetune.heads.ncm:NCM",
    },
    "backbones": {
        "timm": "perpetune.models.backbones:load_timm",
        "hf": "perpetune.models.backbones:load_hf",
        "folder": "perpetune.models.backbones:load_folder",
        "perpetune": "perpetune.models.backbones:load_packaged",
    },
    "data": {
        "folder": "perpetune.data.folder:FolderSource",
        "manifest": "perpetune.data.manifest:ManifestSource",
        "parquet": "perpetune.data.arrow:ParquetSource",
        "hf": "perpetune.data.hub:HubSource",
        "digits": "perpetune.data.digits:DigitsSource",
    },
}


def names(kind: Kind) -> list[str]:
    """All names of a kind, the built-in ones first."""
    return [*BUILTIN[kind], *(e.name for e in entry_points(group=f"perpetune.{kind}") if e.name not in BUILTIN[kind])]


def find(kind: Kind, name: str) -> Any:
    """The class or function of that name; `PACKAGE.MODULE:NAME` is taken for what it says.

    Raises:
        UsageError: there is none; names the closest three.
    """
    if name in BUILTIN[kind]:
        return load_dotted(BUILTIN[kind][name])
    for entry in entry_points(group=f"perpetune.{kind}"):
        if entry.name == name:
            return entry.load()
    if ":" in name:
        return load_dotted(name)
    raise UsageError(f"{kind}: there is no {name!r}; {closest(name, names(kind))}")


def load_dotted(path: str) -> Any:
    """The object at `PACKAGE.MODULE:NAME`.

    Raises:
        UsageError: there is no such module or name.
    """
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot load {path!r} (PACKAGE.MODULE:NAME is expected): {error}") from error


def schema(target: Any) -> type[BaseModel]:
    """The keyword-only arguments of a class or function, as a strict pydantic model."""
    function = target.__init__ if inspect.isclass(target) else target
    hints = typing.get_type_hints(function)
    fields: dict[str, Any] = {
        p.name: (hints.get(p.name, Any), ... if p.default is p.empty else p.default)
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }
    return create_model(f"{target.__name__}Options", __config__=ConfigDict(extra="forbid"), **fields)


def options(kind: Kind, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """`given` options of a choice, checked and completed by its defaults, ready to be passed as `**`.

    Raises:
        UsageError: an option is unknown or of the wrong type; names it and the valid ones.
    """
    model = schema(find(kind, name))
    try:
        checked = model.model_validate(given)
    except ValidationError as error:
        raise UsageError(f"{kind}: {name}: {explain(error, model)}") from None
    return {key: getattr(checked, key) for key in model.model_fields}


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first fault pydantic found, in one line, with what would be right."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = fields_at(model, first["loc"][:-1])
        return f"{where} is not an option; {closest(str(first['loc'][-1]), known)}{more}"
    if first["type"] == "missing":
        return f"{where} is missing{more}"
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}; got {first['input']!r}{more}"


def fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The field names of the model that `path` leads to inside `model`."""
    for part in path:
        inner = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        found = [a for a in (inner, *typing.get_args(inner)) if inspect.isclass(a) and issubclass(a, BaseModel)]
        if found:
            model = found[0]
    return list(model.model_fields)


def summary(kind: Kind, name: str) -> dict[str, Any]:
    """What a choice is, in its docstring's first line, and its options with their defaults."""
    target = find(kind, name)
    fields = schema(target).model_fields
    return {
        "is": (inspect.getdoc(target) or "").partition("\n")[0],
        "options": {n: "required" if f.is_required() else repr(f.default) for n, f in fields.items()},
    }
