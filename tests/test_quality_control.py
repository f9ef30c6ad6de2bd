"""Quality control: every rule drops what it says, no more, and counts a row once; z-scores by channel and level."""

import numpy as np
import pytest

from data.quality_control import QualityControl, QualityReport
from data.sources.observations.channel_table import ufs_channels
from data.sources.observations.table import Table

CHANNELS = ufs_channels()
DEFAULTS = {
    "value": 280.0,
    "latitude": 10.0,
    "longitude": 20.0,
    "time": 0,
    "pressure": np.nan,
    "height": np.nan,
    "type": 0,
    "qc_flag": -1,
    "use_flag": -1,
}


def rows(*given: dict) -> Table:
    """One row a dictionary; channels by name."""
    given = [{**DEFAULTS, **row} for row in given]
    columns = {name: np.array([row[name] for row in given]) for name in DEFAULTS}
    return Table({**columns, "channel": np.array([CHANNELS.index(row["channel"]) for row in given])})


def dropped_by(rule: str, table: Table, **options) -> list[bool]:
    """Which rows a rule drops; no other rule drops any."""
    control = QualityControl(CHANNELS, **options)
    kept, report = control(table.with_columns(row=np.arange(len(table))))
    assert {name for name, count in report.dropped.items() if count} <= {rule}, report.dropped
    assert report.rows == len(table) and report.kept == len(kept)
    return (~np.isin(np.arange(len(table)), kept["row"])).tolist()


def test_every_rule_drops_what_it_says():
    assert dropped_by(
        "place",
        rows(
            *({"channel": "atms_1", "latitude": value} for value in (-90, 90, 90.1, np.nan)),
            *({"channel": "atms_1", "longitude": value} for value in (-180, 360, np.inf)),
        ),
    ) == [False, False, True, True, False, False, True]
    assert dropped_by("finite value", rows(*({"channel": "atms_2", "value": v} for v in (1, np.nan, -np.inf)))) == [
        False,
        True,
        True,
    ]
    assert dropped_by(
        "valid range",
        rows(
            *({"channel": "amsua_7", "value": value} for value in (0, 400, -0.1, 400.1)),
            *({"channel": "iasi_9", "value": value} for value in (150, 350, 149, 351)),
            *({"channel": "airs-pca_1", "value": value} for value in (-1e6, 1e6)),
        ),
    ) == [False, False, True, True] * 2 + [False, False]
    # A height or pressure that a row does not give is not outside its limits; a radiance's is not asked for.
    assert dropped_by(
        "height",
        rows(
            *({"channel": "t", "height": value} for value in (0, 60_000, -1, 60_001, np.nan)),
            {"channel": "atms_1", "height": 830_000},
        ),
    ) == [False, False, True, True, False, False]
    assert dropped_by(
        "pressure",
        rows(
            *({"channel": "u", "pressure": value} for value in (200, 1100, 199, 1101, np.nan)),
            *({"channel": "gps_angle", "pressure": value} for value in (0.5, 0.4, 1101)),
            {"channel": "gps_q", "pressure": 5.0},
            {"channel": "atms_1", "pressure": 10},
        ),
    ) == [False, False, True, True, False, False, True, True, False, False]


def test_complete_rows_give_height_and_pressure():
    inside, nothing = {"height": 10.0, "pressure": 500.0}, np.nan
    table = rows(
        {"channel": "t", **inside},
        {"channel": "t", **inside, "height": nothing},
        {"channel": "gps_angle", **inside, "height": nothing},
        {"channel": "atms_1"},
    )
    assert dropped_by("height", table, complete=True) == [False, True, True, False]
    assert dropped_by("height", table) == [False] * 4
    table = rows(
        {"channel": "t", **inside, "pressure": nothing},
        {"channel": "gps_angle", "height": 20_000.0, "pressure": 0.5},
        {"channel": "gps_angle", **inside, "pressure": nothing},
        {"channel": "atms_1"},
    )
    assert dropped_by("pressure", table, complete=True) == [True, False, True, False]
    assert dropped_by("pressure", table) == [False] * 4


def test_rules_by_choice():
    flags = rows(
        {"channel": "atms_1", "qc_flag": 0, "use_flag": -1},
        {"channel": "atms_1", "qc_flag": 3, "use_flag": 1},
        {"channel": "t", "qc_flag": 5, "use_flag": 1},
        {"channel": "t", "qc_flag": 0, "use_flag": -1},
    )
    assert dropped_by("archive flags", flags, archive_flags=True) == [False, True, False, True]
    assert dropped_by("archive flags", flags) == [False] * 4
    kinds = (220, 229, 235, 282, 228, 236, 240, 0)
    winds = rows(*({"channel": "u", "type": kind} for kind in kinds), {"channel": "t", "type": 240})
    assert dropped_by("in-situ winds", winds, in_situ_winds_only=True) == [False] * 4 + [True] * 4 + [False]
    names = ("gps_angle", "gps_t", "gps_q", "t")
    occultations = rows(*({"channel": name} for name in names))
    assert dropped_by("GPS level 1", occultations, gps_level_1_only=True) == [False, True, True, False]
    assert dropped_by("dropped channels", occultations, dropped_channels=["t", "gps_t"]) == [False, True, False, True]
    with pytest.raises(ValueError, match="no observation channel 'radar_1'; allowed: atms_1"):
        QualityControl(CHANNELS, dropped_channels=["radar_1"])


