"""Solar stations: the synthetic sky, windows with irregular reports beside images, and a model that reads both."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.datasets.solar_stations import (
    DAYLIGHT,
    SPLITS,
    SolarStations,
    SolarStatistics,
    SolarWindows,
)
from data.sources.synthetic_sky import Sky, clear_output, sun_height
from evaluation.station_forecasts import METHODS, format_scores, score_stations
from models import build
from training.tasks.station_forecast import StationForecastTask

TASK = {"input_frames": 3, "lead_times": [0.5, 2], "head": "deterministic", "loss": "mse"}
TINY = ["model=hip_metnet", "model/size=tiny", "model.hidden_size=16", "model.depth=1", "model.num_heads=2"]
TINY += ["model.num_latents=6"]


@pytest.fixture(scope="module")
def data():
    return SolarStations(stations=5)


@pytest.fixture(scope="module")
def windows(data):
    task = StationForecastTask(**TASK)
    return task.dataset(data, "train", task.fit(data))


def test_the_sun_stands_where_it_does():
    noon = np.array([np.datetime64("2002-06-21T12:00").astype("datetime64[s]").astype(int)])
    height = sun_height(noon, np.array([50.0, -50.0, 90.0]), np.zeros(3))[0]
    elevation = np.rad2deg(np.arcsin(height))
    np.testing.assert_allclose(elevation, [63.4, 16.6, 23.4], atol=0.6)
    assert clear_output(np.array([-0.5]))[0] == 0


def test_clouds_come_with_the_wind():
    sky, hours = Sky(3, 50.0), 3600 * np.arange(24 * 20) + 1_017_619_200

    moved = [(sky._carried(hours / 3600 + 2, axis) - sky._carried(hours / 3600, axis)) for axis in (0, 1)]
    here = sky.cover(hours + 7200, np.array([50.0]), np.array([10.0]))[:, 0]
    still = sky.cover(hours, np.array([50.0]), np.array([10.0]))[:, 0]
    across = 111.2 * np.cos(np.deg2rad(50.0))
    upwind = np.array(
        [
            sky.cover(hours[[i]], np.array([50 - moved[1][i] / 111.2]), np.array([10 - moved[0][i] / across]))[0, 0]
            for i in range(hours.size)
        ]
    )
    assert np.corrcoef(here, upwind)[0, 1] > np.corrcoef(here, still)[0, 1] + 0.1
    assert 0 <= here.min() < 0.2 and 0.8 < here.max() <= 1


def test_the_same_seed_is_the_same_world(data):
    again, other = SolarStations(stations=5), SolarStations(stations=5, seed=1)
    assert np.array_equal(again.output, data.output) and np.array_equal(again.reported, data.reported)
    assert not np.array_equal(other.output, data.output)
    assert 0.7 < data.reported.mean() < 0.8
    assert "5 stations" in data.describe()


@pytest.mark.parametrize("split", SPLITS)
def test_windows_stay_in_their_split_and_in_daylight(data, windows, split):
    part = SolarWindows(data, split, windows.statistics, input_frames=3)
    first, last = (round(share * data.times.size) for share in SPLITS[split])
    assert part.base_indices.min() - 2 >= first and part.base_indices.max() + 4 < last
    assert (data.sun[part.base_indices].mean(axis=1) > DAYLIGHT).all()


def test_a_batch_holds_what_was_reported_and_what_came(data, windows):
    batch = windows.__getitems__([7, 400])
    observed, target = batch.observations, batch.targets["forecast"]
    assert len(observed) == sum(
        data.reported[base - age].sum() for base in windows.base_indices[[7, 400]] for age in range(3)
    )
    rows, times = {}, observed.time()
    for row in range(len(observed)):
        rows[int(observed.batch[row]), int(times[row]), float(observed.latitude[row])] = float(observed.value[row])
    for sample, base in enumerate(windows.base_indices[[7, 400]]):
        assert batch.base_time[sample] == data.times[base]
        for station, (latitude, _) in enumerate(data.grid.locations):
            for age in range(3):
                key = (sample, int(data.times[base - age]), float(np.float32(latitude)))
                assert (key in rows) == data.reported[base - age, station]
                if key in rows:
                    assert rows[key] == pytest.approx(data.output[base - age, station], abs=1e-6)
            for lead, step in enumerate((1, 4)):
                assert target.values[sample, lead, 0, station] == pytest.approx(
                    data.output[base + step, station], abs=1e-6
                )
                assert bool(target.valid[sample, lead, 0, station]) == (data.sun[base + step, station] > DAYLIGHT)
            cell = int(data.image.cell_of(data.grid.coordinates[[station]]))
            middle = batch.inputs["surroundings"].values[sample, 0, 24, station]
            assert middle == batch.inputs["clouds"].values[sample, -1, 0].flatten()[cell]
    assert batch.layout == StationForecastTask(**TASK).layout(data)


def test_persistence_keeps_or_damps_the_last_reported_share(data, windows):
    base = windows.base_indices[50]
    kept, damped = (windows.persistence(np.array([base]), damped=way)[0] for way in (False, True))
    climatology = windows.statistics.climatology
    for station in range(5):
        share = climatology
        for frame in range(base - 2, base + 1):
            if data.reported[frame, station] and data.sun[frame, station] > DAYLIGHT:
                share = data.output[frame, station] / clear_output(data.sun[frame, station])
        for lead, step in enumerate((1, 4)):
            clear = clear_output(data.sun[base + step, station])
            assert kept[lead, station] == pytest.approx(share * clear)
            left = float(windows.statistics.damping[lead]) * (share - climatology)
            assert damped[lead, station] == pytest.approx((climatology + left) * clear)


def test_statistics_are_stored_and_scale_the_remaining_error(data, windows):
    tensors, description = windows.statistics.state_dict()
    again = SolarStatistics.from_state(tensors, description)
    assert (again.lead_steps, again.climatology) == ((1, 4), windows.statistics.climatology)
    assert torch.equal(again.scale, windows.statistics.scale) and torch.equal(again.damping, windows.statistics.damping)
    assert 0.3 < again.climatology < 0.9 and 1 >= again.damping[0] > again.damping[1] > 0
    batch = windows.__getitems__(range(0, len(windows), 7))
    target = batch.targets["forecast"]
    scaled = (target.values - target.reference.values) / target.reference.scale
    spread = torch.stack([scaled[:, lead][target.valid[:, lead]].std() for lead in range(2)])
    torch.testing.assert_close(spread, torch.ones(2), atol=0.15, rtol=0)


def test_the_hierarchy_reads_reports_beside_images(windows):
    torch.manual_seed(0)
    model, batch = build(TINY, windows.layout).eval(), windows.__getitems__([3, 90])
    torch.nn.init.normal_(model.decoder["forecast"].head.weight)
    output = model(batch)["forecast"]
    assert output.shape == (2, 2, 1, 5)
    louder = replace(
        batch.observations, features=batch.observations.features + (batch.observations.batch == 1)[:, None]
    )
    other = model(replace(batch, observations=louder))["forecast"]
    assert torch.equal(other[0], output[0]) and not torch.allclose(other[1], output[1])
    clouds = replace(batch.inputs["clouds"], values=batch.inputs["clouds"].values + 1)
    assert not torch.allclose(model(replace(batch, inputs={**batch.inputs, "clouds": clouds}))["forecast"], output)


def test_scores_are_of_daylight_and_damped_persistence_is_the_zero_of_a_fresh_model(windows):
    torch.manual_seed(0)
    scores = score_stations(build(TINY, windows.layout), windows)["pv_output"]["rmse"]
    assert list(scores) == ["0.5", "2"] and all(set(row) == set(METHODS) for row in scores.values())
    for row in scores.values():
        assert row["ours"] == pytest.approx(row["damped_persistence"], rel=2e-2)
        assert row["damped_persistence"] < row["smart_persistence"]
    assert len(format_scores({"pv_output": {"rmse": scores}}).split("\n")) == 1 + len(METHODS)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    (
        ({"lead_times": [2, 1]}, r"task\.lead_times=\[2, 1\] must be increasing"),
        ({"lead_times": [0.75]}, "task.lead_times: 0.75 h is not a multiple"),
        ({"input_frames": 0}, r"task\.input_frames=0 must be at least 1"),
    ),
)
def test_wrong_options_are_one_sentence(data, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        StationForecastTask(**{**TASK, **wrong}).layout(data)


def test_other_data_and_senseless_worlds_are_refused():
    with pytest.raises(ValueError, match=r"task=station_forecast needs .* data=solar_stations"):
        StationForecastTask(**TASK).layout(SimpleNamespace(task="forecast"))
    for wrong in ({"stations": 0}, {"missing": 1.0}):
        with pytest.raises(ValueError, match=r"data\."):
            SolarStations(**wrong)
