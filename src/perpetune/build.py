"""Make the objects that a recipe names: backbone, method, protection, data, runtime."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from perpetune import registry
from perpetune.averages.average import Average
from perpetune.data.examples import View
from perpetune.data.pictured.view import PicturedView
from perpetune.data.pictures.view import PictureView
from perpetune.data.sources import Source
from perpetune.data.stream import Stream, build_stream
from perpetune.errors import StateError, UsageError, closest
from perpetune.methods.base import Method
from perpetune.models.backbone import Backbone
from perpetune.models.base import Model
from perpetune.models.classifier import Classifier
from perpetune.models.loaders import plain
from perpetune.pets import PET, Place, inject, pets, sets, using
from perpetune.pets.context import MARK, Context
from perpetune.protection.config import ProtectConfig, Reference
from perpetune.protection.protection import Protection
from perpetune.protection.sites import pet_sites
from perpetune.recipe import PetSection, Recipe
from perpetune.runtime import Runtime, pick_device
from perpetune.seeding import generator, own_global_state


def build_backbone(recipe: Recipe, about: Mapping[str, Any] | None = None) -> Backbone:
    """The frozen pretrained model, on the CPU.

    Args:
        about: what `described` gave of the same model. With it the net may be made without the library that built it;
            then it is for the caller to compare the fingerprint.

    Raises:
        StateError: a setting of the model is another than `about` says, so it computes something else.
    """
    spec, options = recipe.backbone.name, recipe.backbone.model_dump(exclude={"name"})
    if about is not None:
        given, how = _options(spec, options)
        backbone = plain.reopened(spec, given, about)
        if backbone is not None:
            return _finished(spec, backbone, **how)
    backbone = load_backbone(spec, seed=recipe.seed, **options)
    if about is not None and (what := plain.changed(backbone, about)):
        raise StateError(
            f"{spec}: its tensors may be those that the state was made with, but its settings are not: {what}; put its "
            "config.json and preprocessor_config.json back, or the version of its library"
        )
    return backbone


def described(recipe: Recipe, backbone: Backbone) -> dict[str, Any] | None:
    """How `build_backbone` makes this backbone, which has no pets yet, without its library; None if it cannot."""
    given, _ = _options(recipe.backbone.name, recipe.backbone.model_dump(exclude={"name"}))
    return plain.described(backbone, given)


def load_backbone(spec: str, *, seed: int = 0, **options: Any) -> Backbone:
    """The frozen model that `PREFIX:REST` names, on the CPU, in evaluation mode.

    Args:
        spec: the backbone's name, as in a recipe. Installed packages can add prefixes with the entry point
            `perpetune.backbones`.
        seed: the seed of random weights, which `pretrained=False` gives.
        options: the options of the prefix's loader (`perpetune methods` lists them). Also `taps`: the blocks behind
            which features are read, or `auto`; `tokens`: the tokens that the taps read; and `pixels`: `fast` resizes
            pictures by torch (`PictureView.fast`).

    Raises:
        UsageError: the prefix or the name is unknown (the message has the three closest), the loader does not know an
            option, or options do not fit together.
        MissingExtra: a package that the prefix needs is not installed.
        PerpetuneError: the weights cannot be downloaded, or they do not belong to the model.
    """
    name = registry.loader_of(spec)
    load = registry.find("backbones", name)
    given, how = _options(spec, options)
    kinds = {p.name: p.kind for p in inspect.signature(load).parameters.values()}
    if "seed" in kinds or inspect.Parameter.VAR_KEYWORD in kinds.values():
        given["seed"] = seed
    with own_global_state("backbone", seed):
        backbone: Backbone = load(spec.partition(":")[2], **given)
    if given.get("pretrained") is False:
        backbone.opens = {}  # nothing else draws the same weights
    return _finished(spec, backbone, **how)


def _options(spec: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a backbone that its loader takes, and those that every backbone has."""
    given = registry.options("backbones", registry.loader_of(spec), options)
    return given, {name: given.pop(name) for name in ("taps", "tokens", "pixels")}


