"""Tuning a dual encoder on classes that it never saw: what is learned, and what zero-shot loses.

    python benchmarks/clip_tune.py --seeds 3
    python benchmarks/clip_tune.py --seeds 1 --only "lora" --test 25 --suite 20    # smaller

The stream of benchmarks/clip.py: the 40 classes of CIFAR-100 that the small dual encoder of ../shared never saw, in
four tasks of ten (all forty names may answer at every moment), and the 60 that it saw as an exam. The first blocks of
the picture tower are frozen in every run, so what they give for a picture is computed once in this process.
With `--valid` the test pictures are training pictures that are held out: for choosing settings. Prints JSON, one line a
run; a run whose line stands in `--out` already is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from clip import FILES, SHARED, TEMPLATES, subset
from perpetune import build
from perpetune.learner import Learner
from perpetune.models.backbone import Backbone

TUNED = 2  # the blocks at the end of the picture tower in which LoRA is trained, if the run has it
TAPS = 6
ASKED = 10  # pictures of each class that the exam `recognition` asks

RIDGE = {"expert": {"name": "ridge", "projection": 2000}}
ON_TAPS = {"expert": {"name": "ridge"}}
ADAPTER = {
    "pet": {"name": "adapter", "at": ["picture.feature"], "width": 32, "scale": 1.0, "activation": "none",
            "bias": False},
    "train": {"epochs": 5, "batch_size": 32, "lr": 3.0e-3},
}  # fmt: skip
LORA = {
    "pet": {"name": "lora", "at": ["picture.q", "picture.v"], "blocks": [-2, -1], "rank": 8, "alpha": 8},
    "train": {"epochs": 1, "batch_size": 32, "lr": 3.0e-3},
}
WIDE = {
    "pet": {"name": "lora", "at": [f"picture.{r}" for r in ("q", "v", "proj", "fc1", "fc2")], "blocks": [-2, -1],
            "rank": 16, "alpha": 16},
    "train": {"epochs": 8, "batch_size": 32, "lr": 1.0e-3},
}  # fmt: skip


def protect(**more: Any) -> dict[str, Any]:
    return {"protect": {"energy": 0.99, **more}}


def ways(reference: Path) -> Mapping[str, Mapping[str, Any]]:
    """The runs by name; `taps` and `head` are taken out before the rest is put into the recipe."""
    seen = {"path": str(reference), "samples": 600}
    tuned = {
        "free": {},
        "protected": protect(),
        "protected, reference": protect(reference=seen),
        "protected, reference, random directions": protect(reference=seen, directions="random"),
        "protected, reference, projected gradient": protect(reference=seen, project="gradient"),
        "soft, reference": protect(reference=seen, strength="soft"),
        "protected .9, reference": {"protect": {"energy": 0.9, "reference": {**seen, "energy": 0.99}}},
    }
    found: dict[str, Any] = {
        "zero-shot": {},
        "expert": {"head": RIDGE},
        "expert on taps": {"head": ON_TAPS, "taps": TAPS},
        **{f"adapter, {name}": {**ADAPTER, **way} for name, way in tuned.items()},
        **{f"lora, {name}": {**LORA, **way} for name, way in tuned.items() if "random" not in name},
        "lora, protected, weights": {**LORA, **protect(reference={"weights": True, "energy": 0.9})},
    }
    for name in ("adapter, protected, reference", "adapter, soft, reference", "lora, free",
                 "lora, protected, reference", "lora, soft, reference", "lora, protected, weights"):  # fmt: skip
        found[f"{name}; expert"] = {**found[name], "head": RIDGE}
    wide = {**WIDE, "taps": TAPS}
    found |= {
        "first session, tuned names; expert on taps": {**wide, "method": "first_session", "head": ON_TAPS},
        "first session, bare names; expert on taps": {
            **wide, "method": "first_session", "head": {**ON_TAPS, "zero_shot": "bare"}},
        "protected, bare names; expert on taps": {
            **wide, **protect(), "head": {**ON_TAPS, "zero_shot": "bare"}},
        "renewed, bare names; expert on taps": {
            **wide, **protect(renew=True), "head": {**ON_TAPS, "zero_shot": "bare"}},
        "protected, reference; expert on taps": {**wide, **protect(reference=seen), "head": ON_TAPS},
        "protected, weights; expert on taps": {
            **wide, **protect(reference={"weights": True, "energy": 0.9}), "head": ON_TAPS},
    }  # fmt: skip
    return found


class Known:
    """The blocks of the picture tower that are never tuned, with what they gave for each picture.

    The blocks before the tapped ones are one step; each later frozen block is a step of its own, because taps read it.
    """

    def __init__(self) -> None:
        self.kept: dict[bytes, Tensor] = {}
        self.tuned = TUNED
        """The blocks at the end that the next run tunes."""

    def step(self, number: int, compute: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        @torch.no_grad()
        def looked_up(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            keys = [
                bytes([number]) + hashlib.blake2b(row.contiguous().numpy().tobytes(), digest_size=16).digest()
                for row in hidden
            ]
            new = [place for place, key in enumerate(keys) if key not in self.kept]
            if new:
                made = compute(hidden[new])
                self.kept |= {keys[place]: row.clone() for place, row in zip(new, made, strict=True)}
            return torch.stack([self.kept[key] for key in keys])

        return looked_up

    def put_on(self, backbone: Backbone) -> Backbone:
        blocks = list(backbone.net.vision_model.encoder.layer)  # type: ignore[union-attr, arg-type]
        frozen = blocks[: len(blocks) - self.tuned]
        first = len(blocks) - TAPS

        def early(hidden: Tensor) -> Tensor:
            for block in frozen[: first + 1]:
                hidden = type(block).forward(block, hidden)
            return hidden

        for block in frozen[:first]:
            block.forward = _same  # type: ignore[method-assign]
        frozen[first].forward = self.step(first, early)  # type: ignore[method-assign]
        for number in range(first + 1, len(frozen)):
            one: nn.Module = frozen[number]
            plain = type(one).forward
            one.forward = self.step(number, lambda hidden, one=one, plain=plain: plain(one, hidden))  # type: ignore[method-assign]
        return backbone


def _same(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


def recipe(way: Mapping[str, Any], seed: int, world: Path, args: argparse.Namespace) -> dict[str, Any]:
    rest = {key: value for key, value in way.items() if key not in ("head", "taps")}
    return {
        "name": "clip-tune",
        "seed": seed,
        "setting": args.setting,
        "backbone": {"name": f"folder:{args.shared / 'models' / 'dual-encoder'}", "taps": way.get("taps")},
        "pet": "none",
        "method": {"name": "finetune", "mask": "task"} if "pet" in way else "frozen",
        "head": {"name": "text", "templates": TEMPLATES, **way.get("head", {})},
        "data": {"name": "parquet", **{key: str(world / f"unseen/{file}.parquet") for key, file in FILES.items()}},
        "stream": {"classes_per_task": 10, "train_per_class": args.train, "test_per_class": args.test},
        "evaluate": {"future": True},
        "exams": {
            "suite": {"name": "dataset", "source": str(world / "seen/test.parquet"), "among": "own"},
            "asked": {"name": "recognition", "source": str(world / "seen/asked.parquet")},
        },
        "run": {"device": "cpu", "threads": args.threads},
        **rest,
    }  # fmt: skip


def measured(content: Mapping[str, Any]) -> dict[str, Any]:
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        results = Learner(dict(content), Path(folder) / "state").run()
    named = results["zero_shot"]
    exams = [entry["of"] for entry in results["exams"]]
    asked = exams[-1]["asked"]
    return {
        **{key: named[key] for key in ("transfer", "average", "last", "kept_worst")},
        "zero-shot": named["before"],
        "suite": [entry["suite"]["accuracy"] for entry in exams],
        "attraction": asked.get("attraction", asked.get("of", {}).get("attraction")),
        "asked": asked,
        "cpu_s": round(time.process_time() - started, 1),
    }


def prepared(folder: Path, args: argparse.Namespace) -> Path:
    """The parquet files of the stream and of the exam, and reference pictures of the classes that were seen."""
    about = json.loads((args.shared / "models/dual-encoder/measured.json").read_text())
    data = args.shared / "data/cifar100"
    for part in ("unseen", "seen"):
        for name in ("train.parquet", "test.parquet"):
            subset(data / name, about[part], folder / part)
    if args.valid:  # the last fifth of the training pictures of each class stands in for the test pictures
        for part in ("unseen", "seen"):
            table = pq.read_table(folder / part / "train.parquet")
            rest = _few(table, len(table) * 4 // 5 // len(set(table.column("label").to_pylist())))
            names = set(map(str, rest.column("image").to_pylist()))
            held = [row for row, image in enumerate(table.column("image").to_pylist()) if str(image) not in names]
            pq.write_table(table.take(held), folder / part / "test.parquet")
            pq.write_table(rest, folder / part / "train.parquet")
    whole = pq.read_table(folder / "seen/test.parquet")
    pq.write_table(_few(whole, ASKED), folder / "seen/asked.parquet")
    if args.suite:
        pq.write_table(_few(whole, args.suite), folder / "seen/test.parquet")
    pictures = folder / "reference"
    pictures.mkdir()
    table = _few(pq.read_table(folder / "seen/train.parquet"), 10)
    for row, image in enumerate(table.column("image").to_pylist()):
        (pictures / f"{row}.png").write_bytes(image["bytes"])
    return folder


def _few(table: Any, each: int) -> Any:
    """The first rows of each class."""
    count: dict[int, int] = {}
    kept = []
    for row, label in enumerate(table.column("label").to_pylist()):
        count[label] = count.get(label, 0) + 1
        if count[label] <= each:
            kept.append(row)
    return table.take(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of runs")
    parser.add_argument("--exactly", nargs="*", help="whole names of runs")
    parser.add_argument("--setting", default="class", choices=["class", "task"])
    parser.add_argument("--train", type=int, default=None, help="training pictures of each class; default all 100")
    parser.add_argument("--test", type=int, default=None, help="test pictures of each class; default all 50")
    parser.add_argument("--suite", type=int, default=None, help="pictures of each class of the exam; default all 50")
    parser.add_argument("--valid", action="store_true", help="ask held-out training pictures instead of test pictures")
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE of `train`, such as lr=1e-3")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--out", type=Path, help="a file of JSON lines to append to")
    args = parser.parse_args()
    done = set()
    if args.out and args.out.exists():
        done = {(line["run"], line["seed"]) for line in map(json.loads, args.out.read_text().splitlines())}
    known, load = Known(), build.load_backbone
    build.load_backbone = lambda *a, **k: known.put_on(load(*a, **k))
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        world = prepared(Path(folder), args)
        for seed in range(args.first, args.first + args.seeds):
            for name, way in ways(world / "reference").items():
                wanted = name in args.exactly if args.exactly else any(part in name for part in args.only)
                if not wanted or (name, seed) in done:
                    continue
                content = recipe(way, seed, world, args)
                if "train" in content:
                    content["train"] = {**content["train"], **dict(_pair(one) for one in args.set)}
                known.tuned = TUNED if content["pet"] != "none" and content["pet"]["name"] == "lora" else 0
                line = {"run": name, "seed": seed, **measured(content)}
                found.setdefault(name, []).append(line)
                print(json.dumps(line), flush=True)
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps(line) + "\n")
    means: dict[str, Any] = {}
    for name, runs in found.items():
        means[name] = {key: _percent([run[key] for run in runs]) for key in ("transfer", "average", "last")}
        means[name]["suite"] = [_percent(values) for values in zip(*(run["suite"] for run in runs), strict=True)]
    print(json.dumps({"tune": means}))


def _percent(values: Sequence[float]) -> float:
    return round(100 * statistics.mean(values), 2)


def _pair(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key, json.loads(value)


if __name__ == "__main__":
    main()
