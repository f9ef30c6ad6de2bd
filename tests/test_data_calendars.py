"""Times of every calendar and unit against cftime."""

import cftime
import numpy as np
import pytest
import torch

from data.calendars import clock, date_to_seconds, decode_times, format_time, month_number, month_start

CALENDARS = ("standard", "proleptic_gregorian", "noleap", "365_day", "all_leap", "360_day")


@pytest.mark.parametrize("calendar", CALENDARS)
@pytest.mark.parametrize(
    "units",
    [
        "hours since 1800-01-01",
        "days since 1850-1-1 00:00:0.0",
        "minutes since 1999-12-30 12:00",
        "seconds since 1970-01-01T00:00:00Z",
    ],
)
def test_decoding_agrees_with_cftime(calendar, units):
    rng = np.random.default_rng(0)
    scale = {"hours": 24, "days": 1, "minutes": 1440, "seconds": 86400}[units.split()[0]]
    values = np.sort(rng.integers(0, 90_000, size=50)) * scale / 4
    times, name = decode_times(values, units, calendar)
    dates = cftime.num2date(values, units.replace("T", " ").replace("Z", ""), calendar)
    assert [format_time(seconds, name)[:16] for seconds in times] == [
        date.strftime("%4Y-%m-%d %H:%M") for date in dates
    ]
    second_of_day, day_of_year = clock(torch.from_numpy(times), name)
    np.testing.assert_array_equal(second_of_day, [date.hour * 3600 + date.minute * 60 + date.second for date in dates])
    length = {"360_day": 360, "all_leap": 366}.get(calendar, 365)
    fraction = np.array([date.dayofyr - 1 for date in dates]) + second_of_day.numpy() / 86_400
    np.testing.assert_allclose(day_of_year, 1 + fraction * 365 / length, atol=1e-3)


def test_dates_before_the_gregorian_reform_follow_the_mixed_calendar():
    times, _ = decode_times(np.array([730_500.0]), "days since 0001-01-01", "standard")
    date = cftime.num2date(730_500, "days since 0001-01-01", "standard")
    assert format_time(times[0]) == date.strftime("%Y-%m-%d %H:%M")


@pytest.mark.parametrize("calendar", ["standard", "noleap", "360_day"])
def test_months_are_calendar_months(calendar):
    times, name = decode_times(np.array([0, 1, 2, 13, 13.5]), "months since 2000-01-01", calendar)
    assert [format_time(seconds, name)[:10] for seconds in times[:4]] == [
        "2000-01-01",
        "2000-02-01",
        "2000-03-01",
        "2001-02-01",
    ]
    assert times[4] - times[3] == (30 if calendar == "360_day" else 28) * 43_200
    np.testing.assert_array_equal(np.diff(month_number(times[:3], name)), 1)
    middle, _ = decode_times(np.array([0.0, 1.0]), "months since 2000-01-16 12:00", calendar)
    assert [format_time(seconds, name) for seconds in middle] == ["2000-01-16 12:00", "2000-02-16 12:00"]
    years, _ = decode_times(np.array([0.0, 1.0]), "years since 1999-06-01", calendar)
    assert [format_time(seconds, name)[:10] for seconds in years] == ["1999-06-01", "2000-06-01"]


@pytest.mark.parametrize("calendar", ["proleptic_gregorian", "noleap", "all_leap", "360_day"])
def test_months_and_their_starts_are_inverse(calendar):
    months = np.arange(-400, 700)
    np.testing.assert_array_equal(month_number(month_start(months, calendar), calendar), months)
    np.testing.assert_array_equal(month_number(month_start(months + 1, calendar) - 1, calendar), months)


def test_partial_dates_cover_their_whole_period():
    assert date_to_seconds((2013,), end=True) == date_to_seconds((2014,))
    assert date_to_seconds((2012, 2), end=True) == date_to_seconds((2012, 3, 1))
    assert date_to_seconds((2013, 2, 28), end=True) == date_to_seconds((2013, 3))
    assert date_to_seconds((2013, 2, 28, 6), end=True) == date_to_seconds((2013, 2, 28, 7))
    assert date_to_seconds((2001, 2, 30), "360_day") == date_to_seconds((2001, 3, 1), "360_day") - 86_400


@pytest.mark.parametrize(
    ("values", "units", "calendar", "message"),
    [
        ([0, 1], "fortnights since 2000-01-01", "standard", "cannot read the time units"),
        ([0, 1], "", "standard", "cannot read the time units"),
        ([0, 1], "days since yesterday", "standard", "cannot read the date 'yesterday'"),
        ([0, 1], "days since 2001-02-29", "noleap", "not a date of the noleap calendar"),
        ([0, 1], "days since 2000-01-01", "mayan", "calendar 'mayan' is not supported; allowed: standard"),
        ([0, np.nan], "days since 2000-01-01", "standard", "missing values"),
    ],
)
def test_unreadable_time_axes_are_refused(values, units, calendar, message):
    with pytest.raises(ValueError, match=message):
        decode_times(np.array(values, float), units, calendar)
