"""Comparisons of what nobody should compare: each is said in words, or refused in one line."""

import csv
import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from analyze.cli import main
from analyze.compare import compare_runs
from analyze.comparison import Comparison, write_comparison
from analyze.comparison_text import comparison_text
from analyze.tables import METADATA_KEY, concatenate, write_table
from capture.store.errors import InputError, UsageError
from tests.analyze.comparable import config_of, recorded_run, table_of
from tests.analyze.simulation import simulate


def draws(seed: int, count: int = 100) -> Any:
    return np.random.default_rng(seed).uniform(-0.1, 0.5, count)


def compared(folder: Path, *tables: pa.Table, by: str = "optimizer", **options: Any) -> Comparison:
    paths = [str(folder / f"{number}.parquet") for number in range(len(tables))]
    for table, path in zip(tables, paths, strict=True):
        write_table(table, path)
    return compare_runs(paths, by.split(","), **options)


def two_groups(**options: Any) -> list[pa.Table]:
    return [
        table_of(f"{name}{seed}", draws(seed + 9 * at), config=config_of(name, seed), **options)
        for at, name in enumerate(("adam", "sgd"))
        for seed in (0, 1)
    ]


def known(comparison: Comparison, quantity: str = "cosine") -> set[int]:
    """The numbers of runs in groups of a comparison."""
    return {
        row["runs"]
        for block in comparison.blocks
        for row in block.rows
        if row["quantity"] == quantity and row["against"] is None
    }


def test_without_a_configuration_there_is_something_to_group_by(tmp_path: Path) -> None:
    tables = [table_of(run, draws(seed)) for seed, run in enumerate("ab")]
    with pytest.raises(UsageError, match=r"no run has a setting 'lr'.*the runs have no conf.* run"):
        compared(tmp_path, *tables, by="lr")
    assert len(compared(tmp_path, *tables, by="run").groups) == 2


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run has a setting 'optimiser'; did you mean 'opti"):
        compared(tmp_path, *two_groups(), by="optimiser")
    with pytest.raises(UsageError, match="did you mean 'batch_size'"):
        compared(tmp_path, *two_groups(), by="batch-size")
    with pytest.raises(UsageError, match="no key to group by"):
        compared(tmp_path, *two_groups(), by="optimizer,")


@pytest.mark.parametrize("count", [1, 2])
def test_tables_of_a_row_or_two(tmp_path: Path, count: int) -> None:
    tables = [
        table_of(run, draws(seed, count), config=config_of("sgd", seed), total=10)
        for seed, run in enumerate("ab")
    ]
    comparison = compared(tmp_path, *tables)
    assert known(comparison) == {2}
    text = comparison_text(comparison)
    assert "early  sgd        2" in text
    alone = compared(tmp_path, tables[0])
    assert "one run says nothing about another seed" in comparison_text(alone)
    assert all(math.isnan(row["low"]) for block in alone.blocks for row in block.rows)


def test_numbers_that_are_all_nan(tmp_path: Path) -> None:
    tables = [
        table_of(run, np.full(100, np.nan), config=config_of("sgd", seed))
        for seed, run in enumerate("ab")
    ]
    comparison = compared(tmp_path, *tables)
    assert known(comparison) == {0}
    assert "Up to 60 rows of a group and part are left out" in comparison_text(comparison)
    # Nothing tells that they are one run.
    assert not any("counted once" in warning for warning in comparison.warnings)
    values = comparison.table()["value"].to_pylist()
    assert set(values) == {None}


def test_infinite_and_huge_numbers_are_left_out_or_kept(tmp_path: Path) -> None:
    values = draws(0)
    values[3:5] = np.inf, 1e300
    comparison = compared(tmp_path, table_of("a", values, config=config_of("sgd", 0)))
    row = next(row for row in comparison.blocks[0].rows if row["quantity"] == "cosine")
    assert (row["rows"], row["left_out"]) == (29, 1)
    assert row["value"] == pytest.approx(1e300 / 29)
    assert comparison_text(comparison)


def test_streams_and_references_that_only_some_runs_have(tmp_path: Path) -> None:
    a, b = config_of("sgd", 0), config_of("adam", 0)
    comparison = compared(
        tmp_path,
        table_of("a", draws(0), config=a),
        table_of("a", draws(1), config=a, stream="heldout"),
        table_of("b", draws(2), config=b),
        table_of("b", draws(3), config=b, reference="step:50"),
    )
    found = {(block.reference, block.stream): block for block in comparison.blocks}
    assert set(found) == {
        ("final", "minibatch"),
        ("final", "heldout"),
        ("step:50", "minibatch"),
    }
    assert [block.runs for block in found.values()] == [2, 1, 1]
    assert found["final", "heldout"].notes[0] == "without rows of heldout against final: b"
    assert found["step:50", "minibatch"].notes[0] == "without rows of minibatch against step:50: a"


