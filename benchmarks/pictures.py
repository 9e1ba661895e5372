"""From JPEG files to normalised batches: perpetune's path beside torchvision's v2 and timm's loader, in turns.

    python benchmarks/pictures.py                          # 500 x 375 to 224, with 0, 1 and 2 workers
    python benchmarks/pictures.py --width 4000 --height 3000 --images 24 --workers 0

Every path reads the same files, crops and flips at random (`train`) or cuts out the centre (`test`), resizes with the
same filter and ends with a normalised float32 batch `(B, 3, S, S)` on the device. `exact` and `fast` are perpetune's
two values of `backbone.pixels`. torchvision's pipeline works on tensors, once behind Pillow's decoder (`torchvision`)
and once behind its own (`torchvision-io`). timm's loader is `create_loader`, on CUDA with its prefetcher.

Prints JSON. `per_cpu_second` is images per second of CPU time of this process and its workers, in the best of the
turns, and `per_second` the same by the clock. `ratio` is perpetune's over the best of the others, by CPU time; by the
clock it says nothing on a machine that does other work.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from perpetune.data.pictures.tables import FileTable
from perpetune.data.pictures.view import PictureSet, PictureView
from perpetune.models.backbone import Backbone
from perpetune.runtime import Runtime, pick_device
from perpetune.tasks import load_batches

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP = 0.875  # of the shorter side, at the test
AREA, ASPECT = (0.5, 1.0), (3 / 4, 4 / 3)  # of a random crop, as `stream.augment` draws it
Batches = Callable[[], Iterator[Tensor]]


def write(folder: Path, count: int, width: int, height: int) -> list[str]:
    """JPEG files with shapes, edges and noise, of about the size that photos of these sides have."""
    rng, files = np.random.default_rng(0), []
    (folder / "one").mkdir()
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        noise = rng.normal(0, 12, (height, width, 1)).astype(np.float32)
        image = Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))
        files.append(str(folder / "one" / f"{i:04}.jpg"))
        image.filter(ImageFilter.GaussianBlur(0.6)).save(files[-1], quality=90)
    return files


def ours(files: list[str], size: int, batch: int, workers: int, train: bool, fast: bool, device: Any) -> Batches:
    view = PictureView(size=size, mean=MEAN, std=STD, interpolation="bicubic", crop=CROP, fast=fast)
    table = FileTable("", files, ["one"] * len(files))
    examples = PictureSet(table, range(len(files)), ["one"], view, "crop_flip" if train else "none")
    runtime = Runtime(device=device, workers=workers)
    backbone = Backbone(torch.nn.Identity(), spec="none", dim=1, preprocess=view).to(device)
    starts = range(0, len(files), batch)
    requests = [[(i, i) for i in range(len(files))[s : s + batch]] for s in starts]

    def run() -> Iterator[Tensor]:
        for loaded in load_batches(examples, requests, runtime):
            yield backbone.normalised(loaded.inputs.pixels)

    return run


class Files(torch.utils.data.Dataset[Any]):
    def __init__(self, files: list[str], transform: Callable[[Any], Tensor], own_decoder: bool):
        self.files, self.transform, self.own_decoder = files, transform, own_decoder

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision import io

        if self.own_decoder:
            return self.transform(io.decode_image(self.files[index], mode=io.ImageReadMode.RGB)), 0
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB")), 0


def torchvision(files: list[str], size: int, batch: int, workers: int, train: bool, io: bool, device: Any) -> Batches:
    from torchvision.transforms import v2

    cubic = v2.InterpolationMode.BICUBIC
    changed = (
        [v2.RandomResizedCrop(size, AREA, ASPECT, interpolation=cubic, antialias=True), v2.RandomHorizontalFlip()]
        if train
        else [v2.Resize(round(size / CROP), interpolation=cubic, antialias=True), v2.CenterCrop(size)]
    )
    scaled = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    transform = v2.Compose([v2.ToImage(), *changed, *scaled])

    def run() -> Iterator[Tensor]:
        loader = torch.utils.data.DataLoader(
            Files(files, transform, io), batch, num_workers=workers, pin_memory=device.type == "cuda"
        )
        for pixels, _ in loader:
            yield pixels.to(device, non_blocking=True)

    return run


def timm(files: list[str], size: int, batch: int, workers: int, train: bool, _: bool, device: Any) -> Batches:
    from timm.data import ImageDataset, create_loader

    def run() -> Iterator[Tensor]:
        loader = create_loader(
            ImageDataset(str(Path(files[0]).parent.parent)),
            (3, size, size),
            batch,
            is_training=train,
            use_prefetcher=device.type == "cuda",
            scale=AREA,
            ratio=ASPECT,
            hflip=0.5,
            color_jitter=None,
            interpolation="bicubic",
            mean=MEAN,
            std=STD,
            num_workers=workers,
            crop_pct=CROP,
            device=device,
            persistent_workers=False,
        )
        for pixels, _ in loader:
            yield pixels.to(device)

    return run


PATHS: dict[str, tuple[Callable[..., Batches], bool]] = {
    "exact": (ours, False),
    "fast": (ours, True),
    "torchvision": (torchvision, False),
    "torchvision-io": (torchvision, True),
    "timm": (timm, False),
}


def spent() -> float:
    """Seconds of CPU time of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def one_turn(batches: Batches, size: int, device: torch.device) -> tuple[float, float]:
    """Seconds of CPU time and by the clock for one pass over the files."""
    began, clock = spent(), time.perf_counter()
    for pixels in batches():
        assert pixels.shape[1:] == (3, size, size)
        assert pixels.dtype == torch.float32
    if device.type == "cuda":
        torch.cuda.synchronize()
    return spent() - began, time.perf_counter() - clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = pick_device(given.device)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder), given.images, given.width, given.height)
        for workers in given.workers:
            for train in (True, False):
                made = {
                    name: make(files, given.size, given.batch, workers, train, option, device)
                    for name, (make, option) in PATHS.items()
                }
                turns: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
                for turn in range(given.turns + 1):
                    for name, batches in made.items():
                        times = one_turn(batches, given.size, device)
                        if turn:  # the first imports and reads the files
                            turns[name].append(times)
                cpu = {name: len(files) / min(c for c, _ in some) for name, some in turns.items()}
                wall = {name: len(files) / min(w for _, w in some) for name, some in turns.items()}
                best = max(rate for name, rate in cpu.items() if name not in ("exact", "fast"))
                found.append(
                    {
                        "workers": workers,
                        "pass": "train" if train else "test",
                        "per_cpu_second": {name: round(rate, 1) for name, rate in cpu.items()},
                        "per_second": {name: round(rate, 1) for name, rate in wall.items()},
                        "ratio": {name: round(cpu[name] / best, 2) for name in ("exact", "fast")},
                    }
                )
        about = {name: value for name, value in vars(given).items() if name != "workers"}
        about["bytes"] = round(sum(os.path.getsize(file) for file in files) / len(files))
    print(json.dumps({**about, "results": found}, indent=2))


if __name__ == "__main__":
    main()
