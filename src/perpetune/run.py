"""The loop over tasks: learn, evaluate, commit. The one path that `run`, `update`, `resume` and Python share."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from perpetune import drifting
from perpetune.errors import Refused
from perpetune.evaluate import AMONG, Asked, How, Limit, ask
from perpetune.exams.base import take_all
from perpetune.gate import Figures, judge, refusal, unsure
from perpetune.kept import KeptFeatures, kept_features
from perpetune.learning import learn_protected
from perpetune.methods.base import Method
from perpetune.oracle import solve
from perpetune.recipe import Every, Recipe
from perpetune.results import Documents, read_results
from perpetune.runtime import Runtime, Silent
from perpetune.state import MidTask, State, candidate, interrupted, training_digest
from perpetune.step import Step
from perpetune.tasks import Task


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
    the open task are in STATE/resume, and entering here again goes on from them. A task with a gate is learned aside
    (`State.holding` is around it): until the gate has let it through, nothing of the state changes.

    Raises:
        Refused: the gate has not let it through. `method` has learned it all the same.
    """
    task, recipe, run = step.task, state.recipe, step.task.runtime
    run.spent = {}
    kept.used.clear()  # of evaluations between tasks
    main = run.rank == 0
    # A checkpoint is of use only for the same data, training and number of processes.
    fingerprint = f"{step.document['fingerprint']}/{training_digest(recipe)}/{run.world}"
    if main:
        _begin(step, state)
    about_task, every = (task.index, task.name, fingerprint), recipe.run.checkpoint_every
    with run.first():  # it removes what belongs to another task, before the others look
        run.checkpoints = MidTask(_resume(step, state), method, about_task, every, writes=main)
    run.progress.task(task.index, task.name, len(task.classes), len(task.train))
    ahead = [f"task {task.name}: {said}" for said in method.notes(task)]
    for note in ahead:
        run.progress.note(note)
    _reset_peak(run)
    size, among = recipe.evaluate.batch_size, AMONG[recipe.setting]
    begun = _measured_first(method, step, recipe, kept) if task.index == 0 else {}
    first = begun if task.index == 0 else state.committed[0].parsed("metrics.json")
    bound = recipe.evaluate.earlier if step.gate is None else _asked_by_gate(recipe)
    before = None if step.gate is None else _before(method, step, recipe, kept)
    began = run.clock()
    certificates = learn_protected(method, task, step.reference, recipe.evaluate.batch_size, step.names)
    learned = run.clock()
    oracle = solve(method, step.seen, recipe) if step.seen else None
    solved = run.clock()
    how = How(among, size, oracle, step.future, recipe.evaluate.told, each=before is not None)
    examples = _examples_of(task) if step.exams else {}
    with kept.at_work(run.device):
        found = measure(method, [*step.others, task], how, limit=_limit(step, recipe, bound), new=task.name)
        ahead_of = measure(method, step.ahead, How(among, size, future=step.future))
        with run.timed("exams"):
            exams = take_all(step.exams, method, size, first.get("exams_before", {}), _trained(state, examples))
        with run.timed("drift"):
            features, drift = drifting.measured(method, task, step.others, state, found)
            made = found[task.name].made
        gate: dict[str, Any] = {} if before is None else _judged(step, before, found, exams)
        if gate.get("accepted", True):
            kept.settle(_turn_begun(step, state))
    cells = cells_of({**found, **ahead_of})
    left_out = [name for name, asked_of in found.items() if asked_of.left_out]
    evaluated = run.clock()
    method.task_measured()
    protecting = sum(c.pop("seconds") for c in certificates)
    timings = _timings(step, found, protecting, _Times(began, learned, solved, evaluated))
    facts = method.facts()
    said = dict.fromkeys(told["warning"] for told in facts.values() if told.get("warning"))
    behind = [f"task {task.name}: {warning}" for warning in said]
    for note in behind:
        run.progress.note(note)
    document = {"index": task.index, "name": task.name, "classes": list(task.classes), **step.document}
    document |= {"examples": examples} if examples else {}
    document["warnings"] = [*document["warnings"], *ahead, *behind]
    measured: dict[str, Any] = {"cells": cells, "protection": certificates, "facts": facts, "drift": drift}
    measured |= {**begun, "exams": exams, "not_asked": left_out, "unasked": step.unasked, "gate": gate}
    metrics = {key: value for key, value in measured.items() if value or key == "cells"}
    documents = {"task.json": document, "metrics.json": metrics, "timings.json": timings}
    if gate:
        _decide(task.name, gate, documents, state, run)
    done = run.clock()
    if main:
        documents |= {} if made is None else {drifting.MADE: {"made": made}}
        if dropped := state.commit(task.index, task.name, method, documents, {**features, **step.files}):
            run.progress.note(dropped)
    run.wait()
    run.checkpoints = None
    committed = run.clock()
    if getattr(type(run.progress), "results", None) is not Silent.results:  # it grows with the tasks
        run.progress.results(read_results(state))
    if main:  # nothing that is sealed with a commit can say how long it took
        spent = {"commit_s": round(committed - done, 3), "report_s": round(run.clock() - committed, 3)}
        state.log("task timed", task=task.index, name=task.name, **spent)


