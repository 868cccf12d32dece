"""Configuration files and flags, and the learning rate schedules and streams that they name."""

from __future__ import annotations

import json
import math

import pytest
import torch

from capture.config import TrainConfig, read_config
from capture.optimizers import build_optimizer, learning_rate
from capture.store.errors import UsageError
from capture.streams import StreamRequest, parse_streams

DIGITS = {"model": "mlp", "batch_size": 64, "epochs": 20}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_override_the_file_and_missing_flags_do_not(tmp_path):
    file = write(
        tmp_path / "run.toml",
        'task = "digits"\nlr = 1\nevery = 5\ngradients = ["minibatch", "updates"]\n'
        "[model_args]\nhidden = 32\n",
    )
    config = read_config(file, {"lr": 0.5, "seed": 7, "epochs": None})
    assert (config.lr, config.seed, config.epochs) == (0.5, 7, None)
    assert (config.every, config.gradients) == ("5", "minibatch,updates")
    assert config.model_args == {"hidden": 32}
    assert read_config(file).lr == 1.0
    assert isinstance(read_config(file).lr, float)


def test_a_completed_configuration_survives_json():
    config = read_config(flags={"task": "digits", "seed": 3}).completed(DIGITS)
    assert None not in [config.model, config.lr, config.momentum, config.data_seed, config.epochs]
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {"model": "mlp", "optimizer": "momentum", "lr": 0.01, "momentum": 0.9}),
        ({}, {"batch_size": 64, "epochs": 20, "max_steps": None, "every": "10"}),
        ({}, {"seed": 0, "data_seed": 0, "gradients": "minibatch"}),
        ({"seed": 4}, {"seed": 4, "data_seed": 4}),
        ({"seed": 4, "data_seed": 0}, {"seed": 4, "data_seed": 0}),
        ({"optimizer": "sgd"}, {"lr": 0.1, "momentum": None}),
        ({"optimizer": "nesterov", "momentum": 0.5}, {"lr": 0.01, "momentum": 0.5}),
        ({"optimizer": "adamw"}, {"lr": 0.001, "momentum": None}),
        ({"max_steps": 7}, {"max_steps": 7, "epochs": None}),
        ({"max_steps": 7, "epochs": 2}, {"max_steps": 7, "epochs": 2}),
    ],
)
def test_defaults_depend_on_the_task_the_optimizer_and_the_seed(flags, expected):
    config = read_config(flags={"task": "digits", **flags}).completed(DIGITS)
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("flags", "total"),
    [({}, 440), ({"epochs": 3}, 66), ({"max_steps": 7}, 7), ({"max_steps": 70, "epochs": 3}, 66)],
)
def test_the_shorter_of_epochs_and_max_steps_ends_the_training(flags, total):
    config = read_config(flags={"task": "digits", **flags}).completed(DIGITS)
    assert config.total_steps(22) == total


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("weight-decay = 0.1", "unknown key 'weight-decay'"),
        ("weight-decay = 0.1", "did you mean 'weight_decay'"),
        ("ephocs = 3", "did you mean 'epochs'"),
        ("banana = 3", "known are task, model"),
        ('lr = "fast"', "lr must be a number, found 'fast'"),
        ("epochs = 2.5", "epochs must be a whole number, found 2.5"),
        ("epochs = true", "epochs must be a whole number, found True"),
        ("epochs = 0", "epochs must be at least 1: epochs = 0"),
        ("lr = -0.1", "lr must be at least 0"),
        ("lr = nan", "lr must be at least 0"),
        ("width = 0", "width must be above 0"),
        ("momentum = 1", "momentum must be below 1"),
        ('optimizer = "momentun"', "did you mean 'momentum'"),
        ('optimizer = "lion"', "known are sgd, momentum"),
        ('optimizer = "sgd"\nmomentum = 0.9', "sgd takes no momentum"),
        ('device = "banana"', "known are auto, cpu, cuda"),
        ('gradients = "minibatch,minibatch"', "named twice: minibatch"),
        ('gradients = "fixd:10"', "no such gradient stream: 'fixd:10'; did you mean 'fixed'"),
        ("model_args = 3", "model_args must be a table, found 3"),
        ("lr = inf", "lr must be finite: lr = inf"),
        (f"lr = 1{'0' * 400}", "lr must be finite"),
        ("weight_decay = inf", "weight_decay must be finite"),
        ("width = inf", "width must be finite"),
        ("width = 1001", "width must be at most 1000"),
        (f"seed = {2**63}", "seed must be at most"),
        ("threads = 4097", "threads must be at most 4096"),
        ("workers = 1025", "workers must be at most 1024"),
        (f"epochs = {2**41}", "epochs must be at most"),
        ("[model_args]\nhidden = nan", "not JSON"),
        ("[task_args]\nday = 2020-01-01", "not JSON"),
        ("lr = ", "this is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_in_words(tmp_path, line, words):
    file = write(tmp_path / "run.toml", f'task = "digits"\n{line}\n')
    with pytest.raises(UsageError) as caught:
        read_config(file)
    assert words in str(caught.value)


def test_wrong_keys_name_the_file_and_a_missing_file_is_named(tmp_path):
    file = write(tmp_path / "run.toml", "ephocs = 3\n")
    with pytest.raises(UsageError, match=r"run\.toml"):
        read_config(file, {"task": "digits"})
    with pytest.raises(UsageError, match=r"No such file or directory: .*none\.toml"):
        read_config(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="no task is given; give --task"):
        read_config(flags={"lr": 0.1})


def test_a_training_without_an_end_is_refused():
    with pytest.raises(UsageError, match="give --epochs or --max-steps"):
        read_config(flags={"task": "other"}).completed({"model": "mlp"})


def test_the_difference_names_what_matters_for_the_result():
    config = read_config(flags={"task": "digits", "data_root": "here"})
    same = read_config(flags={"task": "digits", "data_root": "there", "workers": 2})
    other = read_config(flags={"task": "digits", "lr": 0.3, "seed": 1})
    assert config.difference(same) is None
    assert config.difference(other) == "lr was None and is now 0.3, seed was 0 and is now 1"


def rates(text, steps=100, per_epoch=10, base=2.0):
    rate = learning_rate(text, base, steps, per_epoch)
    return [rate(step) for step in range(steps)]


def test_warmup_cosine_rises_linearly_then_falls_as_a_cosine():
    values = rates("warmup-cosine:3")
    assert values[:30] == pytest.approx([2 * k / 31 for k in range(1, 31)])
    assert values[30] == 2.0
    assert values[65] == pytest.approx(1.0)  # half way between 30 and 100
    assert values[99] == pytest.approx(2 * math.sin(math.pi / 140) ** 2)
    assert rates("warmup-cosine")[10] == 2.0
    assert rates("warmup-cosine:0")[0] == 2.0


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("constant", {0: 2.0}),
        ("multistep", {0: 2.0, 50: 0.2, 75: 0.02}),
        ("multistep:2,7", {0: 2.0, 20: 0.2, 70: 0.02}),
        ("multistep:2.5:0.5", {0: 2.0, 25: 1.0}),
    ],
)
def test_multistep_changes_at_its_milestones_alone(text, changes):
    values = rates(text)
    found = {t: v for t, v in enumerate(values) if t == 0 or v != values[t - 1]}
    assert found == pytest.approx(changes)


