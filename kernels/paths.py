"""Which implementation of a kernel serves a call: one rule for all kernels.

reference: a loop that reads like the formula. vectorised: PyTorch, for every device. triton: our kernels, on CUDA (or on
the CPU in Triton's interpreter, TRITON_INTERPRET=1, for tests). auto: triton where the tensors are on CUDA and Triton
imports, else vectorised.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

PATHS = ("auto", "reference", "vectorised", "triton")
TRITON = find_spec("triton") is not None
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"


def chosen(path: str, device: torch.device, *, kernel: str, supported: bool = True) -> str:
    """`path` without `auto`. supported: whether the Triton kernel takes these shapes and dtypes; where it does not,
    `auto` is vectorised. Raises ValueError for a path that is unknown or cannot run here."""
    if path not in PATHS:
        raise ValueError(f"unknown path {path!r} of {kernel}; allowed: {', '.join(PATHS)}")
    runs = TRITON and (device.type == "cuda" or INTERPRETED)
    if path == "auto":
        return "triton" if runs and device.type == "cuda" and supported else "vectorised"
    if path == "triton" and not (runs and supported):
        reason = "its shapes or dtype" if runs else f"tensors on {device.type}" if TRITON else "a missing Triton"
        raise ValueError(f"the Triton kernel of {kernel} cannot serve {reason}; use path='auto' or path='vectorised'")
    return path
