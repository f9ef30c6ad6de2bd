"""Evaluating a run folder, end to end: scores.json, predictions.nc, report.html, and what goes wrong."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_run import tiny_task
from torch import nn

from data.datasets.gridded import GriddedData
from evaluation.baselines import build, situation
from evaluation.evaluation import evaluate
from evaluation.gap_filling import evaluate_gap_filling
from evaluation.run_evaluation import Choices, evaluate_windows, output_folder
from evaluation.run_folder import RunFolder
from evaluation.stacking import Stacking, fit_stacking
from evaluation.summary import format_table, write_scores
from models.heads import Prediction
from training.tasks.forecast import ForecastTask

ROOT = Path(__file__).parents[1]


class Echo(nn.Module):
    """Predicts the truth plus a constant, which makes every score known."""

    def __init__(self, error: float):
        super().__init__()
        self.error = nn.Parameter(torch.tensor(error))

    def predict(self, batch):
        target = batch.targets["forecast"]
        plain = SimpleNamespace(values=target.physical() + self.error.detach())
        return {"forecast": Prediction(point=plain)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def series(folder):
    """A NetCDF file of sea temperature at two depths: land, gaps, 6-hourly, 120 frames."""
    import xarray as xr

    rng = np.random.default_rng(0)
    values = 15 + rng.normal(size=(120, 2, 4, 12)).cumsum(axis=0) * 0.3
    values[rng.random(values.shape) < 0.1] = np.nan
    values[:, :, 0, :3] = np.nan
    times = np.datetime64("2001-01-01", "ns") + np.arange(120) * np.timedelta64(6, "h")
    path = folder / "sea.nc"
    xr.Dataset(
        {"thetao": (("time", "depth", "latitude", "longitude"), values.astype("float32"), {"units": "degC"})},
        {
            "time": times,
            "depth": ("depth", [0.5, 50.0], {"units": "m"}),
            "latitude": [50.0, 45, 40, 35],
            "longitude": np.arange(12) * 2.0,
        },
    ).to_netcdf(path)
    return path


@pytest.fixture(scope="module")
def parts(series):
    """(data, task, normalisation)"""
    data = GriddedData(str(series), split={"train": 0.6, "validation": 0.1, "test": 0.3}, cache="ram")
    task = ForecastTask(
        input_frames=2, lead_times=[6, 12], reference="damped_persistence", head="deterministic", loss="mse"
    )
    return data, task, task.fit(data)


SIMPLE = ("persistence", "climatology", "damped_persistence")


def written_scores(parts, folder) -> dict:
    data, task, normalisation = parts
    found = evaluate(Echo(0.5), task, data, normalisation, baselines=SIMPLE, spectra=False)
    write_scores(found, folder)
    return found.content()


def test_scores_json_has_the_promised_form(parts, tmp_path):
    scores = written_scores(parts, tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert list(scores) == ["thetao@0.5", "thetao@50"]
    assert list(scores["thetao@50"]) == ["rmse", "mae", "bias", "acc"]
    assert list(scores["thetao@50"]["rmse"]) == ["6", "12"]
    assert list(scores["thetao@50"]["rmse"]["12"]) == ["ours", *SIMPLE]
    for score in ("rmse", "mae", "bias"):
        assert scores["thetao@0.5"][score]["6"]["ours"] == pytest.approx(0.5, abs=1e-5)
    assert "climatology" not in scores["thetao@0.5"]["acc"]["6"]  # undefined, and JSON knows no NaN
    regions = json.loads((tmp_path / "scores_by_region.json").read_text())
    assert list(regions) == ["all", "northern extratropics"] and regions["all"] == scores


def test_window_errors_add_up_to_the_scores(parts, tmp_path):
    scores = written_scores(parts, tmp_path)
    stored = np.load(tmp_path / "window_errors.npz")
    rmse = np.sqrt(stored["squared_error_persistence"].sum(0) / stored["weight"].sum(0))
    expected = [[scores[name]["rmse"][hours]["persistence"] for name in scores] for hours in ("6", "12")]
    np.testing.assert_allclose(rmse, expected)
    assert (np.diff(stored["bases"]) == 1).all() and stored["hours"].tolist() == [6, 12]


def test_every_window_counts_once_and_max_windows_spreads(parts):
    data, task, normalisation = parts
    seen = []
    found = evaluate(
        Echo(0.0),
        task,
        data,
        normalisation,
        baselines=["climatology"],
        on_forecast=lambda bases, forecast: seen.extend(bases),
    )
    windows = task.dataset(data, "test", normalisation).base_indices
    assert seen == windows.tolist() == found.bases.tolist()
    few = evaluate(Echo(0.0), task, data, normalisation, baselines=[], max_windows=3)
    assert few.bases.tolist() == windows[[0, (len(windows) - 1) // 2, len(windows) - 1]].tolist()
    with pytest.raises(ValueError, match="max_windows=0 must be at least 1"):
        evaluate(Echo(0.0), task, data, normalisation, max_windows=0)


def test_evaluation_restores_the_mode_of_the_model(parts):
    data, task, normalisation = parts
    model = Echo(0.0).train()
    evaluate(model, task, data, normalisation, baselines=[], max_windows=1)
    assert model.training


def test_stacking_takes_the_share_of_least_squares_and_scores_the_network_beside_it(parts, tmp_path):
    """The network is off by +1 everywhere; what is left of the baseline's error decides its share."""
    data, task, normalisation = parts
    task = copy.copy(task)
    task.stacking = "damped_persistence"
    fitted = fit_stacking(Echo(1.0), task, data, normalisation)
    dataset = task.dataset(data, "validation", normalisation)
    known, truth = situation(data, normalisation, dataset.base_indices, dataset.lead_steps)
    (baseline,) = build(
        [task.stacking], data, normalisation, lead_steps=dataset.lead_steps, split="validation"
    ).values()
    network, forecast = truth + 1.0, baseline.forecast(known)
    weights = data.grid.area_weights.double().expand(truth.shape) * truth.isfinite()

    def error(share: float) -> torch.Tensor:
        return (weights * ((1 - share) * network + share * forecast - truth).nan_to_num().double() ** 2).sum((0, 3, 4))

    shares = torch.linspace(0, 1, 1001)
    best = shares[torch.stack([error(float(share)) for share in shares]).argmin(0)]
    torch.testing.assert_close(fitted.weights, best, atol=1e-3, rtol=0)
    assert fitted.weights.min() > 0 and fitted.weights.max() < 1

    fitted.write(tmp_path)
    read = Stacking.read(tmp_path)
    assert read.baseline == "damped_persistence" and torch.equal(read.weights, fitted.weights)
    seen = []
    found = evaluate(
        Echo(1.0), task, data, normalisation, split="validation", baselines=["climatology"], stacking=read,
        on_forecast=lambda bases, values: seen.append(values),
    )  # fmt: skip
    mixed = network + read.weights[..., None, None] * (forecast - network)
    torch.testing.assert_close(torch.cat(seen), mixed, equal_nan=True)
    assert found.methods == ("ours", "network alone", "climatology")
    for by_hours in found.content().values():
        for methods in by_hours["rmse"].values():
            assert methods["network alone"] == pytest.approx(1.0, abs=1e-5) and methods["ours"] < 1.0
    (tmp_path / "stacking.json").write_text('{"baseline": "local_ridge"}')
    with pytest.raises(ValueError, match="is damaged"):
        Stacking.read(tmp_path)


