"""The verdict in LaTeX: the numbers of the definition, sound whatever names a run has."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from analyze.export import export_table
from analyze.latex import code, decimal, escape, math
from analyze.tables import concatenate, measure_run
from analyze.uncertainty import Interval, negative_interval, path_interval
from analyze.verdict import summarise
from analyze.verdict_tex import verdict_tex
from analyze.verdict_text import verdict
from capture.store import InputError
from tests.analyze.recorded import random_run
from tests.analyze.simulation import simulate

HOSTILE = "runs/my_run & 50% {of} $x^2$ ~#\\ \"quoted\" 'é' Łódź 中文 \x07 γ<1>.zarr"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(tmp_path_factory.mktemp("export") / "run.zarr", epoch=lambda step: step / 4)


@pytest.fixture(scope="module")
def table(recorded: Path) -> pa.Table:
    return table_of_two(recorded)


def table_of_two(recorded: Path) -> pa.Table:
    """Two runs, two references, groups of two kinds."""
    other = random_run(recorded.with_name('other, "é".zarr'), seed=1, complete=False)
    return concatenate(
        [
            *measure_run(str(recorded), ["final", "step:3"], by=["model", "layer"]).values(),
            measure_run(str(other), ["step:3"])["model"],
        ]
    )


def rows_of(text: str) -> list[list[str]]:
    """The cells of every row of every tabular."""
    lines = [line for line in text.splitlines() if line.endswith(r" \\")]
    return [line[4:].removesuffix(r" \\").split(" & ") for line in lines]


def of_parts(text: str) -> list[list[str]]:
    """Those of whole models, one for each part of the way."""
    return [row for row in rows_of(text) if row[1] in ("early", "middle", "late", "after")]


def bare(cell: str) -> str:
    return re.sub(r"[${}]|\\scriptsize|\\,|\\%", "", cell).strip()


def test_the_latex_table_has_the_numbers_of_the_definition() -> None:
    table = simulate(streams=("minibatch", "updates"))
    head, *rows = rows_of(verdict_tex(table))
    assert len(head) == 8
    data = table.to_pandas()
    end = 0.9 * 400
    parts = [("early", 0, end / 3), ("middle", end / 3, end * 2 / 3), ("late", end * 2 / 3, end)]
    wanted = []
    for stream in ("minibatch", "updates"):
        for place, (part, first, last) in enumerate(parts):
            own = data[(data.stream == stream) & (data.step >= first) & (data.step < last)]
            cosine = own.cosine if stream == "minibatch" else -own.cosine_update
            values = cosine.to_numpy()[:, None]
            mean, below = path_interval(values, 0.95), negative_interval(values, 0.95)
            count = f"{len(own)} ({mean.effective:.0f})"
            shown = [rf"\texttt{stream}" if place == 0 else "", part, count]
            shown.append(f"{cosine.mean():.3g}{told(mean.interval)}")
            null, ratios = own.cosine_null, (own.cosine / own.cosine_null, own.lolr / own.lolr_null)
            if stream == "updates":
                null = -own.cosine_update_null
                ratios = (cosine / null, own.lolr_update / own.lolr_update_null)
            shown.append(f"{null.median():.3g}")
            for ratio in ratios:
                low, high = np.quantile(ratio, [0.1, 0.9])
                shown.append(f"{ratio.median():.3g} [{low:.3g}, {high:.3g}]")
            share = f"{100 * (cosine < 0).mean():.3g}"
            wanted.append([*shown, f"{share}{told(below.interval, 100)}"])
    assert [[bare(cell) for cell in row] for row in rows] == wanted


def told(interval: Interval, unit: float = 1) -> str:
    low, high = unit * interval.low, unit * interval.high
    return f" [{low:.3g}, {high:.3g}]" if np.isfinite([low, high]).all() else ""


def test_latex_and_terminal_tell_the_same(table: pa.Table) -> None:
    lines = [line.split() for line in verdict(table).splitlines()]
    shown = [
        (cells[1], cells[2])
        for cells in lines
        if len(cells) > 3 and cells[1] in ("early", "middle", "late", "after")
    ]
    rows = of_parts(verdict_tex(table))
    assert [(row[1], bare(row[2])) for row in rows] == shown
    found = summarise(table)
    assert len(found) == 3
    means = [part.mean.interval.value for each in found for part in each.parts]
    written = [bare(row[3]).split(" ")[0] for row in rows]
    assert written == [f"{value:.3g}" if np.isfinite(value) else "–" for value in means]
    assert sum(len(each.parts) for each in found) == len(rows)


def test_the_latex_is_sound(table: pa.Table) -> None:
    text = verdict_tex(concatenate([simulate(HOSTILE, streams=("minibatch", "fixed")), table]))
    assert text.isascii()
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert {len(row) for row in of_parts(text)} == {8}
    unescaped = re.sub(r"\\[{}$%&#_]", "", text)
    assert unescaped.count("{") == unescaped.count("}")
    assert unescaped.count("$") % 2 == 0
    for kind in ("table*", "tabular"):
        begun = text.count(rf"\begin{{{kind}}}")
        # Of whole models 4, and of the layers of a recorded run one for each stream and reference.
        assert begun == text.count(rf"\end{{{kind}}}") == 10
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(set(labels)) == 10
    assert all(re.fullmatch("tab:[-0-9A-Za-z]+", label) for label in labels)
    assert r"my\_run \& 50\% \{of\} \$x\textasciicircum{}2\$" in text


def compiles(folder: Path, body: str) -> None:
    """Compile with pdflatex where there is one; every warning of a missing character counts."""
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex here")
    document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{body}"
    (folder / "doc.tex").write_text(document + r"\end{document}", encoding="utf-8")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "doc.tex"],
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    log = (folder / "doc.log").read_text(errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Missing character" not in log


def test_pdflatex_takes_the_table(table: pa.Table, tmp_path: Path) -> None:
    both = concatenate([simulate(HOSTILE, streams=("minibatch", "fixed")), table])
    export_table(both, tmp_path / "out.tex")
    compiles(tmp_path, r"\input{out}")


def test_a_table_of_weights_alone_has_no_verdict(recorded: Path, tmp_path: Path) -> None:
    measured = measure_run(str(recorded), streams=["weights"])["model"]
    with pytest.raises(InputError, match="no gradients or updates"):
        export_table(measured, tmp_path / "out.tex")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a_b & 5% #1 {x} ~^", r"a\_b \& 5\% \#1 \{x\} \textasciitilde{}\textasciicircum{}"),
        ("C:\\x$y", r"C:\textbackslash{}x\$y"),
        ("é ñ Ł ß", r"{\'{e}} {\~{n}} \L{} \ss{}"),
        ("中 \u200b", "[U+4E2D] [U+200B]"),
        ("‖w_0‖ and w*, γ⁰ ≥ 0", r"$\|w_0\|$ and $w^*$, $\gamma^0$ $\ge$ 0"),
        ("⟨g, e⟩", r"$\langle g, e\rangle$"),
        ("a\nb\tc", "a b c"),
    ],
)
def test_running_text_is_escaped(text: str, wanted: str) -> None:
    assert escape(text) == wanted


def test_names_formulas_and_numbers_are_set() -> None:
    assert code("runs/w_0.zarr") == r"\texttt{runs/\allowbreak{}w\_0.zarr}"
    assert math("RSI = ⟨g, e⟩ / ‖e‖²") == r"\mathrm{RSI} = \langle g, e\rangle / \|e\|^2"
    assert math("η*/a_t") == r"\eta^*/a_t"
    assert [decimal(value) for value in (0.12345, -3.0, 1.5e-7, np.nan, np.inf, 123456.0)] == [
        *("0.123", "-3", r"1.5 \times 10^{-7}", "--", "--", r"1.23 \times 10^{5}")
    ]