def _finished(spec: str, backbone: Backbone, taps: Any, tokens: Any, pixels: Any) -> Backbone:
    if pixels == "fast":
        backbone.preprocess = _fast(spec, backbone.preprocess)
    return backbone.tap(taps, tokens or "both")


def _fast(spec: str, view: View) -> View:
    """The view with fast pixels; UsageError if it has no pictures."""
    if isinstance(view, PictureView):
        return dataclasses.replace(view, fast=True)
    if isinstance(view, PicturedView):
        view.picture = dataclasses.replace(view.picture, fast=True)
        return view
    raise UsageError(f"{spec}: pixels says how pictures are resized, and the model reads {view.takes}: leave it out")


def build_method(recipe: Recipe, backbone: Backbone) -> Method:
    """A new method without learned tasks, on the backbone's device."""
    if recipe.pet is not None:
        _inject_set(recipe.pet, backbone, generator(recipe.seed, "pet"), "default")
    for name, section in recipe.pets.items():
        _inject_set(section, backbone, generator(recipe.seed, "pet", name), name)
    with own_global_state(recipe.seed, "method"):
        model = _build_model(recipe, backbone)
        kind = registry.find("methods", recipe.method.name)
        if recipe.pets and not kind.several:
            raise UsageError(
                f"method: {recipe.method.name} trains one set of pets, but the recipe has several under pets: "
                f"{', '.join(recipe.pets)}. Describe one under pet, or use a method for several sets, such as finetune"
            )
        method: Method = kind(model, **recipe.method_options())
    if isinstance(model, Classifier):
        model.head.ready()
    _check_contexts(recipe, method)
    _check_bare(method)
    if recipe.backbone.options.get("dtype") == "float16" and recipe.run.precision != "fp16":
        raise UsageError(
            "backbone.dtype: float16 needs a scaled loss, because small gradients become zero in float16: add "
            "run.precision: fp16, or use dtype bfloat16"
        )
    if recipe.protect is not None:
        if method.unprotectable:
            raise UsageError(f"method: {recipe.method.name} {method.unprotectable}")
        if recipe.protect.renew and not method.renewable:
            raise UsageError(
                f"method: {recipe.method.name} decides by itself whether its pet is renewed: leave protect.renew out, "
                "or use finetune"
            )
        _check_renewed(recipe.protect, method)
        method.leaks = method.leaks or model.leaks
        method.protection = build_protection(recipe, method)
    if recipe.average is not None:
        method.average = build_average(recipe, method)
    return method.requires_grad_(False).eval()


def _inject_set(section: PetSection, backbone: Backbone, rng: torch.Generator, name: str) -> None:
    """Put a set of pets on the backbone: those of the section and those beside them."""
    for one in (section, *section.beside):
        _inject(one, backbone, rng, name)


def _check_bare(method: Method) -> None:
    """Raise UsageError if a head also answers with the net without pets, and that says nothing or not the truth."""
    if not (isinstance(method.model, Classifier) and method.model.head.bare):
        return
    if not sets(method.model):
        raise UsageError(
            "head: text: zero_shot: bare leaves out what pets change, and the recipe has no pet: leave zero_shot out"
        )
    texts = method.model.backbone.texts
    with using(method.model, tuple(sets(method.model))):
        changed = texts is not None and texts.state()
    if changed:
        raise UsageError(
            "head: text: zero_shot: bare compares pictures of the untouched tower with texts, and a pet changes the "
            "texts: put pets into the picture tower alone, or use zero_shot: tuned"
        )


def _check_contexts(recipe: Recipe, method: Method) -> None:
    """Raise UsageError if contexts and the head's templates do not fit together."""
    templates = getattr(method.model.head, "templates", ()) if isinstance(method.model, Classifier) else ()
    marked = any(MARK in template for template in templates)
    contexts = [pet for name in sets(method.model) for pet in pets(method.model, name) if isinstance(pet, Context)]
    if not contexts and marked:
        raise UsageError(
            f"head: text: a template has {MARK}, and no pet makes it: add pet: context, or change templates"
        )
    if not contexts:
        return
    if not marked:
        raise UsageError(
            f"pet: context stands where a template of head: text has {MARK}, and none has it: use head: {{name: text, "
            "templates: context}"
        )
    if len({(pet.length, pet.words, pet.of_task) for pet in contexts}) > 1:
        raise UsageError("pet: context: all sets of pets need the same length, init and share")
    if contexts[0].of_task and not method.by_task:
        raise UsageError(
            f"pet: context with share: task is for methods that train each task, and {recipe.method.name} does not "
            "start new ones: use share: all, or method: finetune"
        )
    private = [pet for name in method.private for pet in pets(method.model, name) if isinstance(pet, Context)]
    if private and not contexts[0].of_task:
        raise UsageError("pet: context: a set that belongs to one task has a context of its own: use share: task")


