"""The model that answers, and its successor: a new commit is read aside and then takes its place in one step.

There are two models of one state on the same frozen tensors. One answers. What was committed is read into the other
one, file by file, checked. Only when it is complete do the two change their roles, between two batches. So no request
ever meets a model that is half read, and a state that cannot be read leaves the answering one as it is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from torch import Tensor

from perpetune.data.pictures.view import PictureView
from perpetune.errors import StateError, UsageError
from perpetune.files import manifest_digest
from perpetune.pets import PET
from perpetune.runtime import Progress
from perpetune.state import State
from perpetune.trained import Trained

Mark = tuple[int, str, str]
"""Of what a state has learned: how many tasks, the name of the last one, and the hash of its manifest."""
NOTHING: Mark = (0, "", "")


@dataclass(frozen=True)
class Served:
    """What answers, with the commit that it holds.

    Attributes:
        mark: names the commit.
        since: when it began to answer.
    """

    trained: Trained
    mark: Mark
    since: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    @property
    def number(self) -> int:
        """How many tasks it has learned."""
        return self.mark[0]

    @property
    def task(self) -> str | None:
        """The name of the last task that it has learned; None if it has learned none."""
        return self.mark[1] or None


class Models:
    """The model that answers and the one that waits.

    Raises:
        UsageError: the state's model does not answer for pictures.
        StateError: the folder is no state, or it is damaged.
    """

    def __init__(self, folder: Path, device: str | None = None, progress: Progress | None = None):
        self.folder, self.device, self.progress = folder, device, progress
        self._in_use = threading.Lock()
        self._current: Served
        self._spare: Trained | None
        self._current, self._spare = self._loaded()

    @property
    def current(self) -> Served:
        """What answers now; for a look at it. To ask it, use `asked`."""
        return self._current

    @property
    def view(self) -> PictureView:
        """How pictures become the model's input. It is the same for all commits of a state."""
        view = self._current.trained.method.model.view
        assert isinstance(view, PictureView)
        return view

    @contextmanager
    def asked(self) -> Iterator[Served]:
        """What answers now. It stays the one that answers until the context ends."""
        with self._in_use:
            yield self._current

    def renew(self, found: Mark) -> bool:
        """Let what the folder holds answer from now on.

        Args:
            found: what it was seen to hold.

        Returns:
            Whether it does. If the folder was changed meanwhile it does not, and the call is to be made again.

        Raises:
            StateError, OSError: it cannot be read. What answers is as before.
        """
        spare = self._spare
        if spare is None or not spare.same_recipe():
            with self._in_use:  # loading a model touches settings of the whole process
                self._current, self._spare = self._loaded()
            return self._current.mark == found
        try:
            spare.refresh()  # if it ends half read, the next call reads all of it again
        except (StateError, OSError):
            raise
        except Exception:
            self._spare = None  # nobody knows what it is then
            raise
        if mark_of(self.folder) != found:
            return False
        with self._in_use:
            self._current, self._spare = Served(spare, found), self._current.trained
        return True

    def _loaded(self) -> tuple[Served, Trained]:
        """Both of them, loaded anew; if the folder is changed meanwhile, once more."""
        while True:
            State(self.folder)  # whoever names no state is told so
            before = stamp(self.folder)
            try:
                mark = mark_of(self.folder)
                first, second = (
                    Trained.load(self.folder, device=self.device, progress=self.progress) for _ in range(2)
                )
                same = mark_of(self.folder) == mark
            except StateError:
                if stamp(self.folder) == before:
                    raise
                continue
            if same:
                break
        _check_kind(first, self.folder)
        _share(first, second)
        return Served(first, mark), second


def mark_of(folder: Path) -> Mark:
    """What a state has learned.

    Raises:
        StateError: it cannot be read, such as while another process changes it.
    """
    tasks = State(folder).committed
    return (len(tasks), tasks[-1].name, manifest_digest(tasks[-1].folder)) if tasks else NOTHING


def _check_kind(trained: Trained, folder: Path) -> None:
    """UsageError if the model does not answer for pictures."""
    model = trained.method.model
    if isinstance(model.view, PictureView) and model.view.verb == "predict":
        return
    if not model.chooses:
        raise UsageError(
            f"{folder} holds a language model, and serve answers for pictures: `perpetune export {folder} ADAPTER`, "
            "then give ADAPTER to an OpenAI-compatible server, such as `vllm serve MODEL --enable-lora --lora-modules "
            "NAME=ADAPTER` (docs/serve.md)"
        )
    raise UsageError(f"{folder} takes {model.view.takes}, and serve answers for pictures: use `perpetune predict`")


def _share(first: Trained, second: Trained) -> None:
    """Let both nets hold one copy of the frozen tensors; what is learned is not shared."""
    ours, theirs = first.backbone.net.state_dict(keep_vars=True), second.backbone.net.state_dict(keep_vars=True)
    pets = [m for m in second.backbone.net.modules() if isinstance(m, PET)]
    learned = {id(t) for pet in pets for t in [*pet.parameters(), *pet.buffers()]}
    for name, tensor in theirs.items():
        own = ours.get(name)
        if not isinstance(tensor, Tensor) or not isinstance(own, Tensor) or id(tensor) in learned:
            continue
        if type(own) is type(tensor) and (own.shape, own.dtype) == (tensor.shape, tensor.dtype):
            tensor.data = own.data


class Watcher:
    """Looks at a state again and again, and takes up what was committed.

    A folder that cannot be read, as while another process commits or prunes, is tried again at the next look.

    Args:
        models: take up what is new.
        poll: seconds between two looks.
        taken: is called with what answers now, after each change.
        failed: is called with a line when a look failed, and with an empty one when a look works again.
    """

    PATIENCE = 3
    """So many looks in a row may fail before it is said: a commit or a prune takes a moment."""

    def __init__(
        self,
        models: Models,
        poll: float,
        taken: Callable[[Served], None],
        failed: Callable[[str], None] = lambda line: None,
    ):
        self.models, self.poll, self.taken, self.failed = models, poll, taken, failed
        self.failures = 0
        """How many looks have failed since the last one that did not."""
        self.behind = ""
        """Why the newest commit does not answer; empty if it does."""
        self._seen: object = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _watch(self) -> None:
        while not self._stop.wait(self.poll):
            self.look()

    def look(self) -> None:
        """Take up what is new, if anything is."""
        try:
            seen = stamp(self.models.folder)
            if seen == self._seen:
                return
            found = mark_of(self.models.folder)
            if found == self.models.current.mark or self._renewed(found):
                self._seen = seen
                self._well()
        except Exception as error:  # noqa: BLE001  the model that answers goes on, whatever is wrong with the next one
            self._ill(" ".join(str(error).split()) or type(error).__name__)

    def _renewed(self, found: Mark) -> bool:
        if not self.models.renew(found):
            return False
        self.taken(self.models.current)
        return True

    def _well(self) -> None:
        if self.behind:
            self.failed("")
        self.failures, self.behind = 0, ""

    def _ill(self, line: str) -> None:
        self.failures += 1
        if self.failures >= self.PATIENCE and line != self.behind:
            self.behind = line
            self.failed(line)


def stamp(folder: Path) -> object:
    """What changes whenever something is committed, rolled back or moved elsewhere."""
    found = []
    for name in ("journal.jsonl", "recipe.yaml", "backbone.json"):
        with contextlib.suppress(FileNotFoundError):  # a state that has learned nothing has no journal
            status = (folder / name).stat()
            found.append((name, status.st_ino, status.st_size, status.st_mtime_ns))
    return found
