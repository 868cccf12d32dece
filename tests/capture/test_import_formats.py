"""Checkpoints of every kind, written by the libraries that write them: each number is compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from capture.importing import import_checkpoints
from capture.store import (
    MismatchError,
    UnsupportedModelError,
    export_state_dict,
    open_run,
    verify_run,
)
from capture.store.verify import Verification
from tests.capture.import_samples import STEPS, Net, assert_holds, states

BUFFERS = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")


def untied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state_dict as safetensors holds it: each storage once."""
    return {name: value for name, value in state.items() if name != "second.weight"}


def checked(path: Path) -> Verification:
    found = verify_run(path)
    assert found.sound
    assert found.shards == len(STEPS)
    return found


def test_torch_files_with_tied_weights_and_an_optimizer_beside(tmp_path: Path) -> None:
    def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        document = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}
        torch.save(document, tmp_path / f"step_{step}.pt")
        torch.save(optimizer.state_dict(), tmp_path / f"optimizer_{step}.pt")

    expected = states(save)
    import_checkpoints(tmp_path, tmp_path / "run.zarr")
    run = assert_holds(tmp_path / "run.zarr", expected)
    checked(tmp_path / "run.zarr")
    assert run.table.aliases == {"second.weight": "first.weight"}
    assert tuple(tensor.name for tensor in run.table.buffers) == BUFFERS
    # The order of named_parameters(), so that it fits a recorded run of the same model.
    assert run.table.names == tuple(name for name, _ in Net().named_parameters())


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "module", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_wrappers_and_prefixes_go(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
        torch.save({wrapper: state} if wrapper else state, tmp_path / f"w-{step}.pth")

    expected = states(save)
    import_checkpoints(tmp_path, tmp_path / "run.zarr")
    assert_holds(tmp_path / "run.zarr", expected)


def test_the_old_format_of_torch(tmp_path: Path) -> None:
    def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        path = tmp_path / f"iter{step}.bin"
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)

    expected = states(save)
    import_checkpoints(tmp_path, tmp_path / "run.zarr")
    assert_holds(tmp_path / "run.zarr", expected)


def test_safetensors_leave_tied_names_out(tmp_path: Path) -> None:
    def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        save_file(untied(model.state_dict()), tmp_path / f"model_{step:05d}.safetensors")

    expected = states(save)
    import_checkpoints(tmp_path, tmp_path / "run.zarr")
    run = assert_holds(tmp_path / "run.zarr", {s: untied(state) for s, state in expected.items()})
    checked(tmp_path / "run.zarr")
    assert run.table.aliases == {}


def test_what_save_model_and_export_write_has_its_aliases_again(tmp_path: Path) -> None:
    expected = states(lambda m, o, step: save_model(m, str(tmp_path / f"{step}.safetensors")))
    import_checkpoints(tmp_path, tmp_path / "run.zarr")
    run = assert_holds(tmp_path / "run.zarr", expected)
    assert len(run.table.aliases) == 1
    (tmp_path / "again").mkdir()
    for step in STEPS:
        export_state_dict(run.path, step, tmp_path / f"again/{step}.safetensors")
    import_checkpoints(tmp_path / "again", tmp_path / "again.zarr")
    assert open_run(tmp_path / "again.zarr").table == run.table
    for row in range(len(STEPS)):
        names = [
            folder / f"weights/value/c/{row}/0" for folder in (run.path, tmp_path / "again.zarr")
        ]
        assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_other_widths_come_without_loss(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        state = {
            n: v.to(dtype) if v.is_floating_point() else v for n, v in model.state_dict().items()
        }
        expected[step] = untied(state)
        state["second.bias"][0] = float("nan")
        if kind == "pt":
            torch.save(untied(state), tmp_path / f"step{step}.pt")
        else:
            save_file(untied(state), tmp_path / f"step{step}.safetensors")

    expected: dict[int, dict[str, torch.Tensor]] = {}
    states(save)
    import_checkpoints(tmp_path, tmp_path / "run.zarr")
    run = open_run(tmp_path / "run.zarr")
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}[dtype]
    assert {tensor.dtype for tensor in run.table.parameters} == {name}
    assert run.table.value_dtype == (np.float64 if name == "F64" else np.float32)
    for step, state in expected.items():
        row = run.stream("weights").read(run.stream("weights").row_of(step))
        wide = torch.cat([state[name].double().reshape(-1) for name in run.table.names]).numpy()
        np.testing.assert_array_equal(row.astype(np.float64), wide)
        assert np.isnan(row).sum() == 1
    export_state_dict(run.path, STEPS[-1], tmp_path / "end.safetensors")


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")  # of the one who saves
@pytest.mark.parametrize("wrapper", ["model", None])
def test_folders_of_torch_distributed(tmp_path: Path, wrapper: str | None) -> None:
    import torch.distributed.checkpoint as dcp

    def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        state: dict[str, Any] = untied(model.state_dict())
        document = {wrapper: state, "optimizer": optimizer.state_dict(), "step": step}
        folder = tmp_path / f"step-{step}"
        dcp.save(document if wrapper else state, checkpoint_id=folder, no_dist=True)

    expected = states(save)
    import_checkpoints(tmp_path, tmp_path / "run.zarr")
    assert_holds(tmp_path / "run.zarr", {s: untied(state) for s, state in expected.items()})
    checked(tmp_path / "run.zarr")
    entry = open_run(tmp_path / "run.zarr").attributes["imported"]["checkpoints"][0]
    assert entry["files_sha256"].keys() == {".metadata", "__0_0.distcp"}


