"""Files in many dialects are read as the same series; what cannot be read ends in one sentence."""

import pickle

import numpy as np
import pytest
from example_data import dataset, write

from data.sources.netcdf import open_series
from data.sources.series import MONTH_SECONDS


@pytest.fixture
def plain():
    return dataset(frames=8, latitude=[40, 50, 60], longitude=[0, 10, 20, 30])


def read(path, **selection):
    series = open_series([path] if not isinstance(path, list) else path, **selection)
    return series, series.read(np.arange(series.times.size))


def save(data, tmp_path, name="data.nc", **options):
    data.to_netcdf(tmp_path / name, **options)
    return tmp_path / name


def test_a_plain_file_is_read_as_it_is(plain, tmp_path):
    series, values = read(save(plain, tmp_path))
    assert [variable.label for variable in series.variables] == ["t2m"] and series.variables[0].units == "K"
    assert series.step == 6 * 3600 and not series.segments.any()
    np.testing.assert_array_equal(values[:, 0], plain.t2m.values.astype(np.float32))
    np.testing.assert_array_equal(series.grid.latitude, [40, 50, 60])
    np.testing.assert_array_equal(
        series.times[:2], np.array(["2001-01-01T00", "2001-01-01T06"], "datetime64[s]").astype(int)
    )


def test_any_order_of_indices_is_read_also_after_pickling(plain, tmp_path):
    series, values = read(save(plain, tmp_path))
    order = [7, 0, 0, 5, 2]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(series)).read(order), values[order])


@pytest.mark.parametrize("dtype", ["i2", "u1", "i4"])
def test_packed_integers_and_fill_values_are_decoded(plain, tmp_path, dtype):
    plain.t2m[2, 1, 3] = np.nan
    span = {"i2": 0.01, "u1": 0.2, "i4": 1e-5}[dtype]
    encoding = {
        "t2m": {
            "dtype": dtype,
            "scale_factor": span,
            "add_offset": 265.0 if dtype == "u1" else 285.0,
            "_FillValue": 255 if dtype == "u1" else -999,
        }
    }
    _, values = read(save(plain, tmp_path, encoding=encoding))
    np.testing.assert_allclose(values[:, 0], plain.t2m.values, atol=span)
    np.testing.assert_array_equal(np.isnan(values[:, 0]), np.isnan(plain.t2m.values))


def test_missing_value_attributes_become_nan(plain, tmp_path):
    plain.t2m[0, 0, 0] = -9999.0
    plain.t2m.attrs["missing_value"] = -9999.0
    _, values = read(save(plain, tmp_path, encoding={"t2m": {"_FillValue": None}}))
    assert np.isnan(values[0, 0, 0, 0]) and np.isnan(values).sum() == 1


def test_descending_latitudes_keep_their_order_and_values(plain, tmp_path):
    series, values = read(save(plain.isel(lat=slice(None, None, -1)), tmp_path))
    np.testing.assert_array_equal(series.grid.latitude, [60, 50, 40])
    np.testing.assert_array_equal(values[:, 0, ::-1], plain.t2m.values.astype(np.float32))


@pytest.mark.parametrize(
    ("in_file", "expected"),
    [
        ([-20, -10, 0, 10], [-20, -10, 0, 10]),
        ([0, 10, 340, 350], [340, 350, 360, 370]),  # a region across Greenwich in 0..360
        ([-180, -170, 160, 170], [160, 170, 180, 190]),  # a region across the date line in -180..180
        ([30, 20, 10, 0], [0, 10, 20, 30]),  # westwards
        ([20, 0, 30, 10], [0, 10, 20, 30]),
    ],
)
def test_longitudes_become_one_increasing_axis(tmp_path, in_file, expected):
    data = dataset(frames=4, longitude=sorted(set(expected)))
    columns = [[value % 360 for value in expected].index(value % 360) for value in in_file]
    series, values = read(save(data.isel(lon=columns).assign_coords(lon=np.array(in_file, float)), tmp_path))
    np.testing.assert_allclose(series.grid.longitude, expected)
    np.testing.assert_array_equal(values[:, 0], data.t2m.values.astype(np.float32))


def test_a_repeated_last_column_is_dropped(tmp_path):
    series, _ = read(write(tmp_path / "a.nc", frames=4, longitude=np.arange(0, 361, 30)))
    assert series.grid.wraps and series.grid.shape[1] == 12


