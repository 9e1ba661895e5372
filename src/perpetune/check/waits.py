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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from perpetune.numerics.handover import Late

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
        made: Stand = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Stand({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        found: Tensor | None = memo.get(id(self))
        if found is None:
            new = Stand(self.held.detach().clone())
            found = nn.Parameter(new, self.requires_grad) if isinstance(self, nn.Parameter) else new
            memo[id(self)] = found
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
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

        setattr(Late, "read", marked)  # noqa: B010  # mypy takes it for a method that is bound already
        try:
            yield
        finally:
            setattr(Late, "read", read)  # noqa: B010


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
            return format(args[0].held, *args[1:])
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
    frame: FrameType | None = sys._getframe(2)
    other = ""
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path != __file__ and "site-packages/torch" not in path and not path.endswith("handover.py"):
            if path.startswith(LIBRARY):
                return f"{path[len(LIBRARY) + 1 :]}:{frame.f_lineno} {name}{other}"
            other = other or f" ({'/'.join(path.split('/')[-2:])}:{frame.f_lineno} {name})"
        frame = frame.f_back
    return f"outside{other}"
