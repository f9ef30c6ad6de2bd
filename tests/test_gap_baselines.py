"""Interpolations and functions that fill gaps, against their formulas; blending; files of filled gaps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.covariances import matern32
from data.datasets.cloudy_series import CloudySeries
from evaluation.baselines import build, local_interpolation
from evaluation.baselines.eof_filling import chosen_modes, restored
from evaluation.baselines.gap_filling import GAP_BASELINES, LastSeen
from evaluation.baselines.local_interpolation import (
    DAMPING,
    SPIN_UP,
    LocalCovariance,
    LocalInterpolation,
    MeanInterpolation,
    SpaceTimeInterpolation,
    TwoSidedInterpolation,
    interpolated,
)
from evaluation.gap_file import GapFile
from evaluation.rolling_mosaic import RollingMosaic
from evaluation.stitching import blended, corners, starts
from tests.gap_examples import cloudy, sea


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    return cloudy(sea(tmp_path_factory.mktemp("gaps")), persistence=2)


@pytest.mark.parametrize("name", ("matern32", "exponential"))
def test_interpolation_from_all_values_is_the_linear_estimate_of_least_error(name):
    random = np.random.default_rng(0)
    places = random.normal(size=(15, 3)) * 300 + np.array([4000.0, 4000.0, 2000.0])
    values = np.where(random.random((3, 15)) < 0.5, random.normal(size=(3, 15)), np.nan)
    frames, targets = np.array([-1.0, 0.0, 1.5]), np.flatnonzero(np.isnan(values[1]))
    covariance = LocalCovariance(name, length=500.0, time=1.3, noise=0.05, neighbours=45)
    found, variance = interpolated(places, values, frames, targets, covariance)

    def correlation(a, b):
        ratio = np.linalg.norm(places[a[1]][:, None] - places[b[1]], axis=-1) / 500
        space = np.exp(-ratio) if name == "exponential" else matern32(torch.from_numpy(ratio)).numpy()
        return space * np.exp(-np.abs(frames[a[0]][:, None] - frames[b[0]]) / 1.3)

    seen = np.nonzero(np.isfinite(values))
    wanted = (np.full(targets.size, 1), targets)
    among = correlation(seen, seen) + 0.05 * np.eye(seen[0].size)
    weights = np.linalg.solve(among, correlation(seen, wanted))
    np.testing.assert_allclose(found, weights.T @ values[seen], rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(variance, 1 - (weights * correlation(seen, wanted)).sum(axis=0), atol=2e-4)
    nothing = interpolated(places, np.full((3, 15), np.nan), frames, targets, covariance)
    assert not nothing[0].any() and (nothing[1] == 1).all()


def test_a_cycled_analysis_starts_from_the_damped_one_before(series):
    covariance = LocalCovariance("exponential", 300.0, 0.0, 0.01, 8)
    plain, cycled = (LocalInterpolation(series, [covariance], cycle=cycle) for cycle in (0, 1))
    assert torch.equal(cycled(np.array([0]))[0], plain(np.array([0]))[0])  # nothing before
    before, now = cycled(np.array([20]))[0][0, 0], cycled(np.array([21]))[0][0, 0]
    visible = series.visible(np.array([21]))[0, 0]
    hidden = ~visible.isfinite() & torch.from_numpy(series.sea)
    places = plain.places
    departures = (visible - DAMPING * before).numpy()[None, series.sea]
    estimate, _ = interpolated(places, departures, np.zeros(1), np.flatnonzero(hidden.numpy()[series.sea]), covariance)
    expected = DAMPING * before[hidden] + torch.from_numpy(estimate).float()
    torch.testing.assert_close(now[hidden], expected, atol=1e-5, rtol=1e-4)
    seen = visible.isfinite()
    assert torch.equal(now[seen], visible[seen]) and not cycled(np.array([21]))[1][0, 0][seen].any()


def test_an_analysis_follows_from_its_frame_alone(series, monkeypatch):
    """Whatever was asked for before, and however few frames stay in memory; a split ends chains at the same frames."""
    data, covariance = series.data, LocalCovariance("exponential", 300.0, 0.0, 0.01, 8)
    readable = ~np.isin(np.arange(data.times.size), range(90, 100))
    few = CloudySeries(data, series.normalisation, series.clouds, 1, training=series, readable=readable)
    frames = np.setdiff1d(np.arange(40, 150), np.arange(90, 100))
    cycled = {cycle: LocalInterpolation(few, [covariance], cycle=cycle) for cycle in (1, -1)}
    two = TwoSidedInterpolation(*cycled.values())
    expected = two(frames)
    windows = [frames[start : start + 17] for start in range(0, frames.size, 11)]
    orders = [windows[::-1], [windows[number] for number in np.random.default_rng(0).permutation(len(windows))]]
    for order, kept in (*((order, 30_000_000) for order in orders), (windows, 5 * int(series.sea.sum()))):
        monkeypatch.setattr(local_interpolation, "MOST_KEPT", kept)
        again = two.under(few)
        for window in order:
            found = again(window)
            for mine, all_of_them in zip(found, expected, strict=True):
                assert torch.equal(mine, all_of_them[np.searchsorted(frames, window)])
        assert all(len(part._known) * series.sea.sum() <= kept for part in again.parts)
    monkeypatch.undo()
    counted = LocalInterpolation(few, [covariance], cycle=1)
    one, made = counted._one, []
    counted._one = lambda frame, before: (made.append(frame), one(frame, before))[1]
    for window in orders[1]:
        counted(window)
    assert set(made) == set(range(90)) | set(range(100, 150))  # from the start of the first run
    assert len(made) == 140 + 2 * SPIN_UP  # each once, but for those that lead to the runs from 64 and 128 on


def test_the_mean_of_interpolations_reads_no_frame_of_a_later_split(series):
    """Scales are chosen once, under further clouds where frames are few."""
    data, end = series.data, 40
    readable = np.arange(data.times.size) < end
    few = CloudySeries(data, series.normalisation, series.clouds, 1, training=series, readable=readable)
    kinds = (TwoSidedInterpolation, SpaceTimeInterpolation, MeanInterpolation)
    two, one, mean = (kind.fit(few, None, lead_steps=(), split="test") for kind in kinds)
    assert mean.parts[0].covariance == one.covariance == tuple(series.chosen["in time"]) and not few.chosen
    frames = np.array([end - 2, end - 1])
    for each, first, second in zip(mean(frames), one(frames), two(frames), strict=True):
        torch.testing.assert_close(each, (first + second) / 2)
    alone = two.parts[1](frames[1:])[0]  # cycled from after: nothing after it is read
    torch.testing.assert_close(alone, LocalInterpolation(few, two.parts[1].covariance)(frames[1:])[0])
    read = []
    few.truth = lambda indices, truth=few.truth: (read.extend(indices), truth(indices))[1]
    for part in (one, two):
        part.under(few)(frames)
    assert max(read) == end - 1
    hidden = [few.redrawn(more).hidden(frames) for more in (0, 1)]
    assert torch.equal(hidden[0], few.hidden(frames)) and not torch.equal(*hidden)


def test_the_last_value_seen_is_at_most_24_frames_old(tmp_path):
    dark = cloudy(sea(tmp_path, days=80, dark=range(20, 70)))
    baseline, cell = LastSeen(CloudySeries(dark.data, dark.normalisation, None, 0)), (0, 3, 3)
    last = dark.truth(np.array([19]))[0][cell]
    found = [float(baseline.filled(frame, frame)[0][cell]) for frame in np.array([19, 20, 43, 44])[:, None]]
    assert found == [last, last, last, 0.0]


def test_every_baseline_fills_from_what_is_visible_alone_and_interpolation_is_best(series):
    names = list(GAP_BASELINES)
    fitted = build(names, series, series.normalisation, lead_steps=(), split="test", known=GAP_BASELINES)
    frames = series.data.splits["test"][:20]
    truth, hidden = series.truth(frames), series.hidden(frames).expand(-1, 1, -1, -1) & series.truth(frames).isfinite()
    errors = {}
    for name, baseline in fitted.items():
        found = baseline.filled(frames, frames[5:])
        assert found.shape == (15, 1, *series.data.grid.shape) and found[hidden[5:]].isfinite().all()
        errors[name] = float((found - truth[5:])[hidden[5:]].square().mean().sqrt())
    assert errors["space_time_interpolation"] < 0.7 * errors["climatology"]
    assert errors["eof_filling"] < errors["climatology"]
    assert min(errors, key=errors.get) in ("space_time_interpolation", "two_sided_interpolation", "eof_filling")
    visible = series.visible(frames)
    mean, offset = visible.nanmean(dim=0), visible - visible.nanmean(dim=0)
    weights = series.data.grid.area_weights * offset.isfinite()
    shift = (offset.nan_to_num(0.0) * weights).sum((-2, -1)) / weights.sum((-2, -1))
    expected = mean.nan_to_num(0.0) + shift[..., None, None]
    torch.testing.assert_close(fitted["day_offset"].filled(frames, frames), expected.float(), atol=1e-5, rtol=1e-5)
    usual = series.normalisation.climatology(series.data.times[frames]) / series.normalisation.scale[:, None, None]
    raw = (visible + usual).nanmean(dim=0)
    found = (fitted["available_mean"].filled(frames, frames) + usual).where(raw.isfinite(), torch.nan)
    torch.testing.assert_close(found, raw.expand_as(found), equal_nan=True)


def test_functions_restore_a_field_that_is_made_of_few():
    random = np.random.default_rng(0)
    whole = random.normal(size=(40, 2)) @ random.normal(size=(2, 60))
    gaps = random.random(whole.shape) < 0.3
    gaps[:20] = False
    known = np.where(gaps, 0.0, whole)
    assert chosen_modes(known, gaps) == 2
    found = restored(known, gaps, 2)
    assert np.array_equal(found[~gaps], whole[~gaps])
    assert np.abs(found - whole)[gaps].max() < 0.1 * whole.std()
    np.testing.assert_allclose(restored(known.T, gaps.T, 2), found.T, atol=1e-2)  # either way round


@pytest.mark.parametrize("wraps", (False, True))
@pytest.mark.parametrize("shape, crop, overlap", (((7, 10), (4, 5), 2), ((9, 5), (3, 5), 0), ((6, 13), (6, 4), 3)))
def test_patches_that_agree_are_blended_exactly_on_any_size(shape, crop, overlap, wraps):
    whole = torch.randn(2, 3, *shape)
    places = corners(shape, crop, overlap, wraps=wraps)
    around = torch.cat([whole, whole], dim=-1)  # twice around the globe
    cells = np.zeros((shape[0], 2 * shape[1]))
    for top, left in places:
        cells[top : top + crop[0], left : left + crop[1]] += 1
        assert top + crop[0] <= shape[0] and (wraps or left + crop[1] <= shape[1])
    cells = cells[:, : shape[1]] + cells[:, shape[1] :]
    assert cells.min() >= 1
    if wraps and crop[1] < shape[1]:  # the date line lies in patches like any other meridian
        assert max(left for _, left in places) + crop[1] >= shape[1] + overlap
    patches = torch.stack([around[..., top : top + crop[0], left : left + crop[1]] for top, left in places])
    torch.testing.assert_close(blended(patches, places, shape), whole)
    mosaic, rows, tops = None, [], starts(shape[0], crop[0], overlap)
    for place, top in enumerate(tops):
        mosaic = mosaic or RollingMosaic(crop[0], shape[1])
        for left in starts(shape[1], crop[1], overlap, wraps=wraps):
            mosaic.add(around[..., top : top + crop[0], left : left + crop[1]], left)
        rows.append(mosaic.finished(crop[0] if place + 1 == len(tops) else tops[place + 1] - top))
    torch.testing.assert_close(torch.cat(rows, dim=-2), whole)
    other = torch.randn_like(patches)
    assert (blended(other, places, shape).abs() <= other.abs().max() + 1e-5).all()


@pytest.mark.parametrize("name", ("filled.nc", "filled.zarr"))
def test_files_are_written_in_pieces_and_appear_when_complete(tmp_path, series, name):
    import xarray as xr

    grid, times = series.data.grid, series.data.times[:3]
    values = np.random.default_rng(0).normal(size=(3, *grid.shape)).astype(np.float32)
    settings = dict(grid=grid, axes={"time": times}, fields={"sst": ("time", "K")}, calendar="noleap")
    for _ in range(2):  # an older file is replaced
        with GapFile(tmp_path / name, **settings) as file:
            file.write("sst", np.arange(3), slice(0, 4), values[:, :4])
            file.write("sst", np.array([2, 0]), slice(4, 7), values[[2, 0], 4:])
            assert (tmp_path / name).exists() == (_ == 1)
    options = {"engine": "zarr", "consolidated": False} if name.endswith("zarr") else {}
    with xr.open_dataset(tmp_path / name, **options) as found:
        expected = values.copy()
        expected[1, 4:] = np.nan
        np.testing.assert_array_equal(found["sst"].values, expected)
        assert found["time"].dt.calendar == "noleap" and found["sst"].units == "K"
    with pytest.raises(RuntimeError), GapFile(tmp_path / f"other_{name}", **settings):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(ValueError, match=r"must end in \.nc or \.zarr"):
        GapFile(tmp_path / "filled.txt", **settings)
    deep = tmp_path / "new" / "folder" / name
    with pytest.raises(RuntimeError), GapFile(deep, **settings):
        raise RuntimeError
    assert not (tmp_path / "new").exists()
    with GapFile(deep, **settings) as file:
        file.write("sst", np.arange(3), slice(0, 7), values)
    assert [path.name for path in deep.parent.iterdir()] == [name]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^cannot write .*free some space or choose another folder$"):
        GapFile(tmp_path / "file" / name, **settings).__enter__()
