"""Protection in Hugging Face's `Trainer`, and in what is made of it: TRL's trainers.

trainer.add_callback(ProtectionCallback(perpetune.protect(trainer.model)))
trainer.train()
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import TrainingArguments

from perpetune.errors import UsageError
from perpetune.protection.dropin import DropIn, Guard
from perpetune.seeding import generator

LEADING = 8  # batches that say where pairs start, with start="leading"
FILE = "protection.safetensors"  # in each checkpoint's folder, and after training in the output folder


class ProtectionCallback(TrainerCallback):
    """Guards the trainer's optimizer, and protects what was learned when training ends.

    Checkpoints hold the protection's state of that step; a run resumed from one in its own output folder gets it from
    there. What is protected once training has ended is in `protection.safetensors` of the output folder itself: that is
    the file to load before the next task. It is not read unasked, for a run may as well begin anew in the same folder.

    A protection made with `renew=True` is renewed when training begins and something is protected since; not where a
    run is resumed, whose checkpoint has what it began with.

    Args:
        protection: of the trainer's model.
        consolidate: whether the training data are protected at the end, in one more pass over them. With data that
            never end, limit it: `protect(model, samples=n)`.
        renew: whether it renews; None is as `protect` was called.

    Raises:
        UsageError: it is to renew, and `protect` was called without `renew=True`.
    """

    def __init__(self, protection: DropIn, consolidate: bool = True, renew: bool | None = None):
        if renew and not protection.config.renew:
            raise UsageError("protect: renew is off: call perpetune.protect(model, renew=True)")
        self.protection, self.consolidate = protection, consolidate
        self.renew = protection.config.renew if renew is None else renew
        self._guard: Guard | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        ended = _folder(args) / FILE
        if state.global_step > 0:
            self._resume(_checkpoint(args, state))
        elif self.protection.consolidated == 0 and ended.is_file():
            warnings.warn(
                f"protect: {ended} holds what an earlier run protected, and this run knows nothing of it: call "
                "protection.load of it before trainer.train() to go on from there, or move it away; it is written anew "
                "when training ends",
                stacklevel=2,
            )
        if state.global_step == 0 and self.renew and self.protection.waiting:
            leading = self.protection.config.start == "leading"
            self.protection.renew(_few(kwargs["train_dataloader"], self.protection.seed) if leading else None)
        self._guard = self.protection.guard(kwargs["optimizer"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = _checkpoint(args, state)
        if state.is_world_process_zero and folder.is_dir():
            self.protection.save(folder / FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._guard is not None:
            self._guard.remove()
            self._guard = None
        if self.consolidate:
            self.protection.consolidate(kwargs["train_dataloader"])
            if state.is_world_process_zero:
                _folder(args).mkdir(parents=True, exist_ok=True)
                self.protection.save(_folder(args) / FILE)

    def _resume(self, folder: Path) -> None:
        if (folder / FILE).is_file():
            self.protection.load(folder / FILE)
        elif self.protection.consolidated == 0:
            warnings.warn(
                f"protect: {folder} has no {FILE}, so nothing is protected in this resumed run: call "
                "protection.load(FILE) before trainer.train(), if one is elsewhere",
                stacklevel=2,
            )


def _few(loader: Any, seed: int) -> Iterable[Any]:
    """A few batches of a trainer's data, drawn by a generator of their own and past its own loader: to begin that one
    and not end it would leave it in the middle for accelerate."""
    size, rng = loader.batch_size or 1, generator(seed, "renew", "examples")
    endless = isinstance(loader.dataset, IterableDataset)
    order = None if endless else RandomSampler(loader.dataset, generator=rng)
    return islice(DataLoader(loader.dataset, size, sampler=order, collate_fn=loader.collate_fn, generator=rng), LEADING)


def _folder(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint at this step."""
    return _folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
