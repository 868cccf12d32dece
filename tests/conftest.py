"""Fixtures and settings for the whole suite."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Set before anything can load torch or matplotlib. One thread is the fastest for models this small,
# and programs that a test starts inherit it, so that runs made inside and outside this process may
# be compared bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# No deadline: compiling a kernel makes a first example slow. CI has the same examples every time.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(scope="module", autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a machine with a GPU, `--device auto` means the CPU in every test but those of CUDA.

    They compare bit for bit with loops of their own, which run on the CPU.
    """
    if "torch" not in sys.modules or request.path.stem == "test_cuda":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for programs that a test starts
        yield


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets, which `STRAIGHTWAY_DATA` names."""
    named = os.environ.get("STRAIGHTWAY_DATA")
    if not named:
        pytest.skip("STRAIGHTWAY_DATA is not set: no folder of real data sets to read")
    folder = Path(named)
    assert folder.is_dir(), f"STRAIGHTWAY_DATA is {named}, which is not a folder"
    return folder
