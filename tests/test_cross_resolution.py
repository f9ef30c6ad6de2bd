"""The cross-resolution encoder against a plain computation, its masks, edges and resolutions, and blended windows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import ocean
from data.batch import Batch
from data.curvilinear import CurvilinearGrid
from data.field import Field
from data.grids import Grid, LatLonGrid
from data.layout import InputLayout, Layout, TargetLayout, Variable
from evaluation.window_edges import jump_ratio
from models import build
from models.decoders.windows import Windows
from models.degree_patches import DegreePatches
from models.encoders.cross_resolution import CrossResolutionEncoder
from models.patches import Patches
from tests.model_examples import COARSE, GLOBAL, HOUR, REGION, random_field, tiny_batch, tiny_layout

FINE = LatLonGrid(np.linspace(-81, 81, 10), np.arange(20) * 18.0 + 9)
OPTIONS = dict(hidden_size=8, num_heads=2, patch_size=2, mlp_ratio=1.0, calendar="none")
PLAIN = ["task=forecast", "data=synthetic", "task.stacking=null"]
SMALL = ["model=ocean_perceiver", "model/size=tiny", "model.hidden_size=16", "model.num_heads=2", "model.depth=1"]


def streams(*grids: Grid, frames: int = 1) -> Layout:
    """One variable on each grid; the first is predicted."""
    inputs = {
        f"stream_{number}": InputLayout((Variable(f"v{number}"),), grid, frames, 6 * HOUR)
        for number, grid in enumerate(grids)
    }
    return Layout(inputs, {"forecast": TargetLayout((Variable("v0"),), grids[0], (6 * HOUR,))})


def encoder(layout: Layout, **changes) -> CrossResolutionEncoder:
    torch.manual_seed(0)
    return CrossResolutionEncoder(layout, **(OPTIONS | changes)).double().eval()


def curved() -> CurvilinearGrid:
    y, x = np.meshgrid(np.linspace(0, 1, 7), np.linspace(0, 1, 9), indexing="ij")
    return CurvilinearGrid(50 + 10 * y + 4 * x, 355 + 20 * x - 6 * y)


def test_patches_hold_every_cell_of_their_domain_once_whatever_the_grid():
    for grid, extent, shape in (
        (GLOBAL, (60.0, 72.0), (3, 5)),
        (LatLonGrid(np.linspace(89.875, -89.875, 72), np.arange(144) * 2.5), (6.0, 10.0), (30, 36)),
        (REGION, (11.0, 9.0), (4, 3)),
        (curved(), (5.0, 7.0), None),
    ):
        patches = DegreePatches.over(grid, extent)
        assert shape in (None, (patches.rows, patches.columns))
        found = patches.cells_of(grid)
        held = found.index[found.index >= 0]
        assert torch.equal(held.sort().values, torch.arange(grid.num_points))
        place = torch.from_numpy(patches.place(grid.coordinates))
        for patch, (cells, pattern) in enumerate(zip(found.index, found.pattern, strict=True)):
            for slot, cell in enumerate(cells[cells >= 0]):
                row, column = divmod(patch, patches.columns)
                inside = place[cell] - torch.tensor([row, column])
                inside[1] %= patches.columns  # around the globe
                assert torch.allclose(found.position[pattern, slot], 2 * inside - 1, atol=2e-6)
    edges = [10.0, 20.0, 30.0]  # of the patches: the northern and the eastern ones belong to the last
    held = DegreePatches.over(LatLonGrid(*[np.arange(11, 30, 2)] * 2), (10, 10)).cells_of(LatLonGrid(edges, edges))
    assert [sorted(set(cells.tolist()) - {-1}) for cells in held.index] == [[0], [1, 2], [3, 6], [4, 5, 7, 8]]
    places = dict(zip(held.index[3].tolist(), held.position[held.pattern[3]].tolist(), strict=True))
    assert places == {4: [-1, -1], 5: [-1, 1], 7: [1, -1], 8: [1, 1]}
    spacious = DegreePatches.over(LatLonGrid(np.linspace(89.875, -89.875, 720), np.arange(1440) * 0.25), (6, 10))
    fine, coarse = (
        spacious.cells_of(LatLonGrid(np.linspace(90 - step / 2, step / 2 - 90, round(180 / step)), axis))
        for step, axis in ((0.25, np.arange(1440) * 0.25), (1.0, np.arange(360) + 0.375))
    )
    assert fine.index.shape == (1080, 960) and coarse.index.shape == (1080, 60)
    assert not fine.ragged and not coarse.ragged and len(fine.position) == 1


@pytest.mark.parametrize("changes", [{}, {"queries": None, "num_latents": 3}, {"sphere": "stream_1"}], ids=len)
def test_each_patch_is_one_perceiver_over_the_joined_tokens_of_its_cells(changes):
    layout = streams(GLOBAL, FINE)
    part = encoder(layout, **changes)
    batch = tiny_batch(layout, dtype=torch.float64)
    out = part(batch).tokens[:, 0]  # (B, N q, D)
    rows, columns = part.queries or (1, 1)
    queries, size = part._queries(), part.patches
    for patch in range(size.num_patches):
        tokens = []
        for name, field in batch.inputs.items():
            stream = part.streams[name]
            cells = size.cells_of(field.grid)
            index = cells.index[patch][cells.index[patch] >= 0]
            values = field.values.flatten(3)[:, 0, :, index].transpose(1, 2)  # (B, m, C)
            if stream.sphere:
                latitude, longitude = torch.deg2rad(field.grid.coordinates[index]).T
                unit = [latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin()]
                unit = torch.stack(unit, dim=-1).float().double().expand(len(values), -1, -1)
                values = torch.cat([values, unit], dim=-1)
            place = stream.table.position[stream.table.pattern[patch]][: len(index)]
            tokens.append(stream.value(values) + stream.place(place))
        latents = part.cross[0](queries, torch.cat(tokens, dim=1))
        for layer in part.blocks[0]:
            latents = layer(latents)
        if part.queries is None:
            latents = latents.mean(dim=1, keepdim=True)
        row, column = divmod(patch, size.columns)
        for query in range(rows * columns):
            i, j = divmod(query, columns)
            token = (row * rows + i) * size.columns * columns + column * columns + j
            expected = latents[:, query] + part.position(part.places[token])
            assert torch.allclose(out[:, token], expected, atol=1e-10)


def test_masked_cells_are_never_read_and_a_patch_without_any_gives_zeros():
    layout = streams(GLOBAL, FINE)
    part = encoder(layout)
    batch = tiny_batch(layout, dtype=torch.float64)
    cells = part.patches.cells_of(GLOBAL), part.patches.cells_of(FINE)
    land = {name: torch.rand(1, *field.grid.shape) < 0.4 for name, field in batch.inputs.items()}
    for mask, found in zip(land.values(), cells, strict=True):
        mask.view(-1)[found.index[4][found.index[4] >= 0]] = True  # nothing in patch 4

    def filled(content: float) -> Batch:
        inputs = {
            name: replace(field, values=torch.where(land[name], content, field.values), domain=~land[name])
            for name, field in batch.inputs.items()
        }
        return replace(batch, inputs=inputs)

    latents = part(filled(torch.nan))
    assert torch.isfinite(latents.tokens).all() and torch.equal(latents.tokens, part(filled(7.0)).tokens)
    row, column = divmod(4, part.patches.columns)
    image = latents.tokens[:, 0].unflatten(1, (part.patches.rows, 2, part.patches.columns, 2))
    valid = latents.valid[:, 0].unflatten(1, (part.patches.rows, 2, part.patches.columns, 2))
    assert not image[:, row, :, column].any() and not valid[:, row, :, column].any()
    assert image.flatten(-1).any(dim=-1).sum() == valid.sum() < valid.numel()
    latents.tokens.square().sum().backward()
    assert all(torch.isfinite(item.grad).all() for item in part.parameters() if item.grad is not None)


def test_turning_the_globe_turns_the_latents_and_curved_rows_are_read_by_their_places():
    layout = streams(GLOBAL, FINE)
    part = encoder(layout, patch_extent=(60, 72))
    part.position.weight.data.zero_()  # all that is tied to longitude
    batch = tiny_batch(layout, dtype=torch.float64)
    turned = {  # one patch eastwards: 2 of 10 columns, 4 of 20
        name: replace(field, values=field.values.roll(field.grid.shape[1] // 5, dims=-1))
        for name, field in batch.inputs.items()
    }
    image = part(batch).tokens[:, 0].unflatten(1, (6, 10))
    assert torch.allclose(part(replace(batch, inputs=turned)).tokens[:, 0].unflatten(1, (6, 10)), image.roll(2, 2))

    # The same cells in another order, as a curvilinear grid that happens to be regular, give the same latents.
    regular = LatLonGrid(np.linspace(50, 60, 6), np.linspace(0, 14, 8))
    mesh = CurvilinearGrid(*(axis.T for axis in np.meshgrid(regular.latitude, regular.longitude)))
    part = encoder(streams(regular, regular), patch_extent=(6, 5))
    other = CrossResolutionEncoder(streams(regular, mesh), **OPTIONS, patch_extent=(6, 5)).double().eval()
    given = tiny_batch(streams(regular, regular), dtype=torch.float64)
    moved = Field(given.inputs["stream_1"].values, (Variable("v1"),), mesh, given.inputs["stream_1"].times)
    one, two = ({**given.inputs}, {**given.inputs, "stream_1": moved})
    other.load_state_dict(part.state_dict())
    layouts = streams(regular, regular), streams(regular, mesh)
    results = [
        other(Batch(inputs, given.targets, layout)).tokens for inputs, layout in zip((one, two), layouts, strict=True)
    ]
    assert torch.allclose(*results, atol=1e-12)


def test_streams_apart_and_options_beyond_reason_are_refused_in_a_sentence():
    far = LatLonGrid(np.linspace(-30, -20, 4), np.linspace(100, 110, 4))
    with pytest.raises(
        ValueError, match=r"input 'stream_1' \(latitudes -30 to -20, longitudes 100 to 110\) has no cell"
    ):
        encoder(streams(REGION, far))
    for changes, words in (
        (dict(patch_extent=(0, 10)), "patch_extent=.* above 0"),
        (dict(queries=(2,)), "queries=.* rows and columns"),
        (dict(sphere="boundary"), "sphere=boundary is no input; use one of stream_0, stream_1"),
        (dict(num_cross=0), "num_cross=0"),
    ):
        with pytest.raises(ValueError, match=words):
            encoder(streams(GLOBAL, FINE), **changes)
    with pytest.raises(ValueError, match="all inputs on one grid; use model/encoder=cross_resolution"):
        build(["model/encoder=grid_patch", *SMALL[1:]], streams(GLOBAL, FINE))


def test_resolutions_of_streams_and_outputs_may_change_after_the_model_was_built():
    """A smooth field read at another resolution gives nearly the same outputs; those of a finer grid agree exactly with
    the coarse one's where their cells have the same centres."""

    def smooth(grid: Grid) -> torch.Tensor:
        latitude, longitude = torch.deg2rad(grid.coordinates).T
        return (latitude.sin() + latitude.cos() * (longitude + 0.3).cos()).view(1, 1, 1, *grid.shape).float()

    def batch(first: Grid, second: Grid, target: Grid) -> Batch:
        layout = streams(first, second)
        layout = replace(layout, targets={"forecast": replace(layout.targets["forecast"], grid=target)})
        fields = [
            replace(
                random_field(item.variables, item.grid, torch.tensor([time]), 1, torch.float32),
                values=smooth(item.grid),
            )
            for item, time in (*((item, 0) for item in layout.inputs.values()), (layout.targets["forecast"], 6 * HOUR))
        ]
        return Batch(dict(zip(layout.inputs, fields, strict=False)), {"forecast": fields[-1]}, layout)

    def latlon(step: float) -> LatLonGrid:
        return LatLonGrid(np.arange(step / 2 - 90, 90, step), np.arange(step / 2, 360, step))

    torch.manual_seed(0)
    given = [*PLAIN, "model.encoder.patch_extent=[36,36]"]
    model = build([*SMALL, *given], batch(latlon(6), latlon(12), latlon(6)).layout).eval()
    torch.nn.init.normal_(model.decoder["forecast"].head.weight, std=0.5)
    with torch.no_grad():
        given, boundary, finer = (
            model(batch(*grids))["forecast"]
            for grids in (
                (latlon(6), latlon(12), latlon(6)),
                (latlon(6), latlon(4), latlon(6)),
                (latlon(6), latlon(12), latlon(2)),
            )
        )
        both = model(batch(latlon(3), latlon(4), latlon(2)))["forecast"]
    assert (boundary - given).abs().mean() < 0.1 * given.std()
    assert finer.shape[-2:] == (90, 180) and torch.allclose(finer[..., 1::3, 1::3], given, atol=1e-4)
    assert (both - finer).abs().mean() < 0.15 * given.std()
    with pytest.raises(ValueError, match="input 'stream_1' of this batch is not what the model was built for"):
        build(["model/encoder=perceiver", *SMALL[1:], "task=forecast"], streams(latlon(6), latlon(12)))(
            batch(latlon(6), latlon(4), latlon(6))
        )


