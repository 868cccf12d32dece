"""A training that diverged is data: its NaN and infinities are counted, told, and kept."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from capture import Recorder, import_checkpoints, open_run
from capture.info import describe_run, format_description
from capture.store import InputError

NAN, INF = math.nan, math.inf


def save(folder: Path, step: int, **tensors: list[float]) -> None:
    folder.mkdir(exist_ok=True)
    state = {name: torch.tensor(values) for name, values in tensors.items()}
    save_file(state, folder / f"step_{step}.safetensors")


def diverging(folder: Path) -> Path:
    save(folder, 0, a=[0.5, 1.0, 2.0], b=[1.0, 3.0])
    save(folder, 10, a=[1.0, NAN, -INF], b=[1.0, 2.0])
    save(folder, 20, a=[NAN, NAN, NAN], b=[INF, 1.0])
    return folder


def test_they_are_told_by_file_step_tensor_and_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = diverging(tmp_path / "kept"), tmp_path / "run.zarr"
    imported = import_checkpoints(source, out)
    kept = {
        10: {"a": {"nan": 1, "infinite": 1}},
        20: {"a": {"nan": 3, "infinite": 0}, "b": {"nan": 0, "infinite": 1}},
    }
    assert imported.not_finite == kept
    entries = open_run(out).attributes["imported"]["checkpoints"]
    assert {e["step"]: e["not_finite"] for e in entries if "not_finite" in e} == kept
    one, two, end = (record.getMessage() for record in caplog.records)
    assert one == (
        f"step 10 ({source / 'step_10.safetensors'}): 2 of 5 weights are not finite, in "
        "'a' (1 NaN, 1 infinite)"
    )
    assert two.endswith("4 of 5 weights are not finite, in 'a' (3 NaN), 'b' (1 infinite)")
    assert end.startswith("the last checkpoint is not finite, so nothing can be measured against")
    # What was saved is what was imported.
    assert open_run(out).stream("weights").read(1).tolist()[2:] == [-INF, 1.0, 2.0]


def test_info_shows_where_they_are(tmp_path: Path) -> None:
    import_checkpoints(diverging(tmp_path / "kept"), tmp_path / "run.zarr")
    description = describe_run(tmp_path / "run.zarr")
    assert description["not_finite"] == {"steps": [10, 20]}
    shown = format_description(description)
    assert "not finite  weights of 2 checkpoints, at steps 10, 20, w_T among them\n" in shown


def test_many_tensors_are_counted_and_not_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 0, a=[0.0], b=[0.0], c=[0.0], d=[0.0], e=[0.0])
    save(tmp_path, 1, a=[NAN], b=[NAN], c=[NAN], d=[NAN], e=[NAN])
    save(tmp_path, 2, a=[0.0], b=[0.0], c=[0.0], d=[0.0], e=[1.0])
    with caplog.at_level(logging.WARNING):
        import_checkpoints(tmp_path, tmp_path / "run.zarr")
    first = caplog.records[0].getMessage()
    assert first.endswith(
        "5 of 5 weights are not finite, in 'a' (1 NaN), 'b' (1 NaN), 'c' (1 NaN) and 2 more tensors"
    )
    assert not any("against `final`" in record.getMessage() for record in caplog.records)


def test_infinities_may_be_a_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in range(2):
        save(tmp_path, step, w=[1.0 + step], mask=[0.0, -INF])
    import_checkpoints(tmp_path, tmp_path / "run.zarr")
    assert any("say so by --buffers" in record.getMessage() for record in caplog.records)
    caplog.clear()
    import_checkpoints(tmp_path, tmp_path / "other.zarr", buffers="mask")
    assert not caplog.records


def test_where_nothing_is_finite_there_is_no_run(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    save(kept, 0, a=[NAN, 1.0], b=[INF])
    save(kept, 1, a=[NAN, NAN], b=[1.0, NAN][1:])
    with pytest.raises(
        InputError, match=r"no tensor is finite in any of the checkpoints: .*step_1"
    ):
        import_checkpoints(kept, tmp_path / "run.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    # One tensor is enough.
    save(kept, 2, a=[NAN, NAN], b=[1.0])
    import_checkpoints(kept, tmp_path / "run.zarr")


def test_the_command_warns_on_stderr_and_goes_on(tmp_path: Path) -> None:
    source, out = diverging(tmp_path / "kept"), tmp_path / "run.zarr"
    code = "from capture.cli import main; main()"
    command = [sys.executable, "-c", code, "import", source, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 3
    assert warnings[0].startswith("warning: step 10 (")


def test_info_tells_a_recorded_run_that_diverged(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=1) as _:
        for step in range(4):
            optimizer.zero_grad()
            (model(torch.ones(1, 2)).sum() * (1.0 if step < 2 else NAN)).backward()
            optimizer.step()
    description = describe_run(tmp_path / "run.zarr")
    assert description["not_finite"] == {"updates": 2, "first": 2}
    shown = format_description(description)
    assert "not finite  norms of 2 updates, the first at step 2\n" in shown
