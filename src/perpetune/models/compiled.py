"""`run.compile`: the blocks of a frozen net through `torch.compile`.

Blocks are compiled, not the whole net: blocks of one class have one code, so twelve of them are compiled once, and what
stands between them (pictures put among tokens, taps) stays as it is. torch guards the graph: it compiles again when
another set of pets is in force, a pet got other tensors, or gradients are switched on. What it does not guard is looked
at here in every call, and then the block runs as it always did: hooks, code that watches features, choices of pets for
each example, and kinds of pets that act on more than their tensors.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.models.backbone import Backbone
from perpetune.models.towers import towers
from perpetune.pets.base import Slot

FROM_TORCH = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")
PLAIN = (Tensor, tuple, list, dict, bool, int, float, str, type(None))


class Compiler:
    """One compiled `forward` for each class of blocks.

    Args:
        mode: of `torch.compile`; None is its default.
        backend: of `torch.compile`.
    """

    def __init__(self, mode: str | None = None, backend: str | Callable[..., Any] = "inductor"):
        self.mode, self.backend = mode, backend
        self.failed = False
        """Whether a block could not be compiled; from then on none is."""
        self._made: dict[type[nn.Module], Callable[..., Any]] = {}

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of the compiled block; of the block as it is, with a warning, if it cannot be compiled."""
        kind = type(block)
        if kind not in self._made:
            self._made[kind] = torch.compile(kind.forward, mode=self.mode, backend=self.backend)
        try:
            return self._made[kind](block, *args, **kwargs)
        except Exception as error:
            if not type(error).__module__.startswith(FROM_TORCH):
                raise
            self.failed = True
            reason = " ".join(str(error).split())[:200]
            warnings.warn(
                f"run.compile: {kind.__name__} cannot be compiled here, so the model runs without it ({reason})",
                stacklevel=2,
            )
            return kind.forward(block, *args, **kwargs)


class CompiledForward:
    """Stands in the place of a block's `forward`. A copy of the block gets its own."""

    def __init__(self, block: nn.Module, compiler: Compiler):
        self.block, self.compiler = block, compiler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # The memory of a text that is being written grows in each call
        plain = all(isinstance(value, PLAIN) for value in kwargs.values())
        if plain and not self.compiler.failed and can_compile(self.block):
            return self.compiler(self.block, args, kwargs)
        return type(self.block).forward(self.block, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledForward:
        return CompiledForward(copy.deepcopy(self.block, memo), self.compiler)


def can_compile(block: nn.Module) -> bool:
    """Whether a compiled block computes now what the block itself would.

    Its own hooks do not matter, because they are outside of `forward`.
    """
    for module in block.modules():
        if module is not block and (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        ):
            return False
        if isinstance(module, Slot) and module.active is not None:
            active = module.active if isinstance(module.active, tuple) else (module.active,)
            for one in active:
                if not isinstance(one, str):
                    return False
                pet = module.pet(one)
                if not pet.compiles or pet.watch is not None:
                    return False
    return True


def compile_blocks(backbone: Backbone, compiler: Compiler) -> str:
    """Let the blocks of all towers of a backbone be compiled when they are called first. Tensors and names stay.

    Returns:
        Why blocks stay as they are, in one line; empty if all can be compiled.
    """
    try:
        found = towers(backbone.net)
    except UsageError:
        return f"run.compile: the blocks of {backbone.spec} are not known, so it runs without it"
    for tower in found.values():
        if backbone.quantised_from is not None:
            return f"run.compile: {backbone.spec} is in 4 bits, so it runs without it"
        for block in tower.blocks:
            if getattr(block, "gradient_checkpointing", False):
                return "run.compile: blocks with backbone.gradient_checkpointing run without it"
            if "forward" not in vars(block):
                block.forward = CompiledForward(block, compiler)
    return ""
