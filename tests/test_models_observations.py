"""Models that read observations: each row counts for its own sample, in any order, and for no earlier frame."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models import build
from tests.model_examples import GLOBAL, SPHERE, observed_layout, tiny_batch

TINY = ["model/size=tiny", "model.hidden_size=16", "model.depth=1", "model.num_heads=2", "model.num_latents=6"]
TINY += ["model.patch_size=2", "model.observation_heads=2"]


def built(given: list[str], layout):
    """A tiny model with random weights everywhere, gates and heads included."""
    torch.manual_seed(0)
    model = build([*given, *TINY], layout).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


READERS = {
    "processor": ["model=healda_v2"],
    "encoder": ["model=healda_v2", "model/processor=latent_transformer"],
    "free latents": ["model=healda_v2", "model/encoder=perceiver"],
    "joint free latents": ["model=healda_v2", "model/encoder=perceiver", "model.encoder.frames=joint"],
}


@pytest.mark.parametrize("given", READERS.values(), ids=READERS)
@pytest.mark.parametrize("grid", (SPHERE, GLOBAL), ids=("healpix", "latlon"))
def test_observations_count_in_any_order_for_their_own_sample_only(given, grid):
    layout = observed_layout(grid)
    model = built(given, layout)
    batch = tiny_batch(layout)
    before = model(batch)["forecast"]
    rows = batch.observations

    def after(observations):
        return model(replace(batch, observations=observations))["forecast"]

    torch.testing.assert_close(after(rows.chosen(torch.randperm(len(rows)))), before, rtol=1e-4, atol=1e-4)
    of_first = rows.batch == 0
    other = after(replace(rows, value=torch.where(of_first, rows.value, rows.value + 1)))
    torch.testing.assert_close(other[0], before[0], rtol=1e-4, atol=1e-4)
    assert (other[1] - before[1]).abs().max() > 1e-3
    alone = after(rows.chosen(of_first))
    torch.testing.assert_close(alone[0], before[0], rtol=1e-4, atol=1e-4)


def test_an_analysis_reads_no_later_observation():
    layout = observed_layout(frames=3)
    model = built(["model=healda_v2"], layout)
    batch = tiny_batch(layout)
    rows = batch.observations
    before = model(batch)["forecast"]
    later = replace(rows, value=torch.where(rows.frame == 2, rows.value + 1, rows.value))
    after = model(replace(batch, observations=later))["forecast"]
    assert torch.equal(after[:, :2], before[:, :2])
    assert (after[:, 2] - before[:, 2]).abs().max() > 1e-3
