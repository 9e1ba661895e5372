"""Where code waits for a device, found on a machine that has none.

Work on a GPU is queued. Reading a number from it, or copying memory of the usual kind to it, makes the program wait
until all queued work is done, and then the GPU waits for the program. `Waits` counts these places. Inside it, the
device `meta` is a stand-in for a GPU: its tensors (`Stand`) hold values on the CPU, so everything is computed as usual,
and every operation that would wait on CUDA is noted with its place. As on CUDA, tensors of both places do not mix.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from perpetune.methods.base import Method
from perpetune.numerics.handover import Late
from perpetune.run import learn_protected
from perpetune.runtime import Silent
from perpetune.tasks import Batch, Examples, Task

DEVICE = torch.device("meta")
LIBRARY = str(Path(__file__).parents[1])
aten = torch.ops.aten
"""Torch's operations by name; each has overloads, such as `aten.index.Tensor`."""

READS = {aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.allclose}
# Their result's size depends on values, or the kernel on CUDA reads a value to choose how it works.
SIZES = {
    aten.nonzero,
    aten.argwhere,
    aten.masked_select,
    aten._unique2,
    aten._unique,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.unique_dim_consecutive,
    aten.bincount,
    aten.linalg_eig,
    aten._linalg_eigh,
    aten._linalg_svd,
    aten._linalg_check_errors,
    aten.linalg_lstsq,
    aten.multinomial,
}
COPIES = {aten._to_copy, aten.copy_, aten._copy_from}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


@dataclass(frozen=True)
class Wait:
    """One wait.

    Attributes:
        kind: `read` (a number), `size` (of a result), `to host`, `to device`, or `late`: a read of `Late`, which waits
            for work that was queued a while ago.
        where: the line of the library that asked for it, as `methods/olora.py:120 loss`; of another package if no line
            of the library is below it.
        by: the operation.
        at: the value of `Waits.at` then.
    """

    kind: str
    where: str
    by: str
    at: Any