RANK = """
import sys
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
if rank == 0:
    torch.save(model.state_dict(), f"{folder}/whole.ref")
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
state, optimizer = get_state_dict(model, torch.optim.Adam(model.parameters()))
dcp.save({"app": {"model": state, "optim": optimizer}}, checkpoint_id=f"{folder}/step-10")
distributed.destroy_process_group()
"""


def test_what_two_ranks_of_fsdp_save_is_put_together(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", RANK, str(rank), str(tmp_path)] for rank in range(2)]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    said = [rank.communicate(timeout=150)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert len(list(tmp_path.glob("step-10/*.distcp"))) == 2
    import_checkpoints(tmp_path, tmp_path / "run.zarr")
    assert_holds(tmp_path / "run.zarr", {10: torch.load(tmp_path / "whole.ref")})


@pytest.mark.filterwarnings("default")  # transformers warns of itself
@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_of_hugging_face_whole_and_in_shards(tmp_path: Path, sharded: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="needs straightway[transformers]")
    size = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))
    expected: dict[int, dict[str, torch.Tensor]] = {}
    for step in (500, 1000):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        folder = tmp_path / f"checkpoint-{step}"
        model.save_pretrained(folder, max_shard_size="4KB" if sharded else "5GB")
        (folder / "trainer_state.json").write_text(
            json.dumps({"global_step": step, "epoch": step / 500})
        )
        torch.save({"lr": 1}, folder / "optimizer.pt")
        expected[step] = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert len(list(folder.glob("*.safetensors"))) == 1 or sharded
    assert (folder / "model.safetensors.index.json").exists() == sharded
    import_checkpoints(tmp_path, tmp_path / "run.zarr")
    run = assert_holds(tmp_path / "run.zarr", expected)
    assert run.stream("weights").epochs.tolist() == [1, 2]
    assert run.table.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.filterwarnings("default")
def test_what_the_trainer_of_hugging_face_leaves_behind(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs straightway[transformers]")
    from tests.capture.test_loops_integrations import BATCH, Rows, Tiny

    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Keep(transformers.TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            held = kwargs["model"].state_dict()
            seen[state.global_step] = {name: value.clone() for name, value in held.items()}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        use_cpu=True,
        report_to=[],
        save_strategy="steps",
        save_steps=1,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = transformers.Trainer(Tiny(), arguments, train_dataset=Rows(), callbacks=[Keep()])
    trainer.train()
    trainer.save_model()  # beside the folders, as users do
    import_checkpoints(tmp_path / "out", tmp_path / "run.zarr")
    run = assert_holds(tmp_path / "run.zarr", seen)
    assert run.stream("weights").epochs.tolist() == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.filterwarnings("default")
def test_what_the_trainer_of_lightning_leaves_behind(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="needs straightway[lightning]")

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(5, 2)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(batch[0]).square().mean()
            return loss

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            held = {name: value.clone() for name, value in self.model.state_dict().items()}
            seen[checkpoint["global_step"]] = held

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    seen: dict[int, dict[str, torch.Tensor]] = {}
    save = lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=tmp_path / "out", every_n_train_steps=2, save_top_k=-1, save_last=True
    )
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        callbacks=[save],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.TensorDataset(torch.randn(16, 5))
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=4))
    assert (tmp_path / "out/last.ckpt").exists()
    import_checkpoints(tmp_path / "out", tmp_path / "run.zarr", prefix="model.")
    assert seen.keys() == {2, 4, 6, 8}
    assert_holds(tmp_path / "run.zarr", seen)


def test_a_folder_for_each_step_with_one_file_in_it_and_an_epoch(tmp_path: Path) -> None:
    def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        folder = tmp_path / f"epoch_{step // 5}"
        folder.mkdir()
        torch.save(model.state_dict(), folder / "weights.pt")

    expected = states(save)
    import_checkpoints(tmp_path, tmp_path / "run.zarr", steps_per_epoch=5)
    run = assert_holds(tmp_path / "run.zarr", expected)
    assert run.stream("weights").epochs.tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_float8_and_quantised_tensors_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    small = torch.ones(4, 4).to(torch.float8_e4m3fn)
    for name, value in (("a.weight", small), ("b.weight", torch.ones(4, 4, dtype=torch.int8))):
        state = {"x": torch.ones(3), name: value}
        path = tmp_path / f"step_1.{kind}"
        torch.save(state, path) if kind == "pt" else save_file(state, path)
        with pytest.raises(UnsupportedModelError, match=f"{name!r} is a .*cannot be imported"):
            import_checkpoints(path, tmp_path / "run.zarr")
    assert not (tmp_path / "run.zarr").exists()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_torchs_own_quantised_and_sparse_tensors_are_refused(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    sparse = torch.eye(3).to_sparse()
    for value, word in (
        (quantised, "quantised"),
        (sparse, "sparse"),
        (torch.ones(2) * 1j, "complex"),
    ):
        torch.save({"w": value, "x": torch.ones(2)}, tmp_path / "step_1.pt")
        with pytest.raises(UnsupportedModelError, match=f"'w' is a .*{word}"):
            import_checkpoints(tmp_path, tmp_path / "run.zarr")


def test_tied_in_one_and_apart_in_another(tmp_path: Path) -> None:
    shared = torch.ones(3)
    torch.save({"a": shared, "b": shared}, tmp_path / "step_0.pt")
    torch.save({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path / "step_1.pt")
    import_checkpoints(tmp_path, tmp_path / "same.zarr")
    assert open_run(tmp_path / "same.zarr").table.aliases == {"b": "a"}
    torch.save({"a": torch.zeros(3), "b": torch.ones(3)}, tmp_path / "step_1.pt")
    with pytest.raises(MismatchError, match=r"'a' and 'b' are one tensor .* two here"):
        import_checkpoints(tmp_path, tmp_path / "other.zarr")
    assert not (tmp_path / "other.zarr").exists()
