"""LoRA adapters in the format of the PEFT library: `adapter_config.json` and `adapter_model.safetensors`.

The format as PEFT 0.21 writes it: `A` and `B` of the linear at PATH are called
`base_model.model.PATH.lora_A.weight` and `base_model.model.PATH.lora_B.weight`, and the update is
`lora_alpha / r * B A`, with exceptions from `r` and `lora_alpha` in `rank_pattern` and `alpha_pattern`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perpetune.errors import StateError, UsageError
from perpetune.heads.base import Head
from perpetune.methods.base import Method
from perpetune.models.backbone import Backbone
from perpetune.models.families import LinearLike, widths
from perpetune.pets.base import PET, Place, inject, pets, slots, submodule, walk
from perpetune.pets.lora import LoRA

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"

# Keys of an adapter_config.json that are understood, or say nothing about the function; any other key
# that is set to something belongs to a variant of LoRA that is not.
UNDERSTOOD = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "target_modules"}
UNDERSTOOD |= {"exclude_modules", "peft_type", "bias", "init_lora_weights", "base_model_name_or_path"}
SILENT = {"auto_mapping", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_version", "qalora_group_size"}
SILENT |= {"revision", "runtime_config", "task_type"}

# Initialisations that leave the frozen weights alone; the others (PiSSA, OLoRA, …) change them.
HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def write_peft(backbone: Backbone, name: str, folder: Path) -> None:
    """Write the set `name` of LoRA adapters as one PEFT folder, which `PeftModel.from_pretrained` loads
    onto the same net.

    An adapter on parts of a fused qkv becomes one of rank `P r` on the whole linear, with `B` zero
    outside the parts' blocks; what rests of earlier tasks is a part of it too. The folder is written aside and renamed.

    PEFT itself can do nothing on a fused qkv of timm's BEiT or EVA as they come: they read its weight
    without calling it. Set `qkv_bias_separate = True` on their attention first, as `Backbone` does.

    Raises:
        UsageError: no such set, pets in it that are not LoRA, or a folder with something in it.
    """
    if foreign := sorted({type(pet).__name__ for pet in pets(backbone.net, name) if not isinstance(pet, LoRA)}):
        raise UsageError(f"only LoRA has a place in PEFT's format; the set {name!r} holds {', '.join(foreign)}")
    wrapped = {path: slot.pet(name) for path, slot in slots(backbone.net) if name in slot.pets}
    adapters = {path: pet for path, pet in wrapped.items() if isinstance(pet, LoRA)}
    tensors: dict[str, Tensor] = {}
    for path, lora in adapters.items():
        up, down = lora.whole()
        tensors[f"{PREFIX}{path}{A}"] = down.detach().cpu().contiguous()
        tensors[f"{PREFIX}{path}{B}"] = up.detach().cpu().contiguous()
    with _aside(folder) as aside:
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        config = json.dumps(_config(backbone, adapters), indent=2, sort_keys=True, allow_nan=False)
        (aside / CONFIG).write_text(f"{config}\n")


@contextlib.contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes `folder` when all in it is written, and goes where that fails.

    Raises:
        UsageError: there is something at `folder`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not empty; name a new folder")
    aside = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    aside.mkdir(parents=True)
    try:
        yield aside
        if folder.is_dir():
            folder.rmdir()  # Windows replaces no folder, not even an empty one
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def read_peft(backbone: Backbone, folder: Path, name: str) -> list[PET]:
    """Inject the LoRA adapters of a PEFT folder as the set `name`.

    Args:
        folder: holds the two files, or PEFT's sub-folder for one named adapter: `name`, or `default`.

    Returns:
        The new PETs, each on the whole of its linear layer.

    Raises:
        UsageError: no adapter there, or a variant of LoRA that is not understood.
        StateError: tensors that are missing, unexpected or of the wrong shape, named.
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
                raise StateError(f"{folder}: {path}: a LoRA matrix is {tuple(matrix.shape)}; {shape} is expected")
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


