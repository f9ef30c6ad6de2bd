"""Where data comes from: paths, the catalogue with and without network, the synthetic default, the cache folder."""

import hashlib
import http.server
import os
import resource
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from example_data import write

from data.datasets.cache import mapped_array
from data.sources import synthetic
from data.sources.catalogue import CATALOGUE, Entry, fetch
from data.sources.location import cache_folder, locate
from data.sources.netcdf import open_series

DATA_DIR = os.environ.get("DATA_DIR", "")  # before the tests hide it
CONTENT = b"not really NetCDF" * 100


@pytest.fixture(autouse=True)
def private_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRASPHERE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DATA_DIR", raising=False)


@pytest.fixture
def entry(monkeypatch):
    """A catalogue entry whose file holds CONTENT."""
    entry = Entry(hashlib.sha256(CONTENT).hexdigest(), "a test", "http://127.0.0.1:9/example.nc")
    monkeypatch.setitem(CATALOGUE, "example.nc", entry)
    return entry


@pytest.fixture
def limited_disk():
    """A limit on file sizes, which the system reports like a full disk: an error while writing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def server(tmp_path):
    """A web server on a folder: (address, folder)."""
    folder = tmp_path / "www"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, directory=str(folder), **options)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()


def test_every_entry_has_a_checksum_and_https():
    for entry in CATALOGUE.values():
        assert len(entry.sha256) == 64 and (entry.url is None or entry.url.startswith("https://"))


def test_a_copy_in_data_dir_is_used_without_network(entry, tmp_path, monkeypatch):
    (tmp_path / "example.nc").write_bytes(CONTENT)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    assert locate("catalogue:example.nc") == [tmp_path / "example.nc"]


def test_a_copy_with_another_checksum_is_refused(entry, tmp_path, monkeypatch):
    (tmp_path / "example.nc").write_bytes(CONTENT + b"!")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with pytest.raises(
        OSError, match=r"not the catalogue's file: its sha256 is .*; replace it, or read it as it is"
    ) as error:
        fetch("example.nc")
    assert "\n" not in str(error.value)


def test_without_copy_and_network_the_address_and_the_way_out_are_named(entry, tmp_path):
    with pytest.raises(
        OSError, match=r"cannot download http://127.0.0.1:9/example.nc .*DATA_DIR to it, or into"
    ) as error:
        fetch("example.nc")
    assert str(tmp_path / "cache" / "catalogue") in str(error.value) and "\n" not in str(error.value)


def test_a_download_is_verified_and_kept(entry, server, monkeypatch):
    address, folder = server
    monkeypatch.setitem(CATALOGUE, "example.nc", replace(entry, url=f"{address}/example.nc"))
    (folder / "example.nc").write_bytes(CONTENT)
    path = fetch("example.nc")
    assert path.read_bytes() == CONTENT
    (folder / "example.nc").unlink()
    assert fetch("example.nc") == path  # now from the cache


def test_a_download_of_something_else_leaves_nothing_behind(entry, server, monkeypatch):
    address, folder = server
    monkeypatch.setitem(CATALOGUE, "example.nc", replace(entry, url=f"{address}/example.nc"))
    (folder / "example.nc").write_bytes(b"<html>please log in</html>")
    with pytest.raises(OSError, match="does not have the expected sha256"):
        fetch("example.nc")
    assert not [item for item in cache_folder("catalogue").iterdir() if item.suffix != ".lock"]


def test_entries_without_address_say_where_to_put_the_file(entry, monkeypatch):
    monkeypatch.setitem(CATALOGUE, "example.nc", replace(entry, url=None))
    with pytest.raises(OSError, match="has no public download; put it into a folder and set DATA_DIR"):
        fetch("example.nc")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown catalogue file 'x.nc'; allowed: .*air_temperature.nc"):
        fetch("x.nc")
    with pytest.raises(ValueError, match="unknown synthetic data 'x'; allowed: weather"):
        locate("synthetic:x")


def test_paths_globs_and_lists_are_located(tmp_path):
    for name in ("b.nc", "a.nc"):
        (tmp_path / name).touch()
    assert locate(str(tmp_path / "*.nc")) == [tmp_path / "a.nc", tmp_path / "b.nc"]
    assert locate([str(tmp_path / "b.nc"), str(tmp_path / "a.nc")]) == [tmp_path / "b.nc", tmp_path / "a.nc"]
    with pytest.raises(OSError, match="does not exist; give a file, a Zarr store"):
        locate(str(tmp_path / "c.nc"))
    with pytest.raises(OSError, match="no file matches"):
        locate(str(tmp_path / "*.zarr"))
    with pytest.raises(ValueError, match="empty list"):
        locate([])


def test_an_unwritable_cache_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYDRASPHERE_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot be written .*; set HYDRASPHERE_CACHE to a folder that can"):
        cache_folder("arrays")


def test_a_full_disk_leaves_no_synthetic_file(limited_disk, monkeypatch):
    small = synthetic.weather
    monkeypatch.setattr(synthetic, "weather", lambda: small(num_frames=400))
    with pytest.raises(OSError, match="free some space or set HYDRASPHERE_CACHE"):
        synthetic.materialise("weather")
    assert not [item for item in cache_folder("synthetic").iterdir() if item.suffix != ".lock"]


@pytest.fixture
def series(tmp_path):
    return open_series([write(tmp_path / "a.nc", frames=300, latitude=range(10), longitude=range(20))])


def test_a_full_disk_leaves_no_memory_map(series, limited_disk):
    with pytest.raises(OSError, match=r"cannot write the .* GiB cache .*data.cache=none"):
        mapped_array(series)
    assert not [item for item in cache_folder("arrays").iterdir() if item.suffix != ".lock"]


def test_a_source_that_breaks_off_leaves_no_memory_map(series, monkeypatch):
    monkeypatch.setattr("data.datasets.cache.BLOCK_BYTES", 100_000)
    read, calls = type(series).read, []

    def breaking(self, indices):
        calls.append(indices)
        if len(calls) == 3:
            raise OSError("cannot read 't2m' from a.nc: it is truncated")
        return read(self, indices)

    monkeypatch.setattr(type(series), "read", breaking)
    with pytest.raises(OSError, match=r"cannot read 't2m' from a\.nc: it is truncated"):
        mapped_array(series)
    assert not [item for item in cache_folder("arrays").iterdir() if item.suffix != ".lock"]
    np.testing.assert_array_equal(mapped_array(series), read(series, np.arange(300)))  # and the next attempt works


@pytest.mark.real_data
@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_the_files_of_the_catalogue_have_their_checksums(name):
    folder = Path(DATA_DIR)
    if not (folder / name).is_file():
        pytest.skip(f"no {name} in DATA_DIR")
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == CATALOGUE[name].sha256


@pytest.fixture(scope="module")
def weather():
    return synthetic.weather(num_frames=1900)


def test_synthetic_weather_is_reproducible_and_plausible(weather):
    grid, times, temperature, land = weather
    assert temperature.shape == (1900, 32, 64) and grid.is_global and (np.diff(times) == np.timedelta64(6, "h")).all()
    assert temperature.min() > 190 and temperature.max() < 330
    zonal = temperature.mean(axis=(0, 2))
    assert zonal[16] - zonal[[0, -1]].max() > 30  # warm equator
    assert 0.1 < (land * grid.area_weights.numpy()).mean() < 0.4
    first, second = (synthetic.weather(num_frames=5)[2] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - synthetic.weather(num_frames=5, seed=1)[2]).mean() > 1


def test_synthetic_weather_can_be_forecast_beyond_persistence_and_climatology(weather):
    _, times, temperature, _ = weather
    day = (times - times[0]) / np.timedelta64(1, "D")
    cycles = [np.ones_like(day)] + [f(2 * np.pi * day / period) for period in (365.25, 1.0) for f in (np.cos, np.sin)]
    design = np.stack(cycles, axis=1)
    values = temperature[:, 20:27, 22:34].reshape(day.size, -1).astype(np.float64)  # mostly upstream of the target
    anomaly = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    lead, place = 4, 3 * 12 + 8
    past, target, fitted, held_out = anomaly[:-lead], anomaly[lead:, place], slice(0, 1400), slice(1400, None)
    normal = past[fitted].T @ past[fitted] + 300 * np.eye(past.shape[1])
    forecast = past[held_out] @ np.linalg.solve(normal, past[fitted].T @ target[fitted])

    def rmse(prediction):
        return np.sqrt(np.mean((prediction - target[held_out]) ** 2))

    assert rmse(forecast) < 0.8 * min(rmse(past[held_out, place]), rmse(0.0))


def test_the_synthetic_file_is_read_like_any_other(monkeypatch):
    small = synthetic.weather
    monkeypatch.setattr(synthetic, "weather", lambda: small(num_frames=40))
    (path,) = locate("synthetic:weather")
    written = path.stat().st_mtime_ns
    series = open_series(locate("synthetic:weather"))
    assert path.stat().st_mtime_ns == written  # generated once
    _, times, temperature, _ = small(num_frames=40)
    np.testing.assert_array_equal(series.times, times.astype(np.int64))
    np.testing.assert_allclose(series.read(np.arange(40))[:, 0], temperature, atol=0.0051)
    assert path.parent == cache_folder("synthetic")
