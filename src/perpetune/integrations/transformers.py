"""Protection in Hugging Face's `Trainer`, and in what is made of it: TRL's trainers.

trainer.add_callback(ProtectionCallback(perpetune.protect(trainer.model)))
trainer.train()
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import TrainingArguments

from perpetune.protection.dropin import DropIn, Guard

FILE = "protection.safetensors"  # in each checkpoint's folder, and after training in the output folder


class ProtectionCallback(TrainerCallback):
    """Guards the trainer's optimizer, and protects what was learned when training ends.

    Checkpoints hold the protection's state of that step; a run resumed from one in its own output folder gets it from
    there. What is protected once training has ended is in `protection.safetensors` of the output folder itself: that is
    the file to load before the next task. It is not read unasked, for a run may as well begin anew in the same folder.

    Args:
        protection: of the trainer's model.
        consolidate: whether the training data are protected at the end, in one more pass over them. With data that
            never end, limit it: `protect(model, samples=n)`.
    """

    def __init__(self, protection: DropIn, consolidate: bool = True):
        self.protection, self.consolidate = protection, consolidate
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


def _folder(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint at this step."""
    return _folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
