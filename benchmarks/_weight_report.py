"""What benchmarks/weight_codes.py found, as rows with aims, as a picture, and as the table in docs/quantization.md."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._results import Row
from benchmarks._weight_ours import NAMES, file_bits
from benchmarks.readme import _between
from flyweight.report._scale import Axis, linear, logarithmic

ROWS = "runs"
PAGE = Path(__file__).parent.parent / "docs" / "quantization.md"
BITS = (8, 4, 3, 2)
AIMS = {4: 0.7, 3: 0.7, 2: 0.5}
"""Of our damage over the best peer's."""
CASES = {
    "smollm2": ("SmolLM2-135M", "kl", "KL to the original, nats a token"),
    "minilm": ("all-MiniLM-L6-v2", "relative_error", "relative error of the output"),
}
LABELS = {
    "nearest": "nearest",
    "flyweight": "flyweight, groups of 32",
    "flyweight_tuned": "flyweight, groups of 32, tuned",
    "flyweight_entropy": "flyweight, Huffman-coded",
    "gptq": "GPTQ (llm-compressor)",
    "gptq_mse": "GPTQ (llm-compressor), ranges by squared error",
    "autoround": "AutoRound, 50 steps of 4",
    "autoround_light": "AutoRound, its light recipe",
    "autoround_ext": "AutoRound, 50 steps of 4, extended",
    "autoround_200": "AutoRound, 200 steps of 8",
    "hqq": "HQQ, groups of 32",
    "hqq_64": "HQQ, groups of 64",
    "nncf": "NNCF, scale estimation",
    "nncf_gptq": "NNCF, GPTQ and scale estimation",
    "quanto": "optimum-quanto",
}
ROUNDED = 0.02
"""Bits a weight that whole bytes may add to a row of zero points."""
OWN = tuple(name for name in NAMES if name.startswith("flyweight"))
Records = Mapping[str, Mapping[str, Any]]


def rows(records: Records) -> list[Row]:
    """Our damage and time beside the peers', at each width of each model where we were measured."""
    found = []
    for case, (_, figure, unit) in CASES.items():
        for bits in BITS:
            here = _at(records, case, bits)
            ours = [name for name in OWN if _fits(here.get(name), bits)]
            if not ours:
                continue
            best = min(ours, key=lambda name: here[name]["figures"][figure])
            found += [
                _row(case, f"damage at {bits} bits", unit, here, best, figure),
                _row(case, f"seconds at {bits} bits", "s", here, best, "seconds"),
            ]
    return found


def _row(case: str, metric: str, unit: str, here: Records, ours: str, figure: str) -> Row:
    """One figure of one width; the aim of seconds is GPTQ's."""
    peers = {name: _figure(record, figure) for name, record in here.items() if name not in OWN}
    width = int(metric.split()[-2])
    gptq = peers.get("gptq")
    notes = {name: record["failed"] for name, record in here.items() if "failed" in record}
    notes |= {name: f"({record['bits']:.2f} bits)" for name, record in here.items() if "bits" in record}
    return Row(
        case=case,
        metric=metric,
        unit=unit,
        better="lower",
        ours=_figure(here[ours], figure) or 0.0,
        peers=peers,
        aim=AIMS.get(width) if figure != "seconds" else 1.0 if gptq else None,
        reference=gptq if figure == "seconds" else None,
        notes={**notes, "flyweight": f"({here[ours]['bits']:.2f} bits, {LABELS[ours]})"},
    )


def _at(records: Records, case: str, bits: int) -> dict[str, Mapping[str, Any]]:
    """The records of one model and width, by tool."""
    names = {name: f"{case}/{name}/{bits}" for name in LABELS}
    return {name: records[label] for name, label in names.items() if label in records}


def _fits(record: Mapping[str, Any] | None, bits: int) -> bool:
    """Whether a run of ours went well, in a file no larger than the common format's."""
    return record is not None and record.get("bits", math.inf) <= file_bits(bits) + ROUNDED


def _figure(record: Mapping[str, Any], figure: str) -> float | None:
    if "failed" in record:
        return None
    value = record["seconds"] if figure == "seconds" else record["figures"][figure]
    return float(value)


