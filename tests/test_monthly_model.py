"""What must hold of the monthly model whatever its weights: masks, padded days, cloudy months, patches of days, sizes
that are no multiples of a patch, crops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from data.batch import Batch
from data.field import Field
from data.grids import LatLonGrid, PlanarGrid
from data.layout import InputLayout, Layout, TargetLayout, Variable
from models import build
from models.composition import compose
from models.latents import Latents
from training.parallel import check_mesh
from training.ranks import Mesh

DAY, HOUR = 86_400, 3_600
SEA = (Variable("sst", "K", domain="sea"),)
GRID = LatLonGrid(np.linspace(30, 40, 10), np.linspace(350, 362, 13))  # no multiple of 4
PLANE = PlanarGrid.regular(10, 13)
NEWER = [
    "model.encoder.codes=cyclic",
    "model.encoder.scores=calendar",
    "model.encoder.branches=parallel",
    "model.encoder.geography=harmonics",
    "model.decoder.norm=group",
    "model.decoder.num_months=0",
]
VARIANTS = pytest.mark.parametrize("options", ([], NEWER), ids=("default", "newer"))


def monthly_layout(months=2, days=5, grid=GRID, step=DAY) -> Layout:
    times = tuple((month + 1 - months) * days * step for month in range(months))
    daily = InputLayout(SEA, grid, months * days, step, gaps=True, frames_per_group=days)
    return Layout({"daily": daily}, {"monthly": TargetLayout(SEA, grid, times)})


def monthly_batch(layout: Layout, batch_size=2) -> Batch:
    """Gappy fields in a sea with land; the last month has two padded days. What is missing is NaN."""
    daily, target = layout.inputs["daily"], layout.targets["monthly"]
    draw = torch.Generator().manual_seed(3)
    shape = (batch_size, daily.frames, 1, *daily.grid.shape)
    domain = torch.rand(daily.grid.shape, generator=draw) < 0.8
    valid = torch.rand(shape, generator=draw) < 0.6
    frames = torch.ones(shape[:2], dtype=torch.bool)
    frames[:, -2:] = False
    valid &= frames[:, :, None, None, None]
    values = torch.where(valid & domain, torch.randn(shape, generator=draw), torch.nan)
    times = 10**9 + (torch.arange(daily.frames) * daily.step).expand(shape[:2])
    group = (torch.arange(daily.frames) // daily.frames_per_group).expand(shape[:2])
    field = Field(
        values, SEA, daily.grid, times.contiguous(), valid=valid, domain=domain, frame_valid=frames, group=group.clone()
    )
    ends = times[:, daily.frames_per_group - 1 :: daily.frames_per_group].contiguous()
    truth = torch.randn(batch_size, len(target.lead_times), 1, *target.grid.shape, generator=draw)
    return Batch({"daily": field}, {"monthly": Field(truth, SEA, target.grid, ends, domain=domain)}, layout)


def with_daily(batch: Batch, **changed) -> Batch:
    return replace(batch, inputs={"daily": replace(batch.inputs["daily"], **changed)})


def monthly_model(layout: Layout, *options: str):
    torch.manual_seed(0)
    model = build(
        [
            "model=sst_spatiotemporal",
            "model/size=tiny",
            "model.hidden_size=16",
            "model.depth=1",
            "model.num_heads=2",
            "model.decoder.zero_head=false",
            *options,
        ],
        layout,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model


def output(model, batch):
    return model(batch)["monthly"]


@VARIANTS
def test_values_under_the_mask_and_padded_days_never_matter(options):
    layout = monthly_layout()
    batch, model = monthly_batch(layout), monthly_model(layout, *options)
    daily = batch.inputs["daily"]
    result = output(model, batch)
    result.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    result = output(model, batch)
    assert result.isfinite().all()
    assert not result[..., ~daily.domain].any()  # land
    assert torch.equal(output(model, with_daily(batch, values=daily.values.nan_to_num(99.0))), result)
    padded = ~daily.frame_valid[:, :, None, None, None]
    shown = with_daily(batch, values=torch.where(padded, 7.0, daily.values), valid=daily.valid | padded)
    assert torch.equal(output(model, shown), result)  # whatever a padded day holds


def test_a_month_of_fewer_days_is_one_that_is_padded():
    short, longer = monthly_layout(days=4), monthly_layout(days=6)
    batch = monthly_batch(short)
    daily = batch.inputs["daily"]

    def padded(tensor, value):
        by_month = tensor.unflatten(1, (2, 4))
        fill = tensor.new_full((*by_month.shape[:2], 2, *by_month.shape[3:]), value)
        return torch.cat([by_month, fill], dim=2).flatten(1, 2)

    stretched = replace(
        daily,
        values=padded(daily.values, 5.0),
        valid=padded(daily.valid, True),
        frame_valid=padded(daily.frame_valid, False),
        times=padded(daily.times, 0),
        group=None,
        second_of_day=None,
        day_of_year=None,
    )
    longer_batch = Batch({"daily": stretched}, batch.targets, longer)
    for options in ([], NEWER):
        model, again = monthly_model(short, *options).eval(), monthly_model(longer, *options).eval()
        assert_close(output(again, longer_batch), output(model, batch), rtol=1e-5, atol=1e-5)
        encoded = again.encoder(longer_batch)
        assert torch.equal(encoded.times, model.encoder(batch).times)


@VARIANTS
def test_cloudy_and_missing_months_stay_finite(options):
    layout = monthly_layout()
    batch, model = monthly_batch(layout), monthly_model(layout, *options)
    daily = batch.inputs["daily"]
    seen, frames = daily.valid.clone(), daily.frame_valid.clone()
    seen[:, :5] = False
    cloudy = with_daily(batch, valid=seen)
    frames[:, :5] = False
    missing = with_daily(batch, valid=seen, frame_valid=frames)
    for hidden in (cloudy, missing):
        result = output(model, hidden)
        assert result.isfinite().all()
        model.zero_grad()
        result.square().mean().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    assert (output(model, cloudy)[:, 1] - output(model, batch)[:, 1]).abs().max() > 1e-6  # months do mix
    assert (output(model, cloudy) - output(model, missing)).abs().max() > 1e-6  # a cloudy day is no padded one


@pytest.mark.parametrize("frames", (2, 3, 5))
def test_patches_of_several_days(frames):
    """Five days are no multiple of two or three: the last patch is filled with days that are not there."""
    layout = monthly_layout()
    batch, model = monthly_batch(layout), monthly_model(layout, f"model.encoder.patch_frames={frames}").eval()
    assert model.encoder.tokens == -(-5 // frames)
    before = model.encoder(batch).tokens
    values = batch.inputs["daily"].values.clone()
    values[:, 2] += 1
    assert (model.encoder(with_daily(batch, values=values)).tokens - before)[:, 0].abs().max() > 1e-4
    assert output(model, batch).isfinite().all()


@pytest.mark.parametrize(
    ("grid", "target_grid"), ((GRID, GRID), (PLANE, PLANE.window(slice(2, 7), slice(3, 12)))), ids=("all", "window")
)
def test_filled_days_know_their_month_and_their_own_day(grid, target_grid):
    plain = monthly_layout(grid=grid)
    days = TargetLayout(SEA, target_grid, tuple((frame - 9) * DAY for frame in range(10)))
    layout = replace(plain, targets={**plain.targets, "filled": days})
    batch, model = monthly_batch(plain), monthly_model(layout, "model.encoder.month_heads=2")
    daily = batch.inputs["daily"]
    blank = Field(torch.zeros(2, 10, 1, *target_grid.shape), SEA, target_grid, daily.times)
    batch = Batch(batch.inputs, {**batch.targets, "filled": blank}, layout)
    outputs = model(batch)
    assert outputs["filled"].shape == blank.values.shape
    sum(part.square().mean() for part in outputs.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    before = model(batch)["filled"]
    for frame, month in ((1, range(5)), (7, range(5, 10))):
        values = daily.values.clone()
        values[:, frame] += 1
        model.encoder.aggregator.attention.output.weight.data.zero_()  # months do not mix
        before = model(batch)["filled"]
        moved = (model(with_daily(batch, values=values))["filled"] - before).abs().amax(dim=(0, 2, 3, 4))
        assert (moved > 1e-6).nonzero().flatten().tolist() == list(month)
        assert moved.argmax() == frame


def test_outputs_are_continuous_across_the_date_line():
    """Turning the latents of a global grid by one patch turns the output."""
    globe = LatLonGrid(np.linspace(84, -84, 8), np.arange(12) * 30.0)
    model = monthly_model(monthly_layout(grid=globe)).eval()
    decoder, tokens = model.decoder["monthly"], torch.randn(2, 1, 2 * 3, 16)
    query = replace(monthly_batch(model.layout).queries()["monthly"].each_time(), domain=None)
    times = torch.zeros(2, 1, dtype=torch.int64)

    def decoded(cells):
        return decoder(Latents(tokens=cells, times=times, held=(0, 1)), query)

    turned = tokens.unflatten(2, (2, 3)).roll(1, dims=3).flatten(2, 3)
    assert_close(decoded(turned), decoded(tokens).roll(4, dims=-1), rtol=1e-5, atol=1e-5)


def test_hours_of_a_month():
    layout = monthly_layout(months=1, days=48, step=HOUR)
    batch = monthly_batch(layout, batch_size=1)
    model = monthly_model(layout, *NEWER, "model.encoder.patch_frames=6").eval()
    assert model.encoder.tokens == 8 and output(model, batch).isfinite().all()


def test_weights_in_pieces_equal_those_of_whole_months():
    """Dropout of nothing at all takes the path that computes whole months."""
    layout = monthly_layout()
    batch, model = monthly_batch(layout), monthly_model(layout)
    pieces = model.encoder(batch).tokens
    model.encoder.dropout.p = 1e-12
    assert_close(model.encoder(batch).tokens, pieces, rtol=1e-5, atol=1e-5)


def test_places_follow_crops():
    """A crop elsewhere is described elsewhere; the same place in another domain has the same harmonics."""
    layout = monthly_layout()
    batch, model = monthly_batch(layout), monthly_model(layout, *NEWER).eval()
    places = GRID.coordinates.expand(2, -1, -1)
    same = with_daily(batch, coordinates=places)
    assert_close(output(model, same), output(model, batch), rtol=1e-4, atol=1e-4)
    moved = with_daily(batch, coordinates=places + torch.tensor([20.0, 50.0]))
    assert (output(model, moved) - output(model, batch)).abs().max() > 1e-3
    apart = model.encoder(moved).coordinates - model.encoder(same).coordinates
    assert_close(apart % 360, torch.tensor([20.0, 50.0]).expand_as(apart).to(apart), rtol=0, atol=0.2)


def test_statistics_of_a_batch_are_refused_on_several_ranks():
    with pytest.raises(ValueError, match=r"dp=2: model.decoder.norm=batch .* use model.decoder.norm=group"):
        check_mesh(Mesh(dp=2), compose(["model=sst_spatiotemporal"]), monthly_layout())
    check_mesh(Mesh(dp=2), compose(["model=sst_spatiotemporal", "model.decoder.norm=group"]), monthly_layout())


@pytest.mark.parametrize(
    ("options", "match"),
    (
        (["model.encoder.codes=clock"], "codes=clock is unknown; use sinusoidal or cyclic"),
        (["model.encoder.scores=days"], "scores=days is unknown; use tokens or calendar"),
        (["model.encoder.geography=given"], "needs an input on a single place .*geography=harmonics"),
        (["model.encoder.position=table"], "unknown positions 'table'"),
        (["model.encoder.token_order=random"], "token_order=random is unknown"),
        (["model.encoder.patch_frames=0"], "patch_frames=0 must be at least 1"),
        (["model.encoder.month_heads=3"], "not divisible by 3 heads"),
        (["model.decoder.norm=layer"], "norm=layer is unknown; use batch or group"),
        (["model.decoder.overlap=-1"], "overlap=-1 must be 0 or more"),
        (["model.decoder.num_months=1"], "num_months=1 is less than the 2 times"),
        (["model.decoder.norm=group", "model.decoder.width=24"], "width=24 must be a multiple of 16"),
        (["model.processor.norm=mid"], "norm=mid is unknown; use pre or post"),
    ),
)
def test_bad_options_are_refused_in_a_sentence(options, match):
    with pytest.raises(ValueError, match=match):
        monthly_model(monthly_layout(), *options)
