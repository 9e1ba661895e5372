"""A checkpoint in transformers' layout: what its config says, and whether its tensors are the model's."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from perpetune.errors import PerpetuneError, UsageError, closest
from perpetune.models.loaders.hub import one_line

# Shown as examples when an id is not found: one line of ids that exist, not a limit.
KNOWN = (
    "google/vit-base-patch16-224",
    "google/vit-base-patch16-224-in21k",
    "google/vit-large-patch16-224-in21k",
    "facebook/deit-tiny-patch16-224",
    "facebook/deit-small-patch16-224",
    "facebook/deit-base-patch16-224",
    "facebook/dino-vits16",
    "facebook/dino-vitb16",
    "facebook/dinov2-small",
    "facebook/dinov2-base",
    "facebook/dinov2-large",
    "facebook/dinov2-with-registers-small",
    "facebook/dinov2-with-registers-base",
    "facebook/vit-msn-small",
    "facebook/vit-msn-base",
    "facebook/dinov3-vits16-pretrain-lvd1689m",
    "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "Qwen/Qwen3-0.6B",
    "meta-llama/Llama-3.2-1B",
    "google/gemma-3-1b-it",
    "EleutherAI/pythia-160m",
    "openai-community/gpt2",
    "facebook/opt-125m",
)


def config_of(spec: str, source: str, **where: str) -> Any:
    """The config of the model at `source`, a folder or an id on the hub.

    Args:
        where: `gguf_file`, where it is such a file in the folder or repository.

    Raises:
        UsageError: there is none, or transformers cannot read it.
    """
    from transformers import AutoConfig

    if not Path(source).is_dir() and source.count("/") != 1:
        raise UsageError(f"{spec}: no such folder, and an id on the hub is OWNER/NAME; {closest(source, KNOWN)}")
    try:
        return AutoConfig.from_pretrained(source, **where)
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:  # the last two: torn GGUF files
        if Path(source).is_dir():
            said = "the file is torn: " if isinstance(error, IndexError | struct.error) else ""
            raise UsageError(f"{spec}: {said}{one_line(error)}") from error
        reason = one_line(error).partition(". ")[0]
        raise UsageError(
            f"{spec}: no such folder, and not to be had from the hub or its cache ({reason}); {closest(source, KNOWN)}"
        ) from error


def check_report(spec: str, report: Mapping[str, Any], ignored: tuple[str, ...] = ()) -> None:
    """Raise what transformers has noted while it loaded tensors.

    Args:
        report: its `output_loading_info`.
        ignored: what the names of tensors begin with that may be there beside those of the model.

    Raises:
        PerpetuneError: the checkpoint has too few tensors, too many or others; names up to eight of each.
    """
    faults = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(name for name in report["unexpected_keys"] if not name.startswith(ignored)),
        "of another shape": sorted(str(entry[0]) for entry in report["mismatched_keys"]),
    }
    if any(faults.values()):
        said = "; ".join(f"{what}: {', '.join(names[:8])}" for what, names in faults.items() if names)
        raise PerpetuneError(f"{spec}: the checkpoint does not hold this model's tensors; {said}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no loading report from transformers: what is wrong is raised instead."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
