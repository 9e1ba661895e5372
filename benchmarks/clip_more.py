"""More about dual encoders: what many names cost, retrieval, domains with prompts of their own, the leak of CLIP-PGP.

    python benchmarks/clip_more.py names --threads 2      # 1,100 names in 18 templates, beside the bare products
    python benchmarks/clip_more.py retrieval              # R@1, 5, 10 on 40 classes that were never seen, both ways
    python benchmarks/clip_more.py domains                # S-Prompts on pictures as they are, inverted, and blurred
    python benchmarks/clip_more.py leak                   # CLIP-PGP, and what it scores if the net is told the task

All but `domains` use the small dual encoder of ../shared and CIFAR-100 there, as benchmarks/clip.py does. Each prints
JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn

from clip import FILES, SHARED, TEMPLATES, subset
from perpetune.build import load_backbone
from perpetune.heads.text import Text
from perpetune.learner import Learner
from perpetune.methods.parts.recall import Recall
from perpetune.models.classifier import feature_table
from perpetune.models.loaders import dual
from perpetune.pets import pets
from perpetune.recipe import load_recipe
from perpetune.tasks import Inputs, Task

NAMES = 1100
LINEAR = {"name": "adapter", "at": ["picture.feature"], "width": 32, "scale": 1.0, "activation": "none", "bias": False}
DOMAINS: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "plain": lambda picture: picture,
    "inverted": ImageOps.invert,
    "blurred": lambda picture: picture.filter(ImageFilter.GaussianBlur(2)),
}


def names(args: argparse.Namespace) -> dict[str, Any]:
    """What the texts of 1,100 names cost in the head, and the bare products of the text tower in the same process."""
    torch.set_num_threads(args.threads)
    backbone = load_backbone(f"folder:{args.shared / 'models/dual-encoder'}")
    side, tower = backbone.texts, backbone.net.text_model
    assert side is not None
    asked = known_names(NAMES)
    head = Text.of(backbone, templates="cifar", vocabulary=asked).eval().requires_grad_(False)
    sentences = head.sentences(asked)
    tokens, tokenise = timed(lambda: side._tokens(sentences))
    lengths = sorted(len(ids) for ids in tokens)
    rows: Counter[str] = Counter()
    tower.register_forward_pre_hook(
        lambda net, given, kwargs: rows.update(texts=len(kwargs["input_ids"])), with_kwargs=True
    )
    side.of(sentences[:64])  # the first pass prepares kernels
    rows.clear()
    _, whole = timed(lambda: head.texts(asked))
    read = rows["texts"]
    _, again = timed(lambda: head(torch.randn(64, head.dim)))
    layers = [m for name, m in tower.named_modules() if isinstance(m, nn.Linear) and "pooler" not in name]
    batches = [sum(lengths[start : start + 64]) for start in range(0, len(lengths), 64)]
    _, bare = timed(lambda: products(layers, batches))
    began = time.perf_counter()
    for _ in range(100):
        side.state()
    state = (time.perf_counter() - began) / 100
    flops = 2 * sum(layer.weight.numel() for layer in layers) * sum(lengths)
    return {
        "names": len(asked),
        "texts": len(sentences),
        "tokens": sum(lengths),
        "threads": args.threads,
        "tflop": round(flops / 1e12, 3),
        "tokenise": tokenise,
        "texts of all names": whole,
        "bare products": bare,
        "texts read": read,
        "texts read by a prediction": rows["texts"] - read,
        "a prediction": again,
        "have pets changed the texts, ms": round(1000 * state, 3),
    }


def known_names(count: int) -> list[str]:
    """Names of things: ImageNet's, first one of each class and then their other names."""
    from timm.data import ImageNetInfo

    table = ImageNetInfo("imagenet-1k")
    said = [table.index_to_description(index).split(", ") for index in range(table.num_classes())]
    most = max(map(len, said))
    every = dict.fromkeys(words[depth] for depth in range(most) for words in said if depth < len(words))
    return list(every)[:count]


@torch.inference_mode()
def products(layers: Sequence[nn.Linear], batches: Sequence[int]) -> None:
    """The products of all linear layers with as many rows as `batches` have tokens, and nothing else."""
    inputs = {width: torch.randn(max(batches), width) for width in {layer.in_features for layer in layers}}
    for size in batches:
        for layer in layers:
            layer(inputs[layer.in_features][:size])


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        result = work()
    return result, {"wall_s": round(time.perf_counter() - wall, 2), "cpu_s": round(time.process_time() - cpu, 2)}


