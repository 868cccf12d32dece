"""Downloads against a server on this machine, and archives that lie."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zipfile
from http.server import BaseHTTPRequestHandler

import pytest

from capture.fetch import fetch, unpack
from capture.store.errors import InputError, UsageError, WriteError

CONTENT = bytes(range(256)) * 3000  # more than one chunk


class Truncating(BaseHTTPRequestHandler):
    """Promises 1000 bytes and sends 10."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 10)

    def log_message(self, *args):
        pass


@pytest.fixture
def address(site):
    """The address of a server of one file, `data.bin`."""
    folder, address = site
    (folder / "data.bin").write_bytes(CONTENT)
    return address


def test_a_file_arrives_whole_and_checked(address, tmp_path):
    target = tmp_path / "new" / "data.bin"
    sha256, md5 = (hashlib.new(name, CONTENT).hexdigest() for name in ("sha256", "md5"))
    assert fetch(f"{address}/data.bin", target, sha256, md5=md5.upper()) == target
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]


def test_a_file_on_this_machine_is_fetched_alike(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    fetch((tmp_path / "a").as_uri(), tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == CONTENT


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_a_wrong_checksum_leaves_what_was_there(address, tmp_path, kind):
    target = tmp_path / "out" / "data.bin"
    target.parent.mkdir()
    target.write_bytes(b"before")
    right = hashlib.new(kind, CONTENT).hexdigest()
    with pytest.raises(InputError, match=f"{kind} is {right}, expected 00: http.*another --url"):
        fetch(f"{address}/data.bin", target, **{kind: "00"})
    assert target.read_bytes() == b"before"
    assert list(target.parent.iterdir()) == [target]


def test_a_connection_that_ends_early_leaves_nothing(serve, tmp_path):
    with pytest.raises(InputError, match="ended after 10 of 1,000 bytes"):
        fetch(f"{serve(Truncating)}/data.bin", tmp_path / "data.bin")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_said_in_one_line(address, tmp_path):
    with pytest.raises(InputError, match=r"the server answers 404 .*: http.*/other; try again"):
        fetch(f"{address}/other", tmp_path / "x")
    with pytest.raises(InputError, match=r"cannot fetch \(.*refused"):
        fetch("http://127.0.0.1:1/x", tmp_path / "x")
    with pytest.raises(InputError, match=r"cannot fetch .*No such file"):
        fetch((tmp_path / "nothing").as_uri(), tmp_path / "x")
    for url in ("data.bin", "ftp://host/x", "http://[x"):
        with pytest.raises(UsageError, match="no address to fetch from"):
            fetch(url, tmp_path / "x")


def test_a_target_that_cannot_be_written(address, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"cannot write .*file/data\.bin; make room, or choose"):
        fetch(f"{address}/data.bin", tmp_path / "file" / "data.bin")


def make_tar(path, name, link=None):
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        if link is not None:
            member.type, member.linkname = tarfile.SYMTYPE, link
            archive.addfile(member)
        else:
            member.size = len(CONTENT)
            archive.addfile(member, io.BytesIO(CONTENT))


def make_zip(path, name):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, CONTENT)


def test_archives_unpack_into_their_folder(tmp_path):
    make_tar(tmp_path / "a.tar.gz", "tar/file")
    make_zip(tmp_path / "a.zip", "zip/file")
    (tmp_path / "gz-file.gz").write_bytes(gzip.compress(CONTENT))
    for name in ("a.tar.gz", "a.zip", "gz-file.gz"):
        unpack(tmp_path / name, tmp_path / "out")
    for name in ("tar/file", "zip/file", "gz-file"):
        assert (tmp_path / "out" / name).read_bytes() == CONTENT
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize("name", ["../escaped", "in/../../escaped", "{root}/escaped"])
def test_a_member_outside_of_the_folder_is_refused(tmp_path, name):
    make_zip(tmp_path / "a.zip", name.format(root=tmp_path))
    with pytest.raises(InputError, match=r"escaped', outside of its folder .*do not trust it"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    if not name.startswith("{"):  # tarfile strips the slash, and the member lands inside
        make_tar(tmp_path / "a.tar.gz", name)
        with pytest.raises(InputError, match="escaped', outside of its folder"):
            unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    assert not (tmp_path / "escaped").exists()


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    make_tar(tmp_path / "a.tar.gz", "link", link="../elsewhere")
    with pytest.raises(InputError, match="'link', outside of its folder"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip", "a.gz"])
def test_a_truncated_archive_is_damaged_input(tmp_path, name):
    path = tmp_path / name
    if name == "a.gz":
        path.write_bytes(gzip.compress(CONTENT))
    else:
        (make_zip if name == "a.zip" else make_tar)(path, "file")
    whole = path.read_bytes()
    # An empty file is a gzip of nothing.
    for length in (len(whole) // 2, *([0] if name != "a.gz" else [])):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"a damaged archive .*fetch it again"):
            unpack(path, tmp_path / "out")
    assert not (tmp_path / "out" / "a").exists()


def test_an_archive_of_another_kind_and_none_at_all(tmp_path):
    (tmp_path / "a.rar").touch()
    with pytest.raises(UsageError, match=r"known are \.zip, \.tar\.gz, \.gz"):
        unpack(tmp_path / "a.rar", tmp_path / "out")
    with pytest.raises(InputError, match="no such archive"):
        unpack(tmp_path / "b.zip", tmp_path / "out")
