"""The page in a real browser: nothing fails, nothing is loaded, and what it shows is right."""

import html
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from analyze.compare import compare_runs
from analyze.comparison import write_comparison
from analyze.report import write_report
from analyze.tables import concatenate, measure_run, write_table
from capture import Recorder
from tests.analyze.simulation import simulate

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason=f"PAGES NOT TESTED in a browser: none of {', '.join(BROWSERS)} is on the path",
)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--virtual-time-budget=2000"),
)
# Put into every page that is opened: what any of them must fulfil.
COMMON = """
  document.body.dataset.drawn = [...document.querySelectorAll("figure svg")]
    .filter((svg) => svg.getBoundingClientRect().height > 100).length;
  document.body.dataset.loaded = performance.getEntriesByType("resource").length;
  document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
  document.body.dataset.width = innerWidth;
"""
HOVER = """
  const figure = document.querySelector("figure[id$='-rsi']");
  const svg = figure.querySelector("svg");
  const line = JSON.parse(figure.querySelector("script").textContent).panels[0].lines[0];
  figure.scrollIntoView();
  const near = new DOMPoint(line.px[7] + 0.3, line.py[7] - 0.3);
  const at = near.matrixTransform(svg.getScreenCTM());
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: at.x, clientY: at.y }));
  document.body.dataset.tip = figure.querySelector(".tip").innerText;
  svg.dispatchEvent(new PointerEvent("pointerleave"));
  document.body.dataset.after = figure.querySelector(".tip").hidden;
"""
VALUES = """
  const details = document.querySelector("figure[id$='-eb'] details");
  details.addEventListener("toggle", () => {
    document.body.dataset.rows = details.querySelectorAll("tbody tr").length;
    document.body.dataset.csv = decodeURIComponent(details.querySelector("a").href);
  });
  details.open = true;
"""
# Which columns of the verdict can be seen before anything is scrolled.
VERDICT = """
  const table = document.querySelector("#verdict table");
  document.body.dataset.seen = [...table.querySelectorAll("thead th")]
    .filter((th) => th.getBoundingClientRect().right <= innerWidth)
    .map((th) => th.firstChild.textContent.trim()).join(";");
"""

# A browser's window cannot be as narrow as a phone; a frame can, and sends what became of it.
SEND = "setTimeout(() => parent.postMessage(document.documentElement.outerHTML, '*'), 500);"
FRAME = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><body><script>
  onmessage = (event) => { document.body.textContent = event.data; };
</script><iframe src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe>"""

Browse = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Browse:
    """Open a page with more scripts: its document at the end, and what the browser said of it."""
    folder = tmp_path_factory.mktemp("browser")

    def run(page: Path, *scripts: str, width: int = 1200) -> tuple[str, str]:
        added = "".join(f"<script>{{{script}}}</script>" for script in (COMMON, *scripts, SEND))
        (folder / "page.html").write_text(page.read_text().replace("</body>", f"{added}</body>"))
        frame = folder / "frame.html"
        frame.write_text(FRAME.replace("{width}", str(width)))
        command = [str(CHROMIUM), *QUIET, f"--window-size={width + 100},1000", "--dump-dom"]
        done = subprocess.run(
            [*command, f"--user-data-dir={folder / 'profile'}", frame.as_uri()],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        complaints = "\n".join(x for x in done.stderr.splitlines() if "CONSOLE" in x)
        return html.unescape(done.stdout), complaints

    return run


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return simulate(streams=("minibatch", "updates"))


@pytest.fixture(scope="module")
def page(table: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    for name, rows in (("whole", table), ("tensors", simulate(by_tensor=True))):
        pq.write_table(rows, folder / f"{name}.parquet")
    inputs = [str(folder / f"{name}.parquet") for name in ("whole", "tensors")]
    return write_report(inputs, folder / "report.html")[0]


@pytest.fixture(scope="module")
def opened(page: Path, browse: Browse) -> tuple[str, str]:
    return browse(page, HOVER, VALUES)


def data(document: str, name: str) -> str:
    found = re.search(rf'data-{name}="([^"]*)"', document)
    assert found is not None, f"the script that writes data-{name} did not run"
    return found[1]


def test_page_opens_in_a_browser_without_errors(opened: tuple[str, str]) -> None:
    document, complaints = opened
    assert complaints == ""
    # Twelve kinds of figure for the whole model, and two heat maps of the tensors.
    assert data(document, "drawn") == "14"
    assert data(document, "loaded") == "0"
    assert data(document, "wide") == "false"


def test_a_broken_page_is_noticed(page: Path, browse: Browse) -> None:
    _, complaints = browse(page, "new Image().src = 'http://127.0.0.1:9/x.png'; gone();")
    assert "gone is not defined" in complaints
    assert "Content Security Policy" in complaints


def test_hover_shows_the_exact_value(opened: tuple[str, str], table: pa.Table) -> None:
    row = table.slice(7, 1).to_pylist()[0]
    first, second, third = data(opened[0], "tip").split("\n")
    null = row["cosine_null"] ** 2 / row["lolr_null"]
    assert third == f"null RSI⁰: {null:.6g}"
    assert first == f"step {row['step']} · epoch {row['epoch']:g}"
    assert second == f"RSI⁻ minibatch: {row['rsi']:.6g}".replace("-", "−")
    assert data(opened[0], "after") == "true"


def test_values_open_as_a_table_and_in_full_precision(
    opened: tuple[str, str], table: pa.Table
) -> None:
    head, _, text = data(opened[0], "csv").partition(",")
    assert head == "data:text/csv;charset=utf-8"
    lines = text.strip().split("\n")
    assert lines[0] == "step,epoch,EB⁺ minibatch,null EB⁰"
    assert data(opened[0], "rows") == "80"
    shown = [float(line.split(",")[2]) for line in lines[1:]]
    own = table.filter(pa.compute.field("stream") == "minibatch")
    assert shown == own["eb"].to_pylist()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of a run that the recorder made in a loop of its own: there is no configuration."""
    folder = tmp_path_factory.mktemp("recorded")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with Recorder(
        folder / "mine.zarr", model, optimizer, every=2, gradients="minibatch,updates"
    ) as recorder:
        for rows in torch.randint(256, (40, 32), generator=generator):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            recorder.log(loss=loss.detach())
            optimizer.step()
    measured = measure_run(str(folder / "mine.zarr"), by=["model", "layer"])
    write_table(concatenate(list(measured.values())), folder / "mine.parquet")
    return folder


