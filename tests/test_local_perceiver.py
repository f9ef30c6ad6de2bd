"""Local cross-attention of gridded latents: what each reads, against dense masked attention in double precision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.grids import PlanarGrid, Points
from models import build
from models.composition import build_from_config, compose
from models.neighbours import directions, pairs, straight, table
from tests.model_examples import (
    COARSE,
    GLOBAL,
    REGION,
    SPHERE,
    STATIONS,
    observed_layout,
    tiny_batch,
    tiny_layout,
)

TINY = ["model/encoder=local_perceiver", "model/processor=identity", "model/decoder=perceiver_io", "model/size=tiny"]
TINY += ["model.hidden_size=16", "model.depth=1", "model.num_heads=2", "model.patch_size=2", "model.dropout=0"]
WITHIN = ["model.encoder.neighbours=null", "model.encoder.radius=40"]
PLANE = PlanarGrid.regular(6, 8, spacing=2.0)


def encoder(*given: str, layout):
    torch.manual_seed(0)
    made = build([*TINY, *given], layout).encoder.eval()
    for name, parameter in made.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def near_by_hand(places: torch.Tensor, cells: torch.Tensor, *, nearest: int | None, radius: float | None, plane: bool):
    """(P, N) bool: whether a place belongs to a latent, from angles (haversine) or distances."""
    if plane:
        distance = (places[:, None] - cells).square().sum(-1).sqrt()
    else:
        a, b = torch.deg2rad(places)[:, None], torch.deg2rad(cells)
        half = ((a - b) / 2).sin().square()
        distance = 2 * (half[..., 0] + a[..., 0].cos() * b[..., 0].cos() * half[..., 1]).clamp(max=1).sqrt().asin()
        distance = torch.rad2deg(distance)
    if radius is not None:
        return distance <= radius
    return distance <= distance.sort(dim=1).values[:, [min(nearest, len(cells)) - 1]] + 1e-9


def attended(layer, queries: torch.Tensor, tokens: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Dense attention of (N, D) to (M, D) where near (N, M); rows without any token get none."""
    attention, heads = layer.attention, layer.attention.num_heads
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(0, 1)  # noqa: E731
    query = split(attention.query(layer.query_norm(queries)))
    normed = layer.context_norm(tokens)
    logits = query @ split(attention.key(normed)).mT * attention.scale
    weights = logits.masked_fill(~near, -torch.inf).softmax(-1).nan_to_num(0.0)
    mixed = attention.output((weights @ split(attention.value(normed))).transpose(0, 1).flatten(1))
    y = queries + torch.where(near.any(1)[:, None], mixed, 0.0)
    return y + layer.mlp(layer.mlp_norm(y))


