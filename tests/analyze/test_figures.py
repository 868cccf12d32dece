import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from analyze.axes import angle_label, number_label, value_scale
from analyze.charts import Chart, Epochs
from analyze.curves import Columns, Curve, read_columns, read_curves, run_labels
from analyze.drawing import COLUMN, FORMATS, draw_file, draw_inline
from analyze.figure_kinds import KINDS
from analyze.figures import PALETTE, build_figures, end_of
from analyze.heatmap import MAX_GROUPS, HeatMap, build_heat_maps, draw_cells
from tests.analyze.simulation import SIZE, STEPS_PER_EPOCH, TENSORS, simulate

RUN = "runs/demo.zarr"
END = {RUN: (360.0, 400.0)}


@pytest.fixture(scope="module")
def columns() -> Columns:
    return read_columns(simulate(streams=("minibatch", "fixed", "updates")), {RUN: SIZE})


@pytest.fixture(scope="module")
def curves(columns: Columns) -> list[Curve]:
    return read_curves(columns, RUN, "final", "demo")


@pytest.fixture(scope="module")
def charts(curves: list[Curve]) -> dict[str, Chart]:
    return {chart.name: chart for chart in build_figures(curves, END)}


def test_scale_shows_what_is_there() -> None:
    assert value_scale([np.array([1.0, 100.0, np.nan])]) == ("log", 0.0)
    assert value_scale([np.array([1.0, 2.0])]) == ("linear", 0.0)
    assert value_scale([np.array([-1.0, 2.0])]) == ("linear", 0.0)
    assert value_scale([np.array([-0.03, 0.02, 0.025, 30.0])]) == ("symlog", 0.02)
    assert value_scale([np.array([np.nan])]) == ("linear", 0.0)
    assert value_scale([]) == ("linear", 0.0)
    # The distance is 0 at w* itself: one such point does not cost the logarithm.
    assert value_scale([np.append(np.geomspace(100, 1, 30), 0.0)])[0] == "log"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.02, "0.02"), (-3.0, "−3"), (1500.0, "1500"), (2e-5, "2·10⁻⁵"), (1e-6, "10⁻⁶"), (0.0, "0")],
)
def test_numbers_are_written_for_reading(value: float, text: str) -> None:
    assert number_label(value) == text


def test_angles_are_finer_where_the_cosine_is_small() -> None:
    labels = [angle_label(cosine) for cosine in (1.0, 0.5, 0.0, -1.0, 0.01, 1.2)]
    assert labels == ["0°", "60°", "90°", "180°", "89.43°", ""]


def test_end_effect_is_the_last_tenth_on_the_way_to_a_point_of_the_path() -> None:
    assert end_of(400, "final") == pytest.approx((360, 400))
    assert end_of(400, "mean:5") == pytest.approx((360, 400))
    assert end_of(400, "step:200") == pytest.approx((180, 200))
    assert end_of(400, "file:other.safetensors") is None


def test_run_labels_are_short_and_never_the_same() -> None:
    assert run_labels(["runs/a.zarr", "b.zarr"]) == {"runs/a.zarr": "a", "b.zarr": "b"}
    same = run_labels(["x/run.zarr", "y/run.zarr"])
    assert len(set(same.values())) == 2


def test_a_report_has_all_its_figures(charts: dict[str, Chart]) -> None:
    assert list(charts) == [kind.name for kind in KINDS]
    assert all(
        chart.caption and chart.title and chart.ends == ((360, 400),) for chart in charts.values()
    )


def test_lines_hold_the_columns_of_the_table(columns: Columns, charts: dict[str, Chart]) -> None:
    own = columns["stream"] == "minibatch"
    measured, _, null = charts["cosine"].lines
    assert (measured.label, null.label) == ("γ minibatch", "null γ⁰ demo minibatch")
    np.testing.assert_array_equal(measured.y, columns["cosine"][own])
    np.testing.assert_array_equal(null.y, columns["cosine_null"][own])
    np.testing.assert_array_equal(measured.x, np.arange(0, 400, 5))
    quotient = columns["cosine"][own] / columns["cosine_null"][own]
    np.testing.assert_array_equal(charts["cosine-ratio"].lines[0].y, quotient)


