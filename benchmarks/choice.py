"""One pass with pets chosen for each example, against a pass for each set and against a pass with one set for all.

    python benchmarks/choice.py --pet lora --members 16

The packaged model, random pictures, prediction without gradients. Calls are timed in turns in one process, as CPU time.
Prints JSON: milliseconds of a batch (the median over rounds) and their ratios to the pass with one set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from perpetune import registry
from perpetune.build import load_backbone
from perpetune.pets import Choice, inject, using
from perpetune.seeding import generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pet", default="lora")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--members", type=int, nargs="+", default=[2, 5, 16])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    backbone = load_backbone("perpetune:micro")
    kind = registry.find("pets", given.pet)
    names = [f"m{i}" for i in range(max(given.members))]
    for name in names:
        rng = generator("choice", name)
        inject(backbone.net, backbone.pet_places(kind.default_at, None), lambda place: kind(place, rng), name)  # noqa: B023
    size = backbone.preprocess.size
    results = []
    for batch in given.batches:
        pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator("pixels"))
        for members in [m for m in given.members if m <= batch] or [1]:
            index = torch.arange(batch) % members
            parts = [(index == m).nonzero().flatten() for m in range(members)]
            choice = Choice(tuple(names[:members]), index[:, None])

            def one(pixels: Any = pixels) -> None:
                with using(backbone.net, "m0"):
                    backbone.features(pixels)

            def mixed(pixels: Any = pixels, choice: Choice = choice) -> None:
                with using(backbone.net, choice):
                    backbone.features(pixels)

            def grouped(pixels: Any = pixels, parts: Any = parts) -> None:
                for name, part in zip(names, parts, strict=False):
                    with using(backbone.net, name):
                        backbone.features(pixels[part])

            took = timed({"one": one, "mixed": mixed, "grouped": grouped}, given.rounds)
            ratios = {f"{name}/one": round(took[name] / took["one"], 3) for name in ("mixed", "grouped")}
            results.append({"batch": batch, "members": members, **{k: round(v, 1) for k, v in took.items()}, **ratios})
    print(json.dumps({"pet": given.pet, "results": results}, indent=1))


def timed(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median CPU time of each call in milliseconds, the calls in turns."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for number in range(rounds + 2):
            for name, call in calls.items():
                began = time.process_time()
                call()
                if number >= 2:
                    took[name].append(1000 * (time.process_time() - began))
    return {name: statistics.median(times) for name, times in took.items()}


if __name__ == "__main__":
    main()
