"""Training and evaluation throughput of `finetune` x `lora` beside bare torch loops, in one process, in turns.

    python benchmarks/train_step.py                       # the packaged model, 32 px
    python benchmarks/train_step.py --backbone folder:PATH --architecture NAME --image-size 112

The bare loops are what one would write by hand: peft's LoRA on the same net with the same rank and
places, the same images through a DataLoader, AdamW, cross-entropy; no checks, no progress, no checkpoints.
Prints JSON; `ratio` is perpetune's images per second over the bare loop's, the median over the turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from perpetune.build import build_method, load_backbone
from perpetune.evaluate import evaluate
from perpetune.fit import FitConfig
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime, pick_device
from perpetune.seeding import generator
from perpetune.tasks import Examples, Task


class Noise(Examples):
    """Encoded pictures as real data come: decoded, resized and cropped anew each time they are loaded."""

    def __init__(self, count: int, classes: int, view: Any):
        import io

        from PIL import Image

        self.view, self.targets, self.files = view, [i % classes for i in range(count)], []
        for i in range(count):
            pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=generator("noise", i))
            file = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(file, "PNG")
            self.files.append(file.getvalue())

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int, seed: int | None) -> torch.Tensor:
        import io

        from PIL import Image

        return self.view(Image.open(io.BytesIO(self.files[index])))


class Pairs(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, examples: Any):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.examples.load(index, None), self.examples.targets[index]


def bare(
    backbone: Any, peft_net: nn.Module, classes: int, data: Any, batch: int, lr: float, device: Any
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training epoch and an evaluation pass, written by hand."""
    head = nn.Linear(backbone.dim, classes).to(device)
    trained = [p for p in peft_net.parameters() if p.requires_grad] + list(head.parameters())
    mean = torch.tensor(backbone.preprocess.mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(backbone.preprocess.std, device=device).view(1, 3, 1, 1)

    def features(x: torch.Tensor) -> torch.Tensor:
        return backbone._features(peft_net, (x.float() / 255 - mean) / std)

    def train() -> None:
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        loader = torch.utils.data.DataLoader(Pairs(data), batch, shuffle=True)
        for x, y in loader:
            loss = nn.functional.cross_entropy(head(features(x.to(device))), y.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def test() -> None:
        right = 0
        with torch.no_grad():
            for x, y in torch.utils.data.DataLoader(Pairs(data), batch):
                right += int((head(features(x.to(device))).argmax(1) == y.to(device)).sum())

    return train, test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", default="perpetune:micro")
    parser.add_argument("--architecture")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    device = pick_device(given.device)

    from peft import LoraConfig, get_peft_model

    classes, lr = 10, 1e-4
    backbone = load_backbone(given.backbone, architecture=given.architecture, image_size=given.image_size)
    plain = copy.deepcopy(backbone.net)
    names = {n for n, _ in plain.named_modules()}
    fused = any(n.endswith("attn.qkv") for n in names)
    targets = ["qkv"] if fused else ["q_proj", "v_proj"]
    peft_net = get_peft_model(plain, LoraConfig(r=8, lora_alpha=16, target_modules=targets)).to(device).eval()  # type: ignore[arg-type]
    content = {
        "backbone": given.backbone,
        "pet": {"name": "lora", "rank": 8, "alpha": 16, "at": ["q", "k", "v"] if fused else ["q", "v"]},
        "train": FitConfig(epochs=1, batch_size=given.batch, lr=lr, schedule="constant").model_dump(),
        "method": {"name": "finetune", "mask": "task"},
    }
    method = build_method(make_recipe(content), backbone).to(device)
    examples = Noise(given.images, classes, backbone.preprocess)
    names_of = tuple(str(c) for c in range(classes))
    task = Task(0, "bench", names_of, examples, test=examples, runtime=Runtime(device=device))
    train, test = bare(backbone, peft_net, classes, examples, given.batch, lr, device)
    ours: dict[str, Callable[[], Any]] = {
        "train": lambda: method.learn(task),
        "evaluate": lambda: evaluate(method, task, among="seen", batch_size=given.batch),
    }
    theirs = {"train": train, "evaluate": test}

    out: dict[str, Any] = {
        "backbone": given.backbone,
        "image_size": backbone.preprocess.size,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "images": given.images,
        "batch": given.batch,
        "turns": given.turns,
    }
    for kind in ("train", "evaluate"):
        ours[kind]()
        theirs[kind]()
        rows = []
        for turn in range(given.turns):
            pair = [("ours", ours[kind]), ("bare", theirs[kind])]
            row = {}
            for name, call in pair if turn % 2 == 0 else reversed(pair):
                row[name] = seconds(call, device)
            rows.append(row)
        ratios = [r["bare"] / r["ours"] for r in rows]
        out[kind] = {
            "ours_images_per_s": round(given.images / statistics.median(r["ours"] for r in rows), 1),
            "bare_images_per_s": round(given.images / statistics.median(r["bare"] for r in rows), 1),
            "ratio": round(statistics.median(ratios), 4),
            "ratio_min": round(min(ratios), 4),
            "ratio_max": round(max(ratios), 4),
        }
    print(json.dumps(out, indent=2))


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
