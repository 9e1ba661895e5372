"""Verbs that show: report, log, compare; methods, recipes, show, check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from perpetune.cli.lines import lines
from perpetune.cli.options import Json, JsonLines, Set, StateFolder

if TYPE_CHECKING:
    from perpetune.registry import Kind


def report(
    state: StateFolder,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; the state folder by default.")] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN", help="Adds the headroom with this run, or all runs in this folder; may stand several times."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write report.html, report.md and report.json.

    Example: perpetune report birds
    """
    from perpetune.cli.common import print_json
    from perpetune.report import headroom_beside, write_report
    from perpetune.results import read_results
    from perpetune.state import State

    results = read_results(State(state))
    others = [path for given in beside or () for path in _runs(given) if path.resolve() != state.resolve()]
    found = headroom_beside((str(state), results), [(str(path), _results(path)) for path in others]) if beside else []
    written = write_report(results, out or state, found)
    if json:
        print_json({**results, "headroom": found} if beside else results)
        return
    print("\n".join(str(path) for path in written))
    if beside:
        from perpetune.cli.live import show_headroom

        show_headroom(found)


def log(
    state: StateFolder,
    tasks: Annotated[
        bool, typer.Option("--tasks", help="Only the bytes of each task, and to which `rollback` can go.")
    ] = False,
    json: Json = False,
) -> None:
    """Print what happened to a state, event by event, and the bytes of each task.

    Example: perpetune log birds --tasks
    """
    from perpetune.cli.common import print_json
    from perpetune.errors import StateError
    from perpetune.state import State

    opened = State(state)
    events = opened.journal()
    if json:
        print_json(opened.storage() if tasks else events)
        return
    if tasks:
        print("\n".join(_bytes(opened.storage())) or "no task is learned")
        return
    if not events:
        print("nothing has happened yet")
    for event in events:
        print(f"{event.get('time', '')}  {event['event']:<14}  {_facts(event)}")
    try:
        lines = _bytes(opened.storage())
    except StateError as error:  # the log is for those who look for what is wrong
        lines = [f"the bytes of the tasks are not known: {error}"]
    if lines:
        print("\n" + "\n".join(lines))


def _bytes(storage: list[dict[str, Any]]) -> list[str]:
    """A table of what each task takes on the disk: what is in its folder, and what it has in those of earlier tasks."""
    from perpetune.report import form

    if not storage:
        return []
    rows = [["task", "own", "shared", ""]]
    rows += [
        [
            f"{entry['task']:04d}-{entry['name']}",
            form.size(entry["own"]),
            "" if entry["pruned"] else form.size(entry["shared"]),
            f"pruned ({entry['pruned']})" if entry["pruned"] else "",
        ]
        for entry in storage
    ]
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {own:>8}  {shared:>8}  {said}".rstrip() for name, own, shared, said in rows]
    return [*lines, f"{'all':<{width}}  {form.size(sum(entry['own'] for entry in storage)):>8}"]


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="State folders, or their report.json files.")],
    out: Annotated[Path | None, typer.Option(help="Folder for compare.html, .md and .json.")] = None,
    json: JsonLines = False,
) -> None:
    """Put several runs side by side; runs that differ in the seed alone become one row, mean ± std.

    Comparisons that lie among them are passed over: FOLDER/* is all runs in FOLDER.

    Example: perpetune compare runs/turned/* --out runs/compared
    """
    from perpetune.cli.live import show_comparison, show_headroom
    from perpetune.report import compare as compare_runs
    from perpetune.report import is_comparison, write_comparison

    written, named = lines(json), []
    for path in runs:
        if not is_comparison(path):
            named.append((str(path), _results(path)))
            if written is not None:
                written.emit("read", run=str(path))
    table = compare_runs([results for _, results in named], [name for name, _ in named])
    pages = write_comparison(named, out) if out else []
    if written is not None:
        written.emit("done", comparison=table, files=[str(path) for path in pages])
    else:
        show_comparison(table)
        for path in pages:
            print(path)
        show_headroom(table["headroom"])


def methods(json: Json = False) -> None:
    """List what a recipe can name and what fits together: methods, pets, heads, backbones, data; with options.

    Example: perpetune methods --json
    """
    from perpetune import registry
    from perpetune.averages.config import AverageConfig
    from perpetune.cli.common import print_json
    from perpetune.protection.config import ProtectConfig
    from perpetune.recipe import PetSection

    found = {kind: {name: registry.summary(kind, name) for name in registry.names(kind)} for kind in HEADINGS}
    places = registry.described(PetSection, "name")
    for name, about in found["pets"].items():
        at = ", ".join(registry.find("pets", name).default_at)
        about["options"] = {**places, "at": f"[{at}]", **about["options"]}
    protect, average = registry.described(ProtectConfig), registry.described(AverageConfig)
    if json:
        print_json({**found, "protect": protect, "average": average})
        return
    for kind, choices in found.items():
        key, what = HEADINGS[kind]
        print(f"{key}:  {what}")
        for name, about in choices.items():
            print(f"  {name:<10} {about['is']}")
            if about["fits"]:
                print(f"  {'':<10} {about['fits']}")
            _print_options(about["options"])
        print()
    print("protect:  keeps old answers where they are by gradient projection, with any pet; default none")
    _print_options(protect)
    print()
    print("average:  averages the pets over the steps of each task, with any pet; default none")
    _print_options(average)
    print()
    print(FITS)


