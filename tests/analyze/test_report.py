import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analyze.curves import read_columns, read_curves
from analyze.facts import conditional_rate
from analyze.report import write_report
from capture.store.errors import InputError, UsageError, WriteError
from tests.analyze.simulation import simulate
from tests.analyze.small_runs import random_streams, write_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the path")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--virtual-time-budget=2000"),
)


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


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[Path], tuple[str, str]]:
    """Open a page in a browser: its document at the end, and what the browser complained about."""

    def run(page: Path) -> tuple[str, str]:
        command = [str(CHROMIUM), *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
        done = subprocess.run(
            [*command, page.as_uri()], capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout, "\n".join(x for x in done.stderr.splitlines() if "CONSOLE" in x)

    return run


def with_script(page: Path, script: str, out: Path) -> Path:
    text = page.read_text().replace("</body>", f"<script>{script}</script></body>")
    out.write_text(text)
    return out


@needs_browser
def test_page_opens_in_a_browser_without_errors(
    page: Path, browse: Callable[[Path], tuple[str, str]], tmp_path: Path
) -> None:
    script = """
      document.body.dataset.drawn = [...document.querySelectorAll("figure svg")]
        .filter((svg) => svg.getBoundingClientRect().height > 100).length;
      document.body.dataset.loaded = performance.getEntriesByType("resource").length;
      document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
    """
    document, complaints = browse(with_script(page, script, tmp_path / "page.html"))
    assert complaints == ""
    # Ten kinds of figure for the whole model, and one heat map of the tensors.
    assert 'data-drawn="11"' in document
    assert 'data-loaded="0"' in document
    assert 'data-wide="false"' in document


@needs_browser
def test_a_broken_page_is_noticed(
    page: Path, browse: Callable[[Path], tuple[str, str]], tmp_path: Path
) -> None:
    script = "new Image().src = 'http://127.0.0.1:9/x.png'; gone();"
    _, complaints = browse(with_script(page, script, tmp_path / "broken.html"))
    assert "gone is not defined" in complaints
    assert "Content Security Policy" in complaints


@needs_browser
def test_hover_shows_the_exact_value(
    page: Path, browse: Callable[[Path], tuple[str, str]], tmp_path: Path, tables: list[str]
) -> None:
    script = """
      const figure = document.querySelector("figure[id$='-rsi']");
      const svg = figure.querySelector("svg");
      const line = JSON.parse(figure.querySelector("script").textContent).lines[0];
      figure.scrollIntoView();
      const near = new DOMPoint(line.px[7] + 0.3, line.py[7] - 0.3);
      const at = near.matrixTransform(svg.getScreenCTM());
      svg.dispatchEvent(new PointerEvent("pointermove", { clientX: at.x, clientY: at.y }));
      document.body.dataset.tip = figure.querySelector(".tip").innerText;
      svg.dispatchEvent(new PointerEvent("pointerleave"));
      document.body.dataset.after = figure.querySelector(".tip").hidden;
    """
    document, complaints = browse(with_script(page, script, tmp_path / "hover.html"))
    assert complaints == ""
    row = pq.read_table(tables[0]).slice(7, 1).to_pylist()[0]
    tip = re.search(r'data-tip="([^"]*)"', document)
    assert tip is not None
    first, second = tip[1].split("\n")
    assert first == f"step {row['step']} · epoch {row['epoch']:g}"
    assert second == f"RSI⁻ minibatch: {row['rsi']:.6g}".replace("-", "−")
    assert 'data-after="true"' in document


@needs_browser
def test_values_open_as_a_table_and_in_full_precision(
    page: Path, browse: Callable[[Path], tuple[str, str]], tmp_path: Path, tables: list[str]
) -> None:
    script = """
      const details = document.querySelector("figure[id$='-eb'] details");
      details.addEventListener("toggle", () => {
        document.body.dataset.rows = details.querySelectorAll("tbody tr").length;
        document.body.dataset.csv = decodeURIComponent(details.querySelector("a").href);
      });
      details.open = true;
    """
    document, complaints = browse(with_script(page, script, tmp_path / "values.html"))
    assert complaints == ""
    found = re.search(r'data-csv="data:text/csv;charset=utf-8,([^"]*)"', document)
    assert found is not None
    lines = found[1].strip().split("\n")
    assert lines[0] == "step,epoch,EB⁺ minibatch"
    table = pq.read_table(tables[0]).filter(pa.compute.field("stream") == "minibatch")
    assert 'data-rows="80"' in document
    shown = [float(line.split(",")[2]) for line in lines[1:]]
    assert shown == table["eb"].to_pylist()


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


def test_several_runs_are_shown_together_and_alone(tmp_path: Path) -> None:
    inputs = [
        save(simulate("a.zarr"), tmp_path / "a.parquet"),
        save(simulate("b.zarr", seed=1, total=300, null=False), tmp_path / "b.parquet"),
    ]
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
    copy = tmp_path / "copy.parquet"
    shutil.copy(tables[0], copy)
    write_report([*tables, str(copy)], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == page.read_bytes()


def test_a_run_is_measured_here_and_now(tmp_path: Path) -> None:
    run = write_run(tmp_path / "small.zarr", (40, 7), random_streams(47, rows=6))
    write_report([str(run)], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "small, measured against final" in text
    assert 'aria-label="Upper error bound EB⁺"' in text
    assert 'aria-label="γ by group of parameters, minibatch"' in text


def test_figures_are_written_in_the_formats_asked_for(tables: list[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    written = write_report(
        tables[1:], out, figures_dir=tmp_path / "figures", formats=("pdf", "png"), width=6.75
    )
    assert written[0] == out
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == ["demo-final-groups-minibatch.pdf", "demo-final-groups-minibatch.png"]
    assert {path.name for path in written[1:]} == set(names)
    png = (tmp_path / "figures" / names[1]).read_bytes()
    assert int.from_bytes(png[16:20]) == 6.75 * 300


@pytest.mark.parametrize("kind", ["missing", "text", "folder", "empty"])
def test_wrong_input_is_one_line_and_leaves_nothing(kind: str, tmp_path: Path) -> None:
    source, out = tmp_path / "input", tmp_path / "out" / "page.html"
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
    assert not out.parent.exists()


@pytest.mark.parametrize("arguments", [{"formats": ("gif",)}, {"formats": ("png",)}])
def test_wrong_usage_leaves_nothing(
    arguments: dict[str, tuple[str, ...]], tables: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        write_report(tables, tmp_path / "page.html", formats=arguments["formats"])
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_leaves_nothing(tables: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError) as caught:
        write_report(
            tables[1:], tmp_path / "page.html", figures_dir=tmp_path / "file", formats=("svg",)
        )
    assert "a part of the path is a file" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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
