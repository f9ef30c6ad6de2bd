"""Patches of a latitude-longitude, planar or HEALPix grid: how cells map to latent cells.

Shared by grid encoders, decoders and adapters.

A grid whose sides are no multiples of the patch is padded evenly; where the columns close around the globe the padding
of the columns is the other end of the row. Letters: B batch, C channels, H x W cells, p x q patch, N = rows x columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from data.grids import ROWS_AND_COLUMNS, Grid
from data.healpix import HEALPixGrid, nest_to_ring, padxy_to_nest
from models.latents import LatentLayout
from models.positions.fourier import unit_sphere
from models.positions.tables import Tables


@dataclass(frozen=True)
class Patches:
    """size: cells a patch. top, left: padding before the first row and column. rows, columns: of the latent grid."""

    grid: Grid
    size: tuple[int, int]
    rows: int
    columns: int
    top: int
    left: int

    @staticmethod
    def of(grid: Grid, patch_size: int | tuple[int, int]) -> Patches:
        """Raises ValueError for grids without rows and columns and for patches smaller than a cell."""
        size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(
                f"patch_size={patch_size} must be one or two cell counts of at least 1, like model.patch_size=4"
            )
        if not isinstance(grid, ROWS_AND_COLUMNS):
            raise ValueError(f"patches need a grid of rows and columns, not {grid.kind}; use model/encoder=perceiver")
        rows, columns = (-(-side // cells) for side, cells in zip(grid.shape, size, strict=True))
        top, left = ((n * cells - side) // 2 for n, cells, side in zip((rows, columns), size, grid.shape, strict=True))
        return Patches(grid, size, rows, columns, top, left)

    @property
    def wraps(self) -> bool:
        return self.grid.wraps

    @property
    def num_tokens(self) -> int:
        return self.rows * self.columns

    @property
    def images(self) -> tuple[int, int, int]:
        """Images a sample is made of, their rows and columns of latent cells."""
        return 1, self.rows, self.columns

    @property
    def padded(self) -> bool:
        return (self.rows * self.size[0], self.columns * self.size[1]) != self.grid.shape

    @property
    def coordinates(self) -> Tensor:
        """(N, 2) centres of the patches; padding extends the grid's spacing, latitude stays within +-90."""
        down, across = _axes(self.grid)
        down = _extended(down, self.rows, self.size[0], self.top)
        across = _extended(across, self.columns, self.size[1], self.left)
        if self.grid.geographic:
            down = down.clip(-90, 90)
        centres = np.stack(np.meshgrid(down, across, indexing="ij"), axis=-1)
        return torch.from_numpy(centres.reshape(-1, 2))

    def locate(self, coordinates: Tensor) -> np.ndarray:
        """(P, 2) places -> (P, 2) float positions in latent cells: cell (r, c) spans r..r+1 and c..c+1."""
        y, x = coordinates.double().cpu().numpy().T
        if self.grid.geographic:
            middle = self.grid.longitude_bounds[[0, -1]].mean()  # places outside a region belong to its nearer side
            x = middle + (x - middle + 180) % 360 - 180
        down, across = _axes(self.grid)
        row, column = _fractional_index(down, y), _fractional_index(across, x)
        return np.stack([(row + self.top + 0.5) / self.size[0], (column + self.left + 0.5) / self.size[1]], axis=-1)

    def latent_layout(self, hidden_size: int, frames: int = 1) -> LatentLayout:
        return LatentLayout(
            num_tokens=self.num_tokens,
            hidden_size=hidden_size,
            frames=frames,
            grid_shape=(self.rows, self.columns),
            patch_size=self.size,
            coordinates=self.coordinates,
            wraps=self.wraps,
            grid=self.grid,
        )

    def cell_of(self, coordinates: Tensor) -> Tensor:
        """(n, 2) places -> (n,) int64 latent cells, -1 outside the grid."""
        cell = self.grid.cell_of(coordinates)
        width = self.grid.shape[1]
        row, column = ((cell // width + self.top) // self.size[0], (cell % width + self.left) // self.size[1])
        return torch.where(cell >= 0, row * self.columns + column, -1)

    def to_images(self, values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, rows p, columns q), what a convolution with the patch as kernel and stride reads."""
        return self.pad(values)

    def from_images(self, images: Tensor) -> Tensor:
        """The inverse of `to_images`, without the padding."""
        return self.crop(images)

    def pad(self, values: Tensor, margin: int = 0) -> Tensor:
        """(B, C, H, W) -> (B, C, rows p + 2 margin, columns q + 2 margin); zeros outside, other end where it wraps."""
        height, width = values.shape[-2:]
        bottom = self.rows * self.size[0] - height - self.top
        right = self.columns * self.size[1] - width - self.left
        if self.wraps:
            columns = torch.arange(-self.left - margin, width + right + margin, device=values.device) % width
            values = values[..., columns]
            return F.pad(values, (0, 0, self.top + margin, bottom + margin))
        return F.pad(values, (self.left + margin, right + margin, self.top + margin, bottom + margin))

    def unfold(self, values: Tensor, context: int = 0) -> Tensor:
        """(B, C, H, W) -> (B, N, C (p + 2 context) (q + 2 context)): each patch with `context` cells around it."""
        kernel = (self.size[0] + 2 * context, self.size[1] + 2 * context)
        return F.unfold(self.pad(values, context), kernel, stride=self.size).transpose(1, 2)

    def centres(self, coordinates: Tensor) -> Tensor:
        """(B, H, W, 2) degrees of the cells of crops -> (B, N, 2) of the patches; those beyond the edge repeat it."""
        height, width = coordinates.shape[1:3]
        rows = torch.arange(self.rows * self.size[0], device=coordinates.device) - self.top
        columns = torch.arange(self.columns * self.size[1], device=coordinates.device) - self.left
        columns = columns % width if self.wraps else columns.clamp(0, width - 1)
        places = unit_sphere(coordinates.double())[:, rows.clamp(0, height - 1)][:, :, columns]
        p, q = self.size
        middle = reduce(places, "b (r p) (c q) xyz -> b (r c) xyz", "mean", p=p, q=q)
        x, y, z = middle.unbind(-1)
        return torch.rad2deg(torch.stack([torch.atan2(z, torch.hypot(x, y)), torch.atan2(y, x)], dim=-1))

    def crop(self, values: Tensor) -> Tensor:
        """(..., rows p, columns q) -> (..., H, W): drops the padding."""
        height, width = self.grid.shape
        return values[..., self.top : self.top + height, self.left : self.left + width]


class HEALPixPatches(Tables):
    """Patches of a HEALPix grid: the cells of a coarser one, each a square of p x p cells in its face (p a power of 2).

    Tokens are in pad-XY order (`data/healpix/`), in which the children of a cell are a square of the fine face.
    Raises ValueError for other patch sizes.
    """

    wraps = True

    def __init__(self, grid: HEALPixGrid, patch_size: int | tuple[int, int]):
        super().__init__()
        size = patch_size if isinstance(patch_size, int) else patch_size[0]
        levels = int(size).bit_length() - 1
        if size < 1 or size != 2**levels or levels > grid.level:
            raise ValueError(
                f"patch_size={patch_size} must be a power of 2 up to {2**grid.level} on a HEALPix grid of level "
                f"{grid.level}, like model.patch_size=2"
            )
        self.grid, self.size = grid, (size, size)
        self.cells = HEALPixGrid(grid.level - levels, "padxy")
        self.num_tokens = self.cells.num_points
        self.images = (12, 2**self.cells.level, 2**self.cells.level)  # faces, rows, columns of latent cells
        order = inverse = None
        if grid.order != "padxy":
            flat = torch.arange(grid.num_points, device="cpu")
            nest = padxy_to_nest(flat, grid.level)
            order = nest if grid.order == "nest" else nest_to_ring(nest, grid.level)
            inverse = torch.argsort(order)
        self.table("order", order)  # where each pad-XY cell is in the grid, or None
        self.table("inverse", inverse)

    @property
    def coordinates(self) -> Tensor:
        """(N, 2) centres of the patches in degrees."""
        return self.cells.coordinates

    def cell_of(self, coordinates: Tensor) -> Tensor:
        """(n, 2) degrees -> (n,) int64 latent cells, -1 where a coordinate is not finite."""
        return self.cells.cell_of(coordinates)

    def latent_layout(self, hidden_size: int, frames: int = 1) -> LatentLayout:
        return LatentLayout(
            num_tokens=self.num_tokens,
            hidden_size=hidden_size,
            frames=frames,
            patch_size=self.size,
            coordinates=self.coordinates,
            grid=self.grid,
        )

    def to_images(self, values: Tensor) -> Tensor:
        """(B, C, cells) -> (B 12, C, n, n), the twelve faces."""
        if self.order is not None:
            values = values[..., self.order]
        n = 2**self.grid.level
        return rearrange(values, "b c (f h w) -> (b f) c h w", f=12, h=n, w=n)

    def from_images(self, images: Tensor) -> Tensor:
        """(B 12, C, n, n) -> (B, C, cells): the inverse of `to_images`."""
        values = rearrange(images, "(b f) c h w -> b c (f h w)", f=12)
        return values if self.inverse is None else values[..., self.inverse]


def patches_of(grid: Grid, patch_size: int | tuple[int, int]) -> Patches | HEALPixPatches:
    """Raises ValueError for grids that cannot be cut into patches and for sizes that do not fit."""
    return HEALPixPatches(grid, patch_size) if isinstance(grid, HEALPixGrid) else Patches.of(grid, patch_size)


def neighbourhoods(values: Tensor, size: int, *, wraps: bool) -> Tensor:
    """(B, C, H, W) -> (B, H W, C size size): the size x size (odd) cells around every cell, zeros outside."""
    margin = size // 2
    if wraps:
        width = values.shape[-1]
        columns = torch.arange(-margin, width + margin, device=values.device) % width
        values = F.pad(values[..., columns], (0, 0, margin, margin))
    else:
        values = F.pad(values, (margin,) * 4)
    return F.unfold(values, size).transpose(1, 2)


def _axes(grid: ROWS_AND_COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the rows and of the columns."""
    return (grid.latitude, grid.longitude) if grid.geographic else (grid.y, grid.x)


def _extended(axis: np.ndarray, patches: int, cells: int, before: int) -> np.ndarray:
    """Centres (patches,) of groups of `cells` along an axis that continues beyond its ends with its last spacing."""
    index = np.arange(patches) * cells + (cells - 1) / 2 - before
    if axis.size == 1:
        return np.full(patches, axis[0])
    first, last = axis[1] - axis[0], axis[-1] - axis[-2]
    inside = np.interp(index, np.arange(axis.size), axis)
    return inside + np.minimum(index, 0) * first + np.maximum(index - (axis.size - 1), 0) * last


def _fractional_index(axis: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Where values fall between the entries of a monotonic axis, continued beyond its ends with its last spacing."""
    if axis.size == 1:
        return np.zeros_like(values)
    index = np.arange(axis.size, dtype=np.float64)
    if axis[0] > axis[-1]:
        axis, values = -axis, -values
    inside = np.interp(values, axis, index)
    below, above = np.minimum(values - axis[0], 0), np.maximum(values - axis[-1], 0)
    return inside + below / (axis[1] - axis[0]) + above / (axis[-1] - axis[-2])
