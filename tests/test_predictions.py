"""`predictions.nc` as a reader of forecasts opens it, and none where an evaluation fails."""

import numpy as np
import pytest
import torch

from data.grids import LatLonGrid
from data.layout import Variable
from evaluation.predictions import PredictionsFile


def test_predictions_open_in_xarray_with_weatherbench_dimensions(tmp_path):
    import xarray as xr

    variables = (Variable("t", "K", level=850.0), Variable("t", "K", level=500.0), Variable("msl", "Pa"))
    grid = LatLonGrid([10.0, 0.0, -10.0], [0.0, 5.0, 10.0, 15.0])
    times = np.arange(40, dtype=np.int64) * 21_600
    forecast = torch.randn(5, 2, 3, 3, 4)
    forecast[:, :, :, 0, 0] = torch.nan
    options = dict(variables=variables, grid=grid, times=times, lead_steps=(1, 4), hours=(6.0, 24.0))
    path = tmp_path / "predictions.nc"
    with PredictionsFile(path, **options, calendar="proleptic_gregorian", attributes={"title": "a"}) as file:
        file.append(np.array([3, 4]), forecast[:2])
        file.append(np.array([7, 8, 9]), forecast[2:])
        assert not path.exists()
    with xr.open_dataset(path, decode_timedelta=True) as stored:
        assert stored["t"].dims == ("init_time", "lead_time", "level", "latitude", "longitude")
        assert stored["msl"].dims == ("init_time", "lead_time", "latitude", "longitude")
        assert stored["level"].values.tolist() == [500, 850] and stored["msl"].attrs["units"] == "Pa"
        assert (stored["lead_time"].values == np.array([6, 24], "timedelta64[h]")).all()
        expected = np.datetime64("1970-01-01", "ns") + np.array([3, 4, 7, 8, 9]) * np.timedelta64(6, "h")
        assert (stored["init_time"].values == expected).all()
        assert (stored["valid_time"].values[:, 1] == expected + np.timedelta64(24, "h")).all()
        np.testing.assert_array_equal(stored["t"].sel(level=850), forecast[:, :, 0])
        np.testing.assert_array_equal(stored["t"].sel(level=500), forecast[:, :, 1])
        np.testing.assert_array_equal(stored["msl"], forecast[:, :, 2])
        np.testing.assert_array_equal(stored["latitude"], grid.latitude)


def test_a_failed_evaluation_leaves_no_predictions(tmp_path):
    options = dict(variables=(Variable("t"),), grid=LatLonGrid([0.0, 1.0], [0.0, 1.0]), times=np.arange(3))
    with (
        pytest.raises(RuntimeError),
        PredictionsFile(tmp_path / "p.nc", **options, lead_steps=(1,), hours=(1.0,), calendar="noleap", attributes={}),
    ):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
