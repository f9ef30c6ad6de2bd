"""The Hierarchical Perceiver: groups, blocks and all of it against plain loops; published parameter counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.grids import LatLonGrid, Points
from data.layout import InputLayout, Layout, TargetLayout, Variable
from models import build
from models.composition import build_from_config, compose
from models.encoders.groups import by_stream, by_time
from models.encoders.hierarchical_perceiver import HierarchicalPerceiverEncoder
from models.encoders.hierarchy import GroupBlock, regroup
from tests.model_examples import COARSE, GLOBAL, HOUR, REGION, observed_layout, tiny_batch, tiny_layout

SMALL = dict(hidden_size=8, num_latents=4, num_heads=2)


def variables(count: int) -> tuple[Variable, ...]:
    return tuple(Variable(f"v{index}") for index in range(count))


# Published sizes


def official_layout() -> Layout:
    """The streams of the release's own test: signals on grids, labels without places."""

    def grid(rows: int, columns: int) -> LatLonGrid:
        return LatLonGrid(np.linspace(80, -80, rows), np.arange(columns) * 360 / columns)

    streams = {
        "image": (grid(32, 32), 3),
        "image_label": (Points(np.zeros((32, 2))), 1),
        "audio": (grid(8, 16), 16),
        "audio_label": (Points(np.zeros((16, 2))), 16),
    }
    return Layout(
        inputs={name: InputLayout(variables(count), places, 1, HOUR) for name, (places, count) in streams.items()},
        targets={name: TargetLayout(variables(count), places, (0,)) for name, (places, count) in streams.items()},
    )


@pytest.mark.parametrize(
    "preset, published", (("hip_16", 99_224_996), ("hip_256", 95_585_188), ("hip_mini", 18_709_668))
)
def test_presets_have_the_published_number_of_parameters(preset, published):
    config = compose([f"model={preset}"])
    assert config.task._target_.endswith("MaskedAutoencodeTask")
    with torch.device("meta"):
        model = build_from_config(config, official_layout())
    assert sum(parameter.numel() for parameter in model.parameters()) == published


# Groups


def test_regroup_merges_neighbours_and_splits_them_again():
    tokens = torch.arange(2 * 6 * 4).view(2, 6, 4, 1).float()
    merged, valid = regroup(tokens, None, 2)
    assert valid is None and torch.equal(merged, tokens.reshape(2, 2, 12, 1))
    split, _ = regroup(merged, None, 6)
    assert torch.equal(split, tokens)


