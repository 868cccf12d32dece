"""The wall: `analyze` and `capture.store` never load torch, and help loads next to nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each takes a good part of the half second by itself.
HEAVY = {"torch", "numpy", "zarr", "dask", "distributed", "numba", "pyarrow", "pandas", "xarray"}
HEAVY |= {"matplotlib", "jinja2", "sklearn", "safetensors"}

# Runs the first argument as code, then reports on its last line which top-level modules are loaded.
REPORTER = """
import json, sys
try:
    exec(sys.argv.pop(1))
except SystemExit as leaving:
    assert not leaving.code, leaving.code
finally:
    print()
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def loaded_by(code: str, *arguments: str) -> set[str]:
    """Top-level modules of a fresh Python after running `code` with these arguments."""
    done = subprocess.run(
        [sys.executable, "-c", REPORTER, code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def modules_of(package: str) -> list[str]:
    """Every module below a package, read off its files: nothing is imported here."""
    folder = ROOT / package.replace(".", "/")
    names = []
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


@pytest.mark.parametrize("module", ["capture", "capture.store", "analyze"])
def test_importing_a_package_loads_no_torch(module: str) -> None:
    assert "torch" not in loaded_by(f"import {module}")


@pytest.mark.parametrize("package", ["capture.store", "analyze"])
def test_no_module_behind_the_wall_loads_torch(package: str) -> None:
    modules = modules_of(package)
    assert len(modules) > 5, f"found only {modules}"
    assert "torch" not in loaded_by("\n".join(f"import {module}" for module in modules))


def test_the_check_sees_torch_where_it_is_loaded() -> None:
    assert "torch" in loaded_by("import capture.recorder")
    assert "torch" in loaded_by("from capture import Recorder")


def test_a_run_is_analyzed_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    run = min((ROOT / "tests" / "golden").glob("*.zarr"))
    table, report = tmp_path / "table.parquet", tmp_path / "report.html"
    without_torch = "import sys; sys.modules['torch'] = None; from analyze.cli import main; main()"
    loaded_by(without_torch, "compute", str(run), "--no-cache", "--out", str(table))
    loaded_by(without_torch, "report", str(table), "--out", str(report))
    assert report.stat().st_size > 0


@pytest.mark.parametrize(
    ("file", "banned"),
    [
        ("analyze/new.py", True),
        ("capture/store/new.py", True),
        ("capture/new.py", False),
        ("capture/tasks/new.py", False),
        ("tests/test_new.py", False),
    ],
)
def test_ruff_bans_torch_behind_the_wall(file: str, banned: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select=TID251", "--stdin-filename", file, "-"],
        input="def late():\n    from torch import nn\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("TID251" in done.stdout) == banned, done.stdout + done.stderr


def help_pages(program: str) -> list[list[str]]:
    """The arguments of every help page of a program: its own and that of each command."""
    listing = f"from {program}.cli import main; print(*main.commands, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", listing], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [["--help"], *([command, "--help"] for command in done.stdout.split())]


@pytest.mark.parametrize("program", ["capture", "analyze"])
def test_help_loads_nothing_heavy(program: str) -> None:
    pages = help_pages(program)
    assert len(pages) > 2
    for page in pages:
        loaded = loaded_by(f"from {program}.cli import main; main(prog_name='{program}')", *page)
        assert "click" in loaded
        assert not loaded & HEAVY, f"{program} {' '.join(page)} loads {loaded & HEAVY}"


# What the second stage needs to sum, to draw, or where one asks for it; not to look up and tell.
SLOW = {"numba", "llvmlite", "dask", "distributed", "pandas", "xarray", "zarr"}
COMPUTE = "from analyze.cli import main; main()"


@pytest.mark.parametrize("by", ["model", "layer"])
def test_asking_again_loads_nothing_slow(tmp_path: Path, by: str) -> None:
    """And asking for the first time loads some of it, so that the check can fail."""
    run = min((ROOT / "tests" / "golden").glob("*.zarr"))
    question = ("compute", str(run), "--cache", str(tmp_path / "kept"), "--by", by, "--out")
    first = loaded_by(COMPUTE, *question, str(tmp_path / "first.parquet"))
    assert {"numba", "dask"} <= first
    again = loaded_by(COMPUTE, *question, str(tmp_path / "again.parquet"))
    assert "pyarrow" in again
    assert not again & SLOW
    first_bytes = (tmp_path / "first.parquet").read_bytes()
    assert (tmp_path / "again.parquet").read_bytes() == first_bytes


def test_the_check_sees_what_is_slow_where_it_is_loaded() -> None:
    assert {"pandas", "scipy", "numba"} <= loaded_by("import pandas, scipy, numba")
