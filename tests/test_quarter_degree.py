"""experiment=healda_quarter_degree: its full size on the meta device, a reduced one in training; truth on latitudes and
longitudes beside fixed fields on HEALPix, and windows of HEALPix latents around the places of the truth."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from data.datasets.ufs_era5 import UfsEra5, era5_variables, store_name
from data.datasets.ufs_miniature import write_miniature
from data.grids import LatLonGrid
from data.healpix import HEALPixGrid, neighbours
from evaluation.regions import land_fraction
from models.attention.disk import Disk
from models.composition import build, build_from_config, compose
from models.decoders.windows import Windows
from models.patches import HEALPixPatches
from tests.model_examples import REGION, tiny_batch, tiny_layout
from tests.tiny_run import tiny_loop
from training.tracking import NoTracker

SPLIT = {
    "train": ["2021-12-01", "2021-12-05"],
    "validation": ["2021-12-06", "2021-12-06"],
    "test": ["2021-12-07", "2021-12-08"],
}
VARIABLES = ("T850", "tas", "sst")
PATCHES = HEALPixPatches(HEALPixGrid(3, "padxy"), 2)  # 192 latent cells
TRUTH = LatLonGrid.with_poles(19, 24)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    return write_miniature(
        tmp_path_factory.mktemp("miniature"),
        level=3,
        frames=32,
        variables=[item for item in era5_variables() if store_name(item) in VARIABLES],
        stations=8,
        footprints=12,
    )


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRASPHERE_CACHE", str(tmp_path / "cache"))


def opened(miniature, **options) -> UfsEra5:
    return UfsEra5(
        str(miniature.observations), str(miniature.fields), level=3, variables=VARIABLES, split=SPLIT, **options
    )


# The experiment


def test_the_full_size_builds_on_the_meta_device():
    config = compose(["experiment=healda_quarter_degree"])
    data, task = (instantiate(node, _convert_="all") for node in (config.data, config.task))
    layout = task.layout(data)
    assert layout.inputs["static"].grid == HEALPixGrid(8, "padxy")
    target = layout.targets["analysis"].grid
    assert target.shape == (721, 1440) and target.latitude[0] == 90 and target.is_global
    with torch.device("meta"):
        model = build_from_config(config, layout)
    assert all(parameter.is_meta for parameter in model.parameters())
    blocks, decoder = model.processor.blocks, model.decoder["analysis"]
    assert len(blocks) == 18 and model.encoder.latent_layout.num_tokens == 49_152
    disks = {block.spatial.disk for block in blocks}
    assert len(disks) == 1 and isinstance(next(iter(disks)), Disk)
    assert next(iter(disks)).angle == pytest.approx(np.deg2rad(10.46))
    assert decoder.head.in_features == 128 and decoder.windows.tokens.shape[1] == 9
    assert not model.adapter


def test_a_reduced_form_trains_two_steps(miniature, tmp_path):
    overrides = [
        "experiment=healda_quarter_degree",
        *miniature.overrides,
        "data.latlon=[9,12]",
        "model.depth=2",
        "model.hidden_size=16",
        "model.num_heads=2",
        "model.observation_heads=2",
        "model.decoder.hidden_size=8",
        "model.decoder.num_heads=2",
        "model.processor.radius=40",  # cells of level 1 are 29 degrees apart
        "task.frames=2",
    ]
    config = compose(overrides)
    data, task = (instantiate(node, _convert_="all") for node in (config.data, config.task))
    model = build_from_config(config, task.layout(data))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tiny_loop(tmp_path, data, task=task, model=model, max_steps=2, batch_size=1, validate_every=2).run(NoTracker())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2 and all(np.isfinite(row["train/loss"]) for row in rows)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"encoder.embed.weight", "decoder.analysis.head.weight"} <= moved
    assert any(name.startswith("processor.blocks.1.") for name in moved)


# Truth on latitudes and longitudes


def test_truth_is_interpolated_and_fixed_fields_stay_on_their_cells(miniature):
    data, cells = opened(miniature, latlon=(19, 24)), opened(miniature)
    assert data.grid == TRUTH == LatLonGrid(np.linspace(90, -90, 19), np.arange(24) * 15.0)
    assert data.static_grid == cells.grid
    layout = data.layout(frames=2)
    assert (layout.inputs["static"].grid, layout.targets["analysis"].grid) == (cells.grid, TRUTH)
    values, own = data.read([3]), cells.read([3])
    assert values.shape == (1, 3, 19, 24) and data.static.shape == (2, 768)
    assert (values[0, 0, 0] - values[0, 0, 0, 0]).abs().max() < 1e-3  # the pole is one place
    nearest = own[..., cells.grid.cell_of(TRUTH.coordinates)].unflatten(-1, TRUTH.shape)
    smooth = slice(0, 2)  # the sea surface ends at coasts
    assert (values - nearest)[:, smooth].abs().mean() < 0.1 * nearest[:, smooth].std()
    assert own[:, smooth].amin() <= values[:, smooth].amin() and values[:, smooth].amax() <= own[:, smooth].amax()
    assert values[:, 2].isnan().any() and values[:, 2].isfinite().any()
    land = land_fraction(data)
    assert land.shape == TRUTH.shape
    assert torch.equal(land.flatten(), land_fraction(cells)[cells.grid.cell_of(TRUTH.coordinates)])


@pytest.mark.parametrize("latlon", ([7], [1, 12], [7, 12, 3]))
def test_a_wrong_grid_is_refused(latlon):
    with pytest.raises(ValueError, match=r"data\.latlon=\[.*\] must be two numbers of at least 2, rows and columns"):
        UfsEra5(split=SPLIT, latlon=latlon)


# Windows of HEALPix latents


def test_every_place_reads_its_cell_and_those_that_touch_it():
    windows = Windows.of(PATCHES, TRUTH.coordinates, 3)
    group = windows.slot // windows.points.shape[1]
    assert torch.equal(windows.points.flatten()[windows.slot], torch.arange(TRUTH.num_points))
    cell = PATCHES.cell_of(TRUTH.coordinates)
    around = torch.cat([cell[:, None], neighbours(cell, 2, "padxy")], dim=1)
    for tokens, inside, expected in zip(windows.tokens[group], windows.inside[group], around, strict=True):
        assert set(tokens[inside].tolist()) == set(expected[expected >= 0].tolist())
        assert inside.sum() == (expected >= 0).sum()
    assert (~windows.inside).any()  # eight cells have seven neighbours


def test_offsets_point_eastwards_and_northwards_in_cells():
    places = torch.tensor([[0.0, 359.0], [0.0, 1.0], [3.0, 0.0], [-89.9, 77.0]], dtype=torch.float64)
    windows = Windows.of(PATCHES, places, 3)
    slots = windows.points.shape[1]
    width = np.sqrt(4 * np.pi / 192)
    for place, slot in enumerate(windows.slot.tolist()):
        group, row = divmod(slot, slots)
        for token, inside, offset in zip(
            windows.tokens[group], windows.inside[group], windows.offsets[group, row], strict=True
        ):
            latitude, longitude = np.deg2rad(PATCHES.coordinates[token].numpy())
            north, east = np.deg2rad(places[place].numpy())
            turn = east - longitude
            expected = [
                np.cos(north) * np.sin(turn),
                np.sin(north) * np.cos(latitude) - np.cos(north) * np.sin(latitude) * np.cos(turn),
            ]
            if inside:
                np.testing.assert_allclose(offset, np.array(expected) / width, atol=1e-5)
    assert windows.own.abs().max() < 1


@pytest.mark.parametrize("size, sentence", ((2, "must be an odd number"), (5, "is too wide for HEALPix latents")))
def test_other_windows_are_refused(size, sentence):
    with pytest.raises(ValueError, match=rf"model\.decoder\.window={size} {sentence}"):
        Windows.of(PATCHES, TRUTH.coordinates, size)


LOCAL = [
    "model=video_dit",
    "model/decoder=perceiver_io",
    "model/size=tiny",
    "model.hidden_size=16",
    "model.depth=1",
    "model.num_heads=2",
    "model.patch_size=2",
    "model.decoder.scope=local",
]


def built(layout):
    torch.manual_seed(0)
    model = build(LOCAL, layout)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("target", (None, REGION), ids=("healpix", "region"))
def test_outputs_depend_on_their_window_of_latents_alone(target):
    layout = tiny_layout(HEALPixGrid(3, "nest"), frames=1, target_grid=target)
    model = built(layout)
    decoder, grid = model.decoder["forecast"], layout.targets["forecast"].grid
    batch = tiny_batch(layout)
    latents = model.encoder(batch)
    tokens = latents.tokens.detach().requires_grad_()
    output = decoder(latents.with_tokens(tokens), batch.queries()["forecast"]).flatten(3)
    for place in (0, 17, grid.num_points - 1):
        reads = torch.autograd.grad(output[0, 0, 0, place], tokens, retain_graph=True)[0][0, 0].any(dim=-1)
        cell = PATCHES.cell_of(grid.coordinates[place])
        around = {cell.item(), *neighbours(cell, 2, "padxy").tolist()} - {-1}
        assert set(reads.nonzero()[:, 0].tolist()) == around


@pytest.mark.parametrize("chunk", (1, 7, 1000))
def test_chunks_and_chosen_places_change_nothing(chunk):
    layout = tiny_layout(HEALPixGrid(3, "padxy"), frames=1, target_grid=REGION)
    model = built(layout)
    batch = tiny_batch(layout)
    whole = model(batch)["forecast"]
    model.decoder["forecast"].chunk_size = chunk
    torch.testing.assert_close(model(batch)["forecast"], whole, rtol=1e-5, atol=1e-6)
    for places in (torch.tensor([5]), torch.tensor([62, 0, 17, 3]), model.draw_places(0.4)["forecast"]):
        some = model(replace(batch, places={"forecast": places}))["forecast"]
        torch.testing.assert_close(some, whole.flatten(3)[..., places], rtol=1e-5, atol=1e-6)
