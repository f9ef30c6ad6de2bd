"""`python train.py model=healda_v2` and `evaluate.py` as a person uses them, at a tiny size."""

import json

import numpy as np
import pytest

from evaluation.predictions import PredictionsFile
from training.run_folder import last_checkpoint

SMALL = [
    "model=healda_v2",
    "model/size=tiny",
    "model.hidden_size=16",
    "model.depth=1",
    "model.num_heads=2",
    "model.observation_heads=2",
    "trainer.max_steps=2",
    "trainer.batch_size=2",
    "trainer.progress=false",
    "task.frames=3",
    "data.level=1",
    "data.stations=10",
    "data.sondes=2",
    "data.split.train=[2001-01-01,2001-01-08]",
    "data.split.validation=[2001-01-09,2001-01-11]",
    "data.split.test=[2001-01-12,2001-01-16]",
    "tracking=none",
]


def test_a_run_trains_scores_reports_and_is_evaluated_again(command, tmp_path):
    import xarray as xr

    folder = tmp_path / "run"
    code, out, err = command("train", *SMALL, f"hydra.run.dir={folder}")
    assert code == 0, err
    assert "RMSE of t2m" in out and "-12 h" in out and "climatology" in out
    scores = json.loads((folder / "scores.json").read_text())["t2m"]["rmse"]
    assert list(scores) == ["-12", "-6", "0"]
    assert set(scores["0"]) == {"ours", "network alone", "climatology", "optimal_interpolation"}
    with xr.open_dataset(folder / "predictions.nc") as predictions:
        assert predictions.t2m.dims == ("init_time", "lead_time", "cell") and predictions.sizes["cell"] == 48
        assert predictions.attrs["grid_kind"] == "healpix" and predictions.attrs["grid_order"] == "padxy"
        assert np.isfinite(predictions.t2m).all() and predictions.latitude.dims == ("cell",)
        assert (predictions.valid_time[:, -1] == predictions.init_time).all()
    page = (folder / "report.html").read_text()
    assert "48 cells" in page and "maps of truth, analysis and error" in page and "Region: land" in page
    assert "A typical analysis" in page and "forecast started" not in page
    assert (last_checkpoint(folder) / "normalisation.safetensors").is_file()

    code, out, err = command("evaluate", f"run={folder}", "split=validation", "max_windows=2", "log=false")
    assert code == 0, err
    assert "2 analyses of the validation split" in out
    code, out, err = command("evaluate", f"run={folder}", "weights=cos", "log=false")
    assert code == 1 and "weights=cos needs a latitude-longitude grid" in err
    code, out, err = command("evaluate", f"run={folder}", "baselines=[persistence]", "log=false")
    assert code == 1 and "unknown baseline 'persistence'; allowed: climatology, optimal_interpolation" in err


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data=synthetic"], "task=assimilation needs fields with observations, like data=simulated_network"),
        (
            ["task=forecast"],
            "task=forecast needs a series of fields, like data=synthetic; with this data use",
        ),
    ],
)
def test_data_and_task_that_do_not_go_together_are_refused(command, overrides, sentence):
    code, _, err = command("train", "model=healda_v2", *overrides, "dry_run=true")
    assert code == 1 and sentence in err and err.count("\n") == 1


def test_an_explicit_choice_of_task_and_data_wins_over_the_preset(command):
    code, out, err = command("train", "model=healda_v2", "task=forecast", "data=synthetic", "dry_run=true")
    assert code == 0, err
    assert "decoder.forecast" in out


def test_the_archive_is_described_without_its_files(command):
    code, out, err = command("train", "model=healda_v2", "data=ufs_era5", "model/size=tiny", "dry_run=true")
    assert code == 0, err
    assert "decoder.analysis" in out and "the data's files are not given" in out
    code, _, err = command("train", "model=healda_v2", "data=ufs_era5", "model/size=tiny", "tracking=none")
    assert code == 1 and "data.fields is not given" in err


def test_a_failed_prediction_file_leaves_nothing(tmp_path):
    from data.healpix import HEALPixGrid
    from data.layout import Variable

    options = dict(variables=(Variable("t", "K"),), grid=HEALPixGrid(0), times=np.arange(3), lead_steps=(0,))
    with (
        pytest.raises(RuntimeError),
        PredictionsFile(tmp_path / "p.nc", **options, hours=(0.0,), calendar="standard", attributes={}),
    ):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
