"""The callbacks with the real Trainers: what they record pairs like that of any loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, Dataset

from capture import open_run
from capture.store import Run, UsageError

# The libraries warn of themselves (workers, devices, deprecations): theirs are no errors here.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(120)]

STEPS, BATCH = 4, 4
INPUTS = torch.randn(STEPS * BATCH, 5, generator=torch.Generator().manual_seed(1))


class Tiny(nn.Module):
    """Returns its loss, as the Trainer of transformers wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.net(x).square().mean()}


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return len(INPUTS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": INPUTS[index]}


def assert_paired(run: Run, prefix: str = "net.") -> None:
    """The loops do not shuffle: row t is the gradient of batch t at w_t, times its clip factor."""
    assert run.table.names == (f"{prefix}weight", f"{prefix}bias")
    assert run.complete
    assert run.stream("weights").steps.tolist() == list(range(STEPS + 1))
    factors = np.nan_to_num(run.scalar("clip_factor"), nan=1.0)
    for row in range(STEPS):
        model = Tiny().double()
        weights = torch.from_numpy(run.stream("weights").read(row)).double()
        nn.utils.vector_to_parameters(weights, model.parameters())
        model(INPUTS[row * BATCH : (row + 1) * BATCH].double())["loss"].backward()
        expected = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).numpy()
        stored = run.stream("minibatch").read(row)
        # float32 against float64, of values below 1.
        assert stored == pytest.approx(expected * factors[row], abs=1e-6)


# Hugging Face Trainer.


def hugging_face(
    folder: Path, callback: Any, model: nn.Module | None = None, **options: Any
) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs straightway[transformers]")

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(INPUTS)

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"),
        num_train_epochs=1,
        learning_rate=0.1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        **{"per_device_train_batch_size": BATCH, **options},
    )
    trainer = InOrder(model or Tiny(), arguments, train_dataset=Rows(), callbacks=[callback])
    trainer.train()


def hugging_face_callback(path: Path, **options: Any) -> Any:
    pytest.importorskip("transformers", reason="needs straightway[transformers]")
    from capture.integrations.transformers import RecorderCallback

    return RecorderCallback(path, every=1, **options)


def test_transformers(tmp_path: Path) -> None:
    callback = hugging_face_callback(tmp_path / "run.zarr", clipped=False)
    hugging_face(tmp_path, callback, max_grad_norm=0)
    run = open_run(tmp_path / "run.zarr")
    assert_paired(run)
    assert run.scalar("clip_factor").tolist() == [1.0] * STEPS
    assert run.attributes["optimizer"]["name"] == "AdamW"
    assert run.scalar("epoch").tolist() == [0, 0.25, 0.5, 0.75]
    assert not any(p._post_accumulate_grad_hooks for p in callback.recorder._seen.parameters)


def test_transformers_accumulation(tmp_path: Path) -> None:
    """Four batches of one sample for each update, which is their mean; clipped once, after all."""
    accumulated = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH}
    callback = hugging_face_callback(tmp_path / "run.zarr", max_grad_norm=0.01)
    hugging_face(tmp_path, callback, max_grad_norm=0, **accumulated)
    run = open_run(tmp_path / "run.zarr")
    assert_paired(run)
    assert (run.scalar("clip_factor") < 0.9).all()
    assert run.scalar("epoch").tolist() == [0, 0.25, 0.5, 0.75]


def test_transformers_clipping(tmp_path: Path) -> None:
    callback = hugging_face_callback(tmp_path / "known.zarr", max_grad_norm=0.01)
    hugging_face(tmp_path, callback, max_grad_norm=0)
    run = open_run(tmp_path / "known.zarr")
    assert_paired(run)
    assert (run.scalar("clip_factor") < 0.9).all()
    callback = hugging_face_callback(tmp_path / "both.zarr", max_grad_norm=0.01)
    with pytest.raises(UsageError, match="clip beside the Trainer"):
        hugging_face(tmp_path, callback, max_grad_norm=1.0)
    callback = hugging_face_callback(tmp_path / "unknown.zarr", clipped=False)
    with pytest.warns(UserWarning, match="changes gradients"):
        hugging_face(tmp_path, callback, max_grad_norm=0.01)
    assert np.isnan(open_run(tmp_path / "unknown.zarr").scalar("clip_factor")).all()


class Failing(Tiny):
    """Raises in its third batch."""

    seen = 0

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen += 1
        if self.seen == 3:
            raise RuntimeError("out of memory")
        return super().forward(x)


