"""What kind of model a backbone's name leads to, before it is loaded."""

from __future__ import annotations

from pathlib import Path

from perpetune.models.loaders import causal_lm, dual, openclip
from perpetune.models.loaders.checkpoint import config_of
from perpetune.plain import read_object


def is_dual(spec: str) -> bool:
    """Whether `PREFIX:REST` names a model of pictures and texts with two towers, by its prefix or its config.

    The names of other packages, and what cannot be read, are no such model here; loading it says what is wrong.

    Raises:
        UsageError: the model of an `hf:` cannot be found.
    """
    prefix, _, rest = spec.partition(":")
    if prefix == "openclip":
        return True
    if prefix not in ("hf", "folder") or causal_lm.is_gguf(rest):
        return False
    folder = Path(rest).expanduser()
    if not folder.is_dir():
        return prefix == "hf" and config_of(spec, rest).model_type in dual.FAMILIES
    if not (folder / "config.json").is_file():
        return prefix == "folder" and (folder / openclip.CONFIG).is_file()
    return read_object(folder / "config.json", f"{spec}: config.json").get("model_type") in dual.FAMILIES
