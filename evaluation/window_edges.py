"""How much a field jumps where windows or patches of a decoder meet, compared with the steps beside.

Letters: H rows, W columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def jump_ratio(image: Tensor, *, axis: int, edges: Tensor) -> float:
    """Mean step (absolute) across edges over the mean of the steps on either side, along an axis of (..., H, W).

    edges: (n,) int64 indices of the cells that follow them, at least two cells from either end. Where one of the three
    steps touches NaN, none counts. 1: nothing is seen of the edges; NaN where there is nothing to compare.
    """
    steps = image.diff(dim=axis).abs().movedim(axis, -1)
    across, beside = steps[..., edges - 1], (steps[..., edges - 2] + steps[..., edges]) / 2
    known = torch.isfinite(across) & torch.isfinite(beside)
    return float(across[known].mean() / beside[known].mean())
