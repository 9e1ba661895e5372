"""Verbs that show: report, log, compare; methods, recipes, show, check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perpetune.cli.learn import Json, Set, StateFolder


def report(
    state: StateFolder,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; the state folder by default.")] = None,
    json: Json = False,
) -> None:
    """Write report.html, report.md and report.json."""
    from perpetune.cli.common import print_json
    from perpetune.report import write_report
    from perpetune.results import read_results
    from perpetune.state import State

    results = read_results(State(state))
    written = write_report(results, out or state)
    if json:
        print_json(results)
    else:
        print("\n".join(str(path) for path in written))


def log(state: StateFolder, json: Json = False) -> None:
    """Print what happened to a state, event by event."""
    from perpetune.cli.common import print_json
    from perpetune.state import State

    events = State(state).journal()
    if json:
        print_json(events)
        return
    for event in events:
        facts = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "event", "versions", "fingerprint"))
        print(f"{event['time']}  {event['event']}: {facts}")


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="State folders, or their report.json files.")],
    out: Annotated[Path | None, typer.Option(help="Folder for compare.html, .md and .json.")] = None,
    json: Json = False,
) -> None:
    """Put several runs side by side; runs that differ in the seed alone become one row, mean ± std."""
    from perpetune.cli.common import print_json
    from perpetune.cli.live import show_comparison
    from perpetune.report import compare as compare_runs
    from perpetune.report import write_comparison
    from perpetune.results import read_results
    from perpetune.state import State

    named = [(str(path), read_results(State(path))) for path in runs]
    table = compare_runs([results for _, results in named])
    written = write_comparison(named, out) if out else []
    if json:
        print_json(table)
    else:
        show_comparison(table)
        for path in written:
            print(path)


def methods(json: Json = False) -> None:
    """List what a recipe can name: methods, pets, heads, backbones, data, with their options."""
    from perpetune import registry
    from perpetune.cli.common import print_json

    found = {kind: {name: registry.summary(kind, name) for name in registry.names(kind)} for kind in registry.BUILTIN}
    if json:
        print_json(found)
        return
    for kind, choices in found.items():
        print(f"{kind}:")
        for name, about in choices.items():
            print(f"  {name:<10} {about['is']}")
            for option, default in about["options"].items():
                print(f"  {'':<10}   {option}: {default}")


def recipes(json: Json = False) -> None:
    """List the recipes that come with the package."""
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
    """Print a recipe with every default written out."""
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
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the method, or head=NAME, pet=NAME.")
    ] = None,
    json: Json = False,
) -> None:
    """Run the contract tests on a method, yours or ours."""
    from perpetune.check import check_method
    from perpetune.cli.common import print_json

    outcomes = check_method(method, change or [])
    if json:
        print_json([{"rule": o.rule, "holds": o.fault is None, "fault": o.fault} for o in outcomes])
    else:
        for o in outcomes:
            print(f"{'ok  ' if o.fault is None else 'FAIL'}  {o.rule}" + (f": {o.fault}" if o.fault else ""))
    if any(o.fault is not None for o in outcomes):
        raise typer.Exit(1)


VERBS = (report, log, compare, methods, recipes, show, check)