def table(records: Records) -> str:
    """One table a model: a line for each tool, a column for each width."""
    parts = []
    for case, (title, figure, unit) in CASES.items():
        tools = [name for name in LABELS if any(f"{case}/{name}/{bits}" in records for bits in BITS)]
        if not tools:
            continue
        best = {bits: _best(_at(records, case, bits), figure) for bits in BITS}
        lines = [
            f"**{title}**: {unit}, ± standard error; file bits a weight; seconds; {_last(figure)}.",
            "",
            "| tool | " + " | ".join(f"{bits} bits" for bits in BITS) + " |",
            "|---" * (len(BITS) + 1) + "|",
        ]
        for name in tools:
            here = {bits: records.get(f"{case}/{name}/{bits}") for bits in BITS}
            cells = (_cell(here[bits], figure, name == best[bits]) for bits in BITS)
            lines.append(f"| {LABELS[name]} | " + " | ".join(cells) + " |")
        parts.append("\n".join([*lines, *_missing(records, case)]))
    return "\n\n".join(parts) + "\n"


def summary(records: Records) -> str:
    """Of the language model alone: our smallest files beside the best peer, at the widths where both were measured."""
    title, figure, _ = CASES["smollm2"]
    lines = [f"| {title} | flyweight, KL | file bits | best peer, KL | file bits |", "|---" * 5 + "|"]
    for bits in BITS:
        here = _at(records, "smollm2", bits)
        peers = {name: record for name, record in here.items() if name not in NAMES}
        best, ours = _best(peers, figure), here.get("flyweight_entropy", {})
        if best and "figures" in ours:
            (own, size), (other, theirs) = (
                (f"{one['figures'][figure]:.3g}", f"{one['bits']:.2f}") for one in (ours, peers[best])
            )
            lines.append(f"| {bits} bits | **{own}** | {size} | {other} | {theirs}, {LABELS[best]} |")
    return "\n".join(lines) + "\n"


def _last(figure: str) -> str:
    return "perplexity" if figure == "kl" else "drop of the retrieval score"


def _best(here: Records, figure: str) -> str:
    known = {name: value for name, record in here.items() if (value := _figure(record, figure)) is not None}
    return min(known, key=lambda name: known[name], default="")


def _cell(record: Mapping[str, Any] | None, figure: str, best: bool) -> str:
    """A run in a few figures."""
    if record is None or "failed" in record:
        return "" if record is None else "—"
    seen = record["figures"]
    value = f"**{seen[figure]:.3g}**" if best else f"{seen[figure]:.3g}"
    last = f"{seen['perplexity']:.4g}" if figure == "kl" else f"{seen['drop']:.1%}"
    error = f"{seen[figure + '_error']:.1g}"
    return f"{value} ± {error}; {record['bits']:.2f}; {record['seconds']:.0f} s; {last}"


def _missing(records: Records, case: str) -> Iterator[str]:
    """A line for each answer that is missing, with the reason."""
    said: dict[tuple[str, str], list[int]] = {}
    for name in LABELS:
        for bits, record in ((bits, records.get(f"{case}/{name}/{bits}", {})) for bits in BITS):
            if "failed" in record:
                said.setdefault((name, str(record["failed"])), []).append(bits)
    if said:
        yield ""
    for (name, why), widths in said.items():
        yield f"- {LABELS[name]}, {', '.join(map(str, widths))} bits: {why.replace('|', '/')}"


def write_page(records: Records) -> None:
    """Put the table between the page's markers."""
    PAGE.write_text(_between(PAGE.read_text(), "weight_codes", table(records)))


COLOURS = {
    "nearest": "#8b949e",
    "flyweight": "#1f6feb",
    "flyweight_tuned": "#58a6ff",
    "flyweight_entropy": "#0b3d91",
    "gptq": "#d1242f",
    "gptq_mse": "#f0883e",
    "autoround": "#8250df",
    "autoround_light": "#a475f9",
    "autoround_ext": "#d2a8ff",
    "autoround_200": "#bf3989",
    "hqq": "#1a7f37",
    "hqq_64": "#57ab5a",
    "nncf": "#9a6700",
    "nncf_gptq": "#d4a72c",
    "quanto": "#0a7ea4",
}
WIDE, HIGH, LEFT, TOP, LABEL = 420, 300, 60, 40, 310


