"""Parameter-efficient tuning: small trained modules around frozen ones."""

from __future__ import annotations

from perpetune.pets.base import (
    PET,
    InForce,
    Place,
    Slot,
    blendable,
    copies_at_rest,
    copy_set,
    draw_set,
    fold,
    folding,
    form,
    frozen,
    has_set,
    inject,
    parameters,
    pets,
    remove,
    rest,
    sets,
    slots,
    submodule,
    using,
    walk,
)
from perpetune.pets.choice import Choice
from perpetune.pets.lora import LoRA

__all__ = [
    "PET",
    "Choice",
    "InForce",
    "LoRA",
    "Place",
    "Slot",
    "blendable",
    "copies_at_rest",
    "copy_set",
    "draw_set",
    "fold",
    "folding",
    "form",
    "frozen",
    "has_set",
    "inject",
    "parameters",
    "pets",
    "remove",
    "rest",
    "sets",
    "slots",
    "submodule",
    "using",
    "walk",
]
