"""WikiText-2: word-level language modelling on Wikipedia articles, 33,278 words.

The variant `corrected` reads the text as one stream of whitespace-separated tokens with ``<eos>``
at the end of each line, cut into windows. The paper's settings beside the defaults: Adam, learning
rate 1e-4·√(batch/32), weight decay 1e-5.

The variant `paper-literal` repeats what the authors' released code does:

- a sample is one line, of which only the first window + 1 tokens are used, the rest never;
- shorter lines are filled up with ``<pad>``, and pads enter the loss like words;
- attention, its mask and the positions run across the batch axis (`literal` of the transformer);
- indices come from another vocabulary than the output layer: lower-case words with punctuation cut
  off that occur at least 5 times, while the layer has a place for every word of the files.

Two things differ from it. Lines of less than two tokens, which it drops from their batch, are left
out beforehand, so all batches are full; and lines are filled up to the same length always, not to
the longest of their batch.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from os import PathLike
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from capture.arguments import require_whole
from capture.store.errors import InputError, UsageError
from capture.tasks.folder import advice, require_folder
from capture.tasks.language import Language, nonempty, windows

SPLITS = ("train", "valid", "test")
VARIANTS = ("corrected", "paper-literal")
END, UNKNOWN, PAD = "<eos>", "<unk>", "<pad>"
# What the authors' tokenizer sets apart, and what it drops.
APART, DROPPED = "'.,()!?", {'"': "", ";": " ", ":": " "}
LEAST_COUNT = 5
PREPARE = advice("wikitext2")

Lines = Sequence[Sequence[str]]


def wikitext2(
    data_root: str | None = None, *, variant: str = "corrected", window: int = 32
) -> Language:
    """Make the task from train and valid in `data_root`. Raises `UsageError` or `InputError`."""
    folder = require_folder("wikitext2", data_root)
    if variant not in VARIANTS:
        near = difflib.get_close_matches(variant, VARIANTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(VARIANTS)}"
        raise UsageError(f"unknown variant {variant!r}", fix=hint)
    require_whole("window", window, 1)
    train, valid = (read_text(find_split(folder, split)) for split in ("train", "valid"))
    literal = variant == "paper-literal"
    prepare = _paper_literal if literal else _corrected
    train_set, valid_set, size = prepare(train, valid, window)
    return Language(
        train=train_set,
        heldout=nonempty(valid_set),
        defaults={"model": "transformer", "batch_size": 32, "epochs": 20},
        model_args={"vocabulary": size, "literal": literal},
        digest=hashlib.sha256((train + valid).encode()).hexdigest(),
    )


def _corrected(train: str, valid: str, window: int) -> tuple[TensorDataset, TensorDataset, int]:
    """Return the windows of both texts and the number of words."""
    lines = split_words(train)
    words = number(chain.from_iterable(lines))
    streams = to_indices(lines, words), to_indices(split_words(valid), words)
    return windows(streams[0], window), windows(streams[1], window), len(words)


def _paper_literal(train: str, valid: str, window: int) -> tuple[TensorDataset, TensorDataset, int]:
    """Return the lines of both texts by the one vocabulary, and the size of the other."""
    cut = [cut_words(line) for line in to_lines(train)]
    indices = number_frequent(chain.from_iterable(cut))
    size = len(number(chain.from_iterable(split_words(train))))
    return (
        first_tokens(cut, indices, window),
        first_tokens([cut_words(line) for line in to_lines(valid)], indices, window),
        # In the real files there are fewer indices; in a toy text the two marks can be more.
        max(size, len(indices)),
    )


def find_split(folder: str | PathLike[str], split: str) -> Path:
    """Return the file of ``train``, ``valid`` or ``test``, by either name. Raises `InputError`."""
    names = (f"{split}.txt", f"wiki.{split}.tokens")
    for name in names:
        if (path := Path(folder) / name).is_file():
            return path
    raise InputError(f"neither {names[0]} nor {names[1]} is there", where=folder, fix=PREPARE)


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8. Raises `InputError`."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the text: {error.strerror}", where=path) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"this is not text in UTF-8: {error.reason}", where=path, fix=PREPARE
        ) from None


def to_lines(text: str) -> list[str]:
    """Split at line feeds only; Wikipedia's text may hold Unicode's other line ends."""
    return text.removesuffix("\n").split("\n") if text else []


def split_words(text: str) -> list[list[str]]:
    """Return the whitespace-separated words of each line, and ``<eos>`` after them."""
    return [[*line.split(), END] for line in to_lines(text)]


def number(words: Iterable[str]) -> dict[str, int]:
    """Number the words in order of their first appearance."""
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def to_indices(lines: Lines, words: Mapping[str, int]) -> list[int]:
    """Return the stream of all lines' indices; a word without one is ``<unk>``."""
    unknown = words.get(UNKNOWN)
    stream = [words.get(word, unknown) for word in chain.from_iterable(lines)]
    if None in stream:
        raise InputError(
            "a held-out word does not occur in the training text, which has no <unk> either",
            where=list(chain.from_iterable(lines))[stream.index(None)],
            fix=PREPARE,
        )
    return [index for index in stream if index is not None]


def cut_words(line: str) -> list[str]:
    """Return the words of a line as the authors' tokenizer (torchtext's basic_english) did."""
    table = str.maketrans({**{mark: f" {mark} " for mark in APART}, **DROPPED})
    return line.lower().translate(table).split()


def number_frequent(words: Iterable[str]) -> dict[str, int]:
    """Number ``<unk>``, ``<pad>`` and the frequent words, in order of their first appearance."""
    counts = Counter(words)
    frequent = [word for word, count in counts.items() if count >= LEAST_COUNT]
    return number([UNKNOWN, PAD, *frequent])


def first_tokens(lines: Lines, indices: Mapping[str, int], window: int) -> TensorDataset:
    """Return the first ``window + 1`` tokens of each line of two or more, filled up with pads."""
    unknown, length = indices[UNKNOWN], window + 1
    rows = torch.full((sum(len(line) > 1 for line in lines), length), indices[PAD])
    for row, line in zip(rows, (line for line in lines if len(line) > 1), strict=True):
        tokens = [indices.get(word, unknown) for word in line[:length]]
        row[: len(tokens)] = torch.tensor(tokens)
    return TensorDataset(rows[:, :-1], rows[:, 1:])
