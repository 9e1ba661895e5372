"""Exports: a learned model in the formats of other programs."""

from perpetune.export.card import card_of
from perpetune.export.checking import pictures_for
from perpetune.export.learned import FORMS, PROJECTOR, export_learned
from perpetune.export.peft import read_peft, write_peft

__all__ = ["FORMS", "PROJECTOR", "card_of", "export_learned", "pictures_for", "read_peft", "write_peft"]
