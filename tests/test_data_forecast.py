"""Forecast windows and their batches against loops over the raw values."""

import json

import numpy as np
import pytest
import torch
from example_data import dataset, write

from data.batch import Batch
from data.calendars import clock
from data.datasets.forecast import ForecastDataset, forecast_layout
from data.datasets.gridded import GriddedData
from data.layout import Layout
from data.normalisation import Normalisation
from data.sources.series import MONTH_SECONDS

LEADS = (1, 3)
SPLIT = {"train": ["2001-01-01", "2001-03-31"], "validation": ["2001-03-20", "2001-03-31"], "test": "2001-04"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two variables and a static one, two gaps in time, land and a few missing values."""
    path = tmp_path_factory.mktemp("forecast") / "a.nc"
    kept = [*range(100), *range(103, 300), *range(310, 480)]
    content = dataset(names=("t2m", "sst"), keep=kept)
    content.sst[:, 1, 1] = np.nan
    content.sst[::17, 0, 2] = np.nan
    content.assign(height=(("lat", "lon"), np.arange(12.0).reshape(3, 4) ** 2)).to_netcdf(path)
    return GriddedData(str(path), split=SPLIT, variables=["t2m", "sst", "height"], cache="ram")


@pytest.fixture(scope="module")
def normalisation(data):
    return Normalisation.fit(data, lead_steps=LEADS)


def windows(data, normalisation, split, *, input_frames=2, **options) -> ForecastDataset:
    return ForecastDataset(data, split, normalisation, input_frames=input_frames, lead_steps=LEADS, **options)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_windows_are_all_and_only_those_that_are_allowed(data, normalisation, split):
    expected = []
    withheld = set(data.splits["validation"]) | set(data.splits["test"])
    for base in range(1, data.times.size - 3):
        read = [base - 1, base, base + 1, base + 3]
        no_gap = np.all(np.diff(data.times[base - 1 : base + 4]) == data.step)
        targets_inside = {base + 1, base + 3} <= set(data.splits[split])
        clean = split != "train" or not withheld & set(read)
        if no_gap and targets_inside and clean:
            expected.append(base)
    np.testing.assert_array_equal(windows(data, normalisation, split).base_indices, expected)
    assert np.flatnonzero(np.diff(data.segments)).size == 2 and len(expected) > 20


def test_a_batch_holds_the_values_of_the_file(data, normalisation):
    dataset = windows(data, normalisation, "test")
    chosen = [0, 7, 3, 7]
    batch = dataset.__getitems__(chosen)
    base = dataset.base_indices[chosen]
    field, target = batch.inputs["prognostic"], batch.targets["forecast"]
    for row, index in enumerate(base):
        for item, frames in ((field, [index - 1, index]), (target, [index + 1, index + 3])):
            torch.testing.assert_close(item.physical()[row], data.read(frames), rtol=0, atol=1e-3, equal_nan=True)
            assert item.times[row].tolist() == data.times[frames].tolist()
            expected = normalisation.anomalies(data.read(frames), data.times[frames])
            torch.testing.assert_close(item.values[row], expected, equal_nan=True)
            torch.testing.assert_close(item.offset[row], normalisation.climatology(data.times[frames]), equal_nan=True)
    assert torch.equal(target.valid, target.values.isfinite()) and torch.equal(target.domain, data.domain)
    assert not target.presence[:, :, 1, 1, 1].any() and target.presence[:, :, 0].all()
    assert batch.base_time.tolist() == data.times[base].tolist()
    assert batch.queries()["forecast"].lead_time[0].tolist() == [21_600, 64_800]


@pytest.mark.parametrize("reference", ["climatology", "persistence", "damped_persistence"])
def test_references_in_physical_units(data, normalisation, reference):
    dataset = windows(data, normalisation, "test", reference=reference)
    batch = dataset[5]
    target, base = batch.targets["forecast"], dataset.base_indices[5]
    predicted = target.physical(target.reference.values)[0]
    now, climatology = data.read([base]), normalisation.climatology(data.times[[base]])
    ahead = normalisation.climatology(data.times[[base + 1, base + 3]])
    expected = {
        "climatology": ahead,
        "persistence": now.expand(2, -1, -1, -1),
        "damped_persistence": ahead + normalisation.damping[:, :, None, None] * (now - climatology),
    }[reference]
    present = expected.isfinite()
    torch.testing.assert_close(predicted[present], expected[present], rtol=0, atol=1e-3)
    assert target.reference.values.isfinite().all() and target.reference.scale.shape == (1, 2, 2, 1, 1)


def test_a_missing_last_frame_leaves_climatology_as_the_reference(data, normalisation):
    dataset = windows(data, normalisation, "train")
    row = int(np.flatnonzero(dataset.base_indices == 17)[0])  # sst is missing there
    target = dataset[row].targets["forecast"]
    assert dataset[row].inputs["prognostic"].values[0, -1, 1, 0, 2].isnan()
    assert (target.reference.values[0, :, 1, 0, 2] == 0).all() and (target.reference.values[0, :, 0, 0, 2] != 0).all()


@pytest.mark.parametrize(("reference", "expected"), [("persistence", 1.0), ("damped_persistence", 1.0)])
def test_the_reference_scale_makes_targets_of_unit_variance(data, normalisation, reference, expected):
    target = windows(data, normalisation, "train", reference=reference).__getitems__(range(200)).targets["forecast"]
    residual = (target.values - target.reference.values) / target.reference.scale
    weights = data.grid.area_weights.expand(residual.shape) * target.presence
    square = torch.where(target.presence, residual**2 * weights, 0).sum((0, 3, 4)) / weights.sum((0, 3, 4))
    torch.testing.assert_close(square.sqrt(), torch.full((2, 2), expected, dtype=torch.float64), rtol=0.1, atol=0)


def test_static_fields_are_an_input_of_one_frame(data, normalisation):
    batch = windows(data, normalisation, "test").__getitems__([0, 1])
    static = batch.inputs["static"]
    assert static.values.shape == (2, 1, 1, 3, 4) and static.times.tolist() == batch.base_time[:, None].tolist()
    torch.testing.assert_close(static.physical()[1, 0], data.static)
    assert static.values[0].mean().abs() < 1e-5 and static.values[0].std(correction=0) == pytest.approx(1, abs=1e-5)


def test_the_layout_is_plain_json_and_describes_the_batches(data, normalisation):
    dataset = windows(data, normalisation, "test")
    layout = Layout.from_dict(json.loads(json.dumps(dataset.layout.to_dict())))
    assert layout == dataset.layout == forecast_layout(data, input_frames=2, lead_steps=LEADS)
    assert layout.inputs["prognostic"].gaps and layout.targets["forecast"].lead_times == (21_600, 64_800)
    batch = dataset[0]
    assert Batch(batch.inputs, batch.targets, layout).queries()["forecast"].features.shape[1] == layout.query_features(
        "forecast"
    )
    assert dataset.lead_hours == (6, 18)


def test_data_without_gaps_and_land_needs_no_masks(tmp_path):
    data = GriddedData(str(write(tmp_path / "a.nc")), split={"train": 0.6, "validation": 0.2, "test": 0.2})
    batch = windows(data, Normalisation.fit(data, lead_steps=LEADS), "train")[0]
    target = batch.targets["forecast"]
    assert target.presence is None and not batch.layout.inputs["prognostic"].gaps and "static" not in batch.inputs


@pytest.mark.parametrize("calendar", ["noleap", "360_day"])
def test_other_calendars_keep_their_days_of_the_year(tmp_path, calendar):
    content = dataset(frames=60).assign_coords(
        time=("time", np.arange(60.0) * 10 + 0.25, {"units": "days since 2000-01-01", "calendar": calendar})
    )
    content.to_netcdf(tmp_path / "a.nc")
    data = GriddedData(str(tmp_path / "a.nc"), split={"train": 0.6, "validation": 0.2, "test": 0.2})
    field = windows(data, Normalisation.fit(data, lead_steps=LEADS), "test")[0].inputs["prognostic"]
    second_of_day, day_of_year = clock(field.times, calendar)
    assert (field.second_of_day == 21_600).all() and torch.equal(field.day_of_year, day_of_year)
    length = 365 if calendar == "noleap" else 360
    elapsed = (field.times - data.times[0]).double() / 86_400 + 0.25
    torch.testing.assert_close(day_of_year.double(), 1 + elapsed % length * 365 / length, rtol=0, atol=1e-3)
    assert torch.equal(field.second_of_day, second_of_day)


def test_monthly_series_count_months(tmp_path):
    content = dataset(frames=60).assign_coords(time=("time", np.arange(60.0), {"units": "months since 2000-01-01"}))
    content.to_netcdf(tmp_path / "a.nc")
    split = {"train": ["2000", "2002"], "validation": "2003", "test": "2004"}
    data = GriddedData(str(tmp_path / "a.nc"), split=split)
    dataset_ = windows(data, Normalisation.fit(data, lead_steps=LEADS), "test")
    assert dataset_.lead_hours == (730.5, 2191.5)
    assert dataset_.layout.targets["forecast"].lead_times == (MONTH_SECONDS, 3 * MONTH_SECONDS)
    times = dataset_[0].targets["forecast"].times[0].numpy().astype("datetime64[s]").astype("datetime64[D]").astype(str)
    assert times.tolist() == ["2004-01-01", "2004-03-01"] and len(dataset_) == 10


@pytest.mark.parametrize(("frames", "input_frames"), [(10, 2), (40, 12)])
def test_fewer_time_steps_than_a_window_are_refused(tmp_path, frames, input_frames):
    keep = range(frames) if frames == 10 else [i for i in range(frames) if i % 10]  # gaps everywhere
    data = GriddedData(str(write(tmp_path / "a.nc", keep=keep)), split={"train": 0.6, "validation": 0.2, "test": 0.2})
    fitted = Normalisation.fit(data, lead_steps=LEADS)
    with pytest.raises(ValueError, match=r"the \w+ split \(\d+ of \d+ time steps\) holds no window") as error:
        for split in ("train", "validation", "test"):
            windows(data, fitted, split, input_frames=input_frames)
    assert f"need {input_frames + 3} steps without a gap; shorten task.input_frames" in str(error.value)


def test_unknown_options_are_refused(data, normalisation):
    with pytest.raises(ValueError, match=r"task\.reference=zero is unknown; allowed: climatology, persistence"):
        windows(data, normalisation, "test", reference="zero")
    with pytest.raises(ValueError, match="unknown split 'valid'; allowed: train, validation, test"):
        windows(data, normalisation, "valid")
    with pytest.raises(ValueError, match="at least one input frame and lead steps of 1 or more"):
        windows(data, normalisation, "test", input_frames=0)
