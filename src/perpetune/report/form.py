"""Write figures as text. Each kind of number has one form in all reports."""

from __future__ import annotations

import json
from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"
ABSENT = "\N{EN DASH}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in [0, 1] in percent, such as `87.3`; the heading has the percent sign."""
    return ABSENT if value is None else _minus(f"{100 * value:.{digits}f}")


def points(value: float | None, digits: int = 1) -> str:
    """A difference of two shares in percentage points, always with its sign: `+1.5`, `−11.2`, `0.0`."""
    if value is None:
        return ABSENT
    text = f"{100 * value:+.{digits}f}"
    return text[1:] if float(text) == 0 else _minus(text)


def size(n_bytes: float | None) -> str:
    """Bytes in decimal units: `512 B`, `81.6 kB`, `10.8 MB`."""
    if n_bytes is None:
        return ABSENT
    value = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(seconds: float | None) -> str:
    """`0.4 s`, `12.1 s`, `3 min 20 s`, `1 h 02 min`."""
    if seconds is None:
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: float | None) -> str:
    """A whole number with commas between groups of three digits: `36,864`."""
    return ABSENT if value is None else f"{value:,.0f}"


def right(value: float) -> str:
    """A number of right answers as `count` writes it, `37`; or a sum of scores with two decimals, `37.42`."""
    return count(value) if float(value).is_integer() else f"{value:,.2f}"


def thousandths(value: float | None) -> str:
    """A weight or a distance with three decimals: `0.620`. A value above 0 is never shown as 0."""
    if value is None:
        return ABSENT
    return "< 0.001" if 0 < value < 0.0005 else _minus(f"{value:.3f}")


def number(value: float) -> str:
    """Any number to about three digits: `0.00123`, `12.3`, `312`, `12,346`, `1.2e-7`."""
    size = abs(value)
    if 999.5 <= size < 1e7:
        return _minus(count(value))
    if value == 0 or 1e-4 <= size < 999.5:
        return _minus(f"{value:.3g}")
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{_minus(digits)}e{int(power)}"


def relative(part: float | None, whole: float | None) -> str:
    """The share of `part` in `whole` in percent, with two digits: `7.2 %`, `0.037 %`, `140 %`."""
    if part is None or not whole:
        return ABSENT
    value = 100 * part / whole
    if 0 < value < 0.001:
        return "< 0.001 %"
    return f"{value:.0f} %" if value >= 99.5 else f"{value:.2g} %"


def setting(value: object) -> str:
    """The value of a recipe's key, in the spelling of recipes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def several(names: Sequence[str], shown: int) -> str:
    """`a, b, c and 7 more`."""
    first = ", ".join(names[:shown])
    return first if len(names) <= shown else f"{first} and {len(names) - shown} more"


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def mean_std(mean: str, std: str | None) -> str:
    """`87.3 ± 0.4`; only the mean if there is no spread (one run)."""
    return mean if std is None else f"{mean} ± {std}"


def _minus(text: str) -> str:
    """`text` with the typographic minus sign, and without a sign if the figure rounds to zero."""
    if text.startswith("-"):
        return text[1:] if float(text) == 0 else MINUS + text[1:]
    return text
