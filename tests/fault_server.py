"""The real command line in forked children that are killed at exact moments; `test_faults.py` talks to it.

One warm parent imports everything once, then forks a child for each line of JSON on its standard input. In
the child every durable step is announced as one line, such as

    write half /…/STATE/resume/.00-train-step-000000004.tmp/pet.safetensors

and the child dies (or gets a signal) at the n-th line that matches a pattern. `half` means that only the
first half of the bytes were written. The lines are also the record of what a child did.

One run can show what a kill leaves at each of many moments: there a fork of the child is killed in its place, what
lies in the state folder is copied, and the child goes on.
"""

from __future__ import annotations

import builtins
import fnmatch
import functools
import gc
import importlib.metadata
import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main

import perpetune.files
import perpetune.report.page
import perpetune.state.journal
from perpetune.cli import app, main
from perpetune.fit import FitConfig, fit
from perpetune.methods.finetune import FineTune
from perpetune.models.classifier import Classifier
from perpetune.pets import parameters, using
from perpetune.protection.protection import Protection
from perpetune.seeding import own_global_state
from perpetune.tally import Tally
from perpetune.tasks import Task

# Three tasks of two digits: 12 pictures in 3 steps an epoch, 9 steps a task, checkpoints after 2, 4, 6 and 8.
RECIPE: dict[str, Any] = {
    "name": "faults",
    "pet": {"name": "lora", "at": ["q", "v"], "rank": 2, "alpha": 4, "dropout": 0.2},
    "head": "linear",
    "train": {"epochs": 3, "batch_size": 4, "lr": 0.01, "warmup": 0.1},
    "data": "digits",
    "stream": {
        "class_order": ["0", "1", "2", "3", "4", "5"],
        "classes_per_task": 2,
        "train_per_class": 6,
        "test_per_class": 5,
        "augment": "flip",
    },
    "run": {"device": "cpu", "threads": 1, "checkpoint_every": 2},
}


class TwoPhases(FineTune):
    """Trains the head, then pet and head together, then shows a statistics head the data: two calls of `fit`."""

    def __init__(self, model: Classifier, *, train: FitConfig, first: FitConfig):
        super().__init__(model, train=train)
        self.first = first

    def learn(self, task: Task) -> None:
        self.model.grow(task)
        head = list(self.model.head.parameters())
        fit(self.loss, head, task, self.first, phase="head")
        fit(self.loss, [*parameters(self.model, "default"), *head], task, self.train_config, phase="both")
        with using(self.model, self.answering):
            self.model.summarise(task, 8)


@dataclass
class Death:
    """What happens at the `nth` line that matches `pattern`.

    Attributes:
        signum: SIGKILL, or another signal that is sent, after which life goes on.
        keep: a state folder and where it is copied once a fork has been killed; None where this process is.
    """

    pattern: str
    nth: int = 1
    signum: int = signal.SIGKILL
    keep: tuple[str, str] | None = None


class Moments:
    """Writes down every moment it is told of, and kills at some of them.

    Args:
        record: descriptor of the file for the lines.
    """

    def __init__(self, record: int, deaths: Sequence[Death] = ()):
        self.record, self.deaths = record, deaths

    def now(
        self, line: str, instead: Callable[[], object] | None = None, undo: Callable[[], object] | None = None
    ) -> None:
        """`instead` is what is still done before dying here, and is not done otherwise; `undo` takes it back."""
        line = re.sub(r"\.[0-9a-f]{16}(?=\.(tmp|gone))", "", line)  # the part of a temporary name that nobody can guess
        os.write(self.record, f"{line}\n".encode())
        for death in self.deaths:
            if fnmatch.fnmatchcase(line, death.pattern):
                death.nth -= 1
                if death.nth == 0:
                    self._die(death, instead, undo)

    def _die(self, death: Death, instead: Callable[[], object] | None, undo: Callable[[], object] | None) -> None:
        fork = os.fork() if death.keep else 0
        if fork == 0:
            if instead is not None:
                instead()
            os.kill(os.getpid(), death.signum)
            if undo is not None:  # a signal that this process outlives
                undo()
            return
        assert death.keep is not None
        assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == -signal.SIGKILL
        shutil.copytree(*death.keep)
        if undo is not None:
            undo()


