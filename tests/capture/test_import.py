"""Imported runs: what they say of themselves, what is refused, and what can be measured in them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import capture
from capture.import_plan import plan_import
from capture.importing import import_checkpoints
from capture.info import describe_run, format_description
from capture.models import build_model
from capture.store import (
    InputError,
    MismatchError,
    RunWriter,
    UnsupportedModelError,
    UsageError,
    WriteError,
    open_run,
    verify_run,
)
from tests.capture.import_samples import STEPS, Net, assert_holds, save_all, states

ROOT = Path(__file__).parents[2]


# What it says of itself.


def test_it_is_a_complete_run_that_says_where_it_comes_from(tmp_path: Path) -> None:
    expected = save_all(tmp_path / "kept")
    imported = capture.import_checkpoints(tmp_path / "kept", tmp_path / "run.zarr")
    assert imported.steps == STEPS
    assert imported.duplicates == {}
    run = assert_holds(tmp_path / "run.zarr", expected)
    facts = run.attributes["imported"]
    assert facts["trainable"] == "names"
    for step, entry in zip(STEPS, facts["checkpoints"], strict=True):
        file = tmp_path / f"kept/step_{step}.pt"
        assert (entry["step"], entry["source"], entry["format"]) == (step, str(file), "torch")
        assert entry["files_sha256"] == {file.name: sha256(file.read_bytes()).hexdigest()}
        stored = run.stream("weights").read(STEPS.index(step)).tobytes()
        buffers = [expected[step][tensor.name].numpy().tobytes() for tensor in run.table.buffers]
        assert entry["row_sha256"] == sha256(b"".join([stored, *buffers])).hexdigest()
    shown = format_description(describe_run(run.path))
    assert "complete, 20 steps" in shown
    assert "imported  from 4 checkpoints; what is trained is told by the names" in shown
    assert "optimizer" not in shown
    assert verify_run(run.path).sound


def test_equal_checkpoints_give_equal_rows_whatever_the_format(tmp_path: Path) -> None:
    (tmp_path / "st").mkdir()

    def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        torch.save(model.state_dict(), tmp_path / f"step_{step}.pt")
        state = {n: v for n, v in model.state_dict().items() if n != "second.weight"}
        save_file(state, tmp_path / f"st/{step}.safetensors")

    states(save)
    settings = {"model": "tests.capture.import_samples:Net"}
    runs = [tmp_path / "a.zarr", tmp_path / "b.zarr"]
    import_checkpoints(tmp_path, runs[0])
    import_checkpoints(tmp_path / "st", runs[1], settings=settings)
    for row in range(len(STEPS)):
        one, other = (run / f"weights/value/c/{row}/0" for run in runs)
        assert one.read_bytes() == other.read_bytes()


def test_a_model_tells_order_ties_and_what_is_trained(tmp_path: Path) -> None:
    def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        state = dict(reversed(model.state_dict().items()))
        torch.save(
            {n: v.clone().bfloat16() if n == "norm.bias" else v.clone() for n, v in state.items()},
            tmp_path / f"step_{step}.pt",
        )

    states(save)
    settings = {"model": "tests.capture.import_samples:half_frozen"}
    with pytest.raises(
        MismatchError, match=r"'norm.weight' is frozen and has other values than in"
    ):
        import_checkpoints(tmp_path, tmp_path / "run.zarr", settings=settings)
    assert not (tmp_path / "run.zarr").exists()
    settings = {"model": "tests.capture.import_samples:Net"}
    import_checkpoints(tmp_path, tmp_path / "run.zarr", settings=settings)
    run = open_run(tmp_path / "run.zarr")
    assert run.table.names == tuple(name for name, _ in Net().named_parameters())
    assert run.table.aliases == {"second.weight": "first.weight"}
    assert [t.dtype for t in run.table.parameters if t.name == "norm.bias"] == ["BF16"]
    assert {tensor.group for tensor in run.table.parameters} == {None}
    assert run.attributes["config"] == settings
    assert run.attributes["imported"]["trainable"] == "model"


def test_frozen_tensors_are_stored_once(tmp_path: Path) -> None:
    for step in (1, 2):
        state = {
            "body.w": torch.ones(50),
            "head.w": torch.full((3,), float(step)),
            "n": torch.ones(1),
        }
        torch.save(state, tmp_path / f"{step}.pt")
    import_checkpoints(tmp_path, tmp_path / "run.zarr", trainable=r"^head\.", buffers="^n$")
    table = open_run(tmp_path / "run.zarr").table
    assert [t.name for t in (*table.parameters, *table.buffers, *table.frozen)] == [
        *("head.w", "n", "body.w")
    ]
    assert verify_run(tmp_path / "run.zarr").sound
    assert_holds(
        tmp_path / "run.zarr",
        {
            s: {"body.w": torch.ones(50), "head.w": torch.full((3,), float(s)), "n": torch.ones(1)}
            for s in (1, 2)
        },
    )


def test_tensors_that_never_move_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        torch.save(
            {"scale": torch.ones(2), "w": torch.full((3,), float(step))}, tmp_path / f"{step}.pt"
        )
    import_checkpoints(tmp_path, tmp_path / "run.zarr")
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "1 of 2 tensors are the same in every checkpoint, the first is 'sc"
    )


def test_keys_say_where_the_weights_lie(tmp_path: Path) -> None:
    inner = {"w": torch.ones(2)}
    torch.save({"model_ema": {"x": {"w": torch.zeros(2)}}, "net2": inner}, tmp_path / "step_1.pt")
    with pytest.raises(
        InputError, match=r"no named tensors in this file, its keys are model_ema, net2"
    ):
        plan_import(tmp_path)
    with pytest.raises(InputError, match="no key 'ema' in this file, it has model_ema, net2"):
        plan_import(tmp_path, key="ema")
    with pytest.raises(InputError, match="no named tensors in this file, its keys are x"):
        plan_import(tmp_path, key="model_ema")
    import_checkpoints(tmp_path, tmp_path / "run.zarr", key="model_ema/x")
    assert open_run(tmp_path / "run.zarr").stream("weights").read(0).tolist() == [0, 0]
    torch.save({"loss": torch.ones(()), "net2": inner}, tmp_path / "step_1.pt")
    with pytest.raises(InputError, match=r"not clear where the weights lie, .* below 'net2'"):
        plan_import(tmp_path)


def test_a_prefix_chooses_and_goes(tmp_path: Path) -> None:
    torch.save({"model.w": torch.ones(2), "loss.w": torch.zeros(5)}, tmp_path / "step_1.pt")
    assert plan_import(tmp_path, prefix="model.").table.names == ("w",)
    assert plan_import(tmp_path).table.names == ("model.w", "loss.w")
    with pytest.raises(
        InputError, match=r"no tensor has the prefix 'net\.', the first is 'model.w'"
    ):
        plan_import(tmp_path, prefix="net.")


# What is refused.


def test_the_first_difference_is_named_with_checkpoint_and_shape(tmp_path: Path) -> None:
    first = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    torch.save(first, tmp_path / "step_0.pt")
    for other, words in (
        (
            {**first, "b": torch.ones(5)},
            r"'b' has shape \[5\], and \[4\] in .*step_0.pt: .*step_7.pt",
        ),
        ({**first, "b": torch.ones(4).double()}, "'b' has dtype F64, and F32 in"),
        ({"a": first["a"]}, "'b' is missing, which is in"),
        ({**first, "c": torch.ones(1)}, "'c' is not in"),
    ):
        torch.save(other, tmp_path / "step_7.pt")
        with pytest.raises(MismatchError, match=words):
            import_checkpoints(tmp_path, tmp_path / "run.zarr")
        assert not (tmp_path / "run.zarr").exists()


def test_another_model_is_named_with_the_first_difference(tmp_path: Path) -> None:
    def choices(**more: str) -> dict[str, object]:
        return {"settings": {"task": "digits", **more}}

    model = build_model("mlp", {"input_shape": (1, 8, 8), "num_classes": 10})
    state = model.state_dict()
    for name, other, words in (
        ("missing", {n: v for n, v in state.items() if n != "3.bias"}, "'3.bias' is missing in it"),
        (
            "shape",
            {**state, "1.weight": torch.ones(2, 2)},
            r"'1.weight' has shape \[2, 2\] in it and",
        ),
        ("extra", {**state, "9.bias": torch.ones(2)}, "which has no '9.bias'"),
        (
            "prefix",
            {f"net.{n}": v for n, v in state.items()},
            r"missing in it: .*give --prefix net\.",
        ),
        (
            "dtype",
            {**state, "1.bias": torch.ones(256, dtype=torch.int64)},
            "is trained and has .* I64",
        ),
    ):
        path = tmp_path / f"{name}_1.pt"
        torch.save(other, path)
        with pytest.raises(InputError, match=words):
            plan_import(path, **choices())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown model 'mpl'"):
        plan_import(path, **choices(model="mpl"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no model is given"):
        plan_import(path, settings={"width": 2.0})
    with pytest.raises(UsageError, match="the model tells which tensors are trained"):
        plan_import(path, settings={"task": "digits"}, trainable="x")
    with pytest.raises(UsageError, match="unknown choice 'stepz'"):
        plan_import(path, stepz=[1])  # type: ignore[call-arg]


def test_nothing_trainable_and_names_of_the_format(tmp_path: Path) -> None:
    torch.save({"n": torch.ones(3, dtype=torch.int64)}, tmp_path / "step_1.pt")
    with pytest.raises(UnsupportedModelError, match="no tensor in it is trainable"):
        plan_import(tmp_path)
    save_all(tmp_path / "kept")
    import_checkpoints(tmp_path / "kept", tmp_path / "run.zarr")
    (tmp_path / "step_1.pt").unlink()
    shard = (tmp_path / "run.zarr/weights/value/c/1/0").read_bytes()
    (tmp_path / "step_1.safetensors").write_bytes(shard)
    with pytest.raises(UnsupportedModelError, match=r"keeps for itself.*capture export"):
        plan_import(tmp_path / "step_1.safetensors")


def test_copies_under_another_step_are_told_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step, value in ((0, 0.0), (100, 1.0), (200, 1.0), (300, 0.0)):
        state = {"w": torch.full((3,), value), "running_mean": torch.ones(3)}
        torch.save(state, tmp_path / f"step_{step}.pt")
    imported = import_checkpoints(tmp_path, tmp_path / "run.zarr")
    assert imported.duplicates == {200: 100, 300: 0}
    assert open_run(tmp_path / "run.zarr").stream("weights").steps.tolist() == [0, 100, 200, 300]
    first, second = (record.getMessage() for record in caplog.records)
    names = [f"step {step} ({tmp_path}/step_{step}.pt)" for step in (200, 100, 300, 0)]
    assert first.startswith(f"{names[0]} has the weights of {names[1]}: a copy, mislabelled, or")
    assert second.startswith(f"{names[2]} has the weights of {names[3]}: a copy")
    # Where a buffer differs, a forward pass lay between them.
    caplog.clear()
    state = {"w": torch.full((3,), 1.0), "running_mean": torch.zeros(3)}
    torch.save(state, tmp_path / "step_200.pt")
    assert import_checkpoints(tmp_path, tmp_path / "again.zarr").duplicates == {300: 0}


def test_where_a_run_is_already(tmp_path: Path) -> None:
    save_all(tmp_path / "kept")
    import_checkpoints(tmp_path / "kept", tmp_path / "run.zarr")
    before = (tmp_path / "run.zarr/zarr.json").read_bytes()
    with pytest.raises(UsageError, match="a run is already recorded here"):
        import_checkpoints(tmp_path / "kept", tmp_path / "run.zarr")
    with pytest.raises(UsageError, match="neither empty nor a run"):
        import_checkpoints(tmp_path / "kept", tmp_path / "kept")
    assert (tmp_path / "run.zarr/zarr.json").read_bytes() == before


def test_an_import_that_was_killed_starts_again(tmp_path: Path) -> None:
    expected = save_all(tmp_path / "kept")
    code = (
        "import os, signal\n"
        "from capture.store import RunWriter\n"
        "commit, done = RunWriter.commit, []\n"
        "def dying(self, *a, **k):\n"
        "    done.append(1)\n"
        "    if len(done) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return commit(self, *a, **k)\n"
        "RunWriter.commit = dying\n"
        "from capture.importing import import_checkpoints\n"
        f"import_checkpoints({str(tmp_path / 'kept')!r}, {str(tmp_path / 'run.zarr')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == -9
    shown = format_description(describe_run(tmp_path / "run.zarr"))
    assert "incomplete, weights up to step 5; give the same `capture import` again" in shown
    import_checkpoints(tmp_path / "kept", tmp_path / "run.zarr")
    assert_holds(tmp_path / "run.zarr", expected)
    assert verify_run(tmp_path / "run.zarr").sound


def test_a_removal_that_was_killed_too_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = save_all(tmp_path / "kept")
    out = tmp_path / "run.zarr"
    import_checkpoints(tmp_path / "kept", out)
    writer = RunWriter.reopen(out)
    writer.truncate(10)  # as if it had been killed before that step
    writer.close()

    def dying(path: Path) -> None:
        shutil.rmtree(out / "weights/value")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("capture.importing.remove", dying)
        with pytest.raises(KeyboardInterrupt):
            import_checkpoints(tmp_path / "kept", out)
    assert not (out / "weights/value").exists()
    import_checkpoints(tmp_path / "kept", out)
    assert_holds(out, expected)


@pytest.mark.parametrize("count", [1, 3, 6, 9, 12, 15, 20])
def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.capture.test_stops import Stop

    for step in range(4):
        state = {"body": torch.ones(9), "head": torch.full((9,), float(step))}
        torch.save(state, tmp_path / f"{step}.pt")
    with monkeypatch.context() as patch:
        patch.setattr("capture.store.files.os.write", Stop(count))
        with pytest.raises(WriteError, match="the disk is full"):
            import_checkpoints(tmp_path, tmp_path / "run.zarr", trainable="head")
    assert not (tmp_path / "run.zarr").exists()


def test_a_disk_that_is_too_small_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(tmp_path / "kept")
    monkeypatch.setattr("capture.importing.free_bytes", lambda path: 10)
    with pytest.raises(WriteError, match="disk has 10 B free"):
        import_checkpoints(tmp_path / "kept", tmp_path / "run.zarr")
    assert not (tmp_path / "run.zarr").exists()


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_all(tmp_path / "kept")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunWriter, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoints(tmp_path / "kept", tmp_path / "run.zarr")
    assert not (tmp_path / "run.zarr").exists()


def test_onto_an_object_store(tmp_path: Path, bucket) -> None:  # type: ignore[no-untyped-def]
    expected = save_all(tmp_path / "kept")
    import_checkpoints(tmp_path / "kept", bucket.address())
    assert_holds(bucket.address(), expected)
    torch.save({"w": torch.ones(3)}, tmp_path / "kept/step_90.pt")
    with pytest.raises(MismatchError):
        import_checkpoints(tmp_path / "kept", bucket.address("other.zarr"))
    assert bucket.names("other.zarr") == []


def test_a_prefix_that_is_the_models_own_stays(tmp_path: Path) -> None:
    torch.save(nn.ModuleDict({"module": nn.Linear(2, 2)}).state_dict(), tmp_path / "step_1.pt")
    assert plan_import(tmp_path).table.names == ("weight", "bias")
    settings = {"model": "tests.capture.import_samples:Wrapped"}
    names = plan_import(tmp_path, settings=settings).table.names
    assert names == ("module.weight", "module.bias")
