"""How `temporal_attention` is launched: the tile of a program follows from the number of frames and the head width."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.temporal_attention import device_code

CHUNK = 32  # columns at a time: both halves of rotated ones fill a product of tensor cores
NUM_STAGES = 1  # loops are short: copies ahead cost more registers than they hide


def forward(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, **options) -> Tensor:
    qkv = qkv.contiguous()
    output = qkv.new_empty(*qkv.shape[:3], *qkv.shape[4:])
    _launch(device_code.forward, (qkv, cos, sin, output), qkv, **options)
    return output


def backward(gradient: Tensor, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, **options) -> Tensor:
    gradient, qkv = gradient.contiguous(), qkv.contiguous()
    towards = torch.empty_like(qkv)
    _launch(device_code.backward, (gradient, qkv, cos, sin, towards), qkv, **options)
    return towards


def tile(frames: int, width: int) -> dict[str, int]:
    return {"T": frames, "d": width, "R": 16 if frames <= 16 else 32, "CHUNK": CHUNK}


def num_warps(rows: int, bits: int) -> int:
    """Products of 16 rows of 16 bits are one warp's: more warps would hold copies of the same operands."""
    return rows // 16 if bits == 16 else rows // 4


def _launch(kernel, tensors, qkv: Tensor, *, softmax: bool, causal: bool, window: int) -> None:
    batch, frames, places, _, heads, width = qkv.shape
    shape = tile(frames, width)
    programs = batch * triton.cdiv(places, shape["R"] // frames) * heads if frames else 0
    if programs:
        # Float32 products follow PyTorch's own switch.
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        options = {"SOFTMAX": softmax, "CAUSAL": causal, "WINDOW": window, "PRECISION": precision}
        launch = {"num_warps": num_warps(shape["R"], 8 * qkv.element_size()), "num_stages": NUM_STAGES}
        with torch.cuda.device_of(qkv):
            kernel[(programs,)](*tensors, places, heads, width**-0.5, **shape, **options, **launch)
