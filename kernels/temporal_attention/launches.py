"""How `temporal_attention` is launched: the tile of a program follows from the number of frames and the head width."""

from __future__ import annotations

from pathlib import Path

import torch
import triton
from torch import Tensor

from kernels.temporal_attention import device_code
from kernels.tuning import Config, Tuning

NUM_STAGES = 1  # loops are short: copies ahead cost more registers than they hide
_SOURCES = (Path(__file__), Path(__file__).with_name("device_code.py"))
# Columns at a time (32: both halves of rotated ones fill a product of tensor cores) and warps, for a tile of 16 or 32
# rows in 16 or 32 bits. Products of 16 rows of 16 bits are one warp's: more warps hold copies of the same operands.
TUNING = {
    (name, rows, bits): Tuning(
        f"temporal_attention_{name}_{rows}_{bits}",
        [{"CHUNK": chunk, "num_warps": warps} for chunk, warps in choices],
        _SOURCES,
    )
    for name in ("forward", "backward")
    for rows, bits, choices in (
        (16, 16, ((32, 1), (32, 2), (64, 1))),
        (32, 16, ((32, 2), (32, 4), (32, 1))),
        (16, 32, ((32, 4), (32, 2), (32, 8))),
        (32, 32, ((32, 8), (32, 4))),
    )
}


def forward(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, **options) -> Tensor:
    qkv, cos, sin = _dense(qkv, cos, sin)
    output = qkv.new_empty(*qkv.shape[:3], *qkv.shape[4:])
    _launch("forward", (qkv, cos, sin, output), qkv, **options)
    return output


def backward(gradient: Tensor, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, **options) -> Tensor:
    gradient, qkv, cos, sin = _dense(gradient, qkv, cos, sin)
    towards = torch.empty_like(qkv)
    _launch("backward", (gradient, qkv, cos, sin, towards), qkv, **options)
    return towards


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def tile(frames: int, width: int) -> dict[str, int]:
    return {"T": frames, "d": width, "R": 16 if frames <= 16 else 32}


def _launch(name: str, tensors, qkv: Tensor, *, softmax: bool, causal: bool, window: int) -> None:
    batch, frames, places, _, heads, width = qkv.shape
    shape = tile(frames, width)
    programs = batch * triton.cdiv(places, shape["R"] // frames) * heads if frames else 0
    # Float32 products follow PyTorch's own switch.
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    options = {"SOFTMAX": softmax, "CAUSAL": causal, "WINDOW": window, "PRECISION": precision}

    def run(config: Config) -> None:
        kernel = getattr(device_code, name)
        kernel[(programs,)](
            *tensors, places, heads, width**-0.5, **shape, **options, **config, num_stages=NUM_STAGES
        )  # fmt: skip

    if programs:
        key = (frames, width, qkv.dtype, tensors[-3] is None, *options.values())
        with torch.cuda.device_of(qkv):
            run(TUNING[name, shape["R"], 8 * qkv.element_size()].config(key, qkv.device, run))
