"""Scores, regions and spectra against plain float64 NumPy on random values with masks; what is masked holds NaN."""

import numpy as np
import pytest
import torch

from data.grids import LatLonGrid, Points
from evaluation.regions import regions_of
from evaluation.scores import ForecastScores, cell_weights
from evaluation.spectra import ZonalSpectra

GLOBE = LatLonGrid(np.linspace(90, -90, 7), np.arange(0, 360, 30.0))
REGION = LatLonGrid(np.linspace(-30, 40, 8), np.linspace(200, 320, 13))


def windows(grid, *, count=11, leads=2, channels=3, seed=0):
    """forecast, truth, climatology (count, leads, channels, H, W), and the mask; NaN where it is False."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, leads, channels, *grid.shape)
    climatology = 280 + 5 * torch.randn(shape, generator=generator)
    truth = climatology + 3 * torch.randn(shape, generator=generator)
    forecast = truth + torch.randn(shape, generator=generator)
    valid = torch.rand(shape, generator=generator) > 0.3
    valid[3, 1, 2] = False  # a window without any observation
    forecast, truth, climatology = (torch.where(valid, item, torch.nan) for item in (forecast, truth, climatology))
    return forecast, truth, climatology, valid


def reference(forecast, truth, climatology, valid, weights, mask):
    """(L, C) of each score, one number at a time."""
    f, o, c = (item.double().numpy() for item in (forecast, truth, climatology))
    valid, weights = valid.numpy() & mask, np.asarray(weights, dtype=np.float64)
    leads, channels = f.shape[1:3]
    found = {name: np.zeros((leads, channels)) for name in ("rmse", "mae", "bias", "acc")}
    for lead in range(leads):
        for channel in range(channels):
            errors, cells, correlations = [], [], []
            for b in range(f.shape[0]):
                seen = valid[b, lead, channel]
                w = weights[seen]
                if not seen.any():
                    continue
                a, t, m = (item[b, lead, channel][seen] for item in (f, o, c))
                errors.append(a - t)
                cells.append(w)
                product = (w * (a - m) * (t - m)).sum()
                correlations.append(product / np.sqrt((w * (a - m) ** 2).sum() * (w * (t - m) ** 2).sum()))
            e, w = np.concatenate(errors), np.concatenate(cells)
            found["rmse"][lead, channel] = np.sqrt((w * e**2).sum() / w.sum())
            found["mae"][lead, channel] = (w * abs(e)).sum() / w.sum()
            found["bias"][lead, channel] = (w * e).sum() / w.sum()
            found["acc"][lead, channel] = np.mean(correlations)
    return found


@pytest.mark.parametrize("kind", ["area", "cos"])
@pytest.mark.parametrize("grid", [GLOBE, REGION], ids=["globe", "region"])
def test_scores_equal_plain_numpy(grid, kind):
    forecast, truth, climatology, valid = windows(grid)
    weights, regions = cell_weights(grid, kind), regions_of(grid, boxes={"box": [-30, 35, 210, 300]})
    scores = ForecastScores(weights, regions)
    for part in (slice(0, 4), slice(4, 11)):
        scores.update(forecast[part], truth[part], climatology[part], valid[part])
    found = scores.values()
    for place, (name, mask) in enumerate(regions.items()):
        expected = reference(forecast, truth, climatology, valid, weights.numpy(), mask.numpy())
        for score, values in expected.items():
            np.testing.assert_allclose(found[score][place], values, rtol=1e-12, atol=1e-12, err_msg=f"{score} {name}")


def test_the_mask_defaults_to_where_truth_is_observed():
    forecast, truth, climatology, valid = windows(GLOBE)
    given, inferred = (ForecastScores(cell_weights(GLOBE), regions_of(GLOBE)) for _ in range(2))
    given.update(forecast, truth, climatology, valid)
    inferred.update(torch.where(valid, forecast, 1e30), truth, torch.where(valid, climatology, torch.inf))
    torch.testing.assert_close(given.sums, inferred.sums, rtol=0, atol=0)


def test_merged_parts_equal_the_whole():
    forecast, truth, climatology, valid = windows(REGION)
    whole, *parts = (ForecastScores(cell_weights(REGION), regions_of(REGION)) for _ in range(4))
    errors = whole.update(forecast, truth, climatology, valid)
    parts[1].update(forecast[:6], truth[:6], climatology[:6], valid[:6])
    parts[2].update(forecast[6:], truth[6:], climatology[6:], valid[6:])
    for part in parts[1:]:
        parts[0].merge(part)  # the first has seen nothing, as an idle rank
    torch.testing.assert_close(parts[0].sums, whole.sums, rtol=1e-13, atol=1e-13)
    rmse = (errors.squared_error.sum(0) / errors.weight.sum(0)).sqrt()
    torch.testing.assert_close(rmse, whole.values()["rmse"][0])


def test_a_broken_forecast_shows_in_every_score():
    forecast, truth, climatology, valid = windows(GLOBE)
    forecast[2, 0, 1][valid[2, 0, 1]] = torch.nan
    scores = ForecastScores(cell_weights(GLOBE), regions_of(GLOBE))
    scores.update(forecast, truth, climatology, valid)
    for name, values in scores.values().items():
        assert values[0, 0, 1].isnan(), name
        assert values[0, 0, 0].isfinite() and values[0, 1, 1].isfinite(), name


def test_climatology_itself_has_no_correlation():
    _, truth, climatology, valid = windows(GLOBE)
    scores = ForecastScores(cell_weights(GLOBE), regions_of(GLOBE))
    scores.update(climatology, truth, climatology, valid)
    assert scores.values()["acc"].isnan().all() and scores.values()["rmse"].isfinite().all()


def test_area_and_cosine_weights_differ_at_the_poles_only():
    area, cos = cell_weights(GLOBE, "area"), cell_weights(GLOBE, "cos")
    torch.testing.assert_close(cos[0], torch.zeros(12, dtype=torch.float64), atol=1e-15, rtol=0)
    assert (area[0] > 0.05).all()
    inner = slice(1, -1)
    torch.testing.assert_close(area[inner] / area[inner].mean(), cos[inner] / cos[inner].mean())


def test_unknown_weights_are_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match="allowed: area, cos"):
        cell_weights(GLOBE, "latitude")
    with pytest.raises(ValueError, match="use weights=area"):
        cell_weights(Points([[0.0, 0.0]]), "cos")


def test_regions_follow_the_grid():
    assert list(regions_of(GLOBE)) == ["all", "northern extratropics", "tropics", "southern extratropics"]
    north = LatLonGrid([50, 55, 60], [0, 5, 10])
    assert list(regions_of(north)) == ["all", "northern extratropics"]
    fraction = torch.zeros(3, 3)
    fraction[0] = 0.7
    masks = regions_of(north, land_fraction=fraction, boxes={"west": [45, 58, -2, 6]})
    assert masks["land"].sum() == 3 and masks["sea"].sum() == 6
    assert masks["west"].tolist() == [[True, True, False], [True, True, False], [False, False, False]]


def test_a_box_may_cross_any_meridian():
    mask = regions_of(GLOBE, boxes={"box": [-10, 10, 330, 30]})["box"]
    assert sorted(GLOBE.longitude[mask[3].numpy()].tolist()) == [0, 30, 330]
    with pytest.raises(ValueError, match="south below north"):
        regions_of(GLOBE, boxes={"box": [10, -10, 0, 30]})
    with pytest.raises(ValueError, match="holds no cell"):
        regions_of(REGION, boxes={"box": [60, 70, 0, 30]})


def test_a_pure_wave_has_its_power_at_its_wavenumber():
    grid = LatLonGrid(np.linspace(80, -80, 5), np.arange(0, 360, 10.0))
    longitude = torch.deg2rad(torch.from_numpy(grid.longitude))
    truth = (7 + 3 * torch.cos(4 * longitude + 1)).expand(2, 1, 1, 5, 36)
    forecast = (7 + 1.5 * torch.cos(4 * longitude)).expand(2, 1, 1, 5, 36)
    spectra = ZonalSpectra(grid)
    spectra.update(forecast, truth)
    expected = torch.zeros(1, 1, 19, dtype=torch.float64)
    expected[..., 0], expected[..., 4] = 49, 9 / 2
    torch.testing.assert_close(spectra.values()[1], expected, atol=1e-12, rtol=0)
    assert spectra.values()[0][0, 0, 4] == pytest.approx(1.5**2 / 2) and spectra.wavenumbers[4] == 4


def test_spectra_leave_out_incomplete_rows_and_merge():
    grid = LatLonGrid(np.linspace(80, -80, 5), np.arange(0, 360, 30.0))
    forecast, truth, _, valid = windows(grid, count=6)
    valid[:3, :, :, 2:] = True
    truth, forecast = (torch.where(valid, item.nan_to_num(3.0), torch.nan) for item in (truth, forecast))
    whole, first, second = (ZonalSpectra(grid) for _ in range(3))
    whole.update(forecast, truth)
    first.update(forecast[:2], truth[:2], valid[:2])
    second.update(forecast[2:], truth[2:], valid[2:])
    first.merge(second)
    for one, other in zip(whole.values(), first.values(), strict=True):
        torch.testing.assert_close(one, other)
    weights, power, total = grid.area_weights.sum(1).numpy(), np.zeros(7), 0.0
    rows = truth[:, 1, 0].double().numpy()
    for window in range(6):
        for row in range(5):
            if np.isfinite(rows[window, row]).all():
                spectrum = np.abs(np.fft.rfft(rows[window, row]) / 12) ** 2 * np.array([1, 2, 2, 2, 2, 2, 1])
                power, total = power + weights[row] * spectrum, total + weights[row]
    np.testing.assert_allclose(whole.values()[1][1, 0], power / total, rtol=1e-12)


def test_regional_spectra_ignore_trends_and_keep_the_variance():
    longitude = np.linspace(0, 89, 90)
    grid = LatLonGrid([0.0, 1.0], longitude)
    ramp = torch.from_numpy(5 + 0.3 * longitude)
    spectra = ZonalSpectra(grid)
    assert spectra.power(ramp).abs().max() < 1e-20
    wave = 2 * torch.cos(2 * torch.pi * torch.arange(90, dtype=torch.float64) * 9 / 90)
    power = spectra.power(wave + ramp)
    assert power.argmax() == 9 and spectra.wavenumbers[9] == pytest.approx(36)
    assert power.sum() == pytest.approx(2.0, rel=0.02)


def test_spectra_refuse_unsuited_rows():
    assert not ZonalSpectra.fits(Points([[0.0, 0.0]])) and not ZonalSpectra.fits(LatLonGrid([0.0], [0.0, 1.0]))
    with pytest.raises(ValueError, match="evenly spaced"):
        ZonalSpectra(LatLonGrid([0.0], np.arange(12.0) ** 1.5))
