"""`analyze methods`: a paragraph of what the run holds; of the rest it says that it is unknown."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analyze.methods import describe_methods, write_methods
from analyze.provenance import of_run, read_provenance
from analyze.quantities import QUANTITIES
from analyze.tables import concatenate, measure_run, write_table
from capture.config import TrainConfig
from capture.store import InputError, Tensor, TensorTable, UsageError, open_run
from capture.train import train
from tests.analyze.recorded import OPTIMIZER, TABLE, random_run, write_run
from tests.analyze.test_cli import analyze
from tests.analyze.test_export import analyze_command
from tests.analyze.test_verdict_tex import HOSTILE, compiles

ADAM = {**OPTIMIZER, "name": "AdamW", "kind": "other", "weight_decay": "decoupled"}


def bare_run(path: Path, **options: Any) -> Path:
    """A run of two updates that holds nothing but its weights and minibatch gradients."""
    draw = np.random.default_rng(0).standard_normal
    table = options.get("table", TABLE)
    streams = {
        "weights": draw((3, table.num_parameters)).astype("f4"),
        "minibatch": draw((2, table.num_parameters)).astype("f4"),
    }
    options.setdefault("optimizer", {})
    return write_run(path, streams, **options)


def told(path: Path | str, kind: str = ".md") -> str:
    return describe_methods([str(path)], kind)


def of_the_run(text: str) -> str:
    """The paragraph of the one run."""
    (found,) = re.findall(r"^\*\*Run .*", text, re.MULTILINE)
    return str(found)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that `capture train` made."""
    path = tmp_path_factory.mktemp("methods") / "digits.zarr"
    config = TrainConfig(
        task="digits",
        lr=0.05,
        weight_decay=1e-4,
        batch_size=32,
        max_steps=12,
        seed=3,
        data_seed=8,
        every="4",
        gradients="minibatch,updates,fixed:2,heldout:3,shuffled-labels:2,full@epoch,full-eval@epoch",
        threads=1,
    )
    train(config, path)
    return path


def test_a_run_of_capture_train_tells_all_of_it(digits: Path) -> None:
    text = of_the_run(told(digits))
    assert text.startswith(f"**Run `{digits}`.** Task `digits` (1,437 training and 360 held-out")
    for fact in (
        "model `mlp`, D = 85,002 trainable parameters, batch size 32.",
        "It took T = 12 updates.",
        "Optimizer: `SGD`, learning rate 0.05 (schedule `constant`), momentum 0.9.",
        "Weight decay 0.0001, coupled: λw enters the gradient of the step.",
        "Seeds: initialisation 3, order of the data 8.",
        "No gradient was clipped in the 12 updates whose factor is known.",
        "Parameters are float32.",
        "w* is the last iterate w_T of this run.",
        "the weights at 4 steps from t = 0 to 12 (schedule `4`)",
        "Stream `fixed`: gradients of 2 training batches of 32 samples drawn once from the data",
        "Stream `heldout`: gradients of 3 held-out batches, which never drive training, of 32",
        "Stream `shuffled-labels`: gradients of 2 training batches with their labels permuted once",
        "over one partition into 45 batches of 32 samples",
        "of batches from a new permutation of the training samples in each epoch",
        "3 steps from t = 0 to 8 (schedule `4`)",
        "No layer keeps running statistics, as BatchNorm would.",
        "in training mode: `fixed`, `full`, `heldout`, `minibatch`, `shuffled-labels`.",
        "in evaluation mode, with stored statistics: `full-eval`.",
        "the null is exact for SGD with momentum",
        "t = 11 to 12 is the end that was left out.",
    ):
        assert fact in text, fact
    for name, version in open_run(digits).attributes["versions"].items():
        assert f"{name} {version}" in text
    assert "not recorded" not in text


def test_nothing_is_said_that_a_bare_run_does_not_hold(tmp_path: Path) -> None:
    text = of_the_run(told(bare_run(tmp_path / "bare.zarr")))
    for unknown in (
        "Task, model and batch size are not recorded.",
        "The optimizer is not recorded.",
        "Weight decay is not recorded.",
        "The seeds are not recorded.",
        "Whether gradients were clipped is not recorded",
        "whether autocast was used is not recorded",
        "Versions of the software are not recorded.",
        "of batches whose order is not recorded",
        "`minibatch` has the gradients of the training loop, whose mode is not recorded.",
        "there is no null: an unknown optimizer has no closed form",
    ):
        assert unknown in text, unknown
    for invented in ("momentum", "schedule", "Trained with", "training mode", "Seeds:", "learning"):
        assert invented not in text.replace("has no closed form", ""), invented


