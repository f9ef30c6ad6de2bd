"""Filling the gaps of files: what stays, which files are filled, and what is said of those that are not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.datasets.gap_windows import FILLED, MONTHLY, GapWindow
from data.datasets.gridded import GriddedData
from data.datasets.leave_out_blocks import LeaveOutBlocks
from data.normalisation import Normalisation
from evaluation.fill_gaps import Filler, fill_gaps
from models.composition import build_from_config, compose
from tests.gap_examples import write_sea
from training.fill_gaps import check_alike

SPLIT = {"train": 0.9, "validation": 0.05, "test": 0.05}  # nearly a year to train on: there is a season
MONTHS = GapWindow(1, 1, (MONTHLY, FILLED), True, None, "climatology")


def filler_of(data: GriddedData, *, window: GapWindow = MONTHS, name: str = "perceiver") -> Filler:
    """With random weights everywhere, so that nothing is 0 by its initial value."""
    torch.manual_seed(0)
    tiny = ["model.hidden_size=16", "model.depth=1", "model.num_heads=2"]
    model = build_from_config(compose(["task=reconstruct", f"model={name}", *tiny]), window.layout(data)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Filler(model, data, Normalisation.fit(data, lead_steps=(1,)), window, 0)


@pytest.mark.parametrize("step_hours, start", ((24, "2001-01-01 12:00"), (6, "2001-01-01 03:00")))
def test_what_is_observed_stays_whenever_frames_are(tmp_path, step_hours, start):
    """Also in a cell that is seen for the first time when training is over."""
    import xarray as xr

    path = write_sea(tmp_path / "sea.nc", days=380, step_hours=step_hours, start=start, dark=[3, 4])
    with xr.open_dataset(path, decode_times=False) as file:
        file = file.load()
    file["sst"][-1, 0, 0] = 17.0
    file.to_netcdf(path)
    filler = filler_of(GriddedData(str(path), split=SPLIT, annual_harmonics=1, diurnal_harmonics=1))
    filler.data.series.times[::7] += 3600  # some an hour late
    fill_gaps(filler, tmp_path / "filled.nc")
    known = filler.data.read(np.arange(filler.data.times.size))[:, 0].numpy()
    with xr.open_dataset(tmp_path / "filled.nc", decode_times=False) as file:
        found = file["sst"].values
        assert np.array_equal(file["time"].values, filler.data.times)
    observed = np.isfinite(known)
    np.testing.assert_allclose(found[observed], known[observed], rtol=1e-6)
    assert observed[-1, 0, 0] and not observed[:-1, 0, 0].any()
    assert np.isfinite(found[3:5][:, observed[0]]).all() and np.isnan(found[:-1, 0, 0]).all()
    window = filler.one.batch(np.array([2]), np.array([0])).inputs["daily"]
    seen = window.presence[0]
    frames = filler.one.frames[2][filler.one.frames[2] >= 0]
    read = filler.data.read(frames)[seen[: frames.size]]  # the model is given what is observed at its own time
    torch.testing.assert_close(window.physical()[0][seen], read, rtol=0, atol=1e-5)


def test_a_missing_day_does_not_end_an_event(tmp_path):
    import xarray as xr

    event = LeaveOutBlocks(str(write_sea(tmp_path / "sea.nc", days=8, skipped=[4])), block=2, frames=3, repeats=1)
    window = GapWindow(None, 7, (FILLED,), True, None, "climatology")
    filler = filler_of(event, window=window)
    assert not fill_gaps(filler, tmp_path / "filled.nc")
    with xr.open_dataset(tmp_path / "filled.nc") as file:
        assert file["sst"].shape[0] == 7 and np.isfinite(file["sst"].values[:, 1:]).all()
    for wanted, said in ((dict(frames=9), "9 frames"), (dict(months=2, targets=(MONTHLY,)), "2 months")):
        with pytest.raises(ValueError, match=f"^the model reads {said} in a row at .* there are none .*: 7"):
            replace(window, **wanted).positions(event, None)


def test_today_alone_is_filled_in_steps_of_the_run(tmp_path):
    """Six-hourly data; one frame of another file, and two with one left out between them."""
    import xarray as xr

    sea = GriddedData(str(write_sea(tmp_path / "sea.nc", step_hours=6)), split=SPLIT)
    filler = filler_of(sea, window=replace(MONTHS, reference="available_mean"))
    known = sea.read([301, 303])[:, 0].numpy()
    with xr.open_dataset(tmp_path / "sea.nc", decode_times=False) as file:
        file["sst"][301, 4:] = np.nan
        for name, chosen in (("one", [301]), ("two", [301, 303])):
            file.isel(time=chosen).to_netcdf(tmp_path / f"{name}.nc")
    _ = sea.summary
    for name, segments in (("one", [0]), ("two", [0, 1])):
        given = sea.with_files(str(tmp_path / f"{name}.nc"))
        assert given.step == sea.step == 21_600 and given.segments.tolist() == segments
        assert "summary" not in vars(given) and not given.splits and sea.splits["test"].size
        assert not fill_gaps(replace(filler, data=given, overcast={}), tmp_path / f"filled_{name}.nc")
        with xr.open_dataset(tmp_path / f"filled_{name}.nc") as file:
            found = file["sst"].values
            assert file["sst_monthly"].shape[0] == 1 and np.isfinite(found[:, 1:]).all()
        np.testing.assert_allclose(found[0, :4], known[0, :4], rtol=1e-6)
    np.testing.assert_allclose(found[1], known[1], rtol=1e-6)


@pytest.mark.parametrize(
    "changes, said",
    (
        (dict(units="K"), "a has sst in the units 'K', the model in ''; convert its values, or correct"),
        (dict(calendar="standard"), "a counts its times in the calendar proleptic_gregorian, the model in noleap"),
        (dict(frames=slice(0, 40, 7)), "a has frames at least 604800 seconds apart, the model reads steps of 86400"),
        (dict(rows=slice(3)), "a lies on a grid of 3 x 10 cells, the model knows 7 x 10 at other places"),
    ),
)
def test_what_differs_in_other_files_is_named(tmp_path, changes, said):
    import xarray as xr

    sea = GriddedData(str(write_sea(tmp_path / "sea.nc", days=60)), split=SPLIT)
    with xr.open_dataset(tmp_path / "sea.nc", decode_times=False) as file:
        file = file.isel(time=changes.get("frames", slice(None)), latitude=changes.get("rows", slice(None)))
        file["sst"].attrs["units"] = changes.get("units", "")
        file["time"].attrs["calendar"] = changes.get("calendar", "noleap")
        file.to_netcdf(tmp_path / "a.nc")
    with pytest.raises(ValueError, match=said.replace("a ", r"a\.nc ", 1)):
        check_alike(sea.with_files(str(tmp_path / "a.nc")), sea)
    check_alike(sea.with_files(str(tmp_path / "sea.nc")), sea)


@pytest.mark.parametrize("ending", ("nc", "zarr"))
def test_a_curvilinear_grid_is_filled_and_read_again(tmp_path, ending):
    import xarray as xr

    with xr.open_dataset(write_sea(tmp_path / "sea.nc", days=60, dark=[7]), decode_times=False) as file:
        file = file.rename(latitude="eta", longitude="xi").load()
    y, x = np.meshgrid(file["eta"].values, file["xi"].values, indexing="ij")
    bent = {"lat": (("eta", "xi"), y + 0.1 * x), "lon": (("eta", "xi"), x - 0.2 * y)}
    file.drop_vars(["eta", "xi"]).assign_coords(bent).to_netcdf(tmp_path / "bent.nc")
    sea = GriddedData(str(tmp_path / "bent.nc"), split=SPLIT)
    fill_gaps(filler_of(sea), tmp_path / f"filled.{ending}")
    given = sea.with_files(str(tmp_path / f"filled.{ending}"))
    assert given.grid == sea.grid and np.array_equal(given.times, sea.times)
    found, known = given.read(range(60)), sea.read(range(60))
    torch.testing.assert_close(found[known.isfinite()], known[known.isfinite()], rtol=1e-6, atol=0)
    assert found[7, 0, 1:].isfinite().all() and found[:, 0, 0, :2].isnan().all()
