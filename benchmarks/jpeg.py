"""Decode JPEG files with Pillow: in memory as it comes, in aligned memory, and in the memory that perpetune gives it.

    python benchmarks/jpeg.py                              # 500 x 375
    python benchmarks/jpeg.py --width 1200 --height 900

`aligned` makes Pillow meet the bad chance at every picture: memory is taken until the next is aligned to 32 bytes.
Between pictures a little memory is taken and kept, so that `pillow` meets both chances. All ways take turns.

Prints JSON: milliseconds of CPU time for a picture, in the fastest tenth, the median and the slowest tenth.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from perpetune.data.pictures import jpeg
from pictures import write


class _Aligned(jpeg._Decoder):
    """Pillow's decoder, whose memory is aligned."""

    def setimage(self, image: Any, extents: tuple[int, int, int, int]) -> None:
        size, held = 4 * (extents[2] - extents[0]), []
        while len(held) < 2 * jpeg.TRIES:
            place = jpeg._malloc(size)
            if place % jpeg.ALIGNED == 0:
                jpeg._free(place)
                break
            held += [place, jpeg._malloc(size + jpeg.ALIGNED // 2)]
        self._allocate(image, extents)
        for place in held:
            jpeg._free(place)


def by_pillow(file: str) -> None:
    with Image.open(file) as image:
        image.load()


def aligned(file: str) -> None:
    with Image.open(file) as image:
        image.tile = [image.tile[0]._replace(codec_name="aligned_jpeg")]
        image.load()


def prepared(file: str) -> None:
    with Image.open(file) as image:
        jpeg.prepare(image)
        image.load()


def by_torchvision(file: str) -> None:
    from torchvision import io

    io.decode_image(file, mode=io.ImageReadMode.RGB)


WAYS: dict[str, Callable[[str], None]] = {
    "pillow": by_pillow,
    "aligned": aligned,
    "perpetune": prepared,
    "torchvision": by_torchvision,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--turns", type=int, default=60)
    given = parser.parse_args()
    if not jpeg._NEEDED:
        raise SystemExit("only Linux on x86-64 has something to measure")
    torch.set_num_threads(1)
    Image.register_decoder("aligned_jpeg", _Aligned)  # type: ignore[arg-type]
    Image.core.set_blocks_max(2)  # new memory for each picture is another cost
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder), given.images, given.width, given.height)
        kept = []
        for turn in range(given.turns + 1):
            kept.append(jpeg._malloc(16 + 16 * (turn % 7)))
            for file in files:
                for name, decode in WAYS.items():
                    began = time.process_time()
                    decode(file)
                    if turn:
                        times[name].append(1000 * (time.process_time() - began))
    found = {}
    for name, some in times.items():
        some.sort()
        found[name] = [round(some[int(share * len(some))], 3) for share in (0.1, 0.5, 0.9)]
    print(json.dumps({**vars(given), "ms": found}, indent=2))


if __name__ == "__main__":
    main()
