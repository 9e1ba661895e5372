"""Reads the config of a checkpoint in transformers' layout, and checks that its tensors are those of the model."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from perpetune.errors import PerpetuneError, UsageError, closest
from perpetune.models.loaders.hub import one_line

# Ids that exist. A message shows some of them if an id is not found; other ids can be used as well.
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
        where: `gguf_file`, the name of the file if the model is a GGUF file in the folder or repository.

    Raises:
        UsageError: there is no config, or transformers cannot read it.
    """
    from transformers import AutoConfig

    if not Path(source).is_dir() and source.count("/") != 1:
        raise UsageError(f"{spec}: no such folder, and an id on the hub is OWNER/NAME; {closest(source, KNOWN)}")
    try:
        return AutoConfig.from_pretrained(source, **where)
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:  # the last two: torn GGUF files
        if Path(source).is_dir():
            start = "the file is torn: " if isinstance(error, IndexError | struct.error) else ""
            raise UsageError(f"{spec}: {start}{one_line(error)}") from error
        reason = one_line(error).partition(". ")[0]
        raise UsageError(
            f"{spec}: no such folder, and neither the hub nor its cache has it ({reason}); {closest(source, KNOWN)}"
        ) from error


def check_report(spec: str, report: Mapping[str, Any], ignored: tuple[str, ...] = ()) -> None:
    """Check the report that transformers gives after it has loaded tensors.

    Args:
        report: the `output_loading_info` of transformers.
        ignored: beginnings of tensors' names that the checkpoint may have in addition to those of the model.

    Raises:
        PerpetuneError: tensors are missing, unexpected or of another shape; the message names up to eight of each.
    """
    faults = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(name for name in report["unexpected_keys"] if not name.startswith(ignored)),
        "of another shape": sorted(str(entry[0]) for entry in report["mismatched_keys"]),
    }
    if any(faults.values()):
        details = "; ".join(f"{what}: {', '.join(names[:8])}" for what, names in faults.items() if names)
        raise PerpetuneError(f"{spec}: the checkpoint does not hold this model's tensors; {details}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside this context transformers shows no progress bar and no loading report. Faults are raised as errors."""
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
