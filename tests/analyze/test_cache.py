"""Moments that are kept beside a run: read where they belong, and nowhere else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy

from analyze import cache, compute
from analyze.tables import measure_run
from capture.store import MappedShard, UsageError, open_run
from tests.analyze.recorded import random_run
from tests.analyze.small_runs import flip

REFERENCES = ["final", "step:2"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return random_run(tmp_path / "run.zarr")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every shard that is opened, by its path."""
    paths: list[str] = []
    original = MappedShard.__init__

    def noting(self: MappedShard, stream: Any, commit: Any, relative: str) -> None:
        paths.append(relative)
        original(self, stream, commit, relative)

    monkeypatch.setattr(MappedShard, "__init__", noting)
    return paths


def measure(run: Path, references: list[str] = REFERENCES, **options: Any) -> pa.Table:
    by = options.pop("by", "model")
    (table,) = measure_run(str(run), references, by=[by], **options).values()
    return table


def content(table: pa.Table) -> bytes:
    """All bytes of a table: NaN is not equal to itself."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


def same(left: pa.Table, right: pa.Table) -> bool:
    return content(left) == content(right)


def kept(run: Path) -> list[Path]:
    return sorted((run.parent / "run.moments").iterdir())


def test_a_second_question_reads_no_shard_and_has_the_same_bytes(
    run: Path, opened: list[str]
) -> None:
    first = measure(run)
    assert len({path for path in opened if path.startswith("weights")}) == 7
    opened.clear()
    again = measure(run)
    assert opened == []
    assert same(again, first)
    assert same(measure(run, cache=False), first)
    assert opened


@pytest.mark.parametrize("by", ["layer", "tensor", "kind", {"heads": "head"}])
def test_another_grouping_or_one_stream_reads_no_shard(
    run: Path, opened: list[str], by: Any
) -> None:
    measure(run)
    opened.clear()
    table = measure(run, ["step:2"], by=by, streams=["fixed"])
    assert opened == []
    assert same(table, measure(run, ["step:2"], by=by, streams=["fixed"], cache=False))


def test_only_what_is_lacking_is_summed(run: Path, opened: list[str]) -> None:
    measure(run, ["final"], streams=["minibatch"])
    opened.clear()
    measure(run, ["final", "mean:2"], streams=["minibatch", "updates"])
    assert any("minibatch" in path for path in opened), "mean:2 lacks there"
    opened.clear()
    measure(run, ["final", "mean:2", "step:0"], streams=["minibatch", "updates"])
    references = ["mean:2", "step:0", "final"]
    assert same(measure(run, references), measure(run, references, cache=False))


def test_the_same_point_under_another_name_is_the_same_point(run: Path, opened: list[str]) -> None:
    final = measure(run, ["final"])
    opened.clear()
    named = measure(run, ["step:6", f"run:{run}", f"run:{run}@6"])
    assert opened == []
    rows = named.filter(pa.compute.equal(named["reference"], "step:6"))
    np.testing.assert_array_equal(rows["cosine"], final["cosine"])


def test_a_file_of_other_contents_is_another_reference(run: Path, tmp_path: Path) -> None:
    values = {
        "body.0.weight": np.ones((4, 3), "f4"),
        "body.0.bias": np.ones(4, "f4"),
        "head.weight": np.ones((2, 4), "f4"),
        "scale": np.ones((), "f4"),
    }
    path = tmp_path / "other.safetensors"
    for factor in (1, 2):
        safetensors.numpy.save_file({k: np.full_like(v, factor) for k, v in values.items()}, path)
        # Times that lie: the contents must tell.
        os.utime(path, (1, 1))
        found = measure(run, [f"file:{path}"])
        assert same(found, measure(run, [f"file:{path}"], cache=False))


def test_another_run_in_its_place_is_recognised(run: Path, tmp_path: Path) -> None:
    measure(run)
    before = kept(run)
    shutil.rmtree(run)
    random_run(run, seed=1)
    fresh = measure(run)
    assert same(fresh, measure(run, cache=False))
    after = kept(run)
    assert len(after) == len(before), "what is stale goes when its stream is kept anew"
    assert not set(after) & set(before)


def another_entry(files: list[Path]) -> None:
    """Put the moments of the first file where those of the second are looked for."""
    shutil.copy(files[0], files[1])


@pytest.mark.parametrize(
    "harm",
    [
        lambda files: flip(files[0], -5),
        lambda files: flip(files[0], 3),
        lambda files: flip(files[0], 40),
        lambda files: files[0].write_bytes(files[0].read_bytes()[:-8]),
        lambda files: files[0].write_bytes(b""),
        lambda files: files[0].write_bytes(b"\xff" * 100),
        lambda files: (files[0].unlink(), files[0].mkdir()),
        another_entry,
    ],
)
def test_what_is_damaged_is_summed_again(
    run: Path, harm: Callable[[list[Path]], object], opened: list[str]
) -> None:
    first = measure(run)
    harm(kept(run))
    opened.clear()
    assert same(measure(run), first)
    assert opened


def test_the_kept_numbers_are_used(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests above can fail: a forged entry, with the right checksum, shows."""
    first = measure(run)

    def doubled(self: Any, stream: str, reference: str) -> Any:
        found = original(self, stream, reference)
        return cache.Entry(found.steps, 2 * found.moments, found.nonfinite)

    original = cache.MomentsCache.load
    monkeypatch.setattr(cache.MomentsCache, "load", doubled)
    assert not same(measure(run), first)


