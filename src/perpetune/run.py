"""The loop over tasks: learn, evaluate, commit. The one path that `run`, `update`, `resume` and Python share."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from perpetune.errors import Interrupted
from perpetune.evaluate import AMONG, Asked, Classes, How, Limit, ask, probe, probe_rows
from perpetune.exams.base import Exam, take_all
from perpetune.kept import KeptFeatures, kept_features
from perpetune.methods.base import Method
from perpetune.oracle import solve
from perpetune.recipe import Every, Recipe
from perpetune.results import read_results
from perpetune.runtime import Runtime, Silent
from perpetune.snapshot import read_tensors
from perpetune.state import MidTask, State, training_digest
from perpetune.tasks import Batch, Examples, Task, balanced, evaluation_batches

LEADING = 256  # examples of a task that say where its pet starts, with protect.start: leading
MADE = "features.json"  # what made the features of its test examples then
FEATURES = "features.safetensors"  # of a few test images of the task, as they were when it was learned


@dataclass(frozen=True)
class Step:
    """One task to learn and what is measured after it.

    Attributes:
        task: what is learned.
        others: other tasks to evaluate on afterwards: all earlier ones, and the next one where its
            accuracy before learning means something (forward transfer).
        document: what is stored of the task beside its name: sizes, data, fingerprint, bad files.
        reference: data without labels, protected before the task is learned; for the first task.
        names: names whose texts are protected in the same way.
        seen: all tasks so far, this one too, with their training data: what the oracle head is solved on afterwards
            (`evaluate.oracle`), which the method never sees; empty without it.
        exams: what is asked beside the tasks: before the first task, and after each.
        ahead: tasks that are not learned yet and are asked all the same, before the first task and after each.
        future: the classes of all tasks, learned or not, if tasks are asked before they are learned.
        last: whether it is the last task of its stream.
        prepared: seconds that it took to find the data and to check the examples.
        unasked: how many earlier tasks are not among `others`, because it is not their turn (`evaluate.earlier`).
    """

    task: Task
    others: Sequence[Task]
    document: Mapping[str, Any]
    reference: Examples | None = None
    names: Sequence[str] = ()
    seen: Sequence[Task] = ()
    exams: Sequence[Exam] = ()
    ahead: Sequence[Task] = ()
    future: Classes | None = None
    last: bool = False
    prepared: float = 0.0
    unasked: int = 0


def run(method: Method, steps: Iterable[Step], state: State, kept: KeptFeatures | None = None) -> None:
    """Learn the tasks one after the other, each committed before the next begins.

    Args:
        kept: the features of test data that the state keeps; None reads them anew.
    """
    for step in steps:
        if kept is None:
            backbone, known = method.model.backbone, state.backbone["fingerprint"]
            kept = kept_features(state.folder, state.recipe, backbone, known, step.task.runtime)
        learn_task(method, step, state, kept)


def learn_task(method: Method, step: Step, state: State, kept: KeptFeatures) -> None:
    """Learn one task, evaluate, and store what was learned.

    A crash at any moment leaves the state with this task committed or not begun; checkpoints of
    the open task are in STATE/resume, and entering here again goes on from them.
    """
    task, recipe, run = step.task, state.recipe, step.task.runtime
    run.spent = {}
    kept.used.clear()  # of evaluations between tasks
    main = run.rank == 0
    # A checkpoint is of use only for the same data, training and number of processes.
    fingerprint = f"{step.document['fingerprint']}/{training_digest(recipe)}/{run.world}"
    if main:
        about = {key: step.document[key] for key in ("fingerprint", "from")}
        state.log("task begun", task=task.index, name=task.name, **about)
    about_task, every = (task.index, task.name, fingerprint), recipe.run.checkpoint_every
    with run.first():  # it removes what belongs to another task, before the others look
        run.checkpoints = MidTask(state.folder / "resume", method, about_task, every, writes=main)
    run.progress.task(task.index, task.name, len(task.classes), len(task.train))
    ahead = [f"task {task.name}: {said}" for said in method.notes(task)]
    for note in ahead:
        run.progress.note(note)
    _reset_peak(run)
    begun: dict[str, Any] = {}  # what was measured before the first task
    size, among = recipe.evaluate.batch_size, AMONG[recipe.setting]
    if task.index == 0:
        with kept.at_work(run.device):
            exams_before = take_all(step.exams, method, size)
            asked = [task, *step.ahead] if step.future is not None else []
            zero = measure(method, asked, How(among, size, future=step.future))
        begun = {"exams_before": exams_before, "cells_before": cells_of(zero)}
    else:
        exams_before = state.committed[0].parsed("metrics.json").get("exams_before", {})
    began = time.perf_counter()
    certificates = learn_protected(method, task, step.reference, recipe.evaluate.batch_size, step.names)
    learned = time.perf_counter()
    oracle = solve(method, step.seen, recipe) if step.seen else None
    solved = time.perf_counter()
    how = How(among, size, oracle, step.future, recipe.evaluate.told)
    examples = _examples_of(task) if step.exams else {}
    with kept.at_work(run.device):
        found = measure(method, [*step.others, task], how, limit=_limit(step, recipe), new=task.name)
        ahead_of = measure(method, step.ahead, How(among, size, future=step.future))
        with run.timed("exams"):
            exams = take_all(step.exams, method, size, exams_before, _trained(state, examples))
        with run.timed("drift"):
            features, drift = _drift(method, step, state, found)
            made = found[task.name].made
        kept.settle(_turn_begun(step, state))
    cells = cells_of({**found, **ahead_of})
    left_out = [name for name, asked_of in found.items() if asked_of.left_out]
    evaluated = time.perf_counter()
    method.task_measured()
    seconds = run.checkpoints.seconds + learned - began
    earlier = sum(asked_of.seconds for name, asked_of in found.items() if name != task.name)
    timings = {
        "prepare_s": round(step.prepared, 3),
        "learn_s": round(seconds, 3),
        "statistics_s": round(run.spent.get("statistics", 0.0), 3),  # a part of `learn_s`, or of `oracle_s`
        "protect_s": round(sum(c.pop("seconds") for c in certificates), 3),  # a part of `learn_s`
        "evaluate_s": round(evaluated - learned, 3),
        "new_s": round(found[task.name].seconds, 3),  # this and the following ones are parts of `evaluate_s`
        "earlier_s": round(earlier, 3),
        "drift_s": round(run.spent["drift"], 3),
        **({"exams_s": round(run.spent["exams"], 3)} if step.exams else {}),
        **({"oracle_s": round(solved - learned, 3)} if oracle else {}),  # a part of `evaluate_s`
        "images": run.checkpoints.images,
        "images_per_s": round(run.checkpoints.images / seconds, 2) if run.checkpoints.images else None,
        **_tokens(run.checkpoints.tokens, seconds),
        "peak_memory_bytes": _peak(run),
        "device": str(run.device),
    }
    document = {"index": task.index, "name": task.name, "classes": list(task.classes), **step.document}
    document |= {"examples": examples} if examples else {}
    facts = method.facts()
    said = dict.fromkeys(told["warning"] for told in facts.values() if told.get("warning"))
    warnings = [f"task {task.name}: {warning}" for warning in said]
    for warning in warnings:
        run.progress.note(warning)
    document["warnings"] = [*document["warnings"], *ahead, *warnings]
    measured: dict[str, Any] = {"cells": cells, "protection": certificates, "facts": facts, "drift": drift}
    measured |= {**begun, "exams": exams, "not_asked": left_out, "unasked": step.unasked}
    metrics = {key: value for key, value in measured.items() if value or key == "cells"}
    done = time.perf_counter()
    if main:
        documents = {"task.json": document, "metrics.json": metrics, "timings.json": timings}
        documents |= {} if made is None else {MADE: {"made": made}}
        if dropped := state.commit(task.index, task.name, method, documents, features):
            run.progress.note(dropped)
    run.wait()
    run.checkpoints = None
    committed = time.perf_counter()
    if getattr(type(run.progress), "results", None) is not Silent.results:  # it grows with the tasks
        run.progress.results(read_results(state))
    if main:  # nothing that is sealed with a commit can say how long it took
        spent = {"commit_s": round(committed - done, 3), "report_s": round(time.perf_counter() - committed, 3)}
        state.log("task timed", task=task.index, name=task.name, **spent)


def _examples_of(task: Task) -> dict[str, int]:
    """How many training examples each class of a task has, by its name."""
    counts = Counter(task.train.targets)
    return {name: counts[target] for target, name in enumerate(task.classes)}


def _trained(state: State, examples: Mapping[str, int]) -> dict[str, int]:
    """How many training examples each class has had in all tasks so far: the committed ones, and one with `examples`.

    Nothing if there are no exams, whose judges ask for it.
    """
    if not examples:
        return {}
    counts: Counter[str] = Counter(examples)
    for committed in state.committed:
        counts.update(committed.task().get("examples", {}))
    return dict(counts)


def learn_protected(
    method: Method,
    task: Task,
    reference: Examples | None = None,
    batch_size: int = 64,
    names: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Learn a task under the method's protection, if it has one, and add its features to what is protected.

    Where the protection renews pets, that is done first: it follows from what was committed and from the task alone, so
    a task that is entered again has the same.

    Args:
        method: what learns.
        task: what is learned.
        reference: data without labels, protected before the first step.
        batch_size: of the passes over what is protected.
        names: names whose texts are protected beside the reference.

    Returns:
        The certificates of these passes; none without protection.
    """
    task = method.model.posed(task)
    certificates = _protect_reference(method, task, reference, names, batch_size)
    _renew(method, task, batch_size)
    method.task_begins(task)
    with task.runtime.accompanied(method.companions()):
        method.learn(task)
    if method.protection is None:
        return certificates
    samples = method.protection.config.samples
    examples = task.train if samples == "all" else balanced(task.train, samples, task.generator("protect", "task"))
    texts = method.model.sentences(task.classes, examples) if method.protection.reads_texts else []
    return [*certificates, _protect(method, task, "task", examples, texts, batch_size)]


