"""ROMS observation NetCDF (`wc13_obs.nc`): scattered ocean observations for 4D-Var.

Channels are the state variables (zeta, ubar, vbar, u, v, temperature, salinity), platforms the provenances. A negative
obs_depth is metres and becomes height; a positive one is an s-level index (1 the bottom, N the surface) of the model
that made the file, kept in the column `level`. error is the root of the file's obs_error, a variance. `record` is the
row in the file, the same as in files of model equivalents (`wc13_mod.nc`); grid_x and grid_y are the place on that
model's grid.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np

from data.calendars import decode_times
from data.sources.observations.reports import existing, require
from data.sources.observations.table import Table
from data.sources.series import open_file

VARIABLES = ("obs_type", "obs_provenance", "obs_time", "obs_depth", "obs_lon", "obs_lat", "obs_value", "obs_error")
STATE = ("zeta", "ubar", "vbar", "u", "v", "temperature", "salinity")


def read(path: str | PathLike, *, start: int | None = None, stop: int | None = None) -> Table:
    """The observations of a file in its order. Raises OSError and ValueError."""
    path = existing(path)
    with open_file(path) as dataset:
        require(dataset.variables, VARIABLES, path, "variable")
        columns = {name: dataset[name].values.astype(np.float64) for name in VARIABLES}
        for axis in ("obs_Xgrid", "obs_Ygrid"):
            if axis in dataset.variables:
                columns[axis] = dataset[axis].values.astype(np.float64)
        channel, channels = _named(dataset["obs_type"], columns["obs_type"], STATE, path)
        sources = int(np.nanmax(columns["obs_provenance"], initial=1))
        default = tuple(f"provenance_{number}" for number in range(1, sources + 1))
        platform, platforms = _named(dataset["obs_provenance"], columns["obs_provenance"], default, path)
        clock = dataset["obs_time"].attrs
        try:
            time, _ = decode_times(columns["obs_time"], clock.get("units", ""), clock.get("calendar", "standard"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    depth = columns["obs_depth"]
    table = Table(
        {
            "value": columns["obs_value"],
            "latitude": columns["obs_lat"],
            "longitude": columns["obs_lon"],
            "time": time,
            "channel": channel,
            "platform": platform,
            "height": np.where(depth <= 0, depth, np.nan),
            "level": np.where(depth > 0, depth, np.nan),
            "error": np.sqrt(columns["obs_error"]),
            "record": np.arange(depth.size),
            **{f"grid_{axis[4].lower()}": columns[axis] for axis in ("obs_Xgrid", "obs_Ygrid") if axis in columns},
        },
        {"channel": channels, "platform": platforms},
    )
    return table.between(start, stop)


def _named(variable, values: np.ndarray, default: tuple[str, ...], path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Ids from 0 and their names, from the flags of a variable or, without them, numbered from 1 in default order."""
    names = tuple(variable.attrs.get("flag_meanings", "").split()) or default
    flags = np.atleast_1d(variable.attrs.get("flag_values", np.arange(1, len(names) + 1)))
    unknown = values[~np.isin(values, flags)]
    if unknown.size or len(flags) != len(names):
        example = f"{unknown[0]:g}" if unknown.size else "none"
        raise ValueError(
            f"{path}: {unknown.size} rows have a {variable.name} that is not one of {', '.join(names)}, "
            f"the first {example}; correct its flag_values and flag_meanings"
        )
    order = np.argsort(flags)
    return order[np.searchsorted(flags[order], values)], names
