"""Intervals of an RMSE by bootstrap over blocks of consecutive windows, because neighbouring forecasts err together.

Source: moving-block bootstrap, Kuensch (1989), Annals of Statistics 17(3).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

BLOCK_DAYS = 7.0
DRAWS = 1000


def read_windows(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of `window_errors.npz`, or None where there is none. Raises ValueError where it is damaged."""
    import zipfile

    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); evaluate the run again") from error


def block_length(windows: dict[str, np.ndarray], lead: int) -> int:
    """Windows in a block: a week's, and at least those of two lead times, for forecasts that overlap are alike."""
    bases, hours = windows["bases"], windows["hours"][lead]
    spacing = max(1.0, np.ptp(bases) / max(1, bases.size - 1)) * float(windows["step_hours"])
    return max(1, int(np.ceil(max(24 * BLOCK_DAYS, 2 * abs(hours)) / spacing)))


def method_interval(windows: dict[str, np.ndarray], method: str, lead: int, channel: int) -> tuple[float, float]:
    """95 % interval of a method's RMSE from the arrays of `window_errors.npz`; NaN with too few windows."""
    return rmse_interval(
        windows[f"squared_error_{method}"][:, lead, channel],
        windows["weight"][:, lead, channel],
        block=block_length(windows, lead),
    )


def difference_interval(
    windows: dict[str, np.ndarray], method: str, other: str, lead: int, channel: int
) -> tuple[float, float]:
    """95 % interval of (RMSE of method) / (RMSE of other) - 1, both on the same drawn blocks; NaN with too few windows.

    Much narrower than what two separate intervals suggest: a hard week is hard for every method.
    """
    weight, block = windows["weight"][:, lead, channel], block_length(windows, lead)
    first, second = (
        _drawn_rmse(windows[f"squared_error_{name}"][:, lead, channel], weight, block=block) for name in (method, other)
    )
    return _percentiles(first / np.where(second > 0, second, np.nan) - 1)


def rmse_interval(squared_error: np.ndarray, weight: np.ndarray, *, block: int) -> tuple[float, float]:
    """(low, high), 95 %, of sqrt(sum squared_error / sum weight), both (windows,) in time order.

    NaN where no window has weight or the windows do not fill two blocks.
    """
    return _percentiles(_drawn_rmse(squared_error, weight, block=block))


def _drawn_rmse(squared_error: np.ndarray, weight: np.ndarray, *, block: int) -> np.ndarray:
    """(DRAWS,) RMSE of resampled blocks, the same blocks at every call; blocks wrap at the end of the series."""
    windows = squared_error.size
    if windows < 2 * block or not weight.sum() > 0:
        return np.full(DRAWS, np.nan)
    starts = np.random.default_rng(0).integers(0, windows, size=(DRAWS, -(-windows // block)))
    sums = []
    for values in (squared_error, weight):
        running = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[: block - 1]]))])
        sums.append((running[starts + block] - running[starts]).sum(axis=1))
    return np.sqrt(sums[0] / np.where(sums[1] > 0, sums[1], np.nan))


def _percentiles(drawn: np.ndarray) -> tuple[float, float]:
    if not np.isfinite(drawn).any():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)
