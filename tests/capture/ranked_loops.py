"""Loops of two ranks that the tests start as processes: ``ranked_loops.py LOOP PATH``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import distributed, nn, optim
from torch.utils.data import DataLoader, TensorDataset

from tests.capture.rank_processes import RANKS

STEPS, BATCH, ACCUMULATED, CLIP = 4, 8, 2, 0.05


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def inputs_of(rank: int, step: int) -> torch.Tensor:
    return torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(100 * rank + step))


def all_inputs() -> torch.Tensor:
    """What samplers share out, in its order: of each batch of both ranks first rank 0's."""
    batches = [inputs_of(rank, step) for step in range(STEPS) for rank in range(RANKS)]
    return torch.cat(batches)


def mean_gradient(weights: np.ndarray, x: torch.Tensor) -> np.ndarray:
    """The gradient of the mean loss of `x` in one process and in float64, ``[D]``."""
    model = make_model().double()
    nn.utils.vector_to_parameters(torch.from_numpy(weights).double(), model.parameters())
    found = torch.autograd.grad(model(x.double()).square().mean(), list(model.parameters()))
    return torch.cat([gradient.reshape(-1) for gradient in found]).numpy()


def sgd(model: nn.Module) -> optim.Optimizer:
    return optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def plain(path: str, model: nn.Module, optimizer: optim.Optimizer) -> None:
    """A loop of one's own over what its rank gets."""
    from capture import Recorder

    with Recorder(path, model, optimizer, every=1, gradients="minibatch,updates") as _:
        for step in range(STEPS):
            optimizer.zero_grad()
            model(inputs_of(distributed.get_rank(), step)).square().mean().backward()
            optimizer.step()


def zero(path: str) -> None:
    """DDP with `ZeroRedundancyOptimizer`: each rank has the state of a part, all have the model."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(make_model())
    plain(path, model, ZeroRedundancyOptimizer(model.parameters(), optim.SGD, lr=0.1, momentum=0.9))


def fsdp(path: str) -> None:
    """Every way of sharding, one after the other; prints by what each was refused."""
    for kind, wrap in FSDP.items():
        try:
            model = wrap(make_model())
            plain(f"{path}-{kind}", model, sgd(model))
            print(f"{kind}: recorded")
        except Exception as error:
            print(f"{kind}: {type(error).__name__}: {error}")


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def one_layer(model: nn.Sequential) -> nn.Module:
    model[0] = sharded(model[0], use_orig_params=True)
    return model


def taken_off(model: nn.Sequential) -> nn.Module:
    wrapped = sharded(model, use_orig_params=True)
    inner = wrapped.module
    assert isinstance(inner, nn.Module)
    return inner


def second_version(model: nn.Sequential) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    return model


FSDP: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "original": lambda model: sharded(model, use_orig_params=True),
    "flat": sharded,
    "one-layer": one_layer,
    "taken-off": taken_off,
    "second": second_version,
}


def accelerate(path: str) -> None:
    from accelerate import Accelerator

    from capture.integrations.accelerate import record

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    assert accelerator.num_processes == RANKS
    model = make_model()
    loader = DataLoader(TensorDataset(all_inputs()), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, sgd(model), loader)
    with record(accelerator, path, model, optimizer, every=1) as recorder:
        for (x,) in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                if accelerator.sync_gradients:
                    recorder.clip_grad_norm_(CLIP)
                optimizer.step()
                optimizer.zero_grad()
    assert recorder.step == STEPS // ACCUMULATED
    assert recorder.complete == accelerator.is_main_process


def lightning(path: str) -> None:
    import lightning.pytorch as pl

    from capture.integrations.lightning import RecorderCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> optim.Optimizer:
            return sgd(self)

    class InOrder(torch.utils.data.Sampler[int]):
        """The samples of this rank; Lightning's own sampler would shuffle them."""

        def __iter__(self) -> Any:
            rank = distributed.get_rank()
            for step in range(STEPS):
                first = (step * RANKS + rank) * BATCH
                yield from range(first, first + BATCH)

        def __len__(self) -> int:
            return STEPS * BATCH

    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[RecorderCallback(path, every=1, clipped=False)],
    )
    loader = DataLoader(TensorDataset(all_inputs()), batch_size=BATCH, sampler=InOrder())
    trainer.fit(Module(), loader)


LOOPS = {"zero": zero, "fsdp": fsdp, "accelerate": accelerate, "lightning": lightning}


def main(loop: str, path: str) -> None:
    if loop not in ("zero", "fsdp"):
        LOOPS[loop](path)
        return
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        LOOPS[loop](path)
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
