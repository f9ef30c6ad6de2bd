"""Readers of observations: each format on a small file of known content, on damaged files, and on the real files."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from data.sources.observations import FORMATS, bufr, dart_text, madis, metar_csv, read_observations, roms, ufs_parquet
from data.sources.observations.channel_table import SENSORS, ufs_channels
from data.sources.observations.table import REQUIRED, Table, concat

DATA_DIR = os.environ.get("DATA_DIR", "")
HOUR = 3600


def table(rows: int = 6, *, names=None, **columns) -> Table:
    defaults = {name: np.arange(rows) for name in REQUIRED}
    return Table({**defaults, "channel": np.arange(rows) % 2, **columns}, names or {})


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


# The table


def test_a_table_names_what_it_lacks():
    with pytest.raises(ValueError, match="missing: time, channel"):
        Table({"value": [1.0], "latitude": [0.0], "longitude": [0.0]})
    with pytest.raises(ValueError, match="'height' has 2 rows, value has 6"):
        table(height=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"ids 0\.\.1, and 1 names"):
        table(names={"channel": ("only",)})


def test_ids_follow_their_names_when_tables_are_joined():
    first = table(2, names={"channel": ("t", "q")}, height=[5.0, 6.0])
    second = table(2, names={"channel": ("q", "ps")})
    joined = concat([first, second])
    assert list(joined.name_of("channel")) == ["t", "q", "q", "ps"]
    np.testing.assert_array_equal(joined["height"], np.float32([5, 6, np.nan, np.nan]))
    with pytest.raises(ValueError, match="'channel' has names in some"):
        concat([first, table(2)])
    with pytest.raises(ValueError, match="'prior' is in some observation tables only"):
        concat([table(2, prior=np.ones((2, 3))), table(2)])


def test_windows_are_open_before_and_closed_after_a_frame():
    times = np.array([-3, 3, 3, 9, 0, 4]) * HOUR
    framed = table(time=times, value=np.arange(6)).to_frames([0, 6 * HOUR], (-3 * HOUR, 3 * HOUR))
    # -3 h belongs to the frame before; 3 h to the first frame, 9 h to the second.
    np.testing.assert_array_equal(framed["value"], [4, 1, 2, 5, 3])
    np.testing.assert_array_equal(framed["frame"], [0, 0, 0, 1, 1])
    wide = table(time=times).to_frames([0, 6 * HOUR], (-6 * HOUR, 6 * HOUR))
    assert np.bincount(wide["frame"]).tolist() == [5, 4]


def test_rows_reach_the_model_with_their_sample_and_frame():
    times = torch.arange(6).reshape(2, 3) * 6 * HOUR
    framed = table(12, time=np.arange(12) * 3 * HOUR, height=np.arange(12)).to_frames(times.flatten(), (-HOUR, HOUR))
    rows = framed.to_observations(times)
    assert rows.batch.tolist() == [0, 0, 0, 1, 1, 1] and rows.frame.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(rows.time(), times[rows.batch.long(), rows.frame.long()])
    assert rows.height.tolist() == [0, 2, 4, 6, 8, 10] and rows.pressure.isnan().all() and rows.error is None
    assert rows.value.dtype == rows.latitude.dtype == torch.float32
    assert sum(column.itemsize for column in rows.rows().values()) == 44  # bytes a row
    many = table(12, platform=np.arange(12) + 2**15 - 6, time=np.arange(12) * 3 * HOUR)
    kept = many.to_frames(times.flatten(), (-HOUR, HOUR))
    assert kept.to_observations(times).platform.tolist() == kept["platform"].tolist()
    empty = table(3).to_frames([100 * HOUR], (-HOUR, HOUR)).to_observations(torch.tensor([[100 * HOUR]]))
    assert len(empty) == 0


# Parquet in the UFS layout

START = int(np.datetime64("2021-05-31T21:00", "s").astype(np.int64))


def archive_rows(rows: int = 400, seed: int = 0) -> Table:
    """Two days of conventional and satellite-like rows with everything that may be null."""
    rng = np.random.default_rng(seed)

    def sometimes(values, empty):
        return np.where(rng.random(rows) < 0.5, empty, values)

    return Table(
        {
            "value": rng.normal(280, 5, rows),
            "latitude": rng.uniform(-90, 90, rows).astype(np.float32),
            "longitude": rng.uniform(0, 360, rows).astype(np.float32),
            "time": START + rng.integers(0, 48 * HOUR, rows),
            "channel": rng.integers(0, 543, rows),
            "platform": rng.integers(0, 32, rows),
            "type": sometimes(rng.integers(1, 300, rows), 0),
            "qc_flag": sometimes(rng.integers(0, 50, rows), -1),
            "use_flag": sometimes(np.ones(rows), -1),
            **{
                name: sometimes(rng.uniform(0, 90, rows), np.nan)
                for name in ("height", "pressure", "satellite_zenith", "solar_zenith", "scan_angle")
            },
        }
    )


def assert_same_rows(found: Table, expected: Table):
    """Equal up to the order of rows (values are distinct)."""
    assert len(found) == len(expected)
    found, expected = (item.select(np.argsort(item["value"])) for item in (found, expected))
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(found[name], column, err_msg=name)


def test_parquet_gives_back_what_was_written(tmp_path):
    rows = archive_rows()
    files = ufs_parquet.write(tmp_path, "conv", rows)
    assert [str(path.relative_to(tmp_path)) for path in files] == [
        f"conv/{day}/0.parquet" for day in ("20210531", "20210601", "20210602")
    ]
    found = ufs_parquet.read(tmp_path)
    assert_same_rows(found, rows)
    assert np.abs(found["bin"] - found["time"]).max() <= 1.5 * HOUR and not (found["bin"] % (3 * HOUR)).any()


@pytest.mark.parametrize("by", ["time", "bin"])
def test_windows_of_parquet_agree_with_filtering_everything(tmp_path, by):
    for sensor in ("atms", "conv"):
        ufs_parquet.write(tmp_path, sensor, archive_rows(seed=len(sensor)))
    whole = ufs_parquet.read(tmp_path)
    rng = np.random.default_rng(2)
    edges = [(START + 3 * HOUR, START + 9 * HOUR), (START + 3 * HOUR, START + 3 * HOUR), (0, START), (START, None)]
    for start, stop in [*edges, *np.sort(START + rng.integers(-HOUR, 50 * HOUR, (10, 2)), axis=1).tolist()]:
        wanted = (whole[by] > start) & (whole[by] <= (np.inf if stop is None else stop))
        assert_same_rows(ufs_parquet.read(tmp_path, start=start, stop=stop, by=by), whole.select(wanted))
    assert_same_rows(ufs_parquet.read(tmp_path, sensors=["atms"]), archive_rows(seed=4))


def test_only_matching_row_groups_are_read(tmp_path):
    import pyarrow.parquet as pq

    rows = archive_rows()
    path = ufs_parquet.write(tmp_path, "conv", rows)[1]
    with pq.ParquetFile(path) as file:
        assert file.metadata.num_row_groups == 8
        noon = START + 15 * HOUR
        assert ufs_parquet.matching_groups(file, noon - HOUR, noon + HOUR, "time") == [4]
        assert ufs_parquet.matching_groups(file, noon - 3 * HOUR, noon, "bin") == [4]
        first = file.metadata.row_group(0).column(5)
        place, size = first.data_page_offset, first.total_compressed_size
    # A damaged first group: the fifth can still be read, the whole file cannot.
    content = bytearray(path.read_bytes())
    content[place : place + size] = b"\xff" * size
    path.write_bytes(content)
    near = rows.between(noon - HOUR, noon + HOUR)
    assert len(near)
    assert_same_rows(ufs_parquet.read(tmp_path, start=noon - HOUR, stop=noon + HOUR), near)
    with pytest.raises(OSError, match=r"cannot read .*0\.parquet"):
        ufs_parquet.read(tmp_path)


def test_damaged_archives_are_refused_in_one_sentence(tmp_path):
    import pyarrow.parquet as pq

    path = ufs_parquet.write(tmp_path / "a", "conv", archive_rows())[0]
    arrow = pq.read_table(path)
    with pytest.raises(ValueError, match="lacks the sensors iasi; it holds conv"):
        ufs_parquet.read(tmp_path / "a", sensors=["iasi"])
    with pytest.raises(FileNotFoundError, match=r"there is no observation file .*nowhere"):
        ufs_parquet.read(tmp_path / "nowhere")
    pq.write_table(arrow.drop_columns(["Platform_ID", "Latitude"]), path)
    with pytest.raises(ValueError, match=r"lacks the columns Latitude, Platform_ID; it holds Absolute_Obs_Time"):
        ufs_parquet.read(tmp_path / "a")
    rows = archive_rows()
    platform = rows["platform"].copy()
    platform[:3] = [99, 99, 40]
    ufs_parquet.write(tmp_path / "b", "conv", rows.with_columns(platform=platform, time=np.full(len(rows), START)))
    with pytest.raises(
        ValueError, match=r"3 of 400 rows have a Platform_ID outside 0..31: 40 \(1 rows\), 99 \(2 rows\)"
    ):
        ufs_parquet.read(tmp_path / "b")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="truncated or corrupt"):
        ufs_parquet.read(tmp_path / "a")


def test_null_coordinates_become_nan_and_null_times_lie_in_no_window(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = ufs_parquet.write(tmp_path, "conv", archive_rows(20))[0]
    arrow = pq.read_table(path)
    for name in ("Latitude", "Absolute_Obs_Time"):
        column = arrow[name].to_pylist()
        column[0 if name == "Latitude" else 1] = None
        arrow = arrow.set_column(arrow.column_names.index(name), name, pa.array(column, arrow.schema.field(name).type))
    pq.write_table(arrow, path)
    found = ufs_parquet.read(tmp_path, start=0)
    assert len(found) == 19 and np.isnan(found["latitude"]).sum() == 1


def test_the_channel_table_of_the_archive(tmp_path):
    channels = ufs_channels()
    assert len(channels) == 543 and channels.names[322:330] == (
        "gps_angle",
        "gps_t",
        "gps_q",
        "ps",
        "q",
        "t",
        "u",
        "v",
    )
    assert channels.index("mhs_1") == 22 and channels.sensor[-1] == len(SENSORS) - 1
    assert channels.minimum[channels.index("iasi_1")] == 150 and channels.maximum[channels.index("atms_22")] == 400
    assert np.isinf(channels.minimum[channels.index("airs-pca_3")])
    rows = archive_rows(20_000)
    channel = np.where(np.arange(20_000) % 2, 322 + rows["channel"] % 8, rows["channel"] % 500)
    rows = rows.with_columns(channel=channel)
    fitted = channels.fit(rows, levels=(20, 60))
    ufs_parquet.write_channel_table(tmp_path, fitted)
    found = ufs_parquet.read_channel_table(tmp_path)
    assert found.names == fitted.names and found.sensors == fitted.sensors
    for name in ("sensor", "minimum", "maximum", "conventional", "mean", "stddev"):
        np.testing.assert_array_equal(getattr(found, name), getattr(fitted, name), err_msg=name)
    assert np.isnan(found.mean[500:]).all() and np.isfinite(found.mean[:500]).all()
    np.testing.assert_array_equal(found.by_pressure.levels, [20, 60])
    conventional = slice(322, 330)
    np.testing.assert_allclose(found.by_pressure.mean[conventional], fitted.by_pressure.mean[conventional])


def test_a_bad_channel_table_is_refused(tmp_path):
    import pyarrow.parquet as pq

    ufs_parquet.write_channel_table(tmp_path, ufs_channels())
    path = tmp_path / "channel_table.parquet"
    arrow = pq.read_table(path)
    pq.write_table(arrow.drop_columns(["name"]), path)
    with pytest.raises(ValueError, match="lacks the columns name"):
        ufs_parquet.read_channel_table(tmp_path)
    import pyarrow as pa

    pq.write_table(pa.concat_tables([arrow, arrow.slice(0, 1)]), path)
    with pytest.raises(ValueError, match="names a Global_Channel_ID twice"):
        ufs_parquet.read_channel_table(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"channel_table\.parquet"):
        ufs_parquet.read_channel_table(tmp_path / "elsewhere")


# Station reports

METARS = """Unix_time,DateString,ICAO,Latitude,Longitude,Elev,Temp,Dewp,Wdir,Wspd,QcFlag,Altimeter,Raw
1601530260,x,CYGW, 55.270, -77.770,12,  4.0,  3.0,270,10,2,29.92,"CYGW, 010531Z"
1601530860,x,EHWO, 51.450,   4.320,17, ,,,,6,,"EHWO"
1601531000,x,AAAA, 10.0,   350.0,5,10.0,,360,2,0,30.00,"AAAA"
"""


def test_station_reports_become_one_row_a_value_in_standard_units(tmp_path):
    path = tmp_path / "metars.csv"
    path.write_text(METARS)
    rows = metar_csv.read(path)
    assert list(rows.name_of("channel")) == [
        "temperature",
        "dewpoint",
        "u",
        "v",
        "altimeter",
        "temperature",
        "u",
        "v",
        "altimeter",
    ]
    np.testing.assert_allclose(
        rows["value"],
        [277.15, 276.15, 5.14444, 0, 1013.2076, 283.15, 0, -1.028888, 1015.9167],
        atol=1e-4,
    )
    assert list(rows.name_of("station")) == ["CYGW"] * 5 + ["AAAA"] * 4
    assert rows["height"][0] == 12 and rows["qc_flag"][0] == 2 and rows["latitude"][0] == 55.27
    assert len(metar_csv.read(path, start=1601530260)) == 4
    path.write_text(METARS.replace("Altimeter", "Alt").replace("Wspd", "Speed"))
    with pytest.raises(ValueError, match="lacks the columns Wspd, Altimeter"):
        metar_csv.read(path)
    path.write_text(METARS.replace("4.0,", "warm,"))
    with pytest.raises(OSError, match="could not convert string to float: 'warm'"):
        metar_csv.read(path)


def write_madis(path: Path, *, compressed: bool, drop: str | None = None):
    import netCDF4

    with netCDF4.Dataset(path.with_suffix(".raw"), "w", format="NETCDF3_CLASSIC") as dataset:
        dataset.createDimension("recNum", 3)
        dataset.createDimension("text", 6)
        for name, values in {
            "latitude": [10.0, 20.0, 1e37],
            "longitude": [1.0, 2.0, 3.0],
            "altitude": [0.0, 11_000.0, 0.0],
            "temperature": [280.0, np.inf, 285.0],
            "windDir": [90.0, 180.0, 0.0],
            "windSpeed": [5.0, 1e37, 4.0],
        }.items():
            if name != drop:
                dataset.createVariable(name, "f4", ("recNum",), fill_value=np.float32(1e37))[:] = np.float32(values)
        dataset.createVariable("timeObs", "f8", ("recNum",))[:] = [100.0, 200.0, 300.0]
        dataset.createVariable("temperatureDD", "S1", ("recNum",))[:] = np.array([b"X", b"V", b"V"])
        dataset.createVariable("en_tailNumber", "S1", ("recNum", "text"))[:] = np.array(
            [list("FSL001"), list("FSL2\0\0"), list("FSL001")], dtype="S1"
        )
    content = path.with_suffix(".raw").read_bytes()
    path.write_bytes(gzip.compress(content) if compressed else content)


@pytest.mark.parametrize("compressed", [True, False])
def test_aircraft_reports_without_infinite_and_missing_values(tmp_path, compressed):
    path = tmp_path / "acars.nc.gz"
    write_madis(path, compressed=compressed)
    rows = madis.read(path)
    # The second report has an infinite temperature and no wind, the third no place.
    assert list(rows.name_of("channel")) == ["temperature", "u", "v"]
    np.testing.assert_allclose(rows["value"], [280, -5, 0], atol=1e-5)
    assert rows["qc_flag"].tolist() == [1, 0, 0] and set(rows.name_of("station")) == {"FSL001"}
    assert rows["pressure"][0] == pytest.approx(1013.25) and rows["time"].tolist() == [100] * 3
    # Values of the ICAO standard atmosphere.
    np.testing.assert_allclose(madis.standard_pressure(np.array([5000.0, 11_000, 15_000])), [540.2, 226.3, 120.4], 1e-3)
    write_madis(path, compressed=compressed, drop="windDir")
    with pytest.raises(ValueError, match="lacks the variables windDir"):
        madis.read(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(OSError, match=r"cannot read .*acars"):
        madis.read(path)


# ROMS

ROMS_COLUMNS = {
    "obs_type": ("i4", [1, 6, 7]),
    "obs_provenance": ("i4", [1, 2, 2]),
    "obs_time": ("f8", [10.0, 10.5, 11.0]),
    "obs_depth": ("f8", [30.0, 12.5, -40.0]),
    "obs_lon": ("f8", [-130.0, -129.0, -128.0]),
    "obs_lat": ("f8", [40.0, 41.0, 42.0]),
    "obs_value": ("f8", [0.1, 12.0, 33.0]),
    "obs_error": ("f8", [0.0004, 0.16, 0.01]),
}


def write_roms(path: Path, **changes):
    import netCDF4

    with netCDF4.Dataset(path, "w") as dataset:
        dataset.createDimension("datum", 3)
        for name, (kind, values) in {**ROMS_COLUMNS, **changes}.items():
            if values is not None:
                dataset.createVariable(name, kind, ("datum",))[:] = values
        if "obs_time" in dataset.variables:
            dataset["obs_time"].units = "days since 1968-05-23 00:00:00 GMT"
        dataset["obs_provenance"].flag_values = np.array([1, 2], np.int32)
        dataset["obs_provenance"].flag_meanings = "altimeter profiles"


def test_ocean_observations_keep_levels_apart_from_depths(tmp_path):
    path = tmp_path / "obs.nc"
    write_roms(path)
    rows = roms.read(path)
    assert list(rows.name_of("channel")) == ["zeta", "temperature", "salinity"]
    assert list(rows.name_of("platform")) == ["altimeter", "profiles", "profiles"]
    np.testing.assert_array_equal(rows["level"], [30, 12.5, np.nan])
    np.testing.assert_array_equal(rows["height"], np.float32([np.nan, np.nan, -40]))
    np.testing.assert_allclose(rows["error"], [0.02, 0.4, 0.1], rtol=1e-6)
    base = np.datetime64("1968-05-23", "s")
    assert rows["time"][1] == (base + np.timedelta64(252, "h")).astype(np.int64)
    assert roms.read(path, start=rows["time"][0], stop=rows["time"][1])["record"].tolist() == [1]
    write_roms(path, obs_provenance=("i4", [1, 9, 9]))
    with pytest.raises(ValueError, match="2 rows have a obs_provenance that is not one of altimeter, profiles"):
        roms.read(path)
    write_roms(path, obs_time=("f8", None))
    with pytest.raises(ValueError, match="lacks the variables obs_time"):
        roms.read(path)
    path.write_bytes(b"CDF\x01nothing")
    with pytest.raises(OSError, match="it is not a readable NetCDF file"):
        roms.read(path)


# DART

DART = """ obs_sequence
obs_type_definitions
           2
           5 RADIOSONDE_TEMPERATURE
           9 LAND_SFC_ALTIMETER
  num_copies:            5  num_qc:            2
  num_obs:            2  max_num_obs:            2