class JournalFile:
    """A file whose `write` is two moments and can be torn."""

    def __init__(self, file: Any, moments: Moments):
        self.file, self.moments = file, moments

    def __enter__(self) -> JournalFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, content: bytes) -> int:
        event = json.loads(content)
        what = f"{event['event']} {event.get('name', '')}".rstrip()
        size = os.fstat(self.file.fileno()).st_size
        self.moments.now(
            f"log half {what}",
            lambda: (self.file.write(content[: len(content) // 2]), self.file.flush()),
            lambda: os.truncate(self.file.fileno(), size),
        )
        self.file.write(content)
        self.file.flush()
        self.moments.now(f"log after {what}")
        return len(content)


class _Told:
    """Batches, each a moment, that can be gone through again."""

    def __init__(self, batches: Any, moments: Moments):
        self.batches, self.moments = batches, moments

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.moments.now("protect batch")
            yield batch


def announce(moments: Moments) -> None:
    """Make every durable step, every optimizer step and every evaluation of this process a moment."""

    remove = os.unlink  # before it is a moment itself

    def write(path: Path, content: bytes, *, real: Any = perpetune.files._write_synced) -> None:
        moments.now(f"write before {path}")
        half = content[: len(content) // 2]
        moments.now(f"write half {path}", lambda: path.write_bytes(half), lambda: remove(path))
        real(path, content)
        moments.now(f"write after {path}")

    def moved(name: str, real: Any) -> Any:
        def move(source: Any, target: Any, **options: Any) -> None:
            moments.now(f"{name} before {target}")
            real(source, target, **options)
            moments.now(f"{name} after {target}")

        return move

    def unlink(path: Any, *, real: Any = os.unlink, **options: Any) -> None:
        real(path, **options)
        moments.now(f"unlink after {path}")

    def rmtree(path: Any, *args: Any, real: Any = shutil.rmtree, **options: Any) -> None:
        if Path(path).exists():
            moments.now(f"rmtree before {path}")
        real(path, *args, **options)

    def sync(descriptor: int) -> None:
        """Nothing: what a killed process has written stays written, and disks are slow."""

    def opened(path: Any, mode: str = "r", **options: Any) -> Any:
        file = builtins.open(path, mode, **options)  # noqa: SIM115  whoever asked for it closes it
        return JournalFile(file, moments) if mode == "ab" else file

    perpetune.files._write_synced = write
    os.rename, os.replace = moved("rename", os.rename), moved("replace", os.replace)
    os.fsync = sync  # type: ignore[assignment]
    os.unlink = unlink  # type: ignore[assignment]
    shutil.rmtree = rmtree  # type: ignore[assignment]
    perpetune.state.journal.open = opened  # type: ignore[attr-defined]

    middle = perpetune.state.MidTask
    begin, step = middle.begin, middle.step

    def told_begin(self: Any, phase: str, *args: Any) -> int | None:
        done = begin(self, phase, *args)
        moments.now(f"begin after {phase} at {'the end' if done is None else done}")
        return done

    def told_step(self: Any, done: int, *args: Any, **options: Any) -> None:
        moments.now(f"step before {self.phase} {done}")
        step(self, done, *args, **options)
        moments.now(f"step after {self.phase} {done}")

    middle.begin, middle.step = told_begin, told_step  # type: ignore[method-assign]

    def from_kept(tally: Tally, method: Any, *, real: Any = Tally.from_kept) -> None:
        moments.now(f"evaluate before {tally.task.name}")
        real(tally, method)

    Tally.from_kept = from_kept  # type: ignore[method-assign]

    consolidate = Protection.consolidate

    def told_consolidate(self: Any, batches: Any, *args: Any, **options: Any) -> Any:
        moments.now(f"protect before {self.consolidated}")
        certificate = consolidate(self, _Told(batches, moments), *args, **options)
        moments.now(f"protect after {self.consolidated}")
        return certificate

    Protection.consolidate = told_consolidate  # type: ignore[method-assign]


def act(request: dict[str, Any]) -> None:
    """Be the command line, with its output in files beside `request["log"]`; does not return."""
    log = request["log"]
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(f"{log}.out", flags), 1)
    os.dup2(os.open(f"{log}.err", flags), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have been started without
    announce(Moments(os.open(f"{log}.moments", flags), [Death(**death) for death in request["deaths"]]))
    signal.setitimer(signal.ITIMER_REAL, request.get("seconds", 0))  # then SIGALRM, which nobody handles, ends it
    code = 70
    try:
        main(request["arguments"])
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:  # noqa: BLE001  whatever it is, the test shows it, and the server must not see it
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tiny_vit(folder: str | Path) -> None:
    """A folder of a transformer of one block, its weights random but always the same."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    with own_global_state("faults"):
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)


def warm(recipe: str, folder: str) -> None:
    """Load what a run loads and keep what is the same for all, without computing anything, so that no thread
    is there when children are forked."""
    import sklearn.datasets

    from perpetune.cli import live
    from perpetune.learner import Learner

    sklearn.datasets.load_digits = functools.cache(sklearn.datasets.load_digits)
    importlib.metadata.version = functools.cache(importlib.metadata.version)
    typer.main.get_command = functools.cache(typer.main.get_command)
    typer.main.get_command(app)
    perpetune.report.page._environment = functools.cache(perpetune.report.page._environment)
    perpetune.report.page._environment().get_template("page.html")
    learner = Learner(recipe, folder)
    assert learner.stream.tasks
    assert learner.runtime.accelerator
    assert live
    gc.collect()
    gc.freeze()  # else every child's first collection copies all pages


def serve() -> None:
    """Answer each request by the child's exit status: a code, or a signal's number below zero."""
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            act(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        tiny_vit(sys.argv[2])
        warm(*sys.argv[3:])
        serve()
    else:
        act(json.loads(sys.argv[2]))