def test_definitions_are_those_of_the_quantities(digits: Path) -> None:
    text = told(digits)
    formulas = {quantity.name: quantity.formula.split(";")[0] for quantity in QUANTITIES}
    for symbol, name in (("RSI", "rsi"), ("EB", "eb"), ("γ", "cosine"), ("η*", "lolr")):
        assert f"{symbol} = {formulas[name]}" in text
    assert "−⟨u, e⟩ / (‖u‖ ‖e‖) stands in the place of γ" in text
    assert "arXiv 2306.11922" in text
    assert "the last 10 % of the updates" in text


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ([1, 1, 1, 1, 1, 1], "No gradient was clipped in the 6 updates whose factor is known."),
        (
            [1, 0.5, np.nan, 0.25, 1, 0.125],
            "clipped in 3 of the 5 updates whose factor is known, by factors down to 0.125; "
            "quantities are of the unclipped gradient there. Of 1 further updates the factor is",
        ),
        ([np.nan] * 6, "Whether gradients were clipped is not recorded: minibatch gradients are"),
    ],
)
def test_clipping_is_told_by_its_factors(tmp_path: Path, factors: list[float], words: str) -> None:
    def change(scalars: dict[str, Any]) -> None:
        scalars["clip_factor"] = np.array(factors, float)

    assert words in told(random_run(tmp_path / "run.zarr", change=change))


@pytest.mark.parametrize(
    ("buffers", "words"),
    [
        ((), "No layer keeps running statistics, as BatchNorm would."),
        (("running_mean.scale",), "No layer keeps running statistics, as BatchNorm would."),
        (("a.running_mean", "a.running_var"), "1 layer keeps running statistics, as BatchNorm"),
        (("a.running_mean", "b.running_mean"), "2 layers keep running statistics, as BatchNorm"),
    ],
)
def test_batchnorm_is_known_by_its_statistics(
    tmp_path: Path, buffers: tuple[str, ...], words: str
) -> None:
    table = TensorTable(
        TABLE.parameters, buffers=tuple(Tensor(name, (2,), "F32") for name in buffers)
    )
    assert words in told(bare_run(tmp_path / "run.zarr", table=table))


@pytest.mark.parametrize(
    ("optimizer", "change", "words"),
    [
        (OPTIMIZER, 0.1, "Weight decay 0.1, coupled: λw enters the gradient of the step."),
        (OPTIMIZER, 0.0, "No weight decay."),
        (ADAM, 0.1, "Weight decay 0.1, decoupled: it shrinks the weights beside the gradient"),
        ({**ADAM, "weight_decay": "unknown"}, 0.1, "Weight decay 0.1, of a kind that is not known"),
        (ADAM, 0.1, "Optimizer: `AdamW`, learning rate 0.1, momentum 0.9. Its further settings"),
        (ADAM, 0.1, "there is no null: AdamW has no closed form"),
        ({**OPTIMIZER, "nesterov": True}, 0.0, "Nesterov momentum 0.9"),
        ({**OPTIMIZER, "maximize": True}, 0.0, "maximizing, with gradients negated here"),
        ({**OPTIMIZER, "dampening": [0.5, 0.5]}, 0.0, "dampening 0.5."),
    ],
)
def test_the_optimizer_is_told(
    tmp_path: Path, optimizer: Mapping[str, Any], change: float, words: str
) -> None:
    def set_decay(scalars: dict[str, Any]) -> None:
        scalars["group_weight_decay"][:] = change

    path = random_run(tmp_path / "run.zarr", optimizer=optimizer, change=set_decay)
    assert words in told(path)


def test_rates_and_momenta_that_change_are_told_as_ranges(tmp_path: Path) -> None:
    def change(scalars: dict[str, Any]) -> None:
        scalars["group_lr"] = np.linspace(0.5, 0.01, 12).reshape(6, 2)
        scalars["group_momentum"][:, 1] = 0.5

    text = told(random_run(tmp_path / "run.zarr", change=change))
    assert "learning rate 0.01 to 0.5, momentum 0.5 to 0.9" in text


