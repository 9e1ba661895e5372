"""The library's front door: a recipe's model over its state folder."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perpetune import oracle
from perpetune.build import build_backbone, build_method, build_runtime
from perpetune.data.examples import Question
from perpetune.data.names import safe_name, task_names
from perpetune.data.sources import Source
from perpetune.data.stream import Stream
from perpetune.data.tasks import TaskData
from perpetune.data.texts.tables import Messages
from perpetune.errors import Interrupted, StateError, UsageError, closest
from perpetune.evaluate import AMONG, evaluate
from perpetune.pets import PET, frozen
from perpetune.recipe import Recipe, load_recipe, make_recipe
from perpetune.results import read_results, versions
from perpetune.run import run
from perpetune.runtime import Progress, Runtime, Silent
from perpetune.sequence import STREAM, Data, TaskSequence
from perpetune.snapshot import restore, snapshot
from perpetune.state import START, State
from perpetune.tasks import Task

if TYPE_CHECKING:
    from PIL.Image import Image


Prompt = str | Sequence[tuple[str, str]] | Sequence[dict[str, str]]
"""What a language model is asked: a text, or the messages of a chat."""


@dataclass(frozen=True)
class Prediction:
    """What a learner says of one image: names with probabilities, the likeliest first."""

    image: str
    classes: list[tuple[str, float]]

    @property
    def name(self) -> str:
        return self.classes[0][0]


@dataclass(frozen=True)
class Answer:
    """What a learner says to one prompt.

    Attributes:
        prompt: as it was given.
        text: the answer.
        options: where there was a choice: each option with its probability among them, the likeliest first.
        cut: how many tokens of the prompt were cut off on its left, for the model takes no more.
    """

    prompt: str | Messages
    text: str
    options: list[tuple[str, float]]
    cut: int = 0


class Learner:
    """Keeps tuning one pretrained model as data arrive.

    Args:
        recipe: a `Recipe`, a mapping of its keys, the name of a packaged recipe, or a YAML file.
        folder: the state folder, which must not exist yet; None keeps it in a temporary one until `save`.
        progress: whoever watches; nobody by default.

    Raises:
        UsageError: the recipe or the folder cannot be used.
        DataError: the recipe's data cannot be used.
    """

    def __init__(
        self,
        recipe: Recipe | dict[str, Any] | str | Path,
        folder: str | Path | None = None,
        *,
        progress: Progress | None = None,
    ):
        if isinstance(recipe, dict):
            recipe = make_recipe(recipe)
        elif not isinstance(recipe, Recipe):
            recipe = load_recipe(recipe)
        recipe = recipe.anchored()
        if recipe.evaluate.oracle and recipe.data is None:
            raise UsageError(oracle.NO_OLD_DATA)
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="perpetune-")
        path = Path(folder) if folder else Path(str(self._temporary and self._temporary.name)) / recipe.name
        self._build(recipe, progress)
        if self._temporary and self.runtime.world > 1:
            raise UsageError("several processes share one state folder: give `folder` a path that all of them see")
        # Before the folder is made, so that data that cannot be used leave none.
        if recipe.data is not None:
            self._admit(self.stream.tasks)  # read here
        self._tasks.reference  # noqa: B018  and here
        if self.runtime.rank == 0:
            State.create(path, recipe, self._model_document())
        self.runtime.accelerator.wait_for_everyone()
        self.state = State(path)

    @classmethod
    def load(cls, folder: str | Path, *, device: str | None = None, progress: Progress | None = None) -> Learner:
        """The learner that a state folder holds.

        Args:
            folder: the state folder.
            device: where to run, when it differs from the recipe's.

        Raises:
            StateError: the folder is torn, or its weights are not those of the recipe's backbone.
        """
        learner = cls.__new__(cls)
        learner._temporary = None
        learner.state = State(Path(folder))
        learner._build(learner.state.recipe, progress, device)
        known, found = learner.state.backbone["fingerprint"], learner._fingerprint
        if known != found:
            raise StateError(
                f"{folder} was made with other weights of {learner.recipe.backbone.name} (fingerprint {known[:12]}, "
                f"here {found[:12]}): bring back the checkpoint it was made with"
            )
        learner._reload()
        return learner

    def _build(self, recipe: Recipe, progress: Progress | None, device: str | None = None) -> None:
        self.recipe = recipe
        where = (
            recipe
            if device is None
            else recipe.model_copy(update={"run": recipe.run.model_copy(update={"device": device})})
        )
        self.runtime = build_runtime(where)
        self.runtime.progress = progress if progress and self.runtime.rank == 0 else Silent()
        self.backbone = build_backbone(recipe)
        self._fingerprint = self.backbone.fingerprint()
        self.method = build_method(recipe, self.backbone).to(self.runtime.device)
        self._oracle_note = oracle.check(recipe, self.method) if recipe.evaluate.oracle else None
        self._new = snapshot(self.method)
        self._learned = ""  # the last task folder that is part of `method`
        self._halfway = False  # whether `method` was left inside a task
        keeps_data = self.method.needs_earlier_data
        self._tasks = TaskSequence(recipe, self.method.model.view, self.runtime, keeps_data=keeps_data)

    def _model_document(self) -> dict[str, Any]:
        pets = [m for m in self.method.modules() if isinstance(m, PET)]
        # A language model's output layer is often its embedding: one tensor under two names.
        distinct = {(t.data_ptr(), t.numel()): t.numel() for t in frozen(self.backbone.net).values()}
        return {
            "spec": self.backbone.spec,
            "examples": self.method.model.view.noun,
            "fingerprint": self._fingerprint,
            "parameters": sum(distinct.values()),
            "trainable_parameters": sum(p.numel() for pet in pets for p in pet.parameters()),
        }

    # -- learning -------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Learn every task of the recipe's stream that is not learned yet; returns the results document.

        Raises:
            UsageError: the recipe names no data.
            Interrupted: a signal asked for a stop; `resume` goes on.
        """
        stream = self.stream
        count = len(stream.tasks)
        with self._writing(tasks=count):
            for warning in stream.warnings:
                self.runtime.progress.note(warning)
            if self._oracle_note:
                self.runtime.progress.note(self._oracle_note)
            done = len(self.state.committed)
            steps = (self._tasks.of_stream(i, self.state.committed) for i in range(done, count))
            run(self.method, steps, self.state)
        return read_results(self.state)

    def learn(
        self,
        data: Data,
        *,
        name: str | None = None,
        holdout: float = 0.2,
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Learn one more batch of data as one task; returns the results document.

        Args:
            data: a folder, manifest, parquet file or dataset id; a `data:` section; a source; or a
                ready-made task. Earlier data are not read again, but for the held-out images of
                earlier tasks that are still where they were, which are evaluated.
            name: of the task; by default that of the folder or file, else `task-N`.
            holdout: share kept for testing where the data bring no test split.
            options: further keys of the data section that a path or id stands for, such as `score` or `label_column`.
        """
        if self.method.needs_earlier_data:
            raise UsageError(
                f"method: {self.recipe.method.name} needs the data of all tasks, and an update has only its own: use "
                "`perpetune run`, or another method"
            )
        if self.recipe.evaluate.oracle:
            raise UsageError(oracle.NO_OLD_DATA)
        index = len(self.state.committed)
        if self.recipe.data is not None and index < (planned := self._planned()):
            raise UsageError(
                f"{self.state.folder} has learned {index} of the {planned} tasks of its own stream: "
                f"finish them first with `perpetune resume {self.state.folder}`"
            )
        name = self._name(data, name, index)
        if options:
            if not isinstance(data, (str, Path)):
                raise UsageError("options are for data that are a path or an id; put them into the data section itself")
            data = {**self._tasks.origin(data), **options}
        task, document = self._tasks.given(data, index, name, holdout)
        self._admit([task])
        with self._writing():
            run(self.method, [self._tasks.of_update(task, document, self.state.committed)], self.state)
        return read_results(self.state)

    def _admit(self, tasks: Sequence[Task | TaskData]) -> None:
        """UsageError where one of them is none for this model: before the first is begun."""
        for task in tasks:
            self.method.model.admits(task.name, task.classes)

    def _name(self, data: Data, asked: str | None, index: int) -> str:
        """The name of an update's task: the one asked for, made safe, or one that no task has yet."""
        taken = [t.name for t in self.state.committed]
        safe = safe_name(asked or "")
        if safe == START:
            raise UsageError(
                f"a task cannot be called {START!r}, `rollback --to {START}` drops all: choose another --name"
            )
        if safe in taken:
            raise UsageError(f"{self.state.folder} has a task {safe!r} already: choose another --name")
        if not safe and not asked and isinstance(data, (str, Path)):
            path = Path(data).expanduser().resolve()
            own = path.name if path.is_dir() else path.stem if path.is_file() else ""
            return task_names([own], first=index + 1, taken=taken)[0]
        return safe or task_names([""], first=index + 1, taken=taken)[0]

    def resume(self) -> dict[str, Any]:
        """Go on where an interrupted `run` or `learn` stopped; returns the results document."""
        opened = self.state.open_task()
        if opened is not None and opened["from"] != STREAM:
            if not opened["from"].get("name"):
                raise UsageError(
                    f"task {opened['name']} was given as a Python object: call `Learner.load(...).learn` with it again"
                )
            return self.learn(opened["from"], name=opened["name"], holdout=opened["from"]["holdout"])
        if self.recipe.data is None:
            if self.runtime.rank == 0:
                with self.state.writing():  # finishes what a crash left undone
                    pass
            return read_results(self.state)
        return self.run()

    @property
    def stream(self) -> Stream:
        """The recipe's stream of tasks."""
        return self._tasks.stream

    def _planned(self) -> int:
        """How many tasks the recipe's stream has; once it was begun the journal knows, and the data may be gone."""
        begun = [e["tasks"] for e in self.state.journal() if e["event"] == "run begun" and "tasks" in e]
        return int(begun[-1]) if begun else len(self.stream.tasks)

    @contextlib.contextmanager
    def _writing(self, **facts: Any) -> Iterator[None]:
        """Hold the state folder, with signals turned into a checkpoint and an orderly stop."""
        with contextlib.ExitStack() as stack:
            if self.runtime.rank == 0:
                stack.enter_context(self.state.writing())
                if self._learned != self._last():
                    raise StateError(f"{self.state.folder} was changed after it was loaded here: load it again")
                device = str(self.runtime.device)
                self.state.log("run begun", versions=versions(), device=device, seed=self.recipe.seed, **facts)
            stack.enter_context(stop_signals(self.runtime))
            self._leave_halfway()
            self._halfway = True
            try:
                yield
                self._halfway = False
            except Interrupted as stop:
                told = f"{stop}; go on with `perpetune resume {self.state.folder}`"
                raise Interrupted(told, stop.signum) from stop
            finally:
                self._learned = self._last()

    def _last(self) -> str:
        tasks = self.state.committed
        return tasks[-1].folder.name if tasks else ""

    def _leave_halfway(self) -> None:
        """After a task that failed or was stopped, go back to the last commit."""
        if self._halfway:
            self._reload()
            self._halfway = False

    def _reload(self) -> None:
        """Make `method` what the last commit left, or what it was before the first."""
        tasks = self.state.committed
        if tasks:
            self.state.load(self.method, tasks[-1])
        else:
            restore(self.method, self._new, "a new model")
        self._learned = tasks[-1].folder.name if tasks else ""

    # -- using what was learned -----------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self,
        images: str | Path | Sequence[str | Path | Image] | Tensor,
        *,
        top: int = 5,
        unreadable: list[str] | None = None,
    ) -> list[Prediction]:
        """Names and probabilities for pictures; for a language model see `answer`.

        Args:
            images: a path, several paths or PIL images, or a uint8 tensor `(N, 3, S, S)` of the backbone's size.
            top: how many names for each.
            unreadable: takes a line for each picture that cannot be read, instead of an error; such a picture
                has no prediction.

        Raises:
            StateError: nothing is learned yet.
            UsageError: a tensor is not what the backbone takes.
            DataError: a picture cannot be read; names it.
        """
        self._need_learned("pictures")
        images = [images] if isinstance(images, (str, Path)) else images
        size, found = self.recipe.evaluate.batch_size, []
        for start in range(0, len(images), size):
            some = self.method.model.view.ask(images[start : start + size], first=start, unreadable=unreadable)
            if not some:
                continue
            scores = self._asked(some)
            best = scores.float().softmax(1).topk(min(top, scores.shape[1]), dim=1)
            for question, values, rows in zip(some, best.values.tolist(), best.indices.tolist(), strict=True):
                pairs = [(self.method.classes[row], value) for row, value in zip(rows, values, strict=True)]
                found.append(Prediction(question.given, pairs))
        return found

    def _asked(self, questions: Sequence[Question]) -> Tensor:
        """What the method predicts for some questions at once."""
        items = [(question.item, 0, number) for number, question in enumerate(questions)]
        batch = self.method.model.view.collate(items).to(self.runtime.device)
        with self.runtime.autocast():
            return self.method.predict(batch.inputs)

    @torch.no_grad()
    def answer(self, prompts: str | Sequence[Prompt], *, options: Sequence[str] | None = None) -> list[Answer]:
        """What the tuned language model says to prompts: generated, or the likeliest of some options.

        With a head of classes it is the likeliest of the classes that were learned.

        Args:
            prompts: one text, or several; each a text, or the messages of a chat as (role, content) or
                `{"role": …, "content": …}`.
            options: the answers that stand to choice; None generates the answer. With a head of classes they are some
                of those, and None is all.

        Raises:
            StateError: nothing is learned yet.
            UsageError: the options are none, or one is empty or stands twice, or is no class that was learned.
            DataError: a prompt cannot be put into the model's form; says which.
        """
        self._need_learned("texts")
        chosen = tuple(option.strip() for option in options or ())
        if options is not None and (not all(chosen) or len(set(chosen)) < max(1, len(chosen))):
            raise UsageError(f"options {list(options)}: different texts are expected, none of them empty")
        known: dict[str, int] = {}
        if self.method.model.chooses:
            known = {name: row for row, name in enumerate(self.method.classes)}
            chosen = chosen or tuple(known)
            for option in chosen:
                if option not in known:
                    raise UsageError(f"options: {option!r} is no class that was learned; {closest(option, known)}")
        several = [prompts] if isinstance(prompts, str) else prompts
        asked = self.method.model.view.ask(several, options=chosen, choose=not known)
        size, found = self.recipe.evaluate.batch_size, []
        for start in range(0, len(asked), size):
            some = asked[start : start + size]
            rows = self._asked(some)
            if known:
                rows = rows[:, [known[option] for option in chosen]]
            for question, row in zip(some, rows, strict=True):
                if not row.is_floating_point():
                    found.append(Answer(question.given, self.method.model.read(row), [], question.cut))
                    continue
                # of classes without an example the score is -inf; where there is no other, none is likely
                shares = row.float().softmax(0).nan_to_num(0.0).tolist()
                pairs = sorted(zip(question.options, shares, strict=True), key=lambda pair: -pair[1])
                found.append(Answer(question.given, pairs[0][0], pairs, question.cut))
        return found

    def evaluate(self, data: str | Path | Source | None = None) -> dict[str, dict[str, Any] | None]:
        """Counts of right predictions by task: on the test data of every learned task, or on `data`
        (its test split, or all of it where there is none).

        Raises:
            StateError: nothing is learned yet.
        """
        self._need_learned()
        setting, size = self.recipe.setting, self.recipe.evaluate.batch_size
        if data is None:
            tasks = {c.name: self._tasks.past(c) for c in self.state.committed}
        else:
            tasks = {str(data): self._tasks.whole(data)}
        return {
            name: evaluate(self.method, task, among=AMONG[setting], batch_size=size) if task else None
            for name, task in tasks.items()
        }

    def _need_learned(self, takes: str | None = None) -> None:
        self._leave_halfway()
        own = self.backbone.takes
        if takes is not None and takes != own:
            call = self.method.model.view.verb
            raise UsageError(f"{self.recipe.backbone.name} takes {own}, not {takes}: call `{call}`")
        if not self.state.committed:
            raise StateError(f"{self.state.folder} has learned nothing yet: `perpetune update` or `run` it first")

    def save(self, folder: str | Path) -> Path:
        """Copy the state folder to `folder`, which must not exist."""
        folder = Path(folder)
        if folder.exists():
            raise UsageError(f"{folder} is there already: choose another folder")
        aside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(self.state.folder, aside)
        aside.rename(folder)
        return folder


def stopping_signals() -> list[int]:
    """The signals that ask for a stop; not SIGHUP where it is ignored, as under nohup, or unknown, as on Windows."""
    hangup = getattr(signal, "SIGHUP", None)
    heard = hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([hangup] if hangup is not None and heard else [])]


@contextlib.contextmanager
def stop_signals(runtime: Runtime) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP ask the run to stop at the next step; a second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    before: dict[int, Any] = {number: signal.getsignal(number) for number in stopping_signals()}

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[number] or signal.SIG_DFL)

    for number in before:
        signal.signal(number, ask)
    runtime.stopping = lambda: asked[0] if asked else None
    try:
        yield
    finally:
        runtime.stopping = lambda: None
        for number, handler in before.items():
            signal.signal(number, handler)
