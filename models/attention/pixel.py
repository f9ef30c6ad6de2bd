"""Cross-attention of latent cells to the observations inside them (HealDA v2, pixel cross-attention).

Every cell of every frame queries the tokens of its own observations, which `kernels/pixel_attention` finds by prefix
sums; grouped key/value heads are shared by num_heads / num_kv_heads query heads.
Letters: B batch, T frames, X cells a frame, N = B T X, M cells that hold observations, C hidden, q heads of width d.
"""

from __future__ import annotations

from dataclasses import replace

from einops import rearrange
from torch import Tensor, nn

from kernels.dispatch import autocast_dtype
from kernels.pixel_attention import PATHS, pixel_attention, plan
from kernels.segments import Occupied
from models.initialisation import linear_
from models.latents import ObservationContext


class PixelCrossAttention(nn.Module):
    """x (B, T, X, hidden_size) and its observation context -> (B, T, X, hidden_size).

    A cell without observations attends to nothing: it gets the output's bias. Without any observations every parameter
    still gets a zero gradient, not none. bias: of query, value and output; keys have none (it cancels in the softmax).
    path: of the kernel. Raises ValueError when num_heads is no multiple of num_kv_heads.
    """

    def __init__(
        self,
        hidden_size: int,
        token_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool = True,
        path: str = "auto",
    ):
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(
                f"{num_heads} query heads of the pixel attention cannot share {num_kv_heads} key/value heads evenly; "
                "make num_heads a multiple of num_kv_heads"
            )
        if path not in PATHS:
            raise ValueError(f"unknown path {path!r} of pixel attention; allowed: {', '.join(PATHS)}")
        self.num_heads, self.head_dim, self.path = num_heads, head_dim, path
        self.query = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.key = nn.Linear(token_size, num_kv_heads * head_dim, bias=False)
        self.value = nn.Linear(token_size, num_kv_heads * head_dim, bias=bias)
        self.output = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.initialise()

    def initialise(self) -> None:
        for layer in (self.query, self.key, self.value, self.output):
            linear_(layer)

    def planned(self, context: ObservationContext) -> ObservationContext:
        """The context with what this layer and others of its sizes want to know of all cells."""
        if context.occupied is not None:
            return context
        weight = self.query.weight
        query = weight.new_empty(0, self.num_heads, self.head_dim, dtype=autocast_dtype(weight.device, weight.dtype))
        num_rows = context.tokens.shape[0]
        return replace(context, occupied=plan(context.offsets, num_rows, query, self.key.weight, path=self.path))

    def forward(self, x: Tensor, context: ObservationContext) -> Tensor:
        cells = rearrange(x, "b t x c -> (b t x) c")
        context = self.planned(context)
        occupied = context.occupied
        some = isinstance(occupied, Occupied)  # cells without observations take no part in any product
        query = self.query(cells.index_select(0, occupied.cells) if some else cells)
        heads = pixel_attention(
            rearrange(query, "m (q d) -> m q d", q=self.num_heads),
            context.tokens,
            context.offsets,
            self.key.weight,
            self.value.weight,
            self.value.bias,
            scale=self.head_dim**-0.5,
            path=self.path,
            occupied=occupied,
        )
        attended = self.output(heads)  # (M, C), or (N, C), where empty cells have the bias
        if not some:
            return attended.view(x.shape)
        empty = attended.new_zeros(x.shape[3]) if self.output.bias is None else self.output.bias.to(attended.dtype)
        return empty.expand(len(cells), -1).index_copy(0, occupied.cells, attended).view(x.shape)
