"""The state folder: it stores a tuned model, and everything that is needed to continue its training.

STATE/
  recipe.yaml         the resolved recipe
  backbone.json       the name and the fingerprint of the frozen weights
  journal.jsonl       one line per event; that of a commit holds the hash of the task's manifest
  tasks/0003-NAME/    one folder per committed task; it is complete, or it does not exist
  resume/             checkpoints of the unfinished task; the commit of the task deletes them
  candidate/          the same of a task whose gate has not decided (`state.candidate`)
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from perpetune.aside import clear_noted
from perpetune.data.names import several
from perpetune.documents import Backbone, fault_of
from perpetune.errors import StateError, UsageError, closest
from perpetune.files import (
    OURS,
    check_no_link,
    manifest_digest,
    remove_folder,
    remove_leftovers,
    to_json,
    write_file,
    write_folder,
)
from perpetune.methods.base import Method, Resting
from perpetune.plain import MOST_YAML, Malformed, read_json, read_regular
from perpetune.recipe import Recipe, parse_recipe
from perpetune.snapshot import restore, snapshot
from perpetune.state import candidate
from perpetune.state.accumulated import Accumulated
from perpetune.state.committed import START, Committed, Tasks, add_task, check_tasks, entries_of, find_tasks
from perpetune.state.journal import Chain, Journal, Said
from perpetune.state.lock import locked
from perpetune.state.meaning import MADE_BY, check_meaning, edited, made_by, training_digest
from perpetune.state.prune import Keep, Pruned, carry_out, changes, what_stays
from perpetune.store import Index, Rest, pack

A = TypeVar("A")
LINES = {"metrics.json": 2}
"""Documents in which each entry of an entry stands on one line: there may be one for each earlier task."""


class State:
    """An existing state folder. `State.create` makes one, `State(folder)` opens one.

    Raises:
        StateError: the folder is not a state folder, or its recipe is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "recipe.yaml").is_file():
            what = "is not a state folder (it has no recipe.yaml)" if folder.exists() else "does not exist"
            raise StateError(f"{folder} {what}: `perpetune init` or `perpetune run` makes one")
        try:
            text = read_regular(folder / "recipe.yaml", MOST_YAML).decode()
        except (OSError, UnicodeDecodeError):
            raise StateError(f"{folder / 'recipe.yaml'} cannot be read as text") from None
        try:
            self.recipe: Recipe = parse_recipe(text, str(folder / "recipe.yaml"))
        except UsageError as error:
            raise StateError(str(error)) from None
        if "checkpoint_every" not in self.recipe.run.model_fields_set:  # defaults must not fill up a torn recipe
            raise StateError(f"{folder / 'recipe.yaml'} is torn, its last key is missing: restore it from a backup")
        self._journal = Journal(folder / "journal.jsonl")
        self._known = Tasks()  # the tasks that were found last, with what was read of them
        self._stamp: object = None  # what told then that they are these tasks
        self._entries: list[str] | None = None  # the folders of tasks, while the state is locked
        self._checked: tuple[object, ...] | None = None  # what of the journal was compared with them
        self._rested: dict[str, tuple[Resting, Rest]] = {}  # sets at rest that a task stores, and which task
        self._together: dict[object, Accumulated[Any]] = {}  # what is known of all tasks, by its kind
        self._told = False  # whether a commit has said that tasks were pruned
        self._held: list[tuple[str, dict[str, Any]]] | None = None  # lines of the journal that wait
        clear_noted(folder)  # every verb opens the state, so the next one after a killed export does this

    @classmethod
    def create(cls, folder: Path, recipe: Recipe, backbone: Mapping[str, Any]) -> State:
        """Make a new state folder without learned tasks.

        Raises:
            UsageError: `folder` already exists.
        """
        if folder.exists() and not (folder.is_dir() and _unused(folder)):
            raise UsageError(
                f"{folder} already exists: continue with `perpetune resume {folder}` or `perpetune update {folder}`, "
                "or choose another folder"
            )
        try:
            (folder / "tasks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder} cannot be made: {error.strerror}") from None
        write_file(folder / "backbone.json", to_json(dict(backbone)))
        write_file(folder / "recipe.yaml", recipe.to_yaml().encode())  # last: this file makes the folder a state folder
        return cls(folder)

    @property
    def backbone(self) -> dict[str, Any]:
        """The name (`spec`) and the fingerprint of the frozen weights."""
        try:
            content = read_json(self.folder / "backbone.json", finite=True)
            fault = fault_of(Backbone, content) if isinstance(content, dict) else "it is no JSON object"
        except OSError as error:
            content, fault = {}, error.strerror or type(error).__name__
        except Malformed as error:
            content, fault = {}, str(error)
        if fault:
            where = self.folder / "backbone.json"
            raise StateError(f"{where} is missing or torn ({fault}): restore it from a backup")
        found: dict[str, Any] = content
        return found

    def relocate(self, recipe: Recipe | None, spec: str | None, data: tuple[str, str] | None) -> None:
        """Store that the model or data lie elsewhere now. Hold `writing` around it; nothing that was learned changes.

        Args:
            recipe: the recipe with the new places; None keeps it.
            spec: the new name of the backbone; None keeps it.
            data: the beginning of paths of tasks' data as it was, and as it is now.
        """
        if recipe is not None:
            self._relocate_checkpoints(recipe)
            write_file(self.folder / "recipe.yaml", recipe.to_yaml().encode())
            self.recipe = recipe
        if spec is not None:
            write_file(self.folder / "backbone.json", to_json({**self.backbone, "spec": spec}))
        self.log("relocated", **({"model": spec} if spec else {}), **({"data": list(data)} if data else {}))

    def _relocate_checkpoints(self, recipe: Recipe) -> None:
        """Make the checkpoints of the unfinished task go on under `recipe`: it differs in places alone."""
        path = self.folder / "resume" / "task.json"
        try:
            header = read_json(path)
            data, digest, world = header["data"].split("/")
        except (OSError, Malformed, LookupError, TypeError, ValueError, AttributeError):
            return  # there are none, or whoever reads them names the fault
        if digest == training_digest(self.recipe):
            write_file(path, to_json({**header, "data": f"{data}/{training_digest(recipe)}/{world}"}))

    @property
    def begun(self) -> date | None:
        """The day on which the state was made; None where nothing says it.

        States of earlier versions do not have it. For them it is the day of their journal's first line.

        Raises:
            StateError: `backbone.json` holds something else.
        """
        day = self.backbone.get("date")
        try:
            if day is not None:
                return date.fromisoformat(day)
        except ValueError:
            raise StateError(
                f"{self.folder / 'backbone.json'}: date is {day!r}, and no day such as 2026-01-31: restore it from a "
                "backup"
            ) from None
        journal = self.journal()
        return datetime.fromisoformat(journal[0]["time"]).date() if journal else None

    def moved(self) -> list[tuple[str, str]]:
        """The beginnings of paths of tasks' data that have changed, as they were and as they are, the oldest first."""
        events = [e["data"] for e in self.journal() if e.get("event") == "relocated" and "data" in e]
        return [(str(e[0]), str(e[1])) for e in events if isinstance(e, list) and len(e) == 2]

    # -- committed tasks ------------------------------------------------------------------------------

    @property
    def committed(self) -> list[Committed]:
        """The tasks learned so far, in order.

        Raises:
            StateError: a task between others is missing, a task exists twice, a folder's name is not that of a task, or
                the folders are not those that the journal says were committed.
        """
        tasks = self._found()
        chain = self._chain()
        checked = self._known.said, chain.said[len(tasks) :], chain.begun, chain.keep
        if self._checked is None or self._checked[0] is not checked[0] or self._checked != checked:
            check_tasks(self.folder, tasks, chain)
            self._checked = checked
        return tasks

    def together(self, empty: Callable[[], A], add: Callable[[A, Committed], None]) -> A:
        """An object that knows all committed tasks (`Accumulated`); the next call may change it.

        While the state is locked, only tasks that came since the last call are added. Otherwise it is made anew,
        because files may have changed.
        """
        tasks = self.committed
        if not self._known.locked:
            return Accumulated(empty, add).of(tasks)
        found: A = self._together.setdefault(empty, Accumulated(empty, add)).of(tasks)
        return found

    def _chain(self) -> Chain:
        """What the journal says was committed and not dropped again."""
        return self._journal.chain()

    def _found(self) -> list[Committed]:
        """The folders of tasks, unchecked."""
        chain = self._chain()
        entries = entries_of(self.folder) if self._entries is None else self._entries
        if self._known.locked:  # until this process itself adds or removes one
            self._entries = entries
        stamp = (chain.stamp, entries) if chain.stamp is not None else None
        if stamp is None or stamp != self._stamp:
            self._stamp = None
            self._known, self._stamp = find_tasks(self.folder, entries, chain, self._known), stamp
        return list(self._known)

    def unchecked(self) -> str:
        """A line about tasks whose manifest no line of the journal names, as those of older versions; else empty."""
        begun = self._chain().begun  # a crash came before the line of its commit; the next writer adds that
        names = [t.name for t in self.committed if not t.manifests and (t.index, t.name) != begun]
        if not names:
            return ""
        few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return (
            f"{self.folder}: the journal holds no hash of what was committed for {few}, as older versions wrote it, so "
            "nobody can say whether these folders were exchanged; the next update stores the hashes"
        )

    def load(self, method: Method, task: Committed | None = None) -> None:
        """Restore `method` to its state after `task`; by default after the last committed task."""
        tasks = self.committed
        task = task or (tasks[-1] if tasks else None)
        self._rested = {}
        if task is not None:
            files = task.read()
            restore(method, files, str(task.folder))
            held = task.rest()
            self._rested = {name: (of, held[name]) for name, of in method.resting().items() if name in held}
            if MADE_BY in files:  # not in a task of an older version
                check_meaning(self.folder, self.recipe, self.backbone, task, files[MADE_BY])

    def edited(self) -> str:
        """A line about what of the recipe was changed since the last task was learned; empty if nothing was.

        How later tasks are learned may be changed in `recipe.yaml`, but not without a word: some options of a method
        also decide how it answers.
        """
        task = next(reversed(self.committed), None)
        files = task.read(MADE_BY) if task is not None else {}
        return edited(self.folder, self.recipe, task, files[MADE_BY]) if task and MADE_BY in files else ""

    def commit(
        self,
        index: int,
        name: str,
        method: Method,
        documents: Mapping[str, Any],
        files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> str:
        """Store a learned task in one step, with JSON documents and other files; then delete its checkpoints, and prune
        earlier tasks as `run.keep` says.

        What of the method's tensors the task before has stands in the earlier folder alone (`perpetune.store`).

        Returns:
            The first time that earlier tasks are pruned, a line that names them; else nothing.
        """
        self._release()
        folder = self.folder / "tasks" / f"{index:04d}-{name}"
        resting, rested = method.resting(), self._rested
        held = {name: rested[name][1] for name, of in resting.items() if name in rested and rested[name][0] is of}
        tasks, first, learned = self._found(), self._chain().oldest, snapshot(method, without=held)
        tensors = {file: learned.pop(file) for file in list(learned) if file.endswith(".safetensors")}
        earlier = Index()
        with contextlib.suppress(StateError):  # damage in an earlier folder is for those who read it; nothing is shared
            earlier = tasks[-1].index_of() if index == len(tasks) > 0 else earlier
        content, made, rest = pack(tensors, index, earlier, tasks.__getitem__, held)
        stored = {"tensors.json": content, **({} if made is None else {"pack.safetensors": made})}
        documents = {**documents, MADE_BY: made_by(self.recipe, self.backbone)}
        plain = {file: to_json(content, LINES.get(file)) for file, content in documents.items()}
        entries, self._entries = self._entries, None
        manifest = write_folder(folder, {**learned, **stored, **plain, **files})
        add_task(self._known, folder.parent, folder.name, Said(manifest=manifest)).has_rest(rest)
        self._entries = None if entries is None else [*entries, folder.name]
        self._rested = {name: (of, rest[name]) for name, of in resting.items()}
        self._log_commit(self._known)
        remove_folder(self.folder / "resume")
        candidate.drop(self.folder)
        self._prune_rest()
        return self._told_of_pruning(first)

    def _told_of_pruning(self, first: int) -> str:
        """What to say, once, where the first task that the state can go back to was `first` before."""
        said, oldest = self._chain().said, self._chain().oldest
        if self._told or oldest == first:
            return ""
        self._told = True
        names = several([str(task.name) for task in said[first:oldest]])
        return (
            f"{names} can no longer be rolled back to, nor can more tasks as others are learned "
            f"(run.keep: {self.keep}); the oldest that can is {said[oldest].name}"
        )

    def _log_commit(self, tasks: Sequence[Committed]) -> None:
        """The journal's line about the last task, whose folder is there, with what of earlier tasks is kept from now
        on."""
        last, kept = tasks[-1], what_stays(self.keep, tasks, self._chain())
        forgot = None
        with contextlib.suppress(StateError):  # faults are for those who read it
            forgot = last.json("task.json").get("forgot")
        if forgot is not None:  # earlier entries hold what was forgotten, so none can stay
            by = ", ".join(forgot["tasks"] or forgot["classes"])
            kept |= {"oldest": last.index, "by": f"forget {by}", "forgot": forgot}
        self.log("task committed", task=last.index, name=last.name, manifest=manifest_digest(last.folder), **kept)

    @property
    def keep(self) -> Keep:
        """How many of the newest tasks can be gone back to. A state of an older version keeps all, until its recipe
        says `run.keep`: nobody was asked."""
        run = self.recipe.run
        return run.keep if "keep" in run.model_fields_set else "all"

    def rollback(self, to: str) -> list[str]:
        """Drop every task after `to`, and an unfinished one; return the names of the dropped tasks.

        Args:
            to: a task's name or its folder's name; or `start`, which drops all tasks.

        Raises:
            UsageError: there is no such task, or it was pruned. A number alone is none: folders count from 0, and what
                is printed counts from 1.
        """
        tasks = self._found()  # what is missing or too much after `to` is dropped from the journal
        if to == START:
            keep = 0
        else:
            matches = [t for t in tasks if t.name == to] or [t for t in tasks if t.folder.name == to]
            if not matches:
                near = closest(to, [START, *(t.name for t in tasks)])
                meant = [f"task {to} is {t.name}" for t in tasks if to == str(t.index + 1)]
                meant += [f"the folder with {to} is {t.folder.name}" for t in tasks if to == str(t.index)]
                raise UsageError(
                    f"{self.folder} has no task {to!r}; "
                    + (f"a number is not taken for one: {', '.join(meant)}; give the name" if meant else near)
                )
            self._check_kept(tasks, matches[0])
            keep = matches[0].index + 1
        self._check_rollback(tasks, keep)
        self._rested = {}
        opened, said = self.open_task() is not None, self._chain().said
        candidate.drop(self.folder)
        dropped = [t.name for t in tasks[keep:]]
        gone = [s.name for s in said[max(keep, len(tasks)) :] if s.name is not None]  # their folders are missing
        if dropped or gone or opened:
            self.log("rollback begun", to=to, keep=keep)
        remove_folder(self.folder / "resume")
        self._entries = None
        for task in reversed(tasks[keep:]):  # from the end, so that a crash leaves no gap between the tasks
            remove_folder(task.folder)
        if dropped or gone or opened:
            self.log("rolled back", to=to, dropped=[*dropped, *gone], keep=keep)
        return [*dropped, *gone]

    def _check_rollback(self, tasks: Sequence[Committed], keep: int) -> None:
        """StateError if a rollback could not end, or would leave a state that does not load; nothing is removed yet."""
        for path in (self.folder / "resume", *(task.folder for task in tasks[keep:])):
            check_no_link(path)
            if path.exists() and not path.is_dir():
                raise StateError(f"{path} is no folder: move it away")
        if keep:
            tasks[keep - 1].read()

    def _check_kept(self, tasks: Sequence[Committed], to: Committed) -> None:
        """UsageError if a task was pruned; it names where the state can go instead."""
        if to.pruned:
            kept = [t.name for t in tasks if not t.pruned]
            few = ", ".join(kept[:3]) + (f" and {len(kept) - 3} later ones" if len(kept) > 3 else "")
            raise UsageError(
                f"{self.folder} cannot go back to {to.name}, which was pruned ({to.pruned}); it can go back to {few}, "
                f"or to {START}"
            )

    def prune(self, keep: int, *, dry_run: bool = False, by: str = "") -> Pruned:
        """Drop what is needed for a rollback to earlier tasks and for nothing else. Hold `writing` around it.

        What the newest task needs stays, and so do the documents of all tasks: predictions, results and reports are as
        before.

        Args:
            keep: how many of the newest tasks can still be gone back to, the newest one among them.
            dry_run: whether nothing is changed; then no `writing` is needed.
            by: what the journal says about who asked for it.

        Raises:
            UsageError: `keep` is less than 1.
            StateError: a folder is damaged, so nobody can say what of it is needed; nothing was changed.
        """
        if type(keep) is not int or keep < 1:  # True is no number of tasks
            raise UsageError(f"keep is {keep!r}: a whole number of tasks is expected, at least 1, for the newest")
        chain, tasks = self._chain(), self.committed
        oldest = max(chain.oldest, len(tasks) - keep)
        dropped, kept = [t.name for t in tasks[chain.oldest : oldest]], [t.name for t in tasks[oldest:]]
        done = Pruned(dropped, kept, sum(change.frees for change in changes(tasks, chain.pruned, oldest)))
        if dropped and not dry_run:
            self.log("prune begun", oldest=oldest, by=by or f"prune, keep {keep}")
        if not dry_run:
            carry_out(self.folder, self._journal, self._known)
        return done

    def _prune_rest(self) -> None:
        """Drop what the journal says is not kept, and end what a crash interrupted. Something else was asked for, so a
        fault is only told, and the next writer tries again."""
        try:
            carry_out(self.folder, self._journal, self._known)
        except (OSError, StateError) as error:
            warnings.warn(f"{self.folder}: earlier tasks were not pruned: {error}", stacklevel=3)

    def storage(self) -> list[dict[str, Any]]:
        """What each task takes on the disk.

        Returns:
            For each task `task` (its number), `name`, `own` (the bytes of its folder), `shared` (the bytes that it has
            in folders of earlier tasks) and `pruned`: by what it was, empty if the state can go back to it.
        """
        return [
            {"task": t.index, "name": t.name, "own": t.own(), "shared": t.shared(), "pruned": t.pruned}
            for t in self.committed
        ]

    # -- journal --------------------------------------------------------------------------------------

    def log(self, event: str, **facts: Any) -> None:
        """Append one line to the journal; while lines are held, put it behind those that wait."""
        if self._held is None:
            self._journal.append(event, facts)
        else:
            self._held.append((event, facts))

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Inside, lines of the journal wait for a commit. Without one they are dropped, and the file is as it was."""
        self._held = []
        try:
            yield
        finally:
            self._held = None

    def _release(self) -> None:
        """Write the lines that wait."""
        held, self._held = self._held or [], None
        for event, facts in held:
            self.log(event, **facts)

    def journal(self) -> list[dict[str, Any]]:
        """All events, without a last line that a crash cut off."""
        return self._journal.events()

    def open_task(self) -> dict[str, Any] | None:
        """The journal's line of the unfinished task, which was begun but neither committed nor dropped; None if there
        is no such task."""
        begun = self._last_begun()
        return begun if begun and begun["task"] == len(self._found()) else None

    def candidate(self) -> dict[str, Any] | None:
        """What is being learned aside until its gate has decided; None if nothing is.

        Returns:
            `task` (its number), `name`, `from` (its data), `fingerprint` and `gate`.
        """
        found = candidate.begun(self.folder)
        return found if found and found["task"] == len(self._found()) else None

    def discard_candidate(self) -> str:
        """Drop what was learned aside; a few words about it, or nothing if nothing was."""
        found = self.candidate()
        candidate.drop(self.folder)
        return f"task {found['name']}, which was learned aside for a gate" if found else ""

    def _last_begun(self) -> dict[str, Any] | None:
        """The journal's line about the last task that was begun; None if a commit or a rollback came after it."""
        turns = ("task begun", "task committed", "rollback begun", "rolled back")
        last = next((e for e in reversed(self.journal()) if e["event"] in turns), None)
        return last if last and last["event"] == "task begun" else None

    # -- one writer at a time -------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the folder for writing. First finish or remove what a crash left behind.

        Raises:
            StateError: another process is writing to the folder.
        """
        for name in (".lock", "journal.jsonl", "tasks", "resume", candidate.FOLDER):
            check_no_link(self.folder / name)
        with locked(self.folder):
            self._known.locked = True
            try:
                remove_leftovers(self.folder)
                remove_leftovers(self.folder / "tasks")
                self._journal.mend()
                with self._journal.locked():
                    self._finish_rollback()
                    self._finish_commit()
                    self._seal()
                    self._prune_rest()
                    yield
            finally:
                self._known.locked, self._entries = False, None

    def _finish_commit(self) -> None:
        """Finish a commit that a crash interrupted after the task's folder was renamed.

        Then the journal has no line about the commit, or useless checkpoints are left.
        """
        begun, tasks = self._last_begun(), self._found()  # faults are for those who read them
        if begun and tasks and (begun["task"], begun["name"]) == (tasks[-1].index, tasks[-1].name):
            self._log_commit(tasks)
        if self.open_task() is None:
            remove_folder(self.folder / "resume")
        if self.candidate() is None:  # its commit is there
            candidate.drop(self.folder)

    def _finish_rollback(self) -> None:
        """Finish a rollback that a crash interrupted. It was asked for, and nobody wants half of it."""
        chain = self._chain()
        if chain.keep is None:
            return
        tasks = self._found()
        self._check_rollback(tasks, chain.keep)
        remove_folder(self.folder / "resume")
        self._entries = None
        for task in reversed(tasks[chain.keep :]):
            remove_folder(task.folder)
        dropped = [said.name for said in chain.said[chain.keep :] if said.name is not None]
        to = tasks[chain.keep - 1].name if chain.keep else START
        self.log("rolled back", to=to, dropped=dropped, keep=chain.keep)

    def _seal(self) -> None:
        """Store the hashes of tasks that an older version committed, so that the chain can be checked from now on."""
        tasks = self._found()
        if any(not task.manifests for task in tasks):
            manifests = [(task.manifests or (manifest_digest(task.folder),))[0] for task in tasks]
            self.log("tasks sealed", manifests=manifests)


def _unused(folder: Path) -> bool:
    """Whether a folder has nothing in it but the files of a `State.create` that crashed."""
    made = {"tasks", "backbone.json"}
    ours = all(path.name in made or OURS.fullmatch(path.name) for path in folder.iterdir())
    tasks = folder / "tasks"
    return ours and not tasks.is_symlink() and not any(tasks.glob("*"))
