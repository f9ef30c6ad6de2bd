"""The station experiment on real fields: its network, its errors, its tables, and the scores of its baselines."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from data.analysis_normalisation import AnalysisNormalisation
from data.covariances import distances, positions
from data.datasets.assimilation import AssimilationDataset
from data.datasets.osse import OSSE
from evaluation.baselines.assimilation_scores import OSSE_SPLIT, evaluation_windows, score, score_osse

pytestmark = pytest.mark.real_data
WINDOW = (-10_800, 10_800)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    for name in ("air_temperature.nc", "2020100106_metars.csv"):
        if not (Path(os.environ.get("DATA_DIR", "")) / name).is_file():
            pytest.skip(f"{name} is not in DATA_DIR")
    before = os.environ.get("HYDRASPHERE_CACHE")
    os.environ["HYDRASPHERE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield OSSE(split=OSSE_SPLIT, density=50)
    os.environ.pop("HYDRASPHERE_CACHE") if before is None else os.environ.update(HYDRASPHERE_CACHE=before)


def test_the_network_is_the_published_one(data):
    """2,843 stations; 22, 32, 38 and 44 % of the area lie within 500 km of the first 50, 100, 200 and 500."""
    assert data.stations.num_points == 2843
    weights = data.grid.cos_weights.flatten()
    apart = distances(positions(data.grid.coordinates), positions(data.stations.coordinates[:500]))
    arcs = 2 * 6371 * torch.asin(apart / (2 * 6371))
    covered = [float(weights[(arcs[:, :n] < 500).any(dim=1)].sum() / weights.sum()) for n in (50, 100, 200, 500)]
    np.testing.assert_allclose(covered, (0.22, 0.32, 0.38, 0.44), atol=0.005)


def test_fields_are_anomalies_of_the_climatology_of_the_training_year(data):
    indices = data.splits["test"][::97]
    air = data._series.read(indices)
    assert torch.equal(data.read(indices), air - data.climatology(indices))
    weights = data.grid.cos_weights
    rms = (data.read(data.splits["test"]).double().square() * weights).mean().sqrt()
    assert abs(rms - 3.69) < 0.01  # the climatology of the published scores
    assert abs(data.static[0].mean() - 281.5) < 3 and data.static.shape == (2, 25, 53)
    training = data.read(data.training_period).double()
    assert abs(float(data.statistics.mean)) < 0.05 < abs(float(data.statistics.scale) - 1)
    torch.testing.assert_close(data.static[1].double(), training[:, 0].std(dim=0), rtol=1e-4, atol=1e-4)


def test_a_station_sees_the_truth_between_grid_points_and_its_own_error(data):
    indices = data.splits["test"][[3, 500]]
    field = data.read(indices)[:, 0].double().numpy()
    errors = np.random.default_rng(1).standard_normal((50, data.times.size))
    for number in (0, 17, 49):
        latitude, longitude = data.stations.locations[number]
        y, x = (75 - latitude) / 2.5, (longitude - 200) / 2.5
        i, j = min(int(y), 23), min(int(x), 51)
        dy, dx = y - i, x - j
        corners = field[:, i : i + 2, j : j + 2]
        value = np.einsum("nij,i,j->n", corners, [1 - dy, dy], [1 - dx, dx])
        np.testing.assert_allclose(data.at_stations(indices)[:, number], value, atol=1e-4)
        np.testing.assert_allclose(data.observed(indices)[:, number], value + errors[number, indices], atol=1e-4)


def test_a_denser_network_keeps_the_stations_and_errors_of_a_sparser_one(data):
    dense, indices = OSSE(split=OSSE_SPLIT, density=200), data.splits["test"][:5]
    assert torch.equal(dense.observed(indices)[:, :50], data.observed(indices))


def test_observations_are_sorted_by_frame_and_normalised_like_the_field(data):
    indices = data.splits["test"][[40, 10, 41, 10]]
    table = data.observations(indices, WINDOW)
    np.testing.assert_array_equal(table["frame"], np.repeat(np.arange(4), 50))
    np.testing.assert_array_equal(table["time"], np.repeat(data.times[indices], 50))
    np.testing.assert_allclose(table["value"].reshape(4, 50), data.observed(indices), rtol=1e-6)
    np.testing.assert_array_equal(table["longitude"][50:100], data.stations.locations[:50, 1])
    # A window that reaches to the frame before holds every row twice over neighbouring frames.
    wide = data.observations(indices[:1], (-21_600 - 1, 0))
    np.testing.assert_array_equal(np.unique(wide["time"]), data.times[[indices[0] - 1, indices[0]]])
    scaled = data.channels.normalised(table)
    mean, scale = float(data.statistics.mean), float(data.statistics.scale)
    np.testing.assert_allclose(scaled["value"], (table["value"] - mean) / scale, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scaled["error"], 1 / scale, rtol=1e-5)
    observations = scaled.to_observations(torch.from_numpy(data.times[indices]).reshape(2, 2))
    assert len(observations) == 200 and observations.batch.tolist()[150:] == [1] * 50


def test_the_task_reads_windows_of_it(data):
    normalisation = AnalysisNormalisation.fit(data)
    dataset = AssimilationDataset(data, "test", normalisation, frames=8, window=WINDOW)
    batch = dataset.__getitems__([0, 100])
    assert len(batch.observations) == 2 * 8 * 50
    target, frames = batch.targets["analysis"], dataset.windows[[0, 100]]
    torch.testing.assert_close(target.physical().flatten(0, 1), data.read(frames.ravel()), rtol=1e-5, atol=1e-4)
    # The climatology of anomalies is 0.
    assert target.physical(target.reference.values).abs().max() < 0.01


def test_training_draws_a_network_and_errors_for_each_window(data):
    windows = data.windows("train", frames=8)[[0, 100, 200, 300, 400]]
    table = data.drawn_observations(windows, np.random.default_rng(5))
    same = data.drawn_observations(windows, np.random.default_rng(5))
    np.testing.assert_array_equal(table["value"], same["value"])
    counts = np.bincount(table["frame"], minlength=40).reshape(5, 8)
    assert set(counts.ravel()) <= {50, 100, 200, 500} and (counts == counts[:, :1]).all()
    assert len(set(counts[:, 0])) > 1
    np.testing.assert_array_equal(table["time"], data.times[windows.ravel()][table["frame"]])
    truth = data.at_stations(windows.ravel(), 2843).numpy()[table["frame"], table["station"]]
    errors = table["value"] - truth
    assert abs(errors.std() - 1) < 0.05 and abs(errors.mean()) < 0.05
    assert table["station"].max() > 500
    first = OSSE(split=OSSE_SPLIT, density=50, anywhere=False, densities=(50, 100))
    assert first.drawn_observations(windows, np.random.default_rng(5))["station"].max() < 100


def test_layout_needs_no_file_and_data_travel_to_workers(data):
    lost = OSSE("nowhere.nc", "nowhere.csv", split=OSSE_SPLIT)
    layout = lost.layout(frames=8)
    assert layout.observations.frames == 8 and layout.targets["analysis"].grid == data.grid
    assert len(layout.targets["analysis"].lead_times) == 8
    indices = data.splits["test"][:2]
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.observed(indices), data.observed(indices))
    assert "2843 in the domain" in data.describe()


def test_impossible_networks_are_refused(data):
    with pytest.raises(ValueError, match="must be positive"):
        OSSE(split=OSSE_SPLIT, density=0)
    crowded = OSSE(split=OSSE_SPLIT, densities=(50, 3000))
    with pytest.raises(ValueError, match=r"3000 stations are asked for and .* has 2843 in the domain"):
        _ = crowded.stations


def test_scores_weigh_cells_and_frames():
    truth = torch.zeros(2, 3, 4, dtype=torch.float64)
    analysis = truth.clone()
    analysis[:, 2, 0] = 2.0
    found = score(analysis, truth, torch.tensor([2.0, 1, 1, 0]).double())
    assert found.last == pytest.approx(2**0.5) and found.rmse == pytest.approx((2 / 3) ** 0.5)


def test_optimal_interpolation_reaches_the_published_scores(data):
    """At 50 stations over the whole test year; the same call with all densities gives the others."""
    windows = evaluation_windows(data, 8)
    assert windows.shape == (182, 8) and (windows >= 1460).all() and np.unique(windows).size == windows.size
    found = score_osse((50,))[50]
    # 2.61, last frame 2.59; 2.70; 4.46; 3.69 in K
    assert abs(found["window"].rmse - 2.61) < 0.02 and abs(found["window"].last - 2.59) < 0.02
    assert abs(found["single_time"].rmse - 2.70) < 0.02
    assert abs(found["nearest_station"].rmse - 4.46) < 0.03
    assert abs(found["climatology"].rmse - 3.69) < 0.02
