"""Encoders, processors, decoders and the composed model against plain references."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.grids import LatLonGrid
from models import build
from models.composition import build_from_config, compose
from models.encode_process_decode import describe
from models.encoders.perceiver import PerceiverEncoder
from models.heads import DeterministicHead
from tests.model_examples import (
    COARSE,
    GLOBAL,
    HOUR,
    REGION,
    STATIONS,
    tiny_batch,
    tiny_layout,
)

TINY = ["model/size=tiny", "model.hidden_size=16", "model.depth=1", "model.num_heads=2", "model.num_latents=6"]
TINY += ["model.patch_size=3", "model.dropout=0", "model.drop_path=0", "model.observation_heads=2"]
PRESETS = ("perceiver_io", "perceiver", "patch_transformer", "video_dit", "healda_v2")


def built(given: list[str], layout, seed: int = 0):
    """A tiny model whose head is not zero, so that outputs depend on everything."""
    torch.manual_seed(seed)
    model = build([*TINY, *given], layout).eval()
    for decoder in model.decoder.values():
        torch.nn.init.normal_(decoder.head.weight, std=0.3)
        for name, parameter in decoder.named_parameters():
            if "film" in name or "window_bias" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


# Decoders


def test_a_window_that_covers_everything_equals_global_attention():
    layout = tiny_layout(GLOBAL)
    local = built(["model.decoder.scope=local", "model.decoder.window=7", "model.patch_size=2"], layout)
    torch.nn.init.zeros_(local.decoder["forecast"].window_bias[2].weight)
    everywhere = build([*TINY, "model.decoder.scope=global", "model.patch_size=2"], layout).eval()
    shared = {k: v for k, v in local.state_dict().items() if k in everywhere.state_dict()}
    torch.nn.init.zeros_(local.decoder["forecast"].own_position.weight)
    everywhere.load_state_dict(shared)
    batch = tiny_batch(layout)
    torch.testing.assert_close(local(batch)["forecast"], everywhere(batch)["forecast"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", ("coordinates", "trainable"))
@pytest.mark.parametrize("scope", ("local", "global"))
def test_some_places_decode_as_they_do_among_all(scope, queries):
    layout = tiny_layout(REGION, gaps=True)
    model = built([f"model.decoder.scope={scope}", f"model.decoder.queries={queries}"], layout)
    batch = tiny_batch(layout)
    whole = model(batch)["forecast"].flatten(3)
    for places in (torch.tensor([5]), torch.tensor([62, 0, 17, 3]), model.draw_places(0.4)["forecast"]):
        some = replace(batch, places={"forecast": places})
        torch.testing.assert_close(model(some)["forecast"], whole[..., places], rtol=1e-5, atol=1e-6)
        wanted = some.wanted("forecast")
        truth = batch.targets["forecast"].values.flatten(3)[..., places]
        torch.testing.assert_close(wanted.values, truth, equal_nan=True)


@pytest.mark.parametrize("scope", ("local", "global"))
def test_drawn_places_are_few_distinct_and_differ_between_draws(scope):
    layout = tiny_layout(GLOBAL)
    model = built([f"model.decoder.scope={scope}"], layout)
    torch.manual_seed(0)
    draws = [model.draw_places(0.3)["forecast"].tolist() for _ in range(20)]
    for places in draws:
        assert len(set(places)) == len(places) and 0.1 * 60 <= len(places) <= 0.5 * 60
    assert set().union(*draws) == set(range(60))


@pytest.mark.parametrize("scope", ("local", "global"))
@pytest.mark.parametrize("chunk", (1, 7, 1000))
def test_output_chunks_change_nothing(scope, chunk):
    layout = tiny_layout(REGION)
    model = built([f"model.decoder.scope={scope}"], layout)
    batch = tiny_batch(layout)
    whole = model(batch)["forecast"]
    model.decoder["forecast"].chunk_size = chunk
    torch.testing.assert_close(model(batch)["forecast"], whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_lead_time_is_decoded_as_if_alone(preset):
    layout = tiny_layout(REGION)
    model = built([f"model={preset}"], layout)
    batch = tiny_batch(layout)
    together = model(batch)["forecast"]
    for index in range(3):
        alone = batch.targets["forecast"].map(lambda x, i=index: x[:, i : i + 1] if x.shape[:2] == (2, 3) else x)
        single = replace(batch, targets={"forecast": alone})
        torch.testing.assert_close(model(single)["forecast"][:, 0], together[:, index], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[:, 0], together[:, 2], atol=1e-3)


def test_queries_read_input_values_only_within_their_neighbourhood_and_window():
    layout = tiny_layout(LatLonGrid(np.linspace(0, 60, 21), np.linspace(0, 60, 21)))
    given = [
        "model/processor=identity",
        "model.decoder.features=3",
        "model.decoder.window=1",
        "model.encoder.context=0",
    ]
    model = built(given, layout)
    batch = tiny_batch(layout)
    before = model(batch)["forecast"]
    batch.inputs["prognostic"].values[:, :, :, 10, 10] += 5.0
    changed = (model(batch)["forecast"] - before).abs().amax(dim=(0, 1, 2)) > 1e-7
    rows, columns = changed.nonzero().T
    assert changed[9:12, 9:12].all()  # own patch (cells 9 to 11), and the 3 x 3 queries around the cell
    assert rows.min() == 9 and rows.max() == 11 and columns.min() == 9 and columns.max() == 11


def test_grid_patch_decoder_writes_its_own_patch():
    layout = tiny_layout(REGION)
    given = ["model/encoder=grid_patch", "model/processor=identity", "model/decoder=grid_patch"]
    model = built([*given, "model.encoder.context=0"], layout)
    batch = tiny_batch(layout)
    before = model(batch)["forecast"]
    batch.inputs["prognostic"].values[:, :, :, 0, 0] += 5.0
    changed = (model(batch)["forecast"] - before).abs().amax(dim=(0, 1, 2)) > 1e-7
    top, left = model.encoder.patches.top, model.encoder.patches.left
    assert changed[: 3 - top, : 3 - left].all() and changed.sum() == (3 - top) * (3 - left)


def test_trainable_queries_and_a_zero_head_start_from_the_reference():
    layout = tiny_layout(STATIONS)
    model = build([*TINY, "model=perceiver", "model.decoder.queries=trainable"], layout)
    batch = tiny_batch(layout)
    assert (model(batch)["forecast"] == 0).all()
    target = batch.targets["forecast"]
    point = model.predict(batch)["forecast"].point
    torch.testing.assert_close(point.values, target.reference.values * target.scale + target.offset)
    assert model.decoder["forecast"].table.shape == (5, 16)


# Encoders and processors


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("share, crosses, blocks", (("none", 4, 3), ("all", 1, 1), ("all_but_first", 2, 2)))
def test_weight_sharing_of_repeated_cross_attention(share, crosses, blocks):
    options = dict(hidden_size=8, num_latents=3, num_heads=2, self_per_cross=2, num_cross=4)
    encoder = PerceiverEncoder(tiny_layout(), share_cross=share, share_self=share, **options)
    single = PerceiverEncoder(tiny_layout(), **{**options, "num_cross": 1})
    layer = count(single.cross[0])
    assert len(encoder.cross) == crosses and len(encoder.blocks) == blocks
    block = count(encoder.blocks[0])
    assert count(encoder) == count(single) + (crosses - 1) * layer + blocks * block
    prepared = []
    for cross in encoder.cross:
        original = cross.prepare
        cross.prepare = lambda *a, original=original, **k: prepared.append(1) or original(*a, **k)
    encoder(tiny_batch(tiny_layout()))
    assert len(prepared) == crosses  # keys and values of a shared cross-attention are computed once


def test_inputs_on_different_grids_join_one_sequence():
    layout = tiny_layout(GLOBAL, boundary=COARSE)
    model = built(["model=perceiver"], layout)
    batch = tiny_batch(layout)
    before = model(batch)["forecast"]
    batch.inputs["boundary"].values[:] += 1
    assert not torch.allclose(model(batch)["forecast"], before)


def test_frames_each_are_encoded_on_their_own():
    layout = tiny_layout(REGION, frames=3, boundary=COARSE)
    model = built(["model=perceiver", "model.encoder.frames=each"], layout)
    batch = tiny_batch(layout)
    latents = model.encoder(batch)
    assert latents.tokens.shape == (2, 3, 6, 16) and torch.equal(latents.times, batch.inputs["prognostic"].times)
    batch.inputs["prognostic"].values[:, 1] += 1
    changed = (model.encoder(batch).tokens - latents.tokens).abs().amax(dim=(0, 2, 3)) > 1e-6
    assert changed.tolist() == [False, True, False]


def test_grid_patch_model_turns_with_the_globe_except_for_its_positions():
    layout = tiny_layout(LatLonGrid(np.linspace(75, -75, 6), np.arange(12) * 30.0))
    model = built(["model=patch_transformer"], layout)
    torch.nn.init.zeros_(model.encoder.position.weight)
    batch = tiny_batch(layout)
    before = model(batch)["forecast"]
    field = batch.inputs["prognostic"]
    turned = replace(batch, inputs={"prognostic": replace(field, values=field.values.roll(3, dims=-1))})
    torch.testing.assert_close(model(turned)["forecast"], before.roll(3, dims=-1), rtol=1e-4, atol=1e-5)


# Masks


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("gaps", (False, True))
def test_values_that_are_not_present_are_never_read(preset, gaps):
    layout = tiny_layout(REGION, gaps=gaps)
    model = built([f"model={preset}"], layout)
    batch = tiny_batch(layout)
    field = batch.inputs["prognostic"]
    valid = torch.rand_like(field.values) > 0.3
    valid[:, :, :, :3] = False  # whole patches are missing
    valid[1] = False  # and a whole sample

    def run(fill: float):
        filled = torch.where(valid, field.values, torch.tensor(fill)).requires_grad_()
        inputs = {"prognostic": replace(field, values=filled, valid=valid)}
        model.zero_grad()
        output = model(replace(batch, inputs=inputs))["forecast"]
        output.square().sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return output.detach(), gradients, filled.grad

    output, gradients, inputs = run(float("nan"))
    expected, expected_gradients, _ = run(7.0)
    assert torch.equal(output, expected) and torch.equal(gradients, expected_gradients)
    assert torch.isfinite(gradients).all() and (inputs[~valid] == 0).all()


@pytest.mark.parametrize("loss", ("mse", "l1", "huber"))
def test_loss_equals_a_loop_over_present_values(loss):
    target = tiny_batch(tiny_layout()).targets["forecast"]
    valid = torch.rand_like(target.values) > 0.4
    weights = GLOBAL.area_weights * torch.tensor([1.0, 3.0])[:, None, None]
    output = torch.randn_like(target.values)
    sums, totals = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    for b, time, c, i, j in np.ndindex(*output.shape):
        if not valid[b, time, c, i, j]:
            continue
        reference = target.reference
        scale = reference.scale.expand_as(output)[b, time, c, i, j]
        wanted = (target.values[b, time, c, i, j] - reference.values[b, time, c, i, j]) / scale
        error = abs(float(output[b, time, c, i, j] - wanted))
        error = {"mse": error**2, "l1": error, "huber": error**2 / 2 if error < 1 else error - 0.5}[loss]
        sums[time, c] += float(weights[c, i, j]) * error
        totals[time, c] += float(weights[c, i, j])
    poisoned = replace(
        target,
        values=torch.where(valid, target.values, torch.nan),
        valid=valid,
        reference=replace(target.reference, values=torch.where(valid, target.reference.values, torch.nan)),
    )
    output = torch.where(valid, output, torch.nan).requires_grad_()
    given = DeterministicHead(loss=loss).loss(output, poisoned, weights)
    torch.testing.assert_close(given[0].double(), sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(given[1].double(), totals, rtol=1e-5, atol=1e-5)
    given[0].sum().backward()
    assert torch.isfinite(output.grad).all() and (output.grad[~valid] == 0).all()


# The composed model


def test_a_batch_of_another_kind_is_refused_by_name():
    layout = tiny_layout(REGION)
    model = built([], layout)
    for other, name in ((tiny_layout(GLOBAL), "prognostic"), (tiny_layout(REGION, frames=3), "prognostic")):
        with pytest.raises(ValueError, match=f"input '{name}' of this batch is not what the model was built for"):
            model(tiny_batch(other))
    with pytest.raises(ValueError, match="target 'forecast'"):
        model(tiny_batch(tiny_layout(REGION, target_grid=STATIONS)))
    longer = tiny_layout(REGION, leads=(12 * HOUR,))
    assert model(tiny_batch(longer))["forecast"].shape == (2, 1, 2, 7, 9)  # lead times are data


@pytest.mark.parametrize("preset", PRESETS)
def test_construction_and_forward_on_the_meta_device(preset):
    layout = tiny_layout()
    config = compose([*TINY, f"model={preset}"])
    with torch.device("meta"):
        model = build_from_config(config, layout)
    assert all(parameter.is_meta for parameter in model.parameters())
    real = build_from_config(config, layout)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    for name, buffer in real.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), f"{name} holds no values after building on meta"


@pytest.mark.parametrize("preset", PRESETS)
def test_bfloat16_models_and_autocast(preset):
    layout = tiny_layout()
    model, batch = built([f"model={preset}"], layout), tiny_batch(layout)
    expected = model(batch)["forecast"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(batch)["forecast"].float()
    assert (mixed - expected).abs().max() < 0.1 * expected.abs().max()


def test_description_lists_parts_in_order_and_leaves_the_model_as_it_was():
    layout = tiny_layout()
    model = built(["model=perceiver", "model/decoder=grid_patch"], layout)
    batch, state = tiny_batch(layout), torch.random.get_rng_state()
    text = describe(model, batch)
    assert not model.training and len(model.encoder._forward_hooks) == 0
    assert torch.equal(state, torch.random.get_rng_state())
    lines = [line.split()[0] for line in text.splitlines()]
    assert lines == ["input", "encoder", "processor", "adapter.forecast", "decoder.forecast", "total", "training"]
    assert f"{count(model):,}" in text and f"{count(model.encoder):,}" in text
    assert "2 x 1 x 6 x 16" in text and "2 x 3 x 2 x 6 x 10" in text


def test_a_model_can_be_kept_from_knowing_date_and_place():
    layout = tiny_layout(LatLonGrid(np.linspace(60, -60, 6), np.arange(12) * 30.0))
    blind = ["model.calendar=none", "model.encoder.positions=false", "model.decoder.queries=local"]
    model = built(["model/processor=spatial_transformer", *blind], layout)
    batch = tiny_batch(layout)
    before = model(batch)["forecast"]
    field, target = batch.inputs["prognostic"], batch.targets["forecast"]
    later = {
        "inputs": {
            "prognostic": replace(field, day_of_year=field.day_of_year + 90, second_of_day=field.second_of_day * 0)
        },
        "targets": {"forecast": replace(target, day_of_year=target.day_of_year + 90)},
    }
    assert torch.equal(model(replace(batch, **later))["forecast"], before)
    turned = replace(batch, inputs={"prognostic": replace(field, values=field.values.roll(3, dims=-1))})
    torch.testing.assert_close(model(turned)["forecast"], before.roll(3, dims=-1), rtol=1e-4, atol=1e-5)
    hourly = built(["model.calendar=hour"], layout)
    other_day = replace(batch, inputs={"prognostic": replace(field, day_of_year=field.day_of_year + 90)})
    other_hour = replace(batch, inputs={"prognostic": replace(field, second_of_day=field.second_of_day + 6 * HOUR)})
    assert torch.equal(hourly(other_day)["forecast"], hourly(batch)["forecast"])
    assert not torch.allclose(hourly(other_hour)["forecast"], hourly(batch)["forecast"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_models_compile_to_one_graph(preset):
    layout = tiny_layout()
    model, batch = built([f"model={preset}"], layout), tiny_batch(layout)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch)["forecast"], model(batch)["forecast"])
