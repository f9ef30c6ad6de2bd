"""Masked auto-encoding: what is hidden, what the loss and the scores are of, and the baselines beside them."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

import train
from data.covariances import distances, matern32, positions
from data.datasets.masked_fields import block_mask
from evaluation.baselines.field_interpolation import FieldInterpolation, MaskedSituation
from models.composition import build_from_config, compose
from tests.tiny_run import tiny_data
from training import command_line
from training.tasks.masked_autoencode import MaskedAutoencodeTask

SMALL = ["model.encoder.hidden_size=8", "model.encoder.num_latents=16", "model.encoder.num_heads=2"]
SMALL += ["model.encoder.groups=[4,1,4]", "model.encoder.self_per_cross=1", "model.encoder.embed_size=8"]


def task(**changes) -> MaskedAutoencodeTask:
    settings = dict(input_frames=3, mask_ratio=0.5, mask_block=2, stride=3, head="deterministic", loss="mse")
    return MaskedAutoencodeTask(**(settings | changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("masked"), times=240, missing=0.05)


@pytest.mark.parametrize("ratio, count", ((0.5, 6), (0.85, 10), (0.999, 11), (0.001, 1)))
def test_blocks_of_every_frame_are_hidden_in_the_wanted_share(ratio, count):
    noise = torch.rand(2, 3, 12, generator=torch.Generator().manual_seed(0))
    mask = block_mask(noise, (7, 10), ratio=ratio, block=3)
    assert mask.shape == (2, 3, 1, 7, 10)
    blocks = (
        torch.nn.functional.pad(mask[:, :, 0].float(), (0, 2, 0, 2), value=torch.nan).unfold(2, 3, 3).unfold(3, 3, 3)
    )
    means = blocks.flatten(-2).nanmean(dim=-1).flatten(2)
    assert ((means == 0) | (means == 1)).all() and (means.sum(dim=-1) == count).all()
    assert len({tuple(row) for row in means.flatten(0, 1).tolist()}) > 1


def test_what_is_hidden_is_wanted_and_nothing_else(data):
    chosen, statistics = task(), task().fit(data)
    dataset = chosen.dataset(data, "test", statistics)
    batch = dataset.__getitems__([0, 1])
    given, target = batch.inputs["prognostic"], batch.targets["reconstruction"]
    observed = data.read(dataset.base_indices[:2, None] + np.arange(-2, 1)).isfinite()
    assert not (given.valid & target.valid).any() and torch.equal(given.valid | target.valid, observed)
    assert torch.equal(
        target.physical()[observed], data.read(dataset.base_indices[:2, None] + np.arange(-2, 1))[observed]
    )
    again = chosen.dataset(data, "test", statistics).__getitems__([1, 0])
    assert torch.equal(again.inputs["prognostic"].valid, given.valid.flip(0))  # follows from the window
    assert np.diff(dataset.base_indices).min() >= 3 and dataset.lead_hours == (-12.0, -6.0, 0.0)


def test_training_hides_others_at_every_step_and_the_loss_is_of_those(data):
    chosen = task()
    dataset = chosen.dataset(data, "train", chosen.fit(data))
    whole = dataset.__getitems__([0, 5])
    torch.manual_seed(0)
    first, second = (chosen.augment(whole, None) for _ in range(2))
    assert not torch.equal(first.targets["reconstruction"].valid, second.targets["reconstruction"].valid)
    output = torch.zeros_like(whole.targets["reconstruction"].values)
    sums, weights = chosen.sums({"reconstruction": output}, first)["reconstruction"]
    target = first.targets["reconstruction"]
    area = data.grid.area_weights.float() * target.valid
    expected = (area * target.values.nan_to_num(0.0).square()).sum(dim=(0, 3, 4))
    torch.testing.assert_close(sums, expected)
    torch.testing.assert_close(weights, area.sum(dim=(0, 3, 4)))


def test_hidden_values_cannot_be_read(data):
    chosen = task()
    batch = chosen.dataset(data, "validation", chosen.fit(data)).__getitems__([0])
    given = batch.inputs["prognostic"]
    assert (given.filled[~given.valid] == 0).all()
    model = build_from_config(compose(["model=hip_mini", *SMALL]), batch.layout)
    torch.nn.init.normal_(model.decoder["reconstruction"].head.weight)
    expected = model(batch)["reconstruction"]
    given.values[~given.valid] = torch.nan
    assert torch.equal(model(batch)["reconstruction"], expected)


def test_interpolation_is_the_linear_estimate_of_least_error():
    torch.manual_seed(0)
    places = torch.stack([torch.linspace(-60, 60, 12), torch.linspace(0, 200, 12)], dim=-1)
    space = matern32(distances(*[positions(places)] * 2) / 3000)[None]
    time, spread = torch.tensor([[1.0, 0.7, 0.49]]), 0.5 + torch.rand(1, 12)
    visible = torch.randn(1, 3, 1, 12).where(torch.rand(1, 3, 1, 12) < 0.4, torch.nan)
    climatology = torch.randn(1, 3, 1, 12)
    found = FieldInterpolation(space.float(), time, spread, torch.tensor([2.0])).forecast(
        MaskedSituation(climatology=climatology, visible=visible)
    )
    lag = (torch.arange(3)[:, None] - torch.arange(3)).abs()
    full = torch.kron(0.7 ** lag.double(), space[0])  # of all times and places
    values, scale = visible.flatten().double(), spread[0].repeat(3).double()
    seen = values.isfinite()
    weights = torch.linalg.solve(full[seen][:, seen] + 0.01 * torch.eye(int(seen.sum())), values[seen] / scale[seen])
    expected = climatology.flatten().double() + 2 * scale * (full[:, seen] @ weights)
    torch.testing.assert_close(found.flatten().double(), expected, rtol=1e-4, atol=1e-4)


def test_interpolation_beats_the_climatology_and_reads_nothing_hidden(data):
    chosen = task(mask_ratio=0.3, mask_block=1)
    statistics = chosen.fit(data)
    dataset = chosen.dataset(data, "test", statistics)
    positions_ = np.arange(len(dataset))
    batch = dataset.__getitems__(positions_)
    known, truth = chosen.situation(dataset, positions_, batch)
    fitted = {
        name: baseline.fit(data, statistics, lead_steps=dataset.lead_steps, split="test")
        for name, baseline in chosen.baselines.items()
    }
    error = {name: (item.forecast(known) - truth).square().nanmean() for name, item in fitted.items()}
    assert error["interpolation"] < 0.8 * error["climatology"]
    assert torch.equal(truth.isfinite(), batch.targets["reconstruction"].valid)
    assert not known.visible[batch.targets["reconstruction"].valid].isfinite().any()


@pytest.mark.parametrize(
    "options, sentence",
    (
        (dict(mask_ratio=0.0), "task.mask_ratio=0.0 must be above 0 and below 1"),
        (dict(mask_ratio=1.0), "must be above 0 and below 1"),
        (dict(mask_block=0), "task.mask_block=0 must be at least 1"),
        (dict(stacking="persistence"), "use null or one of climatology, interpolation"),
    ),
)
def test_settings_that_make_no_sense(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        task(**options)


def test_a_block_as_large_as_the_grid_is_refused(data):
    with pytest.raises(ValueError, match=r"task.mask_block=8 covers the whole grid of 4 x 8 cells"):
        task(mask_block=8).layout(data)


@pytest.mark.slow
def test_pre_training_from_the_command_line_scores_and_reports(tmp_path, monkeypatch, capsys):
    given = [
        "model=hip_mini",
        *SMALL,
        "task.input_frames=2",
        "task.stride=8",
        "tracking=none",
        "trainer.progress=false",
    ]
    given += ["trainer.max_steps=2", "trainer.batch_size=2", "data.split.test=[2003-01-01,2003-01-09]"]
    monkeypatch.setattr(sys, "argv", ["train.py", *given, f"hydra.run.dir={tmp_path}"])
    command_line.run(train.train, rewrite=train.arguments.rewrite, finish=train.sweep.finish)
    assert "RMSE of t2m" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())["t2m"]["rmse"]
    assert list(scores) == ["-6", "0"]
    for methods in scores.values():
        assert set(methods) == {"ours", "network alone", "climatology", "interpolation"}
        assert methods["interpolation"] < methods["climatology"]
        assert methods["ours"] < methods["network alone"]  # barely trained, and mixed with an interpolation
    assert (tmp_path / "report.html").is_file() and (tmp_path / "predictions.nc").is_file()
