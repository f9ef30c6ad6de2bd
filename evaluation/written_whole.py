"""Files and stores that are complete or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path`, of the same ending, to write a file or a folder to: it gets that name when the block ends.

    Folders on the way are made. Where the block fails nothing of it stays, no folder either. Raises OSError.
    """
    made = [level for level in path.absolute().parents if not level.exists()]  # innermost first
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        if beside.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(beside, path)
    except BaseException:
        if beside.is_dir():
            shutil.rmtree(beside)
        else:
            with suppress(OSError):
                beside.unlink()
        for level in made:
            with suppress(OSError):
                level.rmdir()
        raise
