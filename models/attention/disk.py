"""Attention of every token to those within a distance of it on the sphere: the same disk everywhere, whatever the grid.

Tokens are sorted along the NEST curve of HEALPix (Gorski et al. 2005, ApJ 622, 759), by the cell of a very fine level
that holds each one, so that neighbours in the sequence are neighbours on the sphere, on any grid; on HEALPix itself
this is NEST order. Blocks of that sequence then read few others. Every backend gives the result of the dense mask.
Letters: B batch, h heads, N tokens, d head width, G groups of r tokens, Q blocks.

auto         on CUDA flex, for 16 and 32 bit and heads of at least 16 numbers; elsewhere blockwise
flex         torch's flex_attention over blocks of 128 tokens, skipping those beyond the disk (CUDA)
blockwise    for groups of 64 tokens, the list of all tokens that any of them reads (`models/attention/gathered.py`)
all others   the dense mask (N, N) as a bias of `attend`: small grids only
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from data.healpix import angles_to_cell
from models.attention.backends import attend, compiled_flex, require_backend
from models.attention.gathered import Groups, gathered_attention
from models.positions.fourier import unit_sphere
from models.positions.tables import Tables

_FINEST = 29  # HEALPix level whose cells order the tokens
_ROWS = 64  # tokens of a group: 8 x 8 cells of a HEALPix face
_BLOCK = 128  # of flex_attention
_SLACK = 1e-9  # relative, of the radius: places exactly as far as the radius are inside, however they are rounded
_MIN_FLEX_WIDTH = 16


class Disk(Tables):
    """Which tokens are within `radius` degrees (great circle) of each other, for all layers of a model.

    coordinates: (N, 2) latitudes and longitudes in degrees. A radius below the spacing leaves each token itself.
    Raises ValueError unless the radius is a finite number above 0.
    """

    def __init__(self, coordinates: Tensor | None, radius: float):
        super().__init__()
        if not 0 < radius < math.inf:
            raise ValueError(
                f"model.processor.radius={radius} must be a distance above 0 in degrees, or null for everywhere"
            )
        if coordinates is None:
            raise ValueError(
                f"model.processor.radius={radius} needs tokens with places, and these latents are free; "
                "use model/encoder=video_patch or model.processor.radius=null"
            )
        with torch.device("cpu"):  # tables hold numbers even where the model is made on the meta device
            places = coordinates.detach().double().cpu()
            order = torch.argsort(angles_to_cell(*places.unbind(dim=-1), _FINEST, "nest"), stable=True)
            vectors = unit_sphere(places[order])
            self.angle = math.radians(min(radius, 180.0))
            self.cosine = math.cos(min(self.angle * (1 + _SLACK), math.pi)) - 1e-15  # of a place and itself: 1 - 4e-16
            lists, pairs = self._neighbours(vectors)
            self.sizes = [keys.numel() for keys in lists]
            self.table("order", order)  # (N,) where each sorted token is
            self.table("place", torch.argsort(order))  # (N,) where each token is sorted to
            self.table("vectors", vectors)  # (N, 3) of sorted tokens
            self.table("keys", torch.cat(lists))  # lists of all groups in a row
            length = vectors.shape[0]
            sizes = torch.full((pairs.shape[0],), _BLOCK).clamp(max=length - _BLOCK * torch.arange(pairs.shape[0]))
            whole = pairs == sizes[:, None] * sizes
            for name, blocks in (("some", (pairs > 0) & ~whole), ("whole", whole), ("any", pairs > 0)):
                self.table(f"{name}_count", blocks.sum(dim=-1, dtype=torch.int32))  # (Q,)
                self.table(f"{name}_index", blocks.int().argsort(dim=-1, descending=True, stable=True).int())  # (Q, Q)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        key_mask: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """(B, h, N, d) each -> (B, h, N, d). key_mask: (B, N) bool, True = keep; masked keys must be finite.

        A row without any key in its disk gives exact zeros. Raises ValueError where the device refuses the backend.
        """
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast their norms widen them
        if backend == "auto":
            backend = "flex" if self._suits_flex(query) else "blockwise"
        require_backend(backend, query.device)
        if backend not in ("flex", "blockwise"):
            return self._dense(query, key, value, scale=scale, key_mask=key_mask, backend=backend)
        query, key, value = (x[:, :, self.order] for x in (query, key, value))
        key_mask = None if key_mask is None else key_mask[:, self.order]
        if backend == "flex":
            attended = self._flex(query, key, value, scale=scale, key_mask=key_mask)
        else:
            groups = Groups(_ROWS, self.keys.split(self.sizes), self._reads)
            attended = gathered_attention(query, key, value, groups, scale=scale, key_mask=key_mask)
        return attended[:, :, self.place]

    def dense(self) -> Tensor:
        """(N, N) bool, which tokens read which, in their own order."""
        vectors = self.vectors[self.place]
        return vectors @ vectors.mT >= self.cosine

    def _suits_flex(self, query: Tensor) -> bool:
        return query.is_cuda and query.dtype != torch.float64 and query.shape[3] >= _MIN_FLEX_WIDTH

    def _reads(self, rows: slice, keys: Tensor) -> Tensor:
        return self.vectors[rows] @ self.vectors[keys].mT >= self.cosine

    def _neighbours(self, vectors: Tensor) -> tuple[list[Tensor], Tensor]:
        """The tokens that each group reads, and (Q, Q) how many pairs of two blocks are within the disk."""
        groups = vectors.split(_ROWS)
        tokens = torch.arange(vectors.shape[0]).split(_ROWS)
        # A group lies in a cap around its most central token; caps too far apart hold no pair.
        centres = torch.stack([group[(group @ group.mean(dim=0)).argmax()] for group in groups])
        reach = torch.stack([_angle(group @ centre).max() for group, centre in zip(groups, centres, strict=True)])
        near = _angle(centres @ centres.mT) <= self.angle * (1 + _SLACK) + reach[:, None] + reach + 1e-6
        blocks = -(-vectors.shape[0] // _BLOCK)
        lists, pairs = [], torch.zeros(blocks, blocks, dtype=torch.int64)
        for index, group in enumerate(groups):
            candidates = torch.cat([tokens[other] for other in near[index].nonzero()[:, 0].tolist()])
            count = (group @ vectors[candidates].mT >= self.cosine).sum(dim=0)
            lists.append(candidates[count > 0])
            pairs[index * _ROWS // _BLOCK].index_add_(0, candidates // _BLOCK, count)
        return lists, pairs

    def _flex(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, key_mask: Tensor | None) -> Tensor:
        return compiled_flex()(query, key, value, block_mask=self.block_mask(key_mask), scale=scale)

    def block_mask(self, key_mask: Tensor | None = None):
        """The disk as flex_attention's `BlockMask`. key_mask: (B, N), of sorted tokens."""
        from torch.nn.attention.flex_attention import BlockMask

        x, y, z = self.vectors.mT.contiguous()
        cosine = self.cosine

        def within(batch, head, row, column):
            near = x[row] * x[column] + y[row] * y[column] + z[row] * z[column] >= cosine
            return near if key_mask is None else near & key_mask[batch, column]

        tables = [self.some_count, self.some_index, self.whole_count, self.whole_index]
        if key_mask is not None:  # whole blocks hold masked keys too: every pair is looked at
            tables = [self.any_count, self.any_index, None, None]
        length = self.vectors.shape[0]
        return BlockMask.from_kv_blocks(
            *(table if table is None else table[None, None] for table in tables),
            BLOCK_SIZE=_BLOCK,
            mask_mod=within,
            seq_lengths=(length, length),
        )

    def _dense(self, query, key, value, *, scale, key_mask, backend):
        reads = self.dense()
        if key_mask is None:
            bias = torch.where(reads, 0.0, -torch.inf)
            return attend(query, key, value, scale=scale, bias=bias, backend=backend)
        reads = reads & key_mask[:, None]  # (B, N, N)
        seen = reads.any(dim=-1, keepdim=True)
        bias = rearrange(torch.where(reads | ~seen, 0.0, -torch.inf), "b n m -> b 1 n m")
        return torch.where(seen[:, None], attend(query, key, value, scale=scale, bias=bias, backend=backend), 0.0)


def _angle(cosine: Tensor) -> Tensor:
    return cosine.clamp(-1, 1).acos()
