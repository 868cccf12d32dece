"""Run the benchmarks: one JSON object per line on stdout. `run.py [NAME]…`, by default all.

Each object has `name`, `value`, `unit`, where it makes sense ratios of the same run, `n` (how often
it was measured), the machine and the versions. Progress goes to stderr.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = ("opening", "compute", "pairs", "peers", "growth", "recorder", "training")
PACKAGES = ("straightway", "numpy", "numba", "dask", "zarr", "crc32c", "torch")


def main(names: list[str]) -> None:
    """Run the named benchmarks, by default all of them."""
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        sys.exit(
            f"error: there is no benchmark {unknown[0]!r}; choose from {', '.join(BENCHMARKS)}"
        )
    # A limit or kernel chosen for someone's BLAS must not colour the numbers.
    for name in list(os.environ):
        if "BLAS" in name or name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
            del os.environ[name]
    facts = {"machine": machine(), "versions": versions()}
    for name in names or BENCHMARKS:
        print(f"benchmark: {name}", file=sys.stderr)
        for row in importlib.import_module(f"bench_{name}").rows():
            print(json.dumps({**rounded(row), **facts}), flush=True)


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Four significant digits; more would be noise."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, memory, system."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """Python and the packages that the numbers rest on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
