"""Checkpoints that are damaged, or made to do harm: one line, no code of theirs, no run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from capture.checkpoints.find import Checkpoint
from capture.checkpoints.torch_files import check_records
from capture.importing import import_checkpoints
from capture.store import (
    DamagedError,
    InputError,
    RunWriter,
    StraightwayError,
    UsageError,
    open_run,
)

ROOT = Path(__file__).parents[2]


class Harm:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def refused(source: Path, words: str, kind: type[StraightwayError] = InputError) -> str:
    """The message with which an import is refused that leaves nothing behind."""
    out = source.parent / "run.zarr"
    with pytest.raises(kind, match=words) as error:
        import_checkpoints(source, out)
    assert not out.exists()
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


STATE = {"w": torch.arange(5000.0), "b": torch.ones(3)}


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path: Path, old: bool) -> None:
    mark = tmp_path / "mark"
    document = {"state_dict": STATE, "callbacks": Harm(mark)}
    path = tmp_path / "step_1.ckpt"
    torch.save(document, path, _use_new_zipfile_serialization=not old)
    message = refused(path, r"more than tensors, loading it would run posix\.mkdir")
    assert "step_1.ckpt" in message
    assert not mark.exists()
    # It would have run.
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step_1.pt"
    path.write_bytes(pickle.dumps(Harm(tmp_path / "mark")))
    refused(path, "more than tensors|torch cannot read")
    assert not (tmp_path / "mark").exists()


def test_a_whole_model_and_other_objects_are_refused_by_name(tmp_path: Path) -> None:
    import argparse

    path = tmp_path / "step_1.pt"
    torch.save(nn.Linear(2, 2), path)
    refused(path, r"would run torch\.nn\.modules\.linear\.Linear")
    torch.save({"state_dict": STATE, "hyper_parameters": argparse.Namespace(a=1)}, path)
    message = refused(path, r"would run argparse\.Namespace")
    assert message.endswith("if you trust it, load it yourself and save its state_dict alone")
    torch.save([torch.ones(2)], path)
    refused(path, "no named tensors in this file, it is no dict")
    torch.save({"a": {"b": 1}}, path)
    refused(path, "no named tensors in this file, its keys are a")


def test_old_versions_of_torch_are_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(STATE, tmp_path / "step_1.pt")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    refused(tmp_path / "step_1.pt", r"torch 2\.5\.1\+cpu may run code", UsageError)


def saved_by(kind: str, folder: Path) -> Path:
    folder.mkdir()
    if kind == "distributed":
        import torch.distributed.checkpoint as dcp

        dcp.save(STATE, checkpoint_id=folder / "step_1", no_dist=True)
        return folder / "step_1"
    path = folder / f"step_1.{kind}"
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "pt")
    return path


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")  # of the one who saves
@pytest.mark.parametrize("kind", ["pt", "pth", "safetensors", "distributed"])
@pytest.mark.parametrize("share", [0, 0.001, 0.03, 0.5, 0.99])
def test_files_that_are_cut_off(tmp_path: Path, kind: str, share: float) -> None:
    source = saved_by(kind, tmp_path / "kept")
    files = [source] if source.is_file() else sorted(source.iterdir())
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * share)])
        refused(source, "cannot|cut off|promises|no named|smaller|checkpoints in this")
        file.write_bytes(whole)
    import_checkpoints(source, tmp_path / "whole.zarr")


def test_a_flipped_bit_in_a_zip_of_torch_is_noticed(tmp_path: Path) -> None:
    path = saved_by("pt", tmp_path / "kept")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert not torch.equal(torch.load(path)["w"], STATE["w"]), "torch itself does not notice"
    refused(path, "its record '.*data/0' does not match its checksum", DamagedError)


def test_checksums_that_were_switched_off_are_no_damage(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved_by("pt", tmp_path / "kept")
    finally:
        torch.serialization.set_crc32_options(True)
    check_records(path, str(path))
    import_checkpoints(path, tmp_path / "run.zarr")
    assert open_run(tmp_path / "run.zarr").stream("weights").read(0)[4999] == 4999


def test_headers_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "step_1.safetensors"
    for document, words in (
        ({"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}, "do not fit its shape"),
        ({"w": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, "'w' is a tensor of F4"),
        ({"w": 3}, "cannot be read"),
        ([], "cannot be read"),
        ({"__straightway__.x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "keeps"),
        ({"\udcff": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "keeps for itself"),
    ):
        header = json.dumps(document).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
        refused(path, words)


# Folders of torch.distributed.checkpoint.


@pytest.fixture
def distributed(tmp_path: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "step_1"
    with pytest.warns(UserWarning, match="torch.distributed is"):
        dcp.save({"model": STATE}, checkpoint_id=folder, no_dist=True)
    return folder


def test_metadata_that_run_code_are_refused_and_nothing_runs(distributed: Path) -> None:
    metadata = pickle.loads((distributed / ".metadata").read_bytes())
    metadata.planner_data = Harm(distributed / "mark")
    (distributed / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(distributed, r"more than that, loading them would run posix\.mkdir")
    assert not (distributed / "mark").exists()
    # Torch's own reader runs it.
    torch.distributed.checkpoint.FileSystemReader(distributed).read_metadata()
    assert (distributed / "mark").exists()


def test_metadata_that_lead_elsewhere_are_refused(distributed: Path) -> None:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    metadata = pickle.loads((distributed / ".metadata").read_bytes())
    shutil.copy(distributed / "__0_0.distcp", distributed.parent / "secret")
    for name in ("../secret", str(distributed.parent / "secret"), "none.distcp"):
        metadata.storage_data = {
            key: _StorageInfo(name, info.offset, info.length)
            for key, info in metadata.storage_data.items()
        }
        (distributed / ".metadata").write_bytes(pickle.dumps(metadata))
        refused(distributed, "that is not in the folder")
    for other in (3, "x", {"state_dict_metadata": {}}):
        (distributed / ".metadata").write_bytes(pickle.dumps(other))
        refused(distributed, "are not those of torch")


def test_shards_that_run_code_are_refused_and_nothing_runs(distributed: Path) -> None:
    mark = distributed / "mark"
    shard = distributed / "__0_0.distcp"
    evil = distributed.parent / "evil.pt"
    torch.save(Harm(mark), evil)
    data = evil.read_bytes()
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    metadata = pickle.loads((distributed / ".metadata").read_bytes())
    metadata.storage_data = {
        key: _StorageInfo(shard.name, 0, len(data)) for key in metadata.storage_data
    }
    shard.write_bytes(data)
    (distributed / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(distributed, "torch cannot read this checkpoint")
    assert not mark.exists()


# Folders of Hugging Face.


def test_an_index_that_leads_elsewhere_or_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    save_file(STATE, tmp_path / "secret.safetensors")
    for weight_map, words in (
        ({"w": "../secret.safetensors"}, "which is not in its folder"),
        ({"w": "none.safetensors"}, "which is missing"),
        ({"w": 3}, "which is not in its folder"),
        ({}, "lists no files"),
        ([], "lists no files"),
    ):
        text = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
        refused(folder, words)
    (folder / "model.safetensors.index.json").write_text("{")
    refused(folder, "is no JSON")
    for name in ("a.safetensors", "b.safetensors"):
        save_file(STATE, folder / name)
    text = json.dumps({"weight_map": {"w": "a.safetensors", "b": "b.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "two of its files hold 'b'|two of its files hold 'w'")


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    save_file(STATE, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    refused(folder, "the model is quantised")


# Names and files that change.


def test_names_with_newlines_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "a\nb"
    folder.mkdir()
    odd = os.fsencode(folder) + b"/x\xff\n_1.pt"
    torch.save(STATE, os.fsdecode(odd))
    code = "from capture.cli import main; main(prog_name='capture')"
    command = [sys.executable, "-c", code, "import", str(folder), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert r"a\nb/x\udcff\n_1.pt" in done.stdout
    import_checkpoints(folder, tmp_path / "run.zarr")
    (entry,) = open_run(tmp_path / "run.zarr").attributes["imported"]["checkpoints"]
    assert entry["source"].endswith(r"a\nb/x\udcff\n_1.pt")


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept/step_1.safetensors"
    path.parent.mkdir()
    save_file(STATE, path)
    digests = Checkpoint.digests

    def saving(self: Checkpoint) -> dict[str, str]:
        found = digests(self)
        save_file({**STATE, "b": torch.zeros(3)}, path)
        return found

    monkeypatch.setattr(Checkpoint, "digests", saving)
    refused(path.parent, "the file changed while it was imported")


def test_a_file_that_goes_away_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(3):
        (tmp_path / "kept").mkdir(exist_ok=True)
        torch.save({"w": torch.full((4,), float(step))}, tmp_path / f"kept/step_{step}.pt")
    commit = RunWriter.commit

    def tidying(self: RunWriter, *arguments: Any, **more: Any) -> int:
        (tmp_path / "kept/step_2.pt").unlink(missing_ok=True)
        return commit(self, *arguments, **more)

    monkeypatch.setattr(RunWriter, "commit", tidying)
    refused(tmp_path / "kept", r"cannot be read, no such file or directory: .*step_2\.pt")


def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "kept/step_1.pt"
    path.parent.mkdir()
    torch.save(STATE, path)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    refused(path.parent, "cannot be read, permission denied")


def test_two_imports_at_once_make_one_run(tmp_path: Path) -> None:
    for step in range(3):
        torch.save({"w": torch.full((4,), float(step))}, tmp_path / f"step_{step}.pt")
    errors: list[Any] = []

    def go() -> None:
        try:
            import_checkpoints(tmp_path, tmp_path / "run.zarr")
        except StraightwayError as error:
            errors.append(error)

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 3
    assert open_run(tmp_path / "run.zarr").complete
