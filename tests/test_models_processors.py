"""Processors: what a token attends to, shared weights, symmetry under turns of the globe."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.grids import LatLonGrid
from models.latents import LatentLayout, Latents
from models.patches import Patches
from models.processors.latent_transformer import LatentTransformer
from models.processors.spatial_transformer import SpatialTransformer
from tests.model_examples import REGION, tiny_layout


def test_latent_transformer_applies_its_block_repeatedly():
    layout = LatentLayout(num_tokens=5, hidden_size=8)
    options = dict(depth=2, num_heads=2)
    once, twice = (LatentTransformer(tiny_layout(), layout, num_blocks=n, **options) for n in (1, 2))
    twice.load_state_dict(once.state_dict())
    latents = Latents(tokens=torch.randn(2, 1, 5, 8), times=torch.zeros(2, 1, dtype=torch.int64))
    torch.testing.assert_close(twice(latents).tokens, once(once(latents)).tokens)


def test_spatial_transformer_turns_with_the_globe():
    patches = Patches.of(LatLonGrid(np.linspace(75, -75, 6), np.arange(12) * 30.0), 2)
    processor = SpatialTransformer(tiny_layout(), patches.latent_layout(16), depth=2, num_heads=2).eval()
    times = torch.zeros(1, 1, dtype=torch.int64)
    tokens = torch.randn(1, 1, 3, 6, 16)
    straight = processor(Latents(tokens=tokens.flatten(2, 3), times=times)).tokens.reshape(1, 1, 3, 6, 16)
    turned = processor(Latents(tokens=tokens.roll(2, dims=3).flatten(2, 3), times=times)).tokens
    torch.testing.assert_close(turned.reshape(1, 1, 3, 6, 16), straight.roll(2, dims=3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wraps", (False, True))
def test_local_spatial_attention_reaches_its_radius_only(wraps):
    latent = replace(Patches.of(REGION, 1).latent_layout(16), wraps=wraps)
    processor = SpatialTransformer(tiny_layout(), latent, depth=1, num_heads=2, radius=1).eval()
    times = torch.zeros(1, 1, dtype=torch.int64)
    tokens = torch.randn(1, 1, 63, 16)
    changed = tokens.clone()
    changed[0, 0, 9 * 3] += torch.randn(16)  # row 3, column 0
    outputs = [processor(Latents(tokens=given, times=times)).tokens for given in (tokens, changed)]
    moved = ((outputs[0] - outputs[1]).abs().amax(dim=-1) > 1e-6).reshape(7, 9)
    rows, columns = moved.nonzero().T.tolist()
    expected = {(r, c) for r in (2, 3, 4) for c in ((0, 1, 8) if wraps else (0, 1))}
    assert set(zip(rows, columns, strict=True)) == expected


def test_cells_whose_neighbours_are_all_masked_stay_finite():
    processor = SpatialTransformer(
        tiny_layout(), Patches.of(REGION, 1).latent_layout(16), depth=2, num_heads=2, radius=1
    )
    valid = torch.zeros(1, 1, 63, dtype=torch.bool)
    valid[..., 60] = True
    tokens = torch.where(valid[..., None], torch.randn(1, 1, 63, 16), torch.nan).requires_grad_()
    output = processor(Latents(tokens=tokens, times=torch.zeros(1, 1, dtype=torch.int64), valid=valid)).tokens
    output[valid].sum().backward()
    assert torch.isfinite(output).all() and torch.isfinite(tokens.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in processor.parameters())