HEADINGS: dict[Kind, tuple[str, str]] = {  # of what a recipe names
    "methods": ("method", "how the tasks are learned, one after the other"),
    "pets": ("pet", "the small parameters that are added to the frozen model; `pet: none` adds none"),
    "heads": ("head", "from features to classes known by name; `lm` for language models"),
    "selectors": ("select", "which members of a pool act on an example; `method: {name: pool, select: keys}`"),
    "backbones": ("backbone", "the frozen pretrained model, named PREFIX:NAME"),
    "data": ("data", "where the images or texts come from; `stream:` cuts them into tasks"),
    "exams": (
        "exams",
        "questions beside the tasks, before the first and after each; `exams: {NAME: {name: dataset}}`",
    ),
}
FITS = """\
Under each choice stand its options and their defaults. Whatever the lines above do not rule out fits together;
what does not is told before anything is learned. With `pet: none` the head alone is trained.

Change one choice with --set:   perpetune run demo --set head=ncm --set pet.rank=4
See a whole recipe:             perpetune show demo
Your own class goes in as PACKAGE.MODULE:NAME, or as an entry point such as `perpetune.methods`."""


def _print_options(options: dict[str, str]) -> None:
    width = max((len(option) for option in options), default=0)
    for option, value in options.items():
        print(f"  {'':<10}   {option:<{width}}  {value}")


def recipes(json: Json = False) -> None:
    """List the recipes that come with the package.

    Example: perpetune recipes
    """
    from perpetune.cli.common import print_json
    from perpetune.recipe import load_recipe, packaged

    found = {name: load_recipe(name).description for name in packaged()}
    if json:
        print_json(found)
    else:
        width = max(len(name) for name in found)
        print("\n".join(f"{name:<{width}}  {about}" for name, about in found.items()))


def show(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe's name, or a YAML file.")],
    change: Set = None,
    json: Json = False,
) -> None:
    """Print a recipe with every default written out.

    Example: perpetune show demo --set train.epochs=3
    """
    from perpetune.cli.common import print_json
    from perpetune.recipe import load_recipe

    loaded = load_recipe(recipe, change or [])
    if json:
        print_json(loaded.model_dump(mode="json"))
    else:
        print(loaded.to_yaml(), end="")


def check(
    method: Annotated[str, typer.Argument(metavar="PKG.MOD:CLASS", help="A method's class, or a built-in's name.")],
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the method, or head=, pet=, protect=, average=."),
    ] = None,
    on: Annotated[
        Literal["pictures", "texts"] | None, typer.Option(help="This kind alone; else every kind that the method fits.")
    ] = None,
    json: JsonLines = False,
) -> None:
    """Run the contract tests on a method, yours or ours.

    Example: perpetune check finetune --on pictures
    """
    from perpetune.check import Outcome, check_method

    out = lines(json)

    def tell(o: Outcome) -> None:
        if out is not None:
            holds = None if o.left_out else o.fault is None
            out.emit("rule", on=o.on, rule=o.rule, holds=holds, fault=o.fault, left_out=o.left_out or None)
            return
        word = "--  " if o.left_out else "ok  " if o.fault is None else "FAIL"
        why = f"not tested, {o.left_out}" if o.left_out else o.fault
        print(f"{word}  {o.on}: {o.rule}" + (f": {why}" if why else ""), flush=True)

    outcomes = check_method(method, change or [], on, tell)
    broken = sum(o.fault is not None for o in outcomes)
    if out is not None:
        out.emit("done", rules=len(outcomes), broken=broken)
    if broken:
        raise typer.Exit(1)


HIDDEN = {"time", "event", "versions", "fingerprint", "task", "name", "manifest", "manifests", "keep", "frees"}
"""What `log` does not print of an event, or prints elsewhere."""


def _facts(event: dict[str, Any]) -> str:
    """The rest of a journal's line, for people: a task by its folder's name, data by their kind and place."""
    facts = {k: v for k, v in event.items() if k not in HIDDEN}
    told = [f"{event['task']:04d}-{event['name']}"] if {"task", "name"} <= event.keys() else []
    for key, value in facts.items():
        if isinstance(value, dict):
            value = _plain(value)
        told.append(f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return ", ".join(told)


def _plain(value: dict[str, Any]) -> str:
    """An object in the journal: a gate, what was forgotten, or where data came from."""
    if "max_drop" in value:
        return f"max-drop {value['max_drop']:g}"
    if "forget" in value:
        return "what was learned"
    if "tasks" in value:
        return ", ".join(f"{kind} {', '.join(names)}" for kind, names in value.items() if names)
    return " ".join(str(value[key]) for key in ("name", "path") if value.get(key)) or "Python"


def _runs(path: Path) -> list[Path]:
    """The run that `path` is, or the state folders in it."""
    if path.is_file() or (path / "recipe.yaml").is_file():
        return [path]
    found = sorted(folder for folder in path.glob("*") if (folder / "recipe.yaml").is_file())
    return found or [path]  # what is wrong with it is told where it is read


def _results(path: Path) -> dict[str, Any]:
    """The results document of a state folder, or that in a report.json."""
    from perpetune.errors import StateError
    from perpetune.plain import Malformed, read_json
    from perpetune.results import read_results
    from perpetune.state import State

    if not path.is_file():
        return read_results(State(path))
    try:
        document: Any = read_json(path)
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}") from None
    except Malformed:
        document = None
    if not isinstance(document, dict):
        raise StateError(f"{path} holds no results: a state folder, or the report.json of one, is expected")
    return document


VERBS = (report, log, compare, methods, recipes, show, check)
