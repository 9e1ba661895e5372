"""The interface of selectors: they look at queries and say which members of a pool act on which example.

A query is a feature vector of an example, usually by the frozen net. A selector knows queries and numbers of members,
and neither the net nor its pets.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perpetune.errors import PerpetuneError, UsageError, closest
from perpetune.named import Part
from perpetune.numerics.projection import Site
from perpetune.numerics.ranking import Ranking

BUILTIN = {
    "keys": "perpetune.selectors.keys:Keys",
    "weights": "perpetune.selectors.weights:Weights",
    "centres": "perpetune.selectors.centres:Centres",
    "means": "perpetune.selectors.means:Means",
    "gaussian": "perpetune.selectors.gaussian:Gaussian",
    "classifier": "perpetune.selectors.classifier:LearnedClasses",
    "random": "perpetune.selectors.controls:Random",
    "last": "perpetune.selectors.controls:Last",
    "vote": "perpetune.selectors.controls:Vote",
}


@dataclass(frozen=True, eq=False)
class Chosen:
    """The members that act on each example of a batch.

    Attributes:
        index: int64 `(B, k)`, the numbers of the members, the best first.
        weight: `(B, k)`, a factor for what each adds; None is 1.
    """

    index: Tensor
    weight: Tensor | None = None


class Selector(nn.Module, ABC):
    """Chooses members for each query.

    Options in the recipe are the keyword-only arguments of `__init__`, after the width `dim` of the queries.

    Attributes:
        members: the number of members that it knows.
        top: the number of members that it chooses for an example, if there are as many.
        private: whether each member belongs to a task and rests after it. The method sets it before it has trained
            anything; then `protect:` has nothing to hold here.
        needs_start: whether `grow` needs the queries of the new task.
    """

    learned: ClassVar[bool] = False
    """Whether it has parameters that are trained beside the pets."""
    statistics: ClassVar[bool] = False
    """Whether it learns from `learn`, and so needs members that belong to tasks."""
    by_member: ClassVar[bool] = False
    """Whether what it learns of each member stands by itself, so that a member can be dropped."""
    every: ClassVar[bool] = False
    """Whether all members act on each example, with weights."""
    control: ClassVar[bool] = False
    """Whether it is a control for experiments."""
    exact: ClassVar[tuple[str, ...]] = ()
    """Names of buffers of sums: they stay in float64 on the CPU, because Apple's GPUs have no float64."""

    needs_start: bool = False
    private: bool = False
    top: int = 1
    watch: Callable[..., None] | None = None
    """Called as `watch(site, rows)` while protection observes."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim, self.members = dim, 0
        self.rows: list[tuple[int, str]] = []
        """Each member with each of its classes, in the order in which they were learned."""
        self.owners: dict[str, int] = {}
        """For each class the member that learned it last."""
        self.ranking = Ranking()
        self._of_rows: Tensor | None = None  # the member of each row, made when it is first asked for

    # -- growing and training -------------------------------------------------------------------------

    def grow(self, members: int, generator: torch.Generator, queries: Tensor | None = None) -> None:
        """Make room for `members` members; those that are there keep what they have.

        Args:
            queries: `(N, D)` of the task to which the new members belong, if `needs_start`.
        """
        self.members = max(self.members, members)

    def start_at(self, queries: Tensor) -> None:
        """Start all members at the queries `(N, D)` of the first task; for a pool whose members all tasks share, if
        `needs_start`."""

    def warning(self, tasks: int) -> str | None:
        """A warning about how the members were used in the training of so many tasks; None without one."""
        return None

    def rest(self, members: int) -> None:
        """The first `members` members are finished: what is trained must not move for them any more."""

    def trained(self) -> list[nn.Parameter]:
        """The parameters that an optimizer gets."""
        return []

    def pick(self, queries: Tensor) -> Chosen:
        """The choice while training."""
        return self.choose(queries)

    def loss(self, queries: Tensor, chosen: Chosen) -> Tensor | None:
        """What is added to the loss of a batch, a mean over its examples; None if there is nothing."""
        return None

    def used(self, index: Tensor) -> None:
        """Count the members `(B, k)` that a step of training has used, those of all processes."""

    # -- statistics -----------------------------------------------------------------------------------

    @torch.no_grad()
    def learn(
        self, member: int, queries: Tensor, targets: Tensor, classes: Sequence[str], generator: torch.Generator
    ) -> None:
        """Add what a member has learned. It may be called again for the same member, with more classes too.

        Every process gives the same queries, so nothing is summed over processes.

        Args:
            queries: `(N, D)` of all examples of the task.
            targets: int64 `(N,)`, the class of each example.
            classes: the names of the classes.

        Raises:
            UsageError: there is no such member, or the shapes do not fit.
            PerpetuneError: a query is not finite. Nothing is added then.
        """
        if not 0 <= member < self.members:
            raise UsageError(f"select: member {member} learns, and there are {self.members}")
        fits = queries.dim() == 2 and queries.shape[1] == self.dim and targets.shape == queries.shape[:1]
        if not fits or (len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < len(classes)):
            raise UsageError(
                f"select: queries {tuple(queries.shape)} with targets {tuple(targets.shape)} of {len(classes)} classes "
                f"do not fit: (N, {self.dim}) and (N,) are expected"
            )
        if not torch.isfinite(queries).all():
            raise PerpetuneError("select: a query is not finite, so nothing was learned: look for broken inputs")
        place = {row: number for number, row in enumerate(self.rows)}
        for name in classes:
            if (member, name) not in place:
                place[member, name] = len(self.rows)
                self.rows.append((member, name))
                self._of_rows = None
            self.owners[name] = member
        if self.statistics:
            rows = torch.tensor([place[member, name] for name in classes], dtype=torch.int64)
            self.add(member, queries, rows[targets.cpu()], generator)

    def add(self, member: int, queries: Tensor, rows: Tensor, generator: torch.Generator) -> None:
        """Add queries `(N, D)` of a member to the statistics; `rows (N,)` are numbers in `self.rows`, on the CPU."""

    def drop(self, member: int) -> None:
        """Drop a member, and number those behind it anew; for selectors that learn `by_member`."""
        self.rows = [(one - (one > member), name) for one, name in self.rows if one != member]
        self.owners = {name: one for one, name in self.rows}
        self.members, self._of_rows, self.ranking = self.members - 1, None, Ranking()

    def owner(self, name: str) -> int | None:
        """The member that learned the class `name` last; None if nobody did."""
        return self.owners.get(name)

    def classes_of(self, member: int) -> list[str]:
        """The classes that a member has learned."""
        return [name for one, name in self.rows if one == member]

    def members_of_rows(self, device: torch.device) -> Tensor:
        """The member of each of `self.rows`, int64 `(R,)`.

        Raises:
            PerpetuneError: nothing was learned yet.
        """
        self.ready(len(self.rows))
        if self._of_rows is None:
            self._of_rows = torch.tensor([member for member, _ in self.rows])
        return self._of_rows.to(device)

    # -- choosing -------------------------------------------------------------------------------------

    @abstractmethod
    def choose(self, queries: Tensor) -> Chosen:
        """The choice for queries `(B, D)`, each by itself; of members that are equally good the lower number."""

    def ready(self, known: int) -> None:
        """Raise PerpetuneError if `known`, the number of things to choose by, is 0."""
        if not known:
            raise PerpetuneError(
                f"select: {type(self).__name__.lower()} was asked before it had members to choose from: it chooses "
                "after the first task"
            )

    # -- protection -----------------------------------------------------------------------------------

    def sites(self) -> list[Site]:
        """The sites where queries meet trained parameters that later tasks use too."""
        return []

    def seen(self, site: str, rows: Tensor) -> None:
        """Hand the rows `(B, D)` at a site to `watch`."""
        if self.watch is not None:
            self.watch(site, rows.detach())

    # -- reporting and storing ------------------------------------------------------------------------

    def earlier(self) -> list[Tensor]:
        """Its tensors that no step of an optimizer changes: those of statistics, and of members at rest."""
        return [*self.buffers(), *self.parameters()] if self.statistics else []

    def facts(self) -> dict[str, Any]:
        """Facts for the report, in JSON's types."""
        return {"members": self.members}

    def get_extra_state(self) -> dict[str, Any]:
        return {"members": self.members, "rows": [list(row) for row in self.rows], "owners": self.owners}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        rows = [(int(member), str(name)) for member, name in state["rows"]]
        members, owners = int(state["members"]), {str(k): int(v) for k, v in state["owners"].items()}
        if not all(0 <= member < members for member in [*(m for m, _ in rows), *owners.values()]):
            raise ValueError(f"a member that is named is not among the {members} there are")
        if len(set(rows)) < len(rows):
            raise ValueError("a class of a member stands twice")
        self.members, self.rows, self.owners, self._of_rows = members, rows, owners, None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Selector:
        kept = {name: self._buffers.pop(name) for name in self.exact}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(kept)
        return self


class Selection(Part):
    """A selector as a recipe names it, with its options; `keys` is short for `{name: keys}`."""

    of: ClassVar[str] = "selectors"

    @property
    def kind(self) -> type[Selector]:
        """The class of the selector.

        Raises:
            UsageError: no class was bound to it, and it is no selector of perpetune.
        """
        if self._kind is not None:
            bound: type[Selector] = self._kind
            return bound
        if self.name not in BUILTIN:
            raise UsageError(f"select: there is no selector {self.name!r}; {closest(self.name, list(BUILTIN))}")
        module, _, attribute = BUILTIN[self.name].partition(":")
        found: type[Selector] = getattr(importlib.import_module(module), attribute)
        return found

    def make(self, dim: int) -> Selector:
        """A new selector without members, for queries of width `dim`."""
        return self.kind(dim, **self.options)
