"""Where a run computes, and in what precision."""

from __future__ import annotations

import torch

PRECISIONS = ("auto", "float32", "bf16")


def choose_precision(name: str, device: torch.device) -> str:
    """float32 or bf16; `auto` is bf16 where the device has instructions for it. Raises ValueError for unknown names."""
    if name not in PRECISIONS:
        raise ValueError(f"trainer.precision={name} is unknown; use trainer.precision={', '.join(PRECISIONS)}")
    if name != "auto":
        return name
    supported = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return "bf16" if supported else "float32"


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device or the CPU. Raises ValueError for a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"trainer.device={name} is not available here; use trainer.device=auto or cpu") from error
    return device
