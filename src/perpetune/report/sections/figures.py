"""The headline figures: accuracy or score, forgetting and transfer, and the costs."""

from __future__ import annotations

from perpetune.report import form
from perpetune.report.blocks import Block, Figure, Figures
from perpetune.report.document import (
    backbone_bytes,
    examples,
    learn_seconds,
    left_out,
    measure,
    peak_memory,
    per_second,
    sampled,
)
from perpetune.report.results_schema import Results
from perpetune.report.sections.storage import stored_bytes

FIGURES = (  # key, label, meaning, whether its sign is always shown
    ("final_accuracy", "Final accuracy", "mean over tasks, after the last task: overall performance, OP", False),
    ("average_accuracy", "Average accuracy", "mean over the tasks seen, then mean over the run", False),
    ("forgetting", "Forgetting", "mean loss per task since its best value", False),
    ("backward_transfer", "Backward transfer", "mean change since learned, over all tasks but the last: BWT", True),
    ("forward_transfer", "Forward transfer", "mean above chance, before a task is learned", True),
    ("pooled_accuracy", "Pooled accuracy", "over all test examples, after the last task", False),
)

ABSENT = {  # the reason why a figure may be missing
    "forgetting": "needs at least two tasks",
    "backward_transfer": "needs at least two tasks",
    "forward_transfer": "needs tasks that are tested before they are learned",
}


def section(results: Results) -> list[Block]:
    return [Figures(large(results), small(results))]


def large(results: Results) -> list[Figure]:
    headline = []
    for key, label, note, signed in figures(measure(results)):
        value = results["metrics"][key]  # type: ignore[literal-required]
        about = _absent(results, key) if value is None else f"{note}; of samples" if sampled(results) else note
        headline.append(Figure(label, figure_text(value, signed), unit(key), about, absent=value is None))
    return headline


def _absent(results: Results, key: str) -> str:
    """The reason why a figure is missing."""
    if key == "pooled_accuracy" and sampled(results):
        return "of earlier tasks only a part was asked"
    if key in ("final_accuracy", "pooled_accuracy") and len(results["cells"]) - 1 in left_out(results):
        return "earlier tasks were not asked after the last one"
    return ABSENT.get(key, "no task is measured yet")


def small(results: Results) -> list[Figure]:
    """The figures below the headline, each with a note about its reference value."""
    trained, backbone = results["trainable_parameters"], results["backbone_parameters"]
    units = (examples(results), "tokens")
    speeds = [per_second(results, "images_per_s"), per_second(results, "tokens_per_s")]
    speed = ", ".join(f"{value:,.0f} {what}/s" for what, value in zip(units, speeds, strict=True) if value)
    share = (
        f"{form.relative(trained, backbone)} of the backbone’s {form.count(backbone)}" if trained is not None else ""
    )
    frozen = f"backbone as float32: {form.size(backbone_bytes(results))}"
    return [
        Figure("Trained parameters", form.count(trained), note=share),
        Figure("Stored", form.size(stored_bytes(results)), note=frozen),
        Figure("Learning time", form.duration(learn_seconds(results)), note=speed),
        Figure("Peak memory", form.size(peak_memory(results)), note=f"on {results['device']}"),
    ]


def figures(measured: str) -> list[tuple[str, str, str, bool]]:
    """`FIGURES` with labels for `measured`, which is `accuracy` or `score`."""
    return [(key, label.replace("accuracy", measured), note, signed) for key, label, note, signed in FIGURES]


def figure_text(value: float | None, signed: bool) -> str:
    return form.points(value) if signed else form.percent(value)


def unit(key: str) -> str:
    """The unit of a figure: percent for accuracies, percentage points for their differences."""
    return "%" if key.endswith("accuracy") else "points"
