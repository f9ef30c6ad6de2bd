"""FiLM tokens of scalar observations: what a row is (its description) scales and shifts what it says (its value).

As in Feature-wise Linear Modulation (Perez et al. 2018, arXiv:1709.07871). Letters: n rows, K width of the description,
H hidden, c token width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5


def film_tokenizer(
    value: Tensor,
    description: Tensor,
    expand: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor],
    project: tuple[Tensor, Tensor],
) -> Tensor:
    """value (n,), description (n, K) -> tokens (n, c) = scale(description) * value + shift(description).

    expand, norm, project: weight and bias of K -> H, of the layer norm over H, and of H -> 2 c (scale first). A value
    keeps its precision on every device: tokens are float32 also where autocast computes scale and shift in 16 bits.
    """
    hidden = F.linear(description, *expand)
    hidden = F.silu(F.layer_norm(hidden, hidden.shape[-1:], *norm, eps=NORM_EPS))
    scale, shift = F.linear(hidden, *project).chunk(2, dim=-1)
    return torch.addcmul(shift, scale, value[:, None])