# -- retrieval ----------------------------------------------------------------------------------------------


def retrieval(args: argparse.Namespace) -> dict[str, Any]:
    """Recall both ways between the test pictures of some classes and ten captions of each class, before the first task
    and after the last: with nothing tuned, and after a linear adapter was tuned freely on 40 of the classes."""
    about = json.loads((args.shared / "models/dual-encoder/measured.json").read_text())
    ways: dict[str, dict[str, Any]] = {
        "frozen, expert": {"method": "frozen", "pet": "none", "expert": {"name": "ridge", "projection": 2000}},
        "linear adapter, free": {"method": "finetune", "pet": LINEAR, "expert": None},
    }
    found: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder, pictures_once():
        world = worlds(Path(folder), about, args.shared)
        exams = {
            name: {"name": "retrieval", "source": str(world / part / "test.parquet"), "template": TEMPLATES}
            for name, part in (("forty", "unseen"), ("sixty", "seen"))
        }
        for seed in range(args.seeds):
            for number, (name, way) in enumerate(ways.items()):
                content = {
                    **recipe(world, seed, args),
                    "method": way["method"],
                    "pet": way["pet"],
                    "head": {"name": "text", "templates": TEMPLATES, "expert": way["expert"]},
                    "exams": exams,
                    "train": {"epochs": 5, "batch_size": 32, "lr": 1.0e-3},
                }
                results = Learner(content, Path(folder) / f"{number}-{seed}").run()
                rounds = [entry["of"] for entry in results["exams"]]
                values = {exam: {"before": rounds[0][exam], "after": rounds[-1][exam]} for exam in exams}
                found.setdefault(name, []).append(values)
                print(json.dumps({name: values, "seed": seed}), flush=True)
    return {
        name: {
            exam: {
                when: {key: round(100 * statistics.mean(run[exam][when][key] for run in runs), 2)
                       for key in runs[0][exam][when] if key not in ("gap", "pair_cosine")}
                for when in ("before", "after")
            }
            for exam in exams
        }
        for name, runs in found.items()
    }  # fmt: skip


def worlds(folder: Path, about: Mapping[str, Sequence[str]], shared: Path) -> Path:
    """Files of the classes that the dual encoder never saw, and of those that it saw."""
    for part in ("unseen", "seen"):
        for name in ("train.parquet", "test.parquet"):
            subset(shared / "data/cifar100" / name, about[part], folder / part)
    return folder


