"""Readers of observations on the real files (figures from their providers' descriptions and README of DATA_DIR)."""

import os
from pathlib import Path

import numpy as np
import pytest

from data.sources.observations import bufr, dart_text, madis, metar_csv, roms

DATA_DIR = os.environ.get("DATA_DIR", "")
HOUR = 3600


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


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
