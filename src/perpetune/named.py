"""A thing as a recipe names it: a name, and the options of what has this name."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, model_validator
from typing_extensions import Self


class Named(BaseModel):
    """A name and the options of what it names; `lora` is short for `{name: lora}`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Part(Named):
    """An option of a choice that is a choice itself, such as the selector of a pool.

    The registry finds the class that it names, and checks and completes its options (`bound`). So code that makes the
    thing needs no registry.

    Attributes:
        of: the kind of the registry in which the name is looked up.
    """

    of: ClassVar[str]
    _kind: Any = PrivateAttr(None)

    def bound(self, kind: Any, options: dict[str, Any]) -> Self:
        """The same part with its class, and with all of its options."""
        new = type(self).model_validate({"name": self.name, **options})
        new._kind = kind
        return new