def test_the_table_marks_the_best_and_compares_with_the_best_baseline():
    by_hours = {
        "6": {"ours": 1.2, "persistence": 2.4, "ridge": 1.5},
        "72": {"ours": 3.6, "persistence": 4.0, "ridge": 3.0},
    }
    lines = format_table({"air": {"rmse": by_hours}}).splitlines()
    assert lines[0].split() == ["RMSE", "of", "air", "6", "h", "72", "h"]
    assert lines[2].split() == ["ours", "1.200*", "3.600"]
    assert lines[4].split() == ["ridge", "1.500", "3.000*"]
    assert lines[5].split() == ["ours", "vs", "best", "baseline", "-20.0%", "+20.0%"]
    exact = {"6": {"ours": 1.2, "persistence": 0.0}, "72": {"ours": 0.0, "persistence": 0.0}}
    assert format_table({"air": {"rmse": exact}}).splitlines()[-1].split()[-2:] == ["+inf%", "+0.0%"]


def script(name: str, *arguments: str, cache: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HYDRASPHERE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / name), *arguments], capture_output=True, text=True, env=environment, cwd=cache
    )


@pytest.fixture(scope="module")
def trained(folder, series):
    """A run of two steps on the small series, without tracking."""
    run = folder / "run"
    finished = script(
        "train.py",
        "data=netcdf",
        f"data.path={series}",
        "task.lead_times=[6,12]",
        "model/size=tiny",
        "model.hidden_size=16",
        "model.num_heads=2",
        "trainer.max_steps=2",
        "trainer.batch_size=2",
        "tracking.enabled=false",
        f"hydra.run.dir={run}",
        cache=folder,
    )
    assert finished.returncode == 0, finished.stderr
    return run


