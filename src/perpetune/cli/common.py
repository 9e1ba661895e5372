"""Functions that several verbs use."""

from __future__ import annotations

import json
from typing import Any

from perpetune.cli.output import encodable


def print_json(value: Any) -> None:
    """Print a value as JSON. Letters that the output's encoding lacks become JSON's own escapes, so no name changes."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print(text if encodable(text) else json.dumps(value, indent=2))
