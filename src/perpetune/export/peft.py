"""Write and read LoRA adapters in the format of the PEFT library: `adapter_config.json`, `adapter_model.safetensors`.

The format is that of PEFT 0.21. The matrices `A` and `B` of the linear layer at PATH have the names
`base_model.model.PATH.lora_A.weight` and `base_model.model.PATH.lora_B.weight`. The update of its weight is
`lora_alpha / r * B A`. `rank_pattern` and `alpha_pattern` list the layers with another `r` or `lora_alpha`.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perpetune.aside import written_aside
from perpetune.errors import StateError, UsageError
from perpetune.export.head import anywhere
from perpetune.models.backbone import Backbone
from perpetune.models.loaders.causal_lm import gguf_origin
from perpetune.models.loaders.pair import parts_of
from perpetune.models.towers import LinearLike, widths
from perpetune.pets.base import PET, Place, inject, pets, slots, submodule, walk
from perpetune.pets.lora import LoRA
from perpetune.plain import read_object

sre: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
PAIR = "pair:"

# Keys of an adapter_config.json that this module understands (UNDERSTOOD), or that do not change what the adapter
# computes (SILENT). Any other key with a value belongs to a variant of LoRA that this module does not understand.
UNDERSTOOD = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "target_modules"}
UNDERSTOOD |= {"exclude_modules", "peft_type", "bias", "init_lora_weights", "base_model_name_or_path"}
SILENT = {"auto_mapping", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_version", "qalora_group_size"}
SILENT |= {"revision", "runtime_config", "task_type"}

# Initialisations that do not change the frozen weights; the others (PiSSA, OLoRA, …) do.
HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def write_peft(backbone: Backbone, name: str, folder: Path, whole: Mapping[str, nn.Module] | None = None) -> None:
    """Write the LoRA adapters of the set `name` as a PEFT folder.

    `PeftModel.from_pretrained` loads the folder onto the same net.

    An adapter on `P` parts of a fused qkv layer becomes one adapter of rank `P r` on the whole layer; its `B` is zero
    outside the blocks of these parts. It includes the updates kept from earlier tasks. The folder is written under
    another name first and then renamed, so it is never half written.

    In timm's BEiT and EVA, the attention reads the weight of the fused qkv layer without calling the layer, so PEFT has
    no effect there. Set `qkv_bias_separate = True` on their attention first, as `Backbone` does.

    Args:
        whole: modules that take the place of the net's own, by their paths (PEFT's `modules_to_save`).

    Raises:
        UsageError: the set does not exist or has pets that are not LoRA, or the folder is not empty.
    """
    if foreign := sorted({type(pet).__name__ for pet in pets(backbone.net, name) if not isinstance(pet, LoRA)}):
        raise UsageError(f"PEFT's format can store LoRA only; the set {name!r} has {', '.join(foreign)}")
    wrapped = {path: slot.pet(name) for path, slot in slots(backbone.net) if name in slot.pets}
    adapters = {path: pet for path, pet in wrapped.items() if isinstance(pet, LoRA)}
    tensors: dict[str, Tensor] = {}
    for path, lora in adapters.items():
        up, down = lora.whole()
        tensors[f"{PREFIX}{path}{A}"] = down.detach().cpu().contiguous()
        tensors[f"{PREFIX}{path}{B}"] = up.detach().cpu().contiguous()
    whole = whole or {}
    for path, module in whole.items():
        tensors |= {f"{PREFIX}{path}.{key}": value.detach().cpu() for key, value in module.state_dict().items()}
    with written_aside(folder) as aside:
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        config = json.dumps(_config(backbone, adapters, whole), indent=2, sort_keys=True, allow_nan=False)
        (aside / CONFIG).write_text(f"{config}\n")


def read_peft(backbone: Backbone, folder: Path, name: str) -> list[PET]:
    """Put the LoRA adapters of a PEFT folder into the backbone, as the set `name`.

    Args:
        folder: has the two files, or a sub-folder with them that has the adapter's name: `name`, or `default`.

    Returns:
        The new PETs. Each acts on the whole of its linear layer.

    Raises:
        UsageError: the folder has no adapter, or a variant of LoRA that this function does not understand.
        StateError: tensors are missing, unexpected or of the wrong shape; the message names them.
    """
    folder = _adapter_folder(folder, name)
    config = _read_config(folder / CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise StateError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    targets = _targets(backbone.net, config)
    pairs = _pairs(folder, tensors, list(targets))
    rank_of, alpha_of = _exceptions(config, "rank_pattern", "r"), _exceptions(config, "alpha_pattern", "lora_alpha")
    adapters: dict[str, LoRA] = {}
    for path, (down, up) in pairs.items():
        place, rank = targets[path], int(rank_of(path))
        for matrix, shape in ((down, (rank, place.d_in)), (up, (place.d_out, rank))):
            if matrix.shape != shape:
                raise StateError(f"{folder}: {path}: a LoRA matrix has shape {tuple(matrix.shape)}; expected {shape}")
        lora = LoRA(
            place,
            torch.Generator(),
            rank=rank,
            alpha=alpha_of(path),
            dropout=config.get("lora_dropout") or 0.0,
            rslora=bool(config.get("use_rslora")),
        )
        with torch.no_grad():
            lora.down.copy_(down)
            lora.up[0].copy_(up)
        adapters[path] = lora
    return inject(backbone.net, [targets[path] for path in adapters], lambda place: adapters[place.path], name)


def _config(backbone: Backbone, adapters: Mapping[str, LoRA], whole: Iterable[str]) -> dict[str, Any]:
    """The configuration from which PEFT rebuilds the adapters: the commonest rank and alpha, and the exceptions.

    Args:
        whole: paths of modules that are stored as a whole.
    """
    ranks = {path: len(lora.whole()[1]) for path, lora in adapters.items()}
    alphas = {path: _plain(lora.scale * ranks[path]) for path, lora in adapters.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": None if backbone.takes == "pictures" else "CAUSAL_LM",
        "base_model_name_or_path": _base(backbone),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        # PEFT reads these keys as regular expressions, and a match may begin anywhere in the path.
        "rank_pattern": {f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}": a for path, a in alphas.items() if a != alpha},
        "target_modules": _target_modules(backbone.net, list(adapters)),
        "lora_dropout": _commonest(lora.dropout for lora in adapters.values()),
        "bias": "none",
        # Whether weights have the shape `(d_in, d_out)`, as in GPT-2's Conv1D. A net with Conv1D has no other linear.
        "fan_in_fan_out": not any(isinstance(submodule(backbone.net, path), LinearLike) for path in adapters),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": list(whole) or None,
    }


def _base(backbone: Backbone) -> str | None:
    """The model that PEFT can open: the one in the recipe, or the one that a GGUF file was made from.

    None if a GGUF file does not say it; then a warning says which model to give.
    """
    spec = parts_of(backbone.spec.removeprefix(PAIR))["text"] if backbone.spec.startswith(PAIR) else backbone.spec
    base = anywhere(spec.removeprefix("hf:").removeprefix("folder:"))
    if not base.lower().endswith(".gguf"):
        return base
    origin = gguf_origin(base)
    if origin is None:
        warnings.warn(
            f"PEFT cannot open {Path(base).name}, and the file does not say which model it was made from: load that "
            "model with transformers and give it to `PeftModel.from_pretrained(model, FOLDER)`",
            stacklevel=2,
        )
    return origin


def _target_modules(net: nn.Module, paths: list[str]) -> list[str] | str:
    """The paths. PEFT compares the endings of paths; if it would match more modules, one regular expression instead."""
    others = {path for path, _ in walk(net)} - set(paths)
    if any(other.endswith(f".{path}") for other in others for path in paths):
        return "|".join(re.escape(path) for path in paths)
    return paths


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _plain(number: float) -> float:
    """A whole number as `int`, as PEFT writes `lora_alpha`."""
    return int(number) if float(number).is_integer() else number


def _adapter_folder(folder: Path, name: str) -> Path:
    for candidate in (folder, folder / name, folder / "default"):
        if (candidate / CONFIG).is_file():
            if (candidate / WEIGHTS).is_file():
                return candidate
            raise UsageError(f"{candidate} has no {WEIGHTS}; perpetune does not load adapters from pickle files")
    raise UsageError(f"{folder} has no PEFT adapter: expected a file {CONFIG} in it")


def _read_config(file: Path) -> dict[str, Any]:
    """The adapter's configuration; UsageError if it is not plain LoRA."""
    config = read_object(file, str(file))
    if (kind := config.get("peft_type")) != "LORA":
        raise UsageError(f"{file}: peft_type is {kind!r}; expected 'LORA'")
    if variant := sorted(key for key, value in config.items() if value and key not in UNDERSTOOD | SILENT):
        raise UsageError(f"{file}: perpetune reads plain LoRA only, and this file sets {', '.join(variant)}")
    if config.get("bias", "none") != "none":
        raise UsageError(f"{file}: bias {config['bias']!r} changes frozen biases; expected bias 'none'")
    if config.get("init_lora_weights", True) not in HARMLESS_STARTS:
        raise UsageError(
            f"{file}: init_lora_weights {config['init_lora_weights']!r} changes the frozen weights; "
            "convert it with PEFT's path_initial_model_for_weight_conversion first"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or not (config[key] > 0 and math.isfinite(config[key])):
            raise UsageError(f"{file}: {key} is {config.get(key)!r}; expected a number above 0")
    if not isinstance(config.get("target_modules"), str | list):
        raise UsageError(f"{file}: target_modules is {config.get('target_modules')!r}; expected names of modules")
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UsageError(f"{file}: lora_dropout is {dropout!r}; expected a number from 0 to below 1")
    for key in ("rank_pattern", "alpha_pattern"):
        values = config.get(key) or {}
        numbers = isinstance(values, dict) and all(isinstance(v, int | float) and v > 0 for v in values.values())
        if not numbers or not all(map(math.isfinite, values.values())):
            raise UsageError(f"{file}: {key} is {values!r}; expected numbers above 0 by name of a module")
        for pattern in values:
            _check_pattern(file, key, pattern)
    for key in ("target_modules", "exclude_modules"):
        names = config.get(key) or []
        if isinstance(names, str):
            _check_pattern(file, key, names)
        elif not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UsageError(f"{file}: {key} is {names!r}; expected names of modules, or one pattern")
    return dict(config)


REPEATS = 4
"""Unbounded repetitions, such as `.*`, that a pattern may have. Each multiplies the time by the length of a path."""


def _check_pattern(file: Path, key: str, pattern: str) -> None:
    """Raise UsageError if a regular expression of a stranger is none, or if its search may take for ever."""
    try:
        tree = sre.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"{file}: {key} is not a regular expression: {error}") from error

    def repeats(part: Any, inside: bool) -> int:
        """How many unbounded repetitions there are; one inside another counts as too many."""
        if isinstance(part, sre.SubPattern):
            return sum(repeats(item, inside) for item in part)
        if not isinstance(part, tuple | list):
            return 0
        if len(part) == 2 and str(part[0]) in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, inner = part[1]
            unbounded = int(most) > 100
            own = (REPEATS + 1 if inside else 1) if unbounded else 0
            return own + repeats(inner, inside or unbounded)
        return sum(repeats(item, inside) for item in part)

    if repeats(tree, False) > REPEATS:
        raise UsageError(f"{file}: {key} has too many repetitions (more than {REPEATS}, or one inside another)")


