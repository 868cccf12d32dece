"""The tasks on text against the text itself: windows, vocabularies, the slips of the paper's."""

from __future__ import annotations

import difflib
import hashlib
import heapq
import inspect
import pickle
import sys
from itertools import chain

import pytest
import torch

from capture.config import read_config
from capture.models import build_model
from capture.store.errors import InputError, UsageError
from capture.tasks import build_task
from capture.tasks.language import windows
from capture.tasks.stdlib_text import KNOWN_DIGEST
from capture.tasks.wikitext2 import cut_words, find_split, read_text, split_words
from capture.train import train

TRAIN = ' \n the cat sat on the <unk> . \n \n The dog \'s " cat " sat . \n' * 20
VALID = " the horse sat . \n the cat \n"


@pytest.fixture
def folder(tmp_path):
    """A folder with a small text in the files of WikiText-2."""
    for split, text in {"train": TRAIN, "valid": VALID, "test": VALID}.items():
        (tmp_path / f"{split}.txt").write_text(text)
    return tmp_path


def wikitext2(folder, **task_args):
    return build_task("wikitext2", data_root=str(folder), task_args=task_args)


def test_windows_hold_every_token_once_as_a_target():
    inputs, targets = windows(list(range(100, 123)), 5).tensors
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist()[1] == [105, 106, 107, 108, 109]
    assert targets.flatten().tolist() == list(range(101, 121))
    assert torch.equal(inputs + 1, targets)
    assert len(windows([1, 2, 3, 4, 5], 5)) == 0
    assert len(windows([1, 2, 3, 4, 5, 6], 5)) == 1
    assert len(windows([], 5)) == 0


def test_corrected_windows_spell_the_text(folder):
    task = wikitext2(folder, window=3)
    stream = list(chain.from_iterable([*line.split(), "<eos>"] for line in TRAIN.split("\n")[:-1]))
    words = list(dict.fromkeys(stream))
    assert task.model_args == {"vocabulary": len(words), "literal": False}
    inputs, targets = task.train.tensors
    assert [words[index] for index in inputs.flatten()] == stream[: inputs.numel()]
    assert [words[index] for index in targets.flatten()] == stream[1 : inputs.numel() + 1]
    heldout = ["the", "<unk>", "sat", ".", "<eos>", "the"]  # of eight tokens
    assert [words[index] for index in task.heldout.tensors[0].flatten()] == heldout


def test_paper_literal_repeats_the_slips(folder):
    task = wikitext2(folder, variant="paper-literal", window=4)
    words = ["<unk>", "<pad>", "the", "cat", "sat", "on", ".", "dog", "'", "s"]
    inputs, targets = task.train.tensors
    rows = torch.cat([inputs, targets[:, -1:]], 1)
    # Empty lines are gone, and of the others the first five tokens are left.
    assert rows.shape == (40, 5)
    assert [words[index] for index in rows[0]] == ["the", "cat", "sat", "on", "the"]
    assert [words[index] for index in rows[1]] == ["the", "dog", "'", "s", "cat"]
    heldout = task.heldout.tensors[1]
    assert [words[index] for index in heldout[1]] == ["cat", "<pad>", "<pad>", "<pad>"]
    # The output layer counts other words: "The" and <eos> among them, no <pad>.
    assert task.model_args == {"vocabulary": len(set(TRAIN.split())) + 1, "literal": True}
    # Pads enter the loss: it is the mean over every position.
    batch = [tensor[:2] for tensor in task.heldout.tensors]
    model = build_model("transformer", task.model_args, model_args={"layers": 1}).eval()
    picked = model(batch[0]).double().log_softmax(2).gather(2, batch[1][..., None])
    assert task.loss(model, batch).item() == pytest.approx(-picked.mean().item(), rel=1e-5)
    assert task.loss_elements(batch) == 8


def test_the_authors_tokenizer():
    assert cut_words(' He said : " It \'s <unk> , ( 3 @.@ 5 ) ; yes ! " ') == (
        ["he", "said", "it", "'", "s", "<unk>", ",", "(", "3", "@", ".", "@", "5", ")", "yes", "!"]
    )


def test_the_loss_is_the_mean_over_tokens():
    task = build_task("stdlib-text")
    model = build_model("transformer", task.model_args).eval()
    batch = [tensor[:6] for tensor in task.heldout.tensors]
    logits = model(batch[0]).double()
    expected = -logits.log_softmax(2).gather(2, batch[1][..., None]).mean().item()
    metrics = task.metrics(model, batch)
    assert task.loss(model, batch).item() == pytest.approx(expected, rel=1e-5)  # float32
    assert metrics["loss"].item() == pytest.approx(expected, rel=1e-5)
    right = (logits.argmax(2) == batch[1]).sum().item()
    assert metrics["accuracy"].item() == pytest.approx(right / (6 * 32))
    assert task.loss_elements(batch) == 6 * 32


