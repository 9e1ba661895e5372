"""Protection by gradient projection in any training loop.

protection = perpetune.protect(model, energy=0.99)
protection.guard(optimizer)
for task in tasks:
    train(model, optimizer, task)
    protection.consolidate(task.batches)
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from perpetune.errors import PerpetuneError, StateError, UsageError, closest
from perpetune.numerics.projection import Closed, ProjectedStep
from perpetune.protection.batches import in_step, shared, summed
from perpetune.protection.config import ProtectConfig
from perpetune.protection.protection import Certificate, Protection, _key
from perpetune.protection.renewal import PeftPair, cut, forget
from perpetune.protection.sites import Sum, Watched, called, linear_sites, peft_pairs, pet_sites
from perpetune.protection.stored import fault, read, write
from perpetune.seeding import generator

Others = Literal["freeze", "leave"]


def protect(
    model: nn.Module,
    *,
    energy: float = 0.99,
    skip: nn.Module | Iterable[nn.Module] = (),
    others: Others = "freeze",
    seed: int = 0,
    **options: Any,
) -> DropIn:
    """Protect every trainable linear layer of `model`, and perpetune's own pets in it.

    Call it after PEFT has added its layers: only parameters that are trainable now are protected.

    Args:
        energy: the share of the features' energy that is protected. `options` are the other fields of `ProtectConfig`
            except `reference`.
        skip: a module or several that are left out, with everything in them; they move freely.
        others: trainable parameters in no linear layer (norms, scales, embeddings, biases alone). `freeze`: they do
            not move once something is protected. `leave`: they move freely.
        seed: the seed of the random control.

    Raises:
        UsageError: an option is out of range, there is nothing to protect, or a layer's outputs cannot be kept.
    """
    config = _config({"energy": energy, **options})
    if others not in ("freeze", "leave"):
        raise UsageError(f"protect: others is {others!r}; freeze or leave is expected")
    modules = set(model.modules())
    if isinstance(skip, nn.Module) and (skip in modules or not isinstance(skip, Iterable)):
        skip = [skip]  # a ModuleList outside of the model may be a slice of one inside; then its items are skipped
    skipped: set[nn.Module] = set()
    for root in skip:
        if not isinstance(root, nn.Module):
            raise UsageError(f"protect: skip holds {root!r}; modules are expected, such as model.head")
        skipped.update(root.modules())
    if not modules.issuperset(skipped):
        raise UsageError("protect: skip names a module that is not in the model")
    left_out = {p for m in skipped for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in left_out and (how := cut(parameter)):
            raise UsageError(_whole(name, how))
    for path, module in model.named_modules():
        if module not in skipped and len(getattr(module, "lora_magnitude_vector", ())):
            raise UsageError(
                f"protect: {called(path)} is DoRA, which divides by the norm of the whole weight, so old outputs move "
                "despite the projection: use plain LoRA (use_dora=False), or leave it out with skip"
            )
    sites, _, free = pet_sites(model, config.conditions, renew=config.renews)
    sites = [w for w in sites if w.module not in skipped and any(p.requires_grad for p in w.site.operand.parameters)]
    pairs = peft_pairs(model, skipped) if config.renew else {}
    sites += linear_sites(model, skipped, pairs)
    if config.renew and not any(w.pair is not None for w in sites):
        raise UsageError(
            "protect: renew is on, but the model has no LoRA to renew (a linear layer that is trained itself cannot be "
            "renewed): put one in, or leave renew out"
        )
    free += [pair.b.weight for pair in pairs.values()]
    covered = {p for w in sites for p in w.site.operand.parameters}.union(free)
    covered.update(p for m in skipped for p in m.parameters())
    loose = [p for p in model.parameters() if p.requires_grad and p not in covered]
    coarse = [w for w in sites if w.site.operand.weight.dtype in (torch.bfloat16, torch.float16)]
    if coarse:
        warnings.warn(
            f"protect: {len(coarse)} of {len(sites)} sites are trained in {coarse[0].site.operand.weight.dtype} "
            f"({coarse[0].name}), and its rounding moves old outputs more than protection can prevent: keep trained "
            "parameters in float32",
            stacklevel=2,
        )
    return DropIn(model, sites, config, still=loose if others == "freeze" else (), seed=seed)


class Guard(ProjectedStep):
    """The guard on one optimizer, until `remove` or the end of the optimizer. It is updated with the protection."""

    def __init__(self, optimizer: torch.optim.Optimizer, protection: DropIn):
        self._optimizer, self._protection = weakref.ref(optimizer), protection
        super().__init__(optimizer, (), project=protection.config.project)

    def _closed(self) -> Closed:
        return self._protection.closed()

    def _pre(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._protection.waiting:
            raise UsageError(
                "protect: renew is on, and data were consolidated since the last renewal: call protection.renew() "
                "before the next step, because B would move old outputs"
            )
        return super()._pre(optimizer, args, kwargs)

    def follow(self) -> None:
        """Update the guard to the directions that are protected now."""
        optimizer = self._optimizer()
        assert optimizer is not None
        super().remove()
        self._attach(optimizer)

    def remove(self) -> None:
        super().remove()
        if (optimizer := self._optimizer()) is not None:
            self._protection.guards.pop(optimizer, None)


class DropIn(Protection):
    """The result of `perpetune.protect`: call `guard` with an optimizer, and `consolidate` after each task."""

    def __init__(
        self,
        model: nn.Module,
        sites: Iterable[Watched],
        config: ProtectConfig,
        *,
        still: Iterable[nn.Parameter] = (),
        seed: int = 0,
    ):
        super().__init__(list(sites), config, still=list(still), seed=seed)
        self._model = (model,)  # in a tuple, so that it does not become a part of this module's state
        self._decodes = _decodes(model)
        rests = {_key(w.name): w.pair.rest for w in self.sites if isinstance(w.pair, PeftPair)}
        if rests:
            self.rests = nn.ModuleDict(rests)
            """The products of earlier tasks at layers of PEFT. A pet of perpetune has them in its own state."""
        self.guards: weakref.WeakKeyDictionary[torch.optim.Optimizer, Guard] = weakref.WeakKeyDictionary()
        """The guards by their optimizers, as long as these exist. A copy or a pickle has no guards."""
        self.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call] # torch gives it no types

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "guards"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call] # nor this
        self.guards = weakref.WeakKeyDictionary()

    # -- while training -------------------------------------------------------------------------------

    def guard(self, optimizer: torch.optim.Optimizer) -> Guard:
        """Keep the steps of `optimizer` out of the protected directions, now and after every later `consolidate`.

        `optimizer` may be a wrapper of accelerate or Lightning. An optimizer has one guard; a second call returns the
        same one. The guard can be used as a context manager, which removes it at the end. Parameters that the optimizer
        gets later (`add_param_group`) are guarded from its next step on.

        Raises:
            UsageError: the optimizer trains nothing that is protected, or a layer's weight without its bias.
        """
        optimizer = _bare(optimizer)
        if optimizer in self.guards:
            return self.guards[optimizer]
        trained = {p for group in optimizer.param_groups for p in group["params"]}
        if how := next((how for p in trained if (how := cut(p))), ""):
            named = {p: name for name, p in self._model[0].named_parameters()}
            named = {p: named.get(p, "a parameter of the optimizer") for p in trained if cut(p)}
            raise UsageError(_whole(min(named.values()), how))
        operands = [(w.name, w.site.operand.parameters) for w in self.sites]
        if trained.isdisjoint([*(p for _, parameters in operands for p in parameters), *self.still]):
            raise UsageError(
                "protect: the optimizer trains nothing that is protected: create it with the parameters that the model "
                "had when protect was called (flattened copies cannot be guarded)"
            )
        for name, parameters in operands:
            if not trained.isdisjoint(parameters) and not trained.issuperset(parameters):
                raise UsageError(
                    f"protect: the optimizer trains only one of weight and bias of {name.removesuffix('/weight')}: "
                    "give it both, or set requires_grad to False on the other before protect"
                )
        self.guards[optimizer] = Guard(optimizer, self)
        return self.guards[optimizer]

    def _follow(self) -> None:
        for guard in list(self.guards.values()):
            guard.follow()

    # -- after a task ---------------------------------------------------------------------------------

    def consolidate(
        self,
        batches: Iterable[Any],
        forward: Callable[[Any], object] | None = None,
        *,
        mask: Callable[[Any], Tensor | None] | None = None,
        total: Sum | None = None,
    ) -> Certificate:
        """Protect the outputs of the model on `batches`: the data of a task that was learned, or reference data before
        the first task, to keep what the model knows already.

        During the call the model is in evaluation mode; afterwards it is in the mode it had before.

        Args:
            batches: a list or a loader. An iterator works only after the first training step.
            forward: runs the model on a batch, which is on the model's device. By default a dictionary is passed as
                keywords, without `labels` unless the model makes its decoder's input from them (`is_encoder_decoder`);
                of a tuple or list the first element is passed; anything else is passed as it is.
            mask: gives `(B, N)` of a batch, true for the tokens that count, for every site whose rows have N tokens.
                By default the `attention_mask` of a dictionary, unless a decoder's input has the same length.
            total: sums a tensor over all processes. By default torch.distributed does, if it is in use.

        Returns:
            The certificate: how far the outputs on earlier data have moved, before these data were added.

        Raises:
            PerpetuneError: features are not finite, or a site saw no data. Nothing changes then.
            UsageError: a layer's parameters were replaced or have another shape than when its features were added, or
                `batches` is an iterator and has to be read twice.
        """
        (model,) = self._model
        full_before = {w.name for w in self.sites if self.of(w).room == 0}
        asked = forward if forward is not None else self._forward
        batches = shared(batches, next(model.parameters()).device, self.config.samples)
        with _evaluating(model):
            certificate = super().consolidate(
                in_step(model, batches, asked),
                asked,
                mask=mask if mask is not None else self._attention,
                total=total if total is not None else summed,
            )
        self._follow()
        full = [name for name in certificate["full"] if name not in full_before]
        if full and self.config.directions == "features" and self.config.strength == "hard":
            chosen = [w for w in self.sites if self._chosen(w)]
            cure = "" if self.config.renew else "a larger rank or "
            warnings.warn(
                f"protect: {len(full)} of {len(chosen)} sites have no free direction left and do not change from now "
                "on "
                f"({full[0]}{', …' if len(full) > 1 else ''}): {cure}a lower energy leaves some free",
                stacklevel=2,
            )
        return certificate

    # -- between tasks --------------------------------------------------------------------------------

    def renew(
        self,
        batches: Iterable[Any] | None = None,
        forward: Callable[[Any], object] | None = None,
        *,
        mask: Callable[[Any], Tensor | None] | None = None,
        total: Sum | None = None,
    ) -> None:
        """Store the product of each LoRA, and start a new pair in the free directions. No output changes.

        Call it after `consolidate` and before the next task. If nothing was consolidated since the last call, it does
        nothing. `A` and `B` stay the same parameters; guarded optimizers lose their state of them. Linear layers that
        are trained themselves are not renewed; they are protected as without `renew`.

        Args:
            batches: a few batches of the next task, for `start="leading"`.
            forward: as for `consolidate`.
            mask: as for `consolidate`.
            total: as for `consolidate`.

        Raises:
            UsageError: `protect` was called without `renew=True`, or the start needs batches and there are none.
        """
        if not self.config.renew:
            raise UsageError("protect: renew is off: call perpetune.protect(model, renew=True) before the first task")
        if not self.waiting:
            return
        if self.config.start == "leading" and batches is None:
            raise UsageError('protect: start="leading" needs a few batches of the next task: call renew(batches)')
        (model,) = self._model
        device = next(model.parameters()).device
        with _evaluating(model):
            asked = forward if forward is not None else self._forward
            few = shared(batches, device, self.config.samples) if batches is not None else None
            self.renew_pairs(
                generator(self.seed, "renew", self.consolidated),
                () if few is None else in_step(model, few, asked),
                asked,
                mask=mask if mask is not None else self._attention,
                total=total if total is not None else summed,
            )
        for optimizer in list(self.guards):
            forget(optimizer, [p for w in self.sites if w.pair is not None for p in w.pair.trained()])

    def merge_rest(self) -> None:
        """Add the stored products of earlier tasks at layers of PEFT to the frozen weights.

        Call it after the last task, before PEFT merges or unloads its adapter.

        Raises:
            UsageError: a frozen layer is not a plain linear layer (it is quantised, for example). Nothing changes then.
        """
        pairs = {w.name: w.pair for w in self.sites if isinstance(w.pair, PeftPair)}
        for name, pair in pairs.items():
            if not pair.mergeable:
                kind = type(pair.layer.get_base_layer()).__name__
                raise UsageError(
                    f"protect: the product of earlier tasks at {name} cannot be merged into {kind}: keep the "
                    "protection's file"
                )
        for pair in pairs.values():
            pair.merge()

    def _forward(self, batch: Any) -> object:
        (model,) = self._model
        if isinstance(batch, Mapping):
            return model(**{key: value for key, value in batch.items() if self._decodes or key != "labels"})
        return model(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def _attention(self, batch: Any) -> Tensor | None:
        """The `attention_mask` of a dictionary as `(B, N)`, true for tokens, false for padding; or None."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        decoded = [batch.get(name) for name in ("labels", "decoder_input_ids")]
        if self._decodes and any(isinstance(d, Tensor) and d.shape == mask.shape for d in decoded):
            return None  # the mask is the encoder's, and the decoder's rows have the same number of tokens
        return mask.bool()

    # -- certificate ----------------------------------------------------------------------------------

    def report(self) -> Certificate:
        """The present certificate: how far the outputs on all data added so far have moved since then (`worst` and
        `median` over the sites, relative to the outputs), the share of free directions (`room`), and both for each of
        the `sites`."""
        return {key: value for key, value in self.certificate().items() if key != "rows"}

    def __str__(self) -> str:
        if not self.consolidated:
            return f"protection of {len(self.sites)} sites: nothing is protected yet"
        begin = f"protection of {len(self.sites)} sites, consolidated {self.consolidated} times"
        try:
            report, (closed, still) = self.report(), self.closed()
        except PerpetuneError as error:
            return f"{begin}: {str(error).removeprefix('protect: ')}"
        moved = "there is nothing to measure"
        if report["worst"] is not None:
            moved = f"old outputs moved by {report['worst']:.2%} at most, median {report['median']:.2%}"
        if not closed:
            return f"{begin}: {moved}; nothing is kept from moving"
        others = f", {len(still)} other parameters do not move" if still else ""
        room = f"{report['room']:.1%} of the directions are free, {len(report['full'])} sites full"
        return f"{begin}: {moved}; {room}{others}"

    # -- state ----------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Check the state. Torch calls this before it loads anything of this module, alone or as part of another one.

        Raises:
            StateError: the state does not fit; nothing of the protection changes then.
        """
        mine = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        if mine or not prefix:  # if another module's state has no protection, torch reports that in strict mode
            self._check_state(mine)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file. If that fails, no partial file is left.

        Raises:
            PerpetuneError: the file cannot be written.
        """
        write(Path(path), self.state_dict())

    def load(self, path: str | Path) -> None:
        """Read a file that `save` wrote.

        Raises:
            StateError: there is no such file, it is damaged or of another kind, or it does not fit. Nothing changes
                then.
        """
        self.load_state_dict(read(path))

    def _check_state(self, state: Mapping[str, Any]) -> None:
        expected = {"_extra_state"}
        for watched, key in zip(self.sites, self.memory, strict=True):
            prefix = f"memory.{key}."
            names = [f"{prefix}{name}" for name in self.of(watched).state_dict()]
            expected.update(names)
            missing = [name for name in names if name not in state]
            if missing:
                raise StateError(
                    f"protect: the state has nothing for {watched.name} ({missing[0]} is missing): it belongs to "
                    "another model, or to other trained layers"
                )
            wrong = fault(self.of(watched), {n.removeprefix(prefix): state[n] for n in names})
            if wrong:
                raise StateError(f"protect: the state does not fit at {watched.name}: {wrong}")
        for watched in self.sites:
            if isinstance(watched.pair, PeftPair):
                names = [f"rests.{_key(watched.name)}.{name}" for name in ("up", "down")]
                expected.update(names)
                up, down = (state.get(name) for name in names)
                if not (isinstance(up, Tensor) and isinstance(down, Tensor) and watched.pair.rest.fits(up, down)):
                    raise StateError(
                        f"protect: the state has no product of earlier tasks for {watched.name}, or it does not fit"
                    )
        unexpected = sorted(set(state) - expected)
        if unexpected:
            raise StateError(
                f"protect: the state has {unexpected[0]}, but the model has no such site: it belongs to another model"
            )
        about = state.get("_extra_state")
        if not (isinstance(about, dict) and type(about.get("consolidated")) is int and about["consolidated"] >= 0):
            raise StateError("protect: the state has no count of consolidated data: it does not belong to a protection")
        if self.config.renew and type(about.get("renewed")) is not int:
            raise StateError("protect: the state has no count of renewals: it was made without renew")


