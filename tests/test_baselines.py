"""Baselines against plain NumPy on a small periodic globe with gaps, and against published numbers on real data."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from data.datasets.gridded import GriddedData
from data.normalisation import Normalisation
from evaluation import baselines
from evaluation.baselines import ridge
from evaluation.regions import regions_of
from evaluation.scores import ForecastScores, cell_weights

STEPS = (1, 3)
FRAMES = 640


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(data, normalisation): waves that drift eastwards by one cell a frame plus noise, land, gaps, a break in time."""
    import xarray as xr

    folder = tmp_path_factory.mktemp("world")
    os.environ["HYDRASPHERE_CACHE"], before = str(folder / "cache"), os.environ.get("HYDRASPHERE_CACHE")
    rng = np.random.default_rng(1)
    latitude, longitude = np.linspace(60, -60, 5), np.arange(0, 360, 30.0)
    frame = np.arange(FRAMES)[:, None, None]
    place = np.deg2rad(longitude - 30 * frame)
    slow = np.cumsum(rng.normal(size=(FRAMES, 5, 1)), axis=0) * 0.02
    values = 280 + 5 * np.cos(3 * place) * (1 + slow) + 2 * np.sin(place) + 0.3 * rng.normal(size=(FRAMES, 5, 12))
    values[rng.random(values.shape) < 0.02] = np.nan
    values[:, 4, 7:] = np.nan
    times = np.datetime64("2001-01-01", "ns") + np.arange(FRAMES) * np.timedelta64(6, "h")
    times[500:] += np.timedelta64(2, "D")
    path = folder / "drift.nc"
    xr.Dataset(
        {"t": (("time", "latitude", "longitude"), values.astype("float32"), {"units": "K"})},
        {"time": times, "latitude": latitude, "longitude": longitude},
    ).to_netcdf(path)
    data = GriddedData(str(path), split={"train": 0.6, "validation": 0.2, "test": 0.2}, cache="ram", annual_harmonics=0)
    yield data, Normalisation.fit(data, lead_steps=STEPS)
    os.environ.pop("HYDRASPHERE_CACHE") if before is None else os.environ.update(HYDRASPHERE_CACHE=before)


def arrays(world):
    """float64 NumPy: anomalies (N, H, W) and climatology (N, H, W), NaN where missing."""
    data, normalisation = world
    climatology = normalisation.climatology(data.times)[:, 0].double().numpy()
    return data.read(np.arange(FRAMES))[:, 0].double().numpy() - climatology, climatology


def test_a_situation_holds_nothing_across_a_gap_or_before_the_start(world):
    data, normalisation = world
    known, truth = baselines.situation(data, normalisation, np.array([1, 500, 502]), STEPS)
    anomalies, climatology = arrays(world)
    assert known.anomalies[0, 2].isnan().all() and known.anomalies[1, 1:].isnan().all()
    np.testing.assert_allclose(known.anomalies[2, :, 0], anomalies[[502, 501, 500]], atol=1e-4)
    np.testing.assert_allclose(known.climatology[0, :, 0], climatology[[2, 4]])
    np.testing.assert_allclose(truth[2, :, 0], (anomalies + climatology)[[503, 505]], atol=1e-4)