def _protect_reference(
    method: Method, task: Task, pictures: Examples | None, names: Sequence[str], batch_size: int
) -> list[dict[str, Any]]:
    """Protect what stands for the knowledge of the pretrained model, before anything was protected."""
    protection = method.protection
    reference = None if protection is None else protection.config.reference
    if protection is None:
        return []
    if reference is not None and reference.weights and not protection.consolidated:
        began = time.perf_counter()
        certificate = protection.consolidate_weights(method.model.backbone.whole)
        seconds = round(time.perf_counter() - began, 3)
        return [{"of": "reference", "examples": 0, "seconds": seconds, **certificate}]
    if pictures is None and not names:
        return []
    if pictures is not None and reference is not None and reference.samples != "all":
        pictures = balanced(pictures, reference.samples, task.generator("protect", "reference"))
    texts = method.model.sentences(names) if protection.reads_texts else []
    return [_protect(method, task, "reference", pictures, texts, batch_size)]


def _protect(
    method: Method, task: Task, purpose: str, examples: Examples | None, texts: Sequence[str], batch_size: int
) -> dict[str, Any]:
    """Protect what `method` makes of examples, and of texts that it reads beside them; returns the certificate."""
    protection, run = method.protection, task.runtime
    assert protection is not None
    batches = _Pass(examples, batch_size, run, texts)
    run.progress.phase(f"protect {purpose}", len(batches), 1, 0)
    began = time.perf_counter()
    certificate = protection.consolidate(batches, lambda item: _observe(method, item, run), mask=_mask, total=run.sum)
    seconds = round(time.perf_counter() - began, 3)
    counts = {"examples": 0 if examples is None else len(examples), **({"texts": len(texts)} if texts else {})}
    return {"of": purpose, **counts, "seconds": seconds, **certificate}


