"""`verify_run` reads everything, counts it, and finds all that is wrong."""

from __future__ import annotations

from capture.store import open_run, verify_run


def test_a_sound_run_is_read_in_full(run_path):
    report = verify_run(run_path)
    assert report.sound
    # 5 rows of weights, 4 of minibatch, 4 times 2 of fixed.
    assert report.shards == 17
    assert report.scalars == 3
    shards = [path for path in run_path.rglob("c/**/0") if "value" in path.parts and path.is_file()]
    assert report.bytes == sum(path.stat().st_size for path in shards)


def test_all_damage_is_found_not_only_the_first(run_path):
    for shard in ("weights/value/c/1/0", "weights/value/c/3/0", "gradients/fixed/value/c/2/1/0"):
        (run_path / shard).unlink()
    (run_path / "scalars/loss/c/0").unlink()
    (run_path / "gradients/minibatch/value/.straightway/commits.jsonl").unlink()
    found = [str(problem) for problem in verify_run(run_path).problems]
    named = ["c/1/0", "c/3/0", "c/2/1/0", "scalars/loss", "minibatch"]
    assert len(found) == len(named)
    for part in named:
        assert any(part in message for message in found), part


def test_a_shard_of_another_step_is_found_though_its_line_agrees(sample, run_path):
    """A header that contradicts the log: bytes and log from two different runs of the writer."""
    stream = open_run(run_path).stream("weights")
    lines = stream.log_path.read_bytes()
    wrong = sample.create(run_path.parent / "wrong.zarr")
    staging = wrong.staging("weights")
    for step in (0, 1, 2, 3, 4):
        sample.fill(staging, step)
        wrong.commit("weights", staging, step=step + 10, epoch=step / 4)
    wrong.close()
    for row in range(5):
        source = run_path.parent / f"wrong.zarr/weights/value/c/{row}/0"
        (run_path / f"weights/value/c/{row}/0").write_bytes(source.read_bytes())
    assert stream.log_path.read_bytes() == lines
    problems = verify_run(run_path).problems
    assert len(problems) == 5
    assert all("header" in str(problem) for problem in problems)


def test_a_gradient_without_its_weights_is_found(sample, tmp_path):
    writer = sample.create(tmp_path / "run.zarr", streams={"minibatch": None})
    writer.commit("minibatch", writer.staging("minibatch"), step=5)
    writer.flush()
    writer.close()
    (problem,) = verify_run(tmp_path / "run.zarr").problems
    assert "'minibatch' has step 5, of which there are no weights" in str(problem)
