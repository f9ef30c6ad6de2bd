"""Radar files as sequences on a plane: units, missing frames, grids, splits, and what is refused."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from data.datasets.radar import RadarData
from data.radar_normalisation import RadarNormalisation
from data.sources.radar import open_radar
from tests.radar_examples import STEP, showers, write

SPLIT = {"train": 0.5, "validation": 0.2, "test": 0.3}


@pytest.mark.parametrize(
    ("units", "factor"),
    [("mm h-1", 1), ("mm/h", 1), ("mm/hr", 1), ("mm (5 min accumulation)", 12), ("kg m-2", 12)],
)
def test_units_become_rates(tmp_path, units, factor):
    rates = showers(4)
    series = open_radar([write(tmp_path / "radar.nc", rates, units=units)])
    np.testing.assert_allclose(series.read([2, 0]), factor * rates[[2, 0]], rtol=1e-6)


def test_reflectivity_becomes_rates(tmp_path):
    dbz = np.full((2, 4, 5), 23.0, np.float32)
    series = open_radar([write(tmp_path / "radar.nc", dbz, units="dBZ")])
    np.testing.assert_allclose(series.read([0]), 1.0, rtol=0.02)


def test_missing_frames_are_there_and_unknown_and_files_follow_each_other(tmp_path):
    rates = showers(9)
    first = write(tmp_path / "a.nc", rates, keep=[0, 1, 3], corner=4)
    second = write(tmp_path / "b.nc", rates, keep=[6, 7, 8], corner=4)
    data = RadarData([str(second), str(first)], split=SPLIT)
    assert data.step == STEP and (np.diff(data.times) == STEP).all()
    np.testing.assert_array_equal(np.flatnonzero(~data.present), [2, 4, 5])
    read = data.read([2, 3, 7])
    assert read[0].isnan().all()
    np.testing.assert_array_equal(read[1, 5:].numpy(), rates[3, 5:])
    np.testing.assert_array_equal(read[2, 5:].numpy(), rates[7, 5:])
    assert not data.in_range[0, 0] and data.in_range[10:].all()
    text = data.describe()
    assert "3 frames: 2010-08-26 00:10, 2010-08-26 00:20" in text and "step 300 s" in text
    again = pickle.loads(pickle.dumps(data))
    torch.testing.assert_close(again.read([7])[0], read[2], equal_nan=True)


def test_the_plane_of_the_file_or_of_its_pixels(tmp_path):
    rates = showers(2, 20, 30)
    assert open_radar([write(tmp_path / "a.nc", rates)]).grid.units == "pixels"
    grid = open_radar([write(tmp_path / "b.nc", rates)], pixel=2.0).grid
    assert grid.units == "km" and np.ptp(grid.x) == 58 and grid.y[0] > grid.y[-1]
    metres = {"y": ("y", 1000.0 * np.arange(20), {"units": "m"}), "x": ("x", 1000.0 * np.arange(30), {"units": "m"})}
    np.testing.assert_allclose(open_radar([write(tmp_path / "c.nc", rates, **metres)]).grid.y, np.arange(20))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(kind="snow"), "data.kind=snow is unknown; allowed: rate"),
        (dict(pixel=0), "data.pixel=0 must be above 0 km"),
        (dict(variable="hail"), "no variable 'hail' .* it holds rain"),
        (dict(window=[[0, 70], [0, 10]]), r"data.window=.* is no window of 64 x 72 pixels"),
        (dict(cache="disk"), "data.cache=disk is unknown"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, sentence):
    path = write(tmp_path / "radar.nc", showers(6))
    with pytest.raises(ValueError, match=sentence):
        RadarData(str(path), split=SPLIT, **options)


def test_files_that_are_no_sequence_are_refused(tmp_path):
    rates = showers(6)
    with pytest.raises(ValueError, match="units 'stones'; say what it is"):
        open_radar([write(tmp_path / "a.nc", rates, units="stones")])
    with pytest.raises(ValueError, match="one frame"):
        open_radar([write(tmp_path / "b.nc", rates, keep=[0])])
    with pytest.raises(ValueError, match="not a whole number of steps"):
        open_radar([write(tmp_path / "c.nc", rates, keep=[0, 1, 2]), _shifted(tmp_path, rates)])


def _shifted(folder: Path, rates: np.ndarray) -> Path:
    import xarray as xr

    path = write(folder / "d.nc", rates, keep=[4, 5])
    with xr.open_dataset(path, decode_times=False) as opened:
        late = opened.load()
    late["time"] = ("time", late["time"].values + 100, late["time"].attrs)
    late.to_netcdf(folder / "late.nc")
    return folder / "late.nc"


def test_statistics_of_the_training_period_travel_with_the_checkpoint(tmp_path):
    path = write(tmp_path / "radar.nc", showers(20), corner=6)
    data = RadarData(str(path), split=SPLIT, window=[[20, 44], [20, 50]])  # what comes from beyond the image is unknown
    fitted = RadarNormalisation.fit(data, lead_steps=(1, 3))
    tensors, description = fitted.state_dict()
    again = RadarNormalisation.from_state(tensors, description)
    assert again.lead_index([3]) == [1] and torch.equal(again.spread("extrapolation"), fitted.extrapolation)
    assert (fitted.extrapolation < fitted.persistence).all()  # the showers only drift
    with pytest.raises(ValueError, match=r"lead times \[2\] .* not among the fitted ones"):
        again.lead_index([2])
    with pytest.raises(ValueError, match="shorter than the longest lead time"):
        RadarNormalisation.fit(data, lead_steps=(30,))


@pytest.mark.real_data
@pytest.mark.skipif(not os.environ.get("DATA_DIR"), reason="DATA_DIR is not set")
@pytest.mark.parametrize(
    ("name", "frames", "shape", "step"),
    [
        ("knmi_rad_nl25_20100826_5min.nc", 92, (765, 700), 300),
        ("mrms_preciprate_20190610_512crop.nc", 36, (512, 512), 120),
    ],
)
def test_real_radar_files(name, frames, shape, step):
    data = RadarData(f"catalogue:{name}", split=SPLIT, cache="none")
    assert (data.times.size, data.grid.shape, data.step) == (frames, shape, step) and data.present.all()
    rates = data.read([5])
    assert 1 < rates[rates.isfinite()].max() < 100
