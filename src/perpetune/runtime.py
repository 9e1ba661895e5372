"""Where and how a run happens: device, precision, processes, seed, checkpoints, progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

Precision = Literal["no", "bf16", "fp16"]
Value = TypeVar("Value")


class Checkpoints(Protocol):
    """What `fit` asks of the state folder; see `perpetune.state.MidTask`."""

    seconds: float
    images: int
    tokens: int
    every: int  # steps between two checkpoints

    def begin(self, phase: str, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> int | None:
        """Restore what is known of `phase`: the number of steps done, or None when it is finished."""

    def step(self, done: int, total: int, images: int, tokens: int, *, force: bool) -> None:
        """`done` steps of the open phase are complete, the last on `images` examples of so many tokens in all; writes
        a checkpoint when one is due or forced."""

    def finish(self) -> None:
        """The open phase is complete."""


class Progress(Protocol):
    """What `fit` and `run` tell whoever watches. Every call is cheap and may be ignored."""

    def note(self, message: str) -> None:
        """A warning about the data, in one line."""

    def task(self, index: int, name: str, classes: int, examples: int) -> None: ...

    def results(self, results: dict[str, Any]) -> None:
        """A task is committed; the results document so far."""

    def phase(self, phase: str, steps: int, epochs: int, done: int) -> None: ...

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None: ...


class Silent:
    """A `Progress` that shows nothing."""

    def note(self, message: str) -> None:
        pass

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        pass

    def results(self, results: dict[str, Any]) -> None:
        pass

    def phase(self, phase: str, steps: int, epochs: int, done: int) -> None:
        pass

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        pass


def pick_device(name: str) -> torch.device:
    """`auto` is the first accelerator there is, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


Companion = Callable[[torch.optim.Optimizer], contextlib.AbstractContextManager[object]]
"""What accompanies an optimizer: it is entered when the optimizer is made, and left after the last step."""


@dataclass
class Runtime:
    """Handed to methods with every task; a default one runs on the CPU and stores nothing.

    `companions` are put around every optimizer that `fit` makes, in their order: the protection of old answers first,
    so that those after it (an average) see a step as the protection leaves it.
    """

    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "no"
    workers: int = 0
    checkpoints: Checkpoints | None = None
    progress: Progress = field(default_factory=Silent)
    stopping: Callable[[], int | None] = lambda: None  # the signal that asks for a stop, if one came
    companions: Sequence[Companion] = ()

    @cached_property
    def accelerator(self) -> Accelerator:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        # accelerate keeps device and precision once per process and refuses a second choice; here each run has its own.
        joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        AcceleratorState._reset_state(reset_partial_state=not joined)
        return Accelerator(cpu=self.device.type == "cpu", mixed_precision=self.precision)

    @contextlib.contextmanager
    def accompanied(self, companions: Sequence[Companion]) -> Iterator[None]:
        """Inside, these go with every optimizer, after those that do so already."""
        before = self.companions
        self.companions = (*before, *companions)
        try:
            yield
        finally:
            self.companions = before

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)  # asking joins the processes, if that was not done yet

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes."""
        return self.accelerator.reduce(value, "sum") if self.world > 1 else value

    def of_first(self, value: Value) -> Value:
        """`value` as the first process has it, on all of them; plain values only."""
        if self.world == 1:
            return value
        from accelerate.utils import broadcast_object_list

        shared: list[Value] = broadcast_object_list([value])
        return shared[0]

    def stop_requested(self, *, due: bool) -> int | None:
        """The signal that asks for a stop. Several processes agree on it, and look only when `due`."""
        if self.world == 1:
            return self.stopping()
        if not due:
            return None
        asked = torch.tensor([self.stopping() or 0], device=self.device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return int(asked) or None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)