def test_a_recorded_run_is_readable_on_a_phone(recorded: Path, browse: Browse) -> None:
    inputs = [str(recorded / name) for name in ("mine.zarr", "mine.parquet")]
    (page,) = write_report(inputs, recorded / "report.html")
    document, complaints = browse(page, HOVER, VERDICT, width=400)
    assert complaints == ""
    # Twelve of the run; and two heat maps by layer of each stream.
    assert data(document, "drawn") == "16"
    assert data(document, "wide") == "false"
    assert int(data(document, "width")) <= 500  # some builds of Chromium make no narrower window
    assert data(document, "seen").split(";")[:5] == ["part", "n (eff.)", "γ", "γ⁰", "γ/γ⁰"]
    for words in ("<dd>SGD, momentum 0.9</dd>", "<dd>0.05</dd>", "<dd>178</dd>"):
        assert words in document, words
    # The value under the pointer is the one in the table, at the eighth saved step.
    rsi = pq.read_table(recorded / "mine.parquet").filter(pa.compute.field("stream") == "minibatch")
    assert f"RSI⁻ minibatch: {rsi['rsi'][7].as_py():.6g}".replace("-", "−") in data(document, "tip")
    assert np.isfinite(rsi["cosine_null"].to_numpy()).any()


EPOCHS = """
  const figure = document.querySelector("figure[id$='-cosine-ratio']");
  const svg = figure.querySelector("svg");
  const panels = JSON.parse(figure.querySelector("script").textContent).panels;
  const line = panels[1].lines[1];
  figure.scrollIntoView();
  const at = new DOMPoint(line.px[6], line.py[6]).matrixTransform(svg.getScreenCTM());
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: at.x, clientY: at.y }));
  document.body.dataset.tip = figure.querySelector(".tip").innerText;
  const details = figure.querySelector("details");
  details.addEventListener("toggle", () => {
    document.body.dataset.csv = decodeURIComponent(details.querySelector("a").href);
  });
  details.open = true;
"""


def test_runs_of_other_batch_sizes_show_and_list_their_own_epochs(
    tmp_path: Path, browse: Browse
) -> None:
    """Equal steps are other epochs: of the second run, half of those of the first."""
    paths = []
    for seed, run in enumerate(("a", "b")):
        table = simulate(f"{run}.zarr", seed=seed, total=200)
        place = table.schema.get_field_index("epoch")
        halved = pa.compute.divide(table["epoch"], seed + 1.0)
        paths.append(str(tmp_path / f"{run}.parquet"))
        write_table(table.set_column(place, table.schema.field(place), halved), paths[-1])
    (page,) = write_report(paths, tmp_path / "page.html")
    document, complaints = browse(page, EPOCHS)
    assert complaints == ""
    epochs = (30 / 40, 30 / 80)
    assert data(document, "tip").split("\n")[0] == f"epoch {epochs[1]:g}"
    rows = [line.split(",") for line in data(document, "csv").strip().split("\n")[1:]]
    own = [row for row in rows if row[0] == "30"]
    assert [(float(row[1]), row[2] != "", row[3] != "") for row in own] == [
        (epochs[1], False, True),
        (epochs[0], True, False),
    ]


COMPARED = """
  const tip = (figure, x, y) => {
    const svg = figure.querySelector("svg");
    const at = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
    svg.dispatchEvent(new PointerEvent("pointermove", { clientX: at.x, clientY: at.y }));
    return figure.querySelector(".tip").innerText;
  };
  const figure = document.querySelector("figure[id$='-comparison-minibatch']");
  figure.scrollIntoView();
  const { lines } = JSON.parse(figure.querySelector("script").textContent).panels[2];
  document.body.dataset.tip = tip(figure, lines[0].px[2], lines[0].py[2]);
"""


def test_a_comparison_tells_its_intervals(tmp_path: Path, browse: Browse) -> None:
    paths = []
    for seed in (0, 1):
        paths.append(str(tmp_path / f"{seed}.parquet"))
        write_table(simulate(f"{seed}.zarr", seed=seed), paths[-1])
    comparison = compare_runs(paths, ["task"])
    write_comparison(comparison, tmp_path / "compare.parquet")
    (page,) = write_report([str(tmp_path / "compare.parquet")], tmp_path / "page.html")
    document, complaints = browse(page, COMPARED, width=400)
    assert complaints == ""
    assert data(document, "wide") == "false"
    row = next(
        row
        for row in comparison.blocks[0].rows
        if (row["part"], row["quantity"]) == ("late", "cosine_ratio")
    )
    part, told = data(document, "tip").split("\n")
    assert part == "part late"
    value, low, high = (f"{row[name]:.6g}".replace("-", "−") for name in ("value", "low", "high"))
    assert told == f"γ/γ⁰ task=quadratic: {value} [{low}, {high}]"
