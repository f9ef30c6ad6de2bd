"""A projection, an overlapping transposed convolution and a 3 x 3 convolution as one convolution of latent cells.

The three are linear, so they compose: each block of p x q output cells is a small convolution of the latent cells
around it. For patches of 4 and an overlap of 1 that is a third of the multiplications, and the image between is never
made. What the composition adds wrongly, values of that image beyond its edges, is taken away again, so that the result
is exact. Letters: B batch, D channels of a cell, K and c channels of the two convolutions, R x S latent cells, p x q
patch, o overlap, k = p + 2 o its kernel, n latent cells that a block reads along an axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def spread_in_steps(cells: Tensor, project: nn.Conv2d, spread: nn.ConvTranspose2d, refine: nn.Conv2d) -> Tensor:
    """(B, D, R, S) -> (B, c, R p, S q): the formula."""
    return refine(spread(project(cells)))


def composes(spread: nn.ConvTranspose2d) -> bool:
    """Whether `spread_composed` can: only cells at the edge may write beyond it."""
    return all(overlap <= side for overlap, side in zip(spread.padding, spread.stride, strict=True))


def spread_composed(cells: Tensor, project: nn.Conv2d, spread: nn.ConvTranspose2d, refine: nn.Conv2d) -> Tensor:
    """As `spread_in_steps`, channels last in memory: (B, R p, S q, c)."""
    weight = torch.einsum("kd,kcuv->dcuv", project.weight[:, :, 0, 0], spread.weight)
    constant = torch.einsum("k,kcuv->cuv", project.bias, spread.weight)[None]
    kernel, blocks = _kernel(weight, spread, refine)
    images = F.conv2d(cells, kernel, padding=[n - 1 for n in blocks])  # (B, p q c, R + n - 1, S + n - 1)
    (p, q), (o, _) = spread.stride, spread.padding
    images = rearrange(images.movedim(1, -1), "b r s (j i c) -> b (r j) (s i) c", j=p, i=q)
    margins = [(n - 1) * side - o - 1 for n, side, o in zip(blocks, spread.stride, spread.padding, strict=True)]
    images = F.pad(images, (0, 0, -spread.padding[1] - 1, -margins[1], -o - 1, -margins[0]))  # one copy, unlike slices
    images = images.add_(_constant_image(constant, cells.shape[2:], blocks, spread, refine))
    return _Without.apply(images, *_beyond(cells, weight, spread, refine)) if o else images


def _kernel(weight: Tensor, spread: nn.ConvTranspose2d, refine: nn.Conv2d) -> tuple[Tensor, list[int]]:
    """(p q c, D, n, n'), which writes a block of cells from the latent cells around it, and n, n'.

    Block b starts o + 1 cells before latent cell b, and offset u of a kernel of k + 2 cells lies in block u // p.
    """
    composed = F.conv2d(weight, refine.weight, padding=2)  # (D, c, k + 2, k' + 2)
    blocks = [-(-side // stride) for side, stride in zip(composed.shape[2:], spread.stride, strict=True)]
    missing = [n * p - side for n, p, side in zip(blocks, spread.stride, composed.shape[2:], strict=True)]
    composed = F.pad(composed, (0, missing[1], 0, missing[0]))
    (n, m), (p, q) = blocks, spread.stride
    kernel = rearrange(composed, "d c (n j) (m i) -> (j i c) d n m", n=n, m=m, j=p, i=q).flip(2, 3)
    return kernel.contiguous(memory_format=torch.channels_last), blocks


def _constant_image(
    constant: Tensor, latent: tuple[int, int], blocks: list[int], spread: nn.ConvTranspose2d, refine: nn.Conv2d
) -> Tensor:
    """(R p, S q, c): what biases give. It repeats from patch to patch except near the edges, so that a small image has
    all of it."""
    small = [min(side, 2 * n + 1) for side, n in zip(latent, blocks, strict=True)]
    ones = constant.new_ones(1, 1, *small)
    image = F.conv_transpose2d(ones, constant, spread.bias, stride=spread.stride, padding=spread.padding)
    image = refine(image)[0].movedim(0, -1)  # (small R p, small S q, c)
    for axis, (side, few, n) in enumerate(zip(latent, small, blocks, strict=True)):
        patch = torch.arange(side, device=image.device)
        patch = torch.where(patch < n, patch, torch.where(patch >= side - n, patch - side + few, min(n, few - 1)))
        inside = torch.arange(spread.stride[axis], device=image.device)
        image = image.index_select(axis, (patch[:, None] * spread.stride[axis] + inside).flatten())
    return image


def _beyond(cells: Tensor, weight: Tensor, spread: nn.ConvTranspose2d, refine: nn.Conv2d) -> list[Tensor]:
    """What one ring of cells around the image would add to its first and last row (B, S q, c) and column (B, R p, c).

    The corners of the ring count with the rows.
    """
    (p, q), (o, overlap) = spread.stride, spread.padding
    rows, columns = [], []
    for cell, offset, tap in ((0, o - 1, 0), (-1, o + p, 2)):
        line = F.conv_transpose1d(cells[:, :, cell], weight[:, :, offset], stride=q)  # (B, K, S q + 2 o)
        line = line[:, :, overlap - 1 : overlap + 1 + cells.shape[3] * q]
        rows.append(F.conv1d(line, refine.weight[:, :, tap]).transpose(1, 2))
    for cell, offset, tap in ((0, overlap - 1, 0), (-1, overlap + q, 2)):
        line = F.conv_transpose1d(cells[:, :, :, cell], weight[:, :, :, offset], stride=p, padding=o)
        columns.append(F.conv1d(line, refine.weight[:, :, :, tap], padding=1).transpose(1, 2))
    return [*rows, *columns]


class _Without(torch.autograd.Function):
    """images minus lines at its edges, in place: copies of whole images would cost more than the lines."""

    @staticmethod
    def forward(ctx, images: Tensor, first: Tensor, last: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.mark_dirty(images)
        images[:, 0] -= first
        images[:, -1] -= last
        images[:, :, 0] -= left
        images[:, :, -1] -= right
        return images

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, -gradient[:, 0], -gradient[:, -1], -gradient[:, :, 0], -gradient[:, :, -1]
