"""What pools of pets cost.

    OMP_NUM_THREADS=1 python benchmarks/pools.py choose

`choose` measures how long a selector takes to choose for a batch, by the number of members that it knows, and which
share this is of a forward pass of the same batch through a ViT-B/16 with random weights. CPU time, median over rounds,
the calls in turns. Prints JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perpetune.seeding import generator, own_global_state
from perpetune.selectors import Selection, Selector

KINDS: dict[str, dict[str, Any]] = {
    "keys": {"top": 5},
    "weights": {},
    "centres": {},
    "means": {},
    "gaussian": {},
    "classifier": {},
}
LIMIT = 0.02  # of a forward pass, at a thousand members


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    choose = verbs.add_parser("choose", help="the time of a choice by the number of members")
    choose.add_argument("--members", type=int, nargs="+", default=[1, 10, 100, 1000, 10000])
    choose.add_argument("--selectors", nargs="+", default=list(KINDS), choices=list(KINDS))
    choose.add_argument("--batch", type=int, default=8)
    choose.add_argument("--width", type=int, default=768)
    choose.add_argument("--rounds", type=int, default=5)
    choose.set_defaults(verb=choosing)
    given = vars(parser.parse_args())
    torch.set_num_threads(1)
    print(json.dumps(given.pop("verb")(**given), indent=1))


def choosing(
    members: list[int],
    selectors: list[str],
    batch: int,
    width: int,
    rounds: int,
    forward: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Milliseconds of a choice for `batch` queries, by selector and number of members, and their share of `forward`.

    Args:
        forward: one pass of the batch through a net; None is a ViT-B/16.
    """
    forward = forward or vit_b(batch)
    queries = torch.randn(batch, width, generator=generator("queries"))
    results = []
    for name in selectors:
        calls: dict[str, Callable[[], Any]] = {"forward": forward}
        for count in members:
            calls[str(count)] = functools.partial(filled(name, count, width).choose, queries)
        took = timed(calls, rounds)
        shares = {str(m): round(took[str(m)] / took["forward"], 5) for m in members}
        within = {} if "1000" not in shares else {"within": shares["1000"] < LIMIT}
        results.append({"selector": name, "ms": {k: round(v, 3) for k, v in took.items()}, "share": shares, **within})
    return {"batch": batch, "width": width, "limit": LIMIT, "results": results}


def filled(name: str, members: int, width: int) -> Selector:
    """A selector that knows so many members, each with one class; its values are drawn, not learned one by one."""
    selector = Selection.model_validate({"name": name, **KINDS[name]}).make(width)
    selector.grow(members, generator("grow"))
    if selector.learned:
        return selector
    selector.set_extra_state(
        {**selector.get_extra_state(), "rows": [[m, "c"] for m in range(members)], "centres": 5 * members}
    )
    source = generator("values")

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source)

    if name == "centres":
        selector.centres, selector.of = drawn(5 * members, width), torch.arange(members).repeat_interleave(5)
    elif name == "means":
        selector.means.grow([str(m) for m in range(members)], source)
        selector.means.means, selector.means.counts = drawn(members, width), torch.ones(members, dtype=torch.int64)
    elif name == "gaussian":
        selector.weight, selector.offset = drawn(members, width), drawn(members)
    elif name == "classifier":
        selector.head.grow([str(m) for m in range(members)], source)
        selector.head.weight, selector.head.counts = drawn(width, members), torch.ones(members, dtype=torch.int64)
    return selector


def vit_b(batch: int) -> Callable[[], Any]:
    """A forward pass of `batch` pictures through a ViT-B/16."""
    from transformers import ViTConfig, ViTModel

    with own_global_state("pools"):
        net = ViTModel(ViTConfig(), add_pooling_layer=False).eval()
    pixels = torch.randn(batch, 3, 224, 224, generator=generator("pixels"))
    return lambda: net(pixels)


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU time of each call in milliseconds, the calls in turns."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for number in range(rounds + 1):
            for name, call in calls.items():
                began = time.process_time()
                call()
                if number:
                    took[name].append(1000 * (time.process_time() - began))
    return {name: statistics.median(times) for name, times in took.items()}


if __name__ == "__main__":
    main()
