"""The surroundings of a run: device, precision, processes, seed, checkpoints, progress."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from perpetune.meeting import meeting
from perpetune.numerics.exact import shortened

if TYPE_CHECKING:
    from accelerate import Accelerator

LAUNCHED = {"LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
"""Variables that a launcher of several processes sets, as accelerate reads them."""
Precision = Literal["no", "tf32", "bf16", "fp16"]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
Value = TypeVar("Value")


class Checkpoints(Protocol):
    """The calls that `fit` makes to store and restore its progress; `perpetune.state.MidTask` implements them."""

    seconds: float
    images: int
    tokens: int
    every: int  # steps between two checkpoints

    def begin(self, phase: str, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> int | None:
        """Restore the stored progress of `phase`; return the number of finished steps, or None if it is complete."""

    def step(self, done: int, total: int, images: int, tokens: int, *, force: bool) -> None:
        """Note that `done` steps of the open phase are complete; write a checkpoint if one is due or forced.

        Args:
            images, tokens: the numbers of examples and of their tokens in the last step.
        """

    def finish(self) -> None:
        """Note that the open phase is complete."""


class Progress(Protocol):
    """The calls by which `fit` and `run` show their progress. Each is cheap, and an implementation may ignore it."""

    def note(self, message: str) -> None:
        """Show a warning about the data, in one line."""

    def task(self, index: int, name: str, classes: int, examples: int) -> None: ...

    def results(self, results: dict[str, Any]) -> None:
        """Show the results document so far, after a task was committed."""

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
    """The device of that name; `auto` is the first accelerator of this machine, or the CPU if it has none."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


Companion = Callable[[torch.optim.Optimizer], contextlib.AbstractContextManager[object]]
"""A function that makes a context manager for an optimizer. `fit` enters it after it has made the optimizer, and leaves
it after the last step."""


@dataclass
class Runtime:
    """The surroundings of a run, which each task gives to its method. The default runs on the CPU and stores nothing.

    `fit` puts the `companions` around every optimizer, in their order. The protection of old answers comes first, so
    that the companions after it (such as an average of parameters) see each step as the protection leaves it.
    """

    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "no"
    workers: int = 0
    checkpoints: Checkpoints | None = None
    progress: Progress = field(default_factory=Silent)
    stopping: Callable[[], int | None] = lambda: None  # gives the signal that asked the run to stop, if one came
    companions: Sequence[Companion] = ()
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds of parts of the present task, by name; see `timed`."""
    clock: Callable[[], float] = time.perf_counter
    """What all times of a task are read from, in seconds. An estimate puts the seconds of this process's CPU there."""

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds that this context takes to a part of the present task."""
        began = self.clock()
        try:
            yield
        finally:
            self.spent[part] = self.spent.get(part, 0.0) + self.clock() - began

    @cached_property
    def accelerator(self) -> Accelerator:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        # accelerate keeps one device and precision per process and refuses another; but each run needs its own choice.
        joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        AcceleratorState._reset_state(reset_partial_state=not joined)
        mixed = self.precision if self.precision in HALF else "no"
        return Accelerator(cpu=self.device.type == "cpu", mixed_precision=mixed)

    @contextlib.contextmanager
    def accompanied(self, companions: Sequence[Companion]) -> Iterator[None]:
        """Inside this context, `fit` puts these companions around every optimizer too, after the earlier ones."""
        before = self.companions
        self.companions = (*before, *companions)
        try:
            yield
        finally:
            self.companions = before

    @property
    def rank(self) -> int:
        return 0 if self.alone else int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        return 1 if self.alone else int(self.accelerator.num_processes)

    @cached_property
    def alone(self) -> bool:
        """Whether nothing says that there are other processes, so that a prediction need not import accelerate.

        Where something does, accelerate decides, and its first use connects the processes.
        """
        joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        told = any(name in LAUNCHED or name.startswith("ACCELERATE_USE_") for name in os.environ)
        return not (joined or told or importlib.util.find_spec("torch_xla"))

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes."""
        if self.world == 1:
            return value
        meeting.meet()
        summed: Tensor = self.accelerator.reduce(value, "sum")
        return summed

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            meeting.meet()
            self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """The first process goes through this context before the others do."""
        if self.rank > 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()

    def of_first(self, value: Value) -> Value:
        """The first process's `value`, in all processes; for plain values only."""
        if self.world == 1:
            return value
        from accelerate.utils import broadcast_object_list

        meeting.meet()
        shared: list[Value] = broadcast_object_list([value])
        return shared[0]

    def stop_requested(self, *, due: bool) -> int | None:
        """The signal that asked the run to stop, or None. Several processes agree on it, and do so only when `due`."""
        if self.world == 1:
            return self.stopping()
        if not due:
            return None
        meeting.meet()
        signum = torch.tensor([self.stopping() or 0], device=self.device)
        torch.distributed.all_reduce(signum, torch.distributed.ReduceOp.MAX)
        return int(signum) or None

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Inside this context a model computes in the precision of the run."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.products())
            if self.precision in HALF:
                stack.enter_context(torch.autocast(self.device.type, HALF[self.precision]))
            yield

    def products(self) -> contextlib.AbstractContextManager[None]:
        """Inside this context products in float32 are as exact as the run wants them; for backward passes, in which
        autocast has decided already."""
        if self.device.type == "cpu":  # a CPU has no TF32
            return contextlib.nullcontext()
        return shortened(self.precision == "tf32")
