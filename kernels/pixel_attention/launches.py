"""Launches of the Triton kernels of pixel attention (`device_code.py`), as operators with gradients.

Letters: N cells, S items, n tokens, c token width, d head width, q query heads, g key/value heads.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from kernels.segments import most_pieces
from kernels.tuning import Config, Tuning

BITS = {"fp32": 32, "tf32": 32, "bf16": 16, "fp16": 16}
WIDEST = 128  # query heads, columns of the keys of all heads (g d), and of tokens: a tile holds all of them
MOST_EXACT = 2**18  # product of these without tensor cores: more takes minutes to compile and spills kilobytes a thread
JOINED_ROWS, ADDED_NUMBERS = 16, 512  # of a program of the passes that bring pieces together
ADDED_PIECES = 16  # that it reads at once
JOINED_NUMBERS = 512  # of a head, that it reads at once: 16 pieces of 32 numbers; 16 of 128 would spill registers
JOINING = 4  # such programs a multiprocessor: mostly they find nothing to do
INTERPRETED_PROGRAMS = 3  # on the CPU, for tests: fewer than items, so that programs take several
_SOURCES = (Path(__file__), Path(__file__).with_name("device_code.py"))


def _tuning(name: str, *choices: tuple[int, ...]) -> Tuning:
    names = ("TILE", "num_warps", "num_stages", "programs")
    return Tuning(f"pixel_attention_{name}", [dict(zip(names, choice, strict=True)) for choice in choices], _SOURCES)


# Tokens of a tile, warps, stages and programs a multiprocessor, for products of 16 and of 32 bits. At the sizes of
# HealDA v2 the first of each spills no registers (exact float32, backward: 48 bytes a thread, none in the loop over
# tokens).
# Wide: more than 64 heads, or keys of all heads wider than 64. Nothing is spilled there either with 128 heads of 2
# groups or 64 of 4 (exact float32, backward: 800 bytes a thread).
FORWARD = {
    "16": _tuning("forward_16", (64, 4, 3, 4), (64, 4, 2, 6), (32, 4, 3, 4), (32, 4, 2, 8), (128, 8, 2, 2)),
    "16_wide": _tuning("forward_16_wide", (64, 4, 3, 2), (64, 8, 2, 1), (32, 8, 2, 1)),
    "32": _tuning("forward_32", (32, 4, 3, 4), (64, 4, 2, 3), (32, 4, 2, 2)),
    "32_wide": _tuning("forward_32_wide", (32, 8, 2, 1), (64, 8, 2, 1)),
}
BACKWARD = {
    "16": _tuning("backward_16", (32, 4, 2, 2), (16, 4, 3, 2), (32, 4, 3, 2), (64, 8, 2, 1), (64, 4, 2, 2)),
    "16_wide": _tuning("backward_16_wide", (32, 8, 2, 1), (16, 8, 2, 1)),
    "32": _tuning("backward_32", (16, 4, 2, 2), (16, 8, 2, 1), (32, 4, 3, 2)),
    "32_wide": _tuning("backward_32_wide", (32, 8, 2, 1), (16, 8, 2, 1)),
}


def kind(precision: str, constant: dict) -> str:
    """Whose configurations a call takes."""
    return f"{BITS[precision]}_wide" if max(constant["H"], constant["E"]) > 64 else str(BITS[precision])


def suits(query: Tensor, key_weight: Tensor, precision: str) -> bool:
    sizes = (query.shape[1], *key_weight.shape)
    return max(sizes) <= WIDEST and (resolved(precision, query) != "fp32" or math.prod(sizes) <= MOST_EXACT)


def resolved(precision: str, query: Tensor) -> str:
    """`precision` without auto."""
    if precision != "auto":
        return precision
    if query.dtype != torch.float32:
        return "bf16" if query.dtype == torch.bfloat16 else "fp16"
    exact = query.device.type == "cpu" or torch.get_float32_matmul_precision() == "highest"
    return "fp32" if exact else "tf32"


def constants(heads: int, width: int, key_weight: Tensor, precision: str, bias: bool) -> dict:
    """What kernels are compiled for: sizes, padded sizes, and the type of products."""
    import triton
    import triton.language as tl

    rows, columns = key_weight.shape
    padded = {
        name: max(16, triton.next_power_of_2(size))
        for name, size in (("H", heads), ("E", rows), ("C", columns), ("W", width))
    }
    types = {"bf16": tl.bfloat16, "fp16": tl.float16}
    return {
        "HEADS": heads,
        "GROUPS": rows // width,
        "WIDTH": width,
        "COLUMNS": columns,
        "BIAS": bias,
        **padded,
        "TYPE": types.get(precision, tl.float32),
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
    }


def joined_pieces(constant: dict) -> int:
    """Pieces that a program of `join` reads at once."""
    return JOINED_NUMBERS // constant["C"]


def _programs(most: int, each: int, device: torch.device) -> int:
    """As many as there may be items, but no more than `each` a multiprocessor."""
    if device.type != "cuda":
        return max(min(most, INTERPRETED_PROGRAMS), 1)
    return max(min(most, each * torch.cuda.get_device_properties(device).multi_processor_count), 1)


def _options(config: Config) -> dict[str, int]:
    return {name: number for name, number in config.items() if name != "programs"}


def _key(query: Tensor, tokens: Tensor, constant: dict) -> tuple:
    """Calls with so many tokens a cell, to a factor of 4, are alike."""
    crowd = round(math.log(max(len(tokens) / max(len(query), 1), 1), 4))
    sizes = (constant["H"], constant["E"], constant["C"], constant["TYPE"], constant["PRECISION"])
    return (*sizes, query.dtype, tokens.dtype, f"4^{crowd}")


@torch.library.custom_op("hydrasphere::pixel_attention_triton", mutates_args=())
def _forward(
    query: Tensor,
    tokens: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    items: Tensor,
    count: Tensor,
    scale: float,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Output (N, q*d) and, for the backward pass, log2 of the softmax's denominator (N, q) float32."""
    from kernels.pixel_attention import device_code

    query, tokens, key_weight, value_weight = (x.contiguous() for x in (query, tokens, key_weight, value_weight))
    cells, heads, width = query.shape
    constant = constants(heads, width, key_weight, precision, value_bias is not None)
    output = query.new_empty(cells, heads * width)
    logsum = query.new_empty(cells, heads, dtype=torch.float32)
    bias = value_weight if value_bias is None else value_bias.contiguous()  # any address where there is none
    pieces = most_pieces(len(tokens))
    means = query.new_empty(pieces, constant["H"], constant["C"], dtype=torch.float32)
    logs = query.new_empty(pieces, constant["H"], dtype=torch.float32)
    given = (query, tokens, key_weight, value_weight, bias, items, count, output, logsum, means, logs, scale)

    def launch(config: Config) -> None:
        programs = _programs(len(items), config["programs"], query.device)
        device_code.attend[(programs,)](*given, **constant, **_options(config))

    with torch.cuda.device_of(query):
        launch(FORWARD[kind(precision, constant)].config(_key(query, tokens, constant), query.device, launch))
        if pieces:
            programs = _programs(pieces, JOINING, query.device)
            device_code.join[(programs, constant["H"] // JOINED_ROWS)](
                *(means, logs, value_weight, bias, items, count, output, logsum),
                **constant,
                ROWS=JOINED_ROWS,
                PIECES=joined_pieces(constant),
            )
    return output, logsum


@_forward.register_fake
def _(query, tokens, key_weight, value_weight, value_bias, items, count, scale, precision):
    cells, heads, width = query.shape
    return query.new_empty(cells, heads * width), query.new_empty(cells, heads, dtype=torch.float32)


@torch.library.custom_op("hydrasphere::pixel_attention_triton_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    output: Tensor,
    logsum: Tensor,
    query: Tensor,
    tokens: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    items: Tensor,
    count: Tensor,
    scale: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, tokens, key_weight, value_weight and value_bias; weights of tokens are computed again."""
    from kernels.pixel_attention import device_code

    gradient, query, tokens, key_weight, value_weight = (
        x.contiguous() for x in (gradient, query, tokens, key_weight, value_weight)
    )
    heads, width = query.shape[1:]
    rows, columns = key_weight.shape
    constant = constants(heads, width, key_weight, precision, value_bias is not None)
    query_gradient, token_gradient = torch.empty_like(query), torch.empty_like(tokens)
    bias = value_weight if value_bias is None else value_bias.contiguous()
    pieces = most_pieces(len(tokens))
    piece_gradient = query.new_empty(pieces, heads * width, dtype=torch.float32)
    padded = (constant["E"], constant["C"])
    sums: list[Tensor] = []

    def launch(config: Config) -> None:
        programs = _programs(len(items), config["programs"], query.device)
        sums[:] = (
            query.new_empty(programs, 2, *padded, dtype=torch.float32),
            query.new_empty(programs, padded[0], dtype=torch.float32),
        )
        device_code.attend_backward[(programs,)](
            *(gradient, output, logsum, query, tokens, key_weight, value_weight, bias, items, count),
            *(query_gradient, token_gradient, piece_gradient, *sums, len(tokens), scale),
            **constant,
            **_options(config),
        )

    with torch.cuda.device_of(query):
        launch(BACKWARD[kind(precision, constant)].config(_key(query, tokens, constant), query.device, launch))
        if pieces:
            blocks = math.ceil(heads * width / ADDED_NUMBERS)
            device_code.add_pieces[(_programs(pieces, JOINING, query.device), blocks)](
                piece_gradient,
                items,
                count,
                query_gradient,
                NUMBERS=heads * width,
                BLOCK=ADDED_NUMBERS,
                PIECES=ADDED_PIECES,
            )
    key_gradient, value_gradient = sums[0].sum(0)[:, :rows, :columns]
    return (
        query_gradient,
        token_gradient,
        key_gradient.to(key_weight.dtype, copy=True),
        value_gradient.to(value_weight.dtype, copy=True),
        sums[1].sum(0)[:rows].to(value_weight.dtype, copy=True),
    )


@_backward.register_fake
def _(gradient, output, logsum, query, tokens, key_weight, value_weight, *rest):
    like = [x.new_empty(x.shape) for x in (query, tokens, key_weight, value_weight)]
    return (*like, value_weight.new_empty(value_weight.shape[0]))


def _setup(ctx, inputs, output):
    *tensors, ctx.scale, ctx.precision = inputs
    ctx.save_for_backward(*output, *tensors)


def _gradients(ctx, gradient, _):
    output, logsum, *tensors = ctx.saved_tensors
    options = (ctx.scale, ctx.precision)
    *parts, bias = torch.ops.hydrasphere.pixel_attention_triton_backward(gradient, output, logsum, *tensors, *options)
    return *parts, None if tensors[4] is None else bias, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
