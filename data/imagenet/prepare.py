"""Check and count the images of ImageNet; they are to be had only by registering."""

import sys
from collections.abc import Sequence
from pathlib import Path

from capture.prepare import run_prepare
from capture.store.errors import InputError
from capture.tasks.imagenet import read_folders

REGISTER = (
    "register at https://image-net.org/download.php for the archives of ILSVRC 2012, and unpack "
    "them into train/CLASS/ and val/CLASS/"
)


def prepare(root: Path, url: str | None) -> list[str]:
    """Return the counts. Raises `InputError` with where to register if there are no images."""
    if not (root / "train").is_dir():
        raise InputError(
            "expected train/CLASS/ and val/CLASS/ with images", where=root, fix=REGISTER
        )
    train, heldout = read_folders(root)
    classes = len(set(train.labels))
    return [f"{len(train):,} training and {len(heldout):,} held-out images of {classes:,} classes"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with these arguments, else with those of the command line."""
    return run_prepare(prepare, __file__, url=None, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
