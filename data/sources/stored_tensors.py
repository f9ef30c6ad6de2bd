"""Tensors in a file of the cache folder: made once, read by every process, made again where the file is damaged."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection
from pathlib import Path

from torch import Tensor

from data.sources.series import first_line

Content = tuple[dict[str, Tensor], dict[str, str]]  # tensors, and words about them


def read_or_make(path: Path, make: Callable[[], Content], *, names: Collection[str], what: str) -> Content:
    """The content of a safetensors file; written when absent, made anew with a warning when it cannot be read.

    names: tensors that must be in it. what: in a person's words, for the warning and the error. Tensors are mapped into
    memory: what is not looked at is not read. One process makes the file while others wait. Raises OSError where the
    file cannot be written, and what `make` raises.
    """
    from filelock import FileLock

    if (content := _readable(path, names)) is not None:
        return content
    with FileLock(f"{path}.lock"):
        if (content := _readable(path, names)) is not None:  # another process was first
            return content
        if path.exists():
            warnings.warn(f"the {what} in {path} are damaged and are made again", stacklevel=2)
        _write(path, make(), what)
    return _read(path)


def _readable(path: Path, names: Collection[str]) -> Content | None:
    """The content, or None where there is none or a damaged one."""
    from safetensors import SafetensorError

    if not path.exists():
        return None
    try:
        content = _read(path)
    except (SafetensorError, OSError, ValueError):
        return None
    return content if set(names) <= set(content[0]) else None


def _read(path: Path) -> Content:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _write(path: Path, content: Content, what: str) -> None:
    """Written beside and renamed: a crash or a full disk leaves nothing half-written."""
    from safetensors.torch import save

    tensors, words = content
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, words))
        os.replace(beside, path)
    except OSError as error:
        raise OSError(
            f"cannot write the {what} to {path} ({error.strerror or first_line(error)}); free some space or set "
            "HYDRASPHERE_CACHE to another folder"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
