"""What of a recipe decides what stored tensors mean, and how they go on to be trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from perpetune.documents import Document, read_document
from perpetune.errors import StateError
from perpetune.recipe import Recipe
from perpetune.state.committed import Committed

MADE_BY = "recipe.json"  # in a task's folder: what of the recipe decides what its tensors mean, and how it learned
DECIDES = {"backbone", "pet", "method", "head", "protect", "train", "seed"}
"""Sections of a recipe that decide a training."""


def training_digest(recipe: Recipe) -> str:
    """A hash of all in a recipe that decides a training: a checkpoint is of use with the same one only."""
    added = {name for name in ("pets", "average") if getattr(recipe, name)}  # others have the digest of before
    decides = recipe.model_dump_json(include=DECIDES | added)
    return hashlib.sha256(decides.encode()).hexdigest()


def made_by(recipe: Recipe, backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The document `recipe.json` of a task that is committed now."""
    return {**meaning(recipe), "training": training(recipe), "model": known(backbone)}


def check_meaning(folder: Path, recipe: Recipe, backbone: Mapping[str, Any], task: Committed, made: bytes) -> None:
    """Check that stored tensors mean what they meant when they were stored.

    Args:
        folder: the state folder.
        recipe: its recipe as it is now.
        backbone: its `backbone.json` as it is now.
        task: whose tensors they are.
        made: the content of its `recipe.json`.

    Raises:
        StateError: the recipe gives them another meaning, or `backbone.json` is another one.
    """
    then = read_document(Document, made, str(task.folder / MADE_BY), task.cure)
    for key, before, after in _differences(then, meaning(recipe)):
        raise StateError(
            f"{folder / 'recipe.yaml'}: {key} is {_short(after)}, and was {_short(before)} when task "
            f"{task.name} was learned: put it back, because the learned model means something else now"
        )
    here = known(backbone)
    stored = then.get("model", here)  # a task of an older version does not have it
    for key in sorted({*stored, *here}):
        if stored.get(key) != here.get(key):
            raise StateError(
                f"{folder / 'backbone.json'}: {key} is {_short(here.get(key))}, and was "
                f"{_short(stored.get(key))} when task {task.name} was learned: restore it from a backup"
            )


def edited(folder: Path, recipe: Recipe, task: Committed, made: bytes) -> str:
    """A line about what of the training was changed since `task` was learned; empty if nothing was. For the arguments
    see `check_meaning`."""
    then = read_document(Document, made, str(task.folder / MADE_BY), task.cure)
    found = list(_differences(then.get("training", {}), training(recipe)))
    changes = [f"{key} is {_short(after)} (was {_short(before)})" for key, before, after in found]
    if not changes:
        return ""
    few = ", ".join(changes[:5]) + (f" and {len(changes) - 5} more" if len(changes) > 5 else "")
    return (
        f"{folder / 'recipe.yaml'} was changed since task {task.name} was learned: {few}; the model answers "
        "and learns by the file as it is now"
    )


def meaning(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that say what stored tensors mean. Where the model lies may change, and so may training."""
    plain = recipe.model_dump(mode="json", include={"backbone", "pet", "pets", "head", "method"})
    plain["backbone"] = {k: v for k, v in plain["backbone"].items() if k not in ("name", "gradient_checkpointing")}
    plain["method"] = {"name": plain["method"]["name"]}
    return plain


def training(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that say how it goes on to learn, without places."""
    plain = recipe.model_dump(
        mode="json", include={"seed", "setting", "method", "protect", "online", "train", "stream", "evaluate"}
    )
    if plain["protect"] is not None and plain["protect"].get("reference"):
        given = plain["protect"]["reference"].items()
        plain["protect"]["reference"] = {
            k: v for k, v in given if k != "path" and not (k == "texts" and isinstance(v, str))
        }
    return {**plain, "run": {"precision": recipe.run.precision}}


def known(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """What `backbone.json` says, without the place of the model."""
    return {key: value for key, value in backbone.items() if key != "spec"}


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]


def _differences(then: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The keys that have another value now. Keys that one of them lacks are of another version, and no difference."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in sorted(then.keys() & now.keys()):
            yield from _differences(then[name], now[name], f"{key}.{name}" if key else name)
    elif then != now:
        yield key, then, now
