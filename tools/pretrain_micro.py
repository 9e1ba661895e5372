"""Make the weights of a small vision transformer, such as the packaged `perpetune:micro`.

A maintainer's tool. The student learns the labels of any pictures and, where a teacher is named, to
point where the teacher's features point:

    loss = label_weight · CE(W f, y; smoothing) + teacher_weight · (1 − cos(P f, z))

with f (B, D) the class token's feature, W (D, C) and P (D, E) linear maps that are thrown away, and
z (B, E) the teacher's pooled features of the whole picture, standardised over the training pictures.
They are computed once; the student sees random crops and flips.

Writes a transformers folder: config.json, preprocessor_config.json, model.safetensors (float16) and a
README.md card with the measured figures. For example:

    python tools/pretrain_micro.py --data train.parquet --out micro --teacher efficientnet_lite0.ra_in1k
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
import typer
from pydantic import ValidationError
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from command import command
from micro_features import Encoder, Pictures, measure
from perpetune import registry
from perpetune._version import __version__
from perpetune.data.guess import guess_source
from perpetune.data.pictures.resize import Interpolation
from perpetune.data.pictures.tables import PictureTable
from perpetune.data.pictures.view import PictureView
from perpetune.data.sources import Source
from perpetune.errors import MissingExtra, UsageError
from perpetune.files import read_folder, remove_folder, to_json, write_folder
from perpetune.fit import FitConfig, fit
from perpetune.runtime import Runtime, Silent, pick_device
from perpetune.seeding import generator, own_global_state
from perpetune.snapshot import read_tensors, restore_optimizer, snapshot_optimizer
from perpetune.tasks import Batch, Task

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import ViTModel


def make_student(image_size: int, patch: int, width: int, depth: int, heads: int, seed: int) -> ViTModel:
    """A `transformers.ViTModel` with random weights and without dropout, MLP of four times the width."""
    from transformers import ViTConfig, ViTModel

    if image_size % patch or width % heads:
        raise UsageError(
            f"--image-size {image_size} must be a multiple of --patch {patch}, and --width {width} of --heads {heads}"
        )
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-6,
    )
    with own_global_state(seed, "pretrain", "student"):
        return ViTModel(config, add_pooling_layer=False)


def make_teacher(name: str, size: int | None, pretrained: bool, seed: int) -> Encoder:
    """The timm model `name` without its classifier.

    Args:
        size: side of its input, None for the one it was trained at; another one suits convolutional
            networks only.
        pretrained: False gives random weights, for tests.
    """
    try:
        import timm
        from timm.data import config as timm_config
    except ImportError as error:
        raise MissingExtra("--teacher", "timm") from error
    if not timm.is_model(name):
        raise UsageError(f"--teacher {name}: not a model of timm; python -c 'import timm; print(timm.list_models())'")
    with own_global_state(seed, "pretrain", "teacher"):
        network = timm.create_model(name, pretrained=pretrained, num_classes=0)
    fed = timm_config.resolve_model_data_config(network)
    interpolation: Interpolation = fed["interpolation"]
    return Encoder(network, PictureView(size or fed["input_size"][-1], fed["mean"], fed["std"], interpolation))


def teacher_features(teacher: Encoder, pictures: Pictures, runtime: Runtime) -> Tensor:
    """float16 `(N, E)`: pooled features, each dimension standardised over `pictures`."""
    whole = Pictures(pictures.table, pictures.rows, teacher.preprocess)
    features = teacher.to(runtime.device).features(whole, runtime)
    return ((features - features.mean(0)) / features.std(0).clamp_min(1e-6)).half()


def read_table(path: Path) -> PictureTable:
    """The training pictures of a folder of class folders, a parquet file, or whatever else a recipe takes."""
    if not path.exists():
        raise UsageError(f"--data {path}: no such file or folder")
    name, options = guess_source(str(path), registry.every("data"))
    source: Source = registry.find("data", name)(**options)
    table = source.train()
    if not isinstance(table, PictureTable):
        raise UsageError(f"--data {path}: pictures are expected, and these are {table.gives}")
    for warning in table.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if len(set(table.labels)) < 2:
        raise UsageError(f"--data {path}: pictures of one class only; needs two or more")
    return table


def split(table: PictureTable, share: float, preprocess: PictureView, seed: int) -> tuple[Pictures, Pictures]:
    """`table` cut at random into training pictures and the `share` of it that is held out."""
    order = torch.randperm(len(table), generator=generator(seed, "pretrain", "split")).tolist()
    cut = min(len(order) - 1, max(1, round(share * len(order))))
    return Pictures(table, sorted(order[cut:]), preprocess), Pictures(table, sorted(order[:cut]), preprocess)


class Lines(Silent):
    """A `Progress` that prints a line every `every` steps."""

    def __init__(self, every: int):
        self.every = every
        self.images = 0
        self.total = 0
        self.start = time.perf_counter()

    def phase(self, phase: str, steps: int, epochs: int, done: int) -> None:
        self.total = steps
        self.start = time.perf_counter()

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        self.images += images
        if loss is not None and (done % self.every == 0 or done == self.total):
            rate = self.images / (time.perf_counter() - self.start)
            print(f"step {done} of {self.total}, epoch {epoch + 1}: loss {loss:.4f}, {rate:.0f} images/s", flush=True)


class Checkpoint:
    """A `perpetune.runtime.Checkpoints` of one phase: the folder `path`, gone when the phase is complete."""

    def __init__(self, path: Path, modules: nn.Module, every: int):
        self.path, self.modules, self.every = path, modules, every
        self.seconds, self.images, self.tokens = 0.0, 0, 0  # of the time before this process
        self.start = time.perf_counter()

    def begin(self, phase: str, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> int | None:
        self.optimizer = optimizer
        if not self.path.exists():
            return 0
        files = read_folder(self.path)
        self.modules.load_state_dict(read_tensors(files, "modules.safetensors", str(self.path)))
        restore_optimizer(optimizer, files, str(self.path))
        position = json.loads(files["position.json"])
        self.seconds = float(position["seconds"])
        return int(position["done"])

    def step(self, done: int, total: int, images: int, tokens: int, *, force: bool) -> None:
        if force or done % self.every == 0:
            modules = to_safetensors({name: t.cpu().contiguous() for name, t in self.modules.state_dict().items()})
            position = to_json({"done": done, "seconds": self.seconds + time.perf_counter() - self.start})
            files = {"modules.safetensors": modules, "position.json": position, **snapshot_optimizer(self.optimizer)}
            remove_folder(self.path)
            write_folder(self.path, files)

    def finish(self) -> None:
        remove_folder(self.path)


@dataclass(frozen=True)
class LossWeights:
    """The terms of the loss at the top of this file."""

    label: float = 0.5
    teacher: float = 4.0
    smoothing: float = 0.1


def train(
    student: Encoder,
    classify: nn.Linear,
    pictures: Pictures,
    teacher: Tensor | None,
    weights: LossWeights,
    config: FitConfig,
    runtime: Runtime,
    checkpoint: tuple[Path, int] | None = None,
) -> float:
    """Train `student` and `classify` in place, towards the labels and the teacher's z `(N, E)`.

    With a `checkpoint` (folder, steps between two) it goes on from there if something is there.

    Returns:
        The seconds it took, those before the checkpoint included.
    """
    start = time.perf_counter()
    labels = pictures.labels.to(runtime.device)
    heads = nn.ModuleList([classify])
    if teacher is not None:
        teacher = teacher.to(runtime.device)
        with own_global_state(runtime.seed, "pretrain", "project"):
            heads.append(nn.Linear(classify.in_features, teacher.shape[1]))
    student.to(runtime.device).train()
    heads.to(runtime.device)

    def loss(_: Task, batch: Batch) -> Tensor:
        features = student(batch.inputs.pixels)
        scores = classify(features)
        total = weights.label * F.cross_entropy(scores, labels[batch.targets], label_smoothing=weights.smoothing)
        if teacher is not None:
            cosine = F.cosine_similarity(heads[1](features), teacher[batch.targets].float())
            total = total + weights.teacher * (1 - cosine).mean()
        return total

    if checkpoint is not None:
        runtime.checkpoints = Checkpoint(checkpoint[0], nn.ModuleList([student, heads]), checkpoint[1])
    task = Task(0, "pretrain", tuple(pictures.classes), pictures, runtime=runtime)
    fit(loss, [*student.parameters(), *heads.parameters()], task, config)
    before = runtime.checkpoints.seconds if runtime.checkpoints else 0.0
    return before + time.perf_counter() - start


def save(network: ViTModel, preprocess: PictureView, out: Path) -> None:
    """Write config.json, model.safetensors in float16 (`network` is cast in place) and preprocessor_config.json."""
    network.cpu().half().save_pretrained(out)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": preprocess.size, "width": preprocess.size},
        "resample": 3,  # PIL's number of bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def card(
    network: ViTModel, training: str, pictures: str, loss: str, runtime: Runtime, figures: dict[str, float]
) -> str:
    """The README.md of the folder."""
    size = network.config
    million = sum(p.numel() for p in network.parameters()) / 1e6
    device = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else runtime.device.type
    rows = "\n".join(f"| {name} | {accuracy:.3f} |" for name, accuracy in figures.items())
    return f"""# A small vision transformer