def _inject(section: PetSection, backbone: Backbone, rng: torch.Generator, name: str) -> None:
    """Put the pets that a section of the recipe describes on the backbone, as the set `name`."""
    kind = registry.find("pets", section.name)
    options = registry.options("pets", section.name, section.options)
    if kind.adds_tokens and backbone.preprocess.ordered:
        raise UsageError(
            f"pet: {section.name} adds tokens, but the tokens of a text have a fixed order: use lora or adapter"
        )
    at = kind.default_at if section.at is None else section.at

    def make(place: Place, rng: torch.Generator) -> PET:
        pet: PET = kind(place, rng, **options)
        pet.anew = lambda other: make(place, other)  # a copy of the pet shares a function, and so the frozen module
        return pet

    made = inject(backbone.net, backbone.pet_places(at, section.blocks), lambda place: make(place, rng), name)
    if any(pet.replaces_class_token for pet in made) and not backbone.class_token:
        raise UsageError(
            f"pet: {section.name} replaces the class token, and {backbone.spec} has none: use readout: class"
        )


def _build_model(recipe: Recipe, backbone: Backbone) -> Model:
    """The model: the backbone with a head of classes, or a model that turns features into answers in its own way."""
    head = registry.find("heads", recipe.head.name)
    options = registry.options("heads", recipe.head.name, recipe.head.options)
    if issubclass(head, Model):
        model: Model = head(backbone, **options)
        return model
    made = head.of(backbone, **options)
    if backbone.taps is not None:
        made.train_on(backbone.end)  # a loss on the last block's tokens trains every block before it
    return Classifier(backbone, made)


def _check_renewed(config: ProtectConfig, method: Method) -> None:
    named = config.renew if isinstance(config.renew, list) else []
    for name in named:
        if name not in method.trained:
            raise UsageError(
                f"protect.renew names the set of pets {name!r}, but the method does not train this set; "
                f"{closest(name, method.trained)}"
            )


def build_protection(recipe: Recipe, method: Method) -> Protection:
    """A new protection for every site of the method's pets; it does not protect any direction yet."""
    assert recipe.protect is not None
    config = recipe.protect
    sites, loose, free = pet_sites(method, config.conditions, method.trained, config.renews, method.sometimes)
    made = Protection(sites, config, still=loose, free=free, seed=recipe.seed)
    _check_reference(config.reference, made, method)
    return made


def _check_reference(reference: Reference | None, made: Protection, method: Method) -> None:
    """Raise UsageError if a tower that is protected would see nothing of the reference, or if it names something that
    nobody sees."""
    if reference is None:
        return
    if reference.weights:
        made.weights()
        return
    if made.reads_texts and method.model.takes == "pictures" and not (reference.texts or method.model.vocabulary):
        raise UsageError(
            "protect.reference: pets in the text tower are protected, and no text is: give protect.reference.texts, or "
            "head.vocabulary"
        )
    if reference.texts is not None and not made.reads_texts:
        raise UsageError("protect.reference.texts: no pet in a text tower is protected, so nothing reads them")
    if made.reads_pictures and reference.path is None:
        raise UsageError(
            "protect.reference: pets in the picture tower are protected, and no picture is: give protect.reference.path"
        )


