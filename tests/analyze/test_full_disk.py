"""A full disk: one line whose advice fits the command, and nothing half-written."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analyze import spill
from analyze.spill import SpilledChunks
from capture.store import ChunkGrid, WriteError
from tests.analyze.recorded import random_run
from tests.analyze.test_cli import analyze

COMMANDS = {
    "compute": ["t.parquet"],
    "pairs": ["t.parquet", "--lags", "1"],
    "pca": ["t.parquet"],
    "schedule": ["t.csv"],
    "report": ["t.html"],
    "export": ["t.zarr"],
    "methods": ["t.md"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, on a disk that holds half of what is written to it and no more."""
    monkeypatch.chdir(tmp_path)
    random_run(tmp_path / "run.zarr")
    write = os.write

    def refuse(descriptor: int, data: Any) -> int:
        if descriptor > 2:
            write(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    def refuse_whole(path: Path, data: Any) -> int:
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", refuse)
    monkeypatch.setattr(Path, "write_bytes", refuse_whole)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_what_to_do_fits_the_command(folder: Path, command: str) -> None:
    out, *options = COMMANDS[command]
    done = analyze(command, "run.zarr", *options, "--out", out)
    assert done.exit_code == 1
    last = f"error: cannot write, the disk is full: {out}; free space, then try again"
    assert done.stderr.splitlines()[-1] == last
    assert done.stdout == ""
    assert [path.name for path in folder.iterdir() if "run." not in path.name] == []
    assert [path for path in folder.rglob("*") if path.name.endswith(".tmp")] == []


def test_a_reference_that_finds_no_room_says_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others filled the disk after its free space was asked for."""

    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    grid = ChunkGrid(num_elements=100, itemsize=4)
    spilled = SpilledChunks(grid, np.dtype(np.float64), lambda chunk: np.zeros(100))
    monkeypatch.setattr(spill.os, "pwrite", refuse)
    with pytest.raises(WriteError, match=r"the disk is full: .*; free space there, or set TMPDIR"):
        spilled.chunk(0)
