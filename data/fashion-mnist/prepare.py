"""Bring Fashion-MNIST here: four files, 31 MB, checked and left as they are."""

import sys
from collections.abc import Sequence
from pathlib import Path

from capture.fetch import fetch
from capture.prepare import run_prepare
from capture.tasks.fashion_mnist import PARTS, read_part

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
# As the official repository gives them.
MD5 = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}


def prepare(root: Path, url: str | None) -> list[str]:
    """Fetch the files that are not there; return the counts."""
    for name, md5 in MD5.items():
        if not (root / name).is_file() and not (root / f"{name}.gz").is_file():
            fetch(f"{(url or URL).rstrip('/')}/{name}.gz", root / f"{name}.gz", md5=md5)
    counts = {part: len(read_part(root, part)[1]) for part in PARTS}
    return [f"{counts['train']:,} training and {counts['t10k']:,} held-out images in {root}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with these arguments, else with those of the command line."""
    return run_prepare(prepare, __file__, url=URL, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
