"""What protection costs: a training step, the pass after a task, memory, and all three as tasks go on.

    python benchmarks/protection.py --threads 1                   # ViT-S/16 with random weights, 112 px
    python benchmarks/protection.py --pet prompt --image-size 224

In one process and in turns: a step of forward, backward and AdamW with the guard on and off; the pass that protects
beside a plain forward pass over the same images, eigendecompositions included. After 1, 10 and 100 tasks, whose
features all differ. Prints JSON. `memory_bound_bytes` is 2 Σ m² · 8 over the sites.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from perpetune.build import build_method, load_backbone
from perpetune.methods.base import Method
from perpetune.pets import parameters, using
from perpetune.recipe import make_recipe
from perpetune.runtime import pick_device
from perpetune.seeding import generator


class Images:
    """Uint8 images `(B, 3, S, S)`, batch by batch; every task has patterns of its own."""

    def __init__(self, count: int, batch: int, size: int, task: int, device: torch.device):
        self.count, self.batch, self.size, self.task, self.device = count, batch, size, task, device
        rng = generator("benchmark", task)
        self.patterns = torch.randint(0, 256, (8, 3, 8, 8), generator=rng, dtype=torch.uint8).float()

    def __iter__(self) -> Iterable[Tensor]:
        rng = generator("images", self.task)
        for start in range(0, self.count, self.batch):
            n = min(self.batch, self.count - start)
            rows = torch.randint(0, 8, (n,), generator=rng)
            pixels = torch.nn.functional.interpolate(self.patterns[rows], size=self.size)
            noise = torch.randint(-60, 61, pixels.shape, generator=rng)
            yield (pixels + noise).clamp(0, 255).to(torch.uint8).to(self.device)


class Bench:
    def __init__(self, given: argparse.Namespace):
        self.given, self.device = given, pick_device(given.device)
        backbone = load_backbone(
            given.backbone, pretrained=given.pretrained, image_size=given.image_size, architecture=given.architecture
        )
        content = {
            "backbone": given.backbone,
            "pet": {"name": given.pet, **({"rank": 8} if given.pet == "lora" else {})},
            "protect": {"energy": given.energy},
            "head": "linear",
        }
        self.method: Method = build_method(make_recipe(content), backbone).to(self.device)
        self.size = backbone.preprocess.size
        rng = generator("classes")
        self.method.model.head.grow([str(c) for c in range(10)], rng)  # type: ignore[operator,union-attr]
        self.pet = parameters(self.method, "default")
        for p in self.pet:
            p.requires_grad_(True)
        self.batch = next(iter(Images(given.batch, given.batch, self.size, 0, self.device)))
        self.targets = torch.arange(given.batch, device=self.device) % 10
        self.optimizer = torch.optim.AdamW(self.pet, lr=1e-4)

    def images(self, count: int, task: int) -> Images:
        return Images(count, self.given.batch, self.size, task, self.device)

    def step(self) -> None:
        with using(self.method, "default"):
            scores = self.method.model.head.logits(self.method.model.features(self.batch))  # type: ignore[operator,union-attr]
        torch.nn.functional.cross_entropy(scores, self.targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward(self, images: Images) -> None:
        with torch.no_grad():
            for batch in images:
                self.method.observe(batch)

    def protect(self, images: Images) -> dict[str, Any]:
        assert self.method.protection is not None
        return self.method.protection.consolidate(images, self.method.observe)

    def seconds(self, call: Callable[[], Any]) -> float:
        began = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def steps(self) -> dict[str, float]:
        """Seconds of a step without and with the guard, and their ratio, in turns."""
        assert self.method.protection is not None
        for _ in range(2):
            self.step()
        pairs = []
        for turn in range(self.given.turns):
            pair: dict[bool, float] = {}
            for guarded in (False, True) if turn % 2 == 0 else (True, False):
                handle = self.method.protection.guard(self.optimizer) if guarded else None
                pair[guarded] = self.seconds(self.step)
                if handle is not None:
                    handle.remove()
            pairs.append(pair)
        ratios = [p[True] / p[False] for p in pairs]
        return {
            "plain_s": statistics.median(p[False] for p in pairs),
            "guarded_s": statistics.median(p[True] for p in pairs),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],  # type: ignore[dict-item]
        }

    def passes(self, count: int, task: int) -> dict[str, Any]:
        """Seconds of a plain and of a protecting pass over the same images, in alternating parts of the images."""
        images = self.images(count, task)
        plain = [self.seconds(lambda: self.forward(images))]
        protecting = self.seconds(lambda: self.protect(images))
        plain.append(self.seconds(lambda: self.forward(images)))
        few = self.images(2 * self.given.batch, task)
        more = peak(lambda: self.protect(few), self.device) - peak(lambda: self.forward(few), self.device)
        return {
            "images": count,
            "plain_s": plain,
            "protect_s": protecting,
            "ratio": protecting / statistics.fmean(plain),
            "peak_more_bytes": more,
        }


def peak(call: Callable[[], Any], device: torch.device) -> int:
    """Largest number of bytes in tensors that `call` holds at once, beside what was there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    found = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = most = 0
    for event in sorted((e for e in found if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", default="timm:vit_small_patch16_224")
    parser.add_argument("--architecture")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--pet", default="lora")
    parser.add_argument("--energy", type=float, default=0.99)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--tasks", type=int, nargs="*", default=[1, 10, 100])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    bench = Bench(given)
    protection = bench.method.protection
    assert protection is not None
    bound = 2 * 8 * sum(w.site.operand.heads * w.site.operand.shape[2] ** 2 for w in protection.sites)
    out: dict[str, Any] = {
        **{k: v for k, v in vars(given).items() if k not in ("tasks", "turns")},
        "device": str(bench.device),
        "threads": torch.get_num_threads(),
        "sites": len(protection.sites),
        "memory_bound_bytes": bound,
        "after": [],
    }
    bench.step()  # from here on LoRA's B is not zero
    done = 0
    for tasks in given.tasks:
        while done < tasks - 1:
            bench.protect(bench.images(64, done))
            bench.step()
            done += 1
        count = given.images if tasks == given.tasks[0] else max(64, given.images // 10)
        passed = bench.passes(count, done)
        done += 1
        kept = sum(t.numel() * t.element_size() for t in protection.buffers())
        out["after"].append(
            {
                "tasks": tasks,
                "room": protection.certificate()["room"],
                "step": bench.steps(),
                "pass": passed,
                "kept_bytes": kept,
            }
        )
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
