"""The project's own files agree with each other and with what is installed."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# What the CUDA build of torch brings on Linux: torch pins these itself, and its CPU build has none.
OF_CUDA = ("nvidia-", "cuda-", "triton")


def applies(marker: Marker | None, extra: str) -> bool:
    """Whether a requirement with this marker counts here when `extra` was asked for."""
    return marker is None or marker.evaluate({"extra": extra})


def requirements_of(requirement: Requirement) -> Iterator[Requirement]:
    """What the installed distribution needs in turn, with the extras asked of it."""
    if canonicalize_name(requirement.name) == "straightway":
        for extra in requirement.extras:
            yield from map(Requirement, PROJECT["optional-dependencies"][extra])
        yield from map(Requirement, PROJECT["dependencies"])
        return
    for line in metadata.requires(requirement.name) or []:
        needed = Requirement(line)
        if any(applies(needed.marker, extra) for extra in ("", *requirement.extras)):
            yield needed


def reachable(start: str) -> dict[str, Requirement]:
    """Every distribution that installing `start` brings here, straightway itself left out."""
    found: dict[str, Requirement] = {}
    seen, waiting = set(), [Requirement(start)]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen or name.startswith(OF_CUDA):
            continue
        seen.add(key)
        if name != "straightway":
            found[name] = requirement
        waiting.extend(requirements_of(requirement))
    return found


def pins() -> dict[str, list[Requirement]]:
    """The lines of constraints.txt that count for this Python, by name."""
    lines: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if applies(pin.marker, ""):
                lines.setdefault(canonicalize_name(pin.name), []).append(pin)
    return lines


def test_everything_installed_is_pinned_to_its_version() -> None:
    pinned, installed = pins(), reachable("straightway[dev]")
    assert len(installed) > 40
    assert not installed.keys() - pinned.keys(), "not in constraints.txt"
    stale = {
        name: f"{metadata.version(name)} is installed, and {pinned[name][0]} is pinned"
        for name in installed
        if not pinned[name][0].specifier.contains(metadata.version(name), prereleases=True)
    }
    assert not stale


def test_each_name_is_pinned_once_and_exactly() -> None:
    for name, lines in pins().items():
        assert len(lines) == 1, f"{name} has several pins that count for this Python"
        assert [each.operator for each in lines[0].specifier] == ["=="], f"{name} is not exact"


def test_constraints_name_no_host_and_no_path() -> None:
    assert not re.search(r"://|file:|^-|@", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_torch_is_asked_for_by_the_extra_capture_alone() -> None:
    torch = [
        (extra, line)
        for extra, lines in PROJECT["optional-dependencies"].items()
        for line in lines
        if Requirement(line).name == "torch"
    ]
    assert torch == [("capture", "torch>=2.4")]
    assert not any(Requirement(line).name == "torch" for line in PROJECT["dependencies"])


def test_installed_metadata_is_that_of_this_tree() -> None:
    try:
        installed = metadata.metadata("straightway")
    except metadata.PackageNotFoundError:
        pytest.skip("straightway is not installed here: `make test` installs it")
    assert installed["Version"] == PROJECT["version"]
    assert installed["License-Expression"] == "MIT"
    extras = installed.get_all("Provides-Extra", [])
    loops = {"transformers", "lightning", "accelerate", "integrations"}
    assert set(extras) == {"capture", "analyze", "objects", "pipelines", "all", "dev", *loops}
    asked = [Requirement(line) for line in installed.get_all("Requires-Dist", [])]
    (torch,) = [each for each in asked if each.name == "torch"]
    assert str(torch.specifier) == ">=2.4"
    commands = metadata.entry_points(group="console_scripts")
    assert {each.name: each.value for each in commands if each.name in ("capture", "analyze")} == {
        "capture": "capture.cli:main",
        "analyze": "analyze.cli:main",
    }


def test_newest_change_is_of_this_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## \[(.+?)\] - (unreleased|\d{4}-\d\d-\d\d)$", changes, re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"]


TARGETS = ["help", "demo", "test", "bench", "check", "format", "clean"]


@pytest.mark.parametrize("arguments", [[], ["help"]], ids=["make", "make help"])
def test_make_lists_what_it_can_do(arguments: list[str]) -> None:
    command = ["make", "--no-print-directory", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split()[1] for line in done.stdout.splitlines()] == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_can_be_made(target: str) -> None:
    command = ["make", "--dry-run", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_git_ignores_data_and_runs_but_not_what_explains_them() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    ignored = ["runs/demo/run.zarr/zarr.json", "data/cifar10/data_batch_1.bin", ".venv/bin/python"]
    kept = ["data/README.md", "data/cifar10/README.md", "data/cifar10/prepare.py"]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *ignored, *kept],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ignored
