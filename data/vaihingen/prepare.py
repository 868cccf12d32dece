"""Check the images of ISPRS Vaihingen and count them; fetching needs a registration, by hand."""

import sys
from collections.abc import Sequence
from pathlib import Path

from capture.prepare import run_prepare
from capture.store.errors import InputError
from capture.tasks.segmentation import describe_images
from capture.tasks.vaihingen import CLASSES, read_tiles

REGISTER = (
    "register for the ISPRS 2D semantic labelling contest of Vaihingen (data/vaihingen/README.md "
    "says where), and unpack so that this folder holds top/ and gts_for_participants/"
)


def prepare(root: Path, url: str | None) -> list[str]:
    """Return the counts of what is there; `url` is not used."""
    if not any((root / folder).is_dir() for folder in ("top", "img_dir")):
        raise InputError("no images of Vaihingen here", where=root, fix=REGISTER)
    train, validation = read_tiles(root)
    return [
        *describe_images("training", train, CLASSES),
        *describe_images("validation", validation, CLASSES),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with these arguments, else with those of the command line."""
    return run_prepare(prepare, __file__, url=None, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
