"""The values of one set of pets beside those of others: their mean, and values orthogonal to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.numerics.lowrank import merged
from perpetune.pets import PET, LoRA, pets


@torch.no_grad()
def average_into(model: nn.Module, name: str, others: Sequence[str], share: float) -> None:
    """Set the pets of a set to `(1 - share)` times themselves plus `share` times the mean of the other sets' pets.

    LoRA is averaged as the product `B A`; the result is the nearest one of its rank. Other pets are averaged value by
    value.

    Raises:
        UsageError: a LoRA has another rank than the others.
    """
    weights = [1 - share, *[share / len(others)] * len(others)]
    sets = [pets(model, other) for other in others]
    for place, pet in enumerate(pets(model, name)):
        same = [pet, *(one[place] for one in sets)]
        if isinstance(pet, LoRA):
            loras = [one for one in same if isinstance(one, LoRA)]
            if len({lora.rank for lora in loras}) > 1:
                raise UsageError(f"the set of pets {name!r} has another rank than {', '.join(others)}")
            parts = zip(*(list(lora.factors()) for lora in loras), strict=True)
            pet.set_factors([merged(list(part), weights, pet.rank) for part in parts])
            continue
        for tensors in zip(*(one.parameters() for one in same), strict=True):
            mean = sum(w * t.detach() for w, t in zip(weights, tensors, strict=True))
            assert isinstance(mean, Tensor)
            tensors[0].copy_(mean)


@torch.no_grad()
def drawn_orthogonal(model: nn.Module, earlier: Sequence[str], new: Sequence[str]) -> None:
    """Make the values of new sets orthogonal to those of earlier sets and to each other, as Gram and Schmidt do.

    Each parameter of a pet counts as one vector and keeps its length. CODA-Prompt, Smith et al. 2023, arXiv:2211.13218.
    A parameter that is zero, such as LoRA's `B` at its start, stays zero; one with no direction left stays as drawn.
    """
    sets: list[list[PET]] = [pets(model, name) for name in earlier]
    for name in new:
        mine = pets(model, name)
        for place, pet in enumerate(mine):
            for key, values in pet.named_parameters():
                others = [one[place].get_parameter(key).detach() for one in sets]
                if others:
                    values.copy_(_orthogonal(values.detach(), others))
        sets.append(mine)


def _orthogonal(values: Tensor, others: Sequence[Tensor]) -> Tensor:
    """`values` without their part in the span of `others`, at their old length."""
    flat, before = values.flatten().cpu().double(), torch.stack([o.flatten().cpu().double() for o in others])
    basis, sizes, _ = torch.linalg.svd(before.mT, full_matrices=False)
    basis = basis[:, sizes > 1e-9 * sizes.max()] if sizes.numel() and float(sizes.max()) > 0 else basis[:, :0]
    free = flat - basis @ (basis.mT @ flat)
    if float(free.norm()) <= 1e-6 * float(flat.norm()):
        return values
    new: Tensor = (free * (flat.norm() / free.norm())).to(values).view_as(values)
    return new
