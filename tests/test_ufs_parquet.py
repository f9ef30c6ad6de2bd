"""The Parquet archive of UFS replays: rows given back, windows, damaged files and the table of channels."""

import os

import numpy as np
import pytest

from data.sources.observations import ufs_parquet
from data.sources.observations.channel_table import SENSORS, ufs_channels
from data.sources.observations.table import Table

DATA_DIR = os.environ.get("DATA_DIR", "")
HOUR = 3600
START = int(np.datetime64("2021-05-31T21:00", "s").astype(np.int64))


def archive_rows(rows: int = 400, seed: int = 0) -> Table:
    """Two days of conventional and satellite-like rows with everything that may be null."""
    rng = np.random.default_rng(seed)

    def sometimes(values, empty):
        return np.where(rng.random(rows) < 0.5, empty, values)

    return Table(
        {
            "value": rng.normal(280, 5, rows),
            "latitude": rng.uniform(-90, 90, rows).astype(np.float32),
            "longitude": rng.uniform(0, 360, rows).astype(np.float32),
            "time": START + rng.integers(0, 48 * HOUR, rows),
            "channel": rng.integers(0, 543, rows),
            "platform": rng.integers(0, 32, rows),
            "type": sometimes(rng.integers(1, 300, rows), 0),
            "qc_flag": sometimes(rng.integers(0, 50, rows), -1),
            "use_flag": sometimes(np.ones(rows), -1),
            **{
                name: sometimes(rng.uniform(0, 90, rows), np.nan)
                for name in ("height", "pressure", "satellite_zenith", "solar_zenith", "scan_angle")
            },
        }
    )


def assert_same_rows(found: Table, expected: Table):
    """Equal up to the order of rows (values are distinct)."""
    assert len(found) == len(expected)
    found, expected = (item.select(np.argsort(item["value"])) for item in (found, expected))
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(found[name], column, err_msg=name)


def test_parquet_gives_back_what_was_written(tmp_path):
    rows = archive_rows()
    files = ufs_parquet.write(tmp_path, "conv", rows)
    assert [str(path.relative_to(tmp_path)) for path in files] == [
        f"conv/{day}/0.parquet" for day in ("20210531", "20210601", "20210602")
    ]
    found = ufs_parquet.read(tmp_path)
    assert_same_rows(found, rows)
    assert np.abs(found["bin"] - found["time"]).max() <= 1.5 * HOUR and not (found["bin"] % (3 * HOUR)).any()


@pytest.mark.parametrize("by", ["time", "bin"])
def test_windows_of_parquet_agree_with_filtering_everything(tmp_path, by):
    for sensor in ("atms", "conv"):
        ufs_parquet.write(tmp_path, sensor, archive_rows(seed=len(sensor)))
    whole = ufs_parquet.read(tmp_path)
    rng = np.random.default_rng(2)
    edges = [(START + 3 * HOUR, START + 9 * HOUR), (START + 3 * HOUR, START + 3 * HOUR), (0, START), (START, None)]
    for start, stop in [*edges, *np.sort(START + rng.integers(-HOUR, 50 * HOUR, (10, 2)), axis=1).tolist()]:
        wanted = (whole[by] > start) & (whole[by] <= (np.inf if stop is None else stop))
        assert_same_rows(ufs_parquet.read(tmp_path, start=start, stop=stop, by=by), whole.select(wanted))
    assert_same_rows(ufs_parquet.read(tmp_path, sensors=["atms"]), archive_rows(seed=4))


def test_only_matching_row_groups_are_read(tmp_path):
    import pyarrow.parquet as pq

    rows = archive_rows()
    path = ufs_parquet.write(tmp_path, "conv", rows)[1]
    with pq.ParquetFile(path) as file:
        assert file.metadata.num_row_groups == 8
        noon = START + 15 * HOUR
        assert ufs_parquet.matching_groups(file, noon - HOUR, noon + HOUR, "time") == [4]
        assert ufs_parquet.matching_groups(file, noon - 3 * HOUR, noon, "bin") == [4]
        first = file.metadata.row_group(0).column(5)
        place, size = first.data_page_offset, first.total_compressed_size
    # A damaged first group: the fifth can still be read, the whole file cannot.
    content = bytearray(path.read_bytes())
    content[place : place + size] = b"\xff" * size
    path.write_bytes(content)
    near = rows.between(noon - HOUR, noon + HOUR)
    assert len(near)
    assert_same_rows(ufs_parquet.read(tmp_path, start=noon - HOUR, stop=noon + HOUR), near)
    with pytest.raises(OSError, match=r"cannot read .*0\.parquet"):
        ufs_parquet.read(tmp_path)


