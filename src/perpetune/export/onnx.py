"""ONNX exports: backbone, pets, taps and head as one graph, from uint8 pixels to scores."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perpetune._version import __version__
from perpetune.data.pictures.view import PictureView
from perpetune.errors import MissingExtra, PerpetuneError, UsageError
from perpetune.export.checking import compared, need, pictures_for
from perpetune.export.head import image_of
from perpetune.methods.base import Method
from perpetune.models.backbone import Backbone
from perpetune.models.loaders.hub import one_line
from perpetune.tasks import Inputs

GRAPH = "model.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class _Scores(nn.Module):
    def __init__(self, method: Method):
        super().__init__()
        self.method = method

    def forward(self, pixels: Tensor) -> Tensor:
        return self.method.predict(Inputs(pixels=pixels))


def write_onnx(method: Method, backbone: Backbone, folder: Path, pictures: Tensor | None) -> list[str]:
    """Write `model.onnx`: the prediction of the method as one graph, and check it with ONNX Runtime.

    Its input `pixels` is uint8 `(batch, 3, S, S)`, RGB, for any batch; the graph normalises them. Its output `scores`
    is float32 `(batch, classes)`. The metadata have `classes`, a list in the order of the columns, and `image`, how a
    picture becomes pixels (both JSON), and `perpetune`, the version.

    Returns:
        Sentences for the model card.

    Raises:
        UsageError: the model takes no pictures, another computation answers for each example, or a part of the model
            cannot be written as a graph.
        MissingExtra: the packages for ONNX are not installed.
        PerpetuneError: the graph does not answer as the method does.
    """
    view = backbone.preprocess
    if not isinstance(view, PictureView):
        raise UsageError(
            f"--to onnx: {backbone.spec} takes {backbone.takes}, and the graph is for pictures: use --to merged or peft"
        )
    if not method.one_graph:
        raise UsageError(
            f"--to onnx: {type(method).__name__} answers with other sets of pets for other examples, or with several "
            "values of one, which one graph cannot hold: use the state itself"
        )
    if not all(map(find_spec, PACKAGES)):
        raise MissingExtra("--to onnx", "onnx")
    file, some = folder / GRAPH, pictures_for(view, None) if pictures is None else pictures
    metadata = {
        "classes": json.dumps(method.classes, ensure_ascii=False),
        "image": json.dumps(image_of(view)),
        "perpetune": __version__,
    }
    _write(method, view.size, file, metadata)
    return [need(compared(method, some, _runtime(file)), f"the graph of {backbone.spec}")]


def _write(method: Method, size: int, file: Path, metadata: dict[str, str]) -> None:
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)  # one alone would fix the size of the batch
    scores = _Scores(method).eval()
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(scores, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            written: Any = torch.onnx.export(program, dynamo=True, input_names=["pixels"], output_names=["scores"])
            written.model.metadata_props.update(metadata)
            written.save(file)
    except OSError:
        raise
    except Exception as error:
        raise UsageError(
            f"--to onnx: the model cannot be written as a graph ({one_line(error)[:300]}): use --to merged or peft"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters talk to developers of exporters: on standard output, by warnings and by logs."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _runtime(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise PerpetuneError(f"--to onnx: ONNX Runtime cannot open the graph: {one_line(error)[:300]}") from error
    return lambda pixels: session.run(["scores"], {"pixels": pixels.numpy()})[0]