@pytest.mark.parametrize("convention", ["0..360", "-180..180"])
def test_a_region_may_cross_greenwich_in_a_global_file(tmp_path, convention):
    longitude = np.arange(0, 360, 30) if convention == "0..360" else np.arange(-180, 180, 30)
    data = dataset(frames=4, latitude=np.arange(-75, 90, 30), longitude=longitude)
    series, values = read(save(data, tmp_path), region=[0, 50, -40, 65])
    np.testing.assert_array_equal(series.grid.latitude, [15, 45])
    np.testing.assert_array_equal(series.grid.longitude % 360, [330, 0, 30, 60])
    columns = [list(longitude % 360).index(value) for value in (330, 0, 30, 60)]
    np.testing.assert_array_equal(values[:, 0], data.t2m.values[:, 3:5][:, :, columns].astype(np.float32))


@pytest.mark.parametrize(
    ("rename", "attributes"),
    [
        ({"lat": "latitude", "lon": "longitude", "time": "valid_time"}, {}),
        ({"lat": "y", "lon": "x"}, {"y": {"standard_name": "latitude"}, "x": {"standard_name": "longitude"}}),
        ({"lat": "y", "lon": "x", "time": "t"}, {"y": {"axis": "Y"}, "x": {"axis": "X"}}),
        ({"lat": "north", "lon": "east"}, {"north": {"units": "degrees North"}, "east": {"units": "degree_E"}}),
        ({"lat": "nav_lat", "lon": "nav_lon"}, {}),
    ],
)
def test_axes_are_found_by_attributes_or_names(plain, tmp_path, rename, attributes):
    renamed = plain.rename(rename)
    for name in ("lat", "lon"):
        renamed[rename[name]].attrs = attributes.get(rename[name], {})
    _, values = read(save(renamed, tmp_path))
    np.testing.assert_array_equal(values[:, 0], plain.t2m.values.astype(np.float32))


def test_dimensions_may_come_in_any_order_with_singletons(plain, tmp_path):
    shuffled = plain.transpose("lon", "time", "lat").expand_dims({"number": [3], "surface": [0.0]})
    _, values = read(save(shuffled, tmp_path))
    np.testing.assert_array_equal(values[:, 0], plain.t2m.values.astype(np.float32))


@pytest.mark.parametrize(("units", "factor"), [("hPa", 1), ("Pa", 100)])
def test_levels_become_one_variable_each(plain, tmp_path, units, factor):
    levels = np.array([1000.0, 850.0, 500.0])
    stacked = (
        plain.expand_dims({"plev": ("plev", levels * factor, {"units": units})[1]}, axis=1)
        * np.array([1, 2, 3])[None, :, None, None]
    )
    stacked = stacked.transpose("time", "plev", "lat", "lon")
    for name in ("time", "lat", "lon"):
        stacked[name].attrs = plain[name].attrs
    stacked["plev"].attrs = {"units": units}
    path = save(stacked.assign(sp=plain.t2m), tmp_path)
    series, values = read(path, variables=["t2m", "sp"], levels=[850, 500])
    assert [variable.label for variable in series.variables] == ["t2m@850", "t2m@500", "sp"]
    for channel, factor in enumerate((2, 3, 1)):
        np.testing.assert_allclose(values[:, channel], plain.t2m.values * factor, rtol=1e-6)
    assert [variable.label for variable in read(path, variables=["t2m"])[0].variables] == [
        "t2m@1000",
        "t2m@850",
        "t2m@500",
    ]
    with pytest.raises(ValueError, match=r"has no level 700; it has 1000, 850, 500: choose with data.levels"):
        read(path, levels=[700])


def test_a_requested_variable_without_time_is_static(plain, tmp_path):
    mask = plain.assign(land=(("lat", "lon"), np.arange(12.0).reshape(3, 4)))
    series, values = read(save(mask, tmp_path), variables=["t2m", "land"])
    assert [variable.name for variable in series.static_variables] == ["land"] and values.shape[1] == 1
    np.testing.assert_array_equal(series.read_static()[0], np.arange(12.0).reshape(3, 4))
    assert not read(tmp_path / "data.nc")[0].static_variables


