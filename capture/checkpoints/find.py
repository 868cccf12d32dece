"""Which files and folders are checkpoints.

In a folder these are the files `*.safetensors`, `*.pt`, `*.pth`, `*.bin` and `*.ckpt`, but for
those of optimizers and the like, and the folders in it that hold a model: as the Hugging Face
libraries write it, of `torch.distributed.checkpoint`, or a single such file. A link to one that is
listed anyway is left out. A folder that is itself a checkpoint, or a file, may be named too.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path

from capture.checkpoints.contents import Contents, merged
from capture.checkpoints.huggingface import (
    FSDP_FOLDER,
    MODEL_FILES,
    is_model_name,
    model_parts,
    trainer_state,
)
from capture.checkpoints.safetensors_files import read_safetensors
from capture.checkpoints.steps import natural
from capture.store.errors import InputError, UsageError
from capture.store.objects import is_object_address

logger = logging.getLogger("capture")

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
SAFETENSORS, TORCH, DISTRIBUTED = "safetensors", "torch", "torch distributed"

# Folders that a training made for one checkpoint each, whatever else lies in them.
_NAMED = re.compile(r"(checkpoint|ckpt|global_?step|step|iter|iteration|epoch)[-_=.]?[0-9]+", re.I)
_SHARD = re.compile(r"-[0-9]+-of-[0-9]+$")
_FACTS = ("config.json", "trainer_state.json", "adapter_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found.

    `name` is what it is called below `path`'s folder, `parts` the files that hold the model (for
    `DISTRIBUTED` the folder itself), `step` and `epoch` what a `trainer_state.json` tells.
    """

    path: Path
    name: str
    format: str
    parts: tuple[Path, ...]
    step: int | None = None
    epoch: float | None = None

    @property
    def where(self) -> str:
        """Its path as text that can be printed on one line."""
        return printable(str(self.path))

    @property
    def files(self) -> list[Path]:
        """The files that hold the model, by name."""
        if self.format != DISTRIBUTED:
            return sorted(self.parts)
        return sorted(path for path in self.parts[0].iterdir() if path.is_file())

    def stamp(self) -> tuple[tuple[int, int], ...]:
        """Sizes and times of its files, to notice that they changed."""
        return tuple((s.st_size, s.st_mtime_ns) for s in map(os.stat, self.files))

    def digests(self) -> dict[str, str]:
        """Sha256 of each of its files by name, 64 hexadecimal digits."""
        found = {}
        for path in self.files:
            with open(path, "rb") as file:
                found[printable(path.name)] = file_digest(file, "sha256").hexdigest()
        return found

    def read(self, key: str | None) -> Contents:
        """Read what it holds; `key` says where in a file of torch the weights lie."""
        with reading(self.where):
            return merged(self._read(key), self.where)

    def _read(self, key: str | None) -> list[Contents]:
        if self.format == SAFETENSORS:
            return [read_safetensors(part, printable(str(part))) for part in self.parts]
        if self.format == DISTRIBUTED:
            require_torch()
            from capture.checkpoints.distributed import read_distributed

            return [read_distributed(self.parts[0], self.where, key)]
        require_torch()
        from capture.checkpoints.torch_files import read_torch_file

        return [read_torch_file(part, printable(str(part)), key) for part in self.parts]

    def check_records(self) -> None:
        """Compare the records of torch's zip files with their checksums; `DamagedError`."""
        if self.format == TORCH:
            from capture.checkpoints.torch_files import check_records

            for part in self.parts:
                check_records(part, printable(str(part)))


def find_checkpoints(sources: Sequence[str | os.PathLike[str]]) -> list[Checkpoint]:
    """List the checkpoints in `sources`, in the natural order of their names within each.

    Raises `InputError` where a source is not there, holds none, or leads to no ordinary file.
    """
    if not sources:
        raise UsageError("nothing to import", fix="name a folder of checkpoints")
    found: dict[str, Checkpoint] = {}
    for source in sources:
        where = printable(os.fspath(source))
        if is_object_address(os.fspath(source)):
            raise UsageError("checkpoints must lie on a disk", where=where, fix="fetch them first")
        with reading(where):
            for checkpoint in _in_source(Path(source), where):
                found.setdefault(os.path.realpath(checkpoint.path), checkpoint)
    return list(found.values())


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what the operating system refuses to read into an `InputError`."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot be read, {reason}", where=where) from error


