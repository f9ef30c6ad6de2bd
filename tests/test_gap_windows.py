"""Clouds over complete fields, months of days in every calendar, windows, patches, and what none of them may read."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.clouds import CloudMasks
from data.datasets.gap_windows import FILLED, MONTHLY, GapWindow, GapWindows
from data.datasets.gridded import GriddedData
from data.datasets.leave_out_blocks import LeaveOutBlocks
from data.layout import Layout
from data.months import MonthSlots
from tests.gap_examples import SHAPE, SPLIT, cloudy, sea, write_sea
from training.tasks.reconstruct import ReconstructTask

MONTHS = GapWindow(2, 1, (MONTHLY, FILLED), True, None, "available_mean")


def task(**changes) -> ReconstructTask:
    settings = dict(months=1, input_frames=4, targets=[MONTHLY, FILLED], all_frames=True, draws=2, head="deterministic")
    settings |= dict(clouds=CloudMasks("synthetic:clouds", persistence=3), reference="available_mean", loss="huber")
    return ReconstructTask(**(settings | changes))


@pytest.fixture(scope="module")
def year(tmp_path_factory):
    return sea(tmp_path_factory.mktemp("sea"))


def test_clouds_hide_the_wanted_share_stay_and_follow_from_their_numbers(tmp_path):
    domain = np.ones((13, 21), bool)
    domain[:4] = False
    clouds = CloudMasks("synthetic:clouds", hidden=(0.4, 0.6), persistence=3, tiles=(1.5, 0.5))
    masks = np.stack([clouds.mask(spell, domain, draw=1) for spell in range(20)])
    shares = masks[:, domain].mean(axis=1)
    assert ((shares >= 0.4) & (shares <= 0.6)).all() and len(np.unique(shares)) > 3
    assert np.array_equal(masks[7], clouds.mask(7, domain, draw=1))
    assert not np.array_equal(masks[7], clouds.mask(7, domain, draw=2))
    with pytest.raises(ValueError, match=r"no gaps of task\.clouds\.path=synthetic:clouds hide 99% to 100%"):
        CloudMasks("synthetic:clouds", hidden=(0.99, 1.0)).mask(0, domain)
    with pytest.raises(ValueError, match="has no gaps; give a satellite product"):
        _ = CloudMasks(str(write_sea(tmp_path / "clear.nc", days=3))).patterns
    for wrong in (dict(hidden=(0.5, 0.5)), dict(persistence=0), dict(tiles=(0, 1))):
        with pytest.raises(ValueError, match=f"task.clouds.{next(iter(wrong))}="):
            CloudMasks("synthetic:clouds", **wrong)


def test_a_pattern_is_that_of_the_file_and_land_follows_the_sea(tmp_path):
    import xarray as xr

    path = write_sea(tmp_path / "gaps.nc", days=2)
    with xr.open_dataset(path) as file:
        file = file.load()
    file["sst"][1, :, 5:] = np.nan
    file.to_netcdf(tmp_path / "cloudy.nc")
    patterns = CloudMasks(str(tmp_path / "cloudy.nc")).patterns
    assert not patterns[0].any()  # two cells are never seen: land, under the sky of their neighbours
    assert np.array_equal(patterns[1], np.broadcast_to(np.arange(10) >= 5, SHAPE))


@pytest.mark.parametrize("calendar, days", (("noleap", 28), ("standard", 29), ("360_day", 30)))
def test_months_of_every_calendar_are_padded_to_31_slots(tmp_path, calendar, days):
    data = sea(tmp_path, days=121, calendar=calendar, start="2004-01-01", skipped=[40])
    slots = MonthSlots.of(data.times, data.step, data.calendar)
    february = slots.frames[1]
    first = 30 if calendar == "360_day" else 31
    assert slots.frames.shape[1] == 31 and (february[days:] == -1).all()
    assert february[40 - first] == -1 and (february[:days] >= 0).sum() == days - 1  # the day that is left out
    present = slots.frames >= 0
    assert np.array_equal(np.sort(slots.frames[present]), np.arange(data.times.size))
    assert np.array_equal(slots.times[present], data.times)


@pytest.mark.parametrize("calendar", ("noleap", "standard", "360_day"))
def test_frames_of_months_keep_their_times_and_others_follow_them(tmp_path, calendar):
    """Frames at noon, some of them hours early or late; a day is missing on each side of a month's end."""
    noon = sea(tmp_path, days=121, calendar=calendar, start="2004-01-01 12:00", skipped=[30, 31, 32])
    jitter = np.where(np.arange(noon.times.size) % 5 == 0, 3600 * (np.arange(noon.times.size) % 11 - 5), 0)
    slots = MonthSlots.of(noon.times + jitter, noon.step, noon.calendar)
    there = slots.frames >= 0
    assert np.array_equal(slots.times[there], noon.times + jitter)
    assert (slots.times[~there] % 86_400 == 43_200).all() and (np.diff(slots.times, axis=1) > 0).all()
    assert there.sum() == noon.times.size
    windows = GapWindows([cloudy(noon)], "train", replace(MONTHS, months=1))
    frames = windows.frames[0][windows.frames[0] >= 0]
    usual = windows.normalisation.climatology(windows.months.times[0][: 30 if calendar == "360_day" else 31])
    batch = windows.__getitems__([0])
    assert np.array_equal(batch.inputs["daily"].times[0][: frames.size].numpy(), noon.times[frames])
    torch.testing.assert_close(batch.targets[MONTHLY].offset[0, 0], usual.mean(dim=0), equal_nan=True)
    visible = batch.inputs["daily"].presence[0, : frames.size]
    torch.testing.assert_close(
        batch.inputs["daily"].physical()[0, : frames.size][visible], noon.read(frames)[visible], rtol=0, atol=1e-5
    )


