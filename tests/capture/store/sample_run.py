"""A small run whose every value is known, for the tests of the store.

Also a program: ``sample_run.py PATH`` records the run and goes on where an earlier one was stopped;
``sample_run.py FOLDER --crash N`` dies at every N-th single call that changes the file system.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture.store import RunWriter, Staging, Tensor, TensorTable, open_run, verify_run
from capture.store import writer as writer_module
from capture.store.place import place_of

STREAMS: dict[str, int | None] = {"minibatch": None, "fixed": 2}

TABLE = TensorTable(
    parameters=(
        Tensor("conv.weight", (3, 2, 2, 2), "F32", 0),
        Tensor("scale", (), "F32", 1),
        Tensor("nothing", (0, 4), "F32", 0),
        Tensor("head.weight", (5, 3), "BF16", 0, ("tied.weight",)),
        Tensor("head.bias", (5,), "F16", 1),
    ),
    buffers=(
        Tensor("mask", (5,), "BOOL"),
        Tensor("bn.num_batches_tracked", (), "I64"),
        Tensor("bn.running_mean", (3,), "F32"),
        Tensor("ema", (2,), "BF16"),
    ),
    frozen=(Tensor("embedding", (2, 3), "BF16"),),
)
FROZEN = {"embedding": np.arange(12, dtype=np.uint8)}


def big_table(numel: int, dtype: str = "F32", buffers: bool = True) -> TensorTable:
    """Build a table of `numel` coordinates; float32 has several chunks from 1,048,577 on."""
    parameters = (Tensor("first", (numel - 10,), dtype, 0), Tensor("second", (2, 5), "F32", 0))
    return TensorTable(parameters, TABLE.buffers if buffers else ())


def values(table: TensorTable, stream: str, step: int, batch: int | None = None) -> NDArray[Any]:
    """The coordinates of one shard, value dtype [D], each one exact in the tensor's true dtype."""
    rng = np.random.default_rng([step, batch or 0, *stream.encode()])
    drawn = rng.integers(-127, 128, table.num_parameters) / 64.0
    out = drawn.astype(table.value_dtype)
    for tensor, start, stop in zip(
        table.parameters, table.offsets, table.offsets[1:], strict=False
    ):
        if tensor.dtype == table.value_dtype.name.replace("float", "F"):
            out[start:stop] /= 3  # bits that need the whole width
    return out


def buffer_bytes(table: TensorTable, step: int) -> dict[str, NDArray[np.uint8]]:
    """The raw bytes of every buffer at one step."""
    rng = np.random.default_rng(step)
    drawn = {tensor.name: rng.integers(0, 60, tensor.nbytes) for tensor in table.buffers}
    boolean = {tensor.name: tensor.dtype == "BOOL" for tensor in table.buffers}
    return {
        name: (data % 2 if boolean[name] else data).astype(np.uint8) for name, data in drawn.items()
    }


def fill(staging: Staging, step: int, batch: int | None = None) -> None:
    """Put the values of one shard into a staging buffer."""
    table, stream = staging.layout.table, staging.layout.stream
    staging.parameters[:] = values(table, stream, step, batch)
    known = buffer_bytes(table, step)
    for name, view in staging.buffers.items():
        view[:] = known[name]


def scalars(step: int) -> dict[str, Any]:
    """The every-step scalars of one update; `clip_factor` is first known at step 2."""
    late = {"clip_factor": 0.5} if step >= 2 else {}
    return {"loss": 1.0 / (step + 1), "by_tensor": np.array([step, -step, 0.5]), **late}


def write_steps(writer: RunWriter, first: int, last: int, streams: Any = STREAMS) -> None:
    """Record steps first..last-1: weights, all streams, scalars; step t is saved in row t."""
    for step in range(first, last):
        for stream, batches in {"weights": None, **streams}.items():
            for batch in [None] if batches is None else range(batches):
                staging = writer.staging(stream)
                fill(staging, step, batch)
                writer.commit(stream, staging, step=step, epoch=step / 4, batch=batch)
        writer.append_scalars(step, scalars(step))


