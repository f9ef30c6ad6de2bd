"""One series with its splits, masks, caches and description; unusable data ends in one sentence."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from example_data import dataset, write
from hydra.utils import instantiate
from omegaconf import OmegaConf

from data.calendars import GREGORIAN
from data.datasets.forecast import ForecastDataset
from data.datasets.gridded import GriddedData
from data.datasets.splits import split_times
from data.normalisation import Normalisation
from data.sources.series import MONTH_SECONDS

FRACTIONS = {"train": 0.6, "validation": 0.2, "test": 0.2}


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRASPHERE_CACHE", str(tmp_path / "cache"))


def days(first: str, last: str) -> np.ndarray:
    return np.arange(first, np.datetime64(last) + 1, dtype="datetime64[D]").astype("datetime64[s]").astype(np.int64)


TIMES = days("2012-12-01", "2015-01-31")


def dates_of(indices: np.ndarray) -> set[str]:
    return {str(np.int64(TIMES[index]).astype("datetime64[s]").astype("datetime64[M]")) for index in indices}


# Splits


def test_validation_inside_training_is_withheld_but_stays_in_the_training_period():
    splits = split_times(TIMES, {"train": 2013, "validation": ["2013-11", "2013-12"], "test": "2014"}, GREGORIAN)
    assert {name: indices.size for name, indices in splits.indices.items()} == {
        "train": 304,
        "validation": 61,
        "test": 365,
    }
    assert splits.training_period.size == 365
    assert dates_of(splits.indices["validation"]) == {"2013-11", "2013-12"}
    assert not np.intersect1d(splits.indices["train"], splits.indices["validation"]).size


def test_several_ranges_and_days_are_allowed():
    ranges = [["2013-02-01", "2013-02-10"], "2013-07"]
    splits = split_times(TIMES, {"train": ["2013", "2013"], "validation": ranges, "test": "2014-03"}, GREGORIAN)
    assert splits.indices["validation"].size == 10 + 31
    assert dates_of(splits.indices["test"]) == {"2014-03"}


def test_fractions_follow_each_other_in_time():
    splits = split_times(TIMES, {"train": 0.5, "validation": 0.25, "test": 0.25}, GREGORIAN)
    joined = np.concatenate([splits.indices[name] for name in ("train", "validation", "test")])
    np.testing.assert_array_equal(joined, np.arange(TIMES.size))
    np.testing.assert_array_equal(splits.training_period, splits.indices["train"])


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"train": "2013", "test": "2014"}, "give exactly train, validation and test"),
        ({"train": "2013", "validation": "2013-12", "test": "2020"}, "the test split is empty: data.split.test=2020"),
        ({"train": "2013", "validation": "2013-12", "test": "2013-06"}, "the test split 2013-06 overlaps train"),
        ({"train": "2013", "validation": "2014", "test": "2014-06"}, "overlaps validation"),
        ({"train": "2013", "validation": "2013", "test": "2014"}, "covers all of train"),
        ({"train": 0.9, "validation": 0.2, "test": 0.2}, "must be positive with a sum of at most 1"),
        ({"train": 0.6, "validation": "2013", "test": 0.2}, "mixes fractions and dates"),
        ({"train": "2013", "validation": ["2013-12", "2013-11"], "test": "2014"}, "2013-12 is after 2013-11"),
        ({"train": "last year", "validation": "2013-12", "test": "2014"}, "cannot read the date 'last year'"),
        ({"train": [["2013"]], "validation": "2013-12", "test": "2014"}, r"a pair \[first, last\]"),
    ],
)
def test_impossible_splits_are_refused(split, message):
    with pytest.raises(ValueError, match=message):
        split_times(TIMES, split, GREGORIAN)


# Data


@pytest.mark.parametrize("cache", ["none", "ram", "memmap"])
def test_every_cache_reads_the_same_values(tmp_path, cache):
    path = write(tmp_path / "a.nc", names=("t2m", "z"), keep=[*range(20), *range(25, 60)])
    plain = GriddedData(str(path), split=FRACTIONS)
    data = pickle.loads(pickle.dumps(GriddedData(str(path), split=FRACTIONS, cache=cache)))
    for indices in (np.arange(55), [54, 3, 3, 20]):
        values = data.read(indices)
        assert values.dtype == torch.float32 and values.shape == (len(indices), 2, 3, 4)
        torch.testing.assert_close(values, plain.read(indices), rtol=0, atol=0)


def test_a_changed_file_is_decoded_again(tmp_path):
    path = tmp_path / "a.nc"
    write(path)
    before = GriddedData(str(path), split=FRACTIONS, cache="memmap").read([0])
    dataset().map(lambda values: values + 1, keep_attrs=True).to_netcdf(path)
    after = GriddedData(str(path), split=FRACTIONS, cache="memmap").read([0])
    torch.testing.assert_close(after, before + 1, rtol=0, atol=1e-4)


def test_cells_never_observed_in_training_lie_outside_the_domain(tmp_path):
    data = dataset(frames=50, names=("sst", "t2m"))
    data.sst[:, 0, 0] = np.nan  # land
    data.sst[:30, 0, 1] = np.nan  # ice that melts after the training period
    data.sst[7, 2, 2] = np.nan  # a cloud
    data.to_netcdf(tmp_path / "a.nc")
    gridded = GriddedData(str(tmp_path / "a.nc"), split=FRACTIONS)
    expected = torch.ones(2, 3, 4, dtype=torch.bool)
    expected[0, 0, :2] = False
    assert torch.equal(gridded.domain, expected) and gridded.gaps
    np.testing.assert_allclose(gridded.summary.missing, [1 / (10 * 50), 0])
    data["sst"][7, 2, 2] = 280.0
    data.to_netcdf(tmp_path / "b.nc")
    assert not GriddedData(str(tmp_path / "b.nc"), split=FRACTIONS).gaps


def test_the_description_says_what_was_understood(tmp_path):
    data = dataset(keep=[*range(30), *range(34, 60)])
    data.t2m[3, 1, 1] = np.nan
    data.assign(land=(("lat", "lon"), np.ones((3, 4)))).to_netcdf(tmp_path / "a.nc")
    split = {"train": ["2001-01-01", "2001-01-10"], "validation": "2001-01-10", "test": ["2001-01-11", "2001-01-15"]}
    text = GriddedData(str(tmp_path / "a.nc"), split=split, variables=["t2m", "land"]).describe()
    for line in (
        "grid       3 x 4, latitude 40 to 60, longitude 0 to 30, regional",
        "times      56, 2001-01-01 00:00 to 2001-01-15 18:00, step 6 hours, calendar proleptic_gregorian",
        "gaps       1: 2001-01-08 06:00 to 2001-01-09 12:00",
        "variable   t2m [K], ",
        "missing 0.1%",
        "static     land [no units]",
        "train      32 times, 2001-01-01 00:00 to 2001-01-09 18:00",
        "test       20 times",
        "(4 of the training period's times are withheld for validation)",
    ):
        assert line in text


def test_options_may_come_from_a_configuration(tmp_path):
    write(tmp_path / "a.nc", names=("t2m", "z"))
    config = OmegaConf.create(
        {"variables": ["z"], "region": [45, 65, 5, 25], "split": FRACTIONS, "recommended": {"size": "tiny"}}
    )
    data = GriddedData(OmegaConf.create([str(tmp_path / "a.nc")]), **config)
    assert data.variables[0].name == "z" and data.grid.shape == (2, 2) and data.recommended == {"size": "tiny"}


# What cannot be used


def damaged(tmp_path, change):
    data = dataset(frames=50, names=("t2m", "z"))
    change(data)
    data.to_netcdf(tmp_path / "a.nc")
    return GriddedData(str(tmp_path / "a.nc"), split=FRACTIONS)


def set_values(data, name, index, value):
    data[name][index] = value


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("z", slice(None), np.nan, "z is missing everywhere in the training period; leave it out of data.variables"),
        ("z", slice(0, 30), np.nan, "z is missing everywhere in the training period"),
        ("t2m", slice(None), 3.5, r"t2m is constant \(3.5\) in the training period"),
        ("t2m", slice(0, 30), 3.5, r"t2m is constant \(3.5\) in the training period"),
        ("z", (45, 1, 2), np.inf, "z holds infinite values, first at 2001-01-12 06:00; replace them by NaN"),
        ("z", (4, 1, 2), -np.inf, "z holds infinite values, first at 2001-01-02 00:00; replace them by NaN"),
    ],
)
def test_useless_variables_are_named(tmp_path, name, index, value, message):
    data = damaged(tmp_path, lambda data: set_values(data, name, index, value))
    with pytest.raises(ValueError, match=message) as error:
        _ = data.summary
    assert "\n" not in str(error.value)


def test_unknown_options_are_refused(tmp_path):
    path = str(write(tmp_path / "a.nc"))
    with pytest.raises(ValueError, match=r"data\.cache=disk is unknown; allowed: none, ram, memmap"):
        GriddedData(path, split=FRACTIONS, cache="disk")
    with pytest.raises(ValueError, match=r"data\.num_workers=-1 is negative"):
        GriddedData(path, split=FRACTIONS, num_workers=-1)


def test_an_unwritable_cache_folder_stops_before_anything_is_read(tmp_path, monkeypatch):
    path = str(write(tmp_path / "a.nc"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYDRASPHERE_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set HYDRASPHERE_CACHE to a folder that can"):
        GriddedData(path, split=FRACTIONS, cache="memmap").read([0])


# Data configurations on the real files


def configured(name):
    config = OmegaConf.load(Path(__file__).parents[1] / "conf" / "data" / f"{name}.yaml")
    file = Path(os.environ.get("DATA_DIR", "")) / config.path.removeprefix("catalogue:")
    if not file.is_file():
        pytest.skip(f"no {file.name} in DATA_DIR")
    return instantiate(config)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "shape", "step", "sizes"),
    [
        ("ncep_air_temperature", (25, 53), 6 * 3600, (1400, 60, 1460)),
        ("era5_uk_t2m", (33, 49), 3600, (480, 72, 192)),
        ("ncep_slp", (17, 33), 86_400, (2922, 365, 365)),
        ("ersst_monthly", (89, 180), MONTH_SECONDS, (96, 12, 20)),
    ],
)
def test_the_real_files_are_understood(name, shape, step, sizes):
    data = configured(name)
    assert data.grid.shape == shape and data.step == step and not data.segments.any() and not data.gaps
    assert tuple(data.splits[split].size for split in ("train", "validation", "test")) == sizes
    land = 0.31 if name == "ersst_monthly" else 0.0
    assert 1 - data.domain.double().mean().item() == pytest.approx(land, abs=0.005)
    dataset = ForecastDataset(
        data, "test", Normalisation.fit(data, lead_steps=(1, 3)), input_frames=2, lead_steps=(1, 3)
    )
    assert dataset[0].targets["forecast"].presence is None or name == "ersst_monthly"
    assert len(dataset) == sizes[2] - 2


@pytest.mark.real_data
def test_clouds_and_land_of_a_real_ocean_are_told_apart():
    file = Path(os.environ.get("DATA_DIR", "")) / "alboranSST_small.nc"
    if not file.is_file():
        pytest.skip(f"no {file.name} in DATA_DIR")
    data = GriddedData(str(file), variables=["SST", "mask"], split=FRACTIONS)
    sea = data.static[0] == 1
    assert data.gaps and 0.3 < data.domain.double().mean() < sea.double().mean() + 0.1
    assert np.flatnonzero(np.diff(data.segments)).size == 1  # one day of the file is missing
    coverage = [(data.read([day])[0, 0].isfinite() & sea).sum().item() / sea.sum().item() for day in range(10)]
    np.testing.assert_allclose(coverage, [0.91, 0.85, 0.67, 0.73, 0.48, 0.55, 0.72, 0.10, 0.22, 0.24], atol=0.006)