def recipe(world: Path, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Four tasks of ten of the classes that were never seen."""
    return {
        "name": "clip",
        "seed": seed,
        "setting": "class",
        "backbone": f"folder:{args.shared / 'models' / 'dual-encoder'}",
        "data": {"name": "parquet", **{key: str(world / f"unseen/{file}.parquet") for key, file in FILES.items()}},
        "stream": {"classes_per_task": 10, "train_per_class": args.train, "test_per_class": args.test},
        "run": {"device": "cpu", "threads": args.threads},
    }


@contextlib.contextmanager
def pictures_once() -> Iterator[None]:
    """Inside this context a picture passes the tower of a dual encoder once in this process; what changes its feature
    behind the tower acts each time. No pet may stand in the tower."""
    original, known = dual._pictures, Recall(lambda given: torch.zeros(0), 2**31)

    def recalled(net: Any, pixels: Tensor, **options: Any) -> Tensor:
        def ask(given: Inputs) -> Tensor:
            with torch.no_grad():
                pooled: Tensor = net.get_image_features(
                    pixel_values=given.pixels.to(net.dtype), **options
                ).pooler_output
            return pooled

        known.ask = ask
        return dual.wide(net.picture_feature(known(Inputs(pixels=pixels.detach()))))

    dual._pictures = recalled
    try:
        yield
    finally:
        dual._pictures = original


# -- domains ------------------------------------------------------------------------------------------------


def domains(args: argparse.Namespace) -> dict[str, Any]:
    """S-iPrompts on three domains made of CIFAR-100: the share of pictures that go to the right domain, whether what
    belongs to the first domain stays bit by bit, and the control, one prompt for all domains."""
    content = {
        "name": "domains",
        "seed": args.seed,
        "setting": "domain",
        "backbone": "perpetune:micro",
        "pet": {"name": "prompt", "at": ["block"], "deep": False, "length": 10},
        "method": {"name": "pool", "members": "task", "select": {"name": "centres", "count": 5}, "answer": "own",
                   "start": "fresh", "mask": "task"},
        "head": "linear",
        "train": {"epochs": args.epochs, "batch_size": 32, "optimizer": "sgd", "lr": 1.0e-2, "momentum": 0.9,
                  "weight_decay": 2.0e-4, "schedule": "cosine", "clip": None},
        "stream": {"by": "domain", "order": list(DOMAINS)},
        "evaluate": {"told": True},
        "run": {"device": "cpu", "threads": args.threads},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        content["data"] = {"name": "parquet", **three_domains(args, world)}
        found = {}
        for name, method in (("S-iPrompts", content["method"]), ("control: one prompt", {"name": "finetune"})):
            changed = {**content, "method": method}
            if method["name"] == "finetune":
                changed.pop("evaluate")
            learner = Learner(changed, world / name.split(":")[0])
            after = watched(learner)
            results = learner.run()
            found[name] = {
                "accuracy": shares(results)[-1],
                "the first domain's values stay": same(after[0], after[-1]),
            }
            if method["name"] == "pool":
                found[name] |= routes(results["cells"][-1])
    return found


def three_domains(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Files with `--train` and `--test` pictures of each class in three domains."""
    files = {}
    for key, part, each in (("path", "train", args.train or 20), ("test", "test", args.test or 10)):
        table = pq.read_table(args.shared / "data/cifar100" / f"{part}.parquet")
        taken: Counter[int] = Counter()
        rows: dict[str, list[Any]] = {"image": [], "label": [], "domain": []}
        names = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
        for image, label in zip(table.column("image").to_pylist(), table.column("label").to_pylist(), strict=True):
            taken[label] += 1
            if taken[label] > each:
                continue
            picture = Image.open(io.BytesIO(image["bytes"])).convert("RGB")
            for domain, change in DOMAINS.items():
                made = io.BytesIO()
                change(picture).save(made, "PNG")
                rows["image"].append({"bytes": made.getvalue(), "path": None})
                rows["label"].append(names[label])
                rows["domain"].append(domain)
        files[key] = str(folder / f"{part}.parquet")
        pq.write_table(pa.table(rows), files[key])
    return files


def watched(learner: Learner) -> list[dict[str, Tensor]]:
    """Filled while the learner learns: after each task the values that belong to the first domain."""
    method, found, learn = learner.method, list[dict[str, Tensor]](), learner.method.learn

    def learned(task: Task) -> None:
        learn(task)
        name = "task-0" if pooled else "default"
        values = [p for pet in pets(method.model, name) for p in pet.parameters()]
        kinds = {f"pet {number}": value for number, value in enumerate(values)}
        if pooled:
            kinds["centres"] = method.selector.get_buffer("centres")[method.selector.get_buffer("of") == 0]
            kinds |= {f"rows {key}": value for key, value in method.bank.state_dict().items() if "0" in key}
        found.append({name: value.detach().clone() for name, value in kinds.items()})

    pooled = hasattr(method, "bank")
    method.learn = learned
    return found


def same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, bool]:
    """Of each kind of value whether it is the same bit by bit."""
    return {name: torch.equal(value, after[name]) for name, value in before.items()}


def shares(results: Mapping[str, Any]) -> list[list[float]]:
    """The accuracies of all cells that were measured, in %."""
    rows = results["cells"]
    return [[round(100 * cell["correct"] / cell["total"], 1) for cell in row if cell] for row in rows]


