"""The contract of methods: rules that `perpetune check` tests on any method."""

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
