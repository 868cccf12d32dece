"""Measure a run on workers that are SLURM jobs of their own: pip install dask-jobqueue

python slurm_jobqueue.py RUN.zarr OUT.parquet --jobs 8
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dask_jobqueue import SLURMCluster  # type: ignore[import-not-found]
from distributed import Client

import analyze


def main() -> None:
    """Start the jobs, measure on them, end them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("out")
    parser.add_argument(
        "--reference", action="append", help="as for analyze compute, may be repeated"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=4, help="of each job")
    parser.add_argument("--partition")
    parser.add_argument("--walltime", default="01:00:00")
    parser.add_argument("--interface", help="network interface that the nodes see each other on")
    given = parser.parse_args()
    options: dict[str, Any] = {
        "queue": given.partition,
        "walltime": given.walltime,
        "interface": given.interface,
        "cores": given.threads,
        "processes": 1,
        "memory": f"{given.threads}GiB",
        # Dask would count mapped pages, which the system can drop at any time, as used memory.
        "worker_extra_args": ["--memory-limit", "0"],
        "log_directory": str(Path("slurm-logs").absolute()),
    }
    with SLURMCluster(**options) as cluster:
        cluster.scale(jobs=given.jobs)
        with Client(cluster) as client:
            client.wait_for_workers(1)  # as long as the queue takes
            tables = analyze.measure_run(
                given.run, given.reference or ["final"], scheduler=cluster.scheduler_address
            )
    analyze.write_table(tables["model"], given.out)


if __name__ == "__main__":
    main()
