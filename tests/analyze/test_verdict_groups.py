"""The verdict in words that explain what is missing, and by groups of tensors."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from analyze.tables import concatenate, measure_run, write_table
from analyze.verdict import PARTS, part_of, summarise
from analyze.verdict_groups import MOST_GROUPS, grouping_of, read_groups, summarise_groups
from analyze.verdict_tex import verdict_tex
from analyze.verdict_text import group_verdict, verdict
from tests.analyze.recorded import random_run
from tests.analyze.simulation import TENSORS, simulate
from tests.analyze.test_verdict import table_of


def test_medians_of_each_group_and_part_by_pandas() -> None:
    """Against the columns of the table, ratio by ratio."""
    table = simulate(by_tensor=True, streams=("minibatch", "updates"))
    data = table.to_pandas()
    data["part"] = part_of(data.step.to_numpy(), "final", 400)
    found = {each.stream: each for each in summarise_groups(table)}
    assert list(found) == ["minibatch", "updates"]
    assert {each.grouping for each in found.values()} == {"tensor"}
    for stream, each in found.items():
        assert [row.group for row in each.rows] == list(TENSORS)
        for row in each.rows:
            own = data[(data.stream == stream) & (data.group == row.group)]
            cosine, null, rates = own.cosine, own.cosine_null, own.lolr / own.lolr_null
            if stream == "updates":
                cosine, null = -own.cosine_update, -own.cosine_update_null
                rates = own.lolr_update / own.lolr_update_null
            for name, values in (
                ("cosine", cosine),
                ("ratio", cosine / null),
                ("rate_ratio", rates),
            ):
                expected = [values[own.part == part].median() for part in PARTS]
                assert getattr(row, name) == pytest.approx(expected, rel=1e-12), name
            before = cosine[own.part.isin(PARTS)]
            assert row.negative == (before < 0).mean()


def test_groups_stand_below_their_model_in_words() -> None:
    both = concatenate([simulate(), simulate(by_tensor=True)])
    text = verdict(both)
    (first, *_) = summarise_groups(both)[0].rows
    line = next(line for line in text.splitlines() if line.startswith(first.group))
    numbers = [*first.cosine, *first.ratio, *first.rate_ratio]
    assert line.split()[2:11] == [f"{value:.3g}" for value in numbers]
    assert line.split()[1] == f"{first.size:,}"
    assert "minibatch, by tensor" in text
    assert "by groups: medians of the rows" in text
    assert verdict(simulate()).split("\n\n")[0] == text.split("\n\n")[0]


def test_without_a_null_groups_say_so_and_have_no_ratios() -> None:
    table = simulate(by_tensor=True, null=False)
    text = verdict(table)
    assert "no null: no γ/γ⁰ and no η*/a_t" in text
    assert "γ/γ⁰" not in text.split("no null")[0]
    assert "There is no null here." in verdict_tex(table)


def test_a_model_of_many_layers_shows_its_largest_and_latex_has_all() -> None:
    table, count = simulate(by_tensor=True), 50
    groups, size = (table.schema.get_field_index(name) for name in ("group", "num_parameters"))
    parts = []
    for number in range(count):
        own = table.slice(0, 80).set_column(groups, "group", pa.array([f"block{number}"] * 80))
        parts.append(own.set_column(size, "num_parameters", pa.array([number + 1] * 80)))
    many = pa.concat_tables(parts).replace_schema_metadata(table.schema.metadata)
    (found,) = summarise_groups(many)
    assert (len(found.rows), found.more) == (MOST_GROUPS, count - MOST_GROUPS)
    assert found.rows[0].group == f"block{count - MOST_GROUPS}"
    assert f"the {MOST_GROUPS} largest groups; {count - MOST_GROUPS} more" in verdict(many)
    tex = verdict_tex(many)
    assert tex.count(r"\begin{table*}") == 2
    assert all(f"block{number}}}" in tex for number in range(count))
    assert "Rows 1 to 45 of 50." in tex


@pytest.mark.parametrize(
    ("by", "name"),
    [
        ("model+layer", "layer"),
        ("tensor", "tensor"),
        ("layer+tensor", "group"),
        ("custom", "group"),
    ],
)
def test_what_groups_are(by: str, name: str) -> None:
    assert grouping_of(by) == name


def test_the_point_itself_has_no_direction_and_that_is_no_damage(tmp_path: Path) -> None:
    run = str(random_run(tmp_path / "run.zarr"))
    (final,) = summarise(measure_run(run)["model"])
    # Three batches of `fixed` were measured at w_T.
    assert (final.there, final.undefined) == (3, 0)
    text = " ".join(verdict(measure_run(run)["model"]).split())
    assert "no γ at w_T itself, t = 6 (3 rows): it is the point that e leads to" in text
    assert "undefined" not in text
    text = " ".join(verdict(measure_run(run, ["step:2"])["model"]).split())
    assert "no γ at w* itself, t = 2 (5 rows)" in text
    assert "after: t > 2, beyond w*: these gradients had no part in the way to it" in text


def test_an_undefined_row_elsewhere_is_still_told() -> None:
    cosine = np.full(100, 0.1)
    cosine[3] = np.nan
    (found,) = summarise(table_of(cosine, 0.1, "exact"))
    assert (found.there, found.undefined) == (0, 1)


def test_a_missing_interval_is_explained() -> None:
    # A straight line is worth few independent steps.
    text = verdict(table_of(np.linspace(0.1, 0.9, 100), 0.1, "exact"))
    assert "γ without an interval: fewer than 5 effective steps in that part" in text
    noise = 0.2 + 0.1 * np.random.default_rng(3).standard_normal(1000)
    assert "without an interval" not in verdict(table_of(noise, 0.1, "exact", total=1000))


def test_a_file_is_read_stream_by_stream(tmp_path: Path) -> None:
    run = str(random_run(tmp_path / "run.zarr"))
    table = measure_run(run, ["final", "step:2"], by=["layer"])["layer"]
    write_table(table, tmp_path / "layers.parquet")
    found = read_groups(tmp_path / "layers.parquet")
    # NaN is not equal to itself, but written the same.
    assert sorted(map(repr, found)) == sorted(map(repr, summarise_groups(table)))
    assert [each.reference for each in found] == ["final"] * 3 + ["step:2"] * 3
    blocks, _, note = group_verdict(tmp_path / "layers.parquet").rpartition("\n\n")
    assert blocks in verdict(table)
    assert verdict(table).endswith(note)