class Stand(torch.Tensor):
    """A tensor on the device that stands in for a GPU; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Stand:
        made: Stand = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Stand({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            new = Stand(self.held.detach().clone())
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(new, self.requires_grad) if is_parameter else new
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class Waits(TorchDispatchMode):
    """Inside this context the device `meta` has values, and waits are noted while `on` is true.

    Attributes:
        found: the waits, in order.
        at: what is going on; each wait notes it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Wait] = []
        self.at: Any = None
        self.on = True
        self._late = False
        self._more = contextlib.ExitStack()

    def __enter__(self) -> Waits:
        self._more.enter_context(_Calls(self))
        self._more.enter_context(self._reading_late())
        self._more.enter_context(_without_autocast())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._more.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (kind := _kind(func, args, kwargs)) is not None:
            self.note(kind, str(func))
        return _computed(func, args, kwargs)

    def note(self, kind: str, by: str) -> None:
        """Note a wait at the line that runs now."""
        if self.on:
            self.found.append(Wait("late" if self._late else kind, _where(), by, self.at))

    def count(self, chosen: Callable[[Wait], bool] = lambda _: True) -> dict[str, int]:
        """How often each place waited, by kind and place, among the `chosen` waits."""
        return dict(Counter(f"{w.kind} {w.where}" for w in self.found if chosen(w)))

    @contextlib.contextmanager
    def _reading_late(self) -> Iterator[None]:
        read = Late.read

        def marked(late: Late) -> Tensor:
            before, self._late = self._late, True
            try:
                return read(late)
            finally:
                self._late = before

        Late.read = marked  # type: ignore[method-assign]
        try:
            yield
        finally:
            Late.read = read  # type: ignore[method-assign]


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """Inside this context torch's autocast accepts the stand-in, which it does not know, and does nothing there."""
    before = torch.autocast, torch.is_autocast_enabled

    def autocast(kind: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if kind == DEVICE.type else before[0](kind, *args, **kwargs)

    def enabled(*kind: str) -> bool:
        return DEVICE.type not in kind and before[1](*kind)

    torch.autocast, torch.is_autocast_enabled = autocast, enabled  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast, torch.is_autocast_enabled = before  # type: ignore[misc]


class _Calls(TorchFunctionMode):
    """What torch does in one call, without an operation that could be seen."""

    def __init__(self, waits: Waits):
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == DEVICE.type and not isinstance(args[0], Stand):
                self.waits.note("to device", func.__name__)
                on, self.waits.on = self.waits.on, False
                try:
                    return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
                finally:
                    self.waits.on = on
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and isinstance(args[0], Stand):
            self.waits.note("to host", func.__name__)
            return func(args[0].held, *args[1:], **kwargs)
        if func is torch.Tensor.__format__ and isinstance(args[0], Stand):
            self.waits.note("read", "format")
            return func(args[0].held, *args[1:])
        if func == torch.Tensor.data.__set__ and isinstance(args[0], Stand):  # type: ignore[attr-defined]
            args[0].held = args[1].held
        return func(*args, **kwargs)


def on_stand(module: nn.Module) -> nn.Module:
    """Move a module to the stand-in, inside of `Waits`. Its parameters stay the same objects, as on CUDA."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return module.to(DEVICE)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@dataclass(frozen=True)
class At:
    """What a method does.

    Attributes:
        task: the index of the task.
        within: the phase of `fit`; `before` or `after PHASE` outside of `fit`.
        number: of the step, from 1; outside of `fit` the number of batches that were loaded since then.
    """

    task: int
    within: str
    number: int

    @property
    def in_step(self) -> bool:
        return not self.within.startswith(("before", "after "))


class _Told(Silent):
    """Tells `Waits` where `fit` is."""

    def __init__(self, waits: Waits):
        self.waits, self.index, self.name, self.total = waits, 0, "", 0

    def phase(self, phase: str, steps: int, epochs: int, done: int) -> None:
        self.name, self.total = phase, steps
        self.waits.at = At(self.index, phase, done + 1)

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        over = done == self.total
        self.waits.at = At(self.index, f"after {self.name}" if over else self.name, 0 if over else done + 1)


class _Counted(Examples):
    """Examples that tell `Waits` of each batch that is loaded outside of `fit`."""

    def __init__(self, examples: Examples, waits: Waits):
        self.__dict__.update(examples.__dict__)
        self._examples, self._waits = examples, waits

    def __len__(self) -> int:
        return len(self._examples)

    def load(self, index: int, seed: int | None) -> Any:
        return self._examples.load(index, seed)

    def collate(self, items: Any) -> Batch:
        at = self._waits.at
        if not at.in_step:
            self._waits.at = At(at.task, at.within, at.number + 1)
        return self._examples.collate(items)

    def questions(self) -> Examples:
        return _Counted(self._examples.questions(), self._waits)

    def text(self, index: int) -> Any:
        return self._examples.text(index)

    def captions(self, index: int) -> Any:
        return self._examples.captions(index)


def survey(method: Method, tasks: Sequence[Task], *, batch_size: int = 4) -> Waits:
    """Let a method learn tasks on the stand-in. `Wait.at` is an `At`.

    Args:
        method: a new one, on the CPU.
        tasks: with `run.device` as it may be; it is changed.
        batch_size: of passes over what is protected.
    """
    with Waits() as waits:
        waits.on = False
        on_stand(method)
        told = _Told(waits)
        for task in tasks:
            task.runtime.device, task.runtime.progress = DEVICE, told
            told.index, waits.at, waits.on = task.index, At(task.index, "before", 0), True
            learn_protected(method, replace(task, train=_Counted(task.train, waits)), batch_size=batch_size)
            waits.on = False
    return waits


def in_steps(waits: Waits, first: int = 3, last: int = 5) -> dict[str, int]:
    """How often each place waited in these steps of all phases of a `survey`."""
    return waits.count(lambda wait: wait.at.in_step and first <= wait.at.number <= last)


def in_batches(waits: Waits, least: int = 3) -> dict[str, int]:
    """How often each place waited in passes over data of a `survey`, if it waited in so many batches of one task."""
    batches: dict[tuple[str, int, str], set[int]] = {}
    for wait in waits.found:
        if not wait.at.in_step and wait.at.number:
            batches.setdefault((wait.where, wait.at.task, wait.at.within), set()).add(wait.at.number)
    many = {where for (where, *_), numbers in batches.items() if len(numbers) >= least}
    return waits.count(lambda wait: wait.where in many and not wait.at.in_step)


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the held values; its results are on the device on which CUDA would have them."""
    given = _tensors(args, kwargs)
    stands, wanted = any(isinstance(t, Stand) for t in given), kwargs.get("device")
    to_stand = wanted is not None and torch.device(wanted).type == DEVICE.type
    if not (stands or to_stand):
        return func(*args, **kwargs)
    packet = func.overloadpacket
    mixed = stands and any(not isinstance(t, Stand) and t.dim() > 0 for t in given)
    if mixed and packet not in COPIES | INDEXED:
        raise RuntimeError(f"{func}: expected all tensors on the same device")
    more = {**kwargs, "device": torch.device("cpu")} if wanted is not None else kwargs
    out = func(*_mapped(_held, args), **{key: _mapped(_held, value) for key, value in more.items()})
    stays = to_stand or (stands and wanted is None)
    if packet in (aten.copy_, aten._copy_from):
        stays = isinstance(args[0], Stand)
    if stays:
        out = _mapped(lambda t: Stand(t) if isinstance(t, Tensor) else t, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _mapped(act: Callable[[Any], Any], value: Any) -> Any:
    """`act` of a value, or of what is in a list or tuple. Torch's trees can do more, and take most of the time."""
    if isinstance(value, list | tuple):
        return type(value)(_mapped(act, one) for one in value)
    return act(value)


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        found += [one for one in (value if isinstance(value, list | tuple) else (value,)) if isinstance(one, Tensor)]
    return found


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Stand) else value


def _kind(func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    """What CUDA would wait for in this operation; None if it would not wait."""
    packet, stand = func.overloadpacket, [isinstance(a, Stand) for a in args]
    if packet in COPIES:
        return _copied(func, args, kwargs)
    if not any(isinstance(t, Stand) for t in _tensors(args, kwargs)):
        return None
    if packet in READS:
        return "read"
    if packet in SIZES:
        return "size"
    if packet is aten.repeat_interleave and "Tensor" in func._overloadname and kwargs.get("output_size") is None:
        return "size"
    if packet in INDEXED and stand[0]:
        index = [i for i in args[1] if i is not None]
        if any(not isinstance(i, Stand) for i in index):
            return "to device"
        filled = packet not in (aten.index, aten._unsafe_index) and args[2].numel() == 1 and len(index) == 1
        if any(i.dtype in (torch.bool, torch.uint8) for i in index) and not filled:
            return "size"
    return None


def _copied(func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    if func.overloadpacket is aten._to_copy:
        wanted = kwargs.get("device")
        source, to = args[0], wanted is not None and torch.device(wanted).type == DEVICE.type
        stays, unasked = isinstance(source, Stand) == to, kwargs.get("non_blocking", False)
        if wanted is None or stays or unasked:
            return None
        return "to device" if to else "to host"
    target, source = args[:2]
    unasked = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    if isinstance(target, Stand) == isinstance(source, Stand) or unasked:
        return None
    return "to device" if isinstance(target, Stand) else "to host"


def _where() -> str:
    frame, other = sys._getframe(2), ""
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path != __file__ and "site-packages/torch" not in path and not path.endswith("handover.py"):
            if path.startswith(LIBRARY):
                return f"{path[len(LIBRARY) + 1 :]}:{frame.f_lineno} {name}{other}"
            other = other or f" ({'/'.join(path.split('/')[-2:])}:{frame.f_lineno} {name})"
        frame = frame.f_back  # type: ignore[assignment]
    return f"outside{other}"
