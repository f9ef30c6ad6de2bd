"""Grids: where the values of a field live.

Every grid answers the same questions: `shape`, `coordinates` (points, 2) as (latitude, longitude) in degrees, or
(y, x) where it is not `geographic`, `area_weights` (exact cell areas over `shape`, mean 1), `is_global`, and
`cell_of(coordinates)`, the flat index of the cell that holds a point (-1 outside), where the points are. Grids are
immutable, compare by value and travel as plain JSON (`to_dict`, `Grid.from_dict`), so a checkpoint can name the grid
it was trained on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

EARTH_RADIUS_KM = 6371.0
PLANAR_UNITS = ("km", "pixels")


class Grid(ABC):
    """Base of all grids. Subclasses set `kind` and list the arrays that define them in `_arrays`."""

    kind: ClassVar[str]
    geographic: ClassVar[bool] = True
    _arrays: ClassVar[tuple[str, ...]]
    _kinds: ClassVar[dict[str, type[Grid]]] = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        Grid._kinds[cls.kind] = cls

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def coordinates(self) -> Tensor: ...

    @property
    @abstractmethod
    def area_weights(self) -> Tensor: ...

    @property
    @abstractmethod
    def is_global(self) -> bool: ...

    @abstractmethod
    def cell_of(self, coordinates: Tensor) -> Tensor: ...

    @property
    def num_points(self) -> int:
        return int(np.prod(self.shape))

    def find(self, other: Grid) -> tuple[slice, ...] | None:
        """Where values of `other` lie among those of this grid, a slice an axis; None where it is no window of it."""
        return tuple(slice(None) for _ in self.shape) if self == other else None

    def to_dict(self) -> dict:
        return {"kind": self.kind, **{name: getattr(self, name).tolist() for name in self._arrays}}

    @staticmethod
    def from_dict(description: dict) -> Grid:
        from data import curvilinear, healpix  # noqa: F401  they register their kinds, and need this module first

        arguments = dict(description)
        kind = arguments.pop("kind", None)
        if kind not in Grid._kinds:
            raise ValueError(f"unknown grid kind {kind!r}; allowed: {', '.join(sorted(Grid._kinds))}")
        return Grid._kinds[kind](**arguments)

    def __eq__(self, other) -> bool:
        # The shortcut also keeps compiled models whole: comparing arrays would break their graph.
        return self is other or (
            type(self) is type(other)
            and all(np.array_equal(getattr(self, name), getattr(other, name)) for name in self._arrays)
        )

    def __hash__(self) -> int:
        return hash((self.kind, *(getattr(self, name).tobytes() for name in self._arrays)))


def _axis(values, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} must be a non-empty 1-D sequence, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinite values; give finite numbers")
    return values


def _bounds(centres: np.ndarray) -> np.ndarray:
    """Cell edges halfway between the centres, the outer cells symmetric about theirs; one cell is 1 degree wide."""
    if centres.size == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    first = centres[0] - (middle[0] - centres[0])
    last = centres[-1] + (centres[-1] - middle[-1])
    return np.concatenate([[first], middle, [last]])


class LatLonGrid(Grid):
    """A regional or global grid of cells between parallels and meridians.

    latitude: (H,) degrees, strictly increasing or strictly decreasing, within -90..90.
    longitude: (W,) degrees eastwards; any convention, may cross 0 or 180 (350, 0, 10 is understood as 350, 360, 370).
    Values on it have the trailing shape (H, W). Raises ValueError when an axis is not monotonic or out of range.
    """

    kind = "latlon"
    _arrays = ("latitude", "longitude")

    def __init__(self, latitude, longitude):
        self.latitude = _axis(latitude, "latitude")
        longitude = _axis(longitude, "longitude")
        if np.abs(self.latitude).max() > 90 + 1e-6:
            bad = self.latitude[np.abs(self.latitude).argmax()]
            raise ValueError(f"latitude {bad:g} is outside -90..90 degrees")
        steps = np.diff(self.latitude)
        if steps.size and not ((steps > 0).all() or (steps < 0).all()):
            raise ValueError("latitude must be strictly increasing or strictly decreasing")
        # Steps folded to -180..180, so that an axis may cross the date line or Greenwich.
        folded = (np.diff(longitude) + 180) % 360 - 180
        if folded.size and not (folded > 0).all():
            raise ValueError("longitude must run eastwards in strictly increasing order (it may wrap once)")
        self.longitude = longitude[0] + np.concatenate([[0.0], np.cumsum(folded)])
        if self.longitude[-1] - self.longitude[0] >= 360 - 1e-6:
            raise ValueError("longitude covers more than one turn; drop the repeated columns")

    @classmethod
    def with_poles(cls, rows: int, columns: int) -> LatLonGrid:
        """Global points from the north pole to the south, eastwards from Greenwich: (721, 1440) is 0.25 degrees."""
        return cls(np.linspace(90, -90, rows), np.arange(columns) * (360 / columns))

    def window(self, rows: slice, columns: slice | np.ndarray) -> LatLonGrid:
        """Some of the rows and columns, eastwards, with their places."""
        return LatLonGrid(self.latitude[rows], self.longitude[columns])

    @property
    def shape(self) -> tuple[int, int]:
        return self.latitude.size, self.longitude.size

    @cached_property
    def latitude_bounds(self) -> np.ndarray:
        return np.clip(_bounds(self.latitude), -90, 90)

    @cached_property
    def longitude_bounds(self) -> np.ndarray:
        return _bounds(self.longitude)

    @cached_property
    def wraps(self) -> bool:
        """True when the last column touches the first one, once around the globe."""
        return bool(abs(self.longitude_bounds[-1] - self.longitude_bounds[0] - 360) < 0.5 * 360 / self.longitude.size)

    @cached_property
    def is_global(self) -> bool:
        return self.wraps and bool(np.ptp(self.latitude_bounds) > 180 - 1.5 * 180 / self.latitude.size)

    @cached_property
    def coordinates(self) -> Tensor:
        latitude, longitude = np.meshgrid(self.latitude, self.longitude, indexing="ij")
        return torch.from_numpy(np.stack([latitude.ravel(), longitude.ravel()], axis=-1))

    @cached_property
    def area_weights(self) -> Tensor:
        height = np.abs(np.diff(np.sin(np.deg2rad(self.latitude_bounds))))
        area = height[:, None] * np.diff(self.longitude_bounds)[None, :]
        return torch.from_numpy(area / area.mean())

    @cached_property
    def cos_weights(self) -> Tensor:
        """cos(latitude) weights (mean 1), the older convention of the field; `area_weights` are exact at the poles."""
        cos = np.cos(np.deg2rad(self.latitude)).clip(0)[:, None].repeat(self.longitude.size, axis=1)
        return torch.from_numpy(cos / cos.mean())

    def cell_of(self, coordinates: Tensor) -> Tensor:
        """Flat cell index (int64) of each (latitude, longitude) in degrees, shape (..., 2) -> (...); -1 outside."""
        latitude, longitude = coordinates.detach().double().unbind(-1)
        descending = self.latitude_bounds[0] > self.latitude_bounds[-1]
        row = _interval(self.latitude_bounds[::-1] if descending else self.latitude_bounds, latitude)
        inside = row >= 0
        if descending:
            row = self.latitude.size - 1 - row
        west, east = self.longitude_bounds[[0, -1]].tolist()
        turned = west + (longitude - west) % 360
        if self.wraps:
            turned = turned.clamp(max=east)  # what rounding leaves between the last column and the first
        column = _interval(self.longitude_bounds, turned, closed=self.wraps)
        return torch.where(inside & (column >= 0), row * self.longitude.size + column, -1)


class PlanarGrid(Grid):
    """Rows and columns of a plane: a map projection, or an image without geography (radar, satellite).

    y: (H,), x: (W,) centres of rows and columns in `units` (km, or pixels), each strictly increasing or decreasing.
    projection: of the map, in PROJ's words, or nothing; kept for readers of files, never computed with.
    Values on it have the trailing shape (H, W). Raises ValueError when an axis is not monotonic.
    """

    kind = "planar"
    geographic = False
    wraps = False
    _arrays = ("y", "x")

    def __init__(self, y, x, *, units: str = "km", projection: str = ""):
        self.y, self.x = _axis(y, "y"), _axis(x, "x")
        for name, axis in (("y", self.y), ("x", self.x)):
            steps = np.diff(axis)
            if steps.size and not ((steps > 0).all() or (steps < 0).all()):
                raise ValueError(f"{name} must be strictly increasing or strictly decreasing")
        if units not in PLANAR_UNITS:
            raise ValueError(f"units={units} of a planar grid are unknown; allowed: {', '.join(PLANAR_UNITS)}")
        self.units, self.projection = units, projection

    @classmethod
    def regular(cls, rows: int, columns: int, *, spacing: float = 1.0, units: str = "km") -> PlanarGrid:
        """Square cells around the origin, the first row on top."""
        y, x = (spacing * (np.arange(number) - (number - 1) / 2) for number in (rows, columns))
        return cls(-y, x, units=units)

    def window(self, rows: slice, columns: slice) -> PlanarGrid:
        """Some of the rows and columns, with their places."""
        return PlanarGrid(self.y[rows], self.x[columns], units=self.units, projection=self.projection)

    def find(self, other: Grid) -> tuple[slice, slice] | None:
        if not isinstance(other, PlanarGrid):
            return None
        rows, columns = _part_of(self.y, other.y), _part_of(self.x, other.x)
        return None if rows is None or columns is None else (rows, columns)

    def to_dict(self) -> dict:
        return {**super().to_dict(), "units": self.units, "projection": self.projection}

    @property
    def shape(self) -> tuple[int, int]:
        return self.y.size, self.x.size

    @property
    def is_global(self) -> bool:
        return False

    @cached_property
    def y_bounds(self) -> np.ndarray:
        return _bounds(self.y)

    @cached_property
    def x_bounds(self) -> np.ndarray:
        return _bounds(self.x)

    @cached_property
    def coordinates(self) -> Tensor:
        return torch.from_numpy(np.stack(np.meshgrid(self.y, self.x, indexing="ij"), axis=-1).reshape(-1, 2))

    @cached_property
    def area_weights(self) -> Tensor:
        area = np.abs(np.diff(self.y_bounds))[:, None] * np.abs(np.diff(self.x_bounds))
        return torch.from_numpy(area / area.mean())

    def cell_of(self, coordinates: Tensor) -> Tensor:
        """Flat cell index (int64) of each (y, x), shape (..., 2) -> (...); -1 outside."""
        row, column = (
            _interval(-bounds, -place) if bounds[0] > bounds[-1] else _interval(bounds, place)
            for bounds, place in zip(
                (self.y_bounds, self.x_bounds), coordinates.detach().double().unbind(-1), strict=True
            )
        )
        return torch.where((row >= 0) & (column >= 0), row * self.x.size + column, -1)


def _part_of(axis: np.ndarray, part: np.ndarray) -> slice | None:
    """Where `part` lies in `axis`, to a millionth of its spacing."""
    tolerance = 1e-6 * np.abs(np.diff(axis)).min(initial=1.0)
    first = int(np.abs(axis - part[0]).argmin())
    found = axis[first : first + part.size]
    return (
        slice(first, first + part.size) if found.size == part.size and np.allclose(found, part, 0, tolerance) else None
    )


def _interval(bounds: np.ndarray, values: Tensor, *, closed: bool = True) -> Tensor:
    """Which interval between rising bounds holds each value, -1 for none. The last bound belongs to the last interval
    where that is `closed`. Where the values are; a device is not waited for."""
    edges = torch.from_numpy(np.ascontiguousarray(bounds)).to(values.device, non_blocking=True)
    last = bounds.size - 2
    index = torch.searchsorted(edges, values.contiguous(), right=True) - 1
    if closed:
        index = torch.where(values == edges[-1], last, index)
    return torch.where((index >= 0) & (index <= last), index, -1)


class Points(Grid):
    """Scattered places: stations or free targets. locations: (P, 2) as (latitude, longitude) in degrees."""

    kind = "points"
    _arrays = ("locations",)

    def __init__(self, locations):
        self.locations = np.asarray(locations, dtype=np.float64)
        if self.locations.ndim != 2 or self.locations.shape[1] != 2 or not np.isfinite(self.locations).all():
            raise ValueError(
                f"points need finite (latitude, longitude) pairs of shape (P, 2), got {self.locations.shape}"
            )

    @property
    def shape(self) -> tuple[int]:
        return (self.locations.shape[0],)

    @property
    def coordinates(self) -> Tensor:
        return torch.from_numpy(self.locations)

    @cached_property
    def area_weights(self) -> Tensor:
        return torch.ones(self.locations.shape[0], dtype=torch.float64, device="cpu")

    @property
    def is_global(self) -> bool:
        return False

    def cell_of(self, coordinates: Tensor) -> Tensor:
        """Index of the point at exactly this place (to 1e-6 degrees), -1 where there is none."""
        points = coordinates.detach().double()
        own = self.coordinates.to(points.device, non_blocking=True)
        distance = torch.cdist(points.reshape(-1, 2), own, p=float("inf"))
        nearest, index = distance.min(dim=1)
        return torch.where(nearest <= 1e-6, index, -1).reshape(points.shape[:-1])


ROWS_AND_COLUMNS = LatLonGrid | PlanarGrid
