"""The schema of the lines that long verbs write with `--json`. docs/json.md tells users of it, and tests check both.

Each class is the rest of a line beside its key `event`. A key that is `NotRequired` is absent where it says nothing.
"""

from __future__ import annotations

from typing import Any

from typing_extensions import NotRequired, TypedDict

FORBID = {"extra": "forbid"}  # for pydantic, with which the tests read lines


class Note(TypedDict):
    """What a person should know: something was guessed, left out or cut."""

    message: str
    run: NotRequired[str]


class Task(TypedDict):
    """A task begins. `classes` and `examples` are numbers; `index` counts from 0."""

    index: int
    name: str
    classes: int
    examples: int


class Phase(TypedDict):
    """A pass of training begins, at step `done` of `steps`."""

    phase: str
    steps: int
    epochs: int
    done: int


class Step(TypedDict):
    """How far the pass is: at most one line a second. `loss` is null until one is known; `epoch` counts from 0."""

    phase: str
    done: int
    steps: int
    epoch: int
    loss: float | None
    examples_per_s: float


class Learned(TypedDict):
    """A task was learned, tested and committed. `accuracy` is that on its own test data; null without them."""

    index: int
    name: str
    accuracy: float | None
    final_accuracy: float | None
    average_accuracy: float | None
    forgetting: float | None
    run: NotRequired[str]


class Refused(TypedDict):
    """The gate refuses an update: what it has measured, the results document as it is and as it would be, and the page
    about what was learned; null if it could not be written."""

    gate: dict[str, Any]
    state: dict[str, Any]
    candidate: dict[str, Any]
    report: str | None


class Run(TypedDict):
    """One of several runs has ended: with its figures, or with the reason why it failed."""

    run: str
    folder: str
    message: NotRequired[str]
    final_accuracy: NotRequired[float | None]
    average_accuracy: NotRequired[float | None]
    forgetting: NotRequired[float | None]


class Read(TypedDict):
    """The results of a run were read, to compare them."""

    run: str


class Class(TypedDict):
    name: str
    probability: float


class Prediction(TypedDict):
    """The classes of a picture, the likeliest first."""

    image: str
    classes: list[Class]


class Answer(TypedDict):
    """A language model's answer. `options` has probabilities by option, `cut` the number of tokens that were cut off,
    `left_out` what the chat template leaves out."""

    prompt: Any
    answer: str
    options: NotRequired[dict[str, float]]
    cut: NotRequired[int]
    left_out: NotRequired[list[str]]


class Found(TypedDict):
    """A picture that the text describes, the best one first."""

    image: str
    score: float


class Unreadable(TypedDict):
    """A picture that cannot be read, and why."""

    message: str


class Evaluated(TypedDict):
    """The counts of a task on its test data; null without them."""

    name: str
    cell: dict[str, Any] | None


class File(TypedDict):
    """A file was written, or has arrived from the hub."""

    path: str
    bytes: int


class Rule(TypedDict):
    """Whether a method keeps a promise. `holds` is null if it was left out, for the reason in `left_out`."""

    on: str
    rule: str
    holds: bool | None
    fault: str | None
    left_out: str | None


class Serving(TypedDict):
    """The service answers at `url`, with the model after `state` tasks, the last of which is `task`."""

    url: str
    state: int
    task: str | None


class Taken(TypedDict):
    """A commit or a rollback was taken up: from now on this state answers."""

    state: int
    task: str | None


class Behind(TypedDict):
    """The newest commit cannot be read, so the service goes on with the one before."""

    message: str


class Failed(TypedDict):
    """The last line of a verb that ended with an error: the line on standard error, and the exit code."""

    message: str
    code: int


EVENTS: dict[str, type] = {
    "note": Note,
    "task": Task,
    "phase": Phase,
    "step": Step,
    "learned": Learned,
    "refused": Refused,
    "run": Run,
    "read": Read,
    "prediction": Prediction,
    "answer": Answer,
    "found": Found,
    "unreadable": Unreadable,
    "evaluated": Evaluated,
    "file": File,
    "rule": Rule,
    "serving": Serving,
    "taken": Taken,
    "behind": Behind,
    "failed": Failed,
}


class Results(TypedDict):
    """`results` is the document of report.json; null if nothing is learned yet."""

    results: dict[str, Any] | None
    report: str | None


class Month(TypedDict):
    """What the data of an update hold (`Learner.month`)."""

    month: dict[str, Any]


class Compared(TypedDict):
    """`comparison` is the document of comparison.json, null without a complete run; `failed` names runs."""

    comparison: dict[str, Any] | None
    failed: NotRequired[list[str]]
    files: NotRequired[list[str]]


class Predicted(TypedDict):
    """How many pictures were answered."""

    predictions: int


class Answered(TypedDict):
    """How many prompts were answered."""

    answers: int


class FoundAll(TypedDict):
    """How many pictures were found."""

    found: int


class EvaluatedAll(TypedDict):
    """The counts of each task by its name."""

    cells: dict[str, dict[str, Any] | None]


class Exported(TypedDict):
    """The paths of all files."""

    files: list[str]


class Pruned(TypedDict):
    """The tasks that the state can no longer go back to, those that it can, and the bytes that came free."""

    dropped: list[str]
    kept: list[str]
    bytes: int
    dry_run: bool


class Estimated(TypedDict):
    """What a run or an update will take; docs/estimate.md has the fields."""

    estimate: dict[str, Any]


class Pushed(TypedDict):
    """What was sent to the repository, or would be; `commit` is null where nothing was."""

    repo: str
    url: str
    private: bool
    commit: str | None
    files: int
    bytes: int
    unchanged: int
    removed: int
    dry_run: bool


class Pulled(TypedDict):
    """What came over the network, and the tasks that are new in `folder`."""

    repo: str
    commit: str
    folder: str
    files: int
    bytes: int
    tasks: list[str]


class Checked(TypedDict):
    """How many rules were tried, and how many are broken."""

    rules: int
    broken: int


class Stopped(TypedDict):
    """Every request is answered, and no more are taken."""


DONE: dict[str, tuple[type, ...]] = {
    "run": (Results, Compared),
    "init": (Results,),
    "update": (Results, Month),
    "resume": (Results,),
    "forget": (Results,),
    "predict": (Predicted, Answered),
    "find": (FoundAll,),
    "evaluate": (EvaluatedAll,),
    "export": (Exported,),
    "prune": (Pruned,),
    "estimate": (Estimated,),
    "push": (Pushed,),
    "pull": (Pulled,),
    "compare": (Compared,),
    "check": (Checked,),
    "serve": (Stopped,),
}
"""The last line, `done`, of each verb."""

for _kind in (*EVENTS.values(), *(kind for kinds in DONE.values() for kind in kinds), Class):
    _kind.__pydantic_config__ = FORBID  # type: ignore[attr-defined]
