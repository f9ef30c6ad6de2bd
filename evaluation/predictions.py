"""`predictions.nc`: forecasts and analyses in physical units, in the dimensions that WeatherBench scripts read.

Dimensions (init_time, lead_time, [number,] [level,] latitude, longitude), (..., y, x) on a plane, or (..., cell) on
HEALPix with the latitude and longitude of each cell's centre; number counts the members of an ensemble; `valid_time`
(init_time, lead_time) holds the exact target times, which for monthly data are not init_time plus the nominal lead. CF
conventions, missing = NaN.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from data.curvilinear import CurvilinearGrid
from data.grids import Grid, LatLonGrid, PlanarGrid
from data.layout import Variable


class PredictionsFile:
    """Writes forecasts batch by batch; the file appears under its name only when it is complete.

    Use as a context manager and call `append`. times: (N,) int64 seconds since 1970-01-01 of `calendar`. members: of
    each forecast, an ensemble, or None. Raises OSError where it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        variables: Sequence[Variable],
        grid: Grid,
        times: np.ndarray,
        lead_steps: Sequence[int],
        hours: Sequence[float],
        calendar: str,
        attributes: dict[str, str],
        members: int | None = None,
    ):
        from netCDF4 import Dataset

        self.path, self._beside = path, path.with_name(f".{path.name}.{os.getpid()}")
        self._times, self._lead_steps = times, np.array(lead_steps)
        try:
            self._file = Dataset(self._beside, "w")
        except OSError as error:
            raise OSError(f"cannot write {path} ({error}); free some space or choose another folder") from error
        self._file.setncatts({"Conventions": "CF-1.8", **attributes})
        self._places = self._axes(grid)
        self._file.createDimension("init_time")
        self._file.createDimension("lead_time", len(lead_steps))
        epoch = {"units": "seconds since 1970-01-01 00:00:00", "calendar": calendar}
        self._coordinate(
            "init_time", "i8", standard_name="forecast_reference_time", long_name="last input time", **epoch
        )
        lead = self._coordinate(
            "lead_time", "f8", standard_name="forecast_period", long_name="lead time", units="hours"
        )
        lead[:] = hours
        self._file.createVariable("valid_time", "i8", ("init_time", "lead_time")).setncatts(
            {"standard_name": "time", "long_name": "time of the forecast", **epoch}
        )
        self._members = () if members is None else ("number",)
        if members is not None:
            self._file.createDimension("number", members)
            number = self._coordinate("number", "i4", standard_name="realization", long_name="ensemble member")
            number[:] = np.arange(members)
        self._targets = self._data_variables(variables)

    def _axes(self, grid: Grid) -> tuple[str, ...]:
        """Creates latitude and longitude, or y and x; returns the dimensions of a field."""
        if isinstance(grid, PlanarGrid):
            for name, values in (("y", grid.y), ("x", grid.x)):
                self._file.createDimension(name, values.size)
                created = self._coordinate(name, "f8", long_name=f"{name} of the plane", units=grid.units)
                created[:] = values
            return "y", "x"
        if isinstance(grid, CurvilinearGrid):
            for name, size in zip(("y", "x"), grid.shape, strict=True):
                self._file.createDimension(name, size)
            for name, units in (("latitude", "degrees_north"), ("longitude", "degrees_east")):
                created = self._file.createVariable(name, "f8", ("y", "x"))
                created.setncatts({"standard_name": name, "long_name": name, "units": units})
                created[:] = getattr(grid, name)
            return "y", "x"
        regular = isinstance(grid, LatLonGrid)
        if not regular:
            self._file.createDimension("cell", grid.num_points)
            self._file.setncatts({f"grid_{name}": value for name, value in grid.to_dict().items()})
        for column, (name, units) in enumerate((("latitude", "degrees_north"), ("longitude", "degrees_east"))):
            values = getattr(grid, name) if regular else grid.coordinates[:, column].numpy()
            if regular:
                self._file.createDimension(name, values.size)
            created = self._coordinate(
                name, "f8", name if regular else "cell", standard_name=name, long_name=name, units=units
            )
            created[:] = values
        return ("latitude", "longitude") if regular else ("cell",)

    def _coordinate(self, name: str, kind: str, dimension: str | None = None, **attributes):
        variable = self._file.createVariable(name, kind, (dimension or name,))
        variable.setncatts(attributes)
        return variable

    def _data_variables(self, variables: Sequence[Variable]) -> list[tuple]:
        """Per channel: its NetCDF variable and its index along level (None: it has none)."""
        levels = sorted({variable.level for variable in variables if variable.level is not None})
        if levels:
            self._file.createDimension("level", len(levels))
            self._coordinate("level", "f8", long_name="pressure (hPa) or depth (m)")[:] = levels
        targets = []
        for variable in variables:
            if variable.name not in self._file.variables:
                vertical = () if variable.level is None else ("level",)
                created = self._file.createVariable(
                    variable.name,
                    "f4",
                    ("init_time", "lead_time", *self._members, *vertical, *self._places),
                    zlib=True,
                    complevel=1,
                    fill_value=np.float32(np.nan),
                )
                created.setncatts({"units": variable.units, "long_name": f"prediction of {variable.name}"})
            place = None if variable.level is None else levels.index(variable.level)
            targets.append((self._file[variable.name], place))
        return targets

    def append(self, bases: np.ndarray, forecast: Tensor) -> None:
        """bases: (B,) indices into `times` of the last input frames; forecast: (B, L, [members,] C, *grid.shape),
        physical."""
        start = len(self._file.dimensions["init_time"])
        rows = slice(start, start + len(bases))
        self._file["init_time"][rows] = self._times[bases]
        self._file["valid_time"][rows] = self._times[bases[:, None] + self._lead_steps]
        for channel, (variable, level) in enumerate(self._targets):
            values = forecast.select(2 + len(self._members), channel).numpy()
            if level is None:
                variable[rows] = values
            else:
                variable[rows, :, *[slice(None)] * len(self._members), level] = values

    def __enter__(self) -> PredictionsFile:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._beside, self.path)
        else:
            self._beside.unlink(missing_ok=True)
