"""Forecasts trained on crops: what samples hold, how all of the grid is predicted, and what is refused."""

import importlib
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.curvilinear import CurvilinearGrid
from data.datasets.crops import crop_grid
from data.layout import Layout
from evaluation.stitching import Stitched
from models import build
from models.heads import Prediction
from tests.tiny_run import tiny_data, tiny_task, write_weather
from training import command_line


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("crops"), missing=0.2)


def datasets(data, split: str, **options):
    task = tiny_task(crop=[3, 4], overlap=1, **options)
    normalisation = task.fit(data)
    cropped = task.dataset(data, split, normalisation)
    assert cropped.layout == task.layout(data) == Layout.from_dict(cropped.layout.to_dict())
    assert cropped.layout.crops and cropped.layout.inputs["prognostic"].grid.shape == (3, 4)
    return cropped, task.whole(None)[0].dataset(data, split, normalisation)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_crop_holds_what_the_grid_holds_at_its_places(data, split):
    cropped, whole = datasets(data, split)
    indices = [5, 9, 30, 31]
    small, large = cropped.__getitems__(indices), whole.__getitems__(indices)
    coordinates = data.grid.coordinates.float().tolist()
    for name in ("prognostic", "forecast"):
        part, full = (batch.inputs.get(name) or batch.targets[name] for batch in (small, large))
        assert part.grid.shape == (3, 4) and torch.equal(part.times, full.times)
        for sample in range(len(indices)):
            cells = [coordinates.index(place) for place in part.coordinates[sample].tolist()]
            for field in ("filled", "valid"):
                values = getattr(full, field)[sample].flatten(2)[..., cells]
                assert torch.equal(getattr(part, field)[sample].flatten(2), values)
            physical = full.physical()[sample].flatten(2)[..., cells]
            torch.testing.assert_close(part.physical()[sample].flatten(2), physical, equal_nan=True)
            if name == "forecast":
                wanted = full.reference.values[sample].flatten(2)[..., cells]
                assert torch.equal(part.reference.values[sample].flatten(2), wanted)
    corners = {tuple(places[0].tolist()) for places in small.inputs["prognostic"].coordinates}
    assert len(corners) > 1
    again, later = (cropped.__getitems__(chosen).inputs["prognostic"].coordinates for chosen in (indices, [5, 1, 2, 3]))
    assert torch.equal(again, small.inputs["prognostic"].coordinates)
    if split == "validation":
        assert torch.equal(later[0], again[0])


def test_overlapping_crops_predict_all_of_the_grid(data):
    _, whole = datasets(data, "test")
    batch = whole.__getitems__([0, 3])

    class Knows(torch.nn.Module):
        def predict(self, tile):
            target = tile.targets["forecast"]
            place = target.coordinates.unflatten(1, target.grid.shape)
            longitudes.append(place[0, 0, :, 1].tolist())
            known = (place[..., 0] + 1000 * place[..., 1])[:, None, None]
            return {"forecast": Prediction(replace(target, values=known.expand_as(target.values), valid=None))}

    longitudes = []
    found = Stitched(Knows(), (3, 4), 1).predict(batch)["forecast"].point
    latitude, longitude = data.grid.coordinates.float().unflatten(0, data.grid.shape).movedim(-1, 0)
    torch.testing.assert_close(found.values, (latitude + 1000 * longitude).expand(2, 2, 1, -1, -1))
    assert data.grid.wraps and any(east < west for west, *_, east in longitudes)  # across the edge of the grid
    assert found.grid == data.grid and found.coordinates is None


def test_crops_that_cannot_be_are_one_sentence(data):
    with pytest.raises(ValueError, match=r"task.crop=\[5, 4\] is larger than the image of 4 x 8 cells; use a smaller"):
        tiny_task(crop=[5, 4], overlap=1).layout(data)
    bent = CurvilinearGrid(*np.meshgrid(np.arange(4.0), np.arange(8.0), indexing="ij"))
    with pytest.raises(ValueError, match="cuts latitudes and longitudes, and this grid is curvilinear"):
        crop_grid(bent, (2, 2))
    for crop in ([3], [0, 4], [2, 4]):
        with pytest.raises(ValueError, match=r"task.crop=.* must be two numbers of cells above task.overlap=2"):
            tiny_task(crop=crop, overlap=2)
    layout = tiny_task(crop=[4, 4], overlap=1).layout(data)
    for wrong, instead in (("model/encoder=grid_patch", "perceiver"), ("model/decoder=grid_patch", "lead_time")):
        with pytest.raises(ValueError, match=f"crops with coordinates of their own, which .* use model/.*={instead}"):
            build(["model=hip_metnet", "model.hidden_size=8", "model.num_heads=2", wrong], layout)


def test_a_run_on_crops_is_scored_on_all_of_the_grid(tmp_path, monkeypatch, capsys):
    write_weather(tmp_path / "weather.nc")
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("train")
    typed = (
        "model=hip_metnet data=netcdf data.path=weather.nc task.crop=[3,4] task.overlap=1 task.stacking=persistence "
        "task.input_frames=2 task.lead_times=[6,24] model/size=tiny model.hidden_size=16 model.num_heads=2 "
        "model.depth=1 model.patch_size=2 trainer.max_steps=2 trainer.batch_size=4 trainer.validation_batches=1 "
        "trainer.progress=false tracking=none hydra.run.dir=run"
    )
    split = "data.split={train: 0.7, validation: 0.15, test: 0.15}"
    monkeypatch.setattr(sys, "argv", ["train.py", split, *typed.split()])
    command_line.run(module.train, rewrite=module.arguments.rewrite, finish=module.sweep.finish)
    capsys.readouterr()
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())["t2m"]["rmse"]
    assert all(0 < scores[hours][method] < 20 for hours in ("6", "24") for method in ("ours", "network alone"))
    assert (tmp_path / "run" / "report.html").is_file()