def test_transformers_failure_leaves_the_run_incomplete(tmp_path: Path) -> None:
    callback = hugging_face_callback(tmp_path / "run.zarr")
    with pytest.raises(RuntimeError, match="out of memory"):
        hugging_face(tmp_path, callback, Failing())
    assert callback.recorder.step == 2
    callback._leave_failed()
    run = open_run(tmp_path / "run.zarr")
    assert not run.complete
    assert run.stream("minibatch").steps.tolist() == [0, 1]


# Lightning.


def lightning(
    callback: Any, folder: Path, failing: bool = False, batch_size: int = BATCH, **options: Any
) -> None:
    pl = pytest.importorskip("lightning.pytorch", reason="needs straightway[lightning]")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Tiny().net

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            if failing and index == 2:
                raise RuntimeError("out of memory")
            return self.net(batch["x"]).square().mean()

        def configure_optimizers(self) -> optim.Optimizer:
            return optim.SGD(self.parameters(), lr=0.1)

    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
        **options,
    )
    trainer.fit(Module(), DataLoader(Rows(), batch_size=batch_size))


def lightning_callback(path: Path, **options: Any) -> Any:
    pytest.importorskip("lightning.pytorch", reason="needs straightway[lightning]")
    from capture.integrations.lightning import RecorderCallback

    return RecorderCallback(path, every=1, **options)


def test_lightning(tmp_path: Path) -> None:
    lightning(lightning_callback(tmp_path / "run.zarr", clipped=False), tmp_path)
    run = open_run(tmp_path / "run.zarr")
    assert_paired(run)
    assert run.scalar("clip_factor").tolist() == [1.0] * STEPS
    assert run.scalar("epoch").tolist() == [0, 0.25, 0.5, 0.75]
    assert np.isfinite(run.scalar("loss")).all()


def test_lightning_accumulation(tmp_path: Path) -> None:
    callback = lightning_callback(tmp_path / "run.zarr", max_grad_norm=0.01)
    lightning(callback, tmp_path, batch_size=1, accumulate_grad_batches=BATCH)
    run = open_run(tmp_path / "run.zarr")
    assert_paired(run)
    assert (run.scalar("clip_factor") < 0.9).all()
    assert run.scalar("epoch").tolist() == [0, 0.25, 0.5, 0.75]


def test_lightning_clipping(tmp_path: Path) -> None:
    lightning(lightning_callback(tmp_path / "known.zarr", max_grad_norm=0.01), tmp_path)
    run = open_run(tmp_path / "known.zarr")
    assert_paired(run)
    assert (run.scalar("clip_factor") < 0.9).all()
    callback = lightning_callback(tmp_path / "both.zarr", max_grad_norm=0.01)
    with pytest.raises(UsageError, match="would both clip"):
        lightning(callback, tmp_path, gradient_clip_val=1.0)
    callback = lightning_callback(tmp_path / "unknown.zarr", clipped=False)
    with pytest.warns(UserWarning, match="changes gradients"):
        lightning(callback, tmp_path, gradient_clip_val=0.01)
    assert np.isnan(open_run(tmp_path / "unknown.zarr").scalar("clip_factor")).all()


def test_lightning_failure_leaves_the_run_incomplete(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        lightning(lightning_callback(tmp_path / "run.zarr"), tmp_path, failing=True)
    run = open_run(tmp_path / "run.zarr")
    assert not run.complete
    assert run.stream("minibatch").steps.tolist() == [0, 1]


# Accelerate.


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs straightway[accelerate]")
    from capture.integrations.accelerate import record

    accelerator = accelerate.Accelerator(cpu=True)
    bare = optim.SGD((model := Tiny()).parameters(), lr=0.1)
    scheduler = optim.lr_scheduler.StepLR(bare, 2)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, bare, DataLoader(Rows(), batch_size=BATCH), scheduler
    )
    state = {"scheduler": scheduler}
    path = tmp_path / "run.zarr"
    with record(accelerator, path, model, optimizer, every=1, state=state) as recorder:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(batch["x"])["loss"]
                accelerator.backward(loss)
                recorder.log(loss=loss)
                recorder.clip_grad_norm_(0.01)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        recorder.checkpoint()
    run = open_run(path)
    assert_paired(run)
    assert (run.scalar("clip_factor") < 0.9).all()
    assert run.scalar("lr").tolist() == [0.1, 0.1, pytest.approx(0.01), pytest.approx(0.01)]
