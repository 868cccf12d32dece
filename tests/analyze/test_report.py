import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analyze.curves import read_columns, read_curves
from analyze.drawing import Drawing
from analyze.facts import conditional_rate, run_facts
from analyze.page import summary
from analyze.report import write_report
from analyze.tables import METADATA_KEY, read_table
from analyze.verdict import summarise
from analyze.verdict_groups import summarise_groups
from analyze.verdict_text import verdict
from capture.store.errors import InputError, UsageError, WriteError
from tests.analyze.simulation import simulate
from tests.analyze.small_runs import random_streams, write_run


def save(table: pa.Table, path: Path) -> str:
    pq.write_table(table, path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def tables(folder: Path) -> list[str]:
    whole = save(simulate(streams=("minibatch", "updates")), folder / "whole.parquet")
    return [whole, save(simulate(by_tensor=True), folder / "tensors.parquet")]


@pytest.fixture(scope="module")
def page(folder: Path, tables: list[str]) -> Path:
    out = folder / "report.html"
    assert write_report(tables, out) == [out]
    return out


def test_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    addresses = set(re.findall(r'https?://[^"\s<\']+', text))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r'\b(src|href)="(?!#|data:)', text)
    assert "@import" not in text


def test_page_says_what_it_must(page: Path) -> None:
    text = re.sub(r"<(style|script|svg).*?</\1>", "", page.read_text(), flags=re.S)
    for words in (
        "end effect: here γ tends to its null whatever the landscape",
        "a step along −g starts out towards w*",
        "before clipping where the clip factor is known",
        "Measured along one path it proves nothing",
        "Null: exact for SGD with heavy-ball momentum and no weight decay.",
        "runs/demo.zarr",
        "SGD, momentum 0.9",
        "final: the last iterate w_T of this run, T = 400",
        'id="verdict"',
    ):
        assert words in text, words
    ids = re.findall(r'\bid="([^"]+)"', page.read_text())
    assert len(ids) == len(set(ids))


