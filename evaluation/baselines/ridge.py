"""Local ridge regression: the linear forecast to beat.

The anomaly at a cell and lead time is a linear function of the anomalies in the 9 x 9 cells around it at the last three
frames (243 predictors; no intercept, for anomalies have none), fitted per cell and variable:

    c = (X'X + alpha g I)^-1 X'y,   g = sum over training windows of the cell's own squared anomaly,

with one alpha per lead time and variable, the best of `ALPHAS` in cross-validation over six consecutive parts of the
training period at up to 48 cells. Missing predictors count as no anomaly; where targets are missing, X'y is scaled up
to the full number of windows. Columns close around the globe where the grid does; beyond its other edges there is none.

Cost is bounded by rule: at most 1,536 cells (over all variables) are fitted, every s-th row and column, and the others
use the coefficients of the nearest fitted cell; anomalies in memory are held below 1 GB by taking fewer frames from the
beginning of each of the six parts. Fitted coefficients stay in the cache folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.datasets.cache import time_blocks
from data.sources.location import cache_folder
from evaluation.baselines.situation import LAGS, Situation, Unsuitable

RADIUS = 4
ALPHAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
PARTS = 6
MAX_CELLS, MAX_TRIAL_CELLS = 1536, 48
MAX_BYTES = 2**30
_WIDTH = 2 * RADIUS + 1
_VERSION = 1  # of the cached coefficients


class LocalRidge:
    """coefficients: (L, C, cells, 243), lag-major, rows before columns. nearest: (H, W) int64, the fitted cell whose
    coefficients a cell uses. wraps: columns close around the globe. alphas: (L, C), chosen by cross-validation."""

    def __init__(self, coefficients: Tensor, nearest: Tensor, wraps: bool, alphas: Tensor):
        self.coefficients, self.nearest, self.wraps, self.alphas = coefficients, nearest, wraps, alphas

    @classmethod
    def fit(cls, data, normalisation, *, lead_steps: Sequence[int], split: str) -> LocalRidge:
        """Fits on the training period (without the frames of `split`), or reads what an equal fit left in the cache."""
        from safetensors.torch import load_file, save_file

        if not hasattr(data.grid, "wraps"):
            raise Unsuitable(f"it reads the cells around in rows and columns, and this grid is {data.grid.kind}")
        frames = np.setdiff1d(data.training_period, data.splits[split])
        lead_steps = tuple(int(step) for step in lead_steps)
        rows, columns = _fitted_axes(data)
        path = (
            cache_folder("baselines")
            / f"ridge_{_digest(data, normalisation, frames, lead_steps, rows, columns)}.safetensors"
        )
        if path.exists():
            stored = load_file(path)
        else:
            stored = _fit(data, normalisation, frames, lead_steps, rows, columns)
            beside = path.with_name(f".{path.name}.{os.getpid()}")
            save_file(stored, beside)
            os.replace(beside, path)
        height, width = data.grid.shape
        nearest = _nearest(rows, height)[:, None] * columns.size + _nearest(columns, width, data.grid.wraps)[None, :]
        return cls(stored["coefficients"], torch.from_numpy(nearest), data.grid.wraps, stored["alphas"])

    def forecast(self, known: Situation) -> Tensor:
        """(B, L, C, H, W) physical units."""
        batch, _, channels, height, width = known.anomalies.shape
        padded = _padded(known.anomalies.nan_to_num(0.0), self.wraps)
        forecast = known.climatology.clone()
        for row in range(height):
            strip = padded[..., row : row + _WIDTH, :].unfold(-1, _WIDTH, 1)  # (B, lags, C, 9, W, 9)
            predictors = strip.permute(2, 4, 0, 1, 3, 5).reshape(channels, width, batch, -1)
            coefficients = self.coefficients[:, :, self.nearest[row]].permute(1, 2, 3, 0)  # (C, W, 243, L)
            forecast[..., row, :] += (predictors @ coefficients).permute(2, 3, 0, 1)
        return forecast


@dataclass(frozen=True)
class _Problem:
    """The training anomalies of one variable. cells: positions in the padded grid, ascending; anomalies: (n, cells), 0
    where missing; bases, parts: windows and the part of the period each belongs to; observed: like anomalies, bool."""

    cells: np.ndarray
    anomalies: Tensor
    observed: Tensor
    bases: np.ndarray
    parts: np.ndarray
    steps: tuple[int, ...]
    padded_width: int

    def tile(self, rows: np.ndarray, columns: np.ndarray) -> _Tile:
        """Normal equations of the cells rows x columns (indices into the unpadded grid), one Gram matrix for all."""
        reach = np.arange(_WIDTH)
        tile_rows = np.unique(rows[:, None] + reach)
        tile_columns = np.unique(columns[:, None] + reach)
        covered = (tile_rows[:, None] * self.padded_width + tile_columns).ravel()
        patches = ((rows[:, None] + reach)[:, None, :, None] * self.padded_width) + (columns[:, None] + reach)[:, None]
        patches = np.searchsorted(covered, patches.reshape(rows.size * columns.size, _WIDTH**2))
        centres = np.searchsorted(self.cells, covered[patches[:, _WIDTH**2 // 2]])
        lagged = np.arange(len(LAGS))[:, None] * covered.size
        index = (patches[:, None, :] + lagged).reshape(patches.shape[0], -1)
        values = self.anomalies[:, np.searchsorted(self.cells, covered)]
        predictors = torch.cat([values[self.bases - lag] for lag in LAGS], dim=1)
        targets = [self.anomalies[self.bases + step][:, centres] for step in self.steps]
        seen = [self.observed[self.bases + step][:, centres] for step in self.steps]
        return _Tile(torch.from_numpy(index), predictors, torch.stack(targets, -1), torch.stack(seen, -1), self.parts)


@dataclass(frozen=True)
class _Tile:
    """Neighbouring cells fitted together. index: (cells, 243) columns of predictors (n, features); targets, seen:
    (n, cells, L)."""

    index: Tensor
    predictors: Tensor
    targets: Tensor
    seen: Tensor
    parts: np.ndarray

    def equations(self, kept: np.ndarray) -> tuple[Tensor, Tensor]:
        """(X'X (features, features), X'y (features, cells, L)) float64 of the windows `kept` (bool)."""
        predictors, targets, seen = self.predictors[kept], self.targets[kept], self.seen[kept]
        gram = (predictors.T @ predictors).double()
        right = (predictors.T @ targets.flatten(1)).double().unflatten(1, targets.shape[1:])
        return gram, right * (kept.sum() / seen.double().sum(dim=0).clamp_min(1.0))

    def solve(self, gram: Tensor, right: Tensor, alphas: Tensor) -> Tensor:
        """(L, cells, 243) float64 coefficients; alphas (L,)."""
        solved = torch.zeros(len(alphas), *self.index.shape, dtype=torch.float64)
        identity = torch.eye(self.index.shape[1], dtype=torch.float64)
        for cell, index in enumerate(self.index):
            matrix = gram[index][:, index]
            own = matrix[_WIDTH**2 // 2, _WIDTH**2 // 2]
            if own == 0:
                continue  # never observed: the forecast is the climatology
            for alpha in alphas.unique():
                leads = (alphas == alpha).nonzero().flatten()
                factor = torch.linalg.cholesky(matrix + alpha * own * identity)
                solved[leads, cell] = torch.cholesky_solve(right[index][:, cell, leads], factor).T
        return solved

    def held_out(self) -> Tensor:
        """(ALPHAS, L): sum of squared errors of every part predicted from the others."""
        leads = self.targets.shape[-1]
        total = torch.zeros(len(ALPHAS), leads, dtype=torch.float64)
        for part in np.unique(self.parts):
            out = self.parts == part
            if out.all():
                continue
            equations = self.equations(~out)
            predictors, targets, seen = self.predictors[out][:, self.index], self.targets[out], self.seen[out]
            for place, alpha in enumerate(ALPHAS):
                solved = self.solve(*equations, torch.full((leads,), alpha)).float()
                errors = (torch.einsum("ncf,lcf->ncl", predictors, solved) - targets).double()
                total[place] += torch.where(seen, errors**2, 0.0).sum(dim=(0, 1))
        return total


def _fit(data, normalisation, frames, lead_steps, rows, columns) -> dict[str, Tensor]:
    alphas, coefficients = [], []
    for problem in _problems(data, normalisation, frames, lead_steps, rows, columns):
        tiles = [(a, b) for a in _groups(rows) for b in _groups(columns)]
        chosen = _choose(problem, rows, columns)
        solved = torch.zeros(len(lead_steps), rows.size, columns.size, len(LAGS) * _WIDTH**2)
        for a, b in tiles:
            tile = problem.tile(rows[a], columns[b])
            part = tile.solve(*tile.equations(np.ones(problem.bases.size, dtype=bool)), chosen)
            solved[:, a, b] = part.float().unflatten(1, (rows[a].size, columns[b].size))
        alphas.append(chosen)
        coefficients.append(solved.flatten(1, 2))
    return {"coefficients": torch.stack(coefficients, dim=1), "alphas": torch.stack(alphas, dim=1)}


def _choose(problem: _Problem, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """(L,) the alphas with the smallest cross-validated error at single cells spread over the grid."""
    size = rows.size * columns.size
    trial = np.unique(np.linspace(0, size - 1, min(size, MAX_TRIAL_CELLS)).round().astype(int))
    errors = torch.zeros(len(ALPHAS), len(problem.steps), dtype=torch.float64)
    for cell in trial:
        errors += problem.tile(rows[[cell // columns.size]], columns[[cell % columns.size]]).held_out()
    return torch.tensor(ALPHAS, dtype=torch.float64)[errors.argmin(dim=0)]


def _problems(data, normalisation, frames, lead_steps, rows, columns):
    """One `_Problem` a variable."""
    height, width = data.grid.shape
    padded_width = width + 2 * RADIUS
    reach = np.arange(_WIDTH)
    cells = np.unique(
        (np.unique(rows[:, None] + reach)[:, None] * padded_width + np.unique(columns[:, None] + reach)).ravel()
    )
    parts = np.array_split(frames, PARTS)
    length = max(1, MAX_BYTES // (5 * len(data.variables) * cells.size * PARTS))  # float32 and a mask
    parts = [part[:length] for part in parts]
    frames, number = np.concatenate(parts), np.repeat(np.arange(PARTS), [part.size for part in parts])
    stored = torch.empty(frames.size, len(data.variables), cells.size)
    start = 0
    for block in time_blocks(frames, 16 * len(data.variables) * height * width):
        anomalies = data.read(block) - normalisation.climatology(data.times[block])
        stored[start : start + block.size] = _padded(anomalies, data.grid.wraps).flatten(2)[..., cells]
        start += block.size
    bases = np.arange(frames.size)
    reach = np.array([*(-lag for lag in LAGS), *lead_steps])
    bases = bases[(bases >= max(LAGS)) & (bases + max(lead_steps) < frames.size)]
    together = frames[bases[:, None] + reach] - frames[bases][:, None] == reach
    together &= data.segments[frames[bases[:, None] + reach]] == data.segments[frames[bases]][:, None]
    bases = bases[together.all(axis=1)]
    for channel in range(len(data.variables)):
        values = stored[:, channel]
        yield _Problem(cells, values.nan_to_num(0.0), values.isfinite(), bases, number[bases], lead_steps, padded_width)


def _fitted_axes(data) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the cells that are fitted: every s-th, s the smallest that keeps within MAX_CELLS."""
    height, width = data.grid.shape
    stride = 1
    while -(-height // stride) * -(-width // stride) * len(data.variables) > MAX_CELLS and stride < max(height, width):
        stride += 1
    middle = (stride - 1) // 2
    return (np.arange(min(middle, size - 1), size, stride) for size in (height, width))


def _groups(axis: np.ndarray) -> list[slice]:
    """Tiles along one axis: 8 native cells wide, where sharing one Gram matrix pays."""
    stride = axis[1] - axis[0] if axis.size > 1 else 1
    length = max(1, 8 // int(stride))
    return [slice(start, start + length) for start in range(0, axis.size, length)]


def _nearest(fitted: np.ndarray, size: int, wraps: bool = False) -> np.ndarray:
    """(size,) position in `fitted` of the nearest fitted index."""
    distance = np.abs(np.arange(size)[:, None] - fitted)
    return (np.minimum(distance, size - distance) if wraps else distance).argmin(axis=1)


def _padded(values: Tensor, wraps: bool) -> Tensor:
    """(..., H, W) with RADIUS more cells on every side: zeros beyond an edge, the other side of a globe."""
    if wraps:
        values = torch.cat([values[..., -RADIUS:], values, values[..., :RADIUS]], dim=-1)
        return torch.nn.functional.pad(values, (0, 0, RADIUS, RADIUS))
    return torch.nn.functional.pad(values, (RADIUS,) * 4)


def _digest(data, normalisation, frames, lead_steps, rows, columns) -> str:
    """Names a fit by all that it depends on."""
    digest = hashlib.sha256(repr((_VERSION, data.series.identity, lead_steps, ALPHAS)).encode())
    for indices in (frames, rows, columns):
        digest.update(repr(indices.shape).encode() + np.ascontiguousarray(indices).tobytes())
    digest.update(normalisation.coefficients.numpy().tobytes())
    return digest.hexdigest()[:24]