def test_stdlib_text_spells_the_modules_and_tells_what_it_read():
    task = build_task("stdlib-text")
    sources = [inspect.getsource(module).encode() for module in (difflib, heapq)]
    assert task.digest == hashlib.sha256(b"".join(sources)).hexdigest()
    assert len(task.train) == (len(sources[0]) - 1) // 32
    text = bytes(task.train.tensors[0].flatten().tolist()).decode()
    assert text.startswith('"""\nModule difflib -- helpers for computing deltas')
    assert bytes(task.heldout.tensors[0].flatten().tolist()).startswith(b'"""Heap queue algorithm')


def test_stdlib_text_is_the_one_that_is_known():
    """In the patch versions that its module names; others may have other sources."""
    task = build_task("stdlib-text")
    if sys.version_info[:3] not in ((3, 11, 2), (3, 11, 7), (3, 12, 1), (3, 13, 0)):
        pytest.skip(f"the sources of Python {sys.version.split()[0]} are not among those known")
    assert task.digest == KNOWN_DIGEST
    assert (len(task.train), len(task.heldout)) == (2603, 719)


def test_a_task_on_text_can_be_pickled(folder):
    for task in (build_task("stdlib-text"), wikitext2(folder)):
        copy = pickle.loads(pickle.dumps(task))
        assert copy.model_args == task.model_args
        assert torch.equal(copy.train[3][1], task.train[3][1])


def test_a_short_training_lowers_the_loss(tmp_path):
    flags = {"task": "stdlib-text", "optimizer": "adam", "lr": 0.01, "device": "cpu"}
    summary = train(read_config(flags={**flags, "max_steps": 30}), tmp_path / "run.zarr")
    assert summary.steps == 30
    assert summary.heldout["loss"] < 4  # 5.5 to begin with, the logarithm of 256


@pytest.mark.parametrize("variant", ["corrected", "paper-literal"])
def test_a_short_training_on_words(folder, tmp_path, variant):
    flags = {
        "task": "wikitext2",
        "data_root": str(folder),
        "task_args": {"variant": variant, "window": 3},
        "model_args": {"layers": 1, "features": 8},
        "batch_size": 10,
        "max_steps": 5,
        "device": "cpu",
    }
    summary = train(read_config(flags=flags), tmp_path / "run.zarr")
    assert summary.steps == 5
    assert 0 < summary.heldout["loss"] < 4  # 2.5 to begin with, the logarithm of a dozen words


def test_what_is_missing_is_named(folder):
    with pytest.raises(UsageError, match=r"give --data-root DIR; .*prepare\.py"):
        build_task("wikitext2")
    with pytest.raises(UsageError, match="did you mean 'paper-literal'"):
        wikitext2(folder, variant="paper_literal")
    with pytest.raises(UsageError, match="window must be a whole number of at least 1"):
        wikitext2(folder, window=0)
    with pytest.raises(InputError, match=r"neither train.txt nor wiki.train.tokens is there"):
        wikitext2(folder.parent)
    with pytest.raises(InputError, match=r"no such folder.*nowhere"):
        wikitext2(folder / "nowhere")
    (folder / "valid.txt").rename(folder / "wiki.valid.tokens")
    assert len(wikitext2(folder, window=3).heldout) == 2
    (folder / "wiki.valid.tokens").write_bytes(b"caf\xe9 \n")
    with pytest.raises(InputError, match="not text in UTF-8"):
        wikitext2(folder)


def test_a_text_shorter_than_a_window_holds_nothing_out(folder):
    assert wikitext2(folder, window=20).heldout is None


def test_an_unknown_word_needs_a_mark(folder):
    (folder / "train.txt").write_text("the cat sat .\n")
    with pytest.raises(InputError, match="no <unk> either: horse"):
        wikitext2(folder)


def test_wikitext2_has_the_published_counts(data_root):
    counts = {
        split: sum(map(len, split_words(read_text(find_split(data_root / "wikitext-2", split)))))
        for split in ("train", "valid", "test")
    }
    assert counts == {"train": 2_088_628, "valid": 217_646, "test": 245_569}
    task = wikitext2(data_root / "wikitext-2")
    assert task.model_args["vocabulary"] == 33_278
    assert len(task.train) == 2_088_627 // 32
    assert len(task.heldout) == 217_645 // 32


def test_wikitext2_trains_with_a_small_model(data_root, tmp_path):
    """On the real training text; only the first lines are held out, for the time it takes."""
    source = data_root / "wikitext-2"
    (tmp_path / "train.txt").symlink_to(find_split(source, "train"))
    lines = find_split(source, "valid").read_text(encoding="utf-8").split("\n")[:50]
    (tmp_path / "valid.txt").write_text("\n".join(lines), encoding="utf-8")
    flags = {
        "task": "wikitext2",
        "data_root": str(tmp_path),
        "model_args": {"layers": 1, "features": 8},
        "batch_size": 4,
        "max_steps": 2,
        "device": "cpu",
    }
    summary = train(read_config(flags=flags), tmp_path / "run.zarr")
    assert summary.steps == 2
    assert 10 < summary.heldout["loss"] < 11  # 10.4 to begin with, the logarithm of 33,278