def test_a_hostile_name_is_harmless(tmp_path: Path) -> None:
    name = "</script><script>document.title='gone'</script><img src=x onerror=gone()>.zarr"
    write_report([save(simulate(name), tmp_path / "a.parquet")], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script>document" not in text
    assert "<img" not in text
    assert "&lt;script&gt;document" in text


def test_several_runs_are_shown_together_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [
        save(simulate("a.zarr"), tmp_path / "a.parquet"),
        save(simulate("b.zarr", seed=1, total=300, null=False), tmp_path / "b.parquet"),
    ]
    monkeypatch.setattr("analyze.page.draw_inline", lambda *_: Drawing("", {}))
    written = write_report(inputs, tmp_path / "page.html")
    headings = re.findall(r"<h2>(.*?)</h2>", written[0].read_text())
    assert headings == [
        "2 runs together, each measured against final",
        "a, measured against final",
        "b, measured against final",
    ]
    text = written[0].read_text()
    assert "No null for b: Adam has no closed form." in text
    assert '<p class="note">No null: Adam has no closed form.</p>' in text
    assert "show their end effect at different steps" in text


def test_equal_rows_give_an_equal_page_and_count_once(
    tables: list[str], page: Path, tmp_path: Path
) -> None:
    copy = shutil.copy(tables[0], tmp_path / "copy.parquet")
    write_report([*tables, str(copy)], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == page.read_bytes()


def test_a_run_is_measured_here_and_now(tmp_path: Path) -> None:
    run = write_run(tmp_path / "small.zarr", (40, 7), random_streams(47, rows=6))
    write_report([str(run)], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "small, measured against final" in text
    assert 'aria-label="Upper error bound EB⁺"' in text
    assert 'aria-label="γ by layer, minibatch"' in text


def test_figures_are_written_in_the_formats_asked_for(tables: list[str], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    written = write_report(
        tables[1:], out, figures_dir=tmp_path / "figures", formats=("pdf", "png"), width=6.75
    )
    assert written[0] == out
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    expected = [
        f"demo-final-groups-minibatch{what}.{kind}"
        for what in ("-rate", "")
        for kind in ("pdf", "png")
    ]
    assert names == expected
    assert {path.name for path in written[1:]} == set(names)
    png = (tmp_path / "figures" / names[1]).read_bytes()
    assert int.from_bytes(png[16:20]) == 6.75 * 300


@pytest.mark.parametrize("kind", ["missing", "text", "folder", "empty"])
def test_wrong_input_is_one_line_and_leaves_nothing(kind: str, tmp_path: Path) -> None:
    source, out = tmp_path / "input", tmp_path / "page.html"
    if kind == "text":
        source.write_text("step,cosine\n")
    elif kind == "folder":
        source.mkdir()
    elif kind == "empty":
        pq.write_table(simulate().slice(0, 0), source)
    with pytest.raises(InputError) as caught:
        write_report([str(source)], out)
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"formats": ("gif",), "figures_dir": "figures"}, "'gif'"),
        ({"formats": ("",), "figures_dir": "figures"}, "''"),
        ({"formats": (), "figures_dir": "figures"}, "no figure format"),
        ({"formats": ("png",)}, "need a folder"),
        ({"formats": ("png",), "figures_dir": ""}, "no name"),
        ({"width": float("nan")}, "nan inches"),
        ({"width": float("inf")}, "inf inches"),
        ({"width": 0.2}, "0.2 inches"),
        ({"out": ""}, "no file is named"),
        ({"out": "."}, "name a file"),
        ({"out": "missing/page.html"}, "no such folder"),
        ({"formats": ("svg",), "figures_dir": "file"}, "file"),
    ],
)
def test_wrong_usage_leaves_nothing(
    options: dict[str, Any],
    words: str,
    tables: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(UsageError, match=re.escape(words)):
        write_report(tables, **{"out": "page.html", **options})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_inputs_and_runs_are_never_written_over(tables: list[str], tmp_path: Path) -> None:
    run = write_run(tmp_path / "small.zarr", (4,), random_streams(4))
    table = Path(shutil.copy(tables[1], tmp_path / "t.parquet"))
    (tmp_path / "link.html").symlink_to(table)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    page = tmp_path / "page.html"
    for out, figures in (
        (table, None),
        (tmp_path / "link.html", None),
        (run / "page.html", None),
        (page, run),
        (page, run / "new" / "figures"),
    ):
        with pytest.raises(UsageError):
            write_report([str(table)], out, figures_dir=figures, formats=("svg",) * bool(figures))
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_a_figure_never_takes_the_place_of_an_input_or_the_page(
    tables: list[str], tmp_path: Path
) -> None:
    table = Path(shutil.copy(tables[1], tmp_path / "demo-final-groups-minibatch.svg"))
    before = table.read_bytes()
    for source, out in ((str(table), tmp_path / "page.html"), (tables[1], table)):
        with pytest.raises(UsageError):
            write_report([source], out, figures_dir=tmp_path, formats=("svg",))
    assert table.read_bytes() == before
    assert list(tmp_path.iterdir()) == [table]


def test_a_place_that_cannot_be_written_leaves_nothing(tables: list[str], tmp_path: Path) -> None:
    figures = tmp_path / ("x" * 300)
    with pytest.raises(WriteError, match="path is too long"):
        write_report(tables[1:], tmp_path / "a.html", figures_dir=figures, formats=("svg",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"runs": {}},
        {"runs": []},
        {"runs": ["demo"]},
        {"null": "none"},
        {"null": {"runs/demo.zarr|final": 1}},
        {"by": 3},
        {"nan": []},
        {"num_parameters": "many"},
        {"final_step": [1]},
        {"config": "digits"},
        {"optimizer": ["SGD"]},
    ],
    ids=str,
)
def test_damaged_facts_are_refused_in_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    table = simulate(by_tensor=True)
    facts = json.loads(table.schema.metadata[METADATA_KEY])
    place = facts if facts.keys() >= change.keys() else facts["runs"][0]
    place |= change
    damaged = table.replace_schema_metadata({METADATA_KEY: json.dumps(facts)})
    with pytest.raises(InputError) as caught:
        write_report([save(damaged, tmp_path / "t.parquet")], tmp_path / "page.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "page.html").exists()


def test_facts_fill_the_gaps_of_a_configuration() -> None:
    entry: dict[str, Any] = {
        "run": "mine.zarr",
        "optimizer": {"name": "SGD"},
        "git_commit": "0123456789ab" * 3,
    }
    entry |= {"momentum": np.array([[0.0, 0.9], [0.0, 0.9]]), "final_step": None}
    facts = dict(run_facts(entry, "final", np.array([0.05, np.nan, 0.0005])))
    assert facts["Optimizer"] == "SGD, momentum 0 to 0.9"
    assert facts["Learning rate"] == "0.0005 to 0.05"
    assert facts["Git commit"] == "0123456789ab"
    entry |= {"config": {"momentum": 0, "lr": "auto", "width": [2], "seed": None}}
    facts = dict(run_facts(entry, "final"))
    assert (facts["Optimizer"], facts["Learning rate"]) == ("SGD", "auto")
    assert dict(run_facts({}, "final", np.full(3, 0.05)))["Learning rate"] == "0.05"
    assert "Learning rate" not in dict(run_facts({}, "final", np.full(3, np.nan)))


def test_the_verdict_on_the_page_has_every_number_of_its_text() -> None:
    """Both are laid out from the same numbers; two spaces part the cells of the text."""
    table = simulate(streams=("minibatch", "updates"))
    (block,) = map(summary, summarise(table))
    assert [value for value, _ in block.head] == [
        *("part", "n (eff.)", "γ", "γ⁰", "γ/γ⁰", "η*/aₜ", "γ < 0"),
    ]
    assert list(block.streams) == ["minibatch", "updates"]
    lines = [re.split(" {2,}", line) for line in verdict(table).split("\n")]
    for stream, rows in block.streams.items():
        told = [cells[1:] for cells in lines if cells[0] == stream]
        assert [[" ".join(cell).strip() for cell in row] for row in rows] == told


def test_groups_stand_in_the_section_of_their_run(tables: list[str], tmp_path: Path) -> None:
    for inputs, alone in ((tables, False), (tables[1:], True)):
        text = write_report(inputs, tmp_path / "page.html")[0].read_text()
        assert ('id="verdict"' in text) is not alone
        section = text.partition("<section ")[2]
        assert section.count("minibatch, by tensor</th>") == 1
        (found,) = summarise_groups(read_table(tables[1]))
        for row in found.rows:
            numbers = [*row.cosine, *row.ratio, *row.rate_ratio]
            cells = "".join(f"<td>{value:.3g}</td>" for value in numbers)
            assert f"<td>{row.group}</td><td>{row.size:,}</td>{cells}" in section


def test_the_rate_is_conditional_and_leaves_out_the_end() -> None:
    columns = read_columns(simulate(), {})
    columns["rsi"] = np.abs(columns["rsi"])
    curves = read_curves(columns, "runs/demo.zarr", "final", "demo")
    before = columns["step"] < 360
    rate = (columns["rsi"][before].min() / columns["eb"][before].max()) ** 2
    words = conditional_rate(curves, (360.0, 400.0))
    assert words is not None
    assert "the conditional rate is 1 − μ²/L² = 1 − " in words
    mantissa, _, power = words.split("1 − ")[-1].removesuffix(" a step.").partition("·10")
    exponent = int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0)
    # Three digits are shown.
    assert float(mantissa) * 10.0**exponent == pytest.approx(rate, rel=0.01)


def test_there_is_no_rate_where_the_bound_is_not_positive() -> None:
    curves = read_curves(read_columns(simulate(), {}), "runs/demo.zarr", "final", "demo")
    words = conditional_rate(curves, (360.0, 400.0))
    assert words is not None
    assert "no rate follows, not even a conditional one" in words
