"""Real clouds for fields that have none: gaps of a satellite product, laid over another grid so that truth is known.

The gaps of one frame of the product form a pattern. A pattern is continued by its mirror image, resampled to the grid,
shifted and mirrored at random, and stays for some frames. Letters: n frames, H x W cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from data.sources.location import locate
from data.sources.netcdf import open_series

SIMULATED = "synthetic:clouds"
_TRIES = 200  # placements that are drawn until the share of hidden cells is right
_SHAPE, _SMOOTH, _SHARES = (96, 144), 6.0, (0.2, 0.35, 0.5, 0.65, 0.8)  # of simulated patterns


class CloudMasks:
    """Masks (H, W) bool, True = hidden, from the gaps of a file.

    path: a NetCDF file or Zarr store whose first variable has gaps; `synthetic:clouds` simulates them. Cells never
    observed in it are taken to be land, whose part of a pattern is that of the nearest cell of the sea.
    hidden: least and largest share of the cells of a domain that a frame hides. persistence: frames that a pattern
    stays for. tiles: how many times a pattern fits into the domain, down and across; less than 1: a part of it.
    Raises ValueError where a value is not allowed or the file has no such gaps.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        hidden: Sequence[float] = (0.3, 0.9),
        persistence: int = 1,
        tiles: Sequence[float] = (1.0, 1.0),
    ):
        if len(hidden) != 2 or not 0 <= hidden[0] < hidden[1] <= 1:
            raise ValueError(f"task.clouds.hidden={list(hidden)} must be two shares, low and high, like [0.3,0.9]")
        if persistence < 1:
            raise ValueError(f"task.clouds.persistence={persistence} must be at least 1 frame")
        if len(tiles) != 2 or min(tiles) <= 0:
            raise ValueError(f"task.clouds.tiles={list(tiles)} must be two numbers above 0, like [1,1]")
        self.path, self.hidden = path, (float(hidden[0]), float(hidden[1]))
        self.persistence, self.tiles = persistence, (float(tiles[0]), float(tiles[1]))

    @cached_property
    def patterns(self) -> np.ndarray:
        """(p, h, w) bool: gaps of every frame of the file, land filled from the nearest sea."""
        if self.path == SIMULATED:
            return _simulated()
        from scipy.ndimage import distance_transform_edt

        series = open_series(locate(self.path, setting="task.clouds.path"))
        observed = np.isfinite(series.read(np.arange(series.times.size))[:, 0])
        sea = observed.any(axis=0)
        if observed[:, sea].all():
            raise ValueError(f"task.clouds.path={self.path} has no gaps; give a satellite product that clouds hide")
        nearest = distance_transform_edt(~sea, return_distances=False, return_indices=True)
        return ~observed[:, nearest[0], nearest[1]]

    def mask(self, spell: int, domain: np.ndarray, *, draw: int = 0) -> np.ndarray:
        """(H, W) of the frames spell * persistence and following ones. domain: (H, W) bool, cells whose share counts.

        Follows from (draw, spell) alone. Raises ValueError where no pattern hides the wanted share of the domain.
        """
        random = np.random.default_rng((draw, int(spell)))
        low, high = self.hidden
        for _ in range(_TRIES):
            pattern = self.patterns[random.integers(len(self.patterns))]
            rows, columns = (
                _sampled(random, cells, length, tiles)
                for cells, length, tiles in zip(domain.shape, pattern.shape, self.tiles, strict=True)
            )
            mask = pattern[rows[:, None], columns]
            if low <= mask[domain].mean() <= high:
                return mask
        raise ValueError(
            f"no gaps of task.clouds.path={self.path} hide {low:.0%} to {high:.0%} of the domain; widen "
            "task.clouds.hidden"
        )


def _sampled(random: np.random.Generator, cells: int, length: int, tiles: float) -> np.ndarray:
    """(cells,) indices into a pattern that is continued by its mirror image, from a random place, either way."""
    place = random.uniform(0, 2 * length) + (np.arange(cells) + 0.5) * (length * tiles / cells)
    place = (place[::-1] if random.random() < 0.5 else place) % (2 * length)
    return np.minimum(place, 2 * length - 1e-9 - place).astype(np.int64)


def _simulated() -> np.ndarray:
    """(p, h, w) bool: smooth noise below a level."""
    from scipy.ndimage import gaussian_filter

    random = np.random.default_rng(0)
    fields = [gaussian_filter(random.standard_normal(_SHAPE), _SMOOTH) for _ in _SHARES]
    return np.stack([field < np.quantile(field, share) for field, share in zip(fields, _SHARES, strict=True)])
