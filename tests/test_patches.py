"""Patches of HEALPix grids, and which patch holds a place, against loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.batch import Batch
from data.grids import LatLonGrid
from data.healpix import HEALPixGrid, convert
from models import build
from models.patches import HEALPixPatches, Patches, patches_of
from tests.model_examples import GLOBAL, REGION, observed_layout, tiny_batch

ORDERS = ("nest", "ring", "padxy")


def parent(cell: torch.Tensor, level: int, order: str, levels: int) -> torch.Tensor:
    """The pad-XY id, `levels` coarser, of the cell that holds each cell."""
    nest = convert(cell, level, source=order, target="nest") // 4**levels
    return convert(nest, level - levels, source="nest", target="padxy")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("level, patch_size", ((0, 1), (1, 2), (2, 1), (2, 2), (3, 4)))
def test_a_patch_is_the_cells_of_one_coarser_cell(level, patch_size, order):
    grid = HEALPixGrid(level, order)
    patches = HEALPixPatches(grid, patch_size)
    ids = torch.arange(grid.num_points)
    images = patches.to_images(ids[None, None].float())  # (12, 1, n, n)
    assert torch.equal(patches.from_images(images)[0, 0], ids.float())
    levels = patch_size.bit_length() - 1
    rows = 2**level // patch_size
    for face in range(12):
        for row in range(rows):
            for column in range(rows):
                token = (face * rows + row) * rows + column
                square = images[
                    face,
                    0,
                    row * patch_size : (row + 1) * patch_size,
                    column * patch_size : (column + 1) * patch_size,
                ]
                assert (parent(square.long().flatten(), level, order, levels) == token).all()
    assert torch.equal(patches.cell_of(grid.coordinates), parent(ids, level, order, levels))
    centres = HEALPixGrid(level - levels, "padxy").coordinates
    torch.testing.assert_close(patches.coordinates, centres, rtol=0, atol=0)
    assert patches.num_tokens == 12 * rows**2 == len(centres)


def test_the_pixels_of_a_face_run_from_its_northern_corner():
    """Latitude and longitude of face 0 at level 1, as the published model has them."""
    latitude, longitude = HEALPixGrid(1, "padxy").coordinates[:4].T
    assert np.allclose(latitude, [66.44, 41.81, 41.81, 19.47], atol=0.01)
    assert np.allclose(longitude, [45.0, 67.5, 22.5, 45.0])


def test_places_without_a_cell():
    patches = patches_of(HEALPixGrid(1), 2)
    places = torch.tensor([[float("nan"), 0.0], [0.0, float("inf")], [91.0, 0.0], [90.0, 725.0], [0.0, -360.0]])
    found = patches.cell_of(places)
    assert found[:3].tolist() == [-1, -1, -1]
    assert (found[3:] >= 0).all()
    assert found[4] == patches.cell_of(torch.tensor([[0.0, 0.0]]))


@pytest.mark.parametrize("patch_size", (0, 3, 8, (3, 3)))
def test_patches_that_do_not_fit_are_refused(patch_size):
    with pytest.raises(ValueError, match=r"must be a power of 2 up to 4 on a HEALPix grid of level 2, like model\.pa"):
        patches_of(HEALPixGrid(2), patch_size)


@pytest.mark.parametrize("grid", (GLOBAL, REGION, LatLonGrid([50.0, 40.0, 30.0], [170.0, 175.0, 180.0, 185.0])))
@pytest.mark.parametrize("patch_size", (1, 2, (3, 4)))
def test_a_place_lies_in_the_patch_of_its_nearest_cell(grid, patch_size):
    patches = Patches.of(grid, patch_size)
    rng = np.random.default_rng(0)
    places = np.stack([rng.uniform(-90, 90, 300), rng.uniform(-200, 400, 300)], axis=1)
    found = patches.cell_of(torch.from_numpy(places)).tolist()
    rows, columns = np.array(grid.latitude), np.array(grid.longitude)
    row_step, column_step = abs(rows[1] - rows[0]), abs((columns[1] - columns[0] + 180) % 360 - 180)
    counted = 0
    for (latitude, longitude), cell in zip(places, found, strict=True):
        down = np.abs(rows - latitude)
        across = np.abs((columns - longitude + 180) % 360 - 180)
        row, column = int(down.argmin()), int(across.argmin())
        near = across[column] <= column_step / 2 and (grid.is_global or down[row] <= row_step / 2)
        expected = (row + patches.top) // patches.size[0] * patches.columns + (column + patches.left) // patches.size[1]
        assert cell == (expected if near else -1), (latitude, longitude)
        counted += near
    assert 0 < counted <= 300


def reordered(batch: Batch, order: str) -> Batch:
    """A pad-XY batch in another order of cells."""
    level = batch.inputs["static"].grid.level
    grid = HEALPixGrid(level, order)
    source = convert(torch.arange(grid.num_points), level, source=order, target="padxy")

    def moved(field):
        reference = field.reference
        if reference is not None:
            reference = replace(reference, values=reference.values[..., source])
        return replace(field, values=field.values[..., source], grid=grid, reference=reference)

    layout = observed_layout(grid)
    inputs = {name: moved(field) for name, field in batch.inputs.items()}
    targets = {name: moved(field) for name, field in batch.targets.items()}
    return Batch(inputs=inputs, targets=targets, layout=layout, observations=batch.observations)


@pytest.mark.parametrize("order", ("nest", "ring"))
def test_the_order_of_cells_changes_neither_tokens_nor_outputs(order):
    torch.manual_seed(0)
    tiny = ["model=healda_v2", "model/size=tiny", "model.hidden_size=16", "model.depth=1", "model.num_heads=2"]
    layout = observed_layout(HEALPixGrid(2, "padxy"))
    batch = tiny_batch(layout)
    other = reordered(batch, order)
    model, moved = (build(tiny, given.layout).eval() for given in (batch, other))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    moved.load_state_dict(model.state_dict())
    ours, theirs = model.encoder(batch), moved.encoder(other)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.context.offsets, theirs.context.offsets)
    back = convert(torch.arange(192), 2, source="padxy", target=order)
    assert torch.equal(moved(other)["forecast"][..., back], model(batch)["forecast"])


def test_a_cell_changes_the_token_that_holds_it_and_no_other():
    torch.manual_seed(0)
    layout = observed_layout(HEALPixGrid(2, "ring"))
    batch = tiny_batch(layout, rows=0)
    model = build(["model=healda_v2", "model/size=tiny", "model.hidden_size=16"], layout).eval()
    before = model.encoder(batch).tokens
    field = batch.inputs["static"]
    for cell in (0, 17, 100, 191):
        values = field.values.clone()
        values[..., cell] += 1
        after = model.encoder(replace(batch, inputs={"static": replace(field, values=values)})).tokens
        changed = (after != before).any(dim=(0, 1, 3)).nonzero().flatten()
        assert changed.tolist() == [int(parent(torch.tensor(cell), 2, "ring", 1))]
