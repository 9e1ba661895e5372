"""Merged exports: a whole model in its library's own layout, with the trained pets in its weights."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.data.pictures.view import PictureView
from perpetune.data.texts.view import TextView
from perpetune.errors import PerpetuneError, UsageError
from perpetune.export.checking import compared, need, pictures_for
from perpetune.export.head import head_in, image_of, write_head
from perpetune.heads.base import Folded
from perpetune.methods.base import Method
from perpetune.models.backbone import Backbone
from perpetune.models.loaders.checkpoint import quiet
from perpetune.models.loaders.hub import one_line
from perpetune.models.loaders.plain import of_library
from perpetune.models.plain_vit import PlainDinov2, PlainViT
from perpetune.pets import folding
from perpetune.seeding import generator, own_global_state
from perpetune.tasks import Inputs

SAME = 1e-4
"""The largest difference of features that are the same."""
PROBE = "The quick brown fox jumps over the lazy dog. 0 1 2 3 4 5 6 7 8 9"


def write_merged(method: Method, backbone: Backbone, folder: Path, pictures: Tensor | None) -> list[str]:
    """Write the whole model, with the one set of pets that answers in its weights.

    A model of transformers becomes a folder that `from_pretrained` opens; one of timm becomes a folder that
    `timm.create_model("local-dir:FOLDER")` opens. The head lies beside it in `head.json` and `head.safetensors`. Where
    the head is a linear map of the feature that the library's own classifier reads, that classifier holds it too, and
    it is checked with pictures.

    Returns:
        Sentences for the model card.

    Raises:
        UsageError: the method answers with several sets, the pets cannot be part of the weights, or no library opens
            the model.
        PerpetuneError: what was written does not answer as the method does.
    """
    sets, library = method.exported(), backbone.opens.get("library")
    if list(sets) != [""]:
        raise UsageError(
            f"--to merged: {type(method).__name__} answers with one of {len(sets)} sets for each example, and merged "
            "weights hold one: use --to peft, which writes a folder for each"
        )
    if library not in ("transformers", "timm") or backbone.pictures is not None or backbone.texts is not None:
        raise UsageError(
            f"--to merged: no class of transformers or timm opens {backbone.spec} as it is here: use --to peft"
        )
    head = head_in(method)
    if head is not None and head.dim == 2 * backbone.dim:
        raise UsageError(
            "--to merged: the head reads features of the frozen model beside the tuned ones, and merged weights give "
            "the tuned ones alone: use --to peft or --to onnx"
        )
    (name,) = sets.values()
    classifier = None if head is None or backbone.takes != "pictures" else _affine(head.folded())
    with method.acting(name):
        layout = None if classifier is None else _columns(backbone)
    with _folded(backbone, name):
        if library == "timm":
            holds = _timm(backbone, folder, method.classes, classifier, layout)
        elif backbone.takes == "pictures":
            holds = _vision(backbone, folder, method.classes, classifier, layout)
        else:
            _language(backbone, folder)
            holds = False
    write_head(method, backbone, folder, adapter=False, own=True)
    if head is None:
        return [_same_words(method, backbone, folder, name)]
    if not holds:
        return ["The classifier is in `head.safetensors`; docs/export.md of perpetune has the code that reads it."]
    view = backbone.preprocess
    assert isinstance(view, PictureView)
    some = pictures_for(view, None) if pictures is None else pictures
    read = _read_timm if library == "timm" else _read_vision
    net = read(folder, backbone.opens.get("call", {}))

    def theirs(batch: Tensor) -> Any:
        return net(backbone.normalised(batch))

    return [need(compared(method, some, theirs, shift=True), f"the merged model of {backbone.spec}")]


@contextlib.contextmanager
def _folded(backbone: Backbone, name: str | None) -> Iterator[None]:
    try:
        with folding(backbone.net, name) if name is not None else contextlib.nullcontext():
            yield
    except UsageError as error:
        if "cannot be folded" not in str(error):
            raise
        also = "use --to onnx" if backbone.takes == "pictures" else "use the state itself"
        raise UsageError(f"--to merged: {error}: {also}") from error


def _affine(folded: Folded | None) -> tuple[Tensor, Tensor] | None:
    """Weight `(C, D)` and bias `(C,)` in float32 of a head that is a linear map of the feature; else None."""
    if folded is None or folded.normalise or folded.projected is not None:
        return None
    return folded.weight.detach().float().cpu().contiguous(), folded.bias.detach().float().cpu()


@torch.no_grad()
def _columns(backbone: Backbone) -> str | None:
    """What the features are: the net's `own`, or its class token and the mean of its patches (`class mean`), or None
    for others. Called with the pets in force that answer."""
    taps = backbone.taps
    if taps is None:
        return "own"
    inputs = backbone.empty()
    if taps.count != 1 or inputs is None:
        return None
    pixels = torch.randint(0, 256, inputs.pixels.shape, generator=generator("export"), dtype=torch.uint8)
    read = backbone.features(Inputs(pixels=pixels.to(inputs.pixels.device)))
    own = backbone(backbone.normalised(pixels.to(inputs.pixels.device)))
    if taps.kinds == ["class", "mean"]:
        return "class mean" if torch.allclose(read[:, : own.shape[1]], own, atol=SAME) else None
    return "own" if read.shape == own.shape and torch.allclose(read, own, atol=SAME) else None


def _rows(classifier: tuple[Tensor, Tensor], layout: str | None, width: int) -> tuple[Tensor, Tensor] | None:
    """Weight and bias for a classifier that reads `width` columns: the class token alone, or before the mean of the
    patches. None if it cannot hold the head."""
    weight, bias = classifier
    if layout == "own" and width == 2 * weight.shape[1]:
        weight = nn.functional.pad(weight, (0, weight.shape[1]))
    if layout is None or weight.shape[1] != width:
        return None
    return weight, bias


# -- transformers -------------------------------------------------------------------------------------------


def _vision(
    backbone: Backbone, folder: Path, classes: list[str], classifier: tuple[Tensor, Tensor] | None, layout: str | None
) -> bool:
    """Write a vision transformer; whether its classifier holds the head."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    plain = isinstance(backbone.net, PlainViT | PlainDinov2)
    config: Any = AutoConfig.from_pretrained(backbone.opens["base"]) if plain else copy.deepcopy(backbone.net.config)
    tensors = backbone.net.state_dict()
    net: Any = None
    if classifier is not None and classes:
        config.num_labels = len(classes)
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: number for number, name in enumerate(classes)}
        config.problem_type = "single_label_classification"
        with quiet(), own_global_state("export"), contextlib.suppress(ValueError):  # a family without classifiers
            net = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    rows = None
    if net is not None and isinstance(getattr(net, "classifier", None), nn.Linear) and classifier is not None:
        rows = _rows(classifier, layout, net.classifier.in_features)
    if rows is None or net is None:
        extra = {key: value for key, value in backbone.opens["options"].items() if key != "dtype"}
        with quiet(), own_global_state("export"):
            net = AutoModel.from_config(config, dtype=torch.float32, **extra) if plain else backbone.net
    else:
        with torch.no_grad():
            net.classifier.weight.copy_(rows[0])
            net.classifier.bias.copy_(rows[1])
    if net is not backbone.net:
        _load(net.base_model, tensors, backbone.spec)
    with quiet():
        net.save_pretrained(folder)
    _write_preprocessor(backbone, folder)
    return rows is not None


