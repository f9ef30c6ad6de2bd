"""Motion of rain in radar images, and images moved along it.

`estimate_motion` finds the displacement per frame that best explains the last frames, by least squares in Gaussian
windows, from coarse images to fine ones with warping in between (Lucas and Kanade 1981, IJCAI; Bouguet 2001), and
spreads it to where nothing is seen. `trajectories` follows it backwards in time (semi-Lagrangian, Germann and Zawadzki
2002, Mon. Wea. Rev. 130) and `moved` reads images where the trajectories start.
Letters: n frames, H x W pixels, h x w wider ones, K steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from data.convolution import convolved

LEVELS = 5  # of the pyramid, each half the size of the one before
FINEST = 1  # level at which motion is resolved: every second pixel
COARSENING = 8  # pixels a side of what is kept of it: motion is smooth
WINDOW = 8.0  # deviation of the Gaussian window, in pixels of a level
ITERATIONS = 3
MOTION_FRAMES = 3  # the last ones, that tell the motion
_PRIOR = 0.02  # pull towards the coarser level's motion, in shares of the mean gradient
_LARGEST = 3.0  # pixels a level may add in one iteration


def estimate_motion(images: Tensor, valid: Tensor, gaps: Sequence[int]) -> Tensor:
    """(2, h, w) rows and columns that content moves per frame, in pixels of the images, for every 8 x 8 of them.

    images: (n, H, W), logarithms of rain, 0 where dry; valid: (n, H, W) bool, other pixels are not read. gaps: (n - 1)
    frames from each image to the next, above 1 where frames are missing. Zero where fewer than two images are given.
    """
    if images.shape[0] < 2:
        return torch.zeros(2, *(-(-side // COARSENING) for side in images.shape[-2:]))
    levels = [(torch.where(valid, images, 0.0), valid.float())]
    for _ in range(LEVELS - 1):
        if len(levels) > FINEST and min(levels[-1][0].shape[-2:]) < 16:
            break
        levels.append(tuple(halved(item) for item in levels[-1]))
    motion = torch.zeros(2, *levels[-1][0].shape[-2:])
    for image, seen in reversed(levels[FINEST:]):
        if motion.shape[-2:] != image.shape[-2:]:
            motion = 2 * _resized(motion, image.shape[-2:])
        image, seen = _smooth(image, 1.0), (seen > 0.99).float()
        for _ in range(ITERATIONS):
            motion = _refined(motion, image, seen, gaps)
    return F.avg_pool2d(motion * 2.0**FINEST, COARSENING // 2**FINEST, ceil_mode=True)


def _refined(motion: Tensor, images: Tensor, seen: Tensor, gaps: Sequence[int]) -> Tensor:
    """One step of Gauss and Newton: the motion (2, h, w) that also explains what the present one leaves."""
    terms = 0.0
    for first, (image, after) in enumerate(pairwise(images)):
        gap = gaps[first]
        image = _shifted(image, gap * motion, padding="border")
        weight = _shifted(seen[first], gap * motion, padding="zeros") * seen[first + 1]
        down, across = torch.gradient((image + after) / 2)
        down, across, change = gap * down, gap * across, image - after
        products = (down * down, down * across, across * across, down * change, across * change)
        terms = terms + torch.stack([weight * item for item in products])
    yy, yx, xx, yt, xt = _smooth(terms, WINDOW)
    prior = _PRIOR * (yy + xx).mean() / 2 + 1e-9
    yy, xx = yy + prior, xx + prior
    determinant = yy * xx - yx * yx
    step = torch.stack([xx * yt - yx * xt, yy * xt - yx * yt]) / determinant
    motion = motion + step.clamp(-_LARGEST, _LARGEST)
    trust = yy + xx - 2 * prior
    trust = trust + 1e-3 * trust.max() + 1e-12
    spread = _smooth(torch.cat([motion * trust, trust[None]]), WINDOW)
    return spread[:2] / spread[2:]


def trajectories(motion: Tensor, steps: int) -> Tensor:
    """(K + 1, 2, h, w): how far, in rows and columns of the images, content has moved when it arrives k frames later.

    motion: (2, h, w) of `estimate_motion`, taken as lasting. Each step is the motion half way along itself.
    """
    motion = motion / COARSENING
    along = [torch.zeros_like(motion)]
    for _ in range(steps):
        half = _shifted(motion, along[-1], padding="border") / 2
        along.append(along[-1] + _shifted(motion, along[-1] + half, padding="border"))
    return torch.stack(along) * COARSENING


def origins(displacement: Tensor, rows: slice, columns: slice) -> Tensor:
    """(2, rows, columns): the rows and columns from which content arrives in a window of the images.

    displacement: (2, h, w) of `trajectories`. The window may reach beyond the images.
    """
    y = torch.arange(rows.start, rows.stop, dtype=torch.float32)
    x = torch.arange(columns.start, columns.stop, dtype=torch.float32)
    places = torch.stack(torch.meshgrid(y, x, indexing="ij"))
    return places - _sampled(displacement, places, COARSENING, padding="border")


def moved(images: Tensor, origin: Tensor, *, cell: int = 1) -> Tensor:
    """(c, rows, columns): images (c, h, w) as they arrive from `origins`, bilinear; 0 from beyond them.

    cell: side, in pixels of the origins, of the images' own pixels.
    """
    return _sampled(images, origin, cell, padding="zeros")


def _sampled(images: Tensor, places: Tensor, cell: int, *, padding: str) -> Tensor:
    """images (c, h, w), whose pixels are `cell` a side, at fractional rows and columns (2, ...)."""
    sides = (cell * side for side in images.shape[-2:])
    scaled = [(2 * place + 1) / side - 1 for place, side in zip(places, sides, strict=True)]
    grid = torch.stack(scaled[::-1], dim=-1)[None]
    return F.grid_sample(images[None], grid, mode="bilinear", padding_mode=padding, align_corners=False)[0]


def _shifted(images: Tensor, displacement: Tensor, *, padding: str) -> Tensor:
    """images ([c,] h, w) moved by (2, h, w) of their own pixels."""
    stacked = images if images.ndim == 3 else images[None]
    rows, columns = (torch.arange(number, dtype=torch.float32) for number in images.shape[-2:])
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    return _sampled(stacked, places - displacement, 1, padding=padding).view_as(images)


def _smooth(images: Tensor, deviation: float) -> Tensor:
    """(c, h, w) in a Gaussian window; what lies beyond the edge counts as 0."""
    reach = int(3 * deviation + 0.5)
    offset = torch.arange(-reach, reach + 1, dtype=images.dtype)
    kernel = torch.exp(-(offset**2) / (2 * deviation**2))
    return convolved(images, kernel / kernel.sum())


def _resized(motion: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(motion[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def halved(values: Tensor) -> Tensor:
    """(c, h, w) -> (c, h / 2, w / 2), rounded up, smoothed first."""
    return F.avg_pool2d(_smooth(values, 0.8)[:, None], 2, ceil_mode=True)[:, 0]
