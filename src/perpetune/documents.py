"""The JSON documents of a state folder: which fields each has, of which type. They are checked when they are read."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from perpetune.errors import StateError
from perpetune.plain import Malformed, parse_json

Count = Annotated[int, Field(ge=0, le=2**53)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
ROUNDING = 1e-3  # how much a sum of rounded scores may be over what it is compared with


class Document(BaseModel):
    """Fields that nobody knows are allowed: a later version or a plug-in may write them."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, populate_by_name=True)


class File(Document):
    """One file in `manifest.json`."""

    bytes: Count
    sha256: Sha256


class Backbone(Document):
    """`backbone.json`."""

    spec: str
    fingerprint: str
    examples: str | None = None
    parameters: Count | None = None
    trainable_parameters: Count | None = None
    date: str | None = None
    plain: dict[str, Any] | None = None


class Contents(Document):
    """A sample of the hashes of a task's examples (`data.sketch`)."""

    count: Count
    hashes: Annotated[str, Field(pattern="^([0-9a-f]{16})*$", max_length=2**16)]


class Task(Document):
    """`task.json` of a committed task."""

    index: Count
    name: str
    classes: list[str]
    train: Count
    validation: Count = 0
    test: Count
    origin: str | dict[str, Any] = Field(alias="from")
    fingerprint: str
    bad: list[str]
    warnings: list[str]
    contents: Contents | None = None
    examples: dict[str, Count] = {}
    forgot: dict[str, list[str]] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Task:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("a class stands twice in classes")
        if isinstance(self.origin, dict):
            name, holdout = self.origin.get("name"), self.origin.get("holdout", 0.0)
            if not (name is None or isinstance(name, str)):
                raise ValueError("from.name is no name of a data source")
            if isinstance(holdout, bool) or not isinstance(holdout, int | float) or not 0 <= holdout < 1:
                raise ValueError("from.holdout is no share from 0 to 1")
            if name is not None and "holdout" not in self.origin:
                raise ValueError("from.holdout is missing")
        return self


class Oracle(Document):
    correct: Amount
    head: str


class Cell(Document):
    """Counts on the test data of one task."""

    correct: Amount
    total: Count
    per_class: dict[str, Annotated[list[Amount], Field(min_length=2, max_length=2)]]
    score: str | None = None
    others: dict[str, Amount] = {}
    gauges: dict[str, float] = {}
    oracle: Oracle | None = None
    gates: dict[str, Annotated[list[Count], Field(min_length=2, max_length=2)]] = {}
    goes_to: dict[str, Count] = {}
    members: dict[str, Count] = {}
    told: Amount | None = None
    of: Count | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Cell:
        if self.of is not None and self.of <= self.total:
            raise ValueError(f"it is of a sample, {self.total} of {self.of} examples, and that is no part of them")
        right = {"correct": self.correct, **{f"others.{name}": n for name, n in self.others.items()}}
        right |= {"oracle.correct": self.oracle.correct} if self.oracle else {}
        right |= {"told": self.told} if self.told is not None else {}
        for name, n in right.items():
            if n > self.total + ROUNDING:
                raise ValueError(f"{name} is {n:g}, and there are {self.total} examples")
        for name, (yes, correct) in self.gates.items():
            if not correct <= yes <= self.total:
                raise ValueError(f"gates.{name}: {correct} right of {yes}, and there are {self.total} examples")
        if sum(self.goes_to.values()) > self.total:
            raise ValueError(f"goes_to counts more answers than there are examples, {self.total}")
        for name, (n, of) in self.per_class.items():
            if n > of + ROUNDING:
                raise ValueError(f"per_class.{name}: {n:g} right answers of {of:g}")
        if sum(of for _, of in self.per_class.values()) > self.total:
            raise ValueError(f"the classes have more examples than the task, which has {self.total}")
        return self


class Metrics(Document):
    """`metrics.json` of a committed task."""

    cells: dict[str, Cell | None]
    cells_before: dict[str, Cell | None] = {}
    protection: list[dict[str, Any]] = []
    facts: dict[str, dict[str, Any]] = {}
    drift: dict[str, Amount] = {}
    exams: dict[str, dict[str, float]] = {}
    exams_before: dict[str, dict[str, float]] = {}
    not_asked: list[str] = []
    unasked: Count = 0
    gate: dict[str, Any] = {}


class Features(Document):
    """`features.json` of a committed task: a digest of all that made the features of its test examples."""

    made: str


class Timings(Document):
    """`timings.json` of a committed task."""

    prepare_s: Amount = 0.0
    learn_s: Amount
    statistics_s: Amount = 0.0
    protect_s: Amount = 0.0
    evaluate_s: Amount
    new_s: Amount = 0.0
    earlier_s: Amount = 0.0
    drift_s: Amount = 0.0
    exams_s: Amount = 0.0
    oracle_s: Amount = 0.0
    images: Count
    images_per_s: Amount | None = None
    tokens: Count = 0
    tokens_per_s: Amount = 0.0
    peak_memory_bytes: Count | None = None
    device: str = ""


class Pieces(Document):
    """The parts of one file in `tensors.json`, in their order: of each its hash, its size, and whose pack holds it."""

    sha256: list[Sha256]
    bytes: list[Count]
    task: list[Count]


