"""data=ufs_era5: its layout without files, and the whole road on a miniature of them."""

import pickle

import numpy as np
import pytest
import torch

from data.datasets.assimilation_data import statistics_of
from data.datasets.ufs_era5 import UfsEra5, era5_variables, store_name
from data.datasets.ufs_miniature import smooth_truth, truth_from_fields, write_miniature
from data.healpix import HEALPixGrid
from data.layout import Layout
from data.observations import check
from models.composition import compose

HOUR = 3600
WINDOW = (-3 * HOUR, 3 * HOUR)
VARIABLES = ("T850", "Z500", "U250", "tas", "sst")
SPLIT = {
    "train": ["2021-12-01", "2021-12-05"],
    "validation": ["2021-12-06", "2021-12-06"],
    "test": ["2021-12-07", "2021-12-08"],
}


def chosen(names=VARIABLES):
    return [variable for variable in era5_variables() if store_name(variable) in names]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """Eight days of five variables on 48 cells, one frame missing."""
    return write_miniature(
        tmp_path_factory.mktemp("miniature"),
        level=1,
        frames=32,
        missing_frames=(10,),
        variables=chosen(),
        footprints=12,
    )


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRASPHERE_CACHE", str(tmp_path / "cache"))


def opened(miniature, **options) -> UfsEra5:
    options = {"level": 1, "variables": VARIABLES, "split": SPLIT, **options}
    return UfsEra5(str(miniature.observations), str(miniature.fields), **options)


def seconds(text: str) -> int:
    return int(np.datetime64(text, "s").astype(np.int64))


# Without files


def test_the_production_layout_needs_no_file():
    data = UfsEra5(split=SPLIT)
    layout = data.layout()
    names = [store_name(variable) for variable in layout.targets["analysis"].variables]
    assert len(names) == 74 and names[:2] == ["U1000", "U925"] and names[12:14] == ["U50", "V1000"]
    assert names[26] == "T1000" and names[39] == "Z1000" and names[52] == "Q1000"
    assert names[65:] == ["tcwv", "tas", "uas", "vas", "100u", "100v", "pres_msl", "sst", "sic"]
    assert layout.targets["analysis"].lead_times == tuple(range(-42 * HOUR, 1, 6 * HOUR))
    assert layout.targets["analysis"].grid == layout.inputs["static"].grid == HEALPixGrid(6, "padxy")
    assert layout.inputs["static"].channels == 2 and layout.inputs["static"].frames == 1
    observed = layout.observations
    assert (observed.num_channels, observed.num_platforms, observed.num_types) == (1024, 1024, 1024)
    assert (observed.num_features, observed.frames, observed.step) == (50, 8, 6 * HOUR)
    assert Layout.from_dict(layout.to_dict()) == layout


def test_the_configuration_builds_it_and_reading_says_what_to_type():
    from hydra.utils import instantiate

    data = instantiate(compose(["data=ufs_era5"]).data, _convert_="all")
    assert data.layout().targets["analysis"].grid.num_points == 49_152
    with pytest.raises(
        ValueError, match=r"data\.fields is not given and the data are to be read; type data\.fields=<path>"
    ):
        data.times  # noqa: B018
    with pytest.raises(ValueError, match=r"type data\.observations=<path>"):
        data.channels  # noqa: B018
    with pytest.raises(ValueError, match=r"data.order=diagonal is unknown; allowed: nest, ring, padxy"):
        UfsEra5(split=SPLIT, order="diagonal")
    with pytest.raises(ValueError, match=r"data.variables names T851; allowed: U1000, .*, sic"):
        UfsEra5(split=SPLIT, variables=["T851"])


def test_the_overrides_of_a_miniature_open_it(miniature):
    from hydra.utils import instantiate

    data = instantiate(compose(["data=ufs_era5", *miniature.overrides]).data, _convert_="all")
    assert data.times.size == 31
    assert {store_name(item) for item in data.variables} == set(VARIABLES)
    assert data.windows("train", frames=4).shape[1] == 4 and data.windows("test", frames=4).size


# Fields


