"""Values outside `valid_range`, or below `valid_min` or above `valid_max`, are missing (CF 1.11, section 2.5.1).

xarray decodes fill values and packing, and leaves this to its users.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np


def mask_invalid(dataset, path: Path):
    """An xarray dataset, decoded, with its data variables NaN outside their valid range. Lazy: nothing is read here.

    Where a variable has all three attributes, `valid_range` counts. What is no range is ignored with a warning.
    """
    masked = {}
    for name in dataset.data_vars:
        variable = dataset.variables[name]
        stated = {
            key: variable.attrs[key] for key in ("valid_range", "valid_min", "valid_max") if key in variable.attrs
        }
        if not stated or variable.dtype.kind not in "iuf":
            continue
        try:
            low, high = _limits(variable)
        except ValueError as error:
            said = ", ".join(f"{key}={value}" for key, value in stated.items())
            warnings.warn(f"{said} of {name!r} in {path} is ignored: {error}", stacklevel=3)
            continue
        masked[name] = _within(variable, low, high)
    if not masked:
        return dataset
    result = dataset.assign(masked)
    result.set_close(dataset.close)
    return result


def _limits(variable) -> list[float]:
    """The lowest and the highest valid value of a variable as its decoded values have them; infinite: there is none.

    Attributes are in units of the packed values; real numbers beside packed integers are in those of the decoded ones
    (NetCDF Users Guide, appendix A). Raises ValueError where they are no range.
    """
    attributes, encoding = variable.attrs, variable.encoding
    if "valid_range" in attributes:
        found = [_numbers(attributes["valid_range"], 2)]
    else:
        found = [_numbers(attributes.get(name, bound), 1) for name, bound in _OPEN.items()]
    limits = np.concatenate(found).astype(np.float64)
    stored, finite = np.dtype(encoding.get("dtype", variable.dtype)), np.isfinite(limits)
    scale, offset = encoding.get("scale_factor", 1.0), encoding.get("add_offset", 0.0)
    packed = stored.kind != "f" and ("scale_factor" in encoding or "add_offset" in encoding)
    decoded = packed and any(item.dtype.kind == "f" and np.isfinite(item).all() for item in found)
    if stored.kind == "i" and not decoded and str(encoding.get("_Unsigned", "")).lower() == "true":
        limits[finite] %= 2.0 ** (8 * stored.itemsize)  # signed like the values, and read alike
    if limits[0] > limits[1]:
        raise ValueError("its minimum is above its maximum")
    if decoded:
        return (limits + np.abs(scale) * np.array([-0.5, 0.5])).tolist()  # packing has rounded to steps of the scale
    if stored.kind == "f":
        limits = limits.astype(stored)  # 330.1 in single precision is above 330.1 in double
    if variable.dtype.kind == "f":
        limits = limits.astype(variable.dtype)
    limits *= scale  # in the steps and the precision of the decoding, so that a limit itself is valid
    limits += offset
    return sorted(limits.tolist())  # a scale may be negative


_OPEN = {"valid_min": -np.inf, "valid_max": np.inf}


def _numbers(value, count: int) -> np.ndarray:
    numbers = np.atleast_1d(np.asarray(value))
    if numbers.dtype.kind not in "iuf" or numbers.shape != (count,) or np.isnan(numbers).any():
        raise ValueError(f"it must be {'one number' if count == 1 else f'{count} numbers'}")
    return numbers


def _within(variable, low: float, high: float):
    """The variable with NaN below `low` and above `high`, as it is read."""
    from xarray import Variable
    from xarray.backends import BackendArray
    from xarray.core import indexing

    class Within(BackendArray):
        shape = variable.shape
        dtype = np.promote_types(variable.dtype, np.float32)  # NaN needs floating point; it takes 32-bit integers to 64

        def __getitem__(self, key):
            return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

        def _read(self, key) -> np.ndarray:
            values = variable[key].values
            return np.where((values >= low) & (values <= high), values, np.nan).astype(self.dtype, copy=False)

    return Variable(variable.dims, indexing.LazilyIndexedArray(Within()), variable.attrs, variable.encoding)
