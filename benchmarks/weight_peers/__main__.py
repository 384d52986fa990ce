"""Runs one job in the peer's own environment: `python -m benchmarks.weight_peers REQUEST.json`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.weight_peers import peers
from benchmarks.weight_peers._job import read_job, write_done

if __name__ == "__main__":
    job = read_job(Path(sys.argv[1]))
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    write_done(job, peers()[job.peer].run(job))