def test_a_file_gives_the_rate_between_its_rows(tmp_path):
    file = write(tmp_path / "lr.csv", "step,lr,note\n10,1.0,a\n20,2.0,b\n50,0.5,c\n")
    values = rates(str(file))
    assert [values[t] for t in (0, 10, 15, 20, 35, 50, 99)] == [1, 1, 1.5, 2, 1.25, 0.5, 0.5]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "begins with the line step,lr"),
        ("step,lr\n", "has no rows"),
        ("step,lr\n1,x\n", "line 2"),
        ("step,lr\n1,0.1\n1,0.2\n", "line 3"),
        ("step,lr\n1,-0.1\n", "a rate of at least 0"),
        ("step,lr\n1,inf\n", "a rate of at least 0"),
        ("step,lr\n1,0.1,7\n", "expected 2 columns: .*line 2"),
        ("step,lr\n1\n", "expected 2 columns: .*line 2"),
        (f"step,lr\n{10**30},0.1\n", "an ascending step"),
    ],
)
def test_a_wrong_learning_rate_file_is_refused(tmp_path, text, words):
    with pytest.raises(UsageError, match=words):
        rates(str(write(tmp_path / "lr.csv", text)))


def test_a_learning_rate_file_may_begin_with_a_mark_but_not_be_binary(tmp_path):
    marked = tmp_path / "marked.csv"
    marked.write_text("step,lr\n0,0.5\n", encoding="utf-8-sig")
    assert rates(str(marked))[0] == 0.5
    for data in (b"\x80\x81\xff", b"step,lr\n0,\xff\n"):
        (tmp_path / "binary.csv").write_bytes(data)
        with pytest.raises(UsageError, match="the learning rate file cannot be read"):
            rates(str(tmp_path / "binary.csv"))