@pytest.mark.parametrize("options", ([], WITHIN, ["model.encoder.num_cross=2", "model.encoder.neighbours=1"]), ids=len)
@pytest.mark.parametrize("grid", (GLOBAL, REGION, SPHERE, STATIONS, PLANE), ids=lambda grid: grid.kind)
def test_latents_equal_dense_attention_to_what_is_near(grid, options):
    if grid is PLANE and options is WITHIN:
        options = [WITHIN[0], "model.encoder.radius=3.5"]
    made = encoder(*options, layout=tiny_layout(grid, gaps=True))
    batch = tiny_batch(tiny_layout(grid, gaps=True))
    field = batch.inputs["prognostic"]
    valid = torch.rand(field.values.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    valid[:, :, :, ..., 0] = False
    values = torch.where(valid, field.values, torch.nan)
    batch = replace(batch, inputs={"prognostic": replace(field, values=values, valid=valid)})
    found = made(batch)

    tokens, present = made._tokens(batch)
    settings = {"nearest": made.neighbours, "radius": None}
    if made.neighbours is None:
        settings["radius"] = 3.5 if grid is PLANE else 40.0
    near = near_by_hand(grid.coordinates, made.coordinates, **settings, plane=grid is PLANE)
    held = torch.zeros_like(near)
    held[made.near[made.near >= 0] % len(near), (made.near >= 0).nonzero()[:, 0]] = True
    if made.neighbours is None:
        assert torch.equal(held, near)
    else:  # of latents equally far away, some
        assert (near | ~held).all() and (held.sum(1) == min(made.neighbours, near.shape[1])).all()
    near = held.repeat(2, 1).T  # two frames
    made.double()
    for sample in range(2):
        queries = (made.latent + made.position(made.places.double())).detach()
        for layer in made.cross:
            queries = attended(layer, queries, tokens[sample].double(), near & present[sample])
        torch.testing.assert_close(found.tokens[sample, 0].double(), queries, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.valid[sample, 0], (near & present[sample]).any(1))


def test_frames_alone_equal_samples_of_one_frame():
    layout = tiny_layout(gaps=True)
    made = encoder("model.encoder.frames=each", layout=layout)
    batch = tiny_batch(layout)
    whole = made(batch)
    assert whole.tokens.shape[1] == 2 and whole.frames == (0, 2)
    tokens, present = made._tokens(batch)
    assert tokens.shape[0] == 4 and present.all()
    changed = batch.inputs["prognostic"]
    changed = replace(changed, values=torch.cat([changed.values[:, :1] + 1, changed.values[:, 1:]], dim=1))
    other = made(replace(batch, inputs={"prognostic": changed}))
    assert torch.equal(other.tokens[:, 1], whole.tokens[:, 1]) and not torch.equal(
        other.tokens[:, 0], whole.tokens[:, 0]
    )


@pytest.mark.parametrize("frames", ("joint", "each"))
@pytest.mark.parametrize("options", ([], WITHIN), ids=("nearest", "radius"))
def test_observations_are_read_by_the_latents_near_them(options, frames):
    layout = observed_layout(GLOBAL, analysis=False)
    made, batch = encoder(*options, f"model.encoder.frames={frames}", layout=layout), tiny_batch(layout)
    found = made(batch)
    observed = batch.observations
    places = torch.stack([observed.latitude, observed.longitude], dim=-1).double()
    near_rows = near_by_hand(
        places, made.coordinates, nearest=made.neighbours, radius=40.0 if options else None, plane=False
    )
    near_cells = near_by_hand(
        GLOBAL.coordinates, made.coordinates, nearest=made.neighbours, radius=40.0 if options else None, plane=False
    )
    tokens, _ = made._tokens(batch)
    rows = made.observations.rows(observed, batch.base_time)
    made.double()
    for sample in range(2):
        for frame in range(found.tokens.shape[1]):
            own = observed.batch == sample
            own = own & (observed.frame == frame) if frames == "each" else own
            group = sample * found.tokens.shape[1] + frame
            joined = torch.cat([tokens[group], rows]).double()
            near = torch.cat([near_cells, near_rows & own[:, None]]).T
            queries = attended(made.cross[0], made.latent + made.position(made.places.double()), joined, near)
            torch.testing.assert_close(found.tokens[sample, frame].double(), queries, rtol=1e-4, atol=1e-5)


def test_no_observations_leave_the_fields():
    layout = observed_layout(GLOBAL, analysis=False)
    made, batch = encoder(layout=layout), tiny_batch(layout, rows=0)
    output = made(batch)
    output.tokens.square().mean().backward()
    assert output.valid.all()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_pairs_of_blocks_are_the_pairs_of_all(monkeypatch):
    places = directions(torch.rand(50, 2) * 100, geographic=True)
    cells = directions(torch.rand(9, 2) * 100, geographic=True)
    for options in ({"nearest": 3, "radius": None}, {"nearest": None, "radius": straight(20, geographic=True)}):
        place, cell = pairs(places, cells, **options)
        monkeypatch.setattr("models.neighbours._ROWS", 7)
        again, others = pairs(places, cells, **options)
        assert {*zip(place.tolist(), cell.tolist(), strict=True)} == {
            *zip(again.tolist(), others.tolist(), strict=True)
        }
        listed = table(place, cell, 9)
        for number in range(9):
            assert sorted(listed[number][listed[number] >= 0].tolist()) == sorted(place[cell == number].tolist())


def test_scattered_stations_get_latents_around_them():
    across = Points(np.stack([np.linspace(-10, 10, 40), (175 + np.linspace(0, 12, 40)) % 360], axis=-1))
    made = encoder(layout=tiny_layout(across, gaps=True))
    west, east = made.coordinates[:, 1].min(), made.coordinates[:, 1].max()
    assert 175 <= west < east <= 187 and made.coordinates[:, 0].abs().max() <= 10
    assert 4 <= len(made.coordinates) <= 20


@pytest.mark.parametrize(
    "wrong", (["neighbours=0"], ["radius=5"], ["neighbours=null"], [*("neighbours=null", "radius=-1")], ["num_cross=0"])
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=r"model\.encoder\."):
        build_from_config(compose([*TINY, *(f"model.encoder.{option}" for option in wrong)]), tiny_layout())


def test_a_plane_and_the_sphere_are_refused():
    layout = tiny_layout(PLANE, boundary=COARSE)
    with pytest.raises(ValueError, match=r"no distance; use model/encoder=perceiver"):
        build([*TINY, "model/decoder=lead_time"], layout)
