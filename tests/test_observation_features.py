"""Features of observations against an independent float64 NumPy rendering, and what a check of rows refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.grids import LatLonGrid
from data.layout import ObservationLayout
from data.observation_features import LAYOUTS, features
from data.observations import Observations, check, time_offsets

START = 1_700_000_000  # float32 holds such times to 128 s only
LAYOUT = ObservationLayout(num_channels=9, num_platforms=4, num_types=3, num_features=50, frames=3, step=21_600)


def _observations(rows=400, **changes) -> Observations:
    random = np.random.default_rng(rows)
    satellite = random.random(rows) < 0.5

    def some(low, high, present):
        return np.where(present, random.uniform(low, high, rows), np.nan).astype(np.float32)

    times = START + 21_600 * np.arange(6).reshape(2, 3) + np.array([[0], [7_003]])
    batch, frame = random.integers(0, 2, rows), random.integers(0, 3, rows)
    columns = {
        "value": random.normal(size=rows).astype(np.float32),
        "batch": batch,
        "frame": frame,
        "channel": random.integers(0, 9, rows),
        "platform": random.integers(0, 4, rows),
        "type": random.integers(0, 3, rows),
        "times": times,
        "latitude": random.uniform(-90, 90, rows).astype(np.float32),
        "longitude": random.uniform(-180, 360, rows).astype(np.float32),
        "time_offset": random.integers(-10_800, 10_801, rows).astype(np.int32),
        "height": some(-100, 70_000, ~satellite),
        "pressure": some(0, 1_200, ~satellite & (random.random(rows) < 0.9)),
        "scan_angle": some(-50, 50, satellite),
        "satellite_zenith": some(-60, 60, satellite & (random.random(rows) < 0.9)),
        "solar_zenith": some(0, 180, satellite),
    }
    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    return Observations(**{**tensors, **changes})


def _expected(observations: Observations, length: int) -> np.ndarray:
    """Row by row and number by number, in float64."""
    column = {name: tensor.numpy() for name, tensor in observations.rows().items()}
    times = observations.times.numpy()

    def series(x, order):
        turns = [2 * np.pi * j * x for j in range(1, order + 1)]
        return [np.sin(turn) for turn in turns] + [np.cos(turn) for turn in turns]

    rows = []
    for i in range(len(observations)):
        given = {name: np.float64(column[name][i]) if name in column else np.nan for name in DESCRIPTION}
        of_frame, late = int(times[column["batch"][i], column["frame"][i]]), int(column["time_offset"][i])
        hour, day = ((of_frame + late) % 86_400) / 3600, late / 86_400
        lst = (hour + np.float64(column["longitude"][i]) / 15) % 24
        height, pressure = np.clip(given["height"] / 60_000, 0, 1), np.clip(given["pressure"] / 1100, 0, 1)
        scan, view, sun = given["scan_angle"], given["satellite_zenith"], given["solar_zenith"]
        row = [*series(lst / 24, 2), day, day**2]
        if length == 28:
            cosine = np.cos(np.radians(view))
            row += [*series(height, 4), *series(pressure, 4), scan / 50, (scan / 50) ** 2, cosine, cosine**2]
            row += [np.cos(np.radians(sun)), np.sin(np.radians(sun))]
        else:
            latitude = np.radians(np.float64(column["latitude"][i]))
            row += [np.sin(day), np.cos(day), np.sin(latitude), np.cos(latitude)]
            in_place = [*series(height, 5), *series(pressure, 5)]
            seen = [*series(scan / 50, 3), *series(view / 90, 4), *series(sun / 180, 3)]
            if np.isnan(given["height"]):
                row += [*seen, *([0] * 20 if length == 50 else [])]
            else:
                row += [*([0] * 20 if length == 50 else []), *in_place]
        rows.append(row)
    return np.nan_to_num(np.array(rows))


DESCRIPTION = ("height", "pressure", "scan_angle", "satellite_zenith", "solar_zenith")


@pytest.mark.parametrize("length", LAYOUTS)
@pytest.mark.parametrize("missing", [(), DESCRIPTION[:2], DESCRIPTION[2:], DESCRIPTION])
def test_features_match_the_independent_rendering(length, missing):
    observations = _observations(**dict.fromkeys(missing))
    given = features(observations, length)
    assert given.shape == (400, length) and given.dtype == torch.float32
    np.testing.assert_allclose(given.numpy(), _expected(observations, length), atol=3e-7)


def test_seconds_far_from_1970_are_told_apart():
    ids, times, time = torch.tensor([0, 0]), torch.tensor([[START + 7]]), torch.tensor([START, START + 1])
    offset = time_offsets(time, times, ids, ids)
    observations = _observations(rows=2, time_offset=offset, batch=ids, frame=ids, times=times)
    assert torch.equal(observations.time(), time)
    assert features(observations, 28)[:, 4].tolist() == pytest.approx([-7 / 86_400, -6 / 86_400])


def test_times_that_32_bits_do_not_hold_are_refused():
    ids, times = torch.tensor([0, 0], dtype=torch.int8), torch.tensor([[0]])
    assert time_offsets(torch.tensor([0, 2**31 - 1]), times, ids, ids).tolist() == [0, 2**31 - 1]
    with pytest.raises(ValueError, match="row 1 lies -2147483648 seconds from its frame, of which 2147483647 fit"):
        time_offsets(torch.tensor([0, -(2**31)]), times, ids, ids)
    with pytest.raises(ValueError, match=r"time_offset must be int32 .* not torch.int64; make it with .*time_offsets"):
        _observations(2, time_offset=torch.tensor([0, 1]))


def test_no_rows_and_unknown_layouts():
    assert features(_observations(0), 50).shape == (0, 50)
    with pytest.raises(ValueError, match=r"29 .*\(28, 30, 50\)"):
        features(_observations(2), 29)
    with pytest.raises(ValueError, match="without time"):
        features(_observations(2, time_offset=None), 28)


def test_sound_rows_pass_the_check():
    observations = _observations()
    check(observations, LAYOUT)
    check(_observations(0), LAYOUT, 12)
    check(replace(observations, cell=observations.channel), LAYOUT, 9)


def _spoilt(name: str, *entries) -> Observations:
    observations = _observations()
    column = getattr(observations, name, None)
    column = torch.zeros(400, dtype=torch.int64) if column is None else column.clone()
    for row, entry in entries:
        column[row] = entry
    return replace(observations, **{name: column})


@pytest.mark.parametrize(
    ("observations", "sentence"),
    [
        (_spoilt("channel", (5, 9), (7, -1)), r"of 400 rows 2 have channel outside 0 \.\. 8 \(row 5: 9, row 7: -1\)"),
        (_spoilt("platform", *((row, 4) for row in range(5))), r"5 have platform .*row 2: 4, \.\.\.\)"),
        (_spoilt("type", (0, 3)), r"1 have type outside 0 \.\. 2"),
        (_spoilt("frame", (1, 3)), r"1 have frame outside 0 \.\. 2"),
        (_spoilt("batch", (1, 2)), r"1 have batch outside 0 \.\. 1"),
        (_spoilt("cell", (399, 12)), r"1 have cell outside 0 \.\. 11 \(row 399: 12\)"),
        (_spoilt("value", (3, np.inf)), r"1 have value that is not finite \(row 3: inf\)"),
        (_spoilt("longitude", (3, np.nan)), r"1 have longitude that is not finite"),
        (_spoilt("latitude", (3, np.nan), (4, 90.5)), r"2 have latitude outside .*\(row 3: nan, row 4: 90\.5\)"),
        (_observations(features=torch.full((400, 50), torch.nan)), "400 have features that is not finite"),
        (_observations(features=torch.zeros(400, 28)), "28 features where the layout has 50"),
    ],
)
def test_broken_rows_are_refused_with_counts_and_examples(observations, sentence):
    with pytest.raises(ValueError, match=sentence):
        check(observations, LAYOUT, 12)


def test_places_outside_a_regional_grid_are_refused():
    grid = LatLonGrid(np.arange(30.0, 61), np.arange(200.0, 331))
    with pytest.raises(ValueError, match=r"have a place outside the \w+ grid"):
        check(_observations(), LAYOUT, grid=grid)