def build_average(recipe: Recipe, method: Method) -> Average:
    """A new average of the method's pets, and of its head if the recipe says so; it has not averaged any task yet.

    Raises:
        UsageError: the method has nothing that could be averaged, or not with these options.
    """
    assert recipe.average is not None
    config, name, model = recipe.average, recipe.method.name, method.model
    solved = isinstance(model, Classifier) and model.head.statistics
    if method.unaveraged:
        raise UsageError(f"method: {name} {method.unaveraged}: leave average out, or use method: finetune")
    if not method.trained and not (config.head and model.trained()):
        cure = "name a pet" if solved or not model.trained() else "name a pet, or set average.head: true"
        raise UsageError(f"average: there is no pet, so nothing is averaged: {cure}, or leave average out")
    if config.carried and not method.steady:
        raise UsageError(
            f"method: {name} chooses where each task starts and which pets answer: average needs restart: true and "
            "answer: average"
        )
    if any(pet.of_task for name in method.trained for pet in pets(model, name)):
        raise UsageError("average: each task starts from a context of its own (share: task): leave average out")
    if config.carried and recipe.protect is not None and recipe.protect.renew:
        raise UsageError(
            "protect.renew starts new pets before each task, so no average of the old ones lives on: average needs "
            "restart: true and answer: average"
        )
    if config.answer == "both" and solved:
        raise UsageError(
            f"average.answer: both needs a head that is trained by gradient, and head: {recipe.head.name} is solved "
            "for the features of one answer: use head: linear, or answer: average"
        )
    if config.carried and (config.restart or config.answer != "online"):
        method.leaks = method.leaks or (
            "average and online pets differ on the data of their task, so old outputs move where one goes on from the "
            "other (average.restart, average.answer)"
        )
    return Average(model, method.trained, config, head=model.trained, steady=method.steady, solved=solved)


def build_data(recipe: Recipe, view: View) -> Stream:
    """The stream of tasks. It has not read any image yet; `view` prepares pictures or texts for the backbone."""
    if recipe.data is None:
        raise UsageError(f"recipe {recipe.name} has no data: add a `data:` section, or give data to `perpetune update`")
    options = registry.options("data", recipe.data.name, recipe.data.options)
    source: Source = registry.find("data", recipe.data.name)(**options)
    return build_stream(source, recipe.stream, view, seed=recipe.seed)


def _why(device: str, reason: str) -> str:
    """Why a device cannot be used, in words for users: torch's own reasons speak of how it was built."""
    kind = device.partition(":")[0]
    if kind == "mps":
        reason = "mps is the GPU of a Mac with Apple silicon, and this machine or this build of torch has none"
    elif kind == "cuda" and not torch.cuda.is_available():
        reason = "there is no NVIDIA GPU here that torch can use"
    elif kind == "cuda":
        reason = f"this machine has {torch.cuda.device_count()} GPU(s), counted from cuda:0"
    elif kind not in ("cpu", "xpu", "meta", "auto"):
        reason = "no device has this name; auto, cpu, cuda, cuda:1 or mps is expected"
    return f"{reason}; `auto` picks one"


def build_runtime(recipe: Recipe) -> Runtime:
    """The runtime with device, precision, processes and threads. It has no checkpoints and shows no progress yet."""
    section = recipe.run
    if section.threads:
        torch.set_num_threads(section.threads)
    try:
        device = pick_device(section.device)
        torch.empty(0, device=device).cpu()  # fails on the device `meta`, which holds no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"run.device {section.device!r} cannot be used here: {_why(section.device, reason)}") from None
    if section.precision == "tf32" and device.type != "cuda":
        raise UsageError(f"run.precision 'tf32' cannot be used on {device}: only NVIDIA GPUs have it; `no` can")
    runtime = Runtime(recipe.seed, device, section.precision, section.workers)
    try:
        plain = runtime.alone and section.precision == "no" and device.type in ("cpu", "cuda")
        given = device if plain else runtime.accelerator.device  # only where there is something to ask accelerate
    except ValueError as error:  # accelerate does not know this precision on this device
        why = str(error).splitlines()[0]
        raise UsageError(f"run.precision {section.precision!r} cannot be used on {device}: {why}; `no` can") from None
    if runtime.world > 1 or given.type != device.type:  # a launcher chooses the device; otherwise `cuda:1` stays
        runtime.device = torch.device("cpu") if given.type == "cpu" else given
    if runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)  # torch seeds and measures the current device
    return runtime
