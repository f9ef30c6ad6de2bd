"""How `modulated_norm` and `gated` are launched: which rows a program serves, and room for the sums of programs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.modulated_norm import device_code

TILE = 4096  # numbers of a tile: 16 a thread
NUM_WARPS = 8
FORWARD_TILES = 4  # of a program: scale and shift are loaded once for them
BACKWARD_PROGRAMS = 2048  # about, of all samples: their partial sums stay a few percent of the traffic


class _Launch:
    """How the rows of B samples (B, ..., D) are spread over programs, none of which serves two samples."""

    def __init__(self, x: Tensor, *, backward: bool):
        self.batch, self.width = x.shape[0], x.shape[-1]
        self.rows = x.numel() // max(self.batch * self.width, 1)
        self.shape = {"D": self.width, **tile(self.width)}
        tiles = triton.cdiv(self.rows, self.shape["R"])
        self.steps = max(1, tiles * self.batch // BACKWARD_PROGRAMS) if backward else FORWARD_TILES
        self.programs = triton.cdiv(tiles, self.steps)

    def __call__(self, kernel, *arguments) -> None:
        tensors = [part for part in arguments if isinstance(part, Tensor)]
        strides = [part for part in arguments if not isinstance(part, Tensor)]
        if self.batch * self.programs:
            with torch.cuda.device_of(tensors[0]):
                grid = (self.batch * self.programs,)
                spread = (self.rows, self.programs, self.steps)
                kernel[grid](*tensors, *spread, *strides, **self.shape, num_warps=NUM_WARPS)

    def sums(self, x: Tensor, *parts: int) -> Tensor:
        """Room for what programs add up: (B, programs, *parts, D)."""
        return x.new_empty(self.batch, self.programs, *parts, self.width, dtype=torch.float32)


def tile(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"R": max(1, TILE // block), "BLOCK": block}


def norm_forward(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    x, shift, scale = x.contiguous(), _dense_rows(shift), _dense_rows(scale)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    _Launch(x, backward=False)(device_code.norm_forward, x, shift, scale, y, shift.stride(0), scale.stride(0), eps)
    return y


def norm_backward(gradient: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    gradient, x, scale = gradient.contiguous(), x.contiguous(), _dense_rows(scale)
    launch, towards_x = _Launch(x, backward=True), torch.empty_like(x)
    sums = launch.sums(x, 2)
    launch(device_code.norm_backward, gradient, x, scale, towards_x, sums, scale.stride(0), eps)
    return towards_x, sums[:, :, 0].sum(dim=1), sums[:, :, 1].sum(dim=1)


def gated_forward(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    x, gate, branch = x.contiguous(), _dense_rows(gate), branch.contiguous()
    y = torch.empty_like(x)
    _Launch(x, backward=False)(device_code.gated_forward, x, gate, branch, y, gate.stride(0))
    return y


def gated_backward(gradient: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    gradient, gate, branch = gradient.contiguous(), _dense_rows(gate), branch.contiguous()
    launch, towards_branch = _Launch(gradient, backward=True), torch.empty_like(branch)
    sums = launch.sums(gradient)
    launch(device_code.gated_backward, gradient, gate, branch, towards_branch, sums, gate.stride(0))
    return sums.sum(dim=1), towards_branch


def _dense_rows(part: Tensor) -> Tensor:
    """(B, D) whose rows may lie apart (one of several parts) or be one (an expanded constant)."""
    return part if part.stride(-1) == 1 else part.contiguous()
