"""Protection in Hugging Face's `Trainer` and in trainers that are built on it, such as TRL's.

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

LEADING = 8  # the number of batches that determine the start of new pairs, with start="leading"
FILE = "protection.safetensors"  # written to each checkpoint's folder, and after training to the output folder


class ProtectionCallback(TrainerCallback):
    """Guards the trainer's optimizer, and protects the training data when training ends.

    Each checkpoint holds the protection's state at its step. A run that is resumed from a checkpoint in its own output
    folder loads the state from there. After training the callback writes the state to `protection.safetensors` in the
    output folder; load this file before the next task. The callback does not load it by itself, because a new run may
    start in the same folder.

    A protection with `renew=True` is renewed at the start of training, if data were consolidated since the last
    renewal. A resumed run is not renewed again, because its checkpoint already holds the renewed pairs.

    Args:
        protection: the protection of the trainer's model.
        consolidate: protect the training data at the end, in one more pass over them. If the data never end, limit the
            pass: `protect(model, samples=n)`.
        renew: whether to renew; None means as `protect` was called.

    Raises:
        UsageError: `renew` is True, but `protect` was called without `renew=True`.
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
                f"protect: {ended} holds the protection of an earlier run, and this run has not loaded it: call "
                "protection.load with this file before trainer.train() to continue from it, or move it away; the end "
                "of training overwrites it",
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
                f"protect: {folder} has no {FILE}, so nothing is protected in this resumed run: if you have the file "
                "in "
                "another place, call protection.load(FILE) before trainer.train()",
                stacklevel=2,
            )


def _few(loader: Any, seed: int) -> Iterable[Any]:
    """A few batches of a trainer's data, from a new loader with its own generator.

    The trainer's loader is not used, because accelerate would be left with a loader that was started and not finished.
    """
    size, rng = loader.batch_size or 1, generator(seed, "renew", "examples")
    endless = isinstance(loader.dataset, IterableDataset)
    order = None if endless else RandomSampler(loader.dataset, generator=rng)
    return islice(DataLoader(loader.dataset, size, sampler=order, collate_fn=loader.collate_fn, generator=rng), LEADING)


def _folder(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint at this step."""
    return _folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
