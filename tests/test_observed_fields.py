"""data=observations: a user's fields and observation files, from files to batches."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.analysis_normalisation import AnalysisNormalisation
from data.datasets.assimilation import AssimilationDataset
from data.datasets.observed_fields import ObservedFields
from data.healpix import HEALPixGrid, convert
from data.layout import Layout
from data.observations import check
from tests.example_data import dataset
from tests.observation_files import Sites, write_dart, write_metars

DATA_DIR = os.environ.get("DATA_DIR", "")
HOUR = 3600
WINDOW = (-3 * HOUR, 3 * HOUR)
START = int(np.datetime64("2001-01-01", "s").astype(np.int64))
FRAMES = 40
STOP = START + (6 * FRAMES - 3) * HOUR
SPLIT = {"train": 0.5, "validation": 0.25, "test": 0.25}
GLOBE = {"latitude": np.arange(-75.0, 76, 30), "longitude": np.arange(0.0, 360, 30)}
REGION = {"latitude": np.arange(60.0, 29, -5), "longitude": np.arange(-30.0, 31, 5)}


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRASPHERE_CACHE", str(tmp_path / "cache"))


def written(
    folder: Path, *, names=("t2m",), sites: Sites | None = None, frames: int = FRAMES, **axes
) -> dict[str, str]:
    """A file of fields and one of METARs: the two settings that a user gives."""
    fields = dataset(frames=frames, names=names, **(axes or GLOBE))
    fields["height"] = (
        ("lat", "lon"),
        100.0 * np.arange(fields.sizes["lat"] * fields.sizes["lon"]).reshape(-1, fields.sizes["lon"]),
    )
    fields.to_netcdf(folder / "fields.nc")
    metars = write_metars(folder / "metars.csv", sites or Sites.random(START, STOP))
    return {"fields": str(folder / "fields.nc"), "observations": str(metars)}


def opened(settings: dict[str, str], **options) -> ObservedFields:
    return ObservedFields(**{"split": SPLIT, **settings, **options})


def windows(data: ObservedFields, split: str = "train", frames: int = 2) -> AssimilationDataset:
    return AssimilationDataset(
        data, split, AnalysisNormalisation.fit(data, window=WINDOW), frames=frames, window=WINDOW
    )


# Fields


def test_global_fields_are_regridded_to_healpix_and_regional_ones_stay(tmp_path):
    settings = written(tmp_path)
    data = opened(settings)
    assert data.grid == HEALPixGrid(1, "padxy") and data.variables[0].name == "t2m" and data.step == 6 * HOUR
    data = opened(settings, level=2)
    assert data.grid == HEALPixGrid(2, "padxy")
    values = data.read([3, 1])
    assert values.shape == (2, 1, 192) and values.isfinite().all()
    latitude = data.grid.coordinates[:, 0]
    cold, warm = (values[0, 0, mask].mean() for mask in (latitude.abs() > 60, latitude.abs() < 20))
    assert warm - cold > 3  # the fields are warmest at the equator
    assert opened(settings, grid="latlon").read([0]).shape == (1, 1, 6, 12)
    (tmp_path / "region").mkdir()
    settings = written(tmp_path / "region", **REGION)
    assert opened(settings).grid.shape == (7, 13)
    cells = opened(settings, grid="healpix")
    values = cells.read([0])[0, 0]
    assert cells.grid.level == 3 and 0 < values.isfinite().double().mean() < 0.1
    inside = cells.grid.coordinates[values.isfinite()]
    assert inside[:, 0].min() > 25 and inside[:, 0].max() < 65


@pytest.mark.parametrize("cache", ["ram", "memmap"])
def test_kept_fields_are_those_that_are_read(tmp_path, cache):
    settings = written(tmp_path)
    expected = opened(settings, level=1).read([5, 0, 7])
    data = pickle.loads(pickle.dumps(opened(settings, level=1, cache=cache)))
    assert torch.equal(data.read([5, 0, 7]), expected) and torch.equal(data.read([5, 0, 7]), expected)


@pytest.mark.parametrize("order", ["nest", "ring"])
def test_fields_on_healpix_cells(tmp_path, order):
    import xarray as xr

    level, settings = 2, written(tmp_path)
    values = np.random.default_rng(0).normal(size=(FRAMES, 192)).astype(np.float32)
    hours = ("time", np.arange(FRAMES) * 6, {"units": "hours since 2001-01-01"})
    attributes = {"units": "K"}
    store = xr.Dataset(
        {"t2m": (("time", "pixel"), values, attributes), "lsm": (("pixel",), values[0])}, {"time": hours}
    )
    store.to_netcdf(tmp_path / "cells.nc")
    settings["fields"] = str(tmp_path / "cells.nc")
    data = opened(settings, order=order)
    assert data.grid == HEALPixGrid(level, "padxy") and data.variables[0].units == "K"
    moved = convert(torch.arange(192), level, source="padxy", target=order)
    torch.testing.assert_close(data.read([4])[0, 0], torch.from_numpy(values[4])[moved], atol=1e-5, rtol=0)
    data = opened(settings, order=order, variables=["t2m", "lsm"], level=1)
    assert data.static.shape == (1, 48) and [item.name for item in data.static_variables] == ["lsm"]
    torch.testing.assert_close(data.read([4]).mean(), torch.tensor(values[4].mean()), atol=1e-5, rtol=0)
    for options, sentence in (
        ({"grid": "latlon"}, r"lies on HEALPix; leave out data\.grid=latlon"),
        ({"levels": [500]}, r"data\.levels=\[500\.0\] has no meaning"),
        ({"variables": ["wind"]}, r"lacks 1 of 1 variables on 192 pixels: wind; it holds t2m"),
        ({"order": "spiral"}, r"data\.order=spiral is unknown; allowed: "),
        ({"variables": ["lsm"]}, r"none of data\.variables=\['lsm'\] .* has a time dimension"),
    ):
        with pytest.raises(ValueError, match=sentence):
            opened(settings, **options)


def test_static_fields_are_inputs_and_the_place_where_there_are_none(tmp_path):
    settings = written(tmp_path)
    data = opened(settings, grid="latlon", variables=["t2m", "height"])
    assert [item.name for item in data.static_variables] == ["height"] and data.static[0, 0, 1] == 100
    data = opened(settings, grid="latlon")
    torch.testing.assert_close(data.static.square().sum(dim=0), torch.ones(6, 12))
    north = data.grid.latitude.argmax()
    assert data.static.shape == (3, 6, 12) and data.static[2, north].min() > 0.95
    torch.testing.assert_close(data.static_statistics.mean, data.static.mean(dim=(1, 2)))


def test_calendars_of_models_are_refused(tmp_path):
    settings = written(tmp_path)
    fields = dataset(frames=FRAMES, **GLOBE)
    fields.time.attrs["calendar"] = "noleap"
    fields.to_netcdf(tmp_path / "model.nc")
    with pytest.raises(ValueError, match=r"model\.nc counts time in the noleap calendar, and observations have dates"):
        opened(settings | {"fields": str(tmp_path / "model.nc")})


# Observations


def test_observations_of_several_formats_come_to_their_frames(tmp_path):
    metars, reports = Sites.random(START, STOP, seed=1), Sites.random(START, STOP, seed=2)
    settings = written(tmp_path, sites=metars)
    both = [settings["observations"], str(write_dart(tmp_path / "obs_seq.out", reports))]
    data = opened(settings | {"observations": both})
    rows = data.observations([9, 4, 4], WINDOW)
    assert data.files.channels == ("ACARS_TEMPERATURE", "temperature") and data.num_platforms == 2
    for position, frame in enumerate((9, 4, 4)):
        mine = rows.select(rows["frame"] == position)
        expected = []
        for sites, kept in ((metars, metars.rejected < 2), (reports, ~reports.rejected)):
            elapsed = sites.time - data.times[frame]
            expected.append(sites.value[kept & (elapsed > WINDOW[0]) & (elapsed <= WINDOW[1])])
        np.testing.assert_allclose(np.sort(mine["value"]), np.sort(np.concatenate(expected)), atol=1e-3)
    assert data.quality_report.dropped["rejected by source"] > 0
    assert len(opened(settings | {"observations": both}, keep_rejected=True).observations(range(FRAMES), WINDOW)) == 600
    scores = data.channels.normalised(data.observations(data.training_period, WINDOW))["value"]
    assert abs(scores.mean()) < 0.05 and scores.std() == pytest.approx(1, abs=0.05)


def test_quality_control_is_reported_rule_by_rule(tmp_path):
    sites = Sites.random(START, STOP)
    sites.value[:20] = 400.0
    settings = written(tmp_path, sites=sites, **REGION)
    inside = (sites.latitude > 27.5) & (sites.latitude < 62.5) & (np.abs(sites.longitude) < 32.5)
    for grid in ("latlon", "healpix"):
        data = opened(settings, grid=grid)
        text = data.describe()
        report = {line[:22].strip(): line.split() for line in text.splitlines() if "%" in line and "cells" not in line}
        assert int(report["valid range"][-2]) == -20 and "metar_csv" in text and "channel       temperature" in text
        dropped = -int(report["outside the fields"][-2])
        assert abs(dropped - (~inside)[20:].sum()) <= (0 if grid == "latlon" else 12)
        assert int(report["kept"][-2]) == 280 - dropped
    with pytest.raises(ValueError, match=r"drops all \d+ observations of the training period \(valid range \d+"):
        opened(settings, valid_ranges={"temperature": [0, 1]}).channels  # noqa: B018


@pytest.mark.parametrize("turn", [0.0, 360.0])
def test_either_convention_of_longitudes_means_the_same_place(tmp_path, turn):
    axes = {"latitude": REGION["latitude"], "longitude": REGION["longitude"] + turn}
    sites = Sites.random(START, STOP, rows=2000)
    settings = written(tmp_path, sites=sites, **axes)
    turned = str(write_metars(tmp_path / "turned.csv", replace(sites, longitude=sites.longitude % 360)))
    expected = opened(settings).observations(range(FRAMES), WINDOW)
    found = opened(settings | {"observations": turned}).observations(range(FRAMES), WINDOW)
    assert 60 < len(expected) == len(found)
    np.testing.assert_array_equal(found["value"], expected["value"])
    inside = (sites.latitude > 27.5) & (sites.latitude < 62.5) & (np.abs(sites.longitude) < 32.5)
    frame = np.round((sites.time - START) / (6 * HOUR))
    assert len(found) == (inside & (frame < FRAMES)).sum()
    for data in (opened(settings), opened(settings, grid="healpix")):
        table = windows(data)[0].observations
        check(table, data.observation_layout(frames=2, num_features=62), grid=data.grid)


def test_a_window_without_observations(tmp_path):
    data = opened(written(tmp_path, sites=Sites.random(START, START + 60 * HOUR)), level=1)
    assert len(data.observations([30, 31], WINDOW)) == 0
    batch = windows(data, "test")[0]
    assert len(batch.observations) == 0 and batch.targets["analysis"].values.isfinite().all()
    both = windows(data).__getitems__([0, 15])
    assert set(both.observations.batch.tolist()) == {0}


def test_the_layout_names_ids_and_other_names_are_another_layout(tmp_path):
    settings = written(tmp_path)
    layout = opened(settings, level=1).layout(frames=2)
    described = layout.observations
    assert described.channels == ("temperature",) and described.platforms == ("metar",) and described.num_types == 1
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    other = settings | {"observations": str(write_dart(tmp_path / "obs_seq.out", Sites.random(START, STOP)))}
    assert opened(other, level=1).layout(frames=2).observations != described


# What a user mistypes


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"fields": "/nowhere.nc"}, r"data\.fields=/nowhere\.nc does not exist"),
        ({"observations": "/nowhere.csv"}, r"data\.observations=/nowhere\.csv does not exist"),
        ({"observations": "/nowhere/*.csv"}, r"no file matches data\.observations=/nowhere/\*\.csv"),
        ({"format": "excel"}, r"data\.format=excel is unknown; allowed: bufr, dart_text, madis"),
        ({"variables": ["t3m"]}, r"no variable 't3m' in .*; it holds t2m, height; did you mean t2m\?"),
        ({"grid": "cubed"}, r"data\.grid=cubed is unknown; allowed: healpix, latlon"),
        ({"grid": "latlon", "level": 3}, r"data\.level=3 is of HEALPix, .* type data\.grid=healpix"),
        ({"cache": "disk"}, r"data\.cache=disk is unknown; allowed: none, ram, memmap"),
        ({"num_workers": -1}, r"data\.num_workers=-1 is negative"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_in_one_sentence(tmp_path, options, sentence):
    with pytest.raises((ValueError, OSError), match=sentence) as refusal:
        opened(written(tmp_path) | options)
    assert "\n" not in str(refusal.value)


def test_observations_of_other_dates_are_refused_with_both_ranges(tmp_path):
    later = Sites.random(STOP + 100 * HOUR, STOP + 200 * HOUR)
    with pytest.raises(
        ValueError,
        match=r"no observation lies within .* \(40 frames, 2001-01-01 00:00 to 2001-01-10 18:00; 300 observations from "
        r"2001-01-15 .* to 2001-01-1",
    ):
        opened(written(tmp_path, sites=later))
    with pytest.raises(
        ValueError, match=r"no observation lies in the training period, data\.split\.train=0\.5 \(300 obs"
    ):
        opened(written(tmp_path, sites=Sites.random(STOP - 40 * HOUR, STOP)))
    nothing = Sites(*(np.empty(0) for _ in range(5)))
    with pytest.raises(ValueError, match=r"metars\.csv holds no observation"):
        opened(written(tmp_path, sites=nothing))


# Real data: pressure at sea level of 2001-2010, station and aircraft reports of one hour of August 2005


@pytest.mark.real_data
@pytest.mark.skipif(not DATA_DIR, reason="DATA_DIR is not set")
def test_reports_of_an_hour_meet_the_fields_of_their_day():
    names = ("ncep_slp_natl_2001_2010.nc", "2005082600_metar.nc.gz", "2005082600_acars.nc.gz")
    fields, *reports = (Path(DATA_DIR) / name for name in names)
    for path in (fields, *reports):
        if not path.is_file():
            pytest.skip(f"{path.name} is not in DATA_DIR")
    data = ObservedFields(
        str(fields),
        list(map(str, reports)),
        split={"train": ["2005-08", "2005-09"], "validation": "2006-08", "test": "2007-08"},
    )
    day = int(np.flatnonzero(data.times == np.datetime64("2005-08-26", "s").astype(np.int64))[0])
    rows = data.observations([day - 1, day], WINDOW)
    assert set(rows["frame"]) == {1} and data.files.platforms == ("aircraft", "metar")
    names = np.asarray(data.files.channels)
    altimeter = rows.select(names[rows["channel"]] == "altimeter")
    assert len(altimeter) > 100 and data.quality_report.dropped["outside the fields"] > 20_000
    # Stations report in hPa what the fields give in Pa; both reduced to the sea, they agree within a few hPa.
    places = torch.from_numpy(np.stack([altimeter["latitude"], altimeter["longitude"]], axis=-1))
    there = data.read([day])[0, 0].flatten()[data.grid.cell_of(places)].numpy() / 100
    near = altimeter["height"] < 300
    assert abs(np.median((altimeter["value"] - there)[near])) < 2 and np.std((altimeter["value"] - there)[near]) < 4