{size.image_size}x{size.image_size} RGB, patch {size.patch_size}, width {size.hidden_size}, depth \
{size.num_hidden_layers}, {size.num_attention_heads} heads, {million:.2f} M parameters, float16, \
transformers `ViTModel` folder.
`ViTModel.from_pretrained(FOLDER, dtype=torch.float32, add_pooling_layer=False)`;
feature = `last_hidden_state[:, 0]`; ImageNet mean and std.

## How it was made

With `tools/pretrain_micro.py` of perpetune {__version__} from random weights (seed {runtime.seed}) on {device}.

- Pictures: {pictures}.
- Training: {training}.
- Loss: {loss}.

## Measured

The probes are a ridge regression and the nearest class mean on standardised features, fitted on the training
pictures; of the digits, which it has not seen, one in four is held out.

| accuracy | |
| --- | --- |
{rows}
"""


def pretrain(
    data: Annotated[Path, typer.Option(help="A folder of class folders, or a parquet file.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    teacher: Annotated[str | None, typer.Option(help="A timm model to distil from; none: labels only.")] = None,
    teacher_size: Annotated[int | None, typer.Option(help="Side of the teacher's input; none: its own.")] = None,
    teacher_pretrained: Annotated[bool, typer.Option(help="The teacher has its published weights.")] = True,
    image_size: int = 32,
    patch: int = 4,
    width: int = 192,
    depth: int = 6,
    heads: int = 3,
    epochs: int = 9,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.1,
    label_weight: float = LossWeights.label,
    teacher_weight: float = LossWeights.teacher,
    smoothing: Annotated[float, typer.Option(help="Of the labels.")] = LossWeights.smoothing,
    held_out: Annotated[float, typer.Option(help="Share of the pictures kept for measuring.")] = 0.05,
    seed: int = 0,
    device: str = "auto",
    bf16: Annotated[bool | None, typer.Option(help="bfloat16 autocast; default: on a GPU.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that read pictures.")] = 0,
    every: Annotated[int, typer.Option(help="Steps between two printed lines; a multiple of 10.")] = 50,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A folder to go on from if it is there; the same options are needed.")
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 500,
) -> dict[str, float]:
    """Train a small vision transformer on labels and a teacher's features; returns the measured accuracies."""
    if (out / "model.safetensors").exists():
        raise UsageError(f"--out {out}: a model is there already; name another folder")
    try:
        config = FitConfig(epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, warmup=warmup)
    except ValidationError as error:
        raise UsageError(registry.explain(error, FitConfig)) from None
    place = pick_device(device)
    use_bf16 = place.type == "cuda" if bf16 is None else bf16
    runtime = Runtime(seed, place, "bf16" if use_bf16 else "no", workers, progress=Lines(every))
    weights = LossWeights(label_weight, teacher_weight, smoothing)

    preprocess = PictureView(image_size)
    network = make_student(image_size, patch, width, depth, heads, seed)
    student = Encoder(network, preprocess)
    known, rest = split(read_table(data), held_out, preprocess, seed)
    goal = None
    loss = f"{label_weight:g} × cross-entropy on the labels (smoothing {smoothing:g})"
    if teacher is not None:
        print(f"features of {len(known)} pictures from {teacher}", flush=True)
        expert = make_teacher(teacher, teacher_size, teacher_pretrained, seed)
        goal = teacher_features(expert, known, runtime)
        loss += (
            f" + {teacher_weight:g} × (1 − cosine to the {goal.shape[1]} standardised features of timm's {teacher}"
            f" at {expert.preprocess.size} px{'' if teacher_pretrained else ', its weights random'})"
        )
    with own_global_state(seed, "pretrain", "classify"):
        classify = nn.Linear(width, len(known.classes))
    saved = None if checkpoint is None else (checkpoint, checkpoint_every)
    seconds = train(student, classify, known, goal, weights, config, runtime, saved)

    out.mkdir(parents=True, exist_ok=True)
    save(network, preprocess, out)
    # What is measured is what is shipped, the float16 weights, without autocast.
    figures = measure(student.to(place, torch.float32), classify, known, rest, Runtime(seed, place, workers=workers))
    training = (
        f"{epochs} epochs of batches of {batch_size} in {seconds / 60:.1f} minutes, AdamW {lr:g}, weight decay "
        f"{weight_decay:g}, cosine, warm-up {warmup:g} of the steps, random crop and flip"
    )
    pictures = f"{len(known)} of {len(known.classes)} classes from {data.name}; {len(rest)} more are held out"
    (out / "README.md").write_text(card(network, training, pictures, loss, runtime, figures), encoding="utf-8")
    for name, accuracy in figures.items():
        print(f"{name}: {accuracy:.3f}")
    print(f"written: {out}")
    return figures


if __name__ == "__main__":
    command(pretrain)
