"""The pet `lora`: a low-rank update of a linear layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.errors import UsageError
from perpetune.numerics.lowrank import Factors, reduced, summed
from perpetune.numerics.projection import Operand, Site
from perpetune.pets.base import PET, Conditions, Pair, Place, is_plain, with_values
from perpetune.pets.choice import Choice


class LoRA(PET):
    """A low-rank update beside a frozen linear layer, `y = base(x) + s B A x`; Hu et al. 2021, arXiv:2106.09685.

    `A` is `(P r, d_in)` and `B` `(d_out, P r)`. `P` is the number of tuned parts of the layer: 1 for a linear layer
    with one role, 2 for q and v in a fused qkv. Each part has its own `r` rows of `A` and its own block of `B`. Output
    rows that belong to no part do not change. `B` starts at zero.

    `A` and `B` are float32 whatever the type of the frozen layer, because a step of the optimizer may be too small for
    bfloat16. Products are computed in the type of the input, as under autocast. PEFT also stores float32; without
    autocast it multiplies in float32 too, which needs a float32 copy of every input. With a half-precision input the
    result of PEFT differs in the last bits.

    After `renew` the product of earlier tasks stays beside the trained pair and is not trained any more:
    `y = base(x) + s (B A + B' A') x`, with the buffers `A' (R, d_in)` and `B' (d_out, R)`. Dropout does not act on
    this product. Before the first `renew` the two buffers are None.

    After `lean_on` an update that somebody else keeps acts in the same way, and with it a matrix of the layer's size:
    `y = base(x) + s (B A + B' A' + W') x`. Then nothing of `B'`, `A'` and `W'` is stored with the pet.

    Args:
        rank: `r`, the rank of each part.
        alpha: sets the scale, `s = alpha / r`.
        dropout: the probability with which an entry of `x` is dropped before `A` in training.
        rslora: use `s = alpha / sqrt(r)` instead; Kalajdzievski 2023, arXiv:2312.03732.

    Raises:
        UsageError: an option is out of range, or the place is not a linear layer.
    """

    compiles = True
    default_at: ClassVar[tuple[str, ...]] = ("q", "v")
    rest_down: Tensor | None
    rest_up: Tensor | None
    rest_dense: Tensor | None

    def __init__(
        self,
        place: Place,
        generator: torch.Generator,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rslora: bool = False,
    ):
        super().__init__()
        if not place.parts:
            roles = ", ".join(place.roles)
            raise UsageError(
                f"lora: {place.path} ({roles}) is not a linear layer; use roles such as q, v, proj, fc1, fc2"
            )
        if rank < 1:
            raise UsageError(f"lora: rank is {rank}; at least 1 is expected")
        if not (alpha > 0 and math.isfinite(alpha)):
            raise UsageError(f"lora: alpha is {alpha}; a number above 0 is expected")
        if not 0 <= dropout < 1:
            raise UsageError(f"lora: dropout is {dropout}; a probability below 1 is expected")
        self.rank, self.dropout, self.d_out, self.parts = rank, dropout, place.d_out, place.parts
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.down = nn.Parameter(torch.empty(len(place.parts) * rank, place.d_in))
        self.up = nn.ParameterList([torch.empty(stop - start, rank) for start, stop in place.parts])
        self.leans = False
        """Whether somebody else keeps what acts beside the trained pair."""
        self.register_buffer("rest_down", None)
        self.register_buffer("rest_up", None)
        self.register_buffer("rest_dense", None, persistent=False)
        self.restart(generator)

    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)  # (..., d_out)
        if self.down.dim() == 3:
            return self._each(y, x)
        if self.rest_dense is not None:
            y = self._added(y, x, self.rest_dense)
        downs, ups = [], []
        if self.rank:
            rows = F.dropout(x, self.dropout, self.training) if self.dropout else x
            down = F.linear(rows, self.down.to(x.dtype))  # (..., P r)
            downs, ups = [down], [self.up_matrix()]
            if self.watch is not None:
                self.seen("down", rows)
                for i, part in enumerate(down.split(self.rank, dim=-1)):
                    self.seen(f"up.{i}", part)
        if self.rest_down is not None and self.rest_up is not None:
            downs.append(F.linear(x, self.rest_down.to(x.dtype)))  # (..., R)
            ups.append(self.rest_up)
        return self._added(y, _beside(downs), _beside(ups)) if ups else y

    def _added(self, y: Tensor, rows: Tensor, matrix: Tensor) -> Tensor:
        """`y + s matrix rows`."""
        # `addmm` scales and adds within the product, so the wide output is read and written once.
        flat: Tensor = torch.addmm(
            y.reshape(-1, self.d_out),
            rows.reshape(-1, rows.shape[-1]).to(y.dtype),
            matrix.t().to(y.dtype),
            alpha=self.scale,
        )
        return flat.view(y.shape)

    def _each(self, y: Tensor, x: Tensor) -> Tensor:
        """`y + s B A x` with another `A` and `B` for each of `n` examples: `(n, P r, d_in)` and `(n, d_out, P r)`."""
        every, up = x.reshape(len(self.down), -1, x.shape[-1]), self.up_matrix()  # (B, n, d_in)
        rows = F.dropout(every, self.dropout, self.training) if self.dropout else every
        down = rows @ self.down.mT.to(x.dtype)  # (B, n, P r)
        if self.watch is not None:
            self.seen("down", rows.view(x.shape))
            for i, part in enumerate(down.chunk(len(self.parts), dim=-1)):
                self.seen(f"up.{i}", part.reshape(*x.shape[:-1], -1))
        if self.rest_down is not None and self.rest_up is not None:
            down = torch.cat([down, every @ self.rest_down.mT.to(x.dtype)], dim=-1)
            up = torch.cat([up, self.rest_up], dim=-1)
        wide = y.reshape(len(down), -1, self.d_out)
        return torch.baddbmm(wide, down.to(y.dtype), up.mT.to(y.dtype), alpha=self.scale).view(y.shape)

    def blend(self, members: Sequence[PET], choice: Choice) -> dict[str, Tensor]:
        """The members of one example act as one LoRA of their joined rank; the choice's weights multiply their `B`."""
        loras = [pet for pet in members if isinstance(pet, LoRA)]
        if any(pet.leans for pet in loras):
            raise UsageError(
                "a LoRA beside which those of earlier tasks act (method olora) is no member of a choice: put its set "
                "in force for the whole batch"
            )
        downs = choice.picked([pet.down for pet in loras])  # (B, k, P r, d_in)
        by_part = downs.unflatten(2, (len(self.parts), self.rank)).transpose(1, 2)  # (B, P, k, r, d_in)
        values = {"down": by_part.flatten(1, 3)}
        for i in range(len(self.up)):
            values[f"up.{i}"] = _side_by_side(choice.weighted(choice.picked([pet.up[i] for pet in loras])))
        if self.rest_down is not None and self.rest_up is not None:
            values["rest_down"] = choice.picked([_tensor(pet.rest_down) for pet in loras]).flatten(1, 2)
            ups = choice.picked([_tensor(pet.rest_up) for pet in loras])
            values["rest_up"] = _side_by_side(choice.weighted(ups))
        return values

    def part_seen(self, site: str, rows: Tensor, position: int, choice: Choice) -> Tensor:
        return rows if site == "down" else rows.chunk(choice.each, dim=-1)[position]

    def up_matrix(self) -> Tensor:
        """`B (d_out, P r)`: the block of each part at its own rows and columns, zero elsewhere.

        If each example has its own `B`, a first axis lists the examples.
        """
        if len(self.parts) == 1 and self.up[0].shape[-2] == self.d_out:
            whole: Tensor = self.up[0]
            return whole
        rows, end, width = [], 0, self.down.shape[-2]
        rank, lead = width // len(self.parts), self.down.shape[:-2]
        for i, ((start, stop), up) in enumerate(zip(self.parts, self.up, strict=True)):
            rows.append(up.new_zeros(*lead, start - end, width))
            rows.append(F.pad(up, (i * rank, (len(self.parts) - 1 - i) * rank)))
            end = stop
        rows.append(self.down.new_zeros(*lead, self.d_out - end, width))
        return torch.cat(rows, dim=-2)

    def factors(self) -> list[Factors]:
        """The trained `B (rows, r)` and `A (r, d_in)` of each part; the pet adds `s B A` to the layer's weight."""
        return list(zip(self.up, self.down.unflatten(0, (len(self.parts), self.rank)), strict=True))

    def whole(self) -> Factors:
        """`B (d_out, P r + R)` and `A (P r + R, d_in)`: the trained pair and the product of earlier tasks together.

        `s B A` is the whole update of the layer's weight. If a matrix of the layer's size is in it (`lean_on`), the
        rank is the smaller width of the layer.
        """
        pair: Factors = self.up_matrix(), self.down
        if self.rest_up is not None and self.rest_down is not None:
            pair = summed([pair, (self.rest_up, self.rest_down)])
        if self.rest_dense is None:
            return pair
        matrix = self.rest_dense + pair[0] @ pair[1]
        rank = min(matrix.shape)
        one = torch.eye(rank, dtype=matrix.dtype, device=matrix.device)
        return (one, matrix) if rank == self.d_out else (matrix, one)

    @torch.no_grad()
    def set_factors(self, factors: Sequence[Factors]) -> None:
        """Write `factors` over the trained values; same order and shapes as in `factors()`."""
        for (up, down), (new_up, new_down) in zip(self.factors(), factors, strict=True):
            up.copy_(new_up)
            down.copy_(new_down)

    @torch.no_grad()
    def restart(self, generator: torch.Generator) -> None:
        """Give the pet the values of a new one: `A` drawn, `B` zero, no product of earlier tasks.

        Args:
            generator: a generator of the CPU.
        """
        self._set_rest(None)
        drawn = torch.empty(self.down.shape)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        self.down.copy_(drawn)
        for up in self.up:
            up.zero_()

    @torch.no_grad()
    def resize(self, rank: int) -> None:
        """Change the rank and keep the scale. All trained values become zero; the caller sets them afterwards.

        If the pet has that rank already, nothing changes.
        """
        if rank == self.rank:
            return
        trained = self.down.requires_grad
        self.down = nn.Parameter(self.down.new_zeros(len(self.parts) * rank, self.down.shape[1]), trained)
        self.up = nn.ParameterList([nn.Parameter(up.new_zeros(len(up), rank), trained) for up in self.up])
        self.rank = rank

    def fold(self, base: nn.Module) -> nn.Module | None:
        """A linear layer with weight `W + s B A`, or GPT-2's `Conv1D` with the transpose. Dropout is left out, because
        it acts in training only."""
        up, down = self.whole()
        update = self.scale * (up @ down)
        if is_plain(base, nn.Linear):
            return with_values(base, base.weight + update, base.bias)
        if f"{type(base).__module__}.{type(base).__name__}" == "transformers.pytorch_utils.Conv1D":
            return with_values(base, base.get_parameter("weight") + update.t(), base.get_parameter("bias"))
        return None

    def sites(self, conditions: Conditions = "exact") -> list[Site]:
        """`A` meets the inputs `x`, and `B` meets `A x`: PEGP eq. 13 and 14. They are exact here, because then
        `(B + ΔB)(A + ΔA) x = B A x`."""
        return [Site("down", Operand(self.down)), *(Site(f"up.{i}", Operand(up)) for i, up in enumerate(self.up))]

    # -- renewal --------------------------------------------------------------------------------------

    def renewable(self) -> tuple[Site, Pair] | None:
        return Site("down", Operand(self.down)), self

    def trained(self) -> list[nn.Parameter]:
        return list(self.parameters())

    @torch.no_grad()
    def product(self) -> Factors:
        up, down = self.whole()
        return torch.cat([self.scale * up[start:stop] for start, stop in self.parts]), down

    @torch.no_grad()
    def renew(self, start: Tensor, rank: int | None = None, moments: Tensor | None = None) -> None:
        """As in `Pair.renew`. The resting product is stored as joined factors; once their rank exceeds the smaller
        width of the layer, they are replaced by exact factors of that width."""
        if any(up.any() for up in self.up):
            up, down = self.whole()
            most = min(sum(stop - start for start, stop in self.parts), down.shape[1])
            most = most if rank is None else min(most, rank)
            if len(down) > most:
                rows = torch.cat([torch.arange(start, stop) for start, stop in self.parts]).to(up.device)
                kept, new_down = reduced((up[rows], down), most, moments)
                down, up = new_down.to(down), up.new_zeros(len(up), len(new_down)).index_copy_(0, rows, kept.to(up))
            self._set_rest((up.detach().clone(), down.detach().clone()))
        self.down.copy_(start)
        for up in self.up:
            up.zero_()

    def lean_on(self, rest: Factors | None, dense: Tensor | None = None) -> None:
        """Let an update that somebody else keeps act beside the trained pair, in place of what acted there before.

        It acts without dropout, is not trained, and is not stored with the pet.

        Args:
            rest: `B' (d_out, R)` and `A' (R, d_in)`.
            dense: a matrix `W' (d_out, d_in)`; `s (B' A' + W')` is added to the layer's weight.
        """
        self._set_rest(rest, dense, leans=True)

    def leaned_on(self) -> tuple[Factors | None, Tensor | None]:
        """What `lean_on` was given."""
        both = self.rest_up is not None and self.rest_down is not None
        return (_tensor(self.rest_up), _tensor(self.rest_down)) if both else None, self.rest_dense

    def _set_rest(self, rest: Factors | None, dense: Tensor | None = None, *, leans: bool = False) -> None:
        up, down = (None, None) if rest is None else rest
        for name, value in (("rest_down", down), ("rest_up", up)):
            self.register_buffer(name, value, persistent=not leans)
        self.rest_dense, self.leans = dense, leans

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Give the buffers of the resting product the shapes of those that are about to be loaded."""
        if self.leans:
            return
        wanted = {name: shapes.get(name) for name in ("rest_down", "rest_up")}
        for name, shape in wanted.items():
            now = getattr(self, name)
            if shape is None or None in wanted.values():
                setattr(self, name, None)
            elif now is None or now.shape != shape:
                setattr(self, name, self.down.detach().new_zeros(shape))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = {name: state_dict.get(f"{prefix}{name}") for name in ("rest_down", "rest_up")}
        self.make_room({name: tuple(value.shape) for name, value in names.items() if value is not None})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def idle(self) -> list[str]:
        return ["down"] if not any(up.any() for up in self.up) else []

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, parts={self.parts}, d_out={self.d_out}"


def _side_by_side(blocks: Tensor) -> Tensor:
    """`(B, k, o, r)` in the shape `(B, o, k r)`: the columns of one member beside those of the next."""
    return blocks.transpose(1, 2).flatten(2, 3)


def _beside(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices side by side; one alone is not copied."""
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices), dim=-1)


def _tensor(value: Tensor | None) -> Tensor:
    assert value is not None, "pets that are blended have the same tensors"
    return value
