"""Runs on a web server: read by range as from an object store, never listed, never written."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from torch import optim

from analyze.cli import main as analyze
from analyze.tables import measure_run
from capture.cli import main as capture
from capture.store import (
    DamagedError,
    InputError,
    NotARunError,
    RunWriter,
    UsageError,
    WriteError,
    export_state_dict,
    open_run,
    verify_run,
)
from capture.store.objects import ObjectPath
from capture.store.place import is_locked
from tests.analyze.adam_runs import note_of, steps_with_metric, train
from tests.analyze.small_runs import random_streams, write_run
from tests.capture.conftest import Quiet, Ranges

SIZE = 2_500_000  # three inner chunks


@pytest.fixture
def web(serve, tmp_path):
    """A folder, and the address under which a server shows it that knows ranges."""
    folder = tmp_path / "web"
    folder.mkdir()
    return folder, serve(partial(Ranges, directory=folder))


def test_a_finished_run_is_read_as_from_a_disk(web, sample, tmp_path):
    folder, address = web
    sample.record(folder / "a run, ñ.zarr")
    ours, theirs = open_run(folder / "a run, ñ.zarr"), open_run(f"{address}/a run, ñ.zarr")
    assert theirs.name == ours.name
    assert theirs.scalar_names() == ours.scalar_names()
    for name, batch in (("weights", None), ("fixed", 1)):
        found = theirs.stream(name).read(2, batch)
        np.testing.assert_array_equal(found, ours.stream(name).read(2, batch))
    for name in ours.scalar_names():
        np.testing.assert_array_equal(theirs.scalar(name), ours.scalar(name))
    assert verify_run(theirs.path).problems == []
    assert verify_run(theirs.path).shards == verify_run(ours.path).shards
    export_state_dict(theirs.path, 2, tmp_path / "theirs.safetensors")
    export_state_dict(ours.path, 2, tmp_path / "ours.safetensors")
    exported = [tmp_path / f"{name}.safetensors" for name in ("theirs", "ours")]
    assert exported[0].read_bytes() == exported[1].read_bytes()
    assert not is_locked(theirs.path / "weights/value/.straightway/lock")


def test_it_is_measured_as_from_a_disk(web, tmp_path):
    folder, address = web
    streams = {name: rows[:3] for name, rows in random_streams(SIZE, rows=3).items()}
    write_run(folder / "run.zarr", [SIZE], {name: streams[name] for name in ("weights", "updates")})
    tables = []
    for run in (folder / "run.zarr", f"{address}/run.zarr"):
        out = tmp_path / f"{len(tables)}.parquet"
        arguments = ["compute", run, "--reference", "step:10", "--no-cache", "--out", out]
        done = CliRunner().invoke(analyze, [str(each) for each in arguments])
        assert done.exit_code == 0, done.output
        table = pq.read_table(out)
        assert set(table.column("run").to_pylist()) == {str(run)}
        tables.append(table.drop_columns(["run"]).to_pandas())
    assert len(tables[0]) == 2
    assert tables[0].equals(tables[1])


def test_states_that_were_kept_are_not_looked_for(web):
    folder, address = web
    train(folder / "run.zarr", optim.Adam)
    (ours,) = measure_run(str(folder / "run.zarr"), cache=False).values()
    (theirs,) = measure_run(f"{address}/run.zarr", cache=False).values()
    assert steps_with_metric(ours) == [4, 8]
    assert steps_with_metric(theirs) == []
    assert "a web server does not tell which states were kept" in note_of(theirs)
    np.testing.assert_array_equal(ours["cosine"], theirs["cosine"])


def test_nothing_is_written(web, sample):
    folder, address = web
    sample.record(folder / "run.zarr")
    before = sorted(folder.rglob("*"))
    place = ObjectPath(f"{address}/run.zarr", "x")
    acts = [
        lambda: sample.create(f"{address}/new.zarr"),
        lambda: RunWriter.reopen(f"{address}/run.zarr"),
        lambda: place.write_bytes(b"x"),
        place.remove,
    ]
    for act in acts:
        with pytest.raises(UsageError, match=r"can only be read.*s3://"):
            act()
    assert sorted(folder.rglob("*")) == before
    done = CliRunner().invoke(capture, ["train", "--task=digits", f"--out={address}/run.zarr"])
    assert done.exit_code == 2
    assert "can only be read" in done.output


def test_a_run_that_has_not_ended_cannot_be_listed(web):
    folder, address = web
    write_run(folder / "run.zarr", [300], random_streams(300), complete=False)
    run = open_run(f"{address}/run.zarr")
    assert len(run.stream("weights").read(1)) == 300
    with pytest.raises(InputError, match=r"list of files.*a run that has ended"):
        run.scalar_names()


def test_what_is_no_run_or_is_damaged(web, sample):
    folder, address = web
    with pytest.raises(NotARunError, match="no such file or folder: http://"):
        open_run(f"{address}/run.zarr")
    with pytest.raises(UsageError, match="no run is named"):
        open_run(address)
    sample.record(folder / "run.zarr")
    (folder / "run.zarr/weights/value/c/1/0").unlink()
    with pytest.raises(DamagedError, match=r"row 1 .*missing.*http://"):
        open_run(f"{address}/run.zarr").stream("weights").read(1)


def test_a_server_without_ranges_is_told_from_a_damaged_run(serve, sample, tmp_path):
    sample.record(tmp_path / "run.zarr")
    address = serve(partial(Quiet, directory=tmp_path))
    with pytest.raises(InputError, match=r"no parts of files.*nginx") as caught:
        open_run(f"{address}/run.zarr").stream("weights").read(1)
    assert not isinstance(caught.value, DamagedError | WriteError)