def _targets(net: nn.Module, config: Mapping[str, Any]) -> dict[str, Place]:
    """The whole linear layers that the configuration names, in the net's order."""
    wanted, unwanted = config["target_modules"], config.get("exclude_modules") or []
    places: dict[str, Place] = {}
    for path, module in walk(net):
        linear = widths(module) if path else None
        if linear is not None and _matches(wanted, path) and not _matches(unwanted, path):
            places[path] = Place(path, module, (), ((0, linear[1]),), -1, *linear)
    return places


def _matches(names: str | list[str], path: str) -> bool:
    """Whether `path` matches by PEFT's rule: a string is a regular expression for the whole path; a list has paths or
    endings of paths."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _pairs(folder: Path, tensors: Mapping[str, Tensor], targets: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """The matrices `A` and `B` of every target.

    Raises:
        StateError: a tensor is missing, or there is another one; the message names it.
    """
    names = {path: (f"{PREFIX}{path}{A}", f"{PREFIX}{path}{B}") for path in targets}
    expected = {name for pair in names.values() for name in pair}
    faults = {"missing": sorted(expected - tensors.keys()), "unexpected": sorted(tensors.keys() - expected)}
    if any(faults.values()):
        message = "; ".join(f"{fault}: {', '.join(listed[:6])}" for fault, listed in faults.items() if listed)
        raise StateError(f"{folder} does not fit this net; {message}")
    if not expected:
        raise StateError(f"{folder} does not fit this net: the net has none of its target_modules")
    return {path: (tensors[down], tensors[up]) for path, (down, up) in names.items()}


def _exceptions(config: Mapping[str, Any], pattern: str, default: str) -> Callable[[str], float]:
    """A function that gives the value for a path: of the first key of `pattern` that matches the path's end, else the
    default."""

    def of(path: str) -> float:
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", path):
                return float(value)
        return float(config[default])

    return of
