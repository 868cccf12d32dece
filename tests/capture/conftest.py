"""Servers on this machine, for what fetches."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from threading import Thread

import pytest


class Quiet(SimpleHTTPRequestHandler):
    """Shows a folder and writes no log."""

    def log_message(self, *args):
        pass


class Ranges(Quiet):
    """As `Quiet`, and gives parts of files, as a web server does."""

    def do_GET(self):
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
        if start >= len(data):
            self.send_error(416)
            return
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(data[start:stop])


@contextmanager
def serving(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def serve():
    """A function that starts a server with this handler and returns its address."""
    with ExitStack() as servers:
        yield lambda handler: servers.enter_context(serving(handler))


@pytest.fixture
def site(serve, tmp_path):
    """A folder and the address under which a server shows it."""
    folder = tmp_path / "site"
    folder.mkdir()
    return folder, serve(partial(Quiet, directory=folder))


class Proxy(BaseHTTPRequestHandler):
    """Passes requests on to a server, but for those that `fault` picks.

    `fault(method, path)` says ``busy`` (503), ``close`` (not passed on, no answer), ``lost``
    (passed on, no answer), ``cut`` (the connection ends within the body), ``short`` (half a body,
    as if it were all), ``flip`` (one bit changed), ``gone`` (404), or `None`. `seen` lists method,
    path, and bytes of the body of every answer.
    """

    protocol_version = "HTTP/1.1"
    server_port = 0
    fault = staticmethod(lambda method, path: None)
    seen = ()

    def pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = type(self).fault(self.command, self.path)
        if fault == "close":
            self.close_connection = True
            return
        if fault == "busy":
            self.answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        if fault == "gone":
            self.answer(404, {}, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        server = http.client.HTTPConnection("127.0.0.1", self.server_port)
        server.request(self.command, self.path, body, dict(self.headers))
        answer = server.getresponse()
        data = answer.read()
        server.close()
        if fault == "lost":
            self.close_connection = True
            return
        if fault == "short":
            data = data[: len(data) // 2]
        if fault == "flip" and len(data) >= 20:
            data = data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]
        self.answer(answer.status, dict(answer.getheaders()), data, cut=fault == "cut")

    def answer(self, status, headers, data, cut=False):
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.seen.append((self.command, self.path, len(data)))
        length = headers.get("Content-Length") if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on

    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def s3_port():
    """The port of an S3 server on this machine, a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, "moto's server ended"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "moto's server does not answer"
                time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


BUCKETS = count()


class Bucket:
    """An empty bucket: `address(name)` of a run in it, its objects, and a server in between."""

    def __init__(self, port, monkeypatch, serve):
        self.name = f"bucket-{next(BUCKETS)}"
        self._port, self._monkeypatch, self._serve = port, monkeypatch, serve
        self.use_endpoint(f"http://127.0.0.1:{port}")
        url = f"http://127.0.0.1:{port}/{self.name}"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=30).close()

    def use_endpoint(self, endpoint):
        from capture.store import object_store

        self._monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        object_store.connect.cache_clear()

    def place(self, key, name="run.zarr"):
        from capture.store.objects import ObjectPath

        return ObjectPath(self.address(name), key)

    def fail(self, fault):
        """From here on, let `fault(method, path)` pick what goes wrong; see `Proxy`.

        Returns the growing list of what was answered.
        """
        settings = {"server_port": self._port, "fault": staticmethod(fault), "seen": []}
        self.use_endpoint(self._serve(type("Faulty", (Proxy,), settings)))
        return settings["seen"]

    def heal(self):
        self.use_endpoint(f"http://127.0.0.1:{self._port}")

    def address(self, name="run.zarr"):
        return f"s3://{self.name}/{name}"

    def names(self, name="run.zarr"):
        return [place.key for place, _ in self.place("", name).below()]

    def files(self, name="run.zarr"):
        """Bytes of every object of a run by its path."""
        found = [place for place, _ in self.place("", name).below()]
        return {place.key: place.read_bytes() for place in found}


@pytest.fixture
def bucket(s3_port, monkeypatch, serve):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return Bucket(s3_port, monkeypatch, serve)