def _load(net: nn.Module, tensors: dict[str, Tensor], spec: str) -> None:
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise _foreign(spec, error) from error


def _foreign(spec: str, error: Exception) -> UsageError:
    return UsageError(
        f"--to merged: the weights of {spec} with the pets in them are not those of its class ({one_line(error)}): "
        "use --to peft or --to onnx"
    )


def _write_preprocessor(backbone: Backbone, folder: Path) -> None:
    """`preprocessor_config.json` for what the view does with a picture."""
    view = backbone.preprocess
    assert isinstance(view, PictureView)
    about = image_of(view)
    size, crop, squeeze = about["size"], about["crop"], about["squeeze"]
    whole = round(size / crop)
    sizes: dict[str, Any] = {"size": {"height": size, "width": size}, "do_center_crop": False}
    kind = "ViTImageProcessor"
    if crop < 1 or not squeeze:
        kind = "BitImageProcessor"  # that of ViT has no crop
        resized = {"height": whole, "width": whole} if squeeze else {"shortest_edge": whole}
        sizes = {"size": resized, "do_center_crop": True, "crop_size": {"height": size, "width": size}}
    written = {
        "image_processor_type": kind,
        "do_resize": True,
        **sizes,
        "resample": about["resample"],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(view.mean),
        "image_std": list(view.std),
    }
    (folder / "preprocessor_config.json").write_text(f"{json.dumps(written, indent=2)}\n", encoding="utf-8")


