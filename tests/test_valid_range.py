"""What lies outside CF's valid range is missing for every reader, and nothing else is."""

import warnings

import numpy as np
import pytest
import xarray as xr
from example_data import dataset
from netCDF4 import Dataset

from data.datasets.gridded import GriddedData
from data.sources.healpix_store import HEALPixStore, Place
from data.sources.netcdf import open_series
from data.sources.radar import open_radar


def save(path, stored, attributes):
    """A file of packed values (time, lat, lon) as they are stored, with their attributes."""
    frame = dataset(frames=len(stored)).drop_vars("t2m")
    frame["t2m"] = (("time", "lat", "lon"), stored, {"units": "K", **attributes})
    if path.suffix == ".zarr":
        frame.to_zarr(path, zarr_format=2)
    else:
        frame.to_netcdf(path, format="NETCDF3_CLASSIC" if stored.dtype == np.int8 else None)
    return path


def read(path):
    series = open_series([path])
    return series.read(np.arange(series.times.size))[:, 0]


def stored(dtype, *special):
    """(4, 3, 4) values with some special ones among them."""
    values = np.arange(100, 148).astype(dtype).reshape(4, 3, 4)
    values.flat[5 : 5 + len(special)] = special
    return values


PACKED = {"scale_factor": 0.01, "add_offset": 273.15}
AS_NETCDF4_HAS_IT = {
    "real numbers": (stored("f4", -9999, 250, 330, 331), {"valid_range": np.array([100, 330], "f4")}),
    "one limit": (stored("f8", -9999, 1e9), {"valid_min": 101.0}),
    "a fill value beside it": (stored("f4", -9999, -5, np.nan), {"_FillValue": -9999.0, "valid_min": np.float32(0)}),
    "packed": (stored("i2", -500, 120, 130, 131), {**PACKED, "valid_range": np.array([-500, 130], "i2")}),
    "packed, with a fill value": (
        stored("i2", -999, -301, -300),
        {**PACKED, "_FillValue": np.int16(-999), "valid_min": np.int16(-300)},
    ),
    "a negative scale": (stored("i2", 90, 200), {"scale_factor": -0.1, "valid_max": np.int16(140)}),
    "packed in 32 bits": (
        stored("i4", -(2**31), 2**30),
        {"scale_factor": 1e-6, "valid_range": np.array([0, 2**30], "i4")},
    ),
    "integers that are not packed": (stored("i4", -9999), {"valid_min": np.int32(0)}),
}


@pytest.mark.parametrize("name", AS_NETCDF4_HAS_IT)
def test_what_netcdf4_masks_is_missing_and_all_else_keeps_its_value(tmp_path, name):
    path = save(tmp_path / "a.nc", *AS_NETCDF4_HAS_IT[name])
    with Dataset(path) as file:
        expected = np.ma.filled(file["t2m"][:].astype(float), np.nan)
    assert 0 < np.isnan(expected).sum() < 40
    np.testing.assert_array_equal(np.isnan(read(path)), np.isnan(expected))
    np.testing.assert_allclose(read(path), expected, rtol=1e-6)


def test_real_limits_of_packed_integers_are_of_the_decoded_values(tmp_path):
    """The form of `Cs_r` in ROMS files: packing may put a value half a step beyond its limit."""
    scale = -1 / 32766.5
    attributes = {"scale_factor": scale, "add_offset": -0.5, "valid_min": -1.0, "valid_max": 0.0}
    values = read(save(tmp_path / "a.nc", stored("i2", 16383, 16384, -16383, -16384), attributes)).ravel()
    np.testing.assert_array_equal(np.isnan(values[5:9]), [False, True, False, True])
    assert np.isfinite(values[9:]).all()


def test_limits_of_unsigned_bytes_are_signed_like_the_bytes(tmp_path):
    values = stored("u1", 255, 254, 99).view("i1")
    attributes = {"_Unsigned": "true", "scale_factor": 0.2, "valid_range": np.array([100, -2], "i1")}
    found = read(save(tmp_path / "a.nc", values, attributes)).ravel()
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(found)), [5, 7])
    np.testing.assert_allclose(found[[0, 6, 47]], [20.0, 50.8, 29.4], rtol=1e-6)


def test_limits_have_the_precision_of_the_values(tmp_path):
    values = read(save(tmp_path / "a.nc", stored("f4", 330.1), {"valid_max": 330.1}))
    assert np.isfinite(values).all()


