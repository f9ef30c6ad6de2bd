"""Files of any format as one: recognised, decoded once, read by time."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from data.sources.observations.channel_table import CONVENTIONAL
from data.sources.observations.files import ObservationFiles
from data.sources.observations.formats import OCEAN, recognise
from tests.observation_files import CELSIUS, WRITERS, Sites, write_dart, write_metars

DATA_DIR = os.environ.get("DATA_DIR", "")
HOUR = 3600
START = int(np.datetime64("2001-01-01", "s").astype(np.int64))
STOP = START + 48 * HOUR


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HYDRASPHERE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "observations"


def decoded(folder: Path, name: str, sites: Sites) -> ObservationFiles:
    return ObservationFiles([WRITERS[name].writer(folder / WRITERS[name].file, sites)])


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_recognised_and_gives_the_same_rows(tmp_path, name):
    sites, kind = Sites.random(START, STOP), WRITERS[name]
    files = decoded(tmp_path, name, sites)
    assert {file.format for file in files.files} == {name} and files.rows == 300
    assert files.channels == (kind.channel,) and len(files.platforms) == len(files.types) == 1
    assert files.span == (sites.time.min(), sites.time.max())
    rows = files.read([(START - 1, STOP)])
    order, found = np.lexsort((sites.value, sites.time)), np.lexsort((rows["value"], rows["time"]))
    np.testing.assert_array_equal(rows["time"][found], sites.time[order])
    np.testing.assert_allclose(rows["value"][found] + CELSIUS * kind.celsius, sites.value[order], atol=2e-4)
    np.testing.assert_allclose(rows["latitude"][found], sites.latitude[order], atol=1e-5)
    np.testing.assert_allclose((rows["longitude"][found] - sites.longitude[order] + 180) % 360, 180, atol=2e-5)
    np.testing.assert_array_equal(rows["rejected"][found], sites.rejected[order] & kind.flags)
    table = files.channel_table({})
    assert table.sensors == ((OCEAN if name == "roms" else CONVENTIONAL),)


def test_ids_of_several_files_follow_their_sorted_names(tmp_path):
    early, late = Sites.random(START, STOP, seed=1), Sites.random(START + 24 * HOUR, STOP + 24 * HOUR, seed=2)
    paths = [write_metars(tmp_path / "b.csv", late), write_dart(tmp_path / "a.out", early)]
    paths.append(WRITERS["madis"].writer(tmp_path / "c.nc", early))
    files = ObservationFiles([*paths, paths[0]])  # named twice, read once
    assert files.channels == ("ACARS_TEMPERATURE", "temperature") and files.rows == 900
    assert files.platforms == ("aircraft", "dart", "metar") and files.types == ("dart_text 23", "madis", "metar_csv")
    rows = files.read([(START - 1, STOP + 24 * HOUR)])
    assert np.bincount(rows["channel"]).tolist() == [300, 600] and np.bincount(rows["type"]).tolist() == [300] * 3
    of_dart = rows.select(rows["platform"] == 1)
    assert set(of_dart["channel"]) == {0} and (of_dart["pressure"] == 500).all() and (of_dart["error"] == 1).all()
    assert np.isnan(rows.select(rows["platform"] == 2)["pressure"]).all()


def test_spans_are_open_before_and_closed_after(tmp_path):
    paths = [write_metars(tmp_path / f"{k}.csv", Sites.random(START, STOP, rows=40, seed=k)) for k in range(3)]
    single = Sites(*(np.array([item]) for item in (START + 5, 10.0, 20.0, 280.0, False)))
    files = ObservationFiles([*paths, write_metars(tmp_path / "one.csv", single)])
    everything = files.read([(START - 1, STOP)])
    assert len(everything) == files.rows == 121
    random = np.random.default_rng(0)
    for _ in range(30):
        edges = np.sort(random.choice(np.concatenate([everything["time"], [START, STOP, START + 4]]), 4))
        spans = [(int(edges[0]), int(edges[1])), (int(edges[2]), int(edges[3]))]
        inside = sum(((everything["time"] > a) & (everything["time"] <= b)).sum() for a, b in spans)
        assert files.count(spans) == len(files.read(spans)) == inside
    assert len(files.read([(START + 5, START + 5)])) == 0 == len(files.read([]))


def test_files_are_decoded_once_and_again_when_they_change_or_the_copy_is_damaged(tmp_path, cache, monkeypatch):
    path = write_metars(tmp_path / "a.csv", Sites.random(START, STOP))
    whole = [(START - 1, STOP)]
    expected = ObservationFiles([path]).read(whole)["value"]
    with monkeypatch.context() as patched:
        patched.setattr("data.sources.observations.files.decode", lambda *_: pytest.fail("decoded again"))
        again = pickle.loads(pickle.dumps(ObservationFiles([path])))
        np.testing.assert_array_equal(again.read(whole)["value"], expected)
    (copy,) = cache.glob("*.safetensors")
    copy.write_bytes(copy.read_bytes()[:50])
    with pytest.warns(UserWarning, match="the decoded observations in .* are damaged and are made again"):
        np.testing.assert_array_equal(ObservationFiles([path]).read(whole)["value"], expected)
    write_metars(path, Sites.random(START, STOP, rows=20))
    assert ObservationFiles([path]).rows == 20


def test_a_file_without_rows_is_no_hindrance(tmp_path):
    nothing = Sites(*(np.empty(0) for _ in range(5)))
    files = ObservationFiles([write_metars(tmp_path / "a.csv", nothing)])
    assert files.rows == 0 and files.span is None and len(files.read([(START, STOP)])) == 0
    files = ObservationFiles([tmp_path / "a.csv", write_metars(tmp_path / "b.csv", Sites.random(START, STOP))])
    assert len(files.read([(START - 1, STOP)])) == 300


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8bnothing", b"a,b\n1,2\n"])
def test_what_is_no_observation_file_is_refused(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x is no observation file .* data\.format=, one of bufr, dart_text, madis"):
        recognise(path)


def test_other_netcdf_and_folders_are_refused(tmp_path):
    import netCDF4

    with netCDF4.Dataset(tmp_path / "fields.nc", "w"):
        pass
    with pytest.raises(ValueError, match="no observation file that can be recognised"):
        ObservationFiles([tmp_path / "fields.nc"])
    with pytest.raises(ValueError, match=r"is a folder without .* data\.observations='.*/\*'"):
        ObservationFiles([tmp_path])
    with pytest.raises(ValueError, match=r"data\.format=csv is unknown; allowed: bufr, dart_text"):
        ObservationFiles([tmp_path / "fields.nc"], format="csv")
    with pytest.raises(OSError, match="is not a DART observation sequence"):
        ObservationFiles([write_metars(tmp_path / "a.csv", Sites.random(START, STOP))], format="dart_text")


def test_limits_of_channels_can_be_given(tmp_path):
    files = decoded(tmp_path, "metar_csv", Sites.random(START, STOP))
    assert files.channel_table({"temperature": [200, 300]}).maximum.tolist() == [300]
    with pytest.raises(ValueError, match=r"data\.valid_ranges names 'T'; the files hold the channels temperature"):
        files.channel_table({"T": [200, 300]})
    with pytest.raises(ValueError, match=r"valid_ranges\.temperature=\[300, 200\] must be \[minimum, maximum\]"):
        files.channel_table({"temperature": [300, 200]})


@pytest.mark.real_data
@pytest.mark.skipif(not DATA_DIR, reason="DATA_DIR is not set")
@pytest.mark.parametrize(
    ("name", "format", "rows", "rejected"),
    [
        ("2020100106_metars.csv", "metar_csv", 41_128, 0),
        ("2005082600_metar.nc.gz", "madis", 15_977, 326),
        ("2005082600_acars.nc.gz", "madis", 28_044, 13),
        ("obs_seq.final.1000", "dart_text", 1000, 271),
        ("wc13_obs.nc", "roms", 6815, 0),
        ("amsa_55.bufr", "bufr", 9240, 0),
    ],
)
def test_real_files_are_recognised(name, format, rows, rejected):
    path = Path(DATA_DIR) / name
    if not path.is_file():
        pytest.skip(f"{name} is not in DATA_DIR")
    assert recognise(path) == format
    if format == "bufr":
        pytest.importorskip("eccodes", reason="the extra bufr is not installed")
    files = ObservationFiles([path])
    first, last = files.span
    found = files.read([(first - 1, last)])
    assert files.rows == len(found) == rows and found["rejected"].sum() == rejected
