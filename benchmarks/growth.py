"""What a month costs after 1, 10, 100 and 1,000 months: time, memory, bytes of the state, length of the report.

    OMP_NUM_THREADS=1 python benchmarks/growth.py --tasks 1000 --out growth.jsonl
    OMP_NUM_THREADS=1 python benchmarks/growth.py --tasks 100 --only "frozen x ridge" treelora
    OMP_NUM_THREADS=1 python benchmarks/growth.py --tasks 300 --only "frozen x ridge" --features 2000 --marks 1 300

A month is a folder of a few small pictures of two classes, the same two in every month, and `Learner.learn` takes it
into one state. The net is a random transformer of two blocks, so that what grows is not hidden behind what does not.
Time is that of this process's CPU, in milliseconds: the median of the months up to the one that is named (a tenth of
them, at least five). `by part` are seconds of the clock as `timings.json` has them, in the same median. `opened_ms` is
a `Learner.load` of the state as it is then. `state_kb` is without the pages of the report. With `--turns`, copies of
the state at all marks learn the months around their mark in turns at the end, so that all have the same load on the
machine (`turns_ms`, the median). `slopes` are those of straight lines through the logarithms of ten months and more.
Prints JSON, a line for each method.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perpetune.learner import Learner
from perpetune.report import write_report
from perpetune.results import read_results
from perpetune.seeding import own_global_state

SIDE = 16
WARM = 2  # turns that are not counted: a state that was just opened reads documents for the first time
TRAIN, TEST = 8, 2  # pictures of each class of a month
CLASSES = ("even", "odd")
LORA = {"name": "lora", "at": ["q", "v"], "rank": 2}
RIDGE = {"name": "ridge", "projection": 64}
TRAINED = {"epochs": 1, "batch_size": 16, "lr": 1.0e-3}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "frozen x ridge": {"pet": "none", "method": "frozen", "head": RIDGE},
    "finetune + protect x ridge": {"pet": LORA, "method": "finetune", "head": RIDGE, "protect": {"energy": 0.95}},
    "safe": {"pet": LORA, "method": "safe", "head": RIDGE},
    "treelora": {"pet": LORA, "method": "treelora", "head": "linear"},
    "olora": {"pet": LORA, "method": "olora", "head": "linear"},
    "pool": {
        "pet": LORA,
        "method": {"name": "pool", "members": "task", "select": {"name": "means"}},
        "head": RIDGE,
    },
}


def net(folder: Path) -> str:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=SIDE, patch_size=4
    )
    with own_global_state("growth"):
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return f"hf:{folder}"


def month(folder: Path, number: int) -> Path:
    """A folder of pictures, `train` and `test`, that no other month has."""
    from PIL import Image

    rng = random.Random(number)
    for part, count in (("train", TRAIN), ("test", TEST)):
        for which, name in enumerate(CLASSES):
            place = folder / part / name
            place.mkdir(parents=True)
            for i in range(count):
                shade = rng.randrange(100) + 120 * which
                noise = bytes(min(255, shade + rng.randrange(30)) for _ in range(SIDE * SIDE * 3))
                Image.frombytes("RGB", (SIDE, SIDE), noise).save(place / f"{i}.png", compress_level=1)
    return folder


def grown(way: Mapping[str, Any], marks: Sequence[int], place: Path, given: argparse.Namespace) -> dict[str, Any]:
    content = {
        "name": "growth",
        "setting": "domain",
        "backbone": place.joinpath("net.txt").read_text(),
        "train": TRAINED,
        "evaluate": {"batch_size": 64, **({"earlier": given.earlier} if given.earlier is not None else {})},
        "run": {"device": "cpu", "threads": 1, "checkpoint_every": 1000, **dict(given.run)},
        **way,
    }
    if given.features is not None and content["head"] == RIDGE:
        content["head"] = {**RIDGE, "projection": given.features}
    learner = Learner(content, place / "state")
    spent: list[float] = []
    copies: dict[int, Path] = {}
    found: list[dict[str, Any]] = []
    for number in range(1, marks[-1] + 1):
        folder = month(place / "months" / f"{number:04d}", number)
        began = time.process_time()
        learner.learn(folder)
        spent.append(1000 * (time.process_time() - began))
        mark = number + WARM + given.turns // 2
        if given.turns and mark >= 10 and mark in marks:  # so its months in turns are those around the mark
            copies[mark] = Path(shutil.copytree(place / "state", place / f"state-{mark}"))
        if number in marks:
            found.append(looked(learner, spent, place / "state"))
            if given.verbose:
                print(json.dumps(found[-1]), flush=True)
    del learner
    for number, ms in in_turns(copies, place, given.turns).items():
        next(one for one in found if one["months"] == number)["turns_ms"] = ms
    return {"at": found, "slopes": slopes(found)}


def in_turns(copies: Mapping[int, Path], place: Path, turns: int) -> dict[int, float]:
    """The median of the months that states of several lengths learn in turns, so that all have the same load."""
    learners = {number: Learner.load(folder) for number, folder in copies.items()}
    spent: dict[int, list[float]] = {number: [] for number in learners}
    for turn in range(turns + WARM if learners else 0):
        for number, learner in learners.items():
            folder = month(place / "turns" / f"{number}-{turn}", 10**6 + 1000 * number + turn)
            began = time.process_time()
            learner.learn(folder)
            spent[number].append(1000 * (time.process_time() - began))
    return {number: round(statistics.median(found[WARM:]), 1) for number, found in spent.items()}


def looked(learner: Learner, spent: Sequence[float], folder: Path) -> dict[str, Any]:
    """What it costs now."""
    gc.collect()
    count = len(spent)
    last = max(5, count // 10)
    results = read_results(learner.state)
    written = write_report(results, folder)
    began = time.process_time()
    Learner.load(folder)
    opened = 1000 * (time.process_time() - began)
    parts = sorted({key for timing in results["timings"] for key in timing if key.endswith("_s")} - {"images_per_s"})
    recent = results["timings"][-last:]
    return {
        "months": count,
        "ms": round(statistics.median(spent[-last:]), 1),
        "by part": {key: round(statistics.median(t.get(key) or 0 for t in recent), 4) for key in parts},
        "opened_ms": round(opened, 1),
        "resident_mb": round(resident() / 1e6, 1),
        "state_kb": round(
            sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file not in written) / 1e3, 1
        ),
        "report_kb": {file.suffix: round(file.stat().st_size / 1e3, 1) for file in written},
    }


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def slopes(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    late = [one for one in found if one["months"] >= 10]
    if len(late) < 2:
        return {}
    return {
        key: round(slope([(one["months"], one[key]) for one in late]), 3)
        for key in ("ms", "turns_ms", "opened_ms", "resident_mb", "state_kb")
        if all(key in one for one in late)
    }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line nearest to the logarithms."""
    x, y = ([math.log(point[axis]) for point in points] for axis in (0, 1))
    return statistics.linear_regression(x, y).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000, help="months of the longest run")
    parser.add_argument("--only", nargs="*", choices=[*WAYS, []], help="names of methods; all by default")
    parser.add_argument("--earlier", type=json.loads, help="`evaluate.earlier` of the recipe, as JSON")
    parser.add_argument("--features", type=int, help="the width of ridge's random features")
    parser.add_argument("--marks", type=int, nargs="+", help="the months at which it is looked at")
    parser.add_argument("--run", nargs="*", type=_pair, default=[], help="KEY=VALUE of `run`, such as keep=2")
    parser.add_argument(
        "--turns", type=int, default=0, help="months that copies of all marks learn in turns at the end"
    )
    parser.add_argument("--out", type=Path, help="a file of JSON lines to append to")
    parser.add_argument("--verbose", action="store_true", help="print each mark as it is reached")
    given = parser.parse_args()
    marks = given.marks or [n for n in (1, 10, 30, 100, 300, 1000, 3000, 10000) if n < given.tasks] + [given.tasks]
    warnings.simplefilter("ignore")
    for name in given.only or WAYS:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            place.joinpath("net.txt").write_text(net(place / "net"))
            line = {"method": name, "earlier": given.earlier, **grown(WAYS[name], marks, place, given)}
        print(json.dumps(line), flush=True)
        if given.out:
            with given.out.open("a") as file:
                file.write(json.dumps(line) + "\n")


def _pair(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


if __name__ == "__main__":
    main()
