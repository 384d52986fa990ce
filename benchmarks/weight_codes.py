"""Weights in 8, 4, 3 and 2 bits: what they cost a model's answers, us and the peers side by side.

    .venv/bin/python -m benchmarks.weight_codes [--quick] [--only TOOL[:BITS] ...] [--case smollm2]

`make peers` makes the peers' environments. Everybody quantizes the linear layers of the blocks of the same model, with
the same calibration inputs; embeddings and the head stay float. A peer runs in a process of its own and hands over the
weights that it computes with; one judge measures all. Bits are those of the file: integers, scales, zeros and whatever else
a tool stores for a weight. Seconds are those from the loaded model to the quantized one. What is measured is kept at once
and not measured again until what it depends on changes; --again measures all the same, --table measures nothing and writes
what is there.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
import warnings
from collections.abc import Iterator

import torch

from benchmarks import _weight_runs as runs
from benchmarks._results import write
from benchmarks._weight_cases import CASES
from benchmarks._weight_report import ROWS, picture, rows, write_page
from flyweight.analysis.machine import cores

BITS = (8, 4, 3, 2)
SLOW = ("autoround_light", "autoround_ext", "autoround_200")
"""Left out unless asked for by name: a quarter of an hour to hours at each width."""


def main() -> int:
    """Measure what is asked for and not there, then write the JSON, the picture and the table; returns the exit code."""
    given = _parser().parse_args()
    start = time.time()
    torch.set_num_threads(cores())
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    wanted = list(_wanted(given.only))
    for name in [] if given.table else given.case or CASES:
        case = None
        for tool, bits in wanted:
            case = case or CASES[name](quick=given.quick)
            label = f"{name}/{tool}/{bits}"
            kept = runs.read(quick=given.quick).get(label, {})
            if given.again or kept.get("key") != runs.key(case, tool, bits):
                print(label, file=sys.stderr, flush=True)
                record = runs.run(case, tool, bits)
                runs.keep(label, record, quick=given.quick)
                print(f"  {_told(record)}", file=sys.stderr, flush=True)
                gc.collect()
    records = runs.read(quick=given.quick)
    if records:
        path = write("weight_codes", rows(records), start, quick=given.quick, extra={ROWS: records})
        path.with_suffix(".svg").write_text(picture(records))
        if not given.quick:
            write_page(records)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer inputs; writes elsewhere")
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="this model alone")
    parser.add_argument("--only", nargs="+", metavar="TOOL[:BITS]", help=f"of {', '.join(runs.tools())}")
    parser.add_argument("--again", action="store_true", help="measure what is there already")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    return parser


def _wanted(only: list[str] | None) -> Iterator[tuple[str, int]]:
    """Tools and widths, the quick tools first."""
    for asked in only or [n for n in runs.tools() if n not in SLOW]:
        tool, _, bits = asked.partition(":")
        if tool not in runs.tools() or (bits and (not bits.isdigit() or int(bits) not in BITS)):
            sys.exit(
                f"--only takes TOOL or TOOL:BITS, got {asked}; tools: {', '.join(runs.tools())}; bits: {BITS}"
            )
        yield from ((tool, width) for width in ([int(bits)] if bits else BITS))


def _told(record: runs.Record) -> str:
    """A record in one line."""
    if "failed" in record:
        return f"failed: {record['failed']}"
    figures = ", ".join(f"{name} {value:.4g}" for name, value in record["figures"].items())
    return f"{record['bits']:.3f} bits, {record['seconds']:.0f} s, {figures}"


if __name__ == "__main__":
    sys.exit(main())
