"""From a recipe to the things it names."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from perpetune import registry
from perpetune.data.examples import View
from perpetune.data.sources import Source
from perpetune.data.stream import Stream, build_stream
from perpetune.errors import UsageError, closest
from perpetune.methods.base import Method
from perpetune.models.backbone import Backbone
from perpetune.models.base import Model
from perpetune.models.classifier import Classifier
from perpetune.pets import inject
from perpetune.protection.config import ProtectConfig
from perpetune.protection.protection import Protection
from perpetune.protection.sites import pet_sites
from perpetune.recipe import PetSection, Recipe
from perpetune.runtime import Runtime, pick_device
from perpetune.seeding import generator, own_global_state


def build_backbone(recipe: Recipe) -> Backbone:
    """The frozen pretrained model, on the CPU."""
    return load_backbone(recipe.backbone.name, seed=recipe.seed, **recipe.backbone.model_dump(exclude={"name"}))


def load_backbone(spec: str, *, seed: int = 0, **options: Any) -> Backbone:
    """The frozen model that `PREFIX:REST` names, on the CPU, in evaluation mode.

    Args:
        spec: as in a recipe. Installed packages may bring prefixes by the entry point `perpetune.backbones`.
        seed: decides random weights, which `pretrained=False` gives.
        options: those of the prefix's loader (`perpetune methods` lists them); `taps`, blocks behind which features are
            read, or `auto`; and `tokens`, which the taps read.

    Raises:
        UsageError: an unknown prefix or name (with the closest three), an option that the loader does not take, or
            options that do not fit.
        MissingExtra: the package that the prefix needs is not installed.
        PerpetuneError: the weights cannot be fetched, or are not those of the model.
    """
    name = registry.loader_of(spec)
    load, given = registry.find("backbones", name), registry.options("backbones", name, options)
    taps, tokens = given.pop("taps"), given.pop("tokens")
    kinds = {p.name: p.kind for p in inspect.signature(load).parameters.values()}
    if "seed" in kinds or inspect.Parameter.VAR_KEYWORD in kinds.values():
        given["seed"] = seed
    with own_global_state("backbone", seed):
        backbone: Backbone = load(spec.partition(":")[2], **given)
    return backbone.tap(taps, tokens or "both")


def build_method(recipe: Recipe, backbone: Backbone) -> Method:
    """A method that has learned nothing yet, on the backbone's device."""
    if recipe.pet is not None:
        _inject(recipe.pet, backbone, generator(recipe.seed, "pet"), "default")
    for name, section in recipe.pets.items():
        _inject(section, backbone, generator(recipe.seed, "pet", name), name)
    with own_global_state(recipe.seed, "method"):
        model = _build_model(recipe, backbone)
        kind = registry.find("methods", recipe.method.name)
        if recipe.pets and not kind.several:
            raise UsageError(
                f"method: {recipe.method.name} trains one set of pets, and the recipe names "
                f"{', '.join(recipe.pets)} under pets: describe one under pet, or use a method for several sets, such "
                "as finetune"
            )
        method: Method = kind(model, **recipe.method_options())
    if isinstance(model, Classifier):
        model.head.ready()
    if recipe.backbone.options.get("dtype") == "float16" and recipe.run.precision != "fp16":
        raise UsageError(
            "backbone.dtype: float16 is trained with a scaled loss, else small gradients become zero: use it with "
            "run.precision: fp16, or dtype bfloat16"
        )
    if recipe.protect is not None:
        if method.unprotectable:
            raise UsageError(f"method: {recipe.method.name} {method.unprotectable}")
        if recipe.protect.renew and not method.renewable:
            raise UsageError(
                f"method: {recipe.method.name} keeps its pet through the tasks or renews it by itself: leave "
                "protect.renew out, or use finetune"
            )
        _check_renewed(recipe.protect, method)
        method.protection = build_protection(recipe, method)
    return method.requires_grad_(False).eval()


def _inject(section: PetSection, backbone: Backbone, rng: torch.Generator, name: str) -> None:
    """Put the pets that a section describes on the backbone, as the set `name`."""
    kind = registry.find("pets", section.name)
    options = registry.options("pets", section.name, section.options)
    if kind.adds_tokens and backbone.preprocess.ordered:
        raise UsageError(
            f"pet: {section.name} adds tokens, which have no place in the order of a text: use lora or adapter"
        )
    at = kind.default_at if section.at is None else section.at
    inject(backbone.net, backbone.pet_places(at, section.blocks), lambda place: kind(place, rng, **options), name)


def _build_model(recipe: Recipe, backbone: Backbone) -> Model:
    """The backbone with what turns its features into answers: a head of classes, or a model with its own way."""
    head = registry.find("heads", recipe.head.name)
    options = registry.options("heads", recipe.head.name, recipe.head.options)
    if issubclass(head, Model):
        model: Model = head(backbone, **options)
        return model
    made = head.of(backbone, **options)
    if backbone.taps is not None:
        made.train_on(backbone.end)  # what is trained by the loss of one block's tokens is every block before it
    return Classifier(backbone, made)


def _check_renewed(config: ProtectConfig, method: Method) -> None:
    named = config.renew if isinstance(config.renew, list) else []
    for name in named:
        if name not in method.trained:
            raise UsageError(
                f"protect.renew names the set of pets {name!r}, which is not trained; {closest(name, method.trained)}"
            )


def build_protection(recipe: Recipe, method: Method) -> Protection:
    """The protection of every site of the method's pets, with nothing protected yet."""
    assert recipe.protect is not None
    config = recipe.protect
    sites, loose, free = pet_sites(method, config.conditions, method.trained, config.renews, method.sometimes)
    return Protection(sites, config, still=loose, free=free, seed=recipe.seed)


def build_data(recipe: Recipe, view: View) -> Stream:
    """The stream of tasks, images not yet read; `view` says how pictures or texts are prepared."""
    if recipe.data is None:
        raise UsageError(
            f"recipe {recipe.name} names no data: add a `data:` section, or feed it with `perpetune update`"
        )
    options = registry.options("data", recipe.data.name, recipe.data.options)
    source: Source = registry.find("data", recipe.data.name)(**options)
    return build_stream(source, recipe.stream, view, seed=recipe.seed)


def build_runtime(recipe: Recipe) -> Runtime:
    """Device, precision, processes and threads, with nothing stored and nobody watching yet."""
    section = recipe.run
    if section.threads:
        torch.set_num_threads(section.threads)
    try:
        device = pick_device(section.device)
        torch.empty(0, device=device).cpu()  # `meta` can be made, and holds nothing
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"run.device {section.device!r} cannot be used here: {reason}; `auto` picks one") from None
    runtime = Runtime(recipe.seed, device, section.precision, section.workers)
    try:
        given = runtime.accelerator.device
    except ValueError as error:  # accelerate knows no such precision there
        why = str(error).splitlines()[0]
        raise UsageError(f"run.precision {section.precision!r} cannot be used on {device}: {why}; `no` can") from None
    if runtime.world > 1 or given.type != device.type:  # a launcher decides; else `cuda:1` means just that
        runtime.device = torch.device("cpu") if given.type == "cpu" else given
    if runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)  # seeds and memory figures are those of the current device
    return runtime
