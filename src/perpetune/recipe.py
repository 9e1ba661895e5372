"""The typed recipe: what is tuned, how, on what data. Unknown keys are errors; every default is written out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer, model_validator

from perpetune import registry
from perpetune.averages.config import AverageConfig
from perpetune.data.pictures.view import Pixels
from perpetune.data.stream import StreamOptions
from perpetune.errors import UsageError, closest
from perpetune.fit import FitConfig
from perpetune.models.taps import Count, Read
from perpetune.named import Named
from perpetune.plain import MOST_YAML, Malformed, parse_yaml, read_regular
from perpetune.protection.config import ProtectConfig
from perpetune.runtime import Precision

Setting = Literal["class", "domain", "task"]
PATH_KEYS = {"path", "train", "test"}  # options of a data source that may be paths
CHOICES = {"pet", "method", "head", "data"}  # sections whose options belong to what they name
NESTED = {"method": ("select",)}  # options that are choices themselves
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
MOST_EXTENDED = 16  # how many recipes may stand on each other
MOST_KEYS_BELOW = 8  # how many keys `--set` may name below each other


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BackboneSection(Named):
    """The frozen pretrained model: `timm:NAME[.TAG]`, `hf:ID_OR_FOLDER_OR_GGUF`, `folder:PATH`, `perpetune:micro`, or a
    pair of two of them: `pair:{picture: SPEC, text: SPEC, projector: FILE}`.

    Further keys are options of the loader that the prefix stands for.
    """

    taps: Count | None = None
    """Features are read behind so many of the last blocks; `auto` is seven, or fewer where features would be wider than
    6144; None reads the model's own feature alone."""
    tokens: Read | None = None
    """Which tokens the taps read: `class`, `mean` of the others, or `both`; None is both."""
    pixels: Pixels = "exact"
    """How pictures are resized: `exact` by Pillow, `fast` by torch; large JPEG files are then read smaller."""

    @model_serializer(mode="wrap")
    def _plain(self, handler: Any) -> Any:
        """Without `pixels` where nothing is changed, as recipes had it before."""
        return {key: value for key, value in handler(self).items() if (key, value) != ("pixels", "exact")}

    @model_validator(mode="after")
    def _read_at_taps(self) -> BackboneSection:
        if self.tokens is not None and self.taps is None:
            raise ValueError(
                f"tokens: {self.tokens} says what taps read, and there are none: set taps too, such as taps: 7, or "
                "leave tokens out"
            )
        return self