def require_torch() -> None:
    """`UsageError` where torch is not installed, which safetensors files do without."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        fix = "pip install 'straightway[capture]'"
        raise UsageError("only safetensors can be imported without torch", fix=fix) from error


def printable(text: str) -> str:
    """Text for one line: what cannot be printed as its escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _in_source(source: Path, where: str) -> list[Checkpoint]:
    if not source.is_dir():
        return [_file(source)]
    folders = _in_folders(source)
    own = _model_folder(source)
    if own is not None:
        if folders:
            logger.warning(
                "%s: its own model is left out, since %d checkpoint folders lie in it",
                where,
                len(folders),
            )
        return folders or [own]
    found = sorted([*_in_files(source), *folders], key=lambda one: natural(one.name))
    if not found:
        raise InputError(
            "there are no checkpoints in this folder",
            where=where,
            fix=f"it should hold files {', '.join(SUFFIXES)}, or folders checkpoint-N",
        )
    return found


def _in_files(folder: Path) -> list[Checkpoint]:
    return [_file(path) for path in _without_links(_weights(folder))]


def _in_folders(folder: Path) -> list[Checkpoint]:
    inner = _without_links([path for path in folder.iterdir() if path.is_dir()])
    found = [(path, _model_folder(path)) for path in inner]
    for path, checkpoint in found:
        if checkpoint is None and re.fullmatch(r"checkpoint-[0-9]+", path.name):
            raise InputError(
                "no model is found in this checkpoint folder",
                where=printable(str(path)),
                fix=f"it should hold {', '.join(MODEL_FILES)} or a single file of weights",
            )
    checkpoints = [checkpoint for _, checkpoint in found if checkpoint is not None]
    return sorted(checkpoints, key=lambda one: natural(one.name))


def _weights(folder: Path) -> list[Path]:
    """The files of a folder that may hold a model."""
    return [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and is_model_name(path.name) and not path.is_dir()
    ]


def _without_links(paths: Sequence[Path]) -> list[Path]:
    """Leave out each link to another of them, such as `latest.pt`."""
    own = {os.path.realpath(path) for path in paths if not path.is_symlink()}
    return [path for path in paths if not path.is_symlink() or os.path.realpath(path) not in own]


def _file(path: Path) -> Checkpoint:
    where = printable(str(path))
    if not path.exists():
        is_link = path.is_symlink()
        what = "the link leads nowhere" if is_link else "no such file or folder"
        fix = "remove it" if is_link else "check the path"
        raise InputError(what, where=where, fix=fix)
    if not path.is_file():
        raise InputError("no ordinary file", where=where, fix="remove it, or name the others")
    if path.suffix.lower() not in SUFFIXES:
        fix = f"give a folder, or a file {', '.join(SUFFIXES)}"
        raise InputError("no checkpoint of a known kind", where=where, fix=fix)
    if _SHARD.search(path.stem):
        fix = "name its folder, with the index (….index.json) in it"
        raise InputError("this is one shard of a checkpoint", where=where, fix=fix)
    return Checkpoint(path, path.name, _format(path), (path,))


def _format(path: Path) -> str:
    return SAFETENSORS if path.suffix.lower() == ".safetensors" else TORCH


def _model_folder(folder: Path) -> Checkpoint | None:
    """The checkpoint that a folder is as a whole; `None` where it is none.

    That is a folder of `torch.distributed.checkpoint`, or one with a model as the Hugging Face
    libraries name it, or with a single file of weights. In the latter two it must be called like
    one (`checkpoint-N`), or tell of the model in a file beside it, or hold that model alone.
    """
    name = os.path.basename(os.path.abspath(folder))
    if name.startswith(".") or name.endswith(".zarr"):
        return None
    where = printable(str(folder))
    for place in (folder, folder / FSDP_FOLDER):
        if (place / ".metadata").is_file() and any(place.glob("*.distcp")):
            told = trainer_state(folder, where)
            return Checkpoint(folder, name, DISTRIBUTED, (place,), *told)
    weights = _weights(folder)
    known = model_parts(folder, where)
    is_one = _NAMED.match(name) or any((folder / fact).is_file() for fact in _FACTS)
    parts = known if known and (is_one or {*weights} <= {*known}) else []
    if not parts and is_one and len(weights) == 1:
        parts = weights
    if not parts:
        return None
    told = trainer_state(folder, where)
    return Checkpoint(folder, name, _format(parts[0]), tuple(parts), *told)
