"""Tables of several runs, read from their folders alone."""

import csv
import json

import numpy as np
import pytest
from safetensors.torch import save_file
from torch import zeros

from evaluation import intervals
from evaluation.compare import Comparison, find_run, find_runs

NO_STORE = "sqlite:///none.db"


def make_run(folder, *, overrides, rmse, val, windows=True, samples_per_second=None):
    """The files of a finished run that a comparison reads."""
    best = folder / "checkpoints" / "best"
    best.mkdir(parents=True)
    save_file({"a": zeros(3, 4), "b": zeros(5)}, best / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.yaml").write_text("model: {}\ntask: {}\ndata: {}\n")
    (folder / "overrides.txt").write_text("".join(f"{item}\n" for item in overrides))
    lines = [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.9, "val/loss": val + 0.1}]
    lines.append({"step": 3, "train/loss": 0.9, "val/loss": val})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "tr')
    scores = {"air": {"rmse": {"6": {"ours": rmse, "persistence": 2.5}, "24": {"ours": 2 * rmse, "persistence": 3.0}}}}
    (folder / "scores.json").write_text(json.dumps(scores))
    if samples_per_second is not None:
        (folder / "outcome.json").write_text(json.dumps({"samples_per_second": samples_per_second}))
    if windows:
        rng = np.random.default_rng(0)
        squared = (rmse * np.array([1, 2]) * rng.normal(size=(300, 2))) ** 2
        np.savez(
            folder / "window_errors.npz",
            squared_error_ours=squared[:, :, None],
            weight=np.ones((300, 2, 1)),
            bases=np.arange(300),
            hours=np.array([6.0, 24.0]),
            step_hours=np.array(6.0),
            variables=np.array(["air"]),
        )
    return folder


@pytest.fixture
def sweep(tmp_path):
    for number, (lr, size, rmse) in enumerate([("1e-3", 64, 1.4), ("3e-4", 64, 1.2), ("1e-3", 128, 1.3)]):
        make_run(
            tmp_path / f"{number + 9}",
            overrides=["data=ncep_air_temperature", f"optimizer.lr={lr}", f"model.hidden_size={size}"],
            rmse=rmse,
            val=rmse / 2,
            samples_per_second=100.0 * number if number else None,
        )
    return tmp_path


def test_a_sweep_becomes_one_table_best_first(sweep):
    runs = find_runs(str(sweep), uri=NO_STORE)
    assert [run.path.name for run in runs] == ["9", "10", "11"]
    table = Comparison.of(runs)
    assert table.columns == (
        "run", "optimizer.lr", "model.hidden_size", "best val loss", "air rmse 6 h", "air rmse 24 h",
        "air best baseline 6 h", "air best baseline 24 h", "parameters", "samples/s",
    )  # fmt: skip
    assert [row[0] for row in table.rows] == ["10", "11", "9"]
    first = table.rows[0]
    assert first[1:4] == ("3e-4", "64", "0.6") and first[4].startswith("1.2 [")
    assert first[6:] == ("2.5 (persistence)", "3 (persistence)", "17", "100") and table.rows[2][-1] == "-"


def test_the_best_baseline_is_each_runs_own_in_whatever_order_runs_are_given(tmp_path):
    """Runs of other data, or scored beside other baselines, share columns."""
    others = ({"persistence": 2.5, "climatology": 2.0}, {"climatology": 7.0, "network alone": 0.5}, {})
    for name, beside in zip("abc", others, strict=True):
        run = make_run(tmp_path / name, overrides=[f"data={name}"], rmse=1.0, val=1.0, windows=False)
        (run / "scores.json").write_text(json.dumps({"air": {"rmse": {"6": {"ours": ord(name), **beside}}}}))
    tables = [
        Comparison.of(find_runs([str(tmp_path / name) for name in names], uri=NO_STORE)) for names in ("abc", "cba")
    ]
    assert tables[0] == tables[1] and tables[0].columns[4] == "air best baseline 6 h"
    assert [row[4] for row in tables[0].rows] == ["2 (climatology)", "7 (climatology)", "-"]


def test_analyses_are_sorted_by_their_last_frame(tmp_path):
    for name, early, last in (("a", 1.0, 2.0), ("b", 3.0, 1.0)):
        run = make_run(tmp_path / name, overrides=[], rmse=1.0, val=1.0, windows=False)
        scores = {"air": {"rmse": {"-6": {"ours": early}, "0": {"ours": last}}}}
        (run / "scores.json").write_text(json.dumps(scores))
    assert [row[0] for row in Comparison.of(find_runs(str(tmp_path), uri=NO_STORE)).rows] == ["b", "a"]