def test_one_run_under_two_names_is_counted_once(tmp_path: Path) -> None:
    values = draws(0)
    tables = [table_of(run, values, config=config_of("sgd", 0)) for run in ("a", "copy/a")]
    tables.append(table_of("c", draws(1), config=config_of("sgd", 1)))
    comparison = compared(tmp_path, *tables)
    assert known(comparison) == {2}
    assert comparison.warnings[0] == "copy/a has the numbers of a: it is counted once"
    # By themselves they are two groups that differ in nothing.
    alone = compared(tmp_path, *tables[:2], by="run")
    assert alone.warnings[0] == "a and copy/a have the same numbers"
    pairs = [row for row in alone.blocks[0].rows if row["against"] and row["quantity"] == "cosine"]
    assert {row["value"] for row in pairs} == {0.0}


def test_one_run_as_run_and_as_table_and_given_twice(tmp_path: Path) -> None:
    run = str(recorded_run(tmp_path / "a.zarr", "momentum", 0, total=10))
    once = compare_runs([run], ["optimizer"])
    assert compare_runs([run, run], ["optimizer"]).table().equals(once.table())
    assert known(once) == {1}


def test_equal_settings_and_seeds_with_other_numbers_are_not_independent(tmp_path: Path) -> None:
    tables = [table_of(run, draws(at), config=config_of("sgd", 0)) for at, run in enumerate("ab")]
    comparison = compared(tmp_path, *tables)
    assert "a and b have one configuration, seeds included" in comparison.warnings[0]
    assert known(comparison) == {2}


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    tables = [table_of("a", draws(at), config=config_of(name, 0)) for at, name in enumerate("xy")]
    with pytest.raises(InputError, match="two different runs have this name in the tables: a"):
        compared(tmp_path, *tables)


def test_rows_of_layers_are_left_aside_and_alone_refused(tmp_path: Path) -> None:
    whole, layers = simulate("a"), simulate("a", by_tensor=True)
    alone = compared(tmp_path, whole, by="run")
    mixed = compared(tmp_path, concatenate([whole, layers]), by="run")
    assert mixed.table().equals(alone.table())
    with pytest.raises(InputError, match=r"no rows of a whole model; .*--by model"):
        compared(tmp_path, layers, by="run")


def test_a_layer_called_model_is_no_model(tmp_path: Path) -> None:
    table = table_of("a", draws(0), config=config_of("sgd", 0))
    place = table.column_names.index("num_parameters")
    layer = table.set_column(
        place, table.schema.field(place), pa.array([7] * table.num_rows, pa.int64())
    )
    mixed = concatenate([table, layer])
    assert compared(tmp_path, mixed).table().equals(compared(tmp_path, table).table())
    with pytest.raises(InputError, match="no rows of a whole model"):
        compared(tmp_path, layer)


def test_weights_alone_have_nothing_to_compare(tmp_path: Path) -> None:
    table = table_of("a", draws(0), config=config_of("sgd", 0), stream="weights")
    with pytest.raises(InputError, match="no gradients or updates"):
        compared(tmp_path, table)


def test_what_differs_beside_the_keys_is_named_between_and_within_groups(tmp_path: Path) -> None:
    tables = [
        table_of("a", draws(0), config=config_of("adam", 0, width=1.0)),
        table_of("b", draws(1), config=config_of("sgd", 0, task_args={"depth": 2})),
        table_of("c", draws(2), config=config_of("sgd", 1, task_args={"depth": 3})),
    ]
    between, within = compared(tmp_path, *tables).warnings
    assert between.startswith("the groups also differ in width (1, –): confounded")
    assert within.startswith("runs of one group differ in task_args.depth (–, 2, 3): not only")
    # Seeds are what runs of one group differ in.
    assert "seed (" not in between + within
    by_depth = compared(tmp_path, *tables, by="optimizer,task_args.depth,width")
    assert by_depth.warnings == ()
    assert [group.values for group in by_depth.groups] == [
        ("adam", "–", "1"),
        ("sgd", "2", "–"),
        ("sgd", "3", "–"),
    ]


def test_groups_ascend_as_numbers_do(tmp_path: Path) -> None:
    tables = [
        table_of(str(lr), draws(at), config={**config_of("sgd", 0), "lr": lr})
        for at, lr in enumerate((1e-4, 10, 2.0, None, 0.05))
    ]
    comparison = compared(tmp_path, *tables, by="lr")
    assert [group.label for group in comparison.groups] == [
        *("lr=0.0001", "lr=0.05", "lr=2", "lr=10", "lr=–")
    ]
    # Ten differences are for the table.
    assert "10 differences between groups: see the table" in comparison_text(comparison)
    pairs = {(row["group"], row["against"]) for row in comparison.blocks[0].rows if row["against"]}
    assert len(pairs) == 10
    assert ("lr=10", "lr=2") in pairs


def test_settings_may_be_anything_that_json_holds(tmp_path: Path) -> None:
    odd = {"list": [1, {"x": None}], "flag": True, "a.b": 3, "text": "two\nlines\x1b[31m"}
    tables = [table_of("a", draws(0), config={**config_of("sgd", 0), **odd})]
    comparison = compared(tmp_path, *tables, by="list,flag,a.b,text,task")
    (group,) = comparison.groups
    assert group.values[:3] == ('[1, {"x": null}]', "true", "3")
    assert "\n" not in group.values[3]
    assert "\x1b" not in comparison_text(comparison)