def test_no_streams_in_a_file_are_none(tmp_path):
    file = write(tmp_path / "run.toml", 'task = "digits"\ngradients = []\n')
    assert read_config(file).gradients == "none"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cosine", "did you mean 'warmup-cosine'"),
        ("none.csv", "there is no such file either"),
        ("multistep:a", "expected numbers, found 'a'"),
        ("multistep:-1", "at least 0"),
        ("warmup-cosine:1,2", "one number of warm-up epochs"),
        ("warmup-cosine:10", "does not end within the 100 steps"),
    ],
)
def test_a_wrong_learning_rate_schedule_is_refused(text, words):
    with pytest.raises(UsageError, match=words):
        rates(text)


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0, "nesterov": False, "weight_decay": 0.1}),
        ("momentum", torch.optim.SGD, {"momentum": 0.8, "nesterov": False, "weight_decay": 0.1}),
        ("nesterov", torch.optim.SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
        ("adam", torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.9, 0.999)}),
        ("adamw", torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.9, 0.999)}),
    ],
)
def test_each_optimizer_by_name(name, kind, settings):
    weights = [torch.nn.Parameter(torch.zeros(3))]
    optimizer = build_optimizer(weights, name, lr=0.5, momentum=0.8, weight_decay=0.1)
    group = optimizer.param_groups[0]
    assert type(optimizer) is kind
    assert group["lr"] == 0.5
    assert {key: group[key] for key in settings} == settings


def test_streams_are_split_on_commas_but_not_within_their_schedules():
    assert parse_streams("none") == ()
    assert parse_streams("minibatch, updates") == (
        StreamRequest("minibatch"),
        StreamRequest("updates"),
    )
    assert parse_streams("updates@bursts:51:1,2,5,minibatch") == (
        StreamRequest("updates", "bursts:51:1,2,5"),
        StreamRequest("minibatch"),
    )
    assert parse_streams("fixed:3,full:eval@epoch,heldout,shuffled-labels:2@every:100") == (
        StreamRequest("fixed", None, 3),
        StreamRequest("full-eval", "epoch"),
        StreamRequest("heldout", None, 10),
        StreamRequest("shuffled-labels", "every:100", 2),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("minibach", "did you mean 'minibatch'"),
        ("", "known are minibatch, updates, fixed,"),
        ("none,updates", "known are minibatch, updates, fixed,"),
        ("minibatch:3", "has one batch per step"),
        ("full:3", "has one batch per step"),
        ("fixed:0", "number of batches must be a whole number from 1"),
        ("updates@evry:3", "did you mean 'every'"),
    ],
)
def test_wrong_streams_are_refused(text, words):
    with pytest.raises(UsageError, match=words):
        parse_streams(text)
