"""Writes a benchmark's rows as JSON, as a table on the terminal and as an SVG of bars."""

from __future__ import annotations

import datetime
import html
import json
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure: ours beside the peers'."""

    case: str
    metric: str
    unit: str
    better: str
    """lower or higher."""
    ours: float
    ours_interval: tuple[float, float] | None = None
    peers: dict[str, float | None] = field(default_factory=dict)
    """None: the peer failed or broke the contract."""
    aim: float | None = None
    """Of `ratio`."""
    reference: float | None = None
    """What ours is divided by; without it, the best peer's figure."""
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Ours over the reference or the best peer."""
        if self.reference is not None:
            return self.ours / self.reference
        known = [value for value in self.peers.values() if value is not None]
        if not known:
            return None
        return self.ours / (max(known) if self.better == "higher" else min(known))

    @property
    def met(self) -> bool | None:
        """Whether the ratio reaches the aim; None without one."""
        if self.aim is None or self.ratio is None:
            return None
        return self.ratio >= self.aim if self.better == "higher" else self.ratio <= self.aim


def write(
    name: str, rows: list[Row], start: float, *, quick: bool, extra: dict[str, Any] | None = None
) -> Path:
    """Write NAME.json and NAME.svg; quick runs go to a folder of their own. start: time.time() at the beginning."""
    from flyweight.analysis.machine import machine
    from flyweight.session import versions

    folder = FOLDER / "quick" if quick else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "name": name,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {**versions(), **_peer_versions(), "python": platform.python_version()},
        "seconds": round(time.time() - start, 1),
        "rows": [_json(row) for row in rows],
        **(extra or {}),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    (folder / f"{name}.svg").write_text(bars(rows))
    print("\n" + table(rows))
    return path


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [
        f"{'case':<18}{'metric':<34}{'ours':>9}{'best peer or reference':>30}{'ratio':>8}{'aim':>7}  met"
    ]
    for row in rows:
        known = {n: v for n, v in row.peers.items() if v is not None}
        pick = max if row.better == "higher" else min
        best = pick(known, key=lambda n: known[n]) if known else ""
        against = (
            f"{row.reference:.4g}"
            if row.reference is not None
            else f"{best} {known[best]:.3f}"
            if best
            else "-"
        )
        ratio, aim = (f"{v:.2f}" if v is not None else "-" for v in (row.ratio, row.aim))
        met = {True: "yes", False: "NO", None: "-"}[row.met]
        lines.append(
            f"{row.case:<18}{row.metric[:33]:<34}{row.ours:>9.3f}{against:>30}{ratio:>8}{aim:>7}  {met}"
        )
    return "\n".join(lines)


def bars(rows: list[Row]) -> str:
    """An SVG with a group of bars for each row that has peers."""
    parts, y = [], 10
    for row in (r for r in rows if r.peers):
        values: dict[str, float | None] = {"flyweight": row.ours, **row.peers}
        top = max(v for v in values.values() if v is not None)
        title = html.escape(f"{row.case}: {row.metric} ({row.unit}, {row.better} is better)")
        parts.append(f'<text x="10" y="{y + 12}" font-weight="600">{title}</text>')
        y += 20
        for name, value in values.items():
            width = 0 if value is None else 330 * value / top
            label = (
                row.notes.get(name, "failed") if value is None else f"{value:.2f} {row.notes.get(name, '')}"
            )
            colour = "#1f6feb" if name == "flyweight" else "#8b949e"
            parts.append(f'<text x="180" y="{y + 12}" text-anchor="end">{html.escape(name)}</text>')
            parts.append(f'<rect x="190" y="{y + 1}" width="{width:.1f}" height="13" fill="{colour}"/>')
            parts.append(f'<text x="{196 + width:.1f}" y="{y + 12}">{html.escape(label)}</text>')
            y += 18
        y += 14
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {y}" width="760" height="{y}"'
    style = "<style>text{font:12px system-ui,sans-serif;fill:#57606a}</style>"
    return f'{head} role="img">{style}{"".join(parts)}</svg>\n'


def _json(row: Row) -> dict[str, Any]:
    return {**asdict(row), "ratio": row.ratio, "met": row.met}


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _peer_versions() -> dict[str, str]:
    import importlib.metadata as metadata

    found = {}
    for name in ("nncf", "torchao", "torch-pruning"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