def test_batches_are_drawn_as_their_median_and_quantiles(
    columns: Columns, charts: dict[str, Chart]
) -> None:
    fixed = charts["cosine"].lines[1]
    by_step = columns["cosine"][columns["stream"] == "fixed"].reshape(-1, 3)
    np.testing.assert_array_equal(fixed.y, np.median(by_step, axis=1))
    assert fixed.low is not None
    np.testing.assert_allclose(fixed.low, np.quantile(by_step, 0.1, axis=1), rtol=1e-12)
    assert "over the batches of fixed (3 a step)" in charts["cosine"].caption


def test_updates_are_positive_towards_the_reference(charts: dict[str, Chart]) -> None:
    # The last recorded step of this run goes almost straight to w*.
    assert charts["update-cosine"].lines[0].y[-1] > 0.5


def test_a_missing_null_is_explained_and_not_drawn() -> None:
    columns = read_columns(simulate(null=False), {RUN: SIZE})
    curves = read_curves(columns, RUN, "final", "demo")
    charts = {c.name: c for c in build_figures(curves, END, "Adam has no closed form")}
    assert "No null: Adam has no closed form." in charts["cosine"].caption
    assert [line.label for line in charts["cosine"].lines] == ["γ minibatch"]
    assert "cosine-ratio" not in charts


def test_one_line_of_several_runs_is_named(curves: list[Curve]) -> None:
    other = read_columns(simulate("other.zarr", null=False), {})
    both = [*curves[:1], *read_curves(other, "other.zarr", "final", "other")]
    charts = {chart.name: chart for chart in build_figures(both, END)}
    labels = [line.label for line in charts["rsi"].lines]
    assert labels == ["RSI⁻ demo", "RSI⁻ other", "null RSI⁰ demo minibatch"]
    # Only one of the two has a null.
    assert [line.label for line in charts["cosine-ratio"].lines] == ["γ/γ⁰ demo"]
    assert charts["cosine-ratio"].named


def test_each_run_keeps_its_colour_in_every_figure() -> None:
    tables = [
        simulate(run, seed=seed, total=200, streams=("minibatch", "fixed", "updates"))
        for seed, run in enumerate(("a.zarr", "b.zarr"))
    ]
    curves = [
        curve
        for run, table in zip("ab", tables, strict=True)
        for curve in read_curves(read_columns(table, {}), f"{run}.zarr", "final", run)
    ]
    charts = {chart.name: chart for chart in build_figures(curves, {})}
    assert list(charts) == [kind.name for kind in KINDS]
    for name, chart in charts.items():
        colors = {
            run: {line.color for line in chart.lines if run in line.label.split()} for run in "ab"
        }
        assert colors == {"a": {PALETTE[0]}, "b": {PALETTE[1]}}, name
    # The streams of a run differ in their strokes instead.
    strokes = {line.label: line.dash for line in charts["rsi"].lines}
    assert strokes["RSI⁻ a minibatch"] == strokes["RSI⁻ b minibatch"] == "-"
    assert strokes["RSI⁻ a fixed"] == strokes["RSI⁻ b fixed"] == "-."
    draw_file(charts["rsi"], "svg")


def runs_beside(*others: dict[str, Any]) -> list[Curve]:
    """Curves of runs `a`, `b`, … of 200 updates, with columns replaced by functions of them."""
    curves = []
    for seed, changes in enumerate(others):
        name = "abc"[seed]
        columns = read_columns(simulate(f"{name}.zarr", seed=seed, total=200), {})
        changed = {**columns, **{key: change(columns[key]) for key, change in changes.items()}}
        curves += read_curves(changed, f"{name}.zarr", "final", name)
    return curves


ENDS = {"a.zarr": (180.0, 200.0), "b.zarr": (180.0, 200.0)}


def test_runs_of_one_batch_size_have_epochs_as_a_second_scale() -> None:
    charts = {chart.name: chart for chart in build_figures(runs_beside({}, {}), ENDS)}
    for chart in charts.values():
        assert chart.epochs == Epochs(STEPS_PER_EPOCH)
    (panel,) = draw_inline(charts["cosine-ratio"], "here").points["panels"]
    assert panel["place"] == "step"