def routes(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many of each domain's pictures went to which domain, and the share that went to the right one, in %."""
    right = sum(cell["members"].get(domain, 0) for domain, cell in zip(DOMAINS, cells, strict=True))
    total = sum(cell["total"] for cell in cells)
    return {
        "to the right domain": round(100 * right / total, 2),
        "by domain": {domain: dict(cell["members"]) for domain, cell in zip(DOMAINS, cells, strict=True)},
        "told the domain": [round(100 * cell["told"] / cell["total"], 1) for cell in cells],
    }


# -- the leak -----------------------------------------------------------------------------------------------


def leak(args: argparse.Namespace) -> dict[str, Any]:
    """The packaged recipe of CLIP-PGP on the 40 classes, four tasks of ten, scored as perpetune scores it and as the
    released code does, which tells the net by the labels of a batch which classes may be answered."""
    about = json.loads((args.shared / "models/dual-encoder/measured.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        world = worlds(Path(folder), about, args.shared)
        own = recipe(world, args.seed, args)
        train, test = args.train or 20, args.test or 20
        changes = {
            "backbone": {"name": own["backbone"]},
            "data": own["data"],
            "stream.train_per_class": train,
            "stream.test_per_class": test,
            "stream.augment": "none",
            "train.epochs": args.epochs,
            "run.threads": args.threads,
            "run.workers": 0,
            "run.device": "cpu",
        }
        given = load_recipe("clip-pgp-cifar100", [f"{key}={json.dumps(value)}" for key, value in changes.items()])
        learner = Learner(given, Path(folder) / "state")
        tasks: list[Task] = []
        learn = learner.method.learn

        def learned(task: Task) -> None:
            tasks.append(task)
            learn(task)

        learner.method.learn = learned  # type: ignore[method-assign]
        results = learner.run()
        scores, targets = asked(learner, tasks)
    task_of = torch.tensor([number for number, task in enumerate(tasks) for _ in task.classes])
    mixed = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    answers = {
        "all learned names may answer": scores.argmax(1),
        "released: names up to the batch's latest task": leaked(scores, targets, task_of, args.batch),
        "names of the picture's task": scores.masked_fill(task_of != task_of[targets][:, None], -torch.inf).argmax(1),
    }
    found: dict[str, Any] = {
        name: {
            "all": percent(right := given == targets),
            "by task": [percent(right[task_of[targets] == number]) for number in range(len(tasks))],
        }
        for name, given in answers.items()
    }
    again = leaked(scores[mixed], targets[mixed], task_of, args.batch)
    found["released, pictures in another order"] = {"all": percent(again == targets[mixed])}
    return {**found, "as reported": shares(results)[-1]}


def asked(learner: Learner, tasks: Sequence[Task]) -> tuple[Tensor, Tensor]:
    """Scores `(N, C)` of the test pictures of all tasks, in the order of their classes, and their classes `(N,)`."""
    method, scores, targets = learner.method, list[Tensor](), list[Tensor]()
    for task in tasks:
        assert task.test is not None
        own = torch.tensor(task.test.targets)
        order = own.argsort(stable=True)
        table = feature_table(task.test.questions(), 50, learner.runtime, method.predict)
        rows = torch.tensor([method.classes.index(name) for name in task.classes])
        scores.append(table[order])
        targets.append(rows[own[order]])
    return torch.cat(scores), torch.cat(targets)


def leaked(scores: Tensor, targets: Tensor, task_of: Tensor, size: int) -> Tensor:
    """The answers `(N,)` as the released evaluation of CLIP-PGP finds them: candidates are the classes of all tasks up
    to the latest one that a picture of the same batch belongs to (clip-pgp at c566b81, models/tclip.py:71, 76).

    Args:
        scores: `(N, C)`, in the order in which pictures are asked.
        targets: the classes of the pictures, int64 `(N,)`.
        task_of: the task of each class, int64 `(C,)`.
        size: pictures in a batch.
    """
    latest = [task_of[some].max() for some in targets.split(size)]
    parts = zip(scores.split(size), latest, strict=True)
    return torch.cat([some.masked_fill(task_of > last, -torch.inf).argmax(1) for some, last in parts])


def percent(right: Tensor) -> float:
    return round(100 * float(right.double().mean()), 2)


WHAT = {"names": names, "retrieval": retrieval, "domains": domains, "leak": leak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(WHAT))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3, help="of `retrieval`")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--train", type=int, default=None, help="training pictures of each class")
    parser.add_argument("--test", type=int, default=None, help="test pictures of each class")
    parser.add_argument("--batch", type=int, default=50, help="pictures that the released evaluation asks at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", type=Path, default=SHARED)
    args = parser.parse_args()
    print(json.dumps({args.what: WHAT[args.what](args)}, indent=1))


if __name__ == "__main__":
    main()
