"""Unpacked copies of GGUF files in perpetune's cache: transformers takes half a minute to unpack even a small one.

A copy is a folder in transformers' layout. Its name has the SHA-256 of the file, so a changed file gets another copy.
It is written aside and renamed when it is complete, and its files are checked when it is read. A copy that is torn is
not read; the next load writes it again.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from perpetune.aside import clear_beside, written_aside
from perpetune.errors import PerpetuneError, StateError
from perpetune.files import check_folder, digest_of, remove_folder, seal_folder
from perpetune.models.loaders.checkpoint import quiet
from perpetune.models.loaders.hub import one_line

CACHE = "PERPETUNE_CACHE"
"""The variable of the environment that names the folder of copies. Empty: no copies are kept or read."""
MOST = 4 << 30
"""A copy of more bytes is not kept: a user who loads such a model should know of the file in transformers' layout."""


def copy_of(place: str, file: str, dtype: str) -> str | None:
    """The folder of the unpacked copy of a local GGUF file; None if there is none, or if it is torn.

    Args:
        place: the folder of the file.
        dtype: torch's name of the type of the weights.
    """
    folder = _folder(Path(place, file), dtype)
    if folder is None or not folder.is_dir():
        return None
    try:
        check_folder(folder)
    except StateError:
        return None
    return str(folder)


def keep_copy(spec: str, place: str, file: str, dtype: str, net: nn.Module, tokenizer: Any) -> None:
    """Write a copy of what was unpacked, and say so in one line; also if nothing can be kept, and why.

    Another process may do the same at the same time: the first that is done wins, and both copies have the same bytes.
    """
    folder = _folder(Path(place, file), dtype)
    if folder is None:
        return
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    try:
        if size > MOST:
            raise OSError(f"it has {size / 2**30:.1f} GiB, more than {MOST >> 30}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear_beside(folder)
        if folder.exists():  # torn, or another process has just written it
            if copy_of(place, file, dtype) is not None:
                return
            remove_folder(folder)
        if shutil.disk_usage(folder.parent).free < 2 * size:
            raise OSError(f"{folder.parent} has too little room")
        with written_aside(folder) as aside, quiet():
            _write(aside, net, tokenizer)
    except (OSError, PerpetuneError, ValueError) as error:
        if copy_of(place, file, dtype) is None:
            warnings.warn(
                f"{spec}: its weights are unpacked at each load, as no copy could be kept: {one_line(error)}",
                stacklevel=2,
            )
        return
    warnings.warn(f"{spec}: {size / 1e6:,.0f} MB, unpacked into {folder}, which later loads read", stacklevel=2)


def _write(folder: Path, net: Any, tokenizer: Any) -> None:
    """Write model and tokenizer in transformers' layout, with a manifest of their files.

    Raises:
        ValueError: the tokenizer would be another one when it is read again.
    """
    from transformers import AutoTokenizer

    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    same = again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    if not same or again.special_tokens_map != tokenizer.special_tokens_map:
        raise ValueError("transformers reads its tokenizer otherwise from a folder than from the file")
    seal_folder(folder)


def _folder(file: Path, dtype: str) -> Path | None:
    """Where the copy of a local file lies; None for files on the hub, and where no copies are wanted."""
    import transformers

    root = os.environ.get(CACHE)
    if root == "" or not file.is_file():
        return None
    if root is None:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "perpetune")
    digest = digest_of(file)
    return Path(root, "gguf", f"{digest}-{dtype}-transformers-{transformers.__version__}")