@pytest.mark.parametrize("store", ["nc", "zarr"])
def test_files_are_joined_along_time_in_the_order_of_their_times(plain, tmp_path, store):
    for name, part in (("b", slice(0, 3)), ("a", slice(3, 4)), ("c", slice(4, 8))):
        chunk, path = plain.isel(time=part), tmp_path / f"{name}.{store}"
        chunk.to_zarr(path, consolidated=False) if store == "zarr" else chunk.to_netcdf(path)
    series, values = read(sorted(tmp_path.glob(f"*.{store}")))
    np.testing.assert_array_equal(values[:, 0], plain.t2m.values.astype(np.float32))
    np.testing.assert_array_equal(series.read([5, 2, 3])[:, 0], plain.t2m.values[[5, 2, 3]].astype(np.float32))


def test_gaps_split_a_series_into_segments(tmp_path):
    series, _ = read(write(tmp_path / "a.nc", keep=[0, 1, 2, 5, 6, 20]))
    assert series.segments.tolist() == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("calendar", ["standard", "noleap", "360_day"])
@pytest.mark.parametrize("units", ["days since 2000-01-16", "months since 2000-01-01"])
def test_monthly_series_step_by_calendar_months(plain, tmp_path, units, calendar):
    import cftime

    months = np.array([0, 1, 2, 3, 4, 8, 9, 10])
    if units.startswith("days"):
        dates = [cftime.datetime(2000, 1 + month, 16, calendar=calendar) for month in months]
        months = cftime.date2num(dates, units, calendar)
    plain = plain.assign_coords(time=("time", months.astype(float), {"units": units, "calendar": calendar}))
    series, _ = read(save(plain, tmp_path))
    assert series.is_monthly and series.step == MONTH_SECONDS
    assert series.segments.tolist() == [0] * 5 + [1] * 3


def test_thirty_day_steps_are_not_months(plain, tmp_path):
    plain = plain.assign_coords(time=("time", np.arange(8) * 30.0, {"units": "days since 2001-01-01"}))
    series, _ = read(save(plain, tmp_path))
    assert series.step == 30 * 86_400 and not series.segments.any()


def test_float32_days_are_understood_as_regular_steps(plain, tmp_path):
    days = (36_500 + np.arange(8) / 4 + 1 / 7).astype(np.float32)  # coarse to a few minutes
    series, _ = read(save(plain.assign_coords(time=("time", days, {"units": "days since 1900-01-01"})), tmp_path))
    assert not series.segments.any()


# What cannot be read


def test_a_missing_variable_lists_those_of_the_file_and_the_nearest(plain, tmp_path):
    with pytest.raises(ValueError, match=r"no variable 't2n' in .*; it holds t2m; did you mean t2m\?"):
        read(save(plain, tmp_path), variables=["t2n"])


@pytest.mark.parametrize(("dimension", "word"), [("lat", "latitude"), ("lon", "longitude")])
def test_a_missing_dimension_is_named(plain, tmp_path, dimension, word):
    flat = plain.mean(dimension, keep_attrs=True)
    with pytest.raises(ValueError, match=f"'t2m' in .* has no {word} dimension"):
        read(save(flat, tmp_path), variables=["t2m"])


def test_a_series_needs_a_time_dimension(plain, tmp_path):
    with pytest.raises(ValueError, match="time"):
        read(save(plain.isel(time=0, drop=True), tmp_path), variables=["t2m"])
    with pytest.raises(ValueError, match="no variable has three or more dimensions"):
        read(save(plain.isel(time=0, drop=True), tmp_path, "flat.nc"))
    del plain.time.attrs["units"]
    with pytest.raises(ValueError, match="cannot read the time units ''"):
        read(save(plain, tmp_path, "unitless.nc"))


def test_an_extra_dimension_is_named(plain, tmp_path):
    with pytest.raises(ValueError, match=r"neither time, level, latitude nor longitude: number"):
        read(save(plain.expand_dims({"number": [0, 1]}), tmp_path), variables=["t2m"])