def _read_vision(folder: Path, call: dict[str, Any]) -> Any:
    from transformers import AutoModelForImageClassification

    with quiet():
        net = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return lambda pixels: net(pixel_values=pixels, **call).logits


def _language(backbone: Backbone, folder: Path) -> None:
    from transformers import GenerationConfig

    net: Any = backbone.net
    view, opens = backbone.preprocess, backbone.opens
    assert isinstance(view, TextView)
    own = net.generation_config
    try:
        with contextlib.suppress(OSError, ValueError):  # the base model has no file of its own settings
            net.generation_config = GenerationConfig.from_pretrained(str(opens["base"]))
        with quiet():
            net.save_pretrained(folder)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise UsageError(
            f"--to merged: transformers cannot write {backbone.spec} ({one_line(error)}): use --to peft"
        ) from error
    finally:
        net.generation_config = own
    view.tokenizer.save_pretrained(folder)


@torch.no_grad()
def _same_words(method: Method, backbone: Backbone, folder: Path, name: str | None) -> str:
    """A sentence on how the logits of the written language model differ from those of the state, on a short text."""
    from transformers import AutoModelForCausalLM

    view, net = backbone.preprocess, backbone.net
    assert isinstance(view, TextView)
    ids = torch.tensor([view.tokenizer(PROBE)["input_ids"][:64]])
    with method.acting(name):
        ours = net(input_ids=ids).logits.float()
    with quiet():
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=next(net.parameters()).dtype).eval()
    theirs = again(input_ids=ids).logits.float()
    gap = float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max())
    exact = next(net.parameters()).dtype == torch.float32
    if not gap <= (1e-2 if exact else float("inf")):
        raise PerpetuneError(
            f"the merged model of {backbone.spec} does not answer as the state does, so it is not kept: its "
            f"log-probabilities differ by up to {gap:.2g}"
        )
    rounded = "" if exact else " The weights have 16 bits, so the sum of weight and adapter is rounded."
    return f"On a probe text the largest difference of a log-probability from the state is {gap:.2g}.{rounded}"


# -- timm ---------------------------------------------------------------------------------------------------


def _timm(
    backbone: Backbone, folder: Path, classes: list[str], classifier: tuple[Tensor, Tensor] | None, layout: str | None
) -> bool:
    """Write a model of timm; whether its classifier holds the head."""
    from timm.models import save_for_hf

    net: Any = of_library(backbone)
    rows = None
    try:
        if classifier is not None and classes:
            with own_global_state("export"):
                net.reset_classifier(len(classes))
            last = net.get_classifier()
            rows = _rows(classifier, layout, last.in_features) if type(last) is nn.Linear else None
            if rows is not None:
                last.weight, last.bias = (nn.Parameter(values, requires_grad=False) for values in rows)
            else:
                net.reset_classifier(0)
        size = int(getattr(backbone.preprocess, "size"))  # noqa: B009
        changed: dict[str, Any] = {"input_size": [3, size, size]}
        given = {key: backbone.opens["options"][key] for key in ("img_size",) if key in backbone.opens["options"]}
        try:
            save_for_hf(
                net,
                str(folder),
                model_config={"pretrained_cfg": changed, **({} if rows is None else {"label_names": classes})},
                model_args=given or None,
                safe_serialization=True,
            )
        except (RuntimeError, ValueError) as error:
            raise _foreign(backbone.spec, error) from error
    finally:
        net.reset_classifier(0)
    return rows is not None


def _read_timm(folder: Path, call: dict[str, Any]) -> Any:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
