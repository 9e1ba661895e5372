"""What can be chosen by name, and the options each choice takes.

A choice is a class or function found by a dotted path: those below, and those that installed packages
name under the entry points `perpetune.methods`, `.pets`, `.heads`, `.selectors`, `.backbones`, `.data` and `.exams`.
Its keyword-only arguments are its options in a recipe: the constructor is the schema. A backbone's choice is the loader
that the prefix of its name stands for. Sections of the report are found in the same way, under `perpetune.sections`; no
recipe names them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import typing
from importlib.metadata import entry_points
from typing import Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from perpetune.data.pictures.view import Pixels
from perpetune.errors import UsageError, closest, quoted
from perpetune.models.loaders.options import NOTHING
from perpetune.models.taps import Count, Read
from perpetune.named import Part
from perpetune.selectors import base as selectors

Kind = Literal["methods", "pets", "heads", "selectors", "backbones", "data", "exams", "sections"]

BUILTIN: dict[Kind, dict[str, str]] = {
    "methods": {
        "finetune": "perpetune.methods.finetune:FineTune",
        "frozen": "perpetune.methods.frozen:Frozen",
        "joint": "perpetune.methods.joint:Joint",
        "first_session": "perpetune.methods.first_session:FirstSession",
        "safe": "perpetune.methods.safe:Safe",
        "treelora": "perpetune.methods.treelora.method:TreeLoRA",
        "pool": "perpetune.methods.pool:Pool",
        "olora": "perpetune.methods.olora:OLoRA",
    },
    "pets": {
        "lora": "perpetune.pets.lora:LoRA",
        "adapter": "perpetune.pets.adapter:Adapter",
        "prefix": "perpetune.pets.prefix:Prefix",
        "prompt": "perpetune.pets.prompt:Prompt",
        "ssf": "perpetune.pets.ssf:SSF",
        "context": "perpetune.pets.context:Context",
    },
    "heads": {
        "linear": "perpetune.heads.linear:Linear",
        "cosine": "perpetune.heads.cosine:Cosine",
        "ncm": "perpetune.heads.ncm:NCM",
        "ridge": "perpetune.heads.ridge:Ridge",
        "drawn": "perpetune.heads.drawn:Drawn",
        "text": "perpetune.heads.text:Text",
        "lm": "perpetune.models.causal_lm:CausalLM",
        "vlm": "perpetune.models.vision_language:VisionLanguage",
    },
    "selectors": selectors.BUILTIN,
    "backbones": {
        "timm": "perpetune.models.loaders.timm:load_timm",
        "hf": "perpetune.models.loaders.hf:load_hf",
        "openclip": "perpetune.models.loaders.openclip:load_openclip",
        "folder": "perpetune.models.loaders.folder:load_folder",
        "perpetune": "perpetune.models.loaders.packaged:load_packaged",
        "pair": "perpetune.models.loaders.pair:load_pair",
    },
    "data": {
        "folder": "perpetune.data.pictures.folder:FolderSource",
        "manifest": "perpetune.data.pictures.manifest:ManifestSource",
        "parquet": "perpetune.data.pictures.arrow:ParquetSource",
        "hf": "perpetune.data.pictures.hub:HubSource",
        "captions": "perpetune.data.pictures.captions:CaptionSource",
        "digits": "perpetune.data.pictures.digits:DigitsSource",
        "text": "perpetune.data.texts.files:FileSource",
        "trace": "perpetune.data.texts.trace:TraceSource",
        "cl_benchmark": "perpetune.data.texts.cl_benchmark:ClBenchmarkSource",
        "pictured": "perpetune.data.pictured.files:PicturedSource",
        "coin": "perpetune.data.pictured.coin:CoinSource",
    },
    "exams": {
        "dataset": "perpetune.exams.dataset:Dataset",
        "retrieval": "perpetune.exams.retrieval:Retrieval",
        "recognition": "perpetune.exams.recognition:Recognition",
        "yes_no": "perpetune.exams.yes_no:YesNo",
    },
    "sections": {  # in the order of the page
        name: f"perpetune.report.sections.{name}:section"
        for name in (
            *("figures", "updates", "zero_shot", "transfer", "matrix", "curves", "answers", "retrieval", "recognition"),
            *("gate", "exams", "headroom", "heads", "members", "tree", "averages", "protection", "drift"),
            *("tasks", "classes", "storage", "time", "problems", "reproduce"),
        )
    },
}

# What everybody's choice of a kind derives from.
BASES: dict[Kind, str] = {
    "methods": "perpetune.methods.base:Method",
    "pets": "perpetune.pets.base:PET",
    "heads": "perpetune.heads.base:Head",
    "selectors": "perpetune.selectors.base:Selector",
    "data": "perpetune.data.sources:Source",
    "exams": "perpetune.exams.base:Suite",
}
MODEL = "perpetune.models.base:Model"  # what brings its own way from the backbone to answers can stand for a head


def names(kind: Kind) -> list[str]:
    """All names of a kind, the built-in ones first."""
    return [*BUILTIN[kind], *(e.name for e in entry_points(group=f"perpetune.{kind}") if e.name not in BUILTIN[kind])]


def find(kind: Kind, name: str) -> Any:
    """The class or function of that name; `PACKAGE.MODULE:NAME` is taken for what it says.

    Raises:
        UsageError: there is none, with the closest three; or it cannot be what a choice of this kind is.
    """
    if name in BUILTIN[kind]:
        return load_dotted(BUILTIN[kind][name])
    for entry in entry_points(group=f"perpetune.{kind}"):
        if entry.name == name:
            try:
                return _fitting(kind, name, entry.load())
            except (ImportError, AttributeError) as error:
                raise UsageError(f"{kind}: {name!r} of an installed package cannot be loaded: {error}") from error
    if ":" in name:
        return _fitting(kind, name, load_dotted(name))
    raise UsageError(f"{kind}: there is no {quoted(name)}; {closest(name, names(kind))}")


def every(kind: Kind) -> dict[str, Any]:
    """All choices of a kind by name, but for those of installed packages that cannot be loaded."""
    found = {}
    for name in names(kind):
        try:
            found[name] = find(kind, name)
        except UsageError:  # said when somebody names it
            continue
    return found


def loader_of(spec: str) -> str:
    """The name of the loader of a backbone that a recipe calls `PREFIX:REST`.

    Raises:
        UsageError: it is not of that form, or there is no such prefix.
    """
    prefix, colon, rest = spec.partition(":")
    if rest and prefix in BUILTIN["backbones"]:
        return prefix
    known = names("backbones")  # reads what every installed package says of itself
    if not colon or not rest:
        raise UsageError(f"backbone {spec!r}: PREFIX:NAME is expected; prefixes: {', '.join(known)}")
    if prefix not in known:
        raise UsageError(f"backbone {quoted(spec)}: there is no prefix {quoted(prefix)}; {closest(prefix, known)}")
    return prefix


def _fitting(kind: Kind, name: str, found: Any) -> Any:
    """`found`, once it is known to be a whole class of the kind; a backbone's loader or a section may be a function."""
    if kind not in BASES:
        if callable(found):
            return found
        raise UsageError(f"{kind}: {name!r} is {type(found).__name__}, and a function is expected")
    base = load_dotted(BASES[kind])
    fits = (base, load_dotted(MODEL)) if kind == "heads" else base
    if not (inspect.isclass(found) and issubclass(found, fits)):
        raise UsageError(f"{kind}: {name!r} is not a class derived from {BASES[kind].replace(':', '.')}")
    if lacking := sorted(getattr(found, "__abstractmethods__", ())):
        raise UsageError(f"{kind}: {name!r} does not define {', '.join(lacking)}")
    return found


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


