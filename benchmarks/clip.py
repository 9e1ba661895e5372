"""A dual encoder on classes that it never saw: zero-shot, and the expert behind its gate.

    python benchmarks/clip.py expert --seeds 3
    python benchmarks/clip.py expert --seeds 1 --train 20 --test 10    # smaller

CIFAR-100 of ../shared with the small dual encoder there: the 40 classes that it never saw in four tasks of ten, in an
order for each seed, and the 60 that it saw as an exam. Nothing is trained by gradient, so features of pictures are
computed once for all runs of this process. `own`: the ten classes of a picture's task may answer (MTIL); `all`: all
forty (X-TAIL). Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from perpetune.learner import Learner
from perpetune.methods.parts.recall import Recall
from perpetune.models.backbone import Backbone

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
TEMPLATES = [  # those with which the model was made and measured
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a low resolution photo of a {}.",
    "a bad photo of a {}.",
    "a photo of the {}.",
    "a close-up photo of a {}.",
    "a picture of a {}.",
    "a small photo of the {}.",
    "{}",
    "an image of a {} in the wild.",
]
FILES = {"path": "train", "test": "test"}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "zero-shot": {},
    "expert, gate": {"expert": {"name": "ridge", "projection": 2000}},
    "expert, no gate": {"expert": {"name": "ridge", "projection": 2000}, "gate": "none"},
}


def subset(source: Path, names: Sequence[str], folder: Path) -> Path:
    """The rows of a parquet file whose class is one of `names`."""
    table = pq.read_table(source)
    told = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    wanted = {told.index(name) for name in names}
    kept = [i for i, label in enumerate(table.column("label").to_pylist()) if label in wanted]
    file = folder / source.name
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.take(kept), file)
    return file


def recipe(head: Mapping[str, Any], setting: str, seed: int, world: Path, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "name": "clip",
        "seed": seed,
        "setting": setting,
        "backbone": f"folder:{args.shared / 'models' / 'dual-encoder'}",
        "pet": "none",
        "method": "frozen",
        "head": {"name": "text", "templates": TEMPLATES, **head},
        "data": {"name": "parquet", **{key: str(world / f"unseen/{file}.parquet") for key, file in FILES.items()}},
        "stream": {"classes_per_task": 10, "train_per_class": args.train, "test_per_class": args.test},
        "evaluate": {"future": True},
        "exams": {"suite": {"name": "dataset", "source": str(world / "seen/test.parquet"), "among": "own"}},
        "run": {"device": "cpu", "threads": args.threads},
    }  # fmt: skip


def measured(content: Mapping[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        results = Learner(dict(content), Path(folder) / "state").run()
    named = results["zero_shot"]
    suite = [entry["of"]["suite"]["accuracy"] for entry in results["exams"]]
    gates = [cell["gates"] for row in results["cells"] for cell in row if cell and cell.get("gates")]
    return {
        "transfer": named["transfer"],
        "average": named["average"],
        "last": named["last"],
        "zero-shot": named["before"],
        "kept_worst": named["kept_worst"],
        "suite_before": suite[0],
        "suite_after": suite[-1],
        "gates": gates[-1] if gates else None,
    }


def expert(args: argparse.Namespace) -> dict[str, Any]:
    about = json.loads((args.shared / "models/dual-encoder/measured.json").read_text())
    original = Backbone.features
    recall: dict[str, Recall] = {}

    def features(self: Backbone, inputs: Any) -> torch.Tensor:
        one = recall.setdefault(self.spec, Recall(lambda asked: original(self, asked), 2**31))
        return one(inputs)

    Backbone.features = features  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        world, data = Path(folder), args.shared / "data/cifar100"
        for part in ("unseen", "seen"):
            for name in ("train.parquet", "test.parquet"):
                subset(data / name, about[part], world / part)
        for seed in range(args.seeds):
            for setting, among in (("class", "all"), ("task", "own")):
                for name, head in WAYS.items():
                    key = f"{name}, {among}"
                    found.setdefault(key, []).append(measured(recipe(head, setting, seed, world, args)))
                    print(json.dumps({key: found[key][-1], "seed": seed}), flush=True)
    Backbone.features = original  # type: ignore[method-assign]
    keys = ("transfer", "average", "last", "suite_before", "suite_after")
    return {
        name: {key: round(100 * statistics.mean(run[key] for run in runs), 2) for key in keys} | {"runs": runs}
        for name, runs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["expert"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=None, help="training pictures of each class; default all 100")
    parser.add_argument("--test", type=int, default=None, help="test pictures of each class; default all 50")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", type=Path, default=SHARED)
    args = parser.parse_args()
    print(json.dumps({args.what: expert(args)}))


if __name__ == "__main__":
    main()
