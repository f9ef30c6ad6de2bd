"""Optimal interpolation against dense textbook solutions, written with NumPy loops on small random problems."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.covariances import CORRELATIONS, distances, positions, taper
from evaluation.baselines.optimal_interpolation import (
    Covariance,
    Lagged,
    Scattered,
    ScatteredCovariance,
    ScatteredInterpolation,
    WindowInterpolation,
    tuned_scattered,
    tuned_window,
)

FRAMES, CELLS, STATIONS = 3, 7, 4


def chord(a, b):
    """km between two (latitude, longitude), from the great circle."""
    (p, east), (q, other) = np.deg2rad(a), np.deg2rad(b)
    arc = np.arccos(np.clip(np.sin(p) * np.sin(q) + np.cos(p) * np.cos(q) * np.cos(east - other), -1, 1))
    return 2 * 6371.0 * np.sin(arc / 2)


def matern32(distance, length):
    return (1 + np.sqrt(3) * distance / length) * np.exp(-np.sqrt(3) * distance / length)


def gaspari_cohn(r):
    if r <= 1:
        return -(r**5) / 4 + r**4 / 2 + 5 * r**3 / 8 - 5 * r**2 / 3 + 1
    return 0.0 if r >= 2 else r**5 / 12 - r**4 / 2 + 5 * r**3 / 8 + 5 * r**2 / 3 - 5 * r + 4 - 2 / (3 * r)


def places_near(rng, count):
    return np.stack([rng.uniform(40, 55, count), rng.uniform(355, 372, count) % 360], axis=1)


def test_distances_cross_greenwich_and_are_exact_for_near_places():
    rng = np.random.default_rng(0)
    a, b = places_near(rng, 5), places_near(rng, 6)
    expected = [[chord(p, q) for q in b] for p in a]
    np.testing.assert_allclose(distances(positions(torch.tensor(a)), positions(torch.tensor(b))), expected, atol=1e-4)
    near = torch.tensor([[50.0, 359.9999], [50.0, 0.0001]], dtype=torch.float64)
    found = distances(positions(near), positions(near))[0, 1]
    assert abs(float(found) - np.deg2rad(0.0002) * 6371 * np.cos(np.deg2rad(50))) < 1e-6


def test_the_taper_is_that_of_gaspari_and_cohn():
    ratio = np.linspace(0, 2.5, 51)
    np.testing.assert_allclose(taper(torch.tensor(ratio)), [gaspari_cohn(r) for r in ratio], atol=1e-12)


@pytest.mark.parametrize("name", CORRELATIONS)
def test_correlations_are_positive_definite_on_the_whole_sphere(name):
    rng = np.random.default_rng(1)
    anywhere = torch.tensor(np.stack([np.rad2deg(np.arcsin(rng.uniform(-1, 1, 60))), rng.uniform(0, 360, 60)], axis=1))
    where = positions(anywhere)
    matrix = CORRELATIONS[name](distances(where, where) / 3000)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-9 and torch.allclose(matrix.diagonal(), torch.ones(60).double())


@pytest.fixture
def series():
    """A training series of correlated cells and stations with two runs of consecutive frames, and their places."""
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(60, CELLS + STATIONS)) @ rng.normal(size=(CELLS + STATIONS, CELLS + STATIONS))
    values = noise + 0.6 * np.roll(noise, 1, axis=0)
    runs = [np.arange(0, 25), np.arange(28, 60)]
    return values[:, :CELLS], values[:, CELLS:], places_near(rng, CELLS), places_near(rng, STATIONS), runs


def moment(a, b, lag, runs):
    """Mean of a(t) b(t + lag), divided by the number of all frames."""
    total = sum(a[t] * b[t + lag] for run in runs for t in run if run[0] <= t + lag <= run[-1])
    return total / sum(map(len, runs))


def textbook(series, covariance, observed, noise):
    """(T, P): the analysis of one window, every covariance from its definition."""
    cells, stations, places, sites, runs = series
    power = sum(moment(cells[:, p], cells[:, p], 0, runs) for p in range(CELLS))

    def between(a, b, place, site, lag):
        apart = chord(place, site)
        memory = sum(moment(cells[:, p], cells[:, p], lag, runs) for p in range(CELLS)) / power
        scale = np.sqrt(moment(a, a, 0, runs) * moment(b, b, 0, runs))
        model = scale * memory * matern32(apart, covariance.length)
        empirical = moment(a, b, lag, runs) * gaspari_cohn(apart / covariance.localisation)
        return (1 - covariance.shrinkage) * empirical + covariance.shrinkage * model

    index = [(t, k) for t in range(FRAMES) for k in range(STATIONS)]
    among = [[between(stations[:, i], stations[:, j], sites[i], sites[j], t - s) for t, j in index] for s, i in index]
    cross = [
        [between(cells[:, p], stations[:, j], places[p], sites[j], t - s) for t, j in index]
        for s in range(FRAMES)
        for p in range(CELLS)
    ]
    matrix = np.array(among) + noise**2 * np.eye(len(index))
    return (np.array(cross) @ np.linalg.solve(matrix, observed.ravel())).reshape(FRAMES, CELLS)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_a_window_is_analysed_as_the_dense_solution_says(series, shrinkage):
    cells, stations, places, sites, runs = series
    covariance = Covariance(length=600.0, localisation=700.0, shrinkage=shrinkage)
    moments = Lagged.of(torch.tensor(cells), torch.tensor(stations), FRAMES, runs)
    fitted = WindowInterpolation.fit(
        moments, torch.tensor(places), torch.tensor(sites), noise=0.8, covariance=covariance
    )
    observed = np.random.default_rng(3).normal(size=(2, FRAMES, STATIONS))
    expected = [textbook(series, covariance, window, 0.8) for window in observed]
    np.testing.assert_allclose(fitted(torch.tensor(observed)), expected, atol=1e-6)


def test_a_window_with_a_missing_observation_is_refused(series):
    cells, stations, places, sites, runs = (torch.tensor(x) if isinstance(x, np.ndarray) else x for x in series)
    fitted = WindowInterpolation.fit(
        Lagged.of(cells, stations, FRAMES, runs), places, sites, noise=1.0, covariance=Covariance(600.0)
    )
    observed = torch.zeros(1, FRAMES, STATIONS, dtype=torch.float64)
    observed[0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match="1 of 12 observations are missing"):
        fitted(observed)


def test_cross_validation_finds_the_length_that_made_the_field():
    rng = np.random.default_rng(4)
    places = places_near(rng, 40)
    matrix = matern32(np.array([[chord(a, b) for b in places] for a in places]), 500.0)
    values = torch.tensor(rng.normal(size=(240, 40)) @ np.linalg.cholesky(matrix).T)
    stations = values[:, :12]
    observed = stations + 0.3 * torch.tensor(rng.normal(size=(240, 12)))
    candidates = [Covariance(length) for length in (20.0, 500.0, 20_000.0)]
    chosen = tuned_window(
        values,
        stations,
        observed,
        torch.tensor(places),
        torch.tensor(places[:12]),
        frames=1,
        noise=0.3,
        weights=torch.ones(40, dtype=torch.float64),
        candidates=candidates,
    )
    assert chosen.length == 500.0


def scattered(rng, count):
    place = places_near(rng, count)
    return Scattered(place[:, 0], place[:, 1], rng.uniform(0, 6, count), rng.uniform(1, 30, count))


def dense(known, innovations, variance, targets, covariance):
    """Expected innovations from every allowed observation, from the definition."""

    def correlation(a, i, b, j):
        apart = chord((a.latitude[i], a.longitude[i]), (b.latitude[j], b.longitude[j]))
        time, level = abs(a.time[i] - b.time[j]), abs(a.level[i] - b.level[j])
        decay = np.exp(-time / covariance.time_scale - level / covariance.level_scale)
        return matern32(apart, covariance.length) * decay

    spread, count = innovations.var(), len(known)
    constant = innovations.mean() ** 2
    among = np.array([[correlation(known, i, known, j) for j in range(count)] for i in range(count)])
    cross = np.array([[correlation(targets, i, known, j) for j in range(count)] for i in range(len(targets))])

    def solved(rows, target):
        matrix = spread * among[np.ix_(rows, rows)] + constant + np.diag(covariance.noise * variance[rows])
        return (spread * cross[target, rows] + constant) @ np.linalg.solve(matrix, innovations[rows])

    return cross, solved


def test_scattered_innovations_are_spread_as_the_dense_solution_says():
    rng = np.random.default_rng(5)
    known, targets = scattered(rng, 30), scattered(rng, 9)
    innovations, variance = rng.normal(0.4, 1, 30), rng.uniform(0.1, 0.5, 30)
    covariance = ScatteredCovariance("matern32", 300.0, 3.0, 8.0, noise=0.7)
    cross, solved = dense(known, innovations, variance, targets, covariance)
    found = ScatteredInterpolation(known, innovations, variance, covariance)(targets)
    np.testing.assert_allclose(found, [solved(np.arange(30), k) for k in range(9)], rtol=1e-4, atol=1e-6)
    # Few neighbours: those with the highest correlation.
    few = ScatteredInterpolation(known, innovations, variance, replace(covariance, neighbours=5))(targets)
    expected = [solved(np.argsort(-cross[k])[:5], k) for k in range(9)]
    np.testing.assert_allclose(few, expected, rtol=1e-4, atol=1e-6)


def test_a_left_out_group_has_no_influence_even_where_few_others_remain():
    rng = np.random.default_rng(6)
    known = scattered(rng, 20)
    innovations, variance = rng.normal(size=20), np.full(20, 0.2)
    covariance = ScatteredCovariance(length=300.0, neighbours=64)
    groups = np.repeat([0, 1], [17, 3])
    found = ScatteredInterpolation(known, innovations, variance, covariance)(known, groups=(groups, groups))
    _, solved = dense(known, innovations, variance, known, covariance)
    expected = [solved(np.flatnonzero(groups != groups[k]), k) for k in range(20)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_scales_tuned_on_observations_serve_at_other_places():
    rng = np.random.default_rng(7)
    everywhere = scattered(rng, 260)
    everywhere = replace(everywhere, time=np.zeros(260), level=np.zeros(260))
    place = np.stack([everywhere.latitude, everywhere.longitude], axis=1)
    matrix = matern32(np.array([[chord(a, b) for b in place] for a in place]), 200.0) + 1e-9 * np.eye(260)
    truth = np.linalg.cholesky(matrix) @ rng.normal(size=260)
    known, hidden = np.arange(200), np.arange(200, 260)
    innovations = truth[known] + 0.1 * rng.normal(size=200)
    covariance = tuned_scattered(everywhere.chosen(known), innovations, np.full(200, 0.01), known // 2)
    assert covariance.length < 320 and (covariance.time_scale, covariance.level_scale) == (5.0, 5.0)

    def rms(chosen):
        fitted = ScatteredInterpolation(everywhere.chosen(known), innovations, np.full(200, 0.01), chosen)
        return np.sqrt(np.square(fitted(everywhere.chosen(hidden)) - truth[hidden]).mean())

    assert rms(covariance) < 1.1 * rms(ScatteredCovariance("matern32", 200.0, noise=1.0))
    assert rms(covariance) < 0.6 * np.sqrt(np.square(truth[hidden]).mean())