def _renew(method: Method, task: Task, batch_size: int) -> None:
    """Renew the pets before the task, once anything is protected and where the protection is to."""
    protection, run = method.protection, task.runtime
    if protection is None or not protection.waiting:
        return
    batches: Iterable[Batch | Sequence[str]] = ()
    if protection.config.start == "leading":
        some = balanced(task.train, LEADING, task.generator("renew", "examples"))
        batches = _Pass(some, batch_size, run)
        run.progress.phase("renew", len(batches), 1, 0)
    protection.renew_pairs(
        task.generator("renew"),
        batches,
        lambda batch: _observe(method, batch, run),
        mask=_mask,
        total=run.sum,
    )


class _Pass:
    """This process's share of some examples and then of some texts, batch by batch, as often as it is gone through."""

    def __init__(self, examples: Examples | None, size: int, run: Runtime, texts: Sequence[str] = ()):
        self.examples, self.size, self.run = examples, size, run
        self.texts = texts[run.rank :: run.world]

    def __len__(self) -> int:
        mine = 0 if self.examples is None else len(range(self.run.rank, len(self.examples), self.run.world))
        return math.ceil(mine / self.size) + math.ceil(len(self.texts) / self.size)

    def __iter__(self) -> Iterator[Batch | Sequence[str]]:
        pictures = () if self.examples is None else evaluation_batches(self.examples, self.size, self.run)
        texts = (self.texts[start : start + self.size] for start in range(0, len(self.texts), self.size))
        items: Iterator[Batch | Sequence[str]] = itertools.chain(pictures, texts)
        for done, item in enumerate(items, 1):
            yield item
            self.run.progress.step(done, 0, None, len(item))
            signum = self.run.stop_requested(due=False)
            if signum is not None:
                raise Interrupted("stopped while features were protected", signum)


