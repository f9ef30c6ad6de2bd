"""A run goes on with data like its own, however they are read, and refuses others before it writes anything."""

import json
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from tiny_run import tiny_data, tiny_loop, tiny_task, write_weather

from data.grids import LatLonGrid
from data.healpix import HEALPixGrid
from data.layout import Layout, ObservationLayout, SequenceLayout, Variable
from tests.sharding_work import new_run
from training.checkpoints import check_layout
from training.ranks import Ranks
from training.run_folder import last_checkpoint
from training.tracking import NoTracker

T2M, Z = Variable("t2m", "K"), Variable("z", "m", level=500.0)
OBSERVED = ObservationLayout(3, 2, 1, 4, frames=2, step=21_600, channels=("a", "b", "c"))
QUICK = (
    "model/size=tiny", "model.hidden_size=16", "trainer.batch_size=2", "trainer.max_steps=1", "trainer.device=cpu",
    "trainer.validation_batches=1", "trainer.progress=false", "tracking=none", "report=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    return tiny_task().layout(tiny_data(tmp_path_factory.mktemp("layout"), times=80))


def changed(layout: Layout, **changes) -> Layout:
    """With another input."""
    return replace(layout, inputs={"prognostic": replace(layout.inputs["prognostic"], **changes)})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variables": (replace(T2M, units="degC"),)}, ["variables.t2m.units is 'degC', not 'K'"]),
        ({"variables": (T2M, Z)}, ["variables is [t2m, z@500], not [t2m]", "variables.z@500 is given, not absent"]),
        ({"variables": (replace(T2M, domain="sea"),)}, ["variables.t2m.domain is 'sea', not 'all'"]),
        ({"frames": 3}, ["frames is 3, not 2"]),
        ({"step": 86_400}, ["step is 86400, not 21600"]),
        ({"gaps": True}, ["gaps is True, not False"]),
        ({"frames": 62, "frames_per_group": 31}, ["frames is 62, not 2", "frames_per_group is 31, not 1"]),
        ({"grid": LatLonGrid(np.linspace(60, -60, 4), np.arange(8) * 45.0)},
         ["grid.latitude is 4 values from 60 to -60, not 4 values from 67.5 to -67.5"]),
        ({"grid": HEALPixGrid(1)},
         ["grid.kind is 'healpix', not 'latlon'", "grid.latitude is absent, not 4 values from 67.5 to -67.5",
          "grid.longitude is absent, not 8 values from 0 to 315", "grid.level is 1, not absent",
          "grid.order is 'nest', not absent"]),
    ],
)  # fmt: skip
def test_what_other_data_have_otherwise_is_named(layout, changes, said):
    other = changed(layout, **changes)
    assert layout.differences(other) == [f"inputs.prognostic.{text}" for text in said]
    assert other.differences(Layout.from_dict(json.loads(json.dumps(other.to_dict())))) == []


def test_order_inputs_observations_crops_and_tokens_count_as_well(layout):
    two, turned = changed(layout, variables=(T2M, Z)), changed(layout, variables=(Z, T2M))
    assert two.differences(turned) == ["inputs.prognostic.variables is [z@500, t2m], not [t2m, z@500]"]
    more = replace(layout, inputs={**layout.inputs, "static": layout.inputs["prognostic"]}, crops=True)
    assert layout.differences(more) == ["inputs.static is given, not absent", "crops is True, not False"]
    seen = replace(layout, observations=OBSERVED)
    assert layout.differences(seen) == ["observations is given, not absent"]
    others = replace(layout, observations=replace(OBSERVED, channels=("a", "b", "d")))
    assert seen.differences(others) == ["observations.channels is [a, b, d], not [a, b, c]"]
    tokens = [Layout({"tokens": SequenceLayout(size, 8)}, {"next": SequenceLayout(9, 4)}) for size in (9, 10)]
    assert tokens[0].differences(tokens[1]) == ["inputs.tokens.vocab_size is 10, not 9"]


def test_a_checkpoint_goes_with_other_lead_times_and_longer_data_of_its_kind(layout, tmp_path):
    tiny_loop(tmp_path / "run", tiny_data(tmp_path, times=80), max_steps=1).run(NoTracker())
    checkpoint = last_checkpoint(tmp_path / "run")
    for lead_times, times in (([6], 120), ([6, 24, 48], 80)):
        check_layout(checkpoint, tiny_task(lead_times=lead_times).layout(tiny_data(tmp_path, times=times)))
    sentence = r"resume=.*run cannot go on with what is given now: .*variables.t2m.units is 'degC', not 'K'; give the "
    with pytest.raises(ValueError, match=sentence):
        check_layout(checkpoint, changed(layout, variables=(replace(T2M, units="degC"),)))
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        check_layout(checkpoint, layout)


def test_a_run_refuses_other_units_and_writes_nothing(tmp_path):
    weather, run = write_weather(tmp_path / "weather.nc", times=120), tmp_path / "run"
    run.mkdir()
    options = [*QUICK, "data=netcdf", f"data.path={weather}", "task.stacking=null"]
    new_run(Ranks(), run, options).train()
    with xr.open_dataset(weather) as opened:
        celsius = opened.load() - 273.15
    celsius["t2m"].attrs["units"] = "degC"
    celsius.to_netcdf(tmp_path / "celsius.nc")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"t2m\.units is 'degC', not 'K'"):
        new_run(Ranks(), run, [*options, f"data.path={tmp_path / 'celsius.nc'}", f"resume={run}"])
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    longer = write_weather(tmp_path / "longer.nc", times=160)
    resumed = new_run(Ranks(), run, [*options, f"data.path={longer}", "trainer.max_steps=2", f"resume={run}"])
    assert resumed.train().progress.step == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["model=healda_v2", "data.level=1", "data.stations=10", "data.sondes=2", "task.frames=4"],
        ["task=classify"],
        ["model=perceiver", "task=masked_autoencode"],
        ["model=perceiver", "task.crop=[8,16]"],
        ["model=perceiver_ar"],
        ["model=sst_spatiotemporal", "task.reference=climatology", "task.stacking=null"],
        ["model=ocean_perceiver"],
        ["model=hip_metnet", "data=solar_stations", "task=station_forecast"],
    ],
    ids=" ".join,
)
def test_runs_of_every_kind_go_on(options, tmp_path):
    """Their data are opened again: what a layout holds must not depend on what was done before."""
    options = [*options, *(item for item in QUICK if "hidden_size" not in item)]
    new_run(Ranks(), tmp_path, options).train()
    assert new_run(Ranks(), tmp_path, [*options, "trainer.max_steps=2", f"resume={tmp_path}"]).loop.progress.step == 1
