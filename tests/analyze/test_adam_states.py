"""The states that Adam's metric is made of: missing, damaged, in another order, summed before."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from torch import optim

from analyze.cli import main
from analyze.plans import project_metric
from analyze.tables import measure_run
from capture.store import MappedShard
from capture.store.attributes import attributes_checksum
from capture.store.kept_states import KeptState
from tests.analyze.adam_runs import (
    COLUMNS,
    KEPT,
    PLAIN,
    note_of,
    one_group,
    steps_with_metric,
    train,
    two_groups,
)
from tests.analyze.small_runs import flip


def test_without_kept_states_nothing_is_lost_but_the_metric(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    train(path, partial(optim.Adam, **PLAIN), keep_state=None, total=5)
    (table,) = measure_run(str(path)).values()
    assert note_of(table).startswith("no metric: no second moments were kept; record with --keep")
    assert not any(np.isfinite(table[column].to_numpy()).any() for column in COLUMNS)
    assert np.isfinite(table["cosine"].to_numpy()).all()


def test_states_where_a_stream_has_no_row_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    train(path, partial(optim.Adam, **PLAIN), keep_state="5", every=2, gradients="minibatch@2")
    (table,) = measure_run(str(path)).values()
    assert steps_with_metric(table) == [10]
    (of_weights,) = measure_run(str(path), streams=["weights"]).values()
    assert note_of(of_weights) == (
        "no metric: second moments were kept after 5, 10 updates, where these streams have no "
        "gradient"
    )


def test_one_missing_state_is_one_step_without_a_metric(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    train(path, partial(optim.Adam, **PLAIN))
    (whole,) = measure_run(str(path)).values()
    (path / KEPT / "000000004.json").unlink()
    (table,) = measure_run(str(path)).values()
    assert (steps_with_metric(whole), steps_with_metric(table)) == ([4, 8], [8])


DAMAGE = {
    "tensors": (lambda folder: flip(next(folder.glob("000000004-*")), -9), "its checksum"),
    "header": (lambda folder: flip(next(folder.glob("000000004-*")), 20), "its checksum"),
    "cut off": (
        lambda folder: next(folder.glob("000000004-*")).write_bytes(b""),
        "its checksum",
    ),
    "gone": (lambda folder: next(folder.glob("000000004-*")).unlink(), "the file is missing"),
    "tree": (lambda folder: flip(folder / "000000004.json", 300), ""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_one_clear_line(tmp_path: Path, damage: str) -> None:
    path, out = tmp_path / "run.zarr", tmp_path / "table.parquet"
    train(path, partial(optim.Adam, **PLAIN))
    harm, words = DAMAGE[damage]
    harm(path / KEPT)
    done = CliRunner().invoke(main, ["compute", str(path), "--out", str(out)])
    assert done.exit_code == 3
    (line,) = [line for line in done.output.splitlines() if line]
    assert "the state kept after 4 updates is damaged" in line
    assert words in line
    assert "remove kept/000000004.json" in line
    assert not out.exists()
    (path / KEPT / "000000004.json").unlink()
    assert CliRunner().invoke(main, ["compute", str(path), "--out", str(out)]).exit_code == 0


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every shard and every state that is opened."""
    found: list[str] = []
    for kind in (MappedShard, KeptState):

        def noting(self: Any, *arguments: Any, original: Any = kind.__init__) -> None:
            found.append(type(self).__name__)
            original(self, *arguments)

        monkeypatch.setattr(kind, "__init__", noting)
    return found


def test_a_second_question_reads_nothing(tmp_path: Path, opened: list[str]) -> None:
    path = tmp_path / "run.zarr"
    train(path, partial(optim.Adam, **PLAIN), extra=True)
    first = measure_run(str(path), ["final", "step:2"], by=["layer"])["layer"]
    assert "KeptState" in opened
    opened.clear()
    again = measure_run(str(path), ["step:2", "final"], by=["layer", "tensor"])["layer"]
    assert opened == []
    for column in COLUMNS:
        ours, theirs = (
            t.filter(pa.compute.equal(t["reference"], "final"))[column] for t in (first, again)
        )
        np.testing.assert_array_equal(ours, theirs)
    bare = measure_run(str(path), ["final", "step:2"], by=["layer"], cache=False)["layer"]
    assert "KeptState" in opened
    for column in COLUMNS:
        np.testing.assert_array_equal(bare[column], first[column])


