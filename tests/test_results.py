"""A results document is a dict whose table of cells is made when it is read, in whichever way."""

from __future__ import annotations

import copy
import json
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from perpetune.results import Results, _Found, _square

WHOLE = {"name": "x", "cells": [[1, None], [2, 3]], "metrics": {"final": 0.5}}


def fresh(made: list[int] | None = None) -> Results:
    def cells() -> list[list[Any]]:
        if made is not None:
            made.append(1)
        return [list(row) for row in WHOLE["cells"]]  # type: ignore[attr-defined]

    return Results({**WHOLE, "cells": "not made"}, cells)


def via_update(results: Results) -> dict[str, Any]:
    found: dict[str, Any] = {"cells": "before"}
    found.update(results)
    return found


WAYS: dict[str, Callable[[Results], Any]] = {
    "index": lambda r: {**WHOLE, "cells": r["cells"]},
    "get": lambda r: {**WHOLE, "cells": r.get("cells")},
    "dict": dict,
    "stars": lambda r: {**r},
    "keywords": lambda r: (lambda **given: given)(**r),
    "items": lambda r: dict(r.items()),
    "items backwards": lambda r: dict(reversed(r.items())),
    "values": lambda r: dict(zip(r.keys(), r.values(), strict=True)),
    "keys": lambda r: {key: r[key] for key in r},
    "copy": lambda r: r.copy(),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda r: pickle.loads(pickle.dumps(r)),
    "json": lambda r: json.loads(json.dumps(r)),
    "json, indented": lambda r: json.loads(json.dumps(r, indent=1)),
    "json, inside": lambda r: json.loads(json.dumps([r]))[0],
    "or": lambda r: r | {},
    "or, on the right": lambda r: {"cells": "before"} | r,
    "update": via_update,
    "repr": lambda r: eval(repr(r)),
    "pop": lambda r: {**WHOLE, "cells": r.pop("cells")},
    "setdefault": lambda r: {**WHOLE, "cells": r.setdefault("cells", "other")},
    "itself": lambda r: r,
    "match": lambda r: {**WHOLE, "cells": _matched(r)},
}


def _matched(results: Any) -> Any:
    match results:
        case {"cells": cells}:
            return cells


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_whole(way: str) -> None:
    found = WAYS[way](fresh())
    assert found == WHOLE
    assert operator.eq(WHOLE, found)
    assert not operator.ne(found, WHOLE)
    assert found != {**WHOLE, "cells": []}  # the control


def test_two_documents_are_compared_as_wholes() -> None:
    assert fresh() == fresh()
    assert fresh() != Results(WHOLE, list)


def test_changes_stay() -> None:
    for change in (
        lambda r: r.__setitem__("cells", 1),
        lambda r: r.update(cells=1),
        lambda r: r.__ior__({"cells": 1}),
    ):
        results = fresh()
        change(results)
        assert results["cells"] == 1
        assert dict(results)["cells"] == 1
    results = fresh()
    del results["cells"]
    assert "cells" not in results
    assert results == {key: value for key, value in WHOLE.items() if key != "cells"}
    with pytest.raises(KeyError):
        results["cells"]
    results = fresh()
    results.clear()
    assert results == {}


def test_cells_are_made_once_and_only_for_those_who_read_them() -> None:
    made: list[int] = []
    results = fresh(made)
    assert (results["name"], results.get("metrics"), results.get("other", 2), len(results)) == (
        "x",
        {"final": 0.5},
        2,
        3,
    )
    assert "cells" in results
    assert bool(results)
    assert not made
    assert results["cells"] is results["cells"]
    assert made == [1]


def test_a_document_stays_as_it_was_while_tasks_come() -> None:
    """Also where a later task fills in what was asked of it before it was learned."""

    def about(name: str, cells: dict[str, Any]) -> dict[str, Any]:
        lists = dict.fromkeys(("not_asked", "in_turn", "exams", "protection", "gates", "forgot", "bad", "warnings"), ())
        told = {"before": None, "facts": {}, "drift": {}, "timing": {}, "accuracies": {}}
        return {"task": {"name": name}, "cells": cells, **told, **lists}

    found, documents = _Found(), []
    for number in range(4):
        names = [f"t{n}" for n in range(4) if n != 1]  # the second is never asked, and all others before they come
        found.put(about(f"t{number}", {name: f"{number}{name}" for name in names}))
        documents.append(Results({"cells": None}, lambda count=number + 1: _square(found.cells, count)))
    for count, document in enumerate(documents, 1):
        wanted = [[None if n == 1 else f"{i}t{n}" for n in range(count)] for i in range(count)]
        assert document["cells"] == wanted
    assert documents[0]["cells"] is not documents[1]["cells"][0]