def test_an_unfinished_run_is_named(tmp_path: Path) -> None:
    table = table_of("a", draws(0), config=config_of("sgd", 0), reference="step:50")
    document = json.loads(table.schema.metadata[METADATA_KEY])
    document["runs"][0] |= {"final_step": None, "status": "recording"}
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(document)})
    comparison = compared(tmp_path, table)
    assert comparison.warnings[0] == "not finished, their last rows are not their ends: a"
    assert "the run has not finished: it has no w_T" in comparison_text(comparison)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"align": "time"}, "unknown alignment 'time'; choose from steps, epochs, both"),
        ({"parts": ["early", "end"]}, "unknown part 'end'; choose from early"),
        ({"parts": []}, "no part of the way"),
        ({"level": 95.0}, "lies between 0 and 1"),
        ({"threshold": 0.0}, "threshold of interpolation"),
        ({"seed": -1}, "seed of the bootstrap"),
    ],
)
def test_nonsense_options_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        compared(tmp_path, *two_groups(), **options)


def test_the_written_table_says_what_it_is(tmp_path: Path) -> None:
    comparison = compared(tmp_path, *two_groups())
    write_comparison(comparison, tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.equals(comparison.table())
    assert all(b"meaning" in field.metadata for field in table.schema)
    facts = json.loads(table.schema.metadata[METADATA_KEY])
    assert facts["groups"] == {
        "optimizer=adam": ["adam0", "adam1"],
        "optimizer=sgd": ["sgd0", "sgd1"],
    }
    assert facts["interpolation"][0]["verdict"] == "cannot be told"
    write_comparison(comparison, tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == table.num_rows
    assert list(rows[0]) == table.column_names
    assert float(rows[0]["value"]) == table["value"][0].as_py()
    with pytest.raises(UsageError, match=r"end in .parquet or .csv"):
        write_comparison(comparison, tmp_path / "t.txt")


# The command


def analyze(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the runs that the example of the help is about."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    recorded_run(tmp_path / "runs" / "first.zarr", "momentum", 0, total=10)
    recorded_run(tmp_path / "runs" / "second.zarr", "adam", 0, total=10)
    return tmp_path


def test_the_example_of_the_help_runs(folder: Path) -> None:
    example = main.commands["compare"].example  # type: ignore[attr-defined]
    words = shlex.split(example.replace("\\\n", " "))
    assert words[:2] == ["analyze", "compare"]
    done = analyze(*words[1:])
    assert done.exit_code == 0, done.stderr
    assert (folder / words[-1]).stat().st_size > 0
    assert analyze("compare", "--help").stdout.rstrip().endswith(words[-1])
    assert "minibatch   w* = final   at equal steps, 0 ≤ t < 9   2 runs" in done.stdout
    assert done.stderr.endswith(f"rows in {words[-1]}\n")


def test_without_out_the_text_alone_is_printed(folder: Path) -> None:
    done = analyze("compare", "runs/first.zarr", "--group-by", "optimizer", "--parts", "all")
    assert done.exit_code == 0, done.stderr
    assert "all   momentum" in done.stdout
    assert done.stderr == ""
    assert [path.name for path in folder.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["runs/first.zarr"], 2, "--group-by"),
        (["runs/first.zarr", "--group-by", "optimizr"], 2, "did you mean 'optimizer'"),
        (["runs/none.zarr", "--group-by", "lr"], 3, "runs/none.zarr"),
        (["runs/first.zarr", "--group-by", "lr", "--align", "x"], 2, "unknown alignment"),
        (["runs/first.zarr", "--group-by", "lr", "--level", "nan"], 2, "between 0 and 1"),
        (["runs/first.zarr", "--group-by", "lr", "--out", "t.txt"], 2, "t.txt"),
        (["runs/first.zarr", "--group-by", "lr", "--out", "no/t.csv"], 2, "no such folder"),
        (["runs/first.zarr", "--group-by", "lr", "--out", "runs/first.zarr/t.csv"], 2, "inside"),
        (["runs", "--group-by", "lr"], 3, "runs"),
        ([], 2, "RUN"),
    ],
)
def test_what_a_user_can_do_wrong(
    folder: Path, arguments: list[str], code: int, words: str
) -> None:
    done = analyze("compare", *arguments, *([] if "--out" in arguments else ["--out", "t.csv"]))
    assert done.exit_code == code
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert [path.name for path in folder.iterdir()] == ["runs"]


def test_an_input_is_not_written_over(folder: Path) -> None:
    write_table(table_of("a", draws(0), config=config_of("sgd", 0)), "t.parquet")
    shutil.copy("t.parquet", "before")
    done = analyze("compare", "t.parquet", "--group-by", "lr", "--out", "t.parquet")
    assert done.exit_code == 2
    assert "this file is an input" in done.stderr
    assert Path("t.parquet").read_bytes() == Path("before").read_bytes()
