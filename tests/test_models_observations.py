"""Models that read observations: each row counts for its own sample, in any order, and for no earlier frame."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data.observations import check
from models import build
from models.frame_dropout import row_numbers
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
    "neighbours": ["model=healda_v2", "model/encoder=local_perceiver"],
    "groups": ["model=healda_v2", "model/encoder=hierarchical_perceiver"],
}
IDS = ("batch", "frame", "channel", "platform", "type")


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


@pytest.mark.parametrize("given", READERS.values(), ids=READERS)
def test_the_width_of_ids_changes_nothing(given):
    layout = observed_layout()
    model, batch = built(given, layout), tiny_batch(layout)
    rows = batch.observations

    def with_ids(dtype):
        return model(
            replace(batch, observations=replace(rows, **{name: getattr(rows, name).to(dtype) for name in IDS}))
        )

    wide = with_ids(torch.int64)["forecast"]
    assert torch.equal(with_ids(torch.int16)["forecast"], wide) and torch.equal(with_ids(torch.int32)["forecast"], wide)


def test_ids_of_more_kinds_than_16_bits_hold_are_sound():
    layout = observed_layout()
    many = replace(layout.observations, num_platforms=40_000)
    rows = tiny_batch(layout).observations
    check(replace(rows, platform=rows.platform.short()), many)
    with pytest.raises(ValueError, match=r"1 have platform outside 0 \.\. 39999"):
        check(replace(rows, platform=torch.where(torch.arange(len(rows)) == 3, 40_000, rows.platform)), many)


def test_numbers_of_rows_do_not_overflow_with_narrow_ids():
    """The 40,000th frame, for which 16 bits are too few."""
    rows = tiny_batch(observed_layout()).observations
    times = torch.zeros(400, 100, dtype=torch.int64)
    last = {"batch": torch.full_like(rows.batch, 399), "frame": torch.full_like(rows.frame, 99)}
    far = replace(rows, times=times, second_of_day=None, day_of_year=None, **last)
    narrow = replace(far, batch=far.batch.short(), frame=far.frame.short())
    assert (narrow.flat_frame() == 39_999).all()
    assert torch.equal(row_numbers(narrow, 7, 0), row_numbers(far, 7, 0))


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