def test_a_run_that_still_records_is_not_kept(tmp_path: Path) -> None:
    path = random_run(tmp_path / "run.zarr", complete=False)
    table = measure(path, ["step:2"])
    assert table.num_rows > 0
    assert not (tmp_path / "run.moments").exists()


def test_a_folder_may_be_named_for_runs_of_the_same_name(run: Path, tmp_path: Path) -> None:
    other = random_run(tmp_path / "b" / "run.zarr", seed=3)
    place = tmp_path / "moments" / "deep"
    tables = [measure(path, cache=place) for path in (run, other)]
    assert len(list(place.iterdir())) == 2
    assert not (tmp_path / "run.moments").exists()
    again = [measure(path, cache=place) for path in (run, other)]
    assert all(map(same, again, tables))


def test_where_nothing_can_be_kept_the_numbers_come_all_the_same(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    table = measure(run, cache=blocked)
    assert same(table, measure(run, cache=False))
    assert blocked.read_text() == "no folder"
    assert "the moments are not kept" in caplog.text
    assert caplog.text.count("--no-cache") == 1


def test_a_folder_inside_a_run_is_refused(run: Path) -> None:
    before = sorted(run.rglob("*"))
    for where in (run, run / "weights"):
        with pytest.raises(UsageError, match="inside a run, where nothing else may be written"):
            measure_run(str(run), cache=where)
    assert sorted(run.rglob("*")) == before


def test_nothing_half_written_stays_where_the_measurement_fails(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(compute, "compute_moments", fail)
    with pytest.raises(KeyboardInterrupt):
        measure(run)
    assert not (run.parent / "run.moments").exists()


def test_any_reader_of_safetensors_reads_what_is_kept(run: Path) -> None:
    measure(run, ["final"], streams=["fixed"])
    (file,) = kept(run)
    found = safetensors.numpy.load_file(file)
    assert found["moments"].shape == (7, 3, 4, 7)
    w, g = (
        open_run(run).stream(name).read(2, *b) for name, b in (("weights", ()), ("fixed", (1,)))
    )
    assert found["moments"][2, 1, :, 5].sum() == pytest.approx(
        np.float64(w) @ (np.float64(w) - np.float64(open_run(run).stream("weights").read(6)))
    )
    assert found["moments"][2, 1, :, 1].sum() == pytest.approx(np.float64(g) @ np.float64(g))
