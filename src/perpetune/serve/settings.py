"""What a service takes and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The bounds of a service. A request beyond one of them gets an answer that names the bound.

    Attributes:
        device: where the model runs; None takes the recipe's device.
        max_bytes: the most bytes of the body of one request.
        max_pixels: the most pixels of one picture, before it is made smaller.
        max_files: the most pictures of one request.
        batch: the number of pictures at which a batch is full; None takes `evaluate.batch_size` of the recipe.
        wait: seconds that a batch that is not full waits for more pictures.
        held: the most requests that are inside at once; further ones get the code 503.
        timeout: seconds after which a request that has no answer gets the code 503.
        poll: seconds between two looks at the state.
    """

    device: str | None = None
    max_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    max_files: int = 64
    batch: int | None = None
    wait: float = 0.002
    held: int = 256
    timeout: float = 30.0
    poll: float = 1.0
