"""Which step a checkpoint is of: by its name, by what the user says, by what is inside."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from capture.checkpoints.find import find_checkpoints
from capture.checkpoints.steps import Told, natural, read_name
from capture.import_plan import plan_import
from capture.importing import import_checkpoints
from capture.store import InputError, StraightwayError, UsageError, open_run


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500),
        ("step_500.pt", 500),
        ("step500.pt", 500),
        ("global_step500", 500),
        ("iter_0005000.pth", 5000),
        ("epoch=3-step=500.ckpt", 500),
        ("epoch=3-step=500-v1.ckpt", 500),
        ("model_00500.safetensors", 500),
        ("resnet18_500.pt", 500),
        ("llama-7b-step500.bf16.safetensors", 500),
        ("ckpt500.pt", 500),
        ("gpt2-checkpoint-500", 500),
        ("500.pt", 500),
        ("model.500.pt", 500),
        ("acc=0.93-step=500.pt", 500),
        ("checkpoint-500-epoch-3.pt", 500),
        ("step1000-unsharded", 1000),
        ("STEP_7.PT", 7),
    ],
)
def test_the_step_in_a_name(name: str, step: int) -> None:
    assert read_name(name, name).step == step


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("epoch_3.pt", Told(epoch=3)),
        ("checkpoint_epoch_10.pth", Told(epoch=10)),
        ("epoch=3-val_loss=0.25.ckpt", Told(epoch=3)),
        ("best.pt", Told()),
        ("resnet18.pt", Told()),
        ("model.bf16.safetensors", Told()),
        ("footstep7.pt", Told()),
    ],
)
def test_names_that_tell_no_step(name: str, told: Told) -> None:
    assert read_name(name, name) == told


@pytest.mark.parametrize("name", ["checkpoint_3_5000.pt", "model-2024-01.pt", "step_1_step_2.pt"])
def test_names_that_tell_several(name: str) -> None:
    with pytest.raises(InputError, match=r"several numbers, its step may be .*--step-pattern"):
        read_name(name, name)


def test_natural_order_takes_numbers_as_numbers() -> None:
    names = ["m_10.pt", "m_9.pt", "a.pt", "m_100.pt", "10"]
    assert sorted(names, key=natural) == ["10", "a.pt", "m_9.pt", "m_10.pt", "m_100.pt"]


def save(path: Path, value: float, **beside: object) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    torch.save({"model": {"w": torch.full((3,), float(value))}, **beside}, path)


def steps_of(*sources: Path, **choices: object) -> dict[str, int]:
    plan = plan_import(sources, **choices)  # type: ignore[arg-type]
    return {row.checkpoint.name: row.step for row in plan.rows}


def test_a_pattern_chooses_among_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("run_3_100.pt", "run_3_20.pt", "z_best.pt"):
        save(tmp_path / name, len(name))
    with pytest.raises(InputError, match="several numbers") as error:
        steps_of(tmp_path)
    assert "run_3_20.pt; give --step-pattern" in str(error.value)
    expected = {"run_3_20.pt": 20, "run_3_100.pt": 100}
    assert steps_of(tmp_path, step_pattern=r"run_\d+_(\d+)") == expected
    assert "1 checkpoints do not fit --step-pattern" in caplog.text
    assert steps_of(tmp_path, step_pattern=r"_(?P<x>\d)_(?P<step>\d+)") == expected
    for pattern, words in (
        ("run_(", "no regular expression"),
        ("none(1)", "no checkpoint fits"),
        ("run_(.)", None),
        ("(run)", "finds 'run', which is no number"),
        ("run", "finds None, which is no number"),
    ):
        # `run_(.)` finds one step for two checkpoints, which are not copies.
        words = words or "two checkpoints of step 3"
        with pytest.raises(StraightwayError, match=words):
            steps_of(tmp_path, step_pattern=pattern)


def test_a_list_of_steps_follows_the_natural_order(tmp_path: Path) -> None:
    for name in ("b_10.pt", "b_9.pt", "a.pt"):
        save(tmp_path / name, len(name) + ord(name[2]))
    assert steps_of(tmp_path, steps=[0, 7, 3]) == {"a.pt": 0, "b_10.pt": 3, "b_9.pt": 7}
    with pytest.raises(UsageError, match="2 steps for 3 checkpoints"):
        steps_of(tmp_path, steps=[0, 7])
    with pytest.raises(UsageError, match="exclude each other"):
        steps_of(tmp_path, steps=[0, 1, 2], step_pattern="x")
    with pytest.raises(UsageError, match="a step must be a whole number"):
        steps_of(tmp_path, steps=[0, -7, 3])
    with pytest.raises(InputError, match="two checkpoints of step 1"):
        steps_of(tmp_path, steps=[0, 1, 1])


def test_what_is_inside_tells_where_the_name_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "first.pt", 0, global_step=4)
    save(tmp_path / "epoch_9.pt", 1, step=8)
    assert steps_of(tmp_path) == {"first.pt": 4, "epoch_9.pt": 8}
    assert not caplog.records
    save(tmp_path / "step_12.pt", 2, global_step=10)
    assert steps_of(tmp_path)["step_12.pt"] == 12
    assert "step_12.pt is taken for step 12 and says step 10 inside" in caplog.text


def test_epochs_need_their_steps(tmp_path: Path) -> None:
    save(tmp_path / "epoch_1.pt", 0)
    save(tmp_path / "epoch_2.pt", 1)
    with pytest.raises(
        InputError, match=r"an epoch, and no step: .*epoch_1.pt; give --steps-per-e"
    ):
        steps_of(tmp_path)
    assert steps_of(tmp_path, steps_per_epoch=50) == {"epoch_1.pt": 50, "epoch_2.pt": 100}
    with pytest.raises(UsageError, match="at least 1"):
        steps_of(tmp_path, steps_per_epoch=0)


def test_a_folder_whose_trainer_says_otherwise_is_mislabelled(tmp_path: Path) -> None:
    for name, step in (("checkpoint-5", 5), ("checkpoint-10", 9), ("final_model_3_4", 11)):
        save(tmp_path / name / "pytorch_model.bin", step)
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    with pytest.raises(InputError, match=r"its name says step 10, its trainer_state.json 9"):
        steps_of(tmp_path)
    found = steps_of(tmp_path, step_pattern=r"checkpoint-(\d+)")
    assert found == {"checkpoint-5": 5, "checkpoint-10": 10}
    assert steps_of(tmp_path / "final_model_3_4") == {"final_model_3_4": 11}


def test_a_step_that_no_run_can_have(tmp_path: Path) -> None:
    save(tmp_path / f"step_{2**63}.pt", 0)
    with pytest.raises(InputError, match="no run has a step 9223372036854775808"):
        steps_of(tmp_path)


def test_links_and_copies_of_a_step_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "step_1.pt", 1)
    save(tmp_path / "step_2.pt", 2)
    os.symlink("step_2.pt", tmp_path / "latest.pt")
    assert steps_of(tmp_path) == {"step_1.pt": 1, "step_2.pt": 2}
    assert not caplog.records
    save(tmp_path / "last.pt", 2, global_step=2)
    assert len(steps_of(tmp_path)) == 2
    assert "(step 2) and is left out" in caplog.text
    save(tmp_path / "last.pt", 3, global_step=2)
    with pytest.raises(
        InputError, match=r"two checkpoints of step 2 with other weights: .*last.pt"
    ):
        steps_of(tmp_path)


def test_links_to_elsewhere_are_followed(tmp_path: Path) -> None:
    save(tmp_path / "blobs/abc.pt", 1)
    (tmp_path / "run").mkdir()
    os.symlink("../blobs/abc.pt", tmp_path / "run/step_1.pt")
    assert steps_of(tmp_path / "run") == {"step_1.pt": 1}
    os.symlink("nowhere", tmp_path / "run/step_2.pt")
    with pytest.raises(InputError, match=r"the link leads nowhere: .*step_2.pt"):
        steps_of(tmp_path / "run")


def test_sources_may_be_folders_and_files_and_count_once(tmp_path: Path) -> None:
    save(tmp_path / "a/step_1.pt", 1)
    save(tmp_path / "a/step_2.pt", 2)
    save(tmp_path / "b/checkpoint-3/pytorch_model.bin", 3)
    found = steps_of(tmp_path / "a", tmp_path / "b/checkpoint-3", tmp_path / "a/step_1.pt")
    assert found == {"step_1.pt": 1, "step_2.pt": 2, "checkpoint-3": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "b/checkpoint-3")
        assert steps_of(Path(".")) == {"checkpoint-3": 3}
    import_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "run.zarr")
    values = open_run(tmp_path / "run.zarr").stream("weights")
    assert [float(values.read(row)[0]) for row in range(3)] == [1, 2, 3]


def test_what_lies_beside_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "step_1.pt", 1)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", ".x.pt"):
        (tmp_path / name).write_bytes(b"no checkpoint")
    for name in ("notes.txt", "logs/events", "old/step_9.pt", "run.zarr/zarr.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [one.name for one in find_checkpoints([tmp_path])] == ["step_1.pt"]


@pytest.mark.parametrize("name", ["empty", "none", "x.txt", "s3://bucket/x", "fifo.pt"])
def test_sources_that_hold_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").write_text("x")
    os.mkfifo(tmp_path / "fifo.pt")
    words = {
        "empty": "there are no checkpoints in this folder",
        "none": "no such file or folder",
        "x.txt": "no checkpoint of a known kind",
        "s3://bucket/x": "must lie on a disk",
        "fifo.pt": "no ordinary file",
    }[name]
    source = name if "://" in name else tmp_path / name
    with pytest.raises(StraightwayError, match=words) as error:
        import_checkpoints(source, tmp_path / "run.zarr")
    assert str(error.value).count("\n") == 0
    assert not (tmp_path / "run.zarr").exists()


def test_no_source_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to import"):
        import_checkpoints([], tmp_path / "run.zarr")


def test_a_checkpoint_folder_without_a_model_and_shards_without_their_index(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint-1/optimizer.pt", 0)
    with pytest.raises(InputError, match="no model is found in this checkpoint folder"):
        steps_of(tmp_path)
    save(tmp_path / "s/model-00001-of-00002.bin", 0)
    with pytest.raises(InputError, match="this is one shard of a checkpoint"):
        steps_of(tmp_path / "s")
