"""Climatology, scale and damping against float64 references on random data with gaps."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from example_data import dataset, write
from hydra.utils import instantiate
from omegaconf import OmegaConf

from data.datasets.gridded import GriddedData
from data.normalisation import Harmonics, Normalisation

SPLIT = {"train": ["2001-01-01", "2002-03-31"], "validation": ["2002-03-01", "2002-03-31"], "test": "2002-04"}
LEADS = (1, 4)


def basis(times: np.ndarray) -> np.ndarray:
    """Two annual and two diurnal harmonics at 6-hourly times, written out."""
    stamps = times.astype("datetime64[s]")
    year = 2 * np.pi * (stamps - stamps.astype("datetime64[Y]")).astype(np.int64) / 86_400 / 365.25
    day = 2 * np.pi * (times % 86_400) / 86_400
    annual = [np.ones_like(year), np.cos(year), np.sin(year), np.cos(2 * year), np.sin(2 * year)]
    diurnal = [np.ones_like(day), np.cos(day), np.sin(day), np.cos(2 * day)]
    return np.stack([a * d for a in annual for d in diurnal], axis=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """6-hourly, 16 months, two variables, a gap in time; the second variable has land and clouds."""
    path = tmp_path_factory.mktemp("normalisation") / "a.nc"
    rng = np.random.default_rng(3)
    content = dataset(names=("t2m", "sst"), keep=[*range(500), *range(510, 1950)])
    sst = content.sst.values
    sst[rng.random(sst.shape) < 0.1] = np.nan
    sst[:, 2, 0] = np.nan
    content.to_netcdf(path)
    return GriddedData(str(path), split=SPLIT, cache="ram")


@pytest.fixture(scope="module")
def fitted(data):
    return Normalisation.fit(data, lead_steps=LEADS)


def reference_climatology(data) -> np.ndarray:
    """(N, C, H, W) float64, every cell on its own."""
    values = data.read(np.arange(data.times.size)).double().numpy()
    period, design = data.training_period, basis(data.times)
    result = np.full(values.shape, np.nan)
    for cell in np.ndindex(values.shape[1:]):
        series = values[(period, *cell)]
        seen = np.isfinite(series)
        if not seen.any():
            continue
        # Cells with gaps: the weight of one observation pulls every harmonic towards zero.
        penalty = np.diag([0.0] + [0.0 if seen.all() else 1.0] * (design.shape[1] - 1))
        rows = design[period][seen]
        result[(slice(None), *cell)] = design @ np.linalg.solve(rows.T @ rows + penalty, rows.T @ series[seen])
    return result


def reference_moments(data, climatology):
    """(scale, damping, residual_scale, persistence_scale) by loops over pairs, float64."""
    values = data.read(np.arange(data.times.size)).double().numpy()
    anomalies, weights = values - climatology, data.grid.area_weights.numpy()
    period = set(data.training_period.tolist())

    def mean(samples):  # (n, C, H, W) -> (C,)
        w = np.broadcast_to(weights, samples.shape) * np.isfinite(samples)
        return np.nansum(samples * w, axis=(0, 2, 3)) / w.sum(axis=(0, 2, 3))

    scale = np.sqrt(mean(anomalies[data.training_period] ** 2))
    rows = []
    for lead in LEADS:
        starts = [
            i for i in sorted(period) if i + lead in period and data.times[i + lead] - data.times[i] == lead * data.step
        ]
        a, b = anomalies[starts], anomalies[[i + lead for i in starts]]
        a, b = np.where(np.isfinite(b), a, np.nan), np.where(np.isfinite(a), b, np.nan)
        damping = mean(a * b) / mean(a * a)
        change = values[[i + lead for i in starts]] - values[starts]
        residual = np.sqrt(mean((b - damping[:, None, None] * a) ** 2))
        rows.append((damping, residual / scale, np.sqrt(mean(change**2)) / scale))
    return scale, *(np.stack(column) for column in zip(*rows, strict=True))


def test_the_climatology_is_the_least_squares_fit_of_every_cell(data, fitted):
    expected = reference_climatology(data)
    assert np.isnan(expected[:, 1, 2, 0]).all() and np.isnan(expected).mean() < 0.05
    np.testing.assert_allclose(fitted.climatology(data.times), expected, atol=2e-4)
    np.testing.assert_allclose(fitted.climatology(torch.from_numpy(data.times[5:9])), expected[5:9], atol=2e-4)


def test_scale_damping_and_residuals_are_second_moments_over_pairs(data, fitted):
    scale, damping, residual, persistence = reference_moments(data, reference_climatology(data))
    np.testing.assert_allclose(fitted.scale, scale, rtol=1e-4)
    assert (damping > 0).any()
    np.testing.assert_allclose(fitted.damping, damping.clip(0, 1), atol=1e-4)
    expected = np.where(damping > 0, residual, np.nan)
    np.testing.assert_allclose(fitted.residual_scale[damping > 0], expected[damping > 0], rtol=1e-4)
    np.testing.assert_allclose(fitted.persistence_scale, persistence, rtol=1e-4)


def test_blocks_of_any_size_give_the_same_statistics(data, fitted, monkeypatch):
    monkeypatch.setattr("data.datasets.cache.BLOCK_BYTES", 30_000)
    again = Normalisation.fit(data, lead_steps=LEADS)
    for name, tensor in fitted.state_dict()[0].items():
        torch.testing.assert_close(again.state_dict()[0][name], tensor, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_anomalies_are_normalised_departures(data, fitted):
    frames = data.training_period
    anomalies = fitted.anomalies(data.read(frames), data.times[frames])
    weights = data.grid.area_weights.expand(anomalies.shape)
    seen = anomalies.isfinite()
    square = torch.where(seen, anomalies**2 * weights, 0).sum((0, 2, 3)) / (seen * weights).sum((0, 2, 3))
    torch.testing.assert_close(square, torch.ones(2, dtype=torch.float64), rtol=1e-4, atol=0)


def test_only_the_training_period_is_used(data, fitted, tmp_path):
    import xarray as xr

    with xr.open_dataset(data.path, decode_times=False) as content:
        altered = content.load()
    altered.t2m[data.splits["test"][0] :] += 50
    altered.to_netcdf(tmp_path / "b.nc")
    again = Normalisation.fit(GriddedData(str(tmp_path / "b.nc"), split=SPLIT), lead_steps=LEADS)
    for name, tensor in fitted.state_dict()[0].items():
        torch.testing.assert_close(again.state_dict()[0][name], tensor, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_the_state_is_tensors_and_json(data, fitted):
    tensors, description = fitted.state_dict()
    again = Normalisation.from_state(tensors, json.loads(json.dumps(description)))
    assert again.harmonics == fitted.harmonics and again.lead_steps == LEADS
    torch.testing.assert_close(again.climatology(data.times[:3]), fitted.climatology(data.times[:3]), equal_nan=True)


@pytest.mark.parametrize(
    ("frames", "step_hours", "expected"),
    [
        (1460, 6, (2, 2, True)),
        (1200, 6, (0, 2, True)),  # less than 0.9 of a year
        (365, 24, (2, 0, False)),
        (744, 1, (0, 2, False)),
        (730, 12, (2, 1, True)),
        (15, 6, (0, 0, False)),  # fewer than four frames a coefficient
        (7, 6, (0, 0, False)),  # less than two days
    ],
)
def test_only_resolved_harmonics_are_fitted(frames, step_hours, expected):
    times = np.arange(frames) * step_hours * 3600
    harmonics = Harmonics.resolved(times, "proleptic_gregorian", 2, 2)
    assert (harmonics.annual, harmonics.diurnal, harmonics.half) == expected
    assert harmonics.design(torch.from_numpy(times)).shape == (frames, harmonics.size)


@pytest.mark.parametrize("shift", [0, 3])
def test_diurnal_harmonics_work_at_any_times_of_day(shift):
    times = torch.arange(1460) * 21_600 + shift * 3600
    harmonics = Harmonics.resolved(times.numpy(), "proleptic_gregorian", 2, 2)
    assert torch.linalg.matrix_rank(harmonics.design(times)) == harmonics.size == 20


def test_lead_times_that_were_not_fitted_are_refused(fitted):
    assert fitted.lead_index((4,)) == [1]
    with pytest.raises(ValueError, match=r"lead times \[2\] \(in steps\) are not among the fitted ones \[1, 4\]"):
        fitted.lead_index((1, 2))


def test_a_lead_time_longer_than_the_training_period_is_refused(tmp_path):
    path = write(tmp_path / "a.nc", frames=30)
    data = GriddedData(str(path), split={"train": 0.4, "validation": 0.3, "test": 0.3})
    with pytest.raises(ValueError, match="no two frames of the training period are 20 steps apart"):
        Normalisation.fit(data, lead_steps=[1, 20])


@pytest.mark.real_data
@pytest.mark.skipif(
    not (Path(os.environ.get("DATA_DIR", "")) / "air_temperature.nc").is_file(),
    reason="no air_temperature.nc in DATA_DIR",
)
def test_the_reference_scores_of_ncep_air_temperature():
    """RMSE in K over the whole of 2014, cos-latitude weights; published beside the benchmark file."""
    config = OmegaConf.load(Path(__file__).parents[1] / "conf" / "data" / "ncep_air_temperature.yaml")
    data = instantiate(config, annual_harmonics=2)  # the published scores are of two harmonics
    fitted = Normalisation.fit(data, lead_steps=(1, 4, 12))
    values, climatology = data.read(np.arange(data.times.size))[:, 0], fitted.climatology(data.times)[:, 0]
    target, anomaly = data.splits["test"], values - climatology

    def rmse(error):
        return (error.double() ** 2 * data.grid.cos_weights).mean().sqrt().item()

    persistence = [rmse(values[target] - values[target - lead]) for lead in (1, 4, 12)]
    np.testing.assert_allclose(persistence, [2.43, 3.01, 4.15], atol=0.005)
    assert rmse(anomaly[target]) == pytest.approx(3.69, abs=0.005)
    damped = [
        rmse(anomaly[target] - fitted.damping[index, 0] * anomaly[target - lead])
        for index, lead in enumerate((1, 4, 12))
    ]
    np.testing.assert_allclose(damped, [1.46, 2.75, 3.49], atol=0.01)