def test_simple_baselines_equal_their_definitions(world):
    data, normalisation = world
    anomalies, climatology = arrays(world)
    bases = np.array([510, 530, 600])
    known, _ = baselines.situation(data, normalisation, bases, STEPS)
    fitted = baselines.build(
        ["persistence", "climatology", "damped_persistence"], data, normalisation, lead_steps=STEPS
    )
    for lead, step in enumerate(STEPS):
        last, ahead = (anomalies + climatology)[bases], climatology[bases + step]
        damping = float(normalisation.damping[lead, 0])
        expected = {
            "persistence": np.where(np.isnan(last), ahead, last),
            "climatology": ahead,
            "damped_persistence": ahead + damping * np.nan_to_num(anomalies[bases]),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(fitted[name].forecast(known)[:, lead, 0], values, rtol=1e-6, err_msg=name)


def plain_ridge(anomalies, bases, step, row, column, alpha):
    """(243,) coefficients of one cell, from loops: the definition in `evaluation/baselines/ridge.py`."""
    filled = np.nan_to_num(anomalies)

    def predictors(base):
        found = []
        for lag in (0, 1, 2):
            for i in range(row - 4, row + 5):
                for j in range(column - 4, column + 5):
                    found.append(filled[base - lag, i, j % 12] if 0 <= i < 5 else 0.0)
        return found

    x = np.array([predictors(base) for base in bases])
    y = anomalies[bases + step, row, column]
    right = x.T @ np.nan_to_num(y) * (y.size / np.isfinite(y).sum())
    return np.linalg.solve(x.T @ x + alpha * (x[:, 40] ** 2).sum() * np.eye(243), right), predictors


def test_ridge_equals_plain_normal_equations(world):
    data, normalisation = world
    anomalies, climatology = arrays(world)
    fitted = ridge.LocalRidge.fit(data, normalisation, lead_steps=STEPS, split="test")
    training = data.training_period
    assert training[-1] < 500  # in front of the break: no window is lost to it
    bases = np.arange(2, training[-1] - max(STEPS) + 1)
    tests = np.array([510, 540])
    forecast = fitted.forecast(baselines.situation(data, normalisation, tests, STEPS)[0])
    for row, column in ((2, 5), (0, 0), (3, 11)):
        for lead, step in enumerate(STEPS):
            alpha = float(fitted.alphas[lead, 0])
            coefficients, predictors = plain_ridge(anomalies, bases, step, row, column, alpha)
            found = fitted.coefficients[lead, 0, int(fitted.nearest[row, column])]
            np.testing.assert_allclose(found, coefficients, atol=2e-4)
            expected = [climatology[b + step, row, column] + np.dot(predictors(b), coefficients) for b in tests]
            np.testing.assert_allclose(forecast[:, lead, 0, row, column], expected, atol=5e-3)
    assert (fitted.coefficients[:, 0, fitted.nearest[4, 9]] == 0).all()  # land: never observed


def test_ridge_sees_what_drifts_in_from_the_side_and_around_the_globe(world):
    data, normalisation = world
    errors = {}
    fitted = baselines.build(["damped_persistence", "local_ridge"], data, normalisation, lead_steps=STEPS)
    bases = data.splits["test"][3 : -max(STEPS)]
    known, truth = baselines.situation(data, normalisation, bases, STEPS)
    for name, baseline in fitted.items():
        scores = ForecastScores(cell_weights(data.grid), regions_of(data.grid))
        scores.update(baseline.forecast(known), truth, known.climatology)
        errors[name] = scores.values()["rmse"][0, :, 0]
    assert (errors["local_ridge"] < 0.4 * errors["damped_persistence"]).all()
    edge = (fitted["local_ridge"].forecast(known) - truth)[..., 0].square().nanmean().sqrt()
    assert edge < 1.5 * errors["local_ridge"].max()  # the first column needs the last ones


def test_ridge_is_read_back_from_the_cache_and_never_reads_the_evaluated_split(world, monkeypatch):
    data, normalisation = world
    first = ridge.LocalRidge.fit(data, normalisation, lead_steps=STEPS, split="test")
    read = []
    monkeypatch.setattr(ridge, "_fit", lambda data, normalisation, frames, *rest: read.append(frames) or {})
    again = ridge.LocalRidge.fit(data, normalisation, lead_steps=STEPS, split="test")
    assert not read and torch.equal(first.coefficients, again.coefficients)
    with pytest.raises(KeyError):  # another split is another fit
        ridge.LocalRidge.fit(data, normalisation, lead_steps=STEPS, split="train")
    assert not np.isin(read[0], data.splits["train"]).any()


def test_large_grids_fit_a_bounded_number_of_cells(world, monkeypatch):
    data, normalisation = world
    monkeypatch.setattr(ridge, "MAX_CELLS", 12)
    rows, columns = ridge._fitted_axes(data)
    assert rows.size * columns.size <= 12
    fitted = ridge.LocalRidge.fit(data, normalisation, lead_steps=STEPS, split="test")  # not the cached whole fit
    assert fitted.coefficients.shape == (2, 1, rows.size * columns.size, 243)
    for row, column in ((0, 0), (4, 11), (2, 6)):
        nearest = int(fitted.nearest[row, column])
        distance = np.abs(columns - column)
        assert np.abs(rows - row)[nearest // columns.size] == np.abs(rows - row).min()
        assert np.minimum(distance, 12 - distance)[nearest % columns.size] == np.minimum(distance, 12 - distance).min()


def test_an_unknown_baseline_is_refused_with_what_is_allowed(world):
    with pytest.raises(ValueError, match="unknown baseline 'eof'; allowed: persistence, climatology, damped"):
        baselines.build(["eof"], *world, lead_steps=STEPS)


@pytest.mark.real_data
def test_ncep_air_temperature_reaches_the_published_numbers(tmp_path, monkeypatch):
    """RMSE in K at 6, 24 and 72 h, trained on 2013, tested on 2014; area and cos-latitude weights agree."""
    if not (Path(os.environ.get("DATA_DIR", "")) / "air_temperature.nc").is_file():
        pytest.skip("air_temperature.nc is not in DATA_DIR")
    monkeypatch.setenv("HYDRASPHERE_CACHE", str(tmp_path))
    steps = (1, 4, 12)
    split = {"train": "2013", "validation": ["2013-11", "2013-12"], "test": "2014"}
    data = GriddedData("catalogue:air_temperature.nc", split=split, variables=["air"], cache="ram")
    normalisation = Normalisation.fit(data, lead_steps=steps)
    fitted = baselines.build(list(baselines.BASELINES), data, normalisation, lead_steps=steps)
    rmse = {}
    for kind in ("area", "cos"):
        weights = cell_weights(data.grid, kind)
        scores = {name: ForecastScores(weights, regions_of(data.grid)) for name in fitted}
        for bases in np.array_split(data.splits["test"][: -max(steps)], 20):
            known, truth = baselines.situation(data, normalisation, bases, steps)
            for name, baseline in fitted.items():
                scores[name].update(baseline.forecast(known), truth, known.climatology)
        rmse[kind] = {name: found.values()["rmse"][0, :, 0].numpy() for name, found in scores.items()}
    for name, published in (
        ("persistence", (2.43, 3.01, 4.15)),
        ("climatology", (3.69, 3.69, 3.69)),
        ("damped_persistence", (1.46, 2.75, 3.49)),
    ):
        np.testing.assert_allclose(rmse["cos"][name], published, atol=0.02, err_msg=name)
        np.testing.assert_allclose(rmse["area"][name], rmse["cos"][name], atol=1e-3)
    # A penalty chosen on the training year may come out a little better than the published one, never worse.
    assert (rmse["cos"]["local_ridge"] <= np.array([1.325, 2.355, 3.475])).all(), rmse["cos"]["local_ridge"]
    np.testing.assert_allclose(rmse["cos"]["local_ridge"], (1.32, 2.35, 3.47), atol=0.04)