observation
prior ensemble mean
prior ensemble member      1
posterior ensemble member      1
prior ensemble member      2
Data QC
DART quality control
  first:            1  last:            2
 OBS            1
   230.5
   231.0
   231.5
   230.75
   230.5
   1.0
   0.0
          -1           2          -1
obdef
loc3d
     4.71238898038469        0.523598775598299         25000.0000000000      2
kind
           5
 43200     153005
   4.0
 OBS            2
   1010.0
  -888888.0
  -888888.0
  -888888.0
  -888888.0
   1.0
   7.0
           1          -1          -1
obdef
loc3d
     0.0       -0.785398163397448         120.000000000000     -1
kind
           9
 external_FO
 3600     153006
   1.0
"""


def test_dart_text_with_members_and_quality_control(tmp_path):
    path = tmp_path / "obs_seq.final"
    path.write_text(DART)
    rows = dart_text.read(path)
    assert list(rows.name_of("channel")) == ["RADIOSONDE_TEMPERATURE", "LAND_SFC_ALTIMETER"]
    np.testing.assert_allclose(rows["longitude"], [270, 0], atol=1e-9)
    np.testing.assert_allclose(rows["latitude"], [30, -45], atol=1e-9)
    np.testing.assert_array_equal(rows["pressure"], np.float32([250, np.nan]))
    np.testing.assert_array_equal(rows["height"], np.float32([np.nan, 120]))
    np.testing.assert_array_equal(rows["prior"], [[231.5, 230.5], [np.nan, np.nan]])
    np.testing.assert_array_equal(rows["posterior"], [[230.75], [np.nan]])
    assert rows["error"].tolist() == [2, 1] and rows["qc_flag"].tolist() == [0, 7] and rows["type"].tolist() == [5, 9]
    assert rows["time"].astype("datetime64[s]").astype(str).tolist() == ["2019-12-01T12:00:00", "2019-12-02T01:00:00"]
    for damage in (DART[:600], DART.replace("obs_sequence", "notes"), DART.replace("kind\n           9", "kind\n  77")):
        path.write_text(damage)
        with pytest.raises((OSError, ValueError), match=r"obs_seq\.final"):
            dart_text.read(path)


# Any format


def test_formats_are_chosen_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"unknown observation format 'grib'; allowed: {', '.join(FORMATS)}"):
        read_observations("x", format="grib")
    path = tmp_path / "a.csv"
    path.write_text(METARS)
    (tmp_path / "b.csv").write_text(METARS.replace("AAAA", "BBBB"))
    rows = read_observations(tmp_path / "*.csv", format="metar_csv")
    assert len(rows) == 18 and set(rows.name_of("station")) == {"AAAA", "BBBB", "CYGW"}
    for format in FORMATS:
        if format != "bufr":
            with pytest.raises(FileNotFoundError, match=r"nothing\.here"):
                read_observations(tmp_path / "nothing.here", format=format)


def test_bufr_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "eccodes", None)
    (tmp_path / "a.bufr").write_bytes(b"BUFR")
    with pytest.raises(ValueError, match=r"needs ecCodes; type: pip install --editable '\.\[bufr\]'"):
        bufr.read(tmp_path / "a.bufr")


@pytest.fixture
def eccodes():
    try:
        import eccodes
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"the extra bufr is not installed: {error}")
    return eccodes


def test_damaged_bufr_is_refused(tmp_path, eccodes):
    for content in (b"BUFR\x00\x00\x30\x04 nothing", b"", b"GRIB"):
        (tmp_path / "a.bufr").write_bytes(content)
        with pytest.raises(OSError, match=r"cannot read .*a\.bufr"):
            bufr.read(tmp_path / "a.bufr")


# The real files (figures from their providers' descriptions and README of DATA_DIR)


def real(name: str) -> Path:
    path = Path(DATA_DIR) / name
    if not path.is_file():
        pytest.skip(f"{name} is not in DATA_DIR")
    return path


@pytest.mark.real_data
@pytest.mark.skipif(not DATA_DIR, reason="DATA_DIR is not set")
class TestRealFiles:
    def test_metars(self):
        rows = metar_csv.read(real("2020100106_metars.csv"))
        assert len(rows.names["station"]) == 4821
        reports = np.unique(np.stack([rows["time"], rows["station"]]), axis=1).shape[1]
        assert 8200 < reports <= 8361
        temperature = rows.select(rows.name_of("channel") == "temperature")
        assert len(temperature) == 8361 - 57 and temperature["value"].mean() == pytest.approx(286.87, abs=0.01)
        altimeter = rows.select(rows.name_of("channel") == "altimeter")["value"]
        assert 950 < altimeter.min() < altimeter.max() < 1060

    @pytest.mark.parametrize(
        ("name", "reports"), [("2005082600_metar.nc.gz", 3328), ("2005082600_acars.nc.gz", 11_854)]
    )
    def test_madis(self, name, reports):
        rows = madis.read(real(name))
        assert all(np.isfinite(rows[column]).all() for column in ("value", "latitude", "longitude"))
        temperature = rows.select(rows.name_of("channel") == "temperature")
        assert 0.7 * reports < len(temperature) <= reports
        assert 200 < temperature["value"].min() < temperature["value"].max() < 325
        assert 0 < rows["qc_flag"].mean() < 0.1
        wind = rows["value"][np.isin(rows.name_of("channel"), ["u", "v"])]
        assert np.abs(wind).max() < 100

    def test_roms_with_the_background_of_the_same_rows(self):
        import netCDF4

        rows = roms.read(real("wc13_obs.nc"))
        channel = rows.name_of("channel")
        assert [(channel == name).sum() for name in ("zeta", "temperature", "salinity")] == [1570, 5120, 125]
        assert str(rows["time"].astype("datetime64[s]").min())[:10] == "2004-01-03"
        with netCDF4.Dataset(real("wc13_mod.nc")) as model:
            background, analysis = (
                np.ma.filled(model[name][:].astype(float), np.nan).reshape(-1)[rows["record"]]
                for name in ("NLmodel_initial", "NLmodel_value")
            )
        for name, before, after in (("temperature", 0.449, 0.238), ("zeta", 0.034, 0.015), ("salinity", 0.096, 0.072)):
            mine = channel == name
            assert rms((rows["value"] - background)[mine]) == pytest.approx(before, abs=6e-4)
            assert rms((rows["value"] - analysis)[mine]) == pytest.approx(after, abs=6e-4)

    def test_dart(self):
        rows = dart_text.read(real("obs_seq.final.1000"))
        assert len(rows) == 1000 and rows["prior"].shape == rows["posterior"].shape == (1000, 80)
        mine = (rows.name_of("channel") == "ACARS_TEMPERATURE") & (rows["qc_flag"] == 0)
        assert rms((rows["value"] - rows["prior_mean"])[mine]) == pytest.approx(1.04, abs=0.01)
        assert rms((rows["value"] - rows["posterior_mean"])[mine]) == pytest.approx(0.94, abs=0.01)
        np.testing.assert_allclose(rows["prior"][mine].mean(axis=1), rows["prior_mean"][mine], atol=1e-6)
        assert (rows["longitude"] >= 0).all() and (rows["longitude"] <= 360).all()

    @pytest.mark.parametrize(
        ("name", "footprints", "sensor", "channels", "satellite"),
        [("amsa_55.bufr", 660, "amsua", 14, "metop-a"), ("atms_201.bufr", 189, "atms", 22, "npp")],
    )
    def test_bufr(self, eccodes, name, footprints, sensor, channels, satellite):
        rows = bufr.read(real(name))
        assert len(rows) == footprints * channels and set(rows.name_of("platform")) == {satellite}
        assert all(item.startswith(f"{sensor}_") for item in set(rows.name_of("channel")))
        assert 140 < rows["value"].min() < rows["value"].max() < 300
        # The scan angle is the satellite zenith angle seen from 6371 / 7200 of the distance to the Earth's centre.
        np.testing.assert_allclose(
            np.abs(np.sin(np.deg2rad(rows["scan_angle"]))),
            np.sin(np.deg2rad(rows["satellite_zenith"])) * 0.885,
            atol=0.02,
        )