def test_blended_windows_sum_to_one_and_see_each_place_from_its_four_nearest_cells():
    for grid in (GLOBAL, LatLonGrid(np.arange(-89, 90, 2.0), np.arange(0, 300, 2.0))):
        patches = Patches.of(grid, 2)
        places = torch.from_numpy(np.random.default_rng(0).uniform([-70, 0], [59, 373], (40, 2)))
        windows = Windows.of(patches, places, 3, blend=True)
        assert torch.allclose(windows.weight.sum(dim=1), torch.ones(40))
        assert torch.equal(windows.points.flatten()[windows.slot], torch.arange(40)[:, None].expand(-1, 4))
        group, row = windows.slot // windows.points.shape[1], windows.slot % windows.points.shape[1]
        away = windows.own[windows.pattern[group], row]  # (P, 4, 2) from the centres of the windows
        weight = (torch.cos(torch.pi / 2 * away) ** 2).prod(dim=-1)
        inside = torch.from_numpy(patches.locate(places))
        inside = ((inside > 0.5) & (inside < torch.tensor([patches.rows, patches.columns]) - 0.5)).all(dim=1)
        assert inside.sum() > 5  # elsewhere the last cell answers for those beyond the edge
        assert torch.allclose(windows.weight[inside], weight[inside], atol=1e-4)


