"""Motion of rain and images moved along it, against known motion and brute-force interpolation."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from data.motion import COARSENING, estimate_motion, moved, origins, trajectories
from data.rainfall import from_log, rate_of_reflectivity, to_log
from tests.radar_examples import MOTION, showers


def logs(rates) -> torch.Tensor:
    return to_log(torch.from_numpy(rates))


@pytest.mark.parametrize(("frames", "gaps"), [((0, 1, 2), [1, 1]), ((0, 2), [2]), ((0, 1, 3), [1, 2])])
def test_the_motion_of_drifting_showers_is_found_also_across_missing_frames(frames, gaps):
    images = logs(showers(4, 128, 128))[list(frames)]
    motion = estimate_motion(images, torch.ones_like(images, dtype=torch.bool), gaps)
    assert motion.shape == (2, 128 // COARSENING, 128 // COARSENING)
    inner = motion[:, 4:-4, 4:-4]
    torch.testing.assert_close(inner.mean(dim=(1, 2)), torch.tensor(MOTION), atol=0.15, rtol=0)
    assert (inner - torch.tensor(MOTION)[:, None, None]).abs().mean() < 0.2


def test_what_is_not_valid_is_never_read():
    images = logs(showers(3, 96, 96))
    valid = torch.rand(96, 96, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1) > 0.1
    expected = estimate_motion(torch.where(valid, images, 0.0), valid, [1, 1])
    motion = estimate_motion(torch.where(valid, images, torch.nan), valid, [1, 1])
    assert torch.isfinite(motion).all()
    torch.testing.assert_close(motion, expected)


def test_one_image_and_dry_images_are_at_rest():
    assert not estimate_motion(torch.rand(1, 40, 40), torch.ones(1, 40, 40, dtype=torch.bool), []).any()
    dry = estimate_motion(torch.zeros(3, 40, 40), torch.ones(3, 40, 40, dtype=torch.bool), [1, 1])
    assert torch.isfinite(dry).all() and dry.abs().max() < 1e-6


def test_constant_motion_adds_up_and_moves_images_like_spline_interpolation_of_order_one():
    motion = torch.tensor(MOTION)[:, None, None].expand(2, 8, 9)
    paths = trajectories(motion, 4)
    torch.testing.assert_close(paths[3], 3 * motion)
    images = torch.from_numpy(showers(2, 64, 72))
    rows, columns = slice(-3, 40), slice(10, 80)
    found = moved(images, origins(paths[3], rows, columns)).double().numpy()
    y, x = np.mgrid[rows.start : rows.stop, columns.start : columns.stop].astype(float)
    padded = np.pad(images.numpy().astype(np.float64), ((0, 0), (20, 20), (20, 20)))
    for image, result in zip(padded, found, strict=True):
        places = [y - 3 * MOTION[0] + 20, x - 3 * MOTION[1] + 20]
        np.testing.assert_allclose(result, map_coordinates(image, places, order=1), atol=2e-4)


def test_trajectories_follow_a_rotation():
    rows = columns = 16
    y, x = torch.meshgrid(*[COARSENING * (torch.arange(16.0) - 7.5)] * 2, indexing="ij")
    angle = 0.05
    paths = trajectories(torch.stack([angle * x, -angle * y]), 10)[10]
    turned = 10 * angle
    start = torch.stack([np.cos(turned) * y - np.sin(turned) * x, np.cos(turned) * x + np.sin(turned) * y])
    middle = (slice(None), slice(5, rows - 5), slice(5, columns - 5))
    torch.testing.assert_close((torch.stack([y, x]) - paths)[middle], start[middle], atol=0.6, rtol=0)


def test_coarse_images_lie_over_the_pixels_that_they_average():
    fine = torch.arange(32.0).expand(1, 24, 32)
    coarse = torch.nn.functional.avg_pool2d(fine, 4)
    still = origins(torch.zeros(2, 1, 1), slice(8, 16), slice(8, 16))
    torch.testing.assert_close(moved(coarse, still, cell=4), fine[:, 8:16, 8:16])


def test_rain_rates_and_their_logarithms():
    rates = torch.tensor([0.0, 0.1, 0.5, 20.0])
    torch.testing.assert_close(from_log(to_log(rates)), rates)
    assert to_log(torch.tensor(-1.0)) == 0 and from_log(torch.tensor(-0.3)) == 0
    np.testing.assert_allclose(rate_of_reflectivity(np.array([23.0, 39.0])), [1.0, 10.0], rtol=0.02)
