"""Reads the config of a checkpoint in transformers' layout, and checks that its tensors are those of the model."""

from __future__ import annotations

import contextlib
import math
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
    "HuggingFaceTB/SmolVLM-256M-Instruct",
    "llava-hf/llava-1.5-7b-hf",
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "google/paligemma2-3b-pt-224",
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
    from transformers import AutoConfig, PretrainedConfig

    if not Path(source).is_dir() and source.count("/") != 1:
        raise UsageError(f"{spec}: no such folder, and an id on the hub is OWNER/NAME; {closest(source, KNOWN)}")
    try:
        with quiet():
            if not where:
                check_written(spec, PretrainedConfig.get_config_dict(source)[0])
            config = AutoConfig.from_pretrained(source, **where)
    except PerpetuneError:
        raise
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:  # the last two: torn GGUF files
        if Path(source).is_dir():
            start = "the file is torn: " if isinstance(error, IndexError | struct.error) else ""
            raise UsageError(f"{spec}: {start}{one_line(error)}") from error
        reason = one_line(error).partition(". ")[0]
        raise UsageError(
            f"{spec}: no such folder, and neither the hub nor its cache has it ({reason}); {closest(source, KNOWN)}"
        ) from error
    except Exception as error:  # a file of strangers makes transformers fail in any way
        raise UsageError(f"{spec}: its config cannot be read: {one_line(error) or type(error).__name__}") from error
    check_numbers(spec, config)
    return config


SIZES = re.compile(
    r"(hidden_size|intermediate_size|ffn_dim|vocab_size|num_hidden_layers|num_attention_heads|num_key_value_heads"
    r"|head_dim|word_embed_proj_dim|max_position_embeddings|num_channels|n_(embd|inner|layer|head|positions))"
)
"""Keys of a config whose values are whole numbers above 0."""
SEVERAL = re.compile(r"((embed|mlp)_dims?|dims?|depths?|layers|num_heads|img_size|image_size|patch_size)")
"""Keys, also of timm's configs, whose values are such numbers or lists of them."""
MOST, DEEPEST, MOST_LABELS = 10**8, 10**4, 10**6
"""The largest size, the largest number of layers or heads, and that of labels, that any model has."""


def check_written(spec: str, content: Any) -> None:
    """Raise UsageError if a config as it is written has a size that no model has.

    Transformers makes lists and names of such sizes already while it reads them, and timm builds the whole net.
    """
    for name, value in content.items() if isinstance(content, Mapping) else ():
        check_written(spec, value)
        labels = name in ("num_labels", "num_classes")
        most = MOST_LABELS if labels else _most(name)
        if labels or SIZES.fullmatch(name) or SEVERAL.fullmatch(name):
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and number > most:
                    raise _no_size(spec, name, value, most)


def _most(name: str) -> int:
    return DEEPEST if re.search(r"layer|depth|head(?!_dim)", name) else MOST


def _no_size(spec: str, name: str, value: Any, most: int) -> UsageError:
    told = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}…"
    return UsageError(f"{spec}: {name} in its config is {told}; a whole number from 1 to {most} is needed")


def check_numbers(spec: str, config: Any) -> None:
    """Raise UsageError if the config of a model has a size that is not a whole number, or that no model has.

    Without this, memory would be full before anything could be compared with the tensors in the checkpoint.
    """
    parts = (
        config,
        config.get_text_config(),
        *(getattr(config, name, None) for name in ("text_config", "vision_config")),
    )
    for part in {id(c): c for c in parts if hasattr(c, "__dict__")}.values():
        for name, value in vars(part).items():
            if not SIZES.fullmatch(name) or (value is None and name not in REQUIRED):
                continue
            most = _most(name)
            numbers = value if isinstance(value, list) and name == "num_key_value_heads" else [value]
            for number in numbers:
                if isinstance(number, bool) or not isinstance(number, int) or not 0 < number <= most:
                    raise _no_size(spec, name, value, most)


REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Of these, those that no config may leave open."""


def check_weights(spec: str, source: str, config: Any) -> None:
    """Raise UsageError if a folder's tensors are far fewer than its config describes.

    Transformers would fill memory with random numbers for tensors that the files do not hold.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModel

    files = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    held = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                held += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            return  # whoever loads it names the fault
    if not files:
        return
    try:
        with quiet(), torch.device("meta"):
            wanted = sum(p.numel() for p in AutoModel.from_config(config).parameters())
    except Exception as error:  # a config of strangers makes transformers fail in any way
        raise unbuilt(spec, error) from error
    if wanted > 16 * held + 10**8:  # 16: a file may pack several weights of few bits into one number
        raise UsageError(
            f"{spec}: its config describes a model of {wanted:.3g} parameters, and its files hold {held:.3g}: they do "
            "not belong together"
        )


def model_of(
    spec: str,
    source: str,
    config: Any,
    *,
    pretrained: bool = True,
    dtype: str = "float32",
    ignored: tuple[str, ...] = (),
    **extra: Any,
) -> nn.Module:
    """The model that transformers' `AutoModel` makes of `config`, with the tensors at `source`; safetensors only.

    Args:
        pretrained: False gives random weights.
        dtype: torch's name of the type of the weights.
        ignored: beginnings of tensors' names that the checkpoint may have in addition to those of the model.
        extra: further arguments of the model's class.

    Raises:
        PerpetuneError: the model cannot be built, or the tensors are not its own; the message names them.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel

    if not pretrained:
        try:
            net: nn.Module = AutoModel.from_config(config, dtype=getattr(torch, dtype), **extra)
        except Exception as error:  # a config of strangers makes transformers fail in any way
            raise unbuilt(spec, error) from error
        return net
    check_weights(spec, source, config)
    try:
        with quiet():
            net, report = AutoModel.from_pretrained(
                source,
                config=config,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # so that the report names them
                output_loading_info=True,
                **extra,
            )
    except SafetensorError as error:
        raise PerpetuneError(f"{spec}: its safetensors file cannot be read: {one_line(error)}") from error
    except Exception as error:  # a config of strangers makes transformers fail in any way
        raise unbuilt(spec, error) from error
    check_report(spec, report, ignored)
    return net


def unbuilt(spec: str, error: Exception) -> PerpetuneError:
    """The error for a model that another library cannot build or load."""
    reason = one_line(error) or type(error).__name__
    if not isinstance(error, OSError | ValueError | RuntimeError):
        reason = f"{reason} ({type(error).__name__}): does its config fit its tensors?"
    return PerpetuneError(f"{spec}: the model cannot be built or loaded: {reason}")


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
