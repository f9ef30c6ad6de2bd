"""The Perceiver encoder: published sizes, sharing of weights, recurrence over time, tokens as published models read."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.grids import PlanarGrid, Points
from data.layout import InputLayout, Layout, TargetLayout, Variable
from models import build
from models.attention.layer import MLP
from models.composition import build_from_config, compose
from models.encoders.input_tokens import ConcatenatedTokens
from models.encoders.perceiver import PerceiverEncoder
from tests.model_examples import GLOBAL, HOUR, observed_layout, tiny_batch, tiny_layout

TINY = dict(hidden_size=8, num_latents=3, num_heads=2, self_per_cross=2)


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def image_layout(rows: int, columns: int, channels: int, classes: int, frames: int = 1) -> Layout:
    def variables(name: str, number: int) -> tuple[Variable, ...]:
        return tuple(Variable(f"{name}{index}") for index in range(number))

    grid = PlanarGrid(np.arange(rows), np.arange(columns))
    return Layout(
        inputs={"image": InputLayout(variables("channel", channels), grid, frames, HOUR)},
        targets={"class": TargetLayout(variables("class", classes), Points([[0.0, 0.0]]), (0,))},
    )


IMAGENET = [
    "model=perceiver",
    "model/processor=identity",
    "model/decoder=pooled",
    "model.hidden_size=1024",
    "model.num_latents=512",
    "model.num_heads=8",
    "model.mlp_ratio=1",
    "model.encoder.embed=false",
    "model.encoder.positions=fourier",
    "model.encoder.num_bands=64",
    "model.encoder.num_cross=8",
    "model.encoder.self_per_cross=6",
    "model.encoder.last_block=true",
    "model.encoder.cross_qk_width=261",
    "model.decoder.norm=false",
]


def test_the_image_classifier_of_the_paper_has_its_sizes():
    layout = image_layout(224, 224, 3, 1000)
    config = compose(IMAGENET)
    with torch.device("meta"):
        model = build_from_config(config, layout)
    encoder = model.encoder
    assert encoder.latents.shape == (512, 1024) and encoder.iterations == 8
    assert encoder.inputs["image"].features.shape == (1, 224 * 224, 2 * (2 * 64 + 1))
    assert (len(encoder.cross), [len(block) for block in encoder.blocks]) == (2, [6])

    def layer(width: int, context: int, inner: int, own: bool) -> int:
        norms = 2 * width * 2 + (0 if own else 2 * context)
        attention = (width + 1) * inner + 2 * (context + 1) * inner + (inner + 1) * width
        return norms + attention + 2 * (width + 1) * width

    expected = 512 * 1024 + 2 * layer(1024, 261, 261, False) + 6 * layer(1024, 1024, 1024, True) + 1025 * 1000
    assert count(model) == expected
    assert round(count(model) / 1e6, 1) == 44.9  # the paper's table 1


@pytest.mark.parametrize("share, crosses, blocks", (("none", 4, 4), ("all", 1, 1), ("all_but_first", 2, 2)))
def test_a_last_block_shares_its_weights_by_the_same_rule(share, crosses, blocks):
    encoder = PerceiverEncoder(tiny_layout(), share_cross=share, share_self=share, num_cross=4, last_block=True, **TINY)
    single = PerceiverEncoder(tiny_layout(), **TINY)
    cross, block = count(single.cross[0]), count(encoder.blocks[0])
    assert (len(encoder.cross), len(encoder.blocks)) == (crosses, blocks)
    assert count(encoder) == count(single) + (crosses - 1) * cross + blocks * block


def prepared_contexts(encoder) -> list:
    """What keys and values were computed of, from now on."""
    seen = []
    for cross in encoder.cross:
        original = cross.prepare
        cross.prepare = lambda *a, original=original, **k: seen.append(a[0]) or original(*a, **k)
    return seen


@pytest.mark.parametrize("share, contexts", (("all", 3), ("all_but_first", 4), ("none", 6)))
def test_a_timestep_an_iteration_equals_a_plain_recurrence(share, contexts):
    torch.manual_seed(0)
    layout = tiny_layout(frames=3, boundary=GLOBAL, gaps=True)
    encoder = PerceiverEncoder(
        layout, inputs_per_iteration="timestep", num_cross=2, share_cross=share, share_self=share, **TINY
    )
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = tiny_batch(layout)
    field = batch.inputs["prognostic"]
    valid = torch.rand_like(field.values) > 0.4
    batch = replace(batch, inputs={**batch.inputs, "prognostic": replace(field, valid=valid)})
    seen = prepared_contexts(encoder)
    found = encoder(batch)
    assert len(seen) == contexts and all(tokens.shape == (2, 120, 8) for tokens in seen)
    assert found.tokens.shape == (2, 1, 3, 8) and torch.equal(found.times, field.times[:, -1:])

    latents, distinct = encoder.latents.expand(2, -1, -1), {"all": 1, "all_but_first": 2, "none": 6}[share]
    for iteration in range(6):
        frame = iteration % 3
        given = [encoder.inputs[name](batch.inputs[name], batch.base_time) for name in layout.inputs]
        tokens = torch.cat([given[0][0][:, frame], given[1][0][:, 0]], dim=1)
        mask = torch.cat([given[0][1][:, frame], torch.ones(2, 60, dtype=torch.bool)], dim=1)
        which = 0 if share == "all" else min(iteration, distinct - 1)
        latents = encoder.cross[which](latents, tokens, mask=mask)
        if iteration < 5:
            which = 0 if share == "all" else min(iteration, len(encoder.blocks) - 1)
            for layer in encoder.blocks[which]:
                latents = layer(latents)
    torch.testing.assert_close(found.tokens[:, 0], latents)


def test_the_recurrence_reads_the_last_frame_last_and_observations_with_their_frame():
    torch.manual_seed(0)
    layout = observed_layout(frames=3)
    options = [f"model.{name}={value}" for name, value in (("hidden_size", 16), ("num_heads", 2), ("num_latents", 4))]
    given = ["model=perceiver", *options, "model.encoder.inputs_per_iteration=timestep"]
    model = build([*given, "model.encoder.share_cross=all", "model/processor=video_dit"], layout).eval()
    assert model.encoder.frames == "joint"
    batch = tiny_batch(layout)
    first = replace(batch.observations, value=batch.observations.value + (batch.observations.frame == 0))
    seen = prepared_contexts(model.encoder)
    model.encoder(batch)
    model.encoder(replace(batch, observations=first))
    changed = [not torch.equal(one, other) for one, other in zip(seen[:3], seen[3:], strict=True)]
    assert changed == [True, False, False]


@pytest.mark.parametrize("decoder", ("perceiver_io", "grid_patch", "lead_time", "video_patch"))
def test_the_recurrence_goes_before_any_decoder(decoder):
    layout = tiny_layout(frames=3, leads=tuple(range(HOUR, 49 * HOUR, HOUR)))
    options = [f"model.{name}={value}" for name, value in (("hidden_size", 16), ("num_heads", 2), ("num_latents", 4))]
    given = ["model=perceiver", *options, "model.patch_size=2", "model.depth=1", f"model/decoder={decoder}"]
    model = build([*given, "model.encoder.inputs_per_iteration=timestep"], layout)
    assert model(tiny_batch(layout))["forecast"].shape == (2, 48, 2, 6, 10)


# Tokens of published models


@pytest.mark.parametrize("spacing", ("linear", "log"))
@pytest.mark.parametrize("max_frequency", (None, 7.0))
@pytest.mark.parametrize("frames", (1, 3))
def test_fourier_positions_of_cells_are_concatenated(spacing, max_frequency, frames):
    layout = image_layout(4, 5, 2, 1, frames)
    tokens = ConcatenatedTokens(
        layout.inputs["image"],
        positions="fourier",
        value_size=None,
        num_bands=3,
        spacing=spacing,
        max_frequency=max_frequency,
    )
    batch = tiny_batch(layout)
    found, valid = tokens(batch.inputs["image"], batch.base_time)
    axes = (4, 5) if frames == 1 else (frames, 4, 5)
    assert valid is None and found.shape == (2, frames, 20, 2 + len(axes) * 7) and tokens.size == found.shape[-1]
    for index in np.ndindex(frames, 4, 5):
        place = [-1 + 2 * i / (size - 1) for i, size in zip(index[3 - len(axes) :], axes, strict=True)]
        raw, sines, cosines = [], [], []
        for x, size in zip(place, axes, strict=True):
            top = size / 2 if max_frequency is None else max_frequency
            steps = [band / 2 for band in range(3)]
            bands = [1 + (top - 1) * step if spacing == "linear" else top**step for step in steps]
            raw.append(x)
            sines += [math.sin(math.pi * band * x) for band in bands]
            cosines += [math.cos(math.pi * band * x) for band in bands]
        expected = [*batch.inputs["image"].values[(0, index[0], slice(None), *index[1:])], *raw, *sines, *cosines]
        given = found[0, index[0], index[1] * 5 + index[2]]
        torch.testing.assert_close(given, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ("learned", "projected"))
def test_learned_positions_are_added_or_further_channels_and_values_projected_first(positions):
    layout = image_layout(4, 5, 2, 1)
    tokens = ConcatenatedTokens(
        layout.inputs["image"], positions=positions, value_size=6, num_bands=1, spacing="linear", max_frequency=None
    )
    batch = tiny_batch(layout)
    values = batch.inputs["image"].values.flatten(3).transpose(2, 3) @ tokens.value.weight.T + tokens.value.bias
    if positions == "learned":
        expected = values + tokens.table
    else:
        places = tokens.table @ tokens.project.weight.T + tokens.project.bias
        expected = torch.cat([values, places.expand_as(values)], dim=-1)
    found, _ = tokens(batch.inputs["image"], batch.base_time)
    assert tokens.size == found.shape[-1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("activation, matrices", (("gelu", 2), ("geglu", 3)))
def test_feed_forwards_with_and_without_gate(activation, matrices):
    mlp = MLP(6, ratio=4, activation=activation)
    assert count(mlp) == matrices * 4 * 6 * 6 + (matrices - 1) * 4 * 6 + 6
    x = torch.randn(2, 3, 6)
    if activation == "gelu":
        hidden = F.gelu(x @ mlp.up.weight.T + mlp.up.bias)
    else:
        value, gate = mlp.up.weight[:24], mlp.up.weight[24:]
        hidden = (x @ value.T + mlp.up.bias[:24]) * F.gelu(x @ gate.T + mlp.up.bias[24:])
    torch.testing.assert_close(mlp(x), hidden @ mlp.down.weight.T + mlp.down.bias)


@pytest.mark.parametrize(
    "options, sentence",
    (
        (dict(inputs_per_iteration="frame"), "use one of all, timestep"),
        (dict(positions="fourier"), "use model.encoder.embed=false"),
        (dict(embed=False, positions="rotary"), "use one of none, fourier, learned, projected"),
    ),
)
def test_encoders_that_cannot_be(options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        PerceiverEncoder(tiny_layout(), **{**TINY, **options})
    assert "\n" not in str(error.value)
