"""Bring WikiText-2 here: three texts, with their published numbers of lines and tokens.

Example: python data/wikitext2/prepare.py --root /data/wikitext2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from capture.fetch import fetch, unpack
from capture.prepare import run_prepare
from capture.store.errors import InputError
from capture.tasks.wikitext2 import SPLITS, find_split, number, read_text, split_words

URL = "https://wikitext.smerity.com/wikitext-2-v1.zip"
MD5 = "542ccefacc6c27f945fb54453812b3cd"
PUBLISHED = (
    "train: 36,718 lines, 2,088,628 tokens",
    "valid: 3,760 lines, 217,646 tokens",
    "test: 4,358 lines, 245,569 tokens",
    "vocabulary: 33,278 words with <eos>",
)


def prepare(root: Path, url: str | None) -> list[str]:
    """Fetch what is missing, and return the counts of what there is."""
    if url is not None and not complete(root):
        archive = fetch(url, root / "wikitext-2.zip", md5=MD5 if url == URL else None)
        with TemporaryDirectory(prefix=".unpacked-", dir=root) as unpacked:
            unpack(archive, unpacked)
            for path in texts_in(Path(unpacked), url):
                path.replace(root / path.name)
        archive.unlink()
    counts = count(root)
    published = tuple(counts) == PUBLISHED
    return [*counts, f"these are {'' if published else 'not '}the published counts"]


def complete(root: Path) -> bool:
    """Tell whether all three texts are there."""
    try:
        return all(find_split(root, split) for split in SPLITS)
    except InputError:
        return False


def texts_in(unpacked: Path, url: str) -> list[Path]:
    """Return the three texts of an archive, in whatever folder. Raises `InputError`."""
    folders = (path.parent for path in sorted(unpacked.rglob("*train*")) if path.is_file())
    folder = next(folders, unpacked)
    try:
        return [find_split(folder, split) for split in SPLITS]
    except InputError as error:
        raise InputError(
            f"in this archive, {error.what}", where=url, fix="give another --url"
        ) from None


def count(root: Path) -> list[str]:
    """Return a line of counts for each text and one for the vocabulary of the first."""
    texts = {split: split_words(read_text(find_split(root, split))) for split in SPLITS}
    words = number(chain.from_iterable(texts["train"]))
    return [
        *(
            f"{split}: {len(lines):,} lines, {tokens(lines):,} tokens"
            for split, lines in texts.items()
        ),
        f"vocabulary: {len(words):,} words with <eos>",
    ]


def tokens(lines: Sequence[Sequence[str]]) -> int:
    """Return the number of tokens, <eos> among them."""
    return sum(map(len, lines))


if __name__ == "__main__":
    sys.exit(run_prepare(prepare, __file__, url=URL))
