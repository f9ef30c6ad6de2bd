"""Optimal interpolation of all observations of a window, against its formulas in float64; where it cannot be had."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.covariances import matern32
from data.datasets.simulated_network import SimulatedNetwork
from data.grids import EARTH_RADIUS_KM
from evaluation.baselines import Unsuitable, build
from evaluation.baselines import observation_interpolation as interpolation
from evaluation.baselines.observation_interpolation import (
    Measured,
    Measurements,
    ObservationInterpolation,
    Rows,
    Scales,
)
from training.tasks.assimilation import AssimilationTask

SPLIT = {"train": ["2001-01", "2001-02"], "validation": "2001-03", "test": ["2001-04-01", "2001-04-08"]}
HOUR = 3600
NAME = "optimal_interpolation"


def task() -> AssimilationTask:
    return AssimilationTask(
        frames=3, window=[-3 * HOUR, 3 * HOUR], reference="climatology", head="deterministic", loss="mse", stride=3
    )


def network(**changes) -> SimulatedNetwork:
    return SimulatedNetwork(**(dict(split=SPLIT, level=2, stations=40, sondes=4) | changes))


@pytest.fixture(scope="module")
def data():
    return network()


@pytest.fixture(scope="module")
def normalisation(data):
    return task().fit(data)


@pytest.fixture(scope="module")
def fitted(data, normalisation):
    return ObservationInterpolation.fit(data, normalisation, lead_steps=(-2, -1, 0), split="test")


def rows(size: int, groups: int, generator: torch.Generator) -> Rows:
    return Rows(
        torch.zeros(size),
        torch.randint(groups, (size,), generator=generator),
        torch.zeros(size, dtype=torch.int64),
        EARTH_RADIUS_KM * torch.nn.functional.normalize(torch.randn(size, 3, generator=generator), dim=1),
        torch.rand(size, generator=generator, dtype=torch.float64) + 12_000,
        torch.rand(size, generator=generator) < 0.5,
        torch.randn(size, 2, generator=generator),
    )


def test_measurements_are_the_regression_of_each_group():
    generator = torch.Generator().manual_seed(0)
    made, anomaly = rows(9000, 3, generator), torch.randn(9000, generator=generator)
    error = 0.5 * torch.randn(9000, generator=generator)
    gain = torch.tensor([0.8, -0.4, 0.0])[made.group]  # the third group measures nothing
    made = replace(made, value=0.3 + 0.6 * made.climatology[:, 1] + gain * anomaly + error)
    hidden = torch.rand(9000, generator=generator) < 0.1
    made.value[hidden] = 1e3
    found = Measurements.fit(made, 1, anomaly.masked_fill(hidden, torch.nan))
    assert found.groups.tolist() == [0, 1]
    torch.testing.assert_close(found.coefficients, torch.tensor([[0.3, 0.6, 0.8], [0.3, 0.6, -0.4]]), atol=0.04, rtol=0)
    torch.testing.assert_close(found.variance, torch.full((2,), 0.25), atol=0.02, rtol=0)
    torch.testing.assert_close(found.correlation, torch.tensor([0.8 / 0.89**0.5, 0.4 / 0.41**0.5]), atol=0.03, rtol=0)
    spread = torch.tensor([2.0])
    measured = found(made.chosen(~hidden), 1, spread)
    assert len(measured.value) == int(((made.group < 2) & ~hidden).sum())
    own = (made.group[~hidden] < 2).nonzero().flatten()
    left = measured.value - anomaly[~hidden][own] / 2
    assert left.mean().abs() < 0.03
    torch.testing.assert_close((left**2).mean(), measured.variance.mean(), rtol=0.1, atol=0)
    outside = replace(made, cell=torch.full_like(made.cell, -1))
    assert len(found(outside, 1, spread).value) == len(found(made, 1, torch.zeros(1)).value) == 0


def test_an_analysis_is_the_best_linear_estimate(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    made, size = rows(30, 1, generator), 30
    value, variance = torch.randn(size, generator=generator), 0.1 + torch.rand(size, generator=generator)
    measured = Measured(value, variance, torch.rand(size, generator=generator), made.position, made.days, made.remote)
    cells = EARTH_RADIUS_KM * torch.nn.functional.normalize(torch.randn(7, 3, generator=generator), dim=1)
    scales, now = Scales(length=3000.0, time=0.7, noise=0.5, shared=3.0), 12_000.4

    def expected(kept):
        place, days = (item[kept].double().numpy() for item in (made.position, made.days))
        noise = (variance * torch.where(made.remote, 1.5, 0.5))[kept].double().numpy()
        far = np.linalg.norm(place[:, None] - place, axis=-1)
        among = matern32(torch.from_numpy(far / 3000)).numpy() * np.exp(-np.abs(days[:, None] - days) / 0.7)
        across = np.linalg.norm(cells.double().numpy()[:, None] - place, axis=-1)
        across = matern32(torch.from_numpy(across / 3000)).numpy() * np.exp(-np.abs(now - days) / 0.7)
        return across @ np.linalg.solve(among + np.diag(noise), value[kept].double().numpy())

    everything = np.arange(size)
    np.testing.assert_allclose(measured.analysis(cells, now, scales).numpy(), expected(everything), atol=2e-5)
    monkeypatch.setattr(interpolation, "_ROWS", 10)
    relevance = measured.correlation * torch.exp(-(made.days - now).abs() / 0.7)
    best = np.argsort(-relevance.numpy())[:10]
    np.testing.assert_allclose(measured.analysis(cells, now, scales).numpy(), expected(best), atol=2e-5)
    nothing = measured.chosen(torch.zeros(size, dtype=torch.bool))
    assert (nothing.analysis(cells, now, scales) == 0).all()


def test_it_beats_the_climatology_and_needs_observations_for_it(data, normalisation, fitted):
    dataset = task().dataset(data, "test", normalisation)
    positions = np.arange(len(dataset))
    batch = dataset.__getitems__(positions)
    known, truth = task().situation(dataset, positions, batch)
    made = fitted.forecast(known)
    assert made.shape == truth.shape == (len(dataset), 3, 1, 192)
    error, alone = ((item - truth).square().mean((0, 2, 3)) for item in (made, known.climatology))
    assert (error < 0.8 * alone).all()
    silent = replace(known, observations=known.observations.chosen(known.observations.batch == 1))
    without = fitted.forecast(silent)
    assert torch.equal(without[0], known.climatology[0]) and torch.equal(without[1], made[1])


def test_it_is_fitted_without_the_split_that_is_scored(data, normalisation, monkeypatch):
    seen = []

    class Watched(SimulatedNetwork):
        def read(self, indices):
            seen.append(np.asarray(indices).ravel())
            return super().read(indices)

        def observations(self, indices, window):
            seen.append(np.asarray(indices).ravel())
            return super().observations(indices, window)

    split = {"train": ["2001-01", "2001-03"], "validation": ["2001-02-10", "2001-02-20"], "test": "2001-04"}
    watched = Watched(split=split, level=2, stations=40, sondes=4)
    ObservationInterpolation.fit(watched, normalisation, lead_steps=(-2, -1, 0), split="validation")
    read = np.unique(np.concatenate(seen))
    assert len(read) > 100
    assert not np.isin(read, np.concatenate([watched.splits["validation"], watched.splits["test"]])).any()
    assert np.isin(read, watched.training_period).all()


def test_it_is_left_out_where_nothing_is_observed(normalisation, data):
    silent = network(stations=0, sondes=0, orbiters=0)
    options = dict(lead_steps=(-2, -1, 0), known=task().baselines)
    left_out = {}
    assert set(build(["climatology", NAME], silent, normalisation, **options, left_out=left_out)) == {"climatology"}
    assert left_out == {NAME: "no observations of the training period are correlated with t2m"}
    with pytest.raises(Unsuitable, match="the baseline optimal_interpolation cannot be had: no observations"):
        build([NAME], silent, normalisation, **options)


def test_it_is_left_out_where_it_would_take_hours(normalisation, data, monkeypatch):
    monkeypatch.setattr(interpolation, "MOST_VALUES", 500)
    with pytest.raises(Unsuitable, match="a window's analysis has 576 values; it is made for up to 500"):
        ObservationInterpolation.fit(data, normalisation, lead_steps=(-2, -1, 0), split="test")