def _loaded(protection: nn.Module, _: object) -> None:
    """Called by torch after a state was loaded, alone or as part of another module's; updates the guards."""
    assert isinstance(protection, DropIn)
    protection._follow()


def _decodes(model: nn.Module) -> bool:
    """Whether the model, or a model inside it, is one of transformers' models with an encoder and a decoder."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return any(getattr(config, "is_encoder_decoder", False) is True for config in configs)


def _config(options: dict[str, Any]) -> ProtectConfig:
    known = [name for name in ProtectConfig.model_fields if name != "reference"]
    for name in options:
        if name == "reference":
            raise UsageError(
                "protect: reference is an option of recipes: call consolidate(batches) before the first task instead"
            )
        if name not in known:
            raise UsageError(f"protect: there is no option {name!r}; {closest(name, [*known, 'skip', 'others'])}")
    try:
        return ProtectConfig(**options)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"protect: {first['loc'][0]} is {first['input']!r}: {first['msg']}") from None


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer whose hooks run. Wrappers of accelerate and Lightning hold it as `optimizer`."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside this context the model is in evaluation mode; afterwards every module has the mode it had before."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was in training:
            module.training = was


def _whole(name: str, how: str) -> str:
    """The error of a trained parameter that is not whole in each process."""
    return (
        f"protect: {name} is trained and {how}, and only steps of whole parameters can be projected: shard what is "
        "frozen alone, with `fully_shard(ignored_params=…)` or the plugin's `ignored_modules`"
    )
