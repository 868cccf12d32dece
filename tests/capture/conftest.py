"""Servers on this machine, for what fetches."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest


class Quiet(SimpleHTTPRequestHandler):
    """Shows a folder and writes no log."""

    def log_message(self, *args):
        pass


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
