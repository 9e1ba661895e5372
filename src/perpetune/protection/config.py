"""The `protect:` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from perpetune.numerics.projection import Project
from perpetune.pets.base import Conditions


class Reference(BaseModel):
    """Unlabelled data whose features are protected from the first step on: what the pretrained model knows."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    path: str
    """A folder of pictures, in any folders below it."""
    samples: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """Pictures that are looked at, drawn at random."""


class ProtectConfig(BaseModel):
    """How old answers are protected."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    energy: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Share of the features' energy (σ²) that is protected at every site; 0 protects nothing, 1 all that was seen."""
    energy_rise: Annotated[float, Field(ge=0)] = 0.0
    """Added to `energy` with every task, up to 1; GPM on CIFAR-100 uses 0.97 and 0.003."""
    samples: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """Training examples of each task that are looked at, balanced over its classes."""
    conditions: Conditions = "exact"
    """`exact` holds the outputs on old data; `paper` is PEGP's equations 10 to 14 as they stand."""
    strength: Literal["hard", "soft"] = "hard"
    """`soft` damps each direction by its importance instead of closing it; Saha & Roy 2023."""
    alpha: Annotated[float, Field(ge=0)] = 10.0
    """Of `soft`: the larger, the closer to `hard`."""
    project: Project = "step"
    """`gradient` projects gradients only, as the papers' code does; under Adam it protects little."""
    sites: Annotated[list[str], Field(min_length=1)] | None = None
    """Only these, such as `down`, `up`, `keys`, `values`; None is all. The others move freely."""
    directions: Literal["features", "random", "none"] = "features"
    """Controls: `random` protects as many directions drawn at random, `none` only measures."""
    reference: Reference | None = None

    def energy_at(self, task: int) -> float:
        """The energy for the task of that index."""
        return min(1.0, self.energy + self.energy_rise * task)