def test_an_unfinished_run_has_no_final_iterate(tmp_path: Path) -> None:
    text = of_the_run(told(random_run(tmp_path / "run.zarr", complete=False)))
    assert "The run had not finished, so it has no final iterate yet." in text
    assert "w*" not in text
    assert "null" not in text


def test_a_branch_names_its_parent(tmp_path: Path) -> None:
    parent = {"run": "main.zarr", "step": 100, "position": 100, "exclude_batch": 7}
    text = told(bare_run(tmp_path / "run.zarr", parent=parent))
    assert (
        "It branched off from `main.zarr` after 100 updates, without the samples of its update 7"
    ) in text


def test_a_source_of_the_loops_own_and_its_mode(tmp_path: Path) -> None:
    draw = np.random.default_rng(0).standard_normal
    streams = {
        "weights": draw((2, TABLE.num_parameters)).astype("f4"),
        "mine": draw((1, 3, TABLE.num_parameters)).astype("f4"),
        "ema": draw((2, TABLE.num_parameters)).astype("f4"),
    }
    text = told(write_run(tmp_path / "run.zarr", streams, probes={"mine": {"mode": "eval"}}))
    assert "Stream `mine`: gradients of 3 batches from a source of the training loop's own" in text
    assert "one step, t = 0." in text
    assert "in evaluation mode, with stored statistics: `mine`." in text
    assert "Stream `ema`" not in text


def test_a_table_tells_what_it_carries(digits: Path, tmp_path: Path) -> None:
    references = ["final", "step:4", "mean:2", f"run:{digits}@8"]
    measured = measure_run(str(digits), references, by=["model", "layer"])
    write_table(concatenate(list(measured.values())), tmp_path / "t.parquet")
    whole = told(tmp_path / "t.parquet")
    text = of_the_run(whole)
    for fact in (
        "Task `digits` (1,437 training and 360 held-out samples",
        "learning rate 0.05 at the measured steps (schedule `constant`), momentum 0.9",
        "Weight decay 0.0001, coupled",
        "Seeds: initialisation 3, order of the data 8.",
        "No gradient was clipped in the 3 measured steps whose factor is known.",
        "the last iterate w_T of this run (`final`); the iterate after 4 updates of this run "
        "(`step:4`); the mean of the last 2 saved iterates of this run, w_T included (`mean:2`); "
        f"the iterate after 8 updates of the run `{digits}` (`run:{digits}@8`).",
        "Against `mean:2`, there is no null: w* is a mean",
        "Against `step:4`, t = 4 to 4 is the end that was left out.",
        "The precision of the parameters is not in the table.",
        "Whether layers such as BatchNorm couple the samples of a batch is not in the table.",
        "Stream `fixed`: gradients of 2 training batches drawn once",
    ):
        assert fact in text, fact
    assert "further measured steps" not in text  # w_T has no update that could be clipped
    assert "Sums over coordinates were made over the whole model and by layer in float64" in whole


def test_a_run_and_its_table_are_told_once_with_the_facts_of_both(
    digits: Path, tmp_path: Path
) -> None:
    write_table(measure_run(str(digits), ["step:4"])["model"], tmp_path / "t.parquet")
    inputs = [str(tmp_path / "t.parquet"), str(digits)]
    text = of_the_run(describe_methods(inputs))
    assert "Parameters are float32." in text
    for given in (inputs, inputs[::-1]):
        (one,) = read_provenance(given)
        assert set(one.references) == {"final", "step:4"}
        assert one.tensors is not None


def test_several_runs_share_the_definitions(digits: Path, tmp_path: Path) -> None:
    text = describe_methods([str(digits), str(bare_run(tmp_path / "bare.zarr")), str(digits)])
    assert text.count("**Run ") == 2
    assert text.count("**Quantities.**") == text.count("**Reference.**") == 1


def test_no_weights_are_read(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "copy.zarr")
    before = told(tmp_path / "copy.zarr")
    for shard in (tmp_path / "copy.zarr").glob("**/value/c/*/0"):
        shard.unlink() if shard.is_file() else shutil.rmtree(shard)
    assert told(tmp_path / "copy.zarr") == before


