"""Put a state, or an export of one, on the hub: one commit there for each push, private unless somebody asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from perpetune.data.names import printable, several
from perpetune.errors import HubError, StateError, UsageError
from perpetune.export.card import CARD, is_card, state_card
from perpetune.hub.contents import JOURNAL, OF_HUB, ahead, belongs, committed_files, committed_journal, tasks_in
from perpetune.hub.remote import SAME, Entry, Remote
from perpetune.results import read_results
from perpetune.runtime import Progress, Silent
from perpetune.state import State
from perpetune.state.journal import MOST_JOURNAL

STAYS = "checkpoints and reports stay here"


@dataclass(frozen=True)
class Pushed:
    """What a push has sent, or would send.

    Attributes:
        repo: OWNER/NAME.
        url: its address.
        private: whether strangers cannot see it.
        commit: the id of its newest commit; None if nothing was committed there, as in a dry run.
        files: how many files are sent.
        bytes: their size. What the hub has already, by its hash, is not sent again.
        unchanged: how many files lie there already.
        removed: how many files are removed there.
        dry_run: whether nothing was sent.
    """

    repo: str
    url: str
    private: bool
    commit: str | None
    files: int
    bytes: int
    unchanged: int
    removed: int
    dry_run: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Sent = dict[str, "tuple[Path | bytes, int, str | None]"]  # by path: the content, its bytes, its SHA-256 if it is known


def push(
    folder: str | Path,
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    kept: bool = False,
    progress: Progress | None = None,
) -> Pushed:
    """Put what is committed of a state, or an export, into a model repository on the hub, with a model card.

    Args:
        folder: a state folder, or a folder from `export`.
        repo: OWNER/NAME; it is made if it does not exist.
        public: whether everybody may see it. Without this, an existing public repository is refused.
        revision: the branch; None is `main`. It is made, as a copy of `main`, if it does not exist.
        dry_run: whether nothing is sent.
        force: take the place of what the repository holds, also if that has commits which the state does not have.
        kept: whether features of test examples go along (`STATE/kept`).
        progress: is told what goes where.

    Raises:
        HubError: the hub cannot be reached or refuses, or holds commits that the state does not have.
        StateError: the state is damaged, has learned nothing yet, or another process is writing to it.
        UsageError: there is neither a state nor an export, or the repository is public.
    """
    remote, place, say = Remote(repo), Path(folder), progress or Silent()
    if not (place / "recipe.yaml").is_file() and is_card(place / CARD):
        if kept:
            raise UsageError(f"{place} is an export and has no kept features: leave `kept` out")
        return _Push(remote, say, public, revision, dry_run, force).export(place)
    state = State(place)
    with state.writing():  # so that nobody prunes what is being sent
        return _Push(remote, say, public, revision, dry_run, force).state(state, kept)


@dataclass
class _Push:
    """One push; the attributes are those of `push`."""

    remote: Remote
    progress: Progress
    public: bool
    revision: str | None
    dry_run: bool
    force: bool
    _private: bool = field(default=True, init=False)

    def state(self, state: State, kept: bool) -> Pushed:
        tasks = state.committed
        if not tasks:
            raise StateError(f"{state.folder} has learned nothing yet, so there is nothing to push")
        sent: Sent = {**committed_files(state, kept)}
        journal = committed_journal(state)
        repo = self.remote.repo
        card = state_card(state.folder, state.backbone, read_results(state), date.today(), repo).encode()
        sent |= {JOURNAL: (journal, len(journal), None), CARD: (card, len(card), None)}
        there = self._there()
        if there is not None:
            self._check(there, journal, state.folder)
        mine = [path for path in there[1] if belongs(path)] if there is not None else []
        stays = STAYS if kept else f"features of test examples (STATE/kept), {STAYS}"
        about = (
            "its recipe and documents name your classes, files and folders, and each task has features of "
            f"held-out examples (docs/operate.md); {stays}"
        )
        number = f"{len(tasks)} task{'s' if len(tasks) != 1 else ''}"
        return self._send(sent, there, mine, f"perpetune: {number}, the last one {tasks[-1].name}", about)

    def export(self, folder: Path) -> Pushed:
        sent: Sent = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink():
                raise UsageError(f"{path} is a link: an export has none")
            if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
                sent[name] = path, path.stat().st_size, None
        there = self._there()
        others = sorted(set(there[1]) - set(sent) - OF_HUB) if there is not None else []
        if JOURNAL in others and not self.force:
            raise HubError(f"{self.remote.repo} holds a state; {SAME}: push the export to a repository of its own")
        if others and not self.force:
            self.progress.note(
                f"{self.remote.repo} has {len(others)} other files, which stay: {several(list(map(printable, others)))}"
            )
        mine = others if self.force else []
        return self._send(sent, there, mine, f"perpetune: export {folder.name}", "the card is its README.md")

    def _there(self) -> tuple[str, dict[str, Entry]] | None:
        """The newest commit of the branch, and its files; None if the repository does not exist.

        Raises:
            UsageError: everybody can see it, and nobody has said that this is meant.
        """
        head = self.remote.head(None)
        if head is None:
            return None
        if not head.private and not self.public:
            raise UsageError(f"{self.remote.repo} is public, so everybody could read this: say --public if you want it")
        if head.private and self.public:
            self.progress.note(f"{self.remote.repo} stays private: its settings on the hub can make it public")
        self._private = head.private
        if self.revision is not None and self.remote.has_branch(self.revision):
            head = self.remote.head(self.revision) or head
        return head.commit, self.remote.files(head.commit)

    def _check(self, there: tuple[str, dict[str, Entry]], journal: bytes, folder: Path) -> None:
        """HubError if the repository has anything that a push would take away."""
        commit, files = there
        repo = self.remote.repo
        if JOURNAL not in files:
            others = sorted(set(files) - OF_HUB)
            if others and not self.force:
                raise HubError(
                    f"{repo} holds something else than a state ({several(list(map(printable, others)))}); {SAME}: "
                    "choose another repository, or --force"
                )
            return
        mine, theirs = ahead(journal, self.remote.read(JOURNAL, commit, MOST_JOURNAL))
        if not theirs:
            return
        lost = tasks_in(theirs)
        what = f"{f'commits ({several(lost)})' if lost else 'lines in its journal'} that {folder} does not have"
        if self.force:
            self.progress.note(f"{repo} has {what}: they are no longer its newest; its history on the hub keeps them")
        elif mine:
            raise HubError(
                f"{repo} has {what}, and {folder} has others, so neither follows the other; {SAME}: `perpetune pull "
                f"{repo} FOLDER` gets it into another folder, and --force puts {folder} in its place"
            )
        else:
            raise HubError(f"{repo} has {what}; {SAME}: `perpetune pull {repo} {folder}` first, or --force")

    def _send(
        self,
        sent: Sent,
        there: tuple[str, dict[str, Entry]] | None,
        mine: Sequence[str],
        message: str,
        about: str,
    ) -> Pushed:
        """Make the commit. `mine` are files there that go if they are not in `sent`."""
        commit, files = there or (None, {})
        new = {path: content for path, content in sent.items() if not _same(files.get(path), *content)}
        gone = sorted(set(mine) - set(sent))
        if set(new) <= {CARD} and not gone and CARD in files:  # a card with another day is no news
            new = {}
        size = sum(about[1] for about in new.values())
        private = self._private if there is not None else not self.public
        done = Pushed(
            repo=self.remote.repo,
            url=self.remote.url,
            private=private,
            commit=None,
            files=len(new),
            bytes=size,
            unchanged=len(sent) - len(new),
            removed=len(gone),
            dry_run=self.dry_run,
        )
        place = f"{self.remote.url}{f' ({self.revision})' if self.revision else ''}"
        if not new and not gone:
            self.progress.note(f"{place} has all of it already")
            return replace(done, commit=commit)
        word, are = ("would go", "would be") if self.dry_run else ("go", "are")
        what = (
            f"{len(new)} files ({size:,} bytes) {word} to {place}, "
            f"{'private' if private else 'which everybody can read'}; {len(sent) - len(new)} are there already, "
            f"{len(gone)} {are} removed there; {about}"
        )
        if self.dry_run:
            self.progress.note(what)
            return done
        if there is None:
            self.remote.create(not self.public)
        if self.revision is not None and not self.remote.has_branch(self.revision):
            self.remote.branch(self.revision)
        if commit is None:
            head = self.remote.head(self.revision)
            if head is None or (not head.private and not self.public):
                raise HubError(f"{self.remote.url} was not made as it was asked for; nothing was sent")
            commit = head.commit
        self.progress.note(what)
        content: Mapping[str, Path | bytes] = {path: one[0] for path, one in new.items()}
        made = self.remote.commit(content, gone, message, commit, self.revision)
        arrived = self.remote.files(made)
        for path, one in sent.items():
            if not _same(arrived.get(path), *one):
                raise HubError(
                    f"{place}: {path} is not there as it was sent (commit {made[:12]}); a .gitignore there may leave "
                    "it out: delete that file there, and push again"
                )
        return replace(done, commit=made)


def _same(there: Entry | None, content: Path | bytes, size: int, digest: str | None) -> bool:
    """Whether a file lies there as it is here."""
    if there is None or there.size != size:
        return False
    known = there.same(size, digest) if digest is not None else None
    return there.holds(content) if known is None else known
