"""WikiText-2 is fetched where it is missing, left where it is there, and counted."""

from __future__ import annotations

import runpy
import sys
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

SCRIPT = Path(__file__).parents[2] / "data" / "wikitext2" / "prepare.py"
TEXTS = {"train": " a b <unk> \n \n a c \n", "valid": " a \n", "test": " b c \n"}
COUNTS = [
    "train: 3 lines, 8 tokens",
    "valid: 1 lines, 2 tokens",
    "test: 1 lines, 3 tokens",
    "vocabulary: 5 words with <eos>",
    "these are not the published counts",
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def site(tmp_path):
    """The address of a server with an archive of small texts."""
    folder = tmp_path / "site"
    folder.mkdir()
    with zipfile.ZipFile(folder / "small.zip", "w") as archive:
        for split, text in TEXTS.items():
            archive.writestr(f"wikitext-2/wiki.{split}.tokens", text)
    with zipfile.ZipFile(folder / "half.zip", "w") as archive:
        archive.writestr("train.txt", TEXTS["train"])
    handler = partial(Quiet, directory=folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the script with arguments; return its exit code, lines and errors."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        captured = capsys.readouterr()
        return ended.value.code, captured.out.splitlines(), captured.err

    return call


def test_what_is_missing_is_fetched_and_counted(site, tmp_path, run):
    root = tmp_path / "new" / "root"
    assert run("--root", root, "--url", f"{site}/small.zip") == (0, COUNTS, "")
    assert sorted(path.name for path in root.iterdir()) == (
        ["wiki.test.tokens", "wiki.train.tokens", "wiki.valid.tokens"]
    )
    # Now nothing is asked of the server, which has no such file.
    assert run("--root", root, "--url", f"{site}/nothing.zip") == (0, COUNTS, "")


def test_an_archive_without_the_texts_says_what_it_lacks(site, tmp_path, run):
    code, lines, error = run("--root", tmp_path / "root", "--url", f"{site}/half.zip")
    assert (code, lines) == (3, [])
    assert error.startswith("error: in this archive, neither valid.txt nor wiki.valid.tokens is")
    assert f"{site}/half.zip; give another --url" in error
    code, _, error = run("--root", tmp_path / "root", "--url", f"{site}/nothing.zip")
    assert code == 3
    assert "404" in error


def test_the_real_texts_have_the_published_counts(data_root, run):
    code, lines, error = run("--root", data_root / "wikitext-2")
    assert (code, error) == (0, "")
    assert lines[:2] == [
        "train: 36,718 lines, 2,088,628 tokens",
        "valid: 3,760 lines, 217,646 tokens",
    ]
    assert lines[2:] == [
        "test: 4,358 lines, 245,569 tokens",
        "vocabulary: 33,278 words with <eos>",
        "these are the published counts",
    ]
