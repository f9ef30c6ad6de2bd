"""What the parts of the monthly model compute, against their formulas in float64: values, gradients, running
statistics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from models.decoders.composed_spread import composes, spread_composed, spread_in_steps
from models.decoders.normed_gelu import normed_gelu
from models.encoders import weighed_days as weighing
from models.encoders.month_aggregation import MonthAggregator
from models.positions.geography import domain_sizes, spherical_harmonics
from models.positions.sinusoidal import grid_sinusoids, sinusoids


def same_gradients(ours, wanted, inputs):
    weights = torch.randn_like(wanted)
    assert_close(ours, wanted)
    found, expected = (torch.autograd.grad((x * weights).sum(), inputs, allow_unused=True) for x in (ours, wanted))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("patch", "overlap", "cells"),
    [((4, 4), 1, (7, 6)), ((4, 4), 0, (3, 2)), ((2, 3), 1, (1, 1)), ((2, 2), 2, (4, 9)), ((1, 1), 1, (5, 6))],
)
def test_three_layers_as_one_convolution(patch, overlap, cells):
    torch.manual_seed(0)
    kernel = [side + 2 * overlap for side in patch]
    project = nn.Conv2d(6, 10, 1).double()
    spread = nn.ConvTranspose2d(10, 5, kernel, stride=patch, padding=overlap).double()
    refine = nn.Conv2d(5, 5, 3, padding=1).double()
    assert composes(spread)
    x = torch.randn(2, 6, *cells, dtype=torch.float64, requires_grad=True)
    inputs = [x, *project.parameters(), *spread.parameters(), *refine.parameters()]
    wanted = spread_in_steps(x, project, spread, refine).movedim(1, -1)
    same_gradients(spread_composed(x, project, spread, refine), wanted, inputs)


@pytest.mark.parametrize("readout", (False, True))
def test_norm_gelu_and_readout_in_pieces(readout, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("models.decoders.normed_gelu._PIECE", 37)
    norm = nn.BatchNorm2d(8).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    plain = copy.deepcopy(norm)
    x = (3 * torch.randn(2, 7, 9, 8, dtype=torch.float64) + 5).requires_grad_()
    matrix, constant = torch.randn(3, 8).double().requires_grad_(), torch.randn(3).double().requires_grad_()
    wanted = F.gelu(F.batch_norm(x.movedim(-1, 1), None, None, norm.weight, norm.bias, True)).movedim(1, -1)
    plain(x.movedim(-1, 1))
    inputs = [x, *norm.parameters()]
    if readout:
        inputs, wanted = [*inputs, matrix, constant], F.linear(wanted, matrix, constant)
    same_gradients(normed_gelu(x, norm, (matrix, constant) if readout else (None, None)), wanted, inputs)
    for ours, theirs in zip(norm.buffers(), plain.buffers(), strict=True):
        assert_close(ours, theirs)
    assert_close(normed_gelu(x, norm.eval()), F.gelu(norm(x.movedim(-1, 1))).movedim(1, -1))


def test_weighed_days_in_pieces(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(weighing, "PIECE_TOKENS", 8)
    months, places, days, values, hidden = 3, 5, 4, 6, 8
    embed, norm = nn.Linear(values, hidden).double(), nn.LayerNorm(hidden).double()
    aggregator = MonthAggregator(hidden, num_heads=2).double()
    patches = torch.randn(months, places, days, values).double()
    code, day = (torch.randn(months, days, hidden).double().requires_grad_() for _ in range(2))
    present = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    ours = aggregator.weighed(patches, code, day, present, embed=embed, norm=norm)
    wanted = torch.stack(
        [aggregator.days(norm(embed(x)), *rest) for x, *rest in zip(patches, code, day, present, strict=True)]
    )
    assert not wanted[2].any()  # a month of padded days
    scorer = (aggregator.score_norm, aggregator.score_up, aggregator.score_out)
    inputs = [code, day, *(part for layer in (embed, norm, *scorer) for part in layer.parameters())]
    same_gradients(ours, wanted, inputs)
    assert ours.isfinite().all()


def test_sinusoids_follow_their_formula():
    table = sinusoids(5, 6).double()
    for position in range(5):
        for pair in range(3):
            angle = torch.tensor(position * 10_000 ** (-2 * pair / 6))
            assert_close(
                table[position, 2 * pair : 2 * pair + 2],
                torch.stack([angle.sin(), angle.cos()]).double(),
                rtol=0,
                atol=1e-6,
            )
    summed = grid_sinusoids(3, 3, 8, mode="sum").view(3, 3, 8)
    assert torch.equal(summed, summed.transpose(0, 1)) and torch.equal(summed[..., :4], summed[..., 4:])
    apart = grid_sinusoids(3, 3, 8).view(3, 3, 8)
    assert torch.equal(apart[2, 1], torch.cat([sinusoids(3, 4)[2], sinusoids(3, 4)[1]]))


def test_harmonics_are_orthonormal_and_those_of_scipy():
    import numpy as np
    from scipy.special import lpmv

    nodes, weights = np.polynomial.legendre.leggauss(12)
    places = np.stack(np.meshgrid(np.degrees(np.arcsin(nodes)), np.arange(24) * 15.0, indexing="ij"), axis=-1)
    harmonics = spherical_harmonics(torch.from_numpy(places), 5).double()
    gram = torch.einsum("ijk,ijl,i->kl", harmonics, harmonics, torch.from_numpy(weights)) / 48
    assert_close(gram, torch.eye(36).double(), rtol=0, atol=1e-6)
    legendre = lpmv(2, 4, nodes)  # n = 4, m = 2: column 16 + 4 + 2 - 0
    wanted = legendre[:, None] * np.cos(2 * np.radians(places[0, :, 1]))
    found = harmonics[..., 4 * 4 + 4 + 2].numpy()
    assert abs(np.corrcoef(found.ravel(), wanted.ravel())[0, 1]) > 1 - 1e-9


def test_sizes_of_a_domain_in_kilometres():
    rows, columns = torch.linspace(44, 46, 21), torch.linspace(359, 361, 21) % 360  # across the meridian
    sizes = domain_sizes(torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)).exp()
    degree = torch.pi * 6371 / 180
    assert_close(sizes[1], torch.tensor(2.1 * degree), rtol=1e-4, atol=0)
    assert_close(sizes[0], torch.tensor(2.1 * degree * 0.5**0.5), rtol=1e-3, atol=0)
    assert_close(sizes[3] * sizes[1], sizes[0])
    assert_close(sizes[8] * sizes[0], torch.tensor(180 * degree))
