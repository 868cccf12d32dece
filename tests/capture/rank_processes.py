"""Several processes of one training on this machine, connected by gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
RANKS = 2


def run_ranks(
    script: str, *arguments: object, options: Sequence[str] = ()
) -> list[subprocess.CompletedProcess[str]]:
    """Run a script in a process for each rank to their ends; the results are by rank.

    They find each other as those that `torchrun` starts do, by the environment. `options` are
    Python's.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(RANKS),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, *options, script, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(RANKS)
    ]
    try:
        return [
            subprocess.CompletedProcess(each.args, each.wait(), *output)
            for each in ranks
            for output in [each.communicate(timeout=150)]
        ]
    finally:
        for each in ranks:
            each.kill()
