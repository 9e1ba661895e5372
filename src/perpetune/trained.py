"""`Trained`: what a state has learned, ready to be asked. It learns nothing; `Learner` does."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from perpetune import drifting
from perpetune.answers import Answer, Prediction, Prompt
from perpetune.build import build_backbone, build_method, build_runtime, described
from perpetune.data.examples import Question
from perpetune.data.names import several
from perpetune.data.pictures.view import PictureView
from perpetune.data.sources import Source
from perpetune.errors import StateError, UsageError, closest
from perpetune.evaluate import AMONG, How, ask
from perpetune.files import manifest_digest
from perpetune.kept import KeptFeatures, kept_features
from perpetune.models.compiled import Compiler, compile_blocks
from perpetune.models.sharded import shard
from perpetune.pets import frozen, using
from perpetune.recipe import Recipe
from perpetune.results import read_results
from perpetune.runtime import Progress, Silent
from perpetune.sequence import TaskSequence
from perpetune.snapshot import restore, snapshot
from perpetune.state import Committed, State
from perpetune.tasks import Batch, Task
from perpetune.unlabelled import unlabelled

if TYPE_CHECKING:
    from PIL.Image import Image


class Trained:
    """The model of a state as its tasks have trained it. `load` makes one.

    Attributes:
        recipe: names all that the model is made of.
        runtime: where and how it runs.
        backbone: the frozen pretrained model.
        method: what was learned, on the backbone.
        state: the state folder.
    """

    state: State
    _kept: KeptFeatures

    @classmethod
    def load(cls, folder: str | Path, *, device: str | None = None, progress: Progress | None = None) -> Self:
        """Load what a state folder stores.

        Args:
            folder: the state folder.
            device: the device to run on; None takes the recipe's device.

        Raises:
            StateError: the folder is damaged, or it was made with other weights of the backbone.
        """
        loaded = cls.__new__(cls)
        loaded.state = State(Path(folder))
        try:
            loaded._build(loaded.state.recipe, progress, device, loaded.state.backbone)
        except UsageError as error:
            prefix, _, place = loaded.state.recipe.backbone.name.partition(":")
            if prefix not in ("folder", "hf") or not Path(place).is_absolute() or Path(place).exists():
                raise
            cure = f"if the model lies elsewhere now, say where: `perpetune relocate {folder} --model {prefix}:PATH`"
            raise UsageError(f"{error}; {cure}") from error
        known, here = loaded.state.backbone["fingerprint"], loaded._fingerprint
        if known != here:
            raise StateError(
                f"{folder} was made with other weights of {loaded.recipe.backbone.name} (their fingerprint is "
                f"{known[:12]}, here it is {here[:12]}): restore the checkpoint that it was made with"
            )
        if loaded.method.model.view.dated:
            loaded.method.model.view.today = loaded.state.begun
        loaded._kept = loaded._kept_features()
        loaded._tasks.moved = loaded.state.moved()
        loaded._reload()
        for line in (loaded.state.unchecked(), loaded.state.edited()):
            if line and loaded.runtime.rank == 0:
                warnings.warn(line, stacklevel=2)
        loaded._compile()
        return loaded

    def _build(
        self,
        recipe: Recipe,
        progress: Progress | None,
        device: str | None = None,
        document: Mapping[str, Any] | None = None,
    ) -> None:
        """Make all that the recipe names; `document` is the `backbone.json` of a state that exists."""
        self.recipe = recipe
        where = (
            recipe
            if device is None
            else recipe.model_copy(update={"run": recipe.run.model_copy(update={"device": device})})
        )
        self.runtime = build_runtime(where)
        self.runtime.progress = progress if progress and self.runtime.rank == 0 else Silent()
        self._plain = None if document is None else document.get("plain")
        self.backbone = build_backbone(recipe, self._plain)
        self._fingerprint = self.backbone.fingerprint()
        if document is None:
            self._plain = described(recipe, self.backbone)
        elif self._plain is not None and self._fingerprint != document["fingerprint"]:  # its library knows more forms
            self.backbone = build_backbone(recipe)
            self._fingerprint = self.backbone.fingerprint()
        self.method = build_method(recipe, self.backbone)
        distinct = {(t.data_ptr(), t.numel()): t.numel() for t in frozen(self.backbone.net).values()}
        # A language model's output layer is often also its embedding: one tensor with two names, counted once.
        self._size = sum(distinct.values())
        self._shard()
        self.method.to(self.runtime.device)
        self._new = snapshot(self.method)
        self._learned = mark_of([])  # the last task that is part of `method`
        self._halfway = False  # whether `method` was left inside a task
        keeps_data = self.method.needs_earlier_data
        self._tasks = TaskSequence(recipe, self.method.model.view, self.runtime, keeps_data=keeps_data)

    def _kept_features(self) -> KeptFeatures:
        """The features of test data that the state folder keeps. Made when the weights are those of the fingerprint."""
        return kept_features(self.state.folder, self.recipe, self.backbone, self._fingerprint, self.runtime)

    def _compile(self) -> None:
        """Turn `run.compile` on, once the model is known to be sound: the first pass through it takes long."""
        wanted = self.recipe.run.compile
        if wanted and (note := compile_blocks(self.backbone, Compiler(None if wanted is True else wanted))):
            warnings.warn(note, stacklevel=3)

    def _shard(self) -> None:
        """With `run.shard`, leave this process its share of the frozen model, before anything lies on the device."""
        if self.recipe.run.shard == "fsdp" and self.runtime.world > 1:
            self.backbone.sharded = shard(self.backbone, self.runtime.device, self.runtime.world)
            if note := self.backbone.sharded.note:
                self.runtime.progress.note(note)

    def save(self, folder: str | Path) -> Path:
        """Copy the state folder to `folder`, which must not exist."""
        folder = Path(folder)
        if folder.exists():
            raise UsageError(f"{folder} already exists: choose another folder")
        aside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(self.state.folder, aside)
        aside.rename(folder)
        return folder

    # -- in step with the folder ----------------------------------------------------------------------

    def same_recipe(self) -> bool:
        """Whether the folder still holds the recipe and the model that it was loaded with."""
        state = State(self.state.folder)
        return state.recipe == self.state.recipe and state.backbone["fingerprint"] == self._fingerprint

    def refresh(self) -> None:
        """Take up what another process has committed to the folder, or has rolled back, since it was read.

        No other thread may use it meanwhile.

        Raises:
            StateError: the folder cannot be read, such as while it is being changed (call it again), or its recipe or
                model is another one (load it again).
        """
        if not self.same_recipe():
            raise StateError(f"{self.state.folder}: its recipe or its model was changed: load it again")
        self.state = State(self.state.folder)
        self._halfway = True  # until it is complete, nothing may be asked of it
        self._reload()
        self._halfway = False

    def _leave_halfway(self) -> None:
        """If the last task failed or was stopped, restore the method as of the last commit."""
        if self._halfway:
            self._reload()
            self._halfway = False

    def _reload(self) -> None:
        """Restore `method` as of the last commit, or as it was before the first one."""
        tasks = self.state.committed
        if tasks:
            self.state.load(self.method, tasks[-1])
        else:
            restore(self.method, self._new, "a new model")
        self._learned = mark_of(tasks)

    # -- asking ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self,
        images: str | Path | Sequence[str | Path | Image] | Tensor,
        *,
        top: int = 5,
        unreadable: list[str] | None = None,
        names: Sequence[str] | None = None,
    ) -> list[Prediction]:
        """Names and probabilities for images. A language model has `answer` instead.

        Args:
            images: a path, several paths or PIL images, or a uint8 tensor `(N, 3, S, S)` with the backbone's size S.
            top: the number of names for each image.
            unreadable: a list that gets one line for each image that cannot be read. Such an image has no prediction.
                Without this list, it is an error.
            names: the classes to choose among, learned or not; for a head that knows classes by their names. It needs
                not have learned anything. None means the learned classes.

        Raises:
            StateError: the learner has not learned anything yet, and there are no names.
            UsageError: the head does not know classes by their names, a name is empty or given twice, or the tensor
                does not have the shape or type that the backbone takes.
            DataError: an image cannot be read; the message names it.
        """
        asked = None if names is None else self._named(names)
        self._need_learned("pictures", first=asked is None)
        images = [images] if isinstance(images, (str, Path)) else images
        size, predictions = self.recipe.evaluate.batch_size, []
        for start in range(0, len(images), size):
            some = self.method.model.view.ask(images[start : start + size], first=start, unreadable=unreadable)
            if not some:
                continue
            scores = self._asked(some) if asked is None else self._asked(some, asked)
            best = scores.float().softmax(1).topk(min(top, scores.shape[1]), dim=1)
            for question, values, rows in zip(some, best.values.tolist(), best.indices.tolist(), strict=True):
                classes = self.method.classes if asked is None else asked
                pairs = [(classes[row], value) for row, value in zip(rows, values, strict=True)]
                predictions.append(Prediction(question.given, pairs))
        return predictions

    def _named(self, names: Sequence[str]) -> list[str]:
        """The names, once it is known that the head can choose among them."""
        model = self.method.model
        if not (model.chooses and model.any_class):
            raise UsageError(
                "names need a head that knows classes by their names: head: text on a backbone of pictures and texts, "
                "such as CLIP"
            )
        found = [name.strip() for name in names]
        if not found or not all(found) or len(set(found)) < len(found):
            raise UsageError(f"names {list(names)}: expected different names, none of them empty")
        return found

    def match(self, images: Sequence[str | Path | Image], texts: Sequence[str]) -> Tensor:
        """How well each text describes each image: cosines `(images, texts)`, with the pets that answer in force.

        It need not have learned anything.

        Raises:
            UsageError: the backbone does not read texts beside pictures, or there is no text.
            DataError: an image cannot be read; the message names it.
        """
        return self._matched(images, texts, None)[1]

    def find(
        self, text: str, images: Sequence[str | Path], *, top: int = 10, unreadable: list[str] | None = None
    ) -> list[tuple[str, float]]:
        """The images that a text describes best: their paths and cosines, the best first. See `match`.

        Args:
            top: how many.
            unreadable: as in `predict`.
        """
        given, scores = self._matched(images, [text], unreadable)
        best = scores[:, 0].topk(min(top, len(given)))
        return [(given[i], value) for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    @torch.no_grad()
    def _matched(
        self, images: Sequence[str | Path | Image], texts: Sequence[str], unreadable: list[str] | None
    ) -> tuple[list[str], Tensor]:
        """The names of the images that can be read, and their cosines with the texts."""
        side = self.backbone.texts
        if side is None:
            raise UsageError(f"{self.backbone.spec} reads no texts beside pictures: use a model such as CLIP")
        if not texts:
            raise UsageError("there is no text to compare with")
        self._leave_halfway()
        size, rows, given = self.recipe.evaluate.batch_size, list[Tensor](), list[str]()
        with self.runtime.autocast():
            with using(self.method.model, self.method.answering):
                words = F.normalize(side.of(list(texts)).float(), dim=-1)
            for start in range(0, len(images), size):
                some = self.method.model.view.ask(images[start : start + size], first=start, unreadable=unreadable)
                if not some:
                    continue
                given += [question.given for question in some]
                features = self.backbone.compared(self.method.features(self._batch(some).inputs))
                rows.append(F.normalize(features.float(), dim=-1) @ words.T)
        return given, torch.cat(rows) if rows else words.new_zeros(0, len(texts))

    @torch.no_grad()
    def answer(
        self, prompts: str | Mapping[str, Any] | Sequence[Prompt], *, options: Sequence[str] | None = None
    ) -> list[Answer]:
        """The tuned language model's answers to prompts: a generated text, or the likeliest of some options.

        A model with a head of classes answers with the likeliest of the learned classes.

        Args:
            prompts: one prompt or several. A prompt is a text, or the messages of a chat as (role, content) or
                `{"role": …, "content": …}`. For a vision-language model see also `Prompt`.
            options: the answers among which the model chooses; with None it generates the answer. With a head of
                classes, options are some of the classes, and None means all of them.

        Raises:
            StateError: the learner has not learned anything yet.
            UsageError: the list of options is empty; or an option is empty, is in the list twice, or is not a learned
                class.
            DataError: a prompt cannot be put into the model's format; the message says which.
        """
        self._need_learned("texts")
        chosen = tuple(option.strip() for option in options or ())
        if options is not None and (not all(chosen) or len(set(chosen)) < max(1, len(chosen))):
            raise UsageError(f"options {list(options)}: expected different texts, none of them empty")
        known: dict[str, int] = {}
        if self.method.model.chooses:
            known = {name: row for row, name in enumerate(self.method.classes)}
            chosen = chosen or tuple(known)
            for option in chosen:
                if option not in known:
                    raise UsageError(f"options: {option!r} is not a learned class; {closest(option, known)}")
        several = [prompts] if isinstance(prompts, str | Mapping) else prompts
        questions = self.method.model.view.ask(several, options=chosen, choose=not known)
        size, answers = self.recipe.evaluate.batch_size, []
        for start in range(0, len(questions), size):
            some = questions[start : start + size]
            rows = self._asked(some)
            if known:
                rows = rows[:, [known[option] for option in chosen]]
            for question, row in zip(some, rows, strict=True):
                if not row.is_floating_point():
                    text = question.own(self.method.model.read(row))
                    answers.append(Answer(question.given, text, [], question.cut, question.left_out))
                    continue
                # a class without examples has the score -inf; if all have it, no class gets a probability
                shares = row.float().softmax(0).nan_to_num(0.0).tolist()
                pairs = sorted(zip(question.options, shares, strict=True), key=lambda pair: -pair[1])
                answers.append(Answer(question.given, pairs[0][0], pairs, question.cut, question.left_out))
        return answers

    def _asked(self, questions: Sequence[Question], names: Sequence[str] | None = None) -> Tensor:
        """The method's prediction for some questions, as one batch; among `names` if they are given."""
        inputs = self._batch(questions).inputs
        with self.runtime.autocast():
            return self.method.predict(inputs) if names is None else self.method.among(inputs, names)

    def _batch(self, questions: Sequence[Question]) -> Batch:
        items = [(question.item, 0, number) for number, question in enumerate(questions)]
        return self.method.model.view.collate(items).to(self.runtime.device)

    @torch.no_grad()
    def drift(
        self,
        data: str | Path | Sequence[Any] | Tensor,
        *,
        level: float = 0.05,
        options: Mapping[str, Any] | None = None,
        unreadable: list[str] | None = None,
    ) -> dict[str, Any]:
        """Do examples without labels look like what was learned? If not, an update may be needed.

        Args:
            data: a path of what `predict`, `answer` or `learn` takes, or pictures or prompts. Labels are not looked at.
            level: the share of months like what was learned that may be flagged.
            options: further keys of the data section for a path or id, as in `learn`.
            unreadable: as in `predict`.

        Returns:
            `drift` (yes or no) and both tests, see `perpetune.drifting.compare`; and `tasks`, of how many kept examples
            of each task they were compared with.

        Raises:
            StateError: the learner has not learned anything yet, or keeps too few features of held-out examples.
            DataError: there are too few examples, or one cannot be read.
            UsageError: `level` is none.
        """
        drifting.check_level(level)
        self._need_learned()
        view, size = self.method.model.view, self.recipe.evaluate.batch_size
        known = drifting.known(self.method, self.state.committed, self._tasks.past, self.runtime.progress.note)
        given = unlabelled(data, view, self.runtime.progress.note, options)
        chosen = drifting.some(len(given), "new")
        if len(chosen) < len(given):
            self.runtime.progress.note(f"{len(chosen)} of {len(given)} {view.noun} are compared, drawn at random")
        names, parts = list[str](), list[Tensor]()
        for start in range(0, len(chosen), size):
            some, batch = given.batch(chosen[start : start + size], unreadable)
            if batch is not None:
                names += some
                parts.append(self._compared(batch.to(self.runtime.device)))
        every = torch.cat(list(known.values())) if known else torch.zeros(0, 1)
        new = torch.cat(parts) if parts else every[:0]
        found = drifting.compare(every[drifting.some(len(every), "known")], new, names, level, view.noun)
        return {**found, "tasks": {name: len(rows) for name, rows in known.items()}}

    def _compared(self, batch: Batch) -> Tensor:
        """Features of a batch, as they are compared with kept ones."""
        with self.runtime.autocast():
            return drifting.projected(F.normalize(self.method.features(batch.inputs).float(), dim=-1).cpu())

    def evaluate(
        self, data: str | Path | Source | None = None, *, options: Mapping[str, Any] | None = None
    ) -> dict[str, dict[str, Any] | None]:
        """The counts of right answers for each learned task on its test data, or on `data`.

        Args:
            data: labelled data; their test split is used, or all of them if there is none.
            options: further keys of the data section for a path or id, as in `learn`.

        Raises:
            StateError: the learner has not learned anything yet.
            UsageError: options without a path or id.
        """
        if options and not isinstance(data, (str, Path)):
            raise UsageError("options need data that are a path or an id")
        self._need_learned()
        setting, size = self.recipe.setting, self.recipe.evaluate.batch_size
        if data is None:
            tasks = {c.name: self._tasks.past(c) for c in self.state.committed if not c.gone}
            for name, task in tasks.items():
                if task is not None and not (task.test is not None and len(task.test)):
                    self.runtime.progress.note(f"task {name} is not evaluated, it was learned without test data")
        else:
            given = self._tasks.whole(data, options)
            self._note_unknown(given)
            tasks = {str(data): given}
        there = [task for task in tasks.values() if task is not None]
        with self._kept.at_work(self.runtime.device):
            asked = iter(ask(self.method, there, How(AMONG[setting], size)))
        return {name: next(asked).cell if task is not None else None for name, task in tasks.items()}

    def _note_unknown(self, task: Task) -> None:
        """Say which classes of `task` no answer can name, because they were never learned."""
        if not self.method.model.chooses or self.method.model.any_class:
            return
        known = set(self.method.classes)
        unknown = [name for name in task.classes if name not in known]
        if unknown:
            count = sum(task.classes[target] not in known for target in (task.test.targets if task.test else ()))
            self.runtime.progress.note(
                f"{len(unknown)} of {len(task.classes)} classes were never learned, so none of their {count} test "
                f"examples can be right: {several(unknown)}"
            )

    def export(
        self, folder: str | Path, *, to: str = "peft", images: str | Path | Sequence[str | Path] | None = None
    ) -> list[Path]:
        """Write what was learned for other programs, with a model card. docs/export.md describes the files.

        Args:
            folder: where to write; it must not exist, or be empty.
            to: `peft`, the adapter and the head; `merged`, a whole model of transformers or timm; `onnx`, one
                graph from pixels to scores, for pictures.
            images: files or folders of pictures, with which what is written is checked; None takes scikit-learn's
                handwritten digits.

        Returns:
            The paths of the written files.

        Raises:
            StateError: the learner has not learned anything yet.
            UsageError: the model cannot have this form; the message names one that works.
            PerpetuneError: what was written does not answer as the state does; it is not kept.
        """
        from perpetune.export import card_of, export_learned, pictures_for

        self._need_learned()
        pictures = None
        if images is not None:
            view = self.method.model.view
            if not isinstance(view, PictureView):
                raise UsageError(f"--images is for pictures, and {self.recipe.backbone.name} takes {view.noun}")
            pictures = pictures_for(view, [images] if isinstance(images, str | Path) else images)
        card = card_of(self.backbone, read_results(self.state), date.today())
        return export_learned(
            self.method, self.backbone, Path(folder), self.state.folder, to=to, pictures=pictures, card=card
        )

    def _need_learned(self, takes: str | None = None, *, first: bool = True) -> None:
        """Raise an error if the model takes another kind of examples, or (with `first`) has learned nothing yet."""
        self._leave_halfway()
        kind = self.backbone.takes
        if takes is not None and takes != kind and (takes, kind) != ("texts", "pictured"):
            call = self.method.model.view.verb
            raise UsageError(f"{self.recipe.backbone.name} takes {kind}, not {takes}: call `{call}`")
        if first and not self.state.committed:
            raise StateError(f"{self.state.folder} has learned nothing yet: use `perpetune update` or `run` first")


def mark_of(tasks: Sequence[Committed]) -> tuple[str, str]:
    """The folder of the last task and the hash of its manifest, or nothing. The name alone does not tell: somebody may
    have rolled the task back, and have learned another one of the same name."""
    if not tasks:
        return "", ""
    last = tasks[-1]
    return last.folder.name, (last.manifests or (manifest_digest(last.folder),))[0]
