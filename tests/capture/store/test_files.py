"""Durable writes, confined reads, the lock."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from capture.store import DamagedError, InputError, LockedError, WriteError
from capture.store.errors import StraightwayError
from capture.store.files import (
    DIRECT_BLOCK,
    DIRECT_BYTES,
    Lock,
    make_folders,
    open_confined,
    read_confined,
    remove,
    write_all,
    write_durably,
    writing,
)


def test_a_file_is_replaced_in_full_and_leaves_nothing_beside_it(tmp_path):
    write_durably(tmp_path / "file", b"first", tmp_path)
    write_durably(tmp_path / "file", b"second", tmp_path)
    assert (tmp_path / "file").read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["file"]


def test_the_order_is_write_sync_rename_sync_folder(tmp_path, monkeypatch):
    calls = []
    for name in ("write", "fsync", "rename"):
        real = getattr(os, name)

        def noted(*args, name=name, real=real):
            folder = name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}")
            calls.append("sync folder" if folder else name)
            return real(*args)

        monkeypatch.setattr(os, name, noted)
    write_durably(tmp_path / "file", b"data", tmp_path)
    assert calls == ["write", "fsync", "rename", "sync folder"]


def test_a_system_that_takes_a_part_at_a_time_gets_all_of_it(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, view: real(descriptor, view[:3]))
    with open(tmp_path / "file", "wb") as file:
        write_all(file.fileno(), memoryview(b"0123456789"))
    assert (tmp_path / "file").read_bytes() == b"0123456789"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "no permission"),
        (errno.EIO, "the disk reported an error"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.ETXTBSY, os.strerror(errno.ETXTBSY)),
    ],
)
def test_what_the_system_refuses_is_one_line_with_a_remedy(tmp_path, number, words):
    with pytest.raises(WriteError, match=words) as caught, writing(tmp_path):
        raise OSError(number, os.strerror(number), "somewhere")
    assert caught.value.exit_code == 1
    assert caught.value.fix
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_path_is_printed_as_it_is():
    assert str(StraightwayError("gone", where="a  b", fix="do\nit")) == "gone: a  b; do it"


def test_a_folder_where_nobody_may_write(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(WriteError, match="no permission"):
        write_durably(closed / "file", b"", closed)


def test_new_folders_are_made_below_what_is_there(tmp_path):
    make_folders(tmp_path / "a/b/c", tmp_path)
    assert (tmp_path / "a/b/c").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="a part of the path is a file"):
        make_folders(tmp_path / "file/below", tmp_path)


def test_removing_a_link_leaves_what_it_leads_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove(tmp_path / "link")
    assert (tmp_path / "folder/file").exists()
    remove(tmp_path / "folder")
    remove(tmp_path / "folder")
    assert os.listdir(tmp_path) == []


def test_reading_below_a_root(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_bytes(b"data")
    assert read_confined(tmp_path, "a/file") == b"data"


@pytest.mark.parametrize(
    ("relative", "words"),
    [
        ("a/none", "missing"),
        ("none/file", "missing"),
        ("a", "not a regular file"),
        ("link", "symbolic link"),
        ("linked/file", "symbolic link"),
        ("a/file/below", "symbolic link or a file"),
        ("pipe", "not a regular file"),
        ("socket", "cannot be read"),
        ("../store/a/file", "names a file"),
        ("a/../a/file", "names a file"),
        ("/etc/passwd", "names a file"),
        ("a//file", "names a file"),
        ("a/fi\0le", "names a file"),
    ],
)
def test_nothing_leads_out_and_nothing_hangs(tmp_path, monkeypatch, relative, words):
    root = tmp_path / "store"
    (root / "a").mkdir(parents=True)
    (root / "a/file").write_bytes(b"data")
    (root / "link").symlink_to(root / "a/file")
    (root / "linked").symlink_to(root / "a")
    os.mkfifo(root / "pipe")
    monkeypatch.chdir(root)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        before = os.listdir("/proc/self/fd")
        with pytest.raises(DamagedError, match=words) as caught:
            open_confined(root, relative)
        assert os.listdir("/proc/self/fd") == before
    assert caught.value.fix


def test_too_many_open_files_is_not_called_damage(tmp_path, monkeypatch):
    (tmp_path / "file").touch()

    def refuse(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match="Too many open files") as caught:
        open_confined(tmp_path, "file")
    assert not isinstance(caught.value, DamagedError)


def test_one_lock_at_a_time(tmp_path):
    first = Lock(tmp_path / "lock")
    with pytest.raises(LockedError, match="another process is writing this run") as caught:
        Lock(tmp_path / "lock")
    assert caught.value.exit_code == 3
    first.release()
    first.release()
    Lock(tmp_path / "lock").release()


def test_a_released_lock_is_free_though_a_forked_worker_still_holds_the_file(tmp_path):
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from capture.store.files import Lock\n"
        "lock = Lock(Path(sys.argv[1]))\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    time.sleep(30)\n"
        "lock.release()\n"
        "Lock(Path(sys.argv[1])).release()\n"
        "os.kill(child, 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")], check=True, timeout=20)


def aligned(size: int) -> np.ndarray:
    """Random bytes that begin at a block, as staging buffers do."""
    block = np.random.default_rng(0).integers(0, 256, size + DIRECT_BLOCK, np.uint8)
    start = -block.ctypes.data % DIRECT_BLOCK
    return block[start : start + size]


@pytest.mark.parametrize("extra", [0, 1, DIRECT_BLOCK + 7])
def test_large_files_are_written_whole_past_the_cache(tmp_path: Path, extra: int) -> None:
    data = aligned(DIRECT_BYTES + extra)
    write_durably(tmp_path / "large", data, tmp_path)
    assert (tmp_path / "large").read_bytes() == data.tobytes()


@pytest.mark.parametrize("refused", [0, 2], ids=["at once", "in the midst"])
def test_a_file_system_without_direct_writes_gets_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    data, write, direct = aligned(DIRECT_BYTES + 5), os.write, []

    def refusing(descriptor: int, view: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            direct.append(len(view))
            if len(direct) > refused:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            view = view[:DIRECT_BLOCK]
        return write(descriptor, view)

    monkeypatch.setattr("capture.store.files.os.write", refusing)
    write_durably(tmp_path / "large", data, tmp_path)
    assert (tmp_path / "large").read_bytes() == data.tobytes()
    assert len(direct) == refused + 1


def test_a_disk_that_fills_up_past_the_cache_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, view: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("capture.store.files.os.write", full)
    with pytest.raises(WriteError, match="the disk is full"):
        write_durably(tmp_path / "large", aligned(DIRECT_BYTES), tmp_path)
    assert list(tmp_path.iterdir()) == []
