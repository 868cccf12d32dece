"""A real dask.distributed cluster in trouble: certificates, lost workers, other versions."""

import datetime
import http.server
import ipaddress
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from distributed import Client, LocalCluster, Security

from analyze import cluster as module
from analyze import schedulers
from analyze.compute import Moments, compute_moments
from analyze.references import parse_reference
from analyze.schedulers import Cluster
from capture.store import InputError, MismatchError, StraightwayError, UsageError
from tests.analyze.small_runs import random_streams, same_bytes, write_run

SIZES = (900_000, 3, 400_000)
OPTIONS: dict[str, Any] = {"threads_per_worker": 1, "dashboard_address": ":0"}


def measure(run: str | Path, **options: Any) -> Moments:
    references = [parse_reference(text) for text in ("final", "mean:2")]
    return compute_moments(run, ["weights", "minibatch"], references, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two inner chunks of the real size, which other processes read as well."""
    streams = random_streams(sum(SIZES), rows=4)
    del streams["updates"], streams["fixed"]
    return write_run(tmp_path_factory.mktemp("cluster") / "run.zarr", SIZES, streams)


@contextmanager
def started(*, workers: int, folder: Path | None = None) -> Iterator[tuple[str, list[int]]]:
    """A scheduler and workers as a user starts them, in `folder`: its address and their ids."""
    program = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    here = folder or Path.cwd()
    note = here / f"scheduler-{time.monotonic_ns()}.json"
    program += ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(note)]
    processes = [subprocess.Popen(program, **quiet)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--no-nanny", "--no-dashboard"]
    worker += ["--nthreads", "1", "--scheduler-file", str(note)]
    environment = {**os.environ, "PYTHONPATH": path}
    for _ in range(workers):
        processes.append(subprocess.Popen(worker, cwd=folder, env=environment, **quiet))
    try:
        with Client(scheduler_file=str(note), timeout=20, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=20)
            address = client.scheduler.address
        yield address, [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        note.unlink(missing_ok=True)


# Certificates ---------------------------------------------------------------------------------


def write_certificate(folder: Path, name: str, signer: Any = None) -> tuple[Any, Any]:
    """Write `name`.pem and `name`.key, signed by `signer` or by itself, for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    authority, signing = signer or (None, key)
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.subject if authority else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(signing, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(pem))
    (folder / f"{name}.key").write_bytes(private)
    return certificate, key


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority, a certificate it signed, and one of somebody else."""
    folder = tmp_path_factory.mktemp("certificates")
    write_certificate(folder, "mine", write_certificate(folder, "ca"))
    write_certificate(folder, "stranger", write_certificate(folder, "other-ca"))
    return folder


@pytest.fixture(scope="module")
def secure(certificates: Path) -> Iterator[str]:
    """The address of a scheduler that talks only to holders of a certificate of `ca`."""
    mine = {"cert": str(certificates / "mine.pem"), "key": str(certificates / "mine.key")}
    sides = {
        f"tls_{side}_{k}": v for side in ("scheduler", "worker", "client") for k, v in mine.items()
    }
    security = Security(require_encryption=True, tls_ca_file=str(certificates / "ca.pem"), **sides)
    options = {**OPTIONS, "protocol": "tls://", "security": security, "host": "127.0.0.1"}
    with LocalCluster(n_workers=1, processes=True, **options) as cluster:
        yield cluster.scheduler_address


def holder(address: str, folder: Path, name: str, ca: str = "ca") -> Cluster:
    parts = (folder / f"{ca}.pem", folder / f"{name}.pem", folder / f"{name}.key")
    return Cluster(address, *map(str, parts))


def test_a_holder_of_a_certificate_gets_the_same_bytes(
    run: Path, secure: str, certificates: Path
) -> None:
    assert secure.startswith("tls://")
    there = measure(run, scheduler=holder(secure, certificates, "mine"))
    assert same_bytes(there, measure(run))
    files = [(certificates / name).read_text() for name in ("ca.pem", "mine.pem", "mine.key")]
    assert same_bytes(measure(run, scheduler=Cluster(secure, *files)), there)


@pytest.mark.parametrize(("name", "ca"), [("stranger", "ca"), ("mine", "other-ca")])
def test_strangers_are_refused_in_one_line(
    run: Path, secure: str, certificates: Path, monkeypatch: Any, name: str, ca: str
) -> None:
    monkeypatch.setattr(module, "_CONNECT_SECONDS", 1)
    with pytest.raises(InputError, match=r"no Dask scheduler answers: tls://.*check its certific"):
        measure(run, scheduler=holder(secure, certificates, name, ca))


def test_nonsense_about_certificates_is_a_usage_error(run: Path, certificates: Path) -> None:
    ca = str(certificates / "ca.pem")
    for cluster, words in (
        ("tls://127.0.0.1:9", "needs certificates"),
        (Cluster("tls://127.0.0.1:9", ca), "certificate, key is missing"),
        (Cluster("tls://127.0.0.1:9", ca, ca, "nowhere.key"), "no such key file: nowhere.key"),
        (Cluster("tcp://127.0.0.1:9", ca, ca, ca), "certificates are for tls://"),
        (Cluster("threads", ca, ca, ca), "certificates are for tls://"),
    ):
        with pytest.raises(UsageError, match=words):
            measure(run, scheduler=cluster)


# Lost workers and schedulers ------------------------------------------------------------------


def test_a_killed_worker_changes_no_byte(run: Path, tmp_path: Path) -> None:
    with started(workers=2, folder=tmp_path) as (address, processes):

        def kill(done: int, total: int) -> None:
            if done == 1:
                psutil.Process(processes[-1]).kill()

        there = measure(run, scheduler=address, rows_per_block=1, progress=kill)
        with Client(address, set_as_default=False) as client:
            assert len(client.nthreads()) == 1
    assert same_bytes(there, measure(run))


def test_a_block_that_kills_every_worker_is_one_line() -> None:
    with (
        LocalCluster(n_workers=1, processes=True, **OPTIONS) as cluster,
        pytest.raises(StraightwayError, match="died over the same block several times") as caught,
    ):
        schedulers.run([lambda: os._exit(1)], cluster.scheduler_address, 1)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_without_workers_it_says_so_and_ends_in_one_line(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "_WORKER_SECONDS", 2)
    monkeypatch.setattr(module, "_TELL_SECONDS", 0.5)
    with started(workers=1, folder=tmp_path) as (address, processes):

        def kill(done: int, total: int) -> None:
            if done == 1:
                psutil.Process(processes[-1]).kill()

        for progress in (kill, None):  # lost on the way, and none from the start
            with pytest.raises(StraightwayError, match="has had no worker for 2 seconds: tcp://"):
                measure(run, scheduler=address, rows_per_block=1, progress=progress)
            (record,) = caplog.records  # nothing of Dask's
            expected = f"no workers are there: waiting for one, at most 1 seconds more: {address}"
            assert (record.name, record.getMessage()) == ("analyze", expected)
            caplog.clear()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "address",
    [
        *("tcp://::::", "tcp://", "tcp://host", "tcp://host:0", "tcp://host:99999", "tls://:8786"),
        *("tcp://[::1:8786", "http://host:8786", "tcp://host:8786/x", "tcp://me@host:1", "://", ""),
    ],
)
def test_what_is_no_address_is_refused_at_once(run: Path, address: str) -> None:
    for scheduler in (address, Cluster(address)):
        with pytest.raises(UsageError, match="is no scheduler; use threads, or an address like"):
            measure(run, scheduler=scheduler)


def test_another_kind_of_server_is_no_scheduler(run: Path, monkeypatch: Any) -> None:
    """A web server, to whose greeting Dask would listen for ever."""
    monkeypatch.setattr(module, "_CONNECT_SECONDS", 1)
    handler = http.server.SimpleHTTPRequestHandler
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.server_port}"
        with pytest.raises(InputError, match="no Dask scheduler answers"):
            compute_moments(run, ["minibatch"], [parse_reference("final")], scheduler=address)
        server.shutdown()


def test_a_scheduler_that_goes_away_is_one_line(run: Path, tmp_path: Path) -> None:
    with started(workers=1, folder=tmp_path) as (address, processes):

        def kill(done: int, total: int) -> None:
            if done == 1:
                psutil.Process(processes[0]).kill()

        with pytest.raises(StraightwayError, match="scheduler of the cluster went away: tcp://"):
            measure(run, scheduler=address, rows_per_block=1, progress=kill)


# What workers see -----------------------------------------------------------------------------


def test_workers_that_see_something_else_say_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A path that means something else to each process, like a folder of each machine's own.
    monkeypatch.chdir(run.parent)
    path = "/proc/self/cwd/run.zarr"
    with started(workers=1, folder=tmp_path) as (address, _):
        with pytest.raises(InputError, match=f"the worker on .* does not see .*: {path}; put run"):
            measure(path, scheduler=address)
        other = random_streams(sum(SIZES), rows=4, seed=1)
        write_run(tmp_path / "run.zarr", SIZES, {k: other[k] for k in ("weights", "minibatch")})
        with pytest.raises(MismatchError, match=f"another run, or an older state of it: {path}"):
            measure(path, scheduler=address)
        shutil.rmtree(tmp_path / "run.zarr")
        shutil.copytree(run, tmp_path / "run.zarr")
        assert same_bytes(measure(path, scheduler=address), measure(path))


def test_a_worker_of_another_version_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(workers=1, folder=tmp_path) as (address, _):
        monkeypatch.setattr(module, "__version__", "9.9.9")
        with pytest.raises(MismatchError, match=r"the scheduler has straightway .*: tcp://"):
            measure(run, scheduler=address)
        # One that came later and was not asked.
        monkeypatch.setattr(module, "_check_versions", lambda client: None)
        with pytest.raises(MismatchError, match=r"the worker on .* has straightway .*; install 9"):
            measure(run, scheduler=address)


def test_a_worker_without_this_package_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "analyze.py").write_text("raise ImportError('no straightway here')\n")
    with (
        started(workers=1, folder=tmp_path) as (address, _),
        pytest.raises(
            MismatchError, match=r"a worker says: no straightway here: tcp://.*; install"
        ),
    ):
        measure(run, scheduler=address)


def test_workers_need_no_torch(run: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')\n")
    with started(workers=1, folder=tmp_path) as (address, _):
        there = measure(run, scheduler=address)
        with Client(address, set_as_default=False) as client:
            loaded = client.run(lambda: "torch" in sys.modules)
            with pytest.raises(ImportError, match="torch was imported"):
                client.run(__import__, "torch")
    assert same_bytes(there, measure(run))
    assert list(loaded.values()) == [False]


# Interrupted ----------------------------------------------------------------------------------

# `analyze compute` that gets a signal when two blocks are done.
INTERRUPTED = """
import contextlib, os, sys
from analyze import cli
from analyze.commands import measure
signum = int(sys.argv.pop(1))
@contextlib.contextmanager
def progress(run):
    yield lambda done, total: done == 2 and os.kill(os.getpid(), signum)
measure.progress_of = progress
cli.main()
"""


def interrupt(
    signum: int, run: Path, folder: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    temporary = folder / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-c", INTERRUPTED, str(int(signum)), "compute", str(run), *options]
    command += [
        "--reference",
        "final",
        "--reference",
        "mean:2",
        "--no-cache",
        "--out",
        "table.parquet",
    ]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert [path.name for path in folder.rglob("*")] == ["tmp"]
    return done


@pytest.mark.parametrize(
    ("signum", "code", "words"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_on_threads_leaves_nothing(
    run: Path, tmp_path: Path, signum: int, code: int, words: str
) -> None:
    done = interrupt(signum, run, tmp_path, "--workers", "2")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"error: {words}\n")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_on_a_cluster_leaves_nothing(
    run: Path, tmp_path: Path, signum: int, code: int
) -> None:
    with LocalCluster(n_workers=1, processes=True, **OPTIONS) as cluster:
        address = cluster.scheduler_address
        done = interrupt(signum, run, tmp_path, "--scheduler", address, "--workers", "9")
        assert done.returncode == code
        assert len(done.stderr.splitlines()) == 1
        deadline = time.monotonic() + 10
        while cluster.scheduler.tasks and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not cluster.scheduler.tasks