@pytest.mark.parametrize("order", ["nest", "ring", "padxy"])
def test_fields_come_in_padxy_order_whatever_the_store_has(tmp_path, order):
    small = write_miniature(tmp_path, level=1, frames=6, variables=chosen(), order=order, stations=2, footprints=2)
    data = opened(small, order=order)
    latitude, longitude = data.grid.coordinates.double().numpy().T
    values = data.read([4, 1]).numpy()
    assert values.shape == (2, 5, 48) and values.dtype == np.float32
    for channel, variable in enumerate(data.variables):
        for frame, index in enumerate((4, 1)):
            truth = smooth_truth(variable, data.times[index], latitude, longitude)
            present = np.isfinite(values[frame, channel])
            np.testing.assert_allclose(values[frame, channel][present], truth[present], rtol=1e-5, atol=1e-4)
            # The sea surface ends where land begins.
            land = data.static[1].numpy() > 0.5
            assert np.array_equal(present, ~land if variable.name == "sst" else np.ones(48, bool))
    assert data.static.shape == (2, 48) and 0 < data.static[1].mean() < 1


def test_the_sea_is_filled_over_land_where_wanted(miniature):
    missing, filled = (opened(miniature, over_land=choice) for choice in ("missing", "filled"))
    with_gaps, whole = missing.read([3, 5]), filled.read([3, 5])
    gaps = with_gaps.isnan()
    assert gaps[:, 4].any() and not gaps[:, :4].any() and whole.isfinite().all()
    assert torch.equal(whole[~gaps], with_gaps[~gaps]) and (whole[gaps] == 290).all()
    assert [item.variables[4].domain for item in (missing, filled)] == ["sea", "all"]
    assert filled.statistics.mean[4] != missing.statistics.mean[4]
    with pytest.raises(ValueError, match=r"data.over_land=zero is unknown; allowed: missing, filled"):
        opened(miniature, over_land="zero")


def test_times_splits_and_windows(miniature):
    data = opened(miniature)
    assert data.times[0] == seconds("2021-12-01") and data.times.size == 31
    np.testing.assert_array_equal(data.segments, np.repeat([0, 1], [10, 21]))
    windows = data.windows("train", frames=8)
    # Frames 0..18 are for training, and the gap lies before frame 10.
    np.testing.assert_array_equal(windows[:, -1], [7, 8, 9, 17, 18])
    assert (np.diff(windows, axis=1) == 1).all()
    np.testing.assert_array_equal(data.windows("validation", frames=2, frame_steps=2)[:, 0], [19, 20])
    with pytest.raises(ValueError, match=r"the validation split .* holds no window of 8 frames"):
        data.windows("validation", frames=8)
    daily = opened(miniature, step_hours=24)
    assert daily.times.size == 8 and daily.step == 24 * HOUR and not (daily.times % 86_400).any()