def test_facts_of_any_form_do_no_harm(tmp_path: Path) -> None:
    odd = {
        "config": ["a", "list"],
        "seeds": {"torch": 5, "seed": None, "numpy": "`x`_{y}"},
        "versions": "1.0",
        "probes": {"minibatch": 3},
        "data": {"train": "many"},
        "schedules": None,
        "git_commit": 7,
    }
    path = bare_run(tmp_path / "run.zarr", **odd)
    text = of_the_run(told(path))
    assert "Seeds: `numpy` `` `x`_{y} ``, `torch` 5." in text
    assert "git commit `7`" in text
    assert told(path, ".tex").isascii()


def test_facts_inside_a_configuration_may_be_anything(tmp_path: Path) -> None:
    config = {
        "task": 5,
        "model": ["m"],
        "lr": "fast",
        "batch_size": "big",
        "width": {},
        "momentum": [],
    }
    text = told(
        bare_run(
            tmp_path / "run.zarr",
            config=config,
            data={"samples_crc32c": 1},
            optimizer={"name": "X"},
        )
    )
    assert "Task `5`, model `['m']`, width ×`{}`" in text
    assert "batch size `big`" in text
    assert "Optimizer: `X`, learning rate `fast`" in text


def test_the_latex_compiles_with_hostile_names(tmp_path: Path) -> None:
    path = tmp_path / "x" / HOSTILE.replace("/", "-").replace("\x07", "\n")
    path.parent.mkdir()
    random_run(path, epoch=None, seeds={"seed": "50% & _"}, versions={"lib_x": "1~2^3"})
    text = told(path, ".tex")
    assert text.isascii()
    assert re.sub(r"\\[{}$%&#_]", "", text).count("$") % 2 == 0
    assert r"\mathrm{EB} = \|g\| / \|e\|" in text
    compiles(tmp_path, text)


def test_markdown_keeps_names_whole(tmp_path: Path) -> None:
    path = bare_run(tmp_path / "a `b` ``c``.zarr")
    assert f"**Run ``` {path} ```.**" in told(path)


def test_the_command_prints_and_writes(digits: Path, tmp_path: Path) -> None:
    shown = analyze("methods", str(digits))
    assert shown.exit_code == 0
    assert shown.stdout == told(digits)
    for name in ("m.md", "m.TEX"):
        done = analyze("methods", str(digits), "--out", str(tmp_path / name))
        assert (done.exit_code, done.stderr) == (0, "")
        assert (tmp_path / name).read_text() == done.stdout == told(digits, name[1:].lower())


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random_run(tmp_path / "runs" / "first.zarr")
    assert analyze(*analyze_command("methods").split()[1:]).exit_code == 0
    assert r"\paragraph{Quantities.}" in Path("runs/methods.tex").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run.zarr", "--out", "m.docx"), 2, "'.docx' names no kind of text: m.docx; end it in"),
        (("run.zarr", "--out", "m"), 2, "a name without a suffix: m; end it in .md or .tex"),
        (("run.zarr", "--out", "run.zarr/m.md"), 2, "inside a run"),
        (("run.zarr", "--out", "folder.md"), 2, "this is a folder"),
        (("t.md", "--out", "t.md"), 2, "this file is an input"),
        (("none.zarr", "--out", "m.md"), 3, "no such run or table: none.zarr"),
        (("other.parquet",), 3, "no table can be read"),
        (("folder.md",), 3, "no run store here"),
        ((), 2, "RUN"),
    ],
)
def test_what_a_user_can_do_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    bare_run(tmp_path / "run.zarr")
    write_table(measure_run("run.zarr")["model"], "t.md")
    Path("other.parquet").write_text("no table")
    Path("folder.md").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    done = analyze("methods", *arguments)
    assert (done.exit_code, done.stderr.count("\n"), done.stdout) == (code, 1, "")
    assert words in done.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_library_refuses_too(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to describe"):
        describe_methods([])
    with pytest.raises(UsageError, match=r"end it in \.md or \.tex"):
        describe_methods(["none.zarr"], "docx")
    with pytest.raises(InputError, match="no such run or table"):
        write_methods(["none.zarr"], tmp_path / "m.md")
    run = open_run(bare_run(tmp_path / "run.zarr"))
    assert of_run(run).references == ("final",)
