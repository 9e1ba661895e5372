"""Fetches files from the Hugging Face hub, and turns its errors into one line."""

from __future__ import annotations

from pathlib import Path

from perpetune.errors import PerpetuneError


def hub_file(spec: str, repository: str, name: str) -> Path | None:
    """The local copy of a file of `OWNER/NAME[@REVISION]`. It is fetched unless it is cached. None if there is no such
    file.

    Raises:
        PerpetuneError: the file cannot be fetched; the message gives the reason.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    repository, _, revision = repository.partition("@")
    try:
        return Path(hf_hub_download(repository, name, revision=revision or None))
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError as error:
        raise PerpetuneError(
            f"{spec}: {name} is not in the hub's cache on this machine and the hub cannot be reached; "
            "run once with network, or name a local copy as folder:PATH"
        ) from error
    except OSError as error:
        raise PerpetuneError(f"{spec}: cannot fetch {name} of {repository}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The message of another library's exception on one line, cut after 600 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 600 else f"{text[:600]} …"