def _config(backbone: Backbone, adapters: Mapping[str, LoRA]) -> dict[str, Any]:
    """What PEFT needs to rebuild the adapters: the commonest rank and scale, and the exceptions."""
    ranks = {path: len(lora.whole()[1]) for path, lora in adapters.items()}
    alphas = {path: _plain(lora.scale * ranks[path]) for path, lora in adapters.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if backbone.takes == "texts" else None,
        "base_model_name_or_path": backbone.spec.removeprefix("hf:").removeprefix("folder:"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        # PEFT reads the keys of a pattern as regular expressions that may begin anywhere in the path.
        "rank_pattern": {f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}": a for path, a in alphas.items() if a != alpha},
        "target_modules": _target_modules(backbone.net, list(adapters)),
        "lora_dropout": _commonest(lora.dropout for lora in adapters.values()),
        "bias": "none",
        # Whether weights are `(d_in, d_out)`: those of GPT-2's Conv1D, which no other linear stands beside.
        "fan_in_fan_out": not any(isinstance(submodule(backbone.net, path), LinearLike) for path in adapters),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _target_modules(net: nn.Module, paths: list[str]) -> list[str] | str:
    """The paths; as one regular expression where PEFT, which compares endings, would find more modules by them."""
    others = {path for path, _ in walk(net)} - set(paths)
    if any(other.endswith(f".{path}") for other in others for path in paths):
        return "|".join(re.escape(path) for path in paths)
    return paths


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _plain(number: float) -> float:
    """An integer as such, the way PEFT writes `lora_alpha`."""
    return int(number) if float(number).is_integer() else number


def _adapter_folder(folder: Path, name: str) -> Path:
    for candidate in (folder, folder / name, folder / "default"):
        if (candidate / CONFIG).is_file():
            if (candidate / WEIGHTS).is_file():
                return candidate
            raise UsageError(f"{candidate} has no {WEIGHTS}; adapters as pickle are not loaded")
    raise UsageError(f"{folder} holds no PEFT adapter: {CONFIG} is expected in it")


def _read_config(file: Path) -> dict[str, Any]:
    """The adapter's configuration, checked to be of plain LoRA."""
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UsageError(f"{file} is no JSON: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if kind != "LORA":
        raise UsageError(f"{file}: peft_type 'LORA' is expected, not {kind!r}")
    if variant := sorted(key for key, value in config.items() if value and key not in UNDERSTOOD | SILENT):
        raise UsageError(f"{file}: only plain LoRA is read, and this sets {', '.join(variant)}")
    if config.get("bias", "none") != "none":
        raise UsageError(f"{file}: bias {config['bias']!r} changes frozen biases; bias 'none' is expected")
    if config.get("init_lora_weights", True) not in HARMLESS_STARTS:
        raise UsageError(
            f"{file}: init_lora_weights {config['init_lora_weights']!r} changes the frozen weights; "
            "convert it with PEFT's path_initial_model_for_weight_conversion first"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or not (config[key] > 0 and math.isfinite(config[key])):
            raise UsageError(f"{file}: {key} is {config.get(key)!r}; a number above 0 is expected")
    if not isinstance(config.get("target_modules"), str | list):
        raise UsageError(f"{file}: target_modules is {config.get('target_modules')!r}; names are expected")
    return dict(config)


def _targets(net: nn.Module, config: Mapping[str, Any]) -> dict[str, Place]:
    """The linear layers that the configuration asks for, whole, in the order of the net."""
    wanted, unwanted = config["target_modules"], config.get("exclude_modules") or []
    found: dict[str, Place] = {}
    for path, module in walk(net):
        linear = widths(module) if path else None
        if linear is not None and _matches(wanted, path) and not _matches(unwanted, path):
            found[path] = Place(path, module, (), ((0, linear[1]),), -1, *linear)
    return found


def _matches(names: str | list[str], path: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds paths or their endings."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _pairs(folder: Path, tensors: Mapping[str, Tensor], targets: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """`A` and `B` of every target, strictly.

    Raises:
        StateError: names the tensors that are missing or unexpected.
    """
    names = {path: (f"{PREFIX}{path}{A}", f"{PREFIX}{path}{B}") for path in targets}
    expected = {name for pair in names.values() for name in pair}
    faults = {"missing": sorted(expected - tensors.keys()), "unexpected": sorted(tensors.keys() - expected)}
    if any(faults.values()):
        said = "; ".join(f"{what}: {', '.join(found[:6])}" for what, found in faults.items() if found)
        raise StateError(f"{folder} does not fit this net; {said}")
    if not expected:
        raise StateError(f"{folder} does not fit this net: none of its target_modules is in it")
    return {path: (tensors[down], tensors[up]) for path, (down, up) in names.items()}


def _exceptions(config: Mapping[str, Any], pattern: str, default: str) -> Callable[[str], float]:
    """The value for a path: that of the first key of `pattern` which matches its end, else the default."""

    def of(path: str) -> float:
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", path):
                return float(value)
        return float(config[default])

    return of


def export_learned(method: Method, backbone: Backbone, folder: Path) -> list[Path]:
    """Write what a method has learned for use elsewhere: its LoRA in PEFT's format, and the head.

    Beside PEFT's two files stand `head.safetensors` and `head.json` with the head's kind and the class names in
    the order of its rows; a language model answers by its own output layer and has neither. A method that keeps
    several adapters which can be used by themselves gets a folder for each. All is written aside and renamed.

    Returns:
        The files written.

    Raises:
        UsageError: the pets are not LoRA or several sets, or there is something at `folder`.
    """
    sets = method.exported()
    with _aside(folder) as aside:
        for name, own in sets.items():
            with method.acting(own):
                _export_set(method, backbone, own, aside / name)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _export_set(method: Method, backbone: Backbone, name: str, folder: Path) -> None:
    write_peft(backbone, name, folder)
    head = next((m for m in method.model.modules() if isinstance(m, Head)), None)
    if head is not None:
        tensors = {n: t.detach().cpu().contiguous() for n, t in head.needed().items()}
        save_file(tensors, folder / "head.safetensors", metadata={"format": "pt"})
        about: dict[str, Any] = {"head": type(head).__name__, "classes": head.classes}
        if (taps := backbone.taps) is not None:  # what its features are read at
            about |= {"taps": taps.count, "tokens": taps.kinds}
        (folder / "head.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