def test_statistics_are_computed_once_or_read(miniature, tmp_path, monkeypatch):
    data = opened(miniature)
    values = data.read(data.training_period).double().numpy()
    mean, scale = np.nanmean(values, axis=(0, 2)), np.nanstd(values, axis=(0, 2))
    np.testing.assert_allclose(data.statistics.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(data.statistics.scale, scale, rtol=1e-4)
    monkeypatch.setattr("data.datasets.ufs_era5.statistics_of", None)  # a second run reads what the first computed
    again = opened(miniature).statistics
    assert torch.equal(again.mean, data.statistics.mean) and torch.equal(again.scale, data.statistics.scale)
    assert data.static_statistics.mean.tolist() == pytest.approx([232.56, 0.3410])
    path = tmp_path / "stats.csv"
    path.write_text("variable,level,mean,std\nT,850,280,10\nZ,500,50000,3000\nU,250,5,9\ntas,-1,285,12\nsst,,290,7\n")
    given = opened(miniature, statistics=str(path)).statistics
    by_name = dict(zip((store_name(item) for item in data.variables), given.scale.tolist(), strict=True))
    assert by_name == {"T850": 10, "Z500": 3000, "U250": 9, "tas": 12, "sst": 7}
    path.write_text("name,mean,std\nT850,280,10\n")
    with pytest.raises(ValueError, match=r"has no statistics of Z500, U250, tas, sst \(4 variables\)"):
        opened(miniature, statistics=str(path)).statistics  # noqa: B018
    path.write_text("name,mean\nT850,280\n")
    with pytest.raises(ValueError, match="it needs name, mean and std"):
        opened(miniature, statistics=str(path)).statistics  # noqa: B018
    with pytest.raises(OSError, match=r"cannot read data.statistics=.*none\.csv"):
        opened(miniature, statistics=str(tmp_path / "none.csv")).statistics  # noqa: B018


def test_statistics_leave_missing_cells_out():
    class Fields:
        variables, grid = chosen(["tas", "sst"]), HEALPixGrid(0)

        def read(self, indices):
            values = torch.stack([torch.full((2, 12), 1e5 + index) for index in indices])
            values[:, 1, :6] = torch.nan
            return values

    found = statistics_of(Fields(), np.arange(40))
    np.testing.assert_allclose(found.mean, [100_019.5] * 2)
    np.testing.assert_allclose(found.scale, [np.arange(40).std()] * 2, rtol=1e-6)


def test_a_miniature_of_a_series_on_the_sphere(tmp_path):
    from example_data import write

    from data.datasets.gridded import GriddedData

    latitude, longitude = np.linspace(-80, 80, 9), np.arange(0, 360, 30.0)
    source = write(tmp_path / "sphere.nc", frames=60, latitude=latitude, longitude=longitude)
    series = GriddedData(str(source), split={"train": 0.6, "validation": 0.2, "test": 0.2})
    truth = truth_from_fields(series)
    tas, aloft = chosen(["tas", "T850"])[::-1]
    assert (tas.name, aloft.level) == ("tas", 850)
    frame, row, column = 7, 2, 11
    value = series.read([frame])[0, 0, row, column].item()
    at = (series.times[[frame]], latitude[[row]], longitude[[column]] - 360)
    assert truth(tas, *at) == pytest.approx(value)
    # Across Greenwich and between frames: the mean of the corners.
    corners = series.read([frame, frame + 1])[:, 0, row][:, [-1, 0]].mean().item()
    assert truth(tas, at[0] + 3 * HOUR, at[1], np.array([345.0])) == pytest.approx(corners, rel=1e-6)
    small = write_miniature(
        tmp_path / "m", start="2001-01-03", frames=16, variables=[tas, aloft], truth=truth, stations=4, footprints=4
    )
    split = {"train": ["2001-01-03", "2001-01-04"], "validation": "2001-01-05", "test": "2001-01-06"}
    data = opened(small, variables=["tas", "T850"], split=split)
    assert data.read([0, 15]).std() > 1 and len(data.observations([3], WINDOW)) > 50
    with pytest.raises(ValueError, match="the fields cover 2001-01-01"):
        write_miniature(tmp_path / "late", start="2002-01-01", frames=4, variables=[tas], truth=truth)


# Observations


@pytest.mark.parametrize("by", ["time", "bin"])
def test_observations_of_frames_are_those_of_their_windows(miniature, by):
    from data.quality_control import QualityControl
    from data.sources.observations import ufs_parquet

    data = opened(miniature, window_by=by)
    indices = [12, 3, 13]
    found = data.observations(indices, WINDOW)
    whole, report = QualityControl(data.channels)(ufs_parquet.read(miniature.observations))
    assert report.dropped["finite value"] > 0 and report.dropped["height"] > 0
    assert np.array_equal(found["frame"], np.sort(found["frame"]))
    for position, index in enumerate(indices):
        mine = found.select(found["frame"] == position)
        t = whole[by] - data.times[index]
        expected = whole.select((t > WINDOW[0]) & (t <= WINDOW[1]))
        assert len(mine) == len(expected) > 500 and (np.diff(mine[by]) >= 0).all()
        np.testing.assert_array_equal(np.sort(mine["value"]), np.sort(expected["value"]))
    assert data.quality_report.kept == len(found) < data.quality_report.rows
    if by == "bin":
        assert found["time"].max() > data.times[13] + 3 * HOUR  # the last bin reaches half a bin further


def test_conventional_rows_without_height_are_dropped(miniature, monkeypatch):
    data, read = opened(miniature), UfsEra5._raw
    every = data.observations([5], WINDOW)
    conventional = data.channels.conventional[every["channel"]]
    assert 0 < conventional.sum() < len(every)

    def without_heights(*arguments):
        rows = read(*arguments)
        return rows.with_columns(height=np.full(len(rows), np.nan))

    monkeypatch.setattr(UfsEra5, "_raw", without_heights)
    assert len(data.observations([5], WINDOW)) == (~conventional).sum()


def test_observations_see_the_truth(miniature):
    data = opened(miniature)
    rows = data.observations([5], WINDOW)
    temperature = rows.select((rows["channel"] == data.channels.index("t")) & (rows["pressure"] == 850))
    truth = smooth_truth(chosen(["T850"])[0], temperature["time"], temperature["latitude"], temperature["longitude"])
    departure = temperature["value"] - truth
    assert len(temperature) > 20 and abs(departure.mean()) < 0.5 and 0.5 < departure.std() < 1.1
    radiance = rows.select(rows["channel"] == data.channels.index("atms_22"))
    assert np.isfinite(radiance["satellite_zenith"]).all() and np.isnan(radiance["height"]).all()
    assert np.abs(radiance["latitude"]).max() > 60 and set(radiance["platform"]) == {26}


def test_z_scores_of_a_window_reach_the_model(miniature):
    data = pickle.loads(pickle.dumps(opened(miniature)))
    windows = data.windows("train", frames=4)[[0, -1]]
    rows = data.channels.normalised(data.observations(windows.flatten(), WINDOW))
    observations = rows.to_observations(torch.from_numpy(data.times[windows]))
    assert abs(observations.value.mean()) < 0.1 and 0.8 < observations.value.std() < 1.2
    assert observations.frame.max() == 3 and observations.batch.max() == 1
    offset = observations.time_offset
    assert offset.min() > WINDOW[0] and offset.max() <= WINDOW[1]
    check(observations, data.observation_layout(frames=4), grid=data.grid)
    pickle.dumps(data)  # also after files were opened


def test_channel_statistics_are_fitted_where_the_archive_has_none(tmp_path):
    bare = write_miniature(tmp_path, frames=32, variables=chosen(["tas"]), footprints=6, stations=6, statistics=False)
    data = opened(bare, variables=["tas"])
    assert np.isnan(data._channel_table.mean).all()
    scores = data.channels.normalised(data.observations(data.training_period, WINDOW))["value"]
    assert len(scores) > 1000 and abs(scores.mean()) < 0.02 and scores.std() == pytest.approx(1, abs=0.05)
    # Channels that training never showed stay unknown, and their rows are dropped rather than guessed.
    assert np.isnan(data.channels.mean[data.channels.index("iasi_1")])
    again = opened(bare, variables=["tas"])
    again._raw = None  # nothing is sampled a second time
    np.testing.assert_array_equal(again.channels.mean, data.channels.mean)


def test_it_describes_itself(miniature):
    text = opened(miniature, archive_flags=True).describe()
    assert "HEALPix level 1, 48 cells" in text and "31, 2021-12-01" in text and "1 gaps" in text
    report = dict(line.rsplit("  ", 1)[0].split("  ", 1) for line in text.splitlines() if "%" in line)
    assert int(report["archive flags"].strip().rstrip("%").split()[0].replace(",", "")) < -50
    assert "atms" in text and "conv" in text


# Damaged data


def test_damaged_stores_are_refused_in_one_sentence(miniature, tmp_path):
    import shutil

    with pytest.raises(ValueError, match=r"lacks 1 of 1 variables on 48 pixels: tcwv; it holds .*T850"):
        opened(miniature, variables=["tcwv"]).read([0])
    with pytest.raises(ValueError, match="lacks 5 of 5 variables on 192 pixels"):
        opened(miniature, level=2).read([0])
    with pytest.raises(ValueError, match=r"lacks the static fields .* on 192 pixels"):
        opened(miniature, level=2).static  # noqa: B018
    with pytest.raises(FileNotFoundError, match=r"no Zarr store .*away\.zarr; check data\.fields"):
        UfsEra5("x", str(tmp_path / "away.zarr"), split=SPLIT).times  # noqa: B018
    with pytest.raises(FileNotFoundError, match=r"channel_table\.parquet"):
        UfsEra5(str(tmp_path), str(miniature.fields), split=SPLIT).channels  # noqa: B018
    with pytest.raises(ValueError, match=r"ids up to 542, and data\.num_channels=64; raise it"):
        opened(miniature, num_channels=64).channels  # noqa: B018
    with pytest.raises(ValueError, match="lacks the sensors mhs; it holds atms, conv"):
        opened(miniature, sensors=["mhs"]).observations([0], WINDOW)
    shutil.copytree(miniature.fields, tmp_path / "broken.zarr")
    for chunk in (tmp_path / "broken.zarr" / "tas").rglob("*"):
        if chunk.is_file() and chunk.name != "zarr.json":
            chunk.write_bytes(b"not a chunk")
    broken = UfsEra5("x", str(tmp_path / "broken.zarr"), level=1, variables=["tas"], split=SPLIT)
    with pytest.raises(OSError, match=r"cannot read 'tas' from .*broken\.zarr"):
        broken.read([0])