def test_a_row_counts_for_the_first_rule_it_breaks_and_reports_add_up():
    table = rows(
        {"channel": "t", "value": np.nan, "height": -5, "latitude": 100},
        {"channel": "t", "value": np.nan, "height": -5},
        {"channel": "t", "height": -5},
        {"channel": "t"},
    )
    kept, report = QualityControl(CHANNELS)(table)
    assert len(kept) == 1
    assert report.dropped == {"place": 1, "finite value": 1, "valid range": 0, "height": 1, "pressure": 0}
    total = report + QualityReport(6, {"place": 2, "archive flags": 1})
    assert total.rows == 10 and total.kept == 4 and total.dropped["place"] == 3
    lines = str(total).splitlines()
    assert lines[0].split() == ["observations", "10"] and lines[1].split() == ["place", "-3", "30.00%"]
    assert lines[-1].split() == ["kept", "4", "40.00%"] and len(lines) == 8
    assert str(QualityControl(CHANNELS)(table.select([]))[1]).splitlines()[-1].split() == ["kept", "0", "0.00%"]


def test_unknown_channels_are_refused_with_counts():
    table = rows({"channel": "t"}, {"channel": "t"}, {"channel": "t"}).with_columns(channel=[543, 2000, 543])
    with pytest.raises(ValueError, match=r"3 of 3 observations .* 543 \(2 rows\), 2000 \(1 rows\)"):
        QualityControl(CHANNELS)(table)


def test_z_scores_by_channel():
    rng = np.random.default_rng(0)
    names = np.array(["atms_3", "t", "q"])[rng.integers(0, 3, 3000)]
    table = rows(
        *({"channel": name, "value": value} for name, value in zip(names, rng.normal(5, 3, 3000), strict=True))
    )
    table = table.with_columns(value=np.where(names == "q", table["value"] * 1e-3, table["value"]), error=np.ones(3000))
    with pytest.raises(ValueError, match=r"are known of the channels atms_3, q, t \(3000 rows\)"):
        CHANNELS.normalised(table)
    fitted = CHANNELS.fit(table)
    scores = fitted.normalised(table)
    for name in ("atms_3", "t", "q"):
        mine = names == name
        assert abs(scores["value"][mine].mean()) < 1e-4 and scores["value"][mine].std() == pytest.approx(1, abs=1e-4)
        np.testing.assert_allclose(scores["error"][mine], 1 / table["value"][mine].astype(float).std(), rtol=1e-3)
    np.testing.assert_allclose(fitted.physical(scores)["value"], table["value"], rtol=1e-4, atol=1e-6)
    with_all = QualityControl(fitted, with_statistics=True)
    assert with_all(rows({"channel": "t"}, {"channel": "u"}))[1].dropped["known statistics"] == 1


def test_z_scores_of_conventional_channels_by_pressure():
    rng = np.random.default_rng(1)
    pressure = np.repeat([850.0, 500.0, 250.0], 200)
    # Temperature and its spread change with height; a single mean would leave a bias of many deviations.
    spread = np.repeat([2.0, 1.0, 4.0], 200)
    value = np.repeat([285.0, 255.0, 220.0], 200) + spread * rng.normal(size=600)
    table = rows(*({"channel": "t", "value": v, "pressure": p} for v, p in zip(value, pressure, strict=True)))
    fitted = CHANNELS.fit(table, levels=(250, 500, 850))
    scores = fitted.normalised(table)["value"]
    for level in (850, 500, 250):
        mine = scores[pressure == level]
        assert abs(mine.mean()) < 1e-3 and mine.std() == pytest.approx(1, abs=1e-3)
    assert CHANNELS.fit(table).normalised(table)["value"][pressure == 500].std() < 0.1
    mean, stddev = (item[CHANNELS.index("t")] for item in (fitted.by_pressure.mean, fitted.by_pressure.stddev))
    # Halfway in the logarithm between 500 and 850 hPa, and outside the levels.
    between = rows(*({"channel": "t", "value": 270.0, "pressure": p} for p in (np.sqrt(500 * 850), 1000, 100)))
    expected = [(270 - mean[1:].mean()) / stddev[1:].mean(), (270 - mean[2]) / stddev[2], (270 - mean[0]) / stddev[0]]
    np.testing.assert_allclose(fitted.normalised(between)["value"], expected, rtol=1e-4)
    # Levels with few rows, rows without pressure and radiances fall back on the channel.
    sparse = CHANNELS.fit(table.select(np.r_[0:200, 200:205]), levels=(500, 850))
    other = rows({"channel": "t", "value": 270.0, "pressure": 500}, {"channel": "t", "value": 270.0})
    channel = CHANNELS.index("t")
    np.testing.assert_allclose(
        sparse.normalised(other)["value"], (270 - sparse.mean[channel]) / sparse.stddev[channel], rtol=1e-5
    )
    known = rows({"channel": "t", "value": 270.0, "pressure": 850})
    expected = (270 - value[:200].mean()) / value[:200].std()
    np.testing.assert_allclose(sparse.normalised(known)["value"], expected, rtol=1e-4)
