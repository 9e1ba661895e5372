"""Write a learned model for other programs, in one of several forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from safetensors.torch import save_file
from torch import Tensor

from perpetune.aside import written_aside
from perpetune.errors import UsageError
from perpetune.export.card import CARD
from perpetune.export.head import write_head
from perpetune.export.merged import write_merged
from perpetune.export.onnx import write_onnx
from perpetune.export.peft import PAIR, write_peft
from perpetune.methods.base import Method
from perpetune.models.backbone import Backbone
from perpetune.models.vision_language import VisionLanguage

Form = Literal["peft", "merged", "onnx"]
"""`peft`: the adapter, for the base model that another program has. `merged`: a whole model, with the adapter in its
weights. `onnx`: one graph from pixels to scores."""
FORMS: tuple[str, ...] = get_args(Form)
PROJECTOR = "projector.safetensors"


def export_learned(
    method: Method,
    backbone: Backbone,
    folder: Path,
    state: Path | None = None,
    *,
    to: str = "peft",
    pictures: Tensor | None = None,
    card: Callable[[str, list[str]], str] | None = None,
) -> list[Path]:
    """Write a learned model for use in other programs.

    Everything is written under another name first and then renamed. docs/export.md describes the files of each form.

    `peft`: beside PEFT's two files, the folder has `head.safetensors`, the head as one linear map, and `head.json` with
    the class names in the order of its rows, and how features are read. A projector that was trained is among PEFT's
    `modules_to_save`; that of a pair, or one alone, lies in `projector.safetensors`. Without pets (`pet: none`) there
    are no files of PEFT. A packaged model lies in the folder `base`. A language model that answers with its own output
    layer has no files of a head. If a method keeps several adapters and each can be used alone, each gets its own
    folder, and `selector.safetensors` with `selector.json` holds what chooses among them.

    `merged`: see `merged.write_merged`. `onnx`: see `onnx.write_onnx`.

    Args:
        state: the state folder that is exported; it remembers what is written, so that its next verb clears what a kill
            leaves.
        to: the form, one of `FORMS`.
        pictures: uint8 `(N, 3, S, S)`, with which what was written is checked; only for pictures, and not for `peft`.
        card: makes the model card, from the form and from sentences about what was written; None writes no card.

    Returns:
        The paths of the written files.

    Raises:
        UsageError: the model cannot have this form, or `folder` is not empty. The message names a form that works.
        PerpetuneError: what was written does not answer as the method does.
    """
    if to not in FORMS:
        raise UsageError(f"--to {to}: one of {', '.join(FORMS)} is expected")
    with written_aside(folder, state) as aside:
        said = _WRITERS[to](method, backbone, aside, pictures)
        if card is not None:
            (aside / CARD).write_text(card(to, said), encoding="utf-8")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _peft(method: Method, backbone: Backbone, folder: Path, pictures: Tensor | None) -> list[str]:
    if pictures is not None:
        raise UsageError("--images checks merged weights and graphs: leave it out for --to peft")
    sets = method.exported()
    for name, set_name in sets.items():
        with method.acting(set_name):
            _export_set(method, backbone, set_name, folder / name)
    if (selector := method.exported_selector()) is not None:
        tensors, about = selector
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, folder / "selector.safetensors", metadata={"format": "pt"})
        text = json.dumps({**about, "folders": list(sets)}, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / "selector.json").write_text(f"{text}\n", encoding="utf-8")
    return []


def _export_set(method: Method, backbone: Backbone, name: str | None, folder: Path) -> None:
    model, side = method.model, backbone.pictures
    projector = model.projector if isinstance(model, VisionLanguage) else None
    path = side.projector if side is not None and projector is not None else None
    # PEFT opens the language part of a pair, which has no projector: there it is the file that `pair:` takes
    beside = path is not None and (name is None or backbone.spec.startswith(PAIR))
    if name is not None:
        whole = {path: projector} if path is not None and projector is not None and not beside else {}
        write_peft(backbone, name, folder, whole)
    folder.mkdir(exist_ok=True)
    if beside and projector is not None:
        stored = {key: tensor.detach().cpu().contiguous() for key, tensor in projector.state_dict().items()}
        save_file(stored, folder / PROJECTOR, metadata={"format": "pt"})
    write_head(method, backbone, folder, adapter=name is not None)


_WRITERS: dict[str, Callable[[Method, Backbone, Path, Tensor | None], list[str]]] = {
    "peft": _peft,
    "merged": write_merged,
    "onnx": write_onnx,
}
