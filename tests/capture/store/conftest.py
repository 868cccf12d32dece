"""What the tests of the store share: the sample run, and the environment of a program."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let syncs do nothing: no test can cut the power. Their order is tested in test_files."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def sample() -> Any:
    """The module `sample_run.py`, which is a program as well."""
    spec = importlib.util.spec_from_file_location("sample_run", HERE / "sample_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def program() -> tuple[list[str], dict[str, str]]:
    """Command and environment that start `sample_run.py` as a process of its own."""
    paths = [str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return [sys.executable, "-W", "error", str(HERE / "sample_run.py")], environment


@pytest.fixture
def run_path(tmp_path: Path, sample: Any) -> Path:
    """A complete run of 4 updates: 5 rows of weights, 4 of `minibatch` and of `fixed`."""
    sample.record(tmp_path / "a run, ñ.zarr")
    return tmp_path / "a run, ñ.zarr"
