"""Five tasks of questions about real pictures, for vision-language models; and what became of them in a run.

    python benchmarks/vlm.py build --out runs/vlm5                  # the stream, two exams, and the control
    python benchmarks/vlm.py build --out runs/vlm5-held-out --held-out
    perpetune run benchmarks/recipes/vlm5-protect.yaml --set seed=0 --out runs/vlm/protect-s0
    python benchmarks/vlm.py look runs/vlm/protect-s0 > runs/vlm/protect-s0.json    # a line of JSON
    python benchmarks/vlm.py table runs/vlm/*.json                  # Markdown; runs METHOD-sSEED of a method in a row

CIFAR-100 of ../shared and scikit-learn's digits. `superclass` and `class` ask for a name, and answers are written
freely. `presence` asks for yes or no, `count` for the number of digits in a strip of four places, `colour` for that of
a filter over a picture. No picture is used twice, and none is one that `tools/train_projector.py` trained on. With
`--held-out` the test is cut from the training pictures: settings are chosen on it, never on the test.

`exam-random.jsonl` and `exam-near.jsonl` ask "Is there a X?" as POPE does, half of them rightly. In the other half X is
any class, or one of the same superclass. `others/` has the test questions with pictures of other rows: on it a model
that looks at pictures falls to chance.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
PROJECTOR = 60  # pictures of each class that the projector was trained on
HELD_OUT = 90  # from here on training pictures of a class are held out
KINDS = {
    "sea mammal": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flower": "orchid poppy rose sunflower tulip",
    "container": "bottle bowl can cup plate",
    "fruit": "apple mushroom orange pear sweet_pepper",
    "device": "clock keyboard lamp telephone television",
    "furniture": "bed chair couch table wardrobe",
    "insect": "bee beetle butterfly caterpillar cockroach",
    "carnivore": "bear leopard lion tiger wolf",
    "building": "bridge castle house road skyscraper",
    "landscape": "cloud forest mountain plain sea",
    "herbivore": "camel cattle chimpanzee elephant kangaroo",
    "small beast": "fox porcupine possum raccoon skunk",
    "invertebrate": "crab lobster snail spider worm",
    "person": "baby boy girl man woman",
    "reptile": "crocodile dinosaur lizard snake turtle",
    "rodent": "hamster mouse rabbit shrew squirrel",
    "tree": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicle": "bicycle bus motorcycle pickup_truck train",
    "machine": "lawn_mower rocket streetcar tank tractor",
}
"""The superclasses of CIFAR-100, with short names, and their classes."""
NAMED = (
    "dolphin shark rose cup apple clock chair bee lion bridge mountain elephant fox crab baby turtle rabbit palm_tree "
    "train tractor"
).split()
"""The classes of the task `class`, one of each superclass."""
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}
COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "yellow": (255, 230, 0)}
COUNTS = ("one", "two", "three", "four")
CHANCE = {"superclass": 0.05, "class": 0.05, "presence": 0.5, "count": 0.25, "colour": 0.25}
YES_NO = ("Yes", "No")
SIDE = 32
Row = dict[str, Any]
"""`image` (PIL), `prompt`, `answer` and maybe `options`."""


class Pool:
    """Pictures by class, each drawn once."""

    def __init__(self, file: Path, first: int, stop: int | None, rng: random.Random):
        table = pq.read_table(file)
        names = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
        self.left: dict[str, list[bytes]] = {}
        for image, label in zip(table.column("image").to_pylist(), table.column("label").to_pylist(), strict=True):
            self.left.setdefault(names[label], []).append(image["bytes"])
        for pictures in self.left.values():
            pictures[:] = pictures[first:stop]
            rng.shuffle(pictures)

    def draw(self, name: str) -> Image.Image:
        return Image.open(io.BytesIO(self.left[name].pop())).convert("RGB")

    def any_of(self, names: Sequence[str], rng: random.Random) -> str:
        """One of the classes that have most pictures left."""
        most = max(len(self.left[name]) for name in names)
        return rng.choice([name for name in names if len(self.left[name]) == most])


def told(name: str) -> str:
    return name.replace("_", " ")


def naming(pool: Pool, count: int, rng: random.Random) -> list[Row]:
    drawn = [NAMED[i % len(NAMED)] for i in range(count)]
    return [{"image": pool.draw(name), "prompt": "What is it?", "answer": told(name)} for name in drawn]


def superclasses(pool: Pool, count: int, rng: random.Random) -> list[Row]:
    rows = []
    for i in range(count):
        kind = list(KINDS)[i % len(KINDS)]
        name = pool.any_of(KINDS[kind].split(), rng)
        rows.append({"image": pool.draw(name), "prompt": "Which kind?", "answer": kind})
    return rows


def presence(pool: Pool, count: int, rng: random.Random, near: float = 0.5) -> list[Row]:
    """Half yes; where it is no, a share of `near` names a class of the same superclass."""
    rows = []
    for i in range(count):
        name = pool.any_of(list(KIND_OF), rng)
        others = [n for n in KIND_OF if n != name]
        if i % 2 and rng.random() < near:
            others = [n for n in others if KIND_OF[n] == KIND_OF[name]]
        asked = told(rng.choice(others) if i % 2 else name)
        article = "an" if asked[0] in "aeiou" else "a"
        rows.append(
            {
                "image": pool.draw(name),
                "prompt": f"Is there {article} {asked}?",
                "answer": YES_NO[i % 2],
                "options": YES_NO,
            }
        )
    return rows


def counting(digits: list[Any], count: int, rng: random.Random) -> list[Row]:
    """Strips of four places, of which one to four hold a digit."""
    rows = []
    for i in range(count):
        strip = np.zeros((SIDE, 4 * SIDE), dtype=np.uint8)
        for place in rng.sample(range(4), i % 4 + 1):
            digit = Image.fromarray(digits.pop()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            strip[:, place * SIDE : (place + 1) * SIDE] = np.asarray(digit)
        image = Image.fromarray(strip).convert("RGB")
        rows.append({"image": image, "prompt": "How many digits?", "answer": COUNTS[i % 4], "options": COUNTS})
    return rows


def colours(pool: Pool, count: int, rng: random.Random) -> list[Row]:
    rows = []
    for i in range(count):
        colour = list(COLOURS)[i % len(COLOURS)]
        picture = pool.draw(pool.any_of(list(KIND_OF), rng))
        image = Image.blend(picture, Image.new("RGB", picture.size, COLOURS[colour]), 0.35)
        rows.append({"image": image, "prompt": "Which colour?", "answer": colour, "options": tuple(COLOURS)})
    return rows


def exchanged(rows: Sequence[Row], rng: random.Random) -> list[Row]:
    """The same questions, each with a picture of another row."""
    order = list(range(len(rows)))
    rng.shuffle(order)
    given = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [{**row, "image": rows[given[i]]["image"]} for i, row in enumerate(rows)]


def write(rows: Sequence[Row], file: Path) -> None:
    """A JSONL file, and its pictures beside it."""
    folder = file.parent / file.stem
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        name = f"{file.stem}/{number}.png"
        row["image"].save(file.parent / name)
        lines.append(json.dumps({**row, "image": name}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def build(out: Path, train: int, test: int, asked: int, held_out: bool, shared: Path) -> None:
    """Write the stream `out/stream/TASK/{train,test}.jsonl`, the exams, and `out/others/TASK.jsonl`."""
    from sklearn.datasets import load_digits

    rng = random.Random(17)
    cifar = shared / "data/cifar100"
    known = Pool(cifar / "train.parquet", PROJECTOR, HELD_OUT, rng)
    new = Pool(cifar / "train.parquet", HELD_OUT, None, rng) if held_out else Pool(cifar / "test.parquet", 0, None, rng)
    pixels = [np.round(digit * (255 / 16)).astype(np.uint8) for digit in load_digits().images]
    rng.shuffle(pixels)
    own, others = pixels[:1100], pixels[1100:]
    if held_out:
        own, others = own[:800], own[800:]
    for split, pool, digits, count in (("train", known, own, train), ("test", new, others, test)):
        tasks = {
            "class": naming(pool, count, rng),
            "superclass": superclasses(pool, count, rng),
            "presence": presence(pool, count, rng),
            "count": counting(list(digits), count, rng),
            "colour": colours(pool, count, rng),
        }
        for task, rows in tasks.items():
            rng.shuffle(rows)
            write(rows, out / "stream" / task / f"{split}.jsonl")
            if split == "test":
                write(exchanged(rows, rng), out / "others" / f"{task}.jsonl")
    for name, near in (("random", 0.0), ("near", 1.0)):
        write(presence(new, asked, rng, near), out / f"exam-{name}.jsonl")


def look(state: Path, others: Path | None) -> dict[str, Any]:
    """Figures of a finished run: matrix, exams before the first task and after each, tokens a second, control."""
    from perpetune.learner import Learner
    from perpetune.results import read_results
    from perpetune.state import State

    results = read_results(State(state))
    names, time = [task["name"] for task in results["tasks"]], results["timings"]
    found: dict[str, Any] = {
        "state": state.name,
        "order": names,
        "matrix": [[percent(cell) for cell in row if cell] for row in results["cells"]],
        "metrics": results["metrics"],
        "exams": results.get("exams"),
        "tokens_per_s": sum(t.get("tokens", 0) for t in time) / sum(t["learn_s"] + t["protect_s"] for t in time),
        "learn_s": sum(t["learn_s"] + t["protect_s"] for t in time),
        "evaluate_s": sum(t["evaluate_s"] for t in time),
        "stored_mb": sum(size for name, size in results["storage"][-1].items() if name != "task") / 1e6,
    }
    last = [cell for cell in results["cells"][-1] if cell]
    ways = [set(cell.get("others", {})) for cell in last]  # of methods that answer in several ways
    for way in sorted(set.intersection(*ways)):
        found[way] = statistics.mean(100 * cell["others"][way] / cell["total"] for cell in last)
    if others is not None:
        learner = Learner.load(state)
        cells = {name: learner.evaluate(str(others / f"{name}.jsonl")).values() for name in names}
        found["others"] = {name: percent(next(iter(cell))) for name, cell in cells.items()}
        found["chance"] = {name: 100 * CHANCE[name] for name in names}
    return found


def table(files: Sequence[Path]) -> str:
    """A row of Markdown for each method: mean and standard deviation over its runs."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        for line in file.read_text("utf-8").splitlines():
            found = json.loads(line)
            runs.setdefault(found["state"].rpartition("-s")[0], []).append(found)

    def shown(values: Sequence[float | None]) -> str:
        known = [value for value in values if value is not None]
        if not known:
            return ""
        spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
        return f"{statistics.mean(known):.1f}{spread}"

    def exam(run: dict[str, Any], name: str, figure: str) -> float | None:
        after = (run["exams"] or [{}])[-1].get("of", {}).get(name, {})
        return 100 * after[figure] if figure in after else None

    head = ("", "runs", "final", "forgetting", "exam random", "exam near", "says yes", "tokens/s", "MB", "others")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for method, some in runs.items():
        scaled = [[100 * r["metrics"][k] for r in some] for k in ("final_accuracy", "forgetting")]
        columns = [*scaled, *([exam(r, n, "accuracy") for r in some] for n in ("random", "near"))]
        columns += [[exam(r, "near", "yes") for r in some], [r["tokens_per_s"] for r in some]]
        columns += [[r["stored_mb"] for r in some]]
        columns += [[statistics.mean(r["others"].values()) for r in some if "others" in r]]
        lines.append(" | ".join([f"| {method}", str(len(some)), *map(shown, columns)]) + " |")
    return "\n".join(lines)


def percent(cell: dict[str, Any] | None) -> float:
    assert cell is not None
    return round(100 * float(cell["correct"]) / float(cell["total"]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    made = verbs.add_parser("build")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--train", type=int, default=320, help="rows of a task")
    made.add_argument("--test", type=int, default=80)
    made.add_argument("--asked", type=int, default=40, help="questions of an exam")
    made.add_argument("--held-out", action="store_true", help="cut the test from the training pictures")
    made.add_argument("--shared", type=Path, default=SHARED)
    seen = verbs.add_parser("look")
    seen.add_argument("states", type=Path, nargs="+")
    seen.add_argument("--others", type=Path, default=None, help="the folder `others` of the stream, for the control")
    shown = verbs.add_parser("table")
    shown.add_argument("files", type=Path, nargs="+")
    args = parser.parse_args()
    if args.verb == "table":
        print(table(args.files))
        return
    if args.verb == "build":
        build(args.out, args.train, args.test, args.asked, args.held_out, args.shared)
        return
    for state in args.states:
        print(json.dumps(look(state, args.others)), flush=True)


if __name__ == "__main__":
    main()
