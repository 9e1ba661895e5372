"""The `average:` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Rule = Literal["dynamic", "curvature"]
Share = Annotated[float, Field(ge=0, le=1)]


class AverageConfig(BaseModel):
    """The options of an average. Exactly one of `keep` and `weight` is given."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    keep: Share | None = None
    """The weight that the start of a task has left in the average at the end of the task, for any number of steps."""
    weight: Share | Rule | None = None
    """The weight of the old average in each step. `dynamic` is computed in each step, as LLaCA publishes it: it depends
    on the scale of the loss and on the learning rate. `curvature` is its form without a scale; see `base`."""
    base: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """For `weight: curvature`: the weight where the gradient is zero; away from there the weight is larger."""
    over: Literal["steps", "end"] = "steps"
    """`steps` averages after each step. `end` interpolates once, between the start and the end of the task."""
    restart: bool = True
    """Whether the next task starts from the average (LLaCA), or from where training ended (LAE)."""
    answer: Literal["average", "online", "both"] = "average"
    """What predicts: the average, the pets as training left them, or for each class the larger of both probabilities
    (LAE)."""
    head: bool = False
    """Whether the parameters of the head that are trained by gradient are averaged too."""
    first: Annotated[int, Field(ge=1)] = 2
    """The first task that is averaged, counted from 1."""

    @model_validator(mode="after")
    def _fits_together(self) -> AverageConfig:
        if (self.keep is None) == (self.weight is None):
            raise ValueError(
                "give one of keep and weight: keep is what is left of the start at the end of a task, weight is "
                "that of the old average in each step"
            )
        if self.over == "end" and self.keep is None:
            raise ValueError("over: end interpolates once, so weight in each step means nothing: give keep")
        if self.weight != "curvature" and "base" in self.model_fields_set and self.base != 0.99:
            raise ValueError("base belongs to weight: curvature: leave it out")
        if self.head and self.carried:
            raise ValueError(
                "head: true averages the head inside a task: it needs restart: true and answer: average, because the "
                "head's rows for other tasks rest"
            )
        return self

    @property
    def carried(self) -> bool:
        """Whether average and online pets both live on between tasks; if not, the average is all that is left."""
        return not (self.restart and self.answer == "average")

    @property
    def ruled(self) -> bool:
        """Whether the weight is computed in each step."""
        return isinstance(self.weight, str)
