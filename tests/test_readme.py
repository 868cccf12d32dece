"""The README is executed: every `console` and `python` block, in order, in one empty folder.

Of a `console` block the lines that start with `$` are run; what stands below them is what the
command printed on the machine named in the README, and is not compared. Blocks in `text` are not
run: they hold output alone, or `make` targets, which would install a second environment.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """Yield the argument lists that run the README's blocks, in order."""
    for language, body in BLOCK.findall(text):
        if language == "python":
            yield [sys.executable, "-W", "error", "-c", body]
        if language == "console":
            for line in re.findall(r"^\$ ((?:.*\\\n)*.*)$", body, re.MULTILINE):
                yield ["bash", "-euo", "pipefail", "-c", line]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": programs, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=170
    )


@pytest.mark.timeout(900)  # a new user's whole first hour
def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    found = list(commands(README))
    assert len(found) >= 8
    for command in found:
        done = run(command, tmp_path)
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"


def test_a_readme_with_a_wrong_command_would_fail(tmp_path: Path) -> None:
    wrong = "```console\n$ capture info nowhere.zarr\n```\n```python\nimport analyze.nothing\n```\n"
    assert [run(command, tmp_path).returncode for command in commands(wrong)] == [3, 1]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_every_link_within_the_project_leads_somewhere(path: str) -> None:
    assert (ROOT / path).exists()