def test_hours_of_months_and_daily_means(tmp_path):
    data = sea(tmp_path, days=62, step_hours=6)
    assert MonthSlots.of(data.times, data.step, data.calendar).frames.shape == (3, 124)
    daily = GriddedData(str(tmp_path / "sea.nc"), split=SPLIT, daily_means=True)
    whole = data.read(np.arange(data.times.size)).unflatten(0, (-1, 4)).mean(dim=1)
    torch.testing.assert_close(daily.read([3, 1]), whole[[3, 1]], equal_nan=True)
    part = daily.series.part(slice(2, 5), slice(1, 9))
    assert np.array_equal(part.read([4]), daily.series.read([4])[..., 2:5, 1:9], equal_nan=True)
    assert part.grid.shape == (3, 8) and part.grid.latitude[0] == daily.grid.latitude[2]
    with pytest.raises(ValueError, match="daily_means=true needs several frames a day"):
        GriddedData(str(write_sea(tmp_path / "days.nc", days=30)), split=SPLIT, daily_means=True)


def test_windows_hold_what_is_visible_and_want_what_is_hidden(year):
    series = [cloudy(year, draw, persistence=3) for draw in (1, 2)]
    windows = GapWindows(series, "train", MONTHS)
    batch = windows.__getitems__([0, len(windows.frames)])  # the same months under other clouds
    given, filled, monthly = batch.inputs["daily"], batch.targets[FILLED], batch.targets[MONTHLY]
    assert Layout.from_dict(batch.layout.to_dict()) == windows.layout and windows.layout.inputs["daily"].groups == 2
    assert given.values.shape == (2, 62, 1, *SHAPE) and torch.equal(given.group[0], torch.arange(62) // 31)
    assert given.frame_valid.sum(dim=1).tolist() == [59, 59]  # January and February
    frames = np.arange(59)
    truth, there = year.read(frames), given.frame_valid[0]
    for sample in range(2):
        seen, wanted = given.presence.expand_as(given.values)[sample][there], filled.presence[sample][there]
        assert not (seen & wanted).any() and torch.equal(seen | wanted, truth.isfinite())
        torch.testing.assert_close(filled.physical()[sample][there][wanted], truth[wanted])
        torch.testing.assert_close(given.physical()[sample][there][seen], truth[seen])
    assert not torch.equal(given.valid[0], given.valid[1])
    known = monthly.presence.expand_as(monthly.values)
    mean = torch.stack([truth[:31].mean(dim=0), truth[31:].mean(dim=0)])
    assert torch.equal(known[0], mean.isfinite())
    torch.testing.assert_close(monthly.physical()[0][known[0]], mean[known[0]], rtol=1e-5, atol=1e-4)
    visible = given.physical()[0].where(given.presence[0], torch.nan)
    anomaly = (visible - given.offset[0])[:31].nanmean(dim=0)
    torch.testing.assert_close(
        (monthly.reference.values[0, 0] * monthly.scale)[anomaly.isfinite()], anomaly[anomaly.isfinite()]
    )
    assert monthly.times[0].tolist() == given.times[0, 30::31].tolist()
    assert windows.layout.targets[MONTHLY].lead_times == (-31 * 86_400, 0)
    assert windows.layout.frames_of(MONTHLY, 2) == [0, 1] and windows.layout.frames_of(FILLED) == list(range(62))


def test_months_that_are_hardly_known_are_counted_and_warned_of(year, tmp_path):
    """Two clear days in three, but for the end of January: no month of a day in ten is known by nine tenths."""
    data = sea(tmp_path, days=366, dark=np.arange(20, 366, 3))
    with pytest.warns(UserWarning, match=r"^0 of 476 cell months of the training .* task\.min_share=0\.9 of its days"):
        task().fit(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = task(min_share=0.6)
        statistics = chosen.fit(data)
        task(months=None, targets=[FILLED]).fit(data)
    known, cells = chosen._known_months(data)
    windows = GapWindows([cloudy(data)], "train", chosen.window(), min_share=0.6)
    monthly = windows.__getitems__(range(len(windows.frames))).targets[MONTHLY]
    assert cells == 7 * 68 and known == int(monthly.presence.expand_as(monthly.values).sum()) == cells
    assert task(min_share=0.8)._known_months(data)[0] == 68  # January
    assert task()._known_months(year) == (cells, cells) and statistics.scale > 0


def test_splits_keep_apart_months_without_data_are_left_out_and_every_month_is_told_once(tmp_path):
    split = {"train": "2001", "validation": ["2002-01", "2002-03"], "test": ["2002-04", "2002-10"]}
    data = sea(tmp_path, days=730, skipped=range(120, 151), split=split)
    series = [cloudy(data)]
    for split in ("train", "validation", "test"):
        windows = GapWindows(series, split, MONTHS)
        used = windows.frames[windows.frames >= 0]
        assert np.isin(used, data.splits[split]).all()
        months = windows.rows.ravel()
        assert 4 not in months  # May 2001
        expected = {"train": {0, 1, 2, 3, *range(5, 12)}, "validation": {12, 13, 14}, "test": set(range(15, 22))}
        assert set(months.tolist()) == expected[split]
    assert windows.rows.tolist() == [[15, 16], [17, 18], [19, 20], [20, 21]]
    frames = GapWindow(None, 5, (FILLED,), True, None, "climatology")
    tests = GapWindows(series, "test", frames)
    assert np.array_equal(np.unique(tests.frames), data.splits["test"]) and "prognostic" in tests.layout.inputs
    with pytest.raises(ValueError, match=r"the test split .* holds no window of 500 frames in a row"):
        GapWindows(series, "test", GapWindow(None, 500, (FILLED,), True, None, "climatology"))


def test_patches_are_parts_of_the_domain_with_places_of_their_own(year):
    window = GapWindow(1, 1, (MONTHLY, FILLED), True, (4, 5), "available_mean")
    series = [cloudy(year)]
    patches = GapWindows(series, "train", window, patches=3)
    whole = GapWindows(series, "train", replace(window, crop=None))
    assert len(patches) == 3 * len(whole)
    corners = [(0, 0), (3, 5)]
    batch, all_of_it = patches.batch(np.array([0, 2]), np.array([0, 0]), corners), whole.__getitems__([0, 2])
    for sample, (top, left) in enumerate(corners):
        cut = (Ellipsis, slice(top, top + 4), slice(left, left + 5))
        for name in (MONTHLY, FILLED):
            torch.testing.assert_close(
                batch.targets[name].values[sample], all_of_it.targets[name].values[sample][cut], equal_nan=True
            )
        expected = year.grid.coordinates.unflatten(0, SHAPE)[cut[1:]].flatten(0, 1).float()
        assert torch.equal(batch.inputs["daily"].coordinates[sample], expected)
    assert batch.layout.crops and len(patches.__getitems__([0, 1, 5]).targets) == 2
    with pytest.raises(ValueError, match=r"task.crop=\[9, 5\] is larger than the image of 7 x 10 cells"):
        GapWindow(1, 1, (FILLED,), True, (9, 5), "climatology").layout(year)


def test_pixels_that_a_test_withholds_are_seen_by_no_other_split(tmp_path):
    data = LeaveOutBlocks(str(write_sea(tmp_path / "sea.nc", days=8)), block=2, share=0.2, frames=4, repeats=2)
    masks = [np.stack([data.clouds.mask(frame, draw=draw) for frame in range(8)]) for draw in range(3)]
    known = data.read(range(8))[:, 0].isfinite().numpy()
    for mask in masks:
        shares = (mask & known).sum(axis=(1, 2)) / known.sum(axis=(1, 2))
        assert (shares > 0).sum() == 4 and (shares[shares > 0] >= 0.2).all() and shares.max() < 0.35
    seen = {split: data.seen_in(split).read(range(8))[:, 0].isfinite().numpy() for split in ("train", "validation")}
    training, validation = seen.values()
    assert not training[np.any(masks, axis=0)].any() and np.array_equal(training, known & ~np.any(masks, axis=0))
    assert np.array_equal(validation, known & ~np.any(masks[:2], axis=0))
    chosen = task(months=None, input_frames=8, targets=[FILLED])
    statistics = chosen.fit(data)
    mean = np.nanmean(np.where(training, data.read(range(8))[:, 0].numpy(), np.nan))
    assert abs(float(statistics.coefficients[0].nanmean()) - mean) < 0.05
    batch = chosen.dataset(data, "test", statistics).__getitems__([0, 1])
    wanted = batch.targets[FILLED].presence.expand_as(batch.targets[FILLED].values)[:, :, 0].numpy()
    assert np.array_equal(wanted, np.stack([mask & known for mask in masks[:2]]))


@pytest.mark.parametrize(
    "options, sentence",
    (
        (dict(months=0), "task.months=0 must be at least 1"),
        (dict(targets=["daily"]), r"task.targets=\['daily'\] must be"),
        (dict(months=None), "has means of months; use task.months=1"),
        (dict(reference="mean"), "task.reference=mean is unknown; use one of climatology, available_mean, analysis"),
        (dict(analysis="kriging"), "task.analysis=kriging is unknown"),
        (dict(min_share=0.0), "task.min_share=0.0 must be above 0"),
        (dict(crop=[8, 8], overlap=8), r"task.crop=\[8, 8\] must be two numbers of cells above task.overlap=8"),
        (dict(head="quantile"), "task.head=quantile does not suit this task"),
    ),
)
def test_settings_that_make_no_sense(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        task(**options)


def test_data_that_suit_no_months_or_hide_nothing(year, tmp_path):
    gappy = sea(tmp_path, dark=range(5, 300, 4))
    for targets, chosen, data in (("monthly,filled", {}, year), ("monthly", dict(reference="climatology"), gappy)):
        with pytest.raises(ValueError, match=rf"clouds=null hides nothing .* task\.targets=\[{targets}\] is in the"):
            task(clouds=None, targets=targets.split(","), **chosen).layout(data)  # before anything is computed
    event = LeaveOutBlocks(str(tmp_path / "sea.nc"), block=2, share=0.2, frames=4, repeats=2)
    assert task(clouds=None, months=None, targets=[FILLED]).layout(event)  # hides cells by itself
    with pytest.raises(
        ValueError, match=r"validation split .* holds no window of 5 whole months in a row; .* lower task\.months"
    ):
        task(months=5).layout(year)  # before anything is trained
    times = np.arange(12) * 5 * 86_400
    with pytest.raises(ValueError, match=r"these data have one of 432000 seconds; use task\.months=null"):
        MonthSlots.of(times, 432_000, "noleap")
    with pytest.raises(ValueError, match="1970-01-01 00:00 and the time after it lie in one step of 86400 seconds"):
        MonthSlots.of(np.array([0, 21_600, 86_400]), 86_400, "noleap")
