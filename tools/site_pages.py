"""A hook of mkdocs: the pages of the site that are made of other files and of the program, not written by hand.

`reference/cli.md` gets the help of each verb, `changelog.md` is CHANGELOG.md, `examples.md` shows the scripts of
examples/. Links to files outside docs/, which work on the repository's host, lead to these pages.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
VERBS = "<!-- verbs -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no file in docs/."""
    for name, content in {"changelog.md": changelog(), "examples.md": examples()}.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put the verbs in their place, and lead links out of docs/ to pages of the site."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\((?:\.\./)+examples/(\w+)\.py\)", rf"]({up}examples.md#\1py)", markdown)
    markdown = re.sub(r"\]\((?:\.\./)+CHANGELOG\.md\)", f"]({up}changelog.md)", markdown)
    return markdown.replace(VERBS, verbs()) if VERBS in markdown else markdown


def changelog() -> str:
    """CHANGELOG.md, with its links from the site's root."""
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")


def examples() -> str:
    """Each script of examples/ under its name, with its first paragraph as text."""
    parts = ["# Example scripts", "These scripts run in the tests. They need no network and no GPU."]
    for path in sorted((ROOT / "examples").glob("*.py")):
        code = path.read_text(encoding="utf-8")
        about = ast.get_docstring(ast.parse(code)) or ""
        parts += [f"## {path.name}", about, f"```python\n{code.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def verbs() -> str:
    """The help of each verb of the command line, from the program itself."""
    import typer
    from typer.cli import get_docs_for_click

    from perpetune.cli import app

    group: Any = typer.main.get_command(app)
    for command in group.commands.values():
        command.short_help = (command.help or "").partition("\n\n")[0].replace("\n", " ")  # in whole, not 45 letters
    context: Any = typer.Context(group, info_name="perpetune")
    with context:
        return get_docs_for_click(obj=group, ctx=context, name="perpetune", indent=1)