def _begin(step: Step, state: State) -> None:
    """Say in the journal that a task begins; with a gate, in the candidate's folder, and in the journal once it is
    through."""
    about = {"task": step.task.index, "name": step.task.name, **{k: step.document[k] for k in ("fingerprint", "from")}}
    if step.gate is None:
        if discarded := state.discard_candidate():
            warnings.warn(f"discarded: {discarded}", stacklevel=4)
        state.log("task begun", **about)
        return
    about |= {"gate": {"max_drop": step.gate}}
    candidate.begin(state.folder, about)
    state.log("task begun", **about)


def _resume(step: Step, state: State) -> Path:
    """The folder of the task's checkpoints."""
    return state.folder / "resume" if step.gate is None else state.folder / candidate.FOLDER / candidate.RESUME


def _measured_first(method: Method, step: Step, recipe: Recipe, kept: KeptFeatures) -> dict[str, Any]:
    """What is measured before the first task: the exams, and with `evaluate.future` every task."""
    size, run = recipe.evaluate.batch_size, step.task.runtime
    with kept.at_work(run.device):
        exams = take_all(step.exams, method, size)
        asked = [step.task, *step.ahead] if step.future is not None else []
        zero = measure(method, asked, How(AMONG[recipe.setting], size, future=step.future))
    return {"exams_before": exams, "cells_before": cells_of(zero)}


@dataclass(frozen=True)
class _Times:
    """When a task began to be learned, when it was learned, the oracle solved, and all evaluated; in seconds."""

    began: float
    learned: float
    solved: float
    evaluated: float


def _timings(step: Step, found: Mapping[str, Asked], protecting: float, times: _Times) -> dict[str, Any]:
    """How long a task took, part by part.

    Args:
        found: what came of asking it and the others after it was learned.
        protecting: seconds of the passes of protection.
    """
    run, name = step.task.runtime, step.task.name
    assert run.checkpoints is not None
    seconds = run.checkpoints.seconds + times.learned - times.began
    earlier = sum(asked_of.seconds for other, asked_of in found.items() if other != name)
    return {
        "prepare_s": round(step.prepared, 3),
        "learn_s": round(seconds, 3),
        "statistics_s": round(run.spent.get("statistics", 0.0), 3),  # a part of `learn_s`, or of `oracle_s`
        "protect_s": round(protecting, 3),  # a part of `learn_s`
        "evaluate_s": round(times.evaluated - times.learned, 3),
        "new_s": round(found[name].seconds, 3),  # this and the following ones are parts of `evaluate_s`
        "earlier_s": round(earlier, 3),
        "drift_s": round(run.spent["drift"], 3),
        **({"exams_s": round(run.spent["exams"], 3)} if step.exams else {}),
        **({"oracle_s": round(times.solved - times.learned, 3)} if step.seen else {}),  # a part of `evaluate_s`
        "images": run.checkpoints.images,
        "images_per_s": round(run.checkpoints.images / seconds, 2) if run.checkpoints.images else None,
        **_tokens(run.checkpoints.tokens, seconds),
        "peak_memory_bytes": _peak(run),
        "device": str(run.device),
    }


@dataclass(frozen=True)
class _Before:
    """What the model knew before a task."""

    tasks: dict[str, Asked]
    exams: dict[str, dict[str, float]]


def _before(method: Method, step: Step, recipe: Recipe, kept: KeptFeatures) -> _Before:
    size, earlier = recipe.evaluate.batch_size, _earlier(step)
    how = How(AMONG[recipe.setting], size, future=step.future, each=True)
    with kept.at_work(step.task.runtime.device):
        tasks = measure(method, earlier, how, limit=_limit(step, recipe, _asked_by_gate(recipe)))
        return _Before(tasks, take_all(step.exams, method, size))


def _earlier(step: Step) -> list[Task]:
    return [other for other in step.others if other.index < step.task.index]


def _asked_by_gate(recipe: Recipe) -> Literal["auto", "all"] | int | Every:
    """`evaluate.earlier` where a gate asks: also where no earlier task would be asked this time."""
    earlier = recipe.evaluate.earlier
    return "all" if isinstance(earlier, Every) else earlier


def _judged(step: Step, before: _Before, found: Mapping[str, Asked], exams: Figures) -> dict[str, Any]:
    """What the gate says of a task that is not the first one; the first one has nothing before it."""
    assert step.gate is not None
    if not step.task.index:
        return {}
    questions = {exam.name: len(exam.task.test or ()) for exam in step.exams}
    return judge(step.gate, before.tasks, found, before.exams, exams, questions)


def _decide(name: str, gate: Mapping[str, Any], documents: Documents, state: State, run: Runtime) -> None:
    """Go on where the gate lets a task through.

    Raises:
        Refused: it does not.
    """
    main = run.rank == 0
    if few := unsure(name, gate):
        run.progress.note(few)
    if not gate["accepted"]:
        now, then = read_results(state), read_results(state, documents)
        if main:
            candidate.drop(state.folder)
        raise Refused(refusal(name, gate), dict(gate), now, then)
    if main and (discarded := interrupted(state.folder / "resume")):
        warnings.warn(f"discarded: {discarded}", stacklevel=4)


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
        known = committed.classes()
        counts.update({name: n for name, n in committed.task().get("examples", {}).items() if name in known})
    return dict(counts)


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


def _limit(step: Step, recipe: Recipe, earlier: Literal["auto", "all"] | int | Every) -> Limit | None:
    """How many examples of earlier tasks are asked if their features have to be computed; None is all."""
    index = step.task.index
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
