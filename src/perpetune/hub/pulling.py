"""Get a state from the hub: beside the place where it is to be, checked as a whole, and put there in one step.

What has arrived lies in `.NAME.pull/new` beside `NAME`. A file counts by its hash, so a pull that was killed goes on
where it was. A state that exists is replaced by a folder that holds the new commits and all else that was in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perpetune.data.names import printable, several
from perpetune.errors import HubError, StateError, UsageError
from perpetune.files import (
    MANIFEST,
    MOST_MANIFEST,
    OURS,
    check_no_link,
    digest_of,
    exchange,
    listed,
    remove_folder,
    sync_files,
    to_json,
    write_file,
)
from perpetune.hub.contents import JOURNAL, OF_HUB, PLACES, ROOT, ahead, belongs, decides, read_journal, tasks_in
from perpetune.hub.remote import SAME, Entry, Remote
from perpetune.plain import MOST_JSON, MOST_YAML
from perpetune.recipe import make_recipe
from perpetune.results import read_results
from perpetune.runtime import Progress, Silent
from perpetune.sequence import moved
from perpetune.state import State
from perpetune.state.journal import MOST_JOURNAL
from perpetune.state.lock import locked

AT_ONCE = 8
"""Files that are fetched at the same time."""
CACHE = ".cache"
"""Where the client keeps its notes and parts of files, beside the files."""
BOUNDS = {"recipe.yaml": MOST_YAML, "backbone.json": MOST_JSON, JOURNAL: MOST_JOURNAL}
Arrived = Callable[[str, int], None]
"""Is told of each file that has arrived, and of its bytes."""


@dataclass(frozen=True)
class Pulled:
    """What a pull has brought.

    Attributes:
        repo: OWNER/NAME.
        commit: the id of the commit that was asked for.
        folder: the state folder.
        files: how many files came over the network.
        bytes: their size.
        tasks: the names of the tasks that the folder did not have before.
    """

    repo: str
    commit: str
    folder: str
    files: int
    bytes: int
    tasks: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def pull(
    repo: str,
    folder: str | Path,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    arrived: Arrived | None = None,
) -> Pulled:
    """Get a state that `push` has put on the hub, or what it has learned since.

    Args:
        repo: OWNER/NAME.
        folder: the state folder. It is new, or a state to which the repository has more commits.
        revision: a branch, a tag or a commit; None is the newest commit of `main`.
        progress: is told what is left out.
        arrived: is called for each file that came over the network.

    Raises:
        HubError: the hub cannot be reached or refuses; what is there is no state, torn, or changed; or the folder has
            commits that the repository does not have.
        StateError: another process is writing to the folder.
        UsageError: the folder holds something else than a state.
    """
    remote, target = Remote(repo), Path(os.path.realpath(folder))
    aside = target.with_name(f".{target.name}.pull")
    _undo_half(target)
    if target.exists() and not (target / "recipe.yaml").is_file() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists and is no state folder: choose a new folder")
    head = remote.head(revision)
    if head is None:
        raise HubError(f"{repo} is not on {remote.api.endpoint}, or the token may not see it; {SAME}")
    files = remote.files(head.commit)
    missing = [name for name in ROOT if name not in files]
    if missing:
        raise HubError(f"{repo} holds no state, it has no {missing[0]}; {SAME}: was it put there by `perpetune push`?")
    with contextlib.ExitStack() as held:
        state = State(target) if (target / "recipe.yaml").is_file() else None
        if state is not None:
            held.enter_context(state.writing())
        check_no_link(aside)
        aside.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(aside))
        check_no_link(aside / "new")
        (aside / "new").mkdir(exist_ok=True)
        one = _Pull(remote, head.commit, files, target, aside / "new", state, progress or Silent(), arrived)
        try:
            tasks = one.run()
        except (HubError, StateError, UsageError) as error:
            if not one.may_go_on:
                shutil.rmtree(aside, ignore_errors=True)
            raise error from None
        shutil.rmtree(aside, ignore_errors=True)
    return Pulled(repo, head.commit, str(folder), one.count, one.bytes, tasks)


class _Pull:
    """One pull. `may_go_on` says whether what has arrived is of use for the next one."""

    def __init__(
        self,
        remote: Remote,
        commit: str,
        files: Mapping[str, Entry],
        target: Path,
        new: Path,
        state: State | None,
        progress: Progress,
        arrived: Arrived | None,
    ):
        self.remote, self.commit, self.files, self.target, self.new = remote, commit, files, target, new
        self.state, self.progress, self.arrived = state, progress, arrived
        self.count = self.bytes = 0
        self.may_go_on = False

    def run(self) -> list[str]:
        """Bring everything, check it, and put it in its place; the names of the tasks that are new."""
        self._clean([path for path in self.files if belongs(path)], cache=True)
        for name, most in BOUNDS.items():
            if self.files[name].size > most:
                self._refuse(f"{name} has {self.files[name].size:,} bytes")
        self._fetch({JOURNAL: None})
        extra, news = self._compared()
        if not news:
            return []
        manifests = [path for path in self.files if path.endswith(f"/{MANIFEST}") and belongs(path)]
        if any(self.files[path].size > MOST_MANIFEST for path in manifests):
            self._refuse("a manifest is too large")
        self._fetch(dict.fromkeys([*PLACES, *manifests]))
        with self._checked():
            wanted = self._named()
        kept = {path: None for path in self.files if belongs(path) and path.startswith("kept/")}
        self._room([*wanted, *kept])
        self._fetch(wanted)
        self._fetch(kept)
        self._say_left_out({*ROOT, *manifests, *wanted, *kept})
        self._clean({*ROOT, *manifests, *wanted, *kept}, cache=False)
        with self._checked():
            state = State(self.new)
            there = [task.name for task in state.committed]
            state.committed[-1].read()
            read_results(state)
        if self.state is not None:
            self._carry_over(self.state, extra)
        self._put()
        came = set(tasks_in(news))
        return [name for name in there if name in came]  # others were rolled back again

    def _compared(self) -> tuple[list[bytes], list[bytes]]:
        """What the journal of the folder has behind that of the repository, and the other way round.

        Raises:
            HubError: the folder has commits, or a task that is not finished, that the repository does not have.
        """
        theirs = read_journal(self.new)
        if self.state is None:
            return [], theirs.splitlines(keepends=True)
        folder, repo = self.target, self.remote.repo
        mine, news = ahead(read_journal(folder) if (folder / JOURNAL).exists() else b"", theirs)
        opened, aside = self.state.open_task(), self.state.candidate()
        if not news or not decides(news):
            if decides(mine):
                lines = tasks_in(mine)
                self.progress.note(
                    f"there is nothing to pull: {folder} has all that {repo} has"
                    + (f", and {several(lines)}" if lines else "")
                )
            else:
                self.progress.note(f"there is nothing to pull: {folder} has all that {repo} has")
            return mine, []
        if opened is not None or aside is not None:
            name = (opened or aside or {})["name"]
            raise HubError(
                f"{folder} has begun task {name}, which {repo} does not have; {SAME}: pull into another folder"
            )
        if decides(mine):
            lost = tasks_in(mine)
            what = f"{f'commits ({several(lost)})' if lost else 'changes'} that {repo} does not have"
            raise HubError(f"{folder} has {what}, and {repo} has others; {SAME}: pull into another folder")
        return mine, news

    def _named(self) -> dict[str, str | None]:
        """The files of tasks, by path, with the SHA-256 that each must have: the journal names the manifests, and these
        name the files."""
        found: dict[str, str | None] = {}
        for task in State(self.new).committed:
            if not task.manifests:
                self._refuse(f"the journal has no hash of task {task.name}")
            for name, (size, digest) in listed(task.folder, digests=task.manifests).items():
                path = f"tasks/{task.entry}/{name}"
                if path not in self.files or not belongs(path):
                    self._refuse(f"{path} is missing")
                if self.files[path].same(size, digest) is False:
                    self._refuse(
                        f"{path} is torn or was changed: {self.files[path].size} bytes, and the manifest has {size} "
                        "bytes and their hash"
                    )
                found[path] = digest
        if not found:
            self._refuse("it has no committed task")
        return found

    def _fetch(self, wanted: Mapping[str, str | None]) -> None:
        """Bring files that are not there yet. Each must be what the hub says, or have the SHA-256 that is given."""
        missing = [path for path, digest in wanted.items() if not self._there(path, digest)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for path in pool.map(self._bring, missing):
                if not self._right(self.new / path, path, wanted[path]):
                    (self.new / path).unlink()
                    says = "its manifest says" if wanted[path] else "the hub says"
                    self._refuse(f"{path} arrived with other bytes than {says}")
                self.count += 1
                self.bytes += self.files[path].size
                if self.arrived is not None:
                    self.arrived(path, self.files[path].size)

    def _bring(self, path: str) -> str:
        try:
            self.remote.fetch(path, self.commit, self.new)
        except HubError:
            self.may_go_on = True  # the network's fault: what has arrived is of use
            raise
        return path

    def _there(self, path: str, digest: str | None) -> bool:
        """Whether a file has arrived before, or the state that is to be replaced has it; then it is linked."""
        place = self.new / path
        if os.path.lexists(place):
            if self._right(place, path, digest):
                return True
            place.unlink()
        mine = self.target / path
        if path == JOURNAL or self.state is None or not self._right(mine, path, digest):
            return False
        place.parent.mkdir(parents=True, exist_ok=True)
        _link(mine, place)
        return True

    def _right(self, place: Path, path: str, digest: str | None) -> bool:
        if place.is_symlink() or not place.is_file():
            return False
        return self.files[path].holds(place) if digest is None else digest_of(place) == digest

    def _room(self, wanted: Sequence[str]) -> None:
        """HubError if the disk has not enough room for what is still to come."""
        needed = sum(self.files[path].size for path in wanted if not (self.new / path).exists())
        free = shutil.disk_usage(self.new).free
        if needed > free:
            raise HubError(f"{self.remote.repo} needs {needed:,} bytes, and the disk has {free:,} free; {SAME}")

    def _say_left_out(self, used: set[str]) -> None:
        others = sorted(set(self.files) - used - OF_HUB)
        if others:
            self.progress.note(
                f"{len(others)} files of {self.remote.repo} belong to no state and are left out: "
                f"{several(list(map(printable, others)))}"
            )

    def _clean(self, wanted: Collection[str], *, cache: bool) -> None:
        """Delete all but these files, also links, from where files arrive.

        Args:
            cache: whether parts of files that the client goes on with stay.
        """
        parts = self.new / CACHE
        if not cache:
            shutil.rmtree(parts, ignore_errors=True)
        for root, folders, names in os.walk(self.new):  # follows no links
            here = Path(root)
            for path in [here / name for name in (*folders, *names)]:
                strange = path.relative_to(self.new).as_posix() not in wanted and parts not in path.parents
                if path.is_symlink() or (strange and path.name in names):
                    path.unlink()
        for root, _, _ in os.walk(self.new, topdown=False):
            if Path(root) != self.new and not os.listdir(root):
                os.rmdir(root)

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        """The state's own checks: a fault is one of the repository, under its paths there."""
        try:
            yield
        except StateError as error:
            fault = str(error).replace(f"{self.new}{os.sep}", "").replace(str(self.new), "the state")
            self._refuse(fault.partition(": restore")[0].partition(". Restore")[0])

    def _refuse(self, fault: str) -> None:
        self.may_go_on = False
        raise HubError(
            f"{self.remote.repo} holds no whole state ({fault}); {SAME}: push it again from where it is whole"
        )

    def _carry_over(self, state: State, extra: Sequence[bytes]) -> None:
        """Put into the new folder what else the old one holds, and what `relocate` has changed there."""
        for path in self.target.iterdir():
            if path.name in (*ROOT, "tasks", "resume", "candidate", ".lock") or OURS.fullmatch(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, self.new / path.name, symlinks=True, copy_function=_link, dirs_exist_ok=True)
            elif not os.path.lexists(self.new / path.name):
                _link(path, self.new / path.name)
        new = State(self.new)
        places = [event for event in state.journal()[-len(extra) :] if event["event"] == "relocated"] if extra else []
        if places:
            content = new.recipe.model_dump(mode="json")
            for event in places:
                for key in ("data", "exams", "protect") if "data" in event else ():
                    content[key] = moved(content[key], [tuple(event["data"])])
            if any("model" in event for event in places):
                content["backbone"]["name"] = state.recipe.backbone.name
                write_file(self.new / "backbone.json", to_json({**new.backbone, "spec": state.backbone["spec"]}))
            write_file(self.new / "recipe.yaml", make_recipe(content).to_yaml().encode())
        elif (mine := (self.target / "recipe.yaml").read_bytes()) != (self.new / "recipe.yaml").read_bytes():
            (self.new / BEFORE).unlink(missing_ok=True)
            write_file(self.new / BEFORE, mine)
            self.progress.note(f"recipe.yaml is that of {self.remote.repo} now; the one from here is in {BEFORE}")
        if extra:
            write_file(self.new / JOURNAL, read_journal(self.new) + b"".join(extra))

    def _put(self) -> None:
        """Give the new folder its name: the old state is there until the new one is."""
        sync_files(self.new)
        if self.state is None:
            if self.target.is_dir():
                self.target.rmdir()
            os.replace(self.new, self.target)
            return
        try:
            exchange(self.new, self.target)
        except OSError:
            half = _half(self.target)
            os.replace(self.target, half)
            try:
                os.replace(self.new, self.target)
            except OSError:
                os.replace(half, self.target)
                raise
            remove_folder(half)


BEFORE = "recipe.before-pull.yaml"


def _half(target: Path) -> Path:
    """Where the old state lies for an instant, on a file system that cannot exchange two folders in one step."""
    return target.with_name(f".{target.name}.before-pull")


def _undo_half(target: Path) -> None:
    """Put the old state back, if a kill came in that instant; or delete it, if the new one is there."""
    half = _half(target)
    if (half / "recipe.yaml").is_file() and not half.is_symlink():
        if target.exists():
            remove_folder(half)
        else:
            os.replace(half, target)


def _link(source: str | Path, place: str | Path) -> None:
    """The same file under a second name; a copy where there cannot be one. No file of a state but the journal is ever
    changed in its place."""
    try:
        os.link(source, place, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, place, follow_symlinks=False)
