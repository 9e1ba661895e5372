"""The section about reproduction: the run's recipe, and the versions of the packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perpetune.report.blocks import Block, Code, Column, Columns, Heading, Pair, Panel, Table, Text
from perpetune.report.results_schema import Results


def section(results: Results) -> list[Block]:
    seed, versions = results["seed"], results["versions"]
    note = f"Save the recipe as recipe.yaml. It has every default written out, and the seed ({seed})."
    columns: Columns = [Column("package", left=True), "version"]
    return [
        Heading("How to reproduce"),
        Text(note),
        Panel([Code(f"pip install {requirements(versions)}\nperpetune run recipe.yaml", "sh")]),
        Pair(
            [
                Panel([Code(recipe_yaml(results["recipe"]), "yaml")], "Recipe", "recipe.yaml"),
                Panel([Table(columns, list(versions.items()))], "Versions", "of the packages in this run"),
            ]
        ),
    ]


def requirements(versions: dict[str, str]) -> str:
    """The versions as requirements for pip, without `python` and without local suffixes such as `+cpu`."""
    return " ".join(f"{name}=={v.partition('+')[0]}" for name, v in versions.items() if name != "python")


def recipe_yaml(recipe: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)
