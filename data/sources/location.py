"""Where files are: turns what a user types as `data.path` into local paths, and names the cache folder."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

_WILDCARDS = frozenset("*?[")


def cache_folder(*parts: str) -> Path:
    """The cache folder (`HYDRASPHERE_CACHE`, else ~/.cache/hydrasphere) or a folder inside it, created when absent.

    Raises OSError when it cannot be written.
    """
    root = Path(os.environ.get("HYDRASPHERE_CACHE") or Path.home() / ".cache" / "hydrasphere").expanduser()
    folder = root.joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(folder, None)
    return folder


def _unwritable(folder: Path, error: OSError | None) -> OSError:
    reason = f" ({error.strerror})" if error is not None and error.strerror else ""
    return OSError(f"the cache folder {folder} cannot be written{reason}; set HYDRASPHERE_CACHE to a folder that can")


def locate(path: str | os.PathLike | Sequence[str], *, setting: str = "data.path") -> list[Path]:
    """Local files (or Zarr stores) behind a path.

    path: `catalogue:<file name>` (downloaded or taken from `DATA_DIR`), `synthetic:<name>` (generated once), a file, a
    Zarr store, a glob, or a list of these. setting: what the user typed it as. Raises OSError or ValueError where
    nothing is found.
    """
    if not isinstance(path, str | os.PathLike):
        if not path:
            raise ValueError(f"{setting} is an empty list; give at least one file")
        return [local for item in path for local in locate(item, setting=setting)]
    text = os.fspath(path)
    scheme, _, name = text.partition(":")
    if scheme == "catalogue":
        from data.sources.catalogue import fetch

        return [fetch(name)]
    if scheme == "synthetic":
        from data.sources.synthetic import materialise

        return [materialise(name)]
    local = Path(text).expanduser()
    if local.exists():
        return [local]
    if _WILDCARDS & set(text):
        found = sorted(glob.glob(str(local), recursive=True))
        if found:
            return [Path(item) for item in found]
        raise FileNotFoundError(f"no file matches {setting}={text}; check the pattern and the folder {Path.cwd()}")
    raise FileNotFoundError(f"{setting}={text} does not exist; give a file, a Zarr store, a glob or catalogue:<name>")
