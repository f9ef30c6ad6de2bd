"""Which path of a kernel runs: `reference` (the formula), `vectorised` (PyTorch, the CPU's path) or `triton`.

`auto` is Triton where it is installed and the tensors are on a CUDA device, of at most 32 bits, else vectorised. Under
Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported; float32 only) tensors on the CPU count as such too.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

PATHS = ("auto", "reference", "vectorised", "triton")
TRITON = find_spec("triton") is not None
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"
# Asked once, as PyTorch 2.11 does not trace the question.
AUTOCAST = {kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)}
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def chosen_path(path: str, kernel: str, tensor: Tensor, *, suits: bool = True) -> str:
    """`path`, with auto decided by the device and dtype of a tensor. suits: whether Triton is an option for this call.

    Raises ValueError for unknown paths, and for triton where it cannot run.
    """
    if path not in PATHS:
        raise ValueError(f"unknown path {path!r} of {kernel}; allowed: {', '.join(PATHS)}")
    if path in ("reference", "vectorised"):
        return path
    able = TRITON and suits and (tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu"))
    able = able and (tensor.dtype in PRECISIONS or not tensor.is_floating_point())
    if path == "auto":
        return "triton" if able else "vectorised"
    if not able:
        raise ValueError(
            f"path triton of {kernel} does not serve this call on {tensor.dtype} {tensor.device.type} tensors; it "
            "needs Triton and CUDA tensors, floating-point ones of 16 or 32 bits; use path auto"
        )
    return path


def autocast_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """In which products are computed under autocast on a device; `otherwise` where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind in AUTOCAST and torch.is_autocast_enabled(kind) else otherwise
