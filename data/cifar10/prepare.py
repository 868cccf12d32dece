"""Bring CIFAR-10 here: the binary version, 162 MB of archive, checked and unpacked."""

import sys
from collections.abc import Sequence
from pathlib import Path

from capture.fetch import fetch, unpack
from capture.prepare import run_prepare
from capture.tasks.cifar10 import find_batches, read_cifar10

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as the official page gives it


def prepare(root: Path, url: str | None) -> list[str]:
    """Fetch the archive if no batch is there; return the counts."""
    if not find_batches(root):
        archive = fetch(url or URL, root / "cifar-10-binary.tar.gz", md5=MD5)
        unpack(archive, root)
        archive.unlink()
    _, labels = read_cifar10(root)
    classes = len(set(labels.tolist()))
    return [
        f"{len(labels):,} training images of {classes} classes in {find_batches(root)[0].parent}"
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with these arguments, else with those of the command line."""
    return run_prepare(prepare, __file__, url=URL, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