def test_the_table_is_written_as_csv_markdown_and_html(sweep):
    table = Comparison.of(find_runs(str(sweep), uri=NO_STORE))
    paths = table.write(sweep / "tables")
    with open(paths[0], newline="") as file:
        assert [tuple(row) for row in csv.reader(file)] == [table.columns, *table.rows]
    markdown = paths[1].read_text().splitlines()
    assert markdown[0].startswith("| run | optimizer.lr |") and len(markdown) == 5
    assert all(line.count("|") == markdown[0].count("|") for line in markdown)
    html = paths[2].read_text()
    assert html.count("<tr>") == 4 and "<script" not in html and "http" not in html
    assert table.text().splitlines()[2].startswith("10 ")


def test_runs_without_scores_stand_last_and_overrides_are_escaped(tmp_path):
    make_run(tmp_path / "a", overrides=["x=<b>|"], rmse=2.0, val=1.0, windows=False)
    empty = make_run(tmp_path / "b", overrides=[], rmse=1.0, val=1.0, windows=False)
    (empty / "scores.json").unlink()
    table = Comparison.of(find_runs([str(tmp_path / "b"), str(tmp_path / "a"), str(tmp_path)], uri=NO_STORE))
    assert [row[0] for row in table.rows] == ["a", "b"]
    assert table.rows[0][3] == "2" and table.rows[1][3] == "-"
    assert "&lt;b&gt;|" in table.html() and "<b>\\|" not in table.html() and "<b>\\|" in table.markdown()


def test_what_is_not_there_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no run"):
        find_runs(str(tmp_path / "empty"), uri=NO_STORE)
    with pytest.raises(ValueError, match="there is no MLflow store at sqlite"):
        find_runs("an experiment", uri=NO_STORE)
    damaged = make_run(tmp_path / "damaged", overrides=[], rmse=1.0, val=1.0)
    (damaged / "scores.json").write_text("{")
    with pytest.raises(ValueError, match=r"scores\.json is damaged"):
        Comparison.of(find_runs(str(damaged), uri=NO_STORE))


def test_runs_are_found_by_mlflow_run_id_and_experiment(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    folder = make_run(tmp_path / "run", overrides=["a=1"], rmse=1.0, val=1.0)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("weather")
    run_id = client.create_run(experiment, tags={"output_dir": str(folder)}).info.run_id
    gone = client.create_run(experiment, tags={"output_dir": str(tmp_path / "gone")}).info.run_id
    client.create_run(experiment)  # a sweep's parent has no folder
    assert find_run(run_id, uri=uri).path == folder
    assert [run.path for run in find_runs("weather", uri=uri)] == [folder]
    with pytest.raises(ValueError, match="which is not here; give its output folder"):
        find_run(gone, uri=uri)
    with pytest.raises(ValueError, match="is not in the MLflow store"):
        find_run("0" * 32, uri=uri)
    with pytest.raises(ValueError, match=r"neither a folder nor an MLflow experiment of .* weather"):
        find_runs("ocean", uri=uri)


def test_intervals_of_independent_windows_agree_with_theory():
    rng = np.random.default_rng(3)
    squared = rng.normal(size=4000) ** 2
    low, high = intervals.rmse_interval(squared, np.ones(4000), block=1)
    half = 1.96 * np.sqrt(2 / 4000) / 2  # delta method: the standard deviation of a mean square of unit variance
    assert low == pytest.approx(1 - half, abs=0.012) and high == pytest.approx(1 + half, abs=0.012)
    wide = intervals.rmse_interval(np.repeat(squared[:400], 10), np.ones(4000), block=40)
    assert wide[1] - wide[0] > 2 * (high - low)  # ten equal neighbours are one observation


def test_paired_intervals_are_narrower_and_short_series_have_none():
    rng = np.random.default_rng(4)
    hard = rng.gamma(2.0, size=300)[:, None, None]
    windows = {
        "squared_error_ours": hard * 0.9,
        "squared_error_other": hard * (1 + 0.01 * rng.normal(size=hard.shape)),
        "weight": np.ones((300, 1, 1)),
        "bases": np.arange(300),
        "hours": np.array([6.0]),
        "step_hours": np.array(6.0),
    }
    assert intervals.block_length(windows, 0) == 28
    low, high = intervals.difference_interval(windows, "ours", "other", 0, 0)
    assert low < np.sqrt(0.9) - 1 < high and high - low < 0.01
    own = intervals.method_interval(windows, "ours", 0, 0)
    assert own[1] - own[0] > 0.05
    short = {name: value[:40] if np.shape(value)[:1] == (300,) else value for name, value in windows.items()}
    assert np.isnan(intervals.method_interval(short, "ours", 0, 0)).all()
