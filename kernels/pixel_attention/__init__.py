"""Ragged grouped-query attention: the queries of a cell attend to the observation tokens that lie in it.

For a cell with tokens z_1 .. z_m, query head h and its key/value head g (`q / g` query heads share one, kv-head major):

    w = softmax_i(scale * q_h . Wk_g z_i),    o_h = Wv_g (sum_i w_i z_i) + bv_g;    o_h = 0 where m = 0

Letters: N cells, M occupied cells, n tokens, c token width, d head width, q query heads, g key/value heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import PATHS, chosen_path
from kernels.pixel_attention import launches, vectorised  # noqa: F401 - registers operators
from kernels.pixel_attention.reference import reference
from kernels.segments import Occupied, WorkList

__all__ = ["PATHS", "PRECISIONS", "pixel_attention", "plan"]
PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")


def plan(
    offsets: Tensor, num_rows: int, query: Tensor, key_weight: Tensor, *, path: str = "auto", precision: str = "auto"
) -> Occupied | WorkList:
    """What calls of `pixel_attention` with such a query (N, q, d), of which only sizes, type and device are looked at,
    want to know of all cells; made once, used by every layer. Waits for the device unless the path is triton."""
    path = chosen_path(path, "pixel_attention", query, suits=launches.suits(query, key_weight, precision))
    return WorkList.of(offsets, num_rows) if path == "triton" else Occupied.of(offsets)


def pixel_attention(
    query: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    *,
    scale: float,
    path: str = "auto",
    occupied: Occupied | WorkList | None = None,
    precision: str = "auto",
) -> Tensor:
    """(N, q, d), tokens (n, c) sorted by cell, offsets (N + 1,) int64, (g*d, c), (g*d, c), (g*d,) -> (N, q*d).

    Exact zeros in empty cells. Returned in the query's dtype, deterministic on every path: sums run in a fixed order,
    and no two programs add to one number. path: auto, triton, vectorised, or reference (`kernels/dispatch.py`).
    occupied: `plan(offsets, n, ...)`, made here where it is not given. With an `Occupied` the query holds
    those cells only, in their order, and so does the result: (M, q, d) -> (M, q*d); such calls are never triton's.
    precision of the factors of products on the path triton: fp32, tf32, bf16, fp16, or auto, that of the query, with
    tf32 for float32 where `torch.get_float32_matmul_precision()` is not "highest"; sums are float32. Other paths
    compute in float32 (float64 for float64 queries). The path triton does not serve float64, nor heads, projections
    or tokens wider than `launches.suits` says. Raises ValueError for an unknown path or precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r} of pixel attention; allowed: {', '.join(PRECISIONS)}")
    weights = (key_weight, value_weight, value_bias)
    some = occupied if isinstance(occupied, Occupied) else None
    suits = some is None and launches.suits(query, key_weight, precision)
    path = chosen_path(path, "pixel_attention", query, suits=suits)
    if path == "triton":
        work = occupied if isinstance(occupied, WorkList) else WorkList.of(offsets, tokens.shape[0])
        precision = launches.resolved(precision, query)
        operands = (query, tokens, *weights, work.items, work.count, scale, precision)
        return torch.ops.hydrasphere.pixel_attention_triton(*operands)[0]
    if path == "reference":
        cells = range(len(query)) if some is None else some.cells.tolist()
        return reference(query, tokens, offsets.tolist(), cells, *weights, scale)
    if some is not None:
        blocks = (some.place, some.start, some.length, some.blocks)
        return torch.ops.hydrasphere.pixel_attention(query, tokens, *weights, *blocks, scale)[0]
    some = Occupied.of(offsets)
    result = pixel_attention(
        query.index_select(0, some.cells), tokens, offsets, *weights, scale=scale, path=path, occupied=some
    )
    return result.new_zeros(len(query), result.shape[1]).index_copy(0, some.cells, result)