def test_only_what_is_lacking_is_summed(tmp_path: Path, opened: list[str]) -> None:
    path = tmp_path / "run.zarr"
    train(path, partial(optim.Adam, **PLAIN), extra=True)
    measure_run(str(path), streams=["minibatch"])
    opened.clear()
    both = measure_run(str(path), ["final", "step:0"])["model"]
    assert opened.count("KeptState") <= 2 * 12
    bare = measure_run(str(path), ["final", "step:0"], cache=False)["model"]
    for column in COLUMNS:
        np.testing.assert_array_equal(both[column], bare[column])


def test_sums_of_other_states_are_recognised(tmp_path: Path) -> None:
    """The second moments of step 8 give way to those of another training."""
    path, other = tmp_path / "run.zarr", tmp_path / "other.zarr"
    train(path, partial(optim.Adam, **PLAIN))
    train(other, partial(optim.Adam, lr=0.02, betas=(0.0, 0.5)))
    (first,) = measure_run(str(path)).values()
    for file in (path / KEPT).glob("000000008*"):
        file.unlink()
    for file in (other / KEPT).glob("000000008*"):
        file.rename(path / KEPT / file.name)
    (second,) = measure_run(str(path)).values()
    (bare,) = measure_run(str(path), cache=False).values()
    dist = [table["norm_dist_adam"].to_numpy() for table in (first, second, bare)]
    assert dist[0][2] == dist[1][2]
    assert dist[0][4] != dist[1][4]
    np.testing.assert_array_equal(dist[1], dist[2])
    files = [file.name for file in (tmp_path / "run.moments").glob("adam.minibatch-*")]
    assert len(files) == 1, "what is stale goes"


def as_recorded_before(path: Path) -> None:
    """Take from a run what earlier versions did not keep."""
    file = path / "zarr.json"
    document = json.loads(file.read_text())
    entries = document["attributes"]["straightway"]
    del entries["optimizer_parameters"]
    entries["crc32c"] = attributes_checksum(entries)
    file.write_text(json.dumps(document))


def test_a_run_recorded_before_is_measured_where_its_order_is_certain(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    train(path, partial(optim.Adam, **PLAIN), groups=one_group)
    (table,) = measure_run(str(path), cache=False).values()
    as_recorded_before(path)
    (again,) = measure_run(str(path), cache=False).values()
    assert steps_with_metric(again) == [4, 8]
    for column in COLUMNS:
        np.testing.assert_array_equal(table[column], again[column])


@pytest.mark.parametrize(
    ("groups", "frozen", "words"),
    [
        (two_groups, False, "and there are 2 parameter groups"),
        (one_group, True, "and there are 5 in the optimizer, 4 trained"),
        (
            lambda model: [*model.parameters()][::-1],
            False,
            "'gate' has shape [4] where they have [2]",
        ),
        (lambda model: [*model.parameters()][:4], False, "and there are 4 in the optimizer"),
    ],
)
def test_where_the_order_is_not_certain_it_says_so(
    tmp_path: Path, groups: Any, frozen: bool, words: str
) -> None:
    path = tmp_path / "run.zarr"
    train(path, partial(optim.Adam, **PLAIN), groups=groups, frozen=frozen)
    (told,) = measure_run(str(path), cache=False).values()
    assert steps_with_metric(told) == [4, 8]
    as_recorded_before(path)
    (table,) = measure_run(str(path), cache=False).values()
    assert steps_with_metric(table) == []
    assert note_of(table).startswith("no metric: which second moments belong to which tensor")
    assert words in note_of(table)


def test_a_run_that_still_records_keeps_no_sums(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"

    class Stop(Exception):
        pass

    def stopping(groups: Any) -> optim.Optimizer:
        optimizer = optim.Adam(groups, **PLAIN)
        steps = iter(range(9))

        def stop(*_: Any) -> None:
            if next(steps) == 8:
                raise Stop

        optimizer.register_step_pre_hook(stop)
        return optimizer

    with pytest.raises(Stop):
        train(path, stopping)
    (table,) = measure_run(str(path), ["step:0"]).values()
    assert steps_with_metric(table)[0] == 4
    assert not (tmp_path / "run.moments").exists()


def test_what_the_metric_will_read_is_said_before(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    train(path, partial(optim.Adam, **PLAIN), keep_state="8", total=17)
    kept = sorted((path / "weights/value/.straightway/kept").glob("*.safetensors"))
    words = project_metric(str(path))
    assert len(words) == 1
    assert (
        f"{len(kept)} kept states of {sum(f.stat().st_size for f in kept) / 1e3:.3g} kB" in words[0]
    )
    measure_run(str(path))
    assert project_metric(str(path)) == []
    assert project_metric(str(path), cache=False) == words
    train(tmp_path / "other.zarr", partial(optim.Adam, **PLAIN), keep_state=None, total=5)
    assert project_metric(str(tmp_path / "other.zarr")) == []