def _observe(method: Method, item: Batch | Sequence[str], run: Runtime) -> None:
    with run.autocast():
        if isinstance(item, Batch):
            method.observe(item.inputs)
        else:
            method.observe_texts(item)


def _mask(item: Batch | Sequence[str]) -> Tensor | None:
    """Which tokens of a batch of texts count; a tower that reads texts beside it says that by itself."""
    return item.mask if isinstance(item, Batch) else None


def measure(
    method: Method, tasks: Sequence[Task], how: How, *, limit: Limit | None = None, new: str | None = None
) -> dict[str, Asked]:
    """What came of asking each task, by its name; see `ask`."""
    return {
        t.name: of
        for t, of in zip(tasks, ask(method, tasks, how, limit=limit, new=new, probing=new is not None), strict=True)
    }


def cells_of(asked: Mapping[str, Asked]) -> dict[str, Any]:
    """The counts of each task that was asked, by its name; None where it has no test data."""
    return {name: of.cell for name, of in asked.items() if not of.left_out}


def _limit(step: Step, recipe: Recipe) -> Limit | None:
    """How many examples of earlier tasks are asked if their features have to be computed; None is all."""
    earlier, index = recipe.evaluate.earlier, step.task.index
    if isinstance(earlier, str) or (isinstance(earlier, Every) and (step.last or (index + 1) % earlier.every == 0)):
        return None
    names = [other.name for other in step.others if other.index < index]
    return Limit(names, 0 if isinstance(earlier, Every) else earlier, recipe.seed)


def _turn_begun(step: Step, state: State) -> float | None:
    """The time before which every earlier task that waits for its turn was asked, in seconds; None if none waits."""
    if not step.unasked or not step.others:
        return None
    rounds = 2 + (step.unasked + len(step.others)) // len(step.others)
    committed = state.committed
    return committed[max(0, len(committed) - rounds)].time()


def _drift(
    method: Method, step: Step, state: State, asked: Mapping[str, Asked]
) -> tuple[dict[str, bytes], dict[str, float]]:
    """Features of this task's probe, as a file to store; how far those of earlier tasks have moved since then.

    The distance `‖f̂ − f̂'‖` of normalised features, the mean over a task's probe: 0 where nothing moved, at most 2. If
    what makes the features has the same digest as when the task was learned, it is 0 and they are not looked at.

    Args:
        asked: what came of asking the tasks. Where its answers were made of the features, these are used.
    """
    if step.task.runtime.rank > 0:
        return {}, {}
    moved, before = {}, {c.name: c for c in state.committed}
    for other in step.others:
        if other.name not in before or other.test is None or not len(other.test):
            continue
        made = asked[other.name].made
        if made is not None and before[other.name].has(MADE) and before[other.name].parsed(MADE)["made"] == made:
            moved[other.name] = 0.0
            continue
        known = asked[other.name].probed
        cell = asked[other.name].cell
        numbers, now = known if known is not None else _probed_again(method, other, cell)
        then = before[other.name].read(FEATURES) if now is not None else {}
        if now is None or not then:
            continue
        rows = probe_rows(len(other.test))
        place = {number: row for row, number in enumerate(rows)}
        old = read_tensors(then, FEATURES, other.name)["features"]
        if len(old) == len(rows) and old.shape[1] == now.shape[1]:
            old = old[[place[number] for number in numbers]]
            moved[other.name] = round(float((now - old).norm(dim=-1).mean()), 6)
    known = asked[step.task.name].probed
    own = probe(method, step.task, new=True) if known is None else known[1]
    return ({} if own is None else {FEATURES: save({"features": own.contiguous()})}), moved


def _probed_again(method: Method, task: Task, cell: Mapping[str, Any] | None) -> tuple[list[int], Tensor | None]:
    """The numbers of a task's probe, and their features as they are now; None if nothing may be computed for them.

    Args:
        cell: the counts of the task. Of a sample of the task not more is computed than was asked.
    """
    assert task.test is not None
    rows = probe_rows(len(task.test))
    now = probe(method, task, from_kept=cell is None or "of" in cell)
    if now is None and cell is not None:
        rows = rows[: cell["total"]]
        now = probe(method, task, rows)
    return rows, now


def _tokens(count: int, seconds: float) -> dict[str, float]:
    """How many tokens were trained on, where examples are texts."""
    return {"tokens": count, "tokens_per_s": round(count / seconds, 2)} if count else {}


def _reset_peak(run: Runtime) -> None:
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)


def _peak(run: Runtime) -> int | None:
    """Largest memory so far, in bytes: of the device, or of the process on the CPU; None where it is not told."""
    if run.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(run.device))
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
