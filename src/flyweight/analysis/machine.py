"""What this machine is: processor, cores, memory, operating system, accelerator."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from flyweight.records import JSON

_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "i8mm",
    "sve",
)


def machine() -> dict[str, JSON]:
    """A description of this machine for results and reports."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "instructions": instructions(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Bytes of physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def instructions() -> list[JSON]:
    """The vector instructions that matter for integer and half-precision arithmetic."""
    words = set(_cpuinfo().split())
    return [flag for flag in _FLAGS if flag in words]


def _processor() -> str:
    for line in _cpuinfo().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""
