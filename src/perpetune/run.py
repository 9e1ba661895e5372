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
from perpetune.evaluate import AMONG, Classes, Setting, evaluate, probe
from perpetune.exams.base import Exam, take_all
from perpetune.methods.base import Method
from perpetune.oracle import Oracle, solve
from perpetune.results import read_results
from perpetune.runtime import Runtime
from perpetune.snapshot import read_tensors
from perpetune.state import MidTask, State, training_digest
from perpetune.tasks import Batch, Examples, Task, balanced, evaluation_batches

LEADING = 256  # examples of a task that say where its pet starts, with protect.start: leading
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


def run(method: Method, steps: Iterable[Step], state: State) -> None:
    """Learn the tasks one after the other, each committed before the next begins."""
    for step in steps:
        learn_task(method, step, state)


def learn_task(method: Method, step: Step, state: State) -> None:
    """Learn one task, evaluate, and store what was learned.

    A crash at any moment leaves the state with this task committed or not begun; checkpoints of
    the open task are in STATE/resume, and entering here again goes on from them.
    """
    task, recipe, run = step.task, state.recipe, step.task.runtime
    main = run.rank == 0
    # A checkpoint is of use only for the same data, training and number of processes.
    fingerprint = f"{step.document['fingerprint']}/{training_digest(recipe)}/{run.world}"
    if main:
        about = {key: step.document[key] for key in ("fingerprint", "from")}
        state.log("task begun", task=task.index, name=task.name, **about)
    about_task, every = (task.index, task.name, fingerprint), recipe.run.checkpoint_every
    with run.accelerator.main_process_first():  # it removes what belongs to another task, before the others look
        run.checkpoints = MidTask(state.folder / "resume", method, about_task, every, writes=main)
    run.progress.task(task.index, task.name, len(task.classes), len(task.train))
    ahead = [f"task {task.name}: {said}" for said in method.notes(task)]
    for note in ahead:
        run.progress.note(note)
    _reset_peak(run)
    begun: dict[str, Any] = {}  # what was measured before the first task
    if task.index == 0:
        exams_before = take_all(step.exams, method, recipe.evaluate.batch_size)
        asked = [task, *step.ahead] if step.future is not None else []
        zero = measure(method, asked, recipe.setting, recipe.evaluate.batch_size, future=step.future)
        begun = {"exams_before": exams_before, "cells_before": zero}
    else:
        first = state.committed[0]
        exams_before = first.document(first.read("metrics.json"), "metrics.json").get("exams_before", {})
    began = time.perf_counter()
    certificates = learn_protected(method, task, step.reference, recipe.evaluate.batch_size, step.names)
    learned = time.perf_counter()
    oracle = solve(method, step.seen, recipe) if step.seen else None
    solved = time.perf_counter()
    size, told = recipe.evaluate.batch_size, recipe.evaluate.told
    cells = measure(method, [*step.others, task], recipe.setting, size, oracle, step.future, told)
    cells |= measure(method, step.ahead, recipe.setting, size, future=step.future)
    examples = _examples_of(task) if step.exams else {}
    exams = take_all(step.exams, method, size, exams_before, _trained(state, examples))
    features, drift = _drift(method, step, state)
    evaluated = time.perf_counter()
    method.task_measured()
    seconds = run.checkpoints.seconds + learned - began
    timings = {
        "learn_s": round(seconds, 3),
        "protect_s": round(sum(c.pop("seconds") for c in certificates), 3),  # a part of `learn_s`
        "evaluate_s": round(evaluated - learned, 3),
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
    said = dict.fromkeys(found["warning"] for found in facts.values() if found.get("warning"))
    warnings = [f"task {task.name}: {warning}" for warning in said]
    for warning in warnings:
        run.progress.note(warning)
    document["warnings"] = [*document["warnings"], *ahead, *warnings]
    found: dict[str, Any] = {"cells": cells, "protection": certificates, "facts": facts, "drift": drift}
    found |= {**begun, "exams": exams}
    metrics = {key: value for key, value in found.items() if value or key == "cells"}
    if main:
        documents = {"task.json": document, "metrics.json": metrics, "timings.json": timings}
        if said := state.commit(task.index, task.name, method, documents, features):
            run.progress.note(said)
    run.accelerator.wait_for_everyone()
    run.checkpoints = None
    run.progress.results(read_results(state))


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
        certificate = protection.consolidate_weights()
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
    method: Method,
    tasks: Iterable[Task],
    setting: Setting,
    batch_size: int,
    oracle: Oracle | None = None,
    future: Classes | None = None,
    told: bool = False,
) -> dict[str, Any]:
    """Counts on the test data of each task, by its name; None where it has none."""
    asked: dict[str, Any] = {"among": AMONG[setting], "batch_size": batch_size, "oracle": oracle}
    return {t.name: evaluate(method, t, **asked, future=future, told=told) for t in tasks}


def _drift(method: Method, step: Step, state: State) -> tuple[dict[str, bytes], dict[str, float]]:
    """Features of this task's probe, as a file to store; how far those of earlier tasks have moved since then.

    The distance `‖f̂ − f̂'‖` of normalised features, the mean over a task's probe: 0 where nothing moved, at most 2.
    """
    if step.task.runtime.rank > 0:
        return {}, {}
    moved, before = {}, {c.name: c for c in state.committed}
    for other in step.others:
        stored = before[other.name].read(FEATURES) if other.name in before else {}
        now = probe(method, other) if stored else None
        then = read_tensors(stored, FEATURES, other.name)["features"] if now is not None else None
        if now is not None and then is not None and now.shape == then.shape:
            moved[other.name] = round(float((now - then).norm(dim=-1).mean()), 6)
    own = probe(method, step.task)
    return ({} if own is None else {FEATURES: save({"features": own.contiguous()})}), moved


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