@pytest.mark.parametrize("blend", [False, True])
def test_blended_outputs_have_no_steps_where_windows_meet(blend):
    torch.manual_seed(1)
    grid = LatLonGrid(np.arange(-59.5, 60, 1.0), np.arange(0, 120, 1.0))
    lines = LatLonGrid(np.arange(-59.9, 60, 10.0), np.arange(0.05, 119, 0.1))  # so fine that steps are small elsewhere
    layout = streams(grid)
    model = build([*SMALL, *PLAIN, "model.encoder.patch_extent=[24,24]", f"model.decoder.blend={blend}"], layout).eval()
    decoder = model.decoder["forecast"]
    for part in (decoder.head, decoder.window_bias[2]):
        torch.nn.init.normal_(part.weight)
    batch = tiny_batch(layout, batch_size=1)
    with torch.no_grad():
        image = model(asked_on(lines, batch))["forecast"][0, 0, 0]
    edges = torch.arange(1, 9) * 120 - 5  # latent cells end at 11.5, 23.5, ... degrees
    ratio = jump_ratio(image, axis=1, edges=edges)
    assert ratio < 1.1 if blend else ratio > 1.5, ratio


def asked_on(grid: Grid, batch: Batch) -> Batch:
    """The same inputs, the target asked for on another grid."""
    described, field = batch.layout.targets["forecast"], batch.targets["forecast"]
    values = field.values.new_empty(*field.values.shape[:3], *grid.shape)
    layout = replace(batch.layout, targets={"forecast": replace(described, grid=grid)})
    return Batch(batch.inputs, {"forecast": Field(values, field.variables, grid, field.times)}, layout)


