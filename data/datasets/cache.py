"""A series decoded once into one float32 array file, mapped into memory by every process that reads it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

import numpy as np

from data.sources.location import cache_folder
from data.sources.series import Series

BLOCK_BYTES = 64 * 2**20


def time_blocks(indices: np.ndarray, frame_bytes: int) -> Iterator[np.ndarray]:
    """Consecutive pieces of `indices` whose frames take about 64 MB."""
    length = max(1, BLOCK_BYTES // max(frame_bytes, 1))
    for start in range(0, len(indices), length):
        yield indices[start : start + length]


def mapped_array(series: Series) -> np.ndarray:
    """(N, C, H, W) float32 read-only memory map of the whole series, written to the cache folder on first use.

    The name is a digest of the files' paths, sizes, modification times and the selection, so a changed file is decoded
    again. Written beside and renamed: a crash or a full disk leaves no partial array. Raises OSError when not writable.
    """
    from filelock import FileLock

    digest = hashlib.sha256(repr(series.identity).encode()).hexdigest()[:24]
    path = cache_folder("arrays") / f"{digest}.npy"
    if not path.exists():
        with FileLock(f"{path}.lock"):
            if not path.exists():
                _write(path, series)
    return np.load(path, mmap_mode="r")


def _write(path, series: Series) -> None:
    shape = (series.times.size, len(series.variables), *series.grid.shape)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Ordinary writes: on a full disk they raise, where writing through a memory map would kill the process.
        with open(temporary, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for block in time_blocks(np.arange(shape[0]), 4 * int(np.prod(shape[1:]))):
                file.write(series.read(block).astype("<f4", copy=False).tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:
            raise  # reading the source failed: its own sentence says so
        size = 4 * int(np.prod(shape)) / 2**30
        raise OSError(
            f"cannot write the {size:.1f} GiB cache {path} ({error.strerror}); free some space, set "
            "HYDRASPHERE_CACHE to another "
            "folder or type data.cache=none"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
