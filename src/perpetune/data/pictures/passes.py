"""The passes of Pillow's resampling in machine code that numba makes: the same bits in a quarter of the time.

Pillow computes each value of a resized picture from whole numbers: the weights of a filter times 2^22, rounded, and
sums in 32 bits. So another program gets the same bits, in whichever order it adds, and may work on many values at once.
One pass makes the picture as narrow as the result and rounds to bytes, the other makes it as low.

A pixel is one number of 32 bits: red in the lowest byte, nothing of use in the highest. So axes are turned fast.

Source: the C code of Pillow's `Image.resize` for 8 bits a channel; the tests compare all bits. Only `resize.py` imports
this module, for it needs numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

BITS = np.int32(22)  # of a weight, behind the point
ONE, HALF = 1 << 22, np.int32(1 << 21)
NONE, BYTE, GREEN, BLUE = np.int32(0), np.int32(255), np.int32(8), np.int32(16)
BLOCK = 16  # pixels of a side
BAND = 192  # lines that the first pass takes at once, so that a cache holds what it makes of them
Array = np.ndarray[Any, Any]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        made: Callable[..., Any] = njit(function, cache=True, nogil=True)
    except RuntimeError:  # there is no folder that may keep the machine code
        made = njit(function, nogil=True)
    return made


@_compiled
def _weights(count: int, begin: np.float32, end: np.float32, size: int, cubic: bool) -> tuple[Array, Array]:
    """What each of `size` new values takes of `count` old ones, of which a part is resized.

    Args:
        begin, end: of the part, in the precision of Pillow.
        cubic: the bicubic filter; else the bilinear one.

    Returns:
        The first old value that each new one takes, int64 `(size,)`, and its weights times 2^22, int32 `(size, taps)`.
    """
    scale = np.float64(end - begin) / size
    wide = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * wide
    taps = min(int(np.ceil(support)) * 2 + 1, count)
    firsts, whole = np.empty(size, np.int64), np.zeros((size, taps), np.int32)
    exact = np.empty(taps)
    for new in range(size):
        centre = begin + (new + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), count)
        total = 0.0
        for old in range(first, last):
            x = abs((old - centre + 0.5) * (1.0 / wide))
            weight = 0.0
            if not cubic:
                if x < 1.0:
                    weight = 1.0 - x
            elif x < 1.0:
                weight = (1.5 * x - 2.5) * x * x + 1.0
            elif x < 2.0:
                weight = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
            exact[old - first] = weight
            total += weight
        firsts[new] = min(first, count - taps)  # the weights before `first` stay zero
        for tap in range(last - first):
            weight = exact[tap] / total if total != 0.0 else exact[tap]
            half = -0.5 if weight < 0.0 else 0.5
            whole[new, first - firsts[new] + tap] = int(half + weight * ONE)
    return firsts, whole


@_compiled
def _turn(pixels: Array, made: Array) -> Array:
    """Write pixels `(A, B)` to `made`, `(B, A)`, block by block: a cache holds both ends of a block."""
    a, b = pixels.shape
    whole_a, whole_b = a - a % BLOCK, b - b % BLOCK
    for y in range(0, whole_a, BLOCK):
        for x in range(0, whole_b, BLOCK):
            for i in range(BLOCK):
                for j in range(BLOCK):
                    made[x + i, y + j] = pixels[y + j, x + i]
    for y in range(whole_a, a):
        for x in range(b):
            made[x, y] = pixels[y, x]
    for x in range(whole_b, b):
        for y in range(whole_a):
            made[x, y] = pixels[y, x]
    return made


@_compiled
def _add_two(red: Array, green: Array, blue: Array, p: Array, a: np.int32, q: Array, b: np.int32) -> None:
    """Add the lines `p` and `q` of pixels, with the weights `a` and `b`, to the sums of each channel."""
    for i in range(len(red)):  # in 32 bits from end to end, so that a processor takes eight or more pixels at once
        x, y = p[i], q[i]
        red[i] += a * (x & BYTE) + b * (y & BYTE)
        green[i] += a * (x >> GREEN & BYTE) + b * (y >> GREEN & BYTE)
        blue[i] += a * (x >> BLUE & BYTE) + b * (y >> BLUE & BYTE)


@_compiled
def _rounded(total: np.int32) -> np.int32:
    return min(max(total >> BITS, NONE), BYTE)


@_compiled
def _one_pass(lines: Array, offset: int, firsts: Array, whole: Array) -> Array:
    """Each new line of pixels is a weighted sum of some old ones, rounded.

    Args:
        lines: pixels `(lines, pixels)`. The first line is line `offset` of the picture.
        firsts, whole: see `_weights`.

    Returns:
        The new lines, `(len(firsts), pixels)`.
    """
    pixels, taps = lines.shape[1], whole.shape[1]
    made = np.empty((len(firsts), pixels), np.int32)
    red, green, blue = np.empty(pixels, np.int32), np.empty(pixels, np.int32), np.empty(pixels, np.int32)
    for new in range(len(firsts)):
        weight, line, tap, end = whole[new], firsts[new] - offset, 0, taps
        while end > 1 and weight[end - 1] == 0:  # most new lines take one or two less than the most
            end -= 1
        red[:], green[:], blue[:] = HALF, HALF, HALF
        while tap + 2 <= end:  # two lines at once, for the sums are read and written once then
            _add_two(red, green, blue, lines[line + tap], weight[tap], lines[line + tap + 1], weight[tap + 1])
            tap += 2
        if tap < end:
            _add_two(red, green, blue, lines[line + tap], weight[tap], lines[line + tap], NONE)
        for i in range(pixels):
            made[new, i] = _rounded(red[i]) | _rounded(green[i]) << GREEN | _rounded(blue[i]) << BLUE
    return made


@_compiled
def _planes(pixels: Array) -> Array:
    """The channels of pixels `(height, width)`, as uint8 `(3, height, width)`."""
    height, width = pixels.shape
    made = np.empty((3, height, width), np.uint8)
    for y in range(height):
        for x in range(width):
            made[0, y, x] = pixels[y, x]
            made[1, y, x] = pixels[y, x] >> GREEN
            made[2, y, x] = pixels[y, x] >> BLUE
    return made


@_compiled
def resized(
    pixels: Array,
    left: float,
    top: float,
    right: float,
    bottom: float,
    size: int,
    cubic: bool,
    flip: bool,
    rows_first: bool,
) -> Array:
    """A part of a picture, made `size` high and wide.

    All steps are one call, so that a band of lines goes through the first ones while a cache holds it.

    Args:
        pixels: of the whole picture, int32 `(height, width)`.
        left, top, right, bottom: the part, in pixels.
        cubic: the bicubic filter; else the bilinear one.
        flip: exchange left and right afterwards.
        rows_first: make it lower before it is made narrower.

    Returns:
        uint8 `(3, size, size)`.
    """
    height, width = pixels.shape
    x, x_weights = _weights(width, np.float32(left), np.float32(right), size, cubic)
    y, y_weights = _weights(height, np.float32(top), np.float32(bottom), size, cubic)
    used = pixels[y[0] : y[-1] + y_weights.shape[1], x[0] : x[-1] + x_weights.shape[1]]
    x_offset, y_offset = x[0], y[0]
    if flip:
        x, x_weights = x[::-1].copy(), x_weights[::-1].copy()
    offset, firsts, whole = (y_offset, y, y_weights) if rows_first else (x_offset, x, x_weights)
    others = used.shape[1] if rows_first else used.shape[0]
    lines = np.empty((others, size), np.int32)
    for begin in range(0, others, BAND):
        end = min(begin + BAND, others)
        if rows_first:
            band = used[:, begin:end].copy()
        else:
            band = _turn(used[begin:end], np.empty((used.shape[1], end - begin), np.int32))
        _turn(_one_pass(band, offset, firsts, whole), lines[begin:end])
    offset, firsts, whole = (x_offset, x, x_weights) if rows_first else (y_offset, y, y_weights)
    made = _one_pass(lines, offset, firsts, whole)
    if rows_first:
        made = _turn(made, np.empty((size, size), np.int32))
    planes: Array = _planes(made)
    return planes