class TensorFile(Document):
    """One file in `tensors.json`. It has no pieces once it was pruned."""

    bytes: Count
    pieces: Pieces | None = None

    @model_validator(mode="after")
    def _agrees(self) -> TensorFile:
        if self.pieces is not None:
            sizes = self.pieces.bytes
            if not len(self.pieces.sha256) == len(sizes) == len(self.pieces.task):
                raise ValueError("pieces: the lists are not of one length")
            if sum(sizes) != self.bytes:
                raise ValueError(f"the pieces have {sum(sizes)} bytes together, and the file has {self.bytes}")
        return self


class AtRest(Document):
    """How many bytes the sets at rest of a task have: all of them, and those that other tasks store."""

    bytes: Count
    elsewhere: Count


class Tensors(Document):
    """`tensors.json` of a committed task."""

    files: dict[str, TensorFile]
    at_rest: AtRest | None = None
    rest: dict[str, Annotated[list[Count], Field(min_length=2, max_length=2)]] = {}
    """Of each set at rest, the number of the task that stores it, and its bytes; as older versions wrote it."""


class Position(Document):
    """`position.json` of a checkpoint."""

    done: Count | None
    seconds: Amount
    images: Count
    tokens: Count = 0
    scaler: dict[str, Any] | None


class Optimizer(Document):
    """`optimizer.json` of a checkpoint."""

    groups: list[dict[str, Any]]
    plain: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], dict[str, Any]]


class RunBegun(Document):
    versions: dict[str, str] = {}
    device: str = ""
    seed: Count = 0
    tasks: Count | None = None


class Gated(Document):
    """What a gated update was asked for with."""

    max_drop: Amount


class TaskBegun(Document):
    task: Annotated[int, Field(ge=0, le=10**6)]
    name: str
    fingerprint: str = ""
    origin: str | dict[str, Any] = Field("", alias="from")
    gate: Gated | None = None


class Candidate(TaskBegun):
    """`candidate.json`: a task that is being learned aside, until the gate has decided."""

    gate: Gated


class Forgot(Document):
    """What an entry of the journal took out of the state again."""

    tasks: list[str]
    classes: list[str]


class TaskCommitted(Document):
    task: Annotated[int, Field(ge=0, le=10**6)]
    name: str
    manifest: Sha256 | None = None
    frees: Count | None = None
    oldest: Count = 0
    by: str = ""
    forgot: Forgot | None = None


class TaskTimed(Document):
    """How long the commit of a task and the report after it took: the task's own files are sealed by then."""

    task: Annotated[int, Field(ge=0, le=10**6)]
    name: str
    commit_s: Amount
    report_s: Amount


class RollbackBegun(Document):
    to: str
    keep: Count


class RolledBack(Document):
    to: str
    dropped: list[str]
    keep: Count | None = None


class TasksSealed(Document):
    manifests: list[Sha256]


class PruneBegun(Document):
    oldest: Count
    by: str


class PruneWritten(Document):
    tasks: list[Count]
    manifests: list[Sha256]
    oldest: Count

    @model_validator(mode="after")
    def _agrees(self) -> PruneWritten:
        if len(self.tasks) != len(self.manifests):
            raise ValueError("tasks and manifests are not of one length")
        return self


class Pruned(Document):
    oldest: Count


EVENTS: dict[str, type[Document]] = {
    "run begun": RunBegun,
    "task begun": TaskBegun,
    "task committed": TaskCommitted,
    "task timed": TaskTimed,
    "rollback begun": RollbackBegun,
    "rolled back": RolledBack,
    "tasks sealed": TasksSealed,
    "prune begun": PruneBegun,
    "prune written": PruneWritten,
    "pruned": Pruned,
}
"""The events of `journal.jsonl`; others may be there too."""


def read_document(kind: type[Document], content: bytes, where: str, cure: str) -> dict[str, Any]:
    """The object in a JSON file of a state, once it is known to be of `kind`.

    Args:
        where: names the file.
        cure: what the user can do.

    Raises:
        StateError: not JSON, or not of this kind; the message names the file and the field.
    """
    try:
        plain = parse_json(content, finite=True)
    except Malformed as error:
        raise StateError(f"{where} is not valid JSON ({error}): {cure}") from None
    return check_document(kind, plain, where, cure)


def check_document(kind: type[Document], plain: Any, where: str, cure: str) -> dict[str, Any]:
    """`plain`, once it is known to be of `kind`; errors as of `read_document`."""
    if not isinstance(plain, dict):
        raise StateError(f"{where} holds a {type(plain).__name__}; a JSON object is expected: {cure}")
    if fault := fault_of(kind, plain):
        raise StateError(f"{where}: {fault}: {cure}")
    return plain


def fault_of(kind: type[Document], plain: dict[str, Any]) -> str:
    """What is wrong with a document, in one line; empty where nothing is."""
    try:
        kind.model_validate(plain)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:80]
        what = " ".join(first["msg"].removeprefix("Value error, ").split())
        found = "" if first["type"] in ("missing", "value_error") else f", got {_short(first['input'])}"
        return f"{place}: {what}{found}" if place else f"{what}{found}"
    return ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
