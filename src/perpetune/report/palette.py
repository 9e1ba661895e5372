"""Colours of the pages, for light and dark screens, as CSS; text on a heat colour is always readable."""

from __future__ import annotations

from collections.abc import Sequence

STEPS = 21  # heat levels: one for every 5 points of accuracy
INK, PAPER = "#000000", "#ffffff"  # one of the two has a contrast of 4.58 or more on any colour

# From nothing right to everything right. Dark screens run from dark to light, so "more" is always
# further from the background.
LIGHT_RAMP = ("#f3f6fb", "#cfe0f3", "#93bfe3", "#4f93cb", "#2466a5", "#113a6f")
DARK_RAMP = ("#1a2230", "#1c3854", "#1f5a8a", "#3a87c2", "#7db9ea", "#d6eaff")

# Lines that must be told apart: at most eight, then a ramp by age. Any two differ by 0.19 or more in OKLab, by 0.09 for
# eyes without red or green cones; every one has a contrast of 3 or more with the page.
LIGHT_LINES = ("#0049ad", "#f2686f", "#01563c", "#6f0076", "#808f05", "#9c0800", "#019cec", "#826882")
DARK_LINES = ("#4da7fc", "#ff8d20", "#0fc478", "#df6bbe", "#f6ea3c", "#c13915", "#74f9ff", "#4c717a")
LIGHT_AGES = ("#1d3f8f", "#1f6fb0", "#1c9099", "#3d9f5c", "#a8a021", "#d9822b", "#cc4125")
DARK_AGES = ("#6d8fe8", "#5fb0ec", "#4fd0d3", "#7bdb8f", "#dede63", "#f7b267", "#f47c5d")
AGES = 24


def mix(stops: Sequence[str], t: float) -> str:
    """The colour at `t` in [0, 1] along evenly spaced hexadecimal `stops`."""
    at = t * (len(stops) - 1)
    i = min(int(at), len(stops) - 2)
    parts = (
        round(int(stops[i][k : k + 2], 16) * (1 - (at - i)) + int(stops[i + 1][k : k + 2], 16) * (at - i))
        for k in (1, 3, 5)
    )
    return "#" + "".join(f"{part:02x}" for part in parts)


def luminance(colour: str) -> float:
    """Relative luminance in [0, 1] (WCAG 2.2)."""
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2); readable text has 4.5 or more."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def text_on(background: str) -> str:
    """The more readable of ink and paper."""
    return max(INK, PAPER, key=lambda ink: contrast(ink, background))


def heat_level(accuracy: float) -> int:
    """The heat colour of an accuracy in [0, 1], 0 to STEPS - 1."""
    return min(STEPS - 1, max(0, round(accuracy * (STEPS - 1))))


def colours_css() -> str:
    """Classes `h0`… (heat), `l0`… (lines told apart) and `a0`… (lines by age), light and dark."""
    light = _rules(LIGHT_RAMP, LIGHT_LINES, LIGHT_AGES)
    dark = _rules(DARK_RAMP, DARK_LINES, DARK_AGES)
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}"


def _rules(ramp: Sequence[str], lines: Sequence[str], ages: Sequence[str]) -> str:
    heat = [mix(ramp, level / (STEPS - 1)) for level in range(STEPS)]
    rules = [f".h{i} {{ --heat: {colour}; --on-heat: {text_on(colour)} }}" for i, colour in enumerate(heat)]
    rules += [f".l{i} {{ --line: {colour} }}" for i, colour in enumerate(lines)]
    rules += [f".a{i} {{ --line: {mix(ages, i / (AGES - 1))} }}" for i in range(AGES)]
    return "\n".join(rules)
