"""One model for several station networks: pooled covariances, backgrounds of other months, scores by network."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from data.datasets.osse import OSSE
from data.grids import LatLonGrid
from evaluation.baselines.optimal_interpolation import Lagged
from evaluation.baselines.pooled_covariances import PooledCovariances, Pooling, _Neighbours, backgrounds, pooled
from evaluation.networks import network_table, score_networks
from models import build
from models.composition import compose
from training.run import build_task

SPLIT = {
    "train": ["2013-01-01", "2013-03-01"],
    "validation": ["2013-02-01", "2013-02-06"],
    "test": ["2013-03-02", "2013-03-31"],
}


RIVALS = ["climatology", "nearest_station", "single_time", "window"]


class SmallOSSE(OSSE):
    grid = LatLonGrid(np.arange(50.0, 34.0, -2.5), np.arange(240.0, 261.0, 2.5))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    import pandas as pd
    import xarray as xr

    folder, random = tmp_path_factory.mktemp("osse"), np.random.default_rng(0)
    times = pd.date_range("2013-01-01", "2013-04-01", freq="6h")
    phase = 0.2 * np.arange(times.size)[:, None, None] + 0.6 * np.arange(9)
    air = 280 + 5 * np.sin(phase) + 0.3 * np.arange(7)[:, None] + random.standard_normal((times.size, 7, 9))
    coordinates = {"time": times, "lat": SmallOSSE.grid.latitude, "lon": SmallOSSE.grid.longitude}
    fields = xr.Dataset({"air": (("time", "lat", "lon"), air.astype(np.float32), {"units": "K"})}, coordinates)
    fields.to_netcdf(folder / "air.nc")
    places = {"ICAO": [f"K{n:03}" for n in range(30)], "Latitude": random.uniform(36, 49, 30)}
    pd.DataFrame(places | {"Longitude": random.uniform(-119, -101, 30)}).to_csv(folder / "stations.csv", index=False)
    options = {"split": SPLIT, "density": 12, "densities": (4, 12), "recommended": {"size": "tiny"}}
    return SmallOSSE(str(folder / "air.nc"), str(folder / "stations.csv"), **options)


@pytest.fixture(scope="module")
def task():
    return build_task(compose(["experiment=osse_metar", "task.frames=4", "task.stride=4"]))


def test_neighbours_are_averaged_over_pairs_of_one_displacement():
    pairs, shape = torch.randn(12, 12, dtype=torch.float64), (3, 4)
    pooling = Pooling(rows=1.0, columns=0.7)
    found = _Neighbours(shape, pooling).mean(pairs.float())

    def weight(steps, deviation):
        return np.exp(-0.5 * (steps / deviation) ** 2) if abs(steps) <= int(3 * deviation) else 0.0

    for a, b in ((0, 0), (5, 6), (11, 0), (2, 9)):
        (i, j), (k, m) = divmod(a, 4), divmod(b, 4)
        total = mass = 0.0
        for di in range(-3, 4):
            for dj in range(-4, 5):
                moved = (i + di, j + dj, k + di, m + dj)
                if all(0 <= x < side for x, side in zip(moved, shape * 2, strict=True)):
                    w = weight(di, 1.0) * weight(dj, 0.7)
                    total += w * float(pairs[moved[0] * 4 + moved[1], moved[2] * 4 + moved[3]])
                    mass += w
        assert float(found[a, b]) == pytest.approx(total / mass, abs=1e-5)


def test_without_pooling_covariances_are_the_moments_of_the_series(data):
    cells = data.read(data.training_period).flatten(1)
    runs = [np.arange(0, 80), np.arange(120, 200)]
    plain = Pooling(own=1.0, model=0.0, localisation=1e9)
    found = pooled(cells, data.grid, data.station_weights, frames=3, runs=runs, pooling=plain)
    moments = Lagged.of(cells.double(), (cells @ data.station_weights).double(), 3, runs)
    torch.testing.assert_close(found.cross.double(), moments.cross, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.stations.double(), moments.stations, atol=1e-3, rtol=1e-3)


def test_covariances_that_are_not_positive_are_repaired():
    stations = torch.tensor([[[1.0, 5.0], [5.0, 1.0]]])
    fitted = PooledCovariances(torch.eye(2)[None], stations).interpolation(2, noise=1.0)
    found = fitted(torch.tensor([[[1.0, 1.0]]]))
    torch.testing.assert_close(found, torch.full((1, 1, 2), 1 / 7).double(), atol=1e-5, rtol=1e-5)


def test_a_background_knows_nothing_of_its_own_months(data):
    changed = SmallOSSE(data.fields_path, data.stations_path, split=SPLIT, density=12, densities=(4, 12))
    first = backgrounds(data, frames=2, parts=3)
    part, read = first[1].frames, data.read
    values = read(np.arange(data.times.size))
    values[part] += 100 * torch.randn_like(values[part])
    changed.read = lambda indices: values[np.asarray(indices)]
    second = backgrounds(changed, frames=2, parts=3)
    assert all(each.departure.known.harmonics == each.departure.whole.harmonics for each in first)
    observed, months = torch.randn(2, 2, 12), np.arange(len(part))
    torch.testing.assert_close(first[1].analysts[12](observed), second[1].analysts[12](observed), atol=1e-3, rtol=0)
    assert torch.allclose(first[1].departure.known(months), second[1].departure.known(months))
    assert (first[0].analysts[12](observed) - second[0].analysts[12](observed)).abs().max() > 0.1


def test_windows_carry_the_analysis_as_input_and_reference(data, task):
    normalisation = task.fit(data)
    train, validation, test = (task.dataset(data, split, normalisation) for split in SPLIT)
    indices = [0, 40, 100, 7]
    batch, again = train.__getitems__(indices), train.__getitems__(indices)
    assert torch.equal(batch.observations.value, again.observations.value)
    assert {len(values[0]) for values in train.observed(range(20))} == {4, 12}
    target, inputs = batch.targets["analysis"], batch.inputs["background"]
    assert inputs.values.shape == (4, 4, 2, 7, 9) and batch.layout.to_dict() == task.layout(data).to_dict()
    number = train.background_of[40]
    assert np.isin(train.windows[40], train.backgrounds[number].frames).all()
    background, values = train.backgrounds[number], train.observed(indices)[1].float()
    departure = background.departure(train.windows[40])
    values = values - departure @ data.station_weights[:, : values.shape[1]]
    analysis = background.analysts[values.shape[1]](values[None])[0].float().view(4, 7, 9)
    scale = float(target.scale)
    torch.testing.assert_close(inputs.values[1, :, 0], analysis / scale, atol=1e-4, rtol=1e-4)
    reference = target.physical(target.reference.values)[1, :, 0]
    torch.testing.assert_close(reference, analysis + departure.view(4, 7, 9), atol=1e-3, rtol=1e-4)
    # The analysis is nearer to the truth than the climatology, which is 0, and less near far from stations.
    truth = target.physical()
    assert (truth - target.physical(target.reference.values)).square().mean() < 0.5 * truth.square().mean()
    assert inputs.values[:, :, 1].min() > 0 and inputs.values[:, :, 1].max() <= 1
    assert sorted(set(validation.density_of)) == [4, 12] and len(validation) % 2 == 0
    assert set(test.density_of) == {12} and (test.windows > train.windows.max()).all()
    assert all(np.array_equal(a + 4, b) for a, b in pairwise(test.windows))


def test_one_model_is_scored_under_every_network(data, task, tmp_path):
    model = build(["experiment=osse_metar", "model.depth=1", "model.hidden_size=16"], task.layout(data))
    normalisation = task.fit(data)
    score_networks(model, task, data, normalisation, tmp_path, split="test", max_windows=5)
    scores = json.loads((tmp_path / "scores_by_network.json").read_text())
    assert list(scores) == ["4 stations", "12 stations"]
    for content in scores.values():
        assert list(content["air_anomaly"]["rmse"]) == ["-18", "-12", "-6", "0"]
        for by_method in content["air_anomaly"]["rmse"].values():
            assert list(by_method) == ["ours", "background alone", *RIVALS]
            assert by_method["window"] < by_method["climatology"]
            # The correction of an untrained model is 0.
            assert by_method["ours"] == pytest.approx(by_method["background alone"], rel=1e-4)
    sparse, dense = (content["air_anomaly"]["rmse"]["0"] for content in scores.values())
    assert dense["window"] < sparse["window"] and dense["climatology"] == sparse["climatology"]
    first = [row.split() for row in network_table(tmp_path).splitlines()]
    rmse = [scores["4 stations"]["air_anomaly"]["rmse"][hours]["window"] for hours in ("-18", "-12", "-6", "0")]
    assert float(next(row for row in first if row and row[0] == "window")[1].strip("*")) == pytest.approx(
        np.sqrt(np.square(rmse).mean()), abs=1e-3
    )
    assert network_table(tmp_path / "elsewhere") == ""


def test_other_data_are_refused(task):
    from data.datasets.simulated_network import SimulatedNetwork

    with pytest.raises(ValueError, match="like data=osse_metar; with this data use task=assimilation"):
        task.layout(SimulatedNetwork(**_options()))


def _options():
    node = dict(compose(["data=simulated_network", "task=assimilation"]).data)
    node.pop("_target_")
    return node