def test_evaluate_writes_scores_predictions_and_a_self_contained_report(trained, folder):
    import xarray as xr

    before = json.loads((trained / "scores.json").read_text())
    assert (trained / "report.html").is_file() and (trained / "predictions.nc").is_file()  # train.py's own
    assert list(before["thetao@50"]["rmse"]["6"])[:2] == ["ours", "network alone"]
    finished = script("evaluate.py", f"run={trained}", "regions={west: [35,50,0,10]}", cache=folder)
    assert finished.returncode == 0, finished.stderr
    assert "RMSE of thetao@50" in finished.stdout and "local_ridge" in finished.stdout
    after = json.loads((trained / "scores.json").read_text())
    for name in before:
        for hours, by_method in before[name]["rmse"].items():
            assert after[name]["rmse"][hours] == pytest.approx(by_method, rel=1e-6)
    assert "west" in json.loads((trained / "scores_by_region.json").read_text())
    with xr.open_dataset(trained / "predictions.nc") as predictions:
        assert predictions["thetao"].dims == ("init_time", "lead_time", "level", "latitude", "longitude")
        land = predictions["thetao"].isel(latitude=0, longitude=slice(0, 3))
        assert bool(land.isnull().all()) and bool(predictions["thetao"].isel(latitude=2).notnull().all())
    page = (trained / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 7  # curves, maps and spectra of two variables, training
    addresses = re.findall(r"""(?:src|href)=["']?([^"'>]*)""", page)
    assert len(addresses) == 7 and all(address.startswith("data:") for address in addresses)
    assert "http" not in page and "@import" not in page and "url(" not in page
    assert "<title>run: evaluation</title>" in page and "Region: west" in page


def test_other_choices_go_to_a_folder_of_their_own(trained, folder):
    before = (trained / "scores.json").read_text()
    finished = script(
        "evaluate.py", f"run={trained}/checkpoints/last", "split=validation", "max_windows=2", "report=false",
        "predictions=false", "checkpoint=last", "baselines=[climatology]", cache=folder,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    written = trained / "evaluation_validation_last_2_windows_climatology"
    assert sorted(path.name for path in written.iterdir()) == [
        "scores.json", "scores_by_region.json", "window_errors.npz",
    ]  # fmt: skip
    assert (trained / "scores.json").read_text() == before


def test_a_list_of_baselines_is_no_record_of_the_run_in_whatever_order(tmp_path):
    run = RunFolder(tmp_path)
    assert output_folder(run, Choices()) == output_folder(run, Choices(report=False)) == tmp_path
    for given in (["persistence", "climatology"], ["climatology", "persistence", "climatology"]):
        assert output_folder(run, Choices(baselines=given)) == tmp_path / "evaluation_climatology-persistence"
    assert output_folder(run, Choices(weights="cos", baselines=[])) == tmp_path / "evaluation_cos_no_baselines"


def test_no_folder_is_named_after_what_there_is_not(tmp_path):
    run, data = RunFolder(tmp_path), SimpleNamespace(splits={"train": [], "test": []})
    for evaluator, task in ((evaluate_windows, tiny_task()), (evaluate_gap_filling, SimpleNamespace(baselines={}))):
        with pytest.raises(ValueError, match="unknown baseline 'climatolgy'; allowed: "):
            evaluator(run, None, task, data, None, Choices(baselines=["climatolgy"]))
        with pytest.raises(ValueError, match="unknown split 'tests'; allowed: train, test"):
            evaluator(run, None, task, data, None, Choices(split="tests"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either run="),
        (["run=nowhere"], "run=nowhere is neither a folder nor a run"),
        (["run=."], "run=. is not the folder of a run (it has no config.yaml)"),
        (["run=" + "0" * 32, "uri=sqlite:///none.db"], "there is no MLflow store at sqlite:///none.db"),
        (["compare=nowhere", "uri=sqlite:///none.db"], "there is no MLflow store"),
        (["runs=x"], "there is no option runs"),
        (["run=.", "weights=[1]"], "weights"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, folder):
    finished = script("evaluate.py", *arguments, cache=folder)
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1
    assert message in finished.stderr


def test_missing_and_damaged_checkpoints_are_named(trained, tmp_path):
    run = RunFolder.open(trained)
    with pytest.raises(ValueError, match="has no checkpoint 'step_7'; it has best, last, step_0000000"):
        run.model("step_7")
    damaged = tmp_path / "copy"
    (damaged / "checkpoints" / "best").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "ema.safetensors"):
        (damaged / "checkpoints" / "best" / name).write_bytes((trained / "checkpoints/best" / name).read_bytes()[:100])
    (damaged / "config.yaml").write_text((trained / "config.yaml").read_text())
    with pytest.raises(ValueError, match="is damaged"):
        RunFolder.open(damaged).model("best")


def test_a_strangers_config_runs_no_code(trained, tmp_path):
    text = (trained / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("  lead_times:", "  hours_ahead:"))
    sentence = "config.yaml is of another version: it sets task.hours_ahead, which does not exist, task.lead_times is "
    with pytest.raises(ValueError, match=f"{sentence}missing; rename or add it in that file"):
        RunFolder.open(tmp_path).task()
    (tmp_path / "config.yaml").write_text(text.replace("data.datasets.gridded.GriddedData", "os.system"))
    with pytest.raises(ValueError, match=r"os\.system is outside this project"):
        RunFolder.open(tmp_path).data()
    (tmp_path / "config.yaml").write_text("model: [1")
    with pytest.raises(ValueError, match="cannot be read"):
        _ = RunFolder.open(tmp_path).config


def test_no_option_of_evaluate_is_named_like_a_configuration_group():
    """Hydra would take `tracking=false` for the choice of a file in conf/tracking and refuse it."""
    import yaml

    options = yaml.safe_load((ROOT / "conf" / "evaluate.yaml").read_text())
    groups = {folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir()}
    assert groups >= {"tracking", "data"} and not (options.keys() - {"hydra", "defaults"}) & groups


@pytest.mark.parametrize(
    ("override", "message"),
    [("num_threads=0", "num_threads=0 must be at least 1"), ("+plot=false", "there is no option plot;")],
)
def test_a_wrong_option_of_evaluate_is_one_line(folder, override, message):
    finished = script("evaluate.py", "run=anywhere", override, cache=folder)
    assert finished.returncode == 1 and finished.stderr.count("\n") == 1
    assert message in finished.stderr and finished.stdout == ""