def picture(records: Records) -> str:
    """An SVG of damage over file bits, both measured: a panel for each model, a line for each tool."""
    panels = [case for case in CASES if any(_line(records, case, name) for name in LABELS)]
    shown = [name for name in LABELS if any(_line(records, case, name) for case in CASES)]
    width, columns = LEFT + len(panels) * (WIDE + LEFT), max(1, len(panels) * (WIDE + LEFT) // LABEL)
    height = TOP + HIGH + 60 + 18 * -(-len(shown) // columns)
    parts = [f'<rect width="{width}" height="{height}" fill="#ffffff"/>']
    for index, case in enumerate(panels):
        parts.append(
            f'<g transform="translate({LEFT + index * (WIDE + LEFT)},{TOP})">{_panel(records, case)}</g>'
        )
    parts.append(f'<g transform="translate({LEFT},{TOP + HIGH + 60})">{_legend(shown, columns)}</g>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    style = (
        "<style>text{font:12px system-ui,sans-serif;fill:#57606a}polyline{fill:none;stroke-width:2}</style>"
    )
    return f'{head} role="img">{style}{"".join(parts)}</svg>\n'


def _line(records: Records, case: str, name: str) -> list[tuple[float, float]]:
    """(file bits, damage) of a tool at each width, by bits."""
    here = (records.get(f"{case}/{name}/{bits}", {"failed": ""}) for bits in BITS)
    figure = CASES[case][1]
    found = ((record["bits"], record["figures"][figure]) for record in here if "failed" not in record)
    return sorted((bits, value) for bits, value in found if math.isfinite(value) and value > 0)


def _panel(records: Records, case: str) -> str:
    title, _, unit = CASES[case]
    lines = {name: line for name in LABELS if (line := _line(records, case, name))}
    across, down = _axes([point for line in lines.values() for point in line])
    parts = [f'<text x="0" y="-16" font-weight="600">{html.escape(title)}: {html.escape(unit)}</text>']
    for tick in across.ticks:
        x = WIDE * across.at(tick) / 100
        parts.append(f'<path d="M{x:.1f} 0V{HIGH}" stroke="#d0d7de"/>')
        parts.append(f'<text x="{x:.1f}" y="{HIGH + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in down.ticks:
        y = HIGH * (1 - down.at(tick) / 100)
        parts.append(f'<path d="M0 {y:.1f}H{WIDE}" stroke="#d0d7de"/>')
        parts.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(
        f'<text x="{WIDE / 2}" y="{HIGH + 38}" text-anchor="middle">bits a weight in the file</text>'
    )
    return "".join([*parts, *(_drawn(name, line, across, down) for name, line in lines.items())])


def _axes(points: Sequence[tuple[float, float]]) -> tuple[Axis, Axis]:
    bits, values = zip(*points, strict=True)
    return linear(min(bits) - 0.3, max(bits) + 0.3, 8), logarithmic(min(values) / 1.3, max(values) * 1.3)


def _drawn(name: str, line: Sequence[tuple[float, float]], across: Axis, down: Axis) -> str:
    """A tool's line with a dot at each width, named when it is pointed at."""
    places = [(WIDE * across.at(bits) / 100, HIGH * (1 - down.at(value) / 100)) for bits, value in line]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{LABELS[name]}: {value:.3g} at {bits:.2f} bits</title></circle>'
        for (x, y), (bits, value) in zip(places, line, strict=True)
    )
    dashed = "" if name in OWN else ' stroke-dasharray="5 3"'
    return f'<g stroke="{COLOURS[name]}" fill="{COLOURS[name]}"><polyline points="{path}"{dashed}/>{dots}</g>'


def _legend(shown: Sequence[str], columns: int) -> str:
    parts = []
    for index, name in enumerate(shown):
        x, y = LABEL * (index % columns), 18 * (index // columns)
        parts.append(f'<rect x="{x}" y="{y}" width="14" height="10" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{x + 20}" y="{y + 10}">{html.escape(LABELS[name])}</text>')
    return "".join(parts)
