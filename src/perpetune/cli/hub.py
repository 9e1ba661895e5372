"""The verbs for the Hugging Face hub: push, pull."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from perpetune.cli.lines import LineView, lines
from perpetune.cli.options import JsonLines
from perpetune.cli.output import steady

Repo = Annotated[str, typer.Argument(metavar="REPO", help="The model repository: OWNER/NAME.")]


def push(
    state: Annotated[Path, typer.Argument(metavar="STATE", help="A state folder, or a folder that `export` wrote.")],
    repo: Repo,
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody see it; without this a new repository is private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="The branch; made if it does not exist; default main.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent; send nothing.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Take the place of commits in the repository that the state does not have.")
    ] = False,
    kept: Annotated[
        bool, typer.Option("--kept", help="Send the kept features of test examples too (STATE/kept).")
    ] = False,
    json: JsonLines = False,
) -> None:
    """Put what is committed of a state on the Hugging Face hub, as one commit with a model card; private by default.

    Files that are there already are not sent again. The token is the one of `hf auth login`, or HF_TOKEN.

    Example: perpetune push birds me/birds --dry-run, then perpetune push birds me/birds
    """
    from perpetune.cli.notes import Notes
    from perpetune.hub import push as put

    _bars(not json)
    out = lines(json)
    done = put(
        state,
        repo,
        public=public,
        revision=revision,
        dry_run=dry_run,
        force=force,
        kept=kept,
        progress=Notes() if out is None else LineView(out),
    )
    if out is not None:
        out.emit("done", **done.as_dict())
    elif done.dry_run:
        print(f"{done.url}: nothing was sent")
    else:
        print(f"{done.url}: {_files(done.files)}, {done.bytes:,} bytes; commit {(done.commit or '')[:12]}")


@steady
def pull(
    repo: Repo,
    state: Annotated[
        Path, typer.Argument(metavar="STATE", help="The state folder: a new one, or one that REPO has more commits to.")
    ],
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="A branch, tag or commit; default the newest of main.")
    ] = None,
    json: JsonLines = False,
) -> None:
    """Get a state from the Hugging Face hub, or what it has learned since; checked before it takes its place.

    A pull that was killed leaves the state as it was, and the same command goes on.

    Example: perpetune pull me/birds birds
    """
    from perpetune.cli.notes import Notes
    from perpetune.data.names import several
    from perpetune.hub import pull as get

    _bars(not json)
    out = lines(json)

    def arrived(path: str, size: int) -> None:
        if out is not None:
            out.emit("file", path=path, bytes=size)

    done = get(repo, state, revision=revision, progress=Notes() if out is None else LineView(out), arrived=arrived)
    if out is not None:
        out.emit("done", **done.as_dict())
    else:
        new = f"new: {several(done.tasks)}" if done.tasks else "nothing new"
        print(f"{done.folder}: {_files(done.files)}, {done.bytes:,} bytes; {new}")


def _files(count: int) -> str:
    return f"{count} file{'s' if count != 1 else ''}"


def _bars(wanted: bool) -> None:
    """Let the client show its progress bars to people who watch, and to nobody else."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not (wanted and sys.stderr.isatty()):
        disable_progress_bars()


VERBS = (push, pull)