@pytest.mark.parametrize("name", ["real numbers", "packed", "packed, with a fill value"])
def test_a_zarr_store_is_read_alike(tmp_path, name):
    values, attributes = AS_NETCDF4_HAS_IT[name]
    expected = read(save(tmp_path / "a.nc", values, attributes))
    plain = {key: item if key == "_FillValue" else np.asarray(item).tolist() for key, item in attributes.items()}
    store = save(tmp_path / "a.zarr", values, plain)
    np.testing.assert_array_equal(read(store), expected)
    np.testing.assert_array_equal(open_series([store]).read([3, 1])[:, 0], expected[[3, 1]])


def test_valid_range_counts_where_a_file_has_all_three(tmp_path):
    attributes = {"valid_range": np.array([0.0, 500.0]), "valid_min": 400.0, "valid_max": 500.0}
    assert np.isnan(read(save(tmp_path / "a.nc", stored("f8", -1.0), attributes))).sum() == 1


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"valid_range": np.array([0.0, 1.0, 2.0])}, "it must be 2 numbers"),
        ({"valid_min": "100"}, "it must be one number"),
        ({"valid_max": np.nan}, "it must be one number"),
        ({"valid_range": np.array([330.0, 250.0])}, "its minimum is above its maximum"),
    ],
)
def test_what_is_no_range_is_ignored_and_named(tmp_path, attributes, reason):
    values = stored("f8", -1.0)
    with pytest.warns(UserWarning, match=rf"valid_\w+=.* of 't2m' in .*a\.nc is ignored: {reason}"):
        np.testing.assert_array_equal(read(save(tmp_path / "a.nc", values, attributes)), values.astype("f4"))


def test_data_inspection_and_every_cache_see_the_gaps(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRASPHERE_CACHE", str(tmp_path))
    frame = dataset(frames=40)
    gap = np.random.default_rng(0).random(frame.t2m.shape) < 0.25
    frame["t2m"] = frame.t2m.where(~gap, -9999.0).assign_attrs(valid_min=200.0, valid_max=400.0)
    frame.transpose("lon", "time", "lat").to_netcdf(tmp_path / "a.nc", encoding={"t2m": {"_FillValue": None}})
    for cache in ("none", "ram", "memmap"):
        data = GriddedData(str(tmp_path / "a.nc"), split={"train": 0.6, "validation": 0.2, "test": 0.2}, cache=cache)
        np.testing.assert_array_equal(np.isnan(data.read(np.arange(40))[:, 0].numpy()), gap)
        assert data.gaps
    assert f"missing {gap.mean():.1%}" in data.describe().replace("  ", " ") and "-9999" not in data.describe()


def test_fixed_fields_healpix_stores_and_radar_images_are_read_alike(tmp_path):
    frame = dataset(frames=4)
    frame["depth"] = (("lat", "lon"), np.where(np.eye(3, 4) > 0, -9999.0, 7.0), {"valid_min": 0.0})
    frame.to_netcdf(tmp_path / "a.nc")
    fixed = open_series([tmp_path / "a.nc"], variables=["t2m", "depth"]).read_static()[0]
    np.testing.assert_array_equal(np.isnan(fixed), np.eye(3, 4) > 0)

    hours = ("time", [0.0, 1.0], {"units": "hours since 2001-01-01"})
    cells = np.where(np.arange(24).reshape(2, 12) == 5, -9999.0, 1.0)
    xr.Dataset({"t": (("time", "pixel"), cells, {"valid_min": 0.0})}, {"time": hours}).to_zarr(tmp_path / "h.zarr")
    found = HEALPixStore(tmp_path / "h.zarr", pixels=12).read([Place("t")], np.array([1, 0]))
    np.testing.assert_array_equal(np.isnan(found[::-1, 0]), cells < 0)

    rain = np.where(np.arange(24).reshape(2, 3, 4) == 5, -9999.0, 1.0)
    attributes = {"units": "mm h-1", "valid_min": 0.0}
    xr.Dataset({"rain": (("time", "y", "x"), rain, attributes)}, {"time": hours}).to_netcdf(tmp_path / "r.nc")
    np.testing.assert_array_equal(np.isnan(open_radar([tmp_path / "r.nc"], pixel=1.0).read([0, 1])), rain < 0)


def test_files_without_a_valid_range_are_left_as_they_are(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = read(save(tmp_path / "a.nc", stored("f8", -9999.0), {"actual_range": np.array([0.0, 1.0])}))
    assert values.min() == -9999
