"""How norms and gated residuals are launched: which rows a program serves, and room for the sums of programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from kernels.modulated_norm import device_code
from kernels.tuning import Config, Tuning

_SOURCES = (Path(__file__), Path(__file__).with_name("device_code.py"))
# Numbers of a tile, 16 a thread and more, and warps: none spills at widths up to the tile.
TUNING = {
    name: Tuning(f"modulated_norm_{name}", [{"TILE": size, "num_warps": warps} for size, warps in choices], _SOURCES)
    for name, choices in {
        "norm_forward": ((4096, 8), (2048, 4), (4096, 4), (8192, 8)),
        "norm_backward": ((4096, 8), (2048, 4), (2048, 8)),
        "gated_forward": ((4096, 8), (2048, 4), (4096, 4), (8192, 8)),
        "gated_backward": ((4096, 8), (2048, 4), (2048, 8)),
        "gated_norm_forward": ((4096, 8), (2048, 4), (8192, 16)),
        "gated_norm_backward": ((4096, 16), (2048, 8), (2048, 16)),
    }.items()
}
FORWARD_TILES = 4  # of a program: scale and shift are loaded once for them
BACKWARD_PROGRAMS = 2048  # about, of all samples: their partial sums stay a few percent of the traffic


class _Launch:
    """How the rows of B samples (B, ..., D) are spread over programs, none of which serves two samples."""

    def __init__(self, x: Tensor, config: Config, *, backward: bool):
        self.batch, self.width = x.shape[0], x.shape[-1]
        self.rows, self.num_warps = x.numel() // max(self.batch * self.width, 1), config["num_warps"]
        self.shape = {"D": self.width, **tile(self.width, config)}
        tiles = triton.cdiv(self.rows, self.shape["R"])
        self.steps = max(1, tiles * self.batch // BACKWARD_PROGRAMS) if backward else FORWARD_TILES
        self.programs = triton.cdiv(tiles, self.steps)

    def __call__(self, kernel, *arguments) -> None:
        tensors = [part for part in arguments if isinstance(part, Tensor)]
        strides = [part for part in arguments if not isinstance(part, Tensor)]
        grid = (self.batch * self.programs,)
        spread = (self.rows, self.programs, self.steps)
        kernel[grid](*tensors, *spread, *strides, **self.shape, num_warps=self.num_warps)

    def sums(self, x: Tensor, *parts: int) -> Tensor:
        """Room for what programs add up: (B, programs, *parts, D)."""
        return x.new_empty(self.batch, self.programs, *parts, self.width, dtype=torch.float32)


def tile(width: int, config: Config) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"R": max(1, config["TILE"] // block), "BLOCK": block}


def _launch(name: str, x: Tensor, types: tuple, run: Callable[[Config], None]) -> None:
    """run: launches the kernel with a configuration; what is written is the same for each."""
    if x.numel():
        with torch.cuda.device_of(x):
            run(TUNING[name].config((triton.next_power_of_2(x.shape[-1]), *types), x.device, run))


def norm_forward(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    x, shift, scale = x.contiguous(), _dense_rows(shift), _dense_rows(scale)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)

    def run(config: Config) -> None:
        launch = _Launch(x, config, backward=False)
        launch(device_code.norm_forward, x, shift, scale, y, shift.stride(0), scale.stride(0), eps)

    _launch("norm_forward", x, (x.dtype, dtype), run)
    return y


def norm_backward(gradient: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    gradient, x, scale = gradient.contiguous(), x.contiguous(), _dense_rows(scale)
    towards_x, found = torch.empty_like(x), [scale.new_zeros(len(x), 2, x.shape[-1], dtype=torch.float32)]

    def run(config: Config) -> None:
        launch = _Launch(x, config, backward=True)
        sums = launch.sums(x, 2)
        launch(device_code.norm_backward, gradient, x, scale, towards_x, sums, scale.stride(0), eps)
        found[0] = sums.sum(dim=1)

    _launch("norm_backward", x, (x.dtype, gradient.dtype), run)
    return towards_x, found[0][:, 0].clone(), found[0][:, 1].clone()


def gated_forward(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    x, gate, branch = x.contiguous(), _dense_rows(gate), branch.contiguous()
    y = torch.empty_like(x)

    def run(config: Config) -> None:
        _Launch(x, config, backward=False)(device_code.gated_forward, x, gate, branch, y, gate.stride(0))

    _launch("gated_forward", x, (x.dtype, branch.dtype), run)
    return y


def gated_backward(gradient: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    gradient, gate, branch = gradient.contiguous(), _dense_rows(gate), branch.contiguous()
    towards_branch, found = torch.empty_like(branch), [gate.new_zeros(gate.shape, dtype=torch.float32)]

    def run(config: Config) -> None:
        launch = _Launch(gradient, config, backward=True)
        sums = launch.sums(gradient)
        launch(device_code.gated_backward, gradient, gate, branch, towards_branch, sums, gate.stride(0))
        found[0] = sums.sum(dim=1)

    _launch("gated_backward", gradient, (gradient.dtype, branch.dtype), run)
    return found[0], towards_branch


def gated_norm_forward(
    x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype, eps: float
) -> tuple[Tensor, Tensor]:
    x, branch = x.contiguous(), branch.contiguous()
    parts = [_dense_rows(part) for part in (gate, shift, scale)]
    gate, shift, scale = parts
    stream, y = torch.empty_like(x), torch.empty(x.shape, dtype=dtype, device=x.device)

    def run(config: Config) -> None:
        strides = [part.stride(0) for part in parts]
        launch = _Launch(x, config, backward=False)
        launch(device_code.gated_norm_forward, x, gate, branch, shift, scale, stream, y, *strides, eps)

    _launch("gated_norm_forward", x, (x.dtype, branch.dtype, dtype), run)
    return stream, y


def gated_norm_backward(
    towards_stream: Tensor, gradient: Tensor, stream: Tensor, scale: Tensor, gate: Tensor, branch: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = [part.contiguous() for part in (towards_stream, gradient, stream)]
    scale, gate, branch = _dense_rows(scale), _dense_rows(gate), branch.contiguous()
    towards_x, towards_branch = torch.empty_like(tensors[2]), torch.empty_like(branch)
    found = [scale.new_zeros(len(stream), 3, stream.shape[-1], dtype=torch.float32)]

    def run(config: Config) -> None:
        launch = _Launch(stream, config, backward=True)
        sums = launch.sums(stream, 3)
        written, strides = (towards_x, towards_branch, sums), (scale.stride(0), gate.stride(0))
        launch(device_code.gated_norm_backward, *tensors, scale, gate, branch, *written, *strides, eps)
        found[0] = sums.sum(dim=1)

    _launch("gated_norm_backward", stream, (stream.dtype, branch.dtype, gradient.dtype), run)
    return towards_x, towards_branch, found[0]


def _dense_rows(part: Tensor) -> Tensor:
    """(B, D) whose rows may lie apart (one of several parts) or be one (an expanded constant)."""
    return part if part.stride(-1) == 1 else part.contiguous()