def test_where_groups_do_not_divide_the_first_is_the_short_one():
    tokens = torch.arange(1.0, 6).view(1, 5, 1, 1)
    merged, valid = regroup(tokens, None, 2)
    assert merged[0, :, :, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert valid[0].tolist() == [[False, True, True], [True, True, True]]
    split, held = regroup(merged, valid, 5)
    assert torch.equal(split, tokens) and held.all()


def test_a_group_of_a_time_holds_every_stream_of_that_time():
    layout = Layout(
        inputs={
            "radar": InputLayout(variables(1), COARSE, 4, HOUR),
            "forecast": InputLayout(variables(2), REGION, 2, 3 * HOUR),
            "satellite": InputLayout(variables(1), Points([[0.0, 0.0]]), 4, HOUR // 2),
            "static": InputLayout(variables(1), Points([[0.0, 0.0], [1.0, 1.0]]), 1, HOUR),
        },
        targets={},
    )
    starts = {"radar": 0, "forecast": 4 * 24, "satellite": 4 * 24 + 2 * 63, "static": 4 * 24 + 2 * 63 + 4}

    def rows(name: str, frame: int, points: int) -> list[int]:
        first = starts[name] + frame * points
        return list(range(first, first + points))

    def held(table, group: int) -> list[int]:
        return [row for row in table.rows[group].tolist() if row >= 0]

    repeated = by_time(layout, None, static="repeated")
    radar = [rows("radar", frame, 24) for frame in range(4)]
    static = rows("static", 0, 2)
    # Satellite frames are 1.5, 1, 0.5 and 0 hours old; forecasts 3 and 0.
    assert held(repeated, 0) == radar[0] + rows("forecast", 0, 63) + static
    assert held(repeated, 1) == radar[1] + rows("satellite", 0, 1) + static
    assert held(repeated, 2) == radar[2] + rows("satellite", 1, 1) + static
    assert (
        held(repeated, 3)
        == radar[3] + rows("forecast", 1, 63) + rows("satellite", 2, 1) + rows("satellite", 3, 1) + static
    )
    assert repeated.frames.tolist() == [[0], [1], [2], [3]]

    apart = by_time(layout, None, static="own_group")
    assert held(apart, 0) == static and held(apart, 1) == radar[0] + rows("forecast", 0, 63)
    assert apart.frames.tolist() == [[-1], [0], [1], [2], [3]]

    more, fewer = by_time(layout, 6, static="repeated"), by_time(layout, 2, static="repeated")
    assert held(more, 0) == held(more, 1) == [] and held(more, 5) == held(repeated, 3)
    assert held(fewer, 0) == held(repeated, 0) + held(repeated, 1) and fewer.frames.tolist() == [[0, 1], [2, 3]]
    for table in (repeated, apart, more, fewer):
        assert table.rows.flatten()[table.slots].tolist() == list(range(starts["static"] + 2))


def test_streams_get_groups_so_that_the_largest_is_smallest():
    layout = official_layout()
    table = by_stream(layout, 16)
    sizes = [int((row >= 0).sum()) for row in table.rows]
    assert sizes == [86] * 11 + [78, 32, 64, 64, 16]  # with 13 groups for the image 128 would be left for the sound
    assert max(sizes) == table.rows.shape[1]
    assert table.rows.flatten()[table.slots].tolist() == list(range(1200))
    with pytest.raises(ValueError, match=r"model.encoder.groups\[0\]=3 is fewer than the 4 inputs"):
        by_stream(layout, 3)


# Blocks and the hierarchy


def normed(x, norm):
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias)


def plain_layer(layer, x, context, heads: int, residual: bool = True):
    """An attention layer head by head: x (n, D), context (m, C)."""
    attention = layer.attention
    query = attention.query(normed(x, layer.query_norm))
    context = normed(context, layer.query_norm if layer.context_norm is None else layer.context_norm)
    key, value = attention.key(context), attention.value(context)
    parts = []
    for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
        parts.append((q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v)
    y = attention.output(torch.cat(parts, -1)) + (x if residual else 0)
    return y + layer.mlp.down(F.relu(layer.mlp.up(normed(y, layer.mlp_norm))) ** 2)


def plain_block(block, groups: list, heads: int, skips: list | None = None) -> list:
    """groups: one tensor (m, C) each."""
    made = []
    for number, context in enumerate(groups):
        latents = block.queries[number]
        if skips is not None:
            latents = latents + (skips[number] if block.skip is None else block.skip(skips[number]))
        latents = plain_layer(block.cross, latents, context, 1)
        for layer in block.layers:
            latents = plain_layer(layer, latents, latents, heads)
        made.append(latents)
    return made


def test_the_whole_hierarchy_equals_plain_loops_over_groups():
    torch.manual_seed(0)
    layout = tiny_layout(frames=4, boundary=COARSE)
    encoder = HierarchicalPerceiverEncoder(
        layout,
        groups=[4, 2, 1, 2, 4],
        hidden_size=[4, 8, 12, 6, 4],
        num_latents=[3, 4, 6, 4, 3],
        num_heads=[2, 2, 3, 2, 1],
        self_per_cross=[1, 0, 2, 1, 1],
        embed_size=5,
        fan_out=True,
        positions="learned",
    ).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    batch = tiny_batch(layout, dtype=torch.float64)
    found = encoder(batch)
    tokens, positions, present = encoder._rows(batch)
    assert present is None and found.tokens.shape == (2, 1, 4 * 60 + 24, 5)
    for sample in range(2):
        groups = [tokens[sample, row[row >= 0]] for row in encoder.rows]
        down, middle, *up = encoder.blocks[:2], encoder.blocks[2], *encoder.blocks[3:]
        first = plain_block(down[0], groups, 2)
        second = plain_block(down[1], [torch.cat(first[:2]), torch.cat(first[2:])], 2)
        (third,) = plain_block(middle, [torch.cat(second)], 3)
        fourth = plain_block(up[0], list(third.chunk(2)), 2, second)
        fifth = plain_block(up[1], [half for group in fourth for half in group.chunk(2)], 1, first)
        for row in range(4 * 60 + 24):
            group = int(encoder.slots[row]) // encoder.rows.shape[1]
            query = positions[0, row : row + 1]
            expected = plain_layer(encoder.read_back, query, fifth[group], 1, residual=False)
            torch.testing.assert_close(found.tokens[sample, 0, row : row + 1], expected)


def test_a_history_is_one_bank_at_the_last_frame_and_groups_see_their_own_time_only():
    layout = tiny_layout(frames=5)
    encoder = HierarchicalPerceiverEncoder(layout, **SMALL)
    batch = tiny_batch(layout)
    latents = encoder(batch)
    assert latents.tokens.shape == (2, 1, 4, 8) and latents.valid is None
    assert torch.equal(latents.times, batch.inputs["prognostic"].times[:, -1:])
    assert [tuple(block.queries.shape) for block in encoder.blocks] == [(5, 4, 8), (2, 4, 8), (1, 4, 8)]

    def first_block() -> torch.Tensor:
        tokens, _, present = encoder._rows(batch)
        return encoder.blocks[0](*encoder._grouped(batch, tokens, present))[0]

    before = first_block()
    batch.inputs["prognostic"].values[:, 3, :, 2, 5] += 1
    assert ((first_block() - before).abs() > 1e-7).any(dim=-1).any(dim=-1).tolist() == [[False] * 3 + [True, False]] * 2


@pytest.mark.parametrize("fan_out", (False, True))
def test_missing_frames_give_zeros_are_never_read_and_leave_gradients_finite(fan_out):
    torch.manual_seed(0)
    layout = tiny_layout(frames=3, gaps=True)
    encoder = HierarchicalPerceiverEncoder(layout, fan_out=fan_out, **{**SMALL, "num_latents": 6})
    batch = tiny_batch(layout)
    field = batch.inputs["prognostic"]
    frames = torch.tensor([[True, False, True], [False, False, False]])  # the second sample has nothing at all

    def run(content: float):
        values = torch.where(frames[:, :, None, None, None], field.values, content)
        given = replace(batch, inputs={"prognostic": replace(field, values=values, frame_valid=frames)})
        tokens, _, present = encoder._rows(given)
        made, held = encoder.blocks[0](*encoder._grouped(given, tokens, present))
        encoder.zero_grad()
        latents = encoder(given)
        latents.tokens.square().sum().backward()
        return made, held, latents, [parameter.grad for parameter in encoder.parameters()]

    made, held, latents, gradients = run(float("nan"))
    assert torch.equal(held[..., 0], frames)
    assert (made[~frames] == 0).all() and (made[frames] != 0).any()
    _, _, again, expected = run(7.0)
    assert torch.equal(latents.tokens, again.tokens)
    for one, other in zip(gradients, expected, strict=True):
        assert torch.isfinite(one).all() and torch.equal(one, other)
    if not fan_out:
        assert latents.valid.tolist() == [[[True] * 6], [[False] * 6]] and (latents.tokens[1] == 0).all()


def test_missing_values_may_count_as_zeros_at_their_place():
    layout = tiny_layout(gaps=True)
    batch = tiny_batch(layout)
    field = batch.inputs["prognostic"]
    valid = torch.ones_like(field.values, dtype=torch.bool)
    valid[:, 0] = False
    missing = replace(batch, inputs={"prognostic": replace(field, valid=valid)})
    for choice, held in (("zero", [True, True]), ("skip", [False, True])):
        encoder = HierarchicalPerceiverEncoder(layout, missing=choice, **SMALL)
        tokens, _, present = encoder._rows(missing)
        _, groups = encoder.blocks[0](*encoder._grouped(missing, tokens, present))
        assert (groups is None and all(held)) or groups[0, :, 0].tolist() == held


def test_training_draws_some_latents_of_the_bottleneck_others_each_time():
    torch.manual_seed(0)
    layout = tiny_layout()
    encoder = HierarchicalPerceiverEncoder(layout, train_latents=3, **{**SMALL, "num_latents": 8})
    batch = tiny_batch(layout)
    drawn = [encoder.train()(batch).tokens for _ in range(2)]
    assert all(tokens.shape == (2, 1, 3, 8) for tokens in drawn) and not torch.equal(*drawn)
    assert encoder.eval()(batch).tokens.shape == (2, 1, 8, 8)
    block = GroupBlock(
        groups=2, num_latents=5, hidden_size=4, context_size=4, num_heads=1, cross_heads=1, self_layers=0,
        mlp_ratio=1.0, cross_mlp_ratio=1.0, mlp="gelu", train_latents=2,
    )  # fmt: skip
    tokens = torch.randn(3, 2, 6, 4)
    every, some = block.eval()(tokens, None)[0], block.train()(tokens, None)[0]
    found = (some[:, :, :, None] - every[:, :, None]).abs().amax(dim=-1).lt(1e-6).float().argmax(dim=-1)
    assert ((some - every.gather(2, found[..., None].expand(-1, -1, -1, 4))).abs() < 1e-6).all()
    assert (found.diff(dim=-1) > 0).all() and len({tuple(row) for row in found.flatten(0, 1).tolist()}) > 1


def test_observations_join_the_group_of_their_frame():
    torch.manual_seed(0)
    layout = observed_layout(frames=3)
    encoder = HierarchicalPerceiverEncoder(layout, static="own_group", **SMALL)
    batch = tiny_batch(layout)

    def first_block(given) -> torch.Tensor:
        tokens, _, present = encoder._rows(given)
        return encoder.blocks[0](*encoder._grouped(given, tokens, present))[0]

    before = first_block(batch)
    rows = (batch.observations.batch == 1) & (batch.observations.frame == 2)
    moved = replace(batch.observations, value=batch.observations.value + rows)
    changed = (first_block(replace(batch, observations=moved)) - before).abs().amax(dim=(2, 3)) > 1e-6
    assert changed.tolist() == [[False] * 4, [False, False, False, True]]  # the first group is that of fixed fields


def test_learned_positions_are_a_vector_a_place_and_frame_and_know_no_coordinates():
    layout = tiny_layout()
    learned = HierarchicalPerceiverEncoder(layout, positions="learned", **SMALL)
    assert learned.learned("prognostic").shape == (2, 60, 8)
    later = tiny_batch(layout)
    field = later.inputs["prognostic"]
    shifted = replace(later, inputs={"prognostic": replace(field, times=field.times + 6 * HOUR, second_of_day=None)})
    assert torch.equal(learned(later).tokens, learned(shifted).tokens)
    fourier = HierarchicalPerceiverEncoder(layout, **SMALL)
    assert not torch.equal(fourier(later).tokens, fourier(shifted).tokens)


# Reconstruction


def test_each_stream_is_written_back_at_its_own_places():
    layout = tiny_layout(frames=3, boundary=COARSE)
    layout = replace(
        layout,
        targets={
            "late": TargetLayout(layout.inputs["prognostic"].variables, GLOBAL, (0, -12 * HOUR)),
            "land": TargetLayout(layout.inputs["boundary"].variables, COARSE, (0,)),
        },
    )
    model = build(["model=hip_mini", *TINY], layout)
    assert (model.decoder["late"].rows == torch.tensor([[120], [0]]) + torch.arange(60)).all()
    assert (model.decoder["land"].rows == 180 + torch.arange(24)).all()
    output = model(tiny_batch(layout))
    assert output["late"].shape == (2, 2, 2, 6, 10) and output["land"].shape == (2, 1, 1, 4, 6)
    assert not output["late"].any()  # the first prediction is the reference


TINY = ["model.encoder.hidden_size=8", "model.encoder.num_latents=16", "model.encoder.num_heads=2"]
TINY += ["model.encoder.self_per_cross=1", "model.encoder.embed_size=8"]


@pytest.mark.parametrize(
    "options, sentence",
    (
        (dict(groups=[2, 2]), "must end in one group"),
        (dict(groups=[4, 1], fan_out=True), "must lead to one group and back"),
        (dict(groups=[]), "must be numbers of groups"),
        (dict(merge=1), "must be at least 2"),
        (dict(hidden_size=[8, 8, 8]), r"model.encoder.hidden_size=\[8, 8, 8\] has 3 values for 2 blocks"),
        (dict(train_latents=9), "between 1 and the 4 latents"),
        (dict(groups=[3, 1, 3], fan_out=True), "4 latents of block 1 cannot be split over 3 groups"),
        (dict(num_latents=[4, 4, 2], groups=[2, 1, 2], fan_out=True), "must be equal in blocks that mirror each other"),
        (dict(grouping="place"), "use one of time, stream"),
        (dict(positions="rotary"), "use one of fourier, learned"),
    ),
)
def test_hierarchies_that_cannot_be(options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        HierarchicalPerceiverEncoder(tiny_layout(), **{**SMALL, **options})
    assert "\n" not in str(error.value)
