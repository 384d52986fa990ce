"""What benchmarks/llamacpp.py found, as rows with aims, as a picture, and as the table in docs/quantization.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks._results import Row, bars, write

Records = Mapping[str, Mapping[str, Any]]
PEERS = ("llama.cpp", "llama.cpp, importance")
OURS = ("nearest", "error feedback", "error feedback, drift")
KL_AIM, SPEED_AIM = 0.7, 0.97
RESAMPLES = 2000
WHAT = ("decode", "prefill")


def report(records: Records, start: float, *, quick: bool) -> None:
    """Write the JSON with its rows, and the picture. start: time.time() at the beginning."""
    found = list(rows(records))
    path = write("llamacpp", found, start, quick=quick, extra={"records": dict(records)})
    path.with_suffix(".svg").write_text(bars([row for row in found if row.unit == "nats a token"]))


def types(records: Records) -> list[str]:
    """The types of which there is a file of ours and one of llama.cpp's, the largest first."""
    found = {name.split(", ")[0] for name, record in records.items() if "kl" in record}
    both = [kind for kind in found if all(_judged(records, kind, makers) for makers in (OURS, PEERS))]
    return sorted(
        both, key=lambda kind: (_wide(kind), -records[f"{kind}, {_judged(records, kind, OURS)[0]}"]["bytes"])
    )


def rows(records: Records) -> Iterator[Row]:
    """The figures of each type: our best file beside llama.cpp's."""
    for kind in types(records):
        mean = {
            maker: float(np.mean(records[f"{kind}, {maker}"]["kl"]))
            for maker in _judged(records, kind, OURS + PEERS)
        }
        best = min(_judged(records, kind, OURS), key=lambda maker: mean[maker])
        ours, peers = records[f"{kind}, {best}"], _judged(records, kind, PEERS)
        case = {"case": f"SmolLM2 {kind}"}
        yield Row(
            **case, metric=f"KL to the original, {best}", unit="nats a token", better="lower", ours=mean[best],
            ours_interval=bootstrap(ours["kl"]), peers={maker: mean[maker] for maker in peers}, aim=KL_AIM,
        )  # fmt: skip
        sizes: dict[str, float | None] = {
            maker: float(records[f"{kind}, {maker}"]["bytes"]) for maker in peers
        }
        yield Row(
            **case,
            metric="file",
            unit="bytes",
            better="lower",
            ours=float(ours["bytes"]),
            peers=sizes,
            aim=1.0,
        )
        for what in WHAT:
            for against, name, aim in (
                ("llama.cpp's own file", f"{kind}, {PEERS[0]}", SPEED_AIM), ("PyTorch", f"PyTorch, {_wide(kind)}", None),
            ):  # fmt: skip
                if what in ours and what in records.get(name, {}):
                    low, middle, high = paired(ours[what], records[name][what])
                    yield Row(
                        **case, metric=f"{what}, {against} = 1", unit="x", better="higher", ours=middle,
                        ours_interval=(low, high), reference=1.0, aim=aim,
                    )  # fmt: skip


def table(records: Records) -> str:
    """The rows as Markdown: KL by maker, and speeds where they were measured."""
    ours = (f"ours, {one}" for one in OURS)
    head = ("type", "file, MB", *PEERS, *ours, "best over best", *WHAT)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    found = list(rows(records))
    for kind in types(records):
        row, size, *speeds = (one for one in found if one.case == f"SmolLM2 {kind}")
        cells = [_cell(records.get(f"{kind}, {maker}")) for maker in (*PEERS, *OURS)]
        own = {one.metric.split(",")[0]: one for one in speeds if "own file" in one.metric}
        ratios = [_ratio(own.get(what)) for what in WHAT]
        lines.append(
            f"| {kind}{'*' if _wide(kind) == 'wide' else ''} | {size.ours / 1e6:.1f} | {' | '.join(cells)} "
            f"| **{row.ratio:.2f}** | {' | '.join(ratios)} |"
        )
    return "\n".join(lines) + "\n"


def _judged(records: Records, kind: str, makers: Sequence[str]) -> list[str]:
    return [maker for maker in makers if "kl" in records.get(f"{kind}, {maker}", {})]


def _wide(kind: str) -> str:
    """The model that a type was measured on: as it is, or made wider for super-blocks."""
    return "wide" if kind.endswith(("_K", "_XS")) else "own"


def _cell(record: Mapping[str, Any] | None) -> str:
    if record is None or "kl" not in record:
        return ""
    low, high = bootstrap(record["kl"])
    return f"{np.mean(record['kl']):.3g} [{low:.2g}, {high:.2g}]"


def _ratio(row: Row | None) -> str:
    if row is None or row.ours_interval is None:
        return ""
    return f"{row.ours:.2f} [{row.ours_interval[0]:.2f}, {row.ours_interval[1]:.2f}]"


def paired(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """The ratio of two speeds, turn by turn: quarter, median, three quarters."""
    ratios = [a / b for a, b in zip(ours, others, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean over windows, by drawing windows anew."""
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
