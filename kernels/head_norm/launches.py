"""How the norm of queries and keys is launched: strides of tokens and heads, and room for the sums of programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import triton
from torch import Tensor

from kernels.head_norm import NORMED, device_code
from kernels.modulated_norm.launches import tile
from kernels.tuning import Config, Tuning

_SOURCES = (Path(__file__), Path(__file__).with_name("device_code.py"))
# Numbers of a tile, 16 a thread and more, and warps.
TUNING = {
    name: Tuning(f"head_norm_{name}", [{"TILE": size, "num_warps": warps} for size, warps in choices], _SOURCES)
    for name, choices in {
        "forward": ((4096, 8), (2048, 4), (4096, 4), (8192, 8)),
        "backward": ((4096, 8), (2048, 4), (2048, 8)),
    }.items()
}
FORWARD_TILES = 4  # of a program
BACKWARD_PROGRAMS = 2048  # about, of a part: their partial sums stay a few percent of the traffic


def forward(packed: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    parts = min(packed.shape[-3], NORMED)
    normed = packed.new_empty(parts, *packed.shape[:-3], *packed.shape[-2:])
    tokens, weight = _tokens(packed), _dense(weight)

    def run(config: Config) -> None:
        shape, rows, steps, programs = _spread(tokens, config, backward=False)
        device_code.norm_forward[(programs, parts)](
            tokens, weight, normed, rows, steps, tokens.shape[1], *_strides(tokens), tokens.stride(2), eps,
            **shape, WEIGHTED=weight is not None, num_warps=config["num_warps"],
        )  # fmt: skip

    _launch("forward", packed, run)
    return normed


def backward(gradients: Sequence[Tensor], packed: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    towards = torch.empty_like(packed, memory_format=torch.contiguous_format)
    tokens, weight, parts = _tokens(packed), _dense(weight), packed.shape[-3]
    given = _alike([_tokens(part[..., None, :, :]) for part in gradients])
    pointers = [given[min(index, parts - 1)] for index in range(NORMED + 1)]
    found = [packed.new_zeros((0,) if weight is None else weight.shape, dtype=torch.float32)]

    def run(config: Config) -> None:
        shape, rows, steps, programs = _spread(tokens, config, backward=True)
        sums = None if weight is None else packed.new_empty(programs, *weight.shape, dtype=torch.float32)
        device_code.norm_backward[(programs, parts)](
            *pointers, tokens, weight, towards, sums, rows, steps, tokens.shape[1],
            *_strides(given[0]), *_strides(tokens), tokens.stride(2), eps,
            **shape, S=parts, NORMED=min(parts, NORMED), WEIGHTED=weight is not None, num_warps=config["num_warps"],
        )  # fmt: skip
        if sums is not None:
            found[0] = sums.sum(dim=0)

    _launch("backward", packed, run)
    return towards, found[0]


def _launch(name: str, packed: Tensor, run) -> None:
    """run: launches the kernel with a configuration; what is written is the same for each."""
    if packed.numel():
        with torch.cuda.device_of(packed):
            run(TUNING[name].config((triton.next_power_of_2(packed.shape[-1]), packed.dtype), packed.device, run))


def _spread(tokens: Tensor, config: Config, *, backward: bool) -> tuple[dict[str, int], int, int, int]:
    """Compile-time numbers, rows (token, head) of a part, tiles of a program, and programs of a part."""
    outer, inner, _, heads, width = tokens.shape
    shape, rows = {"H": heads, "D": width, **tile(width, config)}, outer * inner * heads
    tiles = triton.cdiv(rows, shape["R"])
    steps = max(1, tiles // BACKWARD_PROGRAMS) if backward else FORWARD_TILES
    programs = triton.cdiv(tiles, steps)
    assert programs * steps * shape["R"] < 2**31, "rows are counted in 32 bits, those behind the last included"
    return shape, rows, steps, programs


def _tokens(packed: Tensor) -> Tensor:
    """(..., s, h, d) -> (outer, inner, s, h, d), a view wherever outer tokens lie at one distance."""
    packed = packed if packed.stride(-1) == 1 else packed.contiguous()
    inner = packed.shape[-4] if packed.ndim > 3 else 1
    return packed.reshape(-1 if packed.numel() else 0, inner, *packed.shape[-3:])


def _strides(tokens: Tensor) -> tuple[int, int, int]:
    """Of outer and inner tokens and of heads."""
    return tokens.stride(0), tokens.stride(1), tokens.stride(3)


def _alike(parts: list[Tensor]) -> list[Tensor]:
    """Gradients of one layout, as attention leaves them; others are copied."""
    if len({part.stride() for part in parts}) > 1:
        return [part.contiguous() for part in parts]
    return parts


def _dense(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()