class PetSection(Named):
    """The small parameters that are added, and where. Further keys are options of the pet."""

    at: list[str] | None = None
    """Roles: q, k, v, proj, fc1, fc2, attn, mlp, block, norm1, norm2, patch, norm, or all `operations`; where the model
    has a tower for pictures and one for texts, picture.q or text.q names it too. None is what the pet goes to by
    default."""
    blocks: list[int] | None = None
    """Numbers of the transformer blocks, negative ones from the end; None is all."""
    beside: list[PetSection] = Field(default_factory=list)
    """Further pets of the same set, at other places, such as a context for texts beside a prompt for pictures."""

    @model_serializer(mode="wrap")
    def _plain(self, handler: Any) -> Any:
        """Without `beside` where there is nothing, as recipes had it before."""
        return {key: value for key, value in handler(self).items() if key != "beside" or value}

    @field_validator("beside", mode="before")
    @classmethod
    def _one_beside(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict) else value

    @field_validator("beside")
    @classmethod
    def _flat(cls, value: list[PetSection]) -> list[PetSection]:
        if any(section.beside for section in value):
            raise ValueError("a pet in beside has no beside of its own: put all of them into one list")
        return value

    @field_validator("at", mode="before")
    @classmethod
    def _one_role(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Every(Section):
    """At every so many tasks."""

    every: Annotated[int, Field(ge=1)]


class EvaluateSection(Section):
    batch_size: Annotated[int, Field(ge=1)] = 64
    earlier: Literal["auto", "all"] | Annotated[int, Field(ge=1)] | Every = "auto"
    """Which test data of earlier tasks are asked. `all`: of all. `auto`: of all after a task of a stream, and after an
    update of at most 16 tasks, those that were asked the longest time ago. The others bound what a net has to compute
    again, and what is known from kept features is always asked in full: a number, of examples of all earlier tasks
    together, balanced over tasks and classes, the same ones each time; or `{every: K}`, all of them after every K-th
    task and after the last one of the stream, and none after the others."""
    keep: Annotated[float, Field(ge=0)] = 1.0
    """The most GiB of features of test data that are kept in the state folder and in memory, while what makes them is
    unchanged; 0 keeps none."""
    oracle: bool | Literal["last"] = False
    """Also solve the head on all training data so far, a diagnosis of the features: after every task, or after the
    last alone. It costs one more pass over all these data each time."""
    future: bool = False
    """Also ask about tasks that are not learned yet: all tasks of the stream before the first one, and after each. The
    classes of the whole stream may answer then (setting `task`: those of the asked task), so the head has to know them
    by their names."""
    told: bool = False
    """Also count what the method would answer if it knew the task of each example: a bound for methods that choose
    among members. It costs one more pass over the test data."""


class GateSection(Section):
    """What an update has to keep. An update that loses more is refused, and the state stays as it was. It is for
    updates; the tasks of a recipe's own stream have no gate."""

    max_drop: Annotated[float, Field(ge=0)] = 2.0
    """By how many points an earlier task's test data, or an exam, may fall. What may be chance does not count."""


class RunSection(Section):
    """Where and how it runs, and what stays on the disk. Nothing here decides what is learned, but for `precision`;
    `compile` moves last bits."""

    device: str = "auto"
    precision: Precision = "no"
    """How a model computes: `no` is float32; `tf32` shortens products of float32 to 10 bits of mantissa on NVIDIA GPUs;
    `bf16` and `fp16` are autocast. Sums, solutions and projections stay exact."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that load images."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of torch; None leaves torch's own choice."""
    keep: Literal["auto", "all"] | Annotated[int, Field(ge=1)] = "auto"
    """How many of the newest tasks can be rolled back to, the newest one among them. With `auto`, the earlier tasks
    together take at most as many bytes of their own as the newest needs alone, or 16 MB if that is more; the one before
    the newest is always kept. If they take more, the oldest are dropped after a commit, until the rest takes three
    quarters of that."""
    compile: bool | Literal["max-autotune-no-cudagraphs"] = False
    """Run the frozen blocks through `torch.compile`, or through its slower search for faster code. The first steps take
    long, and later ones are faster on a GPU."""
    shard: Literal["none", "fsdp"] = "none"
    """With `fsdp` each of several processes holds a part of the frozen model (torch's FSDP2). Pets, heads and all that
    is trained stay whole in each."""
    track: list[str] = []
    """Who also gets the figures of a run: `tensorboard`, `wandb`, `trackio`, `mlflow`, or PACKAGE.MODULE:CLASS of your
    own. They write into STATE/track, and nothing leaves the machine unless you ask for it."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 200
    """Optimizer steps between two checkpoints inside a task."""

    @model_serializer(mode="wrap")
    def _plain(self, handler: Any) -> Any:
        """Without `track` where there is none, as recipes had it before."""
        return {key: value for key, value in handler(self).items() if (key, value) != ("track", [])}

    @field_validator("track", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else [] if value is None else value

    @field_validator("track")
    @classmethod
    def _known_trackers(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in TRACKERS and ":" not in name:
                raise ValueError(f"there is no tracker {name!r}; {closest(name, TRACKERS, len(TRACKERS))}")
        if len(set(value)) < len(value):
            raise ValueError("a tracker is named twice")
        return value


class Recipe(Section):
    """Everything that decides a run.

    In a file there may also be `extends: RECIPE`, a packaged recipe or a file beside it: this one is put on top of that
    one, section by section and key by key. Another pet, method, head or source of data brings none of the old one's
    options along.
    """

    name: str = "run"
    description: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    setting: Setting = "class"
    backbone: BackboneSection = BackboneSection(name="perpetune:micro")
    pet: PetSection | None = PetSection(name="lora")
    """The set of pets called `default`; None where `pets` names others, unless both are given."""
    pets: dict[str, PetSection] = {}
    """Further sets of pets by their names, for methods that train several; at one place the later calls the earlier."""
    method: Named = Named(name="finetune")
    head: Named = Named(name="linear")
    protect: ProtectConfig | None = None
    """Keeps updates out of the directions that old features use; None leaves them free."""
    average: AverageConfig | None = None
    """Averages the pets over the steps of each task; None trains without an average."""
    online: bool = False
    """Each training example is trained on once: `train.epochs` is 1."""
    train: FitConfig = FitConfig()
    data: Named | None = None
    """None for a state that only `update` feeds."""
    stream: StreamOptions = StreamOptions()
    evaluate: EvaluateSection = EvaluateSection()
    exams: dict[str, Named] = {}
    """Suites of exams by names of your own: what is asked before the first task and after each, and not learned."""
    gate: GateSection | None = None
    """Refuses updates that lose too much of what was learned; None lets all pass."""
    run: RunSection = RunSection()

    @field_validator("name")
    @classmethod
    def _folder_name(cls, value: str) -> str:
        if not value or not all(c.isalnum() or c in "._-" for c in value) or value.startswith("."):
            raise ValueError("letters, digits, '.', '_' and '-' only, as it names a folder")
        return value

    @model_validator(mode="before")
    @classmethod
    def _sets_instead(cls, value: Any) -> Any:
        """`pets:` alone brings no set `default`."""
        return {**value, "pet": None} if isinstance(value, dict) and value.get("pets") and "pet" not in value else value

    @field_validator("exams")
    @classmethod
    def _exam_names(cls, value: dict[str, Named]) -> dict[str, Named]:
        for name in value:
            if not name or not all(c.isalnum() or c in "._-" for c in name):
                raise ValueError(f"{name!r} cannot name a suite of exams: letters, digits, '.', '_' and '-' only")
        return value

    @field_validator("pets")
    @classmethod
    def _named_sets(cls, value: dict[str, PetSection]) -> dict[str, PetSection]:
        if "default" in value:
            raise ValueError("`default` is the set that `pet` describes: give it there, or choose another name")
        return value

    @field_validator("pet", mode="before")
    @classmethod
    def _no_pet(cls, value: Any) -> Any:
        return None if value == "none" else value

    @field_validator("protect", mode="before")
    @classmethod
    def _protect_switch(cls, value: Any) -> Any:
        return {} if value is True else None if value is False or value == "none" else value

    @field_validator("gate", mode="before")
    @classmethod
    def _gate_switch(cls, value: Any) -> Any:
        return {} if value is True else None if value is False or value == "none" else value

    @field_validator("average", mode="before")
    @classmethod
    def _no_average(cls, value: Any) -> Any:
        return None if value is False or value == "none" else value

    @model_validator(mode="after")
    def _online(self) -> Recipe:
        if self.online and not _once(self.train.epochs):
            if "epochs" in self.train.model_fields_set:
                raise ValueError(f"online: true trains on each example once, and train.epochs is {self.train.epochs}")
            object.__setattr__(self, "train", self.train.model_copy(update={"epochs": 1}))
        return self

    def resolved(self) -> Recipe:
        """The same recipe with every option of every choice written out.

        Raises:
            UsageError: a choice does not exist or does not take an option.
        """
        changes: dict[str, Any] = {
            "method": _complete("methods", self.method, skip=self._configs(self.method)),
            "head": _complete("heads", self.head),
            "backbone": _complete_backbone(self.backbone),
        }
        if self.pet is not None:
            changes["pet"] = _complete_pet(self.pet)
        changes["pets"] = {name: _complete_pet(section) for name, section in self.pets.items()}
        changes["exams"] = {name: _complete("exams", section) for name, section in self.exams.items()}
        if self.data is not None:
            changes["data"] = _complete("data", self.data)
            source = registry.find("data", self.data.name)
            changes["stream"] = self.stream.fitted(source.gives, source.classed)
        return self.model_copy(update=changes)

    def anchored(self) -> Recipe:
        """The same recipe with paths that exist here made absolute, so that its state works from any folder."""
        changes: dict[str, Any] = {}
        if (name := _placed(self.backbone.name, _absolute)) != self.backbone.name:
            changes["backbone"] = self.backbone.model_copy(update={"name": name})
        if self.data is not None:
            changes["data"] = Named.model_validate(_anchored(self.data.model_dump()))
        changes["exams"] = {
            name: Named.model_validate(_anchored(section.model_dump())) for name, section in self.exams.items()
        }
        if self.protect is not None and self.protect.reference is not None:
            before = self.protect.reference
            places = {"path": _absolute(before.path), "texts": _absolute(before.texts)}
            reference = before.model_copy(update=places)
            changes["protect"] = self.protect.model_copy(update={"reference": reference})
        return self.model_copy(update=changes)

    def method_options(self) -> dict[str, Any]:
        """Arguments for the method's class; its `FitConfig`s start from `train:`."""
        given = self.method.options
        for name in self._configs(self.method):
            own = given.get(name, {})
            if self.online and isinstance(own, dict) and not _once(own.get("epochs", 1)):
                raise UsageError(
                    f"online: true trains on each example once, and method.{name}.epochs is {own['epochs']}"
                )
            given[name] = {**self.train.model_dump(), **own} if isinstance(own, dict) else own
        return registry.options("methods", self.method.name, given)

    def _configs(self, method: Named) -> list[str]:
        fields = registry.schema(registry.find("methods", method.name)).model_fields
        return [name for name, field in fields.items() if field.annotation is FitConfig]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _once(epochs: Any) -> bool:
    """Whether `train.epochs` is one for every task."""
    return set(epochs) == {1} if isinstance(epochs, list) else bool(epochs == 1)


def _complete_pet(section: PetSection) -> PetSection:
    kind = registry.find("pets", section.name)
    at = list(kind.default_at) if section.at is None else section.at
    beside = [_complete_pet(one) for one in section.beside]
    own = _complete("pets", section).model_dump()
    return PetSection.model_validate({**own, "at": at, "blocks": section.blocks, "beside": beside})


def _complete(kind: registry.Kind, choice: Named, skip: Sequence[str] = ()) -> Named:
    """`choice` with the defaults of its options; those in `skip` stay as they are given."""
    own = {k: v for k, v in choice.options.items() if k not in PetSection.model_fields and k not in skip}
    if skip:
        registry_schema = registry.schema(registry.find(kind, choice.name))
        required = {name: FitConfig() for name in skip if registry_schema.model_fields[name].is_required()}
        own |= required
    completed = registry.options(kind, choice.name, own)
    options = {k: v.model_dump() if isinstance(v, BaseModel) else v for k, v in completed.items()}
    kept = {k: v for k, v in choice.options.items() if k in skip}
    return Named.model_validate({"name": choice.name, **{k: v for k, v in options.items() if k not in skip}, **kept})


def _complete_backbone(section: BackboneSection) -> BackboneSection:
    """`section` with the defaults of its loader's options."""
    given = section.model_dump(exclude={"name"})
    options = registry.options("backbones", registry.loader_of(section.name), given)
    return BackboneSection.model_validate({"name": section.name, **options})


def _anchored(options: dict[str, Any]) -> dict[str, Any]:
    """Options with those that are paths made absolute; so are those of a data source among them."""
    changed = dict(options)
    keys = {"path"} if options.get("name") == "hf" else PATH_KEYS  # its train and test are names of splits
    for key, value in options.items():
        if key == "source":
            changed[key] = _anchored(value) if isinstance(value, dict) else _absolute(value)
        elif key in keys:
            changed[key] = [_absolute(v) for v in value] if isinstance(value, list) else _absolute(value)
    return changed


def _placed(name: str, place: Callable[[str], Any]) -> str:
    """The name of a backbone with `place` applied to each path in it."""
    prefix, colon, rest = name.partition(":")
    if prefix in ("folder", "hf"):
        return f"{prefix}{colon}{place(rest)}"
    if prefix != "pair":
        return name
    from perpetune.models.loaders.pair import parts_of

    parts = parts_of(rest)
    placed = {part: place(value) if part == "projector" else _placed(value, place) for part, value in parts.items()}
    if placed == parts:
        return name
    told = yaml.safe_dump(placed, default_flow_style=True, width=1 << 20, sort_keys=False, allow_unicode=True)
    return f"pair:{told.strip()}"


def _absolute(value: Any) -> Any:
    """`value`, made absolute if it is the path of something that is there."""
    if not isinstance(value, str) or not value:
        return value
    try:
        path = Path(value).expanduser()
        return str(path.resolve()) if path.exists() else value
    except (OSError, RuntimeError):  # too long for a path, or no such home
        return value


def _beside(content: dict[str, Any], file: Path) -> dict[str, Any]:
    """What a recipe's file says, with the relative paths of what lies beside the file made absolute."""
    if file in packaged().values():
        return content
    changed = dict(content)
    backbone = changed.get("backbone")
    name = backbone.get("name") if isinstance(backbone, dict) else backbone
    if isinstance(name, str) and name.partition(":")[0] in ("folder", "hf", "pair"):
        full = _placed(name, lambda path: _from_file(path, file, "backbone"))
        changed["backbone"] = {**backbone, "name": full} if isinstance(backbone, dict) else full
    if isinstance(changed.get("data"), dict):
        changed["data"] = _section_beside(changed["data"], file, "data")
    if isinstance(changed.get("exams"), dict):
        changed["exams"] = {
            name: _section_beside(section, file, f"exams.{name}") if isinstance(section, dict) else section
            for name, section in changed["exams"].items()
        }
    protect = changed.get("protect")
    if isinstance(protect, dict) and isinstance(reference := protect.get("reference"), dict | str):
        where = "protect.reference"
        placed: Any
        if isinstance(reference, str):
            placed = reference if reference == "weights" else _from_file(reference, file, where)
            changed["protect"] = {**protect, "reference": placed}
        else:
            places = {key: _from_file(reference[key], file, where) for key in ("path", "texts") if key in reference}
            changed["protect"] = {**protect, "reference": {**reference, **places}}
    return changed


def _section_beside(options: dict[str, Any], file: Path, where: str) -> dict[str, Any]:
    """The options of a data source or exam, with their paths by the folder of the recipe's file."""
    changed = dict(options)
    keys = {"path"} if options.get("name") == "hf" else PATH_KEYS  # its train and test are names of splits
    for key, value in options.items():
        if key == "source" and isinstance(value, dict):
            changed[key] = _section_beside(value, file, f"{where}.{key}")
        elif key in keys or key == "source":
            place = f"{where}.{key}"
            many = isinstance(value, list)
            changed[key] = [_from_file(v, file, place) for v in value] if many else _from_file(value, file, place)
    return changed


def _from_file(value: Any, file: Path, where: str) -> Any:
    """`value`, made absolute if it is the relative path of something beside the recipe's file."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        given = Path(value).expanduser()
        if given.is_absolute():
            return value
        if (file.parent / given).exists():
            return str((file.parent / given).resolve())
        if given.exists():
            warnings.warn(
                f"recipe {file}: {where} {value!r} is not beside the recipe, and is taken from the folder where the "
                "command runs; paths in a recipe go by the recipe's file",
                stacklevel=2,
            )
    except (OSError, ValueError, RuntimeError):  # no path: too long, with a NUL, or no such home
        pass
    return value


def packaged() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("perpetune") / "recipes"))
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def load_recipe(name: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from a file or, by name, from the package, with `key.key=value` changes applied.

    Relative paths in a file (of data, a model folder, a reference) go by the folder of that file, as `extends` does.
    One that is not there but is found from the folder where the command runs is taken from there, with a warning. Those
    in `changes` go by the folder where the command runs.

    Raises:
        UsageError: no such recipe, not YAML, or a key or value that is not a recipe's.
    """
    path = packaged().get(str(name), Path(name))
    content = _beside(_plain(_text(str(name), path), str(name)), path)
    return _changed(_extended(content, str(name), [path]), str(name), changes)


def _text(name: str, path: Path) -> str:
    """What the recipe `name`, which is at `path`, says."""
    try:
        return read_regular(path, MOST_YAML).decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path with a NUL
        if isinstance(error, FileNotFoundError) and "/" not in name and not name.endswith((".yaml", ".yml")):
            raise UsageError(f"there is no recipe {name!r}; {closest(name, packaged())}") from None
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        if not isinstance(error, OSError | UnicodeDecodeError):
            reason = "no name may have a NUL character"
        raise UsageError(f"cannot read the recipe {str(path)!r}: {reason}") from None


def _extended(content: dict[str, Any], where: str, chain: Sequence[Path]) -> dict[str, Any]:
    """`content` on top of the recipe that its key `extends` names, if it has one.

    Args:
        where: names `content` in errors.
        chain: the file of `content` and those that extend it, the last one first; none for what is no file.

    Raises:
        UsageError: there is no such recipe, or it extends this one.
    """
    if "extends" not in content:
        return content
    content = dict(content)
    name = content.pop("extends")
    if not isinstance(name, str) or not name:
        raise UsageError(f"recipe {where}: extends is {name!r}; the name or the file of a recipe is expected")
    folder = chain[0].parent if chain else Path()
    path = packaged().get(name, folder / name)
    if len(chain) > MOST_EXTENDED:
        raise UsageError(f"recipe {where}: more than {MOST_EXTENDED} recipes extend each other")
    try:
        twice = path.resolve() in [p.resolve() for p in chain]
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL, or links in a circle
        twice = False
    if twice:
        raise UsageError(f"recipe {where}: extends {name!r}, which extends this one in turn")
    try:
        base = _extended(_beside(_plain(_text(name, path), name), path), name, [path, *chain])
    except UsageError as error:
        raise UsageError(f"{error} (recipe {where} extends it)") from None
    return _on_top(base, content, CHOICES)


def _on_top(base: dict[str, Any], own: dict[str, Any], choices: Collection[str] = ()) -> dict[str, Any]:
    """`base` with what `own` says: mappings key by key, everything else replaced as a whole.

    Args:
        choices: keys below which nothing is kept where `own` names another thing, for options are that thing's.
    """
    merged = dict(base)
    for key, value in own.items():
        before, given = merged.get(key), value
        if key in choices:
            before, given = _long(before), _long(given)
        merged[key] = value
        if key in ("pets", "exams") and isinstance(before, dict) and isinstance(given, dict):
            merged[key] = _on_top(before, given, given.keys())  # each of them is a choice
            continue
        if isinstance(before, dict) and isinstance(given, dict):
            other = key in choices and given.get("name", before.get("name")) != before.get("name")
            merged[key] = value if other else _on_top(before, given, NESTED.get(key, ()))
    return merged


def _long(choice: Any) -> Any:
    """`lora` as `{name: lora}`."""
    return {"name": choice} if isinstance(choice, str) else choice


def parse_recipe(text: str, where: str, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from YAML text; `where` names it in errors."""
    return _changed(_extended(_plain(text, where), where, ()), where, changes)


def _plain(text: str, where: str) -> dict[str, Any]:
    """The mapping that YAML text holds."""
    try:
        content = parse_yaml(text)
    except Malformed as error:
        line = f", line {error.line}" if error.line else ""
        raise UsageError(f"recipe {where}{line}: not YAML: {error.what}") from None
    if content is None:
        raise UsageError(f"recipe {where} is empty: a mapping of keys is expected")
    if not isinstance(content, dict):
        raise UsageError(f"recipe {where}: a mapping of keys is expected, got {type(content).__name__}")
    return content


def _changed(content: dict[str, Any], where: str, changes: Sequence[str]) -> Recipe:
    for change in changes:
        apply_change(content, change)
    return make_recipe(content, where)


def make_recipe(content: dict[str, Any], where: str = "given") -> Recipe:
    """A recipe from plain values, checked down to the options of every choice."""
    content = _extended(content, where, ())
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"recipe {where}: {registry.explain(error, Recipe)}") from None
    try:
        recipe.method_options()
        return recipe.resolved()
    except UsageError as error:
        raise UsageError(f"recipe {where}: {error}") from None


def apply_change(content: dict[str, Any], change: str) -> None:
    """Set one `KEY.KEY=VALUE` in plain recipe values, in place.

    Raises:
        UsageError: it is not of that form, or there are no keys below one of its keys.
    """
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {change!r}: KEY.KEY=VALUE is expected, for example train.epochs=3")
    *parents, last = key.split(".")
    if len(parents) > MOST_KEYS_BELOW:
        raise UsageError(f"--set {change[:60]!r}…: more than {MOST_KEYS_BELOW} keys below each other")
    place = content
    for parent in parents:
        below = place.get(parent)
        if isinstance(below, str):
            below = {"name": below}
        elif below is None:
            below = {}
        elif not isinstance(below, dict):
            raise UsageError(f"--set {change!r}: {parent} is {below!r}, which has no keys")
        place[parent] = below
        place = below
    try:
        place[last] = parse_yaml(value)
    except Malformed as error:
        shown = change if len(change) <= 200 else f"{change[:200]}…"
        raise UsageError(f"--set {shown!r}: the value is not YAML: {error.what}") from None
