"""One model repository on the hub: what lies in it, and how files get there and back.

`huggingface_hub` does the work. Here its errors become one line, and what a repository lists is bounded and checked,
because anybody may have written it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from perpetune._version import __version__
from perpetune.data.names import printable
from perpetune.errors import HubError, UsageError
from perpetune.models.loaders.hub import one_line
from perpetune.plain import read_regular

MOST_FILES = 200_000
"""Files of one repository that are listed."""
LONGEST = 255
"""Bytes of one part of a path, the most that file systems take."""
NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
TOKEN = "`hf auth login` stores a token, and HF_TOKEN holds one for a script"
SAME = "nothing was changed"


@dataclass(frozen=True)
class Entry:
    """A file in a repository: its bytes, its SHA-256 if it is stored as a large one, and git's hash of it."""

    size: int
    sha256: str | None
    blob: str

    def same(self, size: int, sha256: str) -> bool | None:
        """Whether a file with this size and hash is the same; None if its content has to be looked at."""
        if size != self.size:
            return False
        return None if self.sha256 is None else sha256 == self.sha256

    def holds(self, content: Path | bytes) -> bool:
        """Whether a file, or some bytes, are the same."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if size != self.size:
            return False
        digest = hashlib.sha1(b"blob %d\0" % size) if self.sha256 is None else hashlib.sha256()
        if isinstance(content, bytes):
            digest.update(content)
        else:
            with open(content, "rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
        return digest.hexdigest() == (self.sha256 or self.blob)


@dataclass(frozen=True)
class Head:
    """The newest commit of a branch, and whether strangers cannot see the repository."""

    commit: str
    private: bool


class Remote:
    """A model repository.

    Args:
        repo: its name, OWNER/NAME.

    Raises:
        UsageError: that is no name of a repository.
    """

    def __init__(self, repo: str):
        if not NAME.fullmatch(repo) or ".." in repo or "--" in repo:
            raise UsageError(f"{printable(repo)} is no name of a repository: OWNER/NAME is expected, such as me/birds")
        self.repo = repo

    @cached_property
    def api(self) -> Any:
        """The client. It finds the token itself; no other code of perpetune sees it."""
        from huggingface_hub import HfApi

        return HfApi(library_name="perpetune", library_version=__version__)

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.repo}"

    def head(self, revision: str | None) -> Head | None:
        """The newest commit of a branch, or a tag or a commit; None if there is no such repository.

        Raises:
            HubError: there is no such branch, or the hub cannot be asked.
        """
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        with self._told():
            try:
                info = self.api.model_info(self.repo, revision=revision)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError as error:
                if error.response.status_code == 404:
                    return None
                raise
        if not re.fullmatch("[0-9a-f]{40}", str(info.sha)):
            raise HubError(f"{self.url} does not say which commit is its newest; {SAME}")
        return Head(info.sha, info.private is not False)

    def has_branch(self, revision: str) -> bool:
        """Whether there is such a branch, tag or commit in a repository that exists."""
        from huggingface_hub.errors import RevisionNotFoundError

        with self._told():
            try:
                self.api.model_info(self.repo, revision=revision)
            except RevisionNotFoundError:
                return False
        return True

    def files(self, commit: str) -> dict[str, Entry]:
        """What a commit holds, by path.

        Raises:
            HubError: a path leads out of the repository or cannot be a file here, or there are too many files.
        """
        found: dict[str, Entry] = {}
        with self._told():
            listed = self.api.list_repo_tree(self.repo, recursive=True, revision=commit)
            for number, one in enumerate(listed):
                if number == MOST_FILES:
                    raise HubError(f"{self.repo} has more than {MOST_FILES} files, which no state has; {SAME}")
                if hasattr(one, "blob_id"):
                    lfs = one.lfs.sha256 if one.lfs is not None else None
                    found[str(one.path)] = Entry(int(one.size), lfs, str(one.blob_id))
        for path, entry in found.items():
            if not _harmless(path) or entry.size < 0:
                raise HubError(f"{self.repo} has a file with the path {printable(path)!r}, which is refused; {SAME}")
        return found

    def fetch(self, path: str, commit: str, folder: Path) -> None:
        """Put a file of a commit into a folder, under its path there; a part that came before is gone on with."""
        with self._told(path):
            self.api.hf_hub_download(self.repo, path, revision=commit, local_dir=folder)

    def read(self, path: str, commit: str, most: int) -> bytes:
        """The content of a small file of a commit."""
        with tempfile.TemporaryDirectory(prefix="perpetune-hub-") as place:
            self.fetch(path, commit, Path(place))
            return read_regular(Path(place) / path, most)

    def create(self, private: bool) -> None:
        """Make the repository."""
        with self._told():
            self.api.create_repo(self.repo, private=private, exist_ok=True)

    def branch(self, name: str) -> None:
        """Make a branch that begins where `main` is."""
        with self._told():
            self.api.create_branch(self.repo, branch=name, exist_ok=True)

    def commit(
        self,
        files: Mapping[str, Path | bytes],
        gone: Sequence[str],
        message: str,
        parent: str,
        revision: str | None,
    ) -> str:
        """Make one commit on top of `parent`; its id. If the branch has another newest commit, it is refused."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        changes: list[Any] = [CommitOperationDelete(path, is_folder=False) for path in gone]
        changes += [CommitOperationAdd(path, content) for path, content in files.items()]
        with self._told():
            made = self.api.create_commit(
                self.repo, changes, commit_message=message, parent_commit=parent, revision=revision
            )
        return str(made.oid)

    @contextlib.contextmanager
    def _told(self, path: str | None = None) -> Iterator[None]:
        """Turn an error of the client into one line. It never holds the token."""
        from huggingface_hub import errors

        # The class of the HTTP library's errors: another library in another version of huggingface_hub.
        transport: Any = next(c for c in errors.HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
        what = f"{self.repo}: {path}" if path else self.repo
        try:
            yield
        except HubError:
            raise
        except errors.OfflineModeIsEnabled:
            raise HubError("HF_HUB_OFFLINE is set, so the hub is not asked: unset it to push and pull") from None
        except errors.HfHubHTTPError as error:
            raise HubError(self._refusal(error, what)) from None
        except errors.LocalEntryNotFoundError as error:
            cause = error.__cause__ or error.__context__
            if isinstance(cause, errors.HfHubHTTPError):
                raise HubError(self._refusal(cause, what)) from None
            raise HubError(self._unreached(cause or error)) from None
        except (transport, ConnectionError, TimeoutError) as error:
            raise HubError(self._unreached(error)) from None
        except (OSError, ValueError, RuntimeError, errors.XetDownloadError) as error:
            if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
                raise  # of this computer: a full disk, a folder that cannot be written
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            if isinstance(cause, errors.HfHubHTTPError):
                raise HubError(self._refusal(cause, what)) from None
            raise HubError(f"{what} could not be transferred ({one_line(cause)}); {SAME}") from None

    def _unreached(self, error: BaseException) -> str:
        return (
            f"{self.api.endpoint} cannot be reached ({one_line(error) or type(error).__name__}), and {SAME}: look at "
            "the network, then give the same command again"
        )

    def _refusal(self, error: Any, what: str) -> str:
        """Why the hub has answered with an error."""
        from huggingface_hub import errors

        code = error.response.status_code
        if isinstance(error, errors.GatedRepoError):
            return f"{what} is open to those who asked for it alone: ask on {self.url}"
        if code == 401:
            return f"{self.api.endpoint} does not accept the token, or there is none ({what}); {SAME}: {TOKEN}"
        if code == 403:
            return f"the token does not allow this ({what}); {SAME}: take one that may write to {self.repo}"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{self.repo} has no such branch, tag or commit; {SAME}"
        if code == 404:
            return f"{what} is not on {self.api.endpoint}, or the token may not see it; {SAME}: {TOKEN}"
        if code in (409, 412):
            return f"{self.repo} was changed at the same time, so {SAME}: give the same command again"
        said = one_line(Exception(error.server_message or "")) or f"error {code}"
        return f"{self.api.endpoint} refuses ({what}: {said}); {SAME}"


def _harmless(path: str) -> bool:
    """Whether a path can only mean a file below the folder that it is put into, on every system."""
    parts = path.split("/")
    return not (
        any(part in ("", ".", "..") or len(os.fsencode(part)) > LONGEST for part in parts)
        or any(re.match("[A-Za-z]:", part) for part in parts)
        or "\\" in path
        or not path.isprintable()
    )
