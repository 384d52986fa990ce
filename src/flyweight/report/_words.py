"""Numbers and names as a reader sees them; the page and the terminal share them, so that both say the same.

A figure that is missing or not finite becomes DASH. The minus is U+2212 and the times sign U+00D7;
`encodable` turns them into ASCII where an output cannot show them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from flyweight.records import Interval, Objective

DASH = "–"
UNSAFE = (
    *range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0),  # controls, but not tab and line feed
    0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF,  # direction marks
    0x2028, 0x2029, *range(0xD800, 0xE000),  # other line ends; halves of pairs, which no encoding can write
)  # fmt: skip
VISIBLE = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in UNSAFE}
ASCII = str.maketrans({"×": "x", "−": "-", "–": "-", "…": "..", "─": "-"})
COMPARED: dict[Objective, tuple[str, str, str]] = {
    "latency": ("faster", "slower", "as fast"),
    "size": ("smaller", "larger", "as large"),
    "memory": ("less memory", "more memory", "as much memory"),
}


def clean(text: str, limit: int = 4000) -> str:
    """The text with control, direction and surrogate characters made visible, cut in the middle to `limit` characters.

    Such characters can rewrite a terminal or turn a line around; a name from a file may hold any of them.
    """
    if len(text) > limit:
        half = (limit - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    return text.translate(VISIBLE)


def one_line(text: str, limit: int = 4000) -> str:
    """The cleaned text with every run of white space made one space."""
    return clean(" ".join(text[: 2 * limit].split()), limit)


def encodable(text: str, encoding: str) -> str:
    """The text with only characters that the encoding has: the nearest ASCII for ours, "?" for the rest."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(ASCII).encode(encoding, "replace").decode(encoding)
    return text


def ratio(value: float | None) -> str:
    """A ratio such as "1.62×"."""
    return _number(
        value, lambda x: f"{x:.2f}×" if abs(x) < 10 else f"{x:,.1f}×" if abs(x) < 100 else f"{x:,.0f}×"
    )


def percent(fraction: float | None) -> str:
    """A fraction in percent, such as "0.31 %"."""
    return _number(
        None if fraction is None else 100 * fraction,
        lambda x: f"{x:.2f} %" if abs(x) < 10 else f"{x:.1f} %" if abs(x) < 1000 else f"{x:,.0f} %",
    )


def bound(fraction: float) -> str:
    """A bound that the user gave, as short as it was given: 0.01 is "1 %"."""
    return f"{100 * fraction:.6g} %"


def tick(fraction: float) -> str:
    """A fraction on an axis in percent, as short as it can be."""
    return bound(round(fraction, 9)).replace("-", "−")


def change(factor: float | None) -> str:
    """(after - before) / before for an after that is `factor` times the before, such as "−38.3 %"."""
    return _number(None if factor is None else 100 * (factor - 1), lambda x: f"{x:+,.1f} %")


def score(value: float | None) -> str:
    """A score with four significant digits."""
    return _number(value, lambda x: f"{x:#.4g}" if x == 0 or 1e-3 <= abs(x) < 1e4 else f"{x:.4g}")


def damage(value: float | None) -> str:
    """A predicted damage with two significant digits, such as "1.2e-4"."""
    return _number(value, lambda x: "0" if x == 0 else f"{x:.1e}".replace("e-0", "e-").replace("e+0", "e+"))


def milliseconds(value: float | None) -> str:
    """A time in milliseconds, such as "12.41 ms"."""
    return _number(
        value,
        lambda x: f"{x:.3f} ms" if x < 1 else f"{x:.2f} ms" if x < 100 else f"{x:,.0f} ms",
    )


def size(count: float | None) -> str:
    """Bytes in decimal units, such as "22.7 MB"."""
    return _number(count, lambda x: f"{x:,.0f} B" if x < 1000 else _scaled(x, ("kB", "MB", "GB", "TB")))


def count(value: float | None) -> str:
    """A large count with three digits and a unit, such as "22.7 M"; exact below 1,000."""
    return _number(value, lambda x: f"{x:,.0f}" if x < 1000 else _scaled(x, ("k", "M", "G", "T")))


def duration(seconds: float | None) -> str:
    """A time span, such as "3.2 s", "18 min 20 s" or "2 h 5 min"."""
    return _number(seconds, _duration)


def span(interval: Interval | None, show: Callable[[float | None], str]) -> str:
    """Both ends of an interval with the unit said once, such as "−0.20 to 0.82 %"; empty without an interval."""
    if interval is None:
        return ""
    low, high = show(interval.low), show(interval.high)
    unit = high.lstrip("−+0123456789.,e")
    return f"{low.removesuffix(unit)} to {high}"


def compared(factor: float | None, objective: Objective) -> tuple[str, str]:
    """A figure of at least one and its word: a factor of 1.62 is ("1.62×", "faster"), one of 0.5 is ("2.00×", "slower")."""
    better, worse, same = COMPARED[objective]
    if factor is None or not math.isfinite(factor) or factor <= 0:
        return DASH, "not measured"
    if ratio(factor) == "1.00×":
        return "1.00×", same
    return (ratio(factor), better) if factor > 1 else (ratio(1 / factor), worse)


def compared_span(factor: float, interval: Interval) -> str:
    """The interval of `compared`'s figure: of how many times slower when the factor is below 1."""
    if ratio(factor) != "1.00×" and factor < 1 and interval.low > 0:
        interval = Interval(1 / interval.high, 1 / interval.low)
    return span(interval, ratio)


def plural(number: int, noun: str) -> str:
    """A count with its noun, such as "1 layer" or "1,200 layers"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _number(value: float | None, show: Callable[[float], str]) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    text = show(value)
    if text.startswith("-") and not any(digit in text for digit in "123456789"):
        text = text[1:]  # "-0.00" would suggest a direction that the digits shown do not support
    return text.replace("-", "−", 1) if text.startswith("-") else text


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = min(len(units), int(math.log10(value) / 3))
    scaled = value / 1000**power
    if scaled >= 999.5 and power < len(units):
        scaled, power = scaled / 1000, power + 1
    return f"{scaled:,.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f} {units[power - 1]}"


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (0 if hours else rest, "s")]
    return " ".join(f"{value} {unit}" for value, unit in parts if value)
