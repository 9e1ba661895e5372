"""What a command costs from its start to its end: `predict` of one photo and `update` with a month of pictures.

    python benchmarks/start.py                                            # the packaged model
    python benchmarks/start.py --backbone folder:../shared/models/vit_small_patch14_dinov2_saliency \\
        --architecture vit_small_patch14_dinov2.lvd142m --image-size 224 --images 0

Each command runs in a process of its own, in turns with `import torch`, which nobody can leave out. Prints JSON:
seconds of CPU time and by the clock, the smallest of the turns, and `over_torch`, the CPU time in units of that of
`import torch`. Compare two versions by `over_torch`: it depends less on the machine and on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

PROGRAM = [sys.executable, "-m", "perpetune"]


def photos(folder: Path, count: int) -> Path:
    """JPEG files of 500 x 375 in four classes, which differ by colour."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 160, (9, 12, 3), dtype=np.uint8)
        coarse[..., i % 3] += np.uint8(30 * (i % 4))
        place = folder / f"class{i % 4}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(place / f"{i}.jpg", quality=90)
    return folder


def spent(command: list[str]) -> tuple[float, float]:
    """Seconds of CPU time and by the clock until the command has ended."""
    before, clock = os.times(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, time.perf_counter() - clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", default="perpetune:micro")
    parser.add_argument("--architecture")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--images", type=int, default=200, help="pictures of a month; 0: no update")
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    options = {"architecture": given.architecture, "image_size": given.image_size}
    changes = [part for k, v in options.items() if v for part in ("--set", f"backbone.{k}={v}")]
    with tempfile.TemporaryDirectory() as folder:
        state, fresh = Path(folder, "state"), Path(folder, "fresh")
        first, month = photos(Path(folder, "first"), 16), photos(Path(folder, "month"), given.images)
        spent([*PROGRAM, "init", str(state), "--model", given.backbone, "--data", str(first), *changes])
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            "predict": [*PROGRAM, "predict", str(state), str(first / "class0" / "0.jpg")],
            "update": [*PROGRAM, "update", str(fresh), "--data", str(month), "-q"],
        }
        if not given.images:
            del commands["update"]
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(given.turns):
            for name, command in commands.items():
                shutil.rmtree(fresh, ignore_errors=True)
                shutil.copytree(state, fresh)
                turns[name].append(spent(command))
    least = {name: (min(c for c, _ in some), min(w for _, w in some)) for name, some in turns.items()}
    torch = least["import torch"][0]
    found = {
        name: {"cpu": round(cpu, 2), "clock": round(clock, 2), "over_torch": round(cpu / torch, 2)}
        for name, (cpu, clock) in least.items()
    }
    print(json.dumps({**vars(given), "seconds": found}, indent=2))


if __name__ == "__main__":
    main()
