"""Parameter-efficient tuning: small trained modules around frozen ones."""

from __future__ import annotations

from perpetune.pets.base import (
    PET,
    InForce,
    Place,
    Slot,
    copy_set,
    fold,
    frozen,
    has_set,
    inject,
    parameters,
    pets,
    remove,
    sets,
    slots,
    submodule,
    using,
    walk,
)
from perpetune.pets.lora import LoRA

__all__ = [
    "PET",
    "InForce",
    "LoRA",
    "Place",
    "Slot",
    "copy_set",
    "fold",
    "frozen",
    "has_set",
    "inject",
    "parameters",
    "pets",
    "remove",
    "sets",
    "slots",
    "submodule",
    "using",
    "walk",
]
