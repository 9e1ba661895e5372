"""The `protect:` section of a recipe."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from perpetune.numerics.projection import Project
from perpetune.pets.base import Conditions


def _short(section: BaseModel, handler: Any, new: Collection[str]) -> dict[str, Any]:
    """The fields of a section, without those of `new` that have their default: as recipes were written before."""
    fields = type(section).model_fields
    found: dict[str, Any] = handler(section)
    return {k: v for k, v in found.items() if k not in new or getattr(section, k) != fields[k].default}


class Reference(BaseModel):
    """What stands for the knowledge of the pretrained model, protected from the first step on: unlabelled pictures,
    names whose texts are read, or the frozen weights themselves. `weights` is short for `{weights: true}`, another word
    is a path."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    path: str | None = None
    """A folder of pictures; subfolders are included. None shows no pictures."""
    samples: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """The number of pictures that are used, drawn at random."""
    texts: list[str] | str | None = None
    """Names that the text tower reads in all templates of the head, in a list or on the lines of a file. None are those
    of the head's `vocabulary`."""
    weights: bool = False
    """No data: the leading right singular directions of each frozen linear layer are protected at its pet."""
    energy: Annotated[float, Field(ge=0, le=1)] | None = None
    """The share of energy that is protected of the reference; None is that of the tasks."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"weights": True} if value == "weights" else {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _something(self) -> Reference:
        if self.weights and (self.path is not None or self.texts is not None or self.samples != "all"):
            raise ValueError("weights needs no data: leave path, texts and samples out, or weights")
        if not self.weights and self.path is None and self.texts is None:
            raise ValueError("nothing is named: give path, a folder of pictures, or texts, or weights: true")
        return self

    @model_serializer(mode="wrap")
    def _plain(self, handler: Any) -> dict[str, Any]:
        return _short(self, handler, ("texts", "weights", "energy"))


class ProtectConfig(BaseModel):
    """The options of protection."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    energy: Annotated[float, Field(ge=0, le=1)] = 0.99
    """The share of the features' energy (σ²) that is protected at every site: 0 protects nothing, 1 everything that was
    seen."""
    text_energy: Annotated[float, Field(ge=0, le=1)] | None = None
    """The share of energy at sites of the text tower, also of the reference's texts; None is that of the others."""
    energy_rise: Annotated[float, Field(ge=0)] = 0.0
    """Added to `energy` with every task, up to 1; GPM on CIFAR-100 uses 0.97 and 0.003."""
    samples: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """The number of training examples of each task whose features are protected, balanced over its classes."""
    conditions: Conditions = "exact"
    """`exact` keeps the outputs on old data; `paper` uses PEGP's equations 10 to 14 as they are printed."""
    strength: Literal["hard", "soft"] = "hard"
    """`hard` allows no update in a protected direction; `soft` makes updates smaller by the importance of the
    direction; Saha & Roy 2023."""
    alpha: Annotated[float, Field(ge=0)] = 10.0
    """For `soft`: the larger, the closer to `hard`."""
    project: Project = "step"
    """`step` projects the optimizer's whole step. `gradient` projects only the gradient, as the papers' code does; with
    Adam this protects little."""
    sites: Annotated[list[str], Field(min_length=1)] | None = None
    """Protect only these sites, such as `down`, `up`, `keys`, `values`; the others move freely. None means all."""
    directions: Literal["features", "random", "none"] = "features"
    """Controls for experiments: `random` protects equally many directions drawn at random; `none` protects nothing and
    only measures."""
    reference: Reference | None = None
    renew: bool | Annotated[list[str], Field(min_length=1)] = False
    """Before each task, store the product of each LoRA's A and B and start a new pair, whose A is zero on the protected
    directions of old features. Then B needs no protection and has its full rank for every task. A list names the sets
    of `pets:` that are renewed; the others are protected without renewal."""
    start: Literal["random", "leading"] = "random"
    """For `renew`: A starts at random in the free directions, or along the leading directions of the new task's inputs
    within them."""
    rest: Annotated[int, Field(ge=1)] | None = None
    """For `renew`: the highest rank of the stored product. If its rank is higher, the rest is cut off so that old
    outputs change as little as possible. None stores all."""

    @model_serializer(mode="wrap")
    def _plain(self, handler: Any) -> dict[str, Any]:
        return _short(self, handler, ("text_energy",))

    @field_validator("renew")
    @classmethod
    def _held(cls, value: bool | list[str], info: ValidationInfo) -> bool | list[str]:
        options: dict[str, Any] = info.data
        if value and options.get("strength") == "soft":
            raise ValueError(
                "renew needs strength: hard, because B is not protected then, and soft lets old features through to it"
            )
        return value

    @field_validator("start", "rest")
    @classmethod
    def _of_renewal(cls, value: Any, info: ValidationInfo) -> Any:
        if value not in ("random", None) and info.data.get("renew") is False:
            raise ValueError(f"{info.field_name} needs renew: true: set protect.renew=true, or leave it out")
        return value

    def renews(self, name: str) -> bool:
        """Whether the pets of the set `name` are renewed."""
        return name in self.renew if isinstance(self.renew, list) else self.renew

    def energy_at(self, task: int) -> float:
        """The energy for the task with that index, from 0."""
        return min(1.0, self.energy + self.energy_rise * task)
