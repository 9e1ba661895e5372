"""The contract that every method keeps, as checks that run on anybody's."""

from __future__ import annotations

from perpetune.check.pictures import SIZE, Pictures, TinyPictures, tiny_backbone, tiny_stream
from perpetune.check.rules import Checker, Outcome, check_method, probe

__all__ = [
    "SIZE",
    "Checker",
    "Outcome",
    "Pictures",
    "TinyPictures",
    "check_method",
    "probe",
    "tiny_backbone",
    "tiny_stream",
]
