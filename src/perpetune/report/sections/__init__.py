"""The sections of a run's report, one file for each, and the sections of other packages.

A section is a function, or another callable, that takes the results document and returns blocks, or None where the
document has nothing for it. The sections of perpetune stand in `registry.BUILTIN`, in the order of the page; other
packages name theirs under the entry point `perpetune.sections`. If a section of another package fails, the report is
whole, and one line in the section's place says why.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from perpetune.report import html, markdown, terminal
from perpetune.report.blocks import Block, Brief, Heading, Section, Text
from perpetune.report.results_schema import Results

Draft = Callable[[Results], Sequence[Block] | None]
F = TypeVar("F", bound=Callable[..., Any])

BEHIND = "drift"  # the sections of other packages follow this one


def reads(*kinds: str) -> Callable[[F], F]:
    """A decorator that says which kinds of facts a section reads. `Method.facts` gives the facts after each task.

    The section's document holds the facts of these kinds alone. The sections that name no kind, `heads` among them, get
    the facts that no section reads.
    """

    def mark(section: F) -> F:
        section.kinds = kinds  # type: ignore[attr-defined]
        return section

    return mark


def collect(results: Results) -> list[Section]:
    """The sections of a run's report, in order, without those that have nothing to show.

    Args:
        results: the document; it has `headroom` if the run is compared with other runs.
    """
    from perpetune import registry  # imported here, because it loads torch, which a comparison does not need

    own = list(registry.BUILTIN["sections"])
    others = [name for name in registry.names("sections") if name not in own]
    place = own.index(BEHIND) + 1
    drafts = {name: _load(name, name in own) for name in [*own[:place], *others, *own[place:]]}
    read = [kind for draft in drafts.values() for kind in _kinds(draft)]
    sections = []
    for name, draft in drafts.items():
        document = _with_facts(results, _kinds(draft), read)
        blocks = draft(document) if name in own else _tried(name, draft, copy.deepcopy(document))
        if blocks:
            sections.append(Section(name, blocks))
    return sections


def _load(name: str, own: bool) -> Draft:
    """The section of that name. If another package's section cannot be loaded, a section that fails with the reason."""
    from perpetune import registry

    try:
        return registry.find("sections", name)  # type: ignore[no-any-return]
    except Exception as error:
        if own:
            raise
        return functools.partial(_fail, error)


def _fail(error: Exception, results: Results) -> None:
    raise error


def _tried(name: str, draft: Draft, results: Results) -> Sequence[Block] | None:
    """The blocks of another package's section, after each kind of output has drawn them; one line if this fails."""
    try:
        blocks = list(draft(results) or ())
        section = Section(name, blocks)
        html.section(section), markdown.section(section)
        terminal.summary([section]), terminal.after_task([section]), terminal.short_line([section])
    except Exception as error:  # noqa: BLE001  somebody's section may fail in any way; the report is worth more
        why = f"section {name} failed: {type(error).__name__}: {' '.join(str(error).split())}"
        return [Heading(name), Text(why), Brief("report", why, warning=True)]
    return blocks


def _kinds(draft: Draft) -> Collection[str]:
    return getattr(draft, "kinds", ())


def _with_facts(results: Results, own: Collection[str], read: Collection[str]) -> Results:
    """The document for a section: with the facts of its `own` kinds; if it has no kinds, with facts that none reads."""

    def wanted(facts: dict[str, Any]) -> bool:
        return facts.get("kind") in own if own else facts.get("kind") not in read

    if "facts" not in results:
        return results
    kept = [
        {**entry, "of": {name: facts for name, facts in entry["of"].items() if wanted(facts)}}
        for entry in results["facts"]
    ]
    return {**results, "facts": kept}  # type: ignore[typeddict-item]
