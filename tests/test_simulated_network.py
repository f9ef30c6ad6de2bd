"""The embedded network: the same observations in any order, at plausible places, close to the truth."""

import pickle

import numpy as np
import pytest
import torch

from data.datasets.simulated_network import CHANNELS, NOISE, PLATFORMS, SimulatedNetwork
from data.sources.simulated_instruments import BIN_SECONDS, Orbiter, Stations, normal, solar_zenith, uniform

WINDOW = (-BIN_SECONDS // 2, BIN_SECONDS // 2)
SPLIT = {"train": ["2001-01", "2001-03"], "validation": "2001-04", "test": "2001-05"}


@pytest.fixture(scope="module")
def network() -> SimulatedNetwork:
    return SimulatedNetwork(split=SPLIT, level=2, stations=30, sondes=6)


def frame(table, number):
    return table.select(table["frame"] == number)


def test_random_numbers_follow_from_their_keys():
    keys = np.arange(20_000)
    assert np.array_equal(uniform(3, keys)[17], uniform(3, 17))
    assert not np.array_equal(uniform(3, keys), uniform(4, keys))
    drawn = normal(0, keys, 5)
    assert abs(drawn.mean()) < 0.03 and abs(drawn.std() - 1) < 0.03 and abs(uniform(0, keys).mean() - 0.5) < 0.01
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.03


def test_observations_of_a_frame_do_not_depend_on_the_others(network):
    alone = network.observations([40], WINDOW)
    among = frame(network.observations([41, 7, 40], WINDOW), 2)
    again = frame(pickle.loads(pickle.dumps(network)).observations([40, 39], WINDOW), 0)
    assert len(alone) > 300
    for name in ("value", "time", "latitude", "platform"):
        assert np.array_equal(alone[name], among[name]) and np.array_equal(alone[name], again[name])


def test_windows_hold_their_rows_and_share_none(network):
    rows = network.observations([40, 41], WINDOW)
    late = rows["time"] - network.times[[40, 41]][rows["frame"]]
    assert (late > WINDOW[0]).all() and (late <= WINDOW[1]).all()
    wide = network.observations([40], (WINDOW[0], WINDOW[1] + BIN_SECONDS))
    assert len(wide) == len(rows)
    assert len(network.observations([40], (0, 1))) < 20


def test_values_follow_the_truth(network):
    """Correlations with the truth of the cell that holds them; cells are wide, so not nearly 1."""
    rows = network.observations(np.arange(20, 60), WINDOW)
    near = np.abs(rows["time"] - network.times[20 + rows["frame"]]) < 1800
    rows = rows.select(near)
    places = torch.from_numpy(np.stack([rows["latitude"], rows["longitude"]], axis=-1))
    cell = network.grid.cell_of(places).numpy()
    truth = network.read(np.arange(20, 60))[:, 0].numpy()[rows["frame"], cell]
    for number, name in enumerate(CHANNELS):
        chosen = rows["channel"] == number
        nadir = np.nan_to_num(np.abs(rows["scan_angle"]), nan=0.0) < 20
        levels = rows["pressure"] if name == "sonde_t" else np.zeros(len(rows))
        chosen &= nadir & (levels == levels[chosen][0])
        assert np.corrcoef(truth[chosen], rows["value"][chosen])[0, 1] > 0.8, name
        assert np.allclose(rows["error"][chosen], NOISE[name])


def test_orbiters_keep_their_local_time_and_reach_the_poles():
    orbiter = Orbiter(seed=1, ascending=13.5, line_seconds=60, missing=0.0)
    looks = orbiter.looks(np.arange(45_000, 45_016))
    assert looks.latitude.max() > 80 and looks.latitude.min() < -80
    assert set(np.round(np.abs(looks.scan_angle))) == {15, 45} and looks.satellite_zenith.max() > 50
    equator = np.abs(looks.latitude) < 3
    hour = (looks.time % 86_400 / 3600 + looks.longitude / 15) % 24
    away = np.minimum(np.abs(hour - 13.5), np.abs(hour - 1.5))[equator]
    assert away.max() < 1.2  # the swath is 2,000 km wide
    seen = np.histogram(looks.longitude, bins=12, range=(0, 360))[0]
    assert seen.min() > 0.5 * seen.mean()


def test_stations_have_gaps_and_sondes_fly_twice_a_day():
    place = np.linspace(0, 50, 40)
    bins = np.arange(45_000, 45_400)
    assert len(Stations(place, place, seed=1, gaps=0.0, outages=0.0).looks(bins)) == 40 * 400
    looks = Stations(place, place, seed=1, gaps=0.1, outages=0.05).looks(bins)
    assert 0.8 < len(looks) / (40 * 400) < 0.9
    sondes = Stations(place, place, seed=1, every=12, gaps=0.0, outages=0.0).looks(bins)
    assert len(sondes) == 40 * 200


def test_the_sun_stands_where_it_should():
    june = np.array([np.datetime64("2001-06-21T12", "s").astype(np.int64)] * 3)
    found = solar_zenith(june, np.array([23.4, -66.6, 0.0]), np.array([0.0, 0.0, 180.0]))
    assert np.allclose(found, [0, 90, 156.6], atol=1)


def test_channels_are_standardised_at_every_pressure(network):
    rows = network.channels.normalised(network.observations(network.splits["train"][::9], WINDOW))
    for number in range(len(CHANNELS)):
        value = rows["value"][rows["channel"] == number]
        assert abs(value.mean()) < 0.3 and 0.7 < value.std() < 1.3
    aloft = rows.select((rows["channel"] == 1) & (rows["pressure"] == 250))
    assert abs(aloft["value"].mean()) < 0.4  # though it is 60 K colder than the mean of all levels


def test_a_network_can_be_silent():
    silent = SimulatedNetwork(split=SPLIT, level=1, stations=0, sondes=0, orbiters=0)
    assert len(silent.observations([5, 6], WINDOW)) == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"grid": "cube"}, "data.grid=cube is unknown; allowed: healpix, latlon"),
        ({"orbiters": 3}, "data.orbiters=3 0 to 2"),
        ({"num_platforms": 2}, f"data.num_platforms=2 is below the {len(PLATFORMS)} ids in use"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SimulatedNetwork(split=SPLIT, **options)