def test_runs_of_other_batch_sizes_are_drawn_at_equal_epochs_too() -> None:
    """The second has twice as many updates in an epoch: its 200 are 3.57 epochs, not 7.14."""
    curves = runs_beside({}, {"epoch": lambda epoch: epoch / 2})
    charts = {chart.name: chart for chart in build_figures(curves, ENDS)}
    for chart in charts.values():
        assert chart.epochs is not None
        assert chart.epochs.each is None
        first, last = 180 / STEPS_PER_EPOCH, 200 / STEPS_PER_EPOCH
        expected = [(first, last), (first / 2, last / 2)]
        assert np.allclose(chart.epochs.ends, expected)
    for width in (COLUMN, 2 * COLUMN):
        drawing = draw_inline(charts["cosine-ratio"], "here", width)
        steps, epochs = drawing.points["panels"]
        assert (steps["place"], epochs["place"]) == ("step", "epoch")
        for number, scale in enumerate((1, 2)):
            line = epochs["lines"][number]
            shown = np.array(steps["lines"][number]["x"]) / STEPS_PER_EPOCH / scale
            assert line["x"] == pytest.approx(shown)
            assert line["v"] == steps["lines"][number]["v"]
            # Equal epochs stand above each other, whatever the steps.
            left, _, right, _ = epochs["box"]
            assert left < line["px"][0] < line["px"][-1] < right
        slopes = [
            (line["px"][9] - line["px"][3]) / (line["x"][9] - line["x"][3])
            for line in epochs["lines"]
        ]
        assert slopes[0] == pytest.approx(slopes[1], rel=0.01)


def test_a_run_without_epochs_is_missed_at_equal_epochs_and_named() -> None:
    nothing = {"epoch": lambda epoch: np.full_like(epoch, np.nan)}
    chart = build_figures(runs_beside({}, nothing), ENDS)[0]
    assert "The second lacks b, whose epochs are not known." in chart.caption
    _, epochs = draw_inline(chart, "here").points["panels"]
    assert [line["label"].split()[1] for line in epochs["lines"]] == ["a", "γ⁰"]
    chart = build_figures(runs_beside(nothing, nothing), ENDS)[0]
    assert chart.epochs is None
    assert "the runs do not tell their epochs" in chart.caption


def test_rsi_and_eb_have_the_nulls_of_their_definitions(columns: Columns) -> None:
    """With ⟨g, e⟩₀ = a_t ‖g‖² and ‖e‖₀ = a_t ‖g‖ / γ⁰."""
    own = columns["stream"] == "minibatch"
    a, null, norm = (columns[name][own] for name in ("lolr_null", "cosine_null", "norm_grad"))
    dist = a * norm / null
    np.testing.assert_allclose(columns["rsi_null"][own], a * norm**2 / dist**2, rtol=1e-12)
    np.testing.assert_allclose(columns["eb_null"][own], norm / dist, rtol=1e-12)


def test_undefined_values_are_counted() -> None:
    columns = read_columns(simulate(), {RUN: SIZE})
    columns["rsi"][:3] = np.nan
    charts = build_figures(read_curves(columns, RUN, "final", "demo"), END)
    caption = next(chart.caption for chart in charts if chart.name == "rsi")
    assert "3 of 80 values are undefined (NaN)" in caption


def test_hover_points_lie_on_the_drawn_line(charts: dict[str, Chart]) -> None:
    for name in ("distance", "rsi", "cosine"):  # log, symmetric log, linear with a second axis
        drawing = draw_inline(charts[name], "here")
        points = drawing.points["panels"][0]["lines"][0]
        path = re.search(
            r'here-line2d_\d+">\s*<path d="([^"]*)" clip-path[^>]*#0072b2', drawing.svg
        )
        assert path is not None
        drawn = np.array(re.findall(r"[ML] (\S+) (\S+)", path[1]), float)
        hover = np.column_stack((points["px"], points["py"]))
        # matplotlib leaves out vertices on straight pieces: each drawn one is a point of ours.
        far = np.abs(drawn[:, None] - hover[None]).max(axis=2).min(axis=1)
        assert far.max() < 0.06, name  # positions are rounded to 0.1


