"""The `protect:` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

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
    renew: bool | Annotated[list[str], Field(min_length=1)] = False
    """Before each task what was learned comes to rest, and a new pair starts where old features do not reach: of LoRA,
    whose B needs no protection then and has its full rank for every task. A list names the sets of `pets:` that are
    renewed; the others are protected in place."""
    start: Literal["random", "leading"] = "random"
    """Of `renew`: A starts at random in the free directions, or along the leading directions of the new task's inputs
    inside them."""
    rest: Annotated[int, Field(ge=1)] | None = None
    """Of `renew`: largest rank of what rests; what is over it is cut off, where it changes old outputs least. None
    keeps all."""

    @field_validator("renew")
    @classmethod
    def _held(cls, value: bool | list[str], info: ValidationInfo) -> bool | list[str]:
        given: dict[str, Any] = info.data
        if value and given.get("strength") == "soft":
            raise ValueError("renew needs strength: hard, for B is free then, and soft lets old features through to it")
        return value

    @field_validator("start", "rest")
    @classmethod
    def _of_renewal(cls, value: Any, info: ValidationInfo) -> Any:
        if value not in ("random", None) and info.data.get("renew") is False:
            raise ValueError(f"{info.field_name} is for renew: true alone: set protect.renew=true, or leave it out")
        return value

    def renews(self, name: str) -> bool:
        """Whether the pets of that set are renewed."""
        return name in self.renew if isinstance(self.renew, list) else self.renew

    def energy_at(self, task: int) -> float:
        """The energy for the task of that index."""
        return min(1.0, self.energy + self.energy_rise * task)