def create(path: str | os.PathLike[str], table: TensorTable = TABLE, streams: Any = STREAMS) -> Any:
    """Create the run without any row."""
    frozen = FROZEN if table.frozen else {}
    attributes = {"config": {"lr": 0.1}, "seeds": {"seed": 0}}
    return RunWriter.create(path, table, streams=streams, attributes=attributes, frozen=frozen)


def finish(writer: RunWriter, steps: int) -> None:
    """Record w_T and mark the run complete."""
    staging = writer.staging("weights")
    fill(staging, steps)
    writer.commit("weights", staging, step=steps, epoch=steps / 4)
    writer.finish(steps)
    writer.close()


def record(
    path: str | os.PathLike[str],
    steps: int = 4,
    table: TensorTable = TABLE,
    streams: Any = STREAMS,
) -> None:
    """Record a whole run: rows for steps 0..steps-1, then w_T."""
    writer = create(path, table, streams)
    write_steps(writer, 0, steps, streams)
    finish(writer, steps)


def go_on(path: str | os.PathLike[str], steps: int) -> None:
    """Record a run, or go on with what is there of it from the first step that is not whole."""
    if not (place_of(path) / "zarr.json").exists():
        writer, done = create(path), 0
    else:
        writer = RunWriter.reopen(path, TABLE)
        run = open_run(path)
        if run.complete:
            writer.close()
            return
        rows = [len(stream) for stream in run.streams.values()]
        known = [len(run.scalar(name)) for name in run.scalar_names()]
        done = min([*rows, *known, steps]) if known else 0
        writer.truncate(done)
    write_steps(writer, done, steps)
    finish(writer, steps)


def differences(left: Path, right: Path) -> list[str]:
    """Paths below two folders that are not the same in both, empty folders included."""
    trees = [{path.relative_to(root): path for path in root.rglob("*")} for root in (left, right)]
    found = set(trees[0]) ^ set(trees[1])
    for name in set(trees[0]) & set(trees[1]):
        pair = [tree[name] for tree in trees]
        data = [path.read_bytes() if path.is_file() else None for path in pair]
        if data[0] != data[1]:
            found.add(name)
    return sorted(map(str, found))


def die_at(call: int) -> None:
    """From here on, let this process die just before its n-th change to the file system."""
    left = call

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                if function is real_write:
                    # A torn write: the first half arrives.
                    function(args[0], bytes(args[1])[: len(args[1]) // 2])
                os._exit(9)
            return function(*args, **options)

        return wrapped

    real_write = os.write
    for name in ("write", "fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate"):
        setattr(os, name, deadly(getattr(os, name)))


def crash_everywhere(folder: Path, stride: int) -> int:
    """Crash at every call of a short run; after each, check what is left and go on to the end.

    Return the number of calls tried.
    """
    writer_module.FLUSH_SECONDS = 0.0
    record(folder / "whole.zarr", 2)
    for call in range(0, 100_000, stride):
        path = folder / "crashed.zarr"
        child = os.fork()
        if child == 0:
            die_at(call)
            go_on(path, 2)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if (path / "zarr.json").exists():
            problems = verify_run(path).problems
            assert not problems, (call, problems)
        # Every second time the recovery is stopped as well.
        if call // stride % 2 == 0:
            if os.fork() == 0:
                die_at(call % 41)
                go_on(path, 2)
                os._exit(0)
            os.wait()
        go_on(path, 2)
        unequal = differences(folder / "whole.zarr", path)
        assert not unequal, (call, unequal)
        shutil.rmtree(path)
        if died == 0:
            return call // stride + 1
    raise AssertionError("the run never came to its end")


if __name__ == "__main__":
    if "--crash" in sys.argv:
        print(crash_everywhere(Path(sys.argv[1]), int(sys.argv[3])))
    else:
        writer_module.FLUSH_SECONDS = 0.01
        print("started", flush=True)
        go_on(sys.argv[1], int(sys.argv[2]))