def test_equal_figures_give_equal_bytes(charts: dict[str, Chart]) -> None:
    assert draw_inline(charts["loss"], "a") == draw_inline(charts["loss"], "a")
    for kind in FORMATS:
        assert draw_file(charts["loss"], kind) == draw_file(charts["loss"], kind)


@pytest.mark.parametrize("width", [COLUMN, 6.75])
def test_pdf_is_as_wide_as_asked_with_truetype_fonts(
    charts: dict[str, Chart], width: float
) -> None:
    data = draw_file(charts["cosine"], "pdf", width)
    box = re.search(rb"/MediaBox \[ 0 0 (\S+) ", data)
    assert box is not None
    assert float(box[1]) == pytest.approx(72 * width)
    assert b"/FontFile2" in data
    assert b"/Type3" not in data


def test_svg_has_a_label_and_no_address(charts: dict[str, Chart]) -> None:
    svg = draw_inline(charts["loss"], "here").svg
    assert 'role="img" aria-label="Loss"' in svg
    addresses = set(re.findall(r'https?://[^"\s<]+', svg))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r'\bid="([^-]*)-', svg)) == {"here"}


def test_names_are_no_formulas(curves: list[Curve], tmp_path: Path) -> None:
    strange = simulate(run="$x^$_a.zarr")
    columns = read_columns(strange, {})
    drawn = read_curves(columns, "$x^$_a.zarr", "final", "$x^$_a")
    chart = build_figures([*curves, *drawn], {})[0]
    assert draw_file(chart, "png").startswith(b"\x89PNG")


def test_heat_map_holds_the_ratio_of_each_group() -> None:
    columns = read_columns(simulate(by_tensor=True), {RUN: SIZE})
    assert not columns["whole"].any()
    heat_map, rates = build_heat_maps(columns, "minibatch", (360, 400), "tensor")
    assert heat_map.groups == tuple(TENSORS)
    assert heat_map.sizes == tuple(stop - start for start, stop in TENSORS.values())
    dense = (columns["cosine"] / columns["cosine_null"]).reshape(len(TENSORS), -1)
    np.testing.assert_array_equal(heat_map.values, dense)
    assert (heat_map.name, rates.name) == ("groups-minibatch", "groups-minibatch-rate")
    dense = (columns["lolr"] / columns["lolr_null"]).reshape(len(TENSORS), -1)
    np.testing.assert_array_equal(rates.values, dense)
    assert draw_file(heat_map, "png").startswith(b"\x89PNG")


def test_heat_map_names_its_groups_and_their_sizes() -> None:
    values, edges = np.array([[2.0, 0.5], [1.0, 3.0]]), np.array([0.0, 5.0, 10.0])
    heat_map = HeatMap(
        "groups", "", "", "γ/γ⁰", "layer", ("1", "3"), (16640, 7), edges, values, ratio=True
    )
    figure = Figure()
    axes = figure.add_subplot()
    draw_cells(figure, axes, heat_map)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["1 · 16,640", "3 · 7"]
    assert axes.get_ylabel() == "layer · parameters"


def test_heat_map_of_many_groups_and_rows_says_what_it_leaves_out() -> None:
    columns = read_columns(simulate(by_tensor=True, every=2), {RUN: SIZE})
    names = [f"block{i}.weight" for i in range(40)]
    many = {name: np.tile(values, 14) for name, values in columns.items()}
    many["group"] = np.repeat(np.array([*names, "a", "b"], object), 200)
    many["num_parameters"] = np.repeat(np.arange(42.0), 200)
    heat_map, _ = build_heat_maps(many, "minibatch", None)
    assert len(heat_map.groups) == MAX_GROUPS
    assert heat_map.groups[-1] == "b"
    assert f"The {MAX_GROUPS} largest of 42 groups" in heat_map.caption
    assert "median of 3 consecutive rows" in heat_map.caption
    groups = many["group"] == heat_map.groups[0]
    assert heat_map.values[0][1] == np.median(many["cosine_ratio"][groups][3:6])
