"""Readers of observations: each format on a small file of known content and on damaged files."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from data.sources.observations import bufr, dart_text, madis, metar_csv, roms, ufs_parquet
from data.sources.observations.table import REQUIRED, Table, concat

DATA_DIR = os.environ.get("DATA_DIR", "")
HOUR = 3600


def table(rows: int = 6, *, names=None, **columns) -> Table:
    defaults = {name: np.arange(rows) for name in REQUIRED}
    return Table({**defaults, "channel": np.arange(rows) % 2, **columns}, names or {})


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


@pytest.mark.parametrize("format", (dart_text, madis, metar_csv, roms, ufs_parquet))
def test_a_file_that_is_not_there_is_named(tmp_path, format):
    with pytest.raises(FileNotFoundError, match=r"nothing\.here"):
        format.read(tmp_path / "nothing.here")


def test_bufr_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "eccodes", None)
    (tmp_path / "a.bufr").write_bytes(b"BUFR")
    with pytest.raises(ValueError, match=r"needs ecCodes; type: pip install --editable '\.\[bufr\]'"):
        bufr.read(tmp_path / "a.bufr")


def test_damaged_bufr_is_refused(tmp_path, eccodes):
    for content in (b"BUFR\x00\x00\x30\x04 nothing", b"", b"GRIB"):
        (tmp_path / "a.bufr").write_bytes(content)
        with pytest.raises(OSError, match=r"cannot read .*a\.bufr"):
            bufr.read(tmp_path / "a.bufr")