@pytest.mark.parametrize("kind", ["queries", "nothing"])
def test_every_stream_reaches_the_output(kind):
    layout = tiny_layout(GLOBAL, boundary=COARSE)
    given = [*PLAIN, "model.encoder.patch_extent=[60,72]"]
    stencil = 0 if kind == "nothing" else 3
    model = build([*SMALL, *given, f"model.decoder.stencil={stencil}"], layout).eval()
    torch.nn.init.normal_(model.decoder["forecast"].head.weight)
    batch = tiny_batch(layout)
    before = model(batch)["forecast"]
    for name, field in batch.inputs.items():
        other = replace(batch, inputs={**batch.inputs, name: replace(field, values=field.values + 1)})
        assert (model(other)["forecast"] - before).abs().max() > 1e-5, name


def test_the_benchmark_joins_960_and_60_tokens_a_patch():
    scene = dict(rows=1, columns=2, size="tiny", device="cpu")
    encoder, batch = ocean.encoder_and_batch(("prognostic", "boundary"), **scene)
    ocean.step(encoder, batch)()
    rows = [ocean.row(name, encoder, 0.1, 2**20, 1.1, {ocean.ALONE: 2**20}) for name in (ocean.ALONE, ocean.BOTH)]
    assert rows[1]["tokens"] == 1020 and rows[1]["patches"] == 2
    assert "| prognostic and boundary | 2 | 1020 | 100 | 1 | 1.10x | 1.00x |" in ocean.table(rows)