@functools.cache
def schema(target: Any) -> type[BaseModel]:
    """The keyword-only arguments of a class, or of a backbone's loader, as a strict pydantic model."""
    function = target.__init__ if inspect.isclass(target) else target
    hints = typing.get_type_hints(function, include_extras=True)  # with the ranges of numbers
    parameters = inspect.signature(function).parameters.values()
    fields: dict[str, Any] = {
        p.name: (hints.get(p.name, Any), ... if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }
    more = not inspect.isclass(target) and any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not inspect.isclass(target):
        fields = _of_loader(fields, more)
    strict = ConfigDict(extra="allow" if more else "forbid", allow_inf_nan=False)
    return create_model(f"{target.__name__}Options", __config__=strict, **fields)


def _of_loader(fields: dict[str, Any], more: bool) -> dict[str, Any]:
    """The options of a backbone's loader: its own, and those of every backbone.

    Args:
        fields: of its keyword-only arguments. Loaders of other packages may have these four without a default, and the
            recipe's seed.
        more: whether it takes further keywords, the four among them.
    """
    for name in ("pretrained", "image_size", "architecture", "load_in_4bit"):
        kind, default = fields.get(name, (Any, ...))
        if default is ... and (more or name in fields):
            fields[name] = (kind, NOTHING.get(name))
    own = {name: field for name, field in fields.items() if name != "seed"}
    return {**own, "taps": (Count | None, None), "tokens": (Read | None, None), "pixels": (Pixels, "exact")}


def options(kind: Kind, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """`given` options of a choice, checked and completed by its defaults, ready to be passed as `**`.

    Raises:
        UsageError: an option is unknown or of the wrong type; names it and the valid ones.
    """
    model = schema(find(kind, name))
    if kind == "backbones":  # None is what the backbone does by itself
        known = model.model_fields
        given = {k: v for k, v in given.items() if v is not None and (k in known or v != NOTHING.get(k))}
    try:
        checked = model.model_validate(given)
    except ValidationError as error:
        raise UsageError(f"{kind}: {name}: {explain(error, model)}") from None
    found = {key: getattr(checked, key) for key in (*model.model_fields, *(checked.model_extra or {}))}
    return {key: _completed(f"{kind}: {name}: {key}", value) for key, value in found.items()}


def _completed(where: str, value: Any) -> Any:
    """The value of an option; a part that is a choice itself with its class and all its options."""
    if not isinstance(value, Part):
        return value
    kind = cast(Kind, value.of)
    try:
        return value.bound(find(kind, value.name), options(kind, value.name, value.options))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first fault pydantic found, in one line, with what would be right."""
    places: dict[str, list[Any]] = {}  # the alternatives of a union are one fault each, at the same place
    for fault in error.errors(include_url=False):
        places.setdefault(_place(fault), []).append(fault)
    where, faults = next(iter(places.items()))
    first = faults[0]
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = fields_at(model, first["loc"][:-1])
        return f"{where} is not an option; {closest(str(first['loc'][-1]), known)}{more}"
    if first["type"] == "missing":
        return f"{where} is missing{more}"
    said = ", or ".join(dict.fromkeys(_message(fault) for fault in faults)).replace(f", or {_SHOULD}", ", or ")
    if not where:  # what several keys say together
        return f"{said}{more}"
    if first["type"] == "value_error" and isinstance(first["input"], dict):  # what keys of a section say together
        return f"{where}: {said}{more}"
    return f"{where}: {said}; got {_short(first['input'])}{more}"


_SHOULD = "input should be "


def _place(fault: Any) -> str:
    """The dotted key that a fault is about, without pydantic's names for the alternatives of a union."""
    if not fault["loc"]:
        return ""
    *parents, last = fault["loc"]
    if fault["type"] != "extra_forbidden":  # there the last part is what the user wrote
        parents.append(last)
        last = ""
    kept = [
        str(p) for p in parents if isinstance(p, int) or (p.isidentifier() and p not in ("str", "int", "float", "bool"))
    ]
    return ".".join([*kept, str(last)] if last != "" else kept)


def _message(fault: Any) -> str:
    """What pydantic says of a fault, in terms of YAML."""
    if fault["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{_SHOULD}a mapping of keys"
    text: str = fault["msg"].removeprefix("Value error, ")
    return text[0].lower() + text[1:]


def _short(value: Any, length: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}…"


def fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The field names of the model that `path` leads to inside `model`."""
    for part in path:
        inner = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        found = [a for a in (inner, *typing.get_args(inner)) if inspect.isclass(a) and issubclass(a, BaseModel)]
        if found:
            model = found[0]
    return list(model.model_fields)


def summary(kind: Kind, name: str) -> dict[str, Any]:
    """What a choice is, in its docstring's first line; what it does not fit; its options with their defaults."""
    target = find(kind, name)
    fits = ""
    if kind == "methods" and target.needs_earlier_data:
        fits = "Needs the data of all tasks: for `perpetune run`, not for `perpetune update`."
    if kind == "heads" and issubclass(target, load_dotted(MODEL)):
        fits = f"A whole model: for backbones that take {target.reads[0]}."
    elif kind == "heads":
        statistics = "Learned from statistics of the features: for any method."
        fits = statistics if target.statistics else "Trained by gradient: for methods that train."
    if kind == "selectors":
        learned = "Learned from the queries of each task." if target.statistics else ""
        fits = "A control for experiments." if target.control else "Trained by gradient." if target.learned else learned
    return {
        "is": (inspect.getdoc(target) or "").partition("\n")[0],
        "fits": fits,
        "options": described(schema(target)),
    }


def _written(value: Any) -> str:
    """A default as a recipe has it, in one line."""
    if isinstance(value, BaseModel):
        return yaml.safe_dump(value.model_dump(), default_flow_style=True, sort_keys=False, width=200).splitlines()[0]
    return yaml.safe_dump(value).splitlines()[0]


def described(model: type[BaseModel], *without: str) -> dict[str, str]:
    """The options of a model, each with its default, and the words it can be where it is one of a few."""
    told = {}
    for name, field in model.model_fields.items():
        if name in without:
            continue
        words = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is Literal else ()
        if isinstance(field.default, selectors.Selection):
            told[name] = f"{field.default.name}   (a selector)"
            continue
        default = "required" if field.is_required() else _written(field.get_default(call_default_factory=True))
        if field.is_required() and inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            default = "the recipe's `train:` section"
        told[name] = default + (f"   ({', '.join(words)})" if words else "")
    return told