def test_damaged_archives_are_refused_in_one_sentence(tmp_path):
    import pyarrow.parquet as pq

    path = ufs_parquet.write(tmp_path / "a", "conv", archive_rows())[0]
    arrow = pq.read_table(path)
    with pytest.raises(ValueError, match="lacks the sensors iasi; it holds conv"):
        ufs_parquet.read(tmp_path / "a", sensors=["iasi"])
    with pytest.raises(FileNotFoundError, match=r"there is no observation file .*nowhere"):
        ufs_parquet.read(tmp_path / "nowhere")
    pq.write_table(arrow.drop_columns(["Platform_ID", "Latitude"]), path)
    with pytest.raises(ValueError, match=r"lacks the columns Latitude, Platform_ID; it holds Absolute_Obs_Time"):
        ufs_parquet.read(tmp_path / "a")
    rows = archive_rows()
    platform = rows["platform"].copy()
    platform[:3] = [99, 99, 40]
    ufs_parquet.write(tmp_path / "b", "conv", rows.with_columns(platform=platform, time=np.full(len(rows), START)))
    with pytest.raises(
        ValueError, match=r"3 of 400 rows have a Platform_ID outside 0..31: 40 \(1 rows\), 99 \(2 rows\)"
    ):
        ufs_parquet.read(tmp_path / "b")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="truncated or corrupt"):
        ufs_parquet.read(tmp_path / "a")


def test_null_coordinates_become_nan_and_null_times_lie_in_no_window(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = ufs_parquet.write(tmp_path, "conv", archive_rows(20))[0]
    arrow = pq.read_table(path)
    for name in ("Latitude", "Absolute_Obs_Time"):
        column = arrow[name].to_pylist()
        column[0 if name == "Latitude" else 1] = None
        arrow = arrow.set_column(arrow.column_names.index(name), name, pa.array(column, arrow.schema.field(name).type))
    pq.write_table(arrow, path)
    found = ufs_parquet.read(tmp_path, start=0)
    assert len(found) == 19 and np.isnan(found["latitude"]).sum() == 1


def test_the_channel_table_of_the_archive(tmp_path):
    channels = ufs_channels()
    assert len(channels) == 543 and channels.names[322:330] == (
        "gps_angle",
        "gps_t",
        "gps_q",
        "ps",
        "q",
        "t",
        "u",
        "v",
    )
    assert channels.index("mhs_1") == 22 and channels.sensor[-1] == len(SENSORS) - 1
    assert channels.minimum[channels.index("iasi_1")] == 150 and channels.maximum[channels.index("atms_22")] == 400
    assert np.isinf(channels.minimum[channels.index("airs-pca_3")])
    rows = archive_rows(20_000)
    channel = np.where(np.arange(20_000) % 2, 322 + rows["channel"] % 8, rows["channel"] % 500)
    rows = rows.with_columns(channel=channel)
    fitted = channels.fit(rows, levels=(20, 60))
    ufs_parquet.write_channel_table(tmp_path, fitted)
    found = ufs_parquet.read_channel_table(tmp_path)
    assert found.names == fitted.names and found.sensors == fitted.sensors
    for name in ("sensor", "minimum", "maximum", "conventional", "mean", "stddev"):
        np.testing.assert_array_equal(getattr(found, name), getattr(fitted, name), err_msg=name)
    assert np.isnan(found.mean[500:]).all() and np.isfinite(found.mean[:500]).all()
    np.testing.assert_array_equal(found.by_pressure.levels, [20, 60])
    conventional = slice(322, 330)
    np.testing.assert_allclose(found.by_pressure.mean[conventional], fitted.by_pressure.mean[conventional])


def test_a_bad_channel_table_is_refused(tmp_path):
    import pyarrow.parquet as pq

    ufs_parquet.write_channel_table(tmp_path, ufs_channels())
    path = tmp_path / "channel_table.parquet"
    arrow = pq.read_table(path)
    pq.write_table(arrow.drop_columns(["name"]), path)
    with pytest.raises(ValueError, match="lacks the columns name"):
        ufs_parquet.read_channel_table(tmp_path)
    import pyarrow as pa

    pq.write_table(pa.concat_tables([arrow, arrow.slice(0, 1)]), path)
    with pytest.raises(ValueError, match="names a Global_Channel_ID twice"):
        ufs_parquet.read_channel_table(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"channel_table\.parquet"):
        ufs_parquet.read_channel_table(tmp_path / "elsewhere")
