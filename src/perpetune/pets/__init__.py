"""Parameter-efficient tuning: small trained modules around frozen ones."""

from __future__ import annotations

from perpetune.pets.base import (
    PET,
    Place,
    Slot,
    copy_set,
    fold,
    frozen,
    inject,
    parameters,
    pets,
    remove,
    slots,
    submodule,
    using,
    walk,
)
from perpetune.pets.lora import LoRA

__all__ = [
    "PET",
    "LoRA",
    "Place",
    "Slot",
    "copy_set",
    "fold",
    "frozen",
    "inject",
    "parameters",
    "pets",
    "remove",
    "slots",
    "submodule",
    "using",
    "walk",
]