@pytest.mark.parametrize(
    ("latitude", "message"),
    [
        (lambda mesh: mesh * np.where(mesh > 50, np.nan, 1), "'nav_lat' is missing in 4 of 12 cells; write"),
        (lambda mesh: 0 * mesh, "'nav_lat' is 0 everywhere; write the coordinates of all cells into the file, or"),
    ],
)
def test_missing_coordinates_of_a_curvilinear_grid_are_named(plain, tmp_path, latitude, message):
    axes = [plain[axis].values for axis in ("lat", "lon")]
    mesh = dict(zip(("nav_lat", "nav_lon"), np.meshgrid(*axes, indexing="ij"), strict=True))
    bent = plain.drop_vars(["lat", "lon"]).rename({"lat": "row", "lon": "column"})
    read(save(bent.assign({key: (("row", "column"), value) for key, value in mesh.items()}), tmp_path))
    mesh["nav_lat"] = latitude(mesh["nav_lat"])
    path = save(bent.assign({key: (("row", "column"), value) for key, value in mesh.items()}), tmp_path, "holes.nc")
    with pytest.raises(ValueError, match=f"'t2m' in .*holes.nc has no places: {message}"):
        read(path, variables=["t2m"])


def test_projected_grids_are_refused(plain, tmp_path):
    projected = plain.rename({"lat": "y", "lon": "x"})
    projected["y"].attrs, projected["x"].attrs = {"units": "km"}, {"units": "km"}
    with pytest.raises(ValueError, match="has no latitude dimension"):
        read(save(projected, tmp_path), variables=["t2m"])


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ([50, 40, 0, 10], "not \\[south, north, west, east\\]"),
        ([0, 10], "not \\[south, north, west, east\\]"),
        ([-40, -30, 0, 10], "holds no latitude"),
        ([40, 60, 100, 120], "holds no longitude"),
    ],
)
def test_an_impossible_region_is_refused(plain, tmp_path, region, message):
    with pytest.raises(ValueError, match=message):
        read(save(plain, tmp_path), region=region)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 1, 2], "the time 2001-01-01 06:00 appears twice in .* at step 2; drop"),
        ([0, 2, 1, 3], "time goes back from 2001-01-01 12:00 to 2001-01-01 06:00 in .* at step 2; sort"),
    ],
)
def test_duplicate_and_unsorted_times_are_named(plain, tmp_path, order, message):
    with pytest.raises(ValueError, match=message):
        read(save(plain.isel(time=order), tmp_path))


def test_overlapping_files_are_named(plain, tmp_path):
    paths = [save(plain.isel(time=slice(0, 4)), tmp_path, "a.nc"), save(plain.isel(time=slice(3, 8)), tmp_path, "b.nc")]
    with pytest.raises(ValueError, match=r"the time 2001-01-01 18:00 appears twice in .*b.nc"):
        read(paths)


def test_files_that_overlap_by_several_steps_are_named(plain, tmp_path):
    paths = [save(plain.isel(time=slice(0, 5)), tmp_path, "a.nc"), save(plain.isel(time=slice(3, 8)), tmp_path, "b.nc")]
    with pytest.raises(ValueError, match=r"files overlap: time goes back from .* in .*b.nc at step 5; give files that"):
        read(paths)


def test_files_on_other_grids_are_named(plain, tmp_path):
    paths = [
        save(plain.isel(time=slice(0, 4)), tmp_path, "a.nc"),
        save(plain.isel(time=slice(4, 8), lat=[0, 1]), tmp_path, "b.nc"),
    ]
    with pytest.raises(ValueError, match=r"b.nc has another grid than .*a.nc"):
        read(paths)


@pytest.mark.parametrize("form", ["NETCDF3_CLASSIC", "NETCDF4"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.97])
def test_truncated_files_are_recognised(plain, tmp_path, form, kept):
    path = save(plain, tmp_path, format=form)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))] if kept else b"<html>404 not found</html>")
    with pytest.raises(
        OSError, match=r"cannot open .*data.nc: .*; it is not a readable NetCDF file or Zarr store"
    ) as error:
        read(path)
    assert "\n" not in str(error.value)


def test_damage_inside_a_file_is_reported_when_it_is_read(plain, tmp_path):
    path = save(plain, tmp_path, encoding={"t2m": {"zlib": True, "fletcher32": True, "chunksizes": (1, 3, 4)}})
    content = bytearray(path.read_bytes())
    position = content.rindex(b"\x78\x5e") if b"\x78\x5e" in content else content.rindex(b"\x78\x9c")
    content[position + 5 : position + 25] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"cannot read 't2m' from .*; the file looks truncated or corrupt"):
        read(path)


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not a Zarr store; to read the files in it type data.path='.*/\*.nc'"):
        read(tmp_path)
